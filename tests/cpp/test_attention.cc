// The CPU engine on random problems, for each instruction set: against a double loop written from the
// contract, and for equal bits whatever the threads do. What no sequence uses holds NaN; each array ends
// where it ends.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "core/convert.h"
#include "core/integer_math.h"
#include "core/workspace.h"
#include "engines/cpu/isa.h"
#include "engines/cpu/run.h"
#include "runners.h"

namespace jpa::test {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

void Encode(DType dtype, float value, char* to) {
  switch (dtype) {
    case DType::kF32:
      std::memcpy(to, &value, 4);
      return;
    case DType::kBF16:
    case DType::kF16: {
      const uint16_t bits = dtype == DType::kBF16 ? F32ToBF16(value) : F32ToF16(value);
      std::memcpy(to, &bits, 2);
      return;
    }
    case DType::kE4M3FN:
      *to = static_cast<char>(F32ToE4M3FN(value));
      return;
    case DType::kE5M2:
      *to = static_cast<char>(F32ToE5M2(value));
      return;
    case DType::kS8:
      *to = static_cast<char>(F32ToS8(20 * value));
      return;
  }
}

double Decode(DType dtype, const char* from) {
  switch (dtype) {
    case DType::kF32: {
      float value;
      std::memcpy(&value, from, 4);
      return static_cast<double>(value);
    }
    case DType::kBF16:
    case DType::kF16: {
      uint16_t bits;
      std::memcpy(&bits, from, 2);
      return static_cast<double>(dtype == DType::kBF16 ? BF16ToF32(bits) : F16ToF32(bits));
    }
    case DType::kE4M3FN:
      return static_cast<double>(E4M3FNToF32(static_cast<uint8_t>(*from)));
    case DType::kE5M2:
      return static_cast<double>(E5M2ToF32(static_cast<uint8_t>(*from)));
    case DType::kS8:
      return static_cast<double>(static_cast<int8_t>(*from));
  }
  return 0;
}

// An array of a dtype, exactly as long as its elements.
struct Array {
  Array(DType type, int64_t count) : dtype(type), bytes(static_cast<size_t>(count * ByteWidth(type))) {}
  void Set(int64_t i, float value) { Encode(dtype, value, bytes.data() + i * ByteWidth(dtype)); }
  double At(int64_t i) const { return Decode(dtype, bytes.data() + i * ByteWidth(dtype)); }

  DType dtype;
  std::vector<char> bytes;
};

struct Case {
  AttentionProblem problem;
  AttentionParams params;
  Array q, k, v, out;
  std::vector<int32_t> tables, kv_lens, q_starts, q_counts;
  std::vector<float> sinks, k_scale, v_scale, lse, workspace;

  // The pointers, once the object stands where it stays.
  void Bind() {
    params.q = q.bytes.data();
    params.k_pages = k.bytes.data();
    params.v_pages = problem.ValuesInKeys() ? k.bytes.data() : v.bytes.data();
    params.block_tables = tables.data();
    params.kv_lens = kv_lens.data();
    params.q_starts = q_starts.data();
    params.q_counts = q_counts.data();
    params.sinks = sinks.data();
    params.k_scale = k_scale.data();
    params.v_scale = v_scale.data();
    params.out = out.bytes.data();
    params.lse = lse.data();
    params.workspace = workspace.data();
  }
};

class Random {
 public:
  explicit Random(uint32_t seed) : engine_(seed) {}
  int64_t Below(int64_t n) { return static_cast<int64_t>(engine_() % static_cast<uint32_t>(n)); }
  float Normal() { return normal_(engine_); }
  template <typename T>
  T Of(std::initializer_list<T> choices) {
    return choices.begin()[Below(static_cast<int64_t>(choices.size()))];
  }

 private:
  std::mt19937 engine_;
  std::normal_distribution<float> normal_;
};

// Draws queries, tables, keys and values; whatever no sequence uses is garbage. Returns a length for the
// first sequence that says as much as its own, or 0.
int32_t FillArrays(Random& random, Case* c) {
  const AttentionProblem& p = c->problem;
  const int64_t row = p.num_kv_heads * p.head_dim, v_row = p.num_kv_heads * p.value_dim;
  const float garbage = p.kv_dtype == DType::kS8 ? 5.0f : std::numeric_limits<float>::quiet_NaN();
  for (int64_t i = 0; i < p.num_k_pages * p.page_size * row; ++i) c->k.Set(i, garbage);
  if (!p.ValuesInKeys()) {
    for (int64_t i = 0; i < p.num_v_pages * p.page_size * v_row; ++i) c->v.Set(i, garbage);
  }
  for (int64_t i = 0; i < p.num_rows * p.num_q_heads * p.head_dim; ++i) c->q.Set(i, random.Normal());
  for (int32_t& entry : c->tables) {
    entry = random.Of<int32_t>({-1, INT32_MAX, INT32_MIN, static_cast<int32_t>(p.num_k_pages)});
  }
  // A length beyond the table counts as all of it: then whole pages are in use.
  const int32_t other_len = random.Of<int32_t>({0, 0, 0, INT32_MIN, -1, INT32_MAX});
  int32_t next_page = 1;
  for (int64_t seq = 0; seq < p.num_seqs; ++seq) {
    const int64_t kv_len = c->kv_lens[static_cast<size_t>(seq)];
    for (int64_t first = 0; first < kv_len; first += p.page_size) {
      int32_t& entry = c->tables[static_cast<size_t>(seq * p.max_pages + first / p.page_size)];
      if (random.Below(20) == 0) continue;  // a used entry that names no page
      entry = next_page++;
      const int64_t tokens =
          seq == 0 && other_len == INT32_MAX ? p.page_size : std::min(p.page_size, kv_len - first);
      const int64_t v_page = entry % p.num_v_pages;
      for (int64_t i = 0; i < tokens * row; ++i) {
        c->k.Set(entry * p.page_size * row + i, random.Normal());
      }
      if (p.ValuesInKeys()) continue;
      for (int64_t i = 0; i < tokens * v_row; ++i) {
        c->v.Set(v_page * p.page_size * v_row + i, random.Normal());
      }
    }
  }
  return other_len;
}

// `max_len` decides whether lone rows are split.
Case MakeCase(uint32_t seed, int64_t max_len) {
  Random random(seed);
  const DType q_dtype = random.Of({DType::kF32, DType::kBF16, DType::kF16});
  const DType kv_dtype = random.Of({q_dtype, q_dtype, DType::kE4M3FN, DType::kE5M2, DType::kS8});
  const int64_t head_dim =
      max_len > 1000 ? random.Of<int64_t>({8, 33}) : random.Of<int64_t>({1, 7, 16, 40, 64, 80, 96, 128});
  // Values like keys, narrower or wider, or the first numbers of the keys.
  const int64_t value_dim = random.Of<int64_t>({head_dim, head_dim, 5, 32, 72});
  const bool values_in_keys = value_dim <= head_dim && random.Below(3) == 0;
  const int64_t page_size = random.Of<int64_t>({1, 3, 16, 17, 64});
  const int64_t num_kv_heads = 1 + random.Below(3);
  const int64_t group = random.Of<int64_t>({1, 2, 3, 4, 5, 7, 12, 20});
  const int64_t num_q_heads = num_kv_heads * group;
  const int64_t num_seqs = 1 + random.Below(4);

  std::vector<int32_t> kv_lens, q_starts, q_counts;
  int64_t max_pages = 1, used_pages = 0;
  int64_t num_rows = random.Below(3);  // rows nobody claims come first and last
  for (int64_t seq = 0; seq < num_seqs; ++seq) {
    kv_lens.push_back(static_cast<int32_t>(random.Below(max_len)));
    q_starts.push_back(static_cast<int32_t>(num_rows));
    q_counts.push_back(random.Of<int32_t>({0, 1, 1, 2, 5, 30}));
    num_rows += q_counts.back();
    const int64_t pages = CeilDiv(kv_lens.back(), page_size);
    max_pages = std::max(max_pages, pages);
    used_pages += pages;
  }
  num_rows += random.Below(3);
  // One of the pools may be smaller and then repeats: the sequences share its pages.
  const int64_t num_k_pages = used_pages + 2;
  const int64_t num_v_pages =
      random.Below(4) == 0 && !values_in_keys ? std::max<int64_t>(num_k_pages / 2, 1) : num_k_pages;

  const int64_t num_results = num_rows * num_q_heads;
  const int64_t row = num_kv_heads * head_dim, v_row = num_kv_heads * value_dim;
  const int64_t workspace_bytes = AttentionWorkspaceBytes(num_seqs, num_q_heads, value_dim);
  Case c = {.problem = {.q_dtype = q_dtype,
                        .kv_dtype = kv_dtype,
                        .num_rows = num_rows,
                        .num_q_heads = num_q_heads,
                        .num_kv_heads = num_kv_heads,
                        .head_dim = head_dim,
                        .value_dim = value_dim,
                        .page_size = page_size,
                        .num_k_pages = num_k_pages,
                        .num_v_pages = num_v_pages,
                        .num_seqs = num_seqs,
                        .max_pages = max_pages,
                        .layout = values_in_keys ? PageLayout::kValuesInKeys : PageLayout::kSplit},
            .params = {},
            .q = Array(q_dtype, num_results * head_dim),
            .k = Array(kv_dtype, num_k_pages * page_size * row),
            .v = Array(kv_dtype, values_in_keys ? 0 : num_v_pages * page_size * v_row),
            .out = Array(q_dtype, num_results * value_dim),
            .tables = std::vector<int32_t>(static_cast<size_t>(num_seqs * max_pages)),
            .kv_lens = kv_lens,
            .q_starts = q_starts,
            .q_counts = q_counts,
            .sinks = {},
            .k_scale = {},
            .v_scale = {},
            .lse = std::vector<float>(static_cast<size_t>(num_results), 7.0f),
            .workspace = std::vector<float>(static_cast<size_t>(workspace_bytes) / sizeof(float))};
  const int32_t other_len = FillArrays(random, &c);
  c.problem.num_sinks = random.Of<int64_t>({0, 1, num_seqs});
  c.problem.num_k_scales = random.Of<int64_t>({0, 1, num_seqs});
  c.problem.num_v_scales = random.Of<int64_t>({0, 1, num_seqs});
  for (int64_t i = 0; i < c.problem.num_sinks * num_q_heads; ++i) c.sinks.push_back(random.Normal());
  for (int64_t i = 0; i < c.problem.num_k_scales * num_kv_heads; ++i)
    c.k_scale.push_back(0.25f + std::fabs(random.Normal()));
  for (int64_t i = 0; i < c.problem.num_v_scales * num_kv_heads; ++i)
    c.v_scale.push_back(0.25f + std::fabs(random.Normal()));
  if (other_len != 0) c.kv_lens[0] = other_len;
  if (random.Below(6) == 0) {  // rows of the first sequence that stick out of q, which nothing may touch
    c.q_starts[0] = random.Of<int32_t>({INT32_MIN, -3, INT32_MAX});
  }

  c.params.k_strides = {.page = page_size * row, .token = row, .head = head_dim};
  c.params.v_strides = {.page = page_size * v_row, .token = v_row, .head = value_dim};
  if (values_in_keys) c.params.v_strides = c.params.k_strides;
  c.params.scale = 1.0f / std::sqrt(static_cast<float>(head_dim)) * (kv_dtype == DType::kS8 ? 0.05f : 1.0f);
  c.params.soft_cap = random.Of({0.0f, 0.0f, 2.0f, 30.0f});
  c.params.sliding_window = random.Of<int64_t>({0, 0, 1, 9, 100, INT64_MAX / 2});
  c.params.causal = random.Below(2) == 0;
  return c;
}

struct Expected {
  std::vector<double> out, lse;
};

float Of(const std::vector<float>& rows, int64_t num_rows, const AttentionProblem& p, int64_t seq,
         int64_t column, int64_t columns, float absent) {
  if (num_rows == 0) return absent;
  return rows[static_cast<size_t>(seq / (p.num_seqs / num_rows) * columns + column)];
}

Expected Reference(const Case& c) {
  const AttentionProblem& p = c.problem;
  const int64_t group = p.num_q_heads / p.num_kv_heads;
  const Array& values = p.ValuesInKeys() ? c.k : c.v;
  const int64_t value_stride = p.ValuesInKeys() ? p.head_dim : p.value_dim;
  Expected expected = {
      std::vector<double>(static_cast<size_t>(p.num_rows * p.num_q_heads * p.value_dim), 0.0),
      std::vector<double>(static_cast<size_t>(p.num_rows * p.num_q_heads), -kInfinity)};
  for (int64_t seq = 0; seq < p.num_seqs; ++seq) {
    const auto s = static_cast<size_t>(seq);
    const int64_t kv_len = std::clamp<int64_t>(c.kv_lens[s], 0, p.max_pages * p.page_size);
    for (int64_t r = 0; r < c.q_counts[s]; ++r) {
      const int64_t row = c.q_starts[s] + r;
      if (row < 0 || row >= p.num_rows) continue;
      const int64_t position = kv_len - c.q_counts[s] + r;
      for (int64_t head = 0; head < p.num_q_heads; ++head) {
        const int64_t kv_head = head / group;
        const double scale =
            static_cast<double>(c.params.scale) *
            static_cast<double>(Of(c.k_scale, p.num_k_scales, p, seq, kv_head, p.num_kv_heads, 1));
        std::vector<double> logits;
        std::vector<int64_t> v_rows;
        for (int64_t key = 0; key < kv_len && position >= 0; ++key) {
          if (c.params.causal && key > position) continue;
          if (c.params.sliding_window > 0 && key <= position - c.params.sliding_window) continue;
          const int64_t id = c.tables[static_cast<size_t>(seq * p.max_pages + key / p.page_size)];
          if (id < 0 || id >= std::max(p.num_k_pages, p.num_v_pages)) continue;
          const auto row_of = [&](int64_t pages) {
            return ((id % pages) * p.page_size + key % p.page_size) * p.num_kv_heads + kv_head;
          };
          const int64_t k_row = row_of(p.num_k_pages) * p.head_dim;
          double logit = 0;
          for (int64_t d = 0; d < p.head_dim; ++d) {
            logit += c.q.At((row * p.num_q_heads + head) * p.head_dim + d) * c.k.At(k_row + d);
          }
          logit *= scale;
          const auto cap = static_cast<double>(c.params.soft_cap);
          logits.push_back(cap > 0 ? cap * std::tanh(logit / cap) : logit);
          v_rows.push_back(row_of(p.num_v_pages) * value_stride);
        }
        const auto sink = static_cast<double>(
            Of(c.sinks, p.num_sinks, p, seq, head, p.num_q_heads, -std::numeric_limits<float>::infinity()));
        double top = sink;
        for (const double logit : logits) top = std::max(top, logit);
        if (std::isinf(top)) continue;
        double sum = std::exp(sink - top);
        for (const double logit : logits) sum += std::exp(logit - top);
        const auto index = static_cast<size_t>(row * p.num_q_heads + head);
        expected.lse[index] = top + std::log(sum);
        for (size_t i = 0; i < logits.size(); ++i) {
          const double weight =
              std::exp(logits[i] - top) / sum *
              static_cast<double>(Of(c.v_scale, p.num_v_scales, p, seq, kv_head, p.num_kv_heads, 1));
          for (int64_t d = 0; d < p.value_dim; ++d) {
            expected.out[index * static_cast<size_t>(p.value_dim) + static_cast<size_t>(d)] +=
                weight * values.At(v_rows[i] + d);
          }
        }
      }
    }
  }
  return expected;
}

void Run(Case* c, const cpu::Kernels& kernels, TaskRunner& runner) {
  c->Bind();
  std::fill(c->out.bytes.begin(), c->out.bytes.end(), '\x55');
  std::fill(c->lse.begin(), c->lse.end(), 55.0f);
  const Status status = cpu::RunAttention(c->problem, c->params, kernels, runner);
  CHECK(status.ok(), "%s", status.message().c_str());
}

void MatchesReference(const cpu::Kernels& kernels, uint32_t seed, int64_t max_len) {
  Case c = MakeCase(seed, max_len);
  PoolRunner runner(2);
  Run(&c, kernels, runner);
  const Expected expected = Reference(c);
  double difference = 0, norm = 0, lse_difference = 0;
  for (size_t i = 0; i < expected.out.size(); ++i) {
    const double got = c.out.At(static_cast<int64_t>(i));
    difference += (got - expected.out[i]) * (got - expected.out[i]);
    norm += expected.out[i] * expected.out[i];
  }
  for (size_t i = 0; i < expected.lse.size(); ++i) {
    const auto got = static_cast<double>(c.lse[i]);
    if (got == expected.lse[i]) continue;  // -inf too
    lse_difference = std::max(lse_difference, std::isnan(got) ? kInfinity : std::fabs(got - expected.lse[i]));
  }
  const double bound = c.problem.q_dtype == DType::kF32   ? 1e-5
                       : c.problem.q_dtype == DType::kF16 ? 2e-3
                                                          : 1e-2;
  const double error = norm > 0 ? std::sqrt(difference / norm) : std::sqrt(difference);
  CHECK(error <= bound, "%s, seed %u, length < %d: error %g", kernels.name, seed, static_cast<int>(max_len),
        error);
  CHECK(lse_difference <= 1e-5, "%s, seed %u, length < %d: lse off by %g", kernels.name, seed,
        static_cast<int>(max_len), lse_difference);
}

// Threads, and tasks that never start, change nothing.
void SameBits(const cpu::Kernels& kernels, uint32_t seed, int64_t max_len) {
  Case c = MakeCase(seed, max_len);
  PoolRunner alone(1);
  Run(&c, kernels, alone);
  const std::vector<char> out = c.out.bytes;
  const std::vector<float> lse = c.lse;
  const auto same = [&] {
    return out == c.out.bytes && (lse.empty() || std::memcmp(lse.data(), c.lse.data(), lse.size() * 4) == 0);
  };
  PoolRunner several(5);
  for (int repeat = 0; repeat < 3; ++repeat) {
    Run(&c, kernels, several);
    CHECK(same(), "%s, seed %u: 5 threads", kernels.name, seed);
  }
  BusyRunner busy(64);
  Run(&c, kernels, busy);
  CHECK(same(), "%s, seed %u: 64 threads that do not start", kernels.name, seed);
  busy.RunKept();
}

}  // namespace
}  // namespace jpa::test

int main() {
  using namespace jpa;
  for (const cpu::Kernels* kernels : cpu::AvailableKernels()) {
    const int before = test::failures;
    for (uint32_t seed = 0; seed < 150; ++seed) test::MatchesReference(*kernels, seed, 150);
    for (uint32_t seed = 0; seed < 10; ++seed) test::MatchesReference(*kernels, seed, 6000);
    for (uint32_t seed = 0; seed < 20; ++seed) test::SameBits(*kernels, seed, seed % 2 == 0 ? 200 : 20000);
    std::printf("%s: %d failures\n", kernels->name, test::failures - before);
  }
  return test::failures == 0 ? 0 : 1;
}
