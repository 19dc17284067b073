"""What the commands that run a model share: its arguments, the checks of its folder, and loading it."""

import argparse
import json
from pathlib import Path


MODEL_TYPE = "llava_audio"
DTYPES = ("auto", "float32", "float16", "bfloat16")
# Below this size weights load in the blink of an eye, and transformers' progress bar is noise.
QUIET_BYTES = 500_000_000


def positive_int(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that say which model captions, how, and where it runs."""
    parser.add_argument("model", metavar="MODEL", help="a model folder, or the ORG/NAME of one on the Hub")
    group = parser.add_argument_group("generation")
    group.add_argument("--max-new-tokens", type=positive_int, default=64, metavar="N", help="default: %(default)s")
    group.add_argument("--num-beams", type=positive_int, default=1, metavar="N", help="1, the default, is greedy")
    group.add_argument("--batch-size", type=positive_int, default=8, metavar="N", help="default: %(default)s")
    group.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, mps, ...; default: a GPU where there is one")
    group.add_argument("--dtype", choices=DTYPES, default="auto", help="default: auto, the one it was saved in")


def check_model(name: str) -> None:
    """See that `name` can be a model of ours, by its small files alone.

    A Hub id (`ORG/NAME`, where no folder ORG stands here) is left to the download.

    Raises:
        FileNotFoundError: no such folder, or one without configuration or weights.
        ValueError: a configuration that is unreadable or of another model.
    """
    folder = Path(name)
    if not folder.exists() and _may_be_hub_id(name):
        return
    if not folder.is_dir():
        problem = "is a file, not a model folder" if folder.exists() else "no such model folder"
        raise FileNotFoundError(f"{name}: {problem}; `make quickstart` writes one to runs/quickstart/model")
    config = folder / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{name}: no config.json in it; name the folder that save_pretrained wrote")
    try:
        model_type = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{config}: not a JSON configuration; copy it again from the model's source") from error
    if model_type != MODEL_TYPE:
        raise ValueError(f"{config}: model_type is {model_type!r}, not {MODEL_TYPE!r}; name a model of this package")
    if not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(f"{name}: no weights (*.safetensors) in it; copy the folder again, whole")


def load_captioner(name: str, device: str | None = None, dtype: str = "auto"):
    """The model, in evaluation mode on its device, and its processor.

    Args:
        name: a model folder or Hub id.
        device: as torch names it; None for a GPU where there is one.
        dtype: one of `DTYPES`.

    Returns:
        (`LlavaAudioForConditionalGeneration`, `LlavaAudioProcessor`)

    Raises:
        FileNotFoundError, ValueError: a model that `check_model` rejects, one that cannot be loaded or whose weights
            are not all there, or a device that does not exist.
    """
    check_model(name)

    import torch
    from transformers import logging

    from dali_llava.modeling import LlavaAudioForConditionalGeneration
    from dali_llava.processing import LlavaAudioProcessor

    target = _device(device)
    if sum(file.stat().st_size for file in Path(name).glob("*.safetensors")) < QUIET_BYTES:
        logging.disable_progress_bar()
    dtype = dtype if dtype == "auto" else getattr(torch, dtype)
    try:
        model, report = LlavaAudioForConditionalGeneration.from_pretrained(name, dtype=dtype, output_loading_info=True)
        processor = LlavaAudioProcessor.from_pretrained(_processor_source(name))
    except Exception as error:  # safetensors, tokenizers and the Hub each have exceptions of their own
        message = " ".join(str(error).split())
        raise ValueError(f"{name}: cannot be loaded ({message}); copy or save the model again") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(
            f"{name}: {len(missing)} weights are missing, the first is {missing[0]}; copy or save the model again"
        )
    return model.to(target).eval(), processor


def _may_be_hub_id(name: str) -> bool:
    owner, _, rest = name.partition("/")
    return bool(owner and rest) and "/" not in rest and owner[0] not in ".~" and not Path(owner).exists()


def _processor_source(name: str) -> str:
    """A stage's checkpoint may leave the processor to its base model."""
    stage = Path(name) / "stage.json"
    if stage.is_file() and not (Path(name) / "processor_config.json").is_file():
        base = json.loads(stage.read_text(encoding="utf-8"))["base_model_name_or_path"]
        return str(Path(name) / base) if (Path(name) / base).is_dir() else base
    return name


def _device(name: str | None):
    import torch

    if name is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except Exception as error:  # RuntimeError, AssertionError or NotImplementedError, by the backend
        raise ValueError(f"--device {name}: torch cannot use it here; --device cpu always works") from error
    return device
