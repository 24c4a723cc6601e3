// The stages of shared memory as a consumer warpgroup sees them: when keys and values of a tile are there,
// and when their memory is no longer needed.
#pragma once

#include <cstdint>

#include "device/bulk_copies.cuh"
#include "device/ptx.cuh"
#include "engines/fused/mla/shared_memory.cuh"

namespace jpa::fused {

// By one lane for its warp, all lanes of which come here.
__device__ inline void ArrivePerWarp(device::Barrier* barrier) {
  __syncwarp();
  if (device::LaneId() == 0) device::Arrive(barrier);
}

template <typename Traits>
class MlaStages {
 public:
  __device__ MlaStages(MlaShared<Traits>& shared, int warpgroup) : shared_(shared), warpgroup_(warpgroup) {}

  // Each warpgroup has a stage for its own tiles, or there is but one.
  static_assert(Traits::kStages == Traits::kConsumerWarpgroups || Traits::kStages == 1);
  __device__ int own() const { return Traits::kStages == 1 ? 0 : warpgroup_; }
  __device__ int other() const { return Traits::kStages == 1 ? 0 : 1 - warpgroup_; }
  // The half of the values that the warpgroup multiplies.
  __device__ KeyPart own_values() const { return static_cast<KeyPart>(warpgroup_); }

  // In all CTAs that have the keys.
  __device__ void Release(uint32_t tile, int part) const {
    device::Barrier* const empty = &shared_.keys_empty[StageOf<Traits::kStages>(tile)][part];
    if constexpr (Traits::kSharers == 1) {
      ArrivePerWarp(empty);
    } else {
      __syncwarp();
      if (device::LaneId() < Traits::kSharers) device::ArriveInCluster(empty, device::LaneId());
    }
  }

  // Until a column of blocks of one of the warpgroup's own tiles is there.
  __device__ void AwaitKeys(uint32_t tile, int column) const {
    device::WaitForPhase(&shared_.keys_full[own()][FullPartOf(column)], ParityOf<Traits::kStages>(tile));
    if constexpr (Traits::kUsesCpAsync) device::FenceSharedForAsync();
  }

  // True if the last keys of such a tile, as they are asked for, are there. With cp.async they come last.
  __device__ bool KeysAreThere(uint32_t tile) const {
    constexpr int kLast = Traits::kValuesInKeys ? Traits::kValueBlocks : Traits::kColumnBlocks;
    return device::PhaseEnded(&shared_.keys_full[own()][FullPartOf(kLast - 1)],
                              ParityOf<Traits::kStages>(tile));
  }

  // Until a half of any tile's values is there. Those in keys are, once there are scores.
  __device__ void AwaitValues(uint32_t tile, int half) const {
    if constexpr (Traits::kValuesInKeys) return;
    device::WaitForPhase(&shared_.keys_full[StageOf<Traits::kStages>(tile)][half],
                         ParityOf<Traits::kStages>(tile));
    if constexpr (Traits::kUsesCpAsync) device::FenceSharedForAsync();
  }

 private:
  // Which of the parts that come one after the other has a column of keys.
  __device__ static constexpr int FullPartOf(int column) {
    if constexpr (Traits::kValuesInKeys) {
      return Traits::kFullParts == 1 ? 0 : column;
    } else {
      return kOtherKeys + (column - Traits::kValueBlocks) / Traits::kPartBlocks;
    }
  }

  MlaShared<Traits>& shared_;
  const int warpgroup_;
};

}  // namespace jpa::fused
