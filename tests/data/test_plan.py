import numpy as np
import pytest

from bowstore.config import ViewConfig
from bowstore.data import plan
from bowstore.data.plan import MIX_GROUP, Plan, Schedule, epoch_order, perturb, plans
from bowstore.errors import UsageError

VIEW = ViewConfig(size=32, resize=None, area=(0.2, 1.0))


class Dims:
    """The two columns of an index that a plan reads."""

    def __init__(self, count: int, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        self.height = generator.integers(1, 200, count).astype(np.int32)
        self.width = generator.integers(1, 200, count).astype(np.int32)


def run(schedule: Schedule, dims: Dims, start: int, stop: int, view: ViewConfig = VIEW) -> list[Plan]:
    return list(plans(schedule, dims, view, start=start, stop=stop))  # type: ignore[arg-type]


def test_every_row_once_an_epoch_and_every_epoch_in_another_order() -> None:
    orders = [epoch_order(1003, seed=5, epoch=epoch) for epoch in range(3)]
    for order in orders:
        assert np.array_equal(np.sort(order), np.arange(1003))
    assert not np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], epoch_order(1003, seed=6, epoch=0))


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_the_global_batch_does_not_depend_on_the_number_of_ranks(world: int) -> None:
    dims = Dims(100)
    alone = run(Schedule(100, 32, 3), dims, 0, 14)
    ranks = [run(Schedule(100, 32, 3, rank, world), dims, 0, 14) for rank in range(world)]
    for step, whole in enumerate(alone):
        parts = [rank[step] for rank in ranks]
        assert np.array_equal(np.concatenate([part.rows for part in parts]), whole.rows)
        for name in ("window", "mirror", "brightness", "contrast", "saturation", "hue", "box", "kept"):
            joined = np.concatenate([getattr(part, name) for part in parts])
            assert np.array_equal(joined, getattr(whole, name)), name
        offset = np.repeat(np.arange(world) * 32 // world, 32 // world)
        assert np.array_equal(np.concatenate([part.partner for part in parts]) + offset, whole.partner)


def test_any_step_can_be_recomputed_alone() -> None:
    dims = Dims(50)
    whole = run(Schedule(50, 8, 0), dims, 0, 20)
    for step in (0, 5, 6, 19):
        (again,) = run(Schedule(50, 8, 0), dims, step, step + 1)
        for name in Plan.__dataclass_fields__:
            assert np.array_equal(getattr(again, name), getattr(whole[step], name))


def test_an_epoch_of_steps_covers_disjoint_rows() -> None:
    schedule = Schedule(53, 8, 1)
    rows = np.concatenate([p.rows for p in run(schedule, Dims(53), 0, schedule.steps_per_pass)])
    assert len(rows) == 48
    assert len(np.unique(rows)) == 48


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
    rows = np.arange(count)
    dims = np.full(count, height, np.int32), np.full(count, width, np.int32)
    window = perturb(rows, *dims, draws, VIEW).window
    assert (window[:, :2] >= 0).all()
    assert (window[:, 2:] >= 1).all()
    assert (window[:, 0] + window[:, 2] <= height).all()
    assert (window[:, 1] + window[:, 3] <= width).all()


def test_cutmix_partners_stay_in_their_group_and_lambda_is_the_exact_area() -> None:
    batch = run(Schedule(512, 512, 0), Dims(512), 0, 1)[0]
    place = np.arange(512)
    assert (batch.partner != place).all()
    assert (batch.partner // MIX_GROUP == place // MIX_GROUP).all()
    top, left, height, width = batch.box.T.astype(np.int64)
    assert (top + height <= VIEW.size).all()
    assert (left + width <= VIEW.size).all()
    assert np.array_equal(batch.kept, (1 - height * width / VIEW.size**2).astype(np.float32))
    assert 0.5 < batch.kept.mean() < 0.75  # uniform lambda has mean 1/2; clipping keeps more


def test_strengths() -> None:
    batch = run(Schedule(4096, 4096, 0), Dims(4096), 0, 1)[0]
    assert 0.45 < batch.mirror.mean() < 0.55
    assert 0.17 < (batch.saturation == 0).mean() < 0.23
    assert batch.brightness.min() < 0.61
    assert batch.brightness.max() > 1.39
    assert np.abs(batch.hue).max() <= 36.0
    plain = ViewConfig(size=32, resize=None, cutmix=False, flip=False, grey=0, hue=0, brightness=0)
    batch = run(Schedule(64, 64, 0), Dims(64), 0, 1, plain)[0]
    assert (batch.mirror == 0).all()
    assert (batch.partner == np.arange(64)).all()
    assert (batch.kept == 1).all()
    assert (batch.brightness == 1).all()
    assert (batch.hue == 0).all()


def test_batches_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UsageError, match=r"optim.batch 12 must be a multiple of 8 \(2 ranks x CutMix groups of 4\)"):
        Schedule(100, 12, 0, 0, 2)
    with pytest.raises(UsageError, match="7 images are fewer than one batch of 8"):
        Schedule(7, 8, 0)


def test_a_permutation_of_imagenet_is_quick() -> None:
    from time import perf_counter

    seconds = []
    for epoch in range(5):
        start = perf_counter()
        plan.epoch_order(1_281_167, 0, epoch)
        seconds.append(perf_counter() - start)
    assert min(seconds) < 0.2  # 0.025 s seen; a loose bound for noisy machines
