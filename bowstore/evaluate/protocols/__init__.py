"""Protocols by name: one module each, imported when its name is asked for. Loads no torch."""

from typing import Any

from bowstore.errors import UsageError
from bowstore.evaluate.protocol import Kind
from bowstore.plugins import Registry

_OWN = (
    "linear",
    "logreg",
    "voc07",
    "voc07-lowshot",
    "fewshot",
    "knn",
    "retrieval",
    "segmentation",
    "imagenet-linear",
    "places205-linear",
    "semisup",
    "voc0712-detection",
)
PROTOCOLS: Registry[Kind] = Registry(
    "protocol",
    "bowstore.protocols",
    Kind,
    {name: f"bowstore.evaluate.protocols.{name.replace('-', '_')}:KIND" for name in _OWN},
)


def asked(item: Any) -> tuple[Kind, dict[str, Any]]:
    """The protocol that an item of a configuration or a recipe asks for, and its settings as they stand there.

    Args:
        item: NAME, or {NAME: {SETTING: VALUE}}.

    Raises:
        UsageError: it is neither, or there is no protocol of that name.
    """
    name, values = next(iter(item.items())) if isinstance(item, dict) and len(item) == 1 else (item, {})
    if not isinstance(name, str) or not isinstance(values, dict | None):
        raise UsageError(f"{item!r} is no protocol; write its name, or {{NAME: {{SETTING: VALUE}}}}")
    return PROTOCOLS.get(name), values or {}
