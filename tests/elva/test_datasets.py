"""Data directories and other sources as streams of `datasets`: the rows of `elva.data`'s readers,
each once, in order, from where a stream was."""

import csv
import json
import tracemalloc
from collections import deque
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Image, IterableDataset
from datasets.distributed import split_dataset_by_node
from PIL import Image as Pillow
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch.utils.data import DataLoader
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from elva.data import Dataset, Item, Query, load, mbeir
from elva.data.formats import convert_file
from elva.data.instructions import write_instructions
from elva.errors import DataError, UserError
from elva.integrations.datasets import candidates, examples, pairs
from tests.elva import families, sentence_models, shelf

QUERIES, CANDIDATES = 23, 40


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    shelf.offline(monkeypatch)


def draw(path: Path, seed: int) -> str:
    """A small picture, half of it transparent; its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 255, (12, 9, 4), np.uint8)
    values[:6, :, 3] = 0
    Pillow.fromarray(values, "RGBA").save(path)
    return path.name


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sets in M-BEIR's layout: words to pictures, and pictures with words to pictures."""
    root = tmp_path_factory.mktemp("tree")
    for i in range(CANDIDATES):
        draw(root / f"mbeir_images/{i}.png", i)
    pool = [
        {"did": f"9:{i + 1}", "txt": None, "img_path": f"mbeir_images/{i}.png",
         "modality": "image", "src_content": None}
        for i in range(CANDIDATES)
    ]  # fmt: skip
    for task, kind in ((0, "text"), (7, "image,text")):
        mbeir.write_pool(root, f"things_task{task}", pool)
        rows = [
            {"qid": f"9:{1000 * task + i + 1}", "query_txt": f"thing {i} of {task}",
             "query_img_path": f"mbeir_images/{39 - i}.png" if task else None,
             "query_modality": kind, "task_id": task,
             "pos_cand_list": [f"9:{j + 1}" for j in range(i, i + 1 + i % 2)],
             "neg_cand_list": [f"9:{(i + j) % CANDIDATES + 1}" for j in range(3, 5 + i % 3)]}
            for i in range(QUERIES)
        ]  # fmt: skip
        mbeir.write_queries(root, f"things_task{task}", "train", rows)
    prompts = {("text", "image"): ["Find it."], ("image,text", "image"): ["Change it."]}
    write_instructions(root, "things", 9, prompts)
    return root


def pixels(item: Item) -> bytes | None:
    return None if item.image is None else item.load_image().tobytes()


def shown(image: Pillow.Image | None) -> bytes | None:
    assert image is None or image.mode == "RGB"
    return None if image is None else image.tobytes()


def expected(data: Dataset, query: Query, *, ids: bool) -> dict[str, Any]:
    """The row of a query as its reader has it."""

    def said(item: Item) -> tuple[str | None, str | None, bytes | None]:
        return (item.id if ids else None, item.text, pixels(item))

    pool = data.pool(query.task)
    return {
        "query": said(query), "task": query.task, "instruction": query.instruction,
        "positives": [said(pool[pool.row(id)]) for id in query.positives],
        "negatives": [said(pool[pool.row(id)]) for id in query.negatives],
    }  # fmt: skip


def found(row: dict[str, Any], *, ids: bool) -> dict[str, Any]:
    def said(item: dict[str, Any]) -> tuple[str | None, str | None, bytes | None]:
        return (item["id"] if ids else None, item["text"], shown(item["image"]))

    return {
        "query": said(row), "task": row["task"], "instruction": row["instruction"],
        "positives": [*map(said, row["positives"])], "negatives": [*map(said, row["negatives"])],
    }  # fmt: skip


def ids(stream: IterableDataset) -> list[str]:
    return [row["id"] for row in stream.decode(False)]


def test_rows_are_those_of_the_reader_in_its_order(tree: Path) -> None:
    """Of both sets, to the pixel; the first negatives where so many are asked for."""
    data = load(tree)
    rows = [*examples(tree, num_shards=5)]
    assert len(rows) == 2 * QUERIES
    assert [found(row, ids=True) for row in rows] == [
        expected(data, query, ids=True) for query in data.queries
    ]
    (first,) = examples(tree, tasks=["it2i"], negatives=1).take(1)
    assert (first["id"], len(first["negatives"])) == ("9:7001", 1)
    assert first["negatives"][0]["id"] == data.queries[QUERIES].negatives[0]


def write_mmeb(root: Path) -> None:
    for subset, start in (("A", 0), ("B", 3)):
        rows = [
            {"qry": f"<|image_1|>\nwhat is {i}?",
             "qry_image_path": draw(root / subset / f"q{i}.png", i),
             "pos_text": f"it is {i}", "pos_image_path": "", "neg_text": f"it is not {i}",
             "neg_image_path": ""}
            for i in range(start, start + 3)
        ]  # fmt: skip
        for part, some in enumerate((rows[:2], rows[2:])):
            path = root / subset / f"original-0000{part}-of-00002.parquet"
            pq.write_table(pa.Table.from_pylist(some), path)


def write_mmeb_test(root: Path) -> None:
    rows = [
        {"qry_inst": "Find it:", "qry_text": f"thing {i}", "qry_img_path": "", "tgt_inst": "",
         "tgt_text": ["", "", ""],
         "tgt_img_path": [draw(root / f"{i}{j}.png", 9 * i + j) for j in range(3)]}
        for i in range(4)
    ]  # fmt: skip
    (root / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_nli(root: Path) -> None:
    lines = ["sent0,sent1,hard_neg", *(f"a {i},b {i},c {i}" for i in range(5))]
    (root / "nli.csv").write_text("\n".join(lines) + "\n")


def write_captioned(root: Path) -> None:
    with open(root / "captions.csv", "w", newline="") as file:
        rows = [(draw(root / f"{i}.png", i), f"a thing like {i}") for i in range(7)]
        csv.writer(file).writerows([("file", "caption"), *rows])


def write_pictures(root: Path) -> None:
    for i in range(5):
        draw(root / "inner" / f"{i}.png", i)


@pytest.mark.parametrize(
    ("format", "write", "file"),
    [
        ("mmeb", write_mmeb, ""),
        ("mmeb-test", write_mmeb_test, ""),
        ("nli", write_nli, "nli.csv"),
        ("folder", write_captioned, ""),
        ("folder", write_pictures, ""),
    ],
)
def test_other_sources_stream_what_their_conversion_holds(
    format: str, write: Callable[[Path], None], file: str, tmp_path: Path
) -> None:
    """Without converting them; of MMEB's test rows the other candidates are the negatives."""
    source = tmp_path / "source"
    source.mkdir()
    write(source)
    convert_file(format, source / file, tmp_path / "data")
    data = load(tmp_path / "data")
    rows = [found(row, ids=False) for row in examples(source / file, format=format)]
    wanted = [expected(data, query, ids=False) for query in data.queries]
    if format == "mmeb-test":
        for query, row in zip(data.queries, wanted, strict=True):
            pool = data.pool(query.task)
            others = [pool[pool.row(id)] for id in data.minimal_pairs[query.id][1:]]
            row["negatives"] = [(None, other.text, pixels(other)) for other in others]
    assert rows and rows == wanted
    told = [row["id"] for row in examples(source / file, format=format)]
    assert len({*told}) == len(told)


@pytest.mark.parametrize("count", [3, 1000, None])
def test_shards_part_the_rows_in_order(tree: Path, count: int | None) -> None:
    stream, whole = examples(tree, tasks=["t2i"], num_shards=count), load(tree, tasks=["t2i"])
    assert stream.num_shards == min(count or 1, QUERIES)
    parts = [ids(stream.shard(stream.num_shards, i)) for i in range(stream.num_shards)]
    assert [*chain(*parts)] == whole.queries.ids
    assert {len(part) for part in parts} <= {QUERIES // len(parts), -(-QUERIES // len(parts))}


def test_workers_and_processes_take_each_row_once(tree: Path) -> None:
    stream = examples(tree, num_shards=5)
    loader = DataLoader(stream, batch_size=None, num_workers=2)
    assert sorted(row["id"] for row in loader) == sorted(load(tree).queries.ids)
    shares = [ids(split_dataset_by_node(stream, rank, 5)) for rank in range(5)]
    assert sorted(chain(*shares)) == sorted(load(tree).queries.ids)


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("at", [0, 30])
def test_a_stream_goes_on_where_it_was(tree: Path, shuffled: bool, at: int) -> None:
    """Also of shards in a drawn order; rows are neither lost nor there twice."""

    def stream() -> IterableDataset:
        made = examples(tree, num_shards=9).decode(False)
        return made.shuffle(seed=3, buffer_size=1) if shuffled else made

    whole = [row["id"] for row in stream()]
    assert (whole != load(tree).queries.ids) == shuffled and len({*whole}) == 2 * QUERIES
    before = stream()
    rows = iter(before)
    seen = [next(rows)["id"] for _ in range(at)]
    after = stream()
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert seen + [row["id"] for row in after] == whole


def test_shuffling_decodes_nothing_and_epochs_differ(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    for i in range(8):
        draw(tmp_path / "gone" / f"{i}.png", i)
    lost = examples(tmp_path / "gone", format="folder", num_shards=2)
    for path in (tmp_path / "gone").iterdir():
        path.write_bytes(path.read_bytes()[:60])  # whole headers alone
    again = lost.shuffle(seed=0, buffer_size=4)
    assert len(ids(again)) == 8
    with pytest.raises(DataError, match=r"gone/\d.png: unreadable picture"):
        next(iter(again))
    stream = examples(tree).shuffle(seed=0, buffer_size=8).decode(False)
    epochs = []
    for epoch in range(2):
        stream.set_epoch(epoch)
        epochs.append([row["id"] for row in stream])
    assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1])


def test_pictures_are_shown_over_white_or_stay_paths(tree: Path) -> None:
    """`datasets`' own feature keeps transparency; as tensors they are uint8 [3, H, W]."""
    (row,) = examples(tree, tasks=["t2i"]).take(1)
    picture = np.asarray(row["positives"][0]["image"])
    assert picture.shape == (12, 9, 3) and (picture[:6] == 255).all()
    (tensors,) = examples(tree, tasks=["t2i"]).with_format("torch").take(1)
    image = tensors["positives"][0]["image"]
    assert image.dtype == torch.uint8
    assert torch.equal(image, torch.from_numpy(picture.copy()).permute(2, 0, 1))
    (raw,) = candidates(tree, "t2i").decode(False).take(1)
    assert raw["image"] == {"path": str(tree / "mbeir_images/0.png"), "bytes": None}
    (kept,) = candidates(tree, "t2i").cast_column("image", Image()).take(1)
    assert kept["image"].mode == "RGBA"


def test_candidates_are_the_pool(tree: Path) -> None:
    pool = load(tree, tasks=["t2i"]).pool("t2i")
    rows = [*candidates(tree, "t2i", num_shards=7)]
    assert [(r["id"], r["text"], r["modality"], shown(r["image"])) for r in rows] == [
        (item.id, item.text, item.modality, pixels(item)) for item in pool
    ]


def test_a_stream_holds_none_of_its_rows(tmp_path: Path) -> None:
    """Python's peak over 1,200 candidates, whose rows together take several times as much."""
    words = " of the same length as a caption" * 4
    rows = [
        {"did": f"9:{i + 1}", "txt": f"thing {i}{words}", "img_path": None, "modality": "text"}
        for i in range(1200)
    ]
    mbeir.write_pool(tmp_path, "things_task1", rows)
    query = {"qid": "9:1", "query_txt": "q", "query_img_path": None, "query_modality": "text"}
    query |= {"pos_cand_list": ["9:1"], "neg_cand_list": [], "task_id": 1}
    mbeir.write_queries(tmp_path, "things_task1", "train", [query])
    write_instructions(tmp_path, "things", 9, {("text", "text"): ["Find it."]})
    stream = candidates(tmp_path, "t2t")
    next(iter(stream))
    peaks = []
    for kept in (0, 1200):
        tracemalloc.start()
        deque(stream, maxlen=kept)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[0] < 400_000 and peaks[1] > 4 * peaks[0]


def test_pairs_are_columns_by_kind(tree: Path) -> None:
    stream = pairs(tree, tasks=["it2i"], negatives=2, instructions=True)
    assert stream.column_names == ["anchor", "positive", "negative_1", "negative_2"]
    data, rows = load(tree, tasks=["it2i"]), [*stream]
    pool = data.pool("it2i")
    for row, query in zip(rows, data.queries, strict=True):
        assert row["anchor"]["text"] == query.prompted
        assert shown(row["anchor"]["image"]) == pixels(query)
        answers = (query.positives[0], *query.negatives[:2])
        assert [shown(row[name]) for name in stream.column_names[1:]] == [
            pixels(pool[pool.row(id)]) for id in answers
        ]
    (plain,) = pairs(tree, tasks=["t2i"]).take(1)
    assert plain["anchor"] == "Thing 0 of 0." and isinstance(plain["positive"], Pillow.Image)


@pytest.mark.parametrize("kind", ["text", "picture"])
def test_sentence_transformers_trains_on_pairs(kind: str, tree: Path, tmp_path: Path) -> None:
    """Three steps of its own trainer and loss, by texts, and by texts and pictures."""
    if kind == "text":
        write_nli(tmp_path)
        stream = pairs(tmp_path / "nli.csv", format="nli", negatives=1)
        model = SentenceTransformer(str(sentence_models.text(tmp_path)), device="cpu")
    else:
        stream = pairs(tree, tasks=["t2i"], negatives=1)
        model = SentenceTransformer(str(sentence_models.clip(tmp_path)), device="cpu")
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    args = SentenceTransformerTrainingArguments(
        str(tmp_path / "out"), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-3,
        report_to="none", logging_steps=1, save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = SentenceTransformerTrainer(
        model, args, stream, loss=MultipleNegativesRankingLoss(model)
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and all(0 < loss < 10 for loss in losses)
    assert any(not torch.equal(weight, before[n]) for n, weight in model.named_parameters())


def test_trl_rolls_out_on_examples(tree: Path, tmp_path: Path) -> None:
    """GRPO with a prompt made of a row; its reward sees the row's other columns."""
    model = families.write(tmp_path / "model", "qwen2_vl")
    asked: list[str] = []

    def reward(completions: list[Any], id: list[str], positives: list[Any], **_: Any) -> Any:
        asked.extend(id)
        assert all(isinstance(one[0]["image"], Pillow.Image) for one in positives)
        return [float(i) for i in range(len(completions))]

    def prompt(row: dict[str, Any]) -> dict[str, Any]:
        return {"prompt": [{"role": "user", "content": f"{row['instruction']} {row['text']}"}]}

    stream = examples(tree, tasks=["t2i"], negatives=0).map(
        prompt,
        remove_columns=["image"],  # TRL shows what stands there to the model, None too
    )
    args = GRPOConfig(
        str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=2, num_generations=2,
        max_completion_length=2, report_to="none", save_strategy="no", use_cpu=True, bf16=False,
        disable_tqdm=True, shuffle_dataset=False,
    )  # fmt: skip
    words = AutoTokenizer.from_pretrained(model)
    GRPOTrainer(str(model), reward, args, stream, processing_class=words).train()
    assert asked == ["9:1", "9:1", "9:2", "9:2"]


@pytest.mark.parametrize(
    ("make", "how", "rule"),
    [
        (examples, {"format": "beir"}, "format must be one of mbeir, mmeb, mmeb-test, nli, folder"),
        (examples, {"num_shards": 0}, "num_shards must be at least 1, got 0"),
        (examples, {"negatives": -1}, "negatives must be at least 0, got -1"),
        (examples, {"tasks": "t2i"}, r"tasks must be a list of tasks, got 't2i'; pass \['t2i'\]"),
        (examples, {"images": "x"}, "images must be left out of format 'mbeir', got x"),
        (examples, {"split": "dev"}, "split 'dev' is not one of train, val, test"),
        (pairs, {}, "pairs must be of one task, got t2i, it2i; pass one as tasks"),
        (pairs, {"negatives": -2}, "negatives must be at least 0, got -2"),
    ],
)
def test_what_does_not_fit_is_one_line_before_the_first_row(tree, make, how, rule) -> None:
    with pytest.raises(UserError, match=rule) as caught:
        make(tree, **how)
    assert "\n" not in str(caught.value)


def test_rows_that_do_not_fit_are_one_line(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train.jsonl:1: must have 3 negatives, has 2; elva mine"):
        [*pairs(tree, tasks=["t2i"], negatives=3).decode(False)]
    with pytest.raises(UserError, match=r"source must be a file or folder, got .*nowhere"):
        examples(tmp_path / "nowhere")
    write_nli(tmp_path)
    with pytest.raises(UserError, match=r"num_shards must be left out of files, .* got 2"):
        examples(tmp_path / "nli.csv", format="nli", num_shards=2)
    (tmp_path / "nli.csv").write_text("sent0,sent1\na,b\n,d\n")
    with pytest.raises(DataError, match=r"nli.csv:3: has neither text nor picture"):
        [*examples(tmp_path / "nli.csv", format="nli")]
