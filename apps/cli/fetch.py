"""`isthmus fetch`: brings a model, or texts to train on, onto this machine."""

from __future__ import annotations

from typing import Annotated

import typer


def command(
    name: Annotated[
        str, typer.Argument(help="smollm2, texts, OWNER/NAME of a model hub, or one file there: OWNER/NAME:FILE.gguf")
    ],
) -> None:
    """Download a model into the cache folder and print where it is. What is there already is checked, not fetched.

    texts are documents to train early exits on and to measure with.

    The cache folder is $ISTHMUS_CACHE, else isthmus/models in ~/.cache.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from isthmus.apps.cli.signals import ending_cleanly
    from isthmus.split.fetch import PACKAGES, fetch

    console = Console(stderr=True)
    if name in PACKAGES:
        console.print(f"{name}: {PACKAGES[name].about}")
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with ending_cleanly(), bar:
        task = bar.add_task(f"fetching {name}", total=None, visible=False)
        path = fetch(name, progress=lambda done, total: bar.update(task, completed=done, total=total, visible=True))
    print(path)
