"""Tests of the benchmark of the alignment step, at a very small size."""

import json

import pytest
import torch

from dali_llava.modeling import LlavaAudioConfig
from dali_llava.train.trainers import AlignmentModel


@pytest.fixture
def step(benchmarks):
    import step

    return step


@pytest.fixture
def tiny(step, monkeypatch):
    """Replaces AVWorld's size with fewer layers, pairs and clips."""
    avworld = step.SIZES["avworld"].sections
    layers = {"vision_config": {"num_hidden_layers": 1}, "audio_config": {"num_hidden_layers": 1}, "text_config": {}}
    sections = {name: own | layers[name] for name, own in avworld.items()}
    monkeypatch.setitem(step.SIZES, "avworld", step.Size(sections, batch=4, clips=4))


def test_full_size_is_that_of_the_paper(step, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    arguments = step.parse_arguments(["--device", "cuda"])
    assert (arguments.sizes, arguments.output.name) == (["full"], "step.json")
    size = step.SIZES["full"]
    assert size.batch == 256 and size.config.to_dict() == LlavaAudioConfig().to_dict()
    audio = size.config.audio_config
    tokens = audio.num_audio_tokens(audio.max_length), size.config.image_seq_length, audio.output_size
    assert tokens == (512, 576, 1024)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--device", "cuda"], "--device cuda: torch finds no GPU"),
        (["--parts", "loss"], "argument --parts: invalid choice"),
        (["--sizes", "huge"], "argument --sizes: invalid choice"),
        (["--batch", "0"], "argument --batch: must be at least 1, not 0"),
    ],
)
def test_usage_errors(step, monkeypatch, capsys, words, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        step.parse_arguments(words)
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_loop_and_ours_are_the_same_loss(step, tiny):
    """Value and gradients of the towers and the attention, with one attention for all three."""
    torch.manual_seed(0)
    config = step.SIZES["avworld"].config
    towers, batch = step.towers_of(config, "cpu"), step.random_batch(config, 4, "cpu")
    attention = step.attentive_loss(config).attention
    found = []
    for loss_class, parts in (
        (step.PairLoopLoss, 1),
        (step.AttentiveTransportLoss, 1),
        (step.AttentiveTransportLoss, 3),
    ):
        objective = step.attentive_loss(config, loss_class)
        objective.attention = attention
        model = AlignmentModel(towers, objective, parts).train()
        output = model(**batch)
        assert output.logs["transport_seconds"] >= 0
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        found.append((output.loss, torch.autograd.grad(output.loss, trained)))
    (value, gradients), *others = found
    for other_value, other_gradients in others:
        torch.testing.assert_close(other_value, value, rtol=1e-5, atol=1e-5)
        for own, expected in zip(other_gradients, gradients, strict=True):
            torch.testing.assert_close(own, expected, rtol=1e-2, atol=1e-3 * expected.abs().max().item() + 1e-6)


def test_a_step_moves_the_audio_tower_and_the_attention_only(step, tiny):
    torch.manual_seed(0)
    config = step.SIZES["avworld"].config
    model = AlignmentModel(step.towers_of(config, "cpu"), step.attentive_loss(config))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    step.AlignmentStep(model)(step.random_batch(config, 2, "cpu"))
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    weights = {name for name in before if name.endswith("weight") and not name.startswith("towers.vision_tower.")}
    assert weights <= moved and not any(name.startswith("towers.vision_tower.") for name in moved)


def test_a_run_writes_each_part(step, tiny, monkeypatch, tmp_path, capsys):
    """Memory is that of two processes each; here, the two models are only built and run."""

    def peak_memory(work, inputs, small_inputs, device):
        work(small_inputs())
        return 3 * 2**20

    monkeypatch.setattr(step, "peak_memory", peak_memory)
    path = tmp_path / "step.json"
    step.main(["--sizes", "avworld", "--repeats", "1", "--output", str(path)])
    record = json.loads(path.read_text())
    assert record["benchmark"] == "step" and record["settings"]["sizes"] == ["avworld"]
    transport, memory, cache = record["cases"]
    assert [case["part"] for case in record["cases"]] == ["transport", "memory", "cache"]
    assert (transport["audio_tokens"], transport["image_tokens"], transport["width"]) == (16, 4, 64)
    assert list(transport["figures"]) == ["loop over pairs", "whole batch", "4 micro-batches"]
    for own in transport["figures"].values():
        assert 0 <= own["transport_share"]["min"] <= own["transport_share"]["max"] < 1
        assert own["pairs_a_second"] == pytest.approx(4 / own["seconds"]["median"])
    towers, captioner = (memory["figures"][name] for name in ("towers", "whole captioner"))
    assert towers["parameters_full"] < 0.5e9 < 6e9 < captioner["parameters_full"] < 8e9
    saved = captioner["parameters_full"] - towers["parameters_full"]
    assert memory["saved_bytes_full_16_bit"] == 2 * saved
    assert cache["clips"] == 4 and list(cache["figures"]) == ["not cached", "cached"]
    assert "13.3 GB of 16-bit weights" in capsys.readouterr().out


def test_out_of_memory_says_what_to_lower(step, monkeypatch, tmp_path):
    def fails(*arguments):
        raise torch.OutOfMemoryError("tried to allocate 100 GiB")

    monkeypatch.setitem(step.PARTS, "cache", (fails, None))
    words = ["--parts", "cache", "--sizes", "avworld", "--output", str(tmp_path / "step.json")]
    with pytest.raises(SystemExit, match="cache, avworld: out of memory; lower --batch. tried to"):
        step.main(words)
    assert list(tmp_path.iterdir()) == []
