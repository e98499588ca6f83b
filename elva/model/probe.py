"""Whether a model of a family that nobody has tried works as ELVA uses it: a few forwards of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from inspect import signature
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from elva.data import Item
from elva.model.inputs import RET
from elva.model.prompt import Prompt
from elva.model.retriever import Retriever
from elva.model.rollout import sample

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.05}
"""Of a difference to the norm of an embedding, by the weights' dtype. Ours: random models of four
families, of 4 and of 24 layers, stay within 8e-7 in fp32 and .017 in bf16; what another picture
makes of an embedding is .09 to 1."""

WRITTEN = 4
"""Tokens of the summary that each prompt is read with."""


@torch.no_grad()
def fault(retriever: Retriever) -> str | None:
    """What does not hold of a model, in words; None where all does.

    A picture changes the embedding; [RET] is one token with rows of its own; the forward that is
    put together here equals the model's own; rows of a batch that is padded on the left and mixes
    pictures with text equal rows alone, teacher-forced and sampled alike.
    """
    try:
        return next(_faults(retriever), None)
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return f"its forward fails on a picture or a text ({reason})"


def _faults(retriever: Retriever) -> Iterator[str]:
    inputs, plain = retriever.inputs, retriever.plain
    tolerance = _TOLERANCE[plain.dtype]
    tables = (plain.get_input_embeddings(), plain.lm_head)
    rows = min(cast(Tensor, p.weight).shape[0] for p in tables)
    written = inputs.tokenizer(RET, add_special_tokens=False).input_ids
    if inputs.reading.at_ret and (list(written) != [inputs.ret_id] or inputs.ret_id >= rows):
        yield f"{RET} cannot be added to its vocabulary"
    if not inputs.end_ids:
        yield "no token ends its answers"
    if inputs.tokenizer.pad_token_id is None:
        yield "its tokenizer pads with no token"
    items = [
        Item("0", "a dog", None, "text"),
        Item("1", "two people run in the rain, and nobody knows why", None, "text"),
        Item("2", "a dog", _picture(0, (60, 90)), "image,text"),
        Item("3", "a dog", _picture(1, (60, 90)), "image,text"),
        Item("4", None, _picture(1, (120, 50)), "image"),
    ]
    prompts = [inputs.prompt(item) for item in items]
    alone = [_read(retriever, [prompt])[0] for prompt in prompts]
    if _difference(alone[2][-1], alone[3][-1]) <= tolerance:
        yield "a picture does not change the embedding"
    for prompt, states in zip(prompts, alone, strict=True):
        own = _own_forward(retriever, prompt)
        logits = plain.lm_head(states)
        if _difference(states, own.hidden_states[-1][0, -len(states) :]) > tolerance:
            yield "its own forward gives other hidden states than its language model here"
        if _difference(logits, own.logits[0, -len(states) :]) > tolerance:
            yield "its own forward gives other logits than its head here"
    if any(_difference(a, b) > tolerance for a, b in zip(
        alone[:2], _read(retriever, prompts[:2]), strict=True
    )):  # fmt: skip
        yield "padding on the left changes an embedding"
    if any(_difference(a, b) > tolerance for a, b in zip(
        alone, _read(retriever, prompts), strict=True
    )):  # fmt: skip
        yield "a batch that mixes pictures and text changes an embedding"
    sampled = sample(retriever, prompts, draws=None, max_completion_length=WRITTEN)
    for i, prompt in enumerate(prompts):
        real = sampled.mask[i]
        _, again = retriever.read_out(
            inputs.collate([prompt], retriever.device), sampled.ids[i : i + 1, real],
            real[None, real],
        )  # fmt: skip
        if _difference(sampled.embeddings[i], again[0]) > tolerance:
            yield "decoding with a cache gives other hidden states than reading at once"


def _read(retriever: Retriever, prompts: Sequence[Prompt]) -> Tensor:
    """[R, 1 + T, H]: states of the prompts' ends and of a summary, closed by [RET]."""
    inputs = retriever.inputs
    summary = [*inputs.text_ids("a red dog in wet grass")[: WRITTEN - 1], *inputs.closing]
    ids = torch.tensor(summary, device=retriever.device).expand(len(prompts), -1)
    batch = inputs.collate(prompts, retriever.device)
    return retriever.hidden_states(batch, ids, torch.ones_like(ids, dtype=torch.bool))


def _own_forward(retriever: Retriever, prompt: Prompt) -> Any:
    """What the model itself makes of the same tokens and pixels, positions being its own matter."""
    inputs, device = retriever.inputs, retriever.device
    summary = [*inputs.text_ids("a red dog in wet grass")[: WRITTEN - 1], *inputs.closing]
    ids = torch.cat([prompt.input_ids, torch.tensor(summary)])[None].to(device)
    given = {} if prompt.image is None else dict(inputs.pixels(prompt.image))
    for name in ("mm_token_type_ids", "token_type_ids"):  # Qwen's, and Gemma's
        if name in signature(retriever.plain.forward).parameters:
            given[name] = (ids == inputs.image_id).int()
    return retriever.plain(
        input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True,
        use_cache=False, **{k: v.to(device) for k, v in given.items()},
    )  # fmt: skip


def _difference(one: Tensor, other: Tensor) -> float:
    """Largest distance of two rows to the norm of the first, over [..., H]."""
    distance = (one.double() - other.double()).norm(dim=-1) / one.double().norm(dim=-1)
    return float(distance.max())


def _picture(seed: int, size: tuple[int, int]) -> Image.Image:
    """Coarse noise, `size` pixels wide and high."""
    drawn = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(drawn).resize(size, Image.Resampling.NEAREST)
