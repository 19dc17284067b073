"""`convert` with audio towers: from released weights to a captioner that captions."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from dali_llava.cli import main
from dali_llava.modeling import CavMaeAudioConfig, CavMaeAudioModel, CedAudioConfig, CedAudioModel


SIZES = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 64}


def released(tower: nn.Module, names: dict[str, str]) -> dict[str, torch.Tensor]:
    """The weights of a tower by released names, with fused queries, keys and values."""
    weights = {}
    for name, weight in tower.state_dict().items():
        for ours, theirs in {**names, "attention.o_proj": "attn.proj"}.items():
            name = name.replace(ours, theirs)
        weights[name] = weight
    fused = {name: each for name, each in weights.items() if ".attention." not in name}
    for name in weights:
        if ".attention.q_proj." in name:
            parts = [weights[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            fused[name.replace("attention.q_proj", "attn.qkv")] = torch.cat(parts)
    return fused


@pytest.fixture
def dali_dir(tmp_path) -> Path:
    """A folder of DALI's code: a tower for 128 mels and 64 frames, and a prefix of 5 vectors."""
    torch.manual_seed(0)
    tower = CavMaeAudioModel(CavMaeAudioConfig(**SIZES, max_length=64, output_size=32))
    names = {"patch_embeddings": "patch_embed_a.proj", "position_embeddings": "pos_embed_a", "norm.": "norm_a."}
    names |= {"modality_embedding": "modality_a", "embeddings.": "", "joint_layers.0.norm1": "joint_layers.0.norm1_a"}
    names |= {"joint_layers.0.norm2": "joint_layers.0.norm2_a", "joint_layers": "blocks_u", "layers": "blocks_a"}
    folder = tmp_path / "weights"
    folder.mkdir()
    torch.save(released(tower, names), folder / "audio_backbone.pth")
    torch.save({"model.audio_tower.prefix": torch.randn(5, 32)}, folder / "prefix.bin")
    return folder


@pytest.fixture
def ced(tmp_path) -> Path:
    torch.manual_seed(0)
    tower = CedAudioModel(CedAudioConfig(**SIZES, max_length=1008))
    names = {"init_bn": "init_bn.1", "patch_embeddings": "patch_embed.proj", "embeddings.": "", "layers": "blocks"}
    torch.save({"model": released(tower, names)}, tmp_path / "ced.pt")
    return tmp_path / "ced.pt"


def test_convert_and_caption(dali_dir, ced, tiny_model_dir, media_dir, tmp_path, capsys):
    """One part, then another part on the result: the processor follows the tower."""
    assert main(["convert", "dali", str(dali_dir), str(tmp_path / "dali"), "--base", str(tiny_model_dir)]) == 0
    report = capsys.readouterr().out
    assert "weights:\n  33 tensors used\n" in report and f"written: {tmp_path / 'dali'}" in report
    processor = json.loads((tmp_path / "dali" / "processor_config.json").read_text())
    assert processor["prefix_length"] == 5
    extractor = processor["feature_extractor"]
    assert (extractor["front_end"], extractor["num_mel_bins"], extractor["max_length"]) == ("kaldi", 128, 64)

    assert main(["convert", "ced", str(ced), str(tmp_path / "ced"), "--base", str(tmp_path / "dali")]) == 0
    assert "ced.pt:" in capsys.readouterr().out
    extractor = json.loads((tmp_path / "ced" / "processor_config.json").read_text())["feature_extractor"]
    assert (extractor["front_end"], extractor["num_mel_bins"], extractor["mean"]) == ("decibel", 64, 0.0)
    for model in ("dali", "ced"):
        options = ["--max-new-tokens", "4", "--json"]
        assert main(["caption", str(tmp_path / model), str(media_dir / "bark.wav"), *options]) == 0
        assert json.loads(capsys.readouterr().out)["caption"]


def test_both_parts_in_one_command(dali_dir, ced, tiny_model_dir, tmp_path, capsys):
    words = ["dali", str(dali_dir), "ced", str(ced), str(tmp_path / "out"), "--base", str(tiny_model_dir)]
    assert main(["convert", *words]) == 0
    assert [source["kind"] for source in json.loads((tmp_path / "out" / "config.json").read_text())["sources"]] == [
        "dali",
        "ced",
    ]


def test_wrong_weights_give_one_line_and_no_folder(ced, tiny_model_dir, tmp_path, capsys):
    for kind in ("cav-mae", "dali"):  # a file of another kind
        assert main(["convert", kind, str(ced), str(tmp_path / "out"), "--base", str(tiny_model_dir)]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert "ced.pt: has no patch_embed_a.proj.weight; give the released weights of this kind of model" in line
    assert not (tmp_path / "out").exists()
