"""Pickles written step by step, so that a test may say anything in one, and frames without pandas."""

import pickle
from dataclasses import dataclass


@dataclass(frozen=True)
class Global:
    module: str
    name: str


@dataclass(frozen=True)
class Call:
    what: object
    args: tuple
    state: object = None
    step: bytes = b"R"


def steps(value: object) -> bytes:
    """A value as pickle steps; numbers, strings and bytes are Python's own."""
    if isinstance(value, Global):
        return f"c{value.module}\n{value.name}\n".encode()
    if isinstance(value, Call):
        state = b"" if value.state is None else steps(value.state) + b"b"
        return steps(value.what) + steps(value.args) + value.step + state
    if isinstance(value, tuple):
        return b"(" + b"".join(map(steps, value)) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(map(steps, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(steps(part) for item in value.items() for part in item) + b"u"
    return pickle.dumps(value, 3)[2:-1]


def dump(value: object) -> bytes:
    return b"\x80\x03" + steps(value) + b"."


def array(content, shape, code="O8", order="|", numpy="numpy.core"):
    """As numpy 1 (numpy.core) or 2 (numpy._core) pickles an array; content: list of objects, or bytes."""
    kind = Call(Global("numpy", "dtype"), (code, False, True), (3, order, None, None, None, -1, -1, 0))
    empty = Global(f"{numpy}.multiarray", "_reconstruct"), (Global("numpy", "ndarray"), (0,), b"b")
    return Call(*empty, (1, shape, kind, False, content))


def index(names):
    made = Global("pandas.core.indexes.base", "_new_Index"), Global("pandas.core.indexes.base", "Index")
    return Call(made[0], (made[1], {"data": array(list(names), (len(names),)), "name": None}))


def numbers(rows):
    made = Global("pandas.core.indexes.base", "_new_Index"), Global("pandas.core.indexes.range", "RangeIndex")
    return Call(made[0], (made[1], {"name": None, "start": 0, "stop": rows, "step": 1}))


def frame(columns: dict[str, list], labels: str = "label0") -> Call:
    """As pandas 1.3 to 2 pickle it: one block of objects and one of int64."""
    objects = [name for name in columns if name != labels]
    rows = len(columns[labels])
    cells = [cell for name in objects for cell in columns[name]]
    values = b"".join(int(n).to_bytes(8, "little", signed=True) for n in columns[labels])
    block, slice_ = Global("pandas._libs.internals", "_unpickle_block"), Global("builtins", "slice")
    order = [*objects, labels]
    blocks = (
        Call(block, (array(cells, (len(objects), rows)), Call(slice_, (0, len(objects), 1)), 2)),
        Call(block, (array(values, (1, rows), "i8", "<"), Call(slice_, (len(objects), len(order), 1)), 2)),
    )
    manager = Call(Global("pandas.core.internals.managers", "BlockManager"), (blocks, [index(order), numbers(rows)]))
    return Call(Global("pandas.core.frame", "DataFrame"), (), {"_mgr": manager, "_typ": "dataframe"}, b"\x81")


def old_frame(columns: dict[str, list]) -> Call:
    """As pandas 1.0 to 1.2 pickle it: a state that is marked 0.14.1. Objects alone."""
    rows = len(next(iter(columns.values())))
    block = array([cell for cells in columns.values() for cell in cells], (len(columns), rows), numpy="numpy._core")
    places = array(b"".join(i.to_bytes(8, "little") for i in range(len(columns))), (len(columns),), "i8", "<")
    axes = [index(columns), numbers(rows)]
    extra = {"0.14.1": {"axes": axes, "blocks": [{"values": block, "mgr_locs": places}]}}
    manager = Global("pandas.core.internals.managers", "BlockManager")
    manager = Call(manager, (), (axes, [block], [index(columns)], extra), b"\x81")
    return Call(Global("pandas.core.frame", "DataFrame"), (), {"_data": manager, "_typ": "dataframe"}, b"\x81")
