"""A model card: what lies in an exported model's directory, for people and for a hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

import elva
from elva.report.figures import rows_of
from elva.report.sentences import lead
from elva.report.shapes import read
from elva.report.table import Cells, figure_cells
from elva.run import Run

_TAGS = ["elva", "retrieval", "multimodal", "image-text-embedding", "sentence-transformers"]

_USE = """
It needs `pip install 'elva[sentence-transformers]'`, and gives a SentenceTransformer.

```python
from PIL import Image

from elva.integrations.sentence_transformers import load

MODEL = "."  # this directory, or its name on a hub
model = load(MODEL)
query = model.encode_query(["an orange square"], prompt="Find the picture.")
orange, blue = (Image.new("RGB", (96, 96), colour) for colour in ("orange", "blue"))
print(model.similarity(query, model.encode_document([orange, blue])))
```

`SentenceTransformer(MODEL, trust_remote_code=True)` is the same: the library asks for that before
it imports a class of another package; no code is in this directory.

`elva embed`, `elva index build` and `elva search` read it by its directory or name, and give the
same embeddings.
"""


def card(name: str, reads: str, *, base: str | None, run: Run | None, stage: str | None) -> str:
    """The text of a README.md: a header that hubs read, then how to use the model, what it was
    trained on, and its figures.

    Args:
        name: the heading.
        reads: a sentence on how it makes an embedding.
        base: the hub name or directory of the checkpoint that it was trained from; None: of none.
        run, stage: what it was trained by; None where that is not known.
    """
    on_hub = base is not None and base.count("/") == 1 and not Path(base).exists()
    header = ModelCardData(
        library_name="sentence-transformers", pipeline_tag="feature-extraction", tags=_TAGS,
        base_model=base if on_hub else None,
    )  # fmt: skip
    parts = [f"---\n{header.to_yaml()}\n---\n\n# {name}\n\n{reads}\n", f"## Use\n{_USE}"]
    if run is not None and stage is not None:
        parts += [_trained(run, stage), _figures(run)]
    parts.append(f"## Citation\n\n```bibtex\n{elva.CITATION.strip()}\n```\n")
    return "\n".join(filter(None, parts))


def _trained(run: Run, stage: str) -> str:
    """What it was trained on, by which recipe, and by what."""
    facts = read(run, "run.json")
    versions: Mapping[str, str] = facts.get("versions") or {}
    machine: Mapping[str, Any] = facts.get("machine") or {}
    lines = [
        f"- this model: {run.title(stage)} of recipe `{run.recipe.name}`, seed {run.recipe.seed}",
        *(f"- stage {key}: data `{one.data}`" for key, one in run.recipe.stages.items()),
        f"- commit: {facts.get('commit') or 'unknown (installed without a checkout)'}",
        f"- versions: {', '.join(f'{key} {value}' for key, value in versions.items())}",
        f"- machine: {machine.get('cpus', '?')} CPUs, {machine.get('processor', 'unknown')}",
    ]
    return f"## Training\n\n{lead(run, rows_of(run))}\n\n" + "\n".join(lines) + "\n"


def _figures(run: Run) -> str:
    """The run's table, every stage and control, and chance."""
    rows = rows_of(run)
    if not any(row.figures for row in rows):
        return ""
    told = "On held-out queries, all stages and controls of the run."
    return f"## Figures\n\n{told}\n\n{_table(figure_cells(rows))}"


def _table(cells: Cells) -> str:
    """A table of Markdown; the best of each column in bold."""
    lines = [cells.head, ["---", *["---:"] * (len(cells.head) - 1)]]
    for i, row in enumerate(cells.rows):
        lines.append([f"**{c}**" if (i, j) in cells.best else c for j, c in enumerate(row)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
