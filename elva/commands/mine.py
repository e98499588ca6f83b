"""`elva mine`: negatives for stage 3, from embeddings to a data directory.

Liu et al., ELVA, arXiv:2606.20280, sec. 3.4: drop the candidates whose similarity exceeds a
threshold, keep the top 50 of what remains, add 50 drawn at random from the whole pool. Parameters
are named as in sentence-transformers' `mine_hard_negatives`; `num_random` is ours.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from elva.checkpoint import write_directory
from elva.data import Pool
from elva.data.mbeir import QuerySet, query_file, read_sets
from elva.data.strict import Faults, dump, lines, write_lines
from elva.errors import UserError
from elva.index import Found
from elva.index.embeddings import Embeddings
from elva.model.rollout import uniforms
from elva.progress import Reporter

SPARE = 14
"""Ours: answers asked for beyond those wanted, for what will be dropped; more where it was not
enough."""

LINKED = ("cand_pool", "instructions", "mbeir_images", "grains.jsonl", "minimal_pairs.jsonl")


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
        range_min, range_max: ranks to consider, the positives left out; all for None.
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
        for holds, rule, got in rules:
            if not holds:
                raise UserError(f"mine: {rule}, got {got}; see elva mine --help")


@dataclass
class Counts:
    """What became of the candidates that were looked at."""

    queries: int = 0
    hard: int = 0
    random: int = 0
    same_content: int = 0  # a copy of a positive, or of a negative before it
    too_similar: int = 0  # over max_score or within a margin of the positive
    short: int = 0  # queries left with fewer hard negatives than asked for


def plan(
    data: Path, settings: Mining, *, split: str = "train", tasks: Sequence[str] | None = None,
    dim: int = 1536, skip_bad: int = 0,
) -> dict[str, dict[str, int]]:  # fmt: skip
    """What `mine` would do: set -> queries, pool, multiply-adds, negatives, and bytes at most."""
    settings.check()
    found = {}
    for one in read_sets(data, tasks=tasks, split=split, faults=Faults(skip_bad)):
        queries, pool = len(one.queries), len(one.pool)
        depth = min(pool, _depth(settings, one))
        found[one.stem] = {
            "queries": queries,
            "pool": pool,
            "multiply_adds": queries * pool * dim,
            "bytes": queries * dim * 4 + 2 * queries * (2 * depth + 16) * 12,
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
    reporter: Reporter | None = None,
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
    reporter: Reporter | None,
) -> dict[str, list[str]]:
    asked = Embeddings.open(embeddings / f"mbeir_{one.stem}_{split}")
    shown = Embeddings.open(embeddings / one.pool_name)
    shown.check_model(asked)
    qids, query = asked.queries()
    known = {q.id: q for q in one.queries}
    unknown = next((q for q in qids if q not in known), None)
    if unknown is not None:
        raise UserError(f"{asked.directory}: must be of this data, got query {unknown}")
    pending, depth = list(range(len(qids))), _depth(settings, one)
    chooser = _Chooser(one.pool, settings, counts)
    chosen: dict[str, list[str]] = {}
    while pending:
        if reporter is not None:
            reporter.start(f"search {one.stem}, {depth} deep", len(one.pool), "rows")
        advance = None if reporter is None else reporter.advance
        found, dids = shown.nearest(query[pending], depth, advance)
        if chooser.dids is None:
            chooser.know(dids)
        last = depth >= len(dids) or (settings.range_max is not None)
        again = []
        for place, i in enumerate(pending):
            positives = known[qids[i]].positives
            answers = Found(found.scores[place], found.rows[place])
            hard = chooser.hard(qids[i], positives, answers, query[i], shown, count=last)
            if len(hard) < settings.num_negatives and not last:
                again.append(i)
            else:
                rest = chooser.random(qids[i], positives, hard)
                chosen[qids[i]] = [dids[r] for r in (*hard, *rest)]
        pending, depth = again, 4 * depth
        if reporter is not None:
            reporter.finish("")
    return chosen


def _depth(settings: Mining, one: QuerySet) -> int:
    """Answers to ask for first: those wanted, the positives, and some to spare."""
    positives = max((len(q.positives) for q in one.queries), default=1)
    reach = settings.range_min + settings.num_negatives + SPARE
    return positives + (settings.range_max or reach)


class _Chooser:
    """Which of a query's answers are its negatives."""

    def __init__(self, pool: Pool, settings: Mining, counts: Counts) -> None:
        self.pool, self.settings, self.counts = pool, settings, counts
        self.dids: list[str] | None = None
        self.rows: dict[str, int] = {}
        self.content = cache(self._content)

    def know(self, dids: list[str]) -> None:
        """Take the ids of the embedded rows."""
        self.dids, self.rows = dids, {did: row for row, did in enumerate(dids)}

    def _content(self, did: str) -> bytes:
        return self.pool[self.pool.row(did)].content_hash()

    def hard(
        self,
        qid: str,
        positives: Sequence[str],
        answers: Found,
        query: Tensor,
        shown: Embeddings,
        *,
        count: bool,
    ) -> list[int]:
        """Rows of the hard negatives, most similar first; fewer where fewer are left."""
        assert self.dids is not None
        s, wanted = self.settings, self.settings.num_negatives
        ceiling = self._ceiling(positives, answers, query, shown)
        right = set(positives)
        seen = {self.content(did) for did in positives if did in self.rows}
        found: list[int] = []
        same = similar = rank = 0
        for score, row in zip(answers.scores.tolist(), answers.rows.tolist(), strict=True):
            did = self.dids[row]
            if did in right:
                continue
            rank += 1
            if rank <= s.range_min or (s.range_max is not None and rank > s.range_max):
                continue
            if s.min_score is not None and score < s.min_score:
                break
            if score > ceiling:
                similar += 1
            elif self.content(did) in seen:
                same += 1
            else:
                seen.add(self.content(did))
                found.append(row)
                if s.sampling_strategy == "top" and len(found) == wanted:
                    break
        if s.sampling_strategy == "random" and len(found) > wanted:
            order = uniforms((s.seed, "hard", qid), (len(found),)).argsort()[:wanted]
            found = [found[i] for i in sorted(order.tolist())]
        if len(found) >= wanted or count:
            self.counts.queries += 1
            self.counts.hard += len(found)
            self.counts.same_content += same
            self.counts.too_similar += similar
            self.counts.short += len(found) < wanted
        return found

    def _ceiling(
        self, positives: Sequence[str], answers: Found, query: Tensor, shown: Embeddings
    ) -> float:
        """The highest score that a negative may have."""
        s = self.settings
        limits = [float("inf") if s.max_score is None else s.max_score]
        if s.absolute_margin is not None or s.relative_margin is not None:
            rows = [self.rows[did] for did in positives if did in self.rows]
            if rows:
                best = float(torch.cosine_similarity(query[None], shown.rows(rows)).max())
                limits.append(best - (s.absolute_margin or 0.0))
                limits.append(best - abs(best) * (s.relative_margin or 0.0))
        return min(limits)

    def random(self, qid: str, positives: Sequence[str], hard: Sequence[int]) -> list[int]:
        """Rows drawn from the whole pool, none right, none a hard one, no content twice."""
        assert self.dids is not None
        wanted, seed = self.settings.num_random, self.settings.seed
        taken = {*hard, *(self.rows[did] for did in positives if did in self.rows)}
        seen = {self.content(self.dids[row]) for row in taken}
        found: list[int] = []
        tries = 0
        while len(found) < wanted and len(taken) < len(self.dids):
            draws = uniforms((seed, "random", qid, tries), (2 * wanted,))
            for row in (draws * len(self.dids)).long().tolist():
                if row in taken or len(found) == wanted:
                    continue
                taken.add(row)
                held = self.content(self.dids[row])
                if held not in seen:
                    seen.add(held)
                    found.append(row)
            tries += 1
        self.counts.random += len(found)
        return found


def _write(
    partial: Path, data: Path, one: QuerySet, split: str, chosen: dict[str, list[str]]
) -> None:
    """The queries that were embedded with `neg_cand_list` replaced, and their qrels."""
    at = {query.where: query.id for query in one.queries if query.id in chosen}
    rows = (
        dump(json.loads(line) | {"neg_cand_list": chosen[at[where]]})
        for where, line in lines(query_file(data, one.stem, split))
        if where in at
    )
    write_lines(query_file(partial, one.stem, split), rows)
    qrels = Path("qrels") / split / f"mbeir_{one.stem}_{split}_qrels.txt"
    if (data / qrels).exists():
        judged = (line.rstrip("\r\n") for _, line in lines(data / qrels))
        write_lines(partial / qrels, (row for row in judged if row.split()[0] in chosen))
