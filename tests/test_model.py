"""FusionUNet: shapes, freezing, weights and checkpoints."""

import inspect
import re
import sys
import types

import pytest
import torch
from torch import nn
from torchvision.models import ResNet50_Weights, resnet50

from model import FusionUNet, ModelError


@pytest.fixture(scope="module")
def model() -> FusionUNet:
    torch.manual_seed(0)
    return FusionUNet(weights=None).eval()


def images(n: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.randint(0, 256, (2, n, 3, height, width), dtype=torch.uint8))


@pytest.mark.parametrize(("n", "height", "width"), [(1, 64, 96), (3, 128, 32)])
def test_shape_comments_are_true(model, n, height, width):
    seen: dict[types.CodeType, dict[int, dict]] = {}

    def trace(frame, event, _):
        if frame.f_code not in (FusionUNet.forward.__code__, FusionUNet.encode.__code__):
            return None
        shapes = {name: tuple(value.shape) for name, value in frame.f_locals.items() if torch.is_tensor(value)}
        seen.setdefault(frame.f_code, {})[frame.f_lineno] = shapes  # as they are before this line runs
        return trace

    sys.settrace(trace)
    try:
        model(*images(n, height, width))
    finally:
        sys.settrace(None)
    checked = 0
    for method in (FusionUNet.forward, FusionUNet.encode):
        lines, first = inspect.getsourcelines(method)
        for number, line in enumerate(lines, first):
            if comment := re.match(r"\s+(\w+) = .*# \((.*)\)$", line):
                name, shape = comment.groups()
                shape = eval(f"({shape.replace('2N', '2 * N')})".replace("/", "//"),
                             {"N": n, "H": height, "W": width, "out_channels": 1})  # fmt: skip
                after = min(later for later in seen[method.__code__] if later > number)
                assert seen[method.__code__][after][name] == shape, line
                checked += 1
    assert checked >= 12


@pytest.mark.parametrize("size", [(64, 64), (33, 47), (100, 70), (32, 250), (1, 1)])
def test_logits_have_the_size_of_the_input(model, size):
    assert model(*images(1, *size)).shape == (1, 1, *size)


def test_bytes_and_floats_are_one(model):
    image_a, image_b = images(2, 64, 64)
    torch.testing.assert_close(model(image_a, image_b), model(image_a / 255, image_b / 255))


def test_normalised_as_imagenet(model):
    seen = []
    hook = model.stem.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(*images(1, 32, 32)[:1], torch.full((1, 3, 32, 32), 255, dtype=torch.uint8))
    hook.remove()
    expected = torch.tensor([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225])
    torch.testing.assert_close(seen[0][1], expected[:, None, None].expand(3, 32, 32))


def test_encoder_is_torchvisions_resnet(model):
    backbone = resnet50()
    ours = {name: value for name, value in model.state_dict().items() if name.startswith("layer")}
    ours |= {f"{name}.{key}": value for name, module in (("conv1", model.stem[0]), ("bn1", model.stem[1]))
             for key, value in module.state_dict().items()}  # fmt: skip
    backbone.load_state_dict(ours, strict=False)
    backbone.eval().fc = nn.Identity()
    image_a, image_b = images(1, 64, 64)
    pooled = backbone((torch.cat([image_a, image_b]) / 255 - model.mean) / model.std)
    torch.testing.assert_close(model.encode(image_a, image_b)[-1].mean((2, 3)), pooled, rtol=1e-4, atol=1e-4)


def test_the_order_of_the_dates_does_not_matter(model):
    image_a, image_b = images(2, 64, 64)
    torch.testing.assert_close(model(image_a, image_b), model(image_b, image_a), rtol=1e-4, atol=1e-5)


def test_frozen_means_frozen():
    torch.manual_seed(0)
    model = FusionUNet(weights=None).train()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.1)
    assert not any(feature.requires_grad for feature in model.encode(*images(1, 32, 32)))
    for _ in range(2):
        optimizer.zero_grad()
        model(*images(2, 64, 64)).mean().backward()
        optimizer.step()
    learned = {name for name, value in model.state_dict().items() if not torch.equal(value, start[name])}
    backbone = {name for name in start if name.split(".")[0] in ("stem", "layer1", "layer2", "layer3", "layer4")}
    assert not learned & backbone
    assert learned == start.keys() - backbone - {"mean", "std"}
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert 4e6 < trainable < 7e6


def test_not_frozen_learns_everywhere():
    model = FusionUNet(weights=None, freeze_backbone=False)
    model(*images(2, 64, 64)).mean().backward()
    assert all(parameter.grad is not None and parameter.requires_grad for parameter in model.parameters())
    assert model.layer4.training


def test_predict_leaves_the_mode_and_gives_probabilities(model):
    image_a, image_b = (image[0] for image in images(1, 50, 40))
    model.train()
    probability = model.predict(image_a, image_b)
    assert model.training and not model.layer1.training
    model.eval()
    with torch.no_grad():
        expected = model(image_a[None], image_b[None])[0, 0].sigmoid()
    torch.testing.assert_close(probability, expected)


@pytest.fixture
def hub(tmp_path):
    """An empty cache for weights."""
    home = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    yield tmp_path / "checkpoints"
    torch.hub.set_dir(home)


def test_weights_come_from_torchvisions_cache(hub):
    torch.manual_seed(1)
    trained = resnet50()
    torch.save(trained.state_dict(), hub / "resnet50-0676ba61.pth")
    model = FusionUNet("IMAGENET1K_V1")
    assert torch.equal(model.stem[0].weight, trained.conv1.weight)
    assert torch.equal(model.layer4[2].bn3.weight, trained.layer4[2].bn3.weight)


@pytest.mark.parametrize("broken", [None, b"", b"not weights", b"PK\3\4 cut short"])
def test_weights_that_are_not_to_be_had(hub, monkeypatch, broken):
    monkeypatch.setattr(ResNet50_Weights.IMAGENET1K_V1.value, "url", "http://127.0.0.1:9/resnet50-0676ba61.pth")
    if broken is not None:
        (hub / "resnet50-0676ba61.pth").write_bytes(broken)
    with pytest.raises(ModelError) as error:
        FusionUNet("IMAGENET1K_V1")
    message = str(error.value)
    assert str(hub / "resnet50-0676ba61.pth") in message and "WEIGHTS=None" in message and "\n" not in message


def test_unknown_weights():
    with pytest.raises(ModelError, match="WEIGHTS=imagenet: unknown; there are IMAGENET1K_V1"):
        FusionUNet("imagenet")


def test_load_gives_the_model_back(tmp_path):
    torch.manual_seed(0)
    model = FusionUNet(weights=None, out_channels=2)
    model(*images(2, 64, 64))  # moves BatchNorm's statistics
    torch.save({"model_args": model.model_args(), "model": model.state_dict(), "more": 1}, tmp_path / "best.pt")
    loaded, pair = FusionUNet.load(tmp_path / "best.pt", "cpu"), images(1, 64, 64)
    assert not loaded.training
    torch.testing.assert_close(loaded(*pair), model.eval()(*pair))


class Payload:
    def __reduce__(self):
        return exec, ("raise SystemExit('code from a checkpoint was run')",)


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "truncated", "other model", "no model", "code"])
def test_bad_checkpoints(tmp_path, model, kind):
    path = tmp_path / "best.pt"
    checkpoint = {"model_args": model.model_args(), "model": model.state_dict()}
    match kind:
        case "empty":
            path.touch()
        case "text":
            path.write_text("not a checkpoint")
        case "truncated":
            torch.save(checkpoint, path)
            path.write_bytes(path.read_bytes()[:100_000])
        case "other model":
            torch.save(checkpoint | {"model": nn.Linear(1, 1).state_dict()}, path)
        case "no model":
            torch.save(torch.zeros(1), path)
        case "code":
            torch.save(checkpoint | {"more": Payload()}, path)
    with pytest.raises(ModelError, match=re.escape(str(path))) as error:
        FusionUNet.load(path)
    assert "\n" not in str(error.value)
