"""`python -m elva` and `torchrun -m elva`."""

from elva.cli import app

app()
