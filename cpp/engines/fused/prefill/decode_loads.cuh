// Loads of row blocks that prefill's CTAs decode (decode_rows.cuh): one warp takes them from a counter, looks
// their pages up and loads their keys and values by TMA.
#pragma once

#include <cstdint>

#include "device/bulk_copies.cuh"
#include "engines/fused/common/read_sequences.cuh"
#include "engines/fused/decode/work_split.h"
#include "engines/fused/prefill/args.h"
#include "engines/fused/prefill/shared_memory.cuh"
#include "engines/fused/prefill/tma_loads.cuh"

namespace jpa::fused {

// The row block of a sequence that decode would have, with one of its KV heads.
__device__ inline RowBlock DecodeRowBlock(const CallFacts& facts, const Sequence& sequence, int32_t seq,
                                          int32_t head) {
  return {.seq = seq,
          .head = head,
          .first = 0,
          .num_rows = sequence.num_rows * facts.group.divisor(),
          .row = sequence.row,
          .position = sequence.position,
          .kv_len = sequence.kv_len};
}

// The page of the box that a lane has of a tile, or an id that is none.
__device__ inline int32_t PageOfDecodeBox(const PrefillArgs& args, const RowBlock& row_block, int32_t tile,
                                          int32_t* token) {
  const int32_t offset = static_cast<int32_t>(device::LaneId()) << args.decode_box_rows_log2;
  const int32_t key = tile * kDecodeKeys + offset;
  *token = 0;
  if (offset >= kDecodeKeys || key >= row_block.kv_len) return -1;
  const int32_t column = args.call.page_size.Quotient(key);
  *token = key - column * args.call.page_size.divisor();
  return args.call.params.block_tables[row_block.seq * args.call.problem.max_pages + column];
}

template <typename Traits>
class DecodeLoader {
 public:
  __device__ DecodeLoader(const PrefillArgs& args, PrefillShared<Traits>& shared)
      : args_(args),
        ring_(shared.decode),
        matrices_(shared.decode_matrices()),
        policy_(device::EvictFirst()) {}

  __device__ void LoadRowBlock(const RowBlock& row_block, const TileRange& tiles) {
    int32_t next_token, next = PageOfDecodeBox(args_, row_block, tiles.begin, &next_token);
    for (int32_t tile = tiles.begin; tile < tiles.end; ++tile) {
      const int32_t id = next, token = next_token;
      if (tile + 1 < tiles.end) next = PageOfDecodeBox(args_, row_block, tile + 1, &next_token);
      const bool exists = id >= 0 && id < args_.call.num_pages;
      const uint32_t missing = __ballot_sync(
          ~0u, static_cast<int>(device::LaneId()) << args_.decode_box_rows_log2 < kDecodeKeys && !exists);
      const int index = stage_.index();
      device::WaitForPhase(&ring_.empty[index], stage_.parity() ^ 1);
      if (device::LaneId() == 0) {
        DecodeTile& described = ring_.tiles[index];
        static_cast<RowBlock&>(described) = row_block;
        described.exists = 1;
        described.key = tile * kDecodeKeys;
        described.ends = tile + 1 == tiles.end;
        described.missing = missing;
        device::ArriveAndExpectBytes(&ring_.full[index], Matrices::kKeyTileBytes + Matrices::kValueTileBytes);
      }
      __syncwarp();
      LoadBoxes(id, token, row_block.head, index);
      stage_.Next();
    }
  }

  // Tells the consumers that no more tiles come.
  __device__ void End() {
    device::WaitForPhase(&ring_.empty[stage_.index()], stage_.parity() ^ 1);
    if (device::LaneId() != 0) return;
    ring_.tiles[stage_.index()].exists = 0;
    device::Arrive(&ring_.full[stage_.index()]);
  }

 private:
  using Matrices = DecodeMatrices<Traits>;

  __device__ void LoadBoxes(int32_t id, int32_t token, int32_t head, int index) {
    const int32_t offset = static_cast<int32_t>(device::LaneId()) << args_.decode_box_rows_log2;
    if (offset >= kDecodeKeys) return;
    constexpr device::BlockStrides kStrides = StridesOf<Traits, kDecodeKeys, Traits::kHeadDim>();
    const AttentionProblem& problem = args_.call.problem;
    const int place = offset / device::kBlockRows * kStrides.rows, row = token / device::kBlockRows;
    device::TmaLoad(matrices_.keys[index] + place, &args_.decode_k_map,
                    {0, 0, head * args_.k_blocks_per_head, row, PageOf(args_.call, id, problem.num_k_pages)},
                    &ring_.full[index], policy_);
    device::TmaLoad(matrices_.values[index] + place, &args_.decode_v_map,
                    {0, 0, head * args_.v_blocks_per_head, row, PageOf(args_.call, id, problem.num_v_pages)},
                    &ring_.full[index], policy_);
  }

  const PrefillArgs& args_;
  DecodeNotes& ring_;
  Matrices& matrices_;
  const uint64_t policy_;
  PipelineState<kDecodeStages> stage_;
};

// By one warp.
template <typename Traits>
__device__ inline void LoadDecodeTiles(const PrefillArgs& args, PrefillShared<Traits>& shared) {
  const CallFacts& facts = args.call.facts;
  const int32_t num_row_blocks = __ldcg(&args.plan->num_decoded) * facts.num_kv_heads;
  DecodeLoader<Traits> loader(args, shared);
  for (;;) {
    int32_t number = 0;
    if (device::LaneId() == 0) number = atomicAdd(&args.plan->next_row_block, 1);
    number = __shfl_sync(~0u, number, 0);
    if (number >= num_row_blocks) break;
    // Neighbours are the heads of a sequence, so that CTAs read what are neighbours in memory at about the
    // same time.
    const int32_t place = number / facts.num_kv_heads, head = number - place * facts.num_kv_heads;
    const int32_t seq = args.planned[shared.num_sequences + place].seq;
    const Sequence sequence = RawSequence(args.call, args.plan->cu_q_lens, seq).Clipped(facts);
    loader.LoadRowBlock(DecodeRowBlock(facts, sequence, seq, head), VisibleTiles(facts, sequence, 0));
  }
  loader.End();
}

}  // namespace jpa::fused
