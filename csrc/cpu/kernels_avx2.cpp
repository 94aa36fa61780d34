// The kernels for AVX2.
#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define TRIPLET_ISA_AVX2
#include "kernels_impl.h"

namespace triplet_ext {
extern const Kernels<float> kAvx2Float;
extern const Kernels<double> kAvx2Double;
const Kernels<float> kAvx2Float = make_kernels<float>();
const Kernels<double> kAvx2Double = make_kernels<double>();
}  // namespace triplet_ext

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
