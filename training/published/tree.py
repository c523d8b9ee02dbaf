"""From the inert tree of an unpickled file to plain Python values, numpy arrays and columns, checked on the way.

Every function looks at one node and takes what its caller expects there, so nothing of a tree is followed without need.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from functools import wraps
from itertools import islice

import numpy as np

from .unpickler import DAMAGE, HINT, Inert, Refused

Column = list | np.ndarray  # [rows]
UNITS = ("Y", "M", "W", "D", "h", "m", "s", "ms", "us", "ns", "ps", "fs", "as")
METADATA_NODES, METADATA_DEPTH = 100_000, 32  # of one user; a few bytes of a pickle can unfold to more than any disk


def meaning(node: object) -> str:
    """What a stand-in stands for; the type's name of anything else."""
    return type(node).__name__


def _is(node: object, *meanings: str) -> bool:
    return isinstance(node, Inert) and meaning(node) in meanings


def _need(fits: bool, what: str) -> None:
    if not fits:
        raise Refused(f"has {what}")


def _checked(function: Callable) -> Callable:
    """What Python raises on a node of an unexpected shape becomes Refused."""

    @wraps(function)
    def checked(*args):
        try:
            return function(*args)
        except DAMAGE as error:
            raise Refused(f"has a part that is put together in an unknown way ({error})") from error

    return checked


def dtype(node: object) -> np.dtype:
    """Of kinds b i u f c U S M m O; anything else, records too, is refused."""
    _need(_is(node, "dtype") and node.args and isinstance(node.args[0], str), "an array without a type")
    code, state = node.args[0], node.state
    match = re.fullmatch(r"([biufcUSMmO])(\d{1,9})", code)
    _need(match is not None, f"an array of the type {code[:40]!r}, which is not allowed")
    state = state if isinstance(state, tuple) else (3, "|", None, None, None, -1, -1, 0)
    _need(len(state) >= 8 and state[2:5] == (None, None, None), "an array of records, which is not allowed")
    _need(state[1] in ("<", ">", "=", "|"), "an array without a byte order")
    kind, order = match[1], "" if state[1] in "=|" else state[1]
    if kind == "O":
        return np.dtype(object)
    if kind in "Mm":
        unit, factor, *_ = state[8][1] if len(state) > 8 else ("generic", 1)
        unit = unit.decode("ascii", "replace") if isinstance(unit, bytes) else unit
        _need(unit in UNITS and type(factor) is int and 0 < factor < 1000, "dates in an unknown unit")
        return np.dtype(f"{order}{kind}8[{factor}{unit}]")
    found = np.dtype(order + code)
    _need(found.itemsize > 0, "an array whose items have no bytes")
    return found


@_checked
def array(node: object) -> np.ndarray | list:
    """An array; one of objects as a list, nested as deep as it has axes."""
    if _is(node, "buffer"):  # protocol 5
        _need(len(node.args) == 4 and node.args[3] in ("C", "F"), "an array without its four parts")
        content, kind, shape, order = node.args
    else:
        _need(_is(node, "array") and isinstance(node.state, tuple) and len(node.state) == 5, "an array without content")
        _, shape, kind, fortran, content = node.state
        order = "F" if fortran else "C"
    found = dtype(kind)
    _need(isinstance(shape, tuple) and 0 < len(shape) <= 8, "an array without a shape")
    _need(all(type(n) is int and n >= 0 for n in shape), "an array without a shape")
    if found.hasobject:
        fits = isinstance(content, list) and len(content) == math.prod(shape)
        _need(fits, "an array with fewer or more items than its shape says")
        for axis in reversed(shape[1:]):
            content = [content[i : i + axis] for i in range(0, len(content), axis)] if axis else []
        return content
    fits = isinstance(content, bytes) and len(content) == math.prod(shape) * found.itemsize
    _need(fits, "an array with fewer or more bytes than its shape says")
    return np.frombuffer(content, found).reshape(shape, order=order)


@_checked
def value(node: object) -> object:
    """A cell: None, bool, int, float, str or bytes; numpy's scalars become Python's. Others stay as they are."""
    if _is(node, "scalar"):
        _need(len(node.args) == 2 and isinstance(node.args[1], bytes), "a number without content")
        found = dtype(node.args[0])
        _need(not found.hasobject and len(node.args[1]) == found.itemsize, "a number of another size than its type")
        return np.frombuffer(node.args[1], found)[0].item()
    if isinstance(node, str) and not node.isascii():
        _need(node.encode("utf-8", "replace").decode() == node, "text that is no Unicode")  # half a surrogate pair
    _need(not isinstance(node, int) or node.bit_length() < 128, "a number of more than 128 bits")
    return node


def sequence(node: object) -> Column | None:
    """A list, tuple or array; None for anything else."""
    if isinstance(node, (list, tuple)):
        return list(node)
    if _is(node, "array", "buffer"):
        return array(node)
    return None


def pairs(node: object) -> Iterable[tuple[object, object]] | None:
    """Keys and values of a mapping in their order; None for anything else."""
    if isinstance(node, dict):
        return node.items()
    return node.items if _is(node, "mapping") else None


@_checked
def plain(node: object, depth: int = 0, left: list[int] | None = None) -> object:
    """Anything as JSON values. Refused when it is nested too deep or unfolds to too much."""
    left = [METADATA_NODES] if left is None else left
    left[0] -= 1
    _need(left[0] > 0 and depth < METADATA_DEPTH, "metadata that is nested too deep or unfolds to too much")
    node = value(node)
    if node is None or isinstance(node, (bool, int, str)):
        return node
    if isinstance(node, float):
        return node if math.isfinite(node) else repr(node)
    if isinstance(node, bytes):
        return node.decode("utf-8", "backslashreplace")
    items = pairs(node)
    if items is not None:
        return {str(value(key)): plain(item, depth + 1, left) for key, item in islice(items, METADATA_NODES)}
    if _is(node, "set") and node.args:
        node = node.args[0]
    if isinstance(node, (set, frozenset)):
        node = sorted(node, key=repr)
    items = sequence(node)
    _need(items is not None, f"metadata of the type {meaning(node)}, which is not allowed")
    if isinstance(items, np.ndarray):
        _need(items.size < left[0], "metadata that is nested too deep or unfolds to too much")
        items = items.astype(str).tolist() if items.dtype.kind in "Mmc" else items.tolist()
    return [plain(item, depth + 1, left) for item in items]


@_checked
def frame(node: object) -> dict[str, Column]:
    """A DataFrame's columns by name, in their order. The names of its rows are left out."""
    state = node.state if _is(node, "frame") else None
    manager = state.get("_mgr", state.get("_data")) if isinstance(state, dict) else None
    _need(_is(manager, "manager"), "a frame that is put together in an unknown way")
    if isinstance(manager.state, tuple):  # pandas before 1.3
        extra = manager.state[3] if len(manager.state) == 4 else None
        extra = extra.get("0.14.1") if isinstance(extra, dict) else None
        _need(isinstance(extra, dict) and {"axes", "blocks"} <= set(extra), "a frame of a very old pandas")
        axes, blocks = extra["axes"], [(b.get("values"), b.get("mgr_locs")) for b in extra["blocks"]]
    else:
        _need(len(manager.args) == 2, "a frame without blocks")
        blocks, axes = manager.args
        _need(all(_is(b, "block") and len(b.args) == 3 for b in blocks), "a frame without blocks")
        blocks = [b.args[:2] for b in blocks]
    _need(len(axes) == 2, "a frame without two axes")
    names = _names(axes[0])
    columns: dict[int, Column] = {}
    for content, places in blocks:
        places = _places(places, len(names))
        rows = _block(content)
        _need(len(rows) == len(places), "a block with fewer or more columns than it says")
        columns.update(zip(places, rows, strict=True))
    _need(sorted(columns) == list(range(len(names))), "a frame in which a column is missing")
    _need(len({len(c) for c in columns.values()}) < 2, "a frame with columns of several lengths")
    return {name: columns[i] for i, name in enumerate(names)}


def _names(index: object) -> list[str]:
    _need(_is(index, "new index") and len(index.args) == 2, "a frame without column names")
    kind, content = index.args
    _need(getattr(kind, "__name__", "") == "index" and isinstance(content, dict), f"columns without names: {HINT}")
    data = content.get("data")
    names = _strings(data) if _holds_strings(data) else sequence(data)
    fits = names is not None and all(isinstance(n, str) for n in names) and len(set(names)) == len(names)
    _need(fits, "column names that are no strings or come twice")
    return list(names)


def _places(node: object, columns: int) -> list[int]:
    if _is(node, "slice"):
        _need(all(a is None or type(a) is int for a in node.args) and 0 not in node.args[2:], "a slice of no numbers")
        return list(range(columns)[slice(*node.args)])
    found = array(node)
    _need(isinstance(found, np.ndarray) and found.ndim == 1 and found.dtype.kind in "iu", "a block without places")
    return found.tolist()


def _block(node: object) -> list[Column]:
    """The columns of one block."""
    if _holds_strings(node):
        return [_strings(node)]
    if _is(node, "backed"):
        kind = getattr(node.args[0], "__name__", "") if node.args else ""
        _need(kind == "datetimes" and isinstance(node.state, tuple), f"a column of an unknown kind: {HINT}")
        node = next((part for part in node.state if _is(part, "array", "buffer")), None)
    found = array(node)
    _need(isinstance(found, list) or found.ndim == 2, "a block that is no table")
    _need(isinstance(found, np.ndarray) or all(isinstance(c, list) for c in found), "a block that is no table")
    return list(found)


def _holds_strings(node: object) -> bool:
    backed = _is(node, "backed") and node.args and getattr(node.args[0], "__name__", "") == "strings"
    return bool(backed) or _is(node, "strings", "arrow strings")


def _strings(node: Inert) -> list[str | None]:
    """A column of pandas' string type, held as objects or by Arrow (which pandas 3 makes of any text)."""
    if not _is(node, "arrow strings"):
        parts = node.state if isinstance(node.state, tuple) else ()
        found = next((array(part) for part in parts if _is(part, "array", "buffer")), None)
        _need(isinstance(found, list), f"a column of strings of an unknown kind: {HINT}")
        found = found[0] if len(found) == 1 and isinstance(found[0], list) else found
        return [text if isinstance(text, str) else None for text in found]
    state = node.state if isinstance(node.state, dict) else {}
    return [text for part in _arrow_parts(state.get("_pa_array")) for text in _arrow_strings(part)]


def _arrow_parts(node: object) -> list[object]:
    if _is(node, "arrow chunks"):
        _need(bool(node.args) and isinstance(node.args[0], list), f"Arrow strings of an unknown kind: {HINT}")
        return node.args[0]
    return [node]


def _arrow_strings(node: object) -> list[str | None]:
    """One Arrow array: (type, length, nulls, offset, [validity, offsets, text], ...)."""
    unknown = f"Arrow strings of an unknown kind: {HINT}"
    parts = node.args[0] if _is(node, "arrow array") and node.args else ()
    _need(isinstance(parts, tuple) and len(parts) >= 5 and _is(parts[0], "arrow type"), unknown)
    kind, length, _, start, buffers = parts[:5]
    width = {"string": "<i4", "large_string": "<i8"}.get(kind.args[0] if kind.args else None)
    _need(width is not None and isinstance(buffers, list) and len(buffers) == 3, unknown)
    _need(all(type(n) is int and n >= 0 for n in (length, start)), unknown)
    data = [b.args[0] if _is(b, "arrow buffer") and b.args and isinstance(b.args[0], bytes) else b"" for b in buffers]
    valid, places, text = data
    stop = start + length
    _need(len(places) >= (stop + 1) * int(width[2]) or not length, unknown)
    _need(buffers[0] is None or len(valid) * 8 >= stop, unknown)
    places = np.frombuffer(places[: (stop + 1) * int(width[2])], width)[start:].tolist()
    known = np.unpackbits(np.frombuffer(valid, np.uint8), bitorder="little")[start:stop] if valid else [True] * length
    _need(places == sorted(places) and (not places or 0 <= places[0] and places[-1] <= len(text)), unknown)
    return [
        text[a:b].decode("utf-8", "replace") if ok else None
        for a, b, ok in zip(places, places[1:], known, strict=False)
    ]
