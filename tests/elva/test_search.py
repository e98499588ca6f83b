"""Search over a real, untrained model and a pool of a dozen pictures."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from elva.collection import ROOM
from elva.commands import search
from elva.data import load, mbeir
from elva.data.instructions import write_instructions
from elva.errors import UserError
from elva.files import write_directory
from elva.index import Index
from elva.model.identity import Identity
from elva.model.retriever import Retriever
from elva.model.rollout import encode
from elva.model.scratch import create
from elva.recipe import ModelConfig, Recipe, ScratchModel, StageConfig
from elva.run import Run
from elva.search import Hit

NAMES = [f"{tone} {shape}" for shape in ("square", "disc", "bar", "ring") for tone in "abc"]
INSTRUCTIONS = {("text", "image"): ["Find it."], ("image,text", "image"): ["Change it to"]}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures of noise; the last two are the same one, and the last has no name."""
    root = tmp_path_factory.mktemp("data")
    for i in range(12):
        noise = torch.rand(32, 32, 3, generator=torch.Generator().manual_seed(min(i, 10)))
        Image.fromarray((255 * noise).byte().numpy()).save(root / f"{i}.png")
    pool = [
        {"did": f"7:{i}", "txt": None, "img_path": f"{i}.png", "modality": "image"}
        for i in range(12)
    ]
    queries = [
        {"qid": f"7:{50 + i}", "query_txt": name, "query_img_path": None, "query_modality": "text",
         "pos_cand_list": [f"7:{i}"], "neg_cand_list": [], "task_id": 0}
        for i, name in enumerate(NAMES[:11])
    ]  # fmt: skip
    write_instructions(root, "tiny", 7, INSTRUCTIONS)
    mbeir.write_pool(root, "tiny_task0", pool)
    mbeir.write_queries(root, "tiny_task0", "test", queries)
    return root


@pytest.fixture(scope="module")
def run(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Stage 1 and a control are trained, stage 2 is not."""
    spec = ScratchModel(
        hidden_size=32, intermediate_size=64, layers=1, heads=2, vocabulary=300, image_size=32,
        vision_size=32, vision_layers=1, vision_heads=2,
    )  # fmt: skip
    stage = StageConfig(data=str(root), steps=1, max_completion_length=3)
    recipe = Recipe("tiny", ModelConfig(scratch=spec), {"1": stage, "2": stage}, {"infonce": stage})
    run = Run.create(tmp_path_factory.mktemp("run") / "run", recipe)
    for seed, name in enumerate(("1", "infonce")):
        write_directory(
            run.model(name),
            lambda partial, seed=seed: create(partial, spec, NAMES, summary_prompt="", seed=seed),
        )
        run.write(name, "stage.json", {"steps": 1, "seconds": 1.0})
    return run


class Listener:
    """Counts what it is told."""

    def __init__(self) -> None:
        self.started: list[str] = []

    def start(self, what: str, total: int | None, unit: str = "steps") -> None:
        self.started.append(what)

    def advance(self, done: int, values: dict[str, float] | None = None) -> None: ...

    def say(self, line: str) -> None: ...
    def finish(self, line: str) -> None: ...


def test_a_query_is_embedded_and_ranked_as_a_test_query_is(run: Run, root: Path) -> None:
    """Scores against an independent float64 cosine of the data's own query and pool."""
    dataset = load(root, split="test")
    query, pool = dataset.queries[3], dataset.pool("t2i")
    retriever = Retriever.load(run.model("1"))
    q = encode(retriever, [query], max_completion_length=3).embeddings.double()
    p = encode(retriever, list(pool), max_completion_length=3).embeddings.double()
    cosine = torch.cosine_similarity(q, p)
    hits = search.search(run, query.raw_text, k=12)
    assert [h.rank for h in hits] == list(range(1, 13))
    assert sorted(h.id for h in hits) == sorted(pool.ids)
    for hit in hits:
        assert hit.score == pytest.approx(cosine[pool.row(hit.id)].item(), abs=2e-6)
    scores = [h.score for h in hits]
    assert scores == sorted(scores, reverse=True) and scores[0] - scores[-1] > 1e-4


def test_equal_pictures_tie_and_the_earlier_row_comes_first(run: Run) -> None:
    hits = {h.id: h for h in search.search(run, "a square", k=12)}
    assert hits["7:10"].score == hits["7:11"].score
    assert hits["7:11"].rank == hits["7:10"].rank + 1


def test_hits_carry_name_summary_and_picture(run: Run, root: Path) -> None:
    hits = {h.id: h for h in search.search(run, "a square", k=99)}
    assert len(hits) == 12  # all of them, where k is larger than the pool
    assert hits["7:4"].name == "b disc" and hits["7:4"].image == root / "4.png"
    assert hits["7:11"].name == "11.png"  # nobody named it
    data = json.loads(json.dumps([h.as_json() for h in hits.values()], allow_nan=False))
    assert set(data[0]) == {
        "rank", "id", "name", "score", "summary", "image", "proven_by", "rows_read",
    }  # fmt: skip
    assert (data[0]["proven_by"], data[0]["rows_read"]) == ("rows", None)


def test_text_picture_and_both_are_different_queries(run: Run, root: Path) -> None:
    text = search.search(run, "a square", k=12)
    both = search.search(run, "a square", k=12, image=root / "0.png")
    assert [h.score for h in text] != [h.score for h in both]
    with pytest.raises(UserError, match=r"search: image must have an instruction, got"):
        search.search(run, image=root / "0.png")


def test_the_pool_is_embedded_once_for_each_model(run: Run) -> None:
    directory = run.stage("infonce") / ROOM
    listener = Listener()

    def ask() -> list[Hit]:
        return search.search(run, "c ring", stage="infonce", reporter=listener)

    first = ask()
    assert len(Index(directory)) == 12 and len(listener.started) == 1
    assert ask() == first and len(listener.started) == 1
    stage_1 = search.search(run, "c ring", stage="1")
    assert [h.score for h in stage_1] != [h.score for h in first]


@pytest.mark.parametrize("damage", ["torn", "missing", "another model's"])
def test_an_index_that_does_not_fit_is_made_again(run: Run, damage: str) -> None:
    directory = run.stage("1") / ROOM
    first = search.search(run, "c ring")
    if damage == "torn":
        path = Index(directory).segments[0].path
        path.write_bytes(path.read_bytes()[:-4] + b"\0\1\2\3")
    elif damage == "missing":
        (directory / "index.json").unlink()
    else:
        other, old = Identity("b", "another", "one"), Index(directory)
        Index.build(directory, ["7:0"], torch.ones(1, 32), model=other, about=old.about,
                    overwrite=True)  # fmt: skip
    listener = Listener()
    assert search.search(run, "c ring", reporter=listener) == first
    assert len(listener.started) == 1 and len(Index(directory)) == 12


def test_a_sheet_is_a_picture_of_any_hits(run: Run, tmp_path: Path) -> None:
    hits = search.search(run, "c ring", k=7)
    search.write_sheet(hits, tmp_path / "sheet.png", "c\nring")
    search.write_sheet([], tmp_path / "none.png", "")
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.width > image.height > 900  # two rows of five


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"query": ""}, "query must hold words, got ''"),
        ({"query": ' "" '}, "query must hold words"),
        ({"query": "x" * 2001}, "query must have at most 2000 characters, got 2001"),
        ({"query": "a\udc80"}, "query must be valid text"),
        ({"query": "a", "k": 0}, "k must be at least 1, got 0"),
        (
            {"query": "a", "image": Path("absent.png")},
            "image must be a file .* absent.png",
        ),
        ({"query": "a", "image": Path(__file__)}, "image must be a file that shows a picture"),
        ({"query": "a", "stage": "2"}, "stage must be trained, got '2'; .*: 1, infonce"),
        ({"query": "a", "stage": "../1"}, "stage must be trained"),
    ],
)
def test_bad_input_is_one_line(run: Run, arguments: dict, rule: str) -> None:
    with pytest.raises(UserError, match=rule) as caught:
        search.search(run, **arguments)
    assert "\n" not in str(caught.value) and "; " in str(caught.value)


def test_a_run_without_a_trained_stage_says_how_to_go_on(run: Run, tmp_path: Path) -> None:
    empty = Run.create(tmp_path / "empty", run.recipe)
    with pytest.raises(UserError, match=r"must hold a trained stage, .*--resume"):
        search.search(empty, "a")
