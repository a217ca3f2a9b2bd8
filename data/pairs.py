"""The pairs of a split as files: listed, checked and decoded once for all runs."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.files import written_whole
from data.images import DataError, check_headers, find_pairs, read_mask, read_rgb

PARTS = ("A", "B", "label")


class Pairs:
    """Image before, image after and mask of each pair of a split, in the order of their names.

    What is known of them stands in arrays, not in an object for each file: the processes that load share these.

    Args:
        folder: holds `{A,B,label}/NAME.{png,jpg,tif}`.
        cache_dir: keeps what was checked and decoded, until a file changes its size or time; None: nothing is kept.
        num_classes: classes of change in the masks.

    Attributes:
        sizes: int64 (pairs, 2), height and width in pixels.

    Raises:
        DataError: a file is missing, can't be read or is no such image, or a pair has more than one size.
    """

    def __init__(self, folder: Path, cache_dir: Path | None, num_classes: int = 1):
        self.folder, self.cache_dir, self.num_classes = folder, cache_dir, num_classes
        self._names = np.array(find_pairs(*(folder / part for part in PARTS)))  # str (pairs, 3)
        files = ((part, name) for names in self._names for part, name in zip(PARTS, names, strict=True))
        stats = (os.stat(f"{folder}/{part}/{name}") for part, name in files)
        stats = np.fromiter(((stat.st_size, stat.st_mtime_ns) for stat in stats), np.dtype((np.int64, 2)))
        self._stats = stats.reshape(-1, len(PARTS), 2)  # bytes, nanoseconds
        self._root = str(folder.resolve())
        if cache_dir is None:
            self.sizes = self._checked()
            return
        try:
            os.makedirs(cache_dir, exist_ok=True)
            self._fill_cache()
        except OSError as error:
            raise DataError(f"CACHE_DIR={cache_dir}: can't be filled ({error}); None does without") from error

    def __len__(self) -> int:
        return len(self._names)

    def paths(self, pair: int) -> tuple[Path, ...]:
        """The three files of a pair."""
        return tuple(self.folder / part / name for part, name in zip(PARTS, self._names[pair], strict=True))

    def load(self, pair: int) -> np.ndarray:
        """uint8 (H, W, 7): three bands before, three after, the mask's classes; of a cached one only what is used."""
        if self.cache_dir is None:
            return self._decode(pair)
        try:
            return np.load(self._cached(pair), mmap_mode="r")
        except (OSError, ValueError, EOFError):  # gone or damaged since it was filled
            self._decode_into_cache(pair)
            return np.load(self._cached(pair), mmap_mode="r")

    def fingerprint(self) -> str:
        """12 hexadecimal digits that change when a file is added, removed, renamed or changes its size."""
        rows = zip(self._names.tolist(), self._stats[..., 0].tolist(), strict=True)
        files = [file for names, sizes in rows for file in zip(PARTS, names, sizes, strict=True)]
        return _digits("".join(f"{part}/{name} {size}\n" for part, name, size in files).encode())

    def _fill_cache(self) -> None:
        """Check and decode what hasn't been yet, and drop what was made of files as they were before."""
        state = _digits(self._names.tobytes() + self._stats.tobytes() + bytes([self.num_classes]))
        done = self.cache_dir / f"{_digits(self._root.encode())}-{state}.npy"
        with contextlib.suppress(OSError, ValueError, EOFError):
            self.sizes = np.load(done)
            return
        self.sizes = self._checked()
        names = [self._cached(pair).name for pair in range(len(self))]
        present = set(os.listdir(self.cache_dir))
        self._each(self._decode_into_cache, [i for i, name in enumerate(names) if name not in present], "decoding")
        with written_whole(done, "wb") as file:
            np.save(file, self.sizes)
        ours = {name.partition("-")[0] for name in (done.name, *names)}
        for name in present.difference(names, [done.name]):
            if name.endswith(".npy") and name.partition("-")[0] in ours:
                (self.cache_dir / name).unlink(missing_ok=True)

    def _checked(self) -> np.ndarray:
        return np.array(self._each(lambda pair: check_headers(self.paths(pair)), range(len(self)), "checking"))

    def _each(self, work: Callable[[int], object], pairs: Sequence[int], verb: str) -> list:
        with ThreadPool(os.cpu_count()) as pool:
            done, bar = pool.imap(work, pairs, chunksize=4), {"leave": False, "disable": None, "delay": 1}
            return list(tqdm(done, f"{verb} {self.folder}", len(pairs), unit="pair", **bar))

    def _cached(self, pair: int) -> Path:
        files = zip(PARTS, self._names[pair].tolist(), strict=True)
        where = _digits("\n".join(f"{self._root}/{part}/{name}" for part, name in files).encode())
        state = _digits(repr([self.num_classes, self._stats[pair].tolist()]).encode())
        return self.cache_dir / f"{where}-{state}.npy"

    def _decode_into_cache(self, pair: int) -> None:
        with written_whole(self._cached(pair), "wb") as file:
            np.save(file, self._decode(pair))

    def _decode(self, pair: int) -> np.ndarray:
        path_a, path_b, path_label = self.paths(pair)
        return np.dstack([read_rgb(path_a), read_rgb(path_b), read_mask(path_label, self.num_classes)])


def _digits(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]
