"""Write a result as a self-contained HTML page."""

from __future__ import annotations

from pathlib import Path

from postgrad.commands.blend import Blend
from postgrad.commands.compare import RunComparison
from postgrad.commands.lineage import Lineage
from postgrad.commands.probe import LayerProbe
from postgrad.commands.shift import MeasuredShift
from postgrad.reports.html import document
from postgrad.reports.pages import blend_page, comparison_page, lineage_page, probe_page, shift_page
from postgrad.training.metrics_log import read_metrics

PageResult = RunComparison | Lineage | LayerProbe | MeasuredShift | Blend


def write_page(result: PageResult, path: Path | str) -> Path:
    """Write the page of a comparison of runs, a lineage, a probe, a shift or a blend."""
    document.write_page(Path(path), _page(result))
    return Path(path)


def _page(result: PageResult) -> str:
    match result:
        case RunComparison():
            metrics = [list(read_metrics(run / "metrics.jsonl")) for run in result.runs]
            title = " and ".join(result.names)
            return comparison_page.comparison_page(list(result.records), metrics, title, result.names[0])
        case Lineage():
            return lineage_page.lineage_page(result.as_dict())
        case LayerProbe():
            return probe_page.probe_page(result.as_dict())
        case MeasuredShift():
            return shift_page.shift_page(result.as_dict())
        case Blend():
            return blend_page.blend_page(result.as_dict())
