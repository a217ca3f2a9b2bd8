"""Several processes, started as torchrun does, do together what one does alone."""

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from conftest import PROCESSES, as_torchrun, random_pair, write_pair
from torch import nn

import main
from data import processes
from dataset import LEVIRCD, RandomBatches, color_jitter, make_loader
from metrics import ThresholdMetrics
from model import FusionUNet


def work(folder: Path, environment: dict[str, str]) -> None:
    """What is to be the same in all processes and in one alone, saved to a file."""
    os.environ.update(environment)
    torch.manual_seed(0)
    with processes.joined():
        found = {}
        # A norm's outputs, gradients and statistics, of a batch that is not shared evenly.
        norm, x = nn.BatchNorm2d(3).double(), torch.randn(7, 3, 4, 5, dtype=torch.float64, requires_grad=True)
        nn.init.uniform_(norm.weight)
        target = torch.randn_like(x)
        if environment:
            norm.__class__ = processes.SyncedBatchNorm
        loss = processes.summed((norm(processes.shard(x)) * processes.shard(target)).sum()).square()
        loss.backward()
        share = 1 / processes.count()  # each process has the loss of all
        for name, gradient in (("x", x.grad), ("weight", norm.weight.grad), ("bias", norm.bias.grad)):
            found[f"gradient of {name}"] = processes.summed(gradient * share)
        found |= {"loss": loss.detach(), "mean": norm.running_mean, "variance": norm.running_var}
        # The batches of an epoch and their colours, put together again.
        sampler, images = RandomBatches(20, 6), torch.randint(0, 256, (6, 3, 2, 2), dtype=torch.uint8)
        torch.manual_seed(1)
        found["draws"] = [sorted(batch) for batch in sampler]
        found["colours"] = color_jitter(processes.shard(images), 0.5, 0.5, 0.5, 0.5)
        # The counts of a validation pass, whose batches can't be shared evenly.
        model = FusionUNet.load(folder / "model.pt", "cpu")
        metrics, loader = ThresholdMetrics(), make_loader(LEVIRCD(folder, "val", 32), 2, 0, on_gpu=False)
        scores = main.run_pass(model, loader, SimpleNamespace(ALPHA=0.5, AMP=False), metrics)
        found |= {"counts": metrics._counts, "score": torch.tensor(scores["loss"])}
    torch.save(found, folder / f"{environment.get('RANK', 'alone')}.pt")


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
        elif name == "colours":
            assert all(torch.equal(share[name], expected[rank::3]) for rank, share in enumerate(shares))
        elif name == "counts":
            assert all(torch.equal(share[name], expected) for share in shares)
            assert expected.sum() == 3 * 40 * 70
        else:
            for share in shares:
                torch.testing.assert_close(share[name], expected, rtol=1e-6 if name == "score" else 1e-12, atol=1e-12)
