"""Pictures, the masks of files, and that these lie where their images lie."""

import ast
import csv
import itertools
import json
import os
import re
import struct
import subprocess
import sys
from colorsys import rgb_to_hsv
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, start
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from dataset import LEVIRCD, DataError, Tiff, connected_areas, read_image
from model import FusionUNet
from visualize import (
    CLASSES,
    COLUMNS,
    CRS,
    GEOTAGS,
    METRE,
    NO_DATA,
    OUTCOMES,
    UNIT,
    WEB_MERCATOR,
    Place,
    common_place,
    outlines,
    plot_curves,
    plot_precision_recall,
    plot_predictions,
    simplified,
    world_file,
    write_masks,
)  # fmt: skip

DOUBLE, SHORT, ASCII = 12, 3, 2


def geokeys(crs: int = 32614, unit: int = METRE) -> tuple[int, ...]:
    return (1, 1, 0, 3, 1024, 0, 1, 1, CRS, 0, 1, crs, UNIT, 0, 1, unit)


def geotags(
    x: float = 600_000.0, scale: float = 0.5, keys: tuple = geokeys(), nodata: str = "-9999"
) -> ImageFileDirectory_v2:
    """A place in UTM zone 14, as GDAL writes it."""
    tags = ImageFileDirectory_v2()
    for tag, kind, value in (
        (33550, DOUBLE, (scale, scale, 0.0)),
        (33922, DOUBLE, (0.0, 0.0, 0.0, x, 3_400_000.125, 0.0)),
        (34735, SHORT, keys),
        (34737, ASCII, "WGS 84 / UTM zone 14N|"),
        (42113, ASCII, nodata),
    ):
        tags.tagtype[tag] = kind
        tags[tag] = value
    return tags


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
    return FusionUNet(weights=None, backbone="resnet18")


@pytest.fixture(scope="module")
def model_of_two() -> FusionUNet:
    """It tells two classes of change apart, and calls pixels by either and by none."""
    torch.manual_seed(0)
    model = FusionUNet(weights=None, out_channels=2, backbone="resnet18")
    torch.nn.init.normal_(model.head.weight)
    with torch.no_grad():
        logits = model.eval()(*torch.rand(2, 1, 3, 32, 32))
        mean = logits.mean((0, 2, 3), keepdim=True)
        model.head.bias -= mean.flatten() + (logits - mean).logsumexp(1).mean()
    return model


def legends(figure) -> set[str]:
    """What the keys under the columns name."""
    keys = [artist for artist in figure.axes[0].artists if hasattr(artist, "get_texts")]
    return {text.get_text() for key in keys for text in key.get_texts()}


def ringed(errors: np.ndarray) -> np.ndarray:
    """Where objects that are missed or false have their ring."""
    return (
        np.isclose(errors[..., None, :], [to_rgb(OUTCOMES[name]) for name in ("missed", "false alarm")]).all(-1).any(-1)
    )


def test_reads_only_what_it_draws_spread_over_the_set(model, tmp_path):
    data = Recorder(1000)
    figure = plot_predictions(model, data, device="cpu", num_samples=5, path=tmp_path / "new" / "x.png")
    *looked_at, a, b, c, d, e = data.read
    assert 0 <= a < 200 <= b < 400 <= c < 600 <= d < 800 <= e < 1000 and len(looked_at) <= 40
    changed = {index: int(data[index][2].sum()) for index in looked_at}
    for drawn in (a, b, c, d, e):  # of its neighbours the one with the most change
        assert changed[drawn] == max(changed[index] for index in looked_at if index // 200 == drawn // 200)
    assert len(figure.axes[0].get_images()) == 30 + 1  # the last is the bar of the probability
    width, height = Image.open(tmp_path / "new" / "x.png").size
    assert 800 < width < 900 and height > 700


@pytest.mark.parametrize(("length", "samples", "rows"), [(1, 1, 1), (3, 10, 3), (10, 1, 1)])
def test_as_many_rows_as_there_are(model, length, samples, rows):
    figure = plot_predictions(model, Recorder(length, (40, 24)), device="cpu", num_samples=samples, path=None)
    assert len(figure.axes[0].get_images()) == 6 * rows + 1


def test_leaves_mode_device_and_pyplot_alone(model):
    model.train()
    plot_predictions(model, Recorder(1), device="cpu", num_samples=1, path=None)
    assert model.training and model.mean.device.type == "cpu"
    assert plt.get_fignums() == []


def test_errors_are_drawn_and_scored(model):
    data = Recorder(1)
    figure = plot_predictions(model, data, device="cpu", num_samples=1, path=None)
    images = [image.get_array() for image in figure.axes[0].get_images()]
    before, after, truth, prediction, errors, drawn_probability, _ = images
    image_a, image_b, label = data[0]
    assert np.array_equal(before, image_a.permute(1, 2, 0)) and np.array_equal(after, image_b.permute(1, 2, 0))
    probability = model.predict(image_a, image_b).numpy()
    predicted, labelled = probability > 0.5, label[0].numpy() > 0
    assert np.array_equal(drawn_probability, probability)
    assert (truth == labelled[..., None]).all() and (prediction == predicted[..., None]).all()
    for name, where in (
        ("hit", predicted & labelled),
        ("missed", ~predicted & labelled),
        ("false alarm", predicted & ~labelled),
    ):
        dimmed = image_b.float().mean(0).numpy()[..., None] / 255 * 0.6  # the image after is seen through it
        drawn = np.isclose(errors, 0.3 * dimmed + 0.7 * np.array(to_rgb(OUTCOMES[name])), atol=1e-6).all(-1)
        assert np.array_equal(drawn | ringed(errors), where | ringed(errors))
    nothing = ~predicted & ~labelled & ~ringed(errors)
    assert np.allclose(errors[nothing], dimmed[nothing])
    iou = (predicted & labelled).sum() / (predicted | labelled).sum()
    wrong = (predicted != labelled).sum()
    assert figure.axes[0].texts[0].get_text() == f"IoU {iou:.2f}, {wrong:,} px wrong"
    assert legends(figure) == set(OUTCOMES) - {"wrong class"} | {"ring: no match"}


def test_several_classes_have_their_colours(model_of_two):
    class Classes(Recorder):
        def __getitem__(self, index):
            image_a, image_b, _ = super().__getitem__(index)
            return image_a, image_b, (image_a[:1] % 3).byte()

    figure = plot_predictions(model_of_two, Classes(1), device="cpu", path=None)
    image_a, image_b, label = Classes(1)[0]
    _, _, truth, prediction, errors, drawn, _ = (image.get_array() for image in figure.axes[0].get_images())
    one, two = model_of_two.predict(image_a, image_b).numpy()
    guess, label = np.where(one + two > 0.5, np.where(two > one, 2, 1), 0), label[0].numpy()
    assert {0, 1, 2} == set(guess.flat) and np.array_equal(drawn, one + two)
    for shown, classes in ((truth, label), (prediction, guess)):
        for number, colour in enumerate(("black", *CLASSES[:2])):
            assert np.array_equal(np.isclose(shown, to_rgb(colour)).all(-1), classes == number)
    dimmed = image_b.float().mean(0).numpy()[..., None] / 255 * 0.6
    wrong = np.isclose(errors, 0.3 * dimmed + 0.7 * np.array(to_rgb(OUTCOMES["wrong class"])), atol=1e-6).all(-1)
    expected = (guess > 0) & (label > 0) & (guess != label)
    assert np.array_equal(wrong | ringed(errors), expected | ringed(errors)) and expected.any()
    right = ((guess == label) & (label > 0)).sum() / ((guess > 0) | (label > 0)).sum()
    assert figure.axes[0].texts[0].get_text() == f"IoU {right:.2f}, {(guess != label).sum():,} px wrong"
    assert legends(figure) == {*OUTCOMES, "ring: no match", "class 1", "class 2"}


def test_no_two_meanings_share_a_hue():
    colours = map(to_rgb, (*OUTCOMES.values(), *CLASSES))
    hues = [360 * rgb_to_hsv(*colour)[0] for colour in colours if len(set(colour)) > 1]
    apart = [min(abs(one - other), 360 - abs(one - other)) for one, other in itertools.combinations(hues, 2)]
    assert len(hues) == 6 and min(apart) > 25


def test_named_items_in_their_order(model):
    data = Recorder(9)
    figure = plot_predictions(model, data, device="cpu", path=None, items=[7, 2])
    assert data.read == [7, 2]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["7", "2"]


def test_of_a_large_image_the_window_of_most_errors_is_drawn_and_all_of_it_scored(model, monkeypatch):
    monkeypatch.setattr(model, "predict", lambda image_a, _: image_a[0] / 255)

    class OneHouse(Recorder):
        def __getitem__(self, index):
            image_a, image_b, label = super().__getitem__(index)
            predicted = model.predict(image_a, image_b) > 0.5
            label[0] = predicted  # right everywhere but for one house
            label[0, 300:330, 700:740] = ~predicted[300:330, 700:740]
            return image_a, image_b, label

    data = OneHouse(1, (400, 1100))
    figure = plot_predictions(model, data, device="cpu", path=None)
    axis, (image_a, image_b, label) = figure.axes[0], data[0]
    assert [text.get_text() for text in axis.get_xticklabels()] == ["whole", *COLUMNS]
    whole, _, after, truth, _, errors, _, _ = (image.get_array() for image in axis.get_images())
    assert whole.shape[:2] == (134, 367) and errors.shape[:2] == (256, 256)
    left, right, bottom, top = axis.get_images()[0].get_extent()
    (marked, *_) = (patch for patch in axis.patches if not patch.get_fill())
    x = round(1100 * (marked.get_x() - left) / (right - left))
    y = round(400 * (marked.get_y() - top) / (bottom - top))
    assert marked.get_width() / (right - left) == pytest.approx(256 / 1100)
    assert marked.get_height() / (bottom - top) == pytest.approx(256 / 400)
    assert y <= 300 and y + 256 >= 330 and x <= 700 and x + 256 >= 740
    assert np.array_equal(after, image_b[:, y : y + 256, x : x + 256].permute(1, 2, 0))
    assert np.array_equal(truth[..., 0], label[0, y : y + 256, x : x + 256].numpy() > 0)
    predicted, labelled = model.predict(image_a, image_b).numpy() > 0.5, label[0].numpy() > 0
    iou = (predicted & labelled).sum() / (predicted | labelled).sum()
    assert axis.texts[0].get_text() == f"whole: IoU {iou:.2f}, 1,200 px wrong"


def test_objects_that_are_missed_or_false_have_a_ring(model, monkeypatch):
    label, predicted = torch.zeros(2, 1, 64, 64)
    label[0, 4:12, 4:12] = label[0, 30:50, 30:50] = 1  # one is missed, one found but for a corner
    predicted[0, 30:50, 30:50] = 1
    predicted[0, 30:34, 30:34], predicted[0, 52:60, 4:12] = 0, 1  # and one is false
    monkeypatch.setattr(model, "predict", lambda *_: predicted[0])
    images = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    errors = plot_predictions(model, [(*images, label.byte())], "cpu", path=None).axes[0].get_images()[4].get_array()
    for name, y, x in (("missed", 4, 4), ("false alarm", 52, 4)):
        ring = np.isclose(errors, to_rgb(OUTCOMES[name])).all(-1)
        assert ring[y + 3, x + 12] and not ring[y - 3 : y + 11, x : x + 8].any()
        assert ring.sum() < 20 * 20 - 14 * 14
    assert not ringed(errors)[20:40, 20:60].any()


def test_windows_around_places_have_the_errors_of_the_whole(model, monkeypatch):
    label, predicted = torch.zeros(2, 1, 300, 400)
    label[0, 100:200, 100:300] = predicted[0, 100:200, 80:300] = 1  # a match, though not within either window
    monkeypatch.setattr(model, "predict", lambda *_: predicted[0])
    image = torch.arange(400, dtype=torch.float32).expand(3, 300, 400).div(2).byte()
    data, middles = [(image, image, label.byte())], [(0, 10), (150, 399)]
    axis = plot_predictions(model, data, "cpu", path=None, items=[0, 0], middles=middles).axes[0]
    pictures = [picture.get_array() for picture in axis.get_images()]
    assert np.array_equal(pictures[1], image[:, :128, :128].permute(1, 2, 0))
    assert np.array_equal(pictures[8], image[:, 86:214, 272:].permute(1, 2, 0))
    for errors, rows, columns in (
        (pictures[5], slice(128), slice(128)),
        (pictures[12], slice(86, 214), slice(272, 400)),
    ):
        assert not ringed(errors).any()
        wrong = (label != predicted)[0, rows, columns].numpy()
        assert np.array_equal(errors[..., 2] > 0.6, wrong | label[0, rows, columns].bool().numpy())
    assert [text.get_text() for text in axis.get_yticklabels()] == ["0\ny 0, x 10", "0\ny 150, x 399"]
    assert axis.texts[0].get_text() == "whole: IoU 0.91, 2,000 px wrong"


def test_the_picture_says_where_its_model_comes_from(model):
    model.origin = "some run, epoch 7"
    figure = plot_predictions(model, Recorder(1), device="cpu", path=None)
    assert figure.get_suptitle() == "some run, epoch 7, changed: probability above 0.5"


def test_whole_images_and_tiles_of_a_real_data_set(model, tiny):
    tiles, whole = ["pair_0 [0, 0]", "pair_1 [0, 0]", "pair_1 [32, 32]"], ["pair_0", "pair_1"]
    for crop_size, names, items in ((32, tiles, [0, 4, 7]), (None, whole, None)):
        figure = plot_predictions(model, LEVIRCD(tiny, "val", crop_size), "cpu", 3, None, items)
        assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == names


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said_and_the_cpu_taken(model, capsys):
    assert plot_predictions(model, Recorder(1), path=None).axes
    assert capsys.readouterr().out == "no CUDA device here: predicting on the CPU\n"


@pytest.mark.parametrize(("length", "samples"), [(0, 3), (3, 0)])
def test_nothing_to_draw(model, length, samples):
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_predictions(model, Recorder(length), device="cpu", num_samples=samples)


def test_a_picture_of_real_pairs_is_at_most_a_megabyte(model, real, tmp_path):
    plot_predictions(model, LEVIRCD(real, "val", 256, cache_dir=tmp_path), device="cpu", path=tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size < 1e6


def test_curves_show_the_table(tmp_path):
    columns = "epoch,train_loss,train_iou,val_loss,val_iou,learning_rate,peak_learning_rate"
    table = f"{columns}\n1,3,0.1,4,0.2,1e-3,2e-3\n2,1,0.5,2,0.25,1e-4,1e-3\n3,1,0.6,3,0.21,0,1e-4\n"
    (tmp_path / "metrics.csv").write_text(table)
    figure = plot_curves(tmp_path / "metrics.csv", 2, tmp_path / "curves.png")
    shown = {axis.get_title(): [line.get_xydata().tolist() for line in axis.lines[:-1]] for axis in figure.axes}
    assert shown == {
        "loss": [[[1, 3], [2, 1], [3, 1]], [[1, 4], [2, 2], [3, 3]]],
        "IoU, best 0.2500": [[[1, 0.1], [2, 0.5], [3, 0.6]], [[1, 0.2], [2, 0.25], [3, 0.21]]],
        "learning rate": [[[1, 1e-3], [2, 1e-4], [3, 0]], [[1, 2e-3], [2, 1e-3], [3, 1e-4]]],
    }
    assert all(axis.lines[-1].get_xdata() == [2, 2] for axis in figure.axes)  # the best epoch
    assert (tmp_path / "curves.png").exists() and plt.get_fignums() == []


def test_precision_and_recall_are_marked_at_the_thresholds():
    curve = {
        "threshold": np.array([0, 0.5, 0.7]),
        "precision": np.array([0.1, 0.6, 1]),
        "recall": np.array([1, 0.8, 0]),
    }
    nothing = {"precision": 0.0, "recall": 0.0, "dice": 0.0}
    points = {0.5: {"precision": 0.6, "recall": 0.8, "dice": 0.6857}, 0.99966: nothing}
    axis = plot_precision_recall(curve, points).axes[0]
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axis.lines if "above" in line.get_label()}
    assert drawn == {"above 0.5: F1 0.686": [[0.8, 0.6]], "above 0.9997: F1 0.000": [[0, 0]]}


def test_one_epoch_has_whole_numbers_on_its_axis(tmp_path):
    columns = "epoch,train_loss,train_iou,val_loss,val_iou,learning_rate,peak_learning_rate"
    (tmp_path / "metrics.csv").write_text(f"{columns}\n1,3,0.1,4,0.2,1e-3,2e-3\n")
    axis = plot_curves(tmp_path / "metrics.csv", 1).axes[0]
    low, high = axis.get_xlim()
    assert [tick for tick in axis.get_xticks() if low <= tick <= high] == [1]


# Masks of files


@pytest.fixture
def checkpoint(model, tmp_path, monkeypatch) -> str:
    """A checkpoint whose threshold lies amid the probabilities of its model; the working folder is its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model, "threshold", THRESHOLD)
    torch.save(model.checkpoint(), "best.pt")
    return "best.pt"


THRESHOLD = 0.0479  # about the middle of an untrained model's probabilities


def write_images(*names: str, size: tuple[int, int] = (40, 56), **options) -> None:
    for seed, name in enumerate(names):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        array = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(array).save(name, **options)


def test_the_mask_of_two_files(checkpoint, capsys):
    write_images("before.png", "after.png")
    write_masks(checkpoint, "before.png", "after.png", probability=True, pixel_size=0.5, device="cpu")
    probability = FusionUNet.load(checkpoint, "cpu").predict("before.png", "after.png").numpy()
    mask = np.asarray(Image.open("mask.png"))
    assert np.array_equal(mask, np.where(probability > THRESHOLD, 255, 0)) and 0 < mask.mean() < 255
    written = np.asarray(Image.open("mask_probability.png"))
    assert written.dtype == np.uint16 and np.abs(written / 65535 - probability).max() < 1e-5
    assert Image.open("mask_overlay.jpg").size == (56, 40)
    changed = (mask > 0).sum()
    assert f"mask.png: {changed:,} of 2,240 pixels changed" in (out := capsys.readouterr().out)
    assert f", {changed / 4:,.1f} m²" in out and f"above {THRESHOLD:.4g}" in out


def test_the_mask_of_several_classes(model_of_two, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(model_of_two.checkpoint(), "best.pt")
    write_images("before.png", "after.png")
    one, two = FusionUNet.load("best.pt", "cpu").predict("before.png", "after.png").numpy()
    middle = float(np.median(one + two))
    write_masks("best.pt", "before.png", "after.png", probability=True, threshold=middle, pixel_size=2, device="cpu")
    expected = np.where(one + two > middle, np.where(two > one, 2, 1), 0)
    assert np.array_equal(np.asarray(Image.open("mask.png")), expected) and set(expected.flat) == {0, 1, 2}
    assert np.abs(np.asarray(Image.open("mask_probability.png")) / 65535 - one - two).max() < 1e-5
    out = capsys.readouterr().out
    for number in (1, 2):
        count = (expected == number).sum()
        assert f"mask.png: {count:,} of 2,240 pixels of class {number} ({count / 2240:.2%}), {4 * count:,.1f} m²" in out


def test_files_without_a_suffix_are_opened_by_their_content(checkpoint):
    write_images("before", "after", format="PNG")
    write_masks(checkpoint, "before", "after", device="cpu")
    assert Path("mask.png").exists()


def test_the_masks_of_folders_are_paired_by_stem(checkpoint):
    write_images("split/A/x.png", "split/A/y.jpg", "split/B/x.tif", "split/B/y.png")
    write_masks(checkpoint, "split", device="cpu")
    write_masks(checkpoint, "split/A", "split/B", out="again", threshold=THRESHOLD, device="cpu")
    assert {path.name for path in Path("masks").iterdir()} == {
        "x.png",
        "y.png",
        "x_overlay.jpg",
        "y_overlay.jpg",
        "summary.csv",
    }
    for name in ("x.png", "y.png"):
        assert Path("masks", name).read_bytes() == Path("again", name).read_bytes()


@pytest.mark.parametrize(
    ("paths", "options", "message"),
    [
        (("a.png", "nowhere.png"), {}, "nowhere.png: not there"),
        (("a.png", "small.png"), {}, "small.png: 8 × 8 pixels, but a.png has 56 × 40"),
        (("a.png", "text.png"), {}, "text.png: can't be read as an image"),
        (("a.png", "grey.png"), {}, "grey.png: one band"),
        (("a.png", "b.png"), {"out": "a.png"}, "a.png: is there already"),
        (("a.png", "b.png"), {"out": "mask.jpg"}, "--out mask.jpg: "),
        (("empty",), {}, "empty/A: not there"),
        (("a.png", "empty"), {}, "empty: not there"),
        (("a.png", "b.png"), {"out": "placed.png"}, "placed.pgw: is there already"),
        (("split",), {"out": "split/label"}, "split/label/x.png: is there already"),
        (("split",), {"out": "split/A"}, "--out split/A: "),
    ],
)
def test_files_without_a_mask(checkpoint, paths, options, message):
    write_images("a.png", "b.png")
    write_images("small.png", size=(8, 8))
    Path("text.png").write_text("not an image")
    Path("placed.pgw").write_text("a world file")
    Path("empty").mkdir()
    Image.new("L", (56, 40)).save("grey.png")
    write_images("split/A/x.jpg", "split/B/x.jpg", "split/label/x.png")
    before = {path: path.read_bytes() for path in Path().rglob("*.*")}
    with pytest.raises(DataError, match=re.escape(message)) as error:
        write_masks(checkpoint, *paths, **options, device="cpu")
    assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in Path().rglob("*.*")} == before


@pytest.mark.parametrize("options", [{"threshold": 50.0}, {"threshold": -0.1}, {"pixel_size": 0.0}])
def test_options_that_cannot_be(checkpoint, options):
    write_images("a.png", "b.png")
    with pytest.raises(DataError, match=next(iter(options)).replace("_", " ")):
        write_masks(checkpoint, "a.png", "b.png", **options)


def test_a_geotiff_comes_out_of_geotiffs(checkpoint, capsys):
    write_images("a.tif", "b.tif", tiffinfo=geotags())
    write_masks(checkpoint, "a.tif", "b.tif", threshold=0.0, device="cpu")
    with Image.open("mask.tif") as mask:
        assert mask.tag_v2[33922] == geotags()[33922] and mask.tag_v2[34735] == geotags()[34735]
    assert "2,240 of 2,240 pixels changed (100.00%), 560.0 m²" in capsys.readouterr().out
    write_masks(checkpoint, "a.tif", "b.tif", out="x.png", device="cpu")
    assert Place(Path("x.png")).affine.tolist() == Place(Path("a.tif")).affine.tolist()


def test_one_bad_pair_does_not_end_the_others(checkpoint, capsys):
    write_images("split/A/x.png", "split/A/y.png", "split/A/city/z.png")
    write_images("split/B/x.png", "split/B/y.png", "split/B/city/z.png")
    Path("split/B/x.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="1 of 3 pairs couldn't be predicted"):
        write_masks(checkpoint, "split", device="cpu")
    said = capsys.readouterr().out
    assert "split/B/x.png: can't be read" in said and "masks/y.png: " in said
    held = Path("masks/y.png").stat().st_mtime_ns
    write_images("split/B/x.png")
    write_masks(checkpoint, "split", device="cpu")
    said = capsys.readouterr().out
    assert "masks/y.png: is there already" in said and "1 to predict" in said and Path("masks/city/z.png").exists()
    assert Path("masks/y.png").stat().st_mtime_ns == held
    write_masks(checkpoint, "split", overwrite=True, device="cpu")
    assert Path("masks/y.png").stat().st_mtime_ns > held


def test_folders_of_other_names(checkpoint):
    write_images("split/time1/x.png", "split/time2/x.png")
    write_masks(checkpoint, "split", folders="time1 time2", device="cpu")
    assert Path("masks/x.png").exists()


def test_void_pixels_are_neither_predicted_nor_counted(checkpoint, capsys):
    write_images("a.tif", "b.tif", tiffinfo=geotags(nodata=" 7 "))
    image = np.array(Image.open("b.tif"))
    image[:10], image[10, :5, 0] = 7, 7  # one band alone is no void
    Image.fromarray(image).save("b.tif", tiffinfo=geotags(nodata=" 7 "))
    write_masks(checkpoint, "a.tif", "b.tif", threshold=0.0, probability=True, device="cpu")
    with Image.open("mask.tif") as mask:
        assert NO_DATA not in mask.tag_v2
        assert not np.asarray(mask)[:10].any() and np.asarray(mask)[10:].all()
    assert not np.asarray(Image.open("mask_probability.tif"))[:10].any()
    assert "1,680 of 1,680 pixels changed (100.00%), 420.0 m²" in capsys.readouterr().out


def test_several_classes_are_seen_in_a_mask(model_of_two, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(model_of_two.checkpoint(), "best.pt")
    write_images("a.png", "b.png")
    for name in ("mask.png", "mask.tif"):
        write_masks("best.pt", "a.png", "b.png", out=name, overwrite=True, device="cpu")
        with Image.open(name) as mask:
            shown = np.asarray(mask.convert("RGB"))[np.asarray(mask) == 1]
            assert mask.mode == "P" and (shown == np.round(255 * np.array(to_rgb(CLASSES[0])))).all()


def shifted(tags: ImageFileDirectory_v2, x: float, y: float) -> ImageFileDirectory_v2:
    tags[33922] = (0.0, 0.0, 0.0, 600_000 + 0.5 * x, 3_400_000.125 - 0.5 * y, 0.0)
    return tags


@pytest.mark.parametrize("offset", [(3, 2), (-3, 2.02), (0, -5)])
def test_two_images_are_aligned_to_what_they_share(checkpoint, offset, capsys):
    x, y = (round(each) for each in offset)
    ground = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(ground[10:50, 10:66]).save("a.tif", tiffinfo=shifted(geotags(), 0, 0))
    Image.fromarray(ground[10 + y : 51 + y, 10 + x : 66 + x]).save("b.tif", tiffinfo=shifted(geotags(), *offset))
    with pytest.raises(DataError, match=r"b\.tif"):
        write_masks(checkpoint, "a.tif", "b.tif", device="cpu")
    write_masks(checkpoint, "a.tif", "b.tif", align=True, threshold=0.0, device="cpu")
    shared = min(40, 41 + y) - max(y, 0), 56 - abs(x)
    assert np.asarray(Image.open("mask.tif")).shape == shared
    corner = Place(Path("mask.tif")).affine[:2]
    assert corner.tolist() == [600_000 + 0.5 * max(x, 0), 3_400_000.125 - 0.5 * max(y, 0)]


def test_sizes_that_differ_by_a_row_are_aligned_where_no_place_is_known(checkpoint):
    write_images("a.png")
    write_images("b.png", size=(41, 55))
    with pytest.raises(DataError, match=r"55 × 41 pixels, but .* has 56 × 40"):
        write_masks(checkpoint, "a.png", "b.png", device="cpu")
    write_masks(checkpoint, "a.png", "b.png", align=True, device="cpu")
    assert Image.open("mask.png").size == (55, 40)


def test_off_one_grid_nothing_is_aligned(checkpoint):
    write_images("a.tif", tiffinfo=shifted(geotags(), 0, 0))
    write_images("b.tif", tiffinfo=shifted(geotags(), 0.4, 0))
    with pytest.raises(DataError, match=r"by 0\.400 pixels right and 0\.000 down"):
        write_masks(checkpoint, "a.tif", "b.tif", align=True, device="cpu")


def test_larger_images_than_allowed(checkpoint):
    write_images("a.png", "b.png")
    done = start("visualize.py", "best.pt", "a.png", "b.png", "--max-pixels", "2000", "--device", "cpu")
    done.join()
    said = Path("output.txt").read_text()
    assert done.exitcode == 1 and "a.png: 56 × 40 pixels are more than 2,000; cut it, or raise --max-pixels" in said


def test_a_console_of_few_letters(checkpoint):
    write_images("a.tif", "b.tif", tiffinfo=geotags())
    command = [sys.executable, ROOT / "visualize.py", "best.pt", "a.tif", "b.tif", "--device", "cpu"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=environment, capture_output=True)
    assert done.returncode == 0 and b" m?" in done.stdout, done.stderr


@pytest.mark.filterwarnings("error")
def test_names_in_letters_that_no_font_has(model, tmp_path):
    data = Recorder(1)
    data.name = lambda _: "東京 서울 \U00012000"
    plot_predictions(model, data, device="cpu", path=tmp_path / "x.png")


def test_pil_images_are_predicted_and_floats_up_to_255_refused(model):
    pair = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 56, 3), dtype=np.uint8)) for i in range(2)]
    assert torch.equal(model.predict(*pair), model.predict(*map(np.asarray, pair)))
    with pytest.raises(DataError, match=r"a float image is in 0\.\.1, not 0 to 255: divide it by 255"):
        model.predict(*(torch.from_numpy(np.array(image)).permute(2, 0, 1).float() for image in pair))


def test_the_command_line(checkpoint):
    write_images("a.png", "b.png")
    done = start(
        "visualize.py", "best.pt", "a.png", "b.png", "--out", "new/x.png", "--threshold", "0", "--device", "cpu"
    )
    done.join()
    said = Path("output.txt").read_text()
    assert done.exitcode == 0 and "new/x.png: 2,240 of 2,240 pixels changed (100.00%)" in said
    done = start("visualize.py", "a.png", "a.png", "b.png", "--colour", "red")
    done.join()
    said = Path("output.txt").read_text().removeprefix(said)
    assert (
        done.exitcode == 1
        and said.startswith("error: unrecognized arguments: --colour red; see")
        and said.count("\n") == 1
    )


def test_importing_it_brings_no_logger():
    """Nor what imports one, along all imports of this repository's modules."""
    to_read, seen = ["visualize"], set()
    while to_read:
        seen.add(name := to_read.pop())
        file = ROOT / f"{name.replace('.', '/')}.py"
        for node in ast.walk(ast.parse(file.read_text())) if file.exists() else ():
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            to_read += set(names) - seen
    assert "model" in seen and "torch" in seen
    assert not any(re.match("mlflow|torch.utils.tensorboard|main|metrics|data", name) for name in seen - {"dataset"})


# Where on the ground


def write_tiff(path: Path, tags: ImageFileDirectory_v2 | None) -> Path:
    Image.new("RGB", (8, 6)).save(path, tiffinfo=tags or {})
    return path


def write_png(path: Path, world: str | None) -> Path:
    Image.new("RGB", (8, 6)).save(path)
    if world is not None:
        world_file(path).write_text(world)
    return path


WORLD = "0.5\n0\n0\n-0.5\n600000.25\n3399999.875\n"


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_mask_has_the_tags_of_its_image(tmp_path, dtype):
    pair = [write_tiff(tmp_path / f"{name}.tif", geotags()) for name in "ab"]
    pixels = np.arange(48, dtype=dtype).reshape(6, 8)
    common_place(*pair)[0].save(pixels, tmp_path / "mask.tif")
    with Image.open(tmp_path / "mask.tif") as mask:
        assert np.array_equal(np.asarray(mask), pixels)
        assert {tag: mask.tag_v2[tag] for tag in GEOTAGS if tag in mask.tag_v2} == dict(geotags())


@pytest.mark.parametrize("nodata", ["0", "255"])
def test_a_mask_has_no_value_that_means_nothing(tmp_path, nodata):
    place = Place(write_tiff(tmp_path / "a.tif", geotags(nodata=nodata)))
    assert NO_DATA not in place.tags and place.affine is not None


@pytest.mark.parametrize("suffix", [".PGW", ".pgw"])
def test_a_world_file_goes_along(tmp_path, suffix):
    path = write_png(tmp_path / "a.png", None)
    path.with_suffix(suffix).write_text(WORLD)
    Place(path).save(np.zeros((6, 8), np.uint8), tmp_path / "mask.tif")
    assert (tmp_path / "mask.tfw").read_text() == WORLD


def test_tags_and_world_files_tell_the_same(tmp_path):
    tags, world = write_tiff(tmp_path / "a.tif", geotags()), write_png(tmp_path / "b.png", WORLD)
    assert Place(tags).affine.tolist() == Place(world).affine.tolist() == [600_000, 3_400_000.125, 0.5, 0, 0, -0.5]
    turned = geotags()
    del turned[33550], turned[33922]
    turned.tagtype[34264] = DOUBLE
    turned[34264] = (0.3, 0.4, 0.0, 6e5, 0.4, -0.3, 0.0, 3e6, *[0.0] * 7, 1.0)
    place = Place(write_tiff(tmp_path / "c.tif", turned))
    assert place.affine.tolist() == [6e5, 3e6, 0.3, 0.4, 0.4, -0.3] and place.pixel_area() == pytest.approx(0.25)


def test_one_of_two_knows_the_place(tmp_path):
    known, unknown = write_tiff(tmp_path / "a.tif", geotags()), write_tiff(tmp_path / "b.tif", None)
    assert dict(common_place(known, unknown)[0].tags) == dict(geotags())
    assert dict(common_place(unknown, known)[0].tags) == dict(geotags())
    assert common_place(unknown, unknown)[0].affine is None


@pytest.mark.parametrize(
    ("there", "shown"),
    [
        (geotags(x=600_000.01), "600000.01.*600000.0"),
        (geotags(scale=0.6), "0.6.*0.5"),
        (geotags(keys=geokeys(crs=32615)), "EPSG:32615.*EPSG:32614"),
    ],
)
def test_two_places(tmp_path, there, shown):
    pair = write_tiff(tmp_path / "a.tif", geotags()), write_tiff(tmp_path / "b.tif", there)
    with pytest.raises(DataError, match=rf"b\.tif: lies elsewhere than .*a\.tif.*{shown}"):
        common_place(*pair)


def test_less_than_a_hundredth_of_a_pixel_is_one_place(tmp_path):
    common_place(write_tiff(tmp_path / "a.tif", geotags()), write_tiff(tmp_path / "b.tif", geotags(x=600_000.004)))


def test_two_places_in_world_files(tmp_path):
    elsewhere = write_png(tmp_path / "b.png", WORLD.replace("600000.25", "600001"))
    with pytest.raises(DataError, match=r"b\.png: lies elsewhere than .*600000\.75.*not .*600000\.0"):
        common_place(write_png(tmp_path / "a.png", WORLD), elsewhere)


@pytest.mark.parametrize("text", ["", "1 2 3", "0,5 0 0 -0,5 600000 3400000"])
def test_a_world_file_that_is_none(tmp_path, text):
    with pytest.raises(DataError, match=r"a\.pgw: a world file holds six numbers"):
        Place(write_png(tmp_path / "a.png", text))


@pytest.mark.parametrize(
    ("name", "world"), [("x.tif", "x.tfw"), ("x.PNG", "x.pgw"), ("x.jpeg", "x.jgw"), ("a.b.jpg", "a.b.jgw")]
)
def test_names_of_world_files(name, world):
    assert world_file(Path(name)) == Path(world)


@pytest.mark.parametrize(
    ("keys", "area"),
    [
        (geokeys(), 0.25),
        ((1, 1, 0, 1, 1024, 0, 1, 2), None),  # degrees
        (geokeys(unit=9002), None),  # feet
        (geokeys(crs=WEB_MERCATOR), None),
        ((1, 1, 0, 1), None),  # cut short
    ],
)
def test_area_of_a_pixel(tmp_path, keys, area):
    assert Place(write_tiff(tmp_path / "a.tif", geotags(keys=keys))).pixel_area() == area


def test_metres_without_a_place_are_no_area(tmp_path):
    tags = geotags()
    del tags[33550], tags[33922]
    assert Place(write_tiff(tmp_path / "a.tif", tags)).pixel_area() is None


# Rasters as GDAL writes them


def entries(path: Path) -> dict[int, int]:
    """Where the entries of the first directory of a little-endian TIFF begin, by tag."""
    data = path.read_bytes()
    place = struct.unpack_from("<I", data, 4)[0]
    count = struct.unpack_from("<H", data, place)[0]
    return {struct.unpack_from("<H", data, place + 2 + 12 * i)[0]: place + 2 + 12 * i for i in range(count)}


@pytest.mark.parametrize("bands", [3, 4])
def test_bands_that_call_themselves_grey(tmp_path, bands):
    """Photometric 1, MINISBLACK, as gdal_translate writes bands without a colour."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, bands), dtype=np.uint8)
    path = tmp_path / "x.tif"
    Image.fromarray(pixels).save(path, tiffinfo={338: 0} if bands == 4 else {})
    data = bytearray(path.read_bytes())
    struct.pack_into("<H", data, entries(path)[262] + 8, 1)
    path.write_bytes(data)
    with pytest.raises(Image.UnidentifiedImageError):
        Image.open(path)
    rgb, void = read_image(path)
    assert np.array_equal(rgb, pixels[..., :3]) and void is None


@pytest.mark.parametrize("big", [False, True])
def test_a_mask_inside_the_file_and_overviews(tmp_path, big):
    """Pages of subfile type 4 and 1: void where the first is 0, the full size is the image."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    valid = np.random.default_rng(1).random((40, 60)) > 0.3
    pages = [Image.fromarray(valid), Image.fromarray(pixels).reduce(2)]
    path = tmp_path / "x.tif"
    Image.fromarray(pixels).save(path, save_all=True, append_images=pages, big_tiff=big)
    tiff, data = Tiff(path), bytearray(path.read_bytes())
    _, mask, overview = tiff.directories.values()
    value = 12 if big else 8
    struct.pack_into("<H", data, mask[262] + value, 4)  # TRANSPARENCY_MASK, which Pillow doesn't know
    for directory, kind in ((mask, 4), (overview, 1)):  # the strips' rows become the subfile's type
        struct.pack_into("<HHI" if not big else "<HHQ", data, directory[278], 254, 4, 1)
        struct.pack_into("<I", data, directory[278] + value, kind)
    path.write_bytes(data)
    rgb, void = read_image(path)
    assert np.array_equal(rgb, pixels) and np.array_equal(void, ~valid)


def test_a_point_is_a_pixels_middle(tmp_path):
    point = geotags(x=600_000.25, keys=(*geokeys()[:3], 4, *geokeys()[4:], 1025, 0, 1, 2))
    point[33922] = (0.0, 0.0, 0.0, 600_000.25, 3_399_999.875, 0.0)
    pair = write_tiff(tmp_path / "a.tif", geotags()), write_tiff(tmp_path / "b.tif", point)
    assert Place(pair[1]).affine.tolist() == Place(pair[0]).affine.tolist()
    common_place(*pair)
    Place(pair[1]).save(np.zeros((6, 8), np.uint8), tmp_path / "mask.png")
    assert (tmp_path / "mask.pgw").read_text() == WORLD.replace("0\n", "0.0\n")
    with pytest.raises(DataError, match=r"by 0\.500 pixels right"):
        common_place(pair[0], write_tiff(tmp_path / "c.tif", geotags(x=600_000.25)))


@pytest.mark.parametrize("text", ["0", "0.0", " 255 ", "255.0", "7"])
def test_no_data_of_bytes_is_not_copied(tmp_path, text):
    assert NO_DATA not in Place(write_tiff(tmp_path / "a.tif", geotags(nodata=text))).tags
    assert NO_DATA in Place(write_tiff(tmp_path / "b.tif", geotags(nodata="nan"))).tags


def test_what_tells_the_place_beside_the_image_is_carried_or_said_to_be_lost(tmp_path):
    for suffix in (".wld", ".pngw"):
        path = write_png(tmp_path / f"{suffix[1:]}.png", None)
        Path(f"{path}w" if suffix == ".pngw" else path.with_suffix(suffix)).write_text(WORLD)
        path.with_suffix(".prj").write_text("PROJCS")
        lost = Place(path).save(np.zeros((6, 8), np.uint8), tmp_path / "mask.png")
        assert (tmp_path / "mask.pgw").read_text() == WORLD and (tmp_path / "mask.prj").read_text() == "PROJCS"
        assert lost == []
    Path(f"{path}.aux.xml").write_text("<PAMDataset/>")
    assert "wld.png" in str(path) or "pngw.png.aux.xml says" in Place(path).save(np.zeros((6, 8), np.uint8), path)[0]
    points = geotags()
    del points[33550]
    points[33922] = tuple(float(value) for value in range(18))
    place = Place(write_tiff(tmp_path / "gcp.tif", points))
    assert place.save(np.zeros((6, 8), np.uint8), tmp_path / "gcp_mask.tif") == []
    assert Image.open(tmp_path / "gcp_mask.tif").tag_v2[33922] == points[33922]
    assert "ground control points" in place.save(np.zeros((6, 8), np.uint8), tmp_path / "gcp_mask.png")[0]


# Changed areas as polygons


def drawn(rings: list[list[np.ndarray]], shape: tuple[int, ...]) -> np.ndarray:
    """Polygons as GDAL and others fill them: a pixel is inside where a ray from its middle crosses the rings oddly."""
    y, x = np.mgrid[: shape[0], : shape[1]] + 0.5
    areas = np.zeros(shape, int)
    for number, of_area in enumerate(rings, 1):
        crossings = np.zeros(shape, int)
        for ring in of_area:
            for (x1, y1), (x2, y2) in zip(ring, np.roll(ring, -1, 0), strict=True):
                if y1 != y2:
                    crossings += ((y1 > y) != (y2 > y)) & (x < x1 + (y - y1) * (x2 - x1) / (y2 - y1))
        assert (areas[crossings % 2 == 1] == 0).all()  # no two overlap
        areas[crossings % 2 == 1] = number
    return areas


def cross(a, b, c, d) -> bool:
    """Whether the segments a–b and c–d cross."""

    def side(u, v, w) -> int:
        return np.sign((v[0] - u[0]) * (w[1] - u[1]) - (v[1] - u[1]) * (w[0] - u[0]))

    return side(a, b, c) * side(a, b, d) < 0 and side(c, d, a) * side(c, d, b) < 0


def masks(count: int):
    """Random ones, of two classes, with holes, and with pixels that touch at corners."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        shape = rng.integers(1, 12, 2)
        yield ((rng.random(shape) < rng.uniform(0.2, 0.95)) * rng.integers(1, 3, shape)).astype(np.uint8)


def test_polygons_give_the_mask_back():
    for mask in masks(50):
        areas, classes = connected_areas(mask)
        rings = outlines(areas)
        assert np.array_equal(drawn(rings, mask.shape), areas) and len(rings) == len(classes)
        assert np.array_equal(np.append(0, classes)[areas], mask)
        for ring in itertools.chain(*rings):
            assert len({tuple(corner) for corner in ring.tolist()}) == len(ring)  # none touches itself
            steps = np.roll(ring, -1, 0) - ring
            assert ((steps == 0).sum(1) == 1).all() and ((np.roll(steps, -1, 0) != 0) != (steps != 0)).all()


def test_outlines_worked_by_hand():
    ring = np.array([[1, 1, 1], [1, 0, 1], [1, 1, 1]], np.uint8)
    ((outer, hole),) = outlines(connected_areas(ring)[0])
    assert sorted(outer.tolist()) == [[0, 0], [0, 3], [3, 0], [3, 3]]
    assert sorted(hole.tolist()) == [[1, 1], [1, 2], [2, 1], [2, 2]]
    corners = np.array([[1, 0], [0, 1]], np.uint8)
    assert len(outlines(connected_areas(corners)[0])) == 2  # two that touch at a corner are two
    assert outlines(connected_areas(np.zeros((3, 4), np.uint8))[0]) == []


@pytest.mark.parametrize("tolerance", [0.8, 1.0, 2.5])
def test_simpler_outlines_neither_cross_nor_stray(tolerance):
    fewer = 0
    for mask in masks(25):
        areas, _ = connected_areas(mask)
        rings, simpler = outlines(areas), simplified(areas, tolerance)
        segments = []
        for before, after in zip(itertools.chain(*rings), itertools.chain(*simpler), strict=True):
            corners = [tuple(corner) for corner in after.tolist()]
            assert len(corners) >= 3 and set(corners) <= {tuple(corner) for corner in before.tolist()}
            segments += zip(corners, [*corners[1:], corners[0]], strict=True)
            fewer += len(before) - len(after)
            for corner in before:  # what was left out lies near what is left
                starts, ways = after, np.roll(after, -1, 0) - after
                along = (((corner - starts) * ways).sum(1) / (ways**2).sum(1)).clip(0, 1)
                assert np.hypot(*(starts + along[:, None] * ways - corner).T).min() <= tolerance + 1e-9
        for one, other in itertools.combinations(segments, 2):
            assert not cross(*one, *other)
        drawn([[7 * ring for ring in of_area] for of_area in simpler], (7 * mask.shape[0], 7 * mask.shape[1]))
    assert fewer > 30


def test_objects_of_a_georeferenced_pair(checkpoint, capsys):
    write_images("a.tif", "b.tif", tiffinfo=geotags())
    write_masks(checkpoint, "a.tif", "b.tif", polygons=True, min_area=1.0, device="cpu")
    mask, place = np.asarray(Image.open("mask.tif")) > 0, Place(Path("mask.tif"))
    found = json.loads(Path("mask.geojson").read_text())
    assert found["crs"]["properties"]["name"] == "urn:ogc:def:crs:EPSG::32614"
    corner, right, down = place.affine.reshape(3, 2)
    grid, rings = np.linalg.inv(np.stack([right, down])), []
    probability = FusionUNet.load(checkpoint, "cpu").predict("a.tif", "b.tif").numpy()
    for feature in found["features"]:
        coordinates, properties = feature["geometry"]["coordinates"], feature["properties"]
        assert all(ring[0] == ring[-1] for ring in coordinates)
        x, y = np.array(coordinates[0]).T
        assert (x[:-1] * y[1:] - x[1:] * y[:-1]).sum() > 0  # counterclockwise, as RFC 7946 wants it
        rings.append([((np.array(ring[:-1]) - corner) @ grid).round().astype(int) for ring in coordinates])
        inside = drawn([rings[-1]], mask.shape) > 0
        assert properties["pixels"] == inside.sum() and properties["area_m2"] == pytest.approx(inside.sum() / 4)
        assert properties["area_m2"] >= 1.0 and properties["class"] == 1
        assert properties["mean_probability"] == pytest.approx(probability[inside].mean(), abs=1e-4)
        assert properties["max_probability"] == pytest.approx(probability[inside].max(), abs=1e-4)
        middle = corner + (np.argwhere(inside)[:, ::-1].mean(0) + 0.5) @ np.stack([right, down])
        assert properties["centre"] == pytest.approx(middle.tolist())
    assert np.array_equal(drawn(rings, mask.shape) > 0, mask) and len(rings) > 1
    said = capsys.readouterr().out
    assert f", {len(rings)} objects" in said and "objects smaller than 1 m² left out" in said
    with pytest.raises(DataError, match=r"min area -1\.0"):
        write_masks(checkpoint, "a.tif", "b.tif", min_area=-1.0)


def test_a_summary_of_a_folder(checkpoint, capsys):
    write_images("split/A/x.png", "split/A/y.png", "split/B/x.png", "split/B/y.png")
    write_masks(checkpoint, "split", polygons=True, pixel_size=0.5, min_area=2.0, device="cpu")
    write_images("split/A/z.png", "split/B/z.png")
    Path("masks/x.geojson").rename("x.geojson")
    write_masks(checkpoint, "split", polygons=True, device="cpu")  # the others' rows stay
    said = capsys.readouterr().out
    assert "masks/x.png: is there already, without polygons: --overwrite makes them\n" in said
    assert "masks/y.png: is there already\n" in said
    Path("x.geojson").rename("masks/x.geojson")
    with open("masks/summary.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["mask"] for row in rows] == ["masks/x.png", "masks/y.png", "masks/z.png"]
    for row in rows:
        mask = np.asarray(Image.open(row["mask"])) > 0
        features = json.loads(Path(row["mask"]).with_suffix(".geojson").read_text())["features"]
        assert int(row["objects"]) == len(features) and int(row["changed_pixels"]) == mask.sum()
        assert float(row["share"]) == pytest.approx(mask.mean(), rel=1e-5) and float(row["seconds"]) > 0
        assert sum(feature["properties"]["pixels"] for feature in features) == mask.sum()
        name = Path(row["mask"]).name
        chance = FusionUNet.load(checkpoint, "cpu").predict(f"split/A/{name}", f"split/B/{name}").numpy()
        assert float(row["mean_probability"]) == pytest.approx(chance[mask].mean(), abs=1e-4)
    assert float(rows[0]["area_m2"]) == int(rows[0]["changed_pixels"]) / 4 and rows[2]["area_m2"] == ""
