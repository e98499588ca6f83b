"""Ranks, rewards and their slopes from one group's scores, for the kernels of this package.

Eq. 2 to 6 of `elva_kernels.reference` (Liu et al., ELVA, arXiv:2606.20280, sec. 3.4), 3g and 4g.
In: scores (any dtype, cast to float64 when read). Candidate 0 is the positive. The negatives' mask:
    bool, True = live; or int64, where the negatives' rows are in a bank, -1 = masked; or None. And
    their relevance [C - 1], dense, or None.
Work split: one program walks over blocks of BLOCK candidates, each compared with every other block:
O(N^2) comparisons, no limit on N, nothing kept beyond a [BLOCK, BLOCK] tile.
Numerics: float64 throughout; counts are integers; sums are trees of a stated shape (`tree_sum`), so
a result has the same bits whatever layout the compiler picks. No atomics.
Ties: score descending, then negatives by index, the positive last; not finite = below all.
"""

# mypy: ignore-errors
# Triton compiles these functions from their source; to Python their arguments have no type.

import triton
import triton.language as tl


@triton.jit
def tree_sum(x):
    """Sum over the last axis of [rows, 2^k]: neighbours first. `tl.sum` leaves the order open."""
    for _ in tl.static_range(16):
        if x.shape[1] > 1:
            x = tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]), axis=2)  # of two
    return tl.reshape(x, [x.shape[0]])


@triton.jit
def block_sum(x):
    """Sum of [2^k] as a scalar, by the same tree."""
    return tl.sum(tree_sum(tl.reshape(x, [1, x.shape[0]])), axis=0)


@triton.jit
def live_candidates(mask, mask_step, index, candidates):
    """Which of the candidates `index` exist and are not masked."""
    inside = index < candidates
    if mask is not None:
        unmasked = inside & (index > 0)
        at = mask + (index - 1) * mask_step
        if mask.dtype.element_ty == tl.int64:
            inside &= tl.load(at, mask=unmasked, other=0).to(tl.int64) != -1
        else:
            inside &= tl.load(at, mask=unmasked, other=1).to(tl.int1)
    return inside


@triton.jit
def load_scores(scores, step, mask, mask_step, index, candidates):
    """Scores in float64 (0 where not finite or not live), sort keys, live, finite."""
    live = live_candidates(mask, mask_step, index, candidates)
    score = tl.load(scores + index * step, mask=live, other=0.0).to(tl.float64)
    finite = tl.abs(score) < float("inf")
    key = tl.where(live & finite, score, float("-inf"))
    return tl.where(finite, score, 0.0), key, live, finite


@triton.jit
def load_relevance(relevance, index, live):
    """Of live negatives, in float64; 0 of the positive and of the rest."""
    given = live & (index > 0)
    return tl.load(relevance + index - 1, mask=given, other=0.0).to(tl.float64)


@triton.jit
def graded(grade, plain, positive):
    """Eq. 4g of what eq. 4 has at relevance 0 and at 1: to the bit `plain` at 0."""
    return tl.where(grade == 0, plain, grade * positive + (1.0 - grade) * plain)


@triton.jit
def survey(scores, step, mask, mask_step, relevance, candidates, margin, BLOCK: tl.constexpr):
    """The margin reward (eq. 3), whether its hinge is open, the positive's key, what is unsound.

    And, given `relevance`, the hardest negative (eq. 3g), of equal ones the first.
    """
    hardest = tl.full([], float("-inf"), tl.float64)
    positive = tl.full([], float("-inf"), tl.float64)
    negatives = tl.full([], 0, tl.int32)
    unsound = tl.full([], 0, tl.int32)
    place = tl.full([], 0, tl.int64)
    for start in range(0, candidates, BLOCK):
        index = start + tl.arange(0, BLOCK).to(tl.int64)
        _, key, live, finite = load_scores(scores, step, mask, mask_step, index, candidates)
        is_negative = index > 0
        rival = tl.where(is_negative, key, float("-inf"))
        if relevance is not None:
            grade = load_relevance(relevance, index, live)
            unsound += tl.sum(((grade >= 0) & (grade <= 1) == 0).to(tl.int32), axis=0)
            rival -= margin * grade
            first = tl.min(tl.where(rival == tl.max(rival, axis=0), index, candidates), axis=0)
            place = tl.where(tl.max(rival, axis=0) > hardest, first, place)
        hardest = tl.maximum(hardest, tl.max(rival, axis=0))
        positive = tl.maximum(positive, tl.max(tl.where(is_negative, float("-inf"), key), axis=0))
        negatives += tl.sum((live & is_negative).to(tl.int32), axis=0)
        unsound += tl.sum((live & (finite == 0)).to(tl.int32), axis=0)
    # Not finite only in an unsound group, whose rewards are NaN in any case.
    gap = tl.where(negatives > 0, positive - hardest - margin, 0.0)
    return tl.where(gap > 0, gap, 0.0), (gap > 0).to(tl.float64), positive, unsound, place


@triton.jit
def count_ahead(
    scores, step, mask, mask_step, index, score, key, candidates, inverse_temperature,
    SOFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """For each candidate of a block: how many come before it (eq. 2), and softly so (eq. 6)."""
    ahead = tl.zeros([BLOCK], tl.int32)
    soft = tl.zeros([BLOCK], tl.float64)
    for start in range(0, candidates, BLOCK):
        other = start + tl.arange(0, BLOCK).to(tl.int64)
        rival, rival_key, live, _ = load_scores(scores, step, mask, mask_step, other, candidates)
        wins_ties = (other > 0)[None, :] & (
            (index == 0)[:, None] | (other[None, :] < index[:, None])
        )
        tie = (rival_key[None, :] == key[:, None]) & wins_ties
        above = (rival_key[None, :] > key[:, None]) | tie
        ahead += tl.sum((above & live[None, :]).to(tl.int32), axis=1)
        if SOFT:
            share = sigmoid((rival[None, :] - score[:, None]) * inverse_temperature)
            counts = live[None, :] & (other[None, :] != index[:, None])
            soft += tree_sum(tl.where(counts, share, 0.0))
    return ahead, soft


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) without overflow."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def rank_block(
    scores, step, mask, mask_step, relevance, start, candidates, positive, hardest_place,
    rank_penalty, inverse_temperature, SOFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of candidates: what eq. 4 makes of them.

    Returns index, score, live, places ahead (int32), dR_rank/ds at constant ranks, dR_rank/dr,
    and whether a candidate is the hardest negative: given `relevance`, the one at `hardest_place`.
    """
    index = start + tl.arange(0, BLOCK).to(tl.int64)
    score, key, live, _ = load_scores(scores, step, mask, mask_step, index, candidates)
    ahead, soft = count_ahead(
        scores, step, mask, mask_step, index, score, key, candidates, inverse_temperature,
        SOFT, BLOCK,
    )  # fmt: skip
    place = 1.0 + (soft if SOFT else ahead.to(tl.float64))
    log_place = tl.log(place)
    contrast = 1.0 / (1.0 + log_place)
    first = index == 0
    direct = tl.where(first, contrast, -rank_penalty * (log_place - 1.0))
    through = tl.where(first, -contrast * contrast, -rank_penalty)
    if relevance is not None:
        grade = load_relevance(relevance, index, live)
        direct = graded(grade, direct, contrast)
        through = graded(grade, through, -contrast * contrast)
    through = through * score / place
    behind_positive = (positive > key).to(tl.int32)
    hardest = live & (index > 0) & (ahead == behind_positive)
    if relevance is not None:
        hardest = live & (index > 0) & (index == hardest_place)
    return index, score, live, ahead, tl.where(live, direct, 0.0), through, hardest


@triton.jit
def settle(
    scores, step, mask, mask_step, relevance, slopes, candidates,
    reward, margin_reward, rank_reward, rank,
    margin, rank_penalty, w_margin, w_rank, inverse_temperature,
    SOFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Stores one group's rewards and rank where they are asked for (pointers or None).

    `slopes` [2, candidates] float64, or None: takes dreward/ds at constant ranks, 0 for dead
    candidates, NaN for live ones of an unsound group; and w_rank dR_rank/dr. Other threads see
    them after a barrier.
    """
    hinge, is_open, positive, unsound, hardest_place = survey(
        scores, step, mask, mask_step, relevance, candidates, margin, BLOCK
    )
    place = tl.full([], 1, tl.int32)
    total = tl.full([], 0, tl.float64)
    for start in range(0, candidates, BLOCK):
        index, score, live, ahead, direct, through, hardest = rank_block(
            scores, step, mask, mask_step, relevance, start, candidates, positive, hardest_place,
            rank_penalty, inverse_temperature, SOFT, BLOCK,
        )  # fmt: skip
        place += tl.sum(tl.where(index == 0, ahead, 0), axis=0)
        total += block_sum(direct * score)
        if slopes is not None:
            pull = (index == 0).to(tl.float64) - hardest.to(tl.float64)
            slope = w_rank * direct + w_margin * is_open * pull
            slope = tl.where(live & (unsound > 0), float("nan"), slope)
            tl.store(slopes + index, slope, mask=index < candidates)
            tl.store(slopes + candidates + index, w_rank * through, mask=index < candidates)
    if reward is not None:
        hinge = tl.where(unsound > 0, float("nan"), hinge)
        total = tl.where(unsound > 0, float("nan"), total)
        tl.store(reward, w_margin * hinge + w_rank * total)
        tl.store(margin_reward, hinge)
        tl.store(rank_reward, total)
        tl.store(rank, place)


@triton.jit
def load_slope(
    scores, step, mask, mask_step, slopes, start, candidates, inverse_temperature,
    SOFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dreward/ds of a block of candidates, after `settle` and a barrier; with their indices.

    Soft ranks add, with e_i = dreward/dr_i and the even function s' = sigmoid',
    sum over live j of (e_j - e_i) s'((s_j - s_i) / t) / t.
    """
    index = start + tl.arange(0, BLOCK).to(tl.int64)
    slope = tl.load(slopes + index, mask=index < candidates, other=0.0).to(tl.float64)
    if SOFT:
        through = slopes + candidates
        score, _, alive, _ = load_scores(scores, step, mask, mask_step, index, candidates)
        own = tl.load(through + index, mask=index < candidates, other=0.0).to(tl.float64)
        bent = tl.zeros([BLOCK], tl.float64)
        for first in range(0, candidates, BLOCK):
            other = first + tl.arange(0, BLOCK).to(tl.int64)
            rival, _, live, _ = load_scores(scores, step, mask, mask_step, other, candidates)
            theirs = tl.load(through + other, mask=other < candidates, other=0.0).to(tl.float64)
            small = tl.exp(-tl.abs(rival[None, :] - score[:, None]) * inverse_temperature)
            bend = small / ((1.0 + small) * (1.0 + small))
            term = (theirs[None, :] - own[:, None]) * bend
            bent += tree_sum(tl.where(live[None, :], term, 0.0))
        slope += tl.where(alive, bent * inverse_temperature, 0.0)
    return index, slope
