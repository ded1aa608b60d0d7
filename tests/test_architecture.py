"""The house holds: the direction of the rooms, and what no module may do."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "reverie").rglob("*.py"))
NAMES = [str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__") for path in MODULES]

# What reaches a network, and the modules that may use it: each asks only where it was told to by name.
NETWORKED = {
    "aiohttp", "asyncio", "boto3", "datasets", "ftplib", "fsspec", "gradio", "http", "httpx", "huggingface_hub",
    "paramiko", "requests", "smtplib", "socketserver", "ssl", "telnetlib", "torchvision", "urllib", "urllib3", "wandb",
    "websockets", "xmlrpc",
}  # fmt: skip
ALLOWED = {"reverie.data.hub": {"datasets", "huggingface_hub"}, "reverie.training.metrics": {"wandb"}}
NEEDS_TRITON = {"reverie.kernels.triton_kernels"}  # which is there with PyTorch for GPUs alone
UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml"}


def tree(name: str) -> ast.Module:
    """Return a module's syntax tree."""
    return ast.parse(MODULES[NAMES.index(name)].read_text())


def imports(node: ast.AST) -> Iterator[str]:
    """Yield what is imported anywhere below a node: modules by their full names, import_module("...") among them."""
    for part in ast.walk(node):
        if isinstance(part, ast.Import):
            yield from (alias.name for alias in part.names)
        elif isinstance(part, ast.ImportFrom) and part.module:
            yield part.module
        elif isinstance(part, ast.Call) and called(part).endswith(("import_module", "imported", "__import__")):
            yield from (word.value for word in part.args if isinstance(word, ast.Constant))


def calls(node: ast.AST) -> Iterator[ast.Call]:
    """Yield the calls anywhere below a node."""
    return (part for part in ast.walk(node) if isinstance(part, ast.Call))


def called(call: ast.Call) -> str:
    """Return what a call calls: "torch.load"."""
    return ast.unparse(call.func)


def keyword(call: ast.Call, name: str) -> str | None:
    """Return what a call gives for a keyword, as code."""
    return next((ast.unparse(word.value) for word in call.keywords if word.arg == name), None)


def python(code: str) -> str:
    """Run code in a fresh Python, and return what it printed."""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_rooms_import_only_from_rooms_below():
    """import-linter's contract, which pyproject.toml states."""
    code = "from importlinter.cli import lint_imports; import sys; sys.exit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 kept, 0 broken" in done.stdout


@pytest.mark.parametrize(
    "name", ["reverie", "reverie.cli.main", "reverie.training.config", "reverie.diffusion.registry"]
)
def test_is_imported_without_torch(name):
    heavy = "('torch', 'numpy', 'PIL', 'diffusers', 'sklearn', 'datasets', 'matplotlib')"
    assert python(f"import sys, {name}; print([m for m in {heavy} if m in sys.modules])").strip() == "[]"


def test_the_help_of_each_command_needs_no_torch():
    code = """
import sys, click
from reverie.cli.main import COMMANDS, cli
for name in COMMANDS:
    command = cli.get_command(click.Context(cli), name)
    assert command.get_help(click.Context(command))
print("torch" in sys.modules)
"""
    assert python(code).strip() == "False"


@pytest.mark.parametrize("name", NAMES)
def test_says_what_it_is(name):
    """Each module has a docstring, and so has each of its public classes and functions."""
    module = tree(name)
    assert ast.get_docstring(module)
    for node in module.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{name}:{node.lineno} {node.name}"


@pytest.mark.parametrize("name", NAMES)
def test_unpickles_nothing(name):
    module = tree(name)
    assert not {found.split(".")[0] for found in imports(module)} & UNPICKLERS
    for call in calls(module):
        kind = called(call)
        if kind == "torch.load":
            assert keyword(call, "weights_only") == "True", f"{name}:{call.lineno}"
        assert kind not in ("eval", "exec", "torch.hub.load", "compile"), f"{name}:{call.lineno} {kind}"
        assert keyword(call, "trust_remote_code") is None, f"{name}:{call.lineno}"
        assert keyword(call, "allow_pickle") in (None, "False"), f"{name}:{call.lineno}"
        assert keyword(call, "shell") in (None, "False"), f"{name}:{call.lineno}"


def test_one_place_reads_pytorchs_files():
    assert [name for name in NAMES for call in calls(tree(name)) if called(call) == "torch.load"] == [
        "reverie.models.formats.pickled"
    ]


@pytest.mark.parametrize("name", NAMES)
def test_asks_no_network(name):
    module = tree(name)
    found = {word.split(".")[0] for word in imports(module) if isinstance(word, str)}
    assert found & NETWORKED <= ALLOWED.get(name, set())
    sockets = {ast.unparse(part) for part in ast.walk(module) if ast.unparse(part).startswith("socket.")}
    assert all(use.startswith("socket.gethostname") for use in sockets), sockets


def test_the_registries_name_things_that_are_there():
    from reverie.base.registry import Registry

    found = [
        (registry.kind, key)
        for name in NAMES
        if name not in NEEDS_TRITON
        for registry in list(vars(import_module(name)).values())
        if isinstance(registry, Registry)
        for key in registry
        if registry[key] is not None
    ]
    assert {"sampler", "schedule", "network", "data source", "model format"} <= {kind for kind, _ in found}
