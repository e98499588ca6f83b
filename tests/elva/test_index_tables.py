"""What an index knows of its items beside their rows: fields, and tables as streams."""

import pyarrow as pa
import pytest

from elva.index import fields, stream


def test_a_field_of_a_taken_name_gets_a_name_of_its_own():
    """Whatever other fields there are: no value is lost, none is in another's place."""
    told = [
        {"text": "a", "source_text": "b", "source_source_text": "c", "year": 1, "name": "d"},
        {"text": "e", "year": "2"},
    ]
    kinds = fields.kinds(told)
    assert kinds == {
        "name": pa.string(), "source_source_text": pa.string(), "source_text": pa.string(),
        "text": pa.string(), "year": pa.float64(),
    }  # fmt: skip
    found = fields.arrays(told, kinds, own=("text", "name"))
    assert {name: values.to_pylist() for name, values in found.items()} == {
        "source_name": ["d", None],
        "source_source_text": ["c", None],
        "source_text": ["b", None],
        "source_source_source_text": ["a", "e"],
        "year": [1.0, 2.0],
    }


def test_a_field_is_of_numbers_where_every_value_is_one():
    told = [{"a": "1", "b": 1, "caption": "7", "c": None}, {"a": None, "b": "x", "d": 10**400}]
    kinds = fields.kinds(told)
    assert kinds == {
        "a": pa.float64(), "b": pa.string(), "caption": pa.string(), "d": pa.string(),
    }  # fmt: skip
    assert fields.arrays(told, {"b": pa.string()})["b"].to_pylist() == ["1", "x"]


@pytest.mark.parametrize("batches", [1, 3])
def test_a_table_of_any_types_comes_back_from_its_stream(batches):
    """Of views too, whose flatbuffers have a place for what packs them, and nothing in it."""
    table = pa.table({
        "id": pa.array(["a", "b", "c"]),
        "view": pa.array(["x" * 40, None, "y"], pa.string_view()),
        "kind": pa.array(["u", "v", "u"]).dictionary_encode(),
        "list": pa.array([[1], [], [2, 3]]),
    })  # fmt: skip
    given = pa.concat_tables([table] * batches)
    put = []
    written = stream.write(lambda view: put.append(bytes(view)), given)
    content = b"".join(put)
    assert written == (3 * batches, len(content))
    assert stream.read(memoryview(content), 3 * batches).equals(given)
    for wrong in (3 * batches - 1, 3 * batches + 1):
        with pytest.raises(ValueError, match="no row for each embedding"):
            stream.read(memoryview(content), wrong)
    reader = pa.RecordBatchReader.from_batches(given.schema, given.to_batches())
    again = []
    assert stream.write(lambda view: again.append(bytes(view)), reader) == written
    assert b"".join(again) == content


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
@pytest.mark.parametrize("dictionary", [True, False])
def test_packed_tables_are_refused(codec, dictionary):
    values = pa.array(["a" * 1000] * 50)
    table = pa.table({"id": pa.array([str(i) for i in range(50)]), "x": values})
    if dictionary:
        table = table.set_column(1, "x", values.dictionary_encode())
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=codec)
    with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    with pytest.raises(ValueError, match="packed"):
        stream.read(memoryview(sink.getvalue()), 50)


def test_ids_are_texts_one_a_row():
    """What `read` refuses beside the count: fields twice, no ids, ids that are null or no text."""
    wrong = {
        "twice": pa.table([pa.array(["a"]), pa.array(["b"])], names=["id", "id"]),
        "none": pa.table({"x": ["a"]}),
        "null": pa.table({"id": pa.array([None], pa.string())}),
        "numbers": pa.table({"id": [1]}),
    }
    for table in wrong.values():
        put = []
        stream.write(lambda view, put=put: put.append(bytes(view)), table)
        with pytest.raises(ValueError, match=r"no id in each row|a field twice"):
            stream.read(memoryview(b"".join(put)), 1)
