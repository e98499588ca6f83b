"""Reward of given scores, and its gradient on them.

Eq. 2 to 6 of `elva_kernels.reference` (Liu et al., ELVA, arXiv:2606.20280, sec. 3.4), 3g and 4g.
In: scores [*, C] of bfloat16, float16, float32 or float64, any strides; mask [*, C - 1] or None;
    relevance [*, C - 1] in the reward's dtype, dense, or None; upstream [*] in the reward's dtype,
    for the gradient.
Out: reward, margin_reward, rank_reward [*], live scores [*, C] in float32 (float64 for float64),
    rank int32 [*]; or the gradient [*, C] in the scores' dtype. All contiguous.
Work split: one program = one group. Bytes: 2 C reads and C writes; the C^2 comparisons dominate.
Numerics, ties: `ranks`. Deterministic. Reference: reward_from_scores, reward_from_scores_backward.
"""

# mypy: ignore-errors
# Triton compiles these functions from their source; to Python their arguments have no type.

import triton
import triton.language as tl

from elva_kernels.backends.triton.kernels.ranks import live_candidates, load_slope, settle

# No load's width depends on these: a kernel is not compiled anew for them, which takes seconds.
SIZES = ["candidates", "inner", "score_outer", "score_inner", "score_step"]
SIZES += ["mask_outer", "mask_inner", "mask_step", "upstream_outer", "upstream_inner"]
TENSORS = ["scores", "mask", "relevance", "upstream", "reward", "margin_reward", "rank_reward"]
TENSORS += ["rank", "live_scores", "slopes", "grad_scores"]


@triton.jit
def lead(group, inner, strides):
    """Offset of a group: its place in two leading dimensions, the inner one of `inner`."""
    return (group // inner) * strides[0] + (group % inner) * strides[1]


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=TENSORS)
def scores_kernel(
    scores, mask, relevance, reward, margin_reward, rank_reward, rank, live_scores,
    candidates, inner, score_outer, score_inner, score_step, mask_outer, mask_inner, mask_step,
    margin: tl.float64, rank_penalty: tl.float64, w_margin: tl.float64, w_rank: tl.float64,
    inverse_temperature: tl.float64, SOFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The rewards."""
    VALUE: tl.constexpr = live_scores.dtype.element_ty
    group = tl.program_id(0).to(tl.int64)
    scores += lead(group, inner, (score_outer, score_inner))
    if mask is not None:
        mask += lead(group, inner, (mask_outer, mask_inner))
    if relevance is not None:
        relevance += group * (candidates - 1)
    settle(
        scores, score_step, mask, mask_step, relevance, None, candidates, reward + group,
        margin_reward + group, rank_reward + group, rank + group, margin, rank_penalty, w_margin,
        w_rank, inverse_temperature, SOFT, BLOCK,
    )  # fmt: skip
    for start in range(0, candidates, BLOCK):
        index = start + tl.arange(0, BLOCK).to(tl.int64)
        live = live_candidates(mask, mask_step, index, candidates)
        score = tl.load(scores + index * score_step, mask=live, other=float("-inf")).to(VALUE)
        tl.store(live_scores + group * candidates + index, score, mask=index < candidates)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=TENSORS)
def scores_gradient_kernel(
    scores, mask, relevance, upstream, slopes, grad_scores,
    candidates, inner, score_outer, score_inner, score_step, mask_outer, mask_inner, mask_step,
    upstream_outer, upstream_inner,
    margin: tl.float64, rank_penalty: tl.float64, w_margin: tl.float64, w_rank: tl.float64,
    inverse_temperature: tl.float64, SOFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient; `slopes` is scratch, float64 [*, 2, C]."""
    group = tl.program_id(0).to(tl.int64)
    scores += lead(group, inner, (score_outer, score_inner))
    if mask is not None:
        mask += lead(group, inner, (mask_outer, mask_inner))
    if relevance is not None:
        relevance += group * (candidates - 1)
    weight = tl.load(upstream + lead(group, inner, (upstream_outer, upstream_inner))).to(tl.float64)
    slopes += group * candidates * 2
    settle(
        scores, score_step, mask, mask_step, relevance, slopes, candidates, None, None, None, None,
        margin, rank_penalty, w_margin, w_rank, inverse_temperature, SOFT, BLOCK,
    )  # fmt: skip
    tl.debug_barrier()
    for start in range(0, candidates, BLOCK):
        index, slope = load_slope(
            scores, score_step, mask, mask_step, slopes, start, candidates,
            inverse_temperature, SOFT, BLOCK,
        )  # fmt: skip
        live = live_candidates(mask, mask_step, index, candidates)
        out = grad_scores + group * candidates + index
        gradient = tl.where(live, weight * slope, 0.0)
        if grad_scores.dtype.element_ty != tl.float64:
            gradient = gradient.to(tl.float32)
        tl.store(out, gradient, mask=index < candidates)
