"""What several rivals need: to train on the domain, to take PEFT's other adapters, to check a strength or a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from datasets import Dataset
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from hlora.run.job import Job
from hlora.run.phases import History
from hlora.system.errors import CannotRun, ConfigError, first_line
from hlora.training.train import train

if TYPE_CHECKING:
    from trl import SFTTrainer


def domain_arguments(job: Job) -> dict[str, Any]:
    """Those of trl.SFTConfig for the domain phase."""
    return job.config.training.of_tune()


def train_rival(
    job: Job,
    model: PeftModel,
    name: str,
    dataset: Dataset | None = None,
    trainer_class: type[SFTTrainer] | None = None,
    **changes: Any,
) -> History:
    """Train on `dataset`, or the domain, with the arguments of the domain phase but for `changes`."""
    rows = job.domain.dataset() if dataset is None else dataset
    arguments = {**domain_arguments(job), **changes}
    logs = job.output / "logs" / name
    return train(model, job.tokenizer, rows, logs, arguments, job.config.seed, trainer_class=trainer_class)


def adapted(base: PreTrainedModel, config: PeftConfig, method: str) -> PeftModel:
    """The model with an adapter of PEFT's. Raises CannotRun where PEFT refuses it."""
    try:
        model = get_peft_model(base, config)
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        raise CannotRun(f"PEFT's {method} does not take this model ({first_line(error)})") from None
    assert isinstance(model, PeftModel)
    return model


def check_not_quantised(base: PreTrainedModel, method: str) -> None:
    """Raises CannotRun for a quantised model."""
    if getattr(base, "is_quantized", False):
        raise CannotRun(f"{method} decomposes the weights themselves, and those of this model are quantised")


def between_0_and_1(strength: float | None, method: str, meaning: str) -> float:
    """The strength. Raises ConfigError where it is not between 0 and 1, both excluded."""
    if strength is None or not 0 < strength < 1:
        raise ConfigError(f"{method}: expected a strength between 0 and 1, {meaning}; got {strength}")
    return float(strength)
