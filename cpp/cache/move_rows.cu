#include <algorithm>
#include <cstdint>

#include "cache/move_rows.h"
#include "cache/slots.cuh"
#include "core/integer_math.h"
#include "device/bulk_copies.cuh"
#include "device/compiled_for.h"
#include "device/cuda_status.h"
#include "device/launch.h"
#include "device/ptx.cuh"

namespace jpa::cache {
namespace {

// Where this kernel is known to be faster: 4096 tokens of 2 KiB per pool take 14.1 us, 8 tokens per stage,
// and 16.6 us in the other one. For 64 tokens the other one takes 2.6 us, with a CTA per token.
constexpr int64_t kFewestTokens = 4096;

// Measured: 2, 4 and 8 tokens of 2 KiB per stage, with as many stages as fit. 8 were the fastest.
constexpr int kStageBytes = 16 << 10;
constexpr int kStages = 5;  // of keys, and as many of values: what shared memory has beside the table
// A stage is filled again so many stages after its stores began, so that nothing waits for the latest.
constexpr int kLag = 2;

struct MoveArgs {
  const char* values[2];  // of keys and of values: [T, row_bytes]
  char* pages[2];         // [P * S, row_bytes]
  SlotMapping mapping;
  int num_pools;      // 1: keys alone
  int32_t row_bytes;  // a multiple of 16, at most kStageBytes
  int32_t tokens_per_cta;
  int32_t tokens_per_stage;
  int32_t tokens_per_tile;  // a multiple of those of a stage
};

struct MoveStorage {
  struct Ring {
    alignas(128) char stages[kStages][kStageBytes];
    device::Barrier loaded[kStages];
  };
  Ring rings[2];
  LastTokens::Storage last_tokens;
  int32_t targets[kTileTokens];
};

constexpr int kSharedBytes = sizeof(MoveStorage);
static_assert(kSharedBytes <= 227 << 10, "more shared memory than a block of compute capability 9.0 gets");

// One warp's work: the rows of one pool of a CTA's tokens, a stage at a time.
class RowMover {
 public:
  __device__ RowMover(const MoveArgs& args, int side, MoveStorage::Ring& ring, int32_t begin, int32_t end)
      : args_(args),
        values_(args.values[side]),
        pages_(args.pages[side]),
        ring_(ring),
        begin_(begin),
        end_(end),
        lane_(static_cast<int>(threadIdx.x % 32)) {}

  // Fills all stages, before it is known which rows are wanted.
  __device__ void Start() {
    if (lane_ != 0) return;
    for (device::Barrier& barrier : ring_.loaded) device::InitBarrier(&barrier, 1);
    device::FenceBarrierInit();
    for (int stage = 0; stage < kStages; ++stage) Load(stage);
  }

  // Stores the next `count` tokens, a whole token tile or the rest; targets[i] is the slot of the i-th
  // or -1.
  __device__ void Store(int count, const int32_t* targets) {
    for (int first = 0; first < count; first += args_.tokens_per_stage, ++next_) {
      const int stage = next_ % kStages;
      device::WaitForPhase(&ring_.loaded[stage], static_cast<uint32_t>(next_ / kStages % 2));
      StoreStage(ring_.stages[stage], min(args_.tokens_per_stage, count - first), targets + first);
      device::CommitBulkStores();
      if (next_ < kLag) continue;
      device::WaitForBulkReads<kLag>();
      __syncwarp();  // all lanes' stores have read the stage
      if (lane_ == 0) Load(next_ - kLag + kStages);
    }
  }

  __device__ void Finish() { device::WaitForBulkStores(); }

 private:
  static constexpr uint32_t kAllLanes = 0xffffffffu;

  // Fills stage index % kStages as the index-th of the CTA, if there are tokens for it.
  __device__ void Load(int index) {
    const int64_t token = begin_ + int64_t{index} * args_.tokens_per_stage;
    if (token >= end_) return;
    const int stage = index % kStages;
    const int tokens = static_cast<int>(min(int64_t{args_.tokens_per_stage}, end_ - token));
    const uint32_t bytes = static_cast<uint32_t>(tokens * args_.row_bytes);
    device::ArriveAndExpectBytes(&ring_.loaded[stage], bytes);
    device::BulkLoad(ring_.stages[stage], values_ + token * args_.row_bytes, bytes, &ring_.loaded[stage]);
  }

  // Tokens that follow each other in the pool, as those of a page do, go in one copy, since small rows would
  // need many. A lane looks at a token and stores what begins there.
  __device__ void StoreStage(const char* stage, int count, const int32_t* targets) const {
    for (int first = 0; first < count; first += 32) {
      const int token = first + lane_;
      const int32_t slot = token < count ? targets[token] : -1;
      const int32_t before = __shfl_up_sync(kAllLanes, slot, 1);
      const bool begins = lane_ == 0 || before < 0 || slot - before != 1;
      const uint32_t later = __ballot_sync(kAllLanes, begins) >> lane_ >> 1;
      if (slot < 0 || !begins) continue;
      const int tokens = later != 0 ? __ffs(static_cast<int>(later)) : 32 - lane_;
      device::BulkStore(pages_ + int64_t{slot} * args_.row_bytes, stage + token * args_.row_bytes,
                        static_cast<uint32_t>(tokens * args_.row_bytes));
    }
  }

  const MoveArgs& args_;
  const char* const values_;
  char* const pages_;
  MoveStorage::Ring& ring_;
  const int32_t begin_;  // the CTA's tokens
  const int32_t end_;
  const int lane_;
  int next_ = 0;  // the stage to store next, counted over the CTA's tokens
};

// All warps resolve slots; the first moves keys, the second values, if there are any. A CTA has at least one
// token.
__global__ void __launch_bounds__(kThreadsPerSm, 1) MoveRowsKernel(const __grid_constant__ MoveArgs args) {
  extern __shared__ __align__(alignof(MoveStorage)) char memory[];
  auto& storage = *reinterpret_cast<MoveStorage*>(memory);

  const int warp = static_cast<int>(threadIdx.x / 32);
  const bool moves = warp < args.num_pools;
  const int64_t begin = int64_t{blockIdx.x} * args.tokens_per_cta;
  const int64_t end = min(begin + args.tokens_per_cta, int64_t{args.mapping.num_tokens});
  RowMover mover(args, warp % 2, storage.rings[warp % 2], static_cast<int32_t>(begin),
                 static_cast<int32_t>(end));
  if (moves) mover.Start();
  for (int64_t first = begin; first < end; first += args.tokens_per_tile) {
    const int count = static_cast<int>(min(end - first, int64_t{args.tokens_per_tile}));
    // Its barriers keep the targets of the token tile before until both warps have stored that.
    ResolveTokenTile(args.mapping, static_cast<int32_t>(first), count, storage.last_tokens, storage.targets);
    if (moves) mover.Store(count, storage.targets);
  }
  if (moves) mover.Finish();
}

bool IsAligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

bool AreDense(const PageStrides& strides, const WriteProblem& problem) {
  const int64_t row = problem.num_kv_heads * problem.head_dim;
  return strides.head == problem.head_dim && strides.token == row && strides.page == problem.page_size * row;
}

}  // namespace

bool AreRowsMovable(const WriteProblem& problem, const WriteParams& params) {
  const bool has_values = problem.value_dim > 0;
  const int64_t row_bytes = problem.num_kv_heads * problem.head_dim * ByteWidth(problem.new_dtype);
  return problem.num_tokens >= kFewestTokens && problem.new_dtype == problem.kv_dtype &&
         params.k_scale == nullptr && row_bytes % 16 == 0 && row_bytes > 0 && row_bytes <= kStageBytes &&
         AreDense(params.k_strides, problem) && IsAligned(params.k) && IsAligned(params.k_pages) &&
         (!has_values || (params.v_scale == nullptr && AreDense(params.v_strides, problem) &&
                          IsAligned(params.v) && IsAligned(params.v_pages)));
}

Status CanMoveRows(int device_index, bool* can) {
  int capability = 0;
  if (Status s =
          device::CudaStatus(device::CompiledFor(reinterpret_cast<const void*>(&MoveRowsKernel), &capability),
                             kCaller, "cudaFuncGetAttributes");
      !s.ok()) {
    return s;
  }
  int most_shared_bytes = 0;
  if (Status s = device::CudaStatus(
          cudaDeviceGetAttribute(&most_shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device_index),
          kCaller, "cudaDeviceGetAttribute");
      !s.ok()) {
    return s;
  }
  *can = capability >= 90 && most_shared_bytes >= kSharedBytes;
  return Status::Ok();
}

Status LaunchMoveRows(const WriteProblem& problem, const WriteParams& params, int num_sms,
                      cudaStream_t stream) {
  // As many CTAs as run at a time, each with neighbouring tokens.
  const int64_t tokens_per_cta = CeilDiv(problem.num_tokens, num_sms);
  const int64_t num_ctas = CeilDiv(problem.num_tokens, tokens_per_cta);
  const int32_t row_bytes = static_cast<int32_t>(problem.num_kv_heads * problem.head_dim) *
                            static_cast<int32_t>(ByteWidth(problem.new_dtype));
  const int32_t tokens_per_stage = std::min(kStageBytes / row_bytes, kTileTokens);
  const MoveArgs args = {.values = {static_cast<const char*>(params.k), static_cast<const char*>(params.v)},
                         .pages = {static_cast<char*>(params.k_pages), static_cast<char*>(params.v_pages)},
                         .mapping = {.slots = params.slot_mapping,
                                     .num_slots = problem.num_pages * problem.page_size,
                                     .num_tokens = static_cast<int32_t>(problem.num_tokens)},
                         .num_pools = problem.value_dim > 0 ? 2 : 1,
                         .row_bytes = row_bytes,
                         .tokens_per_cta = static_cast<int32_t>(tokens_per_cta),
                         .tokens_per_stage = tokens_per_stage,
                         .tokens_per_tile = kTileTokens / tokens_per_stage * tokens_per_stage};
  if (Status s = device::CudaStatus(
          cudaFuncSetAttribute(MoveRowsKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes),
          kCaller, "cudaFuncSetAttribute");
      !s.ok()) {
    return s;
  }
  return device::Launch(
      kCaller, "row-moving", &MoveRowsKernel,
      {.grid = dim3(static_cast<unsigned>(num_ctas)), .threads = kThreadsPerSm, .shared_bytes = kSharedBytes},
      stream, args);
}

}  // namespace jpa::cache
