"""Charts as inline SVG (or HTML tables) that need nothing but the page that holds them."""

from postgrad.reports.html.charts.bars import paired_bars, stacked_bars
from postgrad.reports.html.charts.chart import Chart
from postgrad.reports.html.charts.forest import ForestRow, forest_plot
from postgrad.reports.html.charts.heat import heat_table
from postgrad.reports.html.charts.line import LimitLine, Series, VerticalMark, line_chart
from postgrad.reports.html.charts.scales import Point
from postgrad.reports.html.charts.scatter import ScatterPoint, scatter
from postgrad.reports.html.charts.style import STYLE
from postgrad.reports.html.charts.thinning import smooth_points

__all__ = [
    "STYLE",
    "Chart",
    "ForestRow",
    "LimitLine",
    "Point",
    "ScatterPoint",
    "Series",
    "VerticalMark",
    "forest_plot",
    "heat_table",
    "line_chart",
    "paired_bars",
    "scatter",
    "smooth_points",
    "stacked_bars",
]
