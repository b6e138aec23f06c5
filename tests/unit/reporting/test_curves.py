"""Training logs as drawings."""

from __future__ import annotations

from pathlib import Path

import pytest

from robench.errors import UserError
from robench.reporting.curves import training_charts


def test_points_lie_where_their_values_say(tmp_path: Path) -> None:
    log = tmp_path / "training.csv"
    log.write_text("epoch,train_loss,validation_clean_accuracy,seconds\n1,2.5,0,1\n2,,,2\n3,0,1,3\n")
    accuracy, loss = training_charts(log)
    assert [line.title for line in accuracy.lines] == ["validation, clean"]
    assert accuracy.lines[0].points == "40.0,176.0 352.0,10.0"
    assert loss.lines[0].points == "40.0,10.0 352.0,176.0"
    assert [tick.text for tick in accuracy.x_ticks] == ["1", "2", "3"]
    assert [tick.text for tick in loss.y_ticks] == ["0", "0.625", "1.25", "1.875", "2.5"]
    assert accuracy.lines[0].last == "100"


def test_one_epoch_nothing_measured_and_numbers_that_cannot_be_drawn(tmp_path: Path) -> None:
    log = tmp_path / "training.csv"
    log.write_text("epoch,train_loss,validation_clean_accuracy\n1,nan,0.5\n")
    (chart,) = training_charts(log)
    assert chart.lines[0].points == "196.0,93.0"
    log.write_text("epoch,train_loss\n")
    assert training_charts(log) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("epoch,train_loss\n1,much\n", "line 2: could not convert string to float: 'much'"),
        ("epoch,train_loss\n1,2\n2\n", "line 3 has 1 values, line 1 names 2"),
        ("epoch,train_loss\n1,2\n2,3,4\n", "line 3 has 3 values, line 1 names 2"),
        ("a,b\n1,2,3\n", "line 1 names no column epoch"),
        ("a,b\n1,2\n", "line 1 names no column epoch"),
        ("", "line 1 names no column epoch"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "training.csv"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        training_charts(path)
    assert str(caught.value).startswith(f"{path} is no training log ({problem}); restore it from version control, or ")
