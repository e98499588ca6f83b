"""A tiny "pretrained" Qwen2-VL of the released structure: what hides in a model of our own shows.

Its token layout is the released one: byte pairs, then the fourteen special tokens, then rows of the
vocabulary that no token has. The chat template is Qwen2-VL's, pictures come in patches of two
frames, keys and values are shared by heads, it knows no [RET], and it was trained for seconds, by
transformers' own loss, to answer with what it was shown and to end in <|im_end|>.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from elva.data import Item, Query, load

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
"""Qwen2-VL's fourteen, in its order; <|endoftext|> is the pad."""

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""What Qwen2 merges byte pairs within."""

TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}<|im_end|>\n{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}"
    "{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""As Qwen2-VL-2B-Instruct's, without its videos."""

PADDED = 64
"""Rows of the vocabulary are a multiple of it, and one multiple more, as released ones are."""


def write(path: Path, corpus: Path, *, tied: bool, steps: int = 80, seed: int = 0) -> Path:
    """A checkpoint that knows the corpus's names and ends its answers with <|im_end|>."""
    data = load(corpus, split="train")
    tokenizer = _tokenizer(data.texts())
    processor = Qwen2VLImageProcessorPil(
        patch_size=14, merge_size=2, temporal_patch_size=2,
        size={"shortest_edge": 56 * 56, "longest_edge": 56 * 56},
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2VLForConditionalGeneration(_config(tokenizer, tied))
        _pretrain(model, tokenizer, processor, list(_lessons(data)), steps)
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    model.generation_config = GenerationConfig(
        eos_token_id=ends, pad_token_id=ends[1], do_sample=True, top_k=1, temperature=0.01
    )
    for part in (model, tokenizer, processor):
        part.save_pretrained(path)
    return path


def _tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    byte_pairs = Tokenizer(models.BPE())
    byte_pairs.normalizer = normalizers.NFC()
    byte_pairs.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORDS), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    byte_pairs.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    byte_pairs.train_from_iterator([*texts, "system user assistant You are helpful"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_pairs, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL), chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def _config(tokenizer: PreTrainedTokenizerFast, tied: bool) -> Qwen2VLConfig:
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(list(SPECIAL)), strict=True))
    rows = (len(tokenizer) // PADDED + 2) * PADDED
    return Qwen2VLConfig(
        text_config={
            "vocab_size": rows, "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 1024, "initializer_range": 0.06,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3],
            },
            "bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"],
        },
        vision_config={
            "depth": 1, "embed_dim": 64, "num_heads": 4, "hidden_size": 64, "patch_size": 14,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "initializer_range": 0.06,
        },
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=tied,
    )  # fmt: skip


def _lessons(data) -> Iterator[tuple[Item, str]]:
    """What is shown or said, and its name."""
    for query in data.queries:
        if query.task in ("t2i", "i2t", "t2t"):
            positive = data.pool(query.task)[data.pool(query.task).row(query.positives[0])]
            name = positive.text or query.raw_text
            if name:
                yield query, name.removesuffix(".")


def _pretrain(
    model: Qwen2VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast,
    processor: Qwen2VLImageProcessorPil, lessons: Sequence[tuple[Item, str]], steps: int,
) -> None:  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    draw = torch.Generator().manual_seed(0)
    groups = [[x for x in lessons if (x[0].image is None) == textual] for textual in (True, False)]
    for step in range(steps):
        some = groups[step % 2]
        rows = torch.randint(len(some), (16,), generator=draw).tolist()
        loss = model(**_batch([some[i] for i in rows], model, tokenizer, processor)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def _batch(lessons, model, tokenizer, processor) -> dict[str, torch.Tensor]:
    pixels, grids, rows, starts = [], [], [], []
    for item, answer in lessons:
        content = [{"type": "image"}] if item.image is not None else []
        words = item.prompted if isinstance(item, Query) else item.text
        content.append({"type": "text", "text": f"{words or ''} Summarise it."})
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        if item.image is not None:
            seen = processor([item.load_image()], return_tensors="pt")
            pixels.append(seen["pixel_values"])
            grids.append(seen["image_grid_thw"])
            places = int(seen["image_grid_thw"].prod()) // processor.merge_size**2
            asked = asked.replace("<|image_pad|>", "<|image_pad|>" * places)
        prompt = tokenizer(asked).input_ids
        rows.append(prompt + tokenizer(f"{answer}<|im_end|>").input_ids)
        starts.append(len(prompt))
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
        labels[i, start : len(row)] = torch.tensor(row[start:])
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    batch["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    if pixels:
        batch |= {"pixel_values": torch.cat(pixels), "image_grid_thw": torch.cat(grids)}
    return batch
