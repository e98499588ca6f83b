"""Two-way choices: a picture, its caption, and one that differs in a detail and is wrong.

SugarCrepe (Hsieh et al., arXiv:2306.14610): `add_att.json` and six more, over COCO's `val2017`.
CC-Neg (Singh et al., arXiv:2403.20312): a negated caption of each picture, as `ccneg.json`. It is
published as a pickle, which whoever has it converts themselves: none is opened here.

Each becomes an image-to-text query whose own candidates are the two captions, so that its figure is
the share of pictures closer to the right one. Every caption is a candidate of its own, copies too.
"""

import os
import shlex
from collections.abc import Iterator
from pathlib import Path

from elva.data.formats.flickr30k import PROMPTS
from elva.data.formats.source import Entry, Example, Request, Source
from elva.data.formats.whole import objects
from elva.data.strict import Record
from elva.errors import DataError, counted

_SUGARCREPE = (
    "add_obj", "add_att", "replace_obj", "replace_att", "replace_rel", "swap_obj", "swap_att",
)  # fmt: skip
"""Its kinds of hard negatives, each a file and a set."""

_CCNEG = "ccneg.json"
"""A list of objects of `image_paths`, `caption` and `negative-prompt`."""

_CCNEG_PICKLE = "ccneg_preprocessed.pt"
_CCNEG_COMMAND = (
    'python -c "import json,sys,torch;d=torch.load(sys.argv[1],weights_only=True);'
    "json.dump([{'image_paths':p,'caption':a['json']['caption'],"
    "'negative-prompt':a['sop_data']['negative-prompt']}"
    " for p,a in zip(d['image_paths'],d['annotations'],strict=True)],open('ccneg.json','w'))\""
)
"""What writes the one, in its folder, out of the other, whose name follows; with it the end of a
message, which is shortened in its middle."""

CCNEG_TEST = 40_000
"""The last rows, on which CC-Neg evaluates; those before are for training."""

_CCNEG_ROOT = "/workspace/datasets/cc3m/"
"""The beginning of its pictures' paths on its authors' machine."""


def sugarcrepe(request: Request) -> Source:
    """A folder of the seven files, or the clone of the repository that has them in `data/`."""
    request.check_split("test")
    root = request.path / "data" if (request.path / "data").is_dir() else request.path
    files = {kind: root / f"{kind}.json" for kind in _SUGARCREPE}
    if lacks := next((file for file in files.values() if not file.is_file()), None):
        raise DataError(f"{lacks}: no such file; SugarCrepe has {', '.join(_SUGARCREPE)}")
    pictures = request.pictures("val2017", "images/val2017", "data/coco/images/val2017")
    return _source("sugarcrepe", 20, _sugarcrepe(request, files, pictures))


def ccneg(request: Request) -> Source:
    """A folder of `ccneg.json` and `ccneg_images`, or the file alone with `images`."""
    request.check_split("train", "test")
    file = _ccneg_file(request.path)
    rows, count = _ccneg_rows(request, file)
    first, is_test = max(count - CCNEG_TEST, 0), request.split == "test"
    rows = {row: record for row, record in rows.items() if (row >= first) == is_test}
    if not rows:
        raise DataError(f"{file}: holds no rows of split {request.split}")
    found = _source("ccneg", 21, _ccneg(request, rows, request.images or file.parent))
    if is_test and count < CCNEG_TEST:
        found.notices.append(f"{counted(count, 'row')}; CC-Neg evaluates on {CCNEG_TEST:,}")
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


def _ccneg_file(path: Path) -> Path:
    """The list of rows at a path; a pickle is refused by its name, and told how to convert."""
    file = path / _CCNEG if path.is_dir() else path
    pickled = file if file.suffix == ".pt" else file.with_name(_CCNEG_PICKLE)
    if pickled == file or (path.is_dir() and pickled.is_file() and not file.exists()):
        raise DataError(
            f"{pickled}: is a pickle, and none is opened; run in its folder, this writes {_CCNEG}: "
            f"{_CCNEG_COMMAND} {shlex.quote(pickled.name)}"
        )
    return file


def _ccneg_rows(request: Request, file: Path) -> tuple[dict[int, Record], int]:
    """Row -> record, and how many rows there are with those left out, which keep their places."""
    found, before = request.faults.found, len(request.faults.found)
    rows: dict[int, Record] = {}
    for _, record in objects(file, request.faults):
        rows[len(rows) + len(found) - before] = record
    return rows, len(rows) + len(found) - before


def _ccneg(request: Request, rows: dict[int, Record], root: Path) -> Iterator[Example]:
    for row, record in request.told(rows.items(), "rows"):
        with request.faults.row():
            picture = _ccneg_picture(record, root)
            # Its own reader takes the commas out of the negated caption, and of no other.
            wrong = (record.text("negative-prompt") or "").replace(",", "")
            yield _choice(record, picture, str(row), record.text("caption"), wrong)


def _ccneg_picture(record: Record, root: Path) -> Path:
    said = record.text("image_paths") or ""
    below = Record(record.where, {"image_paths": said.removeprefix(_CCNEG_ROOT)})
    name = below.path("image_paths") or record.fail("image_paths is empty")
    places = (root / name, root / "ccneg_images" / name, root / os.path.basename(name))
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        record.fail(f"no such picture: {name} under {root}; --images names where ccneg_images lies")
    return found
