"""mteb: an encoder of ours in its evaluation, MIEB's and M-BEIR's tasks first of all.

Written against mteb 2.26. mteb loads the data and computes the figures; an item is embedded as
`elva embed` does it, and found by `elva_kernels.topk` in fp32.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

import elva_kernels
from elva.data import Item, Query
from elva.data.formats.mteb import DATASETS
from elva.data.instructions import read_instructions
from elva.data.schema import TASKS, modalities, normalise
from elva.errors import DataError, UserError
from elva.model.encoder import Encoder
from elva.model.modalities import MODALITIES
from elva.search import Searcher

try:
    from mteb.models import ModelMeta, SearchEncoderWrapper
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.models.model_meta import ScoringFunction
    from mteb.types import PromptType
except ModuleNotFoundError as error:
    raise ImportError(
        f"elva.integrations.mteb needs mteb ({error}); pip install 'elva[mteb]'"
    ) from None

if TYPE_CHECKING:
    from mteb.abstasks.task_metadata import TaskMetadata

_MIRROR = re.compile(r"mbeir_([a-z0-9]+)_task(\d)$")
"""The end of the path of one of mteb's mirrors of M-BEIR's sets."""

PAIRS = 4096
"""Ours: pairs whose cosines are computed at a time."""


class ElvaEncoder(AbsEncoder):
    """A model of mteb's that embeds by an encoder of ELVA's: texts, pictures, and both in one.

    A query is asked with an instruction: of `prompts`, of `instructions`, or else the task's own
    (`TaskMetadata.prompt`); a query that brings its own is asked with that. What is asked for, and
    the items of tasks that have no queries, are embedded without.

    Args:
        model: a run, a checkpoint directory, a hub name, or an encoder, as of `Searcher`.
        prompts: task name, task type or "query" -> instruction, as mteb has it.
        instructions: M-BEIR's `query_instructions.tsv`; the first prompt of a set's row is asked
            with in tasks on mteb's mirrors of that set, whose own prompts are another of them or,
            of Fashion200K's pictures, those of another task.
        options: of `open_encoder`.

    Raises:
        UserError: the model cannot be opened.
        DataError: `instructions` is no such file.

    Example::

        import mteb
        from elva.integrations.mteb import ElvaEncoder

        tasks = mteb.get_tasks(["CIRRIT2IRetrieval"])
        result = mteb.evaluate(ElvaEncoder("runs/one"), tasks, encode_kwargs={"batch_size": 128})
    """

    def __init__(
        self,
        model: str | Path | Encoder,
        *,
        prompts: Mapping[str, str] | None = None,
        instructions: str | Path | None = None,
        **options: Any,
    ) -> None:
        self.searcher = Searcher(model, **options)
        self.model = self.searcher.encoder
        self.prompts_dict = dict(prompts or {}) or None
        self.instructions = {} if instructions is None else read_instructions(
            Path(instructions)
        )  # fmt: skip
        self.mteb_model_meta = _meta(self.model)
        self._search = SearchEncoderWrapper(self, index_backend=_Exact())

    # -- mteb's encoder ----------------------------------------------------------------------------

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: TaskMetadata,
        hf_split: str = "",
        hf_subset: str = "",
        prompt_type: PromptType | None = None,
        batch_size: int | None = None,
        precision: str = "float32",
        show_progress_bar: bool = True,
    ) -> Tensor:
        """[n, D] fp32 embeddings of what a loader holds.

        Args:
            inputs: a DataLoader of batches with `text`, `image`, or both, which are one item.
            prompt_type: `PromptType.query` for what asks.
            batch_size: the loader has followed it already.
            precision: of the embeddings; no other is made.

        Raises:
            UserError: an item of a kind that the model does not read, or another precision.
            DataError: an item with neither text nor picture, or a picture that cannot be read.
        """
        if precision != "float32":
            raise UserError(f"mteb: precision must be float32, got {precision!r}; leave it out")
        asks = prompt_type == PromptType.query
        instruction = self.instruction(task_metadata) if asks else None
        found = torch.empty(len(inputs.dataset), self.model.embedding_size)
        done = 0
        for batch in tqdm(inputs, task_metadata.name, disable=not show_progress_bar):
            items = [*_items(batch, task_metadata, instruction)]
            found[done : done + len(items)] = self.searcher.embed(items)
            done += len(items)
        return found

    def instruction(self, task_metadata: TaskMetadata) -> str:
        """What a task's queries are asked with; empty for a model that reads none."""
        if self.model.instructions == "unread":
            return ""
        own = {task_metadata.name, task_metadata.type, PromptType.query.value}
        if not own & {*(self.prompts_dict or {})}:
            mirror = _MIRROR.search(str(task_metadata.dataset["path"]))
            if mirror and mirror[1] in DATASETS and task_metadata.category in TASKS:
                key = (DATASETS.index(mirror[1]), *modalities(task_metadata.category))
                if key in self.instructions:
                    return self.instructions[key][0]
        return normalise(self.get_instruction(task_metadata, PromptType.query))

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """[n, m] fp32 cosines of the rows of [n, D] and [m, D], by `elva_kernels.topk`."""
        rows, others = (_rows(given) for given in (embeddings1, embeddings2))
        found = elva_kernels.topk(rows, others, len(others))
        return torch.empty_like(found.scores).scatter_(1, found.index, found.scores)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """[n] fp32 cosines of the rows of [n, D] and [n, D], each with its own, by
        `elva_kernels.ranking_reward`."""
        rows, others = (_rows(given) for given in (embeddings1, embeddings2))
        parts = [
            elva_kernels.ranking_reward(one, other, other[:, None]).scores[:, 0]
            for one, other in zip(rows.split(PAIRS), others.split(PAIRS), strict=True)
        ]
        return torch.cat(parts)

    # -- mteb's search -----------------------------------------------------------------------------

    def index(self, corpus: Any, *, task_metadata: TaskMetadata, **how: Any) -> None:
        """Embed a task's candidates; mteb calls it before `search`, with the same arguments.

        Raises:
            UserError: the task's queries or candidates are of a kind that the model does not read.
        """
        for side in PromptType:
            there = {*task_metadata.get_modalities(side)}
            kind = ",".join(name for name in ("image", "text") if name in there)
            if not there <= {"image", "text"} or kind not in self.model.modalities:
                reads = " and ".join(
                    one for key, (one, _) in MODALITIES.items() if key in self.model.modalities
                )
                raise UserError(
                    f"mteb: {self.model.identity.name} must read the {side.value} items of "
                    f"{task_metadata.name}, {' with '.join(sorted(there))}, got a model that reads "
                    f"{reads}; choose another task or model"
                )
        self._search.index(corpus, task_metadata=task_metadata, **how)

    def search(self, queries: Any, **how: Any) -> dict[str, dict[str, float]]:
        """Query id -> candidate id -> cosine, of the `top_k` best."""
        found: dict[str, dict[str, float]] = self._search.search(queries, **how)
        return found


class _Exact:
    """mteb's search backend of exact search over fp32 rows in memory."""

    def __init__(self) -> None:
        self.clear()

    def add_documents(self, embeddings: Tensor, idxs: list[str]) -> None:
        self.rows = embeddings
        self.places = {id: place for place, id in enumerate(idxs)}

    def search(
        self,
        embeddings: Tensor,
        top_k: int,
        similarity_fn: Any,
        top_ranked: Mapping[str, list[str]] | None = None,
        query_idx_to_id: Mapping[int, str] | None = None,
    ) -> tuple[list[list[float]], list[list[int]]]:
        """(scores, places) of each query's best, among all or among its own of `top_ranked`."""
        if top_ranked is None or query_idx_to_id is None:
            found = elva_kernels.topk(embeddings, self.rows, top_k)
            return found.scores.tolist(), found.index.tolist()
        scores, places = [], []
        for number, query in enumerate(embeddings):
            own = [self.places[id] for id in top_ranked[query_idx_to_id[number]]]
            found = elva_kernels.topk(query[None], self.rows[own], top_k)
            scores += found.scores.tolist()
            places += found.index.tolist()
        return scores, places

    def clear(self) -> None:
        self.rows, self.places = torch.empty(0, 0), {}


def _items(
    batch: Mapping[str, Any], task_metadata: TaskMetadata, instruction: str | None
) -> Iterator[Item]:
    """The items of a batch.

    Args:
        instruction: of its queries, where they bring none; None where they are no queries.
    """
    texts = batch.get("text") if instruction is None else batch.get("query", batch.get("text"))
    pictures = batch.get("image")
    for row in range(len(next(x for x in (texts, pictures) if x is not None))):
        raw = None if texts is None else texts[row]
        picture = None if pictures is None else pictures[row]
        text = normalise(raw or "") or None
        id = str(batch["id"][row]) if "id" in batch else str(row)
        where = f"{task_metadata.name}: {id}"
        kind = ",".join(k for k, x in (("image", picture), ("text", text)) if x is not None)
        if raw is not None and not kind:
            kind = "text"  # an empty one, as mteb's collections of texts hold some
        if not kind:
            raise DataError(f"{where}: has neither text nor picture")
        if instruction is None:
            yield Item(id, text, picture, kind, where=where)
            continue
        told = batch["instruction"][row] if "instruction" in batch else instruction
        task = task_metadata.category if task_metadata.category in TASKS else "t2t"
        yield Query(
            id, text, picture, kind, instruction=normalise(told), task=task, positives=(),
            raw_text=raw, where=where,
        )  # fmt: skip


def _rows(given: Any) -> Tensor:
    """[n, D] fp32 on the CPU; a vector is one row."""
    rows = torch.as_tensor(given, dtype=torch.float32, device="cpu")
    return rows[None] if rows.ndim == 1 else rows


def _meta(encoder: Encoder) -> ModelMeta:
    """What mteb writes of a model: its results lie under its name and revision."""
    identity = encoder.identity
    name = identity.name if re.fullmatch(r"[\w.-]+/[\w.-]+", identity.name) else (
        f"elva/{Path(identity.name).absolute().name}"
    )  # fmt: skip
    kinds = {part for kind in encoder.modalities for part in kind.split(",")}
    return ModelMeta.create_empty(
        {
            "name": name,
            "revision": f"{identity.revision[:16]}-{identity.preprocessing[:16]}",
            "embed_dim": encoder.embedding_size,
            "similarity_fn_name": ScoringFunction.COSINE,
            "use_instructions": encoder.instructions != "unread",
            "modalities": sorted(kinds, reverse=True),
            "framework": ["PyTorch"],
        }
    )
