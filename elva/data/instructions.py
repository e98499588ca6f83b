"""The instructions of a data directory, as M-BEIR keeps them: reader and writer."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from elva.data.layout import INSTRUCTIONS
from elva.data.schema import normalise
from elva.data.strict import lines, modality_of, write_lines
from elva.errors import DataError


def read_instructions(path: Path) -> dict[tuple[int, str, str], tuple[str, ...]]:
    """(dataset, query modality, candidate modality) -> normalised prompts."""
    return {(number, q, c): prompts for _, number, q, c, prompts in _rows(path)}


def datasets(path: Path) -> list[tuple[str, int]]:
    """(name, number) of each dataset, as often as it has instructions."""
    return [(name, number) for name, number, *_ in _rows(path)]


def first_instructions(root: Path, dataset: int, candidate: str) -> dict[str, str]:
    """Query modality -> the instruction by which a dataset asks for such candidates."""
    prompts = read_instructions(root / INSTRUCTIONS)
    return {q: p[0] for (number, q, c), p in prompts.items() if (number, c) == (dataset, candidate)}


def write_instructions(
    root: Path, dataset: str, number: int, prompts: Mapping[tuple[str, str], Sequence[str]]
) -> None:
    """Write the instructions of one dataset."""
    header = ["query_modality", "cand_modality", "dataset_name", "dataset_id"]
    header += [f"prompt_{i}" for i in range(1, 5)]
    # Queries that say themselves what to look for: an empty prompt is written as it is quoted.
    rows = [
        [query, cand, dataset, str(number), *(prompt or '""' for prompt in some)]
        for (query, cand), some in prompts.items()
    ]
    write_lines(root / INSTRUCTIONS, ("\t".join(row) for row in [header, *rows]))


def _rows(path: Path) -> Iterator[tuple[str, int, str, str, tuple[str, ...]]]:
    for number, (where, line) in enumerate(lines(path)):
        fields = line.split("\t")
        is_number = len(fields) > 3 and re.fullmatch("[0-9]{1,8}", fields[3])
        if number == 0 and not is_number:
            continue  # The header.
        found = tuple(normalise(field) for field in fields[4:] if field.strip())
        modalities = [modality_of(field) for field in fields[:2]]
        if not found or None in modalities or not is_number:
            raise DataError(
                f"{where}: not query_modality, cand_modality, dataset, dataset_id, prompts"
            )
        yield fields[2], int(fields[3]), str(modalities[0]), str(modalities[1]), found
