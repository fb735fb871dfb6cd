"""Training tasks: what a network learns to predict. Here their names; a task's module is imported when it is asked for.

Loads no torch.
"""

from bowstore.plugins import Registry
from bowstore.train.tasks.base import Kind

TASKS = Registry(
    "task",
    "bowstore.tasks",
    Kind,
    {
        "rotation": "bowstore.train.tasks.settings:ROTATION",
        "location": "bowstore.train.tasks.settings:LOCATION",
        "words": "bowstore.train.tasks.settings:WORDS",
        "clusters": "bowstore.train.tasks.settings:CLUSTERS",
        "supervised": "bowstore.train.tasks.settings:SUPERVISED",
        "linear": "bowstore.train.tasks.settings:LINEAR",
    },
)
