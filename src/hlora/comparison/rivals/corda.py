"""CorDA (PEFT): LoRA on the directions that matter least to general text."""

from __future__ import annotations

import math

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from transformers import set_seed

from hlora.comparison.rivals.common import adapted, check_not_quantised
from hlora.data.packing import pieces_of
from hlora.run.job import Job
from hlora.run.phases import History, train_on_domain
from hlora.system.errors import CannotRun, first_line

CORDA_SAMPLES = 256
"""General texts that the covariance is taken from (PEFT's documentation of CorDA)."""


def corda(job: Job) -> tuple[PeftModel, History]:
    """PEFT's CorDA in its knowledge-preserving mode.

    LoRA starts from the r directions of each matrix that matter least to general text, by the singular values of W·C
    with C the covariance of the layer's inputs. The matrix keeps the rest. C is computed from CORDA_SAMPLES pieces of
    the general text of hidden_size/2 tokens each: 128 tokens for each input dimension, as PEFT advises. For
    SmolLM2-135M that is a forward pass over 74,000 tokens before training.

    Changes the weights of `job.base` (see alters_base in hlora/methods.py).

    Raises:
        CannotRun: The model is quantised, or PEFT cannot decompose a matrix (a singular covariance).
    """
    settings = job.config.lora
    check_not_quantised(job.base, "CorDA")
    set_seed(job.config.seed)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
        use_rslora=settings.rslora,
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method="kpm"),
        task_type="CAUSAL_LM",
    )
    text_config = job.base.config.get_text_config()
    length = min(text_config.hidden_size // 2, getattr(text_config, "max_position_embeddings", None) or math.inf)
    pieces = pieces_of(job.general.train, job.tokenizer, length, CORDA_SAMPLES, job.config.seed)

    def read_general_text() -> None:
        for piece in pieces:  # skips the output layer, a fifth of the work
            job.base.base_model(input_ids=torch.tensor([piece], device=job.base.device), use_cache=False)

    try:
        preprocess_corda(job.base, config, run_model=read_general_text)
    except (ValueError, RuntimeError, ArithmeticError) as error:
        raise CannotRun(f"CorDA cannot decompose the matrices of this model ({first_line(error)})") from None
    model = adapted(job.base, config, "CorDA")
    return model, train_on_domain(job, model, "corda")
