"""What every stage shares: the run folder, exact resume, the log, several processes, the exported file.

A run folder is a run's identity. The same command resumes it; a changed configuration is refused. Everything random
is a pure function of (seed, step, process), so a checkpoint needs no generator state and a resumed run repeats no
sample. A stage's loop:

    args = arguments(TrainAlignment, __doc__)
    section = args.section                              # the stage's part of the configuration
    run = Run(args)
    module, optimiser = run.prepare(module, optimiser)  # for one process or for many
    run.resume(model=module, optimiser=optimiser)
    for step in run.steps(section.steps):
        indices = batch_indices(section.seed, step, section.batch, len(data), run.rank, run.world_size)
        for micro_batch in run.micro_batches(indices):  # section.accumulate equal ones
            with run.timer("data"):
                batch = data[micro_batch]
            with run.timer("forward"):
                loss = module(batch)
            run.backward(loss)
        norm = run.update(optimiser, cosine(step, section.steps, section.lr))
        run.log(loss=run.loss, grad_norm=norm)
    run.finish(figure=1.0)

`run.optimise(loss, optimiser, lr)` is `backward` and `update` of a batch that isn't split.

run.py            the run: its steps, what it logs and shows
folder.py         the run's folder: identity, resume, done
chain.py          what every stage was made from
update.py         one optimiser step, guarded, in one process or several
checkpoints.py    files that are complete or not there
sharded.py        weights that are sharded over processes
journal.py        log.jsonl, TensorBoard, W&B, where a step's time goes
signals.py        SIGTERM and SIGINT end a run after its step
errors.py         how a command ends on what a person can mend
order.py          which samples a step sees
optim.py          learning rate, weight decay, EMA
precision.py      losses in fp32, whatever computes around them
mmd.py            the distance that e_sem is aligned by
statistics.py     intervals from resampling users
files.py          weights, arrays and pictures, written atomically
cache.py          arrays that are computed once
fitting.py        how much fits a device at once
ahead.py          pictures read before they are needed
bases.py          the frozen diffusion models
sampling.py       noise schedule and guided sampling
user_branch.py    the user cross-attention in a diffusers UNet
adapters.py       the adapter around its trained parts
lora.py           LoRA on the MLLM's decoder
atelier_clip.py   the atelier's CLIP; those of real bases are in prefgen/clip.py
stage_outputs.py  what one stage leaves and others read
config/           what a configuration may say, and the stages' command line
"""
