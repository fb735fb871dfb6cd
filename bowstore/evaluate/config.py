"""What every evaluation is told, whatever its protocol. Loads no torch."""

from pydantic import Field

from bowstore.config import Batch, Computing, Text

OF_FEATURES = ("batch", "threads", "compile")  # how features are taken; a protocol that trains has settings of its own


class EvalConfig(Computing):
    """Which network is evaluated, and how it runs."""

    run: Text | None = Field(None, description="run, checkpoint or .safetensors; null: newest finished run")
    random: bool = Field(False, description="the run's network at its random initialisation")
    batch: Batch = Field(128, description="images a batch; of large images fewer where it is left out")
