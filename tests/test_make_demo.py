"""The drawn demo: repeatable, and not to be solved without learning."""

import subprocess
import sys

import numpy as np
import pytest

from data import make_demo
from dataset import LEVIRCD


def test_same_seed_same_files(tmp_path):
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_demo.make_demo(tmp_path / folder, seed=seed, splits={"train": 2, "val": 1})
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.png"))
    assert len(files) == 9
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)
    assert all((tmp_path / "a" / file).read_bytes() != (tmp_path / "c" / file).read_bytes() for file in files)
    first, second, val = (LEVIRCD(tmp_path / "a", split)[i][0] for split, i in (("train", 0), ("train", 1), ("val", 0)))
    assert not (first == second).all() and not (first == val).all()


def best_iou_of_a_threshold(pairs: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> float:
    """IoU of thresholding the mean absolute difference, at the threshold that suits these very pairs best."""
    difference = np.stack([np.abs(a.astype(float) - b).mean(-1) for a, b, _ in pairs])
    changed = np.stack([label > 0 for *_, label in pairs])
    scores = []
    for threshold in range(1, 200):
        guess = difference > threshold
        scores.append((guess & changed).sum() / (guess | changed).sum())
    return max(scores)


def test_a_threshold_does_not_solve_it():
    pairs = [make_demo.draw_pair(np.random.default_rng(seed)) for seed in range(40)]
    assert 0.03 < np.mean([label > 0 for *_, label in pairs]) < 0.15
    assert all(set(np.unique(label)) <= {0, 255} for *_, label in pairs)
    assert best_iou_of_a_threshold(pairs) < 0.35


def test_three_classes_of_change():
    pairs = [make_demo.draw_pair(np.random.default_rng(seed), 3) for seed in range(40)]
    shares = np.mean([[(label == kind).mean() for kind in range(4)] for *_, label in pairs], 0)
    assert shares.sum() == pytest.approx(1) and (shares[1:] > 0.005).all()
    for kind in (1, 2, 3):  # where it stands, at the date when it does, there is less of the ground's brown
        brown = [[image[..., 0][label == kind].sum(dtype=float) - image[..., 2][label == kind].sum(dtype=float)
                  for image in images] for *images, label in pairs]  # fmt: skip
        before, after = np.sum(brown, 0) / sum((label == kind).sum() for *_, label in pairs)
        assert (before - after if kind != 2 else after - before) > 8


def test_as_a_program_it_leaves_what_is_there(tmp_path):
    command = [sys.executable, make_demo.__file__, str(tmp_path)]
    said = subprocess.run(command, cwd=tmp_path, env={}, capture_output=True, text=True).stderr
    assert said == f"error: {tmp_path} is there already; delete it to draw it anew\n"


def test_nor_the_real_pairs(real):
    pairs = [tuple(t.permute(1, 2, 0).numpy() for t in item) for item in LEVIRCD(real, "val")]
    assert best_iou_of_a_threshold([(a, b, label[..., 0]) for a, b, label in pairs]) < 0.35


def test_a_run_that_is_stopped_leaves_no_half_demo(tmp_path, monkeypatch):
    monkeypatch.setattr(make_demo, "draw_pair", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        make_demo.make_demo(tmp_path / "demo")
    assert not (tmp_path / "demo").exists()
