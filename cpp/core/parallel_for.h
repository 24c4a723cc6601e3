// A parallel loop whose caller works too and waits only for iterations in progress.
#pragma once

#include <cstdint>
#include <functional>

#include "core/status.h"
#include "core/task_runner.h"

namespace jpa {

// Calls body(i) once for each i in [0, count), in no particular order across threads but handed out in
// ascending order. A scheduled task that starts after all iterations are taken returns without touching
// `body`, so a busy pool delays nothing and `body` may refer to the caller's stack. A std::bad_alloc thrown
// by `body` becomes a status.
Status ParallelFor(TaskRunner& runner, int64_t count, const std::function<void(int64_t)>& body);

}  // namespace jpa
