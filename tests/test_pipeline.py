"""The whole job on a tiny Llama, through the command line as a user runs it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Invoke
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hlora import pipeline
from hlora.config.reading import load_config, parse_config
from hlora.config.sections import ImportanceConfig
from hlora.importance.artefact import Importance
from hlora.numerics.encodings import Factored
from hlora.run import resume, steps
from hlora.run.phases import recorder_for
from hlora.system.errors import ConfigError
from hlora.system.locks import lock_directory


@pytest.fixture
def config(tmp_path: Path, job_fields: dict[str, Any]) -> Path:
    fields = {
        **job_fields,
        "evaluation": {"max_tokens": 200, "window": 64, "stride": 48, "generate": 4, "max_new_tokens": 4},
        "baselines": ["lora", "lora_after_general"],
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(fields), encoding="utf-8")
    return path


def results_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "results.json").read_text(encoding="utf-8"))


def test_run_writes_adapter_importance_results_and_report(hlora: Invoke, config: Path, tmp_path: Path) -> None:
    status, out, err = hlora("run", config)
    output = tmp_path / "out"
    assert status == 0, err
    assert str(output / "report.html").replace("\n", "") in out.replace("\n", "")

    results = results_of(output)
    assert set(results["arms"]) == {"base", "after_general", "hlora", "lora", "lora_after_general"}
    for arm in results["arms"].values():
        (text,) = arm["texts"].values()
        assert text["tokens"] == 199 and text["perplexity"] > 1 and text["bits_per_byte"] > 0
        assert text["forgetting"] == text["nll"] - next(iter(results["arms"]["base"]["texts"].values()))["nll"]
        assert {"answer_nll", "acc", "acc_norm", "exact_match"} <= set(arm["domain"])
        assert "drift_left_out" not in arm
    drifts = {arm: next(iter(found["texts"].values())) for arm, found in results["arms"].items()}
    assert {arm for arm, text in drifts.items() if text.get("kl_from_base", 0) > 0} == drifts.keys() - {"base"}
    tuned = {arm for arm, text in drifts.items() if text.get("kl_from_general", 0) > 0}
    assert tuned == {"hlora", "lora", "lora_after_general"}
    assert [entry["step"] for entry in results["history"]["tune"]] == [1, 2, 3, 4]
    last = results["history"]["tune"][-1]
    assert last["total_loss"] == pytest.approx(last["loss"] + last["weighted_regularisation_loss"])
    assert results["provenance"]["data"]["domain"]["train_rows"] == 24
    assert results["command"].startswith("hlora run")
    assert load_config(output / "config.yaml") == load_config(config)
    assert "<html" in (output / "report.html").read_text(encoding="utf-8")
    for phase in ("record", "tune", "lora", "lora_after_general"):
        assert list((output / "logs" / phase).rglob("events.out.tfevents*")), f"no TensorBoard log of {phase}"
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.slow
def test_rows_that_cannot_be_used_are_left_out_up_to_the_limit_and_listed_in_results_and_report(
    hlora: Invoke, config: Path, tmp_path: Path
) -> None:
    long = {"question": "very " * 300 + "long?", "choices": ["1", "2"], "label": 0}  # of 256 tokens of context
    with (tmp_path / "train.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"question": "half\n' + json.dumps({**long, "question": "What?", "label": 2}) + "\n")
        file.write(json.dumps({**long, "question": "long " * 60}) + "\n")  # of 64 tokens that are trained
    with (tmp_path / "test.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(long) + "\n")
    fields = ("--set", "baselines=[]", "--set", "evaluation.accuracy=false")
    status, _, err = hlora("run", config, *fields)
    assert status == 2 and not (tmp_path / "out" / "results.json").exists()
    assert re.search(r"train.jsonl: 2 of 27 rows .* domain.max_unusable \(1%\) allows 0 .* Row 25: not JSON", err), err
    status, _, err = hlora("run", config, *fields, "--set", "domain.max_unusable=2")  # the third is too long in tokens
    assert status == 2 and re.search(r"train.jsonl: 3 of 27 rows .* allows 2 ", err), err
    status, _, err = hlora("run", config, *fields, "--set", "domain.max_unusable=3")
    assert status == 0, err
    domain = results_of(tmp_path / "out")["provenance"]["data"]["domain"]
    assert (domain["train_rows"], domain["test_rows"]) == (24, 8)
    train, test = domain["unusable"].values()
    assert train["reasons"] == {"not JSON": 1, "wrong label": 1, "no answer left": 1}
    assert test["first"] == {"row 9": "too long: more than the 256 tokens of the model's context"}
    report = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Rows left out" in report and "wrong label: 2, expected 0 to 1" in report


@pytest.mark.slow
def test_adapter_of_a_run_works_in_plain_peft_and_differs_from_its_start(
    hlora: Invoke, config: Path, tmp_path: Path, model_dir: str
) -> None:
    assert hlora("run", config, "--set", "baselines=[]")[0] == 0
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model_dir), str(tmp_path / "out" / "adapter")
    )
    start = Importance.load(tmp_path / "out" / "importance")
    tuned = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    moved = [
        (tuned[f"base_model.model.{name}.lora_B.weight"] - matrix.B).abs().max()
        for name, matrix in start.matrices.items()
    ]
    assert min(moved) > 0
    assert plain(input_ids=torch.tensor([[5, 6, 7]])).logits.isfinite().all()


@pytest.mark.slow
def test_record_tune_evaluate_alone_equal_run(hlora: Invoke, config: Path, tmp_path: Path) -> None:
    steps, whole = tmp_path / "steps", tmp_path / "out"
    for verb in ("record", "tune", "evaluate"):
        assert hlora(verb, config, "--set", f"output={steps}")[0] == 0
    assert hlora("run", config)[0] == 0
    for file in ("adapter/adapter_model.safetensors", "importance/importance.safetensors"):
        alone, together = load_file(steps / file), load_file(whole / file)
        assert alone.keys() == together.keys()
        assert all(torch.equal(alone[name], together[name]) for name in alone), file
    assert results_of(steps)["arms"]["hlora"]["texts"]["general (held out)"]["forgetting"] != 0
    mine, theirs = results_of(steps)["arms"]["hlora"], results_of(whole)["arms"]["hlora"]
    assert mine["texts"] == theirs["texts"]
    assert mine["domain"]["answer_nll"] == theirs["domain"]["answer_nll"]


@pytest.mark.slow
def test_strong_penalty_keeps_what_is_important_closer_to_the_general_adapter(
    hlora: Invoke, config: Path, tmp_path: Path
) -> None:
    distance = {}
    for phi in (0, 1e4):
        assert hlora("run", config, "--set", f"penalty.phi={phi}", "--set", "baselines=[]", "--overwrite")[0] == 0
        start = Importance.load(tmp_path / "out" / "importance").matrices
        tuned = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
        distance[phi] = 0.0
        for name, matrix in start.items():
            A, B = (tuned[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB")
            assert isinstance(matrix.omega, Factored)
            rows, columns = matrix.omega.row, matrix.omega.column
            importance = torch.outer(rows, columns) / rows.sum()
            distance[phi] += float((importance * (B @ A - matrix.B @ matrix.A) ** 2).sum())
    assert distance[1e4] < 0.25 * distance[0]  # of squares


@pytest.mark.slow
def test_report_is_remade_from_results(hlora: Invoke, config: Path, tmp_path: Path) -> None:
    assert hlora("run", config, "--set", "baselines=[]")[0] == 0
    report = tmp_path / "out" / "report.html"
    written = report.read_text(encoding="utf-8")
    report.unlink()
    assert hlora("report", tmp_path / "out")[0] == 0
    assert report.read_text(encoding="utf-8") == written


def test_inspect_prints_norms_and_draws_the_heat_map_only_where_it_is_asked_to(
    hlora: Invoke, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert hlora("record", config)[0] == 0
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert hlora("inspect", tmp_path / "out" / "importance")[0] == 0
    assert not list(Path().iterdir())
    status, _, err = hlora("inspect", tmp_path / "out")
    assert status == 2 and f"Name the one in it: {tmp_path / 'out' / 'importance'}" in err, err
    status, out, _ = hlora("inspect", tmp_path / "out" / "importance", "--figure", tmp_path / "maps" / "map")
    assert status == 0
    assert "model.layers.1.self_attn.v_proj" in out and "factored" in out
    assert all((tmp_path / "maps" / f"map.{kind}").stat().st_size > 1000 for kind in ("png", "svg"))


def test_dense_importance_goes_through_the_whole_job(hlora: Invoke, config: Path, tmp_path: Path) -> None:
    settings = ["importance.method=path_integral", "importance.encoding=float32"]
    chosen = [part for setting in settings for part in ("--set", setting)]
    assert hlora("record", config, *chosen)[0] == 0
    assert hlora("tune", config, *chosen)[0] == 0
    status, out, _ = hlora("inspect", tmp_path / "out" / "importance", "--figure", tmp_path / "map")
    assert status == 0 and "float32" in out
    tensors = load_file(tmp_path / "out" / "importance" / "importance.safetensors")
    assert tensors["model.layers.0.self_attn.q_proj.dense"].dtype == torch.float32
    (tmp_path / "out" / "importance" / "importance.safetensors").write_bytes(b"damaged")
    status, _, err = hlora("inspect", tmp_path / "out" / "importance")
    assert status == 2 and "not a readable importance" in err


def test_the_recorder_is_the_configured_one(peft_model: PeftModel) -> None:
    usual = recorder_for(peft_model, ImportanceConfig(), 0)
    assert (usual.method, usual.kind) == ("squared_gradients", "squares")
    paper = recorder_for(peft_model, ImportanceConfig(method="path_integral", encoding="float32"), 0)
    assert (paper.method, paper.kind) == ("path_integral", "float32")


@pytest.mark.slow
def test_a_run_leaves_out_excluded_modules_and_trains_others_unprotected_where_it_is_told_to(
    hlora: Invoke, config: Path, tmp_path: Path
) -> None:
    embedded = ("--set", "lora.target_modules=[q_proj, v_proj, embed_tokens]", "--set", "baselines=[]")
    status, _, err = hlora("run", config, *embedded)
    assert status == 2 and re.search(r"embed_tokens \(LoRA on an embedding\).*importance\.unprotected: warn", err), err
    fields = (*embedded, "--set", "evaluation.accuracy=false", "--set", "importance.unprotected=warn")
    with pytest.warns(UserWarning, match=r"cannot protect model\.embed_tokens \(LoRA on an embedding\)"):
        status, _, err = hlora("run", config, *fields, "--set", "lora.exclude_modules=[layers.0.self_attn.v_proj]")
    assert status == 0, err
    protected = ["model.layers.0.self_attn.q_proj", *(f"model.layers.1.self_attn.{which}_proj" for which in "qv")]
    assert sorted(Importance.load(tmp_path / "out" / "importance").matrices) == protected
    tuned = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert len(tuned) == 2 * len(protected) + 2 and not [name for name in tuned if "layers.0.self_attn.v_proj" in name]
    assert next(each for name, each in tuned.items() if "lora_embedding_B" in name).abs().max() > 0


@pytest.mark.slow
def test_general_text_can_be_the_models_own(hlora: Invoke, config: Path, tmp_path: Path) -> None:
    own = ["general.source=model", "general.paths=[]", "general.samples=24", "general.sample_tokens=24"]
    arguments = [part for field in own for part in ("--set", field)]
    assert hlora("run", config, *arguments, "--set", "baselines=[]")[0] == 0
    results = results_of(tmp_path / "out")
    assert results["provenance"]["data"]["general"]["source"] == "model"
    assert list(results["arms"]["base"]["texts"]) == ["general (held out)"]


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["csv", "parquet", "jsonl"])
def test_prompt_and_completion_rows_train_without_choices(
    hlora: Invoke, config: Path, tmp_path: Path, suffix: str
) -> None:
    import pandas

    for name, numbers in (("a", range(12)), ("b", range(50, 54))):
        frame = pandas.DataFrame(
            {"prompt": [f"{n} plus one is" for n in numbers], "completion": [str(n) for n in numbers]}
        )
        path = tmp_path / f"{name}.{suffix}"
        if suffix == "csv":
            frame.to_csv(path, index=False)
        elif suffix == "parquet":
            frame.to_parquet(path)
        else:
            frame.to_json(path, orient="records", lines=True)
    fields = ["domain.task=rows", f"domain.train={tmp_path}/a.{suffix}", f"domain.test={tmp_path}/b.{suffix}"]
    arguments = [part for field in fields for part in ("--set", field)]
    status, _, err = hlora("run", config, *arguments, "--set", "baselines=[]")
    assert status == 0, err
    domain = results_of(tmp_path / "out")["arms"]["hlora"]["domain"]
    assert "acc" not in domain and domain["rows"] == 4


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["penalty.ph=1"], "penalty.ph: unknown field; did you mean 'phi'?"),
        (["model.name=/nowhere"], "model.name: /nowhere: no such file"),
        (["model.device=cuda:99"], "model.device"),
        (["lora.target_modules=[nope]"], "lora.target_modules"),
        (["general.paths=[missing.txt]"], "general.paths: missing.txt: no such file"),
        (["domain.train=missing.jsonl"], "domain.train: missing.jsonl: no such file"),
        (["domain.task=piqa"], "24 of 24 rows cannot be used"),
        (["training.common.learning_rat=1"], "did you mean 'learning_rate'?"),
        (["training.tune.lr_scheduler_type=nope"], "training"),
        (["training.record.per_device_train_batch_size=many"], "training"),
    ],
)
def test_wrong_input_is_one_message_and_status_2(
    hlora: Invoke, config: Path, tmp_path: Path, overrides: list[str], expected: str
) -> None:
    status, _, err = hlora("run", config, *(part for field in overrides for part in ("--set", field)))
    assert status == 2
    assert expected in err
    assert "Traceback" not in err
    assert not (tmp_path / "out" / "importance").exists()


def test_wrong_test_row_is_reported_before_anything_is_trained(
    hlora: Invoke, config: Path, tmp_path: Path, questions: tuple[str, str]
) -> None:
    with Path(questions[1]).open("a", encoding="utf-8") as file:
        file.write('{"question": "?", "choices": ["a", "b"], "label": 2}\n')
    status, _, err = hlora("run", config)
    assert status == 2
    assert "test.jsonl: 1 of 9 rows cannot be used" in err and "Row 9: wrong label: 2, expected 0 to 1" in err
    assert not (tmp_path / "out" / "logs").exists()


def test_tuning_under_an_importance_of_another_rank_names_the_first_matrix(hlora: Invoke, config: Path) -> None:
    assert hlora("record", config)[0] == 0
    status, _, err = hlora("tune", config, "--set", "lora.rank=2")
    assert status == 2
    assert "model.layers.0.self_attn.q_proj" in err and "r=4" in err


def test_tune_without_an_importance_says_how_to_make_one(hlora: Invoke, config: Path) -> None:
    status, _, err = hlora("tune", config)
    assert status == 2 and "hlora record" in err


def test_output_that_cannot_be_written_is_refused_at_once(hlora: Invoke, config: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    status, _, err = hlora("run", config, "--set", f"output={tmp_path}/file/out")
    assert status == 2 and "output:" in err


def test_printed_configuration_is_valid(hlora: Invoke, tmp_path: Path) -> None:
    status, out, _ = hlora("config")
    path = tmp_path / "start.yaml"
    path.write_text(out, encoding="utf-8")
    assert status == 0
    assert load_config(path).penalty.phi == 1


def test_version_is_the_packages(hlora: Invoke) -> None:
    from hlora import __version__

    assert hlora("--version")[1].strip() == __version__


@pytest.mark.slow
def test_demo_runs_whole_and_names_the_report(hlora: Invoke, tmp_path: Path, model_dir: str) -> None:
    smaller = [
        f"model.name={model_dir}",
        "training.record.max_steps=2",
        "training.tune.max_steps=2",
        "evaluation.max_tokens=128",
        "evaluation.max_rows=8",
        "evaluation.generate=2",
    ]
    output = tmp_path / "demo"
    arguments = [part for field in smaller for part in ("--set", field)]
    status, out, err = hlora("demo", "--output", output, *arguments)
    assert status == 0, err
    assert "report.html" in out and (output / "report.html").is_file()
    assert set(results_of(output)["arms"]) == {"base", "after_general", "hlora", "lora"}
    assert set(results_of(output)["arms"]["hlora"]["texts"]) == {"Python documentation", "other prose"}


@pytest.mark.slow
@pytest.mark.parametrize("probe", ["texts", "own samples"])
def test_a_run_on_a_budget_steers_phi_and_reports_what_it_cost(
    hlora: Invoke, config: Path, tmp_path: Path, probe: str
) -> None:
    changes = ["penalty.budget=1%", "penalty.anchor=base", "penalty.probe_every=1", "baselines=[]"]
    if probe == "texts":
        text = tmp_path / "probe.txt"
        text.write_text("Some other prose that nobody trains on or is measured by. " * 40, encoding="utf-8")
        changes.append(f"penalty.probe_texts={{prose: {text}}}")
    status, _, err = hlora("run", config, *(part for change in changes for part in ("--set", change)))
    assert status == 0, err
    history = results_of(tmp_path / "out")["history"]["tune"]
    probes = [entry for entry in history if "probe_rise" in entry]
    assert [entry["probe_step"] for entry in probes] == [1, 2, 3, 4]
    assert all(entry["budget"] == pytest.approx(0.00995, rel=1e-3) for entry in probes)
    assert probes[-1]["probe_rise"] <= probes[-1]["budget"] and probes[-1]["alpha"] > 0
    assert len({entry["phi"] for entry in history}) > 1
    assert "The forgetting budget" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_run_without_a_general_phase_records_squared_gradients_and_keeps_to_the_base(
    hlora: Invoke, config: Path, tmp_path: Path
) -> None:
    changes = ["penalty.anchor=base", "importance.method=squared_gradients", "importance.sequences=4", "baselines=[]"]
    changes.append("importance.sequence_length=16")
    status, _, err = hlora("run", config, *(part for change in changes for part in ("--set", change)))
    assert status == 0, err
    results = results_of(tmp_path / "out")
    assert set(results["arms"]) == {"base", "hlora"} and results["history"]["record"] == []
    assert results["importance"]["method"] == "squared_gradients" and results["importance"]["examples"] == 4
    assert results["history"]["tune"][-1]["regularisation_loss"] > 0


@pytest.mark.slow
def test_a_run_records_squared_gradients_along_its_general_phase(hlora: Invoke, config: Path, tmp_path: Path) -> None:
    changes = ["importance.method=squared_gradients", "baselines=[]"]
    status, _, err = hlora("run", config, *(part for change in changes for part in ("--set", change)))
    assert status == 0, err
    results = results_of(tmp_path / "out")
    assert set(results["arms"]) == {"base", "after_general", "hlora"}
    told = results["importance"]
    assert (told["method"], told["recorded"]) == ("squared_gradients", "along the general phase")
    assert told["unit"] == "token" and told["steps"] == len(results["history"]["record"]) and told["undo_cost"] > 0
    assert min(told["layer_weights"].values()) < 1 < max(told["layer_weights"].values())  # the root
    assert results["history"]["tune"][-1]["regularisation_loss"] > 0
    status, out, _ = hlora("inspect", str(tmp_path / "out" / "importance"))
    assert status == 0 and "squared_gradients" in out and "along the general phase" in out
    report = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "squared gradients" in report and "along the general phase" in report


def test_a_budget_that_cannot_be_watched_honestly_is_refused(hlora: Invoke, config: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("words " * 400, encoding="utf-8")
    same = [f"evaluation.texts={{a: {text}}}", f"penalty.probe_texts={{b: {text}}}", "penalty.budget=1%"]
    for changes, problem in (
        (same, "'b' is the evaluation text 'a'"),
        (["penalty.budget=much"], "penalty.budget: budget: expected a rise of perplexity"),
        (["penalty.budget=1%", "penalty.phi=0"], "penalty: phi: a budget steers it from where it starts"),
        (
            ["importance.method=squared_gradients", "importance.encoding=float32"],
            "importance.encoding: squared gradients along a general phase are kept as row and column sums",
        ),
        (
            ["importance.method=squared_gradients", "importance.gradient=effective"],
            "importance.gradient: squared gradients along a general phase are exact",
        ),
    ):
        status, _, err = hlora("run", config, *(part for change in changes for part in ("--set", change)))
        assert status == 2 and problem in " ".join(err.split())


class Cut(Exception):
    """Stands in for what ends a run from outside."""


def cut_at(monkeypatch: pytest.MonkeyPatch, where: str, count: int) -> None:
    """The count-th call of a step of the run ends it."""
    module = resume if where == "measure" else steps
    calls, whole = 0, getattr(module, where)

    def call(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            raise Cut
        return whole(*arguments, **options)

    monkeypatch.setattr(module, where, call)


def without_times(results: dict[str, Any]) -> dict[str, Any]:
    """What a run measured: all of results.json but clocks and the directory."""
    kept = json.loads(json.dumps(results))
    for part in ("seconds", "provenance", "command"):
        kept.pop(part)
    kept["config"].pop("output")
    return kept


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "count"),
    [("measure", 1), ("record_phase", 1), ("measure", 2), ("tune_phase", 1), ("measure", 3), ("measure", 4)],
)
def test_an_interrupted_run_goes_on_and_ends_with_the_same_results(
    job_fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, count: int
) -> None:
    fields = {
        **job_fields,
        "evaluation": {"max_tokens": 100, "window": 64, "stride": 48, "generate": 0, "accuracy": False},
        "baselines": ["lora_after_general"],
    }
    whole = pipeline.run(parse_config({**fields, "output": str(tmp_path / "whole")}))
    config = parse_config(fields)
    with monkeypatch.context() as patched:
        cut_at(patched, where, count)
        with pytest.raises(Cut):
            pipeline.run(config)
    phases: list[str] = []
    for name in ("record_phase", "tune_phase", "lora_after_general"):
        phase = getattr(steps, name)
        monkeypatch.setattr(steps, name, lambda *a, p=phase, n=name, **k: (phases.append(n), p(*a, **k))[1])
    results = pipeline.run(config)
    assert without_times(results) == without_times(whole)
    for artefact in ("importance/importance.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "out" / artefact).read_bytes() == (tmp_path / "whole" / artefact).read_bytes()
    finished = {("measure", 1): 0, ("record_phase", 1): 0, ("measure", 2): 1, ("tune_phase", 1): 1}
    done = finished.get((where, count), 2)
    assert phases == ["record_phase", "tune_phase", "lora_after_general"][done:], "a finished phase was run again"
    assert not (tmp_path / "out" / "unfinished.json").exists()
    assert not list((tmp_path / "out" / "logs").glob("*/checkpoint-*"))


@pytest.mark.slow
def test_an_unfinished_run_with_other_settings_is_not_gone_on_with(
    job_fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fields = {**job_fields, "evaluation": {"max_tokens": 100, "window": 64, "stride": 48, "generate": 0}}
    with monkeypatch.context() as patched:
        cut_at(patched, "tune_phase", 1)
        with pytest.raises(Cut):
            pipeline.run(parse_config(fields))
    with pytest.raises(ConfigError, match=r"was recorded with other settings: seed \(there 0, here 1\)"):
        pipeline.run(parse_config({**fields, "seed": 1}))
    results = pipeline.run(parse_config({**fields, "seed": 1}), overwrite=True)
    assert "had other settings or data; restarting" in caplog.text
    assert results["provenance"]["seed"] == 1 and results["history"]["record"]


@pytest.mark.slow
def test_an_unfinished_run_measured_in_another_way_keeps_what_it_trained(
    job_fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fields = {**job_fields, "evaluation": {"max_tokens": 100, "window": 64, "stride": 48, "generate": 0}}
    with monkeypatch.context() as patched:
        cut_at(patched, "measure", 3)  # as where memory is short
        with pytest.raises(Cut):
            pipeline.run(parse_config(fields))
    for phase in ("record_phase", "tune_phase"):
        monkeypatch.setattr(steps, phase, lambda *arguments: pytest.fail("a finished phase was run again"))
    fields["evaluation"] |= {"batch_size": 2, "max_tokens": 80}
    fields["training"]["common"]["report_to"] = "none"
    results = pipeline.run(parse_config(fields))
    assert "what was trained is kept" in caplog.text
    assert [arm["texts"]["general (held out)"]["tokens"] for arm in results["arms"].values()] == [79, 79, 79]
    assert results["config"]["evaluation"]["batch_size"] == 2 and results["history"]["tune"]
    assert pipeline.run(parse_config(fields))["arms"] == results["arms"]  # finished, by these settings


@pytest.mark.slow
def test_a_damaged_note_of_what_was_finished_is_named_and_the_run_starts_anew(
    job_fields: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "unfinished.json").write_text('{"made_from": "', encoding="utf-8")
    fields = {**job_fields, "evaluation": {"max_tokens": 100, "window": 64, "stride": 48, "generate": 0}}
    assert pipeline.run(parse_config(fields))["arms"]["hlora"]
    assert "unfinished.json: JSONDecodeError" in caplog.text


def test_a_second_run_on_one_output_directory_is_refused_with_the_first_ones_process(
    hlora: Invoke, config: Path, tmp_path: Path
) -> None:
    with lock_directory(tmp_path / "out"):
        status, _, err = hlora("run", config)
    assert status == 2
    assert re.search(rf"output: \S+ is in use by process {os.getpid()}, started \d{{4}}-", err), err


@pytest.mark.slow
def test_evaluating_again_keeps_the_curves(hlora: Invoke, config: Path, tmp_path: Path) -> None:
    assert hlora("run", config)[0] == 0
    before = results_of(tmp_path / "out")
    (tmp_path / "out" / "unfinished.json").write_text("{}", encoding="utf-8")  # of a run that was interrupted since
    assert hlora("evaluate", config)[0] == 0
    assert (tmp_path / "out" / "unfinished.json").exists()
    after = results_of(tmp_path / "out")
    assert after["history"] == before["history"] and after["history"]["tune"]
    assert after["seconds"]["tune"] == before["seconds"]["tune"]
    assert after["arms"]["hlora"] == before["arms"]["hlora"]
    (tmp_path / "out" / "results.json").write_text("{", encoding="utf-8")
    assert hlora("evaluate", config)[0] == 0
    assert results_of(tmp_path / "out")["arms"]["hlora"] == before["arms"]["hlora"]


@pytest.mark.slow
def test_evaluating_again_keeps_the_baselines_of_the_same_settings(
    job_fields: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    evaluation = {"max_tokens": 100, "window": 64, "stride": 48, "generate": 0, "accuracy": False}
    fields = {**job_fields, "evaluation": evaluation, "baselines": ["lora"]}
    before = pipeline.run(parse_config(fields))["arms"]
    assert list(before) == ["base", "after_general", "hlora", "lora"]
    assert pipeline.evaluate_output(parse_config(fields))["arms"] == before
    assert "left out" not in caplog.text
    fields["evaluation"]["max_tokens"] = 80
    assert list(pipeline.evaluate_output(parse_config(fields))["arms"]) == ["base", "hlora"]
    assert "left out: after_general, lora, which was measured with other settings: evaluation.max_tokens" in caplog.text
