import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from teacher_sets import load_teacher, write_teacher

from bowstore.config import ModelConfig
from bowstore.errors import DataError, MismatchError, MissingError, UsageError
from bowstore.exact import cpu_threads
from bowstore.models.arch import StageShape
from bowstore.models.record import network_record
from bowstore.models.registry import build_backbone
from bowstore.models.saved import load_backbone, save_backbone
from bowstore.models.weights import weights_sha256
from bowstore.runs import BACKBONE_FILE, descent, descent_of_words, write_lineage
from bowstore.words.encode.workers import workers

CPU = torch.device("cpu")


def test_is_frozen_and_leaves_batch_norm_alone(teacher_file: Path) -> None:
    teacher = load_teacher(teacher_file, ("block2",), CPU)
    assert not teacher.backbone.training
    assert not any(p.requires_grad for p in teacher.backbone.parameters())
    before = weights_sha256(teacher.backbone.state_dict())
    maps = teacher.maps(torch.randn(5, 3, 16, 16))["block2"]
    layer = teacher.layers["block2"]
    assert teacher.layers == {"block2": StageShape(32, (8, 8))}
    assert maps.shape == (5, layer.channels, *layer.grid)
    assert maps.dtype == torch.float32
    assert not maps.requires_grad
    assert weights_sha256(teacher.backbone.state_dict()) == before == teacher.sha256


@pytest.mark.parametrize("spec", ["torchvision:resnet18", "timm:lcnet_050", "timm:vit_tiny_patch16_224"])
def test_a_librarys_network_is_frozen_too(spec: str) -> None:
    name = "blocks.5" if "vit" in spec else "conv3"
    teacher = load_teacher(spec, (name,), CPU, size=64)
    state = {key: tensor.clone() for key, tensor in teacher.backbone.state_dict().items()}
    with torch.enable_grad():
        for _ in range(2):
            maps = teacher.maps(10 + torch.randn(3, 3, 64, 64))
    assert not maps[name].requires_grad
    assert not any(module.training for module in teacher.backbone.modules())
    assert not any(p.requires_grad for p in teacher.backbone.parameters())
    after = teacher.backbone.state_dict()
    assert state.keys() == after.keys()
    assert all(torch.equal(state[key], after[key]) for key in state)
    assert weights_sha256(after) == teacher.sha256


def test_several_layers_in_one_pass(teacher_file: Path) -> None:
    teacher = load_teacher(teacher_file, ("block3", "block1"), CPU)
    assert list(teacher.layers.items()) == [("block3", StageShape(64, (4, 4))), ("block1", StageShape(16, (16, 16)))]
    images = torch.randn(4, 3, 16, 16)
    maps = teacher.maps(images)
    for name in teacher.layers:
        alone = load_teacher(teacher_file, (name,), CPU).maps(images)
        assert torch.equal(maps[name], alone[name])


def test_one_image_gives_the_same_map_as_a_batch(teacher_file: Path) -> None:
    teacher = load_teacher(teacher_file, ("block3",), CPU)
    images = torch.randn(6, 3, 16, 16)
    single = torch.cat([teacher.maps(image[None])["block3"] for image in images])
    assert torch.allclose(single, teacher.maps(images)["block3"], atol=1e-5)


def test_autocast_does_not_reach_it(teacher_file: Path) -> None:
    teacher = load_teacher(teacher_file, ("block3",), CPU)
    images = torch.randn(2, 3, 16, 16)
    expected = teacher.maps(images)["block3"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(teacher.maps(images)["block3"], expected)


def test_provenance(teacher_file: Path) -> None:
    teacher = load_teacher(teacher_file, ("block3",), CPU)
    assert teacher.provenance("block3") == {
        "arch": "wrn-10-1",
        "layer": "block3",
        "weights_sha256": teacher.sha256,
        "weights_file": "teacher.safetensors",
        "weights_layout": "bowstore run",
        "precision": "float32",
        "name": "tiny-rotnet",
        "lineage": None,
    }
    assert (teacher.view.size, teacher.view.resize, teacher.view.squash) == (16, 16, False)


def test_the_words_of_a_run_record_what_it_was_made_of(teacher_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "bownet"
    run.mkdir()
    shutil.copy(teacher_file, run / BACKBONE_FILE)
    words = {"layer": "block3", "num_words": 12, "teacher": {"name": "rotnet", "weights_file": "rotnet"}}
    write_lineage(run, name="tiny-rotnet", task="words", inputs={}, targets=words)
    for spec in (run, run / BACKBONE_FILE):
        lineage = load_teacher(spec, ("block3",), CPU).provenance("block3")["lineage"]
        assert descent(lineage) == ("rotnet", "12 words of block3", "tiny-rotnet")


def test_weights_of_another_codebase(tmp_path: Path) -> None:
    """The same weights have the same digest in whatever layout they come; the digest is of what is used."""
    states = build_backbone(ModelConfig(arch="resnet18")).state_dict()
    plain = {spelt: states[own] for spelt, own in build_resnet_names().items()}
    torch.save({"state_dict": {f"module.encoder_q.{n}": t for n, t in plain.items()}}, tmp_path / "moco.pth.tar")
    save_file({**plain, "fc.weight": torch.ones(3, 512)}, tmp_path / "plain.safetensors")
    moco, same = (
        load_teacher("torchvision:resnet18", ("layer3",), CPU, weights=tmp_path / name, size=64)
        for name in ("moco.pth.tar", "plain.safetensors")
    )
    assert moco.sha256 == same.sha256 == weights_sha256(states)
    assert moco.provenance("conv4") == {
        "arch": "resnet18",
        "layer": "conv4",
        "weights_sha256": moco.sha256,
        "weights_file": "moco.pth.tar",
        "weights_layout": "torchvision names in state_dict behind 'module.encoder_q.'",
        "precision": "float32",
        "name": "resnet18",
        "lineage": None,
    }
    assert same.origin.weights_layout == "torchvision names, without fc"
    assert list(moco.layers) == ["conv4"]


def build_resnet_names() -> dict[str, str]:
    return build_backbone(ModelConfig(arch="resnet18")).spellings()["torchvision"]


def test_random_weights_are_those_of_the_seed() -> None:
    state = torch.get_rng_state()
    teachers = [load_teacher("timm:lcnet_050", ("conv4",), CPU, size=64, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    assert teachers[0].sha256 == teachers[1].sha256 != teachers[2].sha256
    assert (teachers[2].origin.weights_file, teachers[2].origin.weights_layout) == (None, "random, seed 1")


def test_an_untrained_network_is_the_one_that_training_starts_from(tmp_path: Path) -> None:
    values = {"name": "net", "task": "words", "seed": 5, "model": {"arch": "wrn-10-1", "strides": [2, 2, 1]}}
    record = network_record({**values, "view": {"size": 16, "resize": None}}, "test")
    teacher = load_teacher(record, ("block1",), CPU, seed=3)
    torch.manual_seed(5)
    expected = build_backbone(record.model).state_dict()
    state = teacher.backbone.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert not teacher.backbone.training
    assert (teacher.layers, teacher.view.size) == ({"block1": StageShape(16, (8, 8))}, 16)
    origin = teacher.provenance("block1")
    assert (origin["name"], origin["weights_file"], origin["lineage"]) == ("net", None, None)
    assert (origin["weights_layout"], origin["weights_sha256"]) == ("random, seed 5", weights_sha256(expected))
    layer = {"teacher": origin, "num_words": 8, "layer": "block1"}
    assert descent_of_words(layer) == ("net (random, seed 5)", "8 words of block1")
    assert load_teacher(record, ("block1",), CPU, size=32).layers["block1"].grid == (16, 16)
    with pytest.raises(UsageError, match=r"weights w\.pth go with an architecture .*, not with configuration net"):
        load_teacher(record, ("block1",), CPU, weights=Path("w.pth"))


def test_views(teacher_file: Path) -> None:
    def view(spec: str | Path, layer: str, **overrides: int) -> tuple[int, int | None]:
        clean = load_teacher(spec, (layer,), CPU, **overrides).view  # type: ignore[arg-type]
        return clean.size, clean.resize

    assert view("torchvision:mnasnet0_5", "conv4") == (224, 256)
    assert view("torchvision:mnasnet0_5", "conv4", size=64) == (64, 73)
    assert view("torchvision:mnasnet0_5", "conv4", size=64, resize=64) == (64, 64)
    assert view("timm:vit_tiny_patch16_224", "blocks.1") == (224, 248)
    assert view("timm:vit_tiny_patch16_224", "blocks.1", size=32) == (32, 35)
    assert view(teacher_file, "block2", size=32) == (32, 32)
    teacher = load_teacher("timm:vit_tiny_patch16_224", ("blocks.1",), CPU, size=96)
    assert teacher.layers["blocks.1"].grid == (6, 6)
    assert teacher.view.mean == (0.5, 0.5, 0.5)
    with pytest.raises(UsageError, match=r"the teacher's view.*resize 32 must be at least size 64"):
        view("torchvision:mnasnet0_5", "conv4", size=64, resize=32)


def test_layers_that_cannot_be_had(teacher_file: Path) -> None:
    for layers, message in {
        ("conv9",): "no layer 'conv9'; its layers are conv1, block1, block2, block3",
        ("block3", "block3"): "name block3, block3: give each layer once",
        (): "no layer was named; give --layer",
        ("block1.0.relu",): "is run 2 times an image",
    }.items():
        with pytest.raises(UsageError, match=message):
            load_teacher(teacher_file, layers, CPU)
    with pytest.raises(UsageError, match="layer3, conv4 name conv4, conv4: give each layer once"):
        load_teacher("torchvision:resnet18", ("layer3", "conv4"), CPU, size=64)


def test_teachers_that_cannot_be_loaded(teacher_file: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="none"):
        load_teacher(tmp_path / "none.safetensors", ("block3",), CPU)
    with pytest.raises(UsageError, match="go with an architecture"):
        load_teacher(teacher_file, ("block3",), CPU, weights=teacher_file)
    torch.save({"state_dict": {"conv1.weight": torch.ones(2)}}, tmp_path / "w.pth")
    with pytest.raises(
        MismatchError, match=r"w\.pth is no checkpoint of bowstore; .* --arch timm:NAME --weights .*w\.pth"
    ):
        load_teacher(tmp_path / "w.pth", ("block3",), CPU)
    save_file({"conv1.weight": torch.ones(2)}, tmp_path / "w.safetensors")
    with pytest.raises(MismatchError, match=r"was not written by bowstore .* --weights .*w\.safetensors"):
        load_teacher(tmp_path / "w.safetensors", ("block3",), CPU)
    with pytest.raises(MismatchError, match="does not fit resnet18: 99 of 120 tensors missing"):
        load_teacher("torchvision:resnet18", ("conv4",), CPU, weights=tmp_path / "w.pth")
    loaded = load_backbone(teacher_file)
    loaded.backbone.state_dict()["stages.block1.0.bn1.weight"][0] = torch.nan
    save_backbone(tmp_path / "nan.safetensors", loaded.backbone, loaded.saved)
    with pytest.raises(DataError, match=r"tiny-rotnet hold NaN or infinity in 1 of \d+ tensors \(stages\.block1"):
        load_teacher(tmp_path / "nan.safetensors", ("block3",), CPU)


def test_weights_digest_sees_names_values_types_and_shapes_only(tmp_path: Path) -> None:
    state = load_backbone(write_teacher(tmp_path / "t.safetensors")).backbone.state_dict()
    digest = weights_sha256(state)
    assert len(digest) == 64
    assert weights_sha256(dict(reversed(state.items()))) == digest
    assert weights_sha256({n: t.clone(memory_format=torch.contiguous_format) for n, t in state.items()}) == digest
    name = next(n for n, t in state.items() if t.ndim == 4)
    assert weights_sha256({**state, name: state[name].to(memory_format=torch.channels_last)}) == digest
    assert weights_sha256({**state, name: state[name] + 1}) != digest
    assert weights_sha256({**state, name: state[name].double()}) != digest
    assert weights_sha256({**state, name: state[name].flatten()}) != digest
    renamed = {**state, "other": state[name]}
    del renamed[name]
    assert weights_sha256(renamed) != digest
    other = load_backbone(write_teacher(tmp_path / "u.safetensors", seed=1)).backbone
    assert weights_sha256(other.state_dict()) != digest


def test_workers_run_every_operation_on_their_own_thread(teacher_file: Path) -> None:
    """A new thread's first convolution, too, or it would round by the number of cores."""
    teacher, images = load_teacher(teacher_file, ("block3",), CPU), torch.randn(16, 3, 64, 64)

    def threads() -> int:
        return len(os.listdir("/proc/self/task"))

    with cpu_threads(CPU, 1), workers(2) as pool:
        before = threads()
        list(pool.map(lambda _: teacher.replica().maps(images), range(4)))
        assert threads() == before + 2
