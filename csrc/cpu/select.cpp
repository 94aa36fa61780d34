// Batch-hard selection. Three steps: every tile of the Gram matrix once, keeping the two best values of each
// row; a certificate that says for which rows rounding cannot have changed the winner; and for the others the
// same tiles again, measuring in float64 what lies within rounding of the best. The result is therefore what
// float64 arithmetic would choose, at the price of float32.
#include <ATen/Parallel.h>
#include <ATen/ops/full.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "../ops.h"
#include "batch.h"

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

// How far a computed squared distance may be from the true one.
struct RoundingBound {
  double relative, absolute, unit;
  bool cosine, hopeless;

  // Of a distance s from a row of that norm; the other norm is at most norm + sqrt(s).
  double operator()(double norm, double s) const {
    if (hopeless) return std::numeric_limits<double>::infinity();
    const double root = std::sqrt(std::max(0.0, s)), reach = 2 * norm + root;
    // Scaling a row to unit length rounds it in proportion to its length, not to its distance from the centre;
    // and what ties with the best must be looked at, too.
    const double scaling = cosine ? unit * (10 * root + 32 * unit) + 2 * kCosineTie : 0;
    return 1.1 * (relative * reach * reach + scaling) + absolute;
  }
};

template <typename T>
RoundingBound rounding_bound(int64_t depth, bool cosine, bool hopeless) {
  const double unit = std::numeric_limits<T>::epsilon() / 2;
  // The inner product is one chain of `depth` sums: 2 (depth + 1) |x||y| <= (depth + 1) / 2 (|x| + |y|)^2 units.
  // The rest is for the biases, the final subtraction and the centring.
  return {(double(depth) / 2 + 16) * unit, 4 * double(depth + 1) * std::numeric_limits<T>::min(), unit, cosine,
          hopeless};
}

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
  std::atomic<int64_t> ticket{0};
  const int64_t columns = blocks(r), tasks = blocks(a) * columns;
  const Panels<T> pa = a.view(), pr = r.view();
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      Scan<T>& mine = found[thread] = {Best<T>(a.panels * P), Best<T>(a.panels * P)};
      for (int64_t task; (task = ticket++) < tasks;) {
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

// Writes the winners; returns the anchors, packed and in full, for which rounding may have chosen them.
template <typename T>
std::pair<std::vector<int64_t>, std::vector<Doubtful<T>>> certify(const Problem<T>& problem, const Scan<T>& found,
                                                                  int64_t* positive, int64_t* negative) {
  const Side<T>&a = problem.a, &r = problem.r;
  bool hopeless = false;  // a scale that is subnormal in T: nothing is known about the packed row
  for (const Side<T>* side : {&a, &r})
    for (double s : side->scale) hopeless |= s < std::numeric_limits<T>::min();
  const RoundingBound bound = rounding_bound<T>(a.depth, problem.cosine, hopeless);
  constexpr T kNever = std::numeric_limits<T>::infinity();
  std::pair<std::vector<int64_t>, std::vector<Doubtful<T>>> doubts;
  for (int64_t i = 0; i < a.count; ++i) {
    const int64_t o = a.order[i];
    if (!a.finite[o]) continue;
    Doubtful<T> row{o, a.klass[i], problem.packed_self[i], kNever, kNever, 0, 0, -1, -1};
    // The winner; and, where another may be as good, the value from which on a row may be.
    const auto winner = [&](const Top2<T>& top, T& threshold) -> int64_t {
      const double best = top.best[i], second = top.second[i];
      if (best < -kHidden / 2) return -1;
      const double error = bound(a.norm[i], 2 * std::max(std::fabs(best), std::fabs(second)));
      if (second > -kHidden / 2 && !(best - second > error)) threshold = T(best - error);
      return r.order[top.index[i]];
    };
    negative[o] = winner(found.nearest.view(), row.nearest);
    positive[o] = winner(found.farthest.view(), row.farthest);
    if (row.nearest == kNever && row.farthest == kNever) continue;
    doubts.first.push_back(i);
    doubts.second.push_back(row);
  }
  return doubts;
}

// Measures the candidates of the rows in doubt exactly, a panel of rows at a time.
template <typename T>
void settle(const Problem<T>& problem, const std::vector<int64_t>& packed, std::vector<Doubtful<T>>& doubtful,
            int64_t* positive, int64_t* negative) {
  const Side<T>&a = problem.a, &r = problem.r;
  const bool cosine = problem.cosine;
  const Exact<T> exact{a.rows,
                       r.rows,
                       a.depth,
                       cosine ? a.scale.data() : nullptr,
                       cosine ? r.scale.data() : nullptr,
                       cosine ? a.lack.data() : nullptr,
                       cosine ? r.lack.data() : nullptr,
                       r.order.data()};
  const int64_t P = kernels<T>().panel, count = int64_t(doubtful.size());
  const Panels<T> panels = r.view();
  at::parallel_for(0, (count + P - 1) / P, 1, [&](int64_t begin, int64_t end) {
    const Buffer<T> rows(P * a.depth), bias(P);
    std::vector<double> squares(P);
    for (int64_t g = begin; g < end; ++g) {
      const int64_t n = std::min(P, count - g * P);
      a.pack_panel(&packed[g * P], n, problem.scale, problem.centre, rows.get(), bias.get(), squares.data());
      kernels<T>().settle(rows.get(), bias.get(), panels, r.panels, exact, &doubtful[g * P], int(n));
    }
  });
  for (const Doubtful<T>& row : doubtful) {
    if (row.negative >= 0) negative[row.anchor] = row.negative;
    if (row.positive >= 0) positive[row.anchor] = row.positive;
  }
}

template <typename T>
void select(Side<T>& a, Side<T>* references, std::optional<int64_t> offset, bool cosine, int64_t* positive,
            int64_t* negative) {
  const Problem<T> problem(a, references, offset, cosine, std::numeric_limits<T>::max_exponent - 2);
  const Scan<T> found = scan(problem);
  auto [packed, doubtful] = certify(problem, found, positive, negative);
  settle(problem, packed, doubtful, positive, negative);
  select_not_finite(problem.a, problem.r, problem.self, positive, negative);
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
