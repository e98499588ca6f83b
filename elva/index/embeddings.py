"""Embeddings on disk, between `elva embed` and what is made of them.

<name>/embeddings.json       what was embedded, by which model, in how many shards
<name>/shards/00000.elva     one segment (`elva.index`) a shard
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from elva.data import Item, Query
from elva.errors import UserError
from elva.files import read_bounded, write_text
from elva.index import Found, Segment, about, exact
from elva.index.blocks import read_fields
from elva.index.segment import Rows
from elva.model.identity import Identity
from elva.settings import JSON_BYTES, between

PLAN, _SHARDS = "embeddings.json", "shards"


_MOST_SHARDS = 1_000_000
"""Ours: of a plan that names more, each would be looked for."""


@dataclass(frozen=True)
class _Plan:
    """What `embeddings.json` holds."""

    items: Rows
    shard_rows: Annotated[int, between(1, 2**48)]
    model: Identity
    about: Mapping[str, Any]

    def faults(self) -> Iterator[tuple[str, str]]:
        if self.items > _MOST_SHARDS * self.shard_rows:
            yield "items", f"fit into {_MOST_SHARDS:,} shards"
        yield from about.faults(self.about)


@dataclass(frozen=True)
class Embeddings:
    """A finished or unfinished `OUTPUT/<name>`.

    Args:
        items: how many there are to embed, the bad ones included.
        about: how the model is asked, and where the data lies.
    """

    directory: Path
    items: int
    shard_rows: int
    model: Identity
    about: Mapping[str, Any]

    @classmethod
    def open(cls, directory: Path) -> Embeddings:
        """Read the plan; UserError where there is none."""
        path = directory / PLAN
        try:
            content = read_bounded(path, JSON_BYTES)
        except OSError:
            raise UserError(
                f"{directory}: must hold embeddings, got no readable {PLAN}; run elva embed"
            ) from None
        plan = read_fields(_Plan, content, path)
        return cls(directory, plan.items, plan.shard_rows, plan.model, plan.about)

    @property
    def shards(self) -> list[Path]:
        """Every shard's path, whether it is there or not."""
        count = -(-self.items // self.shard_rows)
        return [self.directory / _SHARDS / f"{i:05d}.elva" for i in range(count)]

    @property
    def missing(self) -> list[int]:
        return [i for i, path in enumerate(self.shards) if not path.exists()]

    def segments(self) -> list[Path]:
        """The shards; UserError where some are still to be embedded."""
        if self.missing:
            raise UserError(
                f"{self.directory}: must be embedded whole, got {len(self.missing)} of "
                f"{len(self.shards)} shards to go; run elva embed with --resume"
            )
        return self.shards

    @cached_property
    def opened(self) -> list[Segment]:
        """The shards, mapped; UserError where one is not of this plan's model."""
        found = [Segment(path) for path in self.segments()]
        for one in found:
            if one.dim != found[0].dim or not one.model.matches(self.model):
                raise UserError(
                    f"{one.path}: must be of {self.model.name} as all of {self.directory}, got "
                    f"{one.model.name} with {one.dim} numbers a row; run elva embed again"
                )
        return found

    @cached_property
    def ids(self) -> list[str]:
        """The ids of all rows."""
        return [id for one in self.opened for id in one.table["id"].to_pylist()]

    def save(self) -> None:
        data = {
            "items": self.items,
            "shard_rows": self.shard_rows,
            "model": asdict(self.model),
            "about": dict(self.about),
        }
        write_text(self.directory / PLAN, json.dumps(data, indent=1) + "\n")

    def queries(self) -> tuple[list[str], Tensor]:
        """Ids and fp32 embeddings [Q, D] of a query file.

        Raises:
            UserError: it is a pool, unfinished, or empty.
        """
        if self.about.get("side") != "queries":
            raise UserError(
                f"{self.directory}: must be embedded queries, got a pool; name a query file's"
            )
        if not self.ids:
            raise UserError(f"{self.directory}: must hold queries, got none; embed some")
        return self.ids, torch.cat([one.embeddings.float() for one in self.opened])

    def check_model(self, asked: Embeddings) -> None:
        """Refuse queries of another model."""
        if not asked.model.matches(self.model):
            raise UserError(
                f"{asked.directory}: must be of the model that embedded {self.directory}, "
                f"{self.model.name}, got {asked.model.name}; embed both with one"
            )

    def nearest(
        self, query: Tensor, k: int, progress: Callable[[int], None] | None = None
    ) -> tuple[Found, list[str]]:
        """The k best items of each query, in one pass over the shards, and the ids of all rows."""
        parts = [one.embeddings for one in self.opened]
        return exact.search(query, parts, k, progress=progress), self.ids

    def rows(self, rows: Sequence[int]) -> Tensor:
        """[n, D] fp32 of rows counted over all shards as they are written."""
        stack = exact.Stack([one.embeddings for one in self.opened])
        return stack.take(torch.tensor(rows)).float()


def columns(items: Sequence[Item], named: Mapping[str, str]) -> dict[str, list[str | None]]:
    """What an index keeps of each item beside its embedding."""
    return {
        "text": [i.raw_text if isinstance(i, Query) else i.text for i in items],
        "image": [str(i.image.absolute()) if isinstance(i.image, Path) else None for i in items],
        "modality": [i.modality for i in items],
        "name": [named.get(i.id) or i.text or _file_name(i) for i in items],
    }


def _file_name(item: Item) -> str | None:
    return item.image.name if isinstance(item.image, Path) else None
