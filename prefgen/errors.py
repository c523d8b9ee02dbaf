"""Errors that a person can mend, and how to recognise that memory has run out."""

from __future__ import annotations

import errno


class MendableError(Exception):
    """One sentence: what is wrong, with which file, node or key, and what to do."""


class AdapterError(MendableError, ValueError):
    """An adapter that can't be used, in one sentence for the artist."""


# How backends say that memory has run out, in lower case: CUDA, ROCm, MPS, XPU (Level Zero), DirectML, the NPUs, cuBLAS
# and cuDNN, and the CPU on Linux and Windows.
NO_MEMORY = (
    "out of memory",
    "out_of_memory",
    "out_of_device_memory",
    "out_of_host_memory",
    "out_of_resources",
    "_alloc_failed",
    "allocate memory",
    "could not allocate",
    "failed to allocate",
    "not enough memory",
    "not enough gpu video memory",
    "invalid buffer size",
    "paging file is too small",
    "os error 1455",
)
CUDA_NO_MEMORY = 2  # cudaErrorMemoryAllocation


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it comes from, says that the device or the machine has no memory left.

    Only CUDA and ROCm have a class of their own for it; other backends raise RuntimeError, safetensors and the
    operating system theirs.
    """
    import torch
    from safetensors import SafetensorError

    while error is not None:
        if isinstance(error, MendableError):
            return False
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            return True
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            return True
        if isinstance(error, (RuntimeError, OSError, SafetensorError)):
            if getattr(error, "error_code", None) == CUDA_NO_MEMORY and type(error).__name__ == "AcceleratorError":
                return True
            if any(words in str(error).lower() for words in NO_MEMORY):
                return True
        error = error.__cause__
    return False
