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
  bool decode;              // every sequence has one query row at most
  bool batch_invariant;     // a sequence gets the same bits alone and in any batch
  bool cumulative = false;  // cu_q_lens say which rows sequences have
  // Bytes of scratch memory. Half of it may hold the tile cache (prefill/tile_cache.cuh), which makes prompts
  // faster over 8-bit pages and over pages whose size is no multiple of 8.
  int64_t workspace_limit = 0;
};

// Bytes of scratch memory that a call asks for: at most WorkspaceBound, and kWorkspaceBytesPerSequence per
// sequence if the call is not all decode, kCumulativeBytesPerSequence if it is cumulative, and
// WorkspaceBytesPerRow per query row if it is batch-invariant. A call that gets less makes do with a smaller
// tile cache.
int64_t WorkspaceBytes(const AttentionProblem& problem, const Options& options);
int64_t WorkspaceBound(const AttentionProblem& problem, const Options& options);
int64_t WorkspaceBytesPerRow(const AttentionProblem& problem);
inline constexpr int64_t kWorkspaceBytesPerSequence = 24;
inline constexpr int64_t kCumulativeBytesPerSequence = 4;

struct FreeOnDevice {
  void operator()(uint32_t* memory) const;
};

// Stages of a decode CTA.
struct StageRing {
  int num_stages = 0;
  int shared_bytes = 0;  // of a CTA
};

// A decode kernel, or none.
struct DecodeDevice {
  const void* kernel = nullptr;
  int threads = 0;
  int ctas_per_sm = 1;  // that run at the same time
  StageRing stages;
  StageRing stages_of_few;  // where few CTAs are likely to have tiles
};

// A prefill kernel, which runs one CTA per multiprocessor, or none.
struct PrefillDevice {
  const void* kernel = nullptr;
  int num_ctas = 0;
  int threads = 0;
  int shared_bytes = 0;  // of a CTA
  int tile_rows = 0;
  int tile_keys = 0;
  int cache_slices = 0;
  bool may_decode = false;  // it can decode beside its work tiles
};

// An MLA kernel, which runs one CTA per multiprocessor, or none.
struct MlaDevice {
  const void* kernel = nullptr;
  int num_ctas = 0;
  int threads = 0;
  int shared_bytes = 0;  // of a CTA
};

// All that the calls of one call site need on a device. They must follow each other, as those of a stream do.
struct Device {
  int num_sms;    // multiprocessors
  bool overlaps;  // a kernel of a stream may start before the one in front has ended
  std::unique_ptr<uint32_t, FreeOnDevice> partial_ready;  // on the device: zeros, but while a call runs
  DecodeDevice decode;                                    // no kernel: MLA's take its place
  DecodeDevice decode_folding;                            // for batch-invariant calls of small groups
  DecodeDevice decode_in_place;                           // for many row blocks of few packed rows
  DecodeDevice decode_of_few;                             // for few sequences
  DecodeDevice decode_by_warpgroup;                       // for many packed rows per row block
  PrefillDevice prefill_by_tma;                           // for pages that TMA can load
  PrefillDevice prefill_by_cp_async;                      // for any
  MlaDevice mla_by_tma;
  MlaDevice mla_by_cp_async;
  MlaDevice mla_by_pairs;  // by TMA, for two groups of query heads with the same keys
  MlaDevice mla_by_rows;   // by TMA, for heads of one key (Sharing::kRows)
};

// Finds the kernels for the call's dtypes and head dims, and makes them ready on the current device.
Status Prepare(const AttentionProblem& problem, Device* device);

Status RunAttention(const AttentionProblem& problem, const AttentionParams& params, const Options& options,
                    const Device& device, int64_t workspace_bytes, cudaStream_t stream);

}  // namespace jpa::fused
