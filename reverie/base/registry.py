"""Registries: things by name, imported when asked for, with the nearest name when there is none."""

from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from reverie.base.errors import UsageError


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ', did you mean X?' for the known name most like the one given, or nothing.

    Example:
        >>> nearest("learing_rate", ["learning_rate", "steps"])
        ', did you mean learning_rate?'
    """
    begun = sorted((one for one in known if len(name) > 2 and one.startswith(name)), key=len)
    close = begun or get_close_matches(name, list(known), n=1)
    return f", did you mean {close[0]}?" if close else ""


class Registry(Mapping[str, Any]):
    """Objects by name, each given as "module:attribute" and imported when first asked for.

    Arguments:
        kind: What the objects are, in the words of an error message: "sampler".
        places: Name -> "module:attribute".

    Example:
        >>> roots = Registry("root", {"sqrt": "math:sqrt"})
        >>> roots["sqrt"](9.0), list(roots)
        (3.0, ['sqrt'])
    """

    def __init__(self, kind: str, places: dict[str, str]) -> None:
        self.kind = kind
        self.places = places

    def __getitem__(self, name: str) -> Any:
        """Return the object of that name.

        Raises:
            UsageError: There is none; the message lists those there are.
        """
        if name not in self.places:
            known = ", ".join(self.places)
            raise UsageError(f"there is no {self.kind} {name!r}{nearest(name, self.places)} (known: {known})")
        module, attribute = self.places[name].split(":")
        return getattr(import_module(module), attribute)

    def get(self, name: str, default: Any = None) -> Any:
        """Return the object of that name, or the default."""
        return self[name] if name in self.places else default  # Mapping's own expects a KeyError

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def __contains__(self, name: object) -> bool:
        return name in self.places
