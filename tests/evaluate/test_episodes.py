"""Few-shot episodes and their prototypes, against values by hand and an implementation of another shape."""

import hashlib
import time
from itertools import product

import numpy as np
import pytest
from numpy.typing import NDArray

from bowstore.evaluate.episodes import draw_episodes, episode_accuracy, mean_and_interval

CIFAR100 = np.full(20, 100)


def clustered(classes: int, images: int, dims: int, seed: int = 0) -> NDArray[np.float32]:
    """Features (classes * images, dims), class after class, that few exemplars tell apart badly and many well."""
    rng = np.random.default_rng(seed)
    centre = rng.standard_normal((classes, dims)).repeat(images, axis=0)
    return (0.3 * centre + rng.standard_normal(centre.shape)).astype(np.float32)


def some_episodes(classes: int, images: int, *, shown: int, episodes: int = 40) -> NDArray[np.int64]:
    drawn, places = draw_episodes(np.full(classes, images), ways=5, images=shown, episodes=episodes, seed=3)
    return drawn[..., None] * images + places


def test_the_drawn_episodes_are_pinned() -> None:
    classes, images = draw_episodes(CIFAR100, ways=5, images=65, episodes=2000, seed=0)
    digest = hashlib.sha256(classes.astype("<i8").tobytes() + images.astype("<i8").tobytes()).hexdigest()
    assert digest[:16] == "c5887506c49fa778"


@pytest.mark.parametrize("seed", [0, 7])
def test_an_episode_shows_each_class_and_image_once(seed: int) -> None:
    counts = np.array([9, 30, 12, 9, 20, 1000])
    classes, images = draw_episodes(counts, ways=4, images=9, episodes=300, seed=seed)
    assert classes.shape == (300, 4)
    assert images.shape == (300, 4, 9)
    assert (np.diff(np.sort(classes)) > 0).all()
    assert (np.diff(np.sort(images)) > 0).all()
    assert images.min() == classes.min() == 0
    assert (images < counts[classes][..., None]).all()


def test_every_ordered_choice_is_as_likely_as_any_other() -> None:
    classes, images = draw_episodes(np.full(2, 4), ways=2, images=3, episodes=24_000, seed=1)
    for drawn, pool, count in ((classes, 2, 2), (images[:, 0], 4, 3)):
        choices, seen = np.unique(drawn, axis=0, return_counts=True)
        expected = len(drawn) / (2 if pool == 2 else 24)
        assert [tuple(c) for c in choices] == [c for c in product(range(pool), repeat=count) if len(set(c)) == count]
        assert (abs(seen - expected) < 5 * np.sqrt(expected)).all()


def test_fewer_shots_are_the_same_episodes_with_exemplars_left_out() -> None:
    few, many = (draw_episodes(CIFAR100, ways=5, images=images, episodes=50, seed=0) for images in (16, 65))
    assert np.array_equal(few[0], many[0])
    assert np.array_equal(few[1], many[1][..., :16])
    assert not np.array_equal(few[1], draw_episodes(CIFAR100, ways=5, images=16, episodes=50, seed=1)[1])


def test_a_two_way_episode_by_hand() -> None:
    # Images of a class by their angle: two queries, then two exemplars, one of them a hundred times as long.
    degrees, length = np.array([50, 65, 0, 60, 75, 100, 110, 110]), np.array([1, 1, 1, 100, 1, 1, 1, 1])
    features = np.stack([length * np.cos(np.radians(degrees)), length * np.sin(np.radians(degrees))], axis=1)
    rows = np.array([[[0, 1, 2, 3], [4, 5, 6, 7]]])
    # Of one shot the prototypes are at 0 and 110 degrees: below 55 is the first class, and the query at 65 is wrong. Of
    # two they are at 30 and 110, the border at 70. (At 85, were exemplars averaged as they are: 75 would be wrong.)
    assert episode_accuracy(features, rows, queries=2, shots=[1, 2]).tolist() == [[0.75], [1.0]]
    assert episode_accuracy(features, rows, queries=2, shots=[2]).tolist() == [[1.0]]
    assert episode_accuracy(features, rows[:, ::-1], queries=2, shots=[1, 2]).tolist() == [[0.75], [1.0]]


def test_equal_cosines_are_the_first_class_and_zeros_are_equal_to_all() -> None:
    rows = np.array([[[0, 1], [2, 3], [4, 5]]])
    assert episode_accuracy(np.ones((6, 3), np.float32), rows, queries=1, shots=[1]).tolist() == [[1 / 3]]
    assert episode_accuracy(np.zeros((6, 3), np.float32), rows, queries=1, shots=[1]).tolist() == [[1 / 3]]
    opposite = np.array([[1, 0], [1, 0], [-1, 0], [0, 1], [0, 1], [0, 1]], np.float32)  # a prototype of length 0
    assert episode_accuracy(opposite, np.array([[[0, 1, 2], [3, 4, 5]]]), queries=1, shots=[2]).tolist() == [[1.0]]


def by_loops(features: NDArray[np.float32], rows: NDArray[np.int64], queries: int, shots: int) -> list[float]:
    """Each query alone against each prototype, by distances: for unit vectors the nearest has the largest cosine."""
    values = []
    for episode in rows:
        prototypes = []
        for images in episode:
            unit = [features[row].astype(float) / np.sqrt((features[row].astype(float) ** 2).sum()) for row in images]
            mean = np.mean(unit[queries : queries + shots], axis=0)
            prototypes.append(mean / np.sqrt(mean @ mean))
        right = 0
        for way, images in enumerate(episode):
            for row in images[:queries]:
                query = features[row] / np.linalg.norm(features[row].astype(float))
                distances = [((query - prototype) ** 2).sum() for prototype in prototypes]
                right += distances.index(min(distances)) == way
        values.append(right / episode[:, :queries].size)
    return values


def test_as_slow_loops_give() -> None:
    features = clustered(8, 20, 16)
    rows = some_episodes(8, 20, shown=12)
    found = episode_accuracy(features, rows, queries=4, shots=[1, 3, 8])
    assert found.tolist() == [by_loops(features, rows, 4, shots) for shots in (1, 3, 8)]
    assert 0.2 < found[0].mean() < found[1].mean() < found[2].mean() < 1


def test_the_size_of_a_feature_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    features = clustered(8, 20, 16)
    rows = some_episodes(8, 20, shown=10)
    expected = episode_accuracy(features, rows, queries=5, shots=[1, 5])
    sizes = 2.0 ** np.random.default_rng(1).integers(-60, 60, (len(features), 1)).astype(np.float32)
    assert np.array_equal(
        episode_accuracy(features * sizes.astype(np.float32), rows, queries=5, shots=[1, 5]), expected
    )
    monkeypatch.setattr("bowstore.evaluate.episodes._BLOCK_BYTES", 1)  # nor how many are in memory at a time
    assert np.array_equal(episode_accuracy(features, rows, queries=5, shots=[1, 5]), expected)


def test_mean_and_interval() -> None:
    assert mean_and_interval(np.array([0.2, 0.4, 0.6, 0.8])) == pytest.approx((0.5, 1.96 * 0.2581988897 / 2))
    assert mean_and_interval(np.array([1.0, 1.0])) == (1.0, 0.0)


def test_two_thousand_episodes_of_all_shots_take_a_fraction_of_twenty_seconds() -> None:
    features = clustered(20, 100, 640)
    start = time.process_time()
    classes, images = draw_episodes(CIFAR100, ways=5, images=65, episodes=200, seed=0)
    episode_accuracy(features, classes[..., None] * 100 + images, queries=15, shots=[1, 5, 10, 50])
    assert time.process_time() - start < 20 * 200 / 2000
