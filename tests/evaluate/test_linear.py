import io
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from bowstore.config import ViewConfig, Workspace, dump, validate
from bowstore.data.index import build_index
from bowstore.errors import DataError, MismatchError, UsageError
from bowstore.evaluate.augmented import augmented
from bowstore.evaluate.config import EvalConfig
from bowstore.evaluate.linear import LinearConfig, learning_rate, linear_probe, standardised
from bowstore.evaluate.protocols.linear import KIND, LinearSettings, describe
from bowstore.evaluate.results import Result, read_result
from bowstore.evaluate.runner import evaluate
from bowstore.evaluate.splits import open_splits
from bowstore.models.saved import network_of, save_backbone
from bowstore.train.distributed import World

Arrays = tuple[NDArray[np.float32], NDArray[np.int64]]


def blobs(images: int = 200, classes: int = 3, dims: int = 8, seed: int = 0, spread: float = 0.3) -> Arrays:
    """Gaussian classes around the axes."""
    draws = np.random.default_rng(seed)
    labels = np.arange(images) % classes
    features = np.eye(classes, dims)[labels] + spread * draws.standard_normal((images, dims))
    return features.astype(np.float32), labels


def test_schedule_of_the_paper() -> None:
    config = LinearConfig()
    rates = [learning_rate(epoch, config) for epoch in (0, 9, 10, 19, 20, 30, 40, 50, 59)]
    assert rates == pytest.approx([0.1, 0.1, 0.03, 0.03, 0.009, 0.0027, 0.00081, 0.000243, 0.000243])
    assert (config.epochs, config.weight_decay) == (60, 1e-3)


def test_defaults_where_the_paper_is_silent() -> None:
    config = LinearConfig()
    assert (config.momentum, config.nesterov, config.batch, config.standardise) == (0.9, True, 128, False)


def test_standardised_features_are_another_protocol() -> None:
    for settings, protocol_id in (
        (LinearSettings(), "linear/bownet-cifar"),
        (LinearSettings(standardise=True), "linear/standardised"),
        (LinearSettings(held_out=True), "linear/bownet-cifar-held-out"),
        (LinearSettings(held_out=True, standardise=True), "linear/standardised-held-out"),
        (LinearSettings(layers=("block2",)), "linear/block2/bownet-cifar"),
        (LinearSettings(layers=("block2",), held_out=True), "linear/block2/bownet-cifar-held-out"),
    ):
        assert (describe(settings).id, describe(settings).version) == (protocol_id, 1)


def probe(train: Arrays, test: Arrays, **config: Any) -> Any:
    """The probe's metrics and details together."""
    scores = linear_probe(
        *train,
        *test,
        classes=int(train[1].max()) + 1,
        config=LinearConfig(**({"epochs": 5} | config)),
        device=torch.device("cpu"),
    )
    return SimpleNamespace(**scores.metrics, **scores.details)


def test_learns_separable_classes() -> None:
    result = probe(blobs(seed=0), blobs(seed=1), epochs=20)
    assert result.top1 > 0.95
    assert result.train_top1 > 0.95
    assert not hasattr(result, "top5")
    assert len(result.losses) == 20
    assert result.losses[-1] < result.losses[0] < np.log(3)


def test_same_seed_same_result_other_seed_other() -> None:
    one, same, other = (probe(blobs(), blobs(seed=1), epochs=3, seed=seed) for seed in (0, 0, 1))
    assert one.losses == same.losses
    assert one.losses != other.losses


def test_first_loss_is_that_of_knowing_nothing() -> None:
    data = blobs(images=40, classes=4)
    assert probe(data, data, epochs=1, batch=40).losses[0] == pytest.approx(np.log(4))


def test_one_step_by_hand() -> None:
    # Two images, two classes, zero weights: probabilities 1/2, gradient of w_0 is (-x_0 / 2 + x_1 / 2) / 2. The first
    # Nesterov step is lr * (1 + momentum) * gradient; after it the loss of image 0 is -log sigmoid of the margin.
    data = np.array([[1.0], [-1.0]], np.float32), np.array([0, 1])
    result = probe(data, data, epochs=2, batch=2, lr=0.1, momentum=0.9)
    weight = 0.1 * 1.9 * 0.5
    assert result.losses[0] == pytest.approx(np.log(2))
    assert result.losses[1] == pytest.approx(np.log1p(np.exp(-2 * weight)), rel=1e-5)


def test_top5_with_more_than_five_classes() -> None:
    train, test = blobs(120, 6, 6, seed=0, spread=3.0), blobs(120, 6, 6, seed=1, spread=3.0)
    result = probe(train, test)
    assert result.top1 < result.top5 < 1


def test_top1_and_top5_by_hand() -> None:
    features, labels = np.eye(6, dtype=np.float32), np.arange(6)
    wrong = labels.copy()
    wrong[:3] = (labels[:3] + 1) % 6
    result = probe((features, labels), (features, wrong), epochs=30, batch=6, lr=1.0)
    assert result.top1 == 0.5
    assert 0.5 <= result.top5 <= 1


def test_standardised_by_train_statistics() -> None:
    train, test = torch.tensor([[0.0, 5.0], [2.0, 5.0]]), torch.tensor([[4.0, 6.0]])
    train_out, test_out = standardised(train, test)
    assert train_out.tolist() == [[-1.0, 0.0], [1.0, 0.0]]
    assert test_out.tolist() == [[3.0, 1.0]]


def test_standardise_is_scale_free() -> None:
    (train, labels), (test, test_labels) = blobs(), blobs(seed=1)
    scale = np.array([1e-3, 1e3] * 4, np.float32)
    one = probe((train, labels), (test, test_labels), epochs=3, standardise=True)
    scaled = probe((train * scale, labels), (test * scale, test_labels), epochs=3, standardise=True)
    assert scaled.losses == pytest.approx(one.losses, rel=1e-4)


def test_ten_thousand_images_take_seconds() -> None:
    # 12 of the 60 epochs take 0.5 s in one thread; two threads on a busy machine took half a minute.
    train, test = blobs(10_000, 10, 128), blobs(1_000, 10, 128, seed=1)
    assert probe(train, test, epochs=12).probe_seconds < 12


def test_diverging_loss() -> None:
    with pytest.raises(DataError, match=r"loss is (nan|inf) in epoch 2 of 5 at lr 1e\+30: features up to"):
        probe(blobs(200), blobs(200), lr=1e30)


def write_shards(root: Path, images: int, seed: int, *, labelled: bool = True, names: tuple[str, ...]) -> Path:
    """One tar of colour patches whose brightness is the class."""
    draws = np.random.default_rng(seed)
    root.mkdir()
    with tarfile.open(root / "a-000000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(images):
            label = number % len(names)
            pixels = np.clip(60 + 120 * label + draws.normal(0, 8, (20, 24, 3)), 0, 255).astype(np.uint8)
            encoded = io.BytesIO()
            Image.fromarray(pixels).save(encoded, "PNG")
            members = {"png": encoded.getvalue()} | ({"cls": str(label).encode()} if labelled else {})
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{seed}-{number:04d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    build_index(root, classes=names)
    return root


class TestWhole:
    view = ViewConfig(size=16, resize=None)
    names = ("dark", "light")

    def evaluate(self, tmp_path: Path, workspace: Workspace, **settings: object) -> Result:
        of_run = {"name": "r", "task": "words", "view": dump(self.view), "model": {"arch": "wrn-10-1"}}
        network, path = network_of(of_run, "test"), tmp_path / "run.safetensors"
        save_backbone(path, network.fresh(), network)
        kind = validate(LinearSettings, settings, "eval linear")
        return evaluate(KIND, kind, EvalConfig(run=str(path), batch=8), workspace)

    def test_from_shards_to_result_file(self, tmp_path: Path) -> None:
        train = write_shards(tmp_path / "train", 30, 0, names=self.names)
        test = write_shards(tmp_path / "test", 11, 1, names=self.names)
        result = self.evaluate(tmp_path, Workspace(), train=train, test=test, standardise=True)
        assert read_result(tmp_path / "run" / "eval" / "linear-standardised.json") == result
        assert (result.metrics, result.headline) == ({"top1": 1.0}, "top1")
        assert result.inputs["run"] == "r"
        assert result.inputs["train"] != result.inputs["test"]
        assert len(result.inputs["weights_sha256"] or "") == 64
        assert result.settings["images"] == {"train": 30, "test": 11}
        assert result.settings["taps"] == {"pooled": {"of": "pooled output", "dims": 64}}
        assert result.settings["probe"]["epochs"] == 60
        assert result.settings["options"]["standardise"] is True
        assert len(result.details["losses"]) == 60
        assert result.details["variation"].keys() == {"train", "test"}
        assert min(result.details["variation"].values()) > 0.01
        again = self.evaluate(tmp_path, Workspace(shards=train, val_shards=test), standardise=True)
        assert again.details["losses"] == result.details["losses"]
        assert again.inputs == result.inputs

    def test_layers_have_a_protocol_of_their_own(self, tmp_path: Path) -> None:
        """Their averaged maps; that of the last stage gives what the pooled output gives."""
        train = write_shards(tmp_path / "train", 30, 0, names=self.names)
        test = write_shards(tmp_path / "test", 11, 1, names=self.names)
        layers = ["block3", "block1"]
        result = self.evaluate(tmp_path, Workspace(), train=train, test=test, layers=layers, standardise=True)
        assert read_result(tmp_path / "run" / "eval" / "linear-block1-block3-standardised.json") == result
        assert (result.protocol, result.headline) == ("linear/block1-block3/standardised", "top1_best")
        assert result.metrics == {"top1_block3": 1.0, "top1_block1": 1.0, "top1_best": 1.0}
        assert result.settings["taps"] == {
            "block3": {"of": "block3 average grid 1x1", "dims": 64},
            "block1": {"of": "block1 average grid 1x1", "dims": 16},
        }
        assert len(result.details["block1"]["losses"]) == 60
        assert result.details["block1"]["variation"].keys() == {"train", "test"}
        pooled = self.evaluate(tmp_path, Workspace(), train=train, test=test, standardise=True)
        assert result.details["block3"]["losses"] == pytest.approx(pooled.details["losses"], rel=1e-3)
        assert result.details["block1"]["losses"] != pytest.approx(pooled.details["losses"], rel=1e-3)
        for wrong, message in (
            (["conv4"], r"wrn-10-1 has no layer 'conv4'; its layers are conv1, block1, block2, block3"),
            (["block1", "block1"], r"give each layer once"),
        ):
            with pytest.raises(UsageError, match=message):
                self.evaluate(tmp_path, Workspace(), train=train, test=test, layers=wrong)

    def test_a_tenth_held_out_has_a_protocol_of_its_own(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Asked for, or because the workspace's test shards hold other classes, as MiniImageNet's splits do."""
        train = write_shards(tmp_path / "train", 60, 0, names=self.names)
        novel = write_shards(tmp_path / "novel", 8, 1, names=("red", "blue"))
        workspace = Workspace(shards=train, val_shards=novel)
        results = []
        for held_out in (True, False):
            results.append(self.evaluate(tmp_path, workspace, held_out=held_out, standardise=True))
            line = f"{novel} holds other classes than {train}: a tenth of each train class is held out"
            assert (line in capsys.readouterr().err) == (not held_out)
        assert results[0].protocol == results[1].protocol == "linear/standardised-held-out"
        assert results[0].metrics == results[1].metrics == {"top1": 1.0}
        assert results[0].settings["images"] == {"train": 54, "test": 6}
        assert results[0].inputs["dataset"] is None
        assert read_result(tmp_path / "run" / "eval" / "linear-standardised-held-out.json") == results[1]
        with pytest.raises(
            MismatchError, match=r"or other ones; .* hold a tenth of each train class out \(--held-out\)"
        ):
            self.evaluate(tmp_path, workspace, test=novel)
        with pytest.raises(UsageError, match=r"eval linear: .*held_out tests on train images, test on .*novel; leave"):
            self.evaluate(tmp_path, workspace, test=novel, held_out=True)

    def test_augmented_images_come_with_the_labels_of_their_split(self, tmp_path: Path) -> None:
        """For protocols that train on them: those of a part of the shards, here without the tenth that is held out."""
        split = open_splits(write_shards(tmp_path / "train", 60, 0, names=self.names), None)["train"]
        view = self.view.model_copy(update={"brightness": 0.0, "contrast": 0.0})
        seen = list(augmented(split, view, batch=8, seed=3, world=World(0, 1, torch.device("cpu")), steps=6))
        bright = torch.cat([images.mean(dim=(1, 2, 3)) for images, _ in seen]).numpy()
        labels = np.concatenate([labels for _, labels in seen])
        assert len(labels) == 48
        assert set(labels) == {0, 1}
        assert bright[labels == 0].max() < bright[labels == 1].min()

    def test_same_images_twice(self, tmp_path: Path) -> None:
        train = write_shards(tmp_path / "train", 6, 0, names=self.names)
        with pytest.raises(MismatchError, match=rf"{train} and {train} hold the same images"):
            self.evaluate(tmp_path, Workspace(), train=train, test=train)

    def test_other_classes(self, tmp_path: Path) -> None:
        train = write_shards(tmp_path / "train", 6, 0, names=self.names)
        test = write_shards(tmp_path / "test", 6, 1, names=("light", "dark"))
        with pytest.raises(MismatchError, match=r"2 classes and .* 2, or other ones"):
            self.evaluate(tmp_path, Workspace(), train=train, test=test)

    def test_no_labels_is_said_before_any_feature(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        train = write_shards(tmp_path / "train", 6, 0, labelled=False, names=self.names)
        test = write_shards(tmp_path / "test", 6, 1, names=self.names)
        with pytest.raises(DataError, match="train: 6 of 6 images have no label"):
            self.evaluate(tmp_path, Workspace(), train=train, test=test)
        assert "features" not in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
