"""Calls the CUDA kernels of `elva_kernels._C`, on the tensors' device and its current stream.

As `native`, for bfloat16, float16 and float32. The kernels are compiled where nvcc is found when
the package is installed. Reference: `elva_kernels.reference`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from elva_kernels import block_search, native
from elva_kernels.native import _DTYPE_CODES, _METRIC_CODES, Gradients, Values, _operand

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LEAST_CAPABILITY = (8, 0)
_OPS = {  # for messages
    "reward_forward": "ranking_reward",
    "reward_backward": "ranking_reward",
    "topk_scores": "topk",
} | dict.fromkeys(
    ("unit_rows", "unit_gradient", "score_rows", "column_sums", "slope_rows"), "in-batch op"
)
_WORKSPACE_BYTES = 256 << 20  # of scores that a search holds at once; ours

_ValuesAndGradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def unavailable_reason() -> str | None:
    """None where the kernels can run, else one sentence: what is missing and what to do."""
    facts = native.describe()
    if not facts.get("cuda"):
        return facts["reason"] or (
            "elva_kernels._C was built without CUDA, for no nvcc was found; install the CUDA "
            "toolkit and run pip install again, with ELVA_KERNELS_CUDA=1 to insist"
        )
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "torch sees no NVIDIA GPU"
    capability = torch.cuda.get_device_capability()
    if capability < _LEAST_CAPABILITY:
        found = ".".join(map(str, capability))
        return f"cuda kernels need a GPU of compute capability 8.0 or later, this one has {found}"
    return None


def version() -> str:
    """The build that a verdict on its kernels holds for."""
    return f"_C {native.build_digest()}"


def reward_forward(*inputs: Any, **weights: Any) -> Values:
    """As `native.reward_forward`."""
    return _forward(*inputs, **weights)


def reward_forward_saved(
    *inputs: Any, **weights: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `native.reward_forward_saved`; `saved` is this backend's own."""
    saved = _empty_saved(inputs[2])
    return *_forward(*inputs, saved=saved, **weights), saved


def reward_value_and_grad(*inputs: Any, **weights: Any) -> _ValuesAndGradients:
    """As `native.reward_value_and_grad`."""
    saved = _empty_saved(inputs[2])
    gradients = _empty_gradients(*inputs[:3])
    values = _forward(*inputs, saved=saved, gradients=gradients, **weights)
    return *values, *gradients


def reward_backward(
    query: Tensor, positive: Tensor, negatives: Tensor, saved: Tensor, grad_reward: Tensor
) -> Gradients:
    """As `native.reward_backward`."""
    gradients = _empty_gradients(query, positive, negatives)
    n, dim = negatives.shape[-2:]
    _launch(
        "reward_backward",
        _DTYPE_CODES[query.dtype],
        _place(query),
        tuple(negatives.shape[:-2]),
        n,
        dim,
        _operand(query),
        _operand(positive),
        _operand(negatives),
        _operand(grad_reward),
        saved.data_ptr(),
        *(gradient.data_ptr() for gradient in gradients),
    )
    return gradients


def topk(query: Tensor, corpus: Tensor, k: int, *, metric: str) -> tuple[Tensor, Tensor]:
    """As `native.topk`."""
    q, dim = query.shape
    code = _DTYPE_CODES[query.dtype]
    step = max(1, _WORKSPACE_BYTES // (4 * max(1, q)))
    size = _module().cuda_topk_scratch_bytes(code, q, min(step, len(corpus)), dim)
    scratch = query.new_empty(size, dtype=torch.uint8)

    def scores_of(rows: Tensor) -> Tensor:
        scores = query.new_empty((q, len(rows)), dtype=torch.float32)
        _launch(
            "topk_scores",
            code,
            *_place(query),
            _METRIC_CODES[metric],
            q,
            len(rows),
            dim,
            _operand(query),
            _operand(rows),
            scratch.data_ptr(),
            scores.data_ptr(),
        )
        return scores

    return block_search.search(query, corpus, k, step, scores_of)


def _forward(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    mask: Tensor | None,
    weight: Tensor | None = None,
    *,
    margin: float,
    rank_penalty: float,
    w_margin: float,
    w_rank: float,
    rank_temperature: float = 0.0,
    saved: Tensor | None = None,
    gradients: tuple[Tensor, ...] = (),
) -> Values:
    *leading, n, dim = negatives.shape
    reward, margin_reward, rank_reward = (
        query.new_empty(leading, dtype=torch.float32) for _ in range(3)
    )
    rank = query.new_empty(leading, dtype=torch.int32)
    scores = query.new_empty((*leading, n + 1), dtype=torch.float32)
    values = (reward, margin_reward, rank_reward, rank, scores)
    size = _module().cuda_reward_scratch_bytes(reward.numel(), n)
    scratch = query.new_empty(size, dtype=torch.uint8)
    _launch(
        "reward_forward",
        _DTYPE_CODES[query.dtype],
        (*_place(query), scratch.data_ptr() if size else 0),
        tuple(leading),
        n,
        dim,
        _operand(query),
        _operand(positive),
        _operand(negatives),
        _operand(mask),
        _operand(weight),
        (margin, rank_penalty, w_margin, w_rank, rank_temperature),
        *(value.data_ptr() for value in values),
        0 if saved is None else saved.data_ptr(),
        *([gradient.data_ptr() for gradient in gradients] or (0, 0, 0)),
    )
    return values


def _empty_saved(negatives: Tensor) -> Tensor:
    *leading, n, _ = negatives.shape
    return negatives.new_empty((*leading, 2 * n + 3), dtype=torch.float64)


def _empty_gradients(query: Tensor, positive: Tensor, negatives: Tensor) -> Gradients:
    return (
        query.new_empty(query.shape),
        positive.new_empty(positive.shape),
        negatives.new_empty(negatives.shape),
    )


def _place(tensor: Tensor) -> tuple[int, int]:
    """The device and the stream to launch on."""
    index = tensor.get_device()
    return index, torch.cuda.current_stream(index).cuda_stream


def _launch(function: str, *arguments: Any) -> None:
    try:
        getattr(_module(), f"cuda_{function}")(*arguments)
    except RuntimeError as error:
        raise RuntimeError(f"{_OPS[function]}: {error}") from None


def _module() -> Any:
    return native._module()
