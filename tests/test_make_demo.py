"""The drawn demo: repeatable, and not to be solved without comparing shapes between the dates."""

import subprocess
import sys
from unittest.mock import Mock

import numpy as np
import pytest
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import jaccard_score

from data import make_demo
from data.make_demo import GONE, NEW, NEW_ROAD, STAYS


def test_same_seed_same_files(tmp_path):
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_demo.make_demo(tmp_path / folder, seed, {"train": 2, "val": 1})
    contents = [{file.relative_to(tmp_path / folder): file.read_bytes() for file in (tmp_path / folder).rglob("*.png")}
                for folder in "abc"]  # fmt: skip
    assert contents[0] == contents[1] and contents[0].keys() == contents[2].keys()
    assert len({*contents[0].values(), *contents[2].values()}) == 2 * 9  # no two files are the same


def test_differences_of_colour_do_not_solve_it():
    # The best IoU, on other pairs, of a classifier of how the three colours of a single pixel change.
    pairs = [make_demo.draw_pair(np.random.default_rng(seed)) for seed in range(40)]
    difference = np.stack([after.astype(float) - before for before, after, _ in pairs]).reshape(2, -1, 3)
    changed = np.stack([mask for *_, mask in pairs]).reshape(2, -1)
    assert set(np.unique(changed)) == {0, 255} and 0.03 < (changed > 0).mean() < 0.15
    some = np.random.default_rng(0).choice(len(changed[0]), 40_000, replace=False)
    classifier = HistGradientBoostingClassifier(max_iter=50).fit(difference[0, some], changed[0, some] > 0)
    probability, truth = classifier.predict_proba(difference[1, some])[:, 1], changed[1, some] > 0
    assert 0.2 < max(jaccard_score(truth, probability > threshold) for threshold in np.arange(0.05, 1, 0.05)) < 0.5


def test_one_date_does_not_solve_it():
    # The IoU of a detector that finds every house of one date, but can't know whether it is there at the other.
    area = np.zeros(3)
    for seed in range(200):
        for house in make_demo._place_houses(np.random.default_rng(seed), []):
            area[house.change] += house.half.prod()
    assert area[NEW] / area.sum() < 0.5 and area[GONE] / area.sum() < 0.5


def test_three_classes_of_change():
    pairs = [make_demo.draw_pair(np.random.default_rng(seed), 3) for seed in range(20)]
    masks = np.stack([mask for *_, mask in pairs])
    assert set(np.unique(masks)) == {STAYS, NEW, GONE, NEW_ROAD}
    # Grass is browner, with more red than blue, than what is built on it.
    before, after = (np.stack([pair[date] for pair in pairs]).astype(float) for date in (0, 1))
    browner = (after - before)[..., 0] - (after - before)[..., 2]
    means = [browner[masks == change].mean() for change in (NEW, GONE, NEW_ROAD)]
    assert means[0] < -8 and means[1] > 8 and means[2] < -8


def test_an_existing_folder_is_left_as_it_is_and_an_interrupted_run_leaves_none(tmp_path, monkeypatch):
    command = [sys.executable, make_demo.__file__, str(tmp_path)]
    stderr = subprocess.run(command, cwd=tmp_path, env={}, capture_output=True, text=True).stderr
    assert stderr == f"error: {tmp_path} exists already; delete it to draw it again\n"
    (tmp_path / "mine").touch()
    make_demo.make_demo(tmp_path, splits={"val": 1})
    monkeypatch.setattr(make_demo, "draw_pair", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        make_demo.make_demo(tmp_path / "demo")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
