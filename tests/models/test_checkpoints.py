"""Checkpoints against every way of losing one."""

import errno
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from reverie.base import storage
from reverie.base.errors import ModelFileError, NonFiniteError, StorageError, UsageError
from reverie.models import checkpoints
from reverie.models.checkpoints import (
    Checkpoint,
    CheckpointStore,
    Spec,
    check_tensors,
    nonfinite,
    open_checkpoint,
    seal,
    verify,
)


@pytest.fixture
def store(tmp_path) -> CheckpointStore:
    store = CheckpointStore(tmp_path / "checkpoints")
    store.prepare()
    return store


def tensors(step: int) -> dict[str, dict[str, torch.Tensor]]:
    """Two groups that differ from step to step."""
    weights = torch.arange(12.0).reshape(3, 4) + step
    return {"model": {"in.weight": weights, "in.bias": torch.ones(3)}, "ema-0.9999": {"in.weight": weights / 2}}


def save(store: CheckpointStore, *steps: int) -> list[str]:
    """Save a few steps; return the warnings."""
    return [warning for step in steps for warning in store.save(step, tensors(step), {"step": step}).warnings]


def tree(folder) -> dict[str, str]:
    """Every file below a folder, with its content's hash."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def flip(path, position: int = -1, bit: int = 0) -> None:
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def fail(code=errno.ENOSPC):
    """A function that the disk refuses."""

    def refuse(*_):
        raise OSError(code, os.strerror(code))

    return refuse


def holds(found: Checkpoint, step: int) -> bool:
    """Whether a checkpoint has just what was saved at a step."""
    groups = {group: found.tensors(group) for group in found.groups}
    wanted = tensors(step)
    return found.step == step and found.record == {"step": step} and groups.keys() == wanted.keys() and all(
        groups[group].keys() == wanted[group].keys() and torch.equal(groups[group][name], tensor)
        for group in wanted for name, tensor in wanted[group].items()
    )  # fmt: skip


# What comes back ------------------------------------------------------------------------------


def test_tensors_of_every_kind_survive_bit_for_bit(store):
    torch.manual_seed(0)
    weight = torch.randn(4, 6, 3, 3)
    kinds = {
        "plain": weight,
        "tied": weight,
        "transposed": weight[0, 0].T,
        "strided": weight[:, ::2],
        "expanded": torch.ones(1, 3).expand(4, 3),
        "every other": torch.arange(7.0)[::2],
        "one for all": torch.ones(1).expand(4),
        "channels_last": weight.to(memory_format=torch.channels_last),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "parameter": torch.nn.Parameter(weight.clone()),
        "negative zero": torch.tensor([-0.0, 1e-45]),
        "float64": torch.randn(3, dtype=torch.float64),
        "bfloat16": torch.randn(5).bfloat16(),
        "float16": torch.randn(5).half(),
        "float8": torch.randn(5).to(torch.float8_e4m3fn),
        "large": torch.full((3,), 3e38),
        "int64": torch.tensor([2**62, -1]),
        "uint8": torch.get_rng_state(),
        "bool": torch.tensor([True, False, True]),
    }
    saved = store.save(1, {"model": kinds}, {})
    back = open_checkpoint(saved.path).tensors("model")
    assert back.keys() == kinds.keys()
    for name, tensor in kinds.items():
        assert Spec.of(back[name]) == Spec.of(tensor), name
        bits = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (back[name], tensor)]
        assert torch.equal(*bits), name


def test_files_are_plain_safetensors_and_json(store):
    path = store.save(7, tensors(7), {"epoch": 3, "note": "é", "order": [1, 2]}).path
    names = {"manifest.json", "state.json", "model.safetensors", "ema-0.9999.safetensors"}
    assert set(os.listdir(path)) == names
    assert path.name == "step-00000007"
    assert torch.equal(load_file(path / "model.safetensors")["in.weight"], tensors(7)["model"]["in.weight"])
    assert json.loads((path / "state.json").read_bytes()) == {"epoch": 3, "note": "é", "order": [1, 2]}


def test_the_manifest_says_what_made_it(store):
    record = {"config_hash": "c0ffee", "data_fingerprint": "d161", "code_version": "0.1.0+abc"}
    path = store.save(7, tensors(7), record).path
    manifest = json.loads((path / "manifest.json").read_bytes())
    assert manifest["step"] == 7
    assert manifest["format"] == 1
    assert manifest["torch"] == torch.__version__
    assert manifest["threads"] == torch.get_num_threads()
    assert (manifest["config_hash"], manifest["data_fingerprint"], manifest["code"]) == ("c0ffee", "d161", "0.1.0+abc")
    content = (path / "model.safetensors").read_bytes()
    listed = manifest["files"]["model.safetensors"]
    assert listed["bytes"] == len(content)
    assert listed["sha256"] == hashlib.sha256(content).hexdigest()
    assert int(listed["crc32"], 16) == checkpoints.zlib.crc32(content)


def test_other_threads_are_said(store, monkeypatch):
    save(store, 1)
    found = store.latest()
    assert found.changes() == []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    assert found.changes() == [f"threads: {found.manifest['threads']} then, 99 now"]


def test_specs_come_from_the_header(store):
    save(store, 1)
    specs = store.latest().specs("model")
    assert specs == {"in.weight": Spec((3, 4), torch.float32), "in.bias": Spec((3,), torch.float32)}


def test_a_group_that_is_not_there_is_named(store):
    save(store, 1)
    with pytest.raises(ModelFileError, match=r"has no 'ema-0.5' \(it has ema-0.9999, model\)"):
        store.latest().tensors("ema-0.5")


def test_steps_beyond_eight_digits_are_in_order(store):
    save(store, 99_999_999, 100_000_000)
    assert store.latest().step == 100_000_000


# What is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_tensor_that_is_not_finite_is_refused(store, value, dtype):
    save(store, 1)
    before = tree(store.folder)
    bad = {"model": {"fine": torch.ones(3), "broken": torch.tensor([1.0, value, 2.0], dtype=dtype)}}
    with pytest.raises(NonFiniteError, match="step 2: model/broken has 1 NaN or infinite numbers of 3") as caught:
        store.save(2, bad, {})
    assert caught.value.exit_code == 5
    assert tree(store.folder) == before


def test_cancelling_infinities_and_overflowing_sums_do_not_deceive():
    assert nonfinite(torch.tensor([float("inf"), -float("inf")])) == 2
    assert nonfinite(torch.full((100,), 6e4, dtype=torch.float16)) == 0
    assert nonfinite(torch.tensor([float("nan")]).to(torch.float8_e4m3fn)) == 1
    assert nonfinite(torch.tensor([2**62])) == 0


@pytest.mark.parametrize(
    ("record", "error", "message"),
    [
        ({"best": float("inf")}, NonFiniteError, "record.best is inf"),
        ({"loss": [1.0, float("nan")]}, NonFiniteError, r"record.loss\[1\] is nan"),
        ({"epochs": {3: 1}}, TypeError, "record.epochs has the key 3"),
        ({"rng": torch.zeros(1)}, TypeError, "record.rng is a Tensor"),
        ({"path": os}, TypeError, "record.path is a module"),
    ],
)
def test_a_record_that_json_does_not_hold_is_refused(store, record, error, message):
    with pytest.raises(error, match=message):
        store.save(1, tensors(1), record)
    assert os.listdir(store.folder) == []


@pytest.mark.parametrize(
    ("group", "tensor"),
    [
        ("../model", torch.ones(1)),
        (".model", torch.ones(1)),
        ("model", torch.ones(2, 2).to_sparse()),
        ("model", torch.ones(2, dtype=torch.complex64)),
        ("model", torch.ones(2, device="meta")),
    ],
)
def test_what_the_format_has_no_place_for_is_refused(store, group, tensor):
    with pytest.raises(UsageError, match=r"step 1: .*cannot"):
        store.save(1, {group: {"w": tensor}}, {})
    assert os.listdir(store.folder) == []


@pytest.mark.parametrize("keep", [1, 0, -1])
def test_fewer_than_two_kept_is_refused(tmp_path, keep):
    with pytest.raises(UsageError, match=f"keep is {keep}; keep at least 2") as caught:
        CheckpointStore(tmp_path, keep=keep)
    assert caught.value.exit_code == 2


def test_a_negative_step_is_refused(store):
    with pytest.raises(UsageError, match="-1"):
        save(store, -1)


# What is damaged ------------------------------------------------------------------------------


def truncate(path):
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(content[:-5])


def newer(path):
    manifest = json.loads((path / "manifest.json").read_bytes())
    (path / "manifest.json").write_text(json.dumps(manifest | {"format": 2, "blocks": []}))


def replace_by_a_file(path):
    for file in path.iterdir():
        file.unlink()
    path.rmdir()
    path.write_text("not a folder")


def link_out(path):
    (path.parent / "elsewhere").write_bytes((path / "model.safetensors").read_bytes())
    (path / "model.safetensors").unlink()
    (path / "model.safetensors").symlink_to(path.parent / "elsewhere")


DAMAGE = {
    "a flipped bit in a weight": (lambda p: flip(p / "model.safetensors"), "model.safetensors is damaged"),
    "a flipped bit in an average": (lambda p: flip(p / "ema-0.9999.safetensors"), "ema-0.9999.safetensors is damaged"),
    "a flipped bit in the record": (lambda p: flip(p / "state.json", 3), "state.json is damaged"),
    "a flipped bit in the manifest": (lambda p: flip(p / "manifest.json", 200), "manifest.json is damaged"),
    "truncated": (truncate, r"model.safetensors is truncated: \d+ bytes of \d+"),
    "grown": (lambda p: (p / "state.json").open("a").write(" "), "state.json has grown"),
    "emptied": (lambda p: (p / "model.safetensors").write_bytes(b""), "is truncated: 0 bytes"),
    "manifest missing": (lambda p: (p / "manifest.json").unlink(), "manifest.json is missing"),
    "manifest empty": (lambda p: (p / "manifest.json").write_bytes(b""), "manifest.json is damaged"),
    "model missing": (lambda p: (p / "model.safetensors").unlink(), "model.safetensors is missing"),
    "average missing": (lambda p: (p / "ema-0.9999.safetensors").unlink(), "ema-0.9999.safetensors is missing"),
    "record missing": (lambda p: (p / "state.json").unlink(), "state.json is missing"),
    "extra": (lambda p: (p / "more.safetensors").write_bytes(b"?"), "more.safetensors is not part of it"),
    "newer format": (newer, r"its format 2 is newer than this version's \(1\): update reverie"),
    "a file": (replace_by_a_file, "it is not a folder"),
    "a link": (link_out, "model.safetensors is not a plain file"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_newest_is_named_and_the_next_older_taken(store, kind):
    save(store, 1, 2, 3)
    damage, cause = DAMAGE[kind]
    damage(store.folder / "step-00000003")
    before = tree(store.folder)
    found = store.latest()
    assert holds(found, 2)
    (warning,) = found.warnings
    assert "step-00000003 cannot be used: " in warning
    assert warning.endswith("; step 2 was taken")
    assert re.search(cause, warning), warning
    assert tree(store.folder) == before


@pytest.mark.parametrize("kind", DAMAGE)
def test_if_none_can_be_used_nothing_is_begun_anew(store, kind):
    save(store, 1, 2)
    damage, cause = DAMAGE[kind]
    for name in ("step-00000001", "step-00000002"):
        damage(store.folder / name)
    before = tree(store.folder)
    with pytest.raises(ModelFileError, match=cause) as caught:
        store.latest()
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)
    assert tree(store.folder) == before


def test_every_flipped_bit_is_found(store):
    """200 random bits anywhere in a checkpoint; crc32 alone finds each for certain."""
    save(store, 1)
    path = store.folder / "step-00000001"
    choose = random.Random(0)
    for _ in range(200):
        file = choose.choice(sorted(path.iterdir()))
        position, bit = choose.randrange(file.stat().st_size), choose.randrange(8)
        flip(file, position, bit)
        assert verify(path, thorough=False), (file.name, position, bit)
        flip(file, position, bit)
    assert verify(path) == []


def test_a_change_that_keeps_the_crc_is_found_by_the_sha(store):
    """Which no accident makes: crc32 is linear, so that its own polynomial, 33 bits of it, can be added unseen."""
    path = store.save(1, {"model": {"w": torch.zeros(64, dtype=torch.uint8)}}, {}).path
    file = path / "model.safetensors"
    content = bytearray(file.read_bytes())
    polynomial = 0x1_DB71_0641  # with its leading term, reflected: the least significant bit goes first
    for index, byte in enumerate(polynomial.to_bytes(5, "little")):
        content[-20 + index] ^= byte
    file.write_bytes(content)
    assert verify(path, thorough=False) == []
    assert "model.safetensors is damaged" in verify(path)[0]


def test_hidden_files_of_the_system_do_no_harm(store):
    save(store, 1)
    (store.folder / "step-00000001" / ".DS_Store").write_bytes(b"finder")
    assert store.latest().warnings == ()


def test_a_renamed_checkpoint_is_found_out(store):
    save(store, 1)
    (store.folder / "step-00000001").rename(store.folder / "step-00000900")
    with pytest.raises(ModelFileError, match="it holds step 1: the folder was renamed"):
        store.latest()


@pytest.mark.parametrize(
    "manifest",
    [
        b"[]",
        b"1",
        b"[" * 100_000,
        b'{"format": 1}',
        b'{"format": "1", "crc32": "0"}',
        seal({"format": 1, "step": 1, "files": {"../../outside": {"bytes": 4, "crc32": "0", "sha256": "0"}},
              "code": "", "torch": "", "threads": 1}),
        seal({"format": 1, "step": "1", "files": {}, "code": "", "torch": "", "threads": 1}),
        seal({"format": 1, "step": 1, "files": {"state.json": {"bytes": "4", "crc32": "0", "sha256": "0"}},
              "code": "", "torch": "", "threads": 1}),
        seal({"format": 1, "step": 1, "files": [], "code": "", "torch": "", "threads": 1}),
        seal({"format": -1, "step": 1, "files": {}, "code": "", "torch": "", "threads": 1}),
    ],
)  # fmt: skip
def test_a_hostile_manifest_is_a_damaged_one(store, manifest):
    (store.folder.parent / "outside").write_bytes(b"mine")
    save(store, 1)
    (store.folder / "step-00000001" / "manifest.json").write_bytes(manifest)
    with pytest.raises(ModelFileError, match=r"manifest.json is damaged|outside is missing"):
        store.latest()


def test_a_file_that_is_no_safetensors_file_is_refused_on_reading(store):
    """Its checksums hold, as a stranger may have written both."""
    path = store.save(1, tensors(1), {}).path
    manifest = json.loads((path / "manifest.json").read_bytes())
    del manifest["crc32"]
    (path / "model.safetensors").write_bytes(b"\xff" * 64)
    digest = storage.file_digest(path / "model.safetensors")
    manifest["files"]["model.safetensors"] = checkpoints.asdict(digest)
    (path / "manifest.json").write_bytes(seal(manifest))
    assert verify(path) == []
    with pytest.raises(ModelFileError, match=r"model.safetensors cannot be read: .*; use an older checkpoint"):
        store.latest().tensors("model")


def test_a_read_error_is_a_cause_too(store, monkeypatch):
    save(store, 1, 2)
    digest = storage.file_digest

    def faulty(path, thorough):
        if path.parent.name == "step-00000002":
            raise OSError(errno.EIO, "Input/output error")
        return digest(path, thorough)

    monkeypatch.setattr(checkpoints, "file_digest", faulty)
    found = store.latest()
    assert found.step == 1
    assert "cannot be read: Input/output error" in found.warnings[0]


# No checkpoint at all -------------------------------------------------------------------------


def test_no_checkpoint_is_none_and_not_an_error(tmp_path, store):
    assert CheckpointStore(tmp_path / "missing").latest() is None
    assert not (tmp_path / "missing").exists()
    assert store.latest() is None
    (store.folder / "step-00000001.tmp-999999999").mkdir()
    (store.folder / ".trash-step-00000001-7").mkdir()
    (store.folder / "notes.txt").write_text("mine")
    assert store.latest() is None


def test_a_folder_that_cannot_be_read_is_not_an_empty_one(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(ModelFileError, match="cannot be read: Not a directory"):
        CheckpointStore(tmp_path / "checkpoints").latest()


# A disk that refuses --------------------------------------------------------------------------


def nth_put_fails(monkeypatch, nth: int) -> list[str]:
    """Let the disk fill up at the nth write, in its middle; return the names written to."""
    put, written = storage.put, []

    def put_or_fail(file, data):
        written.append(os.path.basename(file.name))
        if len(written) > nth:
            put(file, memoryview(data)[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        put(file, data)

    monkeypatch.setattr(storage, "put", put_or_fail)
    return written


def refusal(store: CheckpointStore, step: int) -> StorageError | None:
    """Why a step could not be saved, if it could not."""
    try:
        save(store, step)
    except StorageError as error:
        return error
    return None


def test_a_disk_that_fills_up_at_any_write_costs_nothing(store):
    """Byte 0, each tensor, each header, the record, the manifest: every write of a save fails once."""
    save(store, 1, 2, 3)
    before = tree(store.folder)
    failed_in = set()
    for nth in range(100):
        with pytest.MonkeyPatch.context() as patch:
            written = nth_put_fails(patch, nth)
            error = refusal(store, 4)
        if error is None:
            break
        failed_in.add(written[-1])
        assert tree(store.folder) == before
        assert len(os.listdir(store.folder)) == 3
        assert "step-00000004: no space left on device (" in str(error)
        assert "needed" in str(error)
        assert " free)" in str(error)
        assert error.exit_code == 6
    assert failed_in == {"model.safetensors", "ema-0.9999.safetensors", "state.json", "manifest.json"}
    assert nth > 6
    assert holds(store.latest(), 4)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
@pytest.mark.parametrize("place", ["rename", "sync_folder", "fsync", "mkdir"])
def test_a_disk_that_refuses_anything_else_costs_nothing(store, monkeypatch, code, place):
    save(store, 1, 2)
    before = tree(store.folder)
    where = {
        "rename": (storage, "rename"),
        "sync_folder": (checkpoints, "sync_folder"),
        "fsync": (os, "fsync"),
        "mkdir": (checkpoints.Path, "mkdir"),
    }
    with monkeypatch.context() as patch:
        patch.setattr(*where[place], fail(code))
        with pytest.raises(StorageError, match=r"cannot write .*step-00000003: "):
            save(store, 3)
    assert tree(store.folder) == before
    assert len(os.listdir(store.folder)) == 2
    save(store, 3)
    assert holds(store.latest(), 3)


def test_what_is_read_back_otherwise_is_not_saved(store, monkeypatch):
    """A disk, or a memory, that changes one bit on the way: found before the checkpoint is seen by anyone."""
    save(store, 1, 2, 3)
    before = tree(store.folder)
    put = storage.put

    def faulty(file, data):
        data = bytearray(data)
        if os.path.basename(file.name) == "model.safetensors":
            data[-1] ^= 16
        put(file, bytes(data))

    monkeypatch.setattr(storage, "put", faulty)
    with pytest.raises(StorageError, match=r"not read back as it was: model.safetensors is damaged"):
        save(store, 4)
    assert tree(store.folder) == before


def test_a_name_that_may_not_be_durable_is_an_error_though_the_checkpoint_is_whole(store, monkeypatch):
    save(store, 1, 2, 3)
    sync = storage.sync_folder

    def refuse(folder):
        if folder == store.folder:
            raise OSError(errno.EIO, "Input/output error")
        sync(folder)

    monkeypatch.setattr(checkpoints, "sync_folder", refuse)
    with pytest.raises(StorageError, match="the disk reports a fault"):
        save(store, 4)
    assert [open_checkpoint(path).step for path in store.candidates()] == [4, 3, 2, 1]  # none was deleted for it


def test_a_folder_that_vanished_is_not_made_anew(store):
    save(store, 1)
    store.folder.rename(store.folder.with_name("unmounted"))
    with pytest.raises(StorageError, match="the folder is gone: is its disk still mounted"):
        save(store, 2)
    assert not store.folder.exists()


def test_an_interrupted_save_leaves_nothing(store, monkeypatch):
    save(store, 1)
    before = os.listdir(store.folder)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(storage, "put", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(store, 2)
    assert os.listdir(store.folder) == before


# Retention ------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [2, 3, 5])
def test_the_newest_good_ones_are_kept(tmp_path, keep):
    store = CheckpointStore(tmp_path, keep=keep)
    save(store, *range(10, 80, 10))
    assert sorted(os.listdir(tmp_path)) == [f"step-{step:08d}" for step in range(80 - 10 * keep, 80, 10)]


def test_bad_ones_do_not_count(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    save(store, 1, 2)
    flip(tmp_path / "step-00000002" / "model.safetensors")
    save(store, 3)
    assert (tmp_path / "step-00000001").exists()
    good = [path.name for path in store.candidates() if not verify(path)]
    assert good == ["step-00000003", "step-00000001"]
    save(store, 4)
    assert [path.name for path in store.candidates()] == ["step-00000004", "step-00000003"]


def test_nothing_is_deleted_before_the_new_one_is_whole_and_in_place(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path, keep=2)
    save(store, 1, 2)
    events = []
    for name in ("rename", "remove_folder"):
        original = getattr(storage, name)

        def spy(*paths, name=name, original=original):
            events.append((name, paths[0].name.split(".tmp")[0], [p.name for p in store.candidates() if not verify(p)]))
            original(*paths)

        monkeypatch.setattr(storage, name, spy)
    save(store, 3)
    assert [event[:2] for event in events] == [
        ("rename", "step-00000003"),
        ("rename", "step-00000001"),
        ("remove_folder", f".trash-step-00000001-{os.getpid()}"),
    ]
    assert min(len(good) for _, _, good in events) == 2


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="the names of open files are Linux's to tell")
def test_each_thing_is_durable_before_the_next_begins(tmp_path, monkeypatch):
    """Files, manifest last, then their folder, the rename, the parent; a deletion after all that."""
    store = CheckpointStore(tmp_path, keep=2)
    save(store, 1, 2)
    events, fsync, rename = [], os.fsync, storage.rename

    def spy(handle):
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", spy)
    monkeypatch.setattr(storage, "rename", lambda *paths: (events.append("rename"), rename(*paths)))
    save(store, 3)
    assert events == [
        "model.safetensors", "ema-0.9999.safetensors", "state.json", "manifest.json",
        f"step-00000003.tmp-{os.getpid()}", "rename", tmp_path.name, "rename",
    ]  # fmt: skip


@pytest.mark.parametrize("broken", ["rename", "remove_folder"])
def test_a_failed_deletion_is_a_warning(tmp_path, monkeypatch, broken):
    store = CheckpointStore(tmp_path, keep=2)
    save(store, 1, 2)
    original = getattr(storage, broken)

    def refuse(path, *rest):
        if "00000001" in path.name:
            raise OSError(errno.EACCES, "Permission denied")
        original(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(storage, broken, refuse)
        (warning,) = save(store, 3)
        assert "step-00000001 could not be deleted: Permission denied; delete it by hand" in warning
        assert store.latest().step == 3
    assert save(store, 4) == []  # what could not go then goes now
    assert sorted(os.listdir(tmp_path)) == ["step-00000003", "step-00000004"]


def test_a_step_saved_twice_is_never_gone_in_between(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path, keep=2)
    save(store, 1, 2)
    rename, seen = storage.rename, []

    def watch(source, target):
        rename(source, target)
        seen.append(store.latest().step)

    monkeypatch.setattr(storage, "rename", watch)
    store.save(2, tensors(5), {"step": "again"})
    assert seen == [2, 2]
    assert store.latest().record == {"step": "again"}
    assert sorted(os.listdir(tmp_path)) == ["step-00000001", "step-00000002-2"]
    save(store, 2, 3)
    assert sorted(os.listdir(tmp_path)) == ["step-00000002-3", "step-00000003"]


def test_a_damaged_one_does_not_stand_in_the_way_of_its_step(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    save(store, 1, 2)
    flip(tmp_path / "step-00000002" / "model.safetensors")
    assert store.latest().step == 1
    save(store, 2)
    assert holds(store.latest(), 2)
    assert store.latest().warnings == ()


def test_the_one_just_saved_stays_whatever_lies_there(tmp_path):
    """Newer steps of another history are older files: the new one is not the one to go."""
    store = CheckpointStore(tmp_path, keep=2)
    save(store, 100, 200, 50)
    assert holds(open_checkpoint(tmp_path / "step-00000050"), 50)


def test_the_clock_decides_nothing(tmp_path, monkeypatch):
    """Set back a day, then forward a year; all times equal: the step alone counts."""
    store = CheckpointStore(tmp_path, keep=2)
    now = time.time()
    for step, shift in ((1, 0), (2, -86_400), (3, 3e7), (4, -86_400)):
        monkeypatch.setattr(time, "time", lambda shift=shift: now + shift)
        save(store, step)
        for path in tmp_path.rglob("*"):
            os.utime(path, (1e9 - step, 1e9 - step))
    assert sorted(os.listdir(tmp_path)) == ["step-00000003", "step-00000004"]
    for path in tmp_path.rglob("*"):
        os.utime(path, (1e9, 1e9))
    assert holds(store.latest(), 4)


# What a dead process left ---------------------------------------------------------------------


def test_leavings_of_the_dead_go_at_the_next_save_and_those_of_the_living_stay(store):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for name in (f"step-00000009.tmp-{dead.pid}", f"step-00000009.tmp-{os.getpid()}", f"step-00000008.tmp-{2**70}"):
        (store.folder / name).mkdir()
        (store.folder / name / "model.safetensors").write_bytes(b"half")
    living = f"step-00000009.tmp-{os.getppid()}"
    (store.folder / living).mkdir()
    (store.folder / ".trash-step-00000001-4").mkdir()
    (store.folder / ".trash-of-mine").mkdir()
    assert store.latest() is None
    assert save(store, 1) == []
    assert sorted(os.listdir(store.folder)) == [".trash-of-mine", "step-00000001", living]


KILLED = """
import json, os, random, sys, time
import torch
from reverie.models.checkpoints import CheckpointStore, verify

def content(step):
    weights = torch.arange(30000.0) * step
    return {"model": {"w": weights}, "ema-0.9999": {"w": weights / 2}, "optimizer": {"w/step": torch.tensor(step)}}

def train(store, report):
    found = store.latest()
    step = found.step if found else 0
    while True:
        step += 1
        store.save(step, content(step), {"step": step})
        os.write(report, b"%d\\n" % step)

torch.set_num_threads(1)
choose = random.Random(0)
store = CheckpointStore(sys.argv[1], keep=2)
store.prepare()
trial = CheckpointStore(sys.argv[1] + "-trial", keep=2)
trial.prepare()
begun = time.monotonic()
for step in range(4):
    trial.save(step, content(step), {"step": step})
longest = 3 * (time.monotonic() - begun) / 4
midway, step, least = 0, 0, int(sys.argv[2])
for round in range(10 * least):
    if round >= least and midway >= 4 and step >= 5:
        break
    listen, report = os.pipe()
    child = os.fork()
    if not child:
        try:
            train(store, report)
        finally:
            os._exit(1)
    os.close(report)
    time.sleep(choose.uniform(0, longest))
    os.kill(child, 9)
    assert os.waitpid(child, 0)[1] == 9, "the child ended by itself"
    with os.fdopen(listen, "rb") as told:
        reported = [int(line) for line in told]
    longest *= 1 if reported else 1.1  # the machine may be slower by now
    midway += any(".tmp-" in name for name in os.listdir(store.folder))
    found = store.latest()
    saved = max(reported, default=step)
    assert (found.step if found else 0) in (saved, saved + 1), (found, saved)
    step = found.step if found else 0
    assert not [path for path in store.candidates() if verify(path)]
    assert len(store.candidates()) >= min(2, step)
    if found:
        assert found.record == {"step": step}
        for group, named in content(step).items():
            for name, tensor in named.items():
                assert torch.equal(found.tensors(group)[name], tensor)
store.save(step + 1, content(step + 1), {"step": step + 1})
print(json.dumps({"midway": midway, "step": step, "left": sorted(os.listdir(store.folder))}))
"""


def test_kill_9_at_random_moments(tmp_path):
    """20 processes or more that save in a loop, each killed somewhere: what was reported saved is there, and whole."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "checkpoints"), "20"],
        capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["midway"] >= 4, result  # the kills did hit saves
    assert result["step"] >= 5, result  # and saves did finish
    assert result["left"] == [f"step-{result['step']:08d}", f"step-{result['step'] + 1:08d}"]


# Tensors that fit -----------------------------------------------------------------------------


def test_tensors_that_do_not_fit_are_listed_and_counted():
    model = {f"layer{i}.weight": torch.zeros(4, 4) for i in range(6)} | {"scale": torch.zeros(2)}
    file = {f"layer{i}.weight": torch.zeros(2, 4) for i in range(5)} | {
        "scale": torch.zeros(2).half(),
        "old": torch.zeros(1),
    }
    with pytest.raises(ModelFileError) as caught:
        check_tensors(model, file, "runs/a (model)")
    assert str(caught.value) == (
        "runs/a (model): 8 of 8 tensors do not fit: layer0.weight is float32 (2, 4), not float32 (4, 4); "
        "layer1.weight is float32 (2, 4), not float32 (4, 4); layer2.weight is float32 (2, 4), not float32 (4, 4); "
        "and 5 more; build the model as it was, or use another file"
    )
    with pytest.raises(ModelFileError, match="1 of 7 tensors do not fit: scale is float16"):
        check_tensors(model, model | {"scale": Spec((2,), torch.float16)})
    with pytest.raises(ModelFileError, match="1 of 7 tensors do not fit: scale is missing"):
        check_tensors(model, {name: tensor for name, tensor in model.items() if name != "scale"})
    check_tensors(model, dict(reversed(model.items())))
