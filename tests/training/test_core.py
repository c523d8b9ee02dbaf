"""The training core: a stopped run goes on exactly, a changed one is refused, every sample comes once an epoch."""

import json
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from training import core


def run_of(folder, **options):
    return core.Run(SimpleNamespace(runs=folder, stage="toy", seed=3, fingerprint=options))


def train(folder, stop_after=None, steps=12):
    """A toy regression with noise in its inputs; returns its weights and the batches that it saw."""
    run = run_of(folder, steps=steps)
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    optimiser = torch.optim.AdamW(core.parameter_groups(model, 0.1))
    ema = core.Ema(model, 0.9)
    run.resume(model=model, optimiser=optimiser, ema=ema)
    data, seen = torch.arange(40.0).reshape(10, 4) / 40, []
    try:
        for step in run.steps(steps):
            chosen = core.batch_indices(3, step, 4, len(data))
            seen.append(chosen.tolist())
            noisy = data[chosen] + 0.1 * torch.randn(4, 4)
            core.optimise((model(noisy) - 1).square().mean(), optimiser, core.cosine(step, steps, 0.1, 2))
            ema.update(step)
            run.log(every=1, weight=model.weight.sum())
            if step + 1 == stop_after:
                os.kill(os.getpid(), signal.SIGTERM)
    except SystemExit:
        pass
    return model.state_dict() | {f"ema.{k}": v for k, v in ema.shadow.items()}, seen


@pytest.mark.parametrize("stop_after", [1, 5, 11])
def test_a_stopped_run_goes_on_bit_exactly(tmp_path, stop_after):
    straight, all_batches = train(tmp_path / "straight")
    _, first = train(tmp_path / "stopped", stop_after)
    resumed, second = train(tmp_path / "stopped")
    assert first + second == all_batches
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)
    steps = [json.loads(line)["step"] for line in (tmp_path / "stopped/toy/log.jsonl").read_text().splitlines()]
    assert steps == list(range(12))


def test_log_lines_past_the_last_checkpoint_are_done_again_not_doubled(tmp_path):
    train(tmp_path, stop_after=4)
    log = tmp_path / "toy/log.jsonl"
    log.write_text(log.read_text() + json.dumps({"step": 4, "weight": 0.0}) + "\n")
    train(tmp_path)
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(12))


def test_a_changed_configuration_is_refused_and_nothing_is_lost(tmp_path):
    train(tmp_path, stop_after=4)
    before = (tmp_path / "toy/checkpoints/step-00000004.pt").read_bytes()
    with pytest.raises(SystemExit, match="another configuration"):
        run_of(tmp_path, steps=99)
    assert (tmp_path / "toy/checkpoints/step-00000004.pt").read_bytes() == before


def test_first_weights_come_from_the_stage_s_seed(tmp_path):
    def weights():
        torch.seed()  # what another process would start with
        run_of(tmp_path, steps=1)
        return torch.nn.Linear(3, 3).weight

    assert torch.equal(weights(), weights())


def test_every_sample_comes_once_an_epoch_in_another_order():
    epochs = np.concatenate([core.batch_indices(0, step, 7, 21) for step in range(6)]).reshape(2, 21)
    assert all(sorted(epoch) == list(range(21)) for epoch in epochs.tolist())
    assert epochs[0].tolist() != epochs[1].tolist()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    run = run_of(tmp_path, steps=1)
    with pytest.raises(SystemExit, match="not finite"):
        for _ in run.steps(1):
            run.log(every=1, loss=float("nan"))


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "weights.safetensors"
    core.write_atomic(target, b"old")
    monkeypatch.setattr("prefgen.files.os.replace", lambda *_: (_ for _ in ()).throw(OSError("killed here")))
    with pytest.raises(OSError):
        core.write_atomic(target, b"new")
    assert [file.name for file in tmp_path.iterdir()] == [target.name] and target.read_bytes() == b"old"
