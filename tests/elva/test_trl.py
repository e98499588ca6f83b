"""The rewards inside TRL's own GRPOTrainer, on a causal model of random weights."""

import pytest
import torch

import elva_kernels

trl = pytest.importorskip("trl", reason="trl is not installed: pip install 'elva[trl]'")
from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

from elva.errors import UserError  # noqa: E402
from elva.integrations.trl import RankingReward, plain  # noqa: E402

WORDS = ["red", "green", "blue", "grey", "pink", "gold", "find", "a"]
TABLE = torch.randn(len(WORDS), 16, generator=torch.Generator().manual_seed(0))
CHAT = (
    "{% for turn in messages %}{{ turn['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}a{% endif %}"
)


def embed(texts):
    """Mean of the words' vectors; a text without words is all of them."""
    rows = []
    for text in texts:
        ids = [WORDS.index(word) for word in text.split() if word in WORDS]
        rows.append(TABLE[ids or list(range(len(WORDS)))].mean(0))
    return torch.stack(rows)


def tokenizer():
    words = {word: n for n, word in enumerate([*WORDS, "<pad>", "<eos>", "<unk>"])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        padding_side="left", chat_template=CHAT,
    )  # fmt: skip


def trainer(reward, rows, tmp_path, **named):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 3, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, pad_token_id=len(WORDS), eos_token_id=len(WORDS) + 1,
        bos_token_id=None,
    )  # fmt: skip
    settings = {
        "output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": "none",
        "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 3,
        "max_steps": 2, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True,
        **named,
    }  # fmt: skip
    return trl.GRPOTrainer(
        model=LlamaForCausalLM(config), reward_funcs=reward, args=trl.GRPOConfig(**settings),
        train_dataset=Dataset.from_list(rows), processing_class=tokenizer(),
    )  # fmt: skip


COLOURS = WORDS[:6]
PAIRS = [
    {"prompt": f"find {x}", "positive": x, "negatives": [y for y in COLOURS if y != x][n % 2 :]}
    for n, x in enumerate(COLOURS)
]
IN_BATCH = [{"prompt": row["prompt"], "positive": row["positive"]} for row in PAIRS]
BANK = [
    {"prompt": f"find {x}", "row": n, "others": [m for m in range(6) if m != n]}
    for n, x in enumerate(COLOURS)
]
CHATS = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in PAIRS]


def kernels(texts, positives, negatives, **weights):
    return [
        elva_kernels.ranking_reward(
            embed([text])[0], embed([own])[0], embed([x for x in others if x != own]), **weights
        )
        for text, own, others in zip(texts, positives, negatives, strict=True)
    ]


@pytest.mark.parametrize(
    "kind",
    ["pairs", *(pytest.param(x, marks=pytest.mark.thorough) for x in ("in_batch", "bank", "chat"))],
)  # fmt: skip
def test_the_trainers_rewards_are_the_kernels(kind, tmp_path):
    """Of every completion of two steps, with the parts that the trainer logs."""
    weights = {"margin": 0.05, "w_rank": 0.7}
    rows = {"pairs": PAIRS, "in_batch": IN_BATCH, "bank": BANK, "chat": CHATS}[kind]
    named = {"bank": TABLE, "positive": "row", "negatives": "others"} if kind == "bank" else {}
    reward, seen = RankingReward(embed, **named, **weights), []

    def watched(completions, **given):
        seen.append((completions, given, reward(completions, **given)))
        return seen[-1][2]

    watched.__name__ = "ranking"
    run = trainer(watched, rows, tmp_path, log_completions=True)
    run.train()
    assert len(seen) == 2
    for step, (completions, given, found) in enumerate(seen):
        assert len(found) == 8 and len(set(given["positive" if kind != "bank" else "row"])) == 2
        texts = [plain(x) for x in completions]
        if kind == "bank":
            positives = [WORDS[x] for x in given["row"]]
            negatives = [[WORDS[y] for y in x] for x in given["others"]]
        else:
            positives = given["positive"]
            in_batch = [list(dict.fromkeys(positives))] * 8
            negatives = in_batch if kind == "in_batch" else given["negatives"]
        each = kernels(texts, positives, negatives, **weights)
        assert found == pytest.approx([x.reward.item() for x in each], abs=1e-6)
        log = run.state.log_history[step]
        mean = sum(x.margin_reward.item() for x in each) / 8
        assert log["rewards/ranking/margin_reward"] == pytest.approx(mean, abs=1e-6)
        assert log["rewards/ranking/rank"] == sum(x.rank.item() for x in each) / 8
        assert log["rewards/ranking/mean"] == pytest.approx(sum(found) / 8, abs=1e-6)
    ranks = list(run._logs["extra"]["ranking/rank"])[-8:]  # of the last step
    assert ranks == [x.rank.item() for x in each]


def test_a_row_without_positive_moves_nothing(tmp_path):
    """None is TRL's word for a row that a reward does not score."""
    rows = [{**PAIRS[0], "prompt": "find red"}, {**PAIRS[1], "positive": None}]
    run = trainer(RankingReward(embed, reward="embed_rl"), rows, tmp_path, max_steps=1)
    run.train()
    found = list(run._logs["rewards"]["embed_rl"])
    assert sum(x == x for x in found) == 4 and sum(x != x for x in found) == 4
    unscored = [a for a, x in zip(run._logs["advantages"], found, strict=True) if x != x]
    assert unscored == [0, 0, 0, 0]


@pytest.mark.thorough
def test_training_raises_the_reward(tmp_path):
    """From random weights to the words that each prompt's positive is made of."""
    run = trainer(
        RankingReward(embed), PAIRS, tmp_path, max_steps=60, learning_rate=1e-2, beta=0.0, seed=0,
        per_device_train_batch_size=32, num_generations=8, lr_scheduler_type="constant",
    )  # fmt: skip
    run.train()
    log = [x for x in run.state.log_history if "reward" in x]
    first, last = (sum(x["reward"] for x in part) / 10 for part in (log[:10], log[-10:]))
    rank = sum(x["rewards/ranking/rank"] for x in log[-10:]) / 10
    assert last > first + 0.3 and rank < 2


def test_a_dataset_without_the_column_is_one_line():
    with pytest.raises(UserError, match=r"must have a column 'positive', got answer; name another"):
        RankingReward(embed)(["red"], prompts=["find red"], completion_ids=[[0]], answer=["red"])


def test_the_prompt_may_be_part_of_what_is_embedded():
    """Also of a chat with parts."""
    asked = []
    reward = RankingReward(
        lambda texts: asked.append(texts) or embed(texts), text_fn=lambda p, c: f"{p} -> {c}"
    )
    prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "find"}]}]
    found = reward(
        prompts=[prompt], completions=[[{"role": "assistant", "content": "red"}]],
        positive=["red"], negatives=[["blue"]],
    )  # fmt: skip
    assert asked[0] == ["find -> red"]
    assert found == pytest.approx(
        [x.reward.item() for x in kernels(["find red"], ["red"], [["blue"]])], abs=1e-6
    )
