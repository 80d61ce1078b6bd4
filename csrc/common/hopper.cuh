// What the kernels for compute capability 9.0 ask of the machine beyond device.cuh: mbarriers,
// copies of boxes by TMA, products of warpgroups (wgmma), clusters of blocks, and grids that
// overlap.
//
// A tile in shared memory is what TMA makes of a box with the 128-byte swizzle: rows of 128 bytes,
// 64 elements, of which eight follow each other in 1024 aligned bytes; the 16-byte chunk c of row r
// lies at c ^ r % 8.
#pragma once

#include <cuda.h>

#include "common/device.cuh"

// Where the kernels' bodies are compiled: sm_90a, and not the code for other GPUs.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(FUSED_LORA_EMULATE)
#define FUSED_LORA_HAS_HOPPER 1
#else
#define FUSED_LORA_HAS_HOPPER 0
#endif

namespace fused_lora {

constexpr int kBoxCols = 64;  // elements of a row of a tile
constexpr int kRowBytes = 128;
constexpr int kHopperShared = 227 * 1024;  // bytes of shared memory that a block may have
// Of a matrix: then a tile that begins past its end still has 32-bit coordinates.
constexpr int64_t kMaxSize = (int64_t(1) << 31) - 1024;

// 16-bit rows in global memory, for TMA: [rows, cols], row_stride elements apart.
struct Rows {
  const void* data;
  int64_t rows, cols, row_stride;

  // Whether TMA can address it: aligned rows that do not overlap, and 32-bit coordinates.
  bool fits() const {
    constexpr int64_t kChunk16 = 8;
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && rows <= kMaxSize && cols <= kMaxSize &&
           (rows <= 1 ||
            (row_stride % kChunk16 == 0 && row_stride >= cols && row_stride < int64_t(1) << 39));
  }
  int64_t stride_bytes() const { return rows > 1 ? 2 * row_stride : divide_up(2 * cols, 16) * 16; }
};

// The descriptor of an operand of wgmma at a shared address. Of rows along K, eight rows are
// `stride` bytes after the last eight, and `leading` says nothing. Of rows along M or N, eight are
// `stride` bytes after the last eight along K, and the next 64 columns are `leading` bytes on.
__host__ __device__ constexpr uint64_t matrix_descriptor(uint32_t address, int leading,
                                                         int stride) {
  constexpr uint64_t kSwizzle128 = uint64_t(1) << 62;
  return uint64_t(address >> 4 & 0x3fff) | uint64_t(leading >> 4) << 16 |
         uint64_t(stride >> 4) << 32 | kSwizzle128;
}

// That of what lies `bytes` further on.
__host__ __device__ constexpr uint64_t advance(uint64_t descriptor, int bytes) {
  return descriptor + (bytes >> 4);
}

}  // namespace fused_lora

#ifdef FUSED_LORA_EMULATE
#include "hopper.h"
#else

namespace fused_lora {

using TensorMap = CUtensorMap;
using Barrier = uint64_t;

// The map of boxes [box_rows, kBoxCols]. What is outside the matrix is zero when it is read, and is
// not written. The driver's function is looked up at run time: nothing links against libcuda.
template <typename T>
cudaError_t make_map(TensorMap* map, const Rows& from, int box_rows) {
  static_assert(sizeof(T) == 2, "");
  static void* const encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault,
                                     &result);
#else
    cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    return found;
  }();
  if (encode == nullptr) return cudaErrorCallRequiresNewerDriver;
  const cuuint64_t sizes[] = {cuuint64_t(from.cols), cuuint64_t(from.rows)};
  const cuuint64_t strides[] = {cuuint64_t(from.stride_bytes())};
  const cuuint32_t box[] = {kBoxCols, cuuint32_t(box_rows)}, steps[] = {1, 1};
  const CUresult status = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(encode)(
      map,
      std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      2, const_cast<void*>(from.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return status == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

inline cudaError_t multiprocessors(int* count) {
  int device = 0;
  const cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  return cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
}

// Of the current device: whether it is of compute capability 9.0.
inline cudaError_t is_hopper(bool* is) {
  int device = 0, major = 0, minor = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) {
    status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  }
  if (status == cudaSuccess) {
    status = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  }
  *is = major == 9 && minor == 0;
  return status;
}

// kernel<<<blocks, threads>>>(params) in clusters of `cluster` blocks; where it overlaps, it starts
// before the kernel ahead of it in the stream has ended.
template <typename Params>
cudaError_t launch_clusters(void (*kernel)(Params), int blocks, int threads, int cluster,
                            int shared_bytes, bool overlaps, const Params& params,
                            cudaStream_t stream) {
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (status != cudaSuccess) return status;
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = unsigned(cluster);
  attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = size_t(shared_bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = overlaps ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, params);
}

// Until the grid ahead of this one has ended and what it wrote is seen here.
__device__ inline void wait_for_grid_ahead() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

__device__ inline int cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return int(rank);
}

// All threads of all blocks of the cluster.
__device__ inline void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// The 128 threads of a warpgroup, which are `id` > 0 of the block.
__device__ inline void sync_warpgroup(int id) {
  asm volatile("bar.sync %0, 128;" ::"r"(id) : "memory");
}

// The registers of every thread of a warpgroup from here on.
template <int COUNT>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// mbarriers: a phase ends when all arrivals have come and as many bytes as were announced.
__device__ inline void make_barrier(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

// After make_barrier and before sync_cluster, for the other blocks and for TMA.
__device__ inline void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Until the phase of this parity has ended.
__device__ inline void wait_barrier(Barrier* barrier, int parity) {
  uint32_t ended = 0;
  while (!ended) {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(ended)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  }
}

__device__ inline void arrive_expecting(Barrier* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

// At the barrier that lies in block `rank` of the cluster where `barrier` lies in this one. It
// releases nothing but the block: a wider scope would cost a fence of all memory, and there is
// nothing to publish to the other block where arriving says that products have read what they
// needed.
__device__ inline void arrive_at(Barrier* barrier, int rank) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

__device__ inline void prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// The box at (row, col), asynchronously, into shared memory; its bytes count at the barrier.
__device__ inline void load_box(void* to, const TensorMap& map, int row, int col,
                                Barrier* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(shared_address(to)),
      "l"(&map), "r"(col), "r"(row), "r"(shared_address(barrier))
      : "memory");
}

// The same into both blocks of a cluster, and at the barriers of both.
__device__ inline void load_box_to_both(void* to, const TensorMap& map, int row, int col,
                                        Barrier* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)),
      "l"(&map), "r"(col), "r"(row), "r"(shared_address(barrier)), "h"(uint16_t(3))
      : "memory");
}

// What this thread has written to shared memory is seen by TMA and wgmma from here on.
__device__ inline void publish_to_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ inline void store_box(const TensorMap& map, int row, int col, const void* from) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&map),
      "r"(col), "r"(row), "r"(shared_address(from))
      : "memory");
}

__device__ inline void store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until all but PENDING of this thread's groups of stores have read what they store.
template <int PENDING>
__device__ inline void store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}

// Four 8x8 matrices of 16-bit elements; lane i has the address of row i % 8 of matrix i / 8.
__device__ inline void store_matrices(void* row, const uint32_t (&from)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(shared_address(row)),
      "r"(from[0]), "r"(from[1]), "r"(from[2]), "r"(from[3])
      : "memory");
}

// Before the first product, and wherever another instruction has touched its registers.
__device__ inline void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ inline void products_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Until at most PENDING groups of products are under way.
template <int PENDING>
__device__ inline void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Nothing that the compiler does with c moves from behind products_wait<0> to before it.
template <int SIZE>
__device__ inline void products_settle(float (&c)[SIZE]) {
#pragma unroll
  for (int i = 0; i < SIZE; ++i) asm volatile("" : "+f"(c[i])::"memory");
}

// clang-format off
#define FUSED_LORA_NAMES_64                                                                        \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25," \
  "%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,"   \
  "%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define FUSED_LORA_NAMES_96                                                                        \
  FUSED_LORA_NAMES_64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,"  \
  "%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define FUSED_LORA_NAMES_128                                                                       \
  FUSED_LORA_NAMES_96 ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,"   \
  "%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define FUSED_LORA_C8(i)                                                                           \
  "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]),      \
  "+f"(c[i + 6]), "+f"(c[i + 7])
#define FUSED_LORA_C32(i)                                                                          \
  FUSED_LORA_C8(i), FUSED_LORA_C8(i + 8), FUSED_LORA_C8(i + 16), FUSED_LORA_C8(i + 24)
#define FUSED_LORA_C64 FUSED_LORA_C32(0), FUSED_LORA_C32(32)
#define FUSED_LORA_C96 FUSED_LORA_C64, FUSED_LORA_C32(64)
#define FUSED_LORA_C128 FUSED_LORA_C96, FUSED_LORA_C32(96)
// The operands after the registers have the names A, B and TRANS.
#define FUSED_LORA_WGMMA(N, REGISTERS, A, B, TRANS, DTYPE)                                         \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, 1, 0;\n"                                      \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." DTYPE "." DTYPE                   \
               " {" FUSED_LORA_NAMES_##REGISTERS "}, " A ", " B ", add, 1, 1, 0, " TRANS ";\n}"    \
               : FUSED_LORA_C##REGISTERS                                                           \
               : "l"(left), "l"(right), "n"(int(TRANSPOSED)))
// clang-format on

// c [64, N] += left [64, 16] right [16, N] of a warpgroup, asynchronously. The rows of `left` are
// along K, those of `right` too, or along N where it is TRANSPOSED. Thread 32 w + 4 g + q of the
// warpgroup has the elements (16 w + g + 8 i, 8 j + 2 q + e) in c[4 j + 2 i + e].
template <typename T, int N, bool TRANSPOSED>
__device__ inline void multiply_async(float (&c)[N / 2], uint64_t left, uint64_t right) {
  static_assert(N == 128 || N == 192 || N == 256, "");
  if constexpr (std::is_same_v<T, __half>) {
    if constexpr (N == 128) FUSED_LORA_WGMMA(128, 64, "%64", "%65", "%66", "f16");
    if constexpr (N == 192) FUSED_LORA_WGMMA(192, 96, "%96", "%97", "%98", "f16");
    if constexpr (N == 256) FUSED_LORA_WGMMA(256, 128, "%128", "%129", "%130", "f16");
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>, "");
    if constexpr (N == 128) FUSED_LORA_WGMMA(128, 64, "%64", "%65", "%66", "bf16");
    if constexpr (N == 192) FUSED_LORA_WGMMA(192, 96, "%96", "%97", "%98", "bf16");
    if constexpr (N == 256) FUSED_LORA_WGMMA(256, 128, "%128", "%129", "%130", "bf16");
  }
}

}  // namespace fused_lora

#endif
