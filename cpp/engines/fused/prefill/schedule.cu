// Makes the plan of schedule.h, in one thread block.
#include "device/ptx.cuh"
#include "engines/fused/decode/sequences.cuh"
#include "engines/fused/prefill/kernels.h"

namespace jpa::fused {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kClasses = 64;
constexpr int kCandidates = kMaxPrefillParts;
static_assert(kCandidates <= kWarps, "a warp each");

// Sequences are sorted by classes of their longest unit, longest first; a class spans a factor of 2^(1/3).
__device__ int ClassOf(int32_t tiles) {
  return kClasses - 1 - min(kClasses - 1, static_cast<int>(3.0f * log2f(static_cast<float>(tiles + 1))));
}

struct Shared {
  Sequence lines[kThreads];  // of the first ones
  int32_t class_counts[kClasses];
  int32_t class_next[kClasses];
  int32_t longest;
  int64_t tiles[kCandidates];  // as estimated, if the longest unit is cut into one part more than the index
  int32_t warp_items[kWarps], warp_slots[kWarps], warp_images[kWarps];
  int32_t part_tiles;                           // no part has more
  int32_t first_item, first_slot, first_image;  // of the lines not yet written
};

// Adds up over the block's threads in front of each; `total` is of all.
__device__ int32_t SumBefore(int32_t value, int32_t* of_warps, int32_t* total) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  int32_t sum = value;
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const int32_t other = __shfl_up_sync(~0u, sum, lanes);
    if (lane >= lanes) sum += other;
  }
  if (lane == 31) of_warps[warp] = sum;
  __syncthreads();
  static_assert(kWarps == 32, "a lane each");
  *total = __reduce_add_sync(~0u, of_warps[lane]);
  const int32_t before = sum - value + __reduce_add_sync(~0u, lane < warp ? of_warps[lane] : 0);
  __syncthreads();
  return before;
}

__global__ void __launch_bounds__(kThreads) ScheduleKernel(const __grid_constant__ PrefillArgs args) {
  __shared__ Shared shared;
  const CallFacts& facts = args.call.facts;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int num_seqs = static_cast<int>(args.call.problem.num_seqs);
  const bool converts = ByteWidth(args.call.problem.kv_dtype) == 1;
  device::LetNextKernelStart();
  // Memory takes longer to answer than all else here: what is asked for again and again is kept.
  Sequence own{};
  if (thread < num_seqs) own = RawSequence(args.call, thread).Clipped(facts);
  const auto sequence_of = [&](int seq) {
    return seq < kThreads ? own : RawSequence(args.call, seq).Clipped(facts);
  };
  const auto sequence_of_line = [&](int line) {
    return line < kThreads ? shared.lines[line] : RawSequence(args.call, args.lines[line].seq).Clipped(facts);
  };
  if (thread < kClasses) shared.class_counts[thread] = 0;
  if (thread == 0) shared.longest = shared.first_item = shared.first_slot = shared.first_image = 0;
  for (int i = thread; i < kMaxSlots; i += kThreads) args.arrivals[i] = 0;
  __syncthreads();

  // Sort. Equal ones come in any order: it changes no result.
  for (int seq = thread; seq < num_seqs; seq += kThreads) {
    const Sequence sequence = sequence_of(seq);
    if (!IsPrefill(facts, sequence)) continue;
    const int32_t tiles = LongestUnit(facts, args.shape, sequence);
    atomicAdd(&shared.class_counts[ClassOf(tiles)], 1);
    atomicMax(&shared.longest, tiles);
  }
  __syncthreads();
  int32_t num_lines;
  const int32_t lines_before =
      SumBefore(thread < kClasses ? shared.class_counts[thread] : 0, shared.warp_items, &num_lines);
  if (thread < kClasses) shared.class_next[thread] = lines_before;
  __syncthreads();
  for (int seq = thread; seq < num_seqs; seq += kThreads) {
    const Sequence sequence = sequence_of(seq);
    if (!IsPrefill(facts, sequence)) continue;
    const int line = atomicAdd(&shared.class_next[ClassOf(LongestUnit(facts, args.shape, sequence))], 1);
    args.lines[line].seq = seq;
    if (line < kThreads) shared.lines[line] = sequence;
  }
  __syncthreads();

  // Choose the length of parts.
  const int32_t longest = max(shared.longest, 1);
  if (warp < kCandidates) {
    const int32_t most = static_cast<int32_t>(CeilDiv(longest, warp + 1));
    int32_t items = 0, slots = 0;
    for (int i = lane; i < num_lines; i += 32) {
      const Sequence sequence = sequence_of_line(i);
      const int32_t units = NumUnitsPerHead(facts, args.shape, sequence) * facts.num_kv_heads;
      const int32_t parts = PartsOf(LongestUnit(facts, args.shape, sequence), most);
      items += units * parts;
      if (parts > 1) slots += units * parts;
    }
    items = __reduce_add_sync(~0u, items);
    slots = __reduce_add_sync(~0u, slots);
    if (lane == 0) {
      shared.tiles[warp] =
          slots > kMaxSlots ? INT64_MAX : EstimatedTiles(items, longest, warp + 1, args.num_ctas);
    }
  }
  __syncthreads();
  if (thread == 0) {
    int best = 0;
    for (int i = 1; i < kCandidates && !args.call.batch_invariant; ++i) {
      if (shared.tiles[i] < shared.tiles[best]) best = i;
    }
    shared.part_tiles = static_cast<int32_t>(CeilDiv(longest, best + 1));
  }
  __syncthreads();

  // Number the items.
  for (int first = 0; first < num_lines; first += kThreads) {
    const int line = first + thread;
    int32_t items = 0, slots = 0, images = 0, parts = 1;
    Sharing sharing{};
    if (line < num_lines) {
      const Sequence sequence = sequence_of_line(line);
      parts = PartsOf(LongestUnit(facts, args.shape, sequence), shared.part_tiles);
      items = NumUnitsPerHead(facts, args.shape, sequence) * facts.num_kv_heads * parts;
      slots = parts > 1 ? items : 0;
      sharing = SharingOf(facts, args.shape, sequence, parts, args.num_ctas, args.bytes_per_token, converts);
      images = NumImages(facts, args.shape, sequence, sharing, args.images.count);
    }
    int32_t all_items, all_slots, all_images;
    const int32_t items_before = SumBefore(items, shared.warp_items, &all_items);
    const int32_t slots_before = SumBefore(slots, shared.warp_slots, &all_slots);
    const int32_t images_before = SumBefore(images, shared.warp_images, &all_images);
    if (line < num_lines) {
      args.lines[line].first_item = shared.first_item + items_before;
      args.lines[line].parts = parts;
      args.lines[line].first_slot = shared.first_slot + slots_before;
      args.lines[line].sharing = sharing;
      args.lines[line].first_image = images > 0 ? shared.first_image + images_before : args.images.count;
    }
    __syncthreads();
    if (thread == 0) {
      shared.first_item += all_items;
      shared.first_slot += all_slots;
      shared.first_image = min(shared.first_image + all_images, args.images.count);
    }
    __syncthreads();
  }
  for (int i = thread; i < shared.first_image * args.images.shares; i += kThreads) args.images.states[i] = 0;
  if (thread == 0) *args.plan = {num_lines, shared.first_item, 0};
}

}  // namespace

Launch ScheduleLaunch() { return {reinterpret_cast<const void*>(&ScheduleKernel), dim3(1), kThreads}; }

}  // namespace jpa::fused
