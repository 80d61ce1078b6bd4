// Sums of partial results in a fixed order: no result depends on which block came last.
#pragma once

#include "common/adapters.cuh"
#include "common/tile.cuh"

namespace fused_lora::planes {

constexpr int kThreads = 128;

// h = sum_s planes[s]   and   t = scale * g ⊙ h, each [M, R]; for the rows and ranks that there are.
template <typename T>
struct RowsParams {
  const float* planes;  // [S, M, R]
  int64_t S, M;
  Adapters adapters;
  T* h;  // [M, R] or null
  T* t;  // [M, R] or null
};

template <typename T>
__global__ void __launch_bounds__(kThreads)
    sum_rows_kernel(const __grid_constant__ RowsParams<T> p) {
  const int64_t i = int64_t(block_id().x) * kThreads + thread_id();
  const int R = p.adapters.R;
  if (i >= p.M * R) return;
  const int r = int(i % R), slot = p.adapters.slot_of(i / R);
  if (slot < 0 || r >= p.adapters.rank_of(slot)) return;
  float h = 0.0f;
  for (int64_t s = 0; s < p.S; ++s) h += p.planes[s * p.M * R + i];
  if (p.h != nullptr) p.h[i] = from_float<T>(h);
  if (p.t != nullptr) {
    p.t[i] = from_float<T>(h * p.adapters.scale_of(slot) * p.adapters.gate_of(slot, r));
  }
}

template <typename T>
cudaError_t start(const RowsParams<T>& p, cudaStream_t stream) {
  const int64_t blocks = divide_up(p.M * p.adapters.R, kThreads);
  return launch(sum_rows_kernel<T>, dim3(unsigned(blocks)), kThreads, 0, p, stream);
}

// With P_j the sum of the planes of adapter j's tiles:
//
//   out_j = plain_scale P_j, or where scaled   scale_j g_j ⊙ P_j       dot_jr = scale_j <w_jr, P_jr>
template <typename T, typename Out>
struct ColumnsParams {
  const float* planes;  // [tiles, R, C]
  int64_t M, C, rows;   // rows of a tile
  Adapters adapters;
  float plain_scale;
  bool scaled;
  Out* out;  // [slot, r, c]
  int64_t out_slot_stride, out_r_stride, out_c_stride;
  const T* w;  // [slot, r, c] or null
  int64_t w_slot_stride, w_r_stride, w_c_stride;
  float* dot;  // [blocks of C, slots, R]
  int64_t slots;
};

// The tiles of the adapters before `id`, and those of `id`; by a whole warp.
__device__ inline void tiles_of(const Adapters& adapters, int64_t M, int id, int64_t block,
                                int64_t* before, int64_t* own) {
  *before = 0;
  *own = divide_up(M, block);
  if (!adapters.many()) return;
  int64_t sum = 0;
  for (int i = thread_id() % 32; i < id; i += 32) {
    sum += divide_up(adapters.offsets[i + 1] - adapters.offsets[i], block);
  }
  for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  *before = sum;
  *own = divide_up(adapters.offsets[id + 1] - adapters.offsets[id], block);
}

template <typename T, typename Out>
__global__ void __launch_bounds__(kThreads)
    sum_columns_kernel(const __grid_constant__ ColumnsParams<T, Out> p) {
  const int R = p.adapters.R, r = int(block_id().y), id = int(block_id().z);
  const int64_t slot = p.adapters.many() ? p.adapters.table[id] : 0;
  const int64_t c = int64_t(block_id().x) * kThreads + thread_id();
  int64_t tile, count;
  tiles_of(p.adapters, p.M, id, p.rows, &tile, &count);
  // Where there is nothing to add the result is 0, whatever scale, gate and w are.
  const bool live = count > 0 && r < p.adapters.rank_of(slot) && c < p.C;
  const bool scaled = live && p.scaled;
  float sum = 0.0f;
  for (; live && count > 0; --count, ++tile) sum += p.planes[(tile * R + r) * p.C + c];
  sum *= p.plain_scale;
  if (scaled) sum *= p.adapters.scale_of(slot);
  if (p.dot != nullptr) {
    const T* w = p.w + slot * p.w_slot_stride + r * p.w_r_stride + c * p.w_c_stride;
    float dot = live ? sum * to_float(*w) : 0.0f;
    for (int mask = 16; mask > 0; mask /= 2) dot += shuffle_xor(dot, mask);
    float* of_warps = reinterpret_cast<float*>(shared_memory());
    if (thread_id() % 32 == 0) of_warps[thread_id() / 32] = dot;
    sync_block();
    if (thread_id() == 0) {
      for (int warp = 1; warp < kThreads / 32; ++warp) dot += of_warps[warp];
      p.dot[(int64_t(block_id().x) * p.slots + slot) * R + r] = dot;
    }
  }
  if (c >= p.C) return;
  if (scaled) sum *= p.adapters.gate_of(slot, r);
  Out* out = p.out + slot * p.out_slot_stride + r * p.out_r_stride + c * p.out_c_stride;
  *out = from_float<Out>(sum);
}

template <typename T, typename Out>
cudaError_t start(const ColumnsParams<T, Out>& p, cudaStream_t stream) {
  const dim3 grid(unsigned(divide_up(p.C, kThreads)), unsigned(p.adapters.R),
                  unsigned(p.adapters.G));
  return launch(sum_columns_kernel<T, Out>, grid, kThreads, kThreads / 32 * int(sizeof(float)), p,
                stream);
}

}  // namespace fused_lora::planes
