"""Axolotl: a plugin that protects, or records, as the configuration's `hlora` section says.

plugins: [hlora.integrations.axolotl.HloraPlugin]
hlora: {importance: runs/general/importance, phi: 1.0}
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, ConfigDict, model_validator

import hlora
from hlora.system.choices import Anchor, Group, LayerWeights, Method, PhiScale, Unprotected


class HloraSettings(BaseModel):
    """Either `importance` and `phi`, to protect; or `record`, a directory to save importance to."""

    model_config = ConfigDict(extra="forbid")

    importance: str | None = None
    phi: float | None = None
    layer_weights: LayerWeights | None = None
    phi_scale: PhiScale = "relative"
    group: Group = "matrix"
    anchor: Anchor = "general"
    record: str | None = None
    method: Method = "squared_gradients"
    xi: float = 1e-3
    stop_at_move: float | None = None
    unprotected: Unprotected = "refuse"

    @model_validator(mode="after")
    def _one_of_two(self) -> HloraSettings:
        if (self.importance is None) == (self.record is None) or (self.importance is None) != (self.phi is None):
            raise ValueError("hlora: expected importance and phi, to protect; or record, to save importance")
        return self


class HloraArgs(BaseModel):
    """What the plugin adds to Axolotl's configuration."""

    hlora: HloraSettings


class HloraPlugin(BasePlugin):
    """Adds the penalty or the recorder to the trainer that Axolotl has built."""

    def get_input_args(self) -> str:
        return f"{__name__}.{HloraArgs.__name__}"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        settings = HloraSettings(**dict(cfg.hlora))
        if settings.record is not None:
            options = settings.model_dump(include={"xi", "stop_at_move", "method", "unprotected"})
            trainer.add_callback(hlora.RecordCallback(settings.record, **options))
        if settings.importance is not None and settings.phi is not None:
            options = settings.model_dump(include={"layer_weights", "phi_scale", "group", "anchor"})
            hlora.protect(trainer, settings.importance, settings.phi, **options)
