"""Features of pictures by a vision tower that does not learn: each made once, and alone.

A feature's bits depend on its picture and the tower only, so that features may be made in any
order, dropped, read from a file of another run, and a run that was killed goes on with the same.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from elva.errors import UserError
from elva.files import Sink, sync_directory
from elva.model.pictures import Pixels

FEATURES_KEPT_MB = 1024
"""Features kept in memory beside those of the step at hand; the least recently used are dropped."""

TOGETHER, SMALL = 16, 256
"""Ours: pictures of at most so many patches are read as many at once, of one size and filled up
with copies: always the same shapes, so that a picture's bits do not depend on its company. Emoji
take a third of the time that they take one by one; larger pictures gain nothing."""

VERSION = 2
"""Raise it when the same tower and picture would give another feature than before."""


def each_alone(tower: Callable[[Pixels], Tensor], pictures: Iterable[Pixels]) -> list[Tensor]:
    """Features of pictures [tokens, W], in their order, as if the tower read one at a time.

    Args:
        tower: pixels of some pictures of one size -> their features [n * tokens, W].
    """
    found: dict[int, Tensor] = {}
    waiting: dict[tuple[int, ...], list[tuple[int, Pixels]]] = {}

    def read(some: list[tuple[int, Pixels]], size: int) -> None:
        filled = [pixels for _, pixels in some] + [some[-1][1]] * (size - len(some))
        features = tower({name: torch.cat([p[name] for p in filled]) for name in filled[0]})
        # Copies of their own: a view would keep the features of all that were read with it.
        parts = features.unflatten(0, (size, -1))
        found.update((i, f.clone()) for (i, _), f in zip(some, parts, strict=False))

    for place, pixels in enumerate(pictures):
        grid = pixels.get("image_grid_thw")
        if grid is None or len(pixels["pixel_values"]) > SMALL:
            read([(place, pixels)], 1)
            continue
        like = waiting.setdefault(tuple(grid.flatten().tolist()), [])
        like.append((place, pixels))
        if len(like) == TOGETHER:
            read(like, TOGETHER)
            like.clear()
    for like in waiting.values():
        if like:
            read(like, TOGETHER)
    return [found[place] for place in range(len(found))]


class Features:
    """What is kept of a frozen tower's features: in memory, and in a file where there is one.

    Args:
        file: None keeps them in memory alone.
        content: picture -> a hash of what it shows, by which a file knows it.
    """

    def __init__(
        self, file: FeatureFile | None = None, content: Callable[[str], str] = str
    ) -> None:
        self.file, self.content = file, content
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        self._bytes = 0
        self._held: frozenset[str] = frozenset()

    def get(
        self,
        images: Iterable[str],
        make: Callable[[Sequence[str]], Sequence[Tensor]],
        device: torch.device,
    ) -> dict[str, Tensor]:
        """{picture: [tokens, W]} of distinct pictures; `make` gives those that are not kept."""
        found: dict[str, Tensor] = {}
        missing = []
        for image in dict.fromkeys(images):
            if image in self._kept:
                self._kept.move_to_end(image)
                found[image] = self._kept[image]
            elif (
                self.file is not None and (read := self.file.read(self.content(image))) is not None
            ):
                found[image] = read.to(device)
                self._keep(image, found[image])
            else:
                missing.append(image)
        for image, feature in zip(missing, make(missing) if missing else (), strict=True):
            found[image] = feature
            self._keep(image, feature)
            if self.file is not None:
                self.file.add(self.content(image), feature)
        if missing and self.file is not None:
            self.file.commit()
        return found

    def has(self, image: str) -> bool:
        """Whether a picture's features are kept."""
        in_file = self.file is not None and self.content(image) in self.file
        return image in self._kept or in_file

    def hold(self, images: Iterable[str]) -> None:
        """Drop none of some pictures' features, however many they are, until the next such
        call."""
        self._held = frozenset(images)

    def _keep(self, image: str, feature: Tensor) -> None:
        self._kept[image] = feature
        self._bytes += feature.nbytes
        old = iter(list(self._kept))
        while self._bytes > FEATURES_KEPT_MB << 20 and (image := next(old, "")):
            if image not in self._held:
                self._bytes -= self._kept.pop(image).nbytes


def fingerprint(tower: Mapping[str, Tensor], preprocessing: str) -> str:
    """A hash of all that a feature depends on beside its picture.

    Args:
        tower: its weights.
        preprocessing: what makes pixels of a picture, in words.
    """
    digest = hashlib.sha256(f"{VERSION} {preprocessing}".encode())
    for name, weight in sorted(tower.items()):
        digest.update(f"{name} {weight.dtype} {[*weight.shape]}".encode())
        digest.update(_bytes(weight))
    return digest.hexdigest()


def _bytes(values: Tensor) -> memoryview:
    return values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


class _Place(NamedTuple):
    descriptor: int
    offset: int
    shape: tuple[int, ...]
    dtype: str
    crc: int


class FeatureFile:
    """A directory of features, `ROOT/TOWER/`: each writer appends to a part of its own, `N.bin`
    with a line a feature in `N.jsonl`, and reads those of all.

    A line counts once its feature is whole on the disk: what a killed writer left after the last
    such line is overwritten by the next.

    Raises:
        UserError: the directory holds features of another tower, or damaged ones.
    """

    def __init__(self, root: Path, tower: str) -> None:
        self.folder, self.tower = root / tower[:16], tower
        self.folder.mkdir(parents=True, exist_ok=True)
        self._places: dict[str, _Place] = {}
        self._pending: list[tuple[str, Tensor]] = []
        self._own: tuple[Sink, Sink] | None = None
        for index in sorted(self.folder.glob("*.jsonl")):
            self._open(index)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, content: str) -> bool:
        return content in self._places

    def read(self, content: str) -> Tensor | None:
        """A feature in main memory; None where the file has none of that picture."""
        place = self._places.get(content)
        if place is None:
            return None
        dtype = getattr(torch, place.dtype)
        size = torch.Size(place.shape).numel() * dtype.itemsize
        data = bytearray(os.pread(place.descriptor, size, place.offset))
        if zlib.crc32(data) != place.crc:
            raise UserError(f"train: {self.folder} must hold its features whole, got damaged ones; "
                            "delete it")  # fmt: skip
        return torch.frombuffer(data, dtype=torch.uint8).view(dtype).view(place.shape)

    def add(self, content: str, feature: Tensor) -> None:
        """Note a feature for the next `commit`."""
        self._pending.append((content, feature))

    def commit(self) -> None:
        """Write what was added, synced before its lines name it."""
        if not self._pending:
            return
        data, index = self._own = self._own or self._begin()
        lines = []
        for content, feature in self._pending:
            raw = _bytes(feature)
            dtype = str(feature.dtype).removeprefix("torch.")
            place = _Place(data.descriptor, data.size, tuple(feature.shape), dtype, zlib.crc32(raw))
            data.write(raw)
            self._places[content] = place
            lines.append(json.dumps({"picture": content, **place._asdict(), "descriptor": None}))
        os.fsync(data.descriptor)
        index.write("".join(f"{line}\n" for line in lines).encode())
        os.fsync(index.descriptor)
        self._pending = []

    def _open(self, index: Path) -> int:
        """Take in a part; the length of what counts of its lines."""
        text = index.read_bytes()
        text = text[: text.rfind(b"\n") + 1]
        if not text:  # its writer has just begun
            return 0
        head, *lines = text.splitlines()
        if json.loads(head) != self._head:
            raise UserError(f"train: {self.folder} must hold features of this vision tower, got "
                            "another's; name another directory as model.features")  # fmt: skip
        descriptor = os.open(index.with_suffix(".bin"), os.O_RDWR)
        for line in lines:
            entry: dict[str, Any] = json.loads(line)
            content = entry.pop("picture")
            entry |= {"descriptor": descriptor, "shape": tuple(entry["shape"])}
            self._places.setdefault(content, _Place(**entry))
        return len(text)

    @property
    def _head(self) -> dict[str, Any]:
        return {"tower": self.tower}

    def _begin(self) -> tuple[Sink, Sink]:
        """The first part that no other process writes."""
        number = 0
        while True:
            path = self.folder / f"{number}.jsonl"
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until the process ends
                break
            except BlockingIOError:
                os.close(descriptor)
                number += 1
        index, data = Sink(path, descriptor), path.with_suffix(".bin")
        sink = Sink(data, os.open(data, os.O_RDWR | os.O_CREAT, 0o666))
        index.size = self._open(path)
        os.ftruncate(descriptor, index.size)
        os.lseek(descriptor, 0, os.SEEK_END)
        sink.size = os.lseek(sink.descriptor, 0, os.SEEK_END)
        if index.size == 0:
            index.write(f"{json.dumps(self._head)}\n".encode())
            sync_directory(self.folder)
        return sink, index
