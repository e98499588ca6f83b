"""The rewards inside verl's own reward managers, loaded by verl's own loader."""

import asyncio

import numpy as np
import pytest
import torch

verl = pytest.importorskip("verl", reason="verl is not installed: see tests/elva/trainers.txt")
from omegaconf import OmegaConf  # noqa: E402
from verl import DataProto  # noqa: E402
from verl.trainer.ppo.reward import get_custom_reward_fn, load_reward_manager  # noqa: E402
from verl.workers.reward_manager import get_reward_manager_cls  # noqa: E402

from elva.errors import UserError  # noqa: E402
from elva.integrations.rollouts import RolloutReward  # noqa: E402
from tests.elva.test_rewards import PAIRS, POSITIVES, ROLLOUTS, TABLE, WORDS, embed  # noqa: E402

EMBEDDER = f"""
import torch
WORDS, TABLE = {WORDS}, torch.tensor({TABLE.tolist()})
def embed(texts):
    return torch.stack([TABLE[[WORDS.index(x) for x in t.split()]].mean(0) for t in texts])
def twice(solution, extra_info):
    return solution + " " + solution
"""
REPEATS = 4


class Words:
    """What verl asks of a tokenizer."""

    def decode(self, ids, skip_special_tokens):
        return " ".join(WORDS[x] for x in ids)


def batch(negatives):
    """Each rollout `REPEATS` times, as verl's trainer hands it on: padded, with numpy columns."""
    texts, positives = ROLLOUTS * REPEATS, POSITIVES * REPEATS
    ids = [[WORDS.index(x) for x in text.split()] for text in texts]
    width, prompt = max(map(len, ids)), 2
    pad = [x + [0] * (width - len(x)) for x in ids]
    mask = [[1] * (prompt + len(x)) + [0] * (width - len(x)) for x in ids]
    infos = [{"negatives": np.array(x)} if negatives else {} for x in PAIRS * REPEATS]
    tensors = {
        "prompts": torch.zeros(len(ids), prompt, dtype=torch.long),
        "responses": torch.tensor(pad), "attention_mask": torch.tensor(mask),
    }  # fmt: skip
    columns = {
        "data_source": np.array(["emoji"] * len(ids), dtype=object),
        "reward_model": np.array([{"ground_truth": x} for x in positives], dtype=object),
        "extra_info": np.array(infos, dtype=object),
    }
    return DataProto.from_dict(tensors=tensors, non_tensors=columns)


@pytest.fixture
def config(tmp_path):
    (tmp_path / "embedder.py").write_text(EMBEDDER)

    def made(name, **kwargs):
        kwargs = {"embed": f"{tmp_path}/embedder.py:embed", **kwargs}
        function = {
            "path": "pkg://elva.integrations.verl", "name": name, "reward_kwargs": kwargs,
        }  # fmt: skip
        manager = {"source": "register", "name": "naive", "module": None}
        return OmegaConf.create(
            {"reward": {"custom_reward_function": function, "reward_manager": manager}}
        )

    return made


@pytest.mark.parametrize("reward", ["ranking", "ume_r1", "embed_rl"])
def test_the_reward_loop_scores_single_rollouts_together(config, reward):
    """All rollouts at once through `run_single`: the batch's rewards, in few calls."""

    async def scored():
        manager = load_reward_manager(config("compute_score", reward=reward), Words())
        data = batch(negatives=True)
        tasks = [manager.run_single(data[n : n + 1]) for n in range(len(data))]
        return await asyncio.gather(*tasks)

    found = asyncio.new_event_loop().run_until_complete(scored())
    expected = RolloutReward(embed, reward=reward).score(ROLLOUTS, POSITIVES, PAIRS)
    assert [x["reward_score"] for x in found] == pytest.approx(
        expected["reward"] * REPEATS, abs=1e-6
    )
    for name in set(expected) - {"reward"}:
        logged = [x["reward_extra_info"][name] for x in found]
        assert logged == pytest.approx(expected[name] * REPEATS, abs=1e-6)


def test_the_batch_manager_has_in_batch_negatives(config):
    """At the last token of each rollout, with the parts; also with given negatives."""
    expected = {
        False: RolloutReward(embed, margin=0.05).score(ROLLOUTS * REPEATS, POSITIVES * REPEATS),
        True: RolloutReward(embed, margin=0.05).score(
            ROLLOUTS * REPEATS, POSITIVES * REPEATS, PAIRS * REPEATS
        ),
    }
    score = get_custom_reward_fn(config("compute_scores", margin=0.05))
    manager = get_reward_manager_cls("batch")(Words(), num_examine=0, compute_score=score)
    for negatives, wanted in expected.items():
        data = batch(negatives)
        if not negatives:  # as a table has it in which some other data set's rows have a list
            data.non_tensor_batch["extra_info"][:] = [{"negatives": None}] * len(data)
        found = manager(data, return_dict=True)
        last = data.batch["attention_mask"][:, 2:].sum(1) - 1
        rewards = found["reward_tensor"].gather(1, last[:, None])[:, 0]
        assert rewards.tolist() == pytest.approx(wanted["reward"], abs=1e-6)
        assert found["reward_tensor"].sum().item() == pytest.approx(sum(wanted["reward"]), abs=1e-5)
        assert found["reward_extra_info"]["rank"] == wanted["rank"]


def test_rows_of_a_bank_and_a_text_of_ones_own(config, tmp_path):
    np.save(tmp_path / "bank.npy", TABLE.numpy())
    score = get_custom_reward_fn(
        config("compute_scores", bank=f"{tmp_path}/bank.npy", text=f"{tmp_path}/embedder.py:twice")
    )
    found = score(
        data_sources=["x"], solution_strs=["red green"], ground_truths=[np.int64(0)],
        extra_infos=[None],
    )  # fmt: skip
    expected = RolloutReward(embed, bank=TABLE).score(["red green red green"], [0])
    assert found[0]["score"] == pytest.approx(expected["reward"][0], abs=1e-6)


@pytest.mark.parametrize(
    ("kwargs", "row", "said"),
    [
        ({"embed": None}, {}, "reward_kwargs must name the embedder"),
        ({"embed": "embed"}, {}, "embed must be module:function or file.py:function, got 'embed'"),
        ({"embed": "nowhere.py:f"}, {}, "there is no such file"),
        ({"embed": "nowhere:f"}, {}, "No module named 'nowhere'"),
        ({"embed": "math:f"}, {}, "math has no function 'f'"),
        ({"margin": [0.1]}, {}, "reward_kwargs must be plain values, got margin: [0.1]; name"),
        ({"bank": "nowhere.npy"}, {}, "bank must be a .npy file of [M, D] embeddings, got 'nowhe"),
        ({}, {"ground_truth": {"target": "red"}}, "got {'target': 'red'}; take the text out of it"),
        ({"marign": 1}, {}, "unexpected keyword argument 'marign'"),
        ({}, {"extra_info": {}}, "scored alone must have negatives, got None"),
        (
            {},
            {"ground_truth": "red"},
            "a negative that is not one, got the positive 'red'",
        ),
    ],
)
def test_what_cannot_be_is_one_line(config, kwargs, row, said):
    score = get_custom_reward_fn(config("compute_score", **kwargs))
    row = {
        "data_source": "x", "solution_str": "red", "ground_truth": "blue",
        "extra_info": {"negatives": ["red"]}, **row,
    }  # fmt: skip
    with pytest.raises(UserError) as caught:
        asyncio.new_event_loop().run_until_complete(score(**row))
    assert said in str(caught.value) and "\n" not in str(caught.value)
