// From tensors to what the kernels take.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <string_view>

#include "kernels.h"

namespace triplet_ext {

inline Distance parse_distance(std::string_view name) {
  if (name == "squared_euclidean") return Distance::SquaredEuclidean;
  if (name == "euclidean") return Distance::Euclidean;
  if (name == "cosine") return Distance::Cosine;
  TORCH_CHECK_VALUE(name == "p_norm", "unknown distance '", std::string(name), "'");
  return Distance::PNorm;
}

inline Reduction parse_reduction(std::string_view name) {
  if (name == "mean") return Reduction::Mean;
  if (name == "mean_active") return Reduction::MeanActive;
  if (name == "sum") return Reduction::Sum;
  TORCH_CHECK_VALUE(name == "none", "unknown reduction '", std::string(name), "'");
  return Reduction::None;
}

inline at::ScalarType accumulation_type(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

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
