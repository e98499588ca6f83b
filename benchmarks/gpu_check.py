"""All that a GPU can prove, and then its figures: `python -m benchmarks.gpu_check`.

Every check runs every backend that can run here against the reference in float64. `--dry-run` does
all of it but what needs a GPU, with the CPU in its place and at small sizes: for a machine without
one. Ends with 1 where a check is red, and measures nothing then. The tree's own package is meant:
`pip install --no-build-isolation -e .` first, where nvcc is found.
"""

import argparse
import functools
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import elva_kernels
from benchmarks import gpu_bench, report
from elva_kernels import reference
from elva_kernels.backends.choice import launcher
from elva_kernels.backends.table import LAUNCHERS

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
WEIGHTS = {"margin": -0.9, "rank_penalty": 0.05, "w_margin": 0.4, "w_rank": 0.6}
# The contract's: of scores; of gradients times their rows' norms, beyond half an ulp.
GROUPED = {"scores": 1e-6, "gradients": 2e-6}
BATCHED = {"scores": 1e-5, "gradients": 2e-5}
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


class Red(Exception):
    """A check found a wrong result."""


@dataclass
class Outcome:
    """Of one check."""

    name: str
    verdict: str  # "green", "not run: why", or what is wrong
    seconds: float


@dataclass(frozen=True)
class Place:
    """Where the checks run, and how much they take."""

    device: str
    dry: bool

    def backends(self, op: str, dtype: torch.dtype) -> list[str]:
        found = []
        for name in LAUNCHERS[op]:
            try:
                launcher(op, name, torch.device(self.device), dtype)
            except elva_kernels.BackendUnavailable:
                continue
            if name != "reference":
                found.append(name)
        return found


def within(found: Tensor, right: Tensor, allowed: Any, what: str) -> None:
    """Red where |found - right| is over `allowed` or NaN lies elsewhere; both to the CPU."""
    found, right = found.detach().double().cpu(), right.detach().double().cpu()
    same = (found == right) | (found.isnan() & right.isnan())
    error = torch.where(same, 0.0, (found - right).abs())
    excess = torch.where(error.isnan(), math.inf, error - allowed)
    if excess.numel() and excess.max() > 0:
        raise Red(f"{what} is {excess.max().item():.2e} over its bound")


def gradient_bound(row: Tensor, right: Tensor, allowed: float) -> Tensor:
    """Per element: the contract's bound over the row's norm, and half an ulp of what is stored."""
    norm = row.double().cpu().norm(dim=-1, keepdim=True)
    half_ulp = torch.finfo(row.dtype).eps / 2 * right.double().cpu().abs()
    return allowed / norm.clamp(min=1e-30) + half_ulp + torch.finfo(row.dtype).tiny


def same_bits(found: Any, right: Any, what: str) -> None:
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    for a, b in zip(found, right, strict=True):
        word = words[a.element_size()]
        if a.dtype != b.dtype or not torch.equal(a.view(word), b.view(word)):
            raise Red(f"{what}: bits differ")


def grouped_inputs(groups: int, n: int, d: int, dtype: torch.dtype, device: str) -> Any:
    query = torch.randn(groups, d)
    positive = query + torch.randn(groups, d)
    negatives = torch.randn(groups, n, d) + torch.linspace(-1, 1, n).view(1, n, 1) * query[:, None]
    return tuple(x.to(dtype).to(device) for x in (query, positive, negatives))


def layouts(inputs: Any) -> Iterator[tuple[str, Any]]:
    yield "dense", inputs
    yield "strided", tuple(torch.stack([x, x], -1)[..., 0] for x in inputs)
    yield (
        "misaligned",
        tuple(torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape) for x in inputs),
    )


def exact_gradients(
    inputs: list[Tensor], scores: Tensor, weight: Tensor, options: dict[str, Any]
) -> tuple[Tensor, ...]:
    """In float64, at the ranks of the scores found: nearly equal ones may change places."""
    weights = {key: value for key, value in options.items() if key != "mask"}
    mask, found = options["mask"].cpu(), scores.double().cpu()
    found = torch.where(found.isfinite(), found, 0.0)
    slopes = reference.reward_from_scores_backward(
        found, mask, weight.double().cpu(), reference.Weights(**weights)
    )
    leaves = [x.detach().requires_grad_() for x in inputs]
    return torch.autograd.grad(reference.cosine_scores(*leaves, mask), leaves, slopes)


def check_grouped(place: Place, backend: str, dtype: torch.dtype) -> None:
    """Values, gradients by both paths, layouts, masks, soft ranks, odd rows."""
    shapes = [(3, 7, 33), (2, 100, 1536), (1, 1, 1), (4, 0, 16), (2, 37, 2048), (1, 300, 64)]
    shapes += [] if place.dry else [(8, 100, 3584), (2, 1000, 256), (1, 20, 8192)]
    for groups, n, d in shapes:
        inputs = grouped_inputs(groups, n, d, dtype, place.device)
        mask = torch.rand(groups, n).to(place.device) < 0.8
        weight = torch.randn(groups).to(place.device).to(torch.promote_types(dtype, torch.float32))
        for temperature in (0.0, 0.1):
            options = {**WEIGHTS, "rank_temperature": temperature, "mask": mask}
            exact = [x.double().cpu() for x in inputs]
            right = elva_kernels.ranking_reward(
                *exact, backend="reference", **options | {"mask": mask.cpu()}
            )
            first = None
            for name, laid in layouts(inputs):
                what = f"{groups}x{n}x{d} {name}"
                found, *ours = elva_kernels.ranking_reward_and_grad(
                    *laid, weight=weight, backend=backend, **options
                )
                within(found.scores, right.scores, GROUPED["scores"], f"{what} scores")
                own = elva_kernels.reward_from_scores(
                    found.scores.double().cpu(),
                    backend="reference",
                    **options | {"mask": mask.cpu()},
                )
                if not torch.equal(found.rank.cpu(), own.rank):
                    raise Red(f"{what}: the rank is not that of the scores")
                within(found.reward, own.reward, 1e-5, f"{what} reward")
                gradients = exact_gradients(exact, found.scores, weight, options)
                for row, gradient, truth in zip(inputs, ours, gradients, strict=True):
                    bound = gradient_bound(row, truth, 2 * GROUPED["gradients"])
                    within(gradient, truth, bound, f"{what} gradient")
                same_bits(first or (*found, *ours), (*found, *ours), f"{what} layouts")
                first = (*found, *ours)
            leaves = [x.detach().requires_grad_() for x in inputs]
            result = elva_kernels.ranking_reward(*leaves, backend=backend, **options)
            same_bits([result.reward, result.scores], [first[0], first[4]], "autograd's forward")
            by_autograd = torch.autograd.grad(result.reward, leaves, weight)
            for row, gradient, truth in zip(inputs, by_autograd, gradients, strict=True):
                bound = gradient_bound(row, truth, 2 * GROUPED["gradients"])
                within(gradient, truth, bound, "autograd's gradient")


def check_odd_rows(place: Place, backend: str, dtype: torch.dtype) -> None:
    """NaN, inf, zero and far rows spoil or change their own group alone."""
    clean = grouped_inputs(3, 19, 512, dtype, place.device)
    run = functools.partial(elva_kernels.ranking_reward_and_grad, backend=backend, **WEIGHTS)
    before, *_ = run(*clean)
    for bad in (math.nan, math.inf, 0.0, 2.0 ** (12 if dtype == torch.float16 else 100)):
        for which in range(3):
            inputs = [x.clone() for x in clean]
            row = inputs[which][1] if which < 2 else inputs[2][1, 4]
            row.mul_(bad) if math.isfinite(bad) else row[3].fill_(bad)
            found, *ours = run(*inputs)
            right, *gradients = elva_kernels.ranking_reward_and_grad(
                *(x.double().cpu() for x in inputs), backend="reference", **WEIGHTS
            )
            within(found.reward, right.reward, 1e-5, f"reward beside {bad}")
            for gradient, truth in zip(ours, gradients, strict=True):
                if not torch.equal(gradient.isnan().cpu(), truth.isnan()):
                    raise Red(f"NaN lies elsewhere in a gradient beside {bad}")
            for i in (0, 2):
                same_bits([found.scores[i]], [before.scores[i]], f"a neighbour of {bad}")


def in_batch_reward(query: Tensor, candidates: Tensor, backend: str) -> Tensor:
    result = elva_kernels.in_batch_ranking_reward(
        query, candidates, head=7, backend=backend, **WEIGHTS
    )
    return result.reward.mean()


def check_batched(place: Place, backend: str, dtype: torch.dtype) -> None:
    """rank_statistics, in_batch_ranking_reward and info_nce, copies of positives included."""
    shapes = [(17, 40, 64), (65, 130, 48)] + ([] if place.dry else [(512, 1000, 1536)])
    if backend == "cuda" and not place.dry:
        shapes.append((2100, 2110, 32))  # so many scores that slopes are kept in one half
    for b, m, d in shapes:
        query, candidates = torch.randn(b, d), torch.randn(m, d)
        candidates[:b] += query
        candidates[b : b + 5] = candidates[:5]  # ties with the first five positives
        query, candidates = (x.to(dtype).to(place.device) for x in (query, candidates))
        exact = [x.double().cpu() for x in (query, candidates)]
        found = elva_kernels.rank_statistics(
            query, candidates, k=5, temperature=0.1, backend=backend
        )
        right = elva_kernels.rank_statistics(*exact, k=5, temperature=0.1, backend="reference")
        what = f"{b}x{m}x{d}"
        within(found.target_score, right.target_score, BATCHED["scores"], f"{what} targets")
        within(found.topk_scores, right.topk_scores, BATCHED["scores"], f"{what} top-k")
        within(found.logsumexp, right.logsumexp, 2e-4, f"{what} logsumexp")
        if not bool((found.n_equal[:5] >= 1).all()):
            raise Red(f"{what}: a copy of the positive does not tie with it")
        for loss in (
            lambda q, c, by: elva_kernels.info_nce(q, c, temperature=0.1, backend=by),
            lambda q, c, by: elva_kernels.info_nce(
                q, c, temperature=0.1, symmetric=True, backend=by
            ),
            # Of few queries: among many, negatives that are nearly equal change places.
            *[in_batch_reward] * (b < 100),
        ):
            leaves = [x.detach().requires_grad_() for x in (query, candidates)]
            truths = [x.requires_grad_() for x in exact]
            value, truth = loss(*leaves, backend), loss(*truths, "reference")
            within(value, truth, 2e-4, f"{what} loss")
            ours = torch.autograd.grad(value, leaves)
            theirs = torch.autograd.grad(truth, truths)
            for row, gradient, exact_gradient in zip(leaves, ours, theirs, strict=True):
                bound = gradient_bound(row.detach(), exact_gradient, BATCHED["gradients"])
                within(gradient, exact_gradient, bound, f"{what} gradient of a loss")


def check_search(place: Place, backend: str, dtype: torch.dtype) -> None:
    rows = 3000 if place.dry else 100_000
    corpus = torch.randn(rows, 96).to(dtype).to(place.device)
    corpus[7] = corpus[rows - 1]  # a tie: the lower index first
    corpus[11, 0] = math.nan
    for count in (1, 5, 33):
        query = corpus[7:8].expand(count, -1) + torch.randn(count, 96).to(corpus)
        for metric in ("cosine", "dot"):
            found = elva_kernels.topk(query, corpus, 20, metric=metric, backend=backend)
            right = elva_kernels.topk(
                query.double().cpu(), corpus.double().cpu(), 20, metric=metric, backend="reference"
            )
            unit = query.double().norm(dim=-1, keepdim=True).cpu() * 20
            allowed = BATCHED["scores"] * (1 if metric == "cosine" else unit)
            within(found.scores, right.scores, allowed, f"{count} {metric} scores")
            if bool((found.index == 11).any()):
                raise Red("a row with NaN was found")


CHECKS: dict[str, tuple[Callable[[Place, str, torch.dtype], None], tuple[str, ...]]] = {
    "grouped reward": (check_grouped, ("ranking_reward_and_grad", "ranking_reward")),
    "odd rows": (check_odd_rows, ("ranking_reward_and_grad",)),
    "in-batch ops": (check_batched, ("rank_statistics", "info_nce", "in_batch_ranking_reward")),
    "search": (check_search, ("topk",)),
}


def check_repeats(place: Place, backend: str) -> None:
    """The same bits again and again, while another stream is busy."""
    inputs = grouped_inputs(16, 100, 1536, torch.bfloat16, place.device)
    run = functools.partial(elva_kernels.ranking_reward_and_grad, *inputs, backend=backend)
    first, *gradients = run()
    busy = torch.randn(1024, 1024, device=place.device)
    for i in range(5 if place.dry else 1000):
        if not place.dry and i % 10 == 0:
            with torch.cuda.stream(torch.cuda.Stream()):
                busy @ busy
        found, *ours = run()
        same_bits((*found, *ours), (*first, *gradients), f"repeat {i}")


def check_offsets(place: Place, backend: str) -> None:
    """Negatives that lie more than 2^31 elements apart give what they give side by side."""
    apart = 2**20 if place.dry else 2**30 + 8
    inputs = grouped_inputs(1, 3, 256, torch.bfloat16, place.device)
    wide = torch.empty(3 * apart, dtype=torch.bfloat16, device=place.device)
    far = wide.as_strided((1, 3, 256), (3 * apart, apart, 1)).copy_(inputs[2])
    run = functools.partial(elva_kernels.ranking_reward_and_grad, backend=backend)
    near, *gradients = run(*inputs)
    found, *ours = run(*inputs[:2], far)
    same_bits((*found, *ours), (*near, *gradients), "far offsets")


def check_stream(place: Place, backend: str) -> None:
    """On a side stream, behind work that is slow to give the inputs."""
    inputs = grouped_inputs(8, 100, 1536, torch.bfloat16, place.device)
    right = elva_kernels.ranking_reward(*inputs, backend=backend)
    torch.cuda.synchronize()
    slow = torch.randn(4096, 4096, device=place.device)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        late = [torch.zeros_like(x) for x in inputs]
        for _ in range(20):
            slow = slow @ slow / 64
        for to, x in zip(late, inputs, strict=True):
            to.copy_(x)
        found = elva_kernels.ranking_reward(*late, backend=backend)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    same_bits(found, right, "a side stream")


def check_graph(place: Place, backend: str) -> None:
    """Captured once, replayed 100 times on other inputs."""
    shape = (8, 100, 1536, torch.bfloat16, place.device)
    inputs = grouped_inputs(*shape)
    run = functools.partial(elva_kernels.ranking_reward_and_grad, *inputs, backend=backend)
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, *gradients = run()
    for i in range(100):
        for to, x in zip(inputs, grouped_inputs(*shape), strict=True):
            to.copy_(x)
        graph.replay()
        found, *ours = run()
        same_bits((*captured, *gradients), (*found, *ours), f"replay {i}")


def sanitize(tool: str) -> str:
    """compute-sanitizer over the small checks, in a process of its own."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        return "not run: compute-sanitizer is not installed"
    command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m"]
    command += ["benchmarks.gpu_check", "--only", "odd rows", "--no-benchmark"]
    trusted = os.environ | {"ELVA_KERNELS_SELFTEST": "0"}  # they are checked here
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=trusted)
    except subprocess.TimeoutExpired:
        return "not run: it did not end in 120 s"
    if done.returncode == 0:
        return "green"
    return (done.stdout + done.stderr).strip().rsplit("\n", 12)[-1]


def outcome(name: str, run: Callable[[], str | None]) -> Outcome:
    start = time.perf_counter()
    try:
        verdict = run() or "green"
    except Red as error:
        verdict = str(error)
    except Exception as error:  # noqa: BLE001, the other checks still tell something
        verdict = f"{type(error).__name__}: {error}"
    found = Outcome(name, verdict, round(time.perf_counter() - start, 2))
    print(f"{found.seconds:8.2f} s  {name}: {verdict}", flush=True)
    return found


def outcomes(place: Place, only: str) -> Iterator[Outcome]:
    """Every check of every backend and dtype that can run at `place`."""
    for name, (check, ops) in CHECKS.items():
        if only not in ("", name):
            continue
        for dtype in DTYPES:
            backends = [place.backends(op, dtype) for op in ops]
            for backend in sorted(set.intersection(*map(set, backends))):
                title = f"{name}, {backend}, {str(dtype).removeprefix('torch.')}"
                yield outcome(title, functools.partial(check, place, backend, dtype))
    if only:
        return
    for backend in place.backends("ranking_reward_and_grad", torch.bfloat16):
        for check in (check_repeats, check_offsets):
            title = f"{check.__name__.removeprefix('check_')}, {backend}"
            yield outcome(title, functools.partial(check, place, backend))
        for check in (check_stream, check_graph):
            title = f"{check.__name__.removeprefix('check_')}, {backend}"
            if place.dry:
                yield outcome(title, lambda: "not run: it needs a GPU")
            else:
                yield outcome(title, functools.partial(check, place, backend))
    for tool in TOOLS:
        if place.dry:
            yield outcome(f"compute-sanitizer {tool}", lambda: "not run: it needs a GPU")
        else:
            yield outcome(f"compute-sanitizer {tool}", functools.partial(sanitize, tool))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, all but the launches")
    parser.add_argument("--only", default="", help=f"one of {', '.join(CHECKS)}")
    parser.add_argument("--no-benchmark", action="store_true", help="the checks alone")
    parser.add_argument("--seconds", type=float, default=2.0, help="of measuring, per case")
    arguments = parser.parse_args()
    if not arguments.dry_run and not torch.cuda.is_available():
        sys.exit("gpu_check: torch sees no GPU; --dry-run does what can be done without one")
    if arguments.only and arguments.only not in CHECKS:
        sys.exit(f"gpu_check: --only must be one of {', '.join(CHECKS)}, got {arguments.only!r}")
    torch.manual_seed(0)
    place = Place("cpu" if arguments.dry_run else "cuda", arguments.dry_run)
    light = place.dry or bool(arguments.only)
    print(elva_kernels.doctor() if light else elva_kernels.warm_up(place.device))
    found = list(outcomes(place, arguments.only))
    red = [x for x in found if not x.verdict.startswith(("green", "not run"))]
    print(f"{len(found)} checks, {len(red)} red")
    if not arguments.no_benchmark and not red:
        result = gpu_bench.measure(place.device, 0.05 if place.dry else arguments.seconds)
        result["checks"] = [asdict(x) for x in found]
        print(report.show(result))
        if not place.dry:
            print(report.write("gpu", result))
    sys.exit(1 if red else 0)


if __name__ == "__main__":
    main()
