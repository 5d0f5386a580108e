"""Malformed input of each format through the command line, from one valid sample of each.

Every case ends with status 2 and one message that names the culprit, or is a valid reading. No traceback, and the
SHA-256 of every file that an earlier run has left is what it was. Commands are the cheapest that read the format: for
what they read before a missing file, that file is the one that a valid reading ends with.
"""

from __future__ import annotations

import copy
import io
import json
import os
import random
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from conftest import GENERAL_TEXT
from made_comparison import SMALL, make_comparison
from test_corpus import WRONG, changed, leaves, meant
from transformers import LlamaConfig, LlamaForCausalLM

from hlora.cli import main
from hlora.system.files import sha256

TWICE = '{"question": "a", "question": "b", "choices": ["1", "2"], "label": 0}'
LONG = "HLORA_LONG" in os.environ  # make test-faults
LENGTHS, FLIPS = (64, 24) if LONG else (12, 6)
ABSENT = "absent.jsonl"
"""What a configuration names for a command to end at, once it has read what is tested."""


class Sample:
    """A valid sample of each format, and the outputs of a run on it; both are put back after each case."""

    def __init__(self, directory: Path, model: str) -> None:
        self.directory, self.model = directory, model
        self.out, self.config = directory / "out", directory / "run.yaml"
        general = [part for part in GENERAL_TEXT.split("\n\n") if part.strip()]
        self.rows = [
            {"question": f"What is {n} plus one?", "choices": [str(n + 1), str(n)], "label": 0} for n in range(12)
        ]
        (directory / "general.txt").write_text("\n\n".join(general), encoding="utf-8")
        self.jsonl("general.jsonl", [{"text": part} for part in general])
        self.jsonl("train.jsonl", self.rows[:8])
        self.jsonl("test.jsonl", self.rows[8:])
        texts = [f"{r['question']},{json.dumps(json.dumps(r['choices']))},{r['label']}" for r in self.rows[:8]]
        lines = ["question,choices,label", *(t.replace('\\"', '""') for t in texts)]
        (directory / "train.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(self.rows[:8]), directory / "train.parquet")
        common = {"learning_rate": 5e-3, "per_device_train_batch_size": 4, "max_steps": 1, "max_length": 64}
        self.fields: dict[str, Any] = {
            "output": str(self.out),
            "model": {"name": model, "device": "cpu"},
            "lora": {"rank": 4, "alpha": 8},
            "general": {"paths": [str(directory / "general.txt")]},
            "domain": {
                "task": "multiple_choice",
                "train": str(directory / "train.jsonl"),
                "test": str(directory / "test.jsonl"),
            },
            "training": {"common": {**common, "report_to": []}},
            "evaluation": {"max_tokens": 64, "window": 32, "stride": 32, "accuracy": False, "generate": 0},
        }
        self.write(self.fields)

    def jsonl(self, name: str, rows: Sequence[Any]) -> None:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (self.directory / name).write_text(text, encoding="utf-8")

    def write(self, fields: dict[str, Any]) -> Path:
        self.config.write_text(yaml.safe_dump(fields, sort_keys=False), encoding="utf-8")
        return self.config

    def sums(self) -> dict[str, str]:
        """Of every output, but the lock and the name of the process that holds it."""
        files = [path for path in sorted(self.out.rglob("*")) if path.is_file() and not path.name.startswith(".lock")]
        return {str(path.relative_to(self.out)): sha256(path) for path in files}


def hlora(*arguments: Any) -> tuple[int | None, str]:
    """Status and stderr of a command in this process; None with a traceback."""
    argv, sys.argv = sys.argv, ["hlora", *map(str, arguments)]
    err = io.StringIO()
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(err):
            main()
        return 0, err.getvalue()
    except SystemExit as ended:
        return int(ended.code or 0), err.getvalue()
    except BaseException:
        return None, traceback.format_exc()
    finally:
        sys.argv = argv


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, model_dir: str) -> Sample:
    sample = Sample(tmp_path_factory.mktemp("sample"), model_dir)
    status, err = hlora("run", sample.config)
    assert status == 0, err
    shutil.copytree(sample.out, sample.directory / "kept")
    return sample


@pytest.fixture
def sample(made: Sample, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Sample]:
    """The sample as it was made, without a network: with one, the hub's client tries a name for 23 s.

    Commands run so deep below tmp_path that an output named ../../etc/passwd is in it, and write nowhere else.
    """
    started, deep = Path.cwd(), tmp_path / "a" / "b" / "c"
    before = names(started), names(made.directory)
    deep.mkdir(parents=True)
    monkeypatch.chdir(deep)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    yield made
    restore_outputs(made)
    made.write(made.fields)
    assert (names(started), names(made.directory)) == before


def names(directory: Path) -> set[str]:
    """Of what is in a directory, without the caches of tools."""
    return {path.name for path in directory.iterdir() if not path.name.startswith(".")}


class Corpus:
    """Counts the cases of a format."""

    def __init__(
        self, sample: Sample, command: Sequence[Any], names: Sequence[str], read_to: str | None = None
    ) -> None:
        """read_to: what the message of a command says that has read what is tested, and ended at what is absent."""
        self.sample, self.command, self.names, self.read_to = sample, command, names, read_to
        self.cases, self.refused, self.read = 0, 0, 0
        self.wrong: list[str] = []
        self.before = sample.sums()

    def case(self, what: str, names: Sequence[str] = (), meant: bool = True) -> None:
        """Run the command.

        names: one of these has to stand in the message, or of those of the whole corpus. meant: it may be read.
        """
        self.cases += 1
        status, err = hlora(*self.command)
        after = self.sample.sums()
        if status is None or "Traceback" in err:
            frames = [line.strip() for line in err.splitlines() if "/hlora/" in line]
            self.wrong.append(f"{what}: {(frames or [''])[-1]}: {err.strip().splitlines()[-1]:.300}")
        elif status == 0 or (status == 2 and self.read_to and self.read_to in err):
            self.read += 1
            if not meant:
                self.wrong.append(f"{what}: accepted")
        elif status != 2 or "hlora: " not in err:
            self.wrong.append(f"{what}: status {status}, {err!r}")
        elif not any(name in err for name in (*names, *self.names)):
            self.wrong.append(f"{what}: names none of {(*names, *self.names)}: {err!r}")
        else:
            self.refused += 1
        if after != self.before:
            if status != 0:
                touched = [name for name in {**after, **self.before} if after.get(name) != self.before.get(name)]
                self.wrong.append(f"{what}: touched {touched}")
            restore_outputs(self.sample)

    def bytes_of(self, path: Path, lengths: int = LENGTHS, flips: int = FLIPS) -> None:
        """The file cut at each of so many lengths, and with a flipped bit at so many places."""
        content, draw = path.read_bytes(), random.Random(0)
        try:
            for step in range(lengths):
                path.write_bytes(content[: len(content) * step // lengths])
                self.case(f"{path.name} cut at {len(content) * step // lengths} of {len(content)}")
            for place in draw.sample(range(len(content)), min(flips, len(content))):
                flipped = bytearray(content)
                flipped[place] ^= 1 << draw.randrange(8)
                path.write_bytes(flipped)
                self.case(f"{path.name} flipped at {place}")
        finally:
            path.write_bytes(content)

    def end(self, what: str, tally: Callable[..., None], least: int) -> None:
        tally(
            f"{what}: {self.refused} refused, {self.read} read", self.cases, self.refused + self.read, len(self.wrong)
        )
        assert not self.wrong, f"{len(self.wrong)} of {self.cases}:\n" + "\n".join(self.wrong[:20])
        assert self.refused >= least


def restore_outputs(sample: Sample) -> None:
    shutil.rmtree(sample.out)
    shutil.copytree(sample.directory / "kept", sample.out)


def drawn(value: Any, count: int, wrong: Sequence[Any] = tuple(WRONG)) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """So many of the leaves × wrong values, by seed; every leaf is among them."""
    draw = random.Random(1)
    paths = list(leaves(value))
    pairs = [(path, draw.choice(wrong)) for path in paths]
    pairs += [(draw.choice(paths), draw.choice(wrong)) for _ in range(count - len(pairs))]
    yield from pairs


# Configurations


def test_wrong_configurations(sample: Sample, tally: Any) -> None:
    from hlora.config.reading import parse_config

    full = parse_config(copy.deepcopy(sample.fields)).model_dump()
    absent = str(sample.directory / "nowhere")  # tune ends there, once the configuration is read
    names = (
        "run.yaml",
        "domain.t",
        "importance.use",
        "after:",
        "general.paths",
    )  # what is cut may still be read, with a path that is cut
    corpus = Corpus(sample, ("tune", sample.config), names, "/importance: no such directory")
    full["output"] = absent
    for path, value in drawn(full, 300 if LONG else 0):
        sample.write(changed(full, path, value))
        corpus.case(f"{path} = {value!r:.60}", [key for key in path if isinstance(key, str)], meant(path, value))
    corpus.bytes_of(sample.write(full))
    corpus.end("run.yaml", tally, 60)


def test_configurations_of_the_right_form_that_cannot_be_run(sample: Sample, tally: Any) -> None:
    corpus = Corpus(sample, ("run", sample.config), ())
    here = sample.directory
    general = {"x": str(here / "general.txt")}  # that may be measured on too: its long lines are left out
    for fields in (
        {"model.name": "nowhere/at-all"}, {"model.name": str(here)}, {"model.name": ""}, {"model.name": "../../etc"},
        {"model.name": "a\0b"}, {"model.device": "cuda:99"}, {"model.device": "abacus"}, {"model.gguf_file": "x.gguf"},
        {"lora.target_modules": ["nope"]}, {"lora.target_modules": "*"}, {"lora.target_modules": ["q_proj", "v_pro"]},
        {"general.paths": [ABSENT]}, {"general.paths": [str(here)]}, {"general.paths": ["x" * 5000]},
        {"general.paths": ["a\0b.txt"]}, {"general.paths": ["../../../../etc/shadow.txt"]},
        {"general.paths": [str(here / "train.csv")]},
        {"general.column": "nope", "general.paths": [str(here / "general.jsonl")]},
        {"general.source": "hub", "general.dataset": "acme/absent"},
        {"general.source": "hub", "general.dataset": "a b;c"},
        {"domain.train": ABSENT}, {"domain.test": ABSENT}, {"domain.train": "acme/absent"},
        {"domain.train": "$(id).jsonl"},
        {"domain.task": "piqa"}, {"domain.task": "rows"}, {"domain.test": "general.txt"},
        {"domain.train": str(here / "test.jsonl")}, {"domain.max_unusable": "2 rows"},
        {"evaluation.texts": {"x": ABSENT}}, {"evaluation.texts": general},
        {"evaluation.texts": {"x": str(here / "train.csv")}},
        {"penalty.budget": "1%", "penalty.probe_texts": {"x": ABSENT}},
        {"penalty.budget": "1%", "penalty.probe_texts": general},
        {"training.common.optim": "nope"}, {"training.common.lr_scheduler_type": "nope"},
        {"training.tune.max_length": 4},
        {"training.common.max_length": -1}, {"training.common.per_device_train_batch_size": 0},
        {"output": str(here / "run.yaml")}, {"output": str(here / "run.yaml" / "out")}, {"output": "/proc/nowhere"},
        {"output": "a\0b"}, {"output": "x" * 5000}, {"seed": -1}, {"seed": 2**40},
    ):  # fmt: skip
        whole = copy.deepcopy(sample.fields)
        for path, value in fields.items():
            section = whole
            *sections, name = path.split(".")
            for key in sections:
                section = section.setdefault(key, {})
            section[name] = value
        sample.write(whole)
        corpus.case(
            f"{fields!r:.100}",
            [
                *fields,
                *(path.split(".")[-1] for path in fields),
                *(name for value in fields.values() for name in texts(value)),
            ],
            general in fields.values(),
        )
    corpus.end("run.yaml, deeper", tally, 40)


def texts(value: Any) -> list[str]:
    """Names of files in a field."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    return [each for each in inside if isinstance(each, str) and len(each) > 3]


def test_wrong_comparisons(sample: Sample, tally: Any) -> None:
    fields = copy.deepcopy(sample.fields)
    fields["tasks"] = {"sums": fields.pop("domain")}
    fields["output"] = str(sample.out)
    fields["model"]["name"], text = ABSENT, str(sample.directory / "general.txt")  # the first is where reading ends
    fields |= {
        "seeds": [0, 1],
        "arms": {
            "LoRA(μ)": {
                "method": "lora",
                "strengths": [],
                "tasks": ["sums"],
                "seeds": [0],
                "settings": {"lora.rank": 2},
            },
            "HLoRA": {"method": "hlora", "strengths": [1, 3]},
        },
        "selection": {
            "rows": 2,
            "texts": {"x": text},
            "seeds": 1,
            "kept_learning": 0.9,
        },
        "fisher": {"examples": 4, "max_length": 16, "batch_size": 2},
    }
    # Cut in a path, a configuration may still be read: then the field that has the path is named.
    names = ("run.yaml", "tasks.sums.t", "selection.texts", "general.paths", "x" * 200)
    corpus = Corpus(sample, ("compare", sample.config, "--dry-run"), names, f"model.name: {ABSENT}")
    for path, value in drawn(fields, 120 if LONG else 0):
        sample.write(changed(fields, path, value))
        corpus.case(f"{path} = {value!r:.60}", [key for key in path if isinstance(key, str)], meant(path, value))
    corpus.bytes_of(sample.write(fields))
    corpus.end("compare.yaml", tally, 40)
    assert not list(Path().iterdir())  # with --dry-run nothing is written


# Data


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_wrong_rows(suffix: str, sample: Sample, tally: Any) -> None:
    path = sample.directory / f"train.{suffix}"
    fields = copy.deepcopy(sample.fields)
    fields["domain"]["train"], fields["model"]["name"] = str(path), ABSENT  # data are read before the model
    sample.write(fields)
    corpus = Corpus(sample, ("record", sample.config), (path.name,), f"model.name: {ABSENT}")
    content = path.read_bytes()
    if suffix == "jsonl":
        for place, value in drawn(sample.rows[:8], 80):
            sample.jsonl(path.name, changed(sample.rows[:8], place, value))
            corpus.case(f"{place} = {value!r:.60}")
    path.write_bytes(content)
    corpus.bytes_of(path)
    corpus.end(path.name, tally, 15)


@pytest.mark.parametrize("name", ["general.txt", "general.jsonl"])
def test_wrong_general_text(name: str, sample: Sample, tally: Any) -> None:
    path = sample.directory / name
    fields = copy.deepcopy(sample.fields)
    fields["general"]["paths"], fields["model"]["name"] = [str(path)], ABSENT
    sample.write(fields)
    corpus = Corpus(sample, ("record", sample.config), (name, "general"), f"model.name: {ABSENT}")
    corpus.bytes_of(path)
    corpus.end(name, tally, 1)


def rows_with(sample: Sample, *rows: Any) -> bytes:
    """The training rows with others in their midst."""
    lines = [json.dumps(row) for row in sample.rows[:8]]
    lines[4:4] = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def test_the_odd_cases(sample: Sample, tally: Any, tmp_path: Path) -> None:
    """Each with what it is, and whether it can be read."""
    row = sample.rows[0]
    head = "question,choices,label"
    cells = 'What?,"[""1"", ""2""]",0'
    wide = pyarrow.Table.from_pylist([{**r, "label": float(r["label"])} for r in sample.rows[:8]])
    nan = pyarrow.Table.from_pylist([{**r, "label": float("nan") if r["label"] == 0 else 1} for r in sample.rows[:8]])
    null = pyarrow.Table.from_pylist([*sample.rows[:7], {**row, "question": None}])

    def parquet(table: pyarrow.Table) -> bytes:
        sink = io.BytesIO()
        pyarrow.parquet.write_table(table, sink)
        return sink.getvalue()

    cases: list[tuple[str, bytes | Path, bool]] = [
        ("train.jsonl", b"", False), ("train.jsonl", b"\n \n", False), ("train.jsonl", b"\xef\xbb\xbf", False),
        ("train.jsonl", b"\xef\xbb\xbf" + rows_with(sample), True),
        ("train.jsonl", rows_with(sample).decode().encode("utf-16"), False),
        ("train.jsonl", rows_with(sample, {**row, "choices": ["", "2"]}), False),
        ("train.jsonl", rows_with(sample, {**row, "question": " "}), False),
        ("train.jsonl", rows_with(sample, TWICE), False),
        ("train.jsonl", rows_with(sample, "[" * 100_000), False),
        ("train.jsonl", rows_with(sample, "{\"a\":" * 50_000), False),
        ("train.jsonl", rows_with(sample, {**row, "question": "\ud800"}), False),
        ("train.jsonl", rows_with(sample, {**row, "label": 10**400}), False),
        ("train.jsonl", rows_with(sample, {**row, "question": "long " * 200}), False),
        ("train.jsonl", rows_with(sample, {**row, "more": [[[{}]]]}), True),
        ("train.jsonl", b'{"question": "' + b"word " * 20_000_000 + b'", "choices": ["1", "2"], "label": 0}', False),
        ("train.jsonl", b"x" * 100_000_000, False),
        ("train.csv", f"{head}\n{cells}\n".encode(), True), ("train.csv", f"\ufeff{head}\n{cells}\n".encode(), True),
        ("train.csv", head.encode(), False), ("train.csv", b"", False),
        ("train.csv", b"question,label\nWhat?,0\n", False),
        ("train.csv", f"{head},more\n{cells},x\n".encode(), True),
        ("train.csv", f"{head}\n{cells},x\n".encode(), False),
        ("train.csv", f"{head}\nWhat?\n".encode(), False), ("train.csv", f"{head},label\n{cells},0\n".encode(), False),
        ("train.csv", f"{head}\n\"{'x' * 200_000}\",[],0\n".encode(), False),
        ("train.csv", f"{head}\n{cells}".encode("utf-16"), False),
        ("train.parquet", parquet(wide), True), ("train.parquet", parquet(nan), False),
        ("train.parquet", parquet(null), False),
        ("train.parquet", parquet(nan.slice(0, 0)), False),
        ("train.parquet", parquet(wide.drop_columns(["label"])), False),
    ]  # fmt: skip
    directory, link, loop, other = (tmp_path / f"{n}.jsonl" for n in ("directory", "link", "loop", "other"))
    directory.mkdir()
    link.symlink_to(sample.directory / "train.jsonl")
    loop.symlink_to(other)
    other.symlink_to(loop)
    dotted = Path(f"{sample.directory}/../{sample.directory.name}/train.jsonl")
    cases += [
        ("", directory, False),
        ("", link, True),
        ("", loop, False),
        ("", dotted, True),
        ("", Path("/dev/null.jsonl"), False),
    ]
    if os.geteuid() != 0:  # root may read anything
        locked = tmp_path / "locked.jsonl"
        locked.write_bytes(rows_with(sample))
        locked.chmod(0)
        cases.append(("", locked, False))
    readable = Corpus(sample, ("record", sample.config), (), f"model.name: {ABSENT}")
    for name, content, good in cases:
        path = content if isinstance(content, Path) else tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        fields = copy.deepcopy(sample.fields)
        fields["domain"]["train"] = str(path)
        if not (isinstance(content, bytes) and (b"long long" in content or b"word word" in content)):
            fields["model"]["name"] = ABSENT  # only a model's tokens can be too many
        sample.write(fields)
        read = readable.read
        what = f"{path.name}, {content[:60]!r}" if isinstance(content, bytes) else str(path)
        readable.case(what, [str(path)])
        if (readable.read > read) != good:
            readable.wrong.append(f"{what}: {'refused' if good else 'read'}")
    readable.end("odd data files", tally, 20)


# What hlora writes itself


@pytest.mark.parametrize("name", ["importance.safetensors", "adapter_model.safetensors", "importance.json"])
def test_wrong_importance(name: str, sample: Sample, tally: Any, tmp_path: Path) -> None:
    directory = tmp_path / "importance"
    shutil.copytree(sample.out / "importance", directory)
    corpus = Corpus(sample, ("inspect", directory, "--figure", tmp_path / "map"), ("importance",))
    corpus.bytes_of(directory / name)
    if name == "importance.json":
        document = json.loads((directory / name).read_text(encoding="utf-8"))
        for place, value in drawn(document, 40):
            (directory / name).write_text(json.dumps(changed(document, place, value)), encoding="utf-8")
            corpus.case(f"{place} = {value!r:.60}")
    corpus.end(name, tally, 12)


def test_importance_that_is_of_something_else(sample: Sample, tally: Any, tmp_path: Path) -> None:
    corpus = Corpus(sample, ("tune", sample.config), ())
    other = tmp_path / "other-model"
    shutil.copytree(sample.model, other)
    torch.manual_seed(7)
    LlamaForCausalLM(LlamaConfig.from_pretrained(sample.model)).save_pretrained(other)
    for fields, names in (
        ({"lora.rank": 2}, "rank"), ({"lora.alpha": 16}, "scale"), ({"lora.rslora": True}, "scale"),
        ({"lora.target_modules": ["q_proj", "k_proj"]}, "k_proj"), ({"lora.target_modules": ["q_proj"]}, "v_proj"),
        ({"penalty.anchor": "base", "lora.target_modules": ["o_proj"]}, "o_proj"),
        ({"model.name": str(other)}, "base weights"),
    ):  # fmt: skip
        overrides = [part for path, value in fields.items() for part in ("--set", f"{path}={json.dumps(value)}")]
        corpus.command = ("tune", sample.config, "--overwrite", *overrides)
        corpus.case(str(fields), [names, "self_attn"])
    corpus.end("importance of another rank, scale, target, model", tally, 7)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_wrong_adapter(name: str, sample: Sample, tally: Any) -> None:
    path, kept = sample.out / "adapter" / name, sample.directory / "kept" / "adapter" / name
    content, draw = path.read_bytes(), random.Random(0)
    corpus = Corpus(sample, ("evaluate", sample.config), ("out/adapter",))
    try:
        for step in range(LENGTHS):
            for each in (path, kept):
                each.write_bytes(content[: len(content) * step // LENGTHS])
            corpus.before = sample.sums()
            corpus.case(f"{name} cut at {len(content) * step // LENGTHS}")
        if name.endswith("json"):
            document = json.loads(content)
            for place, value in drawn({k: document[k] for k in ("r", "target_modules", "peft_type", "lora_alpha")}, 30):
                for each in (path, kept):
                    each.write_text(json.dumps(changed(document, place, value)), encoding="utf-8")
                corpus.before = sample.sums()
                corpus.case(f"{place} = {value!r:.60} {draw.random()}")
    finally:
        kept.write_bytes(content)
    corpus.end(name, tally, 10)


def saved_empty(figure: Any, file: Any, format: str, **options: Any) -> None:
    if format == "svg":
        file.write("<svg></svg>")
    else:
        Path(file).touch()


@pytest.mark.parametrize("name", ["results.json", "comparison.json"])
def test_wrong_results(name: str, sample: Sample, tally: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # What is read of a wrong one is drawn, but not turned into pictures: 8 s a comparison.
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", saved_empty)
    path, kept = sample.out / name, sample.directory / "kept" / name
    whole = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else make_comparison(SMALL, ["piqa"])
    content = json.dumps(whole).encode()
    corpus = Corpus(sample, ("report", sample.out), (name,))

    def case(what: str, changed: bytes) -> None:
        for each in (path, kept):
            each.write_bytes(changed)
        corpus.before = sample.sums()
        corpus.case(what)

    try:
        for step in range(LENGTHS):
            case(f"{name} cut at {len(content) * step // LENGTHS}", content[: len(content) * step // LENGTHS])
        for number, key in enumerate(whole):
            case(f"without {key}", json.dumps({k: v for k, v in whole.items() if k != key}).encode())
            values: tuple[Any, ...] = (None, "x", [1], {"a": 1})
            for value in values if LONG else values[number % 4 :][:1]:
                case(f"{key} = {value!r}", json.dumps({**whole, key: value}).encode())
        for odd in (b"[]", b"1", b"null", b"[" * 100_000, b"\xff", b'{"arms": {"base": 1}}'):
            case(f"{odd[:20]!r}", odd)
    finally:
        if name == "comparison.json":
            kept.unlink()
        else:
            kept.write_bytes(content)
    corpus.end(name, tally, 12)
