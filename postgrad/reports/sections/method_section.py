"""How a run was made: model, execution, machine and stage file; and how to reproduce it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from postgrad.foreign_text import mask_secrets, plain_text
from postgrad.lineage.record import PenaltyRecord, Record
from postgrad.reports.html.document import details, facts, format_time, intro_paragraph, preformatted
from postgrad.reports.html.notation import escape_html, format_count


def method_section(record: Record) -> str:
    """The section of a run's page."""
    model = record.model.as_json()
    new_model = model.pop("new_model", None)
    blocks = [("Model", _setting_list(model.items()))]
    if new_model:
        config = json.dumps(new_model.pop("config", None), indent=1, ensure_ascii=False, default=str)
        new_model.pop("requested", None)
        blocks.append(("New model", _setting_list(new_model.items()) + details("Configuration", preformatted(config))))
    blocks.append(("Execution, with reasons", _execution_list(record)))
    blocks += [(f"Penalty: {escape_html(p.name, 60)}", _penalty_list(p)) for p in record.penalties]
    if record.sparse_update:
        blocks.append(("Sparse update", _setting_list(record.sparse_update.as_json().items())))
    blocks += [("Machine", _setting_list(record.machine.items())), ("Versions", _setting_list(record.versions.items()))]
    body = "".join(f"<div><h3>{heading}</h3>{block}</div>" for heading, block in blocks if block)
    text = record.stage_yaml or json.dumps(record.stage, indent=2, ensure_ascii=False, default=str)
    return f'<div class="blocks">{body}</div>' + details("The exact stage file", preformatted(text))


def _execution_list(record: Record) -> str:
    settings = record.execution.as_json()
    reasons = settings.pop("reasons", {})
    items = []
    for key in dict.fromkeys([*settings, *reasons]):
        reason = f"<small>{escape_html(mask_secrets(reasons[key]), 300)}</small>" if key in reasons else ""
        value = escape_html(_format_setting(settings.get(key)), 200)
        items.append(f"<dt>{escape_html(_title(key), 60)}</dt><dd><bdi>{value}</bdi>{reason}</dd>")
    return f'<dl class="kv">{"".join(items)}</dl>' if items else ""


def _penalty_list(penalty: PenaltyRecord) -> str:
    settings = penalty.model_dump(include={"strength", "weights", "reference", "importance", "skipped"})
    return _setting_list((key, value) for key, value in settings.items() if value)


def _setting_list(settings: Iterable[tuple[str, Any]]) -> str:
    return facts((_title(key), _format_setting(value)) for key, value in settings)


def _title(key: str) -> str:
    return key.replace("_", " ")


def _format_setting(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return format_count(value)
    if isinstance(value, (dict, list, tuple)):
        return json.dumps(value, ensure_ascii=False, default=str)
    return "" if value is None else str(value)


def reproduce_section(record: Record) -> str:
    """Parents, fingerprints and the command."""
    body = _parent_chain(record)
    blocks = [
        ("Fingerprints", facts(_fingerprints(record))),
        ("When", facts([("created", format_time(record.created)), ("finished", format_time(record.finished))])),
    ]
    body += '<div class="blocks">' + "".join(f"<div><h3>{h}</h3>{b}</div>" for h, b in blocks if b) + "</div>"
    if record.command:
        how = intro_paragraph("With the same start model, data and versions, in the folder of the stage file:")
        body += "<h3>Run it again</h3>" + how + preformatted(record.command, 2000)
    return body


def _fingerprints(record: Record) -> list[tuple[str, str]]:
    flat: list[tuple[str, str]] = []
    for key, value in record.fingerprints.all().items():
        if isinstance(value, dict):
            flat += [(f"{plain_text(_title(key), 40)}: {plain_text(name, 60)}", str(v)) for name, v in value.items()]
        else:
            flat.append((plain_text(_title(key), 60), str(value)))
    return flat


def _parent_chain(record: Record) -> str:
    if not record.parents:
        return ""
    items = "".join(
        f"<li><b><bdi>{escape_html(parent.name or 'parent', 80)}</bdi></b>"
        f"<span><bdi>{escape_html(mask_secrets(parent.path), 200)}</bdi></span>"
        f"<span><code>{escape_html(parent.fingerprint, 20)}</code></span></li>"
        for parent in record.parents
    )
    items += f"<li><b><bdi>{escape_html(record.name, 80)}</bdi></b><span>this stage</span></li>"
    return f'<h3>Parents</h3><ol class="chain">{items}</ol>'
