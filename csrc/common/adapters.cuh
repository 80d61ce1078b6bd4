// The adapters of a batch: one for all rows, or a slot for each.
#pragma once

#include "common/device.cuh"

namespace fused_lora {

// One adapter has no table: it is slot 0, with `one_rank`, `one_scale` and a gate or none.
struct Adapters {
  const int32_t* table;    // [G], the slot of each id
  const int32_t* rank;     // [P]
  const float* scale;      // [P]
  const float* gate;       // [P, R], or for one [R] or null
  const int32_t* ids;      // [M], -1 for none
  const int32_t* order;    // [M], the rows sorted by id
  const int32_t* offsets;  // [G + 1]: rows of id j are order[offsets[j] .. offsets[j + 1]]
  int G;
  int R;
  int one_rank;
  float one_scale;

  // The bindings ask it too.
  __host__ __device__ bool many() const { return table != nullptr; }
  __device__ int rank_of(int64_t slot) const { return many() ? rank[slot] : one_rank; }
  __device__ float scale_of(int64_t slot) const { return many() ? scale[slot] : one_scale; }
  __device__ float gate_of(int64_t slot, int r) const {
    return gate == nullptr ? 1.0f : gate[slot * R + r];
  }
  // The slot of a row, or -1.
  __device__ int slot_of(int64_t row) const {
    if (!many()) return 0;
    const int id = ids[row];
    return id < 0 ? -1 : table[id];
  }
};

// Rows of one adapter: places first .. last in `order`, or for one adapter rows.
struct RowTile {
  int id;  // -1: there is no such tile
  int64_t first, last;
};

// Tile `index` of those that the adapters' rows make, `block` rows each, adapter by adapter; by a
// whole warp.
__device__ inline RowTile find_tile(const Adapters& adapters, int64_t M, int64_t index,
                                    int64_t block) {
  if (!adapters.many()) return {0, index * block, M};
  const int lane = thread_id() % 32;
  int64_t before = 0;
  for (int base = 0; base < adapters.G; base += 32) {
    const int id = base + lane;
    const int32_t begin = id < adapters.G ? adapters.offsets[id] : 0;
    const int32_t end = id < adapters.G ? adapters.offsets[id + 1] : 0;
    const int64_t tiles = divide_up(end - begin, block);
    int64_t after = tiles;
    for (int delta = 1; delta < 32; delta *= 2) {
      const int64_t other = shuffle_up(after, delta);
      if (lane >= delta) after += other;
    }
    const uint32_t past = ballot(before + after > index);
    if (past != 0) {
      int here = 0;
      while (!(past >> here & 1)) ++here;
      const int64_t first = begin + (index - before - (after - tiles)) * block;
      return {base + here, shuffle(first, here), shuffle(int64_t(end), here)};
    }
    before += shuffle(after, 31);
  }
  return {-1, 0, 0};
}

// The rows of a tile, wherever they stand in the batch; -1 past its last.
struct TileRows {
  const int32_t* order;  // null: places are rows
  int64_t first, last;
  __device__ int64_t operator()(int row) const {
    const int64_t place = first + row;
    return place >= last ? -1 : order == nullptr ? place : order[place];
  }
};

__device__ inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace fused_lora
