"""A model of ELVA's as a module of sentence-transformers, which writes its summary and is read at
[RET]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import InputModule
from torch import Tensor

from elva.data import Item, Query
from elva.data.schema import normalise
from elva.errors import UserError
from elva.model.encoder import RetrieverEncoder
from elva.model.rollout import Encoded


class RetModule(InputModule):
    """An ELVA model as the one module of a SentenceTransformer, for inference.

    Its inputs are texts, pictures (`PIL.Image`), or ``{"text": str, "image": picture or path}``
    with either or both. A prompt is a query's instruction, as `elva embed` gives it.

    Args:
        encoder: the model, the length of its summaries, and where it is read.

    Example::

        model = elva.integrations.sentence_transformers.load("models/one")
        query = model.encode_query(["a woman firefighter"], prompt="Find the picture.")
        print(model.similarity(query, model.encode_document([picture])))
    """

    def __init__(self, encoder: RetrieverEncoder) -> None:
        super().__init__()
        self.encoder, self.retriever = encoder, encoder.retriever
        self.tokenizer = encoder.retriever.inputs.tokenizer

    @property
    def modalities(self) -> list[Any]:
        return ["text", "image", ("image", "text")]

    def get_embedding_dimension(self) -> int:
        """D of the embeddings."""
        return self.encoder.embedding_size

    def preprocess(
        self, inputs: Sequence[Any], prompt: str | None = None, task: str | None = None
    ) -> dict[str, Any]:
        """{"items": what the model reads}.

        Args:
            prompt: what to look for; with one, inputs are queries.
            task: "query" or "document", as `encode_query` and `encode_document` say.
        """
        asks = task == "query" or (task is None and bool(prompt))
        if prompt and not asks:
            raise UserError(
                "RetModule: prompt must be a query's alone, got one of documents; leave it out"
            )
        return {"items": [_item(one, prompt or "" if asks else None) for one in inputs]}

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        """The features with `sentence_embedding` [n, D] fp32."""
        if torch.is_grad_enabled():
            raise UserError(
                "RetModule: a forward must be without gradients, got one with them; train by elva "
                "train"
            )
        embeddings: Tensor = self.encoder(features["items"]).embeddings
        return {**features, "sentence_embedding": embeddings.to(self.retriever.device)}

    def encoded(
        self, inputs: Sequence[Any], prompt: str | None = None, task: str | None = None
    ) -> Encoded:
        """Embeddings [n, D] and the summaries that they were read from."""
        with torch.inference_mode():
            return self.encoder(self.preprocess(inputs, prompt, task)["items"])

    def save(
        self, output_path: str, *args: Any, safe_serialization: bool = True, **how: Any
    ) -> None:
        """Write an ordinary checkpoint, its adapter merged, and how it is read; no pickles."""
        if not safe_serialization:
            raise UserError(
                "RetModule: safe_serialization must be True, got False; ELVA writes no pickles"
            )
        self.encoder.save(Path(output_path))

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        **how: Any,
    ) -> RetModule:
        """What `save`, or `elva export`, wrote, in a directory or under a hub name.

        Raises:
            UserError: it is no such model, or arguments for transformers are given, of which it
                takes none.
        """
        given = [name for name in ("model_kwargs", "config_kwargs", "processor_kwargs")
                 if how.get(name)]  # fmt: skip
        if given:
            raise UserError(
                f"RetModule: {given[0]} must be left out of an ELVA model, got {how[given[0]]}; "
                "elva export writes it as it is read"
            )
        found = cls.load_dir_path(
            model_name_or_path, subfolder, token=token, cache_folder=cache_folder,
            revision=revision, local_files_only=local_files_only,
        )  # fmt: skip
        return cls(RetrieverEncoder.open(found or model_name_or_path))


def load(model: str | Path, **how: Any) -> SentenceTransformer:
    """A SentenceTransformer of a run, a checkpoint or what `elva export` wrote.

    `SentenceTransformer(path, trust_remote_code=True)` is the same of an export: the library asks
    for that before it imports a class of another package, which ELVA's, installed, is.

    Args:
        how: of SentenceTransformer: `device`, `prompts`, `truncate_dim`, ...

    Raises:
        UserError: there is no such model.
    """
    return SentenceTransformer(modules=[RetModule(RetrieverEncoder.open(model))], **how)


def _item(given: Any, instruction: str | None) -> Item:
    """What the data's own reader would have made of an input; a query with an instruction."""
    parts: Mapping[str, Any] = {"text": given} if isinstance(given, str) else {"image": given}
    if isinstance(given, Mapping):
        parts = given
    words, image = parts.get("text"), parts.get("image")
    if isinstance(image, str):
        image = Path(image)
    kinds = (("image", image, Path | bytes | Image.Image), ("text", words, str))
    wrong = [name for name in parts if name not in ("text", "image")]
    wrong += [name for name, part, kind in kinds if not isinstance(part, kind | None)]
    if wrong or (words is None and image is None):
        raise UserError(
            "RetModule: an input must be a text, a picture, or {'text': ..., 'image': ...}, got "
            f"{type(given).__name__}{f' with {wrong[0]!r}' if wrong else ''}; pass one of these"
        )
    text = None if words is None else normalise(words) or None
    modality = ",".join(name for name, part, _ in kinds if part is not None)
    if instruction is None:
        return Item("", text, image, modality, where="RetModule")
    return Query(
        "", text, image, modality, instruction=instruction.strip(), task="t2i", positives=(),
        raw_text=words, where="RetModule",
    )  # fmt: skip
