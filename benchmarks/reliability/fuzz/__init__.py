"""Rows of fuzzing: files and arguments that are changed by chance, and who reads them."""

from benchmarks.reliability.fuzz import c_api, files, guided, index

ROWS = {**files.ROWS, **guided.ROWS, **index.ROWS, **c_api.ROWS}
