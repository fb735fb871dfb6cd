"""The task `linear`: heads of all layers on a trunk that does not move, each learning as if it were alone."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from noise_batches import ALONE, made
from torch import Tensor

from bowstore import runs
from bowstore.errors import MismatchError, MissingError, UsageError
from bowstore.models.pooling import choose_pool
from bowstore.models.saved import load_backbone, newest_checkpoint
from bowstore.runs import read_metrics
from bowstore.train import loop
from bowstore.train.compiling import run_flops
from bowstore.train.config import TrainConfig
from bowstore.train.step import build_objective, build_optimizer
from bowstore.train.tasks.linear import load_heads
from bowstore.train.verify import verify_run

Make = Callable[..., TrainConfig]
SHORT = {"epochs": 1, "milestones": []}
NAMES = ["conv1", "block1", "block2", "block3", "pooled"]


@pytest.fixture
def trunk(make_config: Make, tmp_path: Path) -> Path:
    """A run whose running statistics are those of images."""
    loop.train(make_config("rotation", name="trunk", optim=SHORT), tmp_path / "runs")
    return tmp_path / "runs" / "trunk"


def tensors(run: Path, part: str) -> dict[str, Tensor]:
    state = newest_checkpoint(run)
    assert state is not None
    found: dict[str, Tensor] = state[part]
    return found


@pytest.mark.parametrize("norm", ["batch", "affine", "none"])
def test_each_heads_gradient_is_that_of_its_own_loss(make_config: Make, trunk: Path, norm: str) -> None:
    """In float64, of heads that are built by hand on maps that are pooled by hand."""
    task, batch = made(make_config("linear", {"start": str(trunk), "norm": norm}))
    network = copy.deepcopy(task.network)
    network = network.double()
    task.modes(task.network)
    images_BCHW, label_B = task.prepare(batch)
    loss, means = task.loss(task.network(images_BCHW), label_B)
    loss.backward()
    backbone = network.backbone.eval()
    with torch.no_grad():
        maps = backbone.feature_maps(images_BCHW.double(), backbone.layers)
    pooled = [choose_pool(*map_Bchw.shape[1:])(map_Bchw) for map_Bchw in maps.values()]
    pooled.append(maps["block3"].mean((2, 3))[:, :, None, None])
    heads: Any = network.head
    total, hits = torch.zeros((), dtype=torch.float64), []
    for pooled_Bchw, head, trained in zip(pooled, heads, task.network.head, strict=True):  # type: ignore[call-overload]
        values_Bchw = pooled_Bchw
        if norm != "none":
            mean, var = pooled_Bchw.mean((0, 2, 3), keepdim=True), pooled_Bchw.var((0, 2, 3), False, keepdim=True)
            values_Bchw = (pooled_Bchw - mean) / (var + 1e-5).sqrt()
        if norm == "affine":
            values_Bchw = values_Bchw * head.norm.weight[:, None, None] + head.norm.bias[:, None, None]
        logits_BK = F.linear(values_Bchw.flatten(1), head.linear.weight, head.linear.bias)
        own = F.cross_entropy(logits_BK, label_B)
        parameters = dict(head.named_parameters())
        exacts = torch.autograd.grad(own, list(parameters.values()))
        for name, exact in zip(parameters, exacts, strict=True):
            found = trained.get_parameter(name).grad
            assert (found.double() - exact).norm() <= 2e-6 * exact.norm() + 1e-9, name
        total = total + own.detach()
        hits.append(float((logits_BK.argmax(1) == label_B).double().mean()))
    assert loss.item() == pytest.approx(total.item(), rel=1e-6)
    assert [means[f"accuracy_{name}"].item() for name in NAMES] == pytest.approx(hits)
    assert means["accuracy"].item() == pytest.approx(sum(hits) / len(hits))


def test_the_trunk_stays_as_it_is_and_its_heads_learn(make_config: Make, trunk: Path, tmp_path: Path) -> None:
    """Neither weight decay nor running statistics move it, in a run that stops and goes on."""
    view = {"grey": 0.0, "hue": 0.0}
    for epochs in (2, 8):
        optim = {"epochs": epochs, "milestones": [], "weight_decay": 0.1}
        config = make_config("linear", {"start": str(trunk)}, optim=optim, view=view)
        loop.train(config, tmp_path / "runs", resume=True)
    run = tmp_path / "runs" / "linear-run"
    before, after = load_backbone(trunk).backbone.state_dict(), tensors(run, "backbone")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert runs.weights_sha256(run) == runs.weights_sha256(trunk)  # the export is the same trunk
    first, *_, last = read_metrics(run)
    assert last.keys() >= {"accuracy", "chance_loss", *(f"accuracy_{name}" for name in NAMES)}
    assert last["accuracy_block1"] > 0.9 > first["accuracy_block1"]
    assert last["loss"] < first["loss"]
    assert not verify_run(run).problems
    assert runs.descent(runs.read_lineage(run) or {}) == ("rotation", "trunk", "linear", "linear-run")


def test_neither_optimiser_nor_ddp_nor_autograd_knows_the_trunk(make_config: Make, trunk: Path) -> None:
    config = make_config("linear", {"start": str(trunk), "layers": ["block2", "pooled"]})
    task, batch = made(config)
    heads = list(task.network.head.parameters())
    listed = [
        parameter for group in build_optimizer(task.network, config.optim).param_groups for parameter in group["params"]
    ]
    assert {id(parameter) for parameter in listed} == {id(parameter) for parameter in heads}
    assert len(heads) == 4
    assert [parameter for parameter in task.network.parameters() if parameter.requires_grad] == heads  # DDP's rule
    passes: list[bool] = []
    model = build_objective(task, config, ALONE, compiled=False)
    with task.network.backbone.stages["conv1"].register_forward_hook(  # type: ignore[operator, union-attr]
        lambda *_: passes.append(torch.is_grad_enabled())
    ):
        loss, _, logits, _ = model(*task.bring(batch))
    assert passes == [False], "the trunk runs once, without gradients"
    assert [tuple(each.shape) for each in logits] == [(16, 4), (16, 4)]
    loss.backward()
    assert all(parameter.grad is None for parameter in task.network.backbone.parameters())
    whole = made(make_config("supervised"))[0]
    assert run_flops(config, whole, 5) == 3 * run_flops(config, task, 5)  # one pass, and no backward ones


def test_a_run_that_stopped_is_the_same_run_and_its_heads_can_be_loaded(
    make_config: Make, trunk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config("linear", {"start": str(trunk), "layers": ["block1", "pooled"]})
    loop.train(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        original, steps = loop.train_step, []

        def dies(*args: Any, **kwargs: Any) -> Any:
            steps.append(1)
            if len(steps) == 8:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        patch.setattr(loop, "train_step", dies)
        with pytest.raises(KeyboardInterrupt):
            loop.train(config, tmp_path / "runs")
    loop.train(config, tmp_path / "runs")
    run = tmp_path / "runs" / "linear-run"
    heads, whole = tensors(run, "head"), tensors(tmp_path / "whole" / "linear-run", "head")
    assert {name.split(".", 1)[1] for name in heads} >= {"linear.weight", "linear.bias", "norm.running_mean"}
    assert all(torch.equal(heads[name], whole[name]) for name in whole)
    network, names = load_heads(run)
    assert names == ["block1", "pooled"]
    assert not any(module.training for module in network.modules())
    with torch.no_grad():
        images_BCHW = torch.randn(2, 3, 16, 16)
        logits_BK = network(images_BCHW)[1]
        pooled_BC = load_backbone(trunk).backbone(images_BCHW)
    mean, var = heads["1.norm.running_mean"], heads["1.norm.running_var"]
    normed_BC = (pooled_BC - mean) / (var + 1e-5).sqrt()
    expected = F.linear(normed_BC, heads["1.linear.weight"], heads["1.linear.bias"])
    torch.testing.assert_close(logits_BK, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(MismatchError, match=r"run .*trunk is of task rotation; name one of task linear"):
        load_heads(trunk)
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingError, match=r"run .*empty holds no checkpoint, and heads are in no other file; train"):
        load_heads(tmp_path / "empty")


def test_a_layer_that_is_not_there_and_one_twice_are_refused(
    make_config: Make, trunk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for layers, message in (
        (["conv4"], r"wrn-10-1 has no layer 'conv4'; its layers are conv1, block1, block2, block3"),
        (["conv1", "conv1"], r"task\.layers: \['conv1', 'conv1'\] must be different ones, one at least"),
    ):
        with pytest.raises(UsageError, match=message):
            made(make_config("linear", {"start": str(trunk), "layers": layers}))
    with pytest.raises(UsageError, match=r"view\.cutmix must be false for task linear"):
        make_config("linear", view={"cutmix": True})
    assert "random weights" not in capsys.readouterr().err
    made(make_config("linear"))
    assert capsys.readouterr().err == (
        "task linear: the frozen network has random weights; task.start names the run whose network it is to be\n"
    )
