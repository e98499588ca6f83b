"""Other weights are another model, whatever lies beside them."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from elva import files
from elva.errors import UserError
from elva.model import weights
from elva.model.encoder import open_encoder
from tests.elva import families


@pytest.fixture
def counted(monkeypatch, tmp_path):
    """Every file is large; how often one was hashed."""
    calls: list[Path] = []
    monkeypatch.setenv("ELVA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(weights, "LARGE", 1)
    monkeypatch.setattr(weights, "SETTLED_NS", 0)
    monkeypatch.setattr(weights, "sha256", lambda p: calls.append(p) or files.sha256(p))
    return calls


def test_weights_that_were_replaced_are_another_model(tmp_path):
    """Fine-tuned in place: save_pretrained does not touch the manifest of the first save."""
    model = tmp_path / "model"
    files.write_directory(model, lambda d: families.write(d, "qwen2_vl"))
    first = open_encoder(model).identity
    assert files.is_whole(model) and open_encoder(model).identity == first
    (place,) = model.glob("*.safetensors")
    tensors = {k: v + 0.1 * torch.randn_like(v) for k, v in load_file(place).items()}
    save_file(tensors, place, metadata={"format": "pt"})
    other = open_encoder(model).identity
    assert other.revision != first.revision and other.preprocessing == first.preprocessing
    assert not other.matches(first)


def test_the_same_weights_computed_otherwise_are_another_model(tmp_path):
    """Another activation beside them; where and how they were stored is no matter."""
    model = tmp_path / "model"
    files.write_directory(model, lambda d: families.write(d, "qwen2_vl"))
    first = open_encoder(model).identity
    place = model / "config.json"
    before = place.read_text(encoding="utf-8")
    config = json.loads(before) | {"transformers_version": "5.0.0", "_name_or_path": "elsewhere"}
    place.write_text(json.dumps(config), encoding="utf-8")
    assert open_encoder(model).identity.matches(first)
    assert '"silu"' in before
    place.write_text(before.replace('"silu"', '"relu"'), encoding="utf-8")
    other = open_encoder(model).identity
    assert other.revision == first.revision and not other.matches(first)


def test_weights_that_no_hash_knows_are_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(UserError, match=r"must hold its weights as \.safetensors, got none; load"):
        weights.hash_of_files(tmp_path, [])
    assert weights.hash_of_files(tmp_path / "absent", []) is None


def test_a_large_file_is_hashed_once(tmp_path, counted):
    place = tmp_path / "model.safetensors"
    place.write_bytes(b"weights")
    wanted = files.sha256(place)
    assert [weights.content_hash(place) for _ in range(3)] == [wanted] * 3
    assert counted == [place]
    kept = place.stat()
    place.write_bytes(b"Weights")  # as many bytes, and the time set back
    os.utime(place, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    assert weights.content_hash(place) == files.sha256(place) != wanted
    (tmp_path / "new").write_bytes(b"weighty")
    os.replace(tmp_path / "new", place)
    assert weights.content_hash(place) == files.sha256(place)
    assert len(counted) == 3


def test_a_file_that_just_changed_is_hashed_again(tmp_path, counted, monkeypatch):
    monkeypatch.setattr(weights, "SETTLED_NS", 60_000_000_000)
    place = tmp_path / "model.safetensors"
    place.write_bytes(b"weights")
    assert weights.content_hash(place) == weights.content_hash(place) == files.sha256(place)
    assert len(counted) == 2 and not (tmp_path / "cache").exists()


@pytest.mark.parametrize("fault", ["unwritable", "damaged", "another", "a directory"])
def test_a_cache_that_is_of_no_use_costs_time_alone(tmp_path, counted, fault):
    place = tmp_path / "model.safetensors"
    place.write_bytes(b"weights")
    if fault == "unwritable":
        (tmp_path / "cache").touch()
    else:
        weights.content_hash(place)
        (known,) = (tmp_path / "cache" / "digests").iterdir()
        data = json.loads(known.read_text())
        data["device" if fault == "another" else "sha256"] = 1
        known.write_text(json.dumps(data))
        if fault == "a directory":
            known.unlink()
            known.mkdir()
    counted.clear()
    assert weights.content_hash(place) == files.sha256(place)
    assert counted == [place]
