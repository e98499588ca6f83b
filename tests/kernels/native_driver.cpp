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

ElvaInput rows_of(const void* data, int64_t rows, int64_t dim, int64_t stride) {
  ElvaInput input = {};
  input.data = data;
  input.batch_strides[0] = rows * dim * stride;
  input.row_stride = dim * stride;
  input.stride = stride;
  return input;
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

  ElvaScoresArgs given = {};
  given.dtype = dtype == ELVA_FP64 ? ELVA_FP64 : ELVA_FP32;
  given.threads = 3;
  given.batch = args.batch;
  given.candidates = negatives + 1;
  given.weights = args.weights;
  given.scores = rows_of(scores.data(), 1, negatives + 1, 1);
  given.mask = args.mask;
  given.reward = reward.data();
  given.margin_reward = margin.data();
  given.rank_reward = rank_reward.data();
  given.rank = args.rank;
  std::vector<char> grad_scores(scores.size());
  given.grad_scores = grad_scores.data();
  if (elva_reward_from_scores_cpu(&given) != ELVA_OK) abort();
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

// The steps of an in-batch op, on b queries and m candidates.
void one_batch(ElvaDtype dtype, int64_t b, int64_t m, int64_t dim, int64_t stride, bool special,
               unsigned seed) {
  std::mt19937 random(seed);
  const ElvaDtype value_dtype = dtype == ELVA_FP64 ? ELVA_FP64 : ELVA_FP32;
  const int64_t value = dtype == ELVA_FP64 ? 8 : 4, width = (m + 15) / 16 * 16, k = 5;
  const auto block = [](int64_t bytes) { return std::vector<char>(static_cast<size_t>(bytes)); };
  const auto doubles = [](int64_t count) {
    return std::vector<double>(static_cast<size_t>(count));
  };
  const auto query = numbers(dtype, b * dim * stride, special, &random);
  const auto candidates = numbers(dtype, m * dim * stride, special, &random);
  auto query_unit = block(b * dim * value), candidate_unit = block(m * dim * value);
  auto query_norm = doubles(2 * b), candidate_norm = doubles(2 * m);
  ElvaUnitRowsArgs units = {dtype,
                            value_dtype,
                            3,
                            b,
                            dim,
                            rows_of(query.data(), b, dim, stride),
                            query_unit.data(),
                            query_norm.data()};
  if (elva_unit_rows_cpu(&units) != ELVA_OK) abort();
  units = {dtype,
           value_dtype,
           3,
           m,
           dim,
           rows_of(candidates.data(), m, dim, stride),
           candidate_unit.data(),
           candidate_norm.data()};
  if (elva_unit_rows_cpu(&units) != ELVA_OK) abort();

  auto scores = block(b * width * value);
  ElvaMatrixArgs product = {
      value_dtype,   3,     b,    m, dim, query_unit.data(), dim, 1, candidate_unit.data(), 1, dim,
      scores.data(), width, false};
  if (elva_matrix_product_cpu(&product) != ELVA_OK) abort();
  const auto penalty = block(width * value);
  std::vector<int64_t> target(static_cast<size_t>(b)), ids(static_cast<size_t>(m)),
      hardest = target;
  for (auto& t : target) t = static_cast<int64_t>(random() % static_cast<unsigned>(m));
  for (auto& id : ids) id = static_cast<int64_t>(random() % 5);
  std::vector<int32_t> greater(static_cast<size_t>(b)), equal = greater;
  auto own = block(b * value), peak = own, topk = block(b * k * value);
  std::vector<int64_t> topk_index(static_cast<size_t>(b * k));
  auto sum = doubles(b), moment = sum, column_sum = doubles(width), column_moment = column_sum;
  ElvaScoreRowsArgs rows = {value_dtype,
                            3,
                            b,
                            m,
                            width,
                            scores.data(),
                            penalty.data(),
                            query_norm.data(),
                            target.data(),
                            ids.data(),
                            0.5,
                            20.0,
                            k,
                            greater.data(),
                            equal.data(),
                            own.data(),
                            peak.data(),
                            hardest.data(),
                            topk.data(),
                            topk_index.data(),
                            sum.data(),
                            moment.data()};
  if (elva_score_rows_cpu(&rows) != ELVA_OK) abort();
  auto column_peak = block(width * value);
  ElvaColumnSumsArgs columns = {
      value_dtype,         3, b, width, scores.data(), 20.0, column_peak.data(), column_sum.data(),
      column_moment.data()};
  if (elva_column_sums_cpu(&columns) != ELVA_OK) abort();
  const auto zeros = block(width * value);
  ElvaSlopeRowsArgs slopes = {
      value_dtype,  3,          b,          width,         scores.data(),
      own.data(),   own.data(), own.data(), target.data(), column_peak.data(),
      zeros.data(), 20.0};
  if (elva_slope_rows_cpu(&slopes) != ELVA_OK) abort();
  auto grad_unit = block(m * dim * value);
  product = {value_dtype,      3,   m,   dim, b, scores.data(), 1, width, query_unit.data(), dim, 1,
             grad_unit.data(), dim, true};
  if (elva_matrix_product_cpu(&product) != ELVA_OK) abort();
  auto grad = block(m * dim * static_cast<int64_t>(size_of(dtype)));
  const ElvaUnitGradientArgs gradient = {
      dtype,      3, m, dim, candidate_unit.data(), grad_unit.data(), candidate_norm.data(),
      grad.data()};
  if (elva_unit_gradient_cpu(&gradient) != ELVA_OK) abort();
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
    one_call(dtype, 2, 0, 8, 1, false, seed);
    one_call(dtype, 2, 600, 16, 1, false, seed);
    one_call(dtype, 24, 20, 512, 1, false, seed);
    one_search(dtype, 9, 301, 512, 1, false, seed);
  }
}

}  // namespace

int main() {
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < 3; ++i) threads.emplace_back(many_calls, i);
  for (auto& thread : threads) thread.join();
  std::puts(elva_cpu_level());
  return 0;
}
