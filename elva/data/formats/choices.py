"""Two-way choices: a picture, its caption, and one that differs in a detail and is wrong.

SugarCrepe (Hsieh et al., arXiv:2306.14610): `add_att.json` and six more, over COCO's `val2017`.
CC-Neg (Singh et al., arXiv:2403.20312): `ccneg_preprocessed.pt`, a negated caption of each picture.

Each becomes an image-to-text query whose own candidates are the two captions, so that its figure is
the share of pictures closer to the right one. Every caption is a candidate of its own, copies too.
"""

import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from elva.data.formats.flickr30k import PROMPTS
from elva.data.formats.source import Entry, Example, Request, Source
from elva.data.formats.whole import objects
from elva.data.strict import Record
from elva.errors import DataError, counted

SUGARCREPE = (
    "add_obj", "add_att", "replace_obj", "replace_att", "replace_rel", "swap_obj", "swap_att",
)  # fmt: skip
"""Its kinds of hard negatives, each a file and a set."""

CCNEG = "ccneg_preprocessed.pt"
CCNEG_TEXTS = ("caption", "negative-prompt")
"""Of a row's `json`, and of its `sop_data`."""

CCNEG_TEST = 40_000
"""The last rows, on which CC-Neg evaluates; those before are for training."""

NOT_SAVED = (RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError)
"""What torch raises, beside pickle's own error, for a file that it did not write."""

CCNEG_ROOT = "/workspace/datasets/cc3m/"
"""The beginning of its pictures' paths on its authors' machine."""


def sugarcrepe(request: Request) -> Source:
    """A folder of the seven files, or the clone of the repository that has them in `data/`."""
    request.check_split("test")
    root = request.path / "data" if (request.path / "data").is_dir() else request.path
    files = {kind: root / f"{kind}.json" for kind in SUGARCREPE}
    if lacks := next((file for file in files.values() if not file.is_file()), None):
        raise DataError(f"{lacks}: no such file; SugarCrepe has {', '.join(SUGARCREPE)}")
    pictures = request.pictures("val2017", "images/val2017", "data/coco/images/val2017")
    return _source("sugarcrepe", 20, _sugarcrepe(request, files, pictures))


def ccneg(request: Request) -> Source:
    """A folder of `ccneg_preprocessed.pt` and `ccneg_images`, or the file alone with `images`."""
    request.check_split("train", "test")
    file = request.path / CCNEG if request.path.is_dir() else request.path
    paths, annotations = _ccneg_rows(file)
    first = max(len(paths) - CCNEG_TEST, 0)
    rows = range(first, len(paths)) if request.split == "test" else range(first)
    if not rows:
        raise DataError(f"{file}: holds no rows of split {request.split}")
    found = _source("ccneg", 21, _ccneg(request, file, paths, annotations, rows))
    if request.split == "test" and len(rows) < CCNEG_TEST:
        found.notices.append(f"{counted(len(rows), 'row')}; CC-Neg evaluates on {CCNEG_TEST:,}")
    return found


def _source(name: str, number: int, examples: Iterator[Example]) -> Source:
    return Source(name, number, "", examples, prompts=PROMPTS, shares_answers=False)


def _choice(
    record: Record, picture: Path, id: str, right: str | None, wrong: str | None, subset: str = ""
) -> Example:
    """A picture that is asked for its caption."""
    captions = []
    for name, text in (("caption", right), ("negative caption", wrong)):
        if not (text or "").strip():
            record.fail(f"the {name} is empty")
        captions.append(Entry(text, None, record.where, f"{id} {name}"))
    if (right or "").strip() == (wrong or "").strip():
        record.fail("caption and negative caption are the same")
    query = Entry(None, picture, record.where, id)
    return Example(query, captions[:1], captions[1:], captions, subset)


# -- SugarCrepe ------------------------------------------------------------------------------------


def _sugarcrepe(request: Request, files: dict[str, Path], pictures: Path) -> Iterator[Example]:
    for kind, file in files.items():
        for number, record in request.told(list(objects(file, request.faults)), "rows"):
            with request.faults.row():
                name = record.path("filename") or record.fail("filename is empty")
                right, wrong = (record.text(key) for key in ("caption", "negative_caption"))
                yield _choice(record, pictures / name, f"{kind} {number}", right, wrong, kind)


# -- CC-Neg ----------------------------------------------------------------------------------------


def _ccneg_rows(file: Path) -> tuple[list[Any], list[Any]]:
    """`image_paths` and `annotations`, of one length; nothing in the file is run."""
    import torch  # beside whoever reads other data

    try:
        whole = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise DataError(f"{file}: no such file") from None
    except (*NOT_SAVED, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:120]
        raise DataError(
            f"{file}: not lists, dicts and texts as torch.save writes them: {reason}"
        ) from None
    fields = whole if isinstance(whole, dict) else {}
    paths, annotations = fields.get("image_paths"), fields.get("annotations")
    are_lists = isinstance(paths, list) and isinstance(annotations, list)
    if not are_lists or len(paths) != len(annotations):
        raise DataError(f"{file}: must hold image_paths and annotations, lists of one length")
    return paths, annotations


def _ccneg(
    request: Request, file: Path, paths: list[Any], annotations: list[Any], rows: range
) -> Iterator[Example]:
    root = request.images or file.parent
    for row in request.told(rows, "rows"):
        with request.faults.row():
            where, about = f"{file}:row {row + 1}", annotations[row]
            parts = [
                about.get(k) if isinstance(about, dict) else None for k in ("json", "sop_data")
            ]
            if not all(isinstance(part, dict) for part in parts):
                raise DataError(f"{where}: annotations is not an object of json and sop_data")
            said = {k: part[k] for k, part in zip(CCNEG_TEXTS, parts, strict=True) if k in part}
            record = Record(where, {"image_paths": paths[row], **said})
            picture = _ccneg_picture(record, root)
            # Its own reader takes the commas out of the negated caption, and of no other.
            wrong = (record.text("negative-prompt") or "").replace(",", "")
            yield _choice(record, picture, str(row), record.text("caption"), wrong)


def _ccneg_picture(record: Record, root: Path) -> Path:
    said = record.text("image_paths") or ""
    below = Record(record.where, {"image_paths": said.removeprefix(CCNEG_ROOT)})
    name = below.path("image_paths") or record.fail("image_paths is empty")
    places = (root / name, root / "ccneg_images" / name, root / os.path.basename(name))
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        record.fail(f"no such picture: {name} under {root}; --images names where ccneg_images lies")
    return found
