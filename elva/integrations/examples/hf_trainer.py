"""InfoNCE in transformers' Trainer, in bf16: its `compute_loss_func`.

python -m elva.integrations.examples.hf_trainer
"""

import tempfile

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from elva.integrations.examples.pairs import Pairs, TwoTowers, recall_at_1
from elva_kernels import info_nce


def loss_of(
    outputs: tuple[Tensor, Tensor], labels: Tensor, num_items_in_batch: Tensor | None = None
) -> Tensor:
    """A sum over the queries of a whole accumulated batch: the Trainer divides no loss of ours."""
    query, candidates = outputs
    loss = info_nce(query, candidates, candidate_ids=labels, reduction="sum")
    return loss / (len(labels) if num_items_in_batch is None else num_items_in_batch)


def main() -> None:
    """Prints R@1 and the mean loss before and after."""
    model = TwoTowers()
    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            directory, num_train_epochs=10, learning_rate=2e-3, lr_scheduler_type="constant",
            per_device_train_batch_size=200, per_device_eval_batch_size=200, bf16=True,
            use_cpu=not torch.cuda.is_available(), label_names=["labels"], report_to="none",
            save_strategy="no", logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(
            model,
            arguments,
            train_dataset=Pairs(400, seed=1),
            eval_dataset=Pairs(200, seed=3, copies=1),
            compute_loss_func=loss_of,
        )
        for when in ("before", "after"):
            loss = trainer.evaluate()["eval_loss"]
            print(f"R@1 {when}: {recall_at_1(model):.3f}, loss {loss:.3f}")
            if when == "before":
                trainer.train()


if __name__ == "__main__":
    main()
