"""Proofs of every op inside what a process may do: autocast, switches, streams, graphs."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

import elva_kernels
from benchmarks.gpu.place import BATCHED, WEIGHTS, Place, Red, flat, same_bits, within
from elva_kernels.backends.choice import failure_of, launcher
from elva_kernels.backends.table import BACKENDS, LAUNCHERS


class Case(NamedTuple):
    """An op on inputs of some shapes."""

    shapes: tuple[tuple[int, ...], ...]
    op: Callable[..., Any]


# The public ops that a case proves, and all launchers behind them.
SUBJECTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "reward": (
        ("ranking_reward_and_grad", "ranking_reward"),
        ("ranking_reward_saved", "ranking_reward_backward"),
    ),
    "statistics": (("rank_statistics",), ()),
    "info_nce": (("info_nce", "info_nce_and_grad"), ("info_nce_share",)),
    "in-batch reward": (("in_batch_ranking_reward",), ("in_batch_ranking_reward_backward",)),
    "topk": (("topk",), ()),
}


def case_of(subject: str, place: Place, backend: str) -> Case:
    small = place.small
    groups = ((4, 64), (4, 64), (4, 20, 64)) if small else ((8, 1536), (8, 1536), (8, 100, 1536))
    pair = ((16, 64), (40, 64)) if small else ((192, 768), (400, 768))
    rows = ((5, 64), (900, 64)) if small else ((40, 768), (20_000, 768))
    named = {"backend": backend}
    both = {"temperature": 0.1, "symmetric": True}
    e, bind = elva_kernels, functools.partial
    return {
        "reward": Case(groups, bind(e.ranking_reward_and_grad, **WEIGHTS, **named)),
        "statistics": Case(pair, bind(e.rank_statistics, k=5, temperature=0.1, **named)),
        "info_nce": Case(pair, bind(e.info_nce_and_grad, **both, **named)),
        "in-batch reward": Case(pair, bind(e.in_batch_ranking_reward_and_grad, head=7, **named)),
        "topk": Case(rows, bind(e.topk, k=10, **named)),
    }[subject]


def inputs_of(place: Place, case: Case) -> list[Tensor]:
    return [place.randn(*shape) for shape in case.shapes]


class Switch(NamedTuple):
    """One of a process, as torch names it, and a value that it has seldom."""

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], None]
    value: Any
    keeps_bits: bool = True  # else torch has no such product, and ours takes its place


def attribute(where: str, name: str, value: Any, keeps_bits: bool = True) -> list[Switch]:
    """Of `torch.<where>`, if this torch has it."""
    holder = functools.reduce(getattr, where.split("."), torch)
    if not hasattr(type(holder), name) and not hasattr(holder, name):
        return []
    read, write = (functools.partial(f, holder, name) for f in (getattr, setattr))
    return [Switch(f"torch.{where}.{name}", read, write, value, keeps_bits)]


def known_switches() -> Iterator[Switch]:
    """The old names, which may not be read once a new one is set, before those of torch 2.9 on."""
    matmul = "backends.cuda.matmul"
    yield from attribute(matmul, "allow_tf32", True)
    precision = torch.get_float32_matmul_precision, torch.set_float32_matmul_precision
    yield Switch("torch.set_float32_matmul_precision", *precision, "medium")
    yield from attribute(matmul, "allow_fp16_reduced_precision_reduction", False)
    yield from attribute(matmul, "allow_bf16_reduced_precision_reduction", False)
    yield from attribute(matmul, "allow_fp16_accumulation", True, keeps_bits=False)
    yield from attribute(matmul, "fp32_precision", "tf32")
    yield from attribute("backends.cudnn", "fp32_precision", "tf32")
    yield from attribute("backends", "fp32_precision", "tf32")


@contextmanager
def switched(switch: Switch) -> Iterator[None]:
    """Red where it is another afterwards."""
    before = switch.read()
    switch.write(switch.value)
    during = switch.read()
    try:
        yield
        if switch.read() != during:
            raise Red(f"{switch.name} was changed")
    finally:
        switch.write(before)


def autocast(subject: str, place: Place) -> None:
    """The same bits inside as outside."""
    case = case_of(subject, place, place.backend)
    inputs = inputs_of(place, case)
    right = flat(case.op(*inputs))
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast(place.device, dtype):
            same_bits(flat(case.op(*inputs)), right, f"under autocast to {dtype}")


def switches(subject: str, place: Place) -> None:
    """The same under every switch of torch's products, and the switches as they were."""
    case = case_of(subject, place, place.backend)
    inputs = inputs_of(place, case)
    right = flat(case.op(*inputs))
    for switch in known_switches():
        with switched(switch):
            found = flat(case.op(*inputs))
        what = f"under {switch.name} = {switch.value}"
        if switch.keeps_bits:
            same_bits(found, right, what)
            continue
        for a, b in zip(found, right, strict=True):
            if b.is_floating_point():
                rounding = torch.finfo(b.dtype).eps * b.double().cpu().abs()
                within(a, b, BATCHED["scores"] + rounding, what)


def streams(subject: str, place: Place) -> None:
    """On a side stream, behind work that is slow to give the inputs."""
    case = case_of(subject, place, place.backend)
    inputs = inputs_of(place, case)
    right = flat(case.op(*inputs))
    place.wait()
    slow = torch.randn(4096, 4096, device=place.device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        late = [torch.zeros_like(x) for x in inputs]
        for _ in range(20):
            slow = slow @ slow / 64
        for to, x in zip(late, inputs, strict=True):
            to.copy_(x)
        found = flat(case.op(*late))
    torch.cuda.current_stream().wait_stream(side)
    place.wait()
    same_bits(found, right, "on a side stream")


def selftest(subject: str, place: Place) -> None:
    """By which "auto" takes the backend; the verdict is kept for other processes."""
    public, behind = SUBJECTS[subject]
    for op in (*public, *behind):
        error = failure_of(op, place.backend, torch.device(place.device), place.dtype)
        if error is not None:
            raise Red(f"{op}: {error}")


def graphs(subject: str, place: Place) -> None:
    """By "auto", after `warm_up` in a process that finds verdicts: captured, replayed 100 times."""
    away = BACKENDS["triton"]._replace(unavailable_reason=lambda: "left out here")
    with mock.patch.dict(BACKENDS, {} if place.backend == "triton" else {"triton": away}):
        elva_kernels.warm_up(place.device)
        chosen = launcher(SUBJECTS[subject][0][0], "auto", torch.device(place.device), place.dtype)
        if chosen is not LAUNCHERS[SUBJECTS[subject][0][0]][place.backend]:
            raise Red(f'"auto" does not take {place.backend}')
        case = case_of(subject, place, "auto")
        inputs = inputs_of(place, case)
        place.wait()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = flat(case.op(*inputs))
        for i in range(100):
            for to, x in zip(inputs, inputs_of(place, case), strict=True):
                to.copy_(x)
            graph.replay()
            same_bits(captured, flat(case.op(*inputs)), f"replay {i}")


CHECKS = {
    f"{subject} {name}": (functools.partial(check, subject), public)
    for name, check in {
        "autocast": autocast,
        "switches": switches,
        "streams": streams,
        "selftest": selftest,
        "graphs": graphs,
    }.items()
    for subject, (public, _) in SUBJECTS.items()
}
