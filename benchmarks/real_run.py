"""The table of the README: Base, LoRA(μ), LoRA(ν+μ), HLoRA float32, HLoRA factored on one configuration.

    python benchmarks/real_run.py record CONFIG            # one general phase, recorded in both encodings at once
    python benchmarks/real_run.py arms CONFIG [ARM ...]    # the domain phases and evaluations, one JSON each
    python benchmarks/real_run.py table OUTPUT [OUTPUT …]  # Markdown from the JSON files

Both encodings watch the same general phase, so the two HLoRA arms start from the same θ^ν and see the same batches.
An arm whose JSON exists is not run again. OUTPUT/importance-float32 and -factored may be copied between configurations
that share model, lora, general and seed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from hlora.config import RunConfig, load_config
from hlora.files import write_text
from hlora.importance import Importance
from hlora.models import attach_lora
from hlora.pipeline import Job, baseline_phase, measure, tune_phase
from hlora.recorder import ImportanceRecorder
from hlora.trainer import train

ARMS = ("base", "after_nu", "lora_mu", "lora_nu_mu", "hlora_float32", "hlora_factored")
LABELS = ("Base", "after ν", "LoRA(μ)", "LoRA(ν+μ)", "HLoRA float32", "HLoRA factored")


def record(config: RunConfig) -> None:
    job = Job.open(config)
    model = attach_lora(job.base, config.lora, config.seed)
    recorders = {encoding: ImportanceRecorder(model, encoding) for encoding in ("float32", "factored")}
    arguments = config.training.of_record()
    callbacks = [recorder.callback() for recorder in recorders.values()]
    started = time.perf_counter()
    dataset = job.general.dataset()
    train(model, job.tokenizer, dataset, job.output / "logs" / "record", arguments, config.seed, callbacks)
    seconds = time.perf_counter() - started
    for encoding, recorder in recorders.items():
        importance = recorder.consolidate(config.importance.xi, job.general.facts)
        importance.provenance["seconds_of_general_phase"] = seconds
        importance.save(job.output / f"importance-{encoding}")


def arm(job: Job, name: str) -> dict[str, Any]:
    started = time.perf_counter()
    size = 0
    model: Any = job.base
    if name == "lora_mu":
        model, _ = baseline_phase(job, None)
    elif name == "after_nu":
        model = attach_lora(job.base, job.config.lora, job.config.seed)
        Importance.load(job.output / "importance-float32").load_adapter_into(model)
    elif name == "lora_nu_mu":
        model, _ = baseline_phase(job, Importance.load(job.output / "importance-float32"))
    elif name.startswith("hlora_"):
        importance = Importance.load(job.output / f"importance-{name.removeprefix('hlora_')}")
        size = importance.nbytes()
        model, _ = tune_phase(job, importance)
    result = {"seconds": time.perf_counter() - started, "importance_bytes": size, **measure(job, model)}
    if model is not job.base:
        model.unload()
    return result


def table(outputs: list[Path]) -> str:
    lines = []
    for output in outputs:
        found = {name: json.loads(file.read_text()) for name in ARMS if (file := output / f"{name}.json").is_file()}
        texts = list(next(iter(found.values()))["texts"])
        heads = ["arm", *(f"{t} perplexity" for t in texts), "answer NLL", "acc %", "acc_norm %", "seconds", "Ω bytes"]
        lines += [f"**{output.name}**", "", "| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
        for name, result in found.items():
            domain = result["domain"]
            cells = [LABELS[ARMS.index(name)], *(f"{result['texts'][t]['perplexity']:.2f}" for t in texts)]
            cells += [f"{domain['answer_nll']:.3f} ± {domain['answer_nll_stderr']:.3f}"]
            cells += [f"{100 * domain[m]:.1f} ± {100 * domain[m + '_stderr']:.1f}" for m in ("acc", "acc_norm")]
            cells += [f"{result['seconds']:.0f}", f"{result['importance_bytes']:,}"]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["record", "arms", "table"])
    parser.add_argument("paths", nargs="+")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    options = parser.parse_args()
    if options.verb == "table":
        print(table([Path(path) for path in options.paths]))
        return
    config = load_config(options.paths[0], options.overrides)
    if options.verb == "record":
        record(config)
        return
    job = Job.open(config)
    for name in options.paths[1:] or ARMS:
        file = job.output / f"{name}.json"
        if not file.is_file():
            write_text(file, json.dumps(arm(job, name), indent=1))
            print(f"{name}: {file}", file=sys.stderr)


if __name__ == "__main__":
    main()
