"""TRL's reward inside ms-swift: an external plugin, called by the code of its GRPO trainer."""

import importlib.util

import pytest
import torch

if importlib.util.find_spec("swift") is None:
    pytest.skip(
        "ms-swift is not installed: see tests/elva/trainers.txt",
        allow_module_level=True,
    )
from swift.rewards import orms
from swift.rl_core.data import GRPOSample
from swift.rl_core.grpo_algorithm import compute_rewards_per_func
from swift.utils import import_external_file

from elva.integrations.rollouts import RolloutReward
from tests.elva.test_rewards import PAIRS, POSITIVES, ROLLOUTS, embed

PLUGIN = """
from swift.rewards import orms
from elva.integrations.trl import RankingReward
from tests.elva.test_rewards import embed
orms["ranking"] = lambda args=None: RankingReward(embed, margin=0.05)
orms["prompted"] = lambda args=None: RankingReward(embed, text_fn=lambda p, c: f"{p} {c}")
"""


def test_a_plugins_rewards_are_the_batchs(tmp_path):
    """Of completions, and of prompts with them."""
    (tmp_path / "plugin.py").write_text(PLUGIN)
    import_external_file(str(tmp_path / "plugin.py"))
    samples = [
        GRPOSample(
            messages=[{"role": "user", "content": "pink"}, {"role": "assistant", "content": text}],
            extra={"positive": own, "negatives": others},
        )
        for text, own, others in zip(ROLLOUTS, POSITIVES, PAIRS, strict=True)
    ]
    functions = [orms[name](args=None) for name in ("ranking", "prompted")]
    found = compute_rewards_per_func(samples, functions, None, torch.device("cpu"))
    expected = [
        RolloutReward(embed, margin=0.05).score(ROLLOUTS, POSITIVES, PAIRS)["reward"],
        RolloutReward(embed).score([f"pink {x}" for x in ROLLOUTS], POSITIVES, PAIRS)["reward"],
    ]
    torch.testing.assert_close(found, torch.tensor(expected).T, rtol=0, atol=1e-6)
