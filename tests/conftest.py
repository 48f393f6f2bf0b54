"""Fixtures that several test files share."""

from pathlib import Path

import pytest


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty PDD_HOME of this test's own."""
    folder = tmp_path / "pdd-home"
    monkeypatch.setenv("PDD_HOME", str(folder))
    return folder
