"""data/runs.py and what main does with it: runs that are killed, resumed, or meet a full disk or a lost server."""

import csv
import json
import os
import resource
import shutil
import signal
import uuid
from pathlib import Path

import pytest
import torch
from conftest import as_torchrun, start, write_tiny
from kill_and_resume import wrong_steps

import main
from data.files import written_whole
from data.images import DataError
from data.runs import RunLog
from dataset import LEVIRCD
from metrics import ChangeMetrics
from model import FusionUNet, ModelError

pytestmark = pytest.mark.usefixtures("elsewhere")
QUICK = {
    "BACKBONE": "resnet18", "WEIGHTS": None, "CROP_SIZE": 32, "BATCH_SIZE": 4, "EPOCHS": 2, "DEVICE": "cpu",
    "RUN_NAME": "run",
}  # fmt: skip


@pytest.fixture(scope="module")
def one_epoch(tmp_path_factory, tracking_uri) -> Path:
    """A folder with a run of one epoch, runs/run, on the pairs in tiny."""
    folder = tmp_path_factory.mktemp("trained")
    write_tiny(folder / "tiny")
    shutil.rmtree(folder / "tiny" / "test")  # no scores are asked for
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", tracking_uri)
        main.main(**QUICK | {"DATA_DIR": "tiny", "EPOCHS": 1, "AMP": False})
    return folder


@pytest.fixture
def trained(one_epoch) -> None:
    """A copy of that folder's content here."""
    copy_run(one_epoch, Path())


def copy_run(one_epoch: Path, folder: Path) -> None:
    """Copy it so that MLflow takes it for a run of its own."""
    shutil.copytree(one_epoch, folder, dirs_exist_ok=True)
    record = folder / "runs" / "run" / "constants.json"
    record.write_text(record.read_text().replace(json.loads(record.read_text())["id"], uuid.uuid4().hex))


def test_a_run_goes_on_with_more_epochs(trained, capsys):
    """As one that had them from the start, but for the learning rate, whose fall is stretched."""
    first = Path("runs/run/metrics.csv").read_text()
    main.main(RESUME="runs/run", EPOCHS=3, NUM_WORKERS=0)
    assert "epoch 1/" not in capsys.readouterr().out.partition("runs/run:")[2]
    rows = Path("runs/run/metrics.csv").read_text()
    assert rows.startswith(first) and [row.split(",")[0] for row in rows.splitlines()] == ["epoch", "1", "2", "3"]
    assert wrong_steps("run") == []
    for change in ({"EPOCHS": 2}, {"LEARNING_RATE": 1.0}, {"SEED": 1}, {"EVALUATE": "runs/run/best.pt"}):
        with pytest.raises(main.OptionError, match=f"{next(iter(change))}=.*the run began with"):
            main.main(RESUME="runs/run", **change)


def test_other_data_are_not_gone_on_with(trained):
    for name in ("A", "B", "label"):
        Path("tiny", "train", name, "pair_0.png").unlink()
    with pytest.raises(DataError, match="tiny: not the files that runs/run began with"):
        main.main(RESUME="runs/run")


def test_a_damaged_checkpoint_is_told_with_what_is_left(trained):
    last = Path("runs/run/last.pt")
    held = bytearray(last.read_bytes())
    held[len(held) // 2] ^= 1  # a bit of some weight, which torch itself would take
    last.write_bytes(held)
    with pytest.raises(
        ModelError,
        match=r"last\.pt: .*damaged.*without it RESUME begins .*, and .*best\.pt, of epoch 1, is whole",
    ):
        main.main(RESUME="runs/run")
    with pytest.raises(ModelError, match="damaged"):
        FusionUNet.load(last, "cpu")


def test_one_process_at_a_time_is_at_a_run(trained):
    with RunLog(Path("runs/run"), json.loads(Path("runs/run/constants.json").read_text()), [{"x": 1.0}]):
        with pytest.raises(OSError, match="runs/run: another process is at this run"):
            main.main(RESUME="runs/run", EPOCHS=2)


# Faults


def test_two_processes_go_on_as_one(one_epoch, tmp_path, monkeypatch):
    for folder in ("two", "one"):
        copy_run(one_epoch, tmp_path / folder)
    monkeypatch.chdir("two")
    group = [start("main.py", "RESUME=runs/run", "EPOCHS=2", **environment) for environment in as_torchrun(2)]
    monkeypatch.chdir("../one")
    main.main(RESUME="runs/run", EPOCHS=2)
    for process in group:
        process.join()
    said = (tmp_path / "two" / "output.txt").read_text()
    assert [process.exitcode for process in group] == [0, 0] and said.count("epoch 2/2") == 1, said
    rows = {}
    for folder in ("two", "one"):
        monkeypatch.chdir(tmp_path / folder)
        with open("runs/run/metrics.csv") as file:
            rows[folder] = [[float(value) for value in row.values()] for row in csv.DictReader(file)]
        assert wrong_steps("run") == []
    assert rows["one"][0] == rows["two"][0] and rows["one"][1] == pytest.approx(rows["two"][1], abs=1e-4)
    assert len(rows["two"]) == 2


def test_a_full_disk_leaves_the_good_checkpoint(trained):
    """Played by a limit on the size of a file, which best.pt keeps and last.pt, with the optimizer in it, doesn't."""
    last, best = Path("runs/run/last.pt"), Path("runs/run/best.pt")
    held = last.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((best.stat().st_size + last.stat().st_size) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match=r"runs/run/last\.pt: can't be written \(File too large\)"):
            main.main(RESUME="runs/run", EPOCHS=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert last.read_bytes() == held and not list(Path("runs/run").glob("*.part"))


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "x"
    file.write_text("old")
    with pytest.raises(ZeroDivisionError), written_whole(file) as part:
        part.write("new")
        part.write(str(1 / 0))
    assert file.read_text() == "old" and os.listdir(tmp_path) == ["x"]


def test_a_loss_that_is_not_finite_names_its_batch(tiny):
    config, _ = main.configure(QUICK | {"DATA_DIR": str(tiny)})
    loader = main.make_loader(LEVIRCD(tiny, "train", 32, augment=True), 4, 0, on_gpu=False)
    model = FusionUNet(weights=None, backbone="resnet18")
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    with torch.no_grad():
        model.head.bias.fill_(torch.nan)
    torch.manual_seed(7)
    with pytest.raises(FloatingPointError, match="epoch 9, step 1: the loss is nan; the batch: ") as error:
        main.run_pass(model, loader, config, ChangeMetrics(), [optimizer], [scheduler], "epoch 9")
    torch.manual_seed(7)
    batch = next(iter(main.make_loader(loader.dataset, 4, 0, False).batch_sampler))
    stems = {loader.dataset.name(index).split()[0] for index, _ in batch}
    assert {Path(file).stem for file in str(error.value).partition("batch: ")[2].split(", ")} == stems
    with pytest.raises(FloatingPointError, match="validation, step 1: the loss is nan"):
        main.run_pass(model, loader, config, ChangeMetrics(), name="validation")


def test_a_signal_lets_the_step_end(tiny, monkeypatch):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(main, "interrupt", main.SimpleNamespace(signal=0, in_step=True))
    try:
        main.take_signal(signal.SIGTERM, None)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL  # the second one ends it at once
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), handlers, strict=True):
            signal.signal(number, handler)
    config, _ = main.configure(QUICK | {"DATA_DIR": str(tiny)})
    loader, metrics = main.make_loader(LEVIRCD(tiny, "val", 32), 1, 0, on_gpu=False), ChangeMetrics()
    with pytest.raises(SystemExit) as end:
        main.run_pass(FusionUNet(weights=None, backbone="resnet18"), loader, config, metrics)
    assert end.value.code == 143 and metrics._counts.sum() == 32 * 32


# MLflow


def test_a_server_that_comes_late_stalls_and_dies(server, tiny, monkeypatch, capsys):
    def come_back() -> None:
        server.signal(signal.SIGCONT)
        server.wait()

    after_epoch = {1: come_back, 2: lambda: server.signal(signal.SIGSTOP), 3: lambda: server.signal(signal.SIGKILL)}
    save = main.save

    def save_and_disturb(checkpoint: dict, path: Path) -> None:
        save(checkpoint, path)
        if path.name == "last.pt":
            after_epoch.get(checkpoint["epoch"], lambda: None)()

    monkeypatch.setattr(main, "save", save_and_disturb)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    server.signal(signal.SIGSTOP)
    shutil.rmtree(tiny / "test")  # no scores are asked for
    main.main(**QUICK | {"DATA_DIR": str(tiny), "EPOCHS": 4})
    said = capsys.readouterr().out
    assert [said.count(f"MLflow {what}") for what in ("doesn't answer", "is back", "lacks a part")] == [2, 1, 1]

    # Its database is read by itself now, as the next server would.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{server.folder}/server.db")
    assert wrong_steps("run") == ["MLflow: steps [1]", "MLflow: RUNNING"]
    main.main(RESUME="runs/run")
    assert "MLflow" not in capsys.readouterr().out and wrong_steps("run") == []
    files = {str(file.relative_to(server.folder)) for file in (server.folder / "artifacts").rglob("*")}
    assert {"best.pt", "metrics.csv", "predictions"} <= {Path(file).name for file in files}


def test_killed_runs_and_two_at_once_end_in_the_same_bits(killed_runs):
    process, output = killed_runs
    assert process.wait() == 0, output.read_text()
