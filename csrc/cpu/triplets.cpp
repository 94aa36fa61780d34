// The loss of explicit and of indexed triplets, and its gradient.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "../ops.h"
#include "convert.h"
#include "interrupt.h"
#include "pulls.h"

namespace triplet_ext {
namespace {

// Triplets whose sums are added up in one piece: fixed, so that no result depends on the number of threads.
constexpr int64_t kChunk = 64;
constexpr int64_t kChunks = 16;  // between two looks for an interrupt

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
  Watch watch;
  at::parallel_for(0, chunks, grain(3 * kChunk * task.depth), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end && (c % kChunks || watch.go_on()); ++c)
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
    Watch watch;
    at::parallel_for(0, count, grain(6 * depth), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin, piece; t < end && watch.go_on(); t = piece) {
        piece = std::min(end, t + kChunks * kChunk);
        kernels<T>().backward(task, t, piece, weight.data(), weight.step, weight.scale, out[0], out[1], out[2]);
      }
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
    Pulls<T> pulls(own.size(0), indexed.apart ? other.size(0) : 0, own.size(1));
    pulls.add(task, [&](int64_t t) { return weight.of(t); }, own.mutable_data_ptr<T>(), other.mutable_data_ptr<T>());
    return std::make_tuple(own.to(embeddings.scalar_type()), other.to(embeddings.scalar_type()));
  });
}

}  // namespace triplet_ext
