"""The sets that the paper evaluates on and no stage trains on, small, in the forms in which they
are published."""

import json
from pathlib import Path

import torch
from PIL import Image
from typer.testing import CliRunner

from elva.cli import app
from elva.data.formats import convert_file
from elva.data.mbeir import read_sets


def picture(path: Path, number: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (24, 16), (20 * number % 256, 90, 40)).save(path)
    return path


FLICKR = [
    {
        "sentids": [5 * i, 5 * i + 1],
        "imgid": i,
        "sentences": [
            {"tokens": ["a", "dog"], "raw": f"A dog, number {i}.", "imgid": i, "sentid": 5 * i},
            {"tokens": ["it"], "raw": '"Hi" is said' if i else "It runs", "imgid": i,
             "sentid": 5 * i + 1},
        ],
        "split": split,
        "filename": f"100{i}.jpg",
    }
    for i, split in enumerate(["test", "train", "test", "val"])
]  # fmt: skip


def flickr(root: Path, rows=FLICKR) -> Path:
    """Karpathy's file, which is one line, beside the pictures as the archive has them."""
    root.mkdir()
    (root / "dataset_flickr30k.json").write_text(json.dumps({"images": rows, "dataset": "x"}))
    for i in range(len(rows)):
        picture(root / "flickr30k-images" / f"100{i}.jpg", i)
    return root


def flickr_csv(root: Path, rows=FLICKR) -> Path:
    """Hugging Face's table of the same."""
    flickr(root).joinpath("dataset_flickr30k.json").unlink()
    quote = lambda value: '"' + json.dumps(value).replace('"', '""') + '"'  # noqa: E731
    lines = ["raw,sentids,split,filename,img_id"] + [
        f"{quote([s['raw'] for s in row['sentences']])},{quote(row['sentids'])},"
        f"{row['split']},{row['filename']},{row['imgid']}"
        for row in rows
    ]
    (root / "flickr_annotations_30k.csv").write_text("\n".join(lines) + "\n")
    return root


def urban(root: Path) -> Path:
    for i in (1, 2, 10):
        picture(root / "image" / f"{i}.jpg", i)
        (root / "caption").mkdir(exist_ok=True)
        (root / "caption" / f"{i}.txt").write_text(f"Street {i}, at dusk.\n" + "Two.\n" * (i == 2))
    (root / "caption" / ".DS_Store").write_bytes(b"\0")
    return root


CIRCO = {
    "val": [
        {
            "reference_img_id": 11, "target_img_id": 12, "relative_caption": "has two of them",
            "shared_concept": "a boat", "gt_img_ids": [12, 14, 15], "id": 0,
            "semantic_aspects": ["cardinality"],
        },
        {
            "reference_img_id": 12, "target_img_id": 11, "relative_caption": "is at night",
            "shared_concept": "a boat", "gt_img_ids": [11], "id": 1, "semantic_aspects": [],
        },
    ],
    "test": [
        {"reference_img_id": 13, "relative_caption": "is red", "shared_concept": "x", "id": 1},
        {"reference_img_id": 11, "relative_caption": "is wet", "shared_concept": "x", "id": 0},
    ],
}  # fmt: skip


def circo(root: Path, annotations=CIRCO) -> Path:
    folder = root / "COCO2017_unlabeled"
    names = [f"{i:012d}.jpg" for i in range(11, 16)]
    for i, name in enumerate(names):
        picture(folder / "unlabeled2017" / name, i)
    info = [
        {"license": 3, "file_name": name, "height": 16, "width": 24, "id": i}
        for i, name in enumerate(names, start=11)
    ]
    (folder / "annotations").mkdir()
    (folder / "annotations" / "image_info_unlabeled2017.json").write_text(
        json.dumps({"info": {}, "images": info, "licenses": [], "categories": []})
    )
    (root / "annotations").mkdir()
    for split, rows in annotations.items():
        (root / "annotations" / f"{split}.json").write_text(json.dumps(rows, indent=4))
    return root


def crepe_rows(kind: str) -> dict[str, dict[str, str]]:
    """Two captions of one picture, the second of which is the first's negative."""
    said = ("A cat on a mat.", f"A dog on a mat, {kind}.", "A cat in a hat.")
    return {
        str(i): {
            "filename": "000000000001.jpg",
            "caption": said[i],
            "negative_caption": said[i + 1],
        }
        for i in range(2)
    }


KINDS = ("add_obj", "add_att", "replace_obj", "replace_att", "replace_rel", "swap_obj", "swap_att")


def crepe(root: Path) -> Path:
    (root / "data").mkdir(parents=True)
    for kind in KINDS:
        (root / "data" / f"{kind}.json").write_text(json.dumps(crepe_rows(kind), indent=4))
    picture(root / "val2017" / "000000000001.jpg")
    return root


def neg_row(i: int) -> dict[str, str]:
    return {
        "image_paths": f"/workspace/datasets/cc3m/{CCNEG_IMAGES}/{i}.jpg",
        "caption": f"a lamp, number {i}",
        "negative-prompt": f"a lamp, without light, number {i}",
    }


CCNEG_IMAGES = "ccneg_images/cc3m_subset_images_extracted_final"


def neg(root: Path, rows=None) -> Path:
    root.mkdir(parents=True)
    rows = [neg_row(i) for i in range(4)] if rows is None else rows
    for i in range(len(rows)):
        picture(root / CCNEG_IMAGES / f"{i}.jpg", i)
    (root / "ccneg.json").write_text(json.dumps(rows, indent=4))
    return root


def neg_pickle(root: Path, rows=None) -> Path:
    """The same as it is published."""
    neg(root, rows)
    rows = json.loads((root / "ccneg.json").read_text())
    annotations = [
        {
            "json": {"caption": row["caption"], "url": "http://x", "status": "success"},
            "sop_data": {"negative-prompt": row["negative-prompt"], "subject": "lamp"},
        }
        for row in rows
    ]
    whole = {"image_paths": [row["image_paths"] for row in rows], "annotations": annotations}
    torch.save(whole, root / "ccneg_preprocessed.pt")
    (root / "ccneg.json").unlink()
    return root


MADE = {
    "flickr30k": (flickr, "test"), "urban1k": (urban, "test"), "circo": (circo, "val"),
    "sugarcrepe": (crepe, "test"), "ccneg": (neg, "test"),
}  # fmt: skip
"""Format -> what writes it, and the split whose answers are published."""


def converted(name: str, root: Path, split: str | None = None, **more) -> Path:
    """A published form under `root/source` as a data directory `root/<split>`."""
    make, own = MADE[name]
    source = root / "source"
    if not source.exists():
        make(source)
    convert_file(name, source, root / (split or own), split=split or own, **more)
    return root / (split or own)


def read(data: Path, split: str = "test"):
    """Stem -> the set of a data directory."""
    return {one.stem: one for one in read_sets(data, split=split)}


def run(*words):
    """What `elva` says to some words."""
    return CliRunner().invoke(app, [*map(str, words)])
