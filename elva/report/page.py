"""A page of plain HTML: no script, nothing fetched, every text escaped where it enters."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

CSS = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1d2329; --muted: #5b6670; --rule: #dfe3e7;
  --tint: #f5f7f9; --link: #0072b2; --hit: #00805d; }
@media (prefers-color-scheme: dark) { :root { --paper: #161a1f; --ink: #e6e9ec; --muted: #9aa5b1;
  --rule: #313940; --tint: #1d2329; --link: #56b4e9; --hit: #2cc99f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui,
  -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  overflow-wrap: break-word; }
main { max-width: 68rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .75rem; letter-spacing: -.01em; }
h2 { font-size: 1.3rem; margin: 3rem 0 .5rem; padding-top: 1.25rem;
  border-top: 1px solid var(--rule); }
h3 { font-size: 1.05rem; margin: 0; }
p { max-width: 46rem; margin: .5rem 0; }
.lead { font-size: 1.1rem; }
.note, figcaption, .small { color: var(--muted); font-size: .875rem; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums;
  overflow-wrap: normal; }
th, td { padding: .4rem .65rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--rule); }
th { font-weight: 600; color: var(--muted); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td:first-child { color: var(--ink); }
td b { font-weight: 750; }
tr.muted td { color: var(--muted); }
figure { margin: 1.25rem 0; }
figure.chart img { display: block; width: 100%; min-width: 44rem; height: auto; }
.card { border: 1px solid var(--rule); border-radius: .6rem; padding: .9rem 1rem; margin: 1rem 0; }
.card header { display: flex; gap: .9rem; align-items: center; }
.card header div { flex: 1; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .75rem 1.75rem; margin-top: .75rem; }
.pair h4 { margin: 0; font-size: .875rem; }
.pair p { margin: .1rem 0 .5rem; font-size: .875rem; line-height: 1.4; }
img.pic { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; background: #fff;
  border-radius: .35rem; }
.none { display: block; color: var(--muted); font-size: .72rem; }
header .ask { width: 4.5rem; flex: none; border: 1px solid var(--rule); }
ol.strip { list-style: none; display: grid; grid-template-columns: repeat(5, 1fr); gap: .45rem;
  margin: 0; padding: 0; }
ol.strip li { font-size: .72rem; line-height: 1.25; color: var(--muted); min-width: 0;
  overflow-wrap: break-word; hyphens: auto; }
ol.strip img { border: 1px solid var(--rule); margin-bottom: .25rem; }
ol.strip .hit img { border-color: transparent; outline: 3px solid var(--hit); }
ol .hit { color: var(--hit); }
ol.names { margin: 0; padding-left: 1.4rem; font-size: .875rem; }
pre { background: var(--tint); border-radius: .4rem; padding: .8rem 1rem; overflow-x: auto;
  font: .82rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  overflow-wrap: normal; }
details summary { cursor: pointer; color: var(--link); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.25rem;
  font-size: .92rem; }
dt { color: var(--muted); } dd { margin: 0; }
footer { margin-top: 3rem; color: var(--muted); font-size: .875rem; }
@media (max-width: 46rem) { .pair { grid-template-columns: 1fr; } main { padding-top: 1.5rem; } }
"""


def page(title: str, parts: Sequence[str]) -> str:
    """A whole document of parts that are HTML already."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def title(words: str, lead: str) -> str:
    """What a page opens with."""
    return f'<h1>{escape(words)}</h1>\n<p class="lead">{escape(lead)}</p>'


def section(title: str, *parts: str) -> str:
    return "\n".join([f"<h2>{escape(title)}</h2>", *(part for part in parts if part)])


def text(words: str, kind: str = "") -> str:
    """A paragraph; `kind` is "lead", "note" or none."""
    return f'<p class="{kind}">{escape(words)}</p>' if kind else f"<p>{escape(words)}</p>"


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], best: set[tuple[int, int]], muted: int = 0
) -> str:
    """Args: best: (row, column) of cells in bold; muted: how many of the last rows are asides."""
    body = []
    for i, row in enumerate(rows):
        cells = [
            f"<td><b>{escape(c)}</b></td>" if (i, j) in best else f"<td>{escape(c)}</td>"
            for j, c in enumerate(row)
        ]
        kind = ' class="muted"' if i >= len(rows) - muted else ""
        body.append(f"<tr{kind}>{''.join(cells)}</tr>")
    heads = "".join(f'<th scope="col">{escape(h)}</th>' for h in head)
    return (
        f'<div class="scroll"><table><thead><tr>{heads}</tr></thead>\n<tbody>'
        + "\n".join(body)
        + "</tbody></table></div>"
    )


def chart(file: str, alt: str, caption: str) -> str:
    """A chart in the page's colours, with its dark twin beside it."""
    stem = file.removesuffix(".png")
    return (
        '<figure class="chart"><div class="scroll"><picture>'
        f'<source media="(prefers-color-scheme: dark)" srcset="{escape(stem)}-dark.png">'
        f'<img src="{escape(file)}" alt="{escape(alt)}"></picture></div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def picture(file: str | None, alt: str, kind: str = "pic") -> str:
    """A small picture, or a word where there is none."""
    if file is None:
        return f'<span class="{kind} none">no picture</span>'
    return f'<img class="{kind}" src="{escape(file)}" alt="{escape(alt)}" loading="lazy">'


def card(head: str, outcome: str, ask: str, sides: Sequence[str]) -> str:
    """One query: what was asked, and what each side answered."""
    return (
        f'<article class="card"><header>{ask}<div><h3>{escape(head)}</h3>'
        f'<span class="small">{escape(outcome)}</span></div></header>'
        f'<div class="pair">{"".join(sides)}</div></article>'
    )


def side(head: str, summary: str, answers: str) -> str:
    return (
        f"<section><h4>{escape(head)}</h4><p>wrote “{escape(summary)}”</p>{answers}</section>"
        if summary
        else f"<section><h4>{escape(head)}</h4><p>wrote nothing</p>{answers}</section>"
    )


def strip(tiles: Sequence[tuple[str | None, str, bool]]) -> str:
    """Pictures in order, as (file, name, whether it is the right one)."""
    return (
        '<ol class="strip">'
        + "".join(_li(picture(f, n) + _mark(n, h), h) for f, n, h in tiles)
        + "</ol>"
    )


def ranked(names: Sequence[tuple[str, bool]]) -> str:
    """Names in order, as (name, whether it is the right one)."""
    return '<ol class="names">' + "".join(_li(_mark(n, h), h) for n, h in names) + "</ol>"


def _li(inner: str, hit: bool) -> str:
    return f'<li class="hit">{inner}</li>' if hit else f"<li>{inner}</li>"


def _mark(name: str, hit: bool) -> str:
    return f"✓ {escape(name)}" if hit else escape(name)


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    rows = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in pairs)
    return f"<dl>{rows}</dl>"


def code(words: str, fold: str | None = None) -> str:
    """Text as it is; folded under a heading where one is given."""
    block = f"<pre>{escape(words)}</pre>"
    return block if fold is None else f"<details><summary>{escape(fold)}</summary>{block}</details>"


def footer(words: str) -> str:
    return f"<footer>{escape(words)}</footer>"
