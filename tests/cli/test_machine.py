"""What the machine is: read from what the system says."""

from importlib import metadata

import pytest

from reverie.cli import machine

CPUINFO = """processor\t: 0
model name\t: Some CPU @ 2.50GHz
flags\t\t: fpu sse2 avx2 avx512f avx512_bf16 amx_bf16 amx_tile

processor\t: 1
model name\t: Another
flags\t\t: fpu
"""


def test_the_first_core_speaks_for_all(tmp_path):
    path = tmp_path / "cpuinfo"
    path.write_text(CPUINFO)
    info = machine.cpu_info(path)
    assert info["model name"] == "Some CPU @ 2.50GHz"
    assert machine.instructions(info) == ["AVX2", "AVX-512", "AVX-512 BF16", "AMX BF16"]


def test_arm_says_features():
    assert machine.instructions({"Features": "fp asimd sve bf16"}) == ["NEON", "SVE", "ARM BF16"]


def test_a_system_without_cpuinfo(tmp_path, monkeypatch):
    monkeypatch.setattr(machine.platform, "system", lambda: "Windows")
    assert machine.cpu_info(tmp_path / "none") == {}
    monkeypatch.setattr(machine.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(machine, "said", lambda command: {"machdep.cpu.brand_string": "Chip"}.get(command[2], "AVX2"))
    assert machine.cpu_info(tmp_path / "none") == {"model name": "Chip", "flags": "avx2"}


def test_memory_within_the_containers_limit(tmp_path):
    info, limit = tmp_path / "meminfo", tmp_path / "memory.max"
    info.write_text("MemTotal:    8000 kB\nMemFree:   100 kB\nMemAvailable:    6000 kB\n")
    assert machine.memory(info, limit) == (8000 * 1024, 6000 * 1024)
    limit.write_text("max\n")
    assert machine.memory(info, limit) == (8000 * 1024, 6000 * 1024)
    limit.write_text("1048576\n")
    assert machine.memory(info, limit) == (1048576, 1048576)
    assert machine.memory(tmp_path / "none", limit) == (0, 0)


def test_a_process_may_take_no_more_than_its_own_limit(monkeypatch):
    import resource

    monkeypatch.setattr(machine, "memory", lambda: (2**40, 2**39))
    assert machine.available() in range(1, 2**39 + 1)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (10, 10))
    assert machine.available() == 0


def test_hardware_of_this_machine(tmp_path):
    found = machine.hardware(tmp_path)
    assert found["cores"] >= 1
    assert found["disk_free"] > 0
    assert found["cpu"]


REQUIRED = [
    "torch>=2.10",
    'datasets>=3; extra == "hub"',
    "wandb>=0.19; extra == 'tracking'",
    'x[y]>=1; extra == "demo"',
]


def test_extras_name_what_is_missing_and_what_installs_it(monkeypatch):
    def version(name):
        if name != "datasets":
            raise metadata.PackageNotFoundError(name)
        return "3"

    monkeypatch.setattr(machine.metadata, "requires", lambda package: REQUIRED)
    monkeypatch.setattr(machine.metadata, "version", version)
    found = machine.extras()
    assert {name: extra["missing"] for name, extra in found.items()} == {
        "hub": [],
        "tracking": ["wandb"],
        "demo": ["x"],
    }
    assert found["tracking"]["install"] == "pip install 'reverie[tracking]'"


def test_a_checkout_that_was_never_installed(monkeypatch):
    def requires(package):
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(machine.metadata, "requires", requires)
    assert [extra["missing"] for extra in machine.extras().values()] == [[], [], []]


def test_the_extras_listed_are_those_of_the_package():
    provided = metadata.metadata("reverie").get_all("Provides-Extra")
    assert set(machine.EXTRAS) <= set(provided)
    for name in machine.EXTRAS:
        assert machine.distributions(metadata.requires("reverie"), name)


def test_the_compiler(monkeypatch):
    monkeypatch.setattr(machine.shutil, "which", lambda name: "/bin/clang++" if name == "clang++" else None)
    monkeypatch.setattr(machine, "said", lambda command: f"{command[0]} version 17\nmore")
    monkeypatch.delenv("CXX", raising=False)
    assert machine.compiler() == "clang++ version 17"
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    assert machine.compiler() is None


@pytest.mark.parametrize("command", [["/nowhere/at/all"], ["false"]])
def test_a_program_that_says_nothing(command):
    assert machine.said(command) == ""
