"""Whole runs of main, end to end, on a few tiny pairs."""

import csv
import json
import math
import os
import signal
import time
import typing
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from conftest import random_pair, start_main, write_pair
from scipy.special import logit
from sklearn.metrics import average_precision_score, f1_score, jaccard_score, precision_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main
from data.make_demo import make_demo
from data.options import OptionError
from dataset import LEVIRCD
from metrics import ThresholdMetrics
from model import FusionUNet

MAIN = Path(main.__file__)
pytestmark = pytest.mark.usefixtures("elsewhere")
QUICK = {
    "BACKBONE": "resnet18", "WEIGHTS": None, "CROP_SIZE": 32, "BATCH_SIZE": 4, "EPOCHS": 2, "DEVICE": "cpu",
    "RUN_NAME": "run",
}  # fmt: skip


def logged_run(folder: str) -> mlflow.entities.Run:
    """MLflow's record of the run that logged into `runs/folder` of this test."""
    record = json.loads(Path("runs", folder, "constants.json").read_text())
    (run,) = mlflow.search_runs(
        experiment_names=["LEVIRCD-FusionUNet"],
        filter_string=f"attributes.run_name = '{folder}' and params.DATA_DIR = '{record['constants']['DATA_DIR']}'",
        output_format="list",
    )
    return run


def parse(arguments: list[str]) -> dict[str, object]:
    return main.parse(arguments, typing.get_type_hints(main))


def test_a_whole_run(tiny, capsys):
    constants = QUICK | {"DATA_DIR": str(tiny), "EPOCHS": 4, "LEARNING_RATE": 2e-2, "WARMUP_EPOCHS": 0.0}
    scores = main.main(**constants)
    run = Path("runs/run")
    assert {path.name for path in run.iterdir() if "events" not in path.name} == {
        "best.pt", "last.pt", "constants.json", "metrics.csv", "curves.png", "predictions",
        "validation_predictions.png", "test_metrics.json", "per_image.csv", "precision_recall.png", "worst.png",
        "best.png", ".lock",
    }  # fmt: skip
    assert {path.name for path in (run / "predictions").iterdir()} == {f"epoch_00{epoch}.png" for epoch in (1, 2, 3, 4)}
    assert Path("images/validation_predictions.png").exists()
    assert "epoch 4/4" in capsys.readouterr().out

    with open(run / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"] and list(rows[0])[:2] == ["epoch", "train_loss"]
    assert float(rows[3]["train_loss"]) < 0.8 * float(rows[0]["train_loss"])
    assert scores["val_iou"] == max(float(row["val_iou"]) for row in rows)
    assert json.loads((run / "test_metrics.json").read_text())["test_iou"] == scores["test_iou"]

    record = json.loads((run / "constants.json").read_text())
    assert record["constants"] == {name: getattr(main, name) for name in record["constants"]} | constants
    assert not record["demo"] and record["versions"]["torch"] == torch.__version__

    events = EventAccumulator(str(run)).Reload()
    assert [event.step for event in events.Scalars("val/iou")] == [1, 2, 3, 4]
    assert events.Scalars("val/iou")[1].value == pytest.approx(float(rows[1]["val_iou"]))
    assert [event.step for event in events.Images("predictions")] == [1, 2, 3, 4]

    logged = logged_run("run")
    assert logged.info.status == "FINISHED"
    assert logged.data.params == {name: str(value) for name, value in record["constants"].items()}
    assert logged.data.tags["demo"] == "False" and logged.data.metrics["test_iou"] == scores["test_iou"]
    history = mlflow.MlflowClient().get_metric_history(logged.info.run_id, "val_iou")
    assert [(point.step, point.value) for point in history] == [
        (i, float(rows[i - 1]["val_iou"])) for i in (1, 2, 3, 4)
    ]
    artifacts = {file.path for file in mlflow.MlflowClient().list_artifacts(logged.info.run_id)}
    assert artifacts == {path.name for path in run.iterdir() if "events" not in path.name} - {"last.pt", ".lock"}

    # What is frozen is as it was, its statistics too.
    torch.manual_seed(main.SEED)
    untrained = FusionUNet(weights=None, backbone="resnet18").state_dict()
    trained = torch.load(run / "last.pt", weights_only=True)["model"]
    frozen = [name for name in untrained if name.startswith("stages.")]
    assert all(torch.equal(trained[name], untrained[name]) for name in frozen) and len(frozen) == 2 * 20

    # The saved model is the one that was scored, and it is scored the same again.
    again = main.main(EVALUATE=str(run / "best.pt"), **constants | {"RUN_NAME": "again"})
    assert again == {name: value for name, value in scores.items() if name.startswith("test_")}
    assert logged_run("again").data.metrics["test_whole_iou"] == again["test_whole_iou"]


def test_scores_of_a_split(tmp_path):
    """Against scikit-learn, from masks that the loaded model predicts by itself."""
    for index in range(2):  # two crops of 256 wide and high, so that crops and whole images differ
        write_pair(tmp_path / "set" / "val", f"pair_{index}", *random_pair(np.random.default_rng(index), 300, 290))
    torch.manual_seed(0)
    model = FusionUNet(weights=None, backbone="resnet18")
    torch.nn.init.normal_(model.head.weight, std=32)  # so that both thresholds lie amid its probabilities
    model.threshold = float(torch.sigmoid(torch.tensor(1.0)))
    torch.save(model.checkpoint(), "model.pt")
    scores = main.main(DATA_DIR="set", EVALUATE="model.pt", SPLIT="val", **QUICK)
    loaded = FusionUNet.load("model.pt", "cpu")
    assert loaded.threshold == model.threshold == scores["val_threshold"]
    for prefix, crop_size in (("", 256), ("whole_", None)):
        items = LEVIRCD("set", "val", crop_size)
        truth = np.concatenate([label for *_, label in items], axis=None)
        chance = np.concatenate([loaded.predict(*images).numpy() for *images, _ in items], axis=None)
        for tuned, threshold in (("", 0.5), ("tuned_", model.threshold)):
            expected = {
                "precision": precision_score(truth, chance > threshold, zero_division=0),
                "dice": f1_score(truth, chance > threshold),
                "mean_iou": jaccard_score(truth, chance > threshold, average="macro"),
            }
            got = {name: scores[f"val_{prefix}{tuned}{name}"] for name in expected}
            assert got == pytest.approx(expected, abs=1e-5)
        if crop_size:
            steps = np.searchsorted(ThresholdMetrics.LOGITS.numpy(), logit(chance))
            assert scores["val_average_precision"] == pytest.approx(average_precision_score(truth, steps), abs=1e-4)
    assert abs(scores["val_tuned_iou"] - scores["val_whole_tuned_iou"]) > 1e-4

    with open("runs/run/per_image.csv") as file:
        rows = list(csv.DictReader(file))
    assert {row["name"] for row in rows} == {"pair_0", "pair_1"}
    assert [float(row["iou"]) for row in rows] == sorted(float(row["iou"]) for row in rows)
    assert json.loads(Path("runs/run/val_metrics.json").read_text()) == scores


def test_a_checkpoint_is_scored_where_there_is_nothing_to_train_on(tiny):
    Path("data").mkdir()
    (tiny / "test").rename("data/test")
    torch.save(FusionUNet(weights=None, backbone="resnet18").checkpoint(), "model.pt")
    scores = main.main(EVALUATE="model.pt", DEVICE="cpu", CACHE_DIR=None)
    assert scores.keys() >= {"test_iou", "test_whole_iou"}
    assert not Path("data/demo").exists()


def test_demo_where_there_is_no_data(capsys):
    make_demo("data/demo", splits={"train": 2, "val": 1, "test": 1})
    main.main(EPOCHS=1, BACKBONE="resnet18", DEVICE="cpu", RUN_NAME="demo")
    record = json.loads(Path("runs/demo/constants.json").read_text())
    assert record["demo"] and record["constants"]["DATA_DIR"] == "data/demo"
    assert record["constants"]["EPOCHS"] == 1  # the user's, not the demo's
    assert record["constants"]["CROP_SIZE"] == main.DEMO["CROP_SIZE"]
    assert "USING THE DEMO" in capsys.readouterr().out
    assert logged_run("demo").data.tags["demo"] == "True"


def test_no_demo_for_a_split_that_the_data_lack():
    Path("data/train").mkdir(parents=True)
    config, began = main.configure({"EVALUATE": "best.pt"})
    assert (config.DATA_DIR, began) == ("data", {"demo": False})


def test_demo_of_three_classes(tiny, capsys):
    make_demo("data/demo_classes", splits={"train": 2, "val": 1, "test": 1}, num_classes=3)
    constants = {"NUM_CLASSES": 3, "BACKBONE": "resnet18", "DEVICE": "cpu"}
    scores = main.main(EPOCHS=1, RUN_NAME="classes", **constants)
    labels = [label for *_, label in LEVIRCD("data/demo_classes", "val", num_classes=3)]
    labelled = [kind for kind in (1, 2, 3) if any((label == kind).any() for label in labels)]
    assert scores["val_iou"] == pytest.approx(np.mean([scores[f"val_iou_{kind}"] for kind in labelled]))
    said = capsys.readouterr().out
    assert "DATA_DIR=data/demo_classes" in said and all(f"iou_{i}" in said for i in (1, 2, 3))
    assert main.main(EVALUATE="runs/classes/best.pt", **constants) == {
        name: value for name, value in scores.items() if name.startswith("test_")
    }
    with pytest.raises(OptionError, match=r"NUM_CLASSES=1: give 3, as .*classes/best\.pt has"):
        main.main(EVALUATE="runs/classes/best.pt", DATA_DIR=str(tiny), DEVICE="cpu")


def test_classes_that_the_demo_lacks():
    with pytest.raises(OptionError, match="NUM_CLASSES=2: there is no data in data, and the demo has 1 class or 3"):
        main.main(NUM_CLASSES=2)


def test_failed_runs_are_told_so(tiny, monkeypatch):
    monkeypatch.setattr(main, "save", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main.main(DATA_DIR=str(tiny), **QUICK)
    assert logged_run("run").info.status == "FAILED"


def test_signals_end_it_without_a_traceback(tiny):
    codes = {signal.SIGINT: 130, signal.SIGTERM: 143}
    constants = QUICK | {"EPOCHS": 1000, "DATA_DIR": tiny, "NUM_WORKERS": 1}
    runs = {number: start_main(**constants | {"RUN_NAME": number.name}) for number in codes}
    for number, run in runs.items():
        while run.is_alive() and not Path("runs", number.name, "last.pt").exists():
            time.sleep(0.1)
        os.killpg(run.pid, number)  # as Ctrl-C and job managers do: the workers get it too
        run.join()
        said = Path("output.txt").read_text()
        assert run.exitcode == codes[number] and "Traceback" not in said
        assert f"the run can go on: python main.py RESUME=runs/{number.name}" in said
        FusionUNet.load(f"runs/{number.name}/best.pt", "cpu")
        assert logged_run(number.name).info.status == "KILLED"


# Constants


def test_command_line_values_get_their_types():
    assert parse("EPOCHS=3 LEARNING_RATE=1e-4 WEIGHTS=None RUN_NAME=12 AMP=False".split()) == {
        "EPOCHS": 3, "LEARNING_RATE": 1e-4, "WEIGHTS": None, "RUN_NAME": "12", "AMP": False,
    }  # fmt: skip
    config, began = main.configure({"DATA_DIR": "x", "WARMUP_EPOCHS": 2, "EPOCHS": 7})
    assert (config.WARMUP_EPOCHS, config.EPOCHS, config.SEED, began) == (2.0, 7, main.SEED, {"demo": False})


def test_a_file_that_breaks_in_a_worker_ends_in_one_line(tiny):
    file = tiny / "train" / "B" / "pair_0.png"
    file.write_bytes(file.read_bytes()[:3000])
    run = start_main(**QUICK | {"DATA_DIR": tiny, "CACHE_DIR": None, "NUM_WORKERS": 1})
    run.join()
    said = Path("output.txt").read_text()
    assert run.exitcode == 1 and "Traceback" not in said
    assert said.splitlines()[-1].startswith(f"error: {file}: ")


def test_learning_rate_rises_then_falls():
    factors = [main.warmup_cosine(step, 4, 12) for step in range(13)]
    assert factors[:5] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert factors[8] == pytest.approx(0.5) and factors[12] == 0
    assert main.warmup_cosine(0, 0, 10) == 1 and main.warmup_cosine(3, 0, 6) == pytest.approx(
        math.cos(math.pi / 4) ** 2
    )


# Real pairs


def test_real_pairs_run(real, tmp_path):
    for split in ("train", "val"):  # two crops of the test split: quick, and no score is asked for
        for file in [path for name in ("A", "B", "label") for path in sorted((real / "test" / name).iterdir())[:2]]:
            link = tmp_path / "real" / split / file.parent.name / file.name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)
    scores = main.main(
        DATA_DIR=str(tmp_path / "real"), **QUICK | {"BACKBONE": "resnet50", "CROP_SIZE": 256, "EPOCHS": 1}
    )
    assert 0 <= scores["val_iou"] <= 1 and scores["val_loss"] < 2
