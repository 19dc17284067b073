"""Arguments, checks and loading of a model, shared by the commands that run one."""

import argparse
from pathlib import Path


DTYPES = ("auto", "float32", "float16", "bfloat16")
# Below this size, weights load too fast for the progress bar of transformers to be useful.
QUIET_BYTES = 500_000_000


def positive_int(text: str) -> int:
    """Parse an integer of at least 1, as an argparse type."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for the model, its generation and its device."""
    parser.add_argument("model", metavar="MODEL", help="model folder, or its ORG/NAME on the Hub")
    group = parser.add_argument_group("generation")
    group.add_argument(
        "--max-new-tokens",
        type=positive_int,
        default=64,
        metavar="N",
        help="maximum length of a caption; default: %(default)s",
    )
    group.add_argument(
        "--num-beams",
        type=positive_int,
        metavar="N",
        help="number of beams; default: that of the model's generation configuration, or 1, greedy decoding",
    )
    group.add_argument(
        "--batch-size", type=positive_int, default=8, metavar="N", help="samples per batch; default: %(default)s"
    )
    group.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, mps, ...; default: the GPU, if available")
    group.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="dtype of the weights; default: auto, the saved dtype"
    )


def check_model(name: str) -> None:
    """
    Check that `name` is a folder or may be the id of a model on the Hub, without importing torch.

    Raises:
        FileNotFoundError: if the folder does not exist or is a file.
    """
    folder = Path(name)
    if not folder.is_dir() and not (_may_be_hub_id(name) and not folder.exists()):
        problem = "is a file, not a model folder" if folder.exists() else "no such model folder"
        raise FileNotFoundError(f"{name}: {problem}; `make quickstart` writes one to runs/quickstart/model")


def load_captioner(name: str, device: str | None = None, dtype: str = "auto"):
    """
    Load a model in evaluation mode on its device, and its processor.

    Args:
        name: model folder or Hub id.
        device: torch device; None for the GPU, if available.
        dtype: one of `DTYPES`.

    Returns:
        (`LlavaAudioForConditionalGeneration`, `LlavaAudioProcessor`)

    Raises:
        OSError, ValueError: as in `dali_llava.eval.captioner.load_captioner`, or if torch cannot use the device.
    """
    check_model(name)

    from transformers import logging

    from dali_llava.eval.captioner import load_captioner

    target = _device(device)
    if sum(file.stat().st_size for file in Path(name).glob("*.safetensors")) < QUIET_BYTES:
        logging.disable_progress_bar()
    return load_captioner(name, device=target, dtype=dtype)


def _may_be_hub_id(name: str) -> bool:
    owner, _, rest = name.partition("/")
    return bool(owner and rest) and "/" not in rest and owner[0] not in ".~" and not Path(owner).exists()


def _device(name: str | None):
    import torch

    if name is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except Exception as error:  # RuntimeError, AssertionError or NotImplementedError, depending on the backend
        raise ValueError(f"--device {name}: torch cannot use it here; --device cpu always works") from error
    return device
