"""Every kernel file of csrc opens with its nine labels, each on a line of its own."""

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
LABELS = (
    "What",
    "Source",
    "In",
    "Out",
    "Work split",
    "Bytes",
    "Numerics",
    "Limits",
    "Reference",
)
WITHIN = 25  # lines
AN_OP = re.compile(r"\bElvaStatus elva_\w+_cpu\(const \w+\* args\) {")

pytestmark = pytest.mark.skipif(not CSRC.is_dir(), reason="no csrc beside these tests")


def kernel_files():
    """CUDA's, those that define an op, and those that are compiled once per CPU level."""
    ops = (x for x in CSRC.rglob("*.cpp") if AN_OP.search(x.read_text()))
    return sorted({*CSRC.rglob("*.cu"), *CSRC.rglob("*_simd.cpp"), *ops})


def header(text):
    """The comment that a file opens with, as (label, text) in its order; label None: the rest."""
    lines = text.splitlines()[:WITHIN]
    comment = lines[: next((i for i, x in enumerate(lines) if not x.startswith("//")), WITHIN)]
    for line in comment:
        found = re.match(r"// ([A-Z][a-z ]+): (\S.*)", line)
        yield (found[1], found[2]) if found else (None, line)


def melted(line):
    """The labels that stand in the middle of a line."""
    return [x for x in LABELS if re.search(rf"(?<=\S)\s+{x}: ", line.removeprefix("// "))]


@pytest.mark.parametrize("path", kernel_files(), ids=lambda x: str(x.relative_to(CSRC)))
def test_kernel_file_opens_with_its_labels(path):
    found = list(header(path.read_text()))
    assert tuple(label for label, _ in found if label) == LABELS
    for label, text in found:
        assert label or text.startswith("//   "), f"{text!r} continues no label"
        assert melted(text) == [], text


def test_kernel_files_are_found_in_every_folder():
    names = {str(x.relative_to(CSRC)) for x in kernel_files()}
    assert names >= {
        f"cpu/{x}{y}.cpp" for x in ("reward", "topk", "in_batch") for y in ("", "_simd")
    }
    assert "cuda/topk.cu" in names


@pytest.mark.parametrize(
    "wrong",
    [
        "// What: a. Source: b.\n",
        "// What: a.\n// goes on.\n",
        "// Source: b.\n// What: a.\n",
        "",
    ],
)
def test_a_melted_header_is_found(wrong, tmp_path):
    path = tmp_path / "op.cpp"
    rest = "".join(f"// {x}: y.\n" for x in LABELS if f"{x}:" not in wrong)
    path.write_text(wrong + rest)
    if wrong:
        with pytest.raises(AssertionError):
            test_kernel_file_opens_with_its_labels(path)
    else:
        test_kernel_file_opens_with_its_labels(path)
