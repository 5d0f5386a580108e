"""How the figures of a comparison look: a blank one, and the colour, marker and line of each arm.

Arms differ by all three, so that figures read in black and white.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from hlora.methods import ArmStyle
from hlora.report.style import BLUE, GREEN, style_of

OURS: ArmStyle = style_of("hlora") or (GREEN, "o", "-")
RIVAL: ArmStyle = style_of("ewc") or (BLUE, "s", "--")
_OTHER_MARKERS: tuple[Any, ...] = ("v", "<", ">", "p", "d", (4, 1, 0), (6, 1, 0), "h", (4, 1, 45), "8", "H")
_OTHER_LINES: tuple[Any, ...] = ("-", "--", "-.", ":")
OTHER_GREYS = ("#4d4d4d", "#7a7a7a", "#a0a0a0")
HALO: Any = {"markeredgecolor": "white", "markeredgewidth": 0.6}


def blank(width: float, height: float) -> Figure:
    """Without axes; inches."""
    return Figure(figsize=(width, max(height, 1.5)), layout="constrained", facecolor="white")


def styles_by_arm(comparison: Mapping[str, Any]) -> dict[str, ArmStyle]:
    """Colour, marker and line of each arm.

    The first arm of a method with a style of its own has it; every other arm is grey.
    """
    methods = {cell["arm"]: cell["method"] for cell in comparison["cells"]}
    main = {comparison["rival"]: RIVAL, comparison["ours"]: OURS}
    styles: dict[str, ArmStyle] = {}
    taken: set[str] = {style[0] for style in main.values()}
    for arm in comparison["arms"]:
        colour, marker, line = main.get(arm) or style_of(methods.get(arm, "")) or ("", "", "")
        if arm in main or (colour and colour not in taken):
            styles[arm] = (colour, marker, line)
            taken.add(colour)
            continue
        place = sum(style[0] in OTHER_GREYS for style in styles.values())
        styles[arm] = (
            OTHER_GREYS[place % len(OTHER_GREYS)],
            _OTHER_MARKERS[place % len(_OTHER_MARKERS)],
            _OTHER_LINES[place % len(_OTHER_LINES)],
        )
    return styles
