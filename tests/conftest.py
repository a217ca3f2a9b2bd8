"""Small data sets in LEVIR-CD's layout, the real pairs where LEVIR_CD_DIR names them, and processes that run main."""

import multiprocessing
import os
import runpy
import sys
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent


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


def write_tiny(folder: Path) -> Path:
    """Splits of 4, 2 and 2 pairs of 64 × 64."""
    rng = np.random.default_rng(0)
    for split, pairs in (("train", 4), ("val", 2), ("test", 2)):
        for index in range(pairs):
            write_pair(folder / split, f"pair_{index}", *random_pair(rng, 64, 64))
    return folder


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Those splits, in a folder of the test's own."""
    return write_tiny(tmp_path / "tiny")


def pytest_sessionstart() -> None:
    """Let that process import while the tests do."""
    forkserver.ensure_running()


@pytest.fixture(scope="session")
def real() -> Path:
    """The folder of real LEVIR-CD pairs; tests that ask for it are skipped without."""
    if "LEVIR_CD_DIR" not in os.environ:
        pytest.skip("LEVIR_CD_DIR names no real pairs")
    return Path(os.environ["LEVIR_CD_DIR"])


@pytest.fixture(scope="session")
def tracking_uri(tmp_path_factory) -> str:
    """One MLflow database for all tests: making one takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch, tracking_uri):
    """Runs write below the working folder, and into one MLflow database."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri)


# They are forked from a process that has imported everything, and so start at once.
os.environ["PYTHONPATH"] = str(ROOT)
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["main", "mlflow.store.tracking.sqlalchemy_store"])


def start_main(**constants: object) -> multiprocessing.Process:
    """`python main.py` with these constants, in a process of its own."""
    return start("main.py", *(f"{name}={value}" for name, value in constants.items()))


def start(script: str, *arguments: object) -> multiprocessing.Process:
    """`python SCRIPT ARGUMENTS`, started in the working folder, its output appended to output.txt."""
    process = PROCESSES.Process(target=_run, args=(script, *map(str, arguments)), kwargs=dict(os.environ))
    process.start()
    return process


def _run(*command: str, **environment: str) -> None:
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # for the loaders' workers, as in a process of its own
    os.environ.update(environment)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
    sys.argv = list(command)
    runpy.run_path(f"{ROOT}/{command[0]}", run_name="__main__")
