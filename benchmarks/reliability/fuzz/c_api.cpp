// libFuzzer's target: the functions of csrc/elva.h on shapes, strides and values that its bytes
// say, in blocks of exactly the memory that the arguments describe. The sanitizers speak where
// another byte is touched; a status that is not ELVA_OK, or a result that is against its own rule,
// ends it.
#include <fuzzer/FuzzedDataProvider.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "elva.h"

namespace {

void expect(bool right) {
  if (!right) abort();
}

void expect_ok(ElvaStatus status) { expect(status == ELVA_OK); }

size_t size_of(ElvaDtype dtype) { return dtype == ELVA_FP64 ? 8 : dtype == ELVA_FP32 ? 4 : 2; }

ElvaDtype value_of(ElvaDtype dtype) { return dtype == ELVA_FP64 ? ELVA_FP64 : ELVA_FP32; }

// Structure of the fuzzer's bytes; values of a generator that they seed.
class Draw {
 public:
  Draw(const uint8_t* data, size_t size) : bytes_(data, size) {
    values_.seed(bytes_.ConsumeIntegral<uint32_t>());
    kind_ = bytes_.ConsumeIntegralInRange<int>(0, 3);
    threads = bytes_.ConsumeIntegralInRange<int>(1, 3);
    dtype = static_cast<ElvaDtype>(bytes_.ConsumeIntegralInRange<int>(0, 3));
  }

  int64_t from(int64_t low, int64_t high) { return bytes_.ConsumeIntegralInRange(low, high); }
  bool maybe() { return bytes_.ConsumeBool(); }

  // A size that is mostly small, and now and then beyond an inner loop's blocks.
  int64_t size(int64_t low, int64_t most) {
    return from(low, maybe() ? std::min<int64_t>(most, 40) : most);
  }

  // `count` elements: any bits; few values, so that scores tie; or numbers of any magnitude.
  void fill(ElvaDtype of, char* to, int64_t count) {
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < count; ++i) {
      uint64_t bits = values_();
      bits = bits << 32 | values_();
      if (kind_ != 0 && !(kind_ == 1 && bits % 97 == 0)) {
        const double x = kind_ == 2 ? static_cast<double>(bits % 3) - 1 : normal(values_);
        const float narrow = static_cast<float>(kind_ == 3 ? std::ldexp(x, bits % 256 - 128) : x);
        uint32_t wide;
        memcpy(&wide, &narrow, 4);
        if (of == ELVA_FP64) memcpy(&bits, &x, 8);
        if (of == ELVA_FP32) bits = wide;
        if (of == ELVA_BF16) bits = wide >> 16;
        if (of == ELVA_FP16) bits = bits % 0x7c00 | (bits >> 40 & 1) << 15;
      }
      memcpy(to + static_cast<size_t>(i) * size_of(of), &bits, size_of(of));
    }
  }

  int threads;
  ElvaDtype dtype;

 private:
  FuzzedDataProvider bytes_;
  std::mt19937 values_;
  int kind_;
};

// Memory of exactly so many bytes, at an address that only its element's size divides.
class Block {
 public:
  Block(int64_t count, size_t element)
      : all_(new char[static_cast<size_t>(count) * element + element]), data(&all_[element]) {
    memset(data, 0, static_cast<size_t>(count) * element);
  }

 private:
  std::unique_ptr<char[]> all_;

 public:
  char* const data;
};

// All memory of a call.
class Memory {
 public:
  explicit Memory(Draw* draw) : draw_(draw) {}

  template <class T = void>
  T* out(int64_t count, size_t element = sizeof(std::conditional_t<std::is_void_v<T>, char, T>)) {
    blocks_.push_back(std::make_unique<Block>(count, element));
    return reinterpret_cast<T*>(blocks_.back()->data);
  }

  void* values(ElvaDtype dtype, int64_t count) {
    char* data = out<char>(count, size_of(dtype));
    draw_->fill(dtype, data, count);
    return data;
  }

  // An operand of the batch's dimensions and then `rows` (none for -1) and `dim` (likewise), of any
  // strides that lie in its block: dense, padded, expanded, in another order. fill(data, count)
  // fills a block.
  template <class Fill>
  ElvaInput laid(const ElvaBatch& batch, int64_t rows, int64_t dim, size_t element,
                 const Fill& fill) {
    ElvaInput input = {};
    std::vector<std::pair<int64_t, int64_t*>> sizes;
    for (int i = 0; i < batch.ndim; ++i) sizes.push_back({batch.sizes[i], &input.batch_strides[i]});
    if (rows >= 0) sizes.push_back({rows, &input.row_stride});
    if (dim >= 0) sizes.push_back({dim, &input.stride});
    int64_t span = 1;
    const bool reversed = draw_->maybe();
    for (size_t i = 0; i < sizes.size(); ++i) {
      auto& [size, stride] = sizes[reversed ? i : sizes.size() - 1 - i];
      const int64_t choice = draw_->from(0, 9);
      *stride = choice == 0 ? 0 : choice == 1 ? span + draw_->from(0, 3) : span;
      if (*stride != 0 && size > 0) span = *stride * (size - 1) + span;
    }
    char* data = out<char>(span, element);
    fill(data, span);
    input.data = data;
    return input;
  }

  ElvaInput laid(const ElvaBatch& batch, int64_t rows, int64_t dim, ElvaDtype dtype) {
    return laid(batch, rows, dim, size_of(dtype),
                [&](char* data, int64_t count) { draw_->fill(dtype, data, count); });
  }

  ElvaInput mask(const ElvaBatch& batch, int64_t count) {
    return laid(batch, -1, count, 1, [&](char* data, int64_t size) {
      for (int64_t i = 0; i < size; ++i) data[i] = draw_->maybe();
    });
  }

  ElvaInput index(const ElvaBatch& batch, int64_t count, int64_t rows) {
    return laid(batch, -1, count, sizeof(int64_t), [&](char* data, int64_t size) {
      for (int64_t i = 0; i < size; ++i) {
        const int64_t row = draw_->from(-3, rows + 2);
        memcpy(data + 8 * i, &row, 8);
      }
    });
  }

 private:
  Draw* draw_;
  std::vector<std::unique_ptr<Block>> blocks_;
};

ElvaBatch batch_of(Draw* draw) {
  ElvaBatch batch = {};
  batch.ndim = static_cast<int32_t>(draw->from(0, 3));
  batch.groups = 1;
  for (int i = 0; i < batch.ndim; ++i) batch.groups *= batch.sizes[i] = draw->from(0, 4);
  return batch;
}

ElvaRewardWeights weights_of(Draw* draw) {
  const double scales[] = {0, 1e-6, 0.05, 1, 1e6};
  return {0.1, 0.01, 0.4, 0.6, scales[draw->from(0, 4)]};
}

// Ranks lie between 1 and the number of candidates.
void check_ranks(const int32_t* rank, int64_t groups, int64_t candidates) {
  for (int64_t i = 0; i < groups; ++i) expect(rank[i] >= 1 && rank[i] <= candidates);
}

ElvaRewardArgs reward_of(Draw* draw, Memory* memory) {
  ElvaRewardArgs args = {};
  args.dtype = draw->dtype;
  args.threads = draw->threads;
  args.batch = batch_of(draw);
  args.negatives = draw->size(0, 600);
  args.dim = draw->size(1, args.negatives > 40 ? 48 : 300);
  args.weights = weights_of(draw);
  args.query = memory->laid(args.batch, -1, args.dim, args.dtype);
  args.positive = memory->laid(args.batch, -1, args.dim, args.dtype);
  const bool bank = draw->maybe();
  if (bank) {
    args.bank_rows = draw->from(1, 50);
    args.index = memory->index(args.batch, args.negatives, args.bank_rows);
  }
  const ElvaBatch none = {1, 0, {}};
  args.negative = memory->laid(bank ? none : args.batch, bank ? args.bank_rows : args.negatives,
                               args.dim, args.dtype);
  if (!bank && draw->maybe()) args.mask = memory->mask(args.batch, args.negatives);
  const ElvaDtype value = value_of(args.dtype);
  const int64_t groups = args.batch.groups;
  if (draw->maybe()) args.relevance = memory->values(value, groups * args.negatives);
  if (draw->maybe()) args.upstream = memory->laid(args.batch, -1, -1, value);
  args.reward = memory->out(groups, size_of(value));
  args.margin_reward = memory->out(groups, size_of(value));
  args.rank_reward = memory->out(groups, size_of(value));
  args.rank = memory->out<int32_t>(groups);
  args.scores = memory->out(groups * (args.negatives + 1), size_of(value));
  args.coefficients = memory->out<double>(groups * (2 * args.negatives + 3));
  return args;
}

void want_gradients(Draw* draw, Memory* memory, ElvaRewardArgs* args) {
  const int64_t groups = args->batch.groups, dim = args->dim;
  const size_t element = size_of(args->dtype);
  if (draw->maybe()) args->grad_query = memory->out(groups * dim, element);
  if (draw->maybe()) args->grad_positive = memory->out(groups * dim, element);
  if (args->index.data == nullptr && draw->maybe()) {
    args->grad_negative = memory->out(groups * args->negatives * dim, element);
  }
}

// The places of an index by row, as the gradient of a bank asks for them.
void bank_gradient(Memory* memory, const ElvaRewardArgs& args) {
  int64_t* order = memory->out<int64_t>(args.batch.groups * args.negatives);
  int64_t* first = memory->out<int64_t>(args.bank_rows + 1);
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
  int64_t count = 0;
  for (int64_t row = 0; row < args.bank_rows; ++row) {
    first[row] = count;
    for (int64_t g = 0; g < args.batch.groups; ++g) {
      int64_t at = 0, rest = g;
      for (int i = args.batch.ndim; i-- > 0; rest /= args.batch.sizes[i]) {
        at += rest % args.batch.sizes[i] * args.index.batch_strides[i];
      }
      for (int64_t n = 0; n < args.negatives; ++n) {
        int64_t named;
        memcpy(&named, static_cast<const int64_t*>(args.index.data) + at + n * args.index.stride,
               8);
        if (named == row) order[count++] = g * args.negatives + n;
      }
    }
  }
  first[args.bank_rows] = count;
  bank.order = order;
  bank.first = first;
  bank.grad_negative = memory->out(args.bank_rows * args.dim, size_of(args.dtype));
  expect_ok(elva_bank_gradient_cpu(&bank));
}

void reward(Draw* draw, Memory* memory) {
  ElvaRewardArgs args = reward_of(draw, memory);
  expect_ok(elva_reward_forward_cpu(&args));
  check_ranks(args.rank, args.batch.groups, args.negatives + 1);
  want_gradients(draw, memory, &args);
  expect_ok(elva_reward_backward_cpu(&args));
  if (draw->maybe()) expect_ok(elva_reward_forward_cpu(&args));
  if (args.index.data != nullptr) bank_gradient(memory, args);
}

void reward_from_scores(Draw* draw, Memory* memory) {
  ElvaScoresArgs args = {};
  args.dtype = value_of(draw->dtype);
  args.threads = draw->threads;
  args.batch = batch_of(draw);
  args.candidates = draw->size(1, 1200);
  args.weights = weights_of(draw);
  args.scores = memory->laid(args.batch, -1, args.candidates, args.dtype);
  if (draw->maybe()) args.mask = memory->mask(args.batch, args.candidates - 1);
  const int64_t groups = args.batch.groups;
  const size_t element = size_of(args.dtype);
  if (draw->maybe()) args.relevance = memory->values(args.dtype, groups * (args.candidates - 1));
  if (draw->maybe()) args.upstream = memory->laid(args.batch, -1, -1, args.dtype);
  const bool gradient = draw->maybe();
  if (gradient) args.grad_scores = memory->out(groups * args.candidates, element);
  if (!gradient || draw->maybe()) {
    args.reward = memory->out(groups, element);
    args.margin_reward = memory->out(groups, element);
    args.rank_reward = memory->out(groups, element);
    args.rank = memory->out<int32_t>(groups);
  }
  expect_ok(elva_reward_from_scores_cpu(&args));
  if (args.rank != nullptr) check_ranks(args.rank, groups, args.candidates);
}

void advantages(Draw* draw, Memory* memory) {
  ElvaAdvantagesArgs args = {};
  args.dtype = draw->dtype;
  args.threads = draw->threads;
  args.batch = batch_of(draw);
  args.size = draw->size(1, 300);
  args.scale = static_cast<ElvaScale>(draw->from(0, 2));
  args.std_eps = 1e-4;
  args.same_reward = draw->maybe() ? 0 : 1e-6;
  args.reward = memory->laid(args.batch, -1, args.size, args.dtype);
  args.advantages = memory->out(args.batch.groups * args.size, size_of(value_of(args.dtype)));
  expect_ok(elva_group_advantages_cpu(&args));
}

// Each index once, and within the rows.
void check_found(const int64_t* index, int64_t queries, int64_t k, int64_t rows, bool all) {
  for (int64_t q = 0; q < queries; ++q) {
    std::vector<bool> seen(static_cast<size_t>(rows));
    for (int64_t i = 0; i < k; ++i) {
      const int64_t row = index[q * k + i];
      if (row == -1 && !all) continue;
      expect(row >= 0 && row < rows && !seen[static_cast<size_t>(row)]);
      seen[static_cast<size_t>(row)] = true;
    }
  }
}

void topk(Draw* draw, Memory* memory) {
  ElvaTopkArgs args = {};
  args.dtype = draw->dtype;
  args.threads = draw->threads;
  args.metric = draw->maybe() ? ELVA_DOT : ELVA_COSINE;
  args.queries = draw->from(0, 12);
  args.rows = draw->size(0, 700);
  args.dim = draw->size(1, args.rows > 40 ? 48 : 300);
  args.k = draw->from(0, args.rows);
  const ElvaBatch none = {1, 0, {}};
  args.query = memory->laid(none, args.queries, args.dim, args.dtype);
  args.corpus = memory->laid(none, args.rows, args.dim, args.dtype);
  args.scores = memory->out(args.queries * args.k, size_of(value_of(args.dtype)));
  args.index = memory->out<int64_t>(args.queries * args.k);
  expect_ok(elva_topk_cpu(&args));
  check_found(args.index, args.queries, args.k, args.rows, true);
}

struct Codes {
  int64_t count;
  int8_t *code, *fine;
  float *scale, *lost;
};

Codes codes_of(Draw* draw, Memory* memory, int64_t count, int64_t dim) {
  ElvaRowCodesArgs args = {};
  args.dtype = draw->dtype;
  args.threads = draw->threads;
  args.count = count;
  args.dim = dim;
  const ElvaBatch none = {1, 0, {}};
  args.rows = memory->laid(none, count, dim, args.dtype);
  args.code = memory->out<int8_t>(count * dim);
  args.fine = memory->out<int8_t>(count * dim);
  args.scale = memory->out<float>(count);
  args.lost = memory->out<float>(count);
  expect_ok(elva_row_codes_cpu(&args));
  return {count, args.code, args.fine, args.scale, args.lost};
}

void codes(Draw* draw, Memory* memory) {
  ElvaNearestCodesArgs args = {};
  args.threads = draw->threads;
  args.queries = draw->from(0, 12);
  args.rows = draw->size(0, 700);
  args.dim = draw->size(1, args.rows > 40 ? 70 : 600);
  args.depth = draw->from(0, args.rows);
  const Codes query = codes_of(draw, memory, args.queries, args.dim);
  const Codes rows = codes_of(draw, memory, args.rows, args.dim);
  args.query_code = query.code;
  args.query_fine = query.fine;
  args.query_scale = query.scale;
  args.query_lost = query.lost;
  args.code = rows.code;
  args.scale = rows.scale;
  args.lost = rows.lost;
  if (draw->maybe()) {
    uint8_t* mask = memory->out<uint8_t>(args.rows);
    for (int64_t i = 0; i < args.rows; ++i) mask[i] = draw->maybe();
    args.mask = mask;
  }
  if (draw->maybe()) {
    args.floor = static_cast<float*>(memory->values(ELVA_FP32, args.queries));
  }
  args.bounds = memory->out<float>(args.queries * args.depth);
  args.index = memory->out<int64_t>(args.queries * args.depth);
  expect_ok(elva_nearest_codes_cpu(&args));
  check_found(args.index, args.queries, args.depth, args.rows, false);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 8) return -1;
  Draw draw(data, size);
  Memory memory(&draw);
  switch (draw.from(0, 6)) {
    case 0:
      reward_from_scores(&draw, &memory);
      break;
    case 1:
      advantages(&draw, &memory);
      break;
    case 2:
      topk(&draw, &memory);
      break;
    case 3:
      codes(&draw, &memory);
      break;
    default:
      reward(&draw, &memory);
  }
  return 0;
}
