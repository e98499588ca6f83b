"""The CPU backend: launchers of `elva_kernels._C`, C++ for the best instructions of this CPU."""

from elva_kernels.backends.boundary import unavailable_reason

__all__ = ["unavailable_reason"]
