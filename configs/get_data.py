"""Bring the data that configs/ and benchmarks/ read into data/: `make data`, or

    python configs/get_data.py [--to data] [--from DIRECTORY]

Rows come from the hub. They are written as our results used them: the same rows in the same order and split, checked by
sha256. Files that are right already stay. --from copies the files of a directory that has them, without a network.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hlora.system.errors import DataError, HloraError, first_line
from hlora.system.files import make_directory, sha256, write_text

Row = dict[str, Any]
Rows = Callable[[str], list[Row]]
"""The rows of a split, by its name on the hub."""


def wikitext2(rows: Rows) -> dict[str, str]:
    """The files byte for byte. A row is a line; the hub keeps a blank one, a space in the files, as no text at all."""
    return {
        name: "".join(row["text"] or " \n" for row in rows(split))
        for name, split in (("valid.txt", "validation"), ("test.txt", "test"))
    }


def piqa(rows: Rows) -> dict[str, str]:
    """The development set, split in two, since the test set has no labels."""
    found = shuffled({key: row[key] for key in ("goal", "sol1", "sol2", "label")} for row in rows("validation"))
    return {"train.jsonl": lines(found[:-600]), "test.jsonl": lines(found[-600:])}


def medmcqa(rows: Rows) -> dict[str, str]:
    """The development questions with a single right answer, as MedAgentsBench keeps them, split in two."""
    single = [row for row in rows("validation") if row["choice_type"] == "single"]
    found = shuffled({key: row[key] for key in ("question", "opa", "opb", "opc", "opd", "cop")} for row in single)
    return {"train.jsonl": lines(found[:-700]), "test.jsonl": lines(found[-700:])}


def qasc(rows: Rows) -> dict[str, str]:
    """The train set shuffled; the development set, in its own order, is the test set."""

    def plain(row: Row) -> Row:
        choices = row["choices"]
        label = choices["label"].index(row["answerKey"])
        return {"question": row["question"], "choices": choices["text"], "label": label}

    train, test = map(plain, rows("train")), map(plain, rows("validation"))
    return {"train.jsonl": lines(shuffled(train)), "test.jsonl": lines(test)}


def sciq(rows: Rows) -> dict[str, str]:
    """The train and test sets as they are."""
    keys = ("question", "distractor1", "distractor2", "distractor3", "correct_answer", "support")
    return {
        f"{split}.jsonl": lines({key: row[key] for key in keys} for row in rows(split)) for split in ("train", "test")
    }


def shakespeare(rows: Rows) -> dict[str, str]:
    """The last tenth of char-rnn's text is the test set, from the start of a speech."""
    text = "".join(rows(split)[0]["text"] for split in ("train", "validation", "test"))
    end = text.rindex("\n\n", 0, len(text) * 9 // 10)
    return {"train.txt": text[:end], "test.txt": text[end + 2 :]}


def shuffled(rows: Iterable[Row]) -> list[Row]:
    """By seed 0: the order of every shuffled file."""
    found = list(rows)
    random.Random(0).shuffle(found)
    return found


def lines(rows: Iterable[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@dataclass(frozen=True)
class DataSet:
    make: Callable[[Rows], dict[str, str]]
    """Text of each file, of rows of the hub."""
    repository: str
    licence: str
    """As its makers state it."""
    subset: str | None = None
    revision: str | None = None


DATA = {
    "wikitext2": DataSet(wikitext2, "Salesforce/wikitext", "CC BY-SA 3.0, GFDL", subset="wikitext-2-v1"),
    # ybisk/piqa is a script, which datasets 4 does not run; this copy is lm-evaluation-harness's.
    "piqa": DataSet(piqa, "baber/piqa", "Academic Free License 3.0"),
    "medmcqa": DataSet(medmcqa, "openlifescienceai/medmcqa", "Apache 2.0"),
    "qasc": DataSet(qasc, "allenai/qasc", "CC BY 4.0"),
    "sciq": DataSet(sciq, "allenai/sciq", "CC BY-NC 3.0"),
    # Its main branch is a script too.
    "shakespeare": DataSet(shakespeare, "karpathy/tiny_shakespeare", "public domain", revision="refs/convert/parquet"),
}

SHA256 = {
    "wikitext2/valid.txt": "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
    "wikitext2/test.txt": "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
    "piqa/train.jsonl": "01bf754851533c57cacb619ade89d2d20fe0ec6839d0e812a1f29974c86b1d53",
    "piqa/test.jsonl": "c91c7c96d10a1ebf501bc41d855bef0bcbfc6d96ebcbae15b76468eadb02369e",
    "medmcqa/train.jsonl": "26fba58ea2afbfd3482ae0a868d9a6f87797b8323bdf7d3a30b38998ecd0f30f",
    "medmcqa/test.jsonl": "4ad75a7c019ceadf53c5ace93d358f085d3e28eed655aaa33cc9c53ca09fa083",
    "qasc/train.jsonl": "944627278802429a5f0be3a6a8dfeca1924d52a8de6c6452fb99f5073a4c2971",
    "qasc/test.jsonl": "7072abb4a5b63d1a36ce69912cf7d3de22079754db9a878fcfcf51883b388dbd",
    "sciq/train.jsonl": None,  # no result of ours has used SciQ
    "sciq/test.jsonl": None,
    "shakespeare/train.txt": "3f00ef5714c9e932689fb89cfdda344aae4763ab9e96ec3bc0546f526f75dd25",
    "shakespeare/test.txt": "7d8726b1c06bd2f335ab532f7e69d5b84ddb27d771320734b45eea877ad41733",
}
"""Of the files with which our results were made."""


def get(name: str, to: Path, source: Path | None, hub: Path | None) -> None:
    """Bring one data set, unless its files are there and right. Prints what it is; raises DataError."""
    data = DATA[name]
    files = {file: expected for file, expected in SHA256.items() if file.startswith(f"{name}/")}
    if all((to / file).is_file() and expected in (None, sha256(to / file)) for file, expected in files.items()):
        done = "there already"
    elif source and not any(files.values()) and not (source / name).is_dir():
        print(f"{name}: left out, not in {source}. No config reads it. The hub has it: {data.repository}")
        return
    else:
        found = copied(list(files), source) if source else made(name, hub)
        for file, expected in files.items():
            got = hashlib.sha256(found[file]).hexdigest()
            if expected and got != expected:
                raise DataError(
                    f"{to / file}: not written. Expected sha256 {expected}, with which our results were made, got "
                    f"{got} from {source or data.repository}. Name a directory that has the right {file} with --from."
                )
        make_directory(to / name)
        for file in files:
            write_text(to / file, found[file].decode("utf-8"))
        done = f"copied from {source}" if source else "fetched"
    sizes = ", ".join(f"{Path(file).name} {(to / file).stat().st_size / 1e6:.1f} MB" for file in files)
    print(f"{name}: {sizes}; {data.licence}; {data.repository}; {done}")
    for file in (file for file, expected in files.items() if not expected):
        print(f"  {file}: sha256 {sha256(to / file)}, not checked, since no result of ours has used it")


def copied(files: list[str], source: Path) -> dict[str, bytes]:
    """The files of a directory that has them."""
    for file in files:
        if not (source / file).is_file():
            raise DataError(f"--from {source}: expected {file} there, got none. Name a directory that has it.")
    return {file: (source / file).read_bytes() for file in files}


def made(name: str, hub: Path | None) -> dict[str, bytes]:
    """The files, of the hub's rows."""
    from datasets import load_dataset
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # of each retry; the message below says it once
    data = DATA[name]

    def rows(split: str) -> list[Row]:
        repository = str(hub / data.repository) if hub else data.repository
        # Streamed: of MedMCQA's 88 MB only the split of 1.5 MB is fetched.
        return list(load_dataset(repository, data.subset, split=split, revision=data.revision, streaming=True))

    try:
        return {f"{name}/{file}": text.encode("utf-8") for file, text in data.make(rows).items()}
    except Exception as error:  # the hub client raises many kinds, and a repository may have other columns now
        raise DataError(
            f"{data.repository}: expected a data set of the hub with the rows that our results used, got none "
            f"({first_line(error)}). Check the network, or name a directory that has the files with --from."
        ) from None


def python_documentation(to: Path) -> None:
    """Write python/topics.txt: the help topics that come with the Python that runs this, unlike the other texts."""
    from pydoc_data.topics import topics

    text, file = "\n\n".join(topics[name].strip() for name in sorted(topics)), to / "python" / "topics.txt"
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        make_directory(file.parent)
        write_text(file, text)
    print(f"python: topics.txt of Python {sys.version.split()[0]}, which is its own; PSF licence")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=Path("data"), help="directory to fill; default: data")
    parser.add_argument("--from", dest="source", type=Path, help="directory that has the files: no network")
    parser.add_argument("--hub", type=Path, help="directory of repositories in place of the hub, as OWNER/NAME")
    given = parser.parse_args(arguments)
    try:
        for name in DATA:
            get(name, given.to, given.source, given.hub)
        python_documentation(given.to)
    except (HloraError, OSError, UnicodeDecodeError) as error:
        print(f"get_data: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
