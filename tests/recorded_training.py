"""Training that writes down what each step was given, in this process or in ranks of its own."""

import json
import os
import socket
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import xxhash
from coloured_keys import misaligned
from served import SERVER

from bowstore.train import loop
from bowstore.train.config import TrainConfig

Record = list[dict[str, Any]]
OnStep = Callable[[int], None]


def digest(tensor: torch.Tensor) -> str:
    return xxhash.xxh3_64_hexdigest(tensor.contiguous().numpy().tobytes())


def recorded_train(config: TrainConfig, runs: Path, record: Path, on_step: OnStep = lambda step: None) -> None:
    """Train; append a line a step with the keys and the digest of each sample's pixels and bag, and what is misaligned.

    Args:
        config: a words run on coloured keys.
        runs: folder of run directories.
        record: file of this rank's lines; lines survive the death of the process.
        on_step: called with the step's number before it is recorded and trained.
    """
    torch.set_num_threads(1)
    original_plans, original_step = loop.plans, loop.train_step
    state: dict[str, Any] = {}

    def plans(schedule: Any, index: Any, view: Any, *, start: int, stop: int) -> Any:
        state.update(index=index, step=start)
        return original_plans(schedule, index, view, start=start, stop=stop)

    def step(model: Any, optimizer: Any, task: Any, batch: Any, rate: float, *, logged: bool) -> Any:
        number, state["step"] = state["step"], state["step"] + 1
        on_step(number)
        images, bag = task.prepare(batch)
        line = {
            "step": number,
            "keys": [state["index"].key(row) for row in batch.plan.rows.tolist()],
            "images": [digest(image) for image in images],
            "words": [digest(words) for words in bag.words_BM],
            "weights": [digest(weights) for weights in bag.weights_BM],
            "misaligned": misaligned(images, bag, config.view),
        }
        with open(record, "a") as file:
            file.write(json.dumps(line) + "\n")
        return original_step(model, optimizer, task, batch, rate, logged=logged)

    with patch.object(loop, "plans", plans), patch.object(loop, "train_step", step):
        loop.train(config, runs)


def read_record(path: Path) -> Record:
    """The lines of one rank, in the order in which they were written."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def whole_batches(paths: Sequence[Path]) -> Record:
    """The lines of all ranks of a sitting (in order of rank) as global batches."""
    ranks = [read_record(path) for path in paths]
    joined = []
    for lines in zip(*ranks, strict=False):  # a rank that was killed may be a step behind
        assert len({line["step"] for line in lines}) == 1
        names = lines[0].keys() - {"step"}
        joined.append({"step": lines[0]["step"], **{name: [x for line in lines for x in line[name]] for name in names}})
    return joined


def start_ranks(
    target: Callable[..., None], world: int, arguments: Iterable[Any], *, sittings: int = 1
) -> list[BaseProcess]:
    """Start `target(rank, *arguments)` in `world` processes that `bowstore.train.distributed.joined` joins by gloo.

    A process that trains several times calls `next_sitting` before each further time.
    """
    ports = [free_port() for _ in range(sittings)]
    processes = [SERVER.Process(target=_rank, args=(target, rank, world, ports, *arguments)) for rank in range(world)]
    for process in processes:
        process.start()
    return processes


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def exit_codes(processes: Iterable[BaseProcess], timeout_s: float = 120) -> list[int | None]:
    """Wait for processes to end; those that do not are killed, and their code is None."""
    codes = []
    for process in processes:
        process.join(timeout_s)
        codes.append(process.exitcode)
        if process.exitcode is None:
            process.kill()
    return codes


def next_sitting() -> None:
    """Take the next of the ports that were set aside for this process's groups."""
    ports = os.environ["TEST_PORTS"].split(",")
    os.environ.update(MASTER_PORT=ports[0], TEST_PORTS=",".join(ports[1:]))


def _rank(target: Callable[..., None], rank: int, world: int, ports: list[int], *arguments: Any) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", TEST_PORTS=",".join(map(str, ports)),
    )  # fmt: skip
    next_sitting()
    target(rank, *arguments)
