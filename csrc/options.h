// An operator's options, from what Python says.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <torch/version.h>

#include <algorithm>
#include <string>
#include <string_view>

#include "triplet.h"

namespace triplet_ext {

// torch 2.14 moved the derivative of clamp_min at its bound from 1 to 0, and TripletMarginLoss is torch's.
constexpr double kSlopeAtZero = TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 14 ? 0 : 1;

inline Distance parse_distance(std::string_view name) {
  if (name == "squared_euclidean") return Distance::SquaredEuclidean;
  if (name == "euclidean") return Distance::Euclidean;
  if (name == "cosine") return Distance::Cosine;
  TORCH_CHECK_VALUE(name == "p_norm", "unknown distance '", std::string(name), "'");
  return Distance::PNorm;
}

inline PositiveRule parse_positive(std::string_view name) {
  if (name == "hard") return PositiveRule::Hard;
  if (name == "easy") return PositiveRule::Easy;
  TORCH_CHECK_VALUE(name == "all", "unknown rule for positives '", std::string(name), "'");
  return PositiveRule::All;
}

inline NegativeRule parse_negative(std::string_view name) {
  if (name == "hard") return NegativeRule::Hard;
  if (name == "semi_hard") return NegativeRule::SemiHard;
  TORCH_CHECK_VALUE(name == "all", "unknown rule for negatives '", std::string(name), "'");
  return NegativeRule::All;
}

inline Reduction parse_reduction(std::string_view name) {
  if (name == "mean") return Reduction::Mean;
  if (name == "mean_active") return Reduction::MeanActive;
  if (name == "sum") return Reduction::Sum;
  TORCH_CHECK_VALUE(name == "none", "unknown reduction '", std::string(name), "'");
  return Reduction::None;
}

// Of what a strategy's forward has to tell its backward, int32 [B, width]: triplet_ext/reference.py, room_for_backward.
inline int64_t saved_width(const at::Tensor& embeddings, int64_t references) {
  return std::max((embeddings.size(1) * int64_t(embeddings.element_size()) + 3) / 4, (references + 1023) / 1024);
}

inline at::ScalarType accumulation_type(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

}  // namespace triplet_ext
