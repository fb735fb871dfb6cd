import os
from pathlib import Path

import numpy as np
import pytest
from voc_devkit import write_devkit

from bowstore.config import ViewConfig, Workspace, dump
from bowstore.errors import DataError, MismatchError, MissingError, UsageError
from bowstore.evaluate.config import EvalConfig
from bowstore.evaluate.protocols.voc07 import KIND, Voc07Settings, describe, resolve
from bowstore.evaluate.results import Result, read_result, result_table
from bowstore.evaluate.runner import evaluate
from bowstore.evaluate.voc import data, read_split
from bowstore.models.saved import network_of, save_backbone


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    return write_devkit(tmp_path)


def main(voc: Path, name: str) -> Path:
    return voc / "ImageSets" / "Main" / name


def test_split_as_written(voc: Path) -> None:
    split = read_split(voc, "trainval")
    assert split.classes == ("blue", "green", "red")
    assert [split.open().name(row) for row in (0, 1, 2)] == [str(voc / f"JPEGImages/00000{n}.jpg") for n in (1, 2, 3)]
    assert split.labels.shape == (24, 3)
    assert split.labels.dtype == np.int8
    assert set(np.unique(split.labels)) == {-1, 0, 1}
    assert split.labels[2, 0] == -1  # listed as 0: difficult objects only
    assert len(split.open().read(split.rows)) == 24


def test_label_mapping_and_order_of_ids(voc: Path) -> None:
    for name in ("blue", "green", "red"):
        main(voc, f"{name}_test.txt").write_text("000027  1\n000025  0\n000026 -1\n")
    split = read_split(voc, "test")
    assert [Path(split.open().name(row)).stem for row in split.rows] == ["000025", "000026", "000027"]
    assert split.labels[:, 0].tolist() == [-1, 0, 1]


def test_fingerprint_sees_labels(voc: Path) -> None:
    before = read_split(voc, "test").fingerprint
    assert read_split(voc, "test").fingerprint == before
    path = main(voc, "red_test.txt")
    path.write_text(path.read_text().replace("-1", " 0", 1))
    assert read_split(voc, "test").fingerprint != before


def test_an_image_that_was_changed_is_another_one_for_kept_features(voc: Path) -> None:
    image, before = voc / "JPEGImages/000025.jpg", read_split(voc, "test")
    data, times = bytearray(image.read_bytes()), image.stat()
    assert read_split(voc, "test").key == before.key
    data[-3] ^= 1
    image.write_bytes(data)
    os.utime(image, ns=(times.st_atime_ns, times.st_mtime_ns))  # as copies keep them
    after = read_split(voc, "test")
    assert (after.fingerprint, after.key == before.key) == (before.fingerprint, False)


def test_the_id_says_layers_that_were_chosen() -> None:
    def described(**settings: object) -> tuple[str, int]:
        protocol = describe(Voc07Settings.model_validate(settings))
        return protocol.id, protocol.version

    assert described() == ("voc07-svm/fair", 3)
    assert described(solver="liblinear") == ("voc07-svm/fair-liblinear", 1)
    assert described(resize="opencv") == ("voc07-svm/fair-opencv", 3)
    assert described(resize="opencv", layers=["conv4"]) == ("voc07-svm/fair-opencv/conv4", 3)
    assert described(layers=["pool1", "conv4"]) == described(layers=["conv4", "pool1"])
    assert described(layers=["pool1", "conv4"]) == ("voc07-svm/fair/conv4-pool1", 3)
    many = [f"layer3.{n}.conv1" for n in range(30)]
    assert described(layers=many, costs="obow")[0].startswith("voc07-svm/obow/30-layers-")
    assert described(layers=many) != described(layers=[*many[1:], "layer4"])


class TestErrors:
    def test_missing_folder_names_the_devkit(self, voc: Path, tmp_path: Path) -> None:
        with pytest.raises(
            MissingError, match=r"no folder .*nowhere/VOC2007/JPEGImages; name the devkit \(VOCdevkit\)"
        ):
            self.open(tmp_path / "nowhere")
        (voc / "ImageSets").rename(voc / "lists")
        with pytest.raises(MissingError, match=r"no folder .*07/ImageSets/Main; .* its folder VOCdevkit/VOC2007$"):
            self.open(voc.parent)

    def open(self, voc: Path) -> None:
        data(resolve(Voc07Settings(voc=voc), Workspace()), Workspace())

    def test_missing_split_names_the_archive(self, voc: Path) -> None:
        for path in voc.glob("ImageSets/Main/*_test.txt"):
            path.unlink()
        with pytest.raises(MissingError, match=r"extract VOCtest_06-Nov-2007.tar"):
            read_split(voc, "test")

    @pytest.mark.parametrize("line", ["000031", "000031 2", "000031 1 1", "000031 x"])
    def test_malformed_line(self, voc: Path, line: str) -> None:
        path = main(voc, "green_test.txt")
        lines = path.read_text().splitlines()
        lines[6] = line
        path.write_text("\n".join(lines))
        with pytest.raises(DataError, match=rf"green_test.txt:7: expected an image id and 1, 0 or -1, got '{line}'"):
            read_split(voc, "test")

    def test_image_listed_twice(self, voc: Path) -> None:
        path = main(voc, "green_test.txt")
        path.write_text(path.read_text() + "000025 1\n")
        with pytest.raises(DataError, match=r"green_test.txt:16: image 000025 is listed twice"):
            read_split(voc, "test")

    def test_image_not_listed(self, voc: Path) -> None:
        path = main(voc, "green_test.txt")
        path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
        with pytest.raises(
            DataError, match=r"green_test.txt: image 000025 is not listed, but .*blue_test.txt lists it"
        ):
            read_split(voc, "test")

    def test_empty_list(self, voc: Path) -> None:
        main(voc, "blue_test.txt").write_text("")
        with pytest.raises(DataError, match=r"blue_test.txt names no image"):
            read_split(voc, "test")

    def test_not_text(self, voc: Path) -> None:
        main(voc, "blue_test.txt").write_bytes(b"000025 1\n\xff")
        with pytest.raises(DataError, match=r"blue_test.txt: byte 9 is not UTF-8"):
            read_split(voc, "test")

    def test_missing_image_names_its_list(self, voc: Path) -> None:
        (voc / "JPEGImages" / "000028.jpg").unlink()
        with pytest.raises(MissingError, match=r"blue_test.txt: no image .*000028.jpg \(1 of 15 are missing\)"):
            read_split(voc, "test")

    def test_class_without_positives(self, voc: Path) -> None:
        path = main(voc, "red_test.txt")
        path.write_text(path.read_text().replace("  1", " -1"))
        with pytest.raises(DataError, match=r"red_test.txt: class red has 0 positive images of 15"):
            read_split(voc, "test")


class TestWhole:
    view = ViewConfig(size=24, resize=28)

    def evaluate(self, voc: Path, out: Path, **options: object) -> Result:
        of_run = {"name": "r", "task": "words", "view": dump(self.view), "model": {"arch": "wrn-10-1"}}
        network = network_of(of_run, "test")
        save_backbone(out.with_suffix(".safetensors"), network.fresh(), network)
        settings = Voc07Settings.model_validate({"costs": "vissl", "jobs": 1} | options)
        run = EvalConfig(run=str(out.with_suffix(".safetensors")), batch=8)
        return evaluate(KIND, settings, run, Workspace(voc=voc))

    def test_from_devkit_to_result_file(self, voc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("bowstore.evaluate.voc.COSTS", {"vissl": (0.1, 1.0, 10.0)})
        result = self.evaluate(voc, tmp_path / "run")
        assert read_result(tmp_path / "run" / "eval" / "voc07-svm-vissl.json") == result
        layers = [name.removeprefix("map_") for name in result.metrics if name != "map_best"]
        assert layers == list(result.settings["taps"]) == list(result.details)
        assert len(layers) == 2
        assert result.metrics["map_best"] == max(result.metrics.values())
        for layer in layers:
            precisions = result.details[layer]["average_precision"]
            assert list(precisions) == ["blue", "green", "red"]
            assert result.metrics[f"map_{layer}"] == pytest.approx(np.mean(list(precisions.values())))
            assert set(result.details[layer]["cost"].values()) <= set(result.settings["costs"])
            assert all(0.01 < share < 2 for share in result.details[layer]["variation"].values())
            assert result.details[layer]["variation"].keys() == {"trainval", "test"}
            assert result.details[layer]["fits"] == 3 * (3 * 3 + 1)
            assert result.details[layer]["unconverged_fits"] >= 0
        assert result.settings["view"]["squash"] is True
        assert result.settings["options"]["solver"] == "exact"
        assert result.inputs["dataset"] is None
        assert "paper" not in result_table(result)

    def test_obow_pools_the_last_layer_everywhere(
        self, voc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("bowstore.evaluate.voc.COSTS", {"obow": (1.0,)})
        result = self.evaluate(voc, tmp_path, costs="obow")
        (layer,) = result.settings["taps"]
        assert result.settings["taps"][layer] == {"of": f"{layer} average grid 1x1", "dims": 64}
        assert result.protocol == "voc07-svm/obow"

    def test_layers_are_chosen_by_name(self, voc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Their best is another figure than that of the last two layers, and lies beside it."""
        monkeypatch.setattr("bowstore.evaluate.voc.COSTS", {"vissl": (1.0,)})
        result = self.evaluate(voc, tmp_path / "run", layers=["block1"])
        assert result.metrics.keys() == {"map_block1", "map_best"}
        assert result.protocol == "voc07-svm/vissl/block1"
        assert read_result(tmp_path / "run" / "eval" / "voc07-svm-vissl-block1.json") == result
        with pytest.raises(UsageError, match="conv9"):
            self.evaluate(voc, tmp_path, layers=["conv9"])

    def test_problems_are_said_before_any_feature(
        self, voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = main(voc, "red_trainval.txt")
        lines = path.read_text().splitlines()
        path.write_text("\n".join(f"{line.split()[0]} {1 if n < 2 else -1}" for n, line in enumerate(lines)))
        with pytest.raises(DataError, match="class red: 2 positive training images"):
            self.evaluate(voc, tmp_path)
        assert "features" not in capsys.readouterr().err

    def test_other_classes_in_test(self, voc: Path, tmp_path: Path) -> None:
        main(voc, "red_test.txt").unlink()
        with pytest.raises(MismatchError, match=r"3 classes in trainval and 2 in test .*differs: red"):
            self.evaluate(voc, tmp_path)

    def test_same_image_in_both_splits(self, voc: Path, tmp_path: Path) -> None:
        for path in voc.glob("ImageSets/Main/*_test.txt"):
            path.write_text(path.read_text() + "000001 -1\n")
        with pytest.raises(MismatchError, match=r"1 images are in the lists of both .* \(first: 000001\)"):
            self.evaluate(voc, tmp_path)


def test_devkit_is_the_same_every_time(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one, two = (write_devkit(tmp_path / name) for name in ("one", "two"))
    for path in one.rglob("*.*"):
        if path.is_file():
            assert path.read_bytes() == (two / path.relative_to(one)).read_bytes()
