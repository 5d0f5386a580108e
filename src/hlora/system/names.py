"""Reads dotted module names."""

from __future__ import annotations

import re


def layer_number(name: str) -> int | None:
    """The first number in a dotted module name: model.layers.3.self_attn.q_proj → 3."""
    match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(match.group(1)) if match else None
