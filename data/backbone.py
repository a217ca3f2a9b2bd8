"""Classifiers of torchvision's as encoders: their layers in stages by stride, their weights, BatchNorm folded away."""

from __future__ import annotations

import itertools
import pickle
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision import models

from data.files import ModelError

STRIDES = (2, 4, 8, 16, 32)  # pixels
BACKBONES = "give a classifier of torchvision's such as resnet50, convnext_tiny or swin_t"


def cut_into_stages(backbone: str, weights: str | None) -> tuple[nn.ModuleDict, list[int], bool]:
    """A classifier's layers up to each stride, the channels at `STRIDES`, and whether they come last, as in a Swin."""
    classifier = _classifier(backbone, weights).eval()
    sizes = {(64 // stride, 96 // stride): max(stride, 2) for stride in (1, *STRIDES)}
    x, stages, channels, channels_last = torch.zeros(1, 3, 64, 96), {}, {2: 0}, False
    for name, layer in getattr(classifier, "features", classifier).named_children():
        try:
            with torch.no_grad():
                x = layer(x)
            channels_last = tuple(x.shape[1:3]) in sizes
            stride = sizes[tuple(x.shape[1:3] if channels_last else x.shape[2:])]
        except Exception:  # here the chain of layers ends: what comes now takes or gives something else
            break
        stages.setdefault(str(stride), nn.Sequential()).add_module(name, layer)
        channels[stride] = x.shape[-1 if channels_last else 1]
    if channels.keys() != set(STRIDES):
        raise ModelError(f"BACKBONE={backbone}: no features at strides 4, 8, 16 and 32; {BACKBONES}")
    return nn.ModuleDict(stages), [channels[stride] for stride in STRIDES], channels_last


def _classifier(backbone: str, weights: str | None) -> nn.Module:
    """The classifier, its weights from torchvision's cache or fetched into it."""
    if backbone not in models.list_models(module=models):
        raise ModelError(f"BACKBONE={backbone}: unknown; {BACKBONES}")
    if weights is None:
        return models.get_model(backbone)
    known = models.get_model_weights(backbone)
    if weights not in known.__members__:
        raise ModelError(f"WEIGHTS={weights}: unknown; there are {', '.join(known.__members__)} and None")
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
