"""Several processes, one a GPU, as `torchrun` starts them. In a single process nothing here does anything."""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn


def count() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local() -> int:
    """This process's number on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", 0))


def is_main() -> bool:
    """Whether this is the one that logs and saves."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """The block in one group with the other processes, if torchrun started some; only the main one prints."""
    if "RANK" in os.environ:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(days=1))  # a large data set takes hours to decode
    if not is_main():
        sys.stderr.isatty = lambda: False  # for which tqdm draws no bar; errors are still to be seen
    try:
        with contextlib.nullcontext() if is_main() else contextlib.redirect_stdout(open(os.devnull, "w")):
            yield
    finally:
        leave()


def leave() -> None:
    """Go on alone."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def first_of_machine() -> Iterator[None]:
    """The block in the first process of each machine, then in the others: it fetches, decodes and complains for all."""
    if local() > 0:
        summed(torch.zeros(1))
    yield
    if local() == 0:
        summed(torch.zeros(1))


def shard(items: Sequence) -> Sequence:
    """This process's share of what all know: every n-th of the items."""
    return items[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else items


def summed(tensor: Tensor) -> Tensor:
    """The sum over the processes; gradients pass."""
    return Sum.apply(tensor) if dist.is_initialized() else tensor


class Sum(torch.autograd.Function):
    """Sum over the processes, of the gradients too."""

    @staticmethod
    def forward(_: object, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(_: object, gradient: Tensor) -> Tensor:
        return Sum.apply(gradient)


class SyncedBatchNorm(nn.BatchNorm2d):
    """BatchNorm over the batches of all processes, as `nn.SyncBatchNorm`, but on a CPU too."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (N, C, H, W)."""
        if not self.training:
            return super().forward(x)
        variance, mean = torch.var_mean(x.to(self.weight.dtype), (0, 2, 3), correction=0)
        count = torch.full_like(mean, x.numel() / len(mean))
        count, mean, square = summed(torch.stack([count, count * mean, count * (variance + mean**2)]))
        mean, variance = mean / count, square / count - (mean / count) ** 2
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (variance + self.eps).rsqrt()
        shift = self.bias - mean * scale
        return (x * scale[:, None, None] + shift[:, None, None]).to(x.dtype)


def parallel(model: nn.Module) -> nn.Module:
    """The model to train with: its gradients and BatchNorm statistics are those of all processes' pairs together."""
    if not dist.is_initialized():
        return model
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.weight.requires_grad:  # a frozen one has nothing to share
            module.__class__ = SyncedBatchNorm
    return nn.parallel.DistributedDataParallel(model)
