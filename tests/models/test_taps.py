"""Layers of networks of two libraries: names, maps, and that nothing deeper is run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from click.testing import CliRunner
from torch import Tensor, nn

from bowstore.cli import main
from bowstore.config import ModelConfig
from bowstore.errors import UsageError
from bowstore.models.backbone import Backbone
from bowstore.models.heads import RotationHead
from bowstore.models.layers import describe_layers
from bowstore.models.library import library_view
from bowstore.models.registry import build_backbone
from bowstore.models.saved import SavedNetwork, load_backbone, save_backbone
from bowstore.models.taps import Layout, probe, without_data
from bowstore.models.weights import weights_sha256

VIT = "timm:vit_tiny_patch16_224"


def build(arch: str, size: int | None = None) -> Backbone:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_backbone(ModelConfig(arch=arch), size).eval()


@pytest.fixture(scope="module")
def vit() -> Backbone:
    return build(VIT)


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("ran a module that nobody asked for")


@pytest.mark.parametrize(
    ("arch", "size", "stages"),
    [
        (
            "torchvision:resnet18", 64,
            {"conv1": (64, 32), "pool1": (64, 16), "conv2": (64, 16), "conv3": (128, 8), "conv5": (512, 2)},
        ),
        (
            "timm:resnet18", 64,
            {"conv1": (64, 32), "pool1": (64, 16), "conv2": (64, 16), "conv3": (128, 8), "conv5": (512, 2)},
        ),
        ("wrn-10-1", 32, {"conv1": (16, 32), "block1": (16, 32), "block2": (32, 16), "block3": (64, 8)}),
        ("torchvision:mnasnet0_5", 64, {"conv1": (8, 32), "conv2": (16, 16), "conv3": (24, 8), "conv4": (48, 4)}),
        ("timm:lcnet_050", 64, {"conv1": (16, 32), "conv3": (64, 8), "conv4": (128, 4), "conv5": (256, 2)}),
        ("timm:convnext_atto", 64, {"conv2": (40, 16), "conv3": (80, 8), "conv4": (160, 4), "conv5": (320, 2)}),
        ("timm:swin_tiny_patch4_window7_224", 224, {"conv2": (96, 56), "conv3": (192, 28), "conv4": (384, 14)}),
        (VIT, 64, {"blocks.0": (192, 4), "blocks.11": (192, 4)}),
        ("torchvision:vit_b_32", 64, {"blocks.0": (768, 2), "blocks.11": (768, 2)}),
    ],
)  # fmt: skip
def test_stages_are_what_the_table_says(arch: str, size: int, stages: dict[str, tuple[int, int]]) -> None:
    backbone = build(arch, size)
    assert set(stages) <= set(backbone.layers)
    table = backbone.layer_table(size)
    with torch.no_grad():
        maps = backbone.feature_maps(torch.randn(1, 3, size, size), backbone.layers)
    for name in backbone.layers:
        info = table[name]
        assert maps[name].shape == (1, info.channels, *info.grid)
        assert backbone.channels[name] == info.channels
    for name, (channels, side) in stages.items():
        assert (table[name].channels, table[name].grid) == (channels, (side, side))


def test_every_listed_layer_gives_its_map_in_one_pass(vit: Backbone) -> None:
    for backbone in (build("timm:resnet18"), build("resnet18"), vit):
        table = backbone.layer_table(64)
        with torch.no_grad():
            maps = backbone.feature_maps(torch.randn(2, 3, 64, 64), list(table))
        assert {n: m.shape for n, m in maps.items()} == {n: (2, i.channels, *i.grid) for n, i in table.items()}


def test_aliases_and_the_librarys_own_names() -> None:
    staged, library = build("resnet18"), build("timm:resnet18")
    for name, expected in {
        "layer3": "conv4",
        "layer3.1": "conv4.1",
        "conv4": "conv4",
        "conv1.bn1": "conv1.bn1",
        "maxpool": "pool1",
    }.items():
        assert staged.resolve(name) == expected
    for name, expected in {"layer3": "conv4", "layer3.1": "layer3.1", "conv4": "conv4", "maxpool": "pool1"}.items():
        assert library.resolve(name) == expected
    library.network.load_state_dict(torchvision_state(staged))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        ours = staged.feature_maps(images, ("layer3", "conv4.0", "conv1", "pool1"))
        theirs = library.feature_maps(images, ("conv4", "layer3.0", "conv1", "pool1"))
        stem: Any = library.network
        conv1 = stem.act1(stem.bn1(stem.conv1(images)))
        assert torch.equal(ours["conv1"], conv1)
        assert torch.equal(ours["pool1"], stem.maxpool(conv1))
    for mine, other in zip(ours.values(), theirs.values(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize(
    ("arch", "conv1", "pool1"),
    [
        ("resnet50", "conv1", "pool1"),
        ("torchvision:wide_resnet50_2", "conv1", "pool1"),
        ("torchvision:densenet121", "features.relu0", "features.pool0"),
        ("timm:resnet26d", "act1", "maxpool"),
        ("timm:seresnext26t_32x4d", "act1", "maxpool"),
        ("timm:resnetblur18", "act1", "maxpool"),
        ("timm:resnetrs50", "act1", "maxpool"),  # its pooling is a strided convolution
        ("timm:skresnet18", "act1", "maxpool"),
        ("timm:resnest14d", "act1", "maxpool"),
        ("timm:resnetv2_18", "stem.conv", "stem.pool"),
        ("timm:legacy_seresnet18", "layer0", "pool0"),
        ("timm:cspresnet50", "stem.conv1", "stem.pool"),
        ("timm:lcnet_050", "blocks.0", None),
        ("timm:nfnet_l0", "stem.conv3", None),  # a pooling, but inside its first stage
        ("torchvision:shufflenet_v2_x0_5", "conv1", None),  # its pooling is the last map of stride 4: conv2
    ],
)
def test_conv1_is_the_map_before_the_stems_pooling_and_pool1_the_one_after(
    arch: str, conv1: str, pool1: str | None
) -> None:
    with torch.device("meta"):
        backbone = build_backbone(ModelConfig(arch=arch))
    table = backbone.layer_table(backbone.image_size)
    assert table["conv1"].module == conv1
    assert ("pool1" in backbone.layers) == (pool1 is not None)
    if pool1:
        assert table["pool1"].module == pool1
        assert backbone.layers[:3] == ("conv1", "pool1", "conv2")
        assert table["conv1"].grid[0] == 2 * table["pool1"].grid[0] == 2 * table["conv2"].grid[0]
        assert backbone.resolve(pool1) == "pool1"


def torchvision_state(staged: Backbone) -> dict[str, Tensor]:
    return {spelt: staged.state_dict()[own] for spelt, own in staged.spellings()["torchvision"].items()}


def test_a_map_is_not_changed_by_what_follows_in_place() -> None:
    """The batch norm's output is overwritten by a ReLU in place, the pass going on to conv2."""
    backbone = build("resnet18")
    net = torchvision.models.resnet18(weights=None).eval()
    net.load_state_dict(torchvision_state(backbone), strict=False)
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        maps = backbone.feature_maps(images, ("conv1.bn1", "conv2"))
        assert torch.equal(maps["conv1.bn1"], net.bn1(net.conv1(images)))
    assert bool((maps["conv1.bn1"] < 0).any())


def test_tokens_are_laid_out_as_the_image(vit: Backbone) -> None:
    plain = torch.zeros(1, 3, 64, 64)
    for row, column in ((0, 3), (2, 1)):
        marked = plain.clone()
        marked[..., 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] = torch.randn(3, 16, 16)
        with torch.no_grad():
            maps = [vit.feature_maps(images, ("blocks.0", "blocks.11")) for images in (plain, marked)]
        for layer in maps[0]:
            change = (maps[1][layer] - maps[0][layer]).norm(dim=1)[0]
            assert divmod(int(change.argmax()), 4) == (row, column)


def test_the_last_block_comes_after_the_final_norm(vit: Backbone) -> None:
    network: Any = vit.root()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = network.forward_features(images)[:, 1:]
        last = vit.feature_maps(images, ("blocks.10", "blocks.11"))["blocks.11"]
    assert torch.equal(last.flatten(2).transpose(1, 2), expected)
    assert vit.layer_table(64)["blocks.11"].note == "= norm: with the final norm"
    without = build("timm:vit_wee_patch16_reg1_gap_256", 64)
    assert without.layer_table(64)[without.layers[-1]].note == "the network has no norm after it"


@pytest.mark.parametrize(
    ("arch", "layer", "deeper", "path"),
    [
        ("timm:resnet18", "conv3", "conv4", "layer3"),
        ("timm:resnet18", "layer3.0", "layer3.1", "layer3.1"),
        ("resnet18", "conv4.0", "conv4.1", "conv4.1"),
        ("torchvision:mnasnet0_5", "conv3", "conv4", "layers.10"),
        (VIT, "blocks.3", "blocks.4", "blocks.4"),
    ],
)
def test_nothing_deeper_is_run(arch: str, layer: str, deeper: str, path: str) -> None:
    backbone = build(arch)
    parent, _, name = path.rpartition(".")
    images = torch.randn(1, 3, 64, 64)
    assert (backbone.resolve(layer), backbone.resolve(deeper)) == (layer, deeper)
    backbone.feature_maps(images, (layer, deeper))
    backbone.root().get_submodule(parent)._modules[name] = Fails()
    with torch.no_grad():
        assert set(backbone.feature_maps(images, (backbone.layers[0], layer))) == {backbone.layers[0], layer}
        with pytest.raises(AssertionError, match="nobody asked for"):
            backbone.feature_maps(images, (layer, deeper))


def test_layers_that_cannot_be_had(vit: Backbone) -> None:
    staged = build("resnet18")
    with pytest.raises(UsageError, match=r"layer 'conv2\.0\.relu' of resnet18 is run 2 times an image; name another"):
        staged.resolve("conv2.0.relu")
    with pytest.raises(UsageError, match=r"has no layer 'conv9'; its layers are conv1, .*conv5 \(nearest: conv"):
        staged.resolve("conv9")
    with pytest.raises(UsageError, match=r"'blocks\.12'; its layers are blocks\.0, blocks\.1, .* blocks\.11 \(nearest"):
        vit.resolve("blocks.12")
    with pytest.raises(UsageError, match=r"attn\.q_norm' .* gives a tensor of shape \(B, 3, 197, 64\), not a square"):
        vit.resolve("blocks.3.attn.q_norm")
    vector = build("timm:mobilenetv3_small_050")
    with pytest.raises(UsageError, match=r"gives a tensor of shape \(B, 8, 1, 1\), not a square map"):
        vector.resolve("blocks.0.0.se.conv_reduce")


def test_names_that_cannot_be_built() -> None:
    for arch, message in {
        "timm:resnet51": r"'timm:resnet51' is unknown; did you mean 'timm:resnet",
        "torchvision:resnet51": r"did you mean 'torchvision:resnet",
        "torchvision:googlenet": "is unknown",
        "timmm:resnet18": "did you mean 'timm:resnet18'",
        "timm:hf-hub:timm/resnet18.a1_in1k": "is unknown",
        "timm:resnet50.nope": r"Invalid pretrained tag \(nope\)",
        "timm:hiera_tiny_224": "keeps its tokens in an order that is not the image's",
    }.items():
        with pytest.raises(UsageError, match=message):
            build(arch)
    with pytest.raises(UsageError, match="does not take images of 65 x 65 pixels: Input height"):
        build(VIT, 65)


def test_nothing_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("opened a connection")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    build("timm:lcnet_050.ra2_in1k")
    build("torchvision:mnasnet0_5")


def test_the_look_at_the_layers_leaves_the_network_alone() -> None:
    backbone = build("timm:lcnet_050").train()
    before = weights_sha256(backbone.state_dict())
    backbone.layer_table(96)
    assert weights_sha256(backbone.state_dict()) == before
    assert all(module.training for module in backbone.modules())
    assert not any(module._forward_hooks for module in backbone.modules())
    backbone.feature_maps(torch.randn(2, 3, 64, 64), ("conv3",))
    assert not any(module._forward_hooks for module in backbone.modules())


def test_what_is_overwritten_is_not_the_output() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Identity())
    ghost = without_data(network)
    found = {probed.name: probed for probed in probe(ghost, ghost, 8, Layout())}
    assert {name: probed.is_output for name, probed in found.items()} == {"0": False, "1": True, "2": True}
    assert {name: probed.passes_on for name, probed in found.items()} == {"0": False, "1": False, "2": True}
    assert found["0"].grid == (8, 8)
    assert next(network.parameters()).device.type == "cpu"


@pytest.mark.parametrize("arch", ["timm:legacy_xception", "timm:lcnet_050", "timm:resnet18"])
def test_the_last_layer_is_the_same_with_others_and_alone(arch: str) -> None:
    backbone = build(arch)
    images = torch.randn(2, 3, 96, 96)
    first, last = backbone.layers[0], backbone.layers[-1]
    with torch.no_grad():
        alone = backbone.feature_maps(images, (last,))[last]
        assert torch.equal(backbone.feature_maps(images, (first, last))[last], alone)
        assert torch.equal(backbone.trunk(images), alone)
    assert bool((alone > 0).any())


def test_views_of_the_libraries() -> None:
    plain = library_view("torchvision:densenet121")
    assert (plain.size, plain.resize, plain.mean[0]) == (224, 256, 0.485)
    vit = library_view(VIT)
    assert (vit.size, vit.resize, vit.mean, vit.std) == (224, 248, (0.5,) * 3, (0.5,) * 3)
    dino = library_view("timm:vit_small_patch14_reg4_dinov2.lvd142m")
    assert (dino.size, dino.resize, dino.mean[0]) == (518, 518, 0.485)


def test_a_student_of_timm(tmp_path: Path) -> None:
    arch = "timm:lcnet_050"
    backbone = build(arch)
    images = torch.randn(2, 3, 64, 64)
    network: Any = backbone.root()
    with torch.no_grad():
        pooled = backbone(images)
        assert torch.equal(pooled, network.forward_features(images).mean((2, 3)))
    assert pooled.shape == (2, backbone.features)
    assert RotationHead(backbone)(backbone.feature_maps(images, ("conv5",))["conv5"]).shape == (2, 4)
    saved = SavedNetwork(name="s", task="words", model=ModelConfig(arch=arch))
    save_backbone(tmp_path / "s.safetensors", backbone, saved)
    again = load_backbone(tmp_path / "s.safetensors").backbone
    with torch.no_grad():
        assert torch.equal(again(images), pooled)


def test_the_pooled_feature_can_be_compiled(vit: Backbone) -> None:
    images = torch.randn(2, 3, 64, 64)
    compiled = torch.compile(vit, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), vit(images))


def test_the_table_for_people_and_programs() -> None:
    report = describe_layers(ModelConfig(arch="timm:resnet18"), 64)
    (conv4,) = [line.split() for line in report.text().splitlines() if line.startswith("* conv4 ")]
    assert conv4 == "* conv4 256 4 x 4 16 = layer3".split()
    assert "more inside these: --all lists them\n" in report.text()
    result = CliRunner().invoke(main, ["layers", VIT, "--size", "64", "--json"])
    assert result.exit_code == 0, result.output
    value = json.loads(result.stdout)
    assert (value["arch"], value["size"], value["prefix_tokens"]) == (VIT, 64, 1)
    assert value["stages"][-1] == "blocks.11"
    last = value["layers"][-1]
    assert last == {
        "name": "blocks.11", "module": "norm", "channels": 192, "grid": [4, 4], "words_per_image": 16,
        "note": "= norm: with the final norm",
    }  # fmt: skip
    everything = describe_layers(ModelConfig(arch=VIT), 64, everything=True)
    assert everything.left_out == 0
    assert len(everything.layers) == len(value["layers"]) + value["left_out"]
    assert "blocks.3.attn.qkv" in {layer.name for layer in everything.layers}
    assert "1 class or register token(s) are left out" in everything.text()
    failed = CliRunner().invoke(main, ["layers", "timm:resnet51"])
    assert failed.exit_code == 2
    assert failed.stderr.count("\n") == 1
