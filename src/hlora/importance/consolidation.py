"""Makes an Importance of what was recorded of each matrix, by either method."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hlora.importance.artefact import Importance, ImportanceMatrix
from hlora.model.adapters import AdaptedMatrix
from hlora.model.initialisation import lora_settings
from hlora.numerics.types import Consolidated
from hlora.parallel.group import all_gather_text, is_main, world_size
from hlora.system.choices import EncodingName
from hlora.system.errors import AdapterError


def importance_of(
    model: nn.Module,
    matrices: Sequence[AdaptedMatrix],
    found: Mapping[str, Consolidated],
    *,
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    encoding: EncodingName,
    provenance: dict[str, Any],
) -> Importance:
    """The importance of every matrix, anchored at the factors `As` and `Bs`.

    Args:
        model: The model with LoRA, for its configuration.
        matrices: The recorded matrices.
        found: Ω of each matrix, by name.
        As: A of each matrix at the end of the phase, (r, d_in).
        Bs: B of each matrix at the end of the phase, (d_out, r).
        encoding: Of Ω.
        provenance: Where the importance comes from. Gets the share of negative elements and the base model.
    """
    kept, negative, elements = {}, 0.0, 0
    for matrix, A, B in zip(matrices, As, Bs, strict=True):
        mine, count = found[matrix.name], B.shape[0] * A.shape[1]
        negative, elements = negative + mine.negative * count, elements + count
        kept[matrix.name] = ImportanceMatrix(
            omega=mine.importance,
            A=A,
            B=B,
            scale=matrix.scale,
            undo_cost=mine.undo_cost,
            base_sample=matrix.base_sample(),
            layer=matrix.layer,
        )
    if provenance["method"] == "path_integral":
        provenance["clamped_share"] = negative / elements
    settings = lora_settings(model, matrices[0].adapter_name)
    lora_config = {} if settings is None else settings.to_dict()
    named = getattr(getattr(model, "config", None), "_name_or_path", "") or lora_config.get("base_model_name_or_path")
    return Importance(
        matrices=kept,
        encoding=encoding,
        lora_config=lora_config,
        provenance={**provenance, "base_model": str(named or "")},
    )


def check_consolidation(xi: float, data: Any) -> None:
    """Raises ValueError if ξ or the description of the general data cannot be used."""
    if not 0 < xi < math.inf:
        raise ValueError(f"xi: expected a finite number above 0, got {xi!r}")
    if data is not None and not isinstance(data, Mapping):
        raise ValueError(f"data: expected a mapping, such as {{'name': 'wikitext-2'}}, got {data!r}")


def check_same_everywhere(As: Sequence[Tensor], Bs: Sequence[Tensor]) -> None:
    """Raises AdapterError if the processes of a group hold different adapters."""
    if world_size() == 1:
        return
    # In float32, as Apple's GPUs have no float64; stacked on the CPU, as the factors may be on several devices.
    found = [torch.linalg.vector_norm(factor.float()).cpu() for factor in (*As, *Bs)]
    norms = torch.stack(found).double()
    for number, text in enumerate(all_gather_text(json.dumps(norms.tolist()))):
        if not torch.allclose(norms, torch.tensor(json.loads(text), dtype=torch.float64), rtol=1e-3, equal_nan=True):
            raise AdapterError(
                f"process {number} has another adapter than this one, so their gradients were not averaged. Train the "
                "model in DistributedDataParallel or with fully_shard, from the same adapter everywhere."
            )


def warn_of_unreached(names: Sequence[str]) -> None:
    """Warns of matrices without importance: experts that no token reached, a vision tower under text."""
    if names and is_main():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        warnings.warn(
            f"{', '.join(names[:3])}{more}: the general phase gave no importance, as no token of it reached them or "
            "nothing moved them. They stay unprotected. Record on more text, or leave them out of target_modules.",
            stacklevel=3,
        )
