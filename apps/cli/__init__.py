"""The command line `isthmus`: one module a command, loaded when that command is called; `main.main` is the entry."""

__all__: list[str] = []
