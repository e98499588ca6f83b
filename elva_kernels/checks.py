"""What arguments must hold, said as `<op>: <argument> must <rule>, got <value>[; <what to do>]`.

Calls that pass see comparisons of attributes and nothing else: no tensor is computed, no text made.
"""

from collections.abc import Sequence, Set
from typing import Any, NoReturn

import torch
from torch import Tensor

from elva_kernels.backends.boundary import in_default_float_mode
from elva_kernels.backends.launcher import Groups
from elva_kernels.backends.table import BACKENDS
from elva_kernels.reference import MOST_COLUMNS, RowCodes, Weights, compute_dtype
from elva_kernels.registered.batch import Given
from elva_kernels.scalars import LARGEST as LARGEST
from elva_kernels.scalars import LARGEST_INT
from elva_kernels.scalars import flag as flag
from elva_kernels.scalars import integer as _integer
from elva_kernels.scalars import number as _number
from elva_kernels.scalars import one_of as _one_of
from elva_kernels.scalars import refuse as _refuse
from elva_kernels.scalars import shown as _shown
from elva_kernels.scalars import typed as _typed

WIDEST_COSINE = 2.0
EMBEDDINGS = ("query", "positive", "negatives")
# Below it 1 / temperature leaves float32's range, and the gradient would be NaN. Ours.
LEAST_TEMPERATURE = 1e-6

_DTYPES = frozenset((torch.bfloat16, torch.float16, torch.float32, torch.float64))
_INTEGERS = frozenset((torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64))
_REDUCTIONS = ("mean", "sum", "none")
_SCALES = ("std", "batch", "none")
_METRICS = ("cosine", "dot")
_ROWS_NAMED = 8


def groups(op: str, given: Groups) -> Groups:
    """query [*, D], positive [*, D], negatives [*, N, D], mask and relevance [*, N].

    With an index [*, N] negatives are [M, D]. Returned with the index as int64, and the relevance
    as a constant in the scores' dtype.
    """
    query, positive, negatives, mask, index, relevance = given
    _tensor(op, "query", query, "[*, D]", 1)
    _tensor(op, "positive", positive, "[*, D]", 1)
    _tensor(op, "negatives", negatives, "[*, N, D]" if index is None else "[M, D]", 2)
    _alike(op, "positive", positive, query)
    _alike(op, "negatives", negatives, query)
    shape, rows = query.shape, negatives.shape
    if index is not None:
        _bank(op, negatives, index, query)
        rows = torch.Size((*index.shape, rows[-1]))
        index = index.to(torch.int64)
    if mask is not None:
        _mask(op, mask, query, rows[-2])
    if relevance is not None:
        relevance = _relevance(op, relevance, query, rows[-2])
    if (
        positive.shape != shape
        or rows[:-2] != shape[:-1]
        or rows[-1] != shape[-1]
        or shape[-1] == 0
        or mask is not None
        or relevance is not None
    ):
        _embedding_shapes(op, given)
    return Groups(query, positive, negatives, mask, index, relevance)


def _bank(op: str, negatives: Tensor, index: Tensor, query: Tensor) -> None:
    """Rows [M, D] and integers [*, N] that name them."""
    _indices(op, "negative_index", index, query, "[*, N]")
    if index.dim() < 1:
        _refuse(ValueError, op, "negative_index", "have shape [*, N]", _shape(index))
    if negatives.dim() != 2:
        rule = "have shape [M, D] beside negative_index"
        _refuse(ValueError, op, "negatives", rule, _shape(negatives), "use .flatten(0, -2)")


def _embedding_shapes(op: str, given: Groups) -> None:
    """Equal D, and leading dimensions that broadcast."""
    query, positive, negatives, *_ = given
    size = query.shape[-1]
    if size == 0:
        _refuse(ValueError, op, "query", "have D >= 1", _shape(query))
    if positive.shape[-1] != size:
        _refuse(ValueError, op, "positive", f"have query's D = {size}", _shape(positive))
    if negatives.shape[-1] != size:
        _refuse(ValueError, op, "negatives", f"have query's D = {size}", _shape(negatives))
    _broadcast(op, query.shape[:-1], **_leading(given))


def _leading(given: Groups) -> dict[str, torch.Size]:
    """The leading dimensions of all but the query, by argument."""
    _, positive, negatives, mask, index, relevance = given
    leading = {"positive": positive.shape[:-1]}
    if index is None:
        leading["negatives"] = negatives.shape[:-2]
    else:
        leading["negative_index"] = index.shape[:-1]
    if mask is not None:
        leading["mask"] = mask.shape[:-1]
    if relevance is not None:
        leading["relevance"] = relevance.shape[:-1]
    return leading


def scores(op: str, scores: Tensor, mask: Tensor | None, relevance: Tensor | None) -> Tensor | None:
    """scores [*, C], mask and relevance [*, C - 1]; returns the relevance as `embeddings` does."""
    _tensor(op, "scores", scores, "[*, C]", 1)
    if scores.shape[-1] == 0:
        _refuse(ValueError, op, "scores", "hold the positive's in column 0", _shape(scores))
    if mask is not None:
        _mask(op, mask, scores, scores.shape[-1] - 1)
        _broadcast(op, scores.shape[:-1], mask=mask.shape[:-1])
    if relevance is not None:
        relevance = _relevance(op, relevance, scores, scores.shape[-1] - 1)
        others = {} if mask is None else {"mask": mask.shape[:-1]}
        _broadcast(op, scores.shape[:-1], **others, relevance=relevance.shape[:-1])
    return relevance


def rewards(op: str, reward: Tensor, scale: str, std_eps: float) -> float:
    """reward [*, G] with G >= 1, a known scale; returns std_eps as a float."""
    _tensor(op, "reward", reward, "[*, G]", 1)
    if reward.shape[-1] == 0:
        _refuse(ValueError, op, "reward", "hold a rollout in each group", _shape(reward))
    _one_of(op, "scale", scale, _SCALES)
    return _number(op, "std_eps", std_eps, 0.0, LARGEST)


def weights(op: str, given: Weights, widest_margin: float) -> Weights:
    """The scalars as floats in their ranges."""
    margin, rank_penalty, w_margin, w_rank, temperature = given
    if type(temperature) is not float or temperature != 0.0:
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
    if not isinstance(backend, str) or backend != "auto":
        _one_of(op, "backend", backend, ("auto", *BACKENDS))
    return backend


def batch(
    op: str,
    query: Tensor,
    candidates: Tensor,
    given: Given,
    group: Any,
    check_finite: bool,
) -> Given:
    """query [B, D], candidates [M, D], and who is compared with whom; its max_score as a float."""
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
    _targets(op, given.target, query, b, m)
    if given.excluded is not None:
        _indices(op, "excluded", given.excluded, query, "[E, 2]")
        if given.excluded.dim() != 2 or given.excluded.shape[1] != 2:
            rule = "have shape [E, 2], a query and a candidate each"
            _refuse(ValueError, op, "excluded", rule, _shape(given.excluded))
    ids = given.candidate_ids
    if ids is not None:
        _indices(op, "candidate_ids", ids, query, "[M]")
        if ids.dim() != 1 or ids.shape[0] != m:
            _refuse(ValueError, op, "candidate_ids", f"have shape [M] = [{m}]", _shape(ids))
    _group(op, group, given)
    if flag(op, "check_finite", check_finite):
        for name, rows in (("query", query), ("candidates", candidates)):
            _finite(op, name, torch.isfinite(rows).all(-1), "rows")
    if given.max_score is None:
        return given
    return given._replace(max_score=max_score(op, given.max_score))


def _targets(op: str, target: Tensor | None, query: Tensor, b: int, m: int) -> None:
    if target is not None:
        _indices(op, "target", target, query, "[B] or [B, P]")
        sizes = target.shape
        if len(sizes) not in (1, 2) or sizes[0] != b or 0 in sizes[1:]:
            rule = f"have shape [B] or [B, P] with B = {b} and P >= 1"
            _refuse(ValueError, op, "target", rule, _shape(target))
    elif b > m:
        rule = f"be given where queries ({b}) outnumber candidates ({m})"
        _refuse(ValueError, op, "target", rule, "None", "pass each query's row of candidates")


def _group(op: str, group: Any, given: Given) -> None:
    """A process group that this process belongs to, and what it alone gives a meaning."""
    flag(op, "global_target", given.global_target)
    if group is None:
        if given.global_target:
            todo = "pass the group, or leave it False"
            _refuse(ValueError, op, "global_target", "come with a group", "True", todo)
        return
    distributed = torch.distributed
    if not distributed.is_available() or not isinstance(group, distributed.ProcessGroup):
        got = _typed(group)
        todo = "pass torch.distributed.group.WORLD once init_process_group was called"
        _refuse(TypeError, op, "group", "be a torch.distributed.ProcessGroup", got, todo)
    if given.global_target and given.target is None:
        rule = "be given where global_target is"
        _refuse(ValueError, op, "target", rule, "None", "pass each query's row of all candidates")


def wrt(op: str, value: Sequence[str], names: Sequence[str]) -> tuple[bool, ...]:
    """Which of the gradients called `names` are asked for."""
    if type(value) is not tuple and (
        isinstance(value, str) or not isinstance(value, Sequence | Set)
    ):
        todo = f"use {(value,)!r}" if isinstance(value, str) else ""
        _refuse(TypeError, op, "wrt", "be a tuple of names", _typed(value), todo)
    for name in value:
        if not isinstance(name, str) or name not in names:
            _refuse(ValueError, op, "wrt", f"name some of {', '.join(names)}", _shown(name))
    return tuple(name in value for name in names)


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
    value = _integer(op, argument, value)
    if value < least:
        _refuse(ValueError, op, argument, f"be at least {least}", _shown(value))
    if value > LARGEST_INT:
        _refuse(ValueError, op, argument, "be at most 2^63 - 1", _shown(value))
    return value


def reduction(op: str, value: str) -> None:
    """How losses become a loss."""
    _one_of(op, "reduction", value, _REDUCTIONS)


def upstream(op: str, weight: Tensor, given: Groups) -> Tensor:
    """weight, broadcastable to the reward [*]; returned in the reward's dtype."""
    query, others = given.query, _leading(given).values()
    return upstream_of(op, weight, query, torch.broadcast_shapes(query.shape[:-1], *others))


@in_default_float_mode
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


def search(op: str, query: Tensor, corpus: Tensor, k: int, metric: str, backend: str) -> int:
    """query [Q, D], corpus [P, D], a known metric; returns k >= 0."""
    _tensor(op, "query", query, "[Q, D]", 2)
    _tensor(op, "corpus", corpus, "[P, D]", 2)
    _alike(op, "corpus", corpus, query)
    for name, rows in (("query", query), ("corpus", corpus)):
        if rows.dim() != 2 or rows.shape[1] == 0:
            _refuse(ValueError, op, name, "have shape [rows, D] with D >= 1", _shape(rows))
    if corpus.shape[1] != query.shape[1]:
        rule = f"have query's D = {query.shape[1]}"
        _refuse(ValueError, op, "corpus", rule, _shape(corpus))
    k = _integer(op, "k", k)
    if not 0 <= k <= LARGEST_INT:
        _refuse(ValueError, op, "k", "be in [0, 2^63 - 1]", _shown(k))
    _one_of(op, "metric", metric, _METRICS)
    known_backend(op, backend)
    return k


def coded_rows(op: str, corpus: Tensor, backend: str, name: str = "corpus") -> None:
    """Rows [P, D] that have codes."""
    _tensor(op, name, corpus, "[P, D]", 2)
    if corpus.dim() != 2 or not 1 <= corpus.shape[1] <= MOST_COLUMNS:
        rule = f"have shape [P, D] with D from 1 to {MOST_COLUMNS}"
        _refuse(ValueError, op, name, rule, _shape(corpus))
    known_backend(op, backend)


def coded_search(
    op: str,
    query: Tensor,
    corpus: Tensor | Sequence[Tensor],
    codes: RowCodes | Sequence[RowCodes],
    k: int,
    mask: Tensor | None,
    backend: str,
) -> tuple[list[Tensor], list[RowCodes], int]:
    """query [Q, D], one or several corpora [P, D] with codes, mask [all P], k >= 0."""
    coded_rows(op, query, backend, "query")
    parts = _several(op, "corpus", corpus, Tensor)
    coded = _several(op, "codes", codes, RowCodes)
    if len(parts) != len(coded):
        _refuse(ValueError, op, "codes", f"be {len(parts)}, one of each corpus", str(len(coded)))
    for part, its in zip(parts, coded, strict=True):
        coded_rows(op, part, backend)
        _codes(op, query, part, its)
    k = _integer(op, "k", k)
    if not 0 <= k <= LARGEST_INT:
        _refuse(ValueError, op, "k", "be in [0, 2^63 - 1]", _shown(k))
    rows = sum(len(part) for part in parts)
    if mask is not None:
        _typed_rows(op, "mask", "", mask, torch.bool, (rows,), query)
    return parts, coded, k


def _several(op: str, name: str, given: Any, kind: type) -> list[Any]:
    """One of a kind, or some of them, as a list."""
    some = [given] if isinstance(given, kind) else given
    if not isinstance(some, list | tuple) or not all(isinstance(x, kind) for x in some):
        rule = f"be a {kind.__name__}, or a list of them"
        _refuse(TypeError, op, name, rule, type(given).__name__)
    return [*some]


def _codes(op: str, query: Tensor, corpus: Tensor, codes: RowCodes) -> None:
    """The codes of these rows, as far as shapes say, beside queries that can be compared."""
    if corpus.shape[1] != query.shape[1]:
        _refuse(ValueError, op, "corpus", f"have query's D = {query.shape[1]}", _shape(corpus))
    wider = query.element_size() > corpus.element_size()
    if not wider and corpus.dtype != query.dtype:
        rule = f"have query's dtype {query.dtype}, or fewer bits"
        _refuse(TypeError, op, "corpus", rule, str(corpus.dtype), "convert the query with .float()")
    if corpus.device != query.device:
        _refuse_device(op, "corpus", corpus, query.device)
    shapes = (corpus.shape, corpus.shape[:1], corpus.shape[:1])
    dtypes = (torch.int8, torch.float32, torch.float32)
    for name, x, shape, dtype in zip(codes._fields, codes, shapes, dtypes, strict=True):
        _typed_rows(op, "codes", name, x, dtype, shape, query)


def _typed_rows(
    op: str,
    argument: str,
    part: str,
    value: Tensor,
    dtype: torch.dtype,
    shape: Sequence[int],
    query: Tensor,
) -> None:
    """A tensor of one dtype and shape, a `part` of an argument or all of it."""
    of = f"have {part} of" if part else "be a tensor of"
    rule = f"{of} {str(dtype).removeprefix('torch.')} {list(shape)}"
    if not isinstance(value, Tensor):
        _refuse(TypeError, op, argument, rule, type(value).__name__)
    if value.dtype != dtype:
        _refuse(TypeError, op, argument, rule, str(value.dtype))
    _dense(op, argument, value)
    if value.shape != torch.Size(shape):
        _refuse(ValueError, op, argument, rule, _shape(value))
    if value.device != query.device:
        _refuse_device(op, argument, value, query.device)


def finite_rows(op: str, given: Groups) -> None:
    """No NaN and no inf in any row that is read."""
    query, positive, negatives, mask, index, _ = given
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
    if sound.is_meta:
        return
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
    _dense(op, argument, value)
    if value.dim() < least_dims:
        _refuse(ValueError, op, argument, f"have shape {shape}", _shape(value))


def _dense(op: str, argument: str, value: Tensor) -> None:
    if value.is_nested:
        advice = "use torch.nested.to_padded_tensor; mask or drop its padding"
        _refuse(ValueError, op, argument, "be dense", "a nested tensor", advice)
    if value.layout is not torch.strided:
        _refuse(ValueError, op, argument, "be dense", str(value.layout), "use .to_dense()")


def _indices(op: str, argument: str, value: Tensor, query: Tensor, shape: str) -> None:
    """Integers on the query's device."""
    if not isinstance(value, Tensor):
        got = type(value).__name__
        _refuse(TypeError, op, argument, f"be a tensor {shape}", got, "use torch.as_tensor")
    if value.dtype not in _INTEGERS:
        _refuse(
            TypeError, op, argument, "hold integers", str(value.dtype), "convert it with .long()"
        )
    _dense(op, argument, value)
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
    _dense(op, "mask", mask)
    if mask.device != beside.device:
        _refuse_device(op, "mask", mask, beside.device)
    if mask.dim() < 1 or mask.shape[-1] != n_negatives:
        _refuse(ValueError, op, "mask", f"have shape [*, N] with N = {n_negatives}", _shape(mask))


@in_default_float_mode
def _relevance(op: str, relevance: Tensor, beside: Tensor, n_negatives: int) -> Tensor:
    """relevance [*, N] as a constant in the scores' dtype; what it holds is asked by the op."""
    _tensor(op, "relevance", relevance, "[*, N]", 0)
    if relevance.device != beside.device:
        _refuse_device(op, "relevance", relevance, beside.device)
    if relevance.dim() < 1 or relevance.shape[-1] != n_negatives:
        rule = f"have shape [*, N] with N = {n_negatives}"
        _refuse(ValueError, op, "relevance", rule, _shape(relevance))
    return relevance.detach().to(compute_dtype(beside.dtype))


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


def _refuse_device(op: str, argument: str, value: Tensor, device: torch.device) -> NoReturn:
    rule = f"be on the first tensor's device {device}"
    _refuse(ValueError, op, argument, rule, str(value.device), f"move it with .to({str(device)!r})")


def _shape(tensor: Tensor) -> str:
    return f"shape {list(tensor.shape)}"
