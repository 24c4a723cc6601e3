#include "engines/cublaslt/run.h"

#include <cstdint>
#include <string>

#include "core/integer_math.h"
#include "engines/cublaslt/kernels.h"

namespace jpa::cublaslt {
namespace {

constexpr uintptr_t kAlign = 256;

Status RunChunk(const Call& call, const Group& group, int64_t chunk, const Products& products,
                cudaStream_t stream) {
  const Plan& plan = call.plan;
  const auto array = [&](PointerArray index) {
    const int64_t entry = (index * plan.chunks() + chunk) * plan.batch();
    return static_cast<void*>(call.workspace + plan.pointers + entry * static_cast<int64_t>(sizeof(void*)));
  };
  void* const scratch = call.workspace + plan.gemm;
  if (Status s = products.scores.Launch(array(kKeys), array(kQueries), array(kScores), scratch, stream);
      !s.ok()) {
    return s;
  }
  if (Status s = LaunchSoftmax(call, group, chunk, stream); !s.ok()) return s;
  return products.outputs.Launch(array(kValues), array(kProbabilities), array(kPartials), scratch, stream);
}

Status RunGroup(const Call& call, const Group& group, const Products& products, cudaStream_t stream) {
  if (Status s = LaunchPack(call, group, stream); !s.ok()) return s;
  for (int64_t chunk = 0; chunk < group.chunks; ++chunk) {
    if (Status s = RunChunk(call, group, chunk, products, stream); !s.ok()) return s;
  }
  return LaunchCombine(call, group, stream);
}

}  // namespace

Status RunAttention(const AttentionProblem& problem, const AttentionParams& params, const Plan& plan,
                    const Products& products, int64_t workspace_bytes, cudaStream_t stream) {
  if (workspace_bytes < plan.workspace_bytes) {
    return Status::InvalidArgument("workspace: expected at least " + std::to_string(plan.workspace_bytes) +
                                   " bytes, got " + std::to_string(workspace_bytes));
  }
  if (problem.num_rows == 0) return Status::Ok();
  const Call call = {.problem = problem,
                     .params = params,
                     .plan = plan,
                     .workspace = reinterpret_cast<char*>(
                         RoundUp<uintptr_t>(reinterpret_cast<uintptr_t>(params.workspace), kAlign)),
                     .group_size = problem.num_q_heads / problem.num_kv_heads,
                     .overlap = products.overlap};

  if (!plan.decode) {
    if (Status s = LaunchCut(call, stream); !s.ok()) return s;
  }
  for (int64_t g = 0; g < plan.groups; ++g) {
    for (int64_t stretch = 0; stretch < plan.stretches; ++stretch) {
      const Group group = {.first_row_block = g * plan.row_blocks,
                           .chunks = plan.chunks_of(g),
                           .first_key = stretch * plan.stretch_keys(),
                           .first = stretch == 0,
                           .last = stretch == plan.stretches - 1};
      if (Status s = RunGroup(call, group, products, stream); !s.ok()) return s;
    }
  }
  return Status::Ok();
}

}  // namespace jpa::cublaslt
