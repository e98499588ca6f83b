"""The processes of one training, as torchrun or accelerate start them; one alone exchanges nothing.

What a step computes is shared out by position: of n things each process takes a run of neighbours,
in the order of the processes, so that what is gathered stands as one process would have it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from itertools import count
from typing import TYPE_CHECKING, TypeVar

from elva.errors import RunError, UserError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.distributed import ProcessGroup, Store  # type: ignore[attr-defined]

T = TypeVar("T")

_MEETING = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun tells each process beside WORLD_SIZE."""

WRAPPERS: dict[str, dict[str, tuple[str, ...]]] = {
    "ACCELERATE_USE_FSDP": {"FSDP_VERSION": ("2",), "FSDP_CPU_RAM_EFFICIENT_LOADING": ("false",)},
    "ACCELERATE_USE_DEEPSPEED": {
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": ("1", "2"),
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": ("none",),
    },
}
"""What `accelerate launch` tells each process of its configuration, and what of it is kept to: a
model that the first process alone reads is empty elsewhere until it is wrapped; FSDP2 shards
weights, and so ZeRO-3 does not; offloading puts another optimiser in ours' place."""

_EXCHANGE = timedelta(minutes=30)
"""Ours: how long one process waits in an exchange for another, whose share of the work is as
large."""

PATIENCE = timedelta(hours=12)
"""Ours: how long processes wait for the first one, which writes a model."""

_GRACE_S = 5.0
"""Ours: how long the first process stays for others, of which one may be dead."""

_OF_LAUNCHER = "TORCHELASTIC_USE_AGENT_STORE"
"""Where torchrun tells that the store is its own."""

_ENDED = "ended"
"""What a process counts up among all of them when it ends early."""

_turns = count()
"""Of `first_alone`, in this process: the same number in each."""


def check_wrapping(environment: Mapping[str, str]) -> None:
    """RunError where accelerate's configuration asks for a wrapper that it would leave out, or of
    it for what we do not keep to."""
    arithmetic = environment.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if arithmetic != "no":
        raise RunError(
            f"train: accelerate's mixed_precision must be no, got {arithmetic}; set trainer.bf16"
        )
    for wrapper, rules in WRAPPERS.items():
        if environment.get(wrapper, "false").lower() != "true":
            continue
        import torch

        name = wrapper.removeprefix("ACCELERATE_USE_")
        if not torch.cuda.is_available() or int(environment.get("WORLD_SIZE", "1")) < 2:
            raise RunError(
                f"train: {name} must have a GPU for each of several processes, which accelerate "
                "wraps by it, got none; leave it out of accelerate's configuration"
            )
        for key, allowed in rules.items():
            if (value := environment.get(key, allowed[0]).lower()) not in allowed:
                raise RunError(
                    f"train: {key.lower()} must be {' or '.join(allowed)}, got {value}; change "
                    "accelerate's configuration"
                )


class Processes:
    """This process among the others: which it is, what is its share, and what they exchange.

    The process group is begun where the environment names several (`RANK`, `WORLD_SIZE`).

    Raises:
        RunError: it names several and not where they meet.
    """

    def __init__(self) -> None:
        check_wrapping(os.environ)
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.index = int(os.environ.get("RANK", "0"))
        if self.count > 1:
            if missing := [name for name in _MEETING if name not in os.environ]:
                raise RunError(
                    f"train: the environment of {self.count} processes must have "
                    f"{', '.join(_MEETING)}, got no {missing[0]}; start them by torchrun or "
                    "accelerate launch"
                )
            import torch
            from accelerate import PartialState

            PartialState(cpu=not torch.cuda.is_available(), timeout=_EXCHANGE)

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.index == 0

    @property
    def group(self) -> ProcessGroup | None:
        """All of them, for elva_kernels; None for one alone."""
        if self.count == 1:
            return None
        from torch.distributed import group

        return group.WORLD

    def share(self, count: int, index: int | None = None) -> range:
        """Which of so many things are this process's, or another's: shares differ by one at
        most."""
        index = self.index if index is None else index
        return range(count * index // self.count, count * (index + 1) // self.count)

    def gather(self, rows: Tensor, count: int) -> Tensor:
        """[count, ...] out of every process's share of as many rows, without their graphs."""
        rows = rows.detach()
        if self.count == 1:
            return rows
        import torch
        from accelerate.utils import gather

        shares = [len(self.share(count, i)) for i in range(self.count)]
        wide = rows.new_zeros(max(shares), *rows.shape[1:])
        wide[: len(rows)] = rows
        parts = gather(wide).unflatten(0, (self.count, max(shares)))
        return torch.cat([part[:n] for part, n in zip(parts, shares, strict=True)])

    def gather_list(self, some: Sequence[T]) -> list[T]:
        """Every process's things, in order."""
        if self.count == 1:
            return list(some)
        from accelerate.utils import gather_object

        found: list[T] = gather_object(list(some))
        return found

    def total(self, values: Mapping[str, float]) -> dict[str, float]:
        """Each value's sum over the processes, which all have the same names."""
        if self.count == 1:
            return dict(values)
        every = self.gather_list([dict(values)])
        return {name: sum(one[name] for one in every) for name in values}

    def most(self, value: int) -> int:
        """The largest of theirs."""
        return max(self.gather_list([value]))

    def agreed(self, value: T) -> T:
        """The first process's value."""
        if self.count == 1:
            return value
        from accelerate.utils import broadcast_object_list

        held = [value]
        broadcast_object_list(held)
        return held[0]

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()

    @contextmanager
    def first_alone(self) -> Iterator[bool]:
        """Whether this process does what the block holds; the others go on when it is done.

        An error there is raised everywhere, so that nobody waits for ever.
        """
        error: BaseException | None = None
        turn = f"turn {next(_turns)}"
        if self.first:
            try:
                yield True
            except Exception as found:  # noqa: BLE001 - raised below, in every process
                error = found
            if self.count > 1:
                if not isinstance(error, UserError | OSError | None):
                    _store().add(_ENDED, 1)  # it says so itself; the others may not know the class
                _store().set(turn, "done")
        else:
            yield False
            _wait_for(turn)
        if self.agreed(not isinstance(error, UserError | OSError | None)):
            from torch.distributed import DistError

            raise error or DistError("the first process failed")
        if (told := self.agreed(error)) is not None:
            raise told

    @contextmanager
    def ending_together(self) -> Iterator[None]:
        """Ends every process where one ends early, and has each reason said by one.

        Raises:
            SystemExit: another process has said why.
            RunError: another process has gone without a word.
        """
        try:
            yield
        except (SystemExit, GeneratorExit):
            if self.count > 1:
                with suppress(RuntimeError):
                    _store().add(_ENDED, 1)
            raise
        except BaseException as error:
            if self.count == 1:
                raise
            lost = _is_lost_exchange(error)
            line = "lost" if lost else f"{type(error).__name__}: {error}"
            try:
                ended = _store().add(_ENDED, 1)
                said = _store().add(f"said {line}", 1)
            except RuntimeError:  # gone with the process that held it
                ended = said = 1
            if (lost and ended > 1) or said > 1:
                raise SystemExit(2) from None
            if not lost:
                raise
            raise RunError(
                f"train: all {self.count} processes must answer, got nothing of one, which was "
                "killed or hangs; go on with --resume"
            ) from None

    def see_off(self) -> None:
        """Where processes end early and the first one holds what they tell each other, stay until
        the others have looked."""
        if self.count == 1 or not self.first or os.environ.get(_OF_LAUNCHER) == "True":
            return
        until = time.monotonic() + _GRACE_S
        while time.monotonic() < until and 0 < _store().add(_ENDED, 0) < self.count:
            time.sleep(0.05)


@contextmanager
def brought_together(model: nn.Module) -> Iterator[None]:
    """Weights that are sharded (FSDP2) brought together once, for what reads them many times and on
    each process at its own pace."""
    from accelerate.state import AcceleratorState
    from torch.distributed.fsdp import FSDPModule

    sharded = [m for m in model.modules() if isinstance(m, FSDPModule)]
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        if sharded:
            again = bool(AcceleratorState().fsdp_plugin.reshard_after_forward)
        for module in sharded:
            module.set_reshard_after_forward(again, recurse=False)
            module.reshard()


@cache
def _store() -> Store:
    """What the processes can tell each other without an exchange, also when one has ended."""
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    place, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return PrefixStore("elva", TCPStore(place, port, is_master=False))


def _wait_for(turn: str) -> None:
    """Until the first process has done what it does alone; DistError where one has ended."""
    from torch.distributed import DistError

    since, store = time.monotonic(), _store()
    while not store.check([turn]):
        waited = time.monotonic() - since
        if store.check([_ENDED]) or waited > PATIENCE.total_seconds():
            raise DistError("the first process has not done what it does alone")
        time.sleep(min(0.5, 0.01 + waited / 10))


def _is_lost_exchange(error: BaseException) -> bool:
    """Whether another process did not answer: torch's own errors, and gloo's, which have no
    class."""
    from torch.distributed import DistError

    of_gloo = isinstance(error, RuntimeError) and "gloo" in str(error)
    return of_gloo or isinstance(error, DistError)
