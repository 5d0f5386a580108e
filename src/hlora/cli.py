"""The commands: parse, call, print. No logic."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hlora import __version__
from hlora.after.commands import chat, merge, push
from hlora.before.commands import check, show_check
from hlora.comparison.commands import compare, cost
from hlora.config.command_line import ConfigPath, Overrides, load_named, say_loading, typed_command
from hlora.config.paths import argument_at_home
from hlora.parallel.messages import errors_as_messages, is_main_process, resumable, set_up_logs
from hlora.system.errors import culprit

app = typer.Typer(
    help="Fine-tune LLMs without catastrophic forgetting. Start with `hlora demo`, or `hlora config > my.yaml`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console()


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
    config: ConfigPath,
    importance: UseImportance = None,
    after: Annotated[
        str | None,
        typer.Option("--after", metavar="OUTPUT", help="Go on from a finished run, and keep what it learned too."),
    ] = None,
    overwrite: Overwrite = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and estimate only, as `hlora check` does.")] = False,
    overrides: Overrides = None,
) -> None:
    """Record importance on general text, tune on the domain under its protection, evaluate, report."""
    settings = load_named(config, overrides, importance=importance, after=after)
    if dry_run:
        show_check(settings)
    else:
        with resumable():
            from hlora import pipeline

            _show(pipeline.run(settings, typed_command(), overwrite))


@app.command()
def record(config: ConfigPath, overwrite: Overwrite = False, overrides: Overrides = None) -> None:
    """The general phase alone: writes <output>/importance."""
    settings = load_named(config, overrides)
    with resumable():
        from hlora import pipeline

        _print(f"importance: {pipeline.record(settings, overwrite)}")


@app.command()
def tune(
    config: ConfigPath, importance: UseImportance = None, overwrite: Overwrite = False, overrides: Overrides = None
) -> None:
    """The domain phase alone, protected by <output>/importance: writes <output>/adapter."""
    settings = load_named(config, overrides, importance=importance)
    with resumable():
        from hlora import pipeline

        _print(f"adapter: {pipeline.tune(settings, overwrite)}")


@app.command()
def evaluate(config: ConfigPath, overrides: Overrides = None) -> None:
    """Measure the base model and <output>/adapter; write results.json and report.html."""
    settings = load_named(config, overrides)
    with resumable("Adapter and earlier results are kept; the same command, given again, measures from the start."):
        from hlora import pipeline

        _show(pipeline.evaluate_output(settings, typed_command()))


@app.command()
def report(
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Output directory of a run or a comparison.")],
) -> None:
    """Make report.html again from <output>/results.json, or a comparison's from comparison.json."""
    from hlora.comparison import compare
    from hlora.report.run.page import write_report
    from hlora.run.results import read_results

    compared = output / "comparison.json"
    if compared.is_file():
        with culprit(compared, "Make it again with `hlora compare`, which keeps finished cells."):
            compare.write_report(json.loads(compared.read_text(encoding="utf-8")), output)
    else:
        results = read_results(output)
        with culprit(output / "results.json", "Make it again with `hlora evaluate`."):
            write_report(results, output / "report.html")
    _print(f"report: {output / 'report.html'}")


@app.command()
def inspect(
    importance: Annotated[str, typer.Argument(metavar="IMPORTANCE", help="A directory or a hub repository.")],
    figure: Annotated[
        Path | None, typer.Option(help="Also draw a heat map of the norms (Fig. 7), as FIGURE.png and FIGURE.svg.")
    ] = None,
) -> None:
    """Show what was recorded: provenance, and the norm of each matrix."""
    from hlora.importance.artefact import Importance

    described = Importance.load(importance).describe()
    norms = described.pop("layer_norms")
    facts = Table("importance", escape(importance), title="What was recorded")
    for name, value in described.items():
        facts.add_row(name, escape(str(value)))
    console.print(facts)
    table = Table("matrix", "norm", title="Importance norm of each matrix")
    for name, norm in norms.items():
        table.add_row(name, f"{norm:.4g}")
    console.print(table)
    if figure is not None:
        from hlora.report.heatmap import importance_heatmap
        from hlora.report.style import save

        png, svg = save(importance_heatmap(norms), figure.with_suffix(""))
        _print(f"heat map: {png}, {svg}")


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Directory for everything the demo writes.")] = Path("runs/demo"),
    overwrite: Overwrite = False,
    overrides: Overrides = None,
) -> None:
    """The whole job on a small model and data that need no download from the hub. 8 to 13 minutes on two CPU cores."""
    say_loading("demo")
    with resumable():
        from hlora import pipeline
        from hlora.config.reading import parse_config
        from hlora.data import demo

        settings: Any = parse_config(demo.demo_config(output), "demo", overrides)
        _show(pipeline.run(settings, typed_command(), overwrite))


@app.command("config")
def print_config(
    comparison: Annotated[bool, typer.Option("--compare", help="For `hlora compare` instead of `hlora run`.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of a configuration instead.")] = False,
) -> None:
    """Print a commented configuration to start from, with every field."""
    from hlora.config.starting import json_schema, starting_comparison, starting_yaml

    if schema:
        print(json_schema(comparison), end="")
    else:
        print(starting_comparison() if comparison else starting_yaml(), end="")


for command in (compare, cost, check, merge, chat, push):
    app.command()(command)


@app.callback(invoke_without_command=True)
def options(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def main() -> None:
    """Entry point. An error of ours, or of the disk, is one message on stderr and status 2, without a traceback."""
    set_up_logs()
    if isinstance(sys.stdout, io.TextIOWrapper):  # as stderr is: the minus sign is not in ASCII or Latin-1
        sys.stdout.reconfigure(errors="backslashreplace")
    console.quiet = not is_main_process()
    with errors_as_messages():
        app([argument_at_home(argument) for argument in sys.argv[1:]])


def _print(line: str) -> None:
    """Print a line with a path or a sentence: brackets are not markup, and nothing is wrapped."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _show(results: dict[str, Any]) -> None:
    from hlora.report.run.chain import chain_tables
    from hlora.report.run.summary import summary_table
    from hlora.report.run.verdict import verdict

    output = Path(results["config"]["output"])
    with culprit(output / "results.json", "Make it again with `hlora evaluate`."):
        console.print(summary_table(results))
        found = verdict(results)
        for chained in chain_tables(results["chain"]) if "chain" in results else []:
            matrix = Table(*chained["heading"], title=chained["name"], caption=chained["said"])
            for row in chained["rows"]:
                matrix.add_row(*row)
            console.print(matrix)
    for sentence in (found.headline, found.kept, found.learned, *found.beside):
        console.print(sentence, markup=False, highlight=False)
    _print(f"report: {output / 'report.html'}")
