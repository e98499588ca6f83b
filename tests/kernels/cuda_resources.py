"""What each CUDA kernel of the compiled module takes, for each architecture it was built for.

Needs no GPU: nvcc's figures are in the module. `python -m tests.kernels.cuda_resources` rewrites
the committed table (cuda_resources.json), which `test_cuda_resources` holds the kernels to.
"""

import importlib
import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path

TABLE = Path(__file__).parent / "cuda_resources.json"
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100", "sm_120")


def cuobjdump():
    """CUDA's own, or the one that triton brings; None where there is neither."""
    found = shutil.which("cuobjdump")
    if found is None and importlib.util.find_spec("triton") is not None:
        tool = Path(importlib.import_module("triton").__file__).parent
        found = str(tool / "backends" / "nvidia" / "bin" / "cuobjdump")
    return found


def resources(module):
    """Architecture -> kernel -> registers a thread and bytes spilled, of a compiled module."""
    done = subprocess.run(
        [cuobjdump(), "--dump-resource-usage", module], capture_output=True, text=True, check=True
    )
    table = {name: {} for name in ARCHITECTURES}
    architecture = name = None
    for line in done.stdout.splitlines():
        if found := re.match(r"arch = (\w+)", line):
            architecture = found[1]
        elif found := re.match(r"\s*Function (\w+):", line):
            name = kernel_name(found[1])
        elif name is not None and (found := dict(re.findall(r"([A-Z]+):(\d+)", line))):
            taken = {
                "registers": int(found["REG"]),
                "spilled_bytes": int(found["STACK"]) + int(found["LOCAL"]),
            }
            table[architecture][name] = taken
            name = None
    return {key: dict(sorted(rows.items())) for key, rows in table.items()}


def kernel_name(mangled):
    """As `reward_forward<Bf16>`: without namespaces and arguments."""
    inner = mangled.removeprefix("_ZN")
    while found := re.match(r"(\d+)", inner):
        end = found.end() + int(found[1])
        name, inner = inner[found.end() : end], inner[end:]
    types = {"Bf16": "Bf16" in inner, "Fp16": "Fp16" in inner}
    element = next((key for key, there in types.items() if there), "float")
    numbers = "".join(f", {x}" for x in re.findall(r"L[bi](\d+)E", inner))
    return f"{name}<{element}{numbers}>"


def main():
    module = importlib.import_module("elva_kernels._C").__file__
    text = json.dumps(resources(module), indent=1)
    TABLE.write_text(re.sub(r"{\s+(\"registers[^}]*?)\s+}", one_line, text) + "\n")


def one_line(found):
    return "{" + re.sub(r"\s+", " ", found[1]) + "}"


if __name__ == "__main__":
    main()
