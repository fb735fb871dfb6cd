"""Proof that every image is trained with its own target, and that this proof can fail."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from coloured_keys import (
    code,
    coloured_image,
    colours,
    dense,
    distinct_keys,
    misaligned,
    training_config,
    words_of,
    write_coloured_store,
    write_coloured_tars,
)

from bowstore.data.index import Index, build_index, open_index
from bowstore.data.pipeline import train_batches
from bowstore.data.plan import Plan, plans
from bowstore.data.reader import ShardReader
from bowstore.data.verify import verify_folder
from bowstore.data.views import Batch
from bowstore.errors import CorruptError, DataError, MismatchError
from bowstore.train.config import TrainConfig
from bowstore.train.distributed import World
from bowstore.train.loop import data_schedule
from bowstore.train.tasks.task import Task, build_task
from bowstore.words.targets.bags import Bag

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
KEYS = distinct_keys(96)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return build_index(write_coloured_tars(tmp_path / "shards", KEYS, per_shard=40)).root


@pytest.fixture
def store(shards: Path, tmp_path: Path) -> Path:
    return write_coloured_store(tmp_path / "words.zarr", KEYS, fingerprint=open_index(shards).fingerprint)


def train_side(config: TrainConfig, *, rank: int = 0, world: int = 1) -> Iterator[tuple[Index, Task, Batch]]:
    """What a rank's training step is given, over the whole run."""
    assert config.shards is not None
    index = open_index(config.shards)
    schedule = data_schedule(config, index, World(rank, world, CPU))
    task = build_task(config, index, ALONE)
    steps = plans(schedule, index, config.view, start=0, stop=config.optim.epochs * schedule.steps_per_pass)
    batch = schedule.rank_batch
    for item in train_batches(
        ShardReader(index), config.view, steps, batch=batch, device=CPU, threads=1, ahead=task.ahead
    ):
        yield index, task, item


def wrong_targets(config: TrainConfig) -> tuple[int, int]:
    """Samples whose picture contradicts their bag, and all samples of a run of one rank."""
    wrong = total = 0
    for _, task, batch in train_side(config):
        images, bag = task.prepare(batch)
        wrong += len(misaligned(images, bag, config.view))
        total += len(images)
    return wrong, total


@pytest.mark.parametrize(
    ("tier", "form"), [("resident", "count"), ("resident", "binary"), ("host", "count"), ("streamed", "count")]
)
def test_alignment_of_every_sample_on_two_ranks_over_two_epochs(
    shards: Path, store: Path, tmp_path: Path, tier: str, form: str
) -> None:
    runtime = {"targets": tier, "storage": {"cache": str(tmp_path / "cache")}}
    config = training_config(shards, store, runtime=runtime, words={"form": form})
    seen: list[list[str]] = [[], []]
    for rank in range(2):
        for step, (index, task, batch) in enumerate(train_side(config, rank=rank, world=2)):
            images, bag = task.prepare(batch)
            assert misaligned(images, bag, config.view) == []
            keys = [index.key(row) for row in batch.plan.rows.tolist()]
            assert_colours_are_those_of_the_keys(batch.plan, keys, colours(images, config.view))
            seen[step // 6] += keys
    assert sorted(seen[0]) == sorted(seen[1]) == sorted(KEYS)
    assert seen[0] != seen[1]


def assert_colours_are_those_of_the_keys(plan: Plan, keys: list[str], levels_BHWC: np.ndarray) -> None:
    """The key's colour outside the pasted box, the partner's inside, and the box as large as the weights say."""
    size = levels_BHWC.shape[1]
    for place, (key, levels) in enumerate(zip(keys, levels_BHWC, strict=True)):
        top, left, height, width = plan.box[place].tolist()
        inside = np.zeros((size, size), bool)
        inside[top : top + height, left : left + width] = True
        assert (levels[~inside] == code(key)).all()
        assert (levels[inside] == code(keys[plan.partner[place]])).all()
        assert plan.kept[place] == np.float32(1 - inside.mean())


@pytest.mark.parametrize(
    ("change", "tier"),
    [
        ("resharded", "resident"), ("reordered", "resident"), ("sub-sampled", "resident"),
        ("all of it", "resident"), ("all of it", "host"), ("all of it", "streamed"),
    ],
)  # fmt: skip
def test_alignment_of_a_store_with_copies_of_its_images(
    shards: Path, store: Path, tmp_path: Path, change: str, tier: str
) -> None:
    """The same images under the same keys, joined by key: the same bag for each."""
    shuffled = [KEYS[place] for place in np.random.default_rng(3).permutation(len(KEYS))]
    keys, per_shard = {
        "resharded": (KEYS, 17),
        "reordered": (shuffled, 40),
        "sub-sampled": (KEYS[::3], 40),
        "all of it": (shuffled[:50], 7),
    }[change]
    root = build_index(write_coloured_tars(tmp_path / "copy", keys, per_shard=per_shard, name="other")).root
    assert open_index(root).fingerprint != open_index(shards).fingerprint
    runtime = {"targets": tier, "storage": {"cache": str(tmp_path / "cache")}}
    wrong, total = wrong_targets(training_config(root, store, runtime=runtime))
    assert wrong == 0
    assert total == 2 * (len(keys) // 16) * 16
    plain = training_config(root, store, runtime=runtime, view={"cutmix": False})
    original = words_of(KEYS)[:, 0]
    for index, task, batch in train_side(plain):
        names = [index.key(row) for row in batch.plan.rows.tolist()]
        assert task.prepare(batch)[1].words_BM.tolist() == original[[KEYS.index(name) for name in names]].tolist()


def test_alignment_needs_every_key_in_the_store(shards: Path, tmp_path: Path) -> None:
    lacking = write_coloured_store(tmp_path / "few.zarr", [*KEYS[:10], *KEYS[17:]])
    names = ", ".join(KEYS[10:15])
    with pytest.raises(
        MismatchError,
        match=rf"^7 of 96 keys of the shards are missing from word store {lacking}, for example {names}; encode these",
    ):
        build_task(training_config(shards, lacking), open_index(shards), ALONE)


def test_alignment_needs_every_key_once(shards: Path, tmp_path: Path) -> None:
    doubled = write_coloured_store(tmp_path / "twice.zarr", [*KEYS, *KEYS[20:27]])
    names = ", ".join(KEYS[20:25])
    with pytest.raises(
        MismatchError,
        match=rf"^7 of 96 keys of the shards are more than once in word store {doubled}, for example {names}; encode",
    ):
        build_task(training_config(shards, doubled), open_index(shards), ALONE)
    root = write_coloured_tars(tmp_path / "twice", [*KEYS[:12], *KEYS[2:8]], per_shard=12)
    with pytest.raises(DataError, match=rf"^6 keys occur more than once, for example \['{KEYS[2]}', .*must be unique"):
        build_index(root)


def test_alignment_broken_by_permuted_tars_under_the_old_index_is_refused(shards: Path, store: Path) -> None:
    """Same keys, same sizes, other places: only the names in the tars can tell."""
    write_coloured_tars(shards, KEYS[::-1], per_shard=40)
    with pytest.raises(MismatchError, match=r"holds '.*\.jpg' at byte \d+, the index says 'c.*changed after indexing"):
        wrong_targets(training_config(shards, store))


def test_alignment_broken_by_exchanged_images_under_the_same_names_is_seen(shards: Path, store: Path) -> None:
    """No header tells; the digests do, those of the index at each read and those of the store at the join."""
    other = dict(zip(KEYS, np.roll(KEYS, 1).tolist(), strict=True))
    write_coloured_tars(shards, KEYS, per_shard=40, image=lambda key: coloured_image(other[key]))
    assert len(verify_folder(shards, workers=1).damaged) == 3
    with pytest.raises(CorruptError, match=r"image 'c\d/\d+' in shard .* differs from its digest in the index"):
        wrong_targets(training_config(shards, store))
    build_index(shards)
    with pytest.raises(MismatchError, match=r"96 of 96 images of the shards are not those that word store"):
        wrong_targets(training_config(shards, store))
    wrong, total = wrong_targets(training_config(shards, store, words={"reencoded": True}))
    assert wrong == total == 192


def test_alignment_broken_by_words_in_other_rows_is_seen(shards: Path, tmp_path: Path) -> None:
    for name, words in (("rolled", np.roll(words_of(KEYS), 1, axis=0)), ("one", words_of([KEYS[1], *KEYS[1:]]))):
        fingerprint = open_index(shards).fingerprint
        broken = write_coloured_store(tmp_path / f"{name}.zarr", KEYS, fingerprint=fingerprint, words=words)
        wrong, total = wrong_targets(training_config(shards, broken))
        assert (wrong == total) == (name == "rolled")
        assert 2 <= wrong  # the one row itself, and whatever it is pasted into, in each of two epochs


@pytest.mark.parametrize(
    "change",
    [
        lambda plan: replace(plan, rows=np.roll(plan.rows, 1)),
        lambda plan: replace(plan, rows=plan.rows[::-1].copy()),
        lambda plan: replace(plan, partner=np.roll(plan.partner, 1)),
        lambda plan: replace(plan, partner=np.arange(len(plan.rows), dtype=np.int32)),
        lambda plan: replace(plan, kept=1 - plan.kept),
        lambda plan: replace(plan, kept=np.clip(plan.kept + 1 / 256, 0, 1).astype(np.float32)),
    ],
    ids=["rows by one", "rows reversed", "partner by one", "no partner", "weights exchanged", "one pixel too much"],
)
def test_alignment_broken_in_a_batch_is_seen(shards: Path, store: Path, change: Callable[[Plan], Plan]) -> None:
    """The right pictures with a target that is off in the least way."""
    config = training_config(shards, store, optim={"epochs": 1})
    for _, task, batch in train_side(config):
        assert misaligned(*task.prepare(batch), config.view) == []
        images, bag = task.prepare(replace(batch, plan=change(batch.plan)))
        assert len(misaligned(images, bag, config.view)) > len(images) // 2


def test_alignment_of_bags_is_read_off_the_words(shards: Path) -> None:
    """The comparison itself: words in any order and in several slots are the same bag."""
    words_BM = torch.tensor([[3, 20, 40, 3], [20, 3, 40, 3]])
    weights_BM = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.25, 0.1, 0.25, 0.4]])
    first, second = dense(Bag(words_BM, weights_BM))
    assert first == pytest.approx(second)
    assert first.sum() == pytest.approx(1)
