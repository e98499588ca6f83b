"""`elva index build --folder`: from a folder of pictures to an index, under the pictures' own
names.

Pictures are embedded in parts that are kept beside the index until it appears whole, so a killed
build goes on where it was when it is called again.
"""

import hashlib
import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from elva.data.formats.folder import Contents, contents, dataset_number
from elva.data.strict import Faults
from elva.errors import DataError, IndexFault, UserError, printable
from elva.files import PARTIAL, write_text
from elva.index import Index, change, fields, folder, manifest, segment
from elva.index.embeddings import PLAN, Embeddings
from elva.model.encoder import Encoder, unfamiliar
from elva.model.modalities import must_read
from elva.progress import SILENT, Reporter

_PART_PICTURES = 1024
"""Ours: what a kill can cost."""

BAD = "skipped.txt"
"""The pictures that could not be read, a line each, beside the parts."""


def check(directory: Path, root: Path, *, overwrite: bool = False) -> None:
    """Refuse what `build` refuses, before a model is opened."""
    if manifest.exists(directory) and not overwrite:
        raise IndexFault(f"{directory}: must not hold an index yet; pass --overwrite to replace it")
    change.check_place(directory, overwrite)
    place = _place(directory)
    if place.exists() and not (place / PLAN).exists():
        raise UserError(f"{place}: must not exist, a build keeps its parts there; move it away")
    if not root.is_dir():
        raise DataError(f"{printable(str(root))}: not a folder")


def _place(directory: Path) -> Path:
    """Where a build keeps its parts."""
    return directory.with_name(directory.name + PARTIAL)


def build(
    directory: Path,
    root: Path,
    encoder: Encoder,
    *,
    dtype: str = "float16",
    overwrite: bool = False,
    codes: bool = True,
    skip_bad: int = 0,
    part_pictures: int = _PART_PICTURES,
    reporter: Reporter = SILENT,
) -> tuple[Index, dict[str, Any]]:
    """Make an index of a folder's pictures; ids and names are their paths under it.

    Args:
        dtype: what is stored: float16, bfloat16 or float32.
        codes: keep 8-bit codes of the rows beside them, by which they are searched.
        skip_bad: so many pictures that cannot be read, and rows of captions, are left out and
            listed; one more ends it.
        part_pictures: pictures embedded between two moments at which a kill costs nothing.

    Returns:
        The index, and `left_out` (why -> names), `bad` (a line each), `notices`.

    Raises:
        UserError, DataError: an index that is there, a picture that cannot be read.
    """
    check(directory, root, overwrite=overwrite)
    faults = Faults(skip_bad)
    found = contents(root, faults)
    counts = {"image": len(found.pictures)}
    must_read(encoder.identity.name, encoder.modalities, counts, printable(str(root)))
    for line in [*found.notices, *filter(None, [unfamiliar(encoder, [dataset_number(root)])])]:
        reporter.say(line)
    about = folder.about(encoder, root)
    parts = _parts(directory, found, encoder, {**about, "dtype": dtype}, part_pictures)
    try:
        _embed(parts, found, encoder, dtype, faults, reporter)
    except UserError:
        if not any(
            segment.Segment(one).rows for one in parts.shards if one.exists()
        ):  # else what is embedded is not lost
            shutil.rmtree(parts.directory)
        raise
    made = Index.assemble(
        directory, parts.segments(), about=about, overwrite=overwrite, codes=codes
    )
    shutil.rmtree(parts.directory)
    copies = len(made) - len(set(made.table["digest"].to_pylist()))
    notices = [*found.notices]
    if copies:
        notices.append(f"{copies:,} files are copies of others, byte by byte, and are kept")
        reporter.say(notices[-1])
    return made, {"left_out": found.left_out, "bad": list(faults.found), "notices": notices}


def _parts(
    directory: Path, found: Contents, encoder: Encoder, about: dict[str, Any], rows: int
) -> Embeddings:
    """Where the parts lie: those of a killed build where they are of the same pictures and model,
    else none yet."""
    stamps = [(one.name, one.size, one.modified_ns) for one in found.pictures]
    key = hashlib.sha256(json.dumps([stamps, found.known], default=str).encode()).hexdigest()
    place = _place(directory)
    wanted = Embeddings(
        place, len(found.pictures), rows, encoder.identity, {**about, "contents": key}
    )
    if (place / PLAN).exists():
        with suppress(UserError):  # a damaged plan is of no use
            if (there := Embeddings.open(place)) == wanted:
                return there
        shutil.rmtree(place)
    wanted.save()
    return wanted


def _embed(
    parts: Embeddings,
    found: Contents,
    encoder: Encoder,
    dtype: str,
    faults: Faults,
    reporter: Reporter,
) -> None:
    """Embed the parts that are missing; UserError where no picture could be read."""
    rows, kinds = parts.shard_rows, fields.kinds(found.known.values())
    known = len(faults.found)  # of captions, which are read each time
    if done := len(parts.shards) - len(parts.missing):
        reporter.say(f"{done} of {len(parts.shards)} parts are there already, of a build before")
    listed = parts.directory / BAD
    if listed.exists():
        faults.found += listed.read_text(encoding="utf-8").splitlines()
    total, before = len(found.pictures), done * rows
    reporter.start("embed", total, "pictures")
    for part in parts.missing:
        files = found.pictures[part * rows : (part + 1) * rows]
        good, out = folder.embedded(encoder, files, faults, reporter, before)
        before += len(files)
        reporter.advance(before)
        if len(faults.found) > known:
            write_text(listed, "".join(f"{line}\n" for line in faults.found[known:]))
        table, rows_of = folder.table(good, out, found.known, kinds)
        if late := len(good) - len(rows_of):
            reporter.say(f"{late} pictures changed meanwhile; elva index sync takes them up")
        segment.write(
            parts.shards[part], [rows_of], table,
            dim=encoder.embedding_size, dtype=dtype, model=parts.model,
        )  # fmt: skip
    reporter.finish("")
    if not any(one.rows for one in parts.opened):
        name = printable(str(parts.about["folder"]))
        raise DataError(f"{name}: must hold a picture that can be read, got none")
