// The dropout mask: Philox4x32-7, key = seed, counter = m * ceil(K / 8) + k // 8 (Salmon et al.,
// SC 2011). One call serves the 8 elements (m, 8c .. 8c + 7), 16 bits each. Columns of a wider input
// take its mask: there K is the whole's, and k counts from its first column.
#pragma once

#include "common/device.cuh"

namespace fused_lora {

struct Dropout {
  const int64_t* seed;  // null: nothing is dropped
  uint32_t threshold;   // an element is kept iff its 16 bits reach this
  float keep_scale;     // 1 / (1 - p)
  int64_t first_call;   // of a row of the input, within a row of the whole
  int64_t row_calls;    // of a row of the whole

  __host__ __device__ uint64_t counter(int64_t m, int64_t call) const {
    return uint64_t(m * row_calls + first_call + call);
  }
};

// Bit l: element 8c + l is kept.
__host__ __device__ inline uint32_t keep_bits(uint64_t seed, uint64_t counter, uint32_t threshold) {
  uint32_t word[4] = {uint32_t(counter), uint32_t(counter >> 32), 0, 0};
  uint32_t key[2] = {uint32_t(seed), uint32_t(seed >> 32)};
  for (int round = 0; round < 7; ++round) {
    const uint64_t a = uint64_t(0xD2511F53u) * word[0], b = uint64_t(0xCD9E8D57u) * word[2];
    const uint32_t next[4] = {uint32_t(b >> 32) ^ word[1] ^ key[0], uint32_t(b),
                              uint32_t(a >> 32) ^ word[3] ^ key[1], uint32_t(a)};
    for (int i = 0; i < 4; ++i) word[i] = next[i];
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  uint32_t bits = 0;
  for (int i = 0; i < 4; ++i) {
    bits |= uint32_t((word[i] & 0xffff) >= threshold) << (2 * i);
    bits |= uint32_t((word[i] >> 16) >= threshold) << (2 * i + 1);
  }
  return bits;
}

}  // namespace fused_lora
