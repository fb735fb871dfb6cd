"""Frozen networks, compiled: what comes out is the network's own, whatever fills the batch and whoever calls."""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bowstore.config import ModelConfig
from bowstore.models import compiled
from bowstore.models.backbone import Backbone
from bowstore.models.compiled import EAGER, FROZEN, CannotCompileError, compile_frozen, flops, way_of
from bowstore.models.registry import build_backbone

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def frozen(arch: str, size: int | None = None) -> Backbone:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = build_backbone(ModelConfig(arch=arch), size).eval().requires_grad_(False)
    return backbone.to(memory_format=torch.channels_last)


def maps(*layers: str) -> compiled.Use:
    return lambda backbone, images: backbone.feature_maps(images, layers)


@pytest.fixture
def traced_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run what was traced, without the seconds of a compiler."""
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, _images, options: graph)


@pytest.mark.slow
def test_compiled_maps_are_the_networks_own() -> None:
    backbone, use = frozen("wrn-10-1"), maps("block2.0.conv1", "block3")  # one by a hook, one where it is cut
    run = compile_frozen(backbone, use, batch=4, size=16, device=CPU)
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    expected, found = use(backbone, images), run(images)
    assert list(found) == ["block2.0.conv1", "block3"]
    for name, map_B in expected.items():
        torch.testing.assert_close(found[name], map_B, rtol=1e-4, atol=1e-5)
    few = run(images[2:3])
    assert all(torch.equal(few[name][0], found[name][2]) for name in found)  # an image's map is its own
    with ThreadPoolExecutor(4) as pool:  # one code and one set of weights for all
        for other in pool.map(lambda _: run(images), range(8)):
            assert all(torch.equal(other[name], found[name]) for name in found)


@pytest.mark.parametrize(
    ("arch", "size", "layers"),
    [
        ("resnet18", 32, ("pool1", "conv3.0.conv2", "conv4")),
        ("torchvision:resnet18", 32, ("layer2.0", "conv4")),
        ("timm:resnet18", 64, ("layer1.0", "layer3")),
        ("timm:vit_tiny_patch16_224", 64, ("blocks.1", "blocks.11")),
    ],
)
def test_every_way_to_maps_is_traced(arch: str, size: int, layers: tuple[str, ...], traced_only: None) -> None:
    backbone = frozen(arch, size)
    run = compile_frozen(backbone, maps(*layers), batch=3, size=size, device=CPU)
    images = torch.randn(2, 3, size, size)
    for name, map_B in backbone.feature_maps(images, layers).items():
        torch.testing.assert_close(run(images)[name], map_B, rtol=1e-4, atol=1e-5)


def test_work_of_an_image_is_twice_its_multiplications() -> None:
    convolutions = 64 * 64 * 3 * 64 * 49 * 2  # conv1 of a residual network at 128 pixels: 7 x 7, stride 2
    assert flops(frozen("resnet18"), maps("conv1"), 128) == convolutions
    assert 6.4e9 < flops(frozen("resnet50"), maps("conv4"), 224) < 6.7e9


@pytest.mark.parametrize(("images", "way"), [(74_000, EAGER), (75_000, FROZEN)])
def test_the_work_of_the_whole_job_decides(images: int, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = frozen("wrn-16-2")  # 0.81 GFLOP an image: a core's 1000 s are 74,180 images
    asked = {"images": images, "size": 64}
    assert way_of("auto", backbone, maps("block3"), device=CPU, **asked) == way
    assert way_of(True, backbone, maps("block3"), device=CPU, **asked) == FROZEN
    assert way_of(False, backbone, maps("block3"), device=CPU, **asked) == EAGER
    assert way_of("auto", backbone, maps("block3"), device=torch.device("cuda"), **asked) == EAGER


def no_compiler() -> str:
    raise RuntimeError("No working C++ compiler found")


def test_without_a_compiler_auto_says_so_and_goes_on(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", no_compiler)
    backbone = frozen("wrn-10-1")
    assert way_of("auto", backbone, maps("block3"), images=10**7, size=32, device=CPU) == EAGER
    (line,) = capsys.readouterr().err.splitlines()
    assert "run as it is, not compiled: there is no C++ compiler that works; install g++, or set CXX to one" in line
    with pytest.raises(CannotCompileError, match=r"^there is no C\+\+ compiler that works; install g\+\+"):
        compile_frozen(backbone, maps("block3"), batch=2, size=16, device=CPU)


@pytest.mark.parametrize(
    "ask", ["compiler_problem(cpu)", "way_of('auto', network, use, images=1, size=16, device=cpu)"]
)
def test_a_folder_that_cannot_be_written_is_no_reason_to_stop(ask: str, tmp_path: Path) -> None:
    """In a process of its own: the folder is made when inductor is imported."""
    (tmp_path / "file").touch()
    code = f"""if True:
        import torch
        from bowstore.config import ModelConfig
        from bowstore.models.compiled import compiler_problem, way_of
        from bowstore.models.registry import build_backbone
        cpu, network = torch.device("cpu"), build_backbone(ModelConfig(arch="wrn-10-1"))
        use = lambda backbone, images: backbone.feature_maps(images, ("block3",))
        print({ask})
    """
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "file")}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    told = "cannot hold what is compiled (File exists); set TORCHINDUCTOR_CACHE_DIR to a folder that can be written"
    assert f"{tmp_path}/file {told}\n" in found.stdout + found.stderr
    assert found.stdout == "eager\n" or ask.startswith("compiler")


def test_what_a_compiler_makes_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(graph: Any, _images: Any, options: Any) -> Any:
        return lambda images: [result * 1.001 for result in graph(images)]

    def broken(_graph: Any, _images: Any, options: Any) -> Any:
        raise RuntimeError("C++ compile error\n\nCommand:\ng++ -Werror\n\nOutput:\nx.hpp: note\ng++: error: no space\n")

    backbone = frozen("wrn-10-1")
    monkeypatch.setattr(torch._inductor, "compile", wrong)
    with pytest.raises(CannotCompileError, match=r"of wrn-10-1 is off by 0\.001 of its largest value"):
        compile_frozen(backbone, maps("block3"), batch=2, size=16, device=CPU)
    monkeypatch.setattr(torch._inductor, "compile", broken)
    with pytest.raises(CannotCompileError, match=r"compile wrn-10-1: C\+\+ compile error \(g\+\+: error: no space\)$"):
        compile_frozen(backbone, maps("block3"), batch=2, size=16, device=CPU)


def test_a_whole_batch_of_another_layout_is_taken(traced_only: None) -> None:
    backbone = frozen("wrn-10-1")
    run = compile_frozen(backbone, maps("block3"), batch=2, size=16, device=CPU)
    seen: list[Tensor] = []
    graph = run.graph
    object.__setattr__(run, "graph", lambda images: seen.append(images) or graph(images))
    for count in (1, 2):
        run(torch.randn(count, 3, 16, 16))
    assert [images.is_contiguous(memory_format=torch.channels_last) for images in seen] == [True, True]
