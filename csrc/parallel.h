// One small persistent thread pool for everything in this module.
#pragma once

#include <functional>

namespace fastad {

// Threads that work on one call, the caller's own included.
int threads();

// Sets that number, at least 1. Calls in flight finish with the threads they have.
void set_threads(int count);

// Runs task(0) .. task(count - 1) in any order and returns when all are done.
// The caller works too and workers only help, so any number of callers make progress at once and
// never more than threads() - 1 threads are added. The first exception is rethrown to the caller.
// A forked child starts with no workers and makes its own at first use.
void parallel_for(int count, const std::function<void(int)>& task);

}  // namespace fastad
