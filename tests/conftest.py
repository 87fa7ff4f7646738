"""What all tests share: no test leaves anything behind in the user's cache folder, or depends on what is there."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("untimed", deadline=None)  # machines are slow at times, which is no fault of the code
settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def no_profiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices begin without knowing how fast this machine is."""
    monkeypatch.setattr("isthmus.edge.profile.folder", lambda: None)


@pytest.fixture(scope="session")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what tests remember of parts that were opened before."""
    return tmp_path_factory.mktemp("tried")


@pytest.fixture(autouse=True)
def own_notes(notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known of parts that other runs opened."""
    monkeypatch.setattr("isthmus.split.tried.folder", lambda: notes)
