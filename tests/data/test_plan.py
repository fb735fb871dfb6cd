import tracemalloc
from collections.abc import Callable, Iterable
from dataclasses import replace
from time import thread_time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torchvision import transforms
from torchvision.transforms import v2

from bowstore.config import ViewConfig
from bowstore.data import plan
from bowstore.data.plan import COLUMNS, MIX_GROUP, Origin, Plan, Schedule, epoch_order, generator, perturb, plans
from bowstore.errors import UsageError

VIEW = ViewConfig(size=32, resize=None, area=(0.2, 1.0))
VALUES = (
    "rows", "window", "mirror", "brightness", "contrast", "saturation", "hue", "partner", "box", "kept"
)  # fmt: skip
HERE = Origin(0, 0, 0)  # of plans whose draws a test has made
SEEDS = st.integers(0, 2**32 - 1)
quick = settings(deadline=None, max_examples=30, database=None, derandomize=True)


class Dims:
    """The two columns of an index that a plan reads."""

    def __init__(self, count: int, seed: int = 0) -> None:
        draws = np.random.default_rng(seed)
        self.height = draws.integers(1, 200, count).astype(np.int32)
        self.width = draws.integers(1, 200, count).astype(np.int32)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    """Any number of images, ranks, and batch that fit together; rank 0."""
    world = draw(st.integers(1, 8))
    batch = world * MIX_GROUP * draw(st.integers(1, 3))
    return Schedule(draw(st.integers(batch, 4 * batch + 5)), batch, draw(SEEDS), 0, world)


def run(schedule: Schedule, dims: Dims, start: int, stop: int, view: ViewConfig = VIEW) -> list[Plan]:
    return list(plans(schedule, dims, view, start=start, stop=stop))  # type: ignore[arg-type]


def every_rank(schedule: Schedule, dims: Dims, start: int, stop: int, view: ViewConfig = VIEW) -> list[list[Plan]]:
    return [run(replace(schedule, rank=rank), dims, start, stop, view) for rank in range(schedule.world)]


def as_global(parts: tuple[Plan, ...]) -> dict[str, np.ndarray]:
    """One step of all ranks as one batch, its partners as places in it."""
    size = len(parts[0].rows)
    joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in VALUES}
    joined["partner"] = np.concatenate([part.partner + rank * size for rank, part in enumerate(parts)])
    return joined | {f"{count} draws": np.concatenate([part.task_draws(count) for part in parts]) for count in (1, 9)}


def assert_same(ours: Plan, theirs: Plan) -> None:
    for name in Plan.__dataclass_fields__:
        assert np.array_equal(getattr(ours, name), getattr(theirs, name)), name
    assert np.array_equal(ours.task_draws(3), theirs.task_draws(3))


@quick
@given(schedules(), st.integers(0, 3))
def test_each_row_once_an_epoch_but_for_the_dropped_rest(schedule: Schedule, epoch: int) -> None:
    steps, dims = schedule.steps_per_pass, Dims(schedule.images)
    ranks = every_rank(schedule, dims, epoch * steps, (epoch + 1) * steps)
    rows = [np.concatenate([part.rows for part in parts]) for parts in ranks]
    assert len({len(part) for part in rows}) == 1
    seen = np.concatenate(rows)
    assert len(np.unique(seen)) == len(seen) == schedule.images - schedule.images % schedule.batch
    assert 0 <= seen.min()
    assert seen.max() < schedule.images


@quick
@given(schedules(), st.integers(0, 3))
def test_elastic_ranks_have_equally_many_equal_steps(schedule: Schedule, start: int) -> None:
    ranks = every_rank(schedule, Dims(schedule.images), start, start + 7)
    assert {len(parts) for parts in ranks} == {7}
    assert {len(part.rows) for parts in ranks for part in parts} == {schedule.batch // schedule.world}
    assert {replace(schedule, rank=rank).steps_per_pass for rank in range(schedule.world)} == {
        schedule.images // schedule.batch
    }


@quick
@given(
    st.sampled_from([2, 4, 8]), st.integers(1, 2), st.integers(0, 40), SEEDS, st.booleans(), st.integers(0, 9)
)  # fmt: skip
def test_elastic_order_and_every_number_do_not_depend_on_the_number_of_ranks(
    world: int, groups: int, more: int, seed: int, cutmix: bool, start: int
) -> None:
    batch = world * MIX_GROUP * groups
    view, dims = VIEW.model_copy(update={"cutmix": cutmix}), Dims(batch + more)
    alone = run(Schedule(batch + more, batch, seed), dims, start, start + 3, view)
    ranks = every_rank(Schedule(batch + more, batch, seed, 0, world), dims, start, start + 3, view)
    for whole, parts in zip(alone, zip(*ranks, strict=True), strict=True):
        expected = as_global((whole,))
        for name, joined in as_global(parts).items():
            assert np.array_equal(joined, expected[name]), name


@quick
@given(schedules(), st.integers(0, 12))
def test_resume_at_any_step_gives_the_steps_of_the_whole_run(schedule: Schedule, start: int) -> None:
    dims = Dims(schedule.images)
    whole = run(schedule, dims, 0, 13)
    (alone,) = run(schedule, dims, start, start + 1)
    assert_same(alone, whole[start])
    for again, before in zip(run(schedule, dims, start, 13), whole[start:], strict=True):
        assert_same(again, before)


@quick
@given(SEEDS, st.integers(0, 2**20), st.integers(0, 31), st.integers(0, 19))
def test_another_seed_or_epoch_changes_the_order_and_every_draw(
    seed: int, epoch: int, seed_bit: int, epoch_bit: int
) -> None:
    dims = Dims(64)
    dims.height[:] = dims.width[:] = 100  # so that a window tells of its draws, not of its image
    first, other_seed, other_epoch = (
        run(Schedule(64, 64, s), dims, e, e + 1)[0]
        for s, e in ((seed, epoch), (seed ^ 1 << seed_bit, epoch), (seed, epoch ^ 1 << epoch_bit))
    )
    for other in (other_seed, other_epoch):
        for name in VALUES:
            assert not np.array_equal(getattr(first, name), getattr(other, name)), name
        assert not np.isin(other.task_draws(5), first.task_draws(5)).any()


@quick
@given(schedules(), st.integers(8, 300), st.integers(0, 5))
def test_cutmix_partners_are_others_of_the_group_and_kept_is_the_exact_area(
    schedule: Schedule, size: int, step: int
) -> None:
    view = VIEW.model_copy(update={"size": size})
    for batch in every_rank(schedule, Dims(schedule.images), step, step + 1, view):
        place = np.arange(len(batch[0].rows))
        assert (batch[0].partner != place).all()
        assert (batch[0].partner // MIX_GROUP == place // MIX_GROUP).all()
        assert np.array_equal(np.sort(batch[0].partner), place)  # each image is pasted once
        for kept, (top, left, height, width) in zip(batch[0].kept, batch[0].box.astype(int).tolist(), strict=True):
            pasted = np.zeros((size, size), bool)
            assert min(top, left, height, width) >= 0
            assert max(top + height, left + width) <= size
            pasted[top : top + height, left : left + width] = True
            assert kept == np.float32((size * size - int(pasted.sum())) / size**2)


@quick
@given(st.integers(1, 24), st.tuples(st.integers(1, 9), st.integers(1, 9)), st.data())
def test_kept_in_each_cell_is_its_area_without_the_box_exactly(
    size: int, grid: tuple[int, int], data: st.DataObject
) -> None:
    """Counted in pixels cut into rows x columns parts, of which a cell has size x size whatever the grid."""
    rows, columns = grid
    low = np.array(data.draw(st.lists(st.tuples(st.integers(0, size), st.integers(0, size)), min_size=4, max_size=4)))
    high = np.array([[data.draw(st.integers(edge, size)) for edge in corner] for corner in low.tolist()])
    boxes = np.concatenate([low, high - low], axis=1).astype(np.int32)
    (step,) = run(Schedule(4, 4, 0), Dims(4), 0, 1, VIEW.model_copy(update={"size": size}))
    found = replace(step, box=boxes).kept_in(grid)
    assert found.dtype == np.float32
    for kept_P, (top, left, height, width) in zip(found, boxes.tolist(), strict=True):
        shown = np.ones((size, size), int)
        shown[top : top + height, left : left + width] = 0
        parts = shown.repeat(rows, axis=0).repeat(columns, axis=1)
        counted = parts.reshape(rows, size, columns, size).sum(axis=(1, 3)).ravel()
        assert np.array_equal(kept_P, (counted / size**2).astype(np.float32))


@quick
@given(schedules(), st.booleans())
def test_kept_is_the_one_cell_of_a_grid_of_one(schedule: Schedule, cutmix: bool) -> None:
    (step,) = run(schedule, Dims(schedule.images), 2, 3, VIEW.model_copy(update={"cutmix": cutmix}))
    assert np.array_equal(step.kept_in((1, 1))[:, 0], step.kept)
    assert step.kept_in((3, 5)).shape == (schedule.rank_batch, 15)
    assert step.mixed == cutmix
    assert cutmix or (step.kept_in((3, 5)) == 1).all()
    plain = step.unmixed()
    assert not plain.mixed
    assert_same(
        replace(plain, mixed=True, partner=step.partner, box=step.box, kept=step.kept), replace(step, mixed=True)
    )
    assert np.array_equal(plain.partner, np.arange(schedule.rank_batch))
    assert (plain.kept_in((2, 2)) == 1).all()


@quick
@given(schedules())
def test_without_cutmix_everyone_is_their_own_partner(schedule: Schedule) -> None:
    for (batch,) in every_rank(schedule, Dims(schedule.images), 1, 2, VIEW.model_copy(update={"cutmix": False})):
        assert np.array_equal(batch.partner, np.arange(len(batch.rows)))
        assert (batch.kept == 1).all()
        assert not batch.box.any()


def test_the_plan_is_the_one_that_earlier_runs_followed() -> None:
    """A library or a change that draws other numbers from the same seed would change what a resumed run sees."""
    assert epoch_order(12, seed=5, epoch=3).tolist() == [3, 9, 5, 7, 1, 6, 2, 10, 8, 0, 11, 4]
    (batch,) = run(Schedule(12, 4, 5), Dims(12), 10, 11)
    assert batch.rows.tolist() == [1, 6, 2, 10]
    assert batch.window.tolist() == [[44, 54, 79, 60], [0, 46, 15, 20], [3, 38, 88, 114], [15, 65, 69, 68]]
    assert batch.mirror.tolist() == [1, 0, 1, 0]
    assert batch.brightness.tolist() == pytest.approx([1.1095266, 0.6297105, 0.6893955, 1.0671514])
    assert batch.contrast.tolist() == pytest.approx([0.6382764, 1.3386986, 0.6008148, 1.3096827])
    assert batch.saturation.tolist() == pytest.approx([1.1093416, 1.3512914, 0.7535399, 1.3063881])
    assert batch.hue.tolist() == pytest.approx([-14.119667, 21.69742, -29.997257, 10.377514])
    assert batch.partner.tolist() == [1, 2, 3, 0]
    assert batch.box.tolist() == [[12, 20, 20, 12], [24, 6, 7, 6], [0, 0, 22, 23], [4, 0, 17, 10]]
    assert batch.task_draws(5)[0].tolist() == [
        0.9663891129557061, 0.17894888486872107, 0.9421384075390976, 0.66640928166415, 0.8797903053289478
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("seed", "epoch", "ranks", "rank", "cutmix", "order", "perturbations"),
    [
        (0, 0, 1, 0, True, "aa0ddc4b84bdaffa", "bea60088b274f83e"),
        (0, 0, 1, 0, False, "aa0ddc4b84bdaffa", "52609a60b12f0503"),
        (0, 3, 2, 1, True, "1ebbf188a495dbc7", "5fc285c94fdb96c0"),
        (7, 0, 4, 3, True, "3ed56e967ab89405", "83f65b73cd202be7"),
        (7, 1000, 1, 0, False, "f13dcc37dee173fb", "50c017a30619f50d"),
        (2**32 - 1, 12, 2, 0, True, "962cf3183843b8fb", "82c1e13ae504424c"),
    ],
)
def test_orders_and_perturbations_are_those_of_the_first_plans(
    seed: int, epoch: int, ranks: int, rank: int, cutmix: bool, order: str, perturbations: str
) -> None:
    """Digests of what plans were before their draws had names."""
    sizes, dims = np.random.default_rng(3), Dims(210)
    dims.height, dims.width = (sizes.integers(1, 200, 210).astype(np.int32) for _ in range(2))
    assert xxhash.xxh3_64_hexdigest(epoch_order(210, seed, epoch)) == order
    found = xxhash.xxh3_64()
    view = VIEW.model_copy(update={"cutmix": cutmix})
    for step in run(Schedule(210, 32, seed, rank, ranks), dims, epoch * 6 + 1, epoch * 6 + 4, view):
        for name in VALUES:
            found.update(np.ascontiguousarray(getattr(step, name)).data)
    assert found.hexdigest() == perturbations


def test_a_tasks_draws_are_its_own() -> None:
    """Uniform, of another stream than the perturbations, and no other because a task takes more of them."""
    count = 4096
    (step,) = run(Schedule(count, count, 7), Dims(count), 0, 1)
    drawn = step.task_draws(10)
    assert drawn.shape == (count, 10)
    assert drawn.dtype == np.float64
    assert len(np.unique(drawn)) == drawn.size
    assert stats.kstest(drawn.ravel(), "uniform").pvalue > 1e-3
    perturbing = generator(7, 0, 1).random((count, 32))
    assert not np.isin(drawn, perturbing).any()
    scores = np.corrcoef(np.concatenate([drawn, perturbing], axis=1).T)[np.triu_indices(42, 1)] * np.sqrt(count)
    assert np.abs(scores).max() < 5
    for fewer in (1, 4, 7):
        assert np.array_equal(step.task_draws(fewer), drawn[:, :fewer])


def captured_draws(monkeypatch: pytest.MonkeyPatch, schedule: Schedule, start: int, stop: int) -> np.ndarray:
    """The uniform numbers (steps, B, 32) behind a rank's plans."""
    caught = []

    def spy(rows: np.ndarray, height: np.ndarray, width: np.ndarray, draws: np.ndarray, *others: Any) -> Plan:
        caught.append(draws)
        return perturb(rows, height, width, draws, *others)

    with monkeypatch.context() as patch:
        patch.setattr(plan, "perturb", spy)
        run(schedule, Dims(schedule.images), start, stop)
    return np.stack(caught)


def test_no_random_number_is_used_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Overlapping counters would repeat numbers between samples, ranks, steps, epochs or seeds."""
    draws = [
        captured_draws(monkeypatch, Schedule(512, 128, seed, rank, 2), 0, 12) for seed in (0, 1) for rank in (0, 1)
    ]
    numbers = np.concatenate(draws, axis=None)
    assert numbers.size == 2 * 12 * 128 * 32
    assert len(np.unique(numbers)) == numbers.size


def test_draws_of_different_samples_are_independent_and_uniform(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the 32 numbers against each other, in one sample, its neighbour, and the next epoch's position."""
    draws = captured_draws(monkeypatch, Schedule(4096, 4096, 7), 0, 4)
    assert stats.kstest(draws.ravel(), "uniform").pvalue > 1e-3
    here, neighbour, later = draws[:-1, :-1], draws[:-1, 1:], draws[1:, :-1]
    flat = np.concatenate([part.reshape(-1, 32) for part in (here, neighbour, later)], axis=1)
    scores = np.corrcoef(flat.T)[np.triu_indices(96, 1)] * np.sqrt(len(flat))
    assert np.abs(scores).max() < 5  # 4,560 pairs: the largest of so many normal scores is near 3.7
    assert 0.9 < (scores**2).mean() < 1.1


def test_the_perturbations_of_a_sample_are_independent() -> None:
    """No two of them come from one random number."""
    count, side = 16384, 1000
    dims = Dims(count)
    dims.height[:] = dims.width[:] = side
    (batch,) = run(Schedule(count, count, 2), dims, 0, 1, VIEW.model_copy(update={"size": 2048, "area": (0.1, 0.5)}))
    top, left, height, width = batch.window.T
    box_top, box_left, box_height, box_width = batch.box.T
    features = [
        batch.mirror, batch.brightness, batch.contrast, batch.saturation, batch.hue, batch.kept,
        top / (side - height), left / (side - width), height * width, np.log(width / height),
        box_top + box_height / 2, box_left + box_width / 2, (batch.partner - np.arange(count)) % MIX_GROUP,
    ]  # fmt: skip
    scores = np.corrcoef(features)[np.triu_indices(len(features), 1)] * np.sqrt(count)
    assert np.abs(scores).max() < 4.5


def test_first_rows_of_a_thousand_epochs_are_uniform() -> None:
    rows = 20
    orders = np.stack([epoch_order(rows, seed=11, epoch=epoch) for epoch in range(1000)])
    for place in (0, 1, rows // 2, rows - 1):
        assert stats.chisquare(np.bincount(orders[:, place], minlength=rows)).pvalue > 1e-3
    pairs = orders[:, 0] * rows + orders[:, 1]
    possible = [a * rows + b for a in range(rows) for b in range(rows) if a != b]
    assert stats.chisquare(np.bincount(pairs, minlength=rows**2)[possible]).pvalue > 1e-3
    assert stats.chisquare(np.bincount([epoch_order(rows, seed, 0)[0] for seed in range(1000)])).pvalue > 1e-3


def test_consecutive_epochs_are_not_correlated() -> None:
    """Rank correlation of the places of the rows in epoch e and e + lag: normal scores with mean 0, variance 1."""
    rows, epochs = 500, 400
    places = np.stack([np.argsort(epoch_order(rows, seed=3, epoch=epoch)) for epoch in range(epochs)])
    centred = (places - places.mean()) / places.std(axis=1, keepdims=True)
    for lag in (1, 2):
        scores = (centred[:-lag] * centred[lag:]).mean(axis=1) * np.sqrt(rows - 1)
        assert stats.kstest(scores, "norm").pvalue > 1e-3
        assert abs(scores.mean()) < 4 / np.sqrt(len(scores))


def test_windows_lie_in_the_image_with_the_asked_area_and_ratio() -> None:
    dims = Dims(4000, seed=1)
    dims.height[:], dims.width[:] = 120, 90
    batch = run(Schedule(4000, 4000, 0), dims, 0, 1)[0]
    top, left, height, width = batch.window.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 120).all()
    assert (left + width <= 90).all()
    share = height * width / (120 * 90)
    assert 0.18 < share.min() < 0.3
    assert share.max() > 0.9
    ratio = width / height
    assert ratio.min() > 0.7
    assert ratio.max() < 1.4


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 300), (300, 1), (2, 2), (3, 900)])
def test_windows_of_extreme_images_stay_inside(height: int, width: int) -> None:
    count = 256
    draws = np.random.default_rng(0).random((count, 32))
    draws[0], draws[1] = 0, np.nextafter(1, 0)
    rows = np.arange(count)
    dims = np.full(count, height, np.int32), np.full(count, width, np.int32)
    window = perturb(rows, *dims, draws, VIEW, HERE).window
    assert (window[:, :2] >= 0).all()
    assert (window[:, 2:] >= 1).all()
    assert (window[:, 0] + window[:, 2] <= height).all()
    assert (window[:, 1] + window[:, 3] <= width).all()


class Drawn:
    """torch as torchvision's transforms see it: its draws come from a list, scalars are float64."""

    def __init__(self, uniform: Iterable[float], whole: Iterable[float]) -> None:
        self._uniform, self._whole = iter(uniform), iter(whole)

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)

    def tensor(self, values: object) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64)

    def empty(self, _: int) -> "Drawn":
        return self

    def uniform_(self, low: float, high: float) -> torch.Tensor:
        return torch.tensor(float(low) + float(high - low) * next(self._uniform), dtype=torch.float64)

    def randint(self, *bounds: int, size: tuple[int]) -> torch.Tensor:
        low, high = bounds if len(bounds) == 2 else (0, *bounds)
        return torch.tensor([low + int((high - low) * next(self._whole))])


def test_every_draw_decides_one_thing() -> None:
    taken = [np.atleast_1d(np.arange(32)[columns]) for columns in COLUMNS.values()]
    assert np.array_equal(np.sort(np.concatenate(taken)), np.arange(32))


def test_every_number_is_torchvisions_of_the_same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows exactly, tries that do not fit included; boxes but for its truncation of centre and half side."""
    size = 224
    count, dims = 400, Dims(400, seed=4)
    dims.width[::7], dims.height[::5] = 1, 3  # no window of their ratio fits
    view = VIEW.model_copy(update={"size": size, "grey": 0.3})
    draws = generator(9, 0, 1).random((count, 32))
    batch = perturb(np.arange(count), dims.height, dims.width, draws, view, HERE)
    jitter = transforms.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue)
    ranges = np.array([jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue])
    drawn = ranges[:, 0] + np.diff(ranges)[:, 0] * draws[:, 23:27]
    drawn[draws[:, 27] < view.grey, 2] = 0
    colours = [batch.brightness, batch.contrast, batch.saturation, batch.hue / 360]
    assert np.abs(np.stack(colours, axis=1) - drawn).max() < 1e-6
    assert np.array_equal(batch.mirror == 1, draws[:, 22] < transforms.RandomHorizontalFlip().p)
    mix = v2.CutMix(num_classes=2)
    for place, own in enumerate(draws):
        image = torch.empty(3, int(dims.height[place]), int(dims.width[place]))
        tries = Drawn(own[:20].reshape(2, 10).T.ravel(), own[20:22])
        monkeypatch.setattr("torchvision.transforms.transforms.torch", tries)
        window = transforms.RandomResizedCrop.get_params(image, list(view.area), list(view.ratio))
        assert batch.window[place].tolist() == list(window), place
        monkeypatch.setattr("torchvision.transforms.v2._augment.torch", Drawn([], own[[31, 30]]))
        mix._dist = SimpleNamespace(sample=lambda _, share=own[29]: 1 - share)  # the share that is kept
        left, top, right, bottom = mix.make_params([torch.empty(3, size, size)])["box"]
        found = batch.box[place] + np.array([0, 0, *batch.box[place, :2]])
        assert (np.abs(found - [top, left, bottom, right]) <= [1, 1, 2, 2]).all(), place


def test_strengths() -> None:
    batch = run(Schedule(4096, 4096, 0), Dims(4096), 0, 1)[0]
    assert 0.45 < batch.mirror.mean() < 0.55
    assert 0.17 < (batch.saturation == 0).mean() < 0.23
    assert batch.brightness.min() < 0.61
    assert batch.brightness.max() > 1.39
    assert np.abs(batch.hue).max() <= 36.0
    assert 0.5 < batch.kept.mean() < 0.75  # uniform lambda has mean 1/2; clipping keeps more
    plain = ViewConfig(size=32, resize=None, cutmix=False, flip=False, grey=0, hue=0, brightness=0)
    batch = run(Schedule(64, 64, 0), Dims(64), 0, 1, plain)[0]
    assert (batch.mirror == 0).all()
    assert (batch.brightness == 1).all()
    assert (batch.hue == 0).all()


def test_batches_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UsageError, match=r"optim.batch 12 must be a multiple of 8 \(2 ranks x CutMix groups of 4\)"):
        Schedule(100, 12, 0, 0, 2)
    with pytest.raises(UsageError, match="7 images are fewer than one batch of 8"):
        Schedule(7, 8, 0)


def best_seconds(call: Callable[[], object], rounds: int = 5) -> float:
    """Of this thread's own time, so that a busy machine does not count."""
    seconds = []
    for _ in range(rounds):
        start = thread_time()
        call()
        seconds.append(thread_time() - start)
    return min(seconds)


def test_orders_and_plans_of_imagenet_are_quick() -> None:
    calls = (lambda: epoch_order(1_281_167, 0, 0)), (lambda: np.random.default_rng(0).permutation(1_281_167))
    order, shuffle = map(min, zip(*([best_seconds(call, 1) for call in calls] for _ in range(5)), strict=True))
    assert order < max(0.1, 2 * shuffle)  # 0.03 s seen; 0.11 s where NumPy's own shuffle takes 0.12
    steps = plans(Schedule(1_281_167, 256, 0), Dims(1_281_167), VIEW, start=0, stop=100)  # type: ignore[arg-type]
    next(steps)
    assert best_seconds(lambda: next(steps), 30) < 0.002  # 0.0003 s seen


def test_a_new_epoch_holds_one_order_in_memory() -> None:
    schedule, dims = Schedule(500_000, 8, 0), Dims(500_000)
    last = schedule.steps_per_pass - 1
    tracemalloc.start()
    try:
        assert len(run(schedule, dims, last, last + 2)) == 2
        assert tracemalloc.get_traced_memory()[1] < 1.1 * 4 * schedule.images
    finally:
        tracemalloc.stop()
