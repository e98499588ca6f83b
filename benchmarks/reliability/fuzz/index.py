"""The row of an index's files: their fields with the right checksums, their bytes without."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random

from benchmarks.reliability.crashes import forged
from benchmarks.reliability.fuzz.bounds import came_of, report
from benchmarks.reliability.fuzz.mutate import json_with_another_value, mutated
from benchmarks.reliability.row import Outcome, Row, Trials
from elva.index import segment
from elva.index.embeddings import Embeddings


class Place:
    """An index and embeddings, and what they may answer.

    Each way of changing them writes a file and returns what then reads it; a change of fields bears
    its checksums, a change of bytes does not.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        forged.make(root)
        self.whole = {p: p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
        self.headers = [forged.Header(root, part) for part in ("segment", "codes")]
        self.table = bytes(self._table())
        self.planned = self.plan()
        self.manifest = self.headers[0].listed
        self.right = [self.answer()]
        first, last = self.manifest["segments"]
        undeleted = {**first, "deleted": ""}
        # What its writer might have written: fewer segments, or none of their rows deleted.
        for segments in ([undeleted, last], [first], [last], [undeleted], []):
            self._write_listing(json.dumps({**self.manifest, "segments": segments}).encode())
            self.right.append(self.answer())
        self.restore()

    def restore(self) -> None:
        """The files as they were, and none beside them."""
        for path in self.root.rglob("*"):
            if path.is_file() and path not in self.whole:
                path.unlink()
        for path, content in self.whole.items():
            path.write_bytes(content)

    def answer(self) -> object:
        return forged.found(self.root)

    def of_manifest(self, random: Random) -> Callable[[], object]:
        self._write_listing(_forged(json.dumps(self.manifest).encode(), random))
        return self.right_answer

    def of_header(self, random: Random) -> Callable[[], object]:
        header = random.choice(self.headers)
        header.write(_forged(header.text, random))
        return self.right_answer

    def of_plan(self, random: Random) -> Callable[[], object]:
        path = self.root / "e" / "embeddings.json"
        path.write_bytes(_forged(self.whole[path], random))

        def read() -> None:
            assert self.plan() == self.planned, "embeddings as no plan that was written has them"

        return read

    def plan(self) -> object:
        ids, query = Embeddings.open(self.root / "e").queries()
        return ids, query.tolist()

    def of_table(self, random: Random) -> Callable[[], object]:
        """Of ids nothing says which are right: errors and bounds are judged."""
        path = forged.write_table(self.root, mutated(self.table, [self.table], random))
        return lambda: segment.Segment(path).table["id"].to_pylist()

    def of_bytes(self, random: Random) -> Callable[[], object]:
        """Any change of any byte is refused."""
        path = random.choice([p for p in self._of_index() if self.whole[p]])
        content = mutated(self.whole[path], [self.whole[path]], random)
        path.write_bytes(content)

        def read() -> None:
            self.answer()
            assert content == self.whole[path], f"another {path.name} is taken for what was written"

        return read

    def right_answer(self) -> None:
        found = self.answer()
        assert found in self.right, f"answers as no index that was written: {str(found)[:200]}"

    def _of_index(self) -> list[Path]:
        return [path for path in self.whole if path.is_relative_to(self.root / "i")]

    def _write_listing(self, body: bytes) -> None:
        forged.write_listing(self.root / "i" / "index.json", body)

    def _table(self) -> memoryview:
        one = segment.Segment(self.headers[0].path)
        start = 4096 + one.rows_bytes
        return one.content[start : start + self.headers[0].fields["table_bytes"]]


def _forged(text: bytes, random: Random) -> bytes:
    """Mostly another value, so that it is a document still."""
    other = json_with_another_value(text, random) if random.random() < 0.6 else None
    return mutated(text, [text], random) if other is None else other


WAYS = (Place.of_manifest, Place.of_header, Place.of_plan, Place.of_table, Place.of_bytes)


def trials(wanted: Trials) -> Outcome:
    """Files of an index, changed."""
    outcome = Outcome()
    with tempfile.TemporaryDirectory(prefix="elva-fuzz-index-") as scratch:
        place = Place(Path(scratch))
        for number in wanted.numbers:
            random, way = Random(f"{wanted.seed} {number}"), WAYS[number % len(WAYS)]
            outcome.tried += 1
            try:
                outcome.counts[came_of(way(place, random))] += 1
            except BaseException as error:  # noqa: BLE001  whatever a reader should not raise
                where = f"{way.__name__} seed {wanted.seed} number {number}"
                outcome.wrong.append(report(where, error))
            place.restore()
    return outcome


ROWS = {
    "fuzz-index-header": Row(
        title="an index's manifest, headers and ids, and the plan of embeddings, forged with the "
        "right checksums; and any of its bytes changed without",
        goal="100,000, each refused in a line or answering as an index that was written",
        unit="files",
        amount=100_000,
        smoke=40,
        chunk=250,
        run=trials,
        said=lambda kept: f"{kept['counts'].get('refused', 0):,} refused in a line",
    ),
}
