"""Hard negatives for a dataset of pairs, as sentence-transformers mines them, by elva_kernels."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

import elva_kernels
from elva.errors import UserError, counted

if TYPE_CHECKING:
    from datasets import Dataset

QUERIES = 1024
"""Ours: queries that are looked up at once."""

FORMATS = ("triplet", "n-tuple", "labeled-pair", "labeled-list")


class _Window(NamedTuple):
    """Which of a query's most similar texts may be its negatives."""

    range_min: int
    range_max: int | None
    max_score: float | None
    min_score: float | None
    absolute_margin: float | None
    relative_margin: float | None
    num_negatives: int

    def up_to(self, positives: int) -> int:
        """The last rank, where none is given: with room for what the limits leave out."""
        if self.range_max is not None:
            return self.range_max
        limits = (self.absolute_margin, self.relative_margin, self.max_score)
        spare = 10 if any(limit is not None for limit in limits) else 1
        return self.range_min + spare * self.num_negatives + positives


def mine_hard_negatives(
    dataset: Dataset,
    model: SentenceTransformer,
    anchor_column_name: str | None = None,
    positive_column_name: str | None = None,
    corpus: Sequence[str] | None = None,
    *,
    range_min: int = 0,
    range_max: int | None = None,
    max_score: float | None = None,
    min_score: float | None = None,
    absolute_margin: float | None = None,
    relative_margin: float | None = None,
    num_negatives: int = 3,
    sampling_strategy: Literal["top", "random"] = "top",
    query_prompt_name: str | None = None,
    query_prompt: str | None = None,
    corpus_prompt_name: str | None = None,
    corpus_prompt: str | None = None,
    output_format: Literal["triplet", "n-tuple", "labeled-pair", "labeled-list"] = "triplet",
    output_scores: bool = False,
    batch_size: int = 32,
    seed: int = 0,
    verbose: bool = True,
) -> Dataset:
    """A dataset of pairs with hard negatives beside them: of each anchor the most similar texts
    that are no positive of it. It equals that of `sentence_transformers.util.mine_hard_negatives`.

    Args:
        dataset: columns of anchors and of positives; an anchor in several rows has several.
        anchor_column_name, positive_column_name: the first and the second column for None.
        corpus: further texts that may be negatives, beside all positives.
        range_min, range_max: ranks, from 0, among the most similar texts; positives are skipped.
        max_score, min_score: cosines beyond which a text is no negative.
        absolute_margin, relative_margin: how far below the least similar positive a negative must
            be, as a difference or as a share of the positive's cosine.
        num_negatives: >= 1, of an anchor, at most.
        sampling_strategy: "top", the hardest of what is left, or "random", drawn from it.
        query_prompt_name, query_prompt, corpus_prompt_name, corpus_prompt: as of `encode`.
        output_format: "triplet", "n-tuple", "labeled-pair" or "labeled-list".
        output_scores: also the cosines, in a column `scores`, or `score` in place of `label`.
        batch_size: texts that the model embeds at once.
        seed: of the random strategy.
        verbose: bars, and a line on what was found.

    Returns:
        The dataset; an anchor without enough negatives has fewer, or in n-tuples is left out.

    Raises:
        UserError: an argument out of its range, an unknown column, or a similarity other than the
            cosine.

    Example::

        triplets = mine_hard_negatives(pairs, model, relative_margin=0.05, num_negatives=5)
    """
    from datasets import Dataset

    window = _Window(
        range_min, range_max, max_score, min_score, absolute_margin, relative_margin, num_negatives
    )
    anchors, positives = _columns(dataset, anchor_column_name, positive_column_name)
    if isinstance(corpus, str):
        raise UserError(
            f"mine_hard_negatives: corpus must be a list of texts, got {corpus[:80]!r}; pass "
            "several"
        )
    asked, wanted = list(dataset[anchors]), list(dataset[positives])
    most = max(Counter(asked).values())
    _check(window, window.up_to(most), output_format, sampling_strategy, model)
    texts = list(dict.fromkeys([*(corpus or ()), *wanted]))
    place = {text: row for row, text in enumerate(texts)}
    right: dict[str, dict[int, None]] = {}
    for anchor, text in zip(asked, wanted, strict=True):
        right.setdefault(anchor, {})[place[text]] = None
    queries, owned = list(right), [list(rows) for rows in right.values()]
    how: dict[str, Any] = {
        "batch_size": batch_size, "show_progress_bar": verbose, "convert_to_tensor": True,
    }  # fmt: skip
    docs = model.encode_document(
        texts, prompt_name=corpus_prompt_name, prompt=corpus_prompt, **how
    ).float()
    rows = model.encode_query(
        queries, prompt_name=query_prompt_name, prompt=query_prompt, **how
    ).float()
    known = _positive_scores(rows, docs, owned)
    draw = random.Random(seed) if sampling_strategy == "random" else None
    mined, skipped = _mine(rows, docs, owned, known, window, most, draw)
    table = _table(
        output_format, (anchors, positives), queries, texts, owned, known, mined, num_negatives,
        output_scores,
    )  # fmt: skip
    if verbose:
        print(_summary(mined, skipped, num_negatives))
    return Dataset.from_dict(table)


def _columns(dataset: Dataset, anchor: str | None, positive: str | None) -> tuple[str, str]:
    names = dataset.column_names
    if len(dataset) == 0 or len(names) < 2:
        raise UserError(
            "mine_hard_negatives: dataset must have rows of an anchor and a positive, got "
            f"{counted(len(dataset), 'row')} of {counted(len(names), 'column')}; add them"
        )
    for argument, name in (("anchor_column_name", anchor), ("positive_column_name", positive)):
        if name is not None and name not in names:
            raise UserError(
                f"mine_hard_negatives: {argument} must be a column, got {name!r}; there are "
                f"{', '.join(names)}"
            )
    return anchor or names[0], positive or names[1]


def _check(
    window: _Window, last: int, output_format: str, strategy: str, model: SentenceTransformer
) -> None:
    rules = [
        ("num_negatives", window.num_negatives, window.num_negatives >= 1, "at least 1"),
        ("range_min", window.range_min, window.range_min >= 0, "at least 0"),
        ("range_max", last, last > window.range_min, f"above range_min, {window.range_min}"),
        (
            "num_negatives", window.num_negatives, window.num_negatives <= last - window.range_min,
            f"at most the {last - window.range_min} ranks from range_min to range_max",
        ),
        ("output_format", output_format, output_format in FORMATS, f"one of {', '.join(FORMATS)}"),
        ("sampling_strategy", strategy, strategy in ("top", "random"), "top or random"),
        (
            "model", str(model.similarity_fn_name), model.similarity_fn_name in ("cosine", "dot"),
            "one that is ranked by the cosine, which is all that is mined by",
        ),
    ]  # fmt: skip
    for name, value, kept, rule in rules:
        if not kept:
            raise UserError(
                f"mine_hard_negatives: {name} must be {rule}, got {value}; choose another"
            )


def _positive_scores(
    query: Tensor, docs: Tensor, owned: Sequence[Sequence[int]]
) -> list[list[float]]:
    """The cosines of each query's positives."""
    at = torch.tensor([q for q, some in enumerate(owned) for _ in some], device=query.device)
    row = torch.tensor([one for some in owned for one in some], device=query.device)
    pairs = query[at], docs[row]
    found = elva_kernels.ranking_reward(*pairs, pairs[1][:, None][:, :0]).scores[:, 0]
    return [some.tolist() for some in found.split([len(some) for some in owned])]


def _mine(
    query: Tensor,
    docs: Tensor,
    owned: Sequence[Sequence[int]],
    known: Sequence[Sequence[float]],
    window: _Window,
    most: int,
    draw: random.Random | None,
) -> tuple[list[list[tuple[int, float]]], Counter[str]]:
    """(row, cosine) of each query's negatives, hardest first; rule -> texts that it left out.

    Args:
        known: the cosines of the rows that each query owns.
        most: positives of a query at most, for which the window has room.
    """
    last = window.up_to(most)
    mined: list[list[tuple[int, float]]] = []
    skipped: Counter[str] = Counter()
    for start in range(0, len(query), QUERIES):
        found = elva_kernels.topk(query[start : start + QUERIES], docs, min(last + most, len(docs)))
        scores, rows = found.scores.cpu(), found.index.cpu()
        for i in range(len(rows)):
            own = torch.tensor(owned[start + i])
            scores[i] = scores[i].where(~torch.isin(rows[i], own), -torch.inf)
        least = torch.tensor([min(some) for some in known[start : start + QUERIES]])
        for rule, out in _left_out(scores, least[:, None], window):
            skipped[rule] += int((out & scores.isfinite()).sum())
            scores = scores.where(~out, -torch.inf)
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        rows, part = rows.gather(1, order), slice(window.range_min, last)
        for line, values in zip(rows[:, part].tolist(), scores[:, part].tolist(), strict=True):
            there = [pair for pair in zip(line, values, strict=True) if pair[1] > -torch.inf]
            if draw is not None:
                options = max(len(there), window.num_negatives)
                chosen = sorted(draw.sample(range(options), window.num_negatives))
                there = [there[i] for i in chosen if i < len(there)]
            mined.append(there[: window.num_negatives])
    return mined, skipped


def _left_out(scores: Tensor, least: Tensor, window: _Window) -> Iterator[tuple[str, Tensor]]:
    """(rule, which cosines break it); `least` is that of each query's least similar positive."""
    if window.absolute_margin is not None:
        yield "absolute_margin", scores + window.absolute_margin > least
    if window.relative_margin is not None:
        yield "relative_margin", scores > least - least.abs() * window.relative_margin
    if window.max_score is not None:
        yield "max_score", scores > window.max_score
    if window.min_score is not None:
        yield "min_score", scores < window.min_score


def _table(
    output_format: str,
    names: tuple[str, str],
    queries: Sequence[str],
    texts: Sequence[str],
    owned: Sequence[Sequence[int]],
    known: Sequence[Sequence[float]],
    mined: Sequence[Sequence[tuple[int, float]]],
    count: int,
    scored: bool,
) -> dict[str, list[Any]]:
    """The result's columns."""
    heads = {
        "triplet": [*names, "negative", "scores"],
        "n-tuple": [*names, *(f"negative_{i}" for i in range(1, count + 1)), "scores"],
        "labeled-pair": [*names, "score" if scored else "label"],
        "labeled-list": [*names, "scores" if scored else "labels"],
    }[output_format]
    lines: list[list[Any]] = []
    for query, own, cosines, found in zip(queries, owned, known, mined, strict=True):
        others, harder = [texts[row] for row, _ in found], [cosine for _, cosine in found]
        if output_format == "labeled-pair":
            said = [texts[row] for row in own] + others
            values = [*cosines, *harder] if scored else [1] * len(own) + [0] * len(found)
            lines += [[query, *pair] for pair in zip(said, values, strict=True)]
            continue
        for row, cosine in zip(own, cosines, strict=True):
            if output_format == "triplet":
                pairs = zip(others, harder, strict=True)
                lines += [[query, texts[row], other, [cosine, score]] for other, score in pairs]
            elif output_format == "n-tuple" and len(found) == count:
                lines.append([query, texts[row], *others, [cosine, *harder]])
            elif output_format == "labeled-list" and found:
                values = [cosine, *harder] if scored else [1] + [0] * len(found)
                lines.append([query, [texts[row], *others], values])
    table = {head: [line[i] for line in lines] for i, head in enumerate(heads)}
    if output_format in ("triplet", "n-tuple") and not scored:
        del table["scores"]
    return table


def _summary(mined: Sequence[Sequence[Any]], skipped: Counter[str], count: int) -> str:
    """What was found, in a line."""
    found, few = sum(map(len, mined)), sum(len(some) < count for some in mined)
    parts = [f"mined {counted(found, 'negative')} of {counted(len(mined), 'query', 'queries')}"]
    parts += [f"{rule} left out {n:,}" for rule, n in skipped.items() if n]
    parts += [f"{few:,} have fewer than {count}"] if few else []
    return "; ".join(parts)
