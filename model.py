"""FusionUNet: a UNet over a frozen backbone that sees both dates and fuses their features at every scale.

Beside it: the backbone's stages, checkpoints, the optimizers that train it, and the device it runs on.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import errno
import functools
import hashlib
import io
import itertools
import math
import os
import pickle
import re
import weakref
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision import models
from tqdm import tqdm

from dataset import DataError, ImageLike, as_tensor, written_whole

STRIDES = (2, 4, 8, 16, 32)  # pixels
CHANNELS = (32, 64, 96, 128, 128)  # what is trained is so wide at these strides
OVERLAP = 256  # pixels that neighbouring tiles of a large image share
BACKBONE_RATE = 0.1  # of the learning rate, for a backbone that is trained: it has learned already
BACKBONES = "give a classifier of torchvision's such as resnet50, convnext_tiny or swin_t"
CHECKPOINTS = "give the best.pt or last.pt of a run"


class ModelError(RuntimeError):
    """A backbone, weights, a checkpoint or a device that can't be had; the message says what to do."""


def resized(images: Tensor, height: int, width: int) -> Tensor:
    """(…, H, W) cut at the right and bottom, or enlarged by repeating the last column and row.

    By indices and not by slices and padding, which `torch.export` would trace for the sizes alone that need them.
    """
    if not torch.compiler.is_exporting() and images.shape[-2:] == (height, width):
        return images
    rows, columns = (
        torch.arange(new, device=images.device).clamp(max=old - 1)
        for new, old in zip((height, width), images.shape[-2:], strict=True)
    )
    return images.index_select(-2, rows).index_select(-1, columns)


class ConvNormReLU(nn.Sequential):
    """k × k convolution that keeps the size, or divides it by the stride, BatchNorm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1):
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )


class Side(nn.Module):
    """Step of the small encoder that is trained beside the frozen one, a ladder (Sung et al. 2022, arXiv:2206.06522).

    The finer step, halved in size, plus the frozen features of this stride, if there are any.
    """

    def __init__(self, finer_channels: int, frozen_channels: int, out_channels: int):
        super().__init__()
        self.down = nn.Conv2d(finer_channels, out_channels, 3, stride=2, padding=1, bias=False)
        self.narrow = nn.Conv2d(frozen_channels, out_channels, 1, bias=False) if frozen_channels else None
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, finer: Tensor, frozen: Tensor | None) -> Tensor:
        x = self.down(finer) if frozen is None else self.down(finer) + self.narrow(frozen)
        return F.relu(self.norm(x), inplace=True)


class Concatenation(nn.Module):
    """Both dates' features side by side, mixed by a 3 × 3 convolution, which can learn what came first."""

    def __init__(self, channels: int):
        super().__init__()
        self.mix = ConvNormReLU(2 * channels, channels, 3)

    def forward(self, features: Tensor) -> Tensor:
        dates = features.permute(0, 2, 3, 1).unflatten(0, (2, -1))  # (2, N, h, w, channels)
        # One copy in the order of channels_last; slices and `cat`, there and back, take a CPU eight times as long.
        return self.mix(dates.permute(1, 2, 3, 0, 4).flatten(3).permute(0, 3, 1, 2))


class Difference(Concatenation):
    """The sum and the absolute difference of both dates' features, mixed likewise: their order makes no difference."""

    def forward(self, features: Tensor) -> Tensor:
        before, after = features.tensor_split(2)
        return self.mix(torch.cat([before + after, (before - after).abs()], dim=1))


class CrossAttention(Concatenation):
    """Each date adds what it finds anywhere in the other one, of four heads; then they are concatenated.

    Vaswani et al. 2017, arXiv:1706.03762, without positions: what a place looks like is in its features.
    """

    HEADS = 4

    def __init__(self, channels: int):
        super().__init__(channels)
        self.query, self.key_value = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, 2 * channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        n, c, h, w = features.shape  # (2N, channels, h, w)
        other = features.roll(len(features) // 2, 0)
        query = self.query(features).view(n, self.HEADS, -1, h * w).mT  # (2N, heads, h·w, channels / heads)
        key, value = self.key_value(other).view(n, 2, self.HEADS, -1, h * w).mT.unbind(1)
        found = F.scaled_dot_product_attention(query, key, value).mT.reshape(n, c, h, w)
        return super().forward(features + found)


FUSIONS = {  # at each of the strides
    "concatenation": [Concatenation] * 5,
    "difference": [Difference] * 5,
    "attention": [Concatenation] * 3 + [CrossAttention] * 2,
}


class Up(nn.Module):
    """Decoder step: narrow, enlarge to twice the size, add the skip, two 3 × 3 convolutions."""

    def __init__(self, in_channels: int, skip_channels: int):
        super().__init__()
        self.narrow = nn.Conv2d(in_channels, skip_channels, 1, bias=False)
        self.conv1 = ConvNormReLU(skip_channels, skip_channels, 3)
        self.conv2 = ConvNormReLU(skip_channels, skip_channels, 3)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = F.interpolate(self.narrow(x), scale_factor=2, mode="bilinear", align_corners=False)
        return self.conv2(self.conv1(x + skip))


class FusionUNet(nn.Module):
    """Change logits from two co-registered images.

    A Siamese UNet (Ronneberger et al. 2015, doi:10.1007/978-3-319-24574-4_28; Daudt et al. 2018,
    doi:10.1109/ICIP.2018.8451652) over a classifier of torchvision's, such as the ResNet-50 (He et al. 2016,
    doi:10.1109/CVPR.2016.90), and a small encoder beside it.

    Args:
        weights: name of a member of the backbone's weights in torchvision; or a file: of such weights, or a checkpoint
            of a run, whose every weight is taken; None for an untrained backbone.
        freeze_backbone: the backbone gets no gradients and its BatchNorm statistics stay as they are, in training too.
        out_channels: logits per pixel, one for each class of change; the logit of "unchanged" is 0.
        backbone: name of a classifier of torchvision's with features at strides 4, 8, 16 and 32.
        fusion: how both dates' features become one: "concatenation", "difference" or "attention", as in `FUSIONS`.

    Raises:
        ModelError: the backbone, the weights or the fusion have an unknown name or can't be had.
    """

    def __init__(
        self,
        weights: str | None = "IMAGENET1K_V1",
        freeze_backbone: bool = True,
        out_channels: int = 1,
        backbone: str = "resnet50",
        fusion: str = "concatenation",
    ):
        super().__init__()
        if fusion not in FUSIONS:
            raise ModelError(f"FUSION={fusion}: unknown; there are {', '.join(FUSIONS)}")
        self.freeze_backbone, self.backbone, self.fusion = freeze_backbone, backbone, fusion
        self.threshold = 0.5  # probability above which a pixel counts as changed; `load` sets both as in the checkpoint
        self.amp = True  # autocast to `fast_dtype`; False: float32
        self.tta = False  # test-time augmentation, in `predict` and in scores
        self.origin = ""  # run and epoch, as pictures say them
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))  # of ImageNet, for 0..1
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))

        file = read_whole(weights) if weights and Path(weights).expanduser().is_file() else {}
        whole = file["model"] if "model_args" in file else {}  # of a run's checkpoint
        stages = cut_into_stages(backbone, None if whole else weights, file)
        self.stages, (f2, f4, f8, f16, f32), self._channels_last = stages
        if freeze_backbone:
            fold(self.stages.eval().requires_grad_(False))

        c2, c4, c8, c16, c32 = CHANNELS
        self.side2, self.side4, self.side8 = Side(3, f2, c2), Side(c2, f4, c4), Side(c4, f8, c8)
        self.side16, self.side32 = Side(c8, f16, c16), Side(c16, f32, c32)
        fusions = [fuse(channels) for fuse, channels in zip(FUSIONS[fusion], CHANNELS, strict=True)]
        self.fuse2, self.fuse4, self.fuse8, self.fuse16, self.fuse32 = fusions
        self.up16, self.up8, self.up4, self.up2 = Up(c32, c16), Up(c16, c8), Up(c8, c4), Up(c4, c2)
        self.head = nn.Conv2d(c2, out_channels, 1)
        nn.init.constant_(self.head.bias, -3.0)  # change is rare: begin at 5 % (Lin et al. 2017, arXiv:1708.02002)
        if whole:
            ours, theirs = self.model_args(), file["model_args"]
            others = [f"{name.upper()}={theirs[name]}" for name in ours if theirs.get(name, ours[name]) != ours[name]]
            if others:
                given = " ".join(others).replace("OUT_CHANNELS", "NUM_CLASSES")
                raise ModelError(f"WEIGHTS={weights}: trained with {given}; give that too")
            _fit(self, whole, weights)
        self.train()

    def forward(self, image_a: Tensor, image_b: Tensor) -> Tensor:
        """Logits of change.

        Args:
            image_a: the image before, (N, 3, H, W), uint8 or float in 0..1; any H and W.
            image_b: the image after, likewise.

        Returns:
            (N, out_channels, H, W); of one channel, positive means changed.
        """
        images = self.prepare(image_a, image_b)
        f2, f4, f8, f16, f32 = self.encode(images)
        s2 = self.side2(images, f2)  # (2N, 32, H/2, W/2)
        s4 = self.side4(s2, f4)  # (2N, 64, H/4, W/4)
        s8 = self.side8(s4, f8)  # (2N, 96, H/8, W/8)
        s16 = self.side16(s8, f16)  # (2N, 128, H/16, W/16)
        s32 = self.side32(s16, f32)  # (2N, 128, H/32, W/32)
        x = self.fuse32(s32)  # (N, 128, H/32, W/32)
        x = self.up16(x, self.fuse16(s16))  # (N, 128, H/16, W/16)
        x = self.up8(x, self.fuse8(s8))  # (N, 96, H/8, W/8)
        x = self.up4(x, self.fuse4(s4))  # (N, 64, H/4, W/4)
        x = self.up2(x, self.fuse2(s2))  # (N, 32, H/2, W/2)
        x = self.head(x).float()  # (N, out_channels, H/2, W/2)
        logits = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)  # (N, out_channels, H, W)
        return resized(logits, *image_a.shape[-2:])

    def prepare(self, image_a: Tensor, image_b: Tensor) -> Tensor:
        """Both dates normalised, first all A then all B: float (2N, 3, H, W).

        H and W are enlarged to multiples of 32 by repeating the last column and row, so that each scale halves exactly.
        """
        images, end = torch.cat([image_a, image_b]), STRIDES[-1]
        images = resized(images, *((length + end - 1) // end * end for length in images.shape[-2:]))
        if images.dtype == torch.uint8:
            images = images / 255
        return ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def encode(self, images: Tensor) -> list[Tensor | None]:
        """The backbone's features at strides 2, 4, 8, 16 and 32; None where it has none, as a Swin at stride 2."""
        stages, kind = self.stages, images.device.type
        if self.freeze_backbone and torch.is_autocast_enabled(kind) and not torch.compiler.is_compiling():
            stages = cast_once(stages, torch.get_autocast_dtype(kind))
        x, features = images, [None] * (len(STRIDES) - len(stages))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_backbone):
            for stage in stages.values():  # of a ResNet-50 64, 256, 512, 1024 and 2048 channels
                x = stage(x)
                features.append(x.permute(0, 3, 1, 2) if self._channels_last else x)
        return features

    def train(self, mode: bool = True) -> FusionUNet:
        """Training mode for all but a frozen backbone, whose BatchNorm would otherwise go on learning."""
        super().train(mode)
        if self.freeze_backbone:
            self.stages.eval()
        return self

    def autocast(self) -> torch.autocast:
        """What `forward` is called in: `fast_dtype`, where `amp` is on."""
        dtype = fast_dtype(self.mean.device) if self.amp else torch.float32
        return torch.autocast(self.mean.device.type, dtype, enabled=dtype != torch.float32)

    def predict(self, image_a: ImageLike, image_b: ImageLike, tile_size: int = 1152, tta: bool = False) -> Tensor:
        """Probability of change for one pair of any size, on the model's device, without gradients.

        What is larger than a tile is cut into tiles that overlap and are blended. Beside the images and the result,
        memory holds one tile's features: about 1 GB for 1024 pixels in float32.

        Args:
            image_a: the image before: a file, a uint8 array (H, W, 3), or a tensor (3, H, W), uint8 or float in 0..1.
            image_b: the image after, likewise.
            tile_size: largest side of a tile in pixels, a multiple of 32 of at least 512; one takes one pass.
            tta: test-time augmentation, average over flips and quarter turns; takes eight times as long. The attribute
                `tta` sets it for all predictions.

        Returns:
            float32 (H, W) in 0..1, on the CPU; with several classes of change (out_channels, H, W), of each.

        Raises:
            DataError: an image that can't be read or is of another kind or size, or a tile size that doesn't fit.
        """
        image_a, image_b = as_tensor(image_a), as_tensor(image_b)
        kinds = [f"{image.dtype} {tuple(image.shape)}" for image in (image_a, image_b)]
        if kinds[0] != kinds[1]:
            raise DataError(f"a pair of two kinds or sizes, {' and '.join(kinds)}: give two images of one")
        if tile_size % STRIDES[-1] or tile_size < 2 * OVERLAP:
            raise DataError(f"tile_size={tile_size}: must be a multiple of {STRIDES[-1]}, {2 * OVERLAP} or more")
        tta = tta or self.tta
        rows, columns = (_blending(length, tile_size) for length in image_a.shape[1:])
        was_training, device, tiles = self.training, self.mean.device, len(rows) * len(columns)
        probability = torch.zeros(self.head.out_channels, *image_a.shape[1:])
        self.eval()
        try:
            with (
                torch.inference_mode(),
                self.autocast(),
                tqdm(total=tiles, unit="tile", leave=False, disable=None, delay=1) as bar,
            ):
                for (y, weight_y), (x, weight_x) in itertools.product(rows, columns):
                    window = slice(None), slice(y, y + len(weight_y)), slice(x, x + len(weight_x))
                    tile = torch.stack([image_a[window], image_b[window]]).to(device)
                    of_tile = self.probability(*tile[:, None], tta)[0].cpu()
                    probability[window] += weight_y[:, None] * weight_x * of_tile
                    bar.update()
        finally:
            self.train(was_training)
        return probability.clamp_(max=1).squeeze(0)  # weights add up to 1 but for rounding

    def probability(self, image_a: Tensor, image_b: Tensor, tta: bool) -> Tensor:
        """Probability of change, (N, out_channels, H, W), of a batch as in `forward`; `tta` as in `predict`."""
        views = list(itertools.product(range(4), (False, True))) if tta else [(0, False)]
        probability = torch.zeros(1, device=image_a.device)
        for turns, mirrored in views:
            view = torch.rot90(torch.stack([image_a, image_b]), turns, (-2, -1))
            logits = self(*(view.flip(-1) if mirrored else view))
            logits = torch.rot90(logits.flip(-1) if mirrored else logits, -turns, (-2, -1))
            probability = probability + F.pad(logits, (0, 0, 0, 0, 1, 0)).softmax(1)[:, 1:] / len(views)
        return probability

    @classmethod
    def load(cls, path: str | os.PathLike, device: str | torch.device | None = None) -> FusionUNet:
        """The model of a checkpoint that a run wrote (`best.pt`, `last.pt`), ready to predict; fetches no weights.

        Args:
            path: the checkpoint, or the folder of its run, of which it is `best.pt`.
            device: None takes the GPU where there is one.

        Raises:
            ModelError: no such file, not a checkpoint, or one of another model.
        """
        path = Path(path).expanduser()
        path = path / "best.pt" if path.is_dir() else path
        checkpoint = read_whole(path)
        try:
            with torch.device("meta"):  # no weights are drawn that the checkpoint's replace at once
                model = cls(weights=None, **checkpoint["model_args"])
            model.load_state_dict(checkpoint["model"], assign=True)
            model.threshold, model.amp = float(checkpoint.get("threshold", 0.5)), bool(checkpoint.get("amp", True))
            model.origin = f"{path.resolve().parent.name}, epoch {checkpoint['epoch']}" if "epoch" in checkpoint else ""
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise ModelError(f"{path}: of another model ({type(error).__name__}); {CHECKPOINTS}") from error
        return model.to(pick_device(device), memory_format=torch.channels_last).eval()

    def model_args(self) -> dict[str, object]:
        """What it was made with, but for the weights."""
        classes, frozen = self.head.out_channels, self.freeze_backbone
        return {"out_channels": classes, "backbone": self.backbone, "fusion": self.fusion, "freeze_backbone": frozen}

    def checkpoint(self, whole: bool = True) -> dict:
        """All that `load` needs to give this model back; not whole, it leaves a frozen backbone to the file beside."""
        checkpoint = {"model_args": self.model_args(), "model": self.state_dict()}
        checkpoint |= {"threshold": self.threshold, "amp": self.amp}
        if self.freeze_backbone and not whole:
            checkpoint["model"] = {name: value for name, value in checkpoint["model"].items() if not _is_frozen(name)}
            checkpoint["frozen"] = self._frozen_digest
        return checkpoint

    @functools.cached_property
    def _frozen_digest(self) -> str:
        return _digest(self.state_dict())


def _blending(length: int, tile_size: int) -> list[tuple[int, Tensor]]:
    """Where tiles begin along a side of an image, at multiples of 32, and the weight of each of their pixels.

    There are as few as can be, all of one size, no larger than needed. The weights add up to 1: from an inner edge on
    they are 0 for a quarter of the overlap, where the tile lacks its surroundings, then rise in a straight line over
    the next half.
    """
    stride = STRIDES[-1]
    end = -(-length // stride) * stride
    tiles = max(1, math.ceil((end - OVERLAP) / (tile_size - OVERLAP)))
    side = math.ceil((end + OVERLAP * (tiles - 1)) / tiles / stride) * stride
    starts = [number * (side - OVERLAP) for number in range(tiles - 1)] + [end - side]
    pixel = torch.arange(length)
    weights = torch.ones(len(starts), length)
    for weight, start in zip(weights, starts, strict=True):
        left = pixel - start + 0.5 if start else torch.full((length,), torch.inf)
        right = start + side - pixel - 0.5 if start + side < end else torch.full((length,), torch.inf)
        weight[:] = ((torch.minimum(left, right) - OVERLAP / 4) / (OVERLAP / 2)).clamp(0, 1)
    weights /= weights.sum(0)
    return [(start, weight[start : start + side]) for start, weight in zip(starts, weights, strict=True)]


# The backbone


def cut_into_stages(
    backbone: str, weights: str | None, file: dict[str, Tensor] | None = None
) -> tuple[nn.ModuleDict, list[int], bool]:
    """A classifier's layers up to each stride, the channels at `STRIDES`, and whether they come last, as in a Swin.

    The layers are the children of its `features` or, without these, its own, each fed with what the one before gave,
    as far as the sizes that they give are those of `STRIDES`: a classifier built so needs no code here.
    """
    classifier = _classifier(backbone, None if file else weights).eval()
    if file and weights:
        _fit(classifier, file.get("state_dict", file), weights)
    sizes = {(64 // stride, 96 // stride): max(stride, 2) for stride in (1, *STRIDES)}  # of the features of 64 × 96
    x, stages, channels, channels_last, end = torch.zeros(1, 3, 64, 96), {}, {2: 0}, False, "the last"
    for name, layer in getattr(classifier, "features", classifier).named_children():
        try:
            with torch.no_grad():
                x = layer(x)
            channels_last = tuple(x.shape[1:3]) in sizes
            stride = sizes[tuple(x.shape[1:3] if channels_last else x.shape[2:])]
        except Exception:  # here the chain of layers ends: what comes now takes or gives something else
            end = name
            break
        stages.setdefault(str(stride), nn.Sequential()).add_module(name, layer)
        channels[stride] = x.shape[-1 if channels_last else 1]
    if missing := set(STRIDES) - channels.keys():
        raise ModelError(
            f"BACKBONE={backbone}: its chain of layers, up to {end}, gives no features at stride "
            f"{', '.join(map(str, sorted(missing)))}; {BACKBONES}"
        )
    return nn.ModuleDict(stages), [channels[stride] for stride in STRIDES], channels_last


def _fit(module: nn.Module, states: dict[str, Tensor], file: str) -> None:
    """Load weights of a file; of a classifier its last layer, which isn't used, may be missing or another."""
    own = module.state_dict()
    head = list(own)[-1].rpartition(".")[0] + "." if not isinstance(module, FusionUNet) else "-"
    states = {name.removeprefix("module."): value for name, value in states.items()}
    wanted = {name for name in own if not name.startswith(head) and not name.endswith("num_batches_tracked")}
    fitting = {name for name in own.keys() & states.keys() if getattr(states[name], "shape", None) == own[name].shape}
    extra = {name for name in states.keys() - own.keys() if not name.startswith(head)}
    if wrong := sorted(wanted - fitting) + sorted(extra):
        raise ModelError(
            f"WEIGHTS={file}: of {len(wanted)} keys {len(wanted - fitting)} are missing or of another shape, and "
            f"{len(extra)} are unknown, such as {', '.join(wrong[:3])}; give weights of this BACKBONE, or a checkpoint"
        )
    module.load_state_dict({name: states[name] for name in fitting}, strict=False)


def _classifier(backbone: str, weights: str | None) -> nn.Module:
    """The classifier, its weights from torchvision's cache or fetched into it."""
    if backbone not in models.list_models(module=models):
        raise ModelError(f"BACKBONE={backbone}: unknown; {BACKBONES}")
    if weights is None:
        return models.get_model(backbone)
    known = models.get_model_weights(backbone)
    if weights not in known.__members__:
        names = ", ".join(known.__members__)
        raise ModelError(f"WEIGHTS={weights}: unknown; there are {names} and None, and no file is called so")
    try:
        return models.get_model(backbone, weights=weights)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:  # not fetched, or a broken file
        url, reason = known[weights].url, str(error).partition("\n")[0]
        file = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
        message = f"the ImageNet weights can't be had ({reason}): put {url} at {file}, or set WEIGHTS=None"
        raise ModelError(message) from error


def fold(module: nn.Module) -> None:
    """Put each BatchNorm into the convolution before it, in place: the same features, sooner."""
    for (name, layer), (after, norm) in itertools.pairwise(list(module.named_children())):
        if isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            setattr(module, name, fuse_conv_bn_eval(layer, norm))
            setattr(module, after, nn.Identity())
    for child in module.children():
        fold(child)


_CAST: weakref.WeakKeyDictionary[nn.Module, tuple[object, nn.Module]] = weakref.WeakKeyDictionary()


def cast_once(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of a frozen module with the weights that autocast would cast at each step, made anew when they change.

    What is written through `weight.data` isn't seen.
    """
    weights = [(id(each), each.device, 0 if each.is_inference() else each._version) for each in module.parameters()]
    state = dtype, weights
    if module not in _CAST or _CAST[module][0] != state:
        with torch.inference_mode(False):
            cast = copy.deepcopy(module)
            for layer in cast.modules():
                if isinstance(layer, nn.Conv2d | nn.Linear):
                    layer.to(dtype)
        _CAST[module] = state, cast
    return _CAST[module][1]


# Checkpoints


def read_whole(path: str | os.PathLike) -> dict:
    """A checkpoint, or weights, with the frozen backbone that a run's last.pt leaves to its best.pt."""
    checkpoint = read_checkpoint(path)
    if digest := checkpoint.get("frozen"):
        checkpoint["model"] |= _frozen_beside(path, digest)
    return checkpoint


def read_checkpoint(path: str | os.PathLike) -> dict:
    """What `torch.save` wrote, its checksums tested, which torch leaves out; ModelError where it is damaged."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise ModelError(f"{path}: no such checkpoint; {CHECKPOINTS}")
    try:
        if zipfile.is_zipfile(path):  # older weights are none
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise zipfile.BadZipFile(f"checksum of {damaged}")
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch.load has no error of its own: a broken file raises what its reader meets
        raise ModelError(f"{path}: no checkpoint, or a damaged one ({type(error).__name__}); {CHECKPOINTS}") from error


def _frozen_beside(path: str | os.PathLike, digest: str) -> dict[str, Tensor]:
    """The frozen backbone that a run's last.pt leaves to its best.pt, where it need not be written at each epoch."""
    best = Path(path).with_name("best.pt")
    states = read_checkpoint(best).get("model", {})
    if _digest(states) != digest:
        raise ModelError(f"{best}: not the backbone that {path} was trained over; bring back the one of its run")
    return {name: value for name, value in states.items() if _is_frozen(name)}


def _is_frozen(name: str) -> bool:
    return name.startswith("stages.")


def _digest(states: dict[str, Tensor]) -> str:
    """Of a frozen backbone's weights."""
    digest = hashlib.sha256()
    for name in filter(_is_frozen, states):
        digest.update(states[name].cpu().contiguous().numpy())
    return digest.hexdigest()


def save(checkpoint: dict, path: Path) -> None:
    """Write a checkpoint; in memory first, since torch turns an error of the disk into one of its own."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    with written_whole(path, "wb") as file:
        file.write(buffer.getbuffer())


# What trains it


class KernelMuon(torch.optim.Optimizer):
    """Muon for convolutions, a kernel being a matrix of one row for each output channel.

    It makes every direction in which the gradient points about equally long, and so learns from fewer batches than
    AdamW (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon), with momentum as `torch.optim.Muon` has it.
    Its Newton–Schulz iteration is one polynomial of the small square matrix M Mᵀ: these are brought to a few sizes, and
    all of a size are multiplied at once.

    Args:
        kernels: (out_channels, in_channels, height, width) each.
        lr: learning rate; a step is as long as one of AdamW's (Liu et al. 2025, arXiv:2502.16982).
        weight_decay: decoupled.
        momentum: of Nesterov's kind.
    """

    COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5  # Jordan's

    def __init__(self, kernels: Sequence[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(kernels, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        """A step down the kernels' gradients."""
        (group,) = self.param_groups
        kernels = [kernel for kernel in group["params"] if kernel.grad is not None]
        gradients = [kernel.grad for kernel in kernels]
        for kernel in kernels:
            if not self.state[kernel]:
                self.state[kernel]["momentum"] = torch.zeros_like(kernel)
        momenta = [self.state[kernel]["momentum"] for kernel in kernels]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        directions = torch._foreach_lerp(gradients, momenta, group["momentum"])
        by_size: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for kernel, direction in zip(kernels, directions, strict=True):
            if kernel.is_contiguous(memory_format=torch.channels_last):
                kernel, direction = kernel.permute(0, 2, 3, 1), direction.permute(0, 2, 3, 1)
            weight, matrix = kernel.view(len(kernel), -1), direction.reshape(len(kernel), -1)
            if weight.shape[0] > weight.shape[1]:
                weight, matrix = weight.T, matrix.T
            by_size.setdefault(-(-len(matrix) // 64) * 64, []).append((weight, matrix))
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")  # a rounded M Mᵀ has negative eigenvalues, which would grow
        try:
            for size, pairs in by_size.items():
                factors = self._orthogonalising([matrix for _, matrix in pairs], size)
                for (weight, matrix), factor in zip(pairs, factors, strict=True):
                    rate = group["lr"] * 0.2 * max(matrix.shape) ** 0.5
                    factor = factor[: len(matrix), : len(matrix)]
                    weight.addmm_(factor, matrix, beta=1 - group["lr"] * group["weight_decay"], alpha=-rate)
        finally:
            torch.set_float32_matmul_precision(precision)

    def _orthogonalising(self, matrices: list[Tensor], size: int) -> Tensor:
        """(N, size, size): what each matrix, of at most so many rows, times which has singular values of about 1."""
        square = matrices[0].new_zeros(len(matrices), size, size)
        for each, matrix in zip(square, matrices, strict=True):
            torch.mm(matrix, matrix.T, out=each[: len(matrix), : len(matrix)])
        norm = square.diagonal(dim1=1, dim2=2).sum(1).clamp_(min=1e-14)[:, None, None]  # of Frobenius, squared
        square /= norm
        factor = torch.eye(size, device=square.device).expand_as(square)
        a, b, c = self.COEFFICIENTS
        for iteration in range(self.ITERATIONS):  # M ← a M + (b M Mᵀ + c (M Mᵀ)²) M
            polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)
            factor = torch.baddbmm(factor, polynomial, factor, beta=a)
            if iteration < self.ITERATIONS - 1:
                half = torch.baddbmm(square, polynomial, square, beta=a)
                square = torch.baddbmm(half, half, polynomial, beta=a)
        return factor / norm.sqrt()


def make_optimizers(model: nn.Module, learning_rate: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """What trains a `FusionUNet`: Muon for what it has of new convolutions, AdamW for the rest."""
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    backbone = [value for name, value in trained.items() if name.startswith("stages.")]
    decoder = {name: value for name, value in trained.items() if not name.startswith("stages.")}
    kernels = [value for name, value in decoder.items() if value.ndim == 4 and not name.startswith("head")]
    rest = [value for name, value in decoder.items() if value.ndim != 4 or name.startswith("head")]
    groups = [{"params": rest}] + [{"params": backbone, "lr": BACKBONE_RATE * learning_rate}] * bool(backbone)
    options = {"lr": learning_rate, "weight_decay": weight_decay}
    optimizers = [KernelMuon(kernels, **options), torch.optim.AdamW(groups, fused=True, **options)]
    for group in itertools.chain(*(optimizer.param_groups for optimizer in optimizers)):
        group["initial_lr"] = group["lr"]  # which a schedule multiplies
    return optimizers


# The machine


def pick_device(name: str | torch.device | None = None) -> torch.device:
    """The device of that name, once it was seen to work; None: the GPU of this process, or the CPU.

    Raises:
        ModelError: there is no such device, or it doesn't work.
    """
    try:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
        by_torchrun = found.type == "cuda" and "LOCAL_RANK" in os.environ
        # A process may see one GPU alone, as Slurm or CUDA_VISIBLE_DEVICES have it.
        index = int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count() if by_torchrun else None
        of_process = f"cuda:{index}" if by_torchrun else found.type
        device = torch.device(of_process if name in (None, found.type) else name)
        torch.zeros(1, device=device).item()
        if device.type == "cuda" and device.index:
            torch.cuda.set_device(device)  # else some of its memory and work goes to the first GPU
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(f"DEVICE={name}: {str(error).splitlines()[0]}; DEVICE=cpu always works") from error
    if device.type == "cpu":
        _keep_freed_memory()
    return device


def _keep_freed_memory() -> None:
    """Let glibc keep what is freed, up to 2 GiB: the kernel clears each page before it gives it out again."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no blocks of their own, which go back at once
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, bytes


def fast_dtype(device: torch.device) -> torch.dtype:
    """The dtype for autocast: bfloat16 where the device has it, else float16 on a GPU from Volta on, else float32."""
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16
        return torch.float16 if torch.cuda.get_device_capability(device) >= (7, 0) else torch.float32
    has_bfloat16 = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))
    return torch.bfloat16 if device.type == "cpu" and has_bfloat16 else torch.float32


def explanation(error: Exception, memory: str) -> str | None:
    """One line for a person, of an error that is the input's or the machine's; None if it is the program's.

    Args:
        error: what ended the program.
        memory: the options that save memory.
    """
    if getattr(error, "errno", None) == errno.ENOSPC:  # the message may name no file
        return "a disk is full: free some of it, then go on"
    if isinstance(error, DataError | ModelError | FloatingPointError | OSError):
        # The last line of several, if it comes from a worker; there it has the error's name.
        return re.sub(r"^[a-zA-Z.]+Error: ", "", str(error).splitlines()[-1])
    if isinstance(error, MemoryError) or re.search(
        "MemoryError|can't allocate memory|Cannot allocate memory", str(error)
    ):
        return f"the memory ran out: lower {memory}"
    if isinstance(error, torch.OutOfMemoryError):  # "CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has … is free."
        return f"{str(error).partition(' Of the allocated')[0]} Lower {memory}"
    if "closed by peer" in str(error) or isinstance(error, torch.distributed.DistError):
        return "another process of this run has ended; it says why"
    if "more than 1 value per channel" in str(error):
        return "BatchNorm has a single value a channel to go by at stride 32: raise BATCH_SIZE or CROP_SIZE"
    if type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
        return (
            f"COMPILE=True: nothing could be compiled here ({str(error).strip().splitlines()[0]}); COMPILE=False runs"
        )
    if "DataLoader worker" in str(error):
        return f"a process that loads data died, perhaps for want of memory: lower NUM_WORKERS ({error})"
    return None
