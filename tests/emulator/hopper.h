// The machine of csrc/common/hopper.cuh on a CPU, for the emulator.
//
// Copies of TMA, products of wgmma and arrivals in another block are under way from the instruction
// that begins them until, at random, they happen: at the latest when nothing else can, and in three
// of four clusters one of these kinds no sooner. Until then the memory that a copy writes, and the
// registers that a product adds to, are NaN. A box arrives in two parts. Products read shared
// memory through their descriptors when they happen, so that a stage which is written too early
// shows.
//
// Errors besides those of emulator.h: stores of what was not published to the asynchronous proxy;
// registers that go into a product without products_begin; barriers that get too many arrivals, or
// that are used before they are published; a block that ends while something is on its way from or
// to it; and what a grid ahead still writes, read or overwritten before it has ended.
#pragma once

#include <algorithm>
#include <array>

#include "emulator.h"

namespace fused_lora {

using Barrier = uint64_t;

struct alignas(64) TensorMap {
  unsigned char* data;
  int64_t rows, cols, stride_bytes;
  int box_rows;
};

namespace emulator {

constexpr int kWarpgroup = 128, kRegisters = 65536;

struct BarrierState {
  int count = 0, pending = 0;
  int64_t bytes = 0;  // announced and not yet there
  uint64_t phase = 0;
  bool published = false;
};

// The accumulator of a warpgroup, as long as products are under way.
struct Registers {
  int N = 0;
  std::array<float*, kWarpgroup> of{};
  std::array<bool, kWarpgroup> away{};  // the thread's part is in `sum`
  std::vector<float> sum;               // [64, N]
  uint64_t last = 0;                    // the product that used it last, counted from 1

  static int row(int thread, int i) { return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8; }
  static int col(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }
};

struct Warpgroup {
  Meeting meeting;
  std::map<float*, Registers> registers;  // by those of the first thread
  std::deque<std::function<void()>> products;
  uint64_t issued = 0, happened = 0;
  std::array<std::deque<uint64_t>, kWarpgroup> groups;  // of each thread: the last product of each
  std::array<uint64_t, kWarpgroup> seen{};
  std::array<bool, kWarpgroup> begun{};
  int limit = 0;  // registers of a thread
};

struct Hopper : Extension {
  std::map<uint32_t, BarrierState> barriers;
  std::vector<int> writer;  // of each 16 bytes: 1 + the thread that has yet to publish them
  std::vector<Warpgroup> warpgroups;
  std::vector<int> arrivals;  // of each thread, in other blocks, on their way
  std::vector<std::deque<std::vector<std::shared_ptr<bool>>>> stores;  // of each thread, by group
  int on_their_way = 0;
  bool waited = false;  // for the grid ahead
  void ends() override;
};

struct Cluster {
  uint32_t base = 1024;   // where shared memory begins: with 128 aligned bytes
  uint64_t happened = 0;  // counts what was under way
  uint64_t limits = 0;    // counts changes of the registers
  uint64_t stored = 0;    // counts elements that TMA has stored
  int multiprocessors = 4;
  const char *late_first = nullptr, *late_last = nullptr;
};

inline Cluster cluster;

inline Hopper& hopper(Block& block) { return static_cast<Hopper&>(*block.extension); }
inline Block& own() { return *machine.self->block; }

// Of what happens by itself, where there is no thread to stop.
inline void report(const std::string& reason) {
  if (machine.error.empty()) machine.error = reason;
}

inline void Hopper::ends() {
  if (on_their_way > 0) report("a block ends while copies are on their way from it or to it");
}

enum Kind { kCopy = 1, kProduct, kArrival };

inline void begin(Kind kind, std::function<void()> it) {
  machine.under_way.push_back({kind, [it = std::move(it)] {
                                 it();
                                 ++cluster.happened;
                               }});
}

inline void wait_until_more_happens() {
  machine.self->awaited = &cluster.happened;
  machine.self->seen = cluster.happened;
  to_scheduler();
}

inline void maybe_others_first() {
  if (machine.random() % 8 == 0) to_scheduler();
}

inline uint32_t address_in(const Block& block, const void* pointer) {
  return cluster.base + uint32_t(static_cast<const unsigned char*>(pointer) - block.memory.get());
}

inline unsigned char* at(const Block& block, uint32_t address) {
  if (address < cluster.base || address - cluster.base >= machine.memory_bytes) {
    report("an address outside of shared memory");
    return block.memory.get();
  }
  return block.memory.get() + (address - cluster.base);
}

inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

inline BarrierState& barrier_at(Block& block, uint32_t address, bool from_elsewhere = false) {
  auto found = hopper(block).barriers.find(address);
  if (found == hopper(block).barriers.end()) {
    report("a barrier that was not made");
    return hopper(block).barriers[address];
  }
  if (from_elsewhere && !found->second.published) report("a barrier that is not published");
  if (from_elsewhere && block.running == 0) report("a barrier of a block that has ended");
  return found->second;
}

inline void maybe_end_phase(BarrierState& barrier) {
  if (barrier.pending < 0) report("a barrier has more arrivals than its phase");
  if (barrier.pending > 0 || barrier.bytes != 0) return;
  barrier.pending = barrier.count;
  ++barrier.phase;
}

inline void arrive(Block& block, uint32_t address, bool from_elsewhere) {
  BarrierState& barrier = barrier_at(block, address, from_elsewhere);
  --barrier.pending;
  maybe_end_phase(barrier);
}

inline bool is_late(const void* data) {
  const char* first = static_cast<const char*>(data);
  return !hopper(own()).waited && first >= cluster.late_first && first < cluster.late_last;
}

// Rows `from` .. `to` of a box, into one block.
inline void deliver(Block& block, uint32_t address, const TensorMap& map, int row, int col,
                    int from, int to, uint32_t barrier) {
  for (int r = from; r < to; ++r) {
    for (int c = 0; c < kBoxCols; ++c) {
      const int64_t m = int64_t(row) + r, n = int64_t(col) + c;
      uint16_t value = 0;
      if (m >= 0 && m < map.rows && n >= 0 && n < map.cols) {
        std::memcpy(&value, map.data + m * map.stride_bytes + 2 * n, 2);
      }
      std::memcpy(at(block, swizzled(address + r * kRowBytes + 2 * c)), &value, 2);
    }
  }
  BarrierState& state = barrier_at(block, barrier, true);
  state.bytes -= (to - from) * kRowBytes;
  maybe_end_phase(state);
  --hopper(block).on_their_way;
}

inline void load(void* to, const TensorMap& map, int row, int col, Barrier* barrier, bool to_both) {
  if (is_late(map.data)) fail("what the grid ahead writes is read before it has ended");
  const uint32_t address = address_in(own(), to), counter = address_in(own(), barrier);
  if (address % 1024 != 0) fail("an address is not aligned");
  for (int r = 0; r < map.box_rows; ++r) {
    const int64_t m = int64_t(row) + r, bytes = 2 * std::min<int64_t>(map.cols - col, kBoxCols);
    if (m < map.rows && bytes > 0) reads(map.data + m * map.stride_bytes + 2 * col, int(bytes));
  }
  for (auto& block : machine.blocks) {
    if (!to_both && block.get() != &own()) continue;
    Block* into = block.get();
    if (into->running == 0) fail("a copy into a block that has ended");
    std::memset(at(*into, address), 0xff, map.box_rows * kRowBytes);
    const int middle = int(machine.random() % (map.box_rows + 1));
    for (const auto& [first, last] : {std::pair(0, middle), std::pair(middle, map.box_rows)}) {
      if (first == last) continue;
      ++hopper(*into).on_their_way;
      begin(kCopy, [=, map = map, first = first, last = last] {
        deliver(*into, address, map, row, col, first, last, counter);
      });
    }
  }
}

// Element (row, k) of an operand whose rows are along K; (n, k) of one whose rows are along N.
template <typename T>
float element(const Block& block, uint64_t descriptor, bool along_k, int row, int k) {
  const uint32_t start = uint32_t(descriptor & 0x3fff) << 4;
  const uint32_t leading = uint32_t(descriptor >> 16 & 0x3fff) << 4;
  const uint32_t stride = uint32_t(descriptor >> 32 & 0x3fff) << 4;
  const uint32_t offset =
      along_k ? row / 8 * stride + row % 8 * kRowBytes + 2 * k
              : row / kBoxCols * leading + k / 8 * stride + k % 8 * kRowBytes + row % kBoxCols * 2;
  T value;
  std::memcpy(static_cast<void*>(&value), at(block, swizzled(start + offset)), 2);
  return float(value);
}

template <typename T>
void multiply_now(const Block& block, Registers& registers, uint64_t left, uint64_t right,
                  bool transposed) {
  const int N = registers.N;
  std::vector<float> a(64 * 16), b(16 * N);
  for (int m = 0; m < 64; ++m) {
    for (int k = 0; k < 16; ++k) a[m * 16 + k] = element<T>(block, left, true, m, k);
  }
  for (int n = 0; n < N; ++n) {
    for (int k = 0; k < 16; ++k) b[k * N + n] = element<T>(block, right, !transposed, n, k);
  }
  for (int m = 0; m < 64; ++m) {
    float* sum = registers.sum.data() + m * N;
    for (int k = 0; k < 16; ++k) {
      const float value = a[m * 16 + k];
      for (int n = 0; n < N; ++n) sum[n] += value * b[k * N + n];
    }
  }
}

inline Warpgroup& own_warpgroup() {
  return hopper(own()).warpgroups[machine.self->id / kWarpgroup];
}

}  // namespace emulator

template <typename T>
cudaError_t make_map(TensorMap* map, const Rows& from, int box_rows) {
  const int64_t stride = from.stride_bytes();
  const bool valid = reinterpret_cast<uintptr_t>(from.data) % 16 == 0 && stride % 16 == 0 &&
                     stride < int64_t(1) << 40 && from.rows > 0 && from.cols > 0 && box_rows > 0 &&
                     box_rows <= 256;
  if (!valid) return cudaErrorInvalidValue;
  *map = {static_cast<unsigned char*>(const_cast<void*>(from.data)), from.rows, from.cols, stride,
          box_rows};
  return cudaSuccess;
}

inline cudaError_t multiprocessors(int* count) {
  *count = emulator::cluster.multiprocessors;
  return cudaSuccess;
}

inline cudaError_t is_hopper(bool* is) {
  *is = true;
  return cudaSuccess;
}

template <typename Params>
cudaError_t launch_clusters(void (*kernel)(Params), int blocks, int threads, int cluster,
                            int shared_bytes, bool overlaps, const Params& params, cudaStream_t) {
  if (shared_bytes > kHopperShared) throw std::runtime_error("emulator: more than sm_90 has");
  auto& machine = emulator::machine;
  machine.extend = [=]() -> std::unique_ptr<emulator::Extension> {
    auto made = std::make_unique<emulator::Hopper>();
    made->writer.resize(shared_bytes / 16);
    made->warpgroups.resize(threads / emulator::kWarpgroup);
    for (auto& group : made->warpgroups) group.limit = emulator::kRegisters / threads / 8 * 8;
    made->arrivals.resize(threads);
    made->stores.resize(threads);
    for (auto& groups : made->stores) groups.emplace_back();
    made->waited = !overlaps;
    return made;
  };
  emulator::cluster.base = 1024 + 128 * (machine.random() % 8);
  return emulator::run_all(dim3(unsigned(blocks)), threads, shared_bytes, cluster,
                           [kernel, &params] { kernel(params); });
}

inline uint32_t shared_address(const void* pointer) {
  return emulator::address_in(emulator::own(), pointer);
}

inline void wait_for_grid_ahead() { emulator::hopper(emulator::own()).waited = true; }
inline int cluster_rank() { return emulator::own().rank; }

inline void sync_cluster() {
  auto& machine = emulator::machine;
  while (emulator::hopper(emulator::own()).arrivals[machine.self->id] > 0) {
    emulator::wait_until_more_happens();
  }
  emulator::meet(machine.cluster, machine.threads * int(machine.blocks.size()));
}

inline void sync_warpgroup(int id) {
  emulator::meet(emulator::own().named[id], emulator::kWarpgroup);
}

template <int COUNT>
void give_registers() {
  int& limit = emulator::own_warpgroup().limit;
  if (COUNT > limit) emulator::fail("more registers are given away than there are");
  limit = COUNT;
  ++emulator::cluster.limits;
}

template <int COUNT>
void take_registers() {
  int& limit = emulator::own_warpgroup().limit;
  for (;;) {
    int others = 0;
    for (auto& group : emulator::hopper(emulator::own()).warpgroups) others += group.limit;
    if ((others - limit + COUNT) * emulator::kWarpgroup <= emulator::kRegisters) break;
    emulator::machine.self->awaited = &emulator::cluster.limits;
    emulator::machine.self->seen = emulator::cluster.limits;
    emulator::to_scheduler();
  }
  limit = COUNT;
}

inline void make_barrier(Barrier* barrier, int arrivals) {
  emulator::aligned(barrier, 8);
  emulator::hopper(emulator::own()).barriers[shared_address(barrier)] = {arrivals, arrivals};
}

inline void publish_barriers() {
  for (auto& [address, barrier] : emulator::hopper(emulator::own()).barriers) {
    barrier.published = true;
  }
}

inline void wait_barrier(Barrier* barrier, int parity) {
  emulator::BarrierState& state = emulator::barrier_at(emulator::own(), shared_address(barrier));
  emulator::maybe_others_first();
  while (int(state.phase & 1) == parity) {
    emulator::machine.self->awaited = &state.phase;
    emulator::machine.self->seen = state.phase;
    emulator::to_scheduler();
  }
}

inline void arrive_expecting(Barrier* barrier, int bytes) {
  const uint32_t address = shared_address(barrier);
  emulator::barrier_at(emulator::own(), address).bytes += bytes;
  emulator::arrive(emulator::own(), address, false);
  emulator::maybe_others_first();
}

inline void arrive_at(Barrier* barrier, int rank) {
  emulator::Block* block = emulator::machine.blocks[rank].get();
  const uint32_t address = shared_address(barrier);
  int* pending = &emulator::hopper(emulator::own()).arrivals[thread_id()];
  ++*pending;
  emulator::begin(emulator::kArrival, [=] {
    emulator::arrive(*block, address, true);
    --*pending;
  });
}

inline void prefetch_map(const TensorMap&) {}

inline void load_box(void* to, const TensorMap& map, int row, int col, Barrier* barrier) {
  emulator::load(to, map, row, col, barrier, false);
}
inline void load_box_to_both(void* to, const TensorMap& map, int row, int col, Barrier* barrier) {
  emulator::load(to, map, row, col, barrier, true);
}

inline void publish_to_async_proxy() {
  for (int& writer : emulator::hopper(emulator::own()).writer) {
    if (writer == 1 + thread_id()) writer = 0;
  }
}

inline void store_box(const TensorMap& map, int row, int col, const void* from) {
  emulator::Block* block = &emulator::own();
  emulator::Hopper& machine = emulator::hopper(*block);
  if (!machine.waited)
    emulator::fail("what the grid ahead reads is overwritten before it has ended");
  const uint32_t address = shared_address(from);
  if (address % 1024 != 0) emulator::fail("an address is not aligned");
  const int first = int(address - emulator::cluster.base) / 16;
  for (int i = 0; i < map.box_rows * kRowBytes / 16; ++i) {
    if (machine.writer[first + i] != 0) emulator::fail("TMA stores what was not published");
  }
  auto done = std::make_shared<bool>(false);
  machine.stores[thread_id()].back().push_back(done);
  ++machine.on_their_way;
  emulator::begin(emulator::kCopy, [=, map = map] {
    for (int r = 0; r < map.box_rows; ++r) {
      for (int c = 0; c < kBoxCols; ++c) {
        const int64_t m = int64_t(row) + r, n = int64_t(col) + c;
        if (m >= map.rows || n >= map.cols) continue;
        std::memcpy(map.data + m * map.stride_bytes + 2 * n,
                    emulator::at(*block, emulator::swizzled(address + r * kRowBytes + 2 * c)), 2);
        ++emulator::cluster.stored;
      }
    }
    *done = true;
    --emulator::hopper(*block).on_their_way;
  });
}

inline void store_commit() { emulator::hopper(emulator::own()).stores[thread_id()].emplace_back(); }

template <int PENDING>
void store_wait_read() {
  auto& groups = emulator::hopper(emulator::own()).stores[thread_id()];
  // The last one is not committed.
  while (int(groups.size()) - 1 > PENDING) {
    for (const auto& done : groups.front()) {
      while (!*done) emulator::wait_until_more_happens();
    }
    groups.pop_front();
  }
}

inline void store_matrices(void* row, const uint32_t (&from)[4]) {
  struct Given {
    unsigned char* row;
    const uint32_t* from;
    int thread;
  };
  static const char what = 0;
  emulator::aligned(row, 16);
  Given given{static_cast<unsigned char*>(row), from, thread_id()};
  emulator::Block& block = emulator::own();
  emulator::together<Given>(
      given,
      [&block](Given* const* all) {
        for (int i = 0; i < 4; ++i) {
          unsigned banks = 0;
          for (int r = 0; r < 8; ++r) {
            const Given& to = *all[8 * i + r];
            banks |= 1u << (emulator::address_in(block, to.row) / 16 % 8);
            for (int q = 0; q < 4; ++q) std::memcpy(to.row + 4 * q, all[4 * r + q]->from + i, 4);
            emulator::hopper(block).writer[(to.row - block.memory.get()) / 16] = 1 + to.thread;
          }
          emulator::machine.bank_conflicts += banks != 0xff;
        }
      },
      &what);
}

inline void products_begin() {
  emulator::own_warpgroup().begun[thread_id() % emulator::kWarpgroup] = true;
}

inline void products_commit() {
  emulator::Warpgroup& group = emulator::own_warpgroup();
  const int thread = thread_id() % emulator::kWarpgroup;
  group.groups[thread].push_back(group.seen[thread]);
}

template <int PENDING>
void products_wait() {
  emulator::Warpgroup& group = emulator::own_warpgroup();
  const int thread = thread_id() % emulator::kWarpgroup;
  auto& groups = group.groups[thread];
  uint64_t last = 0;
  for (; int(groups.size()) > PENDING; groups.pop_front()) last = groups.front();
  while (group.happened < last) emulator::wait_until_more_happens();
  for (auto& [key, registers] : group.registers) {
    if (!registers.away[thread] || registers.last > last) continue;
    for (int i = 0; i < registers.N / 2; ++i) {
      registers.of[thread][i] =
          registers.sum[registers.row(thread, i) * registers.N + registers.col(thread, i)];
    }
    registers.away[thread] = false;
    group.begun[thread] = false;
  }
}

template <int SIZE>
void products_settle(float (&)[SIZE]) {}

template <typename T, int N, bool TRANSPOSED>
void multiply_async(float (&c)[N / 2], uint64_t left, uint64_t right) {
  struct Given {
    float* c;
    uint64_t left, right;
    int thread;
  };
  static const char what = 0;
  emulator::Warpgroup& group = emulator::own_warpgroup();
  emulator::Block& block = emulator::own();
  Given given{c, left, right, thread_id() % emulator::kWarpgroup};
  emulator::meet<Given>(
      group.meeting, emulator::kWarpgroup, given,
      [&group, &block](Given* const* all) {
        const uint64_t left = all[0]->left, right = all[0]->right;
        emulator::Registers& registers = group.registers[all[0]->c];
        registers.N = N;
        registers.sum.resize(64 * N);
        for (int t = 0; t < emulator::kWarpgroup; ++t) {
          if (all[t]->left != left || all[t]->right != right) {
            emulator::fail("threads of a warpgroup multiply different tiles");
          }
          if (registers.away[t]) continue;
          if (!group.begun[t]) emulator::fail("a product without products_begin");
          registers.of[t] = all[t]->c;
          registers.away[t] = true;
          for (int i = 0; i < N / 2; ++i) {
            registers.sum[registers.row(t, i) * N + registers.col(t, i)] = all[t]->c[i];
            all[t]->c[i] = std::numeric_limits<float>::quiet_NaN();
          }
        }
        for (const uint64_t descriptor : {left, right}) {
          if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0) {
            emulator::fail("a descriptor of another layout than the 128-byte swizzle");
          }
        }
        registers.last = ++group.issued;
        group.products.push_back([&registers, &block, left, right] {
          emulator::multiply_now<T>(block, registers, left, right, TRANSPOSED);
        });
        // Products of a warpgroup happen in their order.
        emulator::begin(emulator::kProduct, [&group] {
          group.products.front()();
          group.products.pop_front();
          ++group.happened;
        });
      },
      &what);
  ++group.seen[given.thread];
}

}  // namespace fused_lora

// For a test: what the grid ahead of one that overlaps it is still writing.
extern "C" __attribute__((used, visibility("default"))) inline void emulator_late(
    const char* first, const char* last) {
  fused_lora::emulator::cluster.late_first = first;
  fused_lora::emulator::cluster.late_last = last;
}
