"""Pickles of others, read without running anything in them.

Allowed are plain containers, numbers, strings, bytes, and numpy arrays and pandas frames of them. A pickle is a
program: here it may only build containers and call stand-ins, classes made afresh for each load that keep their
arguments and do nothing. What they kept is checked and turned into lists, dicts and arrays by `tree`; neither pandas
nor a class that the pickle names is ever imported.
"""

from __future__ import annotations

import copyreg
import io
import pickle
import pickletools
from pathlib import Path
from typing import BinaryIO

from ..data.errors import DataError

HINT = "save the frame with object columns (frame.astype(object)) and object column names"


class Refused(Exception):
    """Part of a sentence: what the pickle wants that is not allowed, or what is wrong with it."""


class Inert:
    """What a global of the table becomes: keeps what it is called with and what it is given as state."""

    __slots__ = ("args", "state")

    def __new__(cls, *args):
        self = object.__new__(cls)
        self.args, self.state = args, None
        return self


class _Filled(Inert):
    """A mapping that is filled item by item."""

    __slots__ = ("items",)

    def __new__(cls, *args):
        self = Inert.__new__(cls, *args)
        self.items = []
        return self


class _Bytes(Inert):
    """How protocols 2 to 4 write bytes: text that is latin-1, or bytes, or nothing."""

    def __new__(cls, *args):
        if len(args) == 2 and isinstance(args[0], str) and args[1] in ("latin1", "latin-1"):
            return args[0].encode("latin-1")
        if not args or (len(args) == 1 and type(args[0]) is bytes):
            return args[0] if args else b""
        raise Refused("makes bytes out of something else than text or bytes")


GLOBALS: dict[tuple[str, str], str] = {}  # (module, name): what it stands for


def _allow(modules: str, **names: str) -> None:
    GLOBALS.update({(module, name): meaning for module in modules.split() for name, meaning in names.items()})


_allow("_codecs", encode="bytes")
_allow("builtins __builtin__", bytes="bytes", bytearray="bytes", slice="slice", set="set", frozenset="set")
_allow("builtins __builtin__", list="list", dict="dict")  # the factory of a defaultdict
_allow("collections", OrderedDict="mapping", defaultdict="mapping")
_allow("numpy", ndarray="ndarray", dtype="dtype")
_allow("numpy.core.multiarray numpy._core.multiarray", _reconstruct="array", scalar="scalar")
_allow("numpy.core.numeric numpy._core.numeric", _frombuffer="buffer")
_allow("pandas.core.frame pandas", DataFrame="frame")
_allow("pandas.core.internals.managers pandas.core.internals", BlockManager="manager")
_allow("pandas._libs.internals", _unpickle_block="block")
_allow("pandas._libs.arrays", __pyx_unpickle_NDArrayBacked="backed")
_allow("pandas.core.arrays.datetimes pandas.arrays", DatetimeArray="datetimes")
_allow("pandas.core.arrays.string_ pandas.arrays", StringArray="strings")
_allow("pandas.core.arrays.string_ pandas", StringDtype="string dtype")
_allow("pandas.core.arrays.string_arrow pandas.arrays", ArrowStringArray="arrow strings")
_allow("pyarrow.lib", _restore_array="arrow array", py_buffer="arrow buffer", type_for_alias="arrow type")
_allow("pyarrow.lib", chunked_array="arrow chunks")
_allow("pandas.core.indexes.base", _new_Index="new index")
_allow("pandas.core.indexes.base pandas", Index="index")
_allow("pandas.core.indexes.range pandas", RangeIndex="range index")
_allow("pandas.core.indexes.numeric", Int64Index="index", UInt64Index="index", Float64Index="index")

# Protocols 2 to 5, without persistent ids, extension codes, buffers out of band, and what protocol 0 wrote as text.
OPCODES = """PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT
BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 EMPTY_LIST APPEND APPENDS LIST EMPTY_TUPLE
TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT EMPTY_SET FROZENSET BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET GLOBAL
STACK_GLOBAL""".split()
NAMES = {ord(op.code): op.name for op in pickletools.opcodes}


class _Dispatch(dict):
    def __missing__(self, code: int):
        name = NAMES.get(code)
        raise Refused(f"uses {name}, which is not allowed" if name else f"has the byte {code:#x} where a step begins")


class Unpickler(pickle._Unpickler):
    """The Python one, not the C one: its memo is a dict (a number in a pickle can't claim memory) and its steps are a
    table that can be cut down."""

    dispatch = _Dispatch(
        {code: pickle._Unpickler.dispatch[code] for code, name in NAMES.items() if name in OPCODES},
    )

    def __init__(self, file: BinaryIO):
        super().__init__(file)
        made: dict[str, type] = {}
        bases = {"bytes": _Bytes, "mapping": _Filled}
        for meaning in GLOBALS.values():
            made.setdefault(meaning, type(meaning, (bases.get(meaning, Inert),), {"__slots__": ()}))
        self.classes = made

    def find_class(self, module: str, name: str) -> type:
        meaning = GLOBALS.get((module, name)) if isinstance(module, str) and isinstance(name, str) else None
        if meaning is None:
            hint = f": {HINT}" if str(module).split(".")[0] in ("pandas", "pyarrow") else ""
            wanted = f"{module}.{name}"
            wanted = wanted[:200] if wanted.isprintable() else repr(wanted)[:200]
            raise Refused(f"wants {wanted}, which is not allowed{hint}")
        return self.classes[meaning]

    def persistent_load(self, pid: object):
        raise Refused("has a persistent id, which is not allowed")

    def _stand_in(self, value: object) -> type:
        if not (isinstance(value, type) and value in self.classes.values()):
            raise Refused(f"calls {type(value).__name__}, which is not allowed")
        return value

    def load_reduce(self) -> None:
        args = self.stack.pop()
        if type(args) is not tuple:
            raise Refused("calls something without a tuple of arguments")
        self.stack[-1] = self._stand_in(self.stack[-1])(*args)

    def load_build(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], Inert):
            raise Refused(f"sets the state of {type(self.stack[-1]).__name__}, which is not allowed")
        self.stack[-1].state = state

    def load_setitems(self) -> None:
        items = self.pop_mark()
        if len(items) % 2:
            raise Refused("has a key without a value")
        self._fill(zip(items[::2], items[1::2], strict=True))

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._fill([(key, value)])

    def _fill(self, items) -> None:
        into = self.stack[-1]
        for key, value in items:
            self._hashable(key)
            if type(into) is dict:
                into[key] = value
            elif isinstance(into, _Filled):
                into.items.append((key, value))
            else:
                raise Refused(f"sets an item of {type(into).__name__}, which is not allowed")

    def load_additems(self) -> None:
        items = self.pop_mark()
        if type(self.stack[-1]) is not set:
            raise Refused(f"adds to {type(self.stack[-1]).__name__}, which is not allowed")
        for item in items:
            self._hashable(item)
        self.stack[-1].update(items)

    def load_frozenset(self) -> None:
        items = self.pop_mark()
        for item in items:
            self._hashable(item)
        self.append(frozenset(items))

    @staticmethod
    def _hashable(key: object) -> None:
        """Python hashes a tuple of tuples without a limit, down to the end of the C stack."""
        if not (key is None or isinstance(key, (str, bytes, int, float, Inert))):
            raise Refused(f"has a key of type {type(key).__name__}, which is not allowed")

    def load_bytearray8(self) -> None:
        self.append(self.read(int.from_bytes(self.read(8), "little")))

    for _name in "REDUCE BUILD SETITEM SETITEMS ADDITEMS FROZENSET BYTEARRAY8".split():
        dispatch[getattr(pickle, _name)[0]] = locals()[f"load_{_name.lower()}"]
    dispatch[pickle.NEWOBJ[0]] = load_reduce  # a class and its arguments, as REDUCE has them


class _Whole(io.RawIOBase):
    """A file that refuses to give more than is left of it, so that a length in a pickle can't claim memory."""

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.left = file, size

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= self.left:
            raise Refused("ends early")
        self.left -= size
        return self.file.read(size)

    def readline(self, size: int = -1) -> bytes:
        line = self.file.readline(1024)
        self.left -= len(line)
        if not line.endswith(b"\n"):
            raise Refused("ends early")
        return line


# What Python's own code raises on damaged steps.
DAMAGE = (pickle.UnpicklingError, EOFError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError)


def load(path: Path) -> object:
    """The inert tree of a pickle: containers, numbers, strings, bytes, stand-ins. DataError names file and reason."""
    copyreg.clear_extension_cache()
    try:
        with open(path, "rb") as file:
            size = path.stat().st_size
            return Unpickler(_Whole(file, size)).load()
    except Refused as error:
        raise DataError(f"{path} is not read: it {error}.") from error
    except OSError as error:
        raise DataError(f"Can't read {path}: {error.strerror or error}.") from error
    except (*DAMAGE, MemoryError, RecursionError) as error:
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise DataError(f"{path} is no whole pickle ({reason}): fetch it again.") from error
