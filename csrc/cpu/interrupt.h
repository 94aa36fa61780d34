// A long call can be interrupted: the thread that made it looks between tasks whether it is to end, and the others stop
// at their next task. What an interrupt is, whoever loads this library says: nothing here knows of Python.
#pragma once

#include <atomic>
#include <cstdint>

namespace triplet_ext {

// What is called to look, on the thread that called an operator: it throws what ends the call.
void set_interrupt_check(void (*check)());

// Looks, if this is the thread that called and it has not looked for a while. Throws if the call is interrupted.
void check_interrupt();

// One parallel loop.
class Watch {
 public:
  Watch();
  // Whether to go on; throws on the thread that called.
  bool go_on() {
    if (stopped_) return false;
    try {
      check_interrupt();
    } catch (...) {
      stopped_ = true;
      throw;
    }
    return true;
  }

 private:
  std::atomic<bool> stopped_{false};
};

// The tasks 0, 1, ... of one parallel loop, for its threads to take in turn.
class Tasks {
 public:
  explicit Tasks(int64_t count) : count_(count) {}
  bool take(int64_t& task) { return watch_.go_on() && (task = next_++) < count_; }

 private:
  Watch watch_;
  std::atomic<int64_t> next_{0};
  const int64_t count_;
};

}  // namespace triplet_ext
