"""The optimizers of a run: Muon for the convolutions that are trained from scratch, AdamW for all else."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

BACKBONE_SHARE = 0.1  # of the learning rate, for a backbone that is trained: it has learned already


class KernelMuon(torch.optim.Muon):
    """Muon for convolutions, a kernel being a matrix of one row for each output channel.

    It makes every direction in which the gradient points equally long, and so learns from fewer batches than AdamW
    (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).

    Args:
        kernels: (out_channels, in_channels, height, width) each; they must stay where they are in memory.
        **options: of `torch.optim.Muon`.

    Raises:
        RuntimeError: in a step, a kernel was moved.
    """

    def __init__(self, kernels: Sequence[nn.Parameter], **options: object):
        self.kernels = kernels
        super().__init__([nn.Parameter(self._rows(kernel, kernel.detach())) for kernel in kernels], **options)

    def step(self) -> None:
        """A step down the kernels' gradients."""
        for kernel, matrix in zip(self.kernels, self.param_groups[0]["params"], strict=True):
            if kernel.data_ptr() != matrix.data_ptr():
                raise RuntimeError("the model was moved after its optimizer was made: make a new one")
            matrix.grad = None if kernel.grad is None else self._rows(kernel, kernel.grad)
        super().step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        for kernel in self.kernels:
            kernel.grad = None

    @staticmethod
    def _rows(kernel: Tensor, values: Tensor) -> Tensor:
        """The values in a kernel's own order in memory, so that the kernel itself is seen as a matrix, not copied."""
        if kernel.is_contiguous(memory_format=torch.channels_last):
            values = values.permute(0, 2, 3, 1)
        return values.reshape(len(values), -1)


def make_optimizers(model: nn.Module, learning_rate: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """What trains a `FusionUNet`; its rates for Muon are made comparable with AdamW's."""
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    backbone = [value for name, value in trained.items() if name.startswith("stages.")]
    decoder = {name: value for name, value in trained.items() if not name.startswith("stages.")}
    kernels = [value for name, value in decoder.items() if value.ndim == 4 and not name.startswith("head")]
    rest = [value for name, value in decoder.items() if value.ndim != 4 or name.startswith("head")]
    groups = [{"params": rest}] + [{"params": backbone, "lr": BACKBONE_SHARE * learning_rate}] * bool(backbone)
    options = {"lr": learning_rate, "weight_decay": weight_decay}
    return [
        KernelMuon(kernels, adjust_lr_fn="match_rms_adamw", **options),
        torch.optim.AdamW(groups, fused=True, **options),
    ]
