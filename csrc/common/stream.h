// The CUDA stream that torch is using on a device.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include <cstdint>

#include "common/check.h"

#ifdef FUSED_LORA_EMULATE

// The emulated library's kernels take tensors of the CPU.
#define FUSED_LORA_DEVICE CPU

namespace fused_lora {

struct OnDevice {
  explicit OnDevice(int32_t) {}
  cudaStream_t stream = nullptr;
};

}  // namespace fused_lora

#else

#define FUSED_LORA_DEVICE CUDA

// torch's own, from libtorch_cuda. Weak, so that this library also loads beside a CPU torch.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                            void** stream);

namespace fused_lora {

inline cudaStream_t current_stream(int32_t device_index) {
  check(aoti_torch_get_current_cuda_stream != nullptr, "this torch was built without CUDA");
  void* stream = nullptr;
  check(aoti_torch_get_current_cuda_stream(device_index, &stream) == 0,
        "torch gave no current stream for cuda:", device_index);
  return static_cast<cudaStream_t>(stream);
}

// Makes a device current while it lives, and has torch's stream there.
struct OnDevice {
  explicit OnDevice(int32_t index) : guard(index), stream(current_stream(index)) {}
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;
};

}  // namespace fused_lora

#endif
