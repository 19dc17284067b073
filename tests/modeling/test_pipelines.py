"""Pipelines of transformers: captions of batches equal those of `generate` for each sample."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from transformers import pipeline

from dali_llava.modeling import LlavaAudioForConditionalGeneration
from dali_llava.processing import SOUND_PROMPT, LlavaAudioProcessor


TASKS = ["image-text-to-text", "any-to-any"]
GREEDY = {"max_new_tokens": 8, "do_sample": False}
QUESTIONS = [SOUND_PROMPT, "What is a dog ?", "What can you see in this scene ?"]
OLD = Path(__file__).parents[1] / "data" / "version_0_1_0" / "captioner"


def sound(index: int) -> np.ndarray:
    """Clips of 1.0, 1.5 and 2.0 seconds."""
    draw = np.random.default_rng(index)
    time = np.arange(16_000 + 8_000 * index)
    return (np.sin(time / (3 + index)) + 0.1 * draw.standard_normal(len(time))).astype(np.float32)


def picture(index: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(index).integers(0, 256, (48, 48, 3), dtype=np.uint8))


def samples(modality: str) -> list[dict]:
    """Three samples of a modality: `image` and `audio` or None, `prefix`, `question`."""
    return [
        {
            "image": None if modality == "audio" else picture(index),
            "audio": None if modality == "image" else sound(index),
            "prefix": modality != "image",
            "question": question,
        }
        for index, question in enumerate(QUESTIONS)
    ]


def chat(sample: dict) -> list[dict]:
    content = [{"type": kind, kind: sample[kind]} for kind in ("image", "audio") if sample[kind] is not None]
    content += [{"type": "prefix"}] if sample["prefix"] else []
    return [{"role": "user", "content": [*content, {"type": "text", "text": sample["question"]}]}]


def prompt(processor, sample: dict) -> str:
    present = {kind: sample[kind] is not None for kind in ("image", "audio")}
    return processor.format_prompt(sample["question"], prefix=sample["prefix"], **present)


def captions_one_by_one(model, processor, samples: list[dict], **kwargs) -> list[str]:
    captions = []
    for sample in samples:
        inputs = processor(
            text=prompt(processor, sample),
            images=sample["image"],
            audio=sample["audio"],
            return_tensors="pt",
            **kwargs,
        )
        with torch.no_grad():
            tokens = model.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :]
        captions.append(processor.decode(tokens, skip_special_tokens=True).strip())
    return captions


def texts(outputs: list) -> list[str]:
    return [output[0]["generated_text"].strip() for output in outputs]


@pytest.fixture(scope="module", params=TASKS)
def pipe(request, tiny_model_dir):
    return pipeline(request.param, model=str(tiny_model_dir))


@pytest.mark.parametrize("audio_padding", ["max_length", "longest"])
@pytest.mark.parametrize("modality", ["image", "audio", "audiovisual"])
def test_batches_of_chats_equal_generate(pipe, modality, audio_padding):
    kwargs = {"audio_kwargs": {"padding": audio_padding}}
    batch = samples(modality)
    expected = captions_one_by_one(pipe.model, pipe.processor, batch, **kwargs)
    assert len(set(expected)) > 1
    outputs = pipe(
        text=[chat(sample) for sample in batch],
        batch_size=2,
        return_full_text=False,
        processor_kwargs=kwargs,
        generate_kwargs=GREEDY,
    )
    assert texts(outputs) == expected


@pytest.mark.parametrize("rule", [["audio", "audiovisual"], ["audiovisual"]])
@pytest.mark.parametrize("modality", ["image", "audio", "audiovisual"])
def test_chats_without_a_prefix_block_follow_the_checkpoint(tiny_model_dir, tmp_path, modality, rule):
    """The prefix follows the configuration next to the processor, of an aligned model and of a distilled model."""
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"prefix_modalities": rule}))
    pipe = pipeline("any-to-any", model=str(folder))
    asked = [{**sample, "prefix": modality in rule} for sample in samples(modality)]
    bare = [chat({**sample, "prefix": False}) for sample in asked]
    outputs = pipe(text=bare, batch_size=2, return_full_text=False, generate_kwargs=GREEDY)
    assert texts(outputs) == captions_one_by_one(pipe.model, pipe.processor, asked)


def test_full_text_answers_the_chat(pipe):
    (sample,) = samples("audio")[:1]
    (expected,) = captions_one_by_one(pipe.model, pipe.processor, [sample])
    ((output,),) = pipe(text=[chat(sample)], batch_size=2, generate_kwargs=GREEDY)
    assert [turn["role"] for turn in output["generated_text"]] == ["user", "assistant"]
    assert output["generated_text"][-1]["content"].strip() == expected


@pytest.mark.parametrize("modality", ["audio", "audiovisual"])
def test_batches_of_dictionaries_equal_generate(tiny_model_dir, modality):
    pipe = pipeline("any-to-any", model=str(tiny_model_dir))
    batch = samples(modality)
    inputs = [
        {
            "text": prompt(pipe.processor, sample),
            **{
                name: sample[kind]
                for name, kind in (("images", "image"), ("audio", "audio"))
                if sample[kind] is not None
            },
        }
        for sample in batch
    ]
    outputs = pipe(inputs, batch_size=2, return_full_text=False, generate_kwargs=GREEDY)
    assert texts(outputs) == captions_one_by_one(pipe.model, pipe.processor, batch)


def test_lists_of_images_and_texts_equal_generate(tiny_model_dir):
    pipe = pipeline("image-text-to-text", model=str(tiny_model_dir))
    batch = samples("image")
    images, prompts = [sample["image"] for sample in batch], [prompt(pipe.processor, sample) for sample in batch]
    expected = captions_one_by_one(pipe.model, pipe.processor, batch)
    options = {"return_full_text": False, "generate_kwargs": GREEDY}
    assert [output["generated_text"].strip() for output in pipe(images=images, text=prompts, **options)] == expected
    stream = ({"images": image, "text": text} for image, text in zip(images, prompts, strict=True))
    assert texts(list(pipe(stream, batch_size=2, **options))) == expected


def test_chats_may_name_files(pipe, tmp_path):
    batch = samples("audiovisual")
    expected = captions_one_by_one(pipe.model, pipe.processor, batch)
    chats = [chat(sample) for sample in batch]
    for index, ((message,), sample) in enumerate(zip(chats, batch, strict=True)):
        soundfile.write(tmp_path / f"{index}.wav", sample["audio"], 16_000, subtype="FLOAT")
        sample["image"].save(tmp_path / f"{index}.png")
        message["content"][:2] = [
            {"type": "image", "path": str(tmp_path / f"{index}.png")},
            {"type": "audio", "path": str(tmp_path / f"{index}.wav")},
        ]
    outputs = pipe(text=chats, batch_size=2, return_full_text=False, generate_kwargs=GREEDY)
    assert texts(outputs) == expected


@pytest.mark.parametrize("task", TASKS)
def test_checkpoint_of_the_last_version(task):
    """processor_config.json of version 0.1.0 contains right padding of the feature extractor."""
    pipe = pipeline(task, model=str(OLD))
    batch = samples("audio")
    expected = captions_one_by_one(
        LlavaAudioForConditionalGeneration.from_pretrained(OLD).eval(), LlavaAudioProcessor.from_pretrained(OLD), batch
    )
    outputs = pipe(
        text=[chat(sample) for sample in batch], batch_size=2, return_full_text=False, generate_kwargs=GREEDY
    )
    assert texts(outputs) == expected


def test_tokenizer_saved_with_padding_on_the_right(tiny_model_dir, tmp_path):
    """Many tokenizers of language models pad on the right; the processor changes this."""
    processor = LlavaAudioProcessor.from_pretrained(tiny_model_dir)
    processor.tokenizer.padding_side = "right"
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["padding_side"] == "right"
    model = LlavaAudioForConditionalGeneration.from_pretrained(tiny_model_dir)
    pipe = pipeline("any-to-any", model=model, processor=LlavaAudioProcessor.from_pretrained(tmp_path))
    batch = samples("audio")
    outputs = pipe(
        text=[chat(sample) for sample in batch], batch_size=3, return_full_text=False, generate_kwargs=GREEDY
    )
    assert texts(outputs) == captions_one_by_one(pipe.model, pipe.processor, batch)
