"""A small M-BEIR exactly as it is published: its file names, fields, pools and peculiarities.

Sixteen test sets with local pools, training files without a task in their names whose answers lie
in the union pool alone, union files with repeated rows, OVEN and InfoSeek that name each other's
candidates, captions that several pictures share, several right answers, given negatives.
"""

import json
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

DATASETS = {
    "visualnews": (0, "VisualNews", (0, 3)), "fashion200k": (1, "Fashion200K", (0, 3)),
    "webqa": (2, "WebQA", (1, 2)), "edis": (3, "EDIS", (2,)), "nights": (4, "NIGHTS", (4,)),
    "oven": (5, "OVEN", (6, 8)), "infoseek": (6, "INFOSEEK", (6, 8)),
    "fashioniq": (7, "FashionIQ", (7,)), "cirr": (8, "CIRR", (7,)), "mscoco": (9, "MSCOCO", (0, 3)),
}  # fmt: skip
"""File name -> number, name in the instructions, tasks."""

MODALITIES = {
    0: ("text", "image"), 1: ("text", "text"), 2: ("text", "image,text"), 3: ("image", "text"),
    4: ("image", "image"), 6: ("text,image", "text"), 7: ("image,text", "image"),
    8: ("image,text", "image,text"),
}  # fmt: skip
"""Task -> modality of query and candidate; the order of a query's varies."""

SISTERS = {"oven": "infoseek", "infoseek": "oven"}
SMALL = ("nights", "cirr", "fashioniq")
"""Sets whose rows the union has twice."""

SPLITS = {"train": range(120), "val": range(120, 140), "test": range(140, 200)}
"""Split -> entries of the corpus."""

ASKED = {"train": 24, "val": 6, "test": 15}
"""Split -> queries of each task."""

FIRST = {"text": 1, "image": 10_001, "image,text": 20_001}
"""Modality -> number of its first candidate."""


def published(corpus: Path, root: Path) -> Path:
    """Write it out of the emoji corpus; returns `root`."""
    entries = _entries(corpus)
    (root / "mbeir_images").mkdir(parents=True)
    for name in DATASETS:
        folder = root / "mbeir_images" / f"{name}_images"
        folder.symlink_to((corpus / "mbeir_images" / "emoji_images").resolve())
    _write_instructions(root)
    qids = {name: count(1) for name in DATASETS}
    for split, of in SPLITS.items():
        everything: list[dict[str, Any]] = []
        union: dict[str, dict[str, Any]] = {}
        for name, (_, _, tasks) in DATASETS.items():
            rows = {k: list(_queries(name, k, split, entries, qids[name])) for k in tasks}
            everything += [row for some in rows.values() for row in some] * (
                2 if split == "train" and name in SMALL else 1
            )
            for task in tasks:
                pool = list(_candidates(name, MODALITIES[task][1], of, entries))
                union |= {row["did"]: row for row in pool}
                if split != "train":
                    _write_set(root, f"{name}_task{task}", split, rows[task])
                    own = f"_{split}" if name == "mscoco" else ""
                    _append(root / f"cand_pool/local/mbeir_{name}_task{task}{own}_cand_pool.jsonl",
                            pool)  # fmt: skip
            if split == "train":
                _append(
                    root / f"query/train/mbeir_{name}_train.jsonl",
                    [row for some in zip(*rows.values(), strict=True) for row in some],
                )
        _append(root / f"cand_pool/global/mbeir_union_{split}_cand_pool.jsonl", union.values())
        up = "_up" if split == "train" else ""
        if split != "test":
            _append(root / f"query/union_{split}/mbeir_union{up}_{split}.jsonl", everything)
    return root


def _entries(corpus: Path) -> list[tuple[str, str]]:
    """(name, picture's file name) of the corpus' training pictures."""
    found: dict[int, list[str]] = {}
    for task, key in ((3, "txt"), (0, "img_path")):
        for path in sorted(corpus.glob(f"cand_pool/local/mbeir_emoji_task{task}_cand_pool.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                found.setdefault(int(row["did"].split(":")[1]) % 100_000, []).append(row[key])
    return [(pair[0], pair[1].rpartition("/")[2]) for _, pair in sorted(found.items())]


def _did(name: str, modality: str, entry: int, caption: int = 0) -> str:
    return f"{DATASETS[name][0]}:{FIRST[modality] + 2 * entry + caption}"


def _candidates(
    name: str, modality: str, of: Iterable[int], entries: list[tuple[str, str]]
) -> Iterator[dict[str, Any]]:
    """Pool rows; MSCOCO has two captions a picture, and every tenth picture's first is that of the
    picture before it."""
    for entry in of:
        for caption in range(2 if (name, modality) == ("mscoco", "text") else 1):
            words = entries[entry - 1 if entry % 10 == 9 and not caption else entry][0]
            text = f"a picture of {words}" if caption else words
            picture = f"mbeir_images/{name}_images/{entries[entry][1]}"
            yield {
                "txt": text if "text" in modality else None,
                "img_path": picture if "image" in modality else None,
                "modality": modality,
                "did": _did(name, modality, entry, caption),
                "src_content": None,
            }


def _queries(
    name: str, task: int, split: str, entries: list[tuple[str, str]], numbers: Iterator[int]
) -> Iterator[dict[str, Any]]:
    query, modality = MODALITIES[task]
    of = SPLITS[split]
    for place in range(ASKED[split]):
        entry = of[(place * 7 + task) % len(of)]
        other = of[(place * 7 + task + 1) % len(of)]
        words = entries[entry][0]
        right = [_did(name, modality, entry)]
        if (name, modality) == ("mscoco", "text"):
            right.append(_did(name, modality, entry, 1))
        if name == "webqa":
            right.append(_did(name, modality, other))
        if name in SISTERS and place % 3:
            right.append(_did(SISTERS[name], modality, entry))
            if name == "oven" and place % 3 == 1:
                right = right[1:]  # none of its own
        wrong = [_did(name, modality, e) for e in of if e not in (entry, other)][:4]
        start = other if task in (7, 8) else entry
        row: dict[str, Any] = {
            "qid": f"{DATASETS[name][0]}:{next(numbers)}",
            "query_txt": f"{words}, which one" if "text" in query else None,
            "query_img_path": (
                f"mbeir_images/{name}_images/{entries[start][1]}" if "image" in query else None
            ),
            "query_modality": query,
            "query_src_content": json.dumps({"place": place}) if name == "edis" else None,
            "pos_cand_list": right,
            "neg_cand_list": wrong if name == "webqa" else [],
            "task_id": task,
        }
        if name == "nights" and split == "train":
            del row["task_id"]  # as older files have it
        yield row


def _write_set(root: Path, stem: str, split: str, rows: list[dict[str, Any]]) -> None:
    _append(root / f"query/{split}/mbeir_{stem}_{split}.jsonl", rows)
    qrels = root / f"qrels/{split}/mbeir_{stem}_{split}_qrels.txt"
    qrels.parent.mkdir(parents=True, exist_ok=True)
    qrels.write_text("".join(
        f"{row['qid']} 0 {did} 1 {row['task_id']}\n" for row in rows for did in row["pos_cand_list"]
    ))  # fmt: skip


def _write_instructions(root: Path) -> None:
    header = "query_modality\tcand_modality\tdataset_name\tdataset_id"
    lines = ["\t".join([header, *(f"prompt_{i}" for i in range(1, 5))])]
    for number, shown, tasks in DATASETS.values():
        for task in tasks:
            query, modality = MODALITIES[task]
            query = "image,text" if "," in query else query
            prompts = (f"{verb} what is asked for" for verb in ("Find", "Show", "Name", "Give"))
            lines.append("\t".join([query, modality, shown, str(number), *prompts]))
    path = root / "instructions" / "query_instructions.tsv"
    path.parent.mkdir(parents=True)
    path.write_text("\n".join(lines) + "\n")


def _append(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
