"""metrics.csv: its columns and rows, also after a kill."""

from __future__ import annotations

from fourstage.tracking.loggers import MetricsCSV


def test_metrics_csv_columns_and_half_written_rows(tmp_path) -> None:
    path = tmp_path / "metrics.csv"
    logger = MetricsCSV(path)
    logger.log_metrics({"a": 1.0, "epoch": 0}, 1)
    logger.log_metrics({"a": 0.1 + 0.2}, 2)
    logger.log_metrics({"val/loss": float("nan")}, 2)  # a new column, the same step
    logger.log_metrics({"a": 3.0, "val/loss": 0.5}, 3)
    assert path.read_text() == "step,a,val/loss\n1,1,\n2,0.3,nan\n3,3,0.5\n"
    with open(path, "a") as file:
        file.write("4,1.2")  # killed in the middle of a row
    resumed = MetricsCSV(path, resume=True)
    resumed.keep(2)
    resumed.log_metrics({"b": 7.0}, 3)
    assert path.read_text() == "step,a,val/loss,b\n1,1,,\n2,0.3,nan,\n3,,,7\n"
    MetricsCSV(path).log_metrics({"c": 1.0}, 1)  # no resume: the old rows go
    assert path.read_text() == "step,c\n1,1\n"
