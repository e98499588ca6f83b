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
from transformers import DynamicCache

from elva.data import Item
from elva.model.inputs import Inputs, Prompt, PromptBatch
from elva.model.retriever import Retriever

Reading = Literal["at_ret", "before_ret"]


@dataclass
class Rollouts:
    """R = prompts * G completions, padded on the right; row i * G + g is rollout g of prompt i."""

    ids: Tensor  # [R, T] int64; the last real token of every row is [RET]
    mask: Tensor  # [R, T] bool, True where real
    log_probs: Tensor  # [R, T] fp32, 0 where masked or where the token was not drawn
    finished: Tensor  # [R] bool: False where [RET] had to be appended at the length limit
    embeddings: Tensor  # [R, D] fp32: hidden state at [RET]

    @staticmethod
    def cat(parts: Sequence[Rollouts], pad: int) -> Rollouts:
        """Join along the rows, padding to the longest; `pad` must be an id that may be written, or
        its log-probability is -inf and its gradient NaN."""
        width = max(p.ids.shape[1] for p in parts)

        def wide(x: Tensor, value: float) -> Tensor:
            return torch.nn.functional.pad(x, (0, width - x.shape[1]), value=value)

        return Rollouts(
            torch.cat([wide(p.ids, pad) for p in parts]),
            torch.cat([wide(p.mask, False) for p in parts]),
            torch.cat([wide(p.log_probs, 0.0) for p in parts]),
            torch.cat([p.finished for p in parts]),
            torch.cat([p.embeddings for p in parts]),
        )

    def select(self, rows: Tensor) -> Rollouts:
        width = int(self.mask[rows].sum(1).max())
        return Rollouts(
            self.ids[rows, :width],
            self.mask[rows, :width],
            self.log_probs[rows, :width],
            self.finished[rows],
            self.embeddings[rows],
        )


def wide(x: Tensor) -> Tensor:
    """In fp32, or in fp64 where it is that."""
    return x if x.dtype == torch.float64 else x.float()


def token_log_probs(logits: Tensor, tokens: Tensor, temperature: float, inputs: Inputs) -> Tensor:
    """log pi(token) [...] of logits [..., V]: the distribution that `sample` draws from.

    To end is one action: [RET] has the probability of itself and of the chat's ends together, none
    of which is ever written.
    """
    scaled = wide(logits) / temperature
    banned = torch.tensor(inputs.banned_ids, dtype=torch.int64, device=scaled.device)
    drawn = scaled.gather(-1, tokens[..., None])[..., 0]
    ends = scaled[..., [inputs.ret_id, *inputs.end_ids]].logsumexp(-1)
    total = scaled.index_fill(-1, banned, float("-inf")).logsumexp(-1)
    return torch.where(tokens == inputs.ret_id, ends, drawn) - total


def _distribution(logits: Tensor, temperature: float, inputs: Inputs) -> Tensor:
    """The same of every token, [..., V]; -inf for what is never written."""
    scaled = wide(logits) / temperature
    ends = scaled[..., [inputs.ret_id, *inputs.end_ids]].logsumexp(-1)
    never = torch.tensor([*inputs.banned_ids, *inputs.end_ids], device=scaled.device)
    scaled.index_fill_(-1, never, float("-inf"))
    scaled[..., inputs.ret_id] = ends
    return scaled.log_softmax(-1)


@torch.no_grad()
def sample(
    retriever: Retriever,
    prompts: Sequence[Prompt],
    *,
    draws: Tensor | None,
    max_completion_length: int,
    temperature: float = 1.0,
    read: Reading = "at_ret",
) -> Rollouts:
    """Sample G summaries a prompt, each ended by [RET], where the model ends its answer.

    Args:
        draws: [len(prompts), G, max_completion_length] uniform numbers, one a token; None decodes
            greedily with G = 1. top-k and top-p are never applied: the log-probabilities are those
            of the distribution that was drawn from.
        max_completion_length: tokens before [RET] is appended to a row that did not write it; 0
            reads the prompt alone.
        read: the hidden state at [RET] (ELVA), or at the token before it (LamRA).

    Returns:
        Rollouts of len(prompts) * G rows on the model's device, in order.
    """
    batch = retriever.inputs.collate(prompts, retriever.device)
    repeats = 1 if draws is None else draws.shape[1]
    decoder = _Decoder(retriever, batch, repeats, temperature, read)
    uniform = None if draws is None else draws.flatten(0, 1).to(batch.input_ids.device)
    for step in range(max_completion_length):
        decoder.step(None if uniform is None else uniform[:, step])
        if decoder.done:
            break
    return decoder.finish()


class _Decoder:
    """The state of one batched decoding; rows leave it when [RET] has been fed back."""

    def __init__(
        self,
        retriever: Retriever,
        batch: PromptBatch,
        repeats: int,
        temperature: float,
        read: Reading,
    ) -> None:
        self.read = read
        self.retriever, self.temperature = retriever, temperature
        self.cache = DynamicCache(config=retriever.decoder.config)
        states = retriever.read(
            batch.input_ids, batch.images, batch.attention_mask, batch.position_ids,
            self.cache,
        )  # fmt: skip
        if repeats > 1:
            self.cache.batch_repeat_interleave(repeats)
        self.hidden = states[:, -1].repeat_interleave(repeats, 0)
        self.attention = batch.attention_mask.repeat_interleave(repeats, 0)
        self.position = (batch.position_ids.amax(dim=(0, 2)) + 1).repeat_interleave(repeats)
        count, device = len(self.hidden), self.hidden.device
        self.live = torch.arange(count, device=device)  # rows still decoding
        self.finished = torch.zeros(count, dtype=torch.bool, device=device)
        self.embeddings = wide(self.hidden).new_zeros(self.hidden.shape)
        self.tokens: list[Tensor] = []
        self.log_probs: list[Tensor] = []

    @property
    def done(self) -> bool:
        return len(self.live) == 0

    def step(self, uniform: Tensor | None) -> None:
        """Draw one token for every live row and feed it back."""
        logp = _distribution(
            self.retriever.plain.lm_head(self.hidden), self.temperature, self.retriever.inputs
        )
        if uniform is None:
            token = logp.argmax(-1)
        else:
            cdf = logp.exp().cumsum(-1, dtype=torch.float64)
            threshold = uniform[self.live, None] * cdf[:, -1:]
            token = torch.searchsorted(cdf, threshold, right=True)[:, 0].clamp_(
                max=cdf.shape[1] - 1
            )
        self._record(token, logp.gather(-1, token[:, None])[:, 0])
        before = self.hidden
        self._feed(token)
        ended = token == self.retriever.inputs.ret_id
        if bool(ended.any()):
            at = self.hidden if self.read == "at_ret" else before
            self.embeddings[self.live[ended]] = wide(at[ended])
            self.finished[self.live[ended]] = True
            self._keep(~ended)

    def finish(self) -> Rollouts:
        """Append [RET] to the rows that never wrote it: their embedding is the documented
        fallback."""
        if len(self.live):
            ret = torch.full_like(self.live, self.retriever.inputs.ret_id)
            self._record(ret, self.embeddings.new_zeros(len(ret)))
            before = self.hidden
            self._feed(ret)
            self.embeddings[self.live] = wide(self.hidden if self.read == "at_ret" else before)
        ids = torch.stack(self.tokens, 1)
        return Rollouts(
            ids.where(ids >= 0, self.retriever.inputs.ret_id),
            ids >= 0,
            torch.stack(self.log_probs, 1),
            self.finished,
            self.embeddings,
        )

    def _record(self, token: Tensor, logp: Tensor) -> None:
        count = len(self.finished)
        self.tokens.append(token.new_full((count,), -1).index_copy(0, self.live, token))
        self.log_probs.append(logp.new_zeros(count).index_copy(0, self.live, logp))

    def _feed(self, token: Tensor) -> None:
        self.attention = torch.cat([self.attention, self.attention.new_ones(len(token), 1)], 1)
        states = self.retriever.read(
            token[:, None], [], self.attention, self.position[None, :, None].expand(3, -1, 1),
            self.cache,
        )  # fmt: skip
        self.hidden = states[:, -1]
        self.position = self.position + 1

    def _keep(self, keep: Tensor) -> None:
        rows = keep.nonzero()[:, 0]
        self.live, self.hidden = self.live[rows], self.hidden[rows]
        self.attention, self.position = self.attention[rows], self.position[rows]
        if len(rows):
            self.cache.batch_select_indices(rows)


@dataclass
class Encoded:
    """Embeddings of a list of items, in its order, and the summaries they were read from."""

    embeddings: Tensor  # [n, D] fp32
    summaries: list[str]
    finished: Tensor  # [n] bool


def encode(
    retriever: Retriever,
    items: Sequence[Item],
    *,
    max_completion_length: int,
    batch_size: int = 512,
    read: Reading = "at_ret",
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
    for rows in batches_by_length([len(p) for p in prompts], batch_size):
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
            summaries[i] = str(decode(ids[mask], skip_special_tokens=True)).strip()
        done += len(rows)
        if progress is not None:
            progress(done)
    return Encoded(embeddings, summaries, finished)


def batches_by_length(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Indices in batches of at most `size`, rows of like length together."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    for start in range(0, len(order), size):
        yield order[start : start + size]
