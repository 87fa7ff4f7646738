"""Measures engines side by side: contenders take turns in one run, so that only ratios within it count."""

__all__: list[str] = []
