"""Time and bytes of importance on one model: EWC's Fisher information against HLoRA's recording (Fig. 5).

Measured at two countings: the paper's numbers of sequences, scaled down, and equal numbers. Seconds are never
extrapolated: they are reported with the number of sequences they were measured at.
"""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from rich.table import Table
from torch import Tensor

from hlora.comparison.clock import Clock, Elapsed, now
from hlora.config.run import RunConfig
from hlora.data.packing import pack
from hlora.importance.artefact import Importance
from hlora.importance.recorder import ImportanceRecorder
from hlora.importance.squared_gradients import fisher_of_sequences, whole_model_bytes
from hlora.model.lora import attach_lora
from hlora.numerics.encodings import ENCODINGS
from hlora.parallel.launch import require_one_process
from hlora.run.job import Job
from hlora.run.results import provenance
from hlora.system.choices import EncodingName
from hlora.system.errors import ConfigError
from hlora.system.files import write_json
from hlora.training.train import sft_arguments, train

EWC_SEQUENCES = 20_000  # paper, Fig. 5
EWC_BATCH = 8  # paper: maximum
HLORA_EPOCHS = 5  # paper
HLORA_BATCH = 20  # paper
NU_SAMPLES = 4_000
"""Sequences of general text in an epoch, which the paper does not state. 5 epochs of 4,000 pass over 20,000 sequences,
as many as EWC's Fisher information: an assumption that favours neither."""
PUBLISHED: dict[str, dict[str, dict[str, float]]] = {
    "GPT-J-6B": {"hours": {"EWC-LoRA": 27.17, "HLoRA": 1.15}, "gigabytes": {"EWC-LoRA": 22.65, "HLoRA": 3.5}},
    "LLaMA-3.2-3B": {"hours": {"EWC-LoRA": 25.97, "HLoRA": 1.19}, "gigabytes": {"EWC-LoRA": 11.97, "HLoRA": 1.3}},
}
"""Fig. 5 of the paper."""


def measure_cost(
    config: RunConfig,
    scale: float = 1 / 200,
    sequences: int | None = None,
    *,
    nu_samples: int = NU_SAMPLES,
    command: str = "hlora cost",
) -> dict[str, Any]:
    """Measure, and write cost.json into the output directory. An untimed batch of each method runs first.

    Each row has "seconds", the whole work: EWC's backward passes, or HLoRA's general phase with recording.
    "seconds_beyond_training" is the part that recording adds to training. "cpu_seconds" is processor time of this
    process, for comparison when other work shares the CPU. "bytes" is the importance of the adapted matrices.
    "whole_model_bytes" is EWC's importance as the paper counts it.

    Args:
        config: The settings.
        scale: Share of the paper's sequences to measure, for both methods.
        sequences: In place of `scale`, the number of EWC's sequences (scale = sequences / 20,000).
        nu_samples: Sequences of general text in an epoch, before scaling.
        command: The command that repeats the measurement.

    Returns:
        What cost.json holds.

    Raises:
        ConfigError: A number is out of range, or this is one of several processes.
        DataError: The general text is too short.
    """
    require_one_process("hlora cost", "Start it without torchrun.")
    if sequences is not None:
        scale = sequences / EWC_SEQUENCES
    if not 0 < scale <= 1:
        raise ConfigError(
            f"scale: expected above 0 and at most 1, which is {EWC_SEQUENCES:,} sequences; got {scale:.6g}. "
            "Try --scale 0.005."
        )
    if nu_samples < 1:
        raise ConfigError(f"nu-samples: expected at least 1 sequence an epoch, got {nu_samples}")
    ewc, nu = max(1, round(EWC_SEQUENCES * scale)), max(1, round(nu_samples * scale))
    job = Job.open(config)
    job.keep_config()
    length = _sequence_length(job)
    ids = pack(job.tokenizer, job.general.train, max(ewc, nu), length)
    _fisher(job, ids[:EWC_BATCH])
    _recording(job, ids[:EWC_BATCH], ENCODINGS[0], epochs=1, batch_size=EWC_BATCH)
    importance, spent = _fisher(job, ids[:ewc])
    whole = whole_model_bytes(job.base)
    rows: list[dict[str, Any]] = []
    for counting in ("paper", "equal"):  # the same measurement
        row = _row("EWC-LoRA", importance, spent, samples=ewc, length=length, epochs=1, batch_size=EWC_BATCH)
        rows.append({**row, "counting": counting, "whole_model_bytes": whole})
    del importance
    for counting, samples, epochs, batch in (("paper", nu, HLORA_EPOCHS, HLORA_BATCH), ("equal", ewc, 1, EWC_BATCH)):
        for encoding in ENCODINGS:
            importance, spent, beyond = _recording(job, ids[:samples], encoding, epochs=epochs, batch_size=batch)
            row = _row("HLoRA", importance, spent, samples=samples, length=length, epochs=epochs, batch_size=batch)
            rows.append({**row, "counting": counting, "seconds_beyond_training": beyond.wall})
    cost = {
        "model": config.model.name,
        "provenance": {
            "seed": config.seed,
            **provenance(job.base, {"general": job.general.facts}),
            "sequence_length": length,
        },
        "command": command,
        "config": config.model_dump(),
        "scale": scale,
        "samples": {
            "EWC-LoRA": {"paper": EWC_SEQUENCES, "measured": ewc},
            "HLoRA": {"assumed": nu_samples, "measured": nu, "scale": nu / nu_samples},
        },
        "rows": rows,
        "ratios": _ratios(rows),
        "published": PUBLISHED,
        "notes": _notes(scale, ewc=ewc, nu=nu, nu_samples=nu_samples, length=length, whole=whole),
    }
    return write_json(job.output / "cost.json", cost, indent=1)


def _row(
    method: str, importance: Importance, spent: Elapsed, *, samples: int, length: int, epochs: int, batch_size: int
) -> dict[str, Any]:
    """What was measured of one method, on so many sequences of `length` tokens."""
    return {
        "method": method,
        "encoding": importance.encoding,
        "samples": samples,
        "tokens": samples * epochs * (length - 1),  # predicted ones
        "epochs": epochs,
        "batch_size": batch_size,
        "seconds": spent.wall,
        "cpu_seconds": spent.cpu,
        "bytes": importance.nbytes(),
    }


def cost_tables(cost: dict[str, Any]) -> list[Table]:
    """Tables for the terminal: each measurement, and the ratios of EWC to HLoRA."""
    measured = Table(title=f"Cost of importance: {cost['model']}, {cost['provenance']['hardware']}")
    for heading in ("count", "method", "encoding"):
        measured.add_column(heading)
    for heading in ("passes", "seconds", "CPU s", "extra s", "MB"):
        measured.add_column(heading, justify="right")
    for row in cost["rows"]:
        beyond = row.get("seconds_beyond_training")
        measured.add_row(
            *(row["counting"], row["method"], row["encoding"]),
            f"{row['epochs']} × {row['samples']:,}",
            *(f"{row[name]:.2f}" for name in ("seconds", "cpu_seconds")),
            "" if beyond is None else f"{beyond:.3f}",
            f"{row['bytes'] / 1e6:.2f}",
        )
    ratios = Table(title="EWC-LoRA over HLoRA")
    for heading in ("count", "encoding"):
        ratios.add_column(heading)
    for heading in ("time", "CPU time", "time / extra", "bytes", "bytes, whole model"):
        ratios.add_column(heading, justify="right")
    for counting, encodings in cost["ratios"].items():
        for encoding, ratio in encodings.items():
            names = ("time", "cpu_time", "time_beyond_training", "bytes_same_matrices", "bytes_whole_model")
            ratios.add_row(counting, encoding, *(f"{ratio[name]:.3g}" for name in names))
    return [measured, ratios]


def _fisher(job: Job, ids: Tensor) -> tuple[Importance, Elapsed]:
    """EWC's importance of the sequences and the time it took."""
    model = attach_lora(job.base, job.config.lora, job.config.seed)
    started = now()
    importance = fisher_of_sequences(model, ids, job.config.seed, batch_size=EWC_BATCH)
    spent = now() - started
    model.unload()
    return importance, spent


def _recording(
    job: Job, ids: Tensor, encoding: EncodingName, *, epochs: int, batch_size: int
) -> tuple[Importance, Elapsed, Elapsed]:
    """HLoRA's importance, the time of training with recording, and the time of recording alone.

    The recorder's calls are timed, since the difference to a training without it is below the noise.
    """
    config = job.config
    model = attach_lora(job.base, config.lora, config.seed)
    recorder = ImportanceRecorder(model, encoding, method="path_integral")  # the paper's
    clock = Clock()
    for name in ("capture_from", "integrate", "consolidate"):
        setattr(recorder, name, clock.inside(getattr(recorder, name)))
    arguments = {
        **config.training.record_arguments(),
        "num_train_epochs": epochs,
        "max_steps": -1,
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": 1,
        "packing": False,  # packed already
        "bf16": False,  # the model's own precision, as for the Fisher information
        "fp16": False,
        "save_strategy": "no",
        "report_to": "none",
    }
    dataset = Dataset.from_dict({"input_ids": ids.tolist()})
    logs = job.output / "logs" / f"cost {encoding}"
    train(
        model,
        job.tokenizer,
        dataset,
        output=logs,
        arguments=arguments,
        seed=config.seed,
        callbacks=[recorder.callback(), clock],
    )
    training, recording = clock.training, clock.recording
    importance = recorder.consolidate(config.importance.xi)
    consolidating = clock.recording - recording
    model.unload()
    return importance, training + consolidating, clock.recording


def _sequence_length(job: Job) -> int:
    length = sft_arguments(job.output, job.config.training.record_arguments(), job.config.seed).max_length
    if length is None:
        raise ConfigError("training.record.max_length: expected a number of tokens to measure at, got null")
    return length


def _ratios(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Ratios of EWC to HLoRA, by counting and encoding."""
    ratios: dict[str, dict[str, dict[str, float]]] = {}
    for ewc in (row for row in rows if row["method"] == "EWC-LoRA"):
        ratios[ewc["counting"]] = {
            ours["encoding"]: {
                "time": ewc["seconds"] / ours["seconds"],
                "cpu_time": ewc["cpu_seconds"] / ours["cpu_seconds"],
                "time_beyond_training": ewc["seconds"] / ours["seconds_beyond_training"],
                "bytes_whole_model": ewc["whole_model_bytes"] / ours["bytes"],
                "bytes_same_matrices": ewc["bytes"] / ours["bytes"],
            }
            for ours in rows
            if ours["method"] == "HLoRA" and ours["counting"] == ewc["counting"]
        }
    return ratios


def _notes(scale: float, *, ewc: int, nu: int, nu_samples: int, length: int, whole: int) -> list[str]:
    """How the numbers were measured, in sentences for terminal, figure and report."""
    why = ""
    if nu_samples == NU_SAMPLES:
        why = f": {HLORA_EPOCHS} epochs of them are as many passes as EWC's, which favours neither"
    notes = [
        f"Measured at 1/{1 / scale:,.6g} of the paper's sequences, not extrapolated: EWC-LoRA's Fisher information on "
        f"{ewc:,} of {EWC_SEQUENCES:,}, HLoRA's {HLORA_EPOCHS} epochs of {nu:,} of {nu_samples:,}; "
        f"{length} tokens each.",
        f"The paper does not state how many sequences an epoch of ν has. {nu_samples:,} is an assumption{why}; "
        "the time ratio of this counting is inversely proportional to it.",
        "EWC-LoRA's time and bytes are of the adapted matrices alone; as the paper counts its bytes, by the whole "
        f"model, they are {whole / 1e6:,.1f} MB. HLoRA's extra seconds are what recording adds to training.",
        f"Equal counting: one pass over the same sequences in the same batches of {EWC_BATCH}.",
    ]
    if abs(nu / nu_samples / scale - 1) > 0.01:
        notes.append(
            f"HLoRA's sequences are a whole number: {nu:,} is 1/{nu_samples / nu:,.6g} of {nu_samples:,}, so the "
            "ratios of the paper's counting are not at one scale. Take a larger scale."
        )
    if nu < HLORA_BATCH:
        notes.append(f"An epoch of {nu} fills no batch of {HLORA_BATCH}, as the paper's do. Take a larger scale.")
    return notes
