#include "core/parallel_for.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <new>

namespace jpa {
namespace {

// Outlives the call: tasks that start late still look at `next`.
struct Loop {
  Loop(int64_t n, const std::function<void(int64_t)>* f) : count(n), body(f) {}

  void Work() {
    int64_t finished = 0;
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
      try {
        (*body)(i);
      } catch (const std::bad_alloc&) {
        out_of_memory.store(true, std::memory_order_relaxed);
      }
      ++finished;
    }
    if (finished == 0) return;
    // The release half publishes this worker's results, the acquire half takes the others'.
    if (done.fetch_add(finished, std::memory_order_acq_rel) + finished == count) {
      const std::lock_guard<std::mutex> lock(mutex);
      all_done.notify_all();
    }
  }

  void Wait() {
    std::unique_lock<std::mutex> lock(mutex);
    all_done.wait(lock, [this] { return done.load(std::memory_order_acquire) == count; });
  }

  const int64_t count;
  const std::function<void(int64_t)>* const body;  // valid while done < count
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> done{0};
  std::atomic<bool> out_of_memory{false};
  std::mutex mutex;
  std::condition_variable all_done;
};

}  // namespace

Status ParallelFor(TaskRunner& runner, int64_t count, const std::function<void(int64_t)>& body) {
  if (count <= 0) return Status::Ok();
  const auto loop = std::make_shared<Loop>(count, &body);
  const int64_t helpers = std::min<int64_t>(runner.num_threads(), count) - 1;
  try {
    for (int64_t i = 0; i < helpers; ++i) runner.Schedule([loop] { loop->Work(); });
  } catch (const std::bad_alloc&) {
    // Fewer helpers do as well; to leave now would leave those that run without a `body`.
  }
  loop->Work();
  loop->Wait();
  if (loop->out_of_memory.load(std::memory_order_relaxed)) {
    return Status::ResourceExhausted("out of memory for a worker's scratch");
  }
  return Status::Ok();
}

}  // namespace jpa
