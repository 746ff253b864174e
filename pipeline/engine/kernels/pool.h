// Tasks on a few threads, none of which waits for one that the system has put aside.
//
// A region is a number of tasks. Each thread takes the next one, computes it in memory of its own and
// asks whether it may write the result. When no task is left to take, the thread that called waits as
// long as two tasks take, and then computes what is missing itself. Who asks first writes; the work of
// the other one is dropped. So a thread that is put aside in the middle of a task holds nobody up. It
// may read its operands long after the region is over: they are kept in memory until it is done.

#pragma once

#include <ATen/Parallel.h>
#include <c10/core/Storage.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <utility>
#include <vector>

namespace coppice {

using Kept = std::vector<c10::Storage>;

class Region {
 public:
  Region(int64_t tasks, Kept kept)
      : tasks_(tasks), kept_(std::move(kept)), states_(new std::atomic<uint8_t>[tasks]()) {}
  virtual ~Region() = default;

  virtual void help() = 0;  // until no task is left to take
  virtual void lead() = 0;  // until all are done

 protected:
  enum State : uint8_t { kOpen, kWriting, kDone };
  using Clock = std::chrono::steady_clock;

  int64_t take() { return next_.fetch_add(1, std::memory_order_relaxed); }
  bool may_write(int64_t task) {
    uint8_t open = kOpen;
    return states_[task].compare_exchange_strong(open, kWriting, std::memory_order_acq_rel);
  }
  void settle(int64_t task) { states_[task].store(kDone, std::memory_order_release); }
  uint8_t state(int64_t task) const { return states_[task].load(std::memory_order_acquire); }

  // A moment's wait for another thread, the longer the more often it is called.
  static void pause(int64_t& waited);

  const int64_t tasks_;

 private:
  const Kept kept_;
  const std::unique_ptr<std::atomic<uint8_t>[]> states_;
  std::atomic<int64_t> next_{0};
};

// `make`: memory of a thread; `compute` and `write` a task with it. Copied into the region, so they
// must hold by value what they use.
template <typename Make, typename Compute, typename Write>
class RegionOf final : public Region {
 public:
  RegionOf(int64_t tasks, Kept kept, Make make, Compute compute, Write write)
      : Region(tasks, std::move(kept)), make_(make), compute_(compute), write_(write) {}

  void help() override {
    auto own = make_();
    for (int64_t task; (task = take()) < tasks_;) run(own, task);
  }

  void lead() override {
    auto own = make_();
    const auto begin = Clock::now();
    int64_t count = 0;
    for (int64_t task; (task = take()) < tasks_; ++count) run(own, task);
    const auto end = Clock::now();
    const auto patience = count ? 2 * (end - begin) / count : Clock::duration::zero();
    int64_t waited = 0;
    for (int64_t task = 0; task < tasks_; ++task)
      while (state(task) != kDone) {
        if (state(task) == kOpen && Clock::now() - end > patience) run(own, task);
        pause(waited);
      }
  }

 private:
  template <typename Own>
  void run(Own& own, int64_t task) {
    if (state(task) != kOpen) return;
    compute_(own, task);
    if (!may_write(task)) return;
    write_(own, task);
    settle(task);
  }

  Make make_;
  Compute compute_;
  Write write_;
};

// Threads that regions of this thread have, the calling one among them.
int64_t num_threads();

// All tasks of a region: on the threads of the pool where it is in use, else on OpenMP's.
void run(const std::shared_ptr<Region>& region, int64_t tasks);

template <typename Make, typename Compute, typename Write>
void in_parallel(int64_t tasks, Kept kept, Make make, Compute compute, Write write) {
  if (!tasks) return;
  using Tasks = RegionOf<Make, Compute, Write>;
  run(std::make_shared<Tasks>(tasks, std::move(kept), make, compute, write), tasks);
}

// Rows [0, n), `grain` at a time, by a function of (begin, end) that writes as it goes. Such a task
// is never computed twice, so nothing needs to be kept.
template <typename Write>
void in_rows(int64_t n, int64_t grain, Write write) {
  in_parallel((n + grain - 1) / grain, {}, [] { return 0; }, [](int, int64_t) {},
              [=](int, int64_t task) { write(task * grain, std::min(n, (task + 1) * grain)); });
}

}  // namespace coppice
