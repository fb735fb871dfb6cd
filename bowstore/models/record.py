"""What describes a network without building it. Loads no torch."""

from collections.abc import Mapping
from typing import Any

from bowstore.config import ModelConfig, Seed, Strict, Text, ViewConfig, validate
from bowstore.runs import task_name


class NetworkRecord(Strict):
    """What rebuilds a network, and what it was trained as, or would be."""

    model: ModelConfig = ModelConfig()
    view: ViewConfig = ViewConfig()
    name: Text
    task: Text
    seed: Seed = 0


def network_record(values: Mapping[str, Any], origin: str) -> NetworkRecord:
    """What rebuilds a network, of what an export records, or of a configuration of whatever version.

    Args:
        values: plain values.
        origin: where they are from, for messages.

    Raises:
        UsageError: they describe no network.
    """
    own = {name: values[name] for name in NetworkRecord.model_fields.keys() & values.keys()}
    return validate(NetworkRecord, own | {"task": task_name(values)}, origin)
