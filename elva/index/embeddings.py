"""Embeddings on disk, between `elva embed` and what is made of them.

<name>/embeddings.json       what was embedded, by which model, in how many shards
<name>/shards/00000.elva     one segment (`elva.index`) a shard
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elva.errors import UserError
from elva.files import write_text
from elva.index import Found, Identity, Segment, exact

PLAN, SHARDS = "embeddings.json", "shards"


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
            data = json.loads(path.read_text(encoding="utf-8"))
            model = Identity(**data["model"])
            return cls(directory, data["items"], data["shard_rows"], model, data["about"])
        except (OSError, KeyError, TypeError, ValueError):
            raise UserError(
                f"{directory}: must hold embeddings, got no readable {PLAN}; run elva embed"
            ) from None

    @property
    def shards(self) -> list[Path]:
        """Every shard's path, whether it is there or not."""
        count = -(-self.items // self.shard_rows)
        return [self.directory / SHARDS / f"{i:05d}.elva" for i in range(count)]

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
        """The shards, mapped."""
        return [Segment(path) for path in self.segments()]

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
