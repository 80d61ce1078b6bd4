// Errors of the bindings. Python has validated before; these protect a direct caller of torch.ops.
#pragma once

#include <cuda_runtime.h>

#include <sstream>
#include <stdexcept>

namespace fused_lora {

// Unlike that of STD_TORCH_CHECK, the message does not show the path of a source file.
template <typename... Parts>
void check(bool holds, const Parts&... message) {
  if (holds) return;
  std::ostringstream text;
  (text << ... << message);
  throw std::runtime_error(text.str());
}

inline void check_cuda(cudaError_t status, const char* op) {
  check(status == cudaSuccess, op, ": ", cudaGetErrorName(status), ", ",
        cudaGetErrorString(status));
}

}  // namespace fused_lora
