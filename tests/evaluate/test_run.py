from types import SimpleNamespace
from typing import Any

import pytest

from bowstore.evaluate.run import known_dataset


class Sized(SimpleNamespace):
    def __len__(self) -> int:
        return int(self.images)


@pytest.mark.parametrize(
    ("classes", "train", "test", "name"),
    [(100, 50_000, 10_000, "cifar100"), (10, 50_000, 10_000, None), (100, 50_000, 9_999, None)],
)
def test_the_papers_figures_stand_beside_its_own_data_set_only(
    classes: int, train: int, test: int, name: str | None
) -> None:
    first: Any = Sized(classes=tuple(map(str, range(classes))), images=train)
    second: Any = Sized(classes=first.classes, images=test)
    assert known_dataset(first, second) == name
