#include "segment_gemm.cuh"

#include "common/tensor.h"

namespace fused_lora::segment_gemm {
namespace {

template <typename T>
cudaError_t start_tile(const Params<T>& p, int64_t block_m, const char* op, cudaStream_t stream) {
  if (block_m == 16) return start<Config<T, 16, 64, 1, 4>>(p, stream);
  if (block_m == 64) return start<Config<T, 64, 64, 2, 2>>(p, stream);
  if constexpr (!std::is_same_v<T, float>) {
    if (block_m == 128) return start<Config<T, 128, 128, 2, 4>>(p, stream);
  }
  check(false, op, ": there are no tiles of ", block_m, " rows for this dtype");
  return cudaErrorInvalidValue;
}

// The segment `gathered` has t [M, R] and the slots V [P, R, N]; -1: none.
void segment_gemm_cuda(Tensors lefts, Tensors rights, int64_t gathered, Tensors many,
                       MaybeTensor bias, MaybeTensor base, MaybeTensor bits, int64_t masked,
                       double keep_scale, Tensor y, int64_t block_m) {
  const Call call{"segment_gemm", y.get_device_index()};
  check(lefts.size() == rights.size() && lefts.size() <= kMaxSegments, call.op,
        ": there must be as many lefts as rights, and at most ", kMaxSegments);
  for_dtype(y.scalar_type(), call.op, [&](auto zero) {
    using T = decltype(zero);
    Params<T> p = {};
    p.M = y.size(0);
    p.N = y.size(1);
    p.count = int(lefts.size());
    for (int i = 0; i < p.count; ++i) {
      Segment<T>& own = p.segments[i];
      const int64_t width = lefts[i].size(1);
      own.left = call.matrix<T>("a left operand", lefts[i], p.M, width);
      own.gathered = i == gathered;
      if (own.gathered) {
        own.right = call.matrix<T>("slots", rights[i], width, p.N);
        own.transposed = true;
        p.slot_stride = rights[i].stride(0);
        p.adapters = call.adapters(many, std::nullopt, p.M, width, 1.0);
        check(p.adapters.many(), call.op, ": slots need adapters");
        continue;
      }
      own.right = call.matrix<T>("a right operand", rights[i], p.N, width);
      own.transposed = own.right.col_stride != 1 && own.right.row_stride == 1;
      if (own.transposed) {
        const Matrix<T> r = own.right;
        own.right = {r.data, r.cols, r.rows, r.col_stride, r.row_stride,
                     call.chunked(r.data, r.col_stride, r.row_stride)};
      }
    }
    p.bits = call.data<uint8_t>("bits", bits, {p.M, divide_up(p.N, 8)});
    p.masked = int(masked);
    p.keep_scale = float(keep_scale);
    p.bias = nullptr;
    if (bias.has_value()) p.bias = call.data<T>("bias", *bias, {p.N});
    const Matrix<T> out = call.matrix<T>("y", y, p.M, p.N);
    p.y = const_cast<T*>(out.data);
    p.y_row_stride = out.row_stride;
    p.y_col_stride = out.col_stride;
    p.y_chunked = out.chunked;
    if (base.has_value()) p.base = call.matrix<T>("base", *base, p.M, p.N);
    const OnDevice on(call.device);
    check_cuda(start_tile(p, block_m, call.op, on.stream), call.op);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_lora, FUSED_LORA_DEVICE, m) {
  m.impl("segment_gemm_cuda", TORCH_BOX(&segment_gemm_cuda));
}

}  // namespace fused_lora::segment_gemm
