"""`hlora check`, which `hlora run --dry-run` is too: what the check found, for the terminal."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hlora.config.command_line import ConfigPath, Overrides, load_named

if TYPE_CHECKING:
    from hlora.before.check import Check
    from hlora.before.rows import TrainedRow
    from hlora.config.run import RunConfig

_LONG = 600  # characters of a part of a row; the middle of a longer one is left out


def check(config: ConfigPath, overrides: Overrides = None) -> None:
    """Show the data of a run as they are trained, and estimate its time, memory and disk. Writes nothing."""
    show_check(load_named(config, overrides))


def show_check(config: RunConfig) -> None:
    """Check a run and print what was found. Of a chain: its first run, and the rows of every later domain."""
    from hlora.before.check import checked
    from hlora.run.chain import rows_of, steps_of

    console = Console()
    first, *following = steps_of(config)
    with checked(first) as found:
        later = [_later(step, rows_of(found.job, step).facts) for step in following]
        for line in (*_facts(found), *later, ""):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        marks = not console.is_terminal or console.no_color
        how = "between ⟦ ⟧" if marks else "bold and green"
        console.print(f"The first rows as they are tokenised; what is trained is {how}.", highlight=False)
        for number, row in enumerate(found.shown, 1):
            console.print(_shown(found, row, number, marks), highlight=False, soft_wrap=True)
        console.print()
        console.print(_costs(found))
        for line in _ends(found):
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def _later(config: RunConfig, facts: dict[str, Any]) -> str:
    kinds = {"training": "train", "validation": "validation", "test": "test"}
    rows = [_count(facts[f"{part}_rows"], f"{kind} row") for kind, part in kinds.items() if f"{part}_rows" in facts]
    return f"then {Path(config.output).name}: {', '.join(rows)}; its time is not in the estimate"


def _facts(found: Check) -> list[str]:
    from hlora.report.format import three_digits

    job, about = found.job, "" if found.counted else "about "
    domain, general = job.domain.facts, job.general.facts
    chats = sum(not isinstance(example.prompt, str) for example in job.domain.train)
    named = f"the chat template of {job.config.model.name}"
    template = "plain text, no chat template" if not chats else named
    if 0 < chats < len(job.domain.train):
        template = f"{named} for {chats} rows, plain text for the others"
    base, validated = job.base, ""
    if "validation_rows" in domain:
        rows = _count(domain["validation_rows"], "validation row")
        validated = f"{rows}, {about}{found.validation_tokens:,} tokens; "
    lines = [
        f"model: {job.config.model.name}, {three_digits(base.num_parameters() / 1e6)} million parameters, "
        f"{str(base.dtype).removeprefix('torch.')}, {base.device.type}",
        f"template: {template}",
        f"general text: {_count(general['documents'], 'document')}, {about}{found.general_tokens:,} tokens in "
        f"{_count(found.general_rows, 'row')}; left out as evaluation text: "
        f"{_count(general['characters_left_out_as_evaluation_text'], 'character')}",
        f"domain: {_count(domain['train_rows'], 'row')} to train on, {about}{found.tokens:,} tokens, "
        f"{about}{found.trained:,} of them trained; {validated}{_count(domain['test_rows'], 'row')} to evaluate on",
        f"left out as test prompts: {_count(domain['train_rows_left_out_as_test_prompts'], 'row')}",
    ]
    for source, left in {**general.get("unusable", {}), **domain.get("unusable", {})}.items():
        kinds = ", ".join(f"{kind}: {count}" for kind, count in left["reasons"].items())
        lines.append(f"left out as unusable: {left['rows']} of {left['of']} rows of {source} ({kinds})")
        lines += [f"  {row}: {reason}" for row, reason in list(left["first"].items())[:3]]
    return lines


def _shown(found: Check, row: TrainedRow, number: int, marks: bool) -> Text:
    text = Text(f"{number} ({len(row.ids)} tokens, {len(row.trained)} trained): ", style="dim")
    for part, is_trained in row.parts(found.job.tokenizer):
        short = part if len(part) <= _LONG else f"{part[: _LONG // 2]} […] {part[-_LONG // 2 :]}"
        text.append(f"⟦{short}⟧" if is_trained and marks else short, "not dim bold green" if is_trained else "not dim")
    return text


def _costs(found: Check) -> Table:
    from hlora.report.format import duration, size, three_digits

    device = "device" if found.job.base.device.type != "cpu" else "process"
    table = Table("phase", "times", "one takes", "together", f"memory of the {device}", title="Estimated")
    for cost in found.costs:
        fits = not math.isnan(cost.each)
        one = f"{three_digits(cost.each)} s" if cost.each < 10 else duration(cost.each)
        times = [one, duration(cost.seconds)] if fits else ["does not fit", "–"]
        memory = "–" if cost.memory is None else size(cost.memory)
        table.add_row(cost.name, f"{cost.count:,}", *times, memory if cost.whole_batch else f"above {memory}")
    return table


def _ends(found: Check) -> list[str]:
    from hlora.report.format import duration, size

    lines = [
        "Each phase was measured here on a step of its longest rows, and scaled to its rows and steps.",
        f"disk: about {size(found.disk)} in {found.output}, while it trains up to {size(found.checkpoints)} more; "
        f"{size(found.free)} are free there",
        *(f"note: {note}" for note in found.notes),
    ]
    whole = "a phase does not fit into the memory here; try a smaller batch, max_length or rank"
    if math.isfinite(found.seconds):
        whole = f"about {duration(found.seconds)} in one process, {duration(found.opened)} of it loading"
    return [*lines, f"the whole run: {whole}"]


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
