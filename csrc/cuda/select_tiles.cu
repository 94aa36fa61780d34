// Batch-hard selection from tiles of the Gram matrix: `shift_kernel` chooses a centre and a scale from a sample,
// `pack_kernel` sorts, centres and rounds the rows, `tiles_kernel` keeps the best of each anchor, `finish_kernel`
// writes their indices.
//
// Where the values of a tile meet the best so far: nearly all of them lose, so a thread only takes the maximum of
// its eight values of a row (and, with symmetry, of a column) and compares that with the row's best when the tile
// began. Whoever does not lose (about one thread in every tile and row when the walk is young, hardly any later)
// finds the index and does a 64-bit atomicMax on (value, ~index): the order of arrival does not matter, the lowest
// index wins a tie, and no value loses bits to an index. That is 3 instructions a value: one to begin with the
// biases, one maximum for the row, one for the column.
#include <algorithm>

#include "tiles.cuh"

namespace triplet_ext {
namespace {

constexpr int kSample = 64;
constexpr int kShiftThreads = 256;
constexpr int kPackWarps = 8;
constexpr int kNone = 0x7fffffff;  // of an index
// No value, -d / 2, of finite rows is below kLeast; one with a row in the padding is, and even two of those are finite.
constexpr float kLeast = -1e38f, kHidden = 1.5e38f;
constexpr float kMostSquare = 4e37f;

// Keys are ordered as the values are; 0 is below all of them.
__device__ __forceinline__ unsigned long long key_of(float value, int index) {
  const uint32_t bits = __float_as_uint(value + 0.0f);  // there is one zero
  const uint32_t ordered = bits >> 31 ? ~bits : bits | 0x80000000u;
  return (unsigned long long)(ordered) << 32 | (0xffffffffu - unsigned(index));
}
__device__ __forceinline__ float value_of(unsigned long long key) {
  if (key == 0) return kLeast;
  const uint32_t ordered = uint32_t(key >> 32);
  return __uint_as_float(ordered >> 31 ? ordered & 0x7fffffffu : ~ordered);
}
__device__ __forceinline__ int64_t index_of(unsigned long long key) {
  return key == 0 ? -1 : int64_t(0xffffffffu - uint32_t(key));
}

// --- before ---------------------------------------------------------------------------------------------------

struct ShiftShared {
  float largest[kShiftThreads];
};

// A centre, and a scale that brings the sampled rows' largest element down to about 1. The centre need not be the mean:
// of each feature it is the sampled value nearest to that, so that rows of few bits, integers say, stay exact. Half
// types are multiplied as they are.
template <typename E>
__global__ void __launch_bounds__(kShiftThreads) shift_kernel(TileParams params) {
  ShiftShared& shared = shared_memory<ShiftShared>();
  const Matrix& m = params.r.rows;
  const float* const inverse = static_cast<const float*>(params.r.inverse);
  const int64_t rows = count_of(params.r), step = (rows + kSample - 1) / kSample;
  const bool moves = sizeof(E) == 4 || inverse;
  float largest = 0;
  for (int64_t k = threadIdx.x; k < params.depth && moves; k += kShiftThreads) {
    const auto each = [&](auto f) {
#pragma unroll 8  // as many loads under way
      for (int64_t i = 0; i < rows; i += step) {
        float x[1];
        row_of<E, 1>(m, i).read(k, x);
        const float y = inverse ? x[0] * inverse[i] : x[0];
        if (is_finite(y)) f(y);
      }
    };
    float sum = 0, size = 0, taken = 0, centre = 0, off = std::numeric_limits<float>::infinity();
    each([&](float y) {
      sum += y / kSample;
      size = fmaxf(size, fabsf(y));
      taken += 1;
    });
    const float mean = taken > 0 ? sum / taken * kSample : 0.0f;
    each([&](float y) {
      if (fabsf(y - mean) >= off) return;
      off = fabsf(y - mean);
      centre = y;
    });
    params.shift[k] = centre;
    largest = fmaxf(largest, size);
  }
  if (!moves)
    for (int64_t k = threadIdx.x; k < params.depth; k += kShiftThreads) params.shift[k] = 0;
  shared.largest[threadIdx.x] = largest;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int t = 0; t < kShiftThreads; ++t) largest = fmaxf(largest, shared.largest[t]);
  // Large rows are made smaller, for their squares to stay in range; small ones are not made larger, since a row that
  // the sample has missed may be of any size.
  const int exponent = int(fminf(fmaxf(floorf(log2f(largest)), 3.0f), 100.0f));
  params.shift[params.depth] = moves && !inverse ? __uint_as_float(uint32_t(127 - exponent) << 23) : 1.0f;
}

__device__ __forceinline__ void put(float* to, float x) { *to = x; }
__device__ __forceinline__ void put(__half* to, float x) { *to = __float2half_rn(x); }
__device__ __forceinline__ void put(__nv_bfloat16* to, float x) { *to = __float2bfloat16_rn(x); }
__device__ __forceinline__ float rounded(float x, bool tf32) {
  // To nearest, ties away from zero, as cvt.rna.tf32 does.
  return tf32 && is_finite(x) ? __uint_as_float((__float_as_uint(x) + 0x1000u) & 0xffffe000u) : x;
}

// A warp packs a row. O is the type that is multiplied.
template <typename E, typename O>
__global__ void __launch_bounds__(kPackWarps* kWarp) pack_kernel(TileParams params, TileSide side, bool anchors) {
  const int lane = threadIdx.x % kWarp;
  const int64_t packed = int64_t(blockIdx.x) * kPackWarps + threadIdx.x / kWarp;
  if (packed >= side.padded) return;
  const bool real = packed < count_of(side);
  const int64_t given = real ? side.order[packed] : 0;
  const float* const inverse = static_cast<const float*>(side.inverse);
  const float unit = real && inverse ? inverse[given] : 1.0f;
  const float lack = real && inverse ? static_cast<const float*>(side.lack)[given] : 0.0f;
  const float scale = params.shift[params.depth];
  const Row<E, 1> row = row_of<E, 1>(side.rows, given);
  const auto moved = [&](int64_t k) {
    float x[1] = {0};
    if (real && k < params.depth) row.read(k, x);
    const float y = ((inverse ? x[0] * unit : x[0]) - (real && k < params.depth ? params.shift[k] : 0.0f)) * scale;
    return rounded(y, params.products == Products::TF32);
  };
  float square = 0;
  for (int64_t k = lane; k < params.depth; k += kWarp) {
    O rounded_value;
    put(&rounded_value, moved(k));
    square += widen(rounded_value) * widen(rounded_value);
  }
  square = warp_sum(square);
  // A row that is not finite is chosen by finish_kernel and must not spoil the products.
  const bool finite = square <= kMostSquare && lack <= 1;
  O* const to = reinterpret_cast<O*>(static_cast<unsigned char*>(side.packed) + packed * params.packed_bytes);
  for (int64_t k = lane; k < params.packed_bytes / int64_t(sizeof(O)); k += kWarp)
    put(to + k, finite ? moved(k) : 0.0f);
  if (anchors && lane < 2) {
    const int64_t label = real ? side.labels[packed] : 0, others = count_of(params.r);
    const int64_t at = real ? bound_of(params.r.labels, others, label, lane == 1) : others;
    (lane == 0 ? side.low : side.high)[packed] = int(at);
  }
  if (lane != 0) return;
  side.bias[packed] = real ? (finite ? -(square + lack) / 2 : 0.0f) : -kHidden;
  if (!real) return;
  side.finite[given] = finite;
  if (!finite) atomicAdd(params.not_finite, 1u);
}

// --- the tiles ------------------------------------------------------------------------------------------------

struct HardestShared {
  TileStages stages;
  // Of the tile's rows and columns: the best when the tile began; whose they are; where an anchor's label begins
  // and ends among the references.
  float nearest[2][kTile], farthest[2][kTile];
  int given[2][kTile];
  int low[kTile], high[kTile];
};

// The larger value wins, the lower index where they tie.
struct Best {
  float value;
  int index;
  __device__ __forceinline__ void offer(float other, int at) {
    if (other > value || (other == value && at < index)) {
      value = other;
      index = at;
    }
  }
};

struct Hardest {
  const TileParams& params;
  HardestShared& shared;

  __device__ __forceinline__ void begin(int64_t i, int64_t j) {
    const int side = threadIdx.x / kTile, at = threadIdx.x % kTile;  // 256 threads: a row or a column each
    const int64_t packed = (side ? j : i) * kTile + at;
    const TileSide& whose = side ? params.r : params.x;
    const bool real = packed < count_of(whose), anchor = real && (side == 0 || params.symmetric);
    const int given = real ? int(whose.order[packed]) : -1;
    shared.given[side][at] = given;
    // What is nobody's can't be beaten.
    constexpr float kNever = std::numeric_limits<float>::infinity();
    shared.nearest[side][at] = anchor ? value_of(peek(params.nearest + given)) : kNever;
    shared.farthest[side][at] = anchor ? value_of(peek(params.farthest + given)) : kNever;
    if (side == 0) {
      shared.low[at] = params.x.low[packed];
      shared.high[at] = params.x.high[packed];
    }
  }

  // Somebody's value may be the best: the lowest index that has it, and its key.
  template <typename Value, typename Whose>
  static __device__ void offer(unsigned long long* keys, int owner, float best, int count, Value value, Whose whose) {
    int index = kNone;
    for (int c = 0; c < count; ++c) {
      const int given = whose(c);
      if (value(c) == best && given >= 0 && given < index) index = given;
    }
    if (index != kNone) atomicMax(keys + owner, key_of(best, index));
  }

  __device__ __forceinline__ void tile(float (&values)[kRowFragments][kColumnFragments][4], int64_t i, int64_t j,
                                       int warp_row, int warp_column) {
    const int lane = threadIdx.x % kWarp;
    const bool columns = params.symmetric && i != j;
    const auto row_at = [&](int r) { return warp_row + r / 2 * 16 + r % 2 * 8 + lane / 4; };
    const auto column_at = [&](int c) { return warp_column + c / 2 * 8 + lane % 4 * 2 + c % 2; };
    // Sorted by label: the rows' positives among the references are a range, which the tile meets or not.
    const int64_t begin = j * kTile,
                  last = i * kTile + kTile < params.x.count ? kTile - 1 : int(params.x.count - i * kTile) - 1;
    if (shared.low[0] < begin + kTile && begin < shared.high[last]) {
      mixed(values, begin, columns, row_at, column_at);
      return;
    }
#pragma unroll
    for (int r = 0; r < kRowsEach; ++r) {
      float best = values[r / 2][0][r % 2 * 2];
#pragma unroll
      for (int c = 1; c < kColumnsEach; ++c) best = fmaxf(best, values[r / 2][c / 2][r % 2 * 2 + c % 2]);
      if (best >= shared.nearest[0][row_at(r)]) {
        offer(
            params.nearest, shared.given[0][row_at(r)], best, kColumnsEach,
            [&](int c) { return values[r / 2][c / 2][r % 2 * 2 + c % 2]; },
            [&](int c) { return shared.given[1][column_at(c)]; });
      }
    }
    if (!columns) return;
#pragma unroll
    for (int c = 0; c < kColumnsEach; ++c) {
      float best = values[0][c / 2][c % 2];
#pragma unroll
      for (int r = 1; r < kRowsEach; ++r) best = fmaxf(best, values[r / 2][c / 2][r % 2 * 2 + c % 2]);
      if (best >= shared.nearest[1][column_at(c)]) {
        offer(
            params.nearest, shared.given[1][column_at(c)], best, kRowsEach,
            [&](int r) { return values[r / 2][c / 2][r % 2 * 2 + c % 2]; },
            [&](int r) { return shared.given[0][row_at(r)]; });
      }
    }
  }

  // A tile that may hold positives: few are, so this is written to be short. The stages become the tile's memory,
  // and a thread scans half a row, then half a column.
  template <typename RowAt, typename ColumnAt>
  __device__ __forceinline__ void mixed(const float (&values)[kRowFragments][kColumnFragments][4], int64_t begin,
                                        bool columns, RowAt row_at, ColumnAt column_at) {
    float* const all = reinterpret_cast<float*>(shared.stages.rows);
    static_assert(sizeof(shared.stages.rows) >= sizeof(float) * kTile * kTile, "a tile fits into the stages");
    __syncthreads();  // all are done with the stages
#pragma unroll
    for (int r = 0; r < kRowsEach; ++r)
#pragma unroll
      for (int c = 0; c < kColumnsEach; ++c)
        all[row_at(r) * kTile + column_at(c)] = values[r / 2][c / 2][r % 2 * 2 + c % 2];
    __syncthreads();  // the tile is there for all
    const int at = threadIdx.x % kTile, half = threadIdx.x / kTile * (kTile / 2);
    for (int side = 0; side < (columns ? 2 : 1); ++side) {
      Best near{kLeast, -1}, far{kLeast, -1};
      for (int step = 0; step < kTile / 2; ++step) {
        const int other = half + (step + at) % (kTile / 2);  // a warp's lanes read different banks
        const int row = side ? other : at, column = side ? at : other;
        const int anchor = shared.given[0][row], reference = shared.given[1][column];
        if (anchor < 0 || reference < 0) continue;
        const float value = all[row * kTile + column];
        const int64_t position = begin + column;
        if (position < shared.low[row] || position >= shared.high[row]) near.offer(value, side ? anchor : reference);
        else if (!is_own(params.own, anchor, reference)) far.offer(-value, side ? anchor : reference);
      }
      const int owner = shared.given[side][at];
      if (near.index >= 0 && near.value >= shared.nearest[side][at])
        atomicMax(params.nearest + owner, key_of(near.value, near.index));
      if (far.index >= 0 && far.value >= shared.farthest[side][at])
        atomicMax(params.farthest + owner, key_of(far.value, far.index));
    }
  }
};

template <Products products>
__global__ void __launch_bounds__(kTileThreads, products == Products::Float32 ? 1 : 2) tiles_kernel(TileParams params) {
  HardestShared& shared = shared_memory<HardestShared>();
  Hardest visitor{params, shared};
  walk_tiles<products>(params, shared.stages, visitor);
}

// --- after ----------------------------------------------------------------------------------------------------

// Writes the indices. Where some row is not finite, such a row comes before all others: an anchor takes the first
// that is its positive or its negative, and an anchor that is one itself its first positive and its first negative.
__global__ void __launch_bounds__(kPackWarps* kWarp) finish_kernel(TileParams params) {
  const int lane = threadIdx.x % kWarp;
  const int64_t first = (int64_t(blockIdx.x) * kPackWarps + threadIdx.x / kWarp) * kWarp;
  const int64_t mine = first + lane;  // packed
  const bool real = mine < params.x.count;
  const int64_t given = real ? params.x.order[mine] : 0;
  int64_t positive = -1, negative = -1;
  if (real) {
    positive = index_of(params.farthest[given]);
    negative = index_of(params.nearest[given]);
  }
  if (*params.not_finite != 0) {
    const int64_t references = count_of(params.r);
    for (int a = 0; a < kWarp && first + a < params.x.count; ++a) {
      const int64_t anchor = __shfl_sync(kAllLanes, given, a);
      const int low = params.x.low[first + a], high = params.x.high[first + a];
      const bool any = !params.x.finite[anchor];
      int same = kNone, other = kNone;
      for (int64_t j = lane; j < references; j += kWarp) {
        const int reference = int(params.r.order[j]);
        if (!any && params.r.finite[reference]) continue;
        if (j < low || j >= high) other = min(other, reference);
        else if (!is_own(params.own, anchor, reference)) same = min(same, reference);
      }
      for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
        same = min(same, __shfl_xor_sync(kAllLanes, same, lanes));
        other = min(other, __shfl_xor_sync(kAllLanes, other, lanes));
      }
      if (lane != a) continue;
      if (same != kNone) positive = same;
      if (other != kNone) negative = other;
    }
  }
  if (!real) return;
  params.positive[given] = positive;
  params.negative[given] = negative;
}

template <typename E, typename O>
int pack(const TileParams& params, cudaStream_t stream) {
  const auto side = [&](const TileSide& which, bool anchors) {
    return int(launch(pack_kernel<E, O>, unsigned((which.padded + kPackWarps - 1) / kPackWarps), kPackWarps * kWarp, 0,
                      stream, params, which, anchors));
  };
  const int error = side(params.x, true);
  return error || params.symmetric ? error : side(params.r, false);
}

template <Products products>
int tiles(const TileParams& params, cudaStream_t stream) {
  const int64_t rows = params.x.padded / kTile, columns = params.r.padded / kTile;
  const int64_t count = params.symmetric ? rows * (rows + 1) / 2 : rows * columns;
  return launch(tiles_kernel<products>, unsigned(std::min<int64_t>(count, params.blocks)), kTileThreads,
                sizeof(HardestShared), stream, params);
}

}  // namespace

int launch_select_tiles(const TileParams& params, Element element, cudaStream_t stream) {
  const unsigned after = unsigned((params.x.count + kPackWarps * kWarp - 1) / (kPackWarps * kWarp));
  return with_element(element, [&](auto e) -> int {
    using E = decltype(e);
    if constexpr (sizeof(E) == 8) {
      return 1;  // float64 goes through launch_select_pairs
    } else {
      int error = launch(shift_kernel<E>, 1, kShiftThreads, sizeof(ShiftShared), stream, params);
      if (error) return error;
      switch (params.products) {
        case Products::BFloat16:
          error = pack<E, __nv_bfloat16>(params, stream);
          break;
        case Products::Float16:
          error = pack<E, __half>(params, stream);
          break;
        default:
          error = pack<E, float>(params, stream);
      }
      if (error) return error;
      switch (params.products) {
        case Products::BFloat16:
          error = tiles<Products::BFloat16>(params, stream);
          break;
        case Products::Float16:
          error = tiles<Products::Float16>(params, stream);
          break;
        case Products::TF32:
          error = tiles<Products::TF32>(params, stream);
          break;
        default:
          error = tiles<Products::Float32>(params, stream);
      }
      if (error) return error;
      return launch(finish_kernel, after, kPackWarps * kWarp, 0, stream, params);
    }
  });
}

}  // namespace triplet_ext
