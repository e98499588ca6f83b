"""A model as it embeds: what every encoder is asked for, and which one a model's files ask for."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from elva.data import Item
from elva.data.emoji.prompts import EMOJI_DATASET
from elva.errors import UserError
from elva.files import write_text
from elva.model import sentence_transformer
from elva.model.adapters import weight_files
from elva.model.family import DAMAGED
from elva.model.identity import Identity
from elva.model.modalities import MODALITIES, Instructions
from elva.model.note import LENGTH, NOTE, kept_length, read_note
from elva.model.reading import ABOUT
from elva.model.retriever import Retriever
from elva.model.rollout import Encoded, ReadAt, encode
from elva.model.sentence_transformer import SentenceTransformerEncoder
from elva.model.weights import hash_of_files
from elva.run import Run

VERSION = 2
"""Raise it when the same model and item would give another embedding than before."""

_STORED = ("transformers_version", "dtype", "torch_dtype")
"""Of a configuration: how a checkpoint was stored, and not what it computes."""

_MAX_COMPLETION_LENGTH = 128
"""Of a checkpoint that no run of ours says more about: the recipes of the paper's models. A
retriever of somebody else is read after its prompt."""


MODULE = {
    "idx": 0, "name": "0", "path": "", "type": "elva.integrations.sentence_transformers.RetModule",
}  # fmt: skip
_LAID_OUT = {
    "model_type": "SentenceTransformer",
    "prompts": {"query": "", "document": ""},
    "default_prompt_name": None,
    "similarity_fn_name": "cosine",
}
"""What sentence-transformers reads of a model of ours."""


class Encoder(Protocol):
    """What makes embeddings of items. `elva.search.Searcher` and `elva.commands.embed.embed` take
    any object that has these; it need not inherit, nor be a model.

    Example::

        class MeanColour:
            identity = Identity("mean colour", revision="1", preprocessing="RGB over white")
            about: dict[str, str] = {}
            embedding_size = 3
            modalities = frozenset({"image"})
            instructions = "unread"

            def check(self, item):
                item.load_image()

            def __call__(self, items, progress=None):
                pictures = [np.asarray(item.load_image()) for item in items]
                rows = [torch.tensor(p.mean((0, 1)), dtype=torch.float32) for p in pictures]
                return Encoded(torch.stack(rows), [""] * len(items))

        searcher = Searcher(MeanColour())
    """

    @property
    def identity(self) -> Identity:
        """What embeddings may be compared with this encoder's: where weights or preprocessing
        change, so must it."""

    @property
    def about(self) -> Mapping[str, Any]:
        """Kept with the embeddings, as JSON; `model`, where there is one, is what `open_encoder`
        opens it again by."""

    @property
    def embedding_size(self) -> int:
        """D of the embeddings."""

    @property
    def modalities(self) -> frozenset[str]:
        """Keys of `elva.model.modalities.MODALITIES`: of which items it makes embeddings."""

    @property
    def instructions(self) -> Instructions:
        """Whether a query's instruction must be there, may be, or changes nothing."""

    def check(self, item: Item) -> None:
        """Try whether an item can be read.

        Raises:
            DataError: it cannot: why, in one line.
        """

    def __call__(
        self, items: Sequence[Item], progress: Callable[[int], None] | None = None
    ) -> Encoded:
        """Embeddings [n, D] fp32 and summaries of items, in their order.

        Args:
            items: what is asked for is an `Item`, what asks a `Query`.
            progress: called with the number of items done so far.

        Raises:
            DataError: an item that cannot be read.
        """


def open_encoder(
    model: str | Path,
    *,
    stage: str | None = None,
    max_completion_length: int | None = None,
    read: ReadAt = "at_ret",
    batch_size: int | None = None,
) -> Encoder:
    """The encoder of a run, a checkpoint directory or a hub name: a retriever of ours or of the
    families that ELVA reads, or any other model of sentence-transformers.

    Args:
        stage, max_completion_length, read, batch_size: as of `RetrieverEncoder.open`; the first
            three are of a retriever alone.

    Raises:
        UserError: there is no such model, or an option does nothing with it.
    """
    if not sentence_transformer.owns(model):
        return RetrieverEncoder.open(
            model, stage=stage, max_completion_length=max_completion_length, read=read,
            batch_size=batch_size,
        )  # fmt: skip
    for option, given in (
        ("--stage", stage is not None),
        ("--max-completion-length", bool(max_completion_length)),
        ("--read", read != "at_ret"),
    ):
        if given:
            raise UserError(
                f"embed: {option} must be left out of {model}, a model of sentence-transformers, "
                "which it would not change"
            )
    return SentenceTransformerEncoder.open(model, batch_size=batch_size)


def unfamiliar(encoder: Encoder, datasets: Iterable[int]) -> str | None:
    """One line of a model that knows emoji alone, where other data are embedded or searched.

    Args:
        datasets: the numbers before the colon of the data's ids.
    """
    if encoder.about.get("trained_on") != ["emoji"] or {*datasets} <= {EMOJI_DATASET}:
        return None
    return (
        f"note: {encoder.identity.name} was trained on emoji pictures alone; photographs mean "
        "little to it; for them name a pretrained model"
    )


@dataclass(frozen=True)
class RetrieverEncoder:
    """A retriever and how it is read.

    Args:
        max_completion_length: tokens of a summary (paper, sec. 3.4); 0 reads a fixed prompt.
        read: at [RET], or at the token before it (LamRA).
        batch_size: rows at once; it changes an embedding by rounding only.
    """

    retriever: Retriever
    max_completion_length: int
    read: ReadAt = "at_ret"
    batch_size: int = 512

    @classmethod
    def open(
        cls,
        model: str | Path,
        *,
        stage: str | None = None,
        max_completion_length: int | None = None,
        read: ReadAt = "at_ret",
        batch_size: int | None = None,
    ) -> RetrieverEncoder:
        """A run's model, a checkpoint directory, or a hub name.

        Args:
            stage: of a run, a stage or control; the last trained stage for None.
            max_completion_length, batch_size: the run's own for None.

        Raises:
            UserError: there is no such model.
        """
        unfit = f"{model}: must be a run, a checkpoint or a hub name"
        path, length, size = Path(model), None, 512
        home = home_of(path)
        if home is not None:  # a run, or the model of one of its stages
            run = Run.open(home)
            if home == path:
                path = run.model(run.answering(stage))
            length = list(run.recipe.stages.values())[-1].max_completion_length
            size = run.recipe.evaluate_batch_size
        elif stage is not None:
            raise UserError(f"embed: --stage must belong to a run, got {model}; leave it out")
        if not path.exists() and str(model).count("/") != 1:  # no hub name either
            raise UserError(unfit)
        try:
            retriever = Retriever.load(path if path.exists() else str(model))
        except UserError:
            raise
        except DAMAGED as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{unfit}; {reason}") from None
        retriever.freeze_vision(True)
        own = retriever.reading.at_ret
        if not own and read != "at_ret":
            raise UserError(f"embed: --read must be at_ret of {model}, a retriever that pools its "
                            f"own way, got {read}; leave it out")  # fmt: skip
        if max_completion_length is not None:
            length = max_completion_length
        if length is None:
            length = kept_length(path) if home is None else None
        if length is None:
            length = _MAX_COMPLETION_LENGTH if own else 0
        if length and not retriever.writes:
            raise UserError(f"embed: --mode must be prompt of {model}, which has no head to write "
                            "a summary with, got generative")  # fmt: skip
        return cls(retriever, length, read, batch_size or size)

    def save(self, path: Path) -> None:
        """Write an ordinary checkpoint in fp32, its adapter merged, which opens as this encoder,
        and by sentence-transformers, in whose layout it is.

        Raises:
            UserError: it is read elsewhere than a checkpoint is.
        """
        if self.read != "at_ret":
            raise UserError(
                f"embed: --read must be at_ret of a model that is saved, got {self.read}; leave it "
                "out"
            )
        self.retriever.save(path, merge=True)
        note = read_note(path) | {LENGTH: self.max_completion_length}
        write_text(path / NOTE, json.dumps(note))
        if not (path / "modules.json").is_file():  # a retriever of somebody else has its own
            write_text(path / "modules.json", json.dumps([MODULE], indent=2))
            write_text(path / ABOUT, json.dumps(_LAID_OUT, indent=2))

    @cached_property
    def identity(self) -> Identity:
        """What embeddings may be compared with this encoder's."""
        inputs = self.retriever.inputs
        parts: list[Any] = [
            VERSION,
            inputs.tokenizer.backend_tokenizer.to_str(),
            inputs.tokenizer.chat_template,
            inputs.image_processor.to_json_string(),
            inputs.summary_prompt,
            self.max_completion_length,
            self.read,
            _configuration(self.retriever),
        ]
        if not self.retriever.reading.at_ret:
            parts.append(dataclasses.asdict(self.retriever.reading))
        text = json.dumps(parts, sort_keys=True)
        name = self.retriever.name
        return Identity(name, _revision(self.retriever), hashlib.sha256(text.encode()).hexdigest())

    @property
    def about(self) -> dict[str, Any]:
        """How to open it again, and what it was trained on where that is known."""
        learnt = self.retriever.trained_on
        return {
            **({} if learnt is None else {"trained_on": learnt}),
            "model": str(Path(self.retriever.name).absolute())
            if Path(self.retriever.name).exists()
            else self.retriever.name,
            "max_completion_length": self.max_completion_length,
            "read": self.read,
        }

    @property
    def embedding_size(self) -> int:
        return self.retriever.embedding_size

    @property
    def modalities(self) -> frozenset[str]:
        return frozenset(MODALITIES)

    @property
    def instructions(self) -> Instructions:
        return "required"

    def check(self, item: Item) -> None:
        """Try whether an item can be read; DataError where it cannot."""
        prompt = self.retriever.inputs.prompt(item)
        if prompt.image is not None:
            self.retriever.inputs.pixels(prompt.image)  # decoded, which a prompt is not

    def __call__(
        self, items: Sequence[Item], progress: Callable[[int], None] | None = None
    ) -> Encoded:
        """Embeddings and summaries of items, in their order."""
        return encode(
            self.retriever,
            items,
            max_completion_length=self.max_completion_length,
            batch_size=self.batch_size,
            read=self.read,
            progress=progress,
        )


def home_of(path: Path) -> Path | None:
    """The directory of the run that a path is, or whose stage's model it is; None of any other."""
    places = (path, path.absolute().parent.parent)
    return next((p for p in places if (p / "recipe.yaml").is_file()), None)


def _configuration(retriever: Retriever) -> dict[str, Any]:
    """What the model computes with its weights: activation, rotary base, heads. Where it lies, and
    in which version and number format it was stored, is left out."""
    found: dict[str, Any] = json.loads(retriever.plain.config.to_json_string(use_diff=False))

    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: kept(v) for k, v in value.items() if k not in _STORED and k[:1] != "_"}
        return [kept(v) for v in value] if isinstance(value, list) else value

    return dict(kept(found))


def _revision(retriever: Retriever) -> str:
    """A hash of the weights, of an adapter's and its base's together."""
    own = _of_files(Path(retriever.name))
    base = retriever.base
    if own is not None and (base is None or base.path == retriever.name):
        return own
    stands_on = None if base is None else _of_files(Path(base.path))
    if stands_on is None:  # a hub name
        commit = getattr(retriever.plain.config, "_commit_hash", None)
        stands_on = str(commit or (retriever.name if base is None else base.path))
    return stands_on if own is None else hashlib.sha256((stands_on + own).encode()).hexdigest()


def _of_files(directory: Path) -> str | None:
    return hash_of_files(directory, weight_files(directory))
