"""Layer coefficients c_l (Eq. 15), and the unit of a relative φ."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping

import torch

from hlora.importance.artefact import Importance
from hlora.numerics import encodings, equations
from hlora.system.choices import Group, LayerWeights
from hlora.system.errors import ArtifactError


def layer_coefficients(
    importance: Importance, layer_weights: LayerWeights | None = None, group: Group = "matrix"
) -> dict[str, float]:
    """The coefficient c_l of each matrix. Warns if one exceeds 0.9.

    Args:
        importance: The importance whose norms ‖Ω_l‖₂ decide.
        layer_weights: "softmax" (Eq. 15), "norm_share", "uniform", "sum" (all ones) or "root". By default "root" for
            squared gradients and "softmax" for a path integral.
        group: One coefficient for each "matrix", or for each transformer "block".

    Returns:
        c_l by matrix name; with the group "block", that of the matrix's block.

    Raises:
        ArtifactError: A norm is not finite, or "norm_share" is asked of an importance that is zero.

    Source: Eq. 15.
    """
    if group not in ("matrix", "block"):
        raise ValueError(f"group: expected matrix or block, got {group!r}")
    if layer_weights is None:
        layer_weights = "root" if importance.method == "squared_gradients" else "softmax"
    groups = {name: name if group == "matrix" else _block(name) for name in importance.matrices}
    squares: dict[str, float] = {}
    for name, norm in importance.norms().items():
        if not math.isfinite(norm):
            raise ArtifactError(
                f"{name}: the norm of the importance is {norm}, so it has no layer weight. Record again, with a "
                "larger xi or a smaller learning rate."
            )
        squares[groups[name]] = squares.get(groups[name], 0.0) + norm**2
    norms = torch.tensor(list(squares.values()), dtype=torch.float64).sqrt()
    if layer_weights == "norm_share" and not norms.sum() > 0:
        raise ArtifactError("the importance is zero everywhere, so it has no norm shares. Record more steps.")
    weights = dict(zip(squares, equations.layer_weights(norms, layer_weights).tolist(), strict=True))
    largest = max(weights, key=weights.__getitem__)
    if weights[largest] > 0.9 and len(weights) > 1 and layer_weights not in ("sum", "root"):
        warnings.warn(
            f"{largest} takes {weights[largest]:.3f} of the layer weights, so all other layers are free to drift. "
            "Use layer_weights='norm_share', or a larger xi.",
            stacklevel=2,
        )
    return {name: weights[groups[name]] for name in groups}


def relative_unit(importance: Importance, coefficients: Mapping[str, float]) -> float:
    """What L_reg is divided by if φ is relative (see ImportancePenalty).

    Args:
        importance: The importance.
        coefficients: c_l by matrix name.

    Raises:
        ArtifactError: The unit is zero or not finite.
    """
    if importance.without_move:
        traces = {name: float(encodings.total(m.omega)) for name, m in importance.matrices.items()}
        whole = sum(traces.values())
        # ½ Σ F δ² is in nats. Dividing by the mean c_l leaves the cost of a move that is equal everywhere unchanged.
        unit = 2 * sum(coefficients[name] * trace for name, trace in traces.items()) / whole if whole > 0 else 0.0
    else:
        unit = sum(coefficients[name] * m.undo_cost for name, m in importance.matrices.items())
    if not 0 < unit < math.inf:
        if unit:  # NaN too
            raise ArtifactError(
                f"undoing the general phase would cost {unit}, so a relative phi has no unit. Record again, with a "
                "larger xi or a smaller learning rate."
            )
        raise ArtifactError(
            "the importance is zero on everything that the general phase moved, so a relative phi has no "
            "unit. Record more steps, or at a larger learning rate."
        )
    return unit


def _block(name: str) -> str:
    """The name up to its first number, such as model.layers.3; blocks of encoder and decoder differ in their prefix."""
    found = re.match(r"(?:.*?\.)??\d+(?=\.|$)", name)
    return found.group() if found else "the part outside the blocks"


def diverged(weighted: float, phi: float) -> str:
    """The error text for a penalty, or a gradient of it, that is no longer finite."""
    what = f"the penalty is {weighted}" if not math.isfinite(weighted) else "a gradient of the penalty is not finite"
    return (
        f"{what} at phi {phi:g}. So large a phi needs a smaller learning rate: lower penalty.phi, or "
        "training.tune.learning_rate; in float16 use bfloat16 or float32 instead."
    )
