"""`bowstore demo`: the four commands in a row, on rendered images, with a comparison at the end.

The stages are the product's own; the folder that is left behind is an ordinary workspace, and an interrupted demo
goes on where it stopped.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bowstore.config import Workspace, bundled_configs
from bowstore.evaluate.protocol import Result, comparison_table
from bowstore.evaluate.run import evaluate_run_linear
from bowstore.files import write_json
from bowstore.progress import format_seconds, say, timed
from bowstore.words.config import EncodeConfig

LAYER, WORDS = "block3", 256
_TRAIN_IMAGES, _VAL_IMAGES, _SIZE = 10_000, 2_500, 32


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured.

    Attributes:
        rows: evaluations of the random network, RotNet and BoWNet, one for each protocol.
        seconds: wall-clock seconds by stage.
        peak_memory_bytes: of the largest process.
        out: folder of the workspace.
    """

    rows: dict[str, list[Result]]
    seconds: dict[str, float]
    peak_memory_bytes: int
    out: Path

    def as_dict(self) -> dict[str, Any]:
        """Plain values for --json."""
        return {
            "top1": {
                name: {f"{result.protocol} v{result.protocol_version}": result.metrics["top1"] for result in results}
                for name, results in self.rows.items()
            },
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
            "out": str(self.out),
        }

    def text(self) -> str:
        """The table."""
        stages = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in self.seconds.items())
        return (
            f"\nLinear probe on frozen features, {_TRAIN_IMAGES} train and {_VAL_IMAGES} test images of 10 classes, "
            f"top-1 accuracy in %\n\n{comparison_table(self.rows)}\n\n"
            f"{format_seconds(sum(self.seconds.values()))} in all ({stages}), "
            f"peak memory {self.peak_memory_bytes / 1e9:.1f} GB; everything lies in {self.out}/"
        )


def run_demo(out: Path, *, seed: int = 0) -> DemoResult:
    """Render, shard, train RotNet, encode, train BoWNet, evaluate; all below `out/seed-N`.

    Args:
        out: folder of the demo.
        seed: of the images' order, the networks, and k-means.
    """
    import resource

    from bowstore.data.shards import make_shards
    from bowstore.data.synthetic import write_images
    from bowstore.train.loop import train
    from bowstore.words.encode import encode
    from bowstore.workspace import resolve_train

    folder = out / f"seed-{seed}"
    workspace = Workspace(
        shards=out / "shards/train", val_shards=out / "shards/val", store=folder / "words.zarr", runs=folder / "runs"
    )
    seconds: dict[str, float] = {}
    with timed(seconds, "images"):
        write_images(out / "images", train=_TRAIN_IMAGES, val=_VAL_IMAGES, size=_SIZE, seed=0)
    with timed(seconds, "shards"):
        for report in make_shards(out / "images", out / "shards", per_shard=2048):
            say(report.summary())
    with timed(seconds, "RotNet"):
        teacher = resolve_train(workspace, bundled_configs() / "demo_rotnet.yaml", flags={"seed": seed})
        say(train(teacher, workspace.runs).text())
    with timed(seconds, "words"):
        words = EncodeConfig(teacher=workspace.runs / teacher.name, layers=(LAYER,), num_words=(WORDS,), seed=seed)
        encoded = encode(words, shards=workspace.shards, store=workspace.store)
        say(encoded.text())
    with timed(seconds, "BoWNet"):
        student = resolve_train(workspace, bundled_configs() / str(teacher.student), flags={"seed": seed})
        say(train(student, workspace.runs).text())
    rows = {}
    with timed(seconds, "linear"):
        for name, run, random_init in (
            ("random network", student.name, True),
            ("RotNet", teacher.name, False),
            ("BoWNet", student.name, False),
        ):
            rows[name] = [_probe(workspace, run, random_init, standardise) for standardise in (False, True)]
    usage = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    result = DemoResult(rows, seconds, 1024 * max(usage), out)
    write_json(folder / "demo.json", result.as_dict())
    return result


def _probe(workspace: Workspace, run: str, random_init: bool, standardise: bool) -> Result:
    assert workspace.val_shards is not None, "the demo's workspace names its test shards"
    return evaluate_run_linear(
        workspace.runs / run,
        train=workspace.shards,
        test=workspace.val_shards,
        random_init=random_init,
        standardise=standardise,
    ).result
