"""The exit codes that other programs rely on, and the built-in families that `except` clauses rely on."""

import pytest

from reverie.base import errors


@pytest.mark.parametrize(
    ("error", "code", "family"),
    [
        (errors.ReverieError, 1, Exception),
        (errors.UsageError, 2, ValueError),
        (errors.DataError, 3, errors.ReverieError),
        (errors.ModelFileError, 4, errors.ReverieError),
        (errors.NonFiniteError, 5, ArithmeticError),
        (errors.StorageError, 6, OSError),
        (errors.OutOfMemoryError, 7, MemoryError),
    ],
)
def test_each_error_has_its_exit_code_and_says_its_message(error, code, family):
    raised = error("what, where, what to do")
    assert raised.exit_code == code
    assert isinstance(raised, family)
    assert isinstance(raised, errors.ReverieError)
    assert str(raised) == "what, where, what to do"


@pytest.mark.parametrize(("signum", "code"), [(2, 130), (15, 143)])
def test_a_stop_by_signal_ends_with_the_shells_code(signum, code):
    stopped = errors.Stopped("saved step 7", signum)
    assert stopped.exit_code == code
    assert str(stopped) == "saved step 7"
