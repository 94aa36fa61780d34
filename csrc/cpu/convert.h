// From tensors to what the kernels take.
#pragma once

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

// The gradient of the loss as the kernels take it: weight[t * step] * scale.
template <typename T>
struct Weight {
  at::Tensor values;
  int64_t step;
  T scale;

  Weight(const at::Tensor& grad, const at::Tensor& stats, Reduction reduction)
      : values(grad.to(c10::CppTypeToScalarType<T>::value).contiguous()),
        step(reduction == Reduction::None ? 1 : 0),
        scale(T(1 / divisor_of(stats.const_data_ptr<double>(), reduction))) {}
  const T* data() const { return values.const_data_ptr<T>(); }
  T of(int64_t t) const { return data()[t * step] * scale; }
};

}  // namespace triplet_ext
