"""Images/s of training and encoding on GPUs, predicted from published figures; nothing is run on one.

Every number that the model takes as given has its source in simulation_assumptions.py; simulation_model.py is the
model. A prediction names the part of the pipeline that binds, and the assumption that moves it most. The model is held
against published figures of whole systems, and against what tools/gpu_check.py measured.

    python tools/simulate_step.py [--gpu H100] [--measured check/results.jsonl] [--json]
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click
from simulation_assumptions import ASSUMPTIONS, OFF
from simulation_model import (
    VALUES,
    Values,
    Way,
    assign_rate,
    band,
    beside_teacher,
    decode_rate,
    encoding,
    exchanged,
    flat,
    kmeans_time,
    step,
    training,
    trunk_time,
)

GPUS = ("H100", "A100", "L4")
COUNTS = (1, 2, 4, 8, 16, 32, 64)
BATCH = 256  # of the paper, on however many GPUs
SLOW_NETWORK = 12.5e9  # bytes/s of a node: one port of 100 Gb/s
EAGER, COMPILED, HALF_HEAD = Way(fused=False), Way(fused=True), Way(fused=True, half_head=True)


class Figure(NamedTuple):
    """One figure of the design.

    Attributes:
        title: as tools/gpu_check.py calls it.
        bound: to reach on an H100.
        predict: it from assumptions for a GPU.
    """

    title: str
    bound: str
    predict: Callable[[Values, str], float]


def resident_rate(values: Values, gpu: str, way: Way = COMPILED) -> float:
    """Training images/s on data that lie on the GPU."""
    return way.batch / step(values, gpu, way).alone()


def targets_share(values: Values, gpu: str) -> float:
    """Look-up and mixing of bags over the step."""
    one = step(values, gpu, COMPILED)
    return one.targets / one.alone()


def over_resident(values: Values, gpu: str) -> float:
    """Training with the loader over the same on resident data."""
    return training(values, gpu, COMPILED).rate / resident_rate(values, gpu)


def over_decoding(values: Values, gpu: str) -> float:
    """Encoding with a bfloat16 trunk over decoding alone."""
    return encoding(values, gpu).rate / decode_rate(values, gpu)


FIGURES = (
    Figure("with the loader over resident", "≥ 0.97", over_resident),
    Figure("training images/s", "≥ 3500, then 5000", resident_rate),
    Figure("targets, share of the step", "≤ 0.005", targets_share),
    Figure("over the teacher in the loop", "≥ 1.25", lambda values, gpu: beside_teacher(values, gpu, COMPILED)),
    Figure("loader images/s", "≥ 7000", decode_rate),
    Figure("encode over decoding, bfloat16", "≥ 0.9", over_decoding),
    Figure("assign images/s", "≥ 50000", assign_rate),
    Figure("k-means s, 25 iterations", "≤ 60, then 15", kmeans_time),
)

# What else gpu_check.py measures, by section and name.
OTHERS: dict[tuple[str, str], Callable[[Values, str], float]] = {
    ("step", "eager"): partial(resident_rate, way=EAGER),
    ("step", "compiled"): resident_rate,
    ("trunk", "bfloat16"): lambda values, gpu: 1 / trunk_time(values, gpu, fused=False),
    ("machine", "bfloat16 product"): lambda values, gpu: values["product reached"] * values[f"{gpu} tensor"],
    ("machine", "float32 product"): lambda values, gpu: values["float32 reached"] * values[f"{gpu} float32"],
    ("machine", "copy on the device"): lambda values, gpu: values["copy reached"] * values[f"{gpu} memory"] / 2,
    ("machine", "copy from pinned memory"): lambda values, gpu: values[f"{gpu} host link"],
}


class Published(NamedTuple):
    """A whole system that others measured, and no input of the model.

    Attributes:
        what: was measured.
        images_s: published.
        source: of it.
        predict: the same.
    """

    what: str
    images_s: float
    source: str
    predict: Callable[[Values], float]


def _classes(gpu: str, fused: bool, batch: int = 256) -> Callable[[Values], float]:
    return lambda values: resident_rate(values, gpu, Way(fused, batch, words=0))


def _inference(gpu: str, fused: bool, batch: int) -> Callable[[Values], float]:
    return lambda values: 1 / trunk_time(values, gpu, fused, batch, last=5)


_PYTORCH = "DeepLearningExamples, PyTorch"
PUBLISHED = (
    Published("A100, PyTorch, training", 2470, _PYTORCH, _classes("A100", False)),
    Published("A100, timm, training", 2600, "timm issue 1491", _classes("A100", False, 512)),
    Published(
        "8 x A100, PyTorch, training", 16_621, _PYTORCH,
        lambda values: training(values, "A100", Way(False, words=0), 8).rate,
    ),
    Published("A100, MXNet, training, fused layers", 3410, "DeepLearningExamples, MXNet", _classes("A100", True, 512)),
    Published("A100, MLPerf 2.0, a GPU of 8", 3250, "28.7 min; epochs assumed", _classes("A100", True, 400)),
    Published("H100, MLPerf 3.0, a GPU of 8", 6900, "13.466 min; epochs assumed", _classes("H100", True, 400)),
    Published("V100, PyTorch, inference", 3382, _PYTORCH, _inference("V100", False, 256)),
    Published("A100, MXNet, inference", 8241, "DeepLearningExamples, MXNet", _inference("A100", False, 192)),
    Published("RTX PRO 6000, timm, inference", 6459, "timm results", _inference("RTX PRO 6000", False, 256)),
    Published("the same, compiled", 12_188, "timm results", _inference("RTX PRO 6000", True, 256)),
)  # fmt: skip


@click.command()
@click.option("--gpu", "gpus", multiple=True, type=click.Choice(GPUS), help="Which GPUs; default: all.")
@click.option("--measured", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A GPU check's lines.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else on stdout.")
def main(gpus: tuple[str, ...], measured: Path | None, as_json: bool) -> None:
    """Predict what a GPU does."""
    report = simulate(gpus or GPUS)
    if measured:
        report["measured"] = beside(read(measured))
    click.echo(json.dumps(report, indent=2) if as_json else text(report))


def simulate(gpus: Sequence[str]) -> dict[str, Any]:
    """All predictions, for JSON."""
    return {
        "predicted": True,
        "training": {gpu: trained(gpu) for gpu in gpus},
        "many": {gpu: many(gpu) for gpu in gpus},
        "encode": {gpu: encoded(gpu) for gpu in gpus},
        "figures": [
            {"figure": figure.title, "bound": figure.bound}
            | {gpu: band(partial(figure.predict, gpu=gpu))._asdict() for gpu in gpus}
            for figure in FIGURES
        ],
        "published": [held(published) for published in PUBLISHED],
        "assumptions": {name: given._asdict() for name, given in ASSUMPTIONS.items()},
    }


def trained(gpu: str) -> list[dict[str, Any]]:
    """One GPU, in each way: the rate with its band, and where a step's time goes."""
    rows = []
    for name, way in (("eager", EAGER), ("compiled", COMPILED), ("compiled, head in bfloat16", HALF_HEAD)):
        one = step(VALUES, gpu, way)
        parts = {part: 1e3 * getattr(one, part) for part in ("forward", "backward", "head", "optimizer", "targets")}
        rate = band(lambda values, way=way: training(values, gpu, way).rate)
        rows.append({"way": name, **flat(training(VALUES, gpu, way)), "band": rate._asdict(), "step_ms": parts})
    return rows


def many(gpu: str) -> list[dict[str, Any]]:
    """1 to 64 GPUs over the usual network, and over a slow one."""
    rows = []
    for count in COUNTS:
        one = step(VALUES, gpu, COMPILED)
        usual, slow = (training(VALUES, gpu, COMPILED, count, network) for network in (None, SLOW_NETWORK))
        shared = training(VALUES, gpu, COMPILED._replace(batch=BATCH // count), count)
        rows.append(
            {
                "gpus": count,
                **flat(usual),
                "scaling": usual.rate / count / training(VALUES, gpu, COMPILED).rate,
                "exchange_ms": 1e3 * exchanged(VALUES, gpu, count, one),
                "slow_images_s": slow.rate,
                "slow_exchange_ms": 1e3 * exchanged(VALUES, gpu, count, one, SLOW_NETWORK),
                "shared_batch": {"batch": BATCH // count, **flat(shared)},
            }
        )
    return rows


def encoded(gpu: str) -> dict[str, Any]:
    """The pass of encode with a bfloat16 trunk, and its parts alone."""
    rate = band(lambda values: encoding(values, gpu).rate)
    return {
        **flat(encoding(VALUES, gpu)),
        "band": rate._asdict(),
        "trunk_images_s": 1 / trunk_time(VALUES, gpu, fused=True),
        "trunk_eager_images_s": 1 / trunk_time(VALUES, gpu, fused=False),
        "assign_images_s": assign_rate(VALUES, gpu),
        "decode_images_s": decode_rate(VALUES, gpu),
    }


def held(published: Published) -> dict[str, Any]:
    """A published figure beside the model's."""
    predicted = published.predict(VALUES)
    error = predicted / published.images_s - 1
    return {**published._asdict(), "predict": predicted, "error": error}


def read(path: Path) -> list[dict[str, Any]]:
    """The figures of a GPU check: lines of JSON, of which one that was cut off is left out.

    Raises:
        click.ClickException: no line is a figure of a GPU.
    """
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    figures = [line for line in lines if isinstance(line, dict) and line.get("kind") == "figure"]
    found = [line for line in figures if not line.get("toy")]
    if not found:
        what = f"{len(figures)} figures of a dry run" if figures else "no figures"
        raise click.ClickException(f"{path}: {what}; run tools/gpu_check.py on a GPU first")
    return found


def beside(lines: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What was measured beside what is predicted for that GPU; what the model does not know is left out."""
    known = {(None, figure.title): figure.predict for figure in FIGURES} | OTHERS
    rows = []
    for line in lines:
        gpu = next((gpu for gpu in GPUS if gpu in str(line.get("device"))), None)
        predict = known.get((None, line["figure"])) or known.get((line["section"], line["figure"]))
        if gpu and predict:
            predicted = band(partial(predict, gpu=gpu))
            rows.append(
                {
                    "gpu": gpu, "figure": line["figure"], "measured": line["median"], "n": line["n"],
                    "over_predicted": line["median"] / predicted.value,
                    "within": predicted.low <= line["median"] <= predicted.high, **predicted._asdict(),
                }
            )  # fmt: skip
    return rows


def text(report: Mapping[str, Any]) -> str:
    """Markdown tables."""
    parts = [_training(report["training"]), _many(report["many"]), _encode(report["encode"])]
    parts += [_figures(report["figures"], tuple(report["training"])), _published(report["published"]), _assumptions()]
    if "measured" in report:
        parts.insert(0, _measured(report["measured"]))
    return "\n\n".join(parts)


def table(title: str, heads: str, rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; heads are divided by bars."""
    columns = heads.split("|")
    lines = [f"## {title}", "", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def _range(found: Mapping[str, float]) -> str:
    return f"{_number(found['value'])} ({_number(found['low'])} to {_number(found['high'])})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _training(training: Mapping[str, Any]) -> str:
    rows = []
    for gpu, ways in training.items():
        for row in ways:
            parts = [f"{row['step_ms'][part]:.1f}" for part in row["step_ms"]]
            rows.append([gpu, row["way"], _range(row["band"]), row["binds"], row["band"]["assumption"], *parts])
    heads = "GPU|way|images/s|what binds|what moves it most|forward|backward|head|SGD|targets, ms"
    return table("Training, one GPU, predicted", heads, rows)


def _many(found: Mapping[str, Any]) -> str:
    rows = [
        [
            gpu, str(row["gpus"]), _number(row["images_s"]), f"{row['scaling']:.3f}", f"{row['exchange_ms']:.1f}",
            row["binds"], _number(row["slow_images_s"]), f"{row['slow_exchange_ms']:.1f}",
            _number(row["shared_batch"]["images_s"]), row["shared_batch"]["binds"],
        ]
        for gpu, rows in found.items() for row in rows
    ]  # fmt: skip
    heads = "GPU|GPUs|images/s|of as many alone|added by gradients, ms|what binds|over 100 Gb/s a node|added, ms"
    heads += "|256 images in all|what binds"
    return table("Training compiled, 1 to 64 GPUs, 256 images each, predicted", heads, rows)


def _encode(found: Mapping[str, Any]) -> str:
    names = ("trunk_images_s", "trunk_eager_images_s", "assign_images_s", "decode_images_s")
    rows = [[gpu, _range(row["band"]), row["binds"], *(_number(row[name]) for name in names)]
            for gpu, row in found.items()]  # fmt: skip
    heads = "GPU|images/s|what binds|trunk alone|trunk, not compiled|assignment alone|decoding alone"
    return table("Encode to conv4, K = 20,000, predicted", heads, rows)


def _figures(figures: Iterable[Mapping[str, Any]], gpus: Sequence[str]) -> str:
    rows = [
        [figure["figure"], figure["bound"], *(_range(figure[gpu]) for gpu in gpus), figure[gpus[0]]["assumption"]]
        for figure in figures
    ]
    return table("The design's figures, predicted", f"figure|bound|{'|'.join(gpus)}|what moves it most", rows)


def _published(found: Iterable[Mapping[str, Any]]) -> str:
    rows = [[row["what"], _number(row["images_s"]), _number(row["predict"]), f"{100 * row['error']:+.0f} %",
             row["source"]] for row in found]  # fmt: skip
    return table("The model against published systems", "system|published|model|error|source", rows)


def _assumptions() -> str:
    rows = [[name, f"{given.value:,g}", given.unit, f"{given.confidence}, ±{100 * OFF[given.confidence]:.0f} %",
             given.source] for name, given in ASSUMPTIONS.items()]  # fmt: skip
    return table("Assumptions", "what|value|unit|confidence|source", rows)


def _measured(rows: Iterable[Mapping[str, Any]]) -> str:
    cells = [
        [row["gpu"], row["figure"], _number(row["measured"]), _range(row), f"{row['over_predicted']:.2f}",
         "yes" if row["within"] else "no", row["assumption"]] for row in rows
    ]  # fmt: skip
    heads = "GPU|figure|measured|predicted|measured over predicted|within|what moves it most"
    return table("Measured beside predicted", heads, cells)


if __name__ == "__main__":
    main()
