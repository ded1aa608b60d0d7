"""Our own folder, our single file, and how a path is recognised."""

import json
import shutil
import socket

import pytest
import torch
from safetensors.torch import save_file

from reverie.base import storage
from reverie.base.errors import ModelFileError, StorageError, UsageError
from reverie.models.builders import build
from reverie.models.card import Card, NetworkSpec, ScheduleSpec
from reverie.models.formats import formats, native_folder, read_model, recognise, write_model
from reverie.models.model import Model


@pytest.fixture
def native(make, tmp_path):
    """Return our own folder of a model that diffusers has no words for."""
    return write_model(make(prediction="velocity", schedule=ScheduleSpec(name="flow")), tmp_path / "m")


@pytest.mark.parametrize("kind", ["diffusers", "native", "single-file"])
def test_what_is_written_is_read(classy, tmp_path, kind):
    path = tmp_path / ("m.safetensors" if kind == "single-file" else "m")
    assert write_model(classy, path, kind=kind) == path
    assert recognise(path).name == kind
    back = read_model(path)
    assert (back.card, back.digest, back.source) == (classy.card, classy.digest, str(path))
    settings = {"classes": "two", "guidance": 3.0, "steps": 2}
    assert torch.equal(back.sample(2, **settings).images, classy.sample(2, **settings).images)
    write_model(back, path, kind=kind, overwrite=True)
    assert read_model(path).digest == classy.digest


def test_points(tmp_path):
    """A model that draws no pictures."""
    card = Card(kind="points", shape=(2,), network=NetworkSpec(name="mlp", config={"in_channels": 2}), prediction="v")
    model = Model(build(card), card)
    write_model(model, tmp_path / "m")
    assert recognise(tmp_path / "m").name == "native"
    back = read_model(tmp_path / "m")
    assert torch.equal(back.sample(5, steps=3).images, model.sample(5, steps=3).images)
    assert back.sample(5, steps=3).images.shape == (5, 2)


def test_the_name_says_nothing(classy, tmp_path):
    """A folder called run.safetensors, a file called model: the content decides."""
    write_model(classy, tmp_path / "run.safetensors", kind="native")
    write_model(classy, tmp_path / "model", kind="single-file")
    assert recognise(tmp_path / "run.safetensors").name == "native"
    assert recognise(tmp_path / "model").name == "single-file"


def test_a_flipped_bit_of_ours(native):
    path = native / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)
    with pytest.raises(ModelFileError, match="its checksum differs"):
        read_model(native)
    path.write_bytes(data[:-10])
    with pytest.raises(ModelFileError, match="it is truncated"):
        read_model(native)
    path.unlink()
    with pytest.raises(ModelFileError, match="cannot be read"):
        read_model(native)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s["card"]["network"].update(name="os"), "no network 'os'"),
        (lambda s: s["card"]["network"]["config"].update(channels=[10**9]), "16384"),
        (lambda s: s["card"]["network"]["config"].update(chanels=[8]), "chanels"),
        (lambda s: s["card"]["network"]["config"].update(_target_="builtins.exec"), "_target_"),
        (lambda s: s["card"]["schedule"].update(name="vvp"), "no schedule 'vvp', did you mean vp"),
        (lambda s: s["card"]["schedule"].update(options={"timesteps": 10**12}), "100000"),
        (lambda s: s["card"]["schedule"].update(options={"warp": 1}), "warp"),
        (lambda s: s["card"].update(prediction="os.system"), "no prediction"),
        (lambda s: s["card"].update(shape=[3, 8, 8]), "in_channels is 1, the card wants 3"),
        (lambda s: s["card"].update(shape=[1] * 9), "shape"),
        (lambda s: s["card"].update(classes=["a"]), "num_class_embeds is None, the card wants 2"),
        (lambda s: s["card"].update(format=2), r"2 is newer than this version's \(1\): update reverie"),
        (lambda s: s["card"].update(surprise=1), "surprise"),
        (lambda s: s["card"].pop("shape"), "shape: Field required"),
        (lambda s: s.update(files={}), "names no files, not weights"),
        (lambda s: s.update(files={"../weights.safetensors": next(iter(s["files"].values()))}), r"names \.\./weights"),
    ],
)
def test_a_card_that_is_not_sound(native, change, words):
    """Nothing that a card says is imported, run, or given memory."""
    sealed = json.loads((native / "reverie.json").read_text())
    change(sealed)
    (native / "reverie.json").write_text(json.dumps(sealed))
    with pytest.raises(ModelFileError, match=words) as caught:
        read_model(native)
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)


# The single file ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (
            ["conv_in.weight", "conv_out.weight", "time_embedding.linear_1.weight"],
            "the weights of a UNet2DM",
        ),
        (["lora_unet_mid_block.lora_up.weight"], "a LoRA"),
        (["text_model.embeddings.weight"], "a text encoder"),
        (["what", "ever"], r"nothing known \(2 tensors: ever, what, \.\.\.\)"),
    ],
)
def test_a_file_without_a_card_is_named_and_refused(tmp_path, names, words):
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "w.safetensors")
    with pytest.raises(ModelFileError, match=f"no card in its header.*looks like {words}"):
        read_model(tmp_path / "w.safetensors")


@pytest.mark.parametrize("text", ["{", '{"shape": [1]}', "[" * 100_000])
def test_a_header_with_a_damaged_card(tmp_path, text):
    save_file({"a": torch.zeros(1)}, tmp_path / "w.safetensors", metadata={"reverie": text})
    with pytest.raises(ModelFileError, match="is no card of a model"):
        read_model(tmp_path / "w.safetensors")


def test_a_file_is_overwritten_only_when_asked(make, tmp_path):
    path = tmp_path / "m.safetensors"
    write_model(make(seed=1), path)
    with pytest.raises(UsageError, match="exists already"):
        write_model(make(seed=2), path)
    assert read_model(path).digest == make(seed=1).digest
    write_model(make(seed=2), path, overwrite=True)
    assert read_model(path).digest == make(seed=2).digest
    for other in ("notes.txt", "folder"):
        target = tmp_path / other
        target.mkdir() if other == "folder" else target.write_text("<html>")
        with pytest.raises(UsageError, match="exists already"):
            write_model(make(), target, kind="single-file", overwrite=True)


def test_a_full_disk_leaves_the_old_file(make, tmp_path, monkeypatch):
    path = write_model(make(seed=1), tmp_path / "m.safetensors")

    def full(file, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "put", full)
    with pytest.raises(StorageError, match=r"no space left on device .* needed"):
        write_model(make(seed=2), path, overwrite=True)
    monkeypatch.undo()
    assert read_model(path).digest == make(seed=1).digest
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


# What is no model -----------------------------------------------------------------------------------


def test_a_path_where_nothing_is(tmp_path):
    with pytest.raises(UsageError, match="check the path") as caught:
        read_model(tmp_path / "none")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("path", ["a" * 5000, "a\x00b", "a/" * 3000])
def test_a_path_that_is_none(path):
    with pytest.raises(UsageError, match="there is no"):
        read_model(path)


def test_what_the_system_refuses_is_said(native, monkeypatch):
    def refuse(*given):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(native_folder.NativeFolder, "read", refuse)
    with pytest.raises(ModelFileError, match="cannot be read: Permission denied; check its permissions"):
        read_model(native)


def test_the_name_of_a_model_on_the_hub_is_not_fetched(monkeypatch, tmp_path):
    """No socket is opened; the message says how to get the folder."""

    def connect(*given):
        raise AssertionError("a connection was made")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="fetches nothing here: run `hf download google/ddpm-cat-256 --local-dir DIR`"):
        read_model("google/ddpm-cat-256")
    (tmp_path / "runs").mkdir()
    with pytest.raises(UsageError, match="there is no runs/digits; check the path"):
        read_model("runs/digits")


def test_what_is_there_and_no_model(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(
        ModelFileError, match=r"is no model \(it holds cat.jpg\); a model is a folder with card.json"
    ) as caught:
        read_model(tmp_path / "photos")
    assert caught.value.exit_code == 4
    assert all(formats[name].sign in str(caught.value) for name in formats)
    with pytest.raises(ModelFileError, match="a JPEG picture, not weights"):
        read_model(tmp_path / "photos" / "cat.jpg")


def test_weights_have_no_averages_to_choose_from(native):
    with pytest.raises(UsageError, match=r"ema is '0\.9', but .* holds one set of weights"):
        read_model(native, ema="0.9")


def test_an_unknown_kind_is_refused(model, tmp_path):
    with pytest.raises(UsageError, match="no model format 'difusers', did you mean diffusers"):
        write_model(model, tmp_path / "m", kind="difusers")
    with pytest.raises(UsageError, match="written by training alone"):
        write_model(model, tmp_path / "m", kind="run")
    assert not (tmp_path / "m").exists()


def test_a_folder_that_vanishes_while_it_is_read(native, monkeypatch):
    install = native_folder.install

    def vanish(*given, **options):
        shutil.rmtree(native)
        return install(*given, **options)

    monkeypatch.setattr(native_folder, "install", vanish)
    with pytest.raises(ModelFileError, match="cannot be read"):
        read_model(native)
