"""Models of sentence-transformers as encoders: of texts, of pictures, of both.

What such a model does is its own library's affair: `encode_query` for what asks, `encode_document`
for what is asked for, with the prompts, modules, lengths and normalisation that its files say.
Nothing of it runs code of its own, and no pickle is opened.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download
from packaging.version import Version
from PIL import Image
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES as TWO_TOWERS,
)

from elva.data import Item, Query
from elva.errors import UserError
from elva.model.adapters import folder_of
from elva.model.family import DAMAGED, KNOWN
from elva.model.identity import Identity
from elva.model.modalities import Instructions, must_read
from elva.model.note import read_note, stands_on
from elva.model.reading import ABOUT, find, modules_of, read_json
from elva.model.rollout import Encoded
from elva.model.weights import hash_of_files

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_EXTRA = "pip install 'elva[sentence-transformers]'"

_NEEDED = "6"
"""The first version that imports no class of a model's own choice from a local directory."""

_OWN_CODE = "sentence_transformers."
"""Where the classes of a model's modules must come from."""

_FETCHED = [f"*.{kind}" for kind in ("json", "safetensors", "txt", "model", "jinja", "tiktoken")]
OTHERS = ["onnx/*", "openvino/*"]
"""Of a hub name: what is fetched, and the same weights in other forms, which are not."""

_PICKLE = "pytorch_model.bin"
_SAFE = ("model.safetensors", "model.safetensors.index.json")

_SETTINGS_VERSION = 1
"""Raise it when the same model and item would give another embedding than before."""

_BATCHES_AT_ONCE = 32
"""Ours: of texts, which are sorted by length among so many batches."""

_INSTRUCTION = re.compile(r"(.*Instruct: ?)(.*?)(\nQuery: ?)", re.DOTALL)
"""A query's prompt that leaves a place for an instruction, as E5's, GTE's and Qwen3-Embedding's."""

_VOLATILE = ("_name_or_path", "_commit_hash", "transformers_version", "dtype", "torch_dtype")
"""What of a config changes no embedding."""


def owns(model: str | Path) -> bool:
    """Whether sentence-transformers is to read a checkpoint directory or a hub name: one in its
    layout, or of two towers as CLIP and SigLIP are published. What ELVA wrote, and Qwen's families,
    are read by ELVA."""
    path = Path(model)
    if not path.is_dir() and (path.exists() or str(model).count("/") != 1):
        return False
    if (path / "recipe.yaml").is_file() or read_note(path):
        return False
    try:
        base = stands_on(model, None)[1]
        if base is not None and not Path(base.path).is_dir():
            return False
        config = read_json(model if base is None else base.path, "config.json")
        laid_out = any(find(model, name) is not None for name in ("modules.json", ABOUT))
    except UserError:
        raise
    except DAMAGED:
        return False  # no such hub name, or a damaged adapter: ELVA's way in says so
    kind = config.get("model_type")
    return kind not in KNOWN and (laid_out or kind in TWO_TOWERS)


@dataclass(frozen=True)
class SentenceTransformerEncoder:
    """A model of sentence-transformers.

    Args:
        identity: what embeddings may be compared with this encoder's; `name` is the directory or
            hub name that it was read from.
        batch_size: items at once; it changes an embedding by rounding only.
    """

    identity: Identity
    model: SentenceTransformer
    batch_size: int = 32

    @classmethod
    def open(
        cls, model: str | Path, *, batch_size: int | None = None
    ) -> SentenceTransformerEncoder:
        """A checkpoint directory or a hub name, in fp32, on the GPU where there is one.

        Args:
            batch_size: sentence-transformers' own, 32, for None.

        Raises:
            UserError: sentence-transformers is absent or too old, or the model cannot be used: it
                is damaged, has code or pickles for weights, or is not ranked by the cosine.
        """
        directory = _fetched(model)
        if reason := next(_faults(directory), None):
            raise UserError(
                f"embed: the model must give one embedding an item, to be ranked by the cosine, "
                f"from safetensors and sentence-transformers' own classes, got {model}: {reason}; "
                "choose another"
            )
        gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # torchrun's, one process a GPU
        load = partial(
            _library(model).SentenceTransformer,
            str(directory),
            device=gpu if torch.cuda.is_available() else "cpu",
            trust_remote_code=False,
            model_kwargs={"dtype": torch.float32, "use_safetensors": True},
        )
        try:
            weights = str(hash_of_files(directory, sorted(directory.rglob("*.safetensors"))))
            opened = _whole(load)
        except UserError:
            raise
        except (ImportError, *DAMAGED) as error:
            said = " ".join(str(error).split())[:300]
            raise UserError(
                f"embed: {model} must be a model that sentence-transformers can read; {said}"
            ) from None
        if opened is None:
            raise UserError(
                f"embed: {model} must have all of its weights, got some that are missing; fetch it "
                "again"
            )
        settings = [_SETTINGS_VERSION, *_settings(opened)]
        text = json.dumps(settings, sort_keys=True, default=str)
        preprocessing = hashlib.sha256(text.encode()).hexdigest()
        return cls(Identity(str(model), weights, preprocessing), opened, batch_size or 32)

    @property
    def about(self) -> dict[str, Any]:
        """How to open it again."""
        name = self.identity.name
        return {"model": str(Path(name).absolute()) if Path(name).exists() else name}

    @cached_property
    def embedding_size(self) -> int:
        """D of the embeddings."""
        size = self.model.get_embedding_dimension()
        return size or self.model.encode(["a"], convert_to_tensor=True).shape[-1]

    @property
    def modalities(self) -> frozenset[str]:
        """Keys of `elva.model.modalities.MODALITIES`: what it reads."""
        both = ("image", "text")
        kinds: dict[str, Any] = {"text": "text", "image": "image", "image,text": both}
        return frozenset(name for name, kind in kinds.items() if self.model.supports(kind))

    @property
    def instructions(self) -> Instructions:
        """Read as the system message of a chat, or in the place that the model's own prompt for
        queries has for one."""
        return "optional" if self._chats or self._template is not None else "unread"

    @property
    def _chats(self) -> bool:
        return "message" in self.model.modalities

    @property
    def _template(self) -> re.Match[str] | None:
        return _INSTRUCTION.fullmatch(self.model.prompts.get("query") or "")

    def check(self, item: Item) -> None:
        """Try whether an item can be read; DataError where it cannot."""
        if item.image is not None:
            item.load_image()

    def __call__(
        self, items: Sequence[Item], progress: Callable[[int], None] | None = None
    ) -> Encoded:
        """Embeddings [n, D] fp32 of items, in their order, and no summaries.

        Raises:
            UserError: an item of a kind that the model does not read.
            DataError: an item that cannot be read.
        """
        kinds = Counter(item.modality for item in items)
        must_read(self.identity.name, self.modalities, kinds, "those given")
        rows = torch.zeros(len(items), self.embedding_size)
        done = 0
        with ThreadPoolExecutor(1) as ahead:  # decodes the next pictures meanwhile
            steps = [*self._steps(items)]
            read = [ahead.submit(self._inputs, [items[i] for i in at]) for at, *_ in steps[:1]]
            for number, (at, asks, prompt) in enumerate(steps):
                inputs = read.pop().result()
                if number + 1 < len(steps):
                    later = [items[i] for i in steps[number + 1][0]]
                    read.append(ahead.submit(self._inputs, later))
                encode = self.model.encode_query if asks else self.model.encode_document
                rows[at] = encode(
                    inputs, prompt=prompt, batch_size=self.batch_size, show_progress_bar=False,
                    convert_to_tensor=True,
                ).float().cpu()  # fmt: skip
                done += len(at)
                if progress is not None:
                    progress(done)
        return Encoded(rows, [""] * len(items))

    def _steps(self, items: Sequence[Item]) -> Iterator[tuple[list[int], bool, str | None]]:
        """(places of items, whether they ask, their prompt), of one modality each."""
        alike: dict[tuple[bool, str, str | None], list[int]] = {}
        for place, item in enumerate(items):
            key = isinstance(item, Query), item.modality, self._prompt(item)
            alike.setdefault(key, []).append(place)
        for (asks, modality, prompt), at in alike.items():
            step = self.batch_size * (_BATCHES_AT_ONCE if modality == "text" else 1)
            for start in range(0, len(at), step):
                yield at[start : start + step], asks, prompt

    def _prompt(self, item: Item) -> str | None:
        """The prompt of a query with an instruction; None for the model's own."""
        if not isinstance(item, Query) or not item.instruction:
            return None
        if self._chats:
            return item.instruction
        template = self._template
        return None if template is None else template[1] + item.instruction + template[3]

    def _inputs(self, items: Sequence[Item]) -> list[Any]:
        """What sentence-transformers takes. A text is named as one to a model that reads pictures:
        it would take an address or a path in a text for a picture, and fetch it."""
        if not self.model.supports("image"):
            return [item.text or "" for item in items]
        found: list[Any] = []
        for item in items:
            parts: dict[str, Any] = {}
            if item.image is not None:
                parts["image"] = item.load_image()
            if item.text is not None:
                parts["text"] = item.text
            found.append(parts)
        return found


def _library(model: str | Path) -> Any:
    """sentence-transformers; UserError where it is absent or too old."""
    if find_spec("sentence_transformers") is None:
        raise UserError(
            f"embed: {model} must be read by sentence-transformers, which is not installed; "
            f"{_EXTRA}"
        )
    if Version(found := version("sentence-transformers")) < Version(_NEEDED):
        raise UserError(
            f"embed: sentence-transformers must be {_NEEDED} or later, got {found}; {_EXTRA}"
        )
    return import_module("sentence_transformers")


def _fetched(model: str | Path) -> Path:
    """A model's directory, of a hub name its snapshot: sentence-transformers, given a name whose
    files it cannot see, makes a model of its own devising instead."""
    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(snapshot_download(str(model), allow_patterns=_FETCHED, ignore_patterns=OTHERS))
    except OSError as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(f"embed: {model} must be a hub name that can be fetched; {said}") from None


def _whole(load: Callable[[], SentenceTransformer]) -> SentenceTransformer | None:
    """A model; None where weights are missing that an embedding depends on. What is missing is
    drawn at random, so that the same model, drawn otherwise, embeds otherwise."""
    with torch.random.fork_rng(devices=[]):
        before = torch.get_rng_state()
        model = load().eval()
        if torch.equal(torch.get_rng_state(), before):
            return model  # nothing was drawn
        torch.manual_seed(torch.initial_seed() + 1)
        other = load().eval()
    tried: dict[Any, Any] = {
        "text": "A text.",
        "image": Image.effect_noise((64, 64), 60).convert("RGB"),
    }
    for kind, one in tried.items():
        if model.supports(kind):
            rows = [m.encode([one], convert_to_tensor=True) for m in (model, other)]
            if not torch.equal(*rows):
                return None
    return model


def _faults(model: str | Path) -> Iterator[str]:
    """Why a model cannot be used, by its files."""
    modules_of(model)  # of the form that it must have
    listed = read_json(model, "modules.json", kind=list)
    for one in listed:
        if not one["type"].startswith(_OWN_CODE):
            yield f"modules.json names a class of its own code, {one['type']}"
    about = read_json(model, ABOUT)
    kind = about.get("model_type") or "SentenceTransformer"
    if kind != "SentenceTransformer":
        yield f"it is a {kind}"
    similarity = about.get("similarity_fn_name") or "cosine"
    unit = any(one["type"].endswith(".Normalize") for one in listed)
    if similarity != "cosine" and not (similarity == "dot" and unit):
        yield f"its similarity is {similarity}"
    if folder_of(model) is not None:
        yield "it is an adapter; merge it into its base"
    for place in {one["path"] for one in listed} or {""}:
        lies = f"{place}/" if place else ""
        pickled = find(model, lies + _PICKLE) is not None
        if pickled and not any(find(model, lies + name) is not None for name in _SAFE):
            yield f"{lies}{_PICKLE} is a pickle, and no safetensors lie beside it"


def _settings(model: SentenceTransformer) -> Iterator[Any]:
    """Everything beside the weights on which an embedding depends."""
    yield [model.prompts, model.default_prompt_name, model.truncate_dim]
    for name, module in model.named_modules():
        if not type(module).__module__.startswith(_OWN_CODE) or module is model:
            continue
        kept: dict[str, Any] = getattr(module, "get_config_dict", dict)()
        yield [name, type(module).__name__, {str(k): str(v) for k, v in kept.items()}]
        inner = getattr(getattr(module, "model", None), "config", None)
        if inner is not None:
            config = json.loads(inner.to_json_string())
            yield {k: v for k, v in config.items() if k not in _VOLATILE}
        processor = getattr(module, "processor", None)
        pictures = getattr(processor, "image_processor", None)
        if pictures is not None:
            yield [type(pictures).__name__, json.loads(pictures.to_json_string())]
        if (words := getattr(module, "tokenizer", None)) is not None:
            yield from _tokenizer(words)


def _tokenizer(words: Any) -> Iterator[Any]:
    """What a tokenizer does, without what the last call has set."""
    backend = getattr(words, "backend_tokenizer", words)
    if hasattr(backend, "to_str"):
        made = json.loads(backend.to_str())
        yield {k: v for k, v in made.items() if k not in ("padding", "truncation")}
    elif hasattr(words, "get_vocab"):
        yield words.get_vocab()
    for name in ("model_max_length", "chat_template", "padding_side", "truncation_side"):
        yield getattr(words, name, None)
