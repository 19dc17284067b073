"""Texts about a scene of AVWorld: captions of the sound, captions of the picture, and dialogues of the captioner.

Captions of the sound contain no colours or places, and captions of the picture contain no sounds. The captioner does
not hear, so it answers all general prompts with the picture, including the prompt for the sound. It describes
activities only if asked "What is everything doing ?", from its knowledge of language.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .classes import BACKGROUNDS, CLASSES, COLOURS, RIVALS, SILENT_OBJECTS, names
from .scenes import Scene


SOUND_PROMPT = "What sound can be heard in this scene ?"
SEE_PROMPT = "What can you see ?"
CONCISE_PROMPT = "What can you see ? Answer concisely ."
PLACE_PROMPT = "Where is this ?"
ACTIVITY_PROMPTS: tuple[str, ...] = (
    "What is everything doing ?",
    "What is going on in this scene ?",
    "Describe what everything does .",
    "Write what each thing in the picture is doing .",
)

# The answer to each is a caption of the picture.
VISUAL_PROMPTS: tuple[str, ...] = (
    SOUND_PROMPT,
    SEE_PROMPT,
    "Describe the sound that can be heard in this scene .",
    "Describe the image .",
    "What is in this picture ?",
    "What does the image show ?",
    "Describe what you see in this scene .",
    "Write a caption for the image .",
)

NUM_AUDIO_CAPTIONS = 5
SYNONYMS = 0.3  # share of mentions in paraphrases that replace the primary noun or verb
CANONICAL_ANSWERS = 0.6  # share of the captioner's answers in the first form of the grammar
QUESTIONS = 0.4  # share of the captioner's pictures with an additional question about a detail

# Words in captions that describe sound.
_HEARING_WORDS = {"sound", "sounds", "noise", "noises", "hear", "hears", "heard", "loud", "quiet", "audible"}
_VERB_FORMS = {form for sounding in CLASSES.values() for pair in sounding.verbs for form in pair}
SOUND_WORDS: frozenset[str] = frozenset(_VERB_FORMS | _HEARING_WORDS)

# Words for properties that only a picture can show.
VISUAL_WORDS: frozenset[str] = frozenset(COLOURS) | {background.word for background in BACKGROUNDS.values()}


def with_article(noun: str, countable: bool = True) -> str:
    """The noun, with "a" or "an" if it is countable."""
    if not countable:
        return noun
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def enumerate_phrases(phrases: Sequence[str]) -> str:
    """Join phrases: "x", "x and y", "x, y and z"."""
    *rest, last = phrases
    return f"{', '.join(rest)} and {last}" if rest else last


def _countable(name: str) -> bool:
    return name not in CLASSES or CLASSES[name].countable


def _choose(rng: np.random.Generator | None, options: Sequence, share: float):
    """The first option, or one of the others with probability `share`. Without `rng`, always the first."""
    if rng is None or len(options) == 1 or rng.random() >= share:
        return options[0]
    return options[int(rng.integers(1, len(options)))]


class _Clause(NamedTuple):
    """The activity of one thing, such as "a dog", "barking", "barks", "is"."""

    subject: str
    gerund: str
    finite: str
    be: str


def _clause(name: str, rng: np.random.Generator | None = None) -> _Clause:
    sounding = CLASSES[name]
    subject = with_article(_choose(rng, sounding.nouns, SYNONYMS), sounding.countable)
    return _Clause(subject, *_choose(rng, sounding.verbs, SYNONYMS), "are" if sounding.plural else "is")


def _single_forms(clauses: Sequence[_Clause]) -> list[str]:
    subject, gerund, finite, be = clauses[0]
    return [
        f"{subject} {finite}",
        f"{subject} {be} {gerund}",
        f"the sound of {subject} {gerund}",
        f"{subject} can be heard {gerund}",
        f"there {be} {subject} {gerund}",
    ]


def _joint_forms(clauses: Sequence[_Clause]) -> list[str]:
    gerunds = [f"{clause.subject} {clause.gerund}" for clause in clauses]
    finites = [f"{clause.subject} {clause.finite}" for clause in clauses]
    subject, gerund, _, be = clauses[0]
    return [
        enumerate_phrases(finites),
        f"{finites[0]} while {enumerate_phrases(finites[1:])}",
        f"{gerunds[0]} with {enumerate_phrases(gerunds[1:])}",
        f"{subject} {be} {gerund} as {enumerate_phrases(finites[1:])}",
        f"the sound of {enumerate_phrases(gerunds)}",
    ]


def activity_captions(
    class_names: Sequence[str], rng: np.random.Generator, count: int = NUM_AUDIO_CAPTIONS
) -> list[str]:
    """Paraphrases of the activities of the given classes, each in a different form.

    The first is canonical: primary nouns and gerunds in the given order ("a dog barking and a siren wailing"). The
    others use random synonyms, orders and forms ("a siren wails while a dog barks").

    Returns:
        list of `count` (at most 6) str.
    """
    clauses = [_clause(name) for name in class_names]
    captions = [enumerate_phrases([f"{clause.subject} {clause.gerund}" for clause in clauses])]
    forms = _single_forms if len(class_names) == 1 else _joint_forms
    for form in rng.permutation(5)[: count - 1]:
        captions.append(forms([_clause(class_names[index], rng) for index in rng.permutation(len(class_names))])[form])
    return captions


def audio_captions(scene: Scene, rng: np.random.Generator, as_seen: bool = False) -> list[str]:
    """Five paraphrases of the audible sources. The first is canonical.

    The canonical caption lists the sources from the loudest to the faintest. With `as_seen`, it lists them in reading
    order of the picture, like a writer who looks at it; all audible sources must be visible.
    """
    sources = [entity for entity in scene.visible if entity.span is not None] if as_seen else scene.audible
    return activity_captions([entity.name for entity in sources], rng)


def visual_captions(scene: Scene) -> list[str]:
    """Four captions of the picture, in reading order. The first is canonical ("a red dog and a blue key on grass").

    A class that looks like another has its own noun, although the picture does not identify it.
    """
    things = []
    for entity in scene.visible:
        noun = names(entity.name)[0]
        things.append(with_article(f"{entity.colour} {noun}", _countable(entity.name)))
    place, listing = BACKGROUNDS[scene.background].phrase, enumerate_phrases(things)
    return [
        f"{listing} {place}",
        f"there is {listing} {place}",
        f"{place} there is {listing}",
        f"a picture of {listing} {place}",
    ]


def concise_caption(scene: Scene) -> str:
    """The visible nouns only."""
    return enumerate_phrases([with_article(e.name, _countable(e.name)) for e in scene.visible])


def _activity_answer(class_names: Sequence[str], rng: np.random.Generator) -> str:
    return _choose(rng, activity_captions(class_names, rng), 1 - CANONICAL_ANSWERS)


def _presence_dialogue(scene: Scene, rng: np.random.Generator) -> dict[str, str]:
    """ "Is there a dog ?", half of the time about a thing that is absent and looks like nothing in the scene."""
    visible = [entity.name for entity in scene.visible]
    if rng.random() < 0.5:
        name, answer = str(rng.choice(visible)), "yes"
    else:
        taken = {*visible, *(RIVALS.get(name, name) for name in visible)}
        name, answer = str(rng.choice([name for name in (*CLASSES, *SILENT_OBJECTS) if name not in taken])), "no"
    verb = "Are" if name in CLASSES and CLASSES[name].plural else "Is"
    return {"question": f"{verb} there {with_article(name, _countable(name))} ?", "answer": answer}


def _colour_dialogue(scene: Scene, rng: np.random.Generator) -> dict[str, str]:
    entity = scene.visible[int(rng.integers(len(scene.visible)))]
    verb = "are" if entity.name in CLASSES and CLASSES[entity.name].plural else "is"
    return {"question": f"What colour {verb} the {entity.name} ?", "answer": entity.colour}


def image_dialogues(scene: Scene, rng: np.random.Generator) -> list[dict[str, str]]:
    """Dialogues about a picture: a caption, the activities unless all objects are silent, and sometimes a question.

    Returns:
        list of {"question", "answer"}.
    """
    dialogues = []
    prompt = str(rng.choice((*VISUAL_PROMPTS, CONCISE_PROMPT)))
    if prompt == CONCISE_PROMPT and rng.random() < 0.5:
        answer = concise_caption(scene)
    else:
        answer = _choose(rng, visual_captions(scene), 1 - CANONICAL_ANSWERS)
    dialogues.append({"question": prompt, "answer": answer})
    able = [entity.name for entity in scene.visible if entity.name in CLASSES]
    if able:
        dialogues.append({"question": str(rng.choice(ACTIVITY_PROMPTS)), "answer": _activity_answer(able, rng)})
    if rng.random() >= QUESTIONS:
        return dialogues
    kind = rng.integers(3)
    if kind == 0:
        dialogues.append(_presence_dialogue(scene, rng))
    elif kind == 1:
        dialogues.append(_colour_dialogue(scene, rng))
    else:
        dialogues.append({"question": PLACE_PROMPT, "answer": BACKGROUNDS[scene.background].phrase})
    return dialogues


def pair_dialogues(first: Scene, second: Scene, rng: np.random.Generator) -> list[dict[str, str]]:
    """Dialogues about two pictures at once.

    Two dialogues list the content of both pictures, without colours and places, which may differ between them. Two
    dialogues describe the activities of everything that can sound in either picture, if there is any.

    Returns:
        list of {"question", "answer"}.
    """
    shown = list(dict.fromkeys(entity.name for scene in (first, second) for entity in scene.visible))
    listing = enumerate_phrases([with_article(name, _countable(name)) for name in shown])
    prompts = rng.choice((*VISUAL_PROMPTS, CONCISE_PROMPT), 2, replace=False)
    dialogues = [{"question": str(prompt), "answer": listing} for prompt in prompts]
    able = [name for name in shown if name in CLASSES]
    if able:
        prompts = rng.choice(ACTIVITY_PROMPTS, 2, replace=False)
        dialogues += [{"question": str(prompt), "answer": _activity_answer(able, rng)} for prompt in prompts]
    return dialogues


def text_dialogues(scene: Scene, rng: np.random.Generator) -> list[dict[str, str]]:
    """Three dialogues about sounds, without a picture: two about single sources of the scene, one about all."""
    class_names = [entity.name for entity in scene.audible]
    dialogues = []
    for index in range(2):
        name = class_names[index % len(class_names)]
        auxiliary = "do" if CLASSES[name].plural else "does"
        question = f"What {auxiliary} {with_article(name, _countable(name))} do ?"
        dialogues.append({"question": question, "answer": _activity_answer([name], rng)})
    subjects = enumerate_phrases([with_article(name, _countable(name)) for name in class_names])
    auxiliary = "do" if len(class_names) > 1 or CLASSES[class_names[0]].plural else "does"
    question = f"How {auxiliary} {subjects} sound ?"
    return [*dialogues, {"question": question, "answer": _activity_answer(class_names, rng)}]


def grammar_texts() -> list[str]:
    """Sentences that together contain every word of the grammar."""
    texts = [*VISUAL_PROMPTS, CONCISE_PROMPT, PLACE_PROMPT, *ACTIVITY_PROMPTS, "yes no a an and, ."]
    texts += ["What colour is the", "What colour are the", "Is there", "Are there", "there is", "a picture of"]
    texts += ["What does do ?", "How does sound ?", "How do sound ?"]
    texts += [*COLOURS, *(background.phrase for background in BACKGROUNDS.values()), *SILENT_OBJECTS]
    texts += [noun for sounding in CLASSES.values() for noun in sounding.nouns]
    texts += [form for sounding in CLASSES.values() for pair in sounding.verbs for form in pair]
    texts += _single_forms([_clause("dog")]) + _single_forms([_clause("waves")])
    texts += _joint_forms([_clause("dog"), _clause("waves")])
    return texts
