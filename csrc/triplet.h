// The rules of a triplet, without torch: what the options are called, and the scalar functions of the
// definition, for host and device. t = d_ap - d_an + m is a triplet's excess.
//
// Everything here has internal linkage: translation units that are compiled for different instruction sets
// include it, and a shared copy could carry instructions that the machine lacks.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#if defined(__CUDACC__)
#define TRIPLET_FN static inline __host__ __device__
#else
#define TRIPLET_FN static inline
#endif

namespace triplet_ext {

constexpr int64_t kNoId = INT64_MIN;  // of a row in a memory: it is nobody's own

// PNorm is torch.nn.TripletMarginLoss's |x - y + eps|_p, and brings torch's conventions at the kinks along.
enum class Distance : int32_t { SquaredEuclidean, Euclidean, Cosine, PNorm };
enum class Reduction : int32_t { Mean, MeanActive, Sum, None };
// Which positives of an anchor are taken, and which negatives of such a pair.
enum class PositiveRule : int32_t { Hard, Easy, All };
enum class NegativeRule : int32_t { Hard, SemiHard, All };

struct Measure {
  double margin;
  double p;    // of PNorm
  double eps;  // of PNorm, added to each component of a difference
  Distance distance;
  bool swap;
  bool soft_margin;
  double slope_at_zero = 0;  // of PNorm: the derivative of torch's clamp_min where it begins
};

// Norms are not taken below this in the cosine distance (as in torch.nn.functional.cosine_similarity).
constexpr double kCosineFloor = 1e-8;

// What the statistics of a call hold, in order.
enum Stat : int { kAnchors, kTriplets, kActive, kPositiveDistance, kNegativeDistance, kStats };

// From sums over the triplets.
TRIPLET_FN void write_stats(double* stats, double anchors, double triplets, double active, double positive,
                            double negative) {
  stats[kAnchors] = anchors;
  stats[kTriplets] = triplets;
  stats[kActive] = active;
  stats[kPositiveDistance] = positive / triplets;
  stats[kNegativeDistance] = negative / triplets;
}

// What the sum of all losses is divided by.
TRIPLET_FN double divisor_of(const double* stats, Reduction reduction) {
  if (reduction != Reduction::Mean && reduction != Reduction::MeanActive) return 1;
  const double count = stats[reduction == Reduction::Mean ? kTriplets : kActive];
  return count > 1 ? count : 1;
}

// loss(t). An infinite d_an must not hide behind a loss of 0, hence NaN for every t that is not finite.
template <typename T>
TRIPLET_FN T triplet_loss_of(T t, const Measure& measure) {
  if (measure.distance == Distance::PNorm) return t < 0 ? T(0) : t;
  if (!(std::fabs(t) <= std::numeric_limits<T>::max())) return std::numeric_limits<T>::quiet_NaN();
  const T hinge = t > 0 ? t : T(0);
  return measure.soft_margin ? hinge + std::log1p(std::exp(-std::fabs(t))) : hinge;
}

// dloss / dt.
template <typename T>
TRIPLET_FN T triplet_slope_of(T t, const Measure& measure) {
  if (measure.distance == Distance::PNorm) return t != t ? t : t > 0 ? T(1) : t == 0 ? T(measure.slope_at_zero) : T(0);
  if (!(std::fabs(t) <= std::numeric_limits<T>::max())) return std::numeric_limits<T>::quiet_NaN();
  if (!measure.soft_margin) return t > 0 ? T(1) : T(0);
  const T e = std::exp(-std::fabs(t));
  return (t >= 0 ? T(1) : e) / (1 + e);
}

// The negative distance that is measured: min(d_an, d_pn) with swap, d_an where they tie, NaN if either is.
template <typename T>
TRIPLET_FN T negative_distance_of(T an, T pn, bool swap) {
  return swap && (pn < an || pn != pn) ? pn : an;
}

// t, of the negative distance that is measured. PNorm's derivative at 0 is not that below it, and it is for rounding to
// say where t is 0: it adds up in torch's order.
template <typename T>
TRIPLET_FN T triplet_excess_of(T ap, T negative, const Measure& measure) {
  const T margin = T(measure.margin);
  return measure.distance == Distance::PNorm ? margin + ap - negative : ap - negative + margin;
}

// The part of the slope that goes to (p, n) instead of (a, n).
template <typename T>
TRIPLET_FN T swapped_share_of(T an, T pn, const Measure& measure) {
  if (!measure.swap) return 0;
  if (measure.distance == Distance::PNorm && an == pn) return T(0.5);
  return pn < an ? T(1) : T(0);
}

// What a pair's weight is multiplied with to become the weight of x - y in the gradient. The derivative of the root at
// 0 is 0; a weight that is NaN stays so.
template <typename T>
TRIPLET_FN T pull_of(T weight, T distance, const Measure& measure) {
  if (measure.distance == Distance::SquaredEuclidean) return 2 * weight;
  return distance == 0 ? weight * T(0) : weight / distance;
}

}  // namespace triplet_ext
