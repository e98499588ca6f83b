"""Models of sentence-transformers as encoders: whose rows they give, and what is refused."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Router, StaticEmbedding

from elva.errors import IndexFault, UserError
from elva.model import sentence_transformer
from elva.model.encoder import RetrieverEncoder, open_encoder
from elva.model.reading import ABOUT
from elva.model.sentence_transformer import SentenceTransformerEncoder
from elva.search import Searcher
from tests.elva import families, sentence_models, strangers
from tests.elva.sentence_models import PROMPTS, asked, equal, noise, own, shown

WORDS = ["cat", "a dog on a beach", "ice cream", "", "flag: Norway", "woman firefighter " * 9]
INSTRUCT = {"query": "Instruct: Find it.\nQuery:", "document": ""}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sentence_models.text(tmp_path_factory.mktemp("text"), prompts=PROMPTS)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sentence_models.clip(tmp_path_factory.mktemp("clip"))


def test_texts_are_embedded_as_its_own_library_does(text: Path) -> None:
    """With its prompts: one for what asks, one for what is found."""
    encoder = open_encoder(text, batch_size=4)
    words = WORDS * 3
    found = encoder([shown(f"1:{i}", word) for i, word in enumerate(words)])
    equal(found.embeddings, own(text).encode(words, prompt="tell: ", batch_size=4))
    assert found.summaries == [""] * len(words)
    queries = encoder([asked(word, "Left out.") for word in words]).embeddings
    equal(queries, own(text).encode(words, prompt="ask: ", batch_size=4))
    assert (queries - found.embeddings).abs().max() > 1e-3
    assert encoder.instructions == "unread" and encoder.modalities == {"text"}
    assert encoder.embedding_size == 32


def test_more_texts_than_are_sorted_at_once_keep_their_order(text: Path) -> None:
    encoder, told = open_encoder(text, batch_size=2), []
    words = [" ".join(["word"] * (i % 7)) + str(i) for i in range(150)]
    items = [shown(f"1:{i}", word) for i, word in enumerate(words)]
    mixed = [
        asked(w) if i % 3 == 0 else item
        for i, (w, item) in enumerate(zip(words, items, strict=True))
    ]
    found = encoder(mixed, told.append).embeddings
    model = own(text)
    for prompt, places in (("ask: ", range(0, 150, 3)), ("tell: ", range(1, 150, 3))):
        expected = model.encode([words[i] for i in places], prompt=prompt, batch_size=2)
        equal(found[list(places)], expected)
    assert told == sorted(told) and told[-1] == 150 and len(told) > 2


def test_an_instruction_has_the_place_that_a_models_prompt_leaves_for_it(tmp_path: Path) -> None:
    model = sentence_models.text(tmp_path, prompts=INSTRUCT, longest=48)
    encoder = open_encoder(model)
    assert encoder.instructions == "optional"
    found = encoder([asked("cat", "Find a picture."), asked("cat")]).embeddings
    for row, prompt in zip(
        found, ("Instruct: Find a picture.\nQuery:", INSTRUCT["query"]), strict=True
    ):
        equal(row[None], own(model).encode(["cat"], prompt=prompt))
    assert (found[0] - found[1]).abs().max() > 1e-3


@pytest.mark.parametrize("laid_out", [True, False], ids=["saved by it", "as CLIP is published"])
def test_pictures_and_texts_of_two_towers(tmp_path: Path, laid_out: bool) -> None:
    """What looks like an address or a path of a picture is a text."""
    model = sentence_models.clip(tmp_path, laid_out=laid_out)
    there = tmp_path / "there.png"
    noise(9).save(there)
    encoder = open_encoder(model, batch_size=2)
    assert encoder.modalities == {"text", "image"} and encoder.embedding_size == 24
    pictures = [noise(i, (20 + 9 * i, 33)) for i in range(5)]
    words = ["A cat.", "http://nowhere.invalid/a.png", str(there), "b", "c"]
    items = [
        i
        for w, p in zip(words, pictures, strict=True)
        for i in (shown("1:1", w), shown("1:2", None, p))
    ]
    found = encoder(items).embeddings
    equal(found[1::2], own(model).encode(pictures, batch_size=2))
    equal(found[::2], own(model).encode([{"text": word} for word in words], batch_size=2))
    both = shown("1:1", "A cat.", pictures[0])
    with pytest.raises(UserError, match="reads text and pictures alone: 1 of 3 items"):
        Searcher(encoder).embed([*items[:2], both])


CHANGES: dict[str, Callable[[Path], object]] = {
    "a weight": lambda m: _weight(m),
    "a prompt": lambda m: _change(m / ABOUT, prompts={**PROMPTS, "query": "Ask: "}),
    "the longest text": lambda m: _change(m / "tokenizer_config.json", model_max_length=23),
    "the pooling": lambda m: _change(m / "1_Pooling/config.json", pooling_mode="max"),
    "an activation": lambda m: _change(m / "config.json", hidden_act="relu"),
    "a part of the embedding": lambda m: _change(m / ABOUT, truncate_dim=16),
}


def _change(file: Path, **fields: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def _weight(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][7, 0] += 1e-3
    save_file(weights, model / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("change", CHANGES)
def test_another_model_is_refused(text: Path, tmp_path: Path, change: str) -> None:
    """By an index of the one before, wherever it lies now."""
    moved = tmp_path / "moved"
    shutil.copytree(text, moved)
    searcher = Searcher(text)
    searcher.embed([shown("1:1", "used before it is named")])
    index = searcher.index(tmp_path / "index", [shown("1:1", "cat"), shown("1:2", "dog")])
    assert len(Searcher(moved).search(index, "cat")) == 2
    CHANGES[change](moved)
    with pytest.raises(IndexFault, match="model"):
        Searcher(moved).search(index, "cat")


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "code": (
        lambda m: _modules(m, "custom_st.Transformer"),
        "modules.json names a class of its own code, custom_st.Transformer",
    ),
    "kind": (lambda m: _change(m / ABOUT, model_type="SparseEncoder"), "it is a SparseEncoder"),
    "similarity": (
        lambda m: _change(m / ABOUT, similarity_fn_name="euclidean"),
        "its similarity is euclidean",
    ),
    "pickle": (
        lambda m: (m / "model.safetensors").rename(m / "pytorch_model.bin"),
        "pytorch_model.bin is a pickle, and no safetensors lie beside it",
    ),
    "no weights": (
        lambda m: (m / "model.safetensors").unlink(),
        r"must hold its weights as \.safetensors, got none",
    ),
    "torn": (
        lambda m: (m / "model.safetensors").write_bytes(b"\0" * 99),
        "must be a model that sentence-transformers can read; ",
    ),
    "no list": (
        lambda m: (m / "modules.json").write_text('{"a": 1}'),
        "modules.json must hold a list",
    ),
    "adapter": (
        lambda m: (m / "adapter_config.json").write_text(
            json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(m), "r": 2})
        ),
        "it is an adapter; merge it into its base",
    ),
    "auto_map": (
        lambda m: _change(m / "config.json", model_type="own", auto_map={"AutoConfig": "a.B"}),
        "must be a model that sentence-transformers can read; ",
    ),
}


def _modules(model: Path, first: str) -> None:
    listed = json.loads((model / "modules.json").read_text())
    listed[0]["type"] = first
    (model / "modules.json").write_text(json.dumps(listed))


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_used_is_one_line(text: Path, tmp_path: Path, fault: str) -> None:
    model = tmp_path / "model"
    shutil.copytree(text, model)
    spoil, said = FAULTS[fault]
    spoil(model)
    with pytest.raises(UserError, match=said) as raised:
        open_encoder(model)
    assert "\n" not in str(raised.value) and "model" in str(raised.value)


def test_a_pickle_of_a_later_module_is_not_opened(tmp_path: Path) -> None:
    model = sentence_models.text(tmp_path, modules=[Dense(32, 8)])
    assert open_encoder(model)([shown("1:1", "cat")]).embeddings.shape == (1, 8)
    (model / "2_Dense/model.safetensors").rename(model / "2_Dense/pytorch_model.bin")
    with pytest.raises(UserError, match=r"2_Dense/pytorch_model\.bin is a pickle"):
        open_encoder(model)


def _without(model: Path, *names: str) -> None:
    weights = load_file(model / "model.safetensors")
    kept = {k: v for k, v in weights.items() if not any(name in k for name in names)}
    assert len(kept) < len(weights)
    save_file(kept, model / "model.safetensors", {"format": "pt"})


def test_weights_that_are_missing_are_not_drawn_at_random(text: Path, tmp_path: Path) -> None:
    """Unless no embedding depends on them, as on BERT's pooler."""
    model = tmp_path / "model"
    shutil.copytree(text, model)
    _without(model, "pooler")
    state = torch.get_rng_state()
    equal(open_encoder(model)([shown("1:1", "cat")]).embeddings, own(text).encode(["tell: cat"]))
    assert torch.equal(torch.get_rng_state(), state)
    _without(model, "layer.1.output.dense.weight")
    with pytest.raises(UserError, match="must have all of its weights"):
        open_encoder(model)


def test_a_router_embeds_what_asks_by_other_modules(text: Path, tmp_path: Path) -> None:
    """Whose weights are of the model's identity too."""
    words = StaticEmbedding(own(text).tokenizer, embedding_dim=32)
    routes = Router.for_query_document([words], [*own(text).children()])
    SentenceTransformer(modules=[routes], device="cpu").save(str(tmp_path / "model"))
    encoder = open_encoder(tmp_path / "model")
    found = encoder([asked("cat"), shown("1:1", "cat")]).embeddings
    equal(found[:1], own(tmp_path / "model").encode_query(["cat"]))
    equal(found[1:], own(text).encode(["cat"]))
    assert (found[0] - found[1]).abs().max() > 1e-3
    weights = load_file(tmp_path / "model/query_0_StaticEmbedding/model.safetensors")
    (name,) = weights
    weights[name][7] += 1e-3
    save_file(weights, tmp_path / "model/query_0_StaticEmbedding/model.safetensors")
    assert open_encoder(tmp_path / "model").identity.revision != encoder.identity.revision


def test_a_hub_name_of_what_was_fetched(text: Path, tmp_path: Path, monkeypatch) -> None:
    """Without a connection; its index is one of the snapshot's directory too."""
    cache = tmp_path / "models--a--b"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs/main").write_text("c0")
    shutil.copytree(text, cache / "snapshots/c0")
    (cache / "snapshots/c0/.gitattributes").touch()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    named, lies = open_encoder("a/b"), open_encoder(text)
    assert named.about == {"model": "a/b"} and named.identity.name == "a/b"
    assert named.identity.matches(lies.identity)
    assert torch.equal(*(e([shown("1:1", "cat")]).embeddings for e in (named, lies)))


def test_without_the_extra_it_is_named(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentence_transformer, "version", lambda name: "5.1.0")
    with pytest.raises(UserError, match=r"must be 6 or later, got 5\.1\.0; pip install"):
        open_encoder(text)
    monkeypatch.setattr(sentence_transformer, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"not installed; pip install 'elva\[sentence-transformers"):
        open_encoder(text)


@pytest.mark.parametrize(
    "option", [{"stage": "2"}, {"max_completion_length": 3}, {"read": "before_ret"}]
)
def test_an_option_that_does_nothing_is_refused(text: Path, option: dict) -> None:
    name = "--" + next(iter(option)).replace("_", "-")
    with pytest.raises(UserError, match=f"{name} must be left out"):
        open_encoder(text, **option)


def test_which_library_reads_a_model(text: Path, clip: Path, tmp_path: Path) -> None:
    """A Qwen-VL in sentence-transformers' layout is ELVA's to read."""
    qwen = strangers.sentence_transformer(tmp_path / "qwen", "qwen2_vl")
    plain = families.write(tmp_path / "plain", "qwen2_vl")
    assert [sentence_transformer.owns(m) for m in (text, clip, qwen, plain)] == [1, 1, 0, 0]
    assert isinstance(open_encoder(qwen), RetrieverEncoder)
    assert not sentence_transformer.owns(tmp_path / "absent")
    for nothing in ("absent", tmp_path):
        with pytest.raises(UserError, match="must be a run, a checkpoint or a hub name"):
            open_encoder(nothing)


@pytest.mark.parametrize("family", ["idefics3", "llava"])
def test_a_chat_model_has_the_instruction_as_its_system_message(tmp_path: Path, family) -> None:
    """Texts, pictures and both, of a family in sentence-transformers' layout that is not Qwen's."""
    encoder = open_encoder(strangers.sentence_transformer(tmp_path / "model", family))
    assert isinstance(encoder, SentenceTransformerEncoder)
    assert encoder.instructions == "optional"
    picture = noise(1, (56, 56))
    items = [shown("1:1", "A cat."), shown("1:2", None, picture), shown("1:3", "A cat.", picture)]
    found = encoder([*items, asked("A cat.", "Find a picture.")]).embeddings
    model = own(tmp_path / "model")
    given = ["A cat.", picture, {"image": picture, "text": "A cat."}]
    for row, one in zip(found, given, strict=False):
        equal(row[None], model.encode([one], prompt=strangers.DOCUMENT))
    equal(found[3:], model.encode(["A cat."], prompt="Find a picture."))


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "idefics3"])
def test_a_cache_has_its_new_name(tmp_path: Path, family: str) -> None:
    """Where transformers has renamed it, no warning of the old one."""
    model = families.write(tmp_path / "model", family)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*past_key_values.*")
        encoder = open_encoder(model, max_completion_length=3)
        assert encoder([shown("1:1", "A cat.")]).embeddings.isfinite().all()
