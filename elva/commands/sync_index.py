"""`elva index sync`: an index of a folder follows the folder.

What is new is embedded, what is gone is deleted, what changed is replaced: each batch one change of
the index, so a killed sync has done what it did and the next one does the rest. A picture whose
content the index knows, under another name, with other captions or a new date, keeps its embedding.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from elva.data.formats.folder import Contents, contents
from elva.data.formats.scan import PictureFile
from elva.data.strict import HINT, Faults
from elva.errors import DataError, IndexFault, UserError, printable
from elva.index import Index, fields, folder
from elva.model.encoder import Encoder
from elva.model.rollout import Encoded
from elva.progress import SILENT, Reporter

BATCH = 1024
"""Pictures of one change. Ours: what a kill can cost."""

_LOOK_MS = 500
"""Ours: how long a watched folder is waited for before one looks at the keyboard."""

_MANY_SEGMENTS = 64
"""Ours: from here on compacting is worth a word."""


@dataclass
class Plan:
    """What a sync has to do, by names; each picture of the folder is in one list, `gone` apart.

    Args:
        new: their content is not in the index.
        changed: another content than the index has under the name.
        moved: the content lies in the index under another name.
        relabelled: the same content with another date or other captions.
        unchanged: nothing to do.
        gone: in the index, and no longer in the folder.
        kept: in the index, and there, but not to be read now: their rows stay as they are.
        unread: not in the index, and not to be read now.
    """

    new: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    moved: list[str] = field(default_factory=list)
    relabelled: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """How many of each."""
        return {kind: len(names) for kind, names in vars(self).items()}


@dataclass(frozen=True)
class Folder:
    """A folder as it is beside the index as it is."""

    index: Index
    found: Contents
    plan: Plan
    kinds: Mapping[str, pa.DataType]
    row_of: Mapping[str, int]  # digest -> a row whose embedding is of that content
    retyped: Sequence[str]  # fields of numbers in the index, of which a caption now says a text


def compare(directory: Path, root: Path, faults: Faults) -> Folder:
    """What a sync would do; nothing is embedded and nothing written.

    Raises:
        UserError, DataError: an index of another folder or of none, a folder that cannot be read.
    """
    index = Index(directory, verify=False)
    known, here = index.about.get("folder"), str(root.resolve())
    if known is None or "digest" not in index.table.schema.names:
        raise _of_no_folder(directory)
    if known != here:
        raise IndexFault(
            f"{directory}: must be synced with its own folder, {printable(str(known))}, got "
            f"{printable(here)}; name that, or build an index of this one"
        )
    found = contents(root, faults)
    rows = [int(row) for row in index.alive.nonzero()[0]]
    stored = {
        one["id"]: {**one, "row": row}
        for row, one in zip(rows, index.table.take(rows).to_pylist(), strict=True)
        if one["digest"] is not None  # else added by hand, and none of the folder's
    }
    row_of = {one["digest"]: one["row"] for one in stored.values()}
    kinds, retyped = _kinds(index, found)
    absent = {*stored} - {one.name for one in found.pictures}
    closed = absent & _closed(root, found, stored)
    plan = Plan(gone=sorted(absent - closed), kept=sorted(closed))
    words = fields.arrays([found.known.get(p.name, {}) for p in found.pictures], kinds, folder.OWN)
    of = {name: column.to_pylist() for name, column in words.items()}
    own = [name for name in index.table.schema.names if name not in folder.OWN]
    for place, picture in enumerate(found.pictures):
        said = {name: values[place] for name, values in of.items()}
        kind = "kept" if picture.name in stored else "unread"
        with faults.row(HINT):
            kind = _kind(picture, stored.get(picture.name), said, own, row_of)
        getattr(plan, kind).append(picture.name)
    return Folder(index, found, plan, kinds, row_of, retyped)


def sync(
    directory: Path,
    root: Path,
    encoder: Callable[[], Encoder],
    *,
    skip_bad: int = 0,
    batch: int = BATCH,
    reporter: Reporter = SILENT,
) -> tuple[Index, dict[str, Any]]:
    """Make an index of a folder what the folder is.

    Args:
        encoder: opens the index's model; called only where something is to be embedded.
        skip_bad: so many pictures that cannot be read, and rows of captions, are left out and
            listed; one more ends it. The row of a picture that was read before stays.
        batch: pictures embedded between two moments at which a kill costs nothing.

    Returns:
        The index; and the counts of `Plan`, of what was done, `left_out`, `bad` (a line each) and
        `notices`.

    Raises:
        UserError, DataError: as `compare`; another model; a picture that cannot be read, after
            which the index holds the batches before it.
    """
    faults = Faults(skip_bad)
    there = compare(directory, root, faults)
    index, plan, found = there.index, there.plan, there.found
    for line in found.notices:
        reporter.say(line)
    for name in there.retyped:
        index = _retyped(index, name)
    by_name = {one.name: one for one in found.pictures}
    added: set[str] = set()
    reused = [by_name[name] for name in (*plan.moved, *plan.relabelled)]
    for start in range(0, len(reused), batch):
        some = reused[start : start + batch]
        index = _added(index, there, some, _known(there, some), added)
    fresh = [by_name[name] for name in sorted((*plan.new, *plan.changed))]
    bad: set[str] = set()
    if fresh:
        model = encoder()
        index.check_model(model.identity)
        reporter.start(f"{directory}: embed", len(fresh), "pictures")
        for start in range(0, len(fresh), batch):
            some = fresh[start : start + batch]
            good, out = folder.embedded(model, some, faults, reporter, start)
            bad |= {one.name for one in some} - {one.name for one in good}
            index = _added(index, there, good, out, added)
            reporter.advance(start + len(some))
    if plan.gone:
        index = index.delete(plan.gone)
    reporter.finish("")
    late = len(reused) + len(fresh) - len(bad) - len(added)
    advice = [f"{late} pictures changed meanwhile; the next sync takes them up"] if late else []
    advice += _advice(index)
    for line in advice:
        reporter.say(line)
    done = _done(plan, added, bad).counts()
    told = {"left_out": found.left_out, "bad": [*faults.found]}
    return index, {**done, **told, "notices": [*found.notices, *advice]}


def _done(plan: Plan, added: Collection[str], bad: Collection[str]) -> Plan:
    """What was done of a plan.

    Args:
        bad: pictures that could not be read when they were to be embedded.
    """
    written = {
        kind: [name for name in getattr(plan, kind) if name in added]
        for kind in ("new", "changed", "moved", "relabelled")
    }
    return replace(
        plan,
        **written,
        kept=sorted([*plan.kept, *(name for name in plan.changed if name in bad)]),
        unread=sorted([*plan.unread, *(name for name in plan.new if name in bad)]),
    )


def _kinds(index: Index, found: Contents) -> tuple[dict[str, pa.DataType], list[str]]:
    """field -> its type, the index's where it has one that holds what the captions say; and the
    fields that are numbers in the index and must become texts."""
    kinds, retyped = fields.kinds(found.known.values()), []
    for name in [n for n in kinds if n in index.table.schema.names and n not in folder.OWN]:
        there = index.table.schema.field(name).type
        if there == pa.string():
            kinds[name] = there  # numbers are texts as well
        elif there != kinds[name] and there != pa.null():
            by_hand = pc.and_(pc.is_valid(index.table[name]), pc.is_null(index.table["digest"]))
            if there != pa.float64() or pc.any(by_hand.filter(pa.array(index.alive))).as_py():
                raise IndexFault(
                    f"{index.directory}: field {printable(name)} must be of type {there} as in "
                    f"items that were added by hand, got {kinds[name]}; mend the captions, or "
                    "delete those items"
                )
            retyped.append(name)
    return kinds, retyped


def _retyped(index: Index, name: str) -> Index:
    """The index with a field's numbers as texts, in one change: a field has one type."""
    valid = pc.is_valid(index.table[name]).to_numpy(zero_copy_only=False)
    rows = (index.alive & valid).nonzero()[0]
    table = index.table.take(pa.array(rows))
    texts = [str(int(v)) if v.is_integer() else str(v) for v in table[name].to_pylist()]
    columns = {n: table[n] for n in table.schema.names if n != "id"}
    columns[name] = pa.array(texts, pa.string())
    return index.add(
        table["id"].to_pylist(), index.embeddings(rows), model=index.model, columns=columns,
        overwrite=True,
    )  # fmt: skip


def _closed(root: Path, found: Contents, stored: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """Names of the index whose files are there and as they were, though they cannot be read now:
    in a folder that is closed, of a format whose reader is not installed."""
    out = {name for names in found.left_out.values() for name in names}
    closed = tuple(f"{name}/" for name in found.left_out.get("closed", ()))
    return {
        name for name, one in stored.items()
        if name.startswith(closed) or (name in out and _stamp(root / name) == _known_stamp(one))
    }  # fmt: skip


def _stamp(path: Path) -> tuple[int, int] | None:
    """Size and time of change of a file; None where it is gone."""
    try:
        now = path.stat()
    except OSError:
        return None
    return now.st_size, now.st_mtime_ns


def _known_stamp(one: Mapping[str, Any]) -> tuple[int, int]:
    return one["size"], one["modified_ns"]


def _kind(
    picture: PictureFile,
    known: Mapping[str, Any] | None,
    said: Mapping[str, Any],
    own: Sequence[str],
    row_of: Mapping[str, int],
) -> str:
    """The list of `Plan` that a picture of the folder belongs to."""
    if known is None:
        return "moved" if picture.digest() in row_of else "new"
    same_stamp = (picture.size, picture.modified_ns) == _known_stamp(known)
    if not same_stamp and picture.digest() != known["digest"]:
        return "changed"
    labels = all(said.get(name) == known.get(name) for name in {*own, *said})
    return "unchanged" if same_stamp and labels else "relabelled"


def _known(there: Folder, some: Sequence[PictureFile]) -> Encoded:
    """The embeddings and summaries of pictures whose content the index holds."""
    rows = [there.row_of[one.digest()] for one in some]
    summaries = there.index.table["summary"].take(rows).to_pylist()
    return Encoded(there.index.embeddings(rows), [text or "" for text in summaries])


def _added(
    index: Index, there: Folder, some: Sequence[PictureFile], out: Encoded, added: set[str]
) -> Index:
    """The index with some pictures, those that changed in the place of what they were.

    Args:
        added: takes the names of those that are still what was embedded.
    """
    table, rows = folder.table(some, out, there.found.known, there.kinds)
    if not len(rows):
        return index
    named = {name: table[name] for name in table.schema.names if name != "id"}
    ids = table["id"].to_pylist()
    added.update(ids)
    return index.add(ids, rows, model=index.model, columns=named, overwrite=True)


def _advice(index: Index) -> list[str]:
    if len(index.segments) < _MANY_SEGMENTS:
        return []
    return [
        f"{index.directory} has {len(index.segments)} segments; elva index compact makes them one"
    ]


def folder_of(directory: Path) -> Path:
    """Where the folder lies that an index was built of; IndexFault where it was built of none."""
    known = Index(directory, verify=False).about.get("folder")
    if known is None:
        raise _of_no_folder(directory)
    return Path(known)


def _of_no_folder(directory: Path) -> IndexFault:
    return IndexFault(
        f"{directory}: must be of a folder to be synced, got one that was not built by "
        "elva index build --folder; build it so"
    )


def follow(
    directory: Path,
    root: Path,
    once: Callable[[], object],
    reporter: Reporter,
    changes: Iterable[Collection[object]] | None = None,
) -> None:
    """Sync once, and again after every change of the folder, until interrupted.

    Args:
        once: syncs; what it cannot read is a line, and tried again after the next change.
        changes: what changed since the last, from the first on also where nothing did; of the file
            system for None.

    Raises:
        UserError: the package that watches is not installed.
    """
    if changes is None:
        try:
            from watchfiles import watch
        except ImportError:
            raise UserError(
                "index: --watch must have watchfiles, got none; pip install 'elva[watch]'"
            ) from None
        changes = watch(root, yield_on_timeout=True, rust_timeout=_LOOK_MS)
    begun = False
    for found in changes:  # it watches before the first sync, so that none is missed meanwhile
        if begun and not found:
            continue
        try:
            once()
        except DataError as error:  # a picture that is still being copied, say
            if not begun:
                raise
            reporter.say(str(error))
        if not begun:
            reporter.say(f"{directory}: follows {printable(str(root))}; Ctrl-C ends it")
        begun = True
