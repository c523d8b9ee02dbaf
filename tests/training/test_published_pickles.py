"""Pickles are read without running them: every format that is published, and nothing that is hostile."""

import copyreg
import pickle
import struct
import subprocess
import sys
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest

from tests.training import handmade_pickles as made
from tests.training.handmade_pickles import Call, Global, dump
from training.data.errors import DataError
from training.published import tree
from training.published.unpickler import Refused, load

ROOT = Path(__file__).parents[2]
COLUMNS = {"user_id": ["7", "9"], "image0": [b"\x00\xff", b"y"], "prompt": ["p", "\u00e9"], "label0": [1, 0]}


@pytest.fixture
def read(tmp_path):
    def reader(data):
        (tmp_path / "some.pkl").write_bytes(data)
        return load(tmp_path / "some.pkl")

    return reader


def listed(columns):
    return {name: [tree.value(c) for c in column] for name, column in columns.items()}


@pytest.mark.parametrize("protocol", range(2, 6))
def test_containers_numbers_strings_bytes_and_arrays(read, protocol):
    value = {"a": [1, -5, 2**70, 1.5, None, True], "b": ("\u00e9", b"\xff\x00", b""), "c": {1: [], "d": {}}}
    assert read(pickle.dumps(value, protocol)) == value
    for keyed in (OrderedDict(a=[1]), defaultdict(list, a=[1])):
        assert list(tree.pairs(read(pickle.dumps(keyed, protocol)))) == [("a", [1])]
    for kind in ("i4", ">u2", "f8", "?", "S3", "U2", "M8[ms]", "m8[s]", "c8", "f2"):
        for order in "CF":
            wanted = np.ones((3, 2)).astype(kind, order=order)
            wanted[0] = wanted[1] = np.zeros(1, kind)[0]
            found = tree.array(read(pickle.dumps(wanted, protocol)))
            assert found.dtype == wanted.dtype and np.array_equal(found, wanted)
            assert tree.value(read(pickle.dumps(wanted[2, 1], protocol))) == wanted[2, 1].item()
    objects = np.array([["a", b"b"], [None, 4]], object)
    assert tree.array(read(pickle.dumps(objects, protocol))) == objects.tolist()
    assert tree.plain(read(pickle.dumps({"s": {3, 1}, "x": np.arange(2), "n": float("nan")}, protocol))) == {
        "s": [1, 3],
        "x": [0, 1],
        "n": "nan",
    }


def test_frames_without_pandas(read):
    assert listed(tree.frame(read(dump(made.frame(COLUMNS))))) == COLUMNS
    assert listed(tree.frame(read(dump(made.old_frame(COLUMNS))))) == COLUMNS


def test_columns_of_strings_without_pandas(read):
    parts = [b"\x05", struct.pack("<4q", 0, 1, 1, 3), b"abc"]  # "a", null, "bc"
    buffers = [Call(Global("pyarrow.lib", "py_buffer"), (part,)) for part in parts]
    kind = Call(Global("pyarrow.lib", "type_for_alias"), ("large_string",))
    data = Call(Global("pyarrow.lib", "_restore_array"), ((kind, 3, 1, 0, buffers, [], None),))
    column = Call(Global("pandas.arrays", "ArrowStringArray"), (), {"_pa_array": data}, b"\x81")
    assert tree._block(read(dump(column))) == [["a", None, "bc"]]
    state = (Call(Global("pandas", "StringDtype"), ("python",)), made.array(["a", None], (2,)))
    backed = Global("pandas._libs.arrays", "__pyx_unpickle_NDArrayBacked")
    column = Call(backed, (Global("pandas.arrays", "StringArray"), 0, None), state)
    assert tree._block(read(dump(column))) == [["a", None]]


@pytest.mark.parametrize("protocol", range(2, 6))
def test_frames_as_the_installed_pandas_pickles_them(read, protocol):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(COLUMNS | {"list": [[b"a"], []], "f": [0.5, 2.0], "b": [True, False]})
    frame["date"] = pandas.to_datetime(["2020-01-01", "2021-02-03"])
    for some in (frame, frame.iloc[[1, 0]], frame.drop(columns="date").astype(object), frame[frame.columns[::-1]]):
        found = listed(tree.frame(read(pickle.dumps(some, protocol))))
        assert list(found) == list(some.columns)
        assert {k: v for k, v in found.items() if k != "date"} == {k: list(some[k]) for k in found if k != "date"}
    with pytest.raises(DataError, match="save the frame with object columns"):
        read(pickle.dumps(frame.assign(c=pandas.Categorical(["a", "b"])), protocol))


def reduced(module, name, *args):
    return dump([1, Call(Global(module, name), args)])


HOSTILE = {
    "os.system": (lambda canary: reduced("os", "system", f"touch {canary}"), "wants os.system, which is not allowed"),
    "posix": (lambda canary: reduced("posix", "system", f"touch {canary}"), "wants posix.system"),
    "eval": (lambda canary: reduced("builtins", "eval", f"open({str(canary)!r}, 'w')"), "wants builtins.eval"),
    "getattr": (lambda _: reduced("builtins", "getattr", "a", "b"), "wants builtins.getattr"),
    "dotted": (lambda _: b"\x80\x04\x8c\x05numpy\x8c\x0dndarray.dumps\x93.", "wants numpy.ndarray.dumps"),
    "line break": (lambda _: b"\x80\x04\x8c\x02a\n\x8c\x01b\x93.", r"wants 'a\\n.b', which"),
    "partial": (lambda _: reduced("functools", "partial", 1), "wants functools.partial"),
    "torch": (lambda _: reduced("torch._utils", "_rebuild_tensor_v2"), "wants torch._utils._rebuild_tensor_v2"),
    "pandas": (lambda _: reduced("pandas.io.pickle", "read_pickle", "x"), "wants pandas.io.pickle.read_pickle"),
    "numpy load": (lambda _: reduced("numpy", "load", "x"), "wants numpy.load"),
    "persistent id": (lambda _: b"\x80\x03X\x01\x00\x00\x00aQ.", "uses BINPERSID"),
    "text id": (lambda _: b"Pabc\n.", "uses PERSID"),
    "extension": (lambda _: b"\x80\x02\x82\x01.", "uses EXT1"),
    "old instance": (lambda _: b"(S'touch'\nios\nsystem\n.", "uses STRING"),
    "build on a class": (lambda _: dump(Global("numpy", "ndarray"))[:-1] + b"}b.", "sets the state of type"),
    "build on a list": (lambda _: b"\x80\x02]}b.", "sets the state of list"),
    "call a string": (lambda _: dump(Call("os.system", ("id",))), "calls str, which is not allowed"),
    "call a result": (lambda _: dump(Call(Call(Global("numpy", "dtype"), ("f8",)), ())), "calls dtype"),
    "keywords": (lambda _: dump([Global("numpy", "dtype"), ()])[:-1] + b"}\x92.", "uses NEWOBJ_EX"),
    "codec": (lambda _: reduced("_codecs", "encode", "a" * 99, "bz2"), "makes bytes out of something else"),
    "huge bytearray": (lambda _: reduced("builtins", "bytearray", 10**12), "makes bytes out of something else"),
    "huge bytes": (lambda _: b"\x80\x04\x8e" + struct.pack("<Q", 10**12) + b"a.", "ends early"),
    "huge bytearray 5": (lambda _: b"\x80\x05\x96" + struct.pack("<Q", 10**12) + b"a.", "ends early"),
    "huge frame": (lambda _: b"\x80\x04\x95" + struct.pack("<Q", 10**12) + b"a.", "ends early"),
    "out of band": (lambda _: b"\x80\x05\x97.", "uses NEXT_BUFFER"),
    "deep key": (lambda _: b"\x80\x02})" + b"\x85" * 100_000 + b"Ns.", "has a key of type tuple"),
    "deep set": (lambda _: b"\x80\x04\x8f()" + b"\x85" * 100_000 + b"\x90.", "has a key of type tuple"),
    "recursion": (lambda _: b"\x80\x02" + b"(" * 100_000 + b".", "is no whole pickle"),
    "no pickle": (lambda _: b"\x89PNG\r\n", "uses|has the byte|no whole pickle"),
    "text": (lambda _: b"hello", "uses|has the byte|no whole pickle"),
    "empty": (lambda _: b"", "ends early"),
    "unknown protocol": (lambda _: b"\x80\xff.", "no whole pickle"),
    "memo": (lambda _: b"\x80\x02j\xff\xff\xff\x7f.", "no whole pickle"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_end_in_a_sentence_and_run_nothing(tmp_path, name):
    canary = tmp_path / "canary"
    data, wanted = HOSTILE[name][0](canary), HOSTILE[name][1]
    path = tmp_path / "hostile.pkl"
    path.write_bytes(data)
    with pytest.raises(DataError, match=wanted) as raised:
        load(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)
    assert not canary.exists()


def test_the_canary_of_these_tests_would_sing(tmp_path):
    """The same pickle does run in Python's own reader."""
    path = tmp_path / "hostile.pkl"
    path.write_bytes(HOSTILE["os.system"][0](tmp_path / "canary"))
    subprocess.run([sys.executable, "-c", f"import pickle; pickle.load(open({str(path)!r}, 'rb'))"], check=True)
    assert (tmp_path / "canary").exists()


def test_every_cut_of_a_pickle_is_a_sentence(read):
    data = dump(made.frame(COLUMNS))
    for length in range(0, len(data), 17):
        with pytest.raises(DataError, match="ends early|no whole pickle"):
            read(data[:length])


def test_damaged_bytes_never_end_otherwise(read):
    """One byte changed anywhere: read, or a DataError; and what was read is a frame or Refused."""
    data = dump(made.frame(COLUMNS))
    generator = np.random.default_rng(0)
    for place in range(0, len(data), 9):
        harmed = bytearray(data)
        harmed[place] = generator.integers(256)
        try:
            tree.frame(read(bytes(harmed)))
        except (DataError, Refused):
            pass


def test_the_memo_claims_no_memory(read):
    """The C reader makes room for 2**31 entries here."""
    assert read(b"\x80\x02Nr\xff\xff\xff\x7f.") is None


def test_an_extension_code_that_another_load_has_cached_is_refused(read):
    copyreg.add_extension("os", "system", 240)
    try:
        with pytest.raises(DataError, match="uses EXT1"):
            read(b"\x80\x02\x82\xf0.")
    finally:
        copyreg.remove_extension("os", "system", 240)


@pytest.mark.parametrize(
    "node",
    [
        made.array(b"", (10**12,), "i8", "<"),
        made.array(b"\0" * 8, (10**12, 10**12), "i8", "<"),
        made.array(b"", (10**9, 0, 10**9), "O8"),
        made.array(b"", (10**18,), "S0"),
        made.array(b"\0" * 8, (-1,), "i8", "<"),
        made.array(b"\0" * 8, (1,), "V8"),
        made.array(["a"], (2,)),
        made.array(b"\0" * 8, (1,), "i8", 5),
        Call(Global("numpy._core.numeric", "_frombuffer"), (b"abc", Global("numpy", "dtype"), (3,), "C")),
    ],
    ids=str,
)
def test_arrays_that_are_not_what_they_say_are_refused(read, node):
    with pytest.raises(Refused):
        tree.array(read(dump(node)))


def test_metadata_that_unfolds_to_too_much_or_too_deep_is_refused(read):
    wide = b"\x80\x02](K\x01K\x01eq\x00" + b"".join(
        b"](" + (b"h" + bytes([i])) * 10 + b"eq" + bytes([i + 1]) for i in range(20)
    )
    with pytest.raises(Refused, match="unfolds to too much"):
        tree.plain(read(wide + b"."))
    with pytest.raises(Refused, match="nested too deep"):
        tree.plain(read(b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b"."))
    with pytest.raises(Refused, match="nested too deep"):
        tree.plain(read(b"\x80\x02]q\x00h\x00a."))


def test_text_that_is_no_unicode_is_refused(read):
    with pytest.raises(Refused, match="no Unicode"):
        tree.value(read(pickle.dumps("a\ud800", 4)))
