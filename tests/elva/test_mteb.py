"""mteb's own tasks and figures on our encoders, beside `elva evaluate` on the same files."""

import json
import socket
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import mteb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from mteb.models import EncoderProtocol, SearchProtocol
from mteb.types import PromptType
from torch.utils.data import DataLoader

from elva.commands.embed import embed
from elva.commands.evaluate import evaluate_embeddings
from elva.data import Item, Query, load
from elva.data.formats import convert_file
from elva.errors import DataError, UserError
from elva.integrations.mteb import ElvaEncoder
from elva.model.encoder import RetrieverEncoder
from elva.model.identity import Identity
from elva.model.rollout import Encoded
from tests.elva import families, sentence_models
from tests.elva.sentence_models import noise

QUERIES, CANDIDATES = 12, 30
TOLD = "Find the picture after this change"
CARD = """---
configs:
{configs}
---
"""


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of this may ask another machine, nor write into a user's cache."""

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def picture(seed: int) -> dict[str, Any]:
    stream = BytesIO()
    noise(seed).save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": f"{seed}.png"}


def table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Parquet as `datasets` writes it: of a picture it notes that it is one."""
    found = pa.Table.from_pylist(list(rows))
    if "image" in found.column_names:
        about = {"info": {"features": {
            "id": {"dtype": "string", "_type": "Value"},
            "modality": {"dtype": "string", "_type": "Value"},
            "text": {"dtype": "string", "_type": "Value"},
            "image": {"_type": "Image"},
        }}}  # fmt: skip
        found = found.replace_schema_metadata({"huggingface": json.dumps(about)})
    pq.write_table(found, path)


def mirror(root: Path, name: str, query: str, candidate: str) -> Path:
    """A mirror of a set of M-BEIR's in mteb's layout, with random right answers."""
    folder, draws = root / name, np.random.default_rng(0)
    folder.mkdir(parents=True)
    number = {"oven": 5, "cirr": 8, "mscoco": 9}[name.split("_")[1]]

    def row(at: int, kinds: str, shift: int) -> dict[str, Any]:
        return {
            "id": f"{number}:{at + 1}",
            "modality": ",".join(k for k, s in (("image", "i"), ("text", "t")) if s in kinds),
            "text": f"a thing of kind {at * shift % 17}, {at}" if "t" in kinds else "",
            "image": picture(shift * 1000 + at) if "i" in kinds else None,
        }

    table(folder / "query-0.parquet", [row(i, query, 3) for i in range(QUERIES)])
    table(folder / "corpus-0.parquet", [row(i, candidate, 5) for i in range(CANDIDATES)])
    judged = [
        {"query-id": f"{number}:{i + 1}", "Q0": "0", "corpus-id": f"{number}:{at + 1}", "score": 1}
        for i in range(QUERIES)
        for at in draws.choice(CANDIDATES, 1 + i % 3, replace=False).tolist()
    ]
    table(folder / "qrels-0.parquet", judged)
    configs = [
        f"- config_name: {name}\n  data_files:\n  - split: test\n    path: {name}-*.parquet"
        for name in ("query", "corpus", "qrels")
    ]
    (folder / "README.md").write_text(CARD.format(configs="\n".join(configs)))
    words = {"t": "text", "i": "image", "it": "image,text"}
    (root / "query_instructions.tsv").write_text(
        f"{words[query]}\t{words[candidate]}\t{name.split('_')[1]}\t{number}\t{TOLD}\tAnother\n"
    )
    return folder


def on_disk(name: str, folder: Path) -> Any:
    """A task of mteb's own whose data lie here."""
    task = mteb.get_task(name)
    where = {"path": str(folder), "revision": "main"}
    task.metadata = task.metadata.model_copy(update={"dataset": where})
    return task


def scores(encoder: ElvaEncoder, task: Any) -> dict[str, float]:
    result = mteb.evaluate(
        encoder, task, cache=None, show_progress_bar=False, co2_tracker=False,
        encode_kwargs={"batch_size": 7},
    )  # fmt: skip
    (one,) = result.task_results[0].scores["test"]
    return one


@pytest.fixture(scope="module")
def retriever(tmp_path_factory: pytest.TempPathFactory) -> RetrieverEncoder:
    """Random weights of Qwen2-VL's structure, read after the prompt."""
    path = families.write(tmp_path_factory.mktemp("model") / "tiny", "qwen2_vl")
    return RetrieverEncoder.open(path, max_completion_length=0)


@pytest.mark.parametrize(
    ("task", "name", "query", "candidate"),
    [
        ("CIRRIT2IRetrieval", "mbeir_cirr_task7", "it", "i"),
        ("MSCOCOT2IRetrieval", "mbeir_mscoco_task0", "t", "i"),
        pytest.param(
            "MSCOCOI2TRetrieval", "mbeir_mscoco_task3", "i", "t", marks=pytest.mark.thorough
        ),
        pytest.param(
            "OVENIT2ITRetrieval", "mbeir_oven_task8", "it", "it", marks=pytest.mark.thorough
        ),
    ],
)
def test_figures_of_mteb_equal_those_of_elva_evaluate(
    task, name, query, candidate, retriever, tmp_path
):
    """nDCG, recall, MRR and hit rate, to mteb's five digits."""
    folder = mirror(tmp_path, name, query, candidate)
    encoder = ElvaEncoder(retriever, instructions=tmp_path / "query_instructions.tsv")
    found = scores(encoder, on_disk(task, folder))

    convert_file("mteb", folder, tmp_path / "data", split="test")
    asked = load(tmp_path / "data", split="test").queries[0]
    assert asked.instruction == f"{TOLD}." == encoder.instruction(on_disk(task, folder).metadata)
    embed(retriever, tmp_path / "data", tmp_path / "rows", dtype="float32")
    ours = evaluate_embeddings(tmp_path / "rows", tmp_path / "data", tmp_path / "out")
    (figures,) = ours["sets"].values()
    assert not ours["ties"] and 0 < figures["ndcg_at_10"] < 1
    for theirs, own in (
        ("ndcg_at_10", "ndcg_at_10"), ("recall_at_5", "recall_at_5"),
        ("recall_at_10", "recall_at_10"), ("mrr_at_1000", "mrr"),
        ("hit_rate_at_1", "hit_at_1"), ("hit_rate_at_10", "hit_at_10"),
    ):  # fmt: skip
        assert found[theirs] == pytest.approx(figures[own], abs=6e-6), theirs


class Recorder:
    """An encoder that keeps what it is given."""

    identity = Identity("/models/recorder", "1" * 64, "2" * 64)
    embedding_size = 3
    modalities = frozenset({"text", "image", "image,text"})
    instructions = "required"

    def __init__(self) -> None:
        self.about: dict[str, str] = {}
        self.items: list[Item] = []

    def check(self, item: Item) -> None: ...

    def __call__(self, items: Sequence[Item], progress: Any = None) -> Encoded:
        self.items += items
        rows = torch.randn(len(items), 3, generator=torch.Generator().manual_seed(len(self.items)))
        return Encoded(rows, [""] * len(items))


def loader(*batches: dict[str, Any]) -> Any:
    """What mteb hands over, of these batches."""
    rows = [
        {key: values[i] for key, values in batch.items()}
        for batch in batches
        for i in range(len(batch["id"]))
    ]
    size = len(batches[0]["id"])
    return DataLoader(
        rows, batch_size=size, collate_fn=lambda some: {k: [r[k] for r in some] for k in some[0]}
    )


def test_a_query_of_picture_and_text_is_one_item_with_the_instruction() -> None:
    """A candidate has none; words as M-BEIR joins them."""
    recorder, metadata = Recorder(), mteb.get_task("CIRRIT2IRetrieval").metadata
    encoder = ElvaEncoder(recorder)
    batch = {"id": ["8:1", "8:2"], "text": ["is red", " is blue."], "image": [noise(1), noise(2)]}
    rows = encoder.encode(loader(batch), task_metadata=metadata, prompt_type=PromptType.query)
    assert rows.shape == (2, 3) and rows.dtype == torch.float32
    first, second = recorder.items
    told = metadata.prompt["query"]
    assert [i.modality for i in recorder.items] == ["image,text"] * 2
    assert isinstance(first, Query) and first.prompted == f"{told} is red."
    assert (second.text, second.prompted) == ("Is blue.", f"{told}  is blue.")
    assert first.load_image().tobytes() == noise(1).tobytes()
    encoder.encode(loader(batch), task_metadata=metadata, prompt_type=PromptType.document)
    assert not any(isinstance(item, Query) for item in recorder.items[2:])
    assert [item.text for item in recorder.items[2:]] == ["Is red.", "Is blue."]


def test_an_empty_text_is_one(retriever: RetrieverEncoder) -> None:
    """mteb's collections hold some; the one picture without words beside them is no text."""
    metadata = mteb.get_task("MSCOCOT2IRetrieval").metadata
    batch = {"id": ["1", "2", "3"], "text": ["", "a cat", ""], "image": [None, None, noise(1)]}
    recorder = Recorder()
    for side in PromptType:
        ElvaEncoder(recorder).encode(loader(batch), task_metadata=metadata, prompt_type=side)
    assert [item.modality for item in recorder.items] == ["text", "text", "image"] * 2
    rows = ElvaEncoder(retriever).encode(
        loader(batch), task_metadata=metadata, prompt_type=PromptType.document
    )
    alone = retriever([Item("1", None, None, "text")]).embeddings[0]
    torch.testing.assert_close(rows[0], alone, rtol=0, atol=1e-5)
    assert (rows[0] - rows[1]).abs().max() > 1e-2


def test_whose_instruction_a_query_is_asked_with(tmp_path: Path) -> None:
    """The query's own, else `prompts`, else M-BEIR's of that set, else the task's."""
    mirror(tmp_path, "mbeir_cirr_task7", "it", "i")
    file = tmp_path / "query_instructions.tsv"
    cirr, other = (
        mteb.get_task(name).metadata for name in ("CIRRIT2IRetrieval", "FashionIQIT2IRetrieval")
    )
    by_file = ElvaEncoder(Recorder(), instructions=file)
    assert by_file.instruction(cirr) == f"{TOLD}."
    assert by_file.instruction(other) == other.prompt["query"]
    mine = ElvaEncoder(Recorder(), instructions=file, prompts={"CIRRIT2IRetrieval": "mine"})
    assert mine.instruction(cirr) == "Mine."
    assert ElvaEncoder(Recorder(), prompts={"query": "all"}).instruction(other) == "All."
    recorder = Recorder()
    batch = {"id": ["1"], "text": ["a cat own"], "query": ["a cat"], "instruction": ["own"]}
    ElvaEncoder(recorder).encode(
        loader(batch), task_metadata=cirr, prompt_type=PromptType.query, show_progress_bar=False
    )
    assert recorder.items[0].prompted == "Own. a cat."
    blind = Recorder()
    blind.instructions = "unread"
    assert ElvaEncoder(blind, prompts={"query": "all"}).instruction(cirr) == ""


def test_cosines_are_those_of_float64() -> None:
    encoder, draws = ElvaEncoder(Recorder()), torch.Generator().manual_seed(0)
    rows, others = (torch.randn(5000, 24, generator=draws) for _ in range(2))
    unit, unit_others = (x.double() / x.double().norm(dim=1, keepdim=True) for x in (rows, others))
    found = encoder.similarity(rows[:7].numpy(), others)
    assert found.shape == (7, 5000) and found.dtype == torch.float32
    assert (found - unit[:7] @ unit_others.T).abs().max() < 1e-6
    pairs = encoder.similarity_pairwise(rows, others)
    assert (pairs - (unit * unit_others).sum(1)).abs().max() < 1e-6
    assert encoder.similarity(rows[0], others[0]).shape == (1, 1)
    assert encoder.similarity_pairwise(rows[:0], others[:0]).shape == (0,)


def test_reranking_ranks_each_querys_own_candidates(retriever, tmp_path: Path) -> None:
    folder = mirror(tmp_path, "mbeir_mscoco_task0", "t", "i")
    task = on_disk("MSCOCOT2IRetrieval", folder)
    task.load_data()
    data = task.dataset["default"]["test"]
    how = {
        "task_metadata": task.metadata, "hf_split": "test", "hf_subset": "default",
        "encode_kwargs": {"batch_size": 8, "show_progress_bar": False}, "num_proc": None,
    }  # fmt: skip
    encoder = ElvaEncoder(retriever)
    encoder.index(data["corpus"], **how)
    whole = encoder.search(data["queries"], top_k=CANDIDATES, top_ranked=None, **how)
    own = {id: data["corpus"]["id"][i : i + 9] for i, id in enumerate(data["queries"]["id"])}
    encoder.index(data["corpus"], **how)
    found = encoder.search(data["queries"], top_k=4, top_ranked=own, **how)
    for id, among in own.items():
        best = sorted(among, key=lambda did: -whole[id][did])[:4]
        assert found[id] == {did: pytest.approx(whole[id][did], abs=1e-6) for did in best}


def test_what_mteb_asks_of_an_encoder_is_there() -> None:
    encoder = ElvaEncoder(Recorder())
    assert isinstance(encoder, EncoderProtocol) and isinstance(encoder, SearchProtocol)
    meta = encoder.mteb_model_meta
    assert meta.name == "elva/recorder" and meta.revision == f"{'1' * 16}-{'2' * 16}"
    assert meta.modalities == ["text", "image"] and meta.embed_dim == 3
    assert meta.use_instructions and meta.similarity_fn_name == "cosine"
    type(meta).model_validate(meta.model_dump())


def test_what_a_model_does_not_read_is_said_before_anything_is_embedded(tmp_path: Path) -> None:
    """CLIP reads texts and pictures, but no picture with a text."""
    encoder = ElvaEncoder(sentence_models.clip(tmp_path))
    metadata = mteb.get_task("CIRRIT2IRetrieval").metadata
    with pytest.raises(UserError, match="must read the query items of CIRRIT2IRetrieval, image "):
        encoder.index(None, task_metadata=metadata)
    batch = {"id": ["1"], "text": [None]}
    with pytest.raises(DataError, match="CIRRIT2IRetrieval: 1: has neither text nor picture"):
        encoder.encode(loader(batch), task_metadata=metadata)
    with pytest.raises(UserError, match="precision must be float32, got 'int8'"):
        encoder.encode(loader(batch), task_metadata=metadata, precision="int8")
