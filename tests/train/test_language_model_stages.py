"""
The stages over a captioner from a language model whose tokenizer is unlike Llama's; see `byte_level_tokenizer`.

Tied embeddings, grouped queries, a chat template of its own and an end token that is also the padding token.
"""

import pytest
import torch

from dali_llava.eval.runner import CaptionRunner, Sample
from dali_llava.modeling import LlavaAudioForConditionalGeneration
from dali_llava.processing import SOUND_PROMPT, LlavaAudioProcessor
from dali_llava.train.data.caption_file import CAPTIONS, read_captions


TRAINED = {"prefix": "model.prefix.", "aligned": "model.audio_tower.", "distilled": "model.audio_projector."}


@pytest.fixture(scope="module")
def runs(language_model_dir, convert_language_model, run_stage, tmp_path_factory):
    """Folder with the converted captioner and the stages, each trained from the previous one."""
    folder = tmp_path_factory.mktemp("runs")
    base = "captioner"
    convert_language_model(language_model_dir, folder / base)
    for stage in TRAINED:
        options = ["--objective", "ot_att"] if stage == "aligned" else []
        run_stage(stage, folder / base, folder / stage, *options)
        base = stage
    return folder


def test_each_stage_moves_its_part(runs):
    names = ["captioner", *TRAINED]
    loaded = {name: LlavaAudioForConditionalGeneration.from_pretrained(runs / name) for name in names}
    for before, after in zip(names, names[1:], strict=False):
        weights, trained = (loaded[name].state_dict() for name in (before, after))
        changed = {name for name in trained if not torch.equal(trained[name], weights[name])}
        assert changed and all(name.startswith(TRAINED[after]) for name in changed)
        assert loaded[after].lm_head.weight is loaded[after].get_input_embeddings().weight


def test_captions_end_with_the_end_token(runs, rows):
    """Captions of the processor's runner are those of `generate`, cut at `<|im_end|>`."""
    model = LlavaAudioForConditionalGeneration.from_pretrained(runs / "distilled").eval()
    processor = LlavaAudioProcessor.from_pretrained(runs / "distilled")
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert model.generation_config.eos_token_id == end == processor.tokenizer.pad_token_id
    sound = torch.sin(torch.arange(16_000) / 7).numpy()
    prompt = processor.format_prompt(SOUND_PROMPT, audio=True)
    assert prompt.startswith("<|im_start|>user\n<audio>\nWhat sound") and prompt.endswith("<|im_start|>assistant\n")
    inputs = processor(text=prompt, audio=sound)
    options = {"max_new_tokens": 12, "do_sample": False}
    with torch.no_grad():
        whole = model.generate(**inputs, **options)
        # the end token becomes likely after some tokens, and not at the first one
        states = model.model(**{**inputs, "input_ids": whole, "attention_mask": torch.ones_like(whole)})
        first, *_, later = states.last_hidden_state[0, inputs["input_ids"].shape[1] - 1 : -4]
        model.lm_head.weight[end] = later - first
        generated = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    assert 1 < len(generated) < 12 and generated[-1] == end
    (result,) = CaptionRunner(model, processor, max_new_tokens=12).run([Sample("a", SOUND_PROMPT, audio=sound)])
    assert result.caption == processor.decode(generated, skip_special_tokens=True).strip()


def test_pseudo_captions_come_out_of_the_template(runs):
    captions, _ = read_captions(runs / "distilled" / CAPTIONS)
    assert captions and all(each.error is None and "<|" not in each.caption for each in captions.values())
