"""Figures of what a model predicts; `python visualize.py CHECKPOINT BEFORE AFTER` writes the masks of any images."""

from __future__ import annotations

import os
import signal
import sys

if __name__ == "__main__":  # before the other imports, which take seconds
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # None if closed
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's hasn't
            stream.reconfigure(errors="replace")  # a console may lack ² or the letters of a name

import argparse
import contextlib
import csv
import errno
import io
import json
import re
import textwrap
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from PIL import Image, PngImagePlugin
from scipy import ndimage
from torch.utils.data import Dataset

import dataset
from dataset import IGNORED, SUFFIXES, DataError, atomic_write, find_pairs, import_rasterio, read_image, size_text
from metrics import connected_components, to_classes
from model import FusionUNet, error_line

# Apart in hue for any colour vision: most are Okabe and Ito's (https://jfly.uni-koeln.de/color/).
OUTCOMES = {
    "found": "#ffffff",
    "missed: in the truth only": "#d55e00",
    "false alarm: in the prediction only": "#56b4e9",
    "wrong class": "#aa4499",
    "void: not scored": "#808080",
}
CLASSES = ("#f0e442", "#009e73", "#6a3d9a", "#999999")  # repeated where there are more
PANELS = ("before", "after", "truth", "prediction", "errors", "probability\n0 black, 1 white")
DPI = 100
OVERLAY_SIDE = 1600  # pixels, the longer side of an overlay at most
DESCRIPTION = 270  # TIFF's tag
UNEQUAL_AREAS = r'METHOD\["(Mercator|Popular Visualisation|Equidistant Cylindrical|Miller|Gall)'


def plot_predictions(
    model: FusionUNet,
    dataset: Dataset,
    device: str | torch.device = "cuda",
    num_samples: int = 10,
    path: str | os.PathLike | None = "results.png",
    items: Sequence[int] | None = None,
    title: str = "",
) -> Figure:
    """Draw a few pairs, a row each: before, after, truth, prediction at 0.5, errors over the image after, probability.

    Args:
        model: the detector; its mode and device are left as they were.
        dataset: gives (uint8 (3, H, W), uint8 (3, H, W), uint8 (1, H, W) in {0, …, K} or 255) at an index.
        device: where to predict; the CPU if it is a CUDA device and there is none.
        num_samples: rows, spread evenly over the data set; of up to eight neighbours the one with the most change.
        path: PNG to write, its folder made where missing; None writes nothing.
        items: indices to draw instead, in this order.
        title: what the sheet shows.

    Returns:
        The figure, closed for pyplot, so that a notebook shows it once: as the value of its cell.

    Raises:
        ValueError: there is nothing to draw.
    """
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here: predicting on the CPU", flush=True)
        device = "cpu"
    if items is None and num_samples > 0 and len(dataset) > 0:
        items = _choose_samples(dataset, num_samples)
    if not items:
        raise ValueError(f"nothing to draw: {num_samples} samples of a data set of {len(dataset)}")
    home, rows = next(model.parameters()).device, []
    try:
        model.to(device)
        for index in items:
            image_a, image_b, label = dataset[index]
            rows.append(_panels(image_a, image_b, label[0].numpy(), model.predict(image_a, image_b).numpy()))
    finally:
        model.to(home)
    cell = 1.65 if max(label.shape) <= 256 else 3.0  # inches, the side of a panel
    width, height = cell * len(PANELS) + 0.3, (cell + 0.2) * len(rows) + 1.5
    figure, axes = plt.subplots(len(rows), len(PANELS), figsize=(width, height), squeeze=False)
    figure.subplots_adjust(0.3 / width, 0.75 / height, 0.99, 1 - 0.8 / height, wspace=0.04, hspace=0.14)
    plt.close(figure)
    for axis, title_of_column in zip(axes[0], PANELS, strict=True):
        axis.set_title(title_of_column, fontsize=10)
    for index, axes_of_row, (panels, score) in zip(items, axes, rows, strict=True):
        for axis, panel in zip(axes_of_row, panels, strict=True):
            axis.imshow(panel, cmap="gray", vmin=0, vmax=1, interpolation="antialiased")
            axis.set(xticks=[], yticks=[], frame_on=False)
        axes_of_row[PANELS.index("errors")].set_xlabel(score, fontsize=8)
        name = dataset.name(index) if hasattr(dataset, "name") else f"{index}"
        name = name.encode(errors="replace").decode()  # bytes that aren't UTF-8 have no letters
        name = name if len(name) <= 26 else f"{name[:12]}…{name[-13:]}"
        axes_of_row[0].set_ylabel(name, fontsize=8, parse_math=False)
    num_classes = model.out_channels
    keys = {name: colour for name, colour in OUTCOMES.items() if num_classes > 1 or name != "wrong class"}
    if num_classes > 1:
        keys |= {f"class {number}": colour for number, colour in enumerate(_class_colours(num_classes)[1:], 1)}
    patches = [Patch(facecolor=colour, edgecolor="black", label=name) for name, colour in keys.items()]
    figure.legend(handles=patches, loc="lower center", ncols=4, fontsize=9, frameon=False)
    figure.suptitle(textwrap.fill(title, 110), y=1 - 0.1 / height, va="top", fontsize=11, parse_math=False)
    return _saved(figure, path)


def _choose_samples(dataset: Dataset, count: int) -> list[int]:
    """Items spread over the data set, of up to eight neighbours the one with the most change."""
    chosen = []
    for part in np.array_split(np.arange(len(dataset)), min(count, len(dataset))):
        neighbours = part[np.unique(np.linspace(0, len(part) - 1, 8).round().astype(int))].tolist()
        labels = [dataset[index][2] for index in neighbours]
        changed = [int(((label > 0) & (label != IGNORED)).sum()) for label in labels]
        chosen.append(neighbours[int(np.argmax(changed))])
    return chosen


def _panels(
    image_a: torch.Tensor, image_b: torch.Tensor, label: np.ndarray, probability: np.ndarray
) -> tuple[list[np.ndarray], str]:
    """The `PANELS` of a pair, and its score."""
    void = label == IGNORED
    truth, prediction = (np.where(void, 0, classes) for classes in (label, to_classes(probability)))
    labelled, predicted, wrong = truth > 0, prediction > 0, truth != prediction
    union, hits = np.count_nonzero(labelled | predicted), np.count_nonzero(labelled & ~wrong)
    score = f"IoU {hits / union:.2f}, {wrong.sum():,} px wrong" if union else "no change, none found"
    before, after = (image.permute(1, 2, 0).numpy() for image in (image_a, image_b))
    errors = np.repeat(after.mean(2, keepdims=True) / 255 * 0.6, 3, axis=2)
    where = labelled & ~wrong, labelled & ~predicted, predicted & ~labelled, labelled & predicted & wrong
    for colour, pixels in zip(OUTCOMES.values(), where, strict=False):
        errors[pixels] = 0.3 * errors[pixels] + 0.7 * np.array(to_rgb(colour))
    errors[void] = to_rgb(OUTCOMES["void: not scored"])
    colours = _class_colours(1 if probability.ndim == 2 else len(probability))
    change = probability if probability.ndim == 2 else probability.sum(0)
    return [before, after, colours[truth], colours[prediction], errors, change], score


def _class_colours(num_classes: int) -> np.ndarray:
    """RGB in 0..1, (1 + num_classes, 3): black for unchanged, then white, or a colour for each class."""
    colours = [CLASSES[number % len(CLASSES)] for number in range(num_classes)] if num_classes > 1 else ["white"]
    return np.array([to_rgb(colour) for colour in ("black", *colours)])


def plot_curves(metrics_csv: str | os.PathLike, best_epoch: int, path: str | os.PathLike | None = None) -> Figure:
    """Draw loss, IoU and learning rate over the epochs of a run's `metrics.csv`; the figure is closed for pyplot."""
    with open(metrics_csv, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    epochs = [int(row["epoch"]) for row in rows]
    panels = {
        "loss": {"train_loss": "train", "val_loss": "val"},
        "IoU": {"train_iou": "train", "val_iou": "val"},
        "learning rate": {"learning_rate": "at the end of the epoch"},
    }
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    plt.close(figure)
    for axis, (title, columns) in zip(axes, panels.items(), strict=True):
        for column, label in columns.items():
            axis.plot(epochs, [float(row[column]) for row in rows], "o-", markersize=4, label=label)
        axis.axvline(best_epoch, color="0.5", linestyle=":", label=f"best epoch, {best_epoch}")
        axis.set(title=title, xlabel="epoch", ylim=(0, 1.08 * axis.dataLim.y1 or 1), xlim=(0.5, len(rows) + 0.5))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    run, best = Path(metrics_csv).resolve().parent.name, float(rows[epochs.index(best_epoch)]["val_iou"])
    title = f"{run}: validation IoU {best:.4f} in the best epoch, {best_epoch}"
    figure.suptitle(textwrap.fill(title, 120), fontsize=11, parse_math=False)
    return _saved(figure, path)


def plot_precision_recall(
    curve: dict[str, np.ndarray], points: dict[float, dict[str, float]], title: str = "", path: str | None = None
) -> Figure:
    """Draw a curve of `ChangeMetrics` over lines of equal F1, and the scores at some thresholds; closed for pyplot."""
    figure, axis = plt.subplots(figsize=(5.5, 5.4), layout="constrained")
    plt.close(figure)
    recall, precision = np.meshgrid(*[np.linspace(0.001, 1, 200)] * 2)
    f1 = 2 * precision * recall / (precision + recall)
    lines = axis.contour(recall, precision, f1, np.arange(0.1, 1, 0.1), colors="0.6", linewidths=0.8)
    axis.clabel(lines, fmt="F1 %.1f", fontsize=8)
    axis.plot(curve["recall"], curve["precision"])
    for (threshold, scores), marker in zip(points.items(), "osd^", strict=False):
        label = f"above {threshold:.4g}: F1 {scores['dice']:.3f}"
        axis.plot(scores["recall"], scores["precision"], marker, color="C1", fillstyle="none", ms=9, label=label)
    axis.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.01))
    axis.legend(loc="lower left")
    figure.suptitle(textwrap.fill(title, 60), fontsize=10, parse_math=False)
    return _saved(figure, path)


def _saved(figure: Figure, path: str | os.PathLike | None) -> Figure:
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings(), atomic_write(Path(path), "wb") as file:
            warnings.filterwarnings("ignore", "Glyph .* missing")  # no font here has the letters of a name
            figure.savefig(file, dpi=DPI)
    return figure


# Masks of any images


def write_masks(options: argparse.Namespace) -> None:
    """Predict a pair of images, or those of two folders, and write a mask and what else is asked for each.

    A mask holds 0 and 255 or, of a model of K classes, 0 to K, and 0 where an image is void. It is written last: a pair
    of folders whose mask is there is done and passed over. One that fails doesn't stop the others.

    Args:
        options: as `parse_arguments` gives them.

    Raises:
        DataError: options or images that can't be used; of folders at the end, with how many failed.
        ModelError: not a checkpoint.
    """
    if not 0 <= (options.threshold or 0) < 1:
        raise DataError(f"--threshold {options.threshold}: must be 0 or more and below 1")
    if options.tile_size < 512 or options.tile_size % 32:
        raise DataError(f"--tile-size {options.tile_size}: must be a multiple of 32, 512 or more")
    if options.min_area < 0 or (options.pixel_size is not None and options.pixel_size <= 0):
        raise DataError("--min-area must be 0 or more, and --pixel-size above 0")
    if options.polygons and import_rasterio() is None:
        raise DataError("--polygons: needs rasterio: pip install rasterio")
    dataset.MAX_PIXELS = options.max_pixels
    before, after = _find_inputs(options)
    is_folder = before.is_dir()
    out = Path(options.out or ("masks" if is_folder else f"mask{_mask_suffix(before)}")).expanduser()
    names = find_pairs(before, after, skip=out) if is_folder else [("", "")]  # a path joined with "" stays the same
    model = FusionUNet.load(options.checkpoint, options.device)
    model.threshold = model.threshold if options.threshold is None else options.threshold
    print(f"changed where the probability is above {model.threshold:.4g}", flush=True)
    skipped, failures = 0, []
    for name_a, name_b in dataset.progress(names, unit="pair", delay=1) if is_folder else names:
        path_a, path_b = before / name_a, after / name_b
        try:
            mask = (out / name_a).with_suffix(_mask_suffix(path_a)) if is_folder else out
            if is_folder and not options.overwrite and _read_row(mask):
                skipped += 1
                continue
            files = _files_to_write(mask, is_folder, options)
            _write_mask(model, path_a, path_b, files, options)
        except Exception as error:
            line = error_line(error, memory="--tile-size")
            if not is_folder or line is None or getattr(error, "errno", None) == errno.ENOSPC:
                raise
            failures.append(line)
    if is_folder:
        _write_summary(out)
    else:
        written = [str(file) for file in (*files.values(), _world_file(out)) if file.exists()]
        print(f"written: {', '.join(written)}", flush=True)
    if skipped:
        print(f"{out}: {_count(skipped, 'mask')} already there, of whatever options; --overwrite replaces", flush=True)
    if failures:
        print("\n".join(failures), flush=True)
        raise DataError(f"{len(failures)} of {_count(len(names), 'pair')} failed, see above")


def _find_inputs(options: argparse.Namespace) -> tuple[Path, Path]:
    """The two images or the two folders that are meant."""
    checkpoint, before = Path(options.checkpoint).expanduser(), Path(options.before).expanduser()
    if checkpoint.suffix.lower() in SUFFIXES or (checkpoint.is_dir() and not (checkpoint / "best.pt").exists()):
        raise DataError(f"{checkpoint}: not a checkpoint; give CHECKPOINT BEFORE AFTER, as in runs/NAME/best.pt A B")
    names = dataset.folder_names(options.folders)
    meant = "give two images, two folders, or one folder that holds A and B (--folders for other names)"
    if options.after is not None:
        after = Path(options.after).expanduser()
    elif before.is_file() or len(names) < 2:
        raise DataError(f"{before}: {meant}")
    else:
        before, after = (before / name for name in names[:2])
    for path in (before, after):
        if not path.exists():
            raise DataError(f"{path}: {'a link that leads nowhere' if path.is_symlink() else 'is not there'}; {meant}")
    if before.is_dir() != after.is_dir():
        raise DataError(f"{before} and {after}: no pair; {meant}")
    return before, after


def _files_to_write(mask: Path, is_folder: bool, options: argparse.Namespace) -> dict[str, Path]:
    """The files of a pair by what they hold; DataError where one is in the way."""
    files = {"mask": mask, "overlay": mask.with_name(f"{mask.stem}_overlay.jpg")}
    if options.probability:
        files["probability"] = mask.with_stem(f"{mask.stem}_probability")
    if options.polygons:
        files["polygons"] = mask.with_suffix(".geojson")
    if mask.suffix.lower() not in (".png", ".tif", ".tiff"):
        raise DataError(f"--out {mask}: must be a .png or .tif")
    if _read_row(mask) == {}:
        raise DataError(f"{mask}: is there already, and no mask of this program; name another --out")
    for file in (*files.values(), _world_file(mask)):
        if not is_folder and not options.overwrite and file.exists():  # a folder's may be of a run that was stopped
            raise DataError(f"{file}: is there already; --overwrite replaces it, --out names another")
    return files


def _mask_suffix(path: Path) -> str:
    """The suffix of an image's mask: .tif for a TIFF that has a place, else .png."""
    return ".tif" if path.suffix.lower() in (".tif", ".tiff") and read_place(path) else ".png"


def _write_mask(
    model: FusionUNet, path_a: Path, path_b: Path, files: dict[str, Path], options: argparse.Namespace
) -> None:
    """Predict a pair, write its files and print how much changed."""
    start = time.perf_counter()
    image_a, image_b, void, place = read_pair(path_a, path_b, options.align)
    valid = image_a[..., 0].size - (0 if void is None else int(np.count_nonzero(void)))
    if valid == 0:
        raise DataError(f"{path_b}: no pixel is valid both in it and in {path_a}")
    probability = model.predict(image_a, image_b, tile_size=options.tile_size, tta=options.tta).numpy()
    factor = -(-max(image_b.shape) // OVERLAY_SIDE)
    picture = _reduced(image_b, factor)
    del image_a, image_b  # large images take much memory
    if void is not None:
        probability[..., void] = 0
    num_classes, mask = 1 if probability.ndim == 2 else len(probability), to_classes(probability, model.threshold)
    probability = probability if num_classes == 1 else probability.sum(0).clip(max=1)
    pixel_area = options.pixel_size**2 if options.pixel_size else place and place.pixel_area()
    components, objects, erased = _find_objects(mask, probability, options.min_area, pixel_area)
    changed = int(np.count_nonzero(mask))
    mean = f"{probability.mean(where=mask > 0, dtype=np.float64):.4f}" if changed else ""

    files["mask"].parent.mkdir(parents=True, exist_ok=True)
    if "polygons" in files:
        write_polygons(files["polygons"], components, objects, place)
    del components
    if "probability" in files:
        probability *= 65535
        _write_raster(files["probability"], probability.round(out=probability).astype(np.uint16), place)
    del probability
    with atomic_write(files["overlay"], "wb") as file:
        Image.fromarray(_outlined(picture, mask, factor, num_classes)).save(file, "JPEG", quality=90)
    for kind in range(1, 1 + num_classes):
        pixels, name = np.count_nonzero(mask == kind), "changed" if num_classes == 1 else f"of class {kind}"
        text = f"{pixels:,} of {_count(valid, 'pixel')} {name} ({pixels / valid:.2%})"
        text += f", {pixels * pixel_area:,.1f} m²" if pixel_area else ""
        count = sum(each["class"] == kind for each in objects.values())
        print(f"{files['mask']}: {text}, {_count(count, 'object')}", flush=True)
    if erased:
        size = f"{options.min_area:g} {'m²' if pixel_area else 'pixels'}"
        print(f"{files['mask']}: {_count(erased, 'object')} smaller than {size} left out", flush=True)
    row = {
        "objects": len(objects), "changed_pixels": changed, "valid_pixels": valid, "share": f"{changed / valid:.6g}",
        "area_m2": f"{changed * pixel_area:.10g}" if pixel_area else "", "mean_probability": mean,
        "seconds": f"{time.perf_counter() - start:.3f}",
    }  # fmt: skip
    palette = None if num_classes == 1 else _class_colours(num_classes)
    mask = mask if palette is not None else mask * np.uint8(255)
    _write_raster(files["mask"], mask, place, palette, json.dumps(row))


def _count(number: int, thing: str) -> str:
    return f"1 {thing}" if number == 1 else f"{number:,} {thing}s"


def _find_objects(
    mask: np.ndarray, probability: np.ndarray, min_area: float, pixel_area: float | None
) -> tuple[np.ndarray, dict[int, dict], int]:
    """The components of a mask, what is known of each by its number, and how many too small ones were erased."""
    components, classes = connected_components(mask)
    objects = {}
    for number, window in enumerate(ndimage.find_objects(components), 1):
        inside = components[window] == number
        pixels = int(np.count_nonzero(inside))
        if pixels * (pixel_area or 1) < min_area:
            mask[window][inside] = components[window][inside] = 0
            continue
        y, x = np.argwhere(inside).mean(0) + [side.start + 0.5 for side in window]
        of_object = probability[window]
        objects[number] = {
            "class": int(classes[number - 1]), "pixels": pixels,
            **({"area_m2": pixels * pixel_area} if pixel_area else {}),
            "mean_probability": round(float(of_object.mean(where=inside, dtype=np.float64)), 4),
            "max_probability": round(float(of_object.max(where=inside, initial=0)), 4), "centre": (x, y),
        }  # fmt: skip
    return components, objects, len(classes) - len(objects)


def _outlined(picture: np.ndarray, mask: np.ndarray, factor: int, num_classes: int) -> np.ndarray:
    """A picture with the changes in a mask, made smaller by the factor, outlined in their colours."""
    colours = _class_colours(num_classes)[1:] if num_classes > 1 else [to_rgb(CLASSES[0])]
    for kind, colour in enumerate(colours, 1):
        change = _reduced((mask == kind).view(np.uint8) * np.uint8(255), factor) > 0
        picture[ndimage.binary_dilation(change) & ~change] = 0  # black beside the colour shows on any roof
        picture[change & ~ndimage.binary_erosion(change, border_value=1)] = np.round(255 * np.array(colour))
    return picture


def _reduced(pixels: np.ndarray, factor: int) -> np.ndarray:
    """Means of factor × factor pixels, in pieces, which take no second copy of a large image."""
    pieces = [pixels[y : y + 256 * factor] for y in range(0, len(pixels), 256 * factor)]
    return np.concatenate([np.asarray(Image.fromarray(np.ascontiguousarray(each)).reduce(factor)) for each in pieces])


def _read_row(mask: Path) -> dict | None:
    """The row of the summary that a mask carries; empty for another image, None where there is no whole image."""
    try:
        with Image.open(mask) as image:
            image.load()
            text = image.tag_v2.get(DESCRIPTION) if image.format == "TIFF" else image.info.get("Description")
    except Exception:  # Pillow raises what it meets in a broken file
        return None
    with contextlib.suppress(TypeError, ValueError):
        return dict(json.loads(text))
    return {}


def _write_summary(folder: Path) -> None:
    """Write the summary.csv of the masks that are in a folder now."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".png", ".tif", ".tiff"))
    rows = [{"mask": path.as_posix(), **row} for path in paths if (row := _read_row(path))]
    if rows:
        table = csv.DictWriter(text := io.StringIO(newline=""), rows[0])
        table.writeheader()
        table.writerows(rows)
        with atomic_write(folder / "summary.csv", "wb") as file:
            file.write(text.getvalue().encode(errors="surrogateescape"))  # names as they are on the disk


# Where images lie: by rasterio


@dataclass
class Place:
    """Where an image lies, as rasterio has it: its reference system, and a transform from pixel corners or GCPs."""

    crs: object
    transform: object
    gcps: list

    def pixel_area(self) -> float | None:
        """Square metres of a pixel; None where none can be told: no transform, degrees, a Mercator projection."""
        is_flat = self.transform and self.crs and self.crs.is_projected
        if not is_flat or re.search(UNEQUAL_AREAS, self.crs.to_wkt(version="WKT2_2019")):
            return None
        return abs(self.transform.determinant) * self.crs.linear_units_factor[1] ** 2


def read_place(path: Path) -> Place | None:
    """Where an image lies; None where that isn't known. DataError where a world file can't be read."""
    rasterio = import_rasterio()
    names = (_world_file(path), Path(f"{path}w"), path.with_suffix(".wld"))
    names = [each for name in names for each in (name, name.with_suffix(name.suffix.upper()))]
    world = next((name for name in names if os.path.isfile(name)), None)
    if rasterio is None and world:
        raise DataError(f"{path}: only rasterio writes a mask of the place that {world} tells: pip install rasterio")
    if rasterio is None:
        return None
    try:
        with dataset.open_raster(path) as image:
            gcps, crs = image.gcps
            crs, transform = image.crs or crs, None if image.transform.is_identity else image.transform
    except rasterio.errors.RasterioIOError:  # `read_image` will say what is wrong with it
        return None
    if world and not (transform or gcps):
        raise DataError(f"{world}: a world file holds six numbers, one a line")
    if crs is None and os.path.isfile(prj := path.with_suffix(".prj")):
        with contextlib.suppress(rasterio.errors.CRSError):
            crs = rasterio.crs.CRS.from_wkt(prj.read_text(errors="replace"))
    return Place(crs, transform, gcps) if transform or gcps else None


def _world_file(path: Path) -> Path:
    """The name of an image's world file: x.tif → x.tfw, x.png → x.pgw, x.jpeg → x.jgw."""
    return path.with_suffix(f".{path.suffix[1:2]}{path.suffix[-1:]}w".lower())


def read_pair(
    path_a: Path, path_b: Path, align: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, Place | None]:
    """Both images of a pair, (H, W, 3), where either is void, (H, W), and their place.

    Aligned, the second image is resampled onto the grid of the first; where either has none, both are cut to one size.
    """
    place_a, place_b = read_place(path_a), read_place(path_b)
    (image_a, void_a), (image_b, void_b) = read_image(path_a), read_image(path_b)
    have_grids = place_a and place_b and place_a.transform and place_b.transform
    if align and have_grids:
        image_b, void_b = _resampled(image_b, void_b, place_b, place_a, image_a.shape[:2])
        print(f"{path_b}: resampled onto the grid of {path_a}", flush=True)
    elif align and image_a.shape != image_b.shape:
        height, width = np.minimum(image_a.shape, image_b.shape)[:2].tolist()
        image_a, image_b = image_a[:height, :width], image_b[:height, :width]
        void_a, void_b = (void if void is None else void[:height, :width] for void in (void_a, void_b))
        print(f"{path_a}, {path_b}: cut to {size_text((height, width))} pixels", flush=True)
    if image_a.shape != image_b.shape:
        sizes = size_text(image_b.shape), size_text(image_a.shape)
        raise DataError(f"{path_b}: {sizes[0]} pixels, but {path_a} has {sizes[1]}; --align makes them fit")
    if have_grids and not align:
        _check_grids(path_a, place_a, path_b, place_b, image_a.shape)
    void = void_a if void_b is None else void_b if void_a is None else void_a | void_b
    return image_a, image_b, void, place_a or place_b


def _check_grids(path_a: Path, place_a: Place, path_b: Path, place_b: Place, shape: tuple[int, ...]) -> None:
    """Raise a DataError where the corners of two images are more than a hundredth of a pixel apart."""
    from rasterio import transform

    columns, rows = np.array([[0, 0], [shape[1], 0], [0, shape[0]], [shape[1], shape[0]]]).T
    x, y = transform.xy(place_b.transform, rows, columns, offset="ul")
    if place_a.crs and place_b.crs and place_a.crs != place_b.crs:
        x, y = _transformed(place_b.crs, place_a.crs, x, y)
    right, down = transform.xy(~place_a.transform, y, x, offset="ul") - np.array([columns, rows])
    if not np.hypot(right, down).max() <= 0.01:  # NaN where no transformation is known
        by = f"{right[0]:.3f} pixels right and {down[0]:.3f} down at its upper left corner"
        raise DataError(f"{path_b}: lies elsewhere than {path_a}, by {by}; --align resamples it")


def _resampled(
    image: np.ndarray, void: np.ndarray | None, place: Place, onto: Place, shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """An image on another place's grid, (H, W, 3), and where it doesn't reach or is void there, (H, W)."""
    from rasterio.warp import Resampling, reproject

    opacity = np.full(image.shape[:2], 255, np.uint8) if void is None else np.where(void, 0, 255).astype(np.uint8)
    source, result = np.dstack([image, opacity]), np.zeros((*shape, 4), np.uint8)
    any_crs = onto.crs or place.crs or "EPSG:3857"  # what isn't known of one is as in the other
    reproject(
        source.transpose(2, 0, 1), result.transpose(2, 0, 1), src_crs=place.crs or any_crs, dst_crs=onto.crs or any_crs,
        src_transform=place.transform, dst_transform=onto.transform, src_alpha=4, dst_alpha=4,
        resampling=Resampling.bilinear,
    )  # fmt: skip
    return np.ascontiguousarray(result[..., :3]), result[..., 3] == 0


def _write_raster(
    path: Path, pixels: np.ndarray, place: Place | None, palette: np.ndarray | None = None, description: str = ""
) -> None:
    """Write uint8 or uint16 (H, W) of a place: a PNG with a world file, or a GeoTIFF, with an RGB palette in 0..1."""
    image, is_png, text = Image.fromarray(pixels), path.suffix.lower() == ".png", PngImagePlugin.PngInfo()
    if palette is not None:
        image.putpalette((palette * 255).round().astype(np.uint8).tobytes())
    text.add_text("Description", description)
    if place and is_png and place.transform:
        a, b, c, d, e, f = place.transform[:6]
        with atomic_write(_world_file(path)) as file:
            file.writelines(f"{value!r}\n" for value in (a, d, b, e, c + (a + b) / 2, f + (d + e) / 2))
    elif place and is_png:
        print(f"{path}: a PNG can't hold control points: give --out a name with .tif", flush=True)
    with atomic_write(path, "wb") as file:
        buffer = io.BytesIO()  # each format takes what it knows of these
        kind = "PNG" if is_png else "TIFF"
        image.save(buffer, kind, pnginfo=text, compression="tiff_adobe_deflate", description=description)
        file.write(buffer.getbuffer() if is_png or not place else _with_place(buffer, place))


def _with_place(tiff: io.BytesIO, place: Place) -> bytes:
    """The TIFF as a GeoTIFF."""
    import rasterio

    with rasterio.MemoryFile() as memory:
        memory.write(tiff.getvalue())
        memory.seek(0)  # else it isn't there yet
        with rasterio.open(memory.name, "r+") as raster:
            if place.transform:
                raster.crs, raster.transform = place.crs, place.transform
            else:
                raster.gcps = place.gcps, place.crs
        memory.seek(0)
        return memory.read()


def write_polygons(path: Path, components: np.ndarray, objects: dict[int, dict], place: Place | None) -> None:
    """Write objects as GeoJSON (RFC 7946), in longitude and latitude (WGS 84), or in pixels where these aren't known.

    Args:
        path: where to.
        components: int32 (H, W), the number of an object or 0.
        objects: the properties of each by its number; `centre` is x and y in pixels.
        place: where it lies.
    """
    from rasterio import Affine, warp
    from rasterio.features import shapes

    grid, crs = Affine.identity(), None
    if place and place.crs and place.transform:
        x, y = [place.transform.c], [place.transform.f]  # its upper left corner
        if np.isfinite(_transformed(place.crs, "EPSG:4326", x, y)).all():
            grid, crs = place.transform, place.crs
    if crs is None:
        print(f"{path}: in pixels, since no reference system gives longitudes and latitudes", flush=True)
    outlines, centres, properties = [], [], []
    for outline, number in shapes(components, mask=components > 0, connectivity=4, transform=grid):
        x, y = objects[int(number)]["centre"]
        centre = grid.a * x + grid.b * y + grid.c, grid.d * x + grid.e * y + grid.f
        centres.append({"type": "Point", "coordinates": centre})
        outlines.append(outline)
        properties.append(objects[int(number)])
    if crs and outlines:
        outlines, centres = (warp.transform_geom(crs, "EPSG:4326", each, precision=9) for each in (outlines, centres))
    features = []
    for outline, centre, known in zip(outlines, centres, properties, strict=True):
        rings = outline["coordinates"]
        outline["coordinates"] = [_wound(ring, counterclockwise=ring is rings[0]) for ring in rings]
        known = known | {"centre": centre["coordinates"]}
        features.append({"type": "Feature", "properties": known, "geometry": outline})
    with atomic_write(path) as file:
        json.dump({"type": "FeatureCollection", "features": features}, file)


def _transformed(source: object, target: object, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Coordinates in another reference system, (2, n); NaN where no transformation is known."""
    from rasterio import warp

    try:
        return np.array(warp.transform(source, target, x, y))
    except Exception:  # GDAL's errors have no public base class
        return np.full((2, len(x)), np.nan)


def _wound(ring: list[tuple[float, float]], counterclockwise: bool) -> list[tuple[float, float]]:
    """A closed ring in one direction or the other: RFC 7946 wants the outer one counterclockwise, holes clockwise."""
    x, y = (np.array(ring) - ring[0]).T
    is_counterclockwise = x[:-1] @ y[1:] > x[1:] @ y[:-1]
    return ring if is_counterclockwise == counterclockwise else ring[::-1]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        description="Mark what changed between two images, or between the images of two folders: writes masks and, to "
        "look at, the images after with the changes outlined, and prints how much changed.",
        epilog="No mask is replaced without --overwrite. README.md says more.",
    )
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="best.pt of a run")
    add("before", metavar="BEFORE", help="an image or a folder; alone, a folder that holds A and B")
    add("after", metavar="AFTER", nargs="?", help="the image or the folder after")
    add("--out", help="mask to write (mask.png, for a GeoTIFF mask.tif), or folder of masks (masks)")
    add("--threshold", type=float, metavar="P", help="changed above it, 0..1 (best on validation)")
    add("--probability", action="store_true", help="also write the probability, 0 to 65535 for 0 to 1")
    add("--tta", action="store_true", help="average over flips and quarter turns, 8 times slower")
    add("--pixel-size", type=float, metavar="METRES", help="of the images (a GeoTIFF's own)")
    add("--tile-size", type=int, default=1152, metavar="PIXELS", help="smaller tiles take less memory (1152)")
    add("--folders", default="A B", metavar='"A B"', help="their names in one folder; with commas, if they hold spaces")
    add("--align", action="store_true", help="resample the images after onto the grids of those before")
    add("--polygons", action="store_true", help="also write the objects as GeoJSON, in longitude and latitude (WGS 84)")
    add("--min-area", type=float, default=0.0, metavar="M2", help="smallest object, in m², or pixels if unknown (0)")
    add("--overwrite", action="store_true", help="replace masks that are there already")
    add("--max-pixels", type=int, default=dataset.MAX_PIXELS, metavar="N", help="of an image (400 million)")
    add("--device", help="cpu, cuda:1, … (the GPU where there is one)")
    parser.error = lambda message: sys.exit(f"error: {message}; see python visualize.py --help")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    try:
        write_masks(parse_arguments())
    except Exception as error:
        if (line := error_line(error, memory="--tile-size")) is None:
            raise
        sys.exit(f"error: {line.replace('DEVICE=', '--device ')}")
