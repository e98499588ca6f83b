"""A model that starts from nothing, written as an ordinary Qwen2-VL checkpoint and read back by
`Retriever.load`, the same call that reads Qwen2-VL-2B."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from elva.model.inputs import RET, Inputs, token_id
from elva.model.retriever import Retriever
from elva.recipe import ScratchModel

_QWEN_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>",
    "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip

_SCRATCH_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>{% endfor %}"
)
"""Qwen2-VL's chat template without its system prompt and roles: five tokens instead of fifteen."""


WORDS = r" ?[\w'\u2019-]+| ?[^\s\w]+|\s+"
"""What byte pairs are merged within, in a tokenizer of our own."""


def create(
    path: Path, spec: ScratchModel, texts: Iterable[str], *, summary_prompt: str, seed: int
) -> None:
    """Write a randomly initialised Qwen2-VL with a tokenizer trained on `texts` as a checkpoint."""
    tokenizer = _train_tokenizer(texts, spec.vocabulary)
    ids = {token: token_id(tokenizer, token) for token in _QWEN_TOKENS}
    head = spec.hidden_size // spec.heads
    half = head // 2
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": spec.hidden_size,
            "intermediate_size": spec.intermediate_size,
            "num_hidden_layers": spec.layers,
            "num_attention_heads": spec.heads,
            "num_key_value_heads": spec.heads,
            "max_position_embeddings": 512,
            "initializer_range": spec.initializer_range,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8],
            },
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": spec.vision_layers,
            "embed_dim": spec.vision_size,
            "num_heads": spec.vision_heads,
            "hidden_size": spec.hidden_size,
            "patch_size": spec.patch_size,
            "spatial_merge_size": 2,
            "temporal_patch_size": 1,
            "initializer_range": spec.initializer_range,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2VLForConditionalGeneration(config)
    pixels = spec.image_size**2
    processor = Qwen2VLImageProcessorPil(
        patch_size=spec.patch_size,
        merge_size=2,
        temporal_patch_size=1,
        size={"shortest_edge": pixels, "longest_edge": pixels},
        image_mean=[spec.image_mean] * 3,
        image_std=[spec.image_std] * 3,
    )
    retriever = Retriever(model, Inputs(tokenizer, processor, summary_prompt))
    retriever.trained_on = []
    retriever.save(path)


def _train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerBase:
    """Byte-level BPE, as Qwen2's, in lower case and with whole hyphenated words: at this size a
    capital letter is a lost row, and every token of a summary a decoding step."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Lowercase(), normalizers.Prepend(" ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[*_QWEN_TOKENS, RET],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[*_QWEN_TOKENS[1:], RET],
        chat_template=_SCRATCH_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
