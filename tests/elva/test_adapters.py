"""Adapters stay beside their model: nothing is rounded away, a stage goes on from the last."""

import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

from elva.cli import app
from elva.data import Item
from elva.errors import RunError, UserError
from elva.files import write_directory
from elva.model.adapters import LEARNER, REFERENCE
from elva.model.encoder import RetrieverEncoder
from elva.model.retriever import Retriever
from elva.model.rollout import encode
from elva.recipe import LoraSettings
from tests.elva import families

ITEMS = [Item("0", "a red dog", None, "text"), Item("1", "two people", None, "text")]
RANK_2 = LoraSettings(rank=2, alpha=4)


@pytest.fixture(scope="module", params=["tied", "untied"])
def checkpoint(request, tmp_path_factory):
    """Of bf16 weights, Qwen3-VL's where the head has rows of its own."""
    path = tmp_path_factory.mktemp("base") / "base"
    kind, tied = {"tied": ("qwen2_vl", True), "untied": ("qwen3_vl", False)}[request.param]
    families.write(path, kind, tied=tied)
    whole = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.bfloat16)
    assert (whole.lm_head.weight is whole.get_input_embeddings().weight) == tied
    whole.save_pretrained(path)
    return path


def embeddings(retriever):
    return encode(retriever, ITEMS, max_completion_length=2).embeddings


def teach(retriever, seed=0, size=0.05):
    """Move all that learns of the retriever, in place of a stage."""
    draw = torch.Generator().manual_seed(seed)
    retriever.train_in_fp32()
    for parameter in retriever.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=draw)
            parameter.data += size * noise.to(parameter)


def taught(checkpoint, directory, settings=RANK_2):
    retriever = Retriever.load(checkpoint, summary_prompt="say it")
    retriever.freeze_vision(True)
    retriever.add_lora(settings)
    teach(retriever)
    write_directory(directory, retriever.save)
    return retriever


def test_an_adapter_is_read_as_it_was_saved(checkpoint, tmp_path):
    trained = taught(checkpoint, tmp_path / "model")
    size = sum(p.stat().st_size for p in (tmp_path / "model").rglob("*.safetensors"))
    assert size < sum(p.stat().st_size for p in checkpoint.glob("*.safetensors")) / 4
    again = Retriever.load(tmp_path / "model")
    assert isinstance(again.model, PeftModel) and again.plain.dtype == torch.bfloat16
    own = {n: p for n, p in trained.model.named_parameters() if f".{LEARNER}" in n}
    read = dict(again.model.named_parameters())
    assert own and all(torch.equal(p, read[n]) and p.dtype == read[n].dtype for n, p in own.items())
    assert {p.dtype for p in own.values()} == {torch.float32}
    assert not any(p.requires_grad for n, p in read.items() if f".{LEARNER}" in n)
    assert torch.equal(embeddings(trained), embeddings(again))


@pytest.mark.parametrize(
    "settings", [RANK_2, pytest.param(LoraSettings(rank=4, alpha=4), marks=pytest.mark.thorough)]
)
def test_a_stage_goes_on_from_the_adapter_before_it(checkpoint, tmp_path, settings):
    """The learner begins as the last adapter, at a higher rank too; the reference stays it."""
    before = embeddings(taught(checkpoint, tmp_path / "model"))
    stage = Retriever.load(tmp_path / "model")
    stage.freeze_vision(True)
    stage.add_lora(settings)
    assert {*stage.model.peft_config} == {LEARNER, REFERENCE}
    began = embeddings(stage)
    torch.testing.assert_close(began, before, rtol=0, atol=0 if settings is RANK_2 else 0.05)
    names = {n for n, p in stage.named_parameters() if p.requires_grad}
    assert names and all(f".{LEARNER}" in n for n in names)
    teach(stage, seed=1)
    moved = embeddings(stage)
    assert not torch.allclose(moved, before, atol=0.05)
    with stage.reference() as reference:
        assert torch.equal(embeddings(reference), before)
    assert torch.equal(embeddings(stage), moved)
    assert {n for n, p in stage.named_parameters() if p.requires_grad} == names
    write_directory(tmp_path / "next", stage.save)
    assert torch.equal(embeddings(Retriever.load(tmp_path / "next")), moved)


def test_a_higher_rank_begins_with_the_same_product(tmp_path):
    """Of a model in fp32, to its rounding."""
    families.write(tmp_path / "base", "qwen2_vl")
    before = embeddings(taught(tmp_path / "base", tmp_path / "model"))
    stage = Retriever.load(tmp_path / "model")
    stage.add_lora(LoraSettings(rank=5, alpha=7))
    torch.testing.assert_close(embeddings(stage), before, rtol=1e-4, atol=1e-4)


def test_a_first_stage_has_the_base_as_its_reference(checkpoint, tmp_path):
    before = embeddings(Retriever.load(checkpoint, summary_prompt="say it"))
    stage = taught(checkpoint, tmp_path / "model")
    with stage.reference() as reference:
        assert torch.equal(embeddings(reference), before)
    assert not torch.equal(embeddings(stage), before)


def test_gradients_reach_the_learner_around_a_reading_of_the_reference(checkpoint, tmp_path):
    taught(checkpoint, tmp_path / "model")
    found = []
    for interrupted in (False, True):
        stage = Retriever.load(tmp_path / "model")
        stage.freeze_vision(True)
        stage.add_lora(RANK_2)
        batch = stage.inputs.collate([stage.inputs.prompt(i) for i in ITEMS], stage.device)
        ids = torch.full((2, 1), stage.inputs.ret_id)
        hidden = stage.hidden_states(batch, ids, torch.ones_like(ids, dtype=torch.bool))
        if interrupted:
            with torch.no_grad(), stage.reference() as reference:
                reference.hidden_states(batch, ids, torch.ones_like(ids, dtype=torch.bool))
        hidden[:, -1].float().pow(2).sum().backward()
        found.append({n: p.grad for n, p in stage.named_parameters() if p.requires_grad})
    assert all(torch.equal(g, found[1][n]) for n, g in found[0].items() if g is not None)
    assert sum(g is not None and bool(g.any()) for g in found[1].values()) > 10


def test_a_lower_rank_is_refused_in_one_line(checkpoint, tmp_path):
    taught(checkpoint, tmp_path / "model")
    stage = Retriever.load(tmp_path / "model")
    with pytest.raises(UserError, match=r"lora.rank must be 2 or more.*got 1; or start from"):
        stage.add_lora(LoraSettings(rank=1, alpha=4))


def test_rank_0_after_an_adapter_trains_all_of_it_in_fp32(checkpoint, tmp_path):
    taught(checkpoint, tmp_path / "model")
    stage = Retriever.load(tmp_path / "model")
    stage.add_lora(LoraSettings(rank=0))
    assert not isinstance(stage.model, PeftModel) and stage.plain.dtype == torch.float32


def test_an_export_is_an_ordinary_checkpoint_in_fp32(checkpoint, tmp_path):
    trained = taught(checkpoint, tmp_path / "model")
    whole = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)
    base = whole.model.language_model.layers[0].self_attn.q_proj.weight
    words = ["export", str(tmp_path / "model"), "--output", str(tmp_path / "whole")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole")
    weight = merged.model.language_model.layers[0].self_attn.q_proj.weight
    assert weight.dtype == torch.float32
    pair = {n.rpartition("lora_")[2][0]: p for n, p in trained.named_parameters()
            if "language_model.layers.0.self_attn.q_proj.lora_" in n}  # fmt: skip
    torch.testing.assert_close(weight, base + 2.0 * pair["B"] @ pair["A"], rtol=0, atol=1e-6)
    rows = [p for n, p in trained.named_parameters() if "trainable_tokens_delta.default" in n]
    heads = [merged.get_input_embeddings().weight, merged.lm_head.weight]
    for row, head in zip(rows, heads, strict=False):
        torch.testing.assert_close(head[trained.inputs.ret_id], row[0], rtol=0, atol=1e-6)
    assert merged.config.tie_word_embeddings == whole.config.tie_word_embeddings == (len(rows) == 1)
    assert Retriever.load(tmp_path / "whole").inputs.summary_prompt == "say it"
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 2 and "must not exist yet" in again.stderr


def test_an_embeddings_identity_is_of_the_base_and_the_adapter(tmp_path):
    families.write(tmp_path / "run" / "start", "qwen2_vl")
    model = tmp_path / "run" / "stage-1" / "model"
    taught(tmp_path / "run" / "start", model)
    first = RetrieverEncoder.open(model).identity
    assert first.revision != RetrieverEncoder.open(tmp_path / "run" / "start").identity.revision
    shutil.move(tmp_path / "run", tmp_path / "moved")  # base and adapter together
    moved = tmp_path / "moved" / "stage-1" / "model"
    assert RetrieverEncoder.open(moved).identity.revision == first.revision
    families.write(tmp_path / "moved" / "start", "qwen2_vl", seed=1)
    assert RetrieverEncoder.open(moved).identity.revision != first.revision
    shutil.rmtree(tmp_path / "moved" / "start")
    with pytest.raises(RunError, match=r"that its adapter stands on must be at .*start, got none"):
        Retriever.load(moved)


@pytest.mark.thorough
def test_a_merge_into_bf16_loses_what_an_adapter_keeps():
    """A hundred steps of one sign at 1e-6 on a square as wide as a 7B model."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(3584, 3584, bias=False).bfloat16())
    layer[0].weight.data.normal_(std=0.02)
    weight = layer[0].weight.detach().clone()
    model = get_peft_model(layer, LoraConfig(r=128, lora_alpha=256, target_modules=["0"]))
    pair = model.base_model.model[0]
    pair.lora_B[LEARNER].weight.data.copy_(1e-6 * 100 * torch.randn(3584, 128).sign())
    change = pair.get_delta_weight(LEARNER).detach()  # what the adapter keeps, in fp32
    factors = (pair.lora_B[LEARNER].weight.double(), pair.lora_A[LEARNER].weight.double())
    torch.testing.assert_close(change.double(), 2.0 * factors[0] @ factors[1], rtol=1e-4, atol=1e-9)
    merged = model.merge_and_unload()[0].weight
    lost = (merged.float() - weight.float() - change).norm() / change.norm()
    assert lost == pytest.approx(0.78, abs=0.02)
    assert (merged == weight).float().mean() == pytest.approx(0.76, abs=0.02)
