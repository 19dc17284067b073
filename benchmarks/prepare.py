"""Compare the clips per second of `dali-llava prepare` on one core with those of one ffmpeg call per clip.

Both write the same for each clip: 16 kHz mono FLAC, and the first frame of each second as JPEG. The whole benchmark
runs on one core. If `ffmpeg` is not installed, the baseline is a PyAV decoding loop, which uses the same libraries, in
a new process per clip. Because Python starts more slowly than ffmpeg, the same processes are also timed without any
work. The time of `prepare` includes starting its worker process. The clips are generated (10 s, 640 x 360, H.264 and
AAC) or read from --media. The benchmark takes about five minutes:

    python benchmarks/prepare.py
    python benchmarks/prepare.py --media ../shared/data/clips --repeats 3
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import datasets
import numpy as np
from measure import RESULTS, alternate, compare, format_spread, load_average, positive_int, save, show
from tqdm import tqdm

from dali_llava.processing.corpora import load_corpus
from dali_llava.processing.shards import ClipSettings, prepare_shards


TITLE = "Clips per second on one core (min / median / max)"
COLUMNS = ["method", "seconds", "clips per second", "times faster"]
SECONDS, SIZE, FRAME_RATE, SAMPLING_RATE = 10, (640, 360), 25, 44100

# Baseline if ffmpeg is not installed. Arguments: clip, output folder and shorter side of the frames.
PYAV_LOOP = """
import sys
import av, numpy, soundfile
if len(sys.argv) > 1:
    path, folder, side = sys.argv[1], sys.argv[2], int(sys.argv[3])
    with av.open(path) as container:
        resampler, chunks, second = av.AudioResampler("s16", "mono", 16000), [], 0
        for frame in container.decode(video=0, audio=0):
            if isinstance(frame, av.AudioFrame):
                chunks += [part.to_ndarray()[0] for part in resampler.resample(frame)]
            elif second < 10 and frame.time >= second:
                scale = min(1, side / min(frame.width, frame.height))
                image = frame.to_image(width=round(scale * frame.width), height=round(scale * frame.height))
                image.save(f"{folder}/{second}.jpg", quality=90)
                second += 1
        chunks += [part.to_ndarray()[0] for part in resampler.resample(None)]
    soundfile.write(f"{folder}/sound.flac", numpy.concatenate(chunks), 16000)
"""


def make_clips(folder: Path, count: int) -> None:
    """Write `count` videos with a moving gradient and noise to `folder`."""
    rows, columns = np.mgrid[: SIZE[1], : SIZE[0]]
    for number in tqdm(range(count), desc="making clips", leave=False):
        generator = np.random.default_rng(number)
        with av.open(str(folder / f"{number}.mp4"), "w") as output:
            video = output.add_stream("libx264", rate=FRAME_RATE, options={"preset": "veryfast"})
            video.width, video.height, video.pix_fmt = *SIZE, "yuv420p"
            audio = output.add_stream("aac", rate=SAMPLING_RATE, layout="mono")
            for index in range(SECONDS * FRAME_RATE):
                colours = np.stack([rows + 3 * index, columns - 2 * index, rows + columns + index], axis=2) % 256
                colours[::4, ::4] += generator.integers(0, 32, colours[::4, ::4].shape)
                frame = av.VideoFrame.from_ndarray(np.clip(colours, 0, 255).astype(np.uint8), format="rgb24")
                output.mux(video.encode(frame))
            output.mux(video.encode())
            samples = generator.uniform(-0.3, 0.3, (1, SECONDS * SAMPLING_RATE)).astype(np.float32)
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            frame.sample_rate, frame.time_base, frame.pts = SAMPLING_RATE, Fraction(1, SAMPLING_RATE), 0
            output.mux(audio.encode(frame))
            output.mux(audio.encode())


def run_ours(rows: datasets.Dataset, side: int) -> None:
    """Run `prepare` with one worker, including its shards and index."""
    with tempfile.TemporaryDirectory() as folder:
        settings = ClipSettings(frame_size=side, keep_frozen=True, keep_silent=True)
        summary = prepare_shards(rows, folder, settings, clips_per_shard=len(rows), num_proc=1)
    if summary.clips < len(rows):
        raise ValueError(
            f"only {summary.clips} of {len(rows)} clips can be prepared; give --media a folder of valid clips"
        )


def run_ffmpeg(paths: list[str], side: int) -> None:
    """Run ffmpeg once per clip."""
    scale = f"fps=1:round=up,scale='if(lt(iw,ih),min(iw,{side}),-2)':'if(lt(iw,ih),-2,min(ih,{side}))'"
    with tempfile.TemporaryDirectory() as folder:
        for path in paths:
            command = ["ffmpeg", "-nostdin", "-loglevel", "error", "-y", "-i", path]
            command += ["-vn", "-ac", "1", "-ar", "16000", f"{folder}/sound.flac"]
            command += ["-an", "-vf", scale, "-frames:v", "10", "-q:v", "3", f"{folder}/%d.jpg"]
            subprocess.run(command, check=True)


def run_pyav(paths: list[str], side: int) -> None:
    """Run the PyAV loop in a new process per clip."""
    with tempfile.TemporaryDirectory() as folder:
        for path in paths:
            subprocess.run([sys.executable, "-c", PYAV_LOOP, path, folder, str(side)], check=True)


def run_nothing(count: int) -> None:
    """Start the processes of `run_pyav` without any work."""
    for _ in range(count):
        subprocess.run([sys.executable, "-c", PYAV_LOOP], check=True)


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--media", type=Path, metavar="DIR", help="folder of clips (default: generated clips)")
    parser.add_argument("--clips", type=positive_int, default=24, help="number of clips to generate (default: 24)")
    parser.add_argument(
        "--frame-size", type=positive_int, default=336, help="shorter side of the frames (default: 336)"
    )
    parser.add_argument("--repeats", type=positive_int, default=5, help="timed rounds (default: 5)")
    parser.add_argument("--output", type=Path, default=RESULTS / "prepare.json", help="output file")
    return parser.parse_args(words)


def measure(media: Path, arguments: argparse.Namespace) -> dict:
    """Seconds and ratios of each method, over all clips of a folder."""
    rows = load_corpus("folder", "train", data_dir=str(media))
    paths = [row["audio"]["path"] for row in rows]
    has_ffmpeg = shutil.which("ffmpeg") is not None
    baseline = "ffmpeg, one call per clip" if has_ffmpeg else "PyAV, one process per clip"
    works = {baseline: partial(run_ffmpeg if has_ffmpeg else run_pyav, paths, arguments.frame_size)}
    if not has_ffmpeg:
        works["(processes only)"] = partial(run_nothing, len(paths))
    works["prepare"] = partial(run_ours, rows, arguments.frame_size)
    with tqdm(total=len(works) * (arguments.repeats + 1), desc="cutting", leave=False) as bar:
        figures = compare(alternate(works, arguments.repeats, tick=bar.update), baseline)
    for own in figures.values():
        own["clips_a_second"] = {
            name: len(paths) / own["seconds"][other]
            for name, other in (("min", "max"), ("median", "median"), ("max", "min"))
        }
    tools = {"pyav": av.__version__, "pyav_libavcodec": ".".join(map(str, av.library_versions["libavcodec"]))}
    if has_ffmpeg:
        told = subprocess.run(["ffmpeg", "-version"], check=True, capture_output=True, text=True).stdout
        tools["ffmpeg"] = told.split()[2]  # "ffmpeg version 7.1 Copyright ..."
    return {"clips": len(paths), "baseline": baseline, "tools": tools, "figures": figures}


def main() -> None:
    arguments, load_before = parse_arguments(), load_average()
    if hasattr(os, "sched_setaffinity"):  # inherited by all child processes and FFmpeg's threads
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as folder:
        if arguments.media is None:
            make_clips(Path(folder), arguments.clips)
        case = measure(arguments.media or Path(folder), arguments)
    settings = {name: getattr(arguments, name) for name in ("clips", "frame_size", "repeats")}
    settings["media"] = "made" if arguments.media is None else arguments.media.name
    path = save(arguments.output, "prepare", settings, [case], [], load_before)
    rows = [
        [name, *(format_spread(own[column]) for column in ("seconds", "clips_a_second", "times_faster"))]
        for name, own in case["figures"].items()
    ]
    show(TITLE, COLUMNS, rows, [])
    print(f"Written to {path}")


if __name__ == "__main__":
    main()
