"""LEVIRCD, its batches and color_jitter on files written for the purpose, and on real pairs where there are any."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_pair, write_pair
from PIL import Image
from scipy.spatial.transform import Rotation
from torchvision.transforms.v2 import functional

from dataset import LEVIRCD, DataError, RandomBatches, color_jitter, make_loader

RNG = np.random.default_rng(0)


def located_pair(height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A pair whose every pixel tells where it is and of which date; the label is the parity of both coordinates."""
    y, x = np.indices((height, width), dtype=np.uint8)
    return np.dstack([y, x, 0 * y]), np.dstack([y, x, 0 * y + 1]), ((y // 2 + x) % 2) * 255


# Reading


def test_pairs_by_stem_below_home_and_passes_over_strays(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "train"
    pairs = {stem: random_pair(RNG, 8, 10) for stem in ("b", "a.x", "city/b", "caf\u00e9 名", os.fsdecode(b"\xff"))}
    for stem, pair in pairs.items():
        write_pair(folder, stem, *pair)
    (folder / "A" / "b.png").rename(folder / "A" / "b.PNG")
    Image.open(folder / "B" / "b.png").save(folder / "B" / "b.TIF")
    (folder / "B" / "b.png").unlink()
    (folder / "B" / "caf\u00e9 名.png").rename(folder / "B" / "cafe\u0301 名.png")  # composed and decomposed are one
    for stray in ("A/.DS_Store", "B/Thumbs.db", "label/._b.png", "A/notes.txt"):
        (folder / stray).write_bytes(b"stray")
    (folder / "A" / "folder.png").mkdir()
    (tmp_path / "val").mkdir()
    data = LEVIRCD("~", "train")
    for index, stem in enumerate(sorted(pairs)):
        image_a, image_b, label = data[index]
        assert data.name(index) == Path(stem).name and image_a.dtype == image_b.dtype == label.dtype == torch.uint8
        assert np.array_equal(image_a.permute(1, 2, 0), pairs[stem][0])
        assert np.array_equal(image_b.permute(1, 2, 0), pairs[stem][1])
        assert np.array_equal(label[0], pairs[stem][2] // 255) and data.sizes[index] == (8, 10)


def test_masks_of_several_classes(tmp_path):
    classes, cache = np.array([[0, 1], [2, 3], [0, 3]], np.uint8), tmp_path / "cache"
    coloured = Image.fromarray(classes).convert("P")
    coloured.putpalette([0, 0, 0, 200, 9, 9, 9, 200, 9, 9, 9, 200])
    for stem in ("grey", "palette"):
        write_pair(tmp_path / "val", stem, *[np.zeros((3, 2, 3), np.uint8)] * 2, classes)
    coloured.save(tmp_path / "val" / "label" / "palette.png")
    for _ in range(2):
        grey, palette = LEVIRCD(tmp_path, "val", cache_dir=cache, num_classes=3)
        assert np.array_equal(grey[2][0], classes) and np.array_equal(palette[2][0], classes)
    for num_classes in (1, 2):  # also beside a cache that holds them decoded for three
        with pytest.raises(DataError, match=rf"a mask holds .* where NUM_CLASSES={num_classes}, this one 0, 1"):
            LEVIRCD(tmp_path, "val", cache_dir=cache, num_classes=num_classes)


def test_ignored_and_void_pixels(tmp_path):
    image, mask = np.zeros((2, 3, 3), np.uint8), np.array([[0, 1, 255], [255, 0, 1]], np.uint8)
    write_pair(tmp_path / "val", "x", image, image, mask)
    for num_classes in (1, 2):
        with pytest.raises(DataError, match="0, 1, 255; give IGNORE=255"):
            LEVIRCD(tmp_path, "val", num_classes=num_classes)
        assert np.array_equal(LEVIRCD(tmp_path, "val", num_classes=num_classes, ignore=255)[0][2][0], mask)
    mask, opacity = np.array([[[0, 255, 7], [7, 0, 255]], [[255, 0, 0], [255, 255, 255]]], np.uint8)
    write_pair(tmp_path / "val", "x", image, np.dstack([image, opacity]), mask)
    label = LEVIRCD(tmp_path, "val", ignore=7, cache_dir=tmp_path / "cache")[0][2][0]
    assert np.array_equal(label, [[0, 255, 255], [255, 0, 1]])
    write_pair(tmp_path / "val", "x", image, image, mask | 255)
    assert LEVIRCD(tmp_path, "val").has_change
    with pytest.raises(DataError, match="label: no mask has a pixel to score"):
        assert LEVIRCD(tmp_path, "val", ignore=255).has_change


def test_odd_masks_are_announced_once(tmp_path, capsys):
    for stem, high in (("a", 255), ("b", 254), ("c", 254)):
        image_a, image_b, mask = random_pair(RNG, 40, 40)
        write_pair(tmp_path / "val", stem, image_a, image_b, np.where(mask > 0, high, 0).astype(np.uint8))
    for _ in range(2):
        LEVIRCD(tmp_path, "val")
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("val: 2 of 3 masks hold other values than 0 and 255: above 127 is change")


# Splits


def test_a_tenth_of_train_is_val_where_there_is_none(tmp_path, capsys):
    for index in range(25):
        write_pair(tmp_path / "train", f"{index:02}", *random_pair(RNG, 8, 8))
    train, val, again = ({files[0] for files in LEVIRCD(tmp_path, split).files} for split in ("train", "val", "val"))
    assert len(val) == 3 and val == again and not train & val and len(train | val) == 25
    assert capsys.readouterr().out.count("3 of 25 pairs of train, by their names, are val instead") == 1
    (tmp_path / "val").mkdir()
    assert len(LEVIRCD(tmp_path, "train")) == 25


def test_images_that_give_no_batch_of_crops(tmp_path):
    (tmp_path / "val").mkdir()
    for stem, width in (("x", 64), ("y", 40)):
        write_pair(tmp_path / "train", stem, *random_pair(RNG, 32, width))
    with pytest.raises(DataError, match=r"x\.png: 64 × 32 pixels, less than CROP_SIZE=48: lower it"):
        LEVIRCD(tmp_path, "train", crop_size=48, augment=True)
    with pytest.raises(DataError, match=r"y\.png: 40 × 32 pixels, but .*x\.png has 64 × 32: .*; set CROP_SIZE"):
        LEVIRCD(tmp_path, "train", augment=True)
    assert len(LEVIRCD(tmp_path, "train")) == 2


# Tiles and crops


@pytest.mark.parametrize(("size", "tiles"), [((64, 64), 16), ((50, 37), 12), ((16, 16), 1), ((7, 9), 1)])
def test_tiles_hold_each_pixel_once(tmp_path, size, tiles):
    write_pair(tmp_path / "val", "x", *located_pair(*size))
    data = LEVIRCD(tmp_path, "val", crop_size=16)
    pixels = torch.cat([data[index][0].flatten(1) for index in range(len(data))], 1)
    assert len(data) == tiles and data.name(tiles - 1) == f"x [{(size[0] - 1) // 16 * 16}, {(size[1] - 1) // 16 * 16}]"
    assert pixels.shape[1] == size[0] * size[1] == len(set(map(tuple, pixels.T.tolist())))


def test_crops_stay_together_and_take_every_turn(tmp_path):
    write_pair(tmp_path / "train", "x", *located_pair(40, 50))
    data = LEVIRCD(tmp_path, "train", crop_size=16, augment=True, swap_dates=0.5, cache_dir=tmp_path / "cache")
    assert len(data) == 2 * 3  # as many as fit side by side
    turns, swaps, corners = set(), 0, set()
    for draw in range(400):
        image_a, image_b, label = data[draw % len(data), draw]
        y, x = image_a[0].int(), image_a[1].int()
        assert torch.equal(image_a[:2], image_b[:2])
        assert torch.equal(label[0].int(), (y // 2 + x) % 2)
        assert image_a[2, 0, 0] + image_b[2, 0, 0] == 1
        swaps += int(image_a[2, 0, 0])
        turns.add(tuple((int(y[i, j] - y[8, 8]), int(x[i, j] - x[8, 8])) for i, j in ((7, 8), (8, 7))))
        corners.add((int(y.min()), int(x.min())))
        assert len(set(zip(y.flatten().tolist(), x.flatten().tolist(), strict=True))) == 256
    assert len(turns) == 8 and 150 < swaps < 250
    assert {y for y, _ in corners} == set(range(25)) and {x for _, x in corners} == set(range(35))


def test_an_epoch_holds_borders_and_corners_too(tmp_path):
    """A crop's middle is in one of 64 rows: 16 of them hold an inner pixel, 9 a border pixel; there are four crops."""
    write_pair(tmp_path / "train", "x", *located_pair(64, 64))
    data = LEVIRCD(tmp_path, "train", crop_size=16, augment=True, cache_dir=tmp_path / "cache")
    assert len(data) == 16
    held = np.zeros((64, 64))
    for seed in range(200):
        for index in range(len(data)):
            y, x, _ = data[index, 1000 * seed + index][0].numpy().astype(int)
            assert abs(y - index // 4 * 16 - 8).min() <= 8 and abs(x - index % 4 * 16 - 8).min() <= 8
            held[y, x] += 1 / 200
    assert held[16:48, 16:48].mean() == pytest.approx(1, abs=0.05)
    assert held[[0, -1], 16:48].mean() == pytest.approx(9 / 16, abs=0.05)
    assert held[[0, 0, -1, -1], [0, -1, 0, -1]].mean() == pytest.approx((9 / 16) ** 2, abs=0.05)


def test_whole_oblong_images_keep_their_shape_and_a_crop_may_be_one_pixel(tmp_path):
    write_pair(tmp_path / "train", "x", *located_pair(8, 12))
    crops = [LEVIRCD(tmp_path, "train", augment=True)[0, seed][0] for seed in range(40)]
    assert {crop.shape for crop in crops} == {(3, 8, 12)}
    assert len({tuple(crop.flatten().tolist()) for crop in crops}) == 4  # two turns, mirrored or not
    assert LEVIRCD(tmp_path, "train", crop_size=1, augment=True)[95, 0][0].shape == (3, 1, 1)


# Batches


def test_evaluation_batches_hold_one_size_and_every_item(tmp_path, monkeypatch):
    write_pair(tmp_path / "val", "x", *random_pair(RNG, 40, 50))
    data = LEVIRCD(tmp_path, "val", crop_size=16)
    batches = data.batches(2 * 16 * 16)
    labels = [torch.stack([data[index][2] for index in batch]) for batch in batches]  # not of two sizes
    assert sorted(index for batch in batches for index in batch) == list(range(len(data)))
    assert max(label.numel() for label in labels) == 2 * 16 * 16
    assert [len(batch) for batch in data.batches(1)] == [1] * len(data)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 2, 5}, raising=False)
    assert [make_loader(data, batches, None, on_gpu).num_workers for on_gpu in (True, False)] == [3, 0]


@pytest.mark.parametrize("workers", [0, 2])
def test_crops_and_their_order_follow_from_the_seed_alone(tmp_path, workers):
    write_pair(tmp_path / "train", "x", *random_pair(RNG, 64, 64))
    data = LEVIRCD(tmp_path, "train", crop_size=16, augment=True)
    loader = make_loader(data, RandomBatches(len(data), 3), workers, on_gpu=False)
    torch.manual_seed(7)
    epochs = [[torch.cat(batch, 1) for batch in loader] for _ in range(2)]
    torch.manual_seed(7)
    batches = list(RandomBatches(len(data), 3))
    assert len(loader) == len(batches) == 5 and len({index for batch in batches for index, _ in batch}) == 15
    for batch, draws in zip(epochs[0], batches, strict=True):
        assert torch.equal(batch, torch.stack([torch.cat(data[draw]) for draw in draws]))
    assert not torch.equal(epochs[0][0], epochs[1][0])
    assert [len(batch) for batch in RandomBatches(2, 3)] == [2]  # one that isn't full, if there is no other


def test_processes_share_every_batch_and_its_colours(monkeypatch):
    images = torch.randint(0, 256, (8, 3, 6, 6), dtype=torch.uint8)

    def drawn(rank: int, world: int) -> tuple[list, torch.Tensor]:
        monkeypatch.setattr("dataset.rank", lambda: rank)
        monkeypatch.setattr("dataset.world", lambda: world)
        torch.manual_seed(3)
        return list(RandomBatches(20, 8)), color_jitter(images[rank::world], 0.3, 0.3, 0.3, 0.3)

    batches, colours = drawn(0, 1)
    assert [len(batch) for batch in batches] == [8, 8]
    for rank in range(4):
        share, its_colours = drawn(rank, 4)
        assert share == [batch[rank::4] for batch in batches]
        torch.testing.assert_close(its_colours, colours[rank::4], atol=1e-6, rtol=0)


# The cache


def test_the_cache_gives_the_same_and_follows_the_files(tmp_path):
    for stem in "xy":
        write_pair(tmp_path / "val", stem, *random_pair(RNG, 32, 32), suffix=".bmp")
    cache, file = tmp_path / "cache", tmp_path / "val" / "label" / "x.bmp"

    def decoded_at() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in cache.iterdir()}

    plain, cached = LEVIRCD(tmp_path, "val", 16), LEVIRCD(tmp_path, "val", 16, cache_dir=cache)
    assert all(map(torch.equal, sum(zip(*plain, strict=True), ()), sum(zip(*cached, strict=True), ())))
    before = decoded_at()
    LEVIRCD(tmp_path, "val", cache_dir=cache)
    assert decoded_at() == before and [np.load(path).shape for path in before] == [(32, 32, 7)] * 2
    # An archive may give a corrected mask the old size and time.
    stat, corrected = file.stat(), 255 - np.asarray(Image.open(file))
    Image.fromarray(corrected).save(file)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert np.array_equal(LEVIRCD(tmp_path, "val", cache_dir=cache)[0][2][0], corrected // 255)
    assert len(decoded_at()) == 3 and before.items() < decoded_at().items()  # y was not decoded again
    file.with_name("x.bmp.aux.xml").write_text("<PAMDataset/>")  # where GDAL may note values without data
    LEVIRCD(tmp_path, "val", cache_dir=cache)
    assert len(decoded_at()) == 4


def test_a_damaged_cache_is_mended_and_one_that_cannot_be_written_is_said(tmp_path):
    write_pair(tmp_path / "val", "x", *random_pair(RNG, 32, 32))
    data = LEVIRCD(tmp_path, "val", cache_dir=tmp_path / "cache")
    (file,), expected = (tmp_path / "cache").iterdir(), data[0]
    whole = file.read_bytes()
    for damaged in (b"", b"not an array", whole[:-1], None):
        file.unlink() if damaged is None else file.write_bytes(damaged)
        assert all(map(torch.equal, data[0], expected)) and file.read_bytes() == whole
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"CACHE_DIR: .*file/cache.*; CACHE_DIR=None works without it"):
        LEVIRCD(tmp_path, "val", cache_dir=tmp_path / "file" / "cache")


# Colour jitter


@pytest.mark.parametrize("strengths", [(0.6, 0, 0), (0, 0.6, 0), (0, 0, 0.6), (0.2, 0.3, 0.4)])
def test_jitter_agrees_with_torchvision(strengths):
    """Also one after the other, on colours that stay within 0..1 so that it doesn't matter where they are clipped."""
    low, high = (80, 160) if all(strengths) else (0, 256)
    image = torch.randint(low, high, (1, 3, 24, 32), dtype=torch.uint8)
    for seed in range(8):
        torch.manual_seed(seed)
        ours = color_jitter(image, *strengths, hue=0)
        torch.manual_seed(seed)
        expected = image / 255
        adjustments = functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation
        for adjust, strength in zip(adjustments, strengths, strict=True):
            factor = torch.empty(1).uniform_(1 - strength, 1 + strength).item()
            if strength:
                expected = adjust(expected, factor)
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    images = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8).expand(6, 3, 8, 8)
    jittered = color_jitter(images, 0.3, 0.3, 0.3, 0.3)  # drawn for each image
    assert jittered.min() >= 0 and jittered.max() <= 1 and len(jittered.flatten(1).unique(dim=0)) == 6


def test_hue_is_a_rotation_about_the_grey_axis():
    image = torch.randint(80, 160, (1, 3, 8, 8), dtype=torch.uint8)
    torch.manual_seed(0)
    turned = color_jitter(image, 0, 0, 0, hue=0.05)[0].flatten(1).T.double().numpy()
    torch.manual_seed(0)
    angle = [torch.empty(1).uniform_(-strength, strength).item() for strength in (0, 0, 0, 0.05)][-1] * 2 * np.pi
    rotation = Rotation.from_rotvec(angle * np.ones(3) / np.sqrt(3))
    np.testing.assert_allclose(turned, rotation.apply(image[0].flatten(1).T / 255), atol=1e-6)


# Real pairs


def test_real_pairs(real):
    data = LEVIRCD(real, "val")
    assert [tuple(item[0].shape) for item in data] == [(3, 1024, 1024)] * 2
    changed = {data.name(index): data[index][2].float().mean().item() for index in range(len(data))}
    assert changed == pytest.approx({"val_1": 0.007, "test_13": 0.098}, abs=1e-3)
    assert len(LEVIRCD(real, "train", crop_size=256, augment=True)) == 112
