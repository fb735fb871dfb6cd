import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from bowstore.clustering.projection import Projection, fit_projection, prepare_projection, project_sample
from bowstore.errors import DataError, UsageError
from bowstore.words.encode.config import EncodeConfig
from bowstore.words.encode.prepare import build_vocabulary

CPU = torch.device("cpu")


def sample(n: int = 2000, d: int = 12) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.normal(size=(n, d)) * np.linspace(3, 0.2, d) + 5).astype(np.float32) @ np.linalg.qr(
        rng.normal(size=(d, d))
    )[0].astype(np.float32)


@pytest.mark.parametrize("whiten", [False, True])
def test_equals_scikit_learn(whiten: bool) -> None:
    vectors = sample()
    projection, share = fit_projection(vectors, 5, whiten=whiten)
    oracle = PCA(5, whiten=whiten).fit(vectors.astype(np.float64))
    ours, theirs = project_sample(projection, vectors), oracle.transform(vectors.astype(np.float64))
    signs = np.sign((ours * theirs).sum(0))
    assert np.allclose(ours, theirs * signs, atol=1e-4)
    assert share == pytest.approx(oracle.explained_variance_ratio_.sum(), rel=1e-9)
    assert ours.std(0) == pytest.approx(np.ones(5), rel=1e-3) if whiten else True


def test_all_channels_whitened_equal_scikit_learn() -> None:
    """As for the random teacher's block 1: 64 channels, most of whose variance lies in one direction."""
    rng = np.random.default_rng(1)
    turn = np.linalg.qr(rng.normal(size=(64, 64)))[0]
    vectors = (rng.normal(size=(20_000, 64)) * np.geomspace(8, 0.02, 64) @ turn + 3).astype(np.float32)
    projection, share = fit_projection(vectors, 64, whiten=True)
    ours = project_sample(projection, vectors).astype(np.float64)
    theirs = PCA(64, whiten=True).fit_transform(vectors.astype(np.float64))
    assert share == pytest.approx(1)
    assert np.allclose(np.cov(ours.T), np.eye(64), atol=1e-4)
    assert np.allclose(ours, theirs * np.sign((ours * theirs).sum(0)), atol=2e-3)


def test_sample_and_pass_are_projected_alike() -> None:
    vectors = sample()
    projection, _ = fit_projection(vectors, 4, whiten=True)
    project = prepare_projection(projection, CPU)
    assert np.allclose(project(torch.from_numpy(vectors)).numpy(), project_sample(projection, vectors), atol=1e-4)
    assert isinstance(projection, Projection)


def test_too_many_components_are_one_line() -> None:
    flat = sample(500, 3) @ np.eye(3, 12, dtype=np.float32)
    with pytest.raises(
        DataError, match=r"500 feature vectors vary in only 3 of 12 directions, .*--pca 5; choose at most 3"
    ):
        fit_projection(flat, 5, whiten=True)
    with pytest.raises(DataError, match=r"vary in only 0 of 4 directions"):
        fit_projection(np.ones((100, 4), np.float32), 1, whiten=False)


def test_a_sample_smaller_than_the_components_is_one_line() -> None:
    with pytest.raises(UsageError, match=r"--pca 8 needs as many vectors, the sample has 5; choose at most"):
        fit_projection(sample(5), 8, whiten=False)


def test_words_lie_among_the_components() -> None:
    vocabulary = build_vocabulary(sample(), 9, EncodeConfig(teacher="none", iterations=4, pca=3, whiten=True), CPU)
    assert vocabulary.centroids_Kp.shape == (9, 3)
    assert vocabulary.projection is not None
    assert vocabulary.projection.matrix_pc.shape == (3, 12)
    assert 0.3 < vocabulary.provenance["explained_variance"] < 1
