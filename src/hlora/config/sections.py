"""The sections of the YAML as Pydantic models. Every field says what it is, its unit and where its default is from.

The docstring below a field is its help: `hlora config` prints it as the comment of a starting YAML.
"""

from __future__ import annotations

from itertools import repeat
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

from hlora.system.choices import Anchor, Group, LayerWeights, PhiScale

EncodingName = Literal["float32", "factored"]
TaskName = Literal["sciq", "piqa", "medmcqa", "multiple_choice", "rows"]


class Section(BaseModel):
    """Unknown fields are errors, and field docstrings become descriptions."""

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, protected_namespaces=()
    )

    @field_validator("*", mode="wrap")
    @classmethod
    def _is_meant(cls, value: Any, read_by: ValidatorFunctionWrapHandler) -> Any:
        """Refuses what Pydantic takes though nobody means it: true as 1, no name at all, a number beyond 64 bits."""
        read = read_by(value)
        names = [*("" for _ in value), *(f"{name}: " for name in value)] if isinstance(value, dict) else repeat("")
        for name, given, each in zip(names, values_in(value), values_in(read), strict=False):
            if isinstance(given, bool) and isinstance(each, int | float) and not isinstance(each, bool):
                raise ValueError(f"{name}expected a number, not true or false")
            if isinstance(each, int) and not -(2**63) <= each < 2**63:
                raise ValueError(f"{name}expected a number that 64 bits hold")
            if isinstance(each, str) and ("\0" in each or any("\ud800" <= letter <= "\udfff" for letter in each)):
                raise ValueError(f"{name}expected text without the character NUL and halves of surrogate pairs")
            if each == "":
                raise ValueError(f"{name}expected text, not an empty one")
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
    name: str
    """Base model: a local directory or a hub name. `smollm2-135m`: the embedded default, from the package index."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    gguf_file: str | None = None
    """GGUF file inside `name`, when the weights are kept in that format."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the base weights. auto: bfloat16 on a GPU that has it, float16 on an older one with tensor
    cores, float32 elsewhere."""
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


class LoraSettings(Section):
    rank: int = Field(default=8, ge=1)
    """LoRA rank r (paper: 8)."""
    alpha: float = Field(default=32, gt=0)
    """LoRA alpha; the scale is alpha/r (paper: 32)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before A."""
    target_modules: list[str] | str = ["q_proj", "v_proj"]
    """Matrices to adapt and protect (paper: q_proj, v_proj), or `all-linear`: every linear layer but the output's. Of a
    mixture of experts name the attention's: experts kept as one parameter are refused."""
    exclude_modules: list[str] | str | None = None
    """Names, or one regular expression, of modules that `target_modules` matches and that are left out."""
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
    from hlora.config.units import allowed

    allowed(value, 0)
    return value


RowLimit = Annotated[int | str, BeforeValidator(_is_a_limit)]


class GeneralSource(Section):
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


class DomainConfig(Section):
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


class ImportanceConfig(Section):
    use: str | None = None
    """An importance recorded before, a directory or a hub repository, to use in place of recording one. The other
    fields of this section then have no effect. `importance: NAME` is short for it."""
    method: Literal["path_integral", "squared_gradients"] = "path_integral"
    """path_integral: gradient times movement, along the general phase (Eq. 12, the paper's). squared_gradients: those
    of each sequence, along the general phase too; or, with penalty.anchor base, in one pass over a few hundred
    sequences at the base model, without training it."""
    encoding: EncodingName = "factored"
    """How importance is kept: float32 (the paper's, 4 bytes an element), or factored (row sums x column sums)."""
    xi: float = Field(default=1e-3, gt=0)
    """path_integral: damping constant of Eq. 13, unit weight squared. Not given by the paper."""
    gradient: Literal["effective", "exact"] | None = None
    """squared_gradients: exact (the default), that of the adapted matrix itself; or, at the base model, effective,
    Eq. 11, which a path integral takes."""
    sequences: int = Field(default=256, ge=1)
    """squared_gradients at the base model: sequences of general text to take; fewer where it has fewer."""
    sequence_length: int = Field(default=128, ge=2)
    """squared_gradients at the base model: tokens of each."""
    stop_at_move: float | None = Field(default=None, gt=0)
    """End the general phase early, once it has moved the adapted matrices by this share of their norm."""

    @model_validator(mode="after")
    def _squares_what_is_exact(self) -> ImportanceConfig:
        if self.gradient == "exact" and self.method == "path_integral":
            raise ValueError("gradient: a path integral takes the effective one; exact is for squared_gradients")
        return self


class PenaltyConfig(Section):
    phi: float = Field(default=1.0, ge=0)
    """Weight of the penalty, Eq. 16. With phi_scale relative: nats it costs to undo the general phase once; 1 goes with
    a gentle general phase, one at the domain's learning rate moves farther and takes about 9."""
    phi_scale: PhiScale = "relative"
    """relative: importance is divided by what undoing the general phase would cost, so phi carries over between models.
    paper: as in Eq. 16."""
    layer_weights: LayerWeights = "softmax"
    """softmax: Eq. 15. norm_share: shares of the norm, unchanged by the scale of the importance.
    uniform: no layer weights. sum: each matrix counts in full, the plain sum of EWC."""
    group: Group = "matrix"
    """What one layer weight covers: each adapted matrix, or each transformer block."""
    anchor: Anchor = "general"
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
            from hlora.config.units import parse_budget

            parse_budget(value)
        return value


class EvaluationConfig(Section):
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
