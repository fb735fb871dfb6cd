"""Batches through the network, by the workers of a CPU and by those that launch on a GPU, which needs none here."""

import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bowstore.errors import DataError
from bowstore.words.encode import forward as forward_module
from bowstore.words.encode.forward import Clock, forward
from bowstore.words.encode.workers import compute_workers

CPU, GPU, BATCHES = torch.device("cpu"), torch.device("cuda", 0), 5


class Network:
    """A teacher of two layers."""

    view = None

    def __init__(self, change: Callable[[Tensor], Tensor] = lambda images: images) -> None:
        self.change = change

    def replica(self) -> "Network":
        return self

    def maps(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        return {"one": self.change(images_BCHW) + 1, "two": 2 * images_BCHW}


def run(monkeypatch: pytest.MonkeyPatch, teacher: Network, use: Any, device: torch.device) -> tuple[Any, Clock]:
    """Five batches of three images, all pixels of which are the batch's number, in one buffer as the pipeline's."""
    buffer_BCHW = torch.empty(3, 2, 4, 4)

    def clean_batches(*_: Any, **__: Any) -> Iterator[tuple[Any, Tensor]]:
        for number in range(BATCHES):
            yield np.arange(3) + 3 * number, buffer_BCHW.fill_(float(number))

    monkeypatch.setattr(forward_module, "clean_batches", clean_batches)
    monkeypatch.setattr(forward_module, "ShardReader", lambda index: None)
    index, clock = SimpleNamespace(key=lambda row: f"image-{row}"), Clock(compute_workers(device))
    job: Any = SimpleNamespace(
        teacher=teacher, index=index, batch=3, device=device, config=SimpleNamespace(threads=None)
    )
    found: Any = forward(job, [], use, clock=clock, stage="assign")
    return list(found), clock


def words(_rows_B: Any, maps: Any) -> Any:
    return [maps["one"].sum(dim=(1, 2, 3)).numpy(), maps["two"].amax(dim=(1, 2, 3)).numpy()]


@pytest.mark.parametrize("device", [CPU, GPU])
def test_batches_come_in_order_and_none_is_written_over(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    last = threading.Event()

    def use(rows_B: Any, maps: Any) -> Any:
        if rows_B[0] == 3:
            last.set()
        if rows_B[0] == 0 and compute_workers(device) > 1:
            assert last.wait(10)  # the second batch ends before the first
        return words(rows_B, maps)

    found, clock = run(monkeypatch, Network(), use, device)
    assert [rows_B.tolist() for rows_B, _ in found] == [[3 * n, 3 * n + 1, 3 * n + 2] for n in range(BATCHES)]
    assert [one.tolist() for _, (one, _two) in found] == [[32.0 * (n + 1)] * 3 for n in range(BATCHES)]
    assert {"start", "images", "teacher", "assign"} == set(clock.seconds)


def test_on_a_gpu_two_workers_use_maps_at_once_and_launch_one_trunk_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    both, launching, most = threading.Barrier(2), list[int](), list[int]()

    def launch(images_BCHW: Tensor) -> Tensor:
        launching.append(1)
        most.append(len(launching))
        threading.Event().wait(0.01)
        launching.pop()
        return images_BCHW

    def use(rows_B: Any, maps: Any) -> Any:
        if rows_B[0] < 6:
            both.wait(10)
        return words(rows_B, maps)

    run(monkeypatch, Network(launch), use, GPU)
    assert most == [1] * BATCHES


@pytest.mark.parametrize("device", [CPU, GPU])
def test_maps_that_are_not_finite_name_their_images(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    def spoil(images_BCHW: Tensor) -> Tensor:
        spoilt = images_BCHW.clone()
        if int(images_BCHW[0, 0, 0, 0]) == 3:
            spoilt[1, 0, 2, 2] = torch.inf
            spoilt[2, 1, 0, 0] = torch.nan
        return spoilt

    with pytest.raises(DataError, match=r"layer 'one' .* for 2 images of a batch, for example image-10, image-11;"):
        run(monkeypatch, Network(spoil), words, device)


def test_finite_maps_whose_sum_is_not_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = run(monkeypatch, Network(lambda images: torch.full_like(images, 3e38)), words, CPU)
    assert len(found) == BATCHES


@pytest.mark.parametrize("device", [CPU, GPU])
def test_an_error_of_the_network_ends_the_pass(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    def fail(images_BCHW: Tensor) -> Tensor:
        if int(images_BCHW[0, 0, 0, 0]) == 2:
            raise RuntimeError("no kernel")
        return images_BCHW

    with pytest.raises(RuntimeError, match="no kernel"):
        run(monkeypatch, Network(fail), words, device)
