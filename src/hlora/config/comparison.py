"""The configuration of a comparison: arms, tasks, seeds, strengths; and of one of its cells."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from hlora.config.paths import PathText
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
from hlora.config.training import TrainingConfig, check_without_evaluation
from hlora.methods import METHODS

if TYPE_CHECKING:
    MethodName = str
else:
    MethodName = Literal[tuple(METHODS)]

Strength = Annotated[float, Field(ge=0)]

NOT_VALIDATED = (
    "a comparison measures before and after training, and chooses strengths on selection.rows training rows. Leave it "
    "out, or tune this domain alone with `hlora run`"
)
_OF_A_RUN = {
    "domain": "a comparison names its domains under tasks: {NAME: {task, train, test}}",
    "domains": (
        "with tasks, each method is tuned on single domains. Leave domains out, or leave tasks and arms out to compare "
        "how methods learn one domain after another"
    ),
    "after": "a comparison tunes each method from the base model. Use `hlora run` to go on from a finished run",
    "baselines": "a comparison has arms. Add one of method lora, or of lora_after_general",
}
"""Fields of a run that a comparison does not have, and what to do instead."""


class FisherConfig(Section):
    examples: int = Field(default=128, ge=1)
    """Number of sequences of general text that EWC-LoRA's Fisher information and LaLoRA's curvature are estimated on
    (paper, EWC-LoRA: 20,000)."""
    max_length: int = Field(default=128, ge=2)
    """Length of each sequence, in tokens."""
    batch_size: int = Field(default=8, ge=1)
    """Number of sequences in one backward pass (paper: at most 8)."""


class ArmConfig(Section):
    method: MethodName
    """How the arm is tuned; src/hlora/methods.py lists the methods."""
    strengths: Annotated[list[Strength], AfterValidator(each_once)] = []
    """Values of the method's strength to choose from, such as phi of hlora; for methods that have a strength."""
    tasks: list[str] = []
    """Tasks that this arm runs on. Empty: all of them."""
    seeds: Annotated[list[int], AfterValidator(each_once)] = []
    """Seeds that this arm runs with. Empty: all of them."""
    settings: dict[str, Any] = {}
    """Fields of a run that this arm changes, by path: {importance.xi: 1e-6}."""


class SelectionConfig(Section):
    rows: int = Field(default=100, ge=1)
    """Number of training rows that no arm trains on, to choose strengths with."""
    texts: dict[str, PathText] = {}
    """More general texts to choose strengths with, name to file. The last tenth of the general text always is one."""
    seeds: int = Field(default=1, ge=1)
    """Number of seeds that every strength runs with, from the first one. The chosen strength runs with all seeds."""
    kept_learning: float = Field(default=0.9, ge=0, le=1)
    """A strength must keep this share of what plain LoRA learns (the fall of the answer NLL on the held-out rows).
    Of those that do, the one with the lowest general loss is chosen."""


class CompareConfig(Preset):
    output: PathText
    """Directory for finished cells, tables, figures and the report."""
    seeds: Annotated[list[Seed], AfterValidator(each_once)] = Field(default=[0, 1, 2], min_length=1)
    """Seeds of new adapters, data order and sampling."""
    model: ModelConfig
    """The base model."""
    lora: LoraSettings = LoraSettings()
    """The adapter."""
    general: GeneralConfig
    """The general task: what the model should not forget."""
    tasks: dict[str, DomainConfig] = Field(min_length=1)
    """The domain tasks, each by a name of your choice."""
    arms: dict[str, ArmConfig] = Field(min_length=1)
    """The methods to compare, each by the name that tables and figures show."""
    importance: ImportanceConfig = ImportanceConfig()
    """How importance is recorded."""
    penalty: PenaltyConfig = PenaltyConfig()
    """How importance protects. phi is the strength of arms that name none."""
    fisher: FisherConfig = FisherConfig()
    """EWC-LoRA's importance, and LaLoRA's curvature."""
    training: TrainingConfig = TrainingConfig()
    """Arguments of TRL's SFTTrainer, the same for every arm."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """What is measured."""
    selection: SelectionConfig = SelectionConfig()
    """How a strength is chosen for each arm."""
    ours: str | None = None
    """Arm that tests and figures single out; by default the first of method hlora."""
    rival: str | None = None
    """Arm that `ours` is tested against; by default the first of method ewc."""
    unprotected: str | None = None
    """Arm that shows what can be learned without protection; by default the first of method lora."""
    ablation: list[str] = []
    """Arms of Table 2 (ablation); no such table when empty."""

    @model_validator(mode="before")
    @classmethod
    def _is_not_a_run(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        for field, instead in _OF_A_RUN.items():
            if field in fields:
                raise ValueError(f"{field}: {instead}")
        tasks = fields.get("tasks")
        for name, task in tasks.items() if isinstance(tasks, dict) else ():
            for field in ("validation", "patience"):
                if isinstance(task, dict) and field in task:
                    raise ValueError(f"tasks.{name}.{field}: {NOT_VALIDATED}")
        return fields

    @model_validator(mode="after")
    def _records_its_own(self) -> CompareConfig:
        if self.importance.use is not None:
            raise ValueError("importance.use: a comparison records importance for each seed. Leave it out")
        return self

    @model_validator(mode="after")
    def _evaluates_afterwards(self) -> CompareConfig:
        check_without_evaluation(self.training, "a comparison measures before and after training, not during it")
        return self

    @model_validator(mode="after")
    def _chooses_on_no_test_text(self) -> CompareConfig:
        for name, path in self.selection.texts.items():
            same = [text for text, file in self.evaluation.texts.items() if Path(file) == Path(path)]
            if same:
                raise ValueError(
                    f"selection.texts: {name!r} is the evaluation text {same[0]!r}. Strengths must not be chosen on "
                    "the text that they are compared on; name another file"
                )
        return self

    @model_validator(mode="after")
    def _roles_are_arms(self) -> CompareConfig:
        roles = [(field, getattr(self, field)) for field in ("ours", "rival", "unprotected")]
        for field, role in [*roles, *(("ablation", each) for each in self.ablation)]:
            if role and role not in self.arms:
                raise ValueError(f"{field}: no arm {role!r}; arms has {', '.join(self.arms)}")
        self.ours = self.ours or self._first("hlora") or list(self.arms)[-1]
        self.rival, self.unprotected = self.rival or self._first("ewc"), self.unprotected or self._first("lora")
        if not self.unprotected and any(len(arm.strengths) > 1 for arm in self.arms.values()):
            raise ValueError("unprotected: strengths are chosen by what an arm of method lora learns; add one to arms")
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

    @model_validator(mode="after")
    def _strengths_can_be_chosen(self) -> CompareConfig:
        """An arm of several strengths needs a seed to choose one on, and what plain LoRA and the base reach there."""
        seeds = self.seeds[: self.selection.seeds]
        base = next(name for name, arm in self.arms.items() if arm.method == "base")
        for name, arm in self.arms.items():
            if len(arm.strengths) < 2:
                continue
            for needed in (name, base, self.unprotected or ""):
                other = self.arms[needed]
                lacking = [task for task in arm.tasks or self.tasks if task not in (other.tasks or self.tasks)]
                if lacking:
                    raise ValueError(
                        f"arms: the strengths of {name!r} on {lacking[0]!r} are chosen by what {needed!r} reaches "
                        "there, which its tasks leave out. Add the task, or give one strength"
                    )
                if other.method != "base" and not {*(other.seeds or seeds)} & {*seeds}:
                    raise ValueError(
                        f"arms: the strengths of {name!r} are chosen on seed {', '.join(map(str, seeds))} "
                        f"(selection.seeds), which the seeds of {needed!r} leave out. Add it, or give one strength"
                    )
        return self

    def _first(self, method: str) -> str | None:
        """The first arm of a method; None where no arm has it."""
        return next((name for name, arm in self.arms.items() if arm.method == method), None)


class CellConfig(RunConfig):
    """One cell of a comparison: a run, its method and the method's strength."""

    method: MethodName
    """How the model is tuned."""
    strength: Strength | None = None
    """Strength of the method's protection, if it has one."""
    fisher: FisherConfig = FisherConfig()
    """EWC-LoRA's importance, and LaLoRA's curvature."""
    held_out_rows: int = 0
    """Number of training rows that no arm trains on."""
