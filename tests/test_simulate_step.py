import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from gpu_plan import SECTIONS
from gpu_results import BOUNDS
from simulate_step import FIGURES, GPUS, OTHERS, PUBLISHED, beside, main, simulate
from simulation_assumptions import ASSUMPTIONS, OFF
from simulation_model import (
    FEATURES,
    VALUES,
    WORDS,
    Step,
    Way,
    assign_rate,
    band,
    buckets,
    decode_rate,
    encoding,
    exchanged,
    head_flops,
    kmeans_time,
    layers,
    ring_time,
    step,
    training,
    trunk_parameters,
    trunk_time,
)

COMPILED = Way(fused=True)
A_STEP = Step(1.0, 2.0, 0.5, 0.1, 0.0, ((0.5, 800), (1.0, 60), (1.5, 60), (2.5, 40)))


def test_the_trunk_is_resnet50() -> None:
    convolutions = [layer for layer in layers() if layer.kind == "convolution"]
    assert len(convolutions) == 53
    assert sum(layer.flops for layer in convolutions) / 2 == pytest.approx(
        4.087e9, rel=1e-3
    )  # its paper: 3.8 + shortcuts
    assert trunk_parameters() == 25_557_032 - 2048 * 1000 - 1000
    first = convolutions[0]
    assert (first.flops, first.read, first.written) == (2 * 7 * 7 * 3 * 64 * 112 * 112, 3 * 224 * 224, 64 * 112 * 112)
    assert sum(layer.kind == "add" for layer in layers()) == 16
    assert sum(layer.kind == "relu" for layer in layers()) == 49
    assert {layer.stage for layer in layers()} == {1, 2, 3, 4, 5}


def test_the_words_head_has_its_size() -> None:
    assert head_flops(256, WORDS) == 62_914_560_000
    (_, head), *trunk = step(VALUES, "H100", COMPILED).gradients
    assert head == 4 * WORDS * FEATURES == 163_840_000
    assert sum(count for _, count in trunk) == 94_032_128


def test_a_ring_by_hand() -> None:
    given = {**VALUES, "H100 node link": 100.0, "H100 network": 50.0, "network reached": 0.8, "hop": 10.0}
    assert ring_time(given, "H100", 1, 1e9) == 0
    # Two GPUs: half of it goes there, half comes back.
    assert ring_time(given, "H100", 2, 1e9) == pytest.approx(1e9 / 100e9 + 2 * 10e-6)
    assert ring_time(given, "H100", 8, 1e9) == pytest.approx(2 * 7 / 8 * 0.01 + 14 * 10e-6)
    # Beyond a node the network binds, at 0.8 of 50 GB/s; a network that is named replaces it.
    assert ring_time(given, "H100", 16, 1e9) == pytest.approx(2 * 15 / 16 * 0.025 + 30 * 10e-6)
    assert ring_time(given, "H100", 16, 1e9, 10e9) == pytest.approx(2 * 15 / 16 * 0.125 + 30 * 10e-6)


def test_gradients_are_packed_as_they_come() -> None:
    assert list(buckets(A_STEP.gradients, 100)) == [(0.5, 800), (1.5, 120), (2.5, 40)]
    assert list(buckets(A_STEP.gradients, 1e9)) == [(2.5, 960)]


def test_what_backward_does_not_hide_is_added() -> None:
    given = {**VALUES, "bucket": 100e-6, "H100 node link": 1e-6, "hop": 0.0, "slowed by reducing": 0.0}  # 1000 bytes/s
    # 8 GPUs send 7/4 of the bytes: the head's 800 take 1.4 s from 0.5 on, 120 bytes 0.21 s, the last 40 come at 2.5.
    assert exchanged(given, "H100", 8, A_STEP) == pytest.approx(0.07)
    slower = {**given, "H100 node link": 0.5e-6}  # the head until 3.3, then 0.42 and 0.14 more; backward ends at 2.5
    assert exchanged(slower, "H100", 8, A_STEP) == pytest.approx(3.3 + 0.56 - 2.5)
    # What is hidden slows what hides it, but for no longer than that takes.
    assert exchanged({**slower, "slowed by reducing": 0.1}, "H100", 8, A_STEP) == pytest.approx(1.36 + 0.1 * 2.5)
    assert exchanged(given, "H100", 1, A_STEP) == 0
    assert exchanged(given, "H100", 8, replace(A_STEP, gradients=((2.5, 0),))) == 0


def test_searching_and_kmeans_by_hand() -> None:
    given = {**VALUES, "H100 tensor": 1000.0, "product reached": 0.8, "assignment reached": 0.5}
    rate = 400e12 / (2 * 196 * 20_000 * 1024)
    assert assign_rate(given, "H100") == pytest.approx(rate)
    traffic = 4 * 5_120_000 * 1024
    expected = 25 * (5_120_000 / 196 / rate + traffic / (0.8 * 3350e9)) + traffic / 55e9
    assert kmeans_time(given, "H100") == pytest.approx(expected)


@pytest.mark.parametrize("gpu", GPUS)
def test_more_of_anything_is_never_slower(gpu: str) -> None:
    def rates(given: dict[str, float]) -> tuple[float, ...]:
        ways = (COMPILED, Way(fused=False), Way(fused=True, batch=32, half_head=True))
        return (
            *(training(given, gpu, way, 16).rate for way in ways),
            encoding(given, gpu).rate,
            decode_rate(given, gpu),
        )

    before = rates(dict(VALUES))
    resources = ("tensor", "float32", "memory", "node link", "network", "host link", "JPEG engines")
    for name in [f"{gpu} {what}" for what in resources] + ["cores", "thread", "engine", "assignment reached"]:
        after = rates({**VALUES, name: 2 * VALUES[name]})
        assert all(new >= old for new, old in zip(after, before, strict=True)), name
    for name in ("JPEG", "feeding", "launching, one by one", "norm backward", "SGD, fused", "DALI's kernels", "hop"):
        after = rates({**VALUES, name: 2 * VALUES[name]})
        assert all(new <= old for new, old in zip(after, before, strict=True)), name


def test_more_gpus_and_less_work() -> None:
    rates = [training(VALUES, "H100", COMPILED, count).rate for count in (1, 2, 4, 8, 16, 32, 64)]
    assert rates == sorted(rates)
    assert rates[-1] < 64 * rates[0]
    assert training(VALUES, "H100", COMPILED).rate > training(VALUES, "H100", Way(fused=False)).rate
    assert trunk_time(VALUES, "H100", True, last=4) < trunk_time(VALUES, "H100", True, last=5)
    assert step(VALUES, "H100", Way(True, half_head=True)).head < step(VALUES, "H100", COMPILED).head


@pytest.mark.parametrize(
    ("change", "binds"),
    [
        ({}, "GPU"),
        ({"H100 JPEG engines": 0.0, "cores": 2.0}, "decoding"),
        ({"feeding": 500.0}, "feeding"),
        ({"H100 host link": 1e-4}, "copy"),
        ({"launching, compiled": 1000.0}, "launching"),
    ],
)
def test_the_slowest_part_is_named(change: dict[str, float], binds: str) -> None:
    found = training({**VALUES, **change}, "H100", COMPILED)
    assert found.binds == binds
    assert found.rate == pytest.approx(1 / found.parts[binds])


def test_a_band_adds_the_squares_of_what_is_unsure() -> None:
    def figure(given: Any) -> float:
        return float(given["cores"] * given["engine"])

    found = band(figure)
    assert found.value == 16_000
    assert found.low == pytest.approx(16_000 * (1 - math.hypot(OFF["high"], OFF["medium"])))
    assert found.high == pytest.approx(16_000 * (1 + math.hypot(OFF["high"], OFF["medium"])))
    assert (found.assumption, found.moves) == ("engine", pytest.approx(OFF["medium"]))


def test_published_systems_are_met_and_the_misses_are_known() -> None:
    errors = {published.what: published.predict(VALUES) / published.images_s - 1 for published in PUBLISHED}
    # Eight A100 under PyTorch scaled by 6.7 where float32 scaled by 7.7: something beside the GPU bound them.
    known = {"8 x A100, PyTorch, training", "RTX PRO 6000, timm, inference"}
    assert {what for what, error in errors.items() if abs(error) > 0.15} == known
    fitted = 256 / step(VALUES, "V100", Way(fused=False, words=0)).alone()
    assert fitted == pytest.approx(1178, rel=0.005)


def test_every_assumption_has_a_source() -> None:
    for name, given in ASSUMPTIONS.items():
        assert given.value > 0, name
        assert given.unit, name
        assert len(given.source) > 5, name


def line(**changes: Any) -> dict[str, Any]:
    kind = {"kind": "figure", "section": "step", "figure": "training images/s", "toy": False}
    return {**kind, "median": 5000.0, "n": 5, "device": "NVIDIA H100 80GB HBM3, 16 cores", **changes}


def test_measurements_are_told_beside_predictions() -> None:
    lines = [
        line(),
        line(section="machine", figure="bfloat16 product", median=798.0),
        line(figure="unheard of"),
        line(device="NVIDIA H20, 16 cores"),
    ]
    first, second = beside(lines)
    predicted = band(lambda given: FIGURES[1].predict(given, "H100"))
    assert first["over_predicted"] == pytest.approx(5000 / predicted.value)
    assert first["within"] == (predicted.low <= 5000 <= predicted.high)
    assert second["over_predicted"] == pytest.approx(798 / (0.81 * 989))
    assert second["within"]


def test_a_file_of_measurements(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    results.write_text(json.dumps(line()) + '\n{"kind": "fig')
    done = CliRunner().invoke(main, ["--gpu", "H100", "--json", "--measured", str(results)])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["predicted"] is True
    assert [row["measured"] for row in report["measured"]] == [5000.0]
    results.write_text(json.dumps(line(toy=True)))
    done = CliRunner().invoke(main, ["--measured", str(results)])
    assert done.exit_code == 1
    assert f"{results}: 1 figures of a dry run; run tools/gpu_check.py on a GPU first" in done.output


def test_the_page_shows_what_is_computed() -> None:
    page = (Path(__file__).parents[1] / "docs/results/simulated-step.md").read_text(encoding="utf-8")
    done = CliRunner().invoke(main, [])
    assert done.exit_code == 0, done.output
    tables = [part for part in done.output.strip().split("\n\n") if part.startswith("|")]
    assert len(tables) == 6
    assert [table for table in tables if table not in page] == []


def test_figures_have_the_names_of_the_gpu_check() -> None:
    assert {figure.title for figure in FIGURES} <= set(BOUNDS)
    assert {section for section, _ in OTHERS} <= {section.name for section in SECTIONS}


def test_all_gpus_and_figures_are_told() -> None:
    report = simulate(("L4",))
    assert [row["figure"] for row in report["figures"]] == [figure.title for figure in FIGURES]
    assert all(row["L4"]["low"] <= row["L4"]["value"] <= row["L4"]["high"] for row in report["figures"])
    assert [row["gpus"] for row in report["many"]["L4"]] == [1, 2, 4, 8, 16, 32, 64]
    assert all(predict(VALUES, "L4") > 0 for predict in OTHERS.values())
