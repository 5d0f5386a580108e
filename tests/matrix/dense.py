"""What recording and penalty should be, dense in float64 by the equations, from the names of the parameters alone.

Nothing here knows how hlora finds a matrix. `Error` is the largest difference over the largest value.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hlora import ImportancePenalty, ImportanceRecorder
from hlora.importance.artefact import Importance
from hlora.importance.squared_gradients import fisher_of_sequences
from hlora.numerics import equations
from hlora.numerics.encodings import Factored

A_OF, B_OF = ".lora_A.default.weight", ".lora_B.default.weight"
RANK, ALPHA, STEPS, LR, XI, PHI = 2, 4, 3, 0.02, 1e-3, 3.0


@dataclass
class Factors:
    """A and B of one adapted matrix, its scale, and the layer of PEFT that has them."""

    parameters: tuple[nn.Parameter, nn.Parameter]
    scale: float
    layer: Any
    expert: tuple[int, int] | None = None

    def of(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """This matrix's part of both, which are all of them but for experts (PEFT's `get_delta_weight`)."""
        if self.expert is None:
            return A, B
        number, count = self.expert
        return A.reshape(count, -1, A.shape[1])[number], B.reshape(B.shape[0], -1, count)[:, :, number]

    def copies(self) -> tuple[Tensor, Tensor]:
        A, B = self.of(*(parameter.detach() for parameter in self.parameters))
        return A.double().clone(), B.double().clone()

    def gradients(self) -> tuple[Tensor, Tensor]:
        A, B = self.of(*(torch.zeros_like(p) if p.grad is None else p.grad.detach() for p in self.parameters))
        return A.double().clone(), B.double().clone()

    def base_weight(self) -> Tensor:
        weight = getattr(self.layer.get_base_layer(), self.weight_name).detach()
        return weight if self.expert is None else weight[self.expert[0]]

    @property
    def weight_name(self) -> str:
        return getattr(self.layer, "parameter_name", "weight")


def adapted(model: nn.Module) -> dict[str, Factors]:
    """Every pair of factors by the name of its weight in the base model, read from `named_parameters`."""
    parameters: Any = dict(model.named_parameters(remove_duplicate=False))
    found = {}
    for name, A in parameters.items():
        if not name.endswith(A_OF):
            continue
        place = name.removesuffix(A_OF)
        layer: Any = model.get_submodule(place)
        pair, scale = (A, parameters[place + B_OF]), float(layer.scaling["default"])
        place = place.removeprefix("base_model.model.")
        count = getattr(layer, "num_experts", None)
        if count is None:
            found[place] = Factors(pair, scale, layer)
            continue
        place = f"{place.replace('.base_layer', '')}.{layer.parameter_name}"
        experts = {f"{place}[{e}]": Factors(pair, scale, layer, (e, count)) for e in range(count)}
        found |= experts if count > 1 else {place: Factors(pair, scale, layer)}
    return found


@dataclass
class DensePath:
    """ω of every matrix along the steps of any optimizer."""

    factors: dict[str, Factors]
    omega: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.start = {name: each.copies() for name, each in self.factors.items()}

    def before(self, lr: float) -> None:
        self.kept = {}
        for name, f in self.factors.items():
            A, B = f.copies()
            gradient = equations.effective_gradient(A, B, *f.gradients(), lr=lr, scale=f.scale)
            self.kept[name] = (A, B, gradient)

    def after(self) -> None:
        for name, f in self.factors.items():
            A, B, gradient = self.kept[name]
            delta = equations.movement(A, B, *f.copies(), scale=f.scale)
            before = self.omega.get(name, torch.zeros_like(gradient))
            self.omega[name] = equations.path_integral(before, gradient, delta)

    def importance(self) -> dict[str, Tensor]:
        moved = {
            name: equations.movement(*self.start[name], *f.copies(), scale=f.scale) for name, f in self.factors.items()
        }
        return {name: equations.consolidate(omega, moved[name], XI) for name, omega in self.omega.items()}


def error(got: dict[str, Any], expected: dict[str, Tensor]) -> float:
    """Largest error over all matrices; factored ones by their row and column sums."""
    if set(got) != set(expected):
        return float("inf")
    worst = 0.0
    for name, other in expected.items():
        mine = got[name]
        pairs = [(mine, other)]
        if isinstance(mine, Factored):
            pairs = [(mine.row, other.sum(1)), (mine.column, other.sum(0))]
        for a, b in pairs:
            largest = float(b.abs().max())
            difference = float((a.double() - b).abs().max())
            worst = max(worst, difference / largest if largest else difference)
    return worst


def penalty_errors(model: nn.Module, importance: Importance, general: dict[str, tuple[Tensor, Tensor]]) -> list[float]:
    """Errors of L_reg and of φ·L_reg's gradients by both ways, where the adapter has left θ^ν, `general`."""
    penalty = ImportancePenalty(model, importance, PHI, phi_scale="paper")
    factors = adapted(model)
    omega = {
        name: (m.omega.dense() if isinstance(m.omega, Factored) else m.omega).double()
        for name, m in importance.matrices.items()
    }
    weights = equations.layer_weights(torch.stack([omega[name].norm() for name in factors]))
    leaves = {name: [each.requires_grad_() for each in f.copies()] for name, f in factors.items()}
    terms = []
    for name, (A, B) in leaves.items():
        A_nu, B_nu = general[name]
        scale = factors[name].scale
        terms.append(equations.layer_penalty(omega[name], scale * B @ A, scale * B_nu @ A_nu))
    value = PHI * equations.regularisation(weights, torch.stack(terms))
    value.backward()
    expected = {f"{name}.{number}": leaf.grad for name, pair in leaves.items() for number, leaf in enumerate(pair)}
    errors = []
    for way in (lambda: penalty().backward(), penalty.add_gradients_):
        model.zero_grad(set_to_none=True)
        way()
        got = [gradient for f in factors.values() for gradient in f.gradients()]
        errors.append(error(dict(zip(expected, got, strict=True)), expected))
    errors.append(abs(float(penalty().detach()) / float(value.detach()) - 1))
    model.zero_grad(set_to_none=True)
    return errors


def merge_error(model: Any) -> float:
    """Whether PEFT's own merge adds s·BA, in one orientation or the other, to each base weight."""
    factors = adapted(model)
    weights = {id(getattr(f.layer.get_base_layer(), f.weight_name)) for f in factors.values()}
    if len(weights) < len({id(f.layer) for f in factors.values()}):
        return 0.0  # Zamba2's layers share base weights, to which PEFT adds the product of each
    merged = copy.deepcopy(model)
    into = adapted(merged)
    before = {name: f.base_weight().double().clone() for name, f in factors.items()}
    bases = {name: f.layer.get_base_layer() for name, f in into.items()}
    merged.merge_and_unload()
    worst = 0.0
    for name, f in factors.items():
        A, B = f.copies()
        delta = f.scale * B @ A
        weight = getattr(bases[name], f.weight_name).detach()
        added = (weight if f.expert is None else weight[f.expert[0]]).double() - before[name]
        added = added if added.shape == delta.shape and torch.allclose(added, delta, atol=1e-4) else added.T
        worst = max(worst, float((added - delta).abs().max() / delta.abs().max().clamp(min=1e-6)))
    return worst


def check(model: Any, token_ids: Tensor, loss: Any) -> str:
    """Record and protect `model` against the dense computation.

    Args:
        model: A PEFT model of rank RANK.
        token_ids: Rows of token ids, at least 4·(STEPS + 1).
        loss: loss(model, rows) of some rows.

    Returns:
        "right, n, e", with n matrices of which those without a gradient are counted, and e the largest error; or
        "WRONG …".
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    dense = DensePath(adapted(model))
    recorders = [
        ImportanceRecorder(model, "float32", method="path_integral"),
        ImportanceRecorder(model, "factored", method="path_integral"),
    ]
    covered = {id(parameter) for each in dense.factors.values() for parameter in each.parameters}
    if {id(p) for p in parameters} != covered:
        return "WRONG: a trained parameter is no factor of a matrix"
    optimizer = torch.optim.AdamW(parameters, lr=LR)
    detach = [recorder.attach(optimizer) for recorder in recorders]
    optimizer.register_step_pre_hook(lambda *call: dense.before(LR))
    optimizer.register_step_post_hook(lambda *call: dense.after())

    def steps(first: int, count: int) -> None:
        for number in range(first, first + count):
            loss(model, token_ids[4 * number :][:4]).backward()
            optimizer.step()
            optimizer.zero_grad()

    steps(0, STEPS)
    for end in detach:
        end()
    errors = [error(recorder.omega, dense.omega) for recorder in recorders]
    expected = dense.importance()
    zero = sum(not bool(omega.any()) for omega in dense.omega.values())
    whole, factored = (recorder.consolidate(XI) for recorder in recorders)
    errors.append(error({name: m.omega for name, m in whole.matrices.items()}, expected))
    general = {name: f.copies() for name, f in dense.factors.items()}
    steps(STEPS, 1)
    for importance in (whole, factored):
        errors += penalty_errors(model, importance, general)
    errors.append(merge_error(model) / 100)  # a merged weight is rounded in float32
    count = f"{len(expected)}" + (f" ({zero} zero)" if zero else "")
    return verdict(max(errors), count)


def verdict(worst: float, count: str = "") -> str:
    """ "right" up to float32's rounding."""
    parts = [count] if count else []
    return ", ".join([("right" if worst < 1e-4 else "WRONG"), *parts, f"{worst:.0e}"])


def check_squares(model: Any, token_ids: Tensor) -> str:
    """Squared gradients of the base weights, example by example, by training the base weight itself."""
    rows = token_ids[:4]
    got = fisher_of_sequences(model, rows, 0, labels="text", batch_size=2)
    names = list(adapted(model))
    weights = {name: model.get_parameter(f"base_model.model.{name}.base_layer.weight") for name in names}
    if len({id(weight) for weight in weights.values()}) < len(names):
        return "not compared: layers share a base weight, whose gradient is the sum of theirs"
    inert = _without_effect(model, rows)
    for weight in weights.values():
        weight.requires_grad_(True)
    sums = {name: torch.zeros(weight.shape, dtype=torch.float64) for name, weight in weights.items()}
    model.eval()
    with model.disable_adapter():
        for row in rows:
            model.zero_grad(set_to_none=True)
            logits = model(input_ids=row[None], use_cache=False).logits[0, :-1]
            nn.functional.cross_entropy(logits, row[1:], reduction="sum").backward()
            for name, weight in weights.items():
                if weight.grad is not None:
                    sums[name] += weight.grad.double() ** 2
    predicted = rows.shape[0] * (rows.shape[1] - 1)
    layers = {name: model.get_submodule(f"base_model.model.{name}") for name in names}
    turned = {name: bool(layer.fan_in_fan_out) for name, layer in layers.items()}  # GPT-2's layers keep Wᵀ
    expected = {
        name: (total.T if turned[name] else total) / predicted * (name not in inert) for name, total in sums.items()
    }
    return verdict(error({name: m.omega for name, m in got.matrices.items()}, expected))


def _without_effect(model: Any, rows: Tensor) -> set[str]:
    """Matrices whose layer the model goes round, as Jamba does with dt_proj: PEFT's LoRA changes nothing there."""
    model(input_ids=rows, labels=rows).loss.backward()
    found = {name for name, f in adapted(model).items() if f.parameters[1].grad is None}
    model.zero_grad(set_to_none=True)
    return found
