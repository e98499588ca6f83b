"""`elva export`: a model as one ordinary checkpoint in fp32, as other programs read it."""

from pathlib import Path

from elva.errors import UserError
from elva.files import write_directory
from elva.model.encoder import RetrieverEncoder


def export(model: str | Path, output: Path, *, stage: str | None = None) -> Path:
    """Write a run's model, or a checkpoint, with its adapter merged into the weights in fp32.

    Args:
        model: a run, a checkpoint directory or a hub name.
        stage: of a run; the last trained stage for None.

    Raises:
        UserError: there is no such model, or something in the output's place.
    """
    if output.exists():
        raise UserError(f"export: --output must not exist yet, got {output}; choose another")
    retriever = RetrieverEncoder.open(model, stage=stage).retriever
    write_directory(output, lambda partial: retriever.save(partial, merge=True))
    return output
