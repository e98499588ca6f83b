"""`elva mine`: negatives for stage 3, from embeddings to a data directory.

Liu et al., ELVA, arXiv:2606.20280, sec. 3.4: drop the candidates whose similarity exceeds a
threshold, keep the top 50 of what remains, add 50 drawn at random from the whole pool. Parameters
are named as in sentence-transformers' `mine_hard_negatives`; `num_random` is ours.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from elva.data.layout import LINKED, query_file
from elva.data.mbeir import QuerySet, read_sets
from elva.data.schema import hashed_id
from elva.data.strict import Faults, columns, dump, lines, write_lines
from elva.draws import permutation
from elva.errors import UserError
from elva.files import write_directory
from elva.hardest import ANSWERS, BLOCK_MB, SPARE, at_random, hardest
from elva.index import Found, exact
from elva.index.embeddings import Embeddings
from elva.progress import SILENT, Reporter


@dataclass(frozen=True)
class Mining:
    """What is a negative, and how many there are to be.

    Args:
        num_negatives: hard ones, the most similar of what is not dropped.
        num_random: drawn from the rest of the pool (the paper's other half).
        max_score, min_score: a candidate outside is no negative; cosine similarities. The paper's
            threshold is `max_score`, whose value it does not print.
        absolute_margin: a candidate within so much of the positive's score is no negative.
        relative_margin: the same, as a share of the positive's score.
        range_min, range_max: ranks to consider, of what is neither right, too similar nor a copy;
            all for None.
        sampling_strategy: `top`, the most similar, or `random` among those in range.
    """

    num_negatives: int = 50
    num_random: int = 50
    max_score: float | None = 0.99
    min_score: float | None = None
    absolute_margin: float | None = None
    relative_margin: float | None = None
    range_min: int = 0
    range_max: int | None = None
    sampling_strategy: str = "top"
    seed: int = 0

    def check(self) -> None:
        """UserError for a number out of its range."""
        rules = [
            (self.num_negatives >= 0, "num_negatives must be at least 0", self.num_negatives),
            (self.num_random >= 0, "num_random must be at least 0", self.num_random),
            (self.num_negatives + self.num_random > 0, "num_negatives and num_random must not "
             "both be 0", 0),
            (self.range_min >= 0, "range_min must be at least 0", self.range_min),
            (self.range_max is None or self.range_max > self.range_min,
             "range_max must be above range_min", self.range_max),
            (self.sampling_strategy in ("top", "random"), "sampling_strategy must be top or "
             "random", self.sampling_strategy),
            (self.sampling_strategy == "top" or self.range_max is not None,
             "sampling_strategy random must come with range_max", self.range_max),
            (self.max_score is None or self.min_score is None or self.max_score > self.min_score,
             "max_score must be above min_score", self.max_score),
        ]  # fmt: skip
        for name in ("max_score", "min_score", "absolute_margin", "relative_margin"):
            value = getattr(self, name)
            rules.append((value is None or isfinite(value), f"{name} must be finite", value))
        for holds, rule, got in rules:
            if not holds:
                raise UserError(f"mine: {rule}, got {got}; see elva mine --help")


@dataclass
class Counts:
    """What became of the candidates that were looked at."""

    queries: int = 0
    hard: int = 0
    random: int = 0
    same_content: int = 0  # a copy of a positive, or of a negative before it, that came up
    short: int = 0  # queries left with fewer hard negatives than asked for


def plan(
    data: Path, settings: Mining, *, split: str = "train", tasks: Sequence[str] | None = None,
    dim: int = 1536, skip_bad: int = 0,
) -> dict[str, dict[str, int]]:  # fmt: skip
    """What `mine` would do: set -> queries, pool, multiply-adds, negatives, and bytes at most."""
    settings.check()
    found = {}
    for one in read_sets(data, tasks=tasks, split=split, faults=Faults(skip_bad)):
        queries, pool, reach = len(one.queries), len(one.pool), _reach(settings)
        looked = min(queries * (reach + SPARE), ANSWERS)
        found[one.stem] = {
            "queries": queries,
            "pool": pool,
            "multiply_adds": queries * pool * dim,
            # an answer is 12 bytes; a merge holds what it merges twice, and sorts it
            "bytes": queries * (4 * dim + 12 * reach) + 6 * 12 * looked + (BLOCK_MB << 20),
            "negatives": queries * (settings.num_negatives + settings.num_random),
        }
    return found


def mine(
    embeddings: Path,
    data: Path,
    output: Path,
    settings: Mining,
    *,
    split: str = "train",
    tasks: Sequence[str] | None = None,
    skip_bad: int = 0,
    reporter: Reporter = SILENT,
) -> dict[str, Counts]:
    """Write a data directory whose queries have mined negatives.

    Args:
        embeddings: what `elva embed` wrote of the split's queries and pools.
        output: an absent directory; gets query files and qrels, and links to the data's pools,
            instructions and pictures.
        skip_bad: so many bad rows of the data, left out when it was embedded, are left out again;
            `mining.json` lists them. Bad rows of a pool stay where its link leads.

    Returns:
        set -> what became of its candidates.

    Raises:
        UserError, DataError: an argument, the data, or the embeddings.
    """
    settings.check()
    if output.exists():
        raise UserError(f"{output}: must not exist yet; choose another --output")
    counts: dict[str, Counts] = {}

    def fill(partial: Path) -> None:
        faults = Faults(skip_bad)
        for one in read_sets(data, tasks=tasks, split=split, faults=faults):
            counts[one.stem] = Counts()
            chosen = _negatives(embeddings, one, split, settings, counts[one.stem], reporter)
            _write(partial, data, one, split, chosen)
        for name in LINKED:
            if (data / name).exists():
                os.symlink((data / name).absolute(), partial / name)
        tally = {stem: asdict(found) for stem, found in counts.items()}
        notes = {"settings": asdict(settings), "counts": tally, "skipped": faults.found}
        (partial / "mining.json").write_text(json.dumps(notes, indent=1), encoding="utf-8")

    write_directory(output, fill)
    return counts


def _negatives(
    embeddings: Path,
    one: QuerySet,
    split: str,
    settings: Mining,
    counts: Counts,
    reporter: Reporter,
) -> dict[str, list[str]]:
    asked = Embeddings.open(embeddings / f"mbeir_{one.stem}_{split}")
    shown = Embeddings.open(embeddings / one.pool_name)
    shown.check_model(asked)
    qids, query = asked.queries()
    right = _right(one, qids, asked, shown.ids)
    parts = [shard.embeddings for shard in shown.opened]

    at = one.pool.find(np.array([hashed_id(did) for did in shown.ids], np.int64))

    def identities(rows: np.ndarray) -> np.ndarray:
        return one.pool.identities(at[rows])

    reporter.start(f"search {one.stem}", len(shown.ids), "rows")
    found = hardest(
        query, parts, right, k=_reach(settings), max_score=_limits(settings, query, parts, right),
        identities=identities, progress=reporter.advance,
    )  # fmt: skip
    counts.queries, counts.same_content = len(qids), int(found.copies.sum())
    reporter.start(f"draw {one.stem}", len(qids), "queries")
    chosen: dict[str, list[str]] = {}
    for i, qid in enumerate(qids):
        hard = _hard(qid, settings, Found(found.scores[i], found.rows[i]))
        rest = at_random(
            (0, len(shown.ids)), {*hard, *right[i]}, settings.num_random, identities,
            (settings.seed, "random", qid),
        )  # fmt: skip
        chosen[qid] = [shown.ids[row] for row in (*hard, *rest)]
        counts.hard += len(hard)
        counts.random += len(rest)
        counts.short += len(hard) < settings.num_negatives
        reporter.advance(i + 1)
    reporter.finish("")
    return chosen


def _right(
    one: QuerySet, qids: Sequence[str], asked: Embeddings, dids: Sequence[str]
) -> list[list[int]]:
    """Embedded rows of each embedded query's right answers."""
    positives = {query.id: query.positives for query in one.queries}
    if unknown := next((qid for qid in qids if qid not in positives), None):
        raise UserError(f"{asked.directory}: must be of this data, got query {unknown}")
    wanted = {did for some in positives.values() for did in some}
    rows = {did: row for row, did in enumerate(dids) if did in wanted}
    return [[rows[did] for did in positives[qid] if did in rows] for qid in qids]


def _reach(settings: Mining) -> int:
    """Candidates a query to choose the hard negatives from."""
    if not settings.num_negatives:
        return 0
    return settings.range_max or settings.range_min + settings.num_negatives


def _limits(
    settings: Mining, query: Tensor, parts: Sequence[Tensor], right: Sequence[Sequence[int]]
) -> float | Tensor | None:
    """The highest score that a negative may have; [Q] where it depends on the positive's."""
    if settings.absolute_margin is None and settings.relative_margin is None:
        return settings.max_score
    answers = [torch.tensor(rows, dtype=torch.int64) for rows in right]
    best = exact.rescored(query, exact.Stack(parts), answers, 1).scores[:, 0].double()
    below = best - (settings.absolute_margin or 0.0)
    below = torch.minimum(below, best - best.abs() * (settings.relative_margin or 0.0))
    below = below.where(best.isfinite(), torch.inf)
    return below if settings.max_score is None else below.clamp(max=settings.max_score)


def _hard(qid: str, settings: Mining, found: Found) -> list[int]:
    """Rows of the hard negatives, most similar first; fewer where fewer are left."""
    there = found.rows >= 0
    if settings.min_score is not None:
        there &= found.scores >= settings.min_score
    rows: list[int] = found.rows[there].tolist()
    rows = rows[settings.range_min : settings.range_max]
    if settings.sampling_strategy == "random" and len(rows) > settings.num_negatives:
        drawn = permutation((settings.seed, "hard", qid), len(rows))[: settings.num_negatives]
        return [rows[i] for i in sorted(drawn)]
    return rows[: settings.num_negatives]


def _write(
    partial: Path, data: Path, one: QuerySet, split: str, chosen: dict[str, list[str]]
) -> None:
    """The queries that were embedded with `neg_cand_list` replaced, and their qrels; a file of
    several tasks becomes one a task."""
    at = {query.where: query.id for query in one.queries if query.id in chosen}
    rows = (
        dump(json.loads(line) | {"neg_cand_list": chosen[at[where]]})
        for where, line in lines(one.path, Faults(sys.maxsize))  # its faults are known
        if where in at
    )
    write_lines(query_file(partial, one.stem, split), rows)
    qrels = Path("qrels") / split / f"mbeir_{one.stem}_{split}_qrels.txt"
    if (data / qrels).exists():
        judged = lines(data / qrels, Faults(sys.maxsize))
        kept = [line for _, line in judged if chosen.keys() & columns(line)[:1]]
        if kept:
            write_lines(partial / qrels, kept)
