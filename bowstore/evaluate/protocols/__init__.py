"""Protocols by name: one module each, imported when its name is asked for. Loads no torch."""

from bowstore.evaluate.protocol import Kind
from bowstore.plugins import Registry

_OWN = (
    "linear",
    "logreg",
    "voc07",
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
