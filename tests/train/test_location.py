"""Relative patch location: where patches are cut, what becomes of them, and what is learned of their pairs."""

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch import Tensor

from bowstore.cli import main
from bowstore.data.index import Index, open_index
from bowstore.data.plan import Schedule, plans
from bowstore.data.views import Batch
from bowstore.errors import UsageError
from bowstore.train.compiling import run_flops
from bowstore.train.config import TrainConfig
from bowstore.train.distributed import World
from bowstore.train.step import build_objective, build_optimizer, train_step
from bowstore.train.tasks.location import corners, cut, standardised
from bowstore.train.tasks.settings import LocationSettings
from bowstore.train.tasks.task import Task, build_task

Make = Callable[..., TrainConfig]
ALONE = World(0, 1, torch.device("cpu"))


def opened(config: TrainConfig) -> Index:
    assert config.shards is not None
    return open_index(config.shards)


def batches(config: TrainConfig, start: int, stop: int, *, rank: int = 0, world: int = 1) -> list[Batch]:
    """What each image shows follows from its row alone."""
    index, side = opened(config), config.view.size
    schedule = Schedule(len(index), config.optim.batch, config.seed, rank, world)
    made = []
    for plan in plans(schedule, index, config.view, start=start, stop=stop):
        draws = [torch.randn(3, side, side, generator=torch.Generator().manual_seed(row)) for row in plan.rows.tolist()]
        made.append(Batch(torch.stack(draws).contiguous(memory_format=torch.channels_last), plan))
    return made


def made(config: TrainConfig) -> tuple[Task, Batch]:
    return build_task(config, opened(config), ALONE), batches(config, 0, 1)[0]


# --- where patches are cut


@pytest.mark.parametrize(("settings", "side"), [
    ({"patch": 24, "jitter": 8}, 96), ({"patch": 21, "jitter": 7}, 84), ({"patch": 5, "jitter": 2, "gap": 3}, 32),
    ({"patch": 7, "jitter": 0, "gap": 1}, 23),
])  # fmt: skip
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_patches_are_those_pixels(
    make_config: Make, settings: dict[str, int], side: int, layout: torch.memory_format
) -> None:
    """Of images whose pixels say where they are."""
    config = make_config("location", settings, view={"size": side}, optim={"batch": 64})
    (batch,), task = batches(config, 0, 1), LocationSettings(**settings)
    count, patch, reach = len(batch.plan.rows), task.patch, task.patch + task.jitter
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    images_BCHW = torch.stack([torch.stack([torch.full_like(y, own), y, x]) for own in range(count)]).float()
    patches = cut(images_BCHW.contiguous(memory_format=layout), torch.from_numpy(corners(batch.plan, task)), patch)
    assert patches.shape == (9 * count, 3, patch, patch)
    assert patches.is_contiguous(memory_format=torch.channels_last)
    first = (side - 3 * reach - 2 * task.gap) // 2
    offsets = []
    for own, image in enumerate(patches.view(count, 9, 3, patch, patch)):
        seen = np.zeros((side, side), int)
        for place, pixels in enumerate(image):
            assert (pixels[0] == own).all()
            rows, columns = (pixels[1, :, 0].int().tolist(), pixels[2, 0].int().tolist())
            assert torch.equal(pixels[1], pixels[1, :, :1].expand(patch, patch))
            assert torch.equal(pixels[2], pixels[2, :1].expand(patch, patch))
            assert rows == list(range(rows[0], rows[0] + patch))
            assert columns == list(range(columns[0], columns[0] + patch))
            seen[np.ix_(rows, columns)] += 1
            offsets.append(
                (rows[0] - first - place // 3 * (reach + task.gap), columns[0] - first - place % 3 * (reach + task.gap))
            )
        assert seen.max() == 1
        assert seen.sum() == 9 * patch**2
        for along in (seen, seen.T):  # nothing is cut from between the cells
            for edge in (first + reach, first + 2 * reach + task.gap):
                assert not along[edge : edge + task.gap].any()
    for axis in zip(*offsets, strict=True):
        assert set(axis) == set(range(task.jitter + 1)), "each place in the cell, its first and last among them"


def test_places_in_a_cell_are_equally_likely(make_config: Make) -> None:
    """Also of patches of one image, and of the two axes: 72 images of 18 draws each over four places."""
    settings = LocationSettings(patch=4, jitter=3)
    config = make_config("location", settings.model_dump(), view={"size": 21}, optim={"batch": 72, "epochs": 100})
    index = opened(config)
    every = plans(Schedule(len(index), 72, 0), index, config.view, start=0, stop=20)
    moved = np.concatenate([corners(plan, settings) for plan in every]) % 7
    for one, other in (((4, 0), (4, 1)), ((0, 0), (8, 0)), ((1, 1), (7, 0))):
        counts = np.zeros((4, 4))
        np.add.at(counts, (moved[:, one[0], one[1]], moved[:, other[0], other[1]]), 1)
        expected = len(moved) / 16
        assert ((counts - expected) ** 2 / expected).sum() < 37.7  # chi-squared of 15 degrees: one of a thousand


def test_ranks_and_resumed_runs_cut_the_same_patches(make_config: Make) -> None:
    config = make_config("location")
    task = build_task(config, opened(config), ALONE)
    alone = [task.prepare(batch) for batch in batches(config, 0, 3)]
    halves = [batches(config, 0, 3, rank=rank, world=2) for rank in range(2)]
    for (patches, place_N), *parts in zip(alone, *halves, strict=True):
        found = [task.prepare(part) for part in parts]
        assert torch.equal(torch.cat([inputs for inputs, _ in found]), patches)
        assert torch.equal(torch.cat([label for _, label in found]), place_N)
    assert torch.equal(task.prepare(batches(config, 2, 3)[0])[0], alone[2][0])
    assert not torch.equal(alone[0][0], alone[2][0])


# --- what becomes of them


def test_each_patch_has_its_own_mean_and_deviation() -> None:
    scale_N111 = 10.0 ** torch.arange(-2, 3).view(5, 1, 1, 1)
    raw = 3 + scale_N111 * torch.rand(5, 3, 7, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = standardised(raw.float().contiguous(memory_format=torch.channels_last))
    assert found.is_contiguous(memory_format=torch.channels_last)
    mean_N = raw.flatten(1).mean(1).view(5, 1, 1, 1)
    deviation_N = raw.flatten(1).std(1, correction=0).view(5, 1, 1, 1)
    torch.testing.assert_close(found.double(), (raw - mean_N) / deviation_N, rtol=1e-4, atol=1e-3)
    assert standardised(raw.bfloat16()).dtype == torch.bfloat16


def test_patches_of_one_colour_are_learned_from_without_harm(make_config: Make) -> None:
    """A colour is a value a channel; where all three are equal nothing is left, and no number is out of bounds."""
    flat = torch.full((2, 3, 8, 8), 2.117904)
    flat[1] = torch.tensor([0.3, -1.1, 2.2]).view(3, 1, 1)
    found = standardised(flat)
    assert found[0].abs().max() < 0.1
    torch.testing.assert_close(found[1].mean((1, 2)), torch.tensor([-0.1225, -1.1595, 1.282]), rtol=1e-3, atol=1e-3)
    config = make_config("location")
    task, batch = made(config)
    batch.images_BCHW[:] = 2.117904
    loss, *_ = build_objective(task, config, ALONE, compiled=False)(*task.bring(batch))
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in task.network.parameters())


def pair_loss(task: Task, images_BCHW: Tensor, corner_BP2: Tensor, patch: int) -> Tensor:
    """By one slice, one pair and one logarithm at a time."""
    network, patches = task.network, []
    for image, corner_P2 in zip(images_BCHW, corner_BP2.tolist(), strict=True):
        for top, left in corner_P2:
            pixels = image[:, top : top + patch, left : left + patch]
            patches.append((pixels - pixels.mean()) / (pixels.var(correction=0) + 1e-10).sqrt())
    feature_NC = network.backbone.feature_maps(torch.stack(patches), ("block3",))["block3"].mean((2, 3))
    pairs, places = [], []
    for own in range(len(images_BCHW)):
        around = [0, 1, 2, 3, 5, 6, 7, 8]
        pairs += [torch.cat([feature_NC[9 * own + place], feature_NC[9 * own + 4]]) for place in around]
        places += range(8)
    hidden = torch.stack(pairs) @ network.head.hidden.weight.T
    norm = network.head.norm
    hidden = (hidden - hidden.mean(0)) / (hidden.var(0, correction=0) + norm.eps).sqrt() * norm.weight + norm.bias
    logits = hidden.clamp_min(0) @ network.head.linear.weight.T + network.head.linear.bias
    each = [row[place] - row.exp().sum().log() for row, place in zip(logits, places, strict=True)]
    return -torch.stack(each).mean()


def test_loss_and_gradients_are_those_of_all_eight_pairs(make_config: Make) -> None:
    """Against the definition in float64; in float32 as near as sums over 144 patches come."""
    config = make_config("location")
    task, batch = made(config)
    single = copy.deepcopy(task.network)
    exact = replace(task, network=task.network.double())
    images_BCHW, corner_BP2 = task.bring(batch)
    parameters = list(exact.network.parameters())
    expected = pair_loss(exact, images_BCHW.double(), corner_BP2, 4)
    wanted = torch.autograd.grad(expected, parameters)
    patches, place_N = task.make(images_BCHW.double(), corner_BP2)
    assert place_N.tolist() == 16 * list(range(8))
    logits = exact.network(patches)
    assert logits.shape == (128, 8)
    loss = F.cross_entropy(logits, place_N)  # `Task.loss` is float32
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    for found, value in zip(torch.autograd.grad(loss, parameters), wanted, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-7, atol=1e-10)
    found, means = task.loss(single(task.make(images_BCHW, corner_BP2)[0]), place_N)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert means["accuracy"].item() == pytest.approx((logits.argmax(1) == place_N).double().mean().item())
    for value, near in zip(wanted, torch.autograd.grad(found, list(single.parameters())), strict=True):
        assert (near.double() - value).norm() <= 1e-3 * value.norm() + 1e-6


# --- the task


def test_the_head_is_as_wide_as_it_is_told(make_config: Make) -> None:
    for settings, width in (({}, 128), ({"hidden": 30}, 30)):
        head: Any = made(make_config("location", settings))[0].network.head
        assert (tuple(head.hidden.weight.shape), tuple(head.linear.weight.shape)) == ((width, 128), (8, width))


def test_a_runs_length_is_counted_by_its_patches(make_config: Make) -> None:
    """Whether a step is compiled depends on it: nine patches of 8 pixels, not nine views of 32."""
    whole, parts = (
        run_flops(config, build_task(config, opened(config), ALONE), 10)
        for config in (
            make_config("rotation", view={"size": 32}),
            make_config("location", {"patch": 8, "jitter": 2}, view={"size": 32}),
        )
    )
    assert parts == pytest.approx(whole * (9 * 8**2) / (4 * 32**2), rel=0.02)


def test_a_grid_that_does_not_fit_is_refused_before_anything_is_opened(make_config: Make, tmp_path: Path) -> None:
    message = (
        r"view\.size 83 is too small for task location: three patches of 21 pixels with a jitter of 7 each, and two "
        r"gaps of 0, take 84; set view\.size to 84 or more, or lower task\.patch"
    )
    with pytest.raises(UsageError, match=rf"^test: configuration: {message}$"):
        make_config("location", {"patch": 21, "jitter": 7}, view={"size": 83})
    assert make_config("location", {"patch": 21, "jitter": 7}, view={"size": 84}).view.size == 84
    path = tmp_path / "mine.yaml"
    path.write_text("task: {name: location, patch: 21, jitter: 7}\nview: {size: 83, resize: null, cutmix: false}\n")
    result = CliRunner().invoke(main, ["train", "--config", str(path), "--shards", str(tmp_path / "nowhere")])
    assert result.exit_code == 2
    assert re.search(rf"^Error: {re.escape(str(path))}: configuration: {message}$", result.stderr, re.MULTILINE)
    with pytest.raises(UsageError, match=r"view\.cutmix must be false for task location"):
        make_config("location", view={"cutmix": True})


def test_small_images_are_enlarged_and_one_line_says_so(make_config: Make, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config("location", view={"size": 64}, images=40)
    index = opened(config)
    short_N = np.minimum(index.height, index.width)[:40]
    build_task(config, index, ALONE)
    build_task(config, index, World(1, 2, torch.device("cpu")))
    assert capsys.readouterr().err.splitlines() == [
        f"{(short_N < 64).sum()} of 40 images are smaller than the view (the smallest has a side of {short_N.min()} "
        f"pixels): they are enlarged to 64 x 64 before patches are cut"
    ]
    build_task(make_config("location"), index, ALONE)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("task", "side"), [("location", 4), ("rotation", 8)])
def test_a_network_that_does_not_take_such_small_images_is_refused(make_config: Make, task: str, side: int) -> None:
    config = make_config(task, model={"arch": "torchvision:squeezenet1_1"}, view={"size": 16 if side == 4 else side})
    message = (
        rf"^task {task}: torchvision:squeezenet1_1 does not take images of {side} x {side} pixels: .*; set view\.size, "
        r"or the task's own sizes, to what it takes, or another model\.arch$"
    )
    with pytest.raises(UsageError, match=message):
        build_task(config, opened(config), ALONE)


def test_places_are_learned(make_config: Make) -> None:
    config = make_config("location", view={"size": 24})
    task, batch = made(config)
    model, optimizer = build_objective(task, config, ALONE, compiled=False), build_optimizer(task.network, config.optim)
    said = [train_step(model, optimizer, task, batch, 0.05).means for _ in range(8)]
    assert said[0]["loss"] > task.constants["chance_loss"] > said[-1]["loss"] + 0.3
    assert said[-1]["accuracy"] > 0.3 > said[0]["accuracy"]
