"""A corpus of a few hundred emoji and a model that trains in seconds."""

import json
from pathlib import Path

import pytest
import yaml

from elva.data import emoji, load
from elva.recipe import Recipe, resolve

STAGES = ("0", "1", "2", "3")
KEPT = 260  # of each kind: enough for 50 hard and 50 random negatives


def number(identifier: str) -> int:
    """The picture that an id of the emoji corpus belongs to (names are 100,000 on)."""
    return int(identifier.split(":")[1]) % 100_000


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first rows of the embedded corpus, in its own layout."""
    whole = emoji.cached(64)
    root = tmp_path_factory.mktemp("corpus") / "emoji"
    root.mkdir()
    (root / "mbeir_images").symlink_to(whole / "mbeir_images")
    kept_queries: set[str] = set()
    for path in sorted(whole.rglob("*")):
        if not path.is_file() or path.suffix == ".png" or "task4" in path.name:
            continue
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        if "query" in path.parts[-3:]:
            rows = [json.loads(line) for line in lines]
            rows = [r for r in rows if number(r["pos_cand_list"][0]) < KEPT]
            for row in rows:
                row["neg_cand_list"] = [n for n in row["neg_cand_list"] if number(n) < KEPT]
            kept_queries.update(r["qid"] for r in rows)
            lines = [json.dumps(row) + "\n" for row in rows]
        elif "cand_pool" in path.parts:
            lines = [line for line in lines if number(json.loads(line)["did"]) < KEPT]
        elif "qrels" in path.parts:
            lines = [line for line in lines if number(line.split()[2]) < KEPT]
        elif path.name == "manifest.json":
            continue
        write(root / path.relative_to(whole), lines)
    for name in ("grains.jsonl", "minimal_pairs.jsonl"):
        rows = [json.loads(line) for line in (root / name).read_text("utf-8").splitlines()]
        rows = [r for r in rows if r.get("qid", r.get("did")) in kept_queries]
        for row in rows:
            if "candidates" in row:
                row["candidates"] = [c for c in row["candidates"] if number(c) < KEPT]
        write(root / name, [json.dumps(row) + "\n" for row in rows])
    assert load(root, split="train").queries and load(root, split="test").queries
    return root


def write(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8")


@pytest.fixture(scope="session")
def recipe_file(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smoke recipe on the small corpus with a model of one layer, a checkpoint every step."""
    steps = {"0": 80, "1": 3, "2": 4, "3": 4}
    small = {"batch_size": 8, "data": str(corpus), "refresh_steps": 2}
    changes = {
        "model": {"scratch": {
            "hidden_size": 32, "intermediate_size": 64, "layers": 1, "heads": 2, "vocabulary": 600,
            "vision_size": 32, "vision_layers": 1, "vision_heads": 2,
        }},
        "stages": {
            s: {"steps": steps[s], **small, **({"learning_rate": 5e-3} if s == "0" else {})}
            for s in STAGES
        },  # stage 0 long enough that summaries begin to end in [RET]
        "controls": {c: {"steps": 2, **small} for c in resolve("smoke").controls},
        "save_seconds": 0.0,
        "evaluate_limit": 24,
    }  # fmt: skip
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(yaml.safe_dump(changes))
    return path


@pytest.fixture(scope="session")
def recipe(recipe_file: Path) -> Recipe:
    return resolve("smoke", recipe_file)
