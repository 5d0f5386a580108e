"""The YAML as Pydantic models. Every field says what it is, its unit and where its default is from.

The docstring below a field is its help: `hlora config` prints it as the comment of a starting YAML.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from textwrap import wrap
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

from hlora.errors import ConfigError
from hlora.redaction import MARK, is_secret_name, redact_argument

_EXPONENT = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$")

EncodingName = Literal["float32", "factored"]
LayerWeights = Literal["softmax", "norm_share", "uniform", "sum"]
PhiScale = Literal["relative", "paper"]
TaskName = Literal["sciq", "piqa", "medmcqa", "multiple_choice", "rows"]
Arm = Literal["lora_mu", "lora_nu_mu"]
MethodName = Literal[
    "base", "after_general", "lora", "lora_after_general", "rslora", "ewc", "hlora", "l2",
    "replay", "kl", "osf", "corda", "mlp",
]  # fmt: skip


class _Section(BaseModel):
    """Unknown fields are errors, and field docstrings become descriptions."""

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, protected_namespaces=()
    )

    @field_validator("*", mode="wrap")
    @classmethod
    def _is_meant(cls, value: Any, read_by: ValidatorFunctionWrapHandler) -> Any:
        """Refuses what Pydantic takes though nobody means it: true as 1, no name at all, a number beyond 64 bits."""
        read = read_by(value)
        for given, each in zip(_inside(value), _inside(read), strict=False):
            if isinstance(given, bool) and isinstance(each, int | float) and not isinstance(each, bool):
                raise ValueError("expected a number, not true or false")
            if isinstance(each, int) and not -(2**63) <= each < 2**63:
                raise ValueError("expected a number that 64 bits hold")
            if isinstance(each, str) and ("\0" in each or any("\ud800" <= letter <= "\udfff" for letter in each)):
                raise ValueError("expected text without the character NUL and halves of surrogate pairs")
            if each == "":
                raise ValueError("expected text, not an empty one")
        return read


def _inside(value: Any) -> list[Any]:
    return [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else [value]


def _each_once(values: list[Any]) -> list[Any]:
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"{value} is a duplicate; expected each once")
    return values


class ModelConfig(_Section):
    name: str
    """Base model: a local directory or a hub name. `smollm2-135m`: the embedded default, from the package index."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    gguf_file: str | None = None
    """GGUF file inside `name`, when the weights are kept in that format."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the base weights. auto: bfloat16 on an accelerator that has it, float32 on a CPU."""
    quantization: Literal["4bit", "8bit"] | None = None
    """Keep the weights of the linear layers in 4 bits (nf4 with double quantisation, as QLoRA has it) or 8 bits
    (LLM.int8), by bitsandbytes. See docs/guides/quantised.md."""
    device: str = "auto"
    """auto: cuda, else mps, else cpu. Or a torch device such as cuda:1."""
    trust_remote_code: bool = False
    """Run Python code shipped with the model. Off unless you trust its author."""

    @field_validator("device")
    @classmethod
    def _is_a_device(cls, value: str) -> str:
        import torch

        try:
            torch.device("cpu" if value == "auto" else value)
        except RuntimeError:
            raise ValueError("expected auto, cuda, mps, cpu, or a torch device such as cuda:1") from None
        return value

    @model_validator(mode="after")
    def _quantises_what_is_whole(self) -> ModelConfig:
        if self.quantization and self.gguf_file:
            raise ValueError("quantization: a GGUF file cannot be quantised again; name a model in safetensors")
        return self


class LoraSettings(_Section):
    rank: int = Field(default=8, ge=1)
    """LoRA rank r (paper: 8)."""
    alpha: float = Field(default=32, gt=0)
    """LoRA alpha; the scale is alpha/r (paper: 32)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before A."""
    target_modules: list[str] | str = ["q_proj", "v_proj"]
    """Matrices to adapt and protect (paper: q_proj, v_proj), or `all-linear`: every linear layer but the output's. Of a
    mixture of experts name the attention's: experts kept as one parameter are refused."""
    rslora: bool = False
    """Scale by alpha/sqrt(r) instead (Kalajdzievski 2023)."""

    @field_validator("target_modules", mode="before")
    @classmethod
    def _names_or_one_pattern(cls, value: Any) -> Any:
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
            raise ValueError("expected a list of module names, or all-linear")
        return value


def _is_a_limit(value: Any) -> Any:
    from hlora.units import allowed

    allowed(value, 0)
    return value


RowLimit = Annotated[int | str, BeforeValidator(_is_a_limit)]


class GeneralSource(_Section):
    """One source of general text."""

    source: Literal["files", "hub", "model"] = "files"
    """Where the general text comes from: local files, a hub data set, or samples of the base model itself."""
    paths: list[str] = []
    """files: .txt, .jsonl or .parquet."""
    dataset: str | None = None
    """hub: name of the data set."""
    subset: str | None = None
    """hub: name of the configuration."""
    split: str = "train"
    """hub: split to read."""
    column: str = "text"
    """Column that holds the text (.jsonl, .parquet, hub)."""
    max_documents: int | None = Field(default=None, ge=1)
    """Read at most so many documents. Hub data sets are streamed up to it."""
    max_unusable: RowLimit = "1%"
    """How many rows of a file may be left out because they hold no text: a share, rounded down, or a number of rows.
    They are listed in the report."""
    samples: int = Field(default=256, ge=1)
    """model: sequences to sample."""
    sample_tokens: int = Field(default=128, ge=8)
    """model: tokens in each sampled sequence."""
    temperature: float = Field(default=1.0, gt=0)
    """model: sampling temperature."""

    @model_validator(mode="after")
    def _source_is_complete(self) -> GeneralSource:
        if self.source == "files" and not self.paths and not getattr(self, "mixture", None):
            raise ValueError("source 'files' needs paths, a list of .txt, .jsonl or .parquet files")
        if self.source == "hub" and not self.dataset:
            raise ValueError("source 'hub' needs dataset, the name of a hub data set")
        return self


class WeightedSource(GeneralSource):
    """A source in a mixture."""

    weight: float = Field(default=1.0, gt=0)
    """Its share of the mixture's characters, relative to the other sources'."""


class GeneralConfig(GeneralSource):
    mixture: list[WeightedSource] = []
    """Several sources in place of one, each with the fields above and a weight. Mixed by characters, none repeated:
    the scarcest source for its weight sets how much there is."""


class DomainConfig(_Section):
    task: TaskName
    """sciq, piqa, medmcqa (hub field names), multiple_choice (question, choices, label),
    or rows (prompt/completion or messages)."""
    train: str
    """Training rows: a .jsonl, .parquet or .csv file, or a hub data set."""
    train_split: str = "train"
    """Split to train on, when `train` is a hub data set."""
    test: str
    """Rows to evaluate on, never trained on: a file, or the name of a split of the same hub data set."""
    subset: str | None = None
    """Hub configuration of the data set."""
    max_train_rows: int | None = Field(default=None, ge=1)
    """Train on at most so many rows (seeded choice)."""
    max_unusable: RowLimit = "1%"
    """How many rows of a file may be left out because they cannot be used (an empty cell, a wrong label, a line that is
    no JSON, longer than the model's context): a share, rounded down, or a number of rows. They are listed in the
    report."""


class ImportanceConfig(_Section):
    method: Literal["path_integral", "squared_gradients"] = "path_integral"
    """path_integral: of the general phase's training (Eq. 12, the paper's). squared_gradients: of a few hundred
    sequences at the base model, without training it; it needs penalty.anchor base."""
    encoding: EncodingName = "factored"
    """How importance is kept: float32 (the paper's, 4 bytes an element), or factored (row sums x column sums)."""
    xi: float = Field(default=1e-3, gt=0)
    """Damping constant of Eq. 13, unit weight squared. Not given by the paper."""
    gradient: Literal["effective", "exact"] | None = None
    """squared_gradients: exact (the default), that of the adapted matrix itself; or effective, Eq. 11, which a path
    integral takes."""
    sequences: int = Field(default=256, ge=1)
    """squared_gradients: sequences of general text to take; fewer where it has fewer."""
    sequence_length: int = Field(default=128, ge=2)
    """squared_gradients: tokens of each."""
    stop_at_move: float | None = Field(default=None, gt=0)
    """path_integral: end the general phase early, once it has moved the adapted matrices by this share of their
    norm."""

    @model_validator(mode="after")
    def _squares_what_is_exact(self) -> ImportanceConfig:
        if self.gradient == "exact" and self.method == "path_integral":
            raise ValueError("gradient: a path integral takes the effective one; exact is for squared_gradients")
        return self


class PenaltyConfig(_Section):
    phi: float = Field(default=1.0, ge=0)
    """Weight of the penalty, Eq. 16. With phi_scale relative: nats it costs to undo the general phase once; 1 goes with
    a gentle general phase, one at the domain's learning rate moves farther and takes about 9."""
    phi_scale: PhiScale = "relative"
    """relative: importance is divided by what undoing the general phase would cost, so phi carries over between models.
    paper: as in Eq. 16."""
    layer_weights: LayerWeights = "softmax"
    """softmax: Eq. 15. norm_share: shares of the norm, unchanged by the scale of the importance.
    uniform: no layer weights. sum: each matrix counts in full, the plain sum of EWC."""
    group: Literal["matrix", "block"] = "matrix"
    """What one layer weight covers: each adapted matrix, or each transformer block."""
    anchor: Literal["general", "base"] = "general"
    """What the domain phase is held to: general, where the general phase ended and the domain phase then starts (the
    paper's), or base, the base model, from a fresh adapter."""
    budget: str | float | None = None
    """Forgetting budget in place of phi: how much the general loss may rise over the base model, as a rise of
    perplexity (1%) or in nats a token (0.01). phi is where the steering starts."""
    probe_texts: dict[str, str] = {}
    """Texts that the budget is watched on, name to file, others than in evaluation.texts; the worst counts. Without one
    it is the KL divergence from the base model on its own samples."""
    probe_every: int | None = Field(default=None, ge=1)
    """Optimizer steps between two probes; a tenth of the run if not given."""

    @field_validator("budget")
    @classmethod
    def _is_a_budget(cls, value: str | float | None) -> str | float | None:
        if value is not None:
            from hlora.units import parse_budget

            parse_budget(value)
        return value


@cache
def _sft_types() -> dict[str, Any]:
    from trl import SFTConfig

    types = get_type_hints(SFTConfig)
    return {name: types[name] for name in types if name not in ("output_dir", "seed")}  # those are the run's own


def _are_trackers(value: Any) -> None:
    from transformers.integrations import INTEGRATION_TO_CALLBACK

    for name in _inside([] if value is None else value):
        if name not in (known := sorted({*INTEGRATION_TO_CALLBACK, "all", "none"})):
            raise ValueError(f"report_to: {name!r} is no tracker{_nearest(name, set(known))}")


_AT_LEAST_ONE = ("per_device_train_batch_size", "gradient_accumulation_steps", "max_length")  # TRL finds out too late


class TrainingConfig(_Section):
    general_rate: float = Field(default=0.25, gt=0)
    """Learning rate of the general phase as a share of `common`'s, where `record` names none. A gentle general phase
    spares text unlike its own (docs/results.md); 1 is the paper's."""
    common: dict[str, Any] = {}
    """Arguments of TRL's SFTConfig for both phases (learning_rate, max_length, ...)."""
    record: dict[str, Any] = {}
    """SFTConfig arguments for the general phase only."""
    tune: dict[str, Any] = {}
    """SFTConfig arguments for the domain phase only."""

    @field_validator("common", "record", "tune")
    @classmethod
    def _are_sft_arguments(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        types = _sft_types()
        for name, value in arguments.items():
            if name not in types:
                raise ValueError(f"{name!r} is not an argument of trl.SFTConfig{_nearest(name, set(types))}")
            try:
                read = TypeAdapter(types[name]).validate_python(value)
            except ValidationError:
                expected = getattr(types[name], "__name__", str(types[name]))
                got = MARK if is_secret_name(name) else repr(value)
                raise ValueError(f"{name}: expected {expected} (trl.SFTConfig), got {got}") from None
            if isinstance(value, bool) and isinstance(read, int | float) and not isinstance(read, bool):
                raise ValueError(f"{name}: expected a number, got {value!r}")
            if isinstance(read, float) and not math.isfinite(read):
                raise ValueError(f"{name}: expected a finite number, got {value!r}")
            if name == "max_steps" and read == 0:
                raise ValueError("max_steps: expected at least 1, or -1 for num_train_epochs to count; got 0")
            if name == "report_to":
                _are_trackers(value)
            if name == "learning_rate" and not 0 < read < math.inf:
                raise ValueError(f"{name}: expected a finite number above 0, got {value!r}")
            if isinstance(value, str) and isinstance(read, float):
                arguments[name] = read  # a number in quotes
            if name in _AT_LEAST_ONE and value is not None and float(value) < 1:
                raise ValueError(f"{name}: expected at least 1, got {value!r}")
        return arguments

    def of_record(self) -> dict[str, Any]:
        """Arguments of the general phase."""
        gentle = {k: self.general_rate * v for k, v in self.common.items() if k == "learning_rate"}
        return {"packing": True, **self.common, **gentle, **self.record}

    def of_tune(self) -> dict[str, Any]:
        """Arguments of the domain phase."""
        return {**self.common, **self.tune}


class EvaluationConfig(_Section):
    texts: dict[str, str] = {}
    """General texts for perplexity, name to file. Use at least one unlike the general phase's text."""
    max_tokens: int = Field(default=8192, ge=2)
    """Tokens scored of each text."""
    window: int = Field(default=512, ge=2)
    """Context length of the sliding window, tokens."""
    stride: int = Field(default=256, ge=1)
    """Tokens scored by each window; the rest of it is context."""
    accuracy: bool = True
    """Score the domain by lm-evaluation-harness (multiple-choice tasks)."""
    max_rows: int | None = Field(default=None, ge=1)
    """Evaluate on at most so many domain rows (the first ones)."""
    generate: int = Field(default=32, ge=0)
    """Answers to generate, for exact match and for the report."""
    max_new_tokens: int = Field(default=32, ge=1)
    """Length limit of a generated answer, tokens."""
    batch_size: int = Field(default=16, ge=1)
    """Sequences scored at once."""


Seed = Annotated[int, Field(ge=0, lt=2**32)]  # NumPy takes no other

Strength = Annotated[float, Field(ge=0)]

PAPER: dict[str, dict[str, Any]] = {
    "lora": {"rank": 8, "alpha": 32, "target_modules": ["q_proj", "v_proj"]},
    "importance": {"method": "path_integral", "encoding": "float32"},
    "penalty": {"layer_weights": "softmax", "anchor": "general", "group": "matrix", "phi": 9.0},
    "training": {"general_rate": 1.0},
}
"""What `preset: paper` puts in place of our defaults."""


class _Preset(_Section):
    preset: Literal["paper"] | None = None
    """paper: the paper's setting wherever the configuration says nothing else. It does not give xi, nor a phi that has
    a meaning on another model, so those stay ours."""

    @model_validator(mode="before")
    @classmethod
    def _under_the_preset(cls, fields: Any) -> Any:
        if not isinstance(fields, dict) or fields.get("preset") != "paper":
            return fields
        given = {name: fields.get(name) or {} for name in PAPER}
        if not all(isinstance(section, dict) for section in given.values()):
            return fields  # not a section; said where it is validated
        return {**fields, **{name: {**PAPER[name], **section} for name, section in given.items()}}


class RunConfig(_Preset):
    output: str
    """Directory for everything the run writes."""
    seed: Seed = 0
    """Seed of adapters, data order and sampling."""
    model: ModelConfig
    """The base model."""
    lora: LoraSettings = LoraSettings()
    """The adapter."""
    general: GeneralConfig
    """The general task: what the model should not forget."""
    domain: DomainConfig
    """The domain task: what the model should learn."""
    importance: ImportanceConfig = ImportanceConfig()
    """How importance is recorded."""
    penalty: PenaltyConfig = PenaltyConfig()
    """How it protects."""
    training: TrainingConfig = TrainingConfig()
    """Arguments handed to TRL."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """What is measured, before and after."""
    baselines: list[Arm] = []
    """Unprotected runs to show beside: lora_mu (LoRA on the domain), lora_nu_mu (general phase, then domain)."""

    @model_validator(mode="after")
    def _probe_is_not_evaluated(self) -> RunConfig:
        for name, path in self.penalty.probe_texts.items():
            same = [text for text, file in self.evaluation.texts.items() if Path(file) == Path(path)]
            if same:
                raise ValueError(
                    f"penalty.probe_texts: {name!r} is the evaluation text {same[0]!r}; a budget steered on what it is "
                    "measured by says nothing of other text. Name another file"
                )
        return self

    @model_validator(mode="after")
    def _importance_has_its_anchor(self) -> RunConfig:
        if self.importance.method == "squared_gradients" and self.penalty.anchor == "general":
            raise ValueError(
                "penalty.anchor: importance.method squared_gradients trains no general adapter to start from; "
                "set penalty.anchor to base"
            )
        return self


class FisherConfig(_Section):
    examples: int = Field(default=128, ge=1)
    """Sequences of general text that EWC-LoRA's Fisher information is taken on (paper: 20,000)."""
    max_length: int = Field(default=128, ge=2)
    """Tokens of each."""
    batch_size: int = Field(default=8, ge=1)
    """Sequences in one backward pass (paper: at most 8)."""


class ArmConfig(_Section):
    method: MethodName
    """base, after_general (the general phase alone), lora, lora_after_general, rslora, ewc, hlora, l2 (uniform
    importance), replay, kl (to the base model), osf, corda, mlp (LoRA on the MLP)."""
    strengths: Annotated[list[Strength], AfterValidator(_each_once)] = []
    """Values of the method's strength to choose from: hlora, l2 phi; ewc lambda; kl beta; replay share of general rows;
    osf share of the rank kept frozen."""
    tasks: list[str] = []
    """Tasks that it runs on; all of them when empty."""
    seeds: Annotated[list[int], AfterValidator(_each_once)] = []
    """Seeds that it runs with; all of them when empty."""
    settings: dict[str, Any] = {}
    """What this arm changes in the settings of a run, by path: {importance.xi: 1e-6}."""


class SelectionConfig(_Section):
    rows: int = Field(default=100, ge=1)
    """Training rows held out from every arm, to choose strengths on."""
    texts: dict[str, str] = {}
    """More general texts to choose on, name to file. The held-out tenth of the general text is always one."""
    seeds: int = Field(default=1, ge=1)
    """Every strength runs on the first so many seeds; the chosen one on all."""
    kept_learning: float = Field(default=0.9, ge=0, le=1)
    """Of the strengths that keep this share of what unprotected LoRA learned (fall of the answers' NLL on the held-out
    rows), the one with the lowest general loss is chosen."""


class CompareConfig(_Preset):
    output: str
    """Directory of the grid: finished cells, tables, figures, report."""
    seeds: Annotated[list[Seed], AfterValidator(_each_once)] = Field(default=[0, 1, 2], min_length=1)
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
    def _roles_are_arms(self) -> CompareConfig:
        if self.unprotected not in self.arms and any(len(arm.strengths) > 1 for arm in self.arms.values()):
            raise ValueError(f"unprotected: no arm {self.unprotected!r}, yet strengths are chosen by what it learns")
        for name, arm in self.arms.items():
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


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read the YAML of a run, apply `section.field=value` overrides, validate.

    Raises ConfigError with one line per wrong field: its path, what was expected, the nearest name.
    """
    return parse_config(read_yaml(path), str(path), overrides)


def load_comparison(path: str | Path, overrides: list[str] | None = None) -> CompareConfig:
    """Read the YAML of a comparison. Raises ConfigError (see load_config)."""
    return parse_config(read_yaml(path), str(path), overrides, CompareConfig)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file that holds a mapping. Raises ConfigError."""
    try:
        data = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file. `hlora config > {path}` writes a starting one.") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {_without_excerpt(error)}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping of fields, got {type(data).__name__}. See `hlora config`.")
    return data


Config = TypeVar("Config", RunConfig, CellConfig, CompareConfig)


def parse_config(
    data: dict[str, Any],
    origin: str = "config",
    overrides: list[str] | None = None,
    kind: type[Config] = RunConfig,  # type: ignore[assignment]
) -> Config:
    """Apply `section.field=value` overrides to a mapping and validate it. Raises ConfigError (see load_config)."""
    for override in overrides or []:
        _set(data, override)
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        lines = dict.fromkeys(_explain(item, kind) for item in error.errors())
        raise ConfigError("\n".join(f"{origin}: {line}" for line in lines)) from None


def _set(data: dict[str, Any], override: str) -> None:
    shown = redact_argument(override)
    path, separator, value = override.partition("=")
    if not separator or not path:
        raise ConfigError(f"--set {shown!r}: expected field=value, such as penalty.phi=9")
    *sections, name = path.split(".")
    for section in sections:
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise ConfigError(f"--set {shown!r}: {section} is not a section")
    try:
        data[name] = yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {shown!r}: not a YAML value: {_without_excerpt(error)}") from None


def _without_excerpt(error: Exception) -> str:
    """PyYAML's message on one line, without the excerpt of the text, which may hold a token."""
    for mark in (getattr(error, name, None) for name in ("context_mark", "problem_mark")):
        if mark is not None:
            mark.buffer = None
    return " ".join(str(error).split())


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-3 as text, for it has no dot; everyone means the number. And a key stands once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(None, None, f"{key.value!r} stands twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    **yaml.SafeLoader.yaml_implicit_resolvers,
    **{
        first: [*yaml.SafeLoader.yaml_implicit_resolvers.get(first, []), ("tag:yaml.org,2002:float", _EXPONENT)]
        for first in "-+0123456789."
    },
}


_SHORT = reprlib.Repr()  # a few lines of YAML may stand for a list of 10⁸ entries
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 200, 200


def _explain(item: Any, kind: type[BaseModel]) -> str:
    """One line for one of Pydantic's errors: path of the field, what was expected, what came, the nearest name."""
    if item["type"] == "extra_forbidden":
        *sections, name = item["loc"]
        model: Any = kind
        for section in sections:
            # tasks and arms are mappings, from a name that the user gives to a section
            model = get_args(model)[1] if get_origin(model) is dict else model.model_fields[section].annotation
        return f"{'.'.join(map(str, item['loc']))}: unknown field{_nearest(name, set(model.model_fields))}"
    path = ".".join(str(part) for part in item["loc"])
    if item["type"] == "missing":
        return f"{path}: required, but missing"
    if item["type"] == "literal_error":
        expected = re.findall(r"'([^']*)'", item["ctx"]["expected"])
        near = _did_you_mean(item["input"], expected) if isinstance(item["input"], str) else ""
        return f"{path}: expected one of {', '.join(expected)}; got {_SHORT.repr(item['input'])}{near}"
    if item["type"] == "model_type":
        return f"{path}: expected a section of fields; got {_SHORT.repr(item['input'])}"
    message = item["msg"].removeprefix("Value error, ").replace("Input should be", "expected", 1)
    return f"{path}: {message}" + ("" if isinstance(item["input"], dict) else f"; got {_SHORT.repr(item['input'])}")


def _nearest(name: str, valid: set[str]) -> str:
    return _did_you_mean(name, sorted(valid)) or f"; valid: {', '.join(sorted(valid)[:12])}"


def _did_you_mean(name: Any, valid: list[str]) -> str:
    close = get_close_matches(str(name), valid, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def starting_yaml() -> str:
    """A commented configuration to start from: every field with its meaning, at its default."""
    lines = ["# hlora configuration. Run it with: hlora run THIS_FILE", "# Paths are relative to where you run it."]
    lines += _commented(RunConfig, {"output": "runs/mine", **_STARTING}, 0)
    return "\n".join(lines) + "\n"


_STARTING: dict[str, Any] = {
    "model": {"name": "smollm2-135m"},
    "general": {"paths": ["general.txt"]},
    "domain": {"task": "rows", "train": "train.jsonl", "test": "test.jsonl"},
    "training": {
        "common": {"learning_rate": 8e-4, "lr_scheduler_type": "linear", "warmup_steps": 10},
        "record": {"max_steps": 100, "per_device_train_batch_size": 8, "max_length": 512},
        "tune": {"num_train_epochs": 1, "per_device_train_batch_size": 16, "max_length": 1024},
    },
}


def _commented(section: type[BaseModel], values: dict[str, Any], depth: int) -> list[str]:
    lines: list[str] = []
    for name, field in section.model_fields.items():
        indent = "  " * depth
        if depth == 0:
            lines.append("")
        lines += [f"{indent}# {line}" for line in wrap(field.description or "", 110 - len(indent))]
        inner: Any = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            lines += [f"{indent}{name}:", *_commented(inner, values.get(name, {}), depth + 1)]
        else:
            value = values[name] if name in values else field.get_default(call_default_factory=True)
            lines.append(f"{indent}{name}: {json.dumps(value)}")  # JSON is YAML
    return lines
