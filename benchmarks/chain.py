"""What is left of each domain when a model learns one after another, by method, order and seed? SmolLM2-135M.

    OMP_NUM_THREADS=1 nice -n 19 python benchmarks/chain.py
    python benchmarks/chain.py table docs/results/chain/cells

Every method trains the same rows of configs/chain-smollm2.yaml in the same number of steps. A cell is one method, order
and seed, and one JSON file; a cell that is there is not computed again. It holds, for the base model and after each
step, the answer NLL of every question of every domain, and the forgetting of general text.

The methods are here and not in `hlora compare`, whose cells each train one domain.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from datasets import concatenate_datasets
from peft import PeftModel
from torch import Tensor

from hlora.comparison.paper import uniform_importance
from hlora.comparison.rivals.added_term import Batch, trainer_adding
from hlora.config.reading import load_config
from hlora.config.run import RunConfig
from hlora.evaluation.evaluate import add_forgetting, evaluate
from hlora.importance.artefact import Importance
from hlora.importance.penalty import ImportancePenalty
from hlora.importance.recorder import ImportanceRecorder
from hlora.model.base import load_base
from hlora.model.lora import attach_lora
from hlora.report.format import Change
from hlora.report.run.chain import transfer
from hlora.run.chain import steps_of
from hlora.run.job import Job
from hlora.run.phases import lora, record_phase, train_on_domain, tune_phase
from hlora.run.results import provenance
from hlora.system.files import write_json

REPLAYED = 0.2  # share of the rows that are of earlier domains
ORTHOGONAL = 0.5  # weight of O-LoRA's term: its authors'
Models = Iterator[PeftModel]
"""The model after each domain; valid until the next one is asked for."""


def sequential(jobs: list[Job]) -> Models:
    """One LoRA adapter, trained on one domain after another."""
    model = attach_lora(jobs[0].base, jobs[0].config.lora, jobs[0].config.seed)
    for job in jobs:
        train_on_domain(job, model, "sequential")
        yield model
    model.unload()


def replay(jobs: list[Job]) -> Models:
    """The same, with rows of the earlier domains mixed in. The number of steps stays the same."""
    model = attach_lora(jobs[0].base, jobs[0].config.lora, jobs[0].config.seed)
    for number, job in enumerate(jobs):
        rows = [job.domain.dataset(job.tokenizer)]
        for earlier in jobs[:number]:
            count = round(len(rows[0]) * REPLAYED / (1 - REPLAYED) / number)
            kept = earlier.domain.dataset(job.tokenizer)
            drawn = random.Random(job.config.seed).sample(range(len(kept)), min(count, len(kept)))
            rows.append(kept.select(drawn))
        train_on_domain(job, model, "replay", dataset=concatenate_datasets(rows))
        yield model
    model.unload()


def online_ewc(jobs: list[Job]) -> Models:
    """The same, held to the last adapter by the squared gradients of all earlier domains (Schwarz et al. 2018, γ = 1).

    They are recorded along each domain's training, as hlora's `squared_gradients` are, not at its end.
    """
    model = attach_lora(jobs[0].base, jobs[0].config.lora, jobs[0].config.seed)
    squares: Importance | None = None
    for job in jobs:
        penalty = None
        if squares is not None:
            penalty = ImportancePenalty(model, squares, job.config.penalty.phi, layer_weights="sum")
        recorder = ImportanceRecorder(model, seed=job.config.seed)
        train_on_domain(job, model, "online_ewc", penalty, recorder=recorder)
        recorded = recorder.consolidate(data=job.domain.facts)
        squares = recorded if squares is None else squares + recorded
        yield model
    model.unload()


def olora(jobs: list[Job]) -> Models:
    """O-LoRA (Wang et al. 2023): new factors for each domain, the earlier ones stay, frozen and active.

    The rows of the new A are held orthogonal to those of every earlier A, by the sum of their squared products.
    """
    model = attach_lora(jobs[0].base, jobs[0].config.lora, jobs[0].config.seed)
    names = ["default"]
    for job in jobs:
        if job is not jobs[0]:
            names.append(name_of(job))
            model.add_adapter(names[-1], model.peft_config["default"])
            model.base_model.set_adapter(names)
            for name, values in model.named_parameters():
                values.requires_grad = f".{names[-1]}." in name
        parameters = list(model.named_parameters())
        factors = [[values for name, values in parameters if f".lora_A.{adapter}." in name] for adapter in names]

        def overlap(batch: Batch, factors: list[list[Tensor]] = factors) -> Tensor:
            *before, new = factors
            squares = [(a @ b.T).square().sum() for earlier in before for a, b in zip(earlier, new, strict=True)]
            return torch.stack(squares).sum() if squares else new[0].new_zeros(())

        train_on_domain(job, model, "olora", trainer_class=trainer_adding(ORTHOGONAL, overlap))
        yield model
    model.unload()


def one_each(jobs: list[Job]) -> Models:
    """A fresh adapter for each domain, which forgets no other: the bound that a single adapter is compared with."""
    for job in jobs:
        model, _ = lora(job)
        yield model
        model.unload()


def hlora(jobs: list[Job]) -> Models:
    """The general phase, then each domain under the importance of everything before: `domains` of a configuration."""
    return _held(jobs, lambda importance: importance)


def uniform(jobs: list[Job]) -> Models:
    """The same with equal importance everywhere."""
    return _held(jobs, uniform_importance)


def _held(jobs: list[Job], used: Callable[[Importance], Importance]) -> Models:
    importance = general_importance(jobs[0])
    for job in jobs:
        model, _, total = tune_phase(job, used(importance))
        yield model
        model.unload()
        assert total is not None
        importance = total


METHODS: dict[str, Callable[[list[Job]], Models]] = {
    "hlora": hlora,
    "sequential": sequential,
    "online_ewc": online_ewc,
    "replay": replay,
    "olora": olora,
    "one_each": one_each,
    "uniform": uniform,
}
LABELS = {
    "hlora": "**HLoRA**",
    "uniform": "HLoRA, uniform importance",
    "sequential": "sequential LoRA",
    "replay": f"sequential LoRA, {100 * REPLAYED:.0f} % replay of earlier domains",
    "online_ewc": "online EWC",
    "olora": "O-LoRA",
    "one_each": "one adapter a domain (bound)",
}


def general_importance(job: Job) -> Importance:
    """The importance of a general phase, recorded once a seed."""
    directory = job.output / f"importance-{job.config.seed}"
    if not directory.is_dir():
        model, importance, _ = record_phase(job)
        importance.save(directory)
        model.unload()
    return Importance.load(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("table", nargs="*", help="'table' and a directory of cells: print their table, compute nothing")
    parser.add_argument("--config", default="configs/chain-smollm2.yaml")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--output", type=Path, default=Path("runs/chain"))
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", dest="overrides")
    options = parser.parse_args()
    if options.table:
        print(table([json.loads(path.read_text()) for path in sorted(Path(options.table[1]).glob("*.json"))]))
        return
    warnings.simplefilter("ignore")
    logging.getLogger("hlora").setLevel(logging.WARNING)
    config = load_config(options.config, [*options.overrides, f"output={options.output}"])
    base, tokenizer = load_base(config.model)
    measured_base: dict[str, Any] = {}
    for seed, reverse, method in product(options.seeds, (False, True), options.methods):
        jobs = jobs_of(config, base, tokenizer, seed)
        jobs = jobs[::-1] if reverse else jobs
        path = options.output / "cells" / f"{method}-{'-'.join(map(name_of, jobs))}-{seed}.json"
        if path.is_file() or (method == "one_each" and reverse):  # its adapters know no order
            continue
        measured_base = measured_base or measure(jobs, base, {})
        started = time.perf_counter()
        chain = measured(METHODS[method](jobs), jobs, measured_base)
        cell = {"method": method, "seed": seed, "seconds": time.perf_counter() - started, "chain": chain}
        facts = {name_of(job): job.domain.facts for job in jobs} | {"general": jobs[0].general.facts}
        cell |= {"config": config.model_dump(exclude={"domain"}), "provenance": provenance(base, facts)}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, cell)
        print(f"{path.stem}: {cell['seconds']:.0f} s", flush=True)


def jobs_of(config: RunConfig, base: Any, tokenizer: Any, seed: int) -> list[Job]:
    """A job for each domain, in the order of the configuration. All share the model and the general text."""
    jobs = []
    for step in steps_of(config):
        step.seed = seed
        job = Job(step, base, tokenizer, Path(config.output))
        job.general = jobs[0].general if jobs else job.general
        jobs.append(job)
    return jobs


def name_of(job: Job) -> str:
    return Path(job.config.output).name


def measured(models: Models, jobs: list[Job], base: dict[str, Any]) -> dict[str, Any]:
    """The chain as results.json of a run has it: measures of every domain and of general text after each step."""
    names = [name_of(job) for job in jobs]
    chain: dict[str, Any] = {"domains": names, "base": base["domains"], "before": {names[0]: base["domains"][names[0]]}}
    chain |= {"after": {}, "forgetting": {}, "texts": {}}
    for number, (name, model) in enumerate(zip(names, models, strict=True)):
        found = measure(jobs, model, base)
        chain["after"][name] = found["domains"]
        chain["forgetting"][name], chain["texts"][name] = found["forgetting"], found["texts"]
        if number + 1 < len(names):
            chain["before"][names[number + 1]] = found["domains"][names[number + 1]]
    return chain


def measure(jobs: list[Job], model: Any, base: dict[str, Any]) -> dict[str, Any]:
    """Measures of every domain, by name, and of the general texts, with their forgetting where there is a base."""
    found: dict[str, Any] = {"domains": {}}
    for number, job in enumerate(jobs):
        texts = job.general.evaluation if number == 0 else {}
        of_domain = evaluate(model, job.tokenizer, texts, job.domain, job.config.evaluation)
        found["domains"][name_of(job)] = of_domain["domain"]
        found |= {"texts": of_domain["texts"]} if number == 0 else {}
    if base:
        add_forgetting(found, base)
    return found


def table(cells: list[dict[str, Any]]) -> str:
    """A row for each method and order: means over seeds ± two standard errors, of the questions' and seeds' noise."""
    heads = ["order", "method", "seeds", "average answer NLL", "backward transfer", "forward transfer"]
    lines = ["| " + " | ".join([*heads, "general forgetting"]) + " |", "|---|---|---:|---:|---:|---:|---:|"]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((" → ".join(cell["chain"]["domains"]), cell["method"]), []).append(cell)
    for order, method in sorted(groups, key=lambda group: (group[0], list(METHODS).index(group[1]))):
        found = [cell["chain"] for cell in groups[order, method]]
        if method == "one_each":
            own = [_own(chain) for chain in found]
            columns = [_shown(own, 2), "0", "–", "–"]
        else:
            means = [transfer(chain, "answer_nll") for chain in found]
            shown = [_shown([getattr(each, part) for each in means], 2) for part in ("average", "backward", "forward")]
            rises = [Change(chain["forgetting"][chain["domains"][-1]]["mean"], math.nan) for chain in found]
            columns = [*shown, _shown(rises, 3)]
        lines.append("| " + " | ".join([order, LABELS[method], str(len(found)), *columns]) + " |")
    return "\n".join(lines)


def _own(chain: dict[str, Any]) -> Change:
    """The average over domains, each after its own step."""
    own = [chain["after"][name][name] for name in chain["domains"]]
    stderr = math.hypot(*(each["answer_nll_stderr"] for each in own)) / len(own)
    return Change(statistics.fmean(each["answer_nll"] for each in own), stderr)


def _shown(seeds: list[Change], digits: int) -> str:
    """Mean ± two standard errors. All seeds share the questions, so their noise does not fall with more seeds."""
    value = statistics.fmean(each.value for each in seeds)
    questions = math.sqrt(statistics.fmean(each.stderr**2 for each in seeds))
    between = statistics.stdev(each.value for each in seeds) / math.sqrt(len(seeds)) if len(seeds) > 1 else 0.0
    stderr = math.hypot(0.0 if math.isnan(questions) else questions, between)
    return f"{value:.{digits}f} ± {2 * stderr:.{digits}f}".replace("-", "−")


if __name__ == "__main__":
    main()
