// fused_lora::soft_threshold_cuda_(Tensor(a!)[] gates, float xi, bool official_compat) -> (), which
// ops/soft_threshold.py declares.
#include "soft_threshold.cuh"

#include "common/tensor.h"

namespace fused_lora::soft_threshold {
namespace {

using Gates = Tensors;

constexpr char kOp[] = "soft_threshold_";

bool supported(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::Half ||
         dtype == ScalarType::BFloat16;
}

void check_gates(const Gates& gates) {
  for (size_t i = 0; i < gates.size(); ++i) {
    check(supported(gates[i].scalar_type()), kOp, ": gates[", i, "] must be a floating tensor");
    check(gates[i].is_contiguous(), kOp, ": gates[", i, "] must be contiguous");
    check(gates[i].get_device_index() == gates[0].get_device_index(), kOp, ": gates[", i,
          "] is on another device than gates[0]");
  }
}

template <typename scalar_t, typename Launch>
void threshold_dtype(const Gates& gates, ScalarType dtype, double xi, bool official_compat,
                     Launch launch) {
  std::vector<Span<scalar_t>> spans;
  for (const Tensor& gate : gates) {
    if (gate.scalar_type() != dtype) continue;
    spans.push_back({static_cast<scalar_t*>(gate.mutable_data_ptr()), gate.numel()});
  }
  check_cuda(for_each_table(spans, xi, official_compat, launch), kOp);
}

template <typename Launch>
void threshold_all(const Gates& gates, double xi, bool official_compat, Launch launch) {
  threshold_dtype<float>(gates, ScalarType::Float, xi, official_compat, launch);
  threshold_dtype<double>(gates, ScalarType::Double, xi, official_compat, launch);
  threshold_dtype<__half>(gates, ScalarType::Half, xi, official_compat, launch);
  threshold_dtype<__nv_bfloat16>(gates, ScalarType::BFloat16, xi, official_compat, launch);
}

void soft_threshold_cuda(Gates gates, double xi, bool official_compat) {
  if (gates.empty()) return;
  check_gates(gates);
  const OnDevice on(gates[0].get_device_index());
  threshold_all(gates, xi, official_compat, [&on](const auto& params) {
    using Params = std::decay_t<decltype(params)>;
    return launch(soft_threshold_kernel<typename Params::Scalar>, dim3(unsigned(params.count)),
                  kThreads, 0, params, on.stream);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_lora, FUSED_LORA_DEVICE, m) {
  m.impl("soft_threshold_cuda_", TORCH_BOX(&soft_threshold_cuda));
}

}  // namespace fused_lora::soft_threshold
