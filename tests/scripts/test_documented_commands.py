"""Every command that README and docs print starts, knows the options it is printed with, and names files that exist."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SUBCOMMANDS = {"training.data": ("check",), "training.evaluation.study": ("make", "analyse")}
ELSEWHERE = {"pytest", "venv", "pip", "/tmp/pickles/read_pickles"}  # the last: test_pickles_page.py


def lines_of(page):
    """What a page prints as code: fenced lines, with those that a backslash goes on joined, and spans."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    fences = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```\w*\n.*?^```", "", text, flags=re.M | re.S))
    return [line for fence in fences for line in fence.splitlines()] + spans


def commands():
    """{(what starts, its subcommand): [options it is printed with]}: a module or a script of the repository."""
    found = {}
    for page in PAGES:
        for line in lines_of(page):
            for start in re.finditer(r"\bpython3? (?:-m (?P<module>[\w.]+)|(?P<script>[\w/]+\.py))(?P<rest>.*)", line):
                words = shlex.split(start["rest"].split(" # ")[0].split("   ")[0].rstrip("`|"), comments=True)
                name = start["module"] or start["script"]
                if name.split(".")[0] in ELSEWHERE:
                    continue
                sub = next((word for word in words if word in SUBCOMMANDS.get(name, ())), "")
                options = [word.split("=")[0] for word in words if word.startswith("--")]
                found.setdefault((name, sub), []).extend(options)
    return {key: sorted(set(options)) for key, options in found.items()}


def started(words, timeout=300, **environment):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment
    environment.pop("PYTHONPATH", None)
    line = [sys.executable, *words]
    return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


COMMANDS = commands()


def test_the_pages_print_the_commands_that_we_know_of():
    """The control of the search itself."""
    names = {name for name, _ in COMMANDS}
    assert names >= {
        "training.data.agents",
        "training.train_mllm",
        "training.export",
        "prefgen.download",
        "training.evaluation.study",
    }
    assert ("training.data", "check") in COMMANDS and ("training.evaluation.study", "analyse") in COMMANDS
    assert "--pictures" in COMMANDS["training.data.agents", ""] and len(names) > 20


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_printed_command_starts_and_knows_its_options(command):
    name, sub = command
    words = [name] if name.endswith(".py") else ["-m", name]
    ran = started([*words, *([sub] if sub else []), "--help"])
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.startswith("usage:")
    unknown = [option for option in COMMANDS[command] if not re.search(rf"{option}\b", ran.stdout)]
    assert unknown == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "bench", sorted({p.name for p in (ROOT / "benchmarks").glob("*.py")} - {Path(name).name for name, _ in COMMANDS})
)
def test_a_benchmark_that_no_page_prints_starts_from_the_root(bench):
    ran = started([f"benchmarks/{bench}", "--help"])
    assert ran.returncode == 0, ran.stderr[-2000:]


@pytest.mark.slow
def test_the_benchmark_of_the_branch_enters_comfyui_and_still_finds_our_own_test_models(tmp_path):
    """ComfyUI has a package named tests too. The other pack is a stand-in that asks for all that the benchmark uses."""
    pack = tmp_path / "ComfyUI_IPAdapter_plus"
    pack.mkdir()
    (pack / "__init__.py").write_text(
        "import comfy.supported_models\n"
        "from tests.prefgen.comfy.tiny_models import COMFY, CPU, clip_vision\n"
        "from tests.prefgen import ip_adapter_files\n"
        "raise SystemExit('all is there')\n"
    )
    ran = started(["benchmarks/branch_cost.py", "sd15"], PREFGEN_NEIGHBOURS=str(tmp_path))
    assert "all is there" in ran.stderr, ran.stderr[-2000:]


def test_printed_make_targets_are_those_of_the_makefile():
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.M))
    said = {
        word
        for page in PAGES
        for line in lines_of(page)
        for word in re.findall(r"(?:^|[ =])make ([a-z][\w-]*)", line)
        if line.lstrip("$ ").startswith(("make ", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ"))
    }
    assert {"demo", "test"} <= said <= targets


def test_files_of_the_repository_that_commands_name_exist():
    for page in PAGES:
        for line in lines_of(page):
            named = re.findall(r"(?<![\w/.])(?:training|tests|scripts|workflows)/[\w/.-]+\.(?:py|sh|yaml|json)\b", line)
            for path in named:
                assert (ROOT / path).exists(), f"{page.name}: {line}"


def test_configurations_that_commands_name_are_there():
    known = {path.stem for path in (ROOT / "training/configs").rglob("*.yaml")}
    for page in PAGES:
        for line in lines_of(page):
            for name in re.findall(r"--config (\S+)", line):
                assert name in known or name.endswith(".yaml") or name.startswith(("<", "NAME")), f"{page.name}: {line}"
