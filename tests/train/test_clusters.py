"""Deeper Clustering: how images are clustered, what is learned of it, and that stopping changes nothing."""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from noise_batches import ALONE, noise_batch
from recorded_training import exit_codes, start_ranks
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from bowstore import progress as progress_module
from bowstore.data.index import open_index
from bowstore.data.pipeline import clean_batches
from bowstore.data.reader import ShardReader
from bowstore.data.views import clean_view
from bowstore.errors import TrainingError, UsageError
from bowstore.models.saved import newest_checkpoint
from bowstore.runs import read_metrics
from bowstore.train import loop, metrics
from bowstore.train.config import TrainConfig
from bowstore.train.distributed import World, joined
from bowstore.train.step import build_optimizer, forget_momenta
from bowstore.train.tasks import clusters as module
from bowstore.train.tasks.clusters import Clusters, prepared
from bowstore.train.tasks.task import Task, build_task

Make = Callable[..., TrainConfig]


@pytest.fixture
def config(make_config: Make) -> TrainConfig:
    return make_config("clusters")


def built(config: TrainConfig, world: World = ALONE) -> Task:
    return build_task(config, open_index(Path(str(config.shards))), world)


def clusters_of(task: Task) -> Clusters:
    assert isinstance(task.renewal, Clusters)
    return task.renewal


# --- the clustering


def test_features_are_those_of_the_network_in_eval_mode(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", 20)
    task = built(config)
    network, index = task.network.train(), open_index(Path(str(config.shards)))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found_NC = clusters_of(task)._features(0)
    assert all(module.training for module in network.modules())
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), f"running statistics stay as they are: {name}"
    trunk = network.backbone.double().eval()
    with torch.no_grad():
        batches = clean_batches(
            ShardReader(index), clean_view(config.view), np.arange(len(index)), batch=72, device=ALONE.device
        )
        expected_NC = torch.cat([trunk(images_BCHW.double()) for _, images_BCHW in batches])
    assert np.allclose(found_NC, expected_NC.numpy(), atol=1e-5)


def test_planted_groups_of_directions_are_found(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    group_N = rng.integers(0, 6, 72)
    group_N[:6] = np.arange(6)
    feature_NC = (np.eye(64)[7 * group_N] + 0.01 * rng.normal(size=(72, 64))) * rng.uniform(0.1, 50, (72, 1))
    task = built(config)
    clusters = clusters_of(task)
    monkeypatch.setattr(clusters, "_features", lambda step: feature_NC.astype(np.float32))
    assert (clusters.due(0), clusters.due(3)) == (True, True), "there are none yet"
    list(clusters.renew(0))
    assert adjusted_rand_score(group_N, clusters.cluster_N) == 1
    share_K = np.bincount(group_N) / 72
    entropy = -(share_K * np.log(share_K)).sum()
    assert task.constants["chance_loss"] == pytest.approx(entropy)
    assert task.dead is not None
    assert task.dead.loss == pytest.approx(entropy)
    assert [step for step in range(13) if clusters.due(step)] == [0, 4, 8, 12], "72 images in batches of 16"
    assert np.allclose(np.linalg.norm(prepared(feature_NC.astype(np.float32)), axis=1), 1, atol=1e-6)


def test_the_head_over_the_clusters_alone_begins_anew(config: TrainConfig) -> None:
    task = built(config)
    network, optimizer = task.network, build_optimizer(task.network, config.optim)
    inputs, targets = task.prepare(noise_batch(config))
    task.loss(network(inputs), targets)[0].backward()  # type: ignore[arg-type]
    optimizer.step()
    with torch.no_grad():
        network.head[0].gamma.fill_(3)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    momenta = {name: optimizer.state[value]["momentum_buffer"].clone() for name, value in network.named_parameters()}
    forget_momenta(optimizer, clusters_of(task).renew(4))
    changed = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"head.0.weight", "head.0.gamma"}
    assert network.head[0].gamma == 1
    for name, parameter in network.named_parameters():
        momentum = optimizer.state[parameter]["momentum_buffer"]
        assert torch.equal(momentum, torch.zeros_like(momentum) if name in changed else momenta[name]), name
    again = built(config)
    list(clusters_of(again).renew(4))
    assert torch.equal(again.network.head[0].weight, network.head[0].weight), "drawn from seed and step alone"
    list(clusters_of(again).renew(8))
    assert not torch.equal(again.network.head[0].weight, network.head[0].weight)


def _renew(rank: int, config: TrainConfig, out: Path) -> None:
    torch.set_num_threads(1)
    module._BLOCK = 20
    with joined("cpu") as world:
        task = built(config, world)
        with torch.no_grad():  # as after a step, in which each rank sees other images
            for buffer in task.network.backbone.buffers():
                if buffer.is_floating_point():
                    buffer += world.rank
        list(clusters_of(task).renew(0))
        assert torch.equal(next(b for b in task.network.buffers() if b.is_floating_point()), torch.zeros(16))
        np.save(out / f"{world.size}-{rank}.npy", clusters_of(task).cluster_N)


def test_any_number_of_ranks_finds_the_same_clusters(config: TrainConfig, tmp_path: Path) -> None:
    _renew(0, config, tmp_path)
    changed = config.model_copy(update={"optim": config.optim.model_copy(update={"batch": 24})})
    assert exit_codes(start_ranks(_renew, 3, (changed, tmp_path))) == [0] * 3
    found = [np.load(path) for path in sorted(tmp_path.glob("*-*.npy"))]
    assert len(found) == 4, "four blocks of images: rank 0 has two of them"
    assert len(np.unique(found[0])) == 6
    assert all(np.array_equal(one, found[0]) for one in found)


# --- what is learned


@pytest.mark.parametrize("rotation", [False, True])
@pytest.mark.parametrize("head", ["cosine", "linear"])
def test_the_loss_is_that_of_dense_targets_in_float64(make_config: Make, head: str, rotation: bool) -> None:
    config = make_config("clusters", {"head": head, "rotation": rotation})
    task = built(config)
    clusters = clusters_of(task)
    clusters.cluster_N = np.random.default_rng(0).integers(0, 6, 72)
    batch = noise_batch(config)
    plan = batch.plan
    assert plan.mixed
    inputs, targets = task.prepare(batch)
    quarters = 4 if rotation else 1
    for place, image in enumerate(inputs):
        expected = torch.rot90(batch.images_BCHW[place % 16], place // 16, (1, 2))
        assert torch.equal(image, expected)
    one_hot_BK = np.eye(6)[clusters.cluster_N[plan.rows]]
    kept_B1 = plan.kept[:, None].astype(np.float64)
    dense_BK = torch.from_numpy(kept_B1 * one_hot_BK + (1 - kept_B1) * one_hot_BK[plan.partner]).repeat(quarters, 1)
    network = task.network.double()
    logits = network(inputs.double())
    several = logits if isinstance(logits, tuple) else (logits,)
    expected = -(dense_BK * several[0].log_softmax(1)).sum(1).mean()
    hits = (dense_BK[torch.arange(len(dense_BK)), several[0].argmax(1)]).mean()
    if rotation:
        quarter_B = torch.arange(4).repeat_interleave(16)
        turned = F.cross_entropy(several[1], quarter_B)
        expected = expected + turned
    weights = [parameter for parameter in network.parameters()]
    expected_gradients = torch.autograd.grad(expected, weights, retain_graph=True)
    singles = tuple(each.float() for each in several)
    loss, told = task.loss(singles if rotation else singles[0], targets)  # type: ignore[arg-type]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for ours, right in zip(torch.autograd.grad(loss, weights), expected_gradients, strict=True):
        assert torch.allclose(ours, right, rtol=1e-4, atol=1e-6)
    assert told["accuracy"].item() == pytest.approx(hits.item(), abs=1e-6)
    assert ("rotation_accuracy" in told) == rotation
    assert told["cluster_loss"].item() == pytest.approx(expected.item() - (turned.item() if rotation else 0), rel=1e-5)


# --- runs


def run_of(config: TrainConfig, runs: Path) -> dict[str, Any]:
    loop.train(config, runs)
    state = newest_checkpoint(runs / config.name)
    assert state is not None
    return state


class Stopped(Exception):
    pass


def test_stopping_anywhere_changes_nothing(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve steps, clustered anew before steps 0, 4 and 8; checkpoints at 5, 10 and the end."""
    whole = run_of(config, tmp_path / "whole")
    real_step, real_kmeans, count = loop.train_step, module.kmeans, [0]

    def stopped(real: Callable[..., Any], at: int) -> Callable[..., Any]:
        def call(*args: Any, **how: Any) -> Any:
            count[0] += 1
            if count[0] > at:
                raise Stopped
            return real(*args, **how)

        count[0] = 0
        return call

    # The first ends in the second clustering (before the first checkpoint), the second in the third one, from step 5.
    for patched, real, at in ((module, real_kmeans, 1), (loop, real_step, 7), (module, real_kmeans, 0)):
        name = "kmeans" if patched is module else "train_step"
        with monkeypatch.context() as patch:
            patch.setattr(patched, name, stopped(real, at))
            with pytest.raises(Stopped):
                loop.train(config, tmp_path / "parts")
    parts = run_of(config, tmp_path / "parts")
    for part in ("backbone", "head"):
        for name, value in whole[part].items():
            assert torch.equal(parts[part][name], value), name
    assert torch.equal(parts["renewal"]["clusters"], whole["renewal"]["clusters"])
    logs = [[{**line, "images_per_second": 0} for line in read_metrics(tmp_path / way / config.name)] for way in
            ("whole", "parts")]  # fmt: skip
    assert logs[0] == logs[1]
    agreement = [line.get("cluster_agreement") for line in logs[0]]
    assert agreement[:2] == [None, None]
    assert all(value is not None and 0 <= value <= 1 for value in agreement[2:])


def test_a_checkpoint_between_two_clusterings_holds_the_clusters(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[np.ndarray] = []
    real = module.kmeans

    def kept(*args: Any, **how: Any) -> Any:
        clusters = real(*args, **how)
        found.append(clusters.words_S)
        return clusters

    monkeypatch.setattr(module, "kmeans", kept)
    state = run_of(config, tmp_path)
    assert len(found) == 3
    assert np.array_equal(state["renewal"]["clusters"].numpy(), found[2])
    assert read_metrics(tmp_path / config.name)[-1]["cluster_agreement"] == pytest.approx(
        normalized_mutual_info_score(found[1], found[2]), abs=1e-6
    )
    task = built(config)
    clusters_of(task).load_state_dict(state["renewal"])
    assert np.array_equal(clusters_of(task).cluster_N, found[2])
    assert (clusters_of(task).due(9), clusters_of(task).due(12)) == (False, True)
    fewer = built(config.model_copy(update={"images": 60}))
    clusters_of(fewer).load_state_dict(state["renewal"])
    assert clusters_of(fewer).due(9), "of other images"


def test_the_time_of_a_clustering_is_none_of_the_trainings(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(progress_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    meter, progress = metrics.Meter(ALONE.device), progress_module.Progress("train", 1000, shown=False)
    for step in range(15):
        if step in (0, 10):
            with meter.paused(), progress.paused():
                now[0] += 500
        now[0] += 2
        meter.count(10, {"loss": torch.tensor(1.0)})
        progress.advance(10)
    assert meter.rates() == (10 * 10 / 20, 0.0)  # of the ten steps from the fifth on
    assert progress.rate == 150 / 30


def test_a_bar_gives_way_to_that_of_a_clustering(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal only one may be shown at a time."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress_module.Progress("train", 10) as outer:
        with outer.paused(), progress_module.Progress("clusters", 5) as inner:
            inner.advance(5)
        outer.advance(10)
    assert (outer.count, inner.count) == (10, 5)


# --- what cannot be


def test_fewer_images_than_clusters_are_refused_before_any_work(make_config: Make, tmp_path: Path) -> None:
    config = make_config("clusters", {"clusters": 73})
    with pytest.raises(UsageError, match=r"^task\.clusters 73 needs as many images, and 72 are used; lower task"):
        loop.train(config, tmp_path / "runs")
    assert not (tmp_path / "runs/clusters-run/config.yaml").exists()
    with pytest.raises(UsageError, match=r"clusters: Input should be greater than or equal to 2 \(got 1\)"):
        make_config("clusters", {"clusters": 1})
    with pytest.raises(UsageError, match=r"gamma 2 is the scale of head cosine; leave it out with head linear"):
        make_config("clusters", {"head": "linear", "gamma": 2.0})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            2.0,
            r"^task clusters, step 0: the features of 72 images are only 1 distinct ones, too few for 6 clusters: the",
        ),
        (
            math.nan,
            r"^task clusters, step 0: the features of 72 images hold NaN or infinity in 72 of them; lower optim",
        ),
    ],
)
def test_features_that_cannot_be_clustered(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, value: float, message: str
) -> None:
    clusters = clusters_of(built(config))
    monkeypatch.setattr(clusters, "_features", lambda step: np.full((72, 64), value, np.float32))
    with pytest.raises(TrainingError, match=message) as error:
        clusters.renew(0)
    assert "\n" not in str(error.value)
