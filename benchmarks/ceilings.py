"""What this machine's memory can do: the ceilings that every report states beside its figures."""

import torch
from torch import Tensor

BYTES = 64 << 20  # of each buffer: beyond the caches


class Ceilings:
    """Callables that read or copy `BYTES` with torch's threads; they rotate over their buffers."""

    def __init__(self) -> None:
        self._source = torch.ones(BYTES // 8, dtype=torch.int64)
        self._target = torch.zeros_like(self._source)
        self._flip = False

    def read(self) -> Tensor:
        """One pass over a buffer: `BYTES` bytes."""
        return self._source.sum()

    def copy(self) -> None:
        """One buffer into the other, the way changing each time: 2 `BYTES` bytes."""
        self._flip = not self._flip
        if self._flip:
            self._target.copy_(self._source)
        else:
            self._source.copy_(self._target)
