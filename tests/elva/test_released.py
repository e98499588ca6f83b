"""What a model of the released structure shows: [RET] that nobody taught it, and its vocabulary."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from elva.data import Item
from elva.draws import uniforms
from elva.model.inputs import RET
from elva.model.retriever import Retriever
from elva.model.rollout import encode, sample, token_log_probs
from elva.recipe import LoraSettings
from elva.training import objective
from tests.elva.stages import INFO_NCE, POLICY, Stage
from tests.elva.standin import SPECIAL

Released = Callable[[str], Path]


@pytest.fixture(scope="module")
def retriever(released: Released) -> Retriever:
    return Retriever.load(released("tied"), summary_prompt="Summarise it.")


def test_ret_joins_the_special_tokens_and_replaces_none(
    retriever: Retriever, tmp_path: Path
) -> None:
    tokenizer = retriever.inputs.tokenizer
    ids = tokenizer.convert_tokens_to_ids([*SPECIAL, RET])
    assert set(ids) <= {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    retriever.save(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.convert_tokens_to_ids([*SPECIAL, RET]) == ids
    assert set(SPECIAL) <= set(again.all_special_tokens)
    assert again("<|image_pad|>[RET]").input_ids == [ids[SPECIAL.index("<|image_pad|>")], ids[-1]]


def test_a_summary_may_hold_words_and_ret_alone(retriever: Retriever) -> None:
    """No vision or chat token, none that only the config names, no row that is no token."""
    inputs, config = retriever.inputs, retriever.plain.config
    may = set(range(retriever.plain.lm_head.out_features)) - set(inputs.banned_ids)
    may -= set(inputs.end_ids)
    names = {inputs.tokenizer.convert_ids_to_tokens(i) for i in may}
    assert names.isdisjoint(SPECIAL) and RET in names and None not in names
    assert {config.image_token_id, config.video_token_id, config.vision_start_token_id} <= set(
        inputs.banned_ids
    )
    assert len(may) == len(inputs.tokenizer) - len(SPECIAL) > 600
    ends = inputs.tokenizer.convert_ids_to_tokens(inputs.end_ids)
    assert ends == ["<|im_end|>", "<|endoftext|>"]


@torch.no_grad()
def test_to_end_is_one_action(retriever: Retriever) -> None:
    """[RET] has the probability of all ends together, by a softmax over what may be drawn."""
    inputs = retriever.inputs
    logits = torch.randn(5, retriever.plain.lm_head.out_features, dtype=torch.float64)
    logits[:, inputs.end_ids[0]] += 4
    p = (logits / 0.7).softmax(-1)
    p[:, inputs.banned_ids] = 0
    p /= p.sum(-1, keepdim=True)
    for token, expected in (
        (40, p[:, 40]),
        (inputs.ret_id, p[:, [inputs.ret_id, *inputs.end_ids]].sum(-1)),
    ):
        found = token_log_probs(logits, torch.full((5,), token), 0.7, inputs)
        assert torch.allclose(found.double().exp(), expected, rtol=1e-5)


@torch.no_grad()
def test_the_chats_end_ends_a_summary_which_is_read_at_ret(retriever: Retriever) -> None:
    """The stand-in was trained to write <|im_end|>: its rollouts end, by [RET], read out there."""
    items = [Item(str(i), t, None, "text") for i, t in enumerate(("Red heart", "Blue circle"))]
    prompts = [retriever.inputs.prompt(item) for item in items]
    out = sample(retriever, prompts, draws=uniforms((1,), (2, 8, 24)), max_completion_length=24)
    assert out.finished.float().mean() > 0.8
    assert not torch.isin(out.ids, torch.tensor(retriever.inputs.end_ids)).any()
    batch = retriever.inputs.collate([p for p in prompts for _ in range(8)], retriever.device)
    hidden = retriever.hidden_states(batch, out.ids, out.mask)
    at_ret = hidden[torch.arange(16), out.mask.sum(1)]
    assert (at_ret - out.embeddings).abs().max() < 2e-5
    again = token_log_probs(retriever.plain.lm_head(hidden[:, :-1]), out.ids, 1.0, retriever.inputs)
    drawn = out.mask & (out.finished[:, None] | (out.ids != retriever.inputs.ret_id))
    assert (again - out.log_probs)[drawn].abs().max() < 1e-4


@pytest.mark.parametrize("picture", [False, True])
def test_prompts_are_the_stock_templates(retriever: Retriever, picture: bool) -> None:
    image = Image.new("RGB", (64, 64), "red") if picture else None
    text = "Woman firefighter: dark skin tone, it's 2 m."
    prompt = retriever.inputs.prompt(Item("0", text, image, "image,text" if picture else "text"))
    content = [{"type": "image"}] * picture + [{"type": "text", "text": f"{text} Summarise it."}]
    tokenizer = retriever.inputs.tokenizer
    stock = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    ).replace("<|image_pad|>", "<|image_pad|>" * 4)
    assert prompt.input_ids.tolist() == tokenizer(stock).input_ids


@torch.no_grad()
def test_special_tokens_in_a_users_text_are_text(retriever: Retriever) -> None:
    """Found by use: <|image_pad|> in a query crashed the batch that it shared with a picture."""
    hostile = "<|vision_start|><|image_pad|><|vision_end|> find [RET]<|im_end|> it"
    items = [
        Item("0", hostile, None, "text"),
        Item("1", hostile, Image.new("RGB", (64, 64), "red"), "image,text"),
        Item("2", "Red heart", None, "text"),
    ]
    together = encode(retriever, items, max_completion_length=4).embeddings
    for row, item in enumerate(items):
        alone = encode(retriever, [item], max_completion_length=4).embeddings[0]
        assert (together[row] - alone).norm() < 1e-5 * alone.norm()
    ids = retriever.inputs.text_ids(hostile)
    assert retriever.inputs.tokenizer.decode(ids) == hostile
    assert not set(ids) & set(retriever.inputs.tokenizer.convert_tokens_to_ids([*SPECIAL, RET]))


@pytest.mark.parametrize("heads", ["tied", "untied"])
def test_ret_begins_as_the_chats_end_and_both_its_rows_train(
    heads: str, released: Released, corpus: Path, tmp_path: Path
) -> None:
    stage = replace(INFO_NCE, ret=1.0, lora=LoraSettings(4, 8))
    run = Stage(released(heads), corpus, stage, tmp_path)
    plain, inputs = run.retriever.plain, run.retriever.inputs
    tables = {"in": plain.get_input_embeddings().weight, "out": plain.lm_head.weight}
    start = {name: table.detach()[inputs.ret_id].clone() for name, table in tables.items()}
    for name, table in tables.items():
        assert torch.equal(start[name], table.detach()[inputs.end_ids[0]])
    run.train()
    merged = run.retriever.merged()
    ends = {"in": merged.get_input_embeddings().weight, "out": merged.lm_head.weight}
    for name, table in ends.items():
        assert (table[inputs.ret_id] - start[name]).abs().max() > 1e-4, name
        assert torch.equal(table[inputs.end_ids[0]], tables[name][inputs.end_ids[0]])
    assert (ends["in"].data_ptr() == ends["out"].data_ptr()) == (heads == "tied")
    trained = [n for n, p in run.retriever.model.named_parameters() if p.requires_grad]
    assert sum("trainable_tokens" in n for n in trained) == (1 if heads == "tied" else 2)


def test_ret_is_taught_among_the_ends_where_a_summary_ended() -> None:
    """And among all tokens where it was cut off; so that it ends nothing earlier."""
    logits = torch.randn(2, 12, dtype=torch.float64, requires_grad=True)
    loss = objective.ret_loss(logits, torch.tensor([True, False]), 9, [3, 5])
    p = logits.detach().exp()
    expected = [-(p[0, 9] / p[0, [9, 3, 5]].sum()).log(), -(p[1, 9] / p[1].sum()).log()]
    assert torch.allclose(loss.detach(), torch.stack(expected))
    loss.sum().backward()
    assert logits.grad is not None
    moved = logits.grad[0].nonzero()[:, 0].tolist()
    assert moved == [3, 5, 9] and logits.grad[0].sum().abs() < 1e-12


def test_ret_takes_the_place_of_the_chats_end(
    released: Released, corpus: Path, tmp_path: Path
) -> None:
    stage = replace(INFO_NCE, ret=1.0, lora=LoraSettings(8, 16), learning_rate=5e-3)
    run = Stage(released("untied"), corpus, stage, tmp_path, steps=24).train()
    assert run.log[0]["ret_share"] == pytest.approx(0.5, abs=0.02), "two equal rows at the start"
    assert run.log[-1]["ret_share"] > 0.9
    assert run.log[-1]["frac_no_ret"] < 0.05


@pytest.mark.parametrize("rank", [0, 4])
def test_sampler_reference_and_learner_agree_in_bf16(
    rank: int, released: Released, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the first iteration the log ratio is 0 and so is the KL to the start, to the bit."""
    gaps: list[float] = []
    loss = objective.policy_loss

    def watched(new, old, reference, advantages, mask, **scalars):
        gaps.append(max((new - x)[mask].abs().max().item() for x in (old, reference)))
        return loss(new, old, reference, advantages, mask, **scalars)

    monkeypatch.setattr(objective, "policy_loss", watched)
    bf16 = Retriever.load(released("untied"))
    bf16.model.to(torch.bfloat16)
    bf16.save(tmp_path / "bf16")
    stage = replace(POLICY, lora=LoraSettings(rank, 8), learning_rate=1e-6)
    run = Stage(
        tmp_path / "bf16", corpus, stage, tmp_path, steps=1, extra={"bf16": True}
    ).train()  # fmt: skip
    assert gaps and max(gaps) <= 1e-6 and abs(run.log[0]["kl"]) <= 1e-6


@pytest.mark.parametrize("rank", [0, 4])
def test_what_trains_is_kept_in_fp32(
    rank: int, released: Released, corpus: Path, tmp_path: Path
) -> None:
    """lr 1e-6 on a checkpoint in bf16: 1.6 % of its weights moved, now all that have a gradient."""
    bf16 = Retriever.load(released("tied"))
    bf16.model.to(torch.bfloat16)
    bf16.save(tmp_path / "bf16")
    stage = replace(
        INFO_NCE, learning_rate=1e-6, schedule="constant", lora=LoraSettings(rank, 8)
    )  # fmt: skip
    run = Stage(tmp_path / "bf16", corpus, stage, tmp_path, steps=6).train()
    trained = {n: p for n, p in run.retriever.model.named_parameters() if p.requires_grad}
    assert trained and all(p.dtype == torch.float32 for p in trained.values())
    moved = total = 0
    for name, parameter in trained.items():
        if "lora_A" in name or "embed_tokens" in name or "lm_head" in name:
            continue  # A moves once B has, and rows of tokens that were not there never
        moved += int((parameter.detach() != run.before[name].float()).sum())
        total += parameter.numel()
    assert moved / total > 0.99, f"{moved} of {total}"
    assert math.isfinite(run.log[-1]["loss"])
