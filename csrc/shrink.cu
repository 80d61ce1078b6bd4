#include "shrink.cuh"

#include "common/tensor.h"

namespace fused_lora::shrink {
namespace {

void shrink_cuda(Tensor x, Tensor a, MaybeTensor gate, Tensors many, MaybeTensor seed, double scale,
                 double keep_scale, int64_t threshold, int64_t first_call, int64_t row_calls,
                 int64_t tiles, int64_t span, MaybeTensor h, MaybeTensor t, MaybeTensor planes) {
  const Call call{"shrink", x.get_device_index()};
  for_dtype(x.scalar_type(), call.op, [&](auto zero) {
    using T = decltype(zero);
    const int64_t M = x.size(0), K = x.size(1), R = a.size(a.dim() - 2);
    check(span > 0 && span % kBlockK<T> == 0, call.op, ": span must be a multiple of the K step");
    check(many.empty() ? tiles == divide_up(M, kBlockM) : a.dim() == 3, call.op,
          ": a and tiles are of another form than the adapters");
    Params<T> p = {};
    p.x = call.matrix<T>("x", x, M, K);
    p.a = call.matrix<T>("a", a, R, K);
    p.a_transposed = p.a.col_stride != 1 && p.a.row_stride == 1;
    if (p.a_transposed) {
      const Matrix<T> own = p.a;
      p.a = {own.data, own.cols, own.rows, own.col_stride, own.row_stride, false};
      p.a.chunked = call.chunked(own.data, own.col_stride, own.row_stride) && a.dim() == 2;
    }
    p.slot_stride = a.dim() == 3 ? a.stride(0) : 0;
    p.adapters = call.adapters(many, gate, M, R, scale);
    p.dropout = call.dropout(seed, threshold, keep_scale, first_call, row_calls);
    p.h = call.data<T>("h", h, {M, R});
    p.t = call.data<T>("t", t, {M, R});
    p.planes = call.data<float>("planes", planes, {divide_up(K, span), M, R});
    check(p.planes != nullptr || span >= K, call.op, ": a split K needs planes");
    p.tiles = tiles;
    p.span = span;
    const OnDevice on(call.device);
    check_cuda(start(p, on.stream), call.op);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_lora, FUSED_LORA_DEVICE, m) {
  m.impl("shrink_cuda", TORCH_BOX(&shrink_cuda));
}

}  // namespace fused_lora::shrink
