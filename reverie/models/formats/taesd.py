"""The original layout of a tiny autoencoder: two files, one for the encoder and one for the decoder.

Their names of the tensors are places in a list of layers; they are pickles of PyTorch's or safetensors.

References:
    TAESD: Tiny AutoEncoder for Stable Diffusion (Bohan, 2023)
    https://github.com/madebyollin/taesd
"""

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from reverie.base.errors import ModelFileError
from reverie.models.checkpoints import check_tensors
from reverie.models.formats.pickled import as_safetensors
from reverie.models.formats.weights import FLOATS, Spec, fill, read_header, read_tensors
from reverie.networks.tiny_autoencoder import TinyAutoencoder, config_of_original, original_name

MOST = 1 << 30  # bytes of a file; a tiny autoencoder has about three million


def read_taesd(encoder: Path | str, decoder: Path | str) -> TinyAutoencoder:
    """Return a tiny autoencoder from the original's two files.

    Arguments:
        encoder: The encoder's file: "taesd_encoder.pth", or the same as safetensors.
        decoder: The decoder's.

    Raises:
        ModelFileError: They are no such files, do not belong together, or hold code, NaN or infinity.
    """
    files = {"encoder": Path(encoder), "decoder": Path(decoder)}
    where = f"{encoder} and {decoder}"
    with TemporaryDirectory() as folder:
        paths = {half: opened(path, Path(folder) / f"{half}.safetensors") for half, path in files.items()}
        specs = {half: read_header(path).specs for half, path in paths.items()}
        config = config_of_original(*({name: spec.shape for name, spec in specs[half].items()} for half in files))
        with torch.device("meta"):
            network = TinyAutoencoder(config)
        names = {half: partial(original_name, half=half) for half in files}
        found = {names[half](name): float_spec(spec) for half in files for name, spec in specs[half].items()}
        check_tensors(network.state_dict(), found, where)
        tensors = {
            names[half](name): tensor.float().clone()  # the file is gone when this ends
            for half, path in paths.items()
            for name, tensor in read_tensors(path, specs[half]).items()
        }
    fill(network, tensors, where)
    return network.eval()


def float_spec(spec: Spec) -> Spec:
    """Return what a tensor is once it is read: float32, of whatever length its numbers are in the file."""
    return Spec(spec.shape, torch.float32) if spec.dtype in FLOATS else spec


def opened(path: Path, target: Path) -> Path:
    """Return a file as safetensors: itself, or what a process of its own makes of the pickle in it."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error.strerror}") from error
    if size > MOST:
        raise ModelFileError(f"{path} has {size} bytes; no tiny autoencoder is larger than {MOST}")
    return as_safetensors(path, target) if start == b"PK\x03\x04" else path
