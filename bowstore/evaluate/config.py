"""What every evaluation is told, whatever its protocol; and which protocols measure a run. Loads no torch."""

from typing import Literal, NamedTuple, Self

from pydantic import Field, model_validator

from bowstore.config import Batch, Computing, Place, Seed, Side, Strict, Text, validate
from bowstore.errors import UsageError
from bowstore.evaluate.protocol import Kind
from bowstore.evaluate.protocols import asked
from bowstore.train.config import ProbeConfig

FeatureType = Literal["float32", "float16"]
OF_NETWORK = ("run", "arch", "weights", "size", "seed", "random")  # which network, and how it is initialised and seen
# How features are taken; a protocol that trains has settings of its own.
OF_FEATURES = ("batch", "threads", "compile", "dtype")
PROBE = "runtime.probe.eval"  # for messages
_PROBE_IMAGES = 5000  # of each split


class EvalConfig(Computing):
    """Which network is evaluated, and how it runs."""

    run: Text | None = Field(
        None,
        description="run, checkpoint or .safetensors; or FILE.yaml, a training configuration: the network that it "
        "starts from; null: newest finished run",
    )
    arch: Text | None = Field(
        None, description="instead of a run: timm:NAME, torchvision:NAME, resnet50, wrn-16-2...; nothing is downloaded"
    )
    weights: Place | None = Field(None, description="weights file of arch, of any known layout; null: random")
    size: Side | None = Field(None, description="side of the clean view, pixels; null: the network's or protocol's")
    seed: Seed | None = Field(None, description="of random weights of arch; null: 0")
    random: bool = Field(False, description="the run's network at its random initialisation")
    batch: Batch | None = Field(None, description="images a batch; null: 128, on a CPU fewer of large images")
    dtype: FeatureType = Field(
        "float32", description="of kept features; float16 halves their memory and disk, and rounds them"
    )

    @model_validator(mode="after")
    def _one_network(self) -> Self:
        if self.run and self.arch:
            raise ValueError(f"run {self.run} and arch {self.arch} are two networks; leave one of them out")
        if self.weights and not (self.run or self.arch):
            raise ValueError(f"weights {self.weights} do not say of which network they are; give --arch, too")
        return self


class Asked(NamedTuple):
    """A protocol that a run is measured by."""

    kind: Kind
    settings: Strict


def probes_of(config: ProbeConfig | None) -> list[Asked]:
    """The protocols of a configuration; of those that can look at fewer images, at most 5000 unless it says else.

    Raises:
        UsageError: no such protocol or setting, or a protocol that trains.
    """
    if config is None:
        return []
    found = []
    for item in config.eval if isinstance(config.eval, list) else [config.eval]:
        try:
            kind, values = asked(item)
        except UsageError as error:
            raise UsageError(f"{PROBE}: {error}") from error
        if kind.run:
            raise UsageError(
                f"{PROBE}: protocol {kind.name} trains; take one that looks at features, as knn and linear do"
            )
        few = {"images": _PROBE_IMAGES} if "images" in kind.settings.model_fields else {}
        found.append(Asked(kind, validate(kind.settings, few | values, f"{PROBE}, {kind.name}")))
    if not found:
        raise UsageError(f"{PROBE} names no protocol; write one, as in knn, or leave runtime.probe out")
    return found
