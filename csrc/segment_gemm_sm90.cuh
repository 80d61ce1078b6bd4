// y = base + bias + sum_i L_i R_i^T as segment_gemm.cuh has it, for compute capability 9.0: TMA
// brings the tiles, wgmma multiplies them where they lie, and two blocks share what both need.
//
// A block is a producer warpgroup, of which one thread starts the copies, and two consumer
// warpgroups, each with half of the tile's rows. Blocks stay and go from tile to tile. A step is 64
// columns of K of one segment, in a ring of stages:
//
//   full[stage]    the producer announces the bytes of a step; the copies of both blocks fill it
//   empty[stage]   every consumer warp of both blocks is done with what was there
//
// The two blocks of a cluster have neighbouring tiles, above each other where the tile is wide and
// else side by side. Each brings its own part of one operand, and half of the other to both.
#pragma once

#include "common/hopper.cuh"
#include "common/tile.cuh"

namespace fused_lora::segment_gemm_sm90 {

constexpr int kMaxSegments = 8;
constexpr int kCluster = 2, kConsumers = 2, kThreads = 128 * (1 + kConsumers);
constexpr int kBlockK = kBoxCols, kProductK = 16;
constexpr int kGroupRows = 8;  // clusters go down 8 rows of tiles before the next column
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
static_assert(128 * (kProducerRegisters + kConsumers * kConsumerRegisters) <= 65536, "");

// What a sum is besides its segments.
template <typename T>
struct Sum {
  int count;            // of segments
  int waits_from;       // segments from here on read what the kernel ahead writes; count: none do
  int masked;           // after so many segments the accumulator is multiplied by D
  const uint8_t* bits;  // [M, ceil(N / 8)] or null
  float keep_scale;
  const T* bias;   // [N] or null
  Matrix<T> base;  // [M, N], which may be y; data null where there is none
  T* y;            // [M, N]
  int64_t M, N;
};

// left [M, K]; right [N, K], or transposed [K, N].
struct Operands {
  Rows left, right;
  bool transposed;
};

template <typename T>
struct Problem : Sum<T> {
  Operands segments[kMaxSegments];
};

template <typename T>
struct Params : Sum<T> {
  TensorMap left[kMaxSegments], right[kMaxSegments], y_map;
  int K[kMaxSegments];
  bool transposed[kMaxSegments];
  bool y_by_tma;  // y's rows are aligned
};
static_assert(sizeof(Params<__half>) <= 4096, "the parameters of a kernel");

template <typename Scalar, int BLOCK_M_, int BLOCK_N_>
struct Config {
  using T = Scalar;
  static constexpr int BLOCK_M = BLOCK_M_, BLOCK_N = BLOCK_N_;
  static_assert(BLOCK_M % (64 * kConsumers) == 0 && BLOCK_N % 64 == 0, "");
  static constexpr int kHalves = BLOCK_M / 64 / kConsumers;  // 64 rows each, of a consumer
  static constexpr bool kSharesRight = BLOCK_N >= BLOCK_M;   // else the left operand
  static constexpr int kClusterM = BLOCK_M * (kSharesRight ? kCluster : 1);
  static constexpr int kClusterN = BLOCK_N * (kSharesRight ? 1 : kCluster);
  // Rows of the boxes that one copy brings.
  static constexpr int kLeftBox = kSharesRight ? BLOCK_M : BLOCK_M / kCluster;
  static constexpr int kRightBox = kSharesRight ? BLOCK_N / kCluster : BLOCK_N;
  static constexpr int kTransposedBox = kSharesRight ? kBlockK / kCluster : kBlockK;

  static constexpr int kLeftBytes = BLOCK_M * kRowBytes, kRightBytes = BLOCK_N * kRowBytes;
  static constexpr int kStageBytes = kLeftBytes + kRightBytes;
  static constexpr int kOutputBytes = 64 * kRowBytes, kOutputs = 2;  // of each consumer
  static constexpr int kOutputsBytes = kConsumers * kOutputs * kOutputBytes;
  static constexpr int kAlignment = 1024;
  static constexpr int kStages =
      (kHopperShared - kAlignment - kOutputsBytes - 128) / kStageBytes;
  static constexpr int kShared =
      kAlignment + kStages * kStageBytes + kOutputsBytes + 2 * kStages * int(sizeof(Barrier));
  static_assert(kStages >= 3 && kShared <= kHopperShared, "");
};

template <typename C>
struct Shared {
  unsigned char* memory =
      shared_memory() + (-shared_address(shared_memory()) & (C::kAlignment - 1));

  __device__ unsigned char* left(int stage) const { return memory + stage * C::kStageBytes; }
  __device__ unsigned char* right(int stage) const { return left(stage) + C::kLeftBytes; }
  __device__ unsigned char* output(int consumer, int index) const {
    return left(C::kStages) + (consumer * C::kOutputs + index) * C::kOutputBytes;
  }
  __device__ Barrier* full(int stage) const {
    return reinterpret_cast<Barrier*>(output(kConsumers, 0)) + stage;
  }
  __device__ Barrier* empty(int stage) const { return full(C::kStages) + stage; }
};

// The stage of a step, and the parity of its phase.
template <typename C>
struct Ring {
  int stage = 0, parity = 0;

  __device__ void advance() {
    if (++stage == C::kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// The tiles of this block, one after the other.
template <typename C>
struct Tiles {
  int64_t rows, cols, index;  // in tiles of the cluster
  int64_t step;
  int rank;

  template <typename T>
  __device__ explicit Tiles(const Sum<T>& p)
      : rows(divide_up(p.M, C::kClusterM)),
        cols(divide_up(p.N, C::kClusterN)),
        index(block_id().x / kCluster),
        step(grid_size().x / kCluster),
        rank(cluster_rank()) {}

  __device__ bool done() const { return index >= rows * cols; }
  __device__ void advance() { index += step; }
  __device__ void place(int* m0, int* n0) const {
    const int64_t group = index / (kGroupRows * cols), within = index % (kGroupRows * cols);
    const int64_t left = rows - group * kGroupRows, height = left < kGroupRows ? left : kGroupRows;
    const int64_t row = group * kGroupRows + within % height, col = within / height;
    *m0 = int(row * C::kClusterM) + (C::kSharesRight ? rank * C::BLOCK_M : 0);
    *n0 = int(col * C::kClusterN) + (C::kSharesRight ? 0 : rank * C::BLOCK_N);
  }
};

template <typename C>
__device__ void load_step(const Params<typename C::T>& p, int segment, const Shared<C>& shared,
                          int stage, int rank, int m0, int n0, int k) {
  const TensorMap &left_map = p.left[segment], &right_map = p.right[segment];
  Barrier* full = shared.full(stage);
  unsigned char *left = shared.left(stage), *right = shared.right(stage);
  if constexpr (C::kSharesRight) {
    load_box(left, left_map, m0, k, full);
  } else {
    const int row = rank * C::kLeftBox;
    load_box_to_both(left + row * kRowBytes, left_map, m0 + row, k, full);
  }
  if (p.transposed[segment]) {
    for (int n = 0; n < C::BLOCK_N; n += kBoxCols) {
      unsigned char* to = right + n * kBlockK * 2;
      if constexpr (C::kSharesRight) {
        const int row = rank * C::kTransposedBox;
        load_box_to_both(to + row * kRowBytes, right_map, k + row, n0 + n, full);
      } else {
        load_box(to, right_map, k, n0 + n, full);
      }
    }
  } else if constexpr (C::kSharesRight) {
    const int row = rank * C::kRightBox;
    load_box_to_both(right + row * kRowBytes, right_map, n0 + row, k, full);
  } else {
    load_box(right, right_map, n0, k, full);
  }
}

template <typename C>
__device__ void produce(const Params<typename C::T>& p, const Shared<C>& shared) {
  for (int i = 0; i < p.count; ++i) {
    prefetch_map(p.left[i]);
    prefetch_map(p.right[i]);
  }
  Ring<C> ring;
  for (Tiles<C> tile(p); !tile.done(); tile.advance()) {
    int m0, n0;
    tile.place(&m0, &n0);
    for (int i = 0; i < p.count; ++i) {
      if (i == p.waits_from) wait_for_grid_ahead();
      for (int k = 0; k < p.K[i]; k += kBlockK, ring.advance()) {
        wait_barrier(shared.empty(ring.stage), ring.parity ^ 1);
        arrive_expecting(shared.full(ring.stage), C::kStageBytes);
        load_step<C>(p, i, shared, ring.stage, tile.rank, m0, n0, k);
      }
    }
  }
}

// The 64 rows each of a consumer's accumulator.
template <typename C>
using Accumulators = float[C::kHalves][C::BLOCK_N / 2];

// This warp is done with a stage, in both blocks' eyes.
template <typename C>
__device__ void release(const Shared<C>& shared, int stage) {
  const int lane = thread_id() % 32;
  if (lane < kCluster) arrive_at(shared.empty(stage), lane);
}

// acc += L R^T over the 16 columns of a stage that are `product`.
template <typename C, bool TRANSPOSED>
__device__ void multiply_stage(Accumulators<C>& acc, const Shared<C>& shared, int consumer,
                               int stage, int product) {
  constexpr int kBytesK = kProductK * 2, kEight = 8 * kRowBytes;
  const int rows = consumer * C::kHalves * 64;
  const uint64_t left =
      matrix_descriptor(shared_address(shared.left(0)) + rows * kRowBytes, 16, kEight);
  const uint64_t right = matrix_descriptor(shared_address(shared.right(0)),
                                           TRANSPOSED ? kBlockK * kRowBytes : 16, kEight);
  const int first = stage * C::kStageBytes;
#pragma unroll
  for (int half = 0; half < C::kHalves; ++half) {
    multiply_async<typename C::T, C::BLOCK_N, TRANSPOSED>(
        acc[half], advance(left, first + half * 64 * kRowBytes + product * kBytesK),
        advance(right, first + product * (TRANSPOSED ? kProductK * kRowBytes : kBytesK)));
  }
}

// A segment's steps, with the products of one under way while the next one's begin. The last step
// may hold fewer columns, as that of an adapter does: then no more products than it needs.
template <typename C, bool TRANSPOSED>
__device__ void add_segment(Accumulators<C>& acc, const Shared<C>& shared, Ring<C>& ring,
                            int consumer, int K) {
  auto start = [&] {
    wait_barrier(shared.full(ring.stage), ring.parity);
    products_begin();
#pragma unroll
    for (int product = 0; product < kBlockK / kProductK; ++product) {
      multiply_stage<C, TRANSPOSED>(acc, shared, consumer, ring.stage, product);
    }
    products_commit();
  };
  auto settle = [&] {
    products_wait<0>();
#pragma unroll
    for (int half = 0; half < C::kHalves; ++half) products_settle(acc[half]);
  };
  int steps = K / kBlockK;
  if (steps > 0) {
    start();
    while (--steps > 0) {
      const int last = ring.stage;
      ring.advance();
      start();
      products_wait<1>();
      release<C>(shared, last);
    }
    settle();
    release<C>(shared, ring.stage);
    ring.advance();
  }
  if (K % kBlockK > 0) {
    wait_barrier(shared.full(ring.stage), ring.parity);
#pragma unroll 1
    for (int product = 0; product * kProductK < K % kBlockK; ++product) {
      products_begin();
      multiply_stage<C, TRANSPOSED>(acc, shared, consumer, ring.stage, product);
      products_commit();
    }
    settle();
    release<C>(shared, ring.stage);
    ring.advance();
  }
}

// acc ⊙ D of 64 rows from row m0 on.
template <typename C>
__device__ void apply_mask(float (&acc)[C::BLOCK_N / 2], const Sum<typename C::T>& p, int m0,
                           int n0) {
  const int64_t row_bytes = divide_up(p.N, 8);
  const int thread = thread_id() % 128, q = thread % 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t m = m0 + thread / 32 * 16 + i * 8 + thread % 32 / 4;
    const uint8_t* row = p.bits + m * row_bytes;
#pragma unroll
    for (int j = 0; j < C::BLOCK_N / 8; ++j) {
      const int64_t byte = n0 / 8 + j;
      const uint32_t keep = m < p.M && byte < row_bytes ? row[byte] : 0;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& value = acc[4 * j + 2 * i + e];
        value = keep >> (2 * q + e) & 1 ? value * p.keep_scale : 0.0f;
      }
    }
  }
}

// acc + base of 64 rows from row m0 on.
template <typename C>
__device__ void add_base(float (&acc)[C::BLOCK_N / 2], const Sum<typename C::T>& p, int m0,
                         int n0) {
  const int thread = thread_id() % 128, q = thread % 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t m = m0 + thread / 32 * 16 + i * 8 + thread % 32 / 4;
    if (m >= p.M) continue;
#pragma unroll
    for (int j = 0; j < C::BLOCK_N / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int64_t n = n0 + 8 * j + 2 * q + e;
        if (n < p.N) acc[4 * j + 2 * i + e] += to_float(*p.base.at(m, n));
      }
    }
  }
}

// The sums at columns n and n + 1 with bias, rounded.
template <typename T>
__device__ uint32_t rounded(const float* sums, const Sum<T>& p, int64_t n) {
  alignas(4) T pair[2];
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    float value = sums[e];
    if (p.bias != nullptr && n + e < p.N) value += to_float(p.bias[n + e]);
    pair[e] = from_float<T>(value);
  }
  return *reinterpret_cast<const uint32_t*>(pair);
}

// 64 rows from row m0 on, 64 columns at a time through the two outputs in turn.
template <typename C>
__device__ void store_rows(const float (&acc)[C::BLOCK_N / 2], const Params<typename C::T>& p,
                           const Shared<C>& shared, int consumer, int& turn, int m0, int n0) {
  using T = typename C::T;
  const int thread = thread_id() % 128, lane = thread % 32;
  // Of the matrices that a store takes, two are above each other, and the others right of them.
  const int row = thread / 32 * 16 + lane % 16;
#pragma unroll
  for (int box = 0; box < C::BLOCK_N / kBoxCols; ++box) {
    unsigned char* output = shared.output(consumer, turn);
    turn ^= 1;
    if (thread == 0) store_wait_read<C::kOutputs - 1>();
    sync_warpgroup(1 + consumer);
    const int n = n0 + box * kBoxCols;
#pragma unroll
    for (int j = 0; j < kBoxCols / 8; j += 2) {
      uint32_t packed[4];
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        const int64_t col = n + (j + part / 2) * 8 + lane % 4 * 2;
        packed[part] = rounded<T>(acc + (box * 8 + j) * 4 + part * 2, p, col);
      }
      const int chunk = j + lane / 16;
      store_matrices(output + row * kRowBytes + (chunk ^ row % 8) * 16, packed);
    }
    if (p.y_by_tma) {
      publish_to_async_proxy();
      sync_warpgroup(1 + consumer);
      if (thread == 0) {
        store_box(p.y_map, m0, n, output);
        store_commit();
      }
    } else {
      sync_warpgroup(1 + consumer);
#pragma unroll 1
      for (int i = thread; i < 64 * kBoxCols; i += 128) {
        const int r = i / kBoxCols, c = i % kBoxCols;
        if (m0 + r >= p.M || n + c >= p.N) continue;
        const unsigned char* from = output + r * kRowBytes + (c / 8 ^ r % 8) * 16 + c % 8 * 2;
        p.y[(m0 + r) * p.N + n + c] = *reinterpret_cast<const T*>(from);
      }
    }
  }
}

template <typename C>
__device__ void consume(const Params<typename C::T>& p, const Shared<C>& shared) {
  const int consumer = thread_id() / 128 - 1;
  Ring<C> ring;
  int turn = 0;
  for (Tiles<C> tile(p); !tile.done(); tile.advance()) {
    int m0, n0;
    tile.place(&m0, &n0);
    m0 += consumer * C::kHalves * 64;
    Accumulators<C> acc = {};
    for (int i = 0; i < p.count; ++i) {
      if (p.transposed[i]) {
        add_segment<C, true>(acc, shared, ring, consumer, p.K[i]);
      } else {
        add_segment<C, false>(acc, shared, ring, consumer, p.K[i]);
      }
      if (p.bits != nullptr && i + 1 == p.masked) {
#pragma unroll
        for (int half = 0; half < C::kHalves; ++half) {
          apply_mask<C>(acc[half], p, m0 + half * 64, n0);
        }
      }
    }
#pragma unroll
    for (int half = 0; half < C::kHalves; ++half) {
      if (p.base.data != nullptr) add_base<C>(acc[half], p, m0 + half * 64, n0);
      store_rows<C>(acc[half], p, shared, consumer, turn, m0 + half * 64, n0);
    }
  }
  if (thread_id() % 128 == 0) store_wait_read<0>();
}

template <typename C>
__global__ void __launch_bounds__(kThreads, 1)
    segment_gemm_sm90_kernel(const __grid_constant__ Params<typename C::T> p) {
#if FUSED_LORA_HAS_HOPPER
  const Shared<C> shared;
  if (thread_id() == 0) {
    for (int stage = 0; stage < C::kStages; ++stage) {
      make_barrier(shared.full(stage), 1);
      make_barrier(shared.empty(stage), kCluster * kConsumers * 4);
    }
    publish_barriers();
  }
  sync_cluster();
  if (thread_id() < 128) {
    give_registers<kProducerRegisters>();
    if (thread_id() == 0) produce<C>(p, shared);
  } else {
    take_registers<kConsumerRegisters>();
    consume<C>(p, shared);
  }
  sync_cluster();  // until then the other block may write here and arrive here
#endif
}

template <typename C>
cudaError_t start(const Problem<typename C::T>& problem, cudaStream_t stream) {
  using T = typename C::T;
  if (problem.M == 0 || problem.N == 0) return cudaSuccess;
  Params<T> p = {};
  static_cast<Sum<T>&>(p) = problem;
  cudaError_t status = cudaSuccess;
  for (int i = 0; i < problem.count && status == cudaSuccess; ++i) {
    const Operands& from = problem.segments[i];
    p.K[i] = int(from.left.cols);
    p.transposed[i] = from.transposed;
    status = make_map<T>(&p.left[i], from.left, C::kLeftBox);
    if (status != cudaSuccess) break;
    status =
        make_map<T>(&p.right[i], from.right, from.transposed ? C::kTransposedBox : C::kRightBox);
  }
  if (status != cudaSuccess) return status;
  const Rows y{problem.y, problem.M, problem.N, problem.N};
  p.y_by_tma = y.fits();
  if (p.y_by_tma) status = make_map<T>(&p.y_map, y, 64);
  int count = 0;
  if (status == cudaSuccess) status = multiprocessors(&count);
  if (status != cudaSuccess) return status;
  const int64_t tiles = divide_up(problem.M, C::kClusterM) * divide_up(problem.N, C::kClusterN);
  const int64_t clusters = tiles < count / kCluster ? tiles : count / kCluster;
  return launch_clusters(segment_gemm_sm90_kernel<C>, int(clusters) * kCluster, kThreads, kCluster,
                         C::kShared, problem.waits_from < problem.count, p, stream);
}

}  // namespace fused_lora::segment_gemm_sm90
