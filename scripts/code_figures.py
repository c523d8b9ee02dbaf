"""How the code reads, in figures: sizes, comments, docstrings, branches, names and packed assignments.

    python scripts/code_figures.py                    this repository, by package, and what lies beyond its limits
    python scripts/code_figures.py --beside ~/nanochat ~/open_clip    the same table for other checkouts
    python scripts/code_figures.py --limits           what lies beyond the limits alone, as `make lint` runs it

Ends with 1 where this repository goes beyond a limit. Schemas of nodes and writers of pages are long because what they
list is long: NO_LIMIT names them.
"""

from __future__ import annotations

import argparse
import ast
import io
import statistics
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("nodes", "prefgen", "training", "scripts", "benchmarks")
MAX_FUNCTION_LINES = 60
MAX_BRANCHES = 15
MAX_MODULE_LINES = 450
MAX_PACKED_PER_1000_LINES = 2.0
# Participles that say nothing of the thing they name.
EMPTY_NAMES = {"found", "held", "kept", "known", "made", "told", "given", "whole"}
NO_LIMIT = {"define_schema"}
PAGE_WRITERS = ("page.py", "report.py", "atelier_report.py", "card.py")

BRANCHES = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.IfExp, ast.BoolOp, ast.comprehension, ast.ExceptHandler)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass
class Function:
    """One function. lines: from `def` to its end; branches: of its own, those of functions inside it apart."""

    file: str
    name: str
    lines: int
    branches: int


@dataclass
class Figures:
    """What was counted in some files."""

    lines: list[int] = field(default_factory=list)
    functions: list[Function] = field(default_factory=list)
    statements: int = 0
    comments: int = 0
    public: int = 0
    documented: int = 0
    packed: list[str] = field(default_factory=list)
    empty_names: list[str] = field(default_factory=list)
    long_modules: list[str] = field(default_factory=list)

    def read(self, path: Path, label: str) -> None:
        """Count one file."""
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        length = text.count("\n")
        self.lines.append(length)
        if length > MAX_MODULE_LINES:
            self.long_modules.append(f"{label}: {length} lines")
        self.comments += sum(1 for _ in own_line_comments(text))
        for node in ast.walk(tree):
            self._read_node(node, label)

    def _read_node(self, node: ast.AST, label: str) -> None:
        self.statements += isinstance(node, ast.stmt)
        if isinstance(node, FUNCTIONS):
            branches = sum(isinstance(inner, BRANCHES) for inner in own_nodes(node))
            self.functions.append(Function(label, node.name, node.end_lineno - node.lineno + 1, branches))
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and not node.name.startswith("_"):
            self.public += 1
            self.documented += ast.get_docstring(node) is not None
        if is_packed(node):
            self.packed.append(f"{label}:{node.lineno}")
        name = defined_name(node)
        if name in EMPTY_NAMES:
            self.empty_names.append(f"{label}:{node.lineno} {name}")

    def row(self) -> list[str]:
        """The cells of one row of the table."""
        lengths = sorted(function.lines for function in self.functions)
        total = sum(self.lines)
        return [
            str(len(self.lines)),
            f"{statistics.median(self.lines):.0f} / {max(self.lines)}",
            f"{statistics.median(lengths):.0f} / {lengths[int(0.9 * len(lengths))]} / {lengths[-1]}",
            f"{100 * self.comments / total:.1f}",
            f"{100 * self.documented / max(1, self.public):.0f} %",
            f"{1000 * len(self.packed) / total:.1f}",
            f"{self.statements:,}",
        ]


HEAD = (
    "files",
    "median / longest file",
    "function: median / p90 / longest",
    "own-line comments per 100",
    "public docstrings",
    "packed assignments per 1,000",
    "statements",
)


def own_line_comments(text: str) -> Iterator[str]:
    """Comments that stand on lines of their own."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and not token.line[: token.start[1]].strip():
            yield token.string


def own_nodes(function: ast.AST) -> Iterator[ast.AST]:
    """Every node of a function but those of the functions inside it."""
    for child in ast.iter_child_nodes(function):
        if not isinstance(child, FUNCTIONS):
            yield child
            yield from own_nodes(child)


def is_packed(node: ast.AST) -> bool:
    """Whether an assignment puts several values, written out, into several names: `a, b = 1, "x"`. A swap isn't one."""
    if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple):
        return False
    target = node.targets[0]
    if not isinstance(target, ast.Tuple) or len(target.elts) != len(node.value.elts):
        return False
    return {ast.dump(each).replace("Store", "Load") for each in target.elts} != {
        ast.dump(each) for each in node.value.elts
    }


def defined_name(node: ast.AST) -> str:
    """The name that a node defines, or ""."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return node.id
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        return node.attr
    if isinstance(node, ast.arg):
        return node.arg
    return node.name if isinstance(node, (*FUNCTIONS, ast.ClassDef)) else ""


def beyond_limits(figures: Figures) -> Iterator[str]:
    """One line for everything that goes beyond a limit."""
    for function in figures.functions:
        if function.name in NO_LIMIT or function.file.endswith(PAGE_WRITERS):
            continue
        if function.lines > MAX_FUNCTION_LINES:
            yield f"{function.file} {function.name}: {function.lines} lines"
        if function.branches > MAX_BRANCHES:
            yield f"{function.file} {function.name}: {function.branches} branches"
    yield from figures.long_modules
    yield from figures.empty_names
    if 1000 * len(figures.packed) > MAX_PACKED_PER_1000_LINES * sum(figures.lines):
        yield from (f"{place} packed assignment" for place in figures.packed)


def tracked(root: Path, package: str = "") -> list[str]:
    """The Python files of a checkout that git tracks, below a package or all but the tests; without git, ours."""
    if not (root / ".git").exists():
        folders = [package] if package else PACKAGES
        return sorted(path.relative_to(root).as_posix() for each in folders for path in (root / each).rglob("*.py"))
    listed = subprocess.run(
        ["git", "ls-files", "--", f"{package}/*.py" if package else "*.py"],
        cwd=root,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    return [file for file in listed if not file.startswith("tests/") and (root / file).stat().st_size]


def counted(root: Path, files: list[str]) -> Figures:
    """The figures of some files of a checkout."""
    figures = Figures()
    for file in files:
        figures.read(root / file, file)
    return figures


def print_table(everything: Figures, beside: list[Path]) -> None:
    """The figures of every package, of the whole repository and of other checkouts."""
    print("| |", " | ".join(HEAD), "|")
    print("| ---" * (len(HEAD) + 1) + " |")
    for package in PACKAGES:
        print(f"| {package} |", " | ".join(counted(ROOT, tracked(ROOT, package)).row()), "|")
    print("| all of PrefGen |", " | ".join(everything.row()), "|")
    for checkout in beside:
        print(f"| {checkout.name} |", " | ".join(counted(checkout, tracked(checkout)).row()), "|")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beside", type=Path, nargs="+", default=[], metavar="CHECKOUT")
    parser.add_argument("--limits", action="store_true")
    args = parser.parse_args()
    everything = counted(ROOT, tracked(ROOT))
    if not args.limits:
        print_table(everything, args.beside)
    faults = list(beyond_limits(everything))
    print(*faults, sep="\n", end="\n" if faults else "")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
