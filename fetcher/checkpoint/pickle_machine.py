"""Runs the pickle of a dictionary of tensors without calling anything.

A pickle is a program, and `pickle.Unpickler`, however its `find_class` is guarded, still runs it on
real objects: it hashes what it is told to hash, grows its memo to any index, and sets attributes.
So this is an interpreter of our own for the few opcodes that a dictionary of tensors needs. Its
values are strings, numbers, containers and inert stand-ins; none of them can be called. The names
it accepts are those that `torch.save` writes for tensors.

Opcodes: the comments in CPython's ``Lib/pickletools.py``.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from ...errors import CheckpointError, UnsafePickleError
from .stored_tensor import some

MAX_OPCODES: Final = 500_000
"""A tensor takes about 40, so this is room for 12,000 of them; it bounds the time to 0.4 s."""
MAX_DIMENSIONS: Final = 8
_MAX_NUMBER: Final = 1 << 62
_MAX_TUPLE: Final = 16

STORAGE_DTYPES: Final = {
    "FloatStorage": "fp32",
    "HalfStorage": "fp16",
    "BFloat16Storage": "bf16",
    "DoubleStorage": "fp64",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
"""Storage classes of torch by the type of their numbers, also of those nobody computes with here,
so that a message can name the type."""

_ALLOWED_GLOBALS: Final = frozenset(
    {
        ("collections", "OrderedDict"),
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch._utils", "_rebuild_parameter"),
        *(("torch", name) for name in STORAGE_DTYPES),
    }
)


@dataclass(frozen=True, slots=True)
class _Global:
    """A stand-in for an allowed name; it does nothing."""

    module: str
    name: str


@dataclass(frozen=True, slots=True)
class PickledStorage:
    """A reference to the ``data/KEY`` member that holds the numbers."""

    key: str
    dtype: str
    num_elements: int


@dataclass(frozen=True, slots=True)
class PickledTensor:
    """A view of a storage, in elements."""

    storage: PickledStorage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def kind_of(value: object) -> str:
    """What to call a value in a message."""
    return type(value).__name__.strip("_").lower()


class PickleMachine:
    """One run over one pickle; every method named after an opcode executes it."""

    def __init__(self, raw: bytes) -> None:
        self._raw = raw
        self._at = 0
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> object:
        """The value that the pickle stands for.

        Raises:
            UnsafePickleError: it refers to a name or uses an opcode that tensors do not need.
            CheckpointError: it is damaged or too long.
        """
        try:
            return self._execute()
        except UnicodeDecodeError as cause:
            raise CheckpointError(f"The pickle has a name that is not UTF-8: {cause}.") from cause

    def _execute(self) -> object:
        for _ in range(MAX_OPCODES):
            code = self._take(1)[0]
            if code == 0x2E:  # STOP
                if len(self._stack) != 1 or self._marks:
                    raise CheckpointError("The pickle stops with values left over; it is damaged.")
                return self._stack[0]
            execute = _OPCODES.get(code)
            if execute is None:
                raise UnsafePickleError(
                    f"The pickle uses opcode 0x{code:02x} at byte {self._at - 1}, which no "
                    "dictionary of tensors needs; nothing was executed. Do not trust this file."
                )
            execute(self)
        raise CheckpointError(
            f"The pickle has more than {MAX_OPCODES} opcodes; it is not a dictionary of tensors."
        )

    # Reading

    def _take(self, num_bytes: int) -> bytes:
        end = self._at + num_bytes
        if num_bytes < 0 or end > len(self._raw):
            raise CheckpointError(f"The pickle ends at byte {len(self._raw)}, inside an opcode.")
        taken = self._raw[self._at : end]
        self._at = end
        return taken

    def _number(self, num_bytes: int) -> int:
        return int.from_bytes(self._take(num_bytes), "little")

    def _line(self) -> str:
        end = self._raw.find(b"\n", self._at)
        if end < 0:
            raise CheckpointError("The pickle ends inside a name.")
        line = self._raw[self._at : end]
        self._at = end + 1
        return line.decode("utf-8")

    # The stack

    def _need(self, count: int) -> None:
        floor = self._marks[-1] if self._marks else 0
        if len(self._stack) - floor < count:
            raise CheckpointError(f"The pickle takes more than it has, at byte {self._at}.")

    def _pop(self) -> Any:
        self._need(1)
        return self._stack.pop()

    def _pop_to_mark(self) -> list[Any]:
        if not self._marks:
            raise CheckpointError(f"The pickle misses a mark, at byte {self._at}.")
        start = self._marks.pop()
        values = self._stack[start:]
        del self._stack[start:]
        return values

    def _top(self, kind: type) -> Any:
        value = self._pop()
        if type(value) is not kind:
            raise CheckpointError(
                f"The pickle changes a {kind_of(value)} as if it were a {kind.__name__}."
            )
        self._stack.append(value)
        return value

    # Opcodes

    def proto(self) -> None:
        if (version := self._number(1)) > 5:
            raise CheckpointError(f"The pickle has protocol {version}; 5 is the newest there is.")

    def frame(self) -> None:
        self._take(8)

    def push(self, value: object) -> None:
        self._stack.append(value)

    def mark(self) -> None:
        self._marks.append(len(self._stack))

    def text(self, length_bytes: int) -> None:
        self.push(self._take(self._number(length_bytes)).decode("utf-8"))

    def signed(self) -> None:
        self.push(int.from_bytes(self._take(4), "little", signed=True))

    def long(self) -> None:
        self.push(int.from_bytes(self._take(self._number(1)), "little", signed=True))

    def real(self) -> None:
        self.push(struct.unpack(">d", self._take(8))[0])

    def tuple_of(self, count: int) -> None:
        self._need(count)
        values = self._stack[-count:]
        del self._stack[-count:]
        self._push_tuple(values)

    def tuple_to_mark(self) -> None:
        self._push_tuple(self._pop_to_mark())

    def _push_tuple(self, values: list[Any]) -> None:
        """A shape, a storage's name, or the arguments of a rebuild: short, and two levels deep."""
        if len(values) > _MAX_TUPLE or any(
            type(value) is tuple and any(type(inner) is tuple for inner in value)
            for value in values
        ):
            raise CheckpointError("The pickle has longer or deeper tuples than a tensor needs.")
        self.push(tuple(values))

    def put(self, index: int) -> None:
        value = self._pop()
        self._memo[index] = value
        self.push(value)

    def get(self, index: int) -> None:
        if index not in self._memo:
            raise CheckpointError(f"The pickle recalls value {index}, which it never stored.")
        self.push(self._memo[index])

    def append(self) -> None:
        value = self._pop()
        self._top(list).append(value)

    def appends(self) -> None:
        values = self._pop_to_mark()
        self._top(list).extend(values)

    def set_item(self) -> None:
        value, key = self._pop(), self._pop()
        self._set_items([key, value])

    def set_items(self) -> None:
        self._set_items(self._pop_to_mark())

    def _set_items(self, flat: list[Any]) -> None:
        target = self._top(dict)
        if len(flat) % 2:
            raise CheckpointError("The pickle sets a key without a value.")
        for key, value in zip(flat[::2], flat[1::2], strict=True):
            # Anything but text may take for ever to hash, or overflow the C stack.
            if type(key) is not str:
                raise CheckpointError(
                    f"The pickle uses a {kind_of(key)} as a key; tensors have names."
                )
            if key in target:
                raise CheckpointError(f"The pickle holds {some([key])} twice.")
            target[key] = value

    def global_lines(self) -> None:
        module = self._line()
        self._push_global(module, self._line())

    def global_from_stack(self) -> None:
        name, module = self._pop(), self._pop()
        if type(name) is not str or type(module) is not str:
            raise CheckpointError("The pickle names a global by something that is not text.")
        self._push_global(module, name)

    def _push_global(self, module: str, name: str) -> None:
        if (module, name) not in _ALLOWED_GLOBALS:
            raise UnsafePickleError(
                f"The pickle refers to {some([f'{module}.{name}'])}, which no dictionary of "
                "tensors needs; nothing was executed. Do not trust this file."
            )
        self.push(_Global(module, name))

    def persistent(self) -> None:
        match self._pop():
            case ("storage", _Global("torch", kind), str(key), str(), int(num_elements)) if (
                kind in STORAGE_DTYPES and _is_count(num_elements)
            ):
                self.push(PickledStorage(key, STORAGE_DTYPES[kind], num_elements))
            case _:
                raise CheckpointError("The pickle refers to something that is not a storage.")

    def reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        match function, arguments:
            case _Global("collections", "OrderedDict"), ():
                self.push({})
            case _Global("torch._utils", "_rebuild_parameter"), (PickledTensor() as data, *_):
                self.push(data)
            case _Global("torch._utils", "_rebuild_tensor_v2"), (
                storage,
                offset,
                shape,
                strides,
                *_,
            ):
                self.push(_tensor(storage, offset, shape, strides))
            case _:
                raise CheckpointError(
                    f"The pickle builds a tensor from something else, at byte {self._at}."
                )

    def build(self) -> None:
        """State of an OrderedDict: torch's `_metadata` of module versions, which nobody needs."""
        self._pop()
        self._top(dict)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < _MAX_NUMBER


def _tensor(storage: object, offset: object, shape: object, strides: object) -> PickledTensor:
    if (
        not isinstance(storage, PickledStorage)
        or type(offset) is not int
        or type(shape) is not tuple
        or type(strides) is not tuple
        or len(shape) != len(strides)
        or len(shape) > MAX_DIMENSIONS
        or not all(_is_count(number) for number in (offset, *shape, *strides))
    ):
        raise CheckpointError("The pickle describes a tensor that cannot be; it is damaged.")
    return PickledTensor(storage, offset, shape, strides)


_OPCODES: Final[dict[int, Callable[[PickleMachine], None]]] = {
    0x80: PickleMachine.proto,
    0x95: PickleMachine.frame,
    ord("("): PickleMachine.mark,
    ord("N"): lambda run: run.push(None),
    0x88: lambda run: run.push(True),
    0x89: lambda run: run.push(False),
    ord("J"): PickleMachine.signed,
    ord("K"): lambda run: run.push(run._number(1)),
    ord("M"): lambda run: run.push(run._number(2)),
    0x8A: PickleMachine.long,
    ord("G"): PickleMachine.real,
    ord("X"): lambda run: run.text(4),
    0x8C: lambda run: run.text(1),
    0x8D: lambda run: run.text(8),
    ord(")"): lambda run: run.push(()),
    0x85: lambda run: run.tuple_of(1),
    0x86: lambda run: run.tuple_of(2),
    0x87: lambda run: run.tuple_of(3),
    ord("t"): PickleMachine.tuple_to_mark,
    ord("]"): lambda run: run.push([]),
    ord("a"): PickleMachine.append,
    ord("e"): PickleMachine.appends,
    ord("}"): lambda run: run.push({}),
    ord("s"): PickleMachine.set_item,
    ord("u"): PickleMachine.set_items,
    ord("q"): lambda run: run.put(run._number(1)),
    ord("r"): lambda run: run.put(run._number(4)),
    0x94: lambda run: run.put(len(run._memo)),
    ord("h"): lambda run: run.get(run._number(1)),
    ord("j"): lambda run: run.get(run._number(4)),
    ord("c"): PickleMachine.global_lines,
    0x93: PickleMachine.global_from_stack,
    ord("Q"): PickleMachine.persistent,
    ord("R"): PickleMachine.reduce,
    ord("b"): PickleMachine.build,
}
