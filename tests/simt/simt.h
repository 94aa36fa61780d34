// CUDA as far as the kernels of csrc/cuda use it, on a CPU and with every rule checked: a thread of a block is a fiber
// (simt.cpp). What breaks a rule is printed with its line and aborts; ThreadSanitizer sees threads, barriers, atomics
// and fences as CUDA defines them, AddressSanitizer sees shared memory as one heap block of the size asked for.
//
// This header is compiled with the kernels, sanitizers and all; simt.cpp is never compiled with -fsanitize=thread.
#pragma once

#include <math.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "stub/cuda_runtime_api.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

// --- types ----------------------------------------------------------------------------------------------------

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// Of the running thread; the scheduler writes them.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// --- the interface to the scheduler -----------------------------------------------------------------------------

namespace simt {

// The caller's line, as a default argument.
struct Where {
  const char* file;
  int line;
  static constexpr Where here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

// Of the orders in which blocks and threads run; SIMT_SEED sets it at the start.
extern uint64_t seed;

// How many blocks ran, and how often a thread was switched to.
extern uint64_t blocks_run, switches;

enum Kind {
  kSyncWarp,
  kShuffle,
  kShuffleXor,
  kShuffleUp,
  kShuffleDown,
  kBallot,
  kAny,
  kAll,
  kLdmatrix,
  kMmaBf16,
  kMmaF16,
  kMmaTf32
};

struct Copy {
  void* to;
  const void* from;
};

void barrier(Where where);
void sync_warp(unsigned mask, Where where);
uint64_t shuffle(Kind kind, unsigned mask, uint64_t value, int lane, int width, Where where);
unsigned vote(Kind kind, unsigned mask, bool predicate, Where where);
void ldmatrix(const uint32_t (&row)[4], uint32_t (&out)[4], Where where);
void mma(Kind kind, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Where where);
void fence(Where where);
void wait(Where where);               // for another block
void atomic(const volatile void* p);  // before each
void* shared(size_t size, Where where);
void check_row(const void* row, Where where);
void begin_copy(void* to, const void* from, Where where);
void commit_copies(Where where);
bool next_copy(int pending, Copy* copy, Where where);  // the next one that has to be done now
cudaError_t run(void (*body)(const void*), const void* context, const void* kernel, dim3 grid, unsigned threads,
                size_t shared_bytes, Where where);

typedef uint64_t Word64 __attribute__((may_alias));
typedef uint32_t Word32 __attribute__((may_alias));

struct SharedBytes {
  size_t count;
  Where where;
  SharedBytes(size_t count, Where where = Where::here()) : count(count), where(where) {}
};

template <typename To, typename From>
To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

template <typename T>
T shuffle_value(Kind kind, unsigned mask, T value, int lane, int width, Where where) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  if constexpr (sizeof(T) == 4) {
    return bits<T>(uint32_t(shuffle(kind, mask, bits<uint32_t>(value), lane, width, where)));
  } else {
    return bits<T>(shuffle(kind, mask, bits<uint64_t>(value), lane, width, where));
  }
}

// An atomic operation that has no builtin. Relaxed, as CUDA's are.
template <typename T, typename F>
T atomic_update(T* p, F f) {
  using U = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  static_assert(sizeof(T) == sizeof(U));
  typedef U A __attribute__((may_alias));
  atomic(p);
  A* word = reinterpret_cast<A*>(p);
  U old = __atomic_load_n(word, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(word, &old, bits<U>(T(f(bits<T>(old)))), false, __ATOMIC_RELAXED,
                                      __ATOMIC_RELAXED)) {
  }
  return bits<T>(old);
}

}  // namespace simt

// --- threads and warps ------------------------------------------------------------------------------------------

inline void __syncthreads(simt::Where where = simt::Where::here()) { simt::barrier(where); }
inline void __syncwarp(unsigned mask = ~0u, simt::Where where = simt::Where::here()) { simt::sync_warp(mask, where); }
inline void __threadfence(simt::Where where = simt::Where::here()) { simt::fence(where); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, simt::Where where = simt::Where::here()) {
  return simt::shuffle_value(simt::kShuffle, mask, value, lane, width, where);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, simt::Where where = simt::Where::here()) {
  return simt::shuffle_value(simt::kShuffleXor, mask, value, lanes, width, where);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, simt::Where where = simt::Where::here()) {
  return simt::shuffle_value(simt::kShuffleUp, mask, value, int(delta), width, where);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, simt::Where where = simt::Where::here()) {
  return simt::shuffle_value(simt::kShuffleDown, mask, value, int(delta), width, where);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, simt::Where where = simt::Where::here()) {
  return simt::vote(simt::kBallot, mask, predicate != 0, where);
}
inline int __any_sync(unsigned mask, int predicate, simt::Where where = simt::Where::here()) {
  return int(simt::vote(simt::kAny, mask, predicate != 0, where));
}
inline int __all_sync(unsigned mask, int predicate, simt::Where where = simt::Where::here()) {
  return int(simt::vote(simt::kAll, mask, predicate != 0, where));
}

// --- atomics ----------------------------------------------------------------------------------------------------

template <typename T>
T atomicAdd(T* p, std::common_type_t<T> value) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned> || std::is_same_v<T, unsigned long long> ||
                std::is_same_v<T, float> || std::is_same_v<T, double>);
  if constexpr (std::is_integral_v<T>) {
    simt::atomic(p);
    return __atomic_fetch_add(p, value, __ATOMIC_RELAXED);
  } else {
    return simt::atomic_update(p, [=](T old) { return old + value; });
  }
}
template <typename T>
T atomicMax(T* p, std::common_type_t<T> value) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned> || std::is_same_v<T, unsigned long long>);
  return simt::atomic_update(p, [=](T old) { return old < value ? value : old; });
}
template <typename T>
T atomicMin(T* p, std::common_type_t<T> value) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned> || std::is_same_v<T, unsigned long long>);
  return simt::atomic_update(p, [=](T old) { return value < old ? value : old; });
}
template <typename T>
T atomicOr(T* p, std::common_type_t<T> value) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned> || std::is_same_v<T, unsigned long long>);
  simt::atomic(p);
  return __atomic_fetch_or(p, value, __ATOMIC_RELAXED);
}
template <typename T>
T atomicExch(T* p, std::common_type_t<T> value) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned> || std::is_same_v<T, unsigned long long> ||
                std::is_same_v<T, float>);
  return simt::atomic_update(p, [=](T) { return value; });
}
template <typename T>
T atomicCAS(T* p, std::common_type_t<T> expected, std::common_type_t<T> value) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned> || std::is_same_v<T, unsigned long long>);
  simt::atomic(p);
  T old = expected;
  __atomic_compare_exchange_n(p, &old, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return old;
}

// --- arithmetic -------------------------------------------------------------------------------------------------

inline unsigned __float_as_uint(float x) { return simt::bits<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return simt::bits<float>(x); }
inline int __float_as_int(float x) { return simt::bits<int>(x); }
inline float __int_as_float(int x) { return simt::bits<float>(x); }
inline long long __double_as_longlong(double x) { return simt::bits<long long>(x); }
inline double __longlong_as_double(long long x) { return simt::bits<double>(x); }

inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline double __fma_rn(double x, double y, double z) { return fma(x, y, z); }
inline float rsqrtf(float x) { return float(1 / std::sqrt(double(x))); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }
inline float rsqrt(float x) { return rsqrtf(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll((unsigned long long)x); }

#define SIMT_MIN_MAX(T)                            \
  inline T min(T x, T y) { return y < x ? y : x; } \
  inline T max(T x, T y) { return x < y ? y : x; }
SIMT_MIN_MAX(int)
SIMT_MIN_MAX(unsigned)
SIMT_MIN_MAX(long)
SIMT_MIN_MAX(unsigned long)
SIMT_MIN_MAX(long long)
SIMT_MIN_MAX(unsigned long long)
#undef SIMT_MIN_MAX
inline float min(float x, float y) { return fminf(x, y); }
inline float max(float x, float y) { return fmaxf(x, y); }
inline double min(double x, double y) { return fmin(x, y); }
inline double max(double x, double y) { return fmax(x, y); }

template <typename T>
T __ldg(const T* p) {
  return *p;
}
template <typename T>
T __ldcg(const T* p) {
  return *p;
}

// --- 16 bits ----------------------------------------------------------------------------------------------------

struct __half {
  unsigned short bits;
};
struct __nv_bfloat16 {
  unsigned short bits;
};
typedef __half half;
typedef __nv_bfloat16 nv_bfloat16;

inline float __half2float(__half h) {
  const uint32_t sign = uint32_t(h.bits & 0x8000) << 16, exponent = h.bits >> 10 & 31, mantissa = h.bits & 0x3ff;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000 | mantissa << 13);
  if (exponent != 0) return __uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
  return __uint_as_float(sign | __float_as_uint(float(mantissa) * 0x1p-24f));
}
inline __half __float2half_rn(float x) {
  const uint32_t word = __float_as_uint(x), sign = word >> 16 & 0x8000, magnitude = word & 0x7fffffff;
  if (magnitude > 0x7f800000) return {0x7fff};  // what the hardware makes of every NaN
  uint32_t rounded;
  if (magnitude < 0x38800000) {  // below 2^-14: the sum's last bit is worth 2^-24
    rounded = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000;
  } else {  // a carry runs into the exponent, as it should
    rounded = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
    if (rounded > 0x7c00) rounded = 0x7c00;
  }
  return {(unsigned short)(sign | rounded)};
}
inline __half __float2half(float x) { return __float2half_rn(x); }

inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const uint32_t word = __float_as_uint(x);
  if ((word & 0x7fffffff) > 0x7f800000) return {0x7fff};
  return {(unsigned short)((word + 0x7fff + (word >> 16 & 1)) >> 16)};
}
inline __nv_bfloat16 __float2bfloat16(float x) { return __float2bfloat16_rn(x); }

// --- what device.cuh defines --------------------------------------------------------------------------------------

namespace triplet_ext {

template <typename S>
S& shared_memory(simt::Where where = simt::Where::here()) {
  static_assert(alignof(S) <= 16);
  return *static_cast<S*>(simt::shared(sizeof(S), where));
}

inline uint32_t shared_address(const void* p, simt::Where where = simt::Where::here()) {
  return uint32_t(static_cast<const char*>(p) - static_cast<const char*>(simt::shared(0, where)));
}

// The hardware may read and write at any time between here and the wait. So both count as accesses here and there, the
// destination holds NaN meanwhile, and the copy itself is done as late as the wait permits.
inline void cp_async_16(void* to, const void* from, simt::Where where = simt::Where::here()) {
  simt::begin_copy(to, from, where);
  const volatile simt::Word64* source = static_cast<const volatile simt::Word64*>(from);
  simt::Word64* target = static_cast<simt::Word64*>(to);
  for (int i = 0; i < 2; ++i) (void)source[i], target[i] = ~uint64_t(0);
}
inline void cp_async_commit(simt::Where where = simt::Where::here()) { simt::commit_copies(where); }
template <int pending>
inline void cp_async_wait(simt::Where where = simt::Where::here()) {
  static_assert(pending >= 0);
  simt::Copy copy;
  while (simt::next_copy(pending, &copy, where)) {
    for (int i = 0; i < 2; ++i) {
      static_cast<simt::Word64*>(copy.to)[i] = static_cast<const simt::Word64*>(copy.from)[i];
    }
  }
}

// The lane that names a row reads it.
inline void ldmatrix_x4(uint32_t (&out)[4], const void* row, simt::Where where = simt::Where::here()) {
  simt::check_row(row, where);
  uint32_t words[4];
  for (int i = 0; i < 4; ++i) words[i] = static_cast<const simt::Word32*>(row)[i];
  simt::ldmatrix(words, out, where);
}

inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                              simt::Where where = simt::Where::here()) {
  simt::mma(simt::kMmaBf16, d, a, b0, b1, where);
}
inline void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                             simt::Where where = simt::Where::here()) {
  simt::mma(simt::kMmaF16, d, a, b0, b1, where);
}
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                             simt::Where where = simt::Where::here()) {
  simt::mma(simt::kMmaTf32, d, a, b0, b1, where);
}

// No race with atomics, but no acquire either, fence or not.
template <typename T>
T peek(const T* p) {
  return __atomic_load_n(p, __ATOMIC_RELAXED);
}

// Blocks run one after another: what one waits for has happened, or never will.
inline void pause(simt::Where where = simt::Where::here()) { simt::wait(where); }

template <typename... P, typename... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, unsigned threads, simt::SharedBytes shared_bytes, cudaStream_t,
                   A... args) {
  const auto body = [&] { kernel(P(args)...); };
  return simt::run([](const void* context) { (*static_cast<const decltype(body)*>(context))(); }, &body,
                   reinterpret_cast<const void*>(kernel), grid, threads, shared_bytes.count, shared_bytes.where);
}

}  // namespace triplet_ext
