"""A pretend graphics card: the torch device "card", whose tensors lie in main memory and are refused what a card is.

It is a backend of torch (card.cpp), not a tensor subclass: views, autograd, autocast, generators and pinned memory go
through torch's own code, and an operator that would be a kernel runs the CPU's on the same memory. So values are the
CPU's, and what differs is what is refused:

- tensors of two devices in one operator, but for tensors of the CPU without dimensions where torch lets them in
- a generator of the CPU for a tensor of the card, and the other way round
- products of integers, numpy() and pinning of a card's tensor
- dtypes that a `Record` refuses, such as float64, which Apple's MPS doesn't have

There are two cards, card:0 and card:1. A `Record` counts what the host waits for and what goes up; `memory` tells the
bytes that live on a card. Use it in a process of its own: a device, once registered, stays.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import importlib.util
import re
import shutil
import subprocess
import sys
import sysconfig
import types
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("card.cpp")
BUILDS = Path(__file__).resolve().parents[2] / ".cache/pretend_card"
GIB = 2**30
MEMORY = 8 * GIB
# Operators whose result the host waits for on CUDA, beside copies and boolean indices.
READS = """_local_scalar_dense nonzero equal _unique2 unique_dim unique_consecutive masked_select bincount
repeat_interleave.Tensor _linalg_eigh _linalg_svd linalg_eig linalg_lstsq""".split()


def missing() -> str:
    """What is needed to build the card and isn't here; "" if nothing is."""
    if compiler() is None:
        return "a C++ compiler (g++ or clang++)"
    if not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        return "Python's headers (python3-dev)"
    return ""


def compiler() -> str | None:
    return shutil.which("g++") or shutil.which("clang++")


def build() -> Path:
    """The compiled backend for this torch and Python, built (two minutes) unless it was before."""
    from filelock import FileLock
    from torch.utils import cpp_extension

    key = SOURCE.read_bytes() + f"{torch.__version__} {sys.version}".encode()
    library = BUILDS / f"{hashlib.sha256(key).hexdigest()[:16]}.so"
    BUILDS.mkdir(parents=True, exist_ok=True)
    with FileLock(BUILDS / "lock"):
        if not library.exists():
            includes = [*cpp_extension.include_paths(), sysconfig.get_paths()["include"]]
            partial = library.with_suffix(".partial")
            command = [compiler(), "-std=c++20", "-O1", "-w", "-fPIC", "-shared", "-DTORCH_EXTENSION_NAME=pretend_card"]
            command += [*(f"-I{folder}" for folder in includes), str(SOURCE), "-o", str(partial)]
            command += [f"-L{Path(torch.__file__).parent / 'lib'}", "-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python"]
            subprocess.run(command, check=True)
            partial.rename(library)
    return library


class Record(contextlib.AbstractContextManager):
    """Counts what crosses between host and card inside the block.

    reads, uploads: waits of the host for the card, copies to it. where: how often each of them, by the file:line
    outside torch that caused it. refuse: dtypes that the card doesn't have.
    """

    def __init__(self, refuse=()):
        self.refuse = list(refuse)
        self.reads = 0
        self.uploads = 0
        self.where: collections.Counter = collections.Counter()

    def add(self, kind: str, operator: str, size: int) -> None:
        self.reads += kind in ("read", "read later")
        self.uploads += kind in ("upload", "upload later")
        self.where[f"{kind}: {operator} of {size} bytes at {self._cause()}"] += 1

    def _cause(self) -> str:
        frame = sys._getframe(2)
        while frame is not None and ("/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__):
            frame = frame.f_back
        return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame else ""

    def __enter__(self):
        _records.append(self)
        _backend.refuse(self.refuse)
        return self

    def __exit__(self, *error):
        _records.remove(self)
        _backend.refuse(_records[-1].refuse if _records else [])


def memory(card: int = 0) -> int:
    """Bytes that live on a card."""
    return _backend.live(card)


_records: list[Record] = []


def _listen(kind: str, operator: str, size: int) -> None:
    if _records:
        _records[-1].add(kind, operator, size)


def _lenient() -> list[str]:
    """Operators that check devices themselves, by torch's own table; most of them do so element by element, and let
    tensors of the CPU without dimensions in."""
    import torchgen

    table = (Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml").read_text()
    entries = [entry for entry in table.split("- func: ")[1:] if "device_check: NoCheck" in entry]
    return [re.match(r"[\w.]+", entry).group() for entry in entries]


def _index(device) -> int:
    if device is None or isinstance(device, int):
        return device or 0
    return torch.device(device).index or 0


class _Runtime(types.ModuleType):
    """torch.card, as torch.cuda: what torch, accelerate and ComfyUI ask a device for."""

    default_generators = ()

    def device_count(self):
        return 2

    def is_available(self):
        return True

    def is_initialized(self):
        return True

    def _is_in_bad_fork(self):
        return False

    def _lazy_init(self):
        pass

    def current_device(self):
        return _backend.current()

    def set_device(self, device):
        _backend.set_current(_index(device))

    def synchronize(self, device=None):
        _listen("read", "synchronize", 0)

    def empty_cache(self):
        pass

    def get_amp_supported_dtype(self):
        return [torch.float16, torch.bfloat16, torch.float32]

    def is_bf16_supported(self, *args):
        return True

    def generators(self):
        return [_backend.default_generator(card) for card in range(2)]

    def manual_seed_all(self, seed):
        for generator in self.generators():
            generator.manual_seed(seed)

    manual_seed = manual_seed_all

    def get_rng_state(self, device=0):
        return self.generators()[_index(device)].get_state()

    def set_rng_state(self, state, device=0):
        self.generators()[_index(device)].set_state(state)

    def get_rng_state_all(self):
        return [generator.get_state() for generator in self.generators()]

    def set_rng_state_all(self, states):
        for generator, state in zip(self.generators(), states, strict=True):
            generator.set_state(state)

    def memory_allocated(self, device=0):
        return memory(_index(device))

    def max_memory_allocated(self, device=0):
        return _backend.peak(_index(device))

    def reset_peak_memory_stats(self, device=0):
        _backend.reset_peak(_index(device))

    def mem_get_info(self, device=0):
        return MEMORY - memory(_index(device)), MEMORY

    def get_device_name(self, device=0):
        return "Pretend Card"

    def get_device_properties(self, device=0):
        return types.SimpleNamespace(name="Pretend Card", total_memory=MEMORY, major=8, minor=6)

    class device:
        def __init__(self, device):
            self.index = _index(device)

        def __enter__(self):
            self.before = _backend.current()
            _backend.set_current(self.index)

        def __exit__(self, *error):
            _backend.set_current(self.before)

    _DeviceGuard = device


def _load() -> types.ModuleType:
    """Register the device with torch."""
    torch.utils.rename_privateuse1_backend("card")
    spec = importlib.util.spec_from_file_location("pretend_card", build())
    backend = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(backend)
    torch._register_device_module("card", _Runtime("torch.card"))
    quantised = [torch.quint8, torch.quint4x2, torch.quint2x4, torch.qint32, torch.qint8]
    torch.utils.generate_methods_for_privateuse1_backend(unsupported_dtype=quantised)
    backend.rules(_lenient(), READS)
    backend.listen(_listen)
    return backend


def insert() -> None:
    """Put the card into this process."""
    global _backend
    if _backend is None:
        _backend = _load()


_backend = None
