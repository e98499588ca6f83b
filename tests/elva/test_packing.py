"""Prompts that are read once for several completions, against the plain forward, in float64."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRMSNorm

from elva.data import load
from elva.model import retriever as retriever_module
from elva.model.packing import completions_a_reading
from elva.model.prompt import Prompt
from elva.model.retriever import Retriever
from elva.processes import Processes
from elva.recipe import LoraSettings, StageConfig
from elva.training.summaries import Summaries

GROUPS, LONGEST = 4, 7


@dataclass
class Case:
    retriever: Retriever
    prompts: list[Prompt]
    ids: Tensor
    mask: Tensor

    def forward(self) -> Tensor:
        batch = self.retriever.inputs.collate(self.prompts, self.retriever.device)
        return self.retriever.hidden_states(batch, self.ids, self.mask)

    def alone(self) -> Tensor:
        """Every completion on an unpadded prompt of its own."""
        rows = []
        for row, (ids, mask) in enumerate(zip(self.ids, self.mask, strict=True)):
            prompt = [self.prompts[row // GROUPS]]
            batch = self.retriever.inputs.collate(prompt, self.retriever.device)
            states = self.retriever.hidden_states(batch, ids[mask][None], mask[mask][None])[0]
            rows.append(torch.nn.functional.pad(states, (0, 0, 0, int((~mask).sum()))))
        return torch.stack(rows)

    def gradients(self, states: Tensor) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(1)
        weights = torch.randn(states.shape, generator=draw, dtype=states.dtype)
        real = torch.cat([torch.ones(len(self.mask), 1, dtype=torch.bool), self.mask], 1)
        self.retriever.zero_grad()
        (states * weights * real[..., None]).sum().backward()
        named = self.retriever.model.named_parameters()
        return {n: p.grad.clone() for n, p in named if p.requires_grad and p.grad is not None}


def _norm(self: Qwen2VLRMSNorm, states: Tensor) -> Tensor:
    """transformers' own rounds to fp32 on the way."""
    return (
        self.weight
        * states
        * (states.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()
    )


@pytest.fixture(params=["plain", "lora"])
def case(
    request: pytest.FixtureRequest, released: Callable[[str], Path], corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Case:  # fmt: skip
    monkeypatch.setattr(Qwen2VLRMSNorm, "forward", _norm)
    retriever = Retriever.load(released("untied"), summary_prompt="Summarise it.")
    torch.manual_seed(0)
    if request.param == "lora":
        retriever.add_lora(LoraSettings(rank=4, alpha=8))
        for name, parameter in retriever.model.named_parameters():
            if "lora_B" in name:  # else the adapter is the identity
                torch.nn.init.normal_(parameter, std=0.1)
    retriever.double().train()
    retriever.freeze_vision(True)
    queries = load(corpus, split="train").queries
    found = [next(q for q in queries if q.task == task) for task in ("t2i", "i2t", "it2i", "t2t")]
    prompts = [retriever.inputs.prompt(q) for q in found]
    assert len({len(p) for p in prompts}) > 1 and {p.image is None for p in prompts} == {
        True,
        False,
    }
    lengths = torch.randint(1, LONGEST + 1, (len(prompts) * GROUPS, 1))
    lengths[0] = LONGEST
    ids = torch.randint(300, 500, (len(lengths), LONGEST))
    return Case(retriever, prompts, ids, torch.arange(LONGEST) < lengths)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("share", [1, 2, 4])
def test_a_shared_reading_is_the_plain_forward(
    case: Case, share: int, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = case.alone()
    wanted = case.gradients(expected)
    read: list[int] = []
    tokens = case.retriever.plain.model.language_model.register_forward_pre_hook(
        lambda _, __, given: read.append(given["inputs_embeds"].shape[0]), with_kwargs=True
    )
    if checkpointing:
        case.retriever.plain.activation_checkpointing_enable()
    monkeypatch.setattr(retriever_module, "completions_a_reading", lambda *_: share)
    found = case.forward()
    assert read == [len(case.prompts) * GROUPS // share]
    tokens.remove()
    real = torch.cat([torch.ones(len(case.mask), 1, dtype=torch.bool), case.mask], 1)
    assert (found - expected)[real].abs().max() < 1e-10
    gradients = case.gradients(found)
    assert gradients.keys() == wanted.keys() and len(wanted) > 10
    for name, gradient in gradients.items():
        assert (gradient - wanted[name]).norm() <= 1e-10 * wanted[name].norm(), name


def test_a_reading_is_shared_where_that_is_less_to_multiply() -> None:
    """By hand: 7B's sizes share long prompts with all, and very long completions with few."""
    config = SimpleNamespace(
        hidden_size=3584, intermediate_size=18944, num_attention_heads=28, num_key_value_heads=4,
        _attn_implementation="sdpa",
    )  # fmt: skip
    assert completions_a_reading(config, 400, [128] * 8, 8) == 8
    assert completions_a_reading(config, 400, [128] * 3, 1) == 1
    assert completions_a_reading(config, 8, [4096] * 8, 8) == 1
    assert completions_a_reading(config, 400, [1000] * 8, 8) == 4
    config._attn_implementation = "eager"
    assert completions_a_reading(config, 400, [128] * 8, 8) == 1


@pytest.mark.parametrize(("most", "sizes"), [(8, {8}), (9, {8}), (1024, {16}), (3, {2}), (1, {1})])
def test_micro_batches_hold_whole_prompts_or_parts_of_one(
    case: Case, most: int, sizes: set[int]
) -> None:
    stage = StageConfig(micro_batch_size=most, num_generations=GROUPS)
    summaries = Summaries(case.retriever, stage, (0,), torch.no_grad, Processes())
    rows, lengths = [], []
    for some, batch in summaries.micro_batches(case.prompts, case.mask):
        groups = len(some) // len(batch)
        owners = [case.prompts[i // GROUPS] for i in some[::groups]]
        assert [p.image for p in owners] == batch.images
        assert all(i // GROUPS == some[k - k % groups] // GROUPS for k, i in enumerate(some))
        rows += some
        lengths.append(len(some))
    assert set(lengths) == sizes and sorted(rows) == list(range(len(case.mask)))
