"""Whole runs of main on a few tiny pairs: scored, killed, resumed, shared by processes, met by faults."""

import csv
import itertools
import json
import os
import re
import resource
import shutil
import signal
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
from scipy import ndimage
from scipy.special import logit
from sklearn.metrics import average_precision_score, f1_score, jaccard_score, precision_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main
import model as network
from data.make_demo import make_demo
from dataset import LEVIRCD, DataError
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


def table(folder: str) -> list[dict[str, float]]:
    """The metrics.csv of `runs/folder`."""
    with open(f"runs/{folder}/metrics.csv") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


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
    assert Path("images/validation_predictions.png").exists() and "epoch 4/4" in capsys.readouterr().out

    rows = table("run")
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4] and list(rows[0])[:2] == ["epoch", "train_loss"]
    assert rows[3]["train_loss"] < 0.8 * rows[0]["train_loss"]
    assert scores["val_iou"] == pytest.approx(max(row["val_iou"] for row in rows), rel=1e-5)
    assert [row["step"] for row in rows] == [4, 8, 12, 16] and all(row["seconds"] > 0 for row in rows)
    assert rows[3]["learning_rate"] < rows[0]["learning_rate"]
    assert json.loads((run / "test_metrics.json").read_text())["test_iou"] == scores["test_iou"]
    record = json.loads((run / "constants.json").read_text())
    assert record["constants"] == {name: getattr(main, name) for name in record["constants"]} | constants
    assert not record["demo"] and record["torch"] == torch.__version__

    val, whole = (EventAccumulator(str(run / part)).Reload() for part in ("val", ""))
    assert [event.value for event in val.Scalars("iou")] == pytest.approx([row["val_iou"] for row in rows], rel=1e-5)
    assert [event.step for event in val.Images("predictions")] == drawn
    assert [event.step for event in whole.Scalars("steps/loss")] == [4, 8, 12, 16]
    assert whole.Scalars("steps/loss")[0].value == pytest.approx(rows[0]["train_loss"], rel=1e-5)
    logged = logged_run("run")
    assert logged.info.status == "FINISHED" and logged.data.tags["demo"] == "False"
    assert logged.data.params == {name: str(value) for name, value in record["constants"].items()}
    assert logged.data.metrics["test/iou"] == scores["test_iou"]
    assert logged.data.metrics["val_best/iou"] == scores["val_iou"]

    # The saved model is the one that was scored, and it is scored the same again, on the data that it knows.
    again = main.main(EVALUATE=str(run), RUN_NAME="again", DEVICE="cpu", CACHE_DIR=None)
    taken = json.loads(Path("runs/again/constants.json").read_text())["constants"]
    assert (taken["BACKBONE"], taken["CROP_SIZE"], taken["RUN_NAME"]) == ("resnet18", QUICK["CROP_SIZE"], "again")
    assert again == {name: value for name, value in scores.items() if name.startswith("test_")}
    assert logged_run("again").data.metrics["test/whole_iou"] == again["test_whole_iou"]
    assert f"{tiny}, {run}, test: 2 images; " in capsys.readouterr().out
    shutil.rmtree(tiny)
    with pytest.raises(DataError, match=f"{tiny}/test/A: no such folder"):
        main.main(EVALUATE="runs/run/best.pt", DEVICE="cpu")


@pytest.mark.parametrize(("size", "tta"), [((300, 290), False), ((40, 70), True)])
def test_scores_of_a_split(size, tta, tmp_path):
    """Against scikit-learn, from masks that the loaded model predicts by itself; there is nothing to train on."""
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
        for kind, mask in (("labelled", label[0].numpy()), ("predicted", predicted)):
            assert int(row[f"{kind}_pixels"]) == mask.sum()
            assert int(row[f"{kind}_objects"]) == ndimage.label(mask)[1]
        assert int(row["wrong_pixels"]) == (label[0].numpy() != predicted).sum()
    assert json.loads(Path("runs/run/val_metrics.json").read_text()) == scores


def test_demo_where_there_is_no_data(capsys):
    make_demo("data/demo_classes", splits={"train": 2, "val": 1, "test": 1}, num_classes=3)
    constants = {"NUM_CLASSES": 3, "BACKBONE": "resnet18", "DEVICE": "cpu"}
    scores = main.main(EPOCHS=1, RUN_NAME="demo", **constants)
    labels = [label for *_, label in LEVIRCD("data/demo_classes", "val", num_classes=3)]
    labelled = [kind for kind in (1, 2, 3) if any((label == kind).any() for label in labels)]
    assert scores["val_iou"] == pytest.approx(np.mean([scores[f"val_iou_{kind}"] for kind in labelled]))
    said = capsys.readouterr().out
    assert "USING THE DEMO with DATA_DIR=data/demo_classes" in said and all(f"IoU {i}" in said for i in (1, 2, 3))
    record = json.loads(Path("runs/demo/constants.json").read_text())
    assert record["demo"] and record["constants"]["EPOCHS"] == 1  # the user's, not the demo's
    assert record["constants"]["BATCH_SIZE"] == main.DEMO["BATCH_SIZE"]
    again = main.main(EVALUATE="runs/demo/best.pt", RUN_NAME="again", **constants)
    assert again == {name: value for name, value in scores.items() if name.startswith("test_")}
    assert all(logged_run(name).data.tags["demo"] == "True" for name in ("demo", "again"))
    with pytest.raises(OptionError, match="NUM_CLASSES=2: must be 1 or 3 for the demo"):
        main.main(NUM_CLASSES=2)


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
        ({"CROP_SIZE": "big"}, "CROP_SIZE=big: must be a whole number, 0 or more or None"),
        ({"EPOCHS": 0}, "EPOCHS=0: must be 1 or more"),
        ({"AMP": 1}, "AMP=1: must be True or False"),
        ({"FOLDERS": "A B"}, "FOLDERS=A B: must be three names"),
        ({"SPLIT": "val"}, "SPLIT=val: must be test, except with EVALUATE"),
        ({"NUM_CLASSES": 255}, "NUM_CLASSES=255: must be at most 254"),
    ],
)
def test_what_is_wrong_is_said_with_what_is_right(given, said, monkeypatch):
    with pytest.raises(OptionError, match=f"^{re.escape(said)}"):
        main.configure({"DATA_DIR": "x"} | given)
    ((name, value),) = given.items()
    if name in main.TYPES:  # edited in the file
        monkeypatch.setattr(main, name, value)
        with pytest.raises(OptionError, match=f"^{re.escape(said)}"):
            main.configure({"DATA_DIR": "x"})


def test_constants_edited_by_hand_in_a_process_that_has_no_programs_beside_it(unscored):
    """Without a PATH there is no git; RANK alone is no torchrun."""
    text = (ROOT / "main.py").read_text()
    edits = {"EPOCHS": "EPOCHS = 1", "BACKBONE": 'BACKBONE = "resnet18"  # mine', "SEED": "SEED=3\nMINE = 1"}
    for name, line in edits.items():
        text, count = re.subn(rf"^{name}: .*$", line, text, flags=re.MULTILINE)
        assert count == 1
    Path("edited.py").write_text(text)
    constants = QUICK | {"DATA_DIR": unscored}
    arguments = [f"{name}={value}" for name, value in constants.items() if name not in ("EPOCHS", "BACKBONE")]
    run = start(Path("edited.py").resolve(), *arguments, RANK="1", PATH="")
    run.join()
    said = Path("output.txt").read_text()
    assert run.exitcode == 0 and "epoch 1/1" in said and "tensorboard --logdir runs" in said, said
    assert "MINE: nothing in main.py reads config.MINE" in said
    record = json.loads(Path("runs/run/constants.json").read_text())
    assert record["git"] == "unknown"
    assert [record["constants"][name] for name in ("EPOCHS", "BACKBONE", "SEED")] == [1, "resnet18", 3]


def test_a_constant_that_was_renamed_is_missed(monkeypatch):
    monkeypatch.delitem(main.TYPES, "CLIP_NORM")
    with pytest.raises(OptionError, match=r"CLIP_NORM: not among the constants in main\.py any more"):
        main.configure({"DATA_DIR": "x"})


def test_what_is_given_counts_for_the_demo_too(monkeypatch):
    config, record = main.configure({"BATCH_SIZE": 16})
    assert (record, config.DATA_DIR) == ({"demo": True}, "data/demo")
    assert config.BATCH_SIZE == 16 and config.EPOCHS == main.DEMO["EPOCHS"]
    monkeypatch.setitem(sys.modules, "data.make_demo", None)  # as where a disk is mounted over data/
    with pytest.raises(OptionError, match=r"data holds neither train nor make_demo\.py: give DATA_DIR"):
        main.main()


def test_help_shows_every_constant(capsys):
    with pytest.raises(SystemExit):
        main.from_command_line(["--help"])
    said = capsys.readouterr().out
    assert all(f"\n{name}: " in said for name in main.TYPES) and "\nDEMO = " in said


def test_learning_rate_rises_then_falls():
    factors = [main.warmup_cosine(step, 4, 12) for step in range(13)]
    assert factors[:5] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert factors[8] == pytest.approx(0.5) and factors[12] == 0
    assert main.warmup_cosine(0, 0, 10) == 1 and main.warmup_cosine(3, 0, 6) == pytest.approx(0.5)


# Data of other kinds


def test_other_folders_no_val_and_a_test_without_masks(tiny, capsys):
    shutil.rmtree(tiny / "val")
    shutil.rmtree(tiny / "test" / "label")
    for split in ("train", "test"):
        for old, new in (("A", "time 1"), ("B", "time 2")):
            (tiny / split / old).rename(tiny / split / new)
    scores = main.main(**QUICK | {"DATA_DIR": str(tiny), "EPOCHS": 1, "FOLDERS": "time 1, time 2, label"})
    said = capsys.readouterr().out
    assert "1 of 4 pairs of train" in said and f"{tiny}/test: no masks in it, so there is nothing to score" in said
    assert "val_iou" in scores and "test_iou" not in scores


def test_no_demo_over_images_of_another_layout():
    for name in ("demo/train/A/x.png", "demo_classes/val/B/x.png", "cache/x.npy", "README.md"):
        Path("data", name).parent.mkdir(parents=True, exist_ok=True)
        Path("data", name).touch()
    assert not main.has_data("A B label")
    for name in ("A/x.png", "mine/before/x.TIF", "x.jpg"):
        place = Path("data", name)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
        with pytest.raises(OptionError, match=f"{place}: not in data/train/{{A,B,label}}; move it, or give DATA_DIR"):
            main.main()
        place.unlink()


def test_the_highest_iou_is_best_and_of_equal_ones_that_of_the_lower_loss():
    rows = [{"val_iou": 0.0, "val_loss": loss} for loss in (0.9, 0.7, 0.8)]
    assert main.best_epoch(rows) == 2
    assert main.best_epoch([*rows, {"val_iou": 0.1, "val_loss": 9.0}]) == 4


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
    """A copy of that folder's content here, which MLflow takes for a run of its own."""
    shutil.copytree(one_epoch, Path(), dirs_exist_ok=True)
    record = Path("runs/run/constants.json")
    record.write_text(record.read_text().replace(json.loads(record.read_text())["id"], uuid.uuid4().hex))


def test_a_run_goes_on_with_more_epochs(trained, capsys):
    """Also where its best checkpoint was deleted."""
    first = Path("runs/run/metrics.csv").read_text()
    Path("runs/run/best.pt").unlink()
    main.main(RESUME="runs/run", EPOCHS=2, NUM_WORKERS=0)
    assert "epoch 1/" not in capsys.readouterr().out
    assert Path("runs/run/metrics.csv").read_text().startswith(first)
    assert [row["epoch"] for row in table("run")] == [1, 2] and wrong_steps("run") == []
    assert torch.load("runs/run/best.pt", weights_only=True)["epoch"] == 2


def test_a_run_that_trains_the_backbone_goes_on_to_the_bit(trained, monkeypatch):
    constants, seed_epoch = QUICK | {"DATA_DIR": "tiny", "EPOCHS": 2, "FREEZE_BACKBONE": False}, main.seed_epoch
    main.main(**constants | {"RUN_NAME": "whole"})

    def stop_before_the_second(seed: int, epoch: int) -> None:
        if epoch == 2:
            sys.exit()
        seed_epoch(seed, epoch)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(main, "seed_epoch", stop_before_the_second)
        main.main(**constants | {"RUN_NAME": "ended"})
    main.main(RESUME="runs/ended")
    ours, theirs = (torch.load(f"runs/{name}/last.pt", weights_only=True)["model"] for name in ("whole", "ended"))
    assert any(name.startswith("stages.") for name in ours)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_what_is_not_gone_on_with(trained):
    """Each fault is met before those above it."""

    def refused(error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            main.main(RESUME="runs/run", EPOCHS=2)

    for name in ("A", "B", "label"):
        Path("tiny", "train", name, "pair_0.png").unlink()
    refused(DataError, "tiny: not the files that runs/run was trained on")
    record, last = Path("runs/run/constants.json"), Path("runs/run/last.pt")
    record.write_text(record.read_text().replace('"SEED": 0', '"SEED": 1'))
    refused(ModelError, r"last\.pt: trained over another backbone than WEIGHTS=None gives now")
    content = torch.load(last, weights_only=True)
    content["model"]["head.weight"] = torch.zeros(4, 32, 1, 1)
    torch.save(content, last)
    refused(ModelError, r"last\.pt: made by an older version")
    record.write_text(record.read_text().replace('"ALPHA"', '"GAMMA"'))
    refused(OptionError, r"runs/run: made by another version of this program; .*: ALPHA, GAMMA")
    assert "val_iou" in main.main(EVALUATE="runs/run", SPLIT="val", DEVICE="cpu")  # which needs none of that


def test_fine_tuning_starts_from_a_checkpoint(trained):
    constants = QUICK | {"DATA_DIR": "tiny", "WEIGHTS": "runs/run/best.pt", "RUN_NAME": "tuned"}
    main.main(**constants | {"EPOCHS": 1, "LEARNING_RATE": 0.0})
    first, second = (torch.load(f"runs/{name}/best.pt", weights_only=True)["model"] for name in ("run", "tuned"))
    weights = [name for name in first if name.endswith(("conv.weight", ".0.weight", "head.bias"))]
    assert weights and all(torch.equal(first[name], second[name]) for name in weights)


def test_statistics_are_right_after_few_steps(trained):
    """Of the four steps that the epoch had, running averages would hold a third."""
    model, seen = FusionUNet.load("runs/run/best.pt", "cpu"), []
    model.fuse2.mix[0].register_forward_hook(lambda _, __, output: seen.append(output.mean((0, 2, 3))))
    with torch.no_grad():
        for seed in range(8):
            items = [LEVIRCD("tiny", "train", 32, augment=True)[index, seed] for index in range(16)]
            image_a, image_b, _ = map(torch.stack, zip(*items, strict=True))
            model(image_a, image_b)
    expected, norm = torch.stack(seen).mean(0), model.fuse2.mix[1]
    assert (norm.running_mean - expected).abs().max() < 0.5 * expected.abs().max()


# Several processes


def work(folder: Path, environment: dict[str, str]) -> None:
    """The loss and the gradients of a step, the same in all processes as in one alone, saved to a file."""
    os.environ.update(environment)
    with main.process_group():
        rank, world = main.rank(), main.world()
        model = FusionUNet.load(folder / "model.pt", "cpu")
        for module in model.train().modules():  # but BatchNorm keeps its statistics
            module.train(not isinstance(module, torch.nn.BatchNorm2d) and module.training)
        generator = torch.Generator().manual_seed(0)
        pair = torch.rand(2, 6, 3, 32, 32, generator=generator)[:, rank::world]
        label = (torch.rand(6, 1, 32, 32, generator=generator) < 0.3)[rank::world]
        parallel = main.distribute(model, SimpleNamespace(COMPILE=False))  # must live until the gradients have come
        loss = CombinedIoULoss(0.3)(parallel(*pair), label)
        loss.backward()
        step = torch.cat([value.grad.flatten() for value in model.parameters() if value.requires_grad])
    torch.save({"loss": loss.detach(), "step": step}, folder / f"{environment.get('RANK', 'alone')}.pt")


def test_too_small_batches_are_one_line_in_every_process(tiny):
    arguments = [f"DATA_DIR={tiny}", "BACKBONE=resnet18", "WEIGHTS=None", "CROP_SIZE=32"]
    group = [start("main.py", *arguments, "BATCH_SIZE=18", **environment) for environment in as_torchrun(2)]
    group.append(start("main.py", *arguments, "BATCH_SIZE=1"))
    for process in group:
        process.join()
        assert process.exitcode == 1
    lines = Path("output.txt").read_text().splitlines()
    errors = [line.partition(": lower")[0] for line in lines if line.startswith("error: ")]
    assert errors.count("error: 16 crops don't fill a batch of 18 to share") == 2
    assert any(line.startswith("error: BATCH_SIZE=1, CROP_SIZE=32: too small: BatchNorm needs") for line in lines)
    assert not any(line.startswith("Traceback") for line in lines)


def test_processes_share_a_loss_and_a_step(tmp_path):
    torch.save(FusionUNet(weights=None, backbone="resnet18").checkpoint(), tmp_path / "model.pt")
    group = [PROCESSES.Process(target=work, args=(tmp_path, environment)) for environment in (*as_torchrun(3), {})]
    for process in group:
        process.start()
    for process in group:
        process.join()
        assert process.exitcode == 0
    *shares, alone = (torch.load(tmp_path / f"{name}.pt") for name in (0, 1, 2, "alone"))
    for share in shares:
        torch.testing.assert_close(share["loss"], alone["loss"])
        torch.testing.assert_close(share["step"], alone["step"], rtol=1e-4, atol=1e-6)


def test_processes_go_on_with_a_run_and_end_with_the_scores_that_one_gives(tiny):
    """A batch holds one image here, so val has fewer of them than there are processes, and test has more."""
    rng = np.random.default_rng(0)
    for index in range(5):
        write_pair(tiny / "test", f"{index}", *random_pair(rng, 64, 64))
    main.main(**QUICK | {"DATA_DIR": str(tiny), "BATCH_SIZE": 6, "EPOCHS": 1, "LEARNING_RATE": 2e-2})
    first = table("run")
    group = [start("main.py", "RESUME=runs/run", "EPOCHS=2", **environment) for environment in as_torchrun(3)]
    for process in group:
        process.join()
    said = Path("output.txt").read_text()
    assert [process.exitcode for process in group] == [0, 0, 0] and said.count("epoch 2/2") == 1, said
    rows = table("run")
    assert rows[:1] == first and len(rows) == 2 and wrong_steps("run") == []
    assert rows[1]["train_loss"] < rows[0]["train_loss"]
    together = json.loads(Path("runs/run/test_metrics.json").read_text())
    assert together == main.main(EVALUATE="runs/run", RUN_NAME="alone", DEVICE="cpu")
    val = main.main(EVALUATE="runs/run", SPLIT="val", RUN_NAME="val", DEVICE="cpu")
    best = torch.load("runs/run/best.pt", weights_only=True)["epoch"]
    assert val["val_iou"] == pytest.approx(rows[best - 1]["val_iou"], rel=1e-5)


def test_an_evaluation_batch_holds_no_more_pixels_than_a_process_trains_on(tmp_path, monkeypatch):
    write_pair(tmp_path / "val", "x", *random_pair(np.random.default_rng(0), 512, 600))
    data, device = LEVIRCD(tmp_path, "val", main.PROTOCOL_CROP), torch.device("cpu")
    config = SimpleNamespace(BATCH_SIZE=64, CROP_SIZE=128, NUM_WORKERS=0)
    for world, items in ((1, 4), (8, 2), (64, 1)):
        monkeypatch.setattr(main, "world", lambda world=world: world)
        assert max(map(len, main.open_loader(data, config, device).batch_sampler)) <= items


def test_a_process_that_sees_one_gpu_takes_it(monkeypatch):
    """As under Slurm, where the third process of a machine sees its own GPU as the first."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    asked = []
    monkeypatch.setattr(torch, "zeros", lambda *_, device: asked.append(device) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        network.pick_device("cuda")
    assert asked == [torch.device("cuda:0")]


@pytest.mark.parametrize(("on_gpu", "pairs", "synchronised"), [(True, 7, True), (True, 8, False), (False, 7, False)])
def test_batchnorm_is_synchronised_over_gpus_that_have_few_pairs_each(on_gpu, pairs, synchronised, monkeypatch):
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(3))
    model.mean = SimpleNamespace(is_cuda=on_gpu)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(main, "world", lambda: 4)
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", torch.nn.Sequential)
    parallel = main.distribute(model, SimpleNamespace(BATCH_SIZE=4 * pairs, COMPILE=False))
    assert any(isinstance(module, torch.nn.SyncBatchNorm) for module in parallel.modules()) == synchronised


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


def test_float16_trains_as_float32_does_and_goes_on_to_the_bit_after_it_overflowed(trained, half, monkeypatch):
    constants = QUICK | {"DATA_DIR": "tiny", "EPOCHS": 2}
    main.main(**constants | {"RUN_NAME": "whole"})
    assert table("whole")[0]["train_loss"] == pytest.approx(table("run")[0]["train_loss"], abs=0.02)
    with monkeypatch.context() as patch:
        overflow(patch, steps=range(5, 100))
        with pytest.raises(FloatingPointError, match=r"epoch 2, steps 1 to 4: the loss isn't finite; .* AMP=False"):
            main.main(**constants | {"RUN_NAME": "ended"})
    main.main(RESUME="runs/ended")
    ours, theirs = (torch.load(f"runs/{name}/last.pt", weights_only=True) for name in ("whole", "ended"))
    assert ours["scaler"] == theirs["scaler"] and ours["scaler"]["scale"] == 2**16
    assert len(ours["rows"]) == len(theirs["rows"]) == 2
    assert all(torch.equal(value, theirs["model"][name]) for name, value in ours["model"].items())


def test_a_step_that_overflows_in_float16_is_skipped(unscored, half, monkeypatch):
    overflow(monkeypatch, steps=[2])
    main.main(**QUICK | {"DATA_DIR": str(unscored), "EPOCHS": 1})
    last = torch.load("runs/run/last.pt", weights_only=True)
    assert last["steps_taken"] == 4 - 1 and last["scaler"]["scale"] == 2**15
    assert all(state["step"] == 3 for state in last["optimizers"][1]["state"].values())
    assert last["rows"][0]["train_loss"] < 2


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
        FloatingPointError, match=f"{where}: the loss isn't finite; start a new run with a lower LEARNING_RATE"
    ):
        main.main(RESUME="runs/run", EPOCHS=2)
    assert all(Path("runs/run", name).read_bytes() == content for name, content in held.items())


def test_the_loss_is_read_every_few_steps_alone(tiny, monkeypatch):
    """And nothing else waits for the device in between: the calls that would are counted."""
    reads, before, item = [], [], torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda self: reads.append(self.shape) or item(self))
    monkeypatch.setattr(main, "READ_EVERY", 3)
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
        text = (ROOT / f"{name}.py").read_text()
        modules = re.findall(r"^ *(?:from|import) ([\w.]+)", text, re.MULTILINE)
        assert {each for each in modules if each.partition(".")[0] in {*allowed, "data", "tests"}} <= others
        assert not re.search(r"^(from|import) mlflow", text, re.MULTILINE)  # it takes seconds
