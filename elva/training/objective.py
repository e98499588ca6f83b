"""The losses of every stage on tokens, as functions of tensors.

Shao et al., DeepSeekMath, arXiv:2402.03300 (clipped policy gradient, k3 KL); Liu et al., ELVA,
arXiv:2606.20280, sec. 3.4. Those on embeddings are in `ranking`.
"""

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


def end_targets(mask: Tensor, ret_id: int) -> Tensor:
    """[RET] at the last token of every summary, [R, T], -100 elsewhere: what the model would say
    there is the chat's end, of which [RET] takes the place.

    Args:
        mask: [R, T], True where a token is real.
    """
    last = mask & ~F.pad(mask[:, 1:], (0, 1))
    return torch.where(last, ret_id, -100)


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
