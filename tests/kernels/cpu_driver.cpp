// Calls the C API on exactly sized heap blocks, for the sanitizers: every dtype, dense and strided
// rows, masks, special values, from several threads at once. Exits with 0; the sanitizer speaks
// otherwise.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "elva.h"
#include "elva_in_batch.h"

namespace {

constexpr ElvaRewardWeights kWeights = {0.1, 0.01, 0.4, 0.6, 0};

size_t size_of(ElvaDtype dtype) { return dtype == ELVA_FP64 ? 8 : dtype == ELVA_FP32 ? 4 : 2; }

// Random finite numbers of any magnitude, and where `special` now and then a zero row's worth or a
// NaN.
std::vector<char> numbers(ElvaDtype dtype, int64_t count, bool special, std::mt19937* random) {
  std::vector<char> out(static_cast<size_t>(count) * size_of(dtype));
  std::normal_distribution<double> normal;
  for (int64_t i = 0; i < count; ++i) {
    double x = normal(*random);
    if (special && (*random)() % 97 == 0) x = std::nan("");
    if (dtype == ELVA_FP64) {
      memcpy(&out[static_cast<size_t>(i) * 8], &x, 8);
    } else if (dtype == ELVA_FP32) {
      const float narrow = static_cast<float>(special ? x * 1e30 : x);
      memcpy(&out[static_cast<size_t>(i) * 4], &narrow, 4);
    } else {
      const uint16_t bits = static_cast<uint16_t>((*random)() & (special ? 0xffff : 0xbbff));
      memcpy(&out[static_cast<size_t>(i) * 2], &bits, 2);
    }
  }
  return out;
}

// Numbers from 0 to 1, and where `special` now and then NaN.
template <class V>
std::vector<char> shares(int64_t count, bool special, std::mt19937* random) {
  std::vector<char> out(static_cast<size_t>(count) * sizeof(V));
  for (int64_t i = 0; i < count; ++i) {
    const bool none = special && (*random)() % 29 == 0;
    const V x = none ? static_cast<V>(std::nan("")) : static_cast<V>((*random)() % 9) / 8;
    memcpy(&out[static_cast<size_t>(i) * sizeof(V)], &x, sizeof(V));
  }
  return out;
}

ElvaInput rows_of(const void* data, int64_t rows, int64_t dim, int64_t stride) {
  ElvaInput input = {};
  input.data = data;
  input.batch_strides[0] = rows * dim * stride;
  input.row_stride = dim * stride;
  input.stride = stride;
  return input;
}

// The same call with the negatives as a bank, of which an index names rows that are there and
// others.
void one_bank(ElvaRewardArgs args, std::mt19937* random) {
  const int64_t places = args.batch.groups * args.negatives;
  args.bank_rows = places;
  std::vector<int64_t> index(static_cast<size_t>(places)), order,
      first(static_cast<size_t>(places + 1));
  for (auto& row : index) {
    row = static_cast<int64_t>((*random)() % static_cast<unsigned>(places + 3)) - 2;
  }
  for (int64_t row = 0; row < places; ++row) {
    first[static_cast<size_t>(row)] = static_cast<int64_t>(order.size());
    for (int64_t i = 0; i < places; ++i) {
      if (index[static_cast<size_t>(i)] == row) order.push_back(i);
    }
  }
  first.back() = static_cast<int64_t>(order.size());
  args.mask = {};
  args.index = rows_of(index.data(), 1, args.negatives, 1);
  args.grad_negative = nullptr;
  if (elva_reward_forward_cpu(&args) != ELVA_OK) abort();
  if (elva_reward_backward_cpu(&args) != ELVA_OK) abort();
  std::vector<char> gradient(static_cast<size_t>(places * args.dim) * size_of(args.dtype));
  ElvaBankGradientArgs bank = {};
  bank.dtype = args.dtype;
  bank.threads = args.threads;
  bank.batch = args.batch;
  bank.negatives = args.negatives;
  bank.dim = args.dim;
  bank.bank_rows = args.bank_rows;
  bank.query = args.query;
  bank.negative = args.negative;
  bank.upstream = args.upstream;
  bank.coefficients = args.coefficients;
  bank.order = order.data();
  bank.first = first.data();
  bank.grad_negative = gradient.data();
  if (elva_bank_gradient_cpu(&bank) != ELVA_OK) abort();
}

void one_call(ElvaDtype dtype, int64_t groups, int64_t negatives, int64_t dim, int64_t stride,
              bool special, unsigned seed) {
  std::mt19937 random(seed);
  const int64_t value = dtype == ELVA_FP64 ? 8 : 4;
  const auto query = numbers(dtype, groups * dim * stride, special, &random);
  const auto positive = numbers(dtype, groups * dim * stride, special, &random);
  const auto negative = numbers(dtype, groups * negatives * dim * stride, special, &random);
  std::vector<unsigned char> mask(static_cast<size_t>(groups * negatives));
  for (auto& live : mask) live = random() % 4 != 0;
  const auto relevance = dtype == ELVA_FP64 ? shares<double>(groups * negatives, special, &random)
                                            : shares<float>(groups * negatives, special, &random);
  const auto block = [](int64_t bytes) { return std::vector<char>(static_cast<size_t>(bytes)); };
  auto reward = block(groups * value), margin = reward, rank_reward = reward, upstream = reward;
  auto rank = block(groups * 4), scores = block(groups * (negatives + 1) * value);
  std::vector<double> coefficients(static_cast<size_t>(groups * (2 * negatives + 3)));
  auto grad_query = block(groups * dim * static_cast<int64_t>(size_of(dtype))),
       grad_positive = grad_query;
  auto grad_negative = block(groups * negatives * dim * static_cast<int64_t>(size_of(dtype)));
  ElvaRewardArgs args = {};
  args.dtype = dtype;
  args.threads = 3;
  args.batch.groups = args.batch.sizes[0] = groups;
  args.batch.ndim = 1;
  args.negatives = negatives;
  args.dim = dim;
  args.weights = kWeights;
  args.weights.rank_temperature = seed % 2 == 0 ? 0 : 0.05;
  args.query = rows_of(query.data(), 1, dim, stride);
  args.positive = rows_of(positive.data(), 1, dim, stride);
  args.negative = rows_of(negative.data(), negatives, dim, stride);
  if (negatives > 0) args.mask = rows_of(mask.data(), 1, negatives, 1);
  if (seed % 3 == 0) args.relevance = relevance.data();
  args.upstream.data = upstream.data();
  args.upstream.batch_strides[0] = 1;
  args.reward = reward.data();
  args.margin_reward = margin.data();
  args.rank_reward = rank_reward.data();
  args.rank = reinterpret_cast<int32_t*>(rank.data());
  args.scores = scores.data();
  args.coefficients = coefficients.data();
  if (elva_reward_forward_cpu(&args) != ELVA_OK) abort();
  args.grad_query = grad_query.data();
  args.grad_positive = grad_positive.data();
  args.grad_negative = grad_negative.data();
  if (elva_reward_forward_cpu(&args) != ELVA_OK) abort();
  if (elva_reward_backward_cpu(&args) != ELVA_OK) abort();
  for (int wanted = 0; wanted < 8; ++wanted) {
    args.grad_query = wanted & 1 ? grad_query.data() : nullptr;
    args.grad_positive = wanted & 2 ? grad_positive.data() : nullptr;
    args.grad_negative = wanted & 4 ? grad_negative.data() : nullptr;
    if (elva_reward_backward_cpu(&args) != ELVA_OK) abort();
  }
  if (groups * negatives > 0) one_bank(args, &random);

  ElvaScoresArgs given = {};
  given.dtype = dtype == ELVA_FP64 ? ELVA_FP64 : ELVA_FP32;
  given.threads = 3;
  given.batch = args.batch;
  given.candidates = negatives + 1;
  given.weights = args.weights;
  given.scores = rows_of(scores.data(), 1, negatives + 1, 1);
  given.mask = args.mask;
  given.relevance = args.relevance;
  given.reward = reward.data();
  given.margin_reward = margin.data();
  given.rank_reward = rank_reward.data();
  given.rank = args.rank;
  std::vector<char> grad_scores(scores.size());
  given.grad_scores = grad_scores.data();
  if (elva_reward_from_scores_cpu(&given) != ELVA_OK) abort();
}

void one_group_of_rewards(ElvaDtype dtype, int64_t groups, int64_t size, int64_t stride,
                          bool special, unsigned seed) {
  std::mt19937 random(seed);
  const auto reward = numbers(dtype, groups * size * stride, special, &random);
  std::vector<char> advantages(static_cast<size_t>(groups * size * (dtype == ELVA_FP64 ? 8 : 4)));
  for (ElvaScale scale : {ELVA_SCALE_STD, ELVA_SCALE_BATCH, ELVA_SCALE_NONE}) {
    ElvaAdvantagesArgs args = {};
    args.dtype = dtype;
    args.threads = 3;
    args.batch.groups = args.batch.sizes[0] = groups;
    args.batch.ndim = 1;
    args.size = size;
    args.scale = scale;
    args.std_eps = 1e-4;
    args.same_reward = 1e-6;
    args.reward = rows_of(reward.data(), 1, size, stride);
    args.advantages = advantages.data();
    if (elva_group_advantages_cpu(&args) != ELVA_OK) abort();
  }
}

void one_search(ElvaDtype dtype, int64_t queries, int64_t rows, int64_t dim, int64_t stride,
                bool special, unsigned seed) {
  std::mt19937 random(seed);
  const auto query = numbers(dtype, queries * dim * stride, special, &random);
  const auto corpus = numbers(dtype, rows * dim * stride, special, &random);
  for (int64_t k : {int64_t{1}, int64_t{7}, rows}) {
    std::vector<char> scores(static_cast<size_t>(queries * k * (dtype == ELVA_FP64 ? 8 : 4)));
    std::vector<int64_t> index(static_cast<size_t>(queries * k));
    ElvaTopkArgs args = {};
    args.dtype = dtype;
    args.threads = 3;
    args.metric = k == 7 ? ELVA_DOT : ELVA_COSINE;
    args.queries = queries;
    args.rows = rows;
    args.dim = dim;
    args.k = k;
    args.query = rows_of(query.data(), 1, dim, stride);
    args.corpus = rows_of(corpus.data(), 1, dim, stride);
    args.scores = scores.data();
    args.index = index.data();
    if (elva_topk_cpu(&args) != ELVA_OK) abort();
  }
}

// Unit rows of dense or strided ones: as values, or where `raw` as they are with a scale.
struct Units {
  ElvaDtype dtype, unit_dtype;
  int64_t count, dim;
  std::vector<char> rows, unit;
  std::vector<double> norm;
  int64_t width;
  std::vector<float> scale;

  Units(ElvaDtype dtype, bool raw, int64_t count, int64_t dim, int64_t stride, bool special,
        std::mt19937* random)
      : dtype(dtype),
        unit_dtype(raw                  ? ELVA_BF16
                   : dtype == ELVA_FP64 ? ELVA_FP64
                                        : ELVA_FP32),
        count(count),
        dim(dim),
        rows(numbers(dtype, count * dim * stride, special, random)),
        unit(static_cast<size_t>(count * dim) * size_of(unit_dtype)),
        norm(static_cast<size_t>(2 * count)),
        width((count + 15) / 16 * 16),
        scale(raw ? static_cast<size_t>(width) : 0) {
    ElvaUnitRowsArgs args = {};
    args.dtype = dtype;
    args.unit_dtype = unit_dtype;
    args.threads = 3;
    args.count = count;
    args.dim = dim;
    args.rows = rows_of(rows.data(), count, dim, stride);
    args.unit = unit.data();
    args.norm = norm.data();
    args.width = width;
    args.scale = scale.data();
    if (elva_unit_rows_cpu(&args) != ELVA_OK) abort();
  }

  double column_norm() const {
    double norm = 0;
    const ElvaColumnNormArgs args = {3, count, dim, unit.data(), scale.data(), &norm};
    if (elva_column_norm_cpu(&args) != ELVA_OK) abort();
    return norm;
  }

  // The gradient on the rows of one on the unit rows.
  void gradient(const std::vector<char>& grad_unit) const {
    std::vector<char> grad(static_cast<size_t>(count * dim) * size_of(dtype));
    const ElvaUnitGradientArgs args = {dtype,       unit_dtype,       3,           count,      dim,
                                       unit.data(), grad_unit.data(), norm.data(), grad.data()};
    if (elva_unit_gradient_cpu(&args) != ELVA_OK) abort();
  }
};

// out = a units, or += it, where a is [rows, units.count] with any strides; in one half where
// `allowed` is large, in two where it is 0.
void multiply(const void* a, int64_t row_stride, int64_t stride, int64_t rows, const Units& units,
              double allowed, bool add, std::vector<char>* out) {
  const bool raw = units.unit_dtype == ELVA_BF16;
  ElvaMatrixArgs args = {};
  args.a_dtype = raw ? ELVA_FP32 : units.unit_dtype;
  args.b_dtype = units.unit_dtype;
  args.threads = 3;
  args.m = rows;
  args.n = units.dim;
  args.k = units.count;
  args.a = a;
  args.a_row_stride = row_stride;
  args.a_stride = stride;
  args.b = units.unit.data();
  args.b_row_stride = units.dim;
  args.b_stride = 1;
  args.c = out->data();
  args.c_row_stride = units.dim;
  args.add = add;
  if (raw) {
    args.a_scale = units.scale.data();
    args.allowed = allowed;
  }
  if (elva_matrix_product_cpu(&args) != ELVA_OK) abort();
}

// The steps of an in-batch op, on b queries and m candidates.
void one_batch(ElvaDtype dtype, int64_t b, int64_t m, int64_t dim, int64_t stride, bool special,
               unsigned seed) {
  std::mt19937 random(seed);
  const bool raw = dtype == ELVA_BF16 && elva_multiplies_bf16();
  const ElvaDtype value_dtype = dtype == ELVA_FP64 ? ELVA_FP64 : ELVA_FP32;
  const int64_t value = dtype == ELVA_FP64 ? 8 : 4, width = (m + 15) / 16 * 16, k = m < 5 ? m : 5;
  const auto block = [](int64_t bytes) { return std::vector<char>(static_cast<size_t>(bytes)); };
  const auto doubles = [](int64_t count) {
    return std::vector<double>(static_cast<size_t>(count));
  };
  Units query(dtype, raw, b, dim, stride, special, &random);
  const Units candidates(dtype, raw, m, dim, stride, special, &random);

  auto scores = block(b * width * value), exclusion = block(width * value);
  const ElvaExclusionArgs excluding = {value_dtype, m, width, candidates.norm.data(),
                                       exclusion.data()};
  if (elva_exclusion_cpu(&excluding) != ELVA_OK) abort();
  ElvaMatrixArgs product = {};
  product.a_dtype = product.b_dtype = query.unit_dtype;
  product.threads = 3;
  product.m = b;
  product.n = m;
  product.k = dim;
  product.a = query.unit.data();
  product.a_row_stride = product.b_stride = dim;
  product.a_stride = product.b_row_stride = 1;
  product.b = candidates.unit.data();
  product.c = scores.data();
  product.c_row_stride = width;
  if (elva_matrix_product_cpu(&product) != ELVA_OK) abort();

  constexpr int64_t kPositives = 3;
  const int64_t pairs = b * kPositives;
  const auto a_candidate = [&] {
    return static_cast<int64_t>(random() % static_cast<unsigned>(m));
  };
  std::vector<int64_t> target(static_cast<size_t>(pairs)),
      row_of_pair = target, column_of_pair = target, skipped(static_cast<size_t>(2 * b)),
      first(static_cast<size_t>(b)), last = first, hardest = first,
      topk_index(static_cast<size_t>(b * k));
  for (size_t i = 0; i < target.size(); ++i) {
    target[i] = i % 5 == 4 ? -1 : a_candidate();
    row_of_pair[i] = static_cast<int64_t>(i) / kPositives;
    column_of_pair[i] = target[i] < 0 ? 0 : target[i];
  }
  for (auto& j : skipped) j = a_candidate();
  for (size_t i = 0; i < first.size(); ++i) {
    first[i] = static_cast<int64_t>(2 * i);
    last[i] = first[i] + static_cast<int64_t>(i % 3);
  }
  std::vector<int32_t> greater(static_cast<size_t>(pairs)), equal = greater, rank = greater;
  auto own = block(pairs * value), peak = block(b * value), topk = block(b * k * value);
  auto sum = doubles(b), moment = sum;
  auto loss = doubles(pairs), share = loss, others = loss, heat = loss;
  ElvaScoreRowsArgs rows = {};
  rows.dtype = value_dtype;
  rows.threads = 3;
  rows.rows = b;
  rows.candidates = m;
  rows.width = width;
  rows.scores = scores.data();
  rows.exclusion = exclusion.data();
  rows.scale = raw ? candidates.scale.data() : nullptr;
  rows.norm = query.norm.data();
  rows.target = target.data();
  rows.positives = kPositives;
  rows.skipped = skipped.data();
  rows.skipped_first = first.data();
  rows.skipped_last = last.data();
  rows.segments = 1;
  rows.max_score = 0.5;
  rows.inverse_temperature = 20.0;
  rows.k = k;
  rows.rank = rank.data();
  rows.n_greater = greater.data();
  rows.n_equal = equal.data();
  rows.target_score = own.data();
  rows.hardest_score = peak.data();
  rows.hardest_index = hardest.data();
  rows.topk_scores = topk.data();
  rows.topk_index = topk_index.data();
  rows.sum = sum.data();
  rows.moment = moment.data();
  if (elva_score_rows_cpu(&rows) != ELVA_OK) abort();

  auto column_peak = block(width * value);
  auto column_sum = doubles(width), column_moment = column_sum;
  const ElvaColumnSumsArgs columns = {
      value_dtype,         3, b, width, scores.data(), 20.0, column_peak.data(), column_sum.data(),
      column_moment.data()};
  if (elva_column_sums_cpu(&columns) != ELVA_OK) abort();
  ElvaInfoNceTermsArgs terms = {value_dtype, pairs,        own.data(),    row_of_pair.data(),
                                peak.data(), sum.data(),   moment.data(), 0.05,
                                loss.data(), share.data(), others.data(), heat.data()};
  if (elva_info_nce_terms_cpu(&terms) != ELVA_OK) abort();
  terms.at = column_of_pair.data();
  terms.peak = column_peak.data();
  terms.sum = column_sum.data();
  terms.moment = column_moment.data();
  if (elva_info_nce_terms_cpu(&terms) != ELVA_OK) abort();

  const auto factor = block(width * value), of_pairs = block(pairs * value);
  const ElvaSlopeRowsArgs slopes = {value_dtype,
                                    3,
                                    b,
                                    width,
                                    scores.data(),
                                    of_pairs.data(),
                                    of_pairs.data(),
                                    of_pairs.data(),
                                    target.data(),
                                    kPositives,
                                    column_peak.data(),
                                    factor.data(),
                                    20.0};
  if (elva_slope_rows_cpu(&slopes) != ELVA_OK) abort();
  auto grad_query = block(b * dim * value), grad_candidates = block(m * dim * value);
  for (double allowed : {0.0, raw ? 1e-2 / (1 + candidates.column_norm()) : 0.0, 1e30}) {
    multiply(scores.data(), width, 1, b, candidates, allowed, false, &grad_query);
    multiply(scores.data(), 1, width, m, query, allowed, true, &grad_candidates);
  }
  if (raw) {
    const auto weights = std::vector<float>(static_cast<size_t>(pairs), 0.5f);
    ElvaAddRowsArgs add = {};
    add.threads = 3;
    add.count = pairs;
    add.dim = dim;
    add.positives = kPositives;
    add.target = target.data();
    add.slope = weights.data();
    add.scale = candidates.scale.data();
    add.rows = candidates.unit.data();
    add.out = reinterpret_cast<float*>(grad_query.data());
    add.out_count = b;
    if (elva_add_rows_cpu(&add) != ELVA_OK) abort();
    add.into_targets = true;
    add.scale = query.scale.data();
    add.rows = query.unit.data();
    add.out = reinterpret_cast<float*>(grad_candidates.data());
    add.out_count = m;
    if (elva_add_rows_cpu(&add) != ELVA_OK) abort();
  }
  const ElvaSpreadRowsArgs spread = {
      value_dtype, 3, b, kPositives, width, target.data(), of_pairs.data(), scores.data()};
  if (elva_spread_rows_cpu(&spread) != ELVA_OK) abort();
  const ElvaSpoilArgs spoil = {
      b, kPositives, m, target.data(), candidates.norm.data(), query.norm.data()};
  if (elva_spoil_cpu(&spoil) != ELVA_OK) abort();
  query.gradient(grad_query);
  candidates.gradient(grad_candidates);
}

// Blocks of a few sizes, held two at a time and written to their ends.
void many_blocks(unsigned seed) {
  std::mt19937 random(seed);
  ElvaBlock held[2] = {};
  for (int i = 0; i < 200; ++i) {
    ElvaBlock& block = held[i % 2];
    if (block.data != nullptr) elva_release_block(&block);
    const int64_t bytes = 1 + static_cast<int64_t>(random() % (5u << 20));
    if (elva_acquire_block(bytes, &block) != ELVA_OK || block.bytes < bytes) abort();
    static_cast<char*>(block.data)[0] = static_cast<char*>(block.data)[bytes - 1] = 1;
  }
  for (const ElvaBlock& block : held) elva_release_block(&block);
}

void many_calls(unsigned seed) {
  many_blocks(seed);
  for (ElvaDtype dtype : {ELVA_BF16, ELVA_FP16, ELVA_FP32, ELVA_FP64}) {
    for (int64_t dim : {1, 31, 32, 100}) {
      for (int64_t stride : {1, 3}) {
        one_call(dtype, 5, 9, dim, stride, false, seed);
        one_call(dtype, 3, 17, dim, stride, true, seed + 1);
        one_search(dtype, 6, 263, dim, stride, false, seed);
        one_search(dtype, 3, 21, dim, stride, true, seed + 1);
      }
    }
    for (int64_t stride : {1, 3}) {
      one_batch(dtype, 7, 37, 33, stride, stride == 3, seed);
      one_batch(dtype, 1, 1, 1, stride, false, seed);
      one_batch(dtype, 230, 70, 200, stride, stride == 1, seed);
    }
    one_group_of_rewards(dtype, 3, 1, 1, false, seed);
    one_group_of_rewards(dtype, 3000, 9, 3, true, seed);
    one_call(dtype, 2, 0, 8, 1, false, seed);
    one_call(dtype, 2, 600, 16, 1, false, seed);
    one_call(dtype, 24, 20, 512, 1, false, seed);
    one_search(dtype, 9, 301, 512, 1, false, seed);
  }
}

}  // namespace

// The argument: the number of threads that call at once, each with a seed of its own.
int main(int argc, char** arguments) {
  if (argc != 2) return 2;
  std::vector<std::thread> threads;
  const auto count = static_cast<unsigned>(std::atoi(arguments[1]));
  for (unsigned i = 0; i < count; ++i) threads.emplace_back(many_calls, i);
  for (auto& thread : threads) thread.join();
  std::puts(elva_cpu_level());
  return 0;
}
