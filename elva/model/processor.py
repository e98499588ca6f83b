"""What goes into a model of any family, made by the processor that its makers wrote for it."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoProcessor, ProcessorMixin

from elva.errors import UserError
from elva.model.inputs import SYSTEM_HERE, Inputs
from elva.model.pictures import Pixels
from elva.model.prompt import Prompt

_WORDS_ONLY = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
"""What a processor returns of the text; all else is of the picture."""


class ProcessorInputs(Inputs):
    """The same through a stock processor: it counts a picture's placeholders and cuts its pixels.

    Positions count tokens, on all three axes of a `Prompt` alike. A picture is decoded twice: when
    its prompt is tokenised, and when its features are computed.
    """

    processor: ProcessorMixin
    _pristine: ProcessorMixin  # what is copied for threads, and never asked
    _of_thread: threading.local
    _copying: threading.Lock

    @classmethod
    def load(
        cls, path: str | Path, summary_prompt: str, revision: str | None = None, **how: Any
    ) -> ProcessorInputs:
        processor = AutoProcessor.from_pretrained(path, revision=revision or "main")
        tokenizer, image_processor = processor.tokenizer, processor.image_processor
        inputs = cls(tokenizer, image_processor, summary_prompt, **how)
        inputs.processor = inputs._renderer = processor
        inputs._pristine = copy.deepcopy(processor)
        inputs._of_thread, inputs._copying = threading.local(), threading.Lock()
        return inputs

    def bound_pixels(self, least: int | None, most: int | None) -> None:
        if least is not None or most is not None:
            kind = type(self.image_processor).__name__
            raise UserError(
                f"train: model.max_pixels and min_pixels must be left out for pictures that "
                f"{kind} cuts, got {most} and {least}; set the size in the checkpoint's own files"
            )

    def _save(self, path: Path) -> None:
        self.processor.save_pretrained(path)

    def _tokenise(self, image: str | None, system: str, text: str | None) -> Prompt:
        words = bool(text or self.summary_prompt)
        before, after = self._rendered(image is not None, words, bool(system))
        before = before.replace(SYSTEM_HERE, system)
        if image is None:
            start = self._ids(before)
        else:
            start = self._seen(before, image, self.processor)["input_ids"][0].tolist()
        if self._opens(before):
            start = [*self._around[0], *start]
        ids = torch.tensor([*start, *self._asked(text), *self._ids(after)])
        return Prompt(ids, torch.arange(len(ids)).expand(3, -1), image)

    def _cut(self, image: str) -> Pixels:
        before, _ = self._rendered(True, True, False)
        seen = self._seen(before, image, self._cutter)
        return {k: v for k, v in seen.items() if k not in _WORDS_ONLY and isinstance(v, Tensor)}

    @property
    def _cutter(self) -> ProcessorMixin:
        """This thread's own: to ask a tokenizer sets its padding and truncation, at which, before
        tokenizers 0.23, it fails where another thread is asking it."""
        if not hasattr(self._of_thread, "processor"):
            with self._copying:
                self._of_thread.processor = copy.deepcopy(self._pristine)
        found: ProcessorMixin = self._of_thread.processor
        return found

    def _seen(self, before: str, image: str, processor: ProcessorMixin) -> dict[str, Any]:
        picture = self._pictures[image].load_image()
        return dict(
            processor(
                text=[before], images=[picture], return_tensors="pt", add_special_tokens=False,
            )
        )  # fmt: skip

    def _opens(self, rendered: str) -> bool:
        """Whether the tokenizer must add the first token, which some templates write themselves."""
        first = self.tokenizer.bos_token
        return first is not None and not rendered.startswith(first)
