"""README and docs: their Python and their commands run, and the files they name exist.

A block that cannot run in a test follows the line `<!-- skip: REASON -->`. Its commands are still parsed.
"""

import contextlib
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import pytest

from dali_llava.cli import build_parser, main
from dali_llava.eval.results import Results, Row, write_results
from dali_llava.train.arguments import StageArguments


ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
FENCE = re.compile(r"^(?:<!-- skip: (?P<reason>.+?) -->\n+)?```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)

# Changes to the commands of the documentation. Everything else runs as written.
#
# Outputs of `make quickstart`, and the output of another command of the documentation that replaces each.
WRITTEN_BY_QUICKSTART = {"runs/quickstart/prefix": "runs/prefix"}
# Placeholders in the commands, and their values.
PLACEHOLDERS = {"MODEL": "runs/quickstart/model"}
# Options appended for speed, by command or script: two steps, four clips, a captioner of two layers.
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES = json.dumps({"sizes": {"captioner": 8, "shots": 4, "train": 4, "balanced": 4}})
TWO_STEPS = (
    "--max_steps 2 --per_device_train_batch_size 2 --dataloader_num_workers 0 --disable_tqdm true --use_cpu true"
)
SPEED = {
    "pretrain_captioner.py": [
        *TWO_STEPS.split(),
        *(
            "--vision_config",
            json.dumps({"model_type": "clip_vision_model", "image_size": 48, "patch_size": 8, **TINY}),
        ),
        *("--text_config", json.dumps({"model_type": "llama", "max_position_embeddings": 512, **TINY})),
        *("--audio_config", json.dumps({"output_size": 32, "num_mel_bins": 64, "max_length": 256, **TINY})),
        *("--vision_steps", "2", "--vision_batch_size", "4"),
    ],
    "prefix_tune.py": [*TWO_STEPS.split(), "--max_samples", "2"],
    "pretrain_tower.py": [*TWO_STEPS.split(), "--examples", "4"],
    "align.py": TWO_STEPS.split(),
    "sft.py": TWO_STEPS.split(),
    "lavcap.py": TWO_STEPS.split(),
    "distill.py": [*TWO_STEPS.split(), "--caption_max_new_tokens", "6"],
    "prefilter.py": "--captioner runs/captioner --embedder runs/captioner --use_cpu true --keep 2".split(),
    "evaluate": ["--max-new-tokens", "6"],
    "prepare": ["--num-proc", "1"],
}
SLOW = ("figures",)  # commands of `dali-llava` that take more than 20 seconds nevertheless


@dataclass
class Block:
    language: str
    code: str
    line: int
    skip: str | None


def blocks(page: Path, *languages: str) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = [
        Block(match["language"], match["code"], text.count("\n", 0, match.start("code")) + 1, match["reason"])
        for match in FENCE.finditer(text)
    ]
    return [block for block in found if block.language in languages]


@cache
def shell_lines() -> list[tuple[Path, tuple[str, ...], str | None]]:
    """Returns the page, the words and, if the line is not run, the reason of every shell line in the pages."""
    found = []
    for page in PAGES:
        for block in blocks(page, "bash", "sh", "console"):
            for line in block.code.replace("\\\n", " ").splitlines():
                if words := shlex.split(line, comments=True):
                    found.append((page, tuple(words), block.skip))
    return found


def commands(*programs: str) -> list:
    """Returns every shell line that starts with one of `programs` as a test parameter."""
    found = []
    for program in programs:
        start = tuple(program.split())
        lines = [(page, words) for page, words, _ in shell_lines() if words[: len(start)] == start]
        assert lines, f"no page shows {program}"
        found += [pytest.param(list(words), id=f"{page.name}:{' '.join(words)[:60]}") for page, words in lines]
    return found


def is_stage(words: tuple[str, ...]) -> bool:
    return words[:2] == ("accelerate", "launch") or words[0] == "python"


def runnable() -> list:
    """Returns a test parameter for each distinct `dali-llava` or stage command, skipped if the page says so."""
    parameters = {}
    for page, words, skip in shell_lines():
        if words[0] == "dali-llava" or is_stage(words):
            marks = [] if skip is None else [pytest.mark.skip(reason=f"{page.name}: {skip}")]
            marks += [pytest.mark.slow] if words[1] in SLOW else []
            parameters.setdefault(words, pytest.param(words, id=f"{page.name}:{' '.join(words)[:60]}", marks=marks))
    return list(parameters.values())


def python_pages() -> list:
    """Returns a test parameter for the Python code of each page, and a skipped one for each skipped block."""
    parameters = []
    for page in PAGES:
        found = blocks(page, "python")
        if any(block.skip is None for block in found):
            parameters.append(pytest.param(page, id=page.name))
        for block in found:
            if block.skip is not None:
                mark = pytest.mark.skip(reason=f"{page.name}, line {block.line}: {block.skip}")
                parameters.append(pytest.param(page, id=f"{page.name}:{block.line}", marks=mark))
    return parameters


def run_python(page: Path) -> None:
    """Runs the Python blocks of a page in order."""
    namespace = {}
    for block in blocks(page, "python"):
        if block.skip is None:
            # The leading line breaks give tracebacks the line numbers of the page.
            exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), namespace)


def output_of(words: tuple[str, ...]) -> str | None:
    """Returns the file or folder that a command writes."""
    if words[:2] == ("dali-llava", "merge"):
        return words[3]
    for option in ("--out", "--output_dir"):
        if option in words:
            return words[words.index(option) + 1]
    return None


class Reader:
    """Runs each command of the documentation in its own folder, with the outputs of the commands it depends on."""

    def __init__(self, corpora_folder: Path, make_folder):
        self.corpora_folder = corpora_folder
        self.make_folder = make_folder
        self.folders: dict[tuple[str, ...], Path] = {}

    def run(self, words: tuple[str, ...]) -> Path:
        """Runs a command once and returns its folder. Commands of the pages first create its inputs."""
        if words in self.folders:
            return self.folders[words]
        folder = self.make_folder("command", numbered=True)
        shutil.copytree(self.corpora_folder, folder, symlinks=True, dirs_exist_ok=True)
        words_run = [PLACEHOLDERS.get(word, word) for word in words]
        words_run += self.speed(words)
        written = output_of(words)
        for path in dict.fromkeys(re.findall(r"\b(?:runs|shards)/[\w./-]*[\w-]", " ".join(words_run))):
            if path == written or (folder / path).exists():
                continue
            if seed := re.fullmatch(r"runs/seed(\d)", path):
                self.finish_run(folder, path, int(seed[1]))
            else:
                self.supply(folder, path, words)
        with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
            if words[1] in ("evaluate", "score"):
                patch.setenv("PATH", "")  # without Java, whose metrics take ten seconds to start
            start(words_run)
        self.folders[words] = folder
        return folder

    def supply(self, folder: Path, path: str, words: tuple[str, ...]) -> None:
        """Links the outputs of a command that writes `path` into `folder`, preferably one on the same page."""
        source = WRITTEN_BY_QUICKSTART.get(path, path)
        providers = [(page, other) for page, other, skip in shell_lines() if output_of(other) == source and not skip]
        assert providers, f"no command of the documentation writes {path}, which {' '.join(words)} reads"
        own = [other for page, other in providers if (page, words) in {line[:2] for line in shell_lines()}]
        made = self.run((own or [other for _, other in providers])[0])
        for parent in ("runs", "shards"):
            for entry in (made / parent).glob("*"):
                target = folder / parent / entry.name
                target.parent.mkdir(exist_ok=True)
                if not target.exists():
                    target.symlink_to(entry.resolve())
        if source != path:
            (folder / path).symlink_to((made / source).resolve())

    def finish_run(self, folder: Path, path: str, seed: int) -> None:
        """Creates a folder as the quickstart does, with two of its checkpoints and one row of results."""
        for source, name in (("runs/prefix", "prefix"), ("runs/mmd", "mmd-aligned")):
            if not (folder / source).exists():
                self.supply(folder, source, ())
            (folder / path).mkdir(exist_ok=True)
            (folder / path / name).symlink_to((folder / source).resolve())
        row = Row("mmd", "aligned", "audio", "test", seed, 400, {"cider_d": 1.0 + seed})
        write_results(Results("avworld", 60.0, {}, [row]), folder / path)

    def speed(self, words: tuple[str, ...]) -> list[str]:
        """Returns the options that are appended to a command."""
        name = Path(next(word for word in words if word.endswith(".py"))).name if is_stage(words) else words[1]
        options = list(SPEED.get(name, []))
        if is_stage(words) and "--dataset" not in words:
            options += ["--dataset_options", SIZES]
        if name == "evaluate" and "avworld" in words:
            options += ["--sizes", json.dumps({"test": 4})]
        return options


def start(words: list[str]) -> None:
    """Runs a command in this process, as its entry point does."""
    if words[0] == "dali-llava":
        assert main(words[1:]) == 0
        return
    index = next(index for index, word in enumerate(words) if word.endswith(".py"))
    stage_module(words[index]).main(words[index + 1 :])


def stage_module(script: str):
    return importlib.import_module("dali_llava." + script.removesuffix(".py").replace("/", "."))


@pytest.fixture(scope="module")
def reader(corpora_folder, tmp_path_factory) -> Reader:
    with contextlib.chdir(corpora_folder):
        run_python(ROOT / "docs" / "finetune.md")  # writes the clips that its commands train on
    return Reader(corpora_folder, tmp_path_factory.mktemp)


@pytest.fixture
def reader_folder(media_folder, tmp_path, monkeypatch) -> Path:
    """Working folder of the Python examples."""
    shutil.copytree(media_folder, tmp_path, symlinks=True, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", python_pages())
def test_the_python_of_a_page_runs(page, reader_folder):
    run_python(page)


@pytest.mark.parametrize("words", runnable())
def test_a_command_that_is_shown_runs(words, reader):
    folder = reader.run(words)
    if written := output_of(words):
        assert (folder / written).is_file() or any((folder / written).iterdir())


@pytest.mark.parametrize("prefixed", [["audio", "audiovisual"], ["audiovisual"]], ids=["aligned", "distilled"])
def test_the_python_examples_give_the_captions_of_the_command(reader_folder, prefixed, capsys):
    """Also for a checkpoint that captions audio without prefix, as distilled ones do."""
    model = reader_folder / "runs" / "quickstart" / "model"
    weights = model.resolve()
    model.unlink()
    shutil.copytree(weights, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"prefix_modalities": prefixed}))
    assert main(["caption", "runs/quickstart/model", "bark.wav", "clip.mp4", "long.flac", "--device", "cpu"]) == 0
    expected = dict(line.split("\t") for line in capsys.readouterr().out.splitlines())
    assert len(set(expected.values())) == 3
    run_python(ROOT / "README.md")
    assert capsys.readouterr().out.splitlines() == [expected["bark.wav"]]
    run_python(ROOT / "docs" / "captioning.md")
    one, *many = capsys.readouterr().out.splitlines()
    assert one == expected["clip.mp4"]
    runner, bad, pipeline = many[:2], many[2].split("\t"), many[3:]
    assert runner == [f"{name}\t{expected[name]}\tNone" for name in ("bark.wav", "long.flac")]
    assert bad[:2] == ["no such file.wav", "None"] and "no such file" in bad[2]
    assert pipeline == [expected[name] for name in ("bark.wav", "long.flac")]


@pytest.mark.slow
def test_the_readmes_training_runs_in_a_shell(corpora_folder, reader, tmp_path):
    """Runs the four lines in order through `accelerate launch`."""
    shutil.copytree(corpora_folder, tmp_path, symlinks=True, dirs_exist_ok=True)
    (block,) = (block for block in blocks(ROOT / "README.md", "bash") if "accelerate" in block.code)
    lines = [tuple(shlex.split(line)) for line in block.code.splitlines()]
    script = "\n".join(shlex.join([*words, *reader.speed(words)]) for words in lines)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-e", "-c", script], cwd=tmp_path, env=os.environ | {"PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / output_of(words) / "config.json").is_file() for words in lines] == [True] * 4


@pytest.mark.parametrize("words", commands("dali-llava"))
def test_a_command_that_is_shown_parses(words):
    build_parser().parse_args(words[1:])


@pytest.mark.parametrize("words", commands("make"))
def test_a_make_target_that_is_shown_exists(words):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert {word for word in words[1:] if "=" not in word} <= set(targets)


@pytest.mark.parametrize("words", commands("accelerate launch", "python train/prefilter.py"))
def test_a_stage_that_is_shown_has_its_script_configuration_and_options(words):
    start = next(index for index, word in enumerate(words) if word.endswith(".py"))  # accelerate's own options before
    script, config, *options = words[start:]
    assert (ROOT / script).is_file()
    assert (ROOT / config).is_file()
    # The arguments of sft.py are in a module that needs TRL, beside their base class.
    module = stage_module("train/trainers/supervised.py" if script == "train/sft.py" else script)
    found = [each for each in vars(module).values() if isinstance(each, type) and issubclass(each, StageArguments)]
    arguments = max(found, key=lambda each: len(each.__mro__))
    assert arguments is not StageArguments
    known = {field.name for field in fields(arguments)}
    assert {option.removeprefix("--") for option in options if option.startswith("--")} <= known


def test_every_file_that_the_docs_name_is_there():
    missing = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            if not (page.parent / link).exists():
                missing.append(f"{page.name}: {link}")
        for name in re.findall(r"`((?:modeling|processing|train|eval|dali_llava|docs|tests)/[\w./-]*)`", text):
            if not (ROOT / name).exists():
                missing.append(f"{page.name}: {name}")
    assert missing == []


def test_the_readme_opens_with_the_two_commands():
    """Three sentences and the picture of the method come first."""
    first = blocks(ROOT / "README.md", "bash", "sh", "console", "python")[0]
    assert [line.split("#")[0].strip() for line in first.code.splitlines()] == ["make quickstart", "make test"]
    assert first.line <= 20
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.index("![") < text.index("```bash") and "docs/images/method.svg" in text


def test_the_readme_fits_on_three_screens():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    before = text[: text.index("## Limitations")]
    assert before.count("\n") <= 150
    tables = re.findall(r"(?:^\|.*\n)+", before[: before.index("## Repository structure")], re.M)
    (results,) = [table.splitlines() for table in tables]
    assert len(results) - 2 <= 6 and results[0].count("|") - 1 <= 5


def test_the_readmes_results_are_those_of_the_results_page():
    """Each figure of the README's table equals that of its system on `test` in docs/results.md."""
    names = {"untrained audio tower": "untrained", "MMD": "mmd", "OT": "ot", "OT with attention": "ot_att"}
    columns = (("cider_d", "audio"), ("sound_recall", "audio"), ("cider_d", "audiovisual"), ("cider_d", "audio"))
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    header, *rows = [cells(line) for line in page[page.index("\n## test\n") :].split("\n\n")[1].splitlines()]
    table = {tuple(row[:3]): dict(zip(header, row, strict=True)) for row in rows[1:]}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = [cells(line) for line in re.findall(r"^\|.*±.*$", readme, re.M)]
    assert len(shown) >= 5
    for name, *figures in shown:
        method = names.get(name, name)
        stages = ["prefix" if method == "untrained" else "aligned"] * 3 + ["distilled"]
        expected = [
            table[method, stage, modality][metric] if (method, stage, modality) in table else "-"
            for stage, (metric, modality) in zip(stages, columns, strict=True)
        ]
        assert figures == expected


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]
