"""Pixels of pictures, each cut once: by threads, ahead of who asks for them, and kept for a while.

Pillow and numpy leave Python's lock while they work, so that threads decode, resize and cut beside
a model; processes (torch's DataLoader) copy every picture once more, 7 MB of 640 x 480 pixels. What
is given does not depend on the threads: whoever cuts a picture cuts it alike.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

KEPT_MB = 512
"""Pixels that were asked for and may be again; the least recently used are dropped."""

AHEAD_MB = 512
"""Pixels that were cut ahead and not asked for yet; threads wait where there are as many."""

MOST_WORKERS = 4
"""Ours, where nobody says how many: they cut some 200 pictures of 640 x 480 pixels a second."""

Pixels = Mapping[str, Tensor]
"""Arguments of a model's `get_image_features`."""


def spare_cores() -> int:
    """Cores of this process's share of the machine beside its own, at most `MOST_WORKERS`."""
    mine = getattr(os, "sched_getaffinity", None)  # which macOS has not
    cores = len(mine(0)) if mine else os.cpu_count() or 1
    cores //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(0, min(MOST_WORKERS, cores - 1))


class Pictures:
    """Pixels by a picture's name.

    Args:
        cut: a picture's name -> its pixels, from any thread; what it raises, `get` raises.
        workers: threads that cut ahead; 0 cuts when asked.
    """

    def __init__(self, cut: Callable[[str], Pixels], workers: int | None = None) -> None:
        self.cut = cut
        self.workers = spare_cores() if workers is None else workers
        self._kept: OrderedDict[str, Pixels] = OrderedDict()
        self._kept_bytes = 0
        self._lock = threading.Lock()  # of all below
        self._threads: ThreadPoolExecutor | None = None
        self._waiting: OrderedDict[str, None] = OrderedDict()
        self._begun: dict[str, Future[Pixels]] = {}  # and not asked for yet
        self._sizes: dict[str, int] = {}  # of those of them that are cut
        self._cutting, self._largest = 0, 0

    def get(self, image: str) -> Pixels:
        """Pixels of a picture: those that are there, or are being cut, or cut here and now."""
        if image in self._kept:
            self._kept.move_to_end(image)
            return self._kept[image]
        with self._lock:
            begun = self._begun.pop(image, None)
            self._sizes.pop(image, None)
            self._waiting.pop(image, None)
            self._fill()
        pixels = self.cut(image) if begun is None else begun.result()
        self._kept[image] = pixels
        self._kept_bytes += _bytes(pixels)
        while self._kept_bytes > KEPT_MB << 20:
            self._kept_bytes -= _bytes(self._kept.popitem(last=False)[1])
        return pixels

    def ahead(self, images: Iterable[str]) -> None:
        """Begin to cut the pictures that will be asked for, in this order; what an earlier call
        named and this one does not is forgotten."""
        wanted = dict.fromkeys(images)
        for image in wanted:
            if image in self._kept:
                self._kept.move_to_end(image)
        with self._lock:
            for image in self._begun.keys() - wanted:
                del self._begun[image]
                self._sizes.pop(image, None)
            new = (i for i in wanted if i not in self._kept and i not in self._begun)
            self._waiting = OrderedDict.fromkeys(new)
            self._fill()

    @property
    def ahead_bytes(self) -> int:
        """What was cut ahead and not asked for, and room for what is being cut."""
        return sum(self._sizes.values()) + self._cutting * self._largest

    def _fill(self) -> None:
        """Give work to threads that have none, as far as memory goes, and to one alone until a
        picture's size is known; under the lock."""
        while (
            self._waiting
            and self._cutting < (self.workers if self._largest else min(1, self.workers))
            and self.ahead_bytes + self._largest <= AHEAD_MB << 20
        ):
            image, _ = self._waiting.popitem(last=False)
            if self._threads is None:
                self._threads = ThreadPoolExecutor(self.workers, "pictures")
            self._cutting += 1
            self._begun[image] = self._threads.submit(self._cut, image)

    def _cut(self, image: str) -> Pixels:
        """In a thread."""
        size = 0
        try:
            pixels = self.cut(image)
            size = _bytes(pixels)
            return pixels
        finally:
            with self._lock:
                self._cutting -= 1
                self._largest = max(self._largest, size)
                if image in self._begun:
                    self._sizes[image] = size
                self._fill()


def _bytes(pixels: Pixels) -> int:
    return sum(value.nbytes for value in pixels.values())
