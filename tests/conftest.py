"""For all tests: shapes and types checked at run time, one thread, hypothesis without chance."""

import sys

import pytest
import torch
from beartype import BeartypeConf, beartype
from hypothesis import settings
from jaxtyping import config, install_import_hook

check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int will do where a float is asked for, as for mypy

# The hook writes an import of its checker into each module of reverie: it needs a name that can be imported.
sys.modules["reverie_tests"] = sys.modules[__name__]
install_import_hook("reverie", "reverie_tests.check")

torch.set_num_threads(1)
settings.register_profile("reverie", derandomize=True, max_examples=25, deadline=None, database=None)
settings.load_profile("reverie")


@pytest.fixture
def unchecked():
    """Leave the checks of types out, to meet the message that a user meets."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)
