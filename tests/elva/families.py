"""Tiny random checkpoints of many families, of the released structure, made offline."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma3Config,
    GenerationConfig,
    Idefics3Config,
    LlavaConfig,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3VLConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.elva.standin import SPECIAL, TEMPLATE

TEXTS = ("a red dog runs over wet grass", "two people in the rain", "describe what is shown")

TEXT = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.1, "max_position_embeddings": 2048,
}  # fmt: skip

PLAIN_TEMPLATE = (
    "{% for message in messages %}USER: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


def write(path: Path, family: str, *, seed: int = 0, tied: bool = False, **changes: Any) -> Path:
    """A checkpoint with random weights of a `model_type`.

    Args:
        tied: whether Qwen's head shares the rows of its embeddings; others have their own.
        changes: of the language model's config.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, parts = MAKERS[family]({**changes, **({"tied": True} if tied else {})})
    tokenizer = parts[0].tokenizer if isinstance(parts[0], ProcessorMixin) else parts[0]
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    for part in (model, *parts):
        part.save_pretrained(path)
    return path


def _tokenizer(special: Sequence[str], **how: Any) -> PreTrainedTokenizerFast:
    byte_pairs = Tokenizer(models.BPE())
    byte_pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_pairs.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    byte_pairs.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_pairs, additional_special_tokens=list(special), **how
    )


def _qwen(kind: type, vision: dict[str, Any], patch: int) -> Callable[[dict[str, Any]], Any]:
    def make(changes: dict[str, Any]) -> Any:
        tokenizer = _tokenizer(
            SPECIAL, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE
        )
        ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(list(SPECIAL)), strict=True))
        tied = changes.pop("tied", False)
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
        if kind is Qwen3VLConfig:
            rope["mrope_interleaved"] = True
        config = kind(
            text_config={**TEXT, "vocab_size": 448, "rope_parameters": rope, "head_dim": 16,
                         **changes},
            vision_config={"patch_size": patch, "spatial_merge_size": 2, "temporal_patch_size": 2,
                           "num_heads": 4, "initializer_range": 0.1, **vision},
            image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
            vision_start_token_id=ids["<|vision_start|>"],
            vision_end_token_id=ids["<|vision_end|>"], tie_word_embeddings=tied,
        )  # fmt: skip
        size = {"shortest_edge": patch**2 * 16, "longest_edge": patch**2 * 100}
        processor = Qwen2VLImageProcessorPil(patch_size=patch, merge_size=2, size=size)
        return AutoModelForImageTextToText.from_config(config), (tokenizer, processor)

    return make


def _plain(special: str, **how: Any) -> PreTrainedTokenizerFast:
    return _tokenizer(
        ("<s>", "</s>", "<pad>", special), bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        chat_template=PLAIN_TEMPLATE.replace("<image>", special), **how,
    )  # fmt: skip


def _llava(changes: dict[str, Any]) -> Any:
    from transformers import LlavaProcessor

    tokenizer = _plain("<image>")
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        image_size=28, patch_size=7, initializer_range=0.1,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision,
        text_config={"model_type": "llama", **TEXT, "vocab_size": len(tokenizer), **changes},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), image_seq_length=16,
    )  # fmt: skip
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer, patch_size=7, vision_feature_select_strategy="default",
        chat_template=tokenizer.chat_template, num_additional_image_tokens=1,
    )  # fmt: skip
    return AutoModelForImageTextToText.from_config(config), (processor,)


def _idefics3(changes: dict[str, Any]) -> Any:
    from transformers import Idefics3Processor

    tokenizer = _plain(
        "<image>",
        extra_special_tokens={
            "image_token": "<image>", "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>", "end_of_utterance_token": "<end_of_utterance>",
        },
    )  # fmt: skip
    processor = Idefics3Processor(
        Idefics3ImageProcessorPil(
            size={"longest_edge": 56}, max_image_size={"longest_edge": 28}
        ),
        tokenizer, image_seq_len=4, chat_template=tokenizer.chat_template,
    )  # fmt: skip
    config = Idefics3Config(
        vision_config={"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                       "num_attention_heads": 2, "image_size": 28, "patch_size": 7,
                       "initializer_range": 0.1},
        text_config={"model_type": "llama", **TEXT, "vocab_size": len(processor.tokenizer),
                     "pad_token_id": tokenizer.pad_token_id, **changes},
        image_token_id=processor.image_token_id, scale_factor=2,
    )  # fmt: skip
    return AutoModelForImageTextToText.from_config(config), (processor,)


def _gemma3(changes: dict[str, Any]) -> Any:
    """Looks at a picture's tokens in both directions, which the language model alone does not."""
    from transformers import Gemma3Processor

    tokenizer = _plain(
        "<start_of_image>",
        extra_special_tokens={
            "image_token": "<image_soft_token>", "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
        },
    )  # fmt: skip
    processor = Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": 28, "width": 28}),
        tokenizer, image_seq_length=4, chat_template=tokenizer.chat_template,
    )  # fmt: skip
    ids = processor.tokenizer.convert_tokens_to_ids
    config = Gemma3Config(
        vision_config={"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                       "num_attention_heads": 2, "image_size": 28, "patch_size": 7},
        text_config={**TEXT, "head_dim": 16, "vocab_size": len(processor.tokenizer), **changes},
        mm_tokens_per_image=4, image_token_id=ids("<image_soft_token>"),
        boi_token_index=ids("<start_of_image>"), eoi_token_index=ids("<end_of_image>"),
    )  # fmt: skip
    model = AutoModelForImageTextToText.from_config(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)
    return model, (processor,)


MAKERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "qwen2_vl": _qwen(
        Qwen2VLConfig, {"depth": 2, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}, 14
    ),
    "qwen2_5_vl": _qwen(
        Qwen2_5_VLConfig,
        {"depth": 4, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64,
         "window_size": 56, "fullatt_block_indexes": [3]}, 14,
    ),
    "qwen3_vl": _qwen(
        Qwen3VLConfig,
        {"depth": 4, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64,
         "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1, 2]}, 16,
    ),
    "llava": _llava,
    "idefics3": _idefics3,
    "gemma3": _gemma3,
}  # fmt: skip
