"""What making shards is told, and what loaders take by default. Loads neither torch nor NumPy."""

from pydantic import Field

from bowstore.config import Count, Listed, Seed, Strict, Text, Threads
from bowstore.data.sources.base import Folders

HW_LOAD = 0.65  # DALI's default; the best value falls as CPU threads rise, so `bowstore bench loader` sweeps it


class ShardsConfig(Strict):
    """What the images are, and how they are cut into shards."""

    source: Text | None = Field(None, description="what SRC is; null: found by its layout")
    lists: Listed[Text] = Field((), description="[SPLIT=]FILE, a list or CSV of the images below SRC")
    label_field: Text | None = Field(
        None,
        description="CSV column, JSON key or extension of the label; `none`: no labels, not even by class folders",
    )
    folders: Folders | None = Field(None, description="what folders of SRC are that could be classes or splits")
    seed: Seed = Field(0, description="of the one global shuffle")
    per_shard: Count = Field(4096, description="images a shard")
    workers: Threads | None = Field(None, description="processes; null: one a core")
