"""Pictures of a folder as rows of an index: id and name are the path under the folder, and size,
time of change and SHA-256 tell whether a file is still what was embedded."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from elva.data.formats.folder import PROMPTS
from elva.data.formats.scan import PictureFile
from elva.data.strict import HINT, Faults
from elva.errors import DataError
from elva.index import fields
from elva.model.encoder import Encoder
from elva.model.rollout import Encoded
from elva.progress import Reporter

OWN = fields.OWN | {"size", "modified_ns", "digest"}


def about(encoder: Encoder, folder: Path) -> dict[str, Any]:
    """What an index of a folder notes: how its model is opened, where the folder lies, and the
    instructions by which it is asked."""
    asked = {query: prompt for (query, _), prompt in PROMPTS.items()}
    return {**encoder.about, "folder": str(folder.resolve()), "instructions": asked}


def embedded(
    encoder: Encoder,
    files: Sequence[PictureFile],
    faults: Faults,
    reporter: Reporter,
    before: int,
) -> tuple[list[PictureFile], Encoded]:
    """Those files that can be read, and their embeddings.

    Args:
        before: files that the reporter was told of already.

    Raises:
        DataError: more cannot be read than are allowed.
    """

    def progress(done: int) -> None:
        reporter.advance(before + done)

    good = [*files]
    if not faults.allowed:
        with suppress(DataError):  # below it is said of the first file of which it is true
            return good, encoder([one.item() for one in good], progress)
    good.clear()
    for one in files:
        with faults.row(HINT):
            encoder.check(one.item())
            good.append(one)
    if not good:
        return [], Encoded(torch.empty(0, encoder.embedding_size), [])
    return good, encoder([one.item() for one in good], progress)


def table(
    files: Sequence[PictureFile],
    out: Encoded,
    known: Mapping[str, Mapping[str, Any]],
    kinds: Mapping[str, pa.DataType],
) -> tuple[pa.Table, torch.Tensor]:
    """The rows of embedded files, and their embeddings; without those that are not, after they were
    embedded and hashed, what they were when the folder was looked at: a sync takes them up.

    Args:
        known: Name -> captions and what else is known of a picture.
        kinds: `fields.kinds` of all of it.

    Raises:
        DataError: a file that goes while it is hashed.
    """
    here = [place for place, one in enumerate(files) if one.is_still_there()]
    named = _columns(
        [files[place] for place in here], [out.summaries[place] for place in here], known, kinds
    )
    still = [number for number, place in enumerate(here) if files[place].is_still_there()]
    rows = pa.table({"id": named["name"], **named}).take(pa.array(still, pa.int64()))
    return rows, out.embeddings[[here[number] for number in still]]


def _columns(
    files: Sequence[PictureFile],
    summaries: Sequence[str],
    known: Mapping[str, Mapping[str, Any]],
    kinds: Mapping[str, pa.DataType],
) -> dict[str, pa.Array]:
    """Column -> a value for each file."""
    names = pa.array([one.name for one in files], pa.string())
    return {
        "text": pa.nulls(len(files), pa.string()),
        "image": pa.array([str(one.path.absolute()) for one in files], pa.string()),
        "modality": pa.array(["image"] * len(files), pa.string()),
        "name": names,
        "summary": pa.array(summaries, pa.string()),
        "size": pa.array([one.size for one in files], pa.int64()),
        "modified_ns": pa.array([one.modified_ns for one in files], pa.int64()),
        "digest": pa.array([one.digest() for one in files], pa.string()),
        **fields.arrays([known.get(one.name, {}) for one in files], kinds, OWN),
    }
