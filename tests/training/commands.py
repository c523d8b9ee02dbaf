"""The data sets' real commands as processes, killed and compared."""

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}  # what accelerate says of its configuration
LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node")


def content(folder):
    """{name: SHA-256} of everything in a folder."""
    files = (p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def start(module, *words, processes=1, environment=None, **options):
    """`python -m training.<module>` with its outputs as text, in a process group of its own; or several processes that
    share the work."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | (environment or {})
    launcher = ()
    if processes > 1:
        launcher, environment["ACCELERATE_USE_CPU"] = (*LAUNCHER, str(processes)), "true"
    line = [sys.executable, *launcher, "-m", f"training.{module}", *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(line, cwd=ROOT, env=environment, start_new_session=True, **pipes, **options)


def until(process, there):
    """Wait for what a running process leaves behind."""
    while not there():
        assert process.poll() is None, process.communicate()[1][-2000:]
        time.sleep(0.01)


def kill(process):
    """Kill a process and all below it: a launcher's workers are in sessions of their own."""
    for pid in _descendants(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()


def kill_a_ray_worker(process):
    """Wait for a task of Ray below a process and kill it."""
    victim = None
    while process.poll() is None and victim is None:
        # Ray names a worker after its task; only those that this command started are looked at.
        victim = next((pid for pid in _descendants(process.pid) if _command_line(pid).startswith("ray::Map")), None)
        time.sleep(0.005)
    assert victim, process.communicate()[1]
    os.kill(victim, signal.SIGKILL)


def _descendants(pid):
    pids = [pid]
    for parent in pids:
        with contextlib.suppress(OSError):
            pids += map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split())
    return pids


def _command_line(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    return ""
