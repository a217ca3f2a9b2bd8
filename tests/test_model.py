"""FusionUNet: shapes, freezing, weights, prediction, checkpoints; the optimizers that train it; what it runs on."""

import copy
import inspect
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models import ResNet50_Weights, resnet18, resnet50

import model as network
from dataset import DataError
from model import STRIDES, FusionUNet, KernelMuon, ModelError, error_line, make_optimizers, probabilities


@pytest.fixture(scope="module")
def model() -> FusionUNet:
    torch.manual_seed(0)
    return FusionUNet(weights=None, backbone="resnet18").eval()


def images(n: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    return tuple(torch.randint(0, 256, (2, n, 3, height, width), dtype=torch.uint8))


# The network


def randomize_batchnorm(module: nn.Module) -> None:
    for norm in (each for each in module.modules() if isinstance(each, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.2, 2)
        nn.init.normal_(norm.bias)
        nn.init.normal_(norm.running_mean)


@pytest.mark.parametrize("frozen", [True, False])
def test_features_are_those_of_torchvisions_resnet(hub, frozen):
    torch.manual_seed(0)
    trained, preset = resnet50().eval(), ResNet50_Weights.IMAGENET1K_V1.transforms()
    randomize_batchnorm(trained)
    torch.save(trained.state_dict(), hub / "resnet50-0676ba61.pth")
    model, pair = FusionUNet("IMAGENET1K_V1", frozen).eval(), images(1, 64, 64)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preset.mean, preset.std))
    trained.fc = nn.Identity()
    pooled = trained((torch.cat(pair) / 255 - mean) / std)
    features = model.encode(model.prepare(*pair))[-1].mean((2, 3))
    assert (features - pooled).abs().max() <= 1e-4 * pooled.abs().max()


def test_shape_comments_are_true(model):
    n, height, width = 3, 64, 96
    seen: dict[int, dict] = {}

    def trace(frame, event, _):
        if frame.f_code is not FusionUNet.forward.__code__:
            return None
        shapes = {name: tuple(value.shape) for name, value in frame.f_locals.items() if torch.is_tensor(value)}
        seen[frame.f_lineno] = shapes  # as they are before this line runs
        return trace

    sys.settrace(trace)
    try:
        model(*images(n, height, width))
    finally:
        sys.settrace(None)
    checked, sizes = 0, {"N": n, "H": height, "W": width, "out_channels": 1}
    lines, first = inspect.getsourcelines(FusionUNet.forward)
    for number, line in enumerate(lines, first):
        if comment := re.match(r"\s+(\w+) = .*# \((.*)\)$", line):
            name, shape = comment.groups()
            shape = eval(f"({shape.replace('2N', '2 * N').replace('/', '//')})", sizes)
            next_line = min(later for later in seen if later > number)
            assert seen[next_line][name] == shape, line
            checked += 1
    assert checked >= 12


@pytest.mark.parametrize("name", ["resnet18", "convnext_tiny", "swin_t", "densenet121"])
def test_any_backbone_with_these_strides_trains_and_is_saved(name, tmp_path):
    torch.manual_seed(0)
    model, pair = FusionUNet(weights=None, backbone=name), images(2, 64, 96)
    for feature, stride in zip(model.encode(model.prepare(*pair)), STRIDES, strict=True):
        if feature is not None or stride > 2:  # both dates in one pass
            assert (len(feature), *feature.shape[2:]) == (2 * 2, 64 // stride, 96 // stride)
    optimizer = torch.optim.AdamW((value for value in model.parameters() if value.requires_grad), 1e-2)
    losses, checksum = [], model.backbone_checksum()
    for _ in range(3):
        loss = nn.functional.softplus(-model(*pair)).mean()  # low once everything counts as changed
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.1 and model.backbone_checksum() == checksum
    network.save_checkpoint(model.checkpoint(), tmp_path / "best.pt")
    odd_pair = [image[0, :, :50, :70] for image in pair]
    predicted = model.predict(*odd_pair)
    assert predicted.shape == (50, 70)
    assert torch.equal(predicted, FusionUNet.load(tmp_path / "best.pt", "cpu").predict(*odd_pair))
    assert model.eval()(*(image[:, :1, :1][None] for image in odd_pair)).shape == (1, 1, 1, 1)


@pytest.mark.parametrize(("name", "remaining"), [("resnet50", 0), ("efficientnet_b0", 0), ("densenet121", 62)])
def test_folding_batchnorm_is_exact(name, remaining):
    """A DenseNet has 62 that follow no convolution."""
    torch.manual_seed(0)
    stages, *_ = network.cut_into_stages(network.make_classifier(name, None), name)
    stages, pictures = stages.double().eval(), torch.randn(2, 3, 64, 96, dtype=torch.float64)
    randomize_batchnorm(stages)
    expected = nn.Sequential(*stages.values())(pictures)
    network.fold_batchnorm(stages)
    folded = nn.Sequential(*stages.values())(pictures)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in stages.modules()) == remaining
    assert (folded - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_unusable_arguments():
    messages = {
        "BACKBONE=vit_b_16: gives no features at stride 4, 8, 32; .*": {"backbone": "vit_b_16"},
        "BACKBONE=fcn_resnet50: unknown; give a torchvision classifier such as .*": {"backbone": "fcn_resnet50"},
        "FUSION=sum: unknown; there are concatenation, difference, attention": {"fusion": "sum"},
    }
    for message, arguments in messages.items():
        with pytest.raises(ModelError, match=rf"^{message}\Z"):  # the dot matches no line break
            FusionUNet(weights=None, **arguments)


@pytest.mark.parametrize("fusion", network.FUSIONS)
def test_only_the_difference_ignores_the_order_of_the_dates(fusion):
    torch.manual_seed(0)
    model, (image_a, image_b) = FusionUNet(weights=None, fusion=fusion).eval(), images(2, 64, 64)
    forth, back = model(image_a, image_b), model(image_b, image_a)
    gap = (forth - back).abs().max()
    assert gap < 1e-4 if fusion == "difference" else gap > 0.01 * forth.std()


def test_attention_finds_what_is_elsewhere_in_the_other_date():
    torch.manual_seed(0)
    fuse, mixed = network.CrossAttention(8).eval(), []
    fuse.mix.register_forward_pre_hook(lambda _, inputs: mixed.append(inputs[0].flatten(2)))
    features = torch.randn(2, 8, 4, 4)
    moved = torch.stack([features[0], features[1].flatten(1)[:, torch.randperm(16)].view(8, 4, 4)])
    fuse(features)
    fuse(moved)
    # What the first date finds depends on what is in the second, not on where.
    torch.testing.assert_close(mixed[1][:, :8], mixed[0][:, :8])
    # By hand: the first head has the first two of eight channels.
    query = fuse.query(features)[0, :2].flatten(1)  # (2, 16)
    key, value = fuse.key_value(features)[1].view(2, 4, 2, 16)[:, 0]
    weights = (query.T @ key / 2**0.5).softmax(1)
    torch.testing.assert_close(mixed[0][0, :2], features[0, :2].flatten(1) + value @ weights.T)


def test_the_scale_of_a_backbone_has_no_effect(tmp_path):
    """A ResNet that starts without biases is linear in scale: a larger first layer makes all its features larger."""
    weights, pair, logits = resnet18().state_dict(), images(2, 64, 64), []
    for factor in (1, 0.06, 16):
        torch.save(weights | {"conv1.weight": factor * weights["conv1.weight"]}, tmp_path / "weights.pt")
        torch.manual_seed(0)
        model = FusionUNet(str(tmp_path / "weights.pt"), backbone="resnet18")
        logits.append(model(*pair))
        features = model.encode(torch.randn(4, 3, 128, 128))
        for stride, feature, rms in zip(STRIDES, features, network.FEATURE_RMS, strict=True):
            scaled = (model.get_submodule(f"side{stride}").gain * feature).numpy()
            assert np.sqrt(np.square(scaled).mean()) == pytest.approx(rms, rel=0.1)
    torch.testing.assert_close(logits[1:], 2 * [logits[0]])


def test_frozen_means_frozen():
    torch.manual_seed(0)
    model = FusionUNet(weights=None).train()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.1)
    assert not any(feature.requires_grad for feature in model.encode(model.prepare(*images(1, 32, 32))))
    for _ in range(2):
        optimizer.zero_grad()
        model(*images(2, 64, 64)).mean().backward()
        optimizer.step()
    learned = {name for name, value in model.state_dict().items() if not torch.equal(value, start[name])}
    constants = {"mean", "std", *(f"side{stride}._extra_state" for stride in STRIDES)}
    assert learned == model.trained_state().keys() - constants
    assert not any(name.startswith("stages.") for name in learned)
    assert 2e6 < sum(value.numel() for value in model.parameters() if value.requires_grad) < 3e6


def test_not_frozen_learns_everywhere():
    model = FusionUNet(weights=None, freeze_backbone=False)
    model(*images(2, 64, 64)).mean().backward()
    assert all(parameter.grad is not None and parameter.requires_grad for parameter in model.parameters())
    assert model.stages["32"].layer4.training and model.trained_state().keys() == model.state_dict().keys()


# Prediction


@pytest.fixture(scope="module")
def steep(model) -> FusionUNet:
    """The model with so steep a head that probabilities spread over 0..1."""
    steep = copy.deepcopy(model)
    with torch.no_grad():
        steep.head.weight *= 2 / steep(*images(2, 256, 256)).std()
        steep.head.bias.zero_()
        steep.head.bias -= steep(*images(2, 256, 256)).mean()
    return steep


def whole_pass(model: FusionUNet, image_a: Tensor, image_b: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(image_a[None], image_b[None])[0, 0].sigmoid()


def smooth_pair(height: int, width: int) -> list[Tensor]:
    """Blobs of some size, as an aerial image has, and noise on top."""
    generator = torch.Generator().manual_seed(0)
    blobs = torch.rand(2, 3, math.ceil(height / 16), math.ceil(width / 16), generator=generator)
    blobs = nn.functional.interpolate(blobs, size=(height, width), mode="bicubic")
    blobs = (blobs + 0.1 * torch.randn(blobs.shape, generator=generator)).clamp(0, 1)
    return list((blobs * 255).byte())


def test_probabilities_by_hand():
    logits = torch.tensor([0.0, 2.0, 5.0]).log()  # odds against "unchanged", which has 1
    one_class, three_classes = logits.view(3, 1, 1, 1), logits.view(3, 1, 1)
    assert probabilities(one_class).flatten().tolist() == pytest.approx([0, 2 / 3, 5 / 6])
    assert probabilities(three_classes).flatten().tolist() == pytest.approx([0, 2 / 8, 5 / 8])


def test_predict_keeps_the_mode_and_gives_probabilities_of_each_class(model):
    image_a, image_b = smooth_pair(50, 40)
    probability = model.train().predict(image_a, image_b, amp=False)
    assert model.training
    torch.testing.assert_close(probability, whole_pass(model.eval(), image_a, image_b))
    assert FusionUNet(weights=None, backbone="resnet18", out_channels=2).predict(image_a, image_b).shape == (2, 50, 40)


def test_tiles_agree_with_one_pass(steep):
    image_a, image_b = smooth_pair(700, 600)  # neither a tile nor a stride divides these
    whole = whole_pass(steep, image_a, image_b)
    difference = (steep.predict(image_a, image_b, tile_size=512, amp=False) - whole).abs()[64:-64, 64:-64]
    assert whole.std() > 0.1
    assert difference.max() > 0  # there were tiles
    assert difference.mean() < 1e-3 and difference.flatten().sort().values[-difference.numel() // 1000] < 0.05


@pytest.mark.parametrize("length", [1, 33, 512, 513, 700, 1000, 1999])
def test_weights_of_tiles_add_up_to_one(length):
    total = torch.zeros(length)
    for start, weight in network._blending(length, 512):
        assert start % STRIDES[-1] == 0 and 0 < len(weight) <= 512
        assert start == 0 or weight[:64].max() < 1e-5  # where a tile lacks context
        total[start : start + len(weight)] += weight
    torch.testing.assert_close(total, torch.ones(length))


def test_bfloat16_changes_hardly_a_pixel(steep, monkeypatch):
    pair = smooth_pair(256, 256)
    float32 = steep.predict(*pair, amp=False)
    monkeypatch.setattr(network, "fast_dtype", lambda device: torch.bfloat16)
    bfloat16 = steep.predict(*pair)
    assert not torch.equal(float32, bfloat16)
    assert (float32 - bfloat16).abs().mean() < 0.005
    assert ((float32 > 0.5) != (bfloat16 > 0.5)).float().mean() < 0.005


def test_test_time_augmentation_is_the_mean_logit_of_eight_views(steep):
    pair = torch.stack(smooth_pair(64, 96))
    views = []
    for mirrored in (False, True):
        for turns in range(4):
            turned = torch.rot90(pair.flip(-2) if mirrored else pair, turns, (2, 3))
            answer = torch.rot90(whole_pass(steep, *turned).logit(), -turns)
            views.append(answer.flip(0) if mirrored else answer)
    expected = torch.stack(views).mean(0).sigmoid()
    assert (expected - views[0].sigmoid()).abs().max() > 0.1
    torch.testing.assert_close(steep.predict(*pair, tta=True, amp=False), expected, atol=1e-4, rtol=0)


def test_files_arrays_and_tensors_give_the_same(model, tmp_path):
    pair = smooth_pair(47, 33)
    arrays = [image.permute(1, 2, 0).numpy() for image in pair]
    arrays[0].flags.writeable = False
    for name, array in zip("ab", arrays, strict=True):
        Image.fromarray(array).save(tmp_path / f"{name}.png")
    expected = model.predict(*pair)
    assert torch.equal(model.predict(*arrays), expected)
    assert torch.equal(model.predict(*(array[..., ::-1][..., ::-1] for array in arrays)), expected)
    assert torch.equal(model.predict(tmp_path / "a.png", str(tmp_path / "b.png")), expected)
    torch.testing.assert_close(model.predict(*(image.double() / 255 for image in pair)), expected)


FLOATS, BYTES = torch.zeros(3, 8, 8), np.zeros((8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((FLOATS, FLOATS[..., 1:]), "torch.float32 (3, 8, 8) and torch.float32 (3, 8, 7)"),
        ((FLOATS.int(), FLOATS.int()), "not torch.int32 (3, 8, 8)"),
        ((BYTES.astype(float), BYTES), "not float64 (8, 8, 3)"),
        ((None, None), "not NoneType"),
        (("nowhere.png", "nowhere.png"), "nowhere.png: "),
        ((BYTES, BYTES, 1000), "tile_size=1000: must be a multiple of 32, 512 or more"),
    ],
)
def test_what_cannot_be_predicted(model, arguments, message):
    with pytest.raises(DataError, match=rf"^.*{re.escape(message)}.*\Z"):
        model.predict(*arguments)


# Weights and checkpoints


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """An empty cache for weights."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    return tmp_path / "hub" / "checkpoints"


def test_weights_from_a_file(tmp_path):
    """In torchvision's names, or as a training script wraps them, without the last layer."""
    torch.manual_seed(1)
    trained, file = resnet50(), tmp_path / "mine.pth"
    states = {name: value for name, value in trained.state_dict().items() if not name.startswith("fc.")}
    for content in (trained.state_dict(), {"state_dict": {f"module.{name}": states[name] for name in states}}):
        torch.save(content, file)
        model = FusionUNet(str(file), freeze_backbone=False)
        assert torch.equal(model.stages["32"].layer4[2].bn3.weight, trained.layer4[2].bn3.weight)
    del states["layer4.2.bn3.weight"]
    torch.save(states | {"more": torch.zeros(1)}, file)
    with pytest.raises(ModelError, match=r'not of this BACKBONE; Missing key.*: "layer4\.2\.bn3\.weight"\.'):
        FusionUNet(str(file))


@pytest.mark.parametrize("broken", [None, b"", b"PK\3\4 cut short"])
def test_weights_that_cannot_be_downloaded_or_read(hub, monkeypatch, broken):
    monkeypatch.setattr(ResNet50_Weights.IMAGENET1K_V1.value, "url", "http://127.0.0.1:9/resnet50-0676ba61.pth")
    if broken is not None:
        (hub / "resnet50-0676ba61.pth").write_bytes(broken)
    with pytest.raises(ModelError) as error:
        FusionUNet("IMAGENET1K_V1")
    message = str(error.value)
    assert str(hub / "resnet50-0676ba61.pth") in message and "WEIGHTS=None" in message and "\n" not in message


def test_a_checkpoint_gives_the_model_back(tmp_path):
    torch.manual_seed(0)
    arguments, pair = {"backbone": "resnet18", "out_channels": 2}, images(2, 64, 64)
    model = FusionUNet(weights=None, **arguments)
    model(*pair)  # moves BatchNorm's statistics
    model.threshold, model.side8.gain = 0.25, 3.0  # as of pretrained features
    network.save_checkpoint(model.eval().checkpoint() | {"more": 1}, tmp_path / "best.pt")
    to_predict = FusionUNet.load(tmp_path, "cpu")  # the folder of a run
    to_train = FusionUNet(str(tmp_path / "best.pt"), **arguments)
    assert not to_predict.training and to_train.training
    for loaded in (to_predict, to_train.eval()):
        torch.testing.assert_close(loaded(*pair), model(*pair))
        assert loaded.threshold == 0.25
        assert loaded.backbone_checksum() == pytest.approx(model.backbone_checksum(), rel=1e-12)


def test_unusable_checkpoints(tmp_path):
    file, model = tmp_path / "x.pt", FusionUNet(weights=None, backbone="resnet18")
    whole = model.checkpoint()
    contents = {
        "KeyError": {"model": whole["model"], "model_args": model.arguments},
        "RuntimeError": whole | {"model_args": {"backbone": "resnet50"}},
    }
    for reason, content in contents.items():
        torch.save(content, file)
        message = rf"x\.pt: belongs to another model or version \({reason}\); give the best\.pt of a run\Z"
        with pytest.raises(ModelError, match=message):
            FusionUNet.load(file, "cpu")
    network.save_checkpoint(whole, file)
    with pytest.raises(ModelError, match=r"x\.pt: trained with NUM_CLASSES=1, not 3; give that too\Z"):
        FusionUNet(str(file), backbone="resnet18", out_channels=3)


# Optimizers


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_muon_agrees_with_torchs(memory_format):
    """Kernels of different sizes at once, whose gradients may lie in memory in another order than they do."""
    torch.manual_seed(0)
    starts = [torch.randn(shape) for shape in ((8, 6, 3, 3), (8, 32, 1, 1), (64, 3, 3, 3), (100, 100, 1, 1))]
    kernels = [nn.Parameter(start.clone().contiguous(memory_format=memory_format)) for start in starts]
    matrices = [nn.Parameter(start.flatten(1).clone()) for start in starts]
    options = {"lr": 0.1, "weight_decay": 0.5}
    ours = KernelMuon([*kernels, nn.Parameter(torch.ones(2, 3, 1, 1))], **options)  # the last has no gradient
    torchs = torch.optim.Muon(matrices, **options, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for kernel, matrix in zip(kernels, matrices, strict=True):
            kernel.grad = torch.randn(kernel.shape)
            matrix.grad = kernel.grad.flatten(1).clone()
        ours.step()
        torchs.step()
    for start, kernel, matrix in zip(starts, kernels, matrices, strict=True):
        change = (matrix - start.flatten(1)).abs().mean()
        assert (kernel.flatten(1) - matrix).abs().max() < 0.03 * change  # torch's computes in bfloat16
        assert kernel.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("frozen", [True, False])
def test_each_parameter_has_one_optimizer(frozen):
    model = FusionUNet(weights=None, freeze_backbone=frozen, backbone="resnet18")
    groups = [(type(each), group) for each in make_optimizers(model, 1e-2, 0) for group in each.param_groups]
    rates = {id(value): (kind, group["lr"]) for kind, group in groups for value in group["params"]}
    assert len(rates) == sum(len(group["params"]) for _, group in groups)
    for name, value in model.named_parameters():
        if name.startswith("stages."):
            expected = None if frozen else (torch.optim.AdamW, pytest.approx(1e-3))
        else:
            is_kernel = value.ndim == 4 and name != "head.weight"
            expected = KernelMuon if is_kernel else torch.optim.AdamW, 1e-2
        assert rates.get(id(value)) == expected, name


# The machine, and other programs


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (DataError("Caught DataError in worker 0.\nTraceback …\ndataset.DataError: x.png: broken"), "x.png: broken"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you"), "out of memory: lower SIZE"),
        (RuntimeError("Caught _ArrayMemoryError in DataLoader worker process 0.\n…"), "out of memory: lower SIZE"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."), "a process that loads data died"),
        (KeyError("Caught KeyError in DataLoader worker process 0.\n…"), None),
    ],
)
def test_users_mistakes_are_one_line_and_bugs_keep_their_traceback(error, line):
    found = error_line(error, memory="SIZE")
    assert found is None if line is None else found.startswith(line) and "\n" not in found
