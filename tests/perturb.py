"""A development tool: every product, norm and function of a tensor rounded as another CPU might round it.

`pytest --perturb SEED` runs the tests with it, in this process and in every Python process that they start. What
differs between CPUs depends on an operation and its shapes, so the noise does too: the very same operation on the very
same shapes gives the very same bits, as it does on one machine, while another batch size, another number of tiles
or another place in the batch rounds otherwise. Zeros and whole numbers stay: sums and products of them are exact.
Compiled graphs, distributed tensors and threads other than the main one are left alone.
"""

import hashlib
import os
import subprocess
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

VARIABLE = "PREFGEN_PERTURB"
# Units in the last place, of the value itself and of the typical value beside it: what a product of a few thousand
# numbers differs by between AVX2, AVX-512 and AMX.
ULPS = 2.0
HALF_ULPS = 0.75
# A sum over one value is that value.
SUMS = set("sum mean cumsum".split())
# Sums of products: the summands may be far larger than what comes out.
PRODUCTS = set("mm addmm bmm baddbmm mv addmv dot linear matmul convolution conv2d convolution_backward".split())
PRODUCTS |= set("einsum _cdist_forward cdist scaled_dot_product_attention".split())
PRODUCTS |= {f"_scaled_dot_product_flash_attention_for_cpu{end}" for end in ("", "_backward")}
FUNCTIONS = set("exp exp2 expm1 log log2 log1p sin cos tanh erf erfinv sigmoid gelu silu pow rsqrt softplus".split())
FUNCTIONS |= set("_softmax _log_softmax softmax log_softmax logsumexp sum mean var std var_mean norm cumsum".split())
FUNCTIONS |= set("linalg_vector_norm native_layer_norm native_group_norm native_batch_norm layer_norm".split())
FUNCTIONS |= set("group_norm upsample_bilinear2d upsample_bicubic2d _upsample_bilinear2d_aa avg_pool2d".split())
FUNCTIONS |= set("_adaptive_avg_pool2d nll_loss_forward mse_loss gelu_backward silu_backward tanh_backward".split())
FUNCTIONS |= set("native_layer_norm_backward native_group_norm_backward _softmax_backward_data".split())


class OtherCpu(TorchDispatchMode):
    """Adds the rounding of another CPU. seed: which other CPU."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.patterns = {}

    def pattern(self, name: str, shape: torch.Size) -> torch.Tensor:
        """The errors of one operation on one shape, in -1..1: drawn once, the same ever after and in any process."""
        key = name, tuple(shape)
        if key not in self.patterns:
            if len(self.patterns) > 4096:
                self.patterns.clear()
            digest = hashlib.sha256(repr((self.seed, *key)).encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            self.patterns[key] = torch.rand(shape, generator=generator) * 2 - 1
        return self.patterns[key]

    def round_otherwise(self, name: str, shapes: list, out: torch.Tensor) -> None:
        wide = out.double() if out.dtype == torch.float64 else out.float()
        epsilon = torch.finfo(out.dtype).eps
        size = wide.abs()
        if out.dtype.itemsize < 4:
            epsilon *= HALF_ULPS
        else:
            epsilon *= ULPS
            if name in PRODUCTS and out.ndim:
                size = (size + wide.square().mean(-1, keepdim=True).sqrt()) / 2
        errors = self.pattern(f"{name} {shapes}", out.shape).to(wide.dtype)
        exact = wide == wide.round()
        out.copy_(torch.where(exact, wide, wide + errors * epsilon * size))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__.rstrip("_")
        if name not in PRODUCTS and name not in FUNCTIONS:
            return result
        if name in SUMS and args[0].numel() == result.numel():
            return result
        outs = result if isinstance(result, (tuple, list)) else [result]
        outs = outs if name.endswith(("backward", "_data")) else outs[:1]
        shapes = [tuple(a.shape) for a in args if isinstance(a, torch.Tensor)]
        for out in outs:
            if type(out) is torch.Tensor and out.is_floating_point() and out.device.type == "cpu" and out.numel():
                self.round_otherwise(name, shapes, out)
        return result


def in_children(seed: int) -> None:
    """Every Python process that this one starts is perturbed as well: it finds a sitecustomize that does it."""
    folder = str(Path(__file__).parent / "perturbed")
    original = subprocess.Popen.__init__

    def start(self, *args, env=None, **options):
        env = dict(os.environ if env is None else env)
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, env.get("PYTHONPATH")]))
        env[VARIABLE] = str(seed)
        original(self, *args, env=env, **options)

    subprocess.Popen.__init__ = start


def enter_here() -> None:
    """In a child: perturb from the first import of torch until the process ends."""
    seed = os.environ.get(VARIABLE)
    if seed is not None:
        OtherCpu(int(seed)).__enter__()
