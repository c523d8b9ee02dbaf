"""What README and docs print as commands can be typed: it starts, reads its options, and names files that exist.

Every `python` line is run up to where its command has read its options (parse_only.py), the pipelines with `echo` for
Python, the pages' own Python from top to bottom. What else a page prints is in a short list of programs.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SUBCOMMANDS = {"training.data": ("check", "import"), "training.evaluation.study": ("make", "analyse")}
# pytest and its kind are others'; the tests that are printed as commands write their fixtures anew.
ELSEWHERE = {"pytest", "venv", "pip", "tests"}
# How a line of a fence may begin, beside `python`: programs of others, and a block that is run by a test of its page.
PROGRAMS = {"make", "sh", "accelerate", "pip", "git", "cd"}
OTHER_BLOCKS = {
    "flux.md": "tests/prefgen/test_flux_adapter.py",
    "pickles.md": "tests/training/data/test_pickles_page.py",
    "diffusers.md": "tests/prefgen/test_pipeline.py",
}
PYTHON_BLOCKS = {"data.md", "evidence/README.md"}
# What `sh` is given, and the stage that comes last.
PIPELINES = {
    ("training/runs/atelier.sh", "--runs", "runs/other"): "training.train_user_attention",
    ("training/runs/sd15_pickapic.sh",): "training.evaluation.compare",
    ("training/runs/world.sh", "--set", "atelier.world.unet.steps=9000"): "training.evaluation.world",
    ("training/runs/sdxl.sh", "sdxl_24gb", "--set", "mllm=smolvlm2_2b"): "training.export",
}


WITHOUT_OPTIONS = ("training.atelier.tokenizers", "training.atelier.world.tokenizers")


def blocks(page):
    """[(language, text)] of a page's fences."""
    return re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def lines_of(page):
    """What a page prints as code: fenced lines, with those that a backslash goes on joined, and spans."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    fences = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```\w*\n.*?^```", "", text, flags=re.M | re.S))
    return [line for fence in fences for line in fence.splitlines()] + spans


def python_lines(line):
    """(module or script of the repository, its words) of every `python` in a line of a page or of a shell script."""
    for start in re.finditer(r"\bpython3? (?:-m (?P<module>[\w.]+)|(?P<script>\w[\w/]*\.py))(?P<rest>.*)", line):
        name = start["module"] or start["script"]
        if name.split(".")[0] not in ELSEWHERE:
            yield name, shlex.split(start["rest"].split(" # ")[0].rstrip("`|;"), comments=True)


@cache
def commands():
    """{(module or script, its subcommand): [words of every line that prints it]}."""
    printed = {}
    for page in PAGES:
        for line in lines_of(page):
            for name, words in python_lines(line):
                sub = next((word for word in words if word in SUBCOMMANDS.get(name, ())), "")
                printed.setdefault((name, sub), []).append(words)
    return printed


def started(words, timeout=300, **options):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | options.pop("environment", {})
    environment.pop("PYTHONPATH", None)
    line = [sys.executable, *words]
    options = {"cwd": ROOT, "env": environment} | options
    return subprocess.run(line, capture_output=True, text=True, timeout=timeout, **options)


def lines_to_try(name, sub):
    """Its help, an option that there isn't, and every line that a page prints of a command."""
    lines = [words for words in commands()[name, sub] if not is_a_template(words)]
    return [[*([sub] if sub else []), "--help"], ["--no-such-option"], *lines]


@pytest.fixture(scope="module")
def answers():
    """{command, or a pipeline's words: [(module or script, words, "parsed" or its complaint)]}, all of one process."""
    tried = {command: [(command[0], words) for words in lines_to_try(*command)] for command in commands()}
    tried |= {
        words: [each for line in lines_of_a_pipeline(*words) for each in python_lines(line)] for words in PIPELINES
    }
    every = [line for lines in tried.values() for line in lines]
    ran = started(["tests/scripts/parse_only.py"], timeout=900, input=json.dumps(every))
    assert ran.returncode == 0, ran.stderr[-2000:]
    said = iter(json.loads(ran.stdout.splitlines()[-1]))
    return {key: [(name, words, next(said)) for name, words in lines] for key, lines in tried.items()}


def test_the_pages_print_the_commands_that_we_know_of():
    """The control of the search itself."""
    names = {name for name, _ in commands()}
    assert names >= {
        "training.data.agents",
        "training.train_mllm",
        "training.export",
        "prefgen.download",
        "training.evaluation.study",
    }
    assert ("training.data", "check") in commands() and ("training.evaluation.study", "analyse") in commands()
    assert any("--pictures" in words for words in commands()["training.data.agents", ""]) and len(names) > 20


def is_a_template(words):
    """Whether a page shows a command's form and not a line to type: `run ...`, `--part i/n`."""
    return any(word in ("...", "…") or word.startswith("<") for word in words)


@pytest.mark.slow
@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_a_printed_command_starts_and_reads_the_options_that_it_is_printed_with(command, answers):
    name, sub = command
    (_, _, usage), (_, _, unknown), *outcomes = answers[command]
    # bitsandbytes, where it is installed, says on import what it has no kernels for.
    assert re.match(r"exit (0|None): (.*\n)*?.*usage:", usage), usage
    hands_on = name == "scripts/any_cpu.py"  # to pytest
    assert unknown.startswith("exit 2: ") or hands_on, "the control: an option that there isn't"
    complaints = [
        (words, said)
        for _, words, said in outcomes
        # A page may name a command without what it must be given: `python -m training.extract`.
        if said != "parsed" and not (words in ([], [sub]) and "required" in said)
    ]
    assert complaints == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "bench",
    sorted({p.name for p in (ROOT / "benchmarks").glob("*.py")} - {Path(name).name for name, _ in commands()}),
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
    ran = started(["benchmarks/branch_cost.py", "sd15"], environment={"PREFGEN_NEIGHBOURS": str(tmp_path)})
    assert "all is there" in ran.stderr, ran.stderr[-2000:]


def lines_of_a_pipeline(*words):
    """The command lines that a script of training/runs would run, by `echo` in Python's place."""
    environment = os.environ | {"PYTHON": "echo python", "LAUNCH": "echo python"}
    ran = subprocess.run(["sh", *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return [line for line in ran.stdout.splitlines() if line.startswith("python ")]


@pytest.mark.slow
@pytest.mark.parametrize("words", PIPELINES, ids=["atelier", "sd15_pickapic", "world", "sdxl"])
def test_a_pipeline_on_one_page_gives_every_stage_options_that_it_reads(words, answers):
    stages = answers[words]
    assert len(stages) > 8 and stages[-1][0] == PIPELINES[words]
    complaints = [stage for stage in stages if stage[-1] != "parsed"]
    assert complaints in ([], *([(name, [], "reads no options")] for name in WITHOUT_OPTIONS))


def test_the_shipped_base_takes_other_stages_of_the_atelier():
    environment = os.environ | {"PYTHON": "echo python", "BASE": "shipped"}
    line = ["sh", "training/runs/atelier.sh"]
    said = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    assert "atelier.unet" not in said and "training.train_mllm --start-from prefgen/atelier/weights" in said


def test_a_launcher_is_given_a_configuration_that_exists_and_a_stage():
    launched = [line for page in PAGES for line in lines_of(page) if "accelerate launch" in line]
    assert launched
    for line in launched:
        (path,) = re.findall(r"--config_file ([\w/.-]+)", line)
        assert yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))["distributed_type"]
        for module in re.findall(r" -m (training\.\w+)", line):
            assert (ROOT / (module.replace(".", "/") + ".py")).exists()


def test_every_line_of_a_shell_block_is_of_a_program_that_is_looked_at_here():
    for page in PAGES:
        if page.name in OTHER_BLOCKS:
            assert (ROOT / OTHER_BLOCKS[page.name]).exists()
            continue
        for language, text in blocks(page):
            if language not in ("", "sh") or not re.search(r"^(?:python|make|pip|git|sh|accelerate) ", text, re.M):
                continue  # a drawing or a file
            for line in text.replace("\\\n", " ").splitlines():
                words = [word for word in shlex.split(line, comments=True) if not re.match(r"[A-Z_]+=", word)]
                assert not words or words[0] in PROGRAMS | {"python"}, f"{page.name}: {line}"


@pytest.mark.slow
def test_the_pages_own_python_runs_and_prints_what_the_page_says(tmp_path):
    """With a small data set where the pages have a large one."""
    pages = {page: [text for language, text in blocks(page) if language == "python"] for page in PAGES}
    pages = {page.relative_to(ROOT / "docs").as_posix(): texts for page, texts in pages.items() if texts}
    assert pages.keys() - OTHER_BLOCKS.keys() == PYTHON_BLOCKS
    agents = started(["-m", "training.data.agents", str(tmp_path / "data/agents"), "--users", "12", "--processes", "1"])
    assert agents.returncode == 0, agents.stderr[-2000:]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for name in PYTHON_BLOCKS:
        for text in pages[name]:
            line = [sys.executable, "-c", text]
            ran = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
            assert ran.returncode == 0, ran.stderr[-2000:]
            for said in re.findall(r"^print\(.*\)  # (.*)$", text, re.M):
                assert said in ran.stdout


def test_the_extras_that_are_installed_are_declared():
    declared = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M))
    said = {
        extra for page in PAGES for line in lines_of(page) for extra in re.findall(r'pip install -e "\.\[(\w+)', line)
    }
    assert said and said <= declared


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
    shipped = {path.stem for path in (ROOT / "training/configs").rglob("*.yaml")}
    for page in PAGES:
        for line in lines_of(page):
            for name in re.findall(r"--config (\S+)", line):
                assert name in shipped or name.endswith(".yaml") or name.startswith(("<", "NAME")), (
                    f"{page.name}: {line}"
                )
