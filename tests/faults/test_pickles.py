"""No pickle is read: files whose unpickling would leave a mark, wherever a pickle may lie. The mark never appears."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import record
from peft import PeftModel
from torch import Tensor
from transformers import Trainer, TrainingArguments

from hlora import pipeline
from hlora.config.reading import parse_config
from hlora.config.sections import DomainConfig, ModelConfig
from hlora.data.domain import domain_rows
from hlora.data.rows import read_documents
from hlora.importance.artefact import Importance
from hlora.importance.recorder import ImportanceRecorder
from hlora.model.base import load_base
from hlora.model.saved_adapter import check_adapter, load_adapter
from hlora.system.errors import ArtifactError, ConfigError, DataError
from hlora.training.checkpoint_files import latest_checkpoint


class Canary:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (self.mark, "w")


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[Path]:
    """Where the mark would be; checked at the end, after seeing that the canary sings where it is read."""
    path = tmp_path / "it-ran"
    yield path
    assert not path.exists(), "a pickle was read"
    pickle.loads(pickle.dumps(Canary(path)))
    assert path.exists()


def plant(path: Path, mark: Path) -> None:
    """A pickle as torch.save writes it, with one good tensor beside the canary."""
    torch.save({"base_model.model.x.lora_A.weight": torch.ones(1), "canary": Canary(mark)}, path)


def smallest(fields: dict[str, Any]) -> dict[str, Any]:
    evaluation = {"max_tokens": 64, "window": 64, "stride": 64, "generate": 0, "accuracy": False}
    return {**fields, "evaluation": evaluation}


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter.pt", "adapter.pth", "adapter_model.pkl"])
def test_a_pickled_adapter_is_refused_with_how_to_convert_it(
    name: str, mark: Path, tmp_path: Path, job_fields: dict[str, Any], peft_model: PeftModel
) -> None:
    adapter = tmp_path / "out" / "adapter"
    peft_model.save_pretrained(str(adapter))
    (adapter / "adapter_model.safetensors").unlink()
    plant(adapter / name, mark)
    with pytest.raises(
        ArtifactError, match=rf"no adapter_model\.safetensors\. {name} is a pickle, .*weights_only=True"
    ):
        pipeline.evaluate_output(parse_config(smallest(job_fields)))
    assert not (tmp_path / "out" / "results.json").exists()


def test_what_the_hint_says_converts_a_pickled_adapter(
    tmp_path: Path, peft_model: PeftModel, model_dir: str, mark: Path
) -> None:
    adapter = tmp_path / "adapter"
    peft_model.save_pretrained(str(adapter))
    whole = (adapter / "adapter_model.safetensors").read_bytes()
    from safetensors.torch import load

    torch.save(load(whole), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    base = load_base(ModelConfig(name=model_dir, device="cpu"))[0]
    with pytest.raises(ArtifactError) as caught:
        check_adapter(base, adapter)
    code = str(caught.value).split('-c "')[1].split('"')[0]
    subprocess.run([sys.executable, "-c", code], cwd=adapter, check=True)
    assert isinstance(load_adapter(base, adapter), PeftModel)


def test_a_pickled_importance_is_refused_with_how_to_convert_it(
    mark: Path, tmp_path: Path, peft_model: PeftModel, token_ids: Tensor
) -> None:
    saved = record(peft_model, token_ids, "factored", steps=1).save(tmp_path / "importance")
    for name in ("adapter_model", "importance"):
        (saved / f"{name}.safetensors").rename(tmp_path / "kept")
        plant(saved / f"{name}.bin", mark)
        with pytest.raises(ArtifactError, match=rf"not a readable importance .*{name}\.bin is a pickle"):
            Importance.load(saved)
        (saved / f"{name}.bin").unlink()
        (tmp_path / "kept").rename(saved / f"{name}.safetensors")
    Importance.load(saved)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt"])
def test_a_pickled_base_model_is_refused_with_how_to_convert_it(
    name: str, mark: Path, tmp_path: Path, model_dir: str
) -> None:
    directory = Path(shutil.copytree(model_dir, tmp_path / "model"))
    (directory / "model.safetensors").unlink()
    plant(directory / name, mark)
    with pytest.raises(ConfigError, match=rf"model\.name: .* safetensors weights .*{name} is a pickle"):
        load_base(ModelConfig(name=str(directory), device="cpu"))
    with pytest.raises(ConfigError, match=r"model\.name: .* A pickle can hold code and is not read"):
        load_base(ModelConfig(name=str(directory / name), device="cpu"))


def test_a_base_model_with_a_pickled_adapter_in_its_directory_is_refused(
    mark: Path, tmp_path: Path, model_dir: str, peft_model: PeftModel
) -> None:
    directory = Path(shutil.copytree(model_dir, tmp_path / "model"))
    peft_model.save_pretrained(str(tmp_path / "adapter"))
    shutil.copy(tmp_path / "adapter" / "adapter_config.json", directory)
    plant(directory / "adapter_model.bin", mark)
    with pytest.raises(ConfigError, match=r"model\.name: .* is an adapter, or has one in it"):
        load_base(ModelConfig(name=str(directory), device="cpu"))


@pytest.mark.parametrize("name", ["rows.pkl", "rows.pickle", "rows.pt", "rows"])
def test_pickled_rows_and_text_are_refused(name: str, mark: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / name
    plant(path, mark)
    with pytest.raises(DataError, match=rf"{name}: expected a \.jsonl, \.json, \.parquet or \.csv file"):
        domain_rows(DomainConfig(task="rows", train=str(path), test=str(path)), None, 0)
    with pytest.raises(DataError, match=rf"{name}: expected a"):
        read_documents(str(path))
    with pytest.raises(DataError, match=r"not a file here, nor a data set"):  # a directory, read by datasets
        domain_rows(DomainConfig(task="rows", train=str(path.parent), test="train"), None, 0)


def test_a_checkpoint_with_a_pickle_is_not_gone_on_from(
    mark: Path, tmp_path: Path, job_fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    job_fields["training"]["record"] |= {"save_strategy": "steps", "save_steps": 2}
    with monkeypatch.context() as cut:
        cut.setattr(ImportanceRecorder, "consolidate", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pipeline.record(parse_config(smallest(job_fields)))
    kept = tmp_path / "out" / "logs" / "record" / "checkpoint-2"
    assert latest_checkpoint(kept.parent) == kept
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.bin", "pytorch_model.bin"):
        plant(kept / name, mark)
    assert latest_checkpoint(kept.parent) is None
    assert "a pickle, which hlora does not write" in caplog.text
    pipeline.record(parse_config(smallest(job_fields)))


def test_trainers_own_resume_runs_nothing_from_a_pickle(
    mark: Path, tmp_path: Path, peft_model: PeftModel, token_ids: Tensor
) -> None:
    """What Transformers reads there it reads with weights_only: it refuses the canary. Ours adds no pickle to read."""

    def trainer() -> Trainer:
        rows = [{"input_ids": row, "labels": row} for row in token_ids]
        common = {"max_steps": 4, "save_steps": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True}
        arguments = TrainingArguments(str(tmp_path / "trained"), per_device_train_batch_size=4, **common)
        made = Trainer(peft_model, arguments, train_dataset=rows)
        made.add_callback(ImportanceRecorder(peft_model, method="path_integral").callback())
        return made

    trainer().train()
    kept = tmp_path / "trained" / "checkpoint-2"
    trainer().train(resume_from_checkpoint=str(kept))
    names = {path.name for path in kept.iterdir() if path.suffix in (".pt", ".pth", ".bin")}
    assert names == {"optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"}
    for name in sorted(names):
        whole = (kept / name).read_bytes()
        plant(kept / name, mark)
        if name == "training_args.bin":  # never read
            trainer().train(resume_from_checkpoint=str(kept))
        else:
            with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
                trainer().train(resume_from_checkpoint=str(kept))
        (kept / name).write_bytes(whole)


def test_an_adapter_that_names_a_module_to_import_is_refused(
    tmp_path: Path, peft_model: PeftModel, model_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = tmp_path / "adapter"
    peft_model.save_pretrained(str(adapter))
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"megatron_config": {"a": 1}, "megatron_core": "theirs"}), encoding="utf-8")
    (tmp_path / "theirs.py").write_text(f"open({str(tmp_path / 'it-ran')!r}, 'w').close()\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    base = load_base(ModelConfig(name=model_dir, device="cpu"))[0]
    with pytest.raises(ArtifactError, match=r"adapter_config\.json: .*megatron_config is set"):
        load_adapter(base, adapter)
    assert not (tmp_path / "it-ran").exists()
