"""Arms can be told apart."""

from __future__ import annotations

from made_comparison import ARMS, make_comparison

from hlora.report.comparison.arm_styles import OTHER_GREYS, styles_by_arm
from hlora.report.style import GREEN


def test_no_two_arms_look_alike_and_the_papers_are_in_colour():
    comparison = make_comparison(tasks=["piqa"])
    styles = styles_by_arm(comparison)
    assert len({(colour, str(marker), str(line)) for colour, marker, line in styles.values()}) == len(ARMS)
    assert len({str(marker) for _, marker, _ in styles.values()}) == len(ARMS)
    coloured = [arm for arm, (colour, _, _) in styles.items() if colour not in OTHER_GREYS]
    assert coloured == ["Base", "LoRA(μ)", "LoRA(ν+μ)", "rsLoRA", "EWC-LoRA", "HLoRA"]


def test_our_arm_has_the_main_colour_whatever_its_method(small_comparison):
    small_comparison["ours"] = "LoRA(μ)"
    assert styles_by_arm(small_comparison)["LoRA(μ)"][0] == GREEN
