"""Rows of products for the step that masks and counts them, and what must come of each."""

import math

import torch

from elva_kernels.backends.cuda import launch

M, WIDTH, MAX_SCORE, TEMPERATURE = 300, 320, 0.9, 0.5


def on_fibers(case, table, temperature, results, keeps_scores=True):
    """By the CUDA kernel's body. Its ranks must be those of its counts."""
    rows, p = case.target.shape
    inverse = torch.nn.functional.pad(case.norms.float(), (0, WIDTH - M), value=torch.nan)
    query_inverse = case.query_norm[:, 0].float()
    given, segments = (query_inverse, inverse, case.target), (case.skipped, case.first, case.last)
    rank = torch.full((rows, p), -7, dtype=torch.int32)
    launch.module().cuda_score_rows(
        *(0, 0, rows, M, WIDTH, table.data_ptr(), keeps_scores, *(x.data_ptr() for x in given), p),
        *(*(x.data_ptr() for x in segments), 2, MAX_SCORE, temperature.data_ptr()),
        *(x.data_ptr() for x in (rank, *results)),
    )
    assert torch.equal(rank, results[0] + results[1] + (case.target != -1))


def on_fibers_in_products(case, table, temperature, results):
    """The same where scores are not kept: then only what is no negative's is overwritten."""
    before = table.clone()
    on_fibers(case, table, temperature, results, keeps_scores=False)
    assert (table.isnan() | (table == before)).all()
    bad = case.query_norm[:, :1].isnan() | torch.nn.functional.pad(
        case.norms.isnan(), (0, WIDTH - M)
    )
    counted = ~(table.isnan() | bad | (table > MAX_SCORE))
    table.copy_(torch.where(counted, table, -torch.inf))


class ScoreRows:
    """Products with ties, positives of every kind, and two segments of skipped candidates."""

    def __init__(self, positives, rows=5):
        draw = torch.Generator().manual_seed(positives)

        def integers(low, high, *shape):
            return torch.randint(low, high, shape, generator=draw)

        self.scores = integers(-8, 9, rows, M) / 8.0
        self.query_norm = torch.ones(rows, 2, dtype=torch.float64)
        self.query_norm[2, 0] = torch.nan
        self.norms = torch.ones(M, dtype=torch.float64)
        self.norms[[7, 290]] = torch.nan
        self.target = integers(-2, M, rows, positives)
        self.target[0, 0], self.target[1, 0], self.target[4, -1] = 290, 299, -1
        self.target[:, positives // 2] = self.target[:, 0]  # listed twice
        self.target[3] = -1
        self.skipped = integers(-3, M + 3, 40)  # some are no candidates
        self.skipped[20] = self.target[1, 0]
        self.first = integers(0, 20, rows, 2)
        self.last = self.first + torch.tensor([20, 0])
        self.last[1:, 1] += 10

    def own_score(self, i, p):
        j = int(self.target[i, p])
        if j == -1:
            return -math.inf
        if j == -2 or self.query_norm[i, 0].isnan() or self.norms[j].isnan():
            return math.nan
        return float(self.scores[i, j])

    def masked(self, i):
        """(the negatives' scores, -inf elsewhere; how many of the negatives are not finite)."""
        segments = zip(self.first[i], self.last[i], strict=True)
        named = torch.cat([self.target[i], *(self.skipped[first:last] for first, last in segments)])
        negative = torch.ones(M, dtype=torch.bool)
        negative[named[(named >= 0) & (named < M)]] = False
        sound = ~(self.norms.isnan() | self.query_norm[i, 0].isnan())
        counted = negative & sound & (self.scores[i] <= MAX_SCORE)
        row = torch.where(counted, self.scores[i], -torch.inf)
        padded = torch.nn.functional.pad(row, (0, WIDTH - M), value=-torch.inf)
        return padded, int((negative & ~sound).sum())

    def run(self, score_rows=on_fibers):
        """Masked scores, counts [2, rows, P], target_score, hardest score and index, sums."""
        rows, p = self.target.shape
        table = torch.nn.functional.pad(self.scores, (0, WIDTH - M))
        counts = torch.full((2, rows, p), -7, dtype=torch.int32)
        target_score, hardest = torch.zeros(rows, p), torch.zeros(rows)
        index = torch.zeros(rows, dtype=torch.int64)
        sums = torch.zeros(2, rows, dtype=torch.float64)
        temperature = torch.tensor([TEMPERATURE], dtype=torch.float64)
        results = (*counts, target_score, hardest, index, *sums)
        score_rows(self, table, temperature, results)
        return table, counts, target_score, hardest, index, sums


def check_results(case, table, counts, target_score, hardest, index, sums):
    """All of the results of a run."""
    for i in range(len(case.scores)):
        masked, unsound = case.masked(i)
        assert torch.equal(table[i], masked)
        assert hardest[i] == masked.max()
        assert index[i] == (masked.argmax() if hardest[i] > -torch.inf else -1)
        gaps = (masked - hardest[i])[masked > -torch.inf].double()
        assert math.isclose(sums[0, i], (2 * gaps).exp().sum(), rel_tol=1e-6)
        assert math.isclose(sums[1, i], (gaps * (2 * gaps).exp()).sum(), rel_tol=1e-6)
        for p in range(case.target.shape[1]):
            score = case.own_score(i, p)
            found = target_score[i, p].item()
            assert found == score or (math.isnan(found) and math.isnan(score))
            assert counts[:, i, p].tolist() == counts_of(masked, unsound, score)


def counts_of(masked, unsound, score):
    """[n_greater, n_equal] of a positive."""
    if score == -torch.inf:
        return [0, 0]
    if math.isnan(score):
        return [int((masked > -torch.inf).sum()), unsound]
    return [int((masked > score).sum()), int((masked == score).sum())]
