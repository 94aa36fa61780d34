// The kernels for whatever the compiler assumes of the processor.
#include "kernels.h"

#include "kernels_impl.h"

namespace triplet_ext {
extern const Kernels<float> kDefaultFloat;
extern const Kernels<double> kDefaultDouble;
const Kernels<float> kDefaultFloat = make_kernels<float>();
const Kernels<double> kDefaultDouble = make_kernels<double>();
}  // namespace triplet_ext
