"""Names of M-BEIR's files: which query files there are, and which pool each is asked of."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from elva.data.schema import TASK_NAMES, TASKS
from elva.errors import DataError

SPLITS = ("train", "val", "test")
LINKED = ("cand_pool", "instructions", "mbeir_images", "grains.jsonl", "minimal_pairs.jsonl")
"""What a directory made of another's queries links to, beside queries and qrels of its own."""

INSTRUCTIONS = Path("instructions") / "query_instructions.tsv"

Which = Literal["sets", "union"]
"""Which files hold a split's queries: one a set, or one of all sets (M-BEIR's has the rows of
small sets several times)."""


class QueryFile(NamedTuple):
    """A query file.

    Args:
        name: Of its sets, without the task: `mscoco`, `union_up`.
        task: The one in its name; None where its rows say theirs.
        union: Whether it holds the queries of every set.
    """

    name: str
    task: str | None
    path: Path
    union: bool = False

    def stem(self, task: str) -> str:
        """`mscoco_task0`."""
        return file_stem(self.name, task)


def query_file(root: Path, stem: str, split: str) -> Path:
    """Where the query file of one task lies."""
    return root / "query" / split / f"mbeir_{stem}_{split}.jsonl"


def qrels_file(root: Path, stem: str, split: str) -> Path:
    """Where the judgements of one task lie."""
    return root / "qrels" / split / f"mbeir_{stem}_{split}_qrels.txt"


def union_pool_file(root: Path, split: str) -> Path:
    """Where the candidates of all sets lie."""
    return root / "cand_pool" / "global" / f"mbeir_union_{split}_cand_pool.jsonl"


def file_stem(dataset: str, task: str) -> str:
    """M-BEIR's name for one dataset's task, `emoji_task0`."""
    return f"{dataset}_task{TASKS[task]}"


def find(root: Path, split: str, which: Which = "sets") -> tuple[list[QueryFile], tuple[str, ...]]:
    """The query files of a split, and a line on the files there that are none.

    Where the tree has only the union, that is what is found.

    Raises:
        DataError: no query file, or one with a task's number that there is not.
    """
    if split not in SPLITS:
        raise DataError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    folder, union = root / "query" / split, root / "query" / f"union_{split}"
    sets, others = _named(folder, split)
    unions, strange = _named(union, split)
    if which == "sets" and sets:
        return sets, _passed_over(folder, others)
    if len(unions) > 1:
        names = ", ".join(one.path.name for one in unions)
        raise DataError(f"{union}: must hold one query file, holds {names}")
    if unions:
        return [unions[0]._replace(union=True)], _passed_over(union, strange)
    wanted = union if which == "union" else folder
    filled = [s for s in SPLITS if s != split and any(
        _named(root / "query" / name, s)[0] for name in (s, f"union_{s}")
    )]  # fmt: skip
    there = others if which == "sets" else strange
    raise DataError(
        f"{wanted}: no query file mbeir_<dataset>_task<number>_{split}.jsonl or "
        f"mbeir_<dataset>_{split}.jsonl{'; it holds ' + _listed(there) if there else ''}"
        f"{'; pass --split ' + ' or '.join(filled) if filled else ''}"
    )


def pool_files(root: Path, file: QueryFile, split: str) -> dict[str, Path]:
    """Task -> the pool file that queries of it are asked of; of a mixed file every task that has
    one.

    Raises:
        DataError: there is none.
    """
    tasks = [file.task] if file.task is not None else list(TASKS)
    found = {task: path for task in tasks if (path := _pool_file(root, file, task, split))}
    if not found:
        folder, union = root / "cand_pool" / "local", union_pool_file(root, split)
        name = file.stem(file.task) if file.task else f"{file.name}_task<number>"
        raise DataError(f"{folder}: no candidate pool mbeir_{name}_cand_pool.jsonl, nor {union}")
    return found


def _pool_file(root: Path, file: QueryFile, task: str, split: str) -> Path | None:
    """The split's own pool of the set; else the common one, before or after the split's union:
    the answers of M-BEIR's training queries lie in the union alone (MSCOCO's, VisualNews')."""
    local, stem = root / "cand_pool" / "local", file.stem(task)
    own = local / f"mbeir_{stem}_{split}_cand_pool.jsonl"
    common = local / f"mbeir_{stem}_cand_pool.jsonl"
    union = union_pool_file(root, split)
    order: tuple[Path, ...] = (own, union, common) if split == "train" else (own, common, union)
    if file.union:
        order = (union,)
    return next((path for path in order if path.exists()), None)


def sets_with_pools(root: Path, datasets: Iterable[tuple[str, int]]) -> list[int]:
    """The numbers of the datasets whose candidates lie somewhere in the tree.

    Args:
        datasets: (name, number), as the instructions have them.
    """
    known = {name.lower(): number for name, number in datasets}
    if any((root / "cand_pool" / "global").glob("mbeir_union_*_cand_pool.jsonl")):
        return sorted(set(known.values()))
    stems = (p.name for p in (root / "cand_pool" / "local").glob("mbeir_*_cand_pool.jsonl"))
    names = {re.sub(r"_task\d.*", "", stem.removeprefix("mbeir_")).lower() for stem in stems}
    return sorted({number for name, number in known.items() if name in names})


def _named(folder: Path, split: str) -> tuple[list[QueryFile], list[str]]:
    """The query files of a folder, and the names of all else in it."""
    found, others = [], []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        match = re.fullmatch(rf"mbeir_(\w+?)(?:_task(\d+))?_{split}\.jsonl", path.name)
        if match is None:
            others.append(path.name)
            continue
        number = match[2]
        if number is not None and int(number) not in TASK_NAMES:
            raise DataError(f"{path}: not named mbeir_<dataset>_task<number>_{split}.jsonl")
        task = None if number is None else TASK_NAMES[int(number)]
        found.append(QueryFile(match[1], task, path))
    return found, others


def _passed_over(folder: Path, names: Sequence[str]) -> tuple[str, ...]:
    rule = "no query files by their names"
    return (f"{folder}: passed over {_listed(names)}: {rule}",) if names else ()


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
