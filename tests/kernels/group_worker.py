"""What the processes of a group compute in test_group, each on its share of one batch."""

import sys
import traceback
from typing import NamedTuple

import torch
import torch.distributed as dist

import elva_kernels

SIZE = 24  # D


class Case(NamedTuple):
    """A batch, shared out: process r holds `queries[r]` and `candidates[r]` of the rows."""

    queries: tuple[int, ...]
    candidates: tuple[int, ...]
    positives: tuple[int, ...] = ()  # of each process's targets [b, P]; (): targets [b]
    options: tuple[str, ...] = ()  # of "excluded", "candidate_ids", "max_score", "global_target"
    symmetric: bool = False
    reduction: str = "mean"
    backend: str = "cpu"
    dtype: torch.dtype = torch.float64
    bad: bool = False  # a query, a positive and a negative are not finite

    @property
    def world(self):
        return len(self.queries)


class Batch(NamedTuple):
    """The whole batch, as one process holds it."""

    query: torch.Tensor
    candidates: torch.Tensor
    target: torch.Tensor  # [B] or [B, P]; into all candidates
    named: dict  # the rest of what says who is compared
    upstream: torch.Tensor  # [B]


def batch_of(case):
    """The same in every process. A query's positives lie in its own process unless global."""
    generator = torch.Generator().manual_seed(len(repr(case)))

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    b, m = sum(case.queries), sum(case.candidates)
    query, candidates = draw(b, SIZE), draw(m, SIZE)
    most = max(case.positives, default=1)
    target = torch.full((b, most), -1)
    row = 0
    for rank, (count, own) in enumerate(zip(case.queries, case.candidates, strict=True)):
        first, span = sum(case.candidates[:rank]), own
        if "global_target" in case.options:
            first, span = 0, m
        for i in range(row, row + count):
            columns = case.positives[rank] if case.positives else 1
            target[i, :columns] = first + torch.randperm(span, generator=generator)[:columns]
            if case.positives and i % 3 == 1:
                target[i, i % columns :] = -1
        row += count
    for i in range(b):
        for positive in target[i][target[i] >= 0]:
            candidates[positive] += query[i]
    named = {}
    if "excluded" in case.options:
        pairs = [(i, j) for i in range(b) for j in range(m) if (7 * i + 3 * j) % 5 == 0]
        named["excluded"] = torch.tensor([p for p in pairs if p[1] not in target[p[0]].tolist()])
    if "candidate_ids" in case.options:
        named["candidate_ids"] = torch.arange(m) % 11
    if "max_score" in case.options:
        named["max_score"] = 0.3
    if case.bad:
        query[2, 0], candidates[target[4, 0], 1], candidates[0, 2] = torch.inf, torch.nan, torch.nan
    rows = [x.to(case.dtype) for x in (query, candidates)]
    return Batch(*rows, target if case.positives else target[:, 0], named, draw(b))


def shares(case, rank):
    """Its own rows, as slices of the queries and of the candidates."""
    return tuple(slice(sum(x[:rank]), sum(x[: rank + 1])) for x in (case.queries, case.candidates))


def share_of(case, rank):
    """What process `rank` passes: rows and the named arguments."""
    whole = batch_of(case)
    rows, columns = shares(case, rank)
    is_global = "global_target" in case.options
    shift = 0 if is_global else columns.start
    target = whole.target[rows]
    if case.positives:
        target = target[:, : case.positives[rank]]
    named = dict(whole.named, target=torch.where(target < 0, target, target - shift))
    if "excluded" in named:
        pairs = named["excluded"]
        own = (pairs[:, 0] >= rows.start) & (pairs[:, 0] < rows.stop)
        if not is_global:  # the others' candidates cannot be named
            own &= (pairs[:, 1] >= columns.start) & (pairs[:, 1] < columns.stop)
        named["excluded"] = pairs[own] - torch.tensor([rows.start, shift])
    if "candidate_ids" in named:
        named["candidate_ids"] = named["candidate_ids"][columns]
    if is_global:
        named["global_target"] = True
    return whole.query[rows], whole.candidates[columns], named, whole.upstream[rows]


def calls(case, query, candidates, named, upstream, **group):
    """Every op's results on these rows, as a flat dictionary of tensors."""
    named = named | group | {"backend": case.backend}
    heat = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    inputs = [x.detach().requires_grad_() for x in (query, candidates)]
    options = {"symmetric": case.symmetric, "reduction": case.reduction, "temperature": heat}
    loss, statistics = elva_kernels.info_nce(*inputs, return_statistics=True, **options, **named)
    found = {"loss": loss.detach()} | {f"nce_{k}": v for k, v in statistics._asdict().items()}
    total = (loss * upstream).sum() if case.reduction == "none" else loss
    total.backward()
    found |= {"grad_query": inputs[0].grad, "grad_candidates": inputs[1].grad}
    found["grad_temperature"] = heat.grad
    if case.reduction != "none":
        _, *grads = elva_kernels.info_nce_and_grad(query, candidates, **options, **named)
        names = ("and_grad_query", "and_grad_candidates", "and_grad_temperature")
        found |= dict(zip(names, grads, strict=True))
    ranked = elva_kernels.rank_statistics(query, candidates, k=4, temperature=0.2, **named)
    found |= {f"rank_{k}": v for k, v in ranked._asdict().items()}
    inputs = [x.detach().requires_grad_() for x in (query, candidates)]
    reward = elva_kernels.in_batch_ranking_reward(*inputs, head=5, **named)
    (reward.reward * upstream).sum().backward()
    found |= {f"reward_{k}": v.detach() for k, v in reward._asdict().items()}
    found |= {"reward_grad_query": inputs[0].grad, "reward_grad_candidates": inputs[1].grad}
    _, grad, _ = elva_kernels.in_batch_ranking_reward_and_grad(
        query, candidates, head=5, weight=upstream, wrt=("query",), **named
    )
    found["reward_and_grad_query"] = grad
    return found


def run_case(rank, given):
    """The results of a case twice, for their bits."""
    case = Case(**given)
    group = dist.group.WORLD
    return [calls(case, *share_of(case, rank), group=group) for _ in range(2)]


def encoder():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(SIZE, 16), torch.nn.Tanh(), torch.nn.Linear(16, SIZE)
    ).double()


TRAINED = Case((5, 2), (5, 6), (2, 3), ("excluded", "candidate_ids"), symmetric=True)


def losses_of(encode, case, query, candidates, named, **group):
    """InfoNCE of embeddings, and of a reward whose mean over queries is maximised."""
    embedded = encode(torch.cat([query, candidates])).split([len(query), len(candidates)])
    loss = elva_kernels.info_nce(*embedded, symmetric=case.symmetric, **named, **group)
    rewards = elva_kernels.in_batch_ranking_reward(*embedded, margin=-2.0, **named, **group)
    return loss, rewards.reward.sum()


def train(rank, wrapping):
    """The parameters' gradients after a backward through DDP or FSDP2."""
    from torch.distributed.fsdp import fully_shard

    model = encoder()
    if wrapping == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
    else:
        for layer in (model[0], model[2]):
            fully_shard(layer)
        wrapped = fully_shard(model)
    query, candidates, named, _ = share_of(TRAINED, rank)
    loss, reward = losses_of(wrapped, TRAINED, query, candidates, named, group=dist.group.WORLD)
    (loss - reward).backward()
    grads = [p.grad for p in model.parameters()]
    return [x.full_tensor() if hasattr(x, "full_tensor") else x for x in grads]


def refused(rank, _):
    """What every process is told where one of them is wrong, and where they differ."""
    group, told = dist.group.WORLD, []
    query, candidates = torch.randn(3, 4), torch.randn(3, 4)

    def tell(**change):
        inputs = {"query": query, "candidates": candidates, "group": group} | change
        try:
            elva_kernels.rank_statistics(**inputs)
        except ValueError as error:
            told.append(str(error))
        else:
            told.append("")

    tell(target=torch.tensor([0, 1, 3 - rank]))
    tell(max_score=0.5 if rank else None)
    tell(query=query[:, : 4 - rank], candidates=candidates[:, : 4 - rank])
    tell(target=torch.tensor([0, 1, 6]), global_target=True)
    tell()
    return told


def bytes_received(rank, sizes):
    """By one process, in value and gradients of the symmetric loss; and those of others' rows."""
    from elva_kernels.registered import processes

    b, m, d = sizes
    received = []
    gather = processes._all_gather

    def counted(whole, own, **named):
        received.append(whole.nbytes - own.nbytes)
        return gather(whole, own, **named)

    processes._all_gather = counted
    query = torch.randn(b, d).bfloat16().requires_grad_()
    candidates = torch.randn(m, d).bfloat16().requires_grad_()
    loss = elva_kernels.info_nce(query, candidates, symmetric=True, group=dist.group.WORLD)
    loss.backward()
    others = dist.get_world_size() - 1
    return sum(received), others * (query.nbytes + candidates.nbytes), others * (b + m)


def work(rank, world, folder):
    """In a process of a group: what each job, [function, given], returns; or a traceback."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    try:
        jobs = torch.load(f"{folder}/jobs.pt", weights_only=True)
        found = [globals()[function](rank, given) for function, given in jobs]
    except Exception:  # noqa: BLE001 - it is told in the parent
        found = traceback.format_exc()
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    work(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
