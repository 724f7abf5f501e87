"""The style sheet of the charts: colours as CSS variables, so that a chart follows light, dark and print."""

from importlib.resources import files

# Hues after Okabe & Ito (2008), told apart under the three common colour vision deficiencies, each darkened
# (or lightened for the dark page) until text in it has a contrast of at least 4.5 on the page's ground.
STYLE = files("postgrad.reports.html.charts").joinpath("charts.css").read_text("utf-8")
