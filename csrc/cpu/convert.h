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

// Calls f with a zero of the accumulation type.
template <typename F>
auto dispatch(const at::Tensor& x, F f) {
  return accumulation_type(x) == at::kDouble ? f(double()) : f(float());
}

}  // namespace triplet_ext
