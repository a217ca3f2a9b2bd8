"""The constants of a run as a person gives them: read from a command line, checked, taken up again from a record."""

from __future__ import annotations

import ast
import contextlib
import ctypes
import errno
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from data import processes
from data.files import ModelError
from data.images import DataError

# What may be changed when a run goes on; anything else would make it another experiment.
CHANGEABLE = ("EPOCHS", "DATA_DIR", "CACHE_DIR", "DEVICE", "COMPILE", "NUM_WORKERS")


class OptionError(ValueError):
    """A name or a value on the command line that can't be; the message says what can."""


def parse(arguments: Sequence[str], hints: dict[str, type]) -> dict[str, object]:
    """`NAME=value` of a command line; numbers, True, False and None are read as such.

    Raises:
        OptionError: a name that isn't among the hints, or a value that isn't of its type.
    """
    parsed: dict[str, object] = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals or name not in hints:
            raise OptionError(f"{argument}: give NAME=value; there are {', '.join(hints)}")
        if value == "None" or not isinstance("", hints[name]):
            with contextlib.suppress(ValueError, SyntaxError):  # what is no literal stays text, which `typed` refuses
                value = ast.literal_eval(value)
        parsed[name] = typed(name, value, hints[name])
    return parsed


def typed(name: str, value: object, hint: type) -> object:
    """The value, if it is of that type; a whole number will do for a fraction."""
    if type(value) is int and isinstance(0.5, hint):
        value = float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise OptionError(f"{name}={value}: must be {getattr(hint, '__name__', hint)}")
    return value


def checked(name: str, value: object, hint: type) -> object:
    """The value, if the constant can have it."""
    value = typed(name, value, hint)
    if isinstance(value, int | float):
        least = 1 if name in ("CROP_SIZE", "NUM_CLASSES", "BATCH_SIZE", "EPOCHS") else 0
        most = {"NUM_CLASSES": 255, "ALPHA": 1, "BRIGHTNESS": 1, "CONTRAST": 1, "SATURATION": 1, "HUE": 0.5}
        most = most.get(name, sys.maxsize)
        if not least <= value <= most:
            raise OptionError(f"{name}={value}: must be {least} to {most}")
    if value == "":
        raise OptionError(f"{name}=: nothing is given behind it")
    if name in ("RUN_NAME", "SPLIT") and value is not None and Path(value).name != value:
        raise OptionError(f"{name}={value}: must be a name, not a path")
    return value


def recorded(folder: str, overrides: dict[str, object]) -> dict:
    """The record of a run that shall go on with some of its constants changed."""
    try:
        record = json.loads(Path(folder, "constants.json").read_text())
        began = record["constants"]
        if began["EVALUATE"] is not None:
            raise OptionError(f"RESUME={folder}: this run scored a checkpoint and is done; give EVALUATE again")
    except (OSError, ValueError, LookupError, TypeError) as error:
        if isinstance(error, OptionError):
            raise
        raise OptionError(f"RESUME={folder}: not the folder of a run ({error}); give one of runs/") from error
    for name, value in overrides.items():
        if name != "RESUME" and name not in CHANGEABLE and value != began.get(name):
            changeable = ", ".join(CHANGEABLE)
            raise OptionError(f"{name}={value}: the run began with {began.get(name)}; only {changeable} may change")
    if isinstance(epochs := overrides.get("EPOCHS"), int) and epochs < began["EPOCHS"]:
        raise OptionError(f"EPOCHS={epochs}: may be raised, but the run began with {began['EPOCHS']}")
    return record


def explanation(error: Exception, memory: str) -> str | None:
    """One line for a person, of an error that is the input's or the machine's; None if it is the program's.

    Args:
        error: what ended the program.
        memory: the options that save memory.
    """
    if getattr(error, "errno", None) == errno.ENOSPC:  # the message may name no file
        return "a disk is full: free some of it, then go on"
    if isinstance(error, OptionError | DataError | ModelError | FloatingPointError | OSError):
        # The last line of several, if it comes from a worker; there it has the error's name.
        return re.sub(r"^[a-zA-Z.]+Error: ", "", str(error).splitlines()[-1])
    if isinstance(error, MemoryError):
        return f"the memory ran out: lower {memory}"
    if isinstance(error, torch.OutOfMemoryError):  # "CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has … is free."
        return f"{str(error).partition(' Of the allocated')[0]} Lower {memory}"
    if "closed by peer" in str(error) or isinstance(error, torch.distributed.DistError):
        return "another process of this run has ended; it says why"
    if "DataLoader worker" in str(error):
        return f"a process that loads data died, perhaps for want of memory: lower NUM_WORKERS ({error})"
    return None


def pick_device(name: str | None) -> torch.device:
    """The device of that name, once it was seen to work; None: the GPU of this process, or the CPU."""
    try:
        device = torch.device(name or (f"cuda:{processes.local()}" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()
        if device.type == "cuda" and device.index:
            torch.cuda.set_device(device)  # else some of its memory and work goes to the first GPU
    except (RuntimeError, AssertionError) as error:
        raise OptionError(f"DEVICE={name}: {str(error).splitlines()[0]}; DEVICE=cpu always works") from error
    if device.type == "cpu":
        _keep_freed_memory()
    return device


def _keep_freed_memory() -> None:
    """Let glibc keep what is freed, up to 2 GiB: the kernel clears each page before it gives it out again."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no blocks of their own, which go back at once
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, bytes


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 by itself; where it is emulated it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))
