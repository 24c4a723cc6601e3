// Whatever runs tasks: XLA's thread pool in production, anything else in tests.
#pragma once

#include <functional>

namespace jpa {

class TaskRunner {
 public:
  virtual ~TaskRunner() = default;

  // How many threads tasks may run on, the caller's included; at least 1.
  virtual int num_threads() const = 0;

  // Runs `task` at some time, or never. May run it before returning.
  virtual void Schedule(std::function<void()> task) = 0;
};

}  // namespace jpa
