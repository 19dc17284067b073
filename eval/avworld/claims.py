"""What the method is said to do, checked against what a run measured."""

from collections.abc import Mapping

from ..metrics.phrases import asserting_share
from ..results import Claim, Row


VISUAL_SHARE = 0.95  # of the image captions that name no sound, prompt alone
PREFIX_SEEN_RECALL = 0.85  # of image captions behind the 16-shot prefix
AUDIO_SOUND_RECALL = 0.60  # of audio captions after alignment
AUDIO_OVER_UNTRAINED = 5.0  # the same over an untrained audio tower's
ATTENTIVE_SOUND_RECALL = 0.70  # of OT^Att's audio captions after alignment
RECORDINGS_RECALL = 0.80  # of recordings of ESC-10's fold 4 whose class is named


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


def names_sources(row: Row) -> Claim:
    """The aligned audio tower names most of what sounds, mixtures included."""
    recall = row.metrics["sound_recall"]
    text = f"{row.method}, audio only: sound_recall at least {ATTENTIVE_SOUND_RECALL:.2f}"
    return claim(text, recall >= ATTENTIVE_SOUND_RECALL, f"{recall:.3f}")


def above_contrastive(row: Row, contrastive: Row) -> Claim:
    """Aligned distributions caption better than contrasted mean tokens (the paper's table 1)."""
    ours, theirs = row.metrics["cider_d"], contrastive.metrics["cider_d"]
    ratio = f", {ours / theirs:.2f} times" if theirs else ""
    text = f"{row.method}, {row.stage}, audio only: CIDEr-D above contrastive's"
    return claim(text, ours > theirs, f"{ours:.3f} against {theirs:.3f}{ratio}")


def senses_add_up(both: Row, audio: Row, image: Row) -> Claim:
    """Sound with picture captions better than either alone (the paper's tables 1 and 4)."""
    values = [row.metrics["cider_d"] for row in (both, audio, image)]
    text = f"{both.method}, {both.stage}: CIDEr-D of sound with picture above sound's and above picture's"
    measured = "{:.3f} against {:.3f} and {:.3f}".format(*values)
    return claim(text, values[0] > max(values[1:]), measured)


def distillation_lifts(aligned: Row, distilled: Row) -> Claim:
    """Captions made from both senses teach the audio projector."""
    before, after = aligned.metrics["cider_d"], distilled.metrics["cider_d"]
    text = f"{aligned.method}, audio only: CIDEr-D higher after distillation"
    return claim(text, after > before, f"{before:.3f} to {after:.3f}")


def less_visual_bias(row: Row, other: Row) -> Claim:
    """Asked what it sees, one method's audio invents less than another's (the paper's figure 3)."""
    ours, theirs = row.metrics["visual_bias"], other.metrics["visual_bias"]
    text = f"{row.method}: visual_bias below that of {other.method}"
    return claim(text, ours < theirs, f"{ours:.3f} against {theirs:.3f}")


def closes_gap(method: str, gaps: Mapping[str, float]) -> Claim:
    """Mean audio tokens lie nearer to mean image tokens than contrastive's (the paper's figure 4)."""
    text = f"{method}: modality gap below contrastive's"
    return claim(text, gaps[method] < gaps["contrastive"], f"{gaps[method]:.2f} against {gaps['contrastive']:.2f}")


def hears_recordings(row: Row) -> Claim:
    """Recorded sounds are named, by the majority of a recording's crops."""
    recall = row.metrics["sound_recall"]
    text = f"{row.method}, ESC-10 fold 4: at least {RECORDINGS_RECALL:.2f} named by the majority of three crops"
    return claim(text, recall >= RECORDINGS_RECALL, f"{recall:.3f} of {row.n}")


def captions_unchanged(before: Mapping[str, str], after: Mapping[str, str], what: str) -> Claim:
    """Image captions are the same, word by word, before and after the stages."""
    same = sum(after.get(name) == caption for name, caption in before.items())
    return claim(f"image captions unchanged, {what}", same == len(before), f"{same}/{len(before)} identical")
