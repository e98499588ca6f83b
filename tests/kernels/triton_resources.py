"""Triton kernels compiled ahead of time, and what each takes: registers, spills, shared memory.

Needs no GPU and no driver. `python -m tests.kernels.triton_resources [target ...]` rewrites the
installed Triton's part of the committed table (triton_resources.json: version, target, variant),
which `test_triton_compile` holds the kernels to.
"""

import importlib
import json
import re
import subprocess
import sys
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
VALUES = {"reward", "margin_reward", "rank_reward", "live_scores", "upstream", "relevance"}
EXACT = {"scratch", "saved", "slopes"}
WEIGHTS = {"margin", "rank_penalty", "w_margin", "w_rank", "inverse_temperature"}

# (kernel, dtype, what it leaves out, soft ranks). Each is compiled aligned and not; negatives
# are in a bank, or have a relevance, where the name ends so.
VARIANTS = {
    "forward-bf16": ("reward", torch.bfloat16, ("upstream", "mask", "saved", "grads"), False),
    "saved-fp16-masked": ("reward", torch.float16, ("upstream", "grads"), False),
    "value_and_grad-bf16": ("reward", torch.bfloat16, ("mask",), False),
    "value_and_grad-fp32": ("reward", torch.float32, ("mask", "upstream"), False),
    "value_and_grad-bf16-soft": ("reward", torch.bfloat16, (), True),
    "value_and_grad-fp64": ("reward", torch.float64, (), False),
    "backward-bf16": ("gradient", torch.bfloat16, ("mask",), False),
    "backward-fp32-masked": ("gradient", torch.float32, (), False),
    "saved-bf16-bank": ("reward", torch.bfloat16, ("upstream", "grads"), False),
    "value_and_grad-bf16-bank": ("reward", torch.bfloat16, ("grad_negatives",), False),
    "value_and_grad-fp64-bank": ("reward", torch.float64, ("grad_negatives",), True),
    "backward-bf16-bank": ("gradient", torch.bfloat16, ("grad_negatives",), False),
    "backward-bf16-query": ("gradient", torch.bfloat16, ("mask", "candidate_grads"), False),
    "backward-fp32-negatives": ("gradient", torch.float32, ("grad_query", "grad_positive"), False),
    "scores-bf16": ("scores", torch.bfloat16, (), False),
    "scores-fp32-soft": ("scores", torch.float32, ("mask",), True),
    "scores_gradient-fp32": ("scores_gradient", torch.float32, (), False),
    "scores_gradient-bf16-soft": ("scores_gradient", torch.bfloat16, ("mask",), True),
    "forward-bf16-graded": (
        "reward",
        torch.bfloat16,
        ("upstream", "mask", "saved", "grads"),
        False,
    ),
    "value_and_grad-bf16-graded": ("reward", torch.bfloat16, ("mask",), False),
    "value_and_grad-fp32-soft-graded": ("reward", torch.float32, (), True),
    "value_and_grad-fp64-graded": ("reward", torch.float64, (), False),
    "scores-fp32-soft-graded": ("scores", torch.float32, (), True),
    "scores_gradient-bf16-graded": ("scores_gradient", torch.bfloat16, (), False),
    "scores_gradient-fp32-soft-graded": ("scores_gradient", torch.float32, (), True),
}
# Kernels of the in-batch ops and search: module, kernel, and the types of their arguments ("16":
# divisible by 16 where aligned, "1": then 1), or a constant.
SIZE = dict.fromkeys(("m", "n", "k"), "i32")
PRODUCT = SIZE | {"a_row": "i64 16", "a_step": "i64 1", "b_row": "i64 16", "b_step": "i64 1"}
PRODUCT |= {"c_row": "i64 16"}
SCALES = {"inner": None, "outer_rows": "*fp64", "outer_columns": "*fp64", "ADD": False}
SLOPES = {"inner": "*fp64", "outer_rows": None, "outer_columns": None, "ADD": True}


def in_batch_launchers():
    """Not at import: it needs triton, which a test file that lists variants does not."""
    return importlib.import_module("elva_kernels.backends.triton.in_batch")


def codes_launcher():
    return importlib.import_module("elva_kernels.backends.triton.codes")


def grouped_launch():
    return importlib.import_module("elva_kernels.backends.triton.launch")


def _product(a, b, scales):
    types = {
        "a": f"*{NAMES[a]}",
        "b": f"*{NAMES[b]}",
        "c": "*fp64" if a == torch.float64 else "*fp32",
    }
    constants = in_batch_launchers().product_constants(a, b, scales is SLOPES)
    tile = in_batch_launchers().tile_of(in_batch_launchers().product_operand(a, b))
    return "matrix", "product_kernel", types | PRODUCT | scales | constants | {"tile": tile}


def _rows(dtype, kernel):
    value = "fp64" if dtype == torch.float64 else "fp32"
    types = {"rows": f"*{NAMES[dtype]}", "units": f"*{NAMES[dtype]}", "norms": "*fp64"}
    types |= {"grad_units": f"*{value}", "gradients": f"*{NAMES[dtype]}", "dim": "i32 16"}
    types |= {"row_stride": "i64 16", "step": "i64 1", "SCALED": dtype != torch.float16}
    return "rows", kernel, types | {"dtype": _type(value), "BLOCK": in_batch_launchers().BLOCK}


def _bank(dtype):
    value = "fp64" if dtype == torch.float64 else "fp32"
    types = dict.fromkeys(("query", "bank", "gradients"), f"*{NAMES[dtype]}")
    types |= {"upstream": f"*{value}", "saved": "*fp64", "order": "*i64", "first": "*i64"}
    types |= {"negatives": "i32", "across": "i32", "dim": "i32 16", "upstream_step": "i64 1"}
    types |= dict.fromkeys(("query_stride", "bank_stride"), "i64 16")
    types |= dict.fromkeys(("query_step", "bank_step"), "i64 1")
    return "bank", "bank_gradient_kernel", types | {"dtype": _type(value)}


def _statistics(value, kernel, **left_out):
    lists = ("target", "skipped", "skipped_first", "skipped_last", "hardest_index")
    integers = dict.fromkeys(lists, "*i64") | dict.fromkeys(("positives", "segments"), "i32")
    integers |= dict.fromkeys(("n_greater", "n_equal"), "*i32")
    exact = ("query_norms", "candidate_norms", "row_norms", "total", "moment", "temperature")
    values = ("scores", "target_score", "hardest_score", "peak", "row_peak", "row_factor")
    values += ("target_slope", "column_peak", "column_factor")
    types = integers | dict.fromkeys(exact, "*fp64") | dict.fromkeys(values, f"*{value}")
    types |= {"candidates": "i32", "width": "i32 16", "rows": "i32", "max_score": "fp64"}
    launch = in_batch_launchers()
    block = launch._COLUMNS if kernel == "column_sums_kernel" else launch.BLOCK
    module = "topk" if kernel == "finish_scores_kernel" else "in_batch"
    constants = {"BLOCK": block, "COSINE": True, "ONE": False, "AT_ONCE": launch.AT_ONCE}
    return module, kernel, types | constants | left_out


def batch_variants():
    """Name -> (module, kernel, types)."""
    half, single, double = torch.bfloat16, torch.float32, torch.float64
    found = {
        "product-bf16": _product(half, half, SCALES),
        "product-fp16": _product(torch.float16, torch.float16, SCALES),
        "product-fp32": _product(single, single, SCALES),
        "product-fp64": _product(double, double, SCALES),
        "slopes_product-bf16": _product(single, half, SLOPES),
        "slopes_product-fp16": _product(single, torch.float16, SLOPES),
        "slopes_product-fp32": _product(single, single, SLOPES),
        "slopes_product-fp64": _product(double, double, SLOPES),
    }
    for dtype in (half, torch.float16, single, double):
        found[f"units-{NAMES[dtype]}"] = _rows(dtype, "units_kernel")
        found[f"unit_gradient-{NAMES[dtype]}"] = _rows(dtype, "unit_gradient_kernel")
    for dtype in (half, single, double):
        found[f"bank_gradient-{NAMES[dtype]}"] = _bank(dtype)
    for value in ("fp32", "fp64"):
        found[f"score_rows-{value}"] = _statistics(value, "score_rows_kernel")
        found[f"column_sums-{value}"] = _statistics(value, "column_sums_kernel")
        found[f"slope_rows-{value}"] = _statistics(value, "slope_rows_kernel")
        found[f"finish_scores-{value}"] = _statistics(value, "finish_scores_kernel")
    one = {"skipped": None, "skipped_first": None, "skipped_last": None, "ONE": True}
    found["score_rows-fp32-one"] = _statistics("fp32", "score_rows_kernel", **one)
    found["score_rows-fp32-bare"] = _statistics(
        "fp32", "score_rows_kernel", temperature=None, **one
    )
    found["slope_rows-fp32-one"] = _statistics("fp32", "slope_rows_kernel", ONE=True)
    found["code_bounds-few"] = _codes(codes_launcher().FEW)
    found["code_bounds-many"] = _codes(codes_launcher().MANY)
    found["code_bounds-many-masked"] = _codes(codes_launcher().MANY, masked=True)
    return found


def _codes(tile, masked=False):
    types = dict.fromkeys(("query_code", "query_fine", "code"), "*i8")
    types |= dict.fromkeys(("query_scale", "query_lost", "scale", "lost", "bounds"), "*fp32")
    types |= {"mask": "*i1" if masked else None, "queries": "i32", "rows": "i32", "dim": "i32 16"}
    return "codes", "code_bounds_kernel", types | {"tile": tile}


def _type(name):
    return getattr(importlib.import_module("triton.language"), f"float{name[2:]}")


def _compile_batch(name, aligned, target):
    import triton  # here, for these modules need it and a test file that lists variants does not
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, kernel, types = batch_variants()[name]
    options = in_batch_launchers().options(TARGETS[target][1], types.get("tile"))
    if module == "bank":
        sizes = grouped_launch().bank_blocks(TARGETS[target][1])
        types |= {"ROWS": sizes.rows, "BLOCK": sizes.columns}
        options = sizes.options()
    if module == "codes":
        tile = types["tile"] if aligned else codes_launcher().ODD
        types |= codes_launcher().constants_of(tile)
        options = codes_launcher().options_of(TARGETS[target][1], tile)
    kernel = getattr(
        importlib.import_module(f"elva_kernels.backends.triton.kernels.{module}"), kernel
    )
    signature, fixed, attributes = {}, {}, {}
    for at, argument in enumerate(kernel.params):
        given = types[argument.name]
        kind, _, note = given.partition(" ") if isinstance(given, str) else ("", "", "")
        one = note == "1" and aligned and not argument.do_not_specialize
        if not kind or one:
            signature[argument.name] = "constexpr"
            fixed[(at,)] = 1 if kind else given
            continue
        signature[argument.name] = kind
        if aligned and (note == "16" or kind.startswith("*")) and _is_aligned(argument):
            attributes[(at,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, fixed, attributes)
    return triton.compile(source, target=GPUTarget(*TARGETS[target][0]), options=options)


DIM = 1536
LEFT_OUT = {
    "saved": ("scratch", "saved"),
    "grads": ("grad_query", "grad_positive", "grad_negatives"),
    "candidate_grads": ("grad_positive", "grad_negatives"),
}


def compile_variant(name, aligned, target):
    """The compiled kernel: `asm`, `metadata`."""
    import triton  # here, for these modules need it and a test file that lists variants does not
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from elva_kernels.backends.triton import launch
    from elva_kernels.backends.triton.kernels import from_scores, reward

    if name not in VARIANTS:
        return _compile_batch(name, aligned, target)
    family, dtype, left_out, soft = VARIANTS[name]
    module = from_scores if family.startswith("scores") else reward
    kernel = getattr(module, f"{family}_kernel")
    gpu, architecture = TARGETS[target]
    sizes = launch.blocks(architecture, DIM, dtype, lean=aligned and not soft)
    if module is from_scores:
        sizes = launch.rank_blocks(architecture)
    constants = {"SOFT": soft, "WIDE": aligned, "ROWS": sizes.rows, "RANKS": launch.RANKS}
    constants |= {"BLOCK": sizes.columns, "SPAN": launch.SPAN * sizes.columns}
    absent = {x for part in left_out for x in LEFT_OUT.get(part, (part,))}
    masks = "i64" if name.endswith("-bank") else "i1"
    if masks == "i1":
        absent.add("bank_rows")
    if not name.endswith("-graded"):
        absent.add("relevance")
    source = ASTSource(kernel, *_specialise(kernel, dtype, aligned, absent, constants, masks))
    return triton.compile(source, target=GPUTarget(*gpu), options=sizes.options())


def _is_aligned(argument):
    """Whether a call with an aligned tensor or size is compiled for it."""
    return not (argument.do_not_specialize or argument.do_not_specialize_on_alignment)


def _specialise(kernel, dtype, aligned, absent, constants, masks):
    """Signature, constants and attributes, as a call with such arguments would have them."""
    value = "fp64" if dtype == torch.float64 else "fp32"
    signature, fixed, attributes = {}, {}, {}
    for at, argument in enumerate(kernel.params):
        name = argument.name
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
        elif name.endswith(("_outer", "_inner", "_step")):
            signature[name] = "i64"
        elif name in ("candidates", "dim", "bank_rows", "inner"):
            signature[name] = "i32"
            if aligned and _is_aligned(argument):
                attributes[(at,)] = [["tt.divisibility", 16]]
        else:
            kind = {"mask": masks, "rank": "i32"}.get(name, NAMES[dtype])
            if name in EXACT:
                kind = "fp64"
            elif name in VALUES or (name == "scores" and kernel.__name__ == "reward_kernel"):
                kind = value
            signature[name] = f"*{kind}"
            if aligned and _is_aligned(argument):
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
    for name in (*VARIANTS, *batch_variants()):
        for aligned in (True, False):
            yield name, aligned, f"{name}-{'aligned' if aligned else 'unaligned'}"


def main(targets):
    """Compile everything, minutes a target, and write the installed Triton's part of the table."""
    table, version = json.loads(TABLE.read_text()), importlib.import_module("triton").__version__
    part = table.setdefault(version, {})
    for target in targets or TARGETS:
        part[target] = {
            row: resources(compile_variant(name, aligned, target), target)
            for name, aligned, row in variant_names()
        }
    table[version] = {target: part[target] for target in TARGETS if target in part}
    text = json.dumps(dict(sorted(table.items())), indent=1)
    TABLE.write_text(re.sub(r"{\s+(\"registers[^}]*?)\s+}", _one_line, text) + "\n")


def _one_line(found):
    return "{" + re.sub(r"\s+", " ", found[1]) + "}"


if __name__ == "__main__":
    main(sys.argv[1:])
