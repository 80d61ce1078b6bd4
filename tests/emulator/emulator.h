// Runs the kernels of csrc/ on a CPU: the machine of common/device.cuh, thread by thread.
//
// Every thread of a block is a fiber, so that a barrier, or an instruction of a whole warp, waits
// for the others as it would on a GPU. What a GPU leaves open is left open: fibers and blocks go in
// a random order, and an asynchronous copy happens as late as its wait allows. Shared memory is NaN
// at first. A barrier that some threads never reach, a warp whose lanes ask for different things,
// and an address that is not aligned are errors.
#pragma once

#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <new>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

// CUDA's headers define these for nvcc alone.
#define __launch_bounds__(...)
#ifndef __grid_constant__
#define __grid_constant__
#endif

namespace fused_lora {
namespace emulator {

constexpr size_t kStack = 1 << 17;

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  int id = 0;
  bool done = false;
  const uint64_t* awaited = nullptr;  // a generation, and what it was
  uint64_t seen = 0;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
};

struct Free {
  void operator()(unsigned char* memory) const {
    ::operator delete[](memory, std::align_val_t(128));
  }
};

// Where the lanes of a warp, or the threads of a block, meet.
struct Meeting {
  int arrived = 0;
  uint64_t generation = 0;
  const void* what = nullptr;
  void* given[32] = {};
};

struct Machine {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Meeting> warps;
  Meeting barrier;
  Fiber* self = nullptr;
  int threads = 0;
  dim3 grid;
  uint3 block;
  std::unique_ptr<unsigned char[], Free> memory;
  size_t memory_bytes = 0;
  ucontext_t scheduler;
  std::function<void()> kernel;
  std::string error;
  std::mt19937 random{1};
  // What a test may ask: the bytes read of one range of memory, and how many groups of eight rows
  // that an ldmatrix reads at once lay in the same banks.
  const char *first = nullptr, *last = nullptr;
  uint64_t bytes_read = 0, bank_conflicts = 0;
};

inline Machine machine;

inline void to_scheduler() { swapcontext(&machine.self->context, &machine.scheduler); }

inline void fail(const char* reason) {
  if (machine.error.empty()) {
    machine.error = std::string(reason) + " (block " + std::to_string(machine.block.x) + ", " +
                    std::to_string(machine.block.y) + ", " + std::to_string(machine.block.z) +
                    ", thread " + std::to_string(machine.self->id) + ")";
  }
  to_scheduler();
}

inline void wait_for(Meeting& meeting, uint64_t generation) {
  machine.self->awaited = &meeting.generation;
  machine.self->seen = generation;
  to_scheduler();
}

inline void trampoline() {
  machine.kernel();
  machine.self->done = true;
  to_scheduler();
}

// Runs `op` on what all lanes of this thread's warp have given, once they have.
template <typename Given>
void together(Given& given, void (*op)(Given* const*), const void* what) {
  const int lane = machine.self->id % 32;
  Meeting& warp = machine.warps[machine.self->id / 32];
  if (warp.arrived == 0) warp.what = what;
  if (warp.what != what) fail("lanes of a warp ask for different things");
  warp.given[lane] = &given;
  const uint64_t generation = warp.generation;
  if (++warp.arrived < 32) {
    wait_for(warp, generation);
    return;
  }
  op(reinterpret_cast<Given* const*>(warp.given));
  warp.arrived = 0;
  ++warp.generation;
}

inline void aligned(const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) fail("an address is not aligned");
}

inline void reads(const void* address, int bytes) {
  const char* first = static_cast<const char*>(address);
  if (first >= machine.first && first < machine.last) machine.bytes_read += uint64_t(bytes);
}

inline void run_block() {
  Machine& m = machine;
  m.warps.assign(m.threads / 32, Meeting());
  m.barrier = Meeting();
  m.memory.reset(new (std::align_val_t(128)) unsigned char[m.memory_bytes]);
  std::memset(m.memory.get(), 0xff, m.memory_bytes);
  while (int(m.fibers.size()) < m.threads) m.fibers.push_back(std::make_unique<Fiber>());
  for (int i = 0; i < m.threads; ++i) {
    Fiber& fiber = *m.fibers[i];
    fiber.id = i;
    fiber.done = false;
    fiber.awaited = nullptr;
    fiber.open.clear();
    fiber.groups.clear();
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, trampoline, 0);
  }
  for (int left = m.threads; left > 0;) {
    bool moved = false;
    const int first = int(m.random() % m.threads), direction = m.random() % 2 ? 1 : -1;
    for (int i = 0; i < m.threads; ++i) {
      Fiber& fiber = *m.fibers[(first + direction * i + m.threads) % m.threads];
      if (fiber.done || (fiber.awaited != nullptr && *fiber.awaited == fiber.seen)) continue;
      fiber.awaited = nullptr;
      moved = true;
      m.self = &fiber;
      swapcontext(&m.scheduler, &fiber.context);
      if (!m.error.empty()) throw std::runtime_error("emulator: " + m.error);
      left -= fiber.done;
    }
    if (!moved) throw std::runtime_error("emulator: threads wait for some that never come");
  }
}

template <typename T>
struct Exchange {
  T value, all[32];
};

template <typename T>
Exchange<T> exchange(T value) {
  static const char what = 0;
  Exchange<T> mine{value, {}};
  together<Exchange<T>>(
      mine,
      [](Exchange<T>* const* given) {
        for (int to = 0; to < 32; ++to) {
          for (int from = 0; from < 32; ++from) given[to]->all[from] = given[from]->value;
        }
      },
      &what);
  return mine;
}

}  // namespace emulator

inline int thread_id() { return emulator::machine.self->id; }
inline uint3 block_id() { return emulator::machine.block; }
inline dim3 grid_size() { return emulator::machine.grid; }
inline unsigned char* shared_memory() { return emulator::machine.memory.get(); }

inline void sync_block() {
  emulator::Meeting& barrier = emulator::machine.barrier;
  const uint64_t generation = barrier.generation;
  if (++barrier.arrived < emulator::machine.threads) {
    emulator::wait_for(barrier, generation);
    return;
  }
  barrier.arrived = 0;
  ++barrier.generation;
}

inline uint32_t ballot(bool value) {
  const auto found = emulator::exchange<int>(value);
  uint32_t bits = 0;
  for (int i = 0; i < 32; ++i) bits |= uint32_t(found.all[i]) << i;
  return bits;
}

template <typename T>
T shuffle(T value, int lane) {
  return emulator::exchange(value).all[lane];
}

template <typename T>
T shuffle_up(T value, int delta) {
  const int from = thread_id() % 32 - delta;
  const auto found = emulator::exchange(value);
  return from >= 0 ? found.all[from] : value;
}

template <typename T>
T shuffle_xor(T value, int mask) {
  const int from = thread_id() % 32 ^ mask;
  return emulator::exchange(value).all[from];
}

inline void copy_async(void* to, const void* from, int bytes) {
  emulator::aligned(to, 16);
  emulator::aligned(from, 16);
  emulator::reads(from, bytes);
  emulator::machine.self->open.push_back({to, from, bytes});
}

inline void copy_async_commit() {
  auto& self = *emulator::machine.self;
  self.groups.push_back(std::move(self.open));
  self.open.clear();
}

template <int PENDING>
void copy_async_wait() {
  auto& groups = emulator::machine.self->groups;
  for (; int(groups.size()) > PENDING; groups.pop_front()) {
    for (const emulator::Copy& copy : groups.front()) {
      std::memset(copy.to, 0, 16);
      std::memcpy(copy.to, copy.from, copy.bytes);
    }
  }
}

template <bool TRANSPOSED>
void load_matrices(uint32_t (&to)[4], const void* row) {
  struct Given {
    uint32_t* to;
    const uint16_t* row;
  };
  static const char what = 0;
  emulator::aligned(row, 16);
  Given given{to, static_cast<const uint16_t*>(row)};
  emulator::together<Given>(
      given,
      [](Given* const* all) {
        for (int i = 0; i < 4; ++i) {
          unsigned banks = 0;
          for (int row = 0; row < 8; ++row) {
            banks |= 1u << (reinterpret_cast<uintptr_t>(all[8 * i + row]->row) / 16 % 8);
          }
          emulator::machine.bank_conflicts += banks != 0xff;
        }
        for (int lane = 0; lane < 32; ++lane) {
          const int g = lane / 4, q = lane % 4;
          for (int i = 0; i < 4; ++i) {
            uint16_t pair[2];
            for (int e = 0; e < 2; ++e) {
              pair[e] = TRANSPOSED ? all[8 * i + 2 * q + e]->row[g] : all[8 * i + g]->row[2 * q + e];
            }
            std::memcpy(all[lane]->to + i, pair, 4);
          }
        }
      },
      &what);
}

template <typename T>
void multiply_16x8x16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], T) {
  struct Given {
    float* c;
    const uint32_t *a, *b;
  };
  static const char what = 0;
  Given given{c, a, b};
  emulator::together<Given>(
      given,
      [](Given* const* all) {
        float left[16][16], right[16][8];
        auto half = [](uint32_t word, int e) {
          T value;
          const uint16_t bits = uint16_t(word >> (16 * e));
          std::memcpy(static_cast<void*>(&value), &bits, 2);
          return float(value);
        };
        for (int lane = 0; lane < 32; ++lane) {
          const int g = lane / 4, q = lane % 4;
          for (int e = 0; e < 2; ++e) {
            for (int i = 0; i < 4; ++i) {
              left[g + i % 2 * 8][2 * q + e + i / 2 * 8] = half(all[lane]->a[i], e);
            }
            for (int i = 0; i < 2; ++i) right[2 * q + e + i * 8][g] = half(all[lane]->b[i], e);
          }
        }
        for (int lane = 0; lane < 32; ++lane) {
          for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + i / 2 * 8, col = lane % 4 * 2 + i % 2;
            float sum = all[lane]->c[i];
            for (int k = 0; k < 16; ++k) sum += left[row][k] * right[k][col];
            all[lane]->c[i] = sum;
          }
        }
      },
      &what);
}

inline uint4 load_cached(const void* from) {
  emulator::aligned(from, 16);
  emulator::reads(from, 16);
  return *static_cast<const uint4*>(from);
}
inline uint4 load_streamed(const void* from) { return load_cached(from); }

inline bool arrive_last(uint32_t* counter, uint32_t count) {
  static bool last;
  sync_block();
  if (thread_id() == 0) {
    last = *counter == count - 1;
    *counter = last ? 0 : *counter + 1;
  }
  sync_block();
  return last;
}

template <typename Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, int threads, int shared_bytes,
                   const Params& params, cudaStream_t) {
  emulator::Machine& m = emulator::machine;
  m.threads = threads;
  m.grid = grid;
  m.memory_bytes = size_t(shared_bytes);
  m.kernel = [kernel, &params] { kernel(params); };
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  std::vector<uint64_t> order(blocks);
  for (uint64_t i = 0; i < blocks; ++i) order[i] = i;
  for (uint64_t i = blocks; i > 1; --i) std::swap(order[i - 1], order[m.random() % i]);
  for (const uint64_t i : order) {
    m.block = {unsigned(i % grid.x), unsigned(i / grid.x % grid.y),
               unsigned(i / grid.x / grid.y)};
    try {
      emulator::run_block();
    } catch (...) {
      m.error.clear();
      m.fibers.clear();
      throw;
    }
  }
  return cudaSuccess;
}

}  // namespace fused_lora

// For a test, which loads the library: counts from here on, of reads in first .. last.
extern "C" __attribute__((used, visibility("default"))) inline void emulator_watch(
    const char* first, const char* last) {
  auto& machine = fused_lora::emulator::machine;
  machine.first = first;
  machine.last = last;
  machine.bytes_read = machine.bank_conflicts = 0;
}

extern "C" __attribute__((used, visibility("default"))) inline uint64_t emulator_bytes_read() {
  return fused_lora::emulator::machine.bytes_read;
}

extern "C" __attribute__((used, visibility("default"))) inline uint64_t emulator_bank_conflicts() {
  return fused_lora::emulator::machine.bank_conflicts;
}
