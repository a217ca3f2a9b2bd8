"""What lifts IoU: trains each variant with three seeds on real pairs and on the demo, and prints a table.

    LEVIR_CD_DIR=FOLDER python tests/ablation.py [VARIANT …]

A variant is what it changes: constants of main.py, or pieces of the code that are replaced while it trains, so that
what didn't pay can be measured again without being part of the program. All are trained on as many crops and scored on
the validation split, with an untrained backbone whose BatchNorm got the statistics of noise: trained weights, too, come
with some that fit. The demo is trained on only by a variant that isn't worse on the real pairs. All variants come with
the first seed, then with the second. It can be stopped at any time and goes on when it is started again: results stand
in runs/ablation.csv, a line a run, and are not made twice.

All variants with all seeds take eight hours of one core (OMP_NUM_THREADS=1), the demo's runs apart.
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

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import dataset
import losses
import main
import model
from data.make_demo import make_demo
from metrics import ChangeMetrics, as_logits

SEEDS = (0, 1, 2)
DEMO = {name: demo for name, (_, demo) in main.DEMO.items()}
DATA = {
    "real": DEMO | {"DATA_DIR": "runs/ablation_real"},
    "demo": DEMO | {"DATA_DIR": "runs/ablation_demo"},
}
RESULTS = Path("runs", "ablation.csv")
CLOCK = time.perf_counter if torch.cuda.is_available() else time.process_time  # on a CPU, what else runs doesn't count
COLUMNS = ("variant", "data", "seed", "iou", "dice", "exchanged_iou", "seconds", "parameters")


# Fusion


class Concatenation(nn.Module):
    """Both dates' features side by side, and what `extra` makes of them."""

    def __init__(self, channels: int, ordered: bool, extra: Callable[[Tensor, Tensor], list[Tensor]] = lambda *_: []):
        super().__init__()
        self.extra = extra
        count = 2 + len(extra(torch.zeros(1), torch.zeros(1)))
        self.mix = model.ConvNormReLU(count * channels, channels, 3)

    def forward(self, features: Tensor) -> Tensor:
        before, after = features.chunk(2)
        return self.mix(torch.cat([before, after, *self.extra(before, after)], dim=1))


class ConcatenationAndDifference(Concatenation):
    """|before − after| beside both."""

    def __init__(self, channels: int, ordered: bool):
        super().__init__(channels, ordered, lambda before, after: [(before - after).abs()])


class Gated(model.Fusion):
    """The sum is let through where the difference says so."""

    def __init__(self, channels: int, ordered: bool):
        super().__init__(channels, ordered)
        self.gate = nn.Conv2d(channels, channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        before, after = features.chunk(2)
        difference = (after - before).abs()
        return self.mix(torch.cat([(before + after) * self.gate(difference).sigmoid(), difference], dim=1))


class CrossAttention(model.Fusion):
    """At strides 16 and 32 each date first looks at the whole of the other one."""

    HEADS = 4

    def __init__(self, channels: int, ordered: bool):
        super().__init__(channels, ordered)
        self.attend = channels >= model.CHANNELS[3]
        if self.attend:
            self.query, self.key_value = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, 2 * channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        if self.attend:
            before, after = features.chunk(2)
            n, c, h, w = features.shape
            other = torch.cat([after, before])
            query = self.query(features).flatten(2).view(n, self.HEADS, -1, h * w).mT
            key, value = self.key_value(other).flatten(2).view(n, 2, self.HEADS, -1, h * w).mT.unbind(1)
            features = features + F.scaled_dot_product_attention(query, key, value).mT.reshape(n, c, h, w)
        return super().forward(features)


# Edges


class NoFrozenFeatures(model.Side):
    """The trained encoder alone."""

    def forward(self, finer: Tensor, frozen: Tensor | None) -> Tensor:
        return super().forward(finer, frozen * 0)


class NoTrainedEncoder(model.Side):
    """The frozen features alone, narrowed."""

    def __init__(self, finer_channels: int, frozen_channels: int, out_channels: int):
        super().__init__(finer_channels, frozen_channels, out_channels)
        self.down = None

    def forward(self, finer: Tensor, frozen: Tensor) -> Tensor:
        return self.narrow(frozen)


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
        self.stem, self.fuse1 = model.ConvNormReLU(3, 16, 3), model.Fusion(16, ordered=False)
        self.up1, self.head1 = model.Up(model.CHANNELS[0], 16), nn.Conv2d(16, 1, 1)
        nn.init.constant_(self.head1.bias, -3.0)
        self.up2.register_forward_hook(lambda _, __, x: setattr(self, "decoded", x))
        self.train()

    def forward(self, image_a: Tensor, image_b: Tensor) -> Tensor:
        height, width = super().forward(image_a, image_b).shape[-2:]
        x = self.up1(self.decoded, self.fuse1(self.stem(self.prepare(image_a, image_b))))
        return self.head1(x).float()[..., :height, :width]


class Nearest(model.Up):
    """Enlarged by repeating pixels."""

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.conv2(self.conv1(torch.cat([F.interpolate(x, scale_factor=2), skip], dim=1)))


class PixelShuffle(model.Up):
    """Enlarged by a convolution that gives four values for each."""

    def __init__(self, in_channels: int, skip_channels: int):
        super().__init__(in_channels, skip_channels)
        self.enlarge = nn.Conv2d(in_channels, 4 * in_channels, 1)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.conv2(self.conv1(torch.cat([F.pixel_shuffle(self.enlarge(x), 2), skip], dim=1)))


# Crops


def changed_crops(self: dataset.LEVIRCD, array: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, bool]:
    """A crop without change is drawn again, up to three times."""
    for _ in range(4):
        crop, swapped = RANDOM_CROP(self, array, rng)
        if crop[..., 6].any():
            break
    return crop, swapped


def never_exchanged(self: dataset.LEVIRCD, array: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, bool]:
    """The dates stay in their order."""
    return RANDOM_CROP(self, array, rng)[0], False


def scaled(self: dataset.LEVIRCD, array: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, bool]:
    """Half of the crops are a smaller one, enlarged by up to 1.5; the mask by repeating."""
    crop, swapped = RANDOM_CROP(self, array, rng)
    if rng.random() < 0.5:
        return crop, swapped
    size = crop.shape[0]
    part = int(size / rng.uniform(1, 1.5))
    y, x = rng.integers(size - part + 1, size=2)
    pixels = torch.from_numpy(crop[y : y + part, x : x + part].copy()).permute(2, 0, 1)[None].float()
    images = F.interpolate(pixels[:, :6], size=(size, size), mode="bilinear").round()
    mask = F.interpolate(pixels[:, 6:], size=(size, size))
    return torch.cat([images, mask], 1)[0].permute(1, 2, 0).byte().numpy(), swapped


def noise_and_blur(images: Tensor, *strengths: float) -> Tensor:
    """Colour jitter, then a blur of up to 3 × 3 pixels and noise of up to 0.03."""
    images = COLOR_JITTER(images, *strengths)
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    images = torch.lerp(images, blurred, torch.rand(len(images), 1, 1, 1))
    return (images + 0.03 * torch.rand(len(images), 1, 1, 1) * torch.randn_like(images)).clamp(0, 1)


RANDOM_CROP, COLOR_JITTER = dataset.LEVIRCD._random_crop, dataset.color_jitter


# Loss


class PerImage(losses.CombinedIoULoss):
    """Soft IoU of each image, averaged."""

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        pairs = zip(logits.split(1), label.split(1), strict=True)
        return torch.stack([super(PerImage, self).forward(*pair) for pair in pairs]).mean()


class Lovasz(losses.CombinedIoULoss):
    """The Lovász hinge (Berman et al. 2018, arXiv:1705.08790) instead of soft IoU."""

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        logits, label = logits.float().flatten(), label.float().flatten()
        errors, order = (1 - logits * (2 * label - 1)).sort(descending=True)
        truth = label[order]
        intersection, union = truth.sum() - truth.cumsum(0), truth.sum() + (1 - truth).cumsum(0)
        jaccard = 1 - intersection / union
        hinge = errors.relu() @ torch.diff(jaccard, prepend=jaccard.new_zeros(1))
        return self.alpha * F.binary_cross_entropy_with_logits(logits, label) + (1 - self.alpha) * hinge


class Focal(losses.CombinedIoULoss):
    """Cross-entropy weighed by (1 − p)², four times (Lin et al. 2017, arXiv:1708.02002)."""

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        soft_iou = super().forward(logits, label) - self.alpha * F.binary_cross_entropy_with_logits(
            logits.float(), label.float()
        )
        each = F.binary_cross_entropy_with_logits(logits.float(), label.float(), reduction="none")
        return soft_iou + self.alpha * 4 * ((1 - (-each).exp()) ** 2 * each).mean()


class DeepSupervision(model.FusionUNet):
    """The decoder's features at strides 4 and 8 must tell the change too; `DeepLoss` adds their losses."""

    outputs: list[Tensor] = []  # noqa: RUF012, of the last forward pass in training

    def __init__(self, *args: object, **kwargs: object):
        super().__init__(*args, **kwargs)
        self.heads = nn.ModuleList(nn.Conv2d(channels, 1, 1) for channels in model.CHANNELS[1:3])
        for head, step in zip(self.heads, (self.up4, self.up8), strict=True):
            step.register_forward_hook(lambda _, __, x, head=head: self.outputs.append(head(x).float()))

    def forward(self, image_a: Tensor, image_b: Tensor) -> Tensor:
        self.outputs.clear()
        return super().forward(image_a, image_b)


class DeepLoss(losses.CombinedIoULoss):
    """The loss, and 0.4 times that of each output of `DeepSupervision`."""

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        loss = super().forward(logits, label)
        for output in DeepSupervision.outputs if logits.requires_grad else ():
            larger = F.interpolate(output, size=label.shape[-2:], mode="bilinear", align_corners=False)
            loss = loss + 0.4 * super().forward(larger, label)
        return loss


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

    def __init__(self, *args: object, **kwargs: object):
        super().__init__(*args, **kwargs)
        for stride in ("2", "4", "8", "16"):
            self.stages[stride].requires_grad_(False)

    def train(self, mode: bool = True) -> model.FusionUNet:
        """The others' statistics stay as they are, too."""
        super().train(mode)
        for stride in ("2", "4", "8", "16"):
            self.stages[stride].eval()
        return self


# Statistics of an untrained backbone's BatchNorm


def noise() -> Tensor:
    """Images of noise, coarse and fine: float (8, 3, 128, 128), as if normalised."""
    octaves = [F.interpolate(torch.randn(8, 3, size, size), size=(128, 128), mode="bilinear") for size in (4, 16, 64)]
    return sum(octaves)


def training_crops() -> Tensor:
    """Crops of the real training pairs, normalised about as ImageNet is: float (16, 3, 256, 256)."""
    device = torch.get_default_device()  # none, but for the form of them, while `FusionUNet.load` makes a model
    with torch.device("cpu"):
        pairs = dataset.LEVIRCD(DATA["real"]["DATA_DIR"], "train", 256)
        images = torch.stack([pairs[index][0] for index in range(0, len(pairs), -(-len(pairs) // 16))])
    return ((images / 255 - 0.45) / 0.225).to(device)


def measured_on(images: Callable[[], Tensor]) -> Callable[[str, None], nn.Module]:
    """`_classifier` with the statistics of these images, by which its features have the scale of trained ones.

    At 0 and 1 they normalise nothing (Krähenbühl et al. 2016, arXiv:1511.06856).
    """

    def measured(backbone: str, weights: None) -> nn.Module:
        classifier = CLASSIFIER(backbone, weights)
        momenta = {module: module.momentum for module in classifier.modules() if isinstance(module, nn.BatchNorm2d)}
        for norm in momenta:
            norm.momentum = 1.0  # the statistics of the one batch, not a share of them
        with torch.no_grad():
            classifier.train()(images())
        for norm, momentum in momenta.items():
            norm.momentum = momentum
        return classifier

    return measured


CLASSIFIER = model._classifier
AS_IT_IS = "as it is"
VARIANTS: dict[str, dict[str, object]] = {
    AS_IT_IS: {},
    "flips and turns averaged when predicting": {"score": {"tta": True}},
    "threshold chosen on these same pairs": {"score": {"tuned": True}},
    # fusion
    "fusion: concatenation": {"model.Fusion": Concatenation},
    "fusion: concatenation, dates never exchanged": {
        "model.Fusion": Concatenation, "dataset.LEVIRCD._random_crop": never_exchanged,
    },
    "fusion: concatenation and absolute difference": {"model.Fusion": ConcatenationAndDifference},
    "fusion: gated by the absolute difference": {"model.Fusion": Gated},
    "fusion: cross-attention at strides 16 and 32": {"model.Fusion": CrossAttention},
    # edges and the trained encoder
    "no trained encoder beside the frozen one": {"model.Side": NoTrainedEncoder},
    "no frozen features": {"model.Side": NoFrozenFeatures},
    "trained encoder with second convolutions": {"model.Side": MixedSide},
    "half as wide": {"model.CHANNELS": tuple(width // 2 for width in model.CHANNELS)},
    "twice as wide": {"model.CHANNELS": tuple(width * 2 for width in model.CHANNELS)},
    "trained encoder and decoder at full resolution": {"main.FusionUNet": FullResolution},
    "enlarged by nearest neighbour": {"model.Up": Nearest},
    "enlarged by pixel shuffle": {"model.Up": PixelShuffle},
    # crops
    "crops without change drawn again": {"dataset.LEVIRCD._random_crop": changed_crops},
    "crops of twice the side, a quarter as many": {"CROP_SIZE": 2, "BATCH_SIZE": 0.5},
    "half of the crops enlarged": {"dataset.LEVIRCD._random_crop": scaled},
    "no colour jitter": {"BRIGHTNESS": 0.0, "CONTRAST": 0.0, "SATURATION": 0.0, "HUE": 0.0},
    "colour jitter three times as strong": {"BRIGHTNESS": 0.3, "CONTRAST": 0.3, "SATURATION": 0.3, "HUE": 0.03},
    "noise and blur": {"main.color_jitter": noise_and_blur},
    # loss
    "ALPHA=0.2": {"ALPHA": 0.2},
    "ALPHA=0.8": {"ALPHA": 0.8},
    "soft IoU of each image": {"main.CombinedIoULoss": PerImage},
    "Lovász hinge": {"main.CombinedIoULoss": Lovasz},
    "focal cross-entropy": {"main.CombinedIoULoss": Focal},
    "deep supervision at strides 4 and 8": {
        "main.FusionUNet": DeepSupervision, "main.CombinedIoULoss": DeepLoss,
    },
    # recipe
    "AdamW, 1e-3": {"main.make_optimizers": adamw, "LEARNING_RATE": 1e-3},
    "AdamW, 3e-3": {"main.make_optimizers": adamw, "LEARNING_RATE": 3e-3},
    "SGD, 0.05": {"main.make_optimizers": sgd, "LEARNING_RATE": 0.05},
    "half the learning rate": {"LEARNING_RATE": main.LEARNING_RATE / 2},
    "twice the learning rate": {"LEARNING_RATE": main.LEARNING_RATE * 2},
    "no weight decay": {"WEIGHT_DECAY": 0.0},
    "no warm-up": {"WARMUP_EPOCHS": 0.0},
    "moving average of the weights": {"main.wrapped": averaged, "main.evaluate": evaluate_average},
    "twice the crops": {"EPOCHS": 2},
    # backbone
    "untrained statistics left at 0 and 1, as main.py does": {"model._classifier": CLASSIFIER},
    "untrained statistics of training pairs, not of noise": {"model._classifier": measured_on(training_crops)},
    "backbone trained, at a tenth of the rate": {"FREEZE_BACKBONE": False},
    "backbone's last stage trained, at a tenth of the rate": {
        "main.FusionUNet": LastStageTrained, "FREEZE_BACKBONE": False,
    },
}  # fmt: skip
FACTORS = ("CROP_SIZE", "BATCH_SIZE", "EPOCHS")  # of the data's own


def train(variant: str, data: str, seed: int) -> dict[str, object]:
    """Train a variant, or go on with its run; returns its row."""
    changes = {name: value for name, value in VARIANTS[variant].items() if name != "score"}
    name = re.sub(r"\W+", "_", variant if changes else AS_IT_IS)
    changes = {"model._classifier": measured_on(noise)} | changes
    folder = Path("runs", f"ablation_{name}_{data}_{seed}")
    constants = {**DATA[data], "SEED": seed, "RUN_NAME": folder.name}
    crop_size, start = constants["CROP_SIZE"], CLOCK()
    with contextlib.ExitStack() as stack:
        for name, value in changes.items():
            if "." in name:
                stack.enter_context(patch(name, value))
            else:
                constants[name] = int(constants[name] * value) if name in FACTORS else value
        AVERAGE.clear()
        fresh = not folder.exists()
        main.main(**constants if fresh else {"RESUME": str(folder)})
        seconds = round(CLOCK() - start) if fresh else ""
        net = main.FusionUNet.load(folder / "best.pt")
        pairs = dataset.LEVIRCD(constants["DATA_DIR"], "val", crop_size)
        scores = score(net, pairs, **VARIANTS[variant].get("score", {}))
    trained = sum(value.numel() for value in net.parameters() if value.requires_grad)
    return dict(variant=variant, data=data, seed=seed, **scores, seconds=seconds, parameters=trained)


def score(net: model.FusionUNet, pairs: dataset.LEVIRCD, tta: bool = False, tuned: bool = False) -> dict[str, float]:
    """IoU and F1 of the change class, and the IoU where the dates are exchanged."""
    forth, back = ChangeMetrics(), ChangeMetrics()
    for image_a, image_b, label in pairs:
        forth.update(as_logits(net.predict(image_a, image_b, tta=tta)), label[None])
        back.update(as_logits(net.predict(image_b, image_a, tta=tta)), label[None])
    threshold = net.threshold if tuned else 0.5
    scores = forth.compute(threshold)
    return {"iou": scores["iou"], "dice": scores["dice"], "exchanged_iou": back.compute(threshold)["iou"]}


def table(rows: list[dict[str, str]]) -> str:
    """The rows of each variant as one line of Markdown: mean ± sample standard deviation over the seeds.

    The gain is over "as it is" with the same seed: what a seed's weights and crops do to both is not in it.
    """
    lines = [
        "| variant | seeds | IoU, real | gain | F1, real | IoU, A and B exchanged | IoU, demo | s | M parameters |",
        "|---" * 9 + "|",
    ]

    def by_seed(variant: str, data: str, column: str) -> dict[str, float]:
        own = [row for row in rows if (row["variant"], row["data"]) == (variant, data) and row[column]]
        return {row["seed"]: float(row[column]) for row in own}

    def spread(values: Collection[float], form: str = ".3f") -> str:
        deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):{form}}{deviation}" if values else "–"

    reference = by_seed(AS_IT_IS, "real", "iou")
    for variant in VARIANTS:
        if iou := by_seed(variant, "real", "iou"):
            gain = [iou[seed] - reference[seed] for seed in iou.keys() & reference if variant != AS_IT_IS]
            cells = [spread(iou.values()), spread(gain, "+.3f")]
            cells += [spread(by_seed(variant, "real", column).values()) for column in ("dice", "exchanged_iou")]
            cells.append(spread(by_seed(variant, "demo", "iou").values()))
            times, parameters = (by_seed(variant, "real", column).values() for column in ("seconds", "parameters"))
            cells += [f"{statistics.mean(times):.0f}" if times else "–", f"{max(parameters) / 1e6:.1f}"]
            lines.append(f"| {variant} | {len(iou)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def read() -> list[dict[str, str]]:
    """The rows that are there."""
    if not RESULTS.exists():
        return []
    with open(RESULTS, newline="") as file:
        return list(csv.DictReader(file))


def link_real_pairs() -> None:
    """The real pairs without their test split, on which nothing is chosen."""
    folder = Path(DATA["real"]["DATA_DIR"])
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "val"):
        (folder / split).unlink(missing_ok=True)
        (folder / split).symlink_to(Path(os.environ["LEVIR_CD_DIR"], split).resolve())


def mean_iou(variant: str, data: str) -> float:
    """Over the seeds."""
    return statistics.mean(float(row["iou"]) for row in read() if (row["variant"], row["data"]) == (variant, data))


def measure(variant: str, seed: int) -> None:
    """Make the rows of a variant that aren't there yet."""
    for data in DATA:
        if data == "demo" and mean_iou(variant, "real") < mean_iou(AS_IT_IS, "real"):
            continue
        if not any((row["variant"], row["data"], row["seed"]) == (variant, data, str(seed)) for row in read()):
            row = train(variant, data, seed)
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
    link_real_pairs()
    make_demo(DATA["demo"]["DATA_DIR"], splits={"train": 128, "val": 32})
    for seed in SEEDS:
        for variant in dict.fromkeys([AS_IT_IS, *chosen]):
            measure(variant, seed)
            print(table(read()), flush=True)
