"""The parts of a run, in the order in which they begin as soon as they may."""

import importlib.util
import shutil
import sys
from dataclasses import dataclass, replace

from benchmarks.gpu.schedule import Part

# Checks by the module that holds them (`prove_*`), and those of every op by what is done around it.
CHECKS = {
    "reward": ("values", "relevance", "layouts", "odd rows", "many groups", "clusters", "banks"),
    "in-batch": ("values", "positives", "wrt", "ties", "names", "repeats"),
    "topk": ("values", "order", "copies", "repeats", "codes"),
}
CHECKS["reward"] += ("names", "repeats", "offsets")
SUBJECTS = ("reward", "statistics", "info_nce", "in-batch reward", "topk")
AROUND = ("autocast", "switches", "streams")
FIGURES = ("reward", "topk", "in_batch", "reward_paths", "host")
FAMILIES = ("reward", "in_batch", "topk")
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
RIVALS = {  # by their module: who, and the group of cases that they take
    "liger_kernel": ("liger-kernel", "in_batch"),
    "cut_cross_entropy": ("cut-cross-entropy", "in_batch"),
    "faiss": ("FAISS knn_gpu fp16", "topk"),
    "cuvs": ("cuVS brute force fp16", "topk"),
    "quack": ("quack-kernels", "in_batch"),
    "inf_cl": ("inf-cl", "in_batch"),
}
NO_GPU = "it needs a GPU"
DTYPES = {
    "cuda": ("bfloat16", "float16", "float32"),
    "triton": ("bfloat16", "float16", "float32", "float64"),
    "cpu": ("bfloat16", "float16", "float32", "float64"),
}


@dataclass(frozen=True)
class Asked:
    """What of all this a run is to do."""

    directory: str
    backends: tuple[str, ...]
    dtypes: tuple[str, ...]
    seconds: float  # a case
    dry: bool

    def module(self, name: str, part: str, *words: str) -> tuple[str, ...]:
        """The command of a part; `words` behind the folder and its name."""
        return (sys.executable, "-m", f"benchmarks.gpu.{name}", self.directory, part, *words)

    def tool(self, what: str, part: str, *words: str) -> tuple[str, ...]:
        command = (sys.executable, "-m", "benchmarks.gpu.tools", what, self.directory, part)
        return (*command, *words)

    def dtypes_of(self, backend: str) -> list[str]:
        return [x for x in DTYPES[backend] if not self.dtypes or x in self.dtypes]


def all_parts(asked: Asked) -> list[Part]:
    """Of a run on a GPU, or of one that tries all but its launches on the CPU."""
    parts = [Part("facts", asked.tool("facts", "facts"), limit=40)]
    if asked.dry:
        further = (build(asked), example(asked), *rivals(asked), *looks(asked), *compiled(asked))
        parts += [*proofs(asked, "cpu"), *figures(asked, "cpu")]
        return parts + [replace(x, reason=NO_GPU) for x in further]
    if "cuda" in asked.backends:
        parts += [build(asked), *proofs(asked, "cuda"), example(asked), *figures(asked, "cuda")]
        parts += [*rivals(asked), *looks(asked)]
    if "triton" in asked.backends:
        parts += [*proofs(asked, "triton"), *figures(asked, "triton")]
    return [*parts, *compiled(asked)]


def build(asked: Asked) -> Part:
    return Part("build", asked.tool("build", "build"), 240, 240, reason=no_program("nvcc"))


def example(asked: Asked) -> Part:
    """Of a CUDA graph, behind those whose verdicts it finds."""
    needs = ("build", *(x.name for x in proofs(asked, "cuda") if x.name.endswith("graphs")))
    return Part("example", asked.tool("example", "example"), 120, 120, needs=needs)


def no_program(name: str) -> str | None:
    return None if shutil.which(name) else f"no {name} here"


def proofs(asked: Asked, backend: str) -> list[Part]:
    """CUDA's: a process a dtype and module. Triton's: a process a dtype and check, whose
    compilations then run side by side. The CPU's: a process a module."""
    dry = ("--dry-run",) if asked.dry else ()
    needs = ("build",) if backend == "cuda" else ()
    patient = backend == "triton"
    limit, silence = (200.0, 200.0) if patient else (120.0, 75.0)
    groups = {x: [f"{x} {name}" for name in names] for x, names in CHECKS.items()}
    if patient:
        groups = {x.replace(" ", "-"): [x] for found in groups.values() for x in found}
    around = {name: [f"{x} {name}" for x in SUBJECTS] for name in AROUND}
    groups |= around if patient else {"around": [x for found in around.values() for x in found]}
    groups |= {} if patient else {"selftest": [f"{x} selftest" for x in SUBJECTS]}
    parts = []
    every = asked.dtypes_of(backend)
    for dtypes in [",".join(every)] if asked.dry else every:
        end = "" if asked.dry else f"-{dtypes}"
        for kind, checks in groups.items():
            if kind == "reward-offsets" and dtypes != "bfloat16":
                continue  # gigabytes each, side by side
            name = f"prove-{backend}-{kind}{end}"
            command = asked.module("prove", name, backend, dtypes, *checks, *dry)
            parts.append(Part(name, command, limit, silence, patient=patient, needs=needs))
    if "bfloat16" in every and not patient:
        first = parts[-1 if asked.dry else len(groups) - 1].name  # whose verdicts are kept
        name, checks = f"prove-{backend}-graphs", [f"{x} graphs" for x in SUBJECTS]
        command = asked.module("prove", name, backend, "bfloat16", *checks, *dry)
        parts.append(Part(name, command, limit, silence, needs=(*needs, first)))
    return parts


def figures(asked: Asked, backend: str) -> list[Part]:
    """Alone on the device, behind the backend's proofs: Triton's, behind those of the figures'
    dtype, for the others take minutes, and behind CUDA's sanitizers."""
    needs = [x.name for x in proofs(asked, backend) if backend != "triton" or "bfloat" in x.name]
    needs += [x.name for x in sanitizers(asked)] if backend == "triton" else []
    dry = ("--dry-run",) if asked.dry else ()
    parts = []
    for group in [FIGURES] if asked.dry else [(x,) for x in FIGURES]:
        name = f"figures-{backend}" + ("" if asked.dry else f"-{group[0]}")
        words = (backend, *group, "--seconds", str(asked.seconds), *dry)
        command = asked.module("measure", name, *words)
        silence = 75 if backend == "triton" else 40  # it may compile
        parts.append(Part(name, command, 75, silence, alone=True, needs=tuple(needs)))
    return parts


def rivals(asked: Asked) -> list[Part]:
    """Each in its own process, behind our figures: a crash of one is not ours."""
    needs = tuple(x.name for x in figures(asked, "cuda"))
    parts = []
    for module, (who, group) in RIVALS.items():
        name = f"rival-{module}"
        words = ("cuda", group, "--who", who, "--seconds", str(asked.seconds))
        absent = None if importlib.util.find_spec(module) else "not installed"
        part = Part(name, asked.module("measure", name, *words), 45, 45, alone=True, foreign=True)
        parts.append(replace(part, needs=needs, reason=absent))
    return parts


def sanitizers(asked: Asked) -> list[Part]:
    """Side by side, behind our figures and the rivals'."""
    needs = tuple(x.name for x in (*figures(asked, "cuda"), *rivals(asked)))
    absent, parts = no_program("compute-sanitizer"), []
    for tool in SANITIZERS:
        for family in FAMILIES:
            name = f"sanitize-{tool}-{family}"
            command = asked.tool("sanitize", name, "--tool", tool, "--family", family)
            part = Part(name, command, 50, 50, foreign=True, needs=needs, reason=absent)
            parts.append(part)
    return parts


def looks(asked: Asked) -> list[Part]:
    """Into CUDA's kernels: by sanitizers, then by ncu, alone."""
    parts = sanitizers(asked)
    needs, absent = tuple(x.name for x in parts), no_program("ncu")
    for family in FAMILIES:
        name = f"ncu-{family}"
        command = asked.tool("ncu", name, "--family", family)
        part = Part(name, command, 45, 45, alone=True, foreign=True, needs=needs, reason=absent)
        parts.append(part)
    return parts


def compiled(asked: Asked) -> list[Part]:
    """torch.compile's figures: minutes of compiling, so behind everything."""
    needs = tuple(x.name for x in (*figures(asked, "cuda"), *figures(asked, "triton")))
    parts = []
    for group in ("in_batch", "reward"):
        words = ("cuda", group, "--who", "torch compile", "--seconds", str(asked.seconds))
        command = asked.module("measure", f"compiled-{group}", *words)
        part = Part(f"compiled-{group}", command, 90, 90, alone=True, foreign=True, needs=needs)
        parts.append(part)
    return parts


def chosen(parts: list[Part], only: list[str]) -> list[Part]:
    """Those whose name is one of `only`, or begins with it and a hyphen.

    Raises:
        ValueError: a name of `only` that chooses none.
    """
    for name in only:
        if not any(x.name == name or x.name.startswith(f"{name}-") for x in parts):
            known = ", ".join(dict.fromkeys(x.name.split("-")[0] for x in parts))
            raise ValueError(f"--only must name parts ({known}, or one in full), got {name!r}")
    return [
        x for x in parts if not only or any(x.name == y or x.name.startswith(f"{y}-") for y in only)
    ]
