"""The order of work on a GPU, without one: streams and events that remember what happens before what."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bowstore.errors import DataError
from bowstore.words.encode import forward as forward_module
from bowstore.words.encode import lanes
from bowstore.words.encode.forward import Clock, forward
from bowstore.words.encode.lanes import GPU_WORKERS, to_host

GPU, BATCHES = torch.device("cuda", 0), 5
Order = dict[Any, int]  # of each stream or thread, how much of it has happened


class Stream:
    """Operations in order; `seen` grows by whatever the stream waits for."""

    def __init__(self, *_: Any, priority: int = 0) -> None:
        self.priority, self.seen = priority, dict[Any, int]()

    def wait_event(self, event: "Event") -> None:
        merge(self.seen, event.seen)


class Event:
    def __init__(self, **_: Any) -> None:
        self.seen: Order = {}

    def record(self, stream: Stream) -> None:
        self.seen = dict(stream.seen)

    def synchronize(self) -> None:
        merge(gpu().host(), self.seen)

    def elapsed_time(self, _: "Event") -> float:
        return 1000.0


class Gpu:
    """What was launched where, and what had happened before it on the GPU."""

    def __init__(self) -> None:
        self.default, self.own = Stream(), threading.local()
        self.launched: dict[str, tuple[Stream, Order]] = {}
        self.kept: set[tuple[int, Stream]] = set()

    def current(self, *_: Any) -> Stream:
        return getattr(self.own, "stream", self.default)

    def host(self) -> Order:
        """What the calling thread has waited for."""
        if not hasattr(self.own, "seen"):
            self.own.seen = dict[Any, int]()
        seen: Order = self.own.seen
        return seen

    def launch(self, name: str) -> None:
        stream = self.current()
        merge(stream.seen, self.host())
        stream.seen[stream] = stream.seen.get(stream, 0) + 1
        self.launched[name] = stream, dict(stream.seen)

    def before(self, one: str, other: str) -> bool:
        stream, seen = self.launched[one]
        return self.launched[other][1].get(stream, 0) >= seen[stream]

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        outer = self.current()
        self.own.stream = stream
        try:
            yield
        finally:
            self.own.stream = outer


def merge(seen: Order, more: Order) -> None:
    for key, count in more.items():
        seen[key] = max(seen.get(key, 0), count)


_GPUS: list[Gpu] = []


def gpu() -> Gpu:
    return _GPUS[-1]


@pytest.fixture(autouse=True)
def made_up_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    _GPUS.append(Gpu())
    lanes._stream.cache_clear()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", gpu().stream)
    monkeypatch.setattr(torch.cuda, "current_stream", gpu().current)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: gpu().kept.add((self.data_ptr(), stream)))
    monkeypatch.setattr(forward_module, "ShardReader", lambda index: None)
    yield
    lanes._stream.cache_clear()
    _GPUS.pop()


class Images(Tensor):
    """A batch in the pipeline's buffer."""

    def clone(self) -> Tensor:  # type: ignore[override]
        gpu().launch(f"copy {int(self[0, 0, 0, 0])}")
        return self.as_subclass(Tensor).clone()


class Network:
    """A teacher of two layers; launches one operation."""

    view = None

    def __init__(self, change: Callable[[Tensor], Tensor] = lambda images: images) -> None:
        self.change = change

    def replica(self) -> "Network":
        return Network(self.change)

    def maps(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        gpu().launch(f"trunk {int(images_BCHW[0, 0, 0, 0])}")
        return {"one": self.change(images_BCHW) + 1, "two": 2 * images_BCHW}


def run(monkeypatch: pytest.MonkeyPatch, teacher: Network, use: Any, device: torch.device = GPU) -> tuple[Any, Clock]:
    """Five batches of three images, all pixels of which are the batch's number."""

    def clean_batches(*_: Any, **__: Any) -> Iterator[tuple[Any, Tensor]]:
        for number in range(BATCHES):
            yield np.arange(3) + 3 * number, torch.full((3, 2, 4, 4), float(number)).as_subclass(Images)

    monkeypatch.setattr(forward_module, "clean_batches", clean_batches)
    index, clock = SimpleNamespace(key=lambda row: f"image-{row}"), Clock(GPU_WORKERS)
    job: Any = SimpleNamespace(
        teacher=teacher, index=index, batch=3, device=device, config=SimpleNamespace(threads=None)
    )
    found: Any = forward(job, [], use, clock=clock, stage="assign")
    return list(found), clock


def words(rows_B: Any, maps: Any) -> Any:
    """Two operations' worth of results, on their way as `Quantizer` sends them."""
    number = int(rows_B[0]) // 3
    gpu().launch(f"words {number}")
    return [array.copy() for array in to_host(maps["one"].sum(dim=(1, 2, 3)), maps["two"].amax(dim=(1, 2, 3)))]


def test_words_run_beside_the_next_trunk_and_after_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    both = threading.Barrier(2)

    def use(rows_B: Any, maps: Any) -> Any:
        if rows_B[0] < 6:
            both.wait(10)  # so that two workers are at it
        return words(rows_B, maps)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: pytest.fail("the whole device was waited for"))
    found, clock = run(monkeypatch, Network(), use)
    assert [rows_B.tolist() for rows_B, _ in found] == [[3 * n, 3 * n + 1, 3 * n + 2] for n in range(BATCHES)]
    assert [one.tolist() for _, (one, _two) in found] == [[32.0 * (n + 1)] * 3 for n in range(BATCHES)]
    made = gpu()
    for number in range(BATCHES):
        copy, trunk, use_ = f"copy {number}", f"trunk {number}", f"words {number}"
        assert made.launched[copy][0] is made.default
        assert made.before(copy, trunk)
        assert made.before(trunk, use_)
    trunks = {made.launched[f"trunk {number}"][0] for number in range(BATCHES)}
    workers = {made.launched[f"words {number}"][0] for number in range(BATCHES)}
    assert len(trunks) == 1
    assert len(workers) == GPU_WORKERS
    assert not workers & (trunks | {made.default})
    assert all(worker.priority < 0 for worker in workers)
    # Nothing but a worker's own results holds up the trunk of the batch after the next.
    assert not made.before("words 0", "trunk 1")
    assert not made.before("trunk 1", "words 0")
    assert not made.before("copy 1", "trunk 0")
    assert clock.seconds["teacher"] == clock.seconds["assign"] == BATCHES


def test_a_second_pass_takes_the_streams_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is kept for the stream that it was first taken for: others would take as much again."""
    both, streams = threading.Barrier(GPU_WORKERS), list[Any]()

    def use(rows_B: Any, _maps: Any) -> None:
        if rows_B[0] < 6:
            both.wait(10)  # so that all workers are at it
        streams.append(torch.cuda.current_stream(GPU))

    run(monkeypatch, Network(), use)
    first, streams[:] = set(streams), []
    run(monkeypatch, Network(), use)
    assert first == set(streams)
    assert len(first) == GPU_WORKERS


def test_a_worker_waits_for_its_own_results_and_no_others() -> None:
    order = lanes.GpuLanes(GPU)

    def batch(number: int) -> None:
        gpu().launch(f"copy {number}")
        images_BCHW = torch.full((1, 1, 1, 1), float(number))
        order.run(images_BCHW, order.mark(), Network().maps, lambda maps: words(np.array([3 * number]), maps))

    threads = [threading.Thread(target=batch, args=(number,)) for number in (1, 2)]
    for thread in threads:
        thread.start()
        thread.join()
    batch(0)
    for name, waited in (("copy 0", True), ("trunk 0", True), ("words 0", True), ("words 1", False)):
        stream, seen = gpu().launched[name]
        assert (gpu().host().get(stream, 0) >= seen[stream]) == waited


def test_results_come_back_through_pinned_memory_in_one_wait() -> None:
    """A copy that does not block is read after the wait for the stream that it runs on."""
    gpu().launch("words")

    class OnGpu:
        is_cuda, device = True, GPU

        def to(self, device: str, *, non_blocking: bool) -> "OnGpu":
            assert device == "cpu"
            assert non_blocking
            gpu().launch("copy back")
            return self

        def numpy(self) -> str:
            return f"array, {gpu().host() == gpu().launched['copy back'][1]}"

    found: Any = to_host(OnGpu(), OnGpu())  # type: ignore[arg-type]
    assert found == ["array, True", "array, True"]


def test_memory_is_kept_for_the_streams_that_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[int, Stream]] = []

    class Watched(Network):
        def replica(self) -> "Network":
            return self

        def maps(self, images_BCHW: Tensor) -> dict[str, Tensor]:
            read.append((images_BCHW.data_ptr(), gpu().current()))
            return super().maps(images_BCHW)

    def use(rows_B: Any, maps: Any) -> Any:
        read.extend((map_Bchw.data_ptr(), gpu().current()) for map_Bchw in maps.values())
        return words(rows_B, maps)

    run(monkeypatch, Watched(), use)
    assert len(read) == 3 * BATCHES
    assert set(read) <= gpu().kept


@pytest.mark.parametrize("device", [torch.device("cpu"), GPU])
def test_maps_that_are_not_finite_name_their_images(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    def spoil(images_BCHW: Tensor) -> Tensor:
        spoilt = images_BCHW.clone()
        if int(images_BCHW[0, 0, 0, 0]) == 3:
            spoilt[1, 0, 2, 2] = torch.inf
            spoilt[2, 1, 0, 0] = torch.nan
        return spoilt

    with pytest.raises(DataError, match=r"layer 'one' .* for 2 images of a batch, for example image-10, image-11;"):
        run(monkeypatch, Network(spoil), words, device)


@pytest.mark.parametrize("device", [torch.device("cpu"), GPU])
def test_finite_maps_whose_sum_is_not_are_taken(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    found, _ = run(monkeypatch, Network(lambda images: torch.full_like(images, 3e38)), words, device)
    assert len(found) == BATCHES


def test_a_gpu_gives_what_a_cpu_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0))
    network = Network(lambda images: (images + 0.3) * weights)
    results = [run(monkeypatch, network, words, device)[0] for device in (torch.device("cpu"), GPU)]
    for (rows_B, ours), (same_B, oracle) in zip(*results, strict=True):
        assert np.array_equal(rows_B, same_B)
        assert all(np.array_equal(one, other) for one, other in zip(ours, oracle, strict=True))


def test_an_error_of_the_network_lets_the_other_workers_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(images_BCHW: Tensor) -> Tensor:
        if int(images_BCHW[0, 0, 0, 0]) == 2:
            raise RuntimeError("no kernel")
        return images_BCHW

    with pytest.raises(RuntimeError, match="no kernel"):
        run(monkeypatch, Network(fail), words)
    assert "trunk 1" in gpu().launched
    assert not lanes.GpuLanes(GPU)._launching.locked()
