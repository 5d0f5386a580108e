"""A saved adapter from anywhere: checked against the base model by its headers, then read by PEFT."""

from __future__ import annotations

import json
import logging
import re
import warnings
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from hlora.system.errors import ArtifactError, first_line
from hlora.system.files import how_to_convert

logger = logging.getLogger("hlora")

_PREFIX = "base_model.model."
_FACTORS = (".lora_A.weight", ".lora_B.weight")
_LEAVE_THE_BASE = (True, False, None, "gaussian", "orthogonal", "eva")  # of init_lora_weights; any other may change it


def load_adapter(base: PreTrainedModel, directory: Path, rank: int | None = None) -> PeftModel:
    """The base model with a saved adapter on it.

    Args:
        base: The base model. PEFT may write into its weights: see `changes_base`.
        directory: As `save_pretrained` writes it.
        rank: The rank that the adapter must have; any if None.

    Raises:
        ArtifactError: The adapter is pickled, damaged, incomplete, no LoRA, or made for another base model or rank.
    """
    check_adapter(base, directory, rank)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")  # PEFT would draw them at random
            return PeftModel.from_pretrained(base, str(directory))
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, re.error, UserWarning) as error:
        raise ArtifactError(
            f"{directory}: PEFT cannot read this adapter ({first_line(error)}). Tune it again."
        ) from None


def check_files(directory: Path) -> None:
    """Raises ArtifactError when an adapter is pickled, damaged or no LoRA; no base model is needed."""
    _config(directory)
    _shapes(directory)


def changes_base(directory: Path) -> bool:
    """Whether loading the adapter may change weights of the base model, which `unload` then does not restore.

    PEFT copies saved embeddings and biases into the base, and `unload` keeps the trained copy of `modules_to_save`.
    PiSSA, OLoRA, CorDA and LoRA-GA subtract their initial factors from the base weights. False only where the
    adapter has LoRA factors alone, drawn without the base weights.

    Raises:
        ArtifactError: The adapter is not readable.
    """
    config = _config(directory)
    more = any(config.get(field) for field in ("modules_to_save", "trainable_token_indices", "loftq_config"))
    plain = not more and config.get("bias", "none") == "none"
    drawn_alone = config.get("init_lora_weights", True) in _LEAVE_THE_BASE
    return not (plain and drawn_alone and all(name.endswith(_FACTORS) for name in _shapes(directory)))


def check_adapter(base: PreTrainedModel, directory: Path, rank: int | None = None) -> None:
    """Check the headers and numbers of a saved adapter against the base model. Args as for `load_adapter`.

    Raises:
        ArtifactError: How the adapter differs from the base model, or from `rank`.
    """
    config, shapes = _config(directory), _shapes(directory)
    here = dict(base.named_modules())
    made_on = config.get("base_model_name_or_path")
    remedy = f"The adapter was made on {made_on!r}: set model.name to that, or tune one for this model."
    found_ranks = set()
    for name, shape in shapes.items():
        if not name.endswith(_FACTORS):
            continue
        module_name, _, factor = name.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".lora_")
        while module_name not in here and module_name.endswith(".base_layer"):  # PEFT nests wrappers of parameters
            module_name = module_name.removesuffix(".base_layer")
        module = here.get(module_name)
        if module is None:
            raise ArtifactError(f"{directory}: adapts {module_name!r}, which {base.name_or_path} lacks. {remedy}")
        features, outer = ("in_features", 1) if factor == "A" else ("out_features", 0)
        expected = getattr(module, features, None)
        if len(shape) != 2 or (expected is not None and shape[outer] != expected):
            raise ArtifactError(
                f"{directory}: {module_name} of {base.name_or_path} has {features} {expected}, the adapter's "
                f"{factor} is {' × '.join(map(str, shape))}. {remedy}"
            )
        found_ranks.add(shape[1 - outer] // _experts(module))
    claimed = {config["r"], *config["rank_pattern"].values()}  # some may apply to no matrix, as after EVA
    largest = max((size for name, shape in shapes.items() if ".lora_" in name for size in shape), default=0)
    if not found_ranks <= claimed or max(claimed) > largest:  # PEFT makes room for what is claimed
        raise ArtifactError(
            f"{directory}: adapter_config.json says rank {_list(claimed)}, the matrices have {_list(found_ranks)}. "
            "The two files do not belong together; copy both again or tune again."
        )
    if rank is not None and config["r"] != rank:
        raise ArtifactError(
            f"{directory}: the adapter has rank {config['r']}, lora.rank is {rank}. Set lora.rank to it."
        )
    _check_other_weights(base, directory, shapes, remedy)
    if made_on and Path(made_on).name != Path(str(base.name_or_path)).name:  # a copy or a cache has another path
        logger.warning("%s was made on %s, and is loaded on %s", directory, made_on, base.name_or_path)


def _experts(module: nn.Module) -> int:
    """How many experts a module keeps in one parameter, whose factors PEFT keeps in one tensor; 1 for a layer."""
    return next((p.shape[0] for p in module.parameters(recurse=False) if p.dim() == 3), 1)


def _check_other_weights(base: PreTrainedModel, directory: Path, shapes: dict[str, list[int]], remedy: str) -> None:
    """Raises ArtifactError for an embedding, head or bias whose shape is not the base model's."""
    weights = dict(base.named_parameters())
    for name, shape in shapes.items():
        weight = weights.get(name.removeprefix(_PREFIX))
        if weight is not None and weight.is_floating_point() and list(weight.shape) != shape:
            raise ArtifactError(
                f"{directory}: {name.removeprefix(_PREFIX)} is {' × '.join(map(str, shape))}, that of "
                f"{base.name_or_path} is {' × '.join(map(str, weight.shape))}. {remedy}"
            )


def _config(directory: Path) -> dict[str, Any]:
    """adapter_config.json of a LoRA. Other methods, and LoRAs for which PEFT imports another library, are refused."""
    path = directory / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict) or config.get("peft_type") != "LORA":
            kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
            raise ValueError(f"expected an adapter of peft_type LORA, got {str(kind)[:80]!r}")
        for field in ("megatron_config", "layer_replication"):
            if config.get(field):
                raise ValueError(f"{field} is set, which a plain LoRA does not have")
        ranks = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
        if not all(type(rank) is int and rank > 0 for rank in ranks):
            raise ValueError(f"expected ranks of at least 1, got {str(ranks)[:80]}")
    except FileNotFoundError:
        raise ArtifactError(f"{directory}: no adapter there, as adapter_config.json is missing. {_MAKE}") from None
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        raise ArtifactError(
            f"{path}: not a readable LoRA ({first_line(error)}). Copy it again or tune again."
        ) from None
    return {**config, "rank_pattern": config.get("rank_pattern") or {}}


def _shapes(directory: Path) -> dict[str, list[int]]:
    """Name → shape of each saved tensor. Raises ArtifactError where one holds a number that is not finite."""
    path = directory / "adapter_model.safetensors"
    if not path.is_file():
        raise ArtifactError(f"{directory}: no adapter_model.safetensors.{how_to_convert(directory)} {_MAKE}")
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            for name in names:
                if not file.get_tensor(name).isfinite().all():
                    raise ValueError(f"{name}: not every number is finite")
            return {name: file.get_slice(name).get_shape() for name in names}
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ArtifactError(f"{path}: not readable ({first_line(error)}). Copy it again or tune again.") from None


_MAKE = "Make one with `hlora tune` or `hlora run`."


def _list(ranks: set[int]) -> str:
    return ", ".join(map(str, sorted(ranks))) or "none"
