"""The training core: a stopped run goes on exactly, a damaged or changed one is told, a bad step is not taken."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from filelock import FileLock
from torch import nn

from prefgen.files import write_atomic
from tests.closeness import assert_close
from tests.training import toy_stage
from tests.training.commands import FSDP, LAUNCHER
from training.common.checkpoints import last_state
from training.common.config.command import StageArgs
from training.common.config.sections import Training
from training.common.order import batch_indices, step_seed
from training.common.run import Run

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "tests/training/toy_stage.py"
TWO = (*LAUNCHER, "2")


def toy(folder, **options):
    """The toy stage in this process; returns its last state."""
    toy_stage.main(folder, options)
    return last_state(folder / "toy")


def start(folder, *launcher, before=None, fsdp=False, **options):
    """The toy stage as a process of its own, from the moment its training begins."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment |= FSDP if fsdp else {}
    line = [sys.executable, *launcher, str(SCRIPT), str(folder), json.dumps(options)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(line, env=environment, preexec_fn=before, **pipes)
    assert process.stdout.readline() == "ready\n", process.communicate()[1]
    return process


def after_a_step(process, folder):
    """Wait until the process has taken a step."""
    log = folder / "toy/log.jsonl"
    size = log.stat().st_size if log.exists() else 0
    while process.poll() is None and (log.stat().st_size if log.exists() else 0) <= size:
        time.sleep(0.01)


def run_of(folder, may_be_unused=(), stage="toy", **options):
    section = Training(steps=12, batch=8, accumulate=options.get("accumulate", 1), lr=0.1, seed=3)
    return Run(StageArgs(stage, section, toy_stage.CONFIG, options, folder), may_be_unused)


def same(a, b):
    """Whether two states hold the same, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_near(a, b):
    """Weights after a few steps at a rate of 0.1: a small one is the sum of steps as large as those of a large one."""
    for part in ("model", "ema"):
        largest = max(weight.abs().max() for weight in b[part].values())
        for key in b[part]:
            assert_close(a[part][key], b[part][key], scale=largest)


def lines(folder, name="log"):
    return [json.loads(line) for line in (folder / f"toy/{name}.jsonl").read_text().splitlines()]


def names(folder):
    return sorted(p.name for p in (folder / "toy/checkpoints").iterdir())


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The toy stage from its first to its last step, without a break."""
    folder = tmp_path_factory.mktemp("straight")
    return SimpleNamespace(state=toy(folder), seen=lines(folder, "seen-0"), log=lines(folder))


@pytest.fixture
def stopped(tmp_path):
    """A run with checkpoints of the steps 4 and 5, stopped there by a loss that is no number."""
    with pytest.raises(SystemExit):
        toy(tmp_path, save_seconds=0, spoil={"5": "nan"})
    assert names(tmp_path) == [f"step-{step:08d}.{kind}" for step in (4, 5) for kind in ("json", "pt")]
    toy_stage.RUNS[-1].unlock()  # as the end of its process would
    return tmp_path


def test_a_finished_run_unlocks_its_folder(tmp_path):
    run = run_of(tmp_path)
    run.finish(loss=1.0)
    # As another process would take it.
    FileLock(run.folder / "lock").acquire(timeout=0).lock.release()


# Going on


# Twelve runs, one after the other, each killed by the system's own timer a moment after its first step: a kill from
# another process would come late on a busy machine, after any number of steps. They are forks, which have no imports to
# wait for, of a process of its own: autograd refuses to work in a fork of one that had a card, and some tests pretend
# one.
KILLED = """
import os, random, signal, sys, time, traceback
from pathlib import Path
from types import SimpleNamespace
from tests.training import toy_stage

rng = random.Random(7)
for number in range(12):
    after = rng.uniform(0.001, 0.06)
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        if os.WTERMSIG(status) != signal.SIGALRM:
            sys.exit(f"run {number} ended by itself, with {status}")
        continue

    def sleep(seconds):
        if not signal.getitimer(signal.ITIMER_REAL)[0]:
            signal.setitimer(signal.ITIMER_REAL, after)
        time.sleep(seconds)

    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        toy_stage.time = SimpleNamespace(sleep=sleep)
        toy_stage.main(Path(sys.argv[1]), {"pause": 0.03, "save_seconds": 0, "steps": int(sys.argv[2])})
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(1)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_killed_twelve_times_at_any_moment_goes_on_bit_for_bit(tmp_path):
    """Checkpoints are written by a thread after every step: kills fall between steps, into them and into writing."""
    steps = 60
    straight = toy(tmp_path / "straight", steps=steps)
    line = [sys.executable, "-c", KILLED, str(tmp_path), str(steps)]
    killed = subprocess.run(line, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert killed.returncode == 0, killed.stderr[-3000:]
    assert not (tmp_path / "toy/done").exists()
    assert same(toy(tmp_path, steps=steps), straight)
    seen, log = (lines(tmp_path / "straight", name) for name in ("seen-0", "log"))
    assert dict(lines(tmp_path, "seen-0")) == dict(seen), "each step saw the same samples each time"
    assert len(lines(tmp_path, "seen-0")) > steps, "steps were done again"
    logged = [{k: line[k] for k in ("step", "lr", "loss", "grad_norm", "grad")} for line in lines(tmp_path)]
    assert logged == [{k: line[k] for k in ("step", "lr", "loss", "grad_norm", "grad")} for line in log]


# A process that is killed at one call of its second checkpoint.
DYING = """
import os, signal, sys
from pathlib import Path
from tests.training import toy_stage
from training.common import checkpoints
owner, name, call = {"write": (checkpoints._Hashed, "write", 20), "fsync": (os, "fsync", 1), "note": (os, "replace", 1),
                     "rename": (os, "replace", 2), "folder": (checkpoints, "_to_disk", 1)}[sys.argv[2]]
true, calls = getattr(owner, name), []
def dying(*arguments):
    if len(checkpoints.listed(Path(sys.argv[1], "toy/checkpoints"))) == (2 if name == "_to_disk" else 1):
        calls.append(name)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
    return true(*arguments)
setattr(owner, name, dying)
toy_stage.main(Path(sys.argv[1]), {"save_seconds": 0})
"""


@pytest.mark.parametrize("moment", ["write", "fsync", "note", "rename", "folder"])
def test_a_run_killed_while_it_writes_a_checkpoint_goes_on_bit_for_bit(tmp_path, straight, moment, capsys):
    line = [sys.executable, "-c", DYING, str(tmp_path), moment]
    killed = subprocess.run(line, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    complete = [name for name in names(tmp_path) if name.endswith(".pt")]
    assert complete == ["step-00000001.pt", "step-00000002.pt"][: 1 + (moment == "folder")]
    assert same(toy(tmp_path), straight.state)
    assert "can't be used" not in capsys.readouterr().out, "nothing is taken for damaged"
    assert not [name for name in names(tmp_path) if name.endswith(".tmp")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(tmp_path, straight, number):
    def in_the_background():  # as a shell starts a job with &
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    process = start(tmp_path, pause=0.2, before=in_the_background)
    after_a_step(process, tmp_path)
    process.send_signal(number)
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 128 + number
    step = len(lines(tmp_path, "seen-0"))
    assert (
        f"toy: Stopped after step {step}; the same command goes on from here." in errors and "Traceback" not in errors
    )
    assert names(tmp_path) == [f"step-{step:08d}.json", f"step-{step:08d}.pt"] and 0 < step < 12
    assert same(toy(tmp_path), straight.state)
    assert lines(tmp_path, "seen-0") == straight.seen


def test_log_lines_past_the_checkpoint_and_torn_ones_are_done_again(stopped):
    log = stopped / "toy/log.jsonl"
    log.write_bytes(log.read_bytes() + b'{"step": 5, "loss": 0.0}\n{"step": 6, "lo\xc3')
    toy(stopped)
    assert [line["step"] for line in lines(stopped)] == list(range(12))


def test_first_weights_come_from_the_stage_s_seed(tmp_path):
    def weights():
        torch.seed()  # what another process would start with
        run_of(tmp_path, steps=1)
        return nn.Linear(3, 3).weight

    assert torch.equal(weights(), weights())


# Checkpoints


def spoil(path, how):
    if how == "a flipped bit":
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif how == "half written":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.with_suffix(".json").unlink()


@pytest.mark.parametrize("how", ["a flipped bit", "half written", "no note"])
def test_a_damaged_checkpoint_is_told_and_the_one_before_is_used(stopped, straight, how, capsys):
    spoil(stopped / "toy/checkpoints/step-00000005.pt", how)
    assert same(toy(stopped), straight.state)
    sentences = [line for line in capsys.readouterr().out.splitlines() if "step-00000005.pt" in line]
    assert len(sentences) == 1 and "going on from step-00000004.pt" in sentences[0]
    assert "step-00000004.pt" in names(stopped) and "step-00000005.damaged" in names(stopped)


def test_nothing_is_deleted_where_no_checkpoint_is_whole(stopped):
    for path in (stopped / "toy/checkpoints").glob("*.pt"):
        spoil(path, "half written")
    before = {p: p.read_bytes() for p in (stopped / "toy/checkpoints").iterdir()}
    with pytest.raises(SystemExit, match="No checkpoint in .* is whole: step-00000005.pt .*, step-00000004.pt"):
        toy(stopped)
    assert before == {p: p.read_bytes() for p in (stopped / "toy/checkpoints").iterdir()}


def test_a_full_disk_ends_the_run_in_a_sentence_and_the_checkpoint_before_stays(stopped, straight):
    resource = pytest.importorskip("resource")
    size = (stopped / "toy/checkpoints/step-00000005.pt").stat().st_size
    before = names(stopped)

    def small_files_only():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 500, size - 500))

    _, errors = start(stopped, before=small_files_only, save_seconds=0).communicate(timeout=900)
    assert "toy, step 6: the checkpoint can't be written" in errors and "Traceback" not in errors
    assert "step-00000005.pt. Make room" in errors and names(stopped) == before
    assert same(toy(stopped), straight.state)


def test_the_newest_checkpoints_stay_and_rests_of_a_killed_write_go(tmp_path):
    (tmp_path / "toy/checkpoints").mkdir(parents=True)
    (tmp_path / "toy/checkpoints/step-00000003.pt.tmp").write_bytes(b"half")
    toy(tmp_path, save_seconds=0, keep=3)
    assert [n for n in names(tmp_path) if n.endswith(".pt")] == [f"step-{s:08d}.pt" for s in (10, 11, 12)]
    assert len(names(tmp_path)) == 6


def test_a_stage_without_a_checkpoint_says_what_to_run_first(tmp_path):
    with pytest.raises(SystemExit, match="run `python -m training.train_alignment` first"):
        last_state(tmp_path / "train_alignment")


# What is refused


def test_a_changed_configuration_is_refused_by_its_keys(tmp_path):
    run_of(tmp_path, steps=1, lr=0.1, base={"family": "sd15", "pixels": 512}).claim()
    with pytest.raises(
        SystemExit, match=r"another configuration than this command: base.pixels \(512 there, 768 now\)"
    ):
        run_of(tmp_path, steps=1, lr=0.1, base={"family": "sd15", "pixels": 768})
    with pytest.raises(SystemExit, match=r"lr \(0.1 there, None now\), rate \(None there, 0.1 now\)"):
        run_of(tmp_path, steps=1, rate=0.1, base={"family": "sd15", "pixels": 512})
    run_of(tmp_path, steps=1, lr=0.1, base={"family": "sd15", "pixels": 512}, accumulate=4)


def test_a_damaged_record_of_a_run_is_refused_and_stays(tmp_path):
    run = run_of(tmp_path, steps=1)
    run.claim()
    (run.folder / "config.json").write_text('{"steps": 1')
    with pytest.raises(SystemExit, match=r"config.json is damaged: use another --runs folder, or put a copy back\.$"):
        run_of(tmp_path, steps=1)
    assert (run.folder / "config.json").read_text() == '{"steps": 1'


def test_a_folder_that_another_command_writes_is_refused(tmp_path, straight):
    pytest.importorskip("fcntl")
    process = start(tmp_path, pause=0.2, save_seconds=0)
    with pytest.raises(SystemExit, match="toy is being written by another command: wait for it"):
        toy(tmp_path)
    assert process.poll() is None
    process.kill()
    process.communicate()
    assert same(toy(tmp_path), straight.state)


def test_a_loss_that_is_no_number_stops_the_run_before_it_changes_a_weight(tmp_path):
    with pytest.raises(SystemExit, match=r"toy, step 5: the loss is not finite \(nan\). The last .*step-00000005.pt"):
        toy(tmp_path, save_seconds=0, spoil={"5": "nan"})
    now = {name: part.state_dict() for name, part in toy_stage.RUNS[-1].parts.items()} | {"step": 5}
    assert same(last_state(tmp_path / "toy"), now)


def test_a_gradient_that_is_no_number_is_told_by_its_part(tmp_path):
    run, net = run_of(tmp_path), toy_stage.Net()
    optimiser = torch.optim.SGD(net.parameters())
    run.resume(model=net, optimiser=optimiser)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    net.body.weight.register_hook(lambda gradient: gradient / 0)
    with pytest.raises(SystemExit, match="toy, step 0: the gradient of body is not finite. There is no checkpoint yet"):
        for _ in run.steps(1):
            run.optimise(net(toy_stage.DATA).mean(), optimiser, 0.1)
    assert same(before, dict(net.state_dict()))


def test_a_part_without_a_gradient_is_told_at_the_first_step(tmp_path):
    def step(may_be_unused):
        run, net = run_of(tmp_path, may_be_unused), toy_stage.Net()
        optimiser = torch.optim.SGD(net.parameters())
        run.resume(model=net, optimiser=optimiser)
        for _ in run.steps(1):
            run.optimise(net.head(torch.ones(2, 8)).mean(), optimiser, 0.1)

    with pytest.raises(SystemExit, match="toy, step 0: the gradient of body is zero, so it would never learn"):
        step(())
    step(("body",))


def test_no_memory_is_a_sentence_that_names_what_to_change(tmp_path):
    with pytest.raises(
        SystemExit, match=r"toy, step 3: out of memory \(forward\): raise accumulate \(now 2;.*batch .*8"
    ):
        toy(tmp_path, accumulate=2, spoil={"3": "memory"})


def test_pieces_that_don_t_fit_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="a share of 8 samples can't be cut into 3 equal pieces"):
        toy(tmp_path, accumulate=3)
    run, net = run_of(tmp_path, stage="whole", accumulate=2), nn.Linear(4, 1)
    optimiser = torch.optim.SGD(net.parameters())
    run.resume(model=net, optimiser=optimiser)
    with pytest.raises(SystemExit, match="doesn't cut its batch into pieces: accumulate has to be 1"):
        run.optimise(net(toy_stage.DATA).mean(), optimiser, 0.1)


def test_a_logged_value_that_is_not_finite_stops_the_run(tmp_path):
    run = run_of(tmp_path, steps=1)
    with pytest.raises(SystemExit, match="not finite"):
        for _ in run.steps(1):
            run.log(every=1, loss=float("nan"))


# Several processes, several pieces


@pytest.mark.parametrize("options", [{}, {"parts": True, "accumulate": 2}], ids=["wrapped", "averaged"])
def test_two_processes_train_as_one(tmp_path, options):
    one = toy(tmp_path / "one", noise=0)
    _, errors = start(tmp_path / "two", *TWO, noise=0, **options).communicate(timeout=900)
    two = last_state(tmp_path / "two/toy")
    if "parts" in options:
        two["model"] = dict(zip(one["model"], two["model"].values(), strict=True))
    assert_near(one, two)
    for key in ("loss", "grad_norm"):
        assert [x[key] for x in lines(tmp_path / "two")] == pytest.approx(
            [x[key] for x in lines(tmp_path / "one")], 1e-4
        )
    shares = zip(*(lines(tmp_path / "two", f"seen-{rank}") for rank in range(2)), strict=True)
    assert [[a[0], a[1] + b[1]] for a, b in shares] == lines(tmp_path / "one", "seen-0")


def test_a_run_spread_over_two_processes_goes_on_in_two_and_in_one(tmp_path):
    process = start(tmp_path / "two", *TWO, noise=0, fsdp=True, pause=0.4)
    after_a_step(process, tmp_path / "two")
    process.terminate()  # the launcher, which tells both
    _, errors = process.communicate(timeout=900)
    step = last_state(tmp_path / "two/toy")["step"]
    assert 0 < step < 12 and f"Stopped after step {step}" in errors
    shutil.copytree(tmp_path / "two", tmp_path / "then one")
    straight = toy(tmp_path / "one", noise=0)
    start(tmp_path / "two", *TWO, noise=0, fsdp=True).communicate(timeout=900)
    assert_near(straight, last_state(tmp_path / "two/toy"))
    assert_near(straight, toy(tmp_path / "then one", noise=0))


def test_fsdp_1_is_refused(tmp_path):
    line = [sys.executable, str(SCRIPT), str(tmp_path), "{}"]
    environment = os.environ | FSDP | {"FSDP_VERSION": "1", "PYTHONPATH": str(ROOT)}
    refused = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert refused.returncode == 1 and "set fsdp_version: 2 in accelerate's" in refused.stderr.splitlines()[-1]
    assert "Traceback" not in refused.stderr


def test_a_batch_in_pieces_trains_as_in_one(tmp_path):
    unsplit, cut = (toy(tmp_path / str(n), noise=0, accumulate=n) for n in (1, 4))
    assert_near(unsplit, cut)
    assert [x["loss"] for x in lines(tmp_path / "4")] == pytest.approx([x["loss"] for x in lines(tmp_path / "1")], 1e-4)


def test_several_processes_need_a_stage_and_a_batch_for_them(tmp_path, monkeypatch):
    run, net = run_of(tmp_path), nn.Linear(4, 1)
    optimiser = torch.optim.SGD(net.parameters())
    run.resume(model=net, optimiser=optimiser)
    run.updater.world_size = 2
    with pytest.raises(SystemExit, match="trains in one process: start it without a launcher"):
        run.optimise(net(toy_stage.DATA).mean(), optimiser, 0.1)
    with pytest.raises(ValueError, match="a batch of 7 can't be shared equally by 2 processes"):
        batch_indices(0, 0, 7, 20, 0, 2)


def test_every_sample_comes_once_an_epoch_in_another_order():
    epochs = np.concatenate([batch_indices(0, step, 7, 21) for step in range(6)]).reshape(2, 21)
    assert all(sorted(epoch) == list(range(21)) for epoch in epochs.tolist())
    assert epochs[0].tolist() != epochs[1].tolist()


def test_processes_share_a_batch_and_draw_their_own_noise():
    for step in range(6):  # 21 samples: some batches reach into the next epoch
        parts = [batch_indices(0, step, 8, 21, rank, 4) for rank in range(4)]
        assert np.concatenate(parts).tolist() == batch_indices(0, step, 8, 21).tolist()
    seeds = {step_seed(seed, step, rank) for seed in range(3) for step in range(3) for rank in range(3)}
    assert len(seeds) == 27


# What is written down


def test_the_log_has_the_gradients_of_every_part_and_where_the_time_goes(straight):
    for line in straight.log:
        assert line["grad"].keys() == {"body", "head"}
        assert np.hypot(*line["grad"].values()) == pytest.approx(line["grad_norm"], rel=1e-3)
        parts = [line["seconds"][name] for name in ("data", "forward", "backward", "optimiser")]
        assert sum(parts) <= line["seconds"]["step"] + 4e-4


def test_numbers_and_pictures_reach_tensorboard(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run, net = run_of(tmp_path), toy_stage.Net()
    optimiser = torch.optim.SGD(net.parameters())
    run.resume(model=net, optimiser=optimiser)
    for _ in run.steps(2):
        norm = run.optimise(net(toy_stage.DATA).square().mean(), optimiser, 0.1)
        run.log(every=1, loss=run.loss, grad_norm=norm)
    run.pictures("shown", torch.ones(3, 3, 8, 8) * torch.tensor([-1.0, 0.0, 1.0])[:, None, None, None])
    run.finish()
    events = accumulator.EventAccumulator(str(tmp_path / "toy/tensorboard")).Reload()
    assert {"loss", "lr", "grad/body", "seconds/backward"} <= set(events.Tags()["scalars"])
    assert [e.value for e in events.Scalars("loss")] == pytest.approx([x["loss"] for x in lines(tmp_path)])
    assert events.Tags()["images"] == ["shown"]
    from PIL import Image

    picture = np.asarray(Image.open(tmp_path / "toy/samples/shown-00000002.png"))
    assert [picture[6, x].tolist() for x in (6, 16, 26)] == [[0] * 3, [128] * 3, [255] * 3]


def test_numbers_and_pictures_reach_wandb(tmp_path, monkeypatch):
    """accelerate's tracker, on a stand-in of the package."""
    logged = []
    run = SimpleNamespace(
        log=lambda values, step=None, **_: logged.append((step, values)), finish=lambda: logged.append("finished")
    )
    begun = {}
    fake = SimpleNamespace(
        init=lambda **options: begun.update(options) or run, Image=lambda array, **_: ("image", array.shape)
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    from training.common.journal import Journal

    (tmp_path / "toy").mkdir()
    journal = Journal(tmp_path / "toy", ("wandb",))
    journal.begin(0)
    journal.write(0, {"loss": 0.5}, {"body": 1.0})
    journal.picture("shown", torch.zeros(3, 8, 9, dtype=torch.uint8), 0)
    journal.close()
    assert begun["project"] == "prefgen" and begun["id"] == f"{tmp_path.name}-toy" and begun["resume"] == "allow"
    assert logged[0][0] == 0 and {"loss": 0.5, "grad/body": 1.0}.items() <= logged[0][1].items()
    assert logged[1] == (0, {"shown": [("image", (8, 9, 3))]}) and logged[-1] == "finished"


def test_eight_bit_adam_is_bitsandbytes_where_it_is_installed(monkeypatch):
    from training.common.optim import OptimiserError, optimiser_of

    net = toy_stage.Net()
    assert type(optimiser_of("adamw", net, 0.1)) is torch.optim.AdamW
    asked = {}
    eight = SimpleNamespace(AdamW8bit=lambda groups, betas: asked.update(groups=groups, betas=betas) or "8 bit")
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(optim=eight))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", eight)
    assert optimiser_of("adamw8bit", net, 0.1, (0.9, 0.98)) == "8 bit"
    assert asked["betas"] == (0.9, 0.98) and [group["weight_decay"] for group in asked["groups"]] == [0.1, 0.0]
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(OptimiserError, match="pip install bitsandbytes"):
        optimiser_of("adamw8bit", net, 0.1)


def test_training_goes_on_while_a_checkpoint_is_written_and_what_is_written_is_its_step(tmp_path, monkeypatch):
    """A writer so slow that several steps are taken meanwhile."""
    from training.common import checkpoints

    write, steps = checkpoints.write, []

    def slow(folder, step, state, keep):
        time.sleep(0.3)
        steps.append((step, toy_stage.RUNS[-1].step))
        return write(folder, step, state, keep)

    monkeypatch.setattr(checkpoints, "write", slow)
    run, net = run_of(tmp_path), toy_stage.Net()
    toy_stage.RUNS.append(run)
    optimiser = torch.optim.SGD(net.parameters())
    run.resume(model=net, optimiser=optimiser)
    weights = {}
    for step in run.steps(6, save_seconds=1e9):
        run.optimise(net(toy_stage.DATA).square().mean(), optimiser, 0.1)
        run.log(loss=run.loss)
        if step == 1:
            run.step += 1
            weights[run.step] = {key: value.clone() for key, value in net.state_dict().items()}
            run.save()
            run.step -= 1
    saved = torch.load(tmp_path / "toy/checkpoints/step-00000002.pt", weights_only=True)
    assert same(saved["model"], weights[2]), "not what the later steps made of them"
    assert steps[0][0] == 2 and steps[0][1] > 2, "steps were taken while it was written"
    assert last_state(tmp_path / "toy")["step"] == 6


def test_without_tensorboard_one_notice_and_the_log(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    toy(tmp_path)
    assert capsys.readouterr().err.count("No TensorBoard here") == 1
    assert len(lines(tmp_path)) == 12 and not (tmp_path / "toy/tensorboard").exists()


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "weights.safetensors"
    write_atomic(target, b"old")
    monkeypatch.setattr("prefgen.files.os.replace", lambda *_: (_ for _ in ()).throw(OSError("killed here")))
    with pytest.raises(OSError):
        write_atomic(target, b"new")
    assert [file.name for file in tmp_path.iterdir()] == [target.name] and target.read_bytes() == b"old"
