"""Families of models: each forward that is put together here is the model's own."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from elva.data import Item
from elva.errors import UserError
from elva.model import probe
from elva.model.family import decoder_of, read_model
from elva.model.inputs import RET
from elva.model.prompt import mrope_positions
from elva.model.retriever import Retriever
from elva.recipe import LoraSettings
from tests.elva import families

FITTING = [name for name in families.MAKERS if name != "gemma3"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    root, made = tmp_path_factory.mktemp("families"), {}

    def written(family):
        if family not in made:
            made[family] = families.write(root / family, family)
        return made[family]

    return written


@pytest.fixture(scope="module")
def open_in_fp64(checkpoint):
    made = {}

    def opened(family):
        if family not in made:
            made[family] = Retriever.load(checkpoint(family), summary_prompt="say it")
            made[family].model.double()
        return made[family]

    return opened


@pytest.mark.parametrize(
    "family",
    [pytest.param(x, marks=[pytest.mark.thorough] if i % 2 else []) for i, x in enumerate(FITTING)],
)
def test_a_forward_of_ours_is_the_models_own(open_in_fp64, family):
    """Hidden states and logits to 1e-9, alone, padded, mixed and decoded; a picture counts."""
    retriever = open_in_fp64(family)
    assert retriever.plain.dtype == torch.float64
    assert probe.fault(retriever) is None


def drop_deepstack(retriever, monkeypatch):
    whole = type(retriever.family).with_pictures
    monkeypatch.setattr(
        type(retriever.family), "with_pictures",
        lambda *given: {"inputs_embeds": whole(*given)["inputs_embeds"]},
    )  # fmt: skip


def count_axes_as_one(retriever, monkeypatch):
    monkeypatch.setattr(
        type(retriever.family), "positions", lambda self, ids: ids[:1].expand(3, -1, -1)
    )


def hide_pictures(retriever, monkeypatch):
    monkeypatch.setattr(
        type(retriever.family), "with_pictures", lambda self, embeds, *_: {"inputs_embeds": embeds}
    )


def see_the_padding(retriever, monkeypatch):
    read = Retriever.read

    def blind(self, ids, images, mask, *rest):
        return read(self, ids, images, torch.ones_like(mask), *rest)

    monkeypatch.setattr(Retriever, "read", blind)


def begin_where_the_row_does(retriever, monkeypatch):
    read = Retriever.read

    def decoded(self, ids, images, mask, positions, cache=None):
        late = cache is not None and cache.get_seq_length() > 0
        return read(self, ids, images, mask, positions + late, cache)

    monkeypatch.setattr(Retriever, "read", decoded)


@pytest.mark.parametrize(
    ("family", "breaks", "said"),
    [
        ("qwen3_vl", drop_deepstack, "other hidden states than its language model"),
        ("qwen2_vl", count_axes_as_one, "other hidden states than its language model"),
        ("llava", hide_pictures, "a picture does not change the embedding"),
        ("qwen2_5_vl", see_the_padding, "padding on the left changes an embedding"),
        ("llava", begin_where_the_row_does, "decoding with a cache"),
    ],
)
def test_the_probe_names_what_is_broken(open_in_fp64, monkeypatch, family, breaks, said):
    retriever = open_in_fp64(family)
    breaks(retriever, monkeypatch)
    assert said in probe.fault(retriever)


def test_a_model_that_reads_pictures_in_its_own_way_is_refused(checkpoint):
    """Gemma 3 looks at a picture's tokens in both directions."""
    with pytest.raises(UserError) as refused:
        Retriever.load(checkpoint("gemma3"))
    line = str(refused.value)
    assert "\n" not in line
    assert "of type gemma3: its own forward gives other hidden states" in line


def test_what_takes_no_pictures_is_refused_in_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["x"]}')
    with pytest.raises(UserError, match="of type llama: ") as refused:
        Retriever.load(tmp_path, summary_prompt="")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("size", [(56, 56), (170, 60), (60, 150)])
def test_positions_are_the_models_own(open_in_fp64, family, size):
    retriever = open_in_fp64(family)
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    prompt = retriever.inputs.prompt(Item("0", "a dog", Image.fromarray(noise), "image,text"))
    is_image = prompt.input_ids == retriever.inputs.image_id
    grid = retriever.inputs.pixels(prompt.image)["image_grid_thw"]
    expected, _ = retriever.plain.model.get_rope_index(
        prompt.input_ids[None], is_image[None].int(), image_grid_thw=grid
    )
    assert torch.equal(prompt.position_ids, expected[:, 0])
    height, width = (grid[0, 1:] // 2).tolist()
    assert torch.equal(mrope_positions(is_image, (height, width)), expected[:, 0])


def test_qwen3s_features_carry_the_deeper_levels(open_in_fp64):
    retriever = open_in_fp64("qwen3_vl")
    prompt = retriever.inputs.prompt(Item("0", None, Image.new("RGB", (64, 64)), "image"))
    levels = len(retriever.plain.config.vision_config.deepstack_visual_indexes)
    tokens = int((prompt.input_ids == retriever.inputs.image_id).sum())
    width = retriever.embedding_size * (1 + levels)
    assert retriever.image_features([prompt.image])[prompt.image].shape == (tokens, width)


@pytest.mark.parametrize("family", FITTING)
def test_an_adapter_learns_on_the_language_model_alone(checkpoint, family):
    retriever = Retriever.load(checkpoint(family), summary_prompt="say it")
    retriever.freeze_vision(True)
    retriever.add_lora(LoraSettings(rank=2, alpha=4))
    layers = len(decoder_of(retriever.plain).layers)
    trained = [n for n, p in retriever.model.named_parameters() if p.requires_grad]
    pairs = [n for n in trained if "lora_A" in n]
    assert len(pairs) == 7 * layers  # query, key, value, output, gate, up, down
    assert not [n for n in trained if "vis" in n or "projector" in n or "connector" in n]
    rows = [n for n in trained if "trainable_tokens" in n]
    tied = retriever.plain.config.tie_word_embeddings
    assert len(rows) == (1 if tied else 2)


def test_ret_is_saved_with_a_stock_processor(checkpoint, tmp_path):
    first = Retriever.load(checkpoint("llava"), summary_prompt="say it")
    first.save(tmp_path / "again")
    again = Retriever.load(tmp_path / "again")
    assert again.inputs.summary_prompt == "say it" and not again.inputs.ret_is_new
    assert AutoTokenizer.from_pretrained(tmp_path / "again").get_vocab()[RET] == first.inputs.ret_id
    item = Item("0", "a dog", Image.new("RGB", (40, 30), "red"), "image,text")
    prompts = [r.inputs.prompt(item) for r in (first, again)]
    assert torch.equal(prompts[0].input_ids, prompts[1].input_ids)


def test_attentions_agree(checkpoint):
    """`eager` is the definition; what transformers chooses by itself is sdpa."""
    ids = torch.arange(3, 20)[None]
    found = []
    for attention in ("eager", "sdpa", None):
        model, _ = read_model(checkpoint("qwen3_vl"), attention=attention)
        assert model.config._attn_implementation == (attention or "sdpa")
        found.append(model(input_ids=ids).logits)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)
    assert torch.equal(found[1], found[2])
