"""Somebody else's retriever: embedded as its own code does, trained, and still what it was."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

from elva.cli import app
from elva.commands.export import export
from elva.data import Item, Query
from elva.errors import UserError
from elva.files import write_directory
from elva.model.encoder import RetrieverEncoder
from elva.model.inputs import RET
from elva.model.note import reading_of
from elva.model.reading import Reading, find
from elva.model.retriever import Retriever
from elva.model.rollout import encode, sample, token_log_probs
from elva.recipe import LoraSettings, NegativeConfig, StageConfig
from elva.training import ranking
from tests.elva import families, strangers
from tests.elva.stages import Stage


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    drawn = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(drawn).resize(size)


ITEMS = [
    Item("0", "a red dog runs", None, "text"),
    Item("1", None, picture(0, (300, 120)), "image"),
    Item("2", "two people in the rain, and nobody knows why they run", None, "text"),
    Item("3", "a dog", picture(1, (70, 200)), "image,text"),
    Query("4", "what is shown", None, "text", "", "t2i", ()),
    Query("5", "who runs", picture(2, (64, 64)), "image,text", "Find the runner", "it2i", ()),
]
LEGACY_MEAN = {"word_embedding_dimension": 64, "pooling_mode_cls_token": False,
               "pooling_mode_mean_tokens": True, "pooling_mode_lasttoken": False}  # fmt: skip


def ours(retriever: Retriever, items=ITEMS, length: int = 0) -> torch.Tensor:
    return encode(retriever, items, max_completion_length=length, batch_size=6).embeddings


def opened(path: Path) -> Retriever:
    retriever = Retriever.load(path)
    retriever.model.double()
    return retriever


@pytest.mark.parametrize(
    ("family", "suffix", "pooling", "normalize"),
    [
        ("qwen2_vl", None, "last", False),
        ("qwen2_vl", "<|endoftext|>", "mean", True),
        ("qwen3_vl", "<|endoftext|>", "last", True),
        ("qwen3_vl", None, "mean", False),
    ],
)
def test_an_embedding_is_its_own_codes(tmp_path, family, suffix, pooling, normalize):
    """To 1e-9 in fp64: texts, pictures and both in one batch padded on the left; nothing is added
    to the vocabulary."""
    path = strangers.sentence_transformer(
        tmp_path / "retriever", family, suffix=suffix, normalize=normalize,
        pooling=LEGACY_MEAN if pooling == "mean" else None,
    )  # fmt: skip
    retriever = opened(path)
    expected = strangers.embed(path, ITEMS, pooling=pooling, normalize=normalize)
    found = ours(retriever)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    assert (expected[0] - expected[2]).abs().max() > 1e-3
    assert RET not in retriever.inputs.tokenizer.get_vocab()
    assert len(retriever.inputs.ending) == (suffix is not None)


@pytest.mark.parametrize("tied", [True, False])
def test_qwen3_vl_embeddings_layout(tmp_path, tied):
    """Its class without a head, its default instruction, full stop, bounds of a picture, last
    token: to 1e-9."""
    path = strangers.qwen3_vl_embedding(tmp_path / "published", tied=tied)
    retriever = opened(path)
    said = "Represent the user's input."
    size = {"shortest_edge": 4096, "longest_edge": 1843200}
    items = [*ITEMS[:5], replace(ITEMS[5], instruction="Find the runner.")]
    expected = strangers.embed(path, items, query=said, document=said, size=size)
    torch.testing.assert_close(ours(retriever), expected, rtol=0, atol=1e-9)
    assert retriever.writes == tied  # an untied one was published without what writes
    if not tied:
        with pytest.raises(UserError, match="has no head"):
            RetrieverEncoder.open(path, max_completion_length=4)
    retriever.model.float()
    before = ours(retriever)
    retriever.save(tmp_path / "saved")
    keys = [set(weights_of(p)) for p in (path, tmp_path / "saved")]
    assert keys[0] == keys[1] and "lm_head.weight" not in keys[1]
    again = Retriever.load(tmp_path / "saved")
    assert again.writes == tied and again.reading == retriever.reading
    assert torch.equal(ours(again), before)
    config = json.loads((tmp_path / "saved/config.json").read_text())
    assert config["architectures"] == ["Qwen3VLForEmbedding"]


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"modules": ("models.Dense",)}, "a module Dense"),
        ({"modules": ("custom_st.Attention",)}, "a module Attention"),
        ({"pooling": {"pooling_mode": "cls"}}, "pooling mode cls"),
        ({"pooling": {"pooling_mode": ["mean", "max"]}}, "pooling mode mean and max"),
        ({"pooling": {"pooling_mode_weightedmean_tokens": True}}, "pooling mode weightedmean"),
        ({"about": {"similarity_fn_name": "euclidean"}}, "similarity euclidean"),
        ({"about": {"truncate_dim": 32}}, "truncate_dim"),
        ({"reads": {"modality_config": None}}, "reads no chat"),
        ({"reads": {"processing_kwargs": {"image": {"size": 3}}}}, "processing_kwargs of image"),
        ({"reads": {"query_expansion": {"length": 3}}}, "query_expansion"),
        ({"reads": {"max_seq_length": 512}}, "max_seq_length 512"),
        ({"pooling": {"pooling_mode": "mean", "include_prompt": False}}, "include_prompt false"),
    ],
)  # fmt: skip
def test_what_cannot_be_kept_is_named(tmp_path, change, named):
    for name in ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"):
        strangers.put(tmp_path / name, {})
    types = ["a.Transformer", "a.Pooling", *change.get("modules", ())]
    listed = [{"type": kind, "path": f"{i}_X" * bool(i)} for i, kind in enumerate(types)]
    strangers.put(tmp_path / "modules.json", listed)
    strangers.put(tmp_path / "1_X/config.json", change.get("pooling", {"pooling_mode": "mean"}))
    strangers.put(tmp_path / "config_sentence_transformers.json", change.get("about", {}))
    reads = {k: v for k, v in (strangers.READS | change.get("reads", {})).items() if v is not None}
    strangers.put(tmp_path / "sentence_bert_config.json", reads)
    with pytest.raises(UserError, match=named) as said:
        reading_of(tmp_path)
    assert "\n" not in str(said.value)


@pytest.mark.parametrize(
    ("name", "written", "rule"),
    [
        ("modules.json", [{"path": ""}], "hold objects with a type and a path"),
        ("modules.json", [{"type": "a.Transformer", "path": "../b"}], "folders inside"),
        ("modules.json", {"a": 1}, "hold a list"),
        ("modules.json", ["x"], "hold objects with a type and a path"),
        ("modules.json", 3, "hold a list"),
        ("modules.json", None, "hold a list"),
        ("1_Pooling/config.json", {"pooling_mode": 3}, "as pooling_mode"),
        ("1_Pooling/config.json", [], "hold an object"),
        ("config_sentence_transformers.json", {"prompts": ["a"]}, "hold an object as prompts"),
        ("config_sentence_transformers.json", {"prompts": {"query": 1}}, "hold strings as prompts"),
        ("sentence_bert_config.json", {"modality_config": 3}, "hold an object as modality_config"),
    ],
)  # fmt: skip
def test_a_file_of_another_form_is_named(tmp_path, name, written, rule):
    modules = [("", "a.Transformer"), ("1_Pooling", "a.Pooling")]
    strangers.put(tmp_path / "modules.json", [{"type": t, "path": p} for p, t in modules])
    strangers.put(tmp_path / "1_Pooling/config.json", {"pooling_mode": "mean"})
    reads = strangers.READS | {"max_seq_length": 8192}  # cuts no prompt that is expected
    strangers.put(tmp_path / "sentence_bert_config.json", reads)
    assert reading_of(tmp_path).pooling == "mean"
    strangers.put(tmp_path / name, written)
    with pytest.raises(UserError) as said:
        reading_of(tmp_path)
    assert f"{tmp_path / name} must" in str(said.value) and rule in str(said.value)


@pytest.mark.parametrize("known", [(), ("modules.json",), ("whole",), None])
def test_whether_a_hub_has_a_file_is_known_or_asked_for(tmp_path, monkeypatch, known):
    """Without a connection: of a cache, its notes of what does not exist say so, or that all that
    there is was fetched."""
    cache = tmp_path / "models--a--b"
    strangers.put(cache / "snapshots/c0/config.json", {})
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text("c0")
    if known == ("modules.json",):
        strangers.put(cache / ".no_exist/c0/modules.json", {})
    elif known == ("whole",):
        strangers.put(cache / "snapshots/c0/.gitattributes", {})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert find("a/b", "config.json") == cache / "snapshots/c0/config.json"
    if known:
        assert find("a/b", "modules.json") is None
    elif known is None:  # the snapshot itself
        assert find(cache / "snapshots/c0", "modules.json") is None
    else:
        with pytest.raises(UserError, match=r"a/b must be at hand .* modules.json; fetch it"):
            find("a/b", "modules.json")


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize(
    "ends_with",
    ["<|endoftext|>",
     *(pytest.param(x, marks=pytest.mark.thorough) for x in ("<|vision_end|> so", None))],
)  # fmt: skip
def test_a_sampled_summary_is_closed_and_pooled(tmp_path, pooling, ends_with):
    """An embedding out of the cache is that of the whole row read at once, by ours and by the
    model's own forward; what closes a row is no action of it."""
    path = families.write(tmp_path / "model", "qwen3_vl", tied=True)
    reading = Reading(pooling, normalize=True, system=True, query_instruction=strangers.QUERY,
                      item_instruction=strangers.DOCUMENT, ends_with=ends_with)  # fmt: skip
    retriever = Retriever.load(path, reading=reading)
    retriever.model.double()
    inputs = retriever.inputs
    with torch.no_grad():  # rows end, at several steps
        retriever.plain.lm_head.weight[inputs.end_ids] *= 3
    prompts = [inputs.prompt(item) for item in ITEMS]
    draws = torch.rand(len(ITEMS), 3, 6, dtype=torch.float64,
                       generator=torch.Generator().manual_seed(0))  # fmt: skip
    out = sample(retriever, prompts, draws=draws, max_completion_length=6)
    assert 0 < out.finished.sum() < len(out.finished)
    batch = inputs.collate(prompts, retriever.device)
    _, again = retriever.read_out(batch, out.ids, out.mask)
    torch.testing.assert_close(out.embeddings, again, rtol=0, atol=1e-9)
    logits = retriever.plain.lm_head(retriever.hidden_states(batch, out.ids, out.mask)[:, :-1])
    drawn = token_log_probs(logits, out.ids, 1.0, inputs)[out.chosen]
    torch.testing.assert_close(out.log_probs[out.chosen], drawn, rtol=0, atol=1e-9)
    closing = inputs.closing
    assert len(closing) > 1 and closing[0] in inputs.end_ids
    assert inputs.ending == ([] if ends_with is None else closing[1:])
    for row in range(0, len(out.ids), 4):
        written = out.ids[row, out.mask[row]].tolist()
        assert written[-len(closing) :] == closing
        assert out.chosen[row].sum() == out.finished[row] * (len(written) - len(closing) + 1)
        expected = strangers.embed(
            path, [ITEMS[row // 3]], pooling=pooling, model=retriever.plain, written=written
        )
        torch.testing.assert_close(out.embeddings[row : row + 1], expected, rtol=0, atol=1e-9)


def test_a_prompt_may_be_closed_by_nothing(tmp_path):
    """By its reading, its tokenizer and its chat template: then an end alone closes a summary."""
    path = families.write(tmp_path / "model", "qwen3_vl", tied=True)
    reading = Reading("last", generation_prompt=False)

    def opened_with(ends: bool) -> Retriever:
        retriever = Retriever.load(path, reading=reading)
        inputs = retriever.inputs
        inputs._frame = lambda *_: [inputs.text_ids("asked: "), []]
        inputs.end_ids = inputs.end_ids if ends else []
        return retriever

    for ends in (True, False):
        retriever = opened_with(ends)
        inputs = retriever.inputs
        prompts = [inputs.prompt(item) for item in ITEMS[::2]]
        batch = inputs.collate(prompts, retriever.device)
        ids = torch.zeros(len(prompts), 0, dtype=torch.long)
        _, expected = retriever.read_out(batch, ids, ids.bool())
        found = ours(retriever, ITEMS[::2])
        torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-5)
        assert inputs.ending == [] and inputs.filler not in inputs.banned_ids
    with pytest.raises(UserError, match="must have a token that ends an answer"):
        ours(retriever, ITEMS[::2], length=3)
    retriever = opened_with(True)
    assert retriever.inputs.closing == retriever.inputs.end_ids[:1]
    out = sample(retriever, prompts, draws=None, max_completion_length=3)
    last = out.ids[torch.arange(len(prompts)), out.mask.sum(1) - 1]
    assert last.tolist() == [retriever.inputs.end_ids[0]] * len(prompts)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return strangers.pictures_and_names(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    return strangers.sentence_transformer(
        tmp_path_factory.mktemp("stranger") / "model", "qwen3_vl", suffix="<|endoftext|>"
    )


PATHWISE = StageConfig(
    pathwise=1.0, tasks={"t2i": 1.0}, batch_size=3, max_completion_length=0, learning_rate=1e-3,
    negatives=NegativeConfig(given=0, random=3, in_batch=True), rollout_candidates="all",
    micro_batch_size=4,
)  # fmt: skip
POLICY = replace(PATHWISE, pathwise=0.0, policy=1.0, num_generations=3, max_completion_length=5,
                 temperature=2.0, beta=0.1)  # fmt: skip


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_pathwise_differentiates_the_retrievers_own_embedding(tmp_path, data, pooling):
    """Every weight's gradient is that of plain autograd through its own forward, to 1e-9."""
    path = strangers.sentence_transformer(
        tmp_path / "model", "qwen3_vl", suffix="<|endoftext|>" if pooling == "last" else None,
        pooling=LEGACY_MEAN if pooling == "mean" else None,
    )  # fmt: skip
    stage = Stage(path, data, PATHWISE, tmp_path, dtype=torch.float64, summary_prompt="")
    retriever = stage.retriever
    metrics = stage.work.step(0, Accelerator(cpu=True), retriever)
    assert "frac_no_ret" not in metrics
    found = {n: p.grad.clone() for n, p in retriever.named_parameters() if p.grad is not None}
    retriever.zero_grad()
    rolled = stage.work.last
    candidates = stage.work.examples.candidates
    shown = [candidates[int(i)] for i in rolled.asked.comparison.candidates]
    rows = strangers.embed(
        path, [*rolled.asked.comparison.queries, *shown], pooling=pooling, model=retriever.plain
    )
    rewards, _ = ranking.reward(PATHWISE, rolled.asked.comparison, rolled.embedded(rows))
    assert rewards.query.mean().item() == pytest.approx(metrics["reward"], abs=1e-12)
    (-rewards.query.mean()).backward()
    expected = {n: p.grad for n, p in retriever.named_parameters()
                if p.grad is not None and p.requires_grad}  # fmt: skip
    assert max(g.abs().max() for g in expected.values()) > 1e-4
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-9, msg=name)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("stage", "rank"),
    [
        pytest.param(PATHWISE, 0, marks=pytest.mark.thorough),
        pytest.param(PATHWISE, 2, marks=pytest.mark.thorough),
        (replace(POLICY, infonce=0.1), 2),
    ],
)
def test_a_boosted_retriever_is_still_what_it_was(tmp_path, data, stranger, stage, rank):
    """Steps move its weights; it opens again with the same reading and equal embeddings, and its
    export has its own files, unchanged, beside weights of the same names."""
    stage = replace(stage, lora=LoraSettings(rank=rank))
    trained = Stage(stranger, data, stage, tmp_path, steps=2, summary_prompt="").train()
    assert trained.moved > 1e-5
    retriever = trained.retriever
    retriever.plain.eval()
    length = stage.max_completion_length
    after = ours(retriever, length=length)
    assert (after - ours(Retriever.load(stranger), length=length)).abs().max() > 1e-4
    write_directory(tmp_path / "saved", retriever.save)
    again = Retriever.load(tmp_path / "saved")
    assert again.reading == retriever.reading and reading_of(stranger) == again.reading
    assert torch.equal(ours(again, length=length), after)
    assert (tmp_path / "saved/adapter").is_dir() == bool(rank)
    export(tmp_path / "saved", tmp_path / "export")
    for name in retriever.inputs.layout:
        assert (tmp_path / "export" / name).read_bytes() == (stranger / name).read_bytes(), name
    own = {"modules.json", "1_Pooling/config.json", "2_Normalize/config.json"}
    assert own | {"generation_config.json"} <= {*retriever.inputs.layout}
    assert weights_of(tmp_path / "export").keys() == weights_of(stranger).keys()
    classes = [json.loads((p / "config.json").read_text())["architectures"]
               for p in (stranger, tmp_path / "export")]  # fmt: skip
    assert classes[0] == classes[1]
    expected = strangers.embed(tmp_path / "export", ITEMS, dtype=torch.float32)
    torch.testing.assert_close(
        ours(Retriever.load(tmp_path / "export")), expected, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["qkv", "gate_proj"]])
def test_somebody_elses_adapter_is_opened_and_boosted(tmp_path, stranger, data, targets):
    """At a checkpoint's top, on a base elsewhere: as peft computes it; a stage's adapter goes on
    from it, on its own layers."""
    plain = AutoModelForImageTextToText.from_pretrained(stranger)
    config = LoraConfig(r=2, lora_alpha=3, lora_dropout=0.1, target_modules=targets,
                        base_model_name_or_path=str(stranger))  # fmt: skip
    theirs = get_peft_model(plain, config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    theirs.save_pretrained(tmp_path / "adapter-of-theirs")
    expected = strangers.embed(
        stranger, ITEMS, model=theirs.get_base_model(), dtype=torch.float32
    ).detach()
    assert (expected - ours(Retriever.load(stranger))).abs().max() > 1e-3
    found = Retriever.load(tmp_path / "adapter-of-theirs")
    torch.testing.assert_close(ours(found), expected, rtol=0, atol=1e-5)
    assert found.reading == reading_of(stranger)
    stage = replace(PATHWISE, lora=LoraSettings(rank=2, alpha=3))
    trained = Stage(tmp_path / "adapter-of-theirs", data, stage, tmp_path, summary_prompt="")
    torch.testing.assert_close(ours(trained.retriever), expected, rtol=0, atol=1e-5)
    trained.train()
    assert trained.moved > 1e-5
    write_directory(tmp_path / "saved", trained.retriever.save)
    trained.retriever.plain.eval()
    assert torch.equal(ours(Retriever.load(tmp_path / "saved")), ours(trained.retriever))


def test_an_adapter_that_cannot_go_on_is_named(tmp_path, stranger):
    plain = AutoModelForImageTextToText.from_pretrained(stranger)
    config = LoraConfig(r=2, use_dora=True, target_modules=["q_proj"],
                        base_model_name_or_path=str(stranger))  # fmt: skip
    get_peft_model(plain, config).save_pretrained(tmp_path / "dora")
    retriever = Retriever.load(tmp_path / "dora")
    with pytest.raises(UserError, match="must be 0 for an adapter with use_dora"):
        retriever.add_lora(LoraSettings(rank=2))


def test_identities_tell_readings_apart(stranger):
    opened_ = RetrieverEncoder.open(stranger)
    assert opened_.max_completion_length == 0
    other = RetrieverEncoder.open(stranger)
    other.retriever.inputs.reading = replace(other.retriever.reading, item_instruction="Else.")
    assert not opened_.identity.matches(other.identity)
    with pytest.raises(UserError, match="--read must be at_ret"):
        RetrieverEncoder.open(stranger, read="before_ret")


DAMAGES = {
    "modules.json must hold a list": lambda m: strangers.put(m / "modules.json", {"a": 1}),
    "1_Pooling/config.json must": lambda m: strangers.put(m / "1_Pooling/config.json", []),
    "without preprocessor_config.json": lambda m: (m / "preprocessor_config.json").unlink(),
    "without tokenizer.json": lambda m: [p.unlink() for p in m.glob("tokenizer*")],
    "whose chat template": lambda m: (m / "chat_template.jinja").unlink(),
    "elva.json: must hold a JSON object": lambda m: (m / "elva.json").write_text("{"),
    "elva.json: must hold a reading": lambda m: strangers.put(
        m / "elva.json", {"reading": {"pooling": "last", "later": 1}}
    ),
    "elva.json: must hold the base": lambda m: (
        strangers.put(m / "elva.json", {"base": {}}), strangers.put(m / "adapter_config.json", {})
    ),
}  # fmt: skip


@pytest.mark.parametrize("said", DAMAGES)
def test_a_damaged_retriever_is_one_line_of_every_command(tmp_path, data, stranger, said):
    model = shutil.copytree(stranger, tmp_path / "model")
    DAMAGES[said](model)
    train = ("train", "--recipe", "booster", "--model", model, "--data", data)
    for words in (
        (*train, "--output", tmp_path / "run"),
        (*train, "--dry-run"),
        ("embed", model, "--data", data, "--output", tmp_path / "embeddings"),
    ):
        done = CliRunner().invoke(app, [str(word) for word in words])
        assert done.exit_code == 2, (words, done.output, done.exception)
        assert said in done.stderr and str(model) in done.stderr
        assert "Error:" not in done.stderr and done.stderr.strip().count("\n") == 0
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("how", [(), ("--dry-run",)])
def test_a_retriever_without_a_head_writes_no_summary(tmp_path, data, how):
    model = strangers.qwen3_vl_embedding(tmp_path / "model", tied=False)
    if how:  # in shards
        names = dict.fromkeys(weights_of(model), "model-1.safetensors")
        (model / "model.safetensors").rename(model / "model-1.safetensors")
        strangers.put(model / "model.safetensors.index.json", {"metadata": {}, "weight_map": names})
    words = ("train", "--recipe", "booster", "--model", model, "--data", data, *how,
             "--set", "stages.3.policy=1", "--set", "stages.3.max_completion_length=5",
             "--set", "stages.3.num_generations=2",
             *(() if how else ("--output", tmp_path / "run")))  # fmt: skip
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 2, (done.output, done.exception)
    assert "stages.3.max_completion_length must be 0 for" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.thorough
def test_the_commands_boost_and_keep_a_retriever(tmp_path, data, stranger, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def elva(*words: object) -> str:
        done = CliRunner().invoke(app, [str(word) for word in words])
        assert done.exit_code == 0, done.output
        return done.output

    recipe = ("train", "--recipe", "booster", "--model", stranger, "--data", data)
    short = ("steps=2", "negatives={mined: 3, random: 3}", "share=1", "learning_rate=1e-3",
             "lora.rank=2")  # fmt: skip
    elva(*recipe, *(w for s in short for w in ("--set", f"stages.3.{s}")), "--output", "run")
    evaluated = json.loads((tmp_path / "run/stage-3/evaluation.json").read_text())["figures"]
    assert not [name for name in evaluated if name.endswith("frac_no_ret")]
    elva("embed", "run", "--data", data, "--dtype", "float32", "--output", "embeddings")
    found = json.loads(elva("evaluate", "--embeddings", "embeddings", "--data", data, "--json"))
    assert found["sets"]["x_task0"]["recall_at_1"] == evaluated["t2i_recall_at_1"]
    elva("export", "run", "--output", "boosted")
    items = ITEMS[:3]
    torch.testing.assert_close(
        RetrieverEncoder.open("run")(items).embeddings,
        strangers.embed(tmp_path / "boosted", items, dtype=torch.float32).detach(),
        rtol=0, atol=1e-5,
    )  # fmt: skip
    for change, said in (
        ({"--recipe": "elva-2b"}, "model.summary_prompt must be empty for a retriever"),
        ({"--set": "stages.3.ret=1"}, "stages.3.ret must be left out for a retriever"),
        ({"--set": "stages.3.policy=1"}, "max_completion_length must be at least 1"),
    ):
        words = [*recipe, *(w for pair in change.items() for w in pair)]
        stages = ("--stages", "1") if "--recipe" in change else ()
        done = CliRunner().invoke(app, [str(w) for w in (*words, *stages, "--output", "other")])
        assert done.exit_code == 2 and said in " ".join(done.output.split()), done.output
    assert not (tmp_path / "other").exists()
