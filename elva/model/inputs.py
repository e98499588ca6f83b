"""What goes into the model: tokenised prompts with Qwen2-VL's positions, and pixel patches, made
once.

The tokenizer and the image processor of a checkpoint do not change from stage to stage, so one
`Inputs` serves every model of a run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from tokenizers import AddedToken
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorPil,
    smart_resize,
)

from elva.data import Item
from elva.errors import UserError
from elva.files import sha256
from elva.model.pictures import Pictures, Pixels
from elva.model.prompt import Prompt, PromptBatch, mrope_positions
from elva.model.reading import AT_RET, Reading

RET = "[RET]"
"""The token whose hidden state is the embedding."""

_IMAGE_PAD = "<|image_pad|>"

_CHAT_END = "<|im_end|>"
"""Ends an answer of Qwen's chat models: to the sampler one token with [RET], which takes its
place."""

_WORDS_HERE = "\ue000"
"""Where the chat template puts what is asked; a character for private use."""

SYSTEM_HERE = "\ue001"
"""Likewise its system message."""

_PROMPTS_KEPT = 100_000
"""Tokenised prompts kept at a time; about 1 KB each."""


class Inputs:
    """Tokenizer, image processor and chat template of a checkpoint, what a summary may be written
    in, and what was made so far."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: Qwen2VLImageProcessorPil,
        summary_prompt: str,
        *,
        image_id: int | None = None,
        vocabulary: int | None = None,
        reserved_ids: Iterable[int] = (),
        end_ids: Iterable[int] = (),
        reading: Reading = AT_RET,
        layout: Mapping[str, bytes] | None = None,
    ) -> None:
        """
        Args:
            image_id: the token in whose place a picture's features stand; Qwen's for None.
            vocabulary: rows of the model's head; those beyond the tokenizer's own are no tokens.
            reserved_ids: further ids that a summary may not hold: the config's picture tokens.
            end_ids: further ids that end an answer: the generation config's.
            reading: whose prompt and embedding it is; [RET] is registered for ELVA's alone.
            layout: {name: content} of a retriever's own files, which `save` writes unchanged.
        """
        self.reading, self.layout = reading, layout or {}
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.summary_prompt = summary_prompt
        self.image_id = token_id(tokenizer, _IMAGE_PAD) if image_id is None else image_id
        self._renderer: Any = tokenizer  # whose chat template it is
        self.ret_is_new = reading.at_ret and RET not in tokenizer.get_vocab()
        if self.ret_is_new:
            # Never `add_special_tokens`: it replaces the list of those that there are.
            tokenizer.add_tokens([AddedToken(RET, special=True, normalized=False)], True)
        own = {tokenizer.get_vocab()[RET]} if reading.at_ret else set()
        ends = [tokenizer.get_vocab().get(_CHAT_END), tokenizer.eos_token_id, *end_ids]
        known_ends = dict.fromkeys(i for i in ends if i is not None and i not in own)
        self.end_ids = list(known_ends)  # the chat's own first
        known = tokenizer.added_tokens_decoder
        special = {*tokenizer.all_special_ids, *(i for i, t in known.items() if t.special)}
        unknown = set(range(vocabulary or 0)) - set(tokenizer.get_vocab().values())
        banned = special | unknown | set(reserved_ids)
        self.banned_ids = sorted(banned - {*own, *self.end_ids})
        self._special = {int(i) for i in special | set(reserved_ids)}
        self._never: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._prompts: dict[tuple[str | None, str, str | None], Prompt] = {}
        self._frames: dict[tuple[bool, bool, bool], list[list[int]]] = {}
        self._pictures: dict[str, Item] = {}
        self._contents: dict[str, str] = {}
        self.pictures = Pictures(self._cut)

    @classmethod
    def load(
        cls,
        path: str | Path,
        summary_prompt: str,
        revision: str | None = None,
        **how: Any,
    ) -> Inputs:
        """Read a checkpoint directory or a hub name; [RET] is registered where the vocabulary lacks
        it.

        The image processor is the PIL one on every machine: torchvision resizes to slightly
        different pixels, and an index must not depend on what else is installed.

        Args:
            how: further arguments of `__init__`.
        """
        pinned: Any = {"revision": revision or "main"}
        tokenizer = AutoTokenizer.from_pretrained(path, **pinned)
        processor = Qwen2VLImageProcessorPil.from_pretrained(path, **pinned)
        inputs = cls(tokenizer, processor, summary_prompt, **how)
        if inputs.reading.pixels is not None:
            inputs.bound_pixels(*inputs.reading.pixels)
        return inputs

    @staticmethod
    def of_config(path: str | Path, revision: str | None) -> dict[str, Any]:
        """What `__init__` is told of a checkpoint's configuration."""
        how: Any = {"revision": revision or "main"}
        config = AutoConfig.from_pretrained(path, **how)
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        reserved = [getattr(config, name, None) for name in names]
        try:
            ends = GenerationConfig.from_pretrained(path, **how).eos_token_id
        except OSError:  # a checkpoint without one: the tokenizer's alone
            ends = None
        return {
            "image_id": reserved[0],
            "vocabulary": config.get_text_config().vocab_size,
            "reserved_ids": [i for i in reserved if i is not None],
            "end_ids": [ends] if isinstance(ends, int) else ends or (),
        }

    @property
    def ret_id(self) -> int:
        """[RET]'s, which a retriever of somebody else does not know."""
        return token_id(self.tokenizer, RET)

    @cached_property
    def ending(self) -> list[int]:
        """What closes a prompt that is embedded by itself: [RET], or the retriever's own tokens, of
        which there may be none."""
        if self.reading.at_ret:
            return [self.ret_id]
        return self._around[1] if (own := self.reading.ends_with) is None else self._ids(own)

    @cached_property
    def closing(self) -> list[int]:
        """What closes a summary, of which the first is its action to end: [RET]; or what closes a
        prompt, or opens the answer anew where that is nothing, after an end of the chat's, which
        closes it alone where neither is anything.

        Raises:
            UserError: nothing ends an answer of the checkpoint.
        """
        own = self.ending or self._frame(False, True, False)[-1]
        if self.reading.at_ret or (own and own[0] in self.end_ids):
            return own
        if not self.end_ids:
            raise UserError(
                "train: model.path must have a token that ends an answer, which closes its "
                "summaries, got none; set max_completion_length to 0"
            )
        return [self.end_ids[0], *own]

    @cached_property
    def filler(self) -> int:
        """A token that may be written, where a row of a batch is too short for one of its own."""
        if self.reading.at_ret:
            return self.ret_id
        words = sorted({*self.tokenizer.get_vocab().values()} - {*self.banned_ids})
        return [*self.end_ids, *words][0]

    @cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and after whatever it is given."""
        bare, whole = self._ids("a"), list(self.tokenizer("a").input_ids)
        starts = (i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
        if not bare or (start := next(starts, None)) is None:
            raise UserError(
                "train: model.path must be a checkpoint whose tokenizer keeps what it reads whole, "
                f"got {self.tokenizer.name_or_path}; fetch it again"
            )
        return whole[:start], whole[start + len(bare) :]

    def never(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The ids that are never written, and those that end, the one that stands for all first, on
        a device."""
        if device not in self._never:
            ends = list(dict.fromkeys([self.closing[0], *self.end_ids]))
            self._never[device] = (
                torch.tensor(self.banned_ids, dtype=torch.int64, device=device),
                torch.tensor(ends, dtype=torch.int64, device=device),
            )
        return self._never[device]

    def bound_pixels(self, least: int | None, most: int | None) -> None:
        """Resize pictures to at least, and at most, so many pixels; None leaves the checkpoint's
        own. It is saved with the checkpoint, beside the files of a retriever of somebody else.

        Raises:
            UserError: one is given, and the checkpoint's own other one leaves no size.
        """
        size = self.image_processor.size
        if most and not least and most < size["shortest_edge"]:
            raise UserError(
                "train: model.max_pixels must be at least the checkpoint's own minimum "
                f"{size['shortest_edge']}, got {most}; set model.min_pixels too"
            )
        if least and not most and least > size["longest_edge"]:
            raise UserError(
                "train: model.min_pixels must be at most the checkpoint's own maximum "
                f"{size['longest_edge']}, got {least}; set model.max_pixels too"
            )
        bounds = least or size["shortest_edge"], most or size["longest_edge"]
        if not self.reading.at_ret and (least or most):
            self.reading = replace(self.reading, pixels=bounds)
        self.image_processor.size = dict(
            zip(("shortest_edge", "longest_edge"), bounds, strict=True)
        )

    def save(self, path: Path) -> None:
        for name, content in self.layout.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
        if not self.layout:
            self._save(path)

    def _save(self, path: Path) -> None:
        self.tokenizer.save_pretrained(path)
        self.image_processor.save_pretrained(path)

    def prompt(self, item: Item) -> Prompt:
        """Tokenise an item once: [picture] [instruction + text] [summary prompt], in the chat
        template, or as a retriever of somebody else is asked (`Reading.asked`)."""
        system, text = self.reading.asked(item)
        image = None if item.image is None else _picture_key(item)
        key = (image, system, text)
        if key not in self._prompts:
            if len(self._prompts) >= _PROMPTS_KEPT:
                self._prompts.clear()
            if image is not None:
                self._pictures[image] = item
            self._prompts[key] = self._tokenise(image, system, text)
        return self._prompts[key]

    def _tokenise(self, image: str | None, system: str, text: str | None) -> Prompt:
        words = bool(text or self.summary_prompt)
        *opened, before, after = self._frame(image is not None, words, bool(system))
        if opened:
            before = [*opened[0], *self.text_ids(system), *before]
        if not self.reading.at_ret:
            before = [*self._around[0], *before]
        grid = None
        if image is not None:
            grid = self._grid(image)
            place = before.index(self.image_id)
            before = [*before[:place], *[self.image_id] * (grid[0] * grid[1]), *before[place + 1 :]]
        ids = torch.tensor([*before, *self._asked(text), *after])
        return Prompt(ids, mrope_positions(ids == self.image_id, grid), image)

    def _grid(self, image: str) -> tuple[int, int]:
        """Height and width of a picture in merged patches, as `patches` cuts it, from its
        header."""
        width, height = self._pictures[image].image_size()
        processor = self.image_processor
        cell = processor.patch_size * processor.merge_size
        height, width = smart_resize(
            height, width, cell, processor.size["shortest_edge"], processor.size["longest_edge"]
        )
        return height // cell, width // cell

    def _asked(self, text: str | None) -> list[int]:
        """The tokens of what is said, and of the prompt to summarise it."""
        said = self.text_ids(text) if text else []
        asked = " " * bool(text) + self.summary_prompt if self.summary_prompt else ""
        return [*said, *self._ids(asked)]

    def text_ids(self, text: str) -> list[int]:
        """The tokens of somebody's words: what looks like a special token in them is words too."""
        ids = self._ids(text, split_special_tokens=True)
        return [i for i in ids if i not in self._special]  # of a tokenizer that splits none

    def _frame(self, picture: bool, words: bool, system: bool) -> list[list[int]]:
        """The chat template's tokens around what is asked, and around a system message before."""
        key = (picture, words, system)
        if key not in self._frames:
            before, after = self._rendered(*key)
            parts = [*before.split(SYSTEM_HERE), after] if system else [before, after]
            self._frames[key] = [self._ids(part) for part in parts]
        return self._frames[key]

    def _rendered(self, picture: bool, words: bool, system: bool) -> tuple[str, str]:
        content: list[Any] = [{"type": "image"}] if picture else []
        content += [{"type": "text", "text": _WORDS_HERE}] if words else []
        chat: Any = [{"role": "user", "content": content}]
        if system:
            chat = [{"role": "system", "content": [{"type": "text", "text": SYSTEM_HERE}]}, *chat]
        try:
            rendered = self._renderer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=self.reading.generation_prompt
            )
        except (ValueError, TypeError, TemplateError) as error:
            reason = " ".join(str(error).split())[:120]
            raise UserError(
                "train: model.path must be a checkpoint whose chat template (chat_template.jinja) "
                f"renders a message of parts, got {self.tokenizer.name_or_path}: {reason}"
            ) from None
        before, _, after = str(rendered).partition(_WORDS_HERE)
        return before, after

    def _ids(self, text: str, **how: Any) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, **how).input_ids) if text else []

    def _cut(self, image: str) -> Pixels:
        """Decode a picture and cut it into patches; threads do it beside each other."""
        out = self.image_processor([self._pictures[image].load_image()], return_tensors="np")
        names = ("pixel_values", "image_grid_thw")
        return {name: torch.from_numpy(np.ascontiguousarray(out[name])) for name in names}

    def patches(self, image: str) -> tuple[Tensor, Tensor]:
        """Pixel patches [P, 3 * t * p * p] and grid (t, h, w) of a picture that was prompted."""
        pixels = self.pixels(image)
        return pixels["pixel_values"], pixels["image_grid_thw"][0]

    def content(self, image: str) -> str:
        """A hash of a prompted picture, wherever it lies."""
        if image not in self._contents:
            shown = self._pictures[image].image
            self._contents[image] = sha256(shown) if isinstance(shown, Path) else image
        return self._contents[image]

    def pixels(self, image: str) -> Pixels:
        """Arguments of the model's `get_image_features` for a picture that was prompted."""
        return self.pictures.get(image)

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


def _picture_key(item: Item) -> str:
    """A picture's name: its path, or a hash of its bytes or pixels."""
    if isinstance(item.image, Path):
        return str(item.image)
    data = item.image if isinstance(item.image, bytes) else item.load_image().tobytes()
    return hashlib.sha256(data).hexdigest()
