"""Any source as a data directory in M-BEIR's layout: one schema, one loader, one writer.

What is written, the loader reads: queries are numbered, grouped by task, and refused at their
`file:line` where M-BEIR's layout has no place for them. What a source called an item stays in
`src_content`. Candidates go to disk as they come.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from elva.data import extras, mbeir, strict
from elva.data.formats.places import Places, copy
from elva.data.formats.source import Entry, Example, Reference, Source
from elva.data.instructions import write_instructions
from elva.data.layout import file_stem
from elva.data.schema import TASKS, Item, hashed_id, modalities, normalise
from elva.data.strict import Faults, dump
from elva.errors import DataError
from elva.files import check_directory, write_directory

_MAX_QUERIES, MAX_CANDIDATES = 499_999, 9_999_999
"""M-BEIR's ids a dataset."""

MAX_ANSWERS = 50_000_000
"""Ours: of all rows that ask the same, written out for each of them; 0.6 GB of ids."""

_OWN_BYTES, _ID_BYTES = 512, 20
"""Of a line, at most: names, ids and a path of ours; one answer."""

MODALITIES = ("text", "image", "image,text")


_Part = tuple[str, str]
"""A subset, and a task or a modality."""


@dataclass(frozen=True)
class _Checked:
    """An entry that can be written.

    Args:
        key: By which equal candidates are one: its name, the source's id, or the content.
        picture: What tells its picture from others (`Places.key`), or None.
        suffix: Of the picture's file.
        size: Bytes of its line, at most, without a query's answers.
    """

    entry: Entry
    modality: str
    key: str | bytes
    picture: bytes | str | None
    suffix: str
    size: int


@dataclass
class _Asked:
    """A query to be written: its fields but for the answers, and these by number."""

    fields: dict[str, Any]
    where: str
    size: int
    group: bytes
    positives: list[int]
    negatives: list[int]
    outside: list[str]
    judged: bool


def convert(
    source: Source, output: Path, *, split: str = "train", faults: Faults | None = None
) -> dict[str, Any]:
    """Write a source as a data directory that `elva.data.load` reads.

    Args:
        output: An absent or empty directory; it appears whole or not at all.
        faults: Rows that may be left out, and in which they are listed.

    Returns:
        Counts: queries by task, candidates, pictures, notices, and the bad rows.

    Raises:
        DataError: a row that is not as its format has it, as `file:line: rule`.
    """
    check_output(output)
    faults = faults or Faults()
    counts: dict[str, Any] = {}

    def fill(partial: Path) -> None:
        with ExitStack() as files:
            writer = _Writer(source, partial, split, files)
            for entry in source.corpus:
                with faults.row():
                    writer.candidate(entry)
            for example in source.examples:
                with faults.row():
                    writer.add(example)
            for entry in source.candidates:
                with faults.row():
                    writer.candidate(entry)
        counts.update(writer.finish())

    if output.exists():
        output.rmdir()
    write_directory(output, fill)
    return {**counts, "bad": list(faults.found)}


def check_output(output: Path) -> None:
    """Refuse to write where something lies, or where nothing can be written."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise DataError(f"{output}: must be empty; choose another directory")
    check_directory(output)


class _Writer:
    """Numbers what it is given, copies pictures, and groups queries by task."""

    def __init__(self, source: Source, root: Path, split: str, files: ExitStack) -> None:
        self.source, self.root, self.split, self.files = source, root, split, files
        self.pools: dict[_Part, IO[str]] = {}
        self.queries: dict[_Part, list[_Asked]] = {}
        self.groups: dict[bytes, dict[int, None]] = {}
        self.first: dict[bytes, _Asked] = {}
        self.numbers: dict[tuple[str, str | bytes], int] = {}  # by subset and key
        self.modalities = bytearray(MAX_CANDIDATES + 1)  # by number, in MODALITIES
        self.restricted: dict[str, list[str]] = {}
        self.places = Places(root, source.name)
        self.looks: dict[bytes | str, bytes] = dict(source.looks)
        self.asked: set[str] = set()
        self.count = 0
        self.outside = 0

    def add(self, example: Example) -> None:
        """One query; nothing of it is kept if any part of it is bad."""
        query, where, subset = example.query, example.query.where, example.subset
        if query.id is not None and query.id in self.asked:
            raise DataError(f"{where}: query {query.id} again")
        asked = self._checked(query)
        right_ones, judged = example.positives or (), example.positives is not None
        outside = [one.id for one in right_ones if self._is_outside(one)]
        positives = [self._found(one) for one in right_ones if not self._is_outside(one)]
        negatives = [self._found(one) for one in example.negatives]
        candidates = [self._found(one) for one in example.candidates]
        written = outside if self.source.keeps_ids else []
        if judged and not positives and not written:
            raise DataError(f"{where}: has no right answer")
        found = [self._modality(one) for one in (*positives, *negatives, *candidates)]
        shown = [modality for part, modality in self.pools if part == subset]
        task = _task(where, asked.modality, _only(where, found or shown))
        if self.count >= _MAX_QUERIES:
            raise DataError(f"{where}: more than {_MAX_QUERIES:,} queries; split the source")
        number = self._own_number(query, self.count)
        group = f"{subset} {task} ".encode() + self._asks(query, asked)
        right, wrong, among = (
            [self._number(one, subset) for one in some]
            for some in (positives, negatives, candidates)
        )
        self.outside += len(outside)
        if query.id is not None:
            self.asked.add(query.id)
        self.groups.setdefault(group, {}).update(dict.fromkeys(right))
        if group in self.first:
            self.first[group].negatives += wrong
            return
        fields = self._query(asked, number, task)
        one = _Asked(fields, where, asked.size, group, right, wrong, written, judged)
        self.queries.setdefault((subset, task), []).append(one)
        self.count += 1
        if self.source.one_query:
            self.first[group] = one
        if among:
            self.restricted[fields["qid"]] = [self._did(n) for n in dict.fromkeys(among)]

    def candidate(self, entry: Entry) -> None:
        """One candidate; equal ones of a source without ids are one."""
        self._number(self._found(entry), "")

    def finish(self) -> dict[str, Any]:
        """Write all that was given, and count it."""
        source = self.source
        if not self.queries:
            raise DataError(f"{source.name}: no query that can be read")
        self._check_answers()
        prompts = {kinds: [prompt] for kinds, prompt in source.prompts.items()}
        sets, tasks = {}, dict.fromkeys((task for _, task in self.queries), 0)
        for (subset, task), asked in self.queries.items():
            stem = file_stem("_".join(filter(None, (source.name, subset))), task)
            kinds = modalities(task)
            prompts[kinds] = [source.prompts.get(kinds, source.instruction)]
            copy(self._pool_file(subset, kinds[1]), self._pool_file(stem))
            mbeir.write_queries(self.root, stem, self.split, list(self._rows(asked)))
            sets[stem] = len(asked)
            tasks[task] += len(asked)
        for part in self.pools:
            self._pool_file(*part).unlink()
        write_instructions(self.root, source.name, source.number, prompts)
        if self.restricted:
            extras.write_extras(self.root, {}, {}, self.restricted)
        return {
            "queries": tasks,
            "sets": sets,
            "candidates": len(self.numbers),
            "pictures": len(self.places),
            "notices": [*source.notices, *self._notices()],
        }

    def _found(self, entry: Entry | Reference) -> _Checked | int:
        """An answer that can be written, or the number of one that is."""
        if entry.id is not None and ("", entry.id) in self.numbers:
            return self.numbers["", entry.id]
        if isinstance(entry, Reference):
            raise DataError(f"{entry.where}: {entry.id!r} is not in the corpus")
        return self._checked(entry)

    def _is_outside(self, one: Entry | Reference) -> bool:
        """Whether an answer is named that only the sister's pool holds."""
        return (
            self.source.sister is not None
            and isinstance(one, Reference)
            and ("", one.id) not in self.numbers
            and one.id.startswith(f"{self.source.sister}:")
            and _is_id(one.id)
        )

    def _checked(self, entry: Entry) -> _Checked:
        has_text = bool(normalise(entry.text or ""))
        if entry.image is None and not has_text:
            raise DataError(f"{entry.where}: has neither text nor picture")
        there = (("image", entry.image is not None), ("text", has_text))
        modality = ",".join(name for name, found in there if found)
        size = _size(entry)
        picture, suffix = None, ""
        if entry.image is not None:
            picture, suffix = self.places.key(entry.image, entry.name, entry.where)
        key = entry.name or entry.id or self._content(entry, picture)
        return _Checked(entry, modality, key, picture, suffix, size)

    def _asks(self, query: Entry, asked: _Checked) -> bytes:
        """What a query has in common with those that share its answers."""
        if not self.source.shares_answers:
            return b"%d" % self.count
        return asked.key if isinstance(asked.key, bytes) else self._content(query, asked.picture)

    def _content(self, entry: Entry, picture: bytes | str | None) -> bytes:
        """What an item says and shows: equal where text and decoded picture are."""
        said = Item("", normalise(entry.text or ""), None, "text").content_hash()
        if picture is None:
            return said[:16]
        if picture not in self.looks:
            item = Item("", None, entry.image, "image", where=entry.where)
            self.looks[picture] = item.content_hash()
        return said[:16] + self.looks[picture][:16]

    def _modality(self, one: _Checked | int) -> str:
        return MODALITIES[self.modalities[one]] if isinstance(one, int) else one.modality

    def _own_number(self, entry: Entry, count: int) -> int:
        """An item's number: the source's where its ids stay, else the next."""
        if not self.source.keeps_ids:
            return count + 1
        prefix = f"{self.source.number}:"
        id = entry.id or ""
        if not (id.startswith(prefix) and _is_id(id) and f"{prefix}{int(id[len(prefix) :])}" == id):
            raise DataError(f"{entry.where}: id {id!r} is not {prefix}<number> as the first is")
        return int(id[len(prefix) :])

    def _number(self, one: _Checked | int, subset: str) -> int:
        """The number of a candidate, which is written if it is new to its subset."""
        if isinstance(one, int):
            return one
        if (subset, one.key) in self.numbers:
            return self.numbers[subset, one.key]
        if len(self.numbers) >= MAX_CANDIDATES:
            raise DataError(f"{one.entry.where}: more than {MAX_CANDIDATES:,} candidates")
        if one.entry.name is None:
            number = self._own_number(one.entry, len(self.numbers))
        else:
            number = self.places.number(one.entry.name, MAX_CANDIDATES)
        part = subset, one.modality
        if part not in self.pools:
            path = self._pool_file(*part)
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "w", encoding="utf-8", newline="\n")  # noqa: SIM115 (the stack's)
            self.pools[part] = self.files.enter_context(file)
        row = {
            "txt": one.entry.text if "text" in one.modality else None,
            "img_path": self._place(one),
            "modality": one.modality,
            "did": self._did(number),
            "src_content": _extra(one.entry),
        }
        self.pools[part].write(dump(row) + "\n")
        self.numbers[subset, one.key] = number
        self.modalities[number] = MODALITIES.index(one.modality)
        return number

    def _query(self, asked: _Checked, number: int, task: str) -> dict[str, Any]:
        return {
            "qid": f"{self.source.number}:{number}",
            "query_txt": asked.entry.text if "text" in asked.modality else None,
            "query_img_path": self._place(asked),
            "query_modality": asked.modality,
            "query_src_content": _extra(asked.entry),
            "task_id": TASKS[task],
        }

    def _rows(self, queries: Sequence[_Asked]) -> Iterator[dict[str, Any]]:
        """M-BEIR's rows; those that ask the same share their answers, their own first."""
        for one in queries:
            right = dict.fromkeys(one.positives) | self.groups[one.group]
            wrong = dict.fromkeys(n for n in one.negatives if n not in right)
            if one.size + _ID_BYTES * (len(right) + len(wrong)) > strict.MAX_LINE_BYTES:
                raise DataError(f"{one.where}: more answers than a line holds")
            yield {
                **one.fields,
                "pos_cand_list": [*map(self._did, right), *one.outside] if one.judged else None,
                "neg_cand_list": [*map(self._did, wrong)],
            }

    def _all(self) -> Iterator[_Asked]:
        return (one for some in self.queries.values() for one in some)

    def _check_answers(self) -> None:
        total = sum(len(self.groups[one.group]) for one in self._all())
        if total > MAX_ANSWERS:
            raise DataError(
                f"{self.source.name}: rows that ask the same have {total:,} answers together, more "
                f"than {MAX_ANSWERS:,}; write each query once"
            )

    def _notices(self) -> list[str]:
        shown = {(subset, modalities(task)[1]) for subset, task in self.queries}
        found = [
            f"candidates of kind {modality} are in no pool: no query asks for them"
            for _, modality in (part for part in self.pools if part not in shown)
        ]
        if self.outside:
            alone = sum(not self.groups[one.group] for one in self._all())
            found.append(
                f"{self.outside:,} right answers lie in the sister set of number "
                f"{self.source.sister}, not in this corpus; {alone:,} queries have no other"
            )
        return found

    def _did(self, number: int) -> str:
        return f"{self.source.number}:{number}"

    def _pool_file(self, *stem: str) -> Path:
        name = f"mbeir_{' '.join(stem)}_cand_pool.jsonl"
        return self.root / "cand_pool" / "local" / name

    def _place(self, checked: _Checked) -> str | None:
        image, picture = checked.entry.image, checked.picture
        if image is None or picture is None:
            return None
        return self.places.put(image, picture, checked.suffix)


def _size(entry: Entry) -> int:
    """Bytes that an entry's line takes at most."""
    try:
        line = dump({"text": entry.text, "src_content": _extra(entry)})
        size = len(line.encode()) + _OWN_BYTES
    except (ValueError, RecursionError) as error:
        reason = "holds a lone surrogate" if isinstance(error, UnicodeError) else str(error)
        raise DataError(f"{entry.where}: no line of JSON: {reason}") from error
    if size > strict.MAX_LINE_BYTES:
        raise DataError(f"{entry.where}: longer than a line of {strict.MAX_LINE_BYTES} bytes")
    return size


def _only(where: str, modalities: Sequence[str]) -> str:
    """The one kind of all candidates of a query: a task's pool holds no other."""
    found = dict.fromkeys(modalities)
    if len(found) != 1:
        raise DataError(f"{where}: candidates of several kinds, {' and '.join(found)}")
    return next(iter(found))


def _task(where: str, query: str, candidate: str) -> str:
    for task in TASKS:
        if modalities(task) == (query, candidate):
            return task
    raise DataError(f"{where}: {query} to {candidate} is no task of M-BEIR")


def _is_id(id: str) -> bool:
    try:
        return hashed_id(id) >= 0
    except ValueError:
        return False


def _extra(entry: Entry) -> str | None:
    fields = {**({"id": entry.id} if entry.id is not None else {}), **entry.extra}
    if entry.name is not None:
        fields = {"file": entry.name, **fields}
    return dump(fields) if fields else None
