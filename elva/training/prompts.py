"""A step's prompts: this process's share of its queries and candidates, known a step ahead.

What a step compares is drawn by (seed, step) alone, so that the next step's pictures can be cut
while this one computes. Only a step that mines anew first cannot be known before.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from elva.data import Item
from elva.errors import UserError
from elva.model.inputs import Inputs
from elva.model.prompt import Prompt
from elva.processes import Processes
from elva.recipe import StageConfig
from elva.training.comparison import Comparison, compare
from elva.training.examples import Examples
from elva.training.negatives import Negatives
from elva.training.plan import Batch


@dataclass(frozen=True)
class StepPrompts:
    """Prompts are this process's queries, then, where the stage embeds, its candidates of those
    that are rolled out."""

    comparison: Comparison
    asks: range  # of the step's queries
    shows: range  # of its candidates
    prompts: list[Prompt]
    places: list[int]  # of the prompts among the step's, queries first
    everyone: int  # the step's prompts
    captioned: list[Item]  # the candidate that each prompt's summary should be like
    spare: bool  # a prompt that is nobody's, where there are fewer than processes


class Prompts:
    """Works out the prompts of each step, once."""

    def __init__(
        self, stage: StageConfig, examples: Examples, negatives: Negatives, inputs: Inputs,
        processes: Processes, seed: Sequence[int | str],
    ) -> None:  # fmt: skip
        self.stage, self.examples, self.negatives = stage, examples, negatives
        self.inputs, self.processes, self.seed = inputs, processes, tuple(seed)
        self._known: tuple[int, StepPrompts] | None = None

    def of(self, batch: Batch) -> StepPrompts:
        """Those of a step, whose negatives are mined."""
        known, self._known = self._known, None
        return known[1] if known is not None and known[0] == batch.step else self._made(batch)

    def ahead(self, batch: Batch) -> list[Prompt]:
        """Those of the next step, for `of` to give then; none that cannot be known yet."""
        if self.negatives.due(batch.step):
            return []
        try:
            self._known = batch.step, self._made(batch)
        except UserError:  # what is wrong with a step is said when it is its turn
            return []
        return self._known[1].prompts

    def _made(self, batch: Batch) -> StepPrompts:
        stage, examples, share = self.stage, self.examples, self.processes.share
        own, sources = self.negatives.of(batch)
        found = compare(stage, examples, batch, own, sources, self.seed)
        asks = share(len(found.queries))
        shows = share(found.rolled) if stage.embeds else range(0)
        items: list[Item] = [found.queries[i] for i in asks]
        answers = [examples.candidates[int(found.candidates[t[0]])] for t in found.target]
        captioned = [answers[i] for i in asks]
        rolled = [examples.candidates[int(found.candidates[i])] for i in shows]
        items += rolled
        captioned += rolled
        asked = len(found.queries)
        places = [*asks, *(asked + i for i in shows)]
        spare = not items  # it takes part in every exchange all the same
        if spare:
            items, captioned, places = [found.queries[0]], [answers[0]], [0]
        prompts = [self.inputs.prompt(item) for item in items]
        everyone = asked + (found.rolled if stage.embeds else 0)
        return StepPrompts(found, asks, shows, prompts, places, everyone, captioned, spare)
