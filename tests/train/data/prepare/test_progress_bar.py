"""Progress of preparing, on a terminal and elsewhere."""

import io

import pytest

from train.data.prepare.progress_bar import prepare_with_progress
from train.reporting.terminal import UserConsole


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_shown_and_a_second_prepare_does_nothing(tmp_path, text_data, terminal):
    (tmp_path / "a.txt").write_text("hello there " * 100)

    def shown() -> str:
        out = UserConsole(file=io.StringIO(), force_terminal=terminal, width=200)
        folder = prepare_with_progress(text_data("a.txt"), out)
        assert f"in {folder}" in out.file.getvalue()
        return out.file.getvalue()

    first, second = shown(), shown()
    assert "reading and cleaning" in first
    assert "writing shards" in first
    assert "1 document, " in first
    assert "nothing to do" in second
    assert "writing shards" not in second
