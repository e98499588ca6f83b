"""Keys and values of a batch that is decoded: room for all that may be written is taken once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer


def decoding_cache(config: Any, room: int) -> DynamicCache:
    """transformers' cache of a language model, whose layers of full attention write in place.

    Args:
        config: the language model's.
        room: tokens after the prompt.
    """
    cache = DynamicCache(config=config)
    cache.layers = [_Layer(room) if type(x) is DynamicLayer else x for x in cache.layers]
    return cache


class _Layer(CacheLayerMixin):
    """Keys and values [R, heads, L + room, D], of which the first `filled` tokens are there.

    The prompt's are kept as they come; room is taken when they are spread over their rollouts.
    """

    is_sliding = False

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room, self.filled = room, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = key_states, value_states
        self.filled = key_states.shape[-2]
        self.length = self.filled + self.room
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            return key_states, value_states
        start, self.filled = self.filled, self.filled + key_states.shape[-2]
        self.keys[:, :, start : self.filled] = key_states
        self.values[:, :, start : self.filled] = value_states
        return self.keys[:, :, : self.filled], self.values[:, :, : self.filled]

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(
            torch.arange(len(self.keys), device=self.keys.device).repeat_interleave(repeats)
        )

    def batch_select_indices(self, indices: Tensor) -> None:
        self.keys, self.values = (self._moved(x, indices) for x in (self.keys, self.values))

    def _moved(self, states: Tensor, rows: Tensor) -> Tensor:
        out = states.new_empty(len(rows), states.shape[1], self.length, states.shape[3])
        out[:, :, : self.filled] = states[rows, :, : self.filled]
        return out

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.filled + query_length, 0

    def get_seq_length(self) -> int:
        return self.filled

    def get_max_length(self) -> int:
        return -1
