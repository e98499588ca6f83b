"""Models of sentence-transformers, tiny and random, saved by sentence-transformers itself, and
items for them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from elva.data import Item, Query

PROMPTS = {"query": "ask: ", "document": "tell: "}

LAYERS = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip


def text(
    path: Path, *, seed: int = 0, longest: int = 24, modules: Sequence[nn.Module] = (), **how: Any
) -> Path:
    """BERT, a mean, and rows of length 1.

    Args:
        longest: tokens that a text is cut at.
        modules: what follows the mean, before the rows get their length.
        how: of SentenceTransformer: its prompts, its similarity.
    """
    words = Tokenizer(models.BPE(unk_token="[UNK]"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words.train_from_iterator(
        ["a cat, a dog"], trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet)
    )
    words.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, model_max_length=longest, **dict(zip(names, special, strict=True))
    )
    config = BertConfig(
        vocab_size=len(tokenizer), max_position_embeddings=64, initializer_range=0.2, **LAYERS
    )
    base = path / "base"
    _save(base, seed, lambda: BertModel(config), tokenizer)
    mean = Pooling(LAYERS["hidden_size"], "mean")
    parts = [Transformer(str(base), max_seq_length=longest), mean, *modules, Normalize()]
    SentenceTransformer(modules=parts, device="cpu", **how).save(str(path / "model"))
    return path / "model"


def clip(path: Path, *, seed: int = 0, laid_out: bool = True) -> Path:
    """CLIP, for texts and pictures.

    Args:
        laid_out: as sentence-transformers saves it; else as transformers does.
    """
    letters = [*pre_tokenizers.ByteLevel.alphabet()]
    vocab = [*letters, *(f"{letter}</w>" for letter in letters)]
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        {word: number for number, word in enumerate(vocab)}, [], model_max_length=40
    )
    pictures = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    tokens = {"bos_token_id": len(vocab) - 2, "eos_token_id": len(vocab) - 1}
    config = CLIPConfig(
        text_config={
            "vocab_size": len(vocab), "max_position_embeddings": 40, **tokens, **LAYERS,
            "pad_token_id": len(vocab) - 1, "initializer_range": 0.2,
        },
        vision_config={"image_size": 32, "patch_size": 8, "initializer_range": 0.2, **LAYERS},
        projection_dim=24,
    )  # fmt: skip
    plain = path / "plain"
    _save(plain, seed, lambda: CLIPModel(config), CLIPProcessor(pictures, tokenizer))
    if not laid_out:
        return plain
    SentenceTransformer(str(plain), device="cpu").save(str(path / "model"))
    return path / "model"


def _save(path: Path, seed: int, make: Any, processor: Any) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = make()
    model.save_pretrained(path)
    processor.save_pretrained(path)


def shown(id: str, text: str | None, image: Image.Image | None = None) -> Item:
    kinds = ("image", image), ("text", text)
    return Item(id, text, image, ",".join(k for k, there in kinds if there is not None))


def asked(text: str, instruction: str = "") -> Query:
    return Query("1:1", text, None, "text", instruction=instruction, task="t2t", positives=())


def noise(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 255, (*size, 3), np.uint8)
    return Image.fromarray(values)


def own(model: Path) -> SentenceTransformer:
    return SentenceTransformer(str(model), device="cpu")


def equal(found: torch.Tensor, expected: np.ndarray) -> None:
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-6)
    assert found.dtype == torch.float32
