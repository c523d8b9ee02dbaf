"""Small changes to the code, one at a time, to see which of them the tests notice.

    python -m scripts.mutate map --work /tmp/mutate
    python -m scripts.mutate run --work /tmp/mutate --seed 1 --count prefgen=60 training=40
    python -m scripts.mutate judge --work /tmp/mutate --seed 1 1a2b3c4d equivalent "the fallback gives the same size"
    python -m scripts.mutate table --work /tmp/mutate --seed 1

`map` runs every test file once under coverage.py (processes that it starts are seen too) and writes which lines of the
code it runs. `run` draws changes, weighted by lines, and runs for each the test files that run its line, the quick ones
first. Nothing is changed in the working tree: tests run in a copy of it below --work. What `map` and `run` have done is
on the disk, so that both go on where they were stopped. Linux and macOS (tests run in forks of one warm process).
"""

from __future__ import annotations

import argparse
import ast
import bisect
import contextlib
import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from scripts.mutations import Mutation, Source, draw

ROOT = Path(__file__).resolve().parent.parent
JUDGEMENTS = ("equivalent", "dead", "missing")
# What tests read beside the tracked files.
LINKED = (".venv", ".comfyui")
PRELOADED = ("numpy", "torch", "pytest", "PIL.Image", "safetensors.torch", "transformers", "diffusers")
# Seconds: what one test file may take unchanged, and what one without a record is taken to need.
BASELINE_LIMIT = 1200.0
UNMAPPED = 150.0
# A changed test file may take SLOWER times its time and GRACE seconds more.
SLOWER = 4
GRACE = 60


def make_copy(work: Path) -> Path:
    """A fresh copy of the working tree's files, tracked or not, but ignored ones; `LINKED` are linked."""
    folder = work / "copy"
    shutil.rmtree(folder, ignore_errors=True)
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True).stdout.decode().split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    for name in LINKED:
        if (ROOT / name).exists():
            (folder / name).symlink_to((ROOT / name).resolve())
    return folder


def write(path: Path, text: str) -> None:
    """Write a file through a temporary name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


# --- which tests run which lines ---


def test_files(root: Path) -> list[str]:
    """All test files, in the order of their names."""
    return sorted(p.relative_to(root).as_posix() for p in (root / "tests").rglob("test_*.py"))


def map_tests(work: Path, only: list[str]) -> None:
    """Run each test file that has changed since it was last run, under coverage, and write its lines and seconds."""
    tree = make_copy(work / "map")
    coverage = importlib.import_module("coverage")
    # Python reads this at every start, in the processes that tests start as well.
    folder = str(Path(coverage.__file__).parents[1])
    startup = f"import sys\nsys.path.append({folder!r})\nimport coverage\ncoverage.process_startup()\n"
    (tree / "sitecustomize.py").write_text(startup)
    preload()
    for test in only or test_files(tree):
        record = work / "map" / "records" / f"{test}.json"
        digest = hashlib.sha256((tree / test).read_bytes()).hexdigest()
        if record.exists() and json.loads(record.read_text())["sha256"] == digest:
            continue
        result = covered(tree, test, work / "map" / "last.log")
        write(record, json.dumps({"sha256": digest, **result}))
        lines = sum(len(x) for x in result["lines"].values())
        print(f"{test}: {lines} lines, {result['seconds']} s, {len(result['failed'])} failed", flush=True)


def covered(tree: Path, test: str, log: Path) -> dict:
    """{"seconds", "failed": test ids that fail unchanged, "lines": {file: lines run}} of one test file."""
    with tempfile.TemporaryDirectory() as scratch:
        settings = Path(scratch) / "coveragerc"
        data = Path(scratch) / "data"
        settings.write_text(
            f"[run]\nparallel = true\ndata_file = {data}\nsource = {tree}\nomit = {tree}/tests/*\n"
            "disable_warnings = no-data-collected, module-not-measured\n"
        )
        begun = time.monotonic()
        run_tests(tree, {"test": test, "seconds": BASELINE_LIMIT / SLOWER, "failed": []}, log, settings)
        seconds = time.monotonic() - begun
        summary = (line for line in log.read_text().splitlines() if line.startswith(("FAILED ", "ERROR ")))
        failed = [line.split()[1] for line in summary]
        lines: dict[str, set[int]] = {}
        for part in Path(scratch).glob("data*"):
            _add_lines(part, tree, lines)
    return {"seconds": round(seconds, 1), "failed": failed, "lines": {f: sorted(n) for f, n in sorted(lines.items())}}


def _add_lines(part: Path, tree: Path, lines: dict[str, set[int]]) -> None:
    """Add what one process has run; a process that was killed while it wrote leaves nothing that can be read."""
    coverage = importlib.import_module("coverage")
    data = coverage.CoverageData(basename=str(part))
    with contextlib.suppress(coverage.CoverageException):
        data.read()
        for file in data.measured_files():
            if Path(file).is_relative_to(tree):
                lines.setdefault(Path(file).relative_to(tree).as_posix(), set()).update(data.lines(file) or ())


def tests_of(work: Path, tree: Path, file: str, statement: tuple[int, int]) -> list[dict]:
    """The records of the test files that run one of a statement's lines, first to last: those that are named after the
    file first, then the quick ones. A test file without a record counts where it imports or names the file's module."""
    stem = Path(file).stem.strip("_")
    records = []
    for test in test_files(tree):
        path = work / "map" / "records" / f"{test}.json"
        if path.exists():
            record = json.loads(path.read_text())
            lines = record["lines"].get(file, [])
            place = bisect.bisect_left(lines, statement[0])
            if place < len(lines) and lines[place] <= statement[1]:
                records.append({"test": test, "seconds": record["seconds"], "failed": record["failed"]})
        elif module_of(file) in modules_named(tree / test):
            records.append({"test": test, "seconds": UNMAPPED, "failed": [], "mapped": False})
    return sorted(records, key=lambda r: (stem not in r["test"], r["seconds"]))


def module_of(file: str) -> str:
    """prefgen/mllm/model.py -> prefgen.mllm.model, training/data/vqa/__main__.py -> training.data.vqa."""
    return ".".join(part for part in Path(file).with_suffix("").parts if part not in ("__init__", "__main__"))


def modules_named(test: Path) -> set[str]:
    """Modules that a test file imports, or names in a string as commands do: "data.vqa", "prefgen.branch"."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(test.read_bytes())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update((node.module, *(f"{node.module}.{alias.name}" for alias in node.names)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) < 60:
            names.update((node.value, f"training.{node.value}"))
    return names


# --- one mutation after the other ---

PYTEST = ["-q", "--no-header", "-p", "no:cacheprovider"]


def _environment() -> dict[str, str]:
    """Without byte code: two changes within one second and of one size would share it."""
    fixed = {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return os.environ | fixed | {"HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "0"}


def run_tests(tree: Path, record: dict, log: Path, settings: Path | None = None) -> str:
    """Run one test file in a fork: "passed", "failed" or "timeout". Its output is left in `log`.

    settings: coverage.py's, for a run to the end under it; without them the first failure ends the run.
    """
    warm_up(log.with_suffix(".modules"))
    child = os.fork()
    if child == 0:
        _become_pytest(tree, record, log, settings)
    limit = time.monotonic() + SLOWER * record["seconds"] + GRACE
    while time.monotonic() < limit:
        finished, status = os.waitpid(child, os.WNOHANG)
        if finished:
            return "passed" if os.waitstatus_to_exitcode(status) in (0, 5) else "failed"
        time.sleep(0.05)
    for process in reversed(_descendants(child)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timeout"


def preload() -> None:
    """Import what nearly every test needs, before the first fork."""
    sys.dont_write_bytecode = True
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def warm_up(names: Path) -> None:
    """Import the libraries that the last fork has imported, so that the next ones needn't."""
    for name in names.read_text().split() if names.exists() else ():
        if name not in sys.modules:
            with contextlib.suppress(Exception, SystemExit):
                importlib.import_module(name)


def _libraries() -> list[str]:
    """Names of the modules in this process that are installed packages'."""
    files = {name: getattr(module, "__file__", None) or "" for name, module in list(sys.modules.items())}
    return sorted(n for n, file in files.items() if "site-packages" in file and not n.startswith(("_pytest", "pytest")))


def _become_pytest(tree: Path, record: dict, log: Path, settings: Path | None) -> None:
    """In the fork: never returns."""
    code = 3
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.setsid()
        os.chdir(tree)
        os.environ.update(_environment())
        sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
        # The copy's own scripts are imported, not those that run this.
        for name in [name for name in sys.modules if name.partition(".")[0] == "scripts"]:
            del sys.modules[name]
        sys.argv = ["pytest"]
        words = [*PYTEST, *(word for test in record["failed"] for word in ("--deselect", test)), record["test"]]
        pytest = importlib.import_module("pytest")
        if settings is None:
            code = int(pytest.main(["-x", *words]))
        else:
            os.environ |= {"COVERAGE_PROCESS_START": str(settings), "PYTHONPATH": str(tree)}
            measured = importlib.import_module("coverage").Coverage(config_file=str(settings))
            with measured.collect():
                code = int(pytest.main(words))
            measured.save()
        log.with_suffix(".modules").write_text("\n".join(_libraries()))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _descendants(process: int) -> list[int]:
    processes = [process]
    for parent in processes:
        with contextlib.suppress(OSError):
            processes += map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split())
    return processes


def try_mutation(work: Path, tree: Path, mutation: Mutation, without: Sequence[str] = ()) -> dict:
    """{"outcome": noticed, survived, timeout, "not run" or gone, "by": the test file, "seconds"} of one mutation.

    without: test files that are not run. A timeout counts only where a test file's own time is on record.
    """
    source = Source(tree, mutation.file)
    current = source.find(mutation.id)
    if current is None:
        return {"outcome": "gone", "by": "", "seconds": 0}
    text = source.mutated(current)
    records = tests_of(work, tree, mutation.file, source.statements[current])
    records = [record for record in records if record["test"] not in without]
    begun = time.monotonic()
    outcome = "survived" if records else "not run"
    by = ""
    try:
        (tree / mutation.file).write_bytes(text)
        for record in records:
            result = run_tests(tree, record, work / "last.log")
            if result == "failed" or (result == "timeout" and record.get("mapped", True)):
                outcome = "noticed" if result == "failed" else "timeout"
                by = record["test"]
                break
    finally:
        (tree / mutation.file).write_bytes(source.text)
    return {"outcome": outcome, "by": by, "seconds": round(time.monotonic() - begun, 1)}


class Results:
    """A JSON Lines file: what was drawn, then outcomes and judgements as they come."""

    def __init__(self, path: Path):
        self.path = path
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        self.drawn = {row["id"]: Mutation(**row["mutation"]) for row in rows if "mutation" in row}
        self.outcomes: dict[str, list[dict]] = {}
        self.judged: dict[str, dict] = {}
        for row in rows:
            self._take(row)

    def _take(self, row: dict) -> None:
        if "outcome" in row:
            self.outcomes.setdefault(row["id"], []).append(row)
        if "judged" in row:
            self.judged[row["id"]] = row

    def add(self, row: dict) -> None:
        """Append one row."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self._take(row)

    def draw(self, mutations: list[Mutation]) -> None:
        """Take up what was drawn, once."""
        for mutation in mutations:
            if mutation.id not in self.drawn:
                self.drawn[mutation.id] = mutation
                self.add({"id": mutation.id, "mutation": asdict(mutation)})

    def last(self, identity: str) -> str:
        """The last outcome; "" before the first."""
        return self.outcomes[identity][-1]["outcome"] if identity in self.outcomes else ""


def run(args: argparse.Namespace) -> None:
    """Draw if nothing is drawn yet, then try what has no outcome (with --again also what survived)."""
    results = Results(args.results)
    if not results.drawn:
        for package, count in args.count:
            results.draw(draw(ROOT, package, count, args.seed, args.exclude))
    tree = make_copy(args.work)
    preload()
    open_outcomes = ("", "survived", "timeout", "not run") if args.again else ("",)
    for identity, mutation in results.drawn.items():
        chosen = not args.ids or identity in args.ids
        if chosen and results.last(identity) in open_outcomes and identity not in results.judged:
            result = try_mutation(args.work, tree, mutation, args.without)
            results.add({"id": identity, **result})
            print(f"{identity} {mutation.file}:{mutation.line} {result['outcome']} {result['seconds']} s", flush=True)
    table(results)


def table(results: Results) -> None:
    """Print the share that was noticed, by package, and every survivor."""
    print("| package | drawn | tried | noticed at first | noticed now | equivalent | dead | not noticed | share |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for package in sorted({m.file.split("/")[0] for m in results.drawn.values()}):
        own = [i for i, m in results.drawn.items() if m.file.startswith(f"{package}/")]
        tried = [i for i in own if results.last(i) not in ("", "gone")]
        first = sum(results.outcomes[i][0]["outcome"] in ("noticed", "timeout") for i in tried)
        now = [i for i in tried if results.last(i) in ("noticed", "timeout")]
        rest = [i for i in tried if i not in now]
        kinds = Counter(results.judged[i]["judged"] if i in results.judged else "open" for i in rest)
        counted = len(tried) - kinds["equivalent"] - kinds["dead"]
        share = f"{len(now)} of {counted}" + (f" ({100 * len(now) / counted:.0f} %)" if counted else "")
        columns = [package, len(own), len(tried), first, len(now), kinds["equivalent"], kinds["dead"]]
        print("|", " | ".join(map(str, [*columns, counted - len(now), share])), "|")
    for identity, mutation in results.drawn.items():
        if results.last(identity) not in ("", "noticed", "timeout"):
            judged = results.judged.get(identity, {"judged": "open", "why": ""})
            print(f"\n{identity} {mutation.file}:{mutation.line} {mutation.function} ({results.last(identity)})")
            print(f"  {mutation.operator}: {mutation.before}\n  -> {mutation.after}")
            print(f"  {judged['judged']}: {judged['why']}")


def _count(text: str) -> tuple[str, int]:
    package, _, number = text.partition("=")
    if not (ROOT / package).is_dir() or not number.isdigit():
        raise argparse.ArgumentTypeError(f"{text} isn't PACKAGE=NUMBER, as in prefgen=60")
    return package, int(number)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["map", "run", "judge", "table"])
    parser.add_argument("words", nargs="*", help="map: test files (default: all). judge: id, judgement, reason")
    parser.add_argument("--work", type=Path, required=True, help="folder outside the working tree")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=_count, nargs="+", default=[("prefgen", 60), ("training", 40)])
    parser.add_argument("--exclude", nargs="+", default=[], metavar="FILE", help="files that nothing is drawn from")
    parser.add_argument("--without", nargs="+", default=[], metavar="TEST", help="test files that are not run")
    parser.add_argument("--again", action="store_true", help="try what survived once more")
    parser.add_argument("--ids", nargs="+", default=[], help="these alone")
    args = parser.parse_intermixed_args()
    args.results = args.work / f"seed{args.seed}.jsonl"
    if args.command == "map":
        map_tests(args.work, args.words)
    elif args.command == "run":
        run(args)
    elif args.command == "judge":
        identity, judgement, why = args.words
        if judgement not in JUDGEMENTS:
            parser.error(f"a survivor is {', '.join(JUDGEMENTS)}, not {judgement}")
        Results(args.results).add({"id": identity, "judged": judgement, "why": why})
    else:
        table(Results(args.results))


if __name__ == "__main__":
    main()
