"""Docstrings as the handbook shows them: a Griffe extension.

They are written to be read in the code: titles above their links, shapes as (B, *D), one example under
`Example:`. Here the same text becomes Markdown.
"""

import re
from collections.abc import Iterator
from typing import Any

import griffe

SECTION = re.compile(r"[A-Z]\w+:")
SHAPE = re.compile(r"(?<![\w*`\\])\*(?=[A-Za-z])")


class Docstrings(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **rest: Any) -> None:
        """Rewrite the docstring of an object."""
        if obj.docstring is not None:
            obj.docstring.value = "\n".join(rewritten(obj.docstring.value))


def rewritten(text: str) -> Iterator[str]:
    """Yield the lines of a docstring as Markdown.

    Example:
        >>> list(rewritten("Points (B, *D).\\n\\nReferences:\\n    A paper\\n    https://a.paper"))
        ['Points (B, \\\\*D).', '', 'References:', '    - [A paper](https://a.paper)']
    """
    section, title = "", []
    for line in text.splitlines():
        if line.strip() and not line.startswith(" "):
            section = line if SECTION.fullmatch(line) else ""
        if section == "References:" and line.startswith("    "):
            if line.strip().startswith("http"):
                yield f"    - [{' '.join(title) or line.strip()}]({line.strip()})"
                title = []
            else:
                title.append(line.strip())
        elif section == line == "Example:":
            yield "Examples:"
        else:
            yield line if code(line, section) else SHAPE.sub(r"\\*", line)


def code(line: str, section: str) -> bool:
    """Return whether a line is code or a formula: an example, or set in by four more than its surroundings."""
    return section == "Example:" or line.startswith("    " if not section else " " * 12)
