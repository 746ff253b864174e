// The threads of regions (pool.h). They sleep when nothing has been asked of them for a while, and
// live as long as the process: what is still in a region that is over is nobody's care.

#include "pool.h"

#include <immintrin.h>
#include <pthread.h>
#include <sched.h>
#include <torch/library.h>
#include <unistd.h>

#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace coppice {
namespace {

constexpr std::chrono::microseconds kAwake{200};  // longer than most gaps between two regions
constexpr int64_t kPatient = 1000;                // pauses before the core is offered to others

// Of this thread's regions; 0: OpenMP's are used.
thread_local int64_t used_threads = 0;

class Pool {
 public:
  // A child of fork() has none of its parent's threads.
  static Pool& get() {
    static std::mutex making;
    static Pool* pool = nullptr;
    static pid_t owner = 0;
    std::lock_guard<std::mutex> lock(making);
    if (!pool || owner != getpid()) {
      pool = new Pool;
      owner = getpid();
    }
    return *pool;
  }

  void run(const std::shared_ptr<Region>& region, int64_t threads) {
    std::unique_lock<std::mutex> leading(leading_, std::try_to_lock);
    if (!leading.owns_lock()) return region->lead();  // another thread has them all
    add_helpers(threads - 1);
    leader_cpu_.store(sched_getcpu(), std::memory_order_relaxed);
    offer(region, threads - 1);
    region->lead();
    offer(nullptr, 0);
  }

 private:
  // Fewer where the system gives no more: a region does with those that there are.
  void add_helpers(int64_t wanted) {
    try {
      for (; num_helpers_ < wanted; ++num_helpers_)
        std::thread(&Pool::help, this, num_helpers_).detach();
    } catch (const std::system_error&) {
    }
  }

  void offer(std::shared_ptr<Region> region, int64_t helpers) {
    bool must_wake = false;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      std::swap(region_, region);
      helpers_ = helpers;
      if (helpers) number_.fetch_add(1, std::memory_order_release);
      must_wake = helpers && asleep_;
    }
    if (must_wake) wake_.notify_all();
  }

  void help(int64_t place) {
    pthread_setname_np(pthread_self(), "coppice-pool");
    cpu_set_t allowed;
    const bool knows = !sched_getaffinity(0, sizeof allowed, &allowed) && CPU_COUNT(&allowed) > 1;
    for (uint64_t seen = 0;;) {
      const auto until = std::chrono::steady_clock::now() + kAwake;
      while (number_.load(std::memory_order_acquire) == seen &&
             std::chrono::steady_clock::now() < until)
        _mm_pause();
      std::shared_ptr<Region> region;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        ++asleep_;
        wake_.wait(lock, [&] { return number_.load() != seen; });
        --asleep_;
        seen = number_.load();
        if (place < helpers_) region = region_;
      }
      if (!region) continue;
      if (const int cpu = leader_cpu_.load(std::memory_order_relaxed); knows && cpu == sched_getcpu())
        keep_off(cpu, allowed);
      region->help();
    }
  }

  // The thread that leads has its core for itself: beside other programs the system would let it take
  // turns there with one that helps it.
  static void keep_off(int cpu, cpu_set_t allowed) {
    CPU_CLR(cpu, &allowed);
    sched_setaffinity(0, sizeof allowed, &allowed);
  }

  std::atomic<int> leader_cpu_{-1};
  std::mutex leading_, mutex_;
  std::condition_variable wake_;
  std::shared_ptr<Region> region_;
  std::atomic<uint64_t> number_{0};  // of regions so far
  int64_t asleep_ = 0, helpers_ = 0, num_helpers_ = 0;
};

}  // namespace

void Region::pause(int64_t& waited) {
  if (++waited < kPatient)
    _mm_pause();
  else
    sched_yield();
}

int64_t num_threads() { return used_threads ? used_threads : at::get_num_threads(); }

void run(const std::shared_ptr<Region>& region, int64_t tasks) {
  const int64_t threads = std::min(num_threads(), tasks);
  if (used_threads && threads > 1) return Pool::get().run(region, threads);
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t) {
    begin ? region->help() : region->lead();
  });
}

}  // namespace coppice

TORCH_LIBRARY_FRAGMENT(coppice, m) {
  m.def("use_pool(int threads) -> ()", [](int64_t threads) { coppice::used_threads = threads; });
}
