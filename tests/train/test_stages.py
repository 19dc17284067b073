"""Every stage from its command line: which weights it trains, that its folder loads, and that it is deterministic."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from dali_llava.modeling import LlavaAudioForConditionalGeneration, LlavaAudioTowers
from dali_llava.modeling.pretrained_llava_audio import LlavaAudioPreTrainedModel
from dali_llava.processing import SEE_PROMPT, LlavaAudioProcessor
from dali_llava.train.align import build_objective
from dali_llava.train.data.clips import open_frame
from dali_llava.train.losses import LOSSES
from dali_llava.train.losses.attentive import ATTENTION_WEIGHTS, load_alignment_attention


TRAINED = {
    "prefix": "model.prefix.",
    "tower": "model.audio_tower.",
    "aligned": "model.audio_tower.",
    "distilled": "model.audio_projector.",
}
BEFORE = {"prefix": "captioner", "tower": "prefix", "aligned": "tower", "distilled": "aligned"}


@pytest.fixture(scope="module")
def loaded(run_dir) -> dict[str, LlavaAudioForConditionalGeneration]:
    """The captioners after each stage."""
    return {
        stage: LlavaAudioForConditionalGeneration.from_pretrained(run_dir / stage).eval()
        for stage in ("captioner", *TRAINED)
    }


@pytest.fixture
def unloaded(monkeypatch) -> None:
    """Fails if a model is loaded, which may take minutes: bad input must be reported before."""

    def fail(*args, **kwargs):
        pytest.fail("a model is loaded")

    monkeypatch.setattr(LlavaAudioPreTrainedModel, "from_pretrained", fail)


@pytest.mark.parametrize("stage", TRAINED)
def test_stage_changes_what_it_trains_and_nothing_else(loaded, stage):
    before, after = loaded[BEFORE[stage]].state_dict(), loaded[stage].state_dict()
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    part = {name for name in after if name.startswith(TRAINED[stage])}
    assert changed and changed <= part
    # the bias of a key has no gradient except for rounding, and may not change
    assert all(name.endswith("k_proj.bias") for name in part - changed)


@pytest.mark.parametrize("stage", TRAINED)
def test_stage_saves_what_it_trained_and_its_base(run_dir, stage):
    description = json.loads((run_dir / stage / "stage.json").read_text())
    assert description["base_model_name_or_path"] == f"../{BEFORE[stage]}"
    assert all(name.startswith(TRAINED[stage]) for name in description["trained"])
    assert sorted(load_file(run_dir / stage / "stage.safetensors")) == description["trained"]
    assert not (run_dir / stage / "model.safetensors").exists()
    assert not list((run_dir / stage).rglob("*.bin")) + list((run_dir / stage).rglob("*.pt"))


def test_stages_are_named(run_dir):
    names = [json.loads((run_dir / stage / "stage.json").read_text())["stage"] for stage in TRAINED]
    assert names == ["prefix", "tower", "align:mmd", "distill"]


@pytest.mark.parametrize("stage", ["captioner", *TRAINED])
def test_stage_saves_its_processor(run_dir, avworld_processor, rows, stage):
    processor = LlavaAudioProcessor.from_pretrained(run_dir / stage)
    prompt = {"text": "<image>", "images": open_frame(rows[0], 0), "return_tensors": "pt"}
    ours, expected = processor(**prompt), avworld_processor(**prompt)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_picture_logits_are_untouched_by_every_stage(loaded, avworld_processor, rows):
    text = [avworld_processor.format_prompt(SEE_PROMPT, image=True)] * len(rows)
    inputs = avworld_processor(text=text, images=[open_frame(row, 0) for row in rows], return_tensors="pt")
    with torch.no_grad():
        expected = loaded["captioner"](**inputs).logits
        assert all(torch.equal(loaded[stage](**inputs).logits, expected) for stage in TRAINED)


def test_captioner_never_trains_its_ears(loaded):
    """The audio projector equals the image projector; prefix and audio tower keep their initial weights."""
    model = loaded["captioner"].model
    image, audio = model.multi_modal_projector.state_dict(), model.audio_projector.state_dict()
    assert all(torch.equal(audio[name], image[name]) for name in image)
    assert model.prefix.weight.detach().std() == pytest.approx(0.01, rel=0.1)
    assert not model.audio_tower.proj.bias.any() and torch.equal(model.audio_tower.norm.weight, torch.ones(32))


def test_distilled_model_asks_sound_without_prefix(loaded):
    assert list(loaded["aligned"].config.prefix_modalities) == ["audio", "audiovisual"]
    assert list(loaded["distilled"].config.prefix_modalities) == ["audiovisual"]


@pytest.mark.parametrize("stage", ["captioner", *TRAINED])
def test_same_seed_gives_the_same_weights(run_stage, run_dir, tmp_path, stage):
    base = run_dir / BEFORE[stage] if stage in BEFORE else None
    weights = "stage.safetensors" if stage in BEFORE else "model.safetensors"
    run_stage(stage, base, tmp_path / "again")
    assert (tmp_path / "again" / weights).read_bytes() == (run_dir / stage / weights).read_bytes()


def test_another_seed_gives_other_weights(run_stage, run_dir, tmp_path):
    run_stage("aligned", run_dir / "tower", tmp_path / "other", "--seed", "1")
    weights = [load_file(folder / "stage.safetensors") for folder in (tmp_path / "other", run_dir / "aligned")]
    assert not torch.equal(*(each["model.audio_tower.proj.weight"] for each in weights))


@pytest.mark.parametrize("stage", TRAINED)
def test_missing_base_is_an_error_with_its_remedy(run_stage, tmp_path, stage):
    with pytest.raises(ValueError, match="no base_model.*--base_model DIR"):
        run_stage(stage, None, tmp_path / "out")
    gone = tmp_path / "gone"
    with pytest.raises(ValueError, match=re.escape(f"base_model {gone}: no such directory; run the stage")):
        run_stage(stage, gone, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_stage_before_the_one_before_it_is_an_error_with_its_remedy(run_stage, run_dir, tmp_path):
    """Distillation of a model that was not aligned, and alignment of a chain without a prefix."""
    prefix = run_dir / "prefix"
    message = f"base_model {prefix} only has the stages prefix; run train/align.py first"
    with pytest.raises(ValueError, match=re.escape(message)):
        run_stage("distilled", prefix, tmp_path / "out")
    run_stage(
        "aligned", run_dir / "captioner", tmp_path / "unprefixed"
    )  # a complete checkpoint does not record its stages
    with pytest.raises(ValueError, match="only has the stages align:mmd; run train/prefix_tune.py first"):
        run_stage("aligned", tmp_path / "unprefixed", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unknown_objective_lists_those_there_are(run_stage, run_dir, tmp_path, unloaded):
    with pytest.raises(ValueError, match=f"unknown objective 'mdd'; known: {', '.join(LOSSES)}"):
        run_stage("aligned", run_dir / "prefix", tmp_path / "out", "--objective", "mdd")


def test_unknown_objective_option_is_named(run_stage, run_dir, tmp_path, unloaded):
    options = ["--objective", "contrastive", "--objective_options", '{"temprature": 0.1}']
    with pytest.raises(ValueError, match="objective contrastive: unknown option temprature; known: temperature"):
        run_stage("aligned", run_dir / "prefix", tmp_path / "out", *options)


@pytest.mark.parametrize(
    ("objective", "options", "message"),
    [
        ("contrastive", {"temperature": -1}, "objective contrastive: temperature must be positive, not -1"),
        ("ot", {"solver": "exacct"}, "objective ot: .*exacct"),
        ("ot_att", {"num_heads": 5}, "objective ot_att: width must be a multiple of num_heads, not 32 and 5"),
        ("token_assignment", {"variant": "papr"}, "objective token_assignment: unknown variant 'papr'"),
    ],
)
def test_bad_objective_option_is_an_error_before_a_model_is_loaded(
    run_stage, run_dir, tmp_path, unloaded, objective, options, message
):
    words = ["--objective", objective, "--objective_options", json.dumps(options)]
    with pytest.raises(ValueError, match=message):
        run_stage("aligned", run_dir / "prefix", tmp_path / "out", *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dataset", "avwrld"], "unknown corpus 'avwrld'; known: avworld"),
        (["--split", "trian"], "has no split 'trian'; known: .*train"),
        (["--dataset_options", '{"size": 3}'], "has no option 'size'; known: .*sizes"),
    ],
)
@pytest.mark.parametrize("stage", TRAINED)
def test_unknown_corpus_split_or_option_is_named_before_a_model_is_loaded(
    run_stage, run_dir, tmp_path, unloaded, stage, words, message
):
    with pytest.raises(ValueError, match=message):
        run_stage(stage, run_dir / BEFORE[stage], tmp_path / "out", *words)


def test_too_few_shots_are_an_error(run_stage, run_dir, tmp_path):
    with pytest.raises(ValueError, match=r"split shots: 16 rows, fewer than max_samples \(17\); lower max_samples"):
        run_stage("prefix", run_dir / "captioner", tmp_path / "out", "--max_samples", "17")


def test_objectives_take_the_tokens_width_and_their_options(run_dir):
    class Arguments:
        objective = "ot_att"
        objective_options = {"num_heads": 4}

    objective = build_objective(Arguments(), LlavaAudioTowers.from_pretrained(run_dir / "captioner"))
    assert objective.attention.audio_query.in_features == 32
    assert objective.attention.audio_attention.num_heads == 4


@pytest.mark.parametrize("objective", sorted(set(LOSSES) - {"mmd"}))
def test_every_objective_aligns(run_stage, run_dir, tmp_path, objective):
    trainer = run_stage("aligned", run_dir / "prefix", tmp_path / objective, "--objective", objective)
    assert trainer.state.global_step == 2
    assert sorted(load_file(tmp_path / objective / "stage.safetensors")) == sorted(
        f"model.{name}" for name, _ in trainer.pretrained.named_parameters() if name.startswith("audio_tower.")
    )
    assert (tmp_path / objective / ATTENTION_WEIGHTS).exists() == (objective == "ot_att")


def test_learnt_attention_lies_beside_the_model(run_stage, run_dir, tmp_path):
    options = '{"num_heads": 4, "temperature": 0.5}'
    words = ["--objective", "ot_att", "--objective_options", options, "--schedule_epochs", "2"]
    trainer = run_stage("aligned", run_dir / "prefix", tmp_path / "out", *words)
    attention = load_alignment_attention(tmp_path / "out")
    expected = trainer.model.objective.attention.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in attention.state_dict().items())
    assert (attention.num_heads, attention.temperature) == (4, 0.5)
    run_stage("aligned", run_dir / "prefix", tmp_path / "out", "--objective", "mmd")
    assert not (tmp_path / "out" / ATTENTION_WEIGHTS).exists()  # it belonged to the replaced weights
    LlavaAudioForConditionalGeneration.from_pretrained(tmp_path / "out")  # which accepts the file
