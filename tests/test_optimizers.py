"""KernelMuon against torch's Muon on matrices, and which parameters get which optimizer."""

import pytest
import torch
from torch import nn

from data.optimizers import KernelMuon, make_optimizers
from model import FusionUNet


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(8, 6, 3, 3), (8, 32, 1, 1), (64, 3, 3, 3)])
def test_a_kernel_is_stepped_as_its_matrix_is(shape, memory_format):
    torch.manual_seed(0)
    start, gradients = torch.randn(shape), torch.randn(3, *shape)
    kernel = nn.Parameter(start.clone().contiguous(memory_format=memory_format))
    matrix = nn.Parameter(start.flatten(1).clone())
    options = {"lr": 0.1, "weight_decay": 0.5, "adjust_lr_fn": "match_rms_adamw"}
    ours, torchs = KernelMuon([kernel], **options), torch.optim.Muon([matrix], **options)
    for gradient in gradients:
        kernel.grad, matrix.grad = gradient.clone(), gradient.flatten(1).clone()  # in another order than the kernel
        ours.step()
        torchs.step()
    change = (matrix - start.flatten(1)).abs().mean()
    assert (kernel.flatten(1) - matrix).abs().max() < 0.03 * change  # Muon computes in bfloat16
    assert kernel.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("frozen", [True, False])
def test_each_parameter_has_one_optimizer(frozen):
    model = FusionUNet(weights=None, freeze_backbone=frozen, backbone="resnet18").to(memory_format=torch.channels_last)
    muon, adamw = make_optimizers(model, 1e-2, 0)
    others = {id(value): group["lr"] for group in adamw.param_groups for value in group["params"]}
    matrices = {matrix.data_ptr() for matrix in muon.param_groups[0]["params"]}
    for name, value in model.named_parameters():
        if name.startswith("stages."):
            assert others.get(id(value)) == (None if frozen else pytest.approx(1e-3))
        elif value.ndim == 4 and name != "head.weight":
            assert value.data_ptr() in matrices and id(value) not in others
        else:
            assert others[id(value)] == 1e-2
    assert len(matrices) == len(muon.kernels)


def test_a_kernel_that_was_moved_is_not_left_behind_in_silence():
    layer = nn.Conv2d(4, 8, 3)
    optimizer = KernelMuon([layer.weight])
    layer(torch.randn(1, 4, 8, 8)).sum().backward()
    optimizer.step()
    layer.to(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="make a new one"):
        optimizer.step()


def test_it_goes_on_as_if_nothing_had_happened():
    states = []
    for stop in (False, True):
        torch.manual_seed(0)
        layer = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
        optimizer = KernelMuon([layer.weight], lr=0.1)
        for step in range(4):
            if stop and step == 2:
                saved = optimizer.state_dict()
                optimizer = KernelMuon([layer.weight], lr=1)
                optimizer.load_state_dict(saved)
            layer.weight.grad = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        states.append(layer.weight.detach().clone())
    assert torch.equal(*states)
