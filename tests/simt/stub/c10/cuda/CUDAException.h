#pragma once

#include <c10/util/Exception.h>
#include <cuda_runtime_api.h>

#define C10_CUDA_CHECK(call)                                                                              \
  do {                                                                                                    \
    const cudaError_t triplet_ext_error = call;                                                           \
    TORCH_CHECK(triplet_ext_error == cudaSuccess, "CUDA error: ", cudaGetErrorString(triplet_ext_error)); \
  } while (0)
