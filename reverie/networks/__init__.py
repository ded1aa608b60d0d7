"""Networks: shapes in, shapes out. Nothing here knows what diffusion is.

A network takes the state x (B, ...), one number per sample as its `time` (B,), and what it is told of
each sample (`label`, `context`), and returns a tensor of x's shape with as many channels as its config
asks for. What that tensor means (noise, data, velocity, a variance beside it) is the caller's business.

| file | what it holds |
|---|---|
| `layers.py` | the operators (norm, linear, attention), each in one place; time features, resampling, residual block |
| `attention.py` | attention over the pixels of an image; the transformer that also looks at a context |
| `unet_config.py` | `UNetConfig`, and its translation from and to diffusers' config.json |
| `unet_blocks.py`, `skip_blocks.py` | the blocks of one level, down and up; those of NCSN++ |
| `unet.py` | `UNet` |
| `edm2_layers.py` | layers that keep magnitudes: the operators of EDM2 |
| `edm2.py` | `EDM2` |
| `dit.py` | `DiT`, a transformer over patches |
| `mlp.py` | `MLP`, for points |
| `discriminator.py`, `perceptual.py` | what an autoencoder is trained against |
| `checks.py` | what they refuse |
| `numbered.py` | either, told further numbers beside its time |

Each network class names its config class as `Config`, so that `networks[name](networks[name].Config(...))`
builds any of them.
"""

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from reverie.base.registry import Registry

networks = Registry(
    "network",
    {
        "unet": "reverie.networks.unet:UNet",
        "captioned": "reverie.networks.captioned:Captioned",
        "autoencoder": "reverie.networks.autoencoder:Autoencoder",
        "vq-autoencoder": "reverie.networks.vq_autoencoder:VQAutoencoder",
        "tiny-autoencoder": "reverie.networks.tiny_autoencoder:TinyAutoencoder",
        "edm2": "reverie.networks.edm2:EDM2",
        "dit": "reverie.networks.dit:DiT",
        "mlp": "reverie.networks.mlp:MLP",
        "numbered": "reverie.networks.numbered:Numbered",
    },
)


class Room(ModuleType):
    """This package, which is its registry as well: `rv.networks["unet"]`, where `rv.networks` is the package."""

    def __getitem__(self, name: str) -> Any:
        """Return the network of that name."""
        return networks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(networks)

    def __len__(self) -> int:
        return len(networks)

    def __contains__(self, name: object) -> bool:
        return name in networks


sys.modules[__name__].__class__ = Room
