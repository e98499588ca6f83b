"""A trial: a mutant, and whether a test finds it that passes without it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

from benchmarks.reliability.mutants import compiled, workshop
from benchmarks.reliability.mutants.equivalent import EQUIVALENT
from benchmarks.reliability.mutants.mutant import Mutant, shuffled
from benchmarks.reliability.mutants.suites import Suite
from benchmarks.reliability.mutants.workshop import Workshop
from benchmarks.reliability.row import Outcome, Trials

GOAL = 0.9
"""Of the mutants that are not equivalent, the killed."""


def trials(wanted: Trials, *, suites: tuple[Suite, ...]) -> Outcome:
    """Mutants, and one line in `wrong` where none of them is killed."""
    drawn, outcome = sample(suites, wanted.seed), Outcome()
    outcome.measured("mutants", len(drawn))
    with workshop.opened() as shop:
        judge = Judge(shop)
        for suite, mutant in drawn[wanted.first : wanted.first + wanted.count]:
            outcome.tried += 1
            ended, said = judge.verdict(suite, mutant)
            outcome.counts[ended] += 1
            if ended == "unsound":
                outcome.wrong.append(said)
            elif said:
                outcome.noted.append(said)
    outcome.wrong += unnoticed(outcome, wanted)
    return outcome


def unnoticed(outcome: Outcome, wanted: Trials) -> list[str]:
    """A line where the tests notice none; a share below the goal is what the table says of it."""
    killed, judged = share(outcome.counts)
    if killed or not judged:
        return []
    last = wanted.first + wanted.count - 1
    return [
        f"none of {judged} mutants killed, numbers {wanted.first} to {last} of seed {wanted.seed}"
    ]


def share(counts: dict[str, int]) -> tuple[int, int]:
    """The killed, and those of which a test can be asked."""
    killed = counts.get("killed", 0) + counts.get("timed out", 0)
    return killed, killed + counts.get("survived", 0)


@cache
def sample(suites: tuple[Suite, ...], seed: int) -> list[tuple[Suite, Mutant]]:
    """All mutants in the order of the trials."""
    of = {source: suite for suite in suites for source in suite.sources}
    found = shuffled((mutant for suite in suites for mutant in suite.mutants()), seed)
    return [(of[mutant.file], mutant) for mutant in found]


class Judge:
    """Verdicts in one workshop."""

    def __init__(self, shop: Workshop) -> None:
        self.shop = shop
        self._sound: set[str] = set()

    def verdict(self, suite: Suite, mutant: Mutant) -> tuple[str, str]:
        """killed, timed out, survived, equivalent, not compiled or unsound; and words of it."""
        if mutant.key in EQUIVALENT:
            return "equivalent", f"equivalent: {mutant}: {EQUIVALENT[mutant.key]}"
        with self.shop.mutated(mutant), self._built(mutant) as built:
            if not built:
                return "not compiled", ""
            answer = self.shop.run(suite, suite.words(mutant))
        if answer["end"] == "passed":
            return "survived", f"survived: {mutant}"
        if not self._is_sound(suite, suite.words(mutant), answer["test"]):
            return "unsound", f"{mutant}: {answer['test'] or 'pytest'} fails without it too"
        return ("timed out" if answer["end"] == "timed out" else "killed"), ""

    @contextmanager
    def _built(self, mutant: Mutant) -> Iterator[bool]:
        if mutant.file.endswith(".py"):
            yield True
            return
        with compiled.linked(mutant.file, self.shop.tree) as built:
            yield built

    def _is_sound(self, suite: Suite, words: Sequence[str], test: str) -> bool:
        """Whether the test passes without a mutant; where none was begun, whether all are found."""
        asked = [test] if "::" in test else ["--collect-only", *words]
        known = " ".join(asked)
        if known not in self._sound and self.shop.run(suite, asked)["end"] == "passed":
            self._sound.add(known)
        return known in self._sound
