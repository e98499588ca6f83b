"""What `elva export` writes, as sentence-transformers loads it: the same embeddings."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from elva.commands.export import export
from elva.data import Item, Query
from elva.integrations.sentence_transformers import RetModule, load
from elva.model.encoder import RetrieverEncoder, open_encoder
from elva.model.scratch import create
from elva.recipe import ScratchModel
from elva.report.card import card
from tests.elva.sentence_models import noise

TEXTS = ["A red dog runs.", "Two people in the rain.", "A small house."]
PICTURES = [noise(seed, (40 + 10 * seed, 60)) for seed in range(3)]
ASKED = "Find the picture."


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that writes summaries of up to five tokens, exported."""
    path = tmp_path_factory.mktemp("export")
    spec = ScratchModel(hidden_size=32, intermediate_size=48, layers=2, heads=2, vocabulary=400)
    create(path / "made", spec, [*TEXTS, ASKED] * 9, summary_prompt="Summary:", seed=0)
    encoder = RetrieverEncoder.open(path / "made", max_completion_length=5)
    plain = encoder.retriever.plain
    drawn = torch.randn(plain.lm_head.weight.shape, generator=torch.manual_seed(1))
    plain.lm_head.weight = torch.nn.Parameter(drawn)  # its own: tied, it ends at once
    plain.config.tie_word_embeddings = False
    (path / "five").mkdir()
    encoder.save(path / "five")
    return export(path / "five", path / "out")


def items(kind: str, asks: bool) -> list[Item]:
    """Items as `elva embed` reads them from a data directory."""
    made = []
    for text, picture in zip(TEXTS, PICTURES, strict=True):
        given = ("", text if "text" in kind else None, picture if "image" in kind else None, kind)
        how = {"instruction": ASKED, "task": "t2i", "positives": (), "raw_text": given[1]}
        made.append(Query(*given, **how) if asks else Item(*given))
    return made


def inputs(kind: str) -> list:
    both = [{"image": p, "text": t} for p, t in zip(PICTURES, TEXTS, strict=True)]
    return {"text": TEXTS, "image": PICTURES, "image,text": both}[kind]


@pytest.mark.parametrize("kind", ["text", "image", "image,text"])
def test_the_library_encodes_what_elva_embeds(exported: Path, kind: str, tmp_path: Path) -> None:
    encoder = open_encoder(exported)
    assert isinstance(encoder, RetrieverEncoder) and encoder.max_completion_length == 5
    model = SentenceTransformer(str(exported), trust_remote_code=True, device="cpu")
    assert model.get_embedding_dimension() == 32 and model.supports(
        ("image", "text") if "," in kind else kind
    )
    model.save(str(tmp_path / "again"))
    others = (model, load(exported, device="cpu"), load(tmp_path / "again", device="cpu"))
    for asks in (True, False):
        truth = encoder(items(kind, asks))
        assert len({*truth.summaries}) > 1 and truth.embeddings.std(0).max() > 1e-2
        for one in others:
            encode = one.encode_query if asks else one.encode_document
            found = encode(
                inputs(kind), prompt=ASKED if asks else None, convert_to_tensor=True, batch_size=2
            )
            torch.testing.assert_close(found, truth.embeddings, rtol=0, atol=1e-5)
        seen = model[0].encoded(inputs(kind), ASKED if asks else None)
        assert seen.summaries == truth.summaries
    assert not [p for p in (tmp_path / "again").rglob("*") if p.suffix in (".bin", ".pt", ".pkl")]


def test_words_are_read_as_data_are(exported: Path) -> None:
    """A text is normalised as M-BEIR's readers do; one that looks like a path is a text."""
    model = load(exported, device="cpu")
    bare, read = model.encode_document(["a red dog runs", "A red dog runs."])
    assert (bare == read).all()
    path, other = model.encode_document(["cat.png", "dog.png"])
    assert (path != other).any()


def test_what_the_module_cannot_do_is_said(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        SentenceTransformer(str(exported))
    with pytest.raises(ValueError, match="RetModule: model_kwargs must be left out"):
        RetModule.load(str(exported), model_kwargs={"dtype": "float16"})
    model = load(exported, device="cpu")
    with pytest.raises(ValueError, match=r"must be without gradients.*by elva train"):
        MultipleNegativesRankingLoss(model)([model.preprocess(TEXTS)] * 2, None)
    with pytest.raises(ValueError, match="prompt must be a query's alone"):
        model.encode_document(TEXTS, prompt=ASKED)
    for wrong in ({"text": 3}, {"audio": "x"}, {}):
        with pytest.raises(ValueError, match="an input must be a text, a picture, or"):
            model[0].preprocess([wrong])
    with pytest.raises(ValueError, match=r"^RetModule: no such picture: nowhere\.png"):
        model.encode_document([{"image": "nowhere.png"}])
    with pytest.raises(ValueError, match="writes no pickles"):
        model.save(str(tmp_path / "pickled"), safe_serialization=False)
    with pytest.raises(ValueError, match="--read must be at_ret of a model that is saved"):
        RetrieverEncoder.open(exported, read="before_ret").save(tmp_path)
    note = exported / "elva.json"
    kept = note.read_text()
    try:
        note.write_text(json.dumps(json.loads(kept) | {"max_completion_length": "5"}))
        with pytest.raises(ValueError, match="must hold a number of tokens as max_completion_leng"):
            open_encoder(exported)
    finally:
        note.write_text(kept)


def python_of(text: str) -> str:
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return block


def test_the_card_is_valid_and_its_code_runs(
    exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (exported / "README.md").read_text("utf-8")
    data = ModelCard(text).data
    assert (data.library_name, data.pipeline_tag) == ("sentence-transformers", "feature-extraction")
    assert "elva" in data.tags and data.license is None and data.base_model is None
    assert "summary of at most 5 tokens" in text and "eprint={2606.20280}" in text
    monkeypatch.chdir(exported)
    exec(python_of(text), {})
    scores = re.findall(r"-?\d\.\d+", capsys.readouterr().out)
    assert len(scores) == 2 and scores[0] != scores[1]


def test_a_card_names_the_hubs_model_it_stands_on() -> None:
    text = card("one", "It reads.", base="Qwen/Qwen2-VL-2B-Instruct", run=None, stage=None)
    header = yaml.safe_load(text.split("---\n")[1])
    assert header["base_model"] == "Qwen/Qwen2-VL-2B-Instruct"
    assert text.count("\n# one\n") == 1 and "## Training" not in text


def test_a_runs_card_has_its_figures_beside_its_controls(finished: Path, tmp_path: Path) -> None:
    export(finished, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text("utf-8")
    stages = [p.name.replace("-", " ") for p in finished.glob("stage-*")]
    controls = [p.name.replace("-", " ", 1) for p in finished.glob("control-*")]
    last = max(stages)
    assert f"this model: {last} of recipe `" in text and "data `" in text
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    assert {*stages, *controls, "chance"} <= {*rows}
    figures = json.loads((finished / last.replace(" ", "-") / "evaluation.json").read_text())
    shown = f"{figures['figures']['t2i_recall_at_1']:.3f}"
    (row,) = (x for x in text.splitlines() if x.startswith(f"| {last} "))
    assert shown in row.replace("*", "")
    export(finished / "stage-1" / "model", tmp_path / "first")
    assert "this model: stage 1 of" in (tmp_path / "first" / "README.md").read_text("utf-8")
    kept = open_encoder(tmp_path / "out")
    assert kept.max_completion_length == RetrieverEncoder.open(finished).max_completion_length
