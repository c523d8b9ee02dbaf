"""Stages as processes of their own that have their libraries already: each is forked from one that has imported them.

Importing torch, transformers and diffusers takes longer than a few steps of a tiny model, and every test of a pipeline
starts many stages. What is killed, spread over processes or given another interpreter is started by
`tests.training.commands` instead.
"""

import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
# What the stages import of other people's. Nothing of ours: it reads its environment when it is imported.
LIBRARIES = [
    "torch",
    "torch._dynamo",
    "scipy.stats",
    "pyarrow.parquet",
    "PIL.Image",
    "accelerate",
    "peft",
    "transformers.models.auto.modeling_auto",
    "transformers.models.clip.modeling_clip",
    "transformers.models.smolvlm.modeling_smolvlm",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.unets.unet_2d_condition",
]


def run(line, cwd=ROOT, env=None, timeout=900):
    """What `subprocess.run` gives for `[python, "-m", module, *words]` with its outputs as text, on one thread, as
    `commands.start` has it: another number rounds otherwise."""
    python, option, module, *words = map(str, line)
    if (python, option) != (sys.executable, "-m"):
        raise ValueError(f"This starts modules of {sys.executable} alone, not {python} {option}.")
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        environment = dict(os.environ if env is None else env) | {"OMP_NUM_THREADS": "1"}
        command = (module, words, str(cwd), environment, list(map(str, outputs)), _installed())
        # By its path: `tests` may be another package there, with what a test has put on sys.path.
        options = {"init_globals": {"COMMAND": command}, "run_name": "__child__"}
        process = _server().Process(target=runpy.run_path, args=(__file__,), kwargs=options)
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(line, timeout)
        said = [path.read_text(encoding="utf-8") for path in outputs]
    return subprocess.CompletedProcess(line, process.exitcode, *said)


@cache
def _server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    return context


@cache
def _installed():
    """Where this Python finds what is installed, without the folders that tests add."""
    asked = [sys.executable, "-I", "-c", "import json, sys; print(json.dumps(sys.path))"]
    return json.loads(subprocess.run(asked, check=True, capture_output=True, text=True).stdout)


def _as_a_command(module, words, cwd, environment, outputs, installed):
    """Become `python -m module words`."""
    for number, path in enumerate(outputs, 1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    # Those of the fork server, which belong to what started it.
    for stream, number in (("stdout", 1), ("stderr", 2)):
        setattr(sys, stream, open(number, "w", encoding="utf-8", closefd=False))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    _set_threads()
    # `python -m` looks in the current folder, in those of PYTHONPATH, and where Python is installed.
    sys.path[:] = [cwd, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep)), *installed]
    sys.argv = [module, *words]
    # Processes that the stage starts are none of this server's.
    multiprocessing.set_start_method(None, force=True)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _set_threads():
    """OMP_NUM_THREADS is read when the library is loaded, which it was."""
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


if __name__ == "__child__":
    _as_a_command(*COMMAND)  # noqa: F821 (given by run_path)
