"""Whether the step is compiled: by the configuration alone, said where it cannot be, the same run after a stop."""

import functools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from served import SERVER

from bowstore.config import ModelConfig, bundled_configs
from bowstore.environment import choose_device
from bowstore.models.registry import build_backbone
from bowstore.models.saved import newest_checkpoint
from bowstore.models.weights import content_digest
from bowstore.runs import read_metrics
from bowstore.train import compiling, loop
from bowstore.train.compiling import another_way, compiles, run_flops
from bowstore.train.config import RuntimeConfig, TrainConfig, load_train_config
from bowstore.train.tasks.task import Network, Task, pooled

Make = Callable[..., TrainConfig]
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def task_of(arch: str, views: int = 1) -> Task:
    with torch.device("meta"):
        network = Network(build_backbone(ModelConfig(arch=arch)), torch.nn.Identity(), pooled)
    return Task(network=network, bring=tuple, make=tuple, loss=tuple, inputs={}, views=views)  # type: ignore[arg-type]


def test_long_runs_of_narrow_networks_are_compiled_on_a_cpu_and_all_runs_on_a_gpu(make_config: Make) -> None:
    config = make_config(model={"arch": "wrn-10-1"}, view={"size": 32}, optim={"batch": 32})
    narrow, wide = task_of("wrn-10-1"), task_of("wrn-10-4")
    assert config.runtime.compile == "auto"
    flops = run_flops(config, narrow, 1)
    long = int(1e14 / flops) + 1
    assert [compiles(config, narrow, steps, CPU) for steps in (1, long - 2, long)] == [False, False, True]
    for wider in (task_of("wrn-16-2"), wide):
        assert not compiles(config, wider, 1000 * long, CPU)
    assert compiles(config, narrow, 1, GPU)
    for setting in (True, False):
        fixed = config.model_copy(update={"runtime": RuntimeConfig(compile=setting)})
        assert compiles(fixed, narrow, 1, CPU) == compiles(fixed, wide, 1, GPU) == setting


def test_operations_of_a_run_are_counted(make_config: Make) -> None:
    """WRN-10-1 at 32 px: 3x3 and 1x1 convolutions by hand, two operations a product, three passes."""
    config = make_config(model={"arch": "wrn-10-1"}, view={"size": 32}, optim={"batch": 8})
    macs = 1024 * 9 * 3 * 16  # stem
    for c_in, c_out, cells in ((16, 16, 1024), (16, 32, 256), (32, 64, 64)):
        macs += cells * 9 * (c_in * c_out + c_out * c_out) + (cells * c_in * c_out if c_in != c_out else 0)
    assert run_flops(config, task_of("wrn-10-1"), 5) == 3 * 2 * macs * 8 * 5
    assert run_flops(config, task_of("wrn-10-1", views=4), 5) == 4 * 3 * 2 * macs * 8 * 5


@pytest.mark.parametrize(
    "name", ["demo_rotnet.yaml", "demo_bownet.yaml", "cifar10_rotnet_small.yaml", "cifar10_bownet_small.yaml"]
)
def test_runs_of_minutes_stay_as_they_are(name: str) -> None:
    config = load_train_config(bundled_configs() / name)
    per_pass = (10_000 if "demo" in name else 50_000) // config.optim.batch
    steps = loop.total_steps(config.optim, per_pass)
    assert not compiles(config, task_of(config.model.arch, views=4), steps, choose_device("cpu"))


def traced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Compile without a compiler: traced and differentiated ahead of time, run by PyTorch's own operators."""
    original, count = torch.compile, []

    def compile_so(model: Any, **kwargs: Any) -> Any:
        count.append(1)
        return original(model, backend="aot_eager", dynamic=kwargs["dynamic"])

    monkeypatch.setattr(torch, "compile", compile_so)
    return count


@pytest.mark.parametrize("task", ["rotation", "words"])
def test_a_compiled_run_that_stopped_is_the_same_run(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], task: str
) -> None:
    assert traced(monkeypatch) == []
    config = make_config(task, runtime={"compile": True, "checkpoint_every_steps": 3, "log_every_steps": 4})
    loop.train(config.model_copy(update={"name": "whole"}), tmp_path / "runs")
    assert "the first step is compiled" in capfd.readouterr().err
    original, count = loop.train_step, 0

    def step(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == 9:
            raise KeyError("power cut")
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", step)
        with pytest.raises(KeyError):
            loop.train(config, tmp_path / "runs")
    loop.train(config, tmp_path / "runs")
    assert "last digits" not in capfd.readouterr().err
    whole, cut = (newest_checkpoint(tmp_path / "runs" / name) for name in ("whole", config.name))
    assert whole is not None
    assert cut is not None
    assert whole["compiled"]
    for part in ("backbone", "head", "optimizer"):
        assert content_digest(whole[part]) == content_digest(cut[part]), part
    logs = [
        [{k: v for k, v in line.items() if k != "images_per_second"} for line in read_metrics(tmp_path / "runs" / name)]
        for name in ("whole", config.name)
    ]
    assert logs[0] == logs[1]
    torch._dynamo.reset()


def compiled_until_killed(config: TrainConfig, runs: Path, cache: Path) -> None:
    """In a process of its own, which compiles anew."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    torch.set_num_threads(1)
    original, taken = loop.train_step, 0

    def step(*args: Any, **kwargs: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    with patch.object(loop, "train_step", step):
        loop.train(config, runs)


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_bits_in_what_inductor_makes(make_config: Make, tmp_path: Path) -> None:
    """Compiled in two processes, neither of which has the other's cache: the end is that of a run in one piece."""
    from torch._inductor.utils import fresh_cache

    config = make_config(runtime={"compile": True, "checkpoint_every_steps": 3})
    killed = SERVER.Process(target=compiled_until_killed, args=(config, tmp_path / "runs", tmp_path / "cache"))
    killed.start()
    with fresh_cache():
        loop.train(config.model_copy(update={"name": "whole"}), tmp_path / "runs")
        killed.join()
        assert killed.exitcode == -signal.SIGKILL
        kept = newest_checkpoint(tmp_path / "runs" / config.name)
        assert kept is not None
        assert (kept["step"], kept["compiled"]) == (6, True)
        loop.train(config, tmp_path / "runs")
    torch._dynamo.reset()
    whole, resumed = (newest_checkpoint(tmp_path / "runs" / name) for name in ("whole", config.name))
    assert whole is not None
    assert resumed is not None
    for part in ("backbone", "head", "optimizer"):
        assert content_digest(whole[part]) == content_digest(resumed[part]), part


def test_going_on_in_another_way_is_said(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    traced(monkeypatch)
    config = make_config(optim={"epochs": 1, "milestones": []})
    loop.train(config, tmp_path / "runs")
    longer = make_config(optim={"epochs": 2, "milestones": []}, runtime={"compile": True})
    loop.train(longer, tmp_path / "runs", resume=True)
    assert (
        "the step was not compiled until this checkpoint, and now it is: last digits differ" in capfd.readouterr().err
    )
    assert another_way(True, False).startswith("the step was compiled until this checkpoint, and now it is not: ")
    assert another_way(None, True) == another_way(True, True) == another_way(False, False) == ""
    torch._dynamo.reset()


def test_without_a_compiler_a_run_trains_as_it_is(
    make_config: Make, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    optim = {"epochs": 1, "milestones": []}
    loop.train(make_config(name="plain", optim=optim, runtime={"compile": False}), tmp_path / "runs")
    import torch._inductor.config as inductor
    from torch._inductor.utils import fresh_cache

    # Not by monkeypatch, which leaves the setting deleted: other tests compile after this one.
    with inductor.patch({"cpp.cxx": (None, "/nowhere/g++")}), fresh_cache():
        loop.train(make_config(name="asked", optim=optim, runtime={"compile": True}), tmp_path / "runs")
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("not compiled: ")]
    assert len(said) == 1
    assert said[0].startswith("not compiled: PyTorch's compiler cannot work here (")
    assert said[0].endswith("; the step runs as it is, more slowly")
    plain, asked = (newest_checkpoint(tmp_path / "runs" / name) for name in ("plain", "asked"))
    assert plain is not None
    assert asked is not None
    assert not asked["compiled"]
    assert content_digest(plain["backbone"]) == content_digest(asked["backbone"])
    torch._dynamo.reset()


def test_one_rank_without_a_compiler_keeps_all_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "compiler_problem", lambda device: "")
    world = loop.World(1, 2, CPU)
    for others, expected in ((False, True), (True, False)):
        either = functools.partialmethod(lambda self, flag, others: flag or others, others=others)
        monkeypatch.setattr(loop.World, "any", either)
        assert compiling.compiles_here(True, world) == expected
