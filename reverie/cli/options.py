"""From fields to flags: a pydantic model becomes the options of a command, and its complaints become lines.

A flag arrives as text and is handed on as what JSON would hold; a file holds that already. pydantic, in
its strict mode, is then the only judge of types and ranges, whichever way a value came, and it tells of
all that is wrong at once. Text that is not the number it should be ("1e-3 ") stays text, and is refused.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import click
from pydantic import BaseModel, Field, ValidationError
from pydantic.fields import FieldInfo

from reverie.base.errors import UsageError
from reverie.base.registry import nearest

Settings = TypeVar("Settings", bound=BaseModel)

NUMBERS = int | float
INTEGER = re.compile(r"[+-]?\d{1,300}", re.ASCII)
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?(nan|inf|infinity)", re.ASCII | re.IGNORECASE)
TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
# What an unset variable of a shell's makes empty: the folder that one is in would be meant, or nothing.
NEVER_EMPTY = ("out", "class_", "data", "device", "codec", "teacher", "mask", "vocabulary")
KIND = {int: "a whole number", float: "a number", NUMBERS: "a number", bool: "true or false", str: "text"}
METAVAR = {int: "N", float: "X", NUMBERS: "X", bool: "BOOL", str: "TEXT"}


class Option(click.Option):
    """An option that also answers to names of other programs, and belongs to a group of the help.

    Arguments:
        aliases: Further names, understood but not listed.
        group: The heading that it is listed under.
    """

    def __init__(
        self, declarations: Sequence[str], *, aliases: Sequence[str] = (), group: str = "", **attributes: Any
    ) -> None:
        super().__init__(declarations, **attributes)
        self.aliases, self.group = tuple(aliases), group

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        """Register all names, and list only the first ones."""
        listed, self.opts = self.opts, [*self.opts, *self.aliases]
        try:
            super().add_to_parser(parser, ctx)
        finally:
            self.opts = listed


class Command(click.Command):
    """A command whose help lists its options by group.

    Arguments:
        lower: What takes less memory, for the message when there is not enough.
    """

    def __init__(self, *arguments: Any, lower: str = "", **attributes: Any) -> None:
        super().__init__(*arguments, **attributes)
        self.lower = lower

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return the parameters, with the flag that all commands share."""
        debug = click.Option(["--debug"], is_flag=True, expose_value=False, help="Show a traceback with any error.")
        return [*super().get_params(ctx), debug]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, each group under its heading."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record:
                groups.setdefault(getattr(parameter, "group", "") or "options", []).append(record)
        for group, records in groups.items():
            with formatter.section(group.capitalize()):
                formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write which names of other programs are understood."""
        found = [(option.opts[-1], option.aliases) for option in self.params if isinstance(option, Option)]
        words = [f"{' '.join(aliases)} = {name}" for name, aliases in found if aliases]
        if words:
            formatter.write_paragraph()
            formatter.write_text(f"Also understood: {', '.join(words)}; and _ for - in any name.")


def options(model: type[BaseModel], aliases: Mapping[str, Sequence[str]] | None = None) -> list[click.Parameter]:
    """Return one option for each field of a model, with its help, its default and its range.

    Arguments:
        model: Fields with a description, and a group in their json_schema_extra.
        aliases: Further names by field; one with a single dash is listed too.

    Example:
        >>> class Settings(BaseModel):
        ...     batch_size: int = 16
        >>> options(Settings)[0].opts
        ['--batch-size']
    """
    return [option(name, field, (aliases or {}).get(name, ())) for name, field in model.model_fields.items()]


def setting(group: str, default: Any, help: str, **bounds: Any) -> Any:
    """Return a field with its group and its help, of which `options` makes a flag."""
    return Field(default, description=help, json_schema_extra={"group": group}, **bounds)


def option(name: str, field: FieldInfo, aliases: Sequence[str] = ()) -> Option:
    """Return the option of a field."""
    short, long = [a for a in aliases if not a.startswith("--")], [a for a in aliases if a.startswith("--")]
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    common: dict[str, Any] = {"help": described(field), "group": str(extra.get("group", "")), "default": None}
    if bare(field.annotation) is bool:
        return Option([name, f"{flag(name)}/--no-{flag(name)[2:]}", *short], aliases=long, **common)
    return Option(
        [name, *short, flag(name)],
        aliases=long,
        metavar=str(extra.get("metavar") or metavar(field.annotation)),
        type=click.UNPROCESSED,
        multiple=is_tuple(field.annotation),
        **common,
    )


def flag(name: str) -> str:
    """Return a field's flag: --batch-size for batch_size, --class for class_, -n for n."""
    return f"-{name}" if len(name) == 1 else f"--{name.rstrip('_').replace('_', '-')}"


def described(field: FieldInfo) -> str:
    """Return a field's help: its description, default and range."""
    default = field.default
    if isinstance(default, tuple):
        default = ",".join(str(part) for part in default)
    facts = [] if default in (None, "") or field.is_required() or isinstance(default, bool) else [f"default: {default}"]
    facts += ["on by default"] if default is True else []
    facts += ["required"] if field.is_required() else []
    facts += [bounds] if (bounds := ranged(field.metadata)) else []
    return f"{field.description or ''}{'  [' + '; '.join(facts) + ']' if facts else ''}"


# Kinds of values ------------------------------------------------------------------------------


def bare(annotation: Any) -> Any:
    """Return an annotation without its None and its metadata: `int` for `Annotated[int, ...] | None`."""
    if get_origin(annotation) is Annotated:
        return bare(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        kinds = [part for part in get_args(annotation) if part is not NoneType]
        return bare(kinds[0]) if len(kinds) == 1 else annotation
    return annotation


def is_tuple(annotation: Any) -> bool:
    """Whether a field takes a list of values."""
    return get_origin(bare(annotation)) is tuple


def metavar(annotation: Any) -> str:
    """Return what stands for a value in the help: N, X, [l2|l1], X,X,...

    Example:
        >>> metavar(tuple[int, ...] | None), metavar(Literal["l2", "l1"])
        ('N,N,...', '[l2|l1]')
    """
    kind = bare(annotation)
    if is_tuple(kind):
        part = metavar(get_args(kind)[0])
        return f"{part},{part},..." if len(part) < 5 else f"{part},..."
    if get_origin(kind) is Literal:
        return f"[{'|'.join(str(choice) for choice in get_args(kind))}]"
    return METAVAR.get(kind, "VALUE")


def allowed(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """Return what a field takes, in words.

    Example:
        >>> from annotated_types import Gt
        >>> allowed(float | None, [Gt(0)]), allowed(tuple[Literal["a", "b"], ...])
        ('a number, x > 0', 'one of a, b; several with commas')
    """
    kind, metadata = bare(annotation), [*metadata, *inner_metadata(annotation)]
    if is_tuple(kind):
        return f"{allowed(get_args(kind)[0])}; several with commas{counted(metadata)}"
    if get_origin(kind) is Literal:
        return f"one of {', '.join(str(choice) for choice in get_args(kind))}"
    bounds = ranged(metadata)
    return KIND.get(kind, "a value") + (f", {bounds}" if bounds else "")


def inner_metadata(annotation: Any) -> list[Any]:
    """Return what an Annotated says of its range."""
    if get_origin(annotation) is not Annotated:
        return []
    found = get_args(annotation)[1:]
    return [part for item in found for part in (item.metadata if isinstance(item, FieldInfo) else [item])]


def ranged(metadata: Iterable[Any]) -> str:
    """Return a range in signs: 'x >= 1', '0 <= x < 1'."""
    sides = {
        side: figure(getattr(item, side))
        for item in metadata
        for side in ("gt", "ge", "lt", "le")
        if hasattr(item, side)
    }
    low = next((f"{sides[side]} {sign} " for side, sign in (("gt", "<"), ("ge", "<=")) if side in sides), "")
    high = next((f" {sign} {sides[side]}" for side, sign in (("lt", "<"), ("le", "<=")) if side in sides), "")
    if low and not high:
        return f"x > {sides['gt']}" if "gt" in sides else f"x >= {sides['ge']}"
    return f"{low}x{high}" if high else ""


def figure(value: Any) -> str:
    """Return a bound for reading: 2^63 - 1 for the largest seed."""
    return "2^63 - 1" if value == 2**63 - 1 else str(value)


def counted(metadata: Iterable[Any]) -> str:
    """Return how many values a list may hold, in words."""
    most = [item.max_length for item in metadata if getattr(item, "max_length", None) is not None]
    return f", {most[0]} at most" if most else ""


# Values ---------------------------------------------------------------------------------------


def plain(text: Any, annotation: Any) -> Any:
    """Return a flag's text as JSON would hold it; what is not of its kind stays as it is.

    Example:
        >>> plain("1e-3", float), plain("1e-3 ", float), plain("32,64", tuple[int, ...])
        (0.001, '1e-3 ', [32, 64])
    """
    kind = bare(annotation)
    if not isinstance(text, str):
        return text
    if text == "none" and NoneType in get_args(annotation) and kind is not str:
        return None
    if is_tuple(kind):
        return [plain(part, get_args(kind)[0]) for part in text.split(",")] if text else []
    if get_origin(kind) is Literal:
        return next((choice for choice in get_args(kind) if str(choice) == text), text)
    if kind in (int, NUMBERS) and INTEGER.fullmatch(text):
        return int(text)
    if kind in (float, NUMBERS) and NUMBER.fullmatch(text):
        return float(text)
    if kind is bool:
        return TRUTH.get(text.lower(), text)
    return text


def given(model: type[BaseModel], flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags that were given, as JSON would hold them."""
    values = {}
    for name, field in model.model_fields.items():
        value = flags.get(name)
        if isinstance(value, tuple):  # an option that may be repeated: none of it means absent
            value = ",".join(value) if value else None
        if value == "" and name in NEVER_EMPTY:
            raise UsageError(f"{flag(name)} is empty; give it a value, or leave it out")
        if value is not None:
            values[name] = plain(value, field.annotation)
    return values


def settle(
    model: type[Settings], flags: Mapping[str, Any], beneath: Mapping[str, Any] | None = None, source: str = ""
) -> Settings:
    """Return the settings that flags, and values beneath them, make.

    Arguments:
        model: What to build.
        flags: Values by field, as click gives them; None is absent.
        beneath: Values that hold where no flag was given.
        source: Where those come from, for the message.

    Raises:
        UsageError: Something is wrong; one line for each thing, with the key, what was given, what is allowed.
    """
    flags = given(model, flags)
    values = {**(beneath or {}), **flags}
    places = {key: f"{shown(key)} (in {source})" for key in values if key not in flags}
    refuse_bytes(values, places)
    try:
        return model.model_validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as error:
        faults = error.errors(include_url=False)
        within = {fault["loc"][0] for fault in faults if len(fault["loc"]) > 1}  # a list, of which the parts are told
        told = [fault for fault in faults if len(fault["loc"]) != 1 or fault["loc"][0] not in within]
        lines = [complaint(fault, model, places) for fault in told]
        raise UsageError("\n".join(dict.fromkeys(lines))) from None


def refuse_bytes(values: Mapping[str, Any], places: Mapping[str, str]) -> None:
    """Refuse text that is not Unicode: file names in another encoding arrive so, and JSON cannot hold them."""
    for key, value in values.items():
        if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise UsageError(f"{places.get(key, flag(key))} is {shown(value)}; it must be UTF-8: rename the file")


def complaint(fault: Mapping[str, Any], model: type[BaseModel], places: Mapping[str, str]) -> str:
    """Return one of pydantic's errors as a line for the user."""
    if not fault["loc"]:
        return str(fault["ctx"]["error"]) if "ctx" in fault else str(fault["msg"])
    key = str(fault["loc"][0])
    place = places.get(key, flag(key))
    if fault["type"] == "extra_forbidden":
        return f"there is no setting {place}{nearest(key[:100], model.model_fields)}"
    field = model.model_fields[key]
    if fault["type"] == "missing":
        return f"{place} is missing: {field.description}"
    if fault["type"] == "value_error":
        return f"{place}: {fault['ctx']['error']}"
    return f"{place} is {shown(fault['input'])}; it must be {allowed(field.annotation, field.metadata)}"


def shown(value: Any, most: int = 80) -> str:
    """Return a value as the user wrote it, not longer than a line; text that could mislead is quoted.

    Example:
        >>> shown(-1), shown("l3"), shown("1e-3 ")
        ('-1', 'l3', "'1e-3 '")
    """
    text = value if isinstance(value, str) and re.fullmatch(r"[\w.+:/()-]+( [\w.+:/()-]+)*", value) else repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."
