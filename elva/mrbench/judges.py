"""Judges of grains: what a query asks for, part by part.

A grain is the smallest semantic unit of a query: an entity, an attribute, an action, a relation
(paper, sec. 1). `rules` works offline by word lists and word endings; `local` asks any chat model
with eyes that transformers can load; `openai` asks any server that speaks that protocol.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

from elva.data import Grain, Item
from elva.errors import UserError
from elva.mrbench.server import check_url, post

if TYPE_CHECKING:
    from elva.model.inputs import Inputs

TYPES = ("entity", "attribute", "action", "relation")

PROMPT = (
    "List the grains of this query: its smallest semantic units. Each is an entity, an attribute, "
    "an action or a relation, and is copied from the query word by word. Answer with JSON alone: "
    '[{"grain": "...", "type": "entity|attribute|action|relation"}]. Query: '
)
DESCRIBE = "Describe what this picture shows in one sentence: things, their attributes, actions."


class Judge(Protocol):
    """Names the grains of a text, and puts a picture into words."""

    @property
    def name(self) -> str: ...
    @property
    def at_once(self) -> int: ...
    def grains(self, text: str) -> list[Grain]: ...
    def describe(self, item: Item) -> str | None: ...


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# -- rules -----------------------------------------------------------------------------------------

_RELATIONS = (
    "on top of", "in front of", "next to", "instead of", "rather than", "more than", "less than",
    "with", "without", "in", "on", "under", "over", "behind", "beside", "near", "between", "above",
    "below", "inside", "around", "through", "across", "against", "along", "toward", "towards",
    "into", "onto", "from", "at", "by", "of", "for",
)  # fmt: skip
_ATTRIBUTES = _words(
    "red orange yellow green blue purple violet pink brown black white grey gray gold golden "
    "silver beige dark light medium bright pale colorful big small large little tiny huge tall "
    "short long wide narrow young old new male female happy sad wooden metal plastic glass "
    "leather striped floral plain round square open closed empty full wet dry hot cold curly "
    "bald blond blonde two three four five six seven eight nine ten many several single same "
    "different other front left right upward downward clockwise smiling"
)
_EMPTY = _words(
    "a an the this that these those is are was were be been being and or but not no it its his "
    "her their there some any all as to has have show shows find picture image photo find which "
    "who while he she they you i me my your more less very than so such only just"
)
_NO_ACTION = _words(
    "ring king wing thing string spring ceiling building clothing evening morning wedding "
    "nothing something anything everything during painting earring sibling sting swing being"
)
_PIECE = re.compile(r"[\w'\u2019-]+|[^\w\s]")


class RuleJudge:
    """Noun phrases, verbs in -ing, listed adjectives and prepositions of English.

    Coarse by intent: it needs no model and gives the same answer everywhere. What it misses is
    what the review is for.
    """

    name = "rules"
    at_once = 1

    def grains(self, text: str) -> list[Grain]:
        found: list[Grain] = []
        for kind, start, end in _phrases(text):
            found.append(Grain(text[start:end], kind, (start, end)))
        return found

    def describe(self, item: Item) -> str | None:
        return None


def _phrases(text: str) -> list[tuple[str, int, int]]:
    """(type, start, end) in order."""
    lower = text.casefold()
    taken = [
        ("relation", m.start(), m.end())
        for m in re.finditer(rf"\b(?:{'|'.join(_RELATIONS)})\b", lower)
    ]
    inside = {i for _, start, end in taken for i in range(start, end)}
    noun: tuple[int, int] | None = None
    for match in [*_PIECE.finditer(lower), None]:
        word = "" if match is None else match[0]
        at = -1 if match is None else match.start()
        kind = "break" if match is None or at in inside else _kind(word)
        if kind == "noun":
            assert match is not None
            noun = (match.start() if noun is None else noun[0], match.end())
            continue
        if noun is not None:
            taken.append(("entity", *noun))
            noun = None
        if kind in TYPES:
            assert match is not None
            taken.append((kind, match.start(), match.end()))
    return sorted(taken, key=lambda p: p[1])


def _kind(word: str) -> str:
    if word in _EMPTY or not word[:1].isalnum():
        return "break"
    if word in _ATTRIBUTES or (
        "-" in word and any(part in _ATTRIBUTES for part in word.split("-"))
    ):
        return "attribute"
    if word.endswith("ing") and len(word) > 4 and word not in _NO_ACTION:
        return "action"
    return "noun"


# -- models ----------------------------------------------------------------------------------------


OWN_INPUTS = ("qwen2_vl", "qwen2_5_vl")
"""Families asked through `elva.model.inputs`: transformers' own processor of theirs wants
torchvision for films, and a picture should not look different because that is installed."""


@dataclass(frozen=True)
class LocalJudge:
    """A chat model with eyes, by transformers.

    Args:
        path: a checkpoint directory or a hub name. Families other than Qwen2-VL's need whatever
            their processor needs, often torchvision.
    """

    path: str
    max_new_tokens: int = 256
    at_once: ClassVar[int] = 1

    @property
    def name(self) -> str:
        return f"local:{self.path}"

    def grains(self, text: str) -> list[Grain]:
        return parse(self._ask(PROMPT + text, None), text)

    def describe(self, item: Item) -> str | None:
        return _one_line(self._ask(DESCRIBE, item))

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        """(model, what turns words and a picture into its arguments and its answer into words)."""
        from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

        from elva.model.inputs import Inputs

        try:
            family = AutoConfig.from_pretrained(self.path).model_type
            reader: Any = Inputs.load(self.path, "") if family in OWN_INPUTS else None
            model = AutoModelForImageTextToText.from_pretrained(self.path, dtype="auto")
            device = "cuda" if torch.cuda.is_available() else "cpu"
            return model.eval().to(device), reader or AutoProcessor.from_pretrained(self.path)
        except (ImportError, OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"mrbench: --judge-model must be a chat model with eyes, got {self.path}: {reason}"
            ) from None

    def _ask(self, words: str, item: Item | None) -> str:
        from elva.model.inputs import Inputs

        model, reader = self._loaded
        own = isinstance(reader, Inputs)
        asked = (_own_inputs if own else _chat_inputs)(reader, words, item)
        asked = {name: value.to(model.device) for name, value in asked.items()}
        out = model.generate(**asked, max_new_tokens=self.max_new_tokens, do_sample=False)
        answer = out[0, asked["input_ids"].shape[1] :]
        decoder = reader.tokenizer if own else reader
        return str(decoder.decode(answer, skip_special_tokens=True))


def _own_inputs(inputs: Inputs, words: str, item: Item | None) -> dict[str, Tensor]:
    """A question as Qwen2-VL's `generate` takes it."""
    image = None if item is None else item.image
    prompt = inputs.prompt(Item("judged", words, image, "text" if image is None else "image,text"))
    ids = prompt.input_ids[None]
    asked = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if prompt.image is not None:
        pixels, grid = inputs.patches(prompt.image)
        asked |= {
            "pixel_values": pixels,
            "image_grid_thw": grid[None],
            "mm_token_type_ids": (ids == inputs.image_id).int(),
        }
    return asked


def _chat_inputs(processor: Any, words: str, item: Item | None) -> Mapping[str, Tensor]:
    """A question as any other chat model's processor puts it."""
    content: list[dict[str, Any]] = [{"type": "text", "text": words}]
    if item is not None:
        content.insert(0, {"type": "image", "image": item.load_image()})
    asked: Mapping[str, Tensor] = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True,
        return_dict=True, return_tensors="pt",
    )  # fmt: skip
    return asked


@dataclass(frozen=True)
class OpenAIJudge:
    """A server that speaks OpenAI's chat protocol.

    Args:
        url: its base, such as `http://localhost:8000/v1`; the key is OPENAI_API_KEY.
        model: which of its models.
        timeout_seconds: of a try, whole; a question has so many `tries`.
        at_once: questions under way at a time.
    """

    url: str
    model: str
    timeout_seconds: float = 60.0
    tries: int = 4
    at_once: int = 4

    @property
    def name(self) -> str:
        return f"openai:{self.model}"

    def grains(self, text: str) -> list[Grain]:
        return parse(self._ask(PROMPT + text, None), text)

    def describe(self, item: Item) -> str | None:
        return _one_line(self._ask(DESCRIBE, item))

    def _ask(self, words: str, item: Item | None) -> str:
        content: list[dict[str, Any]] = [{"type": "text", "text": words}]
        if item is not None:
            content.append({"type": "image_url", "image_url": {"url": _data_url(item)}})
        body = {
            "model": self.model,
            "temperature": 0,
            "messages": [{"role": "user", "content": content}],
        }
        url = f"{self.url.rstrip('/')}/chat/completions"
        answer = post(url, body, seconds=self.timeout_seconds, tries=self.tries)
        with suppress(KeyError, IndexError, TypeError):
            said = answer["choices"][0]["message"]["content"]
            if isinstance(said, str | None):
                return said or ""  # null where it would not say
        raise UserError(
            f"{self.url}: must answer as OpenAI's chat completions do, got "
            f"{json.dumps(answer)[:200]}"
        )


def _data_url(item: Item) -> str:
    buffer = io.BytesIO()
    item.load_image().save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def parse(answer: str, text: str) -> list[Grain]:
    """The grains of a model's answer that are copied from the text; none where it is no JSON."""
    listed = answer[max(0, answer.find("[")) : answer.rfind("]") + 1]
    try:
        rows = json.loads(listed or "[]")
    except (ValueError, RecursionError):
        return []
    found, used = [], 0
    lower = text.casefold()
    for row in rows if isinstance(rows, list) else []:
        words, kind = (row.get("grain"), row.get("type")) if isinstance(row, dict) else (None, None)
        if not isinstance(words, str) or not words.strip() or kind not in TYPES:
            continue
        start = lower.find(words.casefold(), used)
        start = lower.find(words.casefold()) if start < 0 else start
        if start >= 0 and len(lower) == len(text):
            end = start + len(words)
            used = end
            found.append(Grain(text[start:end], str(kind), (start, end)))
    return found


def _one_line(text: str) -> str | None:
    return " ".join(text.split()) or None


def judge_of(spec: str, model: str | None) -> Judge:
    """`rules`, `local` with a model, or an `openai` URL with one.

    Raises:
        UserError: anything else.
    """
    if spec == "rules":
        return RuleJudge()
    if model is None:
        raise UserError(f"mrbench: --judge {spec} must come with --judge-model, got none")
    if spec.startswith(("http://", "https://")):
        check_url(spec)
        return OpenAIJudge(spec, model)
    if spec == "local":
        return LocalJudge(model)
    raise UserError(
        f"mrbench: --judge must be rules, local, or the URL of an OpenAI server, got {spec!r}"
    )
