"""`pdd evaluate --metrics list`."""

from __future__ import annotations

from pdd_cli.console import Console


def list_metrics(console: Console) -> None:
    """Print all metrics with their properties."""
    from rich.table import Column, Table

    from pdd_cli.iqa.available import as_document, available_metrics

    metrics = available_metrics()
    document = as_document(metrics)
    table = Table("metric", "compares with", "better", "range", Column("weights", overflow="fold"))
    for metric in metrics:
        info = metric.info
        table.add_row(info.name, metric.compares_with, info.better, info.value_range, metric.weights)
    console.table(table)
    console.say(
        f"pyiqa {document['pyiqa']}, for non-commercial use (PolyForm Noncommercial; parts: S-Lab). "
        "Ranges are approximate. pdd fetch-weights --metrics A,B fetches weights."
    )
    console.result(document)
