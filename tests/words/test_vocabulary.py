import numpy as np
import pytest
import torch
from torch import Tensor

from bowstore.errors import DataError, UsageError
from bowstore.words.encode.config import EncodeConfig, check_sample
from bowstore.words.encode.prepare import Vocabulary, build_vocabulary
from bowstore.words.encode.sample import SamplePlan, plan_sample
from bowstore.words.store.statistics import health_warnings, perplexity, word_statistics

CPU = torch.device("cpu")


def coded_maps(rows: np.ndarray, h: int, w: int) -> Tensor:
    """Maps whose first channel is the row and whose second is the position."""
    position = torch.arange(h * w, dtype=torch.float32).view(1, 1, h, w).expand(len(rows), 1, h, w)
    row = torch.from_numpy(rows).float().view(-1, 1, 1, 1).expand(-1, 1, h, w)
    return torch.cat([row, position], dim=1)


def blobs(k: int, each: int, d: int = 8) -> np.ndarray:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(k, d)) * 20
    return (centres[:, None] + rng.normal(size=(k, each, d)) * 0.1).reshape(-1, d).astype(np.float32)


@pytest.mark.parametrize(
    ("images", "positions", "k", "per_word", "used", "vectors"),
    [
        (10, 4, 3, 256, 10, 40),  # all there is
        (100, 49, 10, 64, 40, 640),  # a subset of the images, 16 of each
        (100, 49, 20, 256, 100, 4900),
        (100, 49, 20, 100, 100, 2000),  # all images, 20 of each
        (1000, 4, 7, 11, 20, 77),  # small maps: all positions of a few images
        (5, 1, 5, 1, 5, 5),
    ],
)
def test_plan_spreads_the_sample(images: int, positions: int, k: int, per_word: int, used: int, vectors: int) -> None:
    plan = plan_sample(images, positions, k, sample_per_word=per_word, seed=3)
    assert plan.vectors == vectors
    assert len(plan.rows) == used
    assert len(set(plan.rows.tolist())) == used
    assert (np.diff(plan.rows) > 0).all()
    assert plan.rows.max() < images
    assert plan.counts.max() - plan.counts.min() <= 1
    assert plan.counts.max() <= positions


def test_plan_is_a_function_of_the_seed() -> None:
    first, again, other = (plan_sample(1000, 49, 8, sample_per_word=50, seed=s) for s in (1, 1, 2))
    assert np.array_equal(first.rows, again.rows)
    assert np.array_equal(first.counts, again.counts)
    assert not np.array_equal(first.rows, other.rows)


def test_more_words_than_vectors_are_refused() -> None:
    with pytest.raises(UsageError, match=r"K = 41 words .* 10 images give 40 \(4 each\); choose --K at most 40"):
        check_sample(41, 10, 4)
    check_sample(40, 10, 4)


def draw(plan: SamplePlan, rows: np.ndarray, batch: int, h: int, w: int, *, channels_last: bool = False) -> np.ndarray:
    """The sample of batches that come in any order."""
    vectors = np.full((plan.vectors, 2), np.nan, np.float32)
    for start in np.random.default_rng(0).permutation(range(0, len(rows), batch)):
        some = rows[start : start + batch]
        maps = coded_maps(some, h, w)
        taken = plan.take(some, maps.to(memory_format=torch.channels_last) if channels_last else maps)
        vectors[plan.before(some[0]) :][: len(taken)] = taken
    return vectors


@pytest.mark.parametrize("batch", [1, 7, 100])
def test_sample_takes_distinct_positions_of_the_planned_images(batch: int) -> None:
    plan = plan_sample(60, 12, 11, sample_per_word=17, seed=5)
    sample = draw(plan, plan.rows, batch, 3, 4)
    assert sample.shape == (187, 2)
    rows, counts = np.unique(sample[:, 0], return_counts=True)
    assert np.array_equal(rows, plan.rows)
    assert np.array_equal(counts, plan.counts)
    assert len({tuple(vector) for vector in sample.tolist()}) == len(sample)
    assert len(set(sample[:, 1])) == 12  # all positions occur
    assert np.array_equal(sample, draw(plan, plan.rows, 100, 3, 4, channels_last=True))
    assert np.array_equal(sample, draw(plan, np.arange(60), batch, 3, 4))  # other layers' images come by, too


def build(sample: np.ndarray, num_words: int, *, seed: int = 0, iterations: int = 3) -> Vocabulary:
    config = EncodeConfig(teacher="none", seed=seed, iterations=iterations)
    return build_vocabulary(sample.astype(np.float32), num_words, config, CPU)


def test_finds_the_clusters() -> None:
    sample = blobs(3, 50)
    inertia = min(
        build(sample, 3, seed=s, iterations=6).provenance["inertia"]
        for s in range(20)  # random starts may put two words into one cluster
    )
    assert inertia == pytest.approx(8 * 0.01, rel=0.2)


def test_same_seed_same_words_and_one_call_or_many() -> None:
    sample = np.random.default_rng(1).normal(size=(3000, 16)).astype(np.float32)
    first, again, other = (build(sample, 40, seed=s, iterations=7) for s in (4, 4, 5))
    assert np.array_equal(first.centroids_Kp, again.centroids_Kp)
    assert first.provenance == again.provenance
    assert not np.array_equal(first.centroids_Kp, other.centroids_Kp)
    import faiss

    whole = faiss.Kmeans(16, 40, niter=7, seed=4, min_points_per_centroid=1, max_points_per_centroid=3000)
    whole.train(sample)
    assert np.array_equal(whole.centroids, first.centroids_Kp)


def test_provenance_and_health() -> None:
    sample = np.random.default_rng(1).normal(size=(2000, 8)).astype(np.float32)
    provenance = build(sample, 30, seed=2**32 - 1, iterations=5).provenance
    assert provenance["sample"] == 2000
    assert provenance["iterations"] == 5
    assert len(provenance["splits"]) == 5
    assert provenance["dead_words"] == provenance["duplicate_words"] == 0
    assert 15 < provenance["perplexity"] <= 30
    assert 1 / 30 <= provenance["largest_share"] < 0.2


def test_words_that_nothing_is_nearest_to_are_put_elsewhere() -> None:
    few = np.repeat(blobs(3, 1), 400, axis=0) + np.float32(0)
    few[:20] += np.arange(20, dtype=np.float32)[:, None] * 0.1  # barely enough distinct vectors
    vocabulary = build(few, 12, seed=0, iterations=4)
    provenance = vocabulary.provenance
    assert sum(provenance["splits"]) > 0
    assert provenance["refilled_words"] > 0
    assert provenance["dead_words"] == provenance["duplicate_words"] == 0
    assert len(np.unique(vocabulary.centroids_Kp, axis=0)) == 12
    used = np.unique(
        torch.cdist(torch.from_numpy(few).double(), torch.from_numpy(vocabulary.centroids_Kp).double()).argmin(1)
    )
    assert len(used) == 12


def test_refuses_unusable_samples() -> None:
    with pytest.raises(DataError, match="500 feature vectors hold only 1 distinct ones, too few for K = 2"):
        build(np.ones((500, 4)), 2)
    with pytest.raises(DataError, match=r"only 8 distinct ones, too few for K = 10 .* Choose --K at most 8"):
        build(np.tile(np.eye(8), (5, 1)), 10)


def test_one_word() -> None:
    sample = blobs(2, 30)
    vocabulary = build(sample, 1, seed=0, iterations=3)
    assert np.allclose(vocabulary.centroids_Kp[0], sample.mean(axis=0), atol=1e-4)


def test_word_statistics_against_a_plain_count() -> None:
    words = np.random.default_rng(0).integers(0, 9, (37, 3, 4)).astype(np.uint16)
    statistics = word_statistics([words[:10], words[10:11], words[11:]], 12)
    assert statistics.count_K.tolist() == [int((words == k).sum()) for k in range(12)]
    expected = [int((words == k).any(axis=(1, 2)).sum()) for k in range(12)]
    assert statistics.document_frequency_K.tolist() == expected
    each = [perplexity(np.bincount(image.ravel(), minlength=12)) for image in words]
    assert statistics.image_perplexity == pytest.approx(np.mean(each))
    assert statistics.summary()["unused_words"] == 3


def test_health_warnings() -> None:
    even = word_statistics([np.arange(16, dtype=np.uint16).reshape(4, 2, 2)], 16).summary()
    assert even["perplexity"] == pytest.approx(16)
    assert even["image_perplexity"] == pytest.approx(4)
    assert health_warnings(even, 16) == ()
    collapsed = word_statistics([np.array([[[3, 3]], [[3, 1]]], np.uint16)], 16).summary()
    assert "word 3 fills 75 % of all locations" in health_warnings(collapsed, 16)[0]
    assert "14 of 16 words occur in no image" in health_warnings(collapsed, 16)[1]
    assert health_warnings(word_statistics([np.zeros((2, 1, 1), np.uint16)], 1).summary(), 1) == ()
