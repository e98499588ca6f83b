"""Mutants that no test can tell from the source, each with its reason."""

EMPTY = "empty = Manifest(0, first.shape[-1], kept, model, about=dict(about or {}))"
STRICT = "True -> False"
EQUIVALENT: dict[tuple[str, str, str], str] = {
    ("elva/index/index.py", EMPTY, "0 -> 1"): "`building` gives the generation",
    ("elva/index/index.py", EMPTY, "- -> "): "`first` has two axes: the last is the second",
    ("elva/index/exact.py", "if len(lists) > 1:", "> -> >="): "one list is in order: sorted again",
    ("elva/index/exact.py", "if len(lists) > 1:", "len(lists) > 1 -> True"): (
        "one list is in order, and none has nothing to sort"
    ),
    (
        "elva/training/negatives.py",
        "if settings.given < settings.count:",
        "settings.given < settings.count -> False",
    ): "a shortcut: no query keeps more of its list than `given`, so each is below `count`",
    ("elva/training/comparison.py", "for row, some in zip(out, lists, strict=True):", STRICT): (
        "`out` has a row for each list"
    ),
    (
        "elva/data/formats/rows.py",
        "return {name: cell for name, cell in zip(named, cells, strict=True) if name}",
        STRICT,
    ): "`named` is cut to as many as there are cells, and never has fewer",
}
"""(file, its line's text, change) -> why the mutant does what the source does."""
