"""The entries of `domains`: domains that one model learns one after another."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from hlora.config.sections import DomainConfig, each_once


class NamedDomain(DomainConfig):
    name: str | None = Field(default=None, pattern=r"^[^./\\][^/\\]*$")
    """Name of the domain in the report, and of its directory in `output`. By default domain-1, domain-2, …"""


def _each_with_a_name(domains: list[NamedDomain]) -> list[NamedDomain]:
    """The domains, with their default names. Raises ValueError where two have the same name."""
    for number, domain in enumerate(domains, 1):
        domain.name = domain.name or f"domain-{number}"
    each_once([domain.name for domain in domains])
    return domains


Domains = Annotated[list[NamedDomain], AfterValidator(_each_with_a_name)]
