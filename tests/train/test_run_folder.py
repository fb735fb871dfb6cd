"""A run's folder: whose files lie in it, and what is checked before the first step."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bowstore.data.index import open_index
from bowstore.errors import BowstoreError, CorruptError, MismatchError
from bowstore.train import loop
from bowstore.train.config import TrainConfig
from bowstore.train.metrics import MetricsLog
from bowstore.train.rundir import check_run, write_config

Make = Callable[..., TrainConfig]
PRECIOUS = b"three years of work"


@pytest.mark.parametrize("name", ["config.yaml", "environment.json", "metrics.jsonl"])
def test_a_user_s_files_in_a_run_s_folder_are_not_written_over(make_config: Make, tmp_path: Path, name: str) -> None:
    place = tmp_path / "runs" / "rotation-run" / name
    place.parent.mkdir(parents=True)
    place.write_bytes(PRECIOUS)
    with pytest.raises(MismatchError, match=rf"{name} is there, and no run of bowstore wrote it; take another --name"):
        loop.train(make_config("rotation"), tmp_path / "runs")
    assert place.read_bytes() == PRECIOUS
    assert {path.name for path in place.parent.iterdir()} == {name, ".lock"}


def test_a_configuration_with_remarks_is_the_user_s(make_config: Make, tmp_path: Path) -> None:
    config = make_config("rotation")
    write_config(tmp_path, config)
    (tmp_path / "metrics.jsonl").touch()
    check_run(tmp_path, config, resume=False)  # what a run leaves that was killed before its first checkpoint
    with open(tmp_path / "config.yaml", "a") as file:
        file.write("# the one for the paper\n")
    with pytest.raises(MismatchError, match=r"config\.yaml is there, and no run of bowstore wrote it"):
        check_run(tmp_path, config, resume=False)


def test_the_metrics_go_through_no_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    thesis = tmp_path / "thesis.docx"
    thesis.write_bytes(PRECIOUS)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").symlink_to(thesis)
    log = MetricsLog(tmp_path / "run", 0)
    log.write(1, {"loss": 2.0}, "0" * 16)
    log.close()
    assert thesis.read_bytes() == PRECIOUS
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == '{"step": 1, "loss": 2.0, "order": "0000000000000000"}\n'
    names = [path.name for path in (tmp_path / "run" / "tensorboard").iterdir()]
    assert len(names) == 1
    assert len(names[0].rpartition(".")[2]) == 8  # random digits
    monkeypatch.setattr("bowstore.train.metrics.atomic_file", _relink(thesis))
    with pytest.raises(BowstoreError, match=r"metrics\.jsonl is a link, and bowstore writes there"):
        MetricsLog(tmp_path / "run", 1)
    assert thesis.read_bytes() == PRECIOUS


def _relink(thesis: Path) -> Callable[[Path], object]:
    """Somebody who puts a link where the file was rewritten just now."""
    from contextlib import contextmanager
    from io import BytesIO
    from typing import Any

    @contextmanager
    def atomic_file(path: Path) -> Any:
        yield BytesIO()
        path.unlink()
        path.symlink_to(thesis)

    return atomic_file


@pytest.mark.parametrize("column", ["label", "offset", "key_hash"])
def test_a_damaged_index_is_not_trained_on(make_config: Make, tmp_path: Path, column: str) -> None:
    config = make_config("rotation")
    assert config.shards is not None
    index = open_index(config.shards)
    path = config.shards[0] / "index.safetensors"
    values = np.asarray(getattr(index, column))
    data, wanted = bytearray(path.read_bytes()), values.tobytes()
    place = data.index(wanted)
    data[place + values.itemsize * 5] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CorruptError, match=r"index\.safetensors"):
        loop.train(config, tmp_path / "runs")
    assert not list((tmp_path / "runs").rglob("*.pt"))
