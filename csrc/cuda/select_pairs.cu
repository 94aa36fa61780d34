// Batch-hard selection for small batches and for float64: each block measures eight anchors against all references
// as sums of squared differences, and keeps the best in registers. No workspace and nothing to combine between
// blocks, hence one launch; a thread has eight anchors times one reference, so that the three loads from shared
// memory for a feature (the anchors' are a broadcast) feed sixteen operations.
#include "rows.cuh"

namespace triplet_ext {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kAnchorsEach = 8;
constexpr int kFeatures = 32;  // at a time

template <typename T>
struct PairsShared {
  T anchors[kFeatures][kAnchorsEach];
  T references[kThreads][kFeatures + 1];  // one more, so that a warp's 32 rows lie in 32 banks
  int64_t labels[kAnchorsEach];
  T value[2][kWarps][kAnchorsEach];
  int index[2][kWarps][kAnchorsEach];
};

// The larger value wins, the lower index where they tie; an index of -1 is nobody.
template <typename T>
__device__ __forceinline__ void offer(T& best, int& index, T value, int other) {
  if (other >= 0 && (index < 0 || value > best || (value == best && other < index))) {
    best = value;
    index = other;
  }
}

template <typename E>
__global__ void __launch_bounds__(kThreads) pairs_kernel(SelectParams params) {
  using T = Acc<E>;
  constexpr T kFirst = std::numeric_limits<T>::infinity();  // what is not finite comes before all others
  PairsShared<T>& shared = shared_memory<PairsShared<T>>();
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const int64_t first = int64_t(blockIdx.x) * kAnchorsEach, depth = params.depth;
  const int64_t references = count_of(params.r.rows, params.there);
  const bool cosine = params.inverse_x != nullptr;
  const auto scale_x = [&](int64_t i) { return cosine ? static_cast<const T*>(params.inverse_x)[i] : T(1); };
  const auto scale_r = [&](int64_t j) { return cosine ? static_cast<const T*>(params.inverse_r)[j] : T(1); };

  // What this thread loads: a feature of one anchor, and the same feature of its warp's references.
  const int64_t loads_anchor = first + warp;
  static_assert(kWarps == kAnchorsEach && kFeatures == kWarp, "a warp loads an anchor's features");
  const Row<E, 1> anchor_row = row_of<E, 1>(params.x, loads_anchor < params.x.rows ? loads_anchor : 0);
  const T anchor_scale = loads_anchor < params.x.rows ? scale_x(loads_anchor) : T(0);
  if (thread < kAnchorsEach && first + thread < params.x.rows) shared.labels[thread] = params.labels_x[first + thread];

  T farthest[kAnchorsEach], nearest[kAnchorsEach];
  int far_index[kAnchorsEach], near_index[kAnchorsEach];
#pragma unroll
  for (int a = 0; a < kAnchorsEach; ++a) {
    farthest[a] = nearest[a] = 0;
    far_index[a] = near_index[a] = -1;
  }
  for (int64_t tile = 0; tile < references; tile += kThreads) {
    const int64_t j = tile + thread;  // this thread's reference
    T square[kAnchorsEach] = {};
    for (int64_t k = 0; k < depth; k += kFeatures) {
      const int64_t feature = k + lane;
      T loaded[kWarp], x[1] = {0};
#pragma unroll
      for (int i = 0; i < kWarp; ++i) {
        const int64_t row = tile + warp * kWarp + i;
        T y[1] = {0};
        if (feature < depth && row < references) {
          row_of<E, 1>(params.r, row).read(feature, y);
          y[0] *= scale_r(row);
        }
        loaded[i] = y[0];
      }
      if (feature < depth) anchor_row.read(feature, x);
      __syncthreads();  // the features before are done with
      shared.anchors[lane][warp] = x[0] * anchor_scale;
#pragma unroll
      for (int i = 0; i < kWarp; ++i) shared.references[warp * kWarp + i][lane] = loaded[i];
      __syncthreads();
#pragma unroll 8
      for (int f = 0; f < kFeatures; ++f) {
        const T y = shared.references[thread][f];
#pragma unroll
        for (int a = 0; a < kAnchorsEach; ++a) {
          const T difference = shared.anchors[f][a] - y;
          square[a] += difference * difference;
        }
      }
    }
    if (depth == 0 && tile == 0) __syncthreads();  // the labels
    if (j >= references) continue;
    const int64_t label = params.labels_r[j];
    const T lack = cosine ? static_cast<const T*>(params.lack_r)[j] : T(0);
#pragma unroll
    for (int a = 0; a < kAnchorsEach; ++a) {
      const int64_t i = first + a;
      if (i >= params.x.rows) break;
      const T d = square[a] + (cosine ? lack + static_cast<const T*>(params.lack_x)[i] : T(0));
      if (label == shared.labels[a]) {
        if (!is_own(params.own, i, j)) offer(farthest[a], far_index[a], is_finite(d) ? d : kFirst, int(j));
      } else {
        offer(nearest[a], near_index[a], is_finite(d) ? -d : kFirst, int(j));
      }
    }
  }

#pragma unroll
  for (int a = 0; a < kAnchorsEach; ++a) {
#pragma unroll
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
      offer(farthest[a], far_index[a], __shfl_xor_sync(kAllLanes, farthest[a], lanes),
            __shfl_xor_sync(kAllLanes, far_index[a], lanes));
      offer(nearest[a], near_index[a], __shfl_xor_sync(kAllLanes, nearest[a], lanes),
            __shfl_xor_sync(kAllLanes, near_index[a], lanes));
    }
    if (lane == 0) {
      shared.value[0][warp][a] = farthest[a];
      shared.index[0][warp][a] = far_index[a];
      shared.value[1][warp][a] = nearest[a];
      shared.index[1][warp][a] = near_index[a];
    }
  }
  __syncthreads();
  if (thread >= 2 * kAnchorsEach) return;
  const int which = thread / kAnchorsEach, a = thread % kAnchorsEach;
  if (first + a >= params.x.rows) return;
  T best = 0;
  int index = -1;
  for (int w = 0; w < kWarps; ++w) offer(best, index, shared.value[which][w][a], shared.index[which][w][a]);
  (which ? params.negative : params.positive)[first + a] = index;
}

}  // namespace

int launch_select_pairs(const SelectParams& params, Element element, cudaStream_t stream) {
  if (params.x.rows == 0) return 0;
  const unsigned blocks = unsigned((params.x.rows + kAnchorsEach - 1) / kAnchorsEach);
  return with_element(element, [&](auto e) -> int {
    using E = decltype(e);
    return launch(pairs_kernel<E>, blocks, kThreads, sizeof(PairsShared<Acc<E>>), stream, params);
  });
}

}  // namespace triplet_ext
