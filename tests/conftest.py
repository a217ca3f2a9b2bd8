"""Small data sets in LEVIR-CD's layout, the real pairs where LEVIR_CD_DIR names them, and processes that run main."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: faster on such small data, beside other processes

import multiprocessing
import runpy
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent


def write_pair(folder: Path, stem: str, image_a, image_b, label, suffix: str = ".png") -> None:
    """Write one pair of arrays as the three files of a split's folder."""
    for name, array in (("A", image_a), ("B", image_b), ("label", label)):
        file = folder / name / f"{stem}{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(file)


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
    return write_tiny(tmp_path / "tiny")


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
    """Runs go to the test's own folder and to that database."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri)


# Processes are forked from a server that has imported everything, and so start at once.
os.environ["PYTHONPATH"] = str(ROOT)
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["main", "mlflow.store.tracking.sqlalchemy_store"])


def start_main(**constants: object) -> multiprocessing.Process:
    """`python main.py` with these constants, in a process of its own."""
    return start("main.py", *(f"{name}={value}" for name, value in constants.items()))


def start(script: str, *arguments: object, **environment: str) -> multiprocessing.Process:
    """`python SCRIPT ARGUMENTS`, a script of the repository or elsewhere; its output is appended to output.txt here."""
    process = PROCESSES.Process(target=_run, args=([script, *map(str, arguments)], os.environ | environment))
    process.start()
    return process


def _run(command: list[str], environment: dict[str, str]) -> None:
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)  # whoever began the tests may ignore them, as nohup does
    multiprocessing.set_start_method("fork", force=True)  # for the workers of its loaders, as without this server
    os.environ.update(environment)
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(output, stream.fileno())
    sys.argv = command
    runpy.run_path(str(ROOT / command[0]), run_name="__main__")


def as_torchrun(processes: int) -> list[dict[str, str]]:
    """The environment of each of the processes that torchrun would start here."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])  # one that nothing else listens on
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


@pytest.fixture(scope="session")
def killed_runs(tmp_path_factory):
    """tests/kill_and_resume.py at work, with an MLflow database of its own: the process, its output."""
    output = tmp_path_factory.mktemp("killed") / "output.txt"
    command = [sys.executable, ROOT / "tests" / "kill_and_resume.py", "2"]
    with open(output, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
    yield process, output
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="session", autouse=True)
def start_what_takes_long(request):
    """It goes on beside the other tests, if one that will be run asks for it."""
    if any("killed_runs" in item.fixturenames for item in request.session.items):
        request.getfixturevalue("killed_runs")
