"""Rollouts, prompts and the losses against independent computations on a tiny random model."""

import hashlib
import math
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import DynamicCache

from elva.data import Item, load
from elva.draws import permutation, uniforms
from elva.model import rollout
from elva.model.cache import decoding_cache
from elva.model.inputs import RET, Inputs
from elva.model.prompt import Prompt, mrope_positions
from elva.model.retriever import Retriever
from elva.model.rollout import encode, sample, token_log_probs
from elva.model.scratch import create
from elva.recipe import LoraSettings, ScratchModel
from elva.training import objective

MODEL = ScratchModel(
    hidden_size=32, intermediate_size=64, layers=2, heads=2, vocabulary=600,
    vision_size=32, vision_layers=1, vision_heads=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "start"
    path.mkdir()
    texts = load(corpus, split="train").texts()
    create(path, MODEL, texts, summary_prompt="", seed=0)
    return path


@pytest.fixture(scope="module")
def retriever(checkpoint: Path) -> Retriever:
    return Retriever.load(checkpoint)


@pytest.fixture(scope="module")
def items(corpus: Path) -> list[Item]:
    """Texts, pictures, and pictures with text, of different lengths."""
    queries = load(corpus, split="train").queries
    found = [q for task in ("t2i", "i2t", "it2i") for q in queries if q.task == task][::9]
    assert {q.task for q in found} == {"t2i", "i2t", "it2i"}
    return found


def test_positions_are_transformers_own(retriever: Retriever, items: list[Item]) -> None:
    for item in items:
        prompt = retriever.inputs.prompt(item)
        ids = prompt.input_ids[None]
        grid = None if prompt.image is None else retriever.inputs.patches(prompt.image)[1][None]
        expected, _ = retriever.plain.model.get_rope_index(
            ids, mm_token_type_ids=(ids == retriever.inputs.image_id).int(), image_grid_thw=grid
        )
        assert torch.equal(expected[:, 0], prompt.position_ids)


def test_positions_of_a_wide_picture() -> None:
    is_image = torch.tensor([False, True, True, True, False])
    assert mrope_positions(is_image, (1, 3)).tolist() == [
        [0, 1, 1, 1, 4], [0, 1, 1, 1, 4], [0, 1, 2, 3, 4],
    ]  # fmt: skip


@torch.no_grad()
def test_hidden_states_are_the_stock_forward(retriever: Retriever, items: list[Item]) -> None:
    """One unpadded row through transformers' own forward against our padded, cached path."""
    completion = torch.tensor([[40, 41, retriever.inputs.ret_id]])
    prompts = [retriever.inputs.prompt(i) for i in items]
    batch = retriever.inputs.collate(prompts, retriever.device)
    ids = completion.expand(len(prompts), -1)
    ours = retriever.hidden_states(batch, ids, torch.ones_like(ids, dtype=torch.bool))
    for row, prompt in enumerate(prompts):
        whole = torch.cat([prompt.input_ids, completion[0]])[None]
        picture = {}
        if prompt.image is not None:
            pixels, grid = retriever.inputs.patches(prompt.image)
            kinds = (whole == retriever.inputs.image_id).int()
            picture = {
                "pixel_values": pixels, "image_grid_thw": grid[None], "mm_token_type_ids": kinds,
            }  # fmt: skip
        retriever.plain.model.rope_deltas = None
        stock = retriever.plain(input_ids=whole, output_hidden_states=True, **picture)
        difference = (stock.hidden_states[-1][0, -4:] - ours[row]).abs().max()
        assert difference < 2e-5


@torch.no_grad()
def test_rollouts_carry_the_log_probs_and_embeddings_of_a_forward(
    retriever: Retriever, items: list[Item]
) -> None:
    prompts = [retriever.inputs.prompt(i) for i in items]
    draws = uniforms((1, "draws"), (len(prompts), 3, 6))
    out = sample(retriever, prompts, draws=draws, max_completion_length=6, temperature=0.7)
    repeated = [p for p in prompts for _ in range(3)]
    batch = retriever.inputs.collate(repeated, retriever.device)
    hidden = retriever.hidden_states(batch, out.ids, out.mask)
    at_ret = hidden[torch.arange(len(repeated)), out.mask.sum(1)]
    assert (at_ret - out.embeddings).abs().max() < 2e-5
    new = token_log_probs(retriever.plain.lm_head(hidden[:, :-1]), out.ids, 0.7, retriever.inputs)
    drawn = out.mask & (out.finished[:, None] | (out.ids != retriever.inputs.ret_id))
    assert (new - out.log_probs)[drawn].abs().max() < 1e-4
    last = out.ids.gather(1, out.mask.sum(1, keepdim=True) - 1)
    assert (last == retriever.inputs.ret_id).all()
    assert not torch.isin(out.ids[out.mask], torch.tensor(retriever.inputs.banned_ids)).any()


@torch.no_grad()
def test_draws_follow_the_distribution(retriever: Retriever, items: list[Item]) -> None:
    """First tokens of 4,000 rollouts against the softmax: total variation within sampling noise."""
    prompt = [retriever.inputs.prompt(items[0])]
    draws = uniforms((2, "draws"), (1, 4000, 1))
    out = sample(retriever, prompt, draws=draws, max_completion_length=1)
    batch = retriever.inputs.collate(prompt, retriever.device)
    ids = torch.tensor([[retriever.inputs.ret_id]])
    hidden = retriever.hidden_states(batch, ids, ids > 0)[:, 0]
    logits = retriever.plain.lm_head(hidden).float()
    inputs = retriever.inputs
    logits[:, inputs.banned_ids] = -math.inf
    p = logits.softmax(-1)[0]
    p[inputs.ret_id] += p[inputs.end_ids].sum()  # an end of any kind is written as [RET]
    p[inputs.end_ids] = 0
    frequency = torch.bincount(out.ids[:, 0], minlength=len(p)) / 4000
    noise = (2 * p * (1 - p) / (math.pi * 4000)).sqrt().sum() / 2  # expected total variation
    assert (frequency - p).abs().sum() / 2 < 1.3 * noise


def test_draws_are_a_function_of_their_seed() -> None:
    first = uniforms((0, "3", "draws", 7), (4, 5))
    assert torch.equal(first, uniforms((0, "3", "draws", 7), (4, 5)))
    assert not torch.equal(first, uniforms((0, "3", "draws", 8), (4, 5)))


@pytest.mark.parametrize("shape", [(0,), (1,), (17,), (4, 3, 7), (5000,)])
def test_draws_are_torchs_bit_for_bit(shape: tuple[int, ...]) -> None:
    seed = (3, "any", shape)
    digest = hashlib.sha256(repr(seed).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    drawn = torch.rand(*shape, generator=generator, dtype=torch.float64)
    assert torch.equal(uniforms(seed, shape), drawn)
    assert permutation(seed, len(drawn)) == uniforms(seed, shape[:1]).argsort().tolist()


@torch.no_grad()
def test_batch_size_and_padding_move_an_embedding_by_rounding_only(
    retriever: Retriever, items: list[Item]
) -> None:
    one = encode(retriever, items, max_completion_length=5, batch_size=1)
    many = encode(retriever, items, max_completion_length=5, batch_size=64)
    gap = (one.embeddings - many.embeddings).norm(dim=1) / one.embeddings.norm(dim=1)
    assert gap.max() < 1e-5
    assert one.summaries == many.summaries


@torch.no_grad()
def test_the_picture_changes_the_embedding(retriever: Retriever) -> None:
    pictures = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    asked = [Item(str(i), "what is this", p, "image,text") for i, p in enumerate(pictures)]
    red, blue = encode(retriever, asked, max_completion_length=4).embeddings
    assert (red - blue).norm() / red.norm() > 1e-3


@torch.no_grad()
def test_a_checkpoint_reads_back_to_the_same_bits(
    retriever: Retriever, items: list[Item], tmp_path: Path
) -> None:
    retriever.save(tmp_path)
    again = Retriever.load(tmp_path)
    ours = encode(retriever, items[:8], max_completion_length=4)
    theirs = encode(again, items[:8], max_completion_length=4)
    assert torch.equal(ours.embeddings, theirs.embeddings)


def test_the_scratch_tokenizer_reads_back_what_it_wrote(retriever: Retriever) -> None:
    tokenizer = retriever.inputs.tokenizer
    for text in (
        "woman: medium-light skin tone, red hair",
        "o\u2019clock & co.",
        "\u00e7a va \u2014 \u00e9t\u00e9",
        "a_b  c",
    ):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids).strip() == text
    assert len(tokenizer("medium-light", add_special_tokens=False).input_ids) == 1


def test_ret_is_registered_where_the_vocabulary_lacks_it(checkpoint: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

    for file in checkpoint.iterdir():
        text = file.read_text() if file.suffix == ".json" else None
        target = tmp_path / file.name
        target.write_text(text.replace(RET, "[OLD]")) if text else target.write_bytes(
            file.read_bytes()
        )
    assert AutoTokenizer.from_pretrained(tmp_path).convert_tokens_to_ids(RET) is None
    before = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path)
    retriever = Retriever.load(tmp_path)
    assert retriever.inputs.ret_id == before.config.text_config.vocab_size
    assert retriever.plain.get_input_embeddings().num_embeddings > retriever.inputs.ret_id


def test_lora_trains_the_adapter_and_ret_and_merges_exactly(
    checkpoint: Path, items: list[Item], tmp_path: Path
) -> None:
    retriever = Retriever.load(checkpoint)
    retriever.add_lora(LoraSettings(rank=4, alpha=8))
    trained = [n for n, p in retriever.model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in n or "trainable_tokens" in n for n in trained)
    with torch.no_grad():
        for name, parameter in retriever.model.named_parameters():
            if name in trained:
                parameter.add_(torch.randn_like(parameter) * 0.05)
        adapted = encode(retriever, items[:6], max_completion_length=4).embeddings
        retriever.save(tmp_path)
        merged = encode(Retriever.load(tmp_path), items[:6], max_completion_length=4).embeddings
    plain = encode(Retriever.load(checkpoint), items[:6], max_completion_length=4).embeddings
    assert (adapted - merged).norm() / merged.norm() < 1e-4
    assert (adapted - plain).norm() / plain.norm() > 1e-2


def test_policy_loss_is_grpo_token_by_token() -> None:
    """DeepSeekMath, eq. 3 and 4, written out in python floats."""
    new = torch.tensor([[-1.0, -0.5, -9.0], [-0.2, -0.3, -0.4]], requires_grad=True)
    old = torch.tensor([[-1.2, -0.5, 0.0], [-0.9, -0.3, -0.1]])
    ref = torch.tensor([[-1.1, -0.7, 0.0], [-0.2, -0.6, -0.4]])
    advantages, mask = torch.tensor([1.5, -0.5]), torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    loss, kl = objective.policy_loss(new, old, ref, advantages, mask, epsilon=0.2, beta=0.2)
    for row in range(2):
        terms, ks = [], []
        for t in range(3):
            if mask[row, t]:
                rho = math.exp(new[row, t].item() - old[row, t].item())
                a = advantages[row].item()
                gain = min(rho * a, min(max(rho, 0.8), 1.2) * a)
                gap = ref[row, t].item() - new[row, t].item()
                ks.append(math.exp(gap) - gap - 1)
                terms.append(0.2 * ks[-1] - gain)
        assert loss[row].item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)
        assert kl[row].item() == pytest.approx(sum(ks), rel=1e-5)
    loss.sum().backward()
    assert new.grad is not None and new.grad[0, 2] == 0 and torch.isfinite(new.grad).all()


def test_caption_targets_stop_after_the_first_wrong_token() -> None:
    caption = torch.tensor([[5, 6, 7, 9], [5, 6, 9, -100], [-100, -100, -100, -100]])
    written = torch.tensor([[5, 8, 7, 9], [5, 6, 9, 0], [1, 2, 3, 4]])
    assert objective.caption_targets(written, caption).tolist() == [
        [5, 6, -100, -100], [5, 6, 9, -100], [-100, -100, -100, -100],
    ]  # fmt: skip


def _plain_samples(
    retriever: Retriever, prompt: Prompt, draws: Tensor, longest: int, temperature: float
) -> list[list[int]]:
    """One prompt's completions, a full forward for each token, cumulated over the vocabulary."""
    inputs, rows = retriever.inputs, []
    for shares in draws:
        row: list[int] = []
        while len(row) < longest and inputs.ret_id not in row:
            batch = inputs.collate([prompt], retriever.device)
            ids = torch.tensor([[*row, inputs.ret_id]])
            hidden = retriever.hidden_states(batch, ids, torch.ones_like(ids, dtype=torch.bool))
            p = (retriever.plain.lm_head(hidden[0, len(row)]) / temperature).softmax(-1)
            p[inputs.ret_id] += p[inputs.end_ids].sum()
            p[[*inputs.banned_ids, *inputs.end_ids]] = 0
            cumulated = p.cumsum(0)
            row.append(int(torch.searchsorted(cumulated, shares[len(row)] * cumulated[-1])))
        rows.append(row if inputs.ret_id in row else [*row, inputs.ret_id])
    return rows


@pytest.mark.thorough
@torch.no_grad()
def test_samples_are_those_of_a_forward_a_token(checkpoint: Path, items: list[Item]) -> None:
    """Rows that end at different steps, in float64: the same tokens for the same draws."""
    retriever = Retriever.load(checkpoint).double()
    retriever.plain.lm_head.weight[retriever.inputs.ret_id] *= 3  # rows end, at many steps
    prompts = [retriever.inputs.prompt(i) for i in items[::4]]
    draws = uniforms((4, "draws"), (len(prompts), 5, 9))
    out = sample(retriever, prompts, draws=draws, max_completion_length=9, temperature=0.8)
    found = [ids[mask].tolist() for ids, mask in zip(out.ids, out.mask, strict=True)]
    for place, prompt in enumerate(prompts):
        expected = _plain_samples(retriever, prompt, draws[place], 9, 0.8)
        assert found[place * 5 : place * 5 + 5] == expected
    assert len({len(x) for x in found}) > 3 and 0 < out.finished.sum() < len(found)


def test_the_token_drawn_is_where_the_cumulated_probabilities_pass_the_share() -> None:
    """Against one fp64 cumulation over all; probabilities of 0 are never drawn, at either end."""
    draw = torch.Generator().manual_seed(0)
    for size in (1, 7, 256, 257, 3000):
        p = torch.rand(400, size, generator=draw).pow(8)
        p[:, torch.rand(size, generator=draw) < 0.3] = 0
        p[:, -1] = 1e-3 if size < 3 else 0
        p /= p.sum(-1, keepdim=True)
        shares = torch.rand(400, generator=draw, dtype=torch.float64)
        shares[0], shares[1] = 0.0, 1 - 2**-53
        token = rollout._invert(p, shares)
        cumulated = p.double().cumsum(-1)
        after = cumulated.gather(1, token[:, None])[:, 0] / cumulated[:, -1]
        before = after - p.double().gather(1, token[:, None])[:, 0] / cumulated[:, -1]
        assert (p.gather(1, token[:, None]) > 0).all()
        assert (before - 3e-7 <= shares).all() and (shares <= after + 3e-7).all()


@torch.no_grad()
def test_a_decoding_cache_is_transformers_own_without_its_copies(retriever: Retriever) -> None:
    config = retriever.plain.config.get_text_config()
    draw = torch.Generator().manual_seed(0)
    ours, theirs = decoding_cache(config, 4), DynamicCache(config=config)
    whole = None
    for rows, length in ((3, 5), (6, 1), (6, 1), (2, 1), (2, 1)):
        if rows == 2 and len(ours.layers[0].keys) == 6:
            for cache in (ours, theirs):
                cache.batch_select_indices(torch.tensor([1, 4]))
        key, value = torch.randn(2, rows, 2, length, 16, generator=draw)
        for layer in range(len(ours.layers)):
            found, expected = (c.update(key, value, layer) for c in (ours, theirs))
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert ours.get_seq_length() == theirs.get_seq_length()
        if rows == 3:
            for cache in (ours, theirs):
                cache.batch_repeat_interleave(2)
        elif length == 1 and rows == 6:
            at = found[0].data_ptr()
            assert whole in (None, at)  # no step moves what was written
            whole = at


@pytest.mark.parametrize("longest_edge", [56 * 56, 28 * 28 * 40])
def test_a_picture_is_tokenised_by_its_header(
    checkpoint: Path, tmp_path: Path, longest_edge: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Odd sizes, extreme ratios, turned by EXIF, each format: the grid of the decoded patches."""
    inputs = Retriever.load(checkpoint).inputs
    inputs.bound_pixels(28 * 28 * 4, longest_edge)
    inputs.save(tmp_path)
    shutil.copy(checkpoint / "config.json", tmp_path)
    inputs = Inputs.load(tmp_path, "")
    assert dict(inputs.image_processor.size) == {
        "shortest_edge": 28 * 28 * 4, "longest_edge": longest_edge,
    }  # fmt: skip
    decoded: list[str] = []
    load_image = Item.load_image
    monkeypatch.setattr(
        Item, "load_image", lambda self: (decoded.append(self.id), load_image(self))[1]
    )
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter to the right
    sizes = [(1, 1), (29, 31), (640, 480), (333, 77), (1500, 11), (7, 900), (41, 41), (1000, 999)]
    for number, (size, kind) in enumerate((s, k) for s in sizes for k in ("jpg", "png", "webp")):
        path = tmp_path / f"{number}.{kind}"
        Image.new("RGB", size, "red").save(path, exif=turned)
        prompt = inputs.prompt(Item(str(number), None, path, "image"))
        placeholders = int((prompt.input_ids == inputs.image_id).sum())
        assert decoded == []
        _, height, width = inputs.patches(str(path))[1].tolist()
        assert placeholders * inputs.image_processor.merge_size**2 == height * width
        assert inputs._grid(str(path)) == (height // 2, width // 2)
        assert decoded.pop() == str(number)
