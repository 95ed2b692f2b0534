// Work shared by the threads of XLA's pool.

#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>

#include "xla/ffi/api/ffi.h"

// Calls `work` with 0 … count - 1, on this thread and those of the pool.
inline void for_each(xla::ffi::ThreadPool& pool, int64_t count, bool is_small,
              const std::function<void(int64_t)>& work) {
  int64_t threads = std::min<int64_t>(pool.num_threads(), count);
  if (threads <= 1 || is_small) {
    for (int64_t i = 0; i < count; ++i) work(i);
    return;
  }
  struct State {
    std::atomic<int64_t> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable is_done;
  };
  auto state = std::make_shared<State>();
  // A thread that starts late finds nothing left, and no longer needs `work`.
  auto run = [state, count, work = &work] {
    for (int64_t i; (i = state->next++) < count;) {
      (*work)(i);
      if (++state->done == count) {
        std::lock_guard<std::mutex> lock(state->mutex);
        state->is_done.notify_one();
      }
    }
  };
  for (int64_t i = 1; i < threads; ++i) pool.Schedule(decltype(run)(run));
  run();
  std::unique_lock<std::mutex> lock(state->mutex);
  state->is_done.wait(lock, [&] { return state->done == count; });
}
