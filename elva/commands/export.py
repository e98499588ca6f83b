"""`elva export`: a model as one ordinary checkpoint in fp32, as other programs read it."""

from pathlib import Path

from elva.errors import UserError
from elva.files import write_directory
from elva.model.encoder import RetrieverEncoder, home_of
from elva.report.card import card
from elva.run import Run


def export(model: str | Path, output: Path, *, stage: str | None = None) -> Path:
    """Write a run's model, or a checkpoint, with its adapter merged into the weights in fp32, in
    the layout of sentence-transformers, with a model card.

    Args:
        model: a run, a checkpoint directory or a hub name.
        stage: of a run; the last trained stage for None.

    Raises:
        UserError: there is no such model, or something in the output's place.
    """
    if output.exists():
        raise UserError(f"export: --output must not exist yet, got {output}; choose another")
    encoder = RetrieverEncoder.open(model, stage=stage)
    text = _card(encoder, Path(model), output.resolve().name, stage)

    def fill(partial: Path) -> None:
        encoder.save(partial)
        (partial / "README.md").write_text(text, "utf-8")

    write_directory(output, fill)
    return output


def _card(encoder: RetrieverEncoder, model: Path, name: str, stage: str | None) -> str:
    """Of a run's model what the run's files say; of another what its own say."""
    home, base = home_of(model), encoder.retriever.base
    run = None if home is None else Run.open(home)
    if run is not None:
        start = run.recipe.model.path
        of_stage = model.absolute().parent.name.partition("-")[2]
        stage = run.answering(stage if home == model else of_stage)
    else:
        start = None if base is None else base.path
    length = encoder.max_completion_length
    reads = "A model of ELVA's, which embeds texts, pictures, and both, to be ranked by the cosine."
    if encoder.retriever.reading.at_ret:
        reads += " Its embedding is the hidden state at `[RET]`"
        reads += f", after a summary of at most {length} tokens." if length else "."
    return card(name, reads, base=start, run=run, stage=stage)
