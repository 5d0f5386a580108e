"""The artefact: importance Ω, the general adapter θ^ν and where they come from, as one directory.

importance.safetensors   Ω of each matrix in its encoding, and a few values of each base matrix
importance.json          encoding, per-matrix numbers, provenance
adapter_model.safetensors, adapter_config.json   θ^ν, an ordinary PEFT adapter
README.md                the card: what it is, and how to load it
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hlora.model.adapters import AdaptedMatrix, adapted_matrices
from hlora.numerics import encodings
from hlora.numerics.encodings import Encoded
from hlora.parallel.dtensor import distribute_like
from hlora.parallel.fsdp import reshard
from hlora.parallel.group import is_main
from hlora.report.card import importance_card, named_card, public_name
from hlora.system.errors import ArtifactError
from hlora.system.files import building, how_to_convert, sha256, write_json
from hlora.system.hub import upload
from hlora.system.redaction import redacted, without_paths

FORMAT = 1
_FILES = ("importance.json", "importance.safetensors", "adapter_model.safetensors", "adapter_config.json")


@dataclass(frozen=True)
class ImportanceMatrix:
    """What is known of one adapted matrix at the end of the general task."""

    omega: Encoded  # (d_out, d_in)
    """Ω (Eq. 13), unit of the loss / weight²."""
    A: Tensor  # (r, d_in), of θ^ν
    B: Tensor  # (d_out, r)
    scale: float
    undo_cost: float
    """Σ Ω Δ²: what the penalty of Eq. 14 says it costs to undo the general phase."""
    base_sample: Tensor  # (≤ 16,)
    """A few values of W₀, to recognise the base model again."""


@dataclass(repr=False)
class Importance:
    """Consolidated importance of every adapted matrix (Eq. 13) and the adapter it is anchored at."""

    matrices: dict[str, ImportanceMatrix]
    encoding: str
    lora_config: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        method = self.provenance.get("method", "path_integral")
        return f"Importance({len(self.matrices)} matrices, {self.encoding}, {self.nbytes():,} bytes, {method})"

    @classmethod
    def of(cls, source: Importance | str | Path) -> Importance:
        """An importance as it is, or that of a directory or a hub repository. Raises ArtifactError for another kind."""
        if isinstance(source, Importance):
            return source
        if not isinstance(source, str | Path):
            kind = type(source).__name__
            raise ArtifactError(f"importance: expected an Importance, a directory or a hub repository, got {kind}")
        return cls.load(source)

    def norms(self) -> dict[str, float]:
        """‖Ω_l‖₂ of each matrix (Eq. 15, Fig. 7)."""
        return {name: float(encodings.norm(matrix.omega)) for name, matrix in self.matrices.items()}

    def nbytes(self) -> int:
        """Bytes of Ω alone, as the paper counts its storage."""
        return sum(encodings.nbytes(matrix.omega) for matrix in self.matrices.values())

    def describe(self) -> dict[str, Any]:
        """Encoding, bytes, norms and provenance as plain values, for results.json and `hlora inspect`."""
        return {
            "method": "path_integral",  # of artefacts that say nothing
            "recorded": "in one pass at the base model" if self.without_move else "along the general phase",
            "encoding": self.encoding,
            "bytes": self.nbytes(),
            "anchors": ["base"] if self.without_move else ["general", "base"],  # what it can hold a model to
            "layer_norms": self.norms(),
            "undo_cost": sum(matrix.undo_cost for matrix in self.matrices.values()),
            **self.provenance,
        }

    def __add__(self, other: Importance) -> Importance:
        """Importance of several general tasks (Eq. 13, Σ_ν); the anchor θ^ν is the later one's, `other`'s.

        Raises ArtifactError when the two differ in encoding, method, gradient or matrices.
        """
        if self.encoding != other.encoding:
            raise ArtifactError(f"cannot add importance in {self.encoding} to one in {other.encoding}")
        for what, usual in (("method", "path_integral"), ("gradient", "effective")):  # their units differ
            mine, theirs = (part.provenance.get(what, usual) for part in (self, other))
            if mine != theirs:
                raise ArtifactError(f"cannot add importance of {what} {mine} to one of {what} {theirs}")
        _same_names(self.matrices, other.matrices, "the first importance", "the second")
        matrices = {
            name: replace(
                other.matrices[name],
                omega=encodings.add(mine.omega, other.matrices[name].omega),
                undo_cost=mine.undo_cost + other.matrices[name].undo_cost,
            )
            for name, mine in self.matrices.items()
        }
        provenance = {**other.provenance, "parts": [self.provenance, other.provenance]}
        return replace(other, matrices=matrices, provenance=provenance)

    @property
    def without_move(self) -> bool:
        """Whether it was recorded in one pass at the base model, without training: then θ^ν is W₀."""
        return self.provenance.get("method") == "squared_gradients" and "steps" not in self.provenance

    def covering(self, matrices: list[AdaptedMatrix]) -> Importance:
        """The part of the importance that concerns `matrices`, whatever their rank: all that anchor "base" needs.

        Raises ArtifactError that names the first matrix which is not covered, and what to do.
        """
        for matrix in matrices:
            mine = self.matrices.get(matrix.name)
            if mine is None:
                modules = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in self.matrices}))
                raise ArtifactError(
                    f"the adapter has {matrix.name!r}, which the importance does not cover (it covers {modules}). "
                    "Record with these target_modules too, or adapt covered ones only."
                )
            expected, got = encodings.shape(mine.omega), (matrix.B.shape[0], matrix.A.shape[1])
            if expected != got:
                raise ArtifactError(
                    f"{matrix.name}: importance was recorded for a matrix of {expected[0]} × {expected[1]}; "
                    f"the adapter is for one of {got[0]} × {got[1]}. Load the recording's base model, or record again."
                )
            self._check_base(matrix)
        return replace(self, matrices={matrix.name: self.matrices[matrix.name] for matrix in matrices})

    def check(self, matrices: list[AdaptedMatrix]) -> None:
        """Raises ArtifactError that names the first matrix whose adapter is unlike the recording's, and what to do."""
        by_name = {matrix.name: matrix for matrix in matrices}
        _same_names(self.matrices, by_name, "the importance", "the model's adapter")
        for name, mine in self.matrices.items():
            other = by_name[name]
            expected = (tuple(mine.A.shape), tuple(mine.B.shape), mine.scale)
            got = (tuple(other.A.shape), tuple(other.B.shape), other.scale)
            if expected != got:
                raise ArtifactError(
                    f"{name}: importance was recorded with A {expected[0]}, B {expected[1]}, scale {expected[2]}; "
                    f"the adapter has A {got[0]}, B {got[1]}, scale {got[2]}. "
                    f"Use the recording's LoRA settings: {_short(self.lora_config)}; or the anchor base, "
                    "which takes any rank."
                )
            self._check_base(other)

    def _check_base(self, matrix: AdaptedMatrix) -> None:
        if not matrix.is_on_base_of(self.matrices[matrix.name].base_sample):
            raise ArtifactError(
                f"{matrix.name}: the base weights are not those the importance was recorded on "
                f"({self.provenance.get('base_model') or 'unnamed'}). Load that base model, or record again."
            )

    def load_adapter_into(self, model: nn.Module, adapter_name: str | None = None) -> None:
        """Set the model's adapter to θ^ν, where the domain phase starts. Raises ArtifactError on a mismatch."""
        reshard(model)
        matrices = adapted_matrices(model, adapter_name, unprotected="warn")
        self.check(matrices)
        with torch.no_grad():
            for matrix in matrices:
                mine = self.matrices[matrix.name]
                for factor, values in ((matrix.A, mine.A), (matrix.B, mine.B)):
                    factor.copy_(distribute_like(factor, values.to(factor.device)))

    def save(self, directory: str | Path) -> Path:
        """Write the artefact, whole or not at all: built beside `directory`, flushed, then renamed into place.

        Replaces an importance that is there. Raises ArtifactError when `directory` holds anything else, and when a
        number is negative or not finite; nothing is written then. In a group of processes the first writes.
        """
        directory = Path(directory)
        if not is_main():
            return directory
        refuse_foreign(directory)
        self._check_numbers()
        with building(directory) as fresh:
            self._write(fresh)
        return directory

    def _check_numbers(self) -> None:
        for name, matrix in self.matrices.items():
            try:
                encodings.check(encodings.parts(matrix.omega), self.encoding, *encodings.shape(matrix.omega), name)
                for factor in ("A", "B"):
                    if not getattr(matrix, factor).isfinite().all():
                        raise ValueError(f"{name}.{factor}: not every number is finite")
                _check_cost(matrix.undo_cost, name)
            except ValueError as error:
                what_to_do = (
                    "The model's gradients are not finite; load it in bfloat16 or float32."
                    if self.without_move
                    else "The general phase has diverged; record again with a smaller learning rate, or a larger xi."
                )
                raise ArtifactError(f"the importance cannot be saved: {error}. {what_to_do}") from None

    def _write(self, directory: Path) -> None:
        tensors: dict[str, Tensor] = {}
        factors: dict[str, Tensor] = {}
        for name, matrix in self.matrices.items():
            tensors |= {f"{name}.{part}": t for part, t in encodings.parts(matrix.omega).items()}
            tensors[f"{name}.base_sample"] = matrix.base_sample
            factors[f"base_model.model.{name}.lora_A.weight"] = matrix.A
            factors[f"base_model.model.{name}.lora_B.weight"] = matrix.B
        save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, directory / "importance.safetensors")
        save_file({k: v.contiguous().cpu() for k, v in factors.items()}, directory / "adapter_model.safetensors")
        if self.lora_config:
            LoraConfig(**_constructible(self.lora_config)).save_pretrained(str(directory))
        document = self.document()
        (directory / "README.md").write_text(importance_card(document), encoding="utf-8")
        sums = {name: sha256(directory / name) for name in _FILES[1:] if (directory / name).exists()}
        document["sha256"] = {**sums, "importance.json": _digest(document)}
        write_json(directory / "importance.json", document, indent=1)

    def push_to_hub(
        self, repo: str, *, private: bool = False, license: str | None = None, card: str | None = None
    ) -> str:
        """Upload the artefact to the hub with its card; returns the repository's address.

        `hlora.protect(trainer, repo, phi=1.0)` and `Importance.load(repo)` read it from there. Paths of this machine
        become their last part.

        Args:
            repo: user/name; made if it is new.
            private: of a new repository.
            license: for the card, such as apache-2.0.
            card: a card of your own, in place of the one that hlora writes.

        In several processes: the first uploads.

        Raises:
            ConfigError: `repo` is not of the form user/name.
            ArtifactError: a number is not finite, or the hub refused it or cannot be reached.
        """
        if not is_main():
            return repo
        public = replace(
            self,
            lora_config=without_paths(_constructible(self.lora_config)),
            provenance=without_paths(redacted(self.provenance)),
        )
        for facts, name in ((public.lora_config, "base_model_name_or_path"), (public.provenance, "base_model")):
            if facts.get(name):
                facts[name] = public_name(str(facts[name]))
        with tempfile.TemporaryDirectory() as scratch:
            directory = public.save(Path(scratch) / "importance")
            written = directory / "README.md"
            text = written.read_text(encoding="utf-8") if card is None else card
            written.write_text(named_card(text, repo, license), encoding="utf-8")
            return upload(directory, repo, "Importance, written by hlora", private=private)

    def document(self) -> dict[str, Any]:
        """What importance.json holds, but its checksums: plain values without secrets."""
        document = {
            "format": FORMAT,
            "encoding": self.encoding,
            "matrices": {n: {"scale": m.scale, "undo_cost": m.undo_cost} for n, m in self.matrices.items()},
            "lora_config": _constructible(self.lora_config),
            "provenance": {
                **self.provenance,
                "versions": {p: version(p) for p in ("torch", "transformers", "peft")},
            },
        }
        plain: dict[str, Any] = redacted(json.loads(json.dumps(document, default=_plain)))
        return plain

    @classmethod
    def load(cls, source: str | Path) -> Importance:
        """Read an artefact from a directory, or, given a string, from a hub repository when no such directory exists.

        Raises ArtifactError when it is absent, damaged or of a newer format.
        """
        directory = _locate(source)
        try:
            document = json.loads((directory / "importance.json").read_text(encoding="utf-8"))
            if document.get("format") != FORMAT:
                raise ArtifactError(
                    f"{directory}/importance.json: format {document.get('format')!r}, this hlora reads {FORMAT}. "
                    "Use the hlora that wrote it, or record again."
                )
            if document["encoding"] not in encodings.ENCODINGS:
                raise ArtifactError(
                    f"{directory}: importance in {document['encoding']!r}, this hlora reads "
                    f"{' and '.join(encodings.ENCODINGS)}. Record again in one of them."
                )
            for name, expected in document.pop("sha256", {}).items():  # against damage, not against an author
                found = _digest(document) if name == "importance.json" else sha256(directory / Path(name).name)
                if found != expected:
                    raise ValueError(f"{name} is not the file that was saved")
            tensors = _read(directory / "importance.safetensors")
            factors = _read(directory / "adapter_model.safetensors")
            matrices = {}
            for name, facts in document["matrices"].items():
                own = {part: tensors[f"{name}.{part}"] for part in encodings.PARTS if f"{name}.{part}" in tensors}
                A, B = (factors[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB")
                encodings.check(own, document["encoding"], B.shape[0], A.shape[1], name)
                _check_cost(float(facts["undo_cost"]), name)
                matrices[name] = ImportanceMatrix(
                    omega=encodings.from_parts(own),
                    A=A,
                    B=B,
                    scale=float(facts["scale"]),
                    undo_cost=float(facts["undo_cost"]),
                    base_sample=tensors[f"{name}.base_sample"],
                )
            return cls(matrices, document["encoding"], document["lora_config"], document["provenance"])
        except (
            OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, SafetensorError
        ) as error:  # fmt: skip
            raise ArtifactError(
                f"{directory}: not a readable importance ({type(error).__name__}: {error}). "
                f"Expected the files {', '.join(_FILES)}; copy it again or record again.{how_to_convert(directory)}"
            ) from None


def _check_cost(undo_cost: float, name: str) -> None:
    if not math.isfinite(undo_cost):
        raise ValueError(f"{name}.undo_cost: expected a finite number, got {undo_cost}")


def refuse_foreign(directory: Path) -> None:
    """Raises ArtifactError when `directory` holds anything else than an importance."""
    if not directory.exists():
        return
    found = [path.name for path in directory.iterdir()] if directory.is_dir() else ["a file"]
    card = ("README.md",) if "importance.json" in found else ()  # without one it is another's README
    foreign = sorted(name for name in found if name not in (*_FILES, *card))
    if foreign:
        raise ArtifactError(
            f"{directory}: holds {foreign[0]}, which is not part of an importance and would be lost. "
            "Save to a directory of its own."
        )


def _locate(source: str | Path) -> Path:
    if Path(source).is_dir():
        return Path(source)
    if isinstance(source, Path) or source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise ArtifactError(f"{source}: no such directory. Record one with `hlora record CONFIG`.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=list(_FILES)))
    except Exception as error:  # the hub client raises many kinds; to the user all mean the same
        raise ArtifactError(
            f"{source}: neither a directory here nor a hub repository that can be reached "
            f"({type(error).__name__}). Check the name and the network, or pass a directory."
        ) from None


def _digest(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _same_names(first: Mapping[str, Any], second: Mapping[str, Any], one: str, other: str) -> None:
    for a, b, has, lacks in ((first, second, one, other), (second, first, other, one)):
        missing = [name for name in a if name not in b]
        if missing:
            modules = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in b}))
            raise ArtifactError(
                f"{has} has {missing[0]!r}{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}, "
                f"{lacks} lacks it (it has {modules}). Use the same base model and target_modules for both, "
                "or record again."
            )


def _short(lora_config: Mapping[str, Any]) -> str:
    keys = ("r", "lora_alpha", "use_rslora", "target_modules", "rank_pattern", "alpha_pattern")
    shown = {k: _plain(lora_config[k]) for k in keys if lora_config.get(k)}
    return ", ".join(f"{key}={value}" for key, value in shown.items()) or "not kept"


def _constructible(lora_config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that LoraConfig takes, as plain values and without empty ones."""
    names = LoraConfig.__dataclass_fields__
    kept = {k: _plain(v) for k, v in lora_config.items() if k in names and v not in (None, {}, [])}
    return {k: v for k, v in kept.items() if k not in ("auto_mapping", "runtime_config", "peft_version")}


def _plain(value: Any) -> Any:
    """JSON's view of sets, enums and dataclasses."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    if hasattr(value, "value"):
        return value.value
    return value if isinstance(value, str | int | float | bool | list | dict | tuple) or value is None else str(value)
