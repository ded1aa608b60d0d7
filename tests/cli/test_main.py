"""The group: help without torch, nearest names, and one place where errors end."""

import json
import os
import signal
import subprocess
import sys
import types
import warnings

import click
import pytest
import torch
from pydantic import BaseModel

import reverie as package
from reverie.base import errors
from reverie.cli import main as module
from reverie.cli.main import COMMANDS, cli
from reverie.cli.options import Command

WITHOUT = """
import sys
from reverie.cli.main import cli
try:
    cli.main({words})
except SystemExit as end:
    heavy = [name for name in {heavy} if name in sys.modules]
    print(end.code, heavy, file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--help"], 0),
        ([], 0),
        (["--version"], 0),
        (["evalute"], 2),
        (["train", "--help"], 0),
        (["train", "--learing-rate", "1"], 2),
        (["train", "--out", "x", "--steps", "0"], 2),
        (["train", "--config", "a.yaml"], 2),
        (["sample", "--help"], 0),
        (["sample", "model", "--steps", "0"], 2),
        (["ema", "--help"], 0),
        (["ema", "run", "--sigma-rel", "0.3"], 2),
        (["data", "--help"], 0),
        (["inspect", "--help"], 0),
        (["doctor", "--help"], 0),
    ],
)
def test_help_and_refusals_do_not_wait_for_torch(words, code, tmp_path):
    """--help in under half a second: what would take the seconds is not imported."""
    program = WITHOUT.format(words=words, heavy=["torch", "numpy", "PIL", "diffusers", "datasets"])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.stderr.splitlines()[-1] == f"{code} []", done.stderr


def test_help_imports_no_command(tmp_path):
    program = WITHOUT.format(words=["--help"], heavy=[f"reverie.cli.{name}" for name in COMMANDS] + ["pydantic"])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.stderr.splitlines()[-1] == "0 []"


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_lists_every_command_with_a_line(reverie, flag):
    outcome = reverie(flag)
    assert outcome.exit_code == 0
    for name, words in COMMANDS.items():
        assert f"{name}  " in outcome.stdout
        assert words in outcome.stdout
    assert "serve" not in outcome.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(reverie, name):
    for flag in ("-h", "--help"):
        outcome = reverie(name, flag)
        assert outcome.exit_code == 0
        assert outcome.stdout.startswith(f"Usage: reverie {name}")
        assert "--debug" in outcome.stdout


def test_version(reverie):
    assert reverie("--version").stdout == f"reverie {package.__version__}\n"


@pytest.mark.parametrize(
    ("word", "near"), [("trian", "train"), ("inspct", "inspect"), ("SAMPLE", None), ("serve", None)]
)
def test_a_command_that_is_not_there(refused, word, near):
    (line,) = refused(2, word)
    assert f"there is no command {word!r}" in line
    assert (f"did you mean {near}?" in line) == bool(near)
    assert "known: train, codec, sample, edit, evaluate, ema, tune, data, convert, inspect, doctor" in line


@pytest.mark.parametrize(
    ("words", "near"),
    [
        (["train", "--learing-rate", "1e-3"], "--learning-rate"),
        (["train", "--learing_rate=1e-3"], "--learning-rate"),
        (["train", "--batch-sise", "3"], "--batch-size"),
        (["train", "--no-flp"], "--no-flip"),
        (["sample", "x", "--sampeler", "ddim"], "--sampler"),
        (["sample", "x", "--cfg-scal", "2"], "--cfg-scale"),
        (["doctor", "--jsno"], "--json"),
    ],
)
def test_an_option_that_is_not_there(refused, words, near):
    """RELIABILITY 6, case 6."""
    (line,) = refused(2, *words)
    assert f"did you mean {near}?" in line
    assert f"see reverie {words[0]} --help" in line


@pytest.mark.parametrize("words", [["train", "--steps"], ["train", "stray"], ["sample"], ["data"], ["--nothing"]])
def test_other_slips_of_the_keyboard(refused, words):
    (line,) = refused(2, *words)
    assert "--help" in line


# How commands end -----------------------------------------------------------------------------


class Wrong(BaseModel):
    n: int


def out_of_memory(words):
    def fail():
        raise RuntimeError(words)

    return fail


ALLOCATOR = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
    "allocate 4398046511104 bytes. Error code 12 (Cannot allocate memory)"
)
ENDS = {
    "usage": (errors.UsageError("a\nb"), 2, ["error: a", "error: b"]),
    "data": (errors.DataError("photos: empty"), 3, ["error: photos: empty"]),
    "model": (errors.ModelFileError("m: damaged"), 4, ["error: m: damaged"]),
    "numbers": (errors.NonFiniteError("step 3: NaN"), 5, ["error: step 3: NaN"]),
    "storage": (errors.StorageError("disk full"), 6, ["error: disk full"]),
    "memory": (errors.OutOfMemoryError("too much"), 7, ["error: too much"]),
    "interrupted": (errors.Stopped("saved step 3", signal.SIGINT), 130, ["saved step 3"]),
    "terminated": (errors.Stopped("saved step 3", signal.SIGTERM), 143, ["saved step 3"]),
    "ctrl-c": (KeyboardInterrupt(), 130, ["stopped"]),
    "full disk": (OSError(28, "No space left on device", "a.png"), 6, ["error: a.png: No space left on device; free"]),
    "read-only": (OSError(30, "Read-only file system", "a.png"), 6, ["error: a.png: Read-only file system; choose"]),
    "forbidden": (PermissionError(13, "Permission denied", "a"), 6, ["error: a: Permission denied; choose"]),
    "allocator": (RuntimeError(ALLOCATOR), 7, ["error: not enough memory: 4.0 TiB more were asked for"]),
    "python": (MemoryError(), 7, ["error: not enough memory"]),
    "cuda": (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has ..."),
        7,
        ["error: not enough memory: 2.5 GiB more were asked for"],
    ),
    "no memory": (OSError(12, "Cannot allocate memory"), 7, ["error: not enough memory"]),
    "no reader": (BrokenPipeError(32, "Broken pipe"), 0, []),
}


@pytest.fixture
def failing(monkeypatch):
    """Put a command that raises in the place of `doctor`."""

    def put(error):
        def callback():
            print("a result")
            raise error

        stand_in = types.ModuleType("reverie.cli.doctor")
        stand_in.command = Command("doctor", callback=callback, lower="--batch-size")
        monkeypatch.setitem(sys.modules, "reverie.cli.doctor", stand_in)

    return put


@pytest.mark.parametrize("name", ENDS)
def test_every_error_ends_with_its_code_and_its_lines(reverie, failing, name):
    error, code, lines = ENDS[name]
    failing(error)
    outcome = reverie("doctor")
    assert outcome.exit_code == code
    assert outcome.stdout == "a result\n"
    got = outcome.stderr.splitlines()
    assert len(got) == len(lines)
    assert all(line.startswith(want) for line, want in zip(got, lines, strict=True)), got


@pytest.mark.parametrize("name", ["allocator", "python", "cuda"])
def test_memory_errors_say_what_there_is_and_what_to_lower(reverie, failing, name):
    """RELIABILITY 6, case 19."""
    failing(ENDS[name][0])
    (line,) = reverie("doctor").stderr.splitlines()
    assert "are free" in line
    assert line.endswith("; lower --batch-size")


@pytest.mark.parametrize("error", [ValueError("x\ny"), RuntimeError("mat1 and mat2"), FileNotFoundError(2, "No", "a")])
def test_a_bug_shows_where_it_is(reverie, failing, error):
    failing(error)
    outcome = reverie("doctor")
    assert outcome.exit_code == 1
    assert "Traceback" in outcome.stderr
    assert "in callback" in outcome.stderr
    last = outcome.stderr.splitlines()[-1]
    assert last.startswith(f"error: {type(error).__name__}: ")
    assert f"this is a bug of reverie {package.__version__}" in last


def test_a_faulty_model_of_our_own_is_a_bug(reverie, failing):
    try:
        Wrong(n="x")
    except ValueError as error:
        failing(error)
    assert reverie("doctor").exit_code == 1


@pytest.mark.parametrize("words", [["doctor", "--debug"], ["--debug", "doctor"]])
def test_debug_shows_where_any_error_is(reverie, failing, words):
    failing(errors.DataError("photos: empty"))
    outcome = reverie(*words)
    assert outcome.exit_code == 3
    assert "Traceback" in outcome.stderr
    assert outcome.stderr.splitlines()[-1] == "error: photos: empty"


def test_a_name_cannot_steer_the_terminal(reverie, failing):
    failing(errors.DataError("cat\x1b[2J\x9b.png: empty"))
    assert reverie("doctor").stderr == "error: cat\\x1b[2J\\x9b.png: empty\n"


def test_a_warning_is_one_line(reverie, failing, monkeypatch):
    def callback():
        warnings.warn("step 500 is damaged\nand passed over", RuntimeWarning, stacklevel=1)

    failing(None)
    sys.modules["reverie.cli.doctor"].command = Command("doctor", callback=callback)
    assert reverie("doctor").stderr == "warning: step 500 is damaged and passed over\n"


def test_signals_are_put_back(reverie, failing):
    before = signal.getsignal(signal.SIGTERM)
    failing(errors.DataError("x"))
    reverie("doctor")
    assert signal.getsignal(signal.SIGTERM) is before


def test_colour_only_where_it_is_wanted(monkeypatch):
    from reverie.cli.console import colour

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert colour() is None
    monkeypatch.setenv("NO_COLOR", "1")
    assert colour() is False


# As a process ---------------------------------------------------------------------------------


def test_exit_codes_of_a_process(process):
    assert process("--version").returncode == 0
    done = process("evalute")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: there is no command 'evalute'")


def test_a_reader_that_has_gone_is_no_error(process, tmp_path):
    """`reverie --help | true`: no traceback, no "Exception ignored", code 0."""
    reader, writer = os.pipe()
    os.close(reader)
    done = process("--help", capture_output=False, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_a_full_disk_under_standard_output(process):
    with open("/dev/full", "w") as full:
        done = process("--help", capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 6
    assert done.stderr.startswith("error: writing failed: No space left on device")
    assert len(done.stderr.splitlines()) == 1


STAND_IN = """
import signal, sys, time, types
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from reverie.cli.console import note, result
from reverie.cli.options import Command
def callback():
    {body}
stand_in = types.ModuleType('reverie.cli.doctor')
stand_in.command = Command('doctor', callback=callback)
sys.modules['reverie.cli.doctor'] = stand_in
from reverie.cli.main import cli
cli.main(['doctor'])
"""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_names_that_the_terminal_has_no_letters_for(tmp_path, encoding):
    """Japanese in a class's name is no reason to end, and neither is a file's name that is no Unicode."""
    program = STAND_IN.format(body=r"result('\u65e5\udce9'); note('\u65e5\udce9')")
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == done.stderr.strip() != b""


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_command_with_its_code(tmp_path, signum, code):
    program = STAND_IN.format(body="print('ready', flush=True); time.sleep(60)")
    child = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signum)
    _, said = child.communicate(timeout=30)
    assert (child.returncode, said.strip()) == (code, "stopped")


def test_a_shell_can_ask_for_completions(process):
    done = process(env={"_REVERIE_COMPLETE": "bash_complete", "COMP_WORDS": "reverie tr", "COMP_CWORD": "1"})
    assert "train" in done.stdout


def test_the_commands_table_is_what_there_is():
    for name in COMMANDS:
        command = cli.get_command(click.Context(cli), name)
        assert isinstance(command, Command)
        assert command.callback is not None
    assert cli.get_command(click.Context(cli), "serve") is None
    assert json.dumps(list(COMMANDS)) == json.dumps(cli.list_commands(click.Context(cli)))
    assert module.main is not None
