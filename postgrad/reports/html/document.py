"""The frame of every page: its style sheet, and the building blocks of its sections.

A page is one HTML file without scripts and without external resources: its Content-Security-Policy allows only its own style
sheet, by hash. Foreign text is escaped where it enters (`notation.escape_html`).
"""

from __future__ import annotations

import base64
import hashlib
import html as html_escape
import os
import re
from collections.abc import Callable, Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from urllib.parse import quote

from postgrad.foreign_text import mask_secrets, multiline_text, plain_text
from postgrad.lineage.record import Sample
from postgrad.reports.html.charts.chart import Chart
from postgrad.reports.html.charts.style import STYLE
from postgrad.reports.html.notation import escape_html
from postgrad.reports.html.table import Table, csv_text
from postgrad.reports.html.verdicts import VERDICTS
from postgrad.storage.atomic import write_without_secrets

WIDE_PIXELS, NARROW_PIXELS = 560.0, 358.0  # a column of a two-column page, and a telephone of 390 px less its margins
MAX_YAML_CHARACTERS = 60_000

# Print is always on white paper: the light colours once more, after everything else.
_STYLE = (
    STYLE
    + files("postgrad.reports.html").joinpath("page.css").read_text("utf-8")
    + ("@media print{" + STYLE.split("@media", 1)[0].strip() + ":root{--panel:#f6f8fa}}")
)


_FOOTER = "Made by postgrad from the run\u2019s own records. This page is self-contained: it runs no scripts and loads nothing."


def render_page(title: str, kind: str, heading: str, lead: str, sections: Sequence[tuple[str, str, str, str]]) -> str:
    """A page of a `kind`: its heading, the `lead` below it as HTML, and its sections.

    Sections are (id, short name, heading, body); one with an empty body is omitted.
    """
    full_title = f"{title} \u2013 postgrad"
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
        f"<title>{escape_html(full_title, 200)}</title><style>{_STYLE}</style></head><body>"
        '<a class="skip" href="#content">Skip to the content</a><header class="top">'
        f'<p class="over">postgrad \u00b7 {kind}</p><h1><bdi>{escape_html(heading, 160)}</bdi></h1>{lead}'
        f'<nav aria-label="Sections"><ul>{links}</ul></nav></header>'
        f'<main id="content">{body}</main><footer><p>{_FOOTER}</p></footer></body></html>\n'
    )


def figure(caption: str, draw: Callable[[float], Chart], *, note: str = "", numbers: Table | None = None) -> str:
    """A figure drawn for a wide and for a narrow screen, of which the style sheet shows one, and its files to save."""
    small = f"<small>{escape_html(note)}</small>" if note else ""
    wide = draw(WIDE_PIXELS)
    links = _file_link(caption, "svg", "image/svg+xml", wide.standalone_svg(), "Save this figure")
    if wide.rows:
        links += _file_link(
            caption, "csv", "text/csv", csv_text([wide.header, *map(_rounded, wide.rows)]), "Save its numbers"
        )
    return (
        f"<figure><figcaption>{escape_html(caption)}{small}</figcaption>"
        f'<div class="wide">{wide.svg}</div><div class="narrow">{draw(NARROW_PIXELS).svg}</div>'
        f'<p class="files">{links}</p>'
        + (details("The numbers", numbers.html()) if numbers and numbers.rows else "")
        + "</figure>"
    )


def _rounded(row: Sequence[str | float | None]) -> list[str | float | None]:
    """The numbers to six digits: more than the picture shows, and half the text."""
    rounded = [float(f"{value:.6g}") if isinstance(value, float) else value for value in row]
    return [int(value) if isinstance(value, float) and value.is_integer() else value for value in rounded]


def _file_link(caption: str, suffix: str, media_type: str, text: str, title: str) -> str:
    """A link that saves a text which the page itself holds."""
    name = "-".join(re.findall(r"\w+", caption.lower()))[:60] or "figure"
    data = quote(mask_secrets(text), safe=" -._~!$()*,/;=?@{}[]|")  # base64 would be longer
    return (
        f'<a download="{escape_html(name)}.{suffix}" title="{title}" href="data:{media_type};charset=utf-8,{data}">'
        f"{suffix.upper()}</a>"
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
