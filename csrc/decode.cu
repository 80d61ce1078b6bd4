#include "decode.cuh"

#include "common/tensor.h"

namespace fused_lora::decode {
namespace {

void decode_shrink_cuda(Tensor x, Tensor a, Tensors many, int64_t span, Tensor planes) {
  const Call call{"decode_shrink", x.get_device_index()};
  for_dtype(x.scalar_type(), call.op, [&](auto zero) {
    using T = decltype(zero);
    const int64_t M = x.size(0), K = x.size(1), R = a.size(a.dim() - 2);
    check(span > 0 && span % 256 == 0, call.op, ": span must be a multiple of 256");
    check(many.empty() || a.dim() == 3, call.op, ": many adapters have a [P, R, K]");
    ShrinkParams<T> p = {};
    p.x = call.matrix<T>("x", x, M, K);
    p.a = call.matrix<T>("a", a, R, K);
    p.slot_stride = a.dim() == 3 ? a.stride(0) : 0;
    p.adapters = call.adapters(many, std::nullopt, M, R, 1.0);
    p.planes = call.data<float>("planes", planes, {divide_up(K, span), M, R});
    p.span = span;
    const OnDevice on(call.device);
    check_cuda(start(p, on.stream), call.op);
  });
}

// v is [R, N], or the slots [P, R, N]; without weight y is a term of the sum.
void decode_cuda(Tensor x, MaybeTensor weight, Tensor v, MaybeTensor gate, Tensors many,
                 double scale, Tensor planes, MaybeTensor bias, Tensor y, int64_t span,
                 MaybeTensor parts, MaybeTensor counters) {
  const Call call{"decode", y.get_device_index()};
  for_dtype(y.scalar_type(), call.op, [&](auto zero) {
    using T = decltype(zero);
    const int64_t M = y.size(0), N = y.size(1), K = x.size(1), R = v.size(v.dim() - 2);
    check(M <= kMaxRows, call.op, ": at most ", kMaxRows, " rows, got ", M);
    Params<T> p = {};
    p.x = call.matrix<T>("x", x, M, K);
    p.splits = 1;
    if (weight.has_value()) {
      check(sizeof(T) == 2, call.op, ": the base product is for float16 and bfloat16");
      check(span > 0 && span % kStep == 0, call.op, ": span must be a multiple of ", kStep);
      p.weight = call.matrix<T>("weight", *weight, N, K);
      p.splits = int(divide_up(K, span) > 1 ? divide_up(K, span) : 1);
      p.span = span;
      p.parts = call.data<float>("parts", parts, {p.splits, M, N});
      if (counters.has_value()) {
        p.counters = reinterpret_cast<uint32_t*>(call.data<int32_t>("counters", *counters, {-1}));
        check(counters->size(0) >= divide_up(N, kBlockN), call.op, ": too few counters");
      }
      check(p.splits == 1 || (p.parts != nullptr && p.counters != nullptr), call.op,
            ": a split K needs parts and counters");
    }
    p.v = call.matrix<T>("v", v, R, N);
    p.slot_stride = v.dim() == 3 ? v.stride(0) : 0;
    p.adapters = call.adapters(many, gate, M, R, scale);
    p.planes = call.data<float>("planes", planes, {-1, M, R});
    p.splits_r = planes.size(0);
    p.bias = nullptr;
    if (bias.has_value()) p.bias = call.data<T>("bias", *bias, {N});
    const Matrix<T> out = call.matrix<T>("y", y, M, N);
    p.y = const_cast<T*>(out.data);
    p.y_row_stride = out.row_stride;
    p.y_col_stride = out.col_stride;
    p.M = M;
    p.N = N;
    const OnDevice on(call.device);
    check_cuda(start(p, on.stream), call.op);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_lora, FUSED_LORA_DEVICE, m) {
  m.impl("decode_shrink_cuda", TORCH_BOX(&decode_shrink_cuda));
  m.impl("decode_cuda", TORCH_BOX(&decode_cuda));
}

}  // namespace fused_lora::decode
