"""The stages of DALI over a real language model, SmolLM2-135M-Instruct."""

import numpy as np
import pytest
import torch

from dali_llava.eval.runner import CaptionRunner, Sample
from dali_llava.modeling import LlavaAudioForConditionalGeneration
from dali_llava.processing import SOUND_PROMPT, LlavaAudioProcessor
from dali_llava.train.data.caption_file import CAPTIONS, read_captions


pytestmark = pytest.mark.slow


def test_losses_fall_and_captions_come_out(smollm2_dir, run_stage, tmp_path):
    options = ["--max_steps", "5", "--logging_steps", "1", "--per_device_train_batch_size", "2", "--warmup_steps", "0"]
    base, losses = smollm2_dir, {}
    for stage, more in {
        "prefix": ["--learning_rate", "0.05"],
        "aligned": ["--objective", "ot_att"],
        "distilled": ["--learning_rate", "0.001"],
    }.items():
        trainer = run_stage(stage, base, tmp_path / stage, *options, *more)
        losses[stage] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        base = tmp_path / stage
    assert all(len(values) == 5 and np.isfinite(values).all() for values in losses.values())
    # five steps of alignment between random towers show no trend
    assert all(sum(losses[stage][-2:]) < sum(losses[stage][:2]) - 0.5 for stage in ("prefix", "distilled"))
    before = LlavaAudioForConditionalGeneration.from_pretrained(smollm2_dir).state_dict()
    model = LlavaAudioForConditionalGeneration.from_pretrained(base).eval()
    after = model.state_dict()
    moved = {name.split(".")[1] for name in after if not torch.equal(after[name], before[name])}
    assert moved == {"prefix", "audio_tower", "audio_projector"}
    captions, _ = read_captions(base / CAPTIONS)
    assert all(each.error is None for each in captions.values())
    sound = torch.sin(torch.arange(16_000) / 7).numpy()
    runner = CaptionRunner(model, LlavaAudioProcessor.from_pretrained(base), max_new_tokens=12)
    (result,) = runner.run([Sample("a", SOUND_PROMPT, audio=sound)])
    assert result.error is None and result.caption and "<|" not in result.caption
