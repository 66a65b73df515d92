"""Reads the pickle inside a torch file without being able to run it.

A pickle is a program for a stack machine, and its GLOBAL and REDUCE can call anything there is. This machine has the
same opcodes, as far as a state dict needs them, but imports nothing and calls nothing: a name stays text until it
stands in a pattern below, and any other name is refused.
"""

import pickletools
import struct
import warnings
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from mllama_jax.errors import InputError

UNTYPED_STORAGE = "torch.storage.UntypedStorage"
STORAGES = {
    "torch.DoubleStorage": np.dtype(np.float64),
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.LongStorage": np.dtype(np.int64),
    "torch.IntStorage": np.dtype(np.int32),
    "torch.ShortStorage": np.dtype(np.int16),
    "torch.CharStorage": np.dtype(np.int8),
    "torch.ByteStorage": np.dtype(np.uint8),
    "torch.BoolStorage": np.dtype(np.bool_),
    UNTYPED_STORAGE: np.dtype(np.uint8),
}
# Types without a storage class of their own: named beside an untyped storage.
UNTYPED = {
    "torch.float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "torch.float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "torch.uint16": np.dtype(np.uint16),
    "torch.uint32": np.dtype(np.uint32),
    "torch.uint64": np.dtype(np.uint64),
}


class Callables:
    """What torch.save calls by name."""

    ORDERED_DICT = "collections.OrderedDict"
    TENSOR = "torch._utils._rebuild_tensor_v2"
    UNTYPED_TENSOR = "torch._utils._rebuild_tensor_v3"
    PARAMETER = "torch._utils._rebuild_parameter"
    SIZE = "torch.Size"


_NAMES = {*STORAGES, *UNTYPED, *(value for key, value in vars(Callables).items() if key.isupper())}

_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(frozen=True)
class Name:
    """A Python object that the pickle names."""

    text: str


@dataclass(frozen=True)
class Storage:
    """The archive member `data/<key>` of `nbytes` bytes."""

    key: str
    dtype: np.dtype
    nbytes: int


@dataclass(frozen=True)
class View:
    """A tensor in a storage; `offset` and `stride` count elements of `dtype`. Nothing is checked yet."""

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple
    stride: tuple


def unpickle(data: bytes, origin: str) -> Any:
    """The pickled value, with a View for each tensor; InputError, beginning with `origin`, for all it does not know."""
    machine = _Machine(origin)
    try:
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # of odd escapes in a name
            for opcode, argument, _ in pickletools.genops(
                data
            ):  # first, for an error that says what the file would run
                if opcode.name in ("GLOBAL", "INST"):
                    machine.name(str(argument))
            for opcode, argument, _ in pickletools.genops(data):
                machine.step(opcode.name, argument)
        return machine.stack.pop()
    except InputError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, struct.error) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{origin}: damaged pickle ({reason}); download or copy the file again") from None


class _Machine:
    def __init__(self, origin: str):
        self.origin = origin
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []  # the stacks below each MARK
        self.memo: dict[int, Any] = {}

    def step(self, opcode: str, argument: Any) -> None:
        stack = self.stack
        match opcode:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "MARK":
                self.outer.append(stack)
                self.stack = []
            case "TUPLE":
                items = tuple(self._to_mark())
                self.stack.append(items)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                self._set(key, value)
            case "SETITEMS":
                items = self._to_mark()
                for key, value in zip(items[::2], items[1::2], strict=True):
                    self._set(key, value)
            case "APPEND":
                value = stack.pop()
                self._extend([value])
            case "APPENDS":
                self._extend(self._to_mark())
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "GLOBAL":
                stack.append(self.name(argument))
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                stack.append(self.name(str.join(" ", (module, attribute))))
            case "BINPERSID":
                stack.append(self._storage(stack.pop()))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(self._rebuild(function, arguments))
            case "BUILD":
                self._discard_attributes()
            case _ if opcode in _LITERALS:
                stack.append(argument)
            case _ if opcode in _CONSTANTS:
                stack.append(_CONSTANTS[opcode])
            case _ if opcode in _TUPLES:
                items = tuple(stack.pop() for _ in range(_TUPLES[opcode]))
                stack.append(items[::-1])
            case _:
                raise InputError(f"{self.origin}: refused: pickle opcode {opcode} is not part of a state dict")

    def _to_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.outer.pop()
        return items

    def _set(self, key: Any, value: Any) -> None:
        # Other keys would only cost time: the hash of tuples nested through the memo takes exponentially long.
        target = self.stack[-1]
        if not isinstance(target, dict) or not isinstance(key, str | int):
            raise InputError(f"{self.origin}: refused: sets a {type(key).__name__} key of a {type(target).__name__}")
        target[key] = value

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise InputError(f"{self.origin}: refused: appends to a {type(target).__name__}")
        target.extend(items)

    def name(self, qualified: str) -> Name:
        text = qualified.replace(" ", ".")
        if text not in _NAMES:
            raise InputError(
                f"{self.origin}: refused: names {text[:100]!r}, but weights need only torch tensors; "
                "do not load this file with torch unless you trust its source"
            )
        return Name(text)

    def _storage(self, identity: Any) -> Storage:
        match identity:
            case ("storage", Name(text=kind), str(key), _, int(count)) if kind in STORAGES:
                return Storage(key, STORAGES[kind], count * STORAGES[kind].itemsize)
        raise InputError(f"{self.origin}: refused: a persistent id that is not a torch storage")

    def _rebuild(self, function: Any, arguments: Any) -> Any:
        match function.text if isinstance(function, Name) else None, arguments:
            case Callables.ORDERED_DICT, ():
                return {}
            case Callables.SIZE, (tuple(shape),):
                return shape
            case Callables.PARAMETER, (View() as view, *_):
                return view
            case Callables.TENSOR, (Storage() as storage, offset, tuple(shape), tuple(stride), *_):
                return View(storage, storage.dtype, offset, shape, stride)
            case Callables.UNTYPED_TENSOR, (
                Storage() as storage,
                offset,
                tuple(shape),
                tuple(stride),
                _,
                _,
                Name(text=dtype),
                *_,
            ) if dtype in UNTYPED:
                return View(storage, UNTYPED[dtype], offset, shape, stride)
        called = function.text if isinstance(function, Name) else type(function).__name__
        raise InputError(f"{self.origin}: refused: a call of {called} with arguments that torch.save does not write")

    def _discard_attributes(self) -> None:
        # Module.state_dict() hangs `_metadata` on its OrderedDict; no weight depends on it.
        state = self.stack.pop()
        if not isinstance(self.stack[-1], dict) or not isinstance(state, dict):
            raise InputError(f"{self.origin}: refused: sets attributes of a {type(self.stack[-1]).__name__}")
