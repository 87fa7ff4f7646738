"""What a person is told of a budget for experts before the weights are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from isthmus.edge import ExpertSettings


def foretold(folder: Path, settings: ExpertSettings, threads: int) -> str:
    """One line: the speed that is to be expected, or which command measures what it takes to say so.

    Returns:
        Nothing where the bundle is not here in whole or the budget does not fit it, of which the device speaks; nor
        where experts are read with fewer bits than were measured.
    """
    from shlex import quote

    from isthmus.edge.experts.foretold import foretell
    from isthmus.protocol.errors import IsthmusError
    from isthmus.split.bundle import Bundle

    try:
        bundle = Bundle.open(folder)
        if bundle.config.experts is None or not bundle.whole or settings.mode == "bounded":
            return ""
        known = foretell(bundle, settings, threads)
    except IsthmusError:
        return ""
    if known is None:
        wanted = f"isthmus bench experts {quote(str(folder))}"
        wanted += f" --expert-bits {settings.bits}" if settings.bits else ""
        wanted += f" --threads {threads}" if threads else ""
        return f"experts: {wanted} measures what it takes to foretell the speed here"
    line = f"experts: {known.tokens_s:.1f} tokens/s are foretold with {settings.mb:g} MB, "
    return line + f"{known.hit_rate:.0%} of experts in memory and {known.read_mb:.1f} MB read a token"
