"""Hard negatives against a brute force in float64, over parts of every size and content."""

import numpy as np
import pytest
import torch

import elva_kernels
from elva import hardest as module
from elva.hardest import at_random, hardest


def brute(query, pool, right, k, max_score=None, content=None):
    """(scores, rows) of each query, fewer than k where fewer are left."""
    q, p = (x.double() / x.double().norm(dim=1, keepdim=True) for x in (query, pool))
    scores = (q @ p.T).numpy()
    limits = np.broadcast_to(np.inf if max_score is None else np.asarray(max_score), len(q))
    content = np.arange(len(p)) if content is None else content
    found = []
    for row, answers, limit in zip(scores, right, limits, strict=True):
        seen, kept = set(content[list(answers)]), []
        for j in np.argsort(-row, kind="stable"):
            if j in answers or row[j] > limit or content[j] in seen:
                continue
            seen.add(content[j])
            kept.append(int(j))
        found.append(([row[j] for j in kept[:k]], kept[:k]))
    return found


def drawn(seed, queries=37, rows=400, dim=24):
    """On a lattice of exact scores: entries +-1 and a power of 4 as dimension give many ties."""
    generator = torch.Generator().manual_seed(seed)
    query, pool = (
        torch.randint(0, 2, (n, dim), generator=generator) * 2.0 - 1 for n in (queries, rows)
    )
    draw = np.random.default_rng(seed)
    right = [draw.choice(rows, draw.integers(0, 5), replace=False).tolist() for _ in query]
    return query, pool, right


def check(found, expected, k):
    assert found.scores.shape == found.rows.shape == (len(expected), k)
    for i, (scores, rows) in enumerate(expected):
        pad = k - len(rows)
        assert found.rows[i].tolist() == rows + [-1] * pad
        assert found.scores[i].tolist() == pytest.approx(scores + [-np.inf] * pad, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("max_score", [None, 0.25])
@pytest.mark.parametrize("copies", [False, True])
def test_it_is_a_brute_force_of_one_pass(dtype, max_score, copies, monkeypatch):
    """With ties across parts and blocks: +-1 in 16 dimensions give 17 scores to 400 rows."""
    monkeypatch.setattr(module, "_blocks", small_blocks)
    query, pool, right = drawn(0, dim=16)
    content = np.random.default_rng(1).integers(0, 60, len(pool)) if copies else None
    asked = []

    def identities(rows):
        asked.extend(rows.tolist())
        return content[rows]

    parts = [p.to(dtype) for p in pool.split([1, 150, 0, 249])]
    found = hardest(
        query, parts, right, k=30, max_score=max_score, identities=identities if copies else None
    )
    check(found, brute(query, pool, right, 30, max_score, content), 30)
    assert not set(asked) - {*range(len(pool))}
    assert bool(found.copies.any()) == copies


def small_blocks(stack, query):
    for part, start in zip(stack.parts, stack.starts.tolist(), strict=False):
        for first in range(0, len(part), 7):
            yield start + first, part[first : first + 7].to(query)


def test_every_query_may_have_a_limit_of_its_own():
    query, pool, right = drawn(2, dim=16)
    limits = torch.linspace(-0.5, 1, len(query), dtype=torch.float64)
    found = hardest(query, [pool], right, k=40, max_score=limits)
    check(found, brute(query, pool, right, 40, limits.numpy()), 40)


def test_only_rows_that_came_up_are_looked_at():
    query, pool, right = drawn(3, rows=5000, dim=64)
    asked = set()

    def identities(rows):
        asked.update(rows.tolist())
        return rows

    found = hardest(query[:3], [pool], right[:3], k=10, identities=identities)
    deep = hardest(query[:3], [pool], right[:3], k=10 + module.SPARE)
    assert asked == {*deep.rows.flatten().tolist(), *(r for some in right[:3] for r in some)}
    assert found.rows.tolist() == deep.rows[:, :10].tolist()


def test_a_pool_of_copies_is_asked_as_deep_as_it_takes(monkeypatch):
    """990 of 1,000 rows are one answer, and one query's own: it has 9 negatives, the rest 10."""
    monkeypatch.setattr(module, "ANSWERS", 100)  # a pass a query or two
    query, pool, _ = drawn(4, queries=5, rows=1000, dim=16)
    content = np.minimum(np.arange(1000), 10)
    right = [[500], [3], [], [3, 700], [999]]
    found = hardest(query, [pool], right, k=12, identities=lambda rows: content[rows])
    check(found, brute(query, pool, right, 12, None, content), 12)
    assert (found.rows >= 0).sum(1).tolist() == [10, 10, 11, 9, 10]


def test_nothing_to_find_is_no_error():
    query, pool, right = drawn(5, queries=2, rows=3)
    right = [[0, 1, 2], []]
    found = hardest(query, [pool], right, k=4)
    assert found.rows[0].tolist() == [-1] * 4 and (found.rows[1] >= 0).sum() == 3
    assert hardest(query, [pool], right, k=0).rows.shape == (2, 0)
    assert hardest(query, [pool], right, k=2, max_score=-1.5).rows.tolist() == [[-1, -1]] * 2
    assert hardest(query, [], [[], []], k=2).rows.tolist() == [[-1, -1]] * 2
    assert hardest(query[:0], [pool], [], k=2, identities=lambda rows: rows).rows.shape == (0, 2)


def test_what_is_widened_at_a_time_is_bounded(monkeypatch):
    """6 MB of fp16 rows are 12 MB of fp32; a call sees 1 MB of it."""
    monkeypatch.setattr(module, "BLOCK_MB", 1)
    sizes, read = [], []
    kernel = elva_kernels.rank_statistics

    def watched(query, candidates, *arguments, **options):
        sizes.append(candidates.numel() * candidates.element_size())
        return kernel(query, candidates, *arguments, **options)

    monkeypatch.setattr(elva_kernels, "rank_statistics", watched)
    pool = torch.randn(12_000, 256, generator=torch.Generator().manual_seed(6)).half()
    found = hardest(pool[:3].float(), pool.split(5000), [[0], [1], [2]], k=2, progress=read.append)
    assert max(sizes) == 1 << 20 and sum(sizes) == 12_000 * 1024
    assert read == sorted(read) and read[-1] == 12_000
    assert not (found.rows == torch.arange(3)[:, None]).any()


def test_what_a_pass_answers_is_bounded(monkeypatch):
    """5,000 queries of 1,000 answers are 5 million; a pass has 4 million at most."""
    kernel, answers = elva_kernels.rank_statistics, []

    def watched(query, *arguments, k, **options):
        answers.append(len(query) * k)
        return kernel(query, *arguments, k=k, **options)

    monkeypatch.setattr(elva_kernels, "rank_statistics", watched)
    hardest(torch.randn(5000, 8), [torch.randn(3, 8)], [[]] * 5000, k=1000)
    assert sum(answers) == 5_000_000 and max(answers) <= 1 << 22


def test_random_rows_are_of_the_pool_and_even_over_it():
    taken, drawn_rows = {12, 15}, []
    for seed in range(400):
        rows = at_random((10, 30), taken, 6, lambda rows: rows, (seed,))
        assert len({*rows}) == len(rows) == 6
        drawn_rows += rows
    counts = np.bincount(drawn_rows)
    assert counts.nonzero()[0].tolist() == [row for row in range(10, 30) if row not in taken]
    assert counts[counts > 0].std() < 2 * (2400 / 18) ** 0.5


def test_random_rows_are_no_copies_of_what_is_taken_and_of_none_another():
    """Of 10 contents in two rows each one is taken; a pool gives no more than it has."""
    for seed in range(20):
        rows = at_random((0, 20), {3}, 5, lambda rows: rows // 2, (seed,))
        assert len({row // 2 for row in rows} - {1}) == len(rows) == 5
    rows = at_random((0, 20), {3}, 20, lambda rows: rows // 2, (0,))
    assert sorted(row // 2 for row in rows) == [0, 2, 3, 4, 5, 6, 7, 8, 9]
    assert sorted(at_random((5, 10), {6}, 9, lambda rows: rows, (0,))) == [5, 7, 8, 9]


def test_random_rows_are_looked_at_only_as_far_as_they_are_wanted():
    """A look at a row decodes its picture."""
    looked = []

    def identities(rows):
        looked.extend(rows.tolist())
        return rows

    assert at_random((0, 100), {7}, 0, identities, (0,)) == looked == []
    rows = at_random((0, 100), {7}, 3, identities, (0,))
    assert looked == [7, *rows]


def test_a_row_without_an_identity_is_an_error():
    with pytest.raises(ValueError, match="shorter"):
        at_random((0, 100), {7}, 3, lambda rows: rows[1:], (0,))
