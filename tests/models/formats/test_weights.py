"""Hostile and damaged safetensors files: exit code 4, one line, no memory, nothing run."""

import json
import pickle
import struct
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from reverie.base.errors import ModelFileError
from reverie.models.builders import build
from reverie.models.formats import read_model
from reverie.models.formats.files import inside, read_json, what_is
from reverie.models.formats.weights import install, read_header
from reverie.models.model import Model

HTML = b"<!DOCTYPE html><html><body>Sign in to download</body></html>" * 20


class Canary:
    """A pickle that makes a file as it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def framed(header: bytes, data: bytes = b"") -> bytes:
    """Return a safetensors file of that header."""
    return struct.pack("<Q", len(header)) + header + data


def entry(*offsets: int, shape=(2,), dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def text(**tensors) -> bytes:
    return json.dumps(tensors).encode()


DAMAGED = {
    "empty": (b"", "an empty file"),
    "short": (b"\x01\x02", "no safetensors file"),
    "web page": (HTML, "a web page, not weights"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "pointer of Git LFS"),
    "picture": (b"\x89PNG\r\n\x1a\n" + bytes(100), "a PNG picture"),
    "json": (b'{"a": 1, "b": [1, 2, 3]}', "a JSON file"),
    "header of 2^60": (struct.pack("<Q", 2**60) + b"{}" + bytes(50), "no safetensors file"),
    "header beyond the end": (struct.pack("<Q", 10**6) + b"{" + bytes(50), "is truncated"),
    "header that is no JSON": (framed(b'{"a": '), "header is damaged"),
    "header that is a list": (framed(b'{"a":[1,2]}'), "header is damaged"),
    "nested header": (framed(b'{"a":' * 5000 + b"1" + b"}" * 5000), "header is damaged"),
    "twice the same name": (
        framed(
            b'{"a":' + json.dumps(entry(0, 8)).encode() + b',"a":' + json.dumps(entry(0, 8)).encode() + b"}", bytes(8)
        ),
        "a name is there twice",
    ),
    "overlapping": (framed(text(a=entry(0, 8), b=entry(4, 12)), bytes(12)), "no sound safetensors file"),
    "gap": (framed(text(a=entry(0, 8), b=entry(12, 20)), bytes(20)), "no sound safetensors file"),
    "half": (framed(text(a=entry(0, 8)), bytes(3)), "no sound safetensors file"),
    "longer than it says": (framed(text(a=entry(0, 8)), bytes(100)), "no sound safetensors file"),
    "shape and length differ": (framed(text(a=entry(0, 8, shape=(2**40,))), bytes(8)), "no sound safetensors file"),
    "unknown type": (framed(text(a=entry(0, 8, dtype="Q7")), bytes(8)), "no sound safetensors file"),
    "negative shape": (framed(text(a=entry(0, 8, shape=(-2,))), bytes(8)), "no sound safetensors file"),
    "no offsets": (framed(text(a={"dtype": "F32", "shape": [2]}), bytes(8)), "leaves things out"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_named_for_what_it_is(tmp_path, name):
    content, words = DAMAGED[name]
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(ModelFileError, match=words) as caught:
        read_header(path)
    taken = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert caught.value.exit_code == 4
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert taken < 10**7
    with pytest.raises(ModelFileError):
        read_model(path)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_under_another_name_is_never_opened(tmp_path, protocol):
    path, canary = tmp_path / "w.safetensors", tmp_path / "canary"
    path.write_bytes(pickle.dumps(Canary(canary), protocol=protocol))
    with pytest.raises(ModelFileError, match=r"code, not only weights|no safetensors file"):
        read_model(path)
    torch.save({"a": Canary(canary)}, path)
    assert zipfile.is_zipfile(path)
    with pytest.raises(ModelFileError, match="contains code, not only weights"):
        read_model(path)
    assert not canary.exists()


def test_every_cut_of_a_sound_file_is_refused(tmp_path):
    """Truncated anywhere, it is refused; whole, it is read."""
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.arange(6.0), "b": torch.zeros(2, 2)}, path)
    whole = path.read_bytes()
    assert set(read_header(path).specs) == {"a", "b"}
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelFileError):
            read_header(path)


@given(st.data())
def test_no_change_of_bytes_is_a_traceback(tmp_path_factory, data):
    """A few bytes of a sound file changed anywhere, or any bytes at all: read, or refused on one line."""
    path = tmp_path_factory.mktemp("fuzz") / "w.safetensors"
    if data.draw(st.booleans()):
        save_file({"a": torch.arange(6.0), "b": torch.zeros(2, 2)}, path)
        content = bytearray(path.read_bytes())
        for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=4)):
            content[place] = data.draw(st.integers(0, 255))
    else:
        content = bytearray(framed(data.draw(st.binary(max_size=60)), data.draw(st.binary(max_size=20))))
    path.write_bytes(content)
    said = ""
    try:
        found = read_header(path)
    except ModelFileError as error:
        said = str(error)
    assert said or all(len(spec.shape) < 100 for spec in found.specs.values())
    assert "\n" not in said


# Weights that are another network's ------------------------------------------------------------------


@pytest.fixture
def state(model) -> dict[str, torch.Tensor]:
    """Return the weights of a model."""
    return {
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in model.denoiser.network.state_dict().items()
    }


def unfilled(model: Model) -> torch.nn.Module:
    """Return a model's network without weights or memory."""
    return build(model.card, "meta").network


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("conv_in.bias"), "1 of .* tensors do not fit: conv_in.bias is missing"),
        (lambda s: s.update(extra=torch.zeros(3)), "extra has no place"),
        (lambda s: s.update({"conv_in.bias": torch.zeros(9)}), r"conv_in.bias is float32 \(9,\), not float32 \(8,\)"),
        (lambda s: s.update({"conv_in.bias": torch.zeros(8, dtype=torch.int64)}), "conv_in.bias is int64"),
        (lambda s: [s.pop(name) for name in list(s)[:5]], r"5 of .* tensors do not fit: .*; .*; .*; and 2 more"),
        (lambda s: s["conv_in.bias"].fill_(torch.nan), "1 tensors hold NaN or infinity: conv_in.bias has 8 of 8"),
        (lambda s: s["conv_in.weight"].view(-1)[3].fill_(-torch.inf), "conv_in.weight has 1 of"),
    ],
)
def test_weights_that_do_not_fit_are_named(model, state, tmp_path, change, words):
    """Missing, extra, misshapen, of another type, NaN: the first few and how many."""
    change(state)
    save_file(state, tmp_path / "w.safetensors")
    network = unfilled(model)
    with pytest.raises(ModelFileError, match=words) as caught:
        install(network, [tmp_path / "w.safetensors"], "w")
    assert "\n" not in str(caught.value)
    assert all(parameter.is_meta for parameter in network.parameters())


def test_the_same_tensor_in_two_shards(model, state, tmp_path):
    save_file(state, tmp_path / "a.safetensors")
    save_file({"conv_in.bias": state["conv_in.bias"]}, tmp_path / "b.safetensors")
    with pytest.raises(ModelFileError, match=r"conv_in\.bias is there twice"):
        install(unfilled(model), [tmp_path / "a.safetensors", tmp_path / "b.safetensors"], "w")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_lengths_of_numbers_become_float32(model, state, tmp_path, dtype):
    save_file({name: tensor.to(dtype) for name, tensor in state.items()}, tmp_path / "w.safetensors")
    network = unfilled(model)
    install(network, [tmp_path / "w.safetensors"], "w")
    for name, tensor in network.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, state[name].to(dtype).float())


def test_weights_are_mapped_and_not_copied(model, state, tmp_path):
    """The numbers stay in the file until they are looked at, and belong to no one else."""
    path = tmp_path / "w.safetensors"
    save_file(state, path)
    network = unfilled(model)
    install(network, [path], "w")
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    spans = [tuple(int(end, 16) for end in line.split()[0].split("-")) for line in maps]
    for parameter in network.parameters():
        assert any(low <= parameter.data_ptr() < high for low, high in spans)
    before = path.read_bytes()
    with torch.no_grad():
        next(network.parameters()).zero_()
    assert path.read_bytes() == before


# Files --------------------------------------------------------------------------------------------------


def test_json_from_a_stranger(tmp_path):
    path = tmp_path / "config.json"
    for content, words in (
        (b"[1]", "holds a list"),
        (b"{", "is no JSON"),
        (b"[" * 100_000, "is no JSON"),
        (b"\xff\xfe", "is no JSON"),
        (b'{"a": "' + b"x" * 2000 + b'"}', "larger than 1000 bytes"),
    ):
        path.write_bytes(content)
        with pytest.raises(ModelFileError, match=words):
            read_json(path, limit=1000 if b"xx" in content else 10**6)
    with pytest.raises(ModelFileError, match="cannot be read"):
        read_json(tmp_path / "none.json")


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "/etc/passwd", "a/b", "a\\b", "C:\\x", "a\x00b", "a" * 300, "a\nb"]
)
def test_names_that_are_no_names(tmp_path, name):
    with pytest.raises(ModelFileError, match="leaves its folder"):
        inside(tmp_path, name)


def test_links(tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "real").write_text("x")
    (folder / "within").symlink_to("real")
    (folder / "out").symlink_to("/etc/passwd")
    (tmp_path / "secret").write_text("x")
    (folder / "up").symlink_to("../secret")
    assert inside(folder, "within").read_text() == "x"
    for name in ("out", "up"):
        with pytest.raises(ModelFileError, match="outside its folder"):
            inside(folder, name)


def test_what_says_nothing_is_not_guessed(tmp_path):
    (tmp_path / "a").write_bytes(b"\x00\x01\x02 something")
    assert what_is(tmp_path / "a") is None
