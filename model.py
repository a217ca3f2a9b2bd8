"""FusionUNet, which sees both dates and fuses their features at every scale; its checkpoints, optimizers and device."""

from __future__ import annotations

import io
import itertools
import math
import os
import pickle
import re
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision import models

from dataset import DataError, ImageLike, as_tensor, atomic_write, progress

STRIDES = (2, 4, 8, 16, 32)  # pixels
CHANNELS = (32, 64, 96, 128, 128)  # of the trained encoder and decoder at each stride
FEATURE_RMS = (9.4, 10.1, 6.8, 4.1, 1.7)  # at each stride, to which a pretrained backbone's features are scaled
OVERLAP = 256  # pixels by which neighbouring tiles of a large image overlap
ATTENTION_HEADS = 4
BACKBONE_RATE = 0.1  # a trained backbone's share of the learning rate: it is pretrained
BACKBONES = "give a torchvision classifier such as resnet50, convnext_tiny or swin_t"
CHECKPOINTS = "give the best.pt of a run"


class ModelError(RuntimeError):
    """A backbone, weights, a checkpoint or a device that can't be used; the message says what to do."""


def crop_or_pad(images: Tensor, height: int, width: int) -> Tensor:
    """Images (…, H, W) cropped at the right and bottom, or padded there by repeating the last column and row.

    It indexes, because `torch.export` would specialise slices and padding to the sizes that it happens to see.
    """
    if not torch.compiler.is_exporting() and images.shape[-2:] == (height, width):
        return images
    rows = torch.arange(height, device=images.device).clamp(max=images.shape[-2] - 1)
    columns = torch.arange(width, device=images.device).clamp(max=images.shape[-1] - 1)
    return images.index_select(-2, rows).index_select(-1, columns)


class ConvNormReLU(nn.Sequential):
    """A 3 × 3 convolution that keeps the size, then BatchNorm and ReLU."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )


class Side(nn.Module):
    """A stage of the small trainable encoder: the previous stage at half the size plus the frozen features.

    This is a ladder beside a frozen network (Sung et al. 2022, arXiv:2206.06522). The frozen features are multiplied by
    a constant `gain`, because their scale differs from backbone to backbone.
    """

    def __init__(self, finer_channels: int, frozen_channels: int, out_channels: int):
        super().__init__()
        self.down = nn.Conv2d(finer_channels, out_channels, 3, stride=2, padding=1, bias=False)
        self.narrow = nn.Conv2d(frozen_channels, out_channels, 1, bias=False) if frozen_channels else None
        self.norm = nn.BatchNorm2d(out_channels)
        self.gain = 1.0  # a number, not a buffer, so that scaling and adding are one operator

    def forward(self, finer: Tensor, frozen: Tensor | None) -> Tensor:
        x = self.down(finer)
        if frozen is not None:
            x = torch.add(x, self.narrow(frozen), alpha=self.gain)
        return F.relu(self.norm(x), inplace=True)

    def get_extra_state(self) -> Tensor:
        """What `state_dict` holds beside weights and buffers: the gain."""
        return torch.tensor(self.gain)

    def set_extra_state(self, state: Tensor) -> None:
        """Take the gain from a `state_dict`."""
        self.gain = state.item()


class Concatenation(nn.Module):
    """Concatenates the features of both dates and mixes them by a 3 × 3 convolution, which can tell the dates apart."""

    def __init__(self, channels: int):
        super().__init__()
        self.mix = ConvNormReLU(2 * channels, channels)

    def forward(self, features: Tensor) -> Tensor:
        dates = features.permute(0, 2, 3, 1).unflatten(0, (2, -1))  # (2, N, h, w, channels)
        # One copy, already in channels_last order: slicing and `cat` take eight times as long on a CPU.
        return self.mix(dates.permute(1, 2, 3, 0, 4).flatten(3).permute(0, 3, 1, 2))


class Difference(Concatenation):
    """Mixes the sum and the absolute difference of both dates' features, so that their order has no effect."""

    def forward(self, features: Tensor) -> Tensor:
        before, after = features.tensor_split(2)
        return self.mix(torch.cat([before + after, (before - after).abs()], dim=1))


class CrossAttention(Concatenation):
    """Each date attends to the other, then both are concatenated; no positional encoding.

    Multi-head attention: Vaswani et al. 2017, arXiv:1706.03762.
    """

    def __init__(self, channels: int):
        super().__init__(channels)
        self.query, self.key_value = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, 2 * channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        n, c, h, w = features.shape  # (2N, channels, h, w)
        other = features.roll(len(features) // 2, 0)
        query = self.query(features).view(n, ATTENTION_HEADS, -1, h * w).mT  # (2N, heads, h·w, channels / heads)
        key, value = self.key_value(other).view(n, 2, ATTENTION_HEADS, -1, h * w).mT.unbind(1)
        found = F.scaled_dot_product_attention(query, key, value).mT.reshape(n, c, h, w)
        return super().forward(features + found)


FUSIONS = {  # one module per stride
    "concatenation": [Concatenation] * 5,
    "difference": [Difference] * 5,
    "attention": [Concatenation] * 3 + [CrossAttention] * 2,
}


class Up(nn.Module):
    """A decoder step: 1 × 1 convolution, upsample to twice the size, add the skip, two 3 × 3 convolutions."""

    def __init__(self, in_channels: int, skip_channels: int):
        super().__init__()
        self.narrow = nn.Conv2d(in_channels, skip_channels, 1, bias=False)
        self.conv1 = ConvNormReLU(skip_channels, skip_channels)
        self.conv2 = ConvNormReLU(skip_channels, skip_channels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = F.interpolate(self.narrow(x), scale_factor=2, mode="bilinear", align_corners=False)
        return self.conv2(self.conv1(x + skip))


class FusionUNet(nn.Module):
    """Logits of change from two co-registered images.

    A Siamese UNet (Ronneberger et al. 2015, doi:10.1007/978-3-319-24574-4_28; Daudt et al. 2018,
    doi:10.1109/ICIP.2018.8451652) over a torchvision classifier such as ResNet-50 (He et al. 2016,
    doi:10.1109/CVPR.2016.90), with a small trainable encoder beside it.

    There is one logit for each class of change. The logit of "unchanged" is fixed at 0, so the probabilities are a
    softmax over 1 + K logits; with one class, a sigmoid.

    Args:
        weights: name of the backbone's weights in torchvision; or a file, either of such weights or a run's checkpoint,
            from which all weights are taken; None for an untrained backbone.
        freeze_backbone: the backbone gets no gradients and keeps its BatchNorm statistics, also in training.
        out_channels: classes of change, K.
        backbone: name of a torchvision classifier with features at strides 4, 8, 16 and 32.
        fusion: how the features of both dates are fused: "concatenation", "difference" or "attention".

    Attributes:
        threshold: probability above which a pixel counts as changed; `load` sets the best one on validation.

    Raises:
        ModelError: the backbone, weights or fusion are unknown or can't be loaded.
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
        self.arguments = {
            "out_channels": out_channels, "backbone": backbone, "fusion": fusion, "freeze_backbone": freeze_backbone,
        }  # fmt: skip
        self.out_channels, self.freeze_backbone = out_channels, freeze_backbone
        self.threshold = 0.5
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))  # of ImageNet, for 0..1
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))

        file = read_checkpoint(weights) if weights and Path(weights).expanduser().is_file() else {}
        is_checkpoint = "model_args" in file
        classifier = make_classifier(backbone, None if file else weights)
        if file and not is_checkpoint:
            load_classifier(classifier, file, weights)
        self.stages, (f2, f4, f8, f16, f32), self._channels_last = cut_into_stages(classifier, backbone)
        if freeze_backbone:
            fold_batchnorm(self.stages.eval().requires_grad_(False))

        c2, c4, c8, c16, c32 = CHANNELS
        self.side2, self.side4, self.side8 = Side(3, f2, c2), Side(c2, f4, c4), Side(c4, f8, c8)
        self.side16, self.side32 = Side(c8, f16, c16), Side(c16, f32, c32)
        fusions = [fuse(channels) for fuse, channels in zip(FUSIONS[fusion], CHANNELS, strict=True)]
        self.fuse2, self.fuse4, self.fuse8, self.fuse16, self.fuse32 = fusions
        self.up16, self.up8, self.up4, self.up2 = Up(c32, c16), Up(c16, c8), Up(c8, c4), Up(c4, c2)
        self.head = nn.Conv2d(c2, out_channels, 1)
        nn.init.constant_(self.head.bias, -3.0)  # change is rare: start at 5 % (Lin et al. 2017, arXiv:1708.02002)
        if is_checkpoint:
            self._load_checkpoint(file, weights)
        elif weights is not None:
            self._scale_features()
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
        return crop_or_pad(logits, *image_a.shape[-2:])

    def prepare(self, image_a: Tensor, image_b: Tensor) -> Tensor:
        """Both dates normalised, first all A then all B: float (2N, 3, H, W).

        H and W are enlarged to multiples of 32 by repeating the last column and row, so that each scale halves exactly.
        """
        images, end = torch.cat([image_a, image_b]), STRIDES[-1]
        images = crop_or_pad(images, *((length + end - 1) // end * end for length in images.shape[-2:]))
        if images.dtype == torch.uint8:
            images = images / 255
        return ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def encode(self, images: Tensor) -> list[Tensor | None]:
        """The backbone's features at strides 2, 4, 8, 16 and 32; None where it has none, as a Swin at stride 2."""
        x, features = images, [None] * (len(STRIDES) - len(self.stages))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_backbone):
            for stage in self.stages.values():  # of a ResNet-50 64, 256, 512, 1024 and 2048 channels
                x = stage(x)
                features.append(x.permute(0, 3, 1, 2) if self._channels_last else x)
        return features

    @torch.no_grad()
    def _scale_features(self) -> None:
        """Choose the gain of each side so that the features of a fixed image of noise have the RMS `FEATURE_RMS`.

        These are the values of EfficientNet-Lite0, over which the learning rate was chosen; on aerial images they are
        0.6 to 1.4 times as large. An untrained backbone isn't scaled: random features would drown the encoder's.
        """
        noise = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
        sides = (self.side2, self.side4, self.side8, self.side16, self.side32)
        for side, features, rms in zip(sides, self.encode(noise), FEATURE_RMS, strict=True):
            if features is not None:
                side.gain = (rms / features.square().mean().sqrt()).item()

    def train(self, mode: bool = True) -> FusionUNet:
        """Set training mode; a frozen backbone stays in evaluation mode: no dropout, no BatchNorm that learns."""
        super().train(mode)
        if self.freeze_backbone:
            self.stages.eval()
        return self

    def average_over_flips(self, image_a: Tensor, image_b: Tensor) -> Tensor:
        """Test-time augmentation: the logits of `forward`, averaged over the eight flips and quarter turns."""
        total = torch.zeros((), device=image_a.device)
        for turns, mirrored in itertools.product(range(4), (False, True)):
            views = torch.rot90(torch.stack([image_a, image_b]), turns, (-2, -1))
            logits = self(*(views.flip(-1) if mirrored else views))
            total = total + torch.rot90(logits.flip(-1) if mirrored else logits, -turns, (-2, -1))
        return total / 8

    def predict(
        self, image_a: ImageLike, image_b: ImageLike, tile_size: int = 1152, tta: bool = False, amp: bool = True
    ) -> Tensor:
        """Probability of change for one pair of any size, without gradients.

        An image larger than a tile is cut into overlapping tiles, whose logits are blended. Besides the images and the
        result, memory holds the features of one tile: about 1 GB for 1024 pixels in float32.

        Args:
            image_a: the image before: a file, a uint8 array (H, W, 3), or a tensor (3, H, W), uint8 or float in 0..1.
            image_b: the image after, likewise.
            tile_size: largest side of a tile in pixels, a multiple of 32 of at least 512.
            tta: test-time augmentation: average over flips and quarter turns, which takes eight times as long.
            amp: autocast as in `autocast`; False for float32.

        Returns:
            float32 (H, W) in 0..1 on the CPU; with several classes (out_channels, H, W), the probability of each.

        Raises:
            DataError: an image can't be read, the two differ in kind or size, or the tile size doesn't fit.
        """
        return probabilities(self.predict_logits(image_a, image_b, tile_size, tta, amp)).squeeze(0)

    def predict_logits(
        self, image_a: ImageLike, image_b: ImageLike, tile_size: int = 1152, tta: bool = False, amp: bool = True
    ) -> Tensor:
        """The logits behind `predict`, with the same arguments: float32 (out_channels, H, W) on the CPU."""
        image_a, image_b = as_tensor(image_a), as_tensor(image_b)
        kind_a, kind_b = (f"{image.dtype} {tuple(image.shape)}" for image in (image_a, image_b))
        if kind_a != kind_b:
            raise DataError(f"the images of a pair differ, {kind_a} and {kind_b}: give two of one type and size")
        if tile_size % STRIDES[-1] or tile_size < 2 * OVERLAP:
            raise DataError(f"tile_size={tile_size}: must be a multiple of {STRIDES[-1]}, {2 * OVERLAP} or more")
        rows, columns = (_blending(length, tile_size) for length in image_a.shape[1:])
        forward = self.average_over_flips if tta else self
        was_training, device = self.training, self.mean.device
        logits = torch.zeros(self.out_channels, *image_a.shape[1:])
        self.eval()
        try:
            with torch.inference_mode(), autocast(device, amp):
                tiles = list(itertools.product(rows, columns))
                for (y, weight_y), (x, weight_x) in progress(tiles, unit="tile", delay=1):
                    window = slice(None), slice(y, y + len(weight_y)), slice(x, x + len(weight_x))
                    tile_a, tile_b = (image[window][None].to(device) for image in (image_a, image_b))
                    logits[window] += weight_y[:, None] * weight_x * forward(tile_a, tile_b)[0].cpu()
        finally:
            self.train(was_training)
        return logits

    @classmethod
    def load(cls, path: str | os.PathLike, device: str | torch.device | None = None) -> FusionUNet:
        """The model of a run's `best.pt`, ready to predict; downloads nothing.

        Args:
            path: the checkpoint, or the folder of the run.
            device: None for the GPU where there is one, else the CPU.

        Raises:
            ModelError: there is no such file, it isn't a checkpoint, or it belongs to another model.
        """
        path = Path(path).expanduser()
        path = path / "best.pt" if path.is_dir() else path
        try:
            model = cls(str(path), **read_checkpoint(path)["model_args"])
        except (KeyError, TypeError) as error:
            raise ModelError(f"{path}: belongs to another model ({error}); {CHECKPOINTS}") from error
        return model.to(pick_device(device), memory_format=torch.channels_last).eval()

    def _load_checkpoint(self, checkpoint: dict, path: str) -> None:
        """Take over the weights and the threshold of a checkpoint of a model with the same arguments."""
        for name, value in self.arguments.items():
            if (theirs := checkpoint["model_args"].get(name, value)) != value:
                constant = "NUM_CLASSES" if name == "out_channels" else name.upper()
                raise ModelError(f"{path}: trained with {constant}={theirs}, not {value}; give that too")
        if self.freeze_backbone and not any(name.startswith("stages.") for name in checkpoint["model"]):
            raise ModelError(f"{path}: holds no backbone, only what was trained over it; {CHECKPOINTS}")
        try:
            self.load_state_dict(checkpoint["model"])
            self.threshold = float(checkpoint["threshold"])
        except (KeyError, RuntimeError) as error:
            reason = f"belongs to another model or version ({type(error).__name__})"
            raise ModelError(f"{path}: {reason}; {CHECKPOINTS}") from error

    def checkpoint(self) -> dict:
        """All that `load` needs to restore this model."""
        return {"model_args": self.arguments, "model": self.state_dict(), "threshold": self.threshold}

    def trained_state(self) -> dict[str, Tensor]:
        """Its `state_dict` without a frozen backbone, which never changes."""
        state = self.state_dict()
        if self.freeze_backbone:
            state = {name: value for name, value in state.items() if not name.startswith("stages.")}
        return state

    def backbone_checksum(self) -> float:
        """A number by which the same backbone is recognised: the sum of its weights."""
        return sum(value.double().sum().item() for value in self.stages.parameters())


def probabilities(logits: Tensor) -> Tensor:
    """The probability of each class of change, (…, K, H, W) as the logits of `FusionUNet`."""
    return F.pad(logits, (0, 0, 0, 0, 1, 0)).softmax(-3)[..., 1:, :, :]


def _blending(length: int, tile_size: int) -> list[tuple[int, Tensor]]:
    """Where tiles start along a side of an image, at multiples of 32, and the weight of each of their pixels.

    There are as few tiles as possible, all of one size. The weights of all tiles add up to 1. At an inner edge they are
    about 0 for a quarter of the overlap, where a tile lacks context, then rise linearly over the next half.
    """
    stride = STRIDES[-1]
    end = math.ceil(length / stride) * stride
    tiles = max(1, math.ceil((end - OVERLAP) / (tile_size - OVERLAP)))
    side = math.ceil((end + OVERLAP * (tiles - 1)) / tiles / stride) * stride
    starts = [number * (side - OVERLAP) for number in range(tiles - 1)] + [end - side]
    from_left = torch.arange(side) + 0.5
    from_edge = torch.minimum(from_left, side - from_left)
    weight = ((from_edge - OVERLAP / 4) / (OVERLAP / 2)).clamp(1e-6, 1)  # not 0: an image's edge is in one tile alone
    total = torch.zeros(end)
    for start in starts:
        total[start : start + side] += weight
    return [(start, (weight / total[start : start + side])[: length - start]) for start in starts]


# The backbone


def make_classifier(backbone: str, weights: str | None) -> nn.Module:
    """A torchvision classifier; its weights come from torchvision's cache or are downloaded into it."""
    if backbone not in models.list_models(module=models):
        raise ModelError(f"BACKBONE={backbone}: unknown; {BACKBONES}")
    known = models.get_model_weights(backbone)
    if weights is not None and weights not in known.__members__:
        raise ModelError(f"WEIGHTS={weights}: no such file, nor one of {', '.join(known.__members__)}, None")
    try:
        return models.get_model(backbone, weights=weights)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:  # not downloaded, or a broken file
        url, reason = known[weights].url, str(error).partition("\n")[0]
        file = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
        raise ModelError(f"no ImageNet weights ({reason}): put {url} at {file}, or set WEIGHTS=None") from error


def load_classifier(classifier: nn.Module, file: dict, path: str) -> None:
    """Load weights from a file; those of the last layer, which isn't used, may be missing or have another shape."""
    last_layer = list(classifier.state_dict())[-1].rpartition(".")[0] + "."
    unused = {name: value for name, value in classifier.state_dict().items() if name.startswith(last_layer)}
    states = {name.removeprefix("module."): value for name, value in file.get("state_dict", file).items()}
    try:
        classifier.load_state_dict(states | unused)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()  # it may list hundreds of names
        raise ModelError(f"WEIGHTS={path}: not of this BACKBONE; {reason[:100]}") from error


def cut_into_stages(classifier: nn.Module, backbone: str) -> tuple[nn.ModuleDict, list[int], bool]:
    """Split a classifier's layers by the stride of their output.

    The layers are the children of its `features` or, where there are none, its own. Each is fed the output of the one
    before, as long as the output's stride is one of `STRIDES` or 1, which counts as 2. Any classifier built as such a
    chain works.

    Returns:
        The layers up to each stride; their output channels at each of `STRIDES`, 0 where there are none; whether the
        channels come last, as in a Swin.
    """
    strides = {(64 // stride, 96 // stride): max(stride, 2) for stride in (1, *STRIDES)}  # by the size of the features
    x, stages, channels, channels_last = torch.zeros(1, 3, 64, 96), {}, {2: 0}, False
    classifier.eval()
    for name, layer in getattr(classifier, "features", classifier).named_children():
        try:
            with torch.no_grad():
                x = layer(x)
            channels_last = tuple(x.shape[1:3]) in strides
            stride = strides[tuple(x.shape[1:3] if channels_last else x.shape[2:])]
        except Exception:  # the chain ends here: this layer expects or returns something else
            break
        stages.setdefault(str(stride), nn.Sequential()).add_module(name, layer)
        channels[stride] = x.shape[-1 if channels_last else 1]
    if missing := [str(stride) for stride in STRIDES if stride not in channels]:
        raise ModelError(f"BACKBONE={backbone}: gives no features at stride {', '.join(missing)}; {BACKBONES}")
    return nn.ModuleDict(stages), [channels[stride] for stride in STRIDES], channels_last


def fold_batchnorm(module: nn.Module) -> None:
    """Fold each BatchNorm into the convolution before it, in place: the same output, computed faster."""
    for (name, layer), (after, norm) in itertools.pairwise(list(module.named_children())):
        if isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            setattr(module, name, fuse_conv_bn_eval(layer, norm))
            setattr(module, after, nn.Identity())
    for child in module.children():
        fold_batchnorm(child)


# Checkpoints


def read_checkpoint(path: str | os.PathLike) -> dict:
    """What `torch.save` wrote to a file; ModelError where there is none or it is damaged."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise ModelError(f"{path}: no such checkpoint; {CHECKPOINTS}")
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch.load raises whatever its readers meet in a broken file
        raise ModelError(f"{path}: not a checkpoint, or damaged ({type(error).__name__}); {CHECKPOINTS}") from error


def save_checkpoint(checkpoint: dict, path: Path) -> None:
    """Write a checkpoint; into memory first, since torch replaces a disk's error by a less clear one."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    with atomic_write(path, "wb") as file:
        file.write(buffer.getbuffer())


# Optimizers


class KernelMuon(torch.optim.Optimizer):
    """Muon for convolutions (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).

    Each kernel is a matrix with one row per output channel. Its step is the gradient, with Nesterov momentum, after an
    approximate orthogonalisation that gives all its directions about equal length. The Newton–Schulz iteration for it
    is a polynomial of the Gram matrix M Mᵀ. All Gram matrices are padded to one size and multiplied as one batch.

    Args:
        kernels: (out_channels, in_channels, height, width) each.
        lr: learning rate; a step is about as long as one of AdamW (Liu et al. 2025, arXiv:2502.16982).
        weight_decay: decoupled.
        momentum: 0..1.
    """

    def __init__(self, kernels: Sequence[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(kernels, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        for kernel in kernels:
            self.state[kernel]["momentum"] = torch.zeros_like(kernel)

    @torch.no_grad()
    def step(self) -> None:
        """Update all kernels that have a gradient."""
        (group,) = self.param_groups
        kernels = [kernel for kernel in group["params"] if kernel.grad is not None]
        gradients = [kernel.grad for kernel in kernels]
        momenta = [self.state[kernel]["momentum"] for kernel in kernels]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        directions = torch._foreach_lerp(gradients, momenta, group["momentum"])
        matrices = [_as_wide_matrix(direction, kernel) for direction, kernel in zip(directions, kernels, strict=True)]
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")  # a rounded M Mᵀ has negative eigenvalues, which would grow
        for kernel, matrix, factor in zip(kernels, matrices, self._orthogonalizers(matrices), strict=True):
            rate = group["lr"] * 0.2 * max(matrix.shape) ** 0.5
            factor = factor[: len(matrix), : len(matrix)]
            weight = _as_wide_matrix(kernel, kernel)
            weight.addmm_(factor, matrix, beta=1 - group["lr"] * group["weight_decay"], alpha=-rate)
        torch.set_float32_matmul_precision(precision)

    def _orthogonalizers(self, matrices: list[Tensor]) -> Tensor:
        """For each matrix M the padded factor (size, size) for which factor · M has singular values of about 1."""
        size = max(len(matrix) for matrix in matrices)
        gram = torch.stack([F.pad(m @ m.T, (0, size - len(m), 0, size - len(m))) for m in matrices])
        squared_norm = gram.diagonal(dim1=1, dim2=2).sum(1).clamp_(min=1e-14)[:, None, None]
        gram /= squared_norm
        factor = torch.eye(size, device=gram.device).expand_as(gram)
        a, b, c = 3.4445, -4.7750, 2.0315  # Jordan's, for five iterations
        for _ in range(5):  # M ← (a + b M Mᵀ + c (M Mᵀ)²) M
            polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            factor = torch.baddbmm(factor, polynomial, factor, beta=a)
            half = torch.baddbmm(gram, polynomial, gram, beta=a)
            gram = torch.baddbmm(half, half, polynomial, beta=a)
        return factor / squared_norm.sqrt()


def _as_wide_matrix(tensor: Tensor, kernel: Tensor) -> Tensor:
    """A tensor of a kernel's shape as a matrix with no more rows than columns; of the kernel itself it is a view."""
    if kernel.is_contiguous(memory_format=torch.channels_last):  # the columns in another order, which Muon ignores
        tensor = tensor.permute(0, 2, 3, 1)
    matrix = tensor.reshape(len(tensor), -1)
    return matrix.T if matrix.shape[0] > matrix.shape[1] else matrix


def make_optimizers(model: FusionUNet, learning_rate: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon for the convolutions outside the backbone and the head, AdamW for everything else that is trained."""
    kernels, rest, backbone = [], [], []
    for name, value in model.named_parameters():
        if name.startswith("stages."):
            backbone.append(value)
        elif value.ndim == 4 and not name.startswith("head"):
            kernels.append(value)
        else:
            rest.append(value)
    groups = [{"params": rest, "lr": learning_rate}]
    if not model.freeze_backbone:
        groups.append({"params": backbone, "lr": BACKBONE_RATE * learning_rate})
    muon = KernelMuon(kernels, learning_rate, weight_decay)
    return [muon, torch.optim.AdamW(groups, weight_decay=weight_decay, fused=True)]


# The machine


def pick_device(name: str | torch.device | None = None) -> torch.device:
    """The device of that name, after a test that it works; None for this process's GPU or else the CPU.

    Raises:
        ModelError: there is no such device, or it doesn't work.
    """
    try:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
        device = found if name is None else torch.device(name)
        if device == torch.device("cuda") and "LOCAL_RANK" in os.environ:
            # A process may see only one GPU, as Slurm and CUDA_VISIBLE_DEVICES arrange.
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.zeros(1, device=device).item()
        if device.type == "cuda" and device.index:
            torch.cuda.set_device(device)  # otherwise some memory and work goes to the first GPU
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(f"device {name}: {str(error).splitlines()[0]}; cpu always works") from error
    return device


def fast_dtype(device: torch.device) -> torch.dtype:
    """The dtype for autocast: bfloat16 where the device has it, float16 on other GPUs from Volta on, else float32."""
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16
        return torch.float16 if torch.cuda.get_device_capability(device) >= (7, 0) else torch.float32
    has_bfloat16 = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))
    return torch.bfloat16 if device.type == "cpu" and has_bfloat16 else torch.float32


def autocast(device: torch.device, amp: bool) -> torch.autocast:
    """The context to call a model in: autocast to `fast_dtype`, or none."""
    dtype = fast_dtype(device) if amp else torch.float32
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def error_line(error: Exception, memory: str) -> str | None:
    """One line for a user's mistake or a limit of the machine; None for a bug, which deserves its traceback.

    Args:
        error: what ended the program.
        memory: the options that save memory.
    """
    text = str(error).strip() or type(error).__name__
    if isinstance(error, DataError | ModelError | FloatingPointError | OSError):
        return text.splitlines()[-1].rpartition("Error: ")[2]  # from a loader's worker it comes with a traceback
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or re.search("MemoryError|can't allocate memory", text):
        return f"out of memory: lower {memory}"
    if "DataLoader worker (pid" in text:
        return "a process that loads data died: set NUM_WORKERS=0, or give a container more with --shm-size"
    if isinstance(error, torch.distributed.DistError) or "closed by peer" in text:
        return "another process of this run ended; see its message"
    return None
