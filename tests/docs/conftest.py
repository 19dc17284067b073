"""Fixtures with the files, corpora and runs that the commands of the documentation need."""

import json
import shutil
from pathlib import Path

import pytest
import soundfile

from dali_llava.eval.caption_metrics import score_captions
from dali_llava.eval.score_files import score_record, write_scores


ROOT = Path(__file__).parents[2]
AUDIOSET = ("--PJHxphWEs", "--ZhevVpy1s", "--aE2O5G5WE")
AUDIOCAPS = ("vfY_TJq7n_U", "tdWhHV3X25Q")
CLASSES = 'index,mid,display_name\n0,/m/09x0r,"Speech"\n444,/t/dd00088,"Gush"\n'


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory):
    """Use temporary folders for corpora and for the code of checkpoints."""
    folder = tmp_path_factory.mktemp("caches")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "datasets")
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder / "modules"))
        patch.syspath_prepend(folder / "modules")
        yield


@pytest.fixture(scope="session")
def media_folder(media_dir, tiny_model_dir, tmp_path_factory) -> Path:
    """The media files of the examples, and a model with random weights in place of the quickstart's."""
    folder = tmp_path_factory.mktemp("docs")
    for file in media_dir.iterdir():
        (folder / file.name).symlink_to(file)
    samples, rate = soundfile.read(media_dir / "long.flac")
    soundfile.write(folder / "long.mp3", samples, rate)
    (folder / "runs" / "quickstart").mkdir(parents=True)
    (folder / "runs" / "quickstart" / "model").symlink_to(tiny_model_dir)
    return folder


@pytest.fixture(scope="session")
def corpora_folder(media_folder, tmp_path_factory) -> Path:
    """`media_folder` with the repository's scripts, the corpora of the pages, and captions to score."""
    folder = tmp_path_factory.mktemp("corpora")
    shutil.copytree(media_folder, folder, dirs_exist_ok=True, symlinks=True)
    (folder / "train").symlink_to(ROOT / "train")
    write_clips(folder / "clips", folder / "clip.mp4")
    write_audioset(folder / "audioset", folder)
    write_audiocaps(folder / "audiocaps", folder / "clip.mp4")
    write_clotho(folder / "clotho", folder / "long.flac")
    (folder / "candidates.csv").write_text("id,caption\none,a dog barking\ntwo,rain falling\n")
    (folder / "references.csv").write_text(
        "id,caption_1,caption_2\none,a dog barking loudly,a dog barks\ntwo,rain falling on grass,it is raining\n"
    )
    references = {"one": ["a dog barking loudly"], "two": ["rain falling on grass"]}
    for name, caption in (("ours", "a dog barking"), ("baseline", "a cat")):
        scored = score_captions({"one": caption, "two": "rain falling"}, references, java=None)
        write_scores(folder / f"{name}.json", score_record(scored, references, "python"))
    return folder


def write_clips(folder: Path, video: Path) -> None:
    """A folder of clips with captions and labels."""
    folder.mkdir()
    lines = ["file_name,caption,labels"]
    for name in ("one", "two", "three"):
        shutil.copy(video, folder / f"{name}.mp4")
        lines.append(f"{name}.mp4,a dog barking,dog")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")


def write_audioset(folder: Path, media: Path) -> None:
    """AudioSet's lists with videos, and a CAV-MAE list with audio and frames, for the same clips."""
    for name in ("csv", "media", "audio", "images/frame_0", "images/frame_1"):
        (folder / name).mkdir(parents=True)
    segments = ["# YTID, start_seconds, end_seconds, positive_labels"]
    segments += [f'{name}, 30.000, 33.000, "/m/09x0r,/t/dd00088"' for name in AUDIOSET]
    for file in (folder / "csv/class_labels_indices.csv", folder / "class_labels_indices.csv"):
        file.write_text(CLASSES)
    for split in ("balanced_train", "unbalanced_train"):
        for place in (folder / "csv", folder):
            (place / f"{split}_segments.csv").write_text("\n".join(segments) + "\n")
    entries = []
    for name in AUDIOSET:
        shutil.copy(media / "clip.mp4", folder / "media" / f"{name}_30.mp4")
        shutil.copy(media / "long.flac", folder / "audio" / f"{name}.flac")
        shutil.copy(media / "photo.jpg", folder / "images/frame_0" / f"{name}.jpg")
        paths = {"wav": f"/data/as/audio/{name}.flac", "video_path": "/data/as/images/"}
        entries.append({"video_id": name, **paths, "labels": "/m/09x0r"})
    (folder / "as_train.json").write_text(json.dumps({"data": entries}))


def write_audiocaps(folder: Path, video: Path) -> None:
    """AudioCaps' lists, with two captions per clip, and videos."""
    (folder / "dataset").mkdir(parents=True)
    (folder / "media").mkdir()
    lines = ["audiocap_id,youtube_id,start_time,caption"]
    for number, name in enumerate(AUDIOCAPS):
        shutil.copy(video, folder / "media" / f"{name}_30.mp4")
        lines += [f"{2 * number},{name},30,a dog barking", f"{2 * number + 1},{name},30,a bell ringing"]
    for split in ("train", "val", "test"):
        (folder / "dataset" / f"{split}.csv").write_text("\n".join(lines) + "\n")


def write_clotho(folder: Path, sound: Path) -> None:
    """Clotho's list of the evaluation split, with one recording."""
    (folder / "evaluation").mkdir(parents=True)
    shutil.copy(sound, folder / "evaluation" / "Rising tone.wav")
    (folder / "clotho_captions_evaluation.csv").write_text(
        "file_name,caption_1,caption_2,caption_3,caption_4,caption_5\nRising tone.wav,a,b,c,d,a rising tone\n"
    )
