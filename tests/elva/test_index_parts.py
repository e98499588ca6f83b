"""An index in parts: embeddings in chunks, blocks that are read, what is told meanwhile."""

import base64
import hashlib
import json
import math
import zlib
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch

from elva.errors import IndexFault
from elva.index import Index, blocks, change, codes, exact, manifest
from elva.index import compact as compacting
from elva.model.identity import Identity

MODEL = Identity("a model", "revision", "preprocessing")


def rows(count, dim=16, seed=0):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def ids(count, start=0):
    return [f"item {i}" for i in range(start, start + count)]


class Told:
    """A reporter that keeps what it is told, by what goes on."""

    def __init__(self):
        self.now, self.total, self.done = None, {}, defaultdict(list)

    def start(self, what, total, unit="steps"):
        self.now = what.rpartition(": ")[2]
        self.total[self.now] = (total, unit)

    def advance(self, done, values=None):
        self.done[self.now].append(done)

    def say(self, line): ...

    def finish(self, line): ...


# -- chunks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [list, iter, tuple])
def test_chunks_are_one_index(tmp_path, given):
    """As the same rows at once: in a list, or drawn one by one as they are written."""
    embeddings = rows(50)
    whole = Index.build(tmp_path / "w", ids(50), embeddings, model=MODEL)
    index = Index.build(tmp_path / "i", ids(30), given(embeddings[:30].split(7)), model=MODEL)
    assert len(index) == 30 and len(index.segments) == 1
    index = index.add(ids(20, 30), given(embeddings[30:].split(9)), model=MODEL)
    assert torch.equal(index.embeddings(range(50)), whole.embeddings(range(50)))
    assert index.ids(range(50)) == ids(50) and len(index.segments) == 2


@pytest.mark.parametrize(
    "chunks",
    [[], [None], [[[1.0, 2.0]]], [torch.ones(3)], [torch.ones(2, 2, 2)], [torch.ones(1, 0)]],
    ids=["none", "no tensor", "a list", "a vector", "three axes", "no columns"],
)
def test_what_is_no_matrix_is_no_first_chunk(tmp_path, chunks):
    with pytest.raises(IndexFault, match=r"embeddings must be \[n, D\] with D of at least 1"):
        Index.build(tmp_path / "i", ["a"], chunks, model=MODEL)
    assert not (tmp_path / "i").exists()


def test_one_column_is_enough(tmp_path):
    index = Index.build(tmp_path / "i", ["a", "b"], torch.tensor([[2.0], [-1.0]]), model=MODEL)
    found = index.search(torch.ones(1, 1), 2)
    assert found.rows.tolist() == [[0, 1]] and found.scores.tolist() == [[1, -1]]


@pytest.mark.parametrize("dtype", ["int8", "float64", "", None, 16, ["float16"], torch.float16])
def test_a_dtype_is_one_of_three_words(tmp_path, dtype):
    with pytest.raises(IndexFault, match="dtype must be one of float16, bfloat16, float32, got"):
        Index.build(tmp_path / "i", ["a"], rows(1), model=MODEL, dtype=dtype)


def test_a_row_that_is_no_number_is_named_where_it_stands(tmp_path):
    """Counted over all chunks, with its id."""
    for wrong in (math.nan, math.inf, -math.inf):
        embeddings = rows(9)
        embeddings[7, 3] = wrong
        with pytest.raises(IndexFault, match=r"NaN or infinity in row 7 \(item 7\); mend"):
            Index.build(tmp_path / "i", ids(9), list(embeddings.split(4)), model=MODEL)
        with pytest.raises(IndexFault, match="NaN or infinity in row 7; mend"):  # it has no id
            Index.build(tmp_path / "i", ids(7), list(embeddings.split(4)), model=MODEL)


# -- blocks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [5, 16, 4096])
def test_a_file_of_many_blocks_is_checked_in_each(tmp_path, monkeypatch, block):
    """Of 4 MiB as they are written; here of a few bytes, so that a small index has many."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", block)
    index = Index.build(tmp_path / "i", ids(40), rows(40), model=MODEL, codes=False)
    path, end = index.segments[0].path, index.segments[0]._file.end
    assert path.stat().st_size == end + math.ceil((end - 4096) / block) * 32
    told = []
    index.segments[0].verify(told.append)
    assert sum(told) == end - 4096 and max(told) <= block and len(told) > 0
    content = path.read_bytes()
    for place in {min(4096 + some, end - 1) for some in (0, block - 1, block, end)}:
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        first = 4096 + (place - 4096) // block * block
        with pytest.raises(IndexFault, match=f"checksum in the block at byte {first:,};"):
            Index(tmp_path / "i")
    path.write_bytes(content[:end] + bytes([content[end] ^ 4]) + content[end + 1 :])
    with pytest.raises(IndexFault, match=f"its checksums at byte {end:,};"):
        Index(tmp_path / "i")
    path.write_bytes(content)
    Index(tmp_path / "i")


def test_a_block_has_4_mib(tmp_path):
    """So that files are read by every version."""
    index = Index.build(tmp_path / "i", ids(1100), rows(1100, 1024), model=MODEL, dtype="float32")
    content, end = index.segments[0].path.read_bytes(), index.segments[0]._file.end
    parts = [content[at : min(at + 4 * 2**20, end)] for at in range(4096, end, 4 * 2**20)]
    assert len(parts) == 2
    assert content[end:] == b"".join(hashlib.sha256(part).digest() for part in parts)


@pytest.mark.parametrize("content", [b"[]", b"null", b"2", b'"version"'])
def test_fields_are_those_of_an_object(tmp_path, content):
    with pytest.raises(IndexFault, match="must have its fields as they are written"):
        blocks.read_fields(manifest.Manifest, content, tmp_path / "index.json")


@pytest.mark.parametrize("version", [0, 3, 10**30])
def test_another_version_says_who_reads_it(tmp_path, version):
    content = json.dumps({"version": version}).encode()
    with pytest.raises(IndexFault, match=rf"must be of version 2, got {version}; use the elva"):
        blocks.read_fields(manifest.Manifest, content, tmp_path / "index.json", (1, 2))


@pytest.mark.parametrize("dropped", [0, 256, 257, 300, 399, 400])
def test_rows_are_gathered_in_blocks_of_any_size(tmp_path, monkeypatch, dropped):
    """A filter that leaves many out searches blocks of the others: here of one row each."""
    embeddings, query = rows(400), rows(3, seed=1)
    columns = {"place": [*range(400)]}
    index = Index.build(
        tmp_path / "i", ids(200), embeddings[:200], model=MODEL, columns={"place": [*range(200)]}
    ).add(ids(200, 200), embeddings[200:], model=MODEL, columns={"place": columns["place"][200:]})
    where = [("place", ">=", dropped)]
    wanted = index.search(query, 7, where=where)
    live = 400 - dropped
    scores = torch.nn.functional.normalize(query.double(), dim=1) @ (
        torch.nn.functional.normalize(embeddings.half().double(), dim=1).T
    )
    best = scores[:, dropped:].sort(dim=1, descending=True)
    assert torch.equal(wanted.rows, best.indices[:, :7] + dropped)
    assert wanted.rows.shape == (3, min(7, live))
    assert torch.allclose(wanted.scores.double(), best.values[:, :7], atol=1e-6, rtol=0)
    monkeypatch.setattr(exact, "BLOCK_MB", 0)
    found = index.search(query, 7, where=where)
    assert torch.equal(found.rows, wanted.rows) and torch.equal(found.scores, wanted.scores)


def test_widened_rows_are_read_in_blocks_of_any_size(monkeypatch):
    parts = [(1 + 2e-2 * rows(count, seed=count)).half() for count in (50, 0, 33)]
    query = 1 + 1e-3 * rows(2, seed=9)
    stack = exact.Stack(parts)
    wanted = stack.widened(query, 60)
    monkeypatch.setattr(exact, "BLOCK_MB", 0)
    found = stack.widened(query, 60)
    assert torch.equal(found.rows, wanted.rows) and torch.equal(found.scores, wanted.scores)
    own = torch.cosine_similarity(
        query.double()[:, None], torch.cat(parts).double()[found.rows], dim=-1
    )
    assert (own - found.scores.double()).abs().max() < 1e-6 and found.rows.max() >= 50


def test_no_row_is_widened_where_its_candidates_prove_the_answer(monkeypatch):
    parts, query = [rows(300).half()], rows(2, seed=9)
    wanted = exact.Stack(parts).widened(query, 5)
    monkeypatch.setattr(exact.Stack, "widened", None)
    assert torch.equal(exact.search(query, parts, 5).rows, wanted.rows)


def test_rows_of_a_stack_come_in_the_order_that_is_asked(monkeypatch):
    parts = [rows(count, seed=count) for count in (4, 0, 1, 6)]
    stack, whole = exact.Stack(parts), torch.cat(parts)
    for wanted in ([10, 0, 4, 3, 5, 9], [4], [0], [10], [5, 5, 0]):
        assert torch.equal(stack.take(torch.tensor(wanted)), whole[wanted])
    assert len(stack) == 11 and stack.bytes == whole.nbytes and stack.dtype == torch.float32
    assert stack.rows_a_block == (16 << 20) // (16 * 4)


def test_candidates_that_are_too_few_are_followed_by_no_row():
    stored = rows(20).half()
    query = rows(3, seed=1)
    given = [torch.tensor([7, 2, 19, 4]), torch.tensor([5]), torch.tensor([], dtype=torch.int64)]
    found = exact.rescored(query, exact.Stack([stored[:9], stored[9:]]), given, 3)
    cosines = torch.cosine_similarity(query[:, None].double(), stored[None].double(), dim=-1)
    best = given[0][cosines[0, given[0]].argsort(descending=True)][:3]
    assert found.rows.tolist() == [best.tolist(), [5, -1, -1], [-1, -1, -1]]
    assert found.scores.isinf().sum(1).tolist() == [0, 2, 3]
    assert torch.allclose(found.scores[0].double(), cosines[0, best], atol=1e-6)


def test_codes_are_chosen_where_they_pay(monkeypatch):
    """Ours: by bytes of the rows, rows a filter leaves, and depth; each bound as it is written."""
    stack = exact.Stack([rows(1024, 4)])
    monkeypatch.setattr(exact, "CODED_BYTES", stack.bytes)
    assert exact._by_codes(stack, 1024, 1) and exact._by_codes(stack, 513, 1)
    assert not exact._by_codes(stack, 512, 1) and not exact._by_codes(stack, 1024, 2)
    monkeypatch.setattr(exact, "DEEP", 1)
    assert exact._by_codes(stack, 129, 1) and not exact._by_codes(stack, 128, 1)
    monkeypatch.setattr(exact, "CODED_BYTES", stack.bytes + 1)
    assert not exact._by_codes(stack, 1024, 1)


def test_so_many_columns_have_codes(tmp_path, monkeypatch):
    monkeypatch.setattr(change, "MOST_CODED", 16)
    assert Index.build(tmp_path / "i", ids(3), rows(3), model=MODEL).is_coded
    plain = Index.build(tmp_path / "p", ids(3), rows(3), model=MODEL, codes=False)
    assert not plain.is_coded and Index.with_codes(tmp_path / "p").is_coded
    wide = Index.build(tmp_path / "w", ids(3), rows(3, 17), model=MODEL)
    assert not wide.is_coded
    with pytest.raises(IndexFault, match="must have at most 16 columns for codes, got 17;"):
        Index.with_codes(tmp_path / "w")


@pytest.mark.parametrize("dim", [1, 2, 3, 4])
def test_codes_of_any_width_are_padded(tmp_path, monkeypatch, dim):
    """To 4 bytes, before the scales: what is read back is what `row_codes` gave."""
    monkeypatch.setattr(codes, "CODED_ROWS", 2)
    index = Index.build(tmp_path / "i", ids(5), rows(5, dim), model=MODEL)
    kept, given = index.codes[0].codes, codes.elva_kernels.row_codes(index.segments[0].embeddings)
    assert all(torch.equal(a, b) for a, b in zip(kept, given, strict=True))


# -- what is told ----------------------------------------------------------------------------------


def test_every_row_and_byte_is_told_once(tmp_path, monkeypatch):
    monkeypatch.setattr(codes, "CODED_ROWS", 4)
    monkeypatch.setattr(compacting, "BLOCK_MB", 0)
    parts = [
        Index.build(tmp_path / str(i), ids(10, 10 * i), rows(10, seed=i), model=MODEL)
        .segments[0]
        .path
        for i in range(3)
    ]
    told = Told()
    Index.build(tmp_path / "b", ids(10), rows(10), model=MODEL, reporter=told)
    assert told.total == {"code rows": (10, "rows")}
    assert told.done["code rows"] == [4, 8, 10]
    told = Told()
    made = Index.assemble(tmp_path / "a", parts[:2], reporter=told)
    assert told.total == {"verify": (1, "MB"), "code rows": (20, "rows")}
    assert told.done["code rows"] == [4, 8, 10, 14, 18, 20] and told.done["verify"][-1] == 0
    told = Told()
    made = made.add_segments(parts[2:], reporter=told)
    assert told.done["code rows"] == [4, 8, 10]
    told = Told()
    made.verify(told)
    assert len(told.done["verify"]) == 6  # a block of each segment, and of its codes
    told = Told()
    compacting.compact((tmp_path / "a"), told)  # of three segments
    assert told.total["compact"] == (30, "rows")
    told = Told()
    bare = Index.assemble(tmp_path / "c", parts, codes=False, reporter=told)
    assert "code rows" not in told.total and not bare.is_coded
    told = Told()
    assert Index.with_codes(tmp_path / "c", told).is_coded
    assert told.total["code rows"] == (30, "rows")
    assert sorted(set(told.done["code rows"])) == [4, 8, 10, 14, 18, 20, 24, 28, 30]
    assert told.done["code rows"] == sorted(told.done["code rows"])


def test_megabytes_are_told_as_they_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1 << 19)
    index = Index.build(tmp_path / "i", ids(3000), rows(3000, 512), model=MODEL, codes=False)
    told = Told()
    index.verify(told)
    size = index.files[0].size
    assert told.total == {"verify": (size >> 20, "MB")}
    assert told.done["verify"][:4] == [0, 1, 1, 2] and told.done["verify"][-1] == size >> 20


@pytest.mark.parametrize("coded", [True, False])
def test_rows_that_a_search_has_read_are_told(coded, monkeypatch):
    monkeypatch.setattr(exact, "CODED_BYTES", 0 if coded else 1 << 40)
    monkeypatch.setattr(exact, "DEEP", 1)
    parts = [rows(40).half(), rows(20, seed=1).half()]
    told = []
    given = [codes.elva_kernels.row_codes(part) for part in parts]
    found = exact.search(rows(2, seed=2), parts, 3, progress=told.append, codes=given)
    assert told == ([60] if coded else [40, 60]) and (found.by_codes is not None) == coded


# -- changes ---------------------------------------------------------------------------------------


def test_a_generation_is_one_later_at_each_change(tmp_path):
    index = Index.build(tmp_path / "i", ids(3), rows(3), model=MODEL, codes=False)
    assert index.manifest.generation == 0
    index = index.add(["z"], rows(1), model=MODEL)
    assert index.manifest.generation == 1
    index = index.delete(["z"])
    assert index.manifest.generation == 2 and len(index.segments) == 1  # nothing of it is left
    index = index.delete(["item 1"])
    assert Index.with_codes(tmp_path / "i").manifest.generation == 4
    assert compacting.compact(tmp_path / "i").manifest.generation == 5
    made = Index.build(tmp_path / "i", ids(2), rows(2), model=MODEL, overwrite=True)
    assert made.manifest.generation == 6


def test_a_fingerprint_is_of_what_can_be_found(tmp_path):
    index = Index.build(tmp_path / "i", ids(3), rows(3), model=MODEL)
    same = Index.build(tmp_path / "s", ids(3), rows(3), model=MODEL, codes=False)
    assert index.fingerprint == same.fingerprint == Index(tmp_path / "i").fingerprint
    assert index.delete(["item 0"]).fingerprint not in (same.fingerprint, "")
    assert same.delete(["item 1"]).fingerprint != Index(tmp_path / "i").fingerprint


def packed(gone, *, end=True, more=b""):
    """Bits as a manifest keeps them; without their stream's end, or with bytes behind it."""
    writer = zlib.compressobj()
    content = writer.compress(np.packbits(np.array(gone, bool)).tobytes())
    content += writer.flush(zlib.Z_FINISH if end else zlib.Z_SYNC_FLUSH)
    return base64.b64encode(content + more).decode()


@pytest.mark.parametrize("count", [1, 7, 8, 9, 16])
def test_deleted_rows_are_one_bit_each_and_nothing_else(count):
    entry = manifest.Entry("a.elva", count, "0" * 64)
    gone = [i % 3 == 0 for i in range(count)]
    assert entry.alive() is None
    assert (~replace(entry, deleted=packed(gone)).alive()).tolist() == gone
    assert (~entry.without(np.flatnonzero(gone)).alive()).tolist() == gone
    both = entry.without(np.array([0])).without(np.array([count - 1]))
    assert np.flatnonzero(~both.alive()).tolist() == sorted({0, count - 1})
    wrong = {
        "too many": packed([*gone, *[False] * 8]),
        "far too many": packed([*gone, *[False] * 80]),
        "too few": packed(gone[: 8 * ((count - 1) // 8)]),
        "no end": packed(gone, end=False),
        "more behind": packed(gone, more=b"x"),
        "no stream": base64.b64encode(b"xx").decode(),
        "no base64": "~",
    }
    if count % 8:
        wrong["bits of no row"] = packed([*gone, True])
    for deleted in wrong.values():
        with pytest.raises(ValueError, match=r"."):
            replace(entry, deleted=deleted).alive()


def test_what_is_replaced_is_gone_and_the_rest_stays(tmp_path):
    index = Index.build(tmp_path / "i", ids(10), rows(10), model=MODEL)
    with pytest.raises(IndexFault, match="must be new, got 'item 4' and 2 more that are there"):
        index.add(["item 6", "item 4", "item 5", "new"], rows(4), model=MODEL)
    index = index.add(["item 6", "item 4"], rows(2, seed=1), model=MODEL, overwrite=True)
    assert index.alive.tolist() == [i not in (4, 6) for i in range(10)] + [True, True]
    assert index.rows(["item 4", "item 9", "item 6"]).tolist() == [11, 9, 10]
    assert len(index) == 10 and index.info()["deleted"] == 2
    assert np.array_equal(index.rows([]), []) and index.embeddings([]).shape == (0, 16)
