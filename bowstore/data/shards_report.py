"""What `bowstore shards` says of what it made."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bowstore.data.records import QUARANTINE_FILE
from bowstore.data.sources import PassedOver
from bowstore.data.sources.base import some


@dataclass(frozen=True)
class ShardsReport:
    """What `make_shards` made, or found made, of one split.

    Attributes:
        split: train, val or test.
        folder: where the shards lie.
        classes: number of classes, 0 where they have no names.
        found: images in the source.
        written: images in the shards.
        changed: images encoded anew or renamed, by kind.
        quarantined: images left out.
        without_images: classes, and folders that might be classes, without an image in the source.
        passed_over: what of the whole source became no image, by what it is.
        shards: number of tars.
        new: False if everything lay there already.
        seconds: wall-clock time of this run.
    """

    split: str
    folder: Path
    classes: int
    found: int
    written: int
    changed: dict[str, int]
    quarantined: int
    without_images: list[str]
    passed_over: PassedOver
    shards: int
    new: bool
    seconds: float

    def summary(self) -> str:
        """One line for the user."""
        parts = [f"{self.split}: {self.written} of {self.found} images in {self.shards} shards in {self.folder}"]
        if self.changed:
            kinds = ", ".join(f"{count} {kind}" for kind, count in self.changed.items())
            parts.append(f"{sum(self.changed.values())} changed ({kinds})")
        if self.quarantined:
            parts.append(f"{self.quarantined} quarantined, see {self.folder / QUARANTINE_FILE}")
        return ("" if self.new else "nothing to do; ") + "; ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """The values for JSON."""
        return {**asdict(self), "folder": str(self.folder), "passed_over": dict(self.passed_over.counts)}


def closing_line(reports: Sequence[ShardsReport]) -> str:
    """What became no image, and classes without images: how a report on all splits ends."""
    bare = [
        f"{len(report.without_images)} in {report.split} ({some(report.without_images)})"
        for report in reports
        if report.without_images
    ]
    return f"passed over: {reports[0].passed_over.summary()}; classes without images: {', '.join(bare) or 'none'}"
