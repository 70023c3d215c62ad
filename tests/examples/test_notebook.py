"""The notebook, cell by cell in a kernel of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "notebook" / "pipeline_to_engine.ipynb"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the hosts
def test_the_notebook_runs_from_pipeline_to_engine(tmp_path: Path) -> None:
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(
        output["text"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.get("name") == "stdout"
    )
    assert "of the MACs" in printed
    assert "of the branch evaluations reused" in printed
    assert (tmp_path / "dit.onnx").exists()


def test_it_is_kept_without_outputs() -> None:
    assert '"outputs": []' in NOTEBOOK.read_text()
    assert "output_type" not in NOTEBOOK.read_text().replace("output_type=", "")
