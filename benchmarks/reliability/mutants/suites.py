"""Which tests judge the mutants of which sources."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from benchmarks.reliability.mutants import python
from benchmarks.reliability.mutants.mutant import Mutant, read
from benchmarks.reliability.mutants.workshop import ROOT


@dataclass(frozen=True, eq=False)
class Suite:
    """Sources and their tests.

    Args:
        tests: a source or several by a pattern -> files of tests, the quickest first. A source is
            its first pattern's.
        made: how its mutants are.
        env: of the tests' process.
        left_out: tests that are long, or of programs that are started.
        without: fixtures whose tests are left out.
        seconds: of CPU, ours: about five times what the longest list takes.
    """

    tests: Mapping[str, tuple[str, ...]]
    made: Callable[[str, str], Iterator[Mutant]] = python.mutants
    env: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    seconds: float = 120

    @cached_property
    def sources(self) -> dict[str, tuple[str, ...]]:
        """Source -> its tests."""
        found: dict[str, tuple[str, ...]] = {}
        for pattern, tests in self.tests.items():
            for path in sorted(ROOT.glob(pattern)):
                found.setdefault(path.relative_to(ROOT).as_posix(), tests)
        return found

    def mutants(self) -> Iterator[Mutant]:
        for source in self.sources:
            yield from self.made(source, read(ROOT, source))

    def words(self, mutant: Mutant) -> list[str]:
        """pytest's arguments for a mutant."""
        left_out = [word for test in self.left_out for word in ("--deselect", test)]
        return [*self.sources[mutant.file], *left_out]


def _files(room: str, names: str) -> tuple[str, ...]:
    return tuple(f"tests/{room}/test_{name}.py" for name in names.split())


PROGRAMS = ("start", "finished", "training", "browser", "recipe_file", "released", "corpus")
"""Fixtures that start a program, train a model or draw a corpus."""

INDEX = Suite(
    {
        "elva/index/codes.py": _files("elva", "index_codes index index_forged"),
        "elva/index/compact.py": _files("elva", "index_compact index_codes"),
        "elva/index/fields.py": _files("elva", "index_sync folder_index"),
        "elva/index/folder.py": _files("elva", "folder_index index_sync"),
        "elva/index/embeddings.py": _files("elva", "index_forged embed_and_search"),
        "elva/index/engines/milvus.py": _files("elva", "index_engines"),
        "elva/index/engines/*.py": _files("elva", "index_engines"),
        "elva/index/stream.py": _files("elva", "index index_forged index_compact"),
        "elva/index/*.py": _files(
            "elva", "index index_promises index_codes index_compact index_forged"
        ),
    },
    left_out=(
        "tests/elva/test_index_promises.py::test_of_many_builds_at_once_one_wins_and_readers_see_a_whole_index",
        "tests/elva/test_index_compact.py::test_memory_is_bounded",
        "tests/elva/test_index_sync.py::test_the_command_says_what_is_done",
    ),
    without=PROGRAMS,
)
