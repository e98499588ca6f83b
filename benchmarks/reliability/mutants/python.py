"""Mutants of a Python source, by its syntax tree: text around the change stays as it is."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from itertools import pairwise

from benchmarks.reliability.mutants.mutant import Mutant, at

COMPARED: dict[type[ast.cmpop], tuple[str, str]] = {
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"), ast.In: ("in", "not in"), ast.NotIn: ("not in", "in"),
}  # fmt: skip
COMPUTED: dict[type[ast.operator], tuple[str, str]] = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"), ast.Mod: ("%", "+"), ast.Pow: ("**", "*"),
    ast.LShift: ("<<", ">>"), ast.RShift: (">>", "<<"), ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"), ast.BitXor: ("^", "&"),
}  # fmt: skip
JOINED: dict[type[ast.boolop], tuple[str, str]] = {ast.And: ("and", "or"), ast.Or: ("or", "and")}


def mutants(file: str, text: str) -> Iterator[Mutant]:
    """Comparisons, operators, constants, conditions, returned values and statements changed."""
    places = _Places(text)
    for node in _behaviour(ast.parse(text)):
        for kind, change in CHANGES.items():
            if isinstance(node, kind):
                for start, end, new in change(node, places):
                    if text[start:end] != new:
                        yield at(file, text, start, end, new)


class _Places:
    """Characters of the text at the lines and bytes of its tree."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.lines = text.splitlines(keepends=True)
        self.starts = [0]
        for line in self.lines:
            self.starts.append(self.starts[-1] + len(line))

    def _at(self, line: int, column: int) -> int:
        return self.starts[line - 1] + len(self.lines[line - 1].encode()[:column].decode())

    def start(self, node: ast.expr | ast.stmt) -> int:
        return self._at(node.lineno, node.col_offset)

    def end(self, node: ast.expr | ast.stmt) -> int:
        assert node.end_lineno is not None and node.end_col_offset is not None
        return self._at(node.end_lineno, node.end_col_offset)

    def between(self, left: ast.expr, right: ast.expr, sign: str) -> tuple[int, int]:
        """Where the sign stands between two operands, beside brackets and comments."""
        first, last = self.end(left), self.start(right)
        plain = re.sub(r"#[^\n]*", lambda found: " " * len(found[0]), self.text[first:last])
        found = re.search(re.escape(sign).replace(r"\ ", r"\s+"), plain)
        assert found is not None, (sign, plain)
        return first + found.start(), first + found.end()


Change = tuple[int, int, str]


def _compare(node: ast.Compare, places: _Places) -> Iterator[Change]:
    for (left, right), sign in zip(pairwise([node.left, *node.comparators]), node.ops, strict=True):
        old, new = COMPARED[type(sign)]
        yield *places.between(left, right, old), new


def _operator(node: ast.BinOp, places: _Places) -> Iterator[Change]:
    if type(node.op) in COMPUTED:
        old, new = COMPUTED[type(node.op)]
        yield *places.between(node.left, node.right, old), new


def _augmented(node: ast.AugAssign, places: _Places) -> Iterator[Change]:
    if type(node.op) in COMPUTED:
        old, new = COMPUTED[type(node.op)]
        yield *places.between(node.target, node.value, f"{old}="), f"{new}="
    yield from _deleted(node, places)


def _joined(node: ast.BoolOp, places: _Places) -> Iterator[Change]:
    old, new = JOINED[type(node.op)]
    for left, right in pairwise(node.values):
        yield *places.between(left, right, old), new


def _negated(node: ast.UnaryOp, places: _Places) -> Iterator[Change]:
    if not isinstance(node.op, ast.UAdd):
        start = places.start(node)
        yield start, start + (3 if isinstance(node.op, ast.Not) else 1), ""


def _constant(node: ast.Constant, places: _Places) -> Iterator[Change]:
    span = places.start(node), places.end(node)
    if isinstance(node.value, bool):
        yield *span, str(not node.value)
    elif isinstance(node.value, (int, float)):
        yield *span, repr(node.value + 1)


def _returned(node: ast.Return, places: _Places) -> Iterator[Change]:
    if node.value is not None and not _is_none(node.value):
        yield places.start(node), places.end(node), "return None"


def _condition(node: ast.If | ast.IfExp, places: _Places) -> Iterator[Change]:
    for new in ("True", "False"):
        yield places.start(node.test), places.end(node.test), new


def _chosen(node: ast.comprehension, places: _Places) -> Iterator[Change]:
    for test in node.ifs:
        yield places.start(test), places.end(test), "True"


def _deleted(node: ast.stmt, places: _Places) -> Iterator[Change]:
    yield places.start(node), places.end(node), "pass"


def _called(node: ast.Expr, places: _Places) -> Iterator[Change]:
    if isinstance(node.value, ast.Call):
        yield from _deleted(node, places)


def _assigned(node: ast.Assign, places: _Places) -> Iterator[Change]:
    """Without a name's first value the next line fails: only those of fields and elements go."""
    if any(isinstance(target, (ast.Attribute, ast.Subscript)) for target in node.targets):
        yield from _deleted(node, places)


CHANGES: dict[type | tuple[type, ...], Callable[..., Iterator[Change]]] = {
    ast.Compare: _compare,
    ast.BinOp: _operator,
    ast.AugAssign: _augmented,
    ast.BoolOp: _joined,
    ast.UnaryOp: _negated,
    ast.Constant: _constant,
    ast.Return: _returned,
    (ast.If, ast.IfExp): _condition,
    ast.comprehension: _chosen,
    ast.Expr: _called,
    ast.Assign: _assigned,
    (ast.Raise, ast.Break, ast.Continue): _deleted,
}


def _behaviour(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that do something: no annotation, no assertion, nothing for type checkers, no
    field of an f-string, whose places Python below 3.12 does not know."""
    yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list") or _is_typing(node):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not isinstance(child, (ast.JoinedStr, ast.Assert)):
                yield from _behaviour(child)


def _is_typing(node: ast.AST) -> bool:
    """`if TYPE_CHECKING`, and a type that is given a name."""
    if isinstance(node, ast.If):
        return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    return isinstance(node, ast.Subscript) and _name(node.value) in ("Annotated", "Literal")


def _name(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else getattr(node, "attr", "")


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None
