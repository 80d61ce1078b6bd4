#include "planes.cuh"

#include "common/tensor.h"

namespace fused_lora::planes {
namespace {

void sum_rows_cuda(Tensor planes, MaybeTensor gate, Tensors many, double scale, MaybeTensor h,
                   MaybeTensor t) {
  const Call call{"sum_rows", planes.get_device_index()};
  check(h.has_value() || t.has_value(), call.op, ": neither h nor t is wanted");
  for_dtype((h.has_value() ? *h : *t).scalar_type(), call.op, [&](auto zero) {
    using T = decltype(zero);
    const int64_t M = planes.size(1), R = planes.size(2);
    RowsParams<T> p = {};
    p.planes = call.data<float>("planes", planes, {-1, M, R});
    p.S = planes.size(0);
    p.M = M;
    p.adapters = call.adapters(many, gate, M, R, scale);
    p.h = call.data<T>("h", h, {M, R});
    p.t = call.data<T>("t", t, {M, R});
    const OnDevice on(call.device);
    check_cuda(start(p, on.stream), call.op);
  });
}

// out and w are [slots, R, C], of any strides.
void sum_columns_cuda(Tensor planes, int64_t M, int64_t rows, MaybeTensor gate, Tensors many,
                      double scale, double plain_scale, bool scaled, MaybeTensor w, Tensor out,
                      MaybeTensor dot) {
  const Call call{"sum_columns", planes.get_device_index()};
  const int64_t P = out.size(0), R = planes.size(1), C = planes.size(2);
  check(rows > 0 && w.has_value() == dot.has_value(), call.op, ": rows, w or dot is wrong");
  auto run = [&](auto of_w, auto of_out) {
    using T = decltype(of_w);
    using Out = decltype(of_out);
    ColumnsParams<T, Out> p = {};
    p.planes = call.data<float>("planes", planes, {-1, R, C});
    p.M = M;
    p.C = C;
    p.rows = rows;
    p.adapters = call.adapters(many, gate, M, R, scale);
    p.plain_scale = float(plain_scale);
    p.scaled = scaled;
    call.expect<Out>("out", out, {P, R, C});
    p.out = static_cast<Out*>(out.mutable_data_ptr());
    p.out_slot_stride = out.stride(0);
    p.out_r_stride = out.stride(1);
    p.out_c_stride = out.stride(2);
    if (w.has_value()) {
      call.expect<T>("w", *w, {P, R, C});
      p.w = static_cast<const T*>(w->const_data_ptr());
      p.w_slot_stride = w->stride(0);
      p.w_r_stride = w->stride(1);
      p.w_c_stride = w->stride(2);
    }
    p.dot = call.data<float>("dot", dot, {divide_up(C, kThreads), P, R});
    p.slots = P;
    const OnDevice on(call.device);
    check_cuda(start(p, on.stream), call.op);
  };
  // out is in the dtype of the products, or an fp32 master's.
  for_dtype((w.has_value() ? *w : out).scalar_type(), call.op, [&](auto zero) {
    if (out.scalar_type() == ScalarType::Float) {
      run(zero, float{});
    } else {
      run(zero, zero);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_lora, FUSED_LORA_DEVICE, m) {
  m.impl("sum_rows_cuda", TORCH_BOX(&sum_rows_cuda));
  m.impl("sum_columns_cuda", TORCH_BOX(&sum_columns_cuda));
}

}  // namespace fused_lora::planes
