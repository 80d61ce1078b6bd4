"""Processes that are the ranks of one gloo group, and run one function after the other, together.

They are forked from a server that has loaded torch, and stay for all tests of a module: starting
them costs more than what they run.
"""

import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait

_server = multiprocessing.get_context("forkserver")
PRELOAD = [
    "torch._dynamo",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.nn.parallel",
]
_server.set_forkserver_preload(PRELOAD)
_TIMEOUT = 120  # seconds


class Ranks:
    """`size` processes; Ranks(2).run(fn, *args) calls fn(*args) in each and returns the results."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._started: list[tuple] = []
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")

    def _start(self) -> None:
        import fused_lora

        store = tempfile.mktemp(dir=self._folder.name)
        for rank in range(self.size):
            ours, theirs = _server.Pipe()
            args = rank, self.size, store, theirs, fused_lora.__file__
            process = _server.Process(target=_serve, args=args, daemon=True)
            process.start()
            theirs.close()
            self._started.append((process, ours))

    def run(self, fn: Callable, *args, **kwargs) -> list:
        """The results by rank. The first failure of any rank is raised: AssertionError where it
        was one, else RuntimeError, with its traceback; all ranks then start anew."""
        if not self._started:
            self._start()
        pipes = [pipe for _, pipe in self._started]
        for pipe in pipes:
            pipe.send((fn, args, kwargs))
        results: dict = {}
        last = time.monotonic() + _TIMEOUT
        while len(results) < self.size:
            ready = wait([p for p in pipes if p not in results], last - time.monotonic())
            if not ready:
                self.close()
                raise AssertionError(f"ranks wait for each other for ever in {fn.__name__}")
            for pipe in ready:
                try:
                    failure, results[pipe] = pipe.recv()
                except EOFError:
                    failure, results[pipe] = RuntimeError, f"rank {pipes.index(pipe)} died"
                if failure is not None:
                    message = f"rank {pipes.index(pipe)}: {results[pipe]}"
                    self.close()
                    raise failure(message)
        return [results[pipe] for pipe in pipes]

    def close(self) -> None:
        for process, pipe in self._started:
            pipe.close()
            process.kill()
            process.join()
        self._started = []


def _serve(rank: int, size: int, store: str, pipe, package: str) -> None:
    import torch
    import torch.distributed as dist

    import fused_lora

    assert fused_lora.__file__ == package, f"{fused_lora.__file__} is not {package}"
    torch.set_num_threads(1)
    os.environ.update(GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    while True:
        try:
            fn, args, kwargs = pipe.recv()
        except EOFError:
            break
        try:
            answer = None, fn(*args, **kwargs)
        except Exception as error:
            kind = AssertionError if isinstance(error, AssertionError) else RuntimeError
            answer = kind, traceback.format_exc()
        pipe.send(answer)
    sys.stdout.flush()
    os._exit(0)  # the others may be gone, and destroy_process_group would wait for them
