"""Which route of a store is open in a thread, a task, a generator or a recomputation.

A route is open from its `with` to the end of the block, in the context (contextvars) of that block.
A context has the innermost one, which knows the next one out.
"""

import contextlib
import contextvars
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from types import FrameType

import torch
import torch.utils.checkpoint

from fused_lora.ops.routing import AdapterRouting


class Route:
    """What a block routes its batches to.

    routing: None is the base. uniform: the one of all rows, whatever their number, where the host
    knows that they have one and the same adapter. ids: those that the route uses; its store gives
    none of them away while a Hold has it. repeats: how often a sequence may occur in a row.
    """

    def __init__(
        self,
        store,
        routing: AdapterRouting | None,
        ids: frozenset[int],
        uniform: AdapterRouting | None = None,
    ) -> None:
        self.store, self.routing, self.ids, self.uniform = store, routing, ids, uniform
        self.repeats = {1}


class Hold:
    """Keeps the ids of a route in use until it is released, or gone."""

    def __init__(self, route: Route) -> None:
        self.route: Route | None = route
        route.store.hold(route)

    def release(self) -> None:
        route, self.route = self.route, None
        if route is not None:
            route.store.release(route)

    __del__ = release


class Opened:
    """A route that is open, or a curtain (route None): nothing further out is seen."""

    def __init__(self, route: Route | None, outer: "Opened | None", opener=None) -> None:
        self.route, self.outer, self.ended = route, outer, False
        self.opener: FrameType | None = opener  # the generator whose block it is
        self.in_generator = opener is not None
        self.graph_task = torch._C._current_graph_task_id()
        # The blocks of generators that wait now: those that run again later are further in.
        self.waiting = [further for further in chain(outer) if not further.is_seen()]

    def is_seen(self) -> bool:
        """A generator's block is not that of its consumer, in whose context it yields."""
        if not self.in_generator:
            return True
        return not self.ended and self.opener is not None and self.opener.f_back is not None


def chain(opened: Opened | None) -> Iterator[Opened]:
    """This one and those further out."""
    while opened is not None:
        yield opened
        opened = opened.outer


innermost: contextvars.ContextVar[Opened | None] = contextvars.ContextVar(
    "fused_lora innermost route", default=None
)
# The calls of served models that are under way (see batch_layout.Call).
call: contextvars.ContextVar = contextvars.ContextVar("fused_lora call", default=None)


def find(store) -> Opened | None:
    """What is open of a store here; None: nothing.

    RuntimeError for a route that ended, and in a backward pass for what was opened outside of it:
    the recomputation of a checkpoint would take it for that of its forward.
    """
    opened = _look(store)
    if opened is not None and opened.ended:
        raise RuntimeError(
            "AdapterStore: the route that this task or thread began in has ended; keep its block "
            "open until then, or start the function as store.bind(function)"
        )
    if opened is not None and opened.graph_task == torch._C._current_graph_task_id():
        return opened
    if torch._C._current_graph_task_id() != -1 and store.was_routed:
        raise RuntimeError(
            "AdapterStore: a layer was called in a backward pass, which knows no route; give the "
            "function that it recomputes as store.bind(function)"
        )
    return None


def _look(store) -> Opened | None:
    """The innermost of a store (a curtain is any store's), which may have ended."""
    for opened in chain(innermost.get()):
        if (opened.route is None or opened.route.store is store) and opened.is_seen():
            resumed = [
                further
                for further in opened.waiting
                if further.route is not None and further.route.store is store and further.is_seen()
            ]
            return _first_on_stack([opened, *resumed]) if resumed else opened
    return None


def _first_on_stack(candidates: list[Opened]) -> Opened:
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        for opened in candidates:
            if opened.opener is frame:
                return opened
        frame = frame.f_back
    return candidates[0]


class Block(contextlib.AbstractContextManager):
    """The context manager that AdapterStore.route returns."""

    def __init__(self, make: Callable[[], Route]) -> None:
        self.make = make
        self.opened: Opened | None = None

    def __enter__(self) -> AdapterRouting | None:
        if self.opened is not None:
            raise RuntimeError("AdapterStore: this route is open already; make another one")
        route = self.make()
        try:
            opener = _opening_generator(sys._getframe(1))
            self.opened = Opened(route, innermost.get(), opener)
            self.call = call.get()
            route.store.count_open(route, 1)
            innermost.set(self.opened)
        except BaseException:
            route.store.release(route)
            raise
        return route.routing

    def __exit__(self, *error) -> None:
        opened, self.opened = self.opened, None
        assert opened is not None and opened.route is not None
        opened.ended, opened.opener = True, None
        top = innermost.get()
        if top is opened:
            innermost.set(opened.outer)
            call.set(self.call)
        while top is not None and top is not opened:  # generators may end in any order
            if top.outer is opened:
                top.outer = opened.outer
            top = top.outer
        opened.route.store.count_open(opened.route, -1)
        opened.route.store.release(opened.route)


def _opening_generator(frame: FrameType | None) -> FrameType | None:
    """The generator in whose frame a block is entered; that of a @contextmanager is its user's."""
    is_generator = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
    while frame is not None:
        if frame.f_code.co_filename != contextlib.__file__:
            driver = frame.f_back
            if not frame.f_code.co_flags & is_generator:
                return None
            if driver is None or driver.f_code.co_filename != contextlib.__file__:
                return frame
        frame = frame.f_back
    return None


class Kept:
    """Routes that are open now, for a call that may come when they have ended; it holds them."""

    def __init__(self, routes: list[Route], curtain: bool) -> None:
        self.holds, self.curtain = [Hold(route) for route in routes], curtain
        self.call = call.get() if curtain else None

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        before, call_before = innermost.get(), call.get()
        top = Opened(None, None) if self.curtain else before
        routes = [hold.route for hold in self.holds if hold.route is not None]
        for route in routes:
            top = Opened(route, top)
            route.store.count_open(route, 1)
        innermost.set(top)
        call.set(self.call)
        try:
            yield
        finally:
            innermost.set(before)
            call.set(call_before)
            for route in routes:
                route.store.count_open(route, -1)


def bind(route: Route, fn: Callable) -> Callable:
    """fn, called in a route wherever and whenever it is called."""
    if inspect.isgeneratorfunction(fn) or inspect.isasyncgenfunction(fn):
        raise TypeError(
            "AdapterStore: bind takes a function that has done its work when it returns, got a "
            "generator function; open the route in it"
        )
    if not callable(fn):
        raise TypeError(f"AdapterStore: bind takes a function, got a {type(fn).__name__}")
    kept = Kept([route], curtain=False)
    bound: Callable
    if inspect.iscoroutinefunction(fn):

        async def bound(*args, **kwargs):
            with kept.open():
                return await fn(*args, **kwargs)

    else:

        def bound(*args, **kwargs):
            with kept.open():
                return fn(*args, **kwargs)

    return functools.update_wrapper(bound, fn)


def _recomputed(fn: Callable, runs_before: int) -> Callable:
    """fn, which a checkpoint runs again in its backward pass, there with the routes of now.

    runs_before: how often it is run in the forward pass.
    """
    stores = {o.route.store: None for o in chain(innermost.get()) if o.route is not None}
    found = [_look(store) for store in stores]
    routes = [o.route for o in found if o is not None and o.route is not None and not o.ended]
    kept, left = Kept(routes, curtain=True), runs_before

    def run(*args, **kwargs):
        nonlocal left
        if left > 0:
            left -= 1
            return fn(*args, **kwargs)
        with kept.open():
            return fn(*args, **kwargs)

    return run


@functools.cache
def carry_through_checkpoints() -> None:
    """Let torch.utils.checkpoint recompute in the routes of the forward.

    It recomputes in the backward pass: after the block, in another one, on a thread of autograd.
    Both of its modes keep the function they are given; they get one that opens the routes again.
    """
    module = torch.utils.checkpoint
    forward = module.CheckpointFunction.forward
    name = "_checkpoint_without_reentrant_generator"
    if hasattr(module, f"{name}_impl"):  # torch 2.14
        name = f"{name}_impl"
    generator = getattr(module, name)

    @functools.wraps(forward)
    def forward_in_routes(ctx, run_function, *args):
        return forward(ctx, _recomputed(run_function, runs_before=1), *args)

    @functools.wraps(generator)
    def generator_in_routes(fn, *args, **kwargs):
        return generator(_recomputed(fn, runs_before=0), *args, **kwargs)

    module.CheckpointFunction.forward = staticmethod(forward_in_routes)  # type: ignore[method-assign]
    setattr(module, name, generator_in_routes)
