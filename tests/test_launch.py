"""Launch templates: what torchrun is told on each node, with the schedulers' variables as they are documented."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_docs import parsed
from torch.distributed.run import get_args_parser

LAUNCH = Path(__file__).parents[1] / "tools" / "launch"
# Of sbatch; those that say how often tasks, nodes or cores are to be had belong together.
SBATCH = {
    "job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "mem", "time", "requeue", "open-mode",
    "output",
}  # fmt: skip
# Fields of trainer.kubeflow.org/v1alpha1 (Trainer 2.2) and of SkyPilot's task (0.14).
TRAINER = {"image", "command", "args", "env", "numNodes", "resourcesPerNode", "numProcPerNode"}
TRAIN_JOB = {"runtimeRef", "initializer", "trainer", "runtimePatches", "suspend", "activeDeadlineSeconds", "managedBy"}
SKY = {"name", "workdir", "num_nodes", "resources", "file_mounts", "setup", "run", "envs", "secrets"}

STUBS = {
    "torchrun": 'printf "%s\\0" "$@"',
    "scontrol": 'printf "node2\\nnode10\\nnode1x\\n"',
    "srun": 'while [[ $1 == --* ]]; do shift; done; SLURMD_NODENAME=${NODE:-node2} exec "$@"',
    "pip": "exit 9",
    "bowstore": 'printf "%s\\0" bowstore "$@"',
    "cd": "",
}


@pytest.fixture
def stubs(tmp_path: Path) -> Path:
    """A folder of commands that print what they are told."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in STUBS.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    return folder


def run(arguments: list[str], stubs: Path, **variables: str) -> list[str]:
    """What a script calls, argument by argument."""
    found = subprocess.run(
        arguments,
        env={"PATH": f"{stubs}:{os.environ['PATH']}", **variables},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return found.stdout.split("\0")[:-1]


def understood(arguments: list[str]) -> tuple[Any, dict[str, Any]]:
    """What torchrun makes of its arguments, and bowstore of its own."""
    given = get_args_parser().parse_args(arguments)
    assert (given.module, given.training_script) == (True, "bowstore")
    assert (given.rdzv_backend, given.max_restarts) == ("c10d", 3)
    return given, parsed(given.training_script_args)


def test_slurm(stubs: Path) -> None:
    script = LAUNCH / "slurm.sbatch"
    options = re.findall(r"^#SBATCH --([a-z-]+)(?:=\S+)?$", script.read_text(), re.MULTILINE)
    assert len(options) == script.read_text().count("#SBATCH --") == len(set(options))
    assert set(options) == SBATCH
    slurm = {"SLURM_JOB_ID": "7654321", "SLURM_JOB_NODELIST": "node[1-3]", "SLURM_JOB_NUM_NODES": "3"}
    command = ["encode", "--layer", "conv4", "--K", "20000", "--store", "with space.zarr"]
    given, told = understood(run(["bash", str(script), *command], stubs, **slurm))
    assert (given.nnodes, given.nproc_per_node, given.rdzv_id) == ("3", "auto", "7654321")
    assert given.rdzv_endpoint == "node10:34321"  # the first as text, not as a number, as torchrun sorts
    assert (given.local_addr, given.rdzv_conf) == ("node2", "is_host=0")
    assert told["store"] == Path("with space.zarr")
    given, _ = understood(run(["bash", str(script), "train"], stubs, **slurm, PROCESSES="4", NODE="node10"))
    assert (given.nproc_per_node, given.local_addr, given.rdzv_conf) == ("4", "node10", "is_host=1")
    with pytest.raises(subprocess.CalledProcessError) as refused:
        run(["bash", str(script)], stubs, **slurm)
    assert (refused.value.returncode, refused.value.stderr.startswith("name a command of bowstore, as in: ")) == (
        2,
        True,
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_kubernetes(stubs: Path, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    job = yaml.safe_load((LAUNCH / "trainjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert job["spec"].keys() <= TRAIN_JOB
    trainer = job["spec"]["trainer"]
    assert trainer.keys() <= TRAINER
    assert all(isinstance(value, str) for part in trainer["resourcesPerNode"].values() for value in part.values())
    (node,) = job["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    assert node["name"] == pod["containers"][0]["name"] == "node"  # of the runtime torch-distributed
    assert [mount["name"] for mount in pod["containers"][0]["volumeMounts"]] == [pod["volumes"][0]["name"]]
    assert pod["containers"][0]["volumeMounts"][0]["mountPath"] == "/workspace"
    pets = {
        "PET_NNODES": "2",
        "PET_NPROC_PER_NODE": "8",
        "PET_MASTER_ADDR": "job-node-0-0.job",
        "PET_MASTER_PORT": "29500",
    }
    pets["PET_NODE_RANK"] = str(rank)
    program, flag, text, name = trainer["command"]
    arguments = run([program, flag, text.replace("/workspace", "/"), name, *trainer["args"]], stubs, **pets)
    for variable, value in pets.items():
        monkeypatch.setenv(variable, value)
    given, told = understood(arguments)
    assert (given.nnodes, given.nproc_per_node, given.rdzv_endpoint) == ("2", "8", "job-node-0-0.job:29500")
    assert given.rdzv_conf == f"is_host={int(rank == 0)}"
    assert told["config"] == Path("imagenet_conv4")


@pytest.mark.parametrize(("rank", "here"), [(0, "10.0.0.9"), (1, "10.0.0.10")])
def test_skypilot(stubs: Path, rank: int, here: str) -> None:
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert task.keys() <= SKY
    assert all(isinstance(value, str) for value in task["envs"].values())
    nodes = {
        "SKYPILOT_NODE_RANK": str(rank),
        "SKYPILOT_NODE_IPS": "10.0.0.9\n10.0.0.10",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NUM_GPUS_PER_NODE": "8",
        "SKYPILOT_TASK_ID": "sky-1",
    }
    calls = run(["bash", "-c", task["run"]], stubs, **nodes, **task["envs"])
    pushed = calls.index("bowstore", calls.index("bowstore") + 1) if calls.count("bowstore") > 1 else len(calls)
    given, told = understood(calls[:pushed])
    assert (given.nnodes, given.nproc_per_node, given.rdzv_id) == ("2", "8", "sky-1")
    assert (given.rdzv_endpoint, given.local_addr) == ("10.0.0.10:29400", here)
    assert given.rdzv_conf == f"is_host={int(here == '10.0.0.10')}"
    assert told["store"] == Path("words.zarr")
    if here == "10.0.0.10":  # where rank 0 runs, and the store is
        assert parsed(calls[pushed + 1 :])["licence"] == "CC BY 4.0"
    assert (pushed < len(calls)) == (here == "10.0.0.10")
