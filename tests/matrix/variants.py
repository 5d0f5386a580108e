"""PEFT's variants of LoRA, its other methods, and optimizers, on the tiny Llama."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import torch
from architectures import ARCHITECTURES
from dense import ALPHA, LR, RANK, DensePath, adapted, check, error, verdict
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig
from torch import Tensor
from transformers.optimization import Adafactor

from hlora import ImportancePenalty, ImportanceRecorder, ProtectCallback
from hlora.system.errors import HloraError

TARGETS = ["q_proj", "v_proj"]
NOT_AT_BASE = "init_lora_weights=False"


def corda(model: Any, config: LoraConfig, rows: Tensor) -> None:
    from peft.tuners.lora.corda import preprocess_corda

    preprocess_corda(model, config, run_model=lambda: model(input_ids=rows[:1]))  # it takes one row


def lora_ga(model: Any, config: LoraConfig, rows: Tensor) -> None:
    from peft.tuners.lora.loraga import preprocess_loraga

    preprocess_loraga(model, config, lambda: model(input_ids=rows, labels=rows).loss.backward())


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "PiSSA": {"init_lora_weights": "pissa"},
    "PiSSA niter": {"init_lora_weights": "pissa_niter_4"},
    "OLoRA": {"init_lora_weights": "olora"},
    "CorDA": {"init_lora_weights": "corda", "corda_config": CordaConfig(corda_method="ipm")},
    "LoRA-GA": {"init_lora_weights": "lora_ga", "lora_ga_config": peft.LoraGAConfig()},
    NOT_AT_BASE: {"init_lora_weights": False},
    "rank_pattern, alpha_pattern": {"rank_pattern": {"v_proj": 4}, "alpha_pattern": {"q_proj": 5}},
    "layers_to_transform": {"layers_to_transform": [1]},
    "regular expression": {"target_modules": r".*\.1\..*(up|down)_proj"},
    "lm_head": {"target_modules": ["q_proj", "lm_head"]},
    "DoRA": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "trainable_token_indices": {"trainable_token_indices": [5, 6]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "aLoRA": {"alora_invocation_tokens": [5]},
}
PREPARED: dict[str, Callable[[Any, LoraConfig, Tensor], None]] = {"CorDA": corda, "LoRA-GA": lora_ga}

METHODS: dict[str, Any] = {
    "AdaLoRA": peft.AdaLoraConfig(target_modules=TARGETS, total_step=10),
    "VeRA": peft.VeraConfig(target_modules=TARGETS),
    "IA3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "LoHa": peft.LoHaConfig(target_modules=TARGETS),
    "LoKr": peft.LoKrConfig(target_modules=TARGETS),
    "OFT": peft.OFTConfig(target_modules=["q_proj"], oft_block_size=8),
    "HRA": peft.HRAConfig(target_modules=TARGETS),
    "FourierFT": peft.FourierFTConfig(target_modules=TARGETS, n_frequency=10),
    "RandLora": peft.RandLoraConfig(target_modules=TARGETS),
    "MiSS": peft.MissConfig(target_modules=TARGETS, r=2),
    "prompt tuning": peft.PromptTuningConfig(num_virtual_tokens=2),
    "prefix tuning": peft.PrefixTuningConfig(num_virtual_tokens=2),
    "LN tuning": peft.LNTuningConfig(target_modules=["input_layernorm"]),
}


def make(name: str, rows: Tensor) -> Any:
    """The tiny Llama with a fresh adapter of that variant or method."""
    model = ARCHITECTURES["llama"].build()
    config = METHODS.get(name)
    if config is None:
        settings = {"r": RANK, "lora_alpha": ALPHA, "target_modules": TARGETS, **copy.deepcopy(VARIANTS[name])}
        config = LoraConfig(**settings)
    config.task_type = "CAUSAL_LM"
    if name in PREPARED:
        PREPARED[name](model, config, rows)
    torch.manual_seed(1)
    return get_peft_model(model, config)


def of_variant(name: str, rows: Tensor, loss: Any, cell: Any) -> list[str]:
    """Recorder and penalty; where `protect` starts; whether the anchor "base" costs nothing at the base model."""

    def recorded(model: Any) -> Any:
        recorder = ImportanceRecorder(model, method="path_integral")
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR)
        end = recorder.attach(optimizer)
        loss(model, rows[:4]).backward()
        optimizer.step()
        end()
        return recorder.consolidate()

    def starts() -> str:
        importance = recorded(make(name, rows))
        penalty = ProtectCallback(importance, 1.0).start(make(name, rows))
        if name == NOT_AT_BASE:  # it may have been trained
            return "stays where it is" if not penalty.is_at_anchor() else "WRONG: is set to the general adapter"
        return "right" if penalty.is_at_anchor() else "WRONG: starts elsewhere than the general adapter"

    def base() -> str:
        model = make(name, rows)
        penalty = ImportancePenalty(model, recorded(make(name, rows)), 1.0, anchor="base")
        for factors in adapted(model).values() if name == NOT_AT_BASE else ():
            torch.nn.init.zeros_(factors.parameters[1])
        there = float(penalty.regularisation_loss())
        for factors in adapted(model).values():
            torch.nn.init.normal_(factors.parameters[1], std=0.1)
        away = float(penalty.regularisation_loss())
        return "right" if there < 1e-8 * away else f"WRONG: {there:.1e} at the base model"

    if name in METHODS:
        return [cell(lambda: str(recorded(make(name, rows))))]
    return [cell(lambda: check(make(name, rows), rows, loss)), cell(starts), cell(base)]


Parameters = list[torch.nn.Parameter]


def _rates(parameters: Parameters) -> list[dict[str, Any]]:
    """LoRA+: B learns eight times as fast as A."""
    return [{"params": parameters[0::2], "lr": LR}, {"params": parameters[1::2], "lr": 8 * LR}]


def _muon(parameters: Parameters) -> torch.optim.Optimizer:
    return torch.optim.Muon(parameters, lr=LR)


def _eight_bits(parameters: Parameters) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, lr=LR)


OPTIMIZERS: dict[str, Callable[[Parameters], Any]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=LR),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=LR, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=LR, fused=True),
    "AdamW tensor lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(LR)),
    "LoRA+": lambda p: torch.optim.AdamW(_rates(p)),
    "A frozen": lambda p: torch.optim.AdamW(p[1::2], lr=LR),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9),
    "Adafactor (torch)": lambda p: torch.optim.Adafactor(p, lr=LR),
    "Adafactor (Transformers)": lambda p: Adafactor(p, lr=LR, relative_step=False, scale_parameter=False),
    "Adafactor, lr=None": lambda p: Adafactor(p),
    "Muon": _muon,
    "Rprop": lambda p: torch.optim.Rprop(p, lr=LR),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=LR),
    "AdamW8bit": _eight_bits,
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=LR),
}


def of_optimizer(name: str, rows: Tensor, loss: Any) -> str:
    """ω after three steps of a plain loop, recorded by `attach`."""
    model = make("plain", rows)
    dense, recorder = DensePath(adapted(model)), ImportanceRecorder(model, "float32", method="path_integral")
    parameters = [p for p in model.parameters() if p.requires_grad]
    if name == "A frozen":
        for factor in parameters[0::2]:
            factor.requires_grad_(False)
    optimizer = OPTIMIZERS[name](parameters)
    recorder.attach(optimizer)
    rates = (LR * 8 * LR) ** 0.5 if name == "LoRA+" else LR  # η_A ≠ η_B: √(η_A η_B), which is exact
    optimizer.register_step_pre_hook(lambda *call: dense.before(0.0 if name == "A frozen" else rates))
    optimizer.register_step_post_hook(lambda *call: dense.after())

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(model, rows[:4])
        value.backward()
        return value

    for _ in range(3):
        try:
            if name == "LBFGS":
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        except (HloraError, ValueError) as refusal:
            return f"refused: {refusal}"
    return verdict(error(recorder.omega, dense.omega))
