"""The step: one graph from a batch's tensors to the loss, its optimiser, padded stems, and how devices are set."""

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._inductor.graph import GraphLowering

from bowstore.data.index import open_index
from bowstore.data.plan import plans
from bowstore.data.views import Batch
from bowstore.errors import TrainingError, UsageError
from bowstore.train import loop, step
from bowstore.train.config import TrainConfig
from bowstore.train.distributed import World
from bowstore.train.step import (
    PaddedConv2d,
    build_objective,
    build_optimizer,
    load_optimizer,
    pad_stem,
    train_step,
    tuned,
)
from bowstore.train.tasks.task import Task, build_task
from bowstore.words.targets.bags import unpacked

Make = Callable[..., TrainConfig]
ALONE = World(0, 1, torch.device("cpu"))


def made(config: TrainConfig) -> tuple[Task, Batch]:
    """The task, and a batch of noise under its first plan."""
    assert config.shards is not None
    index = open_index(config.shards)
    task = build_task(config, index, ALONE)
    plan = next(plans(loop.data_schedule(config, index, ALONE), index, config.view, start=0, stop=1))
    images_BCHW = torch.randn(len(plan.rows), 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return task, Batch(images_BCHW.contiguous(memory_format=torch.channels_last), plan)


@pytest.mark.parametrize("changes", [
    {"task": "rotation"}, {"task": "location"}, {"task": "supervised"}, {"task": "linear"},
    {}, {"settings": {"form": "binary"}}, {"view": {"cutmix": False}},
])  # fmt: skip
def test_inputs_network_targets_and_loss_are_one_graph(make_config: Make, changes: dict[str, Any]) -> None:
    """Traced without a break; the values of what was traced are those of the step as it is."""
    config = make_config(**changes)
    task, batch = made(config)
    model = build_objective(task, config, ALONE, compiled=False)
    traced = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    tensors, parameters = task.bring(batch), [one for one in model.parameters() if one.requires_grad]
    results = []
    for one in (model, traced):
        loss, means, logits, features = one(*tensors)
        told = [*(logits if isinstance(logits, tuple) else (logits,)), *([] if features is None else [features])]
        results.append([loss, *told, *means.values(), *torch.autograd.grad(loss, parameters)])
    torch._dynamo.reset()
    for found, expected in zip(results[1], results[0], strict=True):
        assert (found.double() - expected.double()).norm() <= 1e-5 * expected.double().norm() + 1e-9


@pytest.mark.parametrize("form", ["count", "binary"])
def test_the_objective_is_the_tasks_loss(make_config: Make, form: str) -> None:
    config = make_config(settings={"form": form})
    task, batch = made(config)
    model = build_objective(task, config, ALONE, compiled=False)
    images_BCHW, bag = task.prepare(batch)
    logits_BK = task.network(images_BCHW)
    dense_BK = torch.zeros_like(logits_BK).scatter_add_(1, bag.words_BM, bag.weights_BM)
    expected = -(torch.log_softmax(logits_BK, 1) * dense_BK).sum(1).mean()
    loss, means, logits, features = model(*task.bring(batch))
    assert torch.equal(features, task.network.features(images_BCHW))
    assert not features.requires_grad
    assert means == {}
    assert torch.equal(logits, logits_BK)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)


def test_all_four_rotations_lie_as_the_network_takes_them(make_config: Make) -> None:
    task, batch = made(make_config("rotation"))
    turned_BCHW, label_B = task.prepare(batch)
    expected = torch.cat([torch.rot90(batch.images_BCHW, quarter, (2, 3)) for quarter in range(4)])
    assert torch.equal(turned_BCHW, expected)
    assert turned_BCHW.is_contiguous(memory_format=torch.channels_last)
    assert label_B.tolist() == [quarter for quarter in range(4) for _ in batch.plan.rows]


def test_scalars_are_those_of_logged_steps_before_the_update(make_config: Make) -> None:
    config = make_config()
    task, batch = made(config)
    model, optimizer = build_objective(task, config, ALONE, compiled=False), build_optimizer(task.network, config.optim)
    gamma = task.network.head.gamma
    quiet = train_step(model, optimizer, task, batch, 0.05)
    assert quiet.means.keys() == {"loss"}
    assert quiet.scalars == {}
    before = gamma.item()
    told = train_step(model, optimizer, task, batch, 0.05, logged=True)
    assert told.scalars.keys() == {"excess_loss", "gamma", "top_word_weight"}
    assert told.scalars["gamma"].item() == before != gamma.item()
    assert not any(value.requires_grad for value in (*told.means.values(), *told.scalars.values()))


def test_the_optimiser_is_stochastic_gradient_descent(make_config: Make) -> None:
    """Fused: the arithmetic of PyTorch's plain one, to a last digit, with each group's own weight decay."""
    config = make_config(optim={"decay_norm_and_bias": False, "weight_decay": 0.01})
    task, _ = made(config)
    network = task.network
    oracle = copy.deepcopy(network)
    ours = build_optimizer(network, config.optim)
    assert ours.param_groups[0]["fused"]
    twins = dict(zip(network.parameters(), oracle.parameters(), strict=True))
    groups = [{**group, "params": [twins[p] for p in group["params"]], "fused": False} for group in ours.param_groups]
    theirs = torch.optim.SGD(groups, foreach=False)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        for parameter, twin in twins.items():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            twin.grad = parameter.grad.clone()
        ours.step()
        theirs.step()
    for parameter, twin in twins.items():
        torch.testing.assert_close(parameter, twin, rtol=1e-6, atol=1e-9)


def test_momenta_are_laid_out_as_their_parameters() -> None:
    """Those that are loaded into a network which lies otherwise in memory keep their values, and so do its steps."""
    weights = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))

    def made(layout: torch.memory_format, *, fused: bool) -> tuple[torch.nn.Parameter, torch.optim.SGD]:
        parameter = torch.nn.Parameter(weights.clone(memory_format=layout))
        return parameter, torch.optim.SGD([parameter], lr=0.1, momentum=0.9, fused=fused)

    def step_along(parameter: torch.nn.Parameter, optimizer: torch.optim.SGD) -> None:
        parameter.grad = torch.empty_like(parameter).copy_(weights.square())
        optimizer.step()

    there, plain = made(torch.contiguous_format, fused=False)
    step_along(there, plain)
    here, fused = made(torch.channels_last, fused=True)
    load_optimizer(fused, copy.deepcopy(plain.state_dict()))
    momentum = fused.state[here]["momentum_buffer"]
    assert torch.equal(momentum, plain.state[there]["momentum_buffer"])
    assert momentum.stride() == here.stride() != there.stride()
    with torch.no_grad():
        here.copy_(there)
    for _ in range(3):
        step_along(there, plain)
        step_along(here, fused)
        torch.testing.assert_close(here, there, rtol=1e-6, atol=1e-7)


# --- padded stems


@pytest.mark.parametrize("arch", ["wrn-10-1", "timm:test_resnet"])
def test_a_padded_stem_is_the_same_convolution(make_config: Make, arch: str) -> None:
    config = make_config("rotation", model={"arch": arch})
    task, batch = made(config)
    names, results = list(task.network.state_dict()), []
    images_BCHW, _ = task.prepare(batch)
    state = copy.deepcopy(task.network.state_dict())
    for _ in range(2):
        task.network.load_state_dict(state)
        logits_B4 = task.network(images_BCHW)
        results.append(
            [logits_B4.detach(), *torch.autograd.grad(logits_B4.square().sum(), list(task.network.parameters()))]
        )
        if len(results) == 1:
            pad_stem(task.network)
    assert sum(isinstance(module, PaddedConv2d) for module in task.network.modules()) == 1
    assert list(task.network.state_dict()) == names
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_a_stem_that_cannot_be_padded_is_refused(make_config: Make) -> None:
    task, _ = made(make_config("rotation"))
    stage: Any = task.network.backbone
    stage.stages["conv1"].padding_mode = "reflect"
    with pytest.raises(
        UsageError, match=r"^runtime\.pad_stem: wrn-10-1 has no single plain convolution that takes the"
    ):
        pad_stem(task.network)


def test_a_run_with_a_padded_stem_is_the_same_run(make_config: Make, tmp_path: Any) -> None:
    for name, pad in (("plain", False), ("padded", True)):
        optim = {"epochs": 1, "milestones": []}
        loop.train(make_config(name=name, runtime={"pad_stem": pad}, optim=optim), tmp_path / "runs")
    plain, padded = (loop.saved.load_backbone(tmp_path / "runs" / name).backbone for name in ("plain", "padded"))
    for (name, expected), found in zip(plain.state_dict().items(), padded.state_dict().values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5, msg=name)


# --- a GPU's settings, at the seam


class FakeStream:
    def __init__(self, device: torch.device, priority: int = 0) -> None:
        self.priority, self.waited = priority, []

    def wait_stream(self, other: "FakeStream") -> None:
        self.waited.append(other)


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[FakeStream]:
    current = [FakeStream(torch.device("cuda"))]

    @contextmanager
    def use(stream: FakeStream) -> Iterator[None]:
        current.append(stream)
        try:
            yield
        finally:
            current.remove(stream)

    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", use)
    step._first_stream.cache_clear()
    yield current
    step._first_stream.cache_clear()


@pytest.mark.parametrize("amp", [True, False])
def test_a_gpu_is_set_for_training_and_set_back(streams: list[FakeStream], amp: bool) -> None:
    def settings() -> tuple[bool, str]:
        return torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.fp32_precision

    def fail() -> None:
        with tuned(torch.device("cuda", 0), amp=amp):
            seen.extend([*streams, settings()])
            assert torch.get_float32_matmul_precision() == ("high" if amp else "highest"), "compilers ask for both"
            raise KeyError

    before, seen = settings(), list[Any]()
    with pytest.raises(KeyError):
        fail()
    outside, inside, within = seen
    assert within == (True, "tf32" if amp else before[1])
    assert inside.priority == -1
    assert inside.waited == [outside]  # weights that were made outside are there
    assert settings() == before
    assert streams == [outside]
    assert outside.waited == [inside]
    with tuned(torch.device("cuda", 0), amp=amp):
        assert streams[-1] is inside, "memory is kept for the stream that it was taken for"
    with tuned(torch.device("cpu"), amp=True):
        assert settings() == before


def test_a_step_that_cannot_be_compiled_says_so(make_config: Make) -> None:
    config = make_config()
    task, batch = made(config)
    optimizer = build_optimizer(task.network, config.optim)

    def broken(graph: Any, inputs: Any) -> Any:
        raise ValueError("no such kernel")

    model = torch.compile(build_objective(task, config, ALONE, compiled=False), backend=broken)
    with pytest.raises(
        TrainingError, match=r"^the step cannot be compiled \(.*no such kernel.*\); set runtime\.compile to"
    ):
        train_step(model, optimizer, task, batch, 0.1)
    torch._dynamo.reset()

    def fails(*tensors: Tensor) -> Any:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match=r"^out of memory$"):
        train_step(fails, optimizer, task, batch, 0.1)  # type: ignore[arg-type]


def test_words_above_32767_come_through() -> None:
    packed_BM = torch.from_numpy(np.array([[0, 32767, 32768, 65534]], np.uint16).view(np.int16))
    assert unpacked(packed_BM).tolist() == [[0, 32767, 32768, 65534]]


def test_the_compiled_step_keeps_maps_contiguous(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the program that Inductor writes for the forward; left alone, it lays all maps out with channels last."""
    config = make_config("rotation", model={"arch": "wrn-10-4"})
    task, batch = made(config)
    network = loop.placed_network(task, config, ALONE)
    assert network.memory_format(ALONE.device) == torch.contiguous_format
    programs = []

    def written(graph: GraphLowering) -> None:
        programs.append(graph.codegen()[0].value)
        raise NotImplementedError  # C++ would take half a minute

    monkeypatch.setattr(GraphLowering, "compile_to_module", written)
    torch._dynamo.reset()
    with torch._inductor.config.patch(fx_graph_cache=False), pytest.raises(RuntimeError, match="NotImplementedError"):
        build_objective(task, config, ALONE, compiled=True)(*task.bring(batch))
    torch._dynamo.reset()
    views = 4 * len(batch.plan.rows)
    found = re.findall(rf"\(({views}), (\d\d+), (\d+), \3\), \((\d+), (\d+), \d+, \d+\)", programs[0])
    maps = [tuple(map(int, numbers)) for numbers in found]
    assert {channels for _, channels, *_ in maps} == {16, 64, 128, 256}
    for _, channels, side, of_image, of_channel in maps:
        assert (of_image, of_channel) == (channels * side**2, side**2)
