"""Text for terminals and logs: a console wide enough for tables, its output as text, and counts in three digits."""

from __future__ import annotations

import io

from rich.console import Console, RenderableType


def wide_console() -> Console:
    """A console as wide as the terminal; at least 140 columns where there is no terminal, so that tables do not wrap."""
    console = Console()
    return console if console.is_terminal or console.width >= 140 else Console(width=140)


def to_text(renderable: RenderableType, width: int = 160) -> str:
    """What ``rich`` would print, as plain text."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def human(count: float) -> str:
    """A count in three digits.

    Example:
        >>> human(1_234_567)
        '1.23M'
    """
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:g}"
