// P = drop(z)^T v, a sum over the M rows with a skinny result; u = z w from the same read of z.
//
//   dA^T = drop(x)^T dh          z = x, v = dh; the mask is made again, and kept as bits for dx
//   P = dy^T h, u = dy B         z = dy, v = h, w = B
//
// A block owns `rows` rows of one adapter x kBlockC columns of z and keeps its part of P in
// registers. Parts of P and u go to fp32 planes that planes.cuh adds in order.
#pragma once

#include "common/adapters.cuh"
#include "common/tile.cuh"

namespace fused_lora::row_reduce {

constexpr int kThreads = 128, kBlockC = 128;

template <typename T>
struct Params {
  Matrix<T> z;  // [M, C]
  Matrix<T> v;  // [M, R]
  Matrix<T> w;  // [C, R]; data is null where u is not wanted
  Adapters adapters;
  Dropout dropout;
  uint8_t* bits;  // [M, ceil(C / 8)] or null
  float* p;       // [tiles, R, C]
  float* u;       // [column blocks, M, R]
  int64_t tiles;  // of `rows` rows
  int64_t rows;
};

template <typename T, int BLOCK_R>
struct Shape {
  static constexpr int kBlockM = kBlockK<T>;
  using Z = Tile<T, kBlockM, kBlockC>;
  using V = Tile<T, kBlockM, BLOCK_R>;
  using W = Tile<T, kBlockC, BLOCK_R>;
  static constexpr int kStage = Z::kSize + V::kSize;
  static constexpr int kShared = (W::kSize + kStages * kStage) * int(sizeof(T));
  static_assert(kShared <= kMaxShared, "");
};

template <typename T, int BLOCK_R>
__global__ void __launch_bounds__(kThreads, 2)
    row_reduce_kernel(const __grid_constant__ Params<T> params) {
  using S = Shape<T, BLOCK_R>;
  constexpr int BM = S::kBlockM;
  const Params<T>& p = params;
  const int64_t M = p.z.rows, C = p.z.cols, R = p.adapters.R;
  const int64_t blocks_c = divide_up(C, kBlockC);
  const int64_t index = block_id().x / blocks_c, block_c = block_id().x % blocks_c;
  const int64_t c0 = block_c * kBlockC;
  const RowTile tile = find_tile(p.adapters, M, index, p.rows);
  if (tile.id < 0) return;
  const int rank = p.adapters.rank_of(p.adapters.many() ? p.adapters.table[tile.id] : 0);
  const int r0 = int(block_id().y) * BLOCK_R;
  if (r0 >= rank) return;
  const int64_t last = min64(tile.first + p.rows, tile.last);
  const bool with_u = p.w.data != nullptr;
  Matrix<T> v = p.v;
  v.cols = rank;

  T* w_tile = reinterpret_cast<T*>(shared_memory());
  T* memory = w_tile + S::W::kSize;
  if (with_u) {
    Matrix<T> w = p.w;
    w.cols = rank;
    load_tile<typename S::W, kThreads>(w_tile, w, Adjacent{c0, C}, r0);  // with the first step's
  }
  const int64_t steps = divide_up(last - tile.first, BM);
  auto rows_of = [&](int64_t step) {
    return TileRows{p.adapters.order, tile.first + step * BM, last};
  };
  auto load = [&](int64_t step) {
    if (step < steps) {
      T* z_tile = memory + step % kStages * S::kStage;
      load_tile<typename S::Z, kThreads>(z_tile, p.z, rows_of(step), c0);
      load_tile<typename S::V, kThreads>(z_tile + S::Z::kSize, v, rows_of(step), r0);
    }
    copy_async_commit();
  };

  const int warp = thread_id() / 32;
  constexpr int WN = kBlockC / 4;
  Accumulator<BLOCK_R, WN> acc;  // of P^T
  for (int step = 0; step < kStages - 1; ++step) load(step);
  for (int64_t step = 0; step < steps; ++step) {
    copy_async_wait<kStages - 2>();
    sync_block();  // this step's tiles are there, and all warps are done with those of the last
    load(step + kStages - 1);
    T* z_tile = memory + step % kStages * S::kStage;
    const T* v_tile = z_tile + S::Z::kSize;
    const TileRows rows = rows_of(step);
    if (p.dropout.seed != nullptr) {
      drop_tile<typename S::Z, kThreads>(z_tile, p.dropout, rows, c0, C,
                                         block_id().y == 0 ? p.bits : nullptr);
      sync_block();
    }
    multiply<typename S::V, true, typename S::Z, true, BM>(acc, v_tile, 0, z_tile, warp * WN);
    if (with_u && warp * 16 < BM) {
      Accumulator<16, BLOCK_R> u;
      multiply<typename S::Z, false, typename S::W, true, kBlockC>(u, z_tile, warp * 16, w_tile, 0);
      u.for_each_pair([&](int row, int col, const float* values) {
        const int64_t m = rows(warp * 16 + row);
        if (m < 0) return;
        float* to = p.u + (block_c * M + m) * R + r0 + col;
        if (r0 + col < rank) to[0] = values[0];
        if (r0 + col + 1 < rank) to[1] = values[1];
      });
    }
  }
  copy_async_wait<0>();

  acc.for_each_pair([&](int row, int col, const float* values) {
    const int64_t c = c0 + warp * WN + col;
    if (r0 + row >= rank) return;
    float* to = p.p + (index * R + r0 + row) * C + c;
    if (c < C) to[0] = values[0];
    if (c + 1 < C) to[1] = values[1];
  });
}

template <typename T, int BLOCK_R>
cudaError_t start(const Params<T>& p, cudaStream_t stream) {
  const dim3 grid(unsigned(p.tiles * divide_up(p.z.cols, kBlockC)),
                  unsigned(divide_up(p.adapters.R, BLOCK_R)));
  return launch(row_reduce_kernel<T, BLOCK_R>, grid, kThreads, Shape<T, BLOCK_R>::kShared, p,
                stream);
}

// In fp32 64 ranks would not fit into shared memory.
template <typename T>
constexpr int kWideR = sizeof(T) == 4 ? 32 : 64;

template <typename T>
cudaError_t start(const Params<T>& p, cudaStream_t stream) {
  return p.adapters.R <= 16 ? start<T, 16>(p, stream) : start<T, kWideR<T>>(p, stream);
}

}  // namespace fused_lora::row_reduce
