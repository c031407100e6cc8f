"""A classifier asked by others: in a thread and in a process that know nothing of an audit, compiled, and a day later."""

import contextlib
import datetime
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

PATIENCE = 60  # seconds for which another process is waited for, whatever it does
TRIES = 2  # a process can be forked while a lock is held that nobody in it will open: another one is not
AHEAD = 100_000  # seconds by which a clock is put forward: more than a day, to another hour
WATCHERS = ("pytest", "_pytest", "torchattacks", "diffclass.audit", "diffclass.attacks")
CLOCKS = ("time", "monotonic", "perf_counter", "process_time", "thread_time")


class NoAnswer(Exception):
    """Why another process could not be asked, or did not come back."""


class FailedElsewhere(Exception):
    """What was raised in another process, in one sentence."""


def in_a_thread(model: Callable, *arguments):
    """What a model answers on a stack of its own, on which nobody is seen who judges or attacks it."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(model, *arguments).result()


def in_a_process(function: Callable[[], list[Tensor]], patience: float) -> list[Tensor]:
    """What a function returns in a process of its own, with one thread, no environment, and none of WATCHERS loaded.

    Why         forked: what is asked need not pickle, such as a class of a notebook
    Errors      NoAnswer with the reason, such as a system that cannot fork; FailedElsewhere for what the function raised
    """
    if "fork" not in multiprocessing.get_all_start_methods():
        raise NoAnswer("this system cannot fork a process")
    for attempt in range(1, TRIES + 1):
        try:
            arrays, sentence = _asked(function, patience)
            break
        except NoAnswer:
            if attempt == TRIES:
                raise
    if sentence:
        raise FailedElsewhere(sentence)
    return [torch.from_numpy(array) for array in arrays]


def _asked(function: Callable[[], list[Tensor]], patience: float) -> tuple[list, str]:
    """What a forked process sends: its arrays, or the sentence of what was raised."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(function, sender), daemon=True)
    with warnings.catch_warnings():
        # the child uses no lock of another thread: it answers in one thread of its own, and ends
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    sender.close()
    try:
        if not receiver.poll(patience):
            raise NoAnswer(f"another process did not answer within {patience:.0f} s")
        return receiver.recv()
    except EOFError:
        raise NoAnswer("another process ended without an answer") from None
    finally:
        receiver.close()
        process.kill()
        process.join()


def _child(function: Callable[[], list[Tensor]], sender) -> None:
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)  # what a compiler has to say of graphs that break
    sys.argv = [""]
    os.environ.clear()
    for name in list(sys.modules):
        if name.startswith(WATCHERS):
            del sys.modules[name]
    try:
        sender.send(([answer.detach().cpu().numpy() for answer in function()], ""))
    except Exception as error:
        sender.send(([], f"{type(error).__name__}: {' '.join(str(error).split())}"))


def put_clocks_forward(model: nn.Module) -> None:
    """Let all clocks of this process, and the names under which a model's modules know them, be AHEAD of the time.

    Why         a process that was made for the question ends after it; nobody else sees these clocks
    """
    changed = {}
    for name in CLOCKS:
        changed[getattr(time, name)] = _ahead(getattr(time, name), AHEAD)
        in_nanoseconds = getattr(time, f"{name}_ns")
        changed[in_nanoseconds] = _ahead(in_nanoseconds, AHEAD * 10**9)
    changed[datetime.datetime] = _Later
    namespaces = [vars(time), vars(datetime)]
    namespaces += [vars(sys.modules[name]) for name in _modules_of(model)]
    for namespace in namespaces:
        for name, value in list(namespace.items()):
            with contextlib.suppress(TypeError):  # what has no hash is no clock
                if value in changed:
                    namespace[name] = changed[value]


def _modules_of(model: nn.Module) -> set[str]:
    names = {type(part).__module__ for part in model.modules()}
    return {name for name in names if name in sys.modules}


def _ahead(clock: Callable, by: int) -> Callable:
    return lambda: clock() + by


class _Later(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return super().now(tz) + datetime.timedelta(seconds=AHEAD)

    @classmethod
    def utcnow(cls):
        return super().now(datetime.UTC).replace(tzinfo=None) + datetime.timedelta(seconds=AHEAD)

    @classmethod
    def today(cls):
        return cls.now()
