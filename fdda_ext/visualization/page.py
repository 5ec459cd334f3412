"""Parts of a self-contained HTML page. All text is escaped."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Sequence
from html import escape

__all__ = ["figure", "key_numbers", "page", "section", "side_by_side", "table", "text"]

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, "Segoe UI", "Noto Sans", Helvetica, Arial, sans-serif;
  color: #1a1a1a; background: #fff; max-width: 56rem; margin: 2rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; padding-top: .8rem; border-top: 1px solid #ddd; }
p, figcaption { color: #444; max-width: 46rem; }
.lead { margin: .3rem 0 1.2rem; }
.key { display: flex; flex-wrap: wrap; gap: .75rem; padding: 0; margin: 0; list-style: none; }
.key li { flex: 1 1 8rem; padding: .6rem .9rem; border-left: 3px solid #0072b2;
  background: #f5f7f9; }
.key b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.key span { color: #555; font-size: .85rem; }
table { border-collapse: collapse; font-size: .86rem; margin: .6rem 0 1rem; }
th, td { padding: .22rem .9rem .22rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid #eee; overflow-wrap: anywhere; }
thead th { border-bottom: 1px solid #999; font-weight: 600; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
figure { margin: .8rem 0; }
figure img { width: 100%; height: auto; }
figcaption { font-size: .86rem; }
pre { font-size: .78rem; background: #f5f7f9; padding: .8rem; overflow-x: auto; }
h3 { font-size: .95rem; margin: .8rem 0 0; }
.side { display: flex; flex-wrap: wrap; gap: 0 3rem; }
@media print {
  @page { margin: 16mm; }
  body { max-width: none; margin: 0; padding: 0; font-size: 10pt; }
  figure, tr { break-inside: avoid; }
  h2 { break-after: avoid; }
  .key li { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
}
"""


def page(title: str, lead: str, sections: Iterable[str]) -> str:
    """Build a page from a title, and from lead and sections in HTML."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n{lead}\n{''.join(sections)}</body>\n</html>\n"
    )


def key_numbers(items: Iterable[tuple[str, str]]) -> str:
    """Show numbers with their meanings in a row of boxes."""
    listed = "".join(f"<li><b>{escape(a)}</b><span>{escape(b)}</span></li>" for a, b in items)
    return f'<ul class="key">{listed}</ul>'


def table(header: Sequence[str], rows: Iterable[Sequence[object]], kinds: str = "") -> str:
    """Build a table; ``kinds`` has a letter for each column, "n" for numbers."""

    def cells(tag: str, row: Sequence[object]) -> Iterator[str]:
        for i, cell in enumerate(row):
            kind = ' class="n"' if kinds[i : i + 1] == "n" else ""
            yield f"<{tag}{kind}>{escape(str(cell))}</{tag}>"

    head = f"<thead><tr>{''.join(cells('th', header))}</tr></thead>" if header else ""
    lines = "".join(f"<tr>{''.join(cells('td', row))}</tr>" for row in rows)
    return f"<table>{head}<tbody>{lines}</tbody></table>"


def figure(image: bytes, caption: str) -> str:
    """Embed an SVG or PNG image with a caption."""
    kind = "png" if image.startswith(b"\x89PNG") else "svg+xml"
    data = base64.b64encode(image).decode()
    return (
        f'<figure><img alt="{escape(caption)}" src="data:image/{kind};base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def text(words: str, tag: str = "p") -> str:
    """Build a paragraph or another element from plain text."""
    return f"<{tag}>{escape(words)}</{tag}>"


def side_by_side(*parts: str) -> str:
    """Place parts side by side if the page is wide enough."""
    return f'<div class="side">{"".join(f"<div>{part}</div>" for part in parts if part)}</div>'


def section(title: str, *content: str) -> str:
    """Build a section, whose id is its title in lower case with hyphens."""
    name = title.lower().replace(" ", "-")
    body = "".join(content)
    return f'<section id="{escape(name)}"><h2>{escape(title)}</h2>{body}</section>\n'
