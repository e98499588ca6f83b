"""Mutants that no test can tell from the source, each with its reason."""

EMPTY = "empty = Manifest(0, first.shape[-1], kept, model, about=dict(about or {}))"
STRICT = "True -> False"
PIECES = "const ElvaStatus status = for_pieces((args.rows + height - 1) / height, 1, threads,"
THREADS = "constexpr int64_t kBytesPerThread = 192 << 10;"
DEEPER = "pending, depth = pending[~settled], min(8 * depth, len(stack))"
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
    ("elva/index/exact.py", DEEPER, "8 -> 9"): "how many more are looked at: any number is exact",
    ("csrc/cpu/topk.cpp", THREADS, "192 -> 193"): "how many threads: no bit depends on it",
    ("csrc/cpu/codes.cpp", PIECES, "- -> +"): "one piece more has no rows, or one less than none",
}
"""(file, its line's text, change) -> why the mutant does what the source does."""
