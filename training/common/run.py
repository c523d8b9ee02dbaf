"""One stage's run: its steps, in one process or several, with what is measured and said on the way."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.nn.functional import all_gather
from tqdm import tqdm

from prefgen.errors import out_of_memory

from . import sharded
from .config.command import StageArgs
from .config.sections import Training
from .devices import synchronize
from .files import grid_of, picture_grid
from .folder import RunFolder
from .order import step_seed
from .signals import StopSignals
from .update import StepError, Updater, new_accelerator


class Run(RunFolder):
    """One run of a stage.

    may_be_unused: parts of the trained module that may have no gradient at the first step. keep, made_of: as of
    `RunFolder`. One that is finished says that it is skipped.
    """

    def __init__(
        self,
        args: StageArgs,
        may_be_unused: Sequence[str] = (),
        keep: int = 2,
        made_of: Mapping[str, str] | None = None,
    ):
        self.accelerator = new_accelerator(unused=bool(may_be_unused))
        self.world_size = self.accelerator.num_processes
        accumulate = 1
        if isinstance(args.section, Training):
            accumulate = args.section.accumulate
            if args.section.batch % self.world_size:
                raise SystemExit(
                    f"{args.stage}: {self.world_size} processes can't share a batch of {args.section.batch} equally."
                )
        super().__init__(args, self.accelerator.process_index, keep, made_of)
        self.lock()
        if self.finished and self.rank == 0:
            print(f"{args.stage}: finished already, skipped; to do it again delete {self.folder}.", flush=True)
        # For the first weights: torch's own seed differs from process to process.
        torch.manual_seed(args.section.seed)
        self.updater = Updater(self.accelerator, accumulate, may_be_unused)
        self.lr = 0.0

    def prepare(self, module: nn.Module, optimiser: torch.optim.Optimizer):
        """(module, optimiser) on this process's device, wrapped by accelerate where several processes train.

        Train with what is returned; the module itself shares its weights, for EMA (made after this) and export.
        """
        return self.updater.prepare(module, optimiser)

    def resume(self, **parts) -> None:
        """As `RunFolder.resume`, for what `prepare` returned; fp16's loss scaler goes with it."""
        unwrapped = {k: self.accelerator.unwrap_model(p) for k, p in parts.items() if isinstance(p, nn.Module)}
        self.updater.modules = unwrapped
        scaler = {"scaler": self.accelerator.scaler} if self.accelerator.scaler else {}
        super().resume(**parts | unwrapped | scaler)

    def steps(self, total: int, save_seconds: float | None = None) -> Iterator[int]:
        """Yield the steps still to do, seeding torch for each; checkpoint at intervals, when stopped and at the end.

        save_seconds: in place of the section's. SIGTERM and SIGINT end the process after the step, with a checkpoint
        and the exit status 143 or 130.
        """
        interval = self.args.section.save_seconds if save_seconds is None else save_seconds
        self.bar = tqdm(total=total, initial=self.step, desc=self.args.stage, mininterval=5, disable=self.rank > 0)
        with StopSignals() as signals, self.bar:
            while self.step < total:
                # Before every step: what is drawn in it doesn't depend on where the run was resumed.
                torch.manual_seed(step_seed(self.args.section.seed, self.step, self.rank))
                self.journal.steps += 1
                yield self.step
                self.step += 1
                self.bar.update()
                signal_number, is_due = self._agreed(signals.received, time.monotonic() - self._saved_at > interval)
                self.wait(only_if_done=True)
                if signal_number or is_due:
                    with self.timer("checkpoint"):
                        self.save()
                if signal_number:
                    self._end(signal_number)
        self.save()
        self.wait()
        self.accelerator.wait_for_everyone()

    def micro_batches(self, indices: Sequence) -> Iterator:
        """This process's share of a batch in `accumulate` equal micro-batches: forward and `backward` for each."""
        with self._step_errors():
            yield from self.updater.micro_batches(indices)

    @property
    def loss(self) -> float:
        """The last step's loss: the mean over micro-batches and processes."""
        return self.updater.last_loss

    def backward(self, loss: torch.Tensor) -> None:
        """Gradients of one micro-batch's loss, which is a mean over its samples."""
        with self.timer("backward"):
            self.updater.backward(loss)

    def update(self, optimiser: torch.optim.Optimizer, lr: float, clip: float = 1.0) -> float:
        """One optimiser step with gradient clipping. Returns the gradient norm before clipping.

        SystemExit, before any weight has changed, for a loss or gradient that is not finite, and at the first step for
        a part of the module without a gradient.
        """
        self.lr = lr
        with self.timer("optimiser"), self._step_errors():
            return self.updater.step(optimiser, lr, clip, first=self.step == 0)

    def optimise(self, loss: torch.Tensor, optimiser: torch.optim.Optimizer, lr: float, clip: float = 1.0) -> float:
        """`backward` and `update`, for a batch that isn't split. Returns the gradient norm before clipping."""
        self.backward(loss)
        return self.update(optimiser, lr, clip)

    @contextmanager
    def timer(self, name: str) -> Iterator[None]:
        """Count what happens inside as "data", "forward" or the like, in the log's seconds a step.

        Running out of memory inside ends the run in a sentence that names what to change.
        """
        start = time.perf_counter()
        try:
            yield
        except Exception as error:
            if not out_of_memory(error):
                raise
            raise SystemExit(self._memory_advice(name)) from error
        synchronize(self.accelerator.device)
        self.journal.seconds[name] += time.perf_counter() - start

    def log(self, every: int = 20, **values) -> None:
        """Append one JSON line (at most every `every` steps); a value that is not finite stops the run.

        values: numbers or tensors of one number; of several processes the mean.
        """
        if self.step % every:
            return
        numbers = [v.item() if isinstance(v, torch.Tensor) else float(v) for v in values.values()]
        if self.world_size > 1:
            numbers = self.accelerator.reduce(torch.tensor(numbers, device=self.accelerator.device), "mean").tolist()
        values = dict(zip(values, numbers, strict=True))
        if not all(map(math.isfinite, numbers)):
            raise SystemExit(f"Step {self.step} of {self.args.stage} is not finite: {values}. {self._last_saved()}")
        if self.rank == 0:
            self.claim()
            norms = {name: float(f"{norm:.5g}") for name, norm in self.updater.norms.items()}
            with self._disk_errors("the log"):
                self.journal.write(self.step, {"lr": self.lr} | values, norms)
            self.bar.set_postfix({k: f"{v:.4f}" for k, v in values.items()}, refresh=False)

    def log_figures(self, **figures: float) -> None:
        """Append a line of figures that are measured now and then, such as losses on held-out users."""
        if self.rank == 0:
            self.claim()
            with self._disk_errors("the log"):
                self.journal.write_figures(self.step, figures)

    def pictures(self, name: str, pictures: torch.Tensor, columns: int = 8) -> None:
        """Show pictures [B, 3, H, W] in -1..1: samples/NAME-STEP.png, and TensorBoard."""
        if self.rank == 0:
            self.claim()
            picture_grid(pictures, self.folder / "samples" / f"{name}-{self.step:08d}.png", columns)
            self.journal.picture(name, grid_of(pictures, columns), self.step)

    def finish(self, **figures) -> None:
        """Write the stage's figures to `done`, once all processes are there, and unlock the folder."""
        self.accelerator.wait_for_everyone()
        super().finish(**figures)
        self.unlock()

    def stop(self, sentence: str) -> NoReturn:
        """End the run after this step, with a checkpoint: the same command goes on behind it. SystemExit."""
        self.step += 1
        self.save()
        self.wait()
        raise SystemExit(sentence)

    def shard(self, root: nn.Module, blocks: Sequence[nn.Module]) -> None:
        """Shard the blocks of a large module over the processes, if they were started with FSDP. root: the module whose
        forward runs the blocks. Before the optimiser is made: the blocks' parameters are new ones then.
        """
        if not self.uses_fsdp:
            return
        local, total = sharded.shard(root, blocks, self.accelerator.device, self.world_size)
        if self.rank == 0:
            share = f"{local:,} of {total:,} weights of its {len(blocks)} layers"
            print(f"{self.args.stage}: {share} on each of {self.world_size} processes", file=sys.stderr, flush=True)

    @property
    def uses_fsdp(self) -> bool:
        """Whether `shard` does anything: several processes, started with FSDP."""
        return self.updater.uses_fsdp

    def gather_rows(self, rows: torch.Tensor, counts: Sequence[int] | None = None) -> torch.Tensor:
        """[n, D] of one process -> the rows of all, in the order of their ranks, with gradients: for losses that
        compare samples with each other. counts: rows of each process, where they aren't as many in all."""
        if self.world_size == 1:
            return rows
        counts = counts or [len(rows)] * self.world_size
        padded = F.pad(rows, (0, 0, 0, max(counts) - len(rows)))
        return torch.cat([part[:count] for part, count in zip(all_gather(padded), counts, strict=True)])

    def _agreed(self, signal_number: int, is_due: bool) -> list[int]:
        """The signal that any process received (0 for none), and whether for any a checkpoint is due. A checkpoint is
        gathered from all processes: if one saved alone, it would wait for the others for ever."""
        if self.world_size == 1:
            return [signal_number, is_due]
        both = torch.tensor([[signal_number, is_due]], device=self.accelerator.device)
        return self.accelerator.gather(both).amax(0).tolist()

    def _end(self, signal_number: int) -> None:
        self.wait()
        self.accelerator.wait_for_everyone()
        if self.rank == 0:
            self.journal.close()
            sentence = f"Stopped after step {self.step}; the same command goes on from here."
            print(f"\n{self.args.stage}: {sentence}", file=sys.stderr, flush=True)
        raise SystemExit(128 + signal_number)

    @contextmanager
    def _step_errors(self) -> Iterator[None]:
        """End the run on a step that can't be taken: with its stage, its number and the checkpoint that is left."""
        try:
            yield
        except StepError as error:
            raise SystemExit(f"{self.args.stage}, step {self.step}: {error}. {self._last_saved()}") from error

    def _memory_advice(self, during: str) -> str:
        """What helps where memory ran out, in the order of what it costs."""
        advice = [words for words in (self._smaller_pieces(during), self._checkpointing(during)) if words]
        if during == "caches":
            advice = ["one picture alone doesn't fit: free the device, or take a smaller base.pixels"]
        elif during == "pictures":
            advice = [f"set {self.args.stage}.pictures_every=0"]
        elif during == "optimiser":
            advice = [f"set {self.args.stage}.optimiser=adamw8bit" if hasattr(self.args.section, "optimiser") else ""]
        elif during != "heldout":
            batch = self.args.section.model_dump().get("batch")
            advice.append(f"take a smaller batch{f' (now {batch})' if batch else ''} or resolution")
        words = ", or ".join(filter(None, advice)) or "free the device"
        return (
            f"{self.args.stage}, step {self.step}: out of memory ({during}): {words}; what changes the configuration "
            f"needs another --runs folder. {self._last_saved()}"
        )

    def _smaller_pieces(self, during: str) -> str:
        if not self.updater.uses_micro_batches or during not in ("forward", "backward", "teacher", "data"):
            return ""
        count = self.updater.accumulate
        return f"raise accumulate (now {count}; the same batch in smaller pieces, this run goes on)"

    def _checkpointing(self, during: str) -> str:
        """The key that trades activations for time, where the stage has one that isn't set."""
        section = {"train_mllm": "mllm", "train_user_attention": "base"}.get(self.args.stage)
        if section is None or during not in ("forward", "backward"):
            return ""
        is_set = getattr(self.args.config, section).gradient_checkpointing
        return "" if is_set else f"set {section}.gradient_checkpointing=true"
