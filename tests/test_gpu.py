"""What can be told of a GPU where there is none: that a step never waits for it, and what is launched on it."""

from collections.abc import Iterator

import pytest
import torch
from benchmark import Trainer, noise
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import main
import model as network
from dataset import color_jitter
from losses import CombinedIoULoss
from metrics import ChangeMetrics
from model import FusionUNet, make_optimizers, probabilities


class NoBlockingCopy(TorchDispatchMode):
    """A copy between the host and a GPU that the host waits for is an error."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **kwargs or {})
        if operator is torch.ops.aten._to_copy.default and not kwargs.get("non_blocking"):
            assert args[0].device.type == result.device.type, f"a copy from {args[0].device} to {result.device}"
        return result


class Operators(TorchDispatchMode):
    """Counts the operators that compute something, each about a kernel of a GPU; views and empty tensors aren't."""

    NONE = ("aten::empty", "aten::new_empty", "aten::detach", "aten::_unsafe_view", "profiler::")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += not (operator.is_view or operator.name().startswith(self.NONE))
        return operator(*args, **kwargs or {})


def launches(trainer: Trainer, batch: tuple[torch.Tensor, ...]) -> int:
    """The operators that a training step launches."""
    trainer.step(*batch)  # there are gradients from here on
    with Operators() as counted:
        trainer.step(*batch)
    return counted.count


@pytest.fixture
def on_a_gpu() -> Iterator[FusionUNet]:
    """A model whose tensors say that they are on a GPU, and hold nothing: to read one on the host is an error."""
    model = FusionUNet(weights=None, backbone="resnet18").to(memory_format=torch.channels_last)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with FakeTensorMode() as mode:
            model._apply(lambda tensor: mode.from_tensor(tensor).to("cuda"))
            with NoBlockingCopy():
                yield model
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def test_a_step_on_a_gpu_never_waits_and_stays_there(on_a_gpu):
    images = torch.empty(2, 2, 3, 64, 64, dtype=torch.uint8, device="cuda")
    label, metrics = torch.empty(2, 1, 64, 64, dtype=torch.uint8, device="cuda"), ChangeMetrics()
    logits = on_a_gpu(*(color_jitter(each, 0.1, 0.1, 0.1, 0.1) for each in images))
    loss = CombinedIoULoss(0.5)(logits, label)
    metrics.update(logits, label)
    for parameter in on_a_gpu.parameters():
        parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None  # a backward pass needs CUDA
    make_optimizers(on_a_gpu, 1e-3, 1e-2)[0].step()
    with torch.inference_mode():
        metrics.update(on_a_gpu.eval()(*images), label)
        probability = probabilities(on_a_gpu.average_over_flips(*images))
    assert {tensor.device.type for tensor in (logits, loss, metrics._counts, probability)} == {"cuda"}


def test_what_waits_is_noticed(on_a_gpu):
    """Otherwise the test above could not fail."""
    images = torch.empty(2, 2, 3, 64, 64, device="cuda")
    with pytest.raises(DataDependentOutputException):
        on_a_gpu(*images).mean().item()
    with pytest.raises(AssertionError, match="a copy from cpu to cuda"):
        on_a_gpu(*images) * torch.tensor([2.0], device="cuda")


def test_a_step_launches_few_operators(monkeypatch):
    """Each costs the GPU's host some 5 µs, however small it is. With every cast that autocast makes on a GPU."""
    monkeypatch.setattr(network, "fast_dtype", lambda device: torch.bfloat16)
    trainer = Trainer(FusionUNet(weights=None).to(memory_format=torch.channels_last), torch.device("cpu"), amp=True)
    assert launches(trainer, noise(2, 64, torch.device("cpu"))) <= 698


def test_compile_captures_a_whole_step():
    trainer = Trainer(FusionUNet(weights=None, backbone="resnet18"), torch.device("cpu"), amp=True)
    image_a, image_b, label = noise(2, 64, torch.device("cpu"))
    captured = torch._dynamo.explain(lambda: trainer.forward(*main.jitter(image_a, image_b, trainer.config), label))()
    assert (captured.graph_count, captured.graph_break_count) == (1, 0), captured.break_reasons
