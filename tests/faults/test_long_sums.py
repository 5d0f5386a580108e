"""ω summed in float32 over 10,000 small steps, against the equations in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hlora.numerics import encodings, equations, ops
from hlora.numerics.encodings import Encoded, Factored

STEPS, LR, SCALE, XI = 10_000, 1e-3, 2.0, 1e-3


def sums(matrix: Encoded) -> tuple[Tensor, Tensor]:
    return tuple(matrix) if isinstance(matrix, Factored) else (matrix.double().sum(1), matrix.double().sum(0))


def test_ten_thousand_small_steps_in_float32_lose_nothing_that_matters(tally: Callable[..., None]) -> None:
    """AdamW towards a random matrix of rank 4, by noisy gradients. Errors of ω, of Ω and of their sums, in norm.

    float32 and factored: roundings add up as a random walk, to √n·2⁻²⁴ of all that was added (Higham and Mary 2019).
    """
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(4, 36, generator=generator) / 6, torch.zeros(24, 4)
    start = A.clone(), B.clone()
    target = torch.randn(24, 4, generator=generator) @ torch.randn(4, 36, generator=generator) / 30
    optimizer = torch.optim.AdamW([A.requires_grad_(), B.requires_grad_()], lr=LR, weight_decay=0.0)
    omegas = {kind: encodings.zeros(kind, 24, 36, device=A.device) for kind in ("float32", "factored")}
    omega, added = (torch.zeros(24, 36, dtype=torch.float64) for _ in range(2))
    for _ in range(STEPS):
        with torch.no_grad():
            G = SCALE * B @ A - target + 0.3 * torch.randn(24, 36, generator=generator)
            A.grad, B.grad = SCALE * B.T @ G, SCALE * G @ A.T
        before = A.detach().clone(), B.detach().clone()
        optimizer.step()
        step = (
            ops.effective_gradient(*before, A.grad, B.grad, lr=LR, scale=SCALE),
            ops.difference(A, B, before, scale=SCALE),
        )
        for low in omegas.values():
            ops.accumulate_(low, *step)
        factors = [factor.detach().double() for factor in (*before, A.grad, B.grad, A, B)]
        gradient = equations.effective_gradient(*factors[:4], lr=LR, scale=SCALE)
        delta = equations.movement(*factors[:2], *factors[4:], scale=SCALE)
        omega = equations.path_integral(omega, gradient, delta)
        added += (gradient * delta).abs()

    moved = ops.difference(A, B, start, scale=SCALE)
    moved_wide = equations.movement(*(f.detach().double() for f in (*start, A, B)), scale=SCALE)
    weight = 1 / (moved_wide**2 + XI)  # of ω in Ω
    found: dict[str, tuple[float, float]] = {}  # relative error, and its bound

    def compare(what: str, got: Encoded, exact: Encoded, bound: Tensor) -> None:
        if isinstance(got, Tensor) and isinstance(exact, Tensor):
            found[what] = float((got.double() - exact).norm() / exact.norm()), float(bound.norm() / exact.norm())
        for dim, mine, other in zip((1, 0), sums(got), sums(exact), strict=True):
            most = bound.sum(dim).norm()
            name = f"{what}, sums of {'rows' if dim else 'columns'}"
            found[name] = float((mine.double() - other).norm() / other.norm()), float(most / other.norm())

    for kind, low in omegas.items():
        bound = STEPS**0.5 * 2**-24 * added
        exact: Encoded = omega if kind != "factored" else Factored(*sums(omega))
        compare(f"{kind}, ω", low, exact, bound)
        importance: Encoded = equations.consolidate(omega, moved_wide, XI)
        if isinstance(exact, Factored):
            importance, _ = ops.consolidate(exact, (moved[0].double(), moved[1].double()), XI)
        # Ω's own rounding and that of Δ² come on top.
        own = 2**-20 * omega * weight
        compare(f"{kind}, Ω", ops.consolidate(low, moved, XI)[0], importance, bound * weight + own)
    for what, (error, most) in found.items():
        print(f"{what}: {error:.2e}, at most {most:.2e}")
    beyond = [what for what, (error, most) in found.items() if not error <= most]
    tally(f"ω and Ω after {STEPS:,} steps", cases=len(found), good=len(found) - len(beyond), bad=len(beyond))
    assert not beyond
    assert max(most for _, most in found.values()) < 0.1  # the bounds say something
