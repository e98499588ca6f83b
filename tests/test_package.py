"""What is shipped: one version, an sdist of the whole repository, a wheel of both packages."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

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
