"""Checkpoints from the disk, read so that a damaged one is never taken for whole."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

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
