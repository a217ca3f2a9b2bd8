"""Small data sets in LEVIR-CD's layout, and the real pairs where LEVIR_CD_DIR names them."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def write_pair(folder: Path, stem: str, image_a, image_b, label, suffix: str = ".png") -> None:
    """Write one pair of arrays as the three files of `folder`, a split."""
    for name, array in (("A", image_a), ("B", image_b), ("label", label)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(folder / name / f"{stem}{suffix}")


def random_pair(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Noise whose change is a bright square in B, so that a model can learn it."""
    image_a, image_b = rng.integers(0, 120, (2, height, width, 3), dtype=np.uint8)
    label = np.zeros((height, width), np.uint8)
    y, x = rng.integers(0, height // 2), rng.integers(0, width // 2)
    label[y : y + height // 2, x : x + width // 2] = 255
    image_b[label > 0] += 130
    return image_a, image_b, label


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Splits of 4, 2 and 2 pairs of 64 × 64."""
    rng = np.random.default_rng(0)
    for split, pairs in (("train", 4), ("val", 2), ("test", 2)):
        for index in range(pairs):
            write_pair(tmp_path / "tiny" / split, f"pair_{index}", *random_pair(rng, 64, 64))
    return tmp_path / "tiny"


@pytest.fixture(scope="session")
def real() -> Path:
    """The folder of real LEVIR-CD pairs; tests that ask for it are skipped without."""
    if "LEVIR_CD_DIR" not in os.environ:
        pytest.skip("LEVIR_CD_DIR names no real pairs")
    return Path(os.environ["LEVIR_CD_DIR"])
