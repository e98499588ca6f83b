"""What elva reads of others' files: of each kind valid ones, and who reads them."""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from elva.data import Item, Query, pictures
from elva.data.extras import write_extras
from elva.data.formats import convert_file
from elva.data.formats.rows import rows
from elva.data.mbeir import load
from elva.data.schema import Grain
from elva.data.strict import Faults
from elva.evaluation import trec
from elva.recipes import RECIPES, read_recipe, resolve
from tests.elva import people, unseen
from tests.elva.test_data_formats import CASES, jsonl


class Reader(NamedTuple):
    """Readers of some files.

    Args:
        make: writes a folder of valid ones.
        changed: which of them are changed, a pattern of names each.
        read: of the folder and the file that was changed.
    """

    make: Callable[[Path], object]
    changed: tuple[str, ...]
    read: Callable[[Path, Path], object]


# -- rows ------------------------------------------------------------------------------------------

LINES = [
    {"id": "a", "text": "A dog, it runs.", "title": None, "n": 3},
    {"id": "b", "text": 'He said "hi"; left.', "title": "T\tx", "n": 0.5},
    {"id": "c", "text": "Blüte 桜 \U0001f600", "title": "", "n": -1},
]


def _make_rows(root: Path) -> None:
    table = 'id,text,title\na,A dog,\nb,"He said ""hi""\nand left",T\nc,Blüte 桜,x\n'
    (root / "a.csv").write_text(table, "utf-8")
    (root / "b.csv").write_text("sep=;\n" + table.replace(",", ";"), "utf-8-sig")
    (root / "c.tsv").write_text(table.replace(",", "\t"), "utf-16")
    (root / "d.csv").write_text(table.replace("\n", "\r"), "utf-8")
    jsonl(root / "e.jsonl", LINES)
    pq.write_table(pa.Table.from_pylist(LINES), root / "f.parquet")
    pq.write_table(pa.Table.from_pylist(LINES), root / "g.parquet", compression="zstd")


def _read_rows(root: Path, changed: Path) -> None:
    for record in rows(changed, ("text",), Faults(2), known=("id", "title")):
        record.text("text")
        record.texts("text")


# -- TREC ------------------------------------------------------------------------------------------


def _make_trec(root: Path) -> None:
    (root / "a.run").write_text("q1 Q0 d1 1 0.75 elva\nq1 Q0 d2 2 -1e-3 elva\nq2 Q0 d1 1 3 x t2i\n")
    (root / "a.qrels").write_text("q1 0 d1 2\nq1 0 d2 -1\nq2 0 d1 1\n")
    (root / "b.qrels").write_text("1:1 0 1:2 1 0\n1:2 0 1:3 1 0\n")
    (root / "c.qrels").write_text("query-id\tcorpus-id\tscore\nq1\td1\t2\nq2\td1\t1.0\n")


def _read_trec(root: Path, changed: Path) -> object:
    read = trec.read_run if changed.suffix == ".run" else trec.read_qrels
    return read(changed)


# -- recipes ---------------------------------------------------------------------------------------

CHANGES = """\
seed: 3
model: {pooling: null, revision: null}
stages:
  "2": &two {steps: 5, learning_rate: 1e-4, tasks: {t2i: 0.5, i2t: 0.5}}
  "3": {<<: *two, negatives: {given: 0}, reward: {margin: -0.1}}
controls: {}
trainer: {bf16: true, adam_beta1: 0.8}
"""


def _make_recipes(root: Path) -> None:
    (root / "changes.yaml").write_text(CHANGES)
    for name in ("smoke", "elva-2b"):
        whole = yaml.safe_dump(asdict(RECIPES[name]), sort_keys=False)
        (root / f"{name}.yaml").write_text(whole)
    (root / "words.txt").write_text(
        "seed=1\nstages.2.tasks.t2i=0.3\nmodel.scratch.layers=3\ntrainer={}"
    )


def _read_recipes(root: Path, changed: Path) -> object:
    if changed.suffix == ".txt":
        return resolve("smoke", None, changed.read_text("utf-8", "surrogateescape").split("\n"))
    return resolve("smoke", changed) if changed.stem == "changes" else read_recipe(changed)


# -- pictures --------------------------------------------------------------------------------------


def _make_pictures(root: Path) -> None:
    for number, (format, how) in enumerate(
        [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {}), ("GIF", {}),
         ("BMP", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("AVIF", {})]
    ):  # fmt: skip
        content = people.encoded(people.plain(number), format, **how)
        (root / f"{number}.{format.lower()}").write_bytes(content)
    for name in ("gedreht/6.jpg", "deep.tif", "ink.jpg", "film.webp", "mpo.jpg"):
        (root / name.replace("/", "-")).write_bytes(people.pictures()[name])


def _read_pictures(root: Path, changed: Path) -> object:
    return pictures.format_of(changed), pictures.size(changed), pictures.load(changed)


# -- data directories, and what becomes one --------------------------------------------------------


def _convert(format: str, source: Path, split: str) -> None:
    target = source.parent / f"{source.name}.data"
    shutil.rmtree(target, ignore_errors=True)
    try:
        convert_file(format, source, target, split=split, skip_bad=1)
    finally:
        shutil.rmtree(target, ignore_errors=True)


def _published(format: str, make: Callable[[Path], Path], split: str) -> Reader:
    def remade(root: Path) -> None:
        make(root / "source")

    changed = ("**/*.json", "**/*.csv", "**/*.txt")
    return Reader(remade, changed, lambda root, _: _convert(format, root / "source", split))


def _examples(pictured: bool, root: Path) -> list[tuple[Query, list[Item], list[Item]]]:
    def one(number: int) -> tuple[Query, list[Item], list[Item]]:
        image = unseen.picture(root / "seen" / f"{number}.png", number) if pictured else None
        kind = "image" if pictured else "text"
        said = None if pictured else f"item {number}, it runs"
        answers = [Item(f"9:{10 * number + i}", said, image, kind) for i in range(2)]
        query = Query(
            f"9:{100 + number}", f"Query {number}.", None, "text", instruction="Find it.",
            task="t2i" if pictured else "t2t", positives=(answers[0].id,),
            negatives=(answers[1].id,), raw_text=f"query {number}",
        )  # fmt: skip
        return query, answers[:1], answers[1:]

    return [one(number) for number in range(1, 13)]


def _format(format: str, write: Callable[..., Path]) -> Reader:
    pictured = format not in ("nli", "beir", "mteb")

    def make(root: Path) -> None:
        (root / "source").mkdir()
        write(root / "source", _examples(pictured, root))

    def read(root: Path, changed: Path) -> None:
        source = root / "source"
        inner = source / "mbeir_cirr_task7"
        whole = format in ("tevatron", "beir", "folder")
        _convert(format, inner if inner.is_dir() else source if whole else changed, "train")

    return Reader(make, ("source/**/*.jsonl", "source/**/*.csv", "source/**/*.tsv",
                         "source/**/*.parquet"), read)  # fmt: skip


def _make_data(root: Path) -> None:
    unseen.converted("circo", root)
    data = load(root / "val", split="val", tasks=["it2i"])
    asked = data.queries[0]
    grain = Grain(asked.text[:3], "object", (0, 3))
    write_extras(root / "val", {asked.id: (grain,)}, {}, {asked.id: asked.positives})


def _read_data(root: Path, changed: Path) -> None:
    data = load(root / "val", split="val")
    deque(data.texts(), maxlen=0)


READERS: dict[str, Reader] = {
    "rows": Reader(_make_rows, ("*.*",), _read_rows),
    "trec": Reader(_make_trec, ("*.*",), _read_trec),
    "recipes": Reader(_make_recipes, ("*.*",), _read_recipes),
    "pictures": Reader(_make_pictures, ("*.*",), _read_pictures),
    "data": Reader(_make_data, ("val/**/*.jsonl", "val/**/*.tsv", "val/**/*.txt"), _read_data),
    **{
        f"{name}-{write.__name__}": _published(name, write, unseen.MADE[name][1])
        for name, writes in {
            "flickr30k": (unseen.flickr, unseen.flickr_csv), "urban1k": (unseen.urban,),
            "circo": (unseen.circo,), "sugarcrepe": (unseen.crepe,),
            "ccneg": (unseen.neg,),
        }.items()
        for write in writes
    },
    **{f"convert-{name}": _format(name, write) for name, write, *_ in CASES},
}  # fmt: skip
