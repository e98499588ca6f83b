"""elva_kernels as a kernel of Hugging Face's `kernels`: `python -m elva.integrations.kernels_hub`.

The Python of the package, thus its reference and its Triton kernels, which `kernels` loads by a
path under a name of its own. What is compiled stays behind.
"""

import argparse
import ast
import hashlib
import json
import sys
from base64 import b64encode
from pathlib import Path
from typing import Any

import elva_kernels
from elva.errors import UserError, printable
from elva.files import write_directory

NAME, VERSION = "elva-kernels", 1
OLDEST = "0.17.0"  # of `kernels`, with which this was tried
BACKENDS = ("cpu", "cuda", "rocm")
"""Those that torch may be built for; each has a variant. On a CPU the reference computes."""

CARD = """---
library_name: kernels
license: apache-2.0
tags: [kernels, retrieval]
---
# elva-kernels

Ranking rewards, InfoNCE and search over retrieval embeddings, differentiable, in Triton for NVIDIA
GPUs from sm_80 on and AMD's gfx90a and gfx942, and in plain torch elsewhere.

```python
from pathlib import Path

import torch
from kernels import get_local_kernel

elva_kernels = get_local_kernel(Path("elva-kernels"))  # this directory
query, candidates = torch.randn(2, 64, 256).unbind()
loss = elva_kernels.info_nce(query, candidates, temperature=0.05)
```

`help(elva_kernels)` lists the functions; `elva_kernels.doctor()` says what runs here.
"""


def relative_imports(source: str, depth: int) -> str:
    """The source of a module of elva_kernels, which imports the package by its place.

    Args:
        depth: parts of the file's path below the package: 1 for `topk.py`, 2 for `a/b.py`.

    Raises:
        ValueError: an import that has no relative form.
    """
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            if any(alias.name.split(".")[0] == "elva_kernels" for alias in node.names):
                raise ValueError(f"line {node.lineno}: it must be a from-import")
        elif isinstance(node, ast.ImportFrom) and not node.level:
            package, _, inner = str(node.module).partition(".")
            if package == "elva_kernels":
                line, at = lines[node.lineno - 1], node.col_offset
                old = f"from {node.module} import"
                if not line[at:].startswith(old):
                    raise ValueError(f"line {node.lineno}: it must begin with `{old}`")
                new = f"from {'.' * depth}{inner} import"
                lines[node.lineno - 1] = line[:at] + new + line[at + len(old) :]
    return "".join(lines)


def export(output: Path) -> Path:
    """A directory that `kernels.get_local_kernel` loads, without elva or elva_kernels installed.

    `build/torch-<backend>/` holds the package and its `metadata.json`, whose id, of the files'
    SHA-256, is the name under which it is loaded and the namespace of its torch ops: any number of
    versions, and an installed elva_kernels, live in one process.

    Args:
        output: the directory, which must not exist yet.

    Raises:
        UserError: something is in the output's place.

    Example::

        >>> from kernels import get_local_kernel
        >>> loaded = get_local_kernel(export(Path("elva-kernels")))
        >>> loaded.info_nce(query, candidates)
    """
    if output.exists():
        raise UserError(f"kernels_hub: OUTPUT must not exist yet, got {output}; choose another")
    package = Path(elva_kernels.__file__).parent
    files = {}
    for path in sorted(package.rglob("*.py")):
        place = path.relative_to(package)
        source = relative_imports(path.read_text(encoding="utf-8"), len(place.parts))
        files[place.as_posix()] = source.encode()

    def fill(partial: Path) -> None:
        (partial / "README.md").write_text(CARD, encoding="utf-8")
        for backend in BACKENDS:
            variant = partial / "build" / f"torch-{backend}"
            for place, source in files.items():
                (variant / place).parent.mkdir(parents=True, exist_ok=True)
                (variant / place).write_bytes(source)
            text = json.dumps(metadata(backend, files), indent=2) + "\n"
            (variant / "metadata.json").write_text(text)

    write_directory(output, fill)
    return output


def metadata(backend: str, files: dict[str, bytes]) -> dict[str, Any]:
    """What `metadata.json` of a variant holds: of its files the id and the digest."""
    hashes = {place: hashlib.sha256(source).digest() for place, source in files.items()}
    whole = hashlib.sha256(b"".join(hashes.values())).hexdigest()[:8]
    return {
        "name": NAME,
        "id": f"_{NAME.replace('-', '_')}_{backend}_{whole}",
        "version": VERSION,
        "kernels-minver": OLDEST,
        "license": "apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {
            "algorithm": "sha256",
            "files": {place: b64encode(x).decode() for place, x in hashes.items()},
        },
    }


def main() -> None:
    """Write the directory that the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m elva.integrations.kernels_hub",
        description="Write elva_kernels as a kernel that Hugging Face's `kernels` loads.",
        epilog="Example: python -m elva.integrations.kernels_hub elva-kernels",
    )
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="Directory to be made.")
    try:
        output = export(parser.parse_args().output)
    except UserError as error:
        print(f"elva: {printable(str(error))}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        reason = printable(str(error))
        print(
            f"elva: kernels_hub: OUTPUT must be writable, got {reason}; choose another place",
            file=sys.stderr,
        )
        sys.exit(2)
    for path in sorted(output.rglob("metadata.json")):
        print(f"{printable(str(path.parent))}: {json.loads(path.read_text())['id']}")


if __name__ == "__main__":
    main()
