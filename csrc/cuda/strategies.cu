// The strategies other than batch-hard, forward: `finite_kernel` and `reach_kernel` look at the rows and at their
// labels, `pair_kernel` chooses a positive and a negative, `mined_kernel` sums up the losses of all triplets.
#include <algorithm>

#include "strategies.cuh"

namespace triplet_ext {
namespace {

// Squares of rows below this have distances that are finite.
template <typename T>
constexpr T kMostSquare = std::numeric_limits<T>::max() / 8;

// A warp a row.
template <typename E>
__global__ void __launch_bounds__(kPairThreads) finite_kernel(MinedSide side, int64_t depth, unsigned* not_finite) {
  const int lane = threadIdx.x % kWarp;
  const int64_t count = count_of(side), step = int64_t(gridDim.x) * kPairWarps;
  for (int64_t i = int64_t(blockIdx.x) * kPairWarps + threadIdx.x / kWarp; i < count; i += step) {
    Acc<E> square = 0;
    for (int64_t k = lane; k < depth; k += kWarp) {
      const Acc<E> x = element_of<E>(side.rows, int(i), k, Acc<E>(1));
      square += x * x;
    }
    square = warp_sum(square);
    const bool finite = square <= kMostSquare<Acc<E>>;
    if (lane != 0) continue;
    side.finite[i] = finite;
    if (not_finite && !finite) atomicAdd(not_finite, 1u);
  }
}

// A thread an anchor, a warp 32 that one block will own.
__global__ void __launch_bounds__(kPairThreads) reach_kernel(MinedParams params) {
  const int64_t i = int64_t(blockIdx.x) * kPairThreads + threadIdx.x;
  const int64_t count = params.x.rows.rows, total = count_of(params.r);
  int most = 0;
  if (i < count) {
    const int64_t label = params.x.labels[i], given = params.x.order[i];
    const int64_t low = bound_of(params.r.labels, total, label, false);
    const int64_t high = bound_of(params.r.labels, total, label, true);
    int64_t itself = 0, itself_bad = 0;
    const auto count_itself = [&](int64_t reference) {
      ++itself;
      itself_bad += !params.r.finite[reference];
    };
    if (params.own.ids) {
      for (int64_t j = low; j < high; ++j)
        if (is_own(params.own, given, params.r.order[j])) count_itself(params.r.order[j]);
    } else {
      const int64_t self = given + params.own.offset;
      if (self >= 0 && self < total && params.r.given[self] == label) count_itself(self);
    }
    const bool valid = high - low > itself && high - low < total;
    const int64_t end = valid || params.selects ? high : low;
    params.reach[i] = {int(low), int(high), int(low), int(end)};
    most = int(end - low);
    params.itself[i] = int(itself);
    const unsigned others = params.counters[kNotFinite] - unsigned(itself_bad);
    const bool bad = !params.x.finite[given] || (valid && others > 0);
    params.bad[i] = bad;
    if (bad) atomicAdd(params.counters + kBad, 1u);
  }
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) most = max(most, __shfl_xor_sync(kAllLanes, most, lanes));
  if (threadIdx.x % kWarp != 0 || i >= count) return;
  params.most[i / kWarp] = most;
  atomicMax(params.counters + kLargest, unsigned(most));
}

template <typename E>
__global__ void __launch_bounds__(kPairThreads, kPairBlocks<E>) pair_kernel(SelectPairParams params) {
  using T = Acc<E>;
  MinerShared<T>& shared = shared_memory<MinerShared<T>>();
  Miner<E, false> miner{params, shared};
  Found found;
  miner.run(int(blockIdx.x), 0, 1, Entries{}, found, params.positive, params.negative);
  // A row that is not finite comes before all others, and before an anchor that is one come all: the first.
  const int lane = threadIdx.x % kWarp;
  const int64_t references = count_of(params.r);
  for (int r = 0; r < kEach; ++r) {
    const int64_t anchor = miner.first + threadIdx.x / kWarp * kEach + r;
    if (anchor >= params.x.rows.rows) return;
    const int64_t given = params.x.order[anchor];
    const bool any = !params.x.finite[given];
    if (!any && params.counters[kNotFinite] == 0) continue;
    const Reach of = params.reach[anchor];
    int same = kNoRow, other = kNoRow;
    for (int64_t j = lane; j < references; j += kWarp) {
      const int reference = int(params.r.order[j]);
      if (!any && params.r.finite[reference]) continue;
      if (j < of.low || j >= of.high) other = min(other, reference);
      else if (!is_own(params.own, given, reference)) same = min(same, reference);
    }
#pragma unroll
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
      same = min(same, __shfl_xor_sync(kAllLanes, same, lanes));
      other = min(other, __shfl_xor_sync(kAllLanes, other, lanes));
    }
    if (lane != 0) continue;
    if (same != kNoRow) params.positive[given] = same;
    if (other != kNoRow) params.negative[given] = other;
  }
}

enum Sum : int { kSumAnchors, kSumTriplets, kSumActive, kSumPositive, kSumNegative, kSumLoss };

template <typename E, bool all_negatives>
__global__ void __launch_bounds__(kPairThreads, kPairBlocks<E>) mined_kernel(MinedForwardParams params) {
  using T = Acc<E>;
  MinerShared<T>& shared = shared_memory<MinerShared<T>>();
  Miner<E, all_negatives> miner{params, shared};
  Found found;
  miner.run(int(blockIdx.x), 0, int(params.r.rows.rows), params.saved, found);
  const int lane = miner.lane, warp = miner.warp;

  double losses = 0, anchors = 0;
#pragma unroll
  for (int r = 0; r < kEach; ++r) {
    const int64_t anchor = miner.first + warp * kEach + r;
    double loss = warp_sum(found.loss[r]);
    if (anchor >= params.x.rows.rows) continue;
    if (params.bad[anchor]) loss = std::numeric_limits<double>::quiet_NaN();
    losses += loss;
    const Reach of = params.reach[anchor];
    anchors += of.end > of.begin;
    if (lane == 0 && params.reduction == Reduction::None)
      static_cast<T*>(params.loss)[params.x.order[anchor]] = T(loss);
  }
  const double triplets = warp_sum(found.triplets), active = warp_sum(found.active);
  const double positive = warp_sum(found.positive), negative = warp_sum(found.negative);
  if (lane == 0) {
    shared.sums[warp][kSumAnchors] = anchors;
    shared.sums[warp][kSumTriplets] = triplets;
    shared.sums[warp][kSumActive] = active;
    shared.sums[warp][kSumPositive] = positive;
    shared.sums[warp][kSumNegative] = negative;
    shared.sums[warp][kSumLoss] = losses;
  }
  __syncthreads();  // the warps' sums
  if (threadIdx.x < kMinedSums) {
    double sum = 0;
    for (int w = 0; w < kPairWarps; ++w) sum += shared.sums[w][threadIdx.x];
    params.partial[blockIdx.x * kMinedSums + threadIdx.x] = sum;
  }

  // The block that is done last adds the blocks' sums up, always in the same order.
  __syncthreads();  // this block's part
  if (threadIdx.x == 0) {
    __threadfence();  // what this block wrote before the ticket that tells of it
    shared.last = atomicAdd(params.counters + kTicket, 1u) == gridDim.x - 1;
    __threadfence();  // what the other blocks wrote before their tickets
  }
  __syncthreads();  // whether it is this one
  if (!shared.last) return;
  double* const result = shared.sums[0];
  for (int i = 0; i < kMinedSums; ++i) {
    double sum = 0;
    for (int64_t b = threadIdx.x; b < gridDim.x; b += kPairThreads) sum += params.partial[b * kMinedSums + i];
    shared.total[threadIdx.x] = sum;
    __syncthreads();  // all threads' sums
    for (int half = kPairThreads / 2; half > 0; half /= 2) {
      if (int(threadIdx.x) < half) shared.total[threadIdx.x] += shared.total[threadIdx.x + half];
      __syncthreads();  // half as many
    }
    if (threadIdx.x == 0) result[i] = shared.total[0];  // and nobody else's next sum goes there
  }
  if (threadIdx.x != 0) return;
  write_stats(params.stats, result[kSumAnchors], result[kSumTriplets], result[kSumActive], result[kSumPositive],
              result[kSumNegative]);
  if (params.reduction != Reduction::None)
    *static_cast<T*>(params.loss) = T(result[kSumLoss] / divisor_of(params.stats, params.reduction));
}

}  // namespace

int64_t mined_blocks(int64_t count) { return std::max<int64_t>(1, (count + kOwned - 1) / kOwned); }

int launch_reach(const MinedParams& params, Element element, cudaStream_t stream) {
  return with_element(element, [&](auto e) -> int {
    const auto look = [&](const MinedSide& side, unsigned* not_finite) -> int {
      if (side.rows.rows == 0) return 0;
      const int64_t blocks = std::min<int64_t>((side.rows.rows + kPairWarps - 1) / kPairWarps, 1 << 16);
      return launch(finite_kernel<decltype(e)>, unsigned(blocks), kPairThreads, 0, stream, side, params.depth,
                    not_finite);
    };
    if (const int error = look(params.r, params.counters + kNotFinite)) return error;
    if (params.apart)
      if (const int error = look(params.x, nullptr)) return error;
    if (params.x.rows.rows == 0) return 0;
    return launch(reach_kernel, unsigned((params.x.rows.rows + kPairThreads - 1) / kPairThreads), kPairThreads, 0,
                  stream, params);
  });
}

int launch_select_pair(const SelectPairParams& params, Element element, cudaStream_t stream) {
  if (params.x.rows.rows == 0) return 0;
  if (const int error = launch_reach(params, element, stream)) return error;
  return with_element(element, [&](auto e) -> int {
    using E = decltype(e);
    return launch(pair_kernel<E>, unsigned(mined_blocks(params.x.rows.rows)), kPairThreads, sizeof(MinerShared<Acc<E>>),
                  stream, params);
  });
}

int launch_mined_forward(const MinedForwardParams& params, Element element, cudaStream_t stream) {
  if (const int error = launch_reach(params, element, stream)) return error;
  const unsigned blocks = unsigned(mined_blocks(params.x.rows.rows));
  return with_element(element, [&](auto e) -> int {
    using E = decltype(e);
    const auto kernel = params.negative == NegativeRule::All ? mined_kernel<E, true> : mined_kernel<E, false>;
    return launch(kernel, blocks, kPairThreads, sizeof(MinerShared<Acc<E>>), stream, params);
  });
}

}  // namespace triplet_ext
