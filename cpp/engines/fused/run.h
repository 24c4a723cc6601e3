// The engine `fused`: attention in one pass over the pages, scheduled on the device.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>

#include "core/params.h"
#include "core/problem.h"
#include "core/status.h"

namespace jpa::fused {

struct Options {
  bool decode;           // every sequence has one query row at most
  bool batch_invariant;  // a sequence gets the same bits alone and in any batch
  // In bytes, of scratch memory: half of it may have images of tiles (prefill/tile_cache.cuh), which make
  // prompts over pages of other sizes than multiples of 8, or of 8 bits, faster.
  int64_t workspace_limit = 0;
};

// Scratch memory that a call asks for, in bytes: at most WorkspaceBound, and kWorkspaceBytesPerSequence for
// each sequence, if the call is not all decode. Where results are to be batch-invariant, WorkspaceBytesPerRow
// more for each row. A call that gets less makes do with fewer images.
int64_t WorkspaceBytes(const AttentionProblem& problem, const Options& options);
int64_t WorkspaceBound(const AttentionProblem& problem, const Options& options);
int64_t WorkspaceBytesPerRow(const AttentionProblem& problem);
inline constexpr int64_t kWorkspaceBytesPerSequence = 24;

struct FreeOnDevice {
  void operator()(uint32_t* memory) const;
};

// A kernel that runs one CTA a multiprocessor, or none.
struct PrefillDevice {
  const void* kernel = nullptr;
  int num_ctas = 0;
  int threads = 0;
  int shared_bytes = 0;
  int tile_rows = 0;
  int tile_keys = 0;
  int cache_slices = 0;
};

// What the calls of one call site need on a device. They must follow each other, as those of a stream do.
struct Device {
  int num_sms;       // multiprocessors
  int ctas_per_sm;   // that run at the same time
  int threads;       // of each
  int shared_bytes;  // of each
  bool overlaps;     // kernels of a stream may start before the one in front has ended
  const void* kernel;
  std::unique_ptr<uint32_t, FreeOnDevice> partial_ready;  // on the device: zeros, but while a call runs
  PrefillDevice prefill_by_tma;       // for pages that the tensor memory accelerator can load
  PrefillDevice prefill_by_cp_async;  // for any
};

// Finds the kernel for the call's dtypes and head dim, and makes it ready on the current device.
Status Prepare(const AttentionProblem& problem, Device* device);

Status RunAttention(const AttentionProblem& problem, const AttentionParams& params, const Options& options,
                    const Device& device, int64_t workspace_bytes, cudaStream_t stream);

}  // namespace jpa::fused
