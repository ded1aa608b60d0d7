"""From fields to flags, and from complaints to lines."""

from typing import Annotated, Literal

import click
import pytest
from click.testing import CliRunner
from pydantic import BaseModel, ConfigDict, Field, model_validator

from reverie.base.errors import UsageError
from reverie.cli.options import Command, allowed, metavar, option, options, plain, ranged, settle, shown


class Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    out: str = Field(description="where to")
    batch_size: int = Field(16, description="images in a step", ge=1, le=64, json_schema_extra={"group": "speed"})
    rate: float | None = Field(None, description="step size", gt=0, allow_inf_nan=False)
    flip: bool = Field(True, description="mirror")
    strict: bool | None = Field(None, description="three states")
    kind: Literal["l1", "l2"] = Field("l2", description="distance")
    widths: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(None, description="channels", max_length=2)
    attend: tuple[bool, ...] = Field((True, False), description="levels")

    @model_validator(mode="after")
    def check(self):
        if self.kind == "l1" and self.flip:
            raise ValueError("kind l1 does not go with flip")
        return self


def run(*words):
    """Return what a command with these settings makes of a command line."""
    seen = {}

    def callback(**flags):
        seen.update(flags)

    command = Command("try", callback=callback, params=options(Settings, {"batch_size": ("-b", "--train-batch-size")}))
    context = {"token_normalize_func": lambda name: name.replace("_", "-")}
    outcome = CliRunner().invoke(command, list(words), standalone_mode=False, **context)
    if outcome.exception:
        raise outcome.exception
    return settle(Settings, seen)


def refusal(*words):
    with pytest.raises(UsageError) as caught:
        run(*words)
    return str(caught.value).splitlines()


def test_every_kind_of_value():
    settings = run(
        "--out", "a b", "-b", "8", "--rate", "1e-3", "--no-flip", "--strict", "--kind", "l1", "--widths", "32,64",
        "--attend", "yes,0,TRUE",
    )  # fmt: skip
    assert settings.model_dump() == {
        "out": "a b", "batch_size": 8, "rate": 0.001, "flip": False, "strict": True, "kind": "l1",
        "widths": (32, 64), "attend": (True, False, True),
    }  # fmt: skip


def test_only_what_was_given_is_set():
    """A resumed run tells what was said from what was left to the default."""
    assert run("--out", "x", "--no-flip").model_fields_set == {"out", "flip"}


@pytest.mark.parametrize("name", ["--batch-size", "--batch_size", "-b", "--train-batch-size", "--train_batch_size"])
def test_all_names_of_an_option(name):
    assert run("--out", "x", name, "3").batch_size == 3


def test_lists_by_commas_or_by_repeating():
    assert run("--out", "x", "--widths", "1,2").widths == run("--out", "x", "--widths", "1", "--widths", "2").widths


def test_none_takes_a_value_back():
    """So that a flag can undo what a file says."""
    assert settle(Settings, {"rate": "none"}, {"out": "x", "rate": 0.5}).rate is None


@pytest.mark.parametrize("text", ["1e-3 ", " 1", "1_0", "0x10", "1e", "", "one", "1,0", "٣"])
def test_text_that_is_no_number_is_refused(text):
    """int("1_0"), float("1e-3 ") and int("٣") are numbers to Python."""
    assert refusal("--out", "x", "--batch-size", text) == [
        f"--batch-size is {shown(text)}; it must be a whole number, 1 <= x <= 64"
    ]
    assert refusal("--out", "x", "--rate", text)[0].startswith("--rate is ")


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999", "-1", "0"])
def test_numbers_out_of_range_are_refused(text):
    assert refusal("--out", "x", "--rate", text)[0].endswith("it must be a number, x > 0")


def test_all_that_is_wrong_is_told_at_once():
    lines = refusal("--batch-size", "65", "--rate", "0", "--kind", "l3", "--widths", "0,a", "--attend", "perhaps")
    assert lines == [
        "--out is missing: where to",
        "--batch-size is 65; it must be a whole number, 1 <= x <= 64",
        "--rate is 0.0; it must be a number, x > 0",
        "--kind is l3; it must be one of l1, l2",
        "--widths is 0; it must be a whole number, x >= 1; several with commas, 2 at most",
        "--widths is a; it must be a whole number, x >= 1; several with commas, 2 at most",
        "--attend is perhaps; it must be true or false; several with commas",
    ]


def test_too_many_in_a_list():
    assert "2 at most" in refusal("--out", "x", "--widths", "1,2,3")[0]


def test_what_does_not_go_together_is_told_in_its_own_words():
    assert refusal("--out", "x", "--kind", "l1") == ["kind l1 does not go with flip"]


def test_a_file_is_named_for_what_it_says_and_flags_for_theirs():
    with pytest.raises(UsageError) as caught:
        settle(
            Settings, {"rate": "-1"}, {"out": "x", "rate": -2, "batch_sise": 3, "flip": "yes", "kind": "l3"}, "a.toml"
        )
    assert str(caught.value).splitlines() == [
        "--rate is -1.0; it must be a number, x > 0",
        "flip (in a.toml) is yes; it must be true or false",
        "kind (in a.toml) is l3; it must be one of l1, l2",
        "there is no setting batch_sise (in a.toml), did you mean batch_size?",
    ]


@pytest.mark.parametrize("value", ["8", 8.5, True, [8], {"a": 1}, None])
def test_a_file_gives_numbers_as_numbers(value):
    with pytest.raises(UsageError, match=r"batch_size \(in a\.toml\) is .*; it must be a whole number"):
        settle(Settings, {}, {"out": "x", "batch_size": value}, "a.toml")


def test_a_file_gives_whole_numbers_where_fractions_may_be():
    assert settle(Settings, {}, {"out": "x", "rate": 1}, "a.toml").rate == 1.0


def test_a_name_in_another_encoding_is_refused_in_words():
    with pytest.raises(UsageError, match=r"--out is .*must be UTF-8"):
        settle(Settings, {"out": "caf\udce9"})


def test_long_values_do_not_fill_the_screen():
    assert len(refusal("--out", "x", "--kind", "y" * 5000)[0]) < 150


def test_help_shows_groups_ranges_and_defaults():
    command = Command("try", params=options(Settings, {"batch_size": ("-b", "--train-batch-size")}))
    text = CliRunner().invoke(command, ["--help"]).output
    assert "Speed:" in text
    assert "-b, --batch-size N" in text
    assert "[default: 16; 1 <= x <= 64]" in " ".join(text.split())
    assert "--flip / --no-flip" in text
    assert "[on by default]" in text
    assert "[l1|l2]" in text
    assert "[required]" in text
    assert "--train-batch-size = --batch-size" in " ".join(text.split())


def test_aliases_are_understood_but_not_listed_as_options():
    made = option("size", Field(1, description=""), ("--resolution",))
    context = click.Context(click.Command("x"))
    assert made.get_help_record(context)[0] == "--size VALUE"
    assert made.aliases == ("--resolution",)


@pytest.mark.parametrize(
    ("annotation", "want"),
    [(int, "N"), (float | None, "X"), (tuple[bool, ...], "BOOL,BOOL,..."), (Literal["a", "b"], "[a|b]"), (str, "TEXT")],
)
def test_metavar(annotation, want):
    assert metavar(annotation) == want


def test_ranges_in_signs():
    fields = {
        "x > 0": Field(gt=0), "x >= 1": Field(ge=1), "x < 2": Field(lt=2), "0 < x <= 1": Field(gt=0, le=1), "": Field(),
    }  # fmt: skip
    for want, field in fields.items():
        assert ranged(field.metadata) == want


def test_allowed_falls_back_to_no_range():
    assert allowed(str) == "text"


def test_plain_leaves_what_it_does_not_know():
    assert plain(None, int) is None
    assert plain("x", dict) == "x"
    assert plain("", tuple[int, ...]) == []
