// Rows of a matrix, read by a warp: 16 bytes a lane where the matrix allows it, element by element where not.
#pragma once

#include <limits>

#include "device.cuh"
#include "params.h"

namespace triplet_ext {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

template <typename E>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <typename E>
using Acc = typename Accumulator<E>::type;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename E>
__device__ __forceinline__ E narrow(Acc<E> x) {
  return x;
}
template <>
__device__ __forceinline__ __half narrow<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// N elements at once; N > 1 takes one 16-byte access.
template <typename E, int N>
struct alignas(N > 1 ? 16 : sizeof(E)) Pack {
  E at[N];
};
template <typename E>
constexpr int kPack = 16 / int(sizeof(E));

template <typename E, int N>
struct Row {
  const E* data;
  int64_t step;  // between columns; 1 where N > 1

  __device__ __forceinline__ void read(int64_t k, Acc<E> (&out)[N]) const {
    if constexpr (N == 1) {
      out[0] = widen(data[k * step]);
    } else {
      const Pack<E, N> pack = *reinterpret_cast<const Pack<E, N>*>(data + k);
#pragma unroll
      for (int i = 0; i < N; ++i) out[i] = widen(pack.at[i]);
    }
  }
};

template <typename E, int N>
__device__ __forceinline__ Row<E, N> row_of(const Matrix& m, int64_t i) {
  return {static_cast<const E*>(m.data) + i * m.row_stride, m.column_stride};
}

template <typename E, int N>
__device__ __forceinline__ void write(E* row, int64_t k, const Acc<E> (&values)[N]) {
  Pack<E, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) pack.at[i] = narrow<E>(values[i]);
  *reinterpret_cast<Pack<E, N>*>(row + k) = pack;
}

template <typename T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
  return x;
}

template <typename T>
__device__ __forceinline__ bool is_finite(T x) {
  return fabs(x) <= std::numeric_limits<T>::max();
}

// How many rows there are, of so many that there is room for.
__device__ __forceinline__ int64_t count_of(int64_t rows, const int64_t* there) {
  return there && *there < rows ? *there : rows;
}
__device__ __forceinline__ int64_t count_of(const MinedSide& side) { return count_of(side.rows.rows, side.there); }
__device__ __forceinline__ int64_t count_of(const TileSide& side) { return count_of(side.count, side.there); }

// Whether a reference is the anchor itself, by given rows.
__device__ __forceinline__ bool is_own(const Own& own, int64_t anchor, int64_t reference) {
  if (reference == anchor + own.offset) return true;
  return own.ids && own.ids[anchor] == own.other_ids[reference] && own.ids[anchor] != kNoId;
}

// The first label in [0, count) that is not below `label` (or, with `after`, that is above it).
__device__ __forceinline__ int64_t bound_of(const int64_t* labels, int64_t count, int64_t label, bool after) {
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (labels[middle] < label || (after && labels[middle] == label)) low = middle + 1;
    else high = middle;
  }
  return low;
}

// Host side: whether 16-byte accesses do for every row.
template <typename E>
bool packs(const Matrix& m, int64_t depth) {
  return reinterpret_cast<uintptr_t>(m.data) % 16 == 0 && m.column_stride == 1 && depth % kPack<E> == 0 &&
         m.row_stride % kPack<E> == 0;
}

// Calls f(zero of the element type).
template <typename F>
auto with_element(Element element, F f) {
  switch (element) {
    case Element::Float64:
      return f(double());
    case Element::Float16:
      return f(__half());
    case Element::BFloat16:
      return f(__nv_bfloat16());
    default:
      return f(float());
  }
}

}  // namespace triplet_ext
