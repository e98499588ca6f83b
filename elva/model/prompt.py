"""One tokenised input, or several of one length, with Qwen2-VL's positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """One tokenised input. `image` names the picture whose features replace its placeholder
    tokens."""

    input_ids: Tensor  # [L] int64
    position_ids: Tensor  # [3, L] int64: Qwen2-VL's temporal, height and width positions
    image: str | None

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass
class PromptBatch:
    """Prompts padded on the left to one length, so that every completion starts in the same
    column."""

    input_ids: Tensor  # [R, L]
    attention_mask: Tensor  # [R, L], 1 where real
    position_ids: Tensor  # [3, R, L]
    images: list[str | None]

    def __len__(self) -> int:
        return len(self.input_ids)

    def repeat(self, times: int) -> PromptBatch:
        """Each prompt `times` times, in order."""
        if times == 1:
            return self
        return PromptBatch(
            self.input_ids.repeat_interleave(times, 0),
            self.attention_mask.repeat_interleave(times, 0),
            self.position_ids.repeat_interleave(times, 1),
            [image for image in self.images for _ in range(times)],
        )


def mrope_positions(is_image: Tensor, grid: tuple[int, int] | None) -> Tensor:
    """Qwen2-VL's rotary positions of text around at most one picture, [3, L].

    Equivalent to `Qwen2VLModel.get_rope_index` on one unpadded row, without its loop over tokens.

    Args:
        is_image: [L] bool, the picture's placeholders (one run of grid height * width tokens).
        grid: height and width of the picture in merged patches.
    """
    length = len(is_image)
    positions = torch.arange(length).expand(3, -1).clone()
    if grid is None:
        return positions
    height, width = grid
    start = int(is_image.int().argmax())
    end = start + height * width
    cells = torch.arange(height * width)
    positions[0, start:end] = start
    positions[1, start:end] = start + cells // width
    positions[2, start:end] = start + cells % width
    positions[:, end:] = start + max(height, width) + torch.arange(length - end)
    return positions
