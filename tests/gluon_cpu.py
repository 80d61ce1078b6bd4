"""Run segment_gemm_hopper.py on the CPU: its own source, on models of what it asks of Gluon.

Triton has no interpreter for Gluon. Here the partitions of a block are threads of which one runs at
a time. Who goes on at a wait is drawn from a seed, as is the moment at which anything asynchronous
happens: a TMA load arrives, a TMA store reads its tile, a wgmma reads its operands, the kernel
before ends. From its start to its arrival a load leaves NaN in its place. So a stage that is
overwritten too early, a barrier with a wrong count or parity, or a missing wait either gives a
wrong y, or stops the block and raises.
"""

import importlib.util
import random
import sys
import threading
import types
from pathlib import Path
from unittest import mock

import fused_lora.triton_kernels
import numpy as np
import torch
from fused_lora.triton_kernels import configs
from fused_lora.triton_kernels.segment_gemm import swizzle2d

SOURCE = Path(fused_lora.triton_kernels.__file__).with_name("segment_gemm_hopper.py")
# Triton's names of the copies into shared memory and out of it, until 3.8 and since.
COPIES = {
    "old": ("async_copy_global_to_shared", "async_copy_shared_to_global"),
    "new": ("async_load", "async_store"),
}


class Stop(BaseException):
    """Ends the threads of a block that has failed."""


class Task(threading.Thread):
    def __init__(self, schedule, call, weight):
        super().__init__(daemon=True)
        self.schedule, self.call, self.weight = schedule, call, weight
        self.go, self.ready = threading.Semaphore(0), lambda: True
        self.done, self.error, self.stores = False, None, 0

    def run(self):
        try:
            self.pause()
            self.call()
        except BaseException as error:
            self.error = error
        self.done = True
        self.schedule.back.release()

    def pause(self):
        self.go.acquire()
        if self.schedule.failed:
            raise Stop

    def wait(self, ready):
        self.ready = ready
        self.schedule.back.release()
        self.pause()


class Schedule:
    """What a block does next."""

    def __init__(self, seed):
        self.random, self.back = random.Random(seed), threading.Semaphore(0)
        self.events, self.unfenced, self.failed = [], set(), False
        # Some partitions and some kinds of events are slow, others in other schedules.
        self.weights = {}

    def weight(self, kind):
        return self.weights.setdefault(kind, self.random.choice((0.001, 0.05, 1.0)))

    def later(self, kind, event):
        self.events.append((self.weight(kind), event))

    def run(self, calls):
        tasks = [Task(self, call, self.weight(i)) for i, call in enumerate(calls)]
        for task in tasks:
            task.start()
        try:
            while not all(task.done for task in tasks):
                ready = [task for task in tasks if not task.done and task.ready()]
                assert ready or self.events, "deadlock: every partition waits"
                weights = [task.weight for task in ready] + [weight for weight, _ in self.events]
                chosen = self.random.choices([*ready, *self.events], weights)[0]
                if isinstance(chosen, Task):
                    chosen.go.release()
                    self.back.acquire()
                    if chosen.error is not None:
                        raise chosen.error
                else:
                    self.events.remove(chosen)
                    chosen[1]()
        finally:
            self.failed = True
            for task in tasks:
                if not task.done:
                    task.go.release()
                task.join()
        while self.events:
            self.events.pop(self.random.randrange(len(self.events)))[1]()


class Tensor(np.ndarray):
    type = types.SimpleNamespace(layout=None)

    def to(self, dtype):
        return self.astype(dtype)


def tensor(array) -> Tensor:
    return np.asarray(array).view(Tensor)


class Constexpr(int):
    value = property(int)


class Pointer:
    def __init__(self, flat, offset=0):
        self.flat, self.offset = flat, offset

    def __add__(self, offset):
        return Pointer(self.flat, self.offset + offset)


class Descriptor:
    """A view of a torch tensor, and how often each of its elements has been written."""

    layout = None

    def __init__(self, base, shape, strides, box, layout):
        assert len(shape) == len(strides) == len(box) == 2 and strides[1] == 1
        assert base.data_ptr() % 16 == 0 and strides[0] * base.itemsize % 16 == 0
        self.array = base.as_strided(shape, strides).numpy()
        self.dtype, self.written = self.array.dtype, np.zeros(shape, np.int64)
        nbytes = box[0] * box[1] * base.itemsize
        self.block_type = types.SimpleNamespace(shape=box, nbytes=nbytes)

    def box(self, at):
        """(place in the array, place in the box) of what of the box is within the array."""
        inside, corner = [], []
        for begin, size, whole in zip(at, self.block_type.shape, self.array.shape, strict=True):
            inside.append(slice(begin, min(begin + size, whole)))
            corner.append(slice(0, max(0, min(size, whole - begin))))
        return tuple(inside), tuple(corner)


class Barrier:
    def __init__(self, block):
        self.block, self.count = block, None

    def init(self, count):
        self.count = self.pending = int(count)
        self.bytes = self.phase = 0
        self.block.schedule.unfenced.add(self)

    def complete(self, arrivals=0, nbytes=0):
        assert self not in self.block.schedule.unfenced, "a barrier is used before the fence"
        self.pending -= arrivals
        self.bytes += nbytes
        assert self.pending >= 0, "more arrivals at a barrier than it counts"
        if self.pending == self.bytes == 0:
            self.phase ^= 1
            self.pending = self.count


class Shared:
    """Shared memory, or a view of it."""

    def __init__(self, block, array):
        self.block, self.array, self.shape = block, array, array.shape

    def index(self, i):
        return Shared(self.block, self.array[i])

    def slice(self, start, length, dim):
        assert start + length <= self.shape[dim]
        at = [slice(None)] * self.array.ndim
        at[dim] = slice(start, start + length)
        return Shared(self.block, self.array[tuple(at)])

    def permute(self, order):
        return Shared(self.block, self.array.transpose(order))

    def store(self, value):
        assert self.shape == value.shape
        self.array[...] = value
        self.block.schedule.unfenced.add(self.array.ctypes.data)


class Barriers:
    def __init__(self, block, count):
        self.barriers, self.shape = [Barrier(block) for _ in range(count)], (count, 1)

    def index(self, i):
        return self.barriers[i]


class Block:
    """One program of the grid: what the names that the kernel imports do."""

    def __init__(self):
        self.pid = self.programs = self.schedule = None
        self.late = []  # (place, values) that the kernel before has not written yet

    def start(self, pid, programs, seed):
        self.pid, self.programs, self.schedule = pid, programs, Schedule(seed)
        self.before_ended = False
        for place, _ in self.late:
            place.fill_(float("nan"))
        self.schedule.later("before", self.end_before)

    def end_before(self):
        for place, values in self.late:
            place.copy_(values)
        self.before_ended = True

    def wait(self, ready):
        threading.current_thread().wait(ready)

    def gdc_wait(self):
        self.wait(lambda: self.before_ended)

    def allocate(self, dtype, shape, layout):
        if len(shape) == 2:
            return Barriers(self, shape[0])
        return Shared(self, np.full(shape, np.nan, dtype))

    def fence(self):
        self.schedule.unfenced.clear()

    def load(self, desc, at, barrier, to):
        to.array[...] = np.nan

        def arrive():
            inside, corner = desc.box(at)
            to.array[...] = 0
            to.array[corner] = desc.array[inside]
            barrier.complete(nbytes=-desc.block_type.nbytes)

        assert to.shape == tuple(desc.block_type.shape)
        self.schedule.later("load", arrive)

    def store(self, desc, at, source):
        task = threading.current_thread()
        assert source.array.ctypes.data not in self.schedule.unfenced, "a store without a fence"
        task.stores += 1

        def leave():
            inside, corner = desc.box(at)
            desc.array[inside] = source.array[corner]
            desc.written[inside] += 1
            task.stores -= 1

        self.schedule.later("store", leave)

    def store_wait(self, pending):
        task = threading.current_thread()
        task.wait(lambda: task.stores <= pending)

    def mma(self, lhs, rhs, acc, is_async):
        assert is_async
        token = types.SimpleNamespace(done=False, acc=acc, before=getattr(acc, "before", None))

        def multiply():
            product = lhs.array.astype(np.float32) @ rhs.array.astype(np.float32)
            token.acc, token.done = tensor(acc + product), True

        self.schedule.later("mma", multiply)
        return token

    def mma_wait(self, pending, deps):
        (token,) = deps
        self.wait(lambda: pending > 0 or token.done)
        return token.acc

    def barrier_wait(self, barrier, parity):
        assert barrier not in self.schedule.unfenced, "a barrier is used before the fence"
        self.wait(lambda: barrier.phase != parity)

    def specialize(self, partitions, warps, registers):
        def call(function, arguments):
            return lambda: function(*arguments)

        self.schedule.run([call(*partition) for partition in partitions])

    def modules(self, copies: str) -> dict[str, types.ModuleType]:
        """{name: module} of what segment_gemm_hopper.py imports from Triton."""

        def module(name, **attributes):
            made = types.ModuleType(name)
            made.__dict__.update(attributes)
            return made

        def load(pointer, mask, other):
            index = np.where(mask, pointer.offset, 0)
            return tensor(np.where(mask, pointer.flat[index], other))

        def jit(fn=None, **options):
            return fn if fn is not None else lambda fn: fn

        def cdiv(a, b):
            return -(-a // b)

        layouts = ("SliceLayout", "NVMMADistributedLayout", "DistributedLinearLayout")
        gl = module(
            "gl",
            constexpr=Constexpr,
            static_range=range,
            cdiv=cdiv,
            program_id=lambda axis: self.pid,
            num_programs=lambda axis: self.programs,
            arange=lambda begin, end, layout: tensor(np.arange(begin, end)),
            zeros=lambda shape, dtype, layout: tensor(np.zeros(shape, dtype)),
            where=lambda condition, a, b: tensor(np.where(condition, a, b).astype(np.float32)),
            load=load,
            convert_layout=lambda value, layout, assert_trivial: value,
            allocate_shared_memory=self.allocate,
            warp_specialize=self.specialize,
            NVMMASharedLayout=types.SimpleNamespace(get_default_for=lambda box, dtype: None),
            **{name: lambda *arguments, **named: None for name in layouts},
            **{name: getattr(np, name) for name in ("int64", "float16", "float32")},
            bfloat16=None,
        )
        hopper = module(
            "hopper",
            fence_async_shared=self.fence,
            mbarrier=module(
                "mbarrier",
                MBarrierLayout=lambda: None,
                init=lambda barrier, count: barrier.init(count),
                wait=self.barrier_wait,
                expect=lambda barrier, nbytes: barrier.complete(arrivals=1, nbytes=nbytes),
                arrive=lambda barrier: barrier.complete(arrivals=1),
            ),
            tma=module(
                "tma",
                store_wait=self.store_wait,
                **dict(zip(COPIES[copies], (self.load, self.store), strict=True)),
            ),
            warpgroup_mma=self.mma,
            warpgroup_mma_wait=self.mma_wait,
        )
        tl = module("tl", cdiv=cdiv, minimum=min, constexpr=Constexpr)
        gluon = module("gluon", jit=jit, language=gl)
        triton = module("triton", jit=jit, constexpr_function=jit, cdiv=cdiv, language=tl)
        prefix = "triton.experimental.gluon"
        return {
            "triton": triton,
            "triton.language": tl,
            "triton.language.extra.cuda": module("cuda", gdc_wait=self.gdc_wait),
            "triton.experimental": module("experimental", gluon=gluon),
            prefix: gluon,
            f"{prefix}.language": gl,
            f"{prefix}.language.nvidia.hopper": hopper,
            f"{prefix}.nvidia.hopper": module("nvidia", TensorDescriptor=Descriptor),
        }


class Emulated:
    """segment_gemm of segment_gemm_hopper.py, on a device of so many multiprocessors.

    `fault` is None or (old, new): a piece of the source, and what is there instead. The operands in
    `late` have their values only when the kernel before ends. `copies` tells by which names.
    """

    def __init__(self, *, multiprocessors=2, fault=None, copies="new"):
        self.block, self.seed = Block(), 0
        source = SOURCE.read_text()
        if fault is not None:
            assert source.count(fault[0]) == 1, f"not once in {SOURCE.name}: {fault[0]!r}"
            source = source.replace(*fault)
        spec = importlib.util.spec_from_file_location(
            "fused_lora.triton_kernels.segment_gemm_emulated", SOURCE
        )
        self.module = importlib.util.module_from_spec(spec)
        modules = self.block.modules(copies)
        with mock.patch.dict(sys.modules, modules):
            exec(compile(source, SOURCE, "exec"), self.module.__dict__)
        self.module.launch = self.launch
        self.module.configs = types.SimpleNamespace(
            **(vars(configs) | {"capability": lambda device: 90})
        )
        self.module._multiprocessors = lambda device: multiprocessors
        self.module.swizzle2d = types.FunctionType(
            swizzle2d.fn.__code__, {"tl": modules["triton.language"]}
        )

    def launch(self, kernel, grid, device, *args, num_warps, overlap, **meta):
        self.grid, self.overlap = grid, overlap
        args = [
            Pointer(arg.flatten().numpy()) if isinstance(arg, torch.Tensor) else arg for arg in args
        ]
        for pid in range(grid[0]):
            self.block.start(pid, grid[0], f"{self.seed} {pid}")
            kernel(*args, **meta)
        (y,) = [arg for arg in args if isinstance(arg, Descriptor)][-1:]
        assert (y.written == 1).all(), "an element of y is not written once"

    def segment_gemm(self, segments, *, seed=0, late=(), **arguments):
        self.seed, self.block.late = seed, [(place, place.clone()) for place in late]
        return self.module.segment_gemm(segments, **arguments)


def install(monkeypatch, **options) -> Emulated:
    """From here on the launchers find the emulated kernel where they look for the other."""
    emulated, package = Emulated(**options), fused_lora.triton_kernels
    monkeypatch.setattr(package, "segment_gemm_hopper", emulated.module, raising=False)
    monkeypatch.setitem(sys.modules, f"{package.__name__}.segment_gemm_hopper", emulated.module)
    return emulated
