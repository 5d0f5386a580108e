"""The YAML: every field explained, every mistake one line that says where, what and what was meant."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY
from pydantic import BaseModel

from hlora.config.paths import argument_at_home
from hlora.config.reading import load_comparison, load_config, parse_config
from hlora.config.run import RunConfig
from hlora.config.starting import starting_yaml
from hlora.data.demo import DEMO_YAML
from hlora.system.errors import ConfigError

SHIPPED = [*sorted((REPOSITORY / "configs").glob("*.yaml")), DEMO_YAML]


def minimal() -> dict[str, Any]:
    """A new mapping each time, for parse_config may change it."""
    return {
        "output": "runs/mine",
        "model": {"name": "smollm2-135m"},
        "general": {"paths": ["general.txt"]},
        "domain": {"task": "rows", "train": "train.jsonl", "test": "test.jsonl"},
    }


def fields(section: type[BaseModel] = RunConfig, path: str = "") -> Iterator[tuple[str, Any]]:
    """Path and definition of every field, sections included."""
    for name, field in section.model_fields.items():
        yield f"{path}{name}", field
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from fields(inner, f"{path}{name}.")


def at(value: Any, path: str) -> Any:
    for part in path.split("."):
        value = value[part] if isinstance(value, dict) else getattr(value, part)
    return value


def errors(data: dict[str, Any], *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(data, "my.yaml", list(overrides))
    return str(caught.value).splitlines()


def test_every_field_says_what_it_is() -> None:
    assert [path for path, field in fields() if len((field.description or "").split()) < 2] == []


def test_the_starting_yaml_validates_and_holds_every_field_with_its_default() -> None:
    text = starting_yaml()
    data = yaml.safe_load(text)
    config = parse_config(yaml.safe_load(text))
    for path, field in fields():
        inner = field.annotation
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            assert at(data, path) == at(config, path), path
    assert config.lora == parse_config(minimal()).lora
    assert config.penalty == parse_config(minimal()).penalty
    assert config.evaluation == parse_config(minimal()).evaluation


def test_the_starting_yaml_explains_every_field_in_the_lines_above_it() -> None:
    lines = starting_yaml().splitlines()
    for path, field in fields():
        name = path.rsplit(".", 1)[-1]
        indent = "  " * path.count(".")
        places = [n for n, line in enumerate(lines) if line.startswith(f"{indent}{name}:")]
        last_words = field.description.split()[-1]
        assert any(lines[n - 1].startswith(f"{indent}# ") and lines[n - 1].endswith(last_words) for n in places), path


@pytest.mark.parametrize("path", SHIPPED, ids=[path.name for path in SHIPPED])
def test_every_shipped_configuration_validates(path: Path) -> None:
    load = load_comparison if path.name.startswith("compare") else load_config
    assert load(path).output.startswith("runs/")


def test_a_resolved_configuration_reads_back_as_itself(tmp_path: Path) -> None:
    config = parse_config(minimal(), overrides=["penalty.phi=30", "baselines=[lora]", "importance.xi=1e-7"])
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(), sort_keys=False), encoding="utf-8")
    assert load_config(file) == config


def test_an_override_sets_a_field_of_a_section_that_the_file_does_not_have() -> None:
    config = parse_config(minimal(), overrides=["penalty.phi=30", "output=runs/stronger", "general.max_documents=null"])
    assert (config.penalty.phi, config.output, config.general.max_documents) == (30.0, "runs/stronger", None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1e-3", 1e-3), ("1E5", 1e5), ("-2.5e+2", -250.0), (".5e1", 5.0), ("3", 3), ("0.25", 0.25)],
)
def test_a_number_with_an_exponent_is_a_number_in_yaml_and_in_overrides(
    text: str, expected: float, tmp_path: Path
) -> None:
    data = minimal()
    by_override = parse_config(data, overrides=[f"training.common.weight_decay={text}"])
    file = tmp_path / "my.yaml"
    file.write_text(yaml.safe_dump(minimal()) + f"training: {{common: {{weight_decay: {text}}}}}\n")
    for config in (by_override, load_config(file)):
        value = config.training.common["weight_decay"]
        assert value == expected and isinstance(value, int | float)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("packing", "false", False),
        ("bf16", "False", False),
        ("gradient_checkpointing", "no", False),
        ("dataloader_drop_last", "true", True),
        ("max_steps", "3", 3),
        ("learning_rate", "5e-3", 5e-3),
        ("save_strategy", "no", "no"),
        ("optim", "adamw_torch", "adamw_torch"),
    ],
)
def test_an_argument_in_quotes_is_what_the_text_says(name: str, text: str, expected: Any) -> None:
    fields = {**minimal(), "training": {"tune": {name: text}}}
    value = parse_config(fields).training.tune[name]
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "utf-8"])
def test_a_file_is_read_as_powershell_and_others_write_it(encoding: str, tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_bytes(
        "\r\n".join(yaml.safe_dump({**minimal(), "output": "runs/möwe"}, allow_unicode=True).splitlines()).encode(
            encoding
        )
    )
    assert load_config(file).output == "runs/möwe"


@pytest.mark.parametrize(
    "field", ["penalty", "importance", "training", "training.tune", "evaluation.texts", "baselines", "general.mixture"]
)
def test_a_section_whose_lines_are_all_commented_out_is_empty(field: str) -> None:
    assert parse_config(minimal(), overrides=[f"{field}=null"]) == parse_config(minimal())


def test_a_field_of_an_empty_section_can_be_set() -> None:
    assert parse_config({**minimal(), "penalty": None}, overrides=["penalty.phi=3"]).penalty.phi == 3
    with pytest.raises(ConfigError, match=r"^config: model.name: required, but missing$"):
        parse_config({**minimal(), "model": None})


@pytest.mark.parametrize("field", ["tasks", "arms", "methods", "orders"])
def test_a_comparison_in_place_of_a_run_is_sent_to_hlora_compare(field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field}: a field of a comparison, which `hlora compare` runs") as refused:
        parse_config({**minimal(), "seeds": [0, 1], field: {}})
    assert "unknown field" not in str(refused.value)


def test_a_tilde_is_the_home_directory_in_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    monkeypatch.setenv("USERPROFILE", "/home/ann")
    fields = {
        "output": "~/runs/x",
        "after": "~/runs/a",
        "model": {"name": "~/base"},
        "general": {"mixture": [{"paths": "~/g.txt"}, {"source": "hub", "dataset": "~/data"}]},
        "domain": {"task": "rows", "train": "~/train.jsonl", "test": "~/test.jsonl", "validation": "~/v.jsonl"},
        "penalty": {"probe_texts": {"p": "~/p.txt"}},
        "evaluation": {"texts": {"e": "~/e.txt"}},
    }
    config = parse_config(fields)
    assert "~" not in config.model_dump_json() and config.model_dump_json().count("/home/ann/") == 10
    used = parse_config(minimal(), overrides=["importance=~/used", "output=runs/~x", "domain.train=x~/y.jsonl"])
    assert (used.importance.use, used.output, used.domain.train) == ("/home/ann/used", "runs/~x", "x~/y.jsonl")
    assert [argument_at_home(word) for word in ("~/a", "--output=~/a", "run", "--set", "output=~/a", "--", "")] == [
        *("/home/ann/a", "--output=/home/ann/a", "run", "--set", "output=~/a", "--", "")
    ]


@pytest.mark.parametrize("text", ["1e3x", "e5", "be-3", "'1e-3'"])
def test_what_only_looks_like_a_number_stays_text(text: str) -> None:
    assert parse_config(minimal(), overrides=[f"output={text}"]).output == text.strip("'")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("lora.rnk=3", "lora.rnk: unknown field; did you mean 'rank'?"),
        ("penlty.phi=3", "penlty: unknown field; did you mean 'penalty'?"),
        (
            "importance.flush_every=8",
            "importance.flush_every: unknown field; valid: "
            "encoding, gradient, method, sequence_length, sequences, stop_at_move, unprotected, use, xi",
        ),
        (
            "importance.offload=true",
            "importance.offload: unknown field; valid: "
            "encoding, gradient, method, sequence_length, sequences, stop_at_move, unprotected, use, xi",
        ),
        ("lora.x=1", "lora.x: unknown field; valid: alpha, dropout, exclude_modules, rank, rslora, target_modules"),
        ("lora.rank=0", "lora.rank: expected greater than or equal to 1; got 0"),
        ("lora.rank=2.5", "lora.rank: expected a valid integer, got a number with a fractional part; got 2.5"),
        ("lora.dropout=1", "lora.dropout: expected less than 1; got 1"),
        ("lora.target_modules=3", "lora.target_modules: expected a list of module names, or all-linear; got 3"),
        (
            "lora.target_modules=[1, 2]",
            "lora.target_modules: expected a list of module names, or all-linear; got [1, 2]",
        ),
        ("lora.target_modules=[]", "lora.target_modules: expected a list of module names, or all-linear; got []"),
        ("lora=3", "lora: expected a section of fields; got 3"),
        ("penalty.phi=.inf", "penalty.phi: expected a finite number; got inf"),
        ("penalty.phi=-1", "penalty.phi: expected greater than or equal to 0; got -1"),
        (
            "penalty.phi=abc",
            "penalty.phi: expected a valid number, unable to parse string as a number; got 'abc'",
        ),
        (
            "importance.encoding=factord",
            "importance.encoding: expected one of float32, factored; got 'factord'; did you mean 'factored'?",
        ),
        ("domain.task=xyz", "domain.task: expected one of sciq, piqa, medmcqa, multiple_choice, rows; got 'xyz'"),
        (
            "baselines=[lora_mi]",
            "baselines.0: expected one of lora, lora_after_general; got 'lora_mi'; did you mean 'lora'?",
        ),
        ("general.source=hub", "general: source 'hub' needs dataset, the name of a hub data set"),
        (
            "general.paths=[]",
            "general: source 'files' needs paths, a list of .txt, .jsonl, .json, .parquet or .csv files",
        ),
        (
            "training.tune.lerning_rate=1",
            "training.tune: 'lerning_rate' is not an argument of trl.SFTConfig; did you mean 'learning_rate'?",
        ),
        ("evaluation.texts=[a.txt]", "evaluation.texts: expected a valid dictionary; got ['a.txt']"),
    ],
)
def test_a_wrong_field_is_one_line_with_path_expectation_and_nearest_name(override: str, expected: str) -> None:
    assert errors(minimal(), override) == [f"my.yaml: {expected}"]


def test_the_exact_gradient_is_for_squared_gradients() -> None:
    (line,) = errors(minimal(), "importance.method=path_integral", "importance.gradient=exact")
    assert line == (
        "my.yaml: importance: gradient: a path integral takes the effective one; exact is for squared_gradients"
    )
    squares = ("penalty.anchor=base",)
    for gradient in ("exact", "effective"):
        assert (
            parse_config(minimal(), "my.yaml", [*squares, f"importance.gradient={gradient}"]).importance.gradient
            == gradient
        )


def test_output_directory_and_seed_of_a_phase_cannot_be_set_past_the_configuration() -> None:
    for name in ("output_dir", "seed"):
        (line,) = errors(minimal(), f"training.common.{name}=1")
        assert line.startswith(f"my.yaml: training.common: {name} cannot be set here: hlora sets it from ")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("q_proj", ["q_proj"]),
        ("self_attn.q_proj", ["self_attn.q_proj"]),
        ("q_proj,v_proj", ["q_proj", "v_proj"]),
        ("all-linear", "all-linear"),
        ("[all-linear]", "all-linear"),
        ("[q_proj, v_proj]", ["q_proj", "v_proj"]),
        (r"'.*layers\.[01]\..*q_proj'", r".*layers\.[01]\..*q_proj"),
    ],
)
def test_module_names_as_text_are_a_list_and_only_a_pattern_stays_text(given: str, expected: Any) -> None:
    assert parse_config(minimal(), overrides=[f"lora.target_modules={given}"]).lora.target_modules == expected


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.tune.eval_strategy=steps", "training.tune: eval_strategy cannot be set here: set domain.validation"),
        ("training.common.load_best_model_at_end=true", "training.common: load_best_model_at_end cannot be set here"),
        ("training.common.resume_from_checkpoint=x", "training.common: resume_from_checkpoint cannot be set here: the"),
        ("training.record.push_to_hub=true", "training.record: push_to_hub cannot be set here"),
        ("training.tune.assistant_only_loss=true", "training.tune: assistant_only_loss cannot be set here"),
        ("training.common.dataset_text_field=body", "training.common: dataset_text_field cannot be set here: name the"),
        (
            "training.common.chat_template_path=x",
            "training.common: chat_template_path cannot be set here",
        ),
        ("training.common.fsdp=full_shard", "training.common: fsdp cannot be set here: ask for it in the launch"),
        ("training.common.lr_scheduler_type=cosin", "training.common: lr_scheduler_type: expected one of linear, "),
        ("training.common.report_to=[wanbd]", "training.common: report_to: 'wanbd' is not a tracker; did you mean"),
        ("training.tune.num_train_epochs=0", "training.tune: num_train_epochs: expected more than 0, got 0"),
    ],
)
def test_a_training_argument_that_could_only_be_ignored_or_fail_is_refused(override: str, expected: str) -> None:
    (line,) = errors(minimal(), override)
    assert line.startswith(f"my.yaml: {expected}"), line


def test_a_plain_no_is_read_as_the_choice_that_it_is_and_an_argument_that_is_off_is_accepted() -> None:
    off = ["eval_strategy=no", "save_strategy=no", "load_best_model_at_end=false", "push_to_hub=false"]
    read = parse_config(minimal(), overrides=[f"training.common.{each}" for each in off]).training.common
    assert read == {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False, "push_to_hub": False}


def test_several_mistakes_are_reported_together_one_line_each() -> None:
    data = minimal()
    del data["domain"]["train"]
    assert errors(data, "lora.rnk=3", "seed=x") == [
        "my.yaml: seed: expected a valid integer, unable to parse string as an integer; got 'x'",
        "my.yaml: lora.rnk: unknown field; did you mean 'rank'?",
        "my.yaml: domain.train: required, but missing",
    ]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("penalty.phi", "--set 'penalty.phi': expected field=value, such as penalty.phi=9"),
        ("=9", "--set '=9': expected field=value, such as penalty.phi=9"),
        ("output.x=9", "--set 'output.x=9': output is not a section"),
        ("seed=[1", "--set 'seed=[1': not a YAML value"),
    ],
)
def test_a_malformed_override_is_quoted_in_its_error(override: str, expected: str) -> None:
    (line,) = errors(minimal(), override)
    assert line.startswith(expected)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a: [1", "not readable as YAML"),
        (b"\xff\xfa", "not readable as YAML"),
        (b"- a\n- b\n", "expected a mapping of fields, got list"),
        (b"", "expected a mapping of fields, got NoneType"),
        (b"output: !!python/object/apply:os.getcwd []", "not readable as YAML"),
    ],
)
def test_a_file_that_is_no_configuration_is_one_line_that_names_it(
    content: bytes, expected: str, tmp_path: Path
) -> None:
    file = tmp_path / "my.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert str(caught.value).startswith(f"{file}: {expected}") and "\n" not in str(caught.value)


def test_a_missing_file_says_how_to_get_a_starting_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such file. `hlora config > .*my.yaml` writes a starting one"):
        load_config(tmp_path / "my.yaml")


def test_the_general_phase_takes_a_quarter_of_the_learning_rate_unless_told_otherwise() -> None:
    common = {"learning_rate": 8e-4, "warmup_steps": 3}
    config = parse_config({**minimal(), "training": {"common": common}})
    assert config.training.record_arguments() == {"packing": True, "learning_rate": 2e-4, "warmup_steps": 3}
    assert config.training.tune_arguments() == common
    config = parse_config({**minimal(), "training": {"common": common, "record": {"learning_rate": 1e-3}}})
    assert config.training.record_arguments()["learning_rate"] == 1e-3
    assert "learning_rate" not in parse_config(minimal()).training.record_arguments()


def test_the_papers_preset_gives_way_to_what_is_said() -> None:
    config = parse_config({**minimal(), "preset": "paper", "lora": {"rank": 4}}, overrides=["penalty.phi=3"])
    assert (config.lora.rank, config.lora.alpha) == (4, 32)
    assert (config.importance.encoding, config.training.general_rate) == ("float32", 1.0)
    assert (config.penalty.anchor, config.penalty.layer_weights, config.penalty.phi) == ("general", "softmax", 3)
    ours = parse_config(minimal())
    assert (ours.importance.encoding, ours.training.general_rate) == ("factored", 0.25)
    assert errors({**minimal(), "preset": "paper", "lora": 3}) == ["my.yaml: lora: expected a section of fields; got 3"]


@pytest.mark.parametrize("budget", ["1%", "0.5 %", 0.01, "0.01"])
def test_a_budget_is_a_percentage_or_nats(budget: Any) -> None:
    assert parse_config({**minimal(), "penalty": {"budget": budget}}).penalty.budget == budget


def test_one_general_file_need_not_be_a_list(job_fields: dict[str, Any]) -> None:
    assert parse_config(job_fields, overrides=["general.paths=a, b.txt"]).general.paths == ["a, b.txt"]
