"""The losses of every stage on tokens, as functions of tensors.

Shao et al., DeepSeekMath, arXiv:2402.03300 (clipped policy gradient, k3 KL); Liu et al., ELVA,
arXiv:2606.20280, sec. 3.4. Those on embeddings are in `ranking`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import elva_kernels


def caption_targets(written: Tensor, caption: Tensor) -> Tensor:
    """What each position of a summary should have said, [R, T], -100 where there is no telling.

    A position counts while everything written before it equals the caption, so that sampled
    summaries teach too: up to and including the first token that went wrong.

    Args:
        written: [R, T] token ids, padded with anything.
        caption: [R, S] token ids ending in [RET], padded with -100.
    """
    width = written.shape[1]
    caption = F.pad(caption, (0, max(0, width - caption.shape[1])), value=-100)[:, :width]
    same = (written == caption).long().cumprod(1)
    on_track = torch.cat([torch.ones_like(same[:, :1]), same[:, :-1]], 1).bool()
    return caption.masked_fill(~on_track, -100)


def ret_loss(logits: Tensor, finished: Tensor, ret_id: int, end_ids: Sequence[int]) -> Tensor:
    """-log p([RET]) where each summary ends, [R]: of a summary that ended, among the ways to end.

    So [RET] takes the place of the chat's end and ends nothing earlier: over the whole vocabulary
    the same term teaches to end at once, with nothing written and nothing to explore. A summary
    that was cut off at the length limit is taught to end there, among all tokens.

    Args:
        logits: [R, V] at the last token of each summary.
        finished: [R] bool, False where it was cut off.
    """
    ends = logits[:, [ret_id, *end_ids]].logsumexp(-1)
    return torch.where(finished, ends, logits.logsumexp(-1)) - logits[:, ret_id]


def advantages(reward: Tensor, scale_rewards: str) -> Tensor:
    """[*, G] advantages of G rollouts a group, by TRL's word for their divisor: group, batch, none.

    Differs from TRL: a group whose rewards differ by less than 1e-6 has none.
    """
    scale = {"group": "std"}.get(scale_rewards, scale_rewards)
    return elva_kernels.group_advantages(reward.detach(), scale=scale)


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    reference_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    beta: float,
    epsilon: float,
    epsilon_high: float | None = None,
    loss_type: str = "grpo",
    importance_sampling_level: str = "token",
) -> tuple[Tensor, Tensor]:
    """[R] each row's part of GRPO's loss, and [R] the sum of k3 over its tokens, without a graph.

    A token's loss is -min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A) + beta * k3, with
    k3 = exp(ref - new) - (ref - new) - 1 (DeepSeekMath, eq. 4) and rho = exp(new - old), or, at the
    level of sequences, exp of the row's mean of it (GSPO, arXiv:2507.18071, eq. 7).

    A step's loss is the sum of the parts of its rows, in whatever micro-batches and processes they
    were computed, over the sum of their `normaliser`. Equal to TRL's of the same names.

    Args:
        log_probs, old_log_probs, mask: [R, T]; the mask is False throughout a truncated row (TRL's
            mask_truncated_completions).
        reference_log_probs: [R, T]; None, where beta is 0, leaves the KL out, whose sums are 0.
        advantages: [R].
        epsilon_high: None for `epsilon`.
        loss_type: grpo, a row's mean over its tokens; bnpo, dr_grpo, dapo: its sum.
        importance_sampling_level: token or sequence.
    """
    high = epsilon if epsilon_high is None else epsilon_high
    count = mask.sum(1).clamp(min=1)
    log_ratio = log_probs - old_log_probs
    if importance_sampling_level == "sequence":
        log_ratio = (torch.where(mask, log_ratio, 0.0).sum(1) / count)[:, None]
    ratio = log_ratio.exp()
    gain = torch.minimum(
        ratio * advantages[:, None], ratio.clamp(1 - epsilon, 1 + high) * advantages[:, None]
    )
    loss, kl = -gain.expand_as(log_probs), log_probs.new_zeros(len(log_probs))
    if reference_log_probs is not None:
        gap = reference_log_probs - log_probs
        k3 = gap.exp() - gap - 1
        loss = loss + beta * k3
        kl = torch.where(mask, k3.detach(), 0.0).sum(1)
    part = torch.where(mask, loss, 0.0).sum(1)
    return part / count if loss_type == "grpo" else part, kl


def normaliser(loss_type: str, mask: Tensor, max_completion_length: int) -> Tensor:
    """[] what the parts of a mask's rows are divided by: a count, to be summed over processes.

    grpo: rows, truncated ones included; bnpo and dapo: tokens; dr_grpo: rows times
    `max_completion_length`. Known before a forward. A sum of 0 stands for 1.

    Differs from TRL: its bnpo counts the tokens of each micro-batch on its own, so that their size
    changes the loss; here the whole step's are counted, as in dapo.
    """
    if loss_type in ("bnpo", "dapo"):
        return mask.sum()
    rows = mask.new_tensor(len(mask), dtype=torch.int64)
    return rows * max_completion_length if loss_type == "dr_grpo" else rows
