"""Every notebook runs unchanged with the small local model."""

from __future__ import annotations

from pathlib import Path

import pytest

from utils.notebooks import Notebook, course, run_notebook

pytestmark = [pytest.mark.local_model, pytest.mark.notebook_run]


@pytest.mark.parametrize("notebook", course(), ids=lambda notebook: notebook.name)
def test_it_runs_from_top_to_bottom_with_a_language_model(notebook: Notebook, tmp_path: Path) -> None:
    # A folder of its own: the notebook may be open in JupyterLab at the same time.
    local = {"MODEL_PROVIDER": "local", "MODEL_ID": "small", "COURSE_DATA": str(tmp_path)}
    result = run_notebook(notebook, extra_environment=local)
    assert result.error is None, result.error
