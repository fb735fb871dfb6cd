"""Weights files in the layouts of other codebases: the maps must be those of the plain network."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from bowstore.config import ModelConfig
from bowstore.errors import CorruptError, DataError, MismatchError, MissingError
from bowstore.models.backbone import Backbone
from bowstore.models.layouts import Understood, load_foreign, read_weights
from bowstore.models.registry import build_backbone
from bowstore.models.saved import EXPORTED, RECORDED

State = dict[str, Tensor]
VIT = "timm:vit_tiny_patch16_224"
REGISTERS = "timm:vit_small_patch14_reg4_dinov2"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    """Torchvision's ResNet-18 with statistics of its own."""
    torch.manual_seed(3)
    net: nn.Module = torchvision.models.resnet18(weights=None)
    net.train()(torch.randn(8, 3, 32, 32))
    return net.eval()


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    torch.manual_seed(4)
    net = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=0)
    return net.eval()  # type: ignore[no-any-return]


def behind(prefix: str, state: State, *, shift: float = 0.0) -> State:
    """The state under a prefix; shifted, it is another network's."""
    return {f"{prefix}{name}": t + shift if t.is_floating_point() else t for name, t in state.items()}


def body(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if not name.startswith(("fc.", "head."))}


def numbered(state: State) -> State:
    places = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
    return {f"{places[name.split('.')[0]]}.{name.partition('.')[2]}": t for name, t in body(state).items()}


def staged(state: State) -> State:
    stage = {f"layer{n}": f"conv{n + 1}." for n in range(1, 5)}
    spelt = {}
    for name, tensor in body(state).items():
        first, _, rest = name.partition(".")
        spelt[f"stages.{stage[first]}{rest}" if first in stage else f"stages.conv1.{name}"] = tensor
    return spelt


def chunk(block: re.Match[str]) -> str:
    return f"blocks.{int(block[1]) // 4}.{block[1]}"


MLP = {"0.weight": torch.ones(4, 512), "2.weight": torch.ones(2, 4)}
RESNET_LAYOUTS: dict[str, tuple[Callable[[State], Any], str, str, str, tuple[str, ...]]] = {
    # layout: the file, and what is understood: names, container, prefix, dropped heads
    "torchvision": (lambda s: s, "torchvision", "", "", ("fc",)),
    "moco v2": (
        lambda s: {
            "epoch": 200,
            "arch": "resnet18",
            "state_dict": {
                **behind("module.encoder_k.", body(s), shift=1),
                **behind("module.encoder_q.", body(s)),
                **behind("module.encoder_q.fc.", MLP),
                "module.queue": torch.ones(4, 8),
            },
            "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.03}]},
        },
        "torchvision", "state_dict", "module.encoder_q.", ("fc",),
    ),
    "moco v3": (
        lambda s: {
            "state_dict": {
                **behind("module.momentum_encoder.", body(s), shift=1),
                **behind("module.base_encoder.", body(s)),
                **behind("module.base_encoder.fc.", MLP),
                **behind("module.predictor.", MLP),
            }
        },
        "torchvision", "state_dict", "module.base_encoder.", ("fc",),
    ),
    "swav": (
        lambda s: {
            **behind("module.", body(s)),
            **behind("module.projection_head.", MLP),
            "module.prototypes.weight": torch.ones(3, 2),
        },
        "torchvision", "", "module.", ("projection_head", "prototypes"),
    ),
    "dino": (
        lambda s: {
            "student": {**behind("module.backbone.", body(s), shift=1), **behind("module.head.mlp.", MLP)},
            "teacher": {**behind("backbone.", body(s)), **behind("head.mlp.", MLP)},
            "args": argparse.Namespace(arch="resnet18", lr=0.1),
        },
        "torchvision", "teacher", "backbone.", (),
    ),
    "pirl in vissl": (
        lambda s: {
            "phase_idx": 3,
            "classy_state_dict": {
                "base_model": {"model": {"trunk": behind("_feature_blocks.", body(s)), "heads": behind("0.clf.", MLP)}}
            },
        },
        "torchvision", "classy_state_dict.base_model.model.trunk", "_feature_blocks.", (),
    ),
    "byol": (
        lambda s: {
            **behind("target_encoder.net.", s, shift=1),
            **behind("online_encoder.net.", s),
            **behind("online_predictor.net.", MLP),
        },
        "torchvision", "", "online_encoder.net.", ("fc",),
    ),
    "simsiam": (
        lambda s: {"state_dict": {**behind("module.encoder.", body(s)), **behind("module.encoder.fc.", MLP)}},
        "torchvision", "state_dict", "module.encoder.", ("fc",),
    ),
    "lightly": (
        lambda s: {
            "state_dict": {
                **behind("backbone_momentum.", numbered(s), shift=1),
                **behind("backbone.", numbered(s)),
                **behind("projection_head.layers.", MLP),
            }
        },
        "numbered", "state_dict", "backbone.", (),
    ),
    "bowstore": (staged, "bowstore", "", "", ()),
    "bowstore checkpoint": (
        lambda s: {"version": 1, "backbone": staged(s), "head": {"weight": torch.ones(2, 2)}},
        "bowstore", "backbone", "", (),
    ),
}  # fmt: skip


def loaded(arch: str, path: Path, *, size: int | None = None) -> tuple[Backbone, Understood]:
    torch.manual_seed(99)
    backbone = build_backbone(ModelConfig(arch=arch), size).eval()
    understood = load_foreign(backbone, read_weights(path))
    path.unlink()
    return backbone, understood


def write(path: Path, tree: Any) -> Path:
    torch.save(tree, path)
    return path


@torch.no_grad()
def resnet_maps(net: Any, images: Tensor) -> dict[str, Tensor]:
    conv3 = net.layer2(net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(images))))))
    return {"conv3": conv3, "conv5": net.layer4(net.layer3(conv3))}


@pytest.mark.parametrize("layout", RESNET_LAYOUTS)
def test_layouts_of_a_residual_network(layout: str, resnet: nn.Module, tmp_path: Path) -> None:
    make, names, container, prefix, dropped = RESNET_LAYOUTS[layout]
    tree = make(resnet.state_dict())
    images = torch.randn(2, 3, 64, 64)
    archs = ["torchvision:resnet18", *(["timm:resnet18"] if layout in ("torchvision", "lightly", "bowstore") else [])]
    for arch in archs:
        backbone, understood = loaded(arch, write(tmp_path / "w.pth", tree))
        names = "timm" if arch.startswith("timm") and names == "torchvision" else names
        assert understood == Understood("w.pth", names, container, prefix, dropped, converted=False)
        with torch.no_grad():
            maps = backbone.feature_maps(images, ("conv3", "conv5"))
        for layer, expected in resnet_maps(resnet, images).items():
            assert torch.equal(maps[layer], expected)
        assert torch.equal(backbone.state_dict()[next(n for n in backbone.state_dict() if "running_var" in n)],
                           resnet.state_dict()["bn1.running_var"])  # fmt: skip


def test_safetensors_half_precision_and_old_files(resnet: nn.Module, tmp_path: Path) -> None:
    """Half-precision values become float32; counters of batches, which old files lack, are not asked for."""
    state = {n: t.half() for n, t in body(resnet.state_dict()).items() if not n.endswith("num_batches_tracked")}
    save_file(behind("encoder.", state), tmp_path / "w.safetensors")
    backbone, understood = loaded("resnet18", tmp_path / "w.safetensors")
    assert (understood.names, understood.prefix) == ("torchvision", "encoder.")
    weight = backbone.state_dict()["stages.conv2.0.conv1.weight"]
    assert torch.equal(weight, state["layer1.0.conv1.weight"].float())
    assert weight.dtype == torch.float32


@torch.no_grad()
def vit_maps(net: Any, images: Tensor) -> dict[str, Tensor]:
    tokens = net.norm_pre(net._pos_embed(net.patch_embed(images)))
    for block in net.blocks[:4]:
        tokens = block(tokens)
    last = net.forward_features(images)
    side = images.shape[2] // net.patch_embed.patch_size[0]
    return {
        name: values[:, net.num_prefix_tokens :].transpose(1, 2).reshape(len(images), -1, side, side)
        for name, values in (("blocks.3", tokens), ("blocks.11", last))
    }


VIT_LAYOUTS: dict[str, tuple[Callable[[State], Any], str, str, tuple[str, ...]]] = {
    "timm": (lambda s: {**s, **behind("head.", MLP)}, "", "", ("head",)),
    "timm with averages": (
        lambda s: {"state_dict": behind("", s, shift=1), "state_dict_ema": s},
        "state_dict_ema", "", (),
    ),
    "dino": (
        lambda s: {
            "student": {**behind("module.backbone.", s, shift=1), **behind("module.head.mlp.", MLP)},
            "teacher": {**behind("backbone.", s), **behind("head.mlp.", MLP)},
        },
        "teacher", "backbone.", (),
    ),
    "moco v3": (
        lambda s: {
            "state_dict": {
                **behind("module.base_encoder.", s),
                **behind("module.momentum_encoder.", s, shift=1),
                **behind("module.base_encoder.head.", MLP),
            }
        },
        "state_dict", "module.base_encoder.", ("head",),
    ),
    "dinov2 with block chunks": (
        lambda s: {
            "teacher": {
                f"backbone.{re.sub(r'^blocks[.]([0-9]+)', chunk, name)}": tensor
                for name, tensor in {**s, "mask_token": torch.zeros(1, 192)}.items()
            }
        },
        "teacher", "backbone.", ("mask_token",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", VIT_LAYOUTS)
def test_layouts_of_a_vision_transformer(layout: str, vit: Any, tmp_path: Path) -> None:
    """The network takes images of any size; a plain one of 64 pixels gets the same weights resampled."""
    make, container, prefix, dropped = VIT_LAYOUTS[layout]
    state = {**vit.state_dict(), "pos_embed": timm.create_model("vit_tiny_patch16_224").pos_embed.detach()}
    backbone, understood = loaded(VIT, write(tmp_path / "w.pth", make(state)))
    assert understood == Understood("w.pth", "timm", container, prefix, dropped, converted=False)
    vit.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(state, vit))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        maps = backbone.feature_maps(images, ("blocks.3", "blocks.11"))
    for layer, expected in vit_maps(vit, images).items():
        torch.testing.assert_close(maps[layer], expected, rtol=1e-4, atol=1e-5)


def test_position_embeddings_of_another_grid_are_resampled(vit: nn.Module, tmp_path: Path) -> None:
    backbone, understood = loaded(VIT, write(tmp_path / "w.pth", {"model": behind("", vit.state_dict())}))
    assert understood.converted
    assert understood.text() == "timm names in model converted by timm"
    assert backbone.state_dict()["network.pos_embed"].shape == (1, 197, 192)


def test_register_tokens_of_dinov2(tmp_path: Path) -> None:
    """Meta's own file: registers under their name, a mask token, and a position embedding for the class token."""
    torch.manual_seed(5)
    net: Any = timm.create_model(REGISTERS.removeprefix("timm:"), num_classes=0, dynamic_img_size=True).eval()
    state = net.state_dict()
    position = torch.randn(1, 1, 384)
    hub = {name: tensor for name, tensor in state.items() if name != "reg_token"}
    hub |= {
        "register_tokens": state["reg_token"],
        "mask_token": torch.zeros(1, 384),
        "cls_token": state["cls_token"] - position,
        "pos_embed": torch.cat([position, state["pos_embed"]], dim=1),
    }
    backbone, understood = loaded(REGISTERS, write(tmp_path / "w.pth", hub), size=56)
    assert understood.converted
    assert understood.dropped == ("mask_token",)
    images = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        maps = backbone.feature_maps(images, ("blocks.3", "blocks.11"))
    for layer, expected in vit_maps(net, images).items():
        torch.testing.assert_close(maps[layer], expected, rtol=1e-4, atol=1e-5)


def misfit(arch: str, path: Path) -> str:
    with pytest.raises(MismatchError) as caught:
        load_foreign(build_backbone(ModelConfig(arch=arch)), read_weights(path))
    return str(caught.value)


def test_a_network_that_asks_for_the_version_of_its_weights(tmp_path: Path) -> None:
    """Torchvision's MNASNet: a plain mapping of tensors, as safetensors give it, has none."""
    plain = torchvision.models.mnasnet0_5()
    save_file(body(plain.state_dict()), tmp_path / "net.safetensors")
    backbone = build_backbone(ModelConfig(arch="torchvision:mnasnet0_5"))
    load_foreign(backbone, read_weights(tmp_path / "net.safetensors"))
    assert torch.equal(backbone.state_dict()["network.layers.0.weight"], plain.layers[0].weight)


@pytest.mark.parametrize("record", ["no JSON", "[1]", '{"arch": "resnet18"}'])
def test_metadata_that_describe_no_network_are_left_alone(tmp_path: Path, record: str) -> None:
    for key in (RECORDED, EXPORTED):
        save_file({"a": torch.ones(2)}, tmp_path / "w.safetensors", metadata={key: record})
        assert read_weights(tmp_path / "w.safetensors").network is None


def test_weights_that_do_not_fit_are_named(resnet: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    state = resnet.state_dict()
    short = {name: tensor for name, tensor in state.items() if not name.startswith("layer4.1.")}
    told = misfit("resnet18", write(path, {"state_dict": behind("module.", short)}))
    assert r"does not fit resnet18: 10 of 120 tensors missing (layer4.1.conv1.weight, " in told
    assert "behind 'state_dict.module.'" in told
    deeper = {**state, "layer1.2.conv1.weight": torch.ones(64, 64, 3, 3)}
    assert "1 that the network does not have (layer1.2.conv1.weight)" in misfit("resnet18", write(path, deeper))
    unknown = {**state, "memory.weight": torch.ones(2)}
    assert "1 that the network does not have (memory.weight)" in misfit("resnet18", write(path, unknown))
    wide = {**state, "layer1.0.conv1.weight": torch.ones(128, 64, 3, 3)}
    told = misfit("resnet18", write(path, wide))
    assert "1 of another shape (layer1.0.conv1.weight (128, 64, 3, 3), not (64, 64, 3, 3))" in told
    assert "holds no tensor of wrn-10-1: it has a, the network has stages.conv1.weight" in misfit(
        "wrn-10-1", write(path, {"a": torch.ones(2)})
    )


def test_a_transformer_of_another_patch_size_is_refused(tmp_path: Path) -> None:
    state = timm.create_model("vit_tiny_patch16_224", img_size=64).state_dict()
    state["patch_embed.proj.weight"] = torch.zeros(192, 3, 8, 8)
    assert "another shape" in misfit(VIT, write(tmp_path / "w.pth", state))


class Payload:
    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return Path.touch, (self.place,)


def test_files_that_cannot_be_used(resnet: nn.Module, tmp_path: Path) -> None:
    backbone = build_backbone(ModelConfig(arch="resnet18"))
    path = write(tmp_path / "w.pth", {**resnet.state_dict(), "args": Payload(tmp_path / "ran")})
    with pytest.raises(DataError, match=r"holds more than tensors and plain values \(.*\), which is never loaded"):
        load_foreign(backbone, read_weights(path))
    assert not (tmp_path / "ran").exists()
    bad = {**resnet.state_dict(), "bn1.running_var": torch.full((64,), float("nan"))}
    with pytest.raises(DataError, match=r"NaN or infinity in 1 of 120 tensors.*\(stages\.conv1\.bn1\.running_var\)"):
        load_foreign(backbone, read_weights(write(path, bad)))
    with pytest.raises(DataError, match="holds a list without tensors by name"):
        load_foreign(backbone, read_weights(write(path, [torch.ones(2)])))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(CorruptError, match=r"is not a whole weights file: .* \(its end is missing or damaged\); fetch"):
        load_foreign(backbone, read_weights(path))
    (tmp_path / "w.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(CorruptError, match="is not a whole weights file"):
        load_foreign(backbone, read_weights(tmp_path / "w.safetensors"))
    for name in ("gone.pth", "gone.safetensors"):
        with pytest.raises(MissingError, match=f"no weights file .*{name}"):
            load_foreign(backbone, read_weights(tmp_path / name))
