// What an anchor finds out about its positives and negatives, for every strategy that isn't batch-hard; and the tiles
// of distances that this is found in.
//
// Rows are packed: counted in the order of their labels. A block owns 32 of them and meets all others 128 at a time;
// a warp has four of its rows, so that what concerns a row is the warp's alone, and sums need no atomics. Distances
// are sums of squared differences in the accumulation type, over the features in ascending order: d(x, y) is a
// function of the two rows alone and the same both ways round, so that equal rows tie exactly.
#pragma once

#include "rows.cuh"

namespace triplet_ext {

constexpr int kPairThreads = 256;
constexpr int kPairWarps = kPairThreads / kWarp;
constexpr int kOwned = int(kMinedRows);
constexpr int kEach = kOwned / kPairWarps;  // rows of a warp
constexpr int kOthers = 128;
constexpr int kColumns = kOthers / kWarp;  // columns of a lane: lane, lane + 32, ...
constexpr int kFeatures = 32;              // at a time
constexpr int kNoRow = 0x7fffffff;
template <typename E>
constexpr int kPairBlocks = sizeof(E) == 8 ? 1 : 2;  // of a multiprocessor, so that registers suffice
static_assert(kEach == 4 && kColumns == 4 && kFeatures == kWarp, "as they are loaded");

template <typename T>
struct alignas(16) Four {
  T at[4];
};

template <typename T>
struct PairTile {
  Four<T> owned[kFeatures][kOwned / 4 + 1];
  T other[kFeatures][kOthers + 1];              // one more, so that a warp's 32 features of a row lie in 32 banks
  int owned_row[kOwned], other_row[kOthers];    // given; -1 outside
  int64_t owned_at[kOwned], other_at[kOthers];  // where a row begins, in elements; below 0: it is not read
  T owned_scale[kOwned], other_scale[kOthers];  // what it is multiplied with
  T owned_lack[kOwned], other_lack[kOthers];
};

// Some rows' numbers, for all to see behind a barrier. A row that is not finite is taken as zeros: it is seen to at the
// end, and is not to spoil the others.
template <typename E>
__device__ __forceinline__ void name_rows(const MinedSide& side, int first, int at, int* row, int64_t* begin,
                                          Acc<E>* scale, Acc<E>* lack) {
  using T = Acc<E>;
  const int given = first + at < count_of(side) ? int(side.order[first + at]) : -1;
  const bool reads = given >= 0 && side.finite[given];
  row[at] = given;
  begin[at] = reads ? given * side.rows.row_stride : -1;
  scale[at] = reads && side.inverse ? static_cast<const T*>(side.inverse)[given] : T(1);
  lack[at] = reads && side.lack ? static_cast<const T*>(side.lack)[given] : T(0);
}

template <typename E>
__device__ __forceinline__ Acc<E> element_of(const Matrix& rows, int row, int64_t feature, Acc<E> scale) {
  Acc<E> x[1];
  row_of<E, 1>(rows, row).read(feature, x);
  return x[0] * scale;
}

// The squared Euclidean distances, or the cosine ones, of the block's rows, whose names are in the tile, and of the
// others from `first` on: of each of the warp's rows, the lane's columns.
template <typename E>
__device__ __forceinline__ void pair_tile(const MinedParams& params, const MinedSide& owned, const MinedSide& others,
                                          int first, PairTile<Acc<E>>& tile, Acc<E> (&d)[kEach][kColumns]) {
  using T = Acc<E>;
  constexpr int kLoads = kOthers / kPairWarps;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, depth = int(params.depth);
  __syncthreads();  // all are done with the tile before
  if (threadIdx.x < kOthers)
    name_rows<E>(others, first, threadIdx.x, tile.other_row, tile.other_at, tile.other_scale, tile.other_lack);
  __syncthreads();  // the names are there, the owned rows' among them
#pragma unroll
  for (int r = 0; r < kEach; ++r)
#pragma unroll
    for (int c = 0; c < kColumns; ++c) d[r][c] = 0;
  for (int k = 0; k < depth; k += kFeatures) {
    const int feature = k + lane;
    const E* const from_owned = static_cast<const E*>(owned.rows.data) + feature * owned.rows.column_stride;
    const E* const from_other = static_cast<const E*>(others.rows.data) + feature * others.rows.column_stride;
    // Half of the others are under way before the barrier, half behind it: all at once would take too many registers.
    T y[2][kLoads / 2];
    const auto load = [&](int half) {
#pragma unroll
      for (int i = 0; i < kLoads / 2; ++i) {
        const int at = warp * kLoads + half * (kLoads / 2) + i;
        const int64_t begin = tile.other_at[at];
        y[half][i] = begin >= 0 && feature < depth ? widen(from_other[begin]) * tile.other_scale[at] : T(0);
      }
    };
    const auto store = [&](int half) {
#pragma unroll
      for (int i = 0; i < kLoads / 2; ++i) tile.other[lane][warp * kLoads + half * (kLoads / 2) + i] = y[half][i];
    };
    Four<T> x;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int64_t begin = tile.owned_at[warp * kEach + i];
      x.at[i] = begin >= 0 && feature < depth ? widen(from_owned[begin]) * tile.owned_scale[warp * kEach + i] : T(0);
    }
    load(0);
    __syncthreads();  // the features before are done with
    tile.owned[lane][warp] = x;
    store(0);
    load(1);
    store(1);
    __syncthreads();  // the features are there
#pragma unroll 8
    for (int f = 0; f < kFeatures; ++f) {
      const Four<T> a = tile.owned[f][warp];
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const T b = tile.other[f][lane + c * kWarp];
#pragma unroll
        for (int r = 0; r < kEach; ++r) {
          const T difference = a.at[r] - b;
          d[r][c] += difference * difference;
        }
      }
    }
  }
  if (params.measure.distance != Distance::Cosine) return;
#pragma unroll
  for (int r = 0; r < kEach; ++r)
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
      d[r][c] = (d[r][c] + (tile.owned_lack[warp * kEach + r] + tile.other_lack[lane + c * kWarp])) / 2;
}

// As losses are measured. Choices are made before the root, which makes different squares equal.
template <typename T>
__device__ __forceinline__ T measured(T d, const Measure& measure) {
  return measure.distance == Distance::Euclidean ? T(sqrt(d)) : d;
}

// d of two references, by a warp.
template <typename E>
__device__ Acc<E> warp_distance(const MinedParams& params, int64_t p, int64_t n, int lane) {
  using T = Acc<E>;
  const MinedSide& side = params.r;
  const auto scale = [&](int64_t i) { return side.inverse ? static_cast<const T*>(side.inverse)[i] : T(1); };
  const T of_p = scale(p), of_n = scale(n);
  T sum = 0;
  for (int64_t k = lane; k < params.depth; k += kWarp) {
    const T difference = element_of<E>(side.rows, int(p), k, of_p) - element_of<E>(side.rows, int(n), k, of_n);
    sum += difference * difference;
  }
  sum = warp_sum(sum);
  if (side.lack) sum = (sum + (static_cast<const T*>(side.lack)[p] + static_cast<const T*>(side.lack)[n])) / 2;
  return measured(sum, params.measure);
}

// A row's best so far, the same in all lanes of its warp. The larger value wins, the lowest given row where they tie.
template <typename T>
struct Best {
  T value;
  int at;  // packed; -1: nobody

  static constexpr T kNothing = -std::numeric_limits<T>::infinity();

  // The lane's columns begin at `first`; kNothing is no candidate. Nearly always nobody wins, so the winner's index is
  // looked for only then.
  __device__ __forceinline__ bool offer(const T (&values)[kColumns], int first, const int* given, const int64_t* order,
                                        int lane) {
    T top = values[0];
#pragma unroll
    for (int c = 1; c < kColumns; ++c) top = values[c] > top ? values[c] : top;
    if (!__any_sync(kAllLanes, top > kNothing && top >= value)) return false;
    int row = kNoRow, place = -1;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int other = given[lane + c * kWarp];
      if (top > kNothing && values[c] == top && other < row) {
        row = other;
        place = first + c * kWarp;
      }
    }
#pragma unroll
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
      const T other_top = __shfl_xor_sync(kAllLanes, top, lanes);
      const int other_row = __shfl_xor_sync(kAllLanes, row, lanes);
      const int other_place = __shfl_xor_sync(kAllLanes, place, lanes);
      if (other_top > top || (other_top == top && other_row < row)) {
        top = other_top;
        row = other_row;
        place = other_place;
      }
    }
    if (!(top > value) && !(top == value && (at < 0 || row < order[at]))) return false;
    value = top;
    at = place;
    return true;
  }
};

template <typename T>
struct MinerShared {
  PairTile<T> tile;
  // Of each of the block's anchors and each of the positives that are held: of all negatives d_ap + m, -inf in a hole,
  // dloss/dd_ap, and how many are active; of one negative a pair d_ap, +inf in a hole, -d_an, and who that is. Behind
  // them the farthest negative, or the nearest where that is the rule.
  T threshold[kMostChunk][kOwned], value[kMostChunk + 1][kOwned];
  int index[kMostChunk + 1][kOwned];
  int chosen[kOwned];
  double sums[kPairWarps][kMinedSums];
  double total[kPairThreads];
  unsigned last;
};

// What a block's anchors have found: the losses of the warp's rows, and sums over them; parts, over the lanes.
struct Found {
  double loss[kEach] = {};
  double triplets = 0, active = 0, positive = 0, negative = 0;
};

// The anchors' positives number `begin` to `end`, a chunk at a time, against all references. The losses are for a
// forward, what goes into `entries` for a backward, `positive` and `negative` for a selection.
template <typename E, bool all_negatives>
struct Miner {
  using T = Acc<E>;
  static constexpr T kInfinity = std::numeric_limits<T>::infinity();
  static constexpr T kHole = all_negatives ? -kInfinity : kInfinity;

  const MinedParams& params;
  MinerShared<T>& shared;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int first = 0;
  Reach reach{};       // of anchor `first` + lane
  int self = -2;       // its own row among the references, as given
  int64_t id = kNoId;  // its own
  int positives = 0;   // how many it has; with one an anchor, at most 1

  __device__ __forceinline__ Reach reach_of(int r) const {
    const int from = warp * kEach + r;
    return {__shfl_sync(kAllLanes, reach.low, from), __shfl_sync(kAllLanes, reach.high, from),
            __shfl_sync(kAllLanes, reach.begin, from), __shfl_sync(kAllLanes, reach.end, from)};
  }

  // What an anchor is among the references: a row, -2 if none, and all of its id.
  struct Itself {
    int row;
    int64_t id;
  };
  __device__ __forceinline__ Itself itself_of(int r) const {
    const int from = warp * kEach + r;
    return {__shfl_sync(kAllLanes, self, from), params.own.ids ? __shfl_sync(kAllLanes, id, from) : kNoId};
  }

  // Calls f(packed row of the tile's first column, d) for the tiles that hold references from `from` to `to`, unless
  // `skip` says that no anchor cares.
  template <typename Skip, typename F>
  __device__ __forceinline__ void walk(int from, int to, Skip skip, F f) {
    for (int tile = from; tile < to; tile += kOthers) {
      if (skip(tile)) continue;
      T d[kEach][kColumns];
      pair_tile<E>(params, params.x, params.r, tile, shared.tile, d);
      f(tile, d);
    }
  }

  __device__ __forceinline__ void start(int block) {
    first = block * kOwned;
    if (threadIdx.x < kOwned)
      name_rows<E>(params.x, first, threadIdx.x, shared.tile.owned_row, shared.tile.owned_at, shared.tile.owned_scale,
                   shared.tile.owned_lack);
    reach = {};
    self = -2;
    id = kNoId;
    positives = 0;
    if (first + lane < params.x.rows.rows) {
      reach = params.reach[first + lane];
      const int64_t given = params.x.order[first + lane], own = given + params.own.offset;
      if (own >= 0 && own < count_of(params.r)) self = int(own);
      if (params.own.ids) id = params.own.ids[given];
      positives = reach.end > reach.begin ? reach.end - reach.begin - params.itself[first + lane] : 0;
    }
  }

  // Whether column c of the lane is not the anchor of that row of the warp.
  __device__ __forceinline__ bool is_another(int c, const Itself& of) const {
    const int other = shared.tile.other_row[lane + c * kWarp];
    return other != of.row && (of.id == kNoId || other < 0 || params.own.other_ids[other] != of.id);
  }

  // Calls f(row of the warp, its reach, which references are its anchor, packed row of the tile's first column, d of
  // the row) for the tiles around the lanes' ranges of positives.
  template <typename F>
  __device__ __forceinline__ void walk_positives(int from, int to, F f) {
    range(from, to);
    walk(
        from, to, [](int) { return false; },
        [&](int tile, const T(&d)[kEach][kColumns]) {
#pragma unroll
          for (int r = 0; r < kEach; ++r) f(r, reach_of(r), itself_of(r), tile, d[r]);
        });
  }

  // The hardest or the easiest positive of each anchor becomes its only one; d of the warp's rows.
  __device__ __forceinline__ void pick(T (&picked)[kEach], int32_t* chosen) {
    Best<T> best[kEach];
#pragma unroll
    for (int r = 0; r < kEach; ++r) best[r] = {Best<T>::kNothing, -1};
    int from = positives > 0 ? reach.begin : kNoRow, to = positives > 0 ? reach.end : 0;
    walk_positives(from, to, [&](int r, const Reach& of, const Itself& me, int tile, const T(&d)[kColumns]) {
      T values[kColumns];
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int j = tile + lane + c * kWarp;
        const bool is = j >= of.begin && j < of.end && is_another(c, me);
        values[c] = !is ? -kInfinity : params.positive == PositiveRule::Hard ? d[c] : -d[c];
      }
      best[r].offer(values, tile + lane, shared.tile.other_row, params.r.order, lane);
    });
#pragma unroll
    for (int r = 0; r < kEach; ++r) {
      picked[r] = params.positive == PositiveRule::Hard ? best[r].value : -best[r].value;
      if (lane == 0) shared.chosen[warp * kEach + r] = best[r].at;
    }
    __syncthreads();  // what the other warps' anchors have chosen
    const int mine = shared.chosen[lane];
    reach.begin = mine < 0 ? 0 : mine;
    reach.end = mine < 0 ? 0 : mine + 1;
    positives = mine >= 0;
    if (chosen && warp == 0 && first + lane < params.x.rows.rows) chosen[first + lane] = mine;
  }

  // From the lanes' ranges to the one around them.
  static __device__ __forceinline__ void range(int& from, int& to) {
#pragma unroll
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
      from = min(from, __shfl_xor_sync(kAllLanes, from, lanes));
      to = max(to, __shfl_xor_sync(kAllLanes, to, lanes));
    }
  }

  __device__ __forceinline__ void run(int block, int begin, int end, const Entries& entries, Found& found,
                                      int64_t* positive = nullptr, int64_t* negative = nullptr) {
    start(block);
    const bool single = params.positive != PositiveRule::All;
    T picked[kEach];
    if (single) pick(picked, entries.chosen);
    const int most = params.selects ? 1 : first < params.x.rows.rows ? params.most[first / kOwned] : 0;
    const int limit = min(end, single ? min(most, 1) : most);
    if (lane < kEach) {
      shared.value[kMostChunk][warp * kEach + lane] = Best<T>::kNothing;
      shared.index[kMostChunk][warp * kEach + lane] = -1;
    }
    for (int at = begin; at < limit; at += int(params.chunk)) {
      const int slots = min(int(params.chunk), limit - at);
      // Of anchor `first` + lane; may be below 0. A selection needs no positive.
      const int mine = params.selects ? first + lane < params.x.rows.rows : min(slots, reach.end - reach.begin - at);
      for (int k = lane; k < slots; k += kWarp) {
#pragma unroll
        for (int r = 0; r < kEach; ++r) {
          shared.threshold[k][warp * kEach + r] = kHole;
          shared.value[k][warp * kEach + r] = all_negatives ? T(0) : Best<T>::kNothing;
          shared.index[k][warp * kEach + r] = all_negatives ? 0 : -1;
        }
      }
      // A row's memory is its warp's; and whoever meets a tile has passed the barriers in front of it.
      if (single) {
        take(picked, found);
      } else {
        measure_positives(at, slots, mine, found);
      }
      if (at == begin || params.negative != NegativeRule::Hard) meet_negatives(at == begin, mine, begin == 0, found);
      __syncwarp();  // what lane 0 has written
      if constexpr (all_negatives) sum_up(at, slots, entries, found);
      else choose(at, slots, entries, found, positive, negative);
      __syncwarp();  // before it is cleared
    }
  }

  __device__ __forceinline__ T threshold_of(T d) const {
    return all_negatives ? measured(d, params.measure) + T(params.measure.margin) : d;
  }
  __device__ __forceinline__ double negatives_of(const Reach& of) const {
    return double(count_of(params.r)) - (of.high - of.low);
  }

  __device__ __forceinline__ void take(const T (&picked)[kEach], Found& found) {
#pragma unroll
    for (int r = 0; r < kEach; ++r) {
      const Reach of = reach_of(r);
      if (lane != 0) continue;
      // Without a positive a selection takes the nearest negative there is.
      if (of.end > of.begin) shared.threshold[0][warp * kEach + r] = threshold_of(picked[r]);
      else if (params.selects) shared.threshold[0][warp * kEach + r] = -kInfinity;
      if (all_negatives && of.end > of.begin)
        found.positive += double(measured(picked[r], params.measure)) * negatives_of(of);
    }
  }

  __device__ __forceinline__ void measure_positives(int at, int slots, int mine, Found& found) {
    int from = mine > 0 ? reach.begin + at : kNoRow, to = mine > 0 ? reach.begin + at + mine : 0;
    walk_positives(from, to, [&](int r, const Reach& of, const Itself& me, int tile, const T(&d)[kColumns]) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int j = tile + lane + c * kWarp, k = j - of.begin - at;
        if (k < 0 || k >= slots || j >= of.end || !is_another(c, me)) continue;
        shared.threshold[k][warp * kEach + r] = threshold_of(d[c]);
        if (all_negatives) found.positive += double(measured(d[c], params.measure)) * negatives_of(of);
      }
    });
  }

  // Better negatives than the one that is kept there.
  __device__ __forceinline__ void offer(int slot, int row, const T (&values)[kColumns], int tile) {
    Best<T> best{shared.value[slot][row], shared.index[slot][row]};
    if (!best.offer(values, tile + lane, shared.tile.other_row, params.r.order, lane)) return;
    __syncwarp();  // all have read the one before
    if (lane != 0) return;
    shared.value[slot][row] = best.value;
    shared.index[slot][row] = best.at;
  }

  __device__ __forceinline__ void meet_negatives(bool fresh, int mine, bool counts, Found& found) {
    const bool hard = params.negative == NegativeRule::Hard, soft = params.measure.soft_margin;
    const auto nobody_cares = [&](int tile) {
      return __all_sync(kAllLanes, mine <= 0 || (reach.low <= tile && tile + kOthers <= reach.high)) != 0;
    };
    const int references = int(count_of(params.r));
    walk(0, references, nobody_cares, [&](int tile, const T(&d)[kEach][kColumns]) {
#pragma unroll
      for (int r = 0; r < kEach; ++r) {
        const int row = warp * kEach + r, count = __shfl_sync(kAllLanes, mine, row);
        const Reach of = reach_of(r);
        const double partners = __shfl_sync(kAllLanes, positives, row);
        if (count <= 0) continue;
        bool is[kColumns];
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          const int j = tile + lane + c * kWarp;
          is[c] = j < references && (j < of.low || j >= of.high);
        }
        if constexpr (all_negatives) {
          T v[kColumns], sum = 0;
#pragma unroll
          for (int c = 0; c < kColumns; ++c) {
            v[c] = is[c] ? measured(d[r][c], params.measure) : kInfinity;
            sum += is[c] ? v[c] : T(0);
          }
          if (fresh && counts) found.negative += double(sum) * partners;
          T loss = 0;
          for (int k = 0; k < count; ++k) {
            const T t = shared.threshold[k][row];
            int active = 0;
            if (!soft) {
#pragma unroll
              for (int c = 0; c < kColumns; ++c) {
                const T excess = t - v[c];
                active += __popc(__ballot_sync(kAllLanes, excess > 0));
                loss += excess > 0 ? excess : T(0);
              }
            } else {
              if (t == kHole) continue;
              T slopes = 0;
#pragma unroll
              for (int c = 0; c < kColumns; ++c) {
                T slope, each;
                soften(t - v[c], each, slope);
                active += __popc(__ballot_sync(kAllLanes, each > 0));
                loss += each;
                slopes += slope;
              }
              slopes = warp_sum(slopes);
              if (lane == 0) shared.value[k][row] += slopes;
            }
            if (lane == 0) shared.index[k][row] += active;
          }
          found.loss[r] += double(loss);
        } else {
          T nearer[kColumns], farther[kColumns];
#pragma unroll
          for (int c = 0; c < kColumns; ++c) {
            nearer[c] = is[c] ? -d[r][c] : Best<T>::kNothing;
            farther[c] = is[c] ? d[r][c] : Best<T>::kNothing;
          }
          if (fresh) {
            if (hard) offer(kMostChunk, row, nearer, tile);
            else offer(kMostChunk, row, farther, tile);
          }
          if (hard) continue;
          for (int k = 0; k < count; ++k) {
            const T t = -shared.threshold[k][row];
            T beyond[kColumns];
#pragma unroll
            for (int c = 0; c < kColumns; ++c) beyond[c] = nearer[c] < t ? nearer[c] : Best<T>::kNothing;
            offer(k, row, beyond, tile);
          }
        }
      }
    });
  }

  // log(1 + exp(t)) and its derivative, for t that is not NaN; -inf gives 0 and 0.
  static __device__ __forceinline__ void soften(T t, T& loss, T& slope) {
    const T e = T(exp(-fabs(t)));
    loss = (t > 0 ? t : T(0)) + T(log1p(e));
    slope = (t >= 0 ? T(1) : e) / (1 + e);
  }

  // Where an entry of that number lies; -1 if it is not kept.
  __device__ __forceinline__ int64_t place_of(const Entries& entries, int number, int row) const {
    const int64_t slot = number - entries.first;
    if (slot < 0 || slot >= entries.slots || first + row >= params.x.rows.rows) return -1;
    return slot * params.x.rows.rows + first + row;
  }

  __device__ __forceinline__ void sum_up(int at, int slots, const Entries& entries, Found& found) {
#pragma unroll
    for (int r = 0; r < kEach; ++r) {
      const int row = warp * kEach + r;
      const double negatives = negatives_of(reach_of(r));
      for (int k = lane; k < slots; k += kWarp) {
        const T t = shared.threshold[k][row];
        if (t != kHole) {
          found.triplets += negatives;
          found.active += shared.index[k][row];
        }
        const int64_t place = place_of(entries, at + k, row);
        if (place < 0) continue;
        static_cast<T*>(entries.a)[place] = t;
        static_cast<T*>(entries.b)[place] = params.measure.soft_margin ? shared.value[k][row] : T(shared.index[k][row]);
      }
    }
  }

  __device__ __forceinline__ void choose(int at, int slots, const Entries& entries, Found& found, int64_t* positive,
                                         int64_t* negative) {
    const bool hard = params.negative == NegativeRule::Hard;
    const Measure& measure = params.measure;
#pragma unroll
    for (int r = 0; r < kEach; ++r) {
      const int row = warp * kEach + r;
      const Reach of = reach_of(r);
      for (int k = 0; k < slots; ++k) {
        const T rank = shared.threshold[k][row];
        const bool falls_back = hard || shared.index[k][row] < 0;
        const int slot = falls_back ? int(kMostChunk) : k;
        const T negated = shared.value[slot][row];
        const Best<T> best{falls_back && !hard ? negated : -negated, shared.index[slot][row]};
        if (params.selects) {
          if (lane != 0 || first + row >= params.x.rows.rows) continue;
          const int64_t given = params.x.order[first + row];
          positive[given] = of.end > of.begin ? params.r.order[of.begin] : -1;
          negative[given] = best.at < 0 ? -1 : params.r.order[best.at];
          continue;
        }
        const bool hole = rank == kHole || best.at < 0;
        const T ap = measured(rank, measure), an = measured(best.value, measure);
        if (!hole) {
          const T pn = measure.swap
                           ? warp_distance<E>(params, params.r.order[of.begin + at + k], params.r.order[best.at], lane)
                           : T(0);
          const T taken = negative_distance_of(an, pn, measure.swap);
          const T loss = triplet_loss_of(T(ap - taken + T(measure.margin)), measure);
          if (lane == 0) {
            found.loss[r] += double(loss);
            found.triplets += 1;
            found.active += loss > 0;
            found.positive += double(ap);
            found.negative += double(taken);
          }
        }
        const int64_t place = place_of(entries, at + k, row);
        if (place < 0 || lane != 0) continue;
        static_cast<T*>(entries.a)[place] = hole ? -kInfinity : ap;
        static_cast<T*>(entries.b)[place] = hole ? T(0) : an;
        entries.n[place] = hole ? -1 : best.at;
      }
    }
  }
};

}  // namespace triplet_ext
