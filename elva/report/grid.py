"""The review page of `elva mrbench`: a grid of queries with keep and drop.

Static HTML: decisions stay in the browser and are saved as a `review.tsv`, which
`elva mrbench review --decisions` takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from urllib.parse import quote

from elva.report.page import CSS

STYLE = """
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: .9rem; }
.grid .card { margin: 0; }
.grid img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; background: #fff;
  border-radius: .35rem; margin-bottom: .5rem; }
.grid .card.keep { border-color: var(--hit); } .grid .card.drop { opacity: .45; }
.bar { position: sticky; top: 0; background: var(--paper); padding: .6rem 0; z-index: 1;
  display: flex; gap: 1rem; align-items: center; border-bottom: 1px solid var(--rule); }
button { font: inherit; padding: .25rem .8rem; border-radius: .35rem; cursor: pointer;
  border: 1px solid var(--rule); background: var(--tint); color: var(--ink); }
button[aria-pressed=true] { background: var(--link); color: var(--paper); }
.grain { display: inline-block; margin: .1rem .25rem .1rem 0; padding: 0 .4rem; font-size: .8rem;
  border-radius: .3rem; background: var(--tint); }
"""

SCRIPT = """
const rows = JSON.parse(document.getElementById('rows').textContent);
const place = 'mrbench ' + document.title;
const stored = JSON.parse(localStorage.getItem(place) || '{}');
const decided = Object.fromEntries(rows.map(r => [r[1], stored[r[1]] ?? r[0]]));
function show() {
  for (const card of document.querySelectorAll('[data-qid]')) {
    const now = decided[card.dataset.qid];
    card.classList.toggle('keep', now === 'keep');
    card.classList.toggle('drop', now === 'drop');
    for (const b of card.querySelectorAll('button'))
      b.setAttribute('aria-pressed', String(b.value === now));
  }
  const count = kind => rows.filter(r => decided[r[1]] === kind).length;
  document.getElementById('count').textContent =
    `${count('keep')} kept, ${count('drop')} dropped, ${count('')} to decide`;
}
document.addEventListener('click', event => {
  const card = event.target.closest('[data-qid]');
  if (!card || event.target.tagName !== 'BUTTON') return;
  const qid = card.dataset.qid;
  decided[qid] = decided[qid] === event.target.value ? '' : event.target.value;
  localStorage.setItem(place, JSON.stringify(decided));
  show();
});
document.getElementById('save').addEventListener('click', () => {
  const head = ['decision', 'qid', 'set', 'words', 'grains', 'image'];
  const text = [head, ...rows.map(r => [decided[r[1]], ...r.slice(1)])]
    .map(r => r.join('\\t')).join('\\n') + '\\n';
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([text], {type: 'text/tab-separated-values'}));
  link.download = 'review.tsv';
  link.click();
});
show();
"""


def grid_page(title: str, rows: Sequence[Sequence[str]], rows_json: str, footer: str) -> str:
    """The page.

    Args:
        rows: decision, qid, set, words, grains (`text (type); ...`), picture relative to the page.
        rows_json: the same as JSON.
        footer: a line such as an attribution, or nothing.
    """
    cards = "\n".join(_card(row) for row in rows)
    # A script element ends at its closing tag whatever is quoted.
    data = rows_json.replace("</", "<\\/")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{CSS}{STYLE}</style></head><body><main>
<h1>{escape(title)}</h1>
<p>Keep a query if its grains are right and it needs each of them. Decisions stay in this browser;
save them and run <code>elva mrbench review DIR --decisions review.tsv</code>.</p>
<div class="bar"><button id="save">Save review.tsv</button><span id="count"></span></div>
<div class="grid">
{cards}
</div>
<p class="note">{escape(footer)}</p>
</main><script type="application/json" id="rows">{data}</script><script>{SCRIPT}</script>
</body></html>
"""


def _card(row: Sequence[str]) -> str:
    _, qid, stem, words, grains, image = row
    picture = f'<img loading="lazy" alt="" src="{escape(quote(image))}">' if image else ""
    parts = "".join(f'<span class="grain">{escape(g)}</span>' for g in grains.split("; ") if g)
    return (
        f'<div class="card" data-qid="{escape(qid)}">{picture}<p>{escape(words)}</p>'
        f'<p>{parts}</p><p class="note">{escape(stem)} · {escape(qid)}</p>'
        '<button value="keep">keep</button> <button value="drop">drop</button></div>'
    )
