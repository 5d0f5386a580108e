"""A phase trains on the one GPU of its process, however many the machine has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import AutoTokenizer

from hlora.config.training import TrainingConfig
from hlora.parallel.launch import join_launch
from hlora.run.trial import check_arguments
from hlora.system.errors import ConfigError
from hlora.training.train import build_trainer


def test_a_process_alone_trains_on_one_of_several_gpus(
    peft_model: PeftModel, model_dir: str, token_ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trainer would put the model into DataParallel, with twice the rows a step."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    dataset = Dataset.from_dict({"input_ids": token_ids[:4].tolist()})
    arguments = {"use_cpu": False, "max_steps": 1, "per_device_train_batch_size": 2, "report_to": []}
    trainer = build_trainer(
        peft_model,
        AutoTokenizer.from_pretrained(model_dir),
        dataset,
        output=tmp_path / "logs" / "tune",
        arguments=arguments,
        seed=0,
    )
    assert (trainer.args.n_gpu, trainer.args.train_batch_size) == (1, 2)
    trainer.train()
    assert not isinstance(trainer.model_wrapped, torch.nn.DataParallel)


def test_a_run_without_a_launcher_says_that_it_leaves_gpus_unused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "hlora")
    for gpus, device in ((1, "auto"), (4, "cpu"), (4, "auto")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        join_launch(device)
    assert [record.getMessage() for record in caplog.records] == [
        "4 GPUs here, and this process uses one. For all of them, docs/guides/distributed.md"
    ]


def test_a_gpu_that_trainer_would_leave_is_refused_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(ConfigError, match=r"model.device: cuda:1 .* CUDA_VISIBLE_DEVICES=1"):
        check_arguments(TrainingConfig(), tmp_path, torch.device("cuda:1"))
