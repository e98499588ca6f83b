"""What a stage takes, before it starts: steps, memory by part, disk; counted, not measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from transformers import AutoConfig

from elva.model.note import base_of
from elva.model.pictures import AHEAD_MB, KEPT_MB
from elva.model.rollout import LOGITS_AT_ONCE
from elva.model.vision import FEATURES_KEPT_MB
from elva.recipe import ModelConfig, Recipe, StageConfig

if TYPE_CHECKING:
    from elva.training.measure import Measured

_FP32 = 4
_PICTURE_TOKENS = 391  # ours: of 640 x 480 pixels by Qwen2-VL's 28 x 28, where no picture was seen
_WORDS = 40  # ours: of a prompt beside its picture, the chat's template included
_SAMPLED = (
    3 * _FP32 + 8
)  # bytes an id of a distribution that is drawn from: logits, p, sums in fp64

_NOT_COUNTED = "epochs over data that is not here"
_TOWER_KEPT = 18
"""Times its width a layer of a vision tower keeps of a patch: what enters and leaves two norms,
queries and keys before and after they are turned, values, what attention read, and four times two
inside."""
_LOGITS_KEPT = 4
"""Copies of a completion's logits in fp32: two for the backward, and their gradients."""


@dataclass(frozen=True)
class Sizes:
    """Of a model: parameters in all and in its vision tower, and the widths of its layers."""

    parameters: int
    vision: int
    hidden: int
    layers: int
    queries: int  # heads times a head's size
    keys: int  # of grouped heads likewise
    inner: int  # of the feed-forward
    vocabulary: int
    tied: bool
    features: int  # of a picture's token
    prompt: int  # tokens, with a picture
    picture: int  # those of the picture, each of four patches
    tower: int  # width of the vision tower
    tower_layers: int
    patch: int  # values of a picture's patch

    def adapter(self, rank: int) -> int:
        """Parameters of an adapter on q, k, v, o, gate, up, down, and the rows of [RET]."""
        h, q, k, i = self.hidden, self.queries, self.keys, self.inner
        widths = 2 * (h + q) + 2 * (h + k) + 3 * (h + i)
        return rank * self.layers * widths + h * (1 if self.tied else 2)


def sizes_of(model: ModelConfig) -> Sizes | None:
    """Of a model from scratch, of a checkpoint at hand, or what the recipe says of one; None where
    it does not say."""
    if model.path is None:
        return _of_scratch(model)
    model = at_hand(model)
    h, layers, inner, keys = (
        model.hidden_size, model.layers, model.intermediate_size, model.key_value_size,
    )  # fmt: skip
    if None in (model.parameters, h, layers, inner, keys, model.vocabulary_size):
        return None
    assert model.parameters and h and layers and inner and keys and model.vocabulary_size
    return Sizes(
        model.parameters, model.vision_parameters, h, layers, model.query_size or h, keys, inner,
        model.vocabulary_size, model.tied, h * (1 + model.deepstack), _PICTURE_TOKENS + _WORDS,
        _PICTURE_TOKENS, model.vision_size, model.vision_layers, model.patch_values,
    )  # fmt: skip


def _of_scratch(model: ModelConfig) -> Sizes:
    s = model.scratch
    h, i, v, merged = s.hidden_size, s.intermediate_size, s.vision_size, 4 * s.vision_size
    layer = 4 * h * h + 3 * h + 3 * h * i + 2 * h
    block = 12 * v * v + 13 * v
    vision = 3 * s.patch_size**2 * v + s.vision_layers * block
    vision += 2 * v + merged * (merged + 1) + (merged + 1) * h
    text = s.layers * layer + h + s.vocabulary * h
    picture = (s.image_size // s.patch_size // 2) ** 2
    return Sizes(
        text + vision, vision, h, s.layers, h, h, i, s.vocabulary, True, h, picture + 16,
        picture, v, s.vision_layers, 3 * s.patch_size**2,
    )  # fmt: skip


def at_hand(model: ModelConfig) -> ModelConfig:
    """The configuration with the sizes of its checkpoint, where that is a directory here."""
    if model.path is None or not (Path(model.path) / "config.json").is_file():
        return model
    config = AutoConfig.from_pretrained(model.path)
    text = config.get_text_config()
    heads = text.num_attention_heads
    head = getattr(text, "head_dim", None) or text.hidden_size // heads
    parameters = vision = 0
    for file in sorted(base_of(Path(model.path)).glob("*.safetensors")):
        with safe_open(file, "numpy") as weights:
            for name in weights.keys():  # noqa: SIM118 - no mapping
                shape = weights.get_slice(name).get_shape()
                parameters += math.prod(shape)
                vision += math.prod(shape) if "visual" in name or "vision" in name else 0
                if name.endswith("embed_tokens.weight") and shape[1] != text.hidden_size:
                    raise ValueError(
                        f"config.json says hidden_size {text.hidden_size}, its weights {shape[1]}"
                    )
    seen = config.vision_config
    deepstack = getattr(seen, "deepstack_visual_indexes", None) or []
    patch = 3 * getattr(seen, "temporal_patch_size", 1) * seen.patch_size**2
    return replace(
        model, parameters=parameters or None, hidden_size=text.hidden_size,
        layers=text.num_hidden_layers, intermediate_size=text.intermediate_size,
        query_size=heads * head,
        key_value_size=head * (getattr(text, "num_key_value_heads", None) or heads),
        vocabulary_size=text.vocab_size, vision_parameters=vision, deepstack=len(deepstack),
        tied=bool(config.tie_word_embeddings), patch_values=patch,
        vision_size=getattr(seen, "embed_dim", None) or seen.hidden_size,
        vision_layers=getattr(seen, "depth", None) or seen.num_hidden_layers,
    )  # fmt: skip


# -- memory ----------------------------------------------------------------------------------------


def memory_bytes(
    stage: StageConfig, recipe: Recipe, found: Mapping[str, Any] | None = None
) -> dict[str, float] | None:
    """Part -> bytes on a stage's device, and their most at once (`peak`): the backward's or the
    rollout's, whichever is more.

    Args:
        found: what the stage's data hold (`readiness.Ready.stages`), and `prompt_tokens` and
            `picture_tokens`, where they were counted.
    """
    sizes = sizes_of(recipe.model)
    if sizes is None:
        return None
    if found and "prompt_tokens" in found:
        sizes = replace(sizes, prompt=found["prompt_tokens"], picture=found["picture_tokens"])
    width, trained = _width(recipe), _trained(stage, sizes)
    whole = stage.lora.rank == 0
    frozen = sizes.parameters - (trained if whole else 0)
    moments = 0 if recipe.trainer.get("optim") == "sgd" else 2
    parts: dict[str, float] = {
        "weights": frozen * width + trained * _FP32,
        "gradients": trained * _FP32,
        "optimizer": moments * trained * _FP32,
        "reference": stage.holds * (trained * _FP32 + whole * frozen * width),
        "features": _features(stage, sizes, found or {}, width),
        "pixels": _pixels(stage, sizes, found or {}),
        "activations": _activations(stage, recipe, sizes, found or {}),
        "kv_cache": 0,
        "sampling": 0,
    }
    held = sum(parts[name] for name in ("weights", "optimizer", "reference", "features", "pixels"))
    if stage.completions == "sampled":
        rows = min(stage.rollout_batch_size, sequences_a_step(stage))
        tokens = sizes.prompt + stage.max_completion_length + 1
        at_once = max(1, LOGITS_AT_ONCE // sizes.vocabulary)
        parts["kv_cache"] = rows * tokens * sizes.layers * 2 * sizes.keys * width
        parts["sampling"] = min(rows, at_once) * sizes.vocabulary * _SAMPLED
    backward = parts["gradients"] + parts["activations"]
    return {**parts, "peak": held + max(backward, parts["kv_cache"] + parts["sampling"])}


def _width(recipe: Recipe) -> int:
    """Bytes of a weight that is not trained, and of what is computed."""
    return 2 if recipe.trainer.get("bf16") else _FP32


def _trained(stage: StageConfig, sizes: Sizes) -> int:
    """Parameters that a stage trains: all, without a frozen tower, or those of its adapter."""
    if stage.lora.rank:
        return sizes.adapter(stage.lora.rank) + stage.train_vision * sizes.vision
    return sizes.parameters - (0 if stage.train_vision else sizes.vision)


def _features(stage: StageConfig, sizes: Sizes, found: Mapping[str, Any], width: int) -> float:
    """Of pictures that a frozen tower has seen: a step's, and all others that the cache holds."""
    one = sizes.picture * sizes.features * width
    a_step = sequences_a_step(stage) // stage.num_generations
    every = float(found.get("pictures", math.inf)) * one
    return 0.0 if stage.train_vision else min(every, max(a_step * one, FEATURES_KEPT_MB << 20))


def _pixels(stage: StageConfig, sizes: Sizes, found: Mapping[str, Any]) -> float:
    """Of pictures that are kept, and of those that are cut ahead; they lie in main memory, and so
    are counted where the model does."""
    if torch.cuda.is_available():
        return 0.0
    one, every = 4 * sizes.picture * sizes.patch * _FP32, float(found.get("pictures", math.inf))
    a_step = sequences_a_step(stage) // stage.num_generations
    seen, ahead = min(every, a_step * (stage.steps or math.inf)), min(every, a_step)
    if stage.embeds_pools:
        seen, ahead = every, min(every, 2 * stage.rollout_batch_size)
    kept = min(seen * one, KEPT_MB << 20) if seen else 0.0
    return kept + min(ahead * one, AHEAD_MB << 20)


def _activations(
    stage: StageConfig, recipe: Recipe, sizes: Sizes, found: Mapping[str, Any]
) -> float:
    """Bytes that a micro-batch keeps for its backward, in the language model and its head, and in a
    tower that learns; the matrix of attention is not kept."""
    width = _width(recipe)
    rows = min(stage.micro_batch_size, sequences_a_step(stage))
    prompts = -(-rows // stage.num_generations)  # each is read once for its completions
    tokens = prompts * sizes.prompt + rows * (stage.max_completion_length + 1)
    h, q, k, i = sizes.hidden, sizes.queries, sizes.keys, sizes.inner
    repeated = 2 * q if k < q else 0  # keys and values of grouped heads, one for each of their own
    # Of each token: what enters two norms, in fp32, what leaves them, and what two sums are of;
    # queries, what attention read and its sums; keys and values; four values inside.
    layer = h * (2 * _FP32 + 4 * width) + (3 * q + 2 * k + repeated + 4 * i) * width
    kept = sizes.layers * layer
    if recipe.trainer.get("gradient_checkpointing"):
        kept = sizes.layers * h * width + layer
    words = stage.lm + stage.ret + stage.anchor + stage.policy > 0
    logits = rows * stage.max_completion_length * sizes.vocabulary * words
    pictures = min(prompts, found.get("pictures", prompts)) * stage.train_vision
    of_patch = sizes.tower_layers * _TOWER_KEPT * sizes.tower * width + sizes.patch * _FP32
    tower = pictures * 4 * sizes.picture * of_patch
    return tokens * kept + _LOGITS_KEPT * _FP32 * logits + tower


# -- disk and steps --------------------------------------------------------------------------------


def disk_bytes(stage: StageConfig, recipe: Recipe) -> dict[str, float] | None:
    """Part -> bytes of a stage on disk: its model, and, while it trains, the checkpoints that are
    kept and one more that is written."""
    sizes = sizes_of(recipe.model)
    if sizes is None:
        return None
    trained = _trained(stage, sizes)
    whole = stage.lora.rank == 0 or stage.train_vision  # else the adapter alone, beside its base
    return {
        "model": _FP32 * (sizes.parameters if whole else trained),
        "checkpoints": (recipe.save_total_limit + 1) * 3 * _FP32 * trained,
    }


def steps_of(stage: StageConfig, limit: int | None, an_epoch: int | None) -> int | None:
    """Steps of a stage; None where its epochs are over data that nobody has counted."""
    steps = stage.steps
    if steps is None and stage.epochs is not None:
        if an_epoch is None and stage.instances is not None:
            an_epoch = -(-stage.instances // stage.batch_size)
        steps = None if an_epoch is None else max(1, round(stage.epochs * an_epoch))
    return min(steps, limit) if limit and steps else steps


def sequences_a_step(stage: StageConfig) -> int:
    """Rollouts a step: G of each query, its positive, and its negatives where they are rolled
    out."""
    rolled = 1 if stage.rollout_candidates == "query" or not stage.embeds else 2
    if stage.embeds and not stage.banks:
        rolled += stage.negatives.count
    return stage.batch_size * rolled * stage.num_generations


def describe(
    recipe: Recipe,
    limit: int | None = None,
    found: Mapping[str, Mapping[str, Any]] | None = None,
    measured: Mapping[str, Measured | str] | None = None,
) -> dict[str, Any]:
    """Plain data: the recipe itself, and of every stage its steps, hours, memory and disk in MB.

    Args:
        found: of a stage whose data are at hand, what they hold (`readiness.Ready.stages`).
        measured: of those the seconds of a step, or why they are not known.
    """
    found, measured = found or {}, measured or {}
    recipe = replace(recipe, model=at_hand(recipe.model))
    last = list(recipe.stages.values())[-1]
    controls = {
        name: stage if stage.steps or stage.epochs else replace(stage, steps=last.steps)
        for name, stage in recipe.controls.items()
    }
    filled = replace(recipe, controls=controls)
    names = [*recipe.stages, *(name for name in recipe.controls if name in found)]
    stages = {
        name: _described(name, filled, limit, found.get(name, {}), measured.get(name))
        for name in names
    }
    for name in names:
        if stages[name]["steps"] is None:
            stages[name]["steps"] = _NOT_COUNTED
            stages[name]["hours"] = f"not known: {_NOT_COUNTED}"
    sizes = sizes_of(recipe.model)
    parameters = None if sizes is None else sizes.parameters
    known = [stage["hours"] for stage in stages.values()]
    counted = all(isinstance(one, float) for one in known)
    hours = round(sum(known), 4) if counted else "not known of every stage"
    return {"recipe": asdict(recipe), "parameters": parameters, "plan": stages, "hours": hours}


def _described(
    name: str, recipe: Recipe, limit: int | None, data: Mapping[str, Any],
    measured: Measured | str | None,
) -> dict[str, Any]:  # fmt: skip
    stage = recipe.stages.get(name) or recipe.controls[name]
    steps = steps_of(stage, limit, data.get("steps_an_epoch"))
    hours: float | str = measured if isinstance(measured, str) else "not measured: no data here"
    seconds = None
    if measured is not None and not isinstance(measured, str):
        data = {**data, "prompt_tokens": measured.prompt_tokens}
        data["picture_tokens"] = measured.picture_tokens
        seconds = round(measured.step, 3)
        hours = round(measured.hours(stage, steps or 0), 4)
    return {
        "steps": steps,
        "hours": hours,
        "seconds_a_step": seconds,
        "sequences_a_step": sequences_a_step(stage),
        "memory_mb": _megabytes(memory_bytes(stage, recipe, data)),
        "disk_mb": _megabytes(disk_bytes(stage, recipe)),
        **({"data": dict(data)} if data else {}),
    }


def _megabytes(parts: Mapping[str, float] | None) -> dict[str, int] | None:
    return None if parts is None else {k: math.ceil(v / 2**20) for k, v in parts.items()}
