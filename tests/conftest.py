"""What all tests share: no test leaves anything behind in the user's cache folder, or depends on what is there."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def no_profiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices begin without knowing how fast this machine is."""
    monkeypatch.setattr("isthmus.edge.profile.folder", lambda: None)
