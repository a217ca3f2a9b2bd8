"""Whole runs of main on a few tiny pairs: scored, killed, resumed, shared by processes, met by faults."""

import ast
import csv
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import mlflow
import numpy as np
import pytest
import torch
from conftest import PROCESSES, ROOT, as_torchrun, random_pair, start, start_main, write_pair, write_tiny
from kill_and_resume import wrong_steps
from PIL import Image
from scipy.special import logit
from sklearn.metrics import average_precision_score, f1_score, jaccard_score, precision_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main
import model as network
from data.make_demo import make_demo
from dataset import LEVIRCD, DataError, RandomBatches, color_jitter, make_loader
from losses import CombinedIoULoss
from main import OptionError
from metrics import ChangeMetrics
from model import FusionUNet, ModelError

pytestmark = pytest.mark.usefixtures("elsewhere")
QUICK = {
    "BACKBONE": "resnet18", "WEIGHTS": None, "CROP_SIZE": 32, "BATCH_SIZE": 4, "EPOCHS": 2, "DEVICE": "cpu",
    "RUN_NAME": "run",
}  # fmt: skip


@pytest.fixture
def unscored(tiny: Path) -> Path:
    """Those pairs without a test split, whose scores and pictures would take a second."""
    shutil.rmtree(tiny / "test")
    return tiny


def logged_run(folder: str) -> mlflow.entities.Run:
    """MLflow's record of the run that logged into `runs/folder` of this test."""
    record = json.loads(Path("runs", folder, "constants.json").read_text())
    tag = f"tags.id = '{record['id']}'"
    (run,) = mlflow.search_runs(experiment_names=["LEVIRCD-FusionUNet"], filter_string=tag, output_format="list")
    return run


def test_a_whole_run(tiny, capsys):
    constants = QUICK | {"DATA_DIR": str(tiny), "EPOCHS": 4, "LEARNING_RATE": 2e-2, "WARMUP_EPOCHS": 0.0}
    scores = main.main(**constants)
    run = Path("runs/run")
    assert {path.name for path in run.iterdir() if "events" not in path.name} == {
        "best.pt", "last.pt", "constants.json", "metrics.csv", "curves.png", "predictions",
        "validation_predictions.png", "test_metrics.json", "per_image.csv", "precision_recall.png", "worst.png",
        "train", "val",
    }  # fmt: skip
    drawn = sorted(int(path.stem[-1]) for path in (run / "predictions").iterdir())
    assert drawn == [1, 2, 3, 4]  # every tenth of the epochs, at least every one
    assert Path("images/validation_predictions.png").exists()
    assert "epoch 4/4" in capsys.readouterr().out

    with open(run / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"] and list(rows[0])[:2] == ["epoch", "train_loss"]
    assert float(rows[3]["train_loss"]) < 0.8 * float(rows[0]["train_loss"])
    assert scores["val_iou"] == pytest.approx(max(float(row["val_iou"]) for row in rows), rel=1e-5)
    assert [int(row["step"]) for row in rows] == [4, 8, 12, 16] and all(float(row["seconds"]) > 0 for row in rows)
    assert float(rows[3]["learning_rate"]) < float(rows[0]["learning_rate"]) < float(rows[0]["peak_learning_rate"])
    assert json.loads((run / "test_metrics.json").read_text())["test_iou"] == scores["test_iou"]

    record = json.loads((run / "constants.json").read_text())
    assert record["constants"] == {name: getattr(main, name) for name in record["constants"]} | constants
    assert not record["demo"] and record["torch"] == torch.__version__

    train, val, whole = (EventAccumulator(str(run / part)).Reload() for part in ("train", "val", ""))
    assert all([event.step for event in split.Scalars("iou")] == [1, 2, 3, 4] for split in (train, val))
    assert val.Scalars("iou")[1].value == pytest.approx(float(rows[1]["val_iou"]), rel=1e-5)
    assert [event.step for event in val.Images("predictions")] == drawn
    assert [event.step for event in whole.Scalars("steps/loss")] == [4, 8, 12, 16]
    assert whole.Scalars("steps/loss")[0].value == pytest.approx(float(rows[0]["train_loss"]), rel=1e-5)
    assert whole.Scalars("test/iou")[0].value == pytest.approx(scores["test_iou"])
    assert {"constants/text_summary", "scores, test/text_summary"} <= set(whole.Tags()["tensors"])

    logged = logged_run("run")
    assert logged.info.status == "FINISHED"
    assert logged.data.params == {name: str(value) for name, value in record["constants"].items()}
    assert logged.data.tags["demo"] == "False" and logged.data.metrics["test/iou"] == scores["test_iou"]
    history = mlflow.MlflowClient().get_metric_history(logged.info.run_id, "val/iou")
    assert [point.step for point in history] == [1, 2, 3, 4]
    assert [point.value for point in history] == pytest.approx([float(row["val_iou"]) for row in rows], rel=1e-5)
    assert logged.data.metrics["val_best/iou"] == scores["val_iou"]

    # What is frozen is as it was, its statistics too.
    torch.manual_seed(main.SEED)
    untrained = FusionUNet(weights=None, backbone="resnet18").state_dict()
    best, last = (torch.load(run / name, weights_only=True)["model"] for name in ("best.pt", "last.pt"))
    frozen = [name for name in untrained if name.startswith("stages.")]
    assert all(torch.equal(best[name], untrained[name]) for name in frozen) and len(frozen) == 2 * 20
    assert last.keys() == best.keys() - set(frozen)  # last.pt needs no copy at each epoch

    # The saved model is the one that was scored, and it is scored the same again.
    again = main.main(EVALUATE=str(run), RUN_NAME="again", DEVICE="cpu", CACHE_DIR=None)  # of the run's data
    taken = json.loads(Path("runs/again/constants.json").read_text())["constants"]
    assert (taken["BACKBONE"], taken["CROP_SIZE"], taken["RUN_NAME"]) == ("resnet18", QUICK["CROP_SIZE"], "again")
    assert again == {name: value for name, value in scores.items() if name.startswith("test_")}
    assert logged_run("again").data.metrics["test/whole_iou"] == again["test_whole_iou"]


@pytest.mark.parametrize(("size", "tta"), [((300, 290), False), ((40, 70), True)])
def test_scores_of_a_split(size, tta, tmp_path):
    """Against scikit-learn, from masks that the loaded model predicts by itself."""
    for index in range(2):
        write_pair(tmp_path / "set" / "val", f"pair_{index}", *random_pair(np.random.default_rng(index), *size))
    torch.manual_seed(0)
    model = FusionUNet(weights=None, backbone="resnet18")
    torch.nn.init.normal_(model.head.weight, std=32)  # so that both thresholds lie amid its probabilities
    torch.nn.init.constant_(model.head.bias, 4)
    model.threshold = float(torch.sigmoid(torch.tensor(1.0)))
    torch.save(model.checkpoint(), "model.pt")
    scores = main.main(DATA_DIR="set", EVALUATE="model.pt", SPLIT="val", TTA=tta, **QUICK)
    loaded = FusionUNet.load("model.pt", "cpu")
    assert loaded.threshold == model.threshold == scores["val_threshold"]
    for prefix, crop_size in (("", 256), ("whole_", None)):
        items = LEVIRCD("set", "val", crop_size)
        truth = np.concatenate([label for *_, label in items], axis=None)
        probability = np.concatenate([loaded.predict(*images, tta=tta).numpy() for *images, _ in items], axis=None)
        for tuned, threshold in (("", 0.5), ("tuned_", model.threshold)):
            expected = {
                "precision": precision_score(truth, probability > threshold, zero_division=0),
                "dice": f1_score(truth, probability > threshold),
                "mean_iou": jaccard_score(truth, probability > threshold, average="macro"),
            }
            got = {name: scores[f"val_{prefix}{tuned}{name}"] for name in expected}
            assert got == pytest.approx(expected, abs=1e-5)
        if crop_size:
            steps = np.searchsorted(ChangeMetrics.LOGITS.numpy(), logit(probability))
            assert scores["val_average_precision"] == pytest.approx(average_precision_score(truth, steps), abs=1e-4)
    difference = abs(scores["val_tuned_iou"] - scores["val_whole_tuned_iou"])
    assert difference > 1e-4 if max(size) > 256 else difference == 0

    with open("runs/run/per_image.csv") as file:
        rows = list(csv.DictReader(file))
    assert {row["name"] for row in rows} == {"pair_0", "pair_1"}
    wrong = [int(row["wrong_pixels"]) for row in rows]
    assert wrong == sorted(wrong, reverse=True)
    for row, index in zip(rows, (int(row["name"][-1]) for row in rows), strict=True):
        *images, label = LEVIRCD("set", "val")[index]
        predicted = loaded.predict(*images, tta=tta).numpy() > 0.5
        assert int(row["labelled_pixels"]) == label.sum()
        assert int(row["wrong_pixels"]) == (label[0].numpy() != predicted).sum()
        assert int(row["predicted_pixels"]) == predicted.sum()
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
    assert record["constants"]["BATCH_SIZE"] == main.DEMO["BATCH_SIZE"]
    assert "USING THE DEMO" in capsys.readouterr().out
    assert logged_run("demo").data.tags["demo"] == "True"


def test_demo_of_three_classes(capsys):
    make_demo("data/demo_classes", splits={"train": 2, "val": 1, "test": 1}, num_classes=3)
    constants = {"NUM_CLASSES": 3, "BACKBONE": "resnet18", "DEVICE": "cpu"}
    scores = main.main(EPOCHS=1, RUN_NAME="classes", **constants)
    labels = [label for *_, label in LEVIRCD("data/demo_classes", "val", num_classes=3)]
    labelled = [kind for kind in (1, 2, 3) if any((label == kind).any() for label in labels)]
    assert scores["val_iou"] == pytest.approx(np.mean([scores[f"val_iou_{kind}"] for kind in labelled]))
    said = capsys.readouterr().out
    assert "DATA_DIR=data/demo_classes" in said and all(f"IoU {i}" in said for i in (1, 2, 3))
    assert main.main(EVALUATE="runs/classes/best.pt", **constants) == {
        name: value for name, value in scores.items() if name.startswith("test_")
    }
    with pytest.raises(OptionError, match="NUM_CLASSES=2: must be 1 or 3 for the demo"):
        main.main(NUM_CLASSES=2)


def test_failed_runs_are_told_so(tiny, monkeypatch):
    monkeypatch.setattr(main, "save_checkpoint", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main.main(DATA_DIR=str(tiny), **QUICK)
    assert logged_run("run").info.status == "FAILED"


def test_signals_end_it_without_a_traceback(unscored):
    codes = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
    constants = QUICK | {"EPOCHS": 1000, "DATA_DIR": unscored, "NUM_WORKERS": 1}
    runs = {number: start_main(**constants | {"RUN_NAME": number.name}) for number in codes}
    for number, run in runs.items():
        while run.is_alive() and not Path("runs", number.name, "last.pt").exists():
            time.sleep(0.1)
        os.killpg(run.pid, number)  # as Ctrl-C and job managers do: the workers get it too
        run.join()
        said = Path("output.txt").read_text()
        assert run.exitcode == codes[number] and "Traceback" not in said, said
        assert f"to continue this run: python main.py RESUME=runs/{number.name}" in said
        FusionUNet.load(f"runs/{number.name}/best.pt", "cpu")
        assert logged_run(number.name).info.status == "KILLED"


# Constants


def test_values_get_their_types_from_python_and_from_the_command_line():
    typed = "EPOCHS=3 LEARNING_RATE=1e-4 WEIGHTS=None RUN_NAME=12 AMP=False CROP_SIZE=None"
    overrides = main.from_command_line(typed.split()) | {"DATA_DIR": Path("x"), "WARMUP_EPOCHS": 2}
    config, record = main.configure(overrides)
    values = config.EPOCHS, config.LEARNING_RATE, config.WEIGHTS, config.RUN_NAME, config.AMP, config.CROP_SIZE
    assert values == (3, 1e-4, None, "12", False, None) and type(config.WARMUP_EPOCHS) is float
    assert (config.DATA_DIR, config.SEED, record) == ("x", main.SEED, {"demo": False})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"EPOCH": 3}, "EPOCH: no such constant; did you mean EPOCHS?"),
        ({"learning_rate": 1}, "learning_rate: no such constant; did you mean LEARNING_RATE?"),
        ({"ALPHA": 1.5}, "ALPHA=1.5: must be from 0 to 1"),
        ({"CROP_SIZE": "big"}, "CROP_SIZE=big: must be a whole number, 0 or more or None"),
        ({"CROP_SIZE": 0}, "CROP_SIZE=0: must be 1 or more"),
        ({"LEARNING_RATE": -1}, "LEARNING_RATE=-1.0: must be a number, 0 or more"),
        ({"LEARNING_RATE": "nan"}, "LEARNING_RATE=nan: must be a number, 0 or more"),
        ({"AMP": "yes"}, "AMP=yes: must be True or False"),
        ({"AMP": 1}, "AMP=1: must be True or False"),
        ({"DATA_DIR": None}, "DATA_DIR=None: must be text"),
        ({"FOLDERS": "A B"}, "FOLDERS=A B: must be three names without spaces"),
        ({"RUN_NAME": "a/b"}, "RUN_NAME=a/b: must be a name, not a path"),
        ({"SPLIT": "val"}, "SPLIT=val: must be test, except with EVALUATE"),
        ({"NUM_CLASSES": 255}, "NUM_CLASSES=255: must be at most 254"),
    ],
)
def test_what_is_wrong_is_said_with_what_is_right(given, said):
    with pytest.raises(OptionError, match=f"^{re.escape(said)}"):
        main.configure({"DATA_DIR": "x"} | given)


@pytest.fixture
def edited(tmp_path):
    """Runs a copy of the repository whose main.py has some lines replaced; what it prints, and its exit code."""
    shutil.copytree(
        ROOT, tmp_path / "user's copy", ignore=shutil.ignore_patterns(".*", "data", "runs", "images", "tests")
    )
    (tmp_path / "user's copy" / "data").mkdir()

    def run(*arguments: str, **lines: str) -> tuple[str, int]:
        file = tmp_path / "user's copy" / "main.py"
        text = (ROOT / "main.py").read_text()
        for name, line in lines.items():
            text, count = re.subn(rf"^{name}: .*$", line, text, flags=re.MULTILINE)
            assert count == 1
        file.write_text(text)
        environment = os.environ | {"PYTHONPATH": ""}
        command = [sys.executable, file, *arguments]
        done = subprocess.run(command, cwd=tmp_path / "user's copy", env=environment, capture_output=True, text=True)
        return done.stdout + done.stderr, done.returncode

    return run


def test_constants_edited_by_hand_without_data_or_its_programs(edited, unscored):
    """The copy has an empty data/, as if a disk were mounted there."""
    lines = {"EPOCHS": "EPOCHS = 1", "BACKBONE": 'BACKBONE = "resnet18"  # mine', "SEED": "SEED=3"}
    constants = [f"DATA_DIR={unscored}", "WEIGHTS=None", "CROP_SIZE=32", "BATCH_SIZE=4", "RUN_NAME=run"]
    said, code = edited(*constants, **lines)
    assert code == 0 and "epoch 1/1" in said, said
    record = json.loads((unscored.parent / "user's copy" / "runs" / "run" / "constants.json").read_text())["constants"]
    assert (record["EPOCHS"], record["BACKBONE"], record["SEED"]) == (1, "resnet18", 3)
    command = [sys.executable, "visualize.py", "runs/run/best.pt", unscored / "val" / "A", unscored / "val" / "B"]
    masks = subprocess.Popen(
        [*command, "--device", "cpu"], cwd=unscored.parent / "user's copy", stdout=subprocess.PIPE, text=True
    )
    said, code = edited()  # beside it
    assert "masks/pair_1.png: " in masks.communicate()[0] and masks.returncode == 0
    assert code == 1 and said.splitlines()[-1].startswith("error: data holds neither train nor make_demo.py")


def test_what_is_edited_wrongly_is_one_line(monkeypatch):
    for value, words in (("ten", "EPOCHS=ten: must be a whole number"), (0, "EPOCHS=0: must be 1 or more")):
        monkeypatch.setattr(main, "EPOCHS", value)
        with pytest.raises(OptionError, match=words):
            main.configure({"DATA_DIR": "x"})


def test_what_is_given_counts_for_the_demo_too():
    Path("data/demo").mkdir(parents=True)
    config, record = main.configure({"BATCH_SIZE": 16})
    assert record["demo"] and config.BATCH_SIZE == 16 and config.EPOCHS == main.DEMO["EPOCHS"]


def test_help_shows_every_constant(capsys):
    for word in ("-h", "--help", "help"):
        with pytest.raises(SystemExit) as done:
            main.from_command_line([word])
        said = capsys.readouterr().out
        assert not done.value.code and "# OPTIMISATION" in said
        assert all(re.search(rf"^{name}: .* = .*  # ", said, re.MULTILINE) for name in main.TYPES)


def test_a_file_that_breaks_in_a_worker_ends_in_one_line(tiny, monkeypatch):
    """While it trains, after it was checked."""

    def broken(self, pair):
        raise DataError("B/pair_0.png: can't be decoded")

    data = LEVIRCD(tiny, "val")
    monkeypatch.setattr(LEVIRCD, "_load", broken)
    with pytest.raises(DataError) as raised:
        next(iter(make_loader(data, data.batches(1), 1, on_gpu=False)))
    assert network.error_line(raised.value, memory="") == "B/pair_0.png: can't be decoded"


def test_learning_rate_rises_then_falls():
    factors = [main.warmup_cosine(step, 4, 12) for step in range(13)]
    assert factors[:5] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert factors[8] == pytest.approx(0.5) and factors[12] == 0
    assert main.warmup_cosine(0, 0, 10) == 1 and main.warmup_cosine(3, 0, 6) == pytest.approx(
        math.cos(math.pi / 4) ** 2
    )


# Data of other kinds


def test_a_mask_of_254_trains_validates_and_scores(tiny, capsys):
    """As an official mask of LEVIR-CD is, test_18: 35 pixels of 254 amid 0 and 255."""
    for split in ("train", "val", "test"):
        file = tiny / split / "label" / "pair_0.png"
        mask = np.array(Image.open(file))
        mask.flat[np.flatnonzero(mask)[:35]] = 254
        Image.fromarray(mask).save(file)
    scores = main.main(**QUICK | {"DATA_DIR": str(tiny), "EPOCHS": 1})
    said = capsys.readouterr().out
    assert scores.keys() >= {"val_iou", "test_iou"}
    for split, pairs in (("train", 4), ("val", 2), ("test", 2)):
        assert said.count(f"{split}: 1 of {pairs} masks hold other values than 0 and 255") == 1


def test_other_folders_no_val_and_a_test_without_masks(tiny, capsys):
    shutil.rmtree(tiny / "val")
    shutil.rmtree(tiny / "test" / "label")
    for split in ("train", "test"):
        for old, new in (("A", "time1"), ("B", "time2")):
            (tiny / split / old).rename(tiny / split / new)
    scores = main.main(**QUICK | {"DATA_DIR": str(tiny), "EPOCHS": 1, "FOLDERS": "time1 time2 label"})
    said = capsys.readouterr().out
    assert "1 of 4 pairs of train" in said and f"{tiny}/test: no masks in it, so there is nothing to score" in said
    assert "val_iou" in scores and "test_iou" not in scores


@pytest.mark.parametrize("place", ["data/A/x.png", "data/mine/before/x.TIF", "data/x.jpg"])
def test_no_demo_over_images_of_another_layout(place):
    Path(place).parent.mkdir(parents=True)
    Path(place).touch()
    with pytest.raises(OptionError, match=f"{place}: not in data/train/{{A,B,label}}; move it, or give DATA_DIR"):
        main.main()
    assert not Path("data/demo").exists()


def test_a_demo_beside_a_demo_and_a_cache():
    for name in ("data/demo/train/A/x.png", "data/demo_classes/val/B/x.png", "data/cache/x.npy", "data/README.md"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    assert not main.has_data("A B label")


def test_a_checkpoint_knows_the_data_it_was_trained_on(tiny, capsys):
    scores = main.main(**QUICK | {"DATA_DIR": str(tiny), "EPOCHS": 1, "CACHE_DIR": None})
    capsys.readouterr()
    again = main.main(EVALUATE="runs/run/best.pt", DEVICE="cpu")
    said = capsys.readouterr().out
    assert again == {name: value for name, value in scores.items() if name.startswith("test_")}
    assert f"{tiny}, runs/run/best.pt, test: 2 images; " in said and "DEMO" not in said
    shutil.rmtree(tiny)
    with pytest.raises(DataError, match=f"{tiny}/test/A: no such folder"):
        main.main(EVALUATE="runs/run/best.pt", DEVICE="cpu")


def test_without_change_the_epoch_is_picked_by_its_loss(unscored, capsys):
    for file in (unscored / "val" / "label").iterdir():
        Image.new("L", (64, 64)).save(file)
    main.main(**QUICK | {"DATA_DIR": str(unscored), "EPOCHS": 4, "LEARNING_RATE": 1e-4})
    assert "no mask of val holds any change, so the best epoch is picked by the loss" in capsys.readouterr().out
    with open("runs/run/metrics.csv") as file:
        losses = [float(row["val_loss"]) for row in csv.DictReader(file)]
    assert torch.load("runs/run/best.pt", weights_only=True)["epoch"] == 1 + int(np.argmin(losses)) > 1


def test_of_equal_ious_the_lower_loss_is_better():
    rows = [{"val_iou": 0.0, "val_loss": loss} for loss in (0.9, 0.7, 0.8)]
    assert main.best_epoch(rows, True) == 2
    assert main.best_epoch([*rows, {"val_iou": 0.1, "val_loss": 9.0}], True) == 4
    assert main.best_epoch([*rows, {"val_iou": 0.1, "val_loss": 9.0}], False) == 2


def test_statistics_are_right_after_few_steps(unscored):
    """Of the two steps that an epoch has here, running averages would hold a fifth."""
    main.main(**QUICK | {"DATA_DIR": str(unscored), "EPOCHS": 1, "BATCH_SIZE": 8, "AMP": False})
    model = FusionUNet.load("runs/run/best.pt", "cpu")
    seen = []
    model.fuse2.mix[0].register_forward_hook(lambda _, __, output: seen.append(output.mean((0, 2, 3))))
    with torch.no_grad():
        for seed in range(8):
            items = [LEVIRCD(unscored, "train", 32, augment=True)[index, seed] for index in range(16)]
            image_a, image_b, _ = map(torch.stack, zip(*items, strict=True))
            model(image_a, image_b)
    expected, norm = torch.stack(seen).mean(0), model.fuse2.mix[1]
    assert (norm.running_mean - expected).abs().max() < 0.5 * expected.abs().max()


def test_fine_tuning_starts_from_a_checkpoint(unscored):
    main.main(**QUICK | {"DATA_DIR": str(unscored), "EPOCHS": 1, "RUN_NAME": "first"})
    main.main(**QUICK | {"DATA_DIR": str(unscored), "EPOCHS": 1, "WEIGHTS": "runs/first/best.pt", "LEARNING_RATE": 0.0})
    first, second = (torch.load(f"runs/{name}/best.pt", weights_only=True)["model"] for name in ("first", "run"))
    trained = [name for name in first if name.endswith(("conv.weight", ".0.weight", "head.bias"))]
    assert trained and all(torch.equal(first[name], second[name]) for name in trained)
    others = {"BACKBONE": "resnet50", "FREEZE_BACKBONE": False, "WEIGHTS": "runs/first/best.pt", "RUN_NAME": "x"}
    said = "best.pt: trained with BACKBONE=resnet18, not resnet50; give that too"
    with pytest.raises(ModelError, match=said):
        main.main(**QUICK | {"DATA_DIR": str(unscored)} | others)


def test_no_git_is_no_fault(monkeypatch):
    monkeypatch.setenv("PATH", "")
    record = main.describe(SimpleNamespace(RESUME=None), {"demo": False}, torch.device("cpu"), {})
    assert record["git"] == "unknown"


def test_faults_of_the_machine_are_one_line(unscored):
    """RANK alone is no torchrun; the others end with what to do."""
    small = [f"DATA_DIR={unscored}", "BACKBONE=resnet18", "WEIGHTS=None", "CROP_SIZE=32", "EPOCHS=1", "CACHE_DIR=None"]
    cases = {
        ("BATCH_SIZE=1", "RUN_NAME=one"): (1, "error: BATCH_SIZE=1, CROP_SIZE=32: leave BatchNorm one value"),
        ("DEVICE=meta",): (1, "error: device meta: "),
        ("BATCH_SIZE=4", "RUN_NAME=alone"): (0, "  all runs        tensorboard --logdir runs"),
    }
    runs = [start("main.py", *small, "DEVICE=cpu", *arguments, RANK="0") for arguments in cases]
    for run, (code, words) in zip(runs, cases.values(), strict=True):
        run.join()
        said = Path("output.txt").read_text()
        assert run.exitcode == code and f"\n{words}" in f"\n{said}" and "Traceback" not in said, said


# Killed, resumed


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
    assert "epoch 1/" not in capsys.readouterr().out
    rows = Path("runs/run/metrics.csv").read_text()
    assert rows.startswith(first) and [row.split(",")[0] for row in rows.splitlines()] == ["epoch", "1", "2", "3"]
    assert wrong_steps("run") == []
    with pytest.raises(OptionError, match="EPOCHS=2: may be raised, but not lowered"):
        main.main(RESUME="runs/run", EPOCHS=2)
    for change in ({"LEARNING_RATE": 1.0}, {"SEED": 1}, {"EVALUATE": "runs/run/best.pt"}):
        with pytest.raises(main.OptionError, match=f"{next(iter(change))}=.*the run began with"):
            main.main(RESUME="runs/run", **change)


def test_other_data_are_not_gone_on_with(trained):
    for name in ("A", "B", "label"):
        Path("tiny", "train", name, "pair_0.png").unlink()
    with pytest.raises(DataError, match="tiny: not the files that runs/run was trained on"):
        main.main(RESUME="runs/run")


def test_a_damaged_checkpoint_is_one_line(trained):
    last = Path("runs/run/last.pt")
    last.write_bytes(last.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"last\.pt: not a checkpoint, or damaged"):
        main.main(RESUME="runs/run", EPOCHS=2)


def test_a_run_goes_on_without_its_best_checkpoint(trained, capsys):
    Path("runs/run/best.pt").unlink()
    main.main(RESUME="runs/run", EPOCHS=2)
    assert torch.load("runs/run/best.pt", weights_only=True)["epoch"] == 2


def test_another_backbone_is_not_gone_on_with(trained):
    record = Path("runs/run/constants.json")
    record.write_text(record.read_text().replace('"SEED": 0', '"SEED": 1'))
    with pytest.raises(ModelError, match=r"last\.pt: trained over another backbone than WEIGHTS=None gives now"):
        main.main(RESUME="runs/run", EPOCHS=2)


def test_a_run_of_an_older_program_is_told_so(trained):
    last = torch.load("runs/run/last.pt", weights_only=True)
    del last["steps_taken"]
    torch.save(last, "runs/run/last.pt")
    with pytest.raises(ModelError, match=r"last\.pt: made by an older version"):
        main.main(RESUME="runs/run", EPOCHS=2)
    record = Path("runs/run/constants.json")
    record.write_text(record.read_text().replace('"ALPHA"', '"HUE"'))
    with pytest.raises(OptionError, match=r"runs/run: made by another version of this program, .* ALPHA, HUE"):
        main.main(RESUME="runs/run", EPOCHS=2)


def test_the_notebook_of_the_readme_runs_as_it_stands(trained, capsys):
    cells = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    namespace: dict[str, object] = {}
    (cell,) = [cell for cell in cells if "plot_predictions" in cell]  # test_model.py runs the other
    exec(cell, namespace)
    assert Path("results.png").exists()
    assert namespace["probability"].shape == namespace["label"].shape[1:]


# Several processes


def work(folder: Path, environment: dict[str, str]) -> None:
    """What is to be the same in all processes and in one alone, saved to a file."""
    os.environ.update(environment)
    torch.manual_seed(0)
    with main.process_group():
        rank, world, found = main.rank(), main.world(), {}
        # The loss and its gradient, of a batch that each has a share of.
        logits, label = torch.randn(6, 1, 4, 5, dtype=torch.float64), torch.rand(6, 1, 4, 5) < 0.3
        share = logits[rank::world].clone().requires_grad_()
        loss = CombinedIoULoss(0.3)(share, label[rank::world])
        loss.backward()
        found |= {"loss": loss.detach(), "gradient": share.grad / world}  # DistributedDataParallel averages
        # The batches of an epoch and their colours, put together again.
        sampler, images = RandomBatches(20, 6), torch.randint(0, 256, (6, 3, 2, 2), dtype=torch.uint8)
        torch.manual_seed(1)
        found["draws"] = [sorted(batch) for batch in sampler]
        found["colours"] = color_jitter(images[rank::world], 0.5, 0.5, 0.5)
        # The counts of a validation pass, whose batches can't be shared evenly.
        model = FusionUNet.load(folder / "model.pt", "cpu")
        data = LEVIRCD(folder, "val", 32)
        loader = make_loader(data, data.batches(2 * 32 * 32)[rank::world], 0, on_gpu=False)
        config = SimpleNamespace(BATCH_SIZE=6, NUM_CLASSES=1, AMP=False, COMPILE=False)
        scores, counts = main.evaluate(model, loader, CombinedIoULoss(0.5), config, "val")
        # A step's gradients, but for BatchNorm, which keeps its statistics.
        for module in model.train().modules():
            module.train(not isinstance(module, torch.nn.BatchNorm2d) and module.training)
        pair = torch.rand(2, 6, 3, 32, 32, generator=torch.Generator().manual_seed(2))[:, rank::world]
        label = (torch.rand(6, 1, 32, 32, generator=torch.Generator().manual_seed(3)) < 0.3)[rank::world]
        parallel = main.distribute(model, config)  # must live until the gradients have come
        CombinedIoULoss(0.5)(parallel(*pair), label).backward()
        found["step"] = torch.cat([value.grad.flatten() for value in model.parameters() if value.requires_grad])
        found |= {"counts": torch.from_numpy(counts._passed()), "score": torch.tensor(scores["loss"])}
    torch.save(found, folder / f"{environment.get('RANK', 'alone')}.pt")


def test_processes_without_a_full_batch_to_share(tiny):
    group = [start("main.py", f"DATA_DIR={tiny}", "WEIGHTS=None", "CROP_SIZE=64", "BATCH_SIZE=6", **environment)
             for environment in as_torchrun(2)]  # fmt: skip
    for process in group:
        process.join()
    said = Path("output.txt").read_text()
    assert "error: 4 crops don't fill a batch of 6 to share: lower BATCH_SIZE" in said and "Traceback" not in said


def test_processes_share_batches_and_sum_what_they_count(tmp_path):
    rng = np.random.default_rng(0)
    for index in range(3):
        write_pair(tmp_path / "val", f"{index}", *random_pair(rng, 40, 70))
    torch.save(FusionUNet(weights=None, backbone="resnet18").checkpoint(), tmp_path / "model.pt")
    group = [PROCESSES.Process(target=work, args=(tmp_path, environment)) for environment in (*as_torchrun(3), {})]
    for process in group:
        process.start()
    for process in group:
        process.join()
        assert process.exitcode == 0
    *shares, alone = (torch.load(tmp_path / f"{name}.pt") for name in (0, 1, 2, "alone"))
    for name, expected in alone.items():
        if name == "draws":
            steps = zip(*(share[name] for share in shares), strict=True)
            together = [sorted(draw for batch in step for draw in batch) for step in steps]
            assert together == expected
        elif name in ("colours", "gradient"):
            assert all(torch.allclose(share[name], expected[rank::3], atol=1e-7) for rank, share in enumerate(shares))
        elif name == "counts":
            assert all(torch.equal(share[name], expected) for share in shares)
            assert expected[0].sum() == 3 * 40 * 70
        else:
            for share in shares:
                torch.testing.assert_close(share[name], expected, rtol=1e-4 if name == "step" else 1e-6, atol=1e-7)


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
            header, *lines = csv.reader(file)
            rows[folder] = [[float(value) for value in line] for line in lines]
        assert wrong_steps("run") == []
    assert rows["one"][0] == rows["two"][0] and len(rows["two"]) == 2
    # On CPUs BatchNorm sees the two pairs of each process, not all four: the losses are 0.02 apart.
    losses = {name: row[1][header.index("train_loss")] for name, row in rows.items()}
    assert losses["one"] == pytest.approx(losses["two"], abs=0.1)


@pytest.mark.parametrize(("processes", "images"), [(2, 14), (3, 1)])
def test_processes_end_with_the_scores_that_one_gives(processes, images, unscored):
    """A batch holds one image of the test split here, so there are more of them than processes, or fewer."""
    rng = np.random.default_rng(0)
    for index in range(images):
        write_pair(unscored / "test", f"{index}", *random_pair(rng, 64, 64))
    constants = QUICK | {"DATA_DIR": unscored, "BATCH_SIZE": 6, "EPOCHS": 1, "LEARNING_RATE": 2e-2}
    arguments = [f"{name}={value}" for name, value in constants.items()]
    group = [start("main.py", *arguments, **environment) for environment in as_torchrun(processes)]
    for process in group:
        process.join()
    assert [process.exitcode for process in group] == [0] * processes, Path("output.txt").read_text()
    together = json.loads(Path("runs/run/test_metrics.json").read_text())
    assert together == main.main(EVALUATE="runs/run", RUN_NAME="alone", DEVICE="cpu")


def test_an_evaluation_batch_holds_no_more_pixels_than_a_process_trains_on(tmp_path, monkeypatch):
    write_pair(tmp_path / "val", "x", *random_pair(np.random.default_rng(0), 512, 600))
    data, device = LEVIRCD(tmp_path, "val", main.PROTOCOL_CROP), torch.device("cpu")
    config = SimpleNamespace(BATCH_SIZE=64, CROP_SIZE=128, NUM_WORKERS=0)
    for world, items in ((1, 4), (8, 2), (64, 1)):
        monkeypatch.setattr(main, "world", lambda world=world: world)
        assert max(map(len, main.load(data, config, device).batch_sampler)) <= items


def test_a_process_that_sees_one_gpu_takes_it(monkeypatch):
    """As under Slurm, where the third process of a machine sees its own GPU as the first."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    asked = []
    monkeypatch.setattr(torch, "zeros", lambda *_, device: asked.append(device) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        network.pick_device()
    assert asked == [torch.device("cuda:0")]


# GPUs without bfloat16


@pytest.fixture
def half(monkeypatch) -> None:
    """Autocast to float16, as on a T4 or V100."""
    for module in (main, network):
        monkeypatch.setattr(module, "fast_dtype", lambda device: torch.float16)


def overflow(monkeypatch, steps: Sequence[int]) -> None:
    """Make the gradients of these training steps, from 1 on, overflow in float16."""
    forward, step = CombinedIoULoss.forward, itertools.count(1)

    def overflowing(self, logits, label):
        loss = forward(self, logits, label)
        return loss * 1e30 if logits.requires_grad and next(step) in steps else loss

    monkeypatch.setattr(CombinedIoULoss, "forward", overflowing)


def trained_loss(name: str) -> float:
    """The training loss of the last epoch of `runs/name`."""
    return torch.load(f"runs/{name}/last.pt", weights_only=True)["rows"][-1]["train_loss"]


def test_float16_trains_as_float32_does_and_goes_on_to_the_bit(unscored, half):
    constants = QUICK | {"DATA_DIR": str(unscored), "EPOCHS": 2}
    main.main(**constants)
    main.main(**constants | {"AMP": False, "RUN_NAME": "float32"})
    assert trained_loss("run") == pytest.approx(trained_loss("float32"), abs=0.02)
    shutil.copytree("runs/run", "runs/longer")
    main.main(RESUME="runs/run", EPOCHS=3)
    main.main(RESUME="runs/longer", EPOCHS=3)
    ours, theirs = (torch.load(f"runs/{name}/last.pt", weights_only=True) for name in ("run", "longer"))
    assert ours["scaler"] == theirs["scaler"] and ours["scaler"]["scale"] == 2**16
    assert all(torch.equal(value, theirs["model"][name]) for name, value in ours["model"].items())


def test_a_step_that_overflows_in_float16_is_skipped(unscored, half, monkeypatch):
    overflow(monkeypatch, steps=[2])
    main.main(**QUICK | {"DATA_DIR": str(unscored), "EPOCHS": 2})
    last = torch.load("runs/run/last.pt", weights_only=True)
    assert last["steps_taken"] == 2 * 4 - 1 and last["scaler"]["scale"] == 2**15
    assert all(state["step"] == 7 for state in last["optimizers"][1]["state"].values())
    assert last["rows"][0]["train_loss"] < 2


def test_float16_that_goes_on_overflowing_ends_the_run(unscored, half, monkeypatch):
    overflow(monkeypatch, steps=range(3, 100))
    with pytest.raises(FloatingPointError, match=r"epoch 2, steps 1 to 4: the loss isn't finite; .* set AMP=False"):
        main.main(**QUICK | {"DATA_DIR": str(unscored), "EPOCHS": 2})
    assert len(torch.load("runs/run/last.pt", weights_only=True)["rows"]) == 1


# Faults


def test_a_full_disk_leaves_the_good_checkpoint(trained):
    """Played by a limit on the size of a file."""
    last = Path("runs/run/last.pt")
    held = last.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(held) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match=r"runs/run/(last|best)\.pt: can't be written \(File too large\)"):
            main.main(RESUME="runs/run", EPOCHS=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert last.read_bytes() == held and not list(Path("runs/run").glob("*.part"))


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_loss_that_is_not_finite_is_not_saved(trained, monkeypatch, split):
    held = {name: Path("runs/run", name).read_bytes() for name in ("last.pt", "best.pt", "metrics.csv")}
    forward = CombinedIoULoss.forward

    def broken(self, logits, label):
        return forward(self, logits, label) * (torch.nan if logits.requires_grad == (split == "train") else 1)

    monkeypatch.setattr(CombinedIoULoss, "forward", broken)
    where = "epoch 2, steps 1 to 4" if split == "train" else "validation"
    with pytest.raises(
        FloatingPointError, match=f"{where}: the loss isn't finite; lower LEARNING_RATE or set AMP=False"
    ):
        main.main(RESUME="runs/run", EPOCHS=2)
    assert all(Path("runs/run", name).read_bytes() == content for name, content in held.items())


def test_the_loss_is_read_every_few_steps_alone(tiny, monkeypatch):
    """And nothing else waits for the device in between: the calls that would are counted."""
    reads = []
    item = torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda self: reads.append(self.shape) or item(self))
    monkeypatch.setattr(main, "READ_EVERY", 3)
    before = []
    monkeypatch.setattr(main, "seed_epoch", lambda *_: before.append(len(reads)))
    monkeypatch.setattr(main, "refresh_batchnorm", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main.main(**QUICK | {"DATA_DIR": str(tiny), "BATCH_SIZE": 2, "EPOCHS": 1})
    of_the_loss = [shape for shape in reads[before[0] :] if shape == ()]
    assert len(of_the_loss) <= 3 + 8, len(of_the_loss)  # of 8 steps, and at most one for each batch


# Killed at random moments


def test_killed_runs_and_two_at_once_end_in_the_same_bits(killed_runs):
    process, output = killed_runs
    assert process.wait() == 0, output.read_text()


# The house


def test_imports_run_one_way():
    allowed = {
        "main": {"visualize", "model", "dataset", "losses", "metrics", "data.make_demo"},
        "visualize": {"model", "metrics", "dataset"}, "model": {"dataset"}, "dataset": set(), "losses": {"dataset"},
        "metrics": {"dataset"},
    }  # fmt: skip
    for name, others in allowed.items():
        nodes = list(ast.walk(ast.parse((ROOT / f"{name}.py").read_text())))
        names = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        names |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        assert {each for each in names if each.partition(".")[0] in {*allowed, "data", "tests"}} <= others
        assert "filelock" not in names


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
