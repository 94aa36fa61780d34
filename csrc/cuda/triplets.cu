// The loss of explicit and of indexed triplets, and its gradient: one warp a triplet forward, one warp a triplet
// or a row backward. Bound by memory: each row of a triplet is read once (twice for the cosine distance, the second
// time from the cache), with 16 bytes a lane under way from each of two or three rows.
#include <algorithm>
#include <initializer_list>
#include <type_traits>

#include "rows.cuh"

namespace triplet_ext {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;
constexpr int64_t kMostBlocks = 1 << 16;
// Of a block's sums: the statistics in their order, without the anchors, and the loss.
constexpr int kSums = kStats;
enum Sum : int { kSumTriplets, kSumActive, kSumPositive, kSumNegative, kSumLoss };

int64_t triplets_per_block(int64_t count) {
  return kWarps * std::max<int64_t>(1, (count + kWarps * kMostBlocks - 1) / (kWarps * kMostBlocks));
}

// --- a pair, by a warp ----------------------------------------------------------------------------------------

template <typename T>
struct Unit {
  T inverse;  // 1 / max(norm, floor); NaN where the norm overflows, lest the row become zeros
  T lack;     // what the squared norm of the scaled row lacks to 1; above 0 where the floor holds
};

template <typename T>
__device__ Unit<T> unit_of_square(T square) {
  const T floor = T(kCosineFloor * kCosineFloor);
  if (!is_finite(square)) return {std::numeric_limits<T>::quiet_NaN(), 0};
  const T lack = 1 - square / floor;
  return {T(1) / T(sqrt(square > floor ? square : floor)), lack > 0 ? lack : T(0)};
}

template <typename E, int N>
__device__ Unit<Acc<E>> unit_of(Row<E, N> row, int64_t depth, int lane) {
  Acc<E> square = 0, x[N];
  for (int64_t k = int64_t(lane) * N; k < depth; k += kWarp * N) {
    row.read(k, x);
#pragma unroll
    for (int i = 0; i < N; ++i) square += x[i] * x[i];
  }
  return unit_of_square(warp_sum(square));
}

// Norms other than the Euclidean: what they add up (or, for p = inf, take the largest of) for one difference.
template <typename T>
__device__ __forceinline__ T p_term(T difference, T p) {
  const T d = fabs(difference);
  if (p == 0) return d != 0;
  return p == 1 || isinf(p) ? d : T(pow(d, p));
}

template <typename T>
__device__ __forceinline__ T p_combine(T s, T d, T p) {
  return isinf(p) ? (d > s || d != d ? d : s) : s + d;
}

template <typename T>
__device__ __forceinline__ T p_root(T s, T p) {
  return p == 0 || p == 1 || isinf(p) ? s : T(pow(s, 1 / p));
}

template <typename T>
struct Distances {
  T ap, an, pn;
};

template <typename E, int N>
__device__ Distances<Acc<E>> distances_of(Row<E, N> a, Row<E, N> p, Row<E, N> n, int64_t depth, const Measure& measure,
                                          int lane) {
  using T = Acc<E>;
  T xa[N], xp[N], xn[N];
  Distances<T> d{0, 0, 0};
  const auto each = [&](auto term) {
    for (int64_t k = int64_t(lane) * N; k < depth; k += kWarp * N) {
      a.read(k, xa);
      p.read(k, xp);
      n.read(k, xn);
#pragma unroll
      for (int i = 0; i < N; ++i) term(xa[i], xp[i], xn[i]);
    }
  };
  if (measure.distance == Distance::Cosine) {
    const Unit<T> ua = unit_of(a, depth, lane), up = unit_of(p, depth, lane), un = unit_of(n, depth, lane);
    each([&](T ya, T yp, T yn) {
      const T va = ya * ua.inverse, vp = yp * up.inverse, vn = yn * un.inverse;
      d.ap += (va - vp) * (va - vp);
      d.an += (va - vn) * (va - vn);
      if (measure.swap) d.pn += (vp - vn) * (vp - vn);
    });
    return {(warp_sum(d.ap) + ua.lack + up.lack) / 2, (warp_sum(d.an) + ua.lack + un.lack) / 2,
            measure.swap ? (warp_sum(d.pn) + up.lack + un.lack) / 2 : T(0)};
  }
  const T eps = measure.distance == Distance::PNorm ? T(measure.eps) : T(0);
  if (measure.distance == Distance::PNorm && measure.p != 2) {
    const T power = T(measure.p);
    each([&](T ya, T yp, T yn) {
      d.ap = p_combine(d.ap, p_term(ya - yp + eps, power), power);
      d.an = p_combine(d.an, p_term(ya - yn + eps, power), power);
      if (measure.swap) d.pn = p_combine(d.pn, p_term(yp - yn + eps, power), power);
    });
#pragma unroll
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
      d.ap = p_combine(d.ap, __shfl_xor_sync(kAllLanes, d.ap, lanes), power);
      d.an = p_combine(d.an, __shfl_xor_sync(kAllLanes, d.an, lanes), power);
      d.pn = p_combine(d.pn, __shfl_xor_sync(kAllLanes, d.pn, lanes), power);
    }
    return {p_root(d.ap, power), p_root(d.an, power), p_root(d.pn, power)};
  }
  each([&](T ya, T yp, T yn) {
    const T ap = ya - yp + eps, an = ya - yn + eps;
    d.ap += ap * ap;
    d.an += an * an;
    if (measure.swap) {
      const T pn = yp - yn + eps;
      d.pn += pn * pn;
    }
  });
  d = {warp_sum(d.ap), warp_sum(d.an), measure.swap ? warp_sum(d.pn) : T(0)};
  if (measure.distance == Distance::SquaredEuclidean) return d;
  return {T(sqrt(d.ap)), T(sqrt(d.an)), T(sqrt(d.pn))};
}

// --- forward --------------------------------------------------------------------------------------------------

struct ForwardShared {
  double sums[kWarps][kSums];
  double total[kThreads];
  unsigned last;
};

template <typename E, int N>
__global__ void __launch_bounds__(kThreads, 2) forward_kernel(TripletForwardParams params, int64_t per_block) {
  using T = Acc<E>;
  ForwardShared& shared = shared_memory<ForwardShared>();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const Measure& measure = params.measure;
  const int64_t begin = blockIdx.x * per_block;
  const int64_t end = begin + per_block < params.count ? begin + per_block : params.count;
  T* const distances = static_cast<T*>(params.distances);

  double sums[kSums] = {};
  for (int64_t t = begin + warp; t < end; t += kWarps) {
    const int64_t ia = params.a ? params.a[t] : t;
    const int64_t ip = params.p ? params.p[t] : t, in = params.n ? params.n[t] : t;
    const bool there = ia >= 0 && ia < params.anchor.rows && ip >= 0 && ip < params.positive.rows && in >= 0 &&
                       in < params.negative.rows;
    Distances<T> d{0, 0, 0};
    T loss = 0;
    if (there) {
      d = distances_of(row_of<E, N>(params.anchor, ia), row_of<E, N>(params.positive, ip),
                       row_of<E, N>(params.negative, in), params.depth, measure, lane);
    } else if (!params.mined) {
      d.ap = d.an = d.pn = std::numeric_limits<T>::quiet_NaN();
    } else {
      // No triplet; but a row that is not finite is never left out.
      T poison = 0, x[N];
      const Row<E, N> row = row_of<E, N>(params.anchor, ia);
      for (int64_t k = int64_t(lane) * N; k < params.depth; k += kWarp * N) {
        row.read(k, x);
#pragma unroll
        for (int i = 0; i < N; ++i) poison += x[i] * 0;
      }
      loss = warp_sum(poison);
    }
    if (lane != 0) continue;
    if (there || !params.mined) {
      const T negative = negative_distance_of(d.an, d.pn, measure.swap);
      loss = triplet_loss_of(T(d.ap - negative + T(measure.margin)), measure);
      sums[kSumTriplets] += 1;
      sums[kSumActive] += loss > 0;
      sums[kSumPositive] += d.ap;
      sums[kSumNegative] += negative;
    }
    sums[kSumLoss] += loss;
    distances[t] = d.ap;
    distances[params.count + t] = d.an;
    if (measure.swap) distances[2 * params.count + t] = d.pn;
    if (params.reduction == Reduction::None) static_cast<T*>(params.loss)[t] = loss;
    if (params.a && ia >= 0 && ia < params.anchor.rows) atomicOr(params.met + ia / 32, 1u << (ia % 32));
  }
  if (lane == 0)
    for (int i = 0; i < kSums; ++i) shared.sums[warp][i] = sums[i];
  __syncthreads();
  if (threadIdx.x < kSums) {
    double sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += shared.sums[w][threadIdx.x];
    params.partial[blockIdx.x * kSums + threadIdx.x] = sum;
  }

  // The block that is done last adds the blocks' sums up, always in the same order.
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();  // what this block wrote before the ticket that tells of it
    shared.last = atomicAdd(params.ticket, 1u) == gridDim.x - 1;
    __threadfence();  // what the other blocks wrote before their tickets
  }
  __syncthreads();
  if (!shared.last) return;
  double result[kSums + 1];
  const int64_t words = params.met ? (params.anchor.rows + 31) / 32 : 0;
  for (int i = 0; i <= kSums; ++i) {
    double sum = 0;
    if (i < kSums) {
      for (int64_t b = threadIdx.x; b < gridDim.x; b += kThreads) sum += params.partial[b * kSums + i];
    } else {
      for (int64_t w = threadIdx.x; w < words; w += kThreads) sum += __popc(peek(params.met + w));
    }
    shared.total[threadIdx.x] = sum;
    __syncthreads();
    for (int half = kThreads / 2; half > 0; half /= 2) {
      if (int(threadIdx.x) < half) shared.total[threadIdx.x] += shared.total[threadIdx.x + half];
      __syncthreads();
    }
    result[i] = shared.total[0];
    __syncthreads();  // read by all before the next sum is written
  }
  if (threadIdx.x != 0) return;
  write_stats(params.stats, params.met ? result[kSums] : result[kSumTriplets], result[kSumTriplets], result[kSumActive],
              result[kSumPositive], result[kSumNegative]);
  if (params.reduction != Reduction::None)
    *static_cast<T*>(params.loss) = T(result[kSumLoss] / divisor_of(params.stats, params.reduction));
}

// --- backward -------------------------------------------------------------------------------------------------

// What each of a triplet's pairs is pulled with: weights of dd(x, y).
template <typename T>
struct Pulls {
  T ap, an, pn;
  Distances<T> d;
  bool idle, swapped, straight_on;  // nothing to do; the third pair pulls; the second does
};

template <typename T>
__device__ __forceinline__ Pulls<T> pulls_of(const TripletBackwardParams& params, int64_t t) {
  const Measure& measure = params.measure;
  const T* const distances = static_cast<const T*>(params.distances);
  const Distances<T> d{distances[t], distances[params.count + t],
                       measure.swap ? distances[2 * params.count + t] : T(0)};
  T weight = static_cast<const T*>(params.grad)[t * params.grad_stride];
  weight *= T(1 / divisor_of(params.stats, params.reduction));
  const T excess = d.ap - negative_distance_of(d.an, d.pn, measure.swap) + T(measure.margin);
  const T slope = triplet_slope_of(excess, measure) * weight, share = swapped_share_of(d.an, d.pn, measure);
  Pulls<T> pulls{slope, share == 1 ? T(0) : -slope * (1 - share), share == 0 ? T(0) : -slope * share, d, false, false,
                 false};
  pulls.idle = slope == 0 && is_finite(excess);  // what is not finite is to be seen in the gradient
  pulls.swapped = share != 0 || (measure.swap && !is_finite(d.pn));
  pulls.straight_on = share != 1 || !is_finite(d.an);
  return pulls;
}

// The gradient of one pair, element by element: add(x, y, gx, gy) adds weight * dd/dx and weight * dd/dy.
template <typename T>
struct PairGradient {
  T weight, distance, eps, power, maxima;
  Unit<T> x, y;
  enum Kind { kStraight, kCosine, kPower } kind;

  __device__ __forceinline__ T power_slope(T difference) const {
    const T sign = T((difference > 0) - (difference < 0)), size = fabs(difference);
    if (power == 0) return 0;
    if (power == 1) return sign;
    if (isinf(power)) return size == distance ? sign / maxima : T(0);
    if (distance == 0 || difference == 0) return 0;
    return sign * T(pow(size, power - 1)) / T(pow(distance, power - 1));
  }

  __device__ __forceinline__ void add(T xk, T yk, T& gx, T& gy) const {
    if (kind == kStraight) {
      const T g = weight * (xk - yk + eps);
      gx += g;
      gy -= g;
    } else if (kind == kCosine) {
      // -(v - (u.v) u) / |x| where u.v = 1 - d; below the floor the norm is a constant.
      const T u = xk * x.inverse, v = yk * y.inverse;
      gx += weight * x.inverse * ((u - v) - (x.lack > 0 ? T(1) : distance) * u);
      gy += weight * y.inverse * ((v - u) - (y.lack > 0 ? T(1) : distance) * v);
    } else {
      const T g = weight * power_slope(xk - yk + eps);
      gx += g;
      gy -= g;
    }
  }
};

template <typename E, int N>
__device__ PairGradient<Acc<E>> pair_gradient(Row<E, N> x, Row<E, N> y, Acc<E> weight, Acc<E> distance,
                                              const TripletBackwardParams& params, int lane) {
  using T = Acc<E>;
  const Measure& measure = params.measure;
  const T eps = measure.distance == Distance::PNorm ? T(measure.eps) : T(0);
  PairGradient<T> pair{weight, distance, eps, T(measure.p), 0, {}, {}, PairGradient<T>::kStraight};
  if (measure.distance == Distance::Cosine) {
    pair.kind = PairGradient<T>::kCosine;
    pair.x = unit_of(x, params.depth, lane);
    pair.y = unit_of(y, params.depth, lane);
  } else if (measure.distance == Distance::PNorm && measure.p != 2) {
    pair.kind = PairGradient<T>::kPower;
    if (isinf(measure.p)) {
      T a[N], b[N];
      for (int64_t k = int64_t(lane) * N; k < params.depth; k += kWarp * N) {
        x.read(k, a);
        y.read(k, b);
#pragma unroll
        for (int i = 0; i < N; ++i) pair.maxima += fabs(a[i] - b[i] + eps) == distance;
      }
      pair.maxima = warp_sum(pair.maxima);
    }
  } else {
    pair.weight = pull_of(weight, distance, measure);
  }
  return pair;
}

template <typename E, int N>
__global__ void __launch_bounds__(kThreads) explicit_backward_kernel(ExplicitBackwardParams params) {
  using T = Acc<E>;
  const int lane = threadIdx.x % kWarp;
  const int64_t step = int64_t(gridDim.x) * kWarps, depth = params.depth;
  for (int64_t t = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp; t < params.count; t += step) {
    const Pulls<T> pulls = pulls_of<T>(params, t);
    E* const to[] = {static_cast<E*>(params.grad_anchor) + t * depth, static_cast<E*>(params.grad_positive) + t * depth,
                     static_cast<E*>(params.grad_negative) + t * depth};
    if (pulls.idle) {  // an inactive triplet costs no reads
      const T zero[N] = {};
      for (int64_t k = int64_t(lane) * N; k < depth; k += kWarp * N)
        for (E* row : to) write<E, N>(row, k, zero);
      continue;
    }
    const Row<E, N> a = row_of<E, N>(params.anchor, t), p = row_of<E, N>(params.positive, t),
                    n = row_of<E, N>(params.negative, t);
    const PairGradient<T> ap = pair_gradient(a, p, pulls.ap, pulls.d.ap, params, lane);
    PairGradient<T> an{}, pn{};
    if (pulls.straight_on) an = pair_gradient(a, n, pulls.an, pulls.d.an, params, lane);
    if (pulls.swapped) pn = pair_gradient(p, n, pulls.pn, pulls.d.pn, params, lane);
    for (int64_t k = int64_t(lane) * N; k < depth; k += kWarp * N) {
      T xa[N], xp[N], xn[N], ga[N] = {}, gp[N] = {}, gn[N] = {};
      a.read(k, xa);
      p.read(k, xp);
      n.read(k, xn);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        ap.add(xa[i], xp[i], ga[i], gp[i]);
        if (pulls.straight_on) an.add(xa[i], xn[i], ga[i], gn[i]);
        if (pulls.swapped) pn.add(xp[i], xn[i], gp[i], gn[i]);
      }
      write<E, N>(to[0], k, ga);
      write<E, N>(to[1], k, gp);
      write<E, N>(to[2], k, gn);
    }
  }
}

// The row that an entry of the inverse index belongs to, or -1.
__device__ __forceinline__ int64_t key_of(const TripletParams& params, bool apart, int64_t entry) {
  const int role = int(entry >= params.count) + int(entry >= 2 * params.count);
  const int64_t t = entry - role * params.count;
  const int64_t index = role == 0 ? params.a[t] : role == 1 ? params.p[t] : params.n[t];
  const bool inside = index >= 0 && index < (role == 0 ? params.anchor : params.positive).rows;
  return inside ? index + (role > 0 && apart ? params.anchor.rows : 0) : -1;
}

__global__ void __launch_bounds__(kThreads) key_kernel(KeyParams params) {
  const int64_t implied = params.triplets.mined ? params.triplets.count : 0, total = 3 * params.triplets.count;
  const int64_t step = int64_t(gridDim.x) * kThreads;
  for (int64_t e = implied + int64_t(blockIdx.x) * kThreads + threadIdx.x; e < total; e += step)
    params.keys[e - implied] = int32_t(key_of(params.triplets, params.apart, e));
}

// Where row r of the output begins among the sorted keys: a search with 32 probes a step.
__device__ int64_t first_of(const int32_t* keys, int64_t count, int64_t row, int lane) {
  int64_t low = 0, size = count;  // the answer is in [low, low + size]
  while (size > 0) {
    const int64_t stride = (size + kWarp - 1) / kWarp, at = low + lane * stride;
    const bool below = at < low + size && keys[at] < row;
    const int probes = __popc(__ballot_sync(kAllLanes, below));  // the first so many probes are below
    if (probes == 0) return low;
    const int64_t begin = low + (probes - 1) * stride + 1, end = low + probes * stride;
    const int64_t top = low + size;
    low = begin;
    size = (end < top ? end : top) - begin;
  }
  return low;
}

// What one entry of the inverse index does to its row: up to two pulls towards other rows.
template <typename T>
struct Entry {
  int64_t other[2] = {-1, -1};  // nobody
  T weight[2] = {0, 0}, distance[2] = {0, 0};
};

template <typename T>
__device__ Entry<T> entry_of(const GatherParams& params, int64_t e, int64_t on_x) {
  const int role = int(e >= params.count) + int(e >= 2 * params.count);
  const int64_t t = e - role * params.count;
  const int64_t ia = params.a ? params.a[t] : t, ip = params.p[t], in = params.n[t];
  Entry<T> entry;
  const bool there = ia >= 0 && ia < params.anchor.rows && ip >= 0 && ip < params.positive.rows && in >= 0 &&
                     in < params.negative.rows;
  const int64_t a = ia, p = ip + on_x, n = in + on_x;
  const int64_t own = role == 0 ? a : role == 1 ? p : n;
  if (!there) {
    if (!params.mined) {  // a triplet that names a row out of range is NaN, and so is its gradient
      entry.other[0] = own;
      entry.weight[0] = std::numeric_limits<T>::quiet_NaN();
    }
    return entry;
  }
  const Pulls<T> pulls = pulls_of<T>(params, t);
  if (pulls.idle) return entry;
  const auto add = [&](int slot, int64_t other, T weight, T distance) {
    entry.other[slot] = other;
    entry.weight[slot] =
        params.measure.distance == Distance::Cosine ? weight : pull_of(weight, distance, params.measure);
    entry.distance[slot] = distance;
  };
  if (role < 2) add(0, role == 0 ? p : a, pulls.ap, pulls.d.ap);
  if (role == 0 && pulls.straight_on) add(1, n, pulls.an, pulls.d.an);
  if (role == 1 && pulls.swapped) add(1, n, pulls.pn, pulls.d.pn);
  if (role == 2 && pulls.straight_on) add(0, a, pulls.an, pulls.d.an);
  if (role == 2 && pulls.swapped) add(1, p, pulls.pn, pulls.d.pn);
  return entry;
}

// A warp gathers one piece of one row's gradient. blockIdx.y says which piece.
template <typename E, int N>
__global__ void __launch_bounds__(kThreads, 2) gather_kernel(GatherParams params) {
  using T = Acc<E>;
  const int lane = threadIdx.x % kWarp;
  const int64_t on_x = params.apart ? params.anchor.rows : 0;
  const int64_t rows = params.anchor.rows + (params.apart ? params.positive.rows : 0);
  const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (row >= rows) return;
  const bool of_x = row < params.anchor.rows;
  const auto find = [&](int64_t i) {
    return i < params.anchor.rows ? row_of<E, N>(params.anchor, i) : row_of<E, N>(params.positive, i - on_x);
  };
  const int64_t k = (int64_t(blockIdx.y) * kWarp + lane) * N;
  const bool within = k < params.depth;
  const bool cosine = params.measure.distance == Distance::Cosine;
  const auto unit = [&](int64_t i) -> Unit<T> {
    return {static_cast<const T*>(params.inverse)[i], static_cast<const T*>(params.lack)[i]};
  };
  Unit<T> own{};
  if (cosine) own = unit(row);
  T x[N] = {}, grad[N] = {};
  if (within) find(row).read(k, x);

  const auto pull = [&](int64_t other, T weight, T distance) {
    if (other < 0) return;
    T y[N] = {};
    if (within) find(other).read(k, y);
    if (cosine) {
      const Unit<T> theirs = unit(other);
      const T along = own.lack > 0 ? T(1) : distance;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const T u = x[i] * own.inverse;
        grad[i] += weight * own.inverse * ((u - y[i] * theirs.inverse) - along * u);
      }
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) grad[i] += weight * (x[i] - y[i]);
    }
  };
  // Takes up to 32 entries, one a lane, and lets the warp pull for each.
  const auto take = [&](bool has, int64_t e) {
    Entry<T> entry;
    if (has) entry = entry_of<T>(params, e, on_x);
    unsigned left = __ballot_sync(kAllLanes, has && (entry.other[0] >= 0 || entry.other[1] >= 0));
    for (; left; left &= left - 1) {
      const int from = __ffs(left) - 1;
      for (int s = 0; s < 2; ++s) {
        const int64_t other = __shfl_sync(kAllLanes, entry.other[s], from);
        const T weight = __shfl_sync(kAllLanes, entry.weight[s], from);
        const T distance = __shfl_sync(kAllLanes, entry.distance[s], from);
        pull(other, weight, distance);
      }
    }
  };

  // The anchor's own entry comes first where it is implied, then the others in ascending order.
  const int64_t implied = params.mined ? params.count : 0, total = 3 * params.count;
  if (params.mined && of_x) {
    if (params.p[row] < 0 || params.n[row] < 0) {
      // No triplet; but a row that is not finite passes that on.
      T poison = 0, z[N];
      const Row<E, N> whole = find(row);
      for (int64_t j = int64_t(lane) * N; j < params.depth; j += kWarp * N) {
        whole.read(j, z);
#pragma unroll
        for (int i = 0; i < N; ++i) poison += z[i] * 0;
      }
      poison = warp_sum(poison);
#pragma unroll
      for (int i = 0; i < N; ++i) grad[i] += poison;
    } else {
      take(lane == 0, row);
    }
  }
  if (params.keys) {
    const int64_t entries = total - implied;
    const int64_t begin = first_of(params.keys, entries, row, lane),
                  end = first_of(params.keys, entries, row + 1, lane);
    for (int64_t e = begin; e < end; e += kWarp) {
      const bool has = e + lane < end;
      take(has, has ? params.order[e + lane] + implied : 0);
    }
  } else {
    for (int64_t e = implied; e < total; e += kWarp) {
      const int64_t mine = e + lane;
      const bool has = mine < total && key_of(params, params.apart, mine) == row;
      take(has, mine);
    }
  }
  if (!within) return;
  E* const out = of_x ? static_cast<E*>(params.grad_x) + row * params.depth
                      : static_cast<E*>(params.grad_r) + (row - on_x) * params.depth;
  write<E, N>(out, k, grad);
}

template <typename E, int N>
__global__ void __launch_bounds__(kThreads) norm_kernel(NormParams params) {
  const int lane = threadIdx.x % kWarp;
  const int64_t step = int64_t(gridDim.x) * kWarps;
  for (int64_t i = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp; i < params.x.rows; i += step) {
    const Unit<Acc<E>> unit = unit_of(row_of<E, N>(params.x, i), params.depth, lane);
    if (lane != 0) continue;
    static_cast<Acc<E>*>(params.inverse)[i] = unit.inverse;
    static_cast<Acc<E>*>(params.lack)[i] = unit.lack;
  }
}

unsigned blocks_for(int64_t warps) { return unsigned(std::min((warps + kWarps - 1) / kWarps, kMostBlocks)); }

// Calls f(element, width): 16-byte accesses if each of the matrices allows them.
template <typename F>
int with_width(Element element, int64_t depth, std::initializer_list<Matrix> matrices, F f) {
  return with_element(element, [&](auto e) -> int {
    using E = decltype(e);
    for (const Matrix& m : matrices)
      if (!packs<E>(m, depth)) return f(e, std::integral_constant<int, 1>());
    return f(e, std::integral_constant<int, kPack<E>>());
  });
}

}  // namespace

int64_t triplet_blocks(int64_t count) {
  const int64_t each = triplets_per_block(count);
  return std::max<int64_t>(1, (count + each - 1) / each);
}

int launch_triplet_forward(const TripletForwardParams& params, Element element, cudaStream_t stream) {
  return with_width(element, params.depth, {params.anchor, params.positive, params.negative}, [&](auto e, auto n) {
    return launch(forward_kernel<decltype(e), n()>, unsigned(triplet_blocks(params.count)), kThreads,
                  sizeof(ForwardShared), stream, params, triplets_per_block(params.count));
  });
}

int launch_explicit_backward(const ExplicitBackwardParams& params, Element element, cudaStream_t stream) {
  if (params.count == 0) return 0;
  return with_width(element, params.depth, {params.anchor, params.positive, params.negative}, [&](auto e, auto n) {
    return launch(explicit_backward_kernel<decltype(e), n()>, blocks_for(params.count), kThreads, 0, stream, params);
  });
}

int launch_keys(const KeyParams& params, cudaStream_t stream) {
  const int64_t entries = params.triplets.count * (params.triplets.mined ? 2 : 3);
  if (entries == 0) return 0;
  return launch(key_kernel, blocks_for((entries + kWarp - 1) / kWarp), kThreads, 0, stream, params);
}

int launch_gather(const GatherParams& params, Element element, cudaStream_t stream) {
  const int64_t rows = params.anchor.rows + (params.apart ? params.positive.rows : 0);
  if (rows == 0 || params.depth == 0) return 0;
  return with_width(element, params.depth, {params.anchor, params.positive}, [&](auto e, auto n) {
    const dim3 grid(unsigned((rows + kWarps - 1) / kWarps), unsigned((params.depth + kWarp * n() - 1) / (kWarp * n())));
    return launch(gather_kernel<decltype(e), n()>, grid, kThreads, 0, stream, params);
  });
}

int launch_norms(const NormParams& params, Element element, cudaStream_t stream) {
  if (params.x.rows == 0) return 0;
  return with_width(element, params.depth, {params.x}, [&](auto e, auto n) {
    return launch(norm_kernel<decltype(e), n()>, blocks_for(params.x.rows), kThreads, 0, stream, params);
  });
}

}  // namespace triplet_ext
