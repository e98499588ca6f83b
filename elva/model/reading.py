"""How a model is read out: ELVA's at [RET], or somebody else's retriever as its own files say.

Files that are understood: those of sentence-transformers (`modules.json`, its Pooling's and
Transformer's config, `config_sentence_transformers.json`), and Qwen3-VL-Embedding's as it was
published, whose scripts/qwen3_vl_embedding.py says in code what it does.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from torch import Tensor

from elva.data import Item, Query
from elva.errors import UserError
from elva.recipe import ModelConfig

_LAYOUT = (
    "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json",
    "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json",
    "chat_template.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model",
    "generation_config.json",
)  # fmt: skip
"""What a retriever's own tools read beside its weights."""

ABOUT, READS = "config_sentence_transformers.json", "sentence_bert_config.json"

CHAT = ("add_generation_prompt", "restore_suffix")
"""What of a chat template is understood."""

KINDS: dict[type, str] = {dict: "an object", list: "a list"}
"""What JSON calls them."""

_SCRIPT = "scripts/qwen3_vl_embedding.py"
"""By which Qwen3-VL-Embedding is known where it has no files of sentence-transformers."""

_SCRIPT_CLASS = "Qwen3VLForEmbedding"
"""Its class: Qwen3-VL without a head."""

_SCRIPT_INSTRUCTION = "Represent the user's input."
_SCRIPT_PIXELS = (4 * 32 * 32, 1800 * 32 * 32)
"""What it says to an item without an instruction, and the bounds of its pictures."""

LONGEST = 8192
"""Ours: a prompt of more tokens is not expected. A retriever that cuts at so many is kept, and read
whole; one that cuts earlier would embed other tokens than are read here."""

_DOCUMENTS = ("document", "passage", "corpus")
"""Names of prompts of what is found, as sentence-transformers looks for them."""


@dataclass(frozen=True)
class Reading:
    """How a prompt is made of an item, and an embedding of its hidden states.

    Args:
        pooling: the state at [RET], which the model writes after its summary; or, of a retriever
            that knows no [RET], the last token's or the mean of all.
        normalize: whether an embedding has length 1.
        system: whether an instruction is the chat's system message; else it precedes the text.
        query_instruction, item_instruction: of a query that has none, and of what is found; ""
            leaves the message out. Of `system` alone.
        sentence: end an instruction with a full stop, where it ends in no punctuation.
        generation_prompt: whether the chat template opens an answer.
        ends_with: follows the prompt, and the summary; None: what the tokenizer adds itself.
        pixels: least and most of a picture; None: the image processor's own.
    """

    pooling: Literal["ret", "last", "mean"] = "ret"
    normalize: bool = False
    system: bool = False
    query_instruction: str = ""
    item_instruction: str = ""
    sentence: bool = False
    generation_prompt: bool = True
    ends_with: str | None = None
    pixels: tuple[int, int] | None = None

    @classmethod
    def read(cls, written: Mapping[str, Any]) -> Reading:
        """What `dataclasses.asdict` gave, from JSON.

        Raises:
            TypeError, ValueError, LookupError: it is something else.
        """
        pixels = written.get("pixels")
        found = cls(**{**written, "pixels": None if pixels is None else (pixels[0], pixels[1])})
        if found.pooling not in ("ret", "last", "mean"):
            raise ValueError(found.pooling)
        return found

    @property
    def at_ret(self) -> bool:
        """Whether it is ELVA's."""
        return self.pooling == "ret"

    def asked(self, item: Item) -> tuple[str, str | None]:
        """The system message and the text of an item's prompt; "" for none."""
        if not self.system:
            return "", item.prompted if isinstance(item, Query) else item.text
        if not isinstance(item, Query):
            return self.item_instruction, item.text
        said = item.instruction or self.query_instruction
        if self.sentence:
            said = said.strip()
            said += "." * bool(said and not unicodedata.category(said[-1]).startswith("P"))
        return said, item.text

    def pool(
        self,
        states: Tensor,
        mask: Tensor,
        before: Tensor | None = None,
        count: Tensor | None = None,
    ) -> Tensor:
        """Embeddings [R, D] in fp32, or fp64, of a prompt and what follows it; differentiable.

        Args:
            states: [R, 1 + T, D] at the prompt's end and at each of T tokens after it.
            mask: [R, T] bool, True where one is real.
            before: [R, D] the sum of the prompt's states, for the mean.
            count: [R] its tokens.
        """
        if self.pooling == "mean":
            assert before is not None and count is not None
            after = (wide(states[:, 1:]) * mask[..., None]).sum(1)
            pooled = (before + after) / (count + mask.sum(1))[:, None]
        else:
            rows = torch.arange(len(mask), device=states.device)
            pooled = wide(states[rows, mask.sum(1)])
        return self.scaled(pooled)

    def scaled(self, pooled: Tensor) -> Tensor:
        """Rows of length 1, where the retriever makes them so."""
        if not self.normalize:
            return pooled
        return pooled / pooled.norm(dim=-1, keepdim=True).clamp_min(1e-12)


AT_RET = Reading()


def wide(x: Tensor) -> Tensor:
    """In fp32, or in fp64 where it is that."""
    return x if x.dtype == torch.float64 else x.float()


def asked_for(model: ModelConfig) -> Reading | None:
    """The reading that a recipe asks for, where the checkpoint's files cannot say it."""
    if model.pooling is None:
        return None
    if model.pooling == "ret":
        return AT_RET
    said = model.instruction
    return Reading(
        model.pooling, normalize=True, system=True, query_instruction=said, item_instruction=said,
        ends_with=model.ends_with,
    )  # fmt: skip


WHOLE = ".gitattributes"


def find(path: str | Path, name: str, revision: str | None = None) -> Path | None:
    """A file of a checkpoint directory or a hub name; None where it has none.

    Raises:
        UserError: of a hub name, whether it has one cannot be known here.
        OSError: there is no such name or revision.
    """
    if Path(path).is_dir():
        file = Path(path) / name
        return file if file.is_file() else None
    try:
        return Path(hf_hub_download(str(path), name, revision=revision))
    except RemoteEntryNotFoundError:
        return None
    except OSError as error:  # offline, no connection, no permission
        gone = isinstance(error, RepositoryNotFoundError | RevisionNotFoundError)
        if gone and not isinstance(error, GatedRepoError):
            raise
    known = try_to_load_from_cache(str(path), name, revision=revision)
    if known is None:
        # What every repository has and nobody asks for by name: all of it was fetched.
        if isinstance(try_to_load_from_cache(str(path), WHOLE, revision=revision), str):
            return None
        raise UserError(
            f"train: {path} must be at hand to say whether it has {name}; fetch it whole first, "
            "and where no hub is reached pass the directory of its snapshot as the model"
        )
    return None if known is _CACHED_NO_EXIST else Path(str(known))


def detect(path: str | Path, revision: str | None = None) -> Reading:
    """The reading that a checkpoint's own files ask for; ELVA's where they ask for none.

    Raises:
        UserError: they ask for what cannot be kept: which, in one line.
    """
    script = _is_scripts(path, revision)
    if find(path, "modules.json", revision) is None:
        if not script:
            return AT_RET
        said = _SCRIPT_INSTRUCTION
        return Reading(
            "last", normalize=True, system=True, query_instruction=said, item_instruction=said,
            sentence=True, pixels=_SCRIPT_PIXELS,
        )  # fmt: skip
    if fault := next(_faults(path, revision), None):
        raise UserError(
            f"train: model.path must be a retriever whose embedding can be kept, got {path}: "
            f"{fault}; ELVA keeps the last token's state or the mean, normalised or not; where "
            "that is what it is, say so by model.pooling"
        )
    modules = modules_of(path, revision)
    about = read_json(path, ABOUT, revision)
    prompts: dict[str, str] = _part(path, ABOUT, about, "prompts")
    if not all(isinstance(said, str) for said in prompts.values()):
        raise _unruly(path, ABOUT, "hold strings as prompts")
    usual = prompts.get(str(about.get("default_prompt_name")), _SCRIPT_INSTRUCTION * script)
    shown = next((prompts[name] for name in _DOCUMENTS if name in prompts), usual)
    given = _part(path, READS, read_json(path, READS, revision), "processing_kwargs")
    chat = _part(path, READS, given, "chat_template")
    return Reading(
        "mean" if _poolings(path, modules["Pooling"], revision) == ["mean"] else "last",
        normalize="Normalize" in modules, system=True, sentence=script,
        query_instruction=prompts.get("query", usual), item_instruction=shown,
        generation_prompt=bool(chat.get("add_generation_prompt", False)),
    )  # fmt: skip


def layout(path: str | Path, revision: str | None = None) -> dict[str, bytes]:
    """{name: content} of the files that a retriever's own tools read beside its weights."""
    modules = [f"{place}/config.json" for place in modules_of(path, revision).values() if place]
    names = [*_LAYOUT, *modules, *[_SCRIPT] * _is_scripts(path, revision)]
    found = {name: find(path, name, revision) for name in names}
    return {name: file.read_bytes() for name, file in found.items() if file is not None}


def read_json(path: str | Path, name: str, revision: str | None = None, kind: type = dict) -> Any:
    """What a file holds, of a kind; an empty one where there is no file."""
    file = find(path, name, revision)
    if file is None:
        return kind()
    try:
        found = json.loads(file.read_text("utf-8"))
    except ValueError:
        raise _unruly(path, name, "be JSON") from None
    if not isinstance(found, kind):
        raise _unruly(path, name, f"hold {KINDS[kind]}")
    return found


def _part(path: str | Path, name: str, found: Mapping[str, Any], key: str) -> dict[str, Any]:
    """An object inside a file's, empty where it has none."""
    part = found.get(key)
    if not isinstance(part, dict | None):
        raise _unruly(path, name, f"hold an object as {key}")
    return part or {}


def _unruly(path: str | Path, name: str, rule: str) -> UserError:
    return UserError(f"train: {Path(path) / name} must {rule}; fetch {path} again")


def _is_scripts(path: str | Path, revision: str | None) -> bool:
    """Whether it is Qwen3-VL-Embedding as its makers published it."""
    classes = read_json(path, "config.json", revision).get("architectures")
    named = isinstance(classes, list) and _SCRIPT_CLASS in classes
    return named or find(path, _SCRIPT, revision) is not None


def modules_of(path: str | Path, revision: str | None = None) -> dict[str, str]:
    """{class: its folder} of sentence-transformers' modules, in their order."""
    found: dict[str, str] = {}
    for one in read_json(path, "modules.json", revision, list):
        kind, place = (one.get("type"), one.get("path")) if isinstance(one, dict) else (None, None)
        if not (isinstance(kind, str) and isinstance(place, str)):
            raise _unruly(path, "modules.json", "hold objects with a type and a path")
        if Path(place).is_absolute() or ".." in Path(place).parts:
            raise _unruly(path, "modules.json", "name folders inside the checkpoint")
        found[kind.rpartition(".")[2]] = place
    return found


def _poolings(path: str | Path, place: str, revision: str | None) -> list[str]:
    """Modes whose results are joined: of a config of either form."""
    name = f"{place}/config.json"
    config = read_json(path, name, revision)
    mode = config.get("pooling_mode")
    if mode is None:
        head, tail = "pooling_mode_", "_tokens"
        mode = [k.removeprefix(head).removesuffix(tail).removesuffix("_token")
                for k, used in config.items() if k.startswith(head) and used]  # fmt: skip
    modes = [mode] if isinstance(mode, str) else mode
    if not (isinstance(modes, list) and all(isinstance(one, str) for one in modes)):
        raise _unruly(path, name, "hold a name, or names, as pooling_mode")
    return modes


def _faults(path: str | Path, revision: str | None) -> Iterator[str]:
    """What of a layout of sentence-transformers cannot be kept. A max_seq_length of LONGEST or more
    is let pass: it cuts no prompt that is expected."""
    modules = modules_of(path, revision)
    if unknown := [name for name in modules if name not in ("Transformer", "Pooling", "Normalize")]:
        yield f"a module {unknown[0]} in modules.json"
    if list(modules)[:2] != ["Transformer", "Pooling"] or modules["Transformer"]:
        yield "modules.json does not begin with a Transformer at its top and a Pooling"
        return
    poolings = _poolings(path, modules["Pooling"], revision)
    if poolings == ["cls"]:
        yield "pooling mode cls, of a model whose first token sees no other"
    elif poolings not in (["lasttoken"], ["mean"]):
        yield f"pooling mode {' and '.join(poolings) or 'of none'}"
    if (
        read_json(path, f"{modules['Pooling']}/config.json", revision).get("include_prompt")
        is False
    ):
        yield "include_prompt false: a pooling that leaves the prompt out"
    about = read_json(path, ABOUT, revision)
    name = about.get("similarity_fn_name") or "cosine"
    if name != "cosine" and (name != "dot" or "Normalize" not in modules):
        yield f"similarity {name} where ELVA ranks by the cosine"
    if about.get("truncate_dim"):
        yield "truncate_dim, a part of the embedding"
    reads = read_json(path, READS, revision)
    longest = reads.get("max_seq_length")
    if longest is not None and not (isinstance(longest, int) and longest >= LONGEST):
        yield f"max_seq_length {longest}, which cuts what is longer"
    way = _part(path, READS, _part(path, READS, reads, "modality_config"), "message")
    if not way:
        yield "no message among modality_config: it reads no chat"
    elif (way.get("method"), way.get("method_output_name")) != ("forward", "last_hidden_state"):
        yield f"its modality_config reads {way.get('method')} and {way.get('method_output_name')}"
    given = _part(path, READS, reads, "processing_kwargs")
    chat = {*_part(path, READS, given, "chat_template")} - {*CHAT}
    if further := sorted({*given} - {"chat_template"} | chat):
        yield f"processing_kwargs of {further[0]}"
    if any(reads.get(name) for name in ("query_expansion", "do_lower_case")):
        yield "query_expansion or do_lower_case"
