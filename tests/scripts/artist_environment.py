"""A virtual environment with what ComfyUI's requirements bring and nothing else, in a second and without a download.

Its site-packages holds links to the distributions that are installed here, those alone that the requirements reach.
"""

import sys
import sysconfig
import venv
from collections.abc import Iterable
from importlib.metadata import Distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from scripts.setup_env import venv_python

# ComfyUI 0.3.75 imports it, and its requirements.txt leaves it to whoever else brings it.
UNLISTED = ["requests"]


def installed() -> dict[str, Distribution]:
    """The distributions of this environment by canonical name; a checkout on the path isn't one."""
    folders = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    return {canonicalize_name(each.metadata["Name"]): each for each in distributions(path=sorted(folders))}


def closure(requirements: Iterable[str], here: dict[str, Distribution]) -> set[str]:
    """The names of `here` that pip would install for `requirements`, itself included; what is missing is left out."""
    pending = [Requirement(line) for line in requirements]
    reached: set[tuple[str, str]] = set()
    while pending:
        requirement = pending.pop()
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras}:
            if name not in here or (name, extra) in reached:
                continue
            reached.add((name, extra))
            listed = [Requirement(line) for line in here[name].requires or ()]
            pending += [each for each in listed if each.marker is None or each.marker.evaluate({"extra": extra})]
    return {name for name, _ in reached}


def comfyui_requirements(comfyui: Path) -> list[str]:
    """The lines of ComfyUI's requirements.txt that name a distribution."""
    lines = (line.split("#")[0].strip() for line in (comfyui / "requirements.txt").read_text().splitlines())
    return [line for line in lines if line] + UNLISTED


def make_environment(folder: Path, comfyui: Path) -> tuple[Path, set[str], set[str]]:
    """Make the environment in `folder`. Returns its interpreter, the distributions in it and those left out."""
    here = installed()
    wanted = closure(comfyui_requirements(comfyui), here)
    venv.EnvBuilder(symlinks=True, with_pip=False).create(folder)
    python = venv_python(folder)
    site = folder / "Lib" if sys.platform == "win32" else folder / "lib" / f"python3.{sys.version_info.minor}"
    _link(site / "site-packages", {name: here[name] for name in wanted}, [here[name] for name in here.keys() - wanted])
    return python, wanted, here.keys() - wanted


def _link(target: Path, linked: dict[str, Distribution], left_out: list[Distribution]) -> None:
    """Link the files of `kept` into `target`: a folder as one link unless `left_out` has a part of it (namespaces)."""
    shared = {parent for each in left_out for file in each.files or () for parent in file.parents}
    for name, distribution in linked.items():
        files = distribution.files
        assert files, f"{name} doesn't say which files are its own"
        for file in files:
            if file.parts[0] == "..":  # a command in bin/
                continue
            entry = next((each for each in [*file.parents][-2::-1] if each not in shared), file)
            link = target / entry
            if not link.is_symlink():
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(distribution.locate_file(entry))
