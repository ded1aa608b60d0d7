"""Stopping between steps, at once, and never in a save."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from reverie.base.errors import Stopped
from reverie.training.signals import StopRequest

HEARD = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(autouse=True)
def handlers():
    """Whatever a test does, the handlers are as before."""
    before = [signal.getsignal(signum) for signum in HEARD]
    yield
    assert [signal.getsignal(signum) for signum in HEARD] == before


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks(signum):
    steps = 0
    with StopRequest() as stop:
        assert not stop
        while not stop:
            steps += 1
            if steps == 3:
                os.kill(os.getpid(), signum)
                done = "the step is finished"
    assert done
    assert steps == 3
    assert stop.signum == signum
    error = Stopped("saved step 3, resume with --resume", stop.signum)
    assert error.exit_code == 128 + signum


def signalled(*signums: int) -> StopRequest:
    """Hear signals, one after the other, in a block that would go on."""
    with StopRequest() as stop:
        for signum in signums:
            signal.raise_signal(signum)
    return stop


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_after_a_request_insists(first):
    with pytest.raises(Stopped, match="stopped at once by a second interrupt") as caught:
        signalled(first, signal.SIGINT)
    assert caught.value.exit_code == 130
    assert isinstance(caught.value.__cause__, KeyboardInterrupt)


def test_an_insisting_interrupt_does_not_wait_for_the_step():
    reached = []

    def run():
        with StopRequest():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            reached.append("the end of the step")

    with pytest.raises(Stopped):
        run()
    assert not reached


def test_further_terminates_only_repeat():
    assert signalled(signal.SIGTERM, signal.SIGTERM).signum == signal.SIGTERM
    assert signalled(signal.SIGINT, signal.SIGTERM).signum == signal.SIGINT


def test_an_insisting_interrupt_waits_for_the_save():
    done = []

    def run():
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGINT)
            with stop.saving():
                with stop.saving():
                    signal.raise_signal(signal.SIGINT)
                    done.append("inner")
                done.append("outer")
            done.append("after")

    with pytest.raises(Stopped):
        run()
    assert done == ["inner", "outer"]


def test_a_first_interrupt_in_a_save_asks():
    with StopRequest() as stop:
        with stop.saving():
            signal.raise_signal(signal.SIGINT)
        assert stop.signum == signal.SIGINT


def test_an_error_in_a_save_comes_through():
    def run():
        with StopRequest() as stop, stop.saving():
            signal.raise_signal(signal.SIGINT)
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        run()


def test_a_keyboard_interrupt_of_someone_else_stays_one():
    with pytest.raises(KeyboardInterrupt), StopRequest():
        raise KeyboardInterrupt


def test_a_closed_terminal_is_noted():
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGHUP)
        assert not stop
    assert stop.notes == ["the terminal is gone (SIGHUP); the run goes on"]


def test_previous_handlers_come_back():
    def mine(signum, frame):
        pass

    def run():
        with StopRequest():
            assert signal.getsignal(signal.SIGTERM) is not mine
            raise ValueError("inside")

    before = signal.signal(signal.SIGTERM, mine)
    ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with pytest.raises(ValueError, match="inside"):
            run()
        assert signal.getsignal(signal.SIGTERM) is mine
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGHUP, ignored)


def test_in_another_thread_nothing_is_installed():
    seen = []

    def work():
        with StopRequest() as stop:
            seen.append([signal.getsignal(signum) for signum in HEARD])
            stop.request()
            seen.append(stop.signum)

    before = [signal.getsignal(signum) for signum in HEARD]
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before, signal.SIGTERM]


RUN = """
import sys, time
from pathlib import Path
from reverie.base.errors import ReverieError, Stopped
from reverie.base import storage
from reverie.training.signals import StopRequest

put = storage.put
def slow(file, data):
    print("saving", flush=True)
    for part in range(0, len(data), 100):
        put(file, data[part:part + 100])
        time.sleep(0.01)
storage.put = slow

folder, saves = Path(sys.argv[1]), sys.argv[2] == "saves"
step = 0
try:
    with StopRequest() as stop:
        print("ready", flush=True)
        while True:
            step += 1
            time.sleep(0.01)
            if stop or (saves and step == 1):
                with stop.saving():
                    storage.write_file(folder / "state", str(step % 10).encode() * 2000)
            if stop:
                raise Stopped(f"saved step {step}, go on with --resume", stop.signum)
except ReverieError as error:
    print(error)
    sys.exit(error.exit_code)
"""


@pytest.mark.parametrize(
    ("when", "sent", "code", "said"),
    [
        ("steps", [signal.SIGINT], 130, "saved step"),
        ("steps", [signal.SIGTERM], 143, "saved step"),
        ("saves", [signal.SIGTERM], 143, "saved step 1,"),
        ("saves", [signal.SIGINT, signal.SIGINT], 130, "stopped at once"),
        ("saves", [signal.SIGHUP, signal.SIGTERM], 143, "saved step 1,"),
    ],
)
def test_a_process_ends_as_it_should(tmp_path, when, sent, code, said):
    """Signals in a step and in the middle of a save: the file is whole, the exit code is the signal's."""
    run = subprocess.Popen([sys.executable, "-c", RUN, str(tmp_path), when], stdout=subprocess.PIPE, text=True)
    while run.stdout.readline() != ("saving\n" if when == "saves" else "ready\n"):
        assert run.poll() is None
    for signum in sent:
        run.send_signal(signum)
        time.sleep(0.03)
    rest, _ = run.communicate(timeout=30)
    assert run.returncode == code
    assert rest.splitlines()[-1].startswith(said)
    content = (tmp_path / "state").read_bytes()
    assert len(content) == 2000
    assert len(set(content)) == 1
    assert os.listdir(tmp_path) == ["state"]
