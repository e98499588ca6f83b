"""What a reader of a format is asked for, and what it gives."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from elva.data.strict import Faults
from elva.errors import DataError
from elva.progress import SILENT, Reporter

_T = TypeVar("_T")


@dataclass(frozen=True)
class Request:
    """What a reader is asked for.

    Args:
        path: A file or folder.
        split: train, val or test.
        images: The folder that pictures' paths start from, where that is not the reader's rule.
        faults: Rows that may be left out, and in which they are listed.
        duplicates: `keep` or `drop` pictures that show what another one shows.
        reporter: Who is told how far a reader is that decodes pictures.
    """

    path: Path
    split: str = "train"
    images: Path | None = None
    faults: Faults = field(default_factory=Faults)
    duplicates: str = "keep"
    reporter: Reporter = SILENT

    def check_split(self, *splits: str) -> None:
        """Refuse a split that a set has not."""
        if self.split not in splits:
            raise DataError(
                f"split must be {' or '.join(splits)}, got {self.split!r}: the set has no other"
            )

    def told(self, entries: Collection[_T], unit: str) -> Iterator[_T]:
        """The entries, and the reporter told how far whoever takes them is."""
        self.reporter.start(f"read {self.path.name}", len(entries), unit)
        for done, entry in enumerate(entries, start=1):
            yield entry
            self.reporter.advance(done)
        self.reporter.finish("")

    def pictures(self, *names: str) -> Path:
        """`images`, or the first folder of some names under the path; the path's own for a file.

        Raises:
            DataError: none of them is there.
        """
        root = self.path if self.path.is_dir() else self.path.parent
        if self.images is not None:
            return self.images
        found = next((root / name for name in names if (root / name).is_dir()), None)
        if found is None:
            raise DataError(
                f"{root}: no folder {' or '.join(names)}; --images names where the pictures lie"
            )
        return found


@dataclass(frozen=True)
class Entry:
    """A query or candidate as its source has it.

    Args:
        id: The source's own, or None where it has none: then equal content is one candidate.
        image: A file or encoded bytes.
        extra: Further fields, kept in `src_content`.
        where: `file:line`.
        name: Of a person's own picture, its path under their folder: it is kept under it, numbered
            by it, and called so in every answer. No other candidate has it.
    """

    text: str | None
    image: Path | bytes | None
    where: str
    id: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    name: str | None = None


@dataclass(frozen=True)
class Reference:
    """A candidate of the source's corpus by its id, and the `file:line` that names it."""

    id: str
    where: str


@dataclass(frozen=True)
class Example:
    """A query with its answers.

    Args:
        positives: None where they are not published: the query is asked, and cannot be judged.
        candidates: What it is to be ranked against, where that is not the whole pool.
        subset: The part of the source, with a pool of its own, that it belongs to.
    """

    query: Entry
    positives: Sequence[Entry | Reference] | None
    negatives: Sequence[Entry | Reference] = ()
    candidates: Sequence[Entry] = ()
    subset: str = ""


@dataclass(frozen=True)
class Source:
    """What a reader gives.

    Args:
        name: Of the dataset, for file names.
        number: M-BEIR's number of it; ours are above 10, a folder's above 1,000,000.
        instruction: What to look for; empty where the queries say it themselves.
        corpus: Candidates with ids, read before the first example, whose answers may name them.
        candidates: Of the pool, beyond the answers; read after the last example.
        prompts: (query, candidate modality) -> an instruction of its own.
        keeps_ids: Ids are M-BEIR's, `<number>:<n>`, and stay as they are.
        sister: The number of the dataset in which further right answers of these queries lie.
        one_query: Rows that ask the same are one query with all their answers.
        shares_answers: The answers of rows that ask the same are right for each of them; where not,
            a row's are its own alone, as benchmarks count them.
        notices: Lines for whoever converts; a reader may add to them as it reads.
        looks: `Item.content_hash` of named pictures, where the reader has it.
        left_out: Why files are not in the data -> their names.
    """

    name: str
    number: int
    instruction: str
    examples: Iterable[Example]
    candidates: Iterable[Entry] = ()
    corpus: Iterable[Entry] = ()
    prompts: Mapping[tuple[str, str], str] = field(default_factory=dict)
    keeps_ids: bool = False
    sister: int | None = None
    one_query: bool = False
    shares_answers: bool = True
    notices: list[str] = field(default_factory=list)
    looks: Mapping[bytes | str, bytes] = field(default_factory=dict)
    left_out: Mapping[str, Sequence[str]] = field(default_factory=dict)
