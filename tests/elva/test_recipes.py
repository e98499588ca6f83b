"""The named recipes are what they are named after."""

import pytest

from elva.recipe import LoraSettings, StageConfig
from elva.recipes import resolve

PAPER = ("elva-2b", "elva-7b")


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_table(name: str) -> None:
    """Liu et al., ELVA, arXiv:2606.20280, sec. 3.4 and 4.1, by number."""
    recipe = resolve(name)
    assert list(recipe.stages) == ["1", "2", "3"]
    first, second, third = recipe.stages.values()
    assert [(s.batch_size, s.learning_rate, s.epochs, s.steps) for s in (first, second)] == [
        (576, 4e-5, 2, None), (960, 1e-4, 1, None),
    ]  # fmt: skip
    for stage in (first, second):
        assert (stage.infonce, stage.policy, stage.symmetric) == (1.0, 0.0, False)
        assert stage.infonce_temperature == 0.05
    assert list(first.tasks) == ["t2t"] and not second.tasks  # NLI; M-BEIR, all eight
    assert second.instances == 1_100_000

    assert (third.learning_rate, third.epochs, third.share) == (1e-6, 1, 0.01)
    assert (third.policy, third.infonce, third.pathwise, third.lm) == (1.0, 0.0, 0.0, 0.0)
    assert (third.num_generations, third.beta, third.instances) == (8, 0.2, 11_000)
    assert (third.reward.w_margin, third.reward.w_rank) == (0.4, 0.6)
    assert third.reward.rank_temperature == 0.0
    negatives = third.negatives
    assert (negatives.mined, negatives.random, negatives.in_batch) == (50, 50, False)
    assert (negatives.count, third.rollout_candidates) == (100, "all")
    assert (third.loss_type, third.importance_sampling_level) == ("grpo", "token")
    assert (third.scale_rewards, third.num_iterations) == ("group", 1)
    ranks = [(s.lora, s.train_vision) for s in recipe.stages.values()]
    assert ranks == [
        (LoraSettings(64, 128), False), (LoraSettings(128, 256), False),
        (LoraSettings(128, 256), False),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "path", "hidden", "parameters"),
    [("elva-2b", "Qwen/Qwen2-VL-2B-Instruct", 1536, 2.2e9),
     ("elva-7b", "Qwen/Qwen2-VL-7B-Instruct", 3584, 8.3e9)],
)  # fmt: skip
def test_the_papers_models(name: str, path: str, hidden: int, parameters: float) -> None:
    model = resolve(name).model
    assert (model.path, model.hidden_size, model.layers) == (path, hidden, 28)
    assert model.parameters == pytest.approx(parameters, rel=0.01)


@pytest.mark.parametrize("name", PAPER)
def test_a_step_takes_few_sampling_calls(name: str) -> None:
    """Found by audit: 816 calls of 8 rows, for it was a forward's micro-batch."""

    def calls(stage: StageConfig, sequences: int) -> int:
        rows = stage.batch_size * sequences * stage.num_generations
        return -(-rows // stage.rollout_batch_size)

    stages = resolve(name).stages
    assert stages["3"].batch_size * (2 + 100) * 8 == 6528
    assert calls(stages["3"], 2 + stages["3"].negatives.count) == 13
    assert calls(stages["2"], 3) < 20  # a query, an answer and a given negative
