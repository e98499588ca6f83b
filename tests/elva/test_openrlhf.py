"""The rewards inside OpenRLHF's own executor of single-turn rollouts, without its GPU workers."""

import asyncio
import importlib.util
import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from elva.errors import UserError
from elva.integrations.openrlhf import RankingReward
from elva.integrations.rollouts import RolloutReward
from tests.elva.test_rewards import PAIRS, POSITIVES, ROLLOUTS, WORDS, embed

FOUND = importlib.util.find_spec("openrlhf")
if FOUND is None:
    pytest.skip(
        "openrlhf is not installed: see tests/elva/trainers.txt",
        allow_module_level=True,
    )

FILE = """
from elva.integrations.openrlhf import RankingReward
from tests.elva.test_rewards import embed
reward_func = RankingReward(embed, margin=0.05)
"""


@pytest.fixture
def executor(monkeypatch, tmp_path):
    """`openrlhf.utils.agent` by its file, as OpenRLHF's own tests load it: its package imports
    what only machines with GPUs have."""
    log = SimpleNamespace(init_logger=logging.getLogger)
    monkeypatch.setitem(sys.modules, "openrlhf.utils.logging_utils", log)
    monkeypatch.setitem(sys.modules, "openrlhf.utils", SimpleNamespace(logging_utils=log))
    file = Path(FOUND.submodule_search_locations[0]) / "utils" / "agent.py"
    spec = importlib.util.spec_from_file_location("openrlhf_agent", file)
    agent = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(agent)
    (tmp_path / "reward.py").write_text(FILE)
    return agent.SingleTurnAgentExecutor(str(tmp_path / "reward.py"))


class Words:
    """What OpenRLHF asks of a tokenizer."""

    def __call__(self, text, **_):
        ids = [WORDS.index(x) for x in text.split()]
        return {"input_ids": [SimpleNamespace(tolist=lambda: ids)]}

    def decode(self, ids, **_):
        return " ".join(WORDS[x] for x in ids)


class Engine:
    """What it asks of vLLM: the rollouts in turn."""

    def __init__(self):
        self.texts = iter(ROLLOUTS)

    async def generate(self, prompt, parameters, multi_modal_data):
        ids = [WORDS.index(x) for x in next(self.texts).split()]
        output = SimpleNamespace(token_ids=ids, finish_reason="stop", logprobs=None)
        return SimpleNamespace(outputs=[output])


def labels():
    return [
        json.dumps({"positive": own, "negatives": others})
        for own, others in zip(POSITIVES, PAIRS, strict=True)
    ]


def test_the_executors_rewards_are_the_batchs(executor):
    parameters = SimpleNamespace(max_tokens=8, logprobs=None)

    async def rolled():
        engine = Engine()
        return await asyncio.gather(
            *(executor.execute("gold", x, parameters, 64, Words(), engine) for x in labels())
        )

    found = asyncio.run(rolled())
    expected = RolloutReward(embed, margin=0.05).score(ROLLOUTS, POSITIVES, PAIRS)
    assert [x["reward"].item() for x in found] == pytest.approx(expected["reward"], abs=1e-6)
    assert [x["scores"].item() for x in found] == pytest.approx(expected["reward"], abs=1e-6)
    assert [x["extra_logs"]["rank"].item() for x in found] == expected["rank"]


@pytest.mark.parametrize(
    ("query", "label", "said"),
    [
        ("pink red", labels()[0], "a query must begin with its prompt, got 'pink red' for 'gold'"),
        ("gold red", "red", "a label must be JSON like"),
        ("gold red", '{"negatives": ["red"]}', "a label must be JSON like"),
        ("gold red", '{"positive": "red"}', "scored alone must have negatives"),
    ],
)
def test_what_cannot_be_is_one_line(query, label, said):
    with pytest.raises(UserError) as caught:
        RankingReward(embed)([query], ["gold"], [label])
    assert said in str(caught.value) and "\n" not in str(caught.value)
