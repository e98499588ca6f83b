"""A model as it embeds: its weights and everything else on which an embedding depends."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from elva.data import Item
from elva.errors import UserError
from elva.files import MANIFEST, sha256
from elva.model.adapters import weight_files
from elva.model.family import DAMAGED
from elva.model.identity import Identity
from elva.model.retriever import Retriever
from elva.model.rollout import Encoded, ReadAt, encode
from elva.run import Run

VERSION = 2
"""Raise it when the same model and item would give another embedding than before."""

MAX_COMPLETION_LENGTH = 128
"""Of a checkpoint that no run of ours says more about: the recipes of the paper's models. A
retriever of somebody else is read after its prompt."""


@dataclass(frozen=True)
class Encoder:
    """A model and how it is read.

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
    ) -> Encoder:
        """A run's model, a checkpoint directory, or a hub name.

        Args:
            stage: of a run, a stage or control; the last trained stage for None.
            max_completion_length, batch_size: the run's own for None.

        Raises:
            UserError: there is no such model.
        """
        unfit = f"{model}: must be a run, a checkpoint or a hub name"
        path, length, size = Path(model), None, 512
        home = next((p for p in (path, path.absolute().parent.parent)
                     if (p / "recipe.yaml").is_file()), None)  # fmt: skip
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
            length = MAX_COMPLETION_LENGTH if own else 0
        if length and not retriever.writes:
            raise UserError(f"embed: --mode must be prompt of {model}, which has no head to write "
                            "a summary with, got generative")  # fmt: skip
        return cls(retriever, length, read, batch_size or size)

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
        ]
        if not self.retriever.reading.at_ret:
            parts.append(dataclasses.asdict(self.retriever.reading))
        text = json.dumps(parts, sort_keys=True)
        name = self.retriever.name
        return Identity(name, _revision(self.retriever), hashlib.sha256(text.encode()).hexdigest())

    @property
    def about(self) -> dict[str, Any]:
        """How to open it again."""
        return {
            "model": str(Path(self.retriever.name).absolute())
            if Path(self.retriever.name).exists()
            else self.retriever.name,
            "max_completion_length": self.max_completion_length,
            "read": self.read,
        }

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
    """A hash of a directory's weights; None where there are none."""
    weights = weight_files(directory)
    if not weights:
        return None
    known: dict[str, Any] = {}
    if (directory / MANIFEST).is_file():
        known = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    names = [str(p.relative_to(directory)) for p in weights]
    sums = [known[n]["sha256"] if n in known else sha256(directory / n) for n in names]
    return hashlib.sha256("".join(sums).encode()).hexdigest()
