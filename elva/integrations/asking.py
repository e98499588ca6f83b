"""An open index and the model that made it, asked by the threads of other people's programs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any

from elva.errors import UserError
from elva.index import Index
from elva.index.engines import open_engine
from elva.index.where import Where
from elva.model.encoder import Encoder
from elva.search import Hit, Searcher

OURS = ("rank", "score")
"""What is known of an answer beside its item: an index's own field of such a name becomes
`source_<name>`, as those of `elva.data.schema.COLUMNS` do."""


class Asked:
    """An index and its model, open.

    Args:
        index: a directory, whose every byte is read and compared first, or an open `Index`.
        model: where the index's model lies now, or its encoder; where it lay for None.
        k, where: of the questions to come, refused here if no query could have them.
        engine: a word of `open_engine`.

    Raises:
        UserError: in one line: no index there, another model, an argument that no query could have.
    """

    def __init__(
        self,
        index: str | Path | Index,
        model: str | Path | Encoder | None = None,
        *,
        k: int,
        where: Where | None,
        engine: str,
    ) -> None:
        if k < 1:
            raise UserError(f"search: k must be at least 1, got {k}; ask for 10")
        self.index = index if isinstance(index, Index) else Index(index)
        self.index.conditions(where)
        self.engine = open_engine(self.index, engine)
        self.searcher = Searcher.of(self.index, model)
        self.index.check_model(self.searcher.encoder.identity)
        self._lock = Lock()

    def hits(
        self,
        query: str,
        image: str | Path | None = None,
        *,
        k: int,
        instruction: str | None,
        where: Where | None,
    ) -> Sequence[Hit]:
        """The answers to a text, a picture or both, of the arguments of `Searcher.search`."""
        with self._lock:  # a tokenizer takes no two threads
            return self.searcher.search(
                self.index,
                query,
                image=None if image is None else Path(image),
                k=k,
                where=where,
                instruction=instruction,
                engine=self.engine,
            )


def content(hit: Hit) -> str:
    """An answer as a text: what the item says, or what it is called."""
    return hit.text or hit.name


def known(hit: Hit) -> dict[str, Any]:
    """What is known of an answer, flat: the index's fields, and `id`, `rank` (from 1), `score`
    (the cosine), `name`, `summary` and `image` (a path, or None)."""
    fields = {f"source_{n}" if n in OURS else n: value for n, value in hit.metadata.items()}
    image = None if hit.image is None else str(hit.image)
    return {
        **fields, "id": hit.id, "rank": hit.rank, "score": hit.score, "name": hit.name,
        "summary": hit.summary, "image": image,
    }  # fmt: skip
