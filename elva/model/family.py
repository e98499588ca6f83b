"""Families of models: how each takes pictures and positions, in as little code as they differ by.

Every family is read by transformers' own classes; nothing here knows how large a model is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from elva.errors import UserError
from elva.model.inputs import Inputs
from elva.model.processor import ProcessorInputs
from elva.model.reading import AT_RET, Reading, find, layout


class _QwenVL:
    """Qwen2-VL and Qwen2.5-VL: rotary positions on three axes, a picture's features in place of its
    placeholders."""

    probed = False
    """Whether a model is tried out when it is read: the class itself is not evidence enough."""

    inputs: type[Inputs] = Inputs

    def features(self, model: PreTrainedModel, pixels: dict[str, Tensor]) -> Tensor:
        """[tokens, W] of one picture, as the tower and its projection give them; differentiable.

        Args:
            pixels: `Inputs.pixels` of it.
        """
        return torch.cat(list(model.model.get_image_features(**pixels).pooler_output))

    def with_pictures(self, embeds: Tensor, features: Tensor, placeholders: Tensor) -> Any:
        """Arguments of the language model that hold words and pictures.

        Args:
            embeds: [R, L, H] of the tokens.
            features: [tokens, W] of all pictures of the rows, in their order.
            placeholders: [R, L] bool, `tokens` of them True.
        """
        rows = features.to(embeds.dtype)
        return {"inputs_embeds": embeds.masked_scatter(placeholders[..., None], rows)}

    def positions(self, position_ids: Tensor) -> Tensor:
        """What the language model takes of [3, R, L]."""
        return position_ids


class _Qwen3VL(_QwenVL):
    """Qwen3-VL: features of inner layers of the tower too (deepstack), which are added to the
    states after the first layers of the language model. They stand behind a token's embedding:
    W = H * (1 + their number)."""

    def features(self, model: PreTrainedModel, pixels: dict[str, Tensor]) -> Tensor:
        out = model.model.get_image_features(**pixels)
        levels = (out.pooler_output, *out.deepstack_features)
        return torch.cat([torch.cat(list(level)) for level in levels], -1)

    def with_pictures(self, embeds: Tensor, features: Tensor, placeholders: Tensor) -> Any:
        first, *deeper = features.split(embeds.shape[-1], -1)
        return {
            **super().with_pictures(embeds, first, placeholders),
            "visual_pos_masks": placeholders,
            "deepstack_visual_embeds": deeper,
        }


class _ImageTextToText(_QwenVL):
    """Any other image-text-to-text model of transformers, read through its own processor, with
    positions on one axis; `probe` says whether that is how it works."""

    probed = True
    inputs = ProcessorInputs

    def positions(self, position_ids: Tensor) -> Tensor:
        return position_ids[0]


KNOWN = {"qwen2_vl": _QwenVL(), "qwen2_5_vl": _QwenVL(), "qwen3_vl": _Qwen3VL()}
"""Families by `model_type`, each equal to its model's own forward in a test."""

OTHER = _ImageTextToText()

HEAD = "lm_head.weight"

WORDS = ("tokenizer_config.json",)
PICTURES = ("preprocessor_config.json", "processor_config.json")
_VOCABULARY = ("tokenizer.json", "vocab.json", "tokenizer.model", "vocab.txt", "spiece.model")
"""Files of which a checkpoint that reads words, and pictures, has one."""

DAMAGED = (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError)
"""What reading a checkpoint raises of which a part is missing or damaged."""


def takes_pictures(model_type: object) -> bool:
    """Whether transformers has an image-text-to-text model of a type."""
    return model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def family_of(config: PreTrainedConfig) -> _QwenVL:
    """The family of a checkpoint's configuration."""
    return KNOWN.get(config.model_type, OTHER)


def read_inputs(
    path: str | Path,
    summary_prompt: str,
    revision: str | None = None,
    *,
    reading: Reading = AT_RET,
    base: tuple[str | Path, str | None] | None = None,
) -> Inputs:
    """What stands between an item and the model, of a checkpoint directory or a hub name.

    Args:
        base: the checkpoint that an adapter stands on, and its revision: it has the config, and
            what reads words and pictures where the adapter brings none of its own.

    Raises:
        UserError: no processor of it can be loaded here.
    """
    stands_on = base or (path, revision)
    config = AutoConfig.from_pretrained(stands_on[0], revision=stands_on[1] or "main")
    if getattr(config, "image_token_id", None) is None:
        raise unreadable(path, config, "no token of its config holds a picture's place")
    brings = [any(find(path, name, revision) for name in names) for names in (WORDS, PICTURES)]
    source = (path, revision) if all(brings) else stands_on
    for names in (PICTURES, _VOCABULARY):
        if not any(find(source[0], name, source[1]) for name in names):
            raise UserError(
                f"train: model.path must be a whole checkpoint, got {source[0]} without "
                f"{names[0]}; fetch it again"
            )
    how: dict[str, Any] = Inputs.of_config(*stands_on)
    if not reading.at_ret:
        how["layout"] = {**layout(*stands_on), **layout(path, revision)}
    try:
        return family_of(config).inputs.load(
            source[0], summary_prompt, source[1], reading=reading, **how
        )
    except (ImportError, AttributeError, TypeError) as error:  # of a processor, or its packages
        raise unreadable(path, config, " ".join(str(error).split())[:200]) from None


def read_model(
    path: str | Path, revision: str | None = None, attention: str | None = None
) -> tuple[PreTrainedModel, bool]:
    """A checkpoint's model, in the dtype that it was written in, and whether it has a head: that of
    a retriever that was published without one is random.

    Args:
        revision: of a hub name: a branch, a tag or a commit.
        attention: transformers' `attn_implementation`; its own choice for None.

    Raises:
        UserError: it is no image-text-to-text model of transformers.
    """
    how: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    config = AutoConfig.from_pretrained(path, revision=revision or "main")
    if not takes_pictures(config.model_type):
        raise unreadable(path, config, "transformers has no image-text-to-text model of this type")
    loaded: Any = AutoModelForImageTextToText.from_pretrained(
        path, dtype="auto", revision=revision or "main", output_loading_info=True, **how
    )
    model: PreTrainedModel = loaded[0]
    missing = set(loaded[1]["missing_keys"])
    inner = getattr(model, "model", None)
    if not hasattr(inner, "get_image_features") or decoder_of(model) is inner:
        raise unreadable(path, config, "its pictures and its language model are one module")
    if lost := sorted(missing - {HEAD}):
        raise unreadable(path, config, f"{len(lost)} of its weights are missing, first {lost[0]}")
    return model, HEAD not in missing


def has_head(path: str | Path, revision: str | None = None) -> bool:
    """Whether a checkpoint's model writes, by its files: its head is there, or is its embedding."""
    config = AutoConfig.from_pretrained(path, revision=revision or "main")
    if any(getattr(c, "tie_word_embeddings", False) for c in (config, config.get_text_config())):
        return True
    if weights := find(path, SAFE_WEIGHTS_NAME, revision):
        with safe_open(weights, "pt") as file:
            names = list(file.keys())
    elif index := find(path, SAFE_WEIGHTS_INDEX_NAME, revision):
        names = list(json.loads(index.read_text("utf-8"))["weight_map"])
    else:
        return True  # in a form that only reading it tells of
    return any(name.endswith(HEAD) for name in names)


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The language model inside, without its head."""
    decoder: nn.Module = model.model.get_decoder()
    return decoder


def unreadable(path: str | Path, config: PreTrainedConfig, reason: str) -> UserError:
    """The one line that is said of a model that does not fit."""
    return UserError(
        f"train: model.path must be a model that takes pictures and text as ELVA gives them, got "
        f"{path} of type {config.model_type}: {reason}; choose Qwen2-VL, Qwen2.5-VL or Qwen3-VL"
    )
