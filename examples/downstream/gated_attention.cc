// An XLA FFI handler of another package on the CPU engine of jax_paged_attn: decode with an output gate,
//
//   out = sigmoid(gate) * attention(q, pages),
//
// as Qwen3-Next has it, in one call. It knows the engine by its C++ API alone: sizes (core/problem.h),
// pointers (core/params.h), and something that runs tasks (core/task_runner.h).
#include <nanobind/nanobind.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "core/parallel_for.h"
#include "core/params.h"
#include "core/problem.h"
#include "core/status.h"
#include "core/task_runner.h"
#include "core/workspace.h"
#include "engines/cpu/isa.h"
#include "engines/cpu/run.h"
#include "xla/ffi/api/ffi.h"

namespace nb = nanobind;
namespace ffi = ::xla::ffi;

namespace {

class XlaTaskRunner : public jpa::TaskRunner {
 public:
  explicit XlaTaskRunner(ffi::ThreadPool& pool) : pool_(pool) {}

  int num_threads() const override { return static_cast<int>(std::max<int64_t>(pool_.num_threads(), 1)); }
  void Schedule(std::function<void()> task) override { pool_.Schedule(std::move(task)); }

 private:
  ffi::ThreadPool& pool_;
};

using Rows = ffi::Buffer<ffi::F32, 3>;   // [B, N, H]
using Pages = ffi::Buffer<ffi::F32, 4>;  // [P, S, K, H]
using Table = ffi::Buffer<ffi::S32, 2>;  // [B, M]
using Lengths = ffi::Buffer<ffi::S32, 1>;

// The engine relies on sizes that fit each other.
jpa::Status Check(const Rows& q, const Rows& gate, const Pages& k_pages, const Pages& v_pages,
                  const Table& block_tables, const Lengths& lengths, const Rows& out) {
  const auto rows = q.dimensions();
  const auto pool = k_pages.dimensions();
  const auto same = [](const auto& a, const auto& b) {
    return std::equal(a.begin(), a.end(), b.begin(), b.end());
  };
  if (!same(gate.dimensions(), rows) || !same(out.dimensions(), rows)) {
    return jpa::Status::InvalidArgument("gate, out: expected the shape of q");
  }
  if (!same(v_pages.dimensions(), pool)) {
    return jpa::Status::InvalidArgument("v_pages: expected the shape of k_pages");
  }
  if (pool[1] < 1 || pool[2] < 1 || pool[3] < 1 || rows[2] != pool[3] || rows[1] % pool[2] != 0) {
    return jpa::Status::InvalidArgument(
        "k_pages: expected [P, S, K, H] of q's head dim, K a divisor of its heads");
  }
  if (block_tables.dimensions()[0] != rows[0] || lengths.dimensions()[0] != rows[0]) {
    return jpa::Status::InvalidArgument("block_tables, lengths: expected a row of q for each sequence");
  }
  return jpa::Status::Ok();
}

jpa::Status Run(ffi::ThreadPool& pool, const Rows& q, const Rows& gate, const Pages& k_pages,
                const Pages& v_pages, const Table& block_tables, const Lengths& lengths, Rows& out,
                float scale) {
  if (jpa::Status s = Check(q, gate, k_pages, v_pages, block_tables, lengths, out); !s.ok()) return s;
  const int64_t num_seqs = q.dimensions()[0], num_q_heads = q.dimensions()[1], head_dim = q.dimensions()[2];
  const int64_t num_pages = k_pages.dimensions()[0], page_size = k_pages.dimensions()[1],
                num_kv_heads = k_pages.dimensions()[2];

  const jpa::AttentionProblem problem = {.q_dtype = jpa::DType::kF32,
                                         .kv_dtype = jpa::DType::kF32,
                                         .num_rows = num_seqs,
                                         .num_q_heads = num_q_heads,
                                         .num_kv_heads = num_kv_heads,
                                         .head_dim = head_dim,
                                         .value_dim = head_dim,
                                         .page_size = page_size,
                                         .num_k_pages = num_pages,
                                         .num_v_pages = num_pages,
                                         .num_seqs = num_seqs,
                                         .max_pages = block_tables.dimensions()[1]};

  // Decode: sequence b has row b of q and no other.
  std::vector<int32_t> q_starts(static_cast<size_t>(num_seqs)), q_counts(q_starts.size(), 1);
  std::iota(q_starts.begin(), q_starts.end(), 0);
  std::vector<float> lse(static_cast<size_t>(num_seqs * num_q_heads));
  const int64_t workspace_bytes = jpa::AttentionWorkspaceBytes(num_seqs, num_q_heads, head_dim);
  const std::unique_ptr<float[]> workspace(new float[static_cast<size_t>(workspace_bytes) / sizeof(float)]);

  const jpa::PageStrides strides =
      jpa::StridesOf(jpa::PageLayout::kSplit, num_pages, page_size, num_kv_heads, head_dim);
  const jpa::AttentionParams params = {.q = q.typed_data(),
                                       .k_pages = k_pages.typed_data(),
                                       .v_pages = v_pages.typed_data(),
                                       .block_tables = block_tables.typed_data(),
                                       .kv_lens = lengths.typed_data(),
                                       .q_starts = q_starts.data(),
                                       .q_counts = q_counts.data(),
                                       .sinks = nullptr,
                                       .k_scale = nullptr,
                                       .v_scale = nullptr,
                                       .out = out.typed_data(),
                                       .lse = lse.data(),
                                       .workspace = workspace.get(),
                                       .k_strides = strides,
                                       .v_strides = strides,
                                       .scale = scale,
                                       .soft_cap = 0.0f,
                                       .sliding_window = 0,
                                       .causal = true};

  XlaTaskRunner runner(pool);
  const jpa::cpu::Kernels* kernels;
  if (jpa::Status s = jpa::cpu::ChosenKernels(&kernels); !s.ok()) return s;
  if (jpa::Status s = jpa::cpu::RunAttention(problem, params, *kernels, runner); !s.ok()) return s;

  const int64_t row_size = num_q_heads * head_dim;
  return jpa::ParallelFor(runner, num_seqs, [&](int64_t row) {
    const float* gates = gate.typed_data() + row * row_size;
    float* results = out.typed_data() + row * row_size;
    for (int64_t i = 0; i < row_size; ++i) results[i] /= 1.0f + std::exp(-gates[i]);
  });
}

// Nothing may be thrown into XLA.
ffi::Error GatedDecode(ffi::ThreadPool pool, Rows q, Rows gate, Pages k_pages, Pages v_pages,
                       Table block_tables, Lengths lengths, ffi::Result<Rows> out, float scale) {
  try {
    const jpa::Status status = Run(pool, q, gate, k_pages, v_pages, block_tables, lengths, *out, scale);
    if (status.ok()) return ffi::Error::Success();
    return status.code() == jpa::Status::Code::kInvalidArgument
               ? ffi::Error::InvalidArgument(status.message())
               : ffi::Error::Internal(status.message());
  } catch (const std::exception& error) {
    return ffi::Error::Internal(error.what());
  }
}

XLA_FFI_DEFINE_HANDLER(kGatedDecode, GatedDecode,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<Rows>()     // q
                           .Arg<Rows>()     // gate
                           .Arg<Pages>()    // k_pages
                           .Arg<Pages>()    // v_pages
                           .Arg<Table>()    // block_tables
                           .Arg<Lengths>()  // lengths
                           .Ret<Rows>()     // out
                           .Attr<float>("scale"));

}  // namespace

NB_MODULE(_gated_attention, m) {
  m.def("handler", [] { return nb::capsule(reinterpret_cast<void*>(kGatedDecode)); });
}
