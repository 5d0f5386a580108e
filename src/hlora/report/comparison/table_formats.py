"""A table of ready-made texts as Markdown, CSV, LaTeX and HTML."""

from __future__ import annotations

import csv
import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from hlora.system.files import write_text

Rank = Literal["", "best", "second"]


class TableCell(NamedTuple):
    """One cell: what it says, and whether it is the best or second of its column."""

    text: str
    rank: Rank = ""


@dataclass
class Table:
    """A titled table of ready-made texts. Each row has a cell for each column of all groups together."""

    name: str
    """File name without suffix."""
    title: str
    groups: list[tuple[str, list[str]]]
    """Heading over some columns ("" for none) and the columns' own headings."""
    rows: list[list[TableCell]]
    notes: list[str] = field(default_factory=list)
    labels: int = 1
    """Leading columns that name the row; the others are set flush right."""

    @property
    def columns(self) -> list[str]:
        """One heading a column, the group's before its own."""
        return [f"{group} {column}".strip() for group, columns in self.groups for column in columns]

    def markdown(self) -> str:
        """GitHub's dialect. Best is bold, second underlined by <ins>."""

        def look(cell: TableCell) -> str:
            text = _markdown(cell.text)
            return {"": text, "best": f"**{text}**", "second": f"<ins>{text}</ins>"}[cell.rank]

        rules = ["---" if column < self.labels else "---:" for column in range(len(self.columns))]
        body = [[_markdown(column) for column in self.columns], rules, *([look(c) for c in row] for row in self.rows)]
        lines = [f"**{_markdown(self.title)}**", "", *(f"| {' | '.join(row)} |" for row in body)]
        return "\n".join([*lines, *(f"\n{_markdown(note)}" for note in self.notes)]) + "\n"

    def csv(self) -> str:
        """The plain texts under one line of headings, with ASCII minus signs; looks and notes are left out."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        for row in [self.columns, *([cell.text for cell in row] for row in self.rows)]:
            writer.writerow([one_line(text).replace("−", "-") for text in row])
        return stream.getvalue()

    def latex(self) -> str:
        """A table environment for a document that uses the package booktabs."""

        def look(cell: TableCell) -> str:
            text = _latex(cell.text)
            return {"": text, "best": rf"\textbf{{{text}}}", "second": rf"\underline{{{text}}}"}[cell.rank]

        count = len(self.columns)
        headings = " & ".join(_latex(column) for _, columns in self.groups for column in columns)
        above, rules, start = [], [], 1
        for group, columns in self.groups:
            end = start + len(columns) - 1
            above.append(rf"\multicolumn{{{len(columns)}}}{{c}}{{{_latex(group)}}}")
            if group:
                rules.append(rf"\cmidrule(lr){{{start}-{end}}}")
            start = end + 1
        return "\n".join(
            [
                r"% \usepackage{booktabs}",
                r"\begin{table}",
                r"\centering\footnotesize\setlength{\tabcolsep}{4pt}",
                rf"\caption{{{_latex(self.title)}}}",
                rf"\begin{{tabular}}{{{'l' * self.labels}{'r' * (count - self.labels)}}}",
                r"\toprule",
                *([" & ".join(above) + r" \\", "".join(rules)] if rules else []),
                headings + r" \\",
                r"\midrule",
                *(" & ".join(look(cell) for cell in row) + r" \\" for row in self.rows),
                r"\bottomrule",
                r"\end{tabular}",
                *(rf"\par\smallskip {_latex(note)}" for note in self.notes),
                r"\end{table}",
                "",
            ]
        )

    def html(self) -> str:
        """A <table> to put into a page, everything escaped; notes are its <tfoot>."""

        def row(cells: Sequence[TableCell]) -> str:
            looks = {"": "{}", "best": "<strong>{}</strong>", "second": "<u>{}</u>"}
            texts = [looks[cell.rank].format(_html(cell.text)) for cell in cells]
            names = "".join(f'<th scope="row">{text}</th>' for text in texts[: self.labels])
            return f"<tr>{names}{''.join(f'<td>{text}</td>' for text in texts[self.labels :])}</tr>"

        grouped = any(group for group, _ in self.groups)
        above, below = "", ""
        for group, columns in self.groups:
            if group:
                above += f'<th scope="colgroup" colspan="{len(columns)}">{_html(group)}</th>'
            headings = "".join(f'<th scope="col">{_html(column)}</th>' for column in columns)
            if grouped and not group:
                above += headings.replace("<th ", '<th rowspan="2" ')
            else:
                below += headings
        notes = "".join(
            f'<tr><td colspan="{len(self.columns)}"><span>{_html(note)}</span></td></tr>' for note in self.notes
        )
        return "\n".join(
            [
                f"<table><caption><span>{_html(self.title)}</span></caption>",
                f"<thead>{f'<tr>{above}</tr>' if grouped else ''}<tr>{below}</tr></thead>",
                "<tbody>",
                *(row(cells) for cells in self.rows),
                "</tbody>",
                *([f"<tfoot>{notes}</tfoot>"] if notes else []),
                "</table>",
                "",
            ]
        )


def write_tables(tables: Sequence[Table], directory: Path) -> list[Path]:
    """Write each table as .md, .csv, .tex and .html into `directory`; returns the files."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for table in tables:
        forms = {".md": table.markdown, ".csv": table.csv, ".tex": table.latex, ".html": table.html}
        for suffix, form in forms.items():
            paths.append(directory / f"{table.name}{suffix}")
            write_text(paths[-1], form())
    return paths


def one_line(text: str | None) -> str:
    """Without line breaks and what cannot be printed."""
    return " ".join("".join(c if c.isprintable() else " " for c in text or "").split())


def _markdown(text: str) -> str:
    return re.sub(r"([\\|*`<$]|(?<!\w)_|_(?!\w))", r"\\\1", one_line(text))


def _html(text: str) -> str:
    return html.escape(one_line(text))


_GREEK = {
    "α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "varepsilon", "ζ": "zeta", "η": "eta", "θ": "theta",
    "κ": "kappa", "λ": "lambda", "μ": "mu", "µ": "mu", "ν": "nu", "ξ": "xi", "π": "pi", "ρ": "rho", "σ": "sigma",
    "τ": "tau", "φ": "varphi", "χ": "chi", "ψ": "psi", "ω": "omega", "Γ": "Gamma", "Δ": "Delta", "Θ": "Theta",
    "Λ": "Lambda", "Ξ": "Xi", "Π": "Pi", "Σ": "Sigma", "Φ": "Phi", "Ψ": "Psi", "Ω": "Omega",
}  # fmt: skip
_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "%": r"\%", "#": r"\#", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$", "|": "$|$", "±": r"$\pm$",
    "−": "$-$", "×": r"$\times$", "·": r"$\cdot$", "≤": r"$\le$", "≥": r"$\ge$", "≈": r"$\approx$", "∞": r"$\infty$",
    "→": r"$\to$", "–": "--", "—": "---", "…": r"\ldots{}", "‖": r"$\|$", "√": r"$\surd$",
    "[": "{[}", "*": "{*}",  # at the start of a row, \\ would take them for its own
    **{letter: rf"$\{name}$" for letter, name in _GREEK.items()},
}  # fmt: skip


def _latex(text: str) -> str:
    """Escaped for LaTeX, Greek and signs as mathematics. Other letters stay: accents are fine, CJK needs XeLaTeX."""
    return "".join(_LATEX.get(character, character) for character in one_line(text))
