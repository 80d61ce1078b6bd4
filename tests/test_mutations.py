"""The test of the suite: a fault planted in a copy of the package fails the test beside it."""

import shutil
from pathlib import Path

import emulated
import fused_lora.triton_kernels
import pytest
from cases import CUDA_REFUSES, slow
from conftest import DEVICE
from mutations import CAUGHT, PASSED, Fault, copy_package, plant, run_tests

import fused_lora

PACKAGE = Path(fused_lora.__file__).parent
KERNELS = Path(fused_lora.triton_kernels.__file__).parent

pytestmark = pytest.mark.skipif(
    DEVICE != "cpu", reason="faults that read or write outside of a tensor stay in the interpreter"
)

DROPOUT = "triton_kernels/dropout.py"
PLANES = "triton_kernels/planes.py"
SHRINK = "triton_kernels/shrink.py"
GEMM = "triton_kernels/segment_gemm.py"
REDUCE = "triton_kernels/row_reduce.py"
MULTI_SHRINK = "triton_kernels/multi_shrink.py"
MULTI_GEMM = "triton_kernels/multi_segment_gemm.py"
MULTI_REDUCE = "triton_kernels/multi_row_reduce.py"
MULTI_GEMV = "triton_kernels/multi_gemv.py"
SEGMENTS = "triton_kernels/segments.py"
OP = "ops/lora_linear.py"
MULTI = "ops/multi_lora_linear.py"
ADD = "ops/lora_add.py"
GROUP = "ops/lora_linear_group.py"
ROUTING = "ops/routing.py"
BANK = "bank.py"
STORE = "store.py"
ROUTES = "open_routes.py"
LAYOUT = "batch_layout.py"
CHECKS = "ops/validation.py"
DISPATCH = "ops/dispatch.py"
REFERENCE = "reference.py"
THRESHOLD = "ops/soft_threshold.py"
EMBEDDING = "triton_kernels/embedding.py"
ADALORA = "optim/adalora.py"
CONFIGS = "triton_kernels/configs.py"
FILES = "files.py"
DEPT = "nn/dept.py"
PRUNE = "optim/prune.py"
DISTRIBUTED = "integrations/distributed.py"
INJECT = "inject.py"
ADAPTER = "nn/adapter.py"
DORA = "ops/dora_linear.py"
PEFT = "integrations/peft.py"

# All six tensors, with dropout and without.
ROWS = "test_lora_linear.py::test_leading_dimensions[contiguous-(7,)-{}]"
MASTERS = "test_lora_linear.py::test_fp32_masters[dtype0-0.0-{}]"
MASKS = "test_lora_linear.py::test_one_mask_in_forward_da_and_dx[0.5-{}]"
SUBSET = "test_lora_linear.py::test_only_the_gradients_asked_for[({})-{}]"
EDGE = "test_regressions.py::{}"
RAGGED = "test_multi_lora_linear.py::test_ragged_ranks[id_dtype0-{}-{}]"
MANY = "test_multi_lora_linear.py::test_64_adapters[{}]"
TENANTS = "test_tenants.py::test_other_rows_and_adapters_are_the_same[{}]"
ABSENT = "test_tenants.py::test_an_adapter_without_rows_reaches_nothing[{}]"
ANY_LAYOUT = "test_layouts.py::test_any_layout_of_any_tensor[{}]"

PARTS = "test_lora_linear.py::test_columns_sum_to_the_whole[{}]"
TENSOR_PARALLEL = "test_distributed.py::test_tensor_parallel[{}]"
TORCH = "test_torch.py::test_{}"
LLAMA = "test_transformers.py::test_{}"
ALLOCATION = "test_adalora.py::test_a_hundred_steps_are_those_of_the_loops"

# The name says what is wrong.
FAULTS = {
    # The mask.
    "kernel: 6 rounds of Philox": Fault(
        DROPOUT,
        "zero, zero, 7)",
        "zero, zero, 6)",
        "test_dropout.py::test_kernel_bits_are_the_reference_mask[0.5-triton]",
    ),
    "kernel: two words of Philox swapped": Fault(
        DROPOUT,
        "w0, w1, w2, w3 = tl.philox",
        "w1, w0, w2, w3 = tl.philox",
        "test_dropout.py::test_kernel_bits_are_the_reference_mask[0.5-triton]",
    ),
    "kernel: high halves before low halves": Fault(
        DROPOUT,
        "bits = ((w0 & 0xFFFF) >= t).to(tl.int32) | ((w0 >> 16) >= t).to(tl.int32) << 1",
        "bits = ((w0 >> 16) >= t).to(tl.int32) | ((w0 & 0xFFFF) >= t).to(tl.int32) << 1",
        "test_dropout.py::test_kernel_bits_are_the_reference_mask[0.5-triton]",
    ),
    "kernel: a lane at the threshold is dropped": Fault(
        DROPOUT,
        "((w2 & 0xFFFF) >= t)",
        "((w2 & 0xFFFF) > t)",
        EDGE.format("test_a_lane_at_the_threshold_is_kept[4]"),
    ),
    "kernel: the counter has 32 bits": Fault(
        DROPOUT,
        "high = ((counter >> 32) & 0xFFFFFFFF).to(tl.uint32)",
        "high = (counter & 0).to(tl.uint32)",
        EDGE.format("test_kernel_counters_are_64_bits[m=2147483653]"),
    ),
    "kernel: bits expanded from the top": Fault(
        DROPOUT,
        ">> tl.arange(0, 8)[None, None, :]",
        ">> (7 - tl.arange(0, 8))[None, None, :]",
        MASKS.format("triton"),
    ),
    "reference: 6 rounds of Philox": Fault(
        REFERENCE,
        "PHILOX_ROUNDS = 7",
        "PHILOX_ROUNDS = 6",
        "test_dropout.py::test_philox_known_answer",
    ),
    "reference: two words of Philox swapped": Fault(
        REFERENCE,
        "return c0, c1, c2, c3",
        "return c1, c0, c2, c3",
        "test_dropout.py::test_lanes[seed=42]",
    ),
    "reference: counters of K // 8 calls a row": Fault(
        REFERENCE,
        "calls = (K + 7) // 8",
        "calls = max(K // 8, 1)",
        "test_dropout.py::test_lanes[seed=1234567]",
    ),
    "reference: a lane at the threshold is dropped": Fault(
        REFERENCE,
        "K, columns) >= threshold",
        "K, columns) > threshold",
        EDGE.format("test_a_lane_at_the_threshold_is_kept[0]"),
    ),
    "reference: columns of a wider input count from its first": Fault(
        REFERENCE,
        "    counter += first // 8\n",
        "",
        "test_dropout.py::test_columns_of_a_wider_input_take_its_mask[triton]",
    ),
    "kernel: columns of a wider input count from its first, in shrink": Fault(
        SHRINK,
        "offs_call = first_call + first // 8",
        "offs_call = first // 8",
        PARTS.format("triton"),
    ),
    "kernel: columns of a wider input have rows of their own, in row_reduce": Fault(
        REDUCE,
        "first_call + offs_call, row_calls, threshold",
        "first_call + offs_call, calls, threshold",
        PARTS.format("triton"),
    ),
    "kernel: columns of a wider input count from its first, in the bits": Fault(
        DROPOUT,
        "first_call + offs_c, row_calls",
        "offs_c, row_calls",
        PARTS.format("triton"),
    ),
    "op: the backward forgets where x lies in a wider input": Fault(
        OP,
        "ctx.backend, ctx.columns,",
        "ctx.backend, None,",
        PARTS.format("torch"),
    ),
    # Tensor parallel.
    "the gradients of what all ranks have are not summed": Fault(
        DISTRIBUTED,
        ".to_local(grad_placements=[Partial()])",
        ".to_local(grad_placements=[Replicate()])",
        TENSOR_PARALLEL.format("False-0.0-mlp-2"),
    ),
    "dx is not summed over the ranks": Fault(
        DISTRIBUTED,
        "dx: ClassVar = Partial()",
        "dx: ClassVar = Replicate()",
        TENSOR_PARALLEL.format("False-0.0-attention-2"),
    ),
    "every rank adds the bias": Fault(
        DISTRIBUTED,
        "* float(rank == 0)",
        "* 1.0",
        "test_distributed.py::test_a_trained_bias[mlp-2]",
    ),
    "a row-wise part makes the first part's mask": Fault(
        DISTRIBUTED,
        "(rank * K, layer.in_features)",
        "(0, layer.in_features)",
        TENSOR_PARALLEL.format("False-0.5-mlp-2"),
    ),
    "each rank draws a seed of its own": Fault(
        DISTRIBUTED,
        "_waited(collectives.broadcast(draw_seed(device), 0, mesh.get_group()))",
        "draw_seed(device)",
        TENSOR_PARALLEL.format("False-0.5-attention-2"),
    ),
    "gates of shards are not thresholded": Fault(
        "optim/sora.py",
        '[local_part(g) for g in group["params"] if g.grad is not None]',
        '[local_part(g).clone() for g in group["params"] if g.grad is not None]',
        "test_distributed.py::test_gates_train_as_one[tp-2-sgd]",
    ),
    "reference: the threshold is rounded down": Fault(
        REFERENCE,
        "return round(65536 * p)",
        "return int(65536 * p)",
        EDGE.format("test_the_threshold_is_rounded_to_nearest[0.1-6554]"),
    ),
    "reference: kept values are not scaled up": Fault(
        REFERENCE,
        "return 1.0 / (1.0 - p) if p < 1 else 0.0",
        "return 1.0 if p < 1 else 0.0",
        "test_reference.py::test_dropout_masks_the_input_of_a_alone[0.3]",
    ),
    # h and t.
    "shrink: another counter stride": Fault(
        SHRINK,
        "*calls_of(K, columns)",
        "0, K // 8",
        MASKS.format("triton"),
    ),
    "shrink: the mask does not move with k": Fault(
        SHRINK,
        "offs_call += BLOCK_K // 8",
        "offs_call += 0",
        EDGE.format("test_the_mask_moves_with_the_steps_of_a_split"),
    ),
    "shrink: dropped values multiplied by zero": Fault(
        SHRINK,
        "x = tl.where(expand_bits(bits, BLOCK_M, BLOCK_K), x, 0.0)",
        "x *= expand_bits(bits, BLOCK_M, BLOCK_K).to(x.dtype)",
        EDGE.format("test_an_infinity_that_is_dropped_stays_out_of_h[triton]"),
    ),
    "shrink: keep_scale missing": Fault(
        SHRINK,
        "h = tl.trans(acc) * keep_scale",
        "h = tl.trans(acc)",
        ROWS.format("triton"),
    ),
    "shrink: h saved with its gate": Fault(
        SHRINK,
        "tl.store(h_ptr + out, h.to(h_ptr",
        "tl.store(h_ptr + out, scaled(h, gate_ptr, 1.0, offs_r, mask_r).to(h_ptr",
        MASTERS.format("triton"),
    ),
    "shrink: the last rank is left out": Fault(
        SHRINK,
        "mask_m, mask_r = offs_m < M, offs_r < R",
        "mask_m, mask_r = offs_m < M, offs_r < R - 1",
        MASTERS.format("triton"),
    ),
    "shrink: one column past K": Fault(
        SHRINK,
        "mask_k = offs_k <",
        "mask_k = offs_k <=",
        ROWS.format("triton"),
    ),
    "shrink: splits of K overlap": Fault(
        SHRINK,
        "tl.minimum(span, K - first)",
        "K - first",
        "test_shrink.py::test_every_split_covers_k_once[513-3]",
    ),
    "shrink: the last split is dropped": Fault(
        SHRINK,
        "sum_planes(planes, scale=scale",
        "sum_planes(planes[:-1], scale=scale",
        "test_shrink.py::test_every_split_covers_k_once[513-3]",
    ),
    "shrink: rows counted in 32 bits": Fault(
        SHRINK,
        "pid_m = tl.program_id(0).to(tl.int64)",
        "pid_m = tl.program_id(0)",
        EDGE.format("test_offsets_past_2_31_elements[0-triton]"),
    ),
    "shrink: columns counted in 32 bits": Fault(
        SHRINK,
        "pid_k = tl.program_id(1).to(tl.int64)",
        "pid_k = tl.program_id(1)",
        EDGE.format("test_offsets_past_2_31_elements[1-triton]"),
    ),
    # Gate, scale and the sums of planes.
    "planes: scale x 1.01": Fault(
        PLANES,
        "t = h * scale\n",
        "t = h * scale * 1.01\n",
        ROWS.format("triton"),
    ),
    "planes: the gate applied twice": Fault(
        PLANES,
        "t *= gate[None, :]",
        "t *= (gate * gate)[None, :]",
        ROWS.format("triton"),
    ),
    "planes: the first plane is dropped": Fault(
        PLANES,
        "for _ in range(S):",
        "plane += stride_planes[0]\n    for _ in range(S - 1):",
        "test_row_reduce.py::test_long_columns_are_added_in_planes[triton]",
    ),
    "planes: the last row is not written": Fault(
        PLANES,
        "mask = (offs_i < I)[:, None]",
        "mask = (offs_i < I - 1)[:, None]",
        ROWS.format("triton"),
    ),
    "planes: dgate of the gated h": Fault(
        PLANES,
        "dot = scale * tl.sum(h * w.to(tl.float32), axis=0)",
        "dot = tl.sum(scaled(h, gate_ptr, scale, offs_r, mask_r) * w.to(tl.float32), axis=0)",
        ROWS.format("triton"),
    ),
    "planes: dgate of the first block of N": Fault(
        PLANES,
        "dots.sum(0)",
        "dots[0]",
        "test_row_reduce.py::test_dy[triton]",
    ),
    # y and dx.
    "gemm: one column past K": Fault(
        GEMM,
        "mask_k = offs_k <",
        "mask_k = offs_k <=",
        ROWS.format("triton"),
    ),
    "gemm: the last row is not written": Fault(
        GEMM,
        "acc.to(y_ptr.dtype.element_ty), mask=mask)",
        "acc.to(y_ptr.dtype.element_ty), mask=mask & (offs_m < M - 1)[:, None])",
        ROWS.format("triton"),
    ),
    "gemm: the bias added once a segment": Fault(
        GEMM,
        "acc += tl.load(bias_ptr",
        "acc += len(lhs_ptrs) * tl.load(bias_ptr",
        ROWS.format("triton"),
    ),
    "gemm: a last group of fewer rows is numbered as a full one": Fault(
        GEMM,
        "rows = tl.minimum(num_m - group * GROUP_M, GROUP_M)",
        "rows = GROUP_M",
        "test_segment_gemm.py::test_every_tile_is_written_once[8]",
    ),
    "gemm: no mask on the LoRA part of dx": Fault(
        GEMM,
        "tl.where(expand_bits(bits, BLOCK_M, BLOCK_N), acc * keep_scale, 0.0)",
        "acc * keep_scale",
        MASKS.format("triton"),
    ),
    "gemm: keep_scale missing in dx": Fault(
        GEMM,
        "acc * keep_scale, 0.0)",
        "acc, 0.0)",
        ROWS.format("triton"),
    ),
    "gemm: the mask does not move with n": Fault(
        GEMM,
        "offs_byte = pid_n * (BLOCK_N // 8) + tl.arange(0, BLOCK_N // 8)",
        "offs_byte = tl.arange(0, BLOCK_N // 8)",
        MASKS.format("triton"),
    ),
    "gemm: rows counted in 32 bits": Fault(
        GEMM,
        "pid_m, pid_n = pid_m.to(tl.int64), pid_n.to(tl.int64)",
        "pid_m, pid_n = pid_m, pid_n",
        EDGE.format("test_offsets_past_2_31_elements[0-triton]"),
    ),
    "gemm: columns counted in 32 bits": Fault(
        GEMM,
        "offs_k = tl.arange(0, BLOCK_K).to(tl.int64)",
        "offs_k = tl.arange(0, BLOCK_K)",
        EDGE.format("test_offsets_past_2_31_elements[1-triton]"),
    ),
    # dA, dB, dh and the bits.
    "reduce: another counter stride": Fault(
        REDUCE,
        "calls = tl.cdiv(C, 8)",
        "calls = C // 8",
        MASKS.format("triton"),
    ),
    "reduce: no mask in dA": Fault(
        REDUCE,
        "z = tl.where(expand_bits(bits, BLOCK_M, BLOCK_C), z, 0.0)",
        "z = z",
        MASKS.format("triton"),
    ),
    "reduce: dropped values multiplied by zero": Fault(
        REDUCE,
        "z = tl.where(expand_bits(bits, BLOCK_M, BLOCK_C), z, 0.0)",
        "z *= expand_bits(bits, BLOCK_M, BLOCK_C).to(z.dtype)",
        "test_lora_linear.py::test_dropped_values_do_not_leak[triton]",
    ),
    "reduce: the first block of ranks does not write its bits": Fault(
        REDUCE,
        "if bits_ptr is not None and pid_r == 0:",
        "if bits_ptr is not None and pid_r == 1:",
        ROWS.format("triton"),
    ),
    "reduce: bits written transposed": Fault(
        REDUCE,
        "bits_ptr + offs_m[:, None] * calls + offs_call[None, :]",
        "bits_ptr + offs_m[:, None] + offs_call[None, :] * M",
        MASKS.format("triton"),
    ),
    "reduce: blocks of rows overlap": Fault(
        REDUCE,
        "tl.minimum(first + rows, M)",
        "tl.minimum(first + rows + BLOCK_M, M)",
        "test_row_reduce.py::test_long_columns_are_added_in_planes[triton]",
    ),
    "reduce: u of the first block of columns": Fault(
        REDUCE,
        "sum_planes(u, scale=scale",
        "sum_planes(u[:1], scale=scale",
        "test_row_reduce.py::test_dy[triton]",
    ),
    "reduce: rows counted in 32 bits": Fault(
        REDUCE,
        "offs_m = m + tl.arange(0, BLOCK_M).to(tl.int64)",
        "offs_m = (m + tl.arange(0, BLOCK_M)).to(tl.int32)",
        EDGE.format("test_offsets_past_2_31_elements[0-triton]"),
    ),
    "reduce: columns counted in 32 bits": Fault(
        REDUCE,
        "(pid // num_c).to(tl.int64), (pid % num_c).to(tl.int64)",
        "(pid // num_c).to(tl.int64), pid % num_c",
        EDGE.format("test_offsets_past_2_31_elements[1-triton]"),
    ),
    "reduce: dh without the gate": Fault(
        REDUCE,
        "sum_planes(u, scale=scale, gate=gate, t=dh)",
        "sum_planes(u, scale=scale, t=dh)",
        ROWS.format("triton"),
    ),
    "reduce: dB without the gate": Fault(
        REDUCE,
        "p.transpose(1, 2), scale=scale, gate=gate, t=db",
        "p.transpose(1, 2), scale=scale, t=db",
        ROWS.format("triton"),
    ),
    "reduce: dA x 1.1": Fault(
        REDUCE,
        "plain_scale=keep_scale, h=da.t()",
        "plain_scale=1.1 * keep_scale, h=da.t()",
        ROWS.format("triton"),
    ),
    "reduce: keep_scale missing in dA": Fault(
        REDUCE,
        "plain_scale=keep_scale, h=da.t()",
        "h=da.t()",
        ROWS.format("triton"),
    ),
    "reduce: dA of a master rounded to 16 bits": Fault(
        REDUCE,
        "return da\n",
        "return da.to(x.dtype).to(da.dtype)\n",
        "test_row_reduce.py::test_master_gradients_are_rounded_once[triton]",
    ),
    "reduce: dB of a master rounded to 16 bits": Fault(
        REDUCE,
        "return dh, db, dgate",
        "return dh, db.to(b.dtype).to(db.dtype), dgate",
        EDGE.format("test_master_gradients_are_not_rounded_to_16_bits"),
    ),
    # How the op puts the kernels together.
    "triton: dx without its LoRA part": Fault(
        OP,
        "dx = kernels.segment_gemm([base, lora], early=1)",
        "dx = kernels.segment_gemm([base])",
        MASTERS.format("triton"),
    ),
    "triton: the base part of dx masked as well": Fault(
        OP,
        "mask=(bits, drop[2], 1)",
        "mask=(bits, drop[2], 2)",
        ROWS.format("triton"),
    ),
    "triton: dh of dx alone without the gate": Fault(
        OP,
        "dh, _ = kernels.shrink(dy, b.t(), scale=scale, gate=gate)",
        "dh, _ = kernels.shrink(dy, b.t(), scale=scale)",
        SUBSET.format("True, False, False, False, False, False", "triton"),
    ),
    "triton: dB returned where dgate alone was asked for": Fault(
        OP,
        "return dx, da, db if need_db else None, dgate",
        "return dx, da, db, dgate",
        SUBSET.format("False, False, False, False, False, True", "triton"),
    ),
    # Embeddings.
    "embedding: the prompt's last row is a token's": Fault(
        EMBEDDING,
        "mask=(offs_t < m)[:, None] & mask_d[None, :],",
        "mask=(offs_t < m - 1)[:, None] & mask_d[None, :],",
        "test_dept_embedding.py::test_a_block_takes_several_sequences[none-2]",
    ),
    "embedding: the pair of the first sequence for all": Fault(
        EMBEDDING,
        "positions_ptr + n * stride_positions[0] + offs_l * stride_positions[1],",
        "positions_ptr + offs_l * stride_positions[1],",
        "test_dept_embedding.py::test_a_block_takes_several_sequences[every row-2]",
    ),
    "embedding: a position past the pair takes its last row": Fault(
        EMBEDDING,
        "mask_m & (positions >= 0) & (positions < S)",
        "mask_m & (positions >= 0)",
        "test_dept_embedding.py::test_any_shape[triton]",
    ),
    "embedding: sums without the last block of rows": Fault(
        EMBEDDING,
        "for i in range(first, last, BLOCK_M):",
        "for i in range(first, last - BLOCK_M, BLOCK_M):",
        "test_lora_embedding.py::test_any_shape[triton]",
    ),
    "triton asked for, torch run": Fault(
        OP,
        'forward = forward_torch if backend == "torch" else functools.partial('
        "forward_kernels, backend)",
        "forward = forward_torch",
        EDGE.format("test_the_kernels_of_the_backend_that_was_asked_for[triton]"),
    ),
    # Tables.
    "table: a tile of u for any size of dy": Fault(
        CONFIGS,
        '("MC", M * C)',
        '("MC", M)',
        "test_row_reduce.py::test_dy_is_read_once_where_that_is_fewer_bytes",
    ),
    "table: two rounds of blocks, and twice the planes of P": Fault(
        CONFIGS,
        'row.pop("blocks", BLOCKS_WANTED)',
        'max(BLOCKS_WANTED, row.pop("blocks", 0))',
        "test_row_reduce.py::test_dy_is_read_once_where_that_is_fewer_bytes",
    ),
    # Folders.
    "files: a save in between is not noticed": Fault(
        FILES,
        "if now is None or not os.path.samestat(os.fstat(file.fileno()), now):",
        "if now is None:",
        "test_nn_embedding.py::test_a_save_is_one_step",
    ),
    "files: all names of a file in a message": Fault(
        FILES,
        "zip(names, range(3), strict=False))",
        "zip(names, range(10**6), strict=False))",
        "test_checkpoint_hostile.py::test_words_of_a_file_are_cut",
    ),
    "reading: a base weight that is another's is taken": Fault(
        "checkpoint/reading.py",
        "if not torch.equal(mine, adapter.base[name].to(mine)):",
        "if False:",
        "test_checkpoint_base.py::test_a_store_compares",
    ),
    "loading: a base weight of the folder is left there": Fault(
        "checkpoint/reading.py",
        "        t.copy_(adapter.base[name])\n",
        "        pass\n",
        "test_checkpoint_base.py::test_there_and_back[head-False]",
    ),
    "merging: an embedding's adapter without its scale": Fault(
        "checkpoint/merging.py",
        "a, b, gate = (b.t(), a.t(), None) if self.transposed else (a, b, gate)",
        "a, b, gate, scale = (b.t(), a.t(), None, 1) if self.transposed else (a, b, gate, scale)",
        "test_checkpoint_base.py::test_merge_of_a_folder[the same base]",
    ),
    "names: a wrapper is in the name of what it wraps": Fault(
        "names.py",
        "        module = unwrapped(module)\n",
        "",
        "test_names.py::test_names_are_those_of_the_bare_model[compiled blocks]",
    ),
    "sharded: what FSDP1 has flattened passes for whole": Fault(
        "nn/sharded.py",
        "    check_unflattened(op, name, module)\n\n\n",
        "\n\n",
        "test_names.py::test_fully_sharded_data_parallel[original]",
    ),
    "dept: tensors of another save than the config": Fault(
        DEPT,
        "            opened()\n",
        "",
        "test_nn_embedding.py::test_a_save_is_one_step",
    ),
    "dept: config and tensors written one after the other": Fault(
        DEPT,
        "write_files(Path(folder), config, tensors)",
        "from fused_lora.files import CONFIG, WEIGHTS, json\n"
        "        from safetensors.torch import save_file\n"
        "        Path(folder).mkdir(parents=True, exist_ok=True)\n"
        "        (Path(folder) / CONFIG).write_text(json.dumps(config))\n"
        "        save_file(tensors, Path(folder) / WEIGHTS)",
        "test_nn_embedding.py::test_a_save_is_one_step",
    ),
    "embedding: the padding word learns": Fault(
        "ops/lora_embedding.py",
        "rows[padding_idx].zero_()",
        "pass",
        "test_lora_embedding.py::test_the_padding_word_has_no_gradient[triton]",
    ),
    # The torch backend.
    "torch: scale x 1.01": Fault(
        OP,
        "b.t(), alpha=scale)",
        "b.t(), alpha=1.01 * scale)",
        ROWS.format("torch"),
    ),
    "torch: scale missing in y": Fault(
        OP,
        "b.t(), alpha=scale)",
        "b.t())",
        ROWS.format("torch"),
    ),
    "torch: keep_scale missing in h": Fault(
        OP,
        "h = _scaled_mm(keep_scale, x_kept, a.t())",
        "h = x_kept @ a.t()",
        ROWS.format("torch"),
    ),
    "torch: h saved with its gate": Fault(
        OP,
        "return y, h if save_h else None",
        "return y, _gated(h, gate) if save_h else None",
        ROWS.format("torch"),
    ),
    "torch: the gate applied twice": Fault(
        OP,
        "(t * gate).to(t.dtype)",
        "(t * gate * gate).to(t.dtype)",
        ROWS.format("torch"),
    ),
    "torch: dropped values multiplied by zero": Fault(
        OP,
        "return torch.where(keep, x, 0), keep,",
        "return x * keep, keep,",
        "test_lora_linear.py::test_dropped_values_do_not_leak[torch]",
    ),
    "torch: dh without the gate": Fault(
        OP,
        "dh = _gated(dy @ b, gate)",
        "dh = dy @ b",
        ROWS.format("torch"),
    ),
    "torch: dB without the gate": Fault(
        OP,
        "db = _gated(p, gate)",
        "db = p",
        ROWS.format("torch"),
    ),
    "torch: no mask in dA": Fault(
        OP,
        "da = _scaled_mm(scale * keep_scale, dh.t(), x_kept)",
        "da = _scaled_mm(scale * keep_scale, dh.t(), x)",
        MASKS.format("torch"),
    ),
    "torch: dA x 1.1": Fault(
        OP,
        "da = _scaled_mm(scale * keep_scale, dh.t(), x_kept)",
        "da = _scaled_mm(1.1 * scale * keep_scale, dh.t(), x_kept)",
        ROWS.format("torch"),
    ),
    "torch: keep_scale missing in dA": Fault(
        OP,
        "da = _scaled_mm(scale * keep_scale, dh.t(), x_kept)",
        "da = _scaled_mm(scale, dh.t(), x_kept)",
        ROWS.format("torch"),
    ),
    "torch: dx without its LoRA part": Fault(
        OP,
        "dx.addmm_(dh, a, alpha=scale)",
        "pass",
        MASTERS.format("torch"),
    ),
    "torch: dx without the scale": Fault(
        OP,
        "dx.addmm_(dh, a, alpha=scale)",
        "dx.addmm_(dh, a)",
        MASTERS.format("torch"),
    ),
    "torch: no mask on the LoRA part of dx": Fault(
        OP,
        ".masked_fill_(~keep, 0)",
        "",
        MASKS.format("torch"),
    ),
    "torch: keep_scale missing in dx": Fault(
        OP,
        "dx = _scaled_mm(scale * keep_scale, dh, a)",
        "dx = _scaled_mm(scale, dh, a)",
        ROWS.format("torch"),
    ),
    # A base made elsewhere, and projections that share x.
    "gemm: the base left out": Fault(
        GEMM,
        "acc += tl.load(base, mask=mask, other=0.0).to(tl.float32)",
        "acc += 0.0",
        "test_lora_add.py::test_leading_dimensions[0.3-(2, 3)-triton]",
    ),
    "add: the gradient of the base scaled": Fault(
        ADD,
        "grads = dy, dx, da",
        "grads = ctx.scale * dy, dx, da",
        "test_lora_add.py::test_leading_dimensions[0.3-(2, 3)-torch]",
    ),
    "adapter: a base without a gradient taken": Fault(
        "nn/adapter.py",
        "input.requires_grad and not self._passes_on(base_out, input)",
        "input.requires_grad and not base_out.is_floating_point()",
        "test_adapter.py::test_a_base_without_a_gradient",
    ),
    "group: no mask on dx of the adapters": Fault(
        GROUP,
        "mask = (bits, drop[2], 1) if drop and adapters else None",
        "mask = None",
        "test_lora_linear_group.py::test_one_mask_for_the_group[triton]",
    ),
    "group: dx of the last projection alone": Fault(
        GROUP,
        "dx = dy @ weight if dx is None else dx.addmm_(dy, weight)",
        "dx = dy @ weight",
        "test_lora_linear_group.py::test_leading_dimensions[0.3-(2, 3)-torch]",
    ),
    "group: outputs that nothing came from have zeros for gradients": Fault(
        GROUP,
        "ctx.set_materialize_grads(False)",
        "ctx.set_materialize_grads(True)",
        "test_lora_linear_group.py::test_outputs_that_nothing_came_from[(1,)-torch]",
    ),
    # What the public function and autograd do around both.
    "the backward draws another mask": Fault(
        OP,
        "lora_b, gate, h, seed)",
        "lora_b, gate, h, None if seed is None else seed + 1)",
        MASKS.format("torch"),
    ),
    "dA computed where dB was asked for": Fault(
        OP,
        "skinny = need_dx, need_da, need_db, need_dgate",
        "skinny = need_dx, need_da or need_db, need_db, need_dgate",
        SUBSET.format("False, False, False, True, False, False", "torch"),
    ),
    "dW computed for nobody": Fault(
        OP,
        "dw = dy.t() @ rows if need_dw else None",
        "dw = dy.t() @ rows",
        SUBSET.format("True, False, False, False, False, False", "torch"),
    ),
    "dbias averaged": Fault(
        OP,
        "dbias = dy.sum(0)",
        "dbias = dy.mean(0)",
        ROWS.format("torch"),
    ),
    "the value of a scale tensor dropped": Fault(
        OP,
        "return 1.0, gate * scale.to(x.device, wide)",
        "return 1.0, gate",
        "test_lora_linear.py::test_scale_tensor[torch]",
    ),
    "dropout outside of training": Fault(
        OP,
        "dropping = training and dropout_p > 0",
        "dropping = dropout_p > 0",
        "test_lora_linear.py::test_seed[torch]",
    ),
    "a negative seed loses its sign": Fault(
        OP,
        "torch.full((1,), seed,",
        "torch.full((1,), abs(seed),",
        "test_lora_linear.py::test_seed[torch]",
    ),
    "autocast rounds the masters": Fault(
        CHECKS,
        "return t if t.dtype in (torch.float32, torch.float64) else t.to(dtype)",
        "return t if t.dtype == torch.float64 else t.to(dtype)",
        EDGE.format("test_master_gradients_are_not_rounded_to_16_bits"),
    ),
    "autocast rounds the gate": Fault(
        OP,
        "_check(*tensors, *others)\n",
        "_check(*tensors, *others)\n        gate = gate.to(x.dtype)\n",
        EDGE.format("test_master_gradients_are_not_rounded_to_16_bits"),
    ),
    "a usual call under autocast": Fault(
        OP,
        "and not check.autocasting(x))",
        ")",
        "test_lora_linear.py::test_autocast[autocast_dtype0-adapter_dtype0-x_dtype0-torch]",
    ),
    "a usual call with a probability above one": Fault(
        OP,
        "0.0 <= dropout_p <= 1.0)",
        "0.0 <= dropout_p)",
        "test_lora_linear.py::test_bad_input[p above one]",
    ),
    # Many adapters.
    "many: a tile runs into the next adapter": Fault(
        MULTI_SHRINK,
        "mask_m = place < last",
        "mask_m = place < M",
        "test_multi_lora_linear.py::test_h_is_that_of_each_row_and_zero_elsewhere[20-triton]",
    ),
    "many: rank rows past the rank": Fault(
        MULTI_SHRINK,
        "mask_r = offs_r < rank",
        "mask_r = offs_r < R",
        "test_multi_lora_linear.py::test_h_is_that_of_each_row_and_zero_elsewhere[20-triton]",
    ),
    "many: ranks that were never written": Fault(
        MULTI_GEMM,
        "mask_r = offs_r < rank",
        "mask_r = offs_r < rank + 1",
        RAGGED.format("different", "triton"),
    ),
    "many: the last split of K is dropped": Fault(
        MULTI_SHRINK,
        "for _ in range(S):",
        "for _ in range(S - 1):",
        "test_multi_lora_linear.py::test_h_is_that_of_each_row_and_zero_elsewhere[200-triton]",
    ),
    "many: the scale of the first adapter for all": Fault(
        MULTI_SHRINK,
        "tl.load(scale_ptr + slot)[:, None]",
        "tl.load(scale_ptr + slot * 0)[:, None]",
        RAGGED.format("different", "triton"),
    ),
    "many: the mask of a row is that of its place": Fault(
        MULTI_SHRINK,
        "bits = keep_bits(seed, offs_m,",
        "bits = keep_bits(seed, place,",
        MANY.format("triton"),
    ),
    "many: an adapter's part in every row of the tile": Fault(
        MULTI_GEMM,
        "own = ids == slot",
        "own = ids >= 0",
        RAGGED.format("some", "triton"),
    ),
    "many: ranks past the first block are dropped": Fault(
        MULTI_GEMM,
        "tl.range(0, rank, BLOCK_R, num_stages=1)",
        "tl.range(0, min(rank, BLOCK_R), BLOCK_R, num_stages=1)",
        RAGGED.format("different", "triton"),
    ),
    "many: the id is taken for the slot": Fault(
        MULTI_GEMM,
        "place = tl.load(table_ptr + slot).to(tl.int64)",
        "place = slot",
        "test_bank.py::test_a_thousand_changes[triton-tiles]",
    ),
    "many: dA sees the dropped elements": Fault(
        MULTI_REDUCE,
        "z = tl.where(expand_bits(bits, BLOCK_M, BLOCK_C), z, 0.0)",
        "z = z",
        MANY.format("triton"),
    ),
    "many: planes of the adapter before": Fault(
        SEGMENTS,
        "before = tl.sum(tl.where(offs_g < slot, tiles, 0), axis=0)",
        "before = tl.sum(tl.where(offs_g <= slot, tiles, 0), axis=0)",
        RAGGED.format("different", "triton"),
    ),
    "many: dgate with the gate in it": Fault(
        MULTI,
        "dgate[slot, :rank] = (p.to(gate.dtype) * bt).sum(1)",
        "dgate[slot, :rank] = (p.to(gate.dtype) * bt * gate[:, None]).sum(1)",
        RAGGED.format("different", "torch"),
    ),
    "many: batched rows take the result of others": Fault(
        MULTI,
        "else out.index_select(0, self.places)",
        "else out.index_select(0, self.places.flip(0))",
        "test_multi_lora_linear.py::test_adapters_with_few_rows_are_multiplied_together[26-batched0-0.0]",
    ),
    "many: batched rows without 1 / (1 - p)": Fault(
        MULTI,
        "padded, slots, beta=0, alpha=alpha)",
        "padded, slots, beta=0, alpha=1.0)",
        "test_multi_lora_linear.py::test_adapters_with_few_rows_are_multiplied_together[26-batched0-0.3]",
    ),
    "many: one row each, without the gate": Fault(
        MULTI_GEMV,
        "t *= scale * tl.load(gate_ptr + slot * R + offs_r, mask=mask_r, other=0.0)",
        "t *= scale",
        "test_multi_lora_linear.py::test_decoding[some]",
    ),
    "many: one row each, ranks past the rank": Fault(
        MULTI_GEMV,
        "            mask_r = offs_r < rank\n            plane",
        "            mask_r = offs_r < rank + 1\n            plane",
        "test_multi_lora_linear.py::test_decoding_reads_no_rank_past_the_rank",
    ),
    "many: one row each, the last split of K is dropped": Fault(
        MULTI_GEMV,
        "for _ in range(S):",
        "for _ in range(S - 1):",
        "test_multi_lora_linear.py::test_decoding[some]",
    ),
    "many: one row each, rows without adapter get the first": Fault(
        MULTI_GEMV,
        "    if j >= 0:\n        slot = tl.load(table_ptr + j)",
        "    if j >= -1:\n        slot = tl.load(table_ptr + tl.maximum(j, 0))",
        "test_multi_lora_linear.py::test_decoding[some]",
    ),
    "many: the ranks of the first projection for all": Fault(
        MULTI_GEMV,
        "x_ptr, a_ptrs[i], rank_ptrs[i], table_ptrs[i], ids_ptr",
        "x_ptr, a_ptrs[i], rank_ptrs[0], table_ptrs[i], ids_ptr",
        "test_multi_lora_linear.py::test_projections_of_one_x_in_one_call[triton-decode-600]",
    ),
    "many: the gates of the first projection for all": Fault(
        MULTI_SHRINK,
        "x_ptr, a_ptrs[i], rank_ptrs[i], scale_ptrs[i], gate_ptrs[i]",
        "x_ptr, a_ptrs[i], rank_ptrs[i], scale_ptrs[i], gate_ptrs[0]",
        "test_multi_lora_linear.py::test_projections_of_one_x_in_one_call[triton-tiles-40]",
    ),
    "routing: the wide form keeps the old batch": Fault(
        ROUTING,
        "wide._copy(self._spread(lead, times))",
        "pass",
        "test_multi_lora_linear.py::test_a_wide_routing_is_updated_too",
    ),
    "many: dx without its adapters": Fault(
        MULTI,
        "order.add_expanded_(dx, dh, slots.a_slots)",
        "pass",
        RAGGED.format("different", "torch"),
    ),
    "many: NaN of one adapter enters the products of its tile": Fault(
        MULTI_GEMM,
        "v = tl.where(finite, v, 0.0)",
        "v = v",
        TENANTS.format("triton-nan-0.0-B-tile"),
    ),
    "many: NaN of an adapter is lost": Fault(
        MULTI_GEMM,
        "tl.where(finite, 0, 1)",
        "tl.where(finite, 0, 0)",
        TENANTS.format("triton-nan-0.0-A-tile"),
    ),
    "many: NaN in the rows of every adapter of the tile": Fault(
        MULTI_GEMM,
        "ids = tl.where(own, tl.where(broken != 0, BROKEN, ids), ids)",
        "ids = tl.where(broken != 0, tl.where(ids <= slot, BROKEN, ids), ids)",
        TENANTS.format("triton-nan-0.0-B-tile"),
    ),
    "many: dg of NaN without rows": Fault(
        MULTI_REDUCE,
        "mask_r = (offs_r < rank) & (tiles > 0)",
        "mask_r = offs_r < rank",
        ABSENT.format("triton-B-nan-tile"),
    ),
    "many: everyone's columns with what is not finite": Fault(
        MULTI,
        "return t.masked_fill(broken[:, None], 0), broken",
        "return t, broken",
        TENANTS.format("gpu-torch-nan-0.0-x-tile"),
    ),
    "many: everyone's columns hide what is not finite": Fault(
        MULTI,
        't.masked_fill(broken, float("nan"))',
        "t",
        TENANTS.format("gpu-torch-nan-0.0-B-tile"),
    ),
    "many: everyone's dg of an adapter without rows": Fault(
        MULTI,
        "dgate = torch.where(every.held, dgate, 0)",
        "dgate = dgate",
        ABSENT.format("gpu-torch-B-nan-tile"),
    ),
    "bank: the numbers of an adapter outlive it": Fault(
        BANK,
        "            t[slot].zero_()",
        "            t[slot]",
        "test_tenants.py::test_a_bank_wipes_the_slot_of_an_adapter_that_is_taken_away[remove]",
    ),
    "kernels take the other sign": Fault(
        DISPATCH,
        "        t = t.resolve_neg()",
        "        t = t",
        ANY_LAYOUT.format("lora_linear-triton-x"),
    ),
    "kernels take a vector for a dense one": Fault(
        DISPATCH,
        "return t.contiguous() if t.ndim == 1 else t",
        "return t",
        ANY_LAYOUT.format("lora_linear-triton-gate"),
    ),
    "multi_lora_add_ writes the sign that memory has": Fault(
        MULTI,
        "            y.copy_(out)",
        "            y.add_(0)",
        "test_layouts.py::test_adding_with_any_layout[y-tiles-triton]",
    ),
    "multi_lora_add_ into elements that share memory": Fault(
        CHECKS,
        "shared = any(step == 0 for step, _ in dims) or any(",
        "shared = any(step == 0 for step, _ in dims) and any(",
        "test_layouts.py::test_adding_to_elements_that_share_memory_is_refused[(4, 6)-True-triton]",
    ),
    "routing: not stable": Fault(
        ROUTING,
        "torch.sort(key, stable=True)",
        "torch.sort(key.flip(0), stable=True)",
        "test_multi_lora_linear.py::test_routing_is_updated_in_place",
    ),
    "routing: the id of a sequence for its first tokens": Fault(
        ROUTING,
        "return ids.repeat_interleave(repeats)",
        "return ids.repeat(repeats)",
        "test_multi_lora_linear.py::test_leading_dimensions[sequence-(2, 3)-triton]",
    ),
    "bank: replace writes into the slot that is served": Fault(
        BANK,
        "self._write(self._spare, lora_a, lora_b, scale, gate)",
        "self._write(self._places[index], lora_a, lora_b, scale, gate)",
        "test_bank.py::test_replace_leaves_the_old_slot_as_it_was[torch]",
    ),
    "bank: rank rows of the adapter before stay": Fault(
        BANK,
        "self.a_slots[slot, rank:].zero_()",
        "pass",
        "test_bank.py::test_rank_rows_past_the_rank_are_zero[torch]",
    ),
    "routing: as many shapes as there are": Fault(
        ROUTING,
        "if len(self._wide) - len(self._captured) > KEPT:",
        "if False:",
        "test_multi_lora_linear.py::test_a_routing_keeps_the_rows_of_few_shapes",
    ),
    "bank: the slot of a removed adapter keeps it": Fault(
        BANK,
        "            self._wipe(self._places[index])\n            self._free_ids",
        "            self.rank[self._places[index]].fill_(0)\n            self._free_ids",
        "test_bank.py::test_remove_wipes_the_slot[torch]",
    ),
    "store: an id in use is given away": Fault(
        STORE,
        "if not self._in_use[i]), None)",
        "if True), None)",
        "test_open_routes.py::test_ids_that_no_adapter_has_are_in_use_too",
    ),
    "store: a retired slot is free at once": Fault(
        STORE,
        "if not self._in_use[index]:\n                self._retired.remove",
        "if True:\n                self._retired.remove",
        "test_open_routes.py::test_a_removed_name_serves_its_routes_to_their_end[names]",
    ),
    "store: replace in use writes over it": Fault(
        STORE,
        "if not self._in_use[old]:",
        "if True:",
        "test_open_routes.py::test_replace_leaves_open_routes_what_they_began_with",
    ),
    "store: a thread without a route gets the base": Fault(
        STORE,
        "        if self._open:",
        "        if False:",
        "test_open_routes.py::test_routes_are_of_their_thread",
    ),
    "routes: a recomputation is that of the base": Fault(
        ROUTES,
        "Kept(routes, curtain=True)",
        "Kept([], curtain=True)",
        "test_open_routes.py::test_a_recomputation_sees_the_route_of_its_forward"
        "[mixed-reentrant-after it]",
    ),
    "routes: a generator's route is that of its consumer": Fault(
        ROUTES,
        "if not self.in_generator:",
        "if True:",
        "test_open_routes.py::test_a_generator_keeps_its_route_to_itself",
    ),
    "layout: sizes that coincide are proof": Fault(
        LAYOUT,
        "if lead[1] == batch and not self.batch_first and not learnt:",
        "if False:",
        "test_batch_layout.py::test_length_first_is_no_batch_first",
    ),
    "layout: as many rows as sequences are the sequences": Fault(
        LAYOUT,
        "        if not self.of_transformers or made.media:",
        "        if made.media:",
        "test_batch_layout.py::test_rows_that_are_not_known_are_an_error[1-expert-0]",
    ),
    # DoRA.
    "dora: the factor on the bias as well": Fault(
        DORA,
        "torch.addcmul((1 - factor) * bias, z, factor, out=out)",
        "torch.mul(z, factor, out=out)",
        "test_dora_linear.py::test_leading_dimensions[(2, 3)-torch]",
    ),
    "dora: the norms of W0 alone": Fault(
        DORA,
        "torch.addmm(w.to(dtype), part, a)",
        "w.to(dtype)",
        "test_dora_linear.py::test_a_magnitude_of_the_norms_is_lora",
    ),
    "dora: the norms of what autocast rounded": Fault(
        DORA,
        "weight, lora_a, lora_b = before",
        "weight, lora_a, lora_b = args[1:4]",
        "test_dora_linear.py::test_autocast",
    ),
    "dora: dm with the factor": Fault(
        DORA,
        "(dy.to(factor.dtype) * scaled).reshape",
        "(dy.to(factor.dtype) * scaled * factor).reshape",
        "test_dora_linear.py::test_it_is_the_reference",
    ),
    "dora: B A in one tile": Fault(
        DORA,
        "rows = max(1, TILE // weight.shape[1])",
        "rows = max(1, len(weight))",
        "test_dora_linear.py::test_b_a_is_never_whole",
    ),
    "dora: a row of zeros is divided by its norm": Fault(
        DORA,
        "zeros = norms == 0",
        "zeros = norms < 0",
        "test_dora_linear.py::test_a_row_of_zeros_is_scaled_by_one[torch.float32-torch]",
    ),
    "dora: a magnitude of 16 bits has norms of 32": Fault(
        DORA,
        "rounded = magnitude.dtype if magnitude.dtype.itemsize == 2 else None",
        "rounded = None",
        "test_dora_linear.py::test_the_start_is_the_frozen_layer_to_the_bit[False-torch.bfloat16]",
    ),
    "dora: the bias is added last": Fault(
        DORA,
        "frozen = None if bias is None else bias.detach()",
        "frozen = None",
        "test_dora_linear.py::test_leading_dimensions[(2, 3)-torch]",
    ),
    # PEFT's layers.
    "peft: an adapter within the base layer is passed by": Fault(
        PEFT,
        "    base = layer.base_layer\n    if type(base) is not wanted:",
        "    base = layer.get_base_layer()\n    if type(base) is not wanted:",
        "test_peft_layers.py::test_an_adapter_within_the_base_layer_is_computed[loha-]",
    ),
    "peft: the forward that a hook has kept stays PEFT's": Fault(
        PEFT,
        "for name in kept:",
        "for name in ():",
        "test_peft_layers.py::test_a_dispatched_model_is_fused_through_its_hooks",
    ),
    "peft: a boolean scale": Fault(
        PEFT,
        "value.is_complex() or value.dtype == torch.bool",
        "value.is_complex()",
        "test_peft_layers.py::test_other_scales_are_pefts[boolean-linear]",
    ),
    "peft: what was traced is kept": Fault(
        PEFT,
        "if dispatch.traced(x):",
        "if False:",
        "test_peft_layers.py::test_nothing_that_was_traced_is_kept[export-]",
    ),
    "groups: what a layer was is not compared": Fault(
        "integrations/shared_input.py",
        "if looked is not None and _stamp(looked) == found.stamp:",
        "if looked is not None:",
        "test_peft_groups.py::test_what_changes_of_a_layer_in_between_is_seen[llama-scaling]",
    ),
    "peft: lora_bias without its scale, alone": Fault(
        PEFT,
        "return own * scale, None",
        "return own, None",
        "test_peft.py::test_logits_and_gradients[llama-bias-fp32]",
    ),
    "peft: lora_bias without its scale, folded": Fault(
        PEFT,
        "torch.add(bias, own, alpha=scale)",
        "torch.add(bias, own)",
        "test_peft.py::test_logits_and_gradients[bert-bias-fp32]",
    ),
    "peft: lora_bias without its scale, in 16 bits": Fault(
        PEFT,
        "y.add_(own * scale)",
        "y.add_(own)",
        "test_peft.py::test_sixteen_bits[bias]",
    ),
    "peft: one look passes hooks by": Fault(
        PEFT,
        "or _hooks(b, device) or _hooks(dropout, device)",
        "or _hooks(b, device)",
        "test_peft.py::test_hooks_on_inner_layers_are_called[dropout]",
    ),
    "peft: one look drops outside of training": Fault(
        PEFT,
        "p = dropout.p if dropout.training and type(dropout)",
        "p = dropout.p if type(dropout)",
        "test_peft.py::test_nothing_is_dropped_in_evaluation",
    ),
    "peft: an adapter over a quantised layer without its scale": Fault(
        PEFT,
        "y = lora_add(y, x, a, b, scale=scale, dropout_p=_probability(layer, name))",
        "y = lora_add(y, x, a, b, scale=1.0, dropout_p=_probability(layer, name))",
        "test_quantised.py::test_accelerate_of_pefts_quantised_layers[rslora-4 bit]",
    ),
    "peft: an adapter over a quantised layer is never dropped": Fault(
        PEFT,
        "y = lora_add(y, x, a, b, scale=scale, dropout_p=_probability(layer, name))",
        "y = lora_add(y, x, a, b, scale=scale)",
        "test_quantised.py::test_a_layer_of_peft_around_a_quantised_one"
        "[0.3-False-torch.float32-nf4]",
    ),
    "adapter: a 4-bit base packs its weight for inference": Fault(
        "nn/adapter.py",
        "            keep_unpacked_(module)",
        "            pass",
        "test_quantised.py::test_a_4_bit_weight_is_not_packed_under_an_adapter[own-nf4]",
    ),
    "peft: a 4-bit base packs its weight for inference": Fault(
        PEFT,
        "type(layer) in forms and keep_unpacked_(layer.base_layer)",
        "False",
        "test_quantised.py::test_a_4_bit_weight_is_not_packed_under_an_adapter[PEFT-fp4]",
    ),
    "a weight of 4 bits unpacked with its scales transposed": Fault(
        "nn/checks.py",
        "state.absmax.t().float().flatten()",
        "state.absmax.float().flatten()",
        "test_quantised.py::test_a_4_bit_weight_is_not_packed_under_an_adapter[own-fp4, packed]",
    ),
    "a weight of 4 bits unpacked with new scales": Fault(
        "nn/checks.py",
        "        state.original_nested = False",
        "",
        "test_quantised.py::test_a_4_bit_weight_is_not_packed_under_an_adapter[own-nf4, packed]",
    ),
    "groups: a tensor of the same values for the same": Fault(
        "integrations/shared_input.py",
        "waiting.x is x and waiting.state == _state(x)",
        "waiting.x.shape == x.shape",
        "test_peft_groups.py::test_another_tensor_is_computed_alone",
    ),
    "groups: what changed x in between is not seen": Fault(
        "integrations/shared_input.py",
        "(id(t), t._version, ",
        "(id(t), ",
        "test_peft_groups.py::test_what_changes_in_between_is_seen[x, in place]",
    ),
    "groups: outputs are handed out twice": Fault(
        "integrations/shared_input.py",
        "waiting.outputs.pop(id(layer), None)",
        "waiting.outputs.get(id(layer))",
        "test_peft_groups.py::test_order_does_not_matter",
    ),
    "groups: dropout with one mask for all": Fault(
        PEFT,
        "if found is None or found[-1] > 0:",
        "if found is None:",
        "test_peft_groups.py::test_where_they_cannot_be_computed_together[dropout]",
    ),
    "swap: a merged weight keeps the adapter before": Fault(
        "nn/linear.py",
        "[self._product(-1), new]",
        "[new]",
        "test_save_adapter.py::test_swap_adapter[True-none]",
    ),
    "merge: what the weight cannot hold is written": Fault(
        "nn/linear.py",
        "return bool(bound < torch.finfo(weight.dtype).max / 2)",
        "return True",
        "test_inject.py::test_a_model_is_merged_whole_or_not_at_all[dtype0-60000.0-none]",
    ),
    "merge: a layer is written before the next is looked at": Fault(
        INJECT,
        """        layer.check_merge(repr(name))
    for layer in layers.values():
        layer.merge(keep_base)""",
        """        layer.merge(keep_base)""",
        "test_inject.py::test_a_model_is_merged_whole_or_not_at_all[dtype0-60000.0-none]",
    ),
    "an adapter that comes from meta is not drawn": Fault(
        "nn/linear.py",
        "if from_meta and not self.lora_a.is_meta:",
        "if False:",
        "test_nn.py::test_what_comes_from_the_meta_device_has_an_adapter[built-LoRALinear]",
    ),
    "merging into a weight that is made anew": Fault(
        "nn/linear.py",
        "if own not in layer._parameters:",
        "if False:",
        "test_like_linear.py::test_what_is_made_anew_at_each_call_is_computed_with_but_not_written"
        "[weight-parametrize-LoRALinear]",
    ),
    "adapters of PEFT are adapted": Fault(
        "nn/checks.py",
        "if not _PEFT_KINDS.isdisjoint(bases):",
        "if False:",
        "test_inject.py::test_a_model_of_peft_keeps_its_adapters",
    ),
    "a float64 scale rounded to fp32": Fault(
        OP,
        "wide = torch.promote_types(x.dtype, torch.float32)",
        "wide = torch.float32",
        "test_torch.py::test_a_float64_scale_is_exact_in_fp64[False-lora_linear]",
    ),
    "DePT keeps the words before": Fault(
        "nn/dept.py",
        "            self.embedding.weight = words",
        "            pass",
        "test_like_linear.py::test_a_duplicate_is_the_same_and_its_own[DePT-assign]",
    ),
    "a resize loses the adapter of the head": Fault(
        INJECT,
        "    _keep_head(model, new.values())\n",
        "",
        "test_inject.py::test_a_resize_does_not_lose_the_adapter_of_the_head[as it is-False]",
    ),
    "swap: the folder's scale is not taken": Fault(
        "checkpoint/model.py",
        "layer.swap(weights.lora_a, weights.lora_b, scale=weights.scale, gate=weights.gate)",
        "layer.swap(weights.lora_a, weights.lora_b, gate=weights.gate)",
        "test_save_adapter.py::test_swap_adapter[False-none]",
    ),
    "peft: DoRA without what was dropped": Fault(
        PEFT,
        "y = F.linear(x, base.weight, base.bias)",
        "y = F.linear(kept, base.weight, base.bias)",
        "test_peft.py::test_dora_drops_as_peft_does[llama]",
    ),
    "peft: an embedding without its padding word": Fault(
        PEFT,
        "scale=scale, padding_idx=padding_idx)",
        "scale=scale)",
        "test_peft.py::test_the_padding_word_has_no_gradient",
    ),
    "peft: every adapter drops as the first does": Fault(
        PEFT,
        "y = lora_add(y, x, a, b, scale=scale, dropout_p=p)",
        "y = lora_add(y, x, a, b, scale=scale, dropout_p=0.3)",
        "test_peft.py::test_dropout_under_the_same_mask[llama-two-fp32]",
    ),
    "peft: an adapter on top of itself, merged": Fault(
        PEFT,
        "or (layer.merged and mixed is None)",
        "",
        "test_peft.py::test_everything_that_switches_adapters[llama]",
    ),
    # The proximal step: the published code of SoRA has the first of these two.
    "soft threshold: gates up to 2 xi are zeroed": Fault(
        THRESHOLD,
        "torch._foreach_clamp_max_(removed, xi)",
        "torch._foreach_clamp_max_(removed, 2 * xi)",
        "test_soft_threshold.py::test_minimises_the_penalised_distance[torch]",
    ),
    "soft threshold: gates below -xi are left alone": Fault(
        THRESHOLD,
        "torch._foreach_clamp_min(wide, -xi)",
        "torch._foreach_clamp_min(wide, 0.0)",
        "test_soft_threshold.py::test_minimises_the_penalised_distance[torch]",
    ),
    "adalora: the uncertainty left out of the importance": Fault(
        ADALORA,
        "scores = [i * u for i, u in both]",
        "scores = [i for i, u in both]",
        ALLOCATION,
    ),
    "adalora: deviations from the last mean": Fault(
        ADALORA,
        "torch._foreach_sub_(now, sensitivity)",
        "torch._foreach_sub_(now, uncertainty)",
        ALLOCATION,
    ),
    "adalora: sums in place of means": Fault(
        ADALORA,
        "s.mean(dim) for s in scores",
        "s.sum(dim) for s in scores",
        ALLOCATION,
    ),
    "adalora: the importance of the parameters after the step": Fault(
        ADALORA,
        "        self.allocator.update()\n        self.optimizer.step()",
        "        self.optimizer.step()\n        self.allocator.update()",
        ALLOCATION,
    ),
    "adalora: lambdas are free after the last choice": Fault(
        ADALORA,
        "(chooses or step > last)",
        "chooses",
        "test_adalora.py::test_between_choices_lambdas_are_free_and_at_the_end_they_are_not",
    ),
    "adalora: all that tie with the last are cut": Fault(
        ADALORA,
        "order = torch.sort(flat, descending=True, stable=True).indices",
        "order = torch.nonzero(flat > flat.sort(descending=True)[0][budget]).flatten()",
        "test_adalora.py::test_of_equal_scores_the_earlier_stay",
    ),
    "adalora: P P^T": Fault(
        ADALORA,
        "gram = z.mT @ z if columns",
        "gram = z @ z.mT if columns",
        "test_adalora.py::test_the_squared_penalty_and_its_gradient_in_fp64",
    ),
    "prune: the gate is not folded": Fault(
        PRUNE,
        "folded = (wide * gate[kept]).to(b.dtype)",
        "folded = wide.to(b.dtype)",
        "test_prune.py::test_what_is_cut_and_folded",
    ),
    "prune: the scale of the rank that is left": Fault(
        PRUNE,
        "layer.lora_alpha, layer.scale = scale * rank, scale",
        "layer.lora_alpha, layer.scale = layer.lora_alpha, layer.lora_alpha / rank",
        "test_prune.py::test_adalora_becomes_lora_of_the_ranks_that_its_budget_left[plain]",
    ),
    "prune: positive gates alone are kept": Fault(
        PRUNE,
        "kept = gate.nonzero().flatten()",
        "kept = (gate > 0).nonzero().flatten()",
        "test_prune.py::test_what_is_cut_and_folded",
    ),
    # torch, transformers and accelerate.
    "an op that no dispatch mode sees": Fault(
        "ops/dispatch.py",
        "        or is_in_torch_dispatch_mode()\n",
        "",
        TORCH.format("selective_checkpointing_saves_or_computes_the_op_again[True-lora_add]"),
    ),
    "an AMD GPU passes for one of NVIDIA": Fault(
        "ops/dispatch.py",
        "    if (reason := _extension.rocm()) is not None:\n        return reason\n",
        "",
        "test_dispatch.py::test_rocm_is_refused_by_name",
    ),
    "the scale loses its tangent": Fault(
        CHECKS,
        "        check_tangent(op, name, scale)\n",
        "",
        TORCH.format("no_scale_takes_a_tangent[lora_linear]"),
    ),
    "a bank's gate loses its tangent": Fault(
        MULTI,
        'for name in ("scale", "gate"):',
        'for name in ("gate",):',
        TORCH.format("no_tensor_takes_a_tangent[multi_lora_linear]"),
    ),
    "slots that were on meta are not zeroed": Fault(
        BANK,
        "                self.a_slots.zero_()\n",
        "",
        TORCH.format("a_bank_that_is_built_on_meta_serves_once_it_is_filled"),
    ),
    "inputs of reentrant checkpoints require no gradient": Fault(
        INJECT,
        'if getattr(bare, "is_gradient_checkpointing", False):',
        "if False:",
        LLAMA.format("a_reentrant_checkpoint_of_frozen_inputs_is_seen_to"),
    ),
    "the hook of a device_map is lost": Fault(
        INJECT,
        "return add_hook_to_module(_with_adapter(linear, name, config, adapter_dtype), hook)",
        "return _with_adapter(linear, name, config, adapter_dtype)",
        LLAMA.format("adapters_of_a_model_whose_layers_have_a_place"),
    ),
    "an adapter where its offloaded base is": Fault(
        ADAPTER,
        "execution_device(base_module) or ",
        "",
        LLAMA.format("adapters_of_a_model_that_is_offloaded[False]"),
    ),
    "the bias of an offloaded layer is trained": Fault(
        INJECT,
        'trained = "bias" if getattr(module, "bias", None) is not None else trained',
        "pass",
        LLAMA.format("what_is_offloaded_can_not_be_trained_itself"),
    ),
    "merging into the meta device": Fault(
        "nn/linear.py",
        "if self.weight.is_meta or self.lora_a.is_meta:",
        "if False:",
        LLAMA.format("a_model_that_is_offloaded_after_it_has_adapters"),
    ),
    "merging into a weight that is tied by its memory": Fault(
        INJECT,
        "t.data_ptr() if type(t) is torch.nn.Parameter else 0",
        "0",
        LLAMA.format("weights_that_share_memory_are_tied_too"),
    ),
    "a bias stands for a gradient of x": Fault(
        ADAPTER,
        "    return y is x\n",
        "    return True\n",
        "test_adapter.py::test_a_trained_bias_does_not_hide_that_there_is_no_gradient",
    ),
}


# In csrc/, which is then built for the emulated device. A fault in common/ is built into one kernel
# alone, whose name follows the path.
CUDA_FAULTS = {
    "cuda: 6 rounds of Philox": Fault(
        "common/philox.cuh: dropout",
        "round < 7",
        "round < 6",
        "test_dropout.py::test_kernel_bits_are_the_reference_mask[0.5-cuda]",
    ),
    "cpu: 6 rounds of Philox": Fault(
        "dropout_cpu.cpp",
        "round < 7",
        "round < 6",
        "test_dropout.py::test_mask_of_the_torch_backend",
    ),
    "cpu: a row starts where the one before ends": Fault(
        "dropout_cpu.cpp",
        "m * row_calls + first_call",
        "m * runs * kSide + first_call",
        "test_dropout.py::test_mask_of_the_torch_backend",
    ),
    "cuda: columns of a wider input count from its first": Fault(
        "common/philox.cuh: row_reduce",
        "m * row_calls + first_call + call",
        "m * row_calls + call",
        PARTS.format("cuda"),
    ),
    "cuda: the mask of the next eight columns": Fault(
        "common/tile.cuh: shrink",
        "call = col / 8 + i % kCalls;",
        "call = col / 8 + (i + 1) % kCalls;",
        ROWS.format("cuda"),
    ),
    "cuda: a chunk at the end of a row is copied whole": Fault(
        "common/tile.cuh: shrink",
        "left < kChunk<T> ? int(left) : kChunk<T>;",
        "kChunk<T>;",
        "test_cuda_kernels.py::test_every_way_to_read[contiguous-contiguous-(9, 16)-shrink]",
    ),
    "cuda: tiles are swizzled where they are written alone": Fault(
        "common/tile.cuh: segment_gemm",
        "return chunk(row, col / kChunk<T>) + col % kChunk<T>;",
        "return row * COLS + col;",
        "test_cuda_kernels.py::test_every_tile[64-(17, 65)-torch.float16]",
    ),
    "cuda: no swizzle": Fault(
        "common/tile.cuh: segment_gemm",
        "index ^ (row / kRowsOfABank & kSwizzle)",
        "index ^ (row & 0)",
        "test_cuda_kernels.py::test_no_two_rows_of_an_ldmatrix_share_a_bank[torch.float16]",
    ),
    "cuda: halves of the right fragment swapped": Fault(
        "common/tile.cuh: segment_gemm",
        "{b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]}",
        "{b[j / 2][j % 2 * 2 + 1], b[j / 2][j % 2 * 2]}",
        "test_cuda_kernels.py::test_every_tile[64-(17, 65)-torch.float16]",
    ),
    "cuda: one copy too many under way": Fault(
        "segment_gemm.cuh",
        "copy_async_wait<kStages - 2>();",
        "copy_async_wait<kStages - 1>();",
        "test_cuda_kernels.py::test_every_way_to_read[contiguous-contiguous-(64, 65)-segment_gemm]",
    ),
    "cuda: a stage is filled while it is read": Fault(
        "shrink.cuh",
        "sync_block();  // this step's tiles are there, and all warps are done with "
        "those of the last",
        "",
        "test_cuda_kernels.py::test_splits_of_a_long_k[16-None-torch.float16]",
    ),
    "cuda: products of elements that are still to be dropped": Fault(
        "shrink.cuh",
        "nullptr);\n      sync_block();",
        "nullptr);",
        "test_cuda_kernels.py::test_splits_of_a_long_k[16-0.3-torch.float16]",
    ),
    "cuda: shrink: the keep scale left out": Fault(
        "shrink.cuh",
        "values[e] * p.dropout.keep_scale",
        "values[e]",
        ROWS.format("cuda"),
    ),
    "cuda: shrink: all splits in one plane": Fault(
        "shrink.cuh",
        "p.planes[int64_t(block_id().y) * M * adapters.R + out] = h;",
        "p.planes[out] = h;",
        "test_cuda_kernels.py::test_splits_of_a_long_k[16-None-torch.float32]",
    ),
    "cuda: segment_gemm: the mask after all segments": Fault(
        "segment_gemm.cuh",
        "if (!masked && at.segment >= p.masked) {",
        "if (false) {",
        ROWS.format("cuda"),
    ),
    "cuda: segment_gemm: t of other rows' adapters": Fault(
        "segment_gemm.cuh",
        "return slot_of_row[row] == slot ? rows(row) : -1;",
        "return rows(row);",
        "test_cuda_kernels.py::test_t_of_a_row_is_read_for_its_own_adapter",
    ),
    "cuda: segment_gemm: 0 times what another adapter has": Fault(
        "segment_gemm.cuh",
        "if (slots[half * 8 + lane / 4] != slot) continue;",
        "",
        "test_tenants_cuda.py::test_every_tile_of_the_product[33-64-False-nan]",
    ),
    "cuda: segment_gemm: rows whose first adapter is another": Fault(
        "segment_gemm.cuh",
        "if (ballot(slots[lane % 16] == slot) == 0) continue;",
        "if (slots[0] != slot) continue;",
        RAGGED.format("different", "cuda"),
    ),
    "cuda: planes: 0 times the gate of an adapter without rows": Fault(
        "planes.cuh",
        "const bool scaled = live && p.scaled;",
        "const bool scaled = p.scaled;",
        "test_tenants_cuda.py::test_an_adapter_without_rows_gets_no_gradient[3-nan]",
    ),
    "cuda: segment_gemm: an adapter twice": Fault(
        "segment_gemm.cuh",
        "is_first = slot_of_row[i] != slot_of_row[row];",
        "is_first = true;",
        RAGGED.format("different", "cuda"),
    ),
    "cuda: segment_gemm: y is not added to": Fault(
        "segment_gemm.cuh",
        "if (add) value +=",
        "if (false) value +=",
        "test_multi_lora_linear.py::test_add[70-5-torch.float16-cuda]",
    ),
    "cuda: row_reduce: the last rows left out": Fault(
        "row_reduce.cuh",
        "const int64_t steps = divide_up(last - tile.first, BM);",
        "const int64_t steps = (last - tile.first) / BM;",
        "test_row_reduce.py::test_long_columns_are_added_in_planes[cuda]",
    ),
    "cuda: row_reduce: u of the first block of columns alone": Fault(
        "row_reduce.cuh",
        "p.u + (block_c * M + m) * R",
        "p.u + m * R",
        "test_row_reduce.py::test_dy[cuda]",
    ),
    "cuda: planes: the gate in its own gradient": Fault(
        "planes.cuh",
        "if (scaled) sum *= p.adapters.scale_of(slot);",
        "if (scaled) sum *= p.adapters.scale_of(slot) * p.adapters.gate_of(slot, r);",
        "test_row_reduce.py::test_dy[cuda]",
    ),
    "cuda: planes: the first plane alone": Fault(
        "planes.cuh",
        "live && count > 0; --count, ++tile",
        "live && count > 0; count = 0",
        "test_row_reduce.py::test_long_columns_are_added_in_planes[cuda]",
    ),
    "cuda: adapters: tiles of the first of 32": Fault(
        "common/adapters.cuh: shrink",
        "before += shuffle(after, 31);",
        "",
        MANY.format("cuda"),
    ),
    "cuda: decode: the first warp's part of K alone": Fault(
        "decode.cuh",
        "turn == 0 ? values[e] : *to + values[e]",
        "turn == 0 ? values[e] : *to",
        "test_cuda_kernels.py::test_decode",
    ),
    "cuda: decode: the last block's part alone": Fault(
        "decode.cuh",
        "for (int s = 0; s < p.splits; ++s) sum[e] += p.parts",
        "for (int s = 0; s < 1; ++s) sum[e] += p.parts",
        "test_cuda_kernels.py::test_decode",
    ),
    "cuda: decode: the halves of 16 bytes for the wrong step": Fault(
        "decode.cuh",
        "one[2] = {x[j].x, x[j].y}, two[2] = {x[j].z, x[j].w}",
        "one[2] = {x[j].x, x[j].z}, two[2] = {x[j].y, x[j].w}",
        "test_cuda_kernels.py::test_decode",
    ),
    "cuda: decode: the gate of slot 0": Fault(
        "decode.cuh",
        "t *= scale * p.adapters.gate_of(slot, r);",
        "t *= scale * p.adapters.gate_of(0, r);",
        "test_cuda_kernels.py::test_decoding_of_many_adapters[9-dtype0-different]",
    ),
    "cuda: bank: rank rows of the adapter before stay": Fault(
        "bank.cuh",
        "p.bt[r * p.N + n] = live ?",
        "if (live) p.bt[r * p.N + n] = live ?",
        "test_bank.py::test_rank_rows_past_the_rank_are_zero[cuda]",
    ),
}

# In the Hopper kernel. What races on a GPU is a wrong number, or an error, of the emulated machine,
# and takes no torch to be found.
HOPPER = "segment_gemm_sm90.cuh"
SUMS = "hopper_sums"
HOPPER_FAULTS = {
    "a stage is filled before it is released": Fault(
        HOPPER,
        "wait_barrier(shared.empty(ring.stage), ring.parity ^ 1);",
        "",
        SUMS,
    ),
    "the producer waits for the wrong phase": Fault(
        HOPPER,
        "shared.empty(ring.stage), ring.parity ^ 1)",
        "shared.empty(ring.stage), ring.parity)",
        SUMS,
    ),
    "a stage is multiplied before it is full": Fault(
        HOPPER,
        "wait_barrier(shared.full(ring.stage), ring.parity);\n    products_begin();",
        "products_begin();",
        SUMS,
    ),
    "a stage is released while it is multiplied": Fault(
        HOPPER,
        "products_wait<1>();",
        "products_wait<2>();",
        SUMS,
    ),
    "a stage is released for this block alone": Fault(
        HOPPER,
        "arrive_at(shared.empty(stage), lane);",
        "arrive_at(shared.empty(stage), cluster_rank());",
        SUMS,
    ),
    "half of a stage's bytes are announced": Fault(
        HOPPER,
        "arrive_expecting(shared.full(ring.stage), C::kStageBytes);",
        "arrive_expecting(shared.full(ring.stage), C::kStageBytes / 2);",
        SUMS,
    ),
    "barriers of one block's warps": Fault(
        HOPPER,
        "kCluster * kConsumers * 4",
        "kConsumers * 4",
        SUMS,
    ),
    "barriers are not published": Fault(
        HOPPER,
        "publish_barriers();",
        "",
        SUMS,
    ),
    "a block ends before the other is done with it": Fault(
        HOPPER,
        "sync_cluster();  // until then",
        "// until then",
        SUMS,
    ),
    "sums are read while products are under way": Fault(
        HOPPER,
        "products_wait<0>();",
        "",
        SUMS,
    ),
    "products begin with registers that are not ready": Fault(
        HOPPER,
        "ring.parity);\n    products_begin();",
        "ring.parity);",
        SUMS,
    ),
    "rows eight further on": Fault(
        HOPPER,
        "kEight = 8 * kRowBytes;",
        "kEight = 16 * kRowBytes;",
        SUMS,
    ),
    "columns 64 further on": Fault(
        HOPPER,
        "TRANSPOSED ? kBlockK * kRowBytes : 16",
        "TRANSPOSED ? 8 * kRowBytes : 16",
        SUMS,
    ),
    "the last product of an adapter is dropped": Fault(
        HOPPER,
        "product * kProductK < K % kBlockK",
        "(product + 1) * kProductK < K % kBlockK",
        SUMS,
    ),
    "both blocks bring the same half": Fault(
        HOPPER,
        "right_map, n0 + row, k, full",
        "right_map, n0, k, full",
        SUMS,
    ),
    "TMA stores what is not published": Fault(
        HOPPER,
        "publish_to_async_proxy();",
        "",
        SUMS,
    ),
    "an output is overwritten before it is stored": Fault(
        HOPPER,
        "if (thread == 0) store_wait_read<C::kOutputs - 1>();",
        "",
        SUMS,
    ),
    "a block ends before its last output is stored": Fault(
        HOPPER,
        "if (thread_id() % 128 == 0) store_wait_read<0>();",
        "",
        SUMS,
    ),
    "an output is stored before all warps have written it": Fault(
        HOPPER,
        "publish_to_async_proxy();\n      sync_warpgroup(1 + consumer);",
        "publish_to_async_proxy();",
        SUMS,
    ),
    "the output's swizzle left out": Fault(
        HOPPER,
        "(chunk ^ row % 8) * 16",
        "chunk * 16",
        SUMS,
    ),
    "the adapter is not waited for": Fault(
        HOPPER,
        "if (i == p.waits_from) wait_for_grid_ahead();",
        "",
        SUMS,
    ),
    "the mask after all segments": Fault(
        HOPPER,
        "i + 1 == p.masked",
        "i + 1 == p.count",
        SUMS,
    ),
    "the left operand's halves swapped": Fault(
        HOPPER,
        "load_box_to_both(left + row * kRowBytes, left_map, m0 + row, k, full);",
        "load_box_to_both(left + row * kRowBytes, left_map, m0 + C::kLeftBox - row, k, full);",
        SUMS,
    ),
    "base of the column beside it": Fault(
        HOPPER,
        "*p.base.at(m, n)",
        "*p.base.at(m, n ^ 1)",
        SUMS,
    ),
    "the last group of rows as high as the others": Fault(
        HOPPER,
        "left < kGroupRows ? left : kGroupRows;",
        "kGroupRows;",
        SUMS,
    ),
    "every block from the first tile on": Fault(
        HOPPER,
        "index += step;",
        "index += 1;",
        SUMS,
    ),
}


def some(faults, n):
    """The names of all, of which the quick run takes one in n."""
    return [slow(name) if i % n else name for i, name in enumerate(faults)]


def test_every_fault_can_be_planted(tmp_path):
    copy_package(PACKAGE, KERNELS, tmp_path)
    shutil.copytree(emulated.CSRC, tmp_path / "csrc")
    for fault in FAULTS.values():
        plant(fault, tmp_path / "fused_lora" / fault.file, write=False)
    for fault in CUDA_FAULTS.values():
        plant(fault, tmp_path / "csrc" / fault.file.partition(": ")[0], write=False)
    for fault in HOPPER_FAULTS.values():
        plant(fault, tmp_path / "csrc" / fault.file, write=False)


@pytest.mark.slow
def test_every_test_passes_without_a_fault(tmp_path):
    faults = *FAULTS.values(), *(CUDA_FAULTS.values() if CUDA_REFUSES is None else ())
    tests = sorted({fault.test for fault in faults})
    outcomes, printed = run_tests(copy_package(PACKAGE, KERNELS, tmp_path), tests)
    assert outcomes == [PASSED] * len(tests), printed


@pytest.mark.parametrize("name", some(FAULTS, 12))
def test_fault_is_caught(name, tmp_path):
    fault = FAULTS[name]
    outcomes, printed = run_tests(copy_package(PACKAGE, KERNELS, tmp_path, fault), [fault.test])
    assert outcomes != [PASSED], f"the fault {name!r} survived {fault.test}"
    assert outcomes == [CAUGHT], f"{name!r} broke {fault.test}: {outcomes}\n{printed}"


@pytest.mark.skipif(CUDA_REFUSES is not None, reason=str(CUDA_REFUSES))
@pytest.mark.parametrize("name", some(CUDA_FAULTS, 16))
def test_fault_in_csrc_is_caught(name, tmp_path):
    fault, csrc = CUDA_FAULTS[name], tmp_path / "csrc"
    shutil.copytree(emulated.CSRC, csrc)
    file, _, kernel = fault.file.partition(": ")
    plant(fault, csrc / file)
    library = emulated.build(other=csrc, stem=kernel or Path(file).stem)
    source = copy_package(PACKAGE, KERNELS, tmp_path / "package")
    outcomes, printed = run_tests(source, [fault.test], FUSED_LORA_EMULATED=str(library))
    assert outcomes != [PASSED], f"the fault {name!r} survived {fault.test}"
    assert outcomes == [CAUGHT], f"{name!r} broke {fault.test}: {outcomes}\n{printed}"


@pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))
@pytest.mark.parametrize("name", some(HOPPER_FAULTS, 26))
def test_fault_in_the_hopper_kernel_is_caught(name, tmp_path):
    fault, csrc = HOPPER_FAULTS[name], tmp_path / "csrc"
    shutil.copytree(emulated.CSRC, csrc)
    plant(fault, csrc / fault.file)
    run = emulated.run_program(fault.test, csrc, tmp_path)
    assert run.returncode == 1, f"the fault {name!r} survived: {run}"
