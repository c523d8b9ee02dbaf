"""A stage in miniature, for the training core's tests: `python toy_stage.py RUNS '{"steps": 12, ...}'`."""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from training.common.config.command import StageArgs
from training.common.config.schema import Config
from training.common.config.sections import Training
from training.common.optim import Ema, cosine, parameter_groups
from training.common.order import batch_indices
from training.common.run import Run

CONFIG = Config(hardware="toy")
RUNS: list[Run] = []  # of this process, for tests that look into the last one
DATA = torch.linspace(-1, 1, 160).reshape(40, 4).sin()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, x):
        return self.head(self.body(x).tanh())


def main(runs: Path, options: dict) -> None:
    """options: steps, batch, accumulate; noise in the inputs; parts: train a ModuleList, not a module with a forward;
    pause and save_seconds: seconds; spoil: {step: "nan" or "memory"}; keep."""
    o = {
        "steps": 12,
        "batch": 8,
        "accumulate": 1,
        "noise": 0.1,
        "parts": False,
        "pause": 0,
        "save_seconds": 120,
    }
    o |= {"spoil": {}, "keep": 2} | options
    fingerprint = {k: o[k] for k in ("steps", "batch", "accumulate", "noise")} | {"inner": {"kind": "toy"}}
    section = Training(steps=o["steps"], batch=o["batch"], accumulate=o["accumulate"], lr=0.1, seed=3)
    args = SimpleNamespace(**o)
    run = Run(StageArgs("toy", section, CONFIG, fingerprint, runs), keep=args.keep)
    RUNS.append(run)
    net = Net()
    trained = nn.ModuleList([net.body, net.head]) if args.parts else net
    run.shard(net, [net.body])  # if it was started with FSDP; every process has the head
    optimiser = torch.optim.AdamW(parameter_groups(trained, 0.1))
    trained, optimiser = run.prepare(trained, optimiser)
    model = net if args.parts else trained
    ema = Ema(net, 0.9)
    run.resume(model=trained, optimiser=optimiser, ema=ema)
    sys.stdout.write("ready\n")  # in one piece, beside another process
    sys.stdout.flush()
    for step in run.steps(section.steps, save_seconds=args.save_seconds):
        chosen = batch_indices(section.seed, step, section.batch, len(DATA), run.rank, run.world_size)
        with open(run.folder / f"seen-{run.rank}.jsonl", "a") as file:
            file.write(json.dumps([step, chosen.tolist()]) + "\n")
        for micro_batch in run.micro_batches(chosen):
            with run.timer("data"):
                noisy = DATA[micro_batch] + args.noise * torch.randn(len(micro_batch), 4)
            with run.timer("forward"):
                if args.spoil.get(str(step)) == "memory":
                    torch.empty(1 << 60)
                loss = (model(noisy) - noisy.sum(1, keepdim=True)).square().mean()
            if args.spoil.get(str(step)) == "nan":
                loss = loss * float("nan")
            run.backward(loss)
        norm = run.update(optimiser, cosine(step, section.steps, section.lr, 2), clip=0.5)
        ema.update(step)
        run.log(every=1, loss=run.loss, grad_norm=norm)
        time.sleep(args.pause)
    run.finish(steps=run.step)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
