// The Hopper kernel alone, on the emulated machine and without torch: sums of small integers, which
// have one exact value, on grids of several sizes. Every element of y is written, and written once.
// Prints what is wrong and returns 1, or returns 0.

#include <cstdio>

#include "segment_gemm_sm90.cuh"

using namespace fused_lora;
using namespace fused_lora::segment_gemm_sm90;
using T = __nv_bfloat16;

namespace {

std::mt19937 generator{0};

struct Values {
  int64_t rows, cols;
  std::vector<T> data;
  Values(int64_t rows, int64_t cols) : rows(rows), cols(cols), data(rows * cols) {
    for (T& value : data) value = from_float<T>(float(int(generator() % 3) - 1));
  }
  double at(int64_t row, int64_t col) const { return to_float(data[row * cols + col]); }
  Rows map() const { return {data.data(), rows, cols, cols}; }
};

enum class Form { forward, dx, masked_dx };

// y = base + left0 right0^T + left1 right1^T, with the mask after the first where there is one.
template <typename C>
void check(Form form, int M, int N, int K, int R, int multiprocessors = 4) {
  const bool masked = form == Form::masked_dx, transposed = form != Form::forward;
  const int widths[] = {masked ? R : K, masked ? K : R};
  std::vector<Values> left, right;
  Problem<T> p = {};
  for (const int width : widths) {
    left.emplace_back(M, width);
    transposed ? right.emplace_back(width, N) : right.emplace_back(N, width);
  }
  for (int i = 0; i < 2; ++i) p.segments[i] = {left[i].map(), right[i].map(), transposed};
  const int64_t row_bytes = divide_up(N, 8);
  std::vector<uint8_t> bits(M * row_bytes);
  for (uint8_t& byte : bits) byte = uint8_t(generator());
  const Values base(M, N);
  std::vector<T> y(M * N, from_float<T>(-1000.0f));
  p.count = 2;
  p.masked = 1;
  p.bits = masked ? bits.data() : nullptr;
  p.keep_scale = 2.0f;
  p.base = {base.data.data(), M, N, N, 1, true};
  p.y = y.data();
  p.M = M;
  p.N = N;
  // The kernel ahead is still writing the adapter's operand.
  p.waits_from = masked ? p.count : 1;
  const char* late = reinterpret_cast<const char*>(left[1].data.data());
  emulator_late(late, masked ? late : late + left[1].data.size() * sizeof(T));
  emulator::cluster.multiprocessors = multiprocessors;
  emulator::cluster.stored = 0;
  if (start<C>(p, nullptr) != cudaSuccess) throw std::runtime_error("the launch was refused");
  if (emulator::cluster.stored != uint64_t(M) * N) {
    throw std::runtime_error(std::to_string(emulator::cluster.stored) + " elements were stored");
  }
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t n = 0; n < N; ++n) {
      double sum = 0;
      for (int i = 0; i < 2; ++i) {
        for (int64_t k = 0; k < widths[i]; ++k) {
          sum += left[i].at(m, k) * (transposed ? right[i].at(k, n) : right[i].at(n, k));
        }
        if (masked && i == 0) sum *= bits[m * row_bytes + n / 8] >> n % 8 & 1 ? 2.0 : 0.0;
      }
      sum += base.at(m, n);
      // Written so that NaN fails.
      if (!(to_float(y[m * N + n]) == sum)) {
        throw std::runtime_error("y[" + std::to_string(m) + ", " + std::to_string(n) + "] is " +
                                 std::to_string(to_float(y[m * N + n])) + " and not " +
                                 std::to_string(sum));
      }
    }
  }
}

}  // namespace

int main() {
  using Wide = Config<T, 128, 256>;
  using High = Config<T, 256, 128>;
  try {
    for (int round = 0; round < 3; ++round) {
      check<Wide>(Form::forward, 40, 520, 448, 24);
      check<Wide>(Form::dx, 140, 520, 448, 24);
    }
    check<High>(Form::forward, 300, 264, 136, 24);
    check<Wide>(Form::masked_dx, 140, 72, 64, 8);
    // Nine rows of tiles, of which eight are a group, in three columns.
    for (const int multiprocessors : {2, 7, 132}) {
      check<Wide>(Form::forward, 2060, 520, 8, 8, multiprocessors);
    }
  } catch (const std::exception& error) {
    std::puts(error.what());
    return 1;
  }
  return 0;
}
