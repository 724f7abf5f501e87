"""The style sheet of the charts: colours as CSS variables, so that a chart follows light, dark and print."""

from __future__ import annotations

from postgrad.reports.html.charts.marks import PALETTE_SIZE

# Hues after Okabe & Ito (2008), told apart under the three common colour vision deficiencies, each darkened
# (or lightened for the dark page) until text in it has a contrast of at least 4.5 on the page's ground.
STYLE = (
    """
:root{--ground:#fff;--c0:#0a66b0;--c1:#b84a00;--c2:#00795a;--c3:#a1477f;--c4:#7a6200;--c5:#1b7f9c;--c6:#6b52b5;
--c7:#5c5c5c;--ink:#1b1f24;--soft:#59636e;--line:#d8dee4;--grid:#eceff2;--good:#00795a;--bad:#b53a00;
--even:#0a66b0;--open:#68727d}
@media (prefers-color-scheme:dark){:root{--ground:#15191e;--c0:#6cb2f2;--c1:#f59b61;--c2:#4cc9a4;--c3:#e597c7;
--c4:#d8bd52;--c5:#7fcfe6;--c6:#b5a3f5;--c7:#b8bec5;--ink:#e8ebee;--soft:#a0a9b3;--line:#39414a;--grid:#252b32;
--good:#4cc9a4;--bad:#f7925a;--even:#6cb2f2;--open:#a0a9b3}}
svg.fig{display:block;width:100%;height:auto;font-size:12px;font-family:inherit;overflow:visible}
.fig text{fill:var(--soft);font-variant-numeric:tabular-nums}
.fig .grid{stroke:var(--grid);stroke-width:1}.fig .axis{stroke:var(--line);stroke-width:1}
.fig .zero{stroke:var(--soft);stroke-width:1}.fig .mark{stroke:var(--soft);stroke-dasharray:3 3}
.fig .level{stroke:var(--bad);stroke-dasharray:5 4}.fig text.lev{fill:var(--bad)}
.fig .leader{stroke:var(--line);fill:none}
.fig .halo{paint-order:stroke;stroke:var(--ground);stroke-width:4px;stroke-linejoin:round}
.fig .strong{fill:var(--ink)}.fig .name{font-weight:600}
.fig .ln{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.fig .faint{stroke-width:1;opacity:.35}.fig .dash{stroke-dasharray:6 4}
.fig .bd{stroke:none;opacity:.16}.fig .pt{stroke:var(--ground);stroke-width:1}
.fig .bar{stroke-width:2;fill:none}.fig .plan{fill:none;stroke-width:1.5;stroke-dasharray:3 2}
.fig .seg{stroke:var(--ground);stroke-width:1}
"""
    + "".join(
        f".fig .{c}{{fill:var(--{c})}}.fig .s-{c}{{stroke:var(--{c})}}"
        for c in [*(f"c{i}" for i in range(PALETTE_SIZE)), "good", "bad", "even", "open"]
    )
    + """
.fig text.c0,.fig text.c1,.fig text.c2,.fig text.c3,.fig text.c4,.fig text.c5,.fig text.c6,.fig text.c7
{font-weight:600}
.fig .hollow{fill:var(--ground)}
table.heat td.h{text-align:center;min-width:4.6em;color:var(--ink)}
table.heat td.own{outline:2px solid var(--ink);outline-offset:-3px}
"""
    + "".join(f"table.heat td.h{i}{{background:color-mix(in srgb,var(--c1) {i * 7}%,var(--ground))}}" for i in range(9))
)
