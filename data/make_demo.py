"""Draws a small data set in LEVIR-CD's layout, so that training can be tried before the real one is here.

Each pair shows a made-up suburb from above at two dates. Houses with hipped roofs and shadows stay, appear or go;
only those that appear or go are in the mask. Everything else that differs is there to mislead a detector: the light,
turning shadows, trees, cars, bare soil, lawns, a shift of up to 1.5 pixels and the sensor's noise. With three classes
of change, roads may be new too.

    python data/make_demo.py [FOLDER]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

SPLITS = {"train": 128, "val": 32, "test": 32}  # pairs
SIZE = 256  # pixels, a side
FINE = 2  # drawn this much larger, then averaged down, so that edges are smooth
MARGIN = 8  # pixels drawn around the image, for the shift between dates to reveal
EXTENT = SIZE + 2 * MARGIN

ROOFS = np.array([(98, 94, 96), (126, 116, 108), (146, 104, 84), (168, 160, 150), (112, 104, 100), (198, 194, 188)])
GROUNDS = np.array([(120, 114, 78), (96, 104, 66), (112, 112, 74), (84, 96, 58)])
SOIL, LAWN, DRY_LAWN = np.array((184, 164, 132)), np.array((72, 88, 50)), np.array((142, 130, 92))
ASPHALT, CONCRETE = np.array((128, 126, 122)), np.array((156, 152, 146))
TREES = np.array([(46, 62, 36), (58, 74, 40), (66, 70, 48)])
CARS = np.array([(232, 232, 232), (40, 42, 48), (150, 36, 34), (52, 74, 126), (176, 178, 182)])


@dataclass
class House:
    """A building on its lot; positions in pixels, angle in radians."""

    centre: np.ndarray
    wings: list[tuple[float, float, float, float]]  # length, width, shift along, shift across of each rectangle
    angle: float
    height: float  # as its shadow's length in pixels
    roof: np.ndarray
    dates: tuple[bool, bool]  # standing before, standing after

    def corners(self, length: float, width: float, along: float = 0, across: float = 0) -> np.ndarray:
        """(4, 2) corners of a rectangle that is turned as the house is."""
        return _rectangle(self.centre, self.angle, length, width, along, across)


def make_demo(folder: str | Path, seed: int = 0, splits: dict[str, int] | None = None, num_classes: int = 1) -> None:
    """Write the demo's pairs as `folder/SPLIT/{A,B,label}/NAME.png`; the same seed draws the same pixels.

    Args:
        folder: appears once it is whole; is left as it is where it is there already.
        seed: of the whole set.
        splits: number of pairs by split; None for `SPLITS`.
        num_classes: 1, masks hold 0 and 255; or 3, 0 to 3: new house, gone house, new road.
    """
    part = Path(f"{folder}.{os.getpid()}.part")  # of two that begin together each draws one, and the first is kept
    try:
        _draw_splits(part, seed, splits or SPLITS, num_classes)
        with contextlib.suppress(OSError):
            os.rename(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _draw_splits(part: Path, seed: int, splits: dict[str, int], num_classes: int) -> None:
    with tqdm(total=sum(splits.values()), desc="drawing the demo", unit="pair", leave=False, disable=None) as bar:
        for number, (split, pairs) in enumerate(splits.items()):
            for name in ("A", "B", "label"):
                (part / split / name).mkdir(parents=True)
            for index in range(pairs):
                images = draw_pair(np.random.default_rng([seed, number, index]), num_classes)
                for name, image in zip(("A", "B", "label"), images, strict=True):
                    Image.fromarray(image).save(part / split / name / f"demo_{index:03}.png", compress_level=1)
                bar.update()


def draw_pair(rng: np.random.Generator, num_classes: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One place at two dates: uint8 (256, 256, 3) before and after, uint8 (256, 256) mask of 0 and 255, or 0 to 3."""
    street = rng.uniform(0, np.pi)
    roads = _roads(rng, street)
    houses = _houses(rng, street, roads)
    trees = _trees(rng, houses, roads)
    base = GROUNDS[rng.integers(len(GROUNDS))]
    ground = base + 9 * _noise(rng, 40)[..., None] + 7 * _noise(rng, 8)[..., None] + 4 * _noise(rng, 2)[..., None]

    sun = rng.uniform(0, 2 * np.pi)
    new_road = len(roads) - 1 if num_classes > 1 and rng.random() < 0.5 else len(roads)
    images, label = [], np.zeros((SIZE, SIZE), np.uint8)
    for date, laid in enumerate((roads[:new_road], roads)):
        shift = rng.integers(-3, 4, 2)  # in fine pixels: up to 1.5 of the image's
        standing = [house for house in houses if house.dates[date]]
        image = _draw_ground(rng, ground, laid, houses, date)
        image = _draw_objects(rng, image, laid, standing, trees[date], sun + rng.uniform(-0.5, 0.5))
        images.append(_expose(rng, _frame(image, shift)))
        changes = {3: [road for road, _ in laid[new_road:]]}
        changes[2 - date] = [house.corners(*wing) for house in standing if not all(house.dates) for wing in house.wings]
        for kind, polygons in changes.items():
            changed = Image.new("L", (EXTENT * FINE,) * 2)
            for polygon in polygons:
                _fill(ImageDraw.Draw(changed), polygon, 255)
            for road, _ in roads[:new_road] if kind == 3 else ():  # where roads cross
                _fill(ImageDraw.Draw(changed), road, 0)
            label[_frame(changed, shift) > 127] = kind if num_classes > 1 else 255
    return images[0], images[1], label


def _roads(rng: np.random.Generator, street: float) -> list[tuple[np.ndarray, float]]:
    """One or two roads as (polygon, angle): a street and, at times, one that crosses it."""
    roads = []
    for angle in (street, street + np.pi / 2)[: rng.integers(1, 3)]:
        middle, half = rng.uniform(0.15, 0.85, 2) * EXTENT, rng.uniform(6, 9)
        roads.append((_rectangle(middle, angle, 4 * EXTENT, 2 * half), angle))
    return roads


def _houses(rng: np.random.Generator, street: float, roads: list) -> list[House]:
    """Houses in rows along the street, none on a road or on another."""
    houses: list[House] = []
    spacing = rng.uniform(72, 90)
    stand = rng.choice([0.15, 0.5, 0.85], p=[0.45, 0.25, 0.3])  # share of an old place, the rest is built or torn down
    lots = np.stack(np.meshgrid(np.arange(-4, 5), np.arange(-4, 5)), -1).reshape(-1, 2) * spacing
    lots = EXTENT / 2 + rng.uniform(-spacing / 2, spacing / 2, 2) + lots @ _rotation(street)
    for centre in lots + rng.uniform(-4, 4, lots.shape):
        length, width = rng.uniform(40, 60), rng.uniform(30, 42)
        free = all(_distance(centre, road) > length / 2 + 4 for road, _ in roads)
        if not free or rng.random() < 0.2 or (np.abs(centre - EXTENT / 2) > EXTENT / 2 + 20).any():
            continue
        wings = [(length, width, 0, 0)]
        if rng.random() < 0.4:  # an L: a second wing across one end
            side = rng.choice([-1, 1], 2)
            wings.append((width * 0.7, width * 1.3, side[0] * (length - width * 0.7) / 2, side[1] * 6))
        dates = (True, True) if rng.random() < stand else (False, True) if rng.random() < 0.8 else (True, False)
        angle = street + rng.integers(2) * np.pi / 2 + rng.normal(0, 0.06)
        roof = ROOFS[rng.integers(len(ROOFS))] + rng.normal(0, 8) + rng.normal(0, 2, 3)
        houses.append(House(centre, wings, angle, rng.uniform(5, 10), roof, dates))
    return houses


def _trees(rng: np.random.Generator, houses: list[House], roads: list) -> tuple[np.ndarray, np.ndarray]:
    """Trees as rows (x, y, radius, kind) for both dates: most stay and grow, some are felled, some planted."""
    groves = rng.uniform(0, EXTENT, (rng.integers(2, 6), 2))
    places = np.concatenate(
        [rng.uniform(0, EXTENT, (30, 2)), *(grove + rng.normal(0, 18, (rng.integers(8, 30), 2)) for grove in groves)]
    )
    for house in houses:
        places = places[np.hypot(*(places - house.centre).T) > 36]
    for road, _ in roads:
        places = places[_distance(places, road) > 4]
    trees = np.column_stack([places, rng.gamma(6, 0.9, len(places)) + 1, rng.integers(len(TREES), size=len(places))])
    fate = rng.random(len(trees))
    grown = trees * (1, 1, rng.uniform(0.9, 1.35), 1)
    return trees[fate > 0.2], grown[(fate < 0.1) | (fate > 0.3)]


def _draw_ground(
    rng: np.random.Generator, ground: np.ndarray, roads: list, houses: list[House], date: int
) -> Image.Image:
    """The ground on one day, drawn fine: bare soil and lawns that come and go, roads, and drives laid for good."""
    ground = ground + rng.normal(0, 3, 3) + 6 * _noise(rng, 60)[..., None] * (1, 0.7, 0.8)  # drier here, greener there
    image = Image.fromarray(ground.clip(0, 255).astype(np.uint8)).resize((EXTENT * FINE,) * 2, Image.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(1, 5)):
        colour = (SOIL if rng.random() < 0.6 else LAWN) + rng.normal(0, 10)
        _fill(draw, _blob(rng, rng.uniform(0, EXTENT, 2), rng.uniform(8, 34)), colour)
    for house in houses:
        if house.dates[date]:
            length, width, *_ = house.wings[0]
            _fill(draw, house.corners(1.3 * length, 1.4 * width), LAWN + rng.random() * (DRY_LAWN - LAWN))
    for road, _ in roads:
        _fill(draw, road, ASPHALT + rng.normal(0, 8))
    for house in houses:
        _fill(draw, house.corners(7, 56, 6, 28), CONCRETE + rng.normal(0, 8))
    return image


def _draw_objects(
    rng: np.random.Generator, image: Image.Image, roads: list, houses: list[House], trees: np.ndarray, sun: float
) -> Image.Image:
    """Shadows, cars, trees and houses, lit from the angle `sun`, on top of the ground."""
    light = np.array([np.cos(sun), np.sin(sun)])
    shade = Image.new("L", image.size)
    for house in houses:
        for wing in house.wings:
            for step in np.linspace(0, 1, 8):  # the footprint, drawn out away from the light
                _fill(ImageDraw.Draw(shade), house.corners(*wing) - step * house.height * light, 255)
    for x, y, radius, _ in trees:
        _circle(ImageDraw.Draw(shade), np.array([x, y]) - 0.6 * radius * light, radius, 255)
    image = Image.composite(image.point(lambda value: int(value * 0.45)), image, shade)

    draw = ImageDraw.Draw(image)
    _cars(rng, draw, roads)
    for x, y, radius, kind in trees:
        for size, offset in ((1, 0), (0.7, 0.2), (0.4, 0.4)):  # brighter towards the light
            colour = TREES[int(kind)] * (0.8 + 0.5 * offset) + rng.normal(0, 5, 3)
            _circle(draw, np.array([x, y]) + offset * radius * light, size * radius, colour)
    for house in houses:
        for wing in house.wings:
            _roof(draw, house, wing, light)
    return image


def _cars(rng: np.random.Generator, draw: ImageDraw.ImageDraw, roads: list) -> None:
    """A few cars in either lane of each road."""
    for road, angle in roads:
        for along in rng.uniform(-EXTENT / 2, EXTENT / 2, rng.integers(2, 9)):
            lane = rng.choice([-4, 4])
            car = _rectangle(road.mean(0), angle, 9, 4, along, lane)
            _fill(draw, car, CARS[rng.integers(len(CARS))])


def _roof(draw: ImageDraw.ImageDraw, house: House, wing: np.ndarray, light: np.ndarray) -> None:
    """A hipped roof: four faces that meet at a ridge, each as bright as it faces the light."""
    corners, centre = house.corners(*wing), house.corners(*wing).mean(0)
    sides = np.roll(corners, -1, 0) - corners
    lengths = np.hypot(*sides.T)
    longest = int(lengths[1] > lengths[0])
    half_ridge = sides[longest] / lengths[longest] * (lengths.max() - lengths.min()) / 2
    ridge = np.array([centre - half_ridge, centre + half_ridge])
    for i in range(4):
        a, b = corners[i], corners[(i + 1) % 4]
        outward = (a + b) / 2 - centre
        brightness = 1 + 0.28 * outward @ light / np.hypot(*outward)
        ends = sorted(ridge, key=lambda end, b=b: np.hypot(*(end - b)))
        face = [a, b, *ends] if i % 2 == longest else [a, b, ends[0]]
        _fill(draw, np.array(face), house.roof * brightness)


def _expose(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """The day's light, the camera's colours and its noise: uint8 (H, W, 3)."""
    gain, offset = rng.uniform(0.88, 1.12) * rng.uniform(0.97, 1.03, 3), rng.uniform(-8, 8)
    image = (image - 110) * rng.uniform(0.9, 1.1) + 110
    return (image * gain + offset + rng.normal(0, 3, image.shape)).clip(0, 255).astype(np.uint8)


def _frame(image: Image.Image, shift: np.ndarray) -> np.ndarray:
    """The camera's view of a fine drawing, moved by `shift` fine pixels: float (256, 256[, 3]) in 0..255."""
    left, top = MARGIN * FINE + shift
    view = image.crop((left, top, left + SIZE * FINE, top + SIZE * FINE))
    return np.asarray(view.resize((SIZE, SIZE), Image.BOX), float)


def _noise(rng: np.random.Generator, grain: int) -> np.ndarray:
    """Smooth noise of unit spread, its bumps `grain` pixels wide: float (EXTENT, EXTENT)."""
    coarse = Image.fromarray(rng.normal(0, 1, (EXTENT // grain + 2,) * 2).astype(np.float32))
    return np.asarray(coarse.resize((EXTENT, EXTENT), Image.BICUBIC), float)


def _blob(rng: np.random.Generator, centre: np.ndarray, radius: float) -> np.ndarray:
    angles = np.linspace(0, 2 * np.pi, 14, endpoint=False)
    return centre + (radius * rng.uniform(0.6, 1.2, 14))[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)


def _distance(points: np.ndarray, road: np.ndarray) -> np.ndarray:
    """Pixels from each of (..., 2) points to a road's edge, negative on it."""
    along, half = (road[1] - road[0]) / (4 * EXTENT), np.hypot(*(road[3] - road[0])) / 2
    x, y = np.moveaxis(points - road.mean(0), -1, 0)
    return np.abs(along[0] * y - along[1] * x) - half


def _rotation(angle: float) -> np.ndarray:
    return np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])


def _rectangle(
    centre: np.ndarray, angle: float, length: float, width: float, along: float = 0, across: float = 0
) -> np.ndarray:
    """(4, 2) corners, turned by `angle` about `centre`, from which the rectangle is moved along and across."""
    x, y = np.array([-1, 1, 1, -1]) * length / 2 + along, np.array([-1, -1, 1, 1]) * width / 2 + across
    return centre + np.stack([x, y], 1) @ _rotation(angle)


def _fill(draw: ImageDraw.ImageDraw, points: np.ndarray, colour: np.ndarray | int) -> None:
    draw.polygon([tuple(point) for point in points * FINE], fill=_colour(colour))


def _circle(draw: ImageDraw.ImageDraw, centre: np.ndarray, radius: float, colour: np.ndarray | int) -> None:
    draw.ellipse([*(centre - radius) * FINE, *(centre + radius) * FINE], fill=_colour(colour))


def _colour(colour: np.ndarray | int) -> int | tuple[int, ...]:
    return colour if isinstance(colour, int) else tuple(np.clip(colour, 0, 255).astype(int).tolist())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw the demo: 192 made-up pairs of images with their masks.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent / "demo", help="(data/demo)")
    target = parser.parse_args().folder
    if target.exists():
        sys.exit(f"error: {target} is there already; delete it to draw it anew")
    make_demo(target)
