"""The reward's own constants on a trained model: `python -m benchmarks.reward_defaults RUN`.

The paper prints neither `margin` nor `rank_penalty`. On the groups that GRPO would train on after
stage 2 of RUN (every training query of text to picture, 50 mined and 50 random negatives):

- margin: how often the hinge of eq. 3 is open among the groups whose positive is first. A margin
  that opens it always or never says nothing of a group.
- rank_penalty: how often, of two groups with different ranks, the better ranked one has the higher
  rank reward. A penalty that outweighs the positive's own term pays for other things than its rank.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import elva_kernels
from benchmarks import report
from elva.data import Item
from elva.model.retriever import Retriever
from elva.model.rollout import encode
from elva.recipe import NegativeConfig
from elva.run import Run
from elva.training.examples import Examples
from elva.training.negatives import Negatives
from elva.training.plan import Batch
from elva.training.readiness import TrainingData

MARGINS = (-0.1, 0.0, 0.05, 0.1, 0.2, 0.4)
PENALTIES = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1)
TASK = "t2i"


def scores_of(run: Run) -> Tensor:
    """[Q, 101] scores of every training query's group, the positive's first."""
    stage = replace(
        run.recipe.stages["2"], tasks={TASK: 1.0}, infonce=0.0, symmetric=False, policy=1.0,
        num_generations=2, rollout_candidates="query", max_score=1.0,
        negatives=NegativeConfig(given=0, mined=50, random=50, in_batch=False),
    )  # fmt: skip
    examples = Examples(TrainingData(run.recipe).of(stage), stage, run.recipe.seed)
    retriever = Retriever.load(run.model("2"))

    def embed(items: Sequence[Item]) -> Tensor:
        return encode(
            retriever, items, max_completion_length=stage.max_completion_length
        ).embeddings

    negatives = Negatives(stage, examples, (run.recipe.seed, "defaults"), embed)
    negatives.prepare(0)
    rows = examples.rows[TASK].tolist()
    queries = [examples.query(row) for row in rows]
    right = torch.tensor([examples.right(query)[0] for query in queries])
    bank = negatives.bank
    assert bank is not None
    index = torch.from_numpy(negatives.of(Batch(0, rows))[0])
    return elva_kernels.ranking_reward(
        embed(queries), bank[right], bank, negative_index=index
    ).scores  # fmt: skip


def ordered_share(rank: Tensor, reward: Tensor) -> float:
    """Of the pairs of groups with different ranks, those whose better one has more reward."""
    better = rank[:, None] < rank
    return (better & (reward[:, None] > reward)).sum().item() / max(1, better.sum().item())


def measure(scores: Tensor) -> dict[str, Any]:
    first = elva_kernels.reward_from_scores(scores).rank == 1
    margins = [
        {
            "margin": margin,
            "open_of_first": (
                elva_kernels.reward_from_scores(scores[first], margin=margin).margin_reward > 0
            ).float().mean().item(),
        }
        for margin in MARGINS
    ]  # fmt: skip
    penalties = []
    for penalty in PENALTIES:
        out = elva_kernels.reward_from_scores(scores, rank_penalty=penalty)
        share = ordered_share(out.rank, out.rank_reward)
        penalties.append({"rank_penalty": penalty, "ordered_share": share})
    return {
        "groups": len(scores),
        "negatives": scores.shape[1] - 1,
        "first_share": first.float().mean().item(),
        "margins": margins,
        "penalties": penalties,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reward_defaults")
    parser.add_argument("run", type=Path, help="a run directory with a trained stage 2")
    result = measure(scores_of(Run.open(parser.parse_args().run)))
    result = {"machine": report.machine(), **result}
    print(json.dumps({k: v for k, v in result.items() if k != "machine"}, indent=1))
    path = report.RESULTS / "reward-defaults-emoji.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
