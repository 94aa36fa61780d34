// Batch-hard selection. Three steps: every tile of the Gram matrix once, keeping the two best values of each
// row; a certificate that says for which rows rounding cannot have changed the winner; and for the others the
// same tiles again, measuring in float64 what lies within rounding of the best. The result is therefore what
// float64 arithmetic would choose, at the price of float32.
#include <ATen/Parallel.h>
#include <ATen/ops/full.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "../ops.h"
#include "batch.h"
#include "interrupt.h"

namespace triplet_ext {
namespace {

// Top2 of every packed row.
template <typename T>
struct Best {
  int64_t size;
  Buffer<T> values;
  Buffer<Lane<T>> index;
  explicit Best(int64_t size = 0) : size(size), values(2 * size), index(size) {
    std::fill_n(values.get(), 2 * size, T(kNothing));
    std::fill_n(index.get(), size, Lane<T>(-1));
  }
  Top2<T> view() const { return {values.get(), values.get() + size, index.get()}; }
  void merge(const Best& other) {
    const Top2<T> top = view(), more = other.view();
    for (int64_t i = 0; i < size; ++i) {
      if (more.best[i] > top.best[i]) {
        top.second[i] = std::max(top.best[i], more.second[i]);
        top.best[i] = more.best[i];
        top.index[i] = more.index[i];
      } else {
        top.second[i] = std::max(top.second[i], more.best[i]);
      }
    }
  }
};

template <typename T>
struct Scan {
  Best<T> nearest, farthest;
};

// The two best of each anchor, from every tile once.
template <typename T>
Scan<T> scan(const Problem<T>& problem) {
  const Side<T>&a = problem.a, &r = problem.r;
  const int64_t P = kernels<T>().panel;
  const double products = double(a.count) * double(r.count) * double(a.depth + 16) / (problem.symmetric ? 2 : 1);
  const int64_t threads = products < kSerialProducts ? 1 : at::get_num_threads();
  int64_t block = std::clamp<int64_t>(kBlockBytes / (P * (a.depth + 1) * int64_t(sizeof(T))), 1, 16);
  const auto blocks = [&](const Side<T>& side) { return (side.panels + block - 1) / block; };
  while (block > 1 && threads > 1 && blocks(a) * blocks(r) < 16 * threads) block /= 2;

  std::vector<Scan<T>> found(threads);
  const int64_t columns = blocks(r);
  Tasks tasks(blocks(a) * columns);
  const Panels<T> pa = a.view(), pr = r.view();
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      Scan<T>& mine = found[thread] = {Best<T>(a.panels * P), Best<T>(a.panels * P)};
      for (int64_t task; tasks.take(task);) {
        const int64_t i = task / columns, j = task % columns;
        if (problem.symmetric && j < i) continue;
        const Block here{i * block, std::min(a.panels, (i + 1) * block), j * block,
                         std::min(r.panels, (j + 1) * block)};
        kernels<T>().hardest(pa, pr, problem.packed_self.data(), problem.symmetric, here, mine.nearest.view(),
                             mine.farthest.view());
      }
    }
  });
  for (int64_t thread = 1; thread < threads; ++thread) {
    found[0].nearest.merge(found[thread].nearest);
    found[0].farthest.merge(found[thread].farthest);
  }
  return std::move(found[0]);
}

// Anchors for which rounding may have chosen the nearest, or the farthest: packed, and in full.
template <typename T>
struct Doubts {
  std::vector<int64_t> packed;
  std::vector<Doubtful<T>> rows;
};

// Writes the winners; returns what is in doubt.
template <typename T>
std::pair<Doubts<T>, Doubts<T>> certify(const Problem<T>& problem, const Scan<T>& found, int64_t* positive,
                                        int64_t* negative) {
  const Side<T>&a = problem.a, &r = problem.r;
  const RoundingBound bound = rounding_bound(problem);
  constexpr T kNever = std::numeric_limits<T>::infinity();
  std::pair<Doubts<T>, Doubts<T>> doubts;
  for (int64_t i = 0; i < a.count; ++i) {
    const int64_t o = a.order[i];
    if (!a.finite[o]) continue;
    // The winner; and, where another may be as good, the value from which on a row may be.
    const auto winner = [&](const Top2<T>& top, T& threshold) -> int64_t {
      const double best = top.best[i], second = top.second[i];
      if (best < -kHidden / 2) return -1;
      const double error = rounding_error(bound, a.norm[i], 2 * std::max(std::fabs(best), std::fabs(second)));
      if (second > -kHidden / 2 && !(best - second > error)) threshold = T(best - error);
      return r.order[top.index[i]];
    };
    const Doubtful<T> row{o, a.klass[i], problem.self[o], kNever, kNever, 0, 0, -1, -1};
    const auto doubt = [&](Doubts<T>& of, T Doubtful<T>::* threshold, const Top2<T>& top) {
      Doubtful<T> here = row;
      const int64_t chosen = winner(top, here.*threshold);
      if (here.*threshold != kNever) {
        of.packed.push_back(i);
        of.rows.push_back(here);
      }
      return chosen;
    };
    negative[o] = doubt(doubts.first, &Doubtful<T>::nearest, found.nearest.view());
    positive[o] = doubt(doubts.second, &Doubtful<T>::farthest, found.farthest.view());
  }
  return doubts;
}

// Of rows that are equal feature by feature, those that decide which one is an anchor's farthest positive: the first of
// its class in the caller's order, or else, where the anchor is that one itself, the second. Packed, ascending.
template <typename T>
std::vector<int64_t> first_positives(const Side<T>& r, const std::vector<int64_t>& first_equal) {
  std::vector<int64_t> seen(r.count, -1), of_class(r.count, 0), packed;
  // Within a class, original order: `seen` is the class in which a group of equal rows was met last.
  for (int64_t i = 0; i < r.count; ++i) {
    const int64_t group = first_equal[r.order[i]];
    if (seen[group] != r.klass[i]) of_class[group] = 0;
    seen[group] = r.klass[i];
    if (++of_class[group] <= 2) packed.push_back(i);
  }
  return packed;
}

// Measures the candidates of the rows in doubt exactly, a panel of rows at a time.
template <typename T>
void settle(const Problem<T>& problem, Doubts<T>& doubts, const Side<T>& among, const std::vector<int64_t>& order,
            int64_t* positive, int64_t* negative) {
  const Side<T>& a = problem.a;
  const Exact<T> exact = exact_of(problem, order.data());
  const int64_t P = kernels<T>().panel, count = int64_t(doubts.rows.size());
  const Panels<T> panels = among.view();
  Watch watch;
  at::parallel_for(0, (count + P - 1) / P, 1, [&](int64_t begin, int64_t end) {
    const Buffer<T> rows(P * a.depth), bias(P);
    std::vector<double> squares(P);
    for (int64_t g = begin; g < end && watch.go_on(); ++g) {
      const int64_t n = std::min(P, count - g * P);
      a.pack_panel(&doubts.packed[g * P], n, problem.scale, problem.centre, rows.get(), bias.get(), squares.data());
      kernels<T>().settle(rows.get(), bias.get(), panels, among.panels, exact, &doubts.rows[g * P], int(n));
    }
  });
  for (const Doubtful<T>& row : doubts.rows) {
    if (row.negative >= 0) negative[row.anchor] = row.negative;
    if (row.positive >= 0) positive[row.anchor] = row.positive;
  }
}

template <typename T>
void select(Side<T>& a, Side<T>* references, std::optional<int64_t> offset, bool cosine, int64_t* positive,
            int64_t* negative) {
  const Problem<T> problem(a, references, offset, cosine, std::numeric_limits<T>::max_exponent - 2);
  const Scan<T> found = scan(problem);
  auto [nearest, farthest] = certify(problem, found, positive, negative);
  const Side<T>& r = problem.r;
  if (int64_t(std::max(nearest.rows.size(), farthest.rows.size())) * kManyDoubts < a.count) {
    settle(problem, nearest, r, r.order, positive, negative);
    settle(problem, farthest, r, r.order, positive, negative);
  } else {
    // Usually because many rows are equal: compared one by one, they would cost as many exact distances as pairs.
    const std::vector<int64_t> first = first_equal_rows(r);
    const Side<T> few = r.subset(first_negatives(r, first), problem.scale, problem.centre);
    settle(problem, nearest, few, few.order, positive, negative);
    const Side<T> of_classes = r.subset(first_positives(r, first), problem.scale, problem.centre);
    settle(problem, farthest, of_classes, of_classes.order, positive, negative);
  }
  const auto allows = [&](int64_t anchor, int64_t reference) { return reference != problem.self[anchor]; };
  select_not_finite(problem.a, problem.r, allows, positive, negative);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> select_hardest_cpu(const at::Tensor& embeddings, const at::Tensor& labels,
                                                      const OptionalTensor& references,
                                                      const OptionalTensor& reference_labels,
                                                      std::optional<int64_t> reference_offset,
                                                      std::string_view distance) {
  const int64_t count = embeddings.size(0), total = references ? references->size(0) : count;
  check_rows(count, total);
  const auto options = at::TensorOptions(at::kLong);
  at::Tensor positive = at::full({count}, -1, options), negative = at::full({count}, -1, options);
  if (count == 0 || total == 0) return {positive, negative};
  const at::Tensor x = as_rows(embeddings), y = labels.contiguous();
  const at::Tensor r = references ? as_rows(*references) : x, z = references ? reference_labels->contiguous() : y;
  const bool cosine = parse_distance(distance) == Distance::Cosine;
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    Side<T> anchors = side_of<T>(x, y);
    std::optional<Side<T>> others;
    if (references) others = side_of<T>(r, z);
    select<T>(anchors, others ? &*others : nullptr, references ? reference_offset : 0, cosine,
              positive.mutable_data_ptr<int64_t>(), negative.mutable_data_ptr<int64_t>());
  });
  return {positive, negative};
}

}  // namespace triplet_ext
