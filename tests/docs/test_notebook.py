"""The notebook, run in a kernel as a reader runs it: what it protected has kept more, and has learned."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from pages import REPOSITORY, links

NOTEBOOK = REPOSITORY / "examples" / "quickstart.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def test_the_notebook_holds_no_outputs_and_no_noise() -> None:
    for cell in CELLS:
        assert not cell.get("outputs") and cell.get("execution_count") is None and not cell["metadata"]


def test_the_links_of_the_notebook_lead_somewhere() -> None:
    prose = "".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown")
    assert links(prose) and all((NOTEBOOK.parent / target).exists() for target in links(prose))


@pytest.mark.slow
def test_the_notebook_runs_and_shows_less_forgotten_and_the_domain_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "runs" / "notebook" / "adapter" / "adapter_model.safetensors").is_file()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    shown = [output.data["text/plain"] for output in outputs if output.output_type == "execute_result"]
    found = ast.literal_eval(shown[-1])
    base, plain, ours = (found[arm] for arm in ("base model", "plain LoRA", "hlora"))
    assert ours["text"] < plain["text"]
    assert ours["answers"] < 0.9 * base["answers"]
