"""One run in a folder, whatever becomes of it."""

import errno
import importlib.util
import json
import os
import signal
import subprocess
import sys
import types

import pytest

from reverie.base import lock
from reverie.base.errors import StorageError, UsageError
from reverie.base.lock import NAME, RunLock
from reverie.base.storage import alive

HOLDER = """
import sys, time
from reverie.base.lock import RunLock
with RunLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder until its standard input closes."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_run_is_told_who_holds_the_folder(tmp_path, holder):
    since = json.loads((tmp_path / NAME).read_bytes())["since"]
    with pytest.raises(UsageError) as caught, RunLock(tmp_path):
        pass
    assert f"{tmp_path} is in use by pid {holder.pid} since {since}; " in str(caught.value)
    assert caught.value.exit_code == 2
    assert json.loads((tmp_path / NAME).read_bytes())["pid"] == holder.pid  # the asking changed nothing


def test_kill_9_frees_the_folder_and_the_stale_file_is_taken_over(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert json.loads((tmp_path / NAME).read_bytes())["pid"] == holder.pid
    with RunLock(tmp_path):
        assert json.loads((tmp_path / NAME).read_bytes())["pid"] == os.getpid()


def test_a_run_that_ends_frees_the_folder(tmp_path, holder):
    holder.communicate()
    assert (tmp_path / NAME).read_bytes() == b""
    with RunLock(tmp_path):
        pass


def test_the_same_process_is_another_run_too(tmp_path):
    with RunLock(tmp_path):
        with pytest.raises(UsageError, match=f"in use by pid {os.getpid()} since 20"), RunLock(tmp_path):
            pass
        with pytest.raises(UsageError), RunLock(tmp_path):  # the refusal has not freed it
            pass
    with RunLock(tmp_path):
        pass


def test_an_error_inside_frees_the_folder(tmp_path):
    with pytest.raises(ZeroDivisionError), RunLock(tmp_path):
        raise ZeroDivisionError
    with RunLock(tmp_path):
        pass


def test_a_worker_that_outlives_its_killed_parent_does_not_hold_its_lock(tmp_path):
    """A forked child has a copy of the open file, and with it the lock, unless it closes its copy."""
    script = (
        "import os, sys, time; from reverie.base.lock import RunLock\n"
        "with RunLock(sys.argv[1]):\n"
        "    worker = os.fork()\n"
        "    if not worker: print(os.getpid(), flush=True); time.sleep(60); os._exit(0)\n"
        "    time.sleep(60)\n"
    )
    run = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    worker = int(run.stdout.readline())  # said by the worker: its copy is closed by then
    try:
        with pytest.raises(UsageError), RunLock(tmp_path):
            pass
        run.kill()
        run.wait()
        assert alive(worker)
        with RunLock(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)
        run.stdout.close()


def test_a_worker_that_leaves_the_block_leaves_the_lock(tmp_path):
    with RunLock(tmp_path) as held:
        worker = os.fork()
        if not worker:
            held.__exit__(None, None, None)
            os._exit(0)
        os.waitpid(worker, 0)
        with pytest.raises(UsageError, match=f"pid {os.getpid()}"), RunLock(tmp_path):
            pass


@pytest.mark.parametrize("content", [b"", b"half a", b"[]", b"{}", b'{"pid": 1}'])
def test_what_the_file_says_decides_nothing(tmp_path, content):
    (tmp_path / NAME).write_bytes(content)
    with RunLock(tmp_path):
        (tmp_path / NAME).write_bytes(content)
        with pytest.raises(UsageError, match="in use by another process; "), RunLock(tmp_path):
            pass


def test_a_holder_on_another_machine_is_named(tmp_path):
    with RunLock(tmp_path):
        (tmp_path / NAME).write_text('{"pid": 7, "since": "2026-11-21 07:43:15", "host": "node3"}')
        with pytest.raises(UsageError, match="pid 7 on node3 since 2026-11-21 07:43:15"), RunLock(tmp_path):
            pass


def test_a_folder_that_is_not_there_or_not_writable_is_a_storage_error(tmp_path, monkeypatch):
    with pytest.raises(StorageError, match="the folder is gone"), RunLock(tmp_path / "missing"):
        pass

    def refuse(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(StorageError, match="read-only file system"), RunLock(tmp_path):
        pass


def test_a_file_system_without_locks_is_a_storage_error(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock, "take", refuse)
    with pytest.raises(StorageError, match="no locks available"), RunLock(tmp_path):
        pass
    assert not lock.held


def test_without_fcntl_msvcrt_locks(tmp_path, monkeypatch):
    """Windows' module, played: it locks a byte of an open file, and says EACCES where another has it."""
    locked = set()

    def locking(handle, mode, count):
        assert (mode, count) == (2, 1)
        place = (os.fstat(handle).st_ino, os.lseek(handle, 0, os.SEEK_CUR))
        if place in locked:
            raise OSError(errno.EACCES, "Permission denied")
        locked.add(place)

    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", types.SimpleNamespace(locking=locking, LK_NBLCK=2))
    spec = importlib.util.spec_from_file_location("lock_on_windows", lock.__file__)
    windows = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(windows)
    with windows.RunLock(tmp_path):
        assert json.loads((tmp_path / NAME).read_bytes())["pid"] == os.getpid()
        with pytest.raises(UsageError, match=f"in use by pid {os.getpid()}"), windows.RunLock(tmp_path):
            pass
