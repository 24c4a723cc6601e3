// Task runners with the habits that a real pool may have.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "core/task_runner.h"

namespace jpa::test {

// A pool of num_threads - 1 threads beside the caller's.
class PoolRunner : public TaskRunner {
 public:
  explicit PoolRunner(int num_threads) : num_threads_(num_threads) {
    for (int i = 1; i < num_threads; ++i) {
      threads_.emplace_back([this] { Work(); });
    }
  }
  ~PoolRunner() override {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  int num_threads() const override { return num_threads_; }
  void Schedule(std::function<void()> task) override {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      tasks_.push_back(std::move(task));
    }
    wake_.notify_one();
  }

 private:
  void Work() {
    for (;;) {
      std::function<void()> task;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [this] { return stopping_ || !tasks_.empty(); });
        if (tasks_.empty()) return;
        task = std::move(tasks_.front());
        tasks_.pop_front();
      }
      task();
    }
  }

  const int num_threads_;
  std::vector<std::thread> threads_;
  std::deque<std::function<void()>> tasks_;
  std::mutex mutex_;
  std::condition_variable wake_;
  bool stopping_ = false;
};

// Claims to have threads, and keeps every task until it is told to run them: a busy pool.
class BusyRunner : public TaskRunner {
 public:
  explicit BusyRunner(int num_threads) : num_threads_(num_threads) {}

  int num_threads() const override { return num_threads_; }
  void Schedule(std::function<void()> task) override { kept_.push_back(std::move(task)); }

  size_t num_kept() const { return kept_.size(); }
  void RunKept() {
    for (const std::function<void()>& task : kept_) task();
    kept_.clear();
  }

 private:
  const int num_threads_;
  std::vector<std::function<void()>> kept_;
};

}  // namespace jpa::test
