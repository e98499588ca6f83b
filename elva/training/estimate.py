"""`elva train --dry-run`: the resolved recipe, its steps, and what memory it will take."""

from collections.abc import Mapping
from typing import Any

from elva.recipe import ModelConfig, Recipe, StageConfig, to_dict

_BYTES = 4  # fp32; 2 under bf16
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
    width = 2 if recipe.trainer.get("bf16") else _BYTES
    parameters = count_parameters(recipe.model)
    stages = {
        name: {
            "steps": _steps(stage, limit, found.get(name, {}).get("steps_an_epoch")),
            "sequences_a_step": _sequences(stage),
            "memory_mb": _megabytes(_states(stage, parameters, width)),
            "activations_mb": _megabytes(_activations(stage, recipe.model, width)),
            **({"data": dict(found[name])} if name in found else {}),
        }
        for name, stage in recipe.stages.items()
    }
    return {"recipe": to_dict(recipe), "parameters": parameters, "plan": stages}


def state_bytes(stage: StageConfig | None, recipe: Recipe) -> float | None:
    """Bytes on disk of what a stage trains, with Adam's moments; of the model for None."""
    parameters = count_parameters(recipe.model)
    if parameters is None:
        return None
    if stage is None:
        return float(parameters * (2 if recipe.trainer.get("bf16") else _BYTES))
    return 3 * _BYTES * parameters * _trained_share(stage)


def _trained_share(stage: StageConfig) -> float:
    return 1.0 if stage.lora.rank == 0 else 0.02  # an adapter of rank 64-128 on every projection


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


def _states(stage: StageConfig, parameters: int | None, width: int) -> float | None:
    """Bytes of weights, gradients and Adam's two moments of what is trained, and the KL
    reference."""
    if parameters is None:
        return None
    share = _trained_share(stage)
    copies = 1.0 + 3 * share
    if stage.holds and stage.lora.rank == 0:
        copies += 1.0
    return parameters * width * copies


def _activations(stage: StageConfig, model: ModelConfig, width: int) -> float | None:
    """Bytes that a micro-batch keeps for its backward, in the language model.

    17 values a token, layer and hidden unit (Korthikanti et al., arXiv:2205.05198, table 2, without
    the attention matrix, which is not kept), and the logits of the completion in fp32, with their
    gradient.
    """
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
