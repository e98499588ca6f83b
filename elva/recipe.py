"""A recipe: frozen dataclasses whose every field has a rule, and an error that names it.

The named ones, and how YAML and the command line change them, are in `recipes`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from elva.settings import (
    Count,
    Name,
    Number,
    Positive,
    Rule,
    Share,
    Text,
    Weight,
    Whole,
    at_least,
    between,
)
from elva.trainer_arguments import TrainerArguments

TASKS = ("t2i", "t2t", "t2it", "i2t", "i2i", "i2it", "it2t", "it2i", "it2it")
Task = Annotated[str, Rule(f"be one of {', '.join(TASKS)}", TASKS.__contains__)]
Schedule = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
    "inverse_sqrt", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay",
]  # fmt: skip
"""transformers' schedulers that are functions of the step, and so can be resumed."""

COLDEST = 1e-6  # elva_kernels' least temperature

_Temperature = Annotated[float, at_least(COLDEST)]
_RankTemperature = Annotated[
    float,
    Rule(f"be 0 or finite and at least {COLDEST}", lambda t: t == 0 or COLDEST <= t < math.inf),
]
_TRACKERS = ("tensorboard", "wandb", "trackio")
Trackers = Annotated[
    str,
    Rule(
        f"be none, or some of {', '.join(_TRACKERS)} with commas between",
        lambda text: text == "none" or set(text.split(",")) <= set(_TRACKERS),
    ),
]
Seed = Annotated[int, between(0, 2**63 - 1)]
Fraction = Annotated[float, Rule("be over 0 and at most 1", lambda s: 0 < s <= 1)]
Shares = Annotated[
    Mapping[Task, Weight], Rule("have a share over 0", lambda s: not s or any(s.values()))
]


@dataclass(frozen=True)
class ScratchModel:
    """A Qwen2-VL of our own size, created from random weights."""

    hidden_size: Count = 128
    intermediate_size: Count = 384
    layers: Count = 2
    heads: Count = 4
    vocabulary: Count = 3000
    image_size: Count = 60  # pixels a side: 6 x 6 patches, 9 tokens
    image_mean: Number = 0.8  # ours: of the emoji pictures; CLIP's 0.46 leaves their paper at +2
    image_std: Positive = 0.3
    patch_size: Count = 10
    vision_size: Count = 128
    vision_layers: Count = 2
    vision_heads: Count = 4
    initializer_range: Positive = 0.06  # ours: Qwen2-VL's 0.02 is for widths ten times as large

    def faults(self) -> Iterator[tuple[str, str]]:
        """Sizes that Qwen2-VL's rotary embeddings and patches cannot split."""
        if self.hidden_size % (2 * self.heads):
            yield "hidden_size", f"be a multiple of twice the {self.heads} heads"
        if self.vision_size % (4 * self.vision_heads):
            yield "vision_size", f"be a multiple of four times the {self.vision_heads} vision_heads"
        if self.image_size < 2 * self.patch_size:
            yield "image_size", f"be at least two patches of {self.patch_size}"


@dataclass(frozen=True)
class LoraSettings:
    """An adapter on the language model (rank 0 trains all its weights)."""

    rank: Whole = 0
    alpha: Count = 128


@dataclass(frozen=True)
class ModelConfig:
    """What is trained. `path` (a directory or a hub name) or, where it is None, `scratch`."""

    path: Text | None = None
    revision: Text | None = None  # of a hub name: a branch, a tag or, pinned, a commit
    attention: Literal["sdpa", "flash_attention_2", "eager"] | None = None  # transformers' choice
    scratch: ScratchModel = ScratchModel()
    summary_prompt: Text = ""
    # of a retriever of somebody else, where its own files do not say how it embeds
    pooling: Literal["ret", "last", "mean"] | None = None  # ret: read at [RET] whatever they say
    instruction: Text = ""  # the system message of an item that brings none
    ends_with: Text | None = None  # after the prompt or summary; None: what its tokenizer adds
    max_pixels: Count | None = None  # of a picture, which is made smaller; None: the checkpoint's
    min_pixels: Count | None = None  # likewise larger
    features: Text | None = None  # a directory in which a frozen tower's are kept from run to run
    # of a checkpoint that is not at hand, for the memory estimate
    parameters: Annotated[int, between(1, 2**63 - 1)] | None = None
    vision_parameters: Whole = 0  # those of them in its tower
    vision_size: Whole = 0  # the tower's width; 0: what it keeps while it learns is not counted
    vision_layers: Whole = 0
    patch_values: Count = 1176  # of a patch as the tower takes it: 3 x 2 x 14 x 14
    hidden_size: Count | None = None
    layers: Count | None = None
    intermediate_size: Count | None = None
    query_size: Count | None = None  # heads times a head's; None: hidden_size
    key_value_size: Count | None = None  # of grouped heads likewise
    vocabulary_size: Count | None = None
    tied: bool = True  # embeddings and head are one table
    deepstack: Whole = 0  # inner layers of the tower that are features too

    def faults(self) -> Iterator[tuple[str, str]]:
        """Bounds of a picture that none can meet."""
        if self.max_pixels and self.min_pixels and self.min_pixels > self.max_pixels:
            yield "min_pixels", f"be at most max_pixels, {self.max_pixels}"
        if self.pooling in (None, "ret"):
            if self.instruction:
                yield "instruction", "be empty where pooling is not last or mean"
            if self.ends_with is not None:
                yield "ends_with", "be left out where pooling is not last or mean"
        elif self.path is None:
            yield "pooling", "be left out of a model that is made from nothing"


@dataclass(frozen=True)
class RewardConfig:
    """Arguments of `elva_kernels.ranking_reward`.

    `margin` and `rank_penalty` are not printed in the paper: the values here are ours.
    """

    margin: Annotated[float, between(-2, 2)] = 0.1
    rank_penalty: Weight = 0.01
    w_margin: Weight = 0.4
    w_rank: Weight = 0.6
    rank_temperature: _RankTemperature = 0.0


@dataclass(frozen=True)
class NegativeConfig:
    """Whom a query's positives are told from, beside the rest of its batch.

    A query's own negatives are max(given, mined + random): given ones first, then mined ones, and
    random ones for what is left. InfoNCE takes them as further columns, a ranking stage as its
    candidates (paper, sec. 3.4: 50 mined and 50 at random).
    """

    given: Whole = 1  # of its neg_cand_list, which the data or `elva mine` wrote; drawn anew a step
    mined: Whole = 0  # the hardest of the pool, by the model's own embeddings at the stage's start
    random: Whole = 0  # drawn from the whole pool
    in_batch: bool = True  # the answers of the batch's other queries

    @property
    def count(self) -> int:
        """A query's own, at most."""
        return max(self.given, self.mined + self.random)


@dataclass(frozen=True)
class StageConfig:
    """One stage: how much of which loss, on which data, for how long.

    loss = lm * L_lm + ret * L_ret + anchor * KL + infonce * L_infonce + pathwise * L_pathwise
           + policy * (L_policy + beta * KL)
    """

    # what is optimised
    lm: Weight = 0.0  # next token of the caption, on tokens whose prefix is still the caption's
    ret: Weight = 0.0  # [RET] in place of the chat's end, where a summary ends
    anchor: Weight = 0.0  # KL of the summaries to the stage's start, where no policy has its beta
    infonce: Weight = 0.0  # in-batch contrastive loss on the [RET] embeddings
    pathwise: Weight = 0.0  # the reward differentiated through the [RET] embeddings
    policy: Weight = 0.0  # GRPO: clipped policy gradient on the summaries' tokens (paper, sec. 3.4)
    # data
    data: Text = "emoji"  # "emoji" or a directory in M-BEIR's layout
    tasks: Shares = field(default_factory=dict)
    """Task -> share of the batches; empty: a pass over all that the data has."""
    share: Fraction = 1.0  # of each dataset's queries, drawn by the seed (the paper's stage 3: 1 %)
    positives: Literal["one", "all"] = "one"
    """Of several right answers one, drawn anew each step, or all; the others are no negatives."""
    negatives: NegativeConfig = NegativeConfig()
    queries: Literal["sets", "union"] = "sets"
    """M-BEIR's training files: each set's, or the union, in which small sets come several times."""
    batches: Literal["task", "mixed"] = "task"  # queries of one task a step, or of all
    instances: Count | None = None  # size of the training set, for --dry-run before it is at hand
    hard_batches: bool = False  # fill batches with a query's mined neighbours
    # length and optimiser
    steps: Count | None = None
    epochs: Positive | None = None  # where steps is None
    batch_size: Count = 64  # queries a step
    micro_batch_size: Count = 1024  # sequences a forward and backward
    rollout_batch_size: Count = 1024  # sequences that are sampled at once: a cache, no gradients
    learning_rate: Weight = 5e-4
    warmup_ratio: Share = 0.03
    schedule: Schedule = "cosine"
    weight_decay: Weight = 0.0
    max_grad_norm: Weight = 1.0
    train_vision: bool = False
    # evaluation inside the stage, by transformers' names
    eval_steps: Count | None = None  # between evaluations; None: only when the stage has ended
    metric_for_best_model: Text = ""  # of `evaluation.json`, such as t2i_recall_at_1
    greater_is_better: bool = True
    load_best_model_at_end: bool = False  # end with the weights of the best evaluation
    early_stopping_patience: Count | None = None  # evaluations without a better one
    lora: LoraSettings = LoraSettings()
    # contrastive
    infonce_temperature: _Temperature = 0.05
    learn_infonce_temperature: bool = False  # from there on, as CLIP does
    final_infonce_temperature: _Temperature | None = None  # reached geometrically at the last step
    symmetric: bool = False  # half of the loss from candidates to queries; the paper's is one-way
    # rollouts
    completions: Literal["gold", "sampled"] = "sampled"
    num_generations: Count = 1
    temperature: Positive = 1.0  # of the sampler, and of every log-probability
    max_completion_length: Whole = 16
    rollout_candidates: Literal["all", "query_positive", "query"] = "query_positive"
    # ranking and mining
    max_score: Number = 0.99  # a candidate more similar than this is not mined (sec. 3.4)
    refresh_steps: Count | None = None  # embed the pool and mine again, every so many steps
    reward: RewardConfig = RewardConfig()
    final_rank_temperature: _Temperature | None = None  # of the reward, reached likewise
    relevance: Literal["none", "start", "grains"] = "none"
    """What a negative's relevance in the reward is: none (the paper's), its similarity to the right
    answer under the model that the stage starts from, or the share of grains that both have."""
    pairings: Literal["own", "all"] = "own"
    """Whether a query's rollout meets its candidates' of the same number (the paper's), or of every
    number: G x G rewards a query, at the cost of their dot products."""
    # grpo: names and meanings are TRL's (tests/elva/test_objective_trl.py)
    beta: Weight = 0.2
    epsilon: Weight = 0.2
    epsilon_high: Weight | None = None  # None: epsilon
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = "grpo"
    importance_sampling_level: Literal["token", "sequence"] = "token"
    scale_rewards: Literal["group", "batch", "none"] = "group"
    num_iterations: Count = 1  # steps on the same rollouts

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """Fields that would train something else than they say."""
        negatives = self.negatives
        if self.completions == "gold" and self.policy + self.anchor > 0:
            yield "completions", "be sampled where policy or anchor is over 0"
        if self.policy > 0 and self.anchor > 0:
            yield "anchor", "be 0 where policy is over 0, whose beta holds it"
        if self.completions == "gold" and self.num_generations > 1:
            yield "num_generations", "be 1 where completions are gold"
        if self.infonce > 0 and not negatives.in_batch:
            yield "negatives.in_batch", "be true where infonce is over 0"
        if self.ranks and not (negatives.in_batch or negatives.count):
            yield "negatives", "leave something to rank against"
        if self.policy + self.anchor > 0 and self.max_completion_length == 0:
            yield "max_completion_length", "be at least 1 where policy or anchor is over 0"
        if self.policy > 0 and self.num_generations < 2:
            yield "num_generations", "be at least 2 where policy is over 0"
        if self.hard_batches and self.batches == "mixed":
            yield "batches", "be task where hard_batches is true"
        if self.holds and self.lora.rank and self.train_vision:
            yield "train_vision", "be false where an adapter is held to its start"
        chooses = self.load_best_model_at_end or self.early_stopping_patience is not None
        if chooses and self.eval_steps is None:
            yield "eval_steps", "be set where the best model is looked for"
        if self.eval_steps is not None and not self.metric_for_best_model:
            yield "metric_for_best_model", "be set where eval_steps is"
        if self.learn_infonce_temperature and self.infonce == 0:
            yield "learn_infonce_temperature", "be false where infonce is 0"
        if self.final_infonce_temperature and (self.learn_infonce_temperature or not self.infonce):
            yield "final_infonce_temperature", "be left out where none is used, or one is learnt"
        if self.final_rank_temperature and not (self.ranks and self.reward.rank_temperature):
            yield "final_rank_temperature", "be left out where reward.rank_temperature is not used"
        if self.relevance != "none" and not self.ranks:
            yield "relevance", "be none where nothing is ranked"
        if self.pairings == "all" and not (self.ranks and self.num_generations > 1):
            yield "pairings", "be own where nothing is ranked, or num_generations is 1"

    def cooled(self, share: float) -> StageConfig:
        """With the temperatures of a moment, after a share in [0, 1] of the stage."""
        last, ranks_last = self.final_infonce_temperature, self.final_rank_temperature
        if last is None and ranks_last is None:
            return self

        def at(first: float, last: float | None) -> float:
            return first if last is None else first ** (1 - share) * last**share

        t = at(self.reward.rank_temperature, ranks_last)
        return dataclasses.replace(
            self,
            infonce_temperature=at(self.infonce_temperature, last),
            reward=dataclasses.replace(self.reward, rank_temperature=t),
        )

    @property
    def ranks(self) -> bool:
        """Whether this stage's loss looks at rewards."""
        return self.pathwise > 0 or self.policy > 0

    @property
    def holds(self) -> bool:
        """Whether its summaries are held to those of the model that the stage started from."""
        return self.anchor > 0 or (self.policy > 0 and self.beta > 0)

    @property
    def banks(self) -> bool:
        """Whether candidates are embedded greedily and kept, instead of rolled out each step."""
        drawn = self.negatives.mined + self.negatives.random > 0
        return self.rollout_candidates == "query" or (
            self.rollout_candidates == "query_positive" and drawn
        )

    @property
    def embeds_pools(self) -> bool:
        """Whether all candidates are embedded, before its first step or in between."""
        start = self.relevance == "start"
        return self.banks or self.hard_batches or self.negatives.mined > 0 or start

    @property
    def embeds(self) -> bool:
        """Whether this stage's loss looks at embeddings at all."""
        return self.infonce > 0 or self.ranks


@dataclass(frozen=True)
class Recipe:
    """A whole training: the model, its stages in order, and what stage 3 is compared with."""

    name: Name
    model: ModelConfig = ModelConfig()
    stages: Mapping[Name, StageConfig] = field(default_factory=dict)
    controls: Mapping[Name, StageConfig] = field(default_factory=dict)
    """Alternatives to the last stage: each starts where it started and, where it names neither
    steps nor epochs, takes as many steps."""
    seed: Seed = 0
    data_seed: Seed | None = None
    """Of the order of the data and the draw of negatives, where two runs are to share them and
    differ in their `seed`; None: `seed`."""
    save_seconds: Weight = 30.0  # between checkpoints inside a stage
    save_steps: Count | None = None  # write one after so many steps, too
    save_total_limit: Annotated[int, between(1, 2**63 - 1)] = 2  # kept while a stage trains
    evaluate: bool = True  # after every stage, on the test or val split of the latest data with one
    evaluate_batch_size: Count = 512
    evaluate_limit: Count | None = None
    """At most this many queries, and candidates beside their positives; None for the whole pool."""
    report_to: Trackers = "none"
    """Trackers that get the metrics too, several with commas: tensorboard, wandb, trackio."""
    trainer: TrainerArguments = field(default_factory=dict)
    """Further arguments of transformers' TrainingArguments."""

    def faults(self) -> Iterator[tuple[str, str]]:
        """Names that would share a directory, and a training of nothing."""
        if not self.stages:
            yield "stages", "hold a stage"
        if both := [name for name in self.controls if name in self.stages]:
            yield f"controls.{both[0]}", "have a name that no stage has"

    @property
    def order_seed(self) -> int:
        """What the order of the data is drawn by."""
        return self.seed if self.data_seed is None else self.data_seed

    def idle(self) -> Iterator[tuple[str, str]]:
        """Stages that cannot be trained, or not as they say."""
        if self.model.revision is not None and self.model.path is None:
            yield "model.revision", "be left out of a model that is made from nothing"
        for name, stage in self.stages.items():
            if stage.steps is None and stage.epochs is None:
                yield f"stages.{name}", "have steps or epochs"
        for kind in ("stages", "controls"):
            for name, stage in getattr(self, kind).items():
                if not (stage.lm or stage.ret or stage.embeds):
                    yield f"{kind}.{name}", "have lm, ret, infonce, pathwise or policy over 0"
                for field_name, rule in stage.contradictions():
                    yield f"{kind}.{name}.{field_name}", rule
