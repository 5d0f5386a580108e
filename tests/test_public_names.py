"""What `import hlora` offers: a sorted list, and every name of it is there."""

from __future__ import annotations

import pytest

import hlora


def test_public_names_are_sorted_and_each_stands_once() -> None:
    assert hlora.__all__ == sorted(set(hlora.__all__))


@pytest.mark.parametrize("name", hlora.__all__)
def test_each_public_name_imports_and_is_documented(name: str) -> None:
    assert getattr(hlora, name).__doc__
    assert not hasattr(getattr(hlora, name), "__path__"), "a subpackage hides the name"


def test_an_unknown_name_is_named() -> None:
    with pytest.raises(AttributeError, match=r"hlora.*nothing"):
        hlora.nothing  # noqa: B018
