"""The losses of every stage on tokens, as functions of tensors.

Shao et al., DeepSeekMath, arXiv:2402.03300 (clipped policy gradient, k3 KL); Liu et al., ELVA,
arXiv:2606.20280, sec. 3.4. Those on embeddings are in `ranking`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def caption_targets(written: Tensor, caption: Tensor) -> Tensor:
    """What each position of a summary should have said, [R, T], -100 where there is no telling.

    A position counts while everything written before it equals the caption, so that sampled
    summaries
    teach too: up to and including the first token that went wrong.

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


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    reference_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_epsilon: float,
    beta: float,
) -> tuple[Tensor, Tensor]:
    """GRPO's loss of every sequence, and its KL to the reference, both [R].

    -min(rho A, clip(rho, 1 - clip, 1 + clip) A) + beta * k3, mean over a sequence's tokens, with
    k3 = exp(ref - new) - (ref - new) - 1 (DeepSeekMath, eq. 4); TRL calls it loss_type="grpo".

    Args:
        log_probs, old_log_probs, reference_log_probs, mask: [R, T].
        advantages: [R].
    """
    ratio = (log_probs - old_log_probs).exp()
    clipped = ratio.clamp(1 - clip_epsilon, 1 + clip_epsilon)
    gain = torch.minimum(ratio * advantages[:, None], clipped * advantages[:, None])
    gap = reference_log_probs - log_probs
    k3 = gap.exp() - gap - 1
    count = mask.sum(1).clamp(min=1)

    def mean(x: Tensor) -> Tensor:
        return torch.where(mask, x, 0.0).sum(1) / count

    return mean(beta * k3 - gain), mean(k3)
