"""What every stage shares: the run folder, exact resume, the log, the learning-rate schedule, the exported file.

A run folder is a run's identity. The same command resumes it; a changed configuration is refused. Everything random
is a pure function of (seed, step), so a checkpoint needs no generator state and a resumed run repeats no sample.
"""

from __future__ import annotations

import json
import math
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

from prefgen.files import write_atomic


class Run:
    """One stage's run folder: `config.json`, `log.jsonl`, `checkpoint.pt`, `samples/`, `done`.

    args: what `config.command.arguments` gives; its `fingerprint` says what the run's result depends on.
    """

    def __init__(self, args: SimpleNamespace):
        self.args = args
        torch.manual_seed(args.seed)  # first weights; torch's own seed differs from process to process
        self.folder = args.runs / args.stage
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "samples").mkdir(exist_ok=True)
        config = args.fingerprint
        path = self.folder / "config.json"
        if path.exists() and json.loads(path.read_text()) != config:
            raise SystemExit(
                f"{path} holds another configuration than this command: use another --runs folder, or delete it."
            )
        write_atomic(path, json.dumps(config, indent=1).encode())
        self.parts: dict[str, object] = {}
        self.step = 0
        self._stop = False
        self._saved_at = time.monotonic()

    @property
    def finished(self) -> bool:
        return (self.folder / "done").exists()

    def resume(self, **parts) -> None:
        """Name the parts (modules, optimisers) of a checkpoint, and load the last one if there is any."""
        self.parts = parts
        path = self.folder / "checkpoint.pt"
        if path.exists():
            state = torch.load(path, map_location="cpu", weights_only=True)
            for name, part in parts.items():
                part.load_state_dict(state[name])
            self.step = state["step"]
            self._trim_log()

    def start(self, module: torch.nn.Module, name: str) -> None:
        """Load `name`.safetensors of --start-from into a module, if that option is given and there is no checkpoint."""
        folder = getattr(self.args, "start_from", None)
        if folder is None or (self.folder / "checkpoint.pt").exists():
            return
        from safetensors.torch import load_file

        state = {key: value.float() for key, value in load_file(str(folder / f"{name}.safetensors")).items()}
        missing = module.load_state_dict(state, strict=False).missing_keys
        print(f"{self.args.stage} starts from {folder}/{name}.safetensors ({len(missing)} tensors are new)", flush=True)

    def steps(self, total: int, save_seconds: float = 120) -> Iterator[int]:
        """Yield the steps still to do, seeding torch for each; checkpoint at intervals, when stopped and at the end."""
        previous = {s: signal.signal(s, self._request_stop) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            with tqdm(total=total, initial=self.step, desc=self.args.stage, mininterval=5) as self.bar:
                while self.step < total:
                    torch.manual_seed(step_seed(self.args.seed, self.step))
                    yield self.step
                    self.step += 1
                    self.bar.update()
                    if self._stop or time.monotonic() - self._saved_at > save_seconds:
                        self.save()
                    if self._stop:
                        raise SystemExit(f"Stopped after step {self.step}; the same command goes on from here.")
            self.save()
        finally:
            for s, handler in previous.items():
                signal.signal(s, handler)

    def save(self) -> None:
        state = {name: part.state_dict() for name, part in self.parts.items()} | {"step": self.step}
        with tempfile.NamedTemporaryFile(dir=self.folder, delete=False, suffix=".tmp") as file:
            torch.save(state, file)
        os.replace(file.name, self.folder / "checkpoint.pt")
        self._saved_at = time.monotonic()

    def log(self, every: int = 20, **values) -> None:
        """Append one JSON line (at most every `every` steps); a loss that is not finite stops the run."""
        if self.step % every:
            return
        values = {k: float(v.detach()) if isinstance(v, torch.Tensor) else float(v) for k, v in values.items()}
        if not all(math.isfinite(v) for v in values.values()):
            raise SystemExit(f"Step {self.step} of {self.args.stage} is not finite: {values}")
        with open(self.folder / "log.jsonl", "a") as file:
            file.write(json.dumps({"step": self.step, "time": round(time.time(), 1)} | values) + "\n")
        self.bar.set_postfix({k: f"{v:.4f}" for k, v in values.items()}, refresh=False)

    def finish(self, **figures) -> None:
        """Write the stage's figures to `done`; a finished stage is skipped by the pipeline."""
        write_atomic(self.folder / "done", json.dumps(figures, indent=1).encode())
        print(json.dumps({self.args.stage: figures}), flush=True)

    def _request_stop(self, *_):
        self._stop = True

    def _trim_log(self) -> None:
        """Drop log lines past the checkpoint: their steps are about to be done again."""
        path = self.folder / "log.jsonl"
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if json.loads(line)["step"] < self.step]
            write_atomic(path, "".join(line + "\n" for line in kept).encode())


class Ema:
    """Exponential moving average of a module's parameters and buffers."""

    def __init__(self, module: torch.nn.Module, decay: float):
        self.module, self.decay = module, decay
        self.shadow = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for key, value in self.module.state_dict().items():
            if value.dtype.is_floating_point:
                self.shadow[key].lerp_(value, 1 - decay)
            else:
                self.shadow[key].copy_(value)

    def state_dict(self):
        return self.shadow

    def load_state_dict(self, state) -> None:
        for key, value in state.items():
            self.shadow[key].copy_(value)


def step_seed(seed: int, step: int) -> int:
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> 1)


def batch_indices(seed: int, step: int, batch: int, count: int) -> np.ndarray:
    """Indices [batch] of a shuffled pass over `count` samples: a pure function, every sample once an epoch."""
    positions = np.arange(step * batch, (step + 1) * batch)
    indices = np.empty(batch, np.int64)
    for epoch in np.unique(positions // count):
        order = np.random.default_rng([seed, int(epoch)]).permutation(count)
        inside = positions // count == epoch
        indices[inside] = order[positions[inside] % count]
    return indices


def cosine(step: int, total: int, peak: float, warmup: int = 100, floor: float = 0.02) -> float:
    """Learning rate at a step: linear warm-up, then a cosine down to floor * peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def optimise(loss: torch.Tensor, optimiser: torch.optim.Optimizer, lr: float, clip: float = 1.0) -> float:
    """One optimiser step with gradient clipping. Returns the gradient norm before clipping."""
    for group in optimiser.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
    optimiser.step()
    return float(norm)


def parameter_groups(module: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Matrices decay, vectors (biases, norms) don't."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def save_weights(
    state: dict[str, torch.Tensor],
    path: Path,
    metadata: dict[str, str] | None = None,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write a safetensors file atomically; floating tensors are stored as `dtype`."""
    from safetensors.torch import save

    state = {k: (v.to(dtype) if v.dtype.is_floating_point else v).contiguous() for k, v in state.items()}
    write_atomic(path, save(state, metadata=metadata))


def save_array(array: np.ndarray, path: Path) -> None:
    """Write a .npy file atomically."""
    temporary = path.with_suffix(".tmp.npy")
    np.save(temporary, array)
    os.replace(temporary, path)


def picture_grid(pictures: torch.Tensor, path: Path, columns: int = 8) -> None:
    """Save pictures [B, 3, H, W] in -1..1 as one PNG."""
    from torchvision.utils import save_image

    save_image(pictures.float().clamp(-1, 1) * 0.5 + 0.5, str(path), nrow=columns, padding=2)
