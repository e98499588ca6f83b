"""Somebody else's retriever: embedded as its own code does, trained, and still what it was."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText

from elva.data import Item, Query
from elva.errors import UserError
from elva.model.encoder import Encoder
from elva.model.inputs import RET
from elva.model.note import reading_of
from elva.model.reading import Reading
from elva.model.retriever import Retriever
from elva.model.rollout import encode, sample
from tests.elva import families, strangers


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    drawn = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(drawn).resize(size)


ITEMS = [
    Item("0", "a red dog runs", None, "text"),
    Item("1", None, picture(0, (300, 120)), "image"),
    Item("2", "two people in the rain, and nobody knows why they run", None, "text"),
    Item("3", "a dog", picture(1, (70, 200)), "image,text"),
    Query("4", "what is shown", None, "text", "", "t2i", ()),
    Query("5", "who runs", picture(2, (64, 64)), "image,text", "Find the runner", "it2i", ()),
]
LEGACY_MEAN = {"word_embedding_dimension": 64, "pooling_mode_cls_token": False,
               "pooling_mode_mean_tokens": True, "pooling_mode_lasttoken": False}  # fmt: skip


def ours(retriever: Retriever, items=ITEMS, length: int = 0) -> torch.Tensor:
    return encode(retriever, items, max_completion_length=length, batch_size=6).embeddings


def opened(path: Path) -> Retriever:
    retriever = Retriever.load(path)
    retriever.model.double()
    return retriever


@pytest.mark.parametrize(
    ("family", "suffix", "pooling", "normalize"),
    [
        ("qwen2_vl", None, "last", False),
        ("qwen2_vl", "<|endoftext|>", "mean", True),
        ("qwen3_vl", "<|endoftext|>", "last", True),
        ("qwen3_vl", None, "mean", False),
    ],
)
def test_an_embedding_is_its_own_codes(tmp_path, family, suffix, pooling, normalize):
    """To 1e-9 in fp64: texts, pictures and both in one batch padded on the left; nothing is added
    to the vocabulary."""
    path = strangers.sentence_transformer(
        tmp_path / "retriever", family, suffix=suffix, normalize=normalize,
        pooling=LEGACY_MEAN if pooling == "mean" else None,
    )  # fmt: skip
    retriever = opened(path)
    expected = strangers.embed(path, ITEMS, pooling=pooling, normalize=normalize)
    found = ours(retriever)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    assert (expected[0] - expected[2]).abs().max() > 1e-3
    assert RET not in retriever.inputs.tokenizer.get_vocab()
    assert len(retriever.inputs.ending) == (suffix is not None)
