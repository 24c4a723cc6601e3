// The launches of a plan, in the order in which run.cc makes them.
#pragma once

#include <cuda_runtime_api.h>

#include "core/params.h"
#include "core/problem.h"
#include "core/status.h"
#include "device/launch.h"
#include "engines/cublaslt/plan.h"

namespace jpa::cublaslt {

inline constexpr char kCaller[] = "implementation 'cublaslt'";  // in errors

// All facts of a call, passed to kernels by value.
struct Call {
  AttentionProblem problem;
  AttentionParams params;
  Plan plan;
  char* workspace;          // [plan.workspace_bytes], aligned to 256 bytes
  int64_t group_size;       // G, query heads per key/value head
  device::Overlap overlap;  // of all kernels but the first two
};

// The row blocks and the stretch of keys that are in the workspace.
struct Group {
  int64_t first_row_block;
  int64_t chunks;
  int64_t first_key;
  bool first;  // of the stretches of these row blocks
  bool last;
};

// Ragged only: cuts query rows into row tiles, and writes 0 and -inf to all results, for rows that no
// sequence claims.
Status LaunchCut(const Call& call, cudaStream_t stream);

// Records of the row blocks, queries, pointers, and all keys and values that are not used in place.
Status LaunchPack(const Call& call, const Group& group, cudaStream_t stream);

// Scores of a chunk to probabilities, in their place.
Status LaunchSoftmax(const Call& call, const Group& group, int64_t chunk, cudaStream_t stream);

// Sums up partial results; after the last stretch writes out and lse.
Status LaunchCombine(const Call& call, const Group& group, cudaStream_t stream);

}  // namespace jpa::cublaslt
