"""The repository as it stands here, copied to where a test may build in it."""

import contextlib
import os
import shutil
import subprocess
from pathlib import Path

from pathspec import GitIgnoreSpec

from scripts.comfy_server import ROOT


def source_files() -> list[str]:
    """Every file of the repository, new ones too, relative to its root with forward slashes; nothing that git ignores.

    Where git can't tell (no git, an unpacked source archive, a checkout of another owner), .gitignore is read here.
    """
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        if (ROOT / ".git").exists():
            command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
            listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
            return sorted(name for name in listed if name and (ROOT / name).is_file())
    ignored = GitIgnoreSpec.from_lines([".git", *(ROOT / ".gitignore").read_text().splitlines()])
    names = []
    for folder, folders, files in os.walk(ROOT):
        below = Path(folder).relative_to(ROOT)
        folders[:] = [name for name in folders if not ignored.match_file(f"{(below / name).as_posix()}/")]
        names += [(below / name).as_posix() for name in files]
    return sorted(name for name in names if not ignored.match_file(name))


def copy_sources(target: Path) -> Path:
    """Copy source_files() to `target` and return it."""
    for name in source_files():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name)
    return target


def track_all(tree: Path) -> None:
    """Make `tree` a git repository that tracks every file in it; nothing where there is no git."""
    if shutil.which("git"):
        subprocess.run(["git", "init", "--quiet"], cwd=tree, check=True)
        subprocess.run(["git", "add", "--all"], cwd=tree, check=True)
