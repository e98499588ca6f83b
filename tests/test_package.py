"""What is shipped: one version, an sdist of the whole repository, a wheel of both packages."""

import importlib.util
import os
import subprocess
import sys
import tarfile
import zipfile
from base64 import urlsafe_b64encode
from hashlib import sha256
from pathlib import Path
from unittest import mock

import pytest
from packaging.version import Version

import elva
import elva_kernels

ROOT = Path(__file__).parent.parent
MADE = ("PKG-INFO", "setup.cfg", "elva.egg-info/")


def test_both_packages_have_one_version():
    assert elva.__version__ == elva_kernels.__version__ == str(Version(elva.__version__))


def test_asking_for_the_version_is_light(tmp_path):
    script = "import sys; from elva.cli import app; app(['--version'], standalone_mode=False);"
    script += "print(*sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"elva {elva.__version__}\n\n"


@pytest.fixture(scope="module")
def tracked():
    found = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        pytest.skip("no git repository around these tests")
    names = found.stdout.split("\0")[:-1]
    return {name for name in names if (ROOT / name).exists()}


@pytest.fixture(scope="module")
def built(tracked, tmp_path_factory):
    """What is built without a compiler of a tree of what git tracks, with caches beside it."""
    pytest.importorskip("setuptools", minversion="77", reason="setuptools >= 77 builds the package")
    pytest.importorskip("pybind11")
    tree, dist = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for name in tracked:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes((ROOT / name).read_bytes())
    for name in ("elva/__pycache__/run.cpython-311.pyc", "elva_kernels/_C.cpython-311.so", "x.so"):
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).write_bytes(b"")
    for what, source in (("sdist", tree), ("wheel", dist / f"elva-{elva.__version__}")):
        script = f"from setuptools.build_meta import *; build_{what}({str(dist)!r})"
        done = subprocess.run(
            [sys.executable, "-c", script],
            cwd=source,
            env=os.environ | {"PATH": "/nonexistent", "CXX": "", "CUDA_HOME": "", "PYTHONPATH": ""},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        if what == "sdist":
            (made,) = dist.glob("*.tar.gz")
            with tarfile.open(made) as archive:
                archive.extractall(dist, filter="data")
    return dist


def test_the_sdist_is_the_repository(built, tracked):
    top = built / f"elva-{elva.__version__}"
    found = {p.relative_to(top).as_posix() for p in top.rglob("*") if p.is_file()}
    found = {name for name in found if not name.startswith((*MADE, "build/"))}
    assert found == tracked - {".gitignore"}


def test_a_wheel_gets_an_sbom_that_is_valid(built, tmp_path):
    """Of what its metadata asks for; RECORD holds it, and no other file is added."""
    pytest.importorskip("spdx_tools", reason="no spdx-tools: pip install spdx-tools")
    from spdx_tools.spdx.parser.parse_anything import parse_file
    from spdx_tools.spdx.validation.document_validator import validate_full_spdx_document

    (wheel,) = built.glob("*.whl")
    copy = tmp_path / wheel.name
    copy.write_bytes(wheel.read_bytes())
    done = subprocess.run(
        [sys.executable, str(ROOT / ".ci" / "sbom.py"), str(copy)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    info = f"elva-{elva.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as before, zipfile.ZipFile(copy) as after:
        place = f"{info}/sboms/elva.spdx.json"
        assert set(after.namelist()) - set(before.namelist()) == {place}
        listed = after.read(f"{info}/RECORD").decode().splitlines()
        digest = urlsafe_b64encode(sha256(after.read(place)).digest()).decode().rstrip("=")
        assert listed[-1] == f"{place},sha256={digest},{after.getinfo(place).file_size}"
        assert listed[:-1] == before.read(f"{info}/RECORD").decode().splitlines()
        (tmp_path / "elva.spdx.json").write_bytes(after.read(place))
        asked = after.read(f"{info}/METADATA").decode().count("\nRequires-Dist: ")
    made = parse_file(str(tmp_path / "elva.spdx.json"))
    assert made.creation_info.spdx_version == "SPDX-2.3"
    assert validate_full_spdx_document(made) == []
    names = {package.name for package in made.packages}
    assert {"elva", "torch", "numpy", "jinja2", "gradio"} <= names and 30 < len(names) <= asked
    needed = [x for x in made.relationships if x.relationship_type.name == "DEPENDS_ON"]
    assert {"SPDXRef-torch", "SPDXRef-typer"} <= {x.related_spdx_element_id for x in needed}
    assert "SPDXRef-gradio" not in {x.related_spdx_element_id for x in needed}
    made.packages[0].name = ""
    made.creation_info.spdx_version = "SPDX-9"
    assert validate_full_spdx_document(made)  # it can fail


def load_audit():
    spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci" / "audit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_audit_fails_by_a_known_vulnerability_and_says_where_it_cannot_know(monkeypatch, capsys):
    audit = load_audit()
    bad = {"name": "x", "version": "1", "vulns": [{"id": "PYSEC-1", "fix_versions": ["2"]}]}
    fine = {"name": "y", "version": "1", "vulns": []}
    monkeypatch.setattr(sys, "argv", ["audit.py", "site-packages"])
    for answers, code, said in (
        ([([bad], ""), ([fine, bad], "")], 1, "x 1: PYSEC-1, fixed in 2\naudit: 1 known"),
        ([([bad], ""), ([fine], "")], 0, "audit: 0 known vulnerabilities of 1 packages"),
        ([([bad], ""), ([], "no answer in 240 s")], 0, "audit: not done, no answer in 240 s"),
        ([([], "no route to host")], 0, "advisories cannot be had: no route to host"),
        ([([fine], "")], 0, "advisories cannot be had: it knows none of pyyaml==5.3"),
    ):
        monkeypatch.setattr(audit, "audited", mock.Mock(side_effect=answers))
        assert audit.main() == code
        assert said in capsys.readouterr().out


def test_a_wheel_of_the_sdist_holds_both_packages_whole(built, tracked):
    """Their modules and every file beside them, under the licence; _C alone needs a compiler."""
    (wheel,) = built.glob("*.whl")
    found = set(zipfile.ZipFile(wheel).namelist())
    info = f"elva-{elva.__version__}.dist-info/"
    inside = {name for name in found if not name.startswith(info) and not name.endswith("/")}
    assert inside == {name for name in tracked if name.startswith(("elva/", "elva_kernels/"))}
    assert f"{info}licenses/LICENSE" in found
    (metadata,) = (name for name in found if name == f"{info}METADATA")
    text = zipfile.ZipFile(wheel).read(metadata).decode()
    assert f"\nVersion: {elva.__version__}\n" in text and "\nRequires-Dist: torch>=2.9\n" in text
