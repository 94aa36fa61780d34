// The gradient of triplets that are given as row numbers.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "convert.h"
#include "interrupt.h"

namespace triplet_ext {

constexpr int64_t kSerialElements = 1 << 17;  // below this, starting threads costs more than it saves
inline int64_t grain(int64_t elements_each) { return std::max<int64_t>(1, kSerialElements / (elements_each + 1)); }

// Triplets as row numbers.
struct Triplets {
  std::vector<int64_t> anchor, positive, negative;

  int64_t size() const { return int64_t(anchor.size()); }
  void add(int64_t a, int64_t p, int64_t n) {
    anchor.push_back(a);
    positive.push_back(p);
    negative.push_back(n);
  }
  void clear() {
    for (auto* rows : {&anchor, &positive, &negative}) rows->clear();
  }
};

// Where a pull acts, before its row is known by address.
template <typename T>
struct Link {
  int64_t row, other;
  bool on_x, other_on_x;
  T weight, distance;
};

// Calls f(link) for each pull of each triplet, in ascending order of the triplets; weight(t) is that of triplet t's
// loss.
template <typename T, typename W, typename F>
void for_each_link(const TripletTask<T>& task, W weight, F f) {
  const Measure& measure = task.measure;
  const bool cosine = measure.distance == Distance::Cosine;
  const auto pull = [&](T w, T d) -> T { return cosine ? w : pull_of(w, d, measure); };
  for (int64_t t = 0; t < task.count; ++t) {
    const int64_t a = task.a ? task.a[t] : t, p = task.p[t], n = task.n[t];
    if (p < 0 || n < 0) {
      // No triplet; but a row that is not finite passes that on.
      T poison = 0;
      for (int64_t k = 0; k < task.depth; ++k) poison += task.anchor.row(a)[k] * T(0);
      if (poison != 0) f(Link<T>{a, a, true, true, poison, 0});
      continue;
    }
    const T ap = task.distances[t], an = task.distances[task.count + t];
    const T pn = measure.swap ? task.distances[2 * task.count + t] : T(0);
    const T excess = triplet_excess_of(ap, negative_distance_of(an, pn, measure.swap), measure);
    const T slope = triplet_slope_of(excess, measure) * weight(t);
    if (slope == 0) continue;
    const bool swapped = swapped_share_of(an, pn, measure) != 0;
    const T u = pull(slope, ap), v = swapped ? T(0) : pull(-slope, an), w = swapped ? pull(-slope, pn) : T(0);
    f(Link<T>{a, p, true, false, u, ap});
    f(Link<T>{p, a, false, true, u, ap});
    if (swapped) {
      f(Link<T>{p, n, false, false, w, pn});
      f(Link<T>{n, p, false, false, w, pn});
    } else {
      f(Link<T>{a, n, true, false, v, an});
      f(Link<T>{n, a, false, true, v, an});
    }
  }
}

// The gradients of the rows, of some triplets after others. Row by row from an inverse index: pulls sorted by the row
// they act on, triplets ascending within a row.
template <typename T>
class Pulls {
 public:
  // on_x rows of anchors, and on_r references; 0: the anchors are the references.
  Pulls(int64_t on_x, int64_t on_r, int64_t depth) : on_x_(on_x), on_r_(on_r), depth_(depth), start_(on_x + on_r + 1) {}

  // Writes the gradients, or, after the first time, adds to them.
  template <typename W>
  void add(const TripletTask<T>& task, W weight, T* grad_x, T* grad_r) {
    const auto slot = [&](const Link<T>& link) { return link.on_x || !on_r_ ? link.row : on_x_ + link.row; };
    std::fill(start_.begin(), start_.end(), 0);
    for_each_link<T>(task, weight, [&](const Link<T>& link) { ++start_[slot(link) + 1]; });
    for (int64_t i = 0; i < on_x_ + on_r_; ++i) start_[i + 1] += start_[i];
    pulls_.resize(start_.back());
    next_.assign(start_.begin(), start_.end() - 1);
    for_each_link<T>(task, weight, [&](const Link<T>& link) {
      const T* other = link.other_on_x ? task.anchor.row(link.other) : task.positive.row(link.other);
      pulls_[next_[slot(link)]++] = {other, link.weight, link.distance};
    });

    const bool cosine = task.measure.distance == Distance::Cosine;
    Watch watch;
    at::parallel_for(0, on_x_ + on_r_, grain(5 * depth_), [&](int64_t begin, int64_t end) {
      std::vector<T> sum(depth_);
      for (int64_t i = begin; i < end; ++i) {
        if (i % kRows == 0 && !watch.go_on()) return;
        if (!first_ && start_[i] == start_[i + 1]) continue;
        const bool of_x = i < on_x_;
        const T* row = of_x ? task.anchor.row(i) : task.positive.row(i - on_x_);
        T* grad = of_x ? grad_x + i * depth_ : grad_r + (i - on_x_) * depth_;
        T* to = first_ ? grad : sum.data();
        kernels<T>().gather(row, depth_, cosine, pulls_.data() + start_[i], start_[i + 1] - start_[i], to);
        for (int64_t k = 0; k < depth_ && !first_; ++k) grad[k] += sum[k];
      }
    });
    first_ = false;
  }

 private:
  static constexpr int64_t kRows = 64;  // between two looks for an interrupt
  int64_t on_x_, on_r_, depth_;
  bool first_ = true;
  std::vector<int64_t> start_, next_;
  std::vector<Pull<T>> pulls_;
};

}  // namespace triplet_ext
