"""Four forms of a table that each hold what they were given."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from xml.etree import ElementTree

from hlora.report.comparison.table_formats import Table, TableCell, write_tables

NASTY = Table(
    "nasty",
    r"100 % of <b>a_b</b> & \emph{x} $5 #1 ~^ {",
    [("", ["*Method*"]), ("μ & ν", ["PPL|Ω", "Acc %"])],
    [
        [TableCell("[x] <script>"), TableCell("1.00 ± 0.10", "best"), TableCell("−2.00", "second")],
        [TableCell("a\nb, \"c\""), TableCell("–"), TableCell("50_% {", "best")],
    ],
    ["Note: φ ≤ ∞ & more…"],
)  # fmt: skip


def test_markdown_has_as_many_cells_in_each_line_and_marks_best_and_second():
    lines = NASTY.markdown().splitlines()
    body = [line for line in lines if line.startswith("|")]
    assert len(body) == 4
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in body} == {4}
    assert body[1] == "| --- | ---: | ---: |"
    assert body[2] == r"| [x] \<script> | **1.00 ± 0.10** | <ins>−2.00</ins> |"
    assert lines[-1] == "Note: φ ≤ ∞ & more…"


def test_csv_reads_back_as_the_plain_texts():
    rows = list(csv.reader(io.StringIO(NASTY.csv())))
    assert rows == [
        ["*Method*", "μ & ν PPL|Ω", "μ & ν Acc %"],
        ["[x] <script>", "1.00 ± 0.10", "-2.00"],
        ['a b, "c"', "–", "50_% {"],
    ]


def test_html_is_wellformed_escaped_and_has_a_cell_for_each_column():
    root = ElementTree.fromstring(NASTY.html())
    assert root.tag == "table"
    assert root.findtext("caption/span") == NASTY.title
    assert "<script>" not in NASTY.html()
    first, second = root.findall("tbody/tr")
    assert ["".join(part.itertext()) for part in first] == ["[x] <script>", "1.00 ± 0.10", "−2.00"]
    assert [len(tr) for tr in (first, second)] == [3, 3]
    assert first.findtext("td/strong") == "1.00 ± 0.10"
    assert first.findtext("td/u") == "−2.00"
    above, below = root.findall("thead/tr")
    assert [th.get("colspan") for th in above] == [None, "2"]
    assert above[0].get("rowspan") == "2"
    assert [th.text for th in below] == ["PPL|Ω", "Acc %"]


def assert_compiles(latex: str, columns: int) -> None:
    """What can be checked without TeX: nothing raw, braces and environments closed, each row as wide as the table."""
    lines = [line for line in latex.splitlines() if not line.startswith("%")]
    text = "\n".join(lines)
    bare = re.sub(r"\\[\\{}%&#_$|]", "", text)  # without what is escaped
    depth = 0
    for character in bare:
        depth += {"{": 1, "}": -1}.get(character, 0)
        assert depth >= 0
    assert depth == 0
    assert bare.count("$") % 2 == 0
    outside = re.sub(r"\$[^$]*\$", "", bare)
    assert not re.search(r"[%#_^~<>|]", outside)
    assert all(ord(character) < 0x250 for character in text), "Greek or signs that pdflatex does not know"
    assert re.findall(r"\\begin\{(\w+)\}", text) == ["table", "tabular"]
    assert re.findall(r"\\end\{(\w+)\}", text) == ["tabular", "table"]
    body = text.split("\\midrule\n")[1].split("\n\\bottomrule")[0].splitlines()
    for line in body:
        assert line.endswith(r" \\")
        assert not line.startswith(("[", "*"))
        assert len(re.findall(r"(?<!\\)&", line)) == columns - 1
    spans = re.findall(r"\\multicolumn\{(\d+)\}", text)
    assert not spans or sum(map(int, spans)) == columns


def test_latex_escapes_everything_and_is_booktabs():
    latex = NASTY.latex()
    assert_compiles(latex, 3)
    assert r"\begin{tabular}{lrr}" in latex
    assert r"\cmidrule(lr){2-3}" in latex
    assert r"{[}x] $<$script$>$ & \textbf{1.00 $\pm$ 0.10} & \underline{$-$2.00} \\" in latex
    assert r"\multicolumn{2}{c}{$\mu$ \& $\nu$}" in latex
    assert r"\caption{100 \% of $<$b$>$a\_b$<$/b$>$ \& \textbackslash{}emph\{x\} \$5 \#1" in latex


def test_write_tables_writes_four_files_a_table_and_nothing_else(tmp_path: Path):
    paths = write_tables([NASTY], tmp_path / "tables")
    assert sorted(path.name for path in (tmp_path / "tables").iterdir()) == sorted(path.name for path in paths)
    assert [path.name for path in paths] == ["nasty.md", "nasty.csv", "nasty.tex", "nasty.html"]
    written = [path.read_text(encoding="utf-8") for path in paths]
    assert written == [NASTY.markdown(), NASTY.csv(), NASTY.latex(), NASTY.html()]
