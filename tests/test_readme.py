"""The README's code: each block is run as it stands, in a process of its own, where a run has been."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, start, write_tiny

from model import FusionUNet, save_checkpoint

README = (ROOT / "README.md").read_text(encoding="utf-8")
NOTEBOOK, EXPORT = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for block in re.findall(r"```\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]


@pytest.fixture
def after_a_run(tmp_path, monkeypatch) -> None:
    """A working folder with the program, the demo's data and a run's checkpoint."""
    monkeypatch.chdir(tmp_path)
    write_tiny(Path("data/demo"))
    Path("runs/RUN_NAME").mkdir(parents=True)
    save_checkpoint(FusionUNet(weights=None, backbone="resnet18").checkpoint(), Path("runs/RUN_NAME/best.pt"))


def run(script: str, *arguments: str) -> None:
    (process := start(script, *arguments)).join()
    assert process.exitcode == 0, Path("output.txt").read_text()


def run_block(code: str) -> None:
    """Run a block of the README."""
    Path("block.py").write_text(code)
    run(str(Path("block.py").resolve()))


def test_the_notebook(after_a_run):
    run_block(NOTEBOOK)
    assert Path("results.png").exists()


def test_the_notebook_shows_its_figure(after_a_run):
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient and ipykernel")
    pytest.importorskip("ipykernel", reason="needs nbclient and ipykernel")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(NOTEBOOK)])
    nbclient.NotebookClient(notebook).execute()
    assert sum("image/png" in output.get("data", {}) for output in notebook.cells[0].outputs) == 1


RUN_ELSEWHERE = """
import sys, torch
program, pairs = torch.export.load("model.pt2").module(), torch.load("pairs.pt")
torch.save([program(*pair) for pair in pairs], "logits.pt")
assert "model" not in sys.modules
"""


def test_the_exported_model_gives_the_same_logits_without_this_code(after_a_run):
    run_block(EXPORT.rpartition("\n\n")[0])  # what follows needs onnxscript
    pairs = [torch.rand(2, n, 3, height, width) for n, height, width in ((1, 64, 64), (3, 33, 47), (2, 320, 100))]
    torch.save(pairs, "pairs.pt")
    subprocess.run([sys.executable, "-c", RUN_ELSEWHERE], check=True)
    model = FusionUNet.load("runs/RUN_NAME", "cpu")
    for pair, logits in zip(pairs, torch.load("logits.pt"), strict=True):
        torch.testing.assert_close(logits, model(*pair), atol=1e-5, rtol=1e-5)


def test_the_onnx_model_gives_the_same_logits(after_a_run):
    pytest.importorskip("onnxscript", reason="needs onnxscript and onnxruntime")
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxscript and onnxruntime")
    run_block(EXPORT)
    session, pair = onnxruntime.InferenceSession("model.onnx"), torch.rand(2, 3, 3, 256, 256)
    names = [each.name for each in session.get_inputs()]
    (logits,) = session.run(None, dict(zip(names, pair.numpy(), strict=True)))
    model = FusionUNet.load("runs/RUN_NAME", "cpu")
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), model(*pair), atol=1e-4, rtol=0)


def test_the_command_for_masks(after_a_run):
    (command,) = [line for line in COMMANDS if line.startswith("python visualize.py")]
    shutil.copy("data/demo/val/A/pair_0.png", "before.png")
    shutil.copy("data/demo/val/B/pair_0.png", "after.png")
    run(*command.split()[1:])
    assert Path("mask.png").exists() and Path("mask_overlay.jpg").exists()
