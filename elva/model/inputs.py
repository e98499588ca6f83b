"""What goes into the model: tokenised prompts with Qwen2-VL's positions, and pixel patches, made
once.

The tokenizer and the image processor of a checkpoint do not change from stage to stage, so one
`Inputs` serves every model of a run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from elva.data import Item, Query

RET = "[RET]"
"""The token whose hidden state is the embedding."""

IMAGE_PAD = "<|image_pad|>"

PROMPTS_KEPT = 100_000
"""Tokenised prompts kept at a time; about 1 KB each."""

PATCHES_KEPT_MB = 512
"""Pixel patches kept at a time; beyond it a picture is read again."""


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


class Inputs:
    """Tokenizer, image processor and chat template of a checkpoint, and what they have made so
    far."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: Qwen2VLImageProcessorPil,
        summary_prompt: str,
    ) -> None:
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.summary_prompt = summary_prompt
        if tokenizer.convert_tokens_to_ids(RET) in (None, tokenizer.unk_token_id):
            tokenizer.add_special_tokens({"additional_special_tokens": [RET]})
        self.ret_id = token_id(tokenizer, RET)
        self.image_id = token_id(tokenizer, IMAGE_PAD)
        self._prompts: dict[tuple[str | None, str | None], Prompt] = {}
        self._pictures: dict[str, Item] = {}
        self._patches: dict[str, tuple[Tensor, Tensor]] = {}
        self._patches_bytes = 0

    @classmethod
    def load(cls, path: str | Path, summary_prompt: str) -> Inputs:
        """Read a checkpoint directory or a hub name; [RET] is registered where the vocabulary lacks
        it.

        The image processor is the PIL one on every machine: torchvision resizes to slightly
        different pixels, and an index must not depend on what else is installed.
        """
        return cls(
            AutoTokenizer.from_pretrained(path),
            Qwen2VLImageProcessorPil.from_pretrained(path),
            summary_prompt,
        )

    def save(self, path: Path) -> None:
        self.tokenizer.save_pretrained(path)
        self.image_processor.save_pretrained(path)

    @property
    def banned_ids(self) -> list[int]:
        """Special tokens a summary may not contain: all but [RET] (no placeholder, no end of
        turn)."""
        return sorted(set(self.tokenizer.all_special_ids) - {self.ret_id})

    def prompt(self, item: Item) -> Prompt:
        """Tokenise an item once: [picture] [instruction + text] [summary prompt], in the chat
        template."""
        text = item.prompted if isinstance(item, Query) else item.text
        image = None if item.image is None else _picture_key(item)
        key = (image, text)
        if key not in self._prompts:
            if len(self._prompts) >= PROMPTS_KEPT:
                self._prompts.clear()
            if image is not None:
                self._pictures[image] = item
            self._prompts[key] = self._tokenise(image, text)
        return self._prompts[key]

    def _tokenise(self, image: str | None, text: str | None) -> Prompt:
        content: list[Any] = [{"type": "image"}] if image is not None else []
        asked = " ".join(t for t in (text, self.summary_prompt) if t)
        if asked:
            content.append({"type": "text", "text": asked})
        messages: Any = [{"role": "user", "content": content}]
        rendered = str(
            self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        )
        grid = None
        if image is not None:
            merge = self.image_processor.merge_size
            _, height, width = self.patches(image)[1].tolist()
            grid = (height // merge, width // merge)
            rendered = rendered.replace(IMAGE_PAD, IMAGE_PAD * (grid[0] * grid[1]), 1)
        ids = torch.tensor(self.tokenizer(rendered, add_special_tokens=False).input_ids)
        return Prompt(ids, mrope_positions(ids == self.image_id, grid), image)

    def patches(self, image: str) -> tuple[Tensor, Tensor]:
        """Pixel patches [P, 3 * t * p * p] and grid (t, h, w) of a picture that was prompted."""
        if image not in self._patches:
            if self._patches_bytes > PATCHES_KEPT_MB << 20:
                self._patches.clear()
                self._patches_bytes = 0
            out = self.image_processor([self._pictures[image].load_image()], return_tensors="np")
            pixels = torch.from_numpy(np.ascontiguousarray(out["pixel_values"]))
            self._patches[image] = (pixels, torch.from_numpy(out["image_grid_thw"][0]))
            self._patches_bytes += pixels.nbytes
        return self._patches[image]

    def collate(self, prompts: Sequence[Prompt], device: torch.device) -> PromptBatch:
        """Pad on the left. Right padding would put completions at different columns and wrong
        positions."""
        length = max(len(p) for p in prompts)
        ids = torch.full((len(prompts), length), self.tokenizer.pad_token_id)
        mask = torch.zeros(len(prompts), length, dtype=torch.long)
        positions = torch.zeros(3, len(prompts), length, dtype=torch.long)
        for row, p in enumerate(prompts):
            ids[row, length - len(p) :] = p.input_ids
            mask[row, length - len(p) :] = 1
            positions[:, row, length - len(p) :] = p.position_ids
        images = [p.image for p in prompts]
        return PromptBatch(ids.to(device), mask.to(device), positions.to(device), images)


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """The id of one special token."""
    found = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(found, int)
    return found


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


def _picture_key(item: Item) -> str:
    """A picture's name: its path, or a hash of its bytes or pixels."""
    if isinstance(item.image, Path):
        return str(item.image)
    data = item.image if isinstance(item.image, bytes) else item.load_image().tobytes()
    return hashlib.sha256(data).hexdigest()
