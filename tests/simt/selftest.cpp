// That the shim's checks fire and that correct kernels pass. `selftest MODE` runs one mode; `selftest` runs each in a
// child process and compares with what this build is to report.
#include "simt.h"

#include <sys/wait.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <set>
#include <string>
#include <vector>

using namespace triplet_ext;

namespace {

#define CHECK(...)                                                                        \
  do {                                                                                    \
    if (!(__VA_ARGS__)) printf("%s:%d: %s\n", __FILE__, __LINE__, #__VA_ARGS__), exit(1); \
  } while (0)

template <typename... P, typename... A>
void go(void (*kernel)(P...), unsigned grid, unsigned threads, size_t shared_bytes, A... args) {
  CHECK(launch(kernel, dim3(grid), threads, shared_bytes, nullptr, args...) == cudaSuccess);
}

template <int N>
struct alignas(16) Floats {
  float at[N];
};

uint64_t state = 1;
uint32_t random_word() {
  state = state * 6364136223846793005 + 1442695040888963407;
  return uint32_t(state >> 32);
}

// --- barriers -----------------------------------------------------------------------------------------------------

template <bool barrier>
__global__ void reverse(float* out) {
  auto& s = shared_memory<Floats<128>>();
  s.at[threadIdx.x] = float(threadIdx.x);
  if (barrier) __syncthreads();
  out[threadIdx.x] = s.at[127 - threadIdx.x];
}
template <bool barrier>
void run_reverse() {
  std::vector<float> out(128);
  go(reverse<barrier>, 1, 128, sizeof(Floats<128>), out.data());
  for (int i = 0; barrier && i < 128; ++i) CHECK(out[i] == 127 - i);
}

__global__ void __launch_bounds__(1024) ring(float* out, int rounds) {
  auto& s = shared_memory<Floats<1024>>();
  s.at[threadIdx.x] = float(threadIdx.x);
  for (int i = 0; i < rounds; ++i) {
    __syncthreads();
    const float next = s.at[(threadIdx.x + 1) % blockDim.x];
    __syncthreads();
    s.at[threadIdx.x] = next;
  }
  out[threadIdx.x] = s.at[threadIdx.x];
}
void run_ring(unsigned threads, int rounds) {
  std::vector<float> out(threads);
  const auto begin = std::chrono::steady_clock::now();
  go(ring, 1, threads, sizeof(Floats<1024>), out.data(), rounds);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  for (unsigned i = 0; i < threads; ++i) CHECK(out[i] == float((i + rounds) % threads));
  printf("%u threads, %d barriers: %.2f ms\n", threads, 2 * rounds, seconds.count() * 1e3);
}
void run_ring_256() { run_ring(256, 50); }
void run_ring_1024() { run_ring(1024, 50); }

__global__ void divergent() {
  if (threadIdx.x < 64) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
__global__ void exits_before() {
  if (threadIdx.x == 5) return;
  __syncthreads();
}

// --- warps --------------------------------------------------------------------------------------------------------

template <typename T>
__device__ void check_shuffles() {
  const int lane = int(threadIdx.x % 32);
  const T x = T(lane);
  CHECK(__shfl_sync(~0u, x, 7) == T(7));
  CHECK(__shfl_sync(~0u, x, lane + 33) == T((lane + 1) % 32));
  CHECK(__shfl_sync(~0u, x, 3, 8) == T(lane / 8 * 8 + 3));
  CHECK(__shfl_xor_sync(~0u, x, 16) == T(lane ^ 16));
  CHECK(__shfl_xor_sync(~0u, x, 4, 4) == T(lane & 4 ? lane ^ 4 : lane));
  CHECK(__shfl_up_sync(~0u, x, 2) == T(lane < 2 ? lane : lane - 2));
  CHECK(__shfl_down_sync(~0u, x, 5) == T(lane + 5 > 31 ? lane : lane + 5));
  CHECK(__shfl_down_sync(~0u, x, 1, 16) == T(lane % 16 == 15 ? lane : lane + 1));
}
__global__ void warps() {
  const int lane = int(threadIdx.x % 32);
  check_shuffles<int>();
  check_shuffles<unsigned>();
  check_shuffles<float>();
  check_shuffles<double>();
  check_shuffles<long long>();
  check_shuffles<unsigned long long>();
  CHECK(__ballot_sync(~0u, lane % 2) == 0xaaaaaaaau);
  CHECK(__any_sync(~0u, lane == 9) && !__any_sync(~0u, lane == 32));
  CHECK(__all_sync(~0u, lane < 32) && !__all_sync(~0u, lane < 31));
  // Parts of a warp on their own, one far ahead of the other.
  if (lane < 8) {
    for (int i = 0; i < 20; ++i) CHECK(__ballot_sync(0xffu, lane == i % 8) == 1u << i % 8);
  } else {
    CHECK(__shfl_xor_sync(0xffffff00u, lane, 1) == (lane ^ 1));
  }
  __syncwarp();
}

template <bool sync>
__global__ void neighbours(float* out) {
  auto& s = shared_memory<Floats<64>>();
  s.at[threadIdx.x] = float(threadIdx.x);
  if (sync) __syncwarp();
  __shfl_xor_sync(~0u, 1, 1);  // orders no memory
  out[threadIdx.x] = s.at[threadIdx.x ^ 1];
}
template <bool sync>
void run_neighbours() {
  std::vector<float> out(64);
  go(neighbours<sync>, 1, 64, sizeof(Floats<64>), out.data());
  for (int i = 0; sync && i < 64; ++i) CHECK(out[i] == (i ^ 1));
}
// Lanes 0-7 and 8-15 sync apart: nothing between the two.
__global__ void apart(float* out) {
  auto& s = shared_memory<Floats<32>>();
  if (threadIdx.x >= 16) return;
  s.at[threadIdx.x] = float(threadIdx.x);
  __syncwarp(threadIdx.x < 8 ? 0xffu : 0xff00u);
  out[threadIdx.x] = s.at[threadIdx.x ^ 8];
}

__global__ void names_exited() {
  if (threadIdx.x == 3) return;
  __shfl_sync(~0u, 1, 0);
}
__global__ void names_missing() { __syncwarp(); }
__global__ void not_in_mask() {
  if (threadIdx.x < 17) __syncwarp(0xffffu);
}
__global__ void other_line() {
  if (threadIdx.x < 16) {
    __syncwarp();
  } else {
    __syncwarp();
  }
}
__global__ void other_primitive() { threadIdx.x < 16 ? __any_sync(~0u, 1) : __all_sync(~0u, 1); }
__global__ void at_barrier() {
  if (threadIdx.x < 16) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}
__global__ void reads_outside() {
  if (threadIdx.x < 16) __shfl_sync(0xffffu, 1, 20);
}
__global__ void cycle() {
  if (threadIdx.x < 3) __syncwarp(1u << threadIdx.x | 1u << (threadIdx.x + 1) % 3);
}

// --- atomics ------------------------------------------------------------------------------------------------------

template <typename T>
__global__ void count(T* sum, unsigned long long* largest, unsigned long long* smallest, unsigned* seen) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  atomicAdd(sum, 1);
  atomicMax(largest, 1000 + i);
  atomicMin(smallest, 1000 + i);
  atomicOr(seen + i / 32, 1u << i % 32);
  CHECK(peek(largest) >= 1000 + i);
}
template <typename T>
void run_count() {
  T sum = 0;
  unsigned long long largest = 0, smallest = ~0ull;
  std::vector<unsigned> seen(4);
  go(count<T>, 4, 32, 0, &sum, &largest, &smallest, seen.data());
  go(count<T>, 4, 32, 0, &sum, &largest, &smallest, seen.data());
  CHECK(sum == T(256) && largest == 1127 && smallest == 1000);
  for (unsigned word : seen) CHECK(word == ~0u);
}
void run_atomics() {
  run_count<int>();
  run_count<unsigned>();
  run_count<unsigned long long>();
  run_count<float>();
  run_count<double>();
  int i = 5;
  float f = 2;
  CHECK(atomicExch(&i, 7) == 5 && atomicCAS(&i, 6, 9) == 7 && atomicCAS(&i, 7, 9) == 7 && i == 9);
  CHECK(atomicExch(&f, 3) == 2 && f == 3 && atomicMax(&i, 11) == 9 && atomicMin(&i, -1) == 11 && i == -1);
}

__global__ void plain_beside(int* p, int* out) {
  if (threadIdx.x == 0) {
    atomicAdd(p, 1);
  } else {
    out[threadIdx.x] = *p;
  }
}

enum Fences { kBoth, kNoneBefore, kNoneAfter, kTooEarly };

// The last block sums what all have written.
template <Fences fences>
__global__ void reduce(const float* x, float* partial, unsigned* ticket, float* out) {
  bool& last = shared_memory<bool>();
  const unsigned t = threadIdx.x;
  if (t < 32) {
    const float value = x[blockIdx.x * 32 + t];
    if (fences == kTooEarly) __threadfence();
    partial[blockIdx.x * 32 + t] = value;
  }
  __syncthreads();
  if (t == 0) {
    if (fences == kBoth || fences == kNoneAfter) __threadfence();
    last = atomicAdd(ticket, 1u) == gridDim.x - 1;
    if (fences != kNoneAfter) __threadfence();
  }
  __syncthreads();
  if (!last) return;
  if (t == 0) {
    float sum = 0;
    for (unsigned i = 0; i < gridDim.x * 32; ++i) sum += partial[i];
    *out = sum;
  }
}
template <Fences fences>
void run_reduce() {
  std::vector<float> x(8 * 32), partial(8 * 32);
  for (size_t i = 0; i < x.size(); ++i) x[i] = float(i % 7);
  float expected = 0, out = 0;
  for (float value : x) expected += value;
  unsigned ticket = 0;
  go(reduce<fences>, 8, 64, sizeof(bool), x.data(), partial.data(), &ticket, &out);
  CHECK(out == expected);
  ticket = 0;  // launches are ordered
  go(reduce<fences>, 8, 64, sizeof(bool), x.data(), partial.data(), &ticket, &out);
  CHECK(out == expected);
}

__global__ void same_place(int* p) {
  if (threadIdx.x == 0) *p = int(blockIdx.x);
}
__global__ void set(int* p) { p[threadIdx.x] = int(threadIdx.x); }
__global__ void increment(int* p) { p[255 - threadIdx.x] += 1; }

// --- copies -------------------------------------------------------------------------------------------------------

enum Copies { kCorrect, kNoWait, kNoBarrier, kTooSoon, kLost };

// Tiles of 64 x 4 floats through two stages; each thread sums a column of its neighbour's.
template <Copies copies>
__global__ void __launch_bounds__(64) stream(const float* x, int tiles, float* out) {
  auto& s = shared_memory<Floats<2 * 256>>();
  const int t = int(threadIdx.x);
  float sum = 0;
  cp_async_16(&s.at[t * 4], x + t * 4);
  cp_async_commit();
  for (int i = 0; i < tiles; ++i) {
    if (i + 1 < tiles) cp_async_16(&s.at[(i + 1) % 2 * 256 + t * 4], x + (i + 1) * 256 + t * 4);
    cp_async_commit();
    if (copies != kNoWait) cp_async_wait<1>();
    if (copies != kNoBarrier) __syncthreads();
    sum += s.at[i % 2 * 256 + (t * 4 + 4) % 256];
    if (copies != kTooSoon) __syncthreads();
  }
  if (copies != kLost) cp_async_wait<0>();
  out[t] = sum;
}
template <Copies copies>
void run_stream() {
  const int tiles = 5;
  std::vector<float4> memory(tiles * 64);
  float* x = &memory[0].x;
  for (int i = 0; i < tiles * 256; ++i) x[i] = float(i % 13);
  std::vector<float> out(64);
  go(stream<copies>, 1, 64, sizeof(Floats<2 * 256>), x, tiles, out.data());
  for (int t = 0; t < 64; ++t) {
    float expected = 0;
    for (int i = 0; i < tiles; ++i) expected += x[i * 256 + (t * 4 + 4) % 256];
    if (copies == kCorrect) CHECK(out[t] == expected);
    if (copies == kNoWait) CHECK(out[t] != out[t]);
  }
}

__global__ void forgets(const float4* x) {
  cp_async_16(shared_memory<Floats<16>>().at, x);
  cp_async_commit();
  cp_async_wait<1>();
}
__global__ void misaligned_copy(const float4* x) { cp_async_16(shared_memory<Floats<16>>().at + 1, x); }
__global__ void copy_elsewhere(const float4* x) { cp_async_16(shared_memory<Floats<16>>().at + 16, x); }
void run_copy(void (*kernel)(const float4*)) {
  std::vector<float4> x(4);
  go(kernel, 1, 1, sizeof(Floats<16>), static_cast<const float4*>(x.data()));
}

// --- shared memory ------------------------------------------------------------------------------------------------

__global__ void poisoned(int* wrong) {
  auto& s = shared_memory<Floats<64>>();
  if (s.at[threadIdx.x] == s.at[threadIdx.x]) atomicAdd(wrong, 1);
  __syncthreads();
  s.at[threadIdx.x] = 1;
}
__global__ void beyond(int i) { shared_memory<Floats<64>>().at[i & 127] = 1; }
__global__ void larger() { shared_memory<Floats<64>>().at[0] = 1; }

// --- matrices -----------------------------------------------------------------------------------------------------

struct alignas(16) Rows {
  uint32_t row[32][4];
};
struct alignas(16) Operands {
  uint32_t a[16][8], b[8][8];  // 8 words: 16 elements of 16 bits or 8 of 32
};

__global__ void transposed(uint32_t* out) {
  auto& s = shared_memory<Rows>();
  const int lane = int(threadIdx.x);
  for (int i = 0; i < 4; ++i) s.row[lane][i] = uint32_t(lane * 4 + i);
  __syncwarp();
  uint32_t words[4];
  ldmatrix_x4(words, s.row[lane]);
  for (int i = 0; i < 4; ++i) out[lane * 4 + i] = words[i];
}
__global__ void misaligned_row() {
  uint32_t words[4];
  ldmatrix_x4(words, shared_memory<Floats<256>>().at + threadIdx.x * 4 + 1);
}
__global__ void unordered_row() {
  auto& s = shared_memory<Floats<128>>();
  for (int i = 0; i < 4; ++i) s.at[i * 32 + threadIdx.x] = 1;
  uint32_t words[4];
  ldmatrix_x4(words, &s.at[threadIdx.x * 4]);
}

// d [16, 8] = a [16, K] b [8, K]', the operands' words through ldmatrix: a's matrices are (rows 0-7, 8-15) x (words 0-3
// of a row, 4-7); b's two are fetched together with themselves.
template <simt::Kind kind>
__global__ void product(const uint32_t* a, const uint32_t* b, float* d) {
  auto& s = shared_memory<Operands>();
  const int lane = int(threadIdx.x);
  for (int i = lane; i < 128; i += 32) s.a[i / 8][i % 8] = a[i];
  for (int i = lane; i < 64; i += 32) s.b[i / 8][i % 8] = b[i];
  __syncwarp();
  uint32_t x[4], y[4];
  ldmatrix_x4(x, &s.a[lane % 16][lane / 16 * 4]);
  ldmatrix_x4(y, &s.b[lane % 8][lane / 8 % 2 * 4]);
  float sum[4] = {1, 1, 1, 1};
  if (kind == simt::kMmaBf16) mma_m16n8k16_bf16(sum, x, y[0], y[1]);
  if (kind == simt::kMmaF16) mma_m16n8k16_f16(sum, x, y[0], y[1]);
  if (kind == simt::kMmaTf32) mma_m16n8k8_tf32(sum, x, y[0], y[1]);
  for (int i = 0; i < 4; ++i) d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sum[i];
}
template <simt::Kind kind>
void run_product() {
  constexpr int depth = kind == simt::kMmaTf32 ? 8 : 16;
  std::vector<uint32_t> words[2] = {std::vector<uint32_t>(128), std::vector<uint32_t>(64)};
  std::vector<double> values[2];
  for (int operand = 0; operand < 2; ++operand) {
    for (uint32_t& word : words[operand]) {
      for (int i = 0; i < depth / 8; ++i) {
        const float value = float(int(random_word() % 65) - 32) / 4;
        values[operand].push_back(double(value));
        if (kind == simt::kMmaTf32) word = __float_as_uint(value) | (random_word() & 0x1fff);  // ignored
        if (kind == simt::kMmaF16) word |= uint32_t(__float2half_rn(value).bits) << 16 * i;
        if (kind == simt::kMmaBf16) word |= uint32_t(__float2bfloat16_rn(value).bits) << 16 * i;
      }
    }
  }
  std::vector<float> d(128);
  go(product<kind>, 1, 32, sizeof(Operands), static_cast<const uint32_t*>(words[0].data()),
     static_cast<const uint32_t*>(words[1].data()), d.data());
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) {
      double sum = 1;
      for (int k = 0; k < depth; ++k) sum += values[0][i * depth + k] * values[1][j * depth + k];
      CHECK(d[i * 8 + j] == float(sum));
    }
  }
}
void run_matrices() {
  std::vector<uint32_t> out(128);
  go(transposed, 1, 32, sizeof(Rows), out.data());
  for (int l = 0; l < 32; ++l) {
    for (int m = 0; m < 4; ++m) CHECK(out[l * 4 + m] == uint32_t((m * 8 + l / 4) * 4 + l % 4));
  }
  run_product<simt::kMmaBf16>();
  run_product<simt::kMmaF16>();
  run_product<simt::kMmaTf32>();
}

// --- 16 bits ------------------------------------------------------------------------------------------------------

// The nearest value, ties to even, by trying: the numbers of one sign ascend with their bits.
unsigned short nearest(double x, unsigned short infinity, double (*value)(unsigned short)) {
  const unsigned short sign = std::signbit(x) ? 0x8000 : 0;
  const double magnitude = std::fabs(x);
  unsigned low = 0, high = infinity;  // value(low) <= magnitude, or low is 0
  while (high - low > 1) {
    const unsigned middle = (low + high) / 2;
    (value((unsigned short)middle) <= magnitude ? low : high) = middle;
  }
  if (std::isinf(x)) return (unsigned short)(sign | infinity);
  const double below = value((unsigned short)low);
  // Infinity stands for the power of two that would follow.
  const double above =
      high == infinity ? below + (below - value((unsigned short)(low - 1))) : value((unsigned short)high);
  const double down = magnitude - below, up = above - magnitude;
  return (unsigned short)(sign | (down < up || (down == up && low % 2 == 0) ? low : high));
}
double half_value(unsigned short bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  return exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
}
double bfloat_value(unsigned short bits) {
  const int exponent = bits >> 7 & 255, mantissa = bits & 127;
  return exponent == 0 ? std::ldexp(mantissa, -133) : std::ldexp(128 + mantissa, exponent - 134);
}
void run_conversions() {
  for (unsigned i = 0; i < 65536; ++i) {
    const __half h{(unsigned short)i};
    const __nv_bfloat16 b{(unsigned short)i};
    const float x = __half2float(h), y = __bfloat162float(b);
    const bool h_nan = (i & 0x7fff) > 0x7c00, b_nan = (i & 0x7fff) > 0x7f80;
    CHECK(std::isnan(x) == h_nan && std::isnan(y) == b_nan);
    CHECK(__float2half_rn(x).bits == (h_nan ? 0x7fff : i));
    CHECK(__float2bfloat16_rn(y).bits == (b_nan ? 0x7fff : i));
    if ((i & 0x7fff) < 0x7c00) CHECK(double(x) == (i & 0x8000 ? -1 : 1) * half_value((unsigned short)(i & 0x7fff)));
    if ((i & 0x7fff) < 0x7f80) CHECK(double(y) == (i & 0x8000 ? -1 : 1) * bfloat_value((unsigned short)(i & 0x7fff)));
    // Around every midpoint of two halves.
    if ((i & 0x7fff) > 0x7bff) continue;
    const float next = (i & 0x7fff) == 0x7bff ? std::copysign(65536.f, x) : __half2float({(unsigned short)(i + 1)});
    const float middle = x + (next - x) / 2;
    for (const float z : {std::nextafter(middle, x), middle, std::nextafter(middle, next)}) {
      CHECK(__float2half_rn(z).bits == nearest(z, 0x7c00, half_value));
    }
  }
  for (int i = 0; i < 300000; ++i) {
    uint32_t word = random_word();
    if (i % 3 == 1) word = (word & 0x80001fff) | (random_word() % (48u << 10) + (96u << 10)) << 13;  // a half's range
    if (i % 3 == 2) word = (word & 0xffff0000) | (0x7fff + random_word() % 3);  // bfloat16's midpoints
    const float x = __uint_as_float(word);
    if (std::isnan(x)) continue;
    CHECK(__float2half_rn(x).bits == nearest(x, 0x7c00, half_value));
    CHECK(__float2bfloat16_rn(x).bits == nearest(x, 0x7f80, bfloat_value));
  }
}

// --- the rest -----------------------------------------------------------------------------------------------------

__global__ void race_to(unsigned* ticket, unsigned* order) { order[atomicAdd(ticket, 1u)] = threadIdx.x; }
__global__ void blocks(unsigned* ticket, unsigned* order) { order[atomicAdd(ticket, 1u)] = blockIdx.x; }
void run_orders() {
  std::set<std::vector<unsigned>> seen, seen_blocks;
  for (int i = 0; i < 20; ++i) {
    std::vector<unsigned> order(64);
    unsigned ticket = 0;
    go(race_to, 1, 64, 0, &ticket, order.data());
    seen.insert(order);
    ticket = 0;
    go(blocks, 64, 1, 0, &ticket, order.data());
    seen_blocks.insert(order);
  }
  CHECK(seen.size() >= 5 && seen_blocks.size() >= 18);
}

__global__ void indices(unsigned long long* sum) {
  atomicAdd(sum, (unsigned long long)((blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x));
}
void run_host() {
  unsigned long long sum = 0;
  CHECK(launch(indices, dim3(3, 4, 5), 2, 0, nullptr, &sum) == cudaSuccess && sum == 60 * 59);
  CHECK(launch(indices, dim3(0), 2, 0, nullptr, &sum) == cudaErrorInvalidConfiguration);
  CHECK(launch(indices, dim3(1), 1025, 0, nullptr, &sum) == cudaErrorInvalidConfiguration);
  CHECK(launch(indices, dim3(1), 1, 1 << 20, nullptr, &sum) == cudaErrorInvalidValue);
  CHECK(max(1, 2) == 2 && min(1.f, NAN) == 1 && max(3u, 4u) == 4 && min(int64_t(5), int64_t(4)) == 4);
  CHECK(__popc(0xf0u) == 4 && __ffs(8) == 4 && __ffs(0) == 0 && __clz(1) == 31 && __clz(0) == 32 && __clz(-1) == 0);
  CHECK(rsqrtf(4) == 0.5f && __fmaf_rn(2, 3, 4) == 10 && __double_as_longlong(0) == 0 && __ldg(&sum) == sum);
  std::vector<int> p(256);
  go(set, 1, 256, 0, p.data());
  go(increment, 1, 256, 0, p.data());
  for (int i = 0; i < 256; ++i) CHECK(p[i] == i + 1);
}

__attribute__((noinline)) int touch(char* frame, int n) {
  for (int i = 0; i < 1024; ++i) frame[i] = char(n);
  return frame[n & 1023];
}
__attribute__((noinline)) int deep(int n) {
  char frame[1024];
  const int first = touch(frame, n);
  return n == 0 ? first : deep(n - 1) + frame[1];
}
__global__ void recursive(int depth, int* out) { out[blockIdx.x * blockDim.x + threadIdx.x] = deep(depth); }
// Blocks take over stacks and shared memory: none of that is a race.
void run_many_blocks() {
  std::vector<int> out(20 * 256);
  go(recursive, 20, 256, 0, 4, out.data());
  for (int sum : out) CHECK(sum == 10);
  int wrong = 0;
  go(poisoned, 40, 64, sizeof(Floats<64>), &wrong);
  CHECK(wrong == 0);
}

#if defined(__SANITIZE_THREAD__)
constexpr int kBuild = 1;
#elif defined(__SANITIZE_ADDRESS__)
constexpr int kBuild = 2;
#else
constexpr int kBuild = 0;
#endif

// What a mode prints on its way down: in every build, only under TSan, only under ASan. Nothing: it passes.
struct Mode {
  const char* name;
  void (*run)();
  const char *all = nullptr, *tsan = nullptr, *asan = nullptr;
};

const char* const kRace = "ThreadSanitizer: data race";

const Mode modes[] = {
    {"barrier", run_reverse<true>},
    {"ring_256", run_ring_256},
    {"ring_1024", run_ring_1024},
    {"warps", [] { go(warps, 2, 96, 0); }},
    {"syncwarp", run_neighbours<true>},
    {"atomics", run_atomics},
    {"reduce", run_reduce<kBoth>},
    {"copies", run_stream<kCorrect>},
    {"copy_without_wait_is_nan", run_stream<kNoWait>},
    {"many_blocks", run_many_blocks},
    {"matrices", run_matrices},
    {"conversions", run_conversions},
    {"orders", run_orders},
    {"host", run_host},

    {"missing_barrier", run_reverse<false>, nullptr, kRace},
    {"divergent_barrier", [] { go(divergent, 1, 128, 0); }, "divergent __syncthreads"},
    {"exit_before_barrier", [] { go(exits_before, 1, 64, 0); }, "divergent __syncthreads"},
    {"missing_syncwarp", run_neighbours<false>, nullptr, kRace},
    {"syncwarp_of_others",
     [] {
       std::vector<float> out(32);
       go(apart, 1, 32, sizeof(Floats<32>), out.data());
     },
     nullptr, kRace},
    {"exited_lane", [] { go(names_exited, 1, 32, 0); }, "exit"},
    {"missing_lane", [] { go(names_missing, 1, 40, 0); }, "does not exist"},
    {"not_in_mask", [] { go(not_in_mask, 1, 32, 0); }, "not in its own mask"},
    {"other_line", [] { go(other_line, 1, 32, 0); }, "__syncwarp with mask 0xffffffff, but lane"},
    {"other_primitive", [] { go(other_primitive, 1, 32, 0); }, "_sync with mask 0xffffffff, but lane"},
    {"warp_at_barrier", [] { go(at_barrier, 1, 32, 0); }, "waits"},
    {"shuffle_outside_mask", [] { go(reads_outside, 1, 32, 0); }, "reads from lane 20, which mask"},
    {"deadlock", [] { go(cycle, 1, 32, 0); }, "deadlock"},
    {"plain_beside_atomic",
     [] {
       int p = 0;
       std::vector<int> out(2);
       go(plain_beside, 1, 2, 0, &p, out.data());
     },
     nullptr, kRace},
    {"missing_fence_before", run_reduce<kNoneBefore>, nullptr, kRace},
    {"missing_fence_after", run_reduce<kNoneAfter>, nullptr, kRace},
    {"fence_before_write", run_reduce<kTooEarly>, nullptr, kRace},
    {"blocks_race",
     [] {
       int p = 0;
       go(same_place, 2, 32, 0, &p);
     },
     nullptr, kRace},
    {"missing_barrier_after_wait", run_stream<kNoBarrier>, nullptr, kRace},
    {"copy_before_barrier", run_stream<kTooSoon>, nullptr, kRace},
    {"copy_without_wait", [] { run_copy(forgets); }, "without a cp_async_wait"},
    {"copy_misaligned", [] { run_copy(misaligned_copy); }, "is not aligned to 16 bytes"},
    {"copy_elsewhere", [] { run_copy(copy_elsewhere); }, "is not in shared memory"},
    {"shared_overflow", [] { go(beyond, 1, 1, sizeof(Floats<64>), 64); }, nullptr, nullptr,
     "AddressSanitizer: heap-buffer-overflow"},
    {"shared_too_small", [] { go(larger, 1, 1, 16); }, "but the launch asked for 16"},
    {"row_misaligned", [] { go(misaligned_row, 1, 32, sizeof(Floats<256>)); }, "is not aligned to 16 bytes"},
    {"row_unordered", [] { go(unordered_row, 1, 32, sizeof(Floats<128>)); }, nullptr, kRace},
    {"stack_overflow",
     [] {
       std::vector<int> out(32);
       go(recursive, 1, 32, 0, 1000, out.data());
     },
     "", nullptr, "AddressSanitizer: stack-overflow"},
    {"outside_of_kernels", [] { __syncthreads(); }, "device code outside of a kernel"},
};

int run_all(const char* self) {
  int failures = 0;
  for (const Mode& mode : modes) {
    const char* special = kBuild == 1 ? mode.tsan : kBuild == 2 ? mode.asan : nullptr;
    const char* expected = special ? special : mode.all;
    fflush(stdout);
    FILE* pipe = popen((std::string("'") + self + "' " + mode.name + " 2>&1").c_str(), "r");
    std::string text;
    for (int c; (c = fgetc(pipe)) != EOF;) text += char(c);
    const int status = pclose(pipe);
    const bool right = expected ? status != 0 && text.find(expected) != std::string::npos : status == 0;
    printf("%-28s %s\n", mode.name, !right ? "WRONG" : expected ? "reported" : "passed");
    if (!right) printf("expected %s, status %d:\n%s\n", expected ? expected : "nothing", status, text.c_str());
    failures += !right;
  }
  return failures != 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) return run_all(argv[0]);
  for (const Mode& mode : modes) {
    if (std::string(mode.name) != argv[1]) continue;
    mode.run();
    return 0;
  }
  printf("no mode %s\n", argv[1]);
  return 2;
}
