"""A process that was made for a question: it answers with tensors, knows no audit, and is not waited for forever."""

import datetime
import os
import sys
import time

import pytest
import torch
from diffclass.audit import elsewhere, planted
from foreign_modules import Linear


def in_a_process(function, patience=60.0):
    return elsewhere.in_a_process(function, patience)


def test_a_process_sends_its_tensors_back():
    x, _ = planted.images(3)
    logits, process = in_a_process(lambda: [Linear()(x), torch.tensor([os.getpid()])])
    assert torch.equal(logits, Linear()(x)) and int(process) != os.getpid()


def test_a_process_knows_neither_environment_nor_audit():
    def known():
        names = [name for name in sys.modules if name.startswith(elsewhere.WATCHERS)]
        return [torch.tensor([len(os.environ), len(sys.argv[0]), len(names)])]

    assert in_a_process(known)[0].tolist() == [0, 0, 0]
    assert os.environ and "diffclass.audit.elsewhere" in sys.modules


def test_what_is_raised_in_a_process_comes_back_as_a_sentence():
    def broken():
        raise ValueError("out of\n order")

    with pytest.raises(elsewhere.FailedElsewhere, match="^ValueError: out of order$"):
        in_a_process(broken)


def test_a_process_that_hangs_or_dies_is_given_up_after_another_try():
    start = time.perf_counter()
    with pytest.raises(elsewhere.NoAnswer, match="did not answer within 1 s"):
        in_a_process(lambda: time.sleep(100), 1.0)
    assert time.perf_counter() - start < 50
    with pytest.raises(elsewhere.NoAnswer, match="ended without an answer"):
        in_a_process(lambda: os._exit(3))


def test_a_system_that_cannot_fork_says_so(monkeypatch):
    monkeypatch.setattr(elsewhere.multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    with pytest.raises(elsewhere.NoAnswer, match="cannot fork"):
        in_a_process(list)


def test_clocks_are_put_forward_there_and_not_here():
    module = Linear()

    def clocks():
        elsewhere.put_clocks_forward(module)
        today = datetime.datetime.now().timestamp()
        return [torch.tensor([time.time(), time.time_ns() / 1e9, today], dtype=torch.float64)]

    before = time.time()
    there = in_a_process(clocks)[0]
    assert bool((there - before - elsewhere.AHEAD > -1).all())
    assert bool((there - time.time() - elsewhere.AHEAD < 1).all())
    assert datetime.datetime.now().timestamp() - before < 600


def test_a_thread_has_a_stack_of_its_own():
    def seen():
        names = []
        frame = sys._getframe()
        while frame is not None:
            names.append(frame.f_code.co_name)
            frame = frame.f_back
        return names

    here = "test_a_thread_has_a_stack_of_its_own"
    assert here in seen() and here not in elsewhere.in_a_thread(seen)
