"""Names, nearest names, and imports only when asked for."""

import sys

import pytest

from reverie.base.errors import UsageError
from reverie.base.registry import Registry, nearest

ROOTS = Registry("root", {"square-root": "math:sqrt", "cube-root": "math:cbrt"})


def test_a_name_gives_its_object():
    assert ROOTS["square-root"](16.0) == 4.0
    assert list(ROOTS) == ["square-root", "cube-root"]
    assert len(ROOTS) == 2
    assert "cube-root" in ROOTS
    assert "sixth-root" not in ROOTS


def test_an_unknown_name_is_refused_with_the_nearest_and_all_there_are():
    with pytest.raises(UsageError, match=r"there is no root 'sqare-root', did you mean square-root\?") as caught:
        ROOTS["sqare-root"]
    assert "(known: square-root, cube-root)" in str(caught.value)


def test_get_has_a_default():
    assert ROOTS.get("sixth-root") is None
    assert ROOTS.get("sixth-root", 6) == 6
    assert ROOTS.get("square-root")(4.0) == 2.0


def test_nothing_is_imported_before_it_is_asked_for():
    sys.modules.pop("this", None)
    lazy = Registry("poem", {"zen": "colorsys:hsv_to_rgb"})
    sys.modules.pop("colorsys", None)
    assert "zen" in lazy
    assert "colorsys" not in sys.modules
    lazy["zen"]
    assert "colorsys" in sys.modules


def test_a_name_like_none_has_no_nearest():
    assert nearest("xyz", ["learning_rate", "steps"]) == ""
    assert nearest("learing_rate", ["learning_rate", "steps"]) == ", did you mean learning_rate?"
