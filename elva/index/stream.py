"""A segment's table as an Arrow IPC stream, read as if nobody vouched for it.

Arrow reads offsets as they are and unpacks what says that it is packed, into as much memory as it
says. Here offsets are compared with the buffers, and what is packed, as no segment is, is refused.
"""

import io
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import pyarrow as pa

_HEADER, _DICTIONARY_DATA, _COMPRESSION = 2, 1, 3
"""Numbers of fields in Arrow's Message.fbs: of Message, DictionaryBatch, RecordBatch."""


class Written(NamedTuple):
    """What was written of a table."""

    rows: int
    bytes: int


def write(put: Callable[[memoryview], None], table: pa.Table | pa.RecordBatchReader) -> Written:
    """Write a table, or the batches of one that is too large to be held, by `put`."""
    sink = _Sink(put)
    rows = 0
    with pa.ipc.new_stream(pa.PythonFile(sink, "w"), table.schema) as writer:
        for batch in table.to_batches() if isinstance(table, pa.Table) else table:
            writer.write_batch(batch)
            rows += batch.num_rows
    return Written(rows, sink.count)


class _Sink(io.RawIOBase):
    """Arrow's way out to `put`."""

    def __init__(self, put: Callable[[memoryview], None]) -> None:
        self.put, self.count = put, 0

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        view = memoryview(content).cast("B")
        self.put(view)
        self.count += len(view)
        return len(view)


def read(view: memoryview, rows: int) -> pa.Table:
    """A table of so many rows with an id in each, mapped.

    Raises:
        ValueError: anything else.
    """
    try:
        for message in pa.ipc.MessageReader.open_stream(pa.py_buffer(view)):
            _check_unpacked(message)
        table = pa.ipc.open_stream(pa.py_buffer(view)).read_all()
        table.validate(full=True)
    except (pa.ArrowException, OSError, struct.error) as error:
        raise ValueError(str(error)) from None
    names = table.schema.names
    if table.num_rows != rows or len({*names}) < len(names) or "id" not in names:
        raise ValueError("no row for each embedding, or a field twice")
    if table.schema.field("id").type != pa.string() or table["id"].null_count:
        raise ValueError("no id in each row")
    return table


def _check_unpacked(message: Any) -> None:
    data = message.metadata.to_pybytes()
    kind = message.type
    if kind not in ("dictionary", "record batch"):
        return
    header = _inner(data, struct.unpack_from("<I", data)[0], _HEADER)
    batch = header if kind == "record batch" else _inner(data, header, _DICTIONARY_DATA)
    if _field(data, batch, _COMPRESSION):
        raise ValueError("packed")


def _field(data: bytes, table: int, number: int) -> int:
    """Where a flatbuffer's table keeps a field; 0 where it has none."""
    names = table - int(struct.unpack_from("<i", data, table)[0])
    place = 4 + 2 * number
    if place >= struct.unpack_from("<H", data, names)[0]:
        return 0
    offset = int(struct.unpack_from("<H", data, names + place)[0])
    return table + offset if offset else 0


def _inner(data: bytes, table: int, number: int) -> int:
    """The table that a field refers to."""
    place = _field(data, table, number)
    return place + int(struct.unpack_from("<I", data, place)[0])
