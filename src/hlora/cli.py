"""The commands: parse, call, print. No logic."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
import threading
import time
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from hlora import __version__
from hlora.after.commands import chat, merge, push
from hlora.system.errors import ConfigError, HloraError, culprit, first_line
from hlora.system.files import of_the_disk
from hlora.system.redaction import RedactingFormatter, redact_argument, redact_text

app = typer.Typer(
    help="Fine-tune LLMs without catastrophic forgetting. Start with `hlora demo`, or `hlora config > my.yaml`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
console = Console()


class Engine(StrEnum):
    process = "process"
    ray = "ray"


ConfigPath = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="YAML file; `hlora config` prints one to start from.")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Override a field: --set penalty.phi=9")
]

UseImportance = Annotated[
    str | None,
    typer.Option(
        "--importance", metavar="IMPORTANCE", help="Use this importance, a directory or hub repository; record nothing."
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace what the output holds of a finished run, whatever its settings.")
]


@app.command()
def run(
    config: ConfigPath, importance: UseImportance = None, overwrite: Overwrite = False, overrides: Overrides = None
) -> None:
    """Record importance on general text, tune on the domain under it, evaluate, report."""
    from hlora import pipeline

    _show(pipeline.run(_load(config, overrides, importance), _command(), overwrite))


@app.command()
def record(config: ConfigPath, overwrite: Overwrite = False, overrides: Overrides = None) -> None:
    """The general phase alone: writes <output>/importance."""
    from hlora import pipeline

    console.print(f"importance: {pipeline.record(_load(config, overrides), overwrite)}", soft_wrap=True)


@app.command()
def tune(
    config: ConfigPath, importance: UseImportance = None, overwrite: Overwrite = False, overrides: Overrides = None
) -> None:
    """The domain phase alone, under <output>/importance: writes <output>/adapter."""
    from hlora import pipeline

    console.print(f"adapter: {pipeline.tune(_load(config, overrides, importance), overwrite)}", soft_wrap=True)


@app.command()
def evaluate(config: ConfigPath, overrides: Overrides = None) -> None:
    """Measure the base model and <output>/adapter; write results.json and report.html."""
    from hlora import pipeline

    _show(pipeline.evaluate_output(_load(config, overrides), _command()))


@app.command()
def report(output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Output directory of a run.")]) -> None:
    """Make report.html again from <output>/results.json, or a comparison's from comparison.json."""
    from hlora.comparison import compare
    from hlora.report.run.page import write_report
    from hlora.run.results import read_results

    compared = output / "comparison.json"
    if compared.is_file():
        with culprit(compared, "Make it again with `hlora compare`; finished cells are kept."):
            compare.write_report(json.loads(compared.read_text(encoding="utf-8")), output)
    else:
        results = read_results(output)
        with culprit(output / "results.json", "Make it again with `hlora evaluate`."):
            write_report(results, output / "report.html")
    console.print(f"report: {output / 'report.html'}", soft_wrap=True)


@app.command()
def inspect(
    importance: Annotated[str, typer.Argument(metavar="IMPORTANCE", help="A directory or a hub repository.")],
    figure: Annotated[
        Path | None, typer.Option(help="Write their heat map here, as .png and .svg. Without it nothing is written.")
    ] = None,
) -> None:
    """What an importance holds: provenance and the norm of each layer; with --figure their heat map (Fig. 7)."""
    from hlora.importance.artefact import Importance

    described = Importance.load(importance).describe()
    norms = described.pop("layer_norms")
    facts = Table("importance", importance, title="What was recorded")
    for name, value in described.items():
        facts.add_row(name, str(value))
    console.print(facts)
    table = Table("matrix", "norm", title="Importance norm of each matrix")
    for name, norm in norms.items():
        table.add_row(name, f"{norm:.4g}")
    console.print(table)
    if figure is not None:
        from hlora.report.heatmap import importance_heatmap
        from hlora.report.style import save

        png, svg = save(importance_heatmap(norms), figure.with_suffix(""))
        console.print(f"heat map: {png}, {svg}", soft_wrap=True)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Directory for everything the demo writes.")] = Path("runs/demo"),
    overwrite: Overwrite = False,
    overrides: Overrides = None,
) -> None:
    """The whole job on an embedded model and data: forgetting and its cure in one picture. About 5 minutes on a CPU."""
    from hlora import pipeline
    from hlora.config.reading import parse_config
    from hlora.data import demo

    settings: Any = parse_config(demo.demo_config(output), "demo", overrides)
    _show(pipeline.run(settings, _command(), overwrite))


@app.command()
def compare(
    config: ConfigPath,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the cells with an estimate of time; compute and write nothing.")
    ] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Compute cells again that failed.")] = False,
    engine: Annotated[
        Engine, typer.Option(help="Where cells are computed: in this process, or as Ray tasks (docs/guides/ray.md).")
    ] = Engine.process,
    gpus_per_cell: Annotated[
        float | None,
        typer.Option(min=0, help="ray: GPUs that a cell has, 0.5 for two on one. 1, or 0 where there are none."),
    ] = None,
    cpus_per_cell: Annotated[float | None, typer.Option(min=0, help="ray: CPU cores that a cell has. 1.")] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(help="ray: an existing cluster, HOST:PORT or auto; without it this machine alone, for the run."),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Methods x tasks x seeds x strengths: the paper's tables and figures on your model and data.

    CONFIG is a comparison's, such as configs/compare-smollm2.yaml. Finished cells are kept: after an interruption, give
    the same command again. Several processes, one for each GPU, may share one output directory.
    """
    from hlora.comparison import planning, ray_engine
    from hlora.comparison.compare import compare, summary
    from hlora.config.reading import load_comparison

    settings = load_comparison(config, overrides)
    if engine is not Engine.ray and (gpus_per_cell, cpus_per_cell, ray_address) != (None, None, None):
        raise ConfigError(
            "--gpus-per-cell, --cpus-per-cell and --ray-address are for --engine ray. Add it, or drop them."
        )
    if dry_run:
        console.print(planning.plan_table(planning.plan(settings)))
        return
    if engine is Engine.ray:
        with ray_engine.engine(ray_address, gpus_per_cell, 1 if cpus_per_cell is None else cpus_per_cell) as compute:
            found = compare(settings, _command(), retry, compute)
    else:
        found = compare(settings, _command(), retry)
    for line in summary(found):
        console.print(line, markup=False, highlight=False)
    console.print(f"report: {Path(settings.output) / 'report.html'}", soft_wrap=True)


@app.command()
def cost(
    config: ConfigPath,
    scale: Annotated[
        float, typer.Option(help="Share of the paper's sequences to measure, for both methods. 0.005: 1/200.")
    ] = 1 / 200,
    sequences: Annotated[
        int | None,
        typer.Option(min=1, help="Instead of --scale: sequences of EWC's Fisher information (paper: 20,000)."),
    ] = None,
    nu_samples: Annotated[
        int,
        typer.Option(
            min=1,
            help="Sequences of the general text in an epoch of HLoRA, before scaling. The paper does not state it. "
            "5 epochs of 4,000 are as many passes as EWC's 20,000, which favours neither; time is proportional to it.",
        ),
    ] = 4_000,
    output: Annotated[Path | None, typer.Option(help="Directory for what is written; CONFIG's output/cost.")] = None,
    overrides: Overrides = None,
) -> None:
    """Time and bytes of importance, HLoRA against EWC-LoRA (Fig. 5): writes cost.json, cost.png and cost.svg."""
    from hlora.comparison.cost import cost_tables, measure_cost
    from hlora.report.comparison.figures import cost_bars
    from hlora.report.style import save

    settings = _load(config, overrides)
    settings.output = str(output or Path(settings.output) / "cost")
    measured = measure_cost(settings, scale, sequences, nu_samples, _command())
    for table in cost_tables(measured):
        console.print(table)
    for note in measured["notes"]:
        console.print(note, markup=False, highlight=False)
    png, svg = save(cost_bars(measured), Path(settings.output) / "cost")
    console.print(f"figure: {png}, {svg}", soft_wrap=True)


@app.command("config")
def print_config(
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of a configuration instead.")] = False,
) -> None:
    """Print a commented configuration to start from."""
    from hlora.config.starting import json_schema, starting_yaml

    print(json_schema() if schema else starting_yaml(), end="")


for command in (merge, chat, push):
    app.command()(command)


@app.callback(invoke_without_command=True)
def options(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def main() -> None:
    """Entry point. An error of ours, or of the disk, is one message on stderr and status 2, without a traceback."""
    handler = logging.StreamHandler()
    handler.setFormatter(RedactingFormatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("hlora").setLevel(logging.INFO)
    if not _speaks():  # one log and one progress display for all processes of a launch
        console.quiet = True
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
    # Deprecations inside Transformers and TRL are for their authors; a user of this command cannot act on them.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft|datasets|accelerate)\.")
    # On a CPU without the `kernels` package it says so at each import, about 4-bit products, whatever the model.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    threading.excepthook = _in_a_thread
    try:
        app()
    except HloraError as error:
        _say(str(error), error)
        sys.exit(2)
    except Exception as error:
        from hlora.parallel.group import is_lost

        if of_the_disk(error):  # full, no permission, a mount that is gone
            place = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
            reason = redact_text(f"{place}{(isinstance(error, OSError) and error.strerror) or first_line(error)}")
            said = f"{reason}. What was finished before is whole; once mended, the same command goes on from there."
        elif isinstance(error, RuntimeError) and is_lost(error):
            said = (
                "another process of this launch has ended, so this one stops; its message, or the launcher's, says "
                "why. The same command goes on from the last checkpoint, with any number of processes."
            )
        else:
            raise
        _say(said, error)
        sys.exit(2)


def _in_a_thread(failed: threading.ExceptHookArgs) -> None:
    """TensorBoard writes in a thread of its own, and raises what the disk said in the main one again."""
    if failed.exc_value is None or not of_the_disk(failed.exc_value):
        threading.__excepthook__(failed)


def _speaks() -> bool:
    """Whether this process is the only one, or the first of a launch by torchrun or accelerate."""
    return int(os.environ.get("WORLD_SIZE", 1)) == 1 or int(os.environ.get("RANK", 0)) == 0


def _say(message: str, error: Exception) -> None:
    """On stderr; in a launch of several processes once."""
    if getattr(error, "told", False):
        return
    if not _speaks():
        time.sleep(3)  # if the first one says the same, the launcher stops this process meanwhile
    print(f"hlora: {message}", file=sys.stderr)


def _load(path: Path, overrides: list[str] | None, importance: str | None = None) -> Any:
    from hlora.config.reading import load_config

    used = [] if importance is None else [f"importance={json.dumps(importance)}"]
    return load_config(path, [*(overrides or []), *used])


def _command() -> str:
    return shlex.join(["hlora", *map(redact_argument, sys.argv[1:])])


def _show(results: dict[str, Any]) -> None:
    from hlora.report.run.summary import summary_table
    from hlora.report.run.verdict import verdict

    console.print(summary_table(results))
    found = verdict(results)
    for sentence in (found.headline, found.kept, found.learned, *found.beside):
        console.print(sentence, markup=False, highlight=False)
    console.print(f"report: {Path(results['config']['output']) / 'report.html'}", soft_wrap=True)
