"""Importance Ω, the general adapter θ^ν and where they come from: checked, added, saved and loaded as one."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from hlora.importance.artefact_files import (
    FILES,
    FORMAT,
    constructible,
    locate,
    plain,
    read_files,
    refuse_foreign,
    short,
    write_files,
)
from hlora.model.adapters import AdaptedMatrix, adapted_matrices
from hlora.model.experts import from_peft, to_peft
from hlora.numerics import encodings
from hlora.numerics.encodings import Encoded
from hlora.parallel.dtensor import distribute_like
from hlora.parallel.fsdp import reshard
from hlora.parallel.group import is_main, main_first
from hlora.report.card import named_card, public_name
from hlora.system.choices import EncodingName, Method
from hlora.system.errors import ArtifactError
from hlora.system.files import atomic_directory, how_to_convert
from hlora.system.hub import upload
from hlora.system.redaction import redacted, without_paths


@dataclass(frozen=True)
class ImportanceMatrix:
    """One adapted matrix at the end of the general phase."""

    omega: Encoded  # (d_out, d_in)
    """Ω (Eq. 13), unit of the loss / weight²."""
    A: Tensor  # (r, d_in), of θ^ν
    B: Tensor  # (d_out, r)
    scale: float
    undo_cost: float
    """Σ Ω Δ², what undoing the general phase costs in the penalty of Eq. 14."""
    base_sample: Tensor  # (≤ 16,)
    """A few values of W₀, by which the base model is recognised."""
    layer: str = ""
    """As AdaptedMatrix.layer."""


@dataclass(repr=False)
class Importance:
    """The importance Ω of every adapted matrix, and the adapter θ^ν that it is anchored at.

    `Importance.load` reads one from a directory or the hub; `ImportanceRecorder.consolidate` makes one.

    Attributes:
        matrices: ImportanceMatrix by the name of the matrix.
        encoding: "factored", row and column sums of Ω; or "float32", dense.
        lora_config: LoRA settings of the recording, as PEFT has them.
        provenance: Where the importance comes from: method, steps, data, base model, versions.

    Source: Eq. 13.
    """

    matrices: dict[str, ImportanceMatrix]
    encoding: EncodingName
    lora_config: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Importance({len(self.matrices)} matrices, {self.encoding}, {self.nbytes():,} bytes, {self.method})"

    @property
    def method(self) -> Method:
        """How it was recorded; one that does not say so is a path integral."""
        found: Method = self.provenance.get("method", "path_integral")
        return found

    @classmethod
    def of(cls, source: Importance | str | Path) -> Importance:
        """Return `source` itself if it is an Importance, else load it.

        Args:
            source: An Importance, a directory or a hub repository.

        In several processes every one calls it. The main one, which saves, loads first.

        Raises:
            ArtifactError: `source` is something else, or cannot be loaded.
        """
        if isinstance(source, Importance):
            return source
        if not isinstance(source, str | Path):
            kind = type(source).__name__
            raise ArtifactError(f"importance: expected an Importance, a directory or a hub repository, got {kind}")
        return main_first(lambda: cls.load(source))

    def norms(self) -> dict[str, float]:
        """The norm ‖Ω_l‖₂ of each matrix, by name. Source: Eq. 15, Fig. 7."""
        return {name: float(encodings.norm(matrix.omega)) for name, matrix in self.matrices.items()}

    def nbytes(self) -> int:
        """Bytes of Ω alone, which is what the paper counts as storage."""
        return sum(encodings.nbytes(matrix.omega) for matrix in self.matrices.values())

    def describe(self) -> dict[str, Any]:
        """Encoding, bytes, norms and provenance as plain values, for results.json and `hlora inspect`."""
        return {
            "method": self.method,
            "recorded": "in one pass at the base model" if self.without_move else "along the general phase",
            "encoding": self.encoding,
            "bytes": self.nbytes(),
            "anchors": ["base"] if self.without_move else ["general", "base"],  # those that it can hold a model to
            "layer_norms": self.norms(),
            "undo_cost": sum(matrix.undo_cost for matrix in self.matrices.values()),
            **self.provenance,
        }

    def __add__(self, other: Importance) -> Importance:
        """The importance of two general tasks in sequence, anchored at the adapter of the later one, `other`.

        Raises:
            ArtifactError: The two differ in encoding, method, gradient, unit or matrices.

        Source: Eq. 13, Σ_ν.
        """
        if self.encoding != other.encoding:
            raise ArtifactError(f"cannot add importance in {self.encoding} to one in {other.encoding}")
        usual = {"method": "path_integral", "gradient": "effective", "unit": "token"}
        for what, without in usual.items():  # their units differ
            mine, theirs = (part.provenance.get(what, without) for part in (self, other))
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
        """Whether it was recorded in one pass at the base model, without training. Then θ^ν is W₀."""
        return self.method == "squared_gradients" and "steps" not in self.provenance

    def covering(self, matrices: list[AdaptedMatrix]) -> Importance:
        """The importance of `matrices` only, which may have any rank; the anchor "base" needs no more.

        Args:
            matrices: The adapted matrices of the model to protect.

        Raises:
            ArtifactError: A matrix is not covered, has another shape, or is on another base model.
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
        """Check that an adapter has the matrices, rank and scale of the recording, on the same base model.

        Args:
            matrices: The adapted matrices of the model to protect.

        Raises:
            ArtifactError: The adapter differs. Names the first matrix that does.
        """
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
                    f"Use the recording's LoRA settings: {short(self.lora_config)}; or the anchor base, "
                    "which takes any rank."
                )
            self._check_base(other)

    def _check_base(self, matrix: AdaptedMatrix) -> None:
        if not matrix.is_on_base_of(self.matrices[matrix.name].base_sample):
            pissa = " PiSSA by pissa_niter_N changes them by random numbers: set the recording's seed before it."
            raise ArtifactError(
                f"{matrix.name}: the base weights are not those the importance was recorded on "
                f"({self.provenance.get('base_model') or 'unnamed'}). Load that base model, or record again."
                f"{pissa if matrix.initialisation == 'pissa' else ''}"
            )

    def load_adapter_into(self, model: nn.Module, adapter_name: str | None = None) -> None:
        """Set the model's adapter to θ^ν, where the domain phase starts.

        Args:
            model: A model with LoRA.
            adapter_name: The adapter to set; by default the active one.

        In several processes every one calls it, also if the model is sharded.

        Raises:
            ArtifactError: The adapter or its base model differs from the recording's.
        """
        reshard(model)
        matrices = adapted_matrices(model, adapter_name, unprotected="warn")
        self.check(matrices)
        with torch.no_grad():
            for matrix in matrices:
                mine = self.matrices[matrix.name]
                for factor, values in ((matrix.A, mine.A), (matrix.B, mine.B)):
                    factor.copy_(distribute_like(factor, values.to(factor.device)))

    def save(self, directory: str | Path) -> Path:
        """Save to a directory atomically: write next to it, flush, then rename into place.

        Args:
            directory: Where to save. An importance that is there is replaced.

        In several processes the main one writes.

        Raises:
            ArtifactError: `directory` holds something else, or a number is negative or not finite. Nothing is written.
        """
        directory = Path(directory).expanduser()
        if not is_main():
            return directory
        refuse_foreign(directory)
        self._check_numbers()
        with atomic_directory(directory) as fresh:
            self._write(fresh)
        return directory

    def _check_numbers(self) -> None:
        for name, matrix in self.matrices.items():
            try:
                encodings.check(encodings.parts(matrix.omega), self.encoding, encodings.shape(matrix.omega), name=name)
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
        for name, matrix in self.matrices.items():
            tensors |= {f"{name}.{part}": t for part, t in encodings.parts(matrix.omega).items()}
            tensors[f"{name}.base_sample"] = matrix.base_sample
        factors = to_peft((matrix.layer or name, matrix.A, matrix.B) for name, matrix in self.matrices.items())
        write_files(directory, self.document(), tensors, factors=factors, lora_config=self.lora_config)

    def push_to_hub(
        self, repo: str, *, private: bool = False, license: str | None = None, card: str | None = None
    ) -> str:
        """Upload the importance to the hub with its card.

        `hlora.protect(trainer, repo, phi=1.0)` and `Importance.load(repo)` read it from there. Paths of this machine
        are shortened to their last part.

        Args:
            repo: Repository, user/name. Created if it does not exist.
            private: Whether a new repository is private.
            license: Licence for the card, such as apache-2.0.
            card: Text of your own card, to replace the one that hlora writes.

        Returns:
            The repository's address.

        In several processes the main one uploads.

        Raises:
            ConfigError: `repo` is not of the form user/name.
            ArtifactError: A number is not finite, or the hub refuses the upload or cannot be reached.
        """
        if not is_main():
            return repo
        public = replace(
            self,
            lora_config=without_paths(constructible(self.lora_config)),
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
        """What importance.json holds, without checksums: plain values, secrets redacted."""
        document = {
            "format": FORMAT,
            "encoding": self.encoding,
            "matrices": {
                name: {"scale": m.scale, "undo_cost": m.undo_cost, **({"layer": m.layer} if m.layer else {})}
                for name, m in self.matrices.items()
            },
            "lora_config": constructible(self.lora_config),
            "provenance": {
                **self.provenance,
                "versions": {p: version(p) for p in ("torch", "transformers", "peft")},
            },
        }
        without_secrets: dict[str, Any] = redacted(json.loads(json.dumps(document, default=plain)))
        return without_secrets

    @classmethod
    def load(cls, source: str | Path) -> Importance:
        """Load an importance from a directory or the hub.

        Args:
            source: A directory. A string user/name is a hub repository if there is no such directory.

        Raises:
            ArtifactError: The importance does not exist, is damaged, or has another format.
        """
        directory = locate(source)
        try:
            document, tensors, factors = read_files(directory)
            matrices = {}
            layers = {name: str(facts.get("layer") or name) for name, facts in document["matrices"].items()}
            adapter = from_peft(factors, layers)
            for name, facts in document["matrices"].items():
                own = {part: tensors[f"{name}.{part}"] for part in encodings.PARTS if f"{name}.{part}" in tensors}
                A, B = adapter[name]
                encodings.check(own, document["encoding"], (B.shape[0], A.shape[1]), name=name)
                _check_cost(float(facts["undo_cost"]), name)
                matrices[name] = ImportanceMatrix(
                    omega=encodings.from_parts(own),
                    A=A,
                    B=B,
                    scale=float(facts["scale"]),
                    undo_cost=float(facts["undo_cost"]),
                    base_sample=tensors[f"{name}.base_sample"],
                    layer=str(facts.get("layer") or ""),
                )
            return cls(matrices, document["encoding"], document["lora_config"], document["provenance"])
        except (
            OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, SafetensorError
        ) as error:  # fmt: skip
            raise ArtifactError(
                f"{directory}: not a readable importance ({type(error).__name__}: {error}). "
                f"Expected the files {', '.join(FILES)}; copy it again or record again.{how_to_convert(directory)}"
            ) from None


def _check_cost(undo_cost: float, name: str) -> None:
    if not math.isfinite(undo_cost):
        raise ValueError(f"{name}.undo_cost: expected a finite number, got {undo_cost}")


def _same_names(first: Mapping[str, Any], second: Mapping[str, Any], one: str, other: str) -> None:
    for a, b, has, lacks in ((first, second, one, other), (second, first, other, one)):
        missing = [name for name in a if name not in b]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            modules = {name.rsplit(".", 1)[-1] for name in b}
            other_prefix = missing[0].rsplit(".", 1)[-1] in modules
            found = repr(next(iter(b))) if other_prefix else ", ".join(sorted(modules))
            raise ArtifactError(
                f"{has} has {missing[0]!r}{more}, {lacks} lacks it (it has {found}). Use the same base model and "
                "target_modules for both, or record again."
            )
