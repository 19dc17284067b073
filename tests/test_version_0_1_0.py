"""Files of version 0.1.0 (tests/data/version_0_1_0) still load and give the same results."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dali_llava.modeling import LlavaAudioForConditionalGeneration
from dali_llava.processing import SOUND_PROMPT, LlavaAudioProcessor
from dali_llava.processing.corpora import load_corpus
from dali_llava.processing.corpora.rows import open_audio, open_frames
from dali_llava.train.losses.attentive import load_alignment_attention


FOLDER = Path(__file__).parent / "data" / "version_0_1_0"
LOGITS = json.loads((FOLDER / "logits.json").read_text())


@pytest.mark.parametrize("stage", LOGITS)
def test_checkpoints_and_stages_give_the_logits_that_they_gave(stage):
    model = LlavaAudioForConditionalGeneration.from_pretrained(FOLDER / stage).eval()
    processor = LlavaAudioProcessor.from_pretrained(FOLDER / stage)
    draw = np.random.default_rng(0)
    inputs = processor(
        text=[processor.format_prompt(SOUND_PROMPT, image=True, audio=True, prefix=True)],
        audio=[draw.normal(size=32000).astype("float32") * 0.1],
        images=[Image.fromarray(draw.integers(0, 256, (48, 48, 3), dtype=np.uint8))],
        sampling_rate=16000,
        return_tensors="pt",
    )
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1, :16]
    # float32 on another processor; the figures are rounded to 6 decimals
    torch.testing.assert_close(logits, torch.tensor(LOGITS[stage]), rtol=1e-4, atol=1e-4)


def test_the_attention_of_an_alignment_loads():
    attention = load_alignment_attention(FOLDER / "aligned")
    assert attention.num_heads == 2 and attention.audio_query.weight.shape == (16, 16)


def test_shards_load():
    rows = load_corpus("shards", "train", data_dir=str(FOLDER / "shards"))
    assert sorted(rows["id"]) == ["blue.mp4", "red.mp4"] or sorted(rows["id"]) == ["blue", "red"]
    for row in rows:
        assert len(open_audio(row)) == 33_024  # AAC is padded to whole frames
        assert [frame.size for frame in open_frames(row)] == [(64, 48)] * 2
