"""The notebooks run on a run directory, and are committed without outputs."""

from pathlib import Path

import nbformat
import pytest
from helpers.synthetic_run import write_run
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[2] / "analysis" / "notebooks"


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_outputs_are_stripped(path: Path) -> None:
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            assert not cell.outputs
            assert cell.execution_count is None


@pytest.mark.slow
def test_read_a_run_executes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMLIME_RUN", str(write_run(tmp_path / "demo", steps=8).root))
    notebook = nbformat.read(NOTEBOOKS / "1_read_a_run.ipynb", as_version=4)
    NotebookClient(
        notebook, timeout=300, startup_timeout=300, resources={"metadata": {"path": str(NOTEBOOKS)}}
    ).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "stream" and output.name == "stderr"]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 4
    html = "".join(output.data["text/html"] for output in outputs if "text/html" in output.get("data", {}))
    assert "eval/sums" in html
    assert "<script>alert" not in html


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "expected", "pictures"),
    [
        ("2_debug_a_reward", ["reward-hacking", "&lt;iframe", "timed out after 30 s"], 3),
        ("3_compare_runs", ["config.lr", "version.torch", "4 runs"], 3),
        ("4_cluster_cost", ["PREEMPTED", "goodput", "gpu_hours_per_reward_point"], 2),
    ],
)
def test_the_others_execute_on_recorded_runs(
    name: str, expected: list[str], pictures: int, recorded_runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURMLIME_RUN", str(recorded_runs / "hacked"))
    monkeypatch.setenv("SLURMLIME_RUNS", str(recorded_runs))
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    NotebookClient(
        notebook, timeout=300, startup_timeout=300, resources={"metadata": {"path": str(NOTEBOOKS)}}
    ).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "stream" and output.name == "stderr"]
    data = [output.data for output in outputs if "data" in output]
    assert len([entry for entry in data if "image/png" in entry]) == pictures
    shown = "".join(entry.get("text/html", "") + entry.get("text/plain", "") for entry in data)
    for text in expected:
        assert text.replace("&lt;iframe", "<iframe") in shown
