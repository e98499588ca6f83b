"""Our losses in loops of others: each file runs, `python -m elva.integrations.examples.NAME`."""
