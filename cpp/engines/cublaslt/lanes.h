// Streams beside the call's own one, on which groups of units that do not depend on each other run at the
// same time.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>

#include "core/status.h"

namespace jpa::cublaslt {

inline constexpr int64_t kMaxLanes = 4;

// Streams and events that one call at a time may use.
struct SideStreams {
  std::array<cudaStream_t, kMaxLanes - 1> streams;
  std::array<cudaEvent_t, kMaxLanes - 1> ends;
  cudaEvent_t start;
  bool in_use;
};

// Makes a set of side streams for the current device unless it has some, so that a first call need not.
Status ReserveSideStreams();

// Lanes of one call, from Fork() to Join(): lane 0 is the call's own stream, and the others start behind what
// that holds. Works while the stream is being captured, too: the lanes become branches of the graph.
class Lanes {
 public:
  Lanes() = default;
  // Joins what has been forked, so that no lane outlives a call that failed.
  ~Lanes();
  Lanes(const Lanes&) = delete;
  Lanes& operator=(const Lanes&) = delete;

  // At most once.
  Status Fork(cudaStream_t stream, int64_t count);
  cudaStream_t stream(int64_t lane) const {
    return lane == 0 ? stream_ : side_->streams[static_cast<size_t>(lane - 1)];
  }
  // The call's stream goes on when all lanes are done.
  Status Join();

 private:
  cudaStream_t stream_ = nullptr;
  int64_t count_ = 1;
  SideStreams* side_ = nullptr;
  bool forked_ = false;
};

}  // namespace jpa::cublaslt
