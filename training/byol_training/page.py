"""The report's HTML: one file, nothing fetched, no script; light and dark as the reader has it."""

from collections.abc import Iterable, Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --paper: #fbfbfa; --card: #fff; --ink: #1b1b19; --muted: #5c5b57;
  --grid: #e4e3df; --line: #2a6fc9; --good: #1d7a46; --bad: #b3372b; --warn: #8a5a00; }
@media (prefers-color-scheme: dark) { :root { --paper: #161615; --card: #20201e; --ink: #f0efec;
  --muted: #b0aea7; --grid: #3a3935; --line: #6aa5f0; --good: #5cc78c; --bad: #f08a7d;
  --warn: #e0ac4c; } }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }
main { max-width: 1180px; margin: 0 auto; padding: 28px 20px 60px }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 4px }
h2 { font-size: 18px; margin: 40px 0 10px }
p { margin: 6px 0; max-width: 75ch } .lead, .note, .meaning { color: var(--muted) }
nav { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 14px 0 }
a { color: var(--line) }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 10px }
.tile { background: var(--card); border: 1px solid var(--grid); border-radius: 8px;
  padding: 10px 12px }
.tile b { display: block; font-size: 21px; font-weight: 600; line-height: 1.25 }
.tile span { color: var(--muted); font-size: 13px }
ul.verdict { padding-left: 0; list-style: none; max-width: 80ch } .verdict li { margin: 4px 0 }
.verdict b { display: inline-block; min-width: 4.2em } .good b { color: var(--good) }
.bad b { color: var(--bad) } .warn b { color: var(--warn) }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: 14px }
figure { margin: 0 } .chart { background: var(--card); border: 1px solid var(--grid);
  border-radius: 8px; padding: 10px 10px 4px } figcaption { font-weight: 600; font-size: 14px }
figcaption .note { font-weight: 400; font-size: 13px }
svg { display: block; width: 100%; height: auto }
.grid { stroke: var(--grid) } .tick { fill: var(--muted); font-size: 11px }
.line { fill: none; stroke: var(--line); stroke-width: 2; stroke-linejoin: round }
.end { fill: var(--line) } .target { fill: transparent } .target:hover { fill: var(--line) }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: 14px }
th, td { text-align: left; padding: 5px 18px 5px 0; border-bottom: 1px solid var(--grid);
  vertical-align: top } th { font-weight: 600 } td.number, th.number { text-align: right;
  font-variant-numeric: tabular-nums } code, pre { font-size: 13px; overflow-wrap: anywhere }
pre { background: var(--card); border: 1px solid var(--grid); border-radius: 8px; padding: 12px;
  overflow-x: auto }
.rows { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(540px, 100%), 1fr));
  gap: 10px 24px }
.row { display: flex; flex-wrap: wrap; gap: 6px; align-items: flex-start }
.row .asked { margin-right: 12px } .pic { width: 68px; font-size: 12px; color: var(--muted) }
.pic img { display: block; width: 68px; height: 68px; object-fit: contain; border-radius: 4px;
  border: 3px solid var(--grid); background: var(--card) }
.pic.same img { border-color: var(--good) } .pic.other img { border-color: var(--bad);
  border-style: dashed }
.map { background: var(--card); border: 1px solid var(--grid); border-radius: 8px }
.map image:hover { outline: 2px solid var(--line) }
.key { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 8px 0; font-size: 14px }
.key i { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 6px;
  vertical-align: -1px }
summary { cursor: pointer; margin: 4px 0 10px }
footer { margin-top: 48px; color: var(--muted); font-size: 13px }
"""


def page(title: str, lead: str, sections: Sequence[tuple[str, str]], *, footer: str) -> str:
    """The whole document.

    Args:
        title: of the document and its first heading; text.
        lead: one line under it; text.
        sections: heading (text) and body (HTML); empty bodies are left out.
        footer: text.
    """
    shown = [(heading, body) for heading, body in sections if body]
    links = "".join(f'<a href="#{anchor(h)}">{escape(h)}</a>' for h, _ in shown)
    bodies = "".join(
        f'<section aria-labelledby="{anchor(heading)}"><h2 id="{anchor(heading)}">'
        f"{escape(heading)}</h2>{body}</section>"
        for heading, body in shown
    )
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>"
        f"<header><h1>{escape(title)}</h1><p class=lead>{escape(lead)}</p></header>"
        f'<nav aria-label="Sections">{links}</nav>{bodies}'
        f"<footer>{escape(footer)}</footer></main></body></html>\n"
    )


def anchor(heading: str) -> str:
    """A heading's id."""
    return "-".join(heading.lower().split())


def tiles(facts: Iterable[tuple[str, str]]) -> str:
    """Large figures side by side: what each is, and the figure; both text."""
    cells = "".join(
        f"<div class=tile><b>{escape(value)}</b><span>{escape(name)}</span></div>"
        for name, value in facts
    )
    return f"<div class=tiles>{cells}</div>"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: int = 0) -> str:
    """A table of text; columns 2 to `numbers` + 1 hold figures and are set to the right."""

    def cells(tag: str, row: Sequence[str]) -> str:
        kinds = [" class=number" if 1 <= place <= numbers else "" for place in range(len(row))]
        scope = " scope=col" if tag == "th" else ""
        return "".join(
            f"<{tag}{kind}{scope}>{escape(text)}</{tag}>"
            for kind, text in zip(kinds, row, strict=True)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return (
        f"<div class=scroll><table><thead><tr>{cells('th', header)}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )
