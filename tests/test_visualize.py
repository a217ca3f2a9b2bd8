"""Figures; masks of any images; and that these lie where their images lie."""

import csv
import io
import itertools
import json
import os
import re
import runpy
import signal
import sys
import warnings
from colorsys import rgb_to_hsv
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, start
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb
from PIL import Image

from dataset import LEVIRCD, DataError
from metrics import connected_components
from model import FusionUNet
from visualize import (  # fmt: skip
    CLASSES,
    OUTCOMES,
    PANELS,
    parse_arguments,
    plot_curves,
    plot_precision_recall,
    plot_predictions,
    read_pair,
    read_place,
    write_masks,
    write_polygons,
)


class Recorder:
    """A data set that remembers which items were read."""

    def __init__(self, length: int, size: tuple[int, int] = (32, 32), classes: int = 1):
        self.length, self.size, self.classes, self.read = length, size, classes, []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        self.read.append(index)
        generator = torch.Generator().manual_seed(index)
        image_a, image_b = torch.randint(0, 256, (2, 3, *self.size), dtype=torch.uint8, generator=generator)
        label = (image_a[:1] > 127).byte() if self.classes == 1 else image_a[:1] % (self.classes + 1)
        label[:, :2] = 255
        return image_a, image_b, label


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


def pictures(figure) -> list[np.ndarray]:
    return [image.get_array() for axis in figure.axes for image in axis.get_images()]


def texts(figure) -> list:
    return [text for text in figure.findobj(plt.Text) if text.get_text()]


def assert_nothing_is_cut_off(figure) -> None:
    with warnings.catch_warnings(action="ignore"):  # of letters that no font has
        figure.savefig(io.BytesIO())
    ticks = [label for axis in figure.axes for label in (*axis.get_xticklabels(), *axis.get_yticklabels())]
    for text in texts(figure):
        box = text.get_window_extent()
        is_inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
        assert is_inside or text in ticks, text


# Figures


def test_reads_only_what_it_draws_spread_over_the_set(model, tmp_path):
    data = Recorder(1000)
    figure = plot_predictions(model, data, device="cpu", num_samples=5, path=tmp_path / "new" / "x.png")
    *looked_at, a, b, c, d, e = data.read
    assert 0 <= a < 200 <= b < 400 <= c < 600 <= d < 800 <= e < 1000 and len(looked_at) <= 40
    changed = {index: int((data[index][2] == 1).sum()) for index in looked_at}
    for drawn in (a, b, c, d, e):  # of its neighbours the one with the most change
        assert changed[drawn] == max(changed[index] for index in looked_at if index // 200 == drawn // 200)
    assert len(pictures(figure)) == 5 * len(PANELS)
    assert Image.open(tmp_path / "new" / "x.png").size[0] == 1020


@pytest.mark.parametrize(("length", "samples", "rows"), [(1, 1, 1), (3, 10, 3), (10, 1, 1)])
def test_as_many_rows_as_there_are(model, length, samples, rows):
    figure = plot_predictions(model, Recorder(length, (40, 24)), device="cpu", num_samples=samples, path=None)
    assert len(pictures(figure)) == rows * len(PANELS)


def test_leaves_mode_device_and_pyplot_alone(model):
    model.train()
    plot_predictions(model, Recorder(1), device="cpu", num_samples=1, path=None)
    assert model.training and model.mean.device.type == "cpu" and plt.get_fignums() == []


@pytest.mark.parametrize("classes", [1, 2])
def test_errors_are_drawn_and_scored(model, model_of_two, classes):
    model, data = (model, model_of_two)[classes - 1], Recorder(1, classes=classes)
    figure = plot_predictions(model, data, device="cpu", path=None)
    before, after, truth, prediction, errors, drawn_probability = pictures(figure)
    image_a, image_b, label = data[0]
    assert np.array_equal(before, image_a.permute(1, 2, 0)) and np.array_equal(after, image_b.permute(1, 2, 0))
    probability = model.predict(image_a, image_b).numpy()
    change, likeliest = (probability, 1) if classes == 1 else (probability.sum(0), 1 + probability.argmax(0))
    assert np.array_equal(drawn_probability, change)
    label = label[0].numpy()
    void = label == 255
    label, predicted = np.where(void, 0, label), np.where(~void & (change > 0.5), likeliest, 0)
    for panel, shown in ((truth, label), (prediction, predicted)):
        for number, colour in enumerate(("black", "white") if classes == 1 else ("black", *CLASSES[:2])):
            assert np.array_equal(np.isclose(panel, to_rgb(colour)).all(-1), shown == number)
    dimmed = image_b.float().mean(0).numpy()[..., None] / 255 * 0.6  # the image after is seen through it
    found, missed, false, wrong_class, _ = (np.array(to_rgb(colour)) for colour in OUTCOMES.values())
    for colour, where in (
        (found, (label > 0) & (predicted == label)), (missed, (label > 0) & (predicted == 0)),
        (false, (label == 0) & (predicted > 0)), (wrong_class, (label > 0) & (predicted > 0) & (predicted != label)),
    ):  # fmt: skip
        drawn = np.isclose(errors, 0.3 * dimmed + 0.7 * colour, atol=1e-6).all(-1)
        assert np.array_equal(drawn, where)
    assert np.allclose(errors[(label == 0) & (predicted == 0) & ~void], dimmed[(label == 0) & (predicted == 0) & ~void])
    assert np.allclose(errors[void], to_rgb(OUTCOMES["void: not scored"]))
    iou = ((predicted == label) & (label > 0)).sum() / ((predicted > 0) | (label > 0)).sum()
    said = [text.get_text() for text in texts(figure)]
    assert f"IoU {iou:.2f}, {(predicted != label).sum():,} px wrong" in said
    assert {"found", "false alarm: in the prediction only"} <= set(said)
    assert [name in said for name in ("wrong class", "class 1", "class 2")] == [classes == 2] * 3


def test_no_two_meanings_share_a_hue():
    colours = map(to_rgb, (*OUTCOMES.values(), *CLASSES))
    hues = [360 * rgb_to_hsv(*colour)[0] for colour in colours if len(set(colour)) > 1]
    apart = [min(abs(one - other), 360 - abs(one - other)) for one, other in itertools.combinations(hues, 2)]
    assert len(hues) == 6 and min(apart) > 25


@pytest.mark.filterwarnings("error")
def test_items_in_their_order_with_any_name_and_a_title(model, tmp_path):
    data = Recorder(9)
    data.name = ["東京 \U00012000", "$a$ and $\\b", "n" * 250, os.fsdecode(b"\xff")].__getitem__
    title = "worst.png: the test images with the most wrong pixels, of $run$ " + "r" * 100
    figure = plot_predictions(model, data, "cpu", path=tmp_path / "x.png", items=[1, 0, 3, 2], title=title)
    assert data.read == [1, 0, 3, 2]
    shown = [axis.get_ylabel() for axis in figure.axes if axis.get_ylabel()]
    assert shown[:2] == ["$a$ and $\\b", "東京 \U00012000"] and len(shown[3]) < 30
    assert "".join(figure.get_suptitle().split()) == title.replace(" ", "")
    assert_nothing_is_cut_off(figure)


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
    whole, _, after, truth, _, errors, _ = pictures(figure)
    image_a, image_b, label = data[0]
    assert whole.shape[:2] == (134, 367) and errors.shape[:2] == (256, 256)
    (marked,) = (patch for patch in figure.axes[0].patches)
    x, y, width, height = (round(3 * value) for value in (*marked.get_xy(), marked.get_width(), marked.get_height()))
    assert (width, height) == (256, 256) and y <= 300 and y + 256 >= 330 and x <= 700 and x + 256 >= 740
    assert np.array_equal(after, image_b[:, y : y + 256, x : x + 256].permute(1, 2, 0))
    assert np.array_equal(truth[..., 0], label[0, y : y + 256, x : x + 256].numpy() > 0)
    predicted, labelled = model.predict(image_a, image_b).numpy() > 0.5, label[0].numpy() > 0
    iou = (predicted & labelled).sum() / (predicted | labelled).sum()
    assert f"whole: IoU {iou:.2f}, 1,200 px wrong" in [text.get_text() for text in texts(figure)]


def test_whole_images_and_tiles_of_a_real_data_set(model, tiny):
    tiles, whole = ["pair_0 [0, 0]", "pair_1 [0, 0]", "pair_1 [32, 32]"], ["pair_0", "pair_1"]
    for crop_size, names, items in ((32, tiles, [0, 4, 7]), (None, whole, None)):
        figure = plot_predictions(model, LEVIRCD(tiny, "val", crop_size), "cpu", 3, None, items)
        assert [axis.get_ylabel() for axis in figure.axes if axis.get_ylabel()] == names


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said_and_the_cpu_taken(model, capsys):
    assert plot_predictions(model, Recorder(1), path=None).axes
    assert capsys.readouterr().out == "no CUDA device here: predicting on the CPU\n"


@pytest.mark.parametrize(("length", "samples"), [(0, 3), (3, 0)])
def test_nothing_to_draw(model, length, samples):
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_predictions(model, Recorder(length), device="cpu", num_samples=samples)


COLUMNS = "epoch,train_loss,train_iou,val_loss,val_iou,learning_rate,peak_learning_rate"


def test_curves_show_the_table(tmp_path):
    table = f"{COLUMNS}\n1,3,0.1,4,0.2,1e-3,2e-3\n2,1,0.5,2,0.25,1e-4,1e-3\n3,1,0.6,3,0.21,0,1e-4\n"
    (tmp_path / "metrics.csv").write_text(table)
    figure = plot_curves(tmp_path / "metrics.csv", 2, tmp_path / "curves.png")
    shown = {axis.get_title(): [line.get_xydata().tolist() for line in axis.lines[:-1]] for axis in figure.axes}
    assert shown == {
        "loss": [[[1, 3], [2, 1], [3, 1]], [[1, 4], [2, 2], [3, 3]]],
        "IoU": [[[1, 0.1], [2, 0.5], [3, 0.6]], [[1, 0.2], [2, 0.25], [3, 0.21]]],
        "learning rate": [[[1, 1e-3], [2, 1e-4], [3, 0]], [[1, 2e-3], [2, 1e-3], [3, 1e-4]]],
    }
    assert all(axis.lines[-1].get_xdata() == [2, 2] for axis in figure.axes)  # the best epoch
    assert figure.get_suptitle() == f"{tmp_path.name}: validation IoU 0.2500 in the best epoch, 2"
    assert (tmp_path / "curves.png").exists() and plt.get_fignums() == []


def test_precision_and_recall_are_marked_at_the_thresholds_below_the_whole_title():
    curve = {"precision": np.array([0.1, 0.6, 1]), "recall": np.array([1, 0.8, 0])}
    nothing = {"precision": 0.0, "recall": 0.0, "dice": 0.0}
    points = {0.5: {"precision": 0.6, "recall": 0.8, "dice": 0.6857}, 0.99966: nothing}
    title = "2026-11-28_10-00-00_$long$_name_of_a_run_with_an_experiment, epoch 97: test, crops of 256, AP 0.912"
    figure = plot_precision_recall(curve, points, title)
    drawn = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].lines}
    assert drawn["above 0.5: F1 0.686"] == [[0.8, 0.6]] and drawn["above 0.9997: F1 0.000"] == [[0, 0]]
    assert figure.get_suptitle().replace("\n", "").replace(" ", "") == title.replace(" ", "")
    assert_nothing_is_cut_off(figure)


# Masks of any images

THRESHOLD = 0.0479  # about the middle of an untrained model's probabilities


@pytest.fixture
def checkpoint(model, tmp_path, monkeypatch) -> None:
    """A checkpoint in the working folder, which is the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model, "threshold", THRESHOLD)
    torch.save(model.checkpoint(), "best.pt")


def run(*arguments: object) -> None:
    write_masks(parse_arguments(["best.pt", *map(str, arguments), "--device", "cpu"]))


def pixels_of(seed: int, size: tuple[int, int] = (40, 56)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def write_images(*names: str, size: tuple[int, int] = (40, 56), **options) -> None:
    for seed, name in enumerate(names):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels_of(seed, size)).save(name, **options)


def read(path: str | Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_the_mask_of_two_files(checkpoint, capsys):
    write_images("before.png", "after.png")
    run("before.png", "after.png", "--probability", "--pixel-size", 0.5)
    probability = FusionUNet.load("best.pt", "cpu").predict("before.png", "after.png").numpy()
    mask = read("mask.png")
    assert np.array_equal(mask, np.where(probability > THRESHOLD, 255, 0)) and 0 < mask.mean() < 255
    written = read("mask_probability.png")
    assert written.dtype == np.uint16 and np.abs(written / 65535 - probability).max() < 1e-5
    assert Image.open("mask_overlay.jpg").size == (56, 40)
    changed, objects = (mask > 0).sum(), len(connected_components(mask > 0)[1])
    said = capsys.readouterr().out
    assert (
        f"mask.png: {changed:,} of 2,240 pixels changed" in said and f", {changed / 4:,.1f} m², {objects} obj" in said
    )
    assert f"above {THRESHOLD:.4g}" in said and "written: mask.png, mask_overlay.jpg, mask_probability.png" in said
    with pytest.raises(DataError, match=r"mask\.png: is there already; --overwrite replaces it"):
        run("before.png", "after.png")
    run("before.png", "after.png", "--overwrite", "--threshold", 0)
    assert read("mask.png").all() and "2,240 of 2,240 pixels changed (100.00%), 1 object\n" in capsys.readouterr().out


def test_the_mask_of_several_classes(model_of_two, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(model_of_two.checkpoint(), "best.pt")
    write_images("a.png", "b.png")
    one, two = FusionUNet.load("best.pt", "cpu").predict("a.png", "b.png").numpy()
    middle = float(np.median(one + two))
    run("a.png", "b.png", "--probability", "--threshold", middle, "--pixel-size", 2)
    expected = np.where(one + two > middle, np.where(two > one, 2, 1), 0)
    assert np.array_equal(read("mask.png"), expected) and set(expected.flat) == {0, 1, 2}
    assert np.abs(read("mask_probability.png") / 65535 - one - two).max() < 1e-5
    said = capsys.readouterr().out
    for number in (1, 2):
        count = (expected == number).sum()
        assert f"{count:,} of 2,240 pixels of class {number} ({count / 2240:.2%}), {4 * count:,.1f} m²" in said
    with Image.open("mask.png") as mask:
        shown = np.asarray(mask.convert("RGB"))[np.asarray(mask) == 1]
        assert mask.mode == "P" and (shown == np.round(255 * np.array(to_rgb(CLASSES[0])))).all()


def test_files_without_a_suffix_are_opened_by_their_content(checkpoint):
    write_images("before", "after", format="PNG")
    run("before", "after")
    assert Path("mask.png").exists()


def test_the_masks_of_folders_are_paired_by_stem(checkpoint):
    write_images("split/A/x.png", "split/A/y.jpg", "split/B/x.tif", "split/B/y.png")
    run("split")
    run("split/A", "split/B", "--out", "again", "--threshold", THRESHOLD)
    names = {"x.png", "y.png", "x_overlay.jpg", "y_overlay.jpg", "summary.csv"}
    assert {path.name for path in Path("masks").iterdir()} == names
    for name in ("x.png", "y.png"):
        assert np.array_equal(read(f"masks/{name}"), read(f"again/{name}"))
    write_images("split/time 1/x.png", "split/time 2/x.png")
    run("split", "--folders", "time 1,time 2", "--out", "third")
    assert Path("third/x.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a.png", "nowhere.png"), "nowhere.png: is not there"),
        (("a.png", "link.png"), "link.png: a link that leads nowhere"),
        (("a.png", "small.png"), "small.png: 8 × 8 pixels, but a.png has 56 × 40; --align"),
        (("a.png", "text.png"), "text.png: can't be decoded"),
        (("a.png", "grey.png"), "grey.png: one band"),
        (("a.png", "b.png", "--out", "a.png"), "a.png: is there already"),
        (("a.png", "b.png", "--out", "a.png", "--overwrite"), "a.png: is there already, and no mask of this program"),
        (("a.png", "b.png", "--out", "mask.jpg"), "--out mask.jpg: "),
        (("a.png", "b.png", "--out", "placed.png"), "placed.pgw: is there already"),
        (("a.png",), "give two images"),
        (("empty",), "empty/A: is not there"),
        (("a.png", "empty"), "a.png and empty: no pair; give two images, two folders"),
        (("split", "--folders", "A"), "give two images, two folders, or one folder that holds A and B (--folders"),
        (("split", "--out", "split/label"), "1 of 1 pair failed"),
        (("split", "--out", "split/label", "--overwrite"), "1 of 1 pair failed"),
        (("split", "--out", "split/A", "--overwrite"), "1 of 1 pair failed"),
        (("a.png", "b.png", "--threshold", "50"), "--threshold 50.0: must be"),
        (("a.png", "b.png", "--threshold", "nan"), "--threshold nan: must be"),
        (("a.png", "b.png", "--pixel-size", "0"), "--pixel-size above 0"),
        (("a.png", "b.png", "--tile-size", "100"), "--tile-size 100: must be"),
        (
            ("a.png", "b.png", "--max-pixels", "2000"),
            "a.png: 56 × 40 pixels are more than 2,000; cut it, or raise --max",
        ),
    ],
)
def test_what_cannot_be_is_said_in_a_line_and_changes_nothing(checkpoint, arguments, message, monkeypatch):
    monkeypatch.setattr("dataset.MAX_PIXELS", 400_000_000)
    write_images("a.png", "b.png")
    write_images("small.png", size=(8, 8))
    Path("text.png").write_text("not an image")
    Path("placed.pgw").write_text("a world file")
    Path("link.png").symlink_to("gone.png")
    Path("empty").mkdir()
    Image.new("L", (56, 40)).save("grey.png")
    write_images("split/A/x.png", "split/B/x.png", "split/label/x.png")
    before = {path: path.read_bytes() for path in Path().rglob("*.*") if path.is_file()}
    with pytest.raises(DataError, match=re.escape(message)) as error:
        run(*arguments)
    assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in Path().rglob("*.*") if path.is_file()} == before


def test_a_forgotten_checkpoint_is_said():
    with pytest.raises(DataError, match=r"a\.png: not a checkpoint; give CHECKPOINT BEFORE AFTER"):
        write_masks(parse_arguments(["a.png", "b.png"]))
    with pytest.raises(DataError, match="not a checkpoint; give CHECKPOINT BEFORE AFTER"):
        write_masks(parse_arguments([str(ROOT), "b.png"]))


def test_one_bad_pair_does_not_end_the_others(checkpoint, capsys):
    names = ["x.png", "y.png", "city/z.png", "n" * 246 + ".png"]  # a name for which no overlay has room
    write_images(*[f"split/{folder}/{name}" for folder in "AB" for name in names])
    Path("split/B/x.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="2 of 4 pairs failed, see above"):
        run("split")
    said = capsys.readouterr().out
    assert "split/B/x.png: can't be decoded" in said and "masks/y.png: " in said and "File name too long" in said
    held = Path("masks/y.png").stat().st_mtime_ns
    write_images("split/B/x.png")
    Path("split/A", names[-1]).unlink()
    Path("split/B", names[-1]).unlink()
    run("split")
    said = capsys.readouterr().out
    assert "masks: 2 masks already there; --overwrite" in said and Path("masks/city/z.png").exists()
    assert Path("masks/y.png").stat().st_mtime_ns == held
    run("split", "--overwrite")
    assert Path("masks/y.png").stat().st_mtime_ns > held


def summary() -> list[dict[str, str]]:
    with open("masks/summary.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_folder_that_was_stopped_goes_on_and_its_summary_is_of_all_masks(checkpoint, monkeypatch, capsys):
    write_images(*[f"split/{folder}/{name}.png" for folder in "AB" for name in "vwxyz"])
    predict, calls = FusionUNet.predict, itertools.count()

    def stopped_at_the_third(*arguments, **options):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return predict(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(FusionUNet, "predict", stopped_at_the_third)
        run("split", "--pixel-size", 0.5, "--min-area", 2)
    assert not Path("masks/summary.csv").exists() and not list(Path("masks").glob("*.part"))
    Path("masks/v_overlay.jpg").unlink()  # to save space
    Path("masks/x_overlay.jpg").write_bytes(b"half of it")
    run("split", "--pixel-size", 0.5, "--min-area", 2)
    assert "masks: 2 masks already there" in capsys.readouterr().out
    rows, probabilities = summary(), {}
    assert [row["mask"] for row in rows] == [f"masks/{name}.png" for name in "vwxyz"]
    for row in rows:
        mask, name = read(row["mask"]) > 0, Path(row["mask"]).name
        components, _ = connected_components(mask)
        assert int(row["objects"]) == components.max() and int(row["changed_pixels"]) == mask.sum()
        assert float(row["share"]) == pytest.approx(mask.mean(), rel=1e-5) and float(row["area_m2"]) == mask.sum() / 4
        probability = FusionUNet.load("best.pt", "cpu").predict(f"split/A/{name}", f"split/B/{name}").numpy()
        probabilities[name] = probability
        assert float(row["mean_probability"]) == pytest.approx(probability[mask].mean(), abs=1e-4)
        assert np.bincount(components.ravel())[1:].min() >= 8
    Path("masks/summary.csv").write_bytes("\ufeffmask;objects\r\n".encode())  # as a spreadsheet saves it
    Path("masks/v.png").unlink()
    Path("masks/w.png").unlink()
    for name in "vw":
        Path(f"split/A/{name}.png").unlink()
        Path(f"split/B/{name}.png").unlink()
    run("split")
    assert summary() == rows[2:]


def test_half_a_mask_is_made_anew(checkpoint):
    write_images("split/A/x.png", "split/B/x.png")
    run("split")
    whole = Path("masks/x.png").read_bytes()
    Path("masks/x.png").write_bytes(whole[:200])
    run("split")
    assert np.array_equal(read("masks/x.png"), np.asarray(Image.open(io.BytesIO(whole))))


def test_masks_below_the_images_are_no_images_the_next_time(checkpoint, capsys):
    write_images("A/x.png", "B/x.png")
    for _ in range(2):
        run("A", "B", "--out", "A/masks")
    assert "A/masks: 1 mask already there" in capsys.readouterr().out


def test_names_that_are_not_utf_8(checkpoint):
    name = os.fsdecode(b"\xff.tif")
    write_images(f"split/A/{name}", f"split/B/{name}")
    run("split")
    assert Path("masks", os.fsdecode(b"\xff.png")).exists() and b"\xff.png" in Path("masks/summary.csv").read_bytes()


def test_two_swaths_without_a_common_pixel(checkpoint):
    for name, rows in (("a.png", slice(0, 20)), ("b.png", slice(20, 40))):
        image = np.dstack([pixels_of(0), np.full((40, 56), 255, np.uint8)])
        image[rows, :, 3] = 0
        Image.fromarray(image).save(name)
    with pytest.raises(DataError, match=r"b\.png: no pixel is valid both in it and in a\.png"):
        run("a.png", "b.png")


def test_the_command_line(checkpoint):
    write_images("a.png", "b.png")
    for arguments, code, message in (
        (("a.png", "b.png", "--out", "new/x.png", "--threshold", "0", "--device", "cpu"), 0, "new/x.png: 2,240 of"),
        (("a.png", "b.png", "--colour", "red"), 1, "error: unrecognized arguments: --colour red; see python"),
        (("a.png", "b.png", "--device", "tpu9"), 1, "error: device tpu9: "),
    ):  # fmt: skip
        Path("output.txt").unlink(missing_ok=True)
        done = start("visualize.py", "best.pt", *arguments)
        done.join()
        said = Path("output.txt").read_text()
        assert done.exitcode == code and message in said and (code == 0 or said.count("\n") == 1)


@pytest.mark.parametrize("kind", ["closed", "notebook", "ascii"])
def test_any_kind_of_standard_streams(checkpoint, kind, monkeypatch):
    write_images("a.png", "b.png")
    ascii_console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    stream = {"closed": None, "notebook": io.StringIO(), "ascii": ascii_console}[kind]
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(sys, "argv", "visualize.py best.pt a.png b.png --pixel-size 1 --device cpu".split())
    held = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        runpy.run_path(str(ROOT / "visualize.py"), run_name="__main__")
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN  # as under nohup: what was ignored stays so
    finally:
        signal.signal(signal.SIGINT, held)
    assert Path("mask.png").exists()
    if kind == "ascii":
        ascii_console.flush()
        assert b" m?, " in ascii_console.buffer.getvalue()


# Where images lie


@pytest.fixture
def rasterio():
    return pytest.importorskip("rasterio", reason="rasterio isn't installed")


def write_geotiff(name: str, pixels: np.ndarray, west=600_000.0, north=3_400_000.0, step=0.5, **profile) -> None:
    """A GeoTIFF in UTM zone 14 north, unless the profile says something else."""
    import rasterio

    height, width, count = pixels.shape
    place = {"crs": "EPSG:32614", "transform": rasterio.Affine(step, 0, west, 0, -step, north)}
    shape = {"height": height, "width": width, "count": count, "dtype": pixels.dtype}
    with rasterio.open(name, "w", driver="GTiff", **(shape | place | profile)) as file:
        file.write(np.moveaxis(pixels, -1, 0))


def write_geotiffs(*names: str, **profile) -> None:
    for seed, name in enumerate(names):
        write_geotiff(name, pixels_of(seed), **profile)


WORLD = "0.5\n0.0\n0.0\n-0.5\n600000.25\n3399999.75\n"  # the place of `write_geotiff`: the middle of the first pixel


def test_masks_lie_where_their_images_lie(rasterio, checkpoint, capsys):
    write_geotiffs("a.tif", "b.tif")
    run("a.tif", "b.tif", "--probability", "--threshold", 0)
    for name in ("mask.tif", "mask_probability.tif"):
        with rasterio.open(name) as file:
            assert file.crs == "EPSG:32614" and file.transform[:6] == (0.5, 0, 600_000, 0, -0.5, 3_400_000)
            assert file.compression.name == "deflate" and file.nodata is None
    assert "2,240 of 2,240 pixels changed (100.00%), 560.0 m², 1 object" in capsys.readouterr().out
    run("a.tif", "b.tif", "--out", "x.png")
    assert Path("x.pgw").read_text() == WORLD
    Path("x.prj").rename("y.prj")
    Path("x.pgw").rename("y.wld")  # another name that GDAL knows
    write_images("y.png", "z.png")
    place = read_place(Path("y.png"))
    assert place.crs == "EPSG:32614" and place.pixel_area() == 0.25 and place.transform.c == 600_000
    run("z.png", "y.png", "--out", "one_knows.tif")
    assert rasterio.open("one_knows.tif").transform == place.transform


AREAS = {
    "EPSG:32614": 0.25, "EPSG:2277": 0.25 * (1200 / 3937) ** 2,  # metres, US survey feet
    "ESRI:102003": 0.25, "+proj=tmerc +lat_0=10 +lon_0=20 +ellps=GRS80 +units=m": 0.25,  # no EPSG code
    "EPSG:2056": 0.25,  # an oblique Mercator projection, made for one country
    "EPSG:4326": None, "EPSG:3857": None, "ESRI:102100": None, "EPSG:3395": None, "ESRI:54004": None, "EPSG:4087": None,
    "+proj=merc +a=6378137 +b=6378137 +units=m +nadgrids=@null +no_defs": None, None: None,
}  # fmt: skip


@pytest.mark.parametrize(("crs", "area"), AREAS.items())
def test_area_of_a_pixel(rasterio, tmp_path, crs, area):
    write_geotiffs(f"{tmp_path}/a.tif", crs=crs, west=20.0, north=10.0)
    assert read_place(tmp_path / "a.tif").pixel_area() == (area and pytest.approx(area, rel=1e-9))


def test_an_epsg_code_alone_and_pixels_that_are_points(rasterio, tmp_path):
    tags = {33550: (0.5, 0.5, 0.0), 33922: (0.0, 0.0, 0.0, 600_000.25, 3_399_999.75, 0.0)}
    tags[34735] = (1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 2, 3072, 0, 1, 32614)  # projected, points, EPSG:32614
    Image.fromarray(pixels_of(0)).save(tmp_path / "a.tif", tiffinfo=tags)
    place = read_place(tmp_path / "a.tif")
    assert place.transform[:6] == (0.5, 0, 600_000, 0, -0.5, 3_400_000) and place.pixel_area() == 0.25


def test_a_stale_world_file_and_statistics_beside_a_geotiff_do_not_matter(rasterio, checkpoint, capsys):
    write_geotiffs("a.tif", "b.tif")
    Path("a.tfw").write_text("1\n0\n0\n-1\n7\n7\n")
    statistics = '<Metadata><MDI key="STATISTICS_MAXIMUM">255</MDI></Metadata>'
    Path("a.tif.aux.xml").write_text(f'<PAMDataset><PAMRasterBand band="1">{statistics}</PAMRasterBand></PAMDataset>')
    run("a.tif", "b.tif")
    assert read_place(Path("mask.tif")).transform.c == 600_000 and not Path("mask.tfw").exists()
    assert "aux" not in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "1 2 3", "a b c d e f"])
def test_a_world_file_that_is_none(rasterio, tmp_path, text):
    write_images(f"{tmp_path}/a.png")
    (tmp_path / "a.PGW").write_text(text)
    with pytest.raises(DataError, match=r"a\.PGW: a world file holds six numbers"):
        read_place(tmp_path / "a.png")


@pytest.mark.parametrize("kind", ["no data", "internal mask", "mask file", "alpha"])
def test_void_pixels_are_neither_predicted_nor_counted(rasterio, checkpoint, capsys, kind):
    image, valid = pixels_of(1).clip(8), np.full((40, 56), 255, np.uint8)
    image[:10] = 7
    image[10, :5, 0] = 7  # one band alone is not void
    valid[:10] = 0
    write_geotiffs("a.tif")
    write_geotiff(
        "b.tif", np.dstack([image, valid]) if kind == "alpha" else image, nodata=7 if kind == "no data" else None
    )
    if kind.endswith("mask") or kind.startswith("mask"):
        inside = kind == "internal mask"
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=inside), rasterio.open("b.tif", "r+") as file:
            file.write_mask(valid)
        assert Path("b.tif.msk").exists() != inside
    run("a.tif", "b.tif", "--threshold", 0, "--probability")
    assert np.array_equal(read("mask.tif"), valid) and np.array_equal(read("mask_probability.tif") > 0, valid > 0)
    assert "1,680 of 1,680 pixels changed (100.00%), 420.0 m²" in capsys.readouterr().out


def test_pairs_that_are_off_by_more_than_a_hundredth_of_a_pixel(rasterio, tmp_path):
    write_geotiff(tmp_path / "a.tif", pixels_of(0))
    for name, kind in {
        "shifted": {"west": 600_000.25}, "coarser": {"step": 0.501}, "elsewhere": {"crs": "EPSG:32615"},
        "degrees": {"crs": "EPSG:4326"},
    }.items():  # fmt: skip
        write_geotiff(tmp_path / f"{name}.tif", pixels_of(1), **kind)
        with pytest.raises(DataError, match=rf"{name}\.tif: lies elsewhere than .*a\.tif, .*--align") as error:
            read_pair(tmp_path / "a.tif", tmp_path / f"{name}.tif", align=False)
        assert name != "shifted" or "by 0.500 pixels right and 0.000 down" in str(error.value)
    write_geotiff(tmp_path / "same.tif", pixels_of(1), west=600_000.004)
    read_pair(tmp_path / "a.tif", tmp_path / "same.tif", align=False)


@pytest.mark.parametrize("kind", ["tif", "png"])
@pytest.mark.parametrize(("x", "y"), [(3, 2), (-3, 2), (0, -5)])
def test_the_second_image_is_aligned_to_the_first(rasterio, checkpoint, x, y, kind):
    ground = pixels_of(0, (60, 80))
    parts = {"a": (ground[10:50, 10:66], 0, 0), "b": (ground[10 + y : 51 + y, 10 + x : 66 + x], x, y)}
    for name, (pixels, right, down) in parts.items():
        if kind == "tif":
            write_geotiff(f"{name}.tif", pixels, 600_000 + 0.5 * right, 3_400_000 - 0.5 * down)
        else:
            Image.fromarray(pixels).save(f"{name}.png")
            Path(f"{name}.pgw").write_text(f"0.5\n0\n0\n-0.5\n{600_000.25 + right / 2}\n{3_399_999.75 - down / 2}")
    image_a, image_b, void, place = read_pair(Path(f"a.{kind}"), Path(f"b.{kind}"), align=True)
    covered = np.zeros((40, 56), bool)
    covered[max(y, 0) : 41 + y, max(x, 0) : 56 + x] = True
    assert np.array_equal(image_a, parts["a"][0]) and np.array_equal(void, ~covered)
    assert np.array_equal(image_b[covered], image_a[covered])
    run(f"a.{kind}", f"b.{kind}", "--align", "--threshold", 0)
    assert np.array_equal(read(f"mask.{kind}") > 0, covered) and place.transform.c == 600_000


@pytest.mark.parametrize("kind", [{"step": 0.25}, {"crs": "EPSG:32615"}])
def test_other_pixel_sizes_and_systems_are_aligned(rasterio, tmp_path, kind):
    """A smooth ramp of brightness, seen twice, is the same after it was resampled."""
    from rasterio.warp import transform

    def ramp(crs: str, west: float, north: float, step: float, shape: tuple[int, int]) -> np.ndarray:
        rows, columns = np.mgrid[: shape[0], : shape[1]] + 0.5
        x, y = transform(crs, "EPSG:32614", (west + step * columns).ravel(), (north - step * rows).ravel())
        value = 100 + (np.array(x) - 600_000) + (np.array(y) - 3_400_000)
        return np.repeat(value.reshape(*shape, 1).round().clip(0, 255).astype(np.uint8), 3, axis=2)

    crs, step = kind.get("crs", "EPSG:32614"), kind.get("step", 0.5)
    (west,), (north,) = transform("EPSG:32614", crs, [600_000.0], [3_400_000.0])
    for name, place in {
        "a": ("EPSG:32614", 600_000.0, 3_400_000.0, 0.5),
        "b": (crs, west - 9, north + 9, step),
    }.items():
        pixels = ramp(*place, (160, 240))
        write_geotiff(tmp_path / f"{name}.tif", pixels, *place[1:], crs=place[0])
    image_a, image_b, void, _ = read_pair(tmp_path / "a.tif", tmp_path / "b.tif", align=True)
    assert 0.1 < 1 - void.mean() <= 1 and np.abs(image_a[~void].astype(int) - image_b[~void]).max() <= 1


def test_sizes_that_differ_by_a_row_are_cut_where_no_place_is_known(checkpoint):
    write_images("a.png")
    write_images("b.png", size=(41, 55))
    run("a.png", "b.png", "--align")
    assert Image.open("mask.png").size == (55, 40)


def control_points(rasterio) -> dict:
    """Ground control points in the corners that say the same as the transform of `write_geotiff`."""
    from rasterio.control import GroundControlPoint

    corners = itertools.product((0, 40), (0, 56))
    points = [GroundControlPoint(row, column, 600_000 + column / 2, 3_400_000 - row / 2) for row, column in corners]
    return {"gcps": points, "transform": None}


def test_ground_control_points(rasterio, checkpoint, capsys):
    write_geotiffs("a.tif", "b.tif", **control_points(rasterio))
    run("a.tif", "b.tif", "--polygons")
    with rasterio.open("mask.tif") as mask:
        points = [(point.row, point.col, point.x, point.y) for point in mask.gcps[0]]
        assert points == [
            (row, column, 600_000 + column / 2, 3_400_000 - row / 2) for row in (0, 40) for column in (0, 56)
        ]
        assert mask.gcps[1] == "EPSG:32614" and mask.crs is None
    assert "m²" not in capsys.readouterr().out
    write_geotiffs("c.tif", "d.tif")
    run("c.tif", "d.tif", "--polygons", "--out", "by_transform.tif")
    by_points, by_transform = (
        [feature["geometry"]["coordinates"][0] for feature in json.loads(Path(name).read_text())["features"]]
        for name in ("mask.geojson", "by_transform.geojson")
    )
    assert len(by_points) == len(by_transform) > 1
    for one, other in zip(by_points, by_transform, strict=True):
        assert np.allclose(one, other, rtol=0, atol=1e-8)
    run("a.tif", "b.tif", "--out", "x.png")
    assert "x.png: a PNG can't hold control points" in capsys.readouterr().out


# Polygons


def polygons(mask: np.ndarray, path: Path, place=None) -> list[dict]:
    components, classes = connected_components(mask)
    objects = {number: {"class": int(kind), "centre": (0.0, 0.0)} for number, kind in enumerate(classes, 1)}
    write_polygons(path, components, objects, place)
    collection = json.loads(path.read_text())
    assert collection.keys() == {"type", "features"} and collection["type"] == "FeatureCollection"
    assert len(collection["features"]) == len(classes)
    return collection["features"]


def signed_area(ring: list[list[float]]) -> float:
    x, y = (np.array(ring) - ring[0]).T
    return (x[:-1] * y[1:] - x[1:] * y[:-1]).sum() / 2


def test_polygons_give_the_mask_back(rasterio, tmp_path):
    """Random masks of two classes, with holes, and with pixels that touch at corners, filled by GDAL."""
    from rasterio.features import rasterize

    rng = np.random.default_rng(0)
    for _ in range(50):
        shape = rng.integers(1, 12, 2)
        mask = ((rng.random(shape) < rng.uniform(0.2, 0.95)) * rng.integers(1, 3, shape)).astype(np.uint8)
        features = polygons(mask, tmp_path / "x.geojson")
        filled = np.zeros(mask.shape, int)
        for feature in features:
            exterior, *holes = feature["geometry"]["coordinates"]
            assert signed_area(exterior) > 0 and all(signed_area(hole) < 0 for hole in holes)  # as RFC 7946 wants it
            assert all(ring[0] == ring[-1] for ring in (exterior, *holes))
            drawn = rasterize([feature["geometry"]], mask.shape)
            assert drawn.sum() == signed_area(exterior) + sum(map(signed_area, holes))
            filled += drawn * feature["properties"]["class"]
        assert np.array_equal(filled, mask)


def test_polygons_worked_by_hand(rasterio, tmp_path):
    ring = np.array([[1, 1, 1], [1, 0, 1], [1, 1, 1]], np.uint8)
    (feature,) = polygons(ring, tmp_path / "x.geojson")
    exterior, hole = feature["geometry"]["coordinates"]
    assert sorted(exterior[1:]) == [[0, 0], [0, 3], [3, 0], [3, 3]] and sorted(hole[1:]) == [
        [1, 1],
        [1, 2],
        [2, 1],
        [2, 2],
    ]
    assert len(polygons(np.eye(2, dtype=np.uint8), tmp_path / "x.geojson")) == 2  # two that touch at a corner are two
    assert polygons(np.zeros((3, 4), np.uint8), tmp_path / "x.geojson") == []


@pytest.mark.parametrize(
    ("crs", "west", "north", "expected"),
    [
        ("EPSG:32614", 500_000.0, 0.0, (-99.0, 0.0)),  # where the zone's meridian meets the equator
        ("ESRI:102003", 0.0, 0.0, (-96.0, 37.5)),  # the origins of two systems without EPSG codes
        ("+proj=tmerc +lat_0=10 +lon_0=20 +ellps=GRS80 +units=m", 0.0, 0.0, (20.0, 10.0)),
        ("EPSG:3857", 6_378_137 * np.pi / 2, 6_378_137 * np.arctanh(0.5), (90.0, 30.0)),
        ("EPSG:4326", 12.5, 42.25, (12.5, 42.25)),
    ],
)
def test_polygons_are_in_longitude_and_latitude(rasterio, tmp_path, crs, west, north, expected):
    write_geotiff(tmp_path / "a.tif", pixels_of(0), west, north, 1e-4, crs=crs)
    (feature,) = polygons(np.ones((1, 1), np.uint8), tmp_path / "x.geojson", read_place(tmp_path / "a.tif"))
    (exterior,) = feature["geometry"]["coordinates"]
    west, north = min(x for x, _ in exterior), max(y for _, y in exterior)
    assert (west, north) == pytest.approx(expected, abs=2e-9) and signed_area(exterior) > 0
    assert all(round(value, 9) == value for corner in exterior for value in corner)


@pytest.mark.parametrize("crs", [None, 'LOCAL_CS["somewhere",UNIT["metre",1]]'])
def test_polygons_without_longitudes_are_in_pixels_and_it_is_said(rasterio, tmp_path, capsys, crs):
    write_geotiff(tmp_path / "a.tif", pixels_of(0), crs=crs)
    mask = np.zeros((40, 56), np.uint8)
    mask[3, 5] = 1
    (feature,) = polygons(mask, tmp_path / "x.geojson", read_place(tmp_path / "a.tif"))
    assert sorted(feature["geometry"]["coordinates"][0][1:]) == [[5, 3], [5, 4], [6, 3], [6, 4]]
    assert "x.geojson: in pixels, since no reference system" in capsys.readouterr().out


def test_objects_of_a_georeferenced_pair(rasterio, checkpoint, capsys):
    from rasterio.features import rasterize
    from rasterio.warp import transform, transform_geom

    write_geotiffs("a.tif", "b.tif")
    run("a.tif", "b.tif", "--polygons", "--min-area", 1)
    mask, grid = read("mask.tif") > 0, rasterio.open("mask.tif").transform
    probability = FusionUNet.load("best.pt", "cpu").predict("a.tif", "b.tif").numpy()
    features, filled = json.loads(Path("mask.geojson").read_text())["features"], np.zeros(mask.shape, int)
    for feature in features:
        properties = feature["properties"]
        back = transform_geom("EPSG:4326", "EPSG:32614", feature["geometry"])
        inside = rasterize([back], mask.shape, transform=grid) > 0
        assert properties["pixels"] == inside.sum() >= 4 and properties["area_m2"] == inside.sum() / 4
        assert properties["class"] == 1
        assert properties["mean_probability"] == pytest.approx(probability[inside].mean(), abs=1e-4)
        assert properties["max_probability"] == pytest.approx(probability[inside].max(), abs=1e-4)
        y, x = np.argwhere(inside).mean(0) + 0.5
        (longitude,), (latitude,) = transform("EPSG:32614", "EPSG:4326", [600_000 + x / 2], [3_400_000 - y / 2])
        assert properties["centre"] == pytest.approx([longitude, latitude], abs=1e-8)
        filled += inside
    assert np.array_equal(filled, mask) and len(features) > 1
    said = capsys.readouterr().out
    assert f", {len(features)} objects" in said and "objects smaller than 1 m² left out" in said


# Without rasterio


@pytest.fixture
def no_rasterio(monkeypatch):
    monkeypatch.setitem(sys.modules, "rasterio", None)  # importing it fails, as where it isn't installed


def test_plain_images_need_no_rasterio(no_rasterio, checkpoint):
    write_images("a.png", "b.jpg")
    write_images("c.tif", "d.bmp", compression=None)
    run("a.png", "b.jpg", "--out", "x.tif", "--probability")
    run("c.tif", "d.bmp")
    assert read("x.tif").shape == read("mask.png").shape == (40, 56)


def test_what_needs_rasterio_is_said(rasterio, checkpoint, monkeypatch):
    write_geotiffs("a.tif", "b.tif")
    write_images("c.png", "d.png")
    write_images("e.png")
    Path("e.pgw").write_text(WORLD)
    monkeypatch.setitem(sys.modules, "rasterio", None)
    for arguments, name in (
        (("a.tif", "b.tif"), "a.tif"),
        (("c.png", "d.png", "--polygons", "--out", "x.png"), "--polygons"),
        (("e.png", "d.png", "--out", "y.png"), "e.png"),
    ):
        with pytest.raises(DataError, match=rf"^{re.escape(name)}: .*pip install rasterio"):
            run(*arguments)
