"""The command line: `dali-llava COMMAND ...`.

Each command is a module of this package with a docstring (its help), `add_arguments(parser)` and `run(args) -> int`,
and `complete_arguments(parser, words)` if further arguments depend on the words given. The module of a command is
imported only when the command is used, and imports torch only in `run`, so that `--help` is fast.

Results are printed to stdout, progress and errors to stderr. Exit codes: 0 success, 1 error (reported in one line),
2 invalid usage, 130 interrupted.
"""

import argparse
import importlib
import os
import sys
import warnings

from dali_llava import __version__


# Help of each command in `dali-llava --help`. The module of a command is dali_llava.cli.<command>, with `_` for `-`.
COMMANDS = {
    "quickstart": "run the whole pipeline on the built-in AVWorld",
    "caption": "caption audio, image and video files",
    "evaluate": "caption a test split and score the captions",
    "score": "score captions against references",
    "compare": "test whether two systems differ on the same clips",
    "prepare": "convert the media of a corpus to shards for training",
    "inspect": "summarise a corpus and write a page of random clips",
    "convert": "convert released weights to a captioner",
    "export-llava": "write the LLaVA in a captioner for transformers",
    "plan": "plan the memory and the time of a stage",
    "ablate": "train and score the ablations of a method on AVWorld",
    "merge": "merge a stage with its base into one complete checkpoint",
    "card": "write a model card from results and training state",
    "figures": "draw the figures of runs and summarise seeds in one table",
}


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line. The arguments of a command are added when the command is parsed."""
    parser = argparse.ArgumentParser(
        prog="dali-llava",
        description="Caption audio with an image captioner that has learned to hear.",
        epilog="example: dali-llava caption runs/quickstart/model clip.mp4",
    )
    parser.add_argument("--version", action="version", version=f"dali-llava {__version__}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors and warnings of libraries")
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, title="commands", parser_class=_CommandParser
    )
    for name, line in COMMANDS.items():
        commands.add_parser(name, help=line)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: arguments without the name of the program; default `sys.argv[1:]`.

    Raises:
        SystemExit: raised by argparse, with code 2 for invalid usage and 0 for `--help` and `--version`.
    """
    args = build_parser().parse_args(argv)
    with warnings.catch_warnings():
        if not args.debug:
            _quieten_libraries()
        try:
            code = _command_module(args.command).run(args)
            sys.stdout.flush()
            return code
        except KeyboardInterrupt:
            print("dali-llava: interrupted", file=sys.stderr)
            return 130
        except BrokenPipeError:
            # The reader of stdout has exited (`| head`). Redirect stdout, because Python flushes it at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except Exception as error:
            if args.debug:
                raise
            print(f"dali-llava: error: {describe_error(error)}", file=sys.stderr)
            return 1


def describe_error(error: Exception) -> str:
    """Describe an error in one line: its message and, for unexpected types of error, its type."""
    message = " ".join(str(error).split()) or "no message"
    expected = isinstance(error, (ValueError, OSError))
    if expected or isinstance(error, ImportError) and "pip install" in message:  # a missing extra
        return message
    return f"{type(error).__name__}: {message} (use --debug for the traceback)"


class _CommandParser(argparse.ArgumentParser):
    """Parser of a command. It imports the module of the command on first use."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)
        self._filled = False

    def parse_known_args(self, args=None, namespace=None):
        if not self._filled:
            self._filled = True
            module = _command_module(self.prog.split()[-1])
            self.description = (module.__doc__ or "").strip()
            self.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
            module.add_arguments(self)
            if hasattr(module, "complete_arguments"):
                module.complete_arguments(self, sys.argv[1:] if args is None else list(args))
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:  # reported here, with the usage of the command
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return namespace, unknown


def _command_module(name: str):
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}")


def _quieten_libraries() -> None:
    warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
