"""What all tests share: no test leaves anything behind in the user's cache folder, or depends on what is there."""

from __future__ import annotations

import pytest
from hypothesis import settings

settings.register_profile("untimed", deadline=None)  # machines are slow at times, which is no fault of the code
settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def no_profiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices begin without knowing how fast this machine is."""
    monkeypatch.setattr("isthmus.edge.profile.folder", lambda: None)
