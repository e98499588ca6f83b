"""A prompt and its G completions in one row: each prompt is read once for all that is written
to it.

The row is prompt, completion 1, completion 2, ...; a completion sees the prompt and itself, and its
positions go on from the prompt's end. So one forward, which gradient checkpointing and wrappers of
several processes treat like any other, replaces G that read the prompt again, and completions of
unlike lengths stand side by side without padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from elva.model.prompt import PromptBatch


@dataclass
class _Packed:
    """K rows of a prompt and some completions of it: W completion tokens after L prompt tokens."""

    prompts: PromptBatch  # K rows
    completion_ids: Tensor  # [K, W]
    position_ids: Tensor  # [3, K, L + W]
    attention_mask: Tensor  # [K, L + W]; where share > 1, bool [K, 1, L + W, L + W]
    places: Tensor  # [R, T]: columns of the completion tokens in their rows
    share: int  # completions a row

    def unpack(self, states: Tensor) -> Tensor:
        """[K, L + W, H] of the packed rows -> [R, 1 + T, H], a row a completion."""
        rows = torch.arange(len(self.places), device=states.device) // self.share
        # Summed in one order when it goes back, which an index with repeats need not be.
        last = states[:, None, self.prompts.input_ids.shape[1] - 1].expand(-1, self.share, -1)
        return torch.cat(
            [last.reshape(len(rows), 1, -1), states[rows[:, None], self.places]], dim=1
        )


def pack(prompts: PromptBatch, completions: Tensor, mask: Tensor, share: int, pad: int) -> _Packed:
    """Lay completions behind their prompts.

    Args:
        prompts: P prompts.
        completions: [P * G, T] token ids, padded on the right; row i * G + g belongs to prompt i.
        mask: [P * G, T] bool, True where real.
        share: completions that stand behind one reading of a prompt, a divisor of G.
        pad: an id for what is no token.
    """
    count, width = completions.shape
    device, length = completions.device, prompts.input_ids.shape[1]
    prompts = prompts.repeat(count // len(prompts) // share)
    rows = len(prompts)
    start = prompts.position_ids.amax(dim=(0, 2)) + 1  # [K]
    real = mask.reshape(rows, share * width)
    # A padded token's place is that of a real one, whose state nobody asks for in its name.
    places = (real.cumsum(1) - 1).clamp(min=0)
    columns = int(real.sum(1).max())
    at = torch.arange(rows, device=device)[:, None].expand_as(real)[real], places[real]

    def laid(values: Tensor, empty: int) -> Tensor:
        out = torch.full((rows, columns), empty, dtype=torch.long, device=device)
        return out.index_put(at, values.reshape(rows, -1)[real])

    step = torch.arange(width, device=device).repeat(share).expand(rows, -1)
    position = laid(start[:, None] + step, 0)
    if share == 1:
        attention = torch.cat([prompts.attention_mask, laid(torch.ones_like(completions), 0)], 1)
    else:
        number = torch.arange(1, share + 1, device=device).repeat_interleave(width)
        part = torch.cat([prompts.attention_mask - 1, laid(number.expand(rows, -1), -1)], 1)
        attention = _side_by_side(part)
    return _Packed(
        prompts,
        laid(completions, pad),
        torch.cat([prompts.position_ids, position.expand(3, -1, -1)], 2),
        attention,
        length + places.view(count, width),
        share,
    )


def _side_by_side(part: Tensor) -> Tensor:
    """[K, 1, S, S] bool: who sees whom, of [K, S] parts: -1 padding, 0 the prompt, else a
    completion's number."""
    seen, seeing = part[:, None, :], part[:, :, None]
    allowed = ((seen == 0) | (seen == seeing)) & (seen >= 0)
    itself = torch.eye(part.shape[1], dtype=torch.bool, device=part.device)  # padding: never empty
    return (allowed.tril() | itself)[:, None]


def completions_a_reading(config: Any, prompt_tokens: int, lengths: list[int], groups: int) -> int:
    """How many of a prompt's G completions one reading should serve: the fewest multiplications.

    A further completion saves a reading of the prompt, and makes every row longer, of which the
    attention's cost, masked or not, grows by the square.

    Args:
        config: of the language model.
        prompt_tokens: of the micro-batch's longest prompt.
        lengths: [P * G] tokens of the completions.
        groups: G.
    """
    if config._attn_implementation != "sdpa":  # the others take no mask of their own
        return 1
    hidden, heads = config.hidden_size, config.num_attention_heads
    head = getattr(config, "head_dim", None) or hidden // heads
    attention = 2 * hidden * head * (heads + config.num_key_value_heads)
    dense = attention + 3 * hidden * config.intermediate_size  # of a token, in each layer

    def cost(share: int) -> int:
        parts = [sum(lengths[i : i + share]) for i in range(0, len(lengths), share)]
        tokens = prompt_tokens + max(parts)
        return len(parts) * tokens * (dense + 2 * heads * head * tokens)

    return min((n for n in range(1, groups + 1) if groups % n == 0), key=cost)
