"""The written house is true: its code runs, its flags exist, its marks and links point at something."""

import doctest
import re
import shlex
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import click
import pytest
import torch

import reverie as rv
from reverie.base import errors
from reverie.cli.data import DataSettings
from reverie.cli.ema import EmaSettings
from reverie.cli.evaluate import EvaluateSettings
from reverie.cli.main import COMMANDS, cli
from reverie.cli.options import settle
from reverie.cli.sample import SampleSettings
from reverie.cli.tune import TuneSettings
from reverie.models.settling import bucket_rows
from reverie.training.config import TrainConfig

ROOT = Path(__file__).parent.parent
HANDBOOK = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *HANDBOOK]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SETTINGS = {"train": TrainConfig, "sample": SampleSettings, "data": DataSettings, "tune": TuneSettings}
SETTINGS |= {"ema": EmaSettings, "evaluate": EvaluateSettings}
TINY = {"preset": "tiny", "steps": 2, "batch_size": 8, "sample_every": 0, "validate_every": 0}


def load(name: str) -> ModuleType:
    """Return a module of docs/, which is no package."""
    spec = spec_from_file_location(f"handbook_{name}", ROOT / "docs" / f"{name}.py")
    assert spec
    assert spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hooks = load("hooks")


def blocks(page: Path, language: str) -> list[str]:
    """Return the code blocks of a page in one language."""
    return [text for kind, text in BLOCK.findall(page.read_text()) if kind == language]


def named(name: str) -> str:
    """Return the block of the README that a comment names."""
    _, _, rest = (ROOT / "README.md").read_text().partition(f"<!-- tested: {name} -->\n")
    found = BLOCK.match(rest)
    assert found, name
    return found[2]


def commands(page: Path) -> Iterator[list[str]]:
    """Yield the words of each call of reverie in a page's shell blocks."""
    for block in blocks(page, "sh"):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            if words and words[0].endswith("reverie"):
                yield words[1:]


# Code -----------------------------------------------------------------------------------------


def test_the_textbooks_loop_learns_and_samples(tmp_path, monkeypatch):
    """After 20 small steps the loss on fresh draws is well below that of the untrained network, which is 1."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    code, count = re.subn(r"^steps, batch, T = .*$", "steps, batch, T = 20, 8, 10", named("textbook"), flags=re.M)
    assert count == 1
    scope: dict = {}
    exec(code, scope)
    images, schedule, denoiser = scope["images"], scope["schedule"], scope["denoiser"]
    t = schedule.time_of_timestep(torch.arange(10).repeat(20))
    x0, eps = images[:200], torch.randn(200, 1, 8, 8)
    with torch.no_grad():
        loss = (denoiser(rv.diffuse(schedule, x0, t, eps), t).eps - eps).square().mean().item()
    assert loss < 0.7
    assert (tmp_path / "textbook.png").stat().st_size > 0
    assert scope["state"].x.shape == (16, 1, 8, 8)
    assert scope["state"].x.isfinite().all()


def test_the_textbooks_loop_is_fifteen_lines_beside_import_settings_and_picture():
    lines = [line for line in named("textbook").splitlines() if line.strip()]
    assert len(lines) == 15 + 3


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = named("api")
    tiny = code.replace("steps=1200", ", ".join(f"{name}={value!r}" for name, value in TINY.items()))
    tiny = tiny.replace("steps=50", "steps=2")
    assert tiny.count("steps=2") == 2
    exec(tiny, {})
    assert (tmp_path / "seven.png").stat().st_size > 0


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with the run that the handbook's code speaks of."""
    folder = tmp_path_factory.mktemp("handbook")
    rv.train(data="digits", out=str(folder / "runs" / "digits"), **TINY)
    return folder


CODE = [
    pytest.param(text, id=f"{page.stem}-{i}", marks=[pytest.mark.slow] if "diffusers" in text else [])
    for page in HANDBOOK
    for i, text in enumerate(blocks(page, "python"))
]


@pytest.mark.parametrize("text", CODE)
def test_the_python_of_the_handbook_runs(text, request, monkeypatch, capsys):
    if '"runs/' in text:
        monkeypatch.chdir(request.getfixturevalue("runs"))
    torch.manual_seed(0)
    exec(text, {})


def test_examples_of_the_hooks():
    assert doctest.testmod(hooks).failed == 0


# The command line -------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_are_accepted(page):
    """Each flag exists, and each value is one that its command takes."""
    for words in commands(page):
        if words[0].startswith("-"):
            continue
        command = cli.get_command(click.Context(cli), words[0])
        assert command, words
        context = command.make_context(words[0], list(words[1:]))
        if model := SETTINGS.get(words[0]):
            settle(model, {name: value for name, value in context.params.items() if name in model.model_fields})


def test_readme_and_handbook_show_every_way_to_use_the_commands():
    shown = {words[0] for page in PAGES for words in commands(page)}
    assert shown >= {"train", "sample", "inspect", "doctor", "data"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_flags_exist(page):
    known = set()
    for name in COMMANDS:
        command = cli.get_command(click.Context(cli), name)
        for parameter in command.get_params(click.Context(command)):
            known |= {*parameter.opts, *parameter.secondary_opts, *getattr(parameter, "aliases", ())}
    if page.stem == "benchmarks":  # it has the flags of the scripts, too
        for script in (*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "tools").glob("*.py")):
            known |= set(re.findall(r'add\w*\(\s*"(--[a-z-]+)"', script.read_text()))
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", page.read_text()))
    assert mentioned <= known, mentioned - known


def test_the_handbook_has_the_help_of_each_command():
    page = (ROOT / "docs" / "cli.md").read_text()
    assert {match[1] for match in hooks.HELP.finditer(page)} == {"", *COMMANDS}
    for name in COMMANDS:
        assert COMMANDS[name].split()[0] in hooks.command_help(name)
    with pytest.raises(LookupError, match="no command"):
        hooks.command_help("trian")


def test_exit_codes_are_as_told():
    page = (ROOT / "docs" / "cli.md").read_text()
    told = {int(code): means for code, means in re.findall(r"^\| (\d) \| (.*?) \|$", page, re.MULTILINE)}
    codes = {kind.exit_code for kind in errors.ReverieError.__subclasses__() if kind is not errors.Stopped}
    assert set(told) == {0, 1, *codes}
    for kind, word in (
        (errors.UsageError, "usage"),
        (errors.DataError, "data"),
        (errors.ModelFileError, "model file"),
        (errors.NonFiniteError, "finite"),
        (errors.StorageError, "storage"),
        (errors.OutOfMemoryError, "memory"),
    ):
        assert word in told[kind.exit_code]


# Marks and links --------------------------------------------------------------------------------


@pytest.mark.parametrize("page", HANDBOOK, ids=lambda page: page.stem)
def test_marks_point_at_lines(page):
    for module, name, text in hooks.marks(page.read_text()):
        place = hooks.locate(module, name, text)
        line = (ROOT / place.path).read_text().splitlines()[place.line - 1]
        assert (text or name.split(".")[-1]) in line


@pytest.mark.parametrize(
    ("module", "name", "text"),
    [
        ("reverie.diffusion.process", "posteriori", None),
        ("reverie.diffusion.proces", "posterior", None),
        ("reverie.diffusion.process", "Posterior.variance", None),
        ("reverie.diffusion.process", "posterior", "no such text"),
    ],
)
def test_a_mark_that_points_at_nothing_is_found_out(module, name, text):
    with pytest.raises(LookupError):
        hooks.locate(module, name, text)


def test_formulas_are_numbered_once_each():
    for page in HANDBOOK:
        numbers = re.findall(r"\\tag\{(\d+)\}", page.read_text())
        assert numbers == [str(i + 1) for i in range(len(numbers))], page.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (page.parent / target).exists(), target


# Facts ------------------------------------------------------------------------------------------


def test_the_rows_of_a_network_call_are_as_told():
    assert "from 32\n  (16 pixels a side and less) to 1 (more than 64)" in (ROOT / "docs" / "sampling.md").read_text()
    assert [bucket_rows((3, side, side)) for side in (8, 16, 17, 64, 65, 256)] == [32, 32, 16, 2, 1, 1]


def test_the_names_under_rv_can_be_had():
    for names in rv._PLACES.values():
        for name in names:
            assert getattr(rv, name) is not None


def test_the_tests_that_a_page_names_are_there():
    named_tests = {found for page in PAGES for found in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page.read_text())}
    assert len(named_tests) > 40
    missing = [test for test in named_tests if f"def {test[1]}(" not in (ROOT / test[0]).read_text()]
    assert not missing
