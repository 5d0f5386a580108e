"""The configuration of a comparison: arms, tasks, seeds, strengths; and of one of its cells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from hlora.config.run import Preset, RunConfig, Seed
from hlora.config.sections import (
    DomainConfig,
    EvaluationConfig,
    GeneralConfig,
    ImportanceConfig,
    LoraSettings,
    ModelConfig,
    PenaltyConfig,
    Section,
    each_once,
)
from hlora.config.training import TrainingConfig
from hlora.methods import METHODS

if TYPE_CHECKING:
    MethodName = str
else:
    MethodName = Literal[tuple(METHODS)]

Strength = Annotated[float, Field(ge=0)]


class FisherConfig(Section):
    examples: int = Field(default=128, ge=1)
    """Sequences of general text that EWC-LoRA's Fisher information is taken on (paper: 20,000)."""
    max_length: int = Field(default=128, ge=2)
    """Tokens of each."""
    batch_size: int = Field(default=8, ge=1)
    """Sequences in one backward pass (paper: at most 8)."""


class ArmConfig(Section):
    method: MethodName
    """How the arm is tuned; src/hlora/methods.py lists the methods."""
    strengths: Annotated[list[Strength], AfterValidator(each_once)] = []
    """Values of the method's strength to choose from, such as phi of hlora; for methods that have a strength."""
    tasks: list[str] = []
    """Tasks that it runs on; all of them when empty."""
    seeds: Annotated[list[int], AfterValidator(each_once)] = []
    """Seeds that it runs with; all of them when empty."""
    settings: dict[str, Any] = {}
    """What this arm changes in the settings of a run, by path: {importance.xi: 1e-6}."""


class SelectionConfig(Section):
    rows: int = Field(default=100, ge=1)
    """Training rows held out from every arm, to choose strengths on."""
    texts: dict[str, str] = {}
    """More general texts to choose on, name to file. The held-out tenth of the general text is always one."""
    seeds: int = Field(default=1, ge=1)
    """Every strength runs on the first so many seeds; the chosen one on all."""
    kept_learning: float = Field(default=0.9, ge=0, le=1)
    """Of the strengths that keep this share of what unprotected LoRA learned (fall of the answers' NLL on the held-out
    rows), the one with the lowest general loss is chosen."""


class CompareConfig(Preset):
    output: str
    """Directory of the grid: finished cells, tables, figures, report."""
    seeds: Annotated[list[Seed], AfterValidator(each_once)] = Field(default=[0, 1, 2], min_length=1)
    """Seeds of adapters, data order and sampling."""
    model: ModelConfig
    """The base model."""
    lora: LoraSettings = LoraSettings()
    """The adapter."""
    general: GeneralConfig
    """The general task: what the model should not forget."""
    tasks: dict[str, DomainConfig] = Field(min_length=1)
    """The domain tasks by name."""
    arms: dict[str, ArmConfig] = Field(min_length=1)
    """The methods to compare, by the name that tables and figures show."""
    importance: ImportanceConfig = ImportanceConfig()
    """How importance is recorded."""
    penalty: PenaltyConfig = PenaltyConfig()
    """How it protects; phi is the strength where an arm names none."""
    fisher: FisherConfig = FisherConfig()
    """EWC-LoRA's importance."""
    training: TrainingConfig = TrainingConfig()
    """Arguments handed to TRL, the same for every arm."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """What is measured."""
    selection: SelectionConfig = SelectionConfig()
    """How strengths are chosen."""
    ours: str = "HLoRA"
    """Arm that tests and figures are about."""
    rival: str = "EWC-LoRA"
    """Arm that it is tested against."""
    unprotected: str = "LoRA(μ)"
    """Arm that says what can be learned without protection."""
    ablation: list[str] = ["LoRA(ν+μ)", "HLoRA w/o layer weights", "HLoRA"]
    """Arms of Table 2."""

    @model_validator(mode="after")
    def _records_its_own(self) -> CompareConfig:
        if self.importance.use is not None:
            raise ValueError("importance.use: a comparison records importance for each seed. Leave it out")
        return self

    @model_validator(mode="after")
    def _roles_are_arms(self) -> CompareConfig:
        if self.unprotected not in self.arms and any(len(arm.strengths) > 1 for arm in self.arms.values()):
            raise ValueError(f"unprotected: no arm {self.unprotected!r}, yet strengths are chosen by what it learns")
        for name, arm in self.arms.items():
            if arm.strengths and METHODS[arm.method].strength is None:
                raise ValueError(f"arms: {name!r} has strengths, but its method, {arm.method}, takes none; remove them")
            for word, named, known in (("task", arm.tasks, list(self.tasks)), ("seed", arm.seeds, self.seeds)):
                unknown = [each for each in named if each not in known]
                if unknown:
                    valid = ", ".join(map(str, known))
                    raise ValueError(f"arms: {name!r} names the {word} {unknown[0]!r}; {word}s has {valid}")
        if not any(arm.method == "base" for arm in self.arms.values()):
            self.arms = {"Base": ArmConfig(method="base"), **self.arms}  # what forgetting is counted from
        return self


class CellConfig(RunConfig):
    """One cell of a comparison: a run, its method and the method's strength."""

    method: MethodName
    """How the model is tuned."""
    strength: Strength | None = None
    """Of the method's protection, where it has one."""
    fisher: FisherConfig = FisherConfig()
    """EWC-LoRA's importance."""
    held_out_rows: int = 0
    """Training rows that no arm trains on."""
