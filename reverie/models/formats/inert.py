"""A pickle read as what it says, and never done: its opcodes become plain data, of which nothing is called.

A pickle is a program for a stack machine whose words can call anything. Here the words for data build data, and those
that would import or call build a `Name` or a `Call` that says so. No class is looked up, no function runs, and an
opcode that is not in the table ends the reading.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from pickletools import genops
from typing import Any

from reverie.base.errors import ModelFileError

MAX_OPCODES = 5_000_000
MARK = object()


@dataclass(frozen=True)
class Name:
    """What a pickle would import."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Call:
    """What a pickle would call or make, with its arguments, and the state that it would be given then."""

    function: Any
    arguments: Any
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reference:
    """What a pickle refers to outside of itself."""

    key: Any


def read(source: BytesIO | bytes, where: str) -> Any:
    """Return what one pickle says, the stream standing after it.

    Raises:
        ModelFileError: It is no pickle, is cut off, or holds an opcode that no weights need.

    Example:
        >>> read(b"cos\\nsystem\\n(S'rm'\\ntR.", "a test")
        Call(function=Name(module='os', name='system'), arguments=('rm',), state=None, items={})
    """
    stream = BytesIO(source) if isinstance(source, bytes) else source
    machine = Machine()
    try:
        for count, (opcode, argument, _) in enumerate(genops(stream)):
            if count > MAX_OPCODES:
                raise ModelFileError(f"{where} is a pickle of more than {MAX_OPCODES} words; it holds no weights alone")
            machine.do(opcode.name, argument)
        return machine.stack.pop()
    except ModelFileError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, UnicodeError, OverflowError) as error:
        raise ModelFileError(f"{where} is no sound pickle of weights: {type(error).__name__}: {error}") from None


class Machine:
    """The stack and the memo, and what each opcode does to them."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def do(self, opcode: str, argument: Any) -> None:
        """Do one opcode."""
        if opcode in IGNORED:
            return
        if opcode in VALUES:
            self.stack.append(argument)
        elif opcode in FRESH:
            self.stack.append(FRESH[opcode]())
        elif opcode in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif opcode in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif opcode in ACTIONS:
            ACTIONS[opcode](self, argument)
        else:
            raise ValueError(f"the opcode {opcode} is none that weights need")

    def pop(self, count: int) -> list[Any]:
        """Take the last few off the stack, in their order."""
        if len(self.stack) < count:
            raise IndexError("its stack is empty")
        taken = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return taken

    def marked(self) -> list[Any]:
        """Take what lies above the last mark, and the mark."""
        places = [i for i, value in enumerate(self.stack) if value is MARK]
        if not places:
            raise IndexError("it goes back to a mark that was not set")
        place = places[-1]
        taken = self.stack[place + 1 :]
        del self.stack[place:]
        return taken

    def memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def name(self, argument: str) -> None:
        module, name = argument.split(" ", 1)
        self.stack.append(Name(module, name))

    def stacked_name(self, _: Any) -> None:
        self.stack.append(Name(*map(str, self.pop(2))))

    def tuple_of(self, count: int) -> None:
        self.stack.append(tuple(self.pop(count)))

    def call(self, _: Any) -> None:
        self.stack.append(Call(*self.pop(2)))

    def make(self, _: Any) -> None:
        self.stack.append(Call(*self.pop(2)))

    def make_with_names(self, _: Any) -> None:
        function, arguments, named = self.pop(3)
        self.stack.append(Call(function, (*arguments, named)))

    def build(self, _: Any) -> None:
        (state,) = self.pop(1)
        if isinstance(self.stack[-1], Call):
            self.stack[-1].state = state

    def put_items(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        held = target.items if isinstance(target, Call) else target
        if not isinstance(held, dict):
            raise TypeError("what has no items is given some")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            held[key if isinstance(key, str | int | float | bytes | tuple | None) else repr(type(key))] = value

    def dictionary(self, pairs: list[Any]) -> None:
        self.stack.append({})
        self.put_items(pairs)

    def append(self, values: list[Any]) -> None:
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(values)

    def refer(self, _: Any) -> None:
        self.stack.append(Reference(*self.pop(1)))


IGNORED = {"PROTO", "FRAME", "STOP"}
VALUES = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
FRESH: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_TUPLE": tuple, "EMPTY_LIST": list,
    "EMPTY_DICT": dict, "EMPTY_SET": list, "MARK": lambda: MARK,
}  # fmt: skip
ACTIONS: dict[str, Callable[[Machine, Any], Any]] = {
    "MEMOIZE": Machine.memoize,
    "GLOBAL": Machine.name,
    "STACK_GLOBAL": Machine.stacked_name,
    "TUPLE": lambda m, _: m.stack.append(tuple(m.marked())),
    "TUPLE1": lambda m, _: m.tuple_of(1),
    "TUPLE2": lambda m, _: m.tuple_of(2),
    "TUPLE3": lambda m, _: m.tuple_of(3),
    "LIST": lambda m, _: m.stack.append(m.marked()),
    "DICT": lambda m, _: m.dictionary(m.marked()),
    "FROZENSET": lambda m, _: m.stack.append(m.marked()),
    "APPEND": lambda m, _: m.append(m.pop(1)),
    "APPENDS": lambda m, _: m.append(m.marked()),
    "ADDITEMS": lambda m, _: m.append(m.marked()),
    "SETITEM": lambda m, _: m.put_items(m.pop(2)),
    "SETITEMS": lambda m, _: m.put_items(m.marked()),
    "REDUCE": Machine.call,
    "NEWOBJ": Machine.make,
    "NEWOBJ_EX": Machine.make_with_names,
    "BUILD": Machine.build,
    "BINPERSID": Machine.refer,
    "POP": lambda m, _: m.pop(1),
    "POP_MARK": lambda m, _: m.marked(),
}
