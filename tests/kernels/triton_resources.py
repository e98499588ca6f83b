"""Triton kernels compiled ahead of time, and what each takes: registers, spills, shared memory.

Needs no GPU and no driver. `python -m tests.kernels.triton_resources` rewrites the committed table
(triton_resources.json), which `test_triton_compile` holds the kernels to.
"""

import importlib
import inspect
import json
import re
import subprocess
import tempfile
from pathlib import Path

import torch

TABLE = Path(__file__).parent / "triton_resources.json"
# Target -> Triton's name for it, and the architecture whose block sizes it takes.
TARGETS = {
    "sm_80": (("cuda", 80, 32), "sm_80"),
    "sm_90": (("cuda", 90, 32), "sm_90"),
    "sm_100": (("cuda", 100, 32), "sm_90"),
    "sm_120": (("cuda", 120, 32), "sm_90"),
    "gfx90a": (("hip", "gfx90a", 64), "hip"),
    "gfx942": (("hip", "gfx942", 64), "hip"),
}
NAMES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}
# Arguments in the reward's dtype, in float64 whatever the inputs are, and scalars.
VALUES = {"reward", "margin_reward", "rank_reward", "live_scores", "upstream"}
EXACT = {"scratch", "saved", "slopes"}
WEIGHTS = {"margin", "rank_penalty", "w_margin", "w_rank", "coldness"}

# (kernel, dtype, what it leaves out, soft ranks). Each is compiled aligned and not.
VARIANTS = {
    "forward-bf16": ("reward", torch.bfloat16, ("upstream", "mask", "saved", "grads"), False),
    "saved-fp16-masked": ("reward", torch.float16, ("upstream", "grads"), False),
    "value_and_grad-bf16": ("reward", torch.bfloat16, ("mask",), False),
    "value_and_grad-fp32": ("reward", torch.float32, ("mask", "upstream"), False),
    "value_and_grad-bf16-soft": ("reward", torch.bfloat16, (), True),
    "value_and_grad-fp64": ("reward", torch.float64, (), False),
    "backward-bf16": ("gradient", torch.bfloat16, ("mask",), False),
    "backward-fp32-masked": ("gradient", torch.float32, (), False),
    "scores-bf16": ("scores", torch.bfloat16, (), False),
    "scores-fp32-soft": ("scores", torch.float32, ("mask",), True),
    "scores_gradient-fp32": ("scores_gradient", torch.float32, (), False),
    "scores_gradient-bf16-soft": ("scores_gradient", torch.bfloat16, ("mask",), True),
}
DIM = 1536
LEFT_OUT = {
    "saved": ("scratch", "saved"),
    "grads": ("grad_query", "grad_positive", "grad_negatives"),
}


def compile_variant(name, aligned, target):
    """The compiled kernel: `asm`, `metadata`."""
    import triton  # here, for these modules need it and a test file that lists variants does not
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from elva_kernels.triton_kernels import launch, reward, scores

    family, dtype, left_out, soft = VARIANTS[name]
    module = scores if family.startswith("scores") else reward
    kernel = getattr(module, f"{family}_kernel")
    gpu, architecture = TARGETS[target]
    sizes = launch.blocks(architecture, DIM, dtype)
    if module is scores:
        sizes = launch.rank_blocks(architecture)
    constants = {"SOFT": soft, "SAME": aligned, "ROWS": sizes.rows, "RANKS": launch._RANKS}
    constants |= {"BLOCK": sizes.columns, "SPAN": launch._SPAN * sizes.columns}
    absent = {x for name in left_out for x in LEFT_OUT.get(name, (name,))}
    source = ASTSource(kernel, *_specialise(kernel, dtype, aligned, absent, constants))
    return triton.compile(source, target=GPUTarget(*gpu), options=sizes.options())


def _specialise(kernel, dtype, aligned, absent, constants):
    """Signature, constants and attributes, as a call with such arguments would have them."""
    value = "fp64" if dtype == torch.float64 else "fp32"
    signature, fixed, attributes = {}, {}, {}
    for at, name in enumerate(inspect.signature(kernel.fn).parameters):
        if name in absent or name in constants:
            signature[name], fixed[(at,)] = "constexpr", constants.get(name)
        elif name.endswith("_strides"):
            # lead strides, the last dimension's, the row's; the last is 1 in aligned tensors
            signature[name] = ("i64", "i64", "constexpr" if aligned else "i64", "i64")
            if aligned:
                fixed[(at, 2)] = 1
                attributes |= {(at, i): [["tt.divisibility", 16]] for i in (0, 1, 3)}
        elif name in WEIGHTS:
            signature[name] = "fp64"
        elif name in ("candidates", "dim", "inner"):
            signature[name] = "i32"
            if aligned and name == "dim":
                attributes[(at,)] = [["tt.divisibility", 16]]
        else:
            kind = {"mask": "i1", "rank": "i32"}.get(name, NAMES[dtype])
            if name in EXACT:
                kind = "fp64"
            elif name in VALUES or (name == "scores" and kernel.__name__ == "reward_kernel"):
                kind = value
            signature[name] = f"*{kind}"
            if aligned:
                attributes[(at,)] = [["tt.divisibility", 16]]
    return signature, fixed, attributes


def resources(compiled, target):
    """Registers a thread, bytes a thread spilled to memory, bytes of shared memory a program."""
    if TARGETS[target][1] == "hip":
        text = compiled.asm["amdgcn"]
        registers, spills = (
            int(re.search(rf"\.{key}:\s+(\d+)", text)[1])
            for key in ("vgpr_count", "private_segment_fixed_size")
        )
    else:
        tool = Path(importlib.import_module("triton").__file__).parent
        tool = tool / "backends" / "nvidia" / "bin" / "cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            arguments = [tool, "--dump-resource-usage", file.name]
            done = subprocess.run(arguments, capture_output=True, text=True, check=True)
        found = {key: int(x) for key, x in re.findall(r"(REG|STACK|LOCAL):(\d+)", done.stdout)}
        registers, spills = found["REG"], found["STACK"] + found["LOCAL"]
    shared = compiled.metadata.shared
    return {"registers": registers, "spilled_bytes": spills, "shared_bytes": shared}


def variant_names():
    """(variant, aligned, its name in the table)."""
    for name in VARIANTS:
        for aligned in (True, False):
            yield name, aligned, f"{name}-{'aligned' if aligned else 'unaligned'}"


def main():
    """Compile everything, some minutes, and write the table."""
    table = {"triton": importlib.import_module("triton").__version__}
    for target in TARGETS:
        table[target] = {
            row: resources(compile_variant(name, aligned, target), target)
            for name, aligned, row in variant_names()
        }
    text = json.dumps(table, indent=1)
    TABLE.write_text(re.sub(r"{\s+(\"registers[^}]*?)\s+}", _one_line, text) + "\n")


def _one_line(found):
    return "{" + re.sub(r"\s+", " ", found[1]) + "}"


if __name__ == "__main__":
    main()
