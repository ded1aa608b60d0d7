import pytest
import torch

from reverie.kernels import dispatch


@pytest.fixture(params=list(dispatch.levels()))
def level(request, monkeypatch):
    """Each library that can run here, in turn, in use."""
    why = dispatch.candidates()[request.param]
    if why:
        pytest.skip(f"{request.param}: {why}")
    monkeypatch.setattr(dispatch, "library", lambda: dispatch.opened(request.param))
    monkeypatch.setenv(dispatch.VARIABLE, "fast")
    return request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def dtype(request, level):
    """Each dtype that the library in use multiplies."""
    if request.param == torch.bfloat16 and level != "avx512bf16":
        pytest.skip(f"{level} multiplies no bfloat16")
    return request.param
