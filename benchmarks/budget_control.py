"""Is a forgetting budget met, on text that the probe has not seen? SmolLM2-135M, one task, budgets × seeds.

    OMP_NUM_THREADS=1 nice python benchmarks/budget_control.py --budgets 0.5% 1% 2% 5% --seeds 10 11 12
    python benchmarks/budget_control.py table OUTPUT/results.jsonl

The importance is squared gradients at the base on general training text, anchored at the base. The probe reads other
text than the evaluation: every other passage of 10,000 characters (passages), or other plays, from 300,000 characters
on (plays), or samples of the base model by another seed (samples). The domain's NLL is that of held-out training rows.
Nothing is read from the evaluation or test sets of the comparison. The budget "none" is LoRA without a penalty. A run
whose line is in results.jsonl under the same settings is not run again.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

from hlora.budget.budget import ForgettingBudget
from hlora.budget.probes import Rise, SampleProbe, TextProbe
from hlora.comparison.grid import Grid
from hlora.config.reading import load_comparison
from hlora.config.sections import GeneralSource
from hlora.config.units import parse_budget
from hlora.data.general import measured_text
from hlora.data.packing import pack
from hlora.data.samples import model_samples
from hlora.evaluation.answers import answer_nll
from hlora.importance.artefact import Importance
from hlora.importance.penalty import ImportancePenalty
from hlora.importance.squared_gradients import fisher_information
from hlora.model.lora import attach_lora
from hlora.training.train import train

PROBE_FROM = 300_000  # characters into the text; evaluation reads its start
Probe = TextProbe | SampleProbe
MOST_EVALUATED = 40_000  # tokens
_TOKENS_NATS = 174  # tokens times budget at which the standard error of a rise of the budget is about a tenth of it


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("table", nargs="*", help="'table' and result files: print their table, run nothing")
    parser.add_argument("--budgets", nargs="+", default=["0.5%", "1%", "2%", "5%"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[10])
    parser.add_argument("--task", default="qasc")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--phi", type=float, default=10.0, help="where φ starts")
    parser.add_argument("--text", default="data/shakespeare/train.txt")
    parser.add_argument("--probe", choices=["passages", "plays", "samples"], default="passages")
    parser.add_argument("--probe-tokens", type=int, default=2048)
    parser.add_argument("--most-tokens", type=int, default=35_000, help="of the probe text, for a landing")
    parser.add_argument("--no-landing", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("runs/budget-control"))
    options = parser.parse_args()
    if options.table:
        print(table([json.loads(line) for path in options.table[1:] for line in Path(path).read_text().splitlines()]))
        return
    warnings.simplefilter("ignore")
    options.output.mkdir(parents=True, exist_ok=True)
    results = options.output / "results.jsonl"
    kept = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    grid = Grid.open(load_comparison("configs/compare-smollm2.yaml", [f"output={options.output / 'grid'}"]))
    logging.getLogger("hlora").setLevel(logging.INFO)
    importance = recorded(grid, options.output / "importance")
    probes = make_probes(grid, options)
    rows = []
    for seed in options.seeds:
        for budget in options.budgets:
            settings = {
                name: getattr(options, name)
                for name in (
                    "task",
                    "probe",
                    "steps",
                    "phi",
                    "probe_tokens",
                    "most_tokens",
                    "no_landing",
                )
            }
            settings |= {"budget": budget, "seed": seed}
            done = [row for row in kept if row["settings"] == settings]
            if not done:
                done = [run(grid, importance, settings, probes, options.output)]
                with results.open("a") as file:
                    file.write(json.dumps(done[0]) + "\n")
            rows += done
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    print(table(rows))


def recorded(grid: Grid, directory: Path) -> Importance:
    """Squared gradients on 64 sequences of the comparison's general training text, made once."""
    if not directory.is_dir():
        config = grid.cell("HLoRA", next(iter(grid.config.tasks)), 0, None).config
        model = attach_lora(grid.base, config.lora, 0)
        text = grid.general(config).train
        sizes = {"examples": 64, "max_length": 128}
        found = fisher_information(model, grid.tokenizer, text, **sizes, seed=0, encoding="factored")
        found.save(directory)
        model.unload()
    return Importance.load(directory)


def make_probes(grid: Grid, options: argparse.Namespace) -> tuple[Probe, Probe]:
    """What is evaluated on and what is steered by. The base's losses are the same for all runs, and measured once."""
    if options.probe == "samples":  # both are the base model's own, by different seeds
        source, here = GeneralSource(source="model", samples=128), options.output
        found = [model_samples(source, grid.base, grid.tokenizer, seed, here) for seed in (101, 102)]
        rows = [pack(grid.tokenizer, samples, 128, 128, at_most=True) for samples in found]
        return SampleProbe(grid.base, rows[0]), SampleProbe(grid.base, rows[1], tokens=options.probe_tokens)
    passages = measured_text(options.text)
    if options.probe == "passages":
        there, here = ("\n\n".join(passages[first::2]) for first in (0, 1))
    else:
        text = "\n\n".join(passages)
        there, here = text[:PROBE_FROM], text[PROBE_FROM:]
    evaluation = TextProbe(
        grid.base, grid.tokenizer, {"evaluated": there}, tokens=MOST_EVALUATED, most_tokens=MOST_EVALUATED
    )
    probe = TextProbe(
        grid.base, grid.tokenizer, {"probed": here}, tokens=options.probe_tokens, most_tokens=options.most_tokens
    )
    return evaluation, probe


def run(
    grid: Grid, importance: Importance, settings: dict[str, Any], probes: tuple[Probe, Probe], output: Path
) -> dict[str, Any]:
    """One domain phase under one budget, and what it cost and brought."""
    seed = settings["seed"]
    config = grid.cell("HLoRA", settings["task"], seed, None).config
    domain, held_out = grid.domain(config)
    model = attach_lora(grid.base, config.lora, seed)
    evaluation, probe = probes
    evaluation.model = probe.model = model
    before = statistics.fmean(answer_nll(model, grid.tokenizer, held_out, 8))
    arguments = {**config.training.common, **config.training.tune, "report_to": [], "max_steps": settings["steps"]}
    callbacks, steered = [], None
    if settings["budget"] != "none":
        penalty = ImportancePenalty(model, importance, settings["phi"], layer_weights="uniform", anchor="base")
        steered = ForgettingBudget(penalty, probe, parse_budget(settings["budget"]), landing=not settings["no_landing"])
        callbacks = [penalty.callback(), steered.callback()]
    started = time.perf_counter()
    history = train(
        model,
        grid.tokenizer,
        domain.dataset(grid.tokenizer),
        output=output / "logs",
        arguments=arguments,
        seed=seed,
        callbacks=callbacks,
    )
    seconds = time.perf_counter() - started
    at_probe = Rise(steered.history[-1]["rise"], steered.history[-1]["stderr"], "", 0) if steered else None
    at_probe = at_probe or probe.measure(settings["most_tokens"])
    allowed = parse_budget(settings["budget"]) if steered else 0.05
    rise = evaluation.measure(min(MOST_EVALUATED, math.ceil(_TOKENS_NATS / allowed)))
    nll = statistics.fmean(answer_nll(model, grid.tokenizer, held_out, 8))
    model.unload()
    return {
        "settings": settings,
        "rise_on_probe": at_probe.nats,
        "stderr_on_probe": at_probe.stderr,
        "rise": rise.nats,
        "stderr": rise.stderr,
        "tokens": rise.tokens,
        "domain_nll_before": before,
        "domain_nll": nll,
        "seconds": seconds,
        "seconds_of_probes": steered.seconds if steered else 0.0,
        "probes": steered.history if steered else [],
        "phi": [entry["phi"] for entry in history if "phi" in entry],
        "regularisation_loss": [entry.get("regularisation_loss") for entry in history],
    }


def table(rows: list[dict[str, Any]]) -> str:
    heads = [
        "budget",
        "seed",
        "rise on the probe",
        "rise on other text",
        "in budgets",
        "within a quarter",
        "domain NLL",
        "φ at the end",
        "α",
        "seconds (of them probes)",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        asked = row["settings"]["budget"]
        share = row["rise"] / parse_budget(asked) if asked != "none" else math.nan
        cells = [
            asked,
            str(row["settings"]["seed"]),
            f"{row['rise_on_probe']:+.4f} ± {row['stderr_on_probe']:.4f}",
            f"{row['rise']:+.4f} ± {row['stderr']:.4f}",
            f"{share:.2f}",
            "yes" if abs(share - 1) <= 0.25 else "no",
            f"{row['domain_nll_before']:.2f} → {row['domain_nll']:.3f}",
            f"{row['phi'][-1]:.3g}" if row["phi"] else "",
            f"{row['probes'][-1]['alpha']:.3f}" if row["probes"] else "",
            f"{row['seconds']:.0f} ({row['seconds_of_probes']:.0f})",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
