"""Domain after domain: `--after` goes on from the last adapter under the importance of everything before."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from hlora import pipeline
from hlora.config.reading import load_config, parse_config
from hlora.importance.artefact import Importance
from hlora.numerics import encodings
from hlora.report.run.chain import chain_tables, general_forgetting, transfer
from hlora.report.run.page import write_report
from hlora.run import phases, steps
from hlora.system.errors import ArtifactError, ConfigError, DataError
from hlora.training import checkpoint

ADAPTER, AFTER = "adapter/adapter_model.safetensors", "importance-after/importance.safetensors"


@pytest.fixture
def second(tuned_run: Path, tmp_path: Path) -> dict[str, Any]:
    """Settings of a second domain after the finished run."""
    fields = yaml.safe_load((tuned_run / "config.yaml").read_text(encoding="utf-8"))
    for name, start, count in (("train", 0, 24), ("test", 100, 8)):
        rows = [{"prompt": f"What is {n} minus one?", "completion": f" {n - 1}"} for n in range(start, start + count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    fields["domain"] |= {"train": str(tmp_path / "train.jsonl"), "test": str(tmp_path / "test.jsonl")}
    for section in ("importance", "penalty"):
        fields.pop(section)
    return {**fields, "output": str(tmp_path / "second"), "after": str(tuned_run)}


def test_the_importance_after_a_run_adds_the_domain_and_is_anchored_at_the_tuned_adapter(tuned_run: Path) -> None:
    general, total = (Importance.load(tuned_run / name) for name in ("importance", "importance-after"))
    tuned = load_file(tuned_run / ADAPTER)
    for name, matrix in total.matrices.items():
        for factor in ("A", "B"):
            assert torch.equal(getattr(matrix, factor), tuned[f"base_model.model.{name}.lora_{factor}.weight"])
        for part, values in encodings.parts(matrix.omega).items():
            added = values - encodings.parts(general.matrices[name].omega)[part]
            assert (added >= 0).all() and added.max() > 0
    assert [part["data"].get("task") for part in total.provenance["parts"]] == [None, "rows"]


def test_recording_on_the_way_does_not_change_the_tuned_adapter(
    second: dict[str, Any], tuned_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_on_domain, given = phases.train_on_domain, tuned_run / "importance"
    fields = yaml.safe_load((tuned_run / "config.yaml").read_text(encoding="utf-8"))

    def without_recorder(*arguments: Any, recorder: Any = None, **options: Any) -> Any:
        return train_on_domain(*arguments, **options)

    monkeypatch.setattr(phases, "train_on_domain", without_recorder)
    pipeline.tune(parse_config({**fields, "output": str(tmp_path / "alone"), "importance": str(given)}))
    assert (tmp_path / "alone" / ADAPTER).read_bytes() == (tuned_run / ADAPTER).read_bytes()
    assert not (tmp_path / "alone" / "importance-after").exists()


def test_a_second_domain_is_killed_resumed_and_byte_equal_with_the_matrix_of_both(
    second: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pipeline.run(parse_config(second))
    chain = whole["chain"]
    assert chain["domains"] == ["run", "second"] and list(chain["after"]["second"]) == ["run", "second"]
    assert chain["after"]["second"]["second"] == whole["arms"]["hlora"]["domain"]
    assert chain["before"]["second"] == whole["arms"]["before this domain"]["domain"]
    assert chain["after"]["run"]["run"]["answer_nll"] != chain["after"]["second"]["run"]["answer_nll"]
    assert not (tmp_path / "second" / "importance").exists() and "record" not in whole["history"]
    report = (tmp_path / "second" / "report.html").read_text(encoding="utf-8")
    assert "Domain after domain" in report and "Backward transfer" in report

    class Cut(Exception): ...

    again = {**second, "output": str(tmp_path / "again" / "second")}
    monkeypatch.setattr(checkpoint, "_EVERY", 0.0)  # after each step
    with monkeypatch.context() as patched:
        patched.setattr(steps, "save_adapter", lambda *_: (_ for _ in ()).throw(Cut))
        with pytest.raises(Cut):
            pipeline.run(parse_config(again))
    assert list((tmp_path / "again" / "second" / "logs" / "tune").glob("checkpoint-*"))
    resumed = pipeline.run(parse_config(again))
    for file in (ADAPTER, AFTER):
        assert (tmp_path / "again" / "second" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
    assert resumed["chain"] == chain and resumed["arms"] == whole["arms"]
    again_measured = pipeline.evaluate_output(parse_config(again))
    assert again_measured["chain"] == chain and again_measured["arms"] == whole["arms"]


def test_a_strong_penalty_keeps_the_second_adapter_at_the_first(
    second: dict[str, Any], tuned_run: Path, tmp_path: Path
) -> None:
    start, distance = Importance.load(tuned_run / "importance-after").matrices, {}
    second["training"]["tune"] = {"learning_rate": 5e-3, "max_steps": 8, "max_length": 64}
    for phi in (0, 1e4):
        pipeline.tune(parse_config({**second, "output": str(tmp_path / str(phi)), "penalty": {"phi": phi}}))
        tuned = load_file(tmp_path / str(phi) / ADAPTER)
        moved = [
            tuned[f"base_model.model.{name}.lora_B.weight"] @ tuned[f"base_model.model.{name}.lora_A.weight"]
            - m.B @ m.A
            for name, m in start.items()
        ]
        distance[phi] = sum(float(each.norm()) for each in moved)
    assert distance[1e4] < 0.7 * distance[0]


def test_a_chain_that_does_not_hold_is_refused_by_name(
    second: dict[str, Any], tuned_run: Path, tmp_path: Path, hlora: Any
) -> None:
    path = tmp_path / "second.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in second.items() if k != "after"}), encoding="utf-8")
    (tmp_path / "unfinished").mkdir()
    for arguments, problem in (
        (("--after", tmp_path / "unfinished"), "is not a finished run"),
        (("--after", tuned_run.parent), f"is not a finished run. Name one of the runs in it: {tuned_run}."),
        (("--after", tuned_run, "--set", f"output={tuned_run}", "--overwrite"), "comes after this run itself"),
        (("--after", tuned_run, "--set", "penalty.anchor=base"), "set penalty.anchor to general"),
        (("--after", tuned_run, "--importance", "ann/x"), "importance.use: after brings the importance"),
        (("--after", tuned_run, "--set", "importance.encoding=float32"), "float32, but"),
        (("--after", tuned_run, "--set", "importance.method=path_integral"), "importance.method: path_integral"),
        (("--after", tuned_run, "--set", "lora.rank=2"), "importance was recorded with A (4, 32)"),
    ):
        status, _, err = hlora("run", path, *arguments)
        assert status == 2 and problem in err and "Traceback" not in err, err
    assert not (tmp_path / "second" / "results.json").exists()


def test_other_test_rows_than_then_are_refused(second: dict[str, Any], tuned_run: Path, tmp_path: Path) -> None:
    first = load_config(tuned_run / "config.yaml")
    results = json.loads((tuned_run / "results.json").read_text(encoding="utf-8"))
    results["provenance"]["data"]["domain"]["test_sha256"] = "another"
    copy = tmp_path / "first"
    copy.mkdir()
    (copy / "importance-after").symlink_to(tuned_run / "importance-after")
    (copy / "results.json").write_text(json.dumps(results), encoding="utf-8")
    with pytest.raises(DataError, match="not the test rows that"):
        pipeline.run(parse_config({**second, "after": str(copy)}))
    assert first.domain.test and not (tmp_path / "second" / "adapter").exists()  # before anything was trained


def test_a_run_that_recorded_nothing_on_the_way_cannot_be_gone_on_from(
    second: dict[str, Any], tuned_run: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "first"
    copy.mkdir()
    (copy / "results.json").write_text((tuned_run / "results.json").read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(ArtifactError, match="has no importance-after"):
        pipeline.run(parse_config({**second, "after": str(copy)}))


def test_after_and_use_exclude_each_other(job_fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"after brings the importance"):
        parse_config({**job_fields, "after": "runs/a", "importance": "runs/b/importance"})


MADE: dict[str, Any] = {
    "domains": ["a", "b", "c"],
    "base": {name: {"answer_nll": 10.0, "acc": 0.2} for name in "abc"},
    "before": {"a": {}, "b": {"answer_nll": 9.0, "acc": 0.3}, "c": {"answer_nll": 11.0, "acc": 0.1}},
    "after": {
        "a": {"a": {"answer_nll": 4.0, "acc": 0.8}},
        "b": {"a": {"answer_nll": 5.0, "acc": 0.7}, "b": {"answer_nll": 3.0, "acc": 0.9}},
        "c": {
            name: {"answer_nll": nll, "acc": acc} for name, nll, acc in (("a", 6, 0.6), ("b", 3, 0.9), ("c", 2, 1.0))
        },
    },
    "forgetting": {"a": {"mean": 0.1, "worst": 0.2}, "b": {"mean": 0.15, "worst": 0.2}, "c": {"mean": -0.05}},
}


def test_transfer_is_that_of_lopez_paz_and_ranzato() -> None:
    nll, accuracy = transfer(MADE, "answer_nll"), transfer(MADE, "acc")
    assert nll is not None and accuracy is not None
    values = [[each.value for each in means] for means in (nll, accuracy)]
    assert values[0] == pytest.approx(((6 + 3 + 2) / 3, ((6 - 4) + (3 - 3)) / 2, ((9 - 10) + (11 - 10)) / 2))
    assert values[1] == pytest.approx((2.5 / 3, -0.1, ((0.3 - 0.2) + (0.1 - 0.2)) / 2))


def test_the_error_of_transfer_is_that_of_differences_paired_by_question() -> None:
    def each(*values: float) -> dict[str, Any]:
        return {"answer_nll": statistics.fmean(values), "answer_nll_each": list(values)}

    chain = {
        "domains": ["a", "b"],
        "base": {"a": each(9, 9, 9), "b": each(7, 8, 9)},
        "before": {"a": {}, "b": each(6, 7, 8)},  # each question one nat better: no noise
        "after": {"a": {"a": each(1, 2, 3)}, "b": {"a": each(2, 4, 3), "b": each(5, 5, 5)}},
        "forgetting": {"a": {}, "b": {}},
    }
    means = transfer(chain, "answer_nll")
    assert means is not None
    assert means.backward == pytest.approx((1.0, statistics.stdev([1, 2, 0]) / math.sqrt(3)))
    assert means.forward == pytest.approx((-1.0, 0.0))
    assert f"± {means.backward.stderr:.2f} nats (above 0: forgotten)" in chain_tables(chain)[0]["said"]


def test_the_report_of_a_chain_has_matrix_transfer_and_picture(tmp_path: Path) -> None:
    nll, accuracy = chain_tables(MADE)
    assert nll["heading"] == ["", "a", "b", "c"]
    assert nll["rows"][1] == ["after a", "4.00", "9.00", "–"]  # b before it is tuned
    assert nll["rows"][2] == ["after b", "5.00", "3.00", "11.0"]
    assert "Backward transfer +1.00 nats (above 0: forgotten)" in nll["said"]
    assert "Backward transfer −10.0 points (below 0: forgotten)" in accuracy["said"]
    assert "a +0.100, b +0.150, c −0.050" in general_forgetting(MADE)
    older = {**MADE, "after": {**MADE["after"], "a": {"a": {"answer_nll": 4.0}}}}  # the first run took no accuracy
    assert "Backward transfer not measured (below 0: forgotten); forward" in chain_tables(older)[1]["said"]
    write_report({"arms": {"base": {"domain": {}}}, "chain": MADE}, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("<h3>") == 2 and "Lopez-Paz and Ranzato (2017)" in page and page.count("<svg") >= 1
