"""Interpret a pickle safely. It can only build plain values, and cannot run code.

Python's unpickler trusts its input: it hashes any key (deeply nested tuples take forever), allocates a memo as long as
the largest index, and calls what the pickle names. This interpreter knows the opcodes that ``torch.save`` writes (those
of torch's ``_weights_only_unpickler.py``, and of protocols 3 to 5), and leaves names and storages to its caller. Time
and memory only grow with the number of opcodes.
"""

import pickletools
from collections.abc import Callable
from typing import Any

from weights_io.errors import short

MAX_OPCODES = 1_000_000  # a tensor has about 65
VALUES = frozenset(
    """INT BININT BININT1 BININT2 LONG LONG1 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES
    UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8""".split()
)
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class OrderedState(dict):
    """Represents an OrderedDict."""


class Program:
    """The interpreter.

    Arguments:
        find: (module, name) -> the object for a global, which the pickle may call if it is callable.
        storage: persistent id -> the object for it.
    """

    def __init__(self, find: Callable[[str, str], object], storage: Callable[[object], object]):
        self.find, self.storage = find, storage
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.steps = 0

    def run(self, pickled: bytes) -> object:
        """The object that the pickle builds.

        Raises:
            ValueError, KeyError or TypeError: the pickle is damaged or uses another opcode; also what ``find`` and
                ``storage`` raise.
        """
        for opcode, argument, _ in pickletools.genops(pickled):
            self.step(1)
            name = opcode.name
            if name in VALUES:
                self.stack.append(argument)
            elif name in CONSTANTS:
                self.stack.append(CONSTANTS[name])
            elif name in TUPLES:
                self.stack.append(tuple(self.take(TUPLES[name])))
            elif name == "STOP":
                return self.take(1)[0]
            elif not (self.remember(name, argument) or self.collect(name) or self.make(name, argument)):
                raise ValueError(f"it has the opcode {name}, which no tensor needs")
        raise ValueError("it has no end")

    def step(self, count: int) -> None:
        self.steps += count
        if self.steps > MAX_OPCODES:
            raise ValueError(f"it has more than {MAX_OPCODES} parts, more than any model needs")

    def take(self, count: int) -> list[Any]:
        """The last values, off the stack."""
        if len(self.stack) - (self.marks[-1] if self.marks else 0) < count:
            raise ValueError("it takes more than it has made")
        start = len(self.stack) - count
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def take_marked(self) -> list[Any]:
        if not self.marks:
            raise ValueError("it takes more than it has made")
        values = self.take(len(self.stack) - self.marks[-1])
        self.marks.pop()
        return values

    def last(self) -> Any:
        (value,) = self.take(1)
        self.stack.append(value)
        return value

    def remember(self, name: str, argument: Any) -> bool:
        match name:
            case "BINGET" | "LONG_BINGET" | "GET":
                self.stack.append(self.memo[argument])
            case "BINPUT" | "LONG_BINPUT" | "PUT":
                if argument >= self.steps:
                    raise ValueError(f"it puts away its number {argument} after {self.steps} opcodes")
                self.memo[argument] = self.last()
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.last()
            case "PROTO" | "FRAME":
                pass
            case _:
                return False
        return True

    def collect(self, name: str) -> bool:
        match name:
            case "MARK":
                self.marks.append(len(self.stack))
            case "EMPTY_LIST":
                self.stack.append([])
            case "EMPTY_DICT":
                self.stack.append({})
            case "TUPLE":
                self.stack.append(tuple(self.take_marked()))
            case "LIST":
                self.stack.append(self.take_marked())
            case "DICT":
                self.stack.append(self.filled({}, self.take_marked()))
            case "APPEND" | "APPENDS":
                values = self.take(1) if name == "APPEND" else self.take_marked()
                if type(self.last()) is not list:
                    raise ValueError("it appends to what is no list")
                self.last().extend(values)
            case "SETITEM" | "SETITEMS":
                values = self.take(2) if name == "SETITEM" else self.take_marked()
                self.filled(self.last(), values)
            case "POP":
                if self.marks and self.marks[-1] == len(self.stack):
                    self.marks.pop()
                else:
                    self.take(1)
            case _:
                return False
        return True

    def filled(self, target: Any, items: list[Any]) -> Any:
        if not isinstance(target, dict) or len(items) % 2:
            raise ValueError("it puts items into what is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            key = _key(key)
            if key in target:
                raise ValueError(f"it has the key {short(key)} twice")
            target[key] = value
        return target

    def make(self, name: str, argument: Any) -> bool:
        """What a pickle runs, in one that is unpickled."""
        match name:
            case "GLOBAL":
                self.stack.append(self.find(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                module, attribute = self.take(2)
                if not isinstance(module, str) or not isinstance(attribute, str):  # a tuple's text may have no end
                    raise ValueError("it names what is no function")
                self.stack.append(self.find(module, attribute))
            case "INST":
                function = self.find(*argument.split(" ", 1))
                self.stack.append(self.called(function, tuple(self.take_marked())))
            case "REDUCE":
                function, arguments = self.take(2)
                self.stack.append(self.called(function, arguments))
            case "BUILD":
                self.take(1)  # the _metadata that state_dict() hangs on its OrderedDict
                if not isinstance(self.last(), OrderedState):
                    raise ValueError("it sets attributes of what is no state_dict")
            case "BINPERSID":
                self.stack.append(self.storage(self.take(1)[0]))
            case "PERSID":
                self.stack.append(self.storage(argument))
            case _:
                return False
        return True

    def called(self, function: Any, arguments: Any) -> Any:
        if not callable(function) or not isinstance(arguments, tuple):
            raise ValueError("it calls what is no function")
        if function is OrderedState:
            items = arguments[0] if arguments else []
            if len(arguments) > 1 or type(items) is not list:
                raise ValueError("it makes an OrderedDict of what is no list")
            self.step(len(items))
            pairs = [part for pair in items for part in _pair(pair)]
            return self.filled(OrderedState(), pairs)
        return function(*arguments)


def _key(value: Any) -> Any:
    """``value``, if it is hashed at once and no file can choose its hash: whoever can makes a dict take for ever."""
    if isinstance(value, str | bytes | None) or (isinstance(value, int) and 0 <= value <= MAX_OPCODES):
        return value
    raise ValueError(f"it has a key that is a {type(value).__name__.strip('_')}, or a number beyond all use")


def _pair(value: Any) -> Any:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError("it makes an OrderedDict of what are no pairs")
    return value
