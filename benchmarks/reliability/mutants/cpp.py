"""Mutants of a C++ source, by its words: clang-format puts blanks around operators of two sides
and none around the brackets of templates, which tells them apart without a parser."""

from __future__ import annotations

import re
from collections.abc import Iterator

from benchmarks.reliability.mutants.mutant import Mutant, at

SIGNS = {
    "<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "+": "-", "-": "+",
    "*": "/", "/": "*", "%": "+", "&&": "||", "||": "&&", "+=": "-=", "-=": "+=", "*=": "/=",
    "/=": "*=", "<<": ">>", ">>": "<<", "&": "|", "|": "&",
}  # fmt: skip
HIDDEN = re.compile(
    r"""//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'|^[ \t]*\#(?:[^\n]*\\\n)*[^\n]*"""
    r"""|\bstatic_assert\([^;]*;|\btemplate <[^\n]*""",
    re.S | re.M,
)
"""Comments, texts, directives, and what only the compiler judges."""
SIGN = re.compile(r"(?<=\s)(?:[-+*/]=?|%|<<|>>|<=?|>=?|[!=]=|&&?|\|\|?)(?=\s)")
NUMBER = re.compile(r"(?<![\w.])(\d+\.\d*|\d+)(?=f?\b|f?[^\w.])")
CONDITION = re.compile(r"\bif (?:constexpr )?\(")
NEGATION = re.compile(r"(?<![\w)\]])!(?=[\w(])")
STATEMENT = re.compile(
    r"^[ \t]*([\w.\[\]>:-]+ [-+*/|&]?= [^;{}\n]*;|[a-z][\w.:>-]*\([^;{}\n]*\);)$", re.M
)
LEFT_IN = re.compile(r"\s*(?:return|delete|throw)\b")


def mutants(file: str, text: str) -> Iterator[Mutant]:
    """Operators, constants, conditions and statements changed."""
    seen = HIDDEN.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)
    for found in SIGN.finditer(seen):
        yield at(file, text, *found.span(), SIGNS[found[0]])
    for found in NUMBER.finditer(seen):
        new = f"{float(found[0]) + 1}" if "." in found[0] else str(int(found[0]) + 1)
        yield at(file, text, *found.span(1), new)
    for found in CONDITION.finditer(seen):
        end = _closing(seen, found.end())
        for new in ("true", "false"):
            yield at(file, text, found.end(), end, new)
    for found in NEGATION.finditer(seen):
        yield at(file, text, *found.span(), "")
    for found in STATEMENT.finditer(seen):
        if not LEFT_IN.match(found[0]):
            yield at(file, text, *found.span(1), ";")


def _closing(text: str, start: int) -> int:
    """Where the bracket that was opened before `start` is closed."""
    depth = 1
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if not depth:
            return place
    raise ValueError("a bracket that is not closed")
