"""Settings of a ladder that FakeTrain trains in no time."""

import pytest

from tests.fakes import own_files


@pytest.fixture
def base(tmp_path) -> list[str]:
    files = own_files(tmp_path / "files")
    return [f"outputs={tmp_path}/outputs", "model=moe_nano", "logger=none", *files]
