"""The review: what was judged as a table and a page, and the decisions that come back."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from elva.data import Grain, Query
from elva.data.strict import columns, lines
from elva.errors import DataError
from elva.files import write_text
from elva.report.pictures import attribution
from elva.report.render import render

JUDGED, REVIEW, PAGE = "judged.jsonl", "review.tsv", "review.html"
_DECISIONS = ("keep", "drop", "")


@dataclass(frozen=True)
class Judged:
    """A query, the words that were judged, and its grains."""

    stem: str
    query: Query
    words: str
    grains: tuple[Grain, ...]

    @property
    def kinds(self) -> str:
        return " + ".join(sorted({g.type for g in self.grains}))


def qid_of(line: str) -> str:
    """The query that a line of a query file, grains or qrels belongs to."""
    if line.startswith("{"):
        return str(json.loads(line).get("qid"))
    return next(iter(columns(line)), "")


def review_row(row: Judged, data: Path) -> list[str]:
    """A judged query, not yet decided."""
    grains = "; ".join(f"{g.text} ({g.type})" for g in row.grains)
    image = row.query.image.relative_to(data) if isinstance(row.query.image, Path) else ""
    return ["", row.query.id, row.stem, row.words, grains, str(image)]


def write_review(directory: Path, rows: Iterable[Sequence[str]]) -> None:
    """Write the review as a table and as a page."""
    listed = [[" ".join(cell.split()) for cell in row] for row in rows]
    header = ["decision", "qid", "set", "words", "grains", "image"]
    text = "\n".join("\t".join(row) for row in [header, *listed]) + "\n"
    write_text(directory / REVIEW, text)
    title = f"MRBench, rebuilt: {directory.name.removesuffix('.partial')}"
    credit = attribution(row[1] for row in listed) or ""
    page = render("review.html.j2", title=title, rows=listed, credit=credit)
    write_text(directory / PAGE, page)


def read_review(path: Path) -> dict[str, list[str]]:
    """qid -> the row, decision first."""
    rows: dict[str, list[str]] = {}
    for number, (where, line) in enumerate(lines(path)):
        cells = line.split("\t")
        if number == 0 and cells[0].strip() == "decision":
            continue  # The header.
        if len(cells) < 2 or cells[0].strip() not in _DECISIONS:
            raise DataError(f"{where}: must start with keep, drop or nothing, then a qid")
        rows[cells[1]] = [cells[0].strip(), *cells[1:]]
    return rows
