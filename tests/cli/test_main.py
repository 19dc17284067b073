"""The command line as a whole: commands, exit codes, errors in one line."""

import subprocess
import sys
import types

import pytest

from dali_llava import __version__
from dali_llava.cli import COMMANDS, build_parser, describe_error, main


@pytest.fixture
def command(monkeypatch):
    """Register a command `fake` that runs the given function."""

    def register(run):
        module = types.ModuleType("dali_llava.cli.fake", "Do nothing.\n\nexample:\n  dali-llava fake")
        module.add_arguments = lambda parser: parser.add_argument("--count", type=int, default=1)
        module.run = run
        monkeypatch.setitem(sys.modules, "dali_llava.cli.fake", module)
        monkeypatch.setitem(COMMANDS, "fake", "do nothing")

    return register


def exit_code(argv: list[str]) -> int:
    with pytest.raises(SystemExit) as exit_info:
        main(argv)
    return exit_info.value.code


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_help_with_an_example(name, capsys):
    assert exit_code([name, "--help"]) == 0
    assert f"dali-llava {name} " in capsys.readouterr().out.split("example", 1)[1]


def test_the_help_lists_every_command(capsys):
    assert exit_code(["--help"]) == 0
    shown = capsys.readouterr().out
    for name, line in COMMANDS.items():
        assert name in shown and line in shown


def test_the_version(capsys):
    assert exit_code(["--version"]) == 0
    assert capsys.readouterr().out == f"dali-llava {__version__}\n"


@pytest.mark.parametrize(
    "argv", [[], ["unknown"], ["fake", "extra"], ["fake", "--count", "many"], ["--count", "1", "fake"]]
)
def test_wrong_usage_exits_with_2(argv, command, capsys):
    command(lambda args: 0)
    assert exit_code(argv) == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize("code", [0, 1])
def test_the_command_decides_the_exit_code(code, command):
    command(lambda args: code if args.count == 3 else 7)
    assert main(["fake", "--count", "3"]) == code


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("a.wav: too\nshort"), "a.wav: too short"),
        (FileNotFoundError(2, "No such file or directory", "a.wav"), "[Errno 2] No such file or directory: 'a.wav'"),
        (KeyError("frames"), "KeyError: 'frames' (use --debug for the traceback)"),
        (ImportError('needs x; run pip install "dali-llava[x]"'), 'needs x; run pip install "dali-llava[x]"'),
        (ImportError("no y"), "ImportError: no y (use --debug for the traceback)"),
        (RuntimeError(), "RuntimeError: no message (use --debug for the traceback)"),
    ],
)
def test_an_error_is_one_line_on_stderr(error, line, command, capsys):
    def fail(args):
        raise error

    command(fail)
    assert main(["fake"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"dali-llava: error: {line}\n"
    assert describe_error(error) == line


@pytest.mark.parametrize("argv", [["--debug", "fake"], ["fake", "--debug"]])
def test_debug_lets_the_error_through(argv, command):
    def fail(args):
        raise ValueError("told in full")

    command(fail)
    with pytest.raises(ValueError, match="told in full"):
        main(argv)


def test_an_interrupt_exits_with_130(command, capsys):
    def interrupt(args):
        raise KeyboardInterrupt

    command(interrupt)
    assert main(["fake"]) == 130
    assert capsys.readouterr().err == "dali-llava: interrupted\n"


def test_a_reader_that_goes_away_is_no_error():
    code = (
        "import sys, types\n"
        "import dali_llava.cli as cli\n"
        "module = types.ModuleType('dali_llava.cli.fake')\n"
        "module.add_arguments = lambda parser: None\n"
        "module.run = lambda args: print('line\\n' * 100_000) or 0\n"
        "sys.modules['dali_llava.cli.fake'] = module\n"
        "cli.COMMANDS['fake'] = 'print'\n"
        "sys.exit(cli.main(['fake']))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 1


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "dali_llava", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"dali-llava {__version__}\n")


def test_a_parser_is_filled_once(command):
    command(lambda args: 0)
    parser = build_parser()
    assert parser.parse_args(["fake"]).count == 1
    assert parser.parse_args(["fake", "--count", "2"]).count == 2
