"""The frame of every page: its style sheet, and the building blocks of its sections.

A page is one HTML file without scripts and without external resources: its Content-Security-Policy allows only its own style
sheet, by hash. Foreign text is escaped where it enters (`notation.escape_html`).
"""

from __future__ import annotations

import base64
import hashlib
import html as html_escape
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from postgrad.foreign_text import mask_secrets, multiline_text, plain_text
from postgrad.lineage.record import Sample
from postgrad.reports.html.charts.style import STYLE
from postgrad.reports.html.notation import escape_html
from postgrad.reports.html.table import Table
from postgrad.reports.html.verdicts import VERDICTS
from postgrad.storage.atomic import write_without_secrets

WIDE_PIXELS, NARROW_PIXELS = 560.0, 358.0  # a column of a two-column page, and a telephone of 390 px less its margins
MAX_YAML_CHARACTERS = 60_000

_STYLE = (
    """
:root{color-scheme:light dark;--panel:#f6f8fa}
@media (prefers-color-scheme:dark){:root{--panel:#1c2128}}
"""
    + STYLE
    + """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--ground);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","Liberation Sans",sans-serif}
main,header.top,footer{max-width:1256px;margin:0 auto;padding:0 16px}
header.top{padding-top:40px}
.skip{position:absolute;left:-999px}.skip:focus{left:16px;top:8px}
a{color:var(--c0)}
a:focus-visible,summary:focus-visible,.scroll:focus-visible{outline:2px solid var(--c0);outline-offset:2px}
.over{margin:0;color:var(--soft);font-size:.8125rem;letter-spacing:.04em}
h1{margin:.1em 0 .3em;font-size:2.125rem;line-height:1.2;letter-spacing:-.015em;overflow-wrap:anywhere}
.lead{margin:0 0 1rem;max-width:62em;font-size:1.1875rem;line-height:1.5}
.lead b{font-weight:600}
.facts{display:flex;flex-wrap:wrap;gap:.25rem 1.75rem;margin:0;padding:0;list-style:none;color:var(--soft);
font-size:.875rem}
.facts b{color:var(--ink);font-weight:600}
nav{margin:1.25rem 0 0;padding:.5rem 0;border-block:1px solid var(--line);font-size:.875rem}
nav ul{display:flex;flex-wrap:wrap;gap:.25rem 1.25rem;margin:0;padding:0;list-style:none}
nav a{text-decoration:none;color:var(--soft)}nav a:hover{color:var(--c0);text-decoration:underline}
section{margin:3rem 0 0}
h2{margin:0 0 .25rem;font-size:1.3125rem;line-height:1.3;letter-spacing:-.01em}
h3{margin:1.5rem 0 .25rem;font-size:1rem}
.about{margin:0 0 1rem;max-width:56em;color:var(--soft);font-size:.9375rem}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(240px,1fr));gap:12px;margin:1.5rem 0 0;
padding:0;list-style:none}
.cards li{border:1px solid var(--line);border-radius:8px;padding:14px 16px;border-top-width:3px}
.cards .t-good{border-top-color:var(--good)}.cards .t-bad{border-top-color:var(--bad)}
.cards .t-even{border-top-color:var(--even)}.cards .t-open{border-top-color:var(--open)}
.cards .what{display:flex;justify-content:space-between;gap:8px;align-items:baseline;font-weight:600}
.cards .what bdi{overflow-wrap:anywhere;min-width:0}
.cards p.big{color:var(--ink);margin:.35rem 0 .35rem;line-height:1.2;font-weight:600;
font-variant-numeric:tabular-nums;letter-spacing:-.01em;font-size:1.75rem}
.cards .big small{font-size:.8125rem;font-weight:400;color:var(--soft);letter-spacing:0}
.cards p{margin:.15rem 0 0;font-size:.875rem;color:var(--soft);font-variant-numeric:tabular-nums}
.badge{display:inline-block;white-space:nowrap;border:1px solid;border-radius:99px;padding:0 .6em;
font-size:.8125rem;font-weight:600;line-height:1.6}
.badge.t-good{color:var(--good)}.badge.t-bad{color:var(--bad)}.badge.t-even{color:var(--even)}
.badge.t-open{color:var(--open)}
.notice{margin:1.25rem 0 0;border:1px solid var(--line);border-left:4px solid var(--open);border-radius:4px;
padding:10px 16px;background:var(--panel)}
.notice.t-bad{border-left-color:var(--bad)}.notice.t-good{border-left-color:var(--good)}
.notice p{margin:0}
.pair{display:grid;gap:2rem 40px;margin-top:1.25rem}
@media (min-width:1000px){.pair{grid-template-columns:1fr 1fr}}
.trio{display:grid;gap:2rem 40px;margin-top:1.25rem}
figure{margin:0;min-width:0;max-width:720px}
figcaption{margin:0 0 .5rem;font-size:.9375rem;font-weight:600}
figcaption small{display:block;font-weight:400;font-size:.8125rem;color:var(--soft)}
.narrow{display:none}
@media (max-width:640px){.wide{display:none}.narrow{display:block}h1{font-size:1.75rem}
.lead{font-size:1.0625rem}
header.top{padding-top:24px}section{margin-top:2.5rem}}
@media (min-width:1100px){.trio{grid-template-columns:1fr 1fr 1fr}.trio .wide{display:none}
.trio .narrow{display:block}}
.scroll{overflow-x:auto;margin-top:1rem}
table{border-collapse:collapse;font-size:.875rem;line-height:1.4;font-variant-numeric:tabular-nums}
caption{text-align:left;color:var(--soft);font-size:.8125rem;padding-bottom:6px}
th,td{padding:7px 10px;text-align:left;vertical-align:baseline;border-bottom:1px solid var(--line);
white-space:nowrap}
thead th{color:var(--soft);font-weight:600;font-size:.8125rem;vertical-align:bottom}
thead small{font-weight:400}
.groups th{text-align:center;border-bottom:1px solid var(--line)}.groups td{border:0}
tbody th{font-weight:600;max-width:22em;overflow:hidden;text-overflow:ellipsis}
th:first-child,td:first-child{padding-left:0}
.n{text-align:right}
td.t-good{color:var(--good);font-weight:600}td.t-bad{color:var(--bad);font-weight:600}
td.t-even{color:var(--even);font-weight:600}td.t-open{color:var(--open)}
tr.total th,tr.total td{border-top:2px solid var(--line);font-weight:600}
small.below{display:block;color:var(--soft);font-weight:400;font-size:.8125rem}
.note{margin:.5rem 0 0;max-width:60em;color:var(--soft);font-size:.8125rem}
td.prose{white-space:normal;overflow-wrap:anywhere;min-width:12em}
details{margin-top:.75rem}
summary{cursor:pointer;color:var(--soft);font-size:.875rem;width:fit-content}
pre{margin:.5rem 0 0;padding:12px 14px;border-radius:6px;background:var(--panel);font-size:.8125rem;
line-height:1.5;white-space:pre-wrap;overflow-wrap:anywhere}
pre,code{font-family:ui-monospace,"SF Mono",Menlo,Consolas,"Liberation Mono",monospace}
code{font-size:.9em;overflow-wrap:anywhere}
.sample{border-top:1px solid var(--line);padding-top:1rem;margin-top:1.25rem}
.sample .prompt{margin:.25rem 0 0;max-width:60em;white-space:pre-wrap;overflow-wrap:anywhere}
.texts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(270px,100%),1fr));gap:12px;margin-top:.75rem}
.texts>div{background:var(--panel);border-radius:6px;padding:10px 14px;min-width:0}
.texts h4{margin:0 0 .25rem;font-size:.75rem;font-weight:600;color:var(--soft)}
.texts p{margin:0;white-space:pre-wrap;overflow-wrap:anywhere;font-size:.9375rem}
dl.kv{display:grid;grid-template-columns:minmax(8em,max-content) 1fr;gap:.3rem 1.25rem;margin:.75rem 0 0;
font-size:.875rem}
dl.kv dt{color:var(--soft)}dl.kv dd{margin:0;min-width:0;overflow-wrap:anywhere}
dl.kv dd small{display:block;color:var(--soft)}
.blocks{display:grid;gap:1rem 40px}
@media (min-width:1000px){.blocks{grid-template-columns:1fr 1fr}}
ol.chain{display:flex;flex-wrap:wrap;gap:10px 34px;margin:1rem 0 0;padding:0;list-style:none}
ol.chain li{position:relative;border:1px solid var(--line);border-radius:8px;padding:10px 14px;min-width:9em}
ol.chain li+li::before{content:"\\2192";position:absolute;left:-25px;top:50%;
translate:0 -50%;color:var(--soft)}
ol.chain b{display:block;overflow-wrap:anywhere}
ol.chain span{display:block;color:var(--soft);font-size:.8125rem;
overflow-wrap:anywhere}
footer{margin-top:4rem;padding-bottom:3rem;color:var(--soft);font-size:.8125rem}
footer p{border-top:1px solid var(--line);padding-top:1rem;margin:0}
@media print{@page{margin:16mm}:root{color-scheme:light}body{font-size:11pt}nav,.skip{display:none}
section{margin-top:1.75rem}figure,.cards li,.sample,tr{break-inside:avoid}h2,h3,figcaption{break-after:avoid}
.scroll{overflow:visible}th,td{padding:3px 4px}table{font-size:7pt}
thead th,caption,small.below,.note{font-size:7pt}figure details{display:none}
.wide{display:none}.narrow{display:block}.pair,.trio{grid-template-columns:1fr 1fr;gap:8mm}
.blocks{grid-template-columns:1fr 1fr}
details::details-content{content-visibility:visible;block-size:auto;display:block}}
"""
)

# Print is always on white paper: the light colours once more, after everything else.
_STYLE += "@media print{" + STYLE.split("@media", 1)[0].strip() + ":root{--panel:#f6f8fa}}"


def render_page(title: str, header: str, sections: Sequence[tuple[str, str, str, str]], footer: str) -> str:
    """A page. Sections are (id, short name, heading, body); one with an empty body is omitted."""
    present = [section for section in sections if section[-1]]
    links = "".join(f'<li><a href="#{i}">{n}</a></li>' for i, n, _, _ in present)
    body = "".join(
        f'<section id="{i}" aria-labelledby="{i}-h"><h2 id="{i}-h">{h}</h2>{b}</section>' for i, _, h, b in present
    )
    digest = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="referrer" content="no-referrer"><meta name="color-scheme" content="light dark">'
        f"<title>{escape_html(title, 200)}</title><style>{_STYLE}</style></head><body>"
        f'<a class="skip" href="#content">Skip to the content</a><header class="top">{header}'
        f'<nav aria-label="Sections"><ul>{links}</ul></nav></header>'
        f'<main id="content">{body}</main><footer><p>{footer}</p></footer></body></html>\n'
    )


FOOTER = "Made by postgrad from the run\u2019s own records. This page is self-contained: it runs no scripts and loads nothing."


def figure(caption: str, draw: Callable[[float], str], *, note: str = "", numbers: Table | None = None) -> str:
    """A figure drawn for a wide and for a narrow screen; the style sheet shows one of them."""
    small = f"<small>{escape_html(note)}</small>" if note else ""
    return (
        f"<figure><figcaption>{escape_html(caption)}{small}</figcaption>"
        f'<div class="wide">{draw(WIDE_PIXELS)}</div><div class="narrow">{draw(NARROW_PIXELS)}</div>'
        + (details("The numbers", numbers.html()) if numbers and numbers.rows else "")
        + "</figure>"
    )


def side_by_side(*parts: str) -> str:
    """Figures side by side where there is room."""
    shown = [part for part in parts if part]
    style = "trio" if len(shown) == 3 else "pair"
    return f'<div class="{style}">{"".join(shown)}</div>' if shown else ""


def details(summary: str, body: str) -> str:
    return f"<details><summary>{escape_html(summary)}</summary>{body}</details>"


def intro_paragraph(text: str) -> str:
    return f'<p class="about">{escape_html(text)}</p>'


def preformatted(text: object, limit: int = MAX_YAML_CHARACTERS) -> str:
    shown = html_escape.escape(multiline_text(mask_secrets(text), limit), quote=True)
    return f'<pre dir="auto" tabindex="0">{shown}</pre>'


def escaped_passage(text: object) -> str:
    return html_escape.escape(multiline_text(text), quote=True)


def sample_box(sample: Sample, texts: Iterable[tuple[str, str | None]]) -> str:
    """A prompt and its continuations, `texts` with their headings; empty ones are omitted."""
    source = f'<p class="over">prompt from <bdi>{escape_html(sample.set, 80)}</bdi></p>' if sample.set else ""
    prompt = f'<p class="prompt" dir="auto">{escaped_passage(sample.prompt)}</p>'
    return f'<article class="sample">{source}{prompt}{text_boxes(texts)}</article>'


def text_boxes(texts: Iterable[tuple[str, str | None]]) -> str:
    """Texts side by side, each with its heading."""
    boxes = "".join(
        f'<div><h4><bdi>{escape_html(heading, 80)}</bdi></h4><p dir="auto">{escaped_passage(text).strip()}</p></div>'
        for heading, text in texts
        if text
    )
    return f'<div class="texts">{boxes}</div>'


def facts(entries: Iterable[tuple[str, object]]) -> str:
    """A list of named values without the empty ones."""
    known = [(k, plain_text(mask_secrets(v), 600)) for k, v in entries if v not in (None, "", [], {})]
    lines = "".join(f"<dt>{escape_html(k, 80)}</dt><dd><bdi>{escape_html(v)}</bdi></dd>" for k, v in known)
    return f'<dl class="kv">{lines}</dl>' if lines else ""


def verdict_badge(verdict: str) -> str:
    tone, symbol, word = VERDICTS.get(verdict, ("open", "?", "not judged"))
    return f'<span class="badge t-{tone}"><span aria-hidden="true">{symbol}</span> {word}</span>'


def bold_name(text: object) -> str:
    return f"<b><bdi>{escape_html(text, 80)}</bdi></b>"


def format_time(text: object) -> str:
    """An ISO time as `2026-11-21 14:03`; other texts are unchanged."""
    shown = plain_text(text, 40)
    return shown[:16].replace("T", " ") if len(shown) >= 16 and shown[4:5] == "-" else shown


def write_page(path: str | os.PathLike[str], html: str) -> Path:
    """Replace a page atomically. Raises `DiskError`."""
    target = Path(path)
    write_without_secrets(target, html)
    return target
