"""PyTorch's pickled weights: read as weights alone, by a child, or not at all."""

import io
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from reverie.base.errors import ModelFileError
from reverie.models.formats import pickled, read_model, write_model
from reverie.models.formats.pickled import as_safetensors


class Canary:
    """Makes a file as it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.fixture
def folder(model, tmp_path) -> Path:
    """Return a diffusers folder whose weights are to come as a .bin."""
    write_model(model, tmp_path / "m")
    (tmp_path / "m" / "reverie.json").unlink()
    (tmp_path / "m" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    return tmp_path / "m"


def weights(folder: Path) -> Path:
    return folder / "unet" / "diffusion_pytorch_model.bin"


def test_code_is_never_run_and_never_tried_again(folder, tmp_path, monkeypatch):
    """A crafted file ends in exit code 4; `torch.load` is never called here, nor anywhere without weights_only."""
    canary = tmp_path / "canary"
    calls = []
    monkeypatch.setattr(torch, "load", lambda *given, **options: calls.append(options))
    torch.save({"conv_in.weight": torch.zeros(2), "evil": Canary(canary)}, weights(folder))
    with pytest.raises(ModelFileError, match="contains code, not only weights") as caught:
        read_model(folder)
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)
    assert calls == []
    assert not canary.exists()


def test_the_only_call_of_torch_load_is_for_weights_alone():
    """In all of the package."""
    import reverie

    sources = {path: path.read_text() for path in Path(reverie.__file__).parent.rglob("*.py")}
    calls = [line for text in sources.values() for line in text.splitlines() if "torch.load(" in line]
    assert [line.strip() for line in calls] == ['state = torch.load(path, map_location="cpu", weights_only=True)']
    assert not [path for path, text in sources.items() if "import pickle" in text or "trust_remote_code" in text]


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_bare_pickle_is_not_opened(folder, tmp_path, protocol):
    weights(folder).write_bytes(pickle.dumps(Canary(tmp_path / "canary"), protocol=protocol))
    with pytest.raises(ModelFileError, match="it was not opened"):
        read_model(folder)
    torch.save({"a": torch.zeros(2)}, weights(folder), _use_new_zipfile_serialization=False)
    with pytest.raises(ModelFileError, match=r"a pickle, which contains code.*it was not opened"):
        read_model(folder)
    assert not (tmp_path / "canary").exists()


def archive(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED, repeat: str | None = None) -> bytes:
    """Return a zip archive."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, content in members.items():
            file.writestr(name, content)
        if repeat is not None:
            file.writestr(repeat, b"")
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    "content",
    [
        archive({"m/data.pkl": b"x" * 10**6}, zipfile.ZIP_DEFLATED),
        archive({"m/data.pkl": b"x", "m/evil.pkl": b"y"}),
        archive({"m/version": b"3"}),
        archive({"m/data.pkl": b"x"}, repeat="m/data.pkl"),
        b"PK\x03\x04" + bytes(100),
        b"<html>" * 100,
        b"",
    ],
    ids=["compressed", "two pickles", "no pickle", "twice", "broken", "web page", "empty"],
)
def test_an_archive_that_is_none_of_torchs_is_not_opened(folder, monkeypatch, content):
    def run(*given, **options):
        raise AssertionError("a child was started")

    monkeypatch.setattr(pickled.subprocess, "run", run)
    weights(folder).write_bytes(content)
    with pytest.raises(ModelFileError, match=r"was not opened|no sound archive"):
        read_model(folder)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        pytest.param([torch.zeros(2)], "no tensors by name", marks=pytest.mark.slow),
        pytest.param({"a": 3}, "a is no dense tensor", marks=pytest.mark.slow),
        ({"a": torch.zeros(2, 2).to_sparse()}, "a is no dense tensor"),
    ],
)
def test_what_is_no_weights_is_refused(tmp_path, state, words):
    torch.save(state, tmp_path / "w.bin")
    with pytest.raises(ModelFileError, match=words):
        as_safetensors(tmp_path / "w.bin", tmp_path / "w.safetensors")
    assert not (tmp_path / "w.safetensors").exists()


@pytest.mark.slow
def test_a_child_that_dies_is_an_error_like_another(tmp_path, monkeypatch):
    torch.save({"a": torch.zeros(2)}, tmp_path / "w.bin")
    monkeypatch.setattr(pickled, "ROOM", 2**27)  # not enough for PyTorch itself
    with pytest.raises(ModelFileError, match="code, not only weights, or is damaged"):
        as_safetensors(tmp_path / "w.bin", tmp_path / "w.safetensors")
    monkeypatch.setattr(pickled, "SECONDS", 0.01)
    with pytest.raises(ModelFileError, match="took longer than"):
        as_safetensors(tmp_path / "w.bin", tmp_path / "w.safetensors")


def test_weights_that_share_their_numbers_are_parted(tmp_path):
    both = torch.arange(4.0)
    torch.save({"a": both, "b": both, "c": both[1:3]}, tmp_path / "w.bin")
    found = load_file(as_safetensors(tmp_path / "w.bin", tmp_path / "w.safetensors"))
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        "a": [0.0, 1.0, 2.0, 3.0], "b": [0.0, 1.0, 2.0, 3.0], "c": [1.0, 2.0],
    }  # fmt: skip


def test_a_folder_of_distributed_checkpoints_is_no_model(tmp_path):
    """Its .metadata is a pickle; nothing here opens it."""
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
    (tmp_path / "dcp" / "__0_0.distcp").write_bytes(b"x")
    with pytest.raises(ModelFileError, match="is no model"):
        read_model(tmp_path / "dcp")
    assert not (tmp_path / "canary").exists()
