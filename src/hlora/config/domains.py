"""The domain of a run, and the entries of `domains`: domains that one model learns one after another."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from hlora.config.paths import PathText
from hlora.config.sections import DomainConfig, each_once


class RunDomain(DomainConfig):
    validation: PathText | float | None = None
    """Rows that the domain phase is evaluated on while it trains: a file, a split of the hub data set in `train`, or a
    share of the training rows, such as 0.1. They are not trained on. The report then shows learning and forgetting over
    the steps."""
    patience: int | None = Field(default=None, ge=1)
    """End the domain phase after so many evaluations in a row without a lower loss on the validation rows."""

    @model_validator(mode="after")
    def _validation_is_rows(self) -> RunDomain:
        if isinstance(self.validation, float) and not 0 < self.validation < 1:
            raise ValueError(f"validation: expected a file or a share between 0 and 1, got {self.validation}")
        if self.patience is not None and self.validation is None:
            raise ValueError("patience: counts evaluations on validation rows. Set validation too")
        return self


class NamedDomain(RunDomain):
    name: str | None = Field(default=None, pattern=r"^[^./\\][^/\\]*$")
    """Name of the domain in the report, and of its directory in `output`. By default domain-1, domain-2, …"""


def _each_with_a_name(domains: list[NamedDomain]) -> list[NamedDomain]:
    """The domains, with their default names. Raises ValueError where two have the same name."""
    for number, domain in enumerate(domains, 1):
        domain.name = domain.name or f"domain-{number}"
    each_once([domain.name for domain in domains])
    return domains


Domains = Annotated[list[NamedDomain], AfterValidator(_each_with_a_name)]
