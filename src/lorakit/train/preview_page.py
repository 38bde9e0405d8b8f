"""A preview as one page that needs nothing else: hover over a token for its id, and for who says it."""

from __future__ import annotations

from html import escape
from pathlib import Path

from lorakit.errors import ConfigError
from lorakit.train.preview import Preview, ShownRow
from lorakit.train.strands import Piece

_STYLE = """
:root { color-scheme: light dark; --system: #8e24aa; --user: #0277bd; --tool: #b26a00; --assistant: #2e7d32; }
@media (prefers-color-scheme: dark) {
  :root { --system: #ce93d8; --user: #81d4fa; --tool: #ffcc80; --assistant: #a5d6a7; }
}
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; } td, th { padding: .1rem 1rem .1rem 0; text-align: left; vertical-align: top; }
.bar { display: inline-block; height: .8em; background: var(--user); margin-right: .5em; vertical-align: middle; }
.strand { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.8 ui-monospace, monospace;
  border: 1px solid #8884; border-radius: 6px; padding: .6rem; margin: .3rem 0; }
.t { border-left: 1px solid #8883; } .system { color: var(--system); } .user { color: var(--user); }
.tool { color: var(--tool); } .assistant { color: var(--assistant); }
.learnt { background: color-mix(in srgb, var(--assistant) 22%, transparent);
  border-bottom: 2px solid var(--assistant); }
.note { font-weight: 600; } .break { opacity: .5; }
"""


def write_page(found: Preview, path: Path, *, title: str) -> None:
    """Write a preview as HTML.

    Args:
        found: What to show.
        path: The file; replaced if it is there.
        title: Over it.

    Raises:
        ConfigError: Its folder is not there.
    """
    if not path.parent.is_dir():
        raise ConfigError(f"The page cannot be written: there is no folder {path.parent}.")
    path.write_text(page(found, title), encoding="utf-8")


def page(found: Preview, title: str) -> str:
    """The HTML of a preview."""
    share = "" if found.share is None else f" ({100 * found.share:.1f} % of the tokens)"
    facts = {
        "rows": f"{found.total:,}",
        "tokens": f"{found.tokens:,}",
        "learnt": f"{found.learnt:,} {found.unit}s{share}",
        "longest": f"{found.longest:,} tokens; train.max_length is {found.max_length:,}",
        "cut": f"{found.truncated:,} rows",
        "left out": f"{found.dropped:,} rows",
        "tokens lost": f"{found.lost:,}",
    }
    table = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts.items()
    )
    most = max(bar.rows for bar in found.histogram)
    bars = "".join(
        f"<tr><td>{bar.low:,} to {bar.high:,}</td><td><span class='bar' style='width:{20 * bar.rows / most:.2f}rem'>"
        f"</span>{bar.rows:,}</td></tr>"
        for bar in found.histogram
    )
    legend = " ".join(f"<span class='{escape(role)}'>{escape(role)}</span>" for role in found.roles)
    rows = "".join(map(_row, found.rows))
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{escape(title)}</title><style>{_STYLE}</style>"
        f"<h1>{escape(title)}, {found.split} split</h1><table>{table}</table>"
        f"<h2>Lengths</h2><table>{bars}</table>"
        f"<h2>Rows</h2><p>{legend} <span class='learnt'>learnt</span></p>{rows}</html>\n"
    )


def _row(row: ShownRow) -> str:
    strands = "".join(
        f"<div class='strand'><b>{escape(shown.strand.name)}</b> {''.join(map(_piece, shown.pieces))}"
        f" <span class='note'>{escape(shown.strand.note)}</span></div>"
        for shown in row.strands
    )
    return (
        f"<h3>{row.number}. {escape(row.id)}</h3><p>{row.tokens:,} tokens, {row.learnt:,} learnt</p>{strands}"
    )


def _piece(piece: Piece) -> str:
    kinds = " ".join(part for part in ("t", piece.role, "learnt" if piece.learnt else "") if part)
    about = f"{', '.join(map(str, piece.ids))} {piece.role} {'learnt' if piece.learnt else 'not learnt'}"
    text = escape(piece.text).replace("\n", "<span class='break'>⏎</span>\n")
    return f"<span class='{escape(kinds)}' title='{escape(about)}'>{text}</span>"
