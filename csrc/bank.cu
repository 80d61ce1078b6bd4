#include "bank.cuh"

#include "common/tensor.h"

namespace fused_lora::bank {
namespace {

void write_slot_cuda(Tensor a_slots, Tensor bt_slots, Tensor rank, Tensor scale, Tensor gate,
                     int64_t slot, Tensor lora_a, Tensor lora_b, MaybeTensor new_gate,
                     double scale_value) {
  const Call call{"write_slot", a_slots.get_device_index()};
  for_dtype(a_slots.scalar_type(), call.op, [&](auto zero) {
    using T = decltype(zero);
    const int64_t P = a_slots.size(0), R = a_slots.size(1), K = a_slots.size(2);
    const int64_t N = bt_slots.size(2), r = lora_a.size(0);
    check(slot >= 0 && slot < P && r <= R, call.op, ": slot or rank is outside of the bank");
    Params<T> p = {};
    p.a = call.data<T>("a_slots", a_slots, {P, R, K}) + slot * R * K;
    p.bt = call.data<T>("bt_slots", bt_slots, {P, R, N}) + slot * R * N;
    p.gate = call.data<float>("gate", gate, {P, R}) + slot * R;
    p.scale = call.data<float>("scale", scale, {P}) + slot;
    p.rank = call.data<int32_t>("rank", rank, {P}) + slot;
    call.expect<T>("lora_a", lora_a, {r, K});
    call.expect<T>("lora_b", lora_b, {N, r});
    p.lora_a = static_cast<const T*>(lora_a.const_data_ptr());
    p.lora_b = static_cast<const T*>(lora_b.const_data_ptr());
    p.a_row_stride = lora_a.stride(0);
    p.a_col_stride = lora_a.stride(1);
    p.b_row_stride = lora_b.stride(0);
    p.b_col_stride = lora_b.stride(1);
    p.new_gate = call.data<float>("new_gate", new_gate, {r});
    p.scale_value = float(scale_value);
    p.rank_value = int(r);
    p.R = R;
    p.K = K;
    p.N = N;
    const OnDevice on(call.device);
    check_cuda(start(p, on.stream), call.op);
  });
}

void flip_cuda(Tensor table, int64_t id, int64_t slot) {
  const Call call{"flip", table.get_device_index()};
  FlipParams p = {call.data<int32_t>("table", table, {-1}), int32_t(slot)};
  check(id >= 0 && id < table.size(0), call.op, ": id is outside of the table");
  p.entry += id;
  const OnDevice on(call.device);
  check_cuda(start(p, on.stream), call.op);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_lora, FUSED_LORA_DEVICE, m) {
  m.impl("write_slot_cuda_", TORCH_BOX(&write_slot_cuda));
  m.impl("flip_cuda_", TORCH_BOX(&flip_cuda));
}

}  // namespace fused_lora::bank
