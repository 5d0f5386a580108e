"""What a Matplotlib figure shows, read back."""

from __future__ import annotations

from typing import Any

import numpy as np


def lines(axes: Any, colour: str) -> list[np.ndarray]:
    """Data of the lines of a colour, (n, 2) each."""
    return [line.get_xydata() for line in axes.get_lines() if line.get_color() == colour]


def rings(axes: Any) -> list[tuple[float, float]]:
    return [tuple(line.get_xydata()[0]) for line in axes.get_lines() if line.get_markerfacecolor() == "none"]


def words(figure: Any) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def labels(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]
