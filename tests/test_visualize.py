"""plot_predictions: what it reads, draws and leaves alone."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb
from PIL import Image

from dataset import LEVIRCD
from model import FusionUNet
from visualize import OUTCOMES, plot_predictions


class Recorder:
    """A data set that remembers which items were read."""

    def __init__(self, length: int, size: tuple[int, int] = (32, 32)):
        self.length, self.size, self.read = length, size, []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        self.read.append(index)
        generator = torch.Generator().manual_seed(index)
        image_a, image_b = torch.randint(0, 256, (2, 3, *self.size), dtype=torch.uint8, generator=generator)
        return image_a, image_b, (image_a[:1] > 127).byte()


@pytest.fixture(scope="module")
def model() -> FusionUNet:
    torch.manual_seed(0)
    return FusionUNet(weights=None)


def test_reads_only_what_it_draws_spread_over_the_set(model, tmp_path):
    data = Recorder(101)
    figure = plot_predictions(model, data, device="cpu", num_samples=5, path=tmp_path / "new" / "x.png")
    assert data.read == [0, 25, 50, 75, 100]
    assert len(figure.axes) == 25
    width, height = Image.open(tmp_path / "new" / "x.png").size
    assert width > 1000 and height > 1000


@pytest.mark.parametrize(("length", "samples", "rows"), [(1, 1, 1), (3, 10, 3), (10, 1, 1)])
def test_as_many_rows_as_there_are(model, length, samples, rows):
    figure = plot_predictions(model, Recorder(length, (40, 24)), device="cpu", num_samples=samples, path=None)
    assert len(figure.axes) == 5 * rows


def test_leaves_mode_device_and_pyplot_alone(model):
    model.train()
    plot_predictions(model, Recorder(1), device="cpu", num_samples=1, path=None)
    assert model.training and model.mean.device.type == "cpu"
    assert plt.get_fignums() == []


def test_errors_are_drawn_and_scored(model):
    data = Recorder(1)
    figure = plot_predictions(model, data, device="cpu", num_samples=1, path=None)
    before, after, truth, prediction, errors = (axis.get_images()[0].get_array() for axis in figure.axes)
    image_a, image_b, label = data[0]
    assert np.array_equal(before, image_a.permute(1, 2, 0)) and np.array_equal(after, image_b.permute(1, 2, 0))
    predicted, labelled = model.predict(image_a, image_b).numpy() > 0.5, label[0].numpy() > 0
    assert np.array_equal(truth, labelled) and np.array_equal(prediction, predicted)
    for name, where in (
        ("hit", predicted & labelled),
        ("missed", ~predicted & labelled),
        ("false alarm", predicted & ~labelled),
    ):
        drawn = np.isclose(errors, to_rgb(OUTCOMES[name])).all(-1)
        assert np.array_equal(drawn, where)
    iou = (predicted & labelled).sum() / (predicted | labelled).sum()
    assert figure.axes[-1].get_xlabel() == f"IoU {iou:.2f}"
    assert {text.get_text() for text in figure.legends[0].get_texts()} == set(OUTCOMES)


def test_whole_images_and_tiles_of_a_real_data_set(model, tiny):
    tiles = plot_predictions(model, LEVIRCD(tiny, "val", 32), "cpu", num_samples=3, path=None)
    assert [axis.get_ylabel() for axis in tiles.axes[::5]] == ["pair_0 [0, 0]", "pair_1 [0, 0]", "pair_1 [32, 32]"]
    whole = plot_predictions(model, LEVIRCD(tiny, "val"), "cpu", num_samples=3, path=None)
    assert [axis.get_ylabel() for axis in whole.axes[::5]] == ["pair_0", "pair_1"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said_with_the_way_out(model):
    with pytest.raises(RuntimeError, match='device="cpu"'):
        plot_predictions(model, Recorder(1))


@pytest.mark.parametrize(("length", "samples"), [(0, 3), (3, 0)])
def test_nothing_to_draw(model, length, samples):
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_predictions(model, Recorder(length), device="cpu", num_samples=samples)


def test_importing_it_brings_no_logger():
    code = "import sys, visualize; sys.exit(any(name in sys.modules for name in ('mlflow', 'tensorboard', 'main')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
