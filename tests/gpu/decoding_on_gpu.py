"""Training and encoding from shards on a GPU; test_gpu_sections.py runs each test in a process of its own.

A decoder that crashes takes its process along: so one test is lost, and no more.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from shard_sets import ShardMaker, write_store

from bowstore.config import EncodeConfig, TrainConfig, validate
from bowstore.train.loop import train
from bowstore.train.metrics import read_metrics
from bowstore.words.encode import encode
from bowstore.words.store import open_store
from bowstore.words.verify import digest

pytestmark = pytest.mark.gpu
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


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


def test_words_of_a_gpu_are_those_of_the_cpu_but_for_near_ties(make_shard_set: ShardMaker, tmp_path: Path) -> None:
    index = make_shard_set(64, size=96)
    layers = ("conv3", "conv4")
    first = EncodeConfig(teacher="torchvision:resnet18", size=64, resize=64, layers=layers, k=(24,), batch=16)
    encode(first, shards=index.root, store=tmp_path / "cpu.zarr", device=CPU)
    same_words = first.model_copy(update={"vocabulary": tmp_path / "cpu.zarr", "k": ()})
    for name in ("gpu.zarr", "again.zarr"):
        encode(same_words, shards=index.root, store=tmp_path / name, device=GPU)
    for layer in layers:
        ours, oracle = (open_store(tmp_path / name).load_words(layer) for name in ("gpu.zarr", "cpu.zarr"))
        assert (ours == oracle).mean() > 0.95  # the decoders differ by a level of grey here and there
    assert digest(tmp_path / "gpu.zarr") == digest(tmp_path / "again.zarr")
