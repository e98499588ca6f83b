"""How a GPU backend proves itself on a device before "auto" uses it: trials, and their verdicts."""
