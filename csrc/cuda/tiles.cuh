// The tile engine: walks the tiles of a Gram matrix on the tensor cores and hands each to a visitor, whole, in
// registers, as -d / 2 of the packed rows. Never B x B in memory.
//
// A block of eight warps takes tiles of 128 x 128, in turn, from a list that keeps neighbours close (bands of eight
// tile rows, so that what one block fetches is in the L2 cache for others). A tile is a product over the features,
// 64 bytes of each of 256 rows a stage, four stages in flight by cp.async. The accumulators begin as minus half the
// two squared norms; when the sum is done they are -d / 2, and the epilogue has nothing to add.
//
// To add a visitor: a struct with the members of `Hardest` in select_tiles.cu.
#pragma once

#include "rows.cuh"

namespace triplet_ext {

constexpr int kTile = int(kTileRows);    // rows and columns of a tile
constexpr int kChunk = int(kTileChunk);  // bytes of a row a stage
constexpr int kUnits = kChunk / 16;      // 16-byte units of that
constexpr int kStages = 4;
constexpr int kTileThreads = 256;
constexpr int kBand = 8;
// A warp has 64 x 32 of the tile, as 4 x 4 fragments of 16 x 8.
constexpr int kWarpColumns = 4;
constexpr int kRowFragments = 4, kColumnFragments = 4;
constexpr int kRowsEach = 2 * kRowFragments, kColumnsEach = 2 * kColumnFragments;  // that a thread sees

struct TileStages {
  unsigned char rows[kStages][2][kTile * kChunk];  // of both sides
  float bias[2][kTile];
};

// Where unit `unit` of a row lies in a stage: moved around so that eight rows' equal units, which ldmatrix reads
// together, lie in different banks.
__device__ __forceinline__ int place_of(int row, int unit) {
  return row * kChunk + ((unit ^ ((row >> 1) & (kUnits - 1))) * 16);
}

// Tile number `at` of a list: rows i, columns j. A list is made of bands of kBand tile rows, column by column; with
// symmetry only tiles on and above the diagonal are in it. `band` and `before` remember the band, whose numbers
// begin at `before`; numbers must be asked for in ascending order.
struct TileList {
  int64_t rows, columns;
  bool symmetric;
  int64_t band = 0, before = 0;

  __device__ __forceinline__ int64_t height() const {
    const int64_t left = rows - band * kBand;
    return left < kBand ? left : kBand;
  }
  __device__ __forceinline__ bool find(int64_t at, int64_t& i, int64_t& j) {
    for (; band * kBand < rows; ++band) {
      const int64_t h = height(), first = band * kBand;
      const int64_t corner = symmetric ? h * (h + 1) / 2 : 0;  // its columns are 1, 2, ..., h high
      const int64_t full = symmetric ? columns - first - h : columns;
      const int64_t size = corner + full * h;
      if (at - before < size) {
        int64_t left = at - before, column = 0;
        if (left < corner) {
          while (left > column) left -= ++column;
          i = first + left;
          j = first + column;
        } else {
          left -= corner;
          i = first + left % h;
          j = left / h + (symmetric ? first + h : 0);
        }
        return true;
      }
      before += size;
    }
    return false;
  }
};

template <Products products>
struct Multiply;

template <>
struct Multiply<Products::BFloat16> {
  static __device__ __forceinline__ void add(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b) {
    mma_m16n8k16_bf16(d, a, b[0], b[1]);
  }
};
template <>
struct Multiply<Products::Float16> {
  static __device__ __forceinline__ void add(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b) {
    mma_m16n8k16_f16(d, a, b[0], b[1]);
  }
};
template <>
struct Multiply<Products::TF32> {
  static __device__ __forceinline__ void add(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b) {
    mma_m16n8k8_tf32(d, a, b[0], b[1]);
  }
};
// Float32 from three products: x = high + low, each with the bits that the tensor cores take; low x low is below
// what float32 holds. `high` is rounded, or else what is left out would have one sign. The small products come first;
// which of the two is first depends on who is the row, so that equal rows need not tie to the last bit.
template <>
struct Multiply<Products::Float32> {
  static __device__ __forceinline__ uint32_t high(uint32_t x) { return (x + 0x1000u) & 0xffffe000u; }
  static __device__ __forceinline__ uint32_t low(uint32_t x) {
    return __float_as_uint(__uint_as_float(x) - __uint_as_float(high(x)));
  }
  static __device__ __forceinline__ void add(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b) {
    const uint32_t a_high[4] = {high(a[0]), high(a[1]), high(a[2]), high(a[3])};
    const uint32_t a_low[4] = {low(a[0]), low(a[1]), low(a[2]), low(a[3])};
    mma_m16n8k8_tf32(d, a_low, high(b[0]), high(b[1]));
    mma_m16n8k8_tf32(d, a_high, low(b[0]), low(b[1]));
    mma_m16n8k8_tf32(d, a_high, high(b[0]), high(b[1]));
  }
};

// Calls visitor.begin(i, j) before, and visitor.tile(values) after, the product of each tile of this block. Between
// the two every thread passes barriers, so what begin() writes to shared memory can be read in tile(); and again
// before the next begin().
template <Products products, typename Visitor>
__device__ __forceinline__ void walk_tiles(const TileParams& params, TileStages& stages, Visitor& visitor) {
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const int warp_row = warp / kWarpColumns * (16 * kRowFragments);
  const int warp_column = warp % kWarpColumns * (8 * kColumnFragments);
  const int64_t chunks = params.packed_bytes / kChunk;
  TileList list{params.x.padded / kTile, params.r.padded / kTile, params.symmetric};
  int64_t i, j;
  for (int64_t at = blockIdx.x; list.find(at, i, j); at += gridDim.x) {
    const unsigned char* const from[2] = {
        static_cast<const unsigned char*>(params.x.packed) + i * kTile * params.packed_bytes,
        static_cast<const unsigned char*>(params.r.packed) + j * kTile * params.packed_bytes};
    // A thread copies one unit of two rows of each side.
    const auto fetch = [&](int64_t chunk) {
      if (chunk < chunks) {
        const int unit = thread % kUnits;
#pragma unroll
        for (int side = 0; side < 2; ++side) {
#pragma unroll
          for (int part = 0; part < kTile * kUnits / kTileThreads; ++part) {
            const int row = thread / kUnits + part * (kTileThreads / kUnits);
            cp_async_16(stages.rows[chunk % kStages][side] + place_of(row, unit),
                        from[side] + row * params.packed_bytes + chunk * kChunk + unit * 16);
          }
        }
      }
      cp_async_commit();  // also where there is nothing: groups are counted
    };
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) fetch(s);
    if (thread < kTile) stages.bias[0][thread] = params.x.bias[i * kTile + thread];
    else stages.bias[1][thread - kTile] = params.r.bias[j * kTile + thread - kTile];
    visitor.begin(i, j);
    __syncthreads();  // the biases, and what the visitor wrote

    float values[kRowFragments][kColumnFragments][4];
#pragma unroll
    for (int m = 0; m < kRowFragments; ++m)
#pragma unroll
      for (int n = 0; n < kColumnFragments; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          values[m][n][e] = stages.bias[0][warp_row + m * 16 + lane / 4 + e / 2 * 8] +
                            stages.bias[1][warp_column + n * 8 + lane % 4 * 2 + e % 2];
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      cp_async_wait<kStages - 2>();
      __syncthreads();  // the chunk is there for all; and all are done with the stage that is fetched into next
      fetch(chunk + kStages - 1);
      const unsigned char* const a_rows = stages.rows[chunk % kStages][0];
      const unsigned char* const b_rows = stages.rows[chunk % kStages][1];
#pragma unroll
      for (int step = 0; step < kUnits / 2; ++step) {  // two units, 32 bytes of features, are one mma
        uint32_t b[kColumnFragments / 2][4];
#pragma unroll
        for (int n = 0; n < kColumnFragments / 2; ++n)
          ldmatrix_x4(b[n],
                      b_rows + place_of(warp_column + n * 16 + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
#pragma unroll
        for (int m = 0; m < kRowFragments; ++m) {
          uint32_t a[4];
          ldmatrix_x4(a, a_rows + place_of(warp_row + m * 16 + lane % 16, 2 * step + lane / 16));
#pragma unroll
          for (int n = 0; n < kColumnFragments; ++n) Multiply<products>::add(values[m][n], a, &b[n / 2][n % 2 * 2]);
        }
      }
    }
    visitor.tile(values, i, j, warp_row, warp_column);
    __syncthreads();  // all are done with this tile's stages, biases and the visitor's memory
  }
}

}  // namespace triplet_ext
