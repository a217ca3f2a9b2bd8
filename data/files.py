"""Checkpoints and other files of a run, written and read so that half a file is never taken for a whole one."""

from __future__ import annotations

import contextlib
import io
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import torch

CHECKPOINTS = "give the best.pt or last.pt of a run"


class ModelError(RuntimeError):
    """Weights or a checkpoint that can't be had or don't fit; the message names the file and the way out."""


def read_checkpoint(path: str | os.PathLike) -> dict:
    """What `torch.save` wrote, its checksums tested, which torch leaves out; ModelError where it is damaged."""
    if not Path(path).is_file():
        raise ModelError(f"{path}: no such checkpoint; {CHECKPOINTS}")
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"checksum of {damaged}")
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch.load has no error of its own: a broken file raises what its reader meets
        raise ModelError(f"{path}: no checkpoint, or a damaged one ({type(error).__name__}); {CHECKPOINTS}") from error


def save(checkpoint: dict, path: Path) -> None:
    """Write a checkpoint; in memory first, since torch turns an error of the disk into one of its own."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    with written_whole(path, "wb") as file:
        file.write(buffer.getbuffer())


@contextlib.contextmanager
def written_whole(path: Path, mode: str = "w") -> Iterator[IO]:
    """A file to write, which is at `path` once all of it is on the disk; after an error the old one is still there.

    Raises:
        OSError: it can't be written; the message names the file.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # two runs draw into images/
    try:
        with open(part, mode, newline=None if "b" in mode else "") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise OSError(f"{path}: can't be written ({error.strerror or error}); what was there is kept") from error
    finally:
        part.unlink(missing_ok=True)
