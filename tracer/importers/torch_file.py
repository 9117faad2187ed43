"""Reads tensors, numbers, texts, lists and dicts out of a file of `torch.save`, and runs nothing.

Such a file is a zip archive whose `data.pkl` is a program for a stack machine that may call any function by name.
Here the program is only read (`pickletools`, which executes nothing) and the few opcodes that build plain data are
followed by hand. The only names it may speak of are torch's storage kinds, the function that puts a tensor together
and the empty OrderedDict beside it; everything else is refused and named.

Layout: docs.pytorch.org/docs/2.9/notes/serialization.html, tried with torch 2.13; pickle protocols 2 to 4.
"""

from __future__ import annotations

import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError

_TENSOR = "torch._utils _rebuild_tensor_v2"
_EMPTY = "collections OrderedDict"
_STORAGES = {
    "torch BoolStorage": "<?",
    "torch ByteStorage": "<u1",
    "torch CharStorage": "<i1",
    "torch ShortStorage": "<i2",
    "torch IntStorage": "<i4",
    "torch LongStorage": "<i8",
    "torch HalfStorage": "<f2",
    "torch FloatStorage": "<f4",
    "torch DoubleStorage": "<f8",
}
_MARK = object()
BAD_ARCHIVE = (
    OSError,
    EOFError,
    ValueError,  # undecodable names, impossible sizes
    RuntimeError,  # encrypted
    NotImplementedError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
)
"""What zipfile raises, in practice, for a damaged archive."""
_DAMAGE = (IndexError, KeyError, TypeError, ValueError, AttributeError, OverflowError)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in the file, read when asked for. `size` and `stride` are in elements."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def array(self) -> np.ndarray:
        """Its values. Raises InputError if its storage is damaged or too small for it."""
        path, values = self.storage.path, self.storage.values()
        reach = self.offset + sum(
            (n - 1) * step for n, step in zip(self.size, self.stride, strict=True)
        )
        count = int(np.prod(self.size, dtype=object))
        if count == 0:
            return np.empty(self.size, values.dtype)
        if reach >= len(values):
            raise InputError(f"{path}: a tensor of size {list(self.size)} goes beyond its storage.")
        # As many elements as the storage at most, or a small file could ask for any amount of memory.
        if count > len(values):
            raise InputError(f"{path}: a tensor of size {list(self.size)} repeats its storage.")
        strides = tuple(step * values.itemsize for step in self.stride)
        view = np.lib.stride_tricks.as_strided(
            values[self.offset :], self.size, strides, writeable=False
        )
        return view.copy()


@dataclass(frozen=True, slots=True)
class _Storage:
    path: Path
    member: str
    kind: str
    count: int

    def values(self) -> np.ndarray:
        with _archive(self.path) as archive:
            body = _member(self.path, archive, self.member)
        kind = np.dtype(self.kind)
        if len(body) < self.count * kind.itemsize:
            raise InputError(f"{self.path}: {self.member} is cut off; copy the file again.")
        return np.frombuffer(body, kind, self.count)


def read_torch_file(path: Path) -> Any:
    """Read what `torch.save` wrote: plain values, with a `StoredTensor` for every tensor.

    Raises InputError if the file is damaged, or asks for anything but plain values and tensors.
    """
    with _archive(path) as archive:
        names = archive.namelist()
        programs = [name for name in names if name.endswith("/data.pkl")]
        if len(programs) != 1:
            raise InputError(
                f"{path} is no file of torch.save: its archive holds {len(programs)} data.pkl. A file from "
                "before torch 1.6 has to be saved again."
            )
        root = programs[0].removesuffix("data.pkl")
        order = root + "byteorder"
        if order in names and _member(path, archive, order).strip() != b"little":
            raise InputError(f"{path} was written on a big-endian machine and is not read.")
        program = _member(path, archive, programs[0])
    return _Reader(path, root).read(program)


def _archive(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except BAD_ARCHIVE as error:
        raise InputError(f"{path} is no archive, or is cut off ({error}); copy it again.") from None


def _member(path: Path, archive: zipfile.ZipFile, name: str) -> bytes:
    try:
        info = archive.getinfo(name)
        if info.compress_type != zipfile.ZIP_STORED:
            raise InputError(f"{path}: {name} is compressed, which torch.save does not do.")
        return archive.read(info)
    except KeyError:
        raise InputError(f"{path} lacks {name}, which it speaks of; copy it again.") from None
    except BAD_ARCHIVE as error:
        raise InputError(f"{path}: {name} is damaged ({error}); copy the file again.") from None


@dataclass(slots=True)
class _Reader:
    """The stack machine, as far as plain data needs it."""

    path: Path
    root: str
    stack: list[Any] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def read(self, program: bytes) -> Any:
        try:
            for opcode, argument, place in pickletools.genops(program):
                if opcode.name == "STOP":
                    return self.stack.pop()
                step = _STEPS.get(opcode.name)
                if step is None:
                    raise self._refusal(f"the opcode {opcode.name} at byte {place}")
                step(self, argument)
        except _DAMAGE as error:
            raise InputError(f"{self.path}: data.pkl is damaged ({error}).") from None
        raise InputError(f"{self.path}: data.pkl does not end.")

    def _refusal(self, what: str) -> InputError:
        return InputError(
            f"{self.path} asks for {what}. Only tensors, numbers, texts, lists and dicts are read, and nothing "
            "is ever run. Do not load this file with other tools unless you trust where it comes from."
        )

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def named(self, name: Any) -> None:
        if name not in _STORAGES and name not in (_TENSOR, _EMPTY):
            raise self._refusal(f"{str(name)!r}")
        self.push(_Name(name))

    def named_by_stack(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.named(f"{module} {name}")

    def called(self, _: Any) -> None:
        arguments, name = self.stack.pop(), self.stack.pop()
        if name == _Name(_EMPTY) and arguments == ():
            self.push({})
        elif name == _Name(_TENSOR) and isinstance(arguments[0], _Storage):
            storage, offset, size, stride = arguments[:4]
            sizes, strides = _counts(size), _counts(stride)
            if len(sizes) != len(strides):
                raise ValueError("a tensor has more sizes than strides")
            self.push(StoredTensor(storage, _count(offset), sizes, strides))
        else:
            raise self._refusal("a call that makes no tensor")

    def stored(self, _: Any) -> None:
        kind, storage, key, _, count = self.stack.pop()
        if kind != "storage" or not isinstance(storage, _Name):
            raise self._refusal("something outside the archive")
        name = f"{self.root}data/{key}"
        self.push(_Storage(self.path, name, _STORAGES[storage.text], _count(count)))

    def marked(self) -> list[Any]:
        """What lies above the last mark, which goes."""
        place = len(self.stack) - 1
        while self.stack[place] is not _MARK:
            place -= 1
            if place < 0:
                raise ValueError("a mark is missing")
        above = self.stack[place + 1 :]
        del self.stack[place:]
        return above

    def tuple_of(self, count: int) -> None:
        values = tuple(self.stack[-count:])
        if len(values) < count or _MARK in values:
            raise ValueError("a tuple is cut off")
        del self.stack[-count:]
        self.push(values)

    def extend(self, values: list[Any]) -> None:
        _expect(self.stack[-1], list).extend(values)

    def update(self, values: list[Any]) -> None:
        if len(values) % 2:
            raise ValueError("a key has no value")
        _expect(self.stack[-1], dict).update(zip(values[::2], values[1::2], strict=True))

    def set_item(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.update([key, value])

    def append(self, _: Any) -> None:
        self.extend([self.stack.pop()])

    def remember(self, place: int | None) -> None:
        self.memo[len(self.memo) if place is None else place] = self.stack[-1]


@dataclass(frozen=True, slots=True)
class _Name:
    """A name that data.pkl speaks of. It stays a name: nothing is imported."""

    text: str


def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"a {kind.__name__} is expected")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError("a size is no whole number")
    return value


def _counts(values: Any) -> tuple[int, ...]:
    return tuple(_count(value) for value in values)


_PUSHED = (
    "BININT",
    "BININT1",
    "BININT2",
    "LONG1",
    "LONG4",
    "BINFLOAT",
    "BINUNICODE",
    "SHORT_BINUNICODE",
    "BINUNICODE8",
)
_Step = Callable[[_Reader, Any], None]
_STEPS: dict[str, _Step] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda reader, argument: None),
    **dict.fromkeys(_PUSHED, _Reader.push),
    "NONE": lambda reader, _: reader.push(None),
    "NEWTRUE": lambda reader, _: reader.push(True),
    "NEWFALSE": lambda reader, _: reader.push(False),
    "EMPTY_DICT": lambda reader, _: reader.push({}),
    "EMPTY_LIST": lambda reader, _: reader.push([]),
    "EMPTY_TUPLE": lambda reader, _: reader.push(()),
    "MARK": lambda reader, _: reader.push(_MARK),
    "TUPLE": lambda reader, _: reader.push(tuple(reader.marked())),
    "TUPLE1": lambda reader, _: reader.tuple_of(1),
    "TUPLE2": lambda reader, _: reader.tuple_of(2),
    "TUPLE3": lambda reader, _: reader.tuple_of(3),
    "APPEND": _Reader.append,
    "APPENDS": lambda reader, _: reader.extend(reader.marked()),
    "SETITEM": _Reader.set_item,
    "SETITEMS": lambda reader, _: reader.update(reader.marked()),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT", "MEMOIZE"), _Reader.remember),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda reader, key: reader.push(reader.memo[key])),
    "GLOBAL": _Reader.named,
    "STACK_GLOBAL": _Reader.named_by_stack,
    "REDUCE": _Reader.called,
    "BINPERSID": _Reader.stored,
}
