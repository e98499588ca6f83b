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

void many_calls(unsigned seed) {
  for (ElvaDtype dtype : {ELVA_BF16, ELVA_FP16, ELVA_FP32, ELVA_FP64}) {
    for (int64_t dim : {1, 31, 32, 100}) {
      for (int64_t stride : {1, 3}) {
        one_call(dtype, 5, 9, dim, stride, false, seed);
        one_call(dtype, 3, 17, dim, stride, true, seed + 1);
        one_search(dtype, 6, 263, dim, stride, false, seed);
        one_search(dtype, 3, 21, dim, stride, true, seed + 1);
      }
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
