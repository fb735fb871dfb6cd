import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from shard_sets import write_store, write_words

from bowstore.data.index import open_index
from bowstore.data.views import Batch
from bowstore.environment import choose_device
from bowstore.errors import BusyError, CorruptError, MismatchError, MissingError, TrainingError, UsageError
from bowstore.files import exclusive_lock
from bowstore.models import saved
from bowstore.models.saved import load_backbone, newest_checkpoint
from bowstore.runs import read_metrics
from bowstore.train import loop
from bowstore.train.config import OptimConfig, TrainConfig
from bowstore.train.distributed import World
from bowstore.train.schedule import learning_rate, total_steps
from bowstore.train.step import Measured
from bowstore.train.tasks.task import build_task
from bowstore.words.store.store import open_store

Make = Callable[..., TrainConfig]


def weights(run: Path) -> dict[str, torch.Tensor]:
    state = newest_checkpoint(run)
    assert state is not None
    return {**{f"b.{k}": v for k, v in state["backbone"].items()}, **{f"h.{k}": v for k, v in state["head"].items()}}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_learning_rate_schedule_of_the_paper() -> None:
    cifar = OptimConfig(epochs=30, steps_per_epoch=2000, lr=0.1, milestones=(12, 24))
    assert total_steps(cifar, 390) == 60_000
    rates = [learning_rate(step, cifar, 390) for step in (0, 23_999, 24_000, 47_999, 48_000, 59_999)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    imagenet = OptimConfig(epochs=140, lr=0.03, milestones=(60, 100, 130))
    assert total_steps(imagenet, 5004) == 140 * 5004
    rates = [learning_rate(epoch * 5004, imagenet, 5004) for epoch in (0, 59, 60, 100, 130, 139)]
    assert rates == pytest.approx([3e-2, 3e-2, 3e-3, 3e-4, 3e-5, 3e-5])
    warm = OptimConfig(epochs=10, lr=1.0, warmup_epochs=2)
    assert [learning_rate(step, warm, 5) for step in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])


def test_weight_decay_spares_gamma_always_and_small_parameters_on_request(make_config: Make) -> None:
    for spare in (True, False):
        config = make_config(optim={"decay_norm_and_bias": not spare})
        assert config.shards is not None
        task = build_task(config, open_index(config.shards), World(0, 1, torch.device("cpu")))
        decayed, free = loop.build_optimizer(task.network, config.optim).param_groups
        assert any(p is task.network.head.gamma for p in free["params"])
        assert free["weight_decay"] == 0
        assert decayed["weight_decay"] == config.optim.weight_decay
        assert all(p.ndim > 1 for p in decayed["params"]) == spare


@pytest.mark.parametrize("task", ["rotation", "words"])
def test_a_run_leaves_everything_it_promises(make_config: Make, tmp_path: Path, task: str) -> None:
    report = loop.train(make_config(task), tmp_path / "runs")
    run = tmp_path / "runs" / f"{task}-run"
    assert report.steps == 12
    assert {p.name for p in run.iterdir()} >= {
        "config.yaml", "environment.json", "metrics.jsonl", "checkpoints", "backbone.safetensors", "tensorboard",
    }  # fmt: skip
    assert [line["step"] for line in read_metrics(run)] == [2, 4, 6, 8, 10, 12]
    assert list((run / "tensorboard").glob("events.*"))
    last = read_metrics(run)[-1]
    names = {"loss", "lr", "epoch", "images_per_second"}
    names |= {"accuracy"} if task == "rotation" else {"excess_loss", "gamma", "marginal_loss"}
    assert names <= last.keys()
    assert all(math.isfinite(value) for name, value in last.items() if name != "order")
    environment = json.loads((run / "environment.json").read_text())
    assert environment["jpeg"] == "decoded on the CPU"
    assert environment["versions"]["torch"]
    loaded = load_backbone(run)
    assert equal({f"b.{k}": v for k, v in loaded.backbone.state_dict().items()},
                 {k: v for k, v in weights(run).items() if k.startswith("b.")})  # fmt: skip
    assert not loaded.backbone.training
    assert loop.train(make_config(task), tmp_path / "runs").text().endswith("take another --name to train again")


def test_words_are_learned(make_config: Make, tmp_path: Path) -> None:
    loop.train(
        make_config(optim={"epochs": 10, "milestones": [8]}, view={"cutmix": False, "grey": 0, "hue": 0}),
        tmp_path / "runs",
    )
    lines = read_metrics(tmp_path / "runs" / "words-run")
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1
    assert lines[-1]["loss"] < lines[-1]["marginal_loss"] - 0.1
    assert 0 < lines[-1]["excess_loss"] < lines[0]["excess_loss"]


class Interrupted(Exception):
    pass


def interrupt_at(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Make training die when it starts its `steps`-th step from now."""
    original, count = loop.train_step, 0

    def step(*args: Any, **kwargs: Any) -> Measured:
        nonlocal count
        count += 1
        if count == steps:
            raise Interrupted
        return original(*args, **kwargs)

    monkeypatch.setattr(loop, "train_step", step)


def poison_step(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Make the loss of one step not a number."""
    original, count = loop.train_step, 0

    def step(*args: Any, **kwargs: Any) -> Measured:
        nonlocal count
        count += 1
        measured = original(*args, **kwargs)
        measured.means["loss"] *= float("nan") if count == number else 1
        return measured

    monkeypatch.setattr(loop, "train_step", step)


@pytest.mark.parametrize("task", ["rotation", "words"])
@pytest.mark.parametrize("die_at", [3, 8, 12])
def test_resume_equals_never_having_stopped(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, die_at: int
) -> None:
    """Also in mid-epoch, across an epoch's end (4 steps), and before the first checkpoint."""
    config = make_config(task)
    loop.train(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_at(patch, die_at)
        with pytest.raises(Interrupted):
            loop.train(config, tmp_path / "cut")
    loop.train(config, tmp_path / "cut")
    name = f"{task}-run"
    assert equal(weights(tmp_path / "whole" / name), weights(tmp_path / "cut" / name))
    drop = ("images_per_second",)
    before, after = (
        [{k: v for k, v in line.items() if k not in drop} for line in read_metrics(tmp_path / part / name)]
        for part in ("whole", "cut")
    )
    assert [line["step"] for line in after] == [line["step"] for line in before]
    assert after[-1] == pytest.approx(before[-1])
    assert len({line["order"] for line in after}) == len(after)


def test_seeds_differ(make_config: Make, tmp_path: Path) -> None:
    for seed in (0, 1):
        loop.train(make_config(name=f"s{seed}", seed=seed, optim={"epochs": 1, "milestones": []}), tmp_path / "runs")
    assert not equal(weights(tmp_path / "runs" / "s0"), weights(tmp_path / "runs" / "s1"))


def test_another_configuration_in_the_run_directory_is_refused(make_config: Make, tmp_path: Path) -> None:
    loop.train(make_config(optim={"epochs": 1, "milestones": []}), tmp_path / "runs")
    other = make_config(optim={"epochs": 2, "milestones": []})
    with pytest.raises(MismatchError, match=r"another configuration \(optim.epochs is 1 there, 2 here\).*--resume"):
        loop.train(other, tmp_path / "runs")
    assert loop.train(other, tmp_path / "runs", resume=True).steps == 8
    run = tmp_path / "runs" / "words-run"
    assert newest_checkpoint(run)["step"] == 8  # type: ignore[index]
    exported = load_backbone(run).backbone.state_dict()
    assert all(torch.equal(weights(run)[f"b.{name}"], value) for name, value in exported.items())


def test_a_run_directory_in_use_is_refused(make_config: Make, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "words-run"
    with (
        exclusive_lock(run / ".lock", "it"),
        pytest.raises(BusyError, match=r"run directory .*words-run is in use by process \d+ on"),
    ):
        loop.train(make_config(), tmp_path / "runs")


def test_a_loss_that_is_not_finite_stops_the_run(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison_step(monkeypatch, 7)
    with pytest.raises(TrainingError, match=r"the loss is nan by step 8 .*lower optim\.lr"):
        loop.train(make_config(), tmp_path / "runs")
    state = newest_checkpoint(tmp_path / "runs" / "words-run")
    assert state is not None
    assert state["step"] == 5


def test_changed_words_stop_a_resumed_run(make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    config = make_config()
    with monkeypatch.context() as patch:
        interrupt_at(patch, 8)
        with pytest.raises(Interrupted):
            loop.train(config, tmp_path / "runs")
    assert config.task.store is not None
    assert config.shards is not None
    shutil.rmtree(config.task.store[0])
    write_store(config.task.store[0], open_index(config.shards), seed=9)
    with pytest.raises(MismatchError, match="words changed since the checkpoint"):
        loop.train(config, tmp_path / "runs")


@pytest.fixture
def permuted_config(make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Configurations whose store holds the rows in another order, in four chunks; the cache lies beside it."""
    monkeypatch.setattr("bowstore.words.store.layer.MIN_CHUNK_BYTES", 1)
    monkeypatch.setattr("bowstore.words.store.layer.CHUNK_STEP_ROWS", 20)
    config = make_config()
    assert config.task.store is not None
    store = open_store(config.task.store[0])
    order = np.random.default_rng(3).permutation(len(store))
    images = store.read_array("image_digest")
    assert images is not None
    write_words(
        tmp_path / "permuted.zarr",
        store.load_words()[order],
        key_hash_N=store.read_array("key_hash")[order],
        image_digest_N=images[order],
    )

    def make(targets: str, **changes: Any) -> TrainConfig:
        runtime = {"targets": targets, "storage": {"cache": str(tmp_path / "cache")}}
        return make_config(settings={"store": str(tmp_path / "permuted.zarr")}, runtime=runtime, **changes)

    return make


@pytest.mark.parametrize("form", ["count", "binary"])
def test_all_target_tiers_train_the_same_weights(
    make_config: Make, permuted_config: Make, tmp_path: Path, capfd: pytest.CaptureFixture[str], form: str
) -> None:
    optim = {"epochs": 2, "milestones": []}
    loop.train(make_config(settings={"form": form}, optim=optim), tmp_path / "plain")
    expected, lines = weights(tmp_path / "plain" / "words-run"), read_metrics(tmp_path / "plain" / "words-run")
    assert re.search(r"^targets: resident, 2\.30 kB of words \(at most a quarter of", capfd.readouterr().err, re.M)
    for targets in ("auto", "resident", "host", "streamed"):
        config = permuted_config(targets, optim=optim)
        config = config.model_copy(update={"task": config.task.model_copy(update={"form": form})})
        loop.train(config, tmp_path / targets)
        assert equal(weights(tmp_path / targets / "words-run"), expected), targets
        last = read_metrics(tmp_path / targets / "words-run")[-1]
        assert {name: last[name] for name in lines[-1] if name != "images_per_second"} == {
            name: value for name, value in lines[-1].items() if name != "images_per_second"
        }
        said = capfd.readouterr().err
        assert "(as set)" in said if targets != "auto" else "at most a quarter of" in said


def test_all_ranks_take_the_tier_of_the_one_with_the_least_room(
    make_config: Make, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    config, another = make_config(), iter([False, True, False])  # resident, host, streamed
    assert config.shards is not None
    monkeypatch.setattr(World, "any", lambda self, flag: next(another) or flag)
    build_task(config, open_index(config.shards), World(0, 1, torch.device("cpu")))
    assert "targets: host, 2.30 kB of words (another rank has no room for resident)" in capfd.readouterr().err


def test_a_run_resumes_in_another_target_tier(
    make_config: Make, permuted_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop.train(make_config(), tmp_path / "whole")
    for die_at, targets in ((7, "resident"), (7, "streamed")):  # from 0 to step 5, on to step 10
        with monkeypatch.context() as patch:
            interrupt_at(patch, die_at)
            with pytest.raises(Interrupted):
                loop.train(permuted_config(targets), tmp_path / "cut", resume=True)
    loop.train(permuted_config("host"), tmp_path / "cut")
    assert equal(weights(tmp_path / "cut" / "words-run"), weights(tmp_path / "whole" / "words-run"))


def test_loading_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingError, match=r"empty is not a run directory \(it has no config\.yaml\)"):
        load_backbone(tmp_path / "empty")
    with pytest.raises(MissingError, match=r"no checkpoint .*gone\.pt"):
        load_backbone(tmp_path / "gone.pt")
    with pytest.raises(MissingError, match=r"no file .*gone\.safetensors"):
        load_backbone(tmp_path / "gone.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"\xf0" * 50)
    with pytest.raises(CorruptError, match="is not a whole safetensors file"):
        load_backbone(tmp_path / "bad.safetensors")


def test_weights_of_another_network_are_named(tmp_path: Path) -> None:
    module = torch.nn.Linear(3, 2)
    told = r"network: 1 missing \(bias\), 1 unknown \(other\), 1 of another shape \(weight \(1, 3\), not \(2, 3\)\); it"
    with pytest.raises(MismatchError, match=told):
        saved.load_weights(module, {"weight": torch.zeros(1, 3), "other": torch.zeros(1)}, "f")


@pytest.mark.parametrize(("images", "steps"), [(40, 2), (1000, 4)])
def test_images_bounds_the_rows(make_config: Make, tmp_path: Path, images: int, steps: int) -> None:
    config = make_config(images=images, optim={"epochs": 1, "milestones": []})
    assert loop.train(config, tmp_path / "runs").steps == steps


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there() -> None:
    with pytest.raises(UsageError, match="device cuda was asked for, but there is no NVIDIA driver"):
        choose_device("cuda")


def test_sigterm_saves_and_the_next_run_goes_on(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os
    import signal

    config = make_config()
    loop.train(config, tmp_path / "whole")
    original, count = loop.train_step, 0

    def step(model: Any, optimizer: Any, task: Any, batch: Batch, rate: float, *, logged: bool) -> Measured:
        nonlocal count
        count += 1
        if count == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(model, optimizer, task, batch, rate, logged=logged)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", step)
        with pytest.raises(SystemExit) as stop:
            loop.train(config, tmp_path / "runs")
    assert stop.value.code == 143
    state = newest_checkpoint(tmp_path / "runs" / "words-run")
    assert state is not None
    assert state["step"] == 3
    loop.train(config, tmp_path / "runs")
    assert equal(weights(tmp_path / "runs" / "words-run"), weights(tmp_path / "whole" / "words-run"))


def test_a_full_disk_keeps_the_last_checkpoint(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    from contextlib import contextmanager

    from bowstore.train import checkpoint

    original, count = checkpoint.atomic_file, 0

    @contextmanager
    def full(path: Path) -> Any:
        nonlocal count
        count += 1
        with original(path) as file:
            yield file
            if count == 2:
                raise OSError(errno.ENOSPC, "No space left on device")

    loop.train(make_config(), tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "atomic_file", full)
        with pytest.raises(OSError, match="No space left"):
            loop.train(make_config(), tmp_path / "runs")
    run = tmp_path / "runs" / "words-run"
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-000000005.pt"]
    loop.train(make_config(), tmp_path / "runs")
    assert equal(weights(run), weights(tmp_path / "whole" / "words-run"))


def test_a_poisoned_state_is_never_saved(make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison_step(monkeypatch, 7)
    config = make_config(runtime={"log_every_steps": 100, "checkpoint_every_steps": 4})
    with pytest.raises(TrainingError, match=r"the loss is nan by step 8 .*--resume"):
        loop.train(config, tmp_path / "runs")
    assert newest_checkpoint(tmp_path / "runs" / "words-run")["step"] == 4  # type: ignore[index]


def test_a_resumed_run_takes_the_new_values(make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop.train(make_config(optim={"epochs": 1, "milestones": []}), tmp_path / "runs")
    seen = []
    original = loop.train_step

    def step(model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Measured:
        seen.append([group["weight_decay"] for group in optimizer.param_groups])
        return original(model, optimizer, *args, **kwargs)

    monkeypatch.setattr(loop, "train_step", step)
    other = make_config(optim={"epochs": 2, "milestones": [], "weight_decay": 0.125})
    loop.train(other, tmp_path / "runs", resume=True)
    assert len(seen) == 4
    assert all(values == [0.125, 0.0] for values in seen)


def test_a_start_that_failed_claims_nothing(make_config: Make, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"optim\.batch 30 must be a multiple of 4"):
        loop.train(make_config(optim={"batch": 30}), tmp_path / "runs")
    with pytest.raises(UsageError, match=r"model\.arch 'wrn-9-1'"):
        loop.train(make_config(model={"arch": "wrn-9-1"}), tmp_path / "runs")
    assert loop.train(make_config(optim={"epochs": 1, "milestones": []}), tmp_path / "runs").steps == 4


def test_a_finished_run_without_checkpoints_stays_finished(make_config: Make, tmp_path: Path) -> None:
    import shutil

    config = make_config(optim={"epochs": 1, "milestones": []})
    loop.train(config, tmp_path / "runs")
    run = tmp_path / "runs" / "words-run"
    exported = (run / "backbone.safetensors").read_bytes()
    shutil.rmtree(run / "checkpoints")
    assert "finished already" in loop.train(config, tmp_path / "runs").text()
    assert (run / "backbone.safetensors").read_bytes() == exported


@pytest.mark.parametrize(("arch", "contiguous"), [("wrn-10-1", False), ("wrn-10-4", True)])
def test_a_run_lays_its_network_out_by_the_rule(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arch: str, contiguous: bool
) -> None:
    """Of weights in the other format, maps would follow them, whatever the images are."""

    def look(model: torch.nn.Module, *_: object, **__: object) -> None:
        weights = [p for p in model.parameters() if p.ndim == 4 and p.shape[-1] > 1]
        assert all(weight.is_contiguous() == contiguous for weight in weights)
        raise Interrupted

    monkeypatch.setattr(loop, "train_step", look)
    with pytest.raises(Interrupted):
        loop.train(make_config("rotation", model={"arch": arch}), tmp_path / "runs")
