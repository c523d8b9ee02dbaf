"""What every stage shares: the run folder, exact resume, the log, several processes, the exported file.

A run folder is a run's identity. The same command resumes it; a changed configuration is refused. Everything random
is a pure function of (seed, step, process), so a checkpoint needs no generator state and a resumed run repeats no
sample. A stage's loop, whole:

    run = core.Run(args)                                # args: runs, stage, seed, fingerprint, accumulate
    module, optimiser = run.prepare(module, optimiser)  # for one process or for many
    run.resume(model=module, optimiser=optimiser)
    for step in run.steps(args.steps):
        chosen = core.batch_indices(args.seed, step, args.batch, len(data), run.rank, run.world)
        for piece in run.pieces(chosen):                # args.accumulate equal pieces
            with run.timer("data"):
                batch = data[piece]
            with run.timer("forward"):
                loss = module(batch)
            run.backward(loss)
        norm = run.update(optimiser, core.cosine(step, args.steps, args.lr))
        run.log(loss=run.loss, grad_norm=norm)
    run.finish(figure=1.0)

`core.optimise(loss, optimiser, lr)` is `backward` and `update` of a batch in one piece.

run.py          the run: its steps, what it logs and shows
folder.py       the run's folder: identity, resume, done
update.py       one optimiser step, guarded, in one process or several
checkpoints.py  files that are whole or not there
sharded.py      weights that are spread over processes
journal.py      log.jsonl, TensorBoard, where a step's time goes
trouble.py      signals, memory, disk: one sentence each
optim.py        learning rate, weight decay, EMA
precision.py    losses in fp32, whatever computes around them
order.py        which samples a step sees
files.py        weights, arrays and pictures, written atomically
"""

from prefgen.files import write_atomic

from .checkpoints import last_state
from .files import picture_grid, save_array, save_weights
from .optim import Ema, cosine, parameter_groups
from .order import batch_indices, step_seed
from .precision import full_precision
from .run import Run, optimise
from .sharded import whole

__all__ = [
    "Ema",
    "Run",
    "batch_indices",
    "cosine",
    "full_precision",
    "last_state",
    "optimise",
    "parameter_groups",
    "picture_grid",
    "save_array",
    "save_weights",
    "step_seed",
    "whole",
    "write_atomic",
]
