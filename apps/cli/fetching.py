"""What a person sees while a bundle is fetched: one line at the start, and a bar on a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class Fetching:
    """Says on standard error what is fetched into a bundle's folder; a context manager.

    Args:
        folder, mode, cut: as given to the device, which says how much it needs.
    """

    def __init__(self, folder: Path, mode: str, cut: int | None) -> None:
        self._folder, self._mode, self._cut = folder, mode, cut
        self._bar: Any = None
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> Fetching:
        return self

    def __exit__(self, *_: object) -> None:
        self.done()

    def progress(self, name: str, done: int, total: int) -> None:
        """Shows how far a file is."""
        if self._bar is None:
            import sys

            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

            print(self._announcement(), file=sys.stderr)
            console = Console(stderr=True)
            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
            self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
            self._bar.start()
        if name not in self._tasks:
            self._tasks[name] = self._bar.add_task(f"fetching {name}", total=total)
        self._bar.update(self._tasks[name], completed=done, visible=done < total)

    def done(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _announcement(self) -> str:
        from isthmus.edge.options import as_mode
        from isthmus.edge.provision import part_files, wanted
        from isthmus.protocol.errors import IsthmusError
        from isthmus.split.files import PARTIAL
        from isthmus.split.manifest import Manifest

        folder = str(self._folder) if self._folder.is_absolute() else f"./{self._folder}"
        try:
            manifest = Manifest.parse((self._folder / f"bundle.json{PARTIAL}").read_bytes())
            layers = wanted(manifest, as_mode(self._mode), self._cut)
            size = sum(manifest.files[name].bytes for name in part_files(manifest, layers))
        except (OSError, IsthmusError):  # the folder holds a part already
            return f"fetching more of the model into {folder}"
        return f"fetching {manifest.name} ({size / 1e6:.0f} MB) into {folder}"
