"""Text that models, files and users wrote, made safe to show: control characters become visible, secrets are masked."""

from __future__ import annotations

import os
import re

ELLIPSIS = "\u2026"

_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufdd0-\ufdef"
    + "".join(chr(plane + end) for plane in range(0, 0x110000, 0x10000) for end in (0xFFFE, 0xFFFF))
    + "]"
)
"""Control characters but tab and line feed, separators of lines, changes of the reading order, and what is no character."""

_TOKEN = re.compile(
    r"""(?<![A-Za-z0-9])(?:
        hf_[A-Za-z0-9]{16,} | sk-(?=[\w-]*\d)[\w-]{16,} | gh[pousr]_[A-Za-z0-9]{16,} | github_pat_\w{16,}
        | glpat-[\w-]{16,} | xox[abprs]-[\w-]{8,} | AKIA[0-9A-Z]{12,} | eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*
    )""",
    re.VERBOSE,
)
_LOGIN = re.compile(r"(?<=://)[^/\s@\"'<>]+(?=@)")
_PARAMETER = re.compile(
    r"(?i)((?:[?&]|&amp;)[\w.-]*(?:token|signature|sig|credential|password|passwd|secret|key|auth)[\w.-]*=)[^&\s\"'<>\\#]+"
)
_ASSIGNED = re.compile(
    r"\b((?i:password|passwd|secret|api[_-]?key|access[_-]?token)|[A-Z_]*(?:TOKEN|SECRET|KEY))=[^\s'\"&]{6,}"
)
_BEARER = re.compile(r"(?i)\b(bearer\s+)[A-Za-z0-9._~+/=-]{16,}")
_SECRET_VARIABLE = re.compile(r"(?i)(?:token|secret|password|passwd|api_?key|access_key)$")


def visible_text(text: str) -> str:
    """The text with visible symbols for control characters, except tabs and line breaks: a terminal obeys escape sequences."""
    return _UNPRINTABLE.sub(_visible_symbol, text.replace("\r\n", "\n"))


def plain_text(value: object, limit: int = 0) -> str:
    """A foreign text as one line that is safe to print; `limit` (characters, 0 for none) shortens with an ellipsis."""
    text = "" if value is None else visible_text(str(value))
    return truncate(text.replace("\t", " ").replace("\n", "\u23ce"), limit)


def multiline_text(value: object, limit: int = 4000) -> str:
    """Foreign running text: as `plain_text`, with its line breaks."""
    return "" if value is None else truncate(visible_text(str(value)), limit)


def truncate(text: str, limit: int) -> str:
    """At most `limit` characters, the last of them an ellipsis where something was cut (0: no limit)."""
    return text if not limit or len(text) <= limit else text[: max(limit - 1, 0)] + ELLIPSIS


def mask_secrets(value: object) -> str:
    """The text without access tokens, logins and signatures of URLs, and secrets of the environment."""
    text = "" if value is None else str(value)
    for name, secret in os.environ.items():
        if secret in text and _SECRET_VARIABLE.search(name) and len(secret) >= 12 and re.search(r"\d", secret):
            text = text.replace(secret, "[secret]")
    text = _TOKEN.sub("[secret]", text)
    text = _LOGIN.sub("[secret]", text)
    text = _PARAMETER.sub(r"\1[secret]", text)
    text = _ASSIGNED.sub(r"\1=[secret]", text)
    return _BEARER.sub(r"\1[secret]", text)


def _visible_symbol(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    return "\u23ce" if code in (0x2028, 0x2029) else "\ufffd"
