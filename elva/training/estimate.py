"""`elva train --dry-run`: the resolved recipe, its steps, and what memory it will take."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import AutoConfig

from elva.recipe import ModelConfig, Recipe, StageConfig, to_dict

_FP32 = 4
_ADAPTER_WIDTHS = 25
"""Sum of the widths that an adapter's pairs join, in hidden sizes: 25.1 of Qwen2-VL-7B's layer."""
_PROMPT_TOKENS = 256  # of a prompt with a picture, where no picture has been seen yet
_QWEN_VOCABULARY = 151_936


def describe(
    recipe: Recipe, limit: int | None = None, found: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """Plain data: the recipe itself, and for every stage its steps and a memory estimate in MB.

    Args:
        found: of a stage whose data are at hand, what they hold (`readiness.Ready.stages`).
    """
    found = found or {}
    recipe = replace(recipe, model=at_hand(recipe.model))
    stages = {
        name: {
            "steps": _steps(stage, limit, found.get(name, {}).get("steps_an_epoch")),
            "sequences_a_step": _sequences(stage),
            "memory_mb": _megabytes(_states(stage, recipe)),
            "activations_mb": _megabytes(_activations(stage, recipe)),
            **({"data": dict(found[name])} if name in found else {}),
        }
        for name, stage in recipe.stages.items()
    }
    return {
        "recipe": to_dict(recipe), "parameters": count_parameters(recipe.model), "plan": stages
    }  # fmt: skip


def memory_bytes(stage: StageConfig, recipe: Recipe) -> float | None:
    """Bytes that a stage takes on its device: weights, optimiser, one micro-batch."""
    parts = (_states(stage, recipe), _activations(stage, recipe))
    return None if None in parts else sum(p for p in parts if p is not None)


def model_bytes(recipe: Recipe) -> float | None:
    """Bytes of a stage's model on disk."""
    parameters = count_parameters(recipe.model)
    whole = any(stage.lora.rank == 0 for stage in recipe.stages.values())  # trained, so in fp32
    width = _FP32 if whole else _width(recipe)
    return None if parameters is None else float(parameters * width)


def checkpoint_bytes(stage: StageConfig, recipe: Recipe) -> float | None:
    """Bytes of a checkpoint inside a stage: what is trained, and Adam's two moments of it."""
    trained = _trained(stage, recipe)
    return None if trained is None else 3.0 * _FP32 * trained


def at_hand(model: ModelConfig) -> ModelConfig:
    """The configuration with the sizes of its checkpoint, where that is a directory here."""
    if model.path is None or not (Path(model.path) / "config.json").is_file():
        return model
    text = AutoConfig.from_pretrained(model.path).get_text_config()
    parameters = 0
    for file in sorted(Path(model.path).glob("*.safetensors")):
        with safe_open(file, "numpy") as weights:
            for name in weights.keys():  # noqa: SIM118 (no mapping)
                shape = weights.get_slice(name).get_shape()
                parameters += math.prod(shape)
                if name.endswith("embed_tokens.weight") and shape[1] != text.hidden_size:
                    raise ValueError(
                        f"config.json says hidden_size {text.hidden_size}, its weights {shape[1]}"
                    )
    return replace(
        model, parameters=parameters or None, hidden_size=text.hidden_size,
        layers=text.num_hidden_layers,
    )  # fmt: skip


def count_parameters(model: ModelConfig) -> int | None:
    """Of a model from scratch by its shape; of a checkpoint what the recipe says."""
    if model.path is not None:
        return model.parameters
    s = model.scratch
    text = s.layers * (4 * s.hidden_size**2 + 3 * s.hidden_size * s.intermediate_size)
    vision = 3 * s.patch_size**2 * s.vision_size + s.vision_layers * 12 * s.vision_size**2
    merged = 4 * s.vision_size
    return text + s.vocabulary * s.hidden_size + vision + merged * (merged + s.hidden_size)


def _steps(stage: StageConfig, limit: int | None, an_epoch: int | None) -> int | str:
    steps = stage.steps
    if steps is None and stage.epochs is not None and an_epoch is not None:
        steps = max(1, round(stage.epochs * an_epoch))
    if steps is None and stage.epochs is not None and stage.instances is not None:
        steps = max(1, round(stage.epochs * stage.instances / stage.batch_size))
    if steps is None:
        return f"{stage.epochs:g} epochs over {stage.data}, not counted yet"
    return min(steps, limit) if limit else steps


def _sequences(stage: StageConfig) -> int:
    """Rollouts a step: G of each query, its positive, and its negatives where they are rolled
    out."""
    rolled = 1 if stage.rollout_candidates == "query" or not stage.embeds else 2
    if stage.embeds and not stage.banks:
        rolled += stage.negatives.count
    return stage.batch_size * rolled * stage.num_generations


def _width(recipe: Recipe) -> int:
    """Bytes of a weight that is not trained."""
    return 2 if recipe.trainer.get("bf16") else _FP32


def _trained(stage: StageConfig, recipe: Recipe) -> float | None:
    """Parameters that a stage trains: all, or those of its adapter."""
    if stage.lora.rank == 0:
        return count_parameters(recipe.model)
    model = recipe.model
    hidden = model.scratch.hidden_size if model.path is None else model.hidden_size
    layers = model.scratch.layers if model.path is None else model.layers
    if hidden is None or layers is None:
        return None
    return float(_ADAPTER_WIDTHS * stage.lora.rank * hidden * layers)


def _states(stage: StageConfig, recipe: Recipe) -> float | None:
    """Bytes of weights, gradients, Adam's two moments, and the KL reference. What is trained is in
    fp32."""
    parameters, trained = count_parameters(recipe.model), _trained(stage, recipe)
    if parameters is None or trained is None:
        return None
    if stage.lora.rank:
        return parameters * _width(recipe) + 4 * _FP32 * trained
    return (5 if stage.holds else 4) * _FP32 * parameters


def _activations(stage: StageConfig, recipe: Recipe) -> float | None:
    """Bytes that a micro-batch keeps for its backward, in the language model.

    17 values a token, layer and hidden unit (Korthikanti et al., arXiv:2205.05198, table 2, without
    the attention matrix, which is not kept), and the logits of the completion in fp32, with their
    gradient.
    """
    model, width = recipe.model, _width(recipe)
    s = model.scratch
    prompt = (s.image_size // s.patch_size // 2) ** 2 + 16
    hidden, layers, vocabulary = s.hidden_size, s.layers, s.vocabulary
    if model.path is not None:
        if model.hidden_size is None or model.layers is None:
            return None
        prompt, vocabulary = _PROMPT_TOKENS, _QWEN_VOCABULARY
        hidden, layers = model.hidden_size, model.layers
    sequences = min(stage.micro_batch_size, _sequences(stage))
    tokens = sequences * (prompt + stage.max_completion_length)
    logits = sequences * stage.max_completion_length * vocabulary
    return 17 * tokens * layers * hidden * width + 2 * 4 * logits


def _megabytes(size: float | None) -> int | None:
    return None if size is None else round(size / 2**20)
