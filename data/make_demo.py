"""Draws a small data set in LEVIR-CD's layout, to try training before the real one is here.

Each pair shows a made-up suburb from above at two dates. Some houses appear or disappear; only these are in the mask.
Everything else that differs is there to mislead a detector: the light, turning shadows, trees, cars, rocks, lawns, a
shift of up to 1.5 pixels and the sensor's noise. With three classes of change, roads may be new too.

    python data/make_demo.py [FOLDER]
"""

import argparse
import os
import sys
import tempfile
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

SPLITS = {"train": 128, "val": 32, "test": 32}  # pairs
SIZE = 256  # pixels, a side of an image
MARGIN = 56  # pixels drawn around it, so that it can be turned and shifted
SIDE = SIZE + 2 * MARGIN

ROOFS = [(98, 94, 96), (126, 116, 108), (146, 104, 84), (168, 160, 150), (112, 104, 100), (198, 194, 188)]
CARS = [(232, 232, 232), (40, 42, 48), (150, 36, 34), (52, 74, 126), (176, 178, 182)]
GRASS = [(120, 114, 78), (96, 104, 66), (112, 112, 74), (84, 96, 58), (72, 88, 50), (142, 130, 92)]
ASPHALT, TREE = np.array([(128, 126, 122), (56, 70, 41)])
SHADOW = (0, 0, 0, 140)  # translucent black
STAYS, NEW, GONE, NEW_ROAD = range(4)  # values of a mask with three classes
DATES = {STAYS: (0, 1), NEW: (1,), GONE: (0,), NEW_ROAD: (1,)}  # when it is there; 0: before, 1: after
CORNERS = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])


@dataclass
class Item:
    """A road, a house or a tree."""

    centre: np.ndarray  # x, y
    half: np.ndarray  # half of the width, half of the height
    colour: np.ndarray
    change: int  # STAYS, NEW, GONE or NEW_ROAD

    def is_near(self, others: list["Item"]) -> bool:
        """Whether it is less than 4 pixels from one of the others."""
        return any((abs(self.centre - other.centre) < self.half + other.half + 4).all() for other in others)


def make_demo(folder: str | Path, seed: int = 0, splits: dict[str, int] | None = None, num_classes: int = 1) -> None:
    """Write the demo's pairs as `folder/SPLIT/{A,B,label}/NAME.png`; the same seed gives the same pixels.

    Args:
        folder: appears once it is complete; one that exists is left as it is.
        seed: of the whole set.
        splits: number of pairs in each split; None for `SPLITS`.
        num_classes: 1, masks hold 0 and 255; or 3, masks hold 0 to 3: new house, demolished house, new road.
    """
    folder, splits = Path(folder), splits or SPLITS
    folder.parent.mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=sum(splits.values()), desc="drawing the demo", unit="pair", leave=False, disable=None)
    with bar, tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent) as temporary:
        unfinished = Path(temporary, folder.name)
        for number, (split, pairs) in enumerate(splits.items()):
            for index in range(pairs):
                images = draw_pair(np.random.default_rng([seed, number, index]), num_classes)
                for name, image in zip(("A", "B", "label"), images, strict=True):
                    file = unfinished / split / name / f"demo_{index:03}.png"
                    file.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(image).save(file, compress_level=1)
                bar.update()
        if not folder.exists():  # another process may have drawn it meanwhile
            os.rename(unfinished, folder)


def draw_pair(rng: np.random.Generator, num_classes: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One place at two dates: uint8 (256, 256, 3) before and after, uint8 (256, 256) mask of 0 and 255, or 0 to 3."""
    roads = _place_roads(rng, num_classes)
    houses = _place_houses(rng, roads)
    trees = _place_trees(rng, roads + houses)
    ground = rng.choice(GRASS) + 9 * _noise(rng, 40) + 7 * _noise(rng, 8) + 4 * _noise(rng, 2)
    sun, angle = rng.uniform(0, 2 * np.pi), rng.uniform(0, 360)

    images, masks = [], []
    for date in (0, 1):
        present = [[item for item in items if date in DATES[item.change]] for items in (roads, houses, trees)]
        image = _draw(rng, ground, *present, sun + rng.uniform(-0.5, 0.5))
        mask = Image.new("L", image.size)
        for item in present[0] + present[1]:  # roads and houses
            ImageDraw.Draw(mask).rectangle(_box(item.centre, item.half), item.change)
        shift = rng.uniform(-1.5, 1.5, 2)
        images.append(_expose(rng, _view(image, angle, shift, Image.Resampling.BILINEAR)))
        masks.append(_view(mask, angle, shift, Image.Resampling.NEAREST))
    mask = np.maximum(*masks)
    return *images, mask if num_classes > 1 else np.where(mask > 0, 255, 0).astype(np.uint8)


def _place_roads(rng: np.random.Generator, num_classes: int) -> list[Item]:
    """One road or two that cross; with three classes the first is new in half of the places."""
    roads = []
    for axis in range(rng.integers(1, 3)):
        centre, half = np.full((2, 2), SIDE / 2)
        centre[axis], half[axis] = rng.uniform(0.3, 0.7) * SIDE, rng.uniform(6, 9)
        is_new = num_classes > 1 and axis == 0 and rng.random() < 0.5
        roads.append(Item(centre, half, ASPHALT + rng.normal(0, 8), NEW_ROAD if is_new else STAYS))
    return roads


def _place_houses(rng: np.random.Generator, roads: list[Item]) -> list[Item]:
    """Houses in rows, none on a road or on another house."""
    houses = []
    spacing = rng.uniform(72, 90)
    old = rng.choice([0.15, 0.5, 0.85], p=[0.45, 0.25, 0.3])  # share of the houses that stay
    grid = np.arange(rng.uniform(0, spacing), SIDE, spacing)
    for place in product(grid, grid):
        centre, half = place + rng.uniform(-4, 4, 2), rng.permutation([rng.uniform(20, 30), rng.uniform(15, 21)])
        change = rng.choice([STAYS, NEW, GONE], p=[old, 0.8 * (1 - old), 0.2 * (1 - old)])
        houses.append(Item(centre, half, rng.choice(ROOFS) + rng.normal(0, 8), int(change)))
    return [house for house in houses if rng.random() < 0.8 and not house.is_near(roads)]


def _place_trees(rng: np.random.Generator, others: list[Item]) -> list[Item]:
    """Groves of trees, none on a road or a house; most stay, some are felled or planted."""
    groves = rng.uniform(0, SIDE, (rng.integers(6, 14), 2))
    trees = []
    for _ in range(20 * len(groves)):
        centre, radius = rng.choice(groves) + rng.normal(0, 30, 2), 1 + rng.gamma(6, 0.9)
        change = rng.choice([STAYS, NEW, GONE], p=[0.8, 0.1, 0.1])
        trees.append(Item(centre, np.array([radius, radius]), TREE + rng.normal(0, 7), int(change)))
    return [tree for tree in trees if not tree.is_near(others)]


def _draw(
    rng: np.random.Generator, ground: np.ndarray, roads: list[Item], houses: list[Item], trees: list[Item], sun: float
) -> Image.Image:
    """The place at one date, lit from the direction `sun` (radians); rocks, lawns and cars are of that date alone."""
    ground = ground + _noise(rng, 60) * (6, 4, 5) + rng.normal(0, 3, 3)  # drier here, greener there
    image = Image.fromarray(ground.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image, "RGBA")
    for _ in range(rng.integers(20, 50)):  # rocks, of the roofs' colours, so that colour alone doesn't give houses away
        draw.ellipse(_box(rng.uniform(0, SIDE, 2), rng.uniform(3, 9, 2)), _rgb(rng.choice(ROOFS) + rng.normal(0, 8)))
    for house in houses:
        draw.rectangle(_box(house.centre, house.half + 8), _rgb(rng.choice(GRASS)))
    for road in roads:
        draw.rectangle(_box(road.centre, road.half), _rgb(road.colour))
        for car in road.centre + rng.uniform(-1, 1, (rng.integers(5, 20), 2)) * (road.half - 4):
            draw.rectangle(_box(car, np.where(road.half == SIDE / 2, 4.5, 2)), _rgb(rng.choice(CARS)))

    light = np.array([np.cos(sun), np.sin(sun)])
    for house in houses:
        draw.rectangle(_box(house.centre - 9 * light, house.half), SHADOW)
        eaves = house.centre + CORNERS * house.half
        ridge = house.centre + CORNERS * (house.half - house.half.min())  # these coincide in pairs
        for i, j in ((0, 1), (1, 2), (2, 3), (3, 0)):
            outward = (CORNERS[i] + CORNERS[j]) / 2
            face = [tuple(point) for point in (eaves[i], eaves[j], ridge[j], ridge[i])]
            draw.polygon(face, _rgb(house.colour * (1 + 0.34 * light @ outward)))
    for tree in trees:
        draw.ellipse(_box(tree.centre - 0.6 * tree.half * light, tree.half), SHADOW)
        draw.ellipse(_box(tree.centre, tree.half), _rgb(0.8 * tree.colour))
        draw.ellipse(_box(tree.centre + 0.3 * tree.half * light, 0.6 * tree.half), _rgb(tree.colour))
    return image


def _expose(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """The light of the day, the colours of the camera and its noise: uint8 (H, W, 3)."""
    contrast, gain = rng.uniform(0.9, 1.1), rng.uniform(0.88, 1.12) * rng.uniform(0.97, 1.03, 3)
    image = (contrast * (image - 110.0) + 110) * gain + rng.uniform(-8, 8) + rng.normal(0, 3, image.shape)
    return image.clip(0, 255).astype(np.uint8)


def _view(drawing: Image.Image, angle: float, shift: np.ndarray, resample: Image.Resampling) -> np.ndarray:
    """The middle of a drawing, turned by `angle` degrees and moved by `shift` pixels: uint8 (256, 256[, 3])."""
    turned = drawing.rotate(angle, resample, translate=tuple(shift))
    return np.asarray(turned.crop((MARGIN, MARGIN, MARGIN + SIZE, MARGIN + SIZE)))


def _noise(rng: np.random.Generator, grain: int) -> np.ndarray:
    """Smooth noise of unit spread, its bumps `grain` pixels wide: float32 (SIDE, SIDE, 1)."""
    coarse = Image.fromarray(rng.normal(0, 1, (SIDE // grain + 2,) * 2).astype(np.float32))
    return np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC))[..., None]


def _box(centre: np.ndarray, half: np.ndarray) -> list[float]:
    return [*(centre - half), *(centre + half)]


def _rgb(colour: np.ndarray) -> tuple[int, ...]:
    return tuple(np.clip(colour, 0, 255).astype(int).tolist())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw the demo: 192 made-up pairs of images with their masks.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent / "demo", help="(data/demo)")
    target = parser.parse_args().folder
    if target.exists():
        sys.exit(f"error: {target} exists already; delete it to draw it again")
    make_demo(target)
