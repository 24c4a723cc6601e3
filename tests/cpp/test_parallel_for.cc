// The parallel loop: every index once, late tasks touch nothing, failures become a status.
#include <atomic>
#include <memory>
#include <new>
#include <vector>

#include "check.h"
#include "core/parallel_for.h"
#include "runners.h"

namespace jpa::test {
namespace {

void EachIndexOnce() {
  for (const int num_threads : {1, 2, 5}) {
    PoolRunner runner(num_threads);
    for (const int64_t count : {0, 1, 2, 3, 100, 1000}) {
      std::vector<std::atomic<int>> calls(static_cast<size_t>(count));
      const Status status = ParallelFor(runner, count, [&](int64_t i) { ++calls[static_cast<size_t>(i)]; });
      CHECK(status.ok(), "%s", status.message().c_str());
      for (int64_t i = 0; i < count; ++i) {
        CHECK(calls[static_cast<size_t>(i)] == 1, "index %d of %d on %d threads: %d calls",
              static_cast<int>(i), static_cast<int>(count), num_threads,
              calls[static_cast<size_t>(i)].load());
      }
    }
  }
}

void LateTasksTouchNothing() {
  BusyRunner runner(4);
  {
    auto calls = std::make_unique<int>(0);  // gone when the late tasks run
    const Status status = ParallelFor(runner, 10, [&](int64_t) { ++*calls; });
    CHECK(status.ok() && *calls == 10, "%d calls", *calls);
  }
  CHECK(runner.num_kept() == 3, "%d tasks", static_cast<int>(runner.num_kept()));
  runner.RunKept();
}

void OutOfMemoryIsAStatus() {
  PoolRunner runner(3);
  std::atomic<int> calls{0};
  const Status status = ParallelFor(runner, 50, [&](int64_t i) {
    ++calls;
    if (i % 7 == 3) throw std::bad_alloc();
  });
  CHECK(status.code() == Status::Code::kResourceExhausted, "code %d", static_cast<int>(status.code()));
  CHECK(calls == 50, "%d calls", calls.load());
}

// A pool that has no memory for a second task.
class FullRunner : public BusyRunner {
 public:
  using BusyRunner::BusyRunner;
  void Schedule(std::function<void()> task) override {
    if (num_kept() == 1) throw std::bad_alloc();
    BusyRunner::Schedule(std::move(task));
  }
};

void FewerHelpersDoAsWell() {
  FullRunner runner(4);
  int calls = 0;
  const Status status = ParallelFor(runner, 10, [&](int64_t) { ++calls; });
  CHECK(status.ok() && calls == 10, "%d calls", calls);
}

}  // namespace
}  // namespace jpa::test

int main() {
  jpa::test::EachIndexOnce();
  jpa::test::LateTasksTouchNothing();
  jpa::test::OutOfMemoryIsAStatus();
  jpa::test::FewerHelpersDoAsWell();
  return jpa::test::failures == 0 ? 0 : 1;
}
