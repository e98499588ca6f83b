"""ELVA in sentence-transformers: losses and an evaluator for its trainer, hard negatives for its
datasets, and a trained model that it loads."""

try:
    import sentence_transformers  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "sentence_transformers":
        raise
    raise ImportError(
        "elva.integrations.sentence_transformers: sentence-transformers must be installed; "
        "pip install 'elva[sentence-transformers]'"
    ) from None

from elva.integrations.sentence_transformers.evaluator import RankingEvaluator
from elva.integrations.sentence_transformers.losses import (
    CachedInfoNCELoss,
    InfoNCELoss,
    RankingRewardLoss,
)
from elva.integrations.sentence_transformers.mining import mine_hard_negatives
from elva.integrations.sentence_transformers.retriever import RetModule, load

__all__ = [
    "CachedInfoNCELoss",
    "InfoNCELoss",
    "RankingEvaluator",
    "RankingRewardLoss",
    "RetModule",
    "load",
    "mine_hard_negatives",
]
