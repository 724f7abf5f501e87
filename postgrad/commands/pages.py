"""Write a result as a self-contained HTML page."""

from __future__ import annotations

from pathlib import Path

from postgrad.commands import blend_page, probe_page, shift_page
from postgrad.commands.blend import Blend
from postgrad.commands.compare import RunComparison
from postgrad.commands.probe import LayerProbe
from postgrad.commands.shift import MeasuredShift
from postgrad.lineage.metrics import read_run_metrics
from postgrad.lineage.tree import Lineage
from postgrad.reports.html import document
from postgrad.reports.pages import comparison_page, lineage_page

PageResult = RunComparison | Lineage | LayerProbe | MeasuredShift | Blend


def write_page(result: PageResult, path: Path | str) -> Path:
    """Write the page of a comparison of runs, a lineage, a probe, a shift or a blend."""
    document.write_page(Path(path), _page(result))
    return Path(path)


def _page(result: PageResult) -> str:
    match result:
        case RunComparison():
            metrics = [read_run_metrics(*each) for each in zip(result.runs, result.records, strict=True)]
            damage = [problem for each in metrics for problem in each.damage]
            title = " and ".join(result.names)
            return comparison_page.comparison_page(list(result.records), metrics, title, result.names[0], damage)
        case Lineage():
            return lineage_page.lineage_page(result)
        case LayerProbe():
            return probe_page.probe_page(result)
        case MeasuredShift():
            return shift_page.shift_page(result)
        case Blend():
            return blend_page.blend_page(result)
