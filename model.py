"""FusionUNet: a UNet over a frozen backbone that sees both dates and fuses their features at every scale."""

from __future__ import annotations

import itertools
import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from data.backbone import STRIDES, cut_into_stages, fold
from data.files import CHECKPOINTS, ModelError, read_checkpoint
from data.images import DataError, ImageLike, as_tensor

CHANNELS = (32, 64, 96, 128, 128)  # what is trained is so wide at strides 2, 4, 8, 16 and 32
OVERLAP = 256  # pixels that neighbouring tiles of a large image share


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

    The finer step, halved in size, plus the frozen features of this stride narrowed, if there are any.
    """

    def __init__(self, finer_channels: int, frozen_channels: int, out_channels: int):
        super().__init__()
        self.down = ConvNormReLU(finer_channels, out_channels, 3, stride=2)
        self.narrow = ConvNormReLU(frozen_channels, out_channels, 1) if frozen_channels else None

    def forward(self, finer: Tensor, frozen: Tensor | None) -> Tensor:
        return self.down(finer) if frozen is None else self.down(finer) + self.narrow(frozen)


class Fusion(nn.Module):
    """Both dates' features, their sum and their difference mixed by a 3 × 3 convolution.

    Of the difference the sign is dropped, unless classes of change are told apart by it: then houses built and houses
    pulled down need not be learned twice.
    """

    def __init__(self, channels: int, ordered: bool):
        super().__init__()
        self.ordered = ordered
        self.mix = ConvNormReLU(2 * channels, channels, 3)

    def forward(self, features: Tensor) -> Tensor:
        before, after = features.chunk(2)  # (N, channels, h, w) each
        difference = after - before
        return self.mix(torch.cat([before + after, difference if self.ordered else difference.abs()], dim=1))


class Up(nn.Module):
    """Decoder step: enlarge to twice the size, concatenate the skip, two 3 × 3 convolutions."""

    def __init__(self, in_channels: int, skip_channels: int):
        super().__init__()
        self.conv1 = ConvNormReLU(in_channels + skip_channels, skip_channels, 3)
        self.conv2 = ConvNormReLU(skip_channels, skip_channels, 3)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        return self.conv2(self.conv1(torch.cat([x, skip], dim=1)))


class FusionUNet(nn.Module):
    """Change logits from two co-registered images.

    A Siamese UNet (Ronneberger et al. 2015, doi:10.1007/978-3-319-24574-4_28; Daudt et al. 2018,
    doi:10.1109/ICIP.2018.8451652) over a classifier of torchvision's, such as the ResNet-50 (He et al. 2016,
    doi:10.1109/CVPR.2016.90), and a small encoder beside it.

    Args:
        weights: name of a member of the backbone's weights in torchvision; None for an untrained one.
        freeze_backbone: the backbone gets no gradients and its BatchNorm statistics stay as they are, in training too.
        out_channels: logits per pixel, one for each class of change; the logit of "unchanged" is 0.
        backbone: name of a classifier of torchvision's with features at strides 4, 8, 16 and 32.

    Raises:
        ModelError: the backbone or the weights have an unknown name or can't be had.
    """

    def __init__(
        self,
        weights: str | None = "IMAGENET1K_V1",
        freeze_backbone: bool = True,
        out_channels: int = 1,
        backbone: str = "resnet50",
    ):
        super().__init__()
        self.freeze_backbone, self.backbone = freeze_backbone, backbone
        self.threshold = 0.5  # probability above which a pixel counts as changed; `load` sets that of the checkpoint
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))  # of ImageNet, for 0..1
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))

        self.stages, (f2, f4, f8, f16, f32), self._channels_last = cut_into_stages(backbone, weights)
        if freeze_backbone:
            fold(self.stages.eval().requires_grad_(False))

        c2, c4, c8, c16, c32 = CHANNELS
        self.side2, self.side4, self.side8 = Side(3, f2, c2), Side(c2, f4, c4), Side(c4, f8, c8)
        self.side16, self.side32 = Side(c8, f16, c16), Side(c16, f32, c32)
        fusions = [Fusion(channels, ordered=out_channels > 1) for channels in CHANNELS]
        self.fuse2, self.fuse4, self.fuse8, self.fuse16, self.fuse32 = fusions
        self.up16, self.up8, self.up4, self.up2 = Up(c32, c16), Up(c16, c8), Up(c8, c4), Up(c4, c2)
        self.head = nn.Conv2d(c2, out_channels, 1)
        nn.init.constant_(self.head.bias, -3.0)  # change is rare: begin at 5 % (Lin et al. 2017, arXiv:1708.02002)
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
        return logits[..., : image_a.shape[-2], : image_a.shape[-1]]

    def prepare(self, image_a: Tensor, image_b: Tensor) -> Tensor:
        """Both dates normalised, first all A then all B: float (2N, 3, H, W).

        H and W are enlarged to multiples of 32 by repeating the last column and row, so that each scale halves exactly.
        """
        images = torch.cat([image_a, image_b])
        if images.dtype == torch.uint8:
            images = images.float() / 255
        end = STRIDES[-1]
        images = F.pad(images, (0, -images.shape[-1] % end, 0, -images.shape[-2] % end), mode="replicate")
        return ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def encode(self, images: Tensor) -> list[Tensor | None]:
        """The backbone's features at strides 2, 4, 8, 16 and 32; None where it has none, as a Swin at stride 2."""
        x, features = images, [None] * (len(STRIDES) - len(self.stages))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_backbone):
            for stage in self.stages.values():  # of a ResNet-50 64, 256, 512, 1024 and 2048 channels
                x = stage(x)
                features.append(x.permute(0, 3, 1, 2) if self._channels_last else x)
        return features

    def train(self, mode: bool = True) -> FusionUNet:
        """Training mode for all but a frozen backbone, whose BatchNorm would otherwise go on learning."""
        super().train(mode)
        if self.freeze_backbone:
            self.stages.eval()
        return self

    def predict(self, image_a: ImageLike, image_b: ImageLike, tile_size: int = 1024, tta: bool = False) -> Tensor:
        """Probability of change for one pair of any size, on the model's device, without gradients.

        What is larger than a tile is cut into tiles that overlap and are blended. Beside the images and the result,
        memory holds one tile's features: about 1 GB for 1024 pixels in float32.

        Args:
            image_a: the image before: a file, a uint8 array (H, W, 3), or a tensor (3, H, W), uint8 or float in 0..1.
            image_b: the image after, likewise.
            tile_size: side of a tile in pixels, a multiple of 32 of at least 512; what fits into one is one pass.
            tta: test-time augmentation, average over flips and quarter turns; takes eight times as long.

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
        views = list(itertools.product(range(4), (False, True))) if tta else [(0, False)]
        rows, columns = (_blending(length, tile_size) for length in image_a.shape[1:])
        was_training, device, tiles = self.training, self.mean.device, len(rows) * len(columns)
        probability = torch.zeros(self.head.out_channels, *image_a.shape[1:])
        self.eval()
        try:
            with torch.inference_mode(), tqdm(total=tiles, unit="tile", leave=False, disable=None, delay=1) as bar:
                for (y, weight_y), (x, weight_x) in itertools.product(rows, columns):
                    window = slice(None), slice(y, y + len(weight_y)), slice(x, x + len(weight_x))
                    tile = torch.stack([image_a[window], image_b[window]]).to(device)
                    probability[window] += weight_y[:, None] * weight_x * self._predict_tile(tile, views).cpu()
                    bar.update()
        finally:
            self.train(was_training)
        return probability.clamp_(max=1).squeeze(0)  # weights add up to 1 but for rounding

    def _predict_tile(self, pair: Tensor, views: list[tuple[int, bool]]) -> Tensor:
        """Probability (K, h, w) for (2, 3, h, w), averaged over views: quarter turns, and whether to mirror then."""
        probability = torch.zeros(1, device=pair.device)
        for turns, mirrored in views:
            view = torch.rot90(pair, turns, (-2, -1))
            logits = self(*(view.flip(-1) if mirrored else view)[:, None])[0]
            logits = torch.rot90(logits.flip(-1) if mirrored else logits, -turns, (-2, -1))
            probability = probability + F.pad(logits, (0, 0, 0, 0, 1, 0)).softmax(0)[1:] / len(views)
        return probability

    @classmethod
    def load(cls, path: str | os.PathLike, device: str | torch.device | None = None) -> FusionUNet:
        """The model of a checkpoint that a run wrote (`best.pt`, `last.pt`), ready to predict; fetches no weights.

        Args:
            path: the checkpoint.
            device: None takes the GPU where there is one.

        Raises:
            ModelError: no such file, not a checkpoint, or one of another model.
        """
        checkpoint = read_checkpoint(path)
        try:
            with torch.device("meta"):  # no weights are drawn that the checkpoint's replace at once
                model = cls(weights=None, **checkpoint["model_args"])
            model.load_state_dict(checkpoint["model"], assign=True)
            model.threshold = float(checkpoint.get("threshold", 0.5))
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise ModelError(f"{path}: of another model ({type(error).__name__}); {CHECKPOINTS}") from error
        place = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return model.to(place, memory_format=torch.channels_last).eval()

    def checkpoint(self) -> dict:
        """All that `load` needs to give this model back."""
        model_args = {"out_channels": self.head.out_channels, "backbone": self.backbone}
        model_args["freeze_backbone"] = self.freeze_backbone
        return {"model_args": model_args, "model": self.state_dict(), "threshold": self.threshold}


def _blending(length: int, tile_size: int) -> list[tuple[int, Tensor]]:
    """Where tiles begin along a side of an image, at multiples of 32, and the weight of each of their pixels.

    They add up to 1. From an inner edge on they are 0 for a quarter of the overlap, where the tile lacks its
    surroundings, then rise in a straight line over the next half.
    """
    end = length + -length % STRIDES[-1]
    starts = [*range(0, max(0, end - tile_size), tile_size - OVERLAP), max(0, end - tile_size)]
    pixel = torch.arange(length)
    weights = torch.ones(len(starts), length)
    for weight, start in zip(weights, starts, strict=True):
        left = pixel - start + 0.5 if start else torch.full((length,), torch.inf)
        right = start + tile_size - pixel - 0.5 if start + tile_size < end else torch.full((length,), torch.inf)
        weight[:] = ((torch.minimum(left, right) - OVERLAP / 4) / (OVERLAP / 2)).clamp(0, 1)
    weights /= weights.sum(0)
    return [(start, weight[start : start + tile_size]) for start, weight in zip(starts, weights, strict=True)]
