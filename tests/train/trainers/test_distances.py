"""The distance between the tokens of a fixed batch: its values, its steps, and that it does not affect training."""

from types import SimpleNamespace

import numpy as np
import ot
import pytest
import torch

from dali_llava.modeling import LlavaAudioTowers
from dali_llava.processing.corpora.rows import open_audio
from dali_llava.train.data.augmentation import Augmentation
from dali_llava.train.data.clips import open_frame
from dali_llava.train.data.collators import AlignmentCollator, input_features, pixel_values
from dali_llava.train.losses import MMDLoss
from dali_llava.train.trainers.distances import CLIPS, PROJECTIONS, TokenDistances, token_distances


NAMES = ("token_mmd", "token_sliced_wasserstein")


def sliced(x: np.ndarray, y: np.ndarray) -> float:
    """Sliced 2-Wasserstein distance by one-dimensional transport along each of the same projections."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(x.shape[1], PROJECTIONS, generator=generator).double().numpy()
    directions /= np.linalg.norm(directions, axis=0)
    costs = [ot.emd2_1d(x @ direction, y @ direction) for direction in directions.T]
    return float(np.sqrt(np.mean(costs)))


def measured(trainer) -> dict[int, dict]:
    """Returns the logged distances by step."""
    history = trainer.state.log_history
    return {entry["step"]: {name: entry[name] for name in NAMES} for entry in history if NAMES[0] in entry}


def test_distance_of_a_shift_is_its_mean_length_on_the_projections():
    tokens = torch.randn(1, 7, 5, generator=torch.Generator().manual_seed(1))
    assert token_distances(tokens, tokens) == pytest.approx(dict.fromkeys(NAMES, 0.0), abs=1e-6)
    shift = torch.tensor([3.0, 0, 0, 4.0, 0])
    found = token_distances(tokens + shift, tokens)["token_sliced_wasserstein"]
    # |shift|^2 times the mean squared cosine, which is 1 / 5 up to the draw of 128 projections
    assert found == pytest.approx(5 / 5**0.5, rel=0.1)


def test_masked_tokens_do_not_count():
    generator = torch.Generator().manual_seed(0)
    audio, image = torch.randn(2, 6, 4, generator=generator), torch.randn(2, 5, 4, generator=generator)
    mask = torch.tensor([[True] * 6, [True] * 3 + [False] * 3])
    alone = [token_distances(audio[:1], image[:1]), token_distances(audio[1:, :3], image[1:])]
    expected = {name: (alone[0][name] + alone[1][name]) / 2 for name in NAMES}
    audio[1, 3:] = 1e6
    assert token_distances(audio, image, mask) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("cached", [True, False])
def test_last_entry_has_the_distances_of_the_saved_model(run_stage, run_dir, tmp_path, cached):
    words = ["--distance_steps", "2", "--max_steps", "3", "--cache_features", str(cached), "--logging_steps", "10"]
    trainer = run_stage("aligned", run_dir / "tower", tmp_path / "out", *words)
    rows = [trainer.data_collator.opener.spares[index] for index in range(CLIPS)]
    if cached:
        features, image = (
            torch.tensor(np.stack(column))
            for column in zip(*((row["input_features"], row["image_tokens"][0]) for row in rows), strict=True)
        )
    else:
        processor = trainer.processing_class
        features = input_features([open_audio(row) for row in rows], processor)
        pixels = pixel_values([open_frame(row, 0) for row in rows], processor)
    for folder, step in ((run_dir / "tower", 0), (tmp_path / "out", 3)):
        towers = LlavaAudioTowers.from_pretrained(folder).eval()
        with torch.no_grad():
            audio = towers.encode_audio(features)
            image = image if cached else towers.encode_image(pixels)
        assert measured(trainer)[step]["token_mmd"] == pytest.approx(MMDLoss()(audio, image).loss.item(), rel=1e-4)
        expected = np.mean([sliced(x.double().numpy(), y.double().numpy()) for x, y in zip(audio, image, strict=True)])
        assert measured(trainer)[step]["token_sliced_wasserstein"] == pytest.approx(expected, rel=1e-4)
    assert list(measured(trainer)) == [0, 2, 3]


def test_distances_do_not_change_the_weights(run_stage, run_dir, tmp_path):
    off, on = tmp_path / "off", tmp_path / "on"
    assert measured(run_stage("aligned", run_dir / "tower", off, "--distance_steps", "0")) == {}
    assert len(measured(run_stage("aligned", run_dir / "tower", on, "--distance_steps", "1"))) == 3
    assert (off / "stage.safetensors").read_bytes() == (on / "stage.safetensors").read_bytes()


def make_distances(rows, avworld_processor, frame: int | None = None) -> TokenDistances:
    collator = AlignmentCollator(avworld_processor, Augmentation(noise=1.0), frame=frame)
    return TokenDistances(SimpleNamespace(train_dataset=rows, eval_dataset=None, data_collator=collator), steps=1)


def test_broken_clip_is_left_out(rows, avworld_processor, caplog):
    broken = [rows[0], rows[1] | {"audio": {"path": "gone.wav", "bytes": b"no sound"}}, rows[2]]
    batch = make_distances(broken, avworld_processor)._fixed_batch()
    whole = make_distances([rows[0], rows[2]], avworld_processor)._fixed_batch()
    assert all(torch.equal(batch[name], whole[name]) for name in ("pixel_values", "input_features"))
    assert "left out of the token distances" in caplog.text
    callback = make_distances(broken[1:2], avworld_processor)
    callback.on_train_begin(None, SimpleNamespace(global_step=0), None)  # logs nothing and raises nothing
    assert "none of the first 16 clips can be opened" in caplog.text


def test_evaluation_clips_are_preferred(rows, avworld_processor):
    callback = make_distances(rows[:2], avworld_processor)
    callback.trainer.eval_dataset = rows[2:]
    expected = make_distances(rows[2:], avworld_processor)._fixed_batch()
    assert torch.equal(callback._fixed_batch()["input_features"], expected["input_features"])
