"""Full-size ImageNet photographs and CIFAR-10, where they lie beside the checkout."""

import io
import tarfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from shard_sets import real_data
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf

from bowstore.config import ModelConfig, ViewConfig, Workspace, validate
from bowstore.data.config import ShardsConfig
from bowstore.data.index import open_index
from bowstore.data.pipeline import clean_batches, train_batches
from bowstore.data.plan import Schedule, plans
from bowstore.data.reader import ShardReader
from bowstore.data.shards import make_shards
from bowstore.data.views import clean_view
from bowstore.evaluate.config import EvalConfig
from bowstore.evaluate.protocols import PROTOCOLS
from bowstore.evaluate.protocols.fewshot import FewShotSettings
from bowstore.evaluate.runner import evaluate
from bowstore.models.saved import SavedNetwork, save_backbone
from bowstore.runs import read_metrics
from bowstore.train.config import TrainConfig
from bowstore.train.loop import train
from bowstore.words.encode.config import EncodeConfig
from bowstore.words.encode.encode import encode
from bowstore.words.store.store import open_store

CPU = torch.device("cpu")


def unpack(archive: Path, folder: Path, count: int, *, every: int = 1, split: str = "train") -> Path:
    """Copy some images out of an archive of SPLIT/CLASS/name files."""
    with tarfile.open(archive) as tar:
        images = (m for m in tar if m.isreg() and m.name.lower().endswith((".jpg", ".jpeg")) and f"{split}/" in m.name)
        for member in islice(images, 0, count * every, every):
            path = folder / split / Path(member.name).parent.name / Path(member.name).name
            path.parent.mkdir(parents=True, exist_ok=True)
            file = tar.extractfile(member)
            assert file is not None
            path.write_bytes(file.read())
    return folder


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    unpack(real_data("imagenet-sample-250.tar"), folder / "images", 24)
    (report,) = make_shards(folder / "images", folder / "shards", ShardsConfig(workers=1))
    assert report.written == report.found == 24
    return folder / "shards" / "train"


def test_the_clean_view_of_photographs_agrees_with_torchvision(photographs: Path) -> None:
    index = open_index(photographs)
    source, view = ShardReader(index), ViewConfig()
    oracle = v2.Compose([v2.Resize(256, antialias=True), v2.CenterCrop(224)])
    mean, std = torch.tensor(view.mean)[:, None, None], torch.tensor(view.std)[:, None, None]
    errors = []
    for rows, images in clean_batches(source, clean_view(view), np.arange(24), batch=8, device=CPU):
        for row, image in zip(rows, images, strict=True):
            picture = Image.open(io.BytesIO(source.read(np.array([row]))[0].tobytes())).convert("RGB")
            expected = oracle(tvf.pil_to_tensor(picture)).float()
            errors.append((255 * (image * std + mean) - expected).abs().mean().item())
    assert max(errors) < 1.0, f"mean absolute pixel error {max(errors):.2f} of 255"


def test_the_train_view_of_photographs_is_whole(photographs: Path) -> None:
    index, view = open_index(photographs), ViewConfig()
    steps = plans(Schedule(24, 8, 0), index, view, start=0, stop=6)
    batches = list(train_batches(ShardReader(index), view, steps, batch=8, device=CPU))
    assert len(batches) == 6
    for batch in batches:
        assert batch.images_BCHW.shape == (8, 3, 224, 224)
        assert torch.isfinite(batch.images_BCHW).all()
        assert (batch.images_BCHW.flatten(1).std(1) > 0.05).all()


def test_resnet50_words_have_the_papers_size(photographs: Path, tmp_path: Path) -> None:
    network = SavedNetwork(name="t", task="rotation", model=ModelConfig(arch="resnet50"))
    save_backbone(tmp_path / "teacher.safetensors", network.fresh(), network)
    words = EncodeConfig(
        teacher=tmp_path / "teacher.safetensors",
        layers=("conv4",),
        num_words=(64,),
        sample_per_word=32,
        iterations=3,
        batch=8,
    )
    (report,) = encode(words, shards=photographs, store=tmp_path / "words.zarr").layers
    assert (report["grid"], report["words"]) == ((14, 14), 64)
    assert open_store(tmp_path / "words.zarr").load_words("conv4").shape == (24, 14, 14)


def test_cifar_images_pass_and_are_told_apart(tmp_path: Path) -> None:
    """60 images of each of three classes, by a network that has learned nothing but whose colours differ."""
    unpack(real_data("cifar10-jpeg.tar.gz"), tmp_path / "images", 180, every=16, split="test")
    (report,) = make_shards(tmp_path / "images", tmp_path / "shards", ShardsConfig(workers=1))
    assert report.written == 180
    index = open_index(tmp_path / "shards" / "test")
    assert set(index.height.tolist()) == set(index.width.tolist()) == {32}
    view, model = ViewConfig(size=32, resize=None), ModelConfig(arch="wrn-10-1")
    network = SavedNetwork(name="random", task="rotation", view=view, model=model)
    save_backbone(tmp_path / "random.safetensors", network.fresh(), network)
    run, workspace = EvalConfig(run=str(tmp_path / "random.safetensors")), Workspace(shards=tmp_path / "shards/test")
    few = FewShotSettings(ways=3, shots=(1, 40), classes=("Bird,auto-mobile,AIRPLANE",), episodes=200)
    found = evaluate(PROTOCOLS.get("fewshot"), few, run, workspace).metrics
    assert 1 / 3 < found["1-shot"] < found["40-shot"] < 0.7, found
    knn = PROTOCOLS.get("knn")
    top1 = evaluate(knn, knn.settings(k=20, held_out=True), run, workspace).metrics["top1"]
    assert 1 / 3 < top1 < 0.9


def test_classes_of_photographs_are_learned(tmp_path: Path) -> None:
    unpack(real_data("imagenette-224.tar"), tmp_path / "images", 64, every=147)
    make_shards(tmp_path / "images", tmp_path / "shards", ShardsConfig(workers=1))
    share = np.bincount(open_index(tmp_path / "shards/train").label) / 64
    assert len(share) == 10
    for head in ("linear", "cosine"):
        values = {
            "name": head,
            "task": {"name": "supervised", "head": head},
            "shards": str(tmp_path / "shards/train"),
            "view": {"size": 32, "resize": None, "area": [0.9, 1.0], "grey": 0, "hue": 0, "cutmix": False},
            "model": {"arch": "wrn-10-1", "strides": [2, 2, 1]},
            "optim": {"batch": 32, "epochs": 10, "lr": 0.1},
            "runtime": {"log_every_steps": 4, "threads": 1},
        }
        train(validate(TrainConfig, values, "test"), tmp_path / "runs")
        first, *_, last = read_metrics(tmp_path / "runs" / head)
        assert first["chance_loss"] == pytest.approx(-(share * np.log(share)).sum())
        assert last["loss"] < 0.9 * last["chance_loss"], head
        assert last["accuracy"] > 0.3 > first["accuracy"], head
