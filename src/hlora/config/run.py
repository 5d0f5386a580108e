"""The configuration of a run, and the paper's preset."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from hlora.config.domains import Domains, RunDomain
from hlora.config.paths import PathText, located
from hlora.config.sections import (
    EvaluationConfig,
    GeneralConfig,
    ImportanceConfig,
    LoraSettings,
    ModelConfig,
    PenaltyConfig,
    Section,
)
from hlora.config.training import TrainingConfig, check_without_evaluation, with_evaluation

Seed = Annotated[int, Field(ge=0, lt=2**32)]  # the range that NumPy accepts

Baseline = Literal["lora", "lora_after_general"]

PAPER: dict[str, dict[str, Any]] = {
    "lora": {"rank": 8, "alpha": 32, "target_modules": ["q_proj", "v_proj"]},
    "importance": {"method": "path_integral", "encoding": "float32"},
    "penalty": {"layer_weights": "softmax", "anchor": "general", "group": "matrix", "phi": 9.0},
    "training": {"general_rate": 1.0},
}
"""What `preset: paper` uses instead of our defaults."""


class Preset(Section):
    preset: Literal["paper"] | None = None
    """paper: the paper's setting for every field that the configuration does not set. The paper gives neither xi nor a
    phi that transfers between models, so our defaults are used for both."""

    @model_validator(mode="before")
    @classmethod
    def _under_the_preset(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        if isinstance(fields.get("importance"), str):  # importance: NAME
            fields = {**fields, "importance": {"use": fields["importance"]}}
        if fields.get("preset") != "paper":
            return fields
        given = {name: fields.get(name) or {} for name in PAPER}
        if not all(isinstance(section, dict) for section in given.values()):
            return fields  # not a section, which validation reports
        return {**fields, **{name: {**PAPER[name], **section} for name, section in given.items()}}


class RunConfig(Preset):
    output: PathText
    """Directory for everything that the run writes."""
    after: PathText | None = None
    """Output directory of a finished run to go on from. The domain phase starts from its adapter, and is held by the
    importance of the general text and of every domain before this one. Nothing is recorded on general text."""
    seed: Seed = 0
    """Seed of new adapters, data order and sampling."""
    model: ModelConfig
    """The base model."""
    lora: LoraSettings = LoraSettings()
    """The adapter."""
    general: GeneralConfig
    """The general task: what the model should not forget."""
    domain: RunDomain = None  # type: ignore[assignment]  # only until _has_a_domain
    """The domain task: what the model should learn."""
    domains: Domains = []
    """In place of `domain`: several domains, learned one after another. Each is a run of its own in `output`/NAME that
    goes on from the one before, as with `after`. Each entry has the fields of `domain`, and a name."""
    importance: ImportanceConfig = ImportanceConfig()
    """How importance is recorded."""
    penalty: PenaltyConfig = PenaltyConfig()
    """How importance protects."""
    training: TrainingConfig = TrainingConfig()
    """Arguments of TRL's SFTTrainer."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """What is measured before and after."""
    baselines: list[Baseline] = []
    """Runs without a penalty to compare with: lora (domain only), lora_after_general (general phase, then domain)."""

    @model_validator(mode="before")
    @classmethod
    def _is_not_a_comparison(cls, fields: Any) -> Any:
        for name in ("tasks", "arms", "methods", "orders"):
            if isinstance(fields, dict) and name in fields and name not in cls.model_fields:
                raise ValueError(
                    f"{name}: a field of a comparison, which `hlora compare` runs. Of a single run, leave it out "
                    "(`hlora config` prints the fields that it has)"
                )
        return fields

    @model_validator(mode="after")
    def _has_a_domain(self) -> RunConfig:
        if self.domains and self.domain is not None:
            raise ValueError("domain: domains names every domain. Leave one of the two out")
        if not self.domains and self.domain is None:
            raise ValueError("domain: required, but missing")
        if self.domains:
            self.domain = self.domains[-1]
        return self

    @model_validator(mode="after")
    def _evaluates_where_there_are_rows(self) -> RunConfig:
        domains: list[RunDomain] = [*self.domains] or [self.domain]
        with_rows = [each.validation is not None for each in domains]
        if any(with_rows) and not all(with_rows):
            raise ValueError("domains: expected validation in every domain or in none")
        if with_rows[0]:
            self.training = self.training.model_copy(update={"tune": with_evaluation(self.training.tune)})
        else:
            check_without_evaluation(self.training, "set domain.validation, the rows to evaluate on")
        return self

    @model_validator(mode="after")
    def _probe_is_not_evaluated(self) -> RunConfig:
        for name, path in self.penalty.probe_texts.items():
            same = [text for text, file in self.evaluation.texts.items() if Path(file) == Path(path)]
            if same:
                raise ValueError(
                    f"penalty.probe_texts: {name!r} is the evaluation text {same[0]!r}. A budget must not be steered "
                    "on the text that it is evaluated on; name another file"
                )
        return self

    def for_a_file(self) -> dict[str, Any]:
        """The fields as the files of a run hold them, with a local model by its absolute path."""
        fields = self.model_dump()
        return {**fields, "model": {**fields["model"], "name": located(self.model.name)}}

    @property
    def in_one_pass(self) -> bool:
        """Whether importance is recorded at the base model, so that there is no general phase."""
        return self.importance.method == "squared_gradients" and self.penalty.anchor == "base"

    @property
    def is_given_importance(self) -> bool:
        """Whether the importance was recorded before: by the run that this one comes after, or the one it names."""
        return self.importance.use is not None or self.after is not None

    @model_validator(mode="after")
    def _goes_on_from_an_adapter(self) -> RunConfig:
        if self.after is not None and self.importance.use is not None:
            raise ValueError("importance.use: after brings the importance of the run before. Leave one of them out")
        if (self.after is not None or len(self.domains) > 1) and self.penalty.anchor == "base":
            field = "domains" if self.after is None else "after"
            raise ValueError(
                f"penalty.anchor: {field} starts from the adapter of the run before and holds the model to it; set "
                "penalty.anchor to general"
            )
        return self

    @model_validator(mode="after")
    def _squares_are_kept_as_sums(self) -> RunConfig:
        if self.is_given_importance:  # it knows its own method
            return self
        if self.importance.method == "squared_gradients" and not self.in_one_pass:
            if self.importance.encoding != "factored":
                raise ValueError(
                    "importance.encoding: squared gradients along a general phase are kept as row and column sums; "
                    "set importance.encoding to factored, or importance.method to path_integral"
                )
            if self.importance.gradient == "effective":
                raise ValueError(
                    "importance.gradient: squared gradients along a general phase are exact; remove the field, or "
                    "set penalty.anchor to base"
                )
        return self
