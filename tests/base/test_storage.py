"""Files that were written or were not, and errors that say why."""

import errno
import os
import subprocess
import sys

import pytest

from reverie.base import storage
from reverie.base.errors import StorageError
from reverie.base.storage import CHUNK, file_digest, free_bytes, probe, put, storage_error, write_file


def refusing(code, after=0):
    """A `put` that fails with an error number once it has taken so many bytes."""
    taken = 0

    def broken(file, data):
        nonlocal taken
        room = after - taken
        if len(data) > room:
            put(file, memoryview(data)[: max(room, 0)])
            raise OSError(code, os.strerror(code))
        taken += len(data)
        put(file, data)

    return broken


def test_a_file_is_written_and_summed_up(tmp_path):
    path = tmp_path / "weights"
    content = bytes(range(256)) * (CHUNK // 100)  # several chunks, the last one short
    written = write_file(path, content)
    assert path.read_bytes() == content
    assert written == file_digest(path)
    assert written.bytes == len(content)
    assert os.listdir(tmp_path) == ["weights"]


def test_a_function_may_write_the_file(tmp_path):
    def content(writer):
        writer.write(b"dig")
        writer.write(memoryview(b"its"))

    assert write_file(tmp_path / "a", content) == write_file(tmp_path / "b", b"digits")
    assert (tmp_path / "a").read_bytes() == b"digits"


@pytest.mark.parametrize("after", [0, 3, CHUNK + 5])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG, errno.EIO])
def test_what_the_disk_refuses_leaves_the_old_file(tmp_path, monkeypatch, code, after):
    path = tmp_path / "config.json"
    write_file(path, b"old")
    monkeypatch.setattr(storage, "put", refusing(code, after))
    with pytest.raises(StorageError) as caught:
        write_file(path, bytes(2 * CHUNK))
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["config.json"]
    message = str(caught.value)
    assert str(path) in message
    assert "8.4 MB needed" in message
    assert " free" in message
    assert "folder" in message  # what to do
    assert "\n" not in message
    assert caught.value.exit_code == 6


@pytest.mark.parametrize("broken", ["rename", "fsync"])
def test_a_failed_rename_or_flush_leaves_the_old_file(tmp_path, monkeypatch, broken):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "config.json"
    write_file(path, b"old")
    monkeypatch.setattr(*((storage, "rename") if broken == "rename" else (os, "fsync")), fail)
    with pytest.raises(StorageError, match=r"no space left on device \(3 bytes needed, .* free\); free some space"):
        write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["config.json"]


def test_an_interrupt_leaves_nothing_beside_the_file(tmp_path, monkeypatch):
    def interrupted(file, data):
        raise KeyboardInterrupt

    monkeypatch.setattr(storage, "put", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_file(tmp_path / "config.json", b"new")
    assert os.listdir(tmp_path) == []


def test_a_real_limit_of_the_system_is_reported(tmp_path):
    """RLIMIT_FSIZE, in a process of its own: the error comes from the kernel, in the middle of a write."""
    script = (
        "import resource, sys; from pathlib import Path; from reverie.base.storage import write_file\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))\n"
        "try: write_file(Path(sys.argv[1]), bytes(20000))\n"
        "except Exception as error: print(type(error).__name__, error.exit_code, error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "big")], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.startswith("StorageError 6 cannot write "), done.stderr
    assert "ulimit -f" in done.stdout
    assert "20.0 kB needed" in done.stdout
    assert os.listdir(tmp_path) == []


def test_a_missing_folder_is_not_made_again(tmp_path):
    """A folder that was there at the start and is gone is an unmounted disk, not a folder to make."""
    with pytest.raises(StorageError, match="is its disk still mounted"):
        write_file(tmp_path / "gone" / "config.json", b"{}")
    assert os.listdir(tmp_path) == []


def test_the_cause_is_kept_and_an_error_is_not_wrapped_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "put", refusing(errno.ENOSPC))
    with pytest.raises(StorageError) as caught, storage.guarded(tmp_path / "outer"):
        write_file(tmp_path / "inner", b"new")
    assert "inner" in str(caught.value)
    assert caught.value.__cause__.errno == errno.ENOSPC


def test_an_unknown_error_still_speaks(tmp_path):
    message = str(storage_error(OSError("odd"), tmp_path))
    assert message.startswith(f"cannot write {tmp_path}: odd (")
    assert message.endswith("choose another folder")


def test_free_space_of_a_path_that_is_not_there_yet(tmp_path):
    assert free_bytes(tmp_path / "a" / "b") > 0


def test_put_writes_all_of_it_to_a_file_that_takes_little(tmp_path):
    class Narrow:
        def __init__(self):
            self.got = b""

        def write(self, data):
            self.got += bytes(data[:3])
            return min(3, len(data))

    narrow = Narrow()
    put(narrow, b"0123456789")
    assert narrow.got == b"0123456789"


# The probe ------------------------------------------------------------------------------------


def test_the_probe_makes_the_folder_and_leaves_it_empty(tmp_path):
    probe(tmp_path / "runs" / "digits")
    assert os.listdir(tmp_path / "runs" / "digits") == []


@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC, errno.EACCES])
@pytest.mark.parametrize("broken", ["put", "rename", "remove_folder"])
def test_a_probe_that_fails_says_so_and_takes_back_what_it_made(tmp_path, monkeypatch, code, broken):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(storage, broken, fail)
    folder = tmp_path / "runs" / "digits"
    with pytest.raises(StorageError, match=f"cannot write {folder}: "):
        probe(folder)
    assert os.listdir(tmp_path) == []


def test_a_probe_below_a_file_is_refused(tmp_path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(StorageError, match="a part of the path is a file"):
        probe(tmp_path / "notes" / "run")
    assert (tmp_path / "notes").read_text() == "mine"


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="/proc is Linux's")
def test_a_folder_where_nobody_may_write_is_found_out():
    """/proc refuses every user, root too."""
    with pytest.raises(StorageError) as caught:
        probe("/proc/reverie")
    assert caught.value.exit_code == 6
