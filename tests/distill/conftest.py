"""Set-up that tests of training share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a module's data, to which it may add recipes."""
    from train_runs import make_data

    return make_data(tmp_path_factory.mktemp("data"))
