// The operators that mine, with fewer positives: what a memory needs of them.
#pragma once

#include <cstdint>

#include "../ops.h"
#include "../triplet.h"

namespace triplet_ext {

// Which references may be an anchor's positives, by row numbers of the caller. Those that may not have the anchor's
// label, hence are no negatives either.
struct Restriction {
  const int64_t* ids = nullptr;        // [B], or null; a reference of an anchor's own id is left out
  const int64_t* other_ids = nullptr;  // [R]; kNoId: nobody's own
  const int64_t* given = nullptr;      // [B], or null; the only positive of each anchor, -1 if there is none

  bool allows(int64_t anchor, int64_t reference) const {
    if (given) return given[anchor] == reference;
    return !ids || ids[anchor] != other_ids[reference] || ids[anchor] == kNoId;
  }
};

std::tuple<at::Tensor, at::Tensor> select_pair_restricted(const at::Tensor& embeddings, const at::Tensor& labels,
                                                          const OptionalTensor& references,
                                                          const OptionalTensor& reference_labels,
                                                          std::optional<int64_t> reference_offset,
                                                          const Restriction& restriction, std::string_view distance,
                                                          std::string_view positive, std::string_view negative);

Loss mined_triplet_loss_restricted(const at::Tensor& embeddings, const at::Tensor& labels,
                                   const OptionalTensor& references, const OptionalTensor& reference_labels,
                                   std::optional<int64_t> reference_offset, const Restriction& restriction,
                                   std::string_view positive, std::string_view negative, double margin,
                                   std::string_view distance, bool swap, bool soft_margin, std::string_view reduction);

std::tuple<at::Tensor, at::Tensor> mined_triplet_loss_backward_restricted(
    const at::Tensor& grad, const at::Tensor& embeddings, const at::Tensor& labels, const OptionalTensor& references,
    const OptionalTensor& reference_labels, std::optional<int64_t> reference_offset, const Restriction& restriction,
    const at::Tensor& saved, const at::Tensor& stats, std::string_view positive, std::string_view negative,
    double margin, std::string_view distance, bool swap, bool soft_margin, std::string_view reduction);

}  // namespace triplet_ext
