"""Which options of a command were named on its command line."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer


def given_options(ctx: typer.Context) -> set[str]:
    """Names of parameters, arguments included, that are not there by default alone."""
    sources = {name: ctx.get_parameter_source(name) for name in ctx.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
