"""Which small changes there are to a file's code: one operator, constant, condition or call at a time.

Annotations, docstrings, imports, decorators, f-strings, messages of errors and `__main__` are left alone. What is
changed stands in the source as text: the rest of the file keeps its bytes.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ARITHMETIC = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
COMPARISON = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
OPPOSITE = {
    "min": "max",
    "max": "min",
    "amin": "amax",
    "amax": "amin",
    "argmin": "argmax",
    "argmax": "argmin",
    "clamp_min": "clamp_max",
    "clamp_max": "clamp_min",
    "any": "all",
    "all": "any",
    "floor": "ceil",
    "ceil": "floor",
    "sum": "mean",
    "mean": "sum",
}
DROPPED_METHODS = {"detach", "float", "double", "clone", "copy", "eval", "strip", "lower", "resolve", "sort", "sqrt"}


@dataclass(frozen=True)
class Mutation:
    """One change: `before` at `line` of `file` becomes `after`. `occurrence` tells equal ones of one function apart."""

    file: str
    function: str
    operator: str
    before: str
    after: str
    occurrence: int
    line: int

    @property
    def id(self) -> str:
        """The same while the change itself is, wherever its lines move."""
        words = (self.file, self.function, self.operator, self.before, self.after, str(self.occurrence))
        return hashlib.sha256("\0".join(words).encode()).hexdigest()[:8]


class Source:
    """One file's text and the mutations that it offers."""

    def __init__(self, root: Path, file: str):
        self.file = file
        self.text = (root / file).read_bytes()
        self._starts = [0]
        for line in self.text.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))
        # Bytes [start, end) of what is replaced, and the first and last line of the statement around it.
        self.spans: dict[Mutation, tuple[int, int]] = {}
        self.statements: dict[Mutation, tuple[int, int]] = {}
        self._seen: Counter = Counter()
        self._visit(ast.parse(self.text), "", (1, 1))

    def find(self, identity: str) -> Mutation | None:
        """The mutation of that id, where it lies now; None where the file no longer offers it."""
        return next((m for m in self.spans if m.id == identity), None)

    def mutated(self, mutation: Mutation) -> bytes:
        """The file's text with one of its mutations."""
        start, end = self.spans[mutation]
        return self.text[:start] + mutation.after.encode() + self.text[end:]

    def _visit(self, node: ast.AST, function: str, statement: tuple[int, int]) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            function = f"{function}.{node.name}".lstrip(".")
        if isinstance(node, ast.stmt):
            body = getattr(node, "body", None)
            statement = (node.lineno, max(node.lineno, body[0].lineno - 1) if body else node.end_lineno)
        for operator, target, after in mutations(node):
            self._offer(operator, target, after, function, statement)
        for child in _children(node):
            self._visit(child, function, statement)

    def _offer(self, operator: str, target: ast.AST, after: str, function: str, statement: tuple[int, int]) -> None:
        start = self._starts[target.lineno - 1] + target.col_offset
        end = self._starts[target.end_lineno - 1] + target.end_col_offset
        before = self.text[start:end].decode()
        words = (self.file, function, operator, before, after)
        mutation = Mutation(*words, self._seen[words], target.lineno)
        self.spans[mutation] = (start, end)
        self.statements[mutation] = statement
        self._seen[words] += 1


def _children(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes below that may change: no annotations, docstrings, imports, decorators, f-strings or error messages."""
    if isinstance(node, ast.JoinedStr | ast.Raise | ast.Import | ast.ImportFrom | ast.Assert):
        return
    if _starts_the_module(node):
        return
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "bases"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield child


def _starts_the_module(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "__name__" in ast.dump(node.test)


def mutations(node: ast.AST) -> Iterator[tuple[str, ast.AST, str]]:
    """(operator, node to replace, its new text) of one node itself, nodes below left alone."""
    if _starts_the_module(node):
        return
    match node:
        case ast.BinOp() if type(node.op) in ARITHMETIC:
            yield "arithmetic", node, _with(node, op=ARITHMETIC[type(node.op)]())
        case ast.AugAssign() if type(node.op) in ARITHMETIC:
            yield "arithmetic", node, _with(node, op=ARITHMETIC[type(node.op)]())[1:-1]
            yield "dropped statement", node, "pass"
        case ast.Compare():
            for place, op in enumerate(node.ops):
                ops = [*node.ops[:place], COMPARISON[type(op)](), *node.ops[place + 1 :]]
                yield "comparison", node, _with(node, ops=ops)
        case ast.BoolOp():
            yield "boolean", node, _with(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
        case ast.UnaryOp(op=ast.Not()):
            yield "boolean", node, f"({ast.unparse(node.operand)})"
        case ast.If() | ast.While() | ast.IfExp():
            yield "negated condition", node.test, f"(not ({ast.unparse(node.test)}))"
        case ast.comprehension():
            for test in node.ifs:
                yield "negated condition", test, f"(not ({ast.unparse(test)}))"
        case ast.Constant():
            yield from _constants(node)
        case ast.Slice():
            yield from _slices(node)
        case ast.Subscript(slice=ast.Constant(value=str(key))):
            yield "string key", node.slice, repr(f"{key}_")
        case ast.Dict():
            for key in node.keys:
                if isinstance(key, ast.Constant) and isinstance(key.value, str):
                    yield "string key", key, repr(f"{key.value}_")
        case ast.Call():
            yield from _calls(node)
        case ast.Expr(value=ast.Call()) | ast.Raise() | ast.Continue() | ast.Break() | ast.Delete():
            yield "dropped statement", node, "pass"
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield "dropped statement", node, "pass"


def _with(node: ast.AST, **fields) -> str:
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return f"({ast.unparse(changed)})"


def _constants(node: ast.Constant) -> Iterator[tuple[str, ast.AST, str]]:
    if isinstance(node.value, bool):
        yield "boolean", node, str(not node.value)
    elif isinstance(node.value, int):
        yield "constant", node, str(node.value + 1)
        yield "constant", node, f"({node.value - 1})"
    elif isinstance(node.value, float):
        yield "constant", node, repr(node.value * 0.5 if node.value else 1.0)


def _slices(node: ast.Slice) -> Iterator[tuple[str, ast.AST, str]]:
    """One bound moved by one: a bound that is missing takes its first value off, or its last."""
    for name, missing in (("lower", ast.Constant(1)), ("upper", ast.Constant(-1))):
        bound = getattr(node, name)
        moved = missing if bound is None else ast.BinOp(bound, ast.Add(), ast.Constant(1))
        if bound is None and node.step is not None:
            continue
        yield "slice", node, ast.unparse(ast.Slice(**{**_bounds(node), name: moved}))


def _bounds(node: ast.Slice) -> dict:
    return {"lower": node.lower, "upper": node.upper, "step": node.step}


def _calls(node: ast.Call) -> Iterator[tuple[str, ast.AST, str]]:
    if len(node.args) > 1:
        first, second, *others = node.args
        starred = isinstance(first, ast.Starred) or isinstance(second, ast.Starred)
        if not starred and ast.dump(first) != ast.dump(second):
            yield "swapped arguments", node, _with(node, args=[second, first, *others])[1:-1]
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if name in OPPOSITE:
        func = copy.copy(node.func)
        setattr(func, "attr" if isinstance(func, ast.Attribute) else "id", OPPOSITE[name])
        yield "min and max", node, _with(node, func=func)[1:-1]
    if name in DROPPED_METHODS and isinstance(node.func, ast.Attribute) and not node.args:
        yield "dropped call", node, f"({ast.unparse(node.func.value)})"
    if name == "get" and node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
        yield "string key", node.args[0], repr(f"{node.args[0].value}_")


def draw(root: Path, package: str, count: int, seed: int, exclude: list[str]) -> list[Mutation]:
    """`count` mutations of a package: lines drawn evenly among those that offer any, then one of the line's."""
    by_line: dict[tuple[str, int], list[Mutation]] = {}
    for path in sorted((root / package).rglob("*.py")):
        file = path.relative_to(root).as_posix()
        if file not in exclude:
            for mutation in Source(root, file).spans:
                by_line.setdefault((file, mutation.line), []).append(mutation)
    rng = random.Random(f"{package} {seed}")
    lines = rng.sample(sorted(by_line), min(count, len(by_line)))
    return [rng.choice(sorted(by_line[line], key=lambda m: m.id)) for line in lines]
