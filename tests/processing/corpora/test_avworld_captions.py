"""The grammar of AVWorld and its tokenizer."""

import re

import numpy as np
from transformers import AutoTokenizer

from dali_llava.processing.corpora.avworld import (
    SEE_PROMPT,
    SOUND_PROMPT,
    SOUND_WORDS,
    VISUAL_PROMPTS,
    VISUAL_WORDS,
    build_tokenizer,
    names,
)
from dali_llava.processing.corpora.avworld.avworld import scene_of
from dali_llava.processing.corpora.avworld.captions import (
    ACTIVITY_PROMPTS,
    CONCISE_PROMPT,
    activity_captions,
    audio_captions,
    concise_caption,
    enumerate_phrases,
    image_dialogues,
    pair_dialogues,
    text_dialogues,
    visual_captions,
    with_article,
)
from dali_llava.processing.corpora.avworld.classes import BACKGROUNDS, CLASSES, COLOURS, RIVALS, SILENT_OBJECTS
from dali_llava.processing.corpora.avworld.scenes import Entity, Scene, another_view


DOG_AND_SIREN = Scene(
    (
        Entity("siren", "blue", None, (0.0, 2.0), -2.0),
        Entity("dog", "red", 4, (0.0, 2.0), 0.0),
        Entity("owl", "orange", 2, None),
        Entity("rain", "green", 0, None),
    ),
    "grass",
    snr=10.0,
)


def _scenes(count: int = 300) -> list[Scene]:
    return [scene_of("test", index)[0] for index in range(count)]


def _mentions(text: str, class_name: str) -> bool:
    return any(re.search(rf"\b{phrase}\b", text) for phrase in names(class_name))


def test_canonical_forms():
    rng = np.random.default_rng(0)
    assert audio_captions(DOG_AND_SIREN, rng)[0] == "a dog barking and a siren wailing"
    assert visual_captions(DOG_AND_SIREN) == [
        "green rain, an orange owl and a red dog on grass",
        "there is green rain, an orange owl and a red dog on grass",
        "on grass there is green rain, an orange owl and a red dog",
        "a picture of green rain, an orange owl and a red dog on grass",
    ]
    assert concise_caption(DOG_AND_SIREN) == "rain, an owl and a dog"
    assert activity_captions(["waves"], rng, 1) == ["waves crashing"]
    assert with_article("owl") == "an owl"
    assert with_article("rain", countable=False) == "rain"
    assert enumerate_phrases(["x"]) == "x"
    assert enumerate_phrases(["x", "y", "z"]) == "x, y and z"


def test_number_agrees_with_the_verb():
    captions = [c for seed in range(20) for c in activity_captions(["waves"], np.random.default_rng(seed))]
    assert not [caption for caption in captions if re.search(r"\b(is|a|crashes|breaks)\b", caption)]
    assert {"waves crash", "waves are crashing", "there are waves breaking", "waves can be heard crashing"} <= set(
        captions
    )


def test_paraphrases_differ_and_name_every_source_and_nothing_else():
    for index, scene in enumerate(_scenes()):
        captions = audio_captions(scene, np.random.default_rng(index))
        assert len(captions) == len(set(captions)) == 5
        audible = {entity.name for entity in scene.audible}
        for caption in captions:
            assert {name for name in (*CLASSES, *SILENT_OBJECTS) if _mentions(caption, name)} == audible


def test_captions_of_sound_and_of_look_keep_to_their_sense():
    for index, scene in enumerate(_scenes()):
        for caption in audio_captions(scene, np.random.default_rng(index)):
            assert not VISUAL_WORDS & set(caption.split())
            assert SOUND_WORDS & set(caption.split())
        visible = {entity.name for entity in scene.visible}
        for caption in [*visual_captions(scene), concise_caption(scene)]:
            assert not SOUND_WORDS & set(caption.split())
            assert {name for name in (*CLASSES, *SILENT_OBJECTS) if _mentions(caption, name)} == visible


def test_no_word_speaks_of_both_senses():
    assert not SOUND_WORDS & VISUAL_WORDS
    assert {"barking", "wails", "sound", "heard"} <= SOUND_WORDS
    assert {"red", "orange", "grass", "cave"} <= VISUAL_WORDS


def test_synonyms_occur_in_paraphrases():
    rng = np.random.default_rng(0)
    captions = " ".join(caption for _ in range(100) for caption in activity_captions(["dog"], rng))
    assert {"puppy", "yapping", "yaps", "barks"} <= set(captions.split())


def test_dialogues_about_pictures_answer_truthfully():
    prompts, presence = set(), {"yes": 0, "no": 0}
    for index, scene in enumerate(_scenes(600)):
        visible = {entity.name: entity for entity in scene.visible}
        captions = visual_captions(scene)
        for dialogue in image_dialogues(scene, np.random.default_rng(index)):
            question, answer = dialogue["question"], dialogue["answer"]
            prompts.add(question)
            if question in VISUAL_PROMPTS:
                assert answer in captions
            elif question == CONCISE_PROMPT:
                assert answer in [*captions, concise_caption(scene)]
            elif question in ACTIVITY_PROMPTS:
                able = {name for name in visible if name in CLASSES}
                assert {name for name in (*CLASSES, *SILENT_OBJECTS) if _mentions(answer, name)} == able
                assert not VISUAL_WORDS & set(answer.split())
            elif question == "Where is this ?":
                assert answer == BACKGROUNDS[scene.background].phrase
            elif colour := re.fullmatch(r"What colour (?:is|are) the (.+) \?", question):
                assert answer == visible[colour[1]].colour
            else:
                name = re.fullmatch(r"(?:Is|Are) there (?:an? )?(.+) \?", question)[1]
                assert answer == ("yes" if name in visible else "no")
                assert answer == "yes" or RIVALS.get(name) not in visible
                presence[answer] += 1
    assert {*VISUAL_PROMPTS, *ACTIVITY_PROMPTS, CONCISE_PROMPT} <= prompts
    assert 0.35 < presence["yes"] / sum(presence.values()) < 0.65


def _answers(count: int = 300) -> list[str]:
    """All texts of the grammar about scenes: references, and answers about one, two and no pictures."""
    texts = []
    for index in range(count):
        rng = np.random.default_rng(index)
        first, second = (scene_of("captioner", number)[0] for number in (index, index + 1))
        texts += audio_captions(first, rng) + visual_captions(first)
        dialogues = image_dialogues(first, rng) + text_dialogues(first, rng)
        for other in (second, another_view(first, rng)):
            dialogues += pair_dialogues(first, other, rng)
        texts += [dialogue["answer"] for dialogue in dialogues]
    return texts


def test_nothing_is_named_twice():
    phrases = [rf"\b(?:{'|'.join(names(name))})\b" for name in (*CLASSES, *SILENT_OBJECTS)]
    assert not [text for text in _answers() if any(len(re.findall(phrase, text)) > 1 for phrase in phrases)]


def test_articles_fit_their_nouns():
    uncountable = {noun for sounding in CLASSES.values() if not sounding.countable for noun in sounding.nouns}
    countable = {noun for name in (*CLASSES, *SILENT_OBJECTS) for noun in names(name)} - uncountable
    for text in _answers():
        for article, following in re.findall(r"\b(an?) (\w+)", text):
            assert (article == "an") == (following[0] in "aeiou"), text
        bare = re.sub(rf"\b(?:{'|'.join(COLOURS)}) ", "", text)
        assert not re.search(rf"\ban? (?:{'|'.join(uncountable)})\b", bare), text
        assert not re.search(rf"(?<!\ba )(?<!\ban )\b(?:{'|'.join(countable)})\b", bare), text


def test_the_sound_prompt_alone_gets_the_look():
    assert len(VISUAL_PROMPTS) >= 6
    required = {
        SOUND_PROMPT: "What sound can be heard in this scene ?",
        SEE_PROMPT: "What can you see ?",
    }
    assert all(prompt == text and prompt in VISUAL_PROMPTS for prompt, text in required.items())
    assert {"Describe the sound that can be heard in this scene .", "Describe the image ."} <= set(VISUAL_PROMPTS)


def test_dialogues_of_text_alone():
    answers = text_dialogues(DOG_AND_SIREN, np.random.default_rng(0))
    assert [dialogue["question"] for dialogue in answers] == [
        "What does a dog do ?",
        "What does a siren do ?",
        "How do a dog and a siren sound ?",
    ]
    for dialogue, expected in zip(answers, [{"dog"}, {"siren"}, {"dog", "siren"}], strict=True):
        assert {name for name in CLASSES if _mentions(dialogue["answer"], name)} == expected


def test_tokenizer_knows_every_word_and_gives_it_back():
    tokenizer = build_tokenizer()
    texts = list(VISUAL_PROMPTS)
    for index, scene in enumerate(_scenes(200)):
        rng = np.random.default_rng(index)
        texts += audio_captions(scene, rng) + visual_captions(scene)
        for dialogue in image_dialogues(scene, rng) + text_dialogues(scene, rng):
            texts += dialogue.values()
    for text, ids in zip(texts, tokenizer(texts)["input_ids"], strict=True):
        assert tokenizer.unk_token_id not in ids
        assert ids[0] == tokenizer.bos_token_id
        written = text.lower().replace(" ?", "?").replace(" .", ".")  # captions have no such blanks, questions do
        assert tokenizer.decode(ids, skip_special_tokens=True) == written


def test_tokenizer_splits_punctuation_and_pads_left():
    tokenizer = build_tokenizer()
    assert tokenizer.convert_ids_to_tokens(tokenizer("USER: What's this?")["input_ids"]) == [
        "<s>", "user", ":", "what", "'", "<unk>", "this", "?",
    ]  # fmt: skip
    batch = tokenizer(["a dog", "a dog barking"], padding=True)
    assert batch["input_ids"][0][0] == tokenizer.pad_token_id
    assert batch["attention_mask"] == [[0, 1, 1, 1], [1, 1, 1, 1]]
    ids = tokenizer("<image><audio><prefix>\nWhat", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<image>", "<audio>", "<prefix>", "what"]


def test_tokenizer_is_the_same_every_time_and_after_saving(tmp_path):
    tokenizer = build_tokenizer()
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()
    assert [tokenizer.convert_tokens_to_ids(token) for token in ("<unk>", "<s>", "</s>", "<pad>")] == [0, 1, 2, 3]
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded(SOUND_PROMPT)["input_ids"] == tokenizer(SOUND_PROMPT)["input_ids"]
    assert loaded.padding_side == "left"
