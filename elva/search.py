"""A model with three verbs: embed items, index them, search.

A query is embedded exactly as a test query is: same instruction, same greedy summary, same [RET].
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from elva.data import Item, Query
from elva.data.schema import COLUMNS, normalise
from elva.errors import DataError, UserError
from elva.index import Index
from elva.index.embeddings import columns
from elva.index.engines import Engine
from elva.index.exact import Found
from elva.index.where import Where
from elva.model.encoder import Encoder, open_encoder
from elva.model.modalities import MODALITIES, must_read
from elva.model.rollout import Encoded
from elva.progress import SILENT, Reporter

_MAX_CHARACTERS = 2000
"""Ours: longer than any query of M-BEIR, short enough for one row of the model."""


_ASK_OTHERWISE = {
    "text": "pass --image",
    "image": "ask in words",
    "image,text": "leave out the words or --image",
}
"""What to do where a model does not read a query of a modality."""


@dataclass(frozen=True)
class Hit:
    """One item that was found."""

    rank: int  # from 1
    id: str
    name: str  # what the data calls it, else its text, its file's name, its id
    score: float  # cosine similarity to the query
    summary: str  # what the model wrote about it
    image: Path | None
    proven_by: str | None = None  # what shows that nothing better is there: codes, rows
    rows_read: int | None = None  # embeddings that the search read, besides codes
    text: str | None = None  # what it says, where it is or has a text
    metadata: Mapping[str, Any] = field(default_factory=dict)  # the index's further fields

    def title(self, hits: Sequence["Hit"]) -> str:
        """Its name; behind it its id, where another of these hits has the same name."""
        again = sum(hit.name == self.name for hit in hits) > 1 and self.id != self.name
        return f"{self.name} ({self.id})" if again else self.name

    def as_json(self) -> dict[str, Any]:
        """All but `text` and `metadata`, whose values need not be JSON's."""
        found = {**asdict(self), "image": None if self.image is None else str(self.image)}
        del found["text"], found["metadata"]
        return found


@dataclass(frozen=True)
class Answer:
    """What a query found, and how the model read it."""

    hits: list[Hit]  # best first
    summary: str  # what the model wrote about the query; "" where it writes none
    embedding: Tensor  # [1, D] fp32


class Searcher:
    """A model with three verbs: embed items, index them, search.

    Args:
        model: a run, a checkpoint directory, a hub name, or an encoder of your own.
        options: `stage`, `max_completion_length`, `read`, `batch_size` of `open_encoder`.

    Example::

        searcher = Searcher("runs/one")
        index = searcher.index("my.index", [Item("1", None, Path("cat.jpg"), "image")])
        hits = searcher.search(index, "a sleeping cat", instruction="Find the picture.")
    """

    def __init__(self, model: str | Path | Encoder, **options: Any) -> None:
        self.encoder: Encoder = (
            open_encoder(model, **options) if isinstance(model, str | Path) else model
        )

    @classmethod
    def of(
        cls,
        index: Index,
        model: str | Path | Encoder | None = None,
        *,
        stage: str | None = None,
    ) -> "Searcher":
        """The searcher of the model that made an index, read as it was then.

        Args:
            model: where it lies now, or an encoder; where it lay for None.
            stage: of a run, the stage or control whose model it is; the last trained for None.

        Raises:
            UserError: the index does not say which it was, or it cannot be opened.
        """
        if model is not None and not isinstance(model, str | Path):
            return cls(model)
        about = index.about
        lay = model or about.get("model")
        if lay is None:
            raise UserError(
                f"index: {index.directory} does not say which model made it; pass --model"
            )
        length, read = about.get("max_completion_length"), about.get("read", "at_ret")
        return cls(lay, stage=stage, max_completion_length=length, read=read)

    def embed(self, items: Sequence[Item], reporter: Reporter = SILENT) -> Tensor:
        """[n, D] fp32 embeddings.

        Raises:
            UserError: an item of a kind that the model does not read.
        """
        return self._encoded(items, reporter).embeddings

    def _encoded(self, items: Sequence[Item], reporter: Reporter) -> Encoded:
        kinds = Counter(item.modality for item in items)
        must_read(self.encoder.identity.name, self.encoder.modalities, kinds, "those given")
        return self.encoder(items, reporter.advance)

    def index(
        self,
        directory: str | Path,
        items: Sequence[Item],
        *,
        dtype: str = "float16",
        names: Mapping[str, str] | None = None,
        metadata: Mapping[str, Sequence[Any]] | None = None,
        about: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        reporter: Reporter = SILENT,
    ) -> Index:
        """Embed items and make an index of them.

        Args:
            names: id -> what to call it.
            metadata: further fields to search by, a value for each item.
            about: noted in the index; `instructions` ({modality of a query: instruction}) are used
                by `search`.
        """
        out = self._encoded(items, reporter)
        return Index.build(
            directory,
            [item.id for item in items],
            out.embeddings,
            model=self.encoder.identity,
            dtype=dtype,
            columns={
                **columns(items, names or {}), "summary": out.summaries, **(metadata or {}),
            },
            about={**self.encoder.about, **(about or {})},
            overwrite=overwrite,
        )  # fmt: skip

    def search(
        self,
        index: Index,
        query: str = "",
        *,
        image: Path | None = None,
        k: int = 10,
        where: Where | None = None,
        instruction: str | None = None,
        engine: Engine | None = None,
    ) -> list[Hit]:
        """The k best items, best first; a tie goes to the earlier row.

        Args:
            query: what the item should show or say; may be empty where there is an image.
            image: a picture to start from.
            k: how many; all of them where the index is smaller.
            where: conditions on the index's fields; see `Index.search`.
            instruction: what to look for, as in training; the index's own for None.
            engine: what finds them, of `open_engine`; exact search for None.

        Raises:
            UserError: an argument that cannot be answered, in one line.
        """
        return self.answer(
            index, query, image=image, k=k, where=where, instruction=instruction, engine=engine
        ).hits

    def answer(
        self,
        index: Index,
        query: str = "",
        *,
        image: Path | None = None,
        k: int = 10,
        where: Where | None = None,
        instruction: str | None = None,
        engine: Engine | None = None,
    ) -> Answer:
        """What `search` finds, of the same arguments, with what the model wrote about the query."""
        check_query(query, k, image)
        index.check_model(self.encoder.identity)
        asked = _query(self.encoder, index, query, image, instruction)
        read = self._encoded([asked], SILENT)
        found = (engine or index).search(read.embeddings, k, where=where)
        proven_by = _proof(found) if engine is None or engine is index else None
        rows = found.rows[0][found.rows[0] >= 0].numpy()
        table = index.table.take(rows).to_pylist()
        hits = [
            Hit(
                rank,
                item["id"],
                item.get("name") or item["id"],
                score,
                item.get("summary") or "",
                Path(item["image"]) if item.get("image") else None,
                proven_by,
                found.rows_read,
                item.get("text"),
                {name: value for name, value in item.items() if name not in COLUMNS},
            )
            for rank, (score, item) in enumerate(
                zip(found.scores[0].tolist(), table, strict=False), start=1
            )
        ]
        return Answer(hits, read.summaries[0], read.embeddings)


def _proof(found: Found) -> str:
    """What shows that an exact search has missed nothing."""
    return "codes" if found.by_codes is not None and bool(found.by_codes.all()) else "rows"


def check_query(query: str, k: int, image: Path | None) -> None:
    """UserError for a query that no index could answer."""
    if k < 1:
        raise UserError(f"search: k must be at least 1, got {k}; ask for 10")
    if not normalise(query) and image is None:
        raise UserError(f"search: query must hold words, got {query!r}; pass some, or a picture")
    if len(query) > _MAX_CHARACTERS:
        raise UserError(
            f"search: query must have at most {_MAX_CHARACTERS} characters, got {len(query)}; "
            "shorten it"
        )
    if any("\ud800" <= letter <= "\udfff" for letter in query):
        raise UserError(f"search: query must be valid text, got {query!r}; pass it as UTF-8")
    if image is None:
        return
    try:
        Item("", None, image, "image", where="search").load_image()
    except DataError as error:
        why = str(error).removeprefix("search: ")
        raise UserError(
            f"search: image must be a file that shows a picture, got {why}; pass another"
        ) from None


def _query(
    encoder: Encoder, index: Index, words: str, image: Path | None, instruction: str | None
) -> Query:
    """The query as the data's own reader would have made it."""
    text = normalise(words) or None
    modality = ",".join(m for m, there in (("image", image), ("text", text)) if there is not None)
    if modality not in encoder.modalities:
        reads = " or ".join(MODALITIES[m][0] for m in MODALITIES if m in encoder.modalities)
        raise UserError(
            f"search: the query must be {reads} for {encoder.identity.name}, got "
            f"{MODALITIES[modality][0]}; {_ASK_OTHERWISE[modality]}"
        )
    known = index.about.get("instructions", {})
    if encoder.instructions == "unread" and instruction is not None:
        raise UserError(
            f"search: --instruction must be left out of {encoder.identity.name}, which reads none"
        )
    asked = known.get(modality) if instruction is None else instruction
    if asked is None and encoder.instructions == "required":
        raise UserError(
            f"search: {modality.replace(',', ' and ')} must have an instruction, got none in "
            f"{index.directory}; pass --instruction, or ask by {' or '.join(known) or 'another'}"
        )
    return Query(
        "search", text, image, modality, instruction=asked or "", task="t2i",
        positives=(), raw_text=words, where="search",
    )  # fmt: skip
