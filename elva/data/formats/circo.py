"""CIRCO (Baldrati et al., arXiv:2303.15247): a picture and a change ask for pictures of COCO.

The clone of its repository as its README lays it out: `annotations/val.json` and `test.json`, and
`COCO2017_unlabeled/` with COCO's `annotations/image_info_unlabeled2017.json` and `unlabeled2017/`.
Ids stay theirs: query `19:13` is its 13, candidate `19:9761` COCO's 9761. The answers of the test
split are its server's secret.
"""

from collections.abc import Iterator
from pathlib import Path

from elva.data.formats.source import Entry, Example, Reference, Request, Source
from elva.data.formats.whole import objects
from elva.data.strict import Record
from elva.errors import DataError

NUMBER = 19
COCO = "COCO2017_unlabeled"


def read(request: Request) -> Source:
    """The queries of a split; the pool is all of COCO's unlabelled pictures."""
    request.check_split("val", "test")
    info = request.path / COCO / "annotations" / "image_info_unlabeled2017.json"
    asked = request.path / "annotations" / f"{request.split}.json"
    for file in (info, asked):
        if not file.is_file():
            raise DataError(f"{file}: no such file; CIRCO's README says how its folder looks")
    pool = dict(_pool(request, info))
    examples = list(_examples(request, asked, pool))
    return Source(
        "circo", NUMBER, "", examples, corpus=request.told(pool.values(), "pictures"),
        prompts={("image,text", "image"): "Find the picture that is so changed."},
        keeps_ids=True, shares_answers=False,
    )  # fmt: skip


def _pool(request: Request, info: Path) -> Iterator[tuple[int, Entry]]:
    """COCO's id -> the candidate."""
    folder, seen = request.pictures(f"{COCO}/unlabeled2017"), set[int]()
    for _, record in objects(info, request.faults, "images"):
        with request.faults.row():
            id = _number(record, "id", record.value("id"))
            name = record.path("file_name") or record.fail("file_name is empty")
            if id in seen:
                record.fail(f"id {id} again")
            seen.add(id)
            extra = {"file_name": name}
            yield id, Entry(None, folder / name, record.where, f"{NUMBER}:{id}", extra)


def _examples(request: Request, file: Path, pool: dict[int, Entry]) -> Iterator[Example]:
    for _, record in objects(file, request.faults):
        with request.faults.row():
            id = _number(record, "id", record.value("id"))
            shown = _number(record, "reference_img_id", record.value("reference_img_id"))
            caption = record.text("relative_caption") or ""
            if not caption.strip():
                record.fail("relative_caption is empty")
            if shown not in pool:
                record.fail(f"reference_img_id {shown} is not among COCO's pictures")
            extra = {"shared_concept": record.text("shared_concept") or "", "reference": shown}
            picture = pool[shown].image
            query = Entry(caption, picture, record.where, f"{NUMBER}:{id}", extra)
            yield Example(query, _answers(record, pool, request.split))


def _answers(record: Record, pool: dict[int, Entry], split: str) -> list[Reference] | None:
    """The pictures that are right: several, of which the first is the one that was described."""
    if split == "test":
        if "gt_img_ids" in record.fields:
            record.fail("gt_img_ids is there, but the answers of the test split are not published")
        return None
    listed = record.value("gt_img_ids")
    if not isinstance(listed, list):
        record.fail("gt_img_ids is not a list")
    found = [_number(record, "gt_img_ids", one) for one in listed]
    if not found or len(set(found)) < len(found):
        record.fail("gt_img_ids is not a list of different ids")
    if found[0] != record.value("target_img_id"):
        record.fail(f"target_img_id {record.get('target_img_id')!r} is not the first of gt_img_ids")
    for id in found:
        if id not in pool:
            record.fail(f"gt_img_ids: {id} is not among COCO's pictures")
    return [Reference(f"{NUMBER}:{id}", record.where) for id in found]


def _number(record: Record, key: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 10_000_000:
        record.fail(f"{key} {value!r} is not a whole number from 0 to 9,999,999")
    return value
