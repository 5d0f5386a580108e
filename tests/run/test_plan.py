"""The time that a run will still take, as its progress line says it."""

from __future__ import annotations

import pytest

from hlora.run.plan import Plan
from hlora.system import progress

PHASES = ["evaluate base", "record", "evaluate after_general", "tune", "evaluate hlora"]


@pytest.mark.parametrize(("tokens", "of_domain"), [({"record": 1024.0, "tune": 256.0}, 2.5), ({}, 10.0)])
def test_a_step_of_the_domain_phase_is_estimated_by_its_tokens_from_one_of_the_general_phase(
    tokens: dict[str, float], of_domain: float
) -> None:
    plan = Plan(PHASES, {"evaluate base": 60.0}, {"tune": 30}, tokens)
    left = plan.left("record", spent=40.0, here=200.0, parts=24)  # 10 s a step
    assert left == pytest.approx(200 + 60 + 30 * of_domain + 60)


def test_the_time_left_after_a_resumed_phase_counts_the_steps_since_it_resumed() -> None:
    plan = Plan(["record", "tune"], {}, {"tune": 30})
    with progress.phase("phase 1 of 2, record", lambda left, parts: plan.left("record", 10.0, left, parts)):
        line = progress.Line("step", 1000, 900)
        said = line._text(910, "", line._started + 10.0)  # a second a step
    assert said == "phase 1 of 2, record: step 910 of 1,000, 1:30 left, run 2:00"
