// Which instruction set's kernels run: ATen's own choice, so that ATEN_CPU_CAPABILITY rules here, too.
#include <ATen/Version.h>

#include <string>

#include "kernels.h"

namespace triplet_ext {

extern const Kernels<float> kDefaultFloat;
extern const Kernels<double> kDefaultDouble;

#if defined(__x86_64__) && defined(__GNUC__)
extern const Kernels<float> kAvx512Float;
extern const Kernels<double> kAvx512Double;
extern const Kernels<float> kAvx2Float;
extern const Kernels<double> kAvx2Double;

template <typename T>
static const Kernels<T>& choose(const Kernels<T>& avx512, const Kernels<T>& avx2, const Kernels<T>& plain) {
  const std::string capability = at::get_cpu_capability();
  return capability == "AVX512" ? avx512 : capability == "AVX2" ? avx2 : plain;
}

template <>
const Kernels<float>& kernels<float>() {
  static const Kernels<float>& chosen = choose(kAvx512Float, kAvx2Float, kDefaultFloat);
  return chosen;
}

template <>
const Kernels<double>& kernels<double>() {
  static const Kernels<double>& chosen = choose(kAvx512Double, kAvx2Double, kDefaultDouble);
  return chosen;
}
#else
template <>
const Kernels<float>& kernels<float>() {
  return kDefaultFloat;
}

template <>
const Kernels<double>& kernels<double>() {
  return kDefaultDouble;
}
#endif

}  // namespace triplet_ext
