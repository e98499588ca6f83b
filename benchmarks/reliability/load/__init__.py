"""Rows of load: a page with many visitors, an index read while it is replaced, a day of work."""

from benchmarks.reliability.load import demo, replaced, soak

ROWS = {
    "demo-load": demo.ROW,
    "readers-beside-writer": replaced.ROW,
    "soak": soak.ROW,
}
