// What this library brings: the operators' CPU kernels, and the module triplet_ext._C with build_info(). The CUDA
// kernels are registered in cuda/launch.cpp. Schemas: triplet_ext/_ops.py.
#include <ATen/Version.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>
#include <torch/version.h>

#include "cpu/interrupt.h"
#include "ops.h"

namespace triplet_ext {

TORCH_LIBRARY_IMPL(triplet_ext, CPU, m) {
  m.impl("triplet_loss", &triplet_loss_cpu);
  m.impl("triplet_loss_backward", &triplet_loss_backward_cpu);
  m.impl("indexed_triplet_loss", &indexed_triplet_loss_cpu);
  m.impl("indexed_triplet_loss_backward", &indexed_triplet_loss_backward_cpu);
  m.impl("select_hardest", &select_hardest_cpu);
  m.impl("select_pair", &select_pair_cpu);
  m.impl("mined_triplet_loss", &mined_triplet_loss_cpu);
  m.impl("mined_triplet_loss_backward", &mined_triplet_loss_backward_cpu);
  m.impl("select_with_memory", &select_with_memory_cpu);
  m.impl("mined_triplet_loss_with_memory", &mined_triplet_loss_with_memory_cpu);
  m.impl("mined_triplet_loss_with_memory_backward", &mined_triplet_loss_with_memory_backward_cpu);
}

static pybind11::dict build_info() {
  pybind11::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = "gcc " __VERSION__;
#else
  info["compiler"] = "unknown";
#endif
  info["built_for_torch"] = TORCH_VERSION;
  info["cpu"] = true;
  info["cpu_capability"] = at::get_cpu_capability();
#if defined(TRIPLET_EXT_CUDA)
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  return info;
}

// Operators run without the lock of Python's interpreter.
static void check_signals() {
  const pybind11::gil_scoped_acquire lock;
  if (PyErr_CheckSignals() != 0) throw pybind11::error_already_set();
}

}  // namespace triplet_ext

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Compiled kernels of triplet_ext";
  triplet_ext::set_interrupt_check(&triplet_ext::check_signals);
  m.def("build_info", &triplet_ext::build_info, "What this library was built with");
}
