"""Weights of CAV-MAE, DALI and CED at small width, in their formats: the converted parts equal independent ones."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dali_llava.modeling import (
    CavMaeAudioConfig,
    CedAudioConfig,
    LlavaAudioConfig,
    LlavaAudioForConditionalGeneration,
)
from dali_llava.modeling.convert import get_converter
from dali_llava.modeling.convert.captioner import AUDIO_TOWER, ConvertedCaptioner, captioner_shapes, with_fields
from dali_llava.modeling.convert.cav_mae import RULES as CAV_MAE_RULES
from dali_llava.modeling.convert.cav_mae import sizes as cav_mae_sizes
from dali_llava.modeling.convert.rules import Conversion, LazyTensor, apply_rules
from dali_llava.modeling.convert.sources import Source
from dali_llava.train.losses.attentive import load_alignment_attention


WIDTH, HEADS, TOKEN_WIDTH, TEXT_WIDTH = 128, 2, 32, 32
SIZES = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS, "intermediate_size": 96}
CAV_MAE = CavMaeAudioConfig(**SIZES, max_length=64, output_size=TOKEN_WIDTH)
CED = CedAudioConfig(**SIZES, max_length=48)  # 3 columns
PROJECTOR = "model.multi_modal_projector."


def block(width: int, norms: list[str]) -> dict[str, tuple[int, ...]]:
    """Shapes of a block that is not used."""
    shapes = {f"{norm}.{kind}": (width,) for norm in norms for kind in ("weight", "bias")}
    for name, out, into in (("attn.qkv", 3, 1), ("attn.proj", 1, 1), ("mlp.fc1", 4, 1), ("mlp.fc2", 1, 4)):
        shapes |= {f"{name}.weight": (out * width, into * width), f"{name}.bias": (out * width,)}
    return shapes


def unused_cav_mae() -> dict[str, torch.Tensor]:
    """What a `.pth` of CAV-MAE contains besides its audio branch, as NaNs."""
    three = [f"norm{number}{kind}" for number in (1, 2) for kind in ("", "_a", "_v")]
    shapes = {f"blocks_v.{i}.{name}": shape for i in range(2) for name, shape in block(WIDTH, three).items()}
    shapes |= {f"decoder_blocks.0.{name}": shape for name, shape in block(64, three).items()}
    for kind in ("weight", "bias"):
        shapes |= {f"blocks_a.{i}.norm{n}_{m}.{kind}": (WIDTH,) for i in range(2) for n in (1, 2) for m in "av"}
        shapes |= {f"blocks_u.0.norm{n}{m}.{kind}": (WIDTH,) for n in (1, 2) for m in ("", "_v")}
        shapes |= {f"{name}.{kind}": (WIDTH,) for name in ("norm", "norm_v", "decoder_norm")}
    shapes |= {
        "patch_embed_v.proj.weight": (WIDTH, 3, 16, 16),
        "patch_embed_v.proj.bias": (WIDTH,),
        "pos_embed_v": (1, 196, WIDTH),
        "modality_v": (1, 1, WIDTH),
        "mask_token": (1, 1, 64),
        "decoder_embed.weight": (64, WIDTH),
        "decoder_pos_embed_a": (1, 32, 64),
        "decoder_modality_v": (1, 1, 64),
        "decoder_pred_a.weight": (256, 64),
    }
    return {name: torch.full(shape, torch.nan) for name, shape in shapes.items()}


@pytest.fixture
def base(tiny_config) -> ConvertedCaptioner:
    """A captioner with random weights."""
    config = LlavaAudioConfig.from_dict(tiny_config.to_dict())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = LlavaAudioForConditionalGeneration(config).state_dict()
        for name in ("weight", "bias"):
            for layer in ("linear_1", "linear_2"):
                weights[f"{PROJECTOR}{layer}.{name}"].normal_()
    tensors = {
        name: LazyTensor(each.shape, each.dtype, lambda each=each: each, "base") for name, each in weights.items()
    }
    return ConvertedCaptioner(config, Conversion(tensors))


def converted(kind: str, source: Path, base: ConvertedCaptioner, folder: Path) -> LlavaAudioForConditionalGeneration:
    """The captioner with the parts of `source`, saved and loaded."""
    captioner = get_converter(kind)(source, base)
    folder.mkdir()
    captioner.save(folder)
    return LlavaAudioForConditionalGeneration.from_pretrained(folder).eval()


def spectrograms(frames: int, mels: int) -> torch.Tensor:
    return torch.randn(2, frames, mels, generator=torch.Generator().manual_seed(9))


@pytest.fixture
def cav_mae(reference_towers) -> dict[str, torch.Tensor]:
    """The weights of the audio branch of CAV-MAE, and those that are not used."""
    weights = reference_towers.cav_mae_weights(CAV_MAE, seed=1)
    return {name: each for name, each in weights.items() if not name.startswith("proj.")} | unused_cav_mae()


def test_cav_mae_equals_the_reference(cav_mae, base, reference_towers, tmp_path):
    torch.save({f"module.{name}": each for name, each in cav_mae.items()}, tmp_path / "cav-mae.pth")
    model = converted("cav-mae", tmp_path / "cav-mae.pth", base, tmp_path / "model")
    tower = model.model.audio_tower
    for name in (*SIZES, "num_joint_layers", "patch_size", "num_mel_bins", "max_length", "output_size"):
        assert getattr(tower.config, name) == getattr(CAV_MAE, name), name
    fbank = spectrograms(64, 128)
    proj = {f"proj.{name}": each for name, each in tower.proj.state_dict().items()}
    expected = reference_towers.cav_mae_audio_branch(cav_mae | proj, fbank, HEADS)
    with torch.no_grad():
        tokens = tower(fbank).last_hidden_state
    assert tokens.shape == (2, 32, TOKEN_WIDTH) and expected.std() > 0.1
    assert (tokens.double() - expected).abs().max() < 1e-5
    assert proj["proj.weight"].std() > 0.01 and proj["proj.bias"].eq(0).all()  # start as in a new model
    weights = model.state_dict()
    assert all(
        torch.equal(weights[name], each.read())
        for name, each in base.conversion.tensors.items()
        if not name.startswith("model.audio_tower.")
    )
    (entry,) = model.config.sources
    assert (entry["kind"], entry["name"], entry["license"]) == ("cav-mae", "cav-mae.pth", "bsd-2-clause")


def test_report_of_cav_mae_accounts_for_every_tensor(cav_mae, base, tmp_path):
    torch.save(cav_mae, tmp_path / "cav-mae.pth")
    report = get_converter("cav-mae")(tmp_path / "cav-mae.pth", base).reports["cav-mae.pth"]
    assert report.splitlines() == [
        f"{12 * 3 + 6} tensors used",
        f"{2 * 20 + 6} dropped: visual branch",
        f"{20 + 2 + 5} dropped: decoder of the pretraining",
        "16 dropped: norms that audio blocks do not use",
        "8 dropped: norms of the joint block for other inputs",
        "2 dropped: norm of the joint tokens",
        "2 weights start as: random",
    ]


def test_full_size_cav_mae_of_dali_uses_152_of_649_tensors():
    """On the meta device, with the shapes of the released weights."""
    three = [f"norm{number}{kind}" for number in (1, 2) for kind in ("", "_a", "_v")]
    names = {"blocks_a": (11, 768), "blocks_v": (11, 768), "blocks_u": (1, 768), "decoder_blocks": (8, 512)}
    shapes = {
        f"{blocks}.{index}.{name}": shape
        for blocks, (count, width) in names.items()
        for index in range(count)
        for name, shape in block(width, three).items()
    }
    layers = {"norm_a": (768,), "norm_v": (768,), "norm": (768,), "decoder_norm": (512,), "proj": (1024, 768)}
    layers |= {"patch_embed_a.proj": (768, 1, 16, 16), "patch_embed_v.proj": (768, 3, 16, 16)}
    layers |= {"decoder_embed": (512, 768), "decoder_pred_a": (256, 512), "decoder_pred_v": (768, 512)}
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for modality, tokens in (("a", 512), ("v", 196)):
        shapes |= {f"pos_embed_{modality}": (1, tokens, 768), f"modality_{modality}": (1, 1, 768)}
        shapes |= {f"decoder_pos_embed_{modality}": (1, tokens, 512), f"decoder_modality_{modality}": (1, 1, 512)}
    shapes["mask_token"] = (1, 1, 512)
    source = Source(Path("a.pth"), {Path("a.pth"): {k: torch.empty(v, device="meta") for k, v in shapes.items()}})
    config = LlavaAudioConfig()
    for name, value in cav_mae_sizes(source).items():
        assert getattr(config.audio_config, name) == value, name
    conversion = apply_rules(source, CAV_MAE_RULES, captioner_shapes(config, AUDIO_TOWER))
    assert (len(shapes), len(conversion.used), len(conversion.dropped)) == (649, 152, 497)
    assert sum(each.shape.numel() for each in conversion.tensors.values()) == 86_434_816


def drop(weights: dict, name: str) -> dict:
    return {key: each for key, each in weights.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w | {"blocks_a.0.gate": torch.zeros(1)}, "blocks_a.0.gate is unknown"),
        (lambda w: drop(w, "blocks_a.1.attn.proj.bias"), "no tensor becomes .*layers.1.attention.o_proj.bias"),
        (lambda w: drop(w, "pos_embed_a"), "has no pos_embed_a"),
        (lambda w: w | {"norm_a.bias": torch.zeros(7)}, r"norm_a.bias gives shape \(7,\), but .* \(128,\)"),
        (lambda w: w | {"blocks_u.0.attn.qkv.bias": torch.zeros(7)}, r"qkv.bias has shape \(7,\).* split into 3"),
        (lambda w: w | {"patch_embed_a.proj.weight": torch.zeros(96, 1, 16, 16)}, "width 96, .* multiple of 64"),
        (lambda w: w | {"pos_embed_a": torch.zeros(32, WIDTH)}, r"pos_embed_a has shape \(32, 128\), .* 3 dimensions"),
    ],
)
def test_wrong_tensors_of_cav_mae_are_named(change, message, cav_mae, base, tmp_path):
    torch.save(change(cav_mae), tmp_path / "cav-mae.pth")
    with pytest.raises(ValueError, match=rf"cav-mae.pth: .*{message}") as error:
        get_converter("cav-mae")(tmp_path / "cav-mae.pth", base)
    assert "\n" not in str(error.value)


@pytest.fixture
def attention() -> dict[str, torch.Tensor]:
    """Weights of the attention of DALI, by its names."""
    torch.manual_seed(2)
    parts = {f"{modality}_{part}": nn.Linear(TOKEN_WIDTH, TOKEN_WIDTH) for modality in "ai" for part in "qkv"}
    parts |= {f"{name}_scorer": nn.MultiheadAttention(TOKEN_WIDTH, 8) for name in ("audio", "image")}
    for part in parts.values():
        for weight in part.parameters():
            nn.init.normal_(weight, std=0.3)
    return {f"{name}.{key}": each for name, part in parts.items() for key, each in part.state_dict().items()}


@pytest.fixture
def dali_dir(reference_towers, attention, tmp_path) -> Path:
    """A folder with `audio_backbone.pth`."""
    folder = tmp_path / "dali"
    folder.mkdir()
    weights = reference_towers.cav_mae_weights(CAV_MAE, seed=1) | unused_cav_mae() | attention
    weights |= {"vision_tower.vision_tower.vision_model.post_layernorm.weight": torch.full((8,), torch.nan)}
    torch.save({f"module.{name}": each for name, each in weights.items()}, folder / "audio_backbone.pth")
    return folder


def projector(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    layers = {"0": nn.Linear(TOKEN_WIDTH, TEXT_WIDTH), "2": nn.Linear(TEXT_WIDTH, TEXT_WIDTH)}
    return {
        f"model.mm_projector.{name}.{key}": each
        for name, layer in layers.items()
        for key, each in layer.state_dict().items()
    }


def image_projector(base: ConvertedCaptioner) -> dict[str, torch.Tensor]:
    """The image projector of a captioner, by the names of the original LLaVA."""
    return {
        f"model.mm_projector.{number}.{key}": base.conversion.tensors[f"{PROJECTOR}linear_{layer}.{key}"].read()
        for number, layer in (("0", 1), ("2", 2))
        for key in ("weight", "bias")
    }


def prefix(length: int, seed: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"model.audio_tower.prefix": torch.randn(length, TEXT_WIDTH, generator=generator)}


def test_dali_equals_the_reference(dali_dir, base, reference_towers, tmp_path):
    torch.save(prefix(5) | image_projector(base), dali_dir / "prefix.bin")
    torch.save(prefix(5, seed=4) | projector(6), dali_dir / "prefixMLP.bin")
    model = converted("dali", dali_dir, base, tmp_path / "model")
    fbank = spectrograms(64, 128)
    expected = reference_towers.cav_mae_audio_branch(reference_towers.cav_mae_weights(CAV_MAE, seed=1), fbank, HEADS)
    tuned = {name.removeprefix("model.mm_projector."): each.double() for name, each in projector(6).items()}
    hidden = nn.functional.gelu(expected @ tuned["0.weight"].T + tuned["0.bias"])
    projected = hidden @ tuned["2.weight"].T + tuned["2.bias"]
    with torch.no_grad():
        audio = model.get_audio_features(fbank)
    assert (audio.last_hidden_state.double() - expected).abs().max() < 1e-5
    assert (torch.stack(list(audio.pooler_output)).double() - projected).abs().max() < 1e-5
    assert torch.equal(model.model.prefix.weight, prefix(5)["model.audio_tower.prefix"])
    assert model.config.prefix_length == 5 and model.config.prefix_modalities == ["audiovisual"]
    image = model.model.multi_modal_projector.linear_1.weight
    assert torch.equal(image, base.conversion.tensors[f"{PROJECTOR}linear_1.weight"].read())


def test_attention_of_dali_equals_multihead_attention(dali_dir, attention, base, tmp_path):
    """Queries of audio over the image make the weights of audio tokens through `image_scorer`, and conversely."""
    converted("dali", dali_dir, base, tmp_path / "model")
    loaded = load_alignment_attention(tmp_path / "model").double()
    generator = torch.Generator().manual_seed(5)
    audio, image = (torch.randn(2, n, TOKEN_WIDTH, generator=generator, dtype=torch.float64) for n in (6, 9))
    weights = {name: each.double() for name, each in attention.items()}

    def linear(tokens, name):
        return tokens @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def scores(name, query, key, value):
        scorer = nn.MultiheadAttention(TOKEN_WIDTH, 8, dtype=torch.float64)  # (tokens, B, width)
        scorer.load_state_dict({key: weights[f"{name}.{key}"] for key in scorer.state_dict()})
        hidden, _ = scorer(query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1))
        return (hidden.transpose(0, 1).mean(-1) / 20).softmax(-1)

    expected_audio = scores("image_scorer", linear(audio, "a_q"), linear(image, "i_k"), linear(image, "i_v"))
    expected_image = scores("audio_scorer", linear(image, "i_q"), linear(audio, "a_k"), linear(audio, "a_v"))
    with torch.no_grad():
        audio_weights, image_weights = loaded(audio, image)
    torch.testing.assert_close(audio_weights, expected_audio, rtol=0, atol=1e-12)
    torch.testing.assert_close(image_weights, expected_image, rtol=0, atol=1e-12)
    assert expected_audio.std() > 1e-4 and expected_image.std() > 1e-4


def test_prefix_of_the_prefix_tuning_beside_an_untouched_projector(dali_dir, base, tmp_path):
    """`prefixMLP.bin` of the prefix tuning, where DALI's code saves a prefix and the image projector."""
    half = {name: each.to(torch.bfloat16) for name, each in (prefix(4) | image_projector(base)).items()}
    torch.save(half, dali_dir / "prefixMLP.bin")
    model = converted("dali", dali_dir, base, tmp_path / "model")
    assert torch.equal(model.model.prefix.weight, half["model.audio_tower.prefix"].float())
    assert model.config.prefix_modalities == base.config.prefix_modalities
    assert torch.equal(model.model.audio_projector.linear_2.weight, half["model.mm_projector.2.weight"].float())


def test_backbone_alone_keeps_the_other_parts(dali_dir, base, tmp_path):
    captioner = get_converter("dali")(dali_dir / "audio_backbone.pth", base)
    for name in ("model.prefix.weight", "model.audio_projector.linear_1.weight"):
        assert captioner.conversion.tensors[name] is base.conversion.tensors[name]
    assert captioner.config.prefix_length == base.config.prefix_length
    (dali_dir / "audio_backbone.pth").unlink()
    with pytest.raises(FileNotFoundError, match="audio_backbone.pth"):
        get_converter("dali")(dali_dir, base)


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("prefix.bin", {"model.audio_tower.prefix": torch.zeros(4, 7)}, r"prefix gives shape \(4, 7\)"),
        ("prefix.bin", projector(0), "has no model.audio_tower.prefix"),
        ("prefixMLP.bin", projector(0) | {"model.other": torch.zeros(1)}, "model.other is unknown"),
        ("prefixMLP.bin", prefix(4), "has no model.mm_projector.2.bias"),
        ("prefixMLP.bin", drop(projector(0), "model.mm_projector.0.bias"), "no tensor becomes .*linear_1.bias"),
    ],
)
def test_wrong_tensors_of_dali_are_named(name, weights, message, dali_dir, base):
    torch.save(weights, dali_dir / name)
    with pytest.raises(ValueError, match=f"{name}: .*{message}"):
        get_converter("dali")(dali_dir, base)


def test_backbone_without_linear_layer_is_refused(cav_mae, base, tmp_path):
    torch.save(cav_mae, tmp_path / "audio_backbone.pth")
    with pytest.raises(ValueError, match=r"no tensor becomes model.audio_tower.proj.weight"):
        get_converter("dali")(tmp_path, base)


def ced_file(weights: dict[str, torch.Tensor], kind: str, folder: Path) -> Path:
    """Save weights of CED as an original `.pt` file, or as a model on the Hub."""
    classifier = {"outputlayer.0.weight": (WIDTH,), "outputlayer.1.weight": (527, WIDTH)}
    unused = {name: torch.full(shape, torch.nan) for name, shape in classifier.items()}
    if kind == "original":
        unused |= {
            "front_end.0.spectrogram.window": torch.zeros(512),
            "front_end.0.mel_scale.fb": torch.zeros(257, 64),
        }
        torch.save(weights | unused, folder / "audiotransformer.pt")
        return folder / "audiotransformer.pt"
    names = {name: "encoder." + name.replace("init_bn.1.", "init_bn.") for name in weights}
    save_file({names[name]: each for name, each in weights.items()} | unused, folder / "model.safetensors")
    (folder / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    return folder


@pytest.mark.parametrize("max_length", [64, 48, 32])  # 4, 3 and 2 columns; the source has 3
@pytest.mark.parametrize("kind", ["original", "hub"])
def test_ced_equals_the_reference(kind, max_length, base, reference_towers, tmp_path):
    weights = reference_towers.ced_weights(CED, seed=1)
    source = ced_file(weights, kind, tmp_path)
    options = {"model_type": "ced_audio", "mel_pooling": True, "front_end": "kaldi"}
    fields = {**base.config.to_dict(), "audio_config": {"max_length": max_length, "output_size": 32, **options}}
    base = ConvertedCaptioner(LlavaAudioConfig.from_dict(fields), base.conversion)
    model = converted("ced", source, base, tmp_path / "model")
    tower = model.model.audio_tower
    assert {name: getattr(tower.config, name) for name in options} == options
    decibels = -21 + 32 * spectrograms(max_length, 64)
    expected = reference_towers.ced_encoder(weights, decibels, HEADS).mean(1)
    proj = {name: each.double() for name, each in tower.proj.state_dict().items()}
    with torch.no_grad():
        tokens = tower(decibels).last_hidden_state
    assert (tokens.double() - expected @ proj["weight"].T - proj["bias"]).abs().max() < 1e-5
    assert tower.embeddings.init_bn.num_batches_tracked == 7
    (entry,) = model.config.sources
    assert entry["license"] == {"original": "apache-2.0", "hub": "cc-by-4.0"}[kind]


def test_ced_replaces_another_tower_with_the_default_options(base, reference_towers, tmp_path):
    source = ced_file(reference_towers.ced_weights(CED, seed=1), "original", tmp_path)
    captioner = get_converter("ced")(source, base)
    config = captioner.config.audio_config
    assert (config.front_end, config.mel_pooling, config.freeze_batch_norm) == ("decibel", False, True)
    assert (config.max_length, config.num_mel_bins, config.output_size) == (1024, 64, 32)
    positions = captioner.conversion.tensors["model.audio_tower.embeddings.time_pos_embed"]
    assert positions.shape == (1, WIDTH, 1, 64) == positions.read().shape
    (report,) = captioner.reports.values()
    assert report.splitlines() == [
        f"{2 * 12 + 5 + 2 + 2 + 2} tensors used",
        "2 dropped: classifier",
        "2 dropped: front end, computed by the feature extractor",
        "2 weights start as: random",
    ]


def test_sources_of_replaced_parts_are_no_longer_listed(dali_dir, cav_mae, base, reference_towers, tmp_path):
    torch.save(prefix(5) | image_projector(base), dali_dir / "prefix.bin")
    torch.save(cav_mae, tmp_path / "cav-mae.pth")
    ced = ced_file(reference_towers.ced_weights(CED, seed=1), "original", tmp_path)
    sources = {"ced": ced, "cav-mae": tmp_path / "cav-mae.pth", "dali": dali_dir}
    base = replace(base, config=with_fields(base.config, sources=[{"kind": "llava", "name": "llava"}]))

    def compose(*kinds: str) -> tuple[list, list]:
        captioner = base
        for kind in kinds:
            captioner = get_converter(kind)(sources[kind], captioner)
        return [(entry["kind"], entry.get("parts")) for entry in captioner.config.sources], list(captioner.files)

    assert compose("ced", "ced") == ([("llava", None), ("ced", ["audio_tower"])], [])
    assert compose("ced", "cav-mae") == ([("llava", None), ("cav-mae", ["audio_tower"])], [])
    listed, files = compose("cav-mae", "dali")
    assert listed == [("llava", None), ("dali", ["audio_tower", "prefix"])]
    assert files == ["alignment_attention.safetensors"]
    # The prefix of DALI stays without its tower. Its attention weights the tokens of the tower, and does not stay.
    assert compose("dali", "ced") == ([("llava", None), ("dali", ["prefix"]), ("ced", ["audio_tower"])], [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w | {"cls_token": torch.zeros(1)}, "cls_token is unknown"),
        (lambda w: drop(w, "init_bn.1.running_var"), "no tensor becomes .*init_bn.running_var"),
        (lambda w: drop(w, "time_pos_embed"), "has no time_pos_embed"),
        (lambda w: w | {"time_pos_embed": torch.zeros(1, 64, 1, 3)}, r"time_pos_embed gives shape \(1, 64, 1, 64\)"),
        (lambda w: w | {"encoder.norm.bias": torch.zeros(WIDTH)}, "has no encoder.patch_embed.proj.weight"),
    ],
)
def test_wrong_tensors_of_ced_are_named(change, message, base, reference_towers, tmp_path):
    torch.save(change(reference_towers.ced_weights(CED, seed=1)), tmp_path / "ced.pt")
    with pytest.raises(ValueError, match=f"ced.pt: .*{message}"):
        get_converter("ced")(tmp_path / "ced.pt", base)
