#include "engines/cublaslt/lanes.h"

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "engines/cublaslt/capture.h"

namespace jpa::cublaslt {
namespace {

Status ToStatus(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return Status::Ok();
  return Status::Internal(std::string("implementation 'cublaslt': ") + what + ": " +
                          cudaGetErrorString(error));
}

// Every set that was ever made, by device. They live as long as the process, like the device's context.
struct Pool {
  std::mutex mutex;
  std::map<int, std::vector<std::unique_ptr<SideStreams>>> sets;
};

Pool& ThePool() {
  static Pool* pool = new Pool;
  return *pool;
}

// Which capture a stream takes part in; 0: none.
Status CaptureOf(cudaStream_t stream, unsigned long long* id) {
  cudaStreamCaptureStatus status;
  if (Status s = ToStatus(cudaStreamGetCaptureInfo(stream, &status, id), "cudaStreamGetCaptureInfo");
      !s.ok()) {
    return s;
  }
  if (status == cudaStreamCaptureStatusNone) *id = 0;
  if (status == cudaStreamCaptureStatusInvalidated) *id = ~0ull;
  return Status::Ok();
}

Status Make(std::unique_ptr<SideStreams>* made) {
  const RelaxedCapture relaxed;
  auto side = std::make_unique<SideStreams>();
  for (cudaStream_t& stream : side->streams) {
    if (Status s = ToStatus(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "new stream");
        !s.ok()) {
      return s;
    }
  }
  const auto make_event = [](cudaEvent_t* event) {
    return ToStatus(cudaEventCreateWithFlags(event, cudaEventDisableTiming), "new event");
  };
  for (cudaEvent_t& event : side->ends) {
    if (Status s = make_event(&event); !s.ok()) return s;
  }
  if (Status s = make_event(&side->start); !s.ok()) return s;
  *made = std::move(side);
  return Status::Ok();
}

Status SetsOfCurrentDevice(Pool& pool, std::vector<std::unique_ptr<SideStreams>>** sets) {
  int device = 0;
  if (Status s = ToStatus(cudaGetDevice(&device), "no current device"); !s.ok()) return s;
  *sets = &pool.sets[device];
  return Status::Ok();
}

// A set that nobody uses, for a call on that stream.
Status Take(cudaStream_t stream, SideStreams** taken) {
  unsigned long long capture = 0;
  if (Status s = CaptureOf(stream, &capture); !s.ok()) return s;
  Pool& pool = ThePool();
  const std::lock_guard<std::mutex> lock(pool.mutex);
  std::vector<std::unique_ptr<SideStreams>>* sets;
  if (Status s = SetsOfCurrentDevice(pool, &sets); !s.ok()) return s;
  for (const std::unique_ptr<SideStreams>& side : *sets) {
    if (side->in_use) continue;
    // Joined streams belong to their capture until that ends, which is after the call: nobody else may use
    // them before.
    unsigned long long other = 0;
    if (Status s = CaptureOf(side->streams[0], &other); !s.ok()) return s;
    if (other != 0 && other != capture) continue;
    side->in_use = true;
    *taken = side.get();
    return Status::Ok();
  }
  std::unique_ptr<SideStreams> made;
  if (Status s = Make(&made); !s.ok()) return s;
  made->in_use = true;
  *taken = made.get();
  sets->push_back(std::move(made));
  return Status::Ok();
}

}  // namespace

Status ReserveSideStreams() {
  Pool& pool = ThePool();
  const std::lock_guard<std::mutex> lock(pool.mutex);
  std::vector<std::unique_ptr<SideStreams>>* sets;
  if (Status s = SetsOfCurrentDevice(pool, &sets); !s.ok()) return s;
  if (!sets->empty()) return Status::Ok();
  std::unique_ptr<SideStreams> made;
  if (Status s = Make(&made); !s.ok()) return s;
  sets->push_back(std::move(made));
  return Status::Ok();
}

Status Lanes::Fork(cudaStream_t stream, int64_t count) {
  stream_ = stream;
  count_ = count;
  if (count == 1) return Status::Ok();
  if (Status s = Take(stream, &side_); !s.ok()) return s;
  forked_ = true;
  if (Status s = ToStatus(cudaEventRecord(side_->start, stream_), "fork"); !s.ok()) return s;
  for (int64_t lane = 1; lane < count_; ++lane) {
    if (Status s = ToStatus(cudaStreamWaitEvent(this->stream(lane), side_->start), "fork"); !s.ok()) return s;
  }
  return Status::Ok();
}

Status Lanes::Join() {
  if (!forked_) return Status::Ok();
  forked_ = false;
  Status joined = Status::Ok();
  for (int64_t lane = 1; lane < count_; ++lane) {
    const cudaEvent_t end = side_->ends[static_cast<size_t>(lane - 1)];
    Status s = ToStatus(cudaEventRecord(end, stream(lane)), "join");
    if (s.ok()) s = ToStatus(cudaStreamWaitEvent(stream_, end), "join");
    if (!s.ok()) joined = s;
  }
  return joined;
}

Lanes::~Lanes() {
  if (side_ == nullptr) return;
  const Status joined = Join();
  static_cast<void>(joined);  // it fails only where the call has failed before, or the device is lost
  const std::lock_guard<std::mutex> lock(ThePool().mutex);
  side_->in_use = false;
}

}  // namespace jpa::cublaslt
