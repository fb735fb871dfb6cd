"""Networks for other code: plain torchvision, timm and torch load them strictly and compute the same features."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from click.testing import CliRunner
from teacher_sets import load_teacher
from torch import Tensor, nn

from bowstore.cli import main
from bowstore.config import ExportConfig, ModelConfig, ViewConfig, dump
from bowstore.data.views import clean_view
from bowstore.errors import BowstoreError, MismatchError, MissingError, UsageError
from bowstore.models import export
from bowstore.models.backbone import Backbone, mean_pool
from bowstore.models.export import Exported, export_network
from bowstore.models.saved import EXPORTED, SavedNetwork, checkpoint_bytes, load_backbone, save_backbone
from bowstore.runs import BACKBONE_FILE

GUIDE = Path(__file__).parents[2] / "docs/guide.md"
VIEW = ViewConfig(size=160, resize=None, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.625))
STRIDES = (2, 1, 2)
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def network(arch: str) -> tuple[Backbone, SavedNetwork]:
    """A network whose weights and statistics are all its own."""
    saved = SavedNetwork(name="first", task="words", model=ModelConfig(arch=arch, strides=STRIDES), view=VIEW)
    backbone = saved.fresh()
    generator = torch.Generator().manual_seed(1)
    for name, tensor in backbone.state_dict().items():
        if name.endswith("num_batches_tracked"):
            tensor.fill_(7)
        elif tensor.ndim == 1:
            tensor.add_(torch.rand(tensor.shape, generator=generator) / 4)
    return backbone.eval(), saved


def finished_run(arch: str) -> Path:
    """A run below the current directory that ended with a network."""
    run = Path("runs/first")
    run.mkdir(parents=True, exist_ok=True)
    save_backbone(run / BACKBONE_FILE, *network(arch))
    return run


@pytest.fixture
def exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Exported]:
    """Exports a network of runs/first to a file in the current directory."""
    monkeypatch.chdir(tmp_path)

    def run(arch: str, form: str, out: str = "net.pth") -> Exported:
        return export_network(finished_run(arch), Path(out), ExportConfig(format=form))  # type: ignore[arg-type]

    return run


def noise(side: int = 64) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(2))


def largest_difference(net: nn.Module, arch: str, images: Tensor) -> float:
    with torch.no_grad():
        return float((net.eval()(images) - network(arch)[0](images)).abs().max())


def run_lines(lines: list[str]) -> Any:
    """What some lines of Python call `net`."""
    names: dict[str, Any] = {}
    exec("\n".join(lines), names)
    return names["net"]


def test_torchvision_loads_strictly_and_computes_the_same(exported: Callable[..., Exported]) -> None:
    result = exported("resnet18", "torchvision", "net.safetensors")
    net = torchvision.models.resnet18()
    net.fc = nn.Identity()  # type: ignore[assignment]
    net.load_state_dict(safetensors.torch.load_file("net.safetensors"))
    assert largest_difference(net, "resnet18", noise()) == 0
    assert result.python == (
        "import safetensors.torch, torch, torchvision",
        "net = torchvision.models.resnet18()",
        "net.fc = torch.nn.Identity()",
        'net.load_state_dict(safetensors.torch.load_file("net.safetensors"))',
    )


def test_timm_loads_strictly_and_computes_the_same(exported: Callable[..., Exported]) -> None:
    exported("resnet18", "timm")
    net = timm.create_model("resnet18", num_classes=0, checkpoint_path="net.pth")
    assert largest_difference(net, "resnet18", noise()) == 0


def test_the_lines_of_help_and_guide_load_resnet50_of_the_newest_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    finished_run("resnet50")
    shown = CliRunner().invoke(main, ["export", "--help"]).output
    guide = GUIDE.read_text()
    for library in ("torchvision", "timm"):
        found = re.search(rf"bowstore (export (\S+) --format {library})\n((?: +(?:import|net).*\n)+)", shown)
        assert found
        lines = [line.strip() for line in found[3].splitlines()]
        assert all(f"    {line}\n" in guide for line in lines)
        assert f"    bowstore {found[1]}" in guide
        told = CliRunner().invoke(main, found[1].split())
        assert told.exit_code == 0, told.output
        assert "\n".join(f"  {line}" for line in lines) in told.output
        assert largest_difference(run_lines(lines), "resnet50", noise()) < 1e-6


@pytest.mark.parametrize(
    ("arch", "form", "line"),
    [
        ("torchvision:mobilenet_v3_small", "safetensors", "net.classifier = torch.nn.Identity()"),
        ("torchvision:mnasnet0_5", "safetensors", "state.update(safetensors.torch.load_file(\"net.safetensors\"))"),
        ("timm:resnet18.a1_in1k", "torchvision", "net = torchvision.models.resnet18()"),
        ("timm:test_convnext", "timm", "net.head = torch.nn.Identity()"),
        ("timm:test_vit", "safetensors", 'net = timm.create_model("test_vit", num_classes=0, dynamic_img_size=True)'),
    ],
)  # fmt: skip
def test_networks_of_libraries(exported: Callable[..., Exported], arch: str, form: str, line: str) -> None:
    """Where a head with weights stood, what is printed empties it; features are those before it."""
    result = exported(arch, form, "net.safetensors")
    assert line in result.python
    net = run_lines(list(result.python)).eval()
    ours, images = network(arch)[0], noise(160)
    with torch.no_grad():
        map_BChw = net.forward_features(images) if arch.startswith("timm:") and form != "torchvision" else net(images)
        expected = ours.trunk(images)
    if expected.ndim == 4 > map_BChw.ndim:
        expected = mean_pool(expected)
    assert torch.equal(map_BChw, expected)


def test_networks_are_the_same_if_their_stages_or_their_ends_agree() -> None:
    """Libraries may name another map the last stage (DenseNet's before and after a ReLU), or pool at the end."""

    class Net(SimpleNamespace):
        def __call__(self, _: Tensor) -> Tensor:
            return torch.full((1, 4), self.stage)

    def net(stage: float, end: Tensor) -> Any:
        return Net(image_size=8, trunk=lambda _: end, stage=stage)

    ends = torch.ones(1, 4)
    assert export._same_features(net(1, ends), net(2, ends.reshape(1, 4, 1, 1).expand(1, 4, 3, 3)))
    assert export._same_features(net(1, ends), net(1, ends + 1))
    assert not export._same_features(net(1, ends), net(2, ends + 1e-3))
    assert not export._same_features(net(1, ends), net(2, torch.ones(1, 5)))


def test_a_wide_resnet_comes_with_a_definition_that_needs_torch_alone(exported: Callable[..., Exported]) -> None:
    result = exported("wrn-16-2", "safetensors", "net.safetensors")
    assert result.definition == Path("wide_resnet.py")
    assert "bowstore" not in result.definition.read_text()
    assert len(result.definition.read_text().splitlines()) < 90
    torch.save(noise(), "noise.pt")
    code = [
        "import sys",
        "sys.modules['bowstore'] = None  # as if it were not installed",
        *result.python,
        "with torch.no_grad(): torch.save(net.eval()(torch.load('noise.pt')), 'features.pt')",
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {'bowstore', 'torchvision', 'timm'}))",
    ]
    child = subprocess.run([sys.executable, "-c", "\n".join(code)], capture_output=True, text=True, timeout=120)
    assert child.returncode == 0, child.stderr
    assert child.stdout == "['bowstore']\n"
    with torch.no_grad():
        assert torch.equal(torch.load("features.pt"), network("wrn-16-2")[0](noise()))
    assert exported("wrn-16-2", "safetensors", "again.safetensors").definition == result.definition
    result.definition.write_text("my own")
    with pytest.raises(UsageError, match=r"^wide_resnet\.py is there and is not the definition that goes with the "):
        exported("wrn-16-2", "safetensors", "third.safetensors")
    assert (result.definition.read_text(), Path("third.safetensors").exists()) == ("my own", False)


@pytest.mark.parametrize(
    ("arch", "form", "spec", "layer"),
    [
        ("resnet18", "timm", "timm:resnet18", "conv4"),
        ("timm:test_vit", "safetensors", "timm:test_vit", "blocks.1"),
        ("wrn-16-2", "safetensors", "wrn-16-2", "block1"),
    ],
)
def test_a_teacher_is_made_of_an_export(
    exported: Callable[..., Exported], arch: str, form: str, spec: str, layer: str
) -> None:
    """It has the strides and sees the images that the network was trained with, as from a run's own files."""
    exported(arch, form, "net.safetensors")
    ours, saved = network(arch)
    state = {"config": dump(saved), "step": 1, "inputs": {}, "head": {}, "optimizer": {}}
    Path("last.pt").write_bytes(checkpoint_bytes({**state, "backbone": ours.state_dict()}))
    images = noise()
    for file in ("net.safetensors", f"runs/first/{BACKBONE_FILE}", "last.pt"):
        teacher = load_teacher(spec, (layer,), CPU, weights=Path(file))
        torch.testing.assert_close(teacher.maps(images), ours.feature_maps(images, [layer]), rtol=1e-4, atol=1e-4)
        assert teacher.view == clean_view(VIEW)
    assert load_teacher(spec, (layer,), CPU, weights=Path("last.pt"), size=96).view.size == 96


@pytest.mark.parametrize(("out", "form"), [("net.safetensors", "safetensors"), ("net.pth", "timm")])
def test_an_export_that_is_given_as_a_run_is_named_for_what_it_is(
    exported: Callable[..., Exported], out: str, form: str
) -> None:
    exported("timm:test_resnet", form, out)
    with pytest.raises(
        MismatchError,
        match=rf"^{out} is the network of run first as `bowstore export` wrote it for other code; give the run, or "
        rf"architecture and file: --arch timm:test_resnet --weights {out}$",
    ):
        load_backbone(Path(out))


def test_a_file_says_what_is_in_it(exported: Callable[..., Exported]) -> None:
    exported("timm:test_resnet", "safetensors", "net.safetensors")
    told = CliRunner().invoke(main, ["export", "first", "net.pth", "--format", "timm", "--json"])
    assert told.exit_code == 0, told.output
    shown = json.loads(told.stdout)
    record = torch.load("net.pth")._metadata[EXPORTED]
    assert record == {key: shown[key] for key in record}
    assert {**record, "bowstore": ""} == {
        "format": "timm",
        "name": "first",
        "task": "words",
        "model": {"arch": "timm:test_resnet", "strides": list(STRIDES)},
        "features": 96,
        "view": {"size": 160, "resize": None, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.625]},
        "bowstore": "",
    }
    with safetensors.safe_open("net.safetensors", "pt") as file:
        assert json.loads(file.metadata()[EXPORTED]) == record | {"format": "safetensors"}
        assert file.metadata()["format"] == "pt"
    text = CliRunner().invoke(main, ["export", "first", "net.pth", "--format", "timm"]).stdout
    assert text.splitlines()[:2] == [
        "net.pth: timm:test_resnet of run first, without a classifier; 96 features",
        "images: whole, 160 x 160; mean 0.1, 0.2, 0.3, deviation 0.4, 0.5, 0.625",
    ]


@pytest.mark.parametrize(
    ("arch", "form", "out", "message"),
    [
        ("wrn-10-1", "timm", "net.pth", r"timm has no network wrn-10-1; --format safetensors holds it, with its defin"),
        ("timm:test_vit", "torchvision", "net.pth", "torchvision has no network that timm:test_vit could be loaded into"
         "; --format timm and --format safetensors hold it"),
        ("torchvision:mobilenet_v3_small", "timm", "net.pth", "timm has no network that torchvision:mobilenet_v3"),
        ("timm:efficientnet_b0", "torchvision", "net.pth", r"torchvision:efficientnet_b0 has other tensors than timm:"
         r"efficientnet_b0 \(the first is conv_stem\.weight\); --format timm and --format safetensors hold it"),
        ("resnet18", "torchvision", "net.onnx", r"^net\.onnx must end with \.pth or \.pt \(a file of torch\.save\)"),
        ("resnet18", "safetensors", "net.pth", r"^--format safetensors writes files that end with \.safetensors, and "
         r"net\.pth does not; name it so, or give --format torchvision or timm$"),
        ("resnet18", "timm", "s3://b/net.pth", r"is on another machine; write the network to a file here, then copy"),
        ("resnet18", "timm", ".", r"^\. is a folder; name the file to write, for example network\.safetensors$"),
        ("resnet18", "timm", "gone/net.pth", r"^no folder gone to write net\.pth into; make it, or name another file$"),
    ],
)  # fmt: skip
def test_what_cannot_be_written_is_refused(
    exported: Callable[..., Exported], arch: str, form: str, out: str, message: str
) -> None:
    with pytest.raises(BowstoreError, match=message) as refused:
        exported(arch, form, out)
    assert isinstance(refused.value, MissingError if out.startswith("gone") else UsageError)
    assert [path.name for path in Path().iterdir()] == ["runs"]


def test_another_network_with_the_same_tensors_is_refused(
    exported: Callable[..., Exported], monkeypatch: pytest.MonkeyPatch
) -> None:
    build = export.library_backbone

    def other(arch: str) -> Any:
        found = build(arch)
        found.network.act1 = nn.GELU()
        return found

    monkeypatch.setattr(export, "library_backbone", other)
    with pytest.raises(UsageError, match=r"^timm:resnet18 has the tensors of resnet18, but computes something else; "):
        exported("resnet18", "timm")


def test_v1_is_written_with_the_lines_that_move_its_strides(exported: Callable[..., Exported]) -> None:
    """Its tensors are torchvision's, and whatever has its strides elsewhere computes something else of them."""
    result = exported("resnet50-v1", "safetensors", "net.safetensors")
    assert largest_difference(run_lines(list(result.python)), "resnet50-v1", noise()) == 0
    refused = r"^torchvision:resnet50 has the tensors of resnet50-v1, but .*; --format safetensors holds it$"
    with pytest.raises(UsageError, match=refused):
        export_network(Path("runs/first"), Path("net.pth"), ExportConfig(format="torchvision"))
    for spec in ("resnet50", "torchvision:resnet50", "timm:resnet50"):
        refused = rf"^net\.safetensors is of resnet50-v1, which has its strides elsewhere than {spec}; name resnet50-v1"
        with pytest.raises(MismatchError, match=refused):
            load_teacher(spec, ("conv4",), CPU, weights=Path("net.safetensors"))


def test_only_an_earlier_export_is_replaced(exported: Callable[..., Exported], monkeypatch: pytest.MonkeyPatch) -> None:
    for out in ("net.pth", "net.safetensors"):
        exported("timm:test_resnet", "timm", out)
        exported("timm:test_resnet", "timm", out)
    torch.save({"mine": torch.zeros(1)}, "mine.pth")
    before = Path("net.pth").read_bytes()
    for mine in ("mine.pth", f"runs/first/{BACKBONE_FILE}"):
        with pytest.raises(UsageError, match=r"is there, and `bowstore export` did not write it; name another file"):
            exported("timm:test_resnet", "timm", mine)
    assert list(torch.load("mine.pth")) == ["mine"]

    def failing(*args: Any) -> None:
        args[1].write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", failing)
    with pytest.raises(OSError, match="No space left"):
        exported("timm:test_resnet", "timm")
    assert Path("net.pth").read_bytes() == before
    assert not [path for path in Path().iterdir() if path.name.startswith(".")]


def test_paths_of_the_command(exported: Callable[..., Exported]) -> None:
    told = CliRunner().invoke(main, ["export", "a", "b.pth", "c.pth"])
    assert told.exit_code == 2
    assert "export takes a run and a file, not 3 paths; leave out c.pth" in told.output
    told = CliRunner().invoke(main, ["export", "net.pth", "--format", "timm"])
    assert told.exit_code == 1
    assert "no finished run in runs" in told.output
