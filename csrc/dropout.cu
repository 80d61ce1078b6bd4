#include "dropout.cuh"

#include "common/tensor.h"

namespace fused_lora::dropout {
namespace {

void dropout_bits_cuda(Tensor seed, int64_t threshold, int64_t first_call, int64_t row_calls,
                       Tensor bits) {
  const Call call{"dropout_bits", bits.get_device_index()};
  Params p = {};
  p.dropout = call.dropout(seed, threshold, 1.0, first_call, row_calls);
  p.bits = call.data<uint8_t>("bits", bits, {-1, -1});
  p.bytes = bits.numel();
  p.calls = bits.size(1);
  const OnDevice on(call.device);
  check_cuda(start(p, on.stream), call.op);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_lora, FUSED_LORA_DEVICE, m) {
  m.impl("dropout_bits_cuda", TORCH_BOX(&dropout_bits_cuda));
}

}  // namespace fused_lora::dropout
