"""Every way to tune a model that hlora knows, one line each: what a run, a comparison and a report need to know of it.

A new method is a file in comparison/rivals/ and a line here. Methods are named, not imported, so that reading a
configuration or writing a report loads no model.
"""

from __future__ import annotations

from pkgutil import resolve_name
from typing import Any, Literal, NamedTuple

ArmStyle = tuple[str, Any, Any]
"""Colour (a name in report/style.py), Matplotlib marker and line."""


class Method(NamedTuple):
    """One way to tune the base model."""

    label: str
    """What people read."""
    run: str
    """module:function. It takes the job, then `importance` and `strength` where the method has them, as keywords; it
    returns the tuned model and the losses, and raises CannotRun where it does not work on the job's model."""
    needs: Literal["importance", "general", "fisher"] | None = None
    """What is made once a seed and shared: the recorded importance of each weight, the general phase alone, or the
    Fisher information."""
    strength: str | None = None
    """What `strengths` of a comparison are; None where the method has no strength."""
    alters_base: bool = False
    """It leaves the base model with other weights, even when it raises: load the base again before the next use."""
    reference: bool = False
    """It never sees the domain: others are compared with it, and it is ranked nowhere."""
    style: ArmStyle | None = None
    """In figures; grey where it is None."""

    def function(self) -> Any:
        """The function that `run` names."""
        return resolve_name(self.run)


_OURS, _RIVALS = "hlora.comparison.paper", "hlora.comparison.rivals"

METHODS: dict[str, Method] = {
    "base": Method("Base", f"{_OURS}:base", reference=True, style=("black", "P", ":")),
    "after_general": Method(
        "After general phase", f"{_OURS}:after_general", "general", reference=True, style=("purple", "*", ":")
    ),
    "lora": Method("LoRA (domain only)", "hlora.run.phases:lora", style=("vermilion", "X", "-.")),
    "lora_after_general": Method(
        "LoRA (general, then domain)",
        "hlora.run.phases:lora_after_general",
        "general",
        style=("orange", "D", (0, (5, 1))),
    ),
    "rslora": Method("rsLoRA", f"{_OURS}:rslora", style=("sky", "^", ":")),
    "ewc": Method("EWC-LoRA", f"{_OURS}:ewc", "fisher", "λ", style=("blue", "s", "--")),
    "hlora": Method("HLoRA", f"{_OURS}:hlora", "importance", "φ", style=("green", "o", "-")),
    "uniform": Method("HLoRA, uniform importance", f"{_OURS}:uniform", "general", "φ"),
    "replay": Method("Replay", f"{_RIVALS}.replay:replay", strength="share of general rows"),
    "kl": Method("KL to base", f"{_RIVALS}.kl:kl", strength="β"),
    "general_kl": Method("KL to base, general text", f"{_RIVALS}.general_kl:general_kl", strength="β"),
    "eaft": Method("EAFT", f"{_RIVALS}.eaft:eaft", strength="α"),
    "lalora": Method("LaLoRA", f"{_RIVALS}.lalora:lalora", strength="λ"),
    "osf": Method("OSF", f"{_RIVALS}.osf:osf", strength="share of the rank kept frozen"),
    "corda": Method("CorDA", f"{_RIVALS}.corda:corda", alters_base=True),
    "mlp": Method("LoRA on the MLP", f"{_RIVALS}.mlp:mlp"),
}
"""By the name that configurations and results use."""

BEFORE = "before this domain"
"""The arm of the adapter that a run after another starts from."""
STARTS = ("after_general", BEFORE)
"""The arms where a domain phase starts."""

_CHAINS = "hlora.comparison.chains.methods"

CHAINS: dict[str, Method] = {
    "hlora": Method("HLoRA", f"{_CHAINS}:hlora"),
    "uniform": Method("HLoRA, uniform importance", f"{_CHAINS}:uniform"),
    "sequential": Method("Sequential LoRA", f"{_CHAINS}:sequential"),
    "replay": Method("Sequential LoRA with replay of earlier domains", f"{_CHAINS}:replay"),
    "online_ewc": Method("Online EWC", f"{_CHAINS}:online_ewc"),
    "olora": Method("O-LoRA", f"{_CHAINS}:olora"),
    "one_each": Method("One adapter a domain (bound)", f"{_CHAINS}:one_each"),
}
"""Ways to learn one domain after another. The function takes a job for each domain, and yields the model after each."""


def label_of(method: str) -> str:
    """What people read for a method; an unknown name stays as it is."""
    return METHODS[method].label if method in METHODS else method
