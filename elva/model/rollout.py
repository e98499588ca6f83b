"""G sampled summaries a prompt, with their log-probabilities and [RET] embeddings, in one pass.

Liu et al., ELVA, arXiv:2606.20280, sec. 3.4. The prompt is read once and its cache repeated for the
G rollouts; each decoding step yields the log-probability of the token it drew, and the step that
feeds [RET] back yields the embedding, so no second forward is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from elva.data import Item
from elva.model.cache import decoding_cache
from elva.model.inputs import Inputs
from elva.model.prompt import Prompt, PromptBatch
from elva.model.reading import wide
from elva.model.retriever import Retriever

ReadAt = Literal["at_ret", "before_ret"]

BLOCK = 256
"""Tokens of the vocabulary that are summed at once in search of the one drawn; ours: about the root
of a vocabulary."""

LOGITS_AT_ONCE = 1 << 26
"""Logits of a decoding step that are made and drawn from at once: 256 MB in fp32."""


@dataclass
class Rollouts:
    """R = prompts * G completions, padded on the right; row i * G + g is rollout g of prompt i."""

    ids: Tensor  # [R, T] int64; every row ends in [RET], or as its retriever closes a summary
    mask: Tensor  # [R, T] bool, True where real
    log_probs: Tensor  # [R, T] fp32, 0 where masked or where the token was not drawn
    finished: Tensor  # [R] bool: False where the end had to be appended at the length limit
    embeddings: Tensor  # [R, D] fp32: hidden state at [RET], or as its retriever pools
    forced: int = 0  # tokens at each row's end that follow of themselves from the action to end

    @property
    def chosen(self) -> Tensor:
        """[R, T] bool: the actions of summaries that ended themselves."""
        last = self.mask.sum(1, keepdim=True) - self.forced
        within = torch.arange(self.mask.shape[1], device=self.mask.device) < last
        return self.mask & within & self.finished[:, None]

    @staticmethod
    def cat(parts: Sequence[Rollouts], pad: int) -> Rollouts:
        """Join along the rows, padding to the longest; `pad` must be an id that may be written, or
        its log-probability is -inf and its gradient NaN."""
        width = max(p.ids.shape[1] for p in parts)

        def padded(x: Tensor, value: float) -> Tensor:
            return torch.nn.functional.pad(x, (0, width - x.shape[1]), value=value)

        return Rollouts(
            torch.cat([padded(p.ids, pad) for p in parts]),
            torch.cat([padded(p.mask, False) for p in parts]),
            torch.cat([padded(p.log_probs, 0.0) for p in parts]),
            torch.cat([p.finished for p in parts]),
            torch.cat([p.embeddings for p in parts]),
            parts[0].forced,
        )

    def select(self, rows: Tensor) -> Rollouts:
        width = int(self.mask[rows].sum(1).max())
        return Rollouts(
            self.ids[rows, :width],
            self.mask[rows, :width],
            self.log_probs[rows, :width],
            self.finished[rows],
            self.embeddings[rows],
            self.forced,
        )


def token_log_probs(logits: Tensor, tokens: Tensor, temperature: float, inputs: Inputs) -> Tensor:
    """log pi(token) [...] of logits [..., V]: the distribution that `sample` draws from.

    To end is one action: [RET], or what closes a retriever's summary, has the probability of itself
    and of the chat's ends together, none of which is ever written.
    """
    scaled, (banned, ends) = wide(logits) / temperature, inputs.never(logits.device)
    drawn = scaled.gather(-1, tokens[..., None])[..., 0]
    ending = scaled[..., ends].logsumexp(-1)
    total = scaled.index_fill(-1, banned, float("-inf")).logsumexp(-1)
    return torch.where(tokens == inputs.closing[0], ending, drawn) - total


def _draw(
    logits: Tensor, uniform: Tensor | None, temperature: float, inputs: Inputs
) -> tuple[Tensor, Tensor]:
    """A token [R] of each row of logits [R, V], which are overwritten, and its log-probability, by
    the inverse of the cumulated probabilities; the likeliest where `uniform` is None."""
    banned, ends = inputs.never(logits.device)
    scaled = wide(logits).div_(temperature)
    ending = scaled[:, ends].logsumexp(-1)
    scaled.index_fill_(-1, banned, float("-inf")).index_fill_(-1, ends, float("-inf"))
    scaled[:, inputs.closing[0]] = ending
    if uniform is None:
        likeliest, token = scaled.max(-1)
        return token, likeliest - scaled.logsumexp(-1)
    p = scaled.softmax(-1)
    token = _invert(p, uniform)
    return token, p.gather(1, token[:, None])[:, 0].log()


def _invert(p: Tensor, uniform: Tensor) -> Tensor:
    """The first token [R] up to which a row of p [R, V] sums to more than a share of its sum.

    Over blocks, then within one, so that only those are cumulated in fp64.

    Args:
        uniform: [R] fp64, the shares, in [0, 1).
    """
    whole = p.shape[1] // BLOCK * BLOCK
    blocks = p[:, :whole].unflatten(1, (-1, BLOCK)).sum(-1)
    cumulated = torch.cat([blocks, p[:, whole:].sum(-1, keepdim=True)], 1).double().cumsum(-1)
    uniform = uniform.clamp(max=1 - 2**-52)[:, None]  # times a sum still below that sum
    wanted = uniform * cumulated[:, -1:]
    # Clamped for NaN alone, which a guard stops after the step.
    block = torch.searchsorted(cumulated, wanted, right=True).clamp_(max=cumulated.shape[1] - 1)
    stop = cumulated.gather(1, block)
    start = torch.where(block > 0, cumulated.gather(1, (block - 1).clamp(min=0)), 0.0)
    columns = block * BLOCK + torch.arange(BLOCK, device=p.device)
    inside = p.gather(1, columns.clamp(max=p.shape[1] - 1)).double()
    inside = inside.masked_fill_(columns >= p.shape[1], 0.0).cumsum(-1)
    share = ((wanted - start) / (stop - start)).clamp(max=1 - 2**-52)
    found = torch.searchsorted(inside, share * inside[:, -1:], right=True)
    return (block * BLOCK + found)[:, 0].clamp_(max=p.shape[1] - 1)


@torch.no_grad()
def sample(
    retriever: Retriever,
    prompts: Sequence[Prompt],
    *,
    draws: Tensor | None,
    max_completion_length: int,
    temperature: float = 1.0,
    read: ReadAt = "at_ret",
) -> Rollouts:
    """Sample G summaries a prompt, each closed by [RET], or by its retriever's own tokens, where
    the model ends its answer.

    Args:
        draws: [len(prompts), G, max_completion_length] uniform numbers, one a token; None decodes
            greedily with G = 1. top-k and top-p are never applied: the log-probabilities are those
            of the distribution that was drawn from.
        max_completion_length: tokens before the end is appended to a row that did not write it; 0
            reads the prompt alone, which a retriever of somebody else may close by nothing.
        read: the hidden state at [RET] (ELVA), or at the token before it (LamRA).

    Returns:
        Rollouts of len(prompts) * G rows on the model's device, in order.
    """
    batch = retriever.inputs.collate(prompts, retriever.device)
    repeats = 1 if draws is None else draws.shape[1]
    closing = retriever.inputs.closing if max_completion_length else retriever.inputs.ending
    room = max_completion_length + len(closing)
    decoder = _Decoder(retriever, batch, repeats, room, temperature, read, closing)
    uniform = None if draws is None else draws.flatten(0, 1).to(batch.input_ids.device)
    for step in range(max_completion_length):
        decoder.step(None if uniform is None else uniform[:, step])
        if decoder.done:
            break
    return decoder.finish()


class _Decoder:
    """The state of one batched decoding.

    A row that has ended is decoded on, unheard, until half of the batch has: leaving at once would
    copy everybody's cache each time.
    """

    def __init__(
        self,
        retriever: Retriever,
        batch: PromptBatch,
        repeats: int,
        room: int,
        temperature: float,
        read: ReadAt,
        closing: Sequence[int],
    ) -> None:
        self.read, self.reading = read, retriever.inputs.reading
        self.retriever, self.temperature = retriever, temperature
        self.cache = decoding_cache(retriever.decoder.config, room)
        states = retriever.read(
            batch.input_ids, batch.images, batch.attention_mask, batch.position_ids,
            self.cache,
        )  # fmt: skip
        self.cache.batch_repeat_interleave(repeats)
        self.hidden = states[:, -1].repeat_interleave(repeats, 0)
        seen = batch.attention_mask.repeat_interleave(repeats, 0)
        self.attention = torch.cat([seen, seen.new_ones(len(seen), room)], 1)
        self.position = (batch.position_ids.amax(dim=(0, 2)) + 1).repeat_interleave(repeats)
        count, device = len(self.hidden), self.hidden.device
        self.closing = torch.tensor(closing, dtype=torch.long, device=device)
        self.closed = torch.zeros(count, dtype=torch.long, device=device)  # of it, fed
        self.summed = None  # [R, D] of all states, for their mean
        if self.reading.pooling == "mean":
            real = batch.attention_mask[..., None]
            self.summed = (wide(states) * real).sum(1).repeat_interleave(repeats, 0)
            self.count = batch.attention_mask.sum(1).repeat_interleave(repeats)
        self.rows = torch.arange(count, device=device)  # of the batch, in the results
        self.live = torch.ones(count, dtype=torch.bool, device=device)  # of the batch
        self.left = count  # how many are live
        self.finished = torch.zeros(count, dtype=torch.bool, device=device)
        self.embeddings = wide(self.hidden).new_zeros(self.hidden.shape)
        self.tokens: list[Tensor] = []
        self.log_probs: list[Tensor] = []
        if not closing:
            self._end(self.rows)

    @property
    def done(self) -> bool:
        return self.left == 0

    def step(self, uniform: Tensor | None) -> None:
        """Draw one token for every live row and feed it back."""
        inputs = self.retriever.inputs
        head = self.retriever.plain.lm_head
        shares = None if uniform is None else uniform[self.rows]
        drawn = []
        size = max(1, LOGITS_AT_ONCE // self.retriever.plain.config.get_text_config().vocab_size)
        for start in range(0, len(self.rows), size):
            part = slice(start, start + size)
            share = None if shares is None else shares[part]
            drawn.append(_draw(head(self.hidden[part]), share, self.temperature, inputs))
        token, logp = (torch.cat(x) for x in zip(*drawn, strict=True))
        ends = (token == inputs.closing[0]) & self.live & (self.closed == 0)
        self.finished[self.rows[ends]] = True
        writes = self.closed == 0
        self._write(token.where(writes, self._due), logp.where(writes, 0.0), writes & ~ends)

    def finish(self) -> Rollouts:
        """Close the rows that never ended: their embedding is the documented fallback."""
        while self.left:
            undrawn = self.embeddings.new_zeros(len(self.rows))
            self._write(self._due, undrawn, torch.zeros_like(self.live))
        count, pad = len(self.finished), self.retriever.inputs.filler
        ids = torch.stack(self.tokens, 1) if self.tokens else self.closing.new_empty(count, 0)
        drawn = torch.stack(self.log_probs, 1) if self.tokens else self.embeddings[:, :0]
        return Rollouts(
            ids.where(ids >= 0, pad), ids >= 0, drawn, self.finished, self.embeddings,
            max(0, len(self.closing) - 1),
        )  # fmt: skip

    @property
    def _due(self) -> Tensor:
        """The next token of what closes each row."""
        return self.closing[self.closed.clamp(max=len(self.closing) - 1)]

    def _write(self, token: Tensor, logp: Tensor, goes_on: Tensor) -> None:
        """Feed a token for each row, and read out those that it closes.

        Args:
            goes_on: [R] bool, whether it is of the summary and no part of its end.
        """
        self._record(token, logp)
        before = self.hidden
        self._feed(token)
        self.closed = self.closed + (~goes_on).long()
        ended = ((self.closed == len(self.closing)) & self.live).nonzero()[:, 0]
        if len(ended):
            self._end(ended, before)
            if 0 < self.left <= len(self.live) // 2:
                self._keep(self.live.nonzero()[:, 0])

    def _end(self, some: Tensor, before: Tensor | None = None) -> None:
        pooled = wide((self.hidden if self.read == "at_ret" else before)[some])
        if self.summed is not None:
            pooled = self.summed[some] / self.count[some, None]
        self.embeddings[self.rows[some]] = self.reading.scaled(pooled)
        self.live[some] = False
        self.left -= len(some)

    def _record(self, token: Tensor, logp: Tensor) -> None:
        count = len(self.finished)
        token, logp = token.where(self.live, -1), logp.where(self.live, 0.0)
        self.tokens.append(token.new_full((count,), -1).index_copy(0, self.rows, token))
        self.log_probs.append(logp.new_zeros(count).index_copy(0, self.rows, logp))

    def _feed(self, token: Tensor) -> None:
        seen = self.attention[:, : self.cache.get_seq_length() + 1]
        position = self.position[None, :, None].expand(3, -1, 1)
        self.hidden = self.retriever.read(token[:, None], [], seen, position, self.cache)[:, -1]
        self.position = self.position + 1
        if self.summed is not None:
            self.summed, self.count = self.summed + wide(self.hidden), self.count + 1

    def _keep(self, some: Tensor) -> None:
        self.rows, self.live, self.hidden = self.rows[some], self.live[some], self.hidden[some]
        self.attention, self.position = self.attention[some], self.position[some]
        self.closed = self.closed[some]
        if self.summed is not None:
            self.summed, self.count = self.summed[some], self.count[some]
        self.cache.batch_select_indices(some)


@dataclass
class Encoded:
    """Embeddings of a list of items, in its order, and the summaries they were read from."""

    embeddings: Tensor  # [n, D] fp32
    summaries: list[str]  # "" where nothing was written
    finished: Tensor | None = None  # [n] bool, whether a summary ended; of what writes one


def encode(
    retriever: Retriever,
    items: Sequence[Item],
    *,
    max_completion_length: int,
    batch_size: int = 512,
    read: ReadAt = "at_ret",
    progress: Callable[[int], None] | None = None,
) -> Encoded:
    """Greedy generative embeddings; batches by length, results in the caller's order.

    Args:
        items: pictures, texts or both, each with an optional `instruction`.
        max_completion_length: 0 reads a fixed prompt's end instead of a summary's.
        batch_size: rows at once; it changes an embedding by rounding only.
        read: where the embedding is read; see `sample`.
        progress: called after each batch with the rows finished so far.
    """
    prompts = [retriever.inputs.prompt(item) for item in items]
    embeddings = torch.zeros(len(items), retriever.embedding_size, dtype=retriever.embedding_dtype)
    finished = torch.zeros(len(items), dtype=torch.bool)
    summaries = [""] * len(items)
    decode = retriever.inputs.tokenizer.decode
    done = 0
    batches = [*batches_by_length([len(p) for p in prompts], batch_size)]
    for number, rows in enumerate(batches):
        retriever.cut_ahead(prompts[i] for some in batches[number : number + 2] for i in some)
        out = sample(
            retriever,
            [prompts[i] for i in rows],
            draws=None,
            max_completion_length=max_completion_length,
            read=read,
        )
        index = torch.tensor(rows)
        embeddings[index], finished[index] = out.embeddings.cpu(), out.finished.cpu()
        for i, ids, mask in zip(rows, out.ids, out.mask, strict=True):
            written = ids[mask][: int(mask.sum()) - out.forced]
            summaries[i] = str(decode(written, skip_special_tokens=True)).strip()
        done += len(rows)
        if progress is not None:
            progress(done)
    return Encoded(embeddings, summaries, finished)


def batches_by_length(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Indices in batches of at most `size`, rows of like length together."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    for start in range(0, len(order), size):
        yield order[start : start + size]
