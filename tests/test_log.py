"""What a run logs: its table, TensorBoard's events and MLflow's run, whatever state MLflow is in."""

import signal
import socket
import sqlite3
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import Mock

import mlflow
import pytest
import sqlalchemy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import metrics
from metrics import ScoreLog

pytestmark = pytest.mark.usefixtures("elsewhere")
RECORD = {"constants": {"DATA_DIR": "tiny", "EPOCHS": 2}, "data": {"train": "abc"}, "demo": False, "git": "x"}
ROWS = [
    {"train_loss": 0.5, "val_iou": 0.25, "step": 4, "time": 1e9},
    {"train_loss": 0.25, "val_iou": 0.5, "step": 8, "time": 2e9},
]


def log_run(folder: str, run_id: str, rows: Sequence[dict] = ROWS, done: int = 0, **constants: object) -> None:
    """Log a run whose first epochs were logged before."""
    Path(folder).mkdir(exist_ok=True)
    record = RECORD | {"id": run_id, "constants": RECORD["constants"] | constants}
    with ScoreLog(Path(folder), record, rows[:done]) as log:
        for row in rows[done:]:
            log.epoch(row)
            log.send()
        log.final_scores("test", {"iou": 0.75})


def logged(run_id: str) -> mlflow.entities.Run:
    """MLflow's run of that id."""
    tag = f"tags.id = '{run_id}'"
    (run,) = mlflow.search_runs(search_all_experiments=True, filter_string=tag, output_format="list")
    return run


def history(run: mlflow.entities.Run, name: str) -> list[tuple[int, float]]:
    """What MLflow has of a score: step and value."""
    return [(point.step, point.value) for point in mlflow.MlflowClient().get_metric_history(run.info.run_id, name)]


def test_all_three_have_each_epoch_once():
    log_run("run", "once")
    log_run("run", "once", done=1, EPOCHS=3)  # resumed after the first epoch, with more epochs
    assert Path("run/metrics.csv").read_text().splitlines() == [
        "epoch,train_loss,val_iou,step,time", "1,0.5,0.25,4,1000000000", "2,0.25,0.5,8,2000000000",
    ]  # fmt: skip
    events = {part: EventAccumulator(f"run/{part}").Reload() for part in ("train", "val", "")}
    assert [event.value for event in events["train"].Scalars("loss")] == [0.5, 0.25]
    assert [event.step for event in events["val"].Scalars("iou")] == [1, 2]
    assert events[""].Scalars("test/iou")[-1].value == 0.75
    run = logged("once")
    assert history(run, "train/loss") == [(1, 0.5), (2, 0.25)] and history(run, "test/iou") == [(2, 0.75)]
    assert run.info.status == "FINISHED" and run.info.run_name == "run"
    assert run.data.params == {"DATA_DIR": "tiny", "EPOCHS": "2"} and run.data.tags["EPOCHS"] == "3"
    assert run.data.tags["data.train"] == "abc" and run.data.tags["mlflow.user"]
    assert {file.path for file in mlflow.MlflowClient().list_artifacts(run.info.run_id)} == {"metrics.csv"}


def test_how_a_run_ended():
    for error, status in ((ZeroDivisionError, "FAILED"), (KeyboardInterrupt, "KILLED")):
        Path(status).mkdir()
        with pytest.raises(error), ScoreLog(Path(status), RECORD | {"id": status}):
            raise error
        assert logged(status).info.status == status


def test_names_of_the_environment_a_deleted_experiment_and_a_run_that_is_begun(monkeypatch):
    client = mlflow.MlflowClient()
    experiment = client.create_experiment("mine")
    client.delete_experiment(experiment)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    monkeypatch.setenv("MLFLOW_RUN_NAME", "a name")
    log_run("run", "named")
    assert (logged("named").info.run_name, logged("named").info.experiment_id) == ("a name", experiment)
    run = client.create_run("0")
    monkeypatch.setenv("MLFLOW_RUN_ID", run.info.run_id)  # as `mlflow run`, Databricks and Azure ML begin one
    log_run("run", "begun")
    assert logged("begun").info.run_id == run.info.run_id


def test_a_run_of_the_user_stays_as_it_is():
    with mlflow.start_run() as users:
        log_run("run", "beside")
        assert mlflow.active_run().info.run_id == users.info.run_id != logged("beside").info.run_id
    assert mlflow.get_run(users.info.run_id).info.status == "FINISHED"


def test_a_dead_server_costs_a_line(monkeypatch, capsys, tracking_uri):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    log_run("run", "dead")
    assert capsys.readouterr().out.count("MLflow lacks a part of this run") == 2  # at once, and at the end
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri)
    log_run("run", "dead", done=2)
    assert history(logged("dead"), "train/loss") == [(1, 0.5), (2, 0.25)] and capsys.readouterr().out == ""


def test_a_stalled_server_holds_up_no_epoch(monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.create_server(("127.0.0.1", 0)) as stalled:  # it accepts, and never answers
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{stalled.getsockname()[1]}")
        Path("run").mkdir()
        with ScoreLog(Path("run"), RECORD | {"id": "stalled"}) as log:
            start = time.monotonic()
            for row in ROWS:
                log.epoch(row)
                log.send()
            assert time.monotonic() - start < 0.5
    assert "MLflow lacks a part of this run" in capsys.readouterr().out


def test_what_ctrl_c_meets_is_written_to_its_end():
    def interrupted(cursor: sqlite3.Cursor, statement: str, values: Sequence, _: object) -> bool:
        cursor.executemany(statement, values)
        if statement.startswith("INSERT INTO metrics"):
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        return True

    sqlalchemy.event.listen(sqlalchemy.Engine, "do_executemany", interrupted)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever began the tests may ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            log_run("run", "interrupted")
            time.sleep(10)
    finally:
        signal.signal(signal.SIGINT, handler)
        sqlalchemy.event.remove(sqlalchemy.Engine, "do_executemany", interrupted)
    log_run("run", "interrupted", done=2)
    assert history(logged("interrupted"), "train/loss") == [(1, 0.5), (2, 0.25)]


def test_the_database_is_made_whole_also_without_hard_links(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(f"sqlite:///{Path.cwd()}/mlflow.db")
    monkeypatch.setattr(metrics.os, "link", Mock(side_effect=OSError("Operation not permitted")))
    try:
        metrics.create_database()
        assert mlflow.search_experiments() and [file.name for file in Path().glob("mlflow.db*")] == ["mlflow.db"]
    finally:
        mlflow.set_tracking_uri(None)


def test_a_run_that_another_clock_began_is_seen_whole_in_tensorboard():
    log_run("run", "clock", ROWS[:1])
    for file in Path("run").rglob("events*"):
        file.rename(file.with_name(file.name.replace(file.name.split(".")[3], f"{int(time.time()) + 7200}")))
    log_run("run", "clock", done=1)
    assert [event.step for event in EventAccumulator("run/val").Reload().Scalars("iou")] == [1, 2]
