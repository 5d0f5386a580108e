"""How the figures of a comparison look: a blank one, and the colour, marker and line of each arm.

Arms differ by all three, so that figures read in black and white.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from hlora.methods import Look
from hlora.report.style import BLUE, GREEN, look_of

OURS: Look = look_of("hlora") or (GREEN, "o", "-")
RIVAL: Look = look_of("ewc") or (BLUE, "s", "--")
_OTHER_MARKERS: tuple[Any, ...] = ("v", "<", ">", "p", "d", (4, 1, 0), (6, 1, 0), "h", (4, 1, 45), "8", "H")
_OTHER_LINES: tuple[Any, ...] = ("-", "--", "-.", ":")
OTHER_GREYS = ("#4d4d4d", "#7a7a7a", "#a0a0a0")
HALO: Any = {"markeredgecolor": "white", "markeredgewidth": 0.6}


def blank(width: float, height: float) -> Figure:
    """Without axes; inches."""
    return Figure(figsize=(width, max(height, 1.5)), layout="constrained", facecolor="white")


def arm_looks(comparison: Mapping[str, Any]) -> dict[str, Look]:
    """Colour, marker and line of each arm.

    The first arm of a method with a look of its own has it; every other arm is grey.
    """
    methods = {cell["arm"]: cell["method"] for cell in comparison["cells"]}
    main = {comparison["rival"]: RIVAL, comparison["ours"]: OURS}
    looks: dict[str, Look] = {}
    taken: set[str] = {look[0] for look in main.values()}
    for arm in comparison["arms"]:
        colour, marker, line = main.get(arm) or look_of(methods.get(arm, "")) or ("", "", "")
        if arm in main or (colour and colour not in taken):
            looks[arm] = (colour, marker, line)
            taken.add(colour)
            continue
        place = sum(look[0] in OTHER_GREYS for look in looks.values())
        looks[arm] = (
            OTHER_GREYS[place % len(OTHER_GREYS)],
            _OTHER_MARKERS[place % len(_OTHER_MARKERS)],
            _OTHER_LINES[place % len(_OTHER_LINES)],
        )
    return looks
