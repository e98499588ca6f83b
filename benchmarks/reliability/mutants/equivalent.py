"""Mutants that no test can tell from the source, each with its reason."""

EQUIVALENT: dict[tuple[str, str, str], str] = {}
"""(file, its line's text, change) -> why the mutant does what the source does."""
