"""Tests of the pre-filter: distances of known vectors, resumed runs, skipped clips, models and complete runs."""

import json
import math
import re
import sys
from copy import deepcopy

import numpy as np
import pytest
import soundfile
import torch
from datasets import Dataset, load_dataset
from PIL import Image
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPVisionConfig,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from dali_llava.modeling import LlavaAudioForConditionalGeneration
from dali_llava.processing.corpora import load_corpus
from dali_llava.processing.corpora.builder import FEATURES
from dali_llava.processing.corpora.rows import open_audio
from dali_llava.train import prefilter
from dali_llava.train.avworld.captioner_cache import pretrained_captioner
from dali_llava.train.command_line import CONFIGS
from dali_llava.train.data.corpus import keep_rows
from dali_llava.train.filtering.distance import caption_distances, choose, label_text, score_clips
from dali_llava.train.filtering.models import (
    language_model,
    load_captioner,
    load_language_model,
    load_sentence_embed,
    make_caption,
    make_embed,
)
from dali_llava.train.filtering.scores import ScoreFolder


VECTORS = {"dog": (1.0, 0.0), "a dog": (2.0, 0.0), "a cat": (0.0, 3.0), "no dog": (-1.0, 0.0)}
VECTORS |= {"both": (1.0, 1.0), "": (0.0, 0.0)}
SHADES = ("a dog", "a cat", "no dog", "both")  # captions of images with grey level 0, 1, 2, 3
CPU = torch.device("cpu")
NARROW = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def stub_embed(texts: list[str]) -> torch.Tensor:
    return torch.tensor([VECTORS[text] for text in texts])


def stub_caption(images: list[Image.Image]) -> list[str]:
    return [SHADES[image.getpixel((0, 0))[0]] for image in images]


def read_scores(folder) -> dict[str, list]:
    """The columns of scores.parquet."""
    path = str(folder / "scores.parquet")
    rows = list(load_dataset("parquet", data_files={"all": path}, split="all", streaming=True))
    return {name: [row[name] for row in rows] for name in rows[0]}


@pytest.fixture
def make_rows(tmp_path):
    """`make_rows(clips)`: a corpus of clips labelled "dog". A clip is a list of grey levels, one per frame."""

    def make_rows(clips: list[list[int]]) -> Dataset:
        rows = []
        for index, shades in enumerate(clips):
            frames = []
            for shade in shades:
                path = tmp_path / f"shade{shade}.png"
                Image.new("RGB", (8, 8), (shade,) * 3).save(path)
                frames.append({"path": str(path), "bytes": None})
            row = {"id": f"clip{index}", "frames": frames, "labels": ["dog"], "start": 0.0, "end": 10.0}
            rows.append(row | {"audio": None, "captions": [], "source": "made"})
        return Dataset.from_list(rows, features=FEATURES)

    return make_rows


@pytest.fixture(scope="module")
def words(run_dir, tmp_path_factory):
    """`words(output, *overrides)`: the arguments of a small pre-filter run with the tiny captioner."""
    config = tmp_path_factory.mktemp("config") / "prefilter.yaml"
    config.write_text("split: train\nframes: 2\nlayer: 0\ncaption_max_new_tokens: 4\nbatch_size: 4\n")

    def words(output, *overrides: str) -> list[str]:
        corpus = ["--dataset_options", json.dumps({"sizes": {"train": 16}}), "--use_cpu", "true"]
        models = ["--captioner", str(run_dir / "captioner")]
        return [str(config), *corpus, *models, "--output_dir", str(output), *overrides]

    return words


def test_known_vectors_have_known_distances():
    captions = [["a dog"], ["a cat"], ["no dog"], ["both"], [""], ["a dog", "a cat", "no dog"]]
    distances = caption_distances(captions, ["dog"] * 6, stub_embed)
    assert distances == pytest.approx([0, 1, 2, 1 - math.sqrt(0.5), 1, 1], abs=1e-12)


def test_bad_captions_and_vectors_are_errors():
    with pytest.raises(ValueError, match=r"1 documents for clips with \[1, 1\] captions"):
        caption_distances([["a dog"], ["a cat"]], ["dog"], stub_embed)
    with pytest.raises(ValueError, match=r"clips with \[0\] captions: each clip needs one or more"):
        caption_distances([[]], ["dog"], stub_embed)
    with pytest.raises(ValueError, match="an embedding is not finite"):
        caption_distances([["a dog"]], ["dog"], lambda texts: torch.full((len(texts), 2), torch.nan))


def test_labels_make_a_text():
    assert label_text(["a dog", " rain "]) == "a dog, rain"
    for labels in ([], None, [" "]):
        with pytest.raises(ValueError, match="the row has no labels"):
            label_text(labels)


def test_the_nearest_are_kept_and_ties_go_to_the_earlier():
    scores = np.array([0.5, 0.2, 0.5, 0.1, 0.5])
    assert choose(scores, keep=2).tolist() == [False, True, False, True, False]
    assert choose(scores, keep=4).tolist() == [True, True, True, True, False]
    assert choose(scores, keep=9).all()
    assert choose(scores, threshold=0.5).tolist() == [False, True, False, True, False]  # strictly below the threshold
    assert not choose(scores, threshold=0.1).any()


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({}, "give either keep .* or threshold"),
        ({"keep": 1, "threshold": 0.5}, "give either keep .* or threshold"),
        ({"keep": 0}, "keep must be at least 1, not 0"),
    ],
)
def test_a_choice_that_cannot_be_meant_is_an_error(choice, message):
    with pytest.raises(ValueError, match=message):
        choose(np.zeros(3), **choice)


def test_clips_are_scored_over_their_frames(make_rows):
    rows = make_rows([[0], [0, 1], [2, 3, 1]])
    scored, left_out = score_clips(rows, 2, stub_caption, stub_embed)
    assert left_out == {}
    assert [row["score"] for row in scored] == pytest.approx([0, 0.5, (2 + 1 - math.sqrt(0.5)) / 2])
    assert scored[2] == scored[2] | {"id": "clip2", "captions": ["no dog", "both"], "labels": ["dog"]}


def test_a_broken_clip_is_left_out_with_its_reason(make_rows, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    rows = list(make_rows([[0], [1], [0], [2], [3]]))
    rows[0]["labels"] = []
    rows[1]["frames"] = []
    rows[2]["frames"] = [{"path": str(tmp_path / "broken.png"), "bytes": None}]

    def caption(images):
        captions = stub_caption(images)
        if "no dog" in captions:
            raise ValueError("the processor rejects\na picture")
        return captions

    scored, left_out = score_clips(rows, 10, caption, stub_embed)
    assert [row["id"] for row in scored] == ["clip4"]
    assert list(left_out) == ["clip0", "clip1", "clip2", "clip3"]
    assert left_out["clip0"] == "the row has no labels"
    assert "has no frames" in left_out["clip1"] and "broken.png" in left_out["clip2"]
    assert left_out["clip3"] == "the processor rejects a picture"


def test_an_interrupted_run_goes_on_to_the_same_scores(make_rows, tmp_path):
    rows = make_rows([[0], [1], [2], [3], [0, 1], [0, 2], [3, 3]])
    asked = []

    def run(name: str, stop_after: int | None = None) -> bytes:
        batches = 0

        def caption(images):
            nonlocal batches
            if batches == stop_after:
                raise KeyboardInterrupt
            batches += 1
            asked.append(len(images))
            return stub_caption(images)

        folder = ScoreFolder(tmp_path / name, {"layer": 0})
        left_out = prefilter.score_rows(rows, folder, 10, caption, stub_embed, batch_size=2)
        folder.finish(rows, choose(np.array([folder.scores[i]["score"] for i in rows["id"]]), 3), left_out, "3")
        return (tmp_path / name / "scores.parquet").read_bytes()

    whole = run("whole")
    asked.clear()
    with pytest.raises(KeyboardInterrupt):
        run("cut", stop_after=2)
    (tmp_path / "cut" / "parts" / ".part-000002.parquet.1.tmp").write_bytes(b"half of a")  # killed while writing
    assert not (tmp_path / "cut" / "kept.txt").exists()
    assert run("cut") == whole
    assert asked == [2, 2, 4, 2]  # nothing was captioned twice
    assert run("cut", stop_after=0) == whole


def test_other_settings_are_named(tmp_path):
    ScoreFolder(tmp_path / "out", {"layer": 0, "embedder": None, "options": {"seed": 0}})
    with pytest.raises(
        ValueError, match=r"out has other settings: layer is 0 there and -1 now; embedder is None there and 'gpt2'"
    ):
        ScoreFolder(tmp_path / "out", {"layer": -1, "embedder": "gpt2", "options": {"seed": 0}})
    (tmp_path / "out" / "settings.json").write_text("{")
    with pytest.raises(ValueError, match="not the settings of a pre-filter"):
        ScoreFolder(tmp_path / "out", {})


def test_a_part_that_is_none_is_named(tmp_path):
    folder = ScoreFolder(tmp_path, {})
    folder.append([{"id": "clip", "score": 0.5, "captions": ["a dog"], "labels": ["dog"]}])
    assert ScoreFolder(tmp_path, {}).scores == folder.scores
    (folder.parts / "part-000001.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"part-000001.parquet: not a valid part of the scores; delete it"):
        ScoreFolder(tmp_path, {})


def test_embeddings_are_means_over_words_whatever_the_batch(captioner, avworld_processor):
    tokenizer = avworld_processor.tokenizer
    words = captioner.get_input_embeddings().weight.detach()
    embed = make_embed(language_model(captioner.eval()), tokenizer, layer=0, batch_size=3)
    dog, rain = (words[tokenizer.convert_tokens_to_ids(word)] for word in ("dog", "rain"))
    texts = ["dog rain", "dog", "", "dog a dog and a dog , rain", "dog"]
    vectors = embed(texts)
    torch.testing.assert_close(vectors[:3], torch.stack([(dog + rain) / 2, dog, torch.zeros_like(dog)]))
    deep = make_embed(language_model(captioner), tokenizer, layer=-1)
    torch.testing.assert_close(deep(texts), torch.cat([deep([text]) for text in texts]), rtol=1e-4, atol=1e-5)
    for layer in (3, -4):
        with pytest.raises(ValueError, match=rf"layer must be in \[-3, 2\], not {layer}:"):
            make_embed(language_model(captioner), tokenizer, layer)


def test_gpt2_embeds(avworld_processor, tmp_path):
    """GPT-2 has absolute positions and no padding token. Padding must not change the embedding of a text."""
    torch.manual_seed(0)
    tokenizer = deepcopy(avworld_processor.tokenizer)
    GPT2Model(GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4)).save_pretrained(tmp_path)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    embed = make_embed(*load_language_model(str(tmp_path), CPU))
    texts = ["a dog", "a dog and rain in a cave"]
    torch.testing.assert_close(embed(texts), torch.cat([embed([text]) for text in texts]))


def test_blip_captions_without_a_question(avworld_processor, tmp_path):
    torch.manual_seed(0)
    tokenizer = avworld_processor.tokenizer
    text = {**NARROW, "vocab_size": len(tokenizer), "encoder_hidden_size": 32, "projection_dim": 32}
    text |= {"bos_token_id": 1, "sep_token_id": 2, "eos_token_id": 2, "pad_token_id": tokenizer.pad_token_id}
    config = BlipConfig(text_config=text, vision_config={**NARROW, "image_size": 48, "patch_size": 24})
    BlipForConditionalGeneration(config).save_pretrained(tmp_path)
    size = {"height": 48, "width": 48}
    BlipProcessor(BlipImageProcessor(size=size), tokenizer).save_pretrained(tmp_path)
    caption = make_caption(*load_captioner(str(tmp_path), CPU), max_new_tokens=5)
    captions = caption([Image.new("RGB", (60, 50)), Image.new("RGB", (48, 48), "red")])
    assert len(captions) == 2 and all(0 < len(each.split()) <= 6 for each in captions)


def test_a_chat_model_captions_and_does_not_repeat_its_question(avworld_processor, tmp_path):
    torch.manual_seed(0)
    tokenizer = avworld_processor.tokenizer
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**NARROW, image_size=48, patch_size=24),
        text_config=LlamaConfig(**NARROW, vocab_size=len(tokenizer), eos_token_id=2),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    template = "{% for m in messages %}{% for c in m.content %}{{ '<image>' if c.type == 'image' else c.text }}\n"
    template += "{% endfor %}{% endfor %}"
    LlavaProcessor(
        avworld_processor.image_processor,
        tokenizer,
        patch_size=24,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    ).save_pretrained(tmp_path)
    caption = make_caption(*load_captioner(str(tmp_path), CPU), prompt="What can you see ?", max_new_tokens=5)
    images = [Image.new("RGB", (48, 48), colour) for colour in ("red", "blue")]
    captions = caption(images)
    assert all(0 < len(each.split()) <= 5 for each in captions)
    assert captions == [caption([image])[0] for image in images]


def test_models_that_are_not_there_are_named(tmp_path):
    for load in (load_captioner, load_language_model, load_sentence_embed):
        with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/gone: no such directory")):
            load(f"{tmp_path}/gone", CPU)


def test_sentence_transformers_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ValueError, match="install sentence-transformers"):
        load_sentence_embed("all-MiniLM-L6-v2", CPU)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "give either keep"),
        (["--keep", "0"], "keep must be at least 1, not 0"),
        (["--keep", "1", "--frames", "0"], "frames must be at least 1, not 0"),
        (["--keep", "1", "--captioner", ""], "no captioner: give the checkpoint"),
        (["--keep", "1", "--captioner", "/gone"], "captioner /gone: no such directory"),
        (["--keep", "1", "--embedder", "/gone"], "embedder /gone: no such directory"),
        (["--keep", "1", "--embedder_kind", "glove"], "unknown embedder_kind 'glove'; supported: language_model"),
        (["--keep", "1", "--embedder_kind", "sentence"], "give the model, --embedder NAME"),
        (["--keep", "1", "--layer", "7"], r"layer must be in \[-3, 2\], not 7"),
    ],
)
def test_bad_arguments_are_errors_that_leave_nothing(words, tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        prefilter.main(words(tmp_path / "out", *overrides))
    assert not (tmp_path / "out").exists()


def test_a_whole_run_keeps_rows_and_another_choice_captions_nothing(words, tmp_path, read_page, monkeypatch, capsys):
    out = tmp_path / "filtered"
    prefilter.main(words(out, "--keep", "5"))
    assert capsys.readouterr().out == f"5 of 16 clips kept; report: {out}/report/index.html\n"
    table = read_scores(out)
    assert list(table) == ["id", "score", "captions", "labels", "kept"]
    rows = load_corpus("avworld", "train", sizes={"train": 16})
    assert table["id"] == rows["id"][:] and table["labels"] == rows["labels"][:]
    assert {len(each) for each in table["captions"]} == {2} and sum(table["kept"]) == 5
    assert max(s for s, k in zip(table["score"], table["kept"], strict=True) if k) <= min(
        s for s, k in zip(table["score"], table["kept"], strict=True) if not k
    )
    kept = keep_rows(rows, out)
    assert kept["id"][:] == (out / "kept.txt").read_text().splitlines()
    assert kept["id"][:] == [name for name, keep in zip(table["id"], table["kept"], strict=True) if keep]
    page = read_page((out / "report" / "index.html").read_text(encoding="utf-8"))
    assert "5 of 16 scored clips kept: the nearest, at most 5." in page.texts_of("p")[0]
    ranked = [name for _, name in sorted(zip(table["score"], table["id"], strict=True))]
    assert page.texts_of("h3") == ranked[:10] + ranked[:5:-1]
    waveform, rate = soundfile.read(out / "report" / "media" / "000.flac")
    nearest = rows[rows["id"][:].index(ranked[0])]
    assert rate == 16_000 and waveform == pytest.approx(open_audio(nearest), abs=2**-15)
    assert {path.name for path in out.iterdir()} == {"kept.txt", "parts", "report", "scores.parquet", "settings.json"}

    monkeypatch.setattr(LlavaAudioForConditionalGeneration, "generate", None)
    prefilter.main(words(out, "--threshold", "-1"))  # no distance is negative
    assert "0 of 16 clips kept" in capsys.readouterr().out
    page = read_page((out / "report" / "index.html").read_text(encoding="utf-8"))
    assert page.texts_of("p")[0] == "0 of 16 scored clips kept: distance below -1."
    with pytest.raises(ValueError, match="contains none of the ids of these 16 rows"):
        keep_rows(rows, out)
    with pytest.raises(ValueError, match="has other settings: layer is 0 there and 1 now"):
        prefilter.main(words(out, "--keep", "5", "--layer", "1"))


def test_a_stages_checkpoint_captions_too(words, run_dir, tmp_path):
    whole = prefilter.main(words(tmp_path / "whole", "--keep", "2", "--max_samples", "4"))
    chain = ["--captioner", str(run_dir / "prefix"), "--embedder", str(run_dir / "captioner")]
    staged = prefilter.main(words(tmp_path / "staged", "--keep", "2", "--max_samples", "4", *chain))
    assert staged.scores == whole.scores


def test_a_corpus_of_broken_clips_is_an_error(words, tmp_path, monkeypatch):
    monkeypatch.setattr(prefilter, "score_clips", lambda rows, *_: ([], {row["id"]: "broken" for row in rows}))
    with pytest.raises(ValueError, match="split train: no clip could be scored; first error: broken"):
        prefilter.main(words(tmp_path / "out", "--keep", "2"))


def test_rows_of_an_unfinished_filter_are_refused(make_rows, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"kept.txt: the list does not exist; complete the run of train/prefilter.py"
    ):
        keep_rows(make_rows([[0]]), tmp_path)


@pytest.mark.slow
def test_the_filter_finds_the_clips_whose_sources_are_out_of_sight(tmp_path):
    """Uses AVWorld's trained captioner and its word embeddings. Measured: AUC 0.94; recall 0.88 if 20% are removed."""
    captioner = pretrained_captioner(CONFIGS / "avworld" / "captioner.yaml")
    corpus = ["--dataset_options", json.dumps({"sizes": {"train": 400}}), "--use_cpu", "true"]
    output = ["--captioner", str(captioner), "--output_dir", str(tmp_path / "out"), "--keep", "320"]
    prefilter.main([str(CONFIGS / "avworld" / "prefilter.yaml"), *corpus, *output])
    table = read_scores(tmp_path / "out")
    rows = load_corpus("avworld", "train", sizes={"train": 400})
    unseen = np.array([set(row["labels"]).isdisjoint(row["visible"]) for row in rows.remove_columns("audio")])
    scores = np.array(table["score"])
    auc = (scores[unseen][:, None] > scores[~unseen]).mean()
    recall = (unseen & ~np.array(table["kept"])).sum() / unseen.sum()
    assert auc >= 0.85
    assert recall >= 0.75
