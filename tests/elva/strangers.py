"""Retrievers of somebody else, tiny and random, in the layouts that are published; and what they
embed, in transformers' own code."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from elva.data import Item, Query
from tests.elva import families

QUERY, DOCUMENT = "Find what is meant.", "Represent it."

READS = {
    "transformer_task": "feature-extraction",
    "modality_config": {
        name: {"method": "forward", "method_output_name": "last_hidden_state"}
        for name in ("text", "image", "message")
    },
    "module_output_name": "token_embeddings",
    "processing_kwargs": {"chat_template": {"add_generation_prompt": True}},
    "unpad_inputs": False,
}
READS["modality_config"]["message"]["format"] = "structured"  # type: ignore[index]


def sentence_transformer(
    path: Path, family: str, *, pooling: dict[str, Any] | None = None, suffix: str | None = None,
    normalize: bool = True, bare: bool = True, tied: bool = True, **about: Any,
) -> Path:  # fmt: skip
    """In sentence-transformers' layout.

    Args:
        pooling: of 1_Pooling/config.json; by the last token for None, as new versions write it.
        suffix: a special token that the tokenizer adds at the end of what it reads.
        bare: weights of the class without a head, as sentence-transformers saves them.
        about: of config_sentence_transformers.json.
    """
    families.write(path, family, tied=tied)
    if suffix is not None:
        tokenizer = AutoTokenizer.from_pretrained(path)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"$A {suffix}",
            special_tokens=[(suffix, tokenizer.convert_tokens_to_ids(suffix))],
        )
        tokenizer.save_pretrained(path)
    if bare:
        model = AutoModelForImageTextToText.from_pretrained(path).model
        (path / "model.safetensors").unlink()
        model.save_pretrained(path)
    prefix = "sentence_transformers."
    modules = [("", "base.modules.transformer.Transformer"),
               ("1_Pooling", "sentence_transformer.modules.pooling.Pooling"),
               *[("2_Normalize", "base.modules.normalize.Normalize")] * normalize]  # fmt: skip
    put(path / "modules.json", [
        {"idx": i, "name": str(i), "path": place, "type": prefix + kind}
        for i, (place, kind) in enumerate(modules)
    ])  # fmt: skip
    put(path / "1_Pooling/config.json",
        {"embedding_dimension": 64, **(pooling or {"pooling_mode": "lasttoken"})})  # fmt: skip
    put(path / "sentence_bert_config.json", READS)
    put(path / "config_sentence_transformers.json", {
        "model_type": "SentenceTransformer", "similarity_fn_name": "cosine",
        "prompts": {"query": QUERY, "document": DOCUMENT}, "default_prompt_name": None, **about,
    })  # fmt: skip
    if normalize:
        put(path / "2_Normalize/config.json", {})
    return path


def qwen3_vl_embedding(path: Path, *, tied: bool) -> Path:
    """As Qwen3-VL-Embedding was published: weights of its own class, without a head."""
    families.write(path, "qwen3_vl", tied=tied)
    model = AutoModelForImageTextToText.from_pretrained(path)
    (path / "model.safetensors").unlink()
    state = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    model.save_pretrained(path, state_dict=state)
    config = json.loads((path / "config.json").read_text())
    put(path / "config.json", {**config, "architectures": ["Qwen3VLForEmbedding"]})
    return path


def put(path: Path, values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


def embed(
    path: Path, items: Sequence[Item], *, pooling: str = "last", normalize: bool = True,
    query: str = QUERY, document: str = DOCUMENT, model: Any = None, dtype: Any = torch.float64,
    size: dict[str, int] | None = None, written: Sequence[int] = (),
) -> Tensor:  # fmt: skip
    """[n, D] by the retriever's own forward, all items as one batch padded on the left.

    Args:
        model: in place of the one in `path`, to differentiate it.
        written: further tokens after each prompt.
    """
    tokenizer = AutoTokenizer.from_pretrained(path)
    images = Qwen2VLImageProcessorPil.from_pretrained(path, **({"size": size} if size else {}))
    if model is None:
        model = AutoModelForImageTextToText.from_pretrained(path).to(dtype).eval()
    rows, given = [], []
    for item in items:
        said = (item.instruction or query) if isinstance(item, Query) else document
        content = [{"type": "image"}] if item.image is not None else []
        content += [{"type": "text", "text": item.text}] if item.text else []
        chat = [{"role": "system", "content": [{"type": "text", "text": said}]}] if said else []
        text = tokenizer.apply_chat_template(
            [*chat, {"role": "user", "content": content}], tokenize=False,
            add_generation_prompt=True,
        )  # fmt: skip
        if item.image is not None:
            seen = images([item.load_image()], return_tensors="pt")
            given.append(seen)
            count = int(seen["image_grid_thw"].prod()) // images.merge_size**2
            text = text.replace("<|image_pad|>", "<|image_pad|>" * count)
        rows.append([*tokenizer(text).input_ids, *written])
    longest = max(map(len, rows))
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    image = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    pictures = {
        key: torch.cat([seen[key] for seen in given])
        for key in ("pixel_values", "image_grid_thw") * bool(given)
    }
    if pictures:
        pictures["pixel_values"] = pictures["pixel_values"].to(dtype)
    states = model.model(
        input_ids=ids, attention_mask=mask, mm_token_type_ids=(ids == image).int(), **pictures
    ).last_hidden_state
    pooled = states[:, -1]
    if pooling == "mean":
        pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return torch.nn.functional.normalize(pooled, dim=-1) if normalize else pooled


def pictures_and_names(root: Path) -> Path:
    """A data directory in M-BEIR's layout: eight names that ask for pictures of noise, of which
    there are twelve; the same to train and to test."""
    rows = []
    for i in range(12):
        place = f"mbeir_images/x_images/{i}.png"
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        drawn = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(drawn).resize((56 + 28 * (i % 3), 56)).save(root / place)
        rows.append({"did": f"90:{i + 1}", "txt": None, "img_path": place, "modality": "image",
                     "src_content": None})  # fmt: skip
    asked = [
        {"qid": f"90:{i + 1}", "query_txt": f"noise of kind {'abcdefgh'[i]}", "task_id": 0,
         "query_img_path": None, "query_modality": "text", "pos_cand_list": [f"90:{i + 1}"],
         "neg_cand_list": []}
        for i in range(8)
    ]  # fmt: skip
    head = "query_modality\tcand_modality\tdataset_name\tdataset_id\tprompt_1"
    files = {
        "instructions/query_instructions.tsv": [head, "text\timage\tX\t90\tFind the picture."],
        "cand_pool/local/mbeir_x_task0_cand_pool.jsonl": [json.dumps(row) for row in rows],
        "qrels/test/mbeir_x_task0_test_qrels.txt": [f"90:{i} 0 90:{i} 1 0" for i in range(1, 9)],
    }
    for split in ("train", "test"):
        lines = [json.dumps(row) for row in asked]
        files[f"query/{split}/mbeir_x_task0_{split}.jsonl"] = lines
    for place, lines in files.items():
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        (root / place).write_text("\n".join(lines) + "\n")
    return root
