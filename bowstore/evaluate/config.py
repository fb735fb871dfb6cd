"""What every evaluation is told, whatever its protocol. Loads no torch."""

from typing import Literal

from pydantic import Field

from bowstore.config import Compile, Strict, Text, Threads


class EvalConfig(Strict):
    """Which network is evaluated, and how it runs."""

    run: Text | None = Field(None, description="run, checkpoint or .safetensors; null: newest finished run")
    random: bool = Field(False, description="the run's network at its random initialisation")
    batch: int = Field(128, ge=1, le=2**20, description="images a batch")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: Compile = Field("auto", description="run the network compiled; auto: on a CPU, where it pays")
    threads: Threads | None = Field(None, description="decoding threads; null: one a core")
