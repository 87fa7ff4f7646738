"""Where commands work on a bundle's exits: a folder that no other process has meanwhile; bars show how far they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from isthmus.split.bundle import Bundle
    from isthmus.split.exit_run import ExitRun, Say
    from isthmus.split.exit_states import Progress as Tell

QUIET_S = 5.0  # between two lines about a step, at least


@contextmanager
def working(bundle: Bundle, work: Path | None = None, threads: int = 0) -> Iterator[ExitRun]:
    """A run over a bundle's model, ended cleanly by signals.

    Args:
        work: the folder; by default the model's own in the cache folder.
        threads: of the engine; 0 for one per core.

    Raises:
        ModelError: the folder cannot be used.
    """
    from isthmus.apps.cli.signals import ending_cleanly
    from isthmus.split.exit_run import ExitRun, work_folder, working_in

    folder = work or work_folder(bundle.model_id)
    with ending_cleanly(), working_in(folder), bars() as say:
        yield ExitRun(bundle, folder, say, threads)


@contextmanager
def bars() -> Iterator[Say]:
    """Bars on a terminal; without one a line now and then, and one when a step is done."""
    import sys
    import time

    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as bar:

        def say(step: str) -> Tell:
            task, told_s = bar.add_task(step, total=None, visible=False), [time.monotonic()]

            def tell(done: int, total: int) -> None:
                bar.update(task, completed=done, total=total, visible=done < total)
                if not console.is_terminal and (done == total or time.monotonic() - told_s[0] >= QUIET_S):
                    print(f"{step}: {done} of {total}", file=sys.stderr, flush=True)
                    told_s[0] = time.monotonic()

            return tell

        yield say
