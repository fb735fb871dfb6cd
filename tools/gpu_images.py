"""The sections of a GPU check that decode images.

Each is a function of a `Check`, whose name is the section's (gpu_plan.py says what it proves).
"""

import io
import json
import statistics
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_photographs import made_up_jpeg, photographs
from gpu_process import Check
from PIL import Image

from bowstore import gpu
from bowstore.config import ViewConfig, validate
from bowstore.data.config import HW_LOAD
from bowstore.data.pipeline import clean_batches, train_batches
from bowstore.data.plan import Schedule, plans
from bowstore.data.reader import ShardReader
from bowstore.data.views import clean_view
from bowstore.environment import cores
from bowstore.runs import read_metrics, result_paths
from bowstore.train.config import TrainConfig
from bowstore.train.tasks.settings import WordsSettings

# What makes the configurations for two cores a job for a GPU: the network and the images of ImageNet, whole passes.
_RESNET50 = ("model.arch=resnet50", "view.size=224", "view.resize=256", "optim.steps_per_epoch=null")
_AT_224 = {
    "imagenette_rotnet_small": (*_RESNET50, "view.area=[0.2,1.0]", "optim.batch=64", "optim.lr=0.05"),
    "imagenette_bownet_small": (*_RESNET50, "view.area=[0.08,1.0]", "optim.batch=128"),
}
_LEVELS = 255 * torch.tensor(ViewConfig().std)[:, None, None]  # of grey, in a normalised pixel's unit


def decode(check: Check) -> None:
    """Whole JPEGs with chroma of half the resolution, by the GPU's decoder and its CUDA cores, against Pillow."""
    from nvidia.dali import Pipeline, fn, types

    gpu_there = check.device.type == "cuda"
    note = gpu.decoder_note() if gpu_there else None
    check.claim("the GPU's JPEG decoder", None, note or "its library is there" if gpu_there else "of a CPU: none")
    encoded = [made_up_jpeg(number, *check.size((375, 500), (375, 500), (61, 83))) for number in range(8)]
    expected = [np.asarray(Image.open(io.BytesIO(data)), np.int16) for data in encoded]
    for load in (0.0, 1.0) if gpu_there else (0.0,):
        for fancy in (True, False):
            pipe = Pipeline(batch_size=len(encoded), num_threads=2, device_id=0 if gpu_there else None, seed=0)
            with pipe:
                source = fn.external_source(
                    lambda: [np.frombuffer(data, np.uint8) for data in encoded], dtype=types.UINT8, ndim=1
                )
                images = fn.decoders.image(
                    source, device="mixed" if gpu_there else "cpu", output_type=types.RGB,
                    jpeg_fancy_upsampling=fancy, hw_decoder_load=load,
                )  # fmt: skip
                pipe.set_outputs(images)
            (output,) = pipe.run()
            found = output.as_cpu() if gpu_there else output
            off = [np.abs(np.asarray(found[i], np.int16) - expected[i]) for i in range(len(encoded))]
            name = f"{'fancy' if fancy else 'plain'} chroma, {'decoder' if load else 'cores'}"
            check.figure(name, *(float(each.mean()) for each in off), unit="levels", note="mean difference from Pillow")


def slice(check: Check) -> None:
    """The trial by which bowstore itself finds out how a GPU may decode windows; a crash of it is an answer."""
    from bowstore.data.gpu_decode import asked, gpu_decoding

    there = check.device.type == "cuda"
    ended = asked([sys.executable, "-m", "bowstore.data.gpu_probe", "0" if there else "cpu"], check.size(60, 60, 60))
    answers = ended.answers
    for name, what in (
        ("cores", "whole images by cores, from Pillow's"),
        ("image", "whole images, from Pillow's"),
        ("slice", "windows alone, from the whole"),
    ):
        if answers.get(name) is not None:
            check.figure(what, answers[name], unit="levels", note="largest mean difference of an image")
        else:
            check.claim(what, None, f"the trial {ended.how or 'says nothing'}")
    check.claim("images are decoded", answers.get("image") is not None, ended.how)
    check.claim("hardware decoders", None, f"{answers.get('engines', 0)} {answers.get('lack', '')}".strip())
    if there:
        check.claim("what bowstore takes", None, str(gpu_decoding(check.device)))


def graph(check: Check) -> None:
    """Train and clean view against the CPU's; and batches that are kept while others are made, compared again."""
    index, view = photographs(check), ViewConfig(**check.size({}, {}, {"size": 32, "resize": 40}), cutmix=True)
    batch, count = check.size((64, 6), (64, 6), (4, 6))
    schedule = Schedule(len(index), batch, 0)

    def batches(device: torch.device) -> Any:
        steps = plans(schedule, index, view, start=0, stop=count)
        return train_batches(ShardReader(index), view, steps, batch=batch, device=device)

    kept, copies = [], []
    for made in batches(check.device):
        kept.append(made.images_BCHW)
        copies.append(made.images_BCHW.clone())
        torch.randn(256, 256, device=check.device) @ torch.randn(256, 256, device=check.device)
    intact = sum(torch.equal(one, other) for one, other in zip(kept, copies, strict=True))
    check.claim("batches that are held stay", intact == count, f"{intact} of {count} were as they came")
    found = list(_read_late(batches(check.device), check))
    late = sum(float(sum_) == float(copy.sum(dtype=torch.float64)) for sum_, copy in zip(found, copies, strict=True))
    check.claim("batches that are let go of are read to the end", late == count, f"{late} of {count}")
    differences = [
        float((ours.float().cpu() - oracle.images_BCHW.float()).mul(_LEVELS).abs().mean())
        for ours, oracle in zip(copies, batches(torch.device("cpu")), strict=True)
    ]
    check.figure("train view, from the CPU's", *differences, unit="levels")
    check.claim("train view as on the CPU", max(differences) < 3, f"{max(differences):.2f} levels, bound 3")
    rows = np.arange(min(len(index), 2 * batch))
    ours, oracle = (
        list(clean_batches(ShardReader(index), clean_view(view), rows, batch=batch, device=device))
        for device in (check.device, torch.device("cpu"))
    )
    differences = [
        float((a.cpu() - b.cpu()).mul(_LEVELS).abs().mean()) for (_, a), (_, b) in zip(ours, oracle, strict=True)
    ]
    check.figure("clean view, from the CPU's", *differences, unit="levels")
    check.claim("clean view as on the CPU", max(differences) < 2, f"{max(differences):.2f} levels, bound 2")


def _read_late(batches: Any, check: Check) -> Iterator[torch.Tensor]:
    """Sums of batches that a device reads behind other work, long after the host has let go of them."""
    side, times = check.size((4096, 100), (4096, 100), (8, 1))
    work = torch.zeros(side, side, device=check.device)
    for made in batches:
        for _ in range(times):
            work = work @ work
        yield made.images_BCHW.sum(dtype=torch.float64)
        del made


def loader(check: Check) -> None:
    """`bowstore bench loader`, over shares of the GPU's decoder and, where both work, ways to decode windows."""
    from bowstore.benchmarks.config import LoaderBench
    from bowstore.benchmarks.loader import bench_loader
    from bowstore.data.gpu_decode import gpu_decoding

    view = ViewConfig(**check.size({}, {}, {"size": 32, "resize": 40}), cutmix=True)
    loads, ways = (), ()
    if check.device.type == "cuda":
        both = gpu_decoding(check.device).way == "slice"
        loads, ways = ((0.0, 0.65, 1.0), ("slice", "image")) if both else ((0.0, 0.4, 0.65, 0.8, 1.0), ())
    config = LoaderBench(
        batch=check.size(256, 256, 8), threads=cores(), device=check.device.type, batches=check.size(12, 6, 2),
        rounds=check.size(3, 2, 1), hw_loads=loads, ways=ways,
    )  # fmt: skip
    result = bench_loader(photographs(check).root, config, view)
    check.bench(result)
    whole = [timing for timing in result.timings if timing.name.startswith("loader")]
    best = max(whole, key=lambda timing: timing.median)
    check.figure("loader images/s", *best.rates, unit="images/s", note=best.name)
    check.claim("what binds", None, result.binds or "")


def train(check: Check) -> None:
    """`bowstore bench train` at the paper's size, over shares of the GPU's decoder."""
    from gpu_made_up import LAYER, made_up_store

    from bowstore.benchmarks.train import bench_training

    index, found = photographs(check), {}
    with tempfile.TemporaryDirectory(dir=check.scratch) as folder:
        store = made_up_store(
            Path(folder) / "words.zarr", index, num_words=check.size(20_000, 20_000, 30), grid=check.size(14, 14, 4)
        )
        for load in check.size((HW_LOAD, 1.0), (HW_LOAD,), (HW_LOAD,)):
            values = {
                "name": "check",
                "task": WordsSettings(store=store, layer=LAYER),
                "shards": str(index.root),
                "view": {**check.size({}, {}, {"size": 32, "resize": 40}), "cutmix": True},
                "model": {"arch": check.size("resnet50", "resnet50", "wrn-10-1")},
                "optim": {"batch": check.size(256, 256, 8), "epochs": 1, "milestones": [], "warmup_epochs": 0},
                "runtime": {"device": check.device.type, "hw_decoder_load": load},
            }
            config = validate(TrainConfig, values, "check")
            result = bench_training(config, steps=check.size(40, 25, 5), rounds=check.size(5, 3, 2))
            assert result is not None, "this is the only rank"
            check.bench(result, f"hw load {load:g}, ")
            loaded, resident = (timing.rates for timing in result.timings)
            check.figure(f"host in the loader, hw load {load:g}", result.figures["share_asking"])
            found[f"hw load {load:g}"] = [ours / theirs for ours, theirs in zip(loaded, resident, strict=True)]
    best = max(found, key=lambda name: statistics.median(found[name]))
    check.figure("with the loader over resident", *found[best], note=best)


def encode(check: Check) -> None:
    """`bowstore bench encode` in both precisions: over the slower of view and trunk, and over the view."""
    from bowstore.benchmarks.config import EncodeBench
    from bowstore.benchmarks.encode import bench_encode

    index = photographs(check)
    for precision in ("float32", "bfloat16"):
        paper = {"teacher": "torchvision:resnet50", "layers": ["conv4"], "num_words": [20_000]}
        toy = {"teacher": "wrn-10-1", "layers": ["block3"], "num_words": [20], "size": 32, "resize": 40, "batch": 4}
        values = {
            **(toy if check.toy else paper),
            "precision": precision,
            "compile": True if precision == "bfloat16" and not check.toy else "auto",
            "images": check.size(40_000, 20_000, 12),
            "rounds": check.size(3, 2, 1),
            "device": check.device.type,
        }
        config = validate(EncodeBench, values, "check")
        result = bench_encode(index.root, config)
        check.bench(result, f"{precision}, ")
        rates = {timing.name: timing.rates for timing in result.timings}
        for other, name in (("clean view alone", "decoding"), ("teacher alone", "the trunk")):
            ratios = [whole / part for whole, part in zip(rates["encode"], rates[other], strict=True)]
            check.figure(f"encode over {name}, {precision}", *ratios)


def imagenette(check: Check) -> None:
    """A RotNet, its words, a BoWNet, and linear probes of both, with the commands of the guide."""
    from bowstore.data.synthetic import write_images
    from bowstore.environment import library_versions

    teacher, student, epochs, k = check.size(
        ("imagenette_rotnet_small", "imagenette_bownet_small", (12, 40), 2048),
        ("imagenette_rotnet_small", "imagenette_bownet_small", (4, 12), 2048),
        ("demo_rotnet", "demo_bownet", (1, 1), 16),
    )
    larger = check.size(_AT_224, _AT_224, {teacher: (), student: ()})
    print(library_versions())
    source = check.data and check.data.resolve()
    with tempfile.TemporaryDirectory(dir=check.scratch) as name, chdir(name):
        if check.toy:
            source = Path("images")
            write_images(source, train=64, val=20, size=32, workers=1)
        assert source is not None, "skipped without"
        if source.is_file():
            with tarfile.open(source) as tar:
                for member in tar:
                    tar.extract(member, "images", filter="data")
            source = Path("images")
        _command("shards", str(source), "data/shards")
        for config, length in ((teacher, epochs[0]), (student, epochs[1])):
            steps = [max(1, round(share * length)) for share in (0.6, 0.87)]
            _command(
                "train", "--config", f"{config}.yaml", "--set", f"optim.epochs={length}", "--set",
                f"optim.milestones={sorted(set(steps)) if length > 2 else []}", "--set", "optim.warmup_epochs=0",
                *(part for override in larger[config] for part in ("--set", override)),
            )  # fmt: skip
            _learned(check, Path("runs") / config)
            if config == teacher:
                layer = "conv4" if not check.toy else "block3"
                _command("encode", "--layer", layer, "--K", str(k))
        for config in (teacher, student):
            _command("eval", "linear", "--run", f"runs/{config}")
            for file in result_paths(Path("runs") / config):
                value = json.loads(file.read_text())
                check.claim(f"linear probe, {config}", None, json.dumps(value.get("metrics"))[:150])


def _learned(check: Check, run: Path) -> None:
    """The first and the last logged loss of a run, which has to have fallen, but in a dry run."""
    lines = read_metrics(run)
    first, last = lines[0]["loss"], lines[-1]["loss"]
    check.claim(f"{run.name} learns", None if check.toy else last < first, f"loss {first:.4g}, then {last:.4g}")
    if rate := lines[-1].get("images_per_second"):
        check.figure(f"{run.name}", rate, unit="images/s")


def _command(*arguments: str) -> None:
    """One command of bowstore, in this process."""
    from bowstore.cli import main

    print("bowstore", *arguments, flush=True)
    main(list(arguments), standalone_mode=False)
