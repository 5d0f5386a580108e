"""Orthogonal subspace fine-tuning (OSF, PEFT)."""

from __future__ import annotations

from peft import OSFConfig, PeftModel
from peft.tuners.osf import OSFModel
from peft.tuners.osf.layer import OSFLayer
from transformers import set_seed

from hlora.comparison.rivals.common import adapted, between_0_and_1, check_not_quantised
from hlora.run.job import Job
from hlora.run.phases import History, train_on_domain
from hlora.system.errors import CannotRun
from hlora.training.train import sft_arguments

OSF_LEARNING_RATE = 0.5
"""Ratio of OSF's learning rate to LoRA's: 5e-5 to 1e-4 in PEFT's method_comparison/MetaMathQA."""


def osf(job: Job, *, strength: float | None) -> tuple[PeftModel, History]:
    """PEFT's orthogonal subspace fine-tuning.

    The s·min(out, in) largest singular directions of each matrix in lora.target_modules are frozen: gradients are
    projected off them. The others are trained in full, at OSF_LEARNING_RATE times the configured learning rate. This is
    not low-rank: at s = 0.5 SmolLM2-135M trains 12 M numbers on q_proj and v_proj, LoRA of rank 8 0.46 M. Only the
    gradient is projected, and AdamW rescales it by element. So after six steps of that model on PIQA, the part of a
    matrix's change in the frozen directions had 0.25 of its norm (mean over matrices; 0.71 would be chance).

    Args:
        job: The job.
        strength: s, the share of each matrix's singular directions to keep, 0 < s < 1.

    Raises:
        ConfigError: The strength is out of range.
        CannotRun: The model is quantised, or a matrix is not nn.Linear (Conv1D of GPT-2).
    """
    share = between_0_and_1(strength, "osf", "the share of singular directions kept")
    check_not_quantised(job.base, "OSF")
    set_seed(job.config.seed)
    config = OSFConfig(effective_rank=share, target_modules=job.config.lora.target_modules, task_type="CAUSAL_LM")
    model = adapted(job.base, config, "OSF")
    assert isinstance(model.base_model, OSFModel)
    for name in model.base_model.targeted_module_names:
        module = model.base_model.model.get_submodule(name)
        if not isinstance(module, OSFLayer):
            model.unload()
            raise CannotRun(f"OSF works on nn.Linear only, and {name} is a {type(module).__name__}")
    rate = sft_arguments(job.output, job.config.training.tune_arguments(), job.config.seed).learning_rate
    return model, train_on_domain(job, model, "osf", learning_rate=OSF_LEARNING_RATE * rate)
