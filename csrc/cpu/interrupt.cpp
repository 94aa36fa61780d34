#include "interrupt.h"

#include <ATen/Parallel.h>

#include <chrono>

namespace triplet_ext {
namespace {

using Clock = std::chrono::steady_clock;
constexpr auto kOften = std::chrono::milliseconds(100);  // looking may have to wait for another thread's Python
std::atomic<void (*)()> check{nullptr};
thread_local Clock::time_point looked, seen;  // when last; and when check_interrupt was last called

}  // namespace

void set_interrupt_check(void (*function)()) { check = function; }

void check_interrupt() {
  const auto look = check.load(std::memory_order_relaxed);
  if (!look || at::get_thread_num() != 0) return;
  seen = Clock::now();
  if (seen - looked < kOften) return;
  look();
  looked = Clock::now();
}

// After a pause this is another call, which need not look at once.
Watch::Watch() {
  const auto now = Clock::now();
  if (now - seen > kOften) looked = now;
  seen = now;
}

}  // namespace triplet_ext
