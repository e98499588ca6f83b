"""elva_kernels as `kernels` loads it: beside nothing, beside itself, and as what it is."""

import ast
import filecmp
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import elva_kernels
from elva.integrations import kernels_hub

HUB = pytest.importorskip("kernels", reason="pip install kernels")

ALONE = """
import json, sys
from pathlib import Path

import torch
from kernels import get_local_kernel

numpy, sys.modules["numpy"] = sys.modules.pop("numpy", None), None  # a kernel has torch alone
loaded = get_local_kernel(Path(sys.argv[1]))
del sys.modules["numpy"]
if numpy is not None:  # Triton's interpreter needs it
    sys.modules["numpy"] = numpy
given = torch.load(sys.argv[2])
found = {}
for backend in ("auto", "reference", "triton"):
    query, candidates, negatives = (x.clone().requires_grad_() for x in given)
    reward = loaded.ranking_reward(query, candidates, negatives, backend=backend).reward
    loss = loaded.info_nce(query, candidates, temperature=0.1, backend=backend)
    (loss - reward.sum()).backward()
    index = loaded.topk(query.detach(), candidates.detach(), 3, backend=backend).index
    gradients = (query.grad, candidates.grad, negatives.grad)
    found[backend] = [loss.detach(), reward.detach(), index, *gradients]
torch.save(found, sys.argv[3])
names = [x for x in sys.modules if x.split(".")[0] in ("elva", "elva_kernels")]
print(json.dumps([loaded.__name__, names, [x for x in dir(torch.ops) if "elva" in x]]))
"""

REDUCED = "        loss = registered.reduced(loss, reduction, target)"

BESIDE = """
import sys
from pathlib import Path

import torch
from kernels import get_local_kernel
import elva_kernels

one, two = (get_local_kernel(Path(x)) for x in sys.argv[1:])
query, candidates = torch.randn(2, 12, 8).unbind()
losses = [x.info_nce(query, candidates, backend="reference") for x in (elva_kernels, one, two)]
assert losses[0] == losses[1] and losses[2] == losses[1] + 1, losses
query.requires_grad_()
compiled = torch.compile(one.info_nce, fullgraph=True, backend="aot_eager")
assert compiled(query, candidates, backend="reference") == losses[1]
print(*sorted(x for x in dir(torch.ops) if "elva" in x))
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kernels_hub.export(tmp_path_factory.mktemp("hub") / "elva-kernels")


def run(program: str, *words: object, path: str | None = None, **environment: str) -> str:
    """What a process prints that finds no source tree but `path`, and asks no hub."""
    kept = {k: x for k, x in os.environ.items() if k != "PYTHONPATH"}
    kept |= {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1", **environment} | (
        {"PYTHONPATH": path} if path else {}
    )
    command = [sys.executable, "-c", program, *map(str, words)]
    done = subprocess.run(command, env=kept, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_computes_alone_what_the_package_does(written: Path, tmp_path: Path) -> None:
    """Without elva, elva_kernels and NumPy; Triton's kernels in its interpreter."""
    pytest.importorskip("triton", reason="Triton is not installed")
    torch.manual_seed(0)
    given = [torch.randn(shape) for shape in ((5, 16), (5, 16), (5, 7, 16))]
    torch.save(given, tmp_path / "given")
    told = run(ALONE, written, tmp_path / "given", tmp_path / "found", TRITON_INTERPRET="1")
    name, others, namespaces = json.loads(told)
    assert others == [] and namespaces == [name] and name.startswith("_elva_kernels_")
    query, candidates, negatives = (x.clone().requires_grad_() for x in given)
    reward = elva_kernels.ranking_reward(query, candidates, negatives, backend="reference").reward
    loss = elva_kernels.info_nce(query, candidates, temperature=0.1, backend="reference")
    (loss - reward.sum()).backward()
    index = elva_kernels.topk(query.detach(), candidates.detach(), 3, backend="reference").index
    right = [loss, reward, index, query.grad, candidates.grad, negatives.grad]
    for backend, found in torch.load(tmp_path / "found").items():
        tolerance = 2e-6 if backend == "triton" else 0
        for a, b in zip(found, right, strict=True):
            torch.testing.assert_close(a, b.detach(), rtol=tolerance, atol=tolerance)


@pytest.mark.thorough
def test_versions_live_beside_each_other_and_the_package(written: Path, tmp_path: Path) -> None:
    """Each under its id, with ops of its own: another file, another id."""
    other = tmp_path / "other"
    with pytest.MonkeyPatch.context() as patch:
        source = Path(elva_kernels.__file__).parent
        changed = tmp_path / "elva_kernels"
        for path in source.rglob("*.py"):
            (changed / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            text = path.read_text(encoding="utf-8")
            if path.name == "info_nce.py":
                assert text.count(REDUCED) == 1
                text = text.replace(REDUCED, f"{REDUCED} + 1")
            (changed / path.relative_to(source)).write_text(text, encoding="utf-8")
        patch.setattr(elva_kernels, "__file__", str(changed / "__init__.py"))
        kernels_hub.export(other)
    told = run(BESIDE, written, other, path=str(source.parent)).split()
    assert told[-1] == "elva_kernels" and len(set(told)) == 3


@pytest.mark.thorough
def test_each_variant_is_what_kernels_asks_for(written: Path, tmp_path: Path) -> None:
    rust = pytest.importorskip("kernels._rust")
    again = kernels_hub.export(tmp_path / "again")
    allowed = {*sys.stdlib_module_names, "torch", "numpy", "triton"}
    for backend in kernels_hub.BACKENDS:
        variant = written / "build" / f"torch-{backend}"
        read = rust.Metadata.read_from_file(variant / "metadata.json")
        assert (str(read.name), read.version, read.license) == ("elva-kernels", 1, "apache-2.0")
        read.digest.validate(rust.Digest.hash_variant(read.digest.algorithm, variant))
        files = [x.relative_to(variant) for x in variant.rglob("*") if x.is_file()]
        _, differ, failed = filecmp.cmpfiles(variant, again / "build" / variant.name, files, False)
        assert len(files) > 50 and not differ and not failed
    for path in variant.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert {x.name.split(".")[0] for x in node.names} <= allowed, path
            elif isinstance(node, ast.ImportFrom) and not node.level:
                assert str(node.module).split(".")[0] in allowed, path


def test_imports_become_relative_by_their_place() -> None:
    source = 'def f():\n    from elva_kernels.a.b import c  # why\n"from elva_kernels import x"\n'
    right = source.replace("elva_kernels.a.b", "..a.b", 1)
    assert kernels_hub.relative_imports(source, 2) == right
    assert kernels_hub.relative_imports("from elva_kernels import a\n", 1) == "from . import a\n"
    assert kernels_hub.relative_imports("import torch\n", 1) == "import torch\n"
    with pytest.raises(ValueError, match="line 2: it must be a from-import"):
        kernels_hub.relative_imports("import torch\nimport elva_kernels.a\n", 1)


def test_the_command_says_what_is_in_its_place(written: Path, capsys, monkeypatch) -> None:
    """Also of a file where a directory would have to be, and of what a system does not give."""
    card = written / "README.md"
    for place, told in (
        (written, f"OUTPUT must not exist yet, got {written}; choose another"),
        (card / "x", f"must be writable, got [Errno 17] File exists: '{card}'; choose another"),
        (Path("/proc/x"), "/proc/x: cannot be made there; choose another place"),
    ):
        monkeypatch.setattr(sys, "argv", ["kernels_hub", str(place)])
        with pytest.raises(SystemExit) as ended:
            kernels_hub.main()
        said = capsys.readouterr().err
        assert ended.value.code == 2 and told in said and said.count("\n") == 1
