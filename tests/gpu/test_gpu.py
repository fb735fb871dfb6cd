"""What needs an NVIDIA GPU: the graph with mixed decoding, the training step, the teacher, words on tensor cores."""

from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from shard_sets import ShardMaker, real_data, write_store

from bowstore.benchmarks.assign import bench_assign
from bowstore.benchmarks.encode import bench_encode
from bowstore.benchmarks.kmeans import bench_kmeans
from bowstore.config import EncodeConfig, TrainConfig, ViewConfig, validate
from bowstore.data.pipeline import clean_batches, train_batches
from bowstore.data.plan import Schedule, plans
from bowstore.data.reader import ShardReader
from bowstore.data.views import clean_view
from bowstore.train.loop import train
from bowstore.train.metrics import read_metrics
from bowstore.words import assign_triton
from bowstore.words.assign import assign, assign_reference, prepare_words
from bowstore.words.assign_triton import HOPPER, OTHER, Tiles, nearest, prepare_fast, tiles_for
from bowstore.words.encode import encode
from bowstore.words.kmeans import default_backend, kmeans
from bowstore.words.store import open_store
from bowstore.words.verify import digest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_the_mixed_graph_agrees_with_the_cpu_graph(make_shard_set: ShardMaker) -> None:
    index = make_shard_set(64, size=96)
    view = ViewConfig(size=64, resize=80)
    schedule = Schedule(64, 16, 0)

    def batches(device: torch.device) -> list[torch.Tensor]:
        steps = plans(schedule, index, view, start=0, stop=4)
        found = train_batches(ShardReader(index), view, steps, batch=16, device=device)
        return [batch.images_BCHW.float().cpu() for batch in found]

    for ours, oracle in zip(batches(GPU), batches(CPU), strict=True):
        pixels = (ours - oracle).abs() * 255 * torch.tensor(view.std)[:, None, None]
        assert pixels.mean() < 3.0
    rows = np.arange(64)
    for (_, ours), (_, oracle) in zip(
        clean_batches(ShardReader(index), clean_view(view), rows, batch=16, device=GPU),
        clean_batches(ShardReader(index), clean_view(view), rows, batch=16, device=CPU),
        strict=True,
    ):
        assert ours.is_cuda
        assert (ours.cpu() - oracle).abs().mean() < 0.05


@pytest.mark.parametrize("task", ["rotation", "words"])
@pytest.mark.parametrize("compiled", [False, True])
def test_training_on_a_gpu(make_shard_set: ShardMaker, tmp_path: Path, task: str, compiled: bool) -> None:
    index = make_shard_set(64)
    store = write_store(tmp_path / "words.zarr", index)
    config = validate(
        TrainConfig,
        {
            "name": "gpu",
            "task": task,
            "shards": str(index.root),
            "view": {"size": 32, "resize": None, "cutmix": task == "words"},
            "model": {"arch": "resnet18"},
            "words": {"store": str(store), "layer": "block3"} if task == "words" else {},
            "optim": {"batch": 16, "epochs": 2},
            "runtime": {"device": "cuda", "compile": compiled, "log_every_steps": 2},
        },
        "test",
    )
    report = train(config, tmp_path / "runs")
    assert report.steps == 8
    assert all(np.isfinite(line["loss"]) for line in read_metrics(tmp_path / "runs" / "gpu"))


HALVES = torch.float16, torch.bfloat16
SHAPES = [(5000, 1024, 20000), (257, 3, 65535), (1, 1, 1), (300, 200, 4100), (1, 1000, 129), (513, 70, 1)]


def rectified(n: int, d: int, k: int, factors: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (n, d) and words (k, d) of few factors, as real ones are: near ties among the nearest words."""
    generator = torch.Generator(GPU).manual_seed(n)
    mixture = torch.randn(factors, d, generator=generator, device=GPU)
    features, words = (torch.randn(count, factors, generator=generator, device=GPU) @ mixture for count in (n, k))
    return features.relu(), words.relu()


def exact_scores(features: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Half the squared distances less what is the same for a row, in float64."""
    middle = words.median(dim=0).values
    features, words = features.double() - middle, words.double() - middle
    return words.square().sum(dim=1) / 2 - features @ words.T


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize(("n", "d", "k"), SHAPES)
def test_words_on_tensor_cores_are_the_nearest(n: int, d: int, k: int, half: torch.dtype) -> None:
    features, words = rectified(n, d, k)
    found = nearest(features, prepare_fast(words, half))
    settled = torch.ones(n, dtype=torch.bool, device=GPU)
    settled[found.open_U] = False
    assert settled.all() or d == 3  # where every eighth word and vector is zero
    scores = exact_scores(features, words)
    chosen = scores.gather(1, found.ids_N.long()[:, None])[:, 0]
    sizes = features.double().norm(dim=1) + words.double().norm(dim=1).max()
    assert (chosen <= scores.amin(dim=1) + 1e-13 * sizes.square())[settled].all()


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("tiles", [HOPPER, OTHER])
def test_scores_of_tensor_cores_lie_within_their_bound(tiles: Tiles, half: torch.dtype) -> None:
    if not assign_triton.fits(tiles, GPU):
        pytest.skip("this GPU has less shared memory")
    features, words = rectified(2000, 1024, 5000)
    fast = prepare_fast(words, half)
    rounded, alpha = assign_triton._round(features, fast)
    low, ids, _ = assign_triton._search(rounded, alpha, fast, tiles._replace(ranges=4))
    bound = alpha * fast.reach_J[ids.long()]
    exact = fast.scale**2 * exact_scores(features, words).T.gather(0, ids.long())
    error = (low.double() + bound.double() - exact).abs() / bound
    print(f"largest error {float(error.max()):.3f} of the bound")
    assert error.max() <= 1


def test_assignment_of_a_gpu_is_that_of_faiss_and_of_float32() -> None:
    features, words = rectified(4000, 256, 3000)
    prepared = prepare_words(words)
    assert prepared.fast is not None, "tensor cores and Triton are there"
    ids = assign(features, prepared)
    assert ids.is_cuda
    assert ids.dtype == torch.uint16
    index = faiss.IndexFlatL2(256)
    index.add(words.cpu().numpy())
    expected = index.search(features.cpu().numpy(), 1)[1][:, 0]
    assert (ids.long().cpu().numpy() != expected).mean() < 1e-3
    assert (ids.int() != assign_reference(features, prepared).int()).float().mean() < 1e-3
    on_cpu = assign(features.cpu(), prepare_words(words.cpu()))
    assert (ids.cpu().int() != on_cpu.int()).float().mean() < 1e-3


def test_ties_and_far_vectors_on_a_gpu() -> None:
    words = torch.randint(0, 3, (500, 4), device=GPU).float()
    features = torch.randint(0, 3, (300, 4), device=GPU).float()
    expected = torch.cdist(features.double(), words.double()).square().round().argmin(dim=1)
    assert torch.equal(assign(features, prepare_words(words)).long(), expected)
    assert assign(torch.zeros(3, 8, device=GPU), prepare_words(torch.zeros(500, 8, device=GPU))).tolist() == [0, 0, 0]
    features, words = rectified(50, 64, 700)
    features[7] *= 1e8
    found = nearest(features, prepare_fast(words))
    assert found.open_U.tolist() == [7]
    prepared = prepare_words(words)
    assert assign(features, prepared)[7] == assign_reference(features, prepared)[7]


def test_features_of_more_than_32_bit_offsets() -> None:
    if torch.cuda.mem_get_info(GPU)[0] < 24 << 30:
        pytest.skip("needs 24 GB")
    features = torch.zeros(2**31 // 1024 + 5000, 1024, device=GPU)
    some, words = rectified(3000, 1024, 2000)
    features[-3000:] = some
    prepared = prepare_words(words)
    assert torch.equal(assign(features, prepared)[-3000:].int(), assign(some, prepared).int())
    step = 2**31 // 3000 + 1
    strided = torch.zeros(3000, step, device=GPU)[:, -1024:]  # rows lie further apart than they are wide
    strided.copy_(some)
    assert torch.equal(assign(strided, prepared).int(), assign(some, prepared).int())


def test_assignment_reaches_its_figure() -> None:
    if not any(name in torch.cuda.get_device_name(GPU) for name in ("H100", "H200")):
        pytest.skip("the figure is for an H100")
    assert tiles_for(GPU) == HOPPER
    result = bench_assign(images=256, positions=196, dimensions=1024, words=20000, rounds=3, device=GPU).as_dict()
    print(result)
    assert result["images_per_second"]["assign"]["median"] >= 50_000
    assert result["share_unlike_float32"] < 1e-3
    assert result["share_left_to_float32"] == 0


def test_kmeans_on_a_gpu_settles_where_faiss_does() -> None:
    sample = rectified(20_000, 64, 1)[0].cpu().numpy()
    found = [kmeans(sample, 200, seed=0, iterations=10, device=device, shown=False) for device in (GPU, GPU, CPU)]
    assert default_backend(sample, GPU) == "torch"
    assert np.array_equal(found[0].centroids_Kp, found[1].centroids_Kp)
    assert found[0].inertia == pytest.approx(found[2].inertia, rel=0.05)
    assert (found[0].counts_K > 0).all()


def test_words_of_a_gpu_are_those_of_the_cpu_but_for_near_ties(make_shard_set: ShardMaker, tmp_path: Path) -> None:
    index = make_shard_set(64, size=96)
    layers = ("conv3", "conv4")
    first = EncodeConfig(teacher="torchvision:resnet18", size=64, resize=64, layers=layers, k=(24,), batch=16)
    encode(first, shards=index.root, store=tmp_path / "cpu.zarr", device=CPU)
    same_words = first.model_copy(update={"vocabulary": tmp_path / "cpu.zarr", "k": ()})
    for name in ("gpu.zarr", "again.zarr"):
        encode(same_words, shards=index.root, store=tmp_path / name, device=GPU)
    for layer in layers:
        ours, oracle = (open_store(tmp_path / name).load_words(layer) for name in ("gpu.zarr", "cpu.zarr"))
        assert (ours == oracle).mean() > 0.95  # the decoders differ by a level of grey here and there
    assert digest(tmp_path / "gpu.zarr") == digest(tmp_path / "again.zarr")


def test_kmeans_reaches_its_figure() -> None:
    if not any(name in torch.cuda.get_device_name(GPU) for name in ("H100", "H200")):
        pytest.skip("the figure is for an H100")
    result = bench_kmeans(vectors=5_120_000, dimensions=1024, words=20_000, iterations=25, rounds=2, device=GPU)
    print(result.as_dict())
    assert min(result.figures["seconds_torch"], result.figures["seconds_faiss"]) <= 60


def test_encoding_reaches_its_figure(tmp_path: Path) -> None:
    if not any(name in torch.cuda.get_device_name(GPU) for name in ("H100", "H200")):
        pytest.skip("the figure is for an H100")
    import tarfile

    from bowstore.data.shards import make_shards

    with tarfile.open(real_data("imagenet-sample-250.tar")) as tar:
        tar.extractall(tmp_path / "images", filter="data")
    make_shards(tmp_path / "images", tmp_path / "shards", workers=1)
    config = EncodeConfig(teacher="torchvision:resnet50", layers=("conv4",), k=(20_000,))
    result = bench_encode(tmp_path / "shards/train", config, images=20_000, rounds=3, device=GPU)
    print(result.as_dict())
    assert result.figures["ratio_over_slower"] >= 0.9
