"""What needs an NVIDIA GPU: the same graph with mixed decoding, the training step, the teacher."""

from pathlib import Path

import numpy as np
import pytest
import torch
from shard_sets import ShardMaker, write_store

from bowstore.config import TrainConfig, ViewConfig, validate
from bowstore.data.pipeline import clean_batches, clean_view, train_batches
from bowstore.data.plan import Schedule, plans
from bowstore.data.reader import ShardReader
from bowstore.train.loop import train
from bowstore.train.metrics import read_metrics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_the_mixed_graph_agrees_with_the_cpu_graph(make_shard_set: ShardMaker) -> None:
    index = make_shard_set(64, size=96)
    view = ViewConfig(size=64, resize=80)
    schedule = Schedule(64, 16, 0)

    def batches(device: torch.device) -> list[torch.Tensor]:
        steps = plans(schedule, index, view, start=0, stop=4)
        found = train_batches(ShardReader(index), view, steps, batch=16, device=device)
        return [batch.images_BCHW.float().cpu() for batch in found]

    for ours, oracle in zip(batches(GPU), batches(CPU), strict=True):
        pixels = (ours - oracle).abs() * 255 * torch.tensor(view.std)[:, None, None]
        assert pixels.mean() < 3.0
    rows = np.arange(64)
    for (_, ours), (_, oracle) in zip(
        clean_batches(ShardReader(index), clean_view(view), rows, batch=16, device=GPU),
        clean_batches(ShardReader(index), clean_view(view), rows, batch=16, device=CPU),
        strict=True,
    ):
        assert ours.is_cuda
        assert (ours.cpu() - oracle).abs().mean() < 0.05


@pytest.mark.parametrize("task", ["rotation", "words"])
@pytest.mark.parametrize("compiled", [False, True])
def test_training_on_a_gpu(make_shard_set: ShardMaker, tmp_path: Path, task: str, compiled: bool) -> None:
    index = make_shard_set(64)
    store = write_store(tmp_path / "words.zarr", index)
    config = validate(
        TrainConfig,
        {
            "name": "gpu",
            "task": task,
            "shards": str(index.root),
            "view": {"size": 32, "resize": None, "cutmix": task == "words"},
            "model": {"arch": "resnet18"},
            "words": {"store": str(store), "layer": "block3"} if task == "words" else {},
            "optim": {"batch": 16, "epochs": 2},
            "runtime": {"device": "cuda", "compile": compiled, "log_every_steps": 2},
        },
        "test",
    )
    report = train(config, tmp_path / "runs")
    assert report.steps == 8
    assert all(np.isfinite(line["loss"]) for line in read_metrics(tmp_path / "runs" / "gpu"))
