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
    .map(r => r.join('\t')).join('\n') + '\n';
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([text], {type: 'text/tab-separated-values'}));
  link.download = 'review.tsv';
  link.click();
});
show();
