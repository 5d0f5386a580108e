"""The time that a run will still take, as its progress line says it."""

from __future__ import annotations

import pytest

from hlora.run.plan import Plan

PHASES = ["evaluate base", "record", "evaluate after_general", "tune", "evaluate hlora"]


@pytest.mark.parametrize(("tokens", "of_domain"), [({"record": 1024.0, "tune": 256.0}, 2.5), ({}, 10.0)])
def test_a_step_of_the_domain_phase_is_estimated_by_its_tokens_from_one_of_the_general_phase(
    tokens: dict[str, float], of_domain: float
) -> None:
    plan = Plan(PHASES, {"evaluate base": 60.0}, {"tune": 30}, tokens)
    left = plan.left("record", spent=40.0, here=200.0, parts=24)  # 10 s a step
    assert left == pytest.approx(200 + 60 + 30 * of_domain + 60)
