"""The commands of a comparison: compare, cost."""

from __future__ import annotations

from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from hlora.config.command_line import ConfigPath, Overrides, load_named, say_loading, typed_command
from hlora.parallel.messages import resumable
from hlora.system.errors import ConfigError

ComparisonPath = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="YAML file. `hlora config --compare` prints one to start from.")
]


class Engine(StrEnum):
    process = "process"
    ray = "ray"


def compare(
    config: ComparisonPath,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the cells and estimate their time; compute and write nothing.")
    ] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Compute failed cells again.")] = False,
    engine: Annotated[
        Engine, typer.Option(help="Compute cells in this process, or as Ray tasks (docs/guides/ray.md).")
    ] = Engine.process,
    gpus_per_cell: Annotated[
        float | None,
        typer.Option(
            min=0, help="ray: GPUs for each cell; 0.5 lets two cells share one. Default: 1, or 0 without GPU."
        ),
    ] = None,
    cpus_per_cell: Annotated[
        float | None, typer.Option(min=0, help="ray: CPU cores for each cell. Default: 1.")
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(help="ray: address of a running cluster, HOST:PORT or auto. Default: a cluster on this machine."),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Methods x tasks x seeds x strengths: the paper's tables and figures on your model and data.

    Finished cells are kept: run the same command again to resume. Several
    processes, for example one for each GPU, can share one output directory.

    With a run's file that has domains: methods x orders x seeds, each
    learning one domain after another.
    """
    from hlora.config.data_files import check_files
    from hlora.config.reading import load_comparison, read_yaml

    if engine is not Engine.ray and (gpus_per_cell, cpus_per_cell, ray_address) != (None, None, None):
        raise ConfigError("--gpus-per-cell, --cpus-per-cell and --ray-address need --engine ray. Add it, or drop them.")
    fields = read_yaml(config)
    if "domains" in fields and not {"tasks", "arms"} & {*fields}:
        if dry_run or retry or engine is Engine.ray:
            raise ConfigError("domains: chains are compared without --dry-run, --retry and --engine ray. Drop them.")
        _compare_chains(config, overrides)
        return
    settings = load_comparison(config, overrides)
    check_files(settings)
    say_loading(config)
    from hlora.comparison import planning, ray_engine
    from hlora.comparison.compare import compare, summary

    if dry_run:
        Console().print(planning.plan_table(planning.plan(settings)))
        return
    with ExitStack() as around:
        around.enter_context(resumable())
        compute = None
        if engine is Engine.ray:
            cpus = 1 if cpus_per_cell is None else cpus_per_cell
            compute = around.enter_context(ray_engine.engine(ray_address, gpus_per_cell, cpus))
        found = compare(settings, typed_command(), retry=retry, compute=compute)
    for line in summary(found):
        typer.echo(line)
    typer.echo(f"report: {Path(settings.output) / 'report.html'}")


def _compare_chains(config: Path, overrides: list[str] | None) -> None:
    from hlora.config.data_files import check_files
    from hlora.config.reading import load_chains

    settings = load_chains(config, overrides)
    check_files(settings)
    say_loading(config)
    with resumable("Finished chains are kept. The same command, given again, computes the others."):
        from hlora.comparison.chains.compare import compare_chains

        table = compare_chains(settings)
    typer.echo(table)
    typer.echo(f"table: {Path(settings.output) / 'chains.md'}")


def cost(
    config: ConfigPath,
    scale: Annotated[float, typer.Option(help="Share of the paper's sequences to measure, for both methods.")] = 0.005,
    sequences: Annotated[
        int | None,
        typer.Option(min=1, help="Instead of --scale: sequences for EWC's Fisher information (paper: 20,000)."),
    ] = None,
    nu_samples: Annotated[
        int,
        typer.Option(
            min=1,
            help="Sequences of general text in one epoch of HLoRA, before scaling. The paper does not give a number; "
            "5 epochs of 4,000 make as many passes as EWC's 20,000. Time is proportional to it.",
        ),
    ] = 4_000,
    output: Annotated[Path | None, typer.Option(help="Output directory. Default: <output>/cost.")] = None,
    overrides: Overrides = None,
) -> None:
    """Time and bytes of importance, HLoRA against EWC-LoRA (Fig. 5): writes cost.json, cost.png and cost.svg."""
    settings = load_named(config, overrides)
    from hlora.comparison.cost import cost_tables, measure_cost
    from hlora.report.comparison.figures import cost_bars
    from hlora.report.style import save

    settings.output = str(output or Path(settings.output) / "cost")
    measured = measure_cost(settings, scale, sequences, nu_samples=nu_samples, command=typed_command())
    for table in cost_tables(measured):
        Console().print(table)
    for note in measured["notes"]:
        typer.echo(note)
    png, svg = save(cost_bars(measured), Path(settings.output) / "cost")
    typer.echo(f"figure: {png}, {svg}")
