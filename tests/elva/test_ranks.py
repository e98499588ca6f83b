"""Ranks, rewards and distances against a brute force in float64."""

import numpy as np
import pytest
import torch

from elva.evaluation import ranks
from elva.evaluation.grains import distance


def lattice(seed, count, dim=16):
    """Rows of +-1: scores are exact binary fractions, and many tie."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (count, dim), generator=generator) * 2.0 - 1


def unit(rows):
    return rows.double().numpy() / rows.double().norm(dim=1, keepdim=True).numpy()


@pytest.mark.parametrize("copies", [False, True])
def test_ranks_are_of_the_best_placed_and_ties_count_against_it(copies):
    query, pool, draw = lattice(0, 40), lattice(1, 300), np.random.default_rng(2)
    positives = [draw.choice(300, n % 4, replace=False).tolist() for n in range(40)]
    content = draw.integers(0, 50, 300) if copies else np.arange(300)
    found = ranks.rank_all(query, pool, positives, content if copies else None)
    scores = unit(query) @ unit(pool).T
    for i, right in enumerate(positives):
        rivals = [j for j in range(300) if content[j] not in set(content[right])]
        best = max((scores[i, j] for j in right), default=-np.inf)
        assert found.rank[i] == (1 + (scores[i, rivals] >= best).sum() if right else 301)
        kept = sorted([*rivals, *right], key=lambda j: (-scores[i, j], j))[:5]
        assert found.top[i].tolist() == kept
        assert (found.reward[i] == 0) == (not right)


def test_the_reward_is_the_papers_against_the_hardest_hundred():
    query, pool = (torch.randn(n, 8, generator=torch.Generator().manual_seed(n)) for n in (9, 400))
    found = ranks.rank_all(query, pool, [[i] for i in range(9)])
    scores = unit(query) @ unit(pool).T
    for i in range(9):
        own, wrong = scores[i, i], np.sort(np.delete(scores[i], i))[::-1]
        rank = 1 + int((wrong >= own).sum())
        places = np.arange(1, len(wrong) + 1) + (np.arange(1, len(wrong) + 1) >= rank)
        head = places <= 100
        paid = own / (1 + np.log(rank)) - 0.01 * (wrong * (np.log(places) - 1))[head].sum()
        expected = 0.4 * max(0, own - wrong[0] - 0.1) + 0.6 * paid
        assert found.reward[i].item() == pytest.approx(expected, abs=1e-5)


def test_ranks_among_own_candidates():
    query, bank, draw = lattice(3, 30), lattice(4, 90), np.random.default_rng(5)
    positives = [draw.choice(90, n % 3, replace=False).tolist() for n in range(30)]
    rivals = [draw.choice(90, n % 7, replace=False).tolist() for n in range(30)]
    found = ranks.rank_among(query, bank, positives, rivals)
    scores = unit(query) @ unit(bank).T
    for i, (right, some) in enumerate(zip(positives, rivals, strict=True)):
        wrong = [j for j in some if j not in right]
        best = max((scores[i, j] for j in right), default=-np.inf)
        assert found[i] == 1 + sum(scores[i, j] >= best for j in wrong)
    assert ranks.rank_among(query[:1], bank, [[]], [[]]).tolist() == [1]


def test_chance_is_what_random_orders_give():
    positives, draw = [[0], [3, 5], []], np.random.default_rng(6)
    orders = [draw.permutation(12) for _ in range(20_000)]
    hits = np.mean([[bool(set(o[:5]) & set(p)) for p in positives] for o in orders])
    assert ranks.chance_at_k(positives, 12, 5) == pytest.approx(hits, abs=0.01)
    assert ranks.chance_at_k([[0]], 12, 1) == pytest.approx(1 / 12)
    assert ranks.chance_at_k([[0]], 3, 5) == 1


def test_grain_distance_is_the_cosines():
    whole, part = (torch.randn(20, 24, generator=torch.Generator().manual_seed(s)) for s in (7, 8))
    assert distance(whole, part).tolist() == pytest.approx(
        1 - (unit(whole) * unit(part)).sum(1), abs=1e-6
    )
    assert distance(whole, 3 * whole).abs().max() < 1e-6
