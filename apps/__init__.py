"""The faces: what people and their programs touch. Stands on top of every other package."""

__all__: list[str] = []
