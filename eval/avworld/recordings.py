"""Real recordings of AVWorld's classes (ESC-10) as a test split."""

from pathlib import Path

from dali_llava.processing.corpora.avworld.recordings import TEST_FOLD, find_recordings, spread_crops

from ..evaluation import System
from ..results import Row
from ..runner import CaptionRunner, Sample
from .source_metrics import class_phrases, majority_source


CROPS = 3  # per recording
RECORDINGS_SPLIT = "esc10_fold4"


def score_recordings(runner: CaptionRunner, folder: Path, system: System, seed: int, out: Path) -> Row:
    """
    The row of `system` on the recordings of fold 4.

    `sound_recall` is the share of recordings for which most captions of crops name the class. A crop without a caption
    counts as naming nothing; the reason in the row contains the number of such crops.

    Args:
        runner: the runner that captions the crops.
        folder: the folder of ESC-10.
        system: an audio-only system.
        seed: the seed of the run.
        out: folder to write the captions to.
    """
    recordings = {
        f"{path.parent.name}/{path.stem}": (source, path)
        for source, folds in find_recordings(folder).items()
        for path in folds[TEST_FOLD]
    }
    samples = [
        Sample(id=f"{name}#{number}", prompt=system.prompt, audio=crop, prefix=system.prefix)
        for name, (_, path) in recordings.items()
        for number, crop in enumerate(spread_crops(path, CROPS))
    ]
    results = list(runner.run(samples, out=out / f"{RECORDINGS_SPLIT}-{system.name}.jsonl", total=len(samples)))
    captions = {result.id: result.caption or "" for result in results}
    phrases = class_phrases()
    right = sum(
        majority_source([captions[f"{name}#{number}"] for number in range(CROPS)], phrases) == source
        for name, (source, _) in recordings.items()
    )
    metrics = {"sound_recall": right / len(recordings)}
    failed = [result for result in results if result.error is not None]
    reason = {"sound_recall": f"{len(failed)} crops have no caption ({failed[0].error})"} if failed else {}
    return Row(system.method, system.stage, system.modality, RECORDINGS_SPLIT, seed, len(recordings), metrics, reason)
