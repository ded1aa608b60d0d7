"""For all tests: shapes and types checked at run time, one thread, hypothesis without chance."""

import torch
from hypothesis import settings
from jaxtyping import install_import_hook

install_import_hook("reverie", "beartype.beartype")

torch.set_num_threads(1)
settings.register_profile("reverie", derandomize=True, max_examples=25, deadline=None, database=None)
settings.load_profile("reverie")
