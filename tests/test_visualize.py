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
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb
from PIL import Image
from scipy import ndimage

import visualize
from dataset import DataError
from metrics import connected_components
from model import FusionUNet
from visualize import CLASSES, OUTCOMES, PANELS, plot_predictions, read_pair, read_place, write_polygons


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


# Figures


def test_draws_whole_pairs_spread_over_the_set_and_reads_no_others(model, tmp_path):
    data = Recorder(1000)
    model.train()
    figure = plot_predictions(model, data, device="cpu", num_samples=5, path=tmp_path / "new" / "x.png")
    assert model.training and model.mean.device.type == "cpu" and plt.get_fignums() == []
    assert len(pictures(figure)) == 5 * len(PANELS) and (tmp_path / "new" / "x.png").exists()
    *looked_at, a, b, c, d, e = data.read
    assert 0 <= a < 200 <= b < 400 <= c < 600 <= d < 800 <= e < 1000 and len(looked_at) <= 40
    changed = {index: int((data[index][2] == 1).sum()) for index in looked_at}
    for drawn in (a, b, c, d, e):  # of its neighbours the one with the most change
        assert changed[drawn] == max(changed[index] for index in looked_at if index // 200 == drawn // 200)
    figure = plot_predictions(model, Recorder(3, (40, 300)), device="cpu", num_samples=10, path=None)
    assert [picture.shape[:2] for picture in pictures(figure)] == [(40, 300)] * 3 * len(PANELS)
    for length, samples in ((0, 3), (3, 0)):
        with pytest.raises(ValueError, match="nothing to draw"):
            plot_predictions(model, Recorder(length), device="cpu", num_samples=samples)


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
    right = (label == 0) & (predicted == 0) & ~void
    assert np.allclose(errors[right], dimmed[right])
    assert np.allclose(errors[void], to_rgb(OUTCOMES["void: not scored"]))
    iou = ((predicted == label) & (label > 0)).sum() / ((predicted > 0) | (label > 0)).sum()
    said = [text.get_text() for text in figure.findobj(plt.Text)]
    assert f"IoU {iou:.2f}, {(predicted != label).sum():,} px wrong" in said
    assert {"found", "false alarm: in the prediction only"} <= set(said)
    assert [name in said for name in ("wrong class", "class 1", "class 2")] == [classes == 2] * 3


@pytest.mark.filterwarnings("error")
def test_items_in_their_order_with_any_name_and_a_title(model, tmp_path):
    data = Recorder(9)
    data.name = ["東京 \U00012000", r"$\b$", "n" * 250, os.fsdecode(b"\xff")].__getitem__
    title = r"worst.png: the test images with the most wrong pixels, of $\run$ " + "r" * 100
    figure = plot_predictions(model, data, "cpu", path=tmp_path / "x.png", items=[1, 0, 3, 2], title=title)
    assert data.read == [1, 0, 3, 2]
    shown = [axis.get_ylabel() for axis in figure.axes if axis.get_ylabel()]
    assert shown[:2] == [r"$\b$", "東京 \U00012000"] and len(shown[3]) < 30
    assert "".join(figure.get_suptitle().split()) == title.replace(" ", "") and "\n" in figure.get_suptitle()


def test_curves_show_the_table(tmp_path):
    columns = "epoch,train_loss,train_iou,val_loss,val_iou,learning_rate"
    rows = "1,3,0.1,4,0.2,1e-3\n2,1,0.5,2,0.25,1e-4\n3,1,0.6,3,0.21,0\n"
    (tmp_path / "metrics.csv").write_text(f"{columns}\n{rows}")
    figure = visualize.plot_curves(tmp_path / "metrics.csv", 2, tmp_path / "curves.png")
    shown = {axis.get_title(): [line.get_xydata().tolist() for line in axis.lines[:-1]] for axis in figure.axes}
    assert shown == {
        "loss": [[[1, 3], [2, 1], [3, 1]], [[1, 4], [2, 2], [3, 3]]],
        "IoU": [[[1, 0.1], [2, 0.5], [3, 0.6]], [[1, 0.2], [2, 0.25], [3, 0.21]]],
        "learning rate": [[[1, 1e-3], [2, 1e-4], [3, 0]]],
    }
    assert all(axis.lines[-1].get_xdata() == [2, 2] for axis in figure.axes)  # the best epoch
    assert figure.get_suptitle() == f"{tmp_path.name}: validation IoU 0.2500 in the best epoch, 2"
    assert (tmp_path / "curves.png").exists() and plt.get_fignums() == []


def test_precision_and_recall_are_marked_at_the_thresholds(tmp_path):
    curve = {"precision": np.array([0.1, 0.6, 1]), "recall": np.array([1, 0.8, 0])}
    nothing = {"precision": 0.0, "recall": 0.0, "dice": 0.0}
    points = {0.5: {"precision": 0.6, "recall": 0.8, "dice": 0.6857}, 0.99966: nothing}
    figure = visualize.plot_precision_recall(curve, points, r"a $\run$", tmp_path / "x.png")
    drawn = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].lines}
    assert [[1, 0.1], [0.8, 0.6], [0, 1]] in drawn.values() and (tmp_path / "x.png").exists()
    assert drawn["above 0.5: F1 0.686"] == [[0.8, 0.6]] and drawn["above 0.9997: F1 0.000"] == [[0, 0]]


# Masks of any images

THRESHOLD = 0.0479  # about the middle of an untrained model's probabilities


@pytest.fixture
def checkpoint(model, tmp_path, monkeypatch) -> None:
    """A checkpoint in the working folder, which is the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model, "threshold", THRESHOLD)
    torch.save(model.checkpoint(), "best.pt")


def run(*arguments: object) -> None:
    visualize.write_masks(visualize.parse_arguments(["best.pt", *map(str, arguments), "--device", "cpu"]))


def pixels_of(seed: int, size: tuple[int, int] = (40, 56)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def write_images(*names: str, size: tuple[int, int] = (40, 56), **options) -> None:
    for seed, name in enumerate(names):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels_of(seed, size)).save(name, **options)


def read(path: str | Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def predicted(path_a: str, path_b: str) -> np.ndarray:
    return FusionUNet.load("best.pt", "cpu").predict(path_a, path_b).numpy()


def test_the_mask_of_two_files(checkpoint, capsys):
    write_images("before.png", "after.png")
    run("before.png", "after.png", "--probability", "--pixel-size", 0.5)
    probability, mask = predicted("before.png", "after.png"), read("mask.png")
    assert np.array_equal(mask, np.where(probability > THRESHOLD, 255, 0)) and 0 < mask.mean() < 255
    written = read("mask_probability.png")
    assert written.dtype == np.uint16 and np.abs(written / 65535 - probability).max() < 1e-5
    overlay, is_changed = np.asarray(Image.open("mask_overlay.jpg").convert("L")), mask > 0
    outline = is_changed & ~ndimage.binary_erosion(is_changed, border_value=1)
    beside = ndimage.binary_dilation(is_changed) & ~is_changed
    assert overlay[outline].mean() > 180 and overlay[beside].mean() < 60  # yellow and black on noise, as JPEG
    changed, objects = is_changed.sum(), connected_components(is_changed)[0].max()
    said = capsys.readouterr().out
    assert f"mask.png: {changed:,} of 2,240 pixels changed" in said
    assert f", {changed / 4:,.1f} m², {objects} obj" in said and f"above {THRESHOLD:.4g}" in said
    with pytest.raises(DataError, match=r"mask\.png: is there already; --overwrite replaces it"):
        run("before.png", "after.png")
    run("before.png", "after.png", "--overwrite", "--threshold", 0)
    assert read("mask.png").all() and "2,240 of 2,240 pixels changed (100.00%), 1 object\n" in capsys.readouterr().out


def test_the_mask_of_several_classes(model_of_two, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(model_of_two.checkpoint(), "best.pt")
    write_images("a.png", "b.png")
    one, two = predicted("a.png", "b.png")
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


def test_folders_are_paired_by_stem_with_names_that_are_not_utf_8(checkpoint):
    odd = os.fsdecode(b"\xff")
    write_images(*[f"split/{name}" for name in ("A/x.png", "A/y.jpg", "B/x.tif", "B/y.png")])
    write_images(f"split/A/{odd}.tif", f"split/B/{odd}.tif")
    run("split")
    names = {f"{stem}{end}" for stem in ("x", "y", odd) for end in (".png", "_overlay.jpg")}
    assert {path.name for path in Path("masks").iterdir()} == names | {"summary.csv"}
    assert b"\xff.png" in Path("masks/summary.csv").read_bytes()
    write_images("split/time 1/x.png", "split/time 2/x.png")
    for out in ("split/time 1/masks", "split/time 1/masks", "other"):  # masks aren't images the next time
        run("split", "--folders", "time 1,time 2", "--out", out)
    assert Path("split/time 1/masks/x.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a.png", "nowhere.png"), "nowhere.png: is not there"),
        (("a.png", "link.png"), "link.png: a link that leads nowhere"),
        (("a.png", "small.png"), "small.png: 8 × 8 pixels, but a.png has 56 × 40; --align"),
        (("left.png", "right.png"), "right.png: no pixel is valid both in it and in left.png"),
        (("a.png", "b.png", "--out", "a.png", "--overwrite"), "a.png: is there already, and no mask of this program"),
        (("a.png", "b.png", "--out", "mask.jpg"), "--out mask.jpg: "),
        (("a.png", "b.png", "--out", "placed.png"), "placed.pgw: is there already"),
        (("a.png", "empty"), "a.png and empty: no pair; give two images, two folders"),
        (("split", "--folders", "A"), "give two images, two folders, or one folder that holds A and B (--folders"),
        (("split", "--out", "split/A", "--overwrite"), "1 of 1 pair failed"),
        (("a.png", "b.png", "--threshold", "nan"), "--threshold nan: must be"),
        (("a.png", "b.png", "--pixel-size", "0"), "--pixel-size above 0"),
        (("a.png", "b.png", "--max-pixels", "2000"), "a.png: 56 × 40 pixels are more than 2,000; cut it, or raise"),
    ],
)
def test_what_cannot_be_is_said_in_a_line_and_changes_nothing(checkpoint, arguments, message, monkeypatch):
    monkeypatch.setattr("dataset.MAX_PIXELS", 400_000_000)
    write_images("a.png", "b.png", "split/A/x.png", "split/B/x.png")
    write_images("small.png", size=(8, 8))
    Path("placed.pgw").write_text("a world file")
    Path("link.png").symlink_to("gone.png")
    Path("empty").mkdir()
    opacity = np.repeat(np.array([0, 255], np.uint8), 1120).reshape(40, 56)
    for name, alpha in (("left.png", opacity), ("right.png", 255 - opacity)):
        Image.fromarray(np.dstack([pixels_of(0), alpha])).save(name)
    before = {path: path.read_bytes() for path in Path().rglob("*.*") if path.is_file()}
    with pytest.raises(DataError, match=re.escape(message)) as error:
        run(*arguments)
    assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in Path().rglob("*.*") if path.is_file()} == before


def test_one_bad_pair_does_not_end_the_others(checkpoint, capsys):
    names = ["x.png", "y.png", "city/z.png", "n" * 246 + ".png"]  # a name for which no overlay has room
    write_images(*[f"split/{folder}/{name}" for folder in "AB" for name in names])
    Path("split/B/x.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="2 of 4 pairs failed, see above"):
        run("split")
    said = capsys.readouterr().out
    assert "split/B/x.png: can't be decoded" in said and "masks/y.png: " in said and "File name too long" in said
    assert Path("masks/city/z.png").exists() and not Path("masks/x.png").exists()


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
    held = Path("masks/v.png").stat().st_mtime_ns
    os.truncate("masks/w.png", 200)  # half a mask is made again
    Path("masks/x_overlay.jpg").write_bytes(b"half of it")
    run("split", "--pixel-size", 0.5, "--min-area", 2)
    assert "masks: 1 mask already there" in capsys.readouterr().out
    assert Path("masks/v.png").stat().st_mtime_ns == held
    rows = summary()
    assert [row["mask"] for row in rows] == [f"masks/{name}.png" for name in "vwxyz"]
    for row in rows:
        mask, name = read(row["mask"]) > 0, Path(row["mask"]).name
        components, _ = connected_components(mask)
        assert int(row["objects"]) == components.max() and int(row["changed_pixels"]) == mask.sum()
        assert float(row["share"]) == pytest.approx(mask.mean(), rel=1e-5) and float(row["area_m2"]) == mask.sum() / 4
        probability = predicted(f"split/A/{name}", f"split/B/{name}")
        assert float(row["mean_probability"]) == pytest.approx(probability[mask].mean(), abs=1e-4)
        assert np.bincount(components.ravel())[1:].min() >= 8
    Path("masks/summary.csv").write_bytes("\ufeffmask;objects\r\n".encode())  # as a spreadsheet saves it
    for path in ("masks/v.png", "split/A/v.png", "split/B/v.png"):
        Path(path).unlink()
    run("split")
    assert summary() == rows[1:]
    held = Path("masks/w.png").stat().st_mtime_ns
    run("split", "--overwrite")
    assert Path("masks/w.png").stat().st_mtime_ns > held


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--out new/x.png --threshold 0 --pixel-size 1", "2,240 of 2,240 pixels changed (100.00%), 2,240.0 m?"),
        ("--colour red", "error: unrecognized arguments: --colour red; see python"),
        ("--device tpu9", "error: device tpu9: "),
    ],
)
def test_the_command_line_in_a_console_of_few_letters(checkpoint, arguments, said, monkeypatch):
    write_images("a.png", "b.png")
    console, end = io.TextIOWrapper(io.BytesIO(), encoding="ascii"), ""
    monkeypatch.setattr(sys, "stdout", console)
    monkeypatch.setattr(sys, "argv", f"visualize.py best.pt a.png b.png --device cpu {arguments}".split())
    monkeypatch.setattr(signal, "getsignal", lambda _: signal.SIG_IGN)  # as under nohup
    monkeypatch.setattr(signal, "signal", None)  # so that setting it fails
    try:
        runpy.run_path(str(ROOT / "visualize.py"), run_name="__main__")
    except SystemExit as error:
        end = error.code
    console.flush()
    assert said in (end or console.buffer.getvalue().decode()) and "\n" not in end


def test_closed_streams(checkpoint, monkeypatch):
    write_images("a.png", "b.png")
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    monkeypatch.setattr(sys, "argv", "visualize.py best.pt a.png b.png --device cpu".split())
    runpy.run_path(str(ROOT / "visualize.py"), run_name="__main__")
    assert Path("mask.png").exists()


# Where images lie


@pytest.fixture
def rasterio():
    return pytest.importorskip("rasterio", reason="rasterio isn't installed")


def write_geotiff(name: str, pixels: np.ndarray, west=600_000.0, north=3_400_000.0, step=0.5, **profile) -> None:
    """A GeoTIFF in UTM zone 14 north, unless the profile says something else."""
    import rasterio

    height, width, count = pixels.shape
    place = {"crs": "EPSG:32614", "transform": rasterio.Affine(step, 0, west, 0, -step, north)}
    shape = {"driver": "GTiff", "height": height, "width": width, "count": count, "dtype": pixels.dtype}
    with rasterio.open(name, "w", **(shape | place | profile)) as file:
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
    assert Path("x.pgw").read_text() == WORLD and not Path("x.prj").exists()
    Path("x.pgw").rename("y.wld")  # another name that GDAL knows
    Path("y.prj").write_text(rasterio.CRS.from_epsg(32614).to_wkt(version="WKT1_ESRI"))
    write_images("y.png", "z.png")
    place = read_place(Path("y.png"))
    assert place.crs == "EPSG:32614" and place.pixel_area() == 0.25 and place.transform.c == 600_000
    run("z.png", "y.png", "--out", "one_knows.tif")
    assert rasterio.open("one_knows.tif").transform == place.transform


AREAS = {
    "EPSG:32614": 0.25, "EPSG:2277": 0.25 * (1200 / 3937) ** 2,  # metres, US survey feet
    "ESRI:102003": 0.25, "EPSG:2056": 0.25,  # without an EPSG code; an oblique Mercator projection, for one country
    "EPSG:4326": None, "EPSG:3857": None, "ESRI:54004": None, "EPSG:4087": None,
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


def test_world_files_that_are_stale_or_none(rasterio, tmp_path):
    write_geotiffs(f"{tmp_path}/a.tif")
    (tmp_path / "a.tfw").write_text("1\n0\n0\n-1\n7\n7\n")
    assert read_place(tmp_path / "a.tif").transform.c == 600_000  # a GeoTIFF's own place counts
    write_images(f"{tmp_path}/a.png")
    for text in ("", "1 2 3", "a b c d e f"):
        (tmp_path / "a.PGW").write_text(text)
        with pytest.raises(DataError, match=r"a\.PGW: a world file holds six numbers"):
            read_place(tmp_path / "a.png")


@pytest.mark.parametrize("kind", ["no data", "COG", "internal mask", "mask file", "alpha"])
def test_void_pixels_are_neither_predicted_nor_counted(rasterio, checkpoint, capsys, kind):
    image, valid = pixels_of(1).clip(8), np.full((40, 56), 255, np.uint8)
    image[:10] = 7
    image[10, :5, 0] = 7  # one band alone is not void
    valid[:10] = 0
    profiles = {"no data": {"nodata": 7}, "COG": {"nodata": 7, "driver": "COG", "blocksize": 16}}
    write_geotiffs("a.tif")
    write_geotiff("b.tif", np.dstack([image, valid]) if kind == "alpha" else image, **profiles.get(kind, {}))
    if "mask" in kind:
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=kind == "internal mask"), rasterio.open("b.tif", "r+") as file:
            file.write_mask(valid)
        assert Path("b.tif.msk").exists() == (kind == "mask file")
    run("a.tif", "b.tif", "--threshold", 0, "--probability")
    assert np.array_equal(read("mask.tif"), valid) and np.array_equal(read("mask_probability.tif") > 0, valid > 0)
    assert "1,680 of 1,680 pixels changed (100.00%), 420.0 m²" in capsys.readouterr().out


@pytest.mark.parametrize("profile", [{"west": 600_000.25}, {"step": 0.501}, {"crs": "EPSG:32615"}])
def test_pairs_that_are_off_by_more_than_a_hundredth_of_a_pixel(rasterio, tmp_path, profile):
    write_geotiffs(*(f"{tmp_path}/{name}.tif" for name in "ab"))
    write_geotiff(tmp_path / "off.tif", pixels_of(1), **profile)
    with pytest.raises(DataError, match=r"off\.tif: lies elsewhere than .*a\.tif, .*--align") as error:
        read_pair(tmp_path / "a.tif", tmp_path / "off.tif", align=False)
    assert "west" not in profile or "by 0.500 pixels right and 0.000 down" in str(error.value)
    write_geotiff(tmp_path / "same.tif", pixels_of(1), west=600_000.004)
    read_pair(tmp_path / "a.tif", tmp_path / "same.tif", align=False)


@pytest.mark.parametrize(("x", "y"), [(3, 2), (-3, 2), (0, -5)])
def test_the_second_image_is_aligned_to_the_first(rasterio, checkpoint, x, y):
    ground = pixels_of(0, (60, 80))
    write_geotiff("a.tif", ground[10:50, 10:66])
    write_geotiff("b.tif", ground[10 + y : 51 + y, 10 + x : 66 + x], 600_000 + 0.5 * x, 3_400_000 - 0.5 * y)
    image_a, image_b, void, place = read_pair(Path("a.tif"), Path("b.tif"), align=True)
    covered = np.zeros((40, 56), bool)
    covered[max(y, 0) : 41 + y, max(x, 0) : 56 + x] = True
    assert np.array_equal(image_a, ground[10:50, 10:66]) and np.array_equal(void, ~covered)
    assert np.array_equal(image_b[covered], image_a[covered]) and place.transform.c == 600_000
    run("a.tif", "b.tif", "--align", "--threshold", 0)
    assert np.array_equal(read("mask.tif") > 0, covered)


@pytest.mark.parametrize(("crs", "step"), [("EPSG:32614", 0.25), ("EPSG:32615", 0.5)])
def test_other_pixel_sizes_and_systems_are_aligned(rasterio, tmp_path, crs, step):
    """A smooth ramp of brightness, seen twice, is the same after it was resampled."""
    from rasterio.warp import transform

    def write_ramp(name: str, crs: str, west: float, north: float, step: float) -> None:
        rows, columns = np.mgrid[:160, :240] + 0.5
        x, y = transform(crs, "EPSG:32614", (west + step * columns).ravel(), (north - step * rows).ravel())
        value = 100 + (np.array(x) - 600_000) + (np.array(y) - 3_400_000)
        pixels = np.repeat(value.reshape(160, 240, 1).round().clip(0, 255).astype(np.uint8), 3, axis=2)
        write_geotiff(tmp_path / name, pixels, west, north, step, crs=crs)

    (west,), (north,) = transform("EPSG:32614", crs, [600_000.0], [3_400_000.0])
    write_ramp("a.tif", "EPSG:32614", 600_000.0, 3_400_000.0, 0.5)
    write_ramp("b.tif", crs, west - 9, north + 9, step)
    image_a, image_b, void, _ = read_pair(tmp_path / "a.tif", tmp_path / "b.tif", align=True)
    assert 0.1 < 1 - void.mean() <= 1 and np.abs(image_a[~void].astype(int) - image_b[~void]).max() <= 1


def test_sizes_that_differ_by_a_row_are_cut_where_no_place_is_known(checkpoint):
    write_images("a.png")
    write_images("b.png", size=(41, 55))
    run("a.png", "b.png", "--align")
    assert Image.open("mask.png").size == (55, 40)


def features_in(path: str | Path) -> list[dict]:
    collection = json.loads(Path(path).read_text())
    assert collection.keys() == {"type", "features"} and collection["type"] == "FeatureCollection"
    return collection["features"]


def test_ground_control_points_are_kept_and_polygons_come_in_pixels(rasterio, checkpoint, capsys):
    from rasterio.control import GroundControlPoint
    from rasterio.features import rasterize

    points = [(row, column, 600_000 + column / 2, 3_400_000 - row / 2) for row in (0, 40) for column in (0, 56)]
    write_geotiffs("a.tif", "b.tif", gcps=[GroundControlPoint(*point) for point in points], transform=None)
    run("a.tif", "b.tif", "--polygons")
    with rasterio.open("mask.tif") as mask:
        assert [(point.row, point.col, point.x, point.y) for point in mask.gcps[0]] == points
        assert mask.gcps[1] == "EPSG:32614" and mask.crs is None
    said = capsys.readouterr().out
    assert "m²" not in said and "mask.geojson: in pixels" in said
    outlines = [feature["geometry"] for feature in features_in("mask.geojson")]
    assert np.array_equal(rasterize(outlines, (40, 56)) > 0, read("mask.tif") > 0)
    run("a.tif", "b.tif", "--out", "x.png")
    assert "x.png: a PNG can't hold control points" in capsys.readouterr().out


# Polygons


def polygons(mask: np.ndarray, path: Path, place=None) -> list[dict]:
    components, classes = connected_components(mask)
    objects = {number: {"class": int(kind), "centre": (0.0, 0.0)} for number, kind in enumerate(classes, 1)}
    write_polygons(path, components, objects, place)
    assert len(features_in(path)) == len(classes)
    return features_in(path)


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
        filled = np.zeros(mask.shape, int)
        for feature in polygons(mask, tmp_path / "x.geojson"):
            exterior, *holes = feature["geometry"]["coordinates"]
            assert signed_area(exterior) > 0 and all(signed_area(hole) < 0 for hole in holes)  # as RFC 7946 wants it
            assert all(ring[0] == ring[-1] for ring in (exterior, *holes))
            drawn = rasterize([feature["geometry"]], mask.shape)
            assert drawn.sum() == signed_area(exterior) + sum(map(signed_area, holes))
            filled += drawn * feature["properties"]["class"]
        assert np.array_equal(filled, mask)
    assert len(polygons(np.eye(2, dtype=np.uint8), tmp_path / "x.geojson")) == 2  # two that touch at a corner are two
    assert polygons(np.zeros((3, 4), np.uint8), tmp_path / "x.geojson") == []


IN_PIXELS = (0.0, 1.0)  # x and y of the first pixel's lower left corner


@pytest.mark.parametrize(
    ("crs", "west", "north", "expected"),
    [
        ("EPSG:32614", 500_000.0, 0.0, (-99.0, 0.0)),  # where the zone's meridian meets the equator
        ("ESRI:102003", 0.0, 0.0, (-96.0, 37.5)),  # the origin of a system without an EPSG code
        ("EPSG:3857", 6_378_137 * np.pi / 2, 6_378_137 * np.arctanh(0.5), (90.0, 30.0)),
        ("EPSG:4326", 12.5, 42.25, (12.5, 42.25)),
        (None, 12.5, 42.25, IN_PIXELS),
        ('LOCAL_CS["somewhere",UNIT["metre",1]]', 12.5, 42.25, IN_PIXELS),
    ],
)
def test_polygons_are_in_degrees_or_else_in_pixels(rasterio, tmp_path, capsys, crs, west, north, expected):
    write_geotiff(tmp_path / "a.tif", pixels_of(0), west, north, 1e-4, crs=crs)
    (feature,) = polygons(np.ones((1, 1), np.uint8), tmp_path / "x.geojson", read_place(tmp_path / "a.tif"))
    (exterior,) = feature["geometry"]["coordinates"]
    west, north = min(x for x, _ in exterior), max(y for _, y in exterior)
    assert (west, north) == pytest.approx(expected, abs=2e-9) and signed_area(exterior) > 0
    assert all(round(value, 9) == value for corner in exterior for value in corner)
    assert ("x.geojson: in pixels" in capsys.readouterr().out) == (expected == IN_PIXELS)


def test_objects_of_a_georeferenced_pair(rasterio, checkpoint, capsys):
    from rasterio.features import rasterize
    from rasterio.warp import transform, transform_geom

    write_geotiffs("a.tif", "b.tif")
    run("a.tif", "b.tif", "--polygons", "--min-area", 1)
    mask, grid, probability = read("mask.tif") > 0, rasterio.open("mask.tif").transform, predicted("a.tif", "b.tif")
    features, filled = features_in("mask.geojson"), np.zeros(mask.shape, int)
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


def test_what_needs_rasterio_is_said_and_plain_images_need_none(rasterio, checkpoint, monkeypatch):
    write_geotiffs("a.tif", "b.tif")
    write_images("c.png", "d.jpg", "e.png")
    write_images("f.tif", "g.bmp", compression=None)
    Path("e.pgw").write_text(WORLD)
    monkeypatch.setitem(sys.modules, "rasterio", None)  # importing it fails, as where it isn't installed
    for arguments, name in (
        (("a.tif", "b.tif"), "a.tif"),
        (("c.png", "d.jpg", "--polygons", "--out", "x.png"), "--polygons"),
        (("e.png", "d.jpg", "--out", "y.png"), "e.png"),
    ):
        with pytest.raises(DataError, match=rf"^{re.escape(name)}: .*pip install rasterio"):
            run(*arguments)
    run("c.png", "d.jpg", "--out", "x.tif", "--probability")
    run("f.tif", "g.bmp")
    assert read("x.tif").shape == read("mask.png").shape == (40, 56)
