"""LEVIRCD and color_jitter on files written for the purpose, and on real pairs where there are any."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PROCESSES, random_pair, write_pair
from PIL import Image
from torchvision.transforms.v2 import functional

import dataset
from dataset import IGNORED, LEVIRCD, DataError, Objects, color_jitter

RNG = np.random.default_rng(0)


def located_pair(height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A pair whose every pixel says where it is and of which date; the label is the parity of both coordinates."""
    y, x = np.indices((height, width), dtype=np.uint8)
    return np.dstack([y, x, 0 * y]), np.dstack([y, x, 0 * y + 1]), ((y // 2 + x) % 2) * 255


def save_everywhere(folder: Path, name: str, image: Image.Image) -> None:
    for part in ("A", "B", "label"):
        (folder / part).mkdir(parents=True, exist_ok=True)
        image.save(folder / part / name)


# Reading


def test_pairs_by_stem_and_passes_over_strays(tmp_path):
    folder = tmp_path / "train"
    pairs = {stem: random_pair(RNG, 8, 10) for stem in ("b", "a.x", "ç ñ")}
    for stem, pair in pairs.items():
        write_pair(folder, stem, *pair)
    (folder / "A" / "b.png").rename(folder / "A" / "b.PNG")
    Image.open(folder / "B" / "b.png").save(folder / "B" / "b.TIF")
    (folder / "B" / "b.png").unlink()
    for stray in ("A/.DS_Store", "B/Thumbs.db", "label/._b.png", "A/notes.txt"):
        (folder / stray).write_bytes(b"stray")
    (folder / "A" / "folder.png").mkdir()
    (tmp_path / "val").mkdir()
    data = LEVIRCD(tmp_path, "train")
    assert [data.name(index) for index in range(len(data))] == ["a.x", "b", "ç ñ"]
    for index, stem in enumerate(("a.x", "b", "ç ñ")):
        image_a, image_b, label = data[index]
        assert image_a.dtype == image_b.dtype == label.dtype == torch.uint8
        assert np.array_equal(image_a.permute(1, 2, 0), pairs[stem][0])
        assert np.array_equal(image_b.permute(1, 2, 0), pairs[stem][1])
        assert np.array_equal(label[0], pairs[stem][2] // 255)


MASK = np.array([[0, 1], [1, 0], [1, 1]], np.uint8)


def palette_mask(colours: list[int]) -> Image.Image:
    image = Image.fromarray(MASK)
    image.putpalette(colours)
    return image


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(MASK * 255),
        Image.fromarray(MASK),
        Image.fromarray(MASK.astype(bool)),
        Image.fromarray(np.dstack([MASK * 255] * 3)),
        Image.fromarray(np.dstack([MASK] * 3)),
        Image.fromarray(np.dstack([MASK * 255] * 3 + [MASK * 0 + 255])),
        palette_mask([0, 0, 0, 255, 255, 255]),
        palette_mask([0, 0, 0, 128, 0, 0]),  # as annotation tools colour class 1
        Image.fromarray((1 - MASK) * 255).point(lambda value: 255 - value).convert("P"),
    ],
    ids=["L-255", "L-1", "1", "RGB-255", "RGB-1", "RGBA", "P-white", "P-red", "P-grey"],
)
def test_masks_of_every_kind(tmp_path, image):
    write_pair(tmp_path / "val", "x", *[np.zeros((3, 2, 3), np.uint8)] * 2, MASK)
    image.save(tmp_path / "val" / "label" / "x.png")
    assert np.array_equal(LEVIRCD(tmp_path, "val")[0][2][0], MASK)


def test_masks_of_several_classes(tmp_path):
    classes, cache = np.array([[0, 1], [2, 3], [0, 3]], np.uint8), tmp_path / "cache"
    coloured = Image.fromarray(classes).convert("P")
    coloured.putpalette([0, 0, 0, 200, 9, 9, 9, 200, 9, 9, 9, 200])
    for stem, image in (("grey", Image.fromarray(classes)), ("palette", coloured), ("binary", Image.fromarray(MASK))):
        write_pair(tmp_path / "val", stem, *[np.zeros((3, 2, 3), np.uint8)] * 2, MASK)
        image.save(tmp_path / "val" / "label" / f"{stem}.png")
    for _ in range(2):
        binary, grey, palette = LEVIRCD(tmp_path, "val", cache_dir=cache, num_classes=3)
        assert np.array_equal(grey[2][0], classes) and np.array_equal(palette[2][0], classes)
        assert np.array_equal(binary[2][0], MASK)
    for num_classes in (1, 2):  # also from the cache, where they have been decoded
        with pytest.raises(
            DataError, match=f"grey.png: a mask holds .* where NUM_CLASSES={num_classes}, this one 0, 1"
        ):
            LEVIRCD(tmp_path, "val", cache_dir=cache, num_classes=num_classes)
    Image.fromarray(MASK * 255).save(tmp_path / "val" / "label" / "binary.png")
    with pytest.raises(
        DataError, match=r"binary\.png: .* 0 to 3 alone where NUM_CLASSES=3, this one 0, 255; give IGNORE=255"
    ):
        LEVIRCD(tmp_path, "val", cache_dir=cache, num_classes=3)


@pytest.mark.parametrize("chance", [0.0, 1.0])
def test_the_dates_are_exchanged_when_asked_for(tmp_path, chance):
    image_a, image_b, mask = random_pair(RNG, 32, 32)
    write_pair(tmp_path / "train", "x", image_a // 128, 128 + image_b // 128, mask)
    data = LEVIRCD(tmp_path, "train", crop_size=16, augment=True, swap_dates=chance)
    for seed in range(50):
        image_a, image_b, _ = data[0, seed]
        assert (image_a.max() < 2) == (image_b.min() >= 128) == (chance == 0)


@pytest.mark.parametrize("mode", ["P", "RGB", "RGBA"])
def test_images_of_every_kind(tmp_path, mode):
    rgb = Image.fromarray(RNG.integers(0, 255, (8, 8, 3), dtype=np.uint8))
    write_pair(tmp_path / "val", "x", *[np.zeros((8, 8, 3), np.uint8)] * 2, np.zeros((8, 8), np.uint8))
    image = rgb.convert(mode)
    image.save(tmp_path / "val" / "A" / "x.png")
    assert np.array_equal(LEVIRCD(tmp_path, "val")[0][0].permute(1, 2, 0), np.asarray(image.convert("RGB")))


def test_odd_masks_are_said_once_a_split(tmp_path, capsys):
    mask = np.zeros((40, 40), np.uint8)
    mask[:20] = 255
    for stem in "abc":
        write_pair(
            tmp_path / "val", stem, *random_pair(RNG, 40, 40)[:2], mask if stem == "a" else np.minimum(mask, 254)
        )
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):
        dataset._said.clear()
        for _ in range(2):
            data = LEVIRCD(tmp_path, "val", cache_dir=cache)
        said = capsys.readouterr().out
        assert said.count("\n") == 1 and "2 of 3 masks hold other values than 0 and 255: from 128 on" in said
        assert said.rstrip().endswith(f"(the first is {tmp_path}/val/label/b.png)")
        assert all(np.array_equal(label[0], mask > 0) for *_, label in data)


def test_ignored_pixels(tmp_path):
    mask = np.array([[0, 1, 255], [255, 0, 1]], np.uint8)
    write_pair(tmp_path / "val", "x", *[np.zeros((2, 3, 3), np.uint8)] * 2, mask)
    for num_classes in (1, 2):
        with pytest.raises(DataError, match="0, 1, 255; give IGNORE=255"):
            LEVIRCD(tmp_path, "val", num_classes=num_classes)
        assert np.array_equal(LEVIRCD(tmp_path, "val", num_classes=num_classes, ignore=255)[0][2][0], mask)
    write_pair(
        tmp_path / "val", "x", *[np.zeros((2, 3, 3), np.uint8)] * 2, np.array([[0, 255, 7], [7, 0, 255]], np.uint8)
    )
    cached = LEVIRCD(tmp_path, "val", ignore=7, cache_dir=tmp_path / "cache")[0][2][0]
    assert np.array_equal(cached, [[0, 1, 255], [255, 0, 1]])


def test_void_pixels_are_ignored(tmp_path):
    image_a, image_b, mask = random_pair(RNG, 20, 30)
    write_pair(tmp_path / "val", "x", image_a, image_b, mask)
    see_through = np.dstack([image_b, np.full((20, 30), 255, np.uint8)])
    see_through[:5, :, 3] = 0
    Image.fromarray(see_through).save(tmp_path / "val" / "B" / "x.png")
    label = LEVIRCD(tmp_path, "val")[0][2][0].numpy()
    assert (label[:5] == 255).all() and np.array_equal(label[5:], mask[5:] // 255)


# Folders


def test_folders_of_other_names_and_folders_below_them(tmp_path):
    pairs = {stem: random_pair(RNG, 8, 10) for stem in ("city1/x", "city2/x", "y")}
    for stem, pair in pairs.items():
        for name, array in zip(("time1", "time2", "mask"), pair, strict=True):
            file = tmp_path / "val" / name / f"{stem}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(file)
    (tmp_path / "val" / "list").mkdir()
    (tmp_path / "val" / "list" / "val.txt").write_text("x")
    data = LEVIRCD(tmp_path, "val", folders=("time1", "time2", "mask"))
    assert len(data) == 3
    for index, stem in enumerate(pairs):
        assert np.array_equal(data[index][1].permute(1, 2, 0), pairs[stem][1])
    with pytest.raises(DataError, match=r"val/A: no such folder; looked for are A, B, label .*FOLDERS"):
        LEVIRCD(tmp_path, "val")


def test_a_tenth_of_train_is_val_where_there_is_none(tmp_path, capsys):
    for index in range(25):
        write_pair(tmp_path / "train", f"{index:02}", *random_pair(RNG, 8, 8))
    dataset._said.clear()
    parts = [
        {data.name(i) for i in range(len(data))} for data in (LEVIRCD(tmp_path, name) for name in ("train", "val"))
    ]
    assert len(parts[1]) == 3 and not parts[0] & parts[1] and len(parts[0] | parts[1]) == 25
    assert capsys.readouterr().out.count("3 of train's 25 pairs, chosen by their names, serve for validation") == 1
    again = LEVIRCD(tmp_path, "val")
    assert {again.name(i) for i in range(3)} == parts[1]
    (tmp_path / "val").mkdir()
    assert len(LEVIRCD(tmp_path, "train")) == 25


def test_composed_and_decomposed_names_are_one(tmp_path):
    write_pair(tmp_path / "val", "caf\u00e9", *random_pair(RNG, 8, 8))
    (tmp_path / "val" / "B" / "caf\u00e9.png").rename(tmp_path / "val" / "B" / "cafe\u0301.png")
    assert len(LEVIRCD(tmp_path, "val")) == 1


def test_home_is_a_tilde(tmp_path, monkeypatch):
    write_pair(tmp_path / "set" / "val", "x", *random_pair(RNG, 8, 8))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(LEVIRCD("~/set", "val", cache_dir="~/cache")) == 1 and (tmp_path / "cache").is_dir()


def test_workers_are_as_many_as_the_cores_that_may_be_used(tmp_path):
    write_pair(tmp_path / "val", "x", *random_pair(RNG, 8, 8))
    held = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(held)})
    try:
        assert dataset.usable_cores() == 1
        data = LEVIRCD(tmp_path, "val")
        assert dataset.make_loader(data, data.batches(1), None, on_gpu=True).num_workers == 1
    finally:
        os.sched_setaffinity(0, held)


def test_a_log_gets_whole_lines(monkeypatch):
    written = io.StringIO()
    monkeypatch.setattr(dataset.sys, "stderr", written)
    clock = iter(np.arange(0, 3000, 20.0))
    monkeypatch.setattr("tqdm.std.time", lambda: next(clock))
    with dataset.progress(total=60, desc="epoch 1", unit="pair") as bar:
        bar._time = lambda: next(clock)
        for _ in range(60):
            bar.update()
    lines = written.getvalue().splitlines()
    assert len(lines) >= 10 and all(line.startswith("epoch 1: ") and "pair" in line for line in lines)
    assert "\r" not in written.getvalue()


# Tiles and crops


@pytest.mark.parametrize(("size", "tiles"), [((64, 64), 16), ((50, 37), 12), ((16, 16), 1), ((7, 9), 1)])
def test_tiles_hold_each_pixel_once(tmp_path, size, tiles):
    write_pair(tmp_path / "val", "x", *located_pair(*size))
    data = LEVIRCD(tmp_path, "val", crop_size=16)
    pixels = torch.cat([data[index][0].flatten(1) for index in range(len(data))], 1)
    assert len(data) == tiles
    assert pixels.shape[1] == size[0] * size[1] == len(set(map(tuple, pixels.T.tolist())))


def test_an_epoch_is_as_many_crops_as_fit_side_by_side(tmp_path):
    write_pair(tmp_path / "train", "x", *random_pair(RNG, 64, 64))
    write_pair(tmp_path / "train", "y", *random_pair(RNG, 40, 50))
    (tmp_path / "val").mkdir()
    assert len(LEVIRCD(tmp_path, "train", crop_size=16, augment=True)) == 16 + 2 * 3


def test_crops_stay_together_and_take_every_turn(tmp_path):
    write_pair(tmp_path / "train", "x", *located_pair(40, 50))
    data = LEVIRCD(tmp_path, "train", crop_size=16, augment=True, swap_dates=0.5)
    turns, swaps, corners = set(), 0, set()
    for draw in range(400):
        image_a, image_b, label = data[draw % len(data)]
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
    """Of the 64 rows a crop's middle may be in, 16 hold an inner pixel, 9 one of the border; there are four of them."""
    write_pair(tmp_path / "train", "x", *located_pair(64, 64))
    data = LEVIRCD(tmp_path, "train", crop_size=16, augment=True)
    held = np.zeros((64, 64))
    for seed in range(200):
        for index in range(len(data)):
            y, x, _ = data[index, 1000 * seed + index][0].numpy().astype(int)
            assert abs(y - index // 4 * 16 - 8).min() <= 8 and abs(x - index % 4 * 16 - 8).min() <= 8
            held[y, x] += 1 / 200
    assert held[16:48, 16:48].mean() == pytest.approx(1, abs=0.05)
    assert held[[0, -1], 16:48].mean() == pytest.approx(9 / 16, abs=0.05)
    assert held[[0, 0, -1, -1], [0, -1, 0, -1]].mean() == pytest.approx((9 / 16) ** 2, abs=0.05)


def test_a_seed_gives_the_same_crop_again(tmp_path):
    write_pair(tmp_path / "train", "x", *random_pair(RNG, 64, 64))
    data = LEVIRCD(tmp_path, "train", crop_size=16, augment=True)
    first, again, other = data[3, 7], data[3, 7], data[3, 8]
    assert all(map(torch.equal, first, again)) and not all(map(torch.equal, first, other))


def test_batches_hold_one_size_and_every_item(tmp_path):
    write_pair(tmp_path / "val", "x", *random_pair(RNG, 40, 50))
    data = LEVIRCD(tmp_path, "val", crop_size=16)
    batches = data.batches(2 * 16 * 16)
    assert sorted(index for batch in batches for index in batch) == list(range(len(data)))
    assert all(len({data[index][2].shape for index in batch}) == 1 for batch in batches)
    sizes = [sum(data[index][2].numel() for index in batch) for batch in batches]
    assert max(sizes) == 2 * 16 * 16 and [len(batch) for batch in data.batches(1)] == [1] * len(data)


# The cache


def test_cache_gives_the_same_and_follows_the_files(tmp_path):
    write_pair(tmp_path / "val", "x", *random_pair(RNG, 32, 32))
    cache = tmp_path / "cache"
    plain, cached = LEVIRCD(tmp_path, "val", 16), LEVIRCD(tmp_path, "val", 16, cache_dir=cache)
    assert all(map(torch.equal, sum(zip(*plain, strict=True), ()), sum(zip(*cached, strict=True), ())))
    entries = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    LEVIRCD(tmp_path, "val", cache_dir=cache)
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == entries and len(entries) == 2

    pair = random_pair(RNG, 32, 32)
    write_pair(tmp_path / "val", "x", *pair)
    os.utime(tmp_path / "val" / "B" / "x.png", ns=(1, 1))
    assert np.array_equal(LEVIRCD(tmp_path, "val", cache_dir=cache)[0][1].permute(1, 2, 0), pair[1])
    assert len(list(cache.iterdir())) == 2 and not entries.keys() & set(cache.iterdir())


def test_only_what_changed_is_decoded_again(tmp_path):
    for stem in ("x", "y"):
        write_pair(tmp_path / "val", stem, *random_pair(RNG, 32, 32))
    cache = tmp_path / "cache"
    before = {path: path.stat().st_mtime_ns for path in LEVIRCD(tmp_path, "val", cache_dir=cache) and cache.iterdir()}
    write_pair(tmp_path / "val", "x", *random_pair(RNG, 32, 32))
    os.utime(tmp_path / "val" / "B" / "x.png", ns=(1, 1))
    assert len(LEVIRCD(tmp_path, "val", cache_dir=cache)) == 2
    kept = {path for path in cache.iterdir() if before.get(path) == path.stat().st_mtime_ns}
    assert len(kept) == 1 and np.load(kept.pop()).shape == (32, 32, 7)  # y, as it was


def test_what_was_checked_is_not_opened_again(tmp_path):
    write_pair(tmp_path / "val", "x", *random_pair(RNG, 32, 32))
    file = tmp_path / "val" / "A" / "x.png"
    first, stat = LEVIRCD(tmp_path, "val", cache_dir=tmp_path / "cache")[0], file.stat()
    file.write_bytes(bytes(stat.st_size))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(DataError, match=r"x\.png: can't be read"):
        LEVIRCD(tmp_path, "val")
    assert all(map(torch.equal, LEVIRCD(tmp_path, "val", cache_dir=tmp_path / "cache")[0], first))


def fill(root: Path, cache: Path) -> int:
    return sum(int(LEVIRCD(root, "val", cache_dir=cache)[index][0].sum()) for index in range(6))


def test_two_processes_fill_one_cache(tmp_path):
    pairs = [random_pair(RNG, 64, 64) for _ in range(6)]
    for index, pair in enumerate(pairs):
        write_pair(tmp_path / "val", f"{index}", *pair)
    with PROCESSES.Pool(2) as pool:
        sums = pool.starmap(fill, [(tmp_path, tmp_path / "cache")] * 2)
    assert sums == [sum(int(pair[0].sum()) for pair in pairs)] * 2
    assert len(list((tmp_path / "cache").iterdir())) == 7


# Bad input, beside what test_bad_input.py has


def test_an_image_smaller_than_the_crop_is_refused(tmp_path):
    write_pair(tmp_path / "train", "x", *random_pair(RNG, 32, 64))
    with pytest.raises(DataError, match=r"x\.png: 64 × 32 pixels are less than the crop of 48"):
        LEVIRCD(tmp_path, "train", crop_size=48, augment=True)


def test_whole_images_of_differing_sizes_make_no_batch(tmp_path):
    write_pair(tmp_path / "train", "x", *random_pair(RNG, 32, 32))
    write_pair(tmp_path / "train", "y", *random_pair(RNG, 32, 40))
    (tmp_path / "val").mkdir()
    with pytest.raises(DataError, match=r"y\.png: 40 × 32 pixels, but .*x\.png has 32 × 32: set a CROP_SIZE"):
        LEVIRCD(tmp_path, "train", augment=True)
    assert len(LEVIRCD(tmp_path, "train")) == 2


def test_a_cache_that_cannot_be_written(tmp_path):
    write_pair(tmp_path / "val", "x", *random_pair(RNG, 32, 32))
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"CACHE_DIR=.*file/cache: can't be filled"):
        LEVIRCD(tmp_path, "val", cache_dir=tmp_path / "file" / "cache")


def test_fingerprint_follows_names_and_sizes(tmp_path):
    write_pair(tmp_path / "val", "x", *random_pair(RNG, 32, 32))
    first = LEVIRCD(tmp_path, "val").fingerprint()
    assert LEVIRCD(tmp_path, "val").fingerprint() == first
    write_pair(tmp_path / "val", "y", *random_pair(RNG, 32, 32))
    assert LEVIRCD(tmp_path, "val").fingerprint() != first


# Colour jitter


@pytest.mark.parametrize("part", [0, 1, 2], ids=["brightness", "contrast", "saturation"])
def test_jitter_agrees_with_torchvision(part):
    image = torch.randint(0, 256, (1, 3, 24, 32), dtype=torch.uint8)
    adjust = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)[part]
    for seed in range(8):
        strengths = [0.0] * 4
        strengths[part] = 0.6
        torch.manual_seed(seed)
        ours = color_jitter(image, *strengths)
        torch.manual_seed(seed)
        factor = 1 + [torch.empty(1).uniform_(-s, s).item() for s in strengths][part]
        torch.testing.assert_close(ours, adjust(image.float() / 255, factor), atol=1e-5, rtol=0)


def test_jitter_is_drawn_for_each_image():
    images = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8).expand(6, 3, 8, 8)
    jittered = color_jitter(images, 0.3, 0.3, 0.3, 0.1)
    assert jittered.min() >= 0 and jittered.max() <= 1
    assert len({tuple(image.flatten().tolist()) for image in jittered}) == 6


def test_no_jitter_changes_nothing():
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    torch.testing.assert_close(color_jitter(images, 0, 0, 0, 0), images.float() / 255, atol=1e-6, rtol=0)


def test_parts_of_jitter_follow_one_another():
    """Colours that stay within 0..1, so that it makes no difference where they would be cut off."""
    image, strengths = torch.randint(80, 160, (1, 3, 24, 32), dtype=torch.uint8), [0.2, 0.3, 0.4, 0.1]
    torch.manual_seed(0)
    ours = color_jitter(image, *strengths)
    torch.manual_seed(0)
    draws = [torch.empty(1, 1, 1).uniform_(-strength, strength) for strength in strengths]
    expected = image.float() / 255
    adjustments = functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation
    for adjust, draw in zip(adjustments, draws, strict=False):
        expected = adjust(expected, 1 + draw.item())
    expected = (dataset._turn_hue(2 * torch.pi * draws[3]) @ expected.flatten(2)).view(image.shape)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def test_hue_turns_about_grey():
    colours = torch.rand(1, 3, 8) * 0.4 + 0.3
    third = dataset._turn_hue(torch.full((1, 1, 1), 2 * torch.pi / 3)) @ colours
    torch.testing.assert_close(third, colours.roll(1, 1))  # red becomes green, green blue, blue red
    grey = torch.rand(1, 1, 8).expand(1, 3, 8)
    torch.testing.assert_close(dataset._turn_hue(torch.ones(1, 1, 1)) @ grey, grey)


# Real pairs


def test_real_pairs(real):
    data = LEVIRCD(real, "val")
    assert [tuple(item[0].shape) for item in data] == [(3, 1024, 1024)] * 2
    changed = {data.name(index): data[index][2].float().mean().item() for index in range(len(data))}
    assert changed == pytest.approx({"val_1": 0.007, "test_13": 0.098}, abs=1e-3)
    assert len(LEVIRCD(real, "train", crop_size=256, augment=True)) == 112


# Objects


def matched_by_force(predicted: np.ndarray, label: np.ndarray) -> tuple[int, int, int]:
    """Matched, labelled and predicted objects, by flood fill and by comparing all with all."""

    def objects(mask: np.ndarray) -> list[tuple[int, frozenset]]:
        left, found = {(y, x): int(mask[y, x]) for y, x in np.argwhere(mask).tolist()}, []
        while left:
            start, kind = left.popitem()
            area, queue = {start}, [start]
            while queue:
                y, x = queue.pop()
                for near in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                    if left.get(near) == kind:
                        del left[near]
                        area.add(near)
                        queue.append(near)
            found.append((kind, frozenset(area)))
        return found

    ours, theirs = objects(predicted), objects(label)
    ious = sorted(
        ((len(a & b) / len(a | b), i, j) for i, (k, a) in enumerate(ours) for j, (c, b) in enumerate(theirs) if k == c),
        reverse=True,
    )
    taken: set[tuple[str, int]] = set()
    for iou, i, j in ious:
        if iou >= 0.5 and not {("ours", i), ("theirs", j)} & taken:
            taken |= {("ours", i), ("theirs", j)}
    return len(taken) // 2, len(theirs), len(ours)


def test_objects_match_as_by_brute_force():
    rng, matched = np.random.default_rng(0), 0
    for _ in range(100):
        shape = rng.integers(1, 14, 2)
        label = ((rng.random(shape) < 0.5) * rng.integers(1, 3, shape)).astype(np.uint8)
        predicted = np.where(rng.random(shape) < 0.15, rng.integers(0, 3, shape), label).astype(np.uint8)
        objects = Objects(predicted, label)
        got = int(objects.found.sum()), len(objects.found), len(objects.right)
        assert got == matched_by_force(predicted, label) and objects.right.sum() == objects.found.sum()
        matched += got[0]
    assert matched > 300


def test_objects_worked_by_hand():
    label, predicted = np.zeros((2, 6, 12), np.uint8)
    label[0:2, 0:4] = label[4:6, 0:4] = 1
    predicted[0:6, 0:4] = 1  # one covers two: 8 of 24 pixels are either's
    label[0:2, 8:12] = predicted[0:1, 8:12] = 1  # half of it
    objects = Objects(predicted, label)
    assert (objects.found.sum(), len(objects.found), len(objects.right)) == (1, 3, 2)
    label[0:2, 8:12] = IGNORED
    objects = Objects(predicted, label)
    assert (objects.found.sum(), len(objects.found), len(objects.right)) == (0, 2, 1)
    nothing = Objects(np.zeros((3, 3), np.uint8), np.zeros((3, 3), np.uint8))
    assert len(nothing.found) == len(nothing.right) == 0
