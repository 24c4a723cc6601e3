// The engine `fused`: attention in one pass over the pages, scheduled on the device.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/params.h"
#include "core/problem.h"
#include "core/status.h"

namespace jpa::fused {

struct Options {
  bool decode;           // every sequence has one query row at most
  bool batch_invariant;  // a sequence gets the same bits alone and in any batch
};

// Scratch memory of a call, in bytes. Of T and B it depends only where results are to be batch-invariant:
// then by at most WorkspaceBytesPerRow for each query row.
int64_t WorkspaceBytes(const AttentionProblem& problem, const Options& options);
int64_t WorkspaceBytesPerRow(const AttentionProblem& problem);

// What a call needs to know of the device it runs on.
struct Device {
  int num_ctas;      // that run at the same time
  int threads;       // of each
  int shared_bytes;  // of a CTA
  bool overlaps;     // kernels of a stream may start before the one in front has ended
  const void* kernel;
};

// Finds the kernel for the call's dtypes and head dim, and makes it ready on the current device.
Status Prepare(const AttentionProblem& problem, Device* device);

Status RunAttention(const AttentionProblem& problem, const AttentionParams& params, const Options& options,
                    const Device& device, int64_t workspace_bytes, cudaStream_t stream);

}  // namespace jpa::fused
