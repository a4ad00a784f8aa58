"""The notebooks run on a run directory, and are committed without outputs."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from synthetic_run import write_run

NOTEBOOKS = Path(__file__).parents[1] / "analysis" / "notebooks"


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_outputs_are_stripped(path: Path) -> None:
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            assert not cell.outputs
            assert cell.execution_count is None


def test_read_a_run_executes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMLIME_RUN", str(write_run(tmp_path / "demo", steps=8).root))
    notebook = nbformat.read(NOTEBOOKS / "1_read_a_run.ipynb", as_version=4)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "stream" and output.name == "stderr"]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 4
    html = "".join(output.data["text/html"] for output in outputs if "text/html" in output.get("data", {}))
    assert "eval/sums" in html
    assert "<script>alert" not in html
