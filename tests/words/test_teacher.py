from pathlib import Path

import pytest
import torch
from conftest import write_teacher

from bowstore.errors import MissingError, UsageError
from bowstore.models.saved import load_backbone
from bowstore.models.weights import weights_sha256
from bowstore.words.teacher import load_teacher

CPU = torch.device("cpu")


def test_is_frozen_and_leaves_batch_norm_alone(teacher_file: Path) -> None:
    teacher = load_teacher(teacher_file, "block2", CPU)
    assert not teacher.backbone.training
    assert not any(p.requires_grad for p in teacher.backbone.parameters())
    before = weights_sha256(teacher.backbone.state_dict())
    maps = teacher.maps(torch.randn(5, 3, 16, 16))
    assert maps.shape == (5, teacher.channels, *teacher.grid) == (5, 32, 8, 8)
    assert maps.dtype == torch.float32
    assert not maps.requires_grad
    assert weights_sha256(teacher.backbone.state_dict()) == before == teacher.sha256


def test_one_image_gives_the_same_map_as_a_batch(teacher_file: Path) -> None:
    teacher = load_teacher(teacher_file, "block3", CPU)
    images = torch.randn(6, 3, 16, 16)
    single = torch.cat([teacher.maps(image[None]) for image in images])
    assert torch.allclose(single, teacher.maps(images), atol=1e-5)


def test_autocast_does_not_reach_it(teacher_file: Path) -> None:
    teacher = load_teacher(teacher_file, "block3", CPU)
    images = torch.randn(2, 3, 16, 16)
    expected = teacher.maps(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(teacher.maps(images), expected)


def test_provenance(teacher_file: Path) -> None:
    teacher = load_teacher(teacher_file, "block3", CPU)
    assert teacher.provenance() == {
        "arch": "wrn-10-1",
        "layer": "block3",
        "weights_sha256": teacher.sha256,
        "name": "tiny-rotnet",
        "student": "tiny-bownet",
    }
    assert (teacher.view.size, teacher.view.resize, teacher.view.squash) == (16, 16, False)


def test_unknown_layer_lists_those_there_are(teacher_file: Path) -> None:
    with pytest.raises(UsageError, match="no layer 'conv9'; its layers are conv1, block1, block2, block3"):
        load_teacher(teacher_file, "conv9", CPU)


def test_missing_teacher(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="none"):
        load_teacher(tmp_path / "none.safetensors", "block3", CPU)


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
