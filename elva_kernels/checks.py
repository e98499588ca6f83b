"""What arguments must hold, said as `<op>: <argument> must <rule>, got <value>[; <what to do>]`.

Calls that pass see comparisons of attributes and nothing else: no tensor is computed, no text made.
"""

import math
import numbers
import sys
from collections.abc import Sequence, Set
from typing import Any, NoReturn

import torch
from torch import Tensor

from elva_kernels.backends.table import BACKENDS
from elva_kernels.reference import Wanted, Weights, compute_dtype

WIDEST_COSINE = 2.0
LARGEST = sys.float_info.max
EMBEDDINGS = ("query", "positive", "negatives")
# Below it 1 / temperature leaves float32's range, and the gradient would be NaN. Ours.
LEAST_TEMPERATURE = 1e-6

_DTYPES = frozenset((torch.bfloat16, torch.float16, torch.float32, torch.float64))
_INTEGERS = frozenset((torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64))
_REDUCTIONS = ("mean", "sum", "none")
_SCALES = ("std", "batch", "none")
_METRICS = ("cosine", "dot")
_LARGEST_K = 2**63 - 1
_ROWS_NAMED = 8


def embeddings(
    op: str,
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    mask: Tensor | None,
    negative_index: Tensor | None = None,
) -> Tensor | None:
    """query [*, D], positive [*, D], negatives [*, N, D], mask [*, N]; returns the index as int64.

    With negative_index [*, N] negatives are [M, D].
    """
    _tensor(op, "query", query, "[*, D]", 1)
    _tensor(op, "positive", positive, "[*, D]", 1)
    _tensor(op, "negatives", negatives, "[*, N, D]" if negative_index is None else "[M, D]", 2)
    _alike(op, "positive", positive, query)
    _alike(op, "negatives", negatives, query)
    shape, rows = query.shape, negatives.shape
    if negative_index is not None:
        _bank(op, negatives, negative_index, query)
        rows = torch.Size((*negative_index.shape, rows[-1]))
        negative_index = negative_index.to(torch.int64)
    if mask is not None:
        _mask(op, mask, query, rows[-2])
    if (
        positive.shape != shape
        or rows[:-2] != shape[:-1]
        or rows[-1] != shape[-1]
        or shape[-1] == 0
        or mask is not None
    ):
        _embedding_shapes(op, query, positive, negatives, mask, negative_index)
    return negative_index


def _bank(op: str, negatives: Tensor, index: Tensor, query: Tensor) -> None:
    """Rows [M, D] and integers [*, N] that name them."""
    _indices(op, "negative_index", index, query, "[*, N]")
    if index.dim() < 1:
        _refuse(ValueError, op, "negative_index", "have shape [*, N]", _shape(index))
    if negatives.dim() != 2:
        rule = "have shape [M, D] beside negative_index"
        _refuse(ValueError, op, "negatives", rule, _shape(negatives), "use .flatten(0, -2)")


def _embedding_shapes(
    op: str,
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    mask: Tensor | None,
    index: Tensor | None,
) -> None:
    """Equal D, and leading dimensions that broadcast."""
    size = query.shape[-1]
    if size == 0:
        _refuse(ValueError, op, "query", "have D >= 1", _shape(query))
    if positive.shape[-1] != size:
        _refuse(ValueError, op, "positive", f"have query's D = {size}", _shape(positive))
    if negatives.shape[-1] != size:
        _refuse(ValueError, op, "negatives", f"have query's D = {size}", _shape(negatives))
    _broadcast(op, query.shape[:-1], **_leading(positive, negatives, mask, index))


def _leading(
    positive: Tensor, negatives: Tensor, mask: Tensor | None, index: Tensor | None
) -> dict[str, torch.Size]:
    """The leading dimensions of all but the query, by argument."""
    leading = {"positive": positive.shape[:-1]}
    if index is None:
        leading["negatives"] = negatives.shape[:-2]
    else:
        leading["negative_index"] = index.shape[:-1]
    if mask is not None:
        leading["mask"] = mask.shape[:-1]
    return leading


def wanted(op: str, names: Sequence[str]) -> Wanted:
    """Whether each of query, positive and negatives is among the names."""
    if isinstance(names, str) or not isinstance(names, Sequence):
        got = f"{type(names).__name__} {names!r}"
        _refuse(TypeError, op, "wrt", "be a tuple of names", got, f"use {(names,)!r}")
    for name in names:
        if name not in EMBEDDINGS:
            _refuse(ValueError, op, "wrt", f"name some of {', '.join(EMBEDDINGS)}", repr(name))
    query, positive, negatives = (name in names for name in EMBEDDINGS)
    return query, positive, negatives


def scores(op: str, scores: Tensor, mask: Tensor | None) -> None:
    """scores [*, C], mask [*, C - 1]."""
    _tensor(op, "scores", scores, "[*, C]", 1)
    if scores.shape[-1] == 0:
        _refuse(ValueError, op, "scores", "hold the positive's in column 0", _shape(scores))
    if mask is not None:
        _mask(op, mask, scores, scores.shape[-1] - 1)
        _broadcast(op, scores.shape[:-1], mask=mask.shape[:-1])


def rewards(op: str, reward: Tensor, scale: str, std_eps: float) -> float:
    """reward [*, G] with G >= 1, a known scale; returns std_eps as a float."""
    _tensor(op, "reward", reward, "[*, G]", 1)
    if reward.shape[-1] == 0:
        _refuse(ValueError, op, "reward", "hold a rollout in each group", _shape(reward))
    if scale not in _SCALES:
        _refuse(ValueError, op, "scale", f"be one of {', '.join(_SCALES)}", repr(scale))
    return _number(op, "std_eps", std_eps, 0.0, LARGEST)


def weights(op: str, given: Weights, widest_margin: float) -> Weights:
    """The scalars as floats in their ranges."""
    margin, rank_penalty, w_margin, w_rank, temperature = given
    if temperature != 0.0 or type(temperature) is not float:
        temperature = _number(op, "rank_temperature", temperature, 0.0, LARGEST)
        if 0.0 < temperature < LEAST_TEMPERATURE:
            rule = f"be 0 or at least {LEAST_TEMPERATURE}"
            _refuse(ValueError, op, "rank_temperature", rule, repr(temperature))
    return Weights(
        _number(op, "margin", margin, -widest_margin, widest_margin),
        _number(op, "rank_penalty", rank_penalty, 0.0, LARGEST),
        _number(op, "w_margin", w_margin, 0.0, LARGEST),
        _number(op, "w_rank", w_rank, 0.0, LARGEST),
        temperature,
    )


def known_backend(op: str, backend: str) -> str:
    """A name that `backend` may have; whether it runs here is asked when it is called."""
    if backend != "auto" and backend not in BACKENDS:
        names = ", ".join(("auto", *BACKENDS))
        _refuse(ValueError, op, "backend", f"be one of {names}", repr(backend))
    return backend


def batch(
    op: str,
    query: Tensor,
    candidates: Tensor,
    target: Tensor | None,
    excluded: Tensor | None,
    candidate_ids: Tensor | None,
    check_finite: bool,
) -> None:
    """query [B, D], candidates [M, D], target [B] or [B, P], excluded [E, 2], candidate_ids [M]."""
    for name, rows, shape in (("query", query, "[B, D]"), ("candidates", candidates, "[M, D]")):
        _tensor(op, name, rows, shape, 2)
        if rows.dim() != 2:
            _refuse(
                ValueError, op, name, f"have shape {shape}", _shape(rows), "use .flatten(0, -2)"
            )
    _alike(op, "candidates", candidates, query)
    (b, size), m = query.shape, candidates.shape[0]
    if size == 0:
        _refuse(ValueError, op, "query", "have D >= 1", _shape(query))
    if candidates.shape[1] != size:
        _refuse(ValueError, op, "candidates", f"have query's D = {size}", _shape(candidates))
    if target is not None:
        _indices(op, "target", target, query, "[B] or [B, P]")
        sizes = target.shape
        if len(sizes) not in (1, 2) or sizes[0] != b or 0 in sizes[1:]:
            rule = f"have shape [B] or [B, P] with B = {b} and P >= 1"
            _refuse(ValueError, op, "target", rule, _shape(target))
    elif b > m:
        rule = f"be given where queries ({b}) outnumber candidates ({m})"
        _refuse(ValueError, op, "target", rule, "None", "pass each query's row of candidates")
    if excluded is not None:
        _indices(op, "excluded", excluded, query, "[E, 2]")
        if excluded.dim() != 2 or excluded.shape[1] != 2:
            rule = "have shape [E, 2], a query and a candidate each"
            _refuse(ValueError, op, "excluded", rule, _shape(excluded))
    if candidate_ids is not None:
        _indices(op, "candidate_ids", candidate_ids, query, "[M]")
        if candidate_ids.dim() != 1 or candidate_ids.shape[0] != m:
            rule = f"have shape [M] = [{m}]"
            _refuse(ValueError, op, "candidate_ids", rule, _shape(candidate_ids))
    if check_finite:
        for name, rows in (("query", query), ("candidates", candidates)):
            _finite(op, name, torch.isfinite(rows).all(-1), "rows")


def wrt(op: str, value: Sequence[str], names: Sequence[str]) -> list[bool]:
    """Which of the gradients called `names` are asked for."""
    if isinstance(value, str) or not isinstance(value, Sequence | Set):
        got = f"{type(value).__name__} {value!r}"
        _refuse(TypeError, op, "wrt", "be a sequence of names", got)
    for name in value:
        if name not in names:
            _refuse(ValueError, op, "wrt", f"name some of {', '.join(names)}", repr(name))
    return [name in value for name in names]


def temperature_number(op: str, value: float) -> float:
    """A temperature that is known beforehand, as a float."""
    number = _number(op, "temperature", value, -LARGEST, LARGEST)
    if number < LEAST_TEMPERATURE:
        _refuse(ValueError, op, "temperature", f"be at least {LEAST_TEMPERATURE}", repr(number))
    return number


def temperature(op: str, value: float | Tensor, query: Tensor) -> Tensor:
    """The temperature as a tensor [], float64 where it came as a number."""
    if not isinstance(value, Tensor):
        number = temperature_number(op, value)
        return torch.full((), number, dtype=torch.float64, device=query.device)
    _tensor(op, "temperature", value, "[]", 0)
    if value.device != query.device:
        _refuse_device(op, "temperature", value, query.device)
    if value.numel() != 1:
        _refuse(ValueError, op, "temperature", "hold one number", _shape(value))
    return value.reshape(())


def max_score(op: str, value: float | None) -> float | None:
    """A finite number as a float, or None."""
    return None if value is None else _number(op, "max_score", value, -LARGEST, LARGEST)


def count(op: str, argument: str, value: int, least: int) -> int:
    """An integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        _refuse(TypeError, op, argument, "be an int", f"{type(value).__name__} {value!r}")
    if value < least:
        _refuse(ValueError, op, argument, f"be at least {least}", str(value))
    return value


def reduction(op: str, value: str) -> None:
    """How losses become a loss."""
    if value not in _REDUCTIONS:
        _refuse(ValueError, op, "reduction", f"be one of {', '.join(_REDUCTIONS)}", repr(value))


def upstream(
    op: str,
    weight: Tensor,
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    mask: Tensor | None,
    index: Tensor | None,
) -> Tensor:
    """weight, broadcastable to the reward [*]; returned in the reward's dtype."""
    others = _leading(positive, negatives, mask, index).values()
    return upstream_of(op, weight, query, torch.broadcast_shapes(query.shape[:-1], *others))


def upstream_of(op: str, weight: Tensor, query: Tensor, batch: Sequence[int]) -> Tensor:
    """weight, broadcastable to the reward's shape `batch`; returned in the reward's dtype."""
    _tensor(op, "weight", weight, "[*]", 0)
    if weight.device != query.device:
        _refuse_device(op, "weight", weight, query.device)
    batch = torch.Size(batch)
    if weight.shape != batch and not _expands_to(weight.shape, batch):
        rule = f"broadcast to the reward's shape {list(batch)}"
        _refuse(ValueError, op, "weight", rule, _shape(weight))
    return weight.detach().to(compute_dtype(query.dtype))


def search(op: str, query: Tensor, corpus: Tensor, k: int, metric: str, backend: str) -> None:
    """query [Q, D], corpus [P, D], k >= 0, a known metric."""
    _tensor(op, "query", query, "[Q, D]", 2)
    _tensor(op, "corpus", corpus, "[P, D]", 2)
    _alike(op, "corpus", corpus, query)
    for name, rows in (("query", query), ("corpus", corpus)):
        if rows.dim() != 2 or rows.shape[1] == 0:
            _refuse(ValueError, op, name, "have shape [rows, D] with D >= 1", _shape(rows))
    if corpus.shape[1] != query.shape[1]:
        rule = f"have query's D = {query.shape[1]}"
        _refuse(ValueError, op, "corpus", rule, _shape(corpus))
    if isinstance(k, bool) or not isinstance(k, (int, torch.SymInt)):
        _refuse(TypeError, op, "k", "be an int", f"{type(k).__name__} {k!r}")
    if not 0 <= k <= _LARGEST_K:
        _refuse(ValueError, op, "k", "be in [0, 2^63 - 1]", repr(k))
    if metric not in _METRICS:
        _refuse(ValueError, op, "metric", f"be one of {', '.join(_METRICS)}", repr(metric))
    known_backend(op, backend)


def finite_rows(
    op: str,
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    mask: Tensor | None,
    index: Tensor | None,
) -> None:
    """No NaN and no inf in any row that is read."""
    for name, rows in (("query", query), ("positive", positive)):
        _finite(op, name, torch.isfinite(rows).all(-1), "rows")
    sound = torch.isfinite(negatives).all(-1)
    if index is not None:
        named = index if mask is None else torch.where(mask, index, -1)
        named = named[(named >= 0) & (named < len(sound))]
        unread = torch.ones_like(sound).index_fill(0, named, False)
        _finite(op, "negatives", sound | unread, "rows")
        return
    _finite(op, "negatives", sound if mask is None else sound | ~mask, "rows")


def finite_scores(op: str, scores: Tensor, mask: Tensor | None) -> None:
    """No NaN and no inf in any live score."""
    sound = torch.isfinite(scores)
    if mask is not None:
        sound = sound | ~torch.nn.functional.pad(mask, (1, 0), value=True)
    _finite(op, "scores", sound, "entries")


def _finite(op: str, argument: str, sound: Tensor, places: str) -> None:
    functorch: Any = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(sound):  # of all members of a `torch.vmap`
        sound = functorch.get_unwrapped(sound)
    if bool(sound.all()):
        return
    found = (~sound).nonzero().tolist()
    named = ", ".join(str(index) for index in found[:_ROWS_NAMED])
    more = f" and {len(found) - _ROWS_NAMED} more" if len(found) > _ROWS_NAMED else ""
    _refuse(ValueError, op, argument, "be finite", f"NaN or inf in {places} {named}{more}")


def _tensor(op: str, argument: str, value: Tensor, shape: str, least_dims: int) -> None:
    if not isinstance(value, Tensor):
        got = type(value).__name__
        _refuse(TypeError, op, argument, f"be a tensor {shape}", got, "use torch.as_tensor")
    if value.dtype not in _DTYPES:
        rule = "be bfloat16, float16, float32 or float64"
        _refuse(TypeError, op, argument, rule, str(value.dtype), "convert it with .to()")
    if value.layout is not torch.strided:
        _refuse(ValueError, op, argument, "be dense", str(value.layout), "use .to_dense()")
    if value.dim() < least_dims:
        _refuse(ValueError, op, argument, f"have shape {shape}", _shape(value))


def _indices(op: str, argument: str, value: Tensor, query: Tensor, shape: str) -> None:
    """Integers on the query's device."""
    if not isinstance(value, Tensor):
        got = type(value).__name__
        _refuse(TypeError, op, argument, f"be a tensor {shape}", got, "use torch.as_tensor")
    if value.dtype not in _INTEGERS:
        _refuse(
            TypeError, op, argument, "hold integers", str(value.dtype), "convert it with .long()"
        )
    if value.layout is not torch.strided:
        _refuse(ValueError, op, argument, "be dense", str(value.layout), "use .to_dense()")
    if value.device != query.device:
        _refuse_device(op, argument, value, query.device)


def _alike(op: str, argument: str, value: Tensor, query: Tensor) -> None:
    if value.dtype != query.dtype:
        rule = f"have query's dtype {query.dtype}"
        _refuse(TypeError, op, argument, rule, str(value.dtype), "convert it with .to(query.dtype)")
    if value.device != query.device:
        _refuse_device(op, argument, value, query.device)


def _mask(op: str, mask: Tensor, beside: Tensor, n_negatives: int) -> None:
    if not isinstance(mask, Tensor):
        got = type(mask).__name__
        _refuse(TypeError, op, "mask", "be a bool tensor [*, N]", got, "use torch.as_tensor")
    if mask.dtype != torch.bool:
        rule = "be bool, True where a negative is live"
        _refuse(TypeError, op, "mask", rule, str(mask.dtype), "convert it with .bool()")
    if mask.layout is not torch.strided:
        _refuse(ValueError, op, "mask", "be dense", str(mask.layout), "use .to_dense()")
    if mask.device != beside.device:
        _refuse_device(op, "mask", mask, beside.device)
    if mask.dim() < 1 or mask.shape[-1] != n_negatives:
        _refuse(ValueError, op, "mask", f"have shape [*, N] with N = {n_negatives}", _shape(mask))


def _broadcast(op: str, leading: torch.Size, **others: torch.Size) -> None:
    """Leading dimensions broadcast, one argument after the other, so that the error names one."""
    for argument, shape in others.items():
        try:
            leading = torch.broadcast_shapes(leading, shape)
        except RuntimeError as error:
            rule = f"have leading dimensions that broadcast with {list(leading)}"
            raise ValueError(f"{op}: {argument} must {rule}, got {list(shape)}") from error


def _expands_to(shape: torch.Size, batch: torch.Size) -> bool:
    trailing = batch[len(batch) - len(shape) :]
    return len(shape) <= len(batch) and all(
        size in (1, whole) for size, whole in zip(shape, trailing, strict=True)
    )


def _number(op: str, argument: str, value: float, least: float, most: float) -> float:
    if type(value) is float and least <= value <= most:
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        _refuse(TypeError, op, argument, "be a number", f"{type(value).__name__} {value!r}")
    number = float(value)
    if not math.isfinite(number) or not least <= number <= most:
        _refuse(ValueError, op, argument, f"be {_range(least, most)}", repr(number))
    return number


def _range(least: float, most: float) -> str:
    if most < LARGEST:
        return f"in [{least:g}, {most:g}]"
    return "finite" if least < 0 else f"finite and at least {least:g}"


def _refuse_device(op: str, argument: str, value: Tensor, device: torch.device) -> NoReturn:
    rule = f"be on the first tensor's device {device}"
    _refuse(ValueError, op, argument, rule, str(value.device), f"move it with .to({str(device)!r})")


def _refuse(
    error: type[Exception], op: str, argument: str, rule: str, got: Any, todo: str = ""
) -> NoReturn:
    raise error(f"{op}: {argument} must {rule}, got {got}{'; ' if todo else ''}{todo}")


def _shape(tensor: Tensor) -> str:
    return f"shape {list(tensor.shape)}"
