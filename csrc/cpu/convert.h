// From tensors to what the kernels take.
#pragma once

#include <algorithm>

#include "../options.h"
#include "kernels.h"

namespace triplet_ext {

// A matrix in the accumulation type whose rows are contiguous: the tensor itself wherever that is the case.
inline at::Tensor as_rows(const at::Tensor& x) {
  const at::Tensor wide = x.to(accumulation_type(x));
  return wide.size(1) <= 1 || wide.stride(1) == 1 ? wide : wide.contiguous();
}

template <typename T>
Rows<T> rows_of(const at::Tensor& x) {
  return {x.const_data_ptr<T>(), x.stride(0)};
}

inline const int64_t* index_of(const at::Tensor& index) { return index.const_data_ptr<int64_t>(); }

// Calls f with a zero of the accumulation type.
template <typename F>
auto dispatch(const at::Tensor& x, F f) {
  return accumulation_type(x) == at::kDouble ? f(double()) : f(float());
}

// What the sum of all losses is reduced to.
inline double reduced(double sum, const double* stats, Reduction reduction) {
  if (reduction == Reduction::Mean) return sum / std::max(1.0, stats[kTriplets]);
  if (reduction == Reduction::MeanActive) return sum / std::max(1.0, stats[kActive]);
  return sum;
}

// The gradient of the loss as the kernels take it: weight[t * step] * scale.
template <typename T>
struct Weight {
  at::Tensor values;
  int64_t step;
  T scale;

  Weight(const at::Tensor& grad, const at::Tensor& stats, Reduction reduction)
      : values(grad.to(c10::CppTypeToScalarType<T>::value).contiguous()),
        step(reduction == Reduction::None ? 1 : 0),
        scale(1) {
    const double* s = stats.const_data_ptr<double>();
    if (reduction == Reduction::Mean) scale = T(1 / std::max(1.0, s[kTriplets]));
    if (reduction == Reduction::MeanActive) scale = T(1 / std::max(1.0, s[kActive]));
  }
  const T* data() const { return values.const_data_ptr<T>(); }
  T of(int64_t t) const { return data()[t * step] * scale; }
};

}  // namespace triplet_ext
