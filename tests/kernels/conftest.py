import pytest

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
