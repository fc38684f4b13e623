"""Memory traffic of a compiled TPU program, counted from its text (``compiled.as_text()``): bytes of HBM, and
collectives.

XLA's `cost_analysis()` counts the body of a loop once, and data in VMEM like data in HBM. Here

- operands and results count if they are in HBM: ``S(1)`` in a layout is VMEM, other S flags and scalars;
- a slice or gather counts at its own size, an update in place at the update's size;
- the body of a loop counts once per iteration; if the trip count depends on data (the steps of `decoding.decode`),
    once;
- of the branches of a conditional the costliest counts;
- a Pallas kernel counts its ``cost_estimate``, which for `minicpm_jax.layers.kernels` assumes a full cache; a kernel
  without one (JAX's splash attention) counts its operands and results once;
- padding counts: an array whose last axis is 64 takes lanes of 128.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Set
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
# Only name values, or end an instruction that was counted at its start.
FREE = frozenset(
    """parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id opt-barrier
    add-dependency domain get-dimension-size""".split()
)
PASSING = ("bitcast", "convert", "copy", "reshape", "transpose")  # within a fusion: reading them reads their operand
# XLA's own custom calls that only declare something.
NAMING = ("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound")
SLICING = ("dynamic-slice", "slice", "gather")
UPDATING = ("dynamic-update-slice", "scatter")
PASSED_ON = "output_to_operand_aliasing"  # attribute of a fusion: operands passed on unchanged
BITS = {"pred": 8, "token": 0, "opaque": 0}  # types whose name does not end in their width

_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAME = re.compile(r"^  (ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
_TARGET = re.compile(r'custom_call_target="(\w+)"')
_STATED = re.compile(r'"bytes_accessed":"(\d+)"')


class Buffer(NamedTuple):
    """One array: its number of elements, its bytes with padding, and whether it is in HBM."""

    numbers: int
    size: int
    in_hbm: bool

    @property
    def hbm(self) -> int:
        return self.size if self.in_hbm else 0

    def part(self, numbers: int) -> int:
        """Bytes of HBM for ``numbers`` of its elements."""
        return 0 if not self.numbers else int(self.hbm * min(numbers / self.numbers, 1))


@dataclass(frozen=True)
class Instruction:
    """One instruction of an HLO computation."""

    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    rest: str  # the text inside the brackets and after them
    root: bool

    @cached_property
    def buffers(self) -> list[Buffer]:
        """The arrays of the result; of a tuple its elements."""
        return [_buffer(*found) for found in _ARRAY.findall(self.shape)]

    @property
    def numbers(self) -> int:
        return sum(buffer.numbers for buffer in self.buffers)

    def called(self, key: str) -> str | None:
        """The computation named by an attribute such as ``body``."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.rest)
        return found and found[1]


Computation = dict[str, Instruction]


@dataclass
class Traffic:
    """Traffic of one run of a program (one step, if the number of steps depends on data), per chip."""

    hbm: int = 0  # bytes read and written
    counts: Counter[str] = field(default_factory=Counter)  # collectives by kind, times trip counts
    bytes: Counter[str] = field(default_factory=Counter)  # by kind: the larger of operands and results

    def add(self, other: "Traffic", times: int = 1) -> None:
        self.hbm += times * other.hbm
        for mine, more in ((self.counts, other.counts), (self.bytes, other.bytes)):
            for kind, count in more.items():
                mine[kind] += times * count


def traffic(text: str) -> Traffic:
    """Traffic of the program with this text."""
    return Program(text).traffic


class Program:
    """The computations of an HLO module's text."""

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        self._known: dict[tuple[str, frozenset[str]], Traffic] = {}
        inside: Computation = {}
        for line in text.splitlines():
            if head := _HEAD.match(line):
                self.computations[head[1]] = inside = {}
                self.entry = head[1] if line.startswith("ENTRY") else self.entry
            elif found := _NAME.match(line):
                instruction = _instruction(line[found.end() :], found[2], bool(found[1]))
                inside[instruction.name] = instruction

    @cached_property
    def traffic(self) -> Traffic:
        return self._of(self.entry)

    def instructions(self) -> Iterator[tuple[Instruction, int]]:
        """Every instruction that is scheduled by itself (outside fusions), and how often it runs."""
        return self._walk(self.entry, 1)

    def _walk(self, name: str, times: int) -> Iterator[tuple[Instruction, int]]:
        computation = self.computations[name]
        for instruction in computation.values():
            yield instruction, times
            if instruction.opcode == "while":
                yield from self._walk(instruction.called("body") or "", times * self.trips(instruction, computation))
            elif instruction.opcode == "call":
                yield from self._walk(instruction.called("to_apply") or "", times)
            elif instruction.opcode == "conditional":
                for branch in _branches(instruction):
                    yield from self._walk(branch, times)

    def _of(self, name: str, begun: Set[str] = frozenset()) -> Traffic:
        """Traffic of a computation. ``begun``: channels of collectives that run concurrently."""
        key = name, frozenset(begun)
        if key not in self._known:
            self._known[key] = total = Traffic()
            computation, channels = self.computations[name], set(begun)
            for instruction in computation.values():
                self._count(total, instruction, computation, channels)
        return self._known[key]

    def _count(self, total: Traffic, instruction: Instruction, computation: Computation, channels: set[str]) -> None:
        """Add an instruction's traffic. ``channels``: collectives that have been counted. An asynchronous collective
        appears in the fusion that starts it, in those it overlaps with (also of loops), and in the one that waits
        for it; all pass its arrays on. Other collectives that XLA combined may share a channel."""
        opcode = instruction.opcode
        if opcode in FREE or opcode.endswith(("-done", "-update")):
            return
        if opcode == "while":
            total.add(self._of(instruction.called("body") or "", channels), self.trips(instruction, computation))
        elif opcode == "call" or (opcode == "async-start" and self._plain(instruction)):
            total.add(self._of(instruction.called("to_apply") or instruction.called("calls") or "", channels))
        elif opcode == "conditional":
            total.add(
                max((self._of(branch, channels) for branch in _branches(instruction)), key=lambda traffic: traffic.hbm)
            )
        else:
            total.hbm += self.bytes_of(instruction, computation)
            beside = PASSED_ON in instruction.rest
            for kind, channel, size in self._collectives(instruction, computation):
                if not beside or not channel or channel not in channels:
                    channels.update([channel] if beside else [])
                    total.counts[kind] += 1
                    total.bytes[kind] += size

    def _plain(self, instruction: Instruction) -> bool:
        """Whether an async-start calls a computation, not a fusion."""
        return (instruction.called("calls") or "") in self.computations

    def bytes_of(self, instruction: Instruction, computation: Computation) -> int:
        """Bytes of HBM that one instruction reads and writes."""
        opcode = instruction.opcode
        operands = [computation[name].buffers for name in instruction.operands if name in computation]
        read = [sum(buffer.hbm for buffer in buffers) for buffers in operands]
        if opcode == "fusion":
            return self._fusion(instruction, operands)
        if opcode == "custom-call":
            if (target := _TARGET.search(instruction.rest)) and target[1] in NAMING:
                return 0
            if stated := _STATED.search(instruction.rest):
                return int(stated[1])
        if opcode in SLICING:
            taken = operands[0][0].part(instruction.numbers)
            return taken + sum(read[1:]) + sum(buffer.hbm for buffer in instruction.buffers)
        if opcode == "slice-start":  # ((operand), result, flag)
            return operands[0][0].part(instruction.buffers[1].numbers) + instruction.buffers[1].hbm
        if opcode in UPDATING:
            update = operands[1 if opcode == "dynamic-update-slice" else -1][0]
            return sum(read[1:]) + instruction.buffers[0].part(update.numbers)
        if opcode in ("copy-start", "collective-permute-start", "all-gather-start", "all-reduce-start"):
            written = instruction.buffers[: 1 if opcode == "copy-start" else None]
            if opcode in ("collective-permute-start", "all-gather-start"):  # (operands, results, ...)
                written = instruction.buffers[1:2]
            return sum(read) + sum(buffer.hbm for buffer in written)
        return sum(read) + sum(buffer.hbm for buffer in instruction.buffers)

    def _fusion(self, instruction: Instruction, operands: list[list[Buffer]]) -> int:
        """Bytes that a fusion reads of its operands and writes of its results."""
        inside = self.computations[instruction.called("calls") or ""]
        users = _users(inside)
        passed_in, passed_out = _passed(instruction) if any(self._collectives(instruction, {})) else (set(), set())
        total = 0
        for parameter in (i for i in inside.values() if i.opcode == "parameter"):
            number = int(parameter.rest.partition(")")[0])
            if number < len(operands) and number not in passed_in:
                used = self._used(parameter, inside, users)
                total += sum(b.part(b.numbers if used is None else used) for b in operands[number])
        for number, (buffer, source) in enumerate(zip(instruction.buffers, self._results(inside), strict=False)):
            if number not in passed_out:
                total += buffer.hbm if source is None else buffer.part(source)
        return total

    def _used(self, value: Instruction, inside: Computation, users: dict[str, list[Instruction]]) -> int | None:
        """Number of elements of a value that are read within a fusion; None: all."""
        total = 0
        for user in users.get(value.name, []):
            if user.opcode in SLICING and user.operands[0] == value.name and value.name not in user.operands[1:]:
                total += user.numbers
            elif user.opcode in UPDATING and user.operands[0] == value.name and value.name not in user.operands[1:]:
                continue  # it is updated in place
            elif user.opcode in PASSING or (user.opcode == "fusion" and self._passes(user)):
                used = self._used(user, inside, users)
                if used is None:
                    return None
                total += used
            elif user.opcode == "fusion":
                called = self.computations[user.called("calls") or ""]
                deeper = _users(called)
                for place in (i for i, name in enumerate(user.operands) if name == value.name):
                    used = self._used(_parameter(called, place), called, deeper)
                    if used is None:
                        return None
                    total += used
            elif not (user.root and user.opcode == "tuple"):
                return None
        return total if users.get(value.name) else None

    def _passes(self, fusion: Instruction) -> bool:
        """Whether a nested fusion only changes the layout of its operand."""
        return all(
            i.opcode in (*PASSING, "parameter") for i in self.computations[fusion.called("calls") or ""].values()
        )

    def _results(self, inside: Computation) -> list[int | None]:
        """For each result of a fusion, the number of elements written if it is an update; None: all."""
        root = next(i for i in inside.values() if i.root)
        parts = [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]
        return [self._updated(part, inside) for part in parts]

    def _updated(self, value: Instruction, inside: Computation) -> int | None:
        while value.opcode in ("bitcast", "copy") and value.operands:
            value = inside[value.operands[0]]
        if value.opcode in UPDATING and _begins(inside[value.operands[0]], inside).opcode == "parameter":
            return inside[value.operands[1 if value.opcode == "dynamic-update-slice" else -1]].numbers
        if value.opcode == "fusion" and not value.shape.startswith("("):
            return self._results(self.computations[value.called("calls") or ""])[0]
        return None

    def _collectives(self, instruction: Instruction, computation: Computation) -> Iterator[tuple[str, str, int]]:
        """Kind, channel ("" without one) and bytes. A fusion that keeps a slice of an all-reduce is a TPU's form of
        reduce-scatter."""
        kind = instruction.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            operands = [computation[name] for name in instruction.operands if name in computation]
            sizes = [sum(b.size for b in value.buffers) for value in (*operands, instruction)]
            went, came = sum(sizes[:-1]), sizes[-1]
            if instruction.opcode.endswith("-start") and kind != "all-reduce":
                came -= went  # (operands, results)
            found = re.search(r"channel_id=(\d+)", instruction.rest)
            yield kind, found[1] if found else "", max(went, came)
        elif instruction.opcode in ("fusion", "async-start"):
            inside = self.computations.get(instruction.called("calls") or "", {})
            sliced = any(i.opcode == "dynamic-slice" for i in inside.values())
            for deeper in inside.values():
                for kind, channel, size in self._collectives(deeper, inside):
                    yield ("reduce-scatter" if kind == "all-reduce" and sliced else kind), channel, size

    def trips(self, loop: Instruction, computation: Computation) -> int:
        """Trip count of a while loop: XLA's annotation, or a counter that is compared with a constant; otherwise 1."""
        if known := re.search(r'known_trip_count[^\d}]*"?n"?[^\d}]*(\d+)', loop.rest):
            return int(known[1])
        condition = self.computations[loop.called("condition") or ""]
        root = next(i for i in condition.values() if i.root)
        if root.opcode != "compare" or "direction=LT" not in root.rest:
            return 1
        counter, end = (condition[name] for name in root.operands)
        last = _constant(end)
        place = re.search(r"index=(\d+)", counter.rest) if counter.opcode == "get-tuple-element" else None
        if last is None or place is None:
            return 1
        start = computation.get(loop.operands[0])
        first = _constant(_begins(computation[start.operands[int(place[1])]], computation)) if start else None
        return max(last - (first or 0), 1)


def _constant(value: Instruction) -> int | None:
    found = re.match(r"(-?\d+)\)", value.rest) if value.opcode == "constant" else None
    return int(found[1]) if found else None


def _begins(value: Instruction, inside: Computation) -> Instruction:
    """The value without the bitcasts and copies applied to it."""
    while value.opcode in ("bitcast", "copy", "convert") and value.operands:
        value = inside[value.operands[0]]
    return value


def _passed(fusion: Instruction) -> tuple[set[int], set[int]]:
    """Operands that a fusion passes on unchanged, and the results that they become: arrays of a collective that
    overlaps with the fusion."""
    found = re.search(PASSED_ON + r"=\{(.*?)\}, [a-z]", fusion.rest)
    pairs = re.findall(r"\{(\d*)\}: \((\d+)", found[1]) if found else []
    return {int(operand) for _, operand in pairs}, {int(result or 0) for result, _ in pairs}


def _branches(instruction: Instruction) -> list[str]:
    if several := re.search(r"branch_computations=\{([^}]*)\}", instruction.rest):
        return [name.strip().lstrip("%") for name in several[1].split(",")]
    return [name for name in map(instruction.called, ("true_computation", "false_computation")) if name]


def _parameter(computation: Computation, number: int) -> Instruction:
    return next(i for i in computation.values() if i.opcode == "parameter" and i.rest.startswith(f"{number})"))


def _users(computation: Computation) -> dict[str, list[Instruction]]:
    users: dict[str, list[Instruction]] = {}
    for instruction in computation.values():
        for name in dict.fromkeys(instruction.operands):
            users.setdefault(name, []).append(instruction)
    return users


def _instruction(text: str, name: str, root: bool) -> Instruction:
    end = _closing(text, 0) + 1 if text.startswith("(") else _after_shape(text)
    opcode = _OPCODE.match(text, end)
    assert opcode is not None, text[:200]
    rest = text[opcode.end() :]
    inside = rest[: _closing(rest, -1)]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(name, opcode[1], text[:end], operands, rest, root)


def _after_shape(text: str) -> int:
    found = _ARRAY.match(text)
    return found.end() if found else text.index(" ")


def _closing(text: str, start: int) -> int:
    """Index of the bracket that closes the one at ``start`` (-1: one before the text)."""
    depth = 0 if start >= 0 else 1
    for i in range(max(start, 0), len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    return len(text)


def _buffer(kind: str, dims: str, layout: str) -> Buffer:
    shape = [int(d) for d in dims.split(",") if d]
    order, _, tiling = layout.partition(":")
    padded = list(shape)
    if (tile := re.match(r"T\(([\d,]+)\)", tiling)) and shape:
        minor = [int(d) for d in order.split(",") if d]
        for axis, size in zip(minor, reversed(tile[1].split(",")), strict=False):
            padded[axis] = -(-shape[axis] // int(size)) * int(size)
    # A single row of a tile is stored as one row: only its lanes are padded.
    space = re.search(r"S\((\d+)\)", tiling)
    return Buffer(math.prod(shape), math.prod(padded) * _bits(kind) // 8, space is None or space[1] == "0")


def _bits(kind: str) -> int:
    if kind in BITS:
        return BITS[kind]
    found = re.match(r"[a-z]+(\d+)", kind)
    return int(found[1]) if found else 0
