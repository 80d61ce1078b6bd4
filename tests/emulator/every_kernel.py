"""Every CUDA kernel on odd shapes, in tensors with nothing of torch's allocator around them; what a
sanitizer looks at. The numbers are held to the reference elsewhere."""

import torch

import fused_lora as fl
from fused_lora.ops.soft_threshold import soft_threshold_

torch.manual_seed(0)


def tight(*shape, dtype):
    return torch.randn(shape).to(dtype).clone()


for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for M, K, N, R in ((1, 1, 1, 1), (5, 65, 33, 3), (33, 200, 65, 17), (65, 72, 129, 70)):
        x, w, a = (tight(*s, dtype=dtype).requires_grad_() for s in ((M, K), (N, K), (R, K)))
        b, bias, gate = (
            tight(N, R, dtype=dtype).requires_grad_(),
            tight(N, dtype=dtype),
            torch.randn(R),
        )
        gate.requires_grad_()
        with torch.no_grad():
            fl.lora_linear(x, w, a, b, bias, scale=0.5, gate=gate, backend="cuda")
        for p in (0.0, 0.3):
            y = fl.lora_linear(x, w, a, b, bias, scale=0.5, gate=gate, dropout_p=p, backend="cuda")
            y.sum().backward()
        bank = fl.AdapterBank(K, N, 3, R, dtype=dtype)
        for name, r in (("one", R), ("two", 1)):
            bank.add(
                name, tight(r, K, dtype=dtype), tight(N, r, dtype=dtype), scale=0.5, trainable=True
            )
        ids = torch.randint(-1, 3, (M,))
        for p in (0.0, 0.3):
            y = fl.multi_lora_linear(x, w, bank, ids, bias, dropout_p=p, backend="cuda")
            y.sum().backward()
        with torch.no_grad():
            fl.multi_lora_linear(x, w, bank, ids, bias, backend="cuda")
            fl.multi_lora_add_(y.detach(), x, bank, ids, backend="cuda")
    for official_compat in (False, True):
        gates = [torch.randn(n).to(dtype) for n in (1, 65537, 3)]
        soft_threshold_(gates, 0.1, official_compat=official_compat, backend="cuda")
print("all kernels ran")
