#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#define FASTAD_FORKS 1
#endif
#if defined(__linux__)
#include <sched.h>
#endif

namespace fastad {
namespace {

// A frame takes about a millisecond: more threads would mostly wait for each other to wake.
constexpr int kMostThreadsByDefault = 8;

struct Job {
  const std::function<void(int)>& task;
  const int count;
  std::atomic<int> next{0};
  int helpers = 0;           // guarded by the pool's mutex
  std::exception_ptr error;  // guarded by error_mutex
  std::mutex error_mutex;

  Job(const std::function<void(int)>& task, int count) : task(task), count(count) {}

  bool has_work() const { return next.load(std::memory_order_relaxed) < count; }

  void work() {
    for (int i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
      try {
        task(i);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(error_mutex);
        if (!error) error = std::current_exception();
      }
    }
  }
};

// Owns its workers' shared state; the workers are detached and hold it until they leave.
class Pool : public std::enable_shared_from_this<Pool> {
 public:
  void start(int workers) {
    for (int i = 0; i < workers; ++i) {
      try {
        std::thread([pool = shared_from_this()] { pool->serve(); }).detach();
      } catch (const std::system_error&) {
        return;  // the process may have no more threads: those that started serve
      }
    }
  }

  void stop() {
    const std::lock_guard<std::mutex> lock(mutex_);
    stopped_ = true;
    wake_.notify_all();
  }

  void run(Job& job) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      jobs_.push_back(&job);
    }
    wake_.notify_all();
    job.work();
    std::unique_lock<std::mutex> lock(mutex_);
    jobs_.erase(std::find(jobs_.begin(), jobs_.end(), &job));
    left_.wait(lock, [&] { return job.helpers == 0; });
  }

 private:
  Job* waiting_job() const {
    for (Job* job : jobs_) {
      if (job->has_work()) return job;
    }
    return nullptr;
  }

  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      Job* job = nullptr;
      wake_.wait(lock, [&] { return stopped_ || (job = waiting_job()) != nullptr; });
      if (stopped_) return;
      ++job->helpers;
      lock.unlock();
      job->work();
      lock.lock();
      if (--job->helpers == 0) left_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable left_;
  std::vector<Job*> jobs_;
  bool stopped_ = false;
};

int default_threads() {
  int count = static_cast<int>(std::thread::hardware_concurrency());
#if defined(__linux__)
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) count = CPU_COUNT(&allowed);
#endif
  return std::clamp(count, 1, kMostThreadsByDefault);
}

struct State {
  std::mutex mutex;
  std::shared_ptr<Pool> pool;  // null until the first call that wants help
  std::atomic<int> threads{default_threads()};
};

// Never destroyed: detached workers may outlive static destructors.
State* make_state();
State* g_state = make_state();

State* make_state() {
#ifdef FASTAD_FORKS
  // The child has one thread, and the parent's mutexes may be locked for ever: start afresh.
  pthread_atfork(nullptr, nullptr, [] {
    State* fresh = new State;
    fresh->threads = g_state->threads.load();
    g_state = fresh;
  });
#endif
  return new State;
}

std::shared_ptr<Pool> current_pool() {
  const std::lock_guard<std::mutex> lock(g_state->mutex);
  if (!g_state->pool) {
    g_state->pool = std::make_shared<Pool>();
    g_state->pool->start(g_state->threads - 1);
  }
  return g_state->pool;
}

}  // namespace

int threads() { return g_state->threads; }

void set_threads(int count) {
  const std::lock_guard<std::mutex> lock(g_state->mutex);
  if (count == g_state->threads) return;
  g_state->threads = count;
  if (g_state->pool) g_state->pool->stop();
  g_state->pool.reset();
}

void parallel_for(int count, const std::function<void(int)>& task) {
  if (count <= 1 || threads() == 1) {
    for (int i = 0; i < count; ++i) task(i);
    return;
  }
  Job job(task, count);
  current_pool()->run(job);
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace fastad
