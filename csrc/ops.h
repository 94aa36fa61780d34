// The operators, each once, and their entry points. Schemas: triplet_ext/_ops.py. Definition:
// triplet_ext/reference.py.
//
// B embeddings, R references, T triplets, D features. `acc` is float64 for float64 and float32 for all else.
// Every floating tensor of a call has one dtype out of float32, float64, float16, bfloat16 and any strides.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/string_view.h>

#include <optional>
#include <string_view>
#include <tuple>

namespace triplet_ext {

using OptionalTensor = std::optional<at::Tensor>;
using Loss = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// Explicit triplets.
//   anchor, positive, negative  [T, D]
// Returns
//   loss       [] or, with reduction "none", [T]; acc
//   distances  [2, T]: d_ap, d_an; with swap [3, T]: and d_pn; acc
//   stats      [5] float64: anchors, triplets, active, mean d_ap, mean d_an after swap
Loss triplet_loss_cpu(const at::Tensor& anchor, const at::Tensor& positive, const at::Tensor& negative, double margin,
                      std::string_view distance, double p, double eps, bool swap, bool soft_margin,
                      std::string_view reduction);
decltype(triplet_loss_cpu) triplet_loss_cuda;

// grad is that of the loss; distances and stats are what the forward operator returned.
// Returns the gradients of anchor, positive and negative, [T, D] each, in their dtype.
std::tuple<at::Tensor, at::Tensor, at::Tensor> triplet_loss_backward_cpu(
    const at::Tensor& grad, const at::Tensor& anchor, const at::Tensor& positive, const at::Tensor& negative,
    const at::Tensor& distances, const at::Tensor& stats, double margin, std::string_view distance, double p,
    double eps, bool swap, bool soft_margin, std::string_view reduction);
decltype(triplet_loss_backward_cpu) triplet_loss_backward_cuda;

// Triplets as row numbers.
//   embeddings  [B, D]
//   references  [R, D], what positive and negative index; absent: the embeddings
//   anchor      [T] int64; absent: T = B, triplet i belongs to anchor i, and where positive or negative is -1
//               anchor i has none
//   positive, negative  [T] int64
// Returns as triplet_loss.
Loss indexed_triplet_loss_cpu(const at::Tensor& embeddings, const OptionalTensor& references,
                              const OptionalTensor& anchor, const at::Tensor& positive, const at::Tensor& negative,
                              double margin, std::string_view distance, bool swap, bool soft_margin,
                              std::string_view reduction);
decltype(indexed_triplet_loss_cpu) indexed_triplet_loss_cuda;

// Returns the gradient of the embeddings, [B, D], and of the references, [R, D] ([0] where they are absent).
// A row's contributions are added in ascending order of the triplet: the result does not depend on threads.
std::tuple<at::Tensor, at::Tensor> indexed_triplet_loss_backward_cpu(
    const at::Tensor& grad, const at::Tensor& embeddings, const OptionalTensor& references,
    const OptionalTensor& anchor, const at::Tensor& positive, const at::Tensor& negative, const at::Tensor& distances,
    const at::Tensor& stats, double margin, std::string_view distance, bool swap, bool soft_margin,
    std::string_view reduction);
decltype(indexed_triplet_loss_backward_cpu) indexed_triplet_loss_backward_cuda;

// Batch-hard selection.
//   embeddings  [B, D]; labels [B] int64
//   references  [R, D]; reference_labels [R] int64; absent: the embeddings, reference_offset 0
//   reference_offset  anchor i is reference offset + i, and not its own positive; absent: nobody is left out
// Returns
//   positive  [B] int64: the farthest reference of the anchor's label, -1 if there is none
//   negative  [B] int64: the nearest reference of another label, -1 if there is none
// ties to the lowest index, rows that are not finite before all others. On the CPU every selection, here and below, is
// what float64 arithmetic chooses from the sums of squared differences of the given rows; on CUDA what float32 does
// (float64 for float64), or, for large batches, what the tensor cores do in the precision of
// torch.get_float32_matmul_precision().
std::tuple<at::Tensor, at::Tensor> select_hardest_cpu(const at::Tensor& embeddings, const at::Tensor& labels,
                                                      const OptionalTensor& references,
                                                      const OptionalTensor& reference_labels,
                                                      std::optional<int64_t> reference_offset,
                                                      std::string_view distance);
decltype(select_hardest_cpu) select_hardest_cuda;

// Every other strategy: a rule for positives ("hard", "easy", "all") and one for negatives ("hard", "semi_hard",
// "all"); arguments as above. A chosen pair is measured in `acc` from its differences; with "all" negatives, or many
// positives, from products of rows (on the CPU centred ones), and from differences where the rows are close.

// One positive (hard or easy) and one negative (hard or semi_hard) of each anchor: [B] int64 each, -1 where there is
// none; ties and rows that are not finite as above.
std::tuple<at::Tensor, at::Tensor> select_pair_cpu(const at::Tensor& embeddings, const at::Tensor& labels,
                                                   const OptionalTensor& references,
                                                   const OptionalTensor& reference_labels,
                                                   std::optional<int64_t> reference_offset, std::string_view distance,
                                                   std::string_view positive, std::string_view negative);
decltype(select_pair_cpu) select_pair_cuda;

// The loss of all triplets of a strategy, for each of which at least one rule is "all".
// Returns
//   loss   [] or, with reduction "none", [B]: the sum of each anchor's losses; acc
//   saved  [B, saved_width()] int32: what a forward has to tell its own backward
//   stats  [5] float64, as triplet_loss
Loss mined_triplet_loss_cpu(const at::Tensor& embeddings, const at::Tensor& labels, const OptionalTensor& references,
                            const OptionalTensor& reference_labels, std::optional<int64_t> reference_offset,
                            std::string_view positive, std::string_view negative, double margin,
                            std::string_view distance, bool swap, bool soft_margin, std::string_view reduction);
decltype(mined_triplet_loss_cpu) mined_triplet_loss_cuda;

// Returns the gradient of the embeddings, [B, D], and of the references, [R, D] ([0] where they are absent); the same
// bits whatever the number of threads.
std::tuple<at::Tensor, at::Tensor> mined_triplet_loss_backward_cpu(
    const at::Tensor& grad, const at::Tensor& embeddings, const at::Tensor& labels, const OptionalTensor& references,
    const OptionalTensor& reference_labels, std::optional<int64_t> reference_offset, const at::Tensor& saved,
    const at::Tensor& stats, std::string_view positive, std::string_view negative, double margin,
    std::string_view distance, bool swap, bool soft_margin, std::string_view reduction);
decltype(mined_triplet_loss_backward_cpu) mined_triplet_loss_backward_cuda;

// A memory: further references, behind the others, to which no gradient flows.
//   memory         [M, D]; memory_labels [M] int64
//   memory_count   [] int64: how many of its rows are there, the first ones
//   ids            [B] int64, memory_ids [M] int64; absent: nobody is left out. A row of an anchor's own id is neither
//                  its positive nor its negative; -2**63 is nobody's own. Rows of equal ids have equal labels.
// Otherwise as above; row j of the memory is reference R + j, and the gradients are those of the embeddings and of the
// references before it.
std::tuple<at::Tensor, at::Tensor> select_with_memory_cpu(
    const at::Tensor& embeddings, const at::Tensor& labels, const OptionalTensor& references,
    const OptionalTensor& reference_labels, const at::Tensor& memory, const at::Tensor& memory_labels,
    const at::Tensor& memory_count, const OptionalTensor& ids, const OptionalTensor& memory_ids,
    std::optional<int64_t> reference_offset, std::string_view distance, std::string_view positive,
    std::string_view negative);
decltype(select_with_memory_cpu) select_with_memory_cuda;

Loss mined_triplet_loss_with_memory_cpu(const at::Tensor& embeddings, const at::Tensor& labels,
                                        const OptionalTensor& references, const OptionalTensor& reference_labels,
                                        const at::Tensor& memory, const at::Tensor& memory_labels,
                                        const at::Tensor& memory_count, const OptionalTensor& ids,
                                        const OptionalTensor& memory_ids, std::optional<int64_t> reference_offset,
                                        std::string_view positive, std::string_view negative, double margin,
                                        std::string_view distance, bool swap, bool soft_margin,
                                        std::string_view reduction);
decltype(mined_triplet_loss_with_memory_cpu) mined_triplet_loss_with_memory_cuda;

std::tuple<at::Tensor, at::Tensor> mined_triplet_loss_with_memory_backward_cpu(
    const at::Tensor& grad, const at::Tensor& embeddings, const at::Tensor& labels, const OptionalTensor& references,
    const OptionalTensor& reference_labels, const at::Tensor& memory, const at::Tensor& memory_labels,
    const at::Tensor& memory_count, const OptionalTensor& ids, const OptionalTensor& memory_ids,
    std::optional<int64_t> reference_offset, const at::Tensor& saved, const at::Tensor& stats,
    std::string_view positive, std::string_view negative, double margin, std::string_view distance, bool swap,
    bool soft_margin, std::string_view reduction);
decltype(mined_triplet_loss_with_memory_backward_cpu) mined_triplet_loss_with_memory_backward_cuda;

}  // namespace triplet_ext
