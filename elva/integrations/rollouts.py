"""Rollouts of any trainer as rewards: texts are embedded, then ranked in one call of a kernel."""

import queue
import threading
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from elva.errors import UserError
from elva.integrations.rewards import RECIPES, Candidates, Recipe

EmbedFn = Callable[[list], Any]
"""Embeddings of texts, or of whatever the trainer holds in their place: [n] -> [n, D], a tensor or
an array, floating."""

Parts = dict[str, list[float | None]]
"""`reward` and its parts, each a number a rollout; None where there was nothing to rank."""

_MOST_TOGETHER = 512
"""Ours: rollouts that `Together` scores at once; as many as a step of the paper has."""


class RolloutReward:
    """A reward of rollouts by what their embeddings rank.

    Candidates are texts, embedded with each batch, or rows of `bank`. A text that occurs several
    times is one candidate, so that a rollout's positive is nowhere its negative.

    Args:
        embed_fn: embeds rollouts: a list of n texts -> [n, D], floating. No gradient is taken.
        candidate_fn: embeds candidates; None: `embed_fn`.
        bank: [M, D] embeddings, floating, which may be a memory map; positives and negatives are
            then its rows. None: they are texts.
        reward: a name out of `RECIPES` ("ranking", "ume_r1", "embed_rl"), or a function with their
            signature.
        settings: that reward's own, such as `margin` and `w_rank`, or `temperature`.

    Raises:
        UserError: an unknown reward, or a setting that it does not have or that is out of range.
    """

    def __init__(
        self, embed_fn: EmbedFn, *, candidate_fn: EmbedFn | None = None, bank: Tensor | None = None,
        reward: str | Recipe = "ranking", **settings: float,
    ) -> None:  # fmt: skip
        if isinstance(reward, str) and reward not in RECIPES:
            names = ", ".join(RECIPES)
            raise UserError(f"{type(self).__name__}: reward must be one of {names}, got {reward!r}")
        bank = torch.from_numpy(bank) if isinstance(bank, np.ndarray) else bank
        if bank is not None and not (bank.ndim == 2 and bank.is_floating_point()):
            raise UserError(
                f"{type(self).__name__}: bank must be [M, D] floating, got {_shape(bank)}"
            )
        self.embed_fn, self.candidate_fn = embed_fn, candidate_fn or embed_fn
        self.bank, self.settings = bank, settings
        self.recipe: Recipe = RECIPES[reward] if isinstance(reward, str) else reward
        named = getattr(reward, "__name__", type(reward).__name__)
        self.__name__ = reward if isinstance(reward, str) else named
        self._try()

    @torch.no_grad()
    def score(
        self, rollouts: list, positives: Sequence, negatives: Sequence | None = None,
        group: ProcessGroup | None = None, device: torch.device | None = None,
    ) -> Parts:  # fmt: skip
        """The rewards of R rollouts and their parts.

        Args:
            rollouts: what `embed_fn` takes of each.
            positives: of each rollout: a candidate, several, or None.
            negatives: of each rollout: several candidates, or None. Where the argument is None, all
                candidates of the call (with a bank, all its rows) but its positives.
            group: a process group whose candidates are all negatives, where `negatives` is None and
                there is no bank; every process has to call.
            device: where embeddings are brought before they are ranked; None: where the rollouts'
                are.
        """
        for what, given in (("positives", positives), ("negatives", negatives)):
            if given is not None and len(given) != len(rollouts):
                raise UserError(
                    f"{type(self).__name__}: {what} must be of {len(rollouts)} rollouts, got "
                    f"{len(given)}; give each its own, or None"
                )
        own = [self._several(x) for x in positives]
        others = None if negatives is None else [self._several(x) for x in negatives]
        query = self._embedded("embed_fn", self.embed_fn, rollouts)
        query = query if device is None else query.to(device)
        if self.bank is not None and others is None:
            candidates = Candidates(self.bank.to(query), _table(own, query.device))
        else:
            names = list(dict.fromkeys(_flat([*own, *(others or [])])))
            every, mine = _shared(names, None if others is not None else group)
            numbers = {x: n for n, x in enumerate(every)}
            tables = [
                _table([[numbers[x] for x in row] for row in rows], query.device)
                for rows in (own, others or [])
            ]
            candidates = Candidates(
                self._rows(mine, query), tables[0], None if others is None else tables[1],
                group if others is None else None,
            )  # fmt: skip
        found = self.recipe(query, candidates, **self.settings)
        return {
            name: [x if x == x else None for x in part.tolist()]  # NaN: nothing to rank
            for name, part in found.items()
        }

    def score_each(self, rows: Sequence[tuple[Any, Any, Any]]) -> list[dict[str, float]]:
        """The rewards of rollouts that do not know of each other, and their parts.

        Args:
            rows: (rollout, positives, negatives) of each, as in `score`; negatives None: all rows
                of the bank.

        Raises:
            UserError: no negatives and no bank, or nothing to rank.
        """
        kinds: dict[bool, list[int]] = {}
        for n, (_, _, negatives) in enumerate(rows):
            kinds.setdefault(negatives is None, []).append(n)
        if True in kinds and self.bank is None:
            raise UserError(
                f"{self.__name__}: a rollout that is scored alone must have negatives, got None; "
                "give each row its own, or pass a bank"
            )
        found: dict[int, dict[str, float]] = {}
        for whole, own in kinds.items():
            rollouts, positives, negatives = zip(*(rows[n] for n in own), strict=True)
            parts = self.score(list(rollouts), positives, None if whole else negatives)
            found.update(zip(own, self.numbers(parts, positives), strict=True))
        return [found[n] for n in range(len(rows))]

    def numbers(self, parts: Parts, positives: Sequence) -> list[dict[str, float]]:
        """The parts of each rollout, for trainers that know no None.

        Raises:
            UserError: a rollout had nothing to rank.
        """
        if None in parts["reward"]:
            positive = positives[parts["reward"].index(None)]
            raise UserError(
                f"{self.__name__}: a rollout must have a positive and a negative that is not one, "
                f"got the positive {positive!r} without; leave such rows out of the data"
            )
        rows = zip(*parts.values(), strict=True)
        return [dict(zip(parts, row, strict=True)) for row in rows]  # type: ignore[arg-type]

    def _several(self, candidates: Any) -> list:
        """None, one or several candidates as a list, each once."""
        if candidates is None:
            return []
        if isinstance(candidates, Tensor | np.ndarray):
            candidates = candidates.tolist()
        if isinstance(candidates, str | bytes | Mapping) or not isinstance(candidates, Iterable):
            candidates = [candidates]
        if self.bank is not None:
            candidates = [self._row(x) for x in candidates]
        for one in candidates:
            if isinstance(one, Mapping | bytes) or not isinstance(one, Hashable):
                raise UserError(
                    f"{type(self).__name__}: candidates must be texts, names of files or rows of a "
                    f"bank, got {one!r}; take the text out of it"
                )
        return list(dict.fromkeys(candidates))

    def _row(self, candidate: Any) -> int:
        count = len(self.bank)
        row = int(candidate) if isinstance(candidate, Integral) else -1
        if 0 <= row < count:
            return row
        raise UserError(
            f"{type(self).__name__}: a candidate must be a row of the bank, from 0 to {count - 1}, "
            f"got {candidate!r}"
        )

    def _rows(self, names: list, query: Tensor) -> Tensor:
        """Candidates' embeddings, as those of rollouts are kept."""
        if not names:  # of this process, in this batch
            return query.new_empty(0, query.shape[1])
        if self.bank is None:
            return self._embedded("candidate_fn", self.candidate_fn, names).to(query)
        return self.bank[torch.tensor(names, device=self.bank.device)].to(query)

    def _embedded(self, argument: str, embed: EmbedFn, texts: list) -> Tensor:
        found, what = embed(texts), f"{type(self).__name__}: {argument} must return"
        try:
            rows = torch.as_tensor(found)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"{what} [{len(texts)}, D] floating, got {type(found).__name__}"
            ) from error
        if rows.ndim != 2 or len(rows) != len(texts) or not rows.is_floating_point():
            raise UserError(f"{what} [{len(texts)}, D] floating, got {_shape(rows)}")
        sound = torch.isfinite(rows).all(1)
        if not bool(sound.all()):
            row = int((~sound).nonzero()[0])
            raise UserError(f"{what} finite numbers, got NaN or inf for {texts[row]!r}")
        return rows

    def _try(self) -> None:
        """The reward's own complaint about its settings, before a step is waited for."""
        two = torch.eye(2)
        for index in (None, torch.tensor([[1], [0]])):
            candidates = Candidates(two, torch.tensor([[0], [1]]), index)
            try:
                found = self.recipe(two, candidates, **self.settings)
            except (TypeError, ValueError) as error:
                raise UserError(f"{type(self).__name__}: {error}") from error
            if not isinstance(found, dict) or "reward" not in found:
                raise UserError(
                    f"{type(self).__name__}: reward must return a dict with 'reward', got "
                    f"{type(found).__name__}"
                )


class Together:
    """Single rollouts, scored with those that wait beside them: one call in the place of many.

    Trainers that score each rollout when it ends call from many threads or tasks at once. A
    rollout's reward does not depend on its company; what is wrong with one is raised for it alone.

    Args:
        reward: what scores them, by `score_each`.
    """

    def __init__(self, reward: RolloutReward) -> None:
        self.reward = reward
        self.waiting: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=self._serve, daemon=True).start()

    def __call__(self, rollout: Any, positives: Any, negatives: Any) -> Future:
        """The reward of one rollout and its parts, when its batch is done."""
        result: Future = Future()
        self.waiting.put(((rollout, positives, negatives), result))
        return result

    def _serve(self) -> None:
        while True:
            batch = [self.waiting.get()]
            while len(batch) < _MOST_TOGETHER and not self.waiting.empty():
                batch.append(self.waiting.get())
            # One that was given up is not scored; the others can no longer be.
            batch = [one for one in batch if one[1].set_running_or_notify_cancel()]
            if not batch:
                continue
            if not self._answered(batch):
                for one in batch:  # once more, to tell which it was
                    self._answered([one])

    def _answered(self, batch: list) -> bool:
        try:
            found = self.reward.score_each([row for row, _ in batch])
        except Exception as error:  # noqa: BLE001  it belongs to the one who waits
            if len(batch) == 1:
                batch[0][1].set_exception(error)
            return len(batch) == 1
        for (_, result), one in zip(batch, found, strict=True):
            result.set_result(one)
        return True


def _flat(rows: list[list]) -> Iterable:
    return (x for row in rows for x in row)


def _table(rows: list[list[int]], device: torch.device) -> Tensor:
    """Ragged lists as [R, longest], at least [R, 1], filled up with -1."""
    width = max([1, *map(len, rows)])
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows], device=device)


def _shared(names: list, group: ProcessGroup | None) -> tuple[list, list]:
    """The candidates of all processes, each once, and those of them that are this one's to embed:
    what no process before it has. The former are the latter of every process, one after another."""
    if group is None:
        return names, names
    each: list = [None] * group.size()
    torch.distributed.all_gather_object(each, names, group=group)
    before = set(_flat(each[: group.rank()]))
    return list(dict.fromkeys(_flat(each))), [x for x in names if x not in before]


def _shape(rows: Tensor) -> str:
    return f"{list(rows.shape)} {str(rows.dtype).removeprefix('torch.')}"
