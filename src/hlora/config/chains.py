"""The configuration of a comparison of chains: that of a run with `domains`, and what is compared."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from hlora.config.comparison import NOT_VALIDATED
from hlora.config.run import RunConfig, Seed
from hlora.config.sections import each_once
from hlora.methods import CHAINS

if TYPE_CHECKING:
    ChainName = str
else:
    ChainName = Literal[tuple(CHAINS)]

_OF_A_RUN = {
    "after": "every method starts from the base model. Leave it out",
    "baselines": "methods names what is compared. Leave it out",
    "seed": "a comparison has seeds",
    "domain": "domains names every domain. Leave it out",
}


class ChainComparison(RunConfig):
    """A run's file with `domains`, as it is, compares every method in both orders with two seeds."""

    seeds: Annotated[list[Seed], AfterValidator(each_once)] = Field(default=[0, 1], min_length=1)
    """Seeds of new adapters, data order and sampling."""
    methods: Annotated[list[ChainName], AfterValidator(each_once)] = Field(default=list(CHAINS), min_length=1)
    """The methods to compare; src/hlora/methods.py lists them."""
    orders: Literal["both", "given"] = "both"
    """both: as `domains` has them, and the reverse."""

    @model_validator(mode="before")
    @classmethod
    def _is_not_one_run(cls, fields: Any) -> Any:
        for field, instead in _OF_A_RUN.items():
            if isinstance(fields, dict) and field in fields:
                raise ValueError(f"{field}: {instead}")
        return fields

    @model_validator(mode="after")
    def _learns_one_after_another(self) -> ChainComparison:
        if len(self.domains) < 2:
            raise ValueError(f"domains: expected two or more to learn one after another, got {len(self.domains)}")
        if self.importance.use is not None:
            raise ValueError("importance.use: a comparison records importance for each seed. Leave it out")
        if any(domain.validation is not None for domain in self.domains):
            raise ValueError(f"domains: validation: {NOT_VALIDATED}")
        return self
