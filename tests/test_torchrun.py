"""The variables that torchrun sets: all of them, or none."""

import pytest

from bowstore.errors import UsageError
from bowstore.torchrun import Ranks, ranks

WHOLE = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node0", "MASTER_PORT": "29500",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in WHOLE:
        monkeypatch.delenv(name, raising=False)


def test_alone_and_one_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ranks() == Ranks(rank=0, size=1, local_rank=0, local_size=1)
    for name, value in WHOLE.items():
        monkeypatch.setenv(name, value)
    assert ranks() == Ranks(rank=3, size=4, local_rank=1, local_size=2)
    assert not ranks().first


@pytest.mark.parametrize("others", [{}, {"RANK": "0"}, {"RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}])
def test_a_job_of_one_process_needs_no_more(monkeypatch: pytest.MonkeyPatch, others: dict[str, str]) -> None:
    for name, value in {"WORLD_SIZE": "1", **others}.items():
        monkeypatch.setenv(name, value)
    assert ranks() == Ranks(rank=0, size=1, local_rank=0, local_size=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": "3"}, r"RANK is set without WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE; start the command with"),
        ({"RANK": "0"}, r"RANK is set without WORLD_SIZE"),
        ({"WORLD_SIZE": "1", "RANK": "1"}, r"RANK and WORLD_SIZE is set without LOCAL_RANK, LOCAL_WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, r"WORLD_SIZE is set without RANK, LOCAL_RANK, LOCAL_WORLD_SIZE"),
        ({"LOCAL_RANK": ""}, r"LOCAL_RANK is set without RANK, WORLD_SIZE, LOCAL_WORLD_SIZE"),
        ({**WHOLE, "LOCAL_RANK": ""}, r"LOCAL_RANK is '', not a whole number; .*, or unset them"),
        ({**WHOLE, "RANK": "-1"}, r"RANK is '-1', not a whole number"),
        ({**WHOLE, "RANK": "\u0663"}, r"RANK is '\u0663', not a whole number"),
        ({**WHOLE, "WORLD_SIZE": "1e1"}, r"WORLD_SIZE is '1e1', not a whole number"),
        ({**WHOLE, "WORLD_SIZE": "9" * 5000}, r"WORLD_SIZE is '9{5000}', not a whole number"),
        ({**WHOLE, "RANK": "4"}, r"RANK 4 does not go with WORLD_SIZE 4"),
        ({**WHOLE, "WORLD_SIZE": "0"}, r"RANK 3 does not go with WORLD_SIZE 0"),
        ({**WHOLE, "LOCAL_RANK": "2"}, r"LOCAL_RANK 2 does not go with LOCAL_WORLD_SIZE 2"),
        ({**WHOLE, "LOCAL_WORLD_SIZE": "5"}, r"LOCAL_WORLD_SIZE 5 does not go with WORLD_SIZE 4"),
        ({**WHOLE, "MASTER_ADDR": ""}, r"WORLD_SIZE is 4, and MASTER_ADDR is not set"),
        ({**WHOLE, "MASTER_PORT": ""}, r"MASTER_PORT is '', not a whole number"),
        ({**WHOLE, "MASTER_PORT": "65536"}, r"MASTER_PORT 65536 is no port from 1 to 65535"),
    ],
)  # fmt: skip
def test_other_sets_are_refused(monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], message: str) -> None:
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message) as error:
        ranks()
    assert "\n" not in str(error.value)
