"""Mutants that no test can tell from the source, each with its reason."""

EMPTY = "empty = Manifest(0, first.shape[-1], kept, model, about=dict(about or {}))"
DEEPER = "pending, depth = pending[~settled], min(8 * depth, len(stack))"
EQUIVALENT: dict[tuple[str, str, str], str] = {
    ("elva/index/index.py", EMPTY, "0 -> 1"): "`building` gives the generation",
    ("elva/index/index.py", EMPTY, "- -> "): "`first` has two axes: the last is the second",
    ("elva/index/exact.py", "if len(lists) > 1:", "> -> >="): "one list is in order: sorted again",
    ("elva/index/exact.py", "if len(lists) > 1:", "len(lists) > 1 -> True"): (
        "one list is in order, and none has nothing to sort"
    ),
    ("elva/index/exact.py", DEEPER, "8 -> 9"): "how many more are looked at: any number is exact",
}
"""(file, its line's text, change) -> why the mutant does what the source does."""
