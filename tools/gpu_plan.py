"""What a GPU check consists of, in the order of value, and what of it the time allows."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

Scale = Literal["full", "short", "toy"]


class Section(NamedTuple):
    """One part of a check, which runs in a process of its own.

    Attributes:
        name: as on the command line; the function of that name in `room` is what runs.
        proves: in a line.
        full: seconds that it takes on an H100 that has compiled nothing before, its start included.
        short: the same with fewer rounds.
        needs: modules without which it is skipped.
        room: the module that holds its function.
        on_data: whether it takes the images of --data, and is skipped without.
    """

    name: str
    proves: str
    full: float
    short: float
    needs: tuple[str, ...] = ()
    room: str = "gpu_sections"
    on_data: bool = False


class Planned(NamedTuple):
    """What a section gets; None for nothing."""

    section: Section
    scale: Scale | None


_CONFIG = ("pydantic",)
_STORE = ("pydantic", "zarr")
_DALI = ("nvidia.dali", "pydantic")
_LOADER = (*_DALI, "webdataset")  # which writes the shards
_TRAIN = (*_LOADER, "zarr")

# What was proven of DALI comes last: it has crashed processes, and much can be known without it.
SECTIONS = (
    Section("machine", "driver, memory, video library; copies, matrix products", 10, 10),
    Section("kernels", "the kernels of the search compile, each in a process of its own", 25, 25, ("triton",)),
    Section("words", "words are the nearest, over shapes, ties and far vectors", 15, 15),
    Section("assign", "images/s of assignment against cuBLAS", 20, 15),
    Section("kmeans", "an iteration at full size, equality in small", 25, 15, _CONFIG),
    Section("step", "training steps on resident data: eager, compiled, tuned", 160, 130, _STORE),
    Section("trunk", "the teacher's trunk in every precision and layout", 90, 80, _CONFIG),
    Section("head", "head, bag and optimiser alone; the loss against the dense form", 10, 10, _CONFIG),
    Section("targets", "look-up and mixing of bags, as a share of the step", 30, 20, _STORE),
    Section("teacher", "training with the teacher in the loop, against words from a store", 75, 65, _STORE),
    Section("faiss", "FAISS beside torch, on the GPU where it is built for one", 15, 15, ("faiss",)),
    Section("decode", "JPEGs decoded on the GPU, against Pillow", 20, 20, _DALI, "gpu_images"),
    Section("slice", "whether decoding of a window crashes", 25, 25, _DALI, "gpu_images"),
    Section("graph", "the whole graph against the CPU's; outputs that are held stay", 50, 45, _LOADER, "gpu_images"),
    Section("loader", "images/s of the loader alone, over shares of the decoder", 45, 30, _LOADER, "gpu_images"),
    Section("train", "training with the loader over the same step on resident data", 110, 55, _TRAIN,
            "gpu_images"),
    Section("encode", "encode over decoding, float32 and bfloat16", 150, 100, _TRAIN, "gpu_images"),
    Section("imagenette", "a RotNet, its words and a BoWNet, in short", 420, 200, _TRAIN, "gpu_images", on_data=True),
)  # fmt: skip


def plan(sections: Sequence[Section], seconds: float | None) -> list[Planned]:
    """What of the sections, the most valuable first, can be done in the time; None for all of it.

    From the least valuable on, sections are shortened until all fit; where that is not enough, dropped, the least
    valuable first. What is over then goes to whatever it is enough for, the most valuable first.
    """
    if seconds is None:
        return [Planned(section, "full") for section in sections]
    costs = [section.full for section in sections]
    for place in reversed(range(len(sections))):
        if sum(costs) > seconds:
            costs[place] = sections[place].short
    for place in reversed(range(len(sections))):
        if sum(costs) > seconds:
            costs[place] = 0.0
    for place, section in enumerate(sections):
        room = seconds - sum(costs) + costs[place]
        costs[place] = next((cost for cost in (section.full, section.short) if cost <= room), costs[place])
    return [
        Planned(section, None if not cost else "full" if cost >= section.full else "short")
        for section, cost in zip(sections, costs, strict=True)
    ]


def limit_seconds(section: Section, scale: Scale) -> float:
    """Time after which a section counts as hung; a toy has the whole limit of its short form."""
    return 30 + 3 * (section.full if scale == "full" else section.short)
