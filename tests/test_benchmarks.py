"""`bowstore bench ...` and tools/compare_loaders.py: what they print is what they write, and it is about the data."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from shard_sets import ShardMaker, write_store

from bowstore.cli import main
from bowstore.data.index import open_index

TOOL = Path(__file__).parents[1] / "tools" / "compare_loaders.py"
STAGES = ["plan", "read", "decode", "resize", "normalise", "flip", "jitter", "cutmix", "loader"]


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_shard_set: ShardMaker) -> Path:
    index = make_shard_set(40, size=48)
    write_store(tmp_path / "data/words.zarr", index)
    (tmp_path / "bowstore.yaml").write_text(f"shards: {index.root}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BOWSTORE_CACHE", str(tmp_path / "cache"))
    return tmp_path


def bench(name: str, *arguments: object) -> dict[str, object]:
    result = CliRunner().invoke(main, ["bench", name, *map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    value: dict[str, object] = json.loads(result.stdout)
    assert value == json.loads(Path(f"runs/bench/{name}.json").read_text())
    return value


def test_bench_loader_names_every_stage_and_what_binds(workspace: Path) -> None:
    value = bench("loader", "--size", 32, "--batch", 8, "--batches", 2, "--rounds", 2)
    rates = value["images_per_second"]
    assert list(rates) == STAGES
    assert all(len(rates[name]["rounds"]) == 2 and rates[name]["median"] > 0 for name in STAGES)
    assert value["binds"].startswith(("the view, ", "planning and reading"))
    assert (
        value["inputs"]["shards"] == open_index(Path((workspace / "bowstore.yaml").read_text().split()[1])).fingerprint
    )


def test_bench_loader_refuses_what_it_cannot_do(workspace: Path) -> None:
    for arguments, message in (
        (["--batch", "64"], "40 images are fewer than one batch of 64"),
        (["--device", "cpu", "--hw-load", "0.5", "--batch", "8"], "--hw-load sweeps the hardware decoder of a GPU"),
    ):
        result = CliRunner().invoke(main, ["bench", "loader", *arguments])
        assert result.exit_code == 2
        assert message in result.stderr


def test_bench_reader_times_both_ways(workspace: Path) -> None:
    rates = bench("reader", "--batch", 16, "--batches", 4, "--rounds", 2)["images_per_second"]
    assert list(rates) == ["mmap", "pread"]


def test_bench_store_and_targets(workspace: Path) -> None:
    store = bench("store", "--rounds", 2)
    assert list(store["images_per_second"]) == ["bulk load", "join by key"]
    assert store["bytes_per_image"] > 32
    targets = bench("targets", "--batch", 16, "--batches", 4, "--rounds", 2)
    assert list(targets["rows_per_second"]) == ["resident", "host", "streamed"]
    assert targets["microseconds_step_host"] > 0


def test_bench_encode_compares_the_pass_with_what_bounds_it(workspace: Path) -> None:
    teacher = ["--teacher", "wrn-10-1", "--size", 16, "--resize", 16, "--layer", "block2", "--layer", "block3"]
    value = bench("encode", *teacher, "--K", 8, "--K", 12, "--images", 32, "--batch", 8, "--rounds", 3)
    rates = value["images_per_second"]
    assert list(rates) == ["clean view alone", "teacher alone", "encode"]
    view, network, whole = (rates[name]["rounds"] for name in rates)
    ratios = [c / min(a, b) for a, b, c in zip(view, network, whole, strict=True)]
    assert value["ratio_over_slower"] == sorted(ratios)[1]
    assert value["layers"] == {"block2": {"words": 8, "grid": [8, 8]}, "block3": {"words": 12, "grid": [4, 4]}}
    assert value["binds"] in rates
    assert 0 < value["share_teacher"] <= 1
    assert not list(Path().glob("**/*.zarr/block2"))  # its stores were for the moment


def test_bench_encode_times_the_compiled_teacher(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[int] = []

    def compile(graph: Any, images: Any, options: Any) -> Any:
        traced.append(len(images[0]))
        return graph

    monkeypatch.setattr(torch._inductor, "compile", compile)
    teacher = ["--teacher", "wrn-10-1", "--size", 16, "--resize", 16, "--layer", "block2", "--K", 8]
    settings = ["--images", 12, "--batch", 8, "--rounds", 1]  # the second batch is filled up
    assert bench("encode", *teacher, *settings)["trunk"] == "eager"
    assert bench("encode", *teacher, *settings, "--compile", "true")["trunk"] == "inductor freezing"
    assert traced == [8]


def test_bench_trunk_compares_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu_trunk import bench_trunk

    settings: dict[str, Any] = {"size": 16, "batch": 4, "rounds": 1, "device": torch.device("cpu"), "compiled": True}
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, images, options: graph)
    result = bench_trunk("wrn-10-1", "block2", **settings)
    names = [timing.name for timing in result.timings]
    assert names == ["float32", "float32, contiguous", "bfloat16", "bfloat16, compiled", "float32, compiled"]
    assert 1e-5 < result.figures["error_bfloat16_compiled"] < 0.05

    def broken(_graph: Any, _images: Any, options: Any) -> Any:
        raise RuntimeError("no Triton")

    monkeypatch.setattr(torch._inductor, "compile", broken)
    result = bench_trunk("wrn-10-1", "block2", **settings)
    assert len(result.timings) == 3  # the other ways are timed all the same
    why = "inductor cannot compile wrn-10-1: no Triton"
    assert result.notes == [f"bfloat16, compiled: {why}", f"float32, compiled: {why}"]


def test_bench_encode_needs_enough_vectors(workspace: Path) -> None:
    arguments = ["--teacher", "wrn-10-1", "--size", "16", "--resize", "16", "--layer", "block3", "--K", "2000"]
    result = CliRunner().invoke(main, ["bench", "encode", *arguments, "--images", "8"])
    assert result.exit_code == 2
    assert "8 images give 128 vectors of layer 'block3', fewer than K = 2000; lower --K" in result.stderr


def test_bench_kmeans_times_both_backends(workspace: Path) -> None:
    value = bench("kmeans", "--vectors", 2000, "--dimensions", 8, "--K", 20, "--rounds", 3, "--iterations", 10)
    rates = value["iterations_per_second"]
    assert list(rates) == ["faiss", "torch"]
    assert value["seconds_torch"] == 10 / rates["torch"]["median"]
    only = bench("kmeans", "--vectors", 50, "--dimensions", 8, "--K", 20, "--rounds", 1, "--backend", "torch")
    assert list(only["iterations_per_second"]) == ["torch"]
    result = CliRunner().invoke(main, ["bench", "kmeans", "--vectors", "50", "--K", "20", "--backend", "super"])
    assert result.exit_code == 2
    assert "--backend super does not run on a GPU, below 1024 words or 128 dimensions" in result.stderr
    assert "choose one of faiss, torch" in result.stderr
    result = CliRunner().invoke(main, ["bench", "kmeans", "--vectors", "10", "--K", "20"])
    assert result.exit_code == 2
    assert "--K 20 words need as many vectors, --vectors 10 are fewer; raise it" in result.stderr


def test_bench_prints_a_table(workspace: Path) -> None:
    result = CliRunner().invoke(main, ["bench", "reader", "--batch", "16", "--batches", "2", "--rounds", "1"])
    assert result.stdout.splitlines()[0].split() == ["images/s", "median", "min", "max"]
    assert "MB/s" in result.stdout


@pytest.mark.slow
def test_compare_loaders_runs_all_five_on_the_same_images(workspace: Path) -> None:
    shards = (workspace / "bowstore.yaml").read_text().split()[1]
    command = [sys.executable, TOOL, "--shards", shards, "--size", "32", "--batch", "8", "--batches", "2"]
    done = subprocess.run([*command, "--rounds", "2", "--json"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    others = ["dali_reader", "torchvision", "torchvision_v2", "webdataset"]
    assert list(value["images_per_second"]) == ["bowstore", *others]
    for name in others:
        ratios = value[f"ratios_over_{name}"]
        assert len(ratios) == 2
        assert min(ratios) <= value[f"ratio_over_{name}"] <= max(ratios)
    assert value["inputs"]["shards"] == open_index(Path(shards)).fingerprint


def test_compare_loaders_refuses_a_batch_larger_than_the_set(workspace: Path) -> None:
    spec = importlib.util.spec_from_file_location("compare_loaders", TOOL)
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    shards = (workspace / "bowstore.yaml").read_text().split()[1]
    done = CliRunner().invoke(tool.main, ["--shards", shards, "--batch", "64"])
    assert done.exit_code == 2
    assert "holds 40 images, fewer than one batch of 64; lower --batch" in done.stderr
