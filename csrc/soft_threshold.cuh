// Soft threshold of a list of gates, in place:
//
//   g <- T_xi(g)      T_xi(v) = v - xi if v > xi;  0 if -xi <= v <= xi;  v + xi if v < -xi
//
// or what the published code of SoRA does instead, which zeroes |v| < 2 xi and keeps |v| = xi.
//
// A model has hundreds of gates of a few dozen elements each, so launches are the cost, not bytes.
// One launch covers up to kMaxChunks chunks of any gates. Their table travels by value in the
// kernel's parameters: nothing is allocated or copied on the device, and a captured graph keeps its
// own table.
#pragma once

#include <algorithm>
#include <vector>

#include "common/device.cuh"

namespace fused_lora::soft_threshold {

constexpr int kThreads = 128;
constexpr int kMaxChunks = 254;
constexpr int64_t kChunkSize = 1 << 16;  // elements

template <typename scalar_t>
struct Span {
  scalar_t* data;
  int64_t size;  // elements
};

template <typename scalar_t>
struct Params {
  using Scalar = scalar_t;
  using acc_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

  Span<scalar_t> chunks[kMaxChunks];
  int count;  // chunks in use
  bool official_compat;
  acc_t xi;
};
static_assert(sizeof(Params<double>) <= 4096, "CUDA before 12.1 takes no more");

// In the middle case v - v is 0, and NaN where v is NaN.
template <typename acc_t>
__host__ __device__ inline acc_t threshold(acc_t v, acc_t xi) {
  return v > xi ? v - xi : v < -xi ? v + xi : v - v;
}

// w = v - xi if v > xi; v + xi if v < -xi; else v. Then 0 if |w| < xi. NaN passes through both.
template <typename acc_t>
__host__ __device__ inline acc_t official_threshold(acc_t v, acc_t xi) {
  const acc_t w = v > xi ? v - xi : v < -xi ? v + xi : v;
  return -xi < w && w < xi ? acc_t(0) : w;
}

// Block b owns chunk b, and its threads stride through it.
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    soft_threshold_kernel(const __grid_constant__ Params<scalar_t> params) {
  using acc_t = typename Params<scalar_t>::acc_t;
  const Span<scalar_t> chunk = params.chunks[block_id().x];
  for (int64_t i = thread_id(); i < chunk.size; i += kThreads) {
    const acc_t v(chunk.data[i]);
    chunk.data[i] = scalar_t(params.official_compat ? official_threshold(v, params.xi)
                                                    : threshold(v, params.xi));
  }
}

// Cuts the gates into chunks and calls launch(params) once per full table and once for the rest.
template <typename scalar_t, typename Launch>
cudaError_t for_each_table(const std::vector<Span<scalar_t>>& gates, double xi,
                           bool official_compat, Launch launch) {
  Params<scalar_t> params;
  params.count = 0;
  params.official_compat = official_compat;
  params.xi = xi;
  for (const Span<scalar_t>& gate : gates) {
    for (int64_t first = 0; first < gate.size; first += kChunkSize) {
      params.chunks[params.count++] = {gate.data + first, std::min(kChunkSize, gate.size - first)};
      if (params.count < kMaxChunks) continue;
      if (const cudaError_t status = launch(params); status != cudaSuccess) return status;
      params.count = 0;
    }
  }
  return params.count > 0 ? launch(params) : cudaSuccess;
}

}  // namespace fused_lora::soft_threshold
