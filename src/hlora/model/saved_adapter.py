"""An adapter directory from anywhere: checked against the base model by its headers, then read by PEFT."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from hlora.system.errors import ArtifactError, first_line
from hlora.system.files import how_to_convert

logger = logging.getLogger("hlora")

_PREFIX = "base_model.model."


def load_adapter(base: PreTrainedModel, directory: Path, rank: int | None = None) -> PeftModel:
    """The base model with the adapter of a directory on it.

    Raises ArtifactError when it is pickled, damaged, no LoRA, incomplete, or of another base model or `rank`.
    """
    check_adapter(base, directory, rank)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")  # it would make them up
            return PeftModel.from_pretrained(base, str(directory))
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, UserWarning) as error:
        raise ArtifactError(
            f"{directory}: PEFT cannot read this adapter ({first_line(error)}). Tune it again."
        ) from None


def check_files(directory: Path) -> None:
    """Raises ArtifactError when an adapter is pickled, damaged or no LoRA; no base model is needed."""
    _config(directory)
    _factors(directory)


def check_adapter(base: PreTrainedModel, directory: Path, rank: int | None = None) -> None:
    """Raises ArtifactError that says how an adapter is unlike the base model, or `rank`; its numbers are read too."""
    config = _config(directory)
    here = dict(base.named_modules())
    made_on = config.get("base_model_name_or_path")
    found_ranks = set()
    for name, shape in _factors(directory).items():
        module_name, _, factor = name.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".lora_")
        module = here.get(module_name)
        remedy = f"It says that it was made on {made_on!r}: set model.name to that, or tune one for this model."
        if module is None:
            raise ArtifactError(f"{directory}: adapts {module_name!r}, which {base.name_or_path} lacks. {remedy}")
        features, outer = ("in_features", 1) if factor == "A" else ("out_features", 0)
        expected = getattr(module, features, None)
        if len(shape) != 2 or (expected is not None and shape[outer] != expected):
            raise ArtifactError(
                f"{directory}: {module_name} of {base.name_or_path} has {features} {expected}, the adapter's "
                f"{factor} is {' × '.join(map(str, shape))}. {remedy}"
            )
        found_ranks.add(shape[1 - outer])
    claimed = {config["r"], *config.get("rank_pattern", {}).values()}
    if not found_ranks or not found_ranks <= claimed or max(claimed) > max(found_ranks):
        raise ArtifactError(
            f"{directory}: adapter_config.json says rank {_list(claimed)}, the matrices have {_list(found_ranks)}. "
            "The two files do not belong together; copy both again or tune again."
        )
    if rank is not None and config["r"] != rank:
        raise ArtifactError(
            f"{directory}: the adapter is of rank {config['r']}, lora.rank is {rank}. Set lora.rank to it."
        )
    if made_on and Path(made_on).name != Path(str(base.name_or_path)).name:  # a copy or a cache has another path
        logger.warning("%s was made on %s, and is read on %s", directory, made_on, base.name_or_path)


def _config(directory: Path) -> dict[str, Any]:
    """adapter_config.json of a LoRA. One of another method, and one that has PEFT import a module, is refused."""
    path = directory / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict) or config.get("peft_type") != "LORA":
            kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
            raise ValueError(f"expected an adapter of peft_type LORA, got {str(kind)[:80]!r}")
        for field in ("megatron_config", "layer_replication"):
            if config.get(field):
                raise ValueError(f"{field} is set, which is not a plain LoRA's")
        ranks = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
        if not all(type(rank) is int and rank > 0 for rank in ranks):
            raise ValueError(f"expected ranks of at least 1, got {str(ranks)[:80]}")
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        raise ArtifactError(
            f"{path}: not a readable LoRA ({first_line(error)}). Copy it again or tune again."
        ) from None
    return {**config, "rank_pattern": config.get("rank_pattern") or {}}


def _factors(directory: Path) -> dict[str, list[int]]:
    """Name → shape of each LoRA factor, all of whose numbers are finite."""
    path = directory / "adapter_model.safetensors"
    if not path.is_file():
        raise ArtifactError(f"{directory}: no adapter_model.safetensors.{how_to_convert(directory)} {_MAKE}")
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if ".lora_A." in name or ".lora_B." in name]  # noqa: SIM118
            for name in names:
                if not file.get_tensor(name).isfinite().all():
                    raise ValueError(f"{name}: not every number is finite")
            return {name: file.get_slice(name).get_shape() for name in names}
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ArtifactError(f"{path}: not readable ({first_line(error)}). Copy it again or tune again.") from None


_MAKE = "Make it with `hlora tune` or `hlora run`."


def _list(ranks: set[int]) -> str:
    return ", ".join(map(str, sorted(ranks))) or "none"
