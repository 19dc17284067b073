"""What the method is said to do, checked against what a run measured."""

from collections.abc import Mapping

from .metrics.phrases import asserting_share
from .results import Claim, Row


VISUAL_SHARE = 0.95  # of the image captions that name no sound, prompt alone
PREFIX_SEEN_RECALL = 0.85  # of image captions behind the 16-shot prefix
AUDIO_SOUND_RECALL = 0.60  # of audio captions after alignment
AUDIO_OVER_UNTRAINED = 5.0  # the same over an untrained audio tower's


def claim(text: str, holds: bool, measured: str) -> Claim:
    """A claim with the verdict `holds` or `fails`."""
    return Claim(text, "holds" if holds else "fails", measured)


def captions_are_visual(captions: Mapping[str, str], sound_words: frozenset[str]) -> Claim:
    """The captioner answers the sound prompt with what it sees."""
    share = 1 - asserting_share(list(captions.values()), sorted(sound_words))
    return claim(
        f"prompt alone: at least {VISUAL_SHARE:.0%} of image captions name no sound",
        share >= VISUAL_SHARE,
        f"{share:.1%} of {len(captions)}",
    )


def prefix_turns_to_sound(row: Row) -> Claim:
    """Sixteen shots make the captioner name what sounds in a picture."""
    recall = row.metrics["seen_recall"]
    text = f"16-shot prefix: seen_recall of image captions at least {PREFIX_SEEN_RECALL}"
    return claim(text, recall >= PREFIX_SEEN_RECALL, f"{recall:.3f}")


def hears(row: Row, untrained: Row) -> Claim:
    """The aligned audio tower names what sounds, an untrained one does not."""
    recall, chance = row.metrics["sound_recall"], untrained.metrics["sound_recall"]
    return claim(
        f"{row.method}, audio only: sound_recall at least {AUDIO_SOUND_RECALL:.2f} and {AUDIO_OVER_UNTRAINED:.0f} "
        "times an untrained audio tower's",
        recall >= AUDIO_SOUND_RECALL and recall >= AUDIO_OVER_UNTRAINED * chance,
        f"{recall:.3f} against {chance:.3f}",
    )


def captions_unchanged(before: Mapping[str, str], after: Mapping[str, str], what: str) -> Claim:
    """Image captions are the same, word by word, before and after the stages."""
    same = sum(after.get(name) == caption for name, caption in before.items())
    return claim(f"image captions unchanged, {what}", same == len(before), f"{same}/{len(before)} identical")
