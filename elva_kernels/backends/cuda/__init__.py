"""The CUDA backend: kernels of `elva_kernels._C` for NVIDIA GPUs, where it was built with them.

They run on the tensors' device and its current stream, in bfloat16, float16 and float32.
"""

from __future__ import annotations

import torch

from elva_kernels.backends import boundary

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LEAST_CAPABILITY = (8, 0)


def unavailable_reason() -> str | None:
    """None where the kernels can run, else one sentence: what is missing and what to do."""
    facts = boundary.describe()
    if not facts.get("cuda"):
        return facts["reason"] or (
            f"elva_kernels._C was built without CUDA: {facts['cuda_lacks']}; on this machine, with "
            "the CUDA toolkit, run ELVA_KERNELS_CUDA=1 pip install in elva's source"
        )
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "torch sees no NVIDIA GPU"
    capability = torch.cuda.get_device_capability()
    if capability < _LEAST_CAPABILITY:
        found = ".".join(map(str, capability))
        return f"cuda kernels need a GPU of compute capability 8.0 or later, this one has {found}"
    if not any(_runs_on(arch, capability) for arch in facts["cuda_archs"]):
        return (
            f"elva_kernels._C was built for sm_{', sm_'.join(facts['cuda_archs'])}, this GPU has "
            f"{'.'.join(map(str, capability))}; run pip install again on this machine, or "
            "anywhere with ELVA_KERNELS_CUDA_ARCHS"
        )
    return None


def _runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """Whether what is compiled for `arch`, like "80" or "90a", runs there: code, not PTX."""
    major, minor = divmod(int(arch.rstrip("af")), 10)
    is_exact = arch.endswith("a")
    return major == capability[0] and (
        minor == capability[1] if is_exact else minor <= capability[1]
    )


def version() -> str:
    """The build that a verdict on its kernels holds for."""
    return f"_C {boundary.build_digest()}"
