"""Rows of sanitizers: the kernels' suites on exact memory, the thread pool among many callers."""

from benchmarks.reliability.sanitizers import suites, threads

ROWS = {**suites.ROWS, **threads.ROWS}
