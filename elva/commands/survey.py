"""`elva data check`: a tree beside M-BEIR's card, and a proof that all of it can be evaluated.

The card (TIGER-Lab/M-BEIR) names sixteen test sets, training files, union files, and four parts of
an archive of pictures.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from elva.data import Item
from elva.data.layout import QueryFile, pool_files, qrels_file
from elva.data.mbeir import read_sets
from elva.data.schema import TASK_NAMES, hashed_id
from elva.draws import permutation, uniforms
from elva.errors import DataError
from elva.evaluation.sets import SUBTASKS

_UNIONS = (
    "query/union_train/mbeir_union_up_train.jsonl",
    "query/union_val/mbeir_union_val.jsonl",
    *(
        f"cand_pool/global/mbeir_union_{split}_cand_pool.jsonl"
        for split in ("train", "val", "test")
    ),
)

DIM = 64
"""Of random embeddings."""


def survey(root: Path) -> dict[str, list[str]]:
    """What of M-BEIR a tree holds, and what it lacks; empty where it holds none of its sets.

    Returns:
        `sets`: the test sets that are whole (queries, pool, qrels, instruction); `missing`: a line
        for each thing that is not there; `archives`: those that lie in the tree.
    """
    names = list(dict.fromkeys(stem.rpartition("_")[0] for stem in SUBTASKS))
    known = [n for n in names if any(root.glob(f"query/*/mbeir_{n}_*.jsonl"))]
    if not known and not any((root / union).exists() for union in _UNIONS):
        return {}
    missing = []
    whole = []
    for stem in SUBTASKS:
        lacks = _lacks(root, stem)
        if lacks:
            missing.append(f"{stem}: no {', no '.join(lacks)}")
        else:
            whole.append(stem)
    train = [n for n in names if not any(root.glob(f"query/train/mbeir_{n}*_train.jsonl"))]
    missing += [f"query/train/mbeir_{name}_train.jsonl: not there" for name in train]
    missing += [f"{union}: not there" for union in _UNIONS if not (root / union).exists()]
    return {"sets": whole, "missing": missing, "archives": _archives(root)}


def random_embeddings(
    data: Path, output: Path, *, split: str, tasks: Sequence[str] | None, most: int, seed: int = 0
) -> dict[str, int]:
    """Write random vectors where `elva embed` would write a model's; name -> how many.

    Args:
        most: so many drawn queries of each set; of each pool their answers and so many more.
    """
    sets = read_sets(data, split=split, tasks=tasks)
    asked = {one.stem: permutation((seed, "prove", one.stem), len(one.queries))[:most]
             for one in sets}  # fmt: skip
    counts = {}
    for one in sets:
        queries = one.queries.select(asked[one.stem]).distinct()
        name = f"mbeir_{one.stem}_{split}"
        counts[name] = _write(output / name, queries, {"side": "queries", "task": one.task}, seed)
        if one.pool_name in counts:
            continue
        right = [
            hashed_id(did)
            for other in sets if other.pool is one.pool
            for query in other.queries.select(asked[other.stem]) for did in query.positives
        ]  # fmt: skip
        some = np.arange(min(most, len(one.pool)))
        rows = np.union1d(one.pool.find(np.array(right, np.int64)), some)
        shown = [one.pool[row] for row in rows.tolist()]
        counts[one.pool_name] = _write(output / one.pool_name, shown, {"side": "pool"}, seed)
    return counts


def _write(place: Path, items: Sequence[Item], about: dict[str, Any], seed: int) -> int:
    from elva.index import segment as segment_file  # here: what only looks loads no torch
    from elva.index.embeddings import Embeddings, columns
    from elva.model.identity import Identity

    model = Identity("random vectors", "none", "none")
    plan = Embeddings(place, len(items), max(1, len(items)), model, about)
    vectors = (uniforms((seed, "prove", place.name), (len(items), DIM)) - 0.5).float()
    table = pa.table(
        {
            "id": [item.id for item in items],
            **{k: pa.array(v, pa.string()) for k, v in columns(items, {}).items()},
        }
    )
    for shard in plan.shards:
        segment_file.write(shard, [vectors], table, dim=DIM, dtype="float16", model=model)
    plan.save()
    return len(items)


def _lacks(root: Path, stem: str) -> list[str]:
    """What of a test set is not there."""
    name, _, number = stem.rpartition("_task")
    task = TASK_NAMES[int(number)]
    path = root / "query" / "test" / f"mbeir_{stem}_test.jsonl"
    lacks = [] if path.exists() else ["queries"]
    try:
        pool_files(root, QueryFile(name, task, path), "test")
    except DataError:
        lacks.append("candidate pool")
    if not qrels_file(root, stem, "test").exists():
        lacks.append("qrels")
    return lacks


def _archives(root: Path) -> list[str]:
    return sorted(p.name for p in root.glob("*.tar*") if p.is_file())
