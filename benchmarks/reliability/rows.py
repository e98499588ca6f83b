"""The table's rows: a name -> what it tries. A new row is one line, and a module that tries it."""

from benchmarks.reliability import (
    adversarial,
    crashes,
    curves,
    fuzz,
    load,
    mutants,
    repeats,
    sanitizers,
    servers,
    shown,
)
from benchmarks.reliability.row import Row

ROWS: dict[str, Row] = {
    **adversarial.ROWS,
    **repeats.ROWS,
    **sanitizers.ROWS,
    **fuzz.ROWS,
    **crashes.ROWS,
    **curves.ROWS,
    **servers.ROWS,
    **load.ROWS,
    **shown.ROWS,
    **mutants.ROWS,
}
