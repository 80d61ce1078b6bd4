// The mask of an [M, K] input as bits: uint8 [M, ceil(K / 8)], bit k % 8 of byte k // 8.
#pragma once

#include "common/philox.cuh"

namespace fused_lora::dropout {

constexpr int kThreads = 128;

struct Params {
  Dropout dropout;
  uint8_t* bits;
  int64_t bytes;  // M * calls
  int64_t calls;  // ceil(K / 8)
};

__global__ void __launch_bounds__(kThreads) bits_kernel(const __grid_constant__ Params p) {
  const int64_t i = int64_t(block_id().x) * kThreads + thread_id();
  if (i < p.bytes) {
    const uint64_t counter = p.dropout.counter(i / p.calls, i % p.calls);
    p.bits[i] = uint8_t(keep_bits(uint64_t(*p.dropout.seed), counter, p.dropout.threshold));
  }
}

inline cudaError_t start(const Params& p, cudaStream_t stream) {
  return launch(bits_kernel, dim3(unsigned(divide_up(p.bytes, kThreads))), kThreads, 0, p, stream);
}

}  // namespace fused_lora::dropout
