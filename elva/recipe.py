"""Recipes: frozen dataclasses, the paper's two rows, and the one that runs anywhere (`emoji`).

Every field can be set from YAML (`--config file.yaml`) and from the command line (`--set a.b=c`);
an unknown or ill-typed key is an error that names it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from elva.errors import UserError


class ConfigError(UserError):
    """A recipe that cannot be resolved; one line that says what to do."""


@dataclass(frozen=True)
class ScratchModel:
    """A Qwen2-VL of our own size, created from random weights."""

    hidden_size: int = 128
    intermediate_size: int = 384
    layers: int = 2
    heads: int = 4
    vocabulary: int = 3000
    image_size: int = 60  # pixels a side: 6 x 6 patches, 9 tokens
    image_mean: float = 0.8  # ours: of the emoji pictures; CLIP's 0.46 leaves their paper at +2
    image_std: float = 0.3
    patch_size: int = 10
    vision_size: int = 128
    vision_layers: int = 2
    vision_heads: int = 4
    initializer_range: float = 0.06  # ours: Qwen2-VL's 0.02 is for widths ten times as large


@dataclass(frozen=True)
class LoraSettings:
    """An adapter on the language model (rank 0 trains all its weights)."""

    rank: int = 0
    alpha: int = 128


@dataclass(frozen=True)
class ModelConfig:
    """What is trained. `path` (a directory or a hub name) or, where it is None, `scratch`."""

    path: str | None = None
    scratch: ScratchModel = ScratchModel()
    summary_prompt: str = ""
    # of a checkpoint that is not at hand, for the memory estimate
    parameters: int | None = None
    hidden_size: int | None = None
    layers: int | None = None


@dataclass(frozen=True)
class RewardConfig:
    """Arguments of `elva_kernels.ranking_reward`, and whether its penalty is normalised.

    `margin` and `rank_penalty` are not printed in the paper: the values here are ours.
    """

    margin: float = 0.1
    rank_penalty: float = 0.01
    w_margin: float = 0.4
    w_rank: float = 0.6
    rank_temperature: float = 0.0


@dataclass(frozen=True)
class StageConfig:
    """One stage: how much of which loss, on which data, for how long.

    loss = lm * L_lm + infonce * L_infonce + pathwise * L_pathwise + policy * (L_policy + beta * KL)
    """

    # what is optimised
    lm: float = 0.0  # next token of the caption, on tokens whose prefix is still the caption's
    infonce: float = 0.0  # in-batch contrastive loss on the [RET] embeddings
    pathwise: float = 0.0  # the reward differentiated through the [RET] embeddings
    policy: float = 0.0  # GRPO: clipped policy gradient on the summaries' tokens (paper, sec. 3.4)
    # data
    data: str = "emoji"  # "emoji" or a directory in M-BEIR's layout
    tasks: Mapping[str, float] = field(
        default_factory=dict
    )  # task -> share of the batches; empty: all the data has
    instances: int | None = None  # size of the training set, for --dry-run before it is at hand
    hard_batches: bool = False  # fill batches with a query's mined neighbours
    # length and optimiser
    steps: int | None = None
    epochs: float | None = None  # where steps is None
    batch_size: int = 64  # queries a step
    micro_batch_size: int = 1024  # sequences a forward and backward
    learning_rate: float = 5e-4
    warmup_ratio: float = 0.03
    schedule: str = "cosine"  # a name of transformers' schedulers
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    train_vision: bool = False
    lora: LoraSettings = LoraSettings()
    # contrastive
    temperature: float = 0.05
    # rollouts
    completions: Literal["gold", "sampled"] = "sampled"
    num_generations: int = 1
    sampling_temperature: float = 1.0
    max_completion_length: int = 16
    rollout_candidates: Literal["all", "query_positive", "query"] = "query_positive"
    # ranking
    rank_against: Literal["pool", "batch"] = "pool"
    """The paper's mined negatives, or the batch's other candidates, whose embeddings are fresh."""
    hard_negatives: int = 50
    random_negatives: int = 50
    max_score: float = 0.99  # a candidate more similar than this is not a negative (sec. 3.4)
    refresh_steps: int | None = None  # embed the pool and mine again every so many steps
    reward: RewardConfig = RewardConfig()
    # grpo, after TRL's names
    beta: float = 0.2
    clip_epsilon: float = 0.2
    num_iterations: int = 1
    scale_rewards: str = "std"

    @property
    def ranks(self) -> bool:
        """Whether this stage's loss looks at rewards."""
        return self.pathwise > 0 or self.policy > 0

    @property
    def mines(self) -> bool:
        """Whether it ranks against negatives mined from the pool."""
        return self.ranks and self.rank_against == "pool"

    @property
    def embeds(self) -> bool:
        """Whether this stage's loss looks at embeddings at all."""
        return self.infonce > 0 or self.ranks


@dataclass(frozen=True)
class Recipe:
    """A whole training: the model, its stages in order, and what stage 3 is compared with."""

    name: str
    model: ModelConfig = ModelConfig()
    stages: Mapping[str, StageConfig] = field(default_factory=dict)
    controls: Mapping[str, StageConfig] = field(default_factory=dict)
    """Alternatives to the last stage: each starts where it started and runs for its wall time."""
    seed: int = 0
    save_seconds: float = 30.0  # between checkpoints inside a stage
    evaluate_batch_size: int = 512
    evaluate_limit: int | None = None
    """At most this many queries, and candidates beside their positives; None for the whole pool."""
    trainer: Mapping[str, Any] = field(default_factory=dict)  # further TrainingArguments


# -- the recipes -----------------------------------------------------------------------------------

_RETRIEVAL = {"t2i": 0.5, "i2t": 0.3, "it2i": 0.2}

_STAGE_2 = StageConfig(
    lm=2.0,  # what limits a model of this size is reading its pictures
    infonce=1.0,
    tasks=_RETRIEVAL,
    steps=250,
    batch_size=64,
    learning_rate=5e-4,
    train_vision=True,
)

_STAGE_3 = replace(
    _STAGE_2,
    lm=1.0,
    tasks={"t2i": 0.6, "i2t": 0.4},
    pathwise=1.0,
    steps=80,
    learning_rate=2e-4,
    train_vision=False,
    rank_against="batch",
    max_score=1.0,  # names are unique here: no candidate is a false negative
    reward=RewardConfig(w_margin=0.0, w_rank=1.0, rank_temperature=0.03),
)

_EMOJI = Recipe(
    name="emoji",
    stages={
        "0": StageConfig(
            lm=1.0,
            completions="gold",
            tasks={"i2t": 0.8, "t2i": 0.12, "it2i": 0.08},
            steps=2200,
            batch_size=24,
            learning_rate=1.2e-3,
            weight_decay=0.7,
            train_vision=True,
        ),
        "1": StageConfig(lm=0.5, infonce=1.0, tasks={"t2t": 1.0}, steps=25, learning_rate=5e-4),
        "2": _STAGE_2,
        "3": _STAGE_3,
    },
    controls={
        "infonce": replace(_STAGE_3, pathwise=0.0, steps=None),
        "grpo": replace(
            _STAGE_3,
            steps=None,
            lm=0.0,
            infonce=0.0,
            pathwise=0.0,
            policy=1.0,
            rank_against="pool",
            num_generations=8,
            batch_size=16,
            reward=RewardConfig(),
        ),
    },
)
"""Real pictures on two cores in minutes. Stage 0, a captioning warm-up, is not the paper's: a model
that starts from random weights must first learn to see and to write; Qwen2-VL already can."""


def _paper(name: str, model: ModelConfig) -> Recipe:
    """Liu et al., ELVA, arXiv:2606.20280, sec. 4.1. LoRA ranks and temperature: LamRA's, which the
    paper builds on; batch sizes are over all devices."""
    prompt = "Analyse the input, summarise it, and end with [RET]."
    common = StageConfig(
        max_completion_length=128,
        micro_batch_size=8,
        lora=LoraSettings(128, 256),
        rollout_candidates="all",
    )
    return Recipe(
        name=name,
        model=replace(model, summary_prompt=prompt),
        stages={
            "1": replace(
                common, infonce=1.0, data="data/nli", tasks={"t2t": 1.0}, epochs=2,
                batch_size=576, learning_rate=4e-5, lora=LoraSettings(64, 128),
            ),
            "2": replace(
                common, infonce=1.0, data="data/M-BEIR", instances=1_100_000, epochs=1,
                batch_size=960, learning_rate=1e-4,
            ),
            "3": replace(
                common, policy=1.0, data="data/M-BEIR-1pct", instances=11_000, epochs=1,
                batch_size=8, learning_rate=1e-6, num_generations=8, beta=0.2,
            ),
        },
        save_seconds=1800.0,
        trainer={"bf16": True},
    )  # fmt: skip


def _smoke() -> Recipe:
    """Every line of `emoji` in a minute: for CI and for a first look, not for its figures."""
    short = {"0": 30, "1": 6, "2": 10, "3": 4}
    return replace(
        _EMOJI,
        name="smoke",
        stages={k: replace(s, steps=short[k]) for k, s in _EMOJI.stages.items()},
        controls={k: replace(s, steps=3) for k, s in _EMOJI.controls.items()},
        evaluate_limit=256,
    )


RECIPES: dict[str, Recipe] = {
    "emoji": _EMOJI,
    "smoke": _smoke(),
    "elva-2b": _paper(
        "elva-2b",
        ModelConfig(
            "Qwen/Qwen2-VL-2B-Instruct", parameters=2_208_985_600, hidden_size=1536, layers=28
        ),
    ),
    "elva-7b": _paper(
        "elva-7b",
        ModelConfig(
            "Qwen/Qwen2-VL-7B-Instruct", parameters=8_291_375_616, hidden_size=3584, layers=28
        ),
    ),
}


# -- resolving -------------------------------------------------------------------------------------


def resolve(name: str, file: Path | None = None, assignments: Iterable[str] = ()) -> Recipe:
    """A named recipe, changed by a YAML file and then by `a.b=c` assignments.

    Raises:
        ConfigError: unknown recipe, unreadable file, unknown key or value of the wrong type.
    """
    if name not in RECIPES:
        raise ConfigError(f"recipe: must be one of {', '.join(RECIPES)}, got {name!r}")
    recipe = RECIPES[name]
    if file is not None:
        try:
            changes = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"{file}: must be a readable YAML file; {reason}") from None
        if not isinstance(changes, Mapping):
            raise ConfigError(f"{file}:1: must be a mapping of recipe fields, got {changes!r}")
        recipe = build(Recipe, _merge(recipe, changes), str(file))
    for text in assignments:
        path, separator, value = text.partition("=")
        if not separator or not path:
            raise ConfigError(f"--set: must read FIELD=VALUE, got {text!r}; e.g. --set seed=1")
        try:
            nested: Any = yaml.safe_load(value)
        except yaml.YAMLError:
            nested = value
        for key in reversed(path.split(".")):
            nested = {key: nested}
        recipe = build(Recipe, _merge(recipe, nested), f"--set {text}")
    return recipe


def to_dict(config: Any) -> dict[str, Any]:
    """The resolved recipe as plain data, as it is written to a run directory."""
    plain: dict[str, Any] = dataclasses.asdict(config)
    return plain


def from_dict(data: Mapping[str, Any], where: str) -> Recipe:
    """Read back what `to_dict` gave."""
    return typing.cast(Recipe, build(Recipe, data, where))


def _merge(base: Any, changes: Mapping[str, Any]) -> dict[str, Any]:
    merged: dict[str, Any] = {str(k): v for k, v in (
        to_dict(base) if dataclasses.is_dataclass(base) else base).items()}  # fmt: skip
    for key, value in changes.items():
        old = merged.get(str(key))
        nest = isinstance(value, Mapping) and isinstance(old, Mapping)
        merged[str(key)] = _merge(old, value) if nest else value
    return merged


def build(kind: Any, data: Any, where: str, path: str = "") -> Any:
    """Construct `kind` from plain data, checking every key and type."""
    origin = typing.get_origin(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(data, Mapping):
            raise ConfigError(f"{where}: {path or 'recipe'} must be a mapping, got {data!r}")
        hints = typing.get_type_hints(kind)
        for key in data:
            if key not in hints:
                raise ConfigError(
                    f"{where}: {path + '.' if path else ''}{key} is not a field; "
                    f"the fields here are {', '.join(hints)}"
                )
        inner = {
            k: build(hints[k], v, where, f"{path}.{k}" if path else k) for k, v in data.items()
        }
        return kind(**inner)
    if origin in (types.UnionType, typing.Union):
        if data is None and type(None) in typing.get_args(kind):
            return None
        kind = next(a for a in typing.get_args(kind) if a is not type(None))
        return build(kind, data, where, path)
    if origin is Literal:
        if data not in typing.get_args(kind):
            raise ConfigError(
                f"{where}: {path} must be one of {typing.get_args(kind)}, got {data!r}"
            )
        return data
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(data, Mapping):
            raise ConfigError(f"{where}: {path} must be a mapping, got {data!r}")
        value_kind = typing.get_args(kind)[1]
        return {str(k): build(value_kind, v, where, f"{path}.{k}") for k, v in data.items()}
    return _scalar(kind, data, where, path)


def _scalar(kind: Any, data: Any, where: str, path: str) -> Any:
    if kind is Any:
        return data
    if kind is float and isinstance(data, str):  # YAML 1.1 reads 1e-4 as a word
        with contextlib.suppress(ValueError):
            data = float(data)
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if not isinstance(data, kind) or (kind is int and isinstance(data, bool)):
        raise ConfigError(f"{where}: {path} must be a {kind.__name__}, got {data!r}")
    return data
