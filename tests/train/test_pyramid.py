"""Task words beyond one bag of the whole image: spatial pyramids, several layers, what the crop shows; their heads."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import noise_batches
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from noise_batches import ALONE, opened
from shard_sets import fill_layer, write_store
from torch import Tensor

from bowstore.config import Workspace
from bowstore.data.index import Index, open_index
from bowstore.data.plan import Plan, plans
from bowstore.data.shown import CleanGrid, shown
from bowstore.data.views import Batch
from bowstore.errors import UsageError
from bowstore.models.heads import CosineHead, LinearHead
from bowstore.plugins import called
from bowstore.runs import descent, read_lineage, read_metrics
from bowstore.train import loop
from bowstore.train.config import TrainConfig
from bowstore.train.distributed import World
from bowstore.train.step import build_objective, build_optimizer, train_step
from bowstore.train.tasks import TASKS
from bowstore.train.tasks.settings import LinearSettings, WordsSettings
from bowstore.train.tasks.task import Task
from bowstore.train.verify import verify_run
from bowstore.words.store.join import join_rows
from bowstore.words.store.layer import LayerSpec
from bowstore.words.store.store import open_store
from bowstore.words.store.writer import StoreWriter
from bowstore.words.targets.bags import Bag

Make = Callable[..., TrainConfig]
WORDS = 12
PYRAMID = {"form": "pyramid"}


def made(config: TrainConfig) -> tuple[Task, Batch, np.ndarray]:
    """The task, its first batch, and the words (B, h, w) of that batch's rows."""
    task, batch = noise_batches.made(config)
    return task, batch, words_of(config, opened(config))[batch.plan.rows]


def words_of(config: TrainConfig, index: Index, layer: str = "block3") -> np.ndarray:
    """Words of an index's rows."""
    store = open_store(config.task.store[0])  # type: ignore[attr-defined]
    return np.asarray(store.load_words(layer)[join_rows([store], index)])


def dense(bag: Bag, num_words: int = WORDS) -> Tensor:
    weights_BM = bag.weights_BM.double()
    return torch.zeros(len(weights_BM), num_words, dtype=torch.float64).scatter_add_(1, bag.words_BM, weights_BM)


def pyramid_by_hand(words_Bhw: np.ndarray, plan: Plan, grids: tuple[int, ...]) -> np.ndarray:
    """Dense bags (B, P, K): word by word, and of a mixed image pixel by pixel of each cell."""
    images, height, width = words_Bhw.shape
    finer = 2  # parts of a pixel: 4 cells to an axis of 18 pixels are whole numbers of them
    result = []
    for grid in grids:
        own = np.zeros((images, grid * grid, WORDS))
        kept = np.zeros((images, grid * grid))
        for image in range(images):
            for y in range(height):
                for x in range(width):
                    column = width - 1 - x if plan.mirror[image] else x
                    cell = (y * grid // height) * grid + column * grid // width
                    own[image, cell, words_Bhw[image, y, x]] += grid * grid / (height * width)
            shown = np.ones((plan.size * finer, plan.size * finer))
            top, left, h, w = (finer * int(value) for value in plan.box[image])
            shown[top : top + h, left : left + w] = 0
            side = plan.size * finer // grid
            for cell in range(grid * grid):
                row, column = divmod(cell, grid)
                kept[image, cell] = shown[row * side : (row + 1) * side, column * side : (column + 1) * side].mean()
        result.append(kept[:, :, None] * own + (1 - kept[:, :, None]) * own[plan.partner])
    return np.concatenate(result, axis=1)


@pytest.mark.parametrize("cutmix", [True, False])
@pytest.mark.parametrize("grids", [(1, 2), (2,), (4, 1, 2)])
def test_pyramid_bags_are_those_of_a_dense_loop(make_config: Make, grids: tuple[int, ...], cutmix: bool) -> None:
    """With both images' own flips, and the exact area of each cell that is pasted over."""
    task, batch, words_Bhw = made(
        make_config(settings={**PYRAMID, "grids": grids}, view={"size": 18, "cutmix": cutmix})
    )
    plan = batch.plan
    assert 0 < plan.mirror.mean() < 1
    if cutmix:
        assert (plan.mirror != plan.mirror[plan.partner]).any()
    _, bags = task.prepare(batch)
    bags = [bags] if isinstance(bags, Bag) else bags
    expected_BPK = pyramid_by_hand(words_Bhw, plan, tuple(sorted(grids)))
    assert len(bags) == expected_BPK.shape[1] == sum(grid**2 for grid in grids)
    for cell, bag in enumerate(bags):
        torch.testing.assert_close(dense(bag), torch.from_numpy(expected_BPK[:, cell]), rtol=1e-6, atol=1e-7)


def test_a_pyramid_of_one_cell_is_the_count_bag(make_config: Make) -> None:
    """Bags, network, loss, gradients and what is logged, but for the order of the words in a bag."""
    results = []
    for settings in ({**PYRAMID, "grids": [1]}, {"form": "count"}):
        config = make_config(settings=settings)
        task, batch, _ = made(config)
        model = build_objective(task, config, ALONE, compiled=False)
        loss, _, logits, _ = model(*task.bring(batch))
        bag = task.prepare(batch)[1]
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        results.append([dense(bag), loss, logits, *gradients, *task.scalars(logits, bag).values()])
        results[-1].append(torch.tensor(task.constants["marginal_loss"]))
        names = list(task.network.state_dict())
    assert names[-2:] == ["head.weight", "head.gamma"]
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("settings", [PYRAMID, {**PYRAMID, "head": "linear"}])
def test_the_loss_and_its_gradients_are_those_in_float64(make_config: Make, settings: dict[str, Any]) -> None:
    """The mean over the bags of the dense cross-entropy, each by its own head on the pooled feature."""
    task, batch, _ = made(make_config(settings=settings))
    heads = list(task.network.head)
    assert {type(head) for head in heads} == {LinearHead if settings.get("head") == "linear" else CosineHead}
    _, bags = task.prepare(batch)
    assert len(heads) == len(bags) == 5
    feature_BC = torch.randn(16, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    for number, head in enumerate(heads):  # as they are after some steps: each its own gamma
        getattr(head, "gamma", torch.zeros(())).data.fill_(1.5 + number / 4)
    logits = task.network.head(feature_BC)
    loss, means = task.loss(logits, bags)
    assert means == {}
    weights = [parameter for head in heads for parameter in head.parameters()]
    found = torch.autograd.grad(loss, [feature_BC, *weights])

    exact_BC = feature_BC.detach().double().requires_grad_()
    exact = [parameter.detach().double().requires_grad_() for parameter in weights]
    losses, pairs = [], iter(exact)
    for bag, first, second in zip(bags, pairs, pairs, strict=True):
        if settings.get("head") == "linear":
            logits_BK = F.linear(exact_BC, first, second)
        else:
            logits_BK = second * F.linear(exact_BC, F.normalize(first, dim=1))
        losses.append(-(dense(bag) * torch.log_softmax(logits_BK, 1)).sum(1).mean())
    expected = torch.stack(losses).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for one, other in zip(found, torch.autograd.grad(expected, [exact_BC, *exact]), strict=True):
        assert (one.double() - other).norm() <= 2e-6 * other.norm()


@pytest.mark.parametrize(("flip", "settings"), [
    (True, {}), (True, {"form": "binary"}), (True, PYRAMID), (False, {**PYRAMID, "grids": [2, 4]}),
])  # fmt: skip
def test_the_marginal_loss_is_that_of_the_best_constant_logits(
    make_config: Make, flip: bool, settings: dict[str, Any]
) -> None:
    """Over all rows, half of whose images are mirrored where the view flips."""
    config = make_config(settings=settings, view={"flip": flip, "cutmix": False})
    task, batch, _ = made(config)
    index, plan = opened(config), batch.plan
    form = WordsSettings(**settings).form
    grids = WordsSettings(**settings).grids if form == "pyramid" else (1,)
    rows = np.arange(len(index))
    none = np.zeros(len(rows), np.int32)
    whole = replace(plan, rows=rows, mirror=none, partner=rows.astype(np.int32), box=np.zeros((len(rows), 4), np.int32))
    words_Nhw = words_of(config, index)
    means_PK = pyramid_by_hand(words_Nhw, whole, grids).mean(0)
    if flip and form == "pyramid":
        means_PK = (means_PK + pyramid_by_hand(words_Nhw, replace(whole, mirror=none + 1), grids).mean(0)) / 2
    if form == "binary":
        present_NK = (np.stack([np.bincount(words.flat, minlength=WORDS) for words in words_Nhw]) > 0).astype(float)
        means_PK = (present_NK / present_NK.sum(1, keepdims=True)).mean(0, keepdims=True)
    expected = -(means_PK * np.log(np.maximum(means_PK, 1e-30))).sum(1).mean()
    assert task.constants["marginal_loss"] == pytest.approx(expected, rel=1e-6)
    assert task.dead is not None
    assert task.dead.loss == task.constants["marginal_loss"]


def test_what_is_logged_of_several_heads(make_config: Make) -> None:
    """Means over the bags; the gamma nearest to zero, where a head goes dead."""
    task, batch, _ = made(make_config(settings=PYRAMID))
    heads = list(task.network.head)
    for number, head in enumerate(heads):
        head.gamma.data.fill_(3.0 - number / 2 if number else -3.0)
    images_BCHW, bags = task.prepare(batch)
    with torch.no_grad():
        logits = task.network(images_BCHW)
        found = task.scalars(logits, bags)
    assert found["gamma"].item() == 1.0
    excess, weight = [], []
    for logits_BK, bag in zip(logits, bags, strict=True):
        target_BK = dense(bag)
        loss = -(target_BK * torch.log_softmax(logits_BK.double(), 1)).sum(1).mean()
        excess.append(loss - torch.special.entr(target_BK).sum(1).mean())
        weight.append(target_BK.gather(1, logits_BK.argmax(1, keepdim=True)).mean())
    assert found["excess_loss"].item() == pytest.approx(torch.stack(excess).mean().item(), rel=1e-4)
    assert found["top_word_weight"].item() == pytest.approx(torch.stack(weight).mean().item(), rel=1e-6)


def test_gammas_of_all_heads_are_free_of_weight_decay(make_config: Make) -> None:
    config = make_config(settings=PYRAMID)
    task, *_ = made(config)
    decayed, free = build_optimizer(task.network, config.optim).param_groups
    gammas = {id(head.gamma) for head in task.network.head}
    assert len(gammas) == 5
    assert gammas <= {id(parameter) for parameter in free["params"]}
    assert gammas.isdisjoint({id(parameter) for parameter in decayed["params"]})


def test_a_linear_head_has_no_gamma_to_tell_of(make_config: Make) -> None:
    task, batch, _ = made(make_config(settings={"head": "linear"}))
    _, bag = task.prepare(batch)
    assert task.scalars(torch.randn(16, WORDS), bag).keys() == {"excess_loss", "top_word_weight"}
    assert task.dead is not None
    assert task.dead.sentence.endswith("nothing is learned; try a lower optim.lr")


# --- several layers


@pytest.fixture
def two_layers(make_config: Make, tmp_path: Path) -> Make:
    """Makes configurations on a store of block3 (4 x 4, 12 words) and block2 (6 x 6, 7 words)."""
    index = open_index(Path(str(make_config().shards)))
    writer = StoreWriter(write_store(tmp_path / "two.zarr", index))
    maps = np.random.default_rng(3).integers(0, 7, (len(index), 6, 6)).astype(np.uint16)
    teacher = {"arch": "wrn-10-1", "layer": "block2", "weights_sha256": "0", "name": "t"}
    view = {"size": 16, "resize": None, "squash": False}
    fill_layer(writer, "block2", LayerSpec(teacher, view, {}, num_words=7, grid=(6, 6), channels=8), maps)

    def make(settings: dict[str, Any], **changes: Any) -> TrainConfig:
        store = {"store": str(tmp_path / "two.zarr"), "layer": None}
        return make_config(settings={**store, "layers": ["block2", "block3"], **settings}, **changes)

    return make


@pytest.mark.parametrize(("settings", "bags_each"), [({}, 1), ({"form": "binary"}, 1), (PYRAMID, 5)])
def test_layers_are_predicted_jointly_each_by_its_own_heads(
    two_layers: Make, settings: dict[str, Any], bags_each: int
) -> None:
    """Bags and marginal are those of each layer alone; so are the heads' sizes."""
    task, batch, _ = made(two_layers(settings))
    _, bags = task.prepare(batch)
    assert [head.weight.shape[0] for head in task.network.head] == [7] * bags_each + [12] * bags_each
    marginals = []
    for number, layer in enumerate(("block2", "block3")):
        alone, *_ = made(two_layers({**settings, "layer": layer, "layers": None}))
        _, own = alone.prepare(batch)
        own = [own] if isinstance(own, Bag) else own
        for found, expected in zip(bags[bags_each * number : bags_each * (number + 1)], own, strict=True):
            assert torch.equal(found.words_BM, expected.words_BM)
            assert torch.equal(found.weights_BM, expected.weights_BM)
        marginals.append(alone.constants["marginal_loss"])
        assert task.inputs[f"words of {layer}"] == alone.inputs["words"]
    assert task.constants["marginal_loss"] == pytest.approx(np.mean(marginals), rel=1e-12)
    assert task.lineage["layer"] == "block2, block3"
    assert task.lineage["vocabulary_digest"].keys() == {"block2", "block3"}


def test_layers_are_learned_from_every_tier(two_layers: Make, tmp_path: Path) -> None:
    """The same run, to the bit, wherever the words lie."""
    optim, storage = {"epochs": 1, "milestones": []}, {"cache": str(tmp_path / "cache")}
    weights = []
    for tier in ("resident", "host", "streamed"):
        config = two_layers({}, name=tier, optim=optim, runtime={"targets": tier, "storage": storage})
        loop.train(config, tmp_path / "runs")
        run = tmp_path / "runs" / tier
        state, lineage = loop.saved.newest_checkpoint(run), read_lineage(run)
        assert state is not None
        weights.append({**state["backbone"], **state["head"]})
        assert lineage is not None
        assert descent(lineage) == ("t", "7, 12 words of block2, block3", tier)
        assert not verify_run(run).problems
    assert "1.gamma" in weights[0]
    for key, value in weights[0].items():
        assert all(torch.equal(value, other[key]) for other in weights[1:]), key


# --- crop-aware bags

CROPPED = {"crop_aware": True}


def crop_aware_by_hand(words_Bhw: np.ndarray, plan: Plan, shares: tuple[np.ndarray, np.ndarray], form: str) -> Tensor:
    """Dense bags (B, K), word by word: those of A that are not pasted over, and those of B in the box."""
    result = np.zeros((len(words_Bhw), WORDS))
    for image in range(len(words_Bhw)):
        for who, share_M in ((image, shares[0][image]), (int(plan.partner[image]), shares[1][image])):
            part = np.zeros(WORDS)
            for word, share in zip(words_Bhw[who].flat, share_M, strict=True):
                part[word] += share
            if form == "binary" and part.any():
                part = (part > 0) * part.sum() / np.count_nonzero(part)
            result[image] += part
    return torch.from_numpy(result)


@pytest.mark.parametrize("cutmix", [True, False])
@pytest.mark.parametrize("form", ["count", "binary"])
def test_crop_aware_bags_are_of_what_is_seen(make_config: Make, form: str, cutmix: bool) -> None:
    """By the shares that tests/data/test_shown.py counts."""
    config = make_config(settings={**CROPPED, "form": form}, view={"cutmix": cutmix, "area": [0.1, 0.5]})
    task, batch, words_Bhw = made(config)
    plan, index = batch.plan, opened(config)
    shares = shown(plan, index.height[plan.rows], index.width[plan.rows], CleanGrid((4, 4), 0, 16, None))
    assert (shares[0] == 0).mean() > 0.2, "cells that are not seen"
    _, bag = task.prepare(batch)
    found_BK = dense(bag)
    torch.testing.assert_close(found_BK, crop_aware_by_hand(words_Bhw, plan, shares, form), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found_BK.sum(1), torch.ones(16, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    assert (bag.weights_BM >= 0).all()


def test_a_crop_of_the_whole_image_is_the_count_bag(make_config: Make) -> None:
    """Bags, CutMix by the area of each cell or not, and the loss of their mean."""
    view = {"area": [1.0, 1.0], "ratio": [0.1, 10.0], "cutmix": False}
    tasks = [made(make_config(settings=settings, view=view)) for settings in (CROPPED, {})]
    (own, batch, _), (whole, *_) = tasks
    assert (batch.plan.window[:, :2] == 0).all()
    torch.testing.assert_close(dense(own.prepare(batch)[1]), dense(whole.prepare(batch)[1]))
    assert own.constants["marginal_loss"] == pytest.approx(whole.constants["marginal_loss"], rel=1e-6)


@pytest.mark.parametrize("form", ["count", "binary"])
def test_the_marginal_loss_of_crop_aware_bags_is_that_of_many_batches(make_config: Make, form: str) -> None:
    config = make_config(settings={**CROPPED, "form": form}, view={"area": [0.1, 0.5]}, optim={"batch": 72})
    task, *_ = made(config)
    index = opened(config)
    total_K, schedule = torch.zeros(WORDS, dtype=torch.float64), loop.data_schedule(config, index, ALONE)
    for plan in plans(schedule, index, config.view, start=0, stop=40):
        total_K += dense(task.prepare(Batch(torch.zeros(72, 3, 16, 16), plan))[1]).mean(0) / 40
    assert task.constants["marginal_loss"] == pytest.approx(torch.special.entr(total_K).sum().item(), rel=0.02)


# --- ranks, stops, compilers

ALL_FORMS = [PYRAMID, CROPPED, {**CROPPED, "form": "binary"}]


@pytest.mark.parametrize("settings", ALL_FORMS)
def test_two_ranks_have_the_bags_of_one(make_config: Make, settings: dict[str, Any]) -> None:
    config = make_config(settings=settings)
    task, batch, _ = made(config)
    index, halves = opened(config), []
    for rank in range(2):
        schedule = loop.data_schedule(config, index, World(rank, 2, torch.device("cpu")))
        plan = next(plans(schedule, index, config.view, start=0, stop=1))
        halves.append(task.prepare(Batch(batch.images_BCHW[8 * rank : 8 * rank + 8], plan))[1])
    whole = task.prepare(batch)[1]
    parts = zip(whole, *halves, strict=True) if isinstance(whole, list) else [(whole, *halves)]
    for bag, *mine in parts:
        assert torch.equal(bag.words_BM, torch.cat([part.words_BM for part in mine]))
        assert torch.equal(bag.weights_BM, torch.cat([part.weights_BM for part in mine]))


@pytest.mark.parametrize("settings", [PYRAMID, {**CROPPED, "form": "binary", "head": "linear"}])
def test_every_form_is_one_graph(make_config: Make, settings: dict[str, Any]) -> None:
    config = make_config(settings=settings)
    task, batch, _ = made(config)
    model = build_objective(task, config, ALONE, compiled=False)
    traced = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    results = []
    for one in (model, traced):
        loss, _, logits, _ = one(*task.bring(batch))
        logits = logits if isinstance(logits, tuple) else (logits,)
        assert not any(each.requires_grad for each in logits)
        results.append([loss, *logits, *torch.autograd.grad(loss, list(model.parameters()))])
    torch._dynamo.reset()
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() <= 1e-5 * expected.norm() + 1e-9


def test_a_run_with_several_heads_goes_on_bit_for_bit(two_layers: Make, tmp_path: Path) -> None:
    """Stopped in mid-epoch, away from its checkpoints (steps 5 and 10), and continued."""
    settings = {**CROPPED, "form": "binary"}
    runs, steps = tmp_path / "runs", iter(range(100))

    def stopping(*arguments: Any, **named: Any) -> Any:
        if next(steps) == 7:
            raise KeyError
        return train_step(*arguments, **named)

    loop.train(two_layers(settings, name="whole"), runs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", stopping)
        with pytest.raises(KeyError):
            loop.train(two_layers(settings, name="parts"), runs)
    loop.train(two_layers(settings, name="parts"), runs)
    whole, parts = (loop.saved.newest_checkpoint(runs / name) for name in ("whole", "parts"))
    assert whole is not None
    assert parts is not None
    assert whole["step"] == parts["step"] == 12
    for group in ("backbone", "head"):
        for name, value in whole[group].items():
            assert torch.equal(value, parts[group][name]), name
    logs = [[{**line, "images_per_second": 0} for line in read_metrics(runs / name)] for name in ("whole", "parts")]
    assert logs[0] == logs[1]


# --- bad input


@pytest.mark.parametrize(("settings", "message"), [
    ({"head": "linear", "gamma": 3.0}, r"task: gamma 3 is the scale of head cosine; leave it out with head linear"),
    ({"grids": [1, 4]}, r"task: grids \[1, 4\] are those of form pyramid; leave them out with count"),
    ({**PYRAMID, "grids": []}, r"task\.grids: \[\] must be different ones, one at least"),
    ({**PYRAMID, "grids": [2, 2]}, r"task\.grids: \[2, 2\] must be different ones, one at least"),
    ({**PYRAMID, "grids": [0]}, r"task\.grids\.0: Input should be greater than or equal to 1 \(got 0\)"),
    ({**PYRAMID, **CROPPED}, r"task: crop_aware is of forms count and binary: the cells of a pyramid are"),
    ({"layers": ["block2"]}, r"task: layer block3 and layers are both set; name all of them in layers"),
    ({"layer": None, "layers": []}, r"task\.layers: \[\] must be different ones, one at least"),
    ({"layer": None, "layers": ["a", "a"]}, r"task\.layers: \['a', 'a'\] must be different ones"),
])  # fmt: skip
def test_settings_that_do_not_go_together_are_one_line(
    make_config: Make, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as error:
        make_config(settings=settings)
    assert "\n" not in str(error.value)


def test_grids_and_layers_have_no_order() -> None:
    """A run that goes on with the same ones in another order finds each of its heads where it was."""
    assert WordsSettings.model_validate({"form": "pyramid", "grids": [4, 1, 2]}).grids == (1, 2, 4)
    for kind in (WordsSettings, LinearSettings):
        assert kind.model_validate({"layers": ["b", "a"]}) == kind(layers=("a", "b"))


def test_a_pyramid_that_does_not_divide_the_map_is_refused_before_any_work(make_config: Make) -> None:
    config = make_config(settings={**PYRAMID, "grids": [1, 3]})
    message = (
        r"^task\.grids \[1, 3\]: 3 x 3 cells do not divide the 4 x 4 words of an image in block3; take from 1, 2, 4$"
    )
    with pytest.raises(UsageError, match=message):
        called(TASKS.get("words").resolve)(config.task, Workspace())
    with pytest.raises(UsageError, match=message):
        made(config)
    WordsSettings(form="pyramid", grids=(1, 3)).check_map("conv4", (6, 9))
    WordsSettings().check_map("conv4", (7, 5))
    with pytest.raises(
        UsageError, match=r"2 x 2 cells do not divide the 14 x 7 words of an image in l; take from 1, 7"
    ):
        WordsSettings(form="pyramid").check_map("l", (14, 7))
