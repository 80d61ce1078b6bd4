#include "common/tensor.h"
#include "segment_gemm_sm90.cuh"

namespace fused_lora::segment_gemm_sm90 {
namespace {

template <typename T>
cudaError_t start_tile(const Problem<T>& p, int64_t block_m, int64_t block_n, const char* op,
                       cudaStream_t stream) {
  if (block_m == 128 && block_n == 256) return start<Config<T, 128, 256>>(p, stream);
  if (block_m == 128 && block_n == 192) return start<Config<T, 128, 192>>(p, stream);
  if (block_m == 256 && block_n == 128) return start<Config<T, 256, 128>>(p, stream);
  check(false, op, ": there are no tiles of ", block_m, "x", block_n);
  return cudaErrorInvalidValue;
}

template <typename T>
Rows rows_of(const Matrix<T>& m) {
  return {m.data, m.rows, m.cols, m.row_stride};
}

// Segments from `waits_from` on, and base, read what the kernel ahead writes; nothing else does.
void segment_gemm_sm90_cuda(Tensors lefts, Tensors rights, MaybeTensor bias, MaybeTensor base,
                            MaybeTensor bits, int64_t masked, double keep_scale, Tensor y,
                            int64_t block_m, int64_t block_n, int64_t waits_from) {
  const Call call{"segment_gemm_sm90", y.get_device_index()};
  check(lefts.size() == rights.size() && lefts.size() <= kMaxSegments, call.op,
        ": there must be as many lefts as rights, and at most ", kMaxSegments);
  for_dtype(y.scalar_type(), call.op, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (std::is_same_v<T, float>) {
      check(false, call.op, ": the dtype must be float16 or bfloat16");
    } else {
      Problem<T> p = {};
      check(y.dim() == 2, call.op, ": y must be [M, N]");
      p.M = y.size(0);
      p.N = y.size(1);
      p.y = call.data<T>("y", y, {p.M, p.N});
      check(p.M <= kMaxSize && p.N <= kMaxSize, call.op, ": M and N must be at most ", kMaxSize);
      for (int64_t i = 0; i < int64_t(lefts.size()); ++i) {
        if (i == masked) p.masked = p.count;
        if (i == waits_from) p.waits_from = p.count;
        check(lefts[i].dim() == 2 && rights[i].dim() == 2, call.op,
              ": an operand must be a matrix");
        const int64_t width = lefts[i].size(1);
        const Matrix<T> left = call.matrix<T>("a left operand", lefts[i], p.M, width);
        const Matrix<T> right = call.matrix<T>("a right operand", rights[i], p.N, width);
        if (width == 0) continue;  // a sum over nothing
        const Rows own = rows_of(left), along_k = rows_of(right);
        const Rows along_n{right.data, right.cols, right.rows,
                           right.cols > 1 ? right.col_stride : 0};
        check(left.col_stride == 1 && own.fits(), call.op,
              ": the rows of a left operand must be 16-byte aligned");
        const bool by_rows = right.col_stride == 1 && along_k.fits();
        const bool by_columns = (right.row_stride == 1 || right.rows == 1) && along_n.fits();
        check(by_rows || by_columns, call.op,
              ": the rows or the columns of a right operand must be 16-byte aligned");
        p.segments[p.count++] = {own, by_rows ? along_k : along_n, !by_rows};
      }
      if (masked >= int64_t(lefts.size())) p.masked = p.count;
      if (waits_from >= int64_t(lefts.size())) p.waits_from = p.count;
      p.bits = call.data<uint8_t>("bits", bits, {p.M, divide_up(p.N, 8)});
      p.keep_scale = float(keep_scale);
      if (base.has_value()) p.base = call.matrix<T>("base", *base, p.M, p.N);
      if (bias.has_value()) p.bias = call.data<T>("bias", *bias, {p.N});
      const OnDevice on(call.device);
      bool hopper = false;
      check_cuda(is_hopper(&hopper), call.op);
      check(hopper, call.op, ": this kernel is for compute capability 9.0 alone");
      check_cuda(start_tile(p, block_m, block_n, call.op, on.stream), call.op);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_lora, FUSED_LORA_DEVICE, m) {
  m.impl("segment_gemm_sm90_cuda", TORCH_BOX(&segment_gemm_sm90_cuda));
}

}  // namespace fused_lora::segment_gemm_sm90
