// h = drop(x) A^T   and   t = scale * g ⊙ h, for one adapter or the adapter of each row.
//
// x [M, K] is read once. Where the tiles of rows do not fill the device K is split: each split
// writes an fp32 plane [M, R], and planes.cuh adds them in order.
#pragma once

#include "common/adapters.cuh"
#include "common/tile.cuh"

namespace fused_lora::shrink {

constexpr int kThreads = 128, kBlockM = 64;

template <typename T>
struct Params {
  Matrix<T> x;        // [M, K]
  Matrix<T> a;        // [R, K] of slot 0; transposed [K, R]
  bool a_transposed;
  int64_t slot_stride;
  Adapters adapters;
  Dropout dropout;
  T* h;           // [M, R] or null
  T* t;           // [M, R] or null
  float* planes;  // [splits, M, R] where there is more than one, else null
  int64_t tiles;  // of rows
  int64_t span;   // columns of K in a split, a multiple of kBlockK
};

template <typename T, int BLOCK_R>
struct Shape {
  using X = Tile<T, kBlockM, kBlockK<T>>;
  using A = Tile<T, BLOCK_R, kBlockK<T>>;
  using ATransposed = Tile<T, kBlockK<T>, BLOCK_R>;
  static constexpr int kStage = X::kSize + A::kSize;
  static constexpr int kShared = kStages * kStage * int(sizeof(T));
  static_assert(kShared <= kMaxShared, "");
};

template <typename T, int BLOCK_R>
__global__ void __launch_bounds__(kThreads, 2) shrink_kernel(const __grid_constant__ Params<T> p) {
  using S = Shape<T, BLOCK_R>;
  constexpr int BK = kBlockK<T>;
  T* memory = reinterpret_cast<T*>(shared_memory());
  const int64_t M = p.x.rows, K = p.x.cols;
  const Adapters& adapters = p.adapters;
  const RowTile tile = find_tile(adapters, M, block_id().x, kBlockM);
  if (tile.id < 0) return;
  const int64_t slot = adapters.many() ? adapters.table[tile.id] : 0;
  const int rank = adapters.rank_of(slot);
  const int r0 = int(block_id().z) * BLOCK_R;
  if (r0 >= rank) return;
  const TileRows rows{adapters.order, tile.first, tile.last};

  Matrix<T> a = p.a;
  a.data += slot * p.slot_stride;
  (p.a_transposed ? a.cols : a.rows) = rank;

  const int64_t begin = int64_t(block_id().y) * p.span;
  const int64_t end = min64(begin + p.span, K);
  const int64_t steps = divide_up(end - begin, BK);
  auto load = [&](int64_t step) {
    if (step < steps) {
      T* x_tile = memory + step % kStages * S::kStage;
      T* a_tile = x_tile + S::X::kSize;
      const int64_t k = begin + step * BK;
      load_tile<typename S::X, kThreads>(x_tile, p.x, rows, k);
      if (p.a_transposed) {
        load_tile<typename S::ATransposed, kThreads>(a_tile, a, Adjacent{k, K}, r0);
      } else {
        load_tile<typename S::A, kThreads>(a_tile, a, Adjacent{r0, rank}, k);
      }
    }
    copy_async_commit();
  };

  const int m0 = thread_id() / 32 * 16;
  Accumulator<16, BLOCK_R> acc;
  for (int step = 0; step < kStages - 1; ++step) load(step);
  for (int64_t step = 0; step < steps; ++step) {
    copy_async_wait<kStages - 2>();
    sync_block();  // this step's tiles are there, and all warps are done with those of the last
    load(step + kStages - 1);
    T* x_tile = memory + step % kStages * S::kStage;
    const T* a_tile = x_tile + S::X::kSize;
    if (p.dropout.seed != nullptr) {
      drop_tile<typename S::X, kThreads>(x_tile, p.dropout, rows, begin + step * BK, K, nullptr);
      sync_block();
    }
    if (p.a_transposed) {
      multiply<typename S::X, false, typename S::ATransposed, true, BK>(acc, x_tile, m0, a_tile, 0);
    } else {
      multiply<typename S::X, false, typename S::A, false, BK>(acc, x_tile, m0, a_tile, 0);
    }
  }
  copy_async_wait<0>();

  const float scale = adapters.scale_of(slot);
  acc.for_each_pair([&](int row, int col, const float* values) {
    const int64_t m = rows(m0 + row);
    if (m < 0) return;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int r = r0 + col + e;
      if (r >= rank) continue;
      const float h = values[e] * p.dropout.keep_scale;
      const int64_t out = m * adapters.R + r;
      if (p.planes != nullptr) {
        p.planes[int64_t(block_id().y) * M * adapters.R + out] = h;
        continue;
      }
      if (p.h != nullptr) p.h[out] = from_float<T>(h);
      if (p.t != nullptr) p.t[out] = from_float<T>(h * scale * adapters.gate_of(slot, r));
    }
  });
}

template <typename T, int BLOCK_R>
cudaError_t start(const Params<T>& p, cudaStream_t stream) {
  const dim3 grid(unsigned(p.tiles), unsigned(divide_up(p.x.cols, p.span)),
                  unsigned(divide_up(p.adapters.R, BLOCK_R)));
  return launch(shrink_kernel<T, BLOCK_R>, grid, kThreads, Shape<T, BLOCK_R>::kShared, p, stream);
}

template <typename T>
cudaError_t start(const Params<T>& p, cudaStream_t stream) {
  return p.adapters.R <= 16 ? start<T, 16>(p, stream) : start<T, 64>(p, stream);
}

}  // namespace fused_lora::shrink
