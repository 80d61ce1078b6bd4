// y = base + bias + sum_i L_i R_i^T, every segment into one fp32 accumulator, rounded once.
//
//   forward     (x, W0), (t, B)                      dx   (dy, W0^T), (dh, A^T)
//   masked dx   (dh, A^T), D ⊙ ., (dy, W0^T)         with D = keep * keep_scale, on the output side
//
// With adapters, one segment is t_i V_j of each row's own slot: tiles ignore whose rows they hold,
// and the segment goes through the adapters that are present. A product with one of them is added to
// its own rows alone. To rows of zeros it would bring 0 x NaN.
#pragma once

#include "common/adapters.cuh"
#include "common/tile.cuh"

namespace fused_lora::segment_gemm {

constexpr int kMaxSegments = 8;
constexpr int kGroupM = 8;  // tiles go down 8 rows before the next column: neighbours share L2

template <typename T>
struct Segment {
  Matrix<T> left;   // [M, K]
  Matrix<T> right;  // [N, K]; transposed [K, N]
  bool transposed;
  bool gathered;  // left is t [M, R], right the slots V [P, R, N], slot_stride apart
};

template <typename T>
struct Params {
  Segment<T> segments[kMaxSegments];
  int count;
  int masked;           // after so many segments the accumulator is multiplied by D
  const uint8_t* bits;  // [M, ceil(N / 8)] or null
  float keep_scale;
  Adapters adapters;
  int64_t slot_stride;
  const T* bias;   // [N] or null
  Matrix<T> base;  // [M, N], which may be y; data null where there is none
  T* y;            // [M, N]
  int64_t y_row_stride, y_col_stride;
  bool y_chunked;
  int64_t M, N;
};

// Tiles of BLOCK_M x BLOCK_N, by WARPS_M x WARPS_N warps.
template <typename Scalar, int BLOCK_M_, int BLOCK_N_, int WARPS_M_, int WARPS_N_>
struct Config {
  using T = Scalar;
  static constexpr int BLOCK_M = BLOCK_M_, BLOCK_N = BLOCK_N_, BLOCK_K = kBlockK<T>;
  static constexpr int WARPS_M = WARPS_M_, WARPS_N = WARPS_N_, kThreads = 32 * WARPS_M * WARPS_N;
  static constexpr int WM = BLOCK_M / WARPS_M, WN = BLOCK_N / WARPS_N;
  using Left = Tile<T, BLOCK_M, BLOCK_K>;
  using Right = Tile<T, BLOCK_N, BLOCK_K>;
  using RightTransposed = Tile<T, BLOCK_K, BLOCK_N>;
  static constexpr int kStage = Left::kSize + Right::kSize;
  static constexpr int kRow = BLOCK_N + 4;  // floats of an output row; the 4 spread the banks
  static constexpr int kTiles = kStages * kStage * int(sizeof(T));
  static constexpr int kOutput = BLOCK_M * kRow * int(sizeof(float));
  static constexpr int kIndices = 2 * (BLOCK_M + 1) * int(sizeof(int));
  static constexpr int kShared = (kTiles > kOutput ? kTiles : kOutput) + kIndices;
  static_assert(kShared <= kMaxShared, "");
};

// The slots of a tile's rows, and each of them once, in the order of the first row of each.
struct Present {
  int* slot_of_row;  // [BLOCK_M], -1 for none
  int* slots;        // [BLOCK_M]
  int* count;

  template <int BLOCK_M, int THREADS>
  __device__ void find(const Adapters& adapters, int64_t m0, int64_t M) const {
    for (int row = thread_id(); row < BLOCK_M; row += THREADS) {
      const int slot = m0 + row < M ? adapters.slot_of(m0 + row) : -1;
      slot_of_row[row] = slot >= 0 && adapters.rank_of(slot) > 0 ? slot : -1;
    }
    sync_block();
    if (thread_id() < 32) {
      int found = 0;
      for (int base = 0; base < BLOCK_M; base += 32) {
        const int row = base + thread_id();
        bool is_first = row < BLOCK_M && slot_of_row[row] >= 0;
        for (int i = 0; is_first && i < row; ++i) is_first = slot_of_row[i] != slot_of_row[row];
        const uint32_t firsts = ballot(is_first);
        uint32_t earlier = firsts & ((1u << thread_id()) - 1);
        int place = found;
        for (; earlier != 0; earlier &= earlier - 1) ++place;
        if (is_first) slots[place] = slot_of_row[row];
        for (uint32_t rest = firsts; rest != 0; rest &= rest - 1) ++found;
      }
      if (thread_id() == 0) *count = found;
    }
    sync_block();
  }
};

struct RowsOfSlot {
  const int* slot_of_row;
  int slot;
  Adjacent rows;
  __device__ int64_t operator()(int row) const {
    return slot_of_row[row] == slot ? rows(row) : -1;
  }
};

// Where in the segments a K step is.
template <typename Params>
struct Cursor {
  const Params& p;
  const Present& present;
  int segment = 0;
  int adapter = 0;  // in a gathered segment
  int64_t k = 0;

  __device__ int64_t width() const {
    const auto& own = p.segments[segment];
    if (!own.gathered) return own.left.cols;
    return adapter < *present.count ? p.adapters.rank_of(present.slots[adapter]) : 0;
  }
  // On to a step that has columns, or behind the last segment.
  __device__ void settle() {
    while (segment < p.count && k >= width()) {
      k = 0;
      if (p.segments[segment].gathered && adapter + 1 < *present.count) {
        ++adapter;
      } else {
        ++segment;
        adapter = 0;
      }
    }
  }
  __device__ void advance(int step) {
    k += step;
    settle();
  }
  __device__ bool done() const { return segment >= p.count; }
};

// acc += L R^T in the rows of `slot` alone; right holds the rows of its V. 16 rows at a time: a
// product of all of them beside acc takes more registers than there are.
template <typename C>
__device__ void multiply_own_rows(Accumulator<C::WM, C::WN>& acc, const typename C::T* left,
                                  int warp_m, const typename C::T* right, int warp_n,
                                  const int* slot_of_row, int slot) {
  const int lane = thread_id() % 32;
#pragma unroll
  for (int i = 0; i < C::WM / 16; ++i) {
    const int* slots = slot_of_row + warp_m + i * 16;
    if (ballot(slots[lane % 16] == slot) == 0) continue;
    Accumulator<16, C::WN> product;
    multiply<typename C::Left, false, typename C::RightTransposed, true, C::BLOCK_K>(
        product, left, warp_m + i * 16, right, warp_n);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (slots[half * 8 + lane / 4] != slot) continue;
#pragma unroll
      for (int j = 0; j < C::WN / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          acc.c[i][j][half * 2 + e] += product.c[0][j][half * 2 + e];
        }
      }
    }
  }
}

template <typename C>
__device__ void apply_mask(Accumulator<C::WM, C::WN>& acc, const Params<typename C::T>& p,
                           int64_t m0, int64_t n0) {
  const int64_t row_bytes = divide_up(p.N, 8);
  const int lane = thread_id() % 32, g = lane / 4, q = lane % 4;
#pragma unroll
  for (int i = 0; i < C::WM / 8; ++i) {
#pragma unroll
    for (int j = 0; j < C::WN / 8; ++j) {
      const int64_t m = m0 + i * 8 + g, byte = n0 / 8 + j;
      const uint32_t keep = m < p.M && byte < row_bytes ? p.bits[m * row_bytes + byte] : 0;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& value = acc.c[i / 2][j][i % 2 * 2 + e];
        value = keep >> (2 * q + e) & 1 ? value * p.keep_scale : 0.0f;
      }
    }
  }
}

// Chunks of the output tile, bias and base added, rounded and written.
template <typename C>
__device__ void store_tile(const float* tile, const Params<typename C::T>& p, int64_t m0,
                           int64_t n0) {
  using T = typename C::T;
  constexpr int V = kChunk<T>, kChunks = C::BLOCK_N / V;
  for (int i = thread_id(); i < C::BLOCK_M * kChunks; i += C::kThreads) {
    const int64_t m = m0 + i / kChunks, n = n0 + i % kChunks * V;
    if (m >= p.M || n >= p.N) continue;
    const float* values = tile + i / kChunks * C::kRow + i % kChunks * V;
    T* to = p.y + m * p.y_row_stride + n * p.y_col_stride;
    const int valid = p.N - n < V ? int(p.N - n) : V;
    alignas(16) T out[V];
    const bool whole = p.y_chunked && valid == V;
    const bool add = p.base.data != nullptr, add_whole = add && p.base.chunked && valid == V;
    if (add_whole) {
      *reinterpret_cast<uint4*>(out) = *reinterpret_cast<const uint4*>(p.base.at(m, n));
    }
#pragma unroll
    for (int e = 0; e < V; ++e) {
      if (e >= valid) continue;
      float value = values[e];
      if (p.bias != nullptr) value += to_float(p.bias[n + e]);
      if (add) value += to_float(add_whole ? out[e] : *p.base.at(m, n + e));
      out[e] = from_float<T>(value);
    }
    if (whole) {
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(out);
    } else {
#pragma unroll
      for (int e = 0; e < V; ++e) {
        if (e < valid) to[e * p.y_col_stride] = out[e];
      }
    }
  }
}

template <typename C>
__global__ void __launch_bounds__(C::kThreads, C::kThreads > 128 ? 1 : 2)
    segment_gemm_kernel(const __grid_constant__ Params<typename C::T> p) {
  using T = typename C::T;
  T* memory = reinterpret_cast<T*>(shared_memory());
  int* indices = reinterpret_cast<int*>(shared_memory() + C::kShared - C::kIndices);
  const Present present{indices, indices + C::BLOCK_M, indices + 2 * C::BLOCK_M};

  const int64_t tiles_m = divide_up(p.M, C::BLOCK_M), tiles_n = divide_up(p.N, C::BLOCK_N);
  const int64_t group = block_id().x / (kGroupM * tiles_n);
  const int64_t within = block_id().x % (kGroupM * tiles_n);
  const int64_t height = min64(tiles_m - group * kGroupM, kGroupM);
  const int64_t m0 = (group * kGroupM + within % height) * C::BLOCK_M;
  const int64_t n0 = within / height * C::BLOCK_N;

  if (p.adapters.many()) {
    present.find<C::BLOCK_M, C::kThreads>(p.adapters, m0, p.M);
  }

  const Adjacent rows_m{m0, p.M}, rows_n{n0, p.N};
  auto load = [&](const Cursor<Params<T>>& at, int stage) {
    if (!at.done()) {
      const Segment<T>& own = p.segments[at.segment];
      T* left = memory + stage * C::kStage;
      T* right = left + C::Left::kSize;
      if (own.gathered) {
        const int slot = present.slots[at.adapter];
        const int64_t rank = p.adapters.rank_of(slot);
        Matrix<T> t = own.left, v = own.right;
        t.cols = rank;
        v.data += slot * p.slot_stride;
        load_tile<typename C::Left, C::kThreads>(
            left, t, RowsOfSlot{present.slot_of_row, slot, rows_m}, at.k);
        load_tile<typename C::RightTransposed, C::kThreads>(right, v, Adjacent{at.k, rank}, n0);
      } else {
        load_tile<typename C::Left, C::kThreads>(left, own.left, rows_m, at.k);
        if (own.transposed) {
          load_tile<typename C::RightTransposed, C::kThreads>(
              right, own.right, Adjacent{at.k, own.left.cols}, n0);
        } else {
          load_tile<typename C::Right, C::kThreads>(right, own.right, rows_n, at.k);
        }
      }
    }
    copy_async_commit();
  };

  const int warp = thread_id() / 32;
  const int warp_m = warp / C::WARPS_N * C::WM, warp_n = warp % C::WARPS_N * C::WN;
  Accumulator<C::WM, C::WN> acc;
  Cursor<Params<T>> ahead{p, present}, at{p, present};
  ahead.settle();
  at.settle();
  for (int stage = 0; stage < kStages - 1; ++stage) {
    load(ahead, stage);
    if (!ahead.done()) ahead.advance(C::BLOCK_K);
  }
  bool masked = p.bits == nullptr;
  for (int stage = 0; !at.done(); stage = stage == kStages - 1 ? 0 : stage + 1) {
    copy_async_wait<kStages - 2>();
    sync_block();  // this step's tiles are there, and all warps are done with those of the last
    load(ahead, stage == 0 ? kStages - 1 : stage - 1);
    if (!ahead.done()) ahead.advance(C::BLOCK_K);
    if (!masked && at.segment >= p.masked) {
      apply_mask<C>(acc, p, m0 + warp_m, n0 + warp_n);
      masked = true;
    }
    const T* left = memory + stage * C::kStage;
    const T* right = left + C::Left::kSize;
    if (p.segments[at.segment].gathered) {
      multiply_own_rows<C>(acc, left, warp_m, right, warp_n, present.slot_of_row,
                           present.slots[at.adapter]);
    } else if (p.segments[at.segment].transposed) {
      multiply<typename C::Left, false, typename C::RightTransposed, true, C::BLOCK_K>(
          acc, left, warp_m, right, warp_n);
    } else {
      multiply<typename C::Left, false, typename C::Right, false, C::BLOCK_K>(acc, left, warp_m,
                                                                            right, warp_n);
    }
    at.advance(C::BLOCK_K);
  }
  if (!masked) apply_mask<C>(acc, p, m0 + warp_m, n0 + warp_n);
  copy_async_wait<0>();
  sync_block();  // the tiles' memory is free

  float* output = reinterpret_cast<float*>(shared_memory());
  acc.for_each_pair([&](int row, int col, const float* values) {
    float* to = output + (warp_m + row) * C::kRow + warp_n + col;
    to[0] = values[0];
    to[1] = values[1];
  });
  sync_block();
  store_tile<C>(output, p, m0, n0);
}

template <typename C>
cudaError_t start(const Params<typename C::T>& p, cudaStream_t stream) {
  const int64_t tiles = divide_up(p.M, C::BLOCK_M) * divide_up(p.N, C::BLOCK_N);
  return launch(segment_gemm_kernel<C>, dim3(unsigned(tiles)), C::kThreads, C::kShared, p, stream);
}

}  // namespace fused_lora::segment_gemm
