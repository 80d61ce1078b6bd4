// y_i = bias + W0 x_i + scale_j g_j ⊙ (x_i A_j^T) B_j^T for up to 64 rows, for one adapter or the
// adapter j of each row; and without W0, y_i += the rest. Two launches:
//
//   shrink_rows   planes [splits, M, R] of x_i A_j^T: each row reads its own slot once
//   decode        W0 once, by all multiprocessors
//
// What counts are bytes, so W0 goes from memory to the registers of the tensor cores without a stop.
// The order of a contraction is free: a lane takes 8 adjacent k of its row, 16 bytes, and hands
// them out as the columns of two mma steps; x is handed out likewise.
#pragma once

#include "common/adapters.cuh"
#include "common/tile.cuh"

namespace fused_lora::decode {

constexpr int kMaxRows = 64;
constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kBlockN = 32;  // columns of y; the warps share them and divide K
constexpr int kStep = 32;    // columns of K of a warp's step

template <typename T>
struct ShrinkParams {
  Matrix<T> x;  // [M, K]
  Matrix<T> a;  // [R, K] of slot 0
  int64_t slot_stride;
  Adapters adapters;
  float* planes;  // [splits, M, R], unwritten past a rank
  int64_t span;   // columns of K in a split, a multiple of 256
};

// 8 elements, as floats.
template <typename T>
__device__ inline void load_eight(float (&to)[8], const Matrix<T>& from, int64_t row, int64_t col) {
  if (from.chunked && col + 8 <= from.cols) {
#pragma unroll
    for (int part = 0; part < 8; part += kChunk<T>) {
      const uint4 raw = load_cached(from.at(row, col + part));
      alignas(16) T values[kChunk<T>];
      *reinterpret_cast<uint4*>(values) = raw;
#pragma unroll
      for (int e = 0; e < kChunk<T>; ++e) to[part + e] = to_float(values[e]);
    }
  } else {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      to[e] = col + e < from.cols ? to_float(*from.at(row, col + e)) : 0.0f;
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    shrink_rows_kernel(const __grid_constant__ ShrinkParams<T> p) {
  const int64_t row = block_id().x, split = block_id().y, M = p.x.rows;
  const int slot = p.adapters.slot_of(row);
  if (slot < 0) return;
  const int rank = p.adapters.rank_of(slot), lane = thread_id() % 32;
  Matrix<T> a = p.a;
  a.data += slot * p.slot_stride;
  const int64_t begin = split * p.span, end = min64(begin + p.span, p.x.cols);
  for (int r = int(block_id().z) * kWarps + thread_id() / 32; r < rank;
       r += kWarps * int(grid_size().z)) {
    float sum = 0.0f;
#pragma unroll 2
    for (int64_t k = begin + lane * 8; k < end; k += 32 * 8) {
      float x[8], weight[8];
      load_eight(x, p.x, row, k);
      load_eight(weight, a, r, k);
#pragma unroll
      for (int e = 0; e < 8; ++e) sum += x[e] * weight[e];
    }
    for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    if (lane == 0) p.planes[(split * M + row) * p.adapters.R + r] = sum;
  }
}

template <typename T>
cudaError_t start(const ShrinkParams<T>& p, cudaStream_t stream) {
  const dim3 grid(unsigned(p.x.rows), unsigned(divide_up(p.x.cols, p.span)),
                  unsigned(divide_up(p.adapters.R, 4 * kWarps)));
  return launch(shrink_rows_kernel<T>, grid, kThreads, 0, p, stream);
}

template <typename T>
struct Params {
  Matrix<T> x;       // [M, K]
  Matrix<T> weight;  // [N, K]; data is null where y is only added to
  Matrix<T> v;       // [R, N] of slot 0, any strides
  int64_t slot_stride;
  Adapters adapters;
  const float* planes;  // [splits_r, M, R]
  int64_t splits_r;
  const T* bias;  // [N] or null
  T* y;           // [M, N]
  int64_t y_row_stride, y_col_stride;
  int64_t M, N;
  int splits;          // of K
  int64_t span;        // columns of K in a split
  float* parts;        // fp32 [splits, M, N] where there is more than one, else null
  uint32_t* counters;  // [blocks of N], zero before and after
};

template <typename T>
__device__ inline uint4 load_raw(const Matrix<T>& from, int64_t row, int64_t col, int64_t end,
                                 bool streamed) {
  if (row < from.rows && from.chunked && col + 8 <= end) {
    return streamed ? load_streamed(from.at(row, col)) : load_cached(from.at(row, col));
  }
  alignas(16) T values[8];
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    values[e] = row < from.rows && col + e < end ? *from.at(row, col + e) : from_float<T>(0.0f);
  }
  return *reinterpret_cast<const uint4*>(values);
}

// Adds W0 x^T of this split to out [M, kBlockN], a warp's share of K each.
template <typename T, int ROWS>
__device__ void multiply_base(float* out, const Params<T>& p, int64_t n0, int64_t begin,
                              int64_t end) {
  const int warp = thread_id() / 32, lane = thread_id() % 32, g = lane / 4, q = lane % 4;
  Accumulator<kBlockN, ROWS> acc;  // y^T
  const int64_t share = divide_up(divide_up(end - begin, kWarps), kStep) * kStep;
  const int64_t last = min64(begin + (warp + 1) * share, end);
#pragma unroll 2
  for (int64_t k = begin + warp * share; k < last; k += kStep) {
    uint4 w[kBlockN / 8], x[ROWS / 8];
#pragma unroll
    for (int i = 0; i < kBlockN / 8; ++i) {
      w[i] = load_raw(p.weight, n0 + i * 8 + g, k + q * 8, last, true);
    }
#pragma unroll
    for (int j = 0; j < ROWS / 8; ++j) x[j] = load_raw(p.x, j * 8 + g, k + q * 8, last, false);
#pragma unroll
    for (int i = 0; i < kBlockN / 16; ++i) {
      const uint4 top = w[2 * i], bottom = w[2 * i + 1];
      const uint32_t first[4] = {top.x, bottom.x, top.y, bottom.y};
      const uint32_t second[4] = {top.z, bottom.z, top.w, bottom.w};
#pragma unroll
      for (int j = 0; j < ROWS / 8; ++j) {
        const uint32_t one[2] = {x[j].x, x[j].y}, two[2] = {x[j].z, x[j].w};
        multiply_16x8x16(acc.c[i][j], first, one, T{});
        multiply_16x8x16(acc.c[i][j], second, two, T{});
      }
    }
  }
  // The warps' sums, one after the other.
  for (int turn = 0; turn < kWarps; ++turn) {
    if (turn == warp) {
      acc.for_each_pair([&](int n, int m, const float* values) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float* to = out + (m + e) * kBlockN + n;
          *to = turn == 0 ? values[e] : *to + values[e];
        }
      });
    }
    sync_block();
  }
}

template <typename T, int ROWS>
__global__ void __launch_bounds__(kThreads) decode_kernel(const __grid_constant__ Params<T> p) {
  float* out = reinterpret_cast<float*>(shared_memory());  // [ROWS, kBlockN]
  const int64_t block = block_id().x, split = block_id().y, n0 = block * kBlockN;
  if (p.weight.data != nullptr) {
    const int64_t begin = split * p.span;
    if constexpr (sizeof(T) == 2) {
      multiply_base<T, ROWS>(out, p, n0, begin, min64(begin + p.span, p.x.cols));
    }
    if (p.parts != nullptr) {
      for (int i = thread_id(); i < ROWS * kBlockN; i += kThreads) {
        const int64_t m = i / kBlockN, n = n0 + i % kBlockN;
        if (m < p.M && n < p.N) p.parts[(split * p.M + m) * p.N + n] = out[i];
      }
      if (!arrive_last(p.counters + block, uint32_t(p.splits))) return;
    }
  }
  // A thread has 8 columns of a row: 16 bytes of V for a multiply-add of each rank.
  for (int i = thread_id(); i < ROWS * kBlockN / 8; i += kThreads) {
    const int64_t m = i / (kBlockN / 8), n = n0 + i % (kBlockN / 8) * 8;
    if (m >= p.M || n >= p.N) continue;
    T* y = p.y + m * p.y_row_stride + n * p.y_col_stride;
    float sum[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      sum[e] = 0.0f;
      if (n + e >= p.N) continue;
      if (p.weight.data == nullptr) {
        sum[e] = to_float(y[e * p.y_col_stride]);
      } else if (p.parts == nullptr) {
        sum[e] = out[i * 8 + e];
      } else {
        for (int s = 0; s < p.splits; ++s) sum[e] += p.parts[(s * p.M + m) * p.N + n + e];
      }
      if (p.bias != nullptr) sum[e] += to_float(p.bias[n + e]);
    }
    const int slot = p.adapters.slot_of(m);
    if (slot >= 0) {
      const int R = p.adapters.R, rank = p.adapters.rank_of(slot);
      const float scale = p.adapters.scale_of(slot);
      Matrix<T> v = p.v;
      v.data += slot * p.slot_stride;
      for (int r = 0; r < rank; ++r) {
        float t = 0.0f, weight[8];
        for (int64_t s = 0; s < p.splits_r; ++s) t += p.planes[(s * p.M + m) * R + r];
        t *= scale * p.adapters.gate_of(slot, r);
        load_eight(weight, v, r, n);
#pragma unroll
        for (int e = 0; e < 8; ++e) sum[e] += t * weight[e];
      }
    }
    for (int e = 0; e < 8 && n + e < p.N; ++e) y[e * p.y_col_stride] = from_float<T>(sum[e]);
  }
}

template <typename T, int ROWS>
cudaError_t start(const Params<T>& p, cudaStream_t stream) {
  const dim3 grid(unsigned(divide_up(p.N, kBlockN)), unsigned(p.splits));
  const int bytes = p.weight.data == nullptr ? 0 : ROWS * kBlockN * int(sizeof(float));
  return launch(decode_kernel<T, ROWS>, grid, kThreads, bytes, p, stream);
}

template <typename T>
cudaError_t start(const Params<T>& p, cudaStream_t stream) {
  if (p.M <= 16) return start<T, 16>(p, stream);
  return p.M <= 32 ? start<T, 32>(p, stream) : start<T, 64>(p, stream);
}

}  // namespace fused_lora::decode
