"""Figures of retrieval by ranks, as an evaluator of sentence-transformers."""

from __future__ import annotations

import csv
import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.evaluation import BaseEvaluator

import elva_kernels
from elva.errors import UserError
from elva.evaluation.metrics import measure

logger = logging.getLogger(__name__)


class RankingEvaluator(BaseEvaluator):
    """Recall, MRR, nDCG, ranks and ranking rewards of queries against a corpus, by the cosine.

    A right document loses every tie, so that a collapsed model earns nothing; where no cosines are
    equal, figures are those of `InformationRetrievalEvaluator`.

    Args:
        queries: id -> text or picture; those without a right document are left out.
        corpus: id -> text or picture.
        relevant_docs: id of a query -> ids of its right documents.
        cutoffs: >= 1 each, the k of recall, accuracy and nDCG.
        name: put before each figure, and into the CSV file's name.
        batch_size, query_prompt_name, query_prompt, corpus_prompt_name, corpus_prompt,
            show_progress_bar: as of `encode_query` and `encode_document`.
        write_csv: append a line a call to RankingEvaluator_NAME_results.csv.

    Raises:
        UserError: no query has a right document; a cut-off out of its range.

    Calling it with a model returns {figure: value}: `accuracy@k` (a right document is among the
    first k), `recall@k` (the share of them), `ndcg@k`, `mrr@10`, `mrr`, `rank` (the mean 1-based
    rank of the best placed right document), `reward` (Liu et al., ELVA, arXiv:2606.20280, sec. 3.4,
    against the hardest 100). `primary_metric` is nDCG at the largest cut-off.

    Example::

        evaluator = RankingEvaluator(queries, corpus, relevant_docs, name="dev")
        print(evaluator(model)[evaluator.primary_metric])
    """

    def __init__(
        self,
        queries: Mapping[str, Any],
        corpus: Mapping[str, Any],
        relevant_docs: Mapping[str, Collection[str]],
        *,
        cutoffs: Sequence[int] = (1, 5, 10),
        name: str = "",
        batch_size: int = 32,
        query_prompt_name: str | None = None,
        query_prompt: str | None = None,
        corpus_prompt_name: str | None = None,
        corpus_prompt: str | None = None,
        show_progress_bar: bool = False,
        write_csv: bool = True,
    ) -> None:
        super().__init__()
        self.queries = {key: one for key, one in queries.items() if relevant_docs.get(key)}
        if not self.queries:
            raise UserError(
                "RankingEvaluator: queries must have right documents in relevant_docs, got none; "
                "name them by the same ids"
            )
        if not cutoffs or min(cutoffs) < 1:
            raise UserError(
                f"RankingEvaluator: cutoffs must be at least 1 each, got {cutoffs}; choose others"
            )
        if not corpus:
            raise UserError(
                "RankingEvaluator: corpus must hold documents, got none; pass id -> text or picture"
            )
        texts = [key for key in self.queries if isinstance(relevant_docs[key], str)]
        if texts:
            raise UserError(
                f"RankingEvaluator: relevant_docs must hold lists of ids, got "
                f"{relevant_docs[texts[0]]!r} of query {texts[0]!r}; put it into a list"
            )
        self.corpus, self.relevant_docs = dict(corpus), relevant_docs
        self.cutoffs, self.name = sorted({*cutoffs}), name
        self.query_prompts = {"prompt_name": query_prompt_name, "prompt": query_prompt}
        self.corpus_prompts = {"prompt_name": corpus_prompt_name, "prompt": corpus_prompt}
        self.batch_size, self.show_progress_bar = batch_size, show_progress_bar
        self.write_csv = write_csv
        self.csv_file = f"RankingEvaluator{'_' + name if name else ''}_results.csv"
        self.primary_metric = f"ndcg@{max(self.cutoffs)}"

    def __call__(
        self,
        model: SentenceTransformer,
        output_path: str | None = None,
        epoch: int = -1,
        steps: int = -1,
    ) -> dict[str, float]:
        """{figure: value}, also in the log, the model's card and a CSV file in `output_path`."""
        found = self._figures(model)
        where = "" if epoch == -1 else f" after epoch {epoch:g}"
        logger.info("RankingEvaluator: %s%s, %d queries", self.name, where, len(self.queries))
        logger.info("  ".join(f"{name} {value:.4f}" for name, value in found.items()))
        if output_path is not None and self.write_csv:
            path = Path(output_path) / self.csv_file
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh = not path.is_file()
            with path.open("a", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                if fresh:
                    writer.writerow(["epoch", "steps", *found])
                writer.writerow([epoch, steps, *found.values()])
        named: dict[str, float] = self.prefix_name_to_metrics(found, self.name)
        self.store_metrics_in_model_card_data(model, named, epoch, steps)
        return named

    def _figures(self, model: SentenceTransformer) -> dict[str, float]:
        how: dict[str, Any] = {
            "batch_size": self.batch_size, "show_progress_bar": self.show_progress_bar,
            "convert_to_tensor": True,
        }  # fmt: skip
        query = model.encode_query([*self.queries.values()], **self.query_prompts, **how).float()
        docs = model.encode_document([*self.corpus.values()], **self.corpus_prompts, **how).float()
        names = list(self.corpus)
        place = {name: row for row, name in enumerate(names)}
        right = [[place[d] for d in self.relevant_docs[q] if d in place] for q in self.queries]
        width = max([1, *map(len, right)])
        target = torch.tensor([[*r, *[-1] * (width - len(r))] for r in right], device=docs.device)
        depth = max(10, *self.cutoffs)
        seen = elva_kernels.rank_statistics(query, docs, target, k=depth)
        paid = elva_kernels.in_batch_ranking_reward(query, docs, target)
        rows = torch.cat([target, seen.topk_index], 1).tolist()
        scores = torch.cat([seen.target_score, seen.topk_scores], 1).tolist()
        answers = {
            q: [(names[row], score) for row, score in zip(*pair, strict=True) if row >= 0]
            for q, *pair in zip(self.queries, rows, scores, strict=True)
        }
        qrels = {q: dict.fromkeys(self.relevant_docs[q], 1) for q in self.queries}
        mean = measure(answers, qrels, self.cutoffs).mean
        rank = seen.rank.where(target >= 0, len(docs) + 1).amin(1).double()
        figures = {"accuracy": "hit", "recall": "recall", "ndcg": "ndcg"}
        return {
            **{f"{ours}@{k}": mean[f"{name}_at_{k}"]
               for ours, name in figures.items() for k in self.cutoffs},
            "mrr@10": mean["mrr_at_10"],
            "mrr": rank.reciprocal().where(rank <= len(docs), 0.0).mean().item(),
            "rank": rank.mean().item(),
            "reward": paid.reward.double().mean().item(),
        }  # fmt: skip

    def get_config_dict(self) -> dict[str, Any]:
        """Its arguments, for the model card."""
        return {"cutoffs": self.cutoffs, "batch_size": self.batch_size}
