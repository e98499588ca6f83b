"""GRPO's loss, gradient and advantages are those of the installed TRL, by its own names."""

import itertools
from collections import defaultdict
from dataclasses import dataclass, fields
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from elva.training import objective

trl = pytest.importorskip("trl", reason="trl is not installed: pip install 'elva[test]'")
from trl import GRPOConfig, GRPOTrainer  # noqa: E402
from trl.trainer.utils import nanstd  # noqa: E402

ROWS, WIDTH, LONGEST = 8, 7, 9
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo")


@dataclass(frozen=True)
class Case:
    """A step's tensors."""

    log_probs: Tensor
    old: Tensor
    reference: Tensor
    advantages: Tensor
    mask: Tensor

    def rows(self, start: int, stop: int) -> "Case":
        return Case(*(getattr(self, field.name)[start:stop] for field in fields(self)))


def drawn(dtype: torch.dtype, truncated: tuple[int, ...] = ()) -> Case:
    """Log-probabilities that have moved to both sides of every clip."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    log_probs = -2 + normal(ROWS, WIDTH)
    old, reference = log_probs + 0.4 * normal(ROWS, WIDTH), log_probs + 0.5 * normal(ROWS, WIDTH)
    mask = torch.arange(WIDTH) < torch.tensor([7, 1, 4, 6, 2, 7, 3, 5])[:, None]
    mask[list(truncated)] = False
    return Case(log_probs, old, reference, normal(ROWS), mask)


def theirs(
    parts: list[Case], config: GRPOConfig, second: bool
) -> tuple[float, Tensor, dict[str, list[float]]]:
    """Loss, d loss / d log-probabilities and metrics of `GRPOTrainer._compute_loss`, one call a
    micro-batch of a step."""
    accelerator = SimpleNamespace(
        num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x
    )
    items = torch.stack([part.mask.sum() for part in parts]).sum()
    metrics: dict[str, dict[str, list[float]]] = {"train": defaultdict(list)}
    loss, gradients = 0.0, []
    for part in parts:
        leaf = part.log_probs.clone().requires_grad_()
        trainer = SimpleNamespace(
            args=config, accelerator=accelerator, model=SimpleNamespace(training=True),
            loss_type=config.loss_type, beta=config.beta, epsilon_low=config.epsilon,
            epsilon_high=config.epsilon if config.epsilon_high is None else config.epsilon_high,
            importance_sampling_level=config.importance_sampling_level,
            max_completion_length=config.max_completion_length,
            top_entropy_quantile=config.top_entropy_quantile,
            off_policy_mask_threshold=config.off_policy_mask_threshold,
            current_gradient_accumulation_steps=config.gradient_accumulation_steps,
            use_vllm=False, aux_loss_enabled=False, _entropy_bonus_enabled=False, _metrics=metrics,
            _get_per_token_logps_and_entropies=lambda *_, x=leaf, **__: (x, x.detach(), None),
        )  # fmt: skip
        inputs = {
            "prompt_ids": torch.zeros(len(leaf), 1), "prompt_mask": torch.ones(len(leaf), 1),
            "completion_ids": torch.zeros(leaf.shape), "completion_mask": part.mask.int(),
            "advantages": part.advantages, "num_items_in_batch": items,
            "ref_per_token_logps": part.reference,
        }  # fmt: skip
        if second:
            inputs["old_per_token_logps"] = part.old
        one = GRPOTrainer._compute_loss(trainer, None, inputs)
        one.backward()
        loss += one.item()
        gradients.append(leaf.grad)
    return loss, torch.cat(gradients), metrics["train"]


def ours(parts: list[Case], config: GRPOConfig, second: bool) -> tuple[float, Tensor, float]:
    """The same of `objective.policy_loss`, and the mean KL of a token."""
    counts = [objective.normaliser(config.loss_type, p.mask, LONGEST) for p in parts]
    loss, sums, gradients = 0.0, 0.0, []
    for part in parts:
        leaf = part.log_probs.clone().requires_grad_()
        terms, kl = objective.policy_loss(
            leaf, part.old if second else leaf.detach(), part.reference if config.beta else None,
            part.advantages, part.mask, beta=config.beta, epsilon=config.epsilon,
            epsilon_high=config.epsilon_high, loss_type=config.loss_type,
            importance_sampling_level=config.importance_sampling_level,
        )  # fmt: skip
        total = terms.sum() / sum(counts).clamp(min=1)
        total.backward()
        loss, sums = loss + total.item(), sums + kl.sum().item()
        gradients.append(leaf.grad)
    return loss, torch.cat(gradients), sums / max(1, sum(int(p.mask.sum()) for p in parts))


def config_of(**named: object) -> GRPOConfig:
    return GRPOConfig(
        output_dir="unused", use_cpu=True, bf16=False, max_completion_length=LONGEST, epsilon=0.2,
        use_bias_correction_kl=False, per_device_train_batch_size=8, num_generations=4, **named,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "close"),
    [(torch.float64, 1e-13), (torch.float32, 1e-5)],
    ids=["float64", "float32"],
)
@pytest.mark.parametrize("truncated", [(), (2, 5), tuple(range(ROWS))], ids=["", "some", "all"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_and_gradient_are_trls(
    loss_type: str, level: str, truncated: tuple[int, ...], dtype: torch.dtype, close: float
) -> None:
    case = drawn(dtype, truncated)
    for beta, high, second in itertools.product((0.0, 0.2), (None, 0.4), (False, True)):
        config = config_of(
            beta=beta, epsilon_high=high, loss_type=loss_type, importance_sampling_level=level
        )
        loss, gradient, metrics = theirs([case], config, second)
        found, own, kl = ours([case], config, second)
        named = (beta, high, second)
        assert found == pytest.approx(loss, rel=close, abs=close), named
        torch.testing.assert_close(own, gradient, rtol=close, atol=close)
        if beta:
            assert kl == pytest.approx(metrics["kl"][0], rel=close, abs=close), named
        alive = len(truncated) < ROWS
        assert bool(own.abs().sum() > 0.1) == alive  # a comparison of something
        if second and level == "token" and alive:  # on both sides of the clip, moved by its height
            assert metrics["clip_ratio/high_mean"][0] > 0.02 < metrics["clip_ratio/low_mean"][0]


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_micro_batches_add_up_to_the_step(loss_type: str) -> None:
    """Exactly, of any sizes; TRL's equal ones agree, but for its bnpo, as documented."""
    case = drawn(torch.float64, (6,))
    config = config_of(beta=0.2, loss_type=loss_type)
    whole, gradient, kl = ours([case], config, True)
    for cuts in ((0, 4, 8), (0, 1, 6, 8)):
        parts = [case.rows(*pair) for pair in itertools.pairwise(cuts)]
        loss, own, mean = ours(parts, config, True)
        assert (loss, mean) == pytest.approx((whole, kl), rel=1e-14)
        torch.testing.assert_close(own, gradient, rtol=1e-14, atol=0)
    halves = [case.rows(0, 4), case.rows(4, 8)]
    config = config_of(
        beta=0.2, loss_type=loss_type, gradient_accumulation_steps=2, steps_per_generation=2
    )
    loss, _, _ = theirs(halves, config, True)
    if loss_type == "bnpo":
        assert abs(loss - whole) > 1e-3
    else:
        assert loss == pytest.approx(whole, rel=1e-13)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_are_trls(scale: str) -> None:
    """Its formula, which stands inside a method of 400 lines, with its own nanstd."""
    reward = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    reward[2] = 0.5  # of no spread
    flat = reward.flatten()
    std = nanstd(flat).expand_as(flat) if scale == "batch" else nanstd(reward, dim=1)
    std = std if scale == "batch" else std.repeat_interleave(4)
    expected = flat - reward.nanmean(1).repeat_interleave(4)
    if scale != "none":
        expected = expected / (std + 1e-4)
    found = objective.advantages(reward, scale)
    # nanstd takes the quotient of two counts in float32, of float64 too: 4 / 3 is off by 3e-8
    close = 1e-13 if scale == "none" else 6e-8
    torch.testing.assert_close(found.flatten(), expected, rtol=close, atol=1e-13)
    assert found.abs().max() > 0.5
