// The kernels for AVX-512.
#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,fma")
#endif
#define TRIPLET_ISA_AVX512
#include "kernels_impl.h"

namespace triplet_ext {
extern const Kernels<float> kAvx512Float;
extern const Kernels<double> kAvx512Double;
const Kernels<float> kAvx512Float = make_kernels<float>();
const Kernels<double> kAvx512Double = make_kernels<double>();
}  // namespace triplet_ext

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
