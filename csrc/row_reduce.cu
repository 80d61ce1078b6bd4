#include "row_reduce.cuh"

#include "common/tensor.h"

namespace fused_lora::row_reduce {
namespace {

void row_reduce_cuda(Tensor z, Tensor v, MaybeTensor w, Tensors many, MaybeTensor seed,
                     int64_t threshold, int64_t first_call, int64_t row_calls, MaybeTensor bits,
                     int64_t rows, Tensor planes, MaybeTensor u) {
  const Call call{"row_reduce", z.get_device_index()};
  for_dtype(z.scalar_type(), call.op, [&](auto zero) {
    using T = decltype(zero);
    const int64_t M = z.size(0), C = z.size(1), R = v.size(1);
    check(rows > 0 && w.has_value() == u.has_value(), call.op, ": rows, w or u is wrong");
    Params<T> p = {};
    p.z = call.matrix<T>("z", z, M, C);
    p.v = call.matrix<T>("v", v, M, R);
    if (w.has_value()) p.w = call.matrix<T>("w", *w, C, R);
    p.adapters = call.adapters(many, std::nullopt, M, R, 1.0);
    p.dropout = call.dropout(seed, threshold, 1.0, first_call, row_calls);
    p.bits = call.data<uint8_t>("bits", bits, {M, divide_up(C, 8)});
    p.p = call.data<float>("planes", planes, {-1, R, C});
    p.u = call.data<float>("u", u, {divide_up(C, kBlockC), M, R});
    p.tiles = planes.size(0);
    p.rows = rows;
    check(!many.empty() || p.tiles == divide_up(M, rows), call.op, ": planes are of other rows");
    const OnDevice on(call.device);
    check_cuda(start(p, on.stream), call.op);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_lora, FUSED_LORA_DEVICE, m) {
  m.impl("row_reduce_cuda", TORCH_BOX(&row_reduce_cuda));
}

}  // namespace fused_lora::row_reduce
