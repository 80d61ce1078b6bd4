// The mask of an [M, K] input on the CPU, a byte an element: Philox4x32-7 as common/philox.cuh has
// it, with many calls side by side.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>

#include "common/check.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define FUSED_LORA_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FUSED_LORA_CLONES
#endif

namespace fused_lora::dropout {
namespace {

constexpr int kSide = 32;  // calls side by side: loops that a compiler makes vectors of
constexpr int kRun = 8 * kSide;
constexpr int64_t kGrain = 64;  // runs that are worth a thread

// kept[8 * j + l] for the calls counter + j, j < kSide.
FUSED_LORA_CLONES void keep(uint64_t seed, uint64_t counter, uint32_t threshold, uint8_t* kept) {
  uint32_t word[4][kSide];
  for (int j = 0; j < kSide; ++j) {
    word[0][j] = uint32_t(counter + j);
    word[1][j] = uint32_t((counter + j) >> 32);
    word[2][j] = word[3][j] = 0;
  }
  uint32_t key[2] = {uint32_t(seed), uint32_t(seed >> 32)};
  for (int round = 0; round < 7; ++round) {
    for (int j = 0; j < kSide; ++j) {
      const uint64_t a = uint64_t(0xD2511F53u) * word[0][j], b = uint64_t(0xCD9E8D57u) * word[2][j];
      word[0][j] = uint32_t(b >> 32) ^ word[1][j] ^ key[0];
      word[1][j] = uint32_t(b);
      word[2][j] = uint32_t(a >> 32) ^ word[3][j] ^ key[1];
      word[3][j] = uint32_t(a);
    }
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  uint32_t lanes[4 * kSide];
  for (int j = 0; j < kSide; ++j) {
    for (int i = 0; i < 4; ++i) lanes[4 * j + i] = word[i][j];
  }
  for (int i = 0; i < 4 * kSide; ++i) {
    kept[2 * i] = (lanes[i] & 0xffff) >= threshold;
    kept[2 * i + 1] = (lanes[i] >> 16) >= threshold;
  }
}

using torch::stable::Tensor;

void dropout_mask_cpu(Tensor seed, int64_t threshold, int64_t first_call, int64_t row_calls,
                      Tensor mask) {
  const auto holds = [](const Tensor& t, torch::headeronly::ScalarType dtype) {
    return t.is_cpu() && t.is_contiguous() && t.scalar_type() == dtype;
  };
  check(holds(seed, torch::headeronly::ScalarType::Long) && seed.numel() == 1,
        "dropout_mask: seed must be int64 of one element on the CPU");
  check(holds(mask, torch::headeronly::ScalarType::Byte) && mask.dim() == 2,
        "dropout_mask: mask must be a contiguous uint8 matrix on the CPU");
  const uint64_t key = uint64_t(*static_cast<const int64_t*>(seed.const_data_ptr()));
  uint8_t* const data = static_cast<uint8_t*>(mask.mutable_data_ptr());
  // Rows of whole calls that follow one another are one row.
  const bool joined = mask.size(1) == 8 * row_calls;
  const int64_t rows = joined ? 1 : mask.size(0), K = mask.numel() / std::max<int64_t>(1, rows);
  const int64_t runs = (K + kRun - 1) / kRun;
  torch::stable::parallel_for(0, rows * runs, kGrain, [&](int64_t first, int64_t last) {
    uint8_t kept[kRun];
    for (int64_t i = first; i < last; ++i) {
      const int64_t m = i / runs, k = i % runs * kRun;
      const int64_t counter = m * row_calls + first_call + k / 8;
      keep(key, uint64_t(counter), uint32_t(threshold), kept);
      std::memcpy(data + m * K + k, kept, size_t(std::min<int64_t>(kRun, K - k)));
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_lora, CPU, m) {
  m.impl("dropout_mask_cpu", TORCH_BOX(&dropout_mask_cpu));
}

}  // namespace fused_lora::dropout
