"""A run's files as a training and its evaluations would have written them, made in no time."""

from pathlib import Path

from PIL import Image

from elva.data import load, mbeir
from elva.data.instructions import write_instructions
from elva.recipe import Recipe, StageConfig
from elva.run import Run

NAMES = ["red <b>square</b>", "green square", "blue square", "red disc", "green disc", "blue disc"]
COLOURS = [(200, 0, 0), (0, 150, 0), (0, 0, 200)] * 2


def write_data(root: Path, first: str = NAMES[0]) -> Path:
    """Six pictures with names, in M-BEIR's layout.

    Args:
        first: the first one's name.
    """
    names = [first, *NAMES[1:]]
    (root / "img").mkdir(parents=True)
    for i, colour in enumerate(COLOURS):
        Image.new("RGB", (400, 300), colour).save(root / "img" / f"{i}.png")
    write_instructions(
        root, "tiny", 7, {("text", "image"): ["Find it."], ("image", "text"): ["Name it."]}
    )

    def row(kind: str, id: str, text: str | None, image: str | None) -> dict[str, object]:
        modality = "text" if image is None else "image"
        return (
            {"did": id, "txt": text, "img_path": image, "modality": modality}
            if kind == "pool"
            else {"qid": id, "query_txt": text, "query_img_path": image, "query_modality": modality}
        )

    files = [f"img/{i}.png" for i in range(6)]
    for stem, task in (("tiny_task0", 0), ("tiny_task3", 3)):
        shown = [
            row("pool", f"7:{i + 100 * task}", *((names[i], None) if task else (None, files[i])))
            for i in range(6)
        ]
        asked = [
            row(
                "query",
                f"7:{i + 50 + 100 * task}",
                *((None, files[i]) if task else (names[i], None)),
            )
            | {"pos_cand_list": [f"7:{i + 100 * task}"], "neg_cand_list": [], "task_id": task}
            for i in range(6)
        ]
        mbeir.write_pool(root, stem, shown)
        mbeir.write_queries(root, stem, "test", asked)
    return root


def evaluation(root: Path, ranks: list[int], distance: float) -> dict[str, object]:
    """What an evaluation in which query i finds its positive at ranks[i] would have written."""
    dataset = load(root, split="test")
    found: dict[str, dict] = {"figures": {}, "samples": {}, "grain_distances": {}}
    for task in ("t2i", "i2t"):
        ids = dataset.pool(task).ids
        found["samples"][task] = [
            {
                "id": q.id, "query": q.raw_text, "positives": list(q.positives), "rank": rank,
                "margin_reward": 1 / rank, "rank_reward": -float(rank),
                "summary": f"summary of {q.id} & more",
                "top": [{"id": i, "summary": ""} for i in moved(ids, q.positives[0], rank)[:5]],
            }
            for q, rank in zip((q for q in dataset.queries if q.task == task), ranks, strict=True)
        ]  # fmt: skip
        found["figures"] |= {
            f"{task}_recall_at_1": sum(r == 1 for r in ranks) / 6,
            f"{task}_recall_at_5": sum(r <= 5 for r in ranks) / 6,
            f"{task}_queries": 6,
            f"{task}_pool": 6,
        }
    found["pushes"] = {
        "task": "t2i", "queries": 6, "temperature": 0.05, "infonce": [0.5, 0.3, 0.2],
        "reward": [-0.25, 0.25, 0.5],
    }  # fmt: skip
    found["plane"] = {
        "task": "t2i", "explained": [0.5, 0.25],
        "points": [
            {"id": f"7:{i}", "x": i, "y": -i, "grains": {"colour": NAMES[i % 2], "shape": "any"}}
            for i in range(6)
        ],
    }  # fmt: skip
    found["grain_distances"] = {
        "entity": [distance] * 12, "tone": [distance / 2] * 10, "size": [distance / 10]
    }  # fmt: skip
    found["figures"]["grain_reading"] = {
        "gender": {"accuracy": 0.98, "chance": 0.5, "asked": 12},
        "tone": {"accuracy": 0.5 + distance, "chance": 0.2, "asked": 12},
    }
    return found


def moved(ids: list[str], positive: str, rank: int) -> list[str]:
    rest = [i for i in ids if i != positive]
    return [*rest[: rank - 1], positive, *rest[rank - 1 :]]


def build(root: Path, parent: Path, called: str = "tiny", seed: int = 0) -> Run:
    """Two stages and a control, finished and evaluated."""
    stage = StageConfig(data=str(root), steps=4)
    recipe = Recipe(
        called,
        seed=seed,
        stages={"1": stage, "2": stage},
        controls={"infonce": StageConfig(data=str(root))},
    )
    run = Run.create(parent / "run", recipe)
    for name, ranks, distance in (
        ("1", [1, 1, 2, 3, 6, 6], 0.2),
        ("2", [1, 2, 1, 1, 1, 6], 0.4),
        ("infonce", [1, 1, 1, 2, 2, 2], 0.3),
    ):
        run.write(name, "stage.json", {"steps": 4, "seconds": 2.5})
        run.write(name, "evaluation.json", evaluation(root, ranks, distance))
        for step in range(1, 5):
            run.log(
                name,
                step,
                {
                    "loss": 1.0 / step,
                    "lm": 1.0 / step,
                    "reward": float("nan"),
                    "completion_length": 3.0,
                },
            )
    return run
