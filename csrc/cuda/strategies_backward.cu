// The gradient of the strategies' losses. With W_ij = dloss_i / dd_ij it is, of row j, the sum over i of
// (W_ij + W_ji) dd_ij/dx_j: the block that owns row j meets all i, so there are no atomics and nothing is added up in
// an order that is not fixed.
//
// What W_ij takes beside d_ij itself is kept by anchor and positive: of all negatives the threshold d_ap + m, by which
// a negative's weight is seen from its distance, and the positive's own weight; of one negative a pair who it is. The
// forward saves it of as many positives as there is room for. Where classes are larger, rounds follow: anchors find out
// about further positives, rows gather what follows from these. Blocks take this work item by item from a counter, and
// wait only for items before theirs, which others have taken and are at.
#include <algorithm>

#include "strategies.cuh"

namespace triplet_ext {
namespace {

constexpr int kBlockFeatures = kWarp * kColumns;  // of 32 rows that are multiplied with their weights
// Features whose gradient a block holds in registers, in pieces of kBlockFeatures: beyond, it starts over.
template <typename T>
constexpr int kPieces = sizeof(T) == 8 ? 1 : 2;
constexpr int kHeld = 256;  // features whose gradient a block holds in shared memory, where weights are few

template <typename T>
struct DenseShared {
  PairTile<T> tile;
  Four<T> weight[kOthers][kOwned / 4 + 1];
  // As anchors: how far they reach, and the share of their losses in the result.
  Reach reach[kOthers], owned_reach[kOwned];
  T share[kOthers], owned_share[kOwned];
  T centre[kPieces<T> * kBlockFeatures];
  double sum[kOwned], along[kOwned];  // of S, and of S d
  int used[kColumns][kPairWarps];
};

template <typename T>
struct SparseShared {
  T gradient[kOwned][kHeld];
};

template <typename T>
union BackwardUnion {
  MinerShared<T> miner;
  DenseShared<T> dense;
  SparseShared<T> sparse;
  __device__ BackwardUnion() {}
};

// Where a block's rows come from, and where their gradient goes.
struct Owned {
  bool of_x;
  int first;
  bool add;  // to what is there
};

// What a block does next.
struct Item {
  Entries entries;
  Owned owned;
  int anchors;     // the block of anchors that finds out; -1: the owned rows take what concerns them
  int64_t needed;  // items before it that must be done
  bool there;
};

template <typename T>
struct BackwardShared {
  BackwardUnion<T> at;
  Item item;
};

// What a change of an anchor's loss changes in the result.
template <typename T>
__device__ __forceinline__ T share_of(const MinedBackwardParams& params, int64_t given) {
  return static_cast<const T*>(params.grad)[given * params.grad_stride] *
         T(1 / divisor_of(params.stats, params.reduction));
}

__device__ __forceinline__ Reach reach_of(const MinedBackwardParams& params, const Entries& entries, int anchor) {
  if (anchor >= params.x.rows.rows) return {};
  Reach reach = params.reach[anchor];
  if (entries.chosen) {
    const int chosen = entries.chosen[anchor];
    reach.begin = chosen < 0 ? 0 : chosen;
    reach.end = chosen < 0 ? 0 : chosen + 1;
  }
  return reach;
}

// How many entries there are of each of the 32 anchors around this one, holes among them.
__device__ __forceinline__ int most_of(const MinedBackwardParams& params, const Entries& entries, int anchor) {
  if (anchor >= params.x.rows.rows) return 0;
  const int64_t most = params.most[anchor / kOwned], there = entries.chosen ? min(most, int64_t(1)) : most;
  return int(max(int64_t(0), min(there - entries.first, entries.slots)));
}

template <typename E>
__device__ __forceinline__ void put(const MinedBackwardParams& params, const Owned& owned, int64_t given,
                                    int64_t feature, Acc<E> value) {
  if (!owned.of_x && given >= params.written) return;
  const int64_t at = given * params.depth + feature;
  E* const to = static_cast<E*>(owned.of_x ? params.grad_x : params.grad_r) + at;
  if constexpr (sizeof(E) == 2) {
    void* const all = owned.of_x ? params.rest_x : params.rest_r;
    E* const rest = all ? static_cast<E*>(all) + at : nullptr;
    if (owned.add) value += widen(*to) + (rest ? widen(*rest) : 0.0f);
    *to = narrow<E>(value);
    if (rest) *rest = narrow<E>(value - widen(*to));
  } else {
    *to = owned.add ? *to + value : value;
  }
}

// Whether the rows have no gradient but NaN: an anchor that is bad pulls at all references with NaN. Then it is
// written.
template <typename E>
__device__ __forceinline__ bool all_bad(const MinedBackwardParams& params, const Owned& owned, bool as_other) {
  if (!as_other || params.counters[kBad] == 0) return false;
  const MinedSide& side = owned.of_x ? params.x : params.r;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int r = 0; r < kEach; ++r) {
    const int64_t row = owned.first + warp * kEach + r;
    if (row >= count_of(side)) break;
    for (int64_t k = lane; k < params.depth; k += kWarp)
      put<E>(params, owned, side.order[row], k, std::numeric_limits<Acc<E>>::quiet_NaN());
  }
  return true;
}

// --- where all negatives are taken ------------------------------------------------------------------------------

// S = W + W^T of 32 rows and 128 others from their distances; then the product of S and those others, in pieces of 32
// of them that have a weight.
template <typename E>
__device__ __forceinline__ void gather_dense(const MinedBackwardParams& params, DenseShared<Acc<E>>& shared,
                                             const Entries& entries, const Owned& owned) {
  using T = Acc<E>;
  constexpr int kHolds = kPieces<T>;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const bool as_anchor = owned.of_x, as_other = !owned.of_x || !params.apart;
  if (all_bad<E>(params, owned, as_other)) return;
  const MinedSide& mine = owned.of_x ? params.x : params.r;
  const MinedSide& others = owned.of_x ? params.r : params.x;
  const int rows = int(count_of(mine)), total = int(count_of(others));
  const Measure& measure = params.measure;
  const bool cosine = measure.distance == Distance::Cosine, soft = measure.soft_margin;
  const int count = int(params.x.rows.rows), depth = int(params.depth);
  const T* const thresholds = static_cast<const T*>(entries.a);
  const T* const weights = static_cast<const T*>(entries.b);
  PairTile<T>& tile = shared.tile;

  if (threadIdx.x < kOwned) {
    const int anchor = owned.first + threadIdx.x;
    const bool is = as_anchor && anchor < count;
    name_rows<E>(mine, owned.first, threadIdx.x, tile.owned_row, tile.owned_at, tile.owned_scale, tile.owned_lack);
    shared.owned_reach[threadIdx.x] = is ? reach_of(params, entries, anchor) : Reach{};
    shared.owned_share[threadIdx.x] = is ? share_of<T>(params, mine.order[anchor]) : T(0);
  }

  for (int slice = 0; slice < depth; slice += kHolds * kBlockFeatures) {
    T gradient[kHolds][kEach][kColumns];
#pragma unroll
    for (int p = 0; p < kHolds; ++p)
#pragma unroll
      for (int c = 0; c < kColumns; ++c)
#pragma unroll
        for (int r = 0; r < kEach; ++r) gradient[p][r][c] = 0;
    __syncthreads();  // all are done with the slice before
    // A row to be taken from all, so that what they have in common does not cost precision.
    for (int k = threadIdx.x; k < kHolds * kBlockFeatures; k += kPairThreads) {
      shared.centre[k] = 0;
      if (total == 0 || slice + k >= depth || !others.finite[others.order[0]]) continue;
      const int64_t row = others.order[0];
      const T scale = others.inverse ? static_cast<const T*>(others.inverse)[row] : T(1);
      shared.centre[k] = element_of<E>(others.rows, int(row), slice + k, scale);
    }
    if (lane < kEach) shared.sum[warp * kEach + lane] = shared.along[warp * kEach + lane] = 0;
    __syncthreads();  // the centre and the sums; those that follow pass the tiles' barriers

    for (int first = 0; first < total; first += kOthers) {
      T d[kEach][kColumns], w[kEach][kColumns];
      pair_tile<E>(params, mine, others, first, tile, d);
      if (as_other && threadIdx.x < kOthers) {
        const int anchor = first + threadIdx.x;
        shared.reach[threadIdx.x] = reach_of(params, entries, anchor);
        shared.share[threadIdx.x] = anchor < count ? share_of<T>(params, others.order[anchor]) : T(0);
      }
      __syncthreads();  // the others as anchors
#pragma unroll
      for (int r = 0; r < kEach; ++r)
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          d[r][c] = measured(d[r][c], measure);
          w[r][c] = 0;
        }
      const auto slope = [&](T t, T v) {
        if (!soft) return t > v ? T(1) : T(0);
        T loss, s;
        Miner<E, true>::soften(t - v, loss, s);
        return s;
      };
      // The weight of reference j, of the anchor's class, if its turn is now.
      const auto positive = [&](const Reach& of, int j, int anchor) {
        const int64_t slot = j - of.begin - entries.first;
        return j >= of.begin && j < of.end && slot >= 0 && slot < entries.slots ? weights[slot * count + anchor] : T(0);
      };
      // W_ji: what row j says of the others.
      const int own_most = as_anchor ? most_of(params, entries, owned.first) : 0;
      for (int k = 0; k < own_most; ++k) {
#pragma unroll
        for (int r = 0; r < kEach; ++r) {
          const int anchor = owned.first + warp * kEach + r;
          if (anchor >= count) continue;
          const T t = thresholds[int64_t(k) * count + anchor];
#pragma unroll
          for (int c = 0; c < kColumns; ++c) w[r][c] -= slope(t, d[r][c]);
        }
      }
#pragma unroll
      for (int r = 0; r < kEach; ++r) {
        const Reach of = shared.owned_reach[warp * kEach + r];
        const T share = shared.owned_share[warp * kEach + r];
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          const int j = first + lane + c * kWarp;
          if (j >= of.low && j < of.high) w[r][c] = positive(of, j, owned.first + warp * kEach + r);
          w[r][c] *= share;
        }
      }
      // W_ij: what they say of row j.
      if (as_other) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          const int anchor = first + lane + c * kWarp;
          const int most = most_of(params, entries, first + c * kWarp);
          T said[kEach] = {};
          for (int k = 0; k < most; ++k) {
            const T t = anchor < count ? thresholds[int64_t(k) * count + anchor] : Miner<E, true>::kHole;
#pragma unroll
            for (int r = 0; r < kEach; ++r) said[r] -= slope(t, d[r][c]);
          }
          const Reach of = shared.reach[lane + c * kWarp];
          const T share = shared.share[lane + c * kWarp];
#pragma unroll
          for (int r = 0; r < kEach; ++r) {
            const int j = owned.first + warp * kEach + r;
            if (j >= of.low && j < of.high) said[r] = positive(of, j, anchor);
            w[r][c] += said[r] * share;
          }
        }
      }
      T sum[kEach] = {}, along[kEach] = {};
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        Four<T> column;
        bool uses = false;
#pragma unroll
        for (int r = 0; r < kEach; ++r) {
          const bool there = owned.first + warp * kEach + r < rows && first + lane + c * kWarp < total;
          T weight = there ? w[r][c] : T(0);
          if (!cosine) weight = pull_of(weight, d[r][c], measure);
          sum[r] += weight;
          along[r] += weight * d[r][c];
          column.at[r] = weight;
          uses |= weight != 0;
        }
        shared.weight[lane + c * kWarp][warp] = column;
        if (__any_sync(kAllLanes, uses)) uses = true;
        if (lane == 0) shared.used[c][warp] = uses;
      }
#pragma unroll
      for (int r = 0; r < kEach; ++r) {
        const T all = warp_sum(sum[r]), turned = cosine ? warp_sum(along[r]) : T(0);
        if (lane != 0) continue;
        shared.sum[warp * kEach + r] += double(all);
        shared.along[warp * kEach + r] += double(turned);
      }
      __syncthreads();  // the weights

#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        bool uses = false;
        for (int of = 0; of < kPairWarps; ++of) uses |= shared.used[c][of] != 0;
        if (!uses) continue;
#pragma unroll
        for (int p = 0; p < kHolds; ++p) {
          const int feature = slice + p * kBlockFeatures + lane;
          if (slice + p * kBlockFeatures >= depth) break;
          T x[kEach][kColumns];
#pragma unroll
          for (int i = 0; i < kEach; ++i) {
            const int other = c * kWarp + warp * kEach + i;
            const int64_t begin = tile.other_at[other];
            // Step by step: products of all features and the stride would fill the registers.
            const E* from = static_cast<const E*>(others.rows.data) + (begin >= 0 ? begin : 0) +
                            feature * others.rows.column_stride;
#pragma unroll
            for (int f = 0; f < kColumns; ++f) {
              x[i][f] = 0;
              if (begin >= 0 && feature + f * kWarp < depth)
                x[i][f] = widen(*from) * tile.other_scale[other] - shared.centre[p * kBlockFeatures + lane + f * kWarp];
              from += kWarp * others.rows.column_stride;
            }
          }
          __syncthreads();  // what is there is done with
#pragma unroll
          for (int i = 0; i < kEach; ++i)
#pragma unroll
            for (int f = 0; f < kColumns; ++f) tile.other[warp * kEach + i][lane + f * kWarp] = x[i][f];
          __syncthreads();  // the piece is there
#pragma unroll 8
          for (int i = 0; i < kWarp; ++i) {
            const Four<T> weight = shared.weight[c * kWarp + i][warp];
#pragma unroll
            for (int f = 0; f < kColumns; ++f) {
              const T y = tile.other[i][lane + f * kWarp];
#pragma unroll
              for (int r = 0; r < kEach; ++r) gradient[p][r][f] += weight.at[r] * y;
            }
          }
        }
      }
    }

#pragma unroll
    for (int r = 0; r < kEach; ++r) {
      const int row = owned.first + warp * kEach + r;
      const T total = T(shared.sum[warp * kEach + r]), turned = T(shared.along[warp * kEach + r]);
      if (row >= rows) continue;
      const int64_t given = mine.order[row];
      const bool bad = as_anchor && params.bad[row];
      const T inverse = cosine ? static_cast<const T*>(mine.inverse)[given] : T(1);
      const bool below = cosine && static_cast<const T*>(mine.lack)[given] > 0;
#pragma unroll
      for (int p = 0; p < kHolds; ++p)
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          const int feature = slice + p * kBlockFeatures + lane + c * kWarp;
          if (feature >= depth) continue;
          const T u = mine.finite[given] ? element_of<E>(mine.rows, int(given), feature, inverse) : T(0);
          T value = total * (u - shared.centre[p * kBlockFeatures + lane + c * kWarp]) - gradient[p][r][c];
          if (cosine) value = inverse * (value - (below ? total : turned) * u);
          put<E>(params, owned, given, feature, bad ? std::numeric_limits<T>::quiet_NaN() : value);
        }
    }
  }
}

// --- where a pair has one negative ------------------------------------------------------------------------------

// A warp looks through the entries for what concerns its rows, and adds their pulls up one after another.
template <typename E>
struct Sparse {
  using T = Acc<E>;
  const MinedBackwardParams& params;
  SparseShared<T>& shared;
  const Entries& entries;
  const Owned& owned;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int64_t slice = 0;

  struct Entry {
    int64_t a, p, n;  // given
    T ap, an, pn;     // weights of the pairs
    T d_ap, d_an, d_pn;
    bool there;
  };

  // Positive number `number` of an anchor, the same in all lanes.
  __device__ __forceinline__ Entry entry_of(int64_t anchor, int64_t slot, const Reach& reach) const {
    const int64_t at = slot * params.x.rows.rows + anchor;
    const int n = entries.n[at];
    Entry e{};
    if (n < 0) return e;
    const Measure& measure = params.measure;
    e.there = true;
    e.a = params.x.order[anchor];
    e.p = params.r.order[reach.begin + entries.first + slot];
    e.n = params.r.order[n];
    e.d_ap = static_cast<const T*>(entries.a)[at];
    e.d_an = static_cast<const T*>(entries.b)[at];
    if (measure.swap) e.d_pn = warp_distance<E>(params, e.p, e.n, lane);
    const T t = e.d_ap - negative_distance_of(e.d_an, e.d_pn, measure.swap) + T(measure.margin);
    const T weight = triplet_slope_of(t, measure) * share_of<T>(params, e.a);
    const T share = swapped_share_of(e.d_an, e.d_pn, measure);
    e.ap = weight;
    e.an = -weight * (1 - share);
    e.pn = -weight * share;
    return e;
  }

  // Adds weight * dd(x, y)/dx to a row of the warp.
  __device__ __forceinline__ void pull(int row, const MinedSide& side_x, int64_t x, const MinedSide& side_y, int64_t y,
                                       T weight, T d) {
    if (weight == 0) return;
    const bool cosine = params.measure.distance == Distance::Cosine;
    const T of_x = cosine ? static_cast<const T*>(side_x.inverse)[x] : T(1);
    const T of_y = cosine ? static_cast<const T*>(side_y.inverse)[y] : T(1);
    const T along = !cosine ? T(0) : static_cast<const T*>(side_x.lack)[x] > 0 ? T(1) : d;
    const T factor = cosine ? weight * of_x : pull_of(weight, d, params.measure);
    for (int k = lane; k < kHeld && slice + k < params.depth; k += kWarp) {
      const T u = element_of<E>(side_x.rows, int(x), slice + k, of_x);
      const T v = element_of<E>(side_y.rows, int(y), slice + k, of_y);
      shared.gradient[row][k] += factor * ((u - v) - along * u);
    }
  }

  __device__ __forceinline__ void as_anchor() {
    for (int r = 0; r < kEach; ++r) {
      const int64_t anchor = owned.first + warp * kEach + r;
      if (anchor >= params.x.rows.rows) return;
      const Reach reach = reach_of(params, entries, anchor);
      const int64_t slots = min(reach.end - reach.begin - entries.first, entries.slots);
      for (int64_t k = 0; k < slots; ++k) {
        const Entry e = entry_of(anchor, k, reach);
        if (!e.there) continue;
        pull(warp * kEach + r, params.x, e.a, params.r, e.p, e.ap, e.d_ap);
        pull(warp * kEach + r, params.x, e.a, params.r, e.n, e.an, e.d_an);
      }
    }
  }

  __device__ __forceinline__ void as_positive() {
    const int64_t count = params.x.rows.rows;
    for (int r = 0; r < kEach; ++r) {
      const int row = warp * kEach + r;
      const int64_t j = owned.first + row;
      if (j >= count_of(params.r)) return;
      const int64_t label = params.r.labels[j];
      const int64_t low = bound_of(params.x.labels, count, label, false);
      const int64_t high = bound_of(params.x.labels, count, label, true);
      for (int64_t anchor = low; anchor < high; ++anchor) {
        const Reach reach = reach_of(params, entries, anchor);
        const int64_t slot = j - reach.begin - entries.first;
        if (j >= reach.end || slot < 0 || slot >= entries.slots) continue;
        const Entry e = entry_of(anchor, slot, reach);
        if (!e.there) continue;
        pull(row, params.r, e.p, params.x, e.a, e.ap, e.d_ap);
        pull(row, params.r, e.p, params.r, e.n, e.pn, e.d_pn);
      }
    }
  }

  __device__ __forceinline__ void as_negative() {
    const int64_t count = params.x.rows.rows;
    const int base = int(owned.first) + warp * kEach;
    if (base >= count_of(params.r)) return;
    for (int64_t from = 0; from < count; from += kWarp) {
      const int most = most_of(params, entries, from);
      for (int k = 0; k < most; ++k) {
        const int n = from + lane < count ? entries.n[k * count + from + lane] : -1;
        unsigned left = __ballot_sync(kAllLanes, n >= base && n < base + kEach);
        for (; left; left &= left - 1) {
          const int who = __ffs(int(left)) - 1;
          const int64_t anchor = from + who;
          const int row = __shfl_sync(kAllLanes, n, who) - int(owned.first);
          const Entry e = entry_of(anchor, k, reach_of(params, entries, anchor));
          pull(row, params.r, e.n, params.x, e.a, e.an, e.d_an);
          pull(row, params.r, e.n, params.r, e.p, e.pn, e.d_pn);
        }
      }
    }
  }

  __device__ __forceinline__ void run() {
    const bool as_other = !owned.of_x || !params.apart;
    if (all_bad<E>(params, owned, as_other)) return;
    const MinedSide& mine = owned.of_x ? params.x : params.r;
    for (slice = 0; slice < params.depth; slice += kHeld) {
      // A lane has features of its own, and a warp rows: nobody waits for anybody.
      for (int r = 0; r < kEach; ++r)
        for (int k = lane; k < kHeld; k += kWarp) shared.gradient[warp * kEach + r][k] = 0;
      if (owned.of_x) as_anchor();
      if (as_other) {
        as_positive();
        as_negative();
      }
      for (int r = 0; r < kEach; ++r) {
        const int64_t row = owned.first + warp * kEach + r;
        if (row >= count_of(mine)) break;
        const bool bad = owned.of_x && params.bad[row];
        for (int k = lane; k < kHeld && slice + k < params.depth; k += kWarp)
          put<E>(params, owned, mine.order[row], slice + k,
                 bad ? std::numeric_limits<T>::quiet_NaN() : shared.gradient[warp * kEach + r][k]);
      }
    }
  }
};

// Whether a row of an item has a gradient that is asked for: those of a memory have none. The same in all threads.
__device__ __forceinline__ bool is_written(const MinedBackwardParams& params, const Owned& owned) {
  const int64_t row = owned.first + threadIdx.x % kWarp;
  static_assert(kOwned == kWarp, "a lane looks at a row");
  const bool is = owned.of_x || (row < count_of(params.r) && params.r.order[row] < params.written);
  return __any_sync(kAllLanes, is) != 0;
}

// --- items of work ----------------------------------------------------------------------------------------------

__device__ __forceinline__ Item next_item(const MinedBackwardParams& params) {
  const int64_t anchors = (params.x.rows.rows + kOwned - 1) / kOwned;
  const int64_t owners = anchors + (params.apart ? (params.r.rows.rows + kOwned - 1) / kOwned : 0);
  int64_t largest = params.counters[kLargest];
  if (params.positive != PositiveRule::All) largest = min(largest, int64_t(1));
  const int64_t left = largest - params.saved.slots;
  const int64_t rounds = left > 0 ? (left + params.room.slots - 1) / params.room.slots : 0;
  const int64_t before = params.saved.slots > 0 || rounds == 0 ? owners : 0;  // items of what was saved
  const int64_t number = atomicAdd(params.counters + kTicket, 1u);
  Item item{params.saved, {}, -1, 0, number < before + rounds * (anchors + owners)};
  int64_t owner = number;
  if (number >= before) {
    const int64_t round = (number - before) / (anchors + owners), within = (number - before) % (anchors + owners);
    item.entries = params.room;
    item.entries.first += round * params.room.slots;
    item.anchors = within < anchors ? int(within) : -1;
    item.needed = number - within + (within < anchors ? 0 : anchors);
    item.owned.add = before > 0 || round > 0;
    owner = within - anchors;
  }
  item.owned.of_x = owner < anchors;
  item.owned.first = int(owner < anchors ? owner : owner - anchors) * kOwned;
  return item;
}

template <typename E, bool all_negatives>
__global__ void __launch_bounds__(kPairThreads, kPairBlocks<E>) mined_backward_kernel(MinedBackwardParams params) {
  using T = Acc<E>;
  BackwardShared<T>& shared = shared_memory<BackwardShared<T>>();
  const Item& item = shared.item;
  for (int64_t turn = 0; turn < params.turns; ++turn) {
    if (threadIdx.x == 0) {
      shared.item = next_item(params);
      if (item.there && item.needed > 0) {
        while (atomicAdd(params.counters + kDone, 0u) < item.needed) pause();
        __threadfence();  // what the items before have written
      }
    }
    __syncthreads();  // the item
    if (!item.there) return;
    if (item.anchors >= 0) {
      Found found;
      Miner<E, all_negatives> miner{params, shared.at.miner};
      const int begin = int(item.entries.first);
      miner.run(item.anchors, begin, begin + int(item.entries.slots), item.entries, found);
    } else if (is_written(params, item.owned)) {
      if constexpr (all_negatives) gather_dense<E>(params, shared.at.dense, item.entries, item.owned);
      else Sparse<E>{params, shared.at.sparse, item.entries, item.owned}.run();
    }
    __syncthreads();  // the item is done with
    if (threadIdx.x == 0) {
      __threadfence();  // what this block has written
      atomicAdd(params.counters + kDone, 1u);
    }
  }
}

}  // namespace

int launch_mined_backward(const MinedBackwardParams& params, Element element, int64_t blocks, cudaStream_t stream) {
  if (params.depth == 0 || (params.x.rows.rows == 0 && params.r.rows.rows == 0)) return 0;
  if (const int error = launch_reach(params, element, stream)) return error;
  return with_element(element, [&](auto e) -> int {
    using E = decltype(e);
    const auto kernel =
        params.negative == NegativeRule::All ? mined_backward_kernel<E, true> : mined_backward_kernel<E, false>;
    return launch(kernel, unsigned(blocks), kPairThreads, sizeof(BackwardShared<Acc<E>>), stream, params);
  });
}

}  // namespace triplet_ext
