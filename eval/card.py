"""Model cards, filled from what the files of a model record: stages, training state, sources and results."""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers.trainer_utils import sort_checkpoints

from dali_llava.atomic import write_text
from dali_llava.modeling.stage_checkpoint import Stage, stage_chain

from .results import Results, Row, load_results, markdown_table, reason_lines, rows_table


TEMPLATE = Path(__file__).with_name("card.md.jinja")
MARKER = "<!-- Written by `dali-llava card`"
TASK = "audio-captioning"
RECIPE_SUFFIXES = (".yaml", ".yml")
# Name of a stage in `stage.json`, before a colon -> its name in a results file.
STAGE_NAMES = {"prefix": "prefix", "align": "aligned", "distill": "distilled", "sft": "supervised"}
STAGE_NAMES |= {"lavcap": "supervised"}
# Arguments in `checkpoint.json` that the card shows.
ARGUMENTS = (
    *("dataset", "split", "max_samples", "modalities", "objective", "ot_weight", "train_parts", "lora"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", "seed"),
)


@dataclass
class Training:
    """
    One stage of a model, or one configuration of a recipe.

    Attributes:
        name: name of the stage, such as `align:mmd`, or the name of the configuration.
        base: name of the base model.
        parts: the parts that the stage trained.
        facts: what the training state records, by name.
        config: text of the configuration of a recipe.
    """

    name: str
    base: str = ""
    parts: list[str] = field(default_factory=list)
    facts: dict[str, object] = field(default_factory=dict)
    config: str = ""


def model_card(
    model: str | os.PathLike, results: Sequence[str | os.PathLike] = (), name: str | None = None
) -> ModelCard:
    """
    The card of a model.

    Args:
        model: folder of a stage or of a complete checkpoint.
        results: files of `quickstart` or `evaluate`. Of each, the card has the rows of this model.
        name: name of the model; by default that of its folder.

    Returns:
        the `huggingface_hub.ModelCard`.

    Raises:
        FileNotFoundError: the folder, its config.json, the base of a stage or a results file does not exist.
        ValueError: config.json, stage.json, a training state or a results file is damaged or of another format, or
            has no row of this model.
    """
    folder = Path(model)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; give the folder of a model")
    sources = _read_json(folder / "config.json").get("sources") or []
    chain = stage_chain(folder)
    read = [load_results(path) for path in results]
    rows = [model_rows(one, folder, chain, path) for one, path in zip(read, results, strict=True)]
    name = name or folder.resolve().name
    training = [_trained(stage) for stage in reversed(chain)]
    return _render(name, training, sources, list(zip(read, rows, strict=True)), recipe=False)


def recipe_card(configs: Sequence[str | os.PathLike], name: str) -> ModelCard:
    """
    The card of a recipe, which has no weights.

    Args:
        configs: the YAML configurations of its stages, in their order.
        name: name of the recipe.

    Returns:
        the `huggingface_hub.ModelCard`.

    Raises:
        FileNotFoundError: a configuration does not exist.
        ValueError: a configuration is not a YAML mapping.
    """
    training = []
    for path in map(Path, configs):
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such configuration")
        text = path.read_text(encoding="utf-8")
        try:
            values = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"{path}: not YAML ({error})") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path}: not a configuration; expected `field: value` lines")
        training.append(Training(path.stem, facts=values, config=text.strip()))
    return _render(name, training, [], [], recipe=True)


def model_rows(results: Results, folder: Path, chain: Sequence[Stage], path: str | os.PathLike) -> list[Row]:
    """
    The rows of a model in a results file.

    These are the rows with the name of its folder, as `evaluate` names them, or else those with the objective and the
    stage of its `stage.json`. The rows of a single system are taken as those of a complete checkpoint.

    Args:
        results: content of the file.
        folder: folder of the model.
        chain: its stages, the last one first.
        path: the file, for the error.

    Raises:
        ValueError: the file has no row of this model.
    """
    rows = [row for row in results.rows if row.method == folder.resolve().name]
    if not rows and chain:
        last = chain[0].name.partition(":")[0]
        method = next((stage.name.partition(":")[2] for stage in chain if ":" in stage.name), last)
        rows = [row for row in results.rows if row.stage == STAGE_NAMES.get(last)]
        rows = [row for row in rows if row.method == method or row.stage == "prefix"]
    elif not rows and len({(row.method, row.stage) for row in results.rows}) == 1:
        rows = results.rows
    if not rows:
        systems = dict.fromkeys(f"{row.method} {row.stage}" for row in results.rows)
        remedy = "give the results of this model" if chain else "give the folder of the stage, such as mmd-distilled"
        raise ValueError(f"{path}: no row of {folder}, only {', '.join(systems) or 'an empty table'}; {remedy}")
    return rows


def write_card(card: ModelCard, path: str | os.PathLike, force: bool = False) -> None:
    """
    Write a card. A card that `dali-llava card` wrote is replaced.

    Raises:
        FileExistsError: the file was written by hand and `force` is not set.
        IsADirectoryError: `path` is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder; give --out a file name")
    if path.is_file() and not force and MARKER not in path.read_text(encoding="utf-8", errors="replace"):
        raise FileExistsError(f"{path}: not written by this command; choose another --out, or replace it with --force")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, card.content.rstrip() + "\n")


def _render(
    name: str,
    training: list[Training],
    sources: list[dict],
    results: list[tuple[Results, list[Row]]],
    recipe: bool,
) -> ModelCard:
    named = (part.facts.get("dataset") for part in training)
    corpora = list(dict.fromkeys(name for name in named if name not in (None, "shards")))
    licenses = sorted({source["license"] for source in sources if source.get("license")})
    data = ModelCardData(
        language="en",
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["audio-captioning", "llava_audio", "dali-llava"],
        model_name=name,
        license=None if not licenses else licenses[0] if len(licenses) == 1 else "other",
        license_name="-and-".join(licenses) if len(licenses) > 1 else None,
        base_model=[source["name"] for source in sources if "revision" in source] or None,
        datasets=corpora or None,
        eval_results=[entry for result, rows in results for entry in eval_results(result.dataset, rows)] or None,
    )
    columns = ("kind", "name", "revision", "license", "license_from")
    cells = [[str(source.get(column, "-")) for column in columns] for source in sources]
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        marker=MARKER,
        name=name,
        recipe=recipe,
        training=training,
        corpora=corpora,
        evaluated=[
            {"results": result, "table": "\n".join(rows_table(rows)), "reasons": "\n".join(reason_lines(rows))}
            for result, rows in results
        ],
        parts="\n".join(markdown_table(["part", *columns[1:-1], "read from"], cells)) if cells else "",
    )


def eval_results(dataset: str, rows: Iterable[Row]) -> list[EvalResult]:
    """The metrics of rows as entries of the model index. The modality is the configuration of the data set."""
    return [
        EvalResult(
            task_type=TASK,
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_config=row.modality,
            dataset_split=row.split,
            dataset_args={"clips": row.n},
            metric_type=metric,
            metric_value=value,
        )
        for row in rows
        for metric, value in row.metrics.items()
        if value is not None
    ]


def _trained(stage: Stage) -> Training:
    """What the folder of a stage records of its training."""
    folder = Path(stage.source) / stage.hub_kwargs.get("subfolder", "")
    base = Path(stage.base).name if Path(stage.base).is_dir() else stage.base
    parts = dict.fromkeys(name.removeprefix("model.").split(".")[0] for name in stage.trained or ())
    facts = {}
    if folder.is_dir() and (checkpoints := sort_checkpoints(str(folder))):
        newest = Path(checkpoints[-1])
        manifest, state = _read_json(newest / "checkpoint.json"), _read_json(newest / "trainer_state.json")
        arguments = manifest.get("arguments") or {}
        facts = {name: arguments[name] for name in ARGUMENTS if arguments.get(name) not in (None, "", [], {})}
        facts |= {"processes": manifest.get("processes"), "engine": manifest.get("engine")}
        facts |= {"steps": state.get("global_step"), "epochs": state.get("epoch")}
        for entry in state.get("log_history", ()):
            facts |= {f"{name} (last)": entry[name] for name in ("loss", "clips_per_second") if name in entry}
            facts |= {"seconds": entry["train_runtime"]} if "train_runtime" in entry else {}
        facts = {name: value for name, value in facts.items() if value is not None}
    return Training(stage.name, base, list(parts), facts)


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give the folder of a model, copied whole")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); copy or save the model again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object; copy or save the model again")
    return content
