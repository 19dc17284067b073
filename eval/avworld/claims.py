"""The claims of the paper, checked against the figures of a run."""

from collections.abc import Mapping

from ..metrics.phrases import asserting_share
from ..results import Claim, Row


VISUAL_SHARE = 0.95  # share of image captions without a sound, with the prompt alone
PREFIX_SEEN_RECALL = 0.85  # seen_recall of image captions with the 16-shot prefix
AUDIO_SOUND_RECALL = 0.60  # sound_recall of audio captions after alignment
AUDIO_OVER_UNTRAINED = 5.0  # ratio to the sound_recall of an untrained audio tower
ATTENTIVE_SOUND_RECALL = 0.70  # sound_recall of OT^Att's audio captions after alignment
RECORDINGS_RECALL = 0.80  # sound_recall of the recordings in fold 4 of ESC-10


def claim(text: str, holds: bool, measured: str) -> Claim:
    """A claim with the verdict `holds` or `fails`."""
    return Claim(text, "holds" if holds else "fails", measured)


def captions_are_visual(captions: Mapping[str, str], sound_words: frozenset[str]) -> Claim:
    """Without prefix, the captioner answers the sound prompt with a description of the picture."""
    share = 1 - asserting_share(list(captions.values()), sorted(sound_words))
    return claim(
        f"prompt alone: at least {VISUAL_SHARE:.0%} of image captions name no sound",
        share >= VISUAL_SHARE,
        f"{share:.1%} of {len(captions)}",
    )


def prefix_turns_to_sound(row: Row) -> Claim:
    """With a prefix learned from sixteen shots, the captioner names the sounding sources in a picture."""
    recall = row.metrics["seen_recall"]
    text = f"16-shot prefix: seen_recall of image captions at least {PREFIX_SEEN_RECALL}"
    return claim(text, recall >= PREFIX_SEEN_RECALL, f"{recall:.3f}")


def hears(row: Row, untrained: Row) -> Claim:
    """With the aligned audio tower, captions name the sources; with an untrained tower, they do not."""
    recall, chance = row.metrics["sound_recall"], untrained.metrics["sound_recall"]
    return claim(
        f"{row.method}, audio only: sound_recall at least {AUDIO_SOUND_RECALL:.2f} and {AUDIO_OVER_UNTRAINED:.0f} "
        "times an untrained audio tower's",
        recall >= AUDIO_SOUND_RECALL and recall >= AUDIO_OVER_UNTRAINED * chance,
        f"{recall:.3f} against {chance:.3f}",
    )


def names_sources(row: Row) -> Claim:
    """With the aligned audio tower, captions name most sources, including those in mixtures."""
    recall = row.metrics["sound_recall"]
    text = f"{row.method}, audio only: sound_recall at least {ATTENTIVE_SOUND_RECALL:.2f}"
    return claim(text, recall >= ATTENTIVE_SOUND_RECALL, f"{recall:.3f}")


def above_contrastive(row: Row, contrastive: Row) -> Claim:
    """Aligning distributions gives better captions than contrastive learning of mean tokens (table 1 of the paper)."""
    ours, theirs = row.metrics["cider_d"], contrastive.metrics["cider_d"]
    ratio = f", {ours / theirs:.2f} times" if theirs else ""
    text = f"{row.method}, {row.stage}, audio only: CIDEr-D above contrastive's"
    return claim(text, ours > theirs, f"{ours:.3f} against {theirs:.3f}{ratio}")


def senses_add_up(both: Row, audio: Row, image: Row) -> Claim:
    """Captions from sound and picture are better than captions from either alone (tables 1 and 4 of the paper)."""
    values = [row.metrics["cider_d"] for row in (both, audio, image)]
    text = f"{both.method}, {both.stage}: CIDEr-D of sound with picture above sound's and above picture's"
    measured = "{:.3f} against {:.3f} and {:.3f}".format(*values)
    return claim(text, values[0] > max(values[1:]), measured)


def distillation_lifts(aligned: Row, distilled: Row) -> Claim:
    """Distilling captions of sound and picture into the audio projector improves the captions of sound."""
    before, after = aligned.metrics["cider_d"], distilled.metrics["cider_d"]
    text = f"{aligned.method}, audio only: CIDEr-D higher after distillation"
    return claim(text, after > before, f"{before:.3f} to {after:.3f}")


def less_visual_bias(row: Row, other: Row) -> Claim:
    """Asked what can be seen, one method hallucinates less from audio than another (figure 3 of the paper)."""
    ours, theirs = row.metrics["visual_bias"], other.metrics["visual_bias"]
    text = f"{row.method}: visual_bias below that of {other.method}"
    return claim(text, ours < theirs, f"{ours:.3f} against {theirs:.3f}")


def closes_gap(method: str, gaps: Mapping[str, float]) -> Claim:
    """Mean audio tokens are closer to mean image tokens than those of contrastive learning (figure 4 of the paper)."""
    text = f"{method}: modality gap below contrastive's"
    return claim(text, gaps[method] < gaps["contrastive"], f"{gaps[method]:.2f} against {gaps['contrastive']:.2f}")


def hears_recordings(row: Row) -> Claim:
    """The captions of most crops of a recording name its class."""
    recall = row.metrics["sound_recall"]
    text = f"{row.method}, ESC-10 fold 4: at least {RECORDINGS_RECALL:.2f} named by the majority of three crops"
    return claim(text, recall >= RECORDINGS_RECALL, f"{recall:.3f} of {row.n}")


def captions_unchanged(before: Mapping[str, str], after: Mapping[str, str], what: str) -> Claim:
    """Image captions are identical before and after the stages."""
    same = sum(after.get(name) == caption for name, caption in before.items())
    return claim(f"image captions unchanged, {what}", same == len(before), f"{same}/{len(before)} identical")
