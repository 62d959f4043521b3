"""The notebook in docs runs from top to bottom on an output of the embedded teacher."""

import pytest
from conftest import ROOT, extract_chats

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
NOTEBOOK = ROOT / "docs" / "explore.ipynb"


def test_it_runs_and_shows_tables_pictures_and_the_page(tmp_path, monkeypatch):
    book = nbformat.read(NOTEBOOK, as_version=4)  # committed with small pictures and nothing else
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    assert [list(output.data) for cell in cells for output in cell.outputs] == [["image/png"]] * 4
    assert all(cell.execution_count is None for cell in cells)
    monkeypatch.setenv("LOGITS", str(extract_chats(tmp_path, "--limit", 12)))
    run = {"metadata": {"path": str(NOTEBOOK.parent)}}
    nbclient.NotebookClient(book, timeout=1000, kernel_name="python3", resources=run).execute()
    said = [output for cell in book.cells for output in cell.get("outputs", [])]
    shown = [output.get("data", {}) for output in said]
    assert sum("image/png" in data for data in shown) == 4  # each figure once
    pages = [str(data.get("text/html", "")) for data in shown]
    assert sum("<iframe srcdoc=" in text for text in pages) == 1
    assert sum("<table" in text for text in pages) >= 4
    printed = "".join(output.get("text", "") for output in said)
    assert "valid: 1 shard, 12 rows" in printed
    assert "KL, mean and max    0 and 0 nats" in printed
