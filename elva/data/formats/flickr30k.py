"""Flickr30K in Karpathy's splits (29,000 train, 1,014 val, 1,000 test): text to picture and back.

Read as it is published: `dataset_flickr30k.json` (Karpathy and Fei-Fei, arXiv:1412.2306), or the
same splits as a table, `flickr_annotations_30k.csv` (nlphuji/flickr30k on Hugging Face). Kaggle's
`results.csv` and the original `results_20130124.token` name no split: alone they are refused.
"""

from collections.abc import Iterator
from pathlib import Path

from elva.data.formats.rows import rows
from elva.data.formats.source import Entry, Example, Reference, Request, Source
from elva.data.formats.whole import objects
from elva.data.schema import Item
from elva.data.strict import Faults, Record, parse
from elva.errors import DataError

FILES = ("dataset_flickr30k.json", "flickr_annotations_30k.csv")
PICTURES = (
    "flickr30k-images", "flickr30k_images/flickr30k_images", "flickr30k_images", "images",
)  # fmt: skip
_UNSPLIT = ("results.csv", "results_20130124.token")

PROMPTS = {
    ("text", "image"): "Find the picture that this caption describes.",
    ("image", "text"): "Find the caption that describes this picture.",
}

_Captioned = tuple[Entry, list[Entry]]
"""A picture and its captions."""


def read(request: Request) -> Source:
    """The pictures of a split and their captions, each asking for the other.

    A caption has one right picture, a picture all its captions: copies do not count, as in every
    paper that reports Recall@K on it.
    """
    found = list(_pictures(request, _file(request.path)))
    if not found:
        raise DataError(f"{request.path}: holds no picture of split {request.split}")
    corpus = [one for picture, captions in found for one in (picture, *captions)]
    return Source(
        "flickr30k", 17, "", _examples(found), corpus=request.told(corpus, "items"),
        prompts=PROMPTS, shares_answers=False,
    )  # fmt: skip


def _file(path: Path) -> Path:
    if path.is_file():
        return path
    found = next((path / name for name in FILES if (path / name).is_file()), None)
    if found is None:
        lone = next((name for name in _UNSPLIT if any(path.rglob(name))), None)
        more = f"; {lone} names no split" if lone else ""
        raise DataError(f"{path}: no {' or '.join(FILES)}{more}")
    return found


def _examples(found: list[_Captioned]) -> Iterator[Example]:
    for picture, captions in found:
        for caption in captions:
            yield Example(caption, [Reference(str(picture.id), caption.where)])
    for picture, captions in found:
        yield Example(picture, [Reference(str(one.id), picture.where) for one in captions])


def _pictures(request: Request, file: Path) -> Iterator[_Captioned]:
    root, seen = request.pictures(*PICTURES), set[str]()
    for record in _rows(file, request.faults):
        with request.faults.row():
            if record.text("split") not in ("train", "val", "test"):
                record.fail(f"split {record.get('split')!r} is not train, val or test")
            if record.get("split") != request.split:
                continue
            name = record.path("filename") or record.fail("filename is empty")
            said = _listed(record) if _is_table(file) else _sentences(record)
            ids = [name, *(id for id, _ in said)]
            if again := next((id for i, id in enumerate(ids) if id in seen or id in ids[:i]), None):
                record.fail(f"{again} again")
            Item(name, None, root / name, "image", where=record.where).image_format()
            seen.update(ids)
            yield (
                Entry(None, root / name, record.where, name),
                [Entry(text, None, record.where, id) for id, text in said],
            )


def _is_table(file: Path) -> bool:
    return file.suffix.lower() == ".csv"


def _rows(file: Path, faults: Faults) -> Iterator[Record]:
    """A record a picture, of either file."""
    if _is_table(file):
        yield from rows(file, ("filename", "split", "sentids", "raw"), faults)
    else:
        yield from (record for _, record in objects(file, faults, "images"))


def _sentences(record: Record) -> list[tuple[str, str]]:
    """(id, caption) of Karpathy's `sentences`."""
    found = record.value("sentences")
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        record.fail("sentences is not a list of objects")
    said = [Record(f"{record.where}: sentences[{i}]", one) for i, one in enumerate(found)]
    return _checked(record, [(one.name("sentid"), one.text("raw")) for one in said])


def _listed(record: Record) -> list[tuple[str, str]]:
    """(id, caption) of the table's `sentids` and `raw`, each a list as JSON."""
    lists = []
    for key in ("sentids", "raw"):
        lists.append(parse(f"{record.where}: {key}", f'{{"{key}": {record.text(key)}}}'))
    ids = Record(record.where, lists[0]).names("sentids")
    texts = Record(record.where, lists[1]).texts("raw")
    if len(ids) != len(texts):
        record.fail("sentids and raw are not lists of one length")
    return _checked(record, list(zip(ids, texts, strict=True)))


def _checked(record: Record, said: list[tuple[str, str | None]]) -> list[tuple[str, str]]:
    if not said:
        record.fail("has no caption")
    if lacks := next((id for id, text in said if not (text or "").strip()), None):
        record.fail(f"caption {lacks} is empty")
    return [(id, text or "") for id, text in said]
