"""Who serves a call, and what is said of it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from reverie.base.errors import UsageError
from reverie.kernels import dispatch
from reverie.kernels.attention import attention
from reverie.networks.unet import UNet, UNetConfig

ROOT = Path(__file__).parents[2]


def test_a_mode_that_there_is_not(monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, "quick")
    with pytest.raises(UsageError, match=r"'quick'.*auto, fast, plain"):
        dispatch.mode()


def test_plain_is_pytorch(monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, "plain")
    assert not dispatch.fast(torch.ones(1))
    assert set(dispatch.status().values()) == {"PyTorch (REVERIE_KERNELS=plain)", "PyTorch"}


def test_fast_without_a_library_is_refused_and_auto_is_not(monkeypatch):
    monkeypatch.setattr(dispatch, "library", lambda: None)
    monkeypatch.setattr(dispatch, "candidates", lambda: {"avx2": "not built: no C++ compiler"})
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    assert not dispatch.fast(torch.ones(1))
    assert "no C++ compiler" in dispatch.status()["attention"]
    monkeypatch.setenv(dispatch.VARIABLE, "fast")
    with pytest.raises(UsageError, match="no C\\+\\+ compiler"):
        dispatch.fast(torch.ones(1))


def test_a_library_of_other_sources_is_not_used(monkeypatch):
    built = [level for level, why in dispatch.candidates().items() if not why]
    if not built:
        pytest.skip("no library here")
    monkeypatch.setattr(dispatch, "sources", lambda: 1)
    assert "install reverie again" in dispatch.refused(built[0])


def test_a_file_that_is_no_library_is_said(tmp_path, monkeypatch):
    (tmp_path / "_avx2.so").write_text("nothing")
    monkeypatch.setattr(dispatch, "FOLDER", tmp_path)
    monkeypatch.setattr(dispatch, "opened", dispatch.opened.__wrapped__)
    assert "does not load" in dispatch.refused("avx2")
    assert "not built" in dispatch.refused("avx512")


def test_what_pytorch_traces_is_pytorchs(level):
    x = torch.randn(2, 5, 8)
    assert dispatch.fast(x)
    assert not dispatch.fast(x.double())
    assert not dispatch.fast(x.to("meta"))
    assert not dispatch.fast(x, torch.randn(2).to_sparse())
    with sdpa_kernel(SDPBackend.MATH):
        _, tangent = torch.func.jvp(lambda y: attention(y, y, y, 2), (x,), (torch.ones_like(x),))
    assert tangent.isfinite().all()
    rows = torch.func.vmap(lambda y: attention(y[None], y[None], y[None], 2)[0])(x)
    torch.testing.assert_close(rows, attention(x, x, x, 2))
    with torch._subclasses.FakeTensorMode() as fake:
        assert not dispatch.fast(fake.from_tensor(x))


def test_no_library_runs_where_its_instructions_are_missing(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert dispatch.levels() == ("avx512", "avx2")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert dispatch.levels() == ("avx512bf16", "avx512", "avx2")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert dispatch.levels() == ("avx2",)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert dispatch.levels() == ()


def test_a_level_is_not_taken_for_another_whose_name_it_begins(tmp_path, monkeypatch):
    (tmp_path / "_avx512bf16.so").write_text("nothing")
    monkeypatch.setattr(dispatch, "FOLDER", tmp_path)
    monkeypatch.setattr(dispatch, "opened", dispatch.opened.__wrapped__)
    assert "not built" in dispatch.refused("avx512")


def test_a_network_gives_what_it_gives_in_plain_pytorch(level, monkeypatch):
    torch.manual_seed(0)
    config = UNetConfig(in_channels=1, channels=(32, 64), attention=(False, True), head_dim=8)
    network = UNet(config).to(memory_format=torch.channels_last)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x = torch.randn(3, 1, 14, 14).to(memory_format=torch.channels_last)
    t = torch.tensor([0.0, 10.0, 999.0])
    found = []
    for mode in ("fast", "plain"):
        monkeypatch.setenv(dispatch.VARIABLE, mode)
        network.zero_grad()
        y = network(x, t)
        y.square().mean().backward()
        found.append({"y": y.detach(), **{name: p.grad.clone() for name, p in network.named_parameters()}})
    largest = max(float(g.abs().max()) for name, g in found[1].items() if name != "y")
    for name in found[0]:
        size = max(float(found[1][name].abs().max()), 1e-3 * largest)
        assert float((found[0][name] - found[1][name]).abs().max()) < 2e-4 * size, name


def test_it_installs_without_a_compiler(tmp_path):
    # What `pip install` runs, with compilers that fail, and with none.
    for compiler in ("/bin/false", "/no/such/compiler"):
        command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path), "--build-temp"]
        environment = {"PATH": "/usr/bin:/bin", "CC": compiler, "CXX": compiler}
        done = subprocess.run([*command, str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert not list(tmp_path.rglob("*.so"))
