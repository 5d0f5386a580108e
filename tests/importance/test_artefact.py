"""Consolidation, addition, and the artefact on disk: whole, readable by PEFT, and refused where it does not fit."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import move_adapter, record
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
)

from hlora.importance import artefact_files
from hlora.importance.artefact import Importance
from hlora.importance.recorder import ImportanceRecorder
from hlora.importance.squared_gradients import fisher_of_sequences
from hlora.model.adapters import adapted_matrices
from hlora.numerics import encodings, equations
from hlora.numerics.encodings import ENCODINGS, Factored
from hlora.system.errors import ArtifactError

XI = 1e-3


def assert_same(first: Importance, second: Importance) -> None:
    assert first.encoding == second.encoding
    assert list(first.matrices) == list(second.matrices)
    for name, mine in first.matrices.items():
        other = second.matrices[name]
        assert (mine.scale, mine.undo_cost) == (other.scale, other.undo_cost)
        tensors = [*zip(encodings.parts(mine.omega).values(), encodings.parts(other.omega).values(), strict=True)]
        tensors += [(mine.A, other.A), (mine.B, other.B), (mine.base_sample, other.base_sample)]
        for a, b in tensors:
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


def fresh(model_dir: str, **config: Any) -> PeftModel:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **config}
    return get_peft_model(LlamaForCausalLM.from_pretrained(model_dir), LoraConfig(**settings))


# Consolidation


def test_consolidation_is_equation_13_of_the_recorded_omega_and_the_whole_movement(
    peft_model: PeftModel, token_ids: Tensor
) -> None:
    move_adapter(peft_model)
    recorder = ImportanceRecorder(peft_model, "float32", method="path_integral")
    start = {m.name: (m.scale * m.B @ m.A).detach().double() for m in recorder.matrices}
    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=0.02)
    recorder.attach(optimizer)
    for _ in range(3):
        peft_model(input_ids=token_ids, labels=token_ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    omega = {name: tensor.double() for name, tensor in copy.deepcopy(recorder.omega).items()}
    result = recorder.consolidate(XI)
    negative = sum(int((tensor < 0).sum()) for tensor in omega.values())
    assert negative > 0
    assert result.provenance["clamped_share"] == pytest.approx(negative / sum(t.numel() for t in omega.values()))
    for m in recorder.matrices:
        delta = (m.scale * m.B @ m.A).detach().double() - start[m.name]
        expected = equations.consolidate(omega[m.name], delta, XI)
        matrix = result.matrices[m.name]
        torch.testing.assert_close(matrix.omega.double(), expected, rtol=1e-4, atol=1e-6 * float(expected.max()))
        assert matrix.undo_cost == pytest.approx(float((expected * delta**2).sum()), rel=1e-4)
        assert torch.equal(matrix.A, m.A)
        assert torch.equal(matrix.B, m.B)


def test_importance_and_anchor_do_not_follow_the_model_afterwards(peft_model: PeftModel, token_ids: Tensor) -> None:
    result = record(peft_model, token_ids)
    kept = copy.deepcopy(result)
    move_adapter(peft_model, seed=5)
    assert_same(result, kept)


def test_describe_reports_encoding_bytes_norms_and_provenance_as_json(
    peft_model: PeftModel, token_ids: Tensor, model_dir: str
) -> None:
    result = record(peft_model, token_ids, "factored", data={"source": "pydoc", "rows": 16})
    facts = json.loads(json.dumps(result.describe()))
    assert facts["encoding"] == "factored" and facts["anchors"] == ["general", "base"]
    assert facts["bytes"] == 2 * 4 * ((32 + 32) + (16 + 32)) == result.nbytes()
    assert facts["undo_cost"] == pytest.approx(sum(m.undo_cost for m in result.matrices.values()))
    assert (facts["xi"], facts["steps"], facts["skipped_steps"]) == (XI, 3, 0)
    assert 0 <= facts["clamped_share"] < 1
    assert facts["data"] == {"source": "pydoc", "rows": 16}
    assert facts["base_model"] == model_dir
    for name, matrix in result.matrices.items():
        assert isinstance(matrix.omega, Factored)
        assert facts["layer_norms"][name] == pytest.approx(float(matrix.omega.dense().norm()), rel=1e-5)


def test_bytes_by_encoding(peft_model: PeftModel, token_ids: Tensor) -> None:
    sizes = {encoding: record(peft_model, token_ids, encoding, steps=1).nbytes() for encoding in ENCODINGS}
    elements = 2 * (32 * 32 + 16 * 32)
    assert sizes == {
        "float32": 4 * elements,
        "factored": 4 * 2 * (32 + 32 + 16 + 32),
    }


# Addition


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_sum_of_two_general_tasks_adds_importance_and_keeps_the_later_anchor(
    peft_model: PeftModel, token_ids: Tensor, encoding: str
) -> None:
    first, second = record(peft_model, token_ids, encoding), record(peft_model, token_ids, encoding)
    total = first + second
    for name, matrix in total.matrices.items():
        one, two = first.matrices[name], second.matrices[name]
        for part, tensor in encodings.parts(matrix.omega).items():
            assert torch.equal(tensor, encodings.parts(one.omega)[part] + encodings.parts(two.omega)[part])
        assert torch.equal(matrix.A, two.A)
        assert not torch.equal(matrix.A, one.A)
        assert matrix.undo_cost == one.undo_cost + two.undo_cost
    assert total.provenance["parts"] == [first.provenance, second.provenance]


def test_sum_does_not_change_its_terms(peft_model: PeftModel, token_ids: Tensor) -> None:
    first, second = record(peft_model, token_ids), record(peft_model, token_ids)
    kept = copy.deepcopy(first), copy.deepcopy(second)
    _ = first + second
    assert_same(first, kept[0])
    assert_same(second, kept[1])


def test_sum_of_different_encodings_or_matrices_is_refused(
    model_dir: str, peft_model: PeftModel, token_ids: Tensor
) -> None:
    first = record(peft_model, token_ids, "float32")
    with pytest.raises(ArtifactError, match="float32 to one in factored"):
        _ = first + record(peft_model, token_ids, "factored")
    other = record(fresh(model_dir, target_modules=["q_proj"]), token_ids)
    with pytest.raises(
        ArtifactError, match=r"the first importance has 'model\.layers\.0\.self_attn\.v_proj' and 1 more, the second"
    ):
        _ = first + other


def test_sum_of_importances_in_different_units_is_refused(peft_model: PeftModel, token_ids: Tensor) -> None:
    path = record(peft_model, token_ids, "factored")
    exact = replace(path, provenance={**path.provenance, "gradient": "exact"})
    with pytest.raises(ArtifactError, match="of gradient effective to one of gradient exact"):
        _ = path + exact
    squares = fisher_of_sequences(peft_model, token_ids, 0, encoding="factored", gradient="effective")
    with pytest.raises(ArtifactError, match="of method path_integral to one of method squared_gradients"):
        _ = path + squares
    called = replace(path, provenance={**path.provenance, "unit": "loss as called"})
    with pytest.raises(ArtifactError, match="of unit token to one of unit loss as called"):
        _ = path + called
    assert (exact + exact).nbytes() == path.nbytes()


def test_a_home_directory_is_where_the_user_means(
    peft_model: PeftModel, token_ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    importance = record(peft_model, token_ids, "factored")
    assert importance.save("~/here") == tmp_path / "here" and not (tmp_path / "~").exists()
    assert_same(Importance.load("~/here"), importance)


def test_the_adapter_of_an_importance_loads_in_plain_peft_whatever_else_was_trained(
    model_dir: str, token_ids: Tensor, tmp_path: Path
) -> None:
    model = fresh(model_dir, modules_to_save=["lm_head"])
    with pytest.warns(UserWarning, match="an importance does not keep them"):
        recorder = ImportanceRecorder(model, unprotected="warn")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    recorder.attach(optimizer)
    model(input_ids=token_ids, labels=token_ids).loss.backward()
    optimizer.step()
    directory = recorder.consolidate().save(tmp_path / "importance")
    loaded = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(model_dir), directory)
    for mine, theirs in zip(adapted_matrices(loaded), recorder.matrices, strict=True):
        assert torch.equal(mine.B, theirs.B) and mine.B.any()


class Holder(nn.Module):
    """A model of one's own around a PEFT model, as for speech or values."""

    def __init__(self, llm: PeftModel) -> None:
        super().__init__()
        self.llm = llm

    def forward(self, **batch: Tensor) -> Any:
        return self.llm(**batch)


def test_the_importance_of_a_model_that_another_holds_is_that_of_the_model(
    peft_model: PeftModel, model_dir: str, token_ids: Tensor, tmp_path: Path
) -> None:
    alone, held = record(copy.deepcopy(peft_model), token_ids), record(Holder(peft_model), token_ids)  # type: ignore[arg-type]
    assert_same(held, alone)
    assert (held.lora_config, held.provenance) == (alone.lora_config, alone.provenance)
    loaded = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(model_dir), held.save(tmp_path / "importance"))
    assert all(torch.equal(m.B, held.matrices[m.name].B) for m in adapted_matrices(loaded))


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"])
def test_the_adapter_of_a_recording_with_a_head_loads_in_plain_peft(
    model_dir: str, token_ids: Tensor, tmp_path: Path, task: str
) -> None:
    kinds = {"SEQ_CLS": LlamaForSequenceClassification, "TOKEN_CLS": LlamaForTokenClassification}
    kind = kinds.get(task, LlamaForQuestionAnswering)

    def fresh_model() -> PeftModel:
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type=task)
        return get_peft_model(kind(LlamaConfig.from_pretrained(model_dir)), config)

    model = fresh_model()
    with pytest.warns(UserWarning, match="an importance does not keep them"):
        recorder = ImportanceRecorder(model, unprotected="warn", method="path_integral")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    recorder.attach(optimizer)
    model(input_ids=token_ids[:1]).to_tuple()[0].square().mean().backward()
    optimizer.step()
    directory = recorder.consolidate().save(tmp_path / "importance")
    loaded = PeftModel.from_pretrained(fresh_model().unload(), directory)
    for mine, theirs in zip(adapted_matrices(loaded), recorder.matrices, strict=True):
        assert torch.equal(mine.B, theirs.B) and mine.B.any()


# The directory


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_saved_importance_loads_identically(
    peft_model: PeftModel, token_ids: Tensor, encoding: str, tmp_path: Path
) -> None:
    saved = record(peft_model, token_ids, encoding, data={"source": "text"})
    loaded = Importance.load(saved.save(tmp_path / "importance"))
    assert_same(saved, loaded)
    assert loaded.provenance.items() >= saved.provenance.items()
    assert set(loaded.provenance["versions"]) == {"torch", "transformers", "peft"}
    assert sorted(path.name for path in (tmp_path / "importance").iterdir()) == sorted(
        (*artefact_files.FILES, "README.md")
    )
    assert [path.name for path in tmp_path.iterdir()] == ["importance"]


def test_sum_and_reloaded_importance_can_be_saved_again(
    peft_model: PeftModel, token_ids: Tensor, tmp_path: Path
) -> None:
    first, second = record(peft_model, token_ids), record(peft_model, token_ids)
    total = Importance.load(first.save(tmp_path / "a")) + Importance.load(second.save(tmp_path / "b"))
    assert_same(Importance.load(total.save(tmp_path / "c")), total)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({}, id="plain"),
        pytest.param(
            {"use_rslora": True, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}}, id="patterns"
        ),
        pytest.param({"target_modules": "all-linear", "lora_dropout": 0.1}, id="all-linear"),
    ],
)
def test_saved_adapter_loads_in_plain_peft_with_identical_logits(
    model_dir: str, token_ids: Tensor, config: dict[str, Any], tmp_path: Path
) -> None:
    model = fresh(model_dir, **config)
    record(model, token_ids, "factored").save(tmp_path / "importance")
    plain = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(model_dir), str(tmp_path / "importance"))
    with torch.no_grad():
        expected, got = model.eval()(input_ids=token_ids).logits, plain.eval()(input_ids=token_ids).logits
        base = LlamaForCausalLM.from_pretrained(model_dir).eval()(input_ids=token_ids).logits
    assert torch.equal(got, expected)
    assert not torch.allclose(got, base)


def test_adapter_is_put_back_on_a_fresh_model_under_any_name(
    model_dir: str, peft_model: PeftModel, token_ids: Tensor, tmp_path: Path
) -> None:
    loaded = Importance.load(record(peft_model, token_ids).save(tmp_path / "importance"))
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(LlamaForCausalLM.from_pretrained(model_dir), config, adapter_name="medical")
    loaded.load_adapter_into(model)
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=token_ids).logits, peft_model.eval()(input_ids=token_ids).logits)


def test_saving_again_replaces_the_importance(peft_model: PeftModel, token_ids: Tensor, tmp_path: Path) -> None:
    record(peft_model, token_ids, "float32").save(tmp_path / "importance")
    second = record(peft_model, token_ids, "factored")
    second.save(tmp_path / "importance")
    assert_same(Importance.load(tmp_path / "importance"), second)
    assert [path.name for path in tmp_path.iterdir()] == ["importance"]


@pytest.mark.parametrize("when", [1, 2])
def test_a_crash_while_writing_leaves_the_old_importance(
    peft_model: PeftModel, token_ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: int
) -> None:
    """The disk is full at the first or the second tensor file."""
    old = record(peft_model, token_ids)
    old.save(tmp_path / "importance")
    calls, real = [], artefact_files.save_file

    def full_disk(tensors: dict[str, Tensor], path: Path) -> None:
        calls.append(path)
        if len(calls) == when:
            raise OSError("No space left on device")
        real(tensors, path)

    monkeypatch.setattr(artefact_files, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        record(peft_model, token_ids).save(tmp_path / "importance")
    assert len(calls) == when
    assert_same(Importance.load(tmp_path / "importance"), old)
    assert [path.name for path in tmp_path.iterdir()] == ["importance"]


def test_a_failure_to_move_the_new_importance_into_place_puts_the_old_back(
    peft_model: PeftModel, token_ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = record(peft_model, token_ids)
    old.save(tmp_path / "importance")
    real = Path.rename

    def refused(path: Path, target: Path) -> Path:
        if path.name.endswith(".tmp"):
            raise PermissionError("refused")
        return real(path, target)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(PermissionError):
        record(peft_model, token_ids).save(tmp_path / "importance")
    assert_same(Importance.load(tmp_path / "importance"), old)
    assert [path.name for path in tmp_path.iterdir()] == ["importance"]


def test_saving_over_a_directory_of_other_files_is_refused_and_loses_nothing(
    peft_model: PeftModel, token_ids: Tensor, tmp_path: Path
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work", encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"holds thesis\.tex, which is not part of an importance"):
        record(peft_model, token_ids).save(tmp_path)
    assert (tmp_path / "thesis.tex").read_text(encoding="utf-8") == "years of work"


# What does not fit


@pytest.fixture
def saved(peft_model: PeftModel, token_ids: Tensor, tmp_path: Path) -> Path:
    return record(peft_model, token_ids, "factored").save(tmp_path / "importance")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        pytest.param(
            {"r": 2},
            r"model\.layers\.0\.self_attn\.q_proj: importance was recorded with A \(4, 32\), B \(32, 4\), scale 2\.0; "
            r"the adapter has A \(2, 32\), B \(32, 2\), scale 4\.0.*r=4, lora_alpha=8.*'q_proj', 'v_proj'",
            id="rank",
        ),
        pytest.param({"lora_alpha": 16}, r"layers\.0\.self_attn\.q_proj: .*scale 2\.0.*scale 4\.0", id="alpha"),
        pytest.param(
            {"rank_pattern": {"1.self_attn.v_proj": 2}}, r"^model\.layers\.1\.self_attn\.v_proj: ", id="pattern"
        ),
        pytest.param(
            {"target_modules": ["q_proj"]},
            r"the importance has 'model\.layers\.0\.self_attn\.v_proj' and 1 more, the model's adapter lacks it "
            r"\(it has q_proj\)\. Use the same base model and target_modules",
            id="fewer-modules",
        ),
        pytest.param(
            {"target_modules": ["q_proj", "v_proj", "up_proj"]},
            r"the model's adapter has 'model\.layers\.0\.mlp\.up_proj' and 1 more, the importance lacks it "
            r"\(it has q_proj, v_proj\)",
            id="more-modules",
        ),
    ],
)
def test_an_adapter_of_other_settings_is_refused_with_its_first_matrix(
    model_dir: str, saved: Path, config: dict[str, Any], message: str
) -> None:
    model = fresh(model_dir, **config)
    with pytest.raises(ArtifactError, match=message):
        Importance.load(saved).load_adapter_into(model)
    assert not any(parameter.any() for name, parameter in model.named_parameters() if "lora_B" in name)


def test_other_base_weights_are_refused_with_the_first_matrix_that_differs(model_dir: str, saved: Path) -> None:
    model = fresh(model_dir)
    with torch.no_grad():
        model.base_model.model.model.layers[1].self_attn.v_proj.base_layer.weight.add_(0.01)
    with pytest.raises(ArtifactError, match=r"^model\.layers\.1\.self_attn\.v_proj: the base weights are not those"):
        Importance.load(saved).load_adapter_into(model)


def test_a_base_of_the_same_shape_but_another_seed_is_refused(model_dir: str, saved: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig.from_pretrained(model_dir)).save_pretrained(tmp_path / "other")
    with pytest.raises(ArtifactError, match=r"layers\.0\.self_attn\.q_proj: the base weights"):
        Importance.load(saved).load_adapter_into(fresh(str(tmp_path / "other")))


def test_the_same_base_in_bfloat16_is_recognised(model_dir: str, saved: Path) -> None:
    base = LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    Importance.load(saved).load_adapter_into(model)


def test_a_missing_directory_is_named_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"absent: no such directory\. Record one with `hlora record"):
        Importance.load(tmp_path / "absent")


def test_a_relative_path_is_not_looked_up_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(ArtifactError, match="runs/importance: no such directory"):
        Importance.load(Path("runs") / "importance")


@pytest.mark.parametrize("name", ["importance.json", "importance.safetensors", "adapter_model.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "empty", "half"])
def test_a_damaged_importance_is_refused_by_its_directory(saved: Path, name: str, damage: str) -> None:
    path = saved / name
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[: len(content) // 2] if damage == "half" else b"")
    with pytest.raises(ArtifactError, match=r"importance: not a readable importance.*copy it again or record again"):
        Importance.load(saved)


def without_checksums(directory: Path) -> None:
    """As somebody who edits the files can leave them."""
    path = directory / "importance.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    assert document.pop("sha256")
    path.write_text(json.dumps(document), encoding="utf-8")


def test_a_flipped_bit_is_noticed(saved: Path) -> None:
    for name in ("importance.safetensors", "adapter_model.safetensors"):
        content = bytearray((saved / name).read_bytes())
        content[-5] ^= 1
        (saved / name).write_bytes(content)
        with pytest.raises(ArtifactError, match=f"{name} is not the file that was saved"):
            Importance.load(saved)
        content[-5] ^= 1
        (saved / name).write_bytes(content)
    assert Importance.load(saved).matrices


@pytest.mark.parametrize("where", ["omega", "A"])
def test_an_importance_that_is_not_finite_is_not_saved(
    peft_model: PeftModel, token_ids: Tensor, tmp_path: Path, where: str
) -> None:
    importance = record(peft_model, token_ids, "factored", steps=1)
    matrix = next(iter(importance.matrices.values()))
    (matrix.omega[0] if where == "omega" else matrix.A)[0] = torch.nan
    with pytest.raises(ArtifactError, match=r"q_proj.* finite.*record again with a smaller learning rate"):
        importance.save(tmp_path / "importance")
    assert not list(tmp_path.glob("*importance*"))


@pytest.mark.parametrize(
    ("encoding", "part", "change", "message"),
    [
        ("float32", "dense", lambda t: t.half(), r"q_proj\.dense: float32 has .*, got torch\.float16"),
        ("float32", "dense", lambda t: None, r"q_proj\.dense: .* there, got nothing"),
        ("float32", "dense", lambda t: t.flatten(), r"q_proj\.dense: .* of \(32, 32\) there, got .* of \(1024,\)"),
        ("factored", "row", lambda t: t[:-1], r"q_proj\.row: .* of \(32,\) there, got .* of \(31,\)"),
        (
            "float32",
            "dense",
            lambda t: t.index_fill(1, torch.tensor(3), torch.nan),
            r"q_proj\.dense: .* finite, got nan",
        ),
        ("float32", "dense", lambda t: t - 1, r"q_proj\.dense: importance is 0 or more and finite, got -"),
        ("factored", "row", lambda t: t + torch.inf, r"q_proj\.row: importance is 0 or more and finite, got inf"),
        ("factored", "column", lambda t: t * torch.nan, r"q_proj\.column: importance is 0 or more and finite, got nan"),
    ],
)
def test_importance_that_its_encoding_cannot_have_is_refused_by_name(
    peft_model: PeftModel, token_ids: Tensor, tmp_path: Path, encoding: str, part: str, change: Any, message: str
) -> None:
    path = record(peft_model, token_ids, encoding, steps=1).save(tmp_path / "importance") / "importance.safetensors"
    tensors = load_file(path)
    name = f"model.layers.0.self_attn.q_proj.{part}"
    changed = change(tensors.pop(name))
    save_file(tensors if changed is None else {**tensors, name: changed.contiguous()}, path)
    without_checksums(tmp_path / "importance")
    with pytest.raises(ArtifactError, match=message):
        Importance.load(tmp_path / "importance")


@pytest.mark.parametrize("document", ["[]", "{}", '{"format": 1}', '{"format": 1, "matrices": {"a": {}}}'])
def test_json_of_another_kind_is_refused(saved: Path, document: str) -> None:
    (saved / "importance.json").write_text(document, encoding="utf-8")
    with pytest.raises(ArtifactError):
        Importance.load(saved)


def test_a_newer_format_is_refused_with_both_numbers(saved: Path) -> None:
    path = saved / "importance.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**document, "format": 2}), encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"format 2, this hlora reads 1\. Use the hlora that wrote it"):
        Importance.load(saved)


def test_norms_are_those_of_the_dense_importance(peft_model: PeftModel, token_ids: Tensor) -> None:
    result = record(peft_model, token_ids)
    for name, norm in result.norms().items():
        elements = result.matrices[name].omega.flatten().tolist()
        assert norm == pytest.approx(math.sqrt(sum(element**2 for element in elements)), rel=1e-5)


@pytest.mark.parametrize("encoding", ["bfloat16", "int8"])
def test_an_encoding_of_an_earlier_version_is_refused_with_what_to_do(saved: Path, encoding: str) -> None:
    path = saved / "importance.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**document, "encoding": encoding}), encoding="utf-8")
    with pytest.raises(
        ArtifactError, match=rf"importance in '{encoding}', this hlora reads float32 and factored\. Record again"
    ):
        Importance.load(saved)
