"""The table's rows: a name -> what it tries. A new row is one line, and a module that tries it."""

from benchmarks.reliability import adversarial, mutants
from benchmarks.reliability.row import Row

ROWS: dict[str, Row] = {
    **adversarial.ROWS,
    **mutants.ROWS,
}
