"""Missing files are all named at once, each by its field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hlora.config.data_files import check_files
from hlora.config.reading import parse_config
from hlora.system.errors import DataError


def test_every_missing_file_is_one_line_with_its_field(job_fields: dict[str, Any], tmp_path: Path) -> None:
    check_files(parse_config(job_fields))
    job_fields["general"] = {"mixture": [{"paths": job_fields["general"]["paths"]}, {"paths": ["a.txt", "[b].txt"]}]}
    job_fields["domain"]["test"] = "test.csv"
    job_fields["evaluation"] = {"texts": {"prose": "prose.txt"}}
    job_fields["penalty"] = {"probe_texts": {"probe": "x" * 5000}}
    job_fields["model"]["name"] = "./nowhere"
    with pytest.raises(DataError) as caught:
        check_files(parse_config(job_fields))
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[0] for line in lines] == [
        "model.name",
        "general.mixture.1.paths",
        "general.mixture.1.paths",
        "evaluation.texts.prose",
        "penalty.probe_texts.probe",
        "domain.test",
    ]
    assert lines[2] == f"general.mixture.1.paths: [b].txt: no such file (from {Path.cwd()})"
    assert "cannot be read" in lines[4]


def test_names_of_the_hub_and_splits_are_not_taken_for_files(job_fields: dict[str, Any]) -> None:
    job_fields["model"]["name"] = "org/model-1.5"
    job_fields["general"] = {"source": "hub", "dataset": "org/text", "paths": ["unused.txt"]}
    job_fields["domain"] |= {"train": "org/rows.v2", "test": "validation"}
    check_files(parse_config(job_fields))
