"""The caption runner: batching, invalid samples and resuming."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dali_llava.eval.runner import CaptionRunner, Sample, read_results, weights_digest
from dali_llava.modeling import LlavaAudioForConditionalGeneration
from dali_llava.processing import LlavaAudioProcessor


@pytest.fixture(scope="module")
def captioner(tiny_model_dir):
    model = LlavaAudioForConditionalGeneration.from_pretrained(tiny_model_dir)
    return model, LlavaAudioProcessor.from_pretrained(tiny_model_dir)


def make_samples(count: int = 8, seed: int = 0) -> list[Sample]:
    """Samples of all four modalities in turn, with different sizes and prompts, with and without prefix."""
    rng = np.random.default_rng(seed)
    samples = []
    for number in range(count):
        audio = image = None
        if number % 4 in (0, 2):
            time = np.arange(8000 + 5000 * number) / 16_000
            audio = (np.sin(900 * (number + 1) * time**2) + 0.1 * rng.normal(size=len(time))).astype(np.float32)
        if number % 4 in (1, 2):
            image = Image.fromarray(rng.integers(0, 256, (48, 40 + 5 * number, 3), dtype=np.uint8))
        prompt = "What sound can be heard in this scene ?" if number % 3 else "What ?"
        samples.append(Sample(str(number), prompt, image, audio, prefix=number % 3 == 1))
    return samples


def content(results) -> list[tuple]:
    """Results without the times."""
    return [(result.id, result.modality, result.caption, result.error) for result in results]


@pytest.mark.parametrize("num_beams", [1, 3])
def test_batched_captions_equal_captions_one_by_one(captioner, num_beams):
    samples = make_samples()
    options = {"max_new_tokens": 10, "num_beams": num_beams}
    alone = content(CaptionRunner(*captioner, batch_size=1, **options).run(samples))
    together = content(CaptionRunner(*captioner, batch_size=8, **options).run(samples))
    assert together == alone
    assert [modality for _, modality, _, _ in alone] == ["audio", "image", "audiovisual", "text"] * 2
    # Otherwise the comparison would have no meaning.
    assert len({caption for _, _, caption, _ in alone}) >= 6


def test_samples_of_several_frames(tiny_model_dir):
    """One frame is a picture; more frames change the caption, but not the captions of the other samples."""
    model = LlavaAudioForConditionalGeneration.from_pretrained(tiny_model_dir)
    processor = LlavaAudioProcessor.from_pretrained(tiny_model_dir)
    samples = make_samples()
    options = {"batch_size": 8, "max_new_tokens": 10}
    plain = content(CaptionRunner(model, processor, **options).run(samples))
    processor.num_frames = 3
    assert content(CaptionRunner(model, processor, **options).run(samples)) == plain
    noise = np.random.default_rng(1).integers(0, 256, (5, 48, 48, 3), dtype=np.uint8)
    frames = [Image.fromarray(each) for each in noise]
    samples[1] = replace(samples[1], image=[samples[1].image])
    samples[2] = replace(samples[2], image=lambda: frames[:3])
    samples[5] = replace(samples[5], image=frames[:2])
    together = content(CaptionRunner(model, processor, **options).run(samples))
    assert together == content(CaptionRunner(model, processor, **{**options, "batch_size": 1}).run(samples))
    assert [index for index in range(8) if together[index] != plain[index]] == [2, 5]
    samples[5], samples[6] = replace(samples[5], image=frames), replace(samples[6], image=[])
    results = content(CaptionRunner(model, processor, **options).run(samples))
    assert results[:5] + results[7:] == together[:5] + together[7:]
    assert "has 5 frames, but the processor takes at most num_frames=3" in results[5][3]
    assert "1 <image> tokens in the text but no images were passed" in results[6][3]


def test_order_and_ids_are_those_of_the_samples(captioner):
    runner = CaptionRunner(*captioner, batch_size=3, max_new_tokens=2)
    results = list(runner.run(make_samples(7)))
    assert [result.id for result in results] == list("0123456")
    assert all(result.seconds > 0 and result.error is None for result in results)


def test_the_prompt_is_cut_off_and_special_tokens_are_gone(captioner):
    for result in CaptionRunner(*captioner, max_new_tokens=10).run(make_samples()):
        assert "USER:" not in result.caption.split()[:1]
        assert "<" not in result.caption
        assert result.caption == result.caption.strip()


def test_media_are_decoded_when_their_batch_comes_up(captioner):
    decoded = []

    def decoder(number):
        def decode():
            decoded.append(number)
            return np.zeros(16_000, dtype=np.float32)

        return decode

    samples = (Sample(str(number), "What ?", audio=decoder(number)) for number in range(5))
    results = CaptionRunner(*captioner, batch_size=2, max_new_tokens=2).run(samples)
    assert decoded == []
    assert next(results).id == "0"
    assert decoded == [0, 1]
    assert len(list(results)) == 4
    assert decoded == [0, 1, 2, 3, 4]


def test_a_sample_that_cannot_be_decoded_leaves_the_others_alone(captioner):
    def broken():
        raise OSError("clip.wav: not\na sound")

    samples = make_samples(4)
    runner = CaptionRunner(*captioner, batch_size=4, max_new_tokens=5)
    whole = list(runner.run(samples))
    samples[2] = replace(samples[2], audio=broken)
    results = list(runner.run(samples))
    assert content([results[2]]) == [("2", "audiovisual", None, "clip.wav: not a sound")]
    assert content(results[:2] + results[3:]) == content(whole[:2] + whole[3:])


def test_a_sample_that_the_processor_rejects_leaves_its_batch_alone(captioner):
    samples = make_samples(6)
    runner = CaptionRunner(*captioner, batch_size=6, max_new_tokens=5)
    whole = list(runner.run(samples))
    samples[4] = replace(samples[4], audio=np.full(16_000, np.nan, dtype=np.float32))
    results = list(runner.run(samples))
    assert "NaN" in results[4].error
    assert content(results[:4] + results[5:]) == content(whole[:4] + whole[5:])


def test_a_mistake_in_the_code_is_not_taken_for_a_bad_sample(captioner):
    def mistake():
        raise KeyError("name")

    with pytest.raises(KeyError):
        list(CaptionRunner(*captioner).run([Sample("0", "What ?", audio=mistake)]))


def test_resumed_results_equal_an_unbroken_run(captioner, tmp_path):
    samples = make_samples()
    runner = CaptionRunner(*captioner, batch_size=3, max_new_tokens=5)
    unbroken = content(runner.run(samples))

    out = tmp_path / "new" / "captions.jsonl"
    started = runner.run(samples, out=out)
    for _ in range(4):
        next(started)
    started.close()
    with out.open("a") as file:
        file.write('{"id": "4", "capt')  # the content after an interrupted write

    assert content(runner.run(samples, out=out)) == unbroken
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(row["id"] for row in rows) == list("01234567")
    assert {row["id"]: row["caption"] for row in rows} == {id: caption for id, _, caption, _ in unbroken}


def test_finished_samples_are_not_decoded_again(captioner, tmp_path):
    def forbidden():
        raise AssertionError("decoded again")

    samples = make_samples(4)
    runner = CaptionRunner(*captioner, max_new_tokens=5)
    first = list(runner.run(samples, out=tmp_path / "captions.jsonl"))
    samples = [
        replace(sample, image=sample.image and forbidden, audio=None if sample.audio is None else forbidden)
        for sample in samples
    ]
    assert list(runner.run(samples, out=tmp_path / "captions.jsonl")) == first


def test_other_settings_prompts_or_weights_are_captioned_anew(captioner, tmp_path):
    model, processor = captioner
    out = tmp_path / "captions.jsonl"
    sample = make_samples(1)[0]

    def lines_after(runner, sample):
        list(runner.run([sample], out=out))
        return len(out.read_text().splitlines())

    runner = CaptionRunner(model, processor, max_new_tokens=5)
    assert lines_after(runner, sample) == 1
    assert lines_after(runner, sample) == 1
    assert lines_after(CaptionRunner(model, processor, max_new_tokens=5, batch_size=2), sample) == 1
    assert lines_after(CaptionRunner(model, processor, max_new_tokens=6), sample) == 2
    assert lines_after(runner, replace(sample, prompt="What sound ?")) == 3
    assert lines_after(runner, replace(sample, prefix=not sample.prefix)) == 4
    prefix = model.model.prefix.weight.data
    kept = prefix.clone()
    try:
        prefix += 1e-3
        assert lines_after(runner, sample) == 5
    finally:
        prefix.copy_(kept)
    assert lines_after(runner, sample) == 5


def test_the_prefix_follows_the_checkpoint(captioner, tmp_path, monkeypatch):
    """A sample can override the prefix, and saved results depend on it."""
    model, processor = captioner
    strong = torch.randn(model.model.prefix.weight.shape, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(model.model.prefix.weight, "data", strong)
    samples = [replace(sample, prefix=None) for sample in make_samples(4)]
    runner, out = CaptionRunner(model, processor, max_new_tokens=8), tmp_path / "captions.jsonl"

    def said(**changes) -> list[tuple]:
        return content(runner.run([replace(sample, **changes) for sample in samples]))

    with_prefix, without = said(prefix=True), said(prefix=False)
    assert [one != other for one, other in zip(with_prefix, without, strict=True)] == [True] * 4
    for modalities in (["audio", "audiovisual"], ["audiovisual"], []):
        monkeypatch.setattr(model.config, "prefix_modalities", modalities)
        expected = [
            one if sample.modality in modalities else other
            for sample, one, other in zip(samples, with_prefix, without, strict=True)
        ]
        assert said() == expected == content(runner.run(samples, out=out))
    assert len(out.read_text().splitlines()) == 4 + 1 + 1  # audio and audiovisual without prefix were new


def test_errors_are_tried_again(captioner, tmp_path):
    out = tmp_path / "captions.jsonl"
    runner = CaptionRunner(*captioner, max_new_tokens=5)
    good = make_samples(1)[0]
    bad = replace(good, audio=np.zeros(0, dtype=np.float32))
    assert next(runner.run([bad], out=out)).error
    assert next(runner.run([good], out=out)).error is None


def test_an_id_that_comes_twice_is_named(captioner, tmp_path):
    sample = make_samples(1)[0]
    with pytest.raises(ValueError, match="'0' appears twice"):
        list(CaptionRunner(*captioner, max_new_tokens=2).run([sample, sample], out=tmp_path / "captions.jsonl"))


@pytest.mark.parametrize(
    "text", ["no newline", "text\n", "[1]\n", '{"id": "0"}\n', '{"fingerprint": "f", "id": "0", "other": 1}\n']
)
def test_a_file_of_something_else_is_named_and_left_as_it_is(captioner, tmp_path, text):
    out = tmp_path / "notes.txt"
    out.write_text(text)
    with pytest.raises(ValueError, match=r"notes\.txt: line 1 is not a caption result; use another file"):
        list(CaptionRunner(*captioner).run(make_samples(1), out=out))
    assert out.read_text() == text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 1"),
        ({"num_beams": 0}, "num_beams must be at least 1"),
        ({"temperature": -0.2}, r"temperature must be 0 \(greedy\) or more, not -0.2"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"temperature": 0.2, "num_beams": 2}, "sampling uses one beam, not 2"),
    ],
)
def test_options_out_of_range_are_named(captioner, options, message):
    with pytest.raises(ValueError, match=message):
        CaptionRunner(*captioner, **options)


def test_sampled_captions_depend_on_seed_and_id_but_not_on_the_batch(captioner):
    samples = make_samples()

    def said(samples, seed: int, batch_size: int = 8) -> dict[str, str]:
        runner = CaptionRunner(*captioner, batch_size=batch_size, max_new_tokens=12, temperature=5.0, seed=seed)
        return {result.id: result.caption for result in runner.run(samples)}

    together = said(samples, seed=1)
    torch.manual_seed(3)  # the global generator has no effect
    assert said(samples[::-1], seed=1, batch_size=3) == said(samples, seed=1, batch_size=1) == together
    assert all(caption != together[name] for name, caption in said(samples, seed=2).items())
    renamed = said([replace(sample, id=f"clip {sample.id}") for sample in samples], seed=1)
    assert all(renamed[f"clip {name}"] != caption for name, caption in together.items())


def test_sampled_captions_are_kept_for_their_seed_only(captioner, tmp_path):
    samples = make_samples()
    captions = []
    for seed in (1, 2, 1):
        runner = CaptionRunner(*captioner, max_new_tokens=12, temperature=5.0, seed=seed)
        captions.append(content(runner.run(samples, out=tmp_path / "captions.jsonl")))
    assert captions[0] == captions[2] != captions[1]
    assert len((tmp_path / "captions.jsonl").read_text().splitlines()) == 2 * len(samples)


def test_results_are_read_up_to_an_incomplete_line(captioner, tmp_path):
    out = tmp_path / "captions.jsonl"
    results = list(CaptionRunner(*captioner, max_new_tokens=2).run(make_samples(3), out=out))
    with out.open("a") as file:
        file.write('{"id": "4", "capt')
    before = out.read_bytes()
    assert read_results(out) == results
    assert out.read_bytes() == before


@pytest.mark.parametrize("partitioned", [True, False])
def test_whole_weights_generate_without_other_ranks_under_zero_3(captioner, monkeypatch, partitioned):
    """`generate` would synchronise the ranks at each token, and ranks with fewer batches would never answer."""
    model, processor = captioner
    options = []
    monkeypatch.setattr("dali_llava.eval.runner.is_deepspeed_zero3_enabled", lambda: True)
    monkeypatch.setattr(model, "generate", lambda input_ids, **kwargs: options.append(kwargs) or input_ids)
    if partitioned:
        monkeypatch.setattr(model.lm_head.weight, "ds_id", 0, raising=False)
    list(CaptionRunner(model, processor).run(make_samples(1)))
    assert [kwargs.get("synced_gpus") for kwargs in options] == [None if partitioned else False]


def test_dtype_converts_the_model_and_its_inputs(tiny_model_dir):
    model = LlavaAudioForConditionalGeneration.from_pretrained(tiny_model_dir)
    processor = LlavaAudioProcessor.from_pretrained(tiny_model_dir)
    runner = CaptionRunner(model, processor, max_new_tokens=3, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert [result.error for result in runner.run(make_samples(4))] == [None] * 4


def test_weights_digest_sees_every_tensor():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(100, 50), torch.nn.BatchNorm1d(50))
    seen = {weights_digest(model)}
    for tensor in model.state_dict().values():
        tensor += 1
        seen.add(weights_digest(model))
    assert len(seen) == 1 + len(model.state_dict())
    assert weights_digest(model) in seen
