// The slots of many adapters: one is written whole, and then one entry of the table may be flipped
// to it. Work on the stream before the flip sees the old slot, work after it the new one.
#pragma once

#include "common/device.cuh"

namespace fused_lora::bank {

constexpr int kThreads = 128;

template <typename T>
struct Params {
  T* a;          // [R, K], the slot's
  T* bt;         // [R, N]
  float* gate;   // [R]
  float* scale;  // one
  int32_t* rank;
  const T* lora_a;  // [rank_value, K]
  const T* lora_b;  // [N, rank_value]
  int64_t a_row_stride, a_col_stride, b_row_stride, b_col_stride;
  const float* new_gate;  // [rank_value] or null: ones
  float scale_value;
  int rank_value;
  int64_t R, K, N;
};

// A thread has a column of A or of B^T; past the rank there are zeros.
template <typename T>
__global__ void __launch_bounds__(kThreads) write_slot_kernel(const __grid_constant__ Params<T> p) {
  const int64_t r = block_id().y, c = int64_t(block_id().x) * kThreads + thread_id();
  const bool live = r < p.rank_value;
  const T zero = from_float<T>(0.0f);
  if (c < p.K) {
    p.a[r * p.K + c] = live ? p.lora_a[r * p.a_row_stride + c * p.a_col_stride] : zero;
  } else if (c - p.K < p.N) {
    const int64_t n = c - p.K;
    p.bt[r * p.N + n] = live ? p.lora_b[n * p.b_row_stride + r * p.b_col_stride] : zero;
  }
  if (c != 0) return;
  p.gate[r] = live && p.new_gate != nullptr ? p.new_gate[r] : 1.0f;
  if (r == 0) {
    *p.scale = p.scale_value;
    *p.rank = p.rank_value;
  }
}

template <typename T>
cudaError_t start(const Params<T>& p, cudaStream_t stream) {
  const dim3 grid(unsigned(divide_up(p.K + p.N, kThreads)), unsigned(p.R));
  return launch(write_slot_kernel<T>, grid, kThreads, 0, p, stream);
}

struct FlipParams {
  int32_t* entry;
  int32_t slot;
};

__global__ void __launch_bounds__(32) flip_kernel(const __grid_constant__ FlipParams p) {
  if (thread_id() == 0) *p.entry = p.slot;
}

inline cudaError_t start(const FlipParams& p, cudaStream_t stream) {
  return launch(flip_kernel, dim3(1), 32, 0, p, stream);
}

}  // namespace fused_lora::bank
