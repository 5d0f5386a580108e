"""configs/get_data.py: rows of the hub become the files that our results used, or nothing is written."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from conftest import REPOSITORY

from hlora.system.files import sha256

SCRIPT = REPOSITORY / "configs" / "get_data.py"
spec = importlib.util.spec_from_file_location("get_data", SCRIPT)
assert spec and spec.loader
get_data = importlib.util.module_from_spec(spec)
sys.modules["get_data"] = get_data  # where dataclasses look for it
spec.loader.exec_module(get_data)


def lay(hub: Path, path: str, rows: list[dict[str, Any]]) -> None:
    (hub / path).parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), hub / path)


def hub_of(data: Path, hub: Path) -> Path:
    """Repositories as the hub has them, with the rows that the files of `data` were made of, in the hub's order."""

    def rows(file: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (data / file).read_bytes().split(b"\n") if line]

    def unshuffled(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
        order = list(range(len(found)))
        random.Random(0).shuffle(order)
        return [row for _, row in sorted(zip(order, found, strict=True), key=lambda pair: pair[0])]

    parts = "00000-of-00001.parquet"
    for split, name in (("validation", "valid"), ("test", "test"), ("train", "valid")):
        text = (data / f"wikitext2/{name}.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
        lay(hub, f"Salesforce/wikitext/wikitext-2-v1/{split}-{parts}", [{"text": t.strip() and f"{t}\n"} for t in text])
        lay(hub, f"Salesforce/wikitext/wikitext-2-raw-v1/{split}-{parts}", [{"text": "raw"}])
    config = "- config_name: {0}\n  data_files:\n" + "".join(
        f"  - split: {split}\n    path: {{0}}/{split}-*\n" for split in ("test", "train", "validation")
    )
    card = "---\nconfigs:\n" + config.format("wikitext-2-raw-v1") + config.format("wikitext-2-v1") + "---\n"
    (hub / "Salesforce/wikitext/README.md").write_text(card, encoding="utf-8")

    lay(hub, "baber/piqa/piqa_validation.parquet", unshuffled(rows("piqa/train.jsonl") + rows("piqa/test.jsonl")))
    lay(hub, "baber/piqa/piqa_train.parquet", rows("piqa/test.jsonl"))

    medmcqa = []
    for row in unshuffled(rows("medmcqa/train.jsonl") + rows("medmcqa/test.jsonl")):
        medmcqa += [{"id": "1", **row, "choice_type": kind, "exp": None} for kind in ("multi", "single")]
    lay(hub, f"openlifescienceai/medmcqa/data/validation-{parts}", medmcqa)
    lay(hub, f"openlifescienceai/medmcqa/data/train-{parts}", medmcqa[:2])

    for split, found in (("train", unshuffled(rows("qasc/train.jsonl"))), ("validation", rows("qasc/test.jsonl"))):
        on_hub = [
            {
                "id": "1",
                "question": row["question"],
                "choices": {"text": row["choices"], "label": [*"ABCDEFGH"]},
                "answerKey": "ABCDEFGH"[row["label"]],
                "fact1": "a fact",
            }
            for row in found
        ]
        lay(hub, f"allenai/qasc/data/{split}-{parts}", on_hub)

    for split in ("train", "validation", "test"):
        made_up = {"question": split, "distractor3": "c", "distractor1": "a", "distractor2": "b", "correct_answer": "d"}
        lay(hub, f"allenai/sciq/data/{split}-{parts}", [{**made_up, "support": ""}])

    text = "\n\n".join((data / f"shakespeare/{name}.txt").read_text(encoding="utf-8") for name in ("train", "test"))
    at = (0, len(text) * 9 // 10, len(text) * 19 // 20, len(text))
    for split, start, end in zip(("train", "validation", "test"), at[:-1], at[1:], strict=True):
        lay(hub, f"karpathy/tiny_shakespeare/default/{split}/0000.parquet", [{"text": text[start:end]}])
    return hub


@pytest.fixture
def made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of small files of our form, which are the right ones."""
    data = tmp_path / "made-up"

    def piqa(n: int) -> dict[str, Any]:
        return {"goal": f"Öffne {n}", "sol1": "ja", "sol2": "no", "label": n % 2}

    def medmcqa(n: int) -> dict[str, Any]:
        return {"question": f"q\n{n}", "opa": "1", "opb": "2", "opc": "3", "opd": "4", "cop": n % 4}

    def qasc(n: int) -> dict[str, Any]:
        return {"question": f"q{n}", "choices": [*"stuvwxyz"], "label": n % 8}

    speech = "SPEAKER:\nA line of a play.\n\n"
    files = {
        "wikitext2/valid.txt": " \n = A <unk> = \n \n Text . \n",
        "wikitext2/test.txt": " \n = B = \n \n Text @-@ text . \n \n",
        "piqa/train.jsonl": get_data.lines(map(piqa, range(3))),
        "piqa/test.jsonl": get_data.lines(map(piqa, range(3, 603))),
        "medmcqa/train.jsonl": get_data.lines(map(medmcqa, range(5))),
        "medmcqa/test.jsonl": get_data.lines(map(medmcqa, range(5, 705))),
        "qasc/train.jsonl": get_data.lines(map(qasc, range(9))),
        "qasc/test.jsonl": get_data.lines(map(qasc, range(9, 13))),
        "shakespeare/train.txt": (speech * 27).removesuffix("\n\n"),
        "shakespeare/test.txt": speech * 4,
    }
    for file, text in files.items():
        (data / file).parent.mkdir(parents=True, exist_ok=True)
        (data / file).write_text(text, encoding="utf-8")
        monkeypatch.setitem(get_data.SHA256, file, sha256(data / file))
    return data


def contents(data: Path) -> dict[str, bytes]:
    """Of each data set; Python's own documentation is checked by itself."""
    files = [path for path in data.rglob("*.*") if path.name != "README.md" and path.parent.name != "python"]
    return {str(path.relative_to(data)): path.read_bytes() for path in files}


@pytest.mark.parametrize("ours", [False, True], ids=["made up", "ours"])
def test_rows_of_the_hub_become_the_files_of_our_results_byte_for_byte(
    ours: bool, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = request.getfixturevalue("shared_data" if ours else "made_up")
    get_data.main(["--to", str(tmp_path / "data"), "--hub", str(hub_of(data, tmp_path / "hub"))])
    got, said = contents(tmp_path / "data"), capsys.readouterr().out
    assert {file: got[file] for file, expected in get_data.SHA256.items() if expected} == {
        file: content for file, content in contents(data).items() if get_data.SHA256[file]
    }
    keys = ["question", "distractor1", "distractor2", "distractor3", "correct_answer", "support"]
    assert list(json.loads(got["sciq/test.jsonl"])) == keys
    assert set(got) == set(get_data.SHA256)
    assert 'The "assert" statement' in (tmp_path / "data/python/topics.txt").read_text(encoding="utf-8")
    assert "qasc: train.jsonl 1.7 MB, test.jsonl 0.2 MB; CC BY 4.0; allenai/qasc; fetched" in said or not ours
    assert f"test.jsonl: sha256 {sha256(tmp_path / 'data/sciq/test.jsonl')}, not checked" in said


def test_from_copies_the_files_and_leaves_out_sciq_where_it_is_not(
    made_up: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    get_data.main(["--from", str(made_up), "--to", str(tmp_path / "data")])
    assert contents(tmp_path / "data") == contents(made_up)
    assert "sciq: left out" in capsys.readouterr().out


@pytest.mark.parametrize("way", ["--from", "--hub"])
def test_a_file_that_is_not_ours_is_refused_by_name_and_the_one_before_stays(
    way: str, made_up: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, other = tmp_path / "data", tmp_path / "other"
    get_data.main(["--from", str(made_up), "--to", str(data)])
    (data / "qasc/train.jsonl").write_text("edited", encoding="utf-8")
    before = contents(data)
    shutil.copytree(made_up, other)
    content = (other / "qasc/test.jsonl").read_bytes()
    (other / "qasc/test.jsonl").write_bytes(content.replace(b"q9", b"p9"))  # one bit of one byte
    source = other if way == "--from" else hub_of(other, tmp_path / "hub")
    with pytest.raises(SystemExit) as left:
        get_data.main([way, str(source), "--to", str(data)])
    said = capsys.readouterr().err
    assert left.value.code == 2 and contents(data) == before
    assert f"{data / 'qasc/test.jsonl'}: not written" in said and "with --from" in said
    assert sha256(made_up / "qasc/test.jsonl") in said and sha256(other / "qasc/test.jsonl") in said


def test_files_that_are_right_are_not_fetched_again(made_up: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    get_data.main(["--hub", str(hub_of(made_up, tmp_path / "hub")), "--to", str(data)])
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*")}
    get_data.main(["--hub", str(tmp_path / "nowhere"), "--to", str(data)])
    assert {path: path.stat().st_mtime_ns for path in data.rglob("*")} == before


def test_a_directory_without_a_file_and_a_hub_with_other_columns_are_named(
    made_up: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = hub_of(made_up, tmp_path / "hub")
    lay(hub, "baber/piqa/piqa_validation.parquet", [{"goal": "g"}])
    lay(hub, "baber/piqa/piqa_train.parquet", [{"goal": "g"}])
    (made_up / "piqa/test.jsonl").unlink()
    for way, source, said in (
        ("--from", made_up, f"--from {made_up}: expected piqa/test.jsonl there, got none."),
        (
            "--hub",
            hub,
            "baber/piqa: expected a data set of the hub with the rows that our results used, got none (KeyError",
        ),
    ):
        with pytest.raises(SystemExit, match="2"):
            get_data.main([way, str(source), "--to", str(tmp_path / "data")])
        assert said in capsys.readouterr().err


def test_without_a_network_one_line_names_the_repository_and_from(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--to", str(tmp_path / "data")],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and not done.stdout and not (tmp_path / "data").exists()
    assert line.startswith("get_data: Salesforce/wikitext: ") and line.endswith("with --from.")


def test_no_file_that_a_reader_repeats_reads_from_outside_the_repository() -> None:
    for folder in ("configs", "benchmarks", "docs", "src", "examples"):
        for path in (REPOSITORY / folder).rglob("*"):
            if path.suffix in (".py", ".yaml", ".json", ".md"):
                assert "../" + "shared" not in path.read_text(encoding="utf-8"), path
