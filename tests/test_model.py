"""FusionUNet: shapes, freezing, weights, checkpoints, and the optimizers that train it."""

import copy
import inspect
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from torch import nn
from torchvision.models import ResNet50_Weights, resnet50

import model as program
from dataset import DataError
from model import STRIDES, FusionUNet, KernelMuon, ModelError, _blending, fast_dtype, make_optimizers, save


@pytest.fixture(scope="module")
def model() -> FusionUNet:
    torch.manual_seed(0)
    return FusionUNet(weights=None).eval()


def images(n: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.randint(0, 256, (2, n, 3, height, width), dtype=torch.uint8))


@pytest.mark.parametrize(("n", "height", "width"), [(1, 64, 96), (3, 128, 32)])
def test_shape_comments_are_true(model, n, height, width):
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
    checked = 0
    lines, first = inspect.getsourcelines(FusionUNet.forward)
    for number, line in enumerate(lines, first):
        if comment := re.match(r"\s+(\w+) = .*# \((.*)\)$", line):
            name, shape = comment.groups()
            shape = eval(f"({shape.replace('2N', '2 * N')})".replace("/", "//"),
                         {"N": n, "H": height, "W": width, "out_channels": 1})  # fmt: skip
            after = min(later for later in seen if later > number)  # the line run next
            assert seen[after][name] == shape, line
            checked += 1
    assert checked >= 12


@pytest.mark.parametrize("size", [(64, 64), (33, 47), (100, 70), (32, 250), (1, 1)])
def test_logits_have_the_size_of_the_input(model, size):
    assert model(*images(1, *size)).shape == (1, 1, *size)


def test_bytes_and_floats_are_one(model):
    image_a, image_b = images(2, 64, 64)
    torch.testing.assert_close(model(image_a, image_b), model(image_a / 255, image_b / 255))


def test_normalised_as_imagenet():
    model, seen = FusionUNet(weights=None, freeze_backbone=False).eval(), []
    hook = model.stages["2"].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(*images(1, 32, 32)[:1], torch.full((1, 3, 32, 32), 255, dtype=torch.uint8))
    hook.remove()
    expected = torch.tensor([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225])
    torch.testing.assert_close(seen[0][1], expected[:, None, None].expand(3, 32, 32))


@pytest.mark.parametrize("frozen", [True, False])
def test_encoder_is_torchvisions_resnet(hub, frozen):
    torch.manual_seed(0)
    trained = resnet50().eval()
    for norm in (module for module in trained.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.2, 2)
        nn.init.normal_(norm.bias)
        nn.init.normal_(norm.running_mean)
    torch.save(trained.state_dict(), hub / "resnet50-0676ba61.pth")
    model, pair = FusionUNet("IMAGENET1K_V1", frozen).eval(), images(1, 64, 64)
    trained.fc = nn.Identity()
    pooled = trained((torch.cat(pair) / 255 - model.mean) / model.std)
    features = model.encode(model.prepare(*pair))[-1].mean((2, 3))
    assert (features - pooled).abs().max() <= 1e-4 * pooled.abs().max()


@pytest.mark.parametrize("name", ["resnet18", "convnext_tiny", "swin_t", "efficientnet_b0", "densenet121"])
def test_any_backbone_with_these_strides(name, tmp_path):
    torch.manual_seed(0)
    model, pair = FusionUNet(weights=None, backbone=name), images(2, 64, 96)
    for feature, stride in zip(model.encode(model.prepare(*pair)), STRIDES, strict=True):
        assert feature.shape[2:] == (64 // stride, 96 // stride) if feature is not None else stride == 2
    before = model.checkpoint()["model"]["stages.4.1.0.block.0.weight"].clone() if name == "convnext_tiny" else None
    optimizer = torch.optim.AdamW((value for value in model.parameters() if value.requires_grad), 1e-2)
    losses = []
    for _ in range(3):
        loss = nn.functional.softplus(-model(*pair)).mean()  # low once all is called changed
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.1, losses
    assert before is None or torch.equal(before, model.state_dict()["stages.4.1.0.block.0.weight"])
    torch.save(model.checkpoint(), tmp_path / "best.pt")
    predicted = model.predict(*(image[0, :, :50, :70] for image in pair))
    loaded = FusionUNet.load(tmp_path / "best.pt", "cpu").predict(*(image[0, :, :50, :70] for image in pair))
    assert predicted.shape == (50, 70) and torch.equal(predicted, loaded)


@pytest.mark.parametrize("name", ["resnet50", "efficientnet_b0", "densenet121"])
def test_folding_is_exact(name):
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    try:
        (stages, *_), pictures = program.cut_into_stages(name, None), torch.randn(2, 3, 64, 96)
    finally:
        torch.set_default_dtype(torch.float32)
    for norm in (module for module in stages.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.2, 2)
        nn.init.normal_(norm.bias)
    plain = nn.Sequential(*copy.deepcopy(stages).eval().values())
    program.fold(stages.eval())
    folded, expected = nn.Sequential(*stages.values())(pictures), plain(pictures)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in stages.modules()) == (
        62 if name == "densenet121" else 0
    )
    assert (folded - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize("name", ["vit_b_16", "fcn_resnet50", "resnet"])
def test_backbones_that_cannot_be(name):
    with pytest.raises(ModelError, match=f"BACKBONE={name}: .*; give a classifier of torchvision's such as resnet50"):
        FusionUNet(weights=None, backbone=name)


@pytest.mark.parametrize("fusion", program.FUSIONS)
def test_the_order_of_the_dates_makes_no_difference_to_the_difference_alone(fusion):
    torch.manual_seed(0)
    model, (image_a, image_b) = FusionUNet(weights=None, fusion=fusion).eval(), images(2, 64, 64)
    forth, back = model(image_a, image_b), model(image_b, image_a)
    gap = (forth - back).abs().max()
    assert gap < 1e-4 if fusion == "difference" else gap > 0.01 * forth.std()


def test_attention_finds_what_stands_elsewhere_in_the_other_date():
    torch.manual_seed(0)
    fuse, channels, size = program.CrossAttention(8), 8, 4
    features = torch.randn(2, channels, size, size)
    moved = features.clone()
    moved[1] = features[1].flatten(1)[:, torch.randperm(size**2)].view(channels, size, size)

    def attended(features):
        seen = []
        fuse.mix.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        fuse.eval()(features)
        return seen[0]

    # What the first date finds depends on what is in the second, not on where.
    torch.testing.assert_close(attended(moved)[:, :channels], attended(features)[:, :channels])
    # By hand: the first head has the first two of eight channels.
    query = fuse.query(features)[0, :2].flatten(1)  # (2, 16)
    key, value = fuse.key_value(features)[1].view(2, 4, 2, 16)[:, 0]
    weights = (query.T @ key / 2**0.5).softmax(1)
    torch.testing.assert_close(attended(features)[0, :2] - features[0, :2], (value @ weights.T).view(2, size, size))


def test_an_unknown_fusion():
    with pytest.raises(ModelError, match="FUSION=sum: unknown; there are concatenation, difference, attention"):
        FusionUNet(weights=None, fusion="sum")


def test_probabilities_of_classes():
    torch.manual_seed(0)
    model, (image_a, image_b) = FusionUNet(weights=None, out_channels=2).eval(), images(2, 64, 64)
    forth = model(image_a, image_b)
    probability = in_float32(model).predict(image_a[0], image_b[0])
    odds = forth[0].exp()
    torch.testing.assert_close(probability, odds / (1 + odds.sum(0)))


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
    backbone = {name for name in start if name.startswith("stages.")}
    assert not learned & backbone
    assert learned == start.keys() - backbone - {"mean", "std"}
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert 2e6 < trainable < 3e6


def test_not_frozen_learns_everywhere():
    model = FusionUNet(weights=None, freeze_backbone=False)
    model(*images(2, 64, 64)).mean().backward()
    assert all(parameter.grad is not None and parameter.requires_grad for parameter in model.parameters())
    assert model.stages["32"].layer4.training


# predict


@pytest.fixture(scope="module")
def lively(model) -> FusionUNet:
    """The model, its head made so steep that probabilities spread over 0..1."""
    lively = copy.deepcopy(model)
    with torch.no_grad():
        logits = lively(*images(2, 256, 256))
        lively.head.weight *= 2 / logits.std()
        lively.head.bias.zero_()
        lively.head.bias -= lively(*images(2, 256, 256)).mean()
    return lively


def in_float32(model: FusionUNet) -> FusionUNet:
    model = copy.copy(model)  # of the same weights
    model.amp = False
    return model


def whole_pass(model: FusionUNet, image_a: torch.Tensor, image_b: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        logits = model(image_a[None], image_b[None])[0]
        return torch.cat([torch.zeros_like(logits), logits]).softmax(0)[1]


def test_predict_leaves_the_mode_and_gives_probabilities(model):
    image_a, image_b = (image[0] for image in images(1, 50, 40))
    model = in_float32(model).train()
    probability = model.predict(image_a, image_b)
    assert model.training and not model.stages["4"].training
    model.eval()
    torch.testing.assert_close(probability, whole_pass(model, image_a, image_b))


def smooth_pair(height: int, width: int) -> list[torch.Tensor]:
    """Blobs of some size, as an aerial image has, and noise on top."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(2, 3, height // 16, width // 16, generator=generator)
    blobs = nn.functional.interpolate(noise, size=(height, width), mode="bicubic")
    blobs = (blobs + 0.1 * torch.randn(blobs.shape, generator=generator)).clamp(0, 1)
    return list((blobs * 255).byte())


def test_tiles_agree_with_one_pass(lively):
    image_a, image_b = smooth_pair(700, 600)  # no tile and no stride divides these
    whole = whole_pass(lively, image_a, image_b)
    difference = (in_float32(lively).predict(image_a, image_b, tile_size=512) - whole).abs()[64:-64, 64:-64]
    assert whole.std() > 0.1
    assert difference.max() > 0  # there were tiles
    assert difference.mean() < 1e-3 and difference.flatten().sort().values[-difference.numel() // 1000] < 0.05


def test_what_fits_into_a_tile_is_one_pass(lively):
    image_a, image_b = smooth_pair(490, 512)
    predicted = in_float32(lively).predict(image_a, image_b, tile_size=512)
    assert torch.equal(predicted, whole_pass(lively, image_a, image_b))


@pytest.mark.parametrize("length", [1, 33, 512, 513, 700, 1000, 1999])
def test_weights_of_tiles_add_up_to_one(length):
    total = torch.zeros(length)
    for start, weight in _blending(length, 512):
        assert start % STRIDES[-1] == 0 and 0 < len(weight) <= 512
        if start:
            assert weight[:64].max() == 0  # where a tile lacks its surroundings
        total[start : start + len(weight)] += weight
    torch.testing.assert_close(total, torch.ones(length))


def test_tiles_are_no_larger_than_needed():
    def tiles(length: int) -> list[tuple[int, int]]:
        return [(start, len(weight)) for start, weight in _blending(length, 1024)]

    assert tiles(1024) == [(0, 1024)]
    assert tiles(1025) == [(0, 672), (384, 641)]  # (1056 + 256) / 2 = 656, and the next multiple of 32
    assert tiles(1792) == [(0, 1024), (768, 1024)]
    assert tiles(1824) == [(0, 800), (544, 800), (1024, 800)]  # (1824 + 2 × 256) / 3 = 779


def test_bfloat16_moves_hardly_a_pixel(lively):
    pair = smooth_pair(256, 256)
    half = lively.predict(*pair)
    whole = in_float32(lively).predict(*pair)
    assert torch.equal(whole, half) == (fast_dtype(torch.device("cpu")) == torch.float32)
    assert (whole - half).abs().mean() < 0.005 and ((whole > 0.5) != (half > 0.5)).float().mean() < 0.005


def cast_features(model: FusionUNet, pair: list[torch.Tensor], frozen: bool = True) -> list[torch.Tensor]:
    model.freeze_backbone = frozen  # if not, autocast itself casts the weights
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        features = model.encode(model.prepare(*pair))
    model.freeze_backbone = True
    return features


def test_frozen_weights_are_cast_once():
    torch.manual_seed(0)
    model, pair = FusionUNet(weights=None, backbone="resnet18"), images(1, 64, 64)
    cast = []

    def assert_right(model: FusionUNet, is_new: bool) -> None:
        for one, other in zip(cast_features(model, pair), cast_features(model, pair, frozen=False), strict=True):
            assert one.dtype == other.dtype == torch.bfloat16 and torch.equal(one, other)
        cast.append(program.cast_once(model.stages, torch.bfloat16))
        assert (cast[-1] not in cast[:-1]) == is_new

    assert_right(model, True)
    assert_right(model, False)
    assert not any(value.dtype == torch.bfloat16 for value in model.checkpoint()["model"].values())
    twin = copy.deepcopy(model)
    twin.load_state_dict(FusionUNet(weights=None, backbone="resnet18").state_dict())
    assert_right(twin, True)
    with torch.no_grad():
        next(model.stages.parameters()).mul_(2)
    assert_right(model, True)


def test_no_seam_where_nothing_changes_its_look(lively):
    """A pattern that repeats every 64 pixels gives an answer that does so too, across all tiles."""
    image_a, image_b = (image.repeat(1, 12, 12) for image in smooth_pair(64, 64))
    probability = lively.predict(image_a, image_b, tile_size=512)[256:-256, 256:-256]
    pattern = probability[:64, :64].repeat(4, 4)
    assert (probability - pattern).abs().max() < 0.02 < probability.std()


def test_files_arrays_and_tensors_are_one(model, tmp_path):
    pair = smooth_pair(47, 33)
    arrays = [image.permute(1, 2, 0).numpy() for image in pair]
    for name, array in zip("ab", arrays, strict=True):
        Image.fromarray(array).save(tmp_path / f"{name}.png")
    arrays[0].flags.writeable = False
    expected = model.predict(*pair)
    assert torch.equal(model.predict(*(array[..., ::-1][..., ::-1] for array in arrays)), expected)
    torch.testing.assert_close(model.predict(*(image.double() / 255 for image in pair)), expected)
    assert expected.shape == (47, 33)
    assert torch.equal(model.predict(*arrays), expected)
    assert torch.equal(model.predict(tmp_path / "a.png", str(tmp_path / "b.png")), expected)
    torch.testing.assert_close(model.predict(*(image / 255 for image in pair)), expected)


def test_test_time_augmentation_is_the_mean_over_eight_views(model):
    pair = torch.stack(smooth_pair(64, 96))
    views = []
    for mirrored in (False, True):
        for turns in range(4):
            turned = torch.rot90(pair.flip(-2) if mirrored else pair, turns, (2, 3))
            answer = torch.rot90(whole_pass(model, *turned), -turns)
            views.append(answer.flip(0) if mirrored else answer)
    torch.testing.assert_close(in_float32(model).predict(*pair, tta=True), torch.stack(views).mean(0))


@pytest.mark.parametrize(
    ("image_a", "image_b", "message"),
    [
        (torch.zeros(3, 8, 8), torch.zeros(3, 8, 9), "(3, 8, 8) and torch.float32 (3, 8, 9)"),
        (torch.zeros(3, 8, 8), np.zeros((8, 8, 3), np.uint8), "torch.float32 (3, 8, 8) and torch.uint8 (3, 8, 8)"),
        (torch.zeros(3, 8, 8).int(), torch.zeros(3, 8, 8).int(), "not torch.int32 (3, 8, 8)"),
        (torch.zeros(1, 8, 8), torch.zeros(3, 8, 8), "not torch.float32 (1, 8, 8)"),
        (np.zeros((8, 8, 3)), np.zeros((8, 8, 3)), "not float64 (8, 8, 3)"),
        (None, None, "not NoneType"),
        ("nowhere.png", "nowhere.png", "nowhere.png: "),
    ],
)
def test_images_that_cannot_be_predicted(model, image_a, image_b, message):
    with pytest.raises(DataError, match=re.escape(message)) as error:
        model.predict(image_a, image_b)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("tile_size", [256, 1000])
def test_tiles_that_cannot_be(model, tile_size):
    with pytest.raises(DataError, match=f"tile_size={tile_size}"):
        model.predict(*smooth_pair(32, 32), tile_size=tile_size)


# Weights and checkpoints


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
    model = FusionUNet("IMAGENET1K_V1", freeze_backbone=False)
    assert torch.equal(model.stages["2"].conv1.weight, trained.conv1.weight)
    assert torch.equal(model.stages["32"].layer4[2].bn3.weight, trained.layer4[2].bn3.weight)


@pytest.mark.parametrize("legacy", [False, True])
def test_weights_of_a_file(tmp_path, legacy):
    """In torchvision's names, with or without the last layer, and of whatever age."""
    torch.manual_seed(1)
    trained = resnet50()
    states = {name: value for name, value in trained.state_dict().items() if legacy or not name.startswith("fc.")}
    torch.save(states, tmp_path / "mine.pth", _use_new_zipfile_serialization=not legacy)
    model = FusionUNet(str(tmp_path / "mine.pth"), freeze_backbone=False)
    assert torch.equal(model.stages["2"].conv1.weight, trained.conv1.weight)
    assert torch.equal(model.stages["32"].layer4[2].bn3.weight, trained.layer4[2].bn3.weight)
    del states["layer4.2.bn3.weight"]
    torch.save(states | {"more": torch.zeros(1)}, tmp_path / "mine.pth")
    said = r"of \d+ keys 1 are missing .*, and 1 are unknown, such as layer4\.2\.bn3\.weight, more"
    with pytest.raises(ModelError, match=said):
        FusionUNet(str(tmp_path / "mine.pth"))


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
    torch.save(model.checkpoint() | {"more": 1}, tmp_path / "best.pt")
    loaded, pair = FusionUNet.load(tmp_path / "best.pt", "cpu"), images(1, 64, 64)
    assert not loaded.training
    torch.testing.assert_close(loaded(*pair), model.eval()(*pair))


def test_a_checkpoint_takes_its_frozen_backbone_from_the_best_beside_it(tmp_path):
    torch.manual_seed(0)
    model, other = (FusionUNet(weights=None, backbone="resnet18").eval() for _ in range(2))
    pair, last, best = images(1, 64, 64), tmp_path / "last.pt", tmp_path / "best.pt"
    save(model.checkpoint(), best)  # of an earlier epoch
    nn.init.normal_(model.head.weight)
    model.threshold = 0.25
    save(model.checkpoint(), tmp_path / "whole.pt")
    save(model.checkpoint(whole=False), last)
    assert not any("stages" in name for name in torch.load(last)["model"])
    whole, loaded, earlier = (FusionUNet.load(file, "cpu") for file in (tmp_path / "whole.pt", last, best))
    assert torch.equal(loaded(*pair), whole(*pair)) and not torch.equal(loaded(*pair), earlier(*pair))
    torch.testing.assert_close(loaded(*pair), model(*pair))
    assert loaded.threshold == 0.25
    save(other.checkpoint(), best)
    with pytest.raises(ModelError, match=r"^\S+best\.pt: not the backbone that \S+last\.pt was trained over; .*\Z"):
        FusionUNet.load(last, "cpu")
    best.unlink()
    with pytest.raises(ModelError, match=r"^\S+best\.pt: no such checkpoint; .*\Z"):  # . is not the end of a line
        FusionUNet.load(last, "cpu")


# Optimizers


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(8, 6, 3, 3), (8, 32, 1, 1), (64, 3, 3, 3)])
def test_a_kernel_is_stepped_as_its_matrix_is(shape, memory_format):
    torch.manual_seed(0)
    start, gradients = torch.randn(shape), torch.randn(3, *shape)
    kernel = nn.Parameter(start.clone().contiguous(memory_format=memory_format))
    matrix = nn.Parameter(start.flatten(1).clone())
    options = {"lr": 0.1, "weight_decay": 0.5}
    ours = KernelMuon([kernel, nn.Parameter(torch.ones(2, 3, 1, 1))], **options)  # the other has no gradient
    torchs = torch.optim.Muon([matrix], **options, adjust_lr_fn="match_rms_adamw")
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
    kernels = {id(kernel) for kernel in muon.param_groups[0]["params"]}
    for name, value in model.named_parameters():
        if name.startswith("stages."):
            assert others.get(id(value)) == (None if frozen else pytest.approx(1e-3))
        elif value.ndim == 4 and name != "head.weight":
            assert id(value) in kernels and id(value) not in others
        else:
            assert others[id(value)] == 1e-2
    assert len(kernels) + len(others) == sum(value.requires_grad for value in model.parameters())


def test_directions_of_any_length_become_about_one():
    """Also those far shorter than the longest, of kernels of several sizes at once, in a precision set to less."""
    torch.manual_seed(0)
    shapes = [(8, 4, 3, 3), (40, 3, 3, 3), (64, 64, 3, 3), (100, 100, 1, 1)]
    lengths = [torch.logspace(0, -1.5, min(shape[0], shape[1] * shape[2] * shape[3])) for shape in shapes]
    kernels = []
    for shape, length in zip(shapes, lengths, strict=True):
        left, _, right = torch.linalg.svd(torch.randn(shape).flatten(1), full_matrices=False)
        kernels.append(nn.Parameter(torch.zeros(shape)))
        kernels[-1].grad = (left * length @ right).view(shape)
    KernelMuon(kernels, lr=1.0, weight_decay=0.0, momentum=0.0).step()
    for kernel in kernels:
        step = -kernel.detach().flatten(1) / (0.2 * max(kernel.flatten(1).shape) ** 0.5)
        assert 0.6 < (found := torch.linalg.svdvals(step)).min() and found.max() < 1.3
        # Each keeps its own direction: what was orthogonalised still points where the gradient does.
        assert (step * kernel.grad.flatten(1)).sum() > 0.6 * torch.linalg.svdvals(kernel.grad.flatten(1)).sum()


def test_a_kernel_that_was_moved_is_stepped_where_it_is():
    kernel, gradient = torch.randn(8, 4, 3, 3), torch.randn(8, 4, 3, 3)
    ends = []
    for moves in (False, True):
        layer = nn.Conv2d(4, 8, 3)
        layer.weight.data.copy_(kernel)
        optimizer = KernelMuon([layer.weight], lr=0.1, weight_decay=0.0)
        for _ in range(2):
            layer.weight.grad = gradient.clone()
            optimizer.step()
            if moves:
                layer.to(memory_format=torch.channels_last)
        ends.append(layer.weight.detach())
    torch.testing.assert_close(*ends)


def test_it_goes_on_as_if_nothing_had_happened():
    states = []
    for stop in (False, True):
        torch.manual_seed(0)
        layer = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
        optimizer = KernelMuon([layer.weight], lr=0.1, weight_decay=0.0)
        for step in range(4):
            if stop and step == 2:
                saved = optimizer.state_dict()
                optimizer = KernelMuon([layer.weight], lr=1, weight_decay=0.0)
                optimizer.load_state_dict(saved)
            layer.weight.grad = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        states.append(layer.weight.detach().clone())
    assert torch.equal(*states)


# Elsewhere


RUN_ELSEWHERE = """
import sys, torch
program, pairs = torch.export.load("model.pt2").module(), torch.load("pairs.pt")
torch.save([program(*pair) for pair in pairs], "logits.pt")
assert "model" not in sys.modules
"""


def test_an_exported_model_runs_without_this_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.save(FusionUNet(weights=None, backbone="resnet18").checkpoint(), "best.pt")
    (code,) = [cell for cell in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
               if "torch.export.export" in cell]  # fmt: skip
    exec(code.replace("runs/RUN_NAME", "best.pt"))
    pairs = [torch.rand(2, n, 3, height, width) for n, height, width in ((1, 64, 64), (3, 33, 47), (2, 320, 100))]
    torch.save(pairs, "pairs.pt")
    subprocess.run([sys.executable, "-c", RUN_ELSEWHERE], check=True)
    model = FusionUNet.load("best.pt", "cpu")
    for pair, logits in zip(pairs, torch.load("logits.pt"), strict=True):
        torch.testing.assert_close(logits, model(*pair), atol=1e-5, rtol=1e-5)
