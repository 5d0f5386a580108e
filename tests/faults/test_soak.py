"""600 optimizer steps leave no more memory behind than 200 do."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

STEPS, FIRST = 600, 200


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/statm")
def test_memory_after_600_steps_is_within_one_percent_of_that_after_200(
    model_dir: str, tmp_path: Path, tally: Callable[..., None]
) -> None:
    """In a process of its own, with recorder and penalty in one Trainer."""
    command = [sys.executable, __file__, model_dir, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    resident = {int(step): size for step, size in json.loads(done.stdout.splitlines()[-1]).items()}
    growth = resident[STEPS] / resident[FIRST] - 1
    shown = ", ".join(f"{size / 2**20:.1f} at {step}" for step, size in resident.items())
    print(f"MiB resident: {shown}; {growth:+.2%}")
    tally(f"soak: {STEPS:,} steps, memory {growth:+.2%}", cases=1, good=int(growth <= 0.01), bad=int(growth > 0.01))
    assert abs(growth) <= 0.01


def resident() -> int:
    """Bytes, of what is in use."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def soak(model_dir: str, output: str) -> dict[int, int]:
    """Resident bytes by step."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from hlora.importance.penalty import ImportancePenalty
    from hlora.importance.recorder import ImportanceRecorder

    sizes: dict[int, int] = {}

    class Weigh(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == FIRST or state.global_step % (STEPS // 3) == 0:
                sizes[state.global_step] = resident()

    torch.manual_seed(0)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM.from_pretrained(model_dir), lora)
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, 384, (64, 12))]

    def train(steps: int, *callbacks: TrainerCallback) -> None:
        arguments = TrainingArguments(
            output_dir=output, max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-3, report_to=[],
            save_strategy="no", logging_steps=50, disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=rows, callbacks=list(callbacks)).train()

    recorder = ImportanceRecorder(model, method="path_integral")
    train(10, recorder.callback())
    penalty = ImportancePenalty(model, recorder.consolidate(), 1.0)
    train(STEPS, ImportanceRecorder(model, method="path_integral").callback(), penalty.callback(), Weigh())
    return sizes


if __name__ == "__main__":
    print(json.dumps(soak(*sys.argv[1:])))
