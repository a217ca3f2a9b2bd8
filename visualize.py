"""Pictures of what a model predicts; `python visualize.py CHECKPOINT BEFORE AFTER` writes the masks of any images."""

from __future__ import annotations

import signal
import sys

if __name__ == "__main__":  # before the other imports, which take seconds
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a console may lack ² or the letters of a name

import argparse
import contextlib
import csv
import functools
import itertools
import json
import os
import time
import warnings
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from matplotlib import font_manager
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageFilter
from PIL.TiffImagePlugin import ImageFileDirectory_v2
from scipy import ndimage
from torch.utils.data import Dataset

import dataset
from dataset import (
    IGNORED,
    NO_DATA,
    DataError,
    check_headers,
    connected_areas,
    find_pairs,
    no_data_value,
    open_image,
    progress,
    read_image,
    size_text,
)  # fmt: skip
from model import FusionUNet, explanation

# Apart in hue, with any colour vision (most are Okabe and Ito's, https://jfly.uni-koeln.de/color/); what is right, and
# probability, have no hue.
OUTCOMES = {"hit": "#ffffff", "missed": "#d55e00", "false alarm": "#56b4e9", "wrong class": "#aa4499"}
CLASSES = ("#f0e442", "#009e73", "#6a3d9a", "#999999")  # from the start again if there are more
COLUMNS = ("before", "after", "truth", "prediction", "errors", "probability")
WINDOW = 256  # pixels, a side, that are drawn of a larger image
CELL, DPI = 1.9, 75  # inches a side; six are 855 pixels across
CJK = (
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "WenQuanYi Zen Hei",
    "Droid Sans Fallback",
    "PingFang SC",
    "Hiragino Sans",
    "Microsoft YaHei",
    "SimHei",
    "Malgun Gothic",
    "NanumGothic",
)  # fonts that know Chinese, Japanese, Korean names
FONT = {"font.family": ["DejaVu Sans", *(name for name in CJK if name in font_manager.get_font_names())]}
FONT |= {"font.size": 10, "axes.titlesize": 13, "axes.labelsize": 10, "legend.fontsize": 11}
OVERLAY_SIDE = 1600  # pixels, the longer side of an overlay at most
SCALE, TIEPOINT, TRANSFORM, KEYS, RPC = 33550, 33922, 34264, 34735, 50844  # GeoTIFF's tags (OGC 19-008r4), GDAL's
GEOTAGS = (SCALE, TIEPOINT, TRANSFORM, KEYS, 34736, 34737, NO_DATA, RPC)
# Keys: pixel or point, the EPSG code of the geographic and of the projected system, the latter's unit of length.
RASTER_TYPE, GEOGRAPHIC, CRS, UNIT = 1025, 2048, 3072, 3076
POINT, METRE, WEB_MERCATOR = 2, 9001, 3857  # Web Mercator's metres are no metres on the ground
USER_DEFINED = 32767  # no EPSG code
GRID = 0.1  # pixels that two images may be off one grid to be aligned


@plt.rc_context(FONT)
def plot_predictions(
    model: FusionUNet,
    dataset: Dataset,
    device: str | torch.device = "cuda",
    num_samples: int = 10,
    path: str | os.PathLike | None = "results.png",
    items: Sequence[int] | None = None,
    middles: Sequence[tuple[int, int]] | None = None,
) -> Figure:
    """Draw a row for each of a few pairs: before, after, truth, prediction at 0.5, where the two differ, probability.

    Of an image larger than 256 pixels it is the window of 256 with the most errors, marked in the whole. The errors lie
    over the image after, dimmed, with a ring around each object that has no match (see `dataset.Objects`); the score is
    that of the whole image.

    Args:
        model: the detector; its mode and its device are left as they were.
        dataset: gives (uint8 (3, H, W), uint8 (3, H, W), uint8 (1, H, W) in {0, …, K}) at an index.
        device: where to predict; the CPU, which is said, where it is a CUDA device and there is none.
        num_samples: rows, spread evenly over the data set, of up to eight neighbours the one with the most change; all
            of it where it holds fewer.
        path: PNG to write, its folder made where missing; None writes nothing.
        items: what to draw instead, in this order.
        middles: of each of them the window of 128 around this place, y and x in pixels, is drawn instead.

    Returns:
        The figure, closed for pyplot, so that a notebook shows it once: as the value of its cell.

    Raises:
        ValueError: there is nothing to draw.
    """
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here: predicting on the CPU", flush=True)
        device = "cpu"
    if items is None and num_samples > 0 and len(dataset) > 0:
        items = _samples(dataset, num_samples)
    if not items:
        raise ValueError(f"nothing to draw: {num_samples} samples of a data set of {len(dataset)}")
    home, rows = next(model.parameters()).device, []
    try:
        model.to(device)
        for index, middle in zip(items, middles or [None] * len(items), strict=True):
            image_a, image_b, label = dataset[index]
            chance = model.predict(image_a, image_b).numpy()
            rows.append(_pictures(image_a, image_b, label[0].numpy(), chance, middle))
    finally:
        model.to(home)
    columns = [name for name in ("whole", *COLUMNS) if any(name in pictures for pictures, _, _ in rows)]
    size = CELL * len(columns), CELL * (len(items) + 0.45) + 0.6
    figure, axis = plt.subplots(figsize=size, layout="constrained")  # one for all: each costs as much as ten images
    plt.close(figure)
    for row, (pictures, score, marked) in enumerate(rows):
        for name, picture in pictures.items():
            extent = _extent_of(picture, columns.index(name), row)
            axis.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="antialiased", extent=extent)
        if marked:
            left, right, bottom, top = _extent_of(pictures["whole"], 0, row)
            x, y, width, height = marked
            corner = left + x * (right - left), top + y * (bottom - top)
            size = width * (right - left), height * (bottom - top)
            axis.add_patch(Rectangle(corner, *size, fill=False, edgecolor=CLASSES[0], linewidth=1.5))
        axis.text(columns.index("errors") + 0.5, row + 0.955, score, va="top", ha="center", fontsize=9)
    names = [dataset.name(index) if hasattr(dataset, "name") else index for index in items]
    for number, (y, x) in enumerate(middles or ()):
        names[number] = f"{names[number]}\ny {y}, x {x}"
    axis.set(xlim=(0, len(columns)), ylim=(len(items) + 0.45, 0), frame_on=False)
    axis.set_xticks(np.arange(len(columns)) + 0.5, columns, fontsize=FONT["axes.titlesize"])
    axis.set_yticks(np.arange(len(items)) + 0.5, names, rotation="vertical", verticalalignment="center", fontsize=8)
    axis.tick_params(length=0, labeltop=True, labelbottom=False)
    title = model.origin, "averaged over flips and turns" * model.tta, "changed: probability above 0.5"
    figure.suptitle(", ".join(filter(None, title)), x=0.99, ha="right", size=10)
    _draw_keys(axis, columns, len(items), model.head.out_channels)
    return _saved(figure, path)


def _samples(dataset: Dataset, count: int) -> list[int]:
    """Items spread over the data set, of up to eight neighbours the one with the most change."""
    chosen = []
    for part in np.array_split(np.arange(len(dataset)), min(count, len(dataset))):
        near = part[np.unique(np.linspace(0, len(part) - 1, 8).round().astype(int))].tolist()
        changed = [int(((label := dataset[index][2]) > 0).logical_and(label != IGNORED).sum()) for index in near]
        chosen.append(near[int(np.argmax(changed))])
    return chosen


def _extent_of(picture: np.ndarray, column: int, row: int) -> tuple[float, float, float, float]:
    """Left, right, bottom and top of a picture in its cell, each 1 wide and high."""
    height, width = 0.44 * np.array(picture.shape[:2]) / max(picture.shape[:2])
    return column + 0.5 - width, column + 0.5 + width, row + 0.5 + height, row + 0.5 - height


def _draw_keys(axis: Axes, columns: list[str], row: int, num_classes: int) -> None:
    """Under each column that has colours, what they mean."""
    keys = {"errors": {name: colour for name, colour in OUTCOMES.items() if num_classes > 1 or name != "wrong class"}}
    if num_classes > 1:
        colours = enumerate(_class_colours(num_classes)[1:], 1)
        keys["prediction"] = {f"class {number}": colour for number, colour in colours}
    for column, colours in keys.items():
        patches = {name: Patch(facecolor=colour, edgecolor="black") for name, colour in colours.items()}
        if column == "errors":
            patches["ring: no match"] = Patch(facecolor="none", edgecolor=OUTCOMES["missed"])
        axis.add_artist(Legend(
            axis, patches.values(), patches.keys(), loc="upper center",
            bbox_to_anchor=(columns.index(column) + 0.5, row + 0.02),
            bbox_transform=axis.transData, frameon=False, fontsize=9, labelspacing=0.2, borderaxespad=0,
            ncols=-(-len(patches) // 4),
        ))  # fmt: skip
    x = columns.index("probability") + 0.5
    bar = (x - 0.35, x + 0.35, row + 0.16, row + 0.06)
    axis.imshow(np.linspace(0, 1, 256)[None], cmap="gray", vmin=0, vmax=1, extent=bar, aspect="auto")
    axis.add_patch(Rectangle((x - 0.35, row + 0.06), 0.7, 0.1, fill=False, linewidth=0.8))
    for place, text in ((x - 0.35, "0"), (x, "0.5"), (x + 0.35, "1")):
        axis.text(place, row + 0.18, text, va="top", ha="center", fontsize=9)


def _class_colours(num_classes: int) -> np.ndarray:
    """RGB in 0..1, (1 + num_classes, 3): black where nothing changed, and white or a colour for each class."""
    colours = itertools.islice(itertools.cycle(CLASSES), num_classes) if num_classes > 1 else ["white"]
    return np.array([to_rgb(colour) for colour in ("black", *colours)])


def _classes(probability: np.ndarray, threshold: float) -> np.ndarray:
    """uint8 (H, W) of a probability (H, W) or (K, H, W): the likeliest class where change is likelier than that."""
    if probability.ndim == 2:
        return (probability > threshold).view(np.uint8)
    of_each = probability.reshape(-1, *probability.shape[-2:])
    return ((of_each.sum(0) > threshold) * (1 + of_each.argmax(0))).astype(np.uint8)


def _pictures(
    image_a: torch.Tensor,
    image_b: torch.Tensor,
    truth: np.ndarray,
    probability: np.ndarray,
    middle: tuple[int, int] | None = None,
) -> tuple[dict[str, np.ndarray], str, tuple[float, ...] | None]:
    """The pictures of a pair by their columns, its score in words, and where in the whole they lie if it is larger.

    That is x, y, width and height as shares of the whole, in 0..1.
    """
    num_classes, prediction = 1 if probability.ndim == 2 else len(probability), _classes(probability, 0.5)
    ignored = truth == IGNORED
    truth, prediction = truth * ~ignored, prediction * ~ignored
    labelled, predicted, wrong = truth > 0, prediction > 0, truth != prediction
    union, hits = (labelled | predicted).sum(), (labelled & ~wrong).sum()
    objects = dataset.Objects(prediction, truth)
    score = f"IoU {hits / union:.2f}, {wrong.sum():,} px wrong" if union else "no change, none found"
    before, after = (image.permute(1, 2, 0).numpy() for image in (image_a, image_b))
    pictures, marked = {}, None
    side = WINDOW if middle is None else WINDOW // 2
    if max(truth.shape) > side:
        score = f"whole: {score}"
        (height, width), (rows, columns) = truth.shape, (min(side, length) for length in truth.shape)
        if middle is None:
            y, x = _window_of_most(wrong + 1e-3 * labelled)
        else:
            y, x = np.clip(np.array(middle) - side // 2, 0, (height - rows, width - columns)).tolist()
        pictures["whole"] = after[(slice(None, None, -(-max(truth.shape) // (2 * WINDOW))),) * 2]
        marked = x / width, y / height, columns / width, rows / height
        window = slice(y, y + rows), slice(x, x + columns)
        cut = [each[window] for each in (before, after, truth, prediction, labelled, predicted, wrong, ignored)]
        before, after, truth, prediction, labelled, predicted, wrong, ignored = cut
        probability = probability[..., *window]
    apart = [
        areas[window] if marked else areas
        for areas in (
            ~np.append(True, objects.found)[objects.labelled],
            ~np.append(True, objects.right)[objects.predicted],
        )
    ]
    errors = np.repeat(after.mean(2, keepdims=True) / 255 * 0.6, 3, axis=2)
    where = (labelled & ~wrong, labelled & ~predicted, predicted & ~labelled, labelled & predicted & wrong)
    for colour, there in zip(OUTCOMES.values(), where, strict=True):
        errors[there] = 0.3 * errors[there] + 0.7 * np.array(to_rgb(colour))
    for name, there in zip(("missed", "false alarm"), apart, strict=True):  # as objects: a ring at some distance
        inside, outside = (ndimage.binary_dilation(there, iterations=pixels) for pixels in (3, 6))
        errors[outside & ~inside] = to_rgb(OUTCOMES[name])
    errors[ignored] = 0.5
    colours = _class_colours(num_classes)
    chance = probability.reshape(-1, *probability.shape[-2:]).sum(0)
    drawn = before, after, colours[truth], colours[prediction], errors, chance
    return pictures | dict(zip(COLUMNS, drawn, strict=True)), score, marked


def _window_of_most(weight: np.ndarray) -> tuple[int, int]:
    """Upper left corner of the window that holds the most of (H, W)."""
    height, width = (min(WINDOW, length) for length in weight.shape)
    total = np.pad(weight.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    held = total[height:, width:] - total[:-height, width:] - total[height:, :-width] + total[:-height, :-width]
    y, x = np.unravel_index(held.round(6).argmax(), held.shape)
    return int(y), int(x)


@plt.rc_context(FONT)
def plot_curves(metrics_csv: str | os.PathLike, best_epoch: int, path: str | os.PathLike | None = None) -> Figure:
    """Draw loss, IoU and learning rate over the epochs (1 …) of a run's `metrics.csv`; closed for pyplot."""
    with open(metrics_csv, newline="") as file:
        rows = list(csv.DictReader(file))
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    plt.close(figure)
    epochs = [int(row["epoch"]) for row in rows]
    panels = {
        "loss": ("train_loss", "val_loss"), "IoU": ("train_iou", "val_iou"),
        "learning rate": ("learning_rate", "peak_learning_rate"),
    }  # fmt: skip
    for axis, (title, columns) in zip(axes, panels.items(), strict=True):
        colours = ("#0072b2", "#d55e00") if title != "learning rate" else ("#009e73", "0.3")
        for column, colour in zip(columns, colours, strict=True):
            label = {"learning_rate": "at the epoch's end", "peak_learning_rate": "highest in it"}.get(column)
            axis.plot(epochs, [float(row[column]) for row in rows], "o-", color=colour, markersize=4,
                      label=label or column.split("_")[0])  # fmt: skip
        axis.axvline(best_epoch, color="0.5", linestyle=":", label=f"best epoch, {best_epoch}")
        axis.set(title=title, xlabel="epoch", ylim=(0, 1.08 * axis.dataLim.y1 or 1), xlim=(0.5, len(rows) + 0.5))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=9)
    axes[1].set_title(f"IoU, best {float(rows[best_epoch - 1]['val_iou']):.4f}")
    return _saved(figure, path)


@plt.rc_context(FONT)
def plot_precision_recall(
    curve: dict[str, np.ndarray], points: dict[float, dict[str, float]], title: str = "", path: str | None = None
) -> Figure:
    """Draw a curve of `ChangeMetrics` over lines of equal F1, and the scores at some thresholds; closed for pyplot."""
    figure, axis = plt.subplots(figsize=(5.5, 5), layout="constrained")
    plt.close(figure)
    recall, precision = np.meshgrid(*[np.linspace(0.001, 1, 200)] * 2)
    f1 = 2 * precision * recall / (precision + recall)
    lines = axis.contour(recall, precision, f1, np.arange(0.1, 1, 0.1), colors="0.6", linewidths=0.8)
    axis.clabel(lines, fmt="F1 %.1f", fontsize=8)
    axis.plot(curve["recall"], curve["precision"], color="#0072b2")
    for (threshold, scores), marker in zip(points.items(), "osd^", strict=False):
        label = f"above {threshold:.4g}: F1 {scores['dice']:.3f}"
        axis.plot(scores["recall"], scores["precision"], marker, color="#d55e00", fillstyle="none", ms=9, label=label)
    axis.set(title=title, xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.01))
    axis.legend(loc="lower left", frameon=False)
    return _saved(figure, path)


def _saved(figure: Figure, path: str | os.PathLike | None) -> Figure:
    if path is not None:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # no font here has the letters of a name
            figure.savefig(buffer := BytesIO(), dpi=DPI)
        # 52 shades of each colour: no eye sees it, and a sheet of photographs is half as large.
        picture = Image.open(buffer).convert("RGB").point([5 * round(value / 5) for value in range(256)] * 3)
        picture.save(path, "PNG")
    return figure


def write_masks(
    checkpoint: str | os.PathLike,
    before: str | os.PathLike,
    after: str | os.PathLike | None = None,
    *,
    out: str | None = None,
    probability: bool = False,
    threshold: float | None = None,
    pixel_size: float | None = None,
    tile_size: int = 1152,
    tta: bool = False,
    device: str | None = None,
    folders: str = "A B",
    align: bool = False,
    overwrite: bool = False,
    polygons: bool = False,
    min_area: float = 0.0,
    simplify: float = 0.0,
) -> None:
    """Predict files; write the mask of each pair and an overlay, and print the area that changed.

    A mask holds 0 and 255 or, of a model that tells K classes apart, 0 to K, and 0 where an image is void.

    A mask lies where its images lie: a TIFF by GeoTIFF tags, a PNG by a world file. Of folders, pairs whose masks are
    there already are passed over, one that can't be predicted doesn't stop the others, and each has its row in
    `summary.csv`.

    Args:
        checkpoint: `best.pt` of a run.
        before: an image, a folder of images, or, without `after`, a folder that holds A and B.
        after: the image or folder after; files of two folders are paired by their stems.
        out: file to write for one pair, folder for folders; None for mask.png (mask.tif for a GeoTIFF) or masks.
        probability: write the probability of change too, 0..65535 for 0..1.
        threshold: probability above which a pixel counts as changed; None for the checkpoint's, best on validation.
        pixel_size: metres; None for a GeoTIFF's own.
        tile_size: as in `FusionUNet.predict`.
        tta: likewise.
        device: as in `FusionUNet.load`.
        folders: names of the two folders, where one folder holds both.
        align: crop both images to what they share, where they lie on one grid.
        overwrite: write masks anew that are there.
        polygons: write what changed as GeoJSON too, a polygon for each area that hangs together by sides.
        min_area: smaller areas count as unchanged; square metres where a pixel's are known, else pixels.
        simplify: pixels by which the polygons may leave out corners of their outlines; 0 for the pixels' own edges.

    Raises:
        DataError: images that can't be read, or are not of one place and size; a file to write is there already; a
            threshold or pixel size that can't be. Of folders, at the end, with all that couldn't be predicted.
        ModelError: not a checkpoint.
    """
    if not 0 <= (threshold or 0) < 1:
        raise DataError(f"threshold {threshold}: must be 0 or more and below 1")
    if not (pixel_size is None or pixel_size > 0):
        raise DataError(f"pixel size {pixel_size}: must be above 0 metres")
    if min_area < 0 or simplify < 0:
        raise DataError(f"min area {min_area}, simplify {simplify}: must be 0 or more")
    before, after = Path(before).expanduser(), after and Path(after).expanduser()
    if after is None:
        before, after = (before / name for name in (*folders.split(), *"AB")[:2])
    plan, several = _plan(before, after, out, overwrite, polygons)
    model = FusionUNet.load(checkpoint, device)
    model.threshold = model.threshold if threshold is None else threshold
    print(f"{len(plan)} to predict; changed where the probability is above {model.threshold:.4g}", flush=True)
    mask_of = functools.partial(
        _mask_of, model, count=several or polygons or min_area > 0, align=align, probability=probability,
        pixel_size=pixel_size, tile_size=tile_size, tta=tta, polygons=polygons, min_area=min_area, simplify=simplify,
    )  # fmt: skip
    failed, rows = [], []
    for path_a, path_b, files in progress(plan, unit="pair", delay=1) if several else plan:
        try:
            rows.append(mask_of(path_a, path_b, files))
        except DataError as error:
            if not several:
                raise
            failed.append(str(error))
    if several and rows:
        _summarise(rows, Path(out or "masks").expanduser() / "summary.csv")
    if failed:
        print("\n".join(failed), flush=True)
        raise DataError(f"{len(failed)} of {len(plan)} pairs couldn't be predicted, see above; the others are done")


def _mask_of(
    model: FusionUNet, path_a: Path, path_b: Path, files: Sequence[Path], *, count: bool, align: bool,
    probability: bool, pixel_size: float | None, tile_size: int, tta: bool, polygons: bool, min_area: float,
    simplify: float,
) -> dict[str, object]:  # fmt: skip
    """Predict a pair, write its files and print what changed, with `count` in objects too; its row of the summary."""
    start = time.perf_counter()
    image_a, image_b, void, place = _read_pair(path_a, path_b, align)
    chance = model.predict(image_a, image_b, tile_size, tta).numpy()
    del image_a
    if void is not None:
        chance[..., void] = 0
    mask, pixel_area = _classes(chance, model.threshold), pixel_size**2 if pixel_size else place.pixel_area()
    if count:
        areas, classes, left_out = _large_enough(*connected_areas(mask), min_area / (pixel_area or 1))
        mask[areas == 0] = 0
    if polygons:
        of_change = chance if chance.ndim == 2 else chance.sum(0)
        features = _features(areas, classes, of_change, place, pixel_area, simplify)
        files[3].parent.mkdir(parents=True, exist_ok=True)
        with dataset.written_whole(files[3]) as file:
            json.dump(features, file)
    changed, valid = np.count_nonzero(mask), mask.size if void is None else np.count_nonzero(~void)
    row = {"mask": files[0].as_posix(), "objects": len(classes) if count else "", "changed_pixels": changed,
           "valid_pixels": valid, "share": f"{changed / max(valid, 1):.6g}",
           "area_m2": f"{changed * pixel_area:.10g}" if pixel_area else "",
           "mean_probability": f"{chance[..., mask > 0].sum() / changed:.4f}" if changed else ""}  # fmt: skip
    _write(chance, mask, image_b, place, files[: 3 if probability else 2])
    for kind in range(1, 2 if chance.ndim == 2 else 1 + len(chance)):
        name = "changed" if chance.ndim == 2 else f"of class {kind}"
        objects = f", {np.count_nonzero(classes == kind):,} objects" if count else ""
        extent = _extent(np.count_nonzero(mask == kind), valid, name, pixel_area)
        print(f"{files[0]}: {extent}{objects}", flush=True)
    if count and left_out:
        unit = "m²" if pixel_area else "pixels"
        print(f"{files[0]}: {left_out:,} objects smaller than {min_area:g} {unit} left out", flush=True)
    return row | {"seconds": f"{time.perf_counter() - start:.3f}"}


def _summarise(rows: list[dict[str, object]], path: Path) -> None:
    """Write the rows, beside those of masks that were there already."""
    if path.exists():
        with open(path, newline="", encoding="utf-8") as file:
            anew = {row["mask"] for row in rows}
            rows = [row for row in csv.DictReader(file) if row["mask"] not in anew] + rows
    with dataset.written_whole(path) as file:
        table = csv.DictWriter(file, rows[-1])
        table.writeheader()
        table.writerows(sorted(rows, key=lambda row: row["mask"]))


def _extent(pixels: int, valid: int, name: str, pixel_area: float | None) -> str:
    metres = f", {pixels * pixel_area:,.1f} m²" if pixel_area else ""
    return f"{pixels:,} of {valid:,} pixels {name} ({pixels / valid:.2%}){metres}"


def _plan(
    before: Path, after: Path, out: str | None, overwrite: bool, polygons: bool
) -> tuple[list[tuple], bool]:  # fmt: skip
    """The pairs with the files for mask, overlay, probability and polygons; whether they come from folders."""
    for path in (before, after):
        if not path.exists() or path.is_file() != before.is_file():
            raise DataError(f"{path}: not there; give two images, two folders, or one folder that holds A and B")
    plan, taken, several = [], set(), before.is_dir()
    pairs = find_pairs(before, after) if several else [("", "")]  # joined with "" a path stays what it is
    for name_a, name_b in pairs:
        path_a, path_b = before / name_a, after / name_b
        suffix = ".png"
        with contextlib.suppress(DataError):  # which is raised again when the pair's turn comes
            place = Place(path_a)
            suffix = ".tif" if place.tags and place.affine is not None else ".png"
        path = Path(out or f"mask{suffix}") if not several else Path(out or "masks", name_a).with_suffix(suffix)
        path = path.expanduser()
        if path.suffix.lower() not in (".png", ".tif", ".tiff") or path.parent in (before, after):
            raise DataError(f"--out {out}: must be a .png or .tif, or for folders a folder other than theirs")
        files = (
            path, path.with_name(f"{path.stem}_overlay.jpg"), path.with_stem(f"{path.stem}_probability"),
            path.with_suffix(".geojson"),
        )  # fmt: skip
        if several and files[0].exists() and files[1].exists() and not overwrite:
            lacks = polygons and not files[3].exists()
            print(f"{path}: is there already{', without polygons: --overwrite makes them' * lacks}", flush=True)
            continue
        for file in (*files, world_file(path), world_file(files[2])):
            if file in taken or (file.exists() and not (overwrite and files[1].exists())):
                raise DataError(f"{file}: is there already; remove it, or name another --out")
            taken.add(file)
        plan.append((path_a, path_b, files))
    return plan, several


def _read_pair(path_a: Path, path_b: Path, align: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, Place]:
    """Both images, where either is void, and their place; aligned, what they share."""
    if not align:
        check_headers((path_a, path_b))
    place, (x, y) = common_place(path_a, path_b, align)
    (image_a, void_a), (image_b, void_b) = read_image(path_a), read_image(path_b)
    void = void_a if void_b is None else void_b if void_a is None or void_a.shape != void_b.shape else void_a | void_b
    if align and (x or y or image_a.shape != image_b.shape):
        height = min(image_a.shape[0] - max(y, 0), image_b.shape[0] - max(-y, 0))
        width = min(image_a.shape[1] - max(x, 0), image_b.shape[1] - max(-x, 0))
        if height < 1 or width < 1:
            raise DataError(f"{path_b}: shares no pixel with {path_a}")
        of_a = slice(max(y, 0), max(y, 0) + height), slice(max(x, 0), max(x, 0) + width)
        of_b = slice(max(-y, 0), max(-y, 0) + height), slice(max(-x, 0), max(-x, 0) + width)
        image_a, image_b = np.ascontiguousarray(image_a[of_a]), np.ascontiguousarray(image_b[of_b])
        voids = [each[part] for each, part in ((void_a, of_a), (void_b, of_b)) if each is not None]
        void = np.logical_or.reduce(voids) if voids else None
        place.move(max(x, 0), max(y, 0))
        print(f"{path_a}, {path_b}: aligned to the {size_text((height, width))} pixels that they share", flush=True)
    return image_a, image_b, void, place


def _write(chance: np.ndarray, mask: np.ndarray, image: np.ndarray, place: Place, files: Sequence[Path]) -> None:
    """Save the mask, the image with what changed outlined, small enough to look at, and if asked the probability."""
    files[0].parent.mkdir(parents=True, exist_ok=True)
    binary = chance.ndim == 2
    factor = -(-max(mask.shape) // OVERLAY_SIDE)
    picture = _reduced(image, factor)
    for kind, colour in enumerate(_class_colours(len(chance))[1:] if not binary else [to_rgb(CLASSES[0])], 1):
        area = Image.fromarray((_reduced((mask == kind).view(np.uint8) * np.uint8(255), factor) > 0).view(np.uint8))
        wide, narrow = (np.asarray(area.filter(each)) for each in (ImageFilter.MaxFilter(3), ImageFilter.MinFilter(3)))
        picture[wide > np.asarray(area)] = 0  # black beside the colour: seen on any roof
        picture[np.asarray(area) > narrow] = np.round(255 * np.array(colour))
    palette = None if binary else _class_colours(len(chance))
    for lost in place.save(mask * np.uint8(255) if binary else mask, files[0], palette):
        print(f"{files[0]}: {lost}", flush=True)
    Image.fromarray(picture).save(files[1], quality=90)
    for file in files[2:]:
        chance = chance if binary else chance.sum(0).clip(max=1)
        chance *= 65535
        place.save(chance.round(out=chance).astype(np.uint16), file)


def _reduced(pixels: np.ndarray, factor: int) -> np.ndarray:
    """Made smaller by the mean of factor × factor pixels, in pieces, which takes no second copy of a large image."""
    pieces = [pixels[y : y + 256 * factor] for y in range(0, len(pixels), 256 * factor)]
    return np.concatenate([np.asarray(Image.fromarray(piece).reduce(factor)) for piece in pieces])


# Changed areas as polygons


def _large_enough(areas: np.ndarray, classes: np.ndarray, pixels: float) -> tuple[np.ndarray, np.ndarray, int]:
    """The areas of at least so many pixels, numbered anew, their classes, and how many others there were."""
    kept = np.bincount(areas[areas > 0], minlength=len(classes) + 1)[1:] >= pixels
    if kept.all():
        return areas, classes, 0
    numbers = np.append(0, kept * kept.cumsum()).astype(np.int32)
    return numbers[areas], classes[kept], int((~kept).sum())


def _features(
    areas: np.ndarray, classes: np.ndarray, chance: np.ndarray, place: Place, pixel_area: float | None, simplify: float
) -> dict:
    """The areas as a GeoJSON FeatureCollection: RFC 7946, with the `crs` member of its forerunner, which GDAL reads."""
    there = areas > 0
    numbers, (y, x), of_each = areas[there], np.nonzero(there), chance[there].clip(max=1)
    counts = np.maximum(np.bincount(numbers, minlength=len(classes) + 1), 1)
    means, xs, ys = (np.bincount(numbers, weight, len(classes) + 1) / counts for weight in (of_each, x + 0.5, y + 0.5))
    highest = np.zeros(len(classes) + 1)
    np.maximum.at(highest, numbers, of_each)
    corner, right, down = place.affine.reshape(3, 2) if place.affine is not None else np.array([[0, 0], [1, 0], [0, 1]])
    is_mirrored = right[0] * down[1] < right[1] * down[0]  # as where y points up: outlines run the other way then
    rings = simplified(areas, simplify) if simplify else outlines(areas)
    features = []
    for number, kind in enumerate(classes.tolist(), 1):
        lines = [corner + ring[:, :1] * right + ring[:, 1:] * down for ring in rings[number - 1]]
        lines = [line[::-1] if is_mirrored else line for line in lines]
        area = {"area_m2": counts[number].item() * pixel_area} if pixel_area else {}
        properties = {
            "class": kind, "pixels": counts[number].item(), **area, "mean_probability": round(means[number].item(), 4),
            "max_probability": round(highest[number].item(), 4),
            "centre": (corner + xs[number] * right + ys[number] * down).tolist(),
        }  # fmt: skip
        geometry = {"type": "Polygon", "coordinates": [[*line.tolist(), line[0].tolist()] for line in lines]}
        features.append({"type": "Feature", "properties": properties, "geometry": geometry})
    code = {"type": "name", "properties": {"name": f"urn:ogc:def:crs:EPSG::{place.crs}"}}
    return {"type": "FeatureCollection", **({"crs": code} if place.crs else {}), "features": features}


def outlines(areas: np.ndarray) -> list[list[np.ndarray]]:
    """The outlines of areas along their pixels' edges.

    Args:
        areas: as `connected_areas` gives them.

    Returns:
        For each area its rings, that around it first, then those around its holes: corners (n, 2) as x, y in pixels,
        the area always to the right of the way where y points down. No ring touches itself.
    """
    padded, width = np.pad(areas, 1), areas.shape[1] + 1
    starts, ways, owners = [], [], []
    # Right along the top of a pixel, down its right, left along its bottom, up its left.
    for way, (dy, dx, y0, x0) in enumerate(((-1, 0, 0, 0), (0, 1, 0, 1), (1, 0, 1, 1), (0, -1, 1, 0))):
        beside = padded[1 + dy : 1 + dy + areas.shape[0], 1 + dx : 1 + dx + areas.shape[1]]
        y, x = np.nonzero((areas > 0) & (beside != areas))
        starts.append((y + y0) * width + x + x0)
        owners.append(areas[y, x].astype(np.int64))
        ways.append(np.full(len(y), way))
    start, way, owner = map(np.concatenate, (starts, ways, owners))
    corners = (areas.shape[0] + 1) * width
    key = (owner * corners + start) * 4 + way
    order = key.argsort()
    key, start, way, owner = key[order], start[order], way[order], owner[order]
    end = start + np.array([1, width, -1, -width])[way]
    after = np.full(len(key), -1)
    # Where two pixels of an area touch at a corner, left goes around what lies between them: no ring crosses itself.
    for turn in (1, 0, -1):
        wanted = (owner * corners + end) * 4 + (way + turn) % 4
        at = np.searchsorted(key, wanted).clip(max=len(key) - 1)
        after = np.where(key[at] == wanted, at, after)
    rings: list[list[np.ndarray]] = [[] for _ in range(areas.max(initial=0))]
    turns = np.ones(len(key), bool)
    turns[after] = way != way[after]
    after, seen, turns = after.tolist(), bytearray(len(key)), turns.tolist()
    for first in range(len(after)):
        ring, edge = [], first
        while not seen[edge]:
            seen[edge] = 1
            if turns[edge]:
                ring.append(edge)
            edge = after[edge]
        if ring:
            y, x = np.divmod(start[ring], width)
            of_area = rings[owner[first] - 1]
            is_outer = (x * np.roll(y, -1) - y * np.roll(x, -1)).sum() > 0
            of_area.insert(0 if is_outer else len(of_area), np.stack([x, y], 1))
    return rings


def simplified(areas: np.ndarray, tolerance: float) -> list[list[np.ndarray]]:
    """The `outlines` of areas without corners that lie about where a line between others passes.

    These are found as Douglas and Peucker do (1973, doi:10.3138/FM57-6770-U75U-7727). Corners stay where areas or rings
    meet, and where a corner of something else lies in the way: so no ring comes to cross itself or another one.

    Args:
        areas: as `connected_areas` gives them.
        tolerance: pixels, how far a corner that is left out may lie from the line that is left.
    """
    rings, padded = outlines(areas), np.pad(areas, 1)
    flat = [ring for of_area in rings for ring in of_area]
    places, met = np.unique(np.concatenate(flat or [np.zeros((0, 2), int)]), axis=0, return_counts=True)
    x, y = places.T
    around = np.stack([padded[y, x], padded[y, x + 1], padded[y + 1, x], padded[y + 1, x + 1]])
    least = np.where(around > 0, around, around.max(0)).min(0)
    fixed = {tuple(place) for place in places[(met > 1) | (around.max(0) != least)].tolist()}
    cells: dict[tuple[int, int], set[tuple[int, int]]] = {}  # the corners that are left, by place
    for x, y in places.tolist():
        cells.setdefault((x // 16, y // 16), set()).add((x, y))

    def is_free(span: np.ndarray) -> bool:
        """Whether a line (n, 2) can be pulled straight and pass over no other corner: it doesn't wind around any."""
        own = {tuple(corner) for corner in span.tolist()}
        (x0, y0), (x1, y1) = (span.min(0) // 16).tolist(), (span.max(0) // 16).tolist()
        near = [p for cell in itertools.product(range(x0, x1 + 1), range(y0, y1 + 1))
                for p in cells.get(cell, ()) if p not in own]  # fmt: skip
        off = np.array(near).reshape(-1, 1, 2) - span  # (corners, n, 2), and to the next ones along the closed line
        (x, y), (next_x, next_y) = np.moveaxis(off, 2, 0), np.moveaxis(np.roll(off, -1, 1), 2, 0)
        side = x * next_y - y * next_x
        winds = ((y >= 0) & (next_y < 0) & (side > 0)).sum(1) != ((y < 0) & (next_y >= 0) & (side < 0)).sum(1)
        on_it = ((side == 0) & (x * next_x + y * next_y <= 0)).any(1)
        return not (winds | on_it).any()

    def reduced(ring: np.ndarray) -> np.ndarray:
        corners = [tuple(corner) for corner in ring.tolist()]
        line = np.concatenate([ring, ring[:1]])
        kept = _douglas_peucker(line, [i for i, corner in enumerate(corners) if corner in fixed], tolerance)
        if kept[:-1].sum() < 4:
            return ring
        ends = np.flatnonzero(kept)
        for first, last in itertools.pairwise(ends.tolist()):
            if last - first > 1 and is_free(line[first : last + 1]):
                for x, y in corners[first + 1 : last]:
                    cells[x // 16, y // 16].discard((x, y))
            else:
                kept[first:last] = True
        return ring[kept[:-1]]

    return [[reduced(ring) for ring in of_area] for of_area in rings]


def _douglas_peucker(line: np.ndarray, fixed: list[int], tolerance: float) -> np.ndarray:
    """Which of the corners (n, 2) of a closed line, whose last is its first, stay; the fixed ones do."""
    kept = np.zeros(len(line), bool)
    kept[[0, ((line - line[0]) ** 2).sum(1).argmax(), -1, *fixed]] = True
    spans = list(itertools.pairwise(np.flatnonzero(kept).tolist()))
    while spans:
        first, last = spans.pop()
        if last - first > 1:
            way, off = line[last] - line[first], line[first + 1 : last] - line[first]
            distance = np.abs(way[0] * off[:, 1] - way[1] * off[:, 0]) / np.hypot(*way)
            farthest = first + 1 + int(distance.argmax())
            if distance.max() > tolerance:
                kept[farthest] = True
                spans += [(first, farthest), (farthest, last)]
    return kept


# Where on the ground


class Place:
    """Where an image lies, as far as its GeoTIFF tags or its world file tell.

    Attributes:
        affine: float64 (6,), x and y of the upper left corner, of a step to the right and of a step down; or None.
        crs: EPSG code of the projected reference system, else of the geographic one; None where no tag tells it.

    Raises:
        DataError: a world file that doesn't hold six numbers.
    """

    def __init__(self, path: Path):
        self.tags = ImageFileDirectory_v2()
        with open_image(path, mask=True) as image:
            own = getattr(image, "tag_v2", {})
            for tag in GEOTAGS:
                # "No data" is 0 or 255 in many images; in a mask these say that all of it, or all change, is void.
                if tag in own and not (tag == NO_DATA and no_data_value(image) is not None):
                    self.tags.tagtype[tag] = own.tagtype[tag]
                    self.tags[tag] = own[tag]
        keys = self.tags.get(KEYS, ())
        self._keys = {keys[i]: keys[i + 3] for i in range(4, len(keys) - 3, 4)}
        self.crs = self._keys.get(CRS, self._keys.get(GEOGRAPHIC))
        self.crs = None if self.crs == USER_DEFINED else self.crs
        names = [world_file(path), Path(f"{path}w"), path.with_suffix(".wld")]
        names = [each for name in names for each in (name, name.with_suffix(name.suffix.upper()))]
        name = next((name for name in names if name.is_file()), None)
        self._world = name and name.read_bytes()
        prj = path.with_suffix(".prj")
        self._prj = prj.read_bytes() if prj.is_file() else None
        self._aux = Path(f"{path}.aux.xml")
        self.affine = None
        if TRANSFORM in self.tags:
            a, b, _, x, d, e, _, y = self.tags[TRANSFORM][:8]
            self.affine = np.array([x, y, a, d, b, e])
        elif SCALE in self.tags and TIEPOINT in self.tags:
            (width, height, *_), (column, row, _, x, y, *_) = self.tags[SCALE], self.tags[TIEPOINT]
            self.affine = np.array([x - column * width, y + row * height, width, 0, 0, -height])
        elif self._world is not None:
            try:
                a, d, b, e, x, y = map(float, self._world.split())
            except ValueError as error:
                raise DataError(f"{name}: a world file holds six numbers, with decimal points ({error})") from error
            self.affine = np.array([x - (a + b) / 2, y - (d + e) / 2, a, d, b, e])  # its x, y: the first pixel's middle
        if self._keys.get(RASTER_TYPE) == POINT and self.tags.keys() & {TRANSFORM, SCALE}:
            self.affine[:2] -= (self.affine[2:4] + self.affine[4:]) / 2  # the tags' x, y: the first pixel's middle

    def pixel_area(self) -> float | None:
        """Square metres of a pixel; None where that isn't known: no place, degrees, feet, Web Mercator."""
        if self.affine is None or self._keys.get(UNIT) != METRE or self.crs == WEB_MERCATOR:
            return None
        a, d, b, e = self.affine[2:]
        return abs(a * e - b * d)

    def offset(self, other: Place) -> np.ndarray:
        """Pixels to the right and down from this place's corner to the other's."""
        return np.linalg.solve(self.affine[2:].reshape(2, 2).T, other.affine[:2] - self.affine[:2])

    def move(self, x: int, y: int) -> None:
        """To where the pixel x to the right and y down has its corner."""
        if self.affine is None:
            return
        self.affine[:2] += self.affine[2:4] * x + self.affine[4:] * y
        if TRANSFORM in self.tags:
            matrix = list(self.tags[TRANSFORM])
            matrix[3], matrix[7] = np.array(matrix).reshape(4, 4)[:2] @ (x, y, 0, 1)
            self.tags[TRANSFORM] = tuple(matrix)
        elif TIEPOINT in self.tags:
            column, row, *rest = self.tags[TIEPOINT]
            self.tags[TIEPOINT] = (column - x, row - y, *rest)
        self._world = self._world and self._as_world_file()

    def save(self, pixels: np.ndarray, path: Path, palette: np.ndarray | None = None) -> list[str]:
        """Write uint8 or uint16 (H, W) of this place: TIFF with the tags, compressed without loss, or PNG.

        A world file goes along where the image has one, and beside a PNG, which can't hold tags.

        Args:
            pixels: what to write.
            path: where to.
            palette: RGB in 0..1, (colours, 3), in which the values are shown.

        Returns:
            What tells the place and couldn't go along, in words.
        """
        png, world, lost = path.suffix.lower() == ".png", self._world, []
        tiff = {} if png else {"tiffinfo": self.tags, "compression": "tiff_adobe_deflate"}
        image = Image.fromarray(pixels)
        if palette is not None:
            image.putpalette((palette * 255).round().astype(np.uint8).tobytes())
        image.save(path, **tiff)
        if world is None and png and self.affine is not None:
            world = self._as_world_file()
        if world is not None:
            world_file(path).write_bytes(world)
        if self._prj is not None:
            path.with_suffix(".prj").write_bytes(self._prj)
        if self._aux.is_file():
            lost.append(f"what {self._aux} says of the image's place is not carried along")
        if png and self.affine is None and self.tags.keys() & {TIEPOINT, RPC}:
            lost.append("a PNG can't hold the ground control points or RPC of the image: give --out a name with .tif")
        return lost

    def _as_world_file(self) -> bytes:
        x, y, a, d, b, e = self.affine.tolist()
        return "".join(f"{value}\n" for value in (a, d, b, e, x + (a + b) / 2, y + (d + e) / 2)).encode()


def world_file(path: Path) -> Path:
    """The name of an image's world file: x.tif → x.tfw, x.png → x.pgw, x.jpeg → x.jgw."""
    return path.with_suffix(f".{path.suffix[1:2]}{path.suffix[-1:]}w".lower())


def common_place(path_a: Path, path_b: Path, align: bool = False) -> tuple[Place, tuple[int, int]]:
    """The place of two images, from the first that knows it, and how many pixels the second lies right and down of it.

    Raises:
        DataError: their places differ, by more than a hundredth of a pixel or, aligned, off one grid.
    """
    place_a, place_b = Place(path_a), Place(path_b)
    if place_a.affine is None or place_b.affine is None:
        return place_b if place_a.affine is None else place_a, (0, 0)
    pixel, off = np.abs(place_a.affine[2:]).max(), np.abs(place_a.affine - place_b.affine)
    one_grid = off[2:].max() <= 1e-5 * pixel and not (place_a.crs and place_b.crs and place_a.crs != place_b.crs)
    shift = place_a.offset(place_b).round(6)
    whole = shift.round().astype(int)
    if not one_grid or np.abs(shift - (whole if align else 0)).max() > (GRID if align else 0.01):
        where = [f"{place.affine.tolist()} in EPSG:{place.crs}" for place in (place_a, place_b)]
        by = f", by {shift[0] + 0:.3f} pixels right and {shift[1] + 0:.3f} down" if one_grid else ""
        hint = "" if align or not one_grid else "; --align crops both to what they share"
        raise DataError(
            f"{path_b}: lies elsewhere than {path_a}{by}: corner and steps {where[1]}, not {where[0]}{hint}"
        )
    return place_a, tuple(whole.tolist())


def parse_arguments() -> argparse.Namespace:
    """The command line: `write_masks`'s arguments by their names."""
    parser = argparse.ArgumentParser(
        description="Mark what changed between two images, or between the images of two folders: writes masks, "
        "overlays to look at, and the area that changed.",
        epilog="No file is overwritten unless --overwrite is given. README.md says more.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="best.pt of a run")
    parser.add_argument("before", metavar="BEFORE", help="an image or a folder; alone, a folder that holds A and B")
    parser.add_argument("after", metavar="AFTER", nargs="?", help="the image or the folder after")
    parser.add_argument("--out", help="file to write, or folder (mask.png, for a GeoTIFF mask.tif; masks)")
    parser.add_argument("--threshold", type=float, metavar="P", help="changed above it, 0..1 (best on validation)")
    parser.add_argument("--probability", action="store_true", help="write it too, 0 to 65535 for 0 to 1")
    parser.add_argument("--tta", action="store_true", help="average over flips and quarter turns, 8 times slower")
    parser.add_argument("--pixel-size", type=float, metavar="METRES", help="of the images (a GeoTIFF's own)")
    parser.add_argument("--tile-size", type=int, default=1152, metavar="PIXELS", help="less takes less memory (1152)")
    parser.add_argument("--folders", default="A B", metavar='"A B"', help="their names, where one folder holds both")
    parser.add_argument("--align", action="store_true", help="crop both images to what they share")
    parser.add_argument("--polygons", action="store_true", help="write what changed as GeoJSON, a polygon an object")
    parser.add_argument("--min-area", type=float, default=0.0, metavar="M2", help="leave smaller objects out (0)")
    parser.add_argument("--simplify", type=float, default=0.0, metavar="PIXELS", help="of the polygons' outlines (0)")
    parser.add_argument("--overwrite", action="store_true", help="write masks anew that are there already")
    parser.add_argument(
        "--max-pixels", type=int, default=dataset.MAX_PIXELS, metavar="N", help="that an image may have (400 million)"
    )
    parser.add_argument("--device", help="cpu, cuda:1, … (the GPU where there is one)")
    parser.error = lambda message: sys.exit(f"error: {message}; see python visualize.py --help")
    options = parser.parse_args()
    dataset.MAX_PIXELS = options.__dict__.pop("max_pixels")
    return options


if __name__ == "__main__":
    try:
        write_masks(**vars(parse_arguments()))
    except Exception as error:
        if (line := explanation(error, memory="--tile-size")) is None:
            raise
        sys.exit(f"error: {line}")
