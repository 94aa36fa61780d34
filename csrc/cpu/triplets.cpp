// The loss of explicit and of indexed triplets, and its gradient.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "../ops.h"
#include "convert.h"

namespace triplet_ext {
namespace {

// Triplets whose sums are added up in one piece: fixed, so that no result depends on the number of threads.
constexpr int64_t kChunk = 64;
constexpr int64_t kSerialElements = 1 << 17;  // below this, starting threads costs more than it saves

int64_t grain(int64_t elements_each) { return std::max<int64_t>(1, kSerialElements / (elements_each + 1)); }

int64_t distinct(const int64_t* index, int64_t count) {
  std::vector<bool> seen(count ? *std::max_element(index, index + count) + 1 : 0);
  int64_t found = 0;
  for (int64_t t = 0; t < count; ++t) {
    found += !seen[index[t]];
    seen[index[t]] = true;
  }
  return found;
}

template <typename T>
Loss forward(TripletTask<T> task, Reduction reduction) {
  const int64_t count = task.count, chunks = (count + kChunk - 1) / kChunk;
  const auto options = at::TensorOptions(c10::CppTypeToScalarType<T>::value);
  const bool none = reduction == Reduction::None;
  at::Tensor loss = none ? at::empty({count}, options) : at::empty({}, options);
  at::Tensor distances = at::empty({task.measure.swap ? 3 : 2, count}, options);
  at::Tensor stats = at::empty({kStats}, at::TensorOptions(at::kDouble));
  task.distances = distances.mutable_data_ptr<T>();
  T* losses = none ? loss.mutable_data_ptr<T>() : nullptr;

  std::vector<double> sums(chunks * kSums);
  at::parallel_for(0, chunks, grain(3 * kChunk * task.depth), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c)
      kernels<T>().forward(task, c * kChunk, std::min(count, (c + 1) * kChunk), losses, &sums[c * kSums]);
  });
  double total[kSums] = {};
  for (int64_t c = 0; c < chunks; ++c)
    for (int i = 0; i < kSums; ++i) total[i] += sums[c * kSums + i];

  double* s = stats.mutable_data_ptr<double>();
  write_stats(s, task.a ? double(distinct(task.a, count)) : total[kSumTriplets], total[kSumTriplets], total[kSumActive],
              total[kSumPositive], total[kSumNegative]);
  if (!none) *loss.mutable_data_ptr<T>() = T(total[kSumLoss] / divisor_of(s, reduction));
  return {loss, distances, stats};
}

// --- indexed triplets -----------------------------------------------------------------------------------------

void check_range(const at::Tensor& index, int64_t rows, const char* name) {
  const int64_t* i = index_of(index);
  const int64_t n = index.numel();
  if (n == 0) return;
  const auto [low, high] = std::minmax_element(i, i + n);
  TORCH_CHECK_VALUE(*low >= 0 && *high < rows, "triplets.", name, " must index one of ", rows, " rows, got ", *low,
                    " to ", *high);
}

template <typename T>
struct Indexed {
  at::Tensor x, r, a, p, n;  // rows in the accumulation type; indices, a undefined where it is absent
  bool apart;                // references of their own

  Indexed(const at::Tensor& embeddings, const OptionalTensor& references, const OptionalTensor& anchor,
          const at::Tensor& positive, const at::Tensor& negative)
      : x(as_rows(embeddings)), p(positive.contiguous()), n(negative.contiguous()), apart(references.has_value()) {
    r = apart ? as_rows(*references) : x;
    if (anchor) a = anchor->contiguous();
  }

  TripletTask<T> task(const Measure& measure) const {
    return {rows_of<T>(x), rows_of<T>(r), rows_of<T>(r), a.defined() ? index_of(a) : nullptr,
            index_of(p),   index_of(n),   x.size(1),     measure,
            nullptr,       p.size(0)};
  }
};

// Where a pull acts, before its row is known by address.
template <typename T>
struct Link {
  int64_t row, other;
  bool on_x, other_on_x;
  T weight, distance;
};

// Calls f(link) for each pull of each triplet, in ascending order of the triplets.
template <typename T, typename F>
void for_each_link(const TripletTask<T>& task, const Weight<T>& weight, F f) {
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
    const T slope = triplet_slope_of(excess, measure) * weight.of(t);
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

// Row by row from an inverse index: pulls sorted by the row they act on, triplets ascending within a row.
template <typename T>
void backward(const TripletTask<T>& task, const Weight<T>& weight, bool apart, at::Tensor& grad_x, at::Tensor& grad_r) {
  const int64_t on_x = grad_x.size(0), on_r = apart ? grad_r.size(0) : 0, depth = task.depth;
  const auto slot = [&](const Link<T>& link) { return link.on_x || !apart ? link.row : on_x + link.row; };
  std::vector<int64_t> start(on_x + on_r + 1);
  for_each_link<T>(task, weight, [&](const Link<T>& link) { ++start[slot(link) + 1]; });
  for (int64_t i = 0; i < on_x + on_r; ++i) start[i + 1] += start[i];
  std::vector<Pull<T>> pulls(start.back());
  std::vector<int64_t> next(start.begin(), start.end() - 1);
  for_each_link<T>(task, weight, [&](const Link<T>& link) {
    const T* other = link.other_on_x ? task.anchor.row(link.other) : task.positive.row(link.other);
    pulls[next[slot(link)]++] = {other, link.weight, link.distance};
  });

  T* gx = grad_x.mutable_data_ptr<T>();
  T* gr = grad_r.mutable_data_ptr<T>();
  const bool cosine = task.measure.distance == Distance::Cosine;
  at::parallel_for(0, on_x + on_r, grain(5 * depth), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const bool of_x = i < on_x;
      const T* row = of_x ? task.anchor.row(i) : task.positive.row(i - on_x);
      kernels<T>().gather(row, depth, cosine, pulls.data() + start[i], start[i + 1] - start[i],
                          of_x ? gx + i * depth : gr + (i - on_x) * depth);
    }
  });
}

}  // namespace

Loss triplet_loss_cpu(const at::Tensor& anchor, const at::Tensor& positive, const at::Tensor& negative, double margin,
                      std::string_view distance, double p, double eps, bool swap, bool soft_margin,
                      std::string_view reduction) {
  const Measure measure{margin, p, eps, parse_distance(distance), swap, soft_margin, kSlopeAtZero};
  const at::Tensor a = as_rows(anchor), b = as_rows(positive), c = as_rows(negative);
  return dispatch(a, [&](auto zero) {
    using T = decltype(zero);
    const TripletTask<T> task{rows_of<T>(a), rows_of<T>(b), rows_of<T>(c), nullptr, nullptr,
                              nullptr,       a.size(1),     measure,       nullptr, a.size(0)};
    return forward(task, parse_reduction(reduction));
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> triplet_loss_backward_cpu(
    const at::Tensor& grad, const at::Tensor& anchor, const at::Tensor& positive, const at::Tensor& negative,
    const at::Tensor& distances, const at::Tensor& stats, double margin, std::string_view distance, double p,
    double eps, bool swap, bool soft_margin, std::string_view reduction) {
  const Measure measure{margin, p, eps, parse_distance(distance), swap, soft_margin, kSlopeAtZero};
  const at::Tensor a = as_rows(anchor), b = as_rows(positive), c = as_rows(negative);
  return dispatch(a, [&](auto zero) {
    using T = decltype(zero);
    const int64_t count = a.size(0), depth = a.size(1);
    const TripletTask<T> task{rows_of<T>(a), rows_of<T>(b), rows_of<T>(c),
                              nullptr,       nullptr,       nullptr,
                              depth,         measure,       const_cast<T*>(distances.const_data_ptr<T>()),
                              count};
    const Weight<T> weight(grad, stats, parse_reduction(reduction));
    const auto options = a.options();
    at::Tensor ga = at::empty({count, depth}, options), gp = at::empty({count, depth}, options),
               gn = at::empty({count, depth}, options);
    T* const out[] = {ga.mutable_data_ptr<T>(), gp.mutable_data_ptr<T>(), gn.mutable_data_ptr<T>()};
    at::parallel_for(0, count, grain(6 * depth), [&](int64_t begin, int64_t end) {
      kernels<T>().backward(task, begin, end, weight.data(), weight.step, weight.scale, out[0], out[1], out[2]);
    });
    const auto type = anchor.scalar_type();
    return std::make_tuple(ga.to(type), gp.to(type), gn.to(type));
  });
}

Loss indexed_triplet_loss_cpu(const at::Tensor& embeddings, const OptionalTensor& references,
                              const OptionalTensor& anchor, const at::Tensor& positive, const at::Tensor& negative,
                              double margin, std::string_view distance, bool swap, bool soft_margin,
                              std::string_view reduction) {
  const Measure measure{margin, 2, 0, parse_distance(distance), swap, soft_margin};
  return dispatch(embeddings, [&](auto zero) {
    using T = decltype(zero);
    const Indexed<T> indexed(embeddings, references, anchor, positive, negative);
    if (anchor) {
      check_range(indexed.a, indexed.x.size(0), "anchor");
      check_range(indexed.p, indexed.r.size(0), "positive");
      check_range(indexed.n, indexed.r.size(0), "negative");
    }
    return forward(indexed.task(measure), parse_reduction(reduction));
  });
}

std::tuple<at::Tensor, at::Tensor> indexed_triplet_loss_backward_cpu(
    const at::Tensor& grad, const at::Tensor& embeddings, const OptionalTensor& references,
    const OptionalTensor& anchor, const at::Tensor& positive, const at::Tensor& negative, const at::Tensor& distances,
    const at::Tensor& stats, double margin, std::string_view distance, bool swap, bool soft_margin,
    std::string_view reduction) {
  const Measure measure{margin, 2, 0, parse_distance(distance), swap, soft_margin};
  return dispatch(embeddings, [&](auto zero) {
    using T = decltype(zero);
    const Indexed<T> indexed(embeddings, references, anchor, positive, negative);
    TripletTask<T> task = indexed.task(measure);
    task.distances = const_cast<T*>(distances.const_data_ptr<T>());
    const Weight<T> weight(grad, stats, parse_reduction(reduction));
    at::Tensor own = at::empty(embeddings.sizes(), indexed.x.options());
    at::Tensor other = at::empty(references ? references->sizes() : at::IntArrayRef{0}, indexed.x.options());
    backward<T>(task, weight, indexed.apart, own, other);
    return std::make_tuple(own.to(embeddings.scalar_type()), other.to(embeddings.scalar_type()));
  });
}

}  // namespace triplet_ext
