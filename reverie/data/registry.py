"""The data sources by name; each is imported when it is asked for. A new one is one file and one line here.

A source is a function of what follows its name ("32,count=100" in "shapes:32,count=100") and of the
`Options` of `open_dataset`, which returns a `Dataset`.
"""

from reverie.base.registry import Registry

_HERE = "reverie.data"

sources = Registry(
    "data source",
    {
        "digits": f"{_HERE}.digits:open_digits",
        "shapes": f"{_HERE}.shapes:open_shapes",
        "folder": f"{_HERE}.folder:open_folder",
        "idx": f"{_HERE}.idx:open_idx",
        "npz": f"{_HERE}.npz:open_npz",
        "hub": f"{_HERE}.hub:open_hub",
    },
)
