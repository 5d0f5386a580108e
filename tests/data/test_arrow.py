"""Rows from Parquet and the hub are those that the same rows are as .jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset

from hlora.config.sections import DomainConfig
from hlora.data.domain import _domain_source
from hlora.data.rows import read_rows

NAMES = ("weather", "convert")
ARGUMENTS: dict[str, dict[str, Any]] = {"weather": {"city": "Rome"}, "convert": {"amount": 2, "unit": {"to": "kg"}}}


def schema(name: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {key: {"type": "string"} for key in ARGUMENTS[name]}}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


ROWS: list[dict[str, Any]] = [
    {
        "tools": [schema(each) for each in NAMES],
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]},
        ],
        "note": None,
    }
    for name, arguments in ARGUMENTS.items()
]


@pytest.fixture(params=["pyarrow", "datasets", "datasets with Json"])
def parquet(request: Any, tmp_path: Path) -> str:
    path = str(tmp_path / "train.parquet")
    if request.param == "pyarrow":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        options = {"on_mixed_types": "use_json"} if request.param.endswith("Json") else {}
        Dataset.from_list(ROWS, **options).to_parquet(path)
    return path


def test_no_object_has_the_keys_of_another(parquet: str) -> None:
    assert list(read_rows(parquet).kept.values()) == ROWS


def test_rows_of_a_hub_data_set_are_the_same(parquet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    config = DomainConfig(task="rows", train=str(Path(parquet).parent), test="train")
    assert list(_domain_source(config, config.train, "train").kept.values()) == ROWS


def test_a_null_inside_json_is_the_files_own(tmp_path: Path) -> None:
    cells = pyarrow.ExtensionArray.from_storage(pyarrow.json_(), pyarrow.array(['{"unit": null}', None, "[1]"]))
    pyarrow.parquet.write_table(pyarrow.table({"a": cells}), tmp_path / "a.parquet")
    assert [row["a"] for row in read_rows(str(tmp_path / "a.parquet")).kept.values()] == [{"unit": None}, None, [1]]
