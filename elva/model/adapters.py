"""LoRA adapters beside a model that stays as it was: begun, continued, kept as a reference, saved.

A merge into bf16 rounds away what a small learning rate changes: 78 % of the norm of a hundred
steps at 1e-6 (tests/elva/test_adapters.py). So weights and adapter are two things until somebody
asks for one in fp32.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from elva.errors import RunError, UserError
from elva.model.family import decoder_of
from elva.model.reading import find
from elva.recipe import LoraSettings

FOLDER = "adapter"
"""Of a checkpoint of ours that is an adapter, in peft's own format; somebody else's lies at its
checkpoint's top."""

_CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_FURTHER = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save")
"""What somebody else's adapter may have, and a learner that goes on from it cannot."""

LEARNER, REFERENCE = "default", "reference"
"""The adapter that is trained and read, and the one that the stage began with."""


@dataclass(frozen=True)
class Base:
    """The checkpoint that an adapter stands on.

    Args:
        path: a directory or a hub name.
        revision: of a hub name.
        ret_is_new: whether its vocabulary lacks [RET], which then began as its chat's end.
    """

    path: str
    revision: str | None
    ret_is_new: bool

    @property
    def place(self) -> tuple[str, str | None]:
        """Path and revision."""
        return self.path, self.revision

    def seen_from(self, directory: Path) -> dict[str, str | bool | None]:
        """As it is written beside an adapter in `directory`: relative within one run, which may
        move, else absolute; a hub name as it is."""
        there = Path(self.path)
        if not there.exists():
            return asdict(self)
        run = directory.absolute().parent.parent
        where = there.resolve()
        if where.is_relative_to(run.resolve()):
            where = Path(os.path.relpath(where, directory.resolve()))
        return {**asdict(self), "path": str(where)}

    @classmethod
    def read(cls, directory: Path, written: dict[str, str | bool | None]) -> Base:
        """What `seen_from` wrote.

        Raises:
            RunError: it was a directory and has gone.
        """
        path, revision = str(written["path"]), written["revision"]
        beside = Path(os.path.normpath(directory.absolute() / path))
        if beside.is_dir():
            path = str(beside)
        elif path.startswith((".", "/")):
            raise RunError(
                f"{directory}: the checkpoint that its adapter stands on must be at {beside}, got "
                "none; put it back, or keep runs together with what they began with"
            )
        return cls(path, None if revision is None else str(revision), bool(written["ret_is_new"]))


def begin(
    model: PreTrainedModel | PeftModel, settings: LoraSettings, rows: list[int], *, keep: bool
) -> PeftModel:
    """The model with an adapter that learns: a fresh one, or one that goes on from the model's own.

    Its layers are those of the language model, or those of the adapter that it goes on from; the
    rows of [RET] are trained beside them, that of the head too where it has rows of its own.

    Args:
        rows: of the vocabulary that learn: [RET]'s, where the model knows it.
        keep: whether the adapter that the model came with stays, frozen, as the reference.

    Raises:
        UserError: it cannot go on from the adapter that there is.
    """
    if not isinstance(model, PeftModel):
        return get_peft_model(model, _config(model, settings, rows))
    before = model.peft_config[LEARNER]
    assert isinstance(before, LoraConfig)
    if kind := next((name for name in _FURTHER if getattr(before, name)), None):
        raise UserError(
            f"train: lora.rank must be 0 for an adapter with {kind}, got {settings.rank}; rank 0 "
            "merges it in fp32 and trains all weights"
        )
    if settings.rank < before.r:
        raise UserError(
            f"train: lora.rank must be {before.r} or more, the rank of the adapter that the stage "
            f"goes on from, got {settings.rank}; or start from its elva export, a model without one"
        )
    state = _state(model, LEARNER)
    plain = model.unload()
    config = copy.deepcopy(before)
    config.r, config.lora_alpha, config.inference_mode = settings.rank, settings.alpha, False
    learner = get_peft_model(plain, config)
    _fill(learner, LEARNER, state, before.lora_alpha / before.r * config.r / config.lora_alpha)
    if keep:
        learner.add_adapter(REFERENCE, copy.deepcopy(before))
        _fill(learner, REFERENCE, state)
        learner.set_adapter(LEARNER)
    return learner


def _state(model: PeftModel, name: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = get_peft_model_state_dict(
        model, adapter_name=name, save_embedding_layers=False
    )
    return found


def _fill(model: PeftModel, name: str, state: Mapping[str, Tensor], scale: float = 1.0) -> None:
    """Give an adapter its weights, in fp32 or wider: also the rows of [RET], which peft makes in
    the model's dtype."""
    for key, parameter in model.named_parameters():
        if re.search(rf"\.{name}(\.|$)", key):
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    grown = {k: _grown(k, state[k], like, scale) for k, like in _state(model, name).items()}
    set_peft_model_state_dict(model, grown, adapter_name=name)


def _grown(key: str, value: Tensor, like: Tensor, scale: float) -> Tensor:
    """A pair's half at a higher rank that gives the same product: further rows of A as they are
    drawn, further columns of B zero, and B rescaled where alpha / rank has changed."""
    grown = like.detach().clone()
    if "lora_A" in key:
        grown[: len(value)] = value
    elif "lora_B" in key:
        grown.zero_()
        grown[:, : value.shape[1]] = value * scale
    else:
        grown.copy_(value)
    return grown


def _config(model: PreTrainedModel, settings: LoraSettings, rows: list[int]) -> LoraConfig:
    tables = {"embed_tokens": rows}
    if model.lm_head.weight is not model.get_input_embeddings().weight:
        tables["lm_head"] = rows
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=0.0,
        target_modules=_projections(model),
        trainable_token_indices=tables if rows else None,
    )


def _projections(model: PreTrainedModel) -> str:
    """A regular expression of the language model's linear layers: query, key, value, output and
    the three of the feed-forward part in Qwen's; the head is none of them."""
    decoder = decoder_of(model)
    place = next(name for name, module in model.named_modules() if module is decoder)
    kinds = {n.rpartition(".")[2] for n, m in decoder.named_modules() if isinstance(m, nn.Linear)}
    return rf".*{re.escape(place)}\..*\.({'|'.join(sorted(kinds))})"


@contextmanager
def reference(model: PeftModel) -> Iterator[None]:
    """The model as its stage began: with the adapter that it came with, or with none."""
    if REFERENCE not in model.peft_config:
        with model.disable_adapter():
            yield
        return
    model.set_adapter(REFERENCE, inference_mode=True)
    try:
        yield
    finally:
        model.set_adapter(LEARNER)


def save(model: PeftModel, directory: Path) -> None:
    """The learner in peft's format, fp32 as it was trained."""
    model.save_pretrained(
        str(directory / FOLDER), selected_adapters=[LEARNER], save_embedding_layers=False
    )


def load(model: PreTrainedModel, folder: Path) -> PeftModel:
    """An adapter in peft's format, on its base; nothing learns, and nothing is dropped out.

    Raises:
        UserError: it is another kind of adapter, or one of another model.
    """
    config = PeftConfig.from_pretrained(str(folder))
    unfit = f"train: model.path must be a LoRA adapter of its base, got {folder}"
    if not isinstance(config, LoraConfig):
        raise UserError(f"{unfit} of peft's {config.peft_type}; merge it with its own tools")
    config.lora_dropout, config.base_model_name_or_path = 0.0, model.name_or_path
    found = get_peft_model(model, config)
    state = load_file(folder / WEIGHTS)
    if other := sorted({*state} ^ {*_state(found, LEARNER)}):
        raise UserError(
            f"{unfit}, which has {len(other)} other weights than it, first {other[0]}; merge it by "
            "the version of peft that wrote it"
        )
    _fill(found, LEARNER, state)
    return found.requires_grad_(False)


def folder_of(path: str | Path, revision: str | None = None) -> Path | None:
    """Where the adapter of a checkpoint that is one lies: a directory's or a hub name's."""
    for name in (f"{FOLDER}/", ""):
        config = find(path, name + _CONFIG, revision)
        if config is not None:
            find(path, name + WEIGHTS, revision)  # of a hub name: fetched beside it
            return config.parent
    return None


def base_of_stranger(folder: Path) -> Base:
    """What somebody else's adapter stands on, as peft wrote it."""
    config = PeftConfig.from_pretrained(str(folder))
    return Base(str(config.base_model_name_or_path), config.revision, ret_is_new=False)


def weight_files(directory: Path) -> list[Path]:
    """Those of a checkpoint that hold weights of its own."""
    return sorted([*directory.glob("*.safetensors"), *directory.glob(f"{FOLDER}/*.safetensors")])
