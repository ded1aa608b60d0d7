"""What is free: the least of what machine, container and process allow."""

import pytest
import torch

from reverie.base.errors import OutOfMemoryError
from reverie.models import memory
from reverie.models.memory import check_memory, free_memory, memory_errors

CPU = torch.device("cpu")


def test_the_machines_own_figure(monkeypatch, tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable:   50 kB\n")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CGROUP", tmp_path / "none")
    monkeypatch.setattr(memory, "address_space_free", lambda: None)
    assert free_memory(CPU) == 50 * 1024
    (tmp_path / "memory.max").write_text("30000\n")
    (tmp_path / "memory.current").write_text("12000\n")
    (tmp_path / "memory.stat").write_text("anon 3\ninactive_file 500\n")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert free_memory(CPU) == 18_500
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(CPU) == 50 * 1024
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "gone")
    assert free_memory(CPU) is None
    check_memory(10**30, CPU, "all", "n")  # nothing is known, so nothing is refused


def test_a_limit_of_the_process_counts():
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = memory.numbers(memory.Path("/proc/self/status"))["VmSize"]
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, hard))
    try:
        assert 2**29 < memory.address_space_free() <= 2**30
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_the_message_has_the_numbers(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 2 * 10**9)
    check_memory(2 * 10**9, CPU, "x", "n")
    with pytest.raises(
        OutOfMemoryError, match=r"x would take 5\.0 GB at the least, and 2\.0 GB are free; lower n"
    ) as caught:
        check_memory(5 * 10**9, CPU, "x", "n")
    assert caught.value.exit_code == 7


def test_only_failed_allocations_are_of_memory():
    with pytest.raises(OutOfMemoryError, match=r"not enough memory for x .*lower n"), memory_errors("x", "n"):
        torch.empty(2**59)
    with pytest.raises(OutOfMemoryError, match="not enough memory"), memory_errors("x", "n"):
        raise MemoryError
    with pytest.raises(RuntimeError, match="other"), memory_errors("x", "n"):
        raise RuntimeError("other")
