// Tiles in shared memory and their products.
//
// A tile is a matrix in 16-byte chunks, and chunk c of row r lies at c ^ r: the eight rows that an
// ldmatrix reads at one column are in eight different groups of banks, and so are the eight chunks
// of a row that is written.
#pragma once

#include "common/device.cuh"
#include "common/philox.cuh"

namespace fused_lora {

constexpr int kStages = 3;  // tiles under way from global memory, and the one in use

template <typename T>
constexpr int kChunk = 16 / int(sizeof(T));  // elements

// The columns of a contraction that are 128 bytes.
template <typename T>
constexpr int kBlockK = 128 / int(sizeof(T));

// A matrix of any strides, in elements, in global memory.
template <typename T>
struct Matrix {
  const T* data;
  int64_t rows, cols;
  int64_t row_stride, col_stride;
  bool chunked;  // chunks of a row are 16 aligned bytes

  __device__ const T* at(int64_t row, int64_t col) const {
    return data + row * row_stride + col * col_stride;
  }
};

template <typename Scalar, int ROWS_, int COLS_>
struct Tile {
  using T = Scalar;
  static constexpr int ROWS = ROWS_, COLS = COLS_, kSize = ROWS * COLS;
  static constexpr int kChunks = COLS / kChunk<T>;
  static_assert(COLS % kChunk<T> == 0 && (kChunks & (kChunks - 1)) == 0, "");

  // Narrow rows share the 128 bytes of all banks.
  static constexpr int kRowsOfABank = kChunks >= 8 ? 1 : 8 / kChunks;
  static constexpr int kSwizzle = kChunks >= 8 ? 7 : kChunks - 1;

  __host__ __device__ static int chunk(int row, int index) {
    return (row * kChunks + (index ^ (row / kRowsOfABank & kSwizzle))) * kChunk<T>;
  }
  __host__ __device__ static int at(int row, int col) {
    return chunk(row, col / kChunk<T>) + col % kChunk<T>;
  }
};

// Rows first, first + 1, ... of a matrix of `rows`; -1 past it.
struct Adjacent {
  int64_t first, rows;
  __device__ int64_t operator()(int row) const { return first + row < rows ? first + row : -1; }
};

// Starts the copies of a tile, of the rows row_of(0 .. ROWS) (-1: zeros) and the columns from `col`.
template <typename Tile, int THREADS, typename RowOf>
__device__ void load_tile(typename Tile::T* tile, const Matrix<typename Tile::T>& from,
                          const RowOf& row_of, int64_t col) {
  using T = typename Tile::T;
  constexpr int kTotal = Tile::ROWS * Tile::kChunks;
  auto place = [&](int i, int64_t* source, int64_t* first) {
    const int row = i / Tile::kChunks, chunk = i % Tile::kChunks;
    *source = row_of(row);
    *first = col + chunk * kChunk<T>;
    const int64_t left = from.cols - *first;
    return *source < 0 || left <= 0 ? 0 : left < kChunk<T> ? int(left) : kChunk<T>;
  };
  int64_t source, first;
  if (from.chunked) {
#pragma unroll 4
    for (int i = thread_id(); i < kTotal; i += THREADS) {
      const int valid = place(i, &source, &first);
      copy_async(tile + Tile::chunk(i / Tile::kChunks, i % Tile::kChunks),
                 valid > 0 ? from.at(source, first) : from.data, valid * int(sizeof(T)));
    }
  } else {
#pragma unroll 1
    for (int i = thread_id(); i < kTotal; i += THREADS) {
      const int valid = place(i, &source, &first);
      T* to = tile + Tile::chunk(i / Tile::kChunks, i % Tile::kChunks);
#pragma unroll 1
      for (int e = 0; e < kChunk<T>; ++e) {
        to[e] = e < valid ? *from.at(source, first + e) : from_float<T>(0.0f);
      }
    }
  }
}

// Zeroes the dropped elements of a tile whose columns begin at `col`, a multiple of 8, of an input
// with `cols` columns; bits, where given, receives the mask of the tile's rows.
template <typename Tile, int THREADS, typename RowOf>
__device__ void drop_tile(typename Tile::T* tile, const Dropout& dropout, const RowOf& row_of,
                          int64_t col, int64_t cols, uint8_t* bits) {
  using T = typename Tile::T;
  constexpr int kCalls = Tile::COLS / 8;
  const int64_t calls = divide_up(cols, 8);
  const uint64_t seed = uint64_t(*dropout.seed);
  for (int i = thread_id(); i < Tile::ROWS * kCalls; i += THREADS) {
    const int row = i / kCalls;
    const int64_t source = row_of(row), call = col / 8 + i % kCalls;
    if (source < 0 || call >= calls) continue;
    const uint32_t keep = keep_bits(seed, dropout.counter(source, call), dropout.threshold);
    if (bits != nullptr) bits[source * calls + call] = uint8_t(keep);
#pragma unroll
    for (int part = 0; part < 8; part += kChunk<T>) {
      T* chunk = tile + Tile::at(row, i % kCalls * 8 + part);
#pragma unroll
      for (int e = 0; e < kChunk<T>; ++e) {
        if (!(keep >> (part + e) & 1)) chunk[e] = from_float<T>(0.0f);
      }
    }
  }
}

// The part of a product that a warp holds: lane 4 g + q has the elements (g + 8 i, 2 q + j) of each
// 16x8 in c[..][..][2 i + j].
template <int WM, int WN>
struct Accumulator {
  float c[WM / 16][WN / 8][4] = {};

  // fn(row, col, first of two values in adjacent columns) for all of them.
  template <typename Fn>
  __device__ void for_each_pair(const Fn& fn) {
    const int lane = thread_id() % 32, g = lane / 4, q = lane % 4;
#pragma unroll
    for (int i = 0; i < WM / 16; ++i) {
#pragma unroll
      for (int j = 0; j < WN / 8; ++j) {
        fn(i * 16 + g, j * 8 + 2 * q, c[i][j]);
        fn(i * 16 + g + 8, j * 8 + 2 * q, c[i][j] + 2);
      }
    }
  }
};

// acc [WM, WN] += L R^T over K columns, with L the rows m0 .. of `left` and R the rows n0 .. of
// `right`. A tile that is TRANSPOSED holds the columns of its operand as rows.
template <typename Left, bool LEFT_TRANSPOSED, typename Right, bool RIGHT_TRANSPOSED, int K, int WM,
          int WN>
__device__ void multiply(Accumulator<WM, WN>& acc, const typename Left::T* left, int m0,
                         const typename Left::T* right, int n0) {
  using T = typename Left::T;
  static_assert(WM % 16 == 0 && WN % 16 == 0 && K % 16 == 0, "");
  const int lane = thread_id() % 32;
  if constexpr (std::is_same_v<T, float>) {
    const int g = lane / 4, q = lane % 4;
#pragma unroll 2
    for (int k = 0; k < K; ++k) {
      float a[WM / 8], b[WN / 4];
#pragma unroll
      for (int i = 0; i < WM / 8; ++i) {
        const int m = m0 + i * 8 + g;
        a[i] = left[LEFT_TRANSPOSED ? Left::at(k, m) : Left::at(m, k)];
      }
#pragma unroll
      for (int j = 0; j < WN / 4; ++j) {
        const int n = n0 + j / 2 * 8 + 2 * q + j % 2;
        b[j] = right[RIGHT_TRANSPOSED ? Right::at(k, n) : Right::at(n, k)];
      }
#pragma unroll
      for (int i = 0; i < WM / 8; ++i) {
#pragma unroll
        for (int j = 0; j < WN / 4; ++j) {
          acc.c[i / 2][j / 2][i % 2 * 2 + j % 2] += a[i] * b[j];
        }
      }
    }
  } else {
    const int row = lane % 8, low = lane / 8 % 2 * 8, high = lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < K; k += 16) {
      uint32_t a[WM / 16][4], b[WN / 16][4];
      // Matrices of L: rows, rows + 8, each at columns k and then k + 8. Of R^T the other way round.
#pragma unroll
      for (int i = 0; i < WM / 16; ++i) {
        const int m = m0 + i * 16 + low, column = k + high;
        load_matrices<LEFT_TRANSPOSED>(
            a[i], left + (LEFT_TRANSPOSED ? Left::at(column + row, m) : Left::at(m + row, column)));
      }
#pragma unroll
      for (int j = 0; j < WN / 16; ++j) {
        const int n = n0 + j * 16 + high, column = k + low;
        load_matrices<RIGHT_TRANSPOSED>(
            b[j],
            right + (RIGHT_TRANSPOSED ? Right::at(column + row, n) : Right::at(n + row, column)));
      }
#pragma unroll
      for (int i = 0; i < WM / 16; ++i) {
#pragma unroll
        for (int j = 0; j < WN / 8; ++j) {
          const uint32_t pair[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
          multiply_16x8x16(acc.c[i][j], a[i], pair, T{});
        }
      }
    }
  }
}

}  // namespace fused_lora
