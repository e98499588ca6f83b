"""8-bit codes beside an index's rows: the same answers, fewer bytes, and their own promises."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import elva_kernels
from elva.cli import app
from elva.errors import IndexFault
from elva.index import Index, exact
from elva.index import manifest as manifest_file
from elva.model.identity import Identity

MODEL = Identity("a model", "revision", "preprocessing")


@pytest.fixture(autouse=True)
def small_indexes_too(monkeypatch):
    """Codes are read where rows are many; these tests have few."""
    monkeypatch.setattr(exact, "CODED_BYTES", 0)
    monkeypatch.setattr(exact, "DEEP", 4)


def rows(kind, count, dim, seed):
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(count, dim, generator=generator)
    if kind == "ties":
        found = found[torch.randint(0, 3, (count,), generator=generator).clamp(max=count - 1)]
    if kind == "near ties":
        found = 1 + 1e-3 * found
    if kind == "clustered":
        place = torch.randint(0, 4, (count,), generator=generator)
        found = torch.randn(4, dim, generator=generator)[place] + 0.05 * found
    if kind == "scales":
        found = found * torch.logspace(-5, 4, count).unsqueeze(1)
    return found


def ids(count):
    return [str(i) for i in range(count)]


@pytest.mark.usefixtures("small_indexes_too")
@given(
    kind=st.sampled_from(["random", "ties", "near ties", "clustered", "scales"]),
    dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
    count=st.integers(1, 800),
    added=st.integers(0, 50),
    dim=st.integers(1, 70),
    k=st.integers(1, 20),
    gone=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_answers_are_the_same_to_the_bit(
    tmp_path_factory, kind, dtype, count, added, dim, k, gone, seed
):
    place = tmp_path_factory.mktemp("i")
    embeddings = rows(kind, count + added, dim, seed)
    query = torch.cat([rows("random", 2, dim, seed + 1), embeddings[:1]])
    chosen = torch.rand(count, generator=torch.Generator().manual_seed(seed)) < gone
    found = []
    for coded in (True, False):
        index = Index.build(
            place / str(coded), ids(count), embeddings[:count], model=MODEL, dtype=dtype,
            codes=coded,
        )  # fmt: skip
        if added:
            index = index.add(ids(count + added)[count:], embeddings[count:], model=MODEL)
        index = index.delete([str(i) for i in chosen.nonzero()[:, 0].tolist()])
        assert index.is_coded == (coded or not index.segments)
        found.append(index.search(query, k))
    assert torch.equal(*(x.rows for x in found))
    assert torch.equal(*(x.scores.view(torch.int32) for x in found))


def test_few_rows_are_read_and_copies_all(tmp_path):
    embeddings = rows("random", 5000, 64, 0)
    found = Index.build(tmp_path / "i", ids(5000), embeddings, model=MODEL).search(
        embeddings[:3], 10
    )
    assert found.by_codes.all() and found.rows_read < 300
    copies = 1 + 1e-6 * embeddings
    found = Index.build(tmp_path / "c", ids(5000), copies, model=MODEL).search(copies[:1], 10)
    assert found.by_codes.tolist() == [False] and found.rows_read >= 5000


def old(index):
    """An index as it was before there were codes: version 1, and no word of them."""
    found = json.loads((index.directory / "index.json").read_text().splitlines()[0])
    found["version"] = 1
    for entry in found["segments"]:
        del entry["codes"]
    for one in index.codes:
        one.path.unlink()
    body = json.dumps(found)
    digest = manifest_file.hashlib.sha256(body.encode()).hexdigest()
    (index.directory / "index.json").write_text(f"{body}\n{digest}\n")


def test_an_older_index_opens_and_gets_codes(tmp_path):
    embeddings = rows("random", 300, 32, 0)
    index = Index.build(tmp_path / "i", ids(200), embeddings[:200], model=MODEL)
    right = index.search(embeddings[:5], 10)
    old(index)
    plain = Index(tmp_path / "i")
    assert not plain.is_coded and plain.info()["codes_bytes"] == 0
    assert torch.equal(plain.search(embeddings[:5], 10).rows, right.rows)
    more = plain.add(ids(300)[200:], embeddings[200:], model=MODEL)
    assert [one is None for one in more.codes] == [True, True]  # as the rest of it
    result = CliRunner().invoke(app, ["index", "codes", str(tmp_path / "i"), "--json"])
    assert result.exit_code == 0, result.output
    coded = Index(tmp_path / "i")
    assert coded.is_coded and json.loads(result.stdout)["codes_bytes"] > 300 * 32
    stamps = [one.path.stat().st_mtime_ns for one in coded.codes]
    again = Index.with_codes(tmp_path / "i")
    assert [one.path.stat().st_mtime_ns for one in again.codes] == stamps
    assert again.search(embeddings[:5], 10).by_codes.all()


def test_damaged_codes_are_refused_and_made_again(tmp_path):
    index = Index.build(tmp_path / "i", ids(50), rows("random", 50, 32, 0), model=MODEL)
    path = index.codes[0].path
    content = path.read_bytes()
    spoilt = bytearray(content)
    spoilt[5000] ^= 1
    path.write_bytes(spoilt)
    with pytest.raises(IndexFault, match="its checksum in the block at byte 4,096"):
        Index(tmp_path / "i")
    path.write_bytes(content[:-1])
    with pytest.raises(IndexFault, match=r"codes: must have .* bytes"):
        Index(tmp_path / "i", verify=False)
    for damage in (spoilt, content[:-1], None):
        path.unlink() if damage is None else path.write_bytes(damage)
        result = CliRunner().invoke(app, ["index", "codes", str(tmp_path / "i")])
        assert result.exit_code == 0, result.output
        assert path.read_bytes() == content
        Index(tmp_path / "i")


def test_the_codes_of_another_segment_are_refused(tmp_path):
    one, other = (
        Index.build(tmp_path / str(i), ids(50), rows("random", 50, 32, i), model=MODEL)
        for i in range(2)
    )
    one.codes[0].path.write_bytes(other.codes[0].path.read_bytes())
    with pytest.raises(IndexFault, match="the header that"):
        Index(tmp_path / "0", verify=False)
    (entry,) = one.manifest.segments  # as a manifest names them that nobody vouches for
    entry = replace(entry, codes=other.codes[0].header_sum)
    one.codes[0].path.rename(one.codes[0].path.with_name(entry.codes_file))
    manifest_file.write(one.directory, replace(one.manifest, segments=(entry,)))
    with pytest.raises(IndexFault, match=r"must have the codes of \w+\.elva"):
        Index(tmp_path / "0", verify=False)


def test_a_lost_file_of_codes_names_what_makes_it_again(tmp_path):
    index = Index.build(tmp_path / "i", ids(50), rows("random", 50, 32, 0), model=MODEL)
    index.codes[0].path.unlink()
    with pytest.raises(IndexFault, match=r"elva index codes .*i makes codes again"):
        Index(tmp_path / "i")


def test_damaged_rows_get_no_codes(tmp_path):
    """Codes of them would prove wrong answers once the rows are mended."""
    index = Index.build(
        tmp_path / "i", ids(50), rows("random", 50, 32, 0), model=MODEL, codes=False
    )
    path = index.segments[0].path
    content = bytearray(path.read_bytes())
    content[5000] ^= 64
    path.write_bytes(content)
    with pytest.raises(IndexFault, match="its checksum in the block at byte 4,096"):
        Index.with_codes(tmp_path / "i")
    assert not list(path.parent.glob("*.codes"))


@pytest.mark.parametrize("number", ["scale", "lost"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_forged_codes_that_are_no_numbers_are_damaged(tmp_path, monkeypatch, number, value):
    real = elva_kernels.row_codes

    def forged(part):
        codes = real(part)
        return codes._replace(**{number: torch.full_like(codes.scale, value)})

    monkeypatch.setattr(elva_kernels, "row_codes", forged)
    index = Index.build(tmp_path / "i", ids(50), rows("random", 50, 32, 0), model=MODEL)
    with pytest.raises(IndexFault, match="of each row; the file is damaged"):
        index.search(torch.randn(1, 32), 3)


def test_what_has_codes_is_not_written_again(tmp_path):
    index = Index.build(tmp_path / "i", ids(50), rows("random", 50, 32, 0), model=MODEL)
    assert Index.with_codes(tmp_path / "i").manifest == index.manifest


def test_small_indexes_and_deep_searches_read_rows(tmp_path, monkeypatch):
    monkeypatch.undo()
    index = Index.build(tmp_path / "i", ids(500), rows("random", 500, 32, 0), model=MODEL)
    assert index.search(torch.randn(1, 32), 3).by_codes is None
    monkeypatch.setattr(exact, "CODED_BYTES", 0)
    assert index.search(torch.randn(1, 32), 1).by_codes is None  # over 1 in 512
    monkeypatch.setattr(exact, "DEEP", 4)
    assert index.search(torch.randn(1, 32), 3).by_codes.all()
