"""A map over a few processes, for work in Python that one core would take too long over.

Fake-tensor simulation is bound by the interpreter: on two cores, `s2a-fx report swin_base_patch4_window7_224` takes a quarter less
time in two processes than in one (benchmarks/report_cost.py).
"""

import multiprocessing
import os
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import TypeVar

from s2a_fx.errors import S2AError
from s2a_fx.parent_watch import end_with_parent

Item = TypeVar("Item")
Result = TypeVar("Result")


def fork_map(function: Callable[[Item], Result], items: Sequence[Item], jobs: int) -> list[Result]:
    """`[function(item) for item in items]`, the items dealt out to `jobs` processes, this one included.

    The children are forks: `function` and `items` need not be picklable, results must be. Not for a process
    that has used CUDA or run a backward: their threads do not survive a fork.
    """
    jobs = min(jobs, len(items)) if hasattr(os, "fork") else 1
    context = multiprocessing.get_context("fork" if jobs > 1 else None)
    children = []
    for share in range(jobs - 1):
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=_work, args=(function, items[share::jobs], sender))
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", DeprecationWarning
            )  # of forking beside torch's idle threads, which the child leaves idle
            child.start()
        sender.close()
        children.append((child, receiver))
    results: list[list[Result]] = []
    try:
        own = [function(item) for item in items[jobs - 1 :: jobs]]
        for _, receiver in children:
            results.append(_received(receiver))
    finally:  # after an error nobody reads a child's result: it would wait for ever to be rid of it
        for child, _ in children:
            child.kill()
            child.join()
    results.append(own)
    return [results[index % jobs][index // jobs] for index in range(len(items))]


def _received(receiver: Connection) -> list[Result]:
    try:
        outcome = receiver.recv()
    except EOFError as error:
        raise S2AError("a simulation's process was killed, most likely for want of memory; compare fewer recipes.") from error
    if isinstance(outcome, Exception):
        raise outcome
    return outcome  # type: ignore[no-any-return]


def _work(function: Callable[[Item], Result], items: Sequence[Item], sender: Connection) -> None:
    end_with_parent()
    try:
        sender.send([function(item) for item in items])
    except Exception as error:
        sender.send(error)
