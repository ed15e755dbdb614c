# SPDX-License-Identifier: MIT
# pyright: reportPossiblyUnboundVariable=false
"""The tests of flowstore: every promise of its contract, on every engine that there is. And its benchmark."""

from __future__ import annotations

import argparse
import ast
import asyncio
import contextlib
import contextvars
import copy
import ctypes
import dataclasses
import datetime as dt
import dis
import doctest
import faulthandler
import functools
import gc
import hashlib
import http.client
import importlib.util
import inspect
import io
import itertools
import json
import logging
import math
import os
import pickle
import platform
import random
import re
import select
import shlex
import shutil
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import typing
import unicodedata
import uuid
import warnings
import weakref
from collections import ChainMap, Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta, timezone, tzinfo
from decimal import Decimal
from enum import StrEnum
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from types import CodeType, FrameType
from typing import IO, Any, ClassVar, NamedTuple, NoReturn, cast
from urllib.parse import quote

import flowstore

# ==========================================================================================================
# Benchmark: `python test_flowstore.py bench` measures the flowstore.py beside this file
# ==========================================================================================================

# It stands above what the tests import, because it runs where neither pytest nor hypothesis is installed.


@dataclass
class Measured:
    """What a row found: whether its promise holds, in words, and the figures."""

    holds: bool
    said: str
    figures: list[float]


def elapsed(operation: Callable[[], object]) -> float:
    """How many seconds it takes."""
    start = time.perf_counter()
    operation()
    return time.perf_counter() - start


def under(limit: float, unit: str, values: Sequence[float]) -> Measured:
    """The median has to be under a limit."""
    value = statistics.median(values)
    return Measured(value < limit, f"{value:.2f} {unit} (under {limit})", [value])


class Rival(NamedTuple):
    """What flowstore is compared with: how many times its rate is promised, and what measures it."""

    name: str
    least: float
    rate: Callable[[], float]


class Bench:
    """What the rows share: how long and how deep to measure, stores, plain loops, child processes."""

    def __init__(self, quick: bool, server: str) -> None:
        self.rounds = 3 if quick else 11
        self.seconds = 0.1 if quick else 0.5
        self.depth = 100_000 if quick else 1_000_000
        self.server = server  # the URL of the server to measure, or ""
        self.event = {
            "type": "step_completed",
            "node": "charge",
            "worker": "worker-1",
            "result": "x" * 180,
        }
        # These two are of the row that is being measured.
        self.folder = ""
        self.cleanup = contextlib.ExitStack()

    def new_target(self) -> str:
        """Where a store can be opened: a new file, or the server."""
        return self.server or os.path.join(self.folder, f"{flowstore.new_id()}.db")

    def store(self, synchronous: str = "FULL", target: str = "") -> flowstore.Store:
        """A store, which knows the execution "run"."""
        store = flowstore.open(target or self.new_target(), synchronous=synchronous)
        self.cleanup.enter_context(store)
        store.events.append("run", "default", self.event)
        return store

    def plain(self, store: flowstore.Store, synchronous: str) -> sqlite3.Connection:
        """A plain connection to the file of a store, with a store's pragmas."""
        db = sqlite3.connect(store.target, isolation_level=None)
        self.cleanup.enter_context(contextlib.closing(db))
        db.executescript(f"PRAGMA synchronous = {synchronous}; PRAGMA fullfsync = ON")
        return db

    def item(self, queue: str = "queue") -> flowstore.WorkItem:
        return flowstore.WorkItem(execution_id="run", queue_type=queue, payload=self.event)

    def worker(self, function: Callable[..., Any]) -> BenchWorker:
        """A process that calls a function of this file."""
        worker = BenchWorker(function.__name__)
        self.cleanup.callback(worker.close)
        worker.started()
        return worker

    def rate(self, operation: Callable[[], object]) -> float:
        """How often a second it can be done."""
        done = 0
        start = now = time.perf_counter()
        while now < start + self.seconds:
            operation()
            done += 1
            now = time.perf_counter()
        return done / (now - start)

    def compare(self, ours: Callable[[], float], *rivals: Rival) -> Measured:
        """Our rate against those of rivals: the median ratio to one of them has to hold."""
        sides = [ours, *(rival.rate for rival in rivals)]
        rounds: list[list[float]] = []
        for turn in range(self.rounds + 1):
            rates = [0.0] * len(sides)
            order = range(len(sides))
            for side in order if turn % 2 else reversed(order):  # nobody is always first
                rates[side] = sides[side]()
            rounds.append(rates)
        del rounds[0]  # it only warms up
        holds = False
        said: list[str] = []
        figures: list[float] = []
        for side, rival in enumerate(rivals, 1):
            ratio = statistics.median(rates[0] / rates[side] for rates in rounds)
            rate = statistics.median(rates[side] for rates in rounds)
            holds = holds or ratio >= rival.least
            said.append(f"{ratio:.2f} x {rival.name} at {rate:,.0f}/s (at least {rival.least})")
            figures.append(ratio)
        rate = statistics.median(rates[0] for rates in rounds)
        return Measured(holds, f"{', or '.join(said)}; {rate:,.0f}/s", [*figures, rate])

    def plain_inserts(self, synchronous: str, rows: int = 1) -> Callable[[], float]:
        """The rate of a plain loop: so many of the same rows a transaction into the same table."""
        db = self.plain(self.store(), synchronous)
        text = json.dumps(self.event)
        numbers = itertools.count(2)
        sql = """INSERT INTO flowstore_log (execution_id, tenant_id, event, timestamp, sequence)
            VALUES ('run', 'default', ?, ?, ?)"""

        def insert() -> None:
            values = [(text, time.time_ns() // 1000, next(numbers)) for _ in range(rows)]
            db.execute("BEGIN IMMEDIATE")
            if rows == 1:
                db.execute(sql, values[0])
            else:
                db.executemany(sql, values)
            db.execute("COMMIT")

        return lambda: self.rate(insert)


class BenchWorker:
    """A process that calls one function of this file, with the arguments of each line that it reads."""

    def __init__(self, name: str) -> None:
        # To compile the tests too would take each process longer than most calls.
        source = Path(__file__).read_text(encoding="utf-8").partition("\nimport pytest")
        self.process = subprocess.Popen(
            [sys.executable, "-c", source[0], "bench-worker", name],
            cwd=os.path.dirname(flowstore.__file__),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C in the terminal reaches the benchmark alone, which kills it
        )

    def started(self) -> None:
        """Wait until it waits for a call."""
        self.result()

    def call(self, *arguments: object) -> None:
        """Begin a call."""
        assert self.process.stdin is not None
        print(json.dumps(arguments), file=self.process.stdin, flush=True)

    def result(self) -> Any:
        """Wait for the end of the call."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("a process of the benchmark has ended before its time")
        return json.loads(line)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def bench_worker(name: str) -> int:
    """What such a process does."""
    print(json.dumps("started"), flush=True)
    for line in sys.stdin:
        print(json.dumps(globals()[name](*json.loads(line))), flush=True)
    return 0


def commit(db: sqlite3.Connection, sql: str, *parameters: object) -> list[Any]:
    """A plain transaction of one statement."""
    db.execute("BEGIN IMMEDIATE")
    rows = db.execute(sql, parameters).fetchall()
    db.execute("COMMIT")
    return rows


def copy_row(store: flowstore.Store, table: str, original: str, count: int, **changed: str) -> None:
    """Copy a row, some columns changed by SQL over the number n of the copy: calls would take minutes."""
    with store.transaction() as tx:
        found = tx.execute(f"SELECT name FROM pragma_table_info('{table}')")
    names = [str(name) for (name,) in found]
    values = ", ".join(changed.get(name, name) for name in names)
    for start in range(1, count + 1, 50_000):
        with store.transaction() as tx:
            tx.execute(
                f"""INSERT INTO {table} ({", ".join(names)})
                WITH RECURSIVE numbers (n) AS (SELECT ? UNION ALL SELECT n + 1 FROM numbers WHERE n < ?)
                SELECT {values} FROM numbers CROSS JOIN {table} WHERE {original}""",
                (start, min(start + 49_999, count)),
            )


def copy_event(store: flowstore.Store, count: int) -> None:
    """Copy the first event until its execution has so many."""
    copy_row(store, "flowstore_log", "position = 1", count - 1, position="1 + n", sequence="1 + n")


# --- the log ---
def bench_append(bench: Bench, threads: int, synchronous: str, least: dict[str, float]) -> Measured:
    """`least`: by the synchronous mode of the plain loop, how many times its rate is enough."""
    store = bench.store(synchronous)

    def in_thread(number: int) -> float:
        return bench.rate(lambda: store.events.append(f"run-{number}", "default", bench.event))

    def ours() -> float:
        if threads == 1:
            return in_thread(0)
        with ThreadPoolExecutor(threads) as pool:
            return sum(pool.map(in_thread, range(threads)))

    return bench.compare(ours, *plain_modes(bench, least))


def bench_append_in_tasks(bench: Bench, least: dict[str, float]) -> Measured:
    target = bench.store().target

    async def in_tasks() -> float:
        async with flowstore.open_async(target) as store:
            start = time.perf_counter()

            async def append(number: int) -> int:
                done = 0
                while not done or time.perf_counter() < start + bench.seconds:
                    await store.events.append(f"run-{number}", "default", bench.event)
                    done += 1
                return done

            done = await asyncio.gather(*map(append, range(1000)))
            return sum(done) / (time.perf_counter() - start)

    return bench.compare(lambda: asyncio.run(in_tasks()), *plain_modes(bench, least))


def plain_modes(bench: Bench, least: dict[str, float]) -> list[Rival]:
    return [
        Rival(f"plain {mode}", ratio, bench.plain_inserts(mode)) for mode, ratio in least.items()
    ]


def bench_append_batch(bench: Bench) -> Measured:
    store = bench.store()
    batch = [bench.event] * 1000
    return bench.compare(
        lambda: bench.rate(lambda: store.events.append_batch("run", "default", batch)),
        Rival("executemany", 0.5, bench.plain_inserts("FULL", rows=1000)),
    )


def bench_load(bench: Bench) -> Measured:
    store = bench.store()
    copy_event(store, 10_000)
    db = bench.plain(store, "FULL")
    sql = "SELECT * FROM flowstore_log WHERE execution_id = 'run' ORDER BY sequence"

    def plain() -> list[Any]:
        return [json.loads(row[4]) for row in db.execute(sql).fetchall()]

    return bench.compare(
        lambda: bench.rate(lambda: store.events.load_events("run")),
        Rival("fetchall + json.loads", 0.6, lambda: bench.rate(plain)),
    )


def bench_processes(bench: Bench) -> Measured:
    store = bench.store()
    workers = [bench.worker(append_in_threads) for _ in range(4)]
    longest = 0.0

    def ours() -> float:
        nonlocal longest
        for worker in workers:
            worker.call(store.target, bench.seconds)
        times = [passed for worker in workers for passed in worker.result()]
        longest = max(longest, *times)
        return len(times) / bench.seconds

    found = bench.compare(ours, Rival("plain FULL", 1.0, bench.plain_inserts("FULL")))
    found.said += f", no error, longest call {longest * 1000:,.0f} ms"
    found.figures.append(longest * 1000)
    return found


def append_in_threads(target: str, seconds: float) -> list[float]:
    """Append with 4 threads: how many seconds each call took."""
    event = {"type": "custom", "text": "x" * 225}
    with flowstore.open(target) as store, ThreadPoolExecutor(4) as pool:

        def append(run: str) -> list[float]:
            times = []
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                times.append(elapsed(lambda: store.events.append(run, "default", event)))
            return times

        runs = [flowstore.new_id() for _ in range(4)]
        return [passed for times in pool.map(append, runs) for passed in times]


def bench_iterate(bench: Bench) -> Measured:
    store = bench.store("OFF")
    copy_event(store, bench.depth)
    # To start a worker, Python compiles all of this file, which takes more memory than is measured here.
    functions = inspect.getsource(peak_memory) + inspect.getsource(memory_of_reading)
    code = f"import contextlib, sys, flowstore\nfrom pathlib import Path\n{functions}\nprint(memory_of_reading(sys.argv[1]))"
    command = [sys.executable, "-c", code, store.target]
    folder = os.path.dirname(flowstore.__file__)
    return under(50, "MB", [float(subprocess.check_output(command, cwd=folder))])


def memory_of_reading(target: str) -> float:
    """Read all events: by how many MB that raises the most memory that this process ever had."""
    with flowstore.open(target) as store:
        store.events.load_events("run-0")
        before = peak_memory()
        for _ in store.events.iter_events("run"):
            pass
        return peak_memory() - before


def peak_memory() -> float:
    """The most memory that this process ever had, in MB."""
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) / 1024
    import resource  # not on Linux, where its figure begins with that of the parent

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)


# --- the queue ---
def bench_queue(bench: Bench, synchronous: str, least: float) -> Measured:
    state: Any = bench.store(synchronous).state

    def ours() -> None:
        state.enqueue_work_item(bench.item())
        state.complete_work_item(state.claim_work_item("worker", ["queue"]))

    db = bench.plain(bench.store(), synchronous)
    db.executescript(
        """CREATE TABLE plain_queue (
            id TEXT PRIMARY KEY, queue TEXT NOT NULL, payload TEXT NOT NULL, status TEXT NOT NULL,
            available_at INTEGER NOT NULL, worker TEXT, lease_expires_at INTEGER);
        CREATE INDEX plain_pending ON plain_queue (queue, available_at, id) WHERE status = 'pending';
        CREATE INDEX plain_leases ON plain_queue (queue, lease_expires_at) WHERE status = 'claimed'"""
    )
    payload = json.dumps(bench.event)
    numbers = itertools.count()

    def plain() -> None:
        now = time.time_ns() // 1000
        commit(
            db,
            """INSERT INTO plain_queue (id, queue, payload, status, available_at)
            VALUES (?, 'queue', ?, 'pending', ?)""",
            f"{next(numbers):036}",
            payload,
            now,
        )
        [(id, _)] = commit(
            db,
            """UPDATE plain_queue SET status = 'claimed', worker = 'worker', lease_expires_at = ?
            WHERE id = (SELECT id FROM plain_queue WHERE queue = 'queue' AND status = 'pending'
                AND available_at <= ? ORDER BY available_at, id LIMIT 1)
            RETURNING id, payload""",
            now + 30_000_000,
            now,
        )
        commit(db, "UPDATE plain_queue SET status = 'completed' WHERE id = ?", id)

    return bench.compare(
        lambda: bench.rate(ours), Rival("the plain queue", least, lambda: bench.rate(plain))
    )


def bench_batches(bench: Bench) -> Measured:
    state: Any = bench.store("NORMAL").state

    def in_batches() -> None:
        state.enqueue_work_items([bench.item() for _ in range(128)])
        state.complete_work_items(state.claim_work_items("worker", ["queue"], 128))

    def one_by_one() -> None:
        state.enqueue_work_item(bench.item())
        state.complete_work_item(state.claim_work_item("worker", ["queue"]))

    return bench.compare(
        lambda: 128 * bench.rate(in_batches),
        Rival("one by one", 10.0, lambda: bench.rate(one_by_one)),
    )


def bench_claims(
    bench: Bench, queues: str, changed: dict[str, str], tenant: str | None = None
) -> Measured:
    """`queues`: a letter for each that is asked for; `changed`: the columns that make the many special."""
    few = bench.store("NORMAL")  # waiting for the disk would hide what a claim costs
    many = bench.store("NORMAL")

    def fill(store: flowstore.Store, queue: str, count: int, **changed: str) -> None:
        item = flowstore.WorkItem(execution_id="run", queue_type=queue)
        original = f"id = '{store.state.enqueue_work_item(item)}'"
        values = {
            "id": "id || printf('-%07d', n)",
            "available_at": "available_at - 3600000000 + n",
        }
        copy_row(store, "flowstore_work_items", original, count, **(values | changed))

    def claim(store: flowstore.Store, queues: str) -> float:
        state: Any = store.state.for_tenant(tenant) if tenant else store.state
        start = time.perf_counter()
        for _ in range(200):
            state.complete_work_item(state.claim_work_item("worker", list(queues)))
        passed = time.perf_counter() - start
        fill(store, "a", 200)
        return 200 / passed

    fill(few, "a", 1_000)
    fill(many, "a", bench.depth, **changed)
    for queue in queues:
        fill(many, queue, 10_000)
    return bench.compare(
        lambda: claim(many, queues),
        Rival("that with 1,000 pending", 0.8, lambda: claim(few, "a")),
    )


def bench_claims_of_processes(bench: Bench) -> Measured:
    store = bench.store()
    workers = [bench.worker(empty_queue) for _ in range(8)]
    count = bench.depth // 250

    def rate(processes: int) -> float:
        queue = flowstore.new_id()
        with store.transaction():
            for _ in range(count):
                store.state.enqueue_work_item(bench.item(queue))
        store.compact()  # else the server may clean up after earlier rounds meanwhile
        start = time.time() + 0.5  # by then each has connected
        for worker in workers[:processes]:
            worker.call(bench.server, queue, start)
        ended = [float(worker.result()) for worker in workers[:processes]]
        return count / (max(ended) - start)

    return bench.compare(lambda: rate(8), Rival("that of 1 process", 2.0, lambda: rate(1)))


def empty_queue(target: str, queue: str, start: float) -> float:
    """From a time on, claim and complete the items of a queue: when there were none left."""
    with flowstore.open(target) as store:
        time.sleep(max(0.0, start - time.time()))
        while (item := store.state.claim_work_item("worker", [queue])) is not None:
            store.state.complete_work_item(item)
        return time.time()


class Waiters:
    """Two processes that wait on a store: one for an item of a queue, one for an event."""

    def __init__(self, bench: Bench, target: str, queue: str) -> None:
        self.target = target
        self.queue = queue
        self.claiming = bench.worker(wait_for_item)
        self.tailing = bench.worker(wait_for_event)
        self.begin(0)
        self.results()  # what a first call needs is imported

    def begin(self, seconds: float) -> None:
        self.claiming.call(self.target, self.queue, seconds)
        self.tailing.call(self.target, seconds)

    def results(self) -> tuple[list[float], list[float]]:
        """When each has got it, and how many % of a core each took."""
        both = [self.claiming.result(), self.tailing.result()]
        return [time for time, _ in both], [percent for _, percent in both]


def wait_for_item(target: str, queue: str, seconds: float) -> tuple[float, float]:
    with flowstore.open(target) as store:
        return watch(lambda: store.state.claim_work_item("worker", [queue], wait=seconds))


def wait_for_event(target: str, seconds: float) -> tuple[float, float]:
    with flowstore.open(target) as store:
        return watch(lambda: next(store.events.tail(timeout=seconds), None))


def watch(wait: Callable[[], object]) -> tuple[float, float]:
    """When it returned, and how many % of a core it took."""
    used = time.process_time()
    passed = elapsed(wait)
    return time.time(), (time.process_time() - used) / passed * 100


def bench_wake_up(bench: Bench) -> Measured:
    target = bench.new_target()
    store = bench.store(target=target)
    queue = flowstore.new_id()
    waiters = Waiters(bench, target, queue)
    times = []
    for _ in range(2 * bench.rounds):
        waiters.begin(5)
        time.sleep(random.uniform(0.2, 0.3))  # out of step with the times at which they look
        start = time.time()
        with store.transaction():
            store.state.enqueue_work_item(bench.item(queue))
            store.events.append("run", "default", bench.event)
        woken, _ = waiters.results()
        times.append((max(woken) - start) * 1000)
    return under(50, "ms", times)


def bench_idle(bench: Bench) -> Measured:
    target = bench.new_target()
    bench.store(target=target)
    waiters = Waiters(bench, target, flowstore.new_id())
    waiters.begin(4 * bench.seconds + 1)
    _, percents = waiters.results()
    return under(2, "% of a core", [max(percents)])


# --- states, workflows, commands ---
def bench_state(bench: Bench) -> Measured:
    text = "A message of a chat is about as long as this one, [and now and then] has {brackets}. "
    messages = [
        {"role": "assistant", "content": 2 * text, "tokens": n, "seconds": n / 7}
        for n in range(1000)
    ]
    chat = {"messages": messages}
    execution = flowstore.WorkflowExecution(execution_id="chat", workflow_id="chat")
    state, other = bench.store("NORMAL").state, bench.store("NORMAL")
    state.create_execution(execution)
    other.state.create_execution(execution)
    db = bench.plain(other, "NORMAL")
    sql = "UPDATE flowstore_runs SET current_state = ?, updated_at = ? WHERE execution_id = 'chat'"

    def plain() -> None:
        commit(db, sql, json.dumps(chat), time.time_ns() // 1000)

    return bench.compare(
        lambda: bench.rate(lambda: state.update_execution_current_state("chat", chat)),
        Rival("json.dumps + UPDATE", 0.6, lambda: bench.rate(plain)),
    )


def bench_persist(bench: Bench) -> Measured:
    host = bench.store("NORMAL").workflows
    pointers = [flowstore.ExecutionPointer(step_id=n, outcome=bench.event) for n in range(1000)]
    instance = flowstore.WorkflowInstance(
        workflow_definition_id="bench", execution_pointers=pointers
    )
    instance.id = host.create_new_workflow(instance)

    def persist_change() -> None:
        pointers[500].retry_count += 1
        instance.execution_pointers = pointers
        host.persist_workflow(instance)

    def rewrite_all() -> None:
        instance.execution_pointers = []
        host.persist_workflow(instance)
        persist_change()

    return bench.compare(
        lambda: bench.rate(persist_change),
        Rival("deleting and rewriting all", 10.0, lambda: bench.rate(rewrite_all)),
    )


def bench_commands(bench: Bench) -> Measured:
    store = bench.store()
    count = min(500, bench.depth)

    def ours() -> float:
        with store.transaction():
            for n in range(count):
                store.workflows.schedule_command(
                    flowstore.ScheduledCommand(
                        command_name=flowstore.CommandName.PROCESS_EVENT,
                        data=str(n),
                        execute_time=0,
                    )
                )
        return count / elapsed(lambda: store.workflows.process_commands(None, lambda command: None))

    return bench.compare(ours, Rival("plain FULL", 0.7, bench.plain_inserts("FULL")))


def bench_steps(bench: Bench) -> Measured:
    """Runs of ten steps, started beforehand: their claims, steps and ends, per step."""
    store = bench.store()
    result = bench.event["result"]

    def ten_steps(run: flowstore.Run, input: Any) -> None:
        for number in range(10):
            run.step(f"step {number}", str, result)

    def ours() -> float:
        runs = max(2, round(bench.seconds * 100))
        with store.transaction():
            for _ in range(runs):
                store.runs.start(ten_steps)
        return 10 * runs / elapsed(lambda: store.runs.work(ten_steps, until_idle=True))

    return bench.compare(ours, Rival("plain FULL", 0.7, bench.plain_inserts("FULL")))


# --- the whole store ---
def ended_flows(bench: Bench, store: flowstore.Store) -> None:
    """A tenth of the depth in flows that ended long ago, each with an event."""
    long_ago = datetime(2000, 1, 1, tzinfo=UTC)
    store.flows.insert(
        flowstore.Flow(id="flow", status=flowstore.FlowStatus.FINISHED, updated_at=long_ago)
    )
    store.flows.append_event("flow", "ended", {})
    count = bench.depth // 10
    copy_row(store, "flows", "id = 'flow'", count, id="'flow-' || n")
    copy_row(store, "flow_events", "id = 1", count, id="1 + n", flow_id="'flow-' || n")


def bench_prune(bench: Bench) -> Measured:
    store = bench.store()
    ended_flows(bench, store)
    pruner = threading.Thread(target=store.prune, args=(timedelta(days=1),))
    waits = []
    pruner.start()
    while pruner.is_alive():
        waits.append(elapsed(lambda: store.events.append("run", "default", bench.event)))
    return at_99_percent(waits)


def at_99_percent(waits: list[float]) -> Measured:
    waits.sort()
    return under(50, "ms at the 99th percentile", [waits[len(waits) * 99 // 100] * 1000])


def bench_keep(bench: Bench) -> Measured:
    target = bench.store().target
    with flowstore.open(target) as store:
        ended_flows(bench, store)
    moments = itertools.count()

    def clock() -> datetime:
        """Time that passes faster: many a commit comes with a sweep."""
        return datetime(2100, 1, 1, tzinfo=UTC) + timedelta(seconds=next(moments) / 50)

    with flowstore.open(target, clock=clock, keep=timedelta(days=1)) as store:
        waits: list[float] = []
        while store.flows.list_by_status("finished", limit=1):
            for _ in range(1000):
                waits.append(elapsed(lambda: store.events.append("run", "default", bench.event)))
        return at_99_percent(waits)


def large_store(bench: Bench) -> Any:
    store = bench.store("OFF")
    item = flowstore.WorkItem(execution_id="run", queue_type="queue")
    copy_event(store, bench.depth)
    copy_row(
        store,
        "flowstore_work_items",
        f"id = '{store.state.enqueue_work_item(item)}'",
        bench.depth // 5,
        id="id || n",
        status="CASE n % 2 WHEN 0 THEN 'pending' ELSE 'completed' END",
        settled_at="CASE n % 2 WHEN 1 THEN n END",
    )
    return store


def bench_look(bench: Bench) -> Measured:
    store = large_store(bench)

    looks: list[Callable[[], object]] = [
        lambda: flowstore.main(["show", store.target]),
        lambda: flowstore.main(["show", store.target, "run"]),
        lambda: store._repr_html_(),
        lambda: store.state.timeline("run")._repr_html_(),
    ]

    def slowest() -> float:
        with contextlib.redirect_stdout(io.StringIO()):
            return max(map(elapsed, looks))

    return under(200, "ms", [slowest() * 1000 for _ in range(bench.rounds)])


def bench_scrape(bench: Bench) -> Measured:
    command = ["metrics", large_store(bench).target]

    def scrape_once() -> float:
        with contextlib.redirect_stdout(io.StringIO()):
            return elapsed(lambda: flowstore.main(command))

    return under(200, "ms", [scrape_once() * 1000 for _ in range(bench.rounds)])


def bench_import(bench: Bench) -> Measured:
    module = Path(flowstore.__file__)
    imported: list[str] = []
    for node in ast.parse(module.read_bytes()).body:
        if isinstance(node, ast.Import):
            imported += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imported.append(node.module or "")

    def seconds(names: list[str]) -> float:
        code = f"""import sys, time
sys.path.insert(0, {str(module.parent)!r})
start = time.perf_counter()
import {", ".join(names)}
print(time.perf_counter() - start)"""
        # -S: what else is installed may import some of these modules before the clock starts.
        # The byte code is cached in a folder that can be written.
        options = ["-I", "-S", "-X", f"pycache_prefix={bench.folder}"]
        return float(subprocess.check_output([sys.executable, *options, "-c", code]))

    pairs = [(seconds([module.stem]), seconds(imported)) for _ in range(2 * bench.rounds + 1)]
    del pairs[0]  # it has compiled them
    found = under(
        2.5, "x that of the standard modules it imports", [one / two for one, two in pairs]
    )
    found.said += f"; {statistics.median(ours for ours, _ in pairs) * 1000:.1f} ms"
    return found


# --- the table, by name; {} is how many there are ---
BENCH_ROWS: dict[str, Callable[[Bench], Measured]] = {
    "durable append, 1 thread, FULL": partial(
        bench_append, threads=1, synchronous="FULL", least={"FULL": 0.85}
    ),
    "append, 1 thread, NORMAL": partial(
        bench_append, threads=1, synchronous="NORMAL", least={"NORMAL": 0.7}
    ),
    "durable append, 64 threads, FULL": partial(
        bench_append, threads=64, synchronous="FULL", least={"FULL": 4.0, "NORMAL": 0.4}
    ),
    "durable append, asyncio, 1,000 tasks, FULL": partial(
        bench_append_in_tasks, least={"FULL": 10.0, "NORMAL": 1.0}
    ),
    "append_batch of 1,000": bench_append_batch,
    "load 10,000 events": bench_load,
    "enqueue + claim + complete, FULL": partial(bench_queue, synchronous="FULL", least=0.75),
    "enqueue + claim + complete, NORMAL": partial(bench_queue, synchronous="NORMAL", least=0.45),
    "the same in batches of 128, NORMAL, items": bench_batches,
    "a state of 1,000 chat messages written, NORMAL": bench_state,
    "claim + complete, {} pending": partial(bench_claims, queues="a", changed={}),
    "claim + complete, {} pending, asking for three queues": partial(
        bench_claims, queues="abc", changed={}
    ),
    "claim + complete, {} delayed": partial(
        bench_claims, queues="a", changed={"available_at": "available_at + 86400000000 + n"}
    ),
    "claim + complete, {} pending of five priorities": partial(
        bench_claims, queues="a", changed={"priority": "n % 5"}
    ),
    "claim + complete, {} of another tenant": partial(
        bench_claims, queues="a", changed={"tenant_id": "'other'"}, tenant="default"
    ),
    "process_commands of 500 due, FULL, per command": bench_commands,
    "a step of a run of ten, 1 worker, FULL": bench_steps,
    "persist_workflow, 1,000 pointers, one changed": bench_persist,
    "4 processes x 4 threads, FULL": bench_processes,
    "iter_events over {} events": bench_iterate,
    "a writer's wait while a tenth of {} flows is pruned": bench_prune,
    "a writer's wait while a tenth of {} flows goes by keep=": bench_keep,
    "wake-up of a claim and a tail in other processes, the later one": bench_wake_up,
    "a claim and a tail that wait, the busier one": bench_idle,
    "overview and detail of {} events, text and page, the slowest one": bench_look,
    "scrape of {} events and a fifth as many items": bench_scrape,
    "import flowstore": bench_import,
}
BENCH_ROWS_OF_A_SERVER: dict[str, Callable[[Bench], Measured]] = {
    "claim + complete, 8 processes": bench_claims_of_processes,
    "wake-up of a claim and a tail in other processes, the later one": bench_wake_up,
    "a claim and a tail that wait, the busier one": bench_idle,
}


def bench_command(arguments: list[str]) -> int:
    """Measure each row, and print what was found and wanted; status 1 when one misses."""
    parser = argparse.ArgumentParser(description="bench: measure flowstore against plain sqlite3.")
    parser.add_argument("command", choices=["bench"])
    parser.add_argument(
        "--quick", action="store_true", help="under 60 s, with 100,000 items for 1,000,000"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="only rows with this in their name"
    )
    parser.add_argument(
        "--target",
        metavar="FILE",
        help="beside this file, or this server's URL (default: a temporary folder)",
    )
    args = parser.parse_args(arguments)
    if args.target == ":memory:":
        parser.error("--target: a file is needed, other processes cannot see a store in memory")
    server = args.target if args.target and "://" in args.target else ""
    beside = tempfile.gettempdir()
    if args.target and not server:
        beside = os.path.dirname(os.path.abspath(args.target))
    bench = Bench(args.quick, server)
    database = "a server" if server else f"SQLite {sqlite3.sqlite_version}, {file_system(beside)}"
    machine = f"{platform.platform()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, {database}"
    if not args.json:
        print(machine, flush=True)
    rows = []
    for title, measure in (BENCH_ROWS_OF_A_SERVER if server else BENCH_ROWS).items():
        name = title.format(f"{bench.depth:,}")
        if args.only not in name:
            continue
        with contextlib.ExitStack() as bench.cleanup:
            folder = tempfile.TemporaryDirectory(
                prefix="flowstore-", dir=beside, ignore_cleanup_errors=True
            )
            bench.folder = bench.cleanup.enter_context(folder)
            found = measure(bench)
        rows.append(
            {"name": name, "holds": found.holds, "said": found.said, "measured": found.figures}
        )
        if not args.json:
            print(f"{'holds ' if found.holds else 'MISSES'} {name}: {found.said}", flush=True)
    missed = sum(not row["holds"] for row in rows)
    if args.json:
        print(
            json.dumps({"machine": machine, "quick": args.quick, "rows": rows, "holds": not missed})
        )
    else:
        print(f"{len(rows) - missed} hold, {missed} missed")
    return 1 if missed else 0


def file_system(folder: str) -> str:
    """What kind of file system a folder is on, as far as Linux tells."""
    kinds = {"": "an unknown file system"}
    with contextlib.suppress(OSError):
        for line in Path("/proc/mounts").read_text().splitlines():
            at, kind = line.split()[1:3]
            if os.path.commonpath([os.path.realpath(folder), at]) == at:
                kinds[at] = kind
    return kinds[max(kinds)]


if __name__ == "__main__":
    if sys.argv[1:2] == ["bench-worker"]:
        raise SystemExit(bench_worker(sys.argv[2]))
    try:
        raise SystemExit(bench_command(sys.argv[1:]))
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except flowstore.FlowStoreError as problem:
        raise SystemExit(f"bench: {problem}") from problem

# What follows is the tests.

import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
)

from flowstore import (
    AlreadyExists,
    AlreadyTerminal,
    ApiToken,
    ArtifactRef,
    AsyncStore,
    CancelPending,
    CommandName,
    DeadLetter,
    Event,
    EventStore,
    EventSubscription,
    EventType,
    ExecutionError,
    ExecutionPointer,
    ExecutionStatus,
    Flow,
    FlowStatus,
    FlowStep,
    FlowStepStatus,
    FlowStore,
    FlowStoreError,
    IllegalTransition,
    InvalidData,
    LeaseLost,
    LimitExceeded,
    NotFound,
    PersistenceProvider,
    PointerStatus,
    QueuePolicy,
    ReclaimResult,
    RevisionMismatch,
    ScheduledCommand,
    SchemaError,
    SequenceConflict,
    Snapshot,
    StateBackend,
    StepRuntime,
    StorageError,
    Store,
    StoreBusy,
    StoreClosed,
    StoreCorrupt,
    StoredEvent,
    Tenant,
    TenantInactive,
    TenantLimits,
    TenantMismatch,
    TenantStatus,
    WorkflowDefinition,
    WorkflowExecution,
    WorkflowInstance,
    WorkflowStatus,
    WorkItem,
    WorkItemStatus,
)

# ==================================================================================================
# Helpers: one clock, one store for each engine, children, strikers, recorders
# ==================================================================================================


ENGINES = ["memory", "file", "postgres"]


START = datetime(2030, 1, 1, tzinfo=UTC)


EVENT = {"type": "custom"}


MAX_INT = 2**63 - 1


class Clock:
    """A clock that stands still until it is told to advance."""

    def __init__(self, now: datetime = START) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now

    def advance(self, seconds: float) -> datetime:
        self.now += timedelta(seconds=seconds)
        return self.now


def seconds(count: float) -> timedelta:
    return timedelta(seconds=count)


MakeStore = Callable[..., Store]


Call = Callable[[], Any]


parametrize = pytest.mark.parametrize


sqlite_only = pytest.mark.sqlite


postgres_only = pytest.mark.postgres


@pytest.fixture
def clock() -> Clock:
    return Clock()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """What asks for a store runs on every engine; what is about SQLite itself (`sqlite`) on SQLite's two."""
    engines = [
        name
        for name in ENGINES
        if name != "postgres" or not metafunc.definition.get_closest_marker("sqlite")
    ]
    given = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    for fixture in ("make_store", "target", "in_loop"):
        if fixture in metafunc.fixturenames and fixture not in re.findall(r"\w+", str(given)):
            metafunc.parametrize(fixture, engines, indirect=True)


# What a test may have changed in a schema besides rows, and whether it has left much.
SHAPE = """SELECT SUM(pg_relation_size(c.oid)) < 5000000, (SELECT json_object_agg(key, value) FROM flowstore_meta),
    (SELECT concat(name, status, policy, limits) FROM flowstore_tenants WHERE id = 'default'),
    json_agg(json_build_array(relname, relnatts, relacl, reltuples,
        (SELECT COUNT(*) FROM pg_trigger WHERE tgrelid = c.oid)) ORDER BY relname)
    FROM pg_class c WHERE relnamespace = to_regnamespace(%s)"""


class PostgresServer:
    """A PostgreSQL server of our own, on this machine alone."""

    shared: ClassVar[PostgresServer]

    def __init__(self, folder: Path, *settings: str) -> None:
        found = [*sorted(Path("/usr/lib/postgresql").glob("*/bin")), *map(Path, os.get_exec_path())]
        self.programs = next((bin for bin in reversed(found) if (bin / "initdb").exists()), None)
        if self.programs is None:
            pytest.skip("initdb, of PostgreSQL, is missing: apt-get install postgresql")
        pytest.importorskip("psycopg")
        self.folder = folder
        self.user = "postgres" if os.getuid() == 0 else None  # it refuses to run as root
        if self.user:
            shutil.chown(folder, self.user)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        options = "-A trust -U postgres -E UTF8 --locale=C.UTF-8 -N"
        self.run("initdb", "-D", f"{folder}/data", *options.split())
        here = f"port={self.port}", f"unix_socket_directories={folder}"
        own = ["listen_addresses=127.0.0.1", *here, *settings]
        (folder / "data" / "postgresql.auto.conf").write_text(
            "\n".join("{} = '{}'".format(*one.split("=", 1)) for one in own)
        )
        self.url = f"postgresql://postgres:secret@127.0.0.1:{self.port}"
        self.schemas = itertools.count()
        self.connections: dict[str, Any] = {}
        self.left: list[str] = []  # targets of tests that have ended
        self.shape: Any = None
        self.start()

    def run(self, program: str, *arguments: str) -> None:
        """Run a program of PostgreSQL's as its user."""
        assert self.programs is not None
        subprocess.run([str(self.programs / program), *arguments], user=self.user, cwd=self.folder, check=True,
                       stdout=subprocess.DEVNULL, env=os.environ | {"LC_ALL": "C"})  # fmt: skip

    def start(self) -> None:
        self.run("pg_ctl", "-D", f"{self.folder}/data", "-l", f"{self.folder}/log", "-w", "start")

    def stop(self, mode: str) -> None:
        while self.connections:
            self.connections.popitem()[1].close()
        self.run("pg_ctl", "-D", f"{self.folder}/data", "-w", "-m", mode, "stop")

    def target(self) -> str:
        """The URL of a schema where nothing is yet."""
        number = next(self.schemas)
        database = f"tests_{number // 20}"  # what all tests have made would make each one slower
        if number % 20 == 0:
            with self.connected("postgres") as db:
                db.execute(f"CREATE DATABASE {database}")
        return f"{self.url}/{database}?schema=test_{number}"

    def connected(self, database: str) -> Any:
        psycopg = pytest.importorskip("psycopg")
        return psycopg.connect(f"{self.url}/{database}", autocommit=True)

    def empty_target(self, now: datetime) -> str:
        """The URL of a store made at that time, without rows. To make the tables would take longer than most tests."""
        while self.left:
            target = self.left.pop()
            with suppress(pytest.importorskip("psycopg").Error):
                if self.emptied(target, now):
                    return target
        target = self.target()
        flowstore.open(target).close()
        assert self.emptied(target, now)
        return target

    def emptied(self, target: str, now: datetime) -> bool:
        """Delete what a test has left; whether the tables are then as they were made, and nothing holds them."""
        address, schema = target.split("?schema=")
        database = address.rpartition("/")[2]
        if database not in self.connections:
            self.connections[database] = self.connected(database)
        db = self.connections[database]
        db.execute(
            f"SET search_path = {schema}; SET lock_timeout = 50; SET session_replication_role = replica"
        )
        found = db.execute(SHAPE, [schema]).fetchone()
        self.shape = self.shape or found
        micros = int(now.timestamp() * 1_000_000)
        tables = {*flowstore._TABLE_NAMES} - {"flowstore_meta", "flowstore_tenants"}
        db.execute(
            f"""{"".join(f"DELETE FROM {name};" for name in tables)}
            DELETE FROM flowstore_tenants WHERE id <> 'default';
            UPDATE flowstore_tenants SET created_at = {micros}, updated_at = {micros}"""
        )
        return bool(found == self.shape)


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """The server that all tests share: one that need not survive a crash of the machine."""
    with tempfile.TemporaryDirectory(prefix="flowstore-pg-", ignore_cleanup_errors=True) as folder:
        os.chmod(folder, 0o755)
        server = PostgresServer(
            Path(folder),
            "fsync=off",
            "full_page_writes=off",
            "autovacuum=off",
            "max_connections=200",
        )
        PostgresServer.shared = server
        try:
            yield server
        finally:
            server.stop("immediate")


def target_of(request: pytest.FixtureRequest, path: Path, empty: Clock | None = None) -> str:
    """Where the engine that a fixture was asked for may make a new store, or has an empty one."""
    if request.param == "postgres":
        server: PostgresServer = request.getfixturevalue("postgres")
        if empty is None:
            return server.target()
        target = server.empty_target(empty.now)
        request.addfinalizer(partial(server.left.append, target))
        return target
    return ":memory:" if request.param == "memory" else str(path)


@pytest.fixture
def make_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakeStore]:
    """A function that opens a new, empty database of the engine; keywords are those of `open`."""
    opened: list[Store] = []

    def make(**options: Any) -> Store:
        clock = options.get("clock")
        made_at = clock if isinstance(clock, Clock) else Clock(datetime.now(UTC))
        target = target_of(request, tmp_path / f"store-{len(opened)}.db", made_at)
        opened.append(flowstore.open(target, **{"synchronous": "OFF", **options}))
        return opened[-1]

    yield make
    for store in opened:
        store.close()


@pytest.fixture
def make_store_state(make_store: MakeStore, clock: Clock) -> MakeStore:
    return partial(make_store, clock=clock, backoff=float, lease_seconds=10)


@pytest.fixture
def store(make_store_state: MakeStore) -> Store:
    return make_store_state()


@pytest.fixture(params=["memory", "file"])
def sqlite_store(request: pytest.FixtureRequest, tmp_path: Path, clock: Clock) -> Iterator[Store]:
    target = ":memory:" if request.param == "memory" else tmp_path / "sqlite.db"
    with flowstore.open(target, clock=clock, synchronous="OFF") as opened:
        yield opened


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a file store may be created; nothing is there yet."""
    return tmp_path / "app.db"


@pytest.fixture
def file_store(path: Path, clock: Clock) -> Iterator[Store]:
    with flowstore.open(
        path, clock=clock, backoff=float, lease_seconds=10, busy_timeout=60
    ) as opened:
        yield opened


def again(block: Call) -> Any:
    """The block's outcome; on PostgreSQL it is run again while it loses against another transaction."""
    for _ in range(1000):
        with suppress(StoreBusy):
            return block()
        time.sleep(random.random() * 0.01)
    raise AssertionError("the block loses for ever")


forking = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


def in_fork(call: Call) -> Any:
    """The call in a forked child; what it returned, or raises what it raised."""
    receiver, sender = os.pipe()

    def child() -> None:
        caller = Caller(call, started=False)
        caller.run()
        with os.fdopen(sender, "wb") as stream:
            pickle.dump((caller.met, caller.raised), stream)

    pid = forked(child)
    os.close(sender)
    with os.fdopen(receiver, "rb") as stream:
        value, error = pickle.load(stream)
    reap(pid)
    if error is not None:
        raise error
    return value


SCRIPT_BEGINS = "from __future__ import annotations\nimport os, signal, sys, flowstore\n"


def script(source: str, *arguments: object, pass_fds: Sequence[int] = ()) -> subprocess.Popen[str]:
    """A Python process that runs `source` with `flowstore` at hand."""
    home = str(Path(flowstore.__file__).parent)
    path = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", f"{SCRIPT_BEGINS}{source}", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path}, text=True,
        stdin=pipe, stdout=pipe, stderr=pipe, pass_fds=pass_fds,
    )  # fmt: skip


def finished(process: subprocess.Popen[str], status: int = 0) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == status, err
    return out


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None and process.stderr is not None
    line = process.stdout.readline()
    assert line, process.stderr.read()
    return line.rstrip("\n")


def state_of(store: Store | StateBackend) -> StateBackend:
    return store if isinstance(store, StateBackend) else store.state


def create(
    store: Store | StateBackend, execution_id: str = "e1", **fields: Any
) -> WorkflowExecution:
    return state_of(store).create_execution(
        WorkflowExecution(**{"workflow_id": "w", "execution_id": execution_id, **fields})
    )


def enqueue(store: Store | StateBackend, **fields: Any) -> str:
    """A work item of execution e1 (made on demand) in queue q, unless the fields say otherwise; its id."""
    fields = {"execution_id": "e1", "queue_type": "q", **fields}
    state, run = state_of(store), fields["execution_id"]
    if not (state.latest_sequence(run) or state.get_execution(run)):
        create(store, run)
    return state.enqueue_work_item(WorkItem(**fields))


def claim(
    store: Store | StateBackend, *queues: str, worker: str = "w1", **options: Any
) -> WorkItem:
    item = state_of(store).claim_work_item(worker, list(queues or ("q",)), **options)
    assert item is not None
    return item


def claimed(store: Store | StateBackend, **fields: Any) -> WorkItem:
    """A new work item, claimed."""
    item_id = enqueue(store, **fields)
    item = claim(store, fields.get("queue_type", "q"))
    assert item.id == item_id
    return item


def pickled(protocol: int) -> Callable[[Any], Any]:
    return lambda value: pickle.loads(pickle.dumps(value, protocol))


COPIES: list[Callable[[Any], Any]] = [copy.copy, copy.deepcopy, *map(pickled, range(6))]


def look(store: Store, item_id: str) -> WorkItem:
    item = store.state.get_work_item(item_id)
    assert item is not None
    return item


def contents(store: Store) -> dict[str, Any]:
    """Everything that the core can show of a store, to see that a refused call changed nothing."""
    return {
        "tables": store.stats()["tables"],
        "log": store.events.read_all(limit=10_000),
        "executions": store.state.list_executions(limit=10_000),
        "known": store.events.list_executions(limit=10_000),
        "items": store.state.list_work_items(limit=10_000),
        "dead": store.state.list_dead_letters(limit=10_000),
        "snapshots": [
            store.state.latest_snapshot(known)
            for known in store.events.list_executions(limit=10_000)
        ],
    }


def keys_in(log: list[StoredEvent]) -> list[str]:
    return [stored.event["key"] for stored in log]


def types_in(log: list[StoredEvent]) -> list[str]:
    return [stored.event["type"] for stored in log]


# Every record: its fields, and their defaults ("new": an id of its own; none: it cannot be left out).
FIELDS = """
Flow id=new controller_id='' goal='' owner_session_key='' requester_origin='' current_step='' state={} wait=None
    status='created' cancel_requested=False revision=0 created_at=None updated_at=None
FlowStep id=new flow_id runtime='managed' child_session_key=None run_id task='' status='pending' result=None
    created_at=None updated_at=None
FlowEvent id flow_id kind payload at
WorkflowDefinition workflow_id version ir created_at=None tenant_id='default'
WorkflowExecution execution_id=new workflow_id workflow_version='1' status='pending' initial_input={} current_state={}
    started_at=None updated_at=None completed_at=None tenant_id='default'
Snapshot execution_id at_sequence state id=new created_at=None
StoredEvent execution_id sequence tenant_id event timestamp id position
ApiToken id name role created_at expires_at revoked_at tenant_id
WorkItem execution_id node_id='' queue_type payload={} attempt=0 max_attempts=3 id=new created_at=None
    available_at=None lease_expires_at=None worker_id=None lease_fence=0 status='pending' last_error=None
    tenant_id='default' priority=0 unique_key=None claimed_at=None settled_at=None
DeadLetter execution_id node_id queue_type payload attempt max_attempts id created_at available_at lease_expires_at
    worker_id lease_fence status last_error tenant_id dead_lettered_at priority=0 unique_key=None claimed_at=None
    settled_at=None
ArtifactRef hash size media_type
ReclaimResult retryable=[] exhausted=[]
QueuePolicy queue_type paused=False max_running=None rate=None per_seconds=1.0
Tenant id name='' status='active' policy=None limits=TenantLimits created_at=None updated_at=None
TenantLimits max_concurrent_executions=None max_workflows=None max_tokens_per_month=None max_cost_per_month_usd=None
WorkflowInstance id=new name='' workflow_definition_id version=1 description=None reference=None root_workflow_id=None
    execution_pointers=[] next_execution=0 status='Runnable' data={} create_time=None complete_time=None
ExecutionPointer id=new step_id active=True status='Pending' sleep_until=None persistence_data=None start_time=None
    end_time=None event_name=None event_key=None event_published=False event_data=None step_name=None retry_count=0
    children=[] context_item=None predecessor_id=None outcome=None scope=[] extension_attributes={}
Event id=new event_name event_key event_data=None event_time=None is_processed=False
EventSubscription id=new workflow_id step_id execution_pointer_id event_name event_key subscribe_as_of=None
    subscription_data=None external_token=None external_worker_id=None external_token_expiry=None
ScheduledCommand command_name data execute_time
ExecutionError workflow_id execution_pointer_id message error_time=None
"""


RECORDS: dict[str, dict[str, str]] = {
    line[0]: dict(re.findall(r"(\w+)=?(\S*)", line[1]))
    for line in re.findall(r"^([A-Z]\w+)((?:\s+[a-z]\S+)+)", FIELDS, re.MULTILINE)
}


# Facts of which nothing may be left out.
# Values of a record, without which it cannot be made.
NEEDED_FIELDS: dict[str, dict[str, Any]] = {
    "FlowEvent": {"id": 1, "flow_id": "f", "kind": "k", "payload": {}, "at": START},
    "StoredEvent": {
        "execution_id": "e",
        "sequence": 1,
        "tenant_id": "default",
        "event": EVENT,
        "timestamp": START,
        "id": None,
        "position": 1,
    },
    "ApiToken": {
        "id": "t",
        "name": "n",
        "role": "r",
        "created_at": START,
        "expires_at": None,
        "revoked_at": None,
        "tenant_id": "default",
    },
    "DeadLetter": vars(WorkItem(execution_id="e", queue_type="q")) | {"dead_lettered_at": START},
    "ArtifactRef": {"hash": "0" * 64, "size": 1, "media_type": None},
    "FlowStep": {"flow_id": "f", "run_id": "r"},
    "WorkflowDefinition": {"workflow_id": "w", "version": "1", "ir": {"steps": []}},
    "WorkflowExecution": {"workflow_id": "w"},
    "Snapshot": {"execution_id": "e", "at_sequence": 1, "state": {}},
    "WorkItem": {"execution_id": "e", "queue_type": "q"},
    "QueuePolicy": {"queue_type": "q"},
    "Tenant": {"id": "acme"},
    "WorkflowInstance": {"workflow_definition_id": "d"},
    "ExecutionPointer": {"step_id": 0},
    "Event": {"event_name": "n", "event_key": "k"},
    "EventSubscription": {
        "workflow_id": "w",
        "step_id": 0,
        "execution_pointer_id": "p",
        "event_name": "n",
        "event_key": "k",
    },
    "ScheduledCommand": {"command_name": "ProcessWorkflow", "data": "w", "execute_time": 0},
    "ExecutionError": {"workflow_id": "w", "execution_pointer_id": "p", "message": "m"},
}


def record(name: str, **fields: Any) -> Any:
    return getattr(flowstore, name)(**{**NEEDED_FIELDS.get(name, {}), **fields})


json_leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
)


def nested(levels: int, of: str = "[") -> Any:
    """`levels` lists (or dicts), one in the other."""
    value: Any = [] if of == "[" else {}
    for _ in range(levels - 1):
        value = [value] if of == "[" else {"k": value}
    return value


def through_event(store: Store, execution_id: str, value: Any) -> Any:
    store.events.append(execution_id, "default", {"type": "t", "value": value})
    return store.events.load_events(execution_id)[0].event["value"]


def through_input(store: Store, execution_id: str, value: Any) -> Any:
    create(store, execution_id, initial_input=value)
    return execution(store, execution_id).initial_input


def through_state(store: Store, execution_id: str, value: Any) -> Any:
    create(store, execution_id)
    store.state.update_execution_current_state(execution_id, value)
    return execution(store, execution_id).current_state


def through_patch(store: Store, execution_id: str, value: Any) -> Any:
    create(store, execution_id)
    store.state.patch_append_array(execution_id, "list", value)
    return execution(store, execution_id).current_state["list"][0]


def through_snapshot(store: Store, execution_id: str, value: Any) -> Any:
    create(store, execution_id)
    store.state.write_snapshot(Snapshot(execution_id=execution_id, at_sequence=0, state=value))
    snapshot = store.state.latest_snapshot(execution_id)
    assert snapshot is not None
    return snapshot.state


def through_payload(store: Store, execution_id: str, value: Any) -> Any:
    item_id = enqueue(store, execution_id=execution_id, queue_type=execution_id, payload=value)
    item = claim(store, execution_id)
    assert item.payload == look(store, item_id).payload
    return item.payload


PLACES = [
    through_event,
    through_input,
    through_state,
    through_patch,
    through_snapshot,
    through_payload,
]


every_place = parametrize("through", PLACES, ids=[place.__name__[8:] for place in PLACES])


def levels(value: Any) -> int:
    if not isinstance(value, (list, dict)):
        return 0
    return 1 + max(map(levels, value.values() if isinstance(value, dict) else value), default=0)


NOT_UTF8 = "\ud800"


A_TIME = datetime(2030, 1, 1)


def circular() -> Any:
    loop: list[Any] = []
    loop.append(loop)
    return loop


# --- values whose own code raises ---


class Rude(Exception):
    """An error that can neither be shown nor be made again."""

    def __init__(self, _one: int, _other: int) -> None:
        super().__init__()

    def __str__(self) -> str:
        raise RuntimeError


def fails(*_: object, **__: object) -> NoReturn:
    raise Rude(1, 2)


NEEDED = {"__new__", "__init__", "__getattribute__", "__setattr__", "__init_subclass__", "__repr__"}


def rude(base: type, **own: Any) -> Any:
    """A type like `base` whose methods all raise, but what making one needs."""
    methods = {name for name in dir(base) if callable(getattr(base, name))} - {*dir(type), *NEEDED}
    named = {"__hash__", "__eq__", "__str__", "__format__", "__bool__", "__len__", "__reduce_ex__"}
    return type(f"Rude{base.__name__}", (base,), dict.fromkeys(methods | named, fails) | own)


class RudeZone(tzinfo):
    """A time zone that raises, or answers with what was given."""

    dst = tzname = fails

    def __init__(self, *answer: Any) -> None:
        self.answer = answer

    def utcoffset(self, _: object) -> Any:
        return self.answer[0] if self.answer else fails()


class RudePath:
    def __init__(self, *answer: Any) -> None:
        self.answer = answer

    def __fspath__(self) -> Any:
        return self.answer[0] if self.answer else fails()


def proxy(kind: type | None, base: type = object) -> Any:
    """What says that it is of a type that it is not, as proxies do, or raises when it is asked; all else raises."""
    asked = property(fails if kind is None else lambda _: kind)
    return rude(base, __class__=asked, __getattr__=fails)()


class RudeStatus(StrEnum):
    RUNNING = "running"
    __str__ = __format__ = __len__ = __hash__ = __eq__ = encode = fails


def rude_uuid(**own: Any) -> uuid.UUID:
    made = object.__new__(rude(uuid.UUID, **own))
    assert isinstance(made, uuid.UUID)
    vars(uuid.UUID)["int"].__set__(made, 5)
    return made


RUDE: list[Any] = [
    rude(str)("own"), rude(str)(""), rude(int)(5), rude(int)(-1), rude(int)(2**70), rude(float)(1.5),
    rude(float)("nan"), rude(bytes)(b"x"), rude(list)(), rude(list)([EVENT]), rude(tuple)([EVENT]), rude(dict)(),
    rude(dict)(type="t"), rude(dict, items=dict.items)(type="t", x=1), rude(dict, items=lambda _: [1])(a=1),
    rude(dict, items=lambda _: 5)(a=1), {rude(str, __hash__=str.__hash__)("type"): "t"},
    {"type": rude(str)("t")}, {"type": "t", "x": [rude(dict)(a=1)]}, {"type": "t", rude(float, __hash__=float.__hash__)(1.5): {1}},
    {"type": "t", "x": rude(list)([1])}, {"type": "t", "x": {"y": rude(tuple)([1])}}, [rude(list)([1])],
    {rude(str, __hash__=str.__hash__)("key"): object()}, rude(set)(), rude(datetime)(2030, 1, 1),
    rude(datetime)(2030, 1, 1, tzinfo=UTC), rude(datetime, utcoffset=lambda _: timedelta(0))(2030, 1, 1, tzinfo=UTC),
    datetime(2030, 1, 1, tzinfo=RudeZone()), datetime(2030, 1, 1, tzinfo=RudeZone(5)),
    datetime(2030, 1, 1, tzinfo=RudeZone(None)), datetime(2030, 1, 1, tzinfo=RudeZone(timedelta(3))),
    datetime(2030, 1, 1, tzinfo=RudeZone(timedelta(hours=1))), rude(timedelta)(1), rude(timedelta)(-1),
    rude_uuid(), rude_uuid(int=property(fails)), rude_uuid(int=property(lambda _: "x")), object.__new__(uuid.UUID),
    rude_uuid(int=property(lambda _: 16**4000)), proxy(None), proxy(None, list), proxy(None, str), proxy(str),
    proxy(dict), proxy(datetime), proxy(WorkItem), proxy(Flow), proxy(uuid.UUID), proxy(int), proxy(list), proxy(bool),
    RudePath(), RudePath(5), RudePath(b"x"), RudePath(rude(str)("own")), RudeStatus.RUNNING,
    rude(object, __conform__=fails)(), rude(object, keys=fails)(), rude(object, __iter__=fails)(),
    rude(object, __getitem__=fails)(), rude(ChainMap)({"a": 1}), map(fails, [1]),
]  # fmt: skip


def broken(record: Any) -> Iterator[tuple[str, Any]]:
    """Records like this one, of which each field in turn is missing, or raises when it is read; and that field."""
    kind = type(record)
    options = {"frozen": kind.__dataclass_params__.frozen}
    for field in dataclasses.fields(record):
        own = partial(dict.update, **{field.name: property(fails)})
        for made_of in (kind, types.new_class("Broken", (kind,), options, own)):
            made: Any = object.__new__(made_of)
            vars(made).update(vars(record))
            del vars(made)[field.name]
            yield field.name, made


# --- what each argument refuses ---
BAD_LEAVES: dict[str, Any] = {
    "NaN": float("nan"),
    "infinity": float("inf"),
    "-infinity": float("-inf"),
    "surrogate": NOT_UTF8,
    "bytes": b"bytes",
    "set": {1, 2},
    "object": object(),
    "datetime": A_TIME,
    "date": A_TIME.date(),
    "Decimal": Decimal("1.5"),
    "complex": 1j,
    "UUID": uuid.UUID(int=0),
    "4301 digits": 10**4300,
    "-4301 digits": -(10**4300),
    "tuple key": {("tuple",): 1},
    "bytes key": {b"key": 1},
    "surrogate key": {NOT_UTF8: 1},
    "NaN key": {float("nan"): 1},
    "4301 digits key": {10**4300: 1},
    "circle": circular(),
    "257 deep": nested(257),
    "257 deep dicts": nested(257, "{"),
    "100,000 deep": nested(100_000),
    "record": Flow(),
    "function": len,
}


def furnish_plainly(store: Store) -> Store:
    """Execution e1, an event, a snapshot, item `held` (claimed by w1) and item `waiting`, both in queue q."""
    create(store)
    write(store, "e1")
    store.state.write_snapshot(Snapshot(execution_id="e1", at_sequence=1, state={"seen": 1}))
    claimed(store, id="held")
    enqueue(store, id="waiting")
    return store


@pytest.fixture
def furnished(store: Store) -> Store:
    return furnish_plainly(store)


ERRORS: dict[str, dict[str, Any]] = {
    "NotFound": {"kind": "execution", "id": "e1"},
    "AlreadyExists": {"kind": "work item", "id": "i1"},
    "RevisionMismatch": {"expected": 3, "actual": 4},
    "SequenceConflict": {"execution_id": "e1", "expected": 3, "actual": 4},
    "LeaseLost": {"item_id": "i1"},
    "IllegalTransition": {"id": "f1", "from_status": "created", "to_status": "finished"},
    "AlreadyTerminal": {"id": "f1", "status": "finished"},
    "CancelPending": {"id": "f1", "status": "running"},
    "TenantMismatch": {"execution_id": "e1", "tenant_id": "acme"},
    "TenantInactive": {"tenant_id": "acme"},
    "LimitExceeded": {"tenant_id": "acme"},
    "InvalidData": {},
    "StorageError": {},
    "StoreBusy": {},
    "StoreFull": {},
    "StoreCorrupt": {},
    "StoreClosed": {},
    "SchemaError": {},
}


def error(name: str) -> Any:
    return getattr(flowstore, name)(*(ERRORS[name].values() or ["it went wrong"]))


def one_sentence(error: BaseException) -> bool:
    return bool(str(error).strip()) and "\n" not in str(error).strip()


def raises(error: type[BaseException], *calls: Call) -> Any:
    """Each call raises the error, in one sentence; the last one that was raised."""
    for call in calls:
        with pytest.raises(error) as caught:
            call()
        assert one_sentence(caught.value)
    return caught.value


def listing(folder: Path) -> dict[str, bytes]:
    """All files below a folder, by their paths."""
    return {
        str(found.relative_to(folder)): found.read_bytes()
        for found in sorted(folder.rglob("*"))
        if found.is_file()
    }


@pytest.fixture
def at_rest(path: Path, clock: Clock) -> Path:
    """A file that no store has open, with what `furnished` has."""
    with flowstore.open(path, clock=clock) as store:
        furnish_plainly(store)
    return path


@pytest.fixture
def crashed(tmp_path: Path) -> Path:
    """A file as a crash leaves it: part of what was written is in its -wal only, and there is no -shm."""
    source, image = tmp_path / "live.db", tmp_path / "crashed"
    image.mkdir()
    with flowstore.open(source) as store:
        store.events.append_batch("e1", "default", [EVENT] * 20)
        for suffix in ("", "-wal"):
            (image / f"app.db{suffix}").write_bytes(Path(f"{source}{suffix}").read_bytes())
    assert (image / "app.db-wal").stat().st_size
    return image / "app.db"


# --- paths where no database can be ---


def path_of(folder: Path, length: int) -> Path:
    """A path with so many bytes, in a folder that is made."""
    while length - len(os.fsencode(folder)) > 240:
        folder /= "d" * 200
    folder.mkdir(parents=True, exist_ok=True)
    return folder / ("f" * (length - len(os.fsencode(folder)) - 1))


class Stop(BaseException):
    """What is no Exception."""


def execution(store: Store, execution_id: str = "e1") -> WorkflowExecution:
    found = store.state.get_execution(execution_id)
    assert found is not None
    return found


def latest(store: Store) -> tuple[int, Any] | None:
    found = store.state.latest_snapshot("e1")
    return None if found is None else (found.at_sequence, found.state)


def total(state: Any, stored: StoredEvent) -> Any:
    return [*(state or []), stored.event["n"]]


STEPS = int(os.environ.get("FLOWSTORE_STEPS", "80"))


WATCHDOG = 60 + STEPS // 20  # seconds after which whatever has not ended counts as hanging


needs_kill = pytest.mark.skipif(
    not hasattr(signal, "SIGKILL"), reason="this platform has no SIGKILL"
)


posix = pytest.mark.skipif(os.name != "posix", reason="signals and alarms are POSIX's")


# A strike may hit a finalizer or a generator being closed, which can only report it.
swallows = pytest.mark.usefixtures("unraisable_unheard")


# ---------------------------------------------------------------- helpers, for this process and for children


def waits(thread: int | None) -> bool:
    """Whether a thread's call has been going on inside the library for some time: long enough to wait there."""
    for _ in range(20):
        frame = sys._current_frames().get(thread or 0)
        while frame is not None and frame.f_code.co_filename != flowstore.__file__:
            frame = frame.f_back
        if frame is None:
            return False
        time.sleep(0.001)
    return True


class Caller(threading.Thread):
    """A thread that makes one call; `outcome()` is what it returned or raised."""

    def __init__(self, call: Callable[..., Any], *arguments: Any, started: bool = True) -> None:
        super().__init__(daemon=True)
        self.call = partial(call, *arguments)
        self.met: Any = None
        self.raised: BaseException | None = None
        if started:
            self.start()

    def run(self) -> None:
        try:
            self.met = self.call()
        except BaseException as error:
            self.met = self.raised = error

    def outcome(self, seconds: float = WATCHDOG) -> Any:
        self.join(seconds)
        if self.is_alive():
            stack = "".join(traceback.format_stack(sys._current_frames()[self.ident or 0]))
            raise AssertionError(f"a call hangs\n{stack}")
        return self.met

    def result(self) -> Any:
        """What the call returned; raises what it raised."""
        self.outcome()
        if self.raised is not None:
            raise self.raised
        return self.met

    def waits(self) -> bool:
        return waits(self.ident)


def outcomes(calls: Sequence[Call]) -> list[Any]:
    """What each call returned or raised, all made at once in threads of their own."""
    return [caller.outcome() for caller in [Caller(call) for call in calls]]


def crowd(count: int, work: Callable[[int], None]) -> None:
    """So many threads do the work at once, each by its number, and none fails."""
    assert outcomes([partial(work, me) for me in range(count)]) == [None] * count


def in_thread(call: Call) -> Any:
    return Caller(call).result()


def together(calls: list[Call]) -> list[Any]:
    """All calls at once, each in a thread; what they returned, or the FlowStoreError they raised."""
    barrier = threading.Barrier(len(calls))

    def started(call: Call) -> Any:
        barrier.wait(WATCHDOG)
        try:
            return call()
        except FlowStoreError as error:
            return error

    return [caller.result() for caller in [Caller(started, call) for call in calls]]


def until(condition: Call, what: str = "", seconds: float = WATCHDOG) -> None:
    """Waits for the condition, up to the watchdog's time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            faulthandler.dump_traceback()
            raise AssertionError(f"waited in vain {what}")
        time.sleep(0.001)


def event(key: str, **more: Any) -> dict[str, Any]:
    return {"type": "custom", "key": key, **more}


def write(store: Any, run: str, key: str | None = None) -> Any:
    return store.events.append(run, "default", EVENT if key is None else event(key))


def write_to(path: Path) -> None:
    """The first event of a file's execution e1, by a store that is closed again."""
    with flowstore.open(path) as store:
        write(store, "e1")


def execute(store: Store, sql: str, parameters: Any = ()) -> list[tuple[Any, ...]]:
    """A statement in a transaction of its own."""
    with store.transaction() as tx:
        return tx.execute(sql, parameters)


def write_pair(store: Store, run: str, key: str) -> int:
    return store.events.append_batch(run, "default", [event(key), event(key)])


def write_pair_in_block(store: Store, run: str, key: str) -> None:
    with store.transaction():
        write(store, run, key)
        write(store, run, key)


def nested_engine(store: Store, run: str, key: str) -> None:
    with store.transaction():
        write(store, run, key)
        with store.transaction():
            write(store, run, key)


def half_caught(store: Store, run: str, key: str) -> None:
    """A pair whose block also meets an error that is caught in it."""
    with store.transaction() as tx:
        write(store, run, key)
        with suppress(StorageError):
            tx.execute("SELECT nonsense")
        with suppress(SequenceConflict):
            store.events.append(run, "default", event("never"), expected_sequence=10**6)
        write(store, run, key)


def keys(store: Store, run: str) -> list[str]:
    """The keys written to a log, which must have no gap."""
    log = store.events.load_events(run)
    assert [stored.sequence for stored in log] == list(range(1, len(log) + 1)), "the log has a gap"
    return keys_in(log)


def pairs(store: Store, run: str) -> list[str]:
    """The keys of a log that is written in pairs, none of which may be torn or there twice."""
    found = keys(store, run)
    assert found[::2] == found[1::2], "a write is half there"
    assert len(set(found)) * 2 == len(found), "a write is there twice"
    return found[::2]


def meet(store: Store, calls: Sequence[Call]) -> list[Any]:
    """The outcomes of calls that queue behind an open transaction, and so are committed as one group."""
    callers: list[Caller] = []
    with store.transaction():
        for call in calls:
            callers.append(Caller(call))
            until(
                lambda: queued(store) >= len(callers),
                "for the call to queue",
            )
    return [caller.outcome() for caller in callers]


def leave(body: Callable[[], None]) -> NoReturn:
    """In a forked child: runs the body and ends the process, with status 0 if nothing was raised."""
    status = 1
    try:
        signal.alarm(WATCHDOG // 2)
        body()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def forked(body: Callable[[], None]) -> int:
    """Forks a child that runs the body."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some versions warn of a fork while threads run
        pid = os.fork()
    return pid or leave(body)


def reap(pid: int) -> None:
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, "a forked child failed or hung"


def refused(*calls: Call) -> None:
    """Each of the calls has to raise a StorageError."""
    for call in calls:
        try:
            result = call()
        except StorageError:
            continue
        raise AssertionError(f"not refused, but {result!r}: {call}")


@contextmanager
def mounted(place: Path, *options: object) -> Iterator[None]:
    """Something is mounted there meanwhile, where that may be done."""
    try:
        command = ["mount", *map(str, options), str(place)]
        failed = subprocess.run(command, capture_output=True).returncode
    except OSError:
        pytest.skip("no mount command here")
    if failed:
        pytest.skip("nothing can be mounted here (needs root)")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(store: Store, stop: Callable[[], bool]) -> tuple[list[str], list[Exception]]:
    """Four threads write pairs until each meets an error: what was acknowledged, and the errors."""
    acknowledged: list[str] = []

    def work(me: int) -> None:
        number = 0
        while not stop():
            number += 1
            store.events.append_batch(
                "fill", "default", [event(f"{me}.{number}", text="x" * 3000)] * 2
            )
            acknowledged.append(f"{me}.{number}")

    errors = outcomes([partial(work, me) for me in range(4)])
    assert None not in errors, "the disk was never full"
    return acknowledged, errors


class JobTimeout(Exception):
    """What a time limit of a job raises from its signal handler."""


def stems_from(error: BaseException | None, kind: type[BaseException]) -> bool:
    """Whether an error is of that kind, or was raised for one that is."""
    while error is not None and not isinstance(error, kind):
        error = error.__cause__ or error.__context__
    return error is not None


class Striker:
    """Raises an exception at the n-th place of a call where the interpreter could, and perhaps again.

    CPython looks for signals where a function begins, after a call of a C function, where a loop turns back.
    A function that raises while it traces is not called again, so the second strike is the profiler's.
    """

    names: ClassVar[dict[CodeType, dict[int, str]]] = {}
    # CPython's own flaw: a condition that is struck where it is entered or left stays locked for ever.
    spared: ClassVar = {
        method.__code__ for method in (threading.Condition.__enter__, threading.Condition.__exit__)
    }

    def __init__(
        self,
        strike_at: int,
        again_after: int = 0,
        error: type[BaseException] = KeyboardInterrupt,
    ) -> None:
        self.strike_at, self.again_after, self.places, self.where = strike_at, again_after, 0, ""
        self.error = error
        self.previous: tuple[FrameType, str] | None = None

    def __call__(self, frame: FrameType, what: str, _arg: object) -> Striker:
        here = what == "call"
        if here:
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if what == "opcode":
            if frame.f_code not in self.names:
                self.names[frame.f_code] = {
                    i.offset: i.opname for i in dis.get_instructions(frame.f_code)
                }
            last, self.previous = (
                self.previous,
                (frame, self.names[frame.f_code].get(frame.f_lasti, "")),
            )
            here = (
                last is not None
                and last[0] is frame
                and last[1].startswith(("CALL", "JUMP_BACKWARD"))
            )
        else:
            self.previous = None
        # A lock of the module logging that is struck as it is taken stays locked, too.
        spared = frame.f_code in self.spared or frame.f_code.co_filename == logging.__file__
        if here and not spared:
            self.places += 1
            if self.places == self.strike_at:
                self.where = "".join(traceback.format_stack(frame, 4))
                if self.again_after:
                    sys.setprofile(self.again)
                self.strike()
        return self

    def strike(self) -> None:
        raise self.error

    def again(self, frame: FrameType, what: str, _arg: object) -> None:
        if what in ("call", "c_return"):
            self.again_after -= 1
            if not self.again_after:
                self.where += f"and then at\n{''.join(traceback.format_stack(frame, 4))}"
                raise self.error

    def run(self, call: Call) -> bool:
        """Makes the call; returns whether it came to its end."""
        usual = sys.gettrace()
        sys.settrace(self)
        try:
            try:
                call()
            finally:
                sys.setprofile(None)
        except BaseException as error:
            if not stems_from(error, self.error):
                raise
            return False
        finally:
            sys.settrace(usual)
            self.previous = None
        return True


class Deep:
    """Makes a call where the stack has room for so many frames only: RecursionError, the natural way."""

    def __init__(self, left: int) -> None:
        self.left, self.where = left, f"a depth with {left} frames left\n"

    def run(self, call: Call) -> bool:
        """Makes the call; returns whether it came to its end."""
        try:
            dig(room() - self.left, call)
        except Exception as error:
            if not stems_from(error, RecursionError):
                raise
            return False
        return True


def dig(depth: int, call: Call) -> Any:
    """Makes a call so many frames deeper in the stack."""
    return dig(depth - 1, call) if depth > 0 else call()


def room() -> int:
    """How many frames the stack has room for."""
    try:
        return 1 + room()
    except RecursionError:
        return 0


class Visitor(Striker):
    """Makes another call at the n-th place of a call, in its thread, as a trace function or a handler does."""

    def __init__(self, visit_at: int, visit: Call) -> None:
        super().__init__(visit_at)
        self.visit = visit

    def strike(self) -> None:
        self.visit()


class HookStriker(Striker):
    """One that strikes in flowstore's own hooks alone: `os.fork()` runs those of other modules too."""

    def strike(self) -> None:
        frame: FrameType | None = sys._getframe(2)
        while frame is not None and frame.f_code.co_filename != flowstore.__file__:
            frame = frame.f_back
        if frame is None:
            self.strike_at += 1  # the next place, then
        else:
            super().strike()


def some_places(run: Callable[[Striker], Any], most: int = STEPS // 4) -> range:
    """The places of a call, or so many of them from a random one on; it has not as many each time."""
    dry = [Striker(0), Striker(0), Striker(0)]
    for striker in dry:
        run(striker)
    places = max(striker.places for striker in dry)
    stride = -(-places // most)
    return range(random.randint(1, stride), places + 1, stride)


STRIKES_WITH: dict[str, type[BaseException]] = {
    error.__name__: error for error in (KeyboardInterrupt, JobTimeout, RecursionError)
}


def strikers(
    kind: str, run: Callable[[Striker], Any], make: type[Striker] = Striker
) -> list[Striker | Deep]:
    """What strikes a call at each of its places, or at some of them."""
    if kind == "end of the stack":
        stride = max(1, 160 // STEPS)
        return [Deep(left) for left in range(random.randrange(stride), 70, stride)]
    if kind == "KeyboardInterrupt twice":
        places = some_places(run, STEPS // 2)
        return [make(place, again_after=random.randint(0, 40)) for place in places]
    return [make(place, error=STRIKES_WITH[kind]) for place in some_places(run)]


class Account:
    """What calls have said of what they wrote: to the log "run", and, where they came between others, to "visit"."""

    def __init__(self) -> None:
        self.returned, self.begun, self.stored = {"first"}, {"first"}, {"first"}
        self.unstored = set[str]()
        self.numbers = itertools.count()

    def key(self, name: str = "") -> str:
        """A new key, of a call that begins now."""
        signal.alarm(WATCHDOG // 2)
        self.begun.add(key := f"{name}{next(self.numbers)}")
        return key

    def visited(self, visit: Visit, kind: str, key: str) -> None:
        """A visit has been made, or refused."""
        if kind in ("append", "block"):
            (self.stored if visit.done else self.unstored).add(key)

    def check(self, store: Store, visits: bool = False) -> None:
        """All that was acknowledged is there, whole and once, and nothing that was never written."""
        there = set(pairs(store, "run"))
        assert self.returned <= there, f"acknowledged and lost: {self.returned - there}"
        assert there <= self.begun, f"there, and never written: {there - self.begun}"
        if visits:
            there = set(pairs(store, "visit"))
            lost, extra = self.stored - there, there & self.unstored
            assert there == self.stored, f"lost: {lost}; refused, but there: {extra}"
        assert store.check() == []


class Load:
    """Other threads, which write and read without a break: no strike at another's call may fail or stop them."""

    def __init__(self, store: Store) -> None:
        self.store, self.stop = store, False
        self.acknowledged: list[list[str]] = [[], []]
        self.callers = [Caller(self.work, me) for me in range(2)]

    def work(self, me: int) -> None:
        mine = self.acknowledged[me]
        while not self.stop:
            key = f"{me}.{len(mine)}"
            (write_pair, write_pair_in_block)[len(mine) % 2](self.store, f"load{me}", key)
            assert self.store.events.get_latest_sequence(f"load{me}") == 2 * len(mine) + 2
            mine.append(key)

    def goes_on(self, where: str) -> None:
        """Waits until each thread has begun and ended a call since."""
        aims = [len(mine) + 2 for mine in self.acknowledged]

        def all_have() -> bool:
            ended = [caller.met for caller in self.callers if not caller.is_alive()]
            assert not ended, f"another thread met {ended!r} after a strike at\n{where}"
            return all(len(mine) >= aim for mine, aim in zip(self.acknowledged, aims, strict=True))

        until(all_have, f"for the calls of other threads after a strike at\n{where}", 20)

    def end(self) -> None:
        self.stop = True
        assert [caller.outcome() for caller in self.callers] == [None, None]
        for me, mine in enumerate(self.acknowledged):
            assert pairs(self.store, f"load{me}") == mine


def prepared(name: str, store: Store, key: str, run: str = "run") -> Call:
    """A call of one kind, or a few, to be made once; what writes to the log writes a pair of that key."""
    state, events = store.state, store.events
    writes = {"block": write_pair_in_block, "nested": nested_engine, "caught": half_caught}
    item: Any = None
    if name in ("claim", "hold"):
        state.enqueue_work_item(WorkItem(execution_id=run, queue_type="q"))
    if name == "hold":
        item = state.claim_work_item("w", ["q"])

    def read() -> None:
        pairs(store, run)
        events.count_events(run)
        list(events.iter_events(run, chunk=2))

    def wait() -> None:
        state.claim_work_item("w", ["none"], wait=0.001)
        next(events.tail(timeout=0.001), None)  # of the load there is always more

    def claim_one() -> None:
        state.complete_work_item(claim(store))

    def hold() -> None:
        with state.hold(item, lease_seconds=0.3):  # a thread of it looks at each third of that
            write_pair(store, run, key)
        state.complete_work_item(item)

    def open() -> None:
        with flowstore.open(store.target, synchronous="OFF", busy_timeout=5.0) as another:
            write_pair(another, run, key)

    calls: dict[str, Call] = {
        "read": read, "wait": wait, "claim": claim_one, "hold": hold, "open": open
    }  # fmt: skip
    return calls.get(name) or partial(writes.get(name, write_pair), store, run, key)


def do(name: str, store: Store, key: str, run: str = "run") -> None:
    """A prepared call, made."""
    prepared(name, store, key, run)()


def read_and_write_at_the_end_of_the_stack(target: str, *names: str) -> None:
    """Where the stack ends, a call raises RecursionError: neither what it was given is wrong, nor what is stored."""
    store = flowstore.open(target, synchronous="OFF", busy_timeout=1.0)
    write_pair(store, "run", "first")
    met = set[str]()

    def attempt(name: str, left: int) -> None:
        try:
            dig(room() - left, partial(do, name, store, f"{name} {left}"))
        except Exception as error:
            met.add(f"{type(error).__name__} at the end of {name}")

    for left in range(70):
        signal.alarm(WATCHDOG // 2)
        for name in names:
            Caller(attempt, name, left).outcome(20)
    assert met == {f"RecursionError at the end of {name}" for name in names}, met


def settle_what_is_left(store: Store) -> None:
    """Settles the one item that a struck call may have left pending or claimed."""
    state = store.state
    left = [
        item for status in ("pending", "claimed") for item in state.list_work_items(status=status)
    ]
    assert len(left) <= 1, f"one item was enqueued, and there are {left!r}"
    for item in left:
        state.complete_work_item(item.id)


def strike_under_load(target: str, name: str, kind: str) -> None:
    """Strikes a call at each of its places while other threads write and read."""
    store = flowstore.open(target, synchronous="OFF", busy_timeout=5.0)
    write_pair(store, "run", "first")
    account = Account()

    def attempt(striker: Striker | Deep, key: str) -> bool:
        """The struck call, and then others of the same thread."""
        done = striker.run(prepared(name, store, key))
        write_pair(store, "run", f"{key}, after")
        settle_what_is_left(store)
        return done

    def dry_run(striker: Striker) -> None:
        assert striker.run(prepared(name, store, account.key()))

    plan = strikers(kind, dry_run)
    load = Load(store)
    load.goes_on("no place yet")
    threads, descriptors = len(sys._current_frames()), len(os.listdir("/dev/fd"))
    unrecorded = {"read", "wait", "claim"} | ({"open"} if target == ":memory:" else set())
    struck = 0
    for striker in plan:
        key = account.key()
        account.begun.add(f"{key}, after")
        done = Caller(attempt, striker, key).outcome(20)
        assert isinstance(done, bool), f"{done!r} after a strike at\n{striker.where}"
        struck += not done
        account.returned.add(f"{key}, after")
        if done and name not in unrecorded:
            account.returned.add(key)
        load.goes_on(striker.where)
        until(
            lambda: len(sys._current_frames()) <= threads, f"for a thread of\n{striker.where}", 20
        )
    assert struck
    load.end()
    gc.collect()
    assert len(os.listdir("/dev/fd")) < descriptors + 16, "struck calls left connections behind"
    account.check(store)
    assert Caller(store.close).outcome(20) is None
    if target != ":memory:":
        with flowstore.open(target) as again:
            account.check(again)


def queued(store: Store) -> int:
    """How many calls wait for the writer."""
    return len(store._engine.writer.queue)


def strike_in_a_group(target: str, place: str, kind: str) -> None:
    """Strikes a call that is committed in one group with others, as their leader or behind another leader."""
    store = flowstore.open(target, synchronous="OFF", busy_timeout=5.0)
    struck_call = write_pair_in_block if place == "leader's block" else write_pair
    write_pair(store, "run", "first")
    account = Account()

    def meeting(striker: Striker | Deep) -> bool:
        """The call queues with others, which go on whatever becomes of it; whether it came to its end."""
        key = account.key()
        calls: list[Call] = [
            partial(write_pair, store, "run", f"{key}.0"),
            partial(write_pair, store, "run", f"{key}.1"),
            partial(write_pair_in_block, store, "run", f"{key}.2"),
            partial(write_pair, store, "run", f"{key}.3"),
            partial(pairs, store, "run"),
        ]
        first = 2 if place == "follower" else 0
        calls.insert(first, lambda: striker.run(partial(struck_call, store, "run", key)))
        others = {f"{key}.{number}" for number in range(4)}
        account.begun |= others
        callers: list[Caller] = []

        def have_queued() -> bool:
            return queued(store) + sum(not one.is_alive() for one in callers) >= len(callers)

        with store.transaction():
            for call in calls:
                callers.append(Caller(call))
                until(have_queued, "for calls to queue", 20)
        results = [caller.outcome(20) for caller in callers]
        failed = [result for result in results if isinstance(result, BaseException)]
        assert not failed, f"{failed!r} after a strike at\n{striker.where}"
        done = bool(results[first])
        account.returned |= others | ({key} if done else set())
        return done

    struck = 0
    for striker in strikers(kind, meeting):
        struck += not meeting(striker)
    assert struck
    account.check(store)
    assert Caller(store.close).outcome(20) is None


def reap_within(seconds: float, pid: int, where: str) -> int:
    """The exit status of a forked child, which has to end in that time."""
    deadline = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGALRM)  # it tells where it is
            os.waitpid(pid, 0)
            raise AssertionError(f"the child hangs after a strike at\n{where}")
        time.sleep(0.001)


def write_in_child(key: str, *stores: Store) -> NoReturn:
    """In a forked child: a write to each store, and the end: with status 0 if all were done, 3 if one was refused."""
    status = 1
    try:
        for store in stores:
            write_pair(store, "run", key)
        status = 0
    except StorageError:
        status = 3
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def strike_forks(path: str, kind: str) -> None:
    """Strikes at each place of what happens before and after a fork, while other threads write and read.

    Or, where the kind is a call, makes one there."""
    sys.setswitchinterval(0.0005)
    patience = 1.0 if kind == "call" else 3.0
    store = flowstore.open(path, synchronous="OFF", busy_timeout=patience)
    memory = flowstore.open(":memory:", busy_timeout=patience)
    for one in (store, memory):
        write_pair(one, "run", "first")
    account, in_memory = Account(), Account()
    load = Load(store)

    def fork(striker: Striker | Deep) -> None:
        key = account.key()
        pids: list[int] = []
        striker.run(lambda: pids.append(os.fork()))
        if pids == [0]:
            write_in_child(key, memory, store)
        elif pids:  # else the stack's end was there before the fork
            status = reap_within(20, pids[0], striker.where)
            assert status in (0, 3), (
                f"the child ended with {status} after a strike at\n{striker.where}"
            )
            if status == 0:
                account.returned.add(key)
        for one, mine in ((store, account), (memory, in_memory)):
            write_pair(one, "run", f"{key}, after")
            mine.begun.add(f"{key}, after")
            mine.returned.add(f"{key}, after")
        load.goes_on(striker.where)

    if kind == "call":
        parent, visited = os.getpid(), set[str]()

        def fork_and_visit(place: int) -> None:
            """Both sides may make the call."""
            visit = Visit(lambda: do("append", store, f"{os.getpid()} {place}", "visit"))
            visitor = HookVisitor(place, visit)
            fork(visitor)
            visit.check(patience, visitor.where)
            if visit.done:
                visited.add(f"{parent} {place}")

        for place in some_places(fork):
            fork_and_visit(place)
        assert visited <= set(pairs(store, "visit"))
    else:
        for striker in strikers(kind, fork, HookStriker):
            fork(striker)
    load.end()
    account.check(store)
    in_memory.check(memory)
    store.close()


class HookVisitor(HookStriker, Visitor):
    """Makes another call from flowstore's own hooks for `os.fork()`."""


class Visit:
    """A call that interrupts another one of its thread, made once: it may be refused, but has to end in time."""

    def __init__(self, call: Call) -> None:
        self.call, self.made, self.done = call, False, False
        self.result: Any = None
        self.seconds = 0.0

    def __call__(self, *_: object) -> None:
        if self.made:
            return
        self.made, began = True, time.monotonic()
        try:
            self.result = self.call()
            self.done = True
        except BaseException as error:
            self.result = error
        self.seconds = time.monotonic() - began

    def check(self, busy_timeout: float, where: str) -> None:
        fine = not self.made or self.done or isinstance(self.result, StorageError)
        assert fine, f"{self.result!r} for a call made at\n{where}"
        assert self.seconds < busy_timeout + 15, f"{self.seconds:.1f} s for a call made at\n{where}"


def visit_each_step(target: str, name: str) -> None:
    """Interrupts a call at each of its places by others of the same thread."""
    store = flowstore.open(target, synchronous="OFF", busy_timeout=0.1)
    for run in ("run", "visit"):
        write_pair(store, run, "first")
    account = Account()

    def dry_run(striker: Striker) -> None:
        assert striker.run(prepared(name, store, account.key()))

    for place in some_places(dry_run):
        key = account.key()
        kind = ("append", "read", "claim", "block")[int(key) % 4]
        visit = Visit(partial(do, kind, store, key, "visit"))
        visitor = Visitor(place, visit)
        outer = Caller(visitor.run, prepared(name, store, key)).outcome(20)
        where = f"{visitor.where}({kind} in {name})"
        visit.check(0.1, where)
        assert outer is True, f"{outer!r} for the call that was interrupted at\n{where}"
        if name not in ("read", "wait", "claim"):
            account.returned.add(key)
        account.visited(visit, kind, key)
        other = Caller(write_pair_in_block, store, "other", key).outcome(20)
        assert other is None, f"{other!r} for another thread after a call at\n{where}"
    account.check(store, visits=True)
    store.close()


def visit_the_end(target: str, name: str) -> None:
    """Closes a store in the middle of a call of the same thread, or calls it in the middle of its close()."""
    account, ending = Account(), name == "close"
    with flowstore.open(target) as store:
        for run in ("run", "visit"):
            write_pair(store, run, "first")

    def trial(visitor: Striker, visit: Visit) -> None:
        key = account.key()
        store = flowstore.open(target, synchronous="OFF", busy_timeout=0.1)
        visit.call = partial(do, "append", store, key, "visit") if ending else store.close
        outer = store.close if ending else partial(do, name, store, key)
        outcome = Caller(visitor.run, outer).outcome(20)
        visit.check(0.1, visitor.where)
        fine = outcome is True or (not ending and isinstance(outcome, StorageError))
        assert fine, f"{outcome!r} for the call that was interrupted at\n{visitor.where}"
        assert Caller(store.close).outcome(20) is None, visitor.where
        assert Caller(refused, partial(write, store, "run", key)).outcome(20) is None
        if ending:
            account.visited(visit, "append", key)
        elif outcome is True and name not in ("read", "wait"):
            account.returned.add(key)

    def dry_run(striker: Striker) -> None:
        trial(striker, Visit(bool))

    for place in some_places(dry_run):
        visit = Visit(bool)
        trial(Visitor(place, visit), visit)
    if target != ":memory:":
        with flowstore.open(target) as store:
            account.check(store, visits=True)


class Dying:
    """Garbage that refers to itself: the collector, at whatever allocation it begins to run, ends it."""

    def __init__(self, last_words: Call) -> None:
        self.myself, self.last_words = self, last_words

    def __del__(self) -> None:
        self.last_words()


def collect_at_each_step(target: str, how: str) -> None:
    """Has the garbage collector run at each of the allocations of a call, and call the store from there."""
    account = Account()
    inside: list[bool] = []

    def opened() -> Store:
        return flowstore.open(target, synchronous="OFF", busy_timeout=0.1)

    def collected(call: Call, visit: Visit, threshold: int) -> None:
        gc.collect()
        if how == "__del__":
            Dying(visit)
        elif how == "weakref.finalize":
            weakref.finalize(Dying(bool), visit)
        else:
            gc.callbacks.append(visit)
        gc.set_threshold(threshold, 1000, 1000)
        try:
            call()
        finally:
            gc.set_threshold(0)
            gc.callbacks.clear()
            inside.append(visit.made)
            gc.collect()

    store = opened()
    for run in ("run", "visit"):
        write_pair(store, run, "first")
    stride = max(1, 1600 // STEPS)
    for name in ("append", "read", "claim", "block", "nested", "close"):
        for number in range(random.randint(1, stride), 100, stride):
            key = account.key(f"{name} {number} ")
            kind = ("append", "read", "claim", "block")[number % 4]
            one = opened() if name == "close" else store
            visit = Visit(partial(do, kind, one, key, "visit"))
            call = one.close if name == "close" else partial(do, name, one, key)
            outer = Caller(collected, call, visit, number).outcome(20)
            where = f"the allocation {number} of {name} ({kind})"
            if name != "close" or target != ":memory:":  # there, each has a database of its own
                visit.check(0.1, where)
                account.visited(visit, kind, key)
            assert outer is None, f"{outer!r} for the call that was interrupted at\n{where}"
            if name not in ("read", "claim", "close"):
                account.returned.add(key)
            other = Caller(write_pair_in_block, store, "other", key).outcome(20)
            assert other is None, f"{other!r} for another thread after a call at\n{where}"
    assert sum(inside) > len(inside) // 4
    account.check(store, visits=True)
    store.close()


HOLDER = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("BEGIN IMMEDIATE")
print("held", flush=True)
sys.stdin.readline()
db.execute("ROLLBACK")
"""


def signal_a_waiter(target: str, situation: str, kind: str) -> None:
    """A signal's handler calls the store while a call of its thread waits; then the wait is given an end."""
    patience = 0.2
    inside, free = threading.Event(), threading.Event()
    holders: list[threading.Thread] = []

    def clock() -> dt.datetime:
        """Where it is asked by a call that close() has to wait for, that call takes long."""
        if situation == "close" and threading.current_thread() in holders:
            inside.set()
            free.wait(WATCHDOG)
        return dt.datetime.now(dt.UTC)

    store = flowstore.open(target, synchronous="OFF", busy_timeout=patience, clock=clock)
    for run in ("run", "visit"):
        write_pair(store, run, "first")
    news = store.events.tail(timeout=8.0)
    main = threading.get_ident()
    visit = Visit(store.close if kind == "close" else partial(do, kind, store, "visit", "visit"))
    signal.signal(signal.SIGUSR1, visit)

    def hold() -> None:
        holders.append(threading.current_thread())
        if situation == "close":
            write_pair(store, "run", "long")
        else:
            with suppress(StoreClosed), store.transaction():
                inside.set()
                free.wait(WATCHDOG)

    def end_of_wait() -> None:
        """Once the call waits: the signal, another thread's call behind it, and then what it waits for."""
        until(lambda: waits(main) or ended, f"for {situation} to wait", 20)
        os.kill(os.getpid(), signal.SIGUSR1)
        until(lambda: visit.made)
        bystander = Caller(write_pair, store, "other", "bystander")
        until(lambda: bystander.waits() or not bystander.is_alive())
        free.set()
        if process is not None:
            process.communicate("go\n", timeout=10)
        if situation in ("item", "tail"):
            state = store.state
            with suppress(StoreClosed):
                state.enqueue_work_item(WorkItem(execution_id="run", queue_type="later"))
                write_pair(store, "run", "news")
        result = bystander.outcome(20)
        fine = isinstance(result, int | StoreBusy | StoreClosed)
        assert fine, f"{result!r} for another thread"

    process = None
    holder = None
    ended: list[bool] = []
    if situation == "process":
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, target],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdout is not None and process.stdout.readline() == "held\n"
    elif situation not in ("item", "tail"):
        holder = Caller(hold)
        assert inside.wait(20)
    ender = Caller(end_of_wait)
    calls: dict[str, Call] = {
        "read": partial(do, "read", store, ""),
        "block": partial(do, "block", store, "key"),
        "item": partial(store.state.claim_work_item, "w", ["later"], wait=8.0),
        "tail": partial(next, news),
        "close": store.close,
    }
    began = time.monotonic()
    try:
        calls.get(situation, partial(do, "append", store, "key"))()
    except StoreClosed:
        assert kind == "close", "the store was not closed"
    except StoreBusy:
        assert time.monotonic() - began > patience * 0.9
    ended.append(True)
    assert ender.outcome(20) is None, ender.met
    assert holder is None or holder.outcome(20) is None
    assert visit.made
    visit.check(patience, f"a wait for {situation} ({kind}, {target})")
    if "close" not in (situation, kind):
        assert Caller(write_pair_in_block, store, "other", "after").outcome(20) is None
        there = pairs(store, "visit")
        assert there == ["first", *["visit"] * (visit.done and kind in ("append", "block"))]
        assert store.check() == []
    assert Caller(store.close).outcome(20) is None


# ------------------------------------------------------------------------------- helpers, for this process


CHILD = """
if hasattr(signal, "alarm"):
    faulthandler.register(signal.SIGALRM, chain=True)
    signal.alarm(WATCHDOG)
{}(*sys.argv[1:])
"""


@functools.cache
def definitions() -> dict[str, tuple[ast.stmt, set[str]]]:
    """Of each name at this file's top level: what defines it, and the names in that."""
    found: dict[str, tuple[ast.stmt, set[str]]] = {}
    source = Path(__file__).read_text(encoding="utf-8")
    gc.disable()  # what it collects may report an error, which parses too: Python 3.11 fails on that
    try:
        module = ast.parse(source)
    finally:
        gc.enable()
    for node in module.body:
        parts = [*ast.walk(node)]
        used = {part.id for part in parts if isinstance(part, ast.Name)}
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [(alias.asname or alias.name).split(".")[0] for alias in node.names]
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = [node.name]
        else:
            names = [
                p.id for p in parts if isinstance(p, ast.Name) and isinstance(p.ctx, ast.Store)
            ]
        if not used & {"pytest", "parametrize", "st"}:  # a process of its own is no test
            found.update(dict.fromkeys(names, (node, used)))
    return found


@functools.cache
def source_of(function: str, *others: str) -> str:
    """A program that calls a function of this file: of the file, it has what that and the others need."""
    known, needed = definitions(), set[str]()
    left = {function, *others, *re.findall(r"\w+", CHILD)} & known.keys()
    while left:
        name = left.pop()
        needed.add(name)
        left |= known[name][1] & known.keys() - needed
    parts = sorted({known[name][0] for name in needed}, key=lambda node: node.lineno)
    return "\n".join([*map(ast.unparse, parts), CHILD.format(function)])


class Process:
    """A Python process that runs one of this file's functions; killed at the block's end if it still runs."""

    def __init__(self, function: Callable[..., None], *args: object) -> None:
        self.popen = script(source_of(function.__name__, *map(str, args)), *args)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def pipe(self, name: str) -> IO[str]:
        stream: IO[str] | None = getattr(self.popen, name)
        assert stream is not None
        return stream

    def read(self) -> str:
        return line_of(self.popen)

    def tell(self, line: str = "go") -> None:
        print(line, file=self.pipe("stdin"), flush=True)

    def kill(self) -> str:
        """Kills it, if it still runs; returns what was left of its output."""
        self.popen.kill()
        out = self.pipe("stdout")
        left = (
            "" if out.closed else out.read()
        )  # communicate() would lose what readline() has buffered
        self.popen.communicate()
        return left

    def finish(self) -> str:
        """Its remaining output, once it has ended well."""
        try:
            output, errors = self.popen.communicate(timeout=WATCHDOG + 5)
        except subprocess.TimeoutExpired:
            if hasattr(signal, "SIGALRM"):
                self.popen.send_signal(signal.SIGALRM)  # it tells where it is
            output, errors = self.popen.communicate(timeout=5)
        assert self.popen.returncode == 0, errors
        return output


def in_child(function: Callable[..., None], *args: object) -> str:
    """What a process that runs one of this file's functions prints until it ends well."""
    with Process(function, *args) as process:
        return process.finish()


def in_file(path: str | Path, read: Callable[[Store, str], Any] = keys, run: str = "run") -> Any:
    """The keys of a log, as another store of the file finds them: the file is sound."""
    with flowstore.open(path) as store:
        assert store.check() == []
        return read(store, run)


@pytest.fixture(scope="session", autouse=True)
def process(tmp_path_factory: pytest.TempPathFactory) -> None:
    """This process collects no garbage among the imports; each child finds the module compiled."""
    os.environ["PYTHONPYCACHEPREFIX"] = str(tmp_path_factory.mktemp("byte-code"))
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    gc.collect()
    gc.freeze()  # tests that have garbage collected do not wait for all that was imported


@pytest.fixture(autouse=True)
def watchdog() -> Iterator[None]:
    """A test that hangs fails."""

    def bark(_number: int, _frame: FrameType | None) -> None:
        faulthandler.dump_traceback()
        raise AssertionError("the test hangs")

    if not hasattr(signal, "SIGALRM"):
        yield
        return
    # A shell lets what it starts in the background ignore Ctrl-C, and so would each process that tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.signal(signal.SIGALRM, bark)
    signal.alarm(WATCHDOG + 20)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def unraisable_unheard() -> Iterator[None]:
    """Reports of finalizers go to a function in C: in one in Python, the next strike could hit the report."""
    usual, sys.unraisablehook = sys.unraisablehook, id
    yield
    sys.unraisablehook = usual


@pytest.fixture
def target(request: pytest.FixtureRequest, path: Path) -> str:
    return target_of(request, path)


def descriptors() -> int:
    for folder in ("/proc/self/fd", "/dev/fd"):
        if os.path.isdir(folder):
            return len(os.listdir(folder))
    pytest.skip("this platform does not list a process's descriptors")


def strike(thread: threading.Thread) -> None:
    """A KeyboardInterrupt, raised in that thread at whatever it executes next."""
    ident = ctypes.c_ulong(thread.ident or 0)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(KeyboardInterrupt))


def steps(call: Call) -> range:
    """Where to strike a call: each of its places, or STEPS of them from a random one on."""
    dry = Striker(0)
    assert dry.run(call)
    stride = -(-dry.places // STEPS)
    return range(random.randint(1, stride), dry.places + 1, stride)


def limit_pages(store: Store, pages: int | None) -> None:
    """Lets the file grow by so many pages only, as a full disk would (None: without limit again)."""
    writer = store._engine.writer.connection
    with writer.lock:
        db = writer.use().db
        [count] = db.execute("PRAGMA page_count").fetchone()
        db.execute(f"PRAGMA max_page_count = {count + pages if pages is not None else 2**30}")


# ------------------------------------------------------------------------------------------------- waiting


def holding_process(path: str) -> None:
    store = flowstore.open(path)
    say("ready")
    while sys.stdin.readline():
        with store.transaction():
            write(store, "holder", "held")
            say("held")
            told()
        say("free")


@contextmanager
def holder(
    kind: str, store: Store, path: Path
) -> Iterator[Callable[[], contextlib.AbstractContextManager[Any]]]:
    """Makes blocks in which somebody else has a transaction open."""

    @contextmanager
    def by_process() -> Iterator[None]:
        child.tell()
        assert child.read() == "held"
        try:
            yield
        finally:
            child.tell()
            assert child.read() == "free"

    @contextmanager
    def patient(opened: Store) -> Iterator[None]:
        with ExitStack() as stack:
            deadline = time.monotonic() + WATCHDOG
            while True:
                try:
                    stack.enter_context(opened.transaction())
                    break
                except StoreBusy:
                    assert time.monotonic() < deadline
            yield

    if kind == "process":
        with Process(holding_process, path) as child:
            assert child.read() == "ready"
            yield by_process
    elif kind == "store":
        with flowstore.open(path) as other:
            yield partial(patient, other)
    else:
        yield partial(patient, store)


# ----------------------------------------------------- strikes of every kind, at every step of every kind of call


KINDS = [*STRIKES_WITH, "end of the stack"]


# ------------------------------------------------------------------------- two copies of the module in one process


def module_copy(path: str, name: str) -> types.ModuleType:
    """The module once more, under another name, from a copy of its file."""
    shutil.copy(flowstore.__file__, f"{path}.{name}.py")
    spec = importlib.util.spec_from_file_location(name, f"{path}.{name}.py")
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stores_of_two_copies(how: str, *paths: str) -> list[list[flowstore.Store]]:
    """Of each file two stores, which were opened by two copies of the module; or one, where there is no copy."""
    if how == "copies":
        copies = [module_copy(paths[0], "one"), module_copy(paths[0], "two")]
        return [[module.open(path, busy_timeout=2.0) for module in copies] for path in paths]
    before = [[flowstore.open(path, busy_timeout=2.0)] for path in paths]
    if how == "reload":
        importlib.reload(flowstore)
        for stores, path in zip(before, paths, strict=True):
            stores.append(flowstore.open(path, busy_timeout=2.0))
    return before


# ------------------------------------------------------------------------------------------------ frozen time


def freeze_time() -> None:
    """Stops the clocks as freezegun does: in all modules but a few, whatever is one of them is replaced."""
    for name in ("monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns", "time", "time_ns"):
        real = getattr(time, name)
        frozen = partial(float if isinstance(real(), float) else int, real())
        for module in list(sys.modules.values()):
            if module.__name__.startswith(("threading", "multiprocessing", "queue")):
                continue
            for attribute, value in list(vars(module).items()):
                if value is real:
                    setattr(module, attribute, frozen)


# ----------------------------------------------------- locks that other code in the process drops by closing the file

linux = pytest.mark.skipif(
    sys.platform != "linux", reason="locks of open file descriptions are Linux's"
)


def touch(path: str, how: str) -> None:
    """Opens and closes the file of a store as other code in the process does: POSIX drops all its locks then."""
    if how == "open":
        with open(path, "rb") as file:
            file.read(16)
    elif how == "os.open":
        os.close(os.open(path, os.O_RDONLY))
    elif how == "shutil.copy":
        shutil.copy(path, f"{path}.copy")
    else:
        db = sqlite3.connect(path)
        db.execute("SELECT COUNT(*) FROM flowstore_log").fetchall()
        db.close()


def switch_linux_locks_off() -> None:
    """The hook by which these tests take from the module the locks that only Linux has; name them here."""
    cast(Any, flowstore)._set_second_lock = lambda *_: False


def told() -> str:
    """In a child process: what the test says next."""
    return sys.stdin.readline().strip()


def say(*words: object) -> None:
    """In a child process: tells the test something."""
    print(*words, flush=True)


UNKNOWN = "no-such-id"


no_health_check: Any = list(HealthCheck)


a_few_state = settings(max_examples=30, deadline=None, suppress_health_check=no_health_check)


def dump(store: Store) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of every table."""
    tables = store.stats()["tables"]
    return {table: sorted(execute(store, f"SELECT * FROM {table}"), key=repr) for table in tables}


@contextmanager
def twice(store: Store) -> Iterator[Callable[[int], Store]]:
    """The store and, for a file, a second one opened on it, as another process would: odd numbers get that."""
    with (
        contextlib.nullcontext(store)
        if store.target == ":memory:"
        else flowstore.open(store.target) as second
    ):
        yield lambda number: second if number % 2 else store


def ids(records: list[Any]) -> list[str]:
    return [record.id for record in records]


def flow_with(store: Store, status: str = "created", **fields: Any) -> Flow:
    return store.flows.insert(Flow(status=FlowStatus(status), **fields))


class Watched(sqlite3.Connection):
    """A connection that notes the statements executed through it, and counts its steps and what it commits."""

    statements: ClassVar[list[str]] = []
    commits: ClassVar[list[int]] = []
    ticks: ClassVar[int] = 0
    steps_of_a_tick: ClassVar[int] = 100

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.set_progress_handler(Watched.tick, Watched.steps_of_a_tick)

    @staticmethod
    def tick() -> int:
        Watched.ticks += 1
        return 0

    def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
        Watched.statements.append(sql)
        if sql == "COMMIT":
            Watched.commits.append(self.total_changes)
        return super().execute(sql, *parameters)

    def executemany(self, sql: str, rows: Any) -> sqlite3.Cursor:
        parameters = [*rows]
        Watched.statements.extend([sql] * len(parameters))
        return super().executemany(sql, parameters)

    @staticmethod
    def steps(call: Call) -> int:
        """How many ticks of SQLite's machine the call takes."""
        before = Watched.ticks
        call()
        return Watched.ticks - before

    @staticmethod
    def said(call: Call, word: str) -> int:
        """How many statements of the call begin with the word."""
        before = len(Watched.statements)
        call()
        return sum(sql.lstrip().startswith(word) for sql in Watched.statements[before:])


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> type[Watched]:
    """Stores opened in this test use watched connections."""
    monkeypatch.setattr(sqlite3, "connect", partial(sqlite3.connect, factory=Watched))
    for name, value in (("statements", []), ("commits", []), ("steps_of_a_tick", 100)):
        monkeypatch.setattr(Watched, name, value)
    return Watched


def definition(
    workflow_id: str = "w", version: str = "1", ir: Any = None, **fields: Any
) -> WorkflowDefinition:
    return WorkflowDefinition(workflow_id=workflow_id, version=version, ir=ir, **fields)


@dataclasses.dataclass
class Things:
    """What tenant A has."""

    claimed: WorkItem
    token: str
    token_id: str
    artifact: str
    execution: str = "ea"
    logged: str = "la"
    pending: str = "pending-a"
    dead: str = "dead-a"


LIMITS = TenantLimits(max_workflows=9, max_concurrent_executions=9)


def furnish(store: Store, letter: str) -> Things:
    """Give a new tenant one of everything."""
    tenant, execution = f"tenant-{letter}", f"e{letter}"
    store.state.create_tenant(Tenant(id=tenant, policy=letter, limits=LIMITS))
    view = store.state.for_tenant(tenant)
    view.store_workflow(definition(f"w{letter}", ir=letter))
    create(view, execution, current_state={"list": [letter]})
    view.write_snapshot(
        Snapshot(execution_id=execution, at_sequence=0, state=letter, id=f"snapshot-{letter}")
    )
    view.record_effect(f"effect-{letter}", letter)
    ref = view.put_artifact(b"artifact of " + letter.encode(), f"text/{letter}")
    claimed(view, execution_id=execution, id=f"dead-{letter}")
    view.move_to_dead_letter(f"dead-{letter}", letter)
    claimed(view, execution_id=execution, id=f"lapsed-{letter}")
    view.enqueue_work_item(WorkItem(id=f"claimed-{letter}", execution_id=execution, queue_type="q"))
    held = view.claim_work_item(f"worker-{letter}", ["q"], lease_seconds=1000)
    assert held is not None and held.id == f"claimed-{letter}"
    view.enqueue_work_item(
        WorkItem(id=f"pending-{letter}", execution_id=execution, queue_type="q", payload=letter)
    )
    plain, token = view.create_token(letter, "r")
    if (
        letter == "a"
    ):  # B has no events: their positions, which all tenants share, would differ between the worlds
        view.append_event(execution, EVENT)
        view.append_event(execution, EVENT, event_id="known")
        store.events.append("la", tenant, EVENT)
    return Things(claimed=held, token=plain, token_id=token.id, artifact=ref.hash)


def plain(value: Any) -> Any:
    """A value in a form that compares with another store's: what is random in it, or an object, is only named."""
    if dataclasses.is_dataclass(value):
        return type(value).__name__, {name: plain(member) for name, member in vars(value).items()}
    if isinstance(value, (list, tuple)):
        return [plain(member) for member in value]
    if isinstance(value, dict):
        return {name: plain(member) for name, member in value.items() if "_bytes" not in name}
    if " object at 0x" in repr(value):
        return "object"
    return (
        "random"
        if re.fullmatch(r"[0-9a-f]{8}-[0-9a-f-]{27}|(fs_)?[0-9a-f]{64}", str(value))
        else value
    )


# The plans that go through all of something, and why that is meant. (stats() and check() are not asked here: they do
# by their nature, as do the counts for a tenant's limits, within the tenant.)
STATEMENT = re.compile(r"(SELECT|INSERT|UPDATE|DELETE|WITH)\b")


@pytest.fixture
def schema(store: Store) -> sqlite3.Connection:
    """An empty database with the store's tables."""
    db = sqlite3.connect(":memory:")
    with store.transaction() as tx:
        for name, sql in tx.execute(
            "SELECT name, sql FROM sqlite_master WHERE sql > '' ORDER BY rowid"
        ):
            if not name.startswith("sqlite_"):
                db.execute(sql)
    return db


def plan(db: sqlite3.Connection, statement: str) -> list[str]:
    return [
        row[3]
        for row in db.execute(f"EXPLAIN QUERY PLAN {statement}", [None] * statement.count("?"))
    ]


def plans(db: sqlite3.Connection, statements: set[str]) -> dict[str, list[str]]:
    """The plan of each statement, but for sorts.

    Some versions of SQLite (3.40) sort where they expect no row or one, though the index has the order: such a sort
    ends when it has as many rows as are asked for."""
    return {
        sql: [step for step in plan(db, sql) if step != "USE TEMP B-TREE FOR ORDER BY"]
        for sql in statements
    }


def let_analyze_find(db: sqlite3.Connection, seed: int) -> None:
    """Statistics as ANALYZE would leave them: tables that look empty or huge, indexes that look useless or perfect."""
    random_, indexes = (
        random.Random(seed),
        "SELECT tbl_name, name FROM sqlite_master WHERE type = 'index'",
    )
    db.execute("DELETE FROM sqlite_stat1")
    sizes: dict[str, int] = {}
    for table, index in db.execute(indexes).fetchall():
        [(without_rowid, key)] = db.execute(
            """SELECT wr, (SELECT name FROM pragma_index_list(?) WHERE origin = 'pk')
            FROM pragma_table_list WHERE name = ?""",
            (table, table),
        )
        size = sizes.setdefault(table, random_.choice([1, 1, 2, 3, 10, 60, 5000, 10**6, 10**9]))
        alike = [size if random_.random() < 0.8 else max(1, size // 1000)]
        for _ in db.execute("SELECT 1 FROM pragma_index_xinfo(?) WHERE key", (index,)):
            alike.append(random_.choice([alike[-1], alike[-1], 1, max(1, alike[-1] // 10)]))
        name = table if without_rowid and index == key else index
        stat = " ".join(map(str, alike))
        if random_.random() < 0.9:  # of an empty partial index there is none
            db.execute("INSERT INTO sqlite_stat1 VALUES (?, ?, ?)", (table, name, stat))
    db.execute("ANALYZE sqlite_schema")


def check_plans(db: sqlite3.Connection, statements: set[str]) -> None:
    """Each statement has the plan that it has without statistics, whatever they are."""
    wanted = plans(db, statements)
    db.execute("CREATE TABLE IF NOT EXISTS other (x)")
    db.execute("ANALYZE")
    moved = {}
    for seed in range(40):
        let_analyze_find(db, seed)
        for sql, steps in plans(db, statements).items():
            if steps != wanted[sql]:
                moved[sql] = f"{wanted[sql]} -> {steps}"
    # A store looks at the plan of this one, and reads in another way where it moves.
    moved.pop(flowstore._LOG_FROM.all, None)
    assert moved == {}


# What the workflow facet says is seen through by a test of its own.
Loop = Callable[[Callable[[AsyncStore], Coroutine[Any, Any, Any]]], Any]


@pytest.fixture
def in_loop(request: pytest.FixtureRequest, tmp_path: Path) -> Loop:
    """Runs a coroutine function with an async store in an event loop of its own; it may not take for ever."""
    target = target_of(request, tmp_path / "async.db", Clock(datetime.now(UTC)))

    def run(body: Callable[[AsyncStore], Coroutine[Any, Any, Any]], **options: Any) -> Any:
        async def with_store() -> Any:
            async with asyncio.timeout(60), flowstore.open_async(target, **options) as store:
                return await body(store)

        return asyncio.run(with_store())

    return run


async def keys_of(store: AsyncStore, run: str) -> list[str]:
    """The keys written to a log, which must have no gap."""
    log = await store.events.load_events(run)
    assert [stored.sequence for stored in log] == list(range(1, len(log) + 1))
    return keys_in(log)


TABLES = ("workflows", "execution_pointers", "events", "event_subscriptions", "scheduled_commands", "execution_errors",
          "flowstore_counters")  # fmt: skip


@pytest.fixture
def workflows(store: Store) -> PersistenceProvider:
    return store.workflows


def instance(**fields: Any) -> WorkflowInstance:
    return WorkflowInstance(**{"workflow_definition_id": "order", **fields})


def pointers(*ids: str, **fields: Any) -> list[ExecutionPointer]:
    return [ExecutionPointer(id=id, step_id=number, **fields) for number, id in enumerate(ids)]


def subscription(**fields: Any) -> EventSubscription:
    needed = {
        "workflow_id": "w",
        "step_id": 1,
        "execution_pointer_id": "p",
        "event_name": "paid",
        "event_key": "7",
    }
    return EventSubscription(**{**needed, **fields})


def command(
    data: str, at: datetime | int = START, name: CommandName = CommandName.PROCESS_WORKFLOW
) -> ScheduledCommand:
    return ScheduledCommand(command_name=name, data=data, execute_time=at)


def created(workflows: PersistenceProvider, **fields: Any) -> WorkflowInstance:
    return workflows.get_workflow_instance(workflows.create_new_workflow(instance(**fields)))


def rows(store: Store) -> dict[str, int]:
    tables: dict[str, int] = store.stats()["tables"]
    return {name: tables[name] for name in TABLES}


@pytest.fixture
def written(store: Store) -> Callable[[WorkflowInstance], list[tuple[str, str]]]:
    """Persists an instance and returns which rows of pointers that wrote, as the database saw it."""
    with store.transaction() as tx:
        tx.execute("CREATE TABLE seen (what TEXT, id TEXT)")
        for what, row in (("INSERT", "new"), ("UPDATE", "new"), ("DELETE", "old")):
            tx.execute(
                f"CREATE TRIGGER seen_{what} AFTER {what} ON execution_pointers "
                f"BEGIN INSERT INTO seen VALUES ('{what}', {row}.id); END"
            )

    def persist(changed: WorkflowInstance) -> list[tuple[str, str]]:
        with store.transaction() as tx:
            tx.execute("DELETE FROM seen")
            store.workflows.persist_workflow(changed)
            assert store.workflows.get_workflow_instance(changed.id) == changed
            return [
                (what, id) for what, id in tx.execute("SELECT what, id FROM seen ORDER BY what, id")
            ]

    return persist


def ask(
    address: str, path: str = "/", method: str = "GET", **headers: str
) -> tuple[int, dict[str, str], str]:
    """What the server answers: status, headers, text."""
    connection = http.client.HTTPConnection(address.split("/")[2], timeout=30)
    connection.putrequest(method, path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    with closing(connection):
        answer = connection.getresponse()
        return answer.status, dict(answer.headers), answer.read().decode()


def columns(line: str) -> int:
    return sum(
        0 if unicodedata.combining(char) else 1 + (unicodedata.east_asian_width(char) in "FW")
        for char in line
    )


HERE = Path(__file__).parent


def python(*arguments: object, status: int = 0, **options: Any) -> subprocess.CompletedProcess[str]:
    """A Python process that has ended as it should; it finds the module."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(Path(flowstore.__file__).parent)},
        **options,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done


def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command of the module in a process of its own; none may ever end in a traceback."""
    done = python(flowstore.__file__, *arguments, **options)
    assert "Traceback" not in done.stderr
    return done


def json_of(*arguments: object, **options: Any) -> Any:
    """What a command says in JSON."""
    return json.loads(run(*arguments, "--json", **options).stdout)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    folder = tmp_path / "files"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.txt").write_text(f"line one\nline two of {number}\n")
    return folder


# The .dump of a store of schema version 1 with a few rows. It never changes: what comes later is an upgrade from it.
VERSION_1 = """
BEGIN TRANSACTION;
CREATE TABLE event_subscriptions (
    id TEXT PRIMARY KEY, workflow_id TEXT NOT NULL, step_id INTEGER NOT NULL, execution_pointer_id TEXT NOT NULL,
    event_name TEXT NOT NULL, event_key TEXT NOT NULL, subscribe_as_of INTEGER NOT NULL, subscription_data TEXT,
    external_token TEXT, external_worker_id TEXT, external_token_expiry INTEGER, terminated_at INTEGER);
CREATE TABLE events (
    id TEXT PRIMARY KEY, event_name TEXT NOT NULL, event_key TEXT NOT NULL, event_data TEXT,
    event_time INTEGER NOT NULL, is_processed INTEGER NOT NULL);
CREATE TABLE execution_errors (
    id INTEGER PRIMARY KEY AUTOINCREMENT, workflow_id TEXT NOT NULL, execution_pointer_id TEXT NOT NULL,
    message TEXT NOT NULL, error_time INTEGER NOT NULL);
CREATE TABLE execution_pointers (
    workflow_id TEXT NOT NULL REFERENCES workflows (id) ON DELETE CASCADE, place INTEGER NOT NULL, id TEXT NOT NULL,
    step_id INTEGER NOT NULL, active INTEGER NOT NULL, status TEXT NOT NULL, sleep_until INTEGER,
    persistence_data TEXT, start_time INTEGER, end_time INTEGER, event_name TEXT, event_key TEXT,
    event_published INTEGER NOT NULL, event_data TEXT, step_name TEXT, retry_count INTEGER NOT NULL,
    children TEXT NOT NULL, context_item TEXT, predecessor_id TEXT, outcome TEXT, scope TEXT NOT NULL,
    extension_attributes TEXT NOT NULL, PRIMARY KEY (workflow_id, id));
CREATE TABLE flow_events (
    id INTEGER PRIMARY KEY AUTOINCREMENT, flow_id TEXT NOT NULL REFERENCES flows (id) ON DELETE CASCADE,
    kind TEXT NOT NULL, payload TEXT NOT NULL, at INTEGER NOT NULL);
CREATE TABLE flow_steps (
    id TEXT PRIMARY KEY, flow_id TEXT NOT NULL REFERENCES flows (id) ON DELETE CASCADE, runtime TEXT NOT NULL,
    child_session_key TEXT, run_id TEXT NOT NULL, task TEXT NOT NULL, status TEXT NOT NULL, result TEXT,
    created_at INTEGER NOT NULL, updated_at INTEGER NOT NULL, UNIQUE (flow_id, run_id));
CREATE TABLE flows (
    id TEXT PRIMARY KEY, controller_id TEXT NOT NULL, goal TEXT NOT NULL, owner_session_key TEXT NOT NULL,
    requester_origin TEXT NOT NULL, current_step TEXT NOT NULL, state TEXT NOT NULL, wait TEXT, status TEXT NOT NULL,
    cancel_requested INTEGER NOT NULL, revision INTEGER NOT NULL, created_at INTEGER NOT NULL,
    updated_at INTEGER NOT NULL);
CREATE TABLE flowstore_artifacts (
    tenant_id TEXT NOT NULL, hash TEXT NOT NULL, size INTEGER NOT NULL, media_type TEXT, data BLOB NOT NULL,
    PRIMARY KEY (tenant_id, hash));
CREATE TABLE flowstore_counters (definition_id TEXT PRIMARY KEY, value INTEGER NOT NULL);
CREATE TABLE flowstore_definitions (
    workflow_id TEXT NOT NULL, version TEXT NOT NULL, ir TEXT NOT NULL, created_at INTEGER NOT NULL,
    tenant_id TEXT NOT NULL, PRIMARY KEY (tenant_id, workflow_id, version));
CREATE TABLE flowstore_effects (
    tenant_id TEXT NOT NULL, key TEXT NOT NULL, result TEXT NOT NULL, execution_id TEXT, PRIMARY KEY (tenant_id, key));
CREATE TABLE flowstore_executions (
    execution_id TEXT PRIMARY KEY, tenant_id TEXT NOT NULL, created_at INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO "flowstore_executions" VALUES('order-1','default',1767225600000000);
CREATE TABLE flowstore_log (
    position INTEGER PRIMARY KEY, execution_id TEXT NOT NULL, sequence INTEGER NOT NULL, tenant_id TEXT NOT NULL,
    event TEXT NOT NULL, timestamp INTEGER NOT NULL, event_id TEXT, UNIQUE (execution_id, sequence));
INSERT INTO "flowstore_log" VALUES(1,'order-1',1,'default','{"type":"custom","note":"kept"}',1767225600000000,NULL);
CREATE TABLE flowstore_meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
INSERT INTO "flowstore_meta" VALUES('schema','1');
CREATE TABLE flowstore_runs (
    execution_id TEXT PRIMARY KEY, workflow_id TEXT NOT NULL, workflow_version TEXT NOT NULL, status TEXT NOT NULL,
    initial_input TEXT NOT NULL, current_state TEXT NOT NULL, started_at INTEGER NOT NULL,
    updated_at INTEGER NOT NULL, completed_at INTEGER, tenant_id TEXT NOT NULL);
CREATE TABLE flowstore_snapshots (
    execution_id TEXT NOT NULL, at_sequence INTEGER NOT NULL, state TEXT NOT NULL, id TEXT NOT NULL UNIQUE,
    created_at INTEGER NOT NULL, tenant_id TEXT NOT NULL, PRIMARY KEY (execution_id, at_sequence));
CREATE TABLE flowstore_tenants (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, status TEXT NOT NULL, policy TEXT, limits TEXT NOT NULL,
    created_at INTEGER NOT NULL, updated_at INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO "flowstore_tenants" VALUES('default','','active',NULL,'{"max_concurrent_executions":null,"max_workflows":null,"max_tokens_per_month":null,"max_cost_per_month_usd":null}',1767225600000000,1767225600000000);
CREATE TABLE flowstore_tokens (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, role TEXT NOT NULL, hash TEXT NOT NULL UNIQUE,
    created_at INTEGER NOT NULL, expires_at INTEGER, revoked_at INTEGER, tenant_id TEXT NOT NULL);
CREATE TABLE flowstore_work_items (
    id TEXT PRIMARY KEY, execution_id TEXT NOT NULL, node_id TEXT NOT NULL, queue_type TEXT NOT NULL,
    payload TEXT NOT NULL, attempt INTEGER NOT NULL, max_attempts INTEGER NOT NULL, created_at INTEGER NOT NULL,
    available_at INTEGER NOT NULL, lease_expires_at INTEGER, worker_id TEXT, lease_fence INTEGER NOT NULL,
    status TEXT NOT NULL, last_error TEXT, tenant_id TEXT NOT NULL, dead_lettered_at INTEGER);
INSERT INTO "flowstore_work_items" VALUES('item-1','order-1','','mail','{}',0,3,1767225600000000,1767225600000000,NULL,NULL,0,'pending',NULL,'default',NULL);
CREATE TABLE scheduled_commands (
    command_name TEXT NOT NULL, data TEXT NOT NULL, execute_time INTEGER NOT NULL, again_at INTEGER, lease_token TEXT,
    lease_expires_at INTEGER, PRIMARY KEY (command_name, data));
CREATE TABLE workflows (
    id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, workflow_definition_id TEXT NOT NULL, version INTEGER NOT NULL,
    description TEXT, reference TEXT, root_workflow_id TEXT, next_execution INTEGER, status TEXT NOT NULL,
    data TEXT NOT NULL, create_time INTEGER NOT NULL, complete_time INTEGER, stamp INTEGER NOT NULL);
CREATE INDEX flows_by_owner ON flows (owner_session_key, created_at, id);
CREATE INDEX flows_by_status ON flows (status, updated_at, id);
CREATE INDEX flow_steps_by_flow ON flow_steps (flow_id, created_at, id);
CREATE INDEX flow_events_by_flow ON flow_events (flow_id, id);
CREATE INDEX flowstore_tenants_by_time ON flowstore_tenants (created_at, id);
CREATE INDEX flowstore_tokens_by_time ON flowstore_tokens (created_at, id);
CREATE INDEX flowstore_tokens_by_tenant ON flowstore_tokens (tenant_id, created_at, id);
CREATE INDEX flowstore_executions_by_tenant ON flowstore_executions (tenant_id, created_at, execution_id);
CREATE INDEX flowstore_log_by_tenant ON flowstore_log (tenant_id, position);
CREATE UNIQUE INDEX flowstore_log_by_event_id ON flowstore_log (execution_id, event_id) WHERE event_id IS NOT NULL;
CREATE INDEX flowstore_runs_by_time ON flowstore_runs (updated_at, execution_id);
CREATE INDEX flowstore_runs_by_status ON flowstore_runs (status, updated_at, execution_id);
CREATE INDEX flowstore_runs_by_tenant ON flowstore_runs (tenant_id, updated_at, execution_id);
CREATE INDEX flowstore_runs_by_tenant_status ON flowstore_runs (tenant_id, status, updated_at, execution_id);
CREATE INDEX flowstore_pending ON flowstore_work_items (status, queue_type, available_at, id)
    WHERE status = 'pending';
CREATE INDEX flowstore_pending_by_tenant ON flowstore_work_items (status, tenant_id, queue_type, available_at, id)
    WHERE status = 'pending';
CREATE INDEX flowstore_leases ON flowstore_work_items (status, queue_type, lease_expires_at, id)
    WHERE status = 'claimed';
CREATE INDEX flowstore_leases_by_tenant ON flowstore_work_items (status, tenant_id, queue_type, lease_expires_at, id)
    WHERE status = 'claimed';
CREATE INDEX flowstore_dead ON flowstore_work_items (status, dead_lettered_at, id) WHERE status = 'dead_lettered';
CREATE INDEX flowstore_dead_by_tenant ON flowstore_work_items (status, tenant_id, dead_lettered_at, id)
    WHERE status = 'dead_lettered';
CREATE INDEX flowstore_items_by_time ON flowstore_work_items (available_at, id);
CREATE INDEX flowstore_items_by_status ON flowstore_work_items (status, available_at, id);
CREATE INDEX flowstore_items_by_queue ON flowstore_work_items (queue_type, available_at, id);
CREATE INDEX flowstore_items_by_tenant ON flowstore_work_items (tenant_id, available_at, id);
CREATE INDEX flowstore_items_by_execution ON flowstore_work_items (execution_id, available_at, id);
CREATE INDEX flowstore_effects_by_execution ON flowstore_effects (execution_id);
CREATE INDEX workflows_runnable ON workflows (status, next_execution, id)
    WHERE status = 'Runnable' AND next_execution IS NOT NULL;
CREATE INDEX workflows_by_age ON workflows (status, (COALESCE(complete_time, create_time)), id);
CREATE INDEX execution_pointers_in_order ON execution_pointers (workflow_id, place, id);
CREATE INDEX events_by_key ON events (event_name, event_key, event_time, id);
CREATE INDEX events_runnable ON events (event_time, id) WHERE is_processed = 0;
CREATE INDEX events_processed ON events (event_time, id) WHERE is_processed = 1;
CREATE INDEX event_subscriptions_open ON event_subscriptions (event_name, event_key, subscribe_as_of, id)
    WHERE terminated_at IS NULL;
CREATE INDEX event_subscriptions_by_workflow ON event_subscriptions (workflow_id);
CREATE INDEX event_subscriptions_ended ON event_subscriptions (terminated_at, id) WHERE terminated_at IS NOT NULL;
CREATE INDEX scheduled_commands_by_time ON scheduled_commands (execute_time, command_name, data);
CREATE INDEX execution_errors_by_workflow ON execution_errors (workflow_id, id);
CREATE INDEX execution_errors_by_time ON execution_errors (error_time, id);
DELETE FROM "sqlite_sequence";
COMMIT;
"""


# --- every facet against a plain model, alone and all together ---


@dataclass
class Plain:
    """All that a store holds, in dicts; what a rolled back transaction leaves is a copy made before it."""

    flows: dict[str, Flow] = dataclasses.field(default_factory=dict)
    steps: dict[str, FlowStep] = dataclasses.field(default_factory=dict)
    trail: list[Any] = dataclasses.field(default_factory=list)
    tenants: dict[str, Tenant] = dataclasses.field(default_factory=dict)
    known: dict[str, tuple[str, datetime]] = dataclasses.field(default_factory=dict)
    log: list[StoredEvent] = dataclasses.field(default_factory=list)
    runs: dict[str, WorkflowExecution] = dataclasses.field(default_factory=dict)
    snapshots: dict[tuple[str, int], Snapshot] = dataclasses.field(default_factory=dict)
    definitions: dict[tuple[str, str], WorkflowDefinition] = dataclasses.field(default_factory=dict)
    effects: dict[tuple[str, str], Any] = dataclasses.field(default_factory=dict)
    artifacts: dict[tuple[str, bytes], str | None] = dataclasses.field(default_factory=dict)
    tokens: dict[str, ApiToken] = dataclasses.field(default_factory=dict)
    items: dict[str, WorkItem] = dataclasses.field(default_factory=dict)
    dead: dict[str, datetime] = dataclasses.field(default_factory=dict)
    # By queue, with the time at which its bucket is full.
    policies: dict[str, tuple[QueuePolicy, datetime]] = dataclasses.field(default_factory=dict)
    instances: dict[str, WorkflowInstance] = dataclasses.field(default_factory=dict)
    counters: dict[str, int] = dataclasses.field(default_factory=dict)
    subscriptions: dict[str, EventSubscription] = dataclasses.field(default_factory=dict)
    terminated: set[str] = dataclasses.field(default_factory=set)
    events: dict[str, Event] = dataclasses.field(default_factory=dict)
    errors: list[ExecutionError] = dataclasses.field(default_factory=list)
    commands: dict[str, int] = dataclasses.field(default_factory=dict)
    rows: list[int] = dataclasses.field(default_factory=list)  # of the user's own table


three = st.sampled_from("abc")


ages = st.none() | st.integers(-9, 9).map(lambda age: START + seconds(age))


small_json = st.sampled_from(
    [None, True, 1, 1.0, "\U0001f600", [1, {"a": []}], {"list": [1], "other": {"kept": True}}, {}]
)


class Machine(RuleBasedStateMachine):
    """A store, its model and a clock that may go back; children add the rules of a facet."""

    engine: ClassVar[str]

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.folder = tempfile.TemporaryDirectory()
        self.target = ":memory:"
        if self.engine == "file":
            self.target = os.path.join(self.folder.name, "app.db")
        elif self.engine == "postgres":
            self.target = PostgresServer.shared.empty_target(self.clock())
        self.store = self.open()
        self.model = Plain(
            tenants={"default": Tenant(id="default", created_at=START, updated_at=START)}
        )
        self.blocks: list[tuple[Any, Plain]] = []

    def open(self) -> Store:
        return flowstore.open(
            self.target, clock=self.clock, backoff=float, lease_seconds=10, synchronous="OFF"
        )

    @property
    def flows(self) -> FlowStore:
        return self.store.flows

    @property
    def events(self) -> EventStore:
        return self.store.events

    @property
    def state(self) -> StateBackend:
        return self.store.state

    def refuses(self, error: Exception | type[Exception], call: Call) -> None:
        """The call raises this very error, or one of the type."""
        kind = error if isinstance(error, type) else type(error)
        with pytest.raises(kind) as caught:
            call()
        assert type(caught.value) is kind
        assert error is kind or caught.value.args == cast("Exception", error).args

    def undo(self, call: Call) -> None:
        """Makes a call in a transaction that is rolled back."""
        with pytest.raises(Stop), self.store.transaction():
            call()
            raise Stop

    def active(self, tenant: str) -> bool:
        return self.model.tenants[tenant].status is TenantStatus.ACTIVE

    def logged(self, run: str) -> list[StoredEvent]:
        return [stored for stored in self.model.log if stored.execution_id == run]

    def append_to_log(self, run: str, tenant: str, event: Any, event_id: str | None = None) -> int:
        """What an append that is not refused leaves in the model."""
        now = self.clock()
        self.model.tenants.setdefault(tenant, Tenant(id=tenant, created_at=now, updated_at=now))
        self.model.known.setdefault(run, (tenant, now))
        sequence = len(self.logged(run)) + 1
        last = max((stored.position for stored in self.model.log), default=0)
        self.model.log.append(
            StoredEvent(
                execution_id=run,
                sequence=sequence,
                tenant_id=tenant,
                event=event,
                timestamp=now,
                id=event_id,
                position=last + 1,
            )
        )
        return sequence

    @rule(step=st.integers(-4, 12))
    def time_goes_by(self, step: int) -> None:
        self.clock.advance(step)

    @precondition(lambda self: self.engine == "file" and not self.blocks)
    @rule(through_backup=st.booleans())
    def reopen(self, through_backup: bool) -> None:
        if through_backup:
            copied = os.path.join(self.folder.name, "copy.db")
            self.store.backup(copied)
            self.store.close()
            os.replace(copied, self.target)
        self.store.close()
        self.store = self.open()
        assert self.store.check() == []

    def teardown(self) -> None:
        while self.blocks:
            self.blocks.pop()[0].__exit__(Stop, Stop(), None)
        self.store.close()
        self.folder.cleanup()
        if self.engine == "postgres":
            PostgresServer.shared.left.append(self.target)


class FlowRules(Machine):
    """Flows, their steps and their trail."""

    @rule(id=three, owner=three, status=st.sampled_from(FlowStatus), at=ages, state=small_json)
    def insert_flow(
        self, id: str, owner: str, status: FlowStatus, at: datetime | None, state: Any
    ) -> None:
        flow = Flow(id=id, owner_session_key=owner, status=status, created_at=at, state=state)
        if id in self.model.flows:
            self.refuses(AlreadyExists("flow", id), lambda: self.flows.insert(flow))
        else:
            now = self.clock()
            self.model.flows[id] = replace(flow, created_at=at or now, updated_at=now)
            assert self.flows.insert(flow) == self.model.flows[id]

    @precondition(lambda self: self.model.flows)
    @rule(
        id=three,
        behind=st.sampled_from([0, 0, 0, 1, -1]),
        status=st.sampled_from(FlowStatus),
        trail=st.booleans(),
    )
    def update_flow(self, id: str, behind: int, status: FlowStatus, trail: bool) -> None:
        stored = self.model.flows.get(id, Flow(id=id))
        flow = replace(
            stored, revision=stored.revision - behind, status=status, goal=f"{status}",
            wait=[], created_at=self.clock(), updated_at=START,
        )  # fmt: skip

        def call() -> Any:
            if trail:
                return self.flows.update_and_append(flow, "updated", {"revision": flow.revision})
            return self.flows.update_with_revision(flow)

        if id not in self.model.flows:
            return self.refuses(NotFound("flow", id), call)
        if behind:
            return self.refuses(RevisionMismatch(flow.revision, stored.revision), call)
        changed = replace(
            flow,
            revision=stored.revision + 1,
            created_at=stored.created_at,
            updated_at=self.clock(),
        )
        self.model.flows[id] = changed
        if not trail:
            assert call() == changed
        else:
            found, event = call()
            assert found == changed
            self.trailed(event, id, "updated", {"revision": flow.revision})
        return None

    def trailed(self, event: Any, flow_id: str, kind: str, payload: Any) -> None:
        assert (event.flow_id, event.kind, event.payload, event.at) == (
            flow_id,
            kind,
            payload,
            self.clock(),
        )
        assert all(event.id > older.id for older in self.model.trail)
        self.model.trail.append(event)

    @precondition(lambda self: self.model.flows)
    @rule(flow_id=three, kind=st.sampled_from(["", "k"]), payload=small_json)
    def append_to_trail(self, flow_id: str, kind: str, payload: Any) -> None:
        call = partial(self.flows.append_event, flow_id, kind, payload)
        if flow_id not in self.model.flows:
            self.refuses(NotFound("flow", flow_id), call)
        else:
            self.trailed(call(), flow_id, kind, payload)

    @precondition(lambda self: self.model.flows)
    @rule(id=three, flow_id=three, run_id=three, result=small_json)
    def insert_step(self, id: str, flow_id: str, run_id: str, result: Any) -> None:
        step = FlowStep(id=id, flow_id=flow_id, run_id=run_id, result=result)
        same_run = self.step_of_run(flow_id, run_id)
        assert self.flows.find_step_by_run_id(flow_id, run_id) == same_run
        if flow_id not in self.model.flows:
            self.refuses(NotFound("flow", flow_id), lambda: self.flows.insert_step(step))
        elif id in self.model.steps or same_run:
            taken = AlreadyExists("flow step", run_id if same_run else id)
            self.refuses(taken, lambda: self.flows.insert_step(step))
        else:
            self.model.steps[id] = replace(step, created_at=self.clock(), updated_at=self.clock())
            assert self.flows.insert_step(step) == self.model.steps[id]

    def step_of_run(self, flow_id: str, run_id: str) -> FlowStep | None:
        steps = self.model.steps.values()
        return next((s for s in steps if (s.flow_id, s.run_id) == (flow_id, run_id)), None)

    @precondition(lambda self: self.model.steps)
    @rule(id=three, run_id=three, status=st.sampled_from(FlowStepStatus))
    def update_step(self, id: str, run_id: str, status: FlowStepStatus) -> None:
        stored, now = self.model.steps.get(id), self.clock()
        step = FlowStep(
            id=id, flow_id="elsewhere", run_id=run_id, task="t", status=status, created_at=now
        )
        call = partial(self.flows.update_step, step)
        if stored is None:
            return self.refuses(NotFound("flow step", id), call)
        if self.step_of_run(stored.flow_id, run_id) not in (None, stored):
            return self.refuses(AlreadyExists("flow step", run_id), call)
        changed = replace(
            step, flow_id=stored.flow_id, created_at=stored.created_at, updated_at=now
        )
        self.model.steps[id] = changed
        assert call() == changed
        return None

    @precondition(lambda self: self.model.flows)
    @rule()
    def prune_flows(self) -> None:
        gone = {
            flow.id
            for flow in self.model.flows.values()
            if flow.status.is_terminal
            and flow.updated_at is not None
            and flow.updated_at < self.clock()
        }
        assert self.flows.prune_terminal_flows(0) == len(gone)
        self.model.flows = {id: flow for id, flow in self.model.flows.items() if id not in gone}
        self.model.steps = {
            id: step for id, step in self.model.steps.items() if step.flow_id not in gone
        }
        self.model.trail = [event for event in self.model.trail if event.flow_id not in gone]

    @invariant()
    def flows_agree(self) -> None:
        flows = self.flows
        for key in "abc":
            assert flows.get(key) == self.model.flows.get(key)
            assert flows.get_step(key) == self.model.steps.get(key)
            assert flows.list_events(key) == [
                event for event in self.model.trail[::-1] if event.flow_id == key
            ]
            mine = [flow for flow in self.model.flows.values() if flow.owner_session_key == key]
            assert flows.list_by_owner(key) == sorted(
                mine, key=lambda f: (f.created_at, f.id), reverse=True
            )
            steps = [step for step in self.model.steps.values() if step.flow_id == key]
            assert flows.list_steps(key) == sorted(
                steps, key=lambda step: (step.created_at, step.id)
            )
        for status in (FlowStatus.CREATED, FlowStatus.FINISHED):
            those = [flow for flow in self.model.flows.values() if flow.status is status]
            assert flows.list_by_status(status) == sorted(
                those, key=lambda flow: (flow.updated_at, flow.id)
            )


tenants_named = st.sampled_from(["default", "default", "t", "u"])


class LogRules(Machine):
    """The log of three executions of three tenants."""

    def opened(self, run: str, tenant: str) -> FlowStoreError | None:
        """What an append to the run as this tenant meets."""
        if self.model.known.get(run, (tenant,))[0] != tenant:
            return TenantMismatch(run, tenant)
        idle = tenant in self.model.tenants and not self.active(tenant)
        return TenantInactive(tenant) if idle else None

    @rule(
        run=three,
        tenant=tenants_named,
        value=small_json,
        event_id=st.none() | three,
        expected=st.none() | st.integers(0, 3),
        as_owner=st.booleans(),
    )
    def append(
        self,
        run: str,
        tenant: str,
        value: Any,
        event_id: str | None,
        expected: int | None,
        as_owner: bool,
    ) -> None:
        event = {"type": EventType.CUSTOM, "value": value}
        options: Any = {"event_id": event_id, "expected_sequence": expected}
        call = partial(self.events.append, run, tenant, event, **options)
        if as_owner:
            call = partial(self.state.append_event, run, event, **options)
            if run not in self.model.known:
                return self.refuses(NotFound("execution", run), call)
            tenant = self.model.known[run][0]
        twice = [
            stored.sequence
            for stored in self.logged(run)
            if stored.id is not None and stored.id == event_id
        ]
        if not as_owner and (refused := self.opened(run, tenant)) is not None:
            self.refuses(refused, call)
        elif twice:
            assert call() == twice[0]
        elif expected is not None and expected != len(self.logged(run)):
            self.refuses(SequenceConflict(run, expected, len(self.logged(run))), call)
        else:
            assert call() == self.append_to_log(run, tenant, event, event_id)
        return None

    @rule(
        run=three,
        tenant=tenants_named,
        values=st.lists(json_leaves, min_size=1, max_size=3),
        expected=st.none() | st.integers(0, 3),
        torn=st.booleans(),
        undone=st.booleans(),
    )
    def append_batch(
        self,
        run: str,
        tenant: str,
        values: list[Any],
        expected: int | None,
        torn: bool,
        undone: bool,
    ) -> None:
        events: list[Any] = [{"type": "t", "value": value} for value in values]
        given, logged = [*events, *([{}] if torn else [])], len(self.logged(run))
        append = self.events.append_batch
        call = partial(append, run, tenant, given, expected_sequence=expected)
        if (refused := self.opened(run, tenant)) is not None:
            return self.refuses(refused, call)
        if torn:
            return self.refuses(InvalidData, call)
        if expected is not None and expected != logged:
            return self.refuses(SequenceConflict(run, expected, logged), call)
        if undone:
            self.undo(call)
        [first, *_] = [self.append_to_log(run, tenant, event) for event in events]
        assert call() == first
        return None

    @rule(
        run=three, after=st.integers(-1, 8), size=st.sampled_from([1, 2, 3, 1000]), event_id=three
    )
    def read(self, run: str, after: int, size: int, event_id: str) -> None:
        events, mine = self.store.events, self.events.load_events(run)
        assert events.load_events_after(run, after) == mine[max(0, after) :]
        assert [*events.iter_events(run, after, chunk=size)] == mine[max(0, after) :]
        assert events.load_last_events(run, size) == mine[-size:]
        found = [stored for stored in mine if stored.id == event_id]
        assert events.find_event(run, event_id) == (found[0] if found else None)
        for tenant in (None, "default", "t"):
            paged: list[StoredEvent] = []
            last = 0
            while page := events.read_all(last, size, tenant_id=tenant):
                assert len(page) <= size
                paged += page
                last = page[-1].position
            whole = events.read_all()
            assert paged == [stored for stored in whole if tenant in (None, stored.tenant_id)]

    @invariant()
    def logs_agree(self) -> None:
        log = self.events.read_all()
        # Positions are the store's own: a rolled back one may be given again.
        assert [
            (s.execution_id, s.sequence, s.tenant_id, s.event, s.timestamp, s.id) for s in log
        ] == [
            (s.execution_id, s.sequence, s.tenant_id, s.event, s.timestamp, s.id)
            for s in self.model.log
        ]
        assert [stored.position for stored in log] == sorted({stored.position for stored in log})
        for run in "abc":
            mine = [stored for stored in log if stored.execution_id == run]
            assert [stored.sequence for stored in mine] == [*range(1, len(mine) + 1)]
            assert self.events.load_events(run) == mine
            assert self.events.count_events(run) == len(mine)
            assert self.events.get_latest_sequence(run) == (len(mine) or None)
            assert self.events.execution_exists(run) is (run in self.model.known)
        for tenant in ("default", "t", "u"):
            known = [(at, run) for run, (owner, at) in self.model.known.items() if owner == tenant]
            assert self.events.list_executions(tenant) == [
                run for _, run in sorted(known, reverse=True)
            ]
        assert self.state.list_tenants() == sorted(
            self.model.tenants.values(), key=lambda tenant: (tenant.created_at, tenant.id)
        )


ARTIFACTS = [b"", b"one", bytes(range(256)) * 40]


def runs_of(machine: Any) -> st.SearchStrategy[str]:
    """Ids of executions, above all of those with a record."""
    return st.sampled_from([*[*machine.model.runs] * 4, "a", "b", "c"])


class StateRules(LogRules):
    """Executions, snapshots, definitions, effects, artifacts, tenants and tokens, through the store and its views."""

    def seen_by(self, tenant: str | None) -> tuple[StateBackend, str, type[Exception] | None]:
        """The backend or a view, the tenant that it writes as, and what a change through it meets."""
        if tenant is None:
            return self.store.state, "default", None
        if tenant not in self.model.tenants:
            return self.state.for_tenant(tenant), tenant, NotFound
        return (
            self.state.for_tenant(tenant),
            tenant,
            None if self.active(tenant) else TenantInactive,
        )

    @rule(
        id=st.sampled_from("tuv"),
        status=st.sampled_from(TenantStatus),
        most=st.none() | st.integers(0, 2),
    )
    def write_tenant(self, id: str, status: TenantStatus, most: int | None) -> None:
        limits = TenantLimits(max_workflows=most, max_concurrent_executions=most)
        tenant, now = Tenant(id=id, status=status, limits=limits), self.clock()
        stored = self.model.tenants.get(id)
        if stored is None:
            self.refuses(NotFound("tenant", id), lambda: self.store.state.update_tenant(tenant))
            self.model.tenants[id] = replace(tenant, created_at=now, updated_at=now)
            assert self.state.create_tenant(tenant) == self.model.tenants[id]
        else:
            self.refuses(
                AlreadyExists("tenant", id), lambda: self.store.state.create_tenant(tenant)
            )
            self.model.tenants[id] = replace(tenant, created_at=stored.created_at, updated_at=now)
            assert self.state.update_tenant(tenant) == self.model.tenants[id]

    @rule(
        run=three,
        tenant=tenants_named,
        status=st.sampled_from(ExecutionStatus),
        state=small_json,
        in_view=st.booleans(),
    )
    def create_run(
        self, run: str, tenant: str, status: ExecutionStatus, state: Any, in_view: bool
    ) -> None:
        backend, _, refused = self.seen_by(tenant if in_view else None)
        given = WorkflowExecution(
            execution_id=run, workflow_id="w", status=status, tenant_id=tenant, current_state=state
        )
        call, now = partial(backend.create_execution, given), self.clock()
        if refused is not None:
            return self.refuses(refused, call)
        if run in self.model.runs or self.model.known.get(run, (tenant,))[0] != tenant:
            return self.refuses(AlreadyExists("execution", run), call)
        if tenant not in self.model.tenants:
            return self.refuses(NotFound("tenant", tenant), call)
        going = [
            r
            for r in self.model.runs.values()
            if r.tenant_id == tenant and not r.status.is_terminal
        ]
        most = self.model.tenants[tenant].limits.max_concurrent_executions
        if most is not None and not status.is_terminal and len(going) >= most:
            return self.refuses(LimitExceeded, call)
        self.model.known.setdefault(run, (tenant, now))
        self.model.runs[run] = replace(given, started_at=now, updated_at=now)
        assert call() == self.model.runs[run]
        return None

    @precondition(lambda self: self.model.runs)
    @rule(
        run=st.runner().flatmap(runs_of),
        statuses=st.lists(st.sampled_from(ExecutionStatus), min_size=1, max_size=4),
    )
    def change_status(self, run: str, statuses: list[ExecutionStatus]) -> None:
        """One after the other, a second apart."""
        change = partial(self.store.state.update_execution_status, run)
        for status in statuses:
            if run not in self.model.runs:
                return self.refuses(NotFound("execution", run), lambda: change("running"))
            stored, now = self.model.runs[run], self.clock()
            done = stored.completed_at or (now if status.is_terminal else None)
            self.model.runs[run] = replace(stored, status=status, updated_at=now, completed_at=done)
            change(status)
            self.clock.advance(1)
        return None

    @precondition(lambda self: self.model.runs)
    @rule(run=st.runner().flatmap(runs_of), value=small_json, patch=st.booleans())
    def change_state(self, run: str, value: Any, patch: bool) -> None:
        state = self.store.state
        call = (
            partial(state.patch_append_array, run, "list")
            if patch
            else partial(state.update_execution_current_state, run)
        )
        if run not in self.model.runs:
            return self.refuses(NotFound, lambda: call(value))
        stored = self.model.runs[run]
        before = stored.current_state
        if patch and not isinstance(before, dict):
            return self.refuses(InvalidData, lambda: call(value))
        after = {**before, "list": [*before.get("list", []), value]} if patch else value
        self.model.runs[run] = replace(stored, current_state=after, updated_at=self.clock())
        return call(value)

    @precondition(lambda self: self.model.known)
    @rule(run=three, id=st.sampled_from("abcdefg"), sequence=st.integers(0, 3), value=small_json)
    def write_snapshot(self, run: str, id: str, sequence: int, value: Any) -> None:
        snapshot = Snapshot(execution_id=run, at_sequence=sequence, state=value, id=id)
        elsewhere = [place for place, other in self.model.snapshots.items() if other.id == id]
        if run not in self.model.known:
            self.refuses(NotFound, lambda: self.state.write_snapshot(snapshot))
        elif elsewhere not in ([], [(run, sequence)]):
            self.refuses(
                AlreadyExists("snapshot", id), lambda: self.store.state.write_snapshot(snapshot)
            )
        else:
            stored = replace(snapshot, created_at=self.clock())
            self.model.snapshots[run, sequence] = stored
            assert self.state.write_snapshot(snapshot) == stored

    @precondition(lambda self: self.model.snapshots)
    @rule(
        of=st.runner().flatmap(lambda self: st.sampled_from([*self.model.snapshots])),
        keep=st.integers(-1, 2),
    )
    def prune_snapshots(self, of: tuple[str, int], keep: int) -> None:
        run = of[0]
        those = sorted(place for place in self.model.snapshots if place[0] == run)
        gone = those[: max(0, len(those) - max(0, keep))]
        assert self.state.prune_snapshots(run, keep) == len(gone)
        for place in gone:
            del self.model.snapshots[place]

    @rule(id=three, tenant=st.none() | tenants_named, ir=small_json)
    def store_definition(self, id: str, tenant: str | None, ir: Any) -> None:
        backend, owner, refused = self.seen_by(tenant)
        call = partial(
            backend.store_workflow, WorkflowDefinition(workflow_id=id, version="1", ir=ir)
        )
        if refused is not None:
            return self.refuses(refused, call)
        most = self.model.tenants[owner].limits.max_workflows
        count = sum(place[0] == owner for place in self.model.definitions)
        if (owner, id) not in self.model.definitions and most is not None and count >= most:
            return self.refuses(LimitExceeded, call)
        self.model.definitions[owner, id] = WorkflowDefinition(
            workflow_id=id, version="1", ir=ir, created_at=self.clock(), tenant_id=owner
        )
        assert call() == self.model.definitions[owner, id]
        return None

    @rule(key=three, tenant=st.none() | tenants_named, result=small_json)
    def record_effect(self, key: str, tenant: str | None, result: Any) -> None:
        backend, owner, refused = self.seen_by(tenant)
        if refused is not None:
            return self.refuses(refused, lambda: backend.record_effect(key, result))
        kept = self.model.effects.setdefault((owner, key), result)
        assert plain_json(backend.record_effect(key, result)) == plain_json(kept)
        return None

    @rule(
        data=st.sampled_from(ARTIFACTS),
        tenant=st.none() | tenants_named,
        kind=st.none() | three,
    )
    def put_artifact(self, data: bytes, tenant: str | None, kind: str | None) -> None:
        backend, owner, refused = self.seen_by(tenant)
        if refused is not None:
            return self.refuses(refused, lambda: backend.put_artifact(data, kind))
        kept = self.model.artifacts.setdefault((owner, data), kind)
        digest = hashlib.sha256(data).hexdigest()
        assert backend.put_artifact(data, kind) == ArtifactRef(
            hash=digest, size=len(data), media_type=kept
        )
        return None

    @precondition(lambda self: len(self.model.tokens) < 6)
    @rule(tenant=st.none() | tenants_named, expires=ages)
    def create_token(self, tenant: str | None, expires: datetime | None) -> None:
        backend, owner, refused = self.seen_by(tenant)
        if refused is not None:
            return self.refuses(refused, lambda: backend.create_token("n", "r"))
        secret, token = backend.create_token("n", "r", expires_at=expires)
        assert token == ApiToken(
            id=token.id,
            name="n",
            role="r",
            created_at=self.clock(),
            expires_at=expires,
            revoked_at=None,
            tenant_id=owner,
        )
        self.model.tokens[secret] = token
        return None

    @precondition(lambda self: self.model.tokens)
    @rule(place=st.integers(0, 5))
    def revoke_token(self, place: int) -> None:
        state = self.store.state
        self.refuses(NotFound("token", UNKNOWN), lambda: state.revoke_token(UNKNOWN))
        for secret, token in [*self.model.tokens.items()][place : place + 1]:
            state.revoke_token(token.id)
            when = token.revoked_at or self.clock()
            self.model.tokens[secret] = replace(token, revoked_at=when)

    @invariant()
    def state_agrees(self) -> None:
        state, model = self.store.state, self.model
        runs = sorted(
            model.runs.values(), key=lambda run: (run.updated_at, run.execution_id), reverse=True
        )
        assert state.list_executions() == runs
        assert state.list_executions("running") == [run for run in runs if run.status == "running"]
        for run in "abc":
            newest = max((place for place in model.snapshots if place[0] == run), default=None)
            assert state.latest_snapshot(run) == (
                None if newest is None else model.snapshots[newest]
            )
        for tenant in ("default", "t"):
            if tenant not in model.tenants:
                continue
            view = state.for_tenant(tenant)
            assert view.list_executions() == [run for run in runs if run.tenant_id == tenant]
            for key in "abc":
                assert view.get_workflow(key, "1") == model.definitions.get((tenant, key))
                assert view.get_effect(key, "none") == model.effects.get((tenant, key), "none")
            for data in ARTIFACTS:
                found = view.get_artifact(hashlib.sha256(data).hexdigest())
                assert found == (data if (tenant, data) in model.artifacts else None)
        for secret, token in model.tokens.items():
            lives = token.revoked_at is None and (
                token.expires_at is None or token.expires_at > self.clock()
            )
            valid = lives and self.active(token.tenant_id)
            assert state.validate_token(secret) == (token if valid else None)
        listed = sorted(
            model.tokens.values(), key=lambda token: (token.created_at, token.id), reverse=True
        )
        assert state.list_tokens() == listed


def plain_json(value: Any) -> str:
    """JSON tells True from 1 and 1.0, where == does not."""
    return json.dumps(value, sort_keys=True)


def items_of(machine: Any) -> st.SearchStrategy[str]:
    """Ids of items, above all of claimed ones, and one of none."""
    items: dict[str, WorkItem] = machine.model.items
    claimed = [id for id, item in items.items() if item.status is WorkItemStatus.CLAIMED]
    return st.sampled_from([*claimed * 4, *items, "missing"])


class ItemRules(Machine):
    """Work items and turns; the backoff of an attempt is that many seconds."""

    @rule(
        id=st.sampled_from("hgfedcba"),
        run=three,
        queue=st.sampled_from("pq"),
        most=st.integers(0, 3),
        at=ages,
        priority=st.sampled_from([0, 0, 5, -100, 100]),
        key=st.sampled_from([None, None, "k"]),
        on_conflict=st.sampled_from(["raise", "keep", "replace"]),
    )
    def enqueue(
        self,
        id: str,
        run: str,
        queue: str,
        most: int,
        at: datetime | None,
        priority: int,
        key: str | None,
        on_conflict: str,
    ) -> None:
        item = WorkItem(
            id=id,
            execution_id=run,
            queue_type=queue,
            payload={"by": id},
            max_attempts=most,
            available_at=at,
            priority=priority,
            unique_key=key,
        )
        now = self.clock()
        put = partial(self.state.enqueue_work_item, item, on_conflict=on_conflict)
        if run not in self.model.known:
            self.refuses(NotFound, put)
            self.append_to_log(run, "default", EVENT)
            write(self.store, run)
            return None
        item = replace(
            item,
            tenant_id=self.model.known[run][0],
            created_at=now,
            available_at=at or now,
        )
        holder = self.holder_of_key(item)
        if holder is not None:
            if on_conflict == "raise" or (on_conflict == "replace" and holder.status != "pending"):
                return self.refuses(AlreadyExists("work item", holder.id), put)
            if on_conflict == "replace":
                self.model.items[holder.id] = replace(
                    holder,
                    payload=item.payload,
                    priority=priority,
                    available_at=item.available_at,
                )
            assert put() == holder.id
        elif id in self.model.items:
            self.refuses(AlreadyExists("work item", id), put)
        else:
            self.model.items[id] = item
            assert put() == id
        return None

    def holder_of_key(self, item: WorkItem) -> WorkItem | None:
        """The item that is not settled and has this item's unique key."""
        for other in self.model.items.values():
            same = (other.unique_key, other.tenant_id, other.queue_type) == (
                item.unique_key,
                item.tenant_id,
                item.queue_type,
            )
            if same and item.unique_key is not None and other.status in ("pending", "claimed"):
                return other
        return None

    @rule(
        queue=st.sampled_from("pq"),
        paused=st.sampled_from([False, False, True]),
        most=st.none() | st.integers(1, 2),
        rate=st.none() | st.integers(1, 2),
    )
    def set_policy(self, queue: str, paused: bool, most: int | None, rate: int | None) -> None:
        policy = QueuePolicy(queue_type=queue, paused=paused, max_running=most)
        if rate is not None:
            policy.rate, policy.per_seconds = float(rate), 5.0 * rate
        self.model.policies[queue] = policy, datetime(1970, 1, 1, tzinfo=UTC)
        assert self.store.state.set_queue_policy(policy) == policy
        assert self.store.state.get_queue_policy(queue) == policy

    def has_room(self, queue: str) -> bool:
        """Whether the policy of a queue lets one more item be claimed now."""
        if queue not in self.model.policies:
            return True
        policy, full_at = self.model.policies[queue]
        running = [
            item
            for item in self.model.items.values()
            if item.status is WorkItemStatus.CLAIMED and item.queue_type == queue
        ]
        missing = max(timedelta(0), full_at - self.clock()) / seconds(5)
        return not (
            policy.paused
            or (policy.max_running is not None and len(running) >= policy.max_running)
            or (policy.rate is not None and policy.rate - missing < 1)
        )

    def attempted(self, id: str, error: str | None, delay: float | None) -> None:
        """One more attempt of an item has failed."""
        item = self.model.items[id]
        attempt = item.attempt + 1
        last_error = (
            item.last_error
            if error is None or (error == "the lease expired" and item.last_error)
            else error
        )
        item = replace(
            item, attempt=attempt, last_error=last_error, worker_id=None, lease_expires_at=None
        )
        if attempt >= item.max_attempts:
            self.model.dead[id] = item.settled_at = self.clock()
            item.status = WorkItemStatus.DEAD_LETTERED
        else:
            item.available_at = self.clock() + seconds(attempt if delay is None else max(0, delay))
            item.status = WorkItemStatus.PENDING
            item.settled_at = None
        self.model.items[id] = item

    def take_back(self, queues: str) -> None:
        for id, item in [*self.model.items.items()]:
            lapsed = item.lease_expires_at is not None and item.lease_expires_at <= self.clock()
            if item.status is WorkItemStatus.CLAIMED and lapsed and item.queue_type in queues:
                self.attempted(id, "the lease expired", None)

    @precondition(lambda self: self.model.items)
    @rule(
        worker=st.sampled_from(["w1", "w2"]),
        queues=st.sampled_from(["p", "qp", "pq", "qpzp", "z", ""]),
        lease=st.sampled_from([None, 0, 3, 12]),
        most=st.sampled_from([1, 1, 3]),
    )
    def claim(self, worker: str, queues: str, lease: int | None, most: int) -> None:
        self.take_back(queues)
        expected = []
        for _ in range(most):
            due = [
                (-item.priority, item.available_at, id)
                for id, item in self.model.items.items()
                if item.status is WorkItemStatus.PENDING
                and item.queue_type in queues
                and item.available_at is not None
                and item.available_at <= self.clock()
                and self.has_room(item.queue_type)
            ]
            if due:
                expected.append(self.hand_out(min(due)[2], worker, 10 if lease is None else lease))
        state = self.store.state
        if most == 1:
            got = state.claim_work_item(worker, [*queues], lease_seconds=lease)
            assert got == (expected[0] if expected else None)
        else:
            assert expected == state.claim_work_items(worker, [*queues], most, lease_seconds=lease)

    def hand_out(self, id: str, worker: str, lease: int) -> WorkItem:
        """What a claim leaves in the model."""
        item = self.model.items[id]
        self.model.items[id] = replace(
            item,
            status=WorkItemStatus.CLAIMED,
            worker_id=worker,
            lease_fence=item.lease_fence + 1,
            claimed_at=self.clock(),
            lease_expires_at=self.clock() + seconds(lease),
        )
        if item.queue_type in self.model.policies:
            policy, full_at = self.model.policies[item.queue_type]
            if policy.rate is not None:
                full_at = max(full_at, self.clock()) + seconds(5)
            self.model.policies[item.queue_type] = policy, full_at
        return self.model.items[id]

    claim_too = claim  # chosen twice as often

    @precondition(lambda self: self.model.items)
    @rule(
        id=st.runner().flatmap(items_of),
        behind=st.sampled_from([None, 0, 0, 1]),
        as_record=st.booleans(),
        how=st.sampled_from(["complete", "fail", "retry", "renew", "park", "give up", "turn"]),
        value=small_json,
        delay=st.none() | st.sampled_from([-(2**40), -5, 0, 1, 5]),
    )
    def settle(
        self, id: str, behind: int | None, as_record: bool, how: str, value: Any, delay: int | None
    ) -> None:
        """Under a fence, which may be an old one, or without; of an item that is given as such, its own."""
        state, event = self.store.state, {"type": "turn", "value": value}
        item = self.model.items.get(id, WorkItem(id=id, execution_id="a", queue_type="q"))
        own = item.lease_fence - (behind or 0)
        given = replace(item, lease_fence=own) if as_record else id
        apart = None if as_record or behind is None else own
        fence = own if as_record else apart
        turn = {"snapshot_state": value, "effect_key": f"turn {id}", "effect": value}
        calls: dict[str, Call] = {
            "complete": partial(state.complete_work_item, given, lease_fence=apart),
            "fail": partial(state.fail_work_item, given, "failed", lease_fence=apart),
            "retry": partial(state.retry_work_item, given, "again", delay=delay, lease_fence=apart),
            "renew": partial(state.renew_lease, given, lease_fence=apart, lease_seconds=7),
            "park": partial(state.park_work_item, given, delay=delay, lease_fence=apart),
            "give up": partial(state.move_to_dead_letter, given, "given up"),
            "turn": partial(state.commit_turn, given, apart, event, **turn),
        }
        call = calls[how]
        if how == "turn" and fence is None:
            return self.refuses(InvalidData, call)
        if id not in self.model.items:
            return self.refuses(NotFound("work item", id), call)
        if how == "give up" and not as_record:
            fence = None  # it takes none
        allowed = {
            "retry": {"claimed", "failed"},
            "renew": {"claimed"},
            "park": {"claimed"},
            "give up": {"pending", "claimed", "failed"},
        }.get(how, {"claimed"} if fence is not None else {*WorkItemStatus} - {"dead_lettered"})
        if fence not in (None, item.lease_fence) or item.status not in allowed:
            return self.refuses(LeaseLost(id), call)
        holder = self.holder_of_key(item)
        is_last = item.attempt + 1 >= item.max_attempts  # a dead letter needs no key
        if how == "retry" and item.status == "failed" and holder and not is_last:
            return self.refuses(AlreadyExists("work item", holder.id), call)
        if how == "retry":
            self.attempted(id, "again", delay)
            assert vars(call()).items() >= vars(self.model.items[id]).items()
            return None
        changed = replace(item, lease_expires_at=None, status=WorkItemStatus.COMPLETED)
        changed.settled_at = item.settled_at or self.clock()
        if how == "fail":
            changed.status, changed.last_error = WorkItemStatus.FAILED, "failed"
        elif how == "renew":
            changed = replace(item, lease_expires_at=self.clock() + seconds(7))
        elif how == "park":
            changed.status = WorkItemStatus.PENDING
            changed.worker_id = changed.settled_at = None
            changed.available_at = self.clock() + seconds(max(0, delay or 0))
        elif how == "give up":
            changed.status, changed.last_error = WorkItemStatus.DEAD_LETTERED, "given up"
            changed.worker_id = None
            self.model.dead[id] = changed.settled_at = self.clock()
        self.model.items[id] = changed
        if how != "turn":
            told = {"renew": changed.lease_expires_at, "give up": self.model.dead.get(id)}
            result = call()
            assert getattr(result, "dead_lettered_at", result) == told.get(how, changed)
            return None
        sequence = self.append_to_log(item.execution_id, item.tenant_id, event)
        self.model.effects.setdefault((item.tenant_id, f"turn {id}"), value)
        assert call() == sequence
        with self.store.transaction() as tx:
            place = item.execution_id, sequence
            [(made,)] = tx.execute(
                "SELECT id FROM flowstore_snapshots WHERE execution_id = ? AND at_sequence = ?",
                place,
            )
        self.model.snapshots[place] = Snapshot(
            execution_id=item.execution_id,
            at_sequence=sequence,
            state=value,
            created_at=self.clock(),
            id=made,
        )
        return None

    settle_too = settle_again = settle

    @rule(undone=st.booleans())
    def reclaim(self, undone: bool) -> None:
        if undone:
            self.undo(self.state.reclaim_expired_leases)
        before, dead = copy.copy(self.model.items), {*self.model.dead}
        self.take_back("pq")
        result = self.state.reclaim_expired_leases()
        exhausted = self.model.dead.keys() - dead
        assert {letter.id for letter in result.exhausted} == exhausted
        taken = {id: item for id, item in self.model.items.items() if item != before[id]}
        for letter in result.exhausted:
            assert vars(letter) == vars(taken.pop(letter.id)) | {"dead_lettered_at": self.clock()}
        assert {item.id: item for item in result.retryable} == taken

    @precondition(lambda self: self.model.dead)
    @rule(id=st.runner().flatmap(items_of))
    def requeue(self, id: str) -> None:
        item = self.model.items.get(id)
        if item is None or item.status is not WorkItemStatus.DEAD_LETTERED:
            return self.refuses(
                NotFound("dead letter", id), lambda: self.store.state.requeue_dead_letter(id)
            )
        if holder := self.holder_of_key(item):
            return self.refuses(
                AlreadyExists("work item", holder.id),
                lambda: self.store.state.requeue_dead_letter(id),
            )
        del self.model.dead[id]
        self.model.items[id] = replace(
            item,
            attempt=0,
            available_at=self.clock(),
            status=WorkItemStatus.PENDING,
            settled_at=None,
        )
        assert self.state.requeue_dead_letter(id) == self.model.items[id]
        return None

    @invariant()
    def items_agree(self) -> None:
        items = sorted(self.model.items.values(), key=lambda item: item.id)
        assert self.store.state.list_work_items() == items
        filters: list[dict[str, Any]] = [
            *({"status": status} for status in WorkItemStatus),
            {"queue_type": "p"},
            {"execution_id": "a"},
            {"status": "claimed", "queue_type": "q", "execution_id": "b"},
        ]
        for wanted in filters:
            found = self.store.state.list_work_items(**wanted)
            assert found == [item for item in items if wanted.items() <= vars(item).items()]
        policies = [policy for _, (policy, _) in sorted(self.model.policies.items())]
        assert self.state.list_queue_policies() == policies
        dead = sorted(((at, id) for id, at in self.model.dead.items()), reverse=True)
        assert [vars(letter) for letter in self.store.state.list_dead_letters()] == [
            vars(self.model.items[id]) | {"dead_lettered_at": at} for at, id in dead
        ]


def modelled(
    rules: type[RuleBasedStateMachine],
    examples: int = 15,
    steps: int = 40,
    engines: Sequence[str] = ENGINES[:2],
) -> Iterator[Any]:
    """The test cases of a model: one for each engine, with fewer examples on a server, where a call takes longer."""
    for engine in engines:
        machine: Any = type(f"{rules.__name__}_{engine}", (rules,), {"engine": engine})
        count = examples // 5 if engine == "postgres" else examples
        machine.TestCase.settings = settings(
            max_examples=count * int(os.environ.get("FLOWSTORE_MODEL_EXAMPLES", "1")),
            stateful_step_count=steps,
            deadline=None,
            phases=[Phase.generate],  # shrinking would outlast the watchdog
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        )
        fixture = "postgres" if engine == "postgres" else "watchdog"
        yield pytest.mark.usefixtures(fixture)(machine.TestCase)


def write_everywhere(store: Store, key: str) -> None:
    """One transaction over all facets and a table of the user's own."""
    host = store.workflows
    with store.transaction() as tx:
        flow_with(store, "finished", id=key)
        store.flows.insert_step(FlowStep(id=key, flow_id=key, run_id="r"))
        with store.transaction():
            store.flows.append_event(key, key, {})
            store.events.append("all", "default", event(key), event_id=key)
        enqueue(store, id=key, execution_id="all", queue_type="kept")
        many = pointers(f"{key}.0", f"{key}.1")
        host.create_new_workflow(instance(id=key, execution_pointers=many))
        host.create_event(Event(id=key, event_name="n", event_key="k"))
        host.schedule_command(command(key, 0))
        tx.execute("INSERT INTO mine (key) VALUES (?)", (key,))


def prepared_for_crashes(path: Path) -> None:
    with flowstore.open(path) as store:
        execute(store, "CREATE TABLE mine (key TEXT PRIMARY KEY)")
        for run in ("items", "turns"):
            create(store, run)
        flow_with(store, id="counter", state={"n": 0})
        created(store.workflows, id="host", name="host")


@pytest.fixture
def whole(path: Path) -> bytes:
    """A sound file with something in every facet, and a text that needs pages of its own."""
    prepared_for_crashes(path)
    with flowstore.open(path) as store:
        for number in range(60):
            write_everywhere(store, f"all.{number}")
        store.events.append("large", "default", {"type": "t", "text": "x" * 30_000})
        store.compact()
    return path.read_bytes()


def as_nobody(call: Call) -> Any:
    """The call in a child that root's rights are taken from."""

    def run() -> Any:
        if os.geteuid() == 0:
            os.setuid(65534)
        return call()

    return in_fork(run)


def learn_next_version(script: str) -> None:
    """Makes the module one of a later version."""
    flowstore._UPGRADES = flowstore._UPGRADES | {flowstore._SCHEMA_VERSION: script}
    flowstore._SCHEMA_VERSION += 1
    flowstore._TABLE_NAMES = (*flowstore._TABLE_NAMES, "flowstore_second")


# --- hostile input ---


class Text(str):
    """Text of a type of its own."""


class Whole(int):
    """A number of a type of its own."""


SQL_IN_NAMES = [
    "x'; DROP TABLE flows; --",
    '"',
    "]) OR 1=1 --",
    "?1",
    ":name",
    "{tenant}",
    "%s",
    "flowstore_log",
]


HOSTILE: list[Any] = [
    None, True, False, -1, 0, 1, 2**31, 2**63 - 1, 2**63, -(2**63) - 1, 10**5000, 1.5, -0.0, 1e308, float("nan"),
    float("inf"), -float("inf"), 1j, Decimal("NaN"), "", "a", "\0", "a\0b", NOT_UTF8, "a\udfff", "\U0010ffff", "x" * 255,
    "x" * 256, "\U0001f600" * 255, "y" * 1_000_000, *SQL_IN_NAMES, b"", b"\xff\0", bytearray(b"x"), memoryview(b"x"), [],
    (), {}, set(), [None], [[]], ["\0"], [NOT_UTF8], [object()], {"type": "t"}, {"type": 5}, {1: {2: {3: None}}},
    {"type": "t", "x": float("nan")}, {("t",): 1}, {NOT_UTF8: 1}, BAD_LEAVES["circle"], nested(256), nested(257),
    nested(257, "{"), nested(100_000), object(), object, len, print, iter([EVENT]), (item for item in [EVENT]), range(3),
    datetime(2030, 1, 1), datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC),
    datetime.min.replace(tzinfo=timezone(timedelta(hours=23))), date(2030, 1, 1), timedelta(1), uuid.UUID(int=0),
    Text("own"), Whole(5), FlowStatus.CREATED, ExecutionStatus.PENDING, WorkItemStatus.PENDING, PointerStatus.PENDING, "Pending", Flow(), Flow,
    Exception("x"), threading.Lock(), Path("."), ..., NotImplemented, *RUDE,
]  # fmt: skip


tried: Counter[str] = Counter()


# --- the public surface: one table of all methods, which every test over "all methods" goes through ---


def stock(store: Store) -> Things:
    """Give a store one of everything: what `furnish` gives a tenant, and of the other facets under plain names."""
    things = furnish(store, "a")
    flows, workflows, old = store.flows, store.workflows, START - timedelta(99)
    flows.insert(Flow(id="f", owner_session_key="o"))
    flows.insert(Flow(id="ended", status=FlowStatus.FINISHED, updated_at=old))
    flows.insert_step(FlowStep(id="s", flow_id="f", run_id="r"))
    for id, status in (("w", WorkflowStatus.RUNNABLE), ("old", WorkflowStatus.TERMINATED)):
        point = ExecutionPointer(id="p", step_id=0)
        fields: Any = {"id": id, "name": id, "status": status, "complete_time": old}
        made = WorkflowInstance(workflow_definition_id="d", execution_pointers=[point], **fields)
        workflows.create_new_workflow(made)
    for id in ("sub", "taken"):
        workflows.create_event_subscription(record("EventSubscription", id=id))
    assert workflows.set_subscription_token("taken", "t", "host", START + timedelta(1))
    for id in ("new", "done"):
        workflows.create_event(record("Event", id=id, is_processed=id == "done"))
    workflows.schedule_command(record("ScheduledCommand"))
    workflows.persist_errors([record("ExecutionError")])
    with store.run("done") as run:
        run.result = run.step("one", str, 1)
    store.runs.start("under_way", id="r")
    assert store.state.claim_work_item("w", ["under_way"], lease_seconds=500)
    store.runs.start(do_nothing, id="due")
    store.runs.emit("approved", "r", 7)
    return things


class Row(NamedTuple):
    """A public method: its signature, arguments that it takes of a stocked store (the first have all, and change
    something if the method writes), and by argument, or field of a record, what is to be refused though of its type."""

    signature: str
    calls: tuple[Callable[[Things], tuple[Any, ...]], ...]
    refused: dict[str, list[Any]]

    def arguments(self, things: Things, call: int = 0) -> dict[str, Any]:
        names = [part.partition("=")[0] for part in self.signature.split(", ") if part != "*"]
        return dict(zip(names, self.calls[call](things), strict=False))


def row(
    signature: str = "", *calls: Callable[[Things], tuple[Any, ...]], **refused: list[Any]
) -> Row:
    return Row(signature, calls or (lambda _: (),), refused)


new_id = flowstore.new_id
LATE = START + timedelta(days=1)
NO_ATTEMPT = [-1, 2**31]
ENDLESS = [1e300, float("inf")]


SURFACE: dict[str, Row] = {
    "flows.insert": row("flow", lambda a: (Flow(),)),
    "flows.get": row("id", lambda a: ("f",)),
    "flows.list_by_owner": row("owner_session_key, *, limit=None, offset=0", lambda a: ("o", 9, 0)),
    "flows.list_by_status": row("status, *, limit=None, offset=0", lambda a: ("created", 9, 0)),
    "flows.update_with_revision": row("flow", lambda a: (Flow(id="f"),)),
    "flows.append_event": row("flow_id, kind, payload", lambda a: ("f", "k", {})),
    "flows.list_events": row("flow_id, limit=100", lambda a: ("f", 9)),
    "flows.update_and_append": row("flow, event_kind, event_payload", lambda a: (Flow(id="f"), "k", {})),
    "flows.insert_step": row("step", lambda a: (FlowStep(flow_id="f", run_id=new_id()),)),
    "flows.update_step": row("step", lambda a: (FlowStep(id="s", flow_id="f", run_id="r"),), lambda a: (record("FlowStep"),)),
    "flows.get_step": row("id", lambda a: ("s",)),
    "flows.list_steps": row("flow_id", lambda a: ("f",)),
    "flows.find_step_by_run_id": row("flow_id, run_id", lambda a: ("f", "r")),
    "flows.prune_terminal_flows": row("retain_days", lambda a: (9,)),
    "events.append": row(
        "execution_id, tenant_id, event, *, expected_sequence=None, event_id=None",
        lambda a: ("la", "tenant-a", EVENT, None, None), lambda a: ("la", "tenant-a", EVENT, None, "id"), lambda a: ("la", "z", EVENT),
    ),
    "events.append_batch": row(
        "execution_id, tenant_id, events, *, expected_sequence=None", lambda a: ("la", "tenant-a", [EVENT], None), events=[[], (), EVENT],
    ),
    "events.load_events": row("execution_id", lambda a: ("la",)),
    "events.load_events_after": row("execution_id, after_seq", lambda a: ("la", 0)),
    "events.load_last_events": row("execution_id, limit=100", lambda a: ("la", 9)),
    "events.find_event": row("execution_id, event_id", lambda a: ("la", "known")),
    "events.get_latest_sequence": row("execution_id", lambda a: ("la",)),
    "events.list_executions": row("tenant_id='default', limit=100, offset=0", lambda a: ("tenant-a", 9, 0)),
    "events.execution_exists": row("execution_id", lambda a: ("la",)),
    "events.count_events": row("execution_id", lambda a: ("la",)),
    "events.iter_events": row("execution_id, after_seq=0, *, chunk=1000", lambda a: ("la", 0, 9), chunk=[0, -1]),
    "events.tail": row(
        "after_position=None, *, timeout=None, tenant_id=None, execution_id=None",
        lambda a: (0, 0.0, "tenant-a", "la"), lambda a: (None, 0.0), lambda a: (0, 0.0, None, "la"),
    ),
    "events.read_all": row("after_position=0, limit=1000, *, tenant_id=None", lambda a: (0, 9, "tenant-a"), lambda a: ()),
    "state.append_event": row(
        "execution_id, event, *, expected_sequence=None, event_id=None",
        lambda a: (a.execution, EVENT, None, None), lambda a: (a.execution, EVENT, None, "known"),
    ),
    "state.claim_work_item": row(
        "worker_id, queue_types, *, lease_seconds=None, wait=0.0", lambda a: ("w", ["q"], 9, 0.0), lease_seconds=ENDLESS,
    ),
    "state.claim_work_items": row(
        "worker_id, queue_types, limit, *, lease_seconds=None, wait=0.0", lambda a: ("w", ["q"], 2, 9, 0.0), lease_seconds=ENDLESS,
    ),
    "state.commit_turn": row(
        "item_id, lease_fence, event, *, failed=False, snapshot_state=Ellipsis, effect_key=None, effect=None, "
        "expected_sequence=None, event_id=None",
        lambda a: (a.claimed, None, EVENT, False, 1, "t", {}, None, None),
    ),
    "state.complete_work_item": row("item_id, *, lease_fence=None", lambda a: (a.pending, None), lambda a: (a.claimed,)),
    "state.complete_work_items": row("items", lambda a: ([a.claimed],)),
    "state.create_execution": row(
        "execution", lambda a: (WorkflowExecution(workflow_id="w"),),
        lambda a: (WorkflowExecution(execution_id=a.logged, workflow_id="w", tenant_id="tenant-a"),),
    ),
    "state.create_tenant": row("tenant", lambda a: (Tenant(id=new_id()),)),
    "state.create_token": row("name, role, *, expires_at=None", lambda a: ("n", "r", None)),
    "state.enqueue_work_item": row(
        "item, *, on_conflict='raise'", lambda a: (WorkItem(execution_id=a.execution, queue_type="q", unique_key="k"), "keep"),
        lambda a: (WorkItem(id="new", execution_id=a.execution, queue_type="q", tenant_id="tenant-a"),),
        attempt=NO_ATTEMPT, max_attempts=NO_ATTEMPT, priority=[-101, 101], on_conflict=["drop", ""],
    ),
    "state.enqueue_work_items": row(
        "items, *, on_conflict='raise'", lambda a: ([WorkItem(execution_id=a.execution, queue_type="q")], "replace"),
        on_conflict=["drop"],
    ),
    "state.fail_work_item": row("item_id, error, *, lease_fence=None", lambda a: (a.pending, "e", None), lambda a: (a.claimed, "e")),
    "state.for_tenant": row("tenant_id", lambda a: ("tenant-a",)),
    "state.get_artifact": row("hash", lambda a: (a.artifact,)),
    "state.get_effect": row("key, default=None", lambda a: ("effect-a", "nothing")),
    "state.get_events": row("execution_id", lambda a: (a.execution,)),
    "state.get_events_since": row("execution_id, since_sequence", lambda a: (a.execution, 1)),
    "state.get_execution": row("id", lambda a: (a.execution,)),
    "state.get_queue_policy": row("queue_type", lambda a: ("q",)),
    "state.get_tenant": row("id", lambda a: ("tenant-a",)),
    "state.get_work_item": row("item_id", lambda a: (a.pending,)),
    "state.get_workflow": row("workflow_id, version", lambda a: ("wa", "1")),
    "state.hold": row("item, *, lease_seconds=None", lambda a: (a.claimed, 500), lease_seconds=ENDLESS),
    "state.latest_sequence": row("execution_id", lambda a: (a.execution,)),
    "state.latest_snapshot": row("execution_id", lambda a: (a.execution,)),
    "state.list_dead_letters": row("limit=100, offset=0", lambda a: (9, 0)),
    "state.list_executions": row("status=None, limit=100, offset=0", lambda a: (None, 9, 0), lambda a: ("pending",)),
    "state.list_queue_policies": row(),
    "state.list_tenants": row(),
    "state.list_tokens": row(),
    "state.list_work_items": row(
        "*, status=None, queue_type=None, execution_id=None, limit=100, offset=0", lambda a: (None, None, None, 9, 0),
        lambda a: (None, None, a.execution), lambda a: (None, "q"), lambda a: ("pending",), lambda a: ("claimed", "q"),
    ),
    "state.move_to_dead_letter": row("item_id, last_error", lambda a: (a.pending, "e")),
    "state.park_work_item": row(
        "item_id, *, delay=None, until=None, lease_fence=None", lambda a: (a.claimed, None, LATE, None), lambda a: (a.claimed, 5),
        delay=ENDLESS,
    ),
    "state.patch_append_array": row("id, key, value", lambda a: (a.execution, "list", 1)),
    "state.prune_snapshots": row("execution_id, keep=1", lambda a: (a.execution, 0)),
    "state.put_artifact": row("data, media_type=None", lambda a: (b"new", None), lambda a: (b"artifact of a", "text/new")),
    "state.reclaim_expired_leases": row(),
    "state.record_effect": row(
        "key, result, *, execution_id=None",
        lambda a: ("new", "mine", a.execution), lambda a: ("effect-a", "mine"), lambda a: ("new", "mine"),
    ),
    "state.renew_lease": row(
        "item_id, worker_id=None, *, lease_fence=None, lease_seconds=None",
        lambda a: (a.claimed, None, None, 9), lambda a: (a.claimed.id, "worker-a", None, 9), lease_seconds=ENDLESS,
    ),
    "state.replay": row(
        "execution_id, reducer, initial=None", lambda a: (a.execution, lambda state, event: [state, event.sequence], "none"),
    ),
    "state.requeue_dead_letter": row("item_id", lambda a: (a.dead,)),
    "state.retry_work_item": row("item_id, error=None, *, delay=None, lease_fence=None", lambda a: (a.claimed, "e", None, None), delay=ENDLESS),
    "state.revoke_token": row("token_id", lambda a: (a.token_id,)),
    "state.store_workflow": row("definition", lambda a: (definition("wa", ir="new", tenant_id="tenant-a"),)),
    "state.timeline": row("execution_id", lambda a: (a.execution,)),
    "state.update_execution_current_state": row("id, state", lambda a: (a.execution, "new")),
    "state.update_execution_status": row("id, status", lambda a: (a.execution, "running")),
    "state.set_queue_policy": row(
        "policy", lambda a: (QueuePolicy(queue_type="z", max_running=1, rate=1.0),),
        max_running=[0, -1], rate=[0, -1.0, float("nan")], per_seconds=[0, float("inf")],
    ),
    "state.update_tenant": row("tenant", lambda a: (Tenant(id="tenant-a"),)),
    "state.validate_token": row("token", lambda a: (a.token,)),
    "state.write_snapshot": row(
        "snapshot", lambda a: (Snapshot(execution_id=a.execution, at_sequence=0, state="new"),),
        lambda a: (Snapshot(execution_id=a.execution, at_sequence=3, state="new"),), at_sequence=[-1],
    ),
    "workflows.create_new_workflow": row(
        "instance", lambda a: (record("WorkflowInstance", execution_pointers=[ExecutionPointer(step_id=0)]),),
    ),
    "workflows.persist_workflow": row("instance", lambda a: (record("WorkflowInstance", id="w", execution_pointers=[ExecutionPointer(step_id=1)]),)),
    "workflows.persist_workflow_with_subscriptions": row(
        "instance, subscriptions", lambda a: (record("WorkflowInstance", id="w"), [record("EventSubscription")]),
    ),
    "workflows.get_runnable_instances": row("as_at=None", lambda a: (LATE,)),
    "workflows.get_workflow_instance": row("id", lambda a: ("w",)),
    "workflows.get_workflow_instance_by_name": row("name", lambda a: ("w",)),
    "workflows.get_workflow_instances": row("ids", lambda a: (["w"],)),
    "workflows.next_definition_sequence": row("definition_id", lambda a: ("d",)),
    "workflows.delete_workflow": row("id", lambda a: ("w",)),
    "workflows.purge_workflows": row("status, older_than", lambda a: ("Terminated", START)),
    "workflows.create_event_subscription": row("subscription", lambda a: (record("EventSubscription"),)),
    "workflows.get_subscription": row("id", lambda a: ("sub",)),
    "workflows.terminate_subscription": row("id", lambda a: ("sub",)),
    "workflows.get_subscriptions": row("event_name, event_key, as_of=None", lambda a: ("n", "k", LATE)),
    "workflows.get_first_open_subscription": row("event_name, event_key, as_of=None", lambda a: ("n", "k", LATE)),
    "workflows.set_subscription_token": row("id, token, worker_id, expiry", lambda a: ("sub", "t", "w", LATE)),
    "workflows.clear_subscription_token": row("id, token", lambda a: ("taken", "t")),
    "workflows.create_event": row("event", lambda a: (record("Event"),)),
    "workflows.get_event": row("id", lambda a: ("new",)),
    "workflows.get_runnable_events": row("as_at=None", lambda a: (LATE,)),
    "workflows.get_events": row("event_name, event_key, as_of=None", lambda a: ("n", "k", LATE)),
    "workflows.mark_event_processed": row("id", lambda a: ("new",)),
    "workflows.mark_event_unprocessed": row("id", lambda a: ("done",)),
    "workflows.supports_scheduled_commands": row(),
    "workflows.schedule_command": row("command", lambda a: (record("ScheduledCommand", data="new"),)),
    "workflows.process_commands": row("as_of, handler, *, lease_seconds=None", lambda a: (LATE, repr, 9), lease_seconds=[-1, *ENDLESS]),
    "workflows.persist_errors": row("errors", lambda a: ([record("ExecutionError")],)),
    "workflows.list_errors": row("workflow_id, limit=100, offset=0", lambda a: ("w", 9, 0)),
    "workflows.ensure_store_exists": row(),
    "runs.start": row(
        "function, input=None, *, id=None, queue=None, available_at=None, max_attempts=3, priority=0, unique_key=None, "
        "tenant_id='default'",
        lambda a: ("f", [1], new_id(), "queue", LATE, 3, 0, "k", "default"), lambda a: (do_nothing, None, "due"),
        max_attempts=NO_ATTEMPT, priority=[-101, 101],
    ),
    "runs.work": row(
        "*functions, concurrency=1, queues=None, worker_id=None, stop=None, until_idle=False",
        lambda a: ([do_nothing], 1, None, "w", None, True), concurrency=[0, -1],
    ),
    "runs.result": row("id, *, timeout=None", lambda a: ("done", 0.0), timeout=[-1, float("inf")]),
    "runs.emit": row("event_name, event_key='', data=None", lambda a: ("n", "k", 1)),
    "runs.cancel": row("id", lambda a: ("due",)),
    "runs.fork": row("id, *, before, new_id=None", lambda a: ("done", "one", new_id())),
    "run.step": row("name, function, /, *args, **kwargs", lambda a: ("s", str)),
    "run.sleep": row("seconds, *, name='sleep'", lambda a: (0.0, "n"), seconds=[-1, *ENDLESS]),
    "run.sleep_until": row("time, *, name='sleep'", lambda a: (START, "n")),
    "run.wait_for": row(
        "event_name, event_key='', *, timeout=None, name=None", lambda a: ("approved", "r", 0.0, "n"), timeout=[-1, *ENDLESS],
    ),
    "store.run": row(
        "id, *, workflow_id='script', input=None, lease_seconds=None, wait=None", lambda a: ("run", "script", 1, 9, 0),
        lease_seconds=ENDLESS, wait=[-1, float("inf")],
    ),
    "store.transaction": row("*, read_only=False", lambda a: (False,), lambda a: (True,)),
    "store.backup": row("path", lambda a: (f"copy-{new_id()}.db",)),
    "store.check": row(),
    "store.prune": row(
        "older_than, *, dry_run=False, artifacts=False", lambda a: (timedelta(9), False, False), lambda a: (START, True, True),
    ),
    "store.compact": row(),
    "store.stats": row(),
    "store.now": row(),
    "store.close": row(),
    "tx.execute": row("sql, parameters=()", lambda a: ("SELECT ?", (1,))),
    "tx.executemany": row("sql, rows", lambda a: ("UPDATE flows SET goal = ?", [("new",)])),
}  # fmt: skip


CLASSES: dict[str, type] = {
    "flows": FlowStore,
    "events": EventStore,
    "state": StateBackend,
    "workflows": PersistenceProvider,
    "runs": flowstore.Runs,
    "run": flowstore.Run,
    "store": Store,
    "tx": flowstore.Transaction,
    "view": flowstore.View,
}


# What does not reach the store. An async store does not await it, nor what is used with `async with` or `async for`.
UNTOUCHED = {"state.for_tenant", "workflows.supports_scheduled_commands"}
NOT_AWAITED = UNTOUCHED | {
    "store.now",
    "state.hold",
    "store.transaction",
    "store.run",
    "events.tail",
    "events.iter_events",
}


def public_signature(name: str) -> inspect.Signature:
    facet, method = name.split(".")
    shown = inspect.signature(getattr(CLASSES[facet], method))
    return shown.replace(parameters=[*shown.parameters.values()][1:])


def passed(name: str, arguments: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Arguments as they are passed: by position, those that can be passed in no other way."""
    named = dict(arguments)
    if name == "run.step":
        return [named.pop("name"), named.pop("function")], named
    return named.pop("*functions", []), named


def invoke(store: Any, name: str, arguments: dict[str, Any]) -> Any:
    """Call a method of a store, or of a view of one tenant; what is yielded is listed, what is entered left again."""
    facet, method = name.split(".")
    with ExitStack() as stack:
        if facet == "tx":
            store = stack.enter_context(store.transaction())
        of = getattr(store, facet, store)
        if facet == "run":  # the stocked one that is under way
            item = store.state.get_work_item("r")
            of = flowstore.Run(store._engine, store.state.get_execution("r"), item)
            of._recall(store.events.load_events("r"))
        unnamed, named = passed(name, arguments)
        found = getattr(of, method)(*unnamed, **named)
        if method in ("hold", "transaction", "run"):
            entered = stack.enter_context(found)
            return entered.id if method == "run" else entered
        return list(found) if type(found) is types.GeneratorType else found


def outcome(store: Any, name: str, things: Things, call: int = 0) -> tuple[str, Any]:
    """What a call of the table returned, or which error it raised with what facts."""
    try:
        return "", plain(invoke(store, name, SURFACE[name].arguments(things, call)))
    except FlowStoreError as error:
        return type(error).__name__, tuple(plain(error.args))


def is_text(value: Any, most: int = 2**31, least: int = 0) -> bool:
    text = str.__str__(value) if issubclass(type(value), str) else "\0"
    return least <= len(text) <= most and not re.search("[\0\ud800-\udfff]", text)


def is_json(value: Any) -> bool:
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
        return levels(json.loads(text.encode())) <= 256
    except Exception:
        return False


def fits(annotation: str, value: Any) -> bool:
    """Whether a value may be what an annotation says: False where it has to be refused."""
    kinds = re.split(r" \| (?![^\[]*\])", annotation)
    if any(kind.endswith("Status") for kind in kinds):
        kinds = [kind for kind in kinds if kind != "str"]
    return any(fits_one(kind, value) for kind in kinds)


def fits_one(kind: str, value: Any) -> bool:
    kind, _, of = kind.partition("[")
    is_a = partial(issubclass, type(value))
    match kind:
        case "None":
            return value is None
        case "Ref":  # of a workflow that is elsewhere
            return is_a(uuid.UUID) or is_text(value)
        case "AnyId" | "AnyItem" | "Id":
            item = kind == "AnyItem" and is_a(WorkItem)
            return item or is_a(uuid.UUID) or is_text(value, 255, 1)
        case "str" | "Key" | "Data":
            return is_text(value, {"Key": 255, "Data": 512}.get(kind, 2**31))
        case "int" | "Limit" | "Attempts" | "Priority" | "Concurrency":
            least = 0 if kind == "Limit" else -(2**63)
            return is_a(int) and (type(value) is not int or least <= value < 2**63)
        case "float" | "Rate":
            return is_a((int, float)) and (type(value) is not float or value == value)
        case "datetime":
            return is_a(datetime) and (type(value) is not datetime or value.tzinfo is not None)
        case "bool" | "bytes" | "timedelta":
            return is_a({"bool": bool, "bytes": bytes, "timedelta": timedelta}[kind])
        case "Json":
            return is_json(value)
        case "Mapping" if of.endswith("Json]") and type(value) is dict:
            return is_json(value) and is_text(json.loads(json.dumps(value)).get("type"), least=1)
        case "Mapping" | "dict":
            return hasattr(type(value), "keys")
        case "Sequence" | "Collection" | "Iterable" | "list":
            if type(value) in (list, tuple):
                return all(fits(of[:-1], member) for member in value)
            return hasattr(type(value), "__iter__") and not is_a((str, bytes))
        case "os.PathLike":
            return hasattr(type(value), "__fspath__")
        case "threading.Event":
            return hasattr(type(value), "is_set")
        case "Any":
            return True
    own: type = getattr(flowstore, kind)
    if issubclass(own, StrEnum):
        other = is_a(StrEnum) and type(value) is not own
        return is_text(value) and not other and str.__str__(value) in list(own)
    return is_a(own)


def hostile(annotation: str, refused: list[Any]) -> Iterator[tuple[Any, bool]]:
    """Hostile values, and whether each has to be refused."""
    yield from ((value, not fits(annotation, value)) for value in HOSTILE)
    yield from ((value, True) for value in refused)
    if "Json" in annotation:
        yield from (({"type": "t", "a": [1, {"b": value}]}, True) for value in BAD_LEAVES.values())


def hostile_records(fresh: Call, refused: dict[str, list[Any]]) -> Iterator[tuple[str, Any, bool]]:
    """Records, in themselves or in lists, of which one field is hostile: its name, and whether it is refused."""
    usual = fresh()
    if isinstance(usual, list):
        for name, made, bad in hostile_records(lambda: fresh()[0], refused) if usual else ():
            yield name, [made], bad
    if not dataclasses.is_dataclass(usual):
        return
    for name, made in broken(usual):
        yield name, made, False
    for field in dataclasses.fields(usual):
        values = hostile(str(field.type), refused.get(field.name, []))
        inner = hostile_records(partial(getattr, usual, field.name), refused)
        for name, value, bad in itertools.chain(((field.name, *each) for each in values), inner):
            yield name, replace(fresh(), **{field.name: value}), bad


OF_CLAIMS = ("state.hold", "state.complete_work_items")


def hostile_arguments(name: str, things: Things) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """Arguments of a method of which one, or one field of a record, is hostile: its name, and whether it is refused."""
    row = SURFACE[name]
    for argument, parameter in public_signature(name).parameters.items():
        annotation = parameter.annotation + " | None" * (argument == "limit")  # None is all
        if annotation.startswith("Callable") or parameter.kind in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        ):
            continue  # the user's own code: it fails as Python's own error, once it would be called
        if name.startswith("tx.") or argument in ("default", "initial"):
            annotation = (
                "Any"  # the driver says what it takes; what comes back as it is may be anything
            )
        usual = row.arguments(things)[argument]
        values = [(argument, *each) for each in hostile(annotation, row.refused.get(argument, []))]
        if isinstance(usual, list):
            members = hostile(annotation.partition("[")[2][:-1] or "Any", [])
            values += [(argument, [*usual, value], bad) for value, bad in members]
        fields = hostile_records(lambda: row.arguments(things)[argument], row.refused)  # noqa: B023
        for field, value, bad in itertools.chain(values, fields):
            taken = value is parameter.default or (
                (field == "id" and name.endswith("new_workflow"))  # an empty one is none yet
                or (field != argument and (annotation == "AnyItem" or name in OF_CLAIMS))
            )  # of a claim, its id and its fence are read
            may_last = argument in (
                "timeout",
                "wait",
                "until_idle",
                "concurrency",
                "seconds",
                "time",
            )
            may_last = may_last or name == "run.wait_for"
            if bad or not may_last:
                yield field, row.arguments(things) | {argument: value}, bad and not taken


words = st.sampled_from([
    "app.db", "text.txt", "empty.db", "missing.db", ".", "..", "", "-", "--", "-x", "--json", "--help", "--version",
    "--limit", "-1", "0", "1e9", "NaN", "--store", "--older-than", "30d", "--dry-run", "no/such/folder.db", ":memory:",
    "sqlite:app.db", "sqlite:///", "sqlite:app.db?x=1", "ftp://host/x", "postgresql://", "a\nb", "\x1b[31m", "\t",
    "\udcff", "%s", "{}", "'; DROP TABLE flows; --", "x" * 300, "\U0001f600", "new.db", "copy.db", "app.db-wal", "0x10",
])  # fmt: skip


@pytest.fixture
def server(postgres: PostgresServer) -> Iterator[Store]:
    with flowstore.open(
        postgres.target(), synchronous="OFF", lease_seconds=10, backoff=float
    ) as opened:
        yield opened


# ==================================================================================================
# Errors
# ==================================================================================================


every_error = parametrize("name", ERRORS)


def test_a_stale_revision_is_told_with_the_stores_own() -> None:
    assert str(RevisionMismatch(0, 1)).startswith("revision 0 is stale, the store has 1")


@every_error
def test_an_error_carries_its_facts_in_the_order_of_the_contract(name: str) -> None:
    raised = error(name)
    assert isinstance(raised, FlowStoreError)
    assert {attribute: getattr(raised, attribute) for attribute in ERRORS[name]} == ERRORS[name]


@every_error
def test_an_errors_message_is_readable_and_tells_its_facts(name: str) -> None:
    message = str(error(name))
    assert "\n" not in message
    assert not message.startswith("(")
    for fact in ERRORS[name].values() or ["it went wrong"]:
        assert str(fact) in message


@every_error
def test_an_error_can_be_copied_and_pickled(name: str) -> None:
    original = error(name)
    for copied in COPIES:
        twin = copied(original)
        assert type(twin) is type(original)
        assert (str(twin), vars(twin), twin.args) == (str(original), vars(original), original.args)


@parametrize(
    ("name", "base"),
    [
        ("FlowStoreError", Exception),
        ("NotFound", LookupError),
        ("InvalidData", ValueError),
        *(
            (name, StorageError)
            for name in ("StoreBusy", "StoreFull", "StoreCorrupt", "StoreClosed", "SchemaError")
        ),
    ],
)
def test_an_error_is_also_what_the_contract_says(name: str, base: type[Exception]) -> None:
    assert issubclass(getattr(flowstore, name), base)


# ==================================================================================================
# Records
# ==================================================================================================


FROZEN = {
    "FlowEvent", "StoredEvent", "ApiToken", "DeadLetter", "ArtifactRef", "ReclaimResult", "Snapshot", "ExecutionError"
}  # fmt: skip


every_record = parametrize("name", RECORDS)


@every_record
def test_a_record_has_the_fields_and_the_defaults_of_the_contract(name: str) -> None:
    made, other = record(name), record(name)
    assert {field.name for field in dataclasses.fields(made)} == RECORDS[name].keys()
    for field, default in RECORDS[name].items():
        value = getattr(made, field)
        if default == "new":
            assert uuid.UUID(value).version == 7 and value != getattr(other, field)
        elif default == "TenantLimits":
            assert value == TenantLimits()
        elif default and name != "DeadLetter":
            assert value == ast.literal_eval(default), field
        if default in ("{}", "[]"):
            assert value is not getattr(other, field)


@every_record
def test_a_record_is_keyword_only_and_a_field_without_a_default_cannot_be_left_out(
    name: str,
) -> None:
    kind, needed = getattr(flowstore, name), NEEDED_FIELDS.get(name, {})
    assert all(field.kw_only for field in dataclasses.fields(kind))
    with pytest.raises(TypeError):
        kind("positional", **needed)
    for missing, default in RECORDS[name].items():
        if not default:
            with pytest.raises(TypeError, match=missing):
                kind(**{field: v for field, v in needed.items() if field != missing})


@every_record
def test_records_are_equal_by_value(name: str) -> None:
    given = {field: "same" for field, default in RECORDS[name].items() if default == "new"}
    some = next(iter(RECORDS[name]))
    assert record(name, **given) == record(name, **given)
    assert record(name, **given) != record(name, **{**given, some: "another"})
    assert record(name, **given) != vars(record(name, **given))


@every_record
def test_a_record_can_be_copied_and_pickled(name: str) -> None:
    original = record(name)
    for copied in (*COPIES, replace):
        twin = copied(original)
        assert twin == original
        assert twin is not original
        assert type(twin) is type(original)


@every_record
def test_facts_are_frozen_and_other_records_can_be_edited(name: str) -> None:
    edited = record(name)
    field = dataclasses.fields(edited)[0].name
    if name in FROZEN:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(edited, field, "changed")
    else:
        setattr(edited, field, "changed")
        assert getattr(edited, field) == "changed"


@every_record
def test_the_repr_of_a_record_is_one_short_line(name: str) -> None:
    field = dataclasses.fields(record(name))[0].name
    for shown in (record(name), record(name, **{field: "long\n" * 100_000})):
        assert repr(shown).startswith(f"{name}(")
        assert "\n" not in repr(shown)
        assert len(repr(shown)) < 2000


ENUMS = {
    "FlowStatus": "created running waiting cancelled finished failed",
    "StepRuntime": "managed mirrored",
    "FlowStepStatus": "pending running succeeded failed cancelled",
    "EventType": """execution_started step_started step_completed step_failed execution_paused
        execution_resumed execution_completed execution_failed execution_cancelled artifact_stored
        step_discovered tool_call_started tool_call_completed checkpoint_saved goal_evaluated custom""",
    "ExecutionStatus": "pending running paused completed failed cancelled limit_exceeded",
    "WorkItemStatus": "pending claimed completed failed dead_lettered",
    "TenantStatus": "active suspended archived",
    "WorkflowStatus": "Runnable Suspended Complete Terminated",
    "PointerStatus": "Pending Running Complete Skipped Sleeping WaitingForEvent Failed Compensated Cancelled "
    "PendingPredecessor",
    "CommandName": "ProcessWorkflow ProcessEvent",
}


@parametrize("name", ENUMS)
def test_an_enum_has_the_seeds_spellings_under_upper_snake_case_names(name: str) -> None:
    enum: type[StrEnum] = getattr(flowstore, name)
    assert issubclass(enum, StrEnum)
    assert {member.name: member.value for member in enum} == {
        re.sub(r"(?<=[a-z])(?=[A-Z])", "_", value).upper(): value for value in ENUMS[name].split()
    }


def test_four_execution_statuses_are_terminal() -> None:
    assert {status.value for status in ExecutionStatus if status.is_terminal} == {
        "completed",
        "failed",
        "cancelled",
        "limit_exceeded",
    }


def test_every_public_name_is_exported_except_open() -> None:
    space: dict[str, Any] = {}
    exec("from flowstore import *", space)
    assert "open" not in flowstore.__all__
    assert "open" not in space
    assert {
        *RECORDS,
        *ENUMS,
        *ERRORS,
        "FlowStoreError",
        "Store",
        "new_id",
        "DEFAULT_TENANT",
    } <= space.keys()


def test_new_id_is_a_uuid7_of_the_present_millisecond_as_text_and_sorts_by_it() -> None:
    before = time.time_ns() // 1_000_000
    made = [flowstore.new_id() for _ in range(20_000)]
    after = time.time_ns() // 1_000_000
    ids = [uuid.UUID(text) for text in made]
    assert [str(number) for number in ids] == made
    assert {number.version for number in ids} == {7}
    assert len(set(made)) == 20_000
    assert all(before <= number.int >> 80 <= after for number in ids)
    stamps = [text[:18] for text in made]
    assert stamps == sorted(stamps)
    assert stamps[0][:13] < stamps[-1][:13]


# ==================================================================================================
# Schema
# ==================================================================================================


def set_schema_version(path: Path, version: int) -> None:
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE flowstore_meta SET value = ? WHERE key = 'schema'", (str(version),))
        assert db.total_changes == 1


@parametrize(("version", "read_only"), [(999_999, False), (999_999, True), (0, True)])
def test_sqlite_refuses_a_schema_it_does_not_know(
    path: Path, version: int, read_only: bool
) -> None:
    write_to(path)
    set_schema_version(path, version)
    before = path.read_bytes()
    raises(SchemaError, lambda: flowstore.open(path, read_only=read_only))
    assert path.read_bytes() == before


# ==================================================================================================
# Rows: values that are kept, values that are refused
# ==================================================================================================


a_few = settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


good_ids = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=255)


json_values = st.recursive(
    json_leaves,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
)


Through = Callable[[Store, str, Any], Any]


@every_place
@given(value=json_values)
@a_few
def test_json_comes_back_as_it_was_given(store: Store, through: Through, value: Any) -> None:
    back = through(store, flowstore.new_id(), value)
    assert repr(back) == repr(value)


@every_place
def test_json_at_the_edge_of_what_is_allowed(store: Store, through: Through) -> None:
    deep = nested(200), nested(200, "{")
    floats = [-0.0, 5e-324, 1.7976931348623157e308, 1.0]
    odd_text = {"nul\0": "\0", "quote'\"\\": "\u2028\x7f"}
    wide: list[Any] = [[] for _ in range(1000)]
    values = [10**4299, -(10**4299), odd_text, floats, "[{" * 1000, wide, *deep]
    for value in values:
        assert repr(through(store, new_id(), value)) == repr(value)
    assert through(store, "tuple", (1, (2, ()))) == [1, [2, []]]
    keys_back = {"1": "a", "2.5": "b", "-3": []}
    assert through(store, "keys", {1: "a", 2.5: "b", -3: ()}) == keys_back


@every_place
def test_json_goes_256_levels_deep_and_no_deeper(store: Store, through: Through) -> None:
    around = {"through_event": 1, "through_patch": 2}.get(through.__name__, 0)
    assert through(store, "fits", nested(256 - around)) == nested(256 - around)
    with pytest.raises(InvalidData):
        through(store, "too-deep", nested(257 - around))


marked_text = st.text('[]{}"\\\n:,a1é', max_size=9)  # what else could be taken for nesting


marked_json = st.recursive(
    marked_text | st.integers(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(marked_text, inner, max_size=4),
)


@given(value=marked_json, key=marked_text.filter("]".__ne__))
@a_few
def test_how_deep_json_goes_is_told_from_its_brackets_alone(
    store: Store, value: Any, key: str
) -> None:
    execution_id = flowstore.new_id()
    for level in range(256 - levels(value)):
        value = {"]": value, key: "["} if level % 2 else [key, value, "]{"]
    assert through_state(store, execution_id, value) == value
    with pytest.raises(InvalidData, match="nested deeper than 256 levels"):
        store.state.update_execution_current_state(execution_id, [value])


def lines_run(call: Call) -> int:
    """How many lines of flowstore's a call takes in this thread."""
    count = 0

    def trace(frame: FrameType, what: str, _arg: object) -> Any:
        nonlocal count
        count += what == "line" and frame.f_code.co_filename == flowstore.__file__
        return trace

    usual = sys.gettrace()
    gc.disable()  # else another test's store may be finalized meanwhile
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(usual)
        gc.enable()
    return count


@contextmanager
def digits_allowed(most: int) -> Iterator[None]:
    """As many digits may be in a number that Python reads or writes."""
    usual = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(most)
    try:
        yield
    finally:
        sys.set_int_max_str_digits(usual)


@parametrize("digits", [4300, 0, 5000])
@parametrize(
    "made",
    [
        lambda n: [{"role": "user", "content": "hello [1]" * 9, "n": i} for i in range(n)],
        lambda n: {f"key {i}": [i, None, 0.5] for i in range(n)},
        lambda n: [10**4000] * (n // 300) + [{}] * n,
    ],
    ids=["messages", "pairs", "long numbers"],
)
def test_large_json_takes_no_more_python_than_small_json(
    made: Callable[[int], Any], digits: int
) -> None:
    def record_effect(store: Store, key: str, value: Any) -> None:
        store.state.record_effect(key, value)

    with flowstore.open(":memory:") as store, digits_allowed(digits):
        lines = [
            [
                lines_run(partial(call, store, new_id(), made(size)))
                for call in (*PLACES, record_effect)
            ]
            for size in (300, 300, 3000)
        ]
    assert lines[2] == lines[1]  # the first time, statements are prepared


@parametrize("digits", [0, 640, 4300, 5000])
def test_a_number_of_more_than_4300_digits_is_refused_whatever_this_process_may_read(
    store: Store, digits: int
) -> None:
    create(store)
    with digits_allowed(digits):
        for value in ([10**4300], {"a": [-(10**5000)]}, {10**4300: 1}):
            with pytest.raises(InvalidData, match=r"^state.*digits"):
                store.state.update_execution_current_state("e1", value)
        kept = {"text": "1" * 5000, "1" * 5000: [], "n": 10**4299 if digits != 640 else 10**639}
        store.state.update_execution_current_state("e1", kept)
    assert execution(store).current_state == kept


AT_THE_END_OF_THE_STACK = """
def nested(levels):
    return [nested(levels - 1)] if levels > 1 else []

def deeper():
    try:
        deeper()
    except RecursionError:
        pass
    try:
        flowstore._json(value, "value")
        told.append(None)
    except BaseException as error:
        told.append(type(error).__name__)
    raise RecursionError

value, told = nested(200), []
try:
    deeper()
except RecursionError:
    print(*dict.fromkeys(told))
"""


def test_a_recursion_error_of_the_callers_own_is_no_error_of_the_value() -> None:
    assert finished(script(AT_THE_END_OF_THE_STACK)).split() in (
        ["RecursionError", "None"],
        ["None"],
    )


@given(value=good_ids)
@a_few
def test_any_text_of_1_to_255_characters_is_an_id(store: Store, value: str) -> None:
    assume(not store.events.execution_exists(value))
    assert store.events.append(value, value, EVENT, event_id=value) == 1
    stored = store.events.load_events(value)[0]
    assert (stored.execution_id, stored.tenant_id, stored.id) == (value, value, value)
    assert enqueue(store, execution_id=value, id=value, queue_type=value) == value
    item = claim(store, value, worker=value)
    assert {item.id, item.execution_id, item.queue_type, item.worker_id} == {value}


def test_an_ids_length_counts_characters_not_bytes(store: Store) -> None:
    circle, cyclone = "\N{BLACK LARGE CIRCLE}", "\N{CYCLONE}"
    for text in ("x" * 255, circle * 255, cyclone * 255, " ", "'; --", "%s?"):
        create(store, text)
        assert store.events.execution_exists(text), text


def test_a_uuid_means_its_text_in_records_and_look_ups(store: Store) -> None:
    ids: list[Any] = [uuid.uuid4() for _ in range(4)]
    execution, item, event, snapshot = ids
    created = store.state.create_execution(
        WorkflowExecution(execution_id=execution, workflow_id="w")
    )
    assert created.execution_id == str(execution)
    assert store.events.append(execution, "default", EVENT, event_id=event) == 1
    assert store.events.append(str(execution), "default", EVENT, event_id=str(event)) == 1
    assert store.events.load_events(execution) == store.events.load_events(str(execution))
    assert store.events.load_events(execution)[0].id == str(event)
    assert store.state.get_execution(execution) == created
    enqueued = WorkItem(execution_id=execution, queue_type=execution, id=item)
    assert store.state.enqueue_work_item(enqueued) == str(item)
    held = claim(store, execution, worker=execution)
    assert (held.id, held.execution_id, held.queue_type, held.worker_id) == (
        str(item),
        *[str(execution)] * 3,
    )
    assert store.state.complete_work_item(item).status == "completed"
    made = store.state.write_snapshot(
        Snapshot(execution_id=execution, at_sequence=1, state=1, id=snapshot)
    )
    assert made == store.state.latest_snapshot(execution) and made.id == str(snapshot)
    flow = store.flows.insert(Flow(id=execution))
    step = store.flows.insert_step(FlowStep(flow_id=execution, run_id=item))
    assert store.flows.get(execution) == store.flows.get(str(execution)) == flow
    assert store.flows.find_step_by_run_id(execution, item) == step
    assert store.flows.append_event(execution, "k", None).flow_id == str(execution)


@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\0")))
@a_few
def test_text_fields_hold_any_text(store: Store, text: str) -> None:
    item_id = enqueue(store, node_id=text)
    assert store.state.fail_work_item(item_id, text).last_error == text
    assert look(store, item_id).node_id == text


def test_text_fields_hold_text_of_any_length(store: Store) -> None:
    item_id = enqueue(store, node_id="n" * 1_000_000)
    assert store.state.move_to_dead_letter(item_id, "e" * 1_000_000).last_error == "e" * 1_000_000
    assert len(look(store, item_id).node_id) == 1_000_000


zones = (
    st.integers(-1439, 1439).map(lambda minutes: timezone(timedelta(minutes=minutes)))
    | st.timezones()
)


@given(when=st.datetimes(datetime(2, 1, 1), datetime(9998, 12, 31), timezones=zones))
@a_few
def test_times_come_back_in_utc_to_the_microsecond(store: Store, when: datetime) -> None:
    item = look(store, enqueue(store, created_at=when, available_at=when))
    execution = create(
        store, flowstore.new_id(), started_at=when, updated_at=when, completed_at=when
    )
    times: list[Any] = [
        item.created_at,
        item.available_at,
        execution.started_at,
        execution.updated_at,
        execution.completed_at,
    ]
    for time_back in times:
        assert time_back == when.astimezone(UTC) and time_back.tzinfo is UTC


@parametrize("when", [datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)])
def test_the_first_and_the_last_time_can_be_stored(store: Store, when: datetime) -> None:
    assert look(store, enqueue(store, created_at=when, available_at=when)).available_at == when


@parametrize("name", ["created_at", "available_at"])
@parametrize(
    "edge",
    [
        datetime.min.replace(tzinfo=timezone(seconds(3600))),
        datetime.max.replace(tzinfo=timezone(seconds(-3600))),
    ],
)
def test_a_time_that_utc_cannot_express_is_invalid(store: Store, name: str, edge: datetime) -> None:
    with pytest.raises(InvalidData, match=name):
        enqueue(store, **{name: edge})


def test_available_at_is_the_creation_time_unless_set(store: Store) -> None:
    early, late = START - seconds(60), START + seconds(60)
    item = look(store, enqueue(store))
    assert (item.created_at, item.available_at, item.lease_expires_at) == (START, START, None)
    assert look(store, enqueue(store, created_at=late)).available_at == late
    item = look(store, enqueue(store, created_at=late, available_at=early))
    assert (item.created_at, item.available_at) == (late, early)


def test_a_record_that_is_passed_is_not_changed(store: Store) -> None:
    passed: list[Any] = [
        WorkflowExecution(execution_id="e1", workflow_id="w"),
        record("WorkItem", execution_id="e1", lease_fence=7, status="failed", tenant_id="other"),
        Snapshot(execution_id="e1", at_sequence=0, state=(1, {2: 3})),
    ]
    before = copy.deepcopy(passed)
    store.state.create_execution(passed[0])
    store.state.enqueue_work_item(passed[1])
    store.state.write_snapshot(passed[2])
    assert passed == before


def test_a_stored_value_does_not_follow_the_callers_later_changes(store: Store) -> None:
    payload: dict[str, Any] = {"list": [1]}
    item_id = enqueue(store, payload=payload)
    payload["list"].append(2)
    look(store, item_id).payload["list"].append(3)
    assert look(store, item_id).payload == {"list": [1]}


@parametrize("of", [str, StrEnum])
def test_a_plain_string_is_taken_for_an_enum_and_comes_back_as_one(store: Store, of: type) -> None:
    running: Any = "running" if of is str else ExecutionStatus.RUNNING
    pending: Any = "pending" if of is str else WorkItemStatus.PENDING
    assert create(store, "e1", status=running).status is ExecutionStatus.RUNNING
    create(store, "e2")
    store.state.update_execution_status("e2", running)
    runs = store.state.list_executions(running)
    assert {run.execution_id for run in runs} == {"e1", "e2"}
    item_id = enqueue(store)
    [item] = store.state.list_work_items(status=pending)
    assert item.id == item_id and item.status is WorkItemStatus.PENDING
    assert {type(run.status) for run in runs} == {ExecutionStatus}


ODD_ORDER = ["B", "a", "\u00e9", "\uffff", "\U0001f300", "b", "A", "10", "9"]


NEWEST_FIRST = ("flows.list_by_owner", "events.list_executions", "state.list_executions", "state.list_dead_letters")  # fmt: skip


LIMITS_OF_LISTS = [-(2**63), -1, 0, 1, 2, 5, 1000, MAX_INT]


def test_a_list_has_one_order_when_all_times_are_equal_and_limit_and_offset_cut_it(
    store: Store,
) -> None:
    flows, state, upwards = store.flows, store.state, sorted(ODD_ORDER)
    for id in ODD_ORDER:
        flows.insert(Flow(id=id, owner_session_key="o"))
        store.events.append(id, "tenant-a", EVENT)
        create(store, id, tenant_id="tenant-a")
        enqueue(store, execution_id=id, id=id)
        store.workflows.persist_errors([record("ExecutionError", message=id)])
        flows.insert_step(FlowStep(id=id, flow_id="B", run_id=id))
        state.create_tenant(Tenant(id=id))
    assert [claim(store).id for _ in ODD_ORDER] == upwards
    for id in ODD_ORDER:
        state.move_to_dead_letter(id, "boom")

    def labels(name: str, **page: int) -> list[str]:
        arguments = SURFACE[name].arguments(NOWHERE)
        del arguments["limit"], arguments["offset"]
        key = {"workflows.list_errors": "message", "state.list_executions": "execution_id"}
        found = invoke(store, name, arguments | page)
        return found if name == "events.list_executions" else [getattr(one, key.get(name, "id")) for one in found]  # fmt: skip

    for name in [name for name, row in SURFACE.items() if "offset" in row.signature]:
        whole = upwards[::-1] if name in NEWEST_FIRST else upwards
        if name == "workflows.list_errors":
            whole = ODD_ORDER[::-1]
        assert (name, labels(name), labels(name, offset=-5)) == (name, whole, whole)
        for limit, offset in itertools.product(LIMITS_OF_LISTS, [0, 1, 3, MAX_INT]):
            found = labels(name, limit=limit, offset=offset)
            assert (name, limit, offset, found) == (name, limit, offset, whole[offset:][: max(0, limit)])  # fmt: skip
    trail = [flows.append_event("B", "k", {}) for _ in range(3)]
    log = store.events.read_all()
    for limit in LIMITS_OF_LISTS:
        some = max(0, limit)
        assert flows.list_events("B", limit) == trail[::-1][:some]
        assert store.events.read_all(0, limit) == log[:some]
        assert store.events.load_last_events("B", limit) == log[:1][:some]
    tokens = [state.create_token("n", "r")[1].id for _ in range(9)]
    assert ids(flows.list_steps("B")) == upwards
    assert ids(state.list_tenants()) == sorted([*ODD_ORDER, "default", "tenant-a"])
    assert ids(state.list_tokens()) == sorted(tokens, reverse=True)


# By what they return or raise: the calls of the table, made of a store in which nothing is.
OF_NOTHING: list[tuple[Any, str]] = [
    (None, """flows.get flows.get_step flows.find_step_by_run_id events.find_event events.get_latest_sequence
        state.claim_work_item state.get_artifact state.get_execution state.get_queue_policy state.get_tenant
        state.get_work_item state.get_workflow state.latest_snapshot state.validate_token
        workflows.get_first_open_subscription"""),
    ([], """flows.list_by_owner flows.list_by_status flows.list_events flows.list_steps events.load_events
        events.load_events_after events.load_last_events events.list_executions events.iter_events events.tail
        events.read_all state.claim_work_items state.get_events state.get_events_since state.list_dead_letters
        state.list_executions state.list_queue_policies state.list_tokens state.list_work_items
        workflows.get_runnable_instances workflows.get_workflow_instances workflows.get_subscriptions
        workflows.get_runnable_events workflows.get_events workflows.list_errors store.check"""),
    (0, """flows.prune_terminal_flows events.count_events state.latest_sequence state.prune_snapshots
        workflows.purge_workflows workflows.process_commands runs.work"""),
    (False, "events.execution_exists"),
    ("nothing", "state.get_effect"),
    (("none", 0), "state.replay"),
    (ReclaimResult(), "state.reclaim_expired_leases"),
    (NotFound("flow", "f"),
        "flows.update_with_revision flows.append_event flows.update_and_append flows.insert_step"),
    (NotFound("flow step", "s"), "flows.update_step"),
    (NotFound("execution", "ea"), """state.append_event state.enqueue_work_item state.enqueue_work_items
        state.patch_append_array state.record_effect state.timeline state.update_execution_current_state
        state.update_execution_status state.write_snapshot"""),
    (NotFound("execution", "done"), "runs.result runs.fork"),
    (NotFound("execution", "due"), "runs.cancel"),
    (NotFound("work item", "claimed-a"), """state.commit_turn state.complete_work_items state.hold
        state.park_work_item state.renew_lease state.retry_work_item"""),
    (NotFound("work item", "pending-a"),
        "state.complete_work_item state.fail_work_item state.move_to_dead_letter"),
    (NotFound("dead letter", "dead-a"), "state.requeue_dead_letter"),
    (NotFound("token", "t"), "state.revoke_token"),
    (NotFound("tenant", "tenant-a"), "state.store_workflow state.update_tenant"),
    (NotFound("workflow", "w"), """workflows.persist_workflow workflows.persist_workflow_with_subscriptions
        workflows.get_workflow_instance workflows.get_workflow_instance_by_name workflows.delete_workflow"""),
    (NotFound("subscription", "sub"),
        "workflows.get_subscription workflows.terminate_subscription workflows.set_subscription_token"),
    (NotFound("subscription", "taken"), "workflows.clear_subscription_token"),
    (NotFound("event", "new"), "workflows.get_event workflows.mark_event_processed"),
    (NotFound("event", "done"), "workflows.mark_event_unprocessed"),
]  # fmt: skip


NOWHERE = Things(claimed=record("WorkItem", id="claimed-a", execution_id="ea", lease_fence=1), token="t",
                 token_id="t", artifact="0" * 64)  # fmt: skip


def test_a_call_that_finds_nothing_says_so_and_writes_nothing(store: Store) -> None:
    before = dump(store)
    for nothing, names in OF_NOTHING:
        expected = ("", plain(nothing))
        if isinstance(nothing, NotFound):
            expected = "NotFound", nothing.args
        for name in names.split():
            assert repr((name, *outcome(store, name, NOWHERE))) == repr((name, *expected))
        assert dump(store) == before, names


class NotATime(datetime):
    """As pandas.NaT: a datetime that cannot say when."""

    def utcoffset(self) -> Any:
        raise ValueError("no time has this method")

    __sub__ = utcoffset  # type: ignore[assignment]


def broken_item(field: str) -> Any:
    item = WorkItem(execution_id="e1", queue_type="q")
    return [made for name, made in broken(item) if name == field][-1]


NAMED_IN_MESSAGES: dict[str, Callable[[Store], Any]] = {
    "payload.items[3].when: datetime is not": lambda s: enqueue(
        s, payload={"items": [1, 2, 3, {"when": A_TIME}]}
    ),
    "event.a[0].b: set is not": lambda s: s.events.append(
        "e", "default", {"type": "t", "a": [{"b": {1}}]}
    ),
    "state[0]": lambda s: s.state.update_execution_current_state("e1", [float("nan")]),
    "events[1].x": lambda s: s.events.append_batch(
        "e", "default", [EVENT, {"type": "t", "x": b""}]
    ),
    "initial_input": lambda s: create(s, "e2", initial_input={"a": NOT_UTF8}),
    # Values whose own code raises:
    "available_at": lambda s: enqueue(s, available_at=NotATime(2030, 1, 1)),
    "available_at: ": lambda s: enqueue(s, available_at=NotATime(2030, 1, 1, tzinfo=UTC)),
    "created_at": lambda s: enqueue(s, created_at=datetime(2030, 1, 1, tzinfo=RudeZone())),
    "delay": lambda s: s.state.retry_work_item("held", delay=rude(float)("nan")),
    "payload.a[0]": lambda s: enqueue(s, payload={"a": [rude(dict)(b=1)]}),
    "payload.a.b": lambda s: enqueue(s, payload={"a": {"b": rude(list)([1])}}),
    "event.x": lambda s: s.events.append("e1", "default", {"type": "t", "x": rude(tuple)([1])}),
    "event: ": lambda s: s.events.append("e1", "default", rude(dict)(type="t")),
    "events[1]": lambda s: s.events.append_batch("e1", "default", [EVENT, rude(dict)(type="t")]),
    "events: ": lambda s: s.events.append_batch("e1", "default", rude(list)([EVENT])),
    "event_id": lambda s: s.events.append(
        "e1", "default", EVENT, event_id=object.__new__(uuid.UUID)
    ),
    "item: ": lambda s: s.state.enqueue_work_item(broken_item("payload")),
    "item_id": lambda s: s.state.complete_work_item(broken_item("lease_fence")),
    "queue_types": lambda s: s.state.claim_work_item("w", rude(list)(["q"])),
    "queue_types[0]": lambda s: s.state.claim_work_item("w", [proxy(str)]),
    "state": lambda s: s.state.update_execution_current_state("e1", proxy(dict)),
    "id": lambda s: s.flows.get(proxy(None, list)),
    "ids": lambda s: s.workflows.get_workflow_instances(rude(tuple)(["w"])),
    "older_than": lambda s: s.prune(NotATime(2030, 1, 1, tzinfo=UTC)),
    "path": lambda s: s.backup(RudePath()),
}


def test_the_message_names_the_argument_and_the_path_in_it(furnished: Store) -> None:
    before = dump(furnished)
    for argument, call in NAMED_IN_MESSAGES.items():
        refusal = raises(InvalidData, partial(call, furnished))
        assert str(refusal).startswith(argument)
        assert dump(furnished) == before, argument


def test_parameters_and_rows_whose_own_code_raises_are_invalid_data(sqlite_store: Store) -> None:
    insert, own = "INSERT INTO own VALUES (?)", rude(object, __conform__=fails)()
    with sqlite_store.transaction() as tx:
        tx.execute("CREATE TABLE own (value)")
        for parameters in (rude(list)([1]), rude(tuple)([1]), rude(dict)(a=1), [own], {"a": own}):
            with pytest.raises(InvalidData, match="parameters: "):
                tx.execute(
                    insert.replace("?", ":a") if isinstance(parameters, dict) else insert,
                    parameters,
                )
        for rows in (map(fails, [1]), rude(list)([[1]]), [[1], rude(list)([1])]):
            with pytest.raises(InvalidData, match="rows: "):
                tx.executemany(insert, rows)
        with pytest.raises(InvalidData, match="parameters: "):
            tx.executemany(insert, [[1], [own]])
        assert tx.execute("SELECT * FROM own") == []


def test_values_of_types_of_their_own_are_stored_as_what_they_hold(store: Store) -> None:
    text, whole, part = rude(str)("own"), rude(int)(5), rude(float)(1.5)
    payload = {"text": text, rude(str, __hash__=str.__hash__)("key"): [whole, part]}
    item = look(
        store, enqueue(store, id=rude(str)("i"), node_id=text, attempt=whole, payload=payload)
    )
    assert (item.id, item.node_id, item.attempt) == ("i", "own", 5)
    assert item.payload == {"text": "own", "key": [5, 1.5]}
    made = store.state.put_artifact(rude(bytes)(b"own"))
    assert store.state.get_artifact(made.hash) == b"own"
    assert store.state.claim_work_item("w", ["q"], lease_seconds=part) is not None
    assert store.prune(rude(timedelta)(1))["executions"] == 0
    store.state.update_execution_status("e1", rude(str)("running"))
    assert execution(store).status is ExecutionStatus.RUNNING


@parametrize("struck", [KeyboardInterrupt, SystemExit, RecursionError, MemoryError])
def test_what_is_no_error_of_a_value_passes_through_it(
    furnished: Store, struck: type[BaseException]
) -> None:
    def strike(*_: object) -> NoReturn:
        raise struck

    before = dump(furnished)
    values: list[Any] = [rude(dict, items=strike)(a=1), rude(list, __iter__=strike)([1])]
    for value in values:
        with pytest.raises(struck):
            enqueue(furnished, payload={"a": value})
    zone = type("Zone", (RudeZone,), {"utcoffset": strike})()
    with pytest.raises(struck):
        enqueue(furnished, available_at=datetime(2030, 1, 1, tzinfo=zone))
    assert dump(furnished) == before
    assert enqueue(furnished)


class Strike:
    """Raises at the nth line of the chapter Rows that a call runs, as a signal handler may."""

    def __init__(self, line: int) -> None:
        self.left = line
        chapter = inspect.getsource(flowstore).partition("\n# Rows: ")
        self.first = chapter[0].count("\n")
        self.last = self.first + chapter[2].partition("\n# Connections: ")[0].count("\n")

    def __call__(self, frame: FrameType, what: str, _arg: object) -> Any:
        inside = frame.f_code.co_filename == flowstore.__file__
        if what == "line" and inside and self.first < frame.f_lineno < self.last:
            self.left -= 1
            if self.left == 0:
                raise TimeoutError
        return self

    def strikes(self, call: Call) -> bool:
        """Whether the call raised what was raised in it."""
        usual = sys.gettrace()
        sys.settrace(self)
        try:
            call()
        except TimeoutError:
            return True
        finally:
            sys.settrace(usual)
        return False


def test_what_a_signal_handler_raises_while_plain_values_are_read_is_not_taken_for_theirs() -> None:
    item = WorkItem(execution_id="e1", queue_type="q", payload={"a": [1, "é"]}, available_at=START)
    with flowstore.open(":memory:") as store:
        create(store)
        calls: list[Call] = [
            lambda: store.state.enqueue_work_item(replace(item, id=flowstore.new_id())),
            lambda: store.events.append("e1", "default", {"type": "t", "a": [{}]}),
            lambda: store.state.update_tenant(Tenant(id="default", limits=TenantLimits())),
            lambda: store.workflows.create_event(Event(event_name="n", event_key="k")),
        ]
        for call in calls:
            call()
            line = next(line for line in itertools.count(1) if not Strike(line).strikes(call))
            assert line > 9


@parametrize("number", [0, 1, 2**31 - 1])
def test_attempts_fit_31_bits(store: Store, number: int) -> None:
    item = look(store, enqueue(store, attempt=number, max_attempts=number))
    assert (item.attempt, item.max_attempts) == (number, number)


def test_each_method_shows_the_contracts_signature_and_a_docstring() -> None:
    empty = inspect.Signature.empty
    for name, row in SURFACE.items():
        shown = public_signature(name)
        plain = [parameter.replace(annotation=empty) for parameter in shown.parameters.values()]
        shown = shown.replace(parameters=plain, return_annotation=empty)
        assert f"{name}{shown}" == f"{name}({row.signature})"
        facet, method = name.split(".")
        assert inspect.getdoc(getattr(CLASSES[facet], method)), name


def test_the_hints_of_all_public_classes_and_functions_can_be_read() -> None:
    for name in flowstore.__all__:
        public = getattr(flowstore, name)
        if inspect.isclass(public) or inspect.isfunction(public):
            typing.get_type_hints(public)
    assert typing.get_type_hints(flowstore.open)["return"] is Store
    for name in SURFACE:
        facet, method = name.split(".")
        hints = typing.get_type_hints(getattr(CLASSES[facet], method))
        signature = public_signature(name)
        assert hints.keys() - {"return"} <= signature.parameters.keys()
    assert typing.get_type_hints(StateBackend.claim_work_item)["return"] == WorkItem | None


def test_every_public_method_has_a_row_in_the_table() -> None:
    there = {
        f"{facet}.{name}"
        for facet, kind in CLASSES.items()
        for name in dir(kind)
        if not name.startswith("_") and callable(getattr(kind, name))
    }
    assert there - {f"view.{name}" for name in dir(dict)} == set(SURFACE)


# ==================================================================================================
# Connections: opening, reading only, closing, the guards
# ==================================================================================================


@parametrize(
    ("target", "name"),
    [
        ("app.db", "app.db"),
        (Path("app.db"), "app.db"),
        ("{here}/app.db", "app.db"),
        ("sqlite:app.db", "app.db"),
        ("sqlite://app.db", "app.db"),
        ("sqlite://{here}/app.db", "app.db"),
        ("sqlite:///{here}/app.db", "app.db"),
        ("sqlite:a%20b.db", "a b.db"),
        ("a b#%20?.db", "a b#%20?.db"),
    ],
)
def test_sqlite_targets_name_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str | Path, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with flowstore.open(
        target.format(here=tmp_path) if isinstance(target, str) else target
    ) as store:
        write(store, "e1")
        assert (tmp_path / name).is_file()
    with flowstore.open(tmp_path / name) as store:
        assert store.events.count_events("e1") == 1


@parametrize("target", [":memory:", "sqlite::memory:"])
def test_sqlite_memory_is_private_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with flowstore.open(target) as store, flowstore.open(target) as other:
        write(store, "e1")
        assert not other.events.execution_exists("e1")
    assert list(tmp_path.iterdir()) == []


@parametrize(
    ("error", "target"),
    [
        (InvalidData, "sqlite:app.db?mode=ro"),
        (InvalidData, "sqlite:///{here}/app.db?cache=shared"),
        *(
            (InvalidData, target)
            for target in (None, 5, b"app.db", "a\0b", RudePath(), RudePath(5))
        ),
        (StorageError, "mysql://host/db"),
        (StorageError, "https://example.org/app.db"),
        *((StorageError, target) for target in ("no/folder/app.db", "sqlite:///no/app.db", ".")),
    ],
)
def test_a_target_that_cannot_be_opened_is_refused_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[FlowStoreError], target: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    target = target.format(here=tmp_path) if isinstance(target, str) else target
    refusal = raises(error, lambda: flowstore.open(target))
    assert error is StorageError or "target" in str(refusal)
    assert list(tmp_path.iterdir()) == []


@parametrize(
    "options",
    [
        {"synchronous": "EXTRA"},
        {"synchronous": ""},
        {"synchronous": 2},
        {"synchronous": None},
        {"busy_timeout": float("nan")},
        {"busy_timeout": "30"},
        {"lease_seconds": float("inf")},
        {"lease_seconds": "30"},
        {"lease_seconds": 1e300},
        {"clock": 5},
        {"backoff": "2"},
    ],
    ids=str,
)
def test_bad_options_are_invalid_and_create_nothing(path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidData, match=next(iter(options))):
        flowstore.open(path, **options)
    assert not path.exists()


@parametrize("word", ["FULL", "full", "Normal", "OFF"])
def test_synchronous_is_taken_in_any_case(make_store: MakeStore, word: str) -> None:
    assert make_store(synchronous=word).events.append("e1", "default", EVENT) == 1


def test_options_are_keyword_only(path: Path) -> None:
    with pytest.raises(TypeError):
        flowstore.open(path, "FULL")  # type: ignore[call-arg]


@parametrize(
    "damage",
    [
        lambda good: b"this is no database\n",
        lambda good: random.Random(1).randbytes(20_000),
        lambda good: good[:100] + b"\xff" * (len(good) - 100),
        lambda good: good[:700],
    ],
    ids=["text", "noise", "header-only", "truncated"],
)
def test_sqlite_refuses_what_is_no_database_and_leaves_it(
    path: Path, damage: Callable[[bytes], bytes]
) -> None:
    flowstore.open(path).close()
    path.write_bytes(damage(path.read_bytes()))
    before = listing(path.parent)
    assert str(path) in str(raises(StorageError, lambda: flowstore.open(path)))
    assert listing(path.parent) == before


@parametrize("name", ["flowstore_meta", "flows", "Events", "execution_errors", "Flows_by_owner"])
def test_sqlite_refuses_a_file_whose_own_names_clash(path: Path, name: str) -> None:
    connection = sqlite3.connect(path)
    connection.executescript("CREATE TABLE mine(kept TEXT); INSERT INTO mine VALUES ('kept')")
    connection.execute(
        f"CREATE INDEX {name} ON mine(kept)"
        if "_by_" in name
        else f"CREATE TABLE {name}(mine TEXT)"
    )
    connection.close()
    before = path.read_bytes()
    assert name.lower() in str(raises(SchemaError, lambda: flowstore.open(path)))
    assert path.read_bytes() == before


@parametrize("dropped", ["TABLE flowstore_effects", "INDEX flowstore_pending"])
def test_a_store_without_one_of_its_tables_or_indexes_is_refused(path: Path, dropped: str) -> None:
    flowstore.open(path).close()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"DROP {dropped}")
    assert "missing" in str(raises(SchemaError, lambda: flowstore.open(path)))


def test_sqlite_lives_beside_the_users_own_tables(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.executescript(
        "CREATE TABLE orders(id INTEGER PRIMARY KEY); INSERT INTO orders VALUES (7)"
    )
    connection.close()
    with flowstore.open(path) as store, store.transaction() as tx:
        assert tx.execute("SELECT id FROM orders") == [(7,)]


# --- read-only ---


def test_a_read_only_store_refuses_every_write_and_answers_every_read(
    path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(path.parent)
    with flowstore.open(path, clock=clock, lease_seconds=10) as store:
        things = stock(store)
    clock.advance(20)
    before = path.read_bytes()
    with flowstore.open(path, clock=clock, read_only=True) as store:
        assert store.read_only is True
        for name in SURFACE.keys() - {"store.close"}:
            shutil.copy(path, "copy.db")
            with flowstore.open("copy.db", clock=clock, synchronous="OFF") as writable:
                was = dump(writable)
                expected = outcome(writable, name, things)
                assert expected[0] == "", name
                writes = dump(writable) != was or name == "store.compact"
            answers = [outcome(store, name, things)]
            if name not in ("store.check", "store.backup", "events.tail"):
                with store.transaction():
                    answers.append(outcome(store, name, things))
            for answer in answers:
                assert answer[0] == "StorageError" if writes else answer == expected, name
    assert path.read_bytes() == before


@parametrize("at", ["file", "memory"])
def test_a_read_only_store_refuses_the_users_own_writes(at_rest: Path, at: str) -> None:
    before = at_rest.read_bytes()
    target = at_rest if at == "file" else ":memory:"
    with flowstore.open(target, read_only=True) as store, store.transaction() as tx:
        assert tx.execute("SELECT 1 + 1") == [(2,)]
        raises(
            StorageError,
            lambda: tx.execute("CREATE TABLE mine(id INTEGER)"),
            lambda: tx.execute("DELETE FROM flows"),
            lambda: tx.executemany("DELETE FROM flows WHERE id = ?", [("f",)]),
        )
        assert tx.execute("SELECT id FROM flowstore_tenants") == [("default",)]
    assert at_rest.read_bytes() == before


def test_a_missing_or_empty_file_cannot_be_read(path: Path) -> None:
    raises(StorageError, lambda: flowstore.open(path, read_only=True))
    assert listing(path.parent) == {}
    path.touch()
    raises(StorageError, lambda: flowstore.open(path, read_only=True))
    assert listing(path.parent) == {path.name: b""}
    with flowstore.open(path) as store:  # to write, it counts as a new one
        assert write(store, "e1") == 1


def test_a_read_only_transaction_is_one_snapshot(path: Path, file_store: Store) -> None:
    write(file_store, "e1")
    with flowstore.open(path, read_only=True) as reader:
        with reader.transaction():
            assert reader.events.count_events("e1") == 1
            write(file_store, "e1")
            assert reader.events.count_events("e1") == 1
            assert len(reader.events.read_all()) == 1
        assert reader.events.count_events("e1") == 2


def test_sqlite_reads_what_a_crash_left_without_a_checkpoint(crashed: Path) -> None:
    before = listing(crashed.parent)
    with flowstore.open(crashed, read_only=True) as store:
        assert store.events.count_events("e1") == 20
    after = listing(crashed.parent)
    assert {name: after[name] for name in before} == before


@forking
@parametrize("wal", [True, False], ids=["crashed", "at rest"])
def test_sqlite_reads_in_a_folder_that_cannot_be_written(crashed: Path, wal: bool) -> None:
    if not wal:
        flowstore.open(crashed).close()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for found in crashed.parent.iterdir():
            (folder / found.name).write_bytes(found.read_bytes())
        before = listing(folder)

        def read() -> int:
            assert not os.access(folder, os.W_OK)
            with flowstore.open(folder / "app.db", read_only=True) as store:
                return store.events.count_events("e1")

        folder.chmod(0o555)
        try:
            if wal:  # it has to be written into the file first
                with pytest.raises(StorageError, match="open it once where it may be written"):
                    as_nobody(read)
            else:
                assert as_nobody(read) == 20
            assert listing(folder) == before
        finally:
            folder.chmod(0o755)


@forking
def test_sqlite_a_reader_who_may_not_write_the_file_leaves_nothing_that_shuts_its_owner_out() -> (
    None
):
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "app.db"
        write_to(path)
        path.chmod(0o444)
        os.chmod(name, 0o777)

        def read() -> tuple[int, list[str]]:
            with flowstore.open(path, read_only=True) as store:
                return store.events.count_events("e1"), os.listdir(name)

        assert as_nobody(read) == (1, ["app.db"])
        assert os.listdir(name) == ["app.db"]


READER = """
flowstore.open(sys.argv[1], read_only=True).close()  # all that it imports, before its rights to do so are gone
if os.geteuid() == 0:
    os.setuid(65534)
with flowstore.open(sys.argv[1], read_only=True) as store, os.fdopen(int(sys.argv[2])) as asked:
    for _ in asked:
        print(store.events.count_events("e1"), len(store.events.read_all(limit=10**6)), flush=True)
"""


@forking
def test_sqlite_a_reader_in_a_folder_that_it_cannot_write_follows_whoever_writes_later() -> None:
    with tempfile.TemporaryDirectory() as name:
        path, (asked, ask) = Path(name) / "app.db", os.pipe()
        with flowstore.open(path) as store:
            store.events.append_batch("e1", "default", [EVENT] * 500)
            create(store, "done", status="completed")
            store.events.append_batch("done", "default", [EVENT | {"text": "x" * 900}] * 2000)
        os.chmod(name, 0o555)
        os.set_inheritable(asked, True)
        reader = script(READER, path, asked, pass_fds=(asked,))
        os.close(asked)

        def seen() -> list[int]:
            os.write(ask, b"\n")
            assert reader.stdout is not None
            line = reader.stdout.readline()
            assert line, reader.communicate()[1]
            return [int(number) for number in line.split()]

        assert seen() == [500, 2500]
        os.chmod(name, 0o777)
        with flowstore.open(path) as store:
            write(store, "e1")
            for left in Path(name).iterdir():
                left.chmod(0o666)
            os.chmod(name, 0o555)
            assert seen() == [501, 2501]
            store.prune(timedelta(0))
            store.compact()
            store.events.append_batch("e1", "default", [EVENT | {"text": "y" * 1500}] * 1500)
            assert seen() == [2001, 2001]
            os.chmod(name, 0o777)
        os.chmod(name, 0o555)
        assert seen() == [2001, 2001]
        os.chmod(name, 0o777)
        write_to(path)
        assert seen() == [2002, 2002]
        os.close(ask)
        finished(reader)


def test_sqlite_a_log_that_goes_while_a_reader_looks_for_it_is_none(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flowstore.open(path).close()
    monkeypatch.setattr(os, "access", lambda *asked, **options: False)
    seen = os.path.exists
    monkeypatch.setattr(
        os.path, "exists", lambda name: str(name).endswith("-wal") or seen(name)
    )  # a moment ago
    with flowstore.open(path, read_only=True) as store:
        assert store.events.list_executions() == []


@pytest.fixture
def unwritable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever only reads cannot write the folder, and so cannot lock the file."""
    monkeypatch.setattr(flowstore, "_can_lock", lambda path: False)


def rename_flow(path: Path, goal: str) -> None:
    """What an owner of the file does to its one flow, before it closes the file."""
    with closing(sqlite3.connect(path, isolation_level=None)) as owner:
        owner.execute("UPDATE flows SET goal = ?", (goal,))
    os.utime(path, (0, path.stat().st_mtime + 1))  # the clock of a file system is coarse


def before_each(store: Store, method: str, act: Call, most: int) -> list[int]:
    """Acts before each call of the engine's method, so often at most; returns a list that counts the calls."""
    calls: list[int] = []
    called = getattr(store._engine, method)

    def call(*arguments: Any) -> Any:
        calls.append(len(calls))
        if len(calls) <= most:
            act()
        return called(*arguments)

    setattr(store._engine, method, call)
    return calls


@pytest.mark.usefixtures("unwritable")
def test_sqlite_a_read_under_its_owners_locks_is_made_once_however_often_the_file_is_written(
    file_store: Store, path: Path
) -> None:
    flow = file_store.flows.insert(Flow())
    with flowstore.open(path, read_only=True) as reader:
        calls = before_each(reader, "run_on", lambda: write(file_store, "run"), 5)
        assert reader.flows.get(flow.id) == flow
        assert len(calls) == 1


@pytest.mark.usefixtures("unwritable")
def test_sqlite_a_read_without_locks_gives_up_when_the_file_is_written_for_busy_timeout(
    at_rest: Path,
) -> None:
    times = itertools.count(10**9)

    def touch() -> None:
        os.utime(at_rest, (0, next(times)))

    with flowstore.open(at_rest, read_only=True, busy_timeout=0.05) as reader:
        calls = before_each(reader, "run_on", touch, 10**4)
        with pytest.raises(StoreBusy):
            reader.flows.get("f")
        assert 1 < len(calls) < 10**4


@pytest.mark.usefixtures("unwritable")
def test_sqlite_a_block_without_locks_ends_when_the_file_is_written(path: Path) -> None:
    with flowstore.open(path) as store:
        store.flows.insert(Flow(id="f", goal="old"))
    with flowstore.open(path, read_only=True) as reader:
        reads: list[Callable[[flowstore.Transaction], object]] = [
            lambda tx: tx.execute("SELECT goal FROM flows"),
            lambda tx: reader.flows.get("f"),
        ]
        for read in reads:
            with pytest.raises(StoreBusy, match="was written"), reader.transaction() as tx:
                read(tx)
                rename_flow(path, "new")
                read(tx)
            with reader.transaction(read_only=True) as tx:
                read(tx)
                assert tx.execute("SELECT goal FROM flows") == [("new",)]


@pytest.mark.usefixtures("unwritable")
def test_sqlite_a_backup_and_a_check_without_locks_begin_again_when_the_file_is_written(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with flowstore.open(path) as store:
        store.flows.insert(Flow(id="f", goal="old"))
    with flowstore.open(path, read_only=True) as reader:
        # Its snapshot begins before the file is written, as far as it can tell.
        calls = before_each(reader, "begin_pooled", lambda: rename_flow(path, "new"), 1)
        reader.backup(tmp_path / "copy.db")
        assert len(calls) == 2
        problems = flowstore._problems
        checks: list[object] = []

        def check(tx: Any) -> list[str]:
            checks.append(tx)
            if len(checks) == 1:
                rename_flow(path, "newer")
                return ["torn"]
            return problems(tx)

        monkeypatch.setattr(flowstore, "_problems", check)
        assert reader.check() == []
    monkeypatch.undo()
    with flowstore.open(tmp_path / "copy.db") as copy:
        assert copy.check() == [] and execute(copy, "SELECT goal FROM flows") == [("new",)]


def test_sqlite_a_file_named_by_a_link_has_its_log_beside_itself(path: Path) -> None:
    (path.parent / "links").mkdir()
    link = path.parent / "links" / "app.db"
    try:
        link.symlink_to(path)
    except OSError:
        pytest.skip("links")
    with flowstore.open(link) as store:
        write(store, "e1")
        assert store.stats()["wal_bytes"] > 0
        assert store.target == str(link)
        assert sorted(os.listdir(link.parent)) == ["app.db"]
        with flowstore.open(path) as other:
            assert write(other, "e1") == 2


# --- files with two names ---


def refused_to_write(path: Path, says: str) -> None:
    """Opening is refused for writing, with nothing changed and no file left, and allowed for reading."""
    before = listing(path.parent)
    refusal = raises(StorageError, lambda: flowstore.open(path))
    assert says in str(refusal) and str(path) in str(refusal)
    assert type(refusal) is StorageError and listing(path.parent) == before
    with flowstore.open(path, read_only=True) as store:
        assert store.events.count_events("e1") == 1


def test_a_file_with_a_second_hard_link_is_refused_for_writing_under_both_names(
    path: Path,
) -> None:
    write_to(path)
    other = path.parent / "elsewhere" / "app.db"
    other.parent.mkdir()
    os.link(path, other)
    refused_to_write(path, "hard link")
    refused_to_write(other, "hard link")
    other.unlink()
    with flowstore.open(path) as store:
        assert write(store, "e1") == 2


def test_what_a_process_killed_while_it_made_the_file_has_left_is_removed(path: Path) -> None:
    path.touch()
    for ending in ("new", "partial"):  # a backup becomes a file in the same way
        os.link(path, path.with_name(f"app.db.{flowstore.new_id()}.{ending}"))
    foreign = path.with_name(f"app.db.{flowstore.new_id()}.new")
    foreign.touch()  # another file: somebody may be making it
    write_to(path)
    assert sorted(os.listdir(path.parent)) == sorted(["app.db", foreign.name])
    mine = path.with_name("app.db.old.new")
    os.link(path, mine)  # no name of ours
    refused_to_write(path, "hard link")
    assert mine.exists()


def test_a_second_name_that_goes_in_a_moment_is_waited_for(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flowstore.open(path).close()
    other = path.with_name("other")
    os.link(path, other)
    looks = itertools.count(1)
    look = os.scandir

    def looked(folder: str) -> Any:
        if next(looks) == 3:
            other.unlink()
        return look(folder)

    monkeypatch.setattr(os, "scandir", looked)
    with flowstore.open(path) as store:
        assert write(store, "e1") == 1


@parametrize("device", ["the same", "another"])
def test_a_file_that_is_mounted_alone_into_another_folder_is_refused_for_writing(
    tmp_path: Path, device: str
) -> None:
    disk, folder = tmp_path / "disk", tmp_path / "a folder\\of #1"
    disk.mkdir()
    folder.mkdir()
    path = folder / "app db"
    path.touch()
    with ExitStack() as stack:
        if device == "another":
            stack.enter_context(mounted(disk, "-t", "tmpfs", "tmpfs"))
        write_to(disk / "app.db")
        with mounted(path, "--bind", disk / "app.db"):
            refused_to_write(path, "mounted")
            with flowstore.open(disk / "app.db") as store:
                assert write(store, "e1") == 2


@parametrize("links", [True, False], ids=["links", "no links"])
@forking
def test_the_umask_alone_decides_who_may_read_a_new_file(
    path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    if not links:

        def no_link(*names: str) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", no_link)

    def made() -> list[str]:
        os.umask(0o027)
        with flowstore.open(path) as store:
            write(store, "e1")
            return [oct(found.stat().st_mode & 0o777) for found in path.parent.iterdir()]

    assert in_fork(made) == ["0o640"] * 3
    assert os.listdir(path.parent) == ["app.db"]


MAKER = """
import threading
path, links = sys.argv[1], sys.argv[2] == "links"
real_close, real_link = os.close, os.link
made, goes_on = threading.Event(), threading.Event()

def close(descriptor):
    # Only of the thread that makes the file: it goes on when the other one has written to it.
    if threading.current_thread().name == "first" and not made.is_set():
        made.set()
        goes_on.wait(30)
    real_close(descriptor)

def link(*names):
    if not links:
        raise PermissionError(1, "Operation not permitted")
    real_link(*names)

os.close, os.link = close, link
stores = []
first = threading.Thread(target=lambda: stores.append(flowstore.open(path)), name="first")
first.start()
made.wait(1 if not links else 30)
store = flowstore.open(path)
store.events.append("ours", "default", {"type": "custom", "key": ""})
goes_on.set()
first.join()
print(store.events.append("ours", "default", {"type": "custom", "key": ""}), flush=True)
sys.stdin.read()
for number in range(3):
    store.events.append("ours", "default", {"type": "custom", "key": ""})
print(store.events.count_events("ours"), flush=True)
os._exit(0)  # a crash
"""


@parametrize("links", ["links", "no links"])
def test_threads_that_make_a_new_file_at_once_keep_each_others_locks(
    path: Path, links: str
) -> None:
    with script(MAKER, path, links) as process:
        assert line_of(process) == "2"
        # Another process that comes and goes would take itself for the last, and delete the log in use.
        other_process(path, range(5))
        assert Path(f"{path}-wal").exists()
        assert process.communicate(timeout=60)[0] == "5\n"
    check_touched(path, 5, 5)
    assert os.listdir(path.parent) == ["app.db"]


@parametrize("read_only", [False, True])
def test_a_path_that_sqlite_cannot_open_is_refused_with_the_limit_and_no_file_left(
    tmp_path: Path, read_only: bool
) -> None:
    longest, too_long = path_of(tmp_path, 504), path_of(tmp_path, 505)
    with flowstore.open(longest) as store:
        assert write(store, "e1") == 1
        before = sorted(os.listdir(too_long.parent))
        refusal = raises(StorageError, lambda: flowstore.open(too_long, read_only=read_only))
        assert "504" in str(refusal) and sorted(os.listdir(too_long.parent)) == before
    with flowstore.open(longest, read_only=True) as store:
        assert store.events.count_events("e1") == 1


def test_a_name_beside_which_sqlite_could_make_no_file_is_refused_with_no_file_left(
    tmp_path: Path,
) -> None:
    for name in map("n".__mul__, (248, 251, 255, 300)):
        refusal = raises(StorageError, partial(flowstore.open, tmp_path / name))
        assert re.search("(247|251) at most", str(refusal)) and os.listdir(tmp_path) == []
    with flowstore.open(tmp_path / ("é" * 123 + "n")) as store:  # 247 bytes
        assert write(store, "e1") == 1
    renamed = tmp_path / ("n" * 251)  # it has all its files already, or needs none but its log
    (tmp_path / ("é" * 123 + "n")).rename(renamed)
    with flowstore.open(renamed) as store:
        assert write(store, "e1") == 2


@forking
def test_what_may_not_be_opened_is_refused_with_the_cause() -> None:
    def says(call: Callable[..., Any], *target: Path, **options: Any) -> str:
        refusal = raises(StorageError, partial(call, *target, **options))
        assert type(refusal) is StorageError
        return str(refusal)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        for unreadable in (folder / "file.db", folder / "shut" / "app.db"):
            unreadable.parent.mkdir(exist_ok=True)
            flowstore.open(unreadable).close()
        (folder / "file.db").chmod(0)
        (folder / "shut").chmod(0o600)

        def tried() -> list[str]:
            with flowstore.open(":memory:") as store:
                return [
                    says(flowstore.open, folder / "file.db", read_only=True),
                    says(flowstore.open, folder / "file.db"),
                    says(flowstore.open, folder / "shut" / "app.db", read_only=True),
                    says(flowstore.open, folder / "shut" / "app.db"),
                    says(flowstore.open, folder / "new.db"),
                    says(store.backup, folder / "copy.db"),
                ]

        said = as_nobody(tried)
        assert said[0].endswith(f"there is no permission to read {folder / 'file.db'}")
        assert said[1].endswith(f"there is no permission to read and write {folder / 'file.db'}")
        for one in said[2:4]:
            assert re.search("folder cannot be searched.*denied", one)
        assert said[4].endswith("the file cannot be made: Permission denied")
        assert said[5].endswith(f"there is no permission to read and write {folder}")
        assert sorted(os.listdir(folder)) == ["file.db", "shut"]
        (folder / "shut").chmod(0o700)


@forking
def test_a_store_whose_file_might_not_be_written_for_a_while_writes_again() -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "app.db"
        os.chmod(name, 0o777)

        def tried() -> list[int]:
            with flowstore.open(path) as store:
                first = write(store, "e1")
                in_fork(int)  # a fork closes the connections
                path.chmod(0o444)
                with pytest.raises(StorageError, match="permission"):
                    write(store, "e1")
                path.chmod(0o666)
                return [first, write(store, "e1")]

        assert as_nobody(tried) == [1, 2]


STARVED = """
import resource
folder = sys.argv[1]
path, taken = folder + "/app.db", []

def starve(left):
    try:
        while True:
            taken.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        for _ in range(left):
            os.close(taken.pop())

def fed():
    while taken:
        os.close(taken.pop())

resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
store = flowstore.open(path)
wrote, refused = 0, set()
calls = {
    "read": lambda: store.events.load_events("e1"),
    "open": lambda: flowstore.open(path).close(),
    "read_only": lambda: flowstore.open(path, read_only=True).close(),
    "new": lambda: flowstore.open(folder + "/new.db").close(),
    "backup": lambda: store.backup(folder + "/copy.db"),
    "check": store.check,
}
for left in (0, 1, 2, 0):
    starve(left)
    wrote = store.events.append("e1", "default", {"type": "custom"})  # its connection is there
    for name, call in calls.items():
        try:
            call()
        except flowstore.StorageError as error:
            assert type(error) is flowstore.StorageError and "no file descriptor is left" in str(error), (name, error)
            refused.add(name)
    fed()
    assert len(store.events.load_events("e1")) == wrote
    assert sorted(os.listdir(folder)) == ["app.db", "app.db-shm", "app.db-wal"], os.listdir(folder)
print(wrote, store.check(), *sorted(refused))
flowstore.open(folder + "/new.db").close()
"""


def test_without_a_descriptor_left_calls_are_refused_with_the_cause_and_nothing_is_lost(
    path: Path,
) -> None:
    pytest.importorskip("resource", reason="this platform has no RLIMIT_NOFILE")
    out = finished(script(STARVED, path.parent))
    assert out == "4 [] backup check new open read read_only\n"
    with flowstore.open(path) as store:
        assert store.events.count_events("e1") == 4


def test_a_sound_store_checks_without_a_problem(furnished: Store) -> None:
    assert furnished.check() == []


def test_now_is_the_clocks_time_in_utc(make_store: MakeStore) -> None:
    clock = Clock(datetime(2030, 1, 1, 12, tzinfo=timezone(seconds(-5 * 3600))))
    now = make_store(clock=clock).now()
    assert now == datetime(2030, 1, 1, 17, tzinfo=UTC)
    assert now.tzinfo is UTC
    before = datetime.now(UTC)  # without a clock it is the real time
    assert before <= make_store().now() <= datetime.now(UTC)


@parametrize("bad", [datetime(2030, 1, 1), 5, None, "now"])
def test_a_clock_that_gives_no_aware_time_writes_nothing(make_store: MakeStore, bad: Any) -> None:
    clock = Clock()
    store = make_store(clock=clock)
    clock.now = bad
    with pytest.raises(InvalidData):
        write(store, "e1")
    clock.now = START
    assert not store.events.execution_exists("e1")


def test_the_target_names_what_was_opened(path: Path) -> None:
    with flowstore.open(path) as store, flowstore.open(":memory:") as memory:
        assert path.name in str(store.target)
        assert ":memory:" in str(memory.target)
        assert (store.read_only, memory.read_only) == (False, False)


# --- closing ---


def test_every_call_on_a_closed_store_raises_store_closed(store: Store) -> None:
    things = stock(store)
    store.close()
    for name in SURFACE:
        closed = name not in UNTOUCHED | {"store.close"}
        assert outcome(store, name, things)[0] == "StoreClosed" * closed, name


def test_a_with_block_closes_the_store(make_store: MakeStore) -> None:
    with make_store() as store:
        write(store, "e1")
    with pytest.raises(StoreClosed):
        store.events.count_events("e1")


@parametrize("call", [Store.close, Store.compact, Store.check, lambda s: s.backup("copy.db")])
def test_inside_ones_own_transaction_these_calls_are_refused(
    store: Store, call: Callable[[Store], Any]
) -> None:
    with store.transaction():
        write(store, "e1")
        with pytest.raises(StorageError):
            call(store)
        assert write(store, "e1") == 2
    assert store.events.count_events("e1") == 2
    assert not Path("copy.db").exists()


# --- busy ---


def test_who_waits_for_another_process_is_told_that_the_store_was_closed(path: Path) -> None:
    store = flowstore.open(path, busy_timeout=WATCHDOG)
    with Process(holding_process, path) as child:
        assert child.read() == "ready"
        child.tell()
        assert child.read() == "held"
        appending = Caller(write, store, "e1")
        until(lambda: store._engine.writer.leader is not None)
        closing_it = Caller(store.close)
        assert isinstance(appending.outcome(20), StoreClosed)
        closing_it.outcome()
        child.tell()


# ==================================================================================================
# Writer: group commit, busy waiting, interrupts, checkpoints
# ==================================================================================================


STRIKES = int(os.environ.get("FLOWSTORE_STRIKES", "2000"))


def on_both(path: str, function: str, *cases: str) -> None:
    """In a child process: one of these functions, in each case for a store in memory and for one in a file."""

    def body() -> None:
        sys.setswitchinterval(0.0005)
        gc.collect()
        gc.freeze()  # what is collected from now on is of the calls
        for number, case in enumerate(cases):
            for target in (":memory:", f"{path}{number}"):
                globals()[function](target, *case.split(","))

    leave(body)


def strike_holds_as_they_begin() -> None:
    """No thread goes on renewing a lease for a block that was never entered."""
    store = flowstore.open(":memory:")
    write(store, "run", "first")
    item: Any = None

    def begin(striker: Striker) -> None:
        signal.alarm(WATCHDOG // 2)
        held = store.state.hold(item, lease_seconds=0.03)
        if striker.run(held.__enter__):
            held.__exit__(None, None, None)
        del held  # as the statement would
        ended = f"for the thread of a hold that was struck at\n{striker.where}"
        until(lambda: len(sys._current_frames()) == 1, ended, 3)

    def body() -> None:
        nonlocal item
        do("block", store, "known")
        store.state.enqueue_work_item(WorkItem(execution_id="run", queue_type="q"))
        item = store.state.claim_work_item("w", ["q"])
        for place in some_places(begin, 10_000):
            begin(Striker(place, error=KeyboardInterrupt if place % 2 else JobTimeout))

    leave(body)


def signalled_waits(path: str, situation: str) -> None:
    def body() -> None:
        for number, kind in enumerate(("append", "read", "claim", "block", "close")):
            for target in (":memory:", f"{path}{number}"):
                in_memory = target == ":memory:"
                if situation != ("process" if in_memory else "read"):
                    signal.alarm(15)
                    signal_a_waiter(target, situation, kind)

    leave(body)


# ------------------------------------------------------------------------------------------------ appending


def test_sixteen_threads_appending_to_shared_executions_leave_gap_free_logs(store: Store) -> None:
    def work(me: int) -> None:
        for number in range(40):
            run = f"run{number % 3}"
            sequence = write(store, run, f"{me}.{number}")
            [stored, *_] = store.events.load_events_after(run, sequence - 1)
            assert stored.event["key"] == f"{me}.{number}"

    crowd(16, work)
    for run in range(3):
        found = keys(store, f"run{run}")
        for me in range(16):  # each thread's own events in the order in which it wrote them
            mine = [key for key in found if key.startswith(f"{me}.")]
            assert mine == [f"{me}.{number}" for number in range(run, 40, 3)]
        assert len(found) == 16 * len(range(run, 40, 3))


def appending_process(path: str, me: str) -> None:
    with flowstore.open(path) as store:

        def work(thread: int) -> None:
            for number in range(30):
                write(store, f"run{number % 3}", f"{me}.{thread}.{number}")

        say("ready")
        told()
        crowd(2, work)


def test_six_processes_appending_to_shared_executions_leave_gap_free_logs(path: Path) -> None:
    race(appending_process, path)
    found = [key for run in range(3) for key in in_file(path, run=f"run{run}")]
    assert sorted(found) == sorted(
        f"{me}.{t}.{n}" for me in range(6) for t in range(2) for n in range(30)
    )


def race(function: Callable[..., None], path: Path) -> None:
    """Six processes of a function, which go on when all are ready, and end well."""
    with ExitStack() as stack:
        children = [stack.enter_context(Process(function, path, me)) for me in range(6)]
        assert [child.read() for child in children] == ["ready"] * 6
        for child in children:
            child.tell()
        for child in children:
            child.finish()


def opening_process(path: str, me: str) -> None:
    say("ready")
    told()
    with flowstore.open(path) as store:
        write(store, "run", me)


def test_processes_that_open_a_new_file_at_once_all_get_a_working_store(path: Path) -> None:
    race(opening_process, path)
    assert sorted(in_file(path)) == [*"012345"]


def test_threads_that_open_a_new_file_at_once_all_get_a_working_store(path: Path) -> None:
    gate = threading.Barrier(8)

    def work(me: int) -> None:
        gate.wait(WATCHDOG)
        with flowstore.open(path) as store:
            write(store, "run", str(me))

    crowd(8, work)
    assert sorted(in_file(path)) == [*"01234567"]


# --------------------------------------------------------------------------------------------------- claims


def doomed_worker(path: str, hours: str, lease: str) -> None:
    item = claim(ahead(path, int(hours)), worker="doomed", lease_seconds=float(lease))
    say(item.id, item.lease_fence, item.attempt)
    told()


def ahead(path: str | Path, hours: int) -> Store:
    """The store as it is some hours from now, when the leases of today are over."""
    shift = dt.timedelta(hours=hours)
    return flowstore.open(
        path, clock=lambda: dt.datetime.now(dt.UTC) + shift, backoff=lambda attempt: 0.0
    )


@needs_kill
def test_the_item_of_a_killed_worker_is_handled_again_and_its_stale_fence_refused(
    path: Path,
) -> None:
    with flowstore.open(path) as store:
        made = enqueue(store)
    with Process(doomed_worker, path, 0, 600) as worker:
        item_id, fence, attempt = worker.read().split()
        assert (item_id, attempt) == (made, "0")
        worker.kill()
    with flowstore.open(path) as store:
        assert store.state.claim_work_item("early", ["q"]) is None, (
            "the lease holds until it is over"
        )
    with ahead(path, 1) as store:
        item, stale, state = claim(store, worker="next"), int(fence), store.state
        assert (item.id, item.worker_id, item.attempt) == (made, "next", 1)
        assert item.lease_fence > stale
        calls: list[Call] = [
            partial(state.complete_work_item, made, lease_fence=stale),
            partial(state.fail_work_item, made, "late", lease_fence=stale),
            partial(state.retry_work_item, made, "late", lease_fence=stale),
            partial(state.renew_lease, made, lease_fence=stale),
            partial(state.renew_lease, made, "doomed"),
        ]
        for late in calls:
            assert raises(LeaseLost, late).item_id == made
            assert look(store, made) == item
        assert store.state.complete_work_item(item).status == "completed"


@needs_kill
def test_a_waiting_worker_takes_over_when_the_lease_of_a_killed_one_ends(path: Path) -> None:
    with flowstore.open(path, backoff=lambda attempt: 0.0) as store:
        made = enqueue(store)
        with Process(doomed_worker, path, 0, 0.5) as worker:
            worker.read()
            waiter = Caller(lambda: claim(store, worker="next", wait=WATCHDOG / 2))
            worker.kill()
        item = waiter.result()
        assert (item.id, item.attempt, item.worker_id) == (made, 1, "next")


@needs_kill
def test_an_item_that_kills_every_worker_ends_as_a_dead_letter(path: Path) -> None:
    with flowstore.open(path) as store:
        made = enqueue(store, max_attempts=3)
    fences = []
    for hour in range(3):
        with Process(doomed_worker, path, hour, 600) as worker:
            item_id, fence, attempt = worker.read().split()
            assert (item_id, attempt) == (made, str(hour))
            fences.append(int(fence))
            worker.kill()
    assert fences == sorted(set(fences))
    with ahead(path, 3) as store:
        assert store.state.claim_work_item("last", ["q"]) is None
        [letter] = store.state.list_dead_letters()
        assert (letter.id, letter.attempt, letter.max_attempts) == (made, 3, 3)
        assert look(store, made).status == WorkItemStatus.DEAD_LETTERED


# -------------------------------------------------------------------------------------------- group commit


def test_operations_that_fail_in_a_group_fail_alone_and_leave_nothing(file_store: Store) -> None:
    write(file_store, "run", "known")
    file_store.state.create_execution(WorkflowExecution(workflow_id="w", execution_id="taken"))
    again = WorkflowExecution(workflow_id="w", execution_id="taken")
    append = partial(file_store.events.append, expected_sequence=9)
    append_at_8 = partial(file_store.events.append, expected_sequence=8)
    batch = partial(file_store.events.append_batch, expected_sequence=9)
    bad: list[tuple[type[Exception], Call]] = [
        (AlreadyExists, partial(file_store.state.create_execution, again)),
        (SequenceConflict, partial(append, "run", "default", event("no"))),
        (SequenceConflict, partial(append_at_8, "run", "default", event("no"))),
        # these write before they fail: the tenant and the execution must go with them
        (SequenceConflict, partial(append, "new", "late", event("no"))),
        (SequenceConflict, partial(batch, "new", "late", [event("no")] * 3)),
        (
            TenantMismatch,
            partial(file_store.events.append, "run", "other", event("no")),
        ),
        (NotFound, partial(file_store.state.append_event, "missing", event("no"))),
    ]
    good = [partial(write_pair, file_store, f"good{n % 2}", str(n)) for n in range(len(bad) + 1)]
    mixed: list[Call] = [good[0]]
    for (_, failing), working in zip(bad, good[1:], strict=True):
        mixed += [failing, working]
    results = meet(file_store, mixed)
    for (expected, _), result in zip(bad, results[1::2], strict=True):
        assert type(result) is expected, result
    conflicts = [each for each in results if isinstance(each, SequenceConflict)]
    assert [each.args for each in conflicts] == [("run", 9 - n, 1) for n in (0, 1)] + [
        ("new", 9, 0)
    ] * 2
    assert len({id(each) for each in conflicts}) == 4, "each caller has an error of its own"
    assert all(isinstance(result, int) for result in results[::2]), results
    wanted = sorted(str(n) for n in range(len(good)))
    assert sorted(pairs(file_store, "good0") + pairs(file_store, "good1")) == wanted
    assert keys(file_store, "run") == ["known"]
    assert not file_store.events.execution_exists("new")
    assert file_store.events.list_executions("late") == []


def test_a_full_disk_leaves_nothing_of_a_group_and_each_caller_an_error(file_store: Store) -> None:
    write(file_store, "run", "before")
    limit_pages(file_store, 4)

    def large(me: int) -> int:
        return file_store.events.append_batch(
            "run", "default", [event(f"{me}", text="x" * 60_000)] * 2
        )

    results = meet(file_store, [partial(large, me) for me in range(8)])
    assert [type(result) for result in results] == [flowstore.StoreFull] * 8, results
    assert len({id(result) for result in results}) == 8, "each caller has an error of its own"
    assert keys(file_store, "run") == ["before"]
    with pytest.raises(flowstore.StoreFull):
        large(9)
    limit_pages(file_store, None)
    assert large(10) == 2
    assert keys(file_store, "run") == ["before", "10", "10"]
    assert file_store.check() == []


def test_a_full_disk_keeps_what_returned_in_a_group_and_nothing_else(file_store: Store) -> None:
    write(file_store, "run", "before")
    limit_pages(file_store, 30)

    def sized(me: int) -> int:
        text = "x" * (100_000 if me == 5 else 2_000)
        return file_store.events.append_batch("run", "default", [event(str(me), text=text)] * 2)

    results = meet(file_store, [partial(sized, me) for me in range(10)])
    assert isinstance(results[5], flowstore.StoreFull)
    assert all(isinstance(result, int | flowstore.StoreFull) for result in results), results
    returned = [str(me) for me, result in enumerate(results) if isinstance(result, int)]
    assert sorted(set(keys(file_store, "run")) - {"before"}) == sorted(returned)
    limit_pages(file_store, None)
    assert isinstance(sized(5), int)
    assert file_store.check() == []


def limited_process(path: str) -> None:
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    store = flowstore.open(path)
    write(store, "run", "before")
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    limit = max(os.path.getsize(path), os.path.getsize(path + "-wal")) + 200_000
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))

    def large(me: int) -> int:
        return store.events.append("run", "default", event(str(me), text="x" * limit))

    results = meet(store, [partial(large, me) for me in range(6)])
    assert all(isinstance(result, StorageError) for result in results), results
    assert keys(store, "run") == ["before"]
    deadline = time.monotonic() + WATCHDOG / 2
    acknowledged, errors = fill(store, lambda: time.monotonic() > deadline)
    assert all(isinstance(error, StorageError) for error in errors), errors
    assert sorted(pairs(store, "fill")) == sorted(acknowledged)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert large(7) == 2
    write_pair(store, "fill", "after")
    assert sorted(pairs(store, "fill")) == sorted([*acknowledged, "after"])
    assert store.check() == []
    store.close()
    print(len(acknowledged))


def test_a_file_size_limit_loses_nothing_acknowledged_and_writing_goes_on_without_it(
    path: Path,
) -> None:
    pytest.importorskip("resource", reason="this platform has no RLIMIT_FSIZE")
    assert int(in_child(limited_process, path)) > 0
    assert in_file(path) == ["before", "7"]
    assert "after" in in_file(path, pairs, "fill")


def test_a_really_full_disk_is_store_full_and_writing_goes_on_once_there_is_room(
    tmp_path: Path,
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    with mounted(disk, "-t", "tmpfs", "-o", "size=6m", "tmpfs"):
        ballast = disk / "ballast"
        ballast.write_bytes(b"x" * 2_000_000)
        with flowstore.open(disk / "store.db") as store:
            deadline = time.monotonic() + WATCHDOG / 2
            acknowledged, errors = fill(store, lambda: time.monotonic() > deadline)
            assert [type(error) for error in errors] == [flowstore.StoreFull] * 4, errors
            assert sorted(pairs(store, "fill")) == sorted(acknowledged)
            ballast.unlink()
            write_pair(store, "fill", "after")
            assert sorted(pairs(store, "fill")) == sorted([*acknowledged, "after"])
            assert store.check() == []


def file_of_others(path: Path) -> None:
    """A database in which others have a table, and which cannot be vacuumed in steps."""
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE theirs (x)")


# In a mount namespace of its own: $1 can be written, the places for temporary files cannot, or are full.
WITHOUT_TEMPORARY_FILES = """
for place in /tmp /var/tmp /usr/tmp; do [ -d $place ] && mount --bind $place $place; done
mount --bind "$1" "$1" || exit 3
mkdir "$1/full" && mount -t tmpfs -o size=16k tmpfs "$1/full" || exit 3
head -c 20000 /dev/zero 2>/dev/null >"$1/full/ballast"
for place in /tmp /var/tmp /usr/tmp; do [ -d $place ] && mount -o remount,bind,ro $place; done
unset TMPDIR SQLITE_TMPDIR
[ $2 = full ] && export SQLITE_TMPDIR="$1/full"
cd /proc && exec "$3" -c "$4" "$1"
"""


USES_MUCH = """
import concurrent.futures, os, sys, flowstore
from flowstore import Flow
folder = sys.argv[1]
for target in (":memory:", f"{folder}/ours.db", f"{folder}/theirs.db"):
    with flowstore.open(target, synchronous="OFF") as store:
        flows = [store.flows.insert(Flow(id=str(n), goal="g" * 2000)) for n in range(1000)]
        with concurrent.futures.ThreadPoolExecutor(32) as pool:  # groups in which one fails have savepoints
            stale = [pool.submit(store.flows.update_with_revision, flow) for flow in flows + flows[::10]]
        assert sum(one.exception() is not None for one in stale) == 100, [
            one.exception() for one in stale if one.exception() is not None][:3]
        with store.transaction() as tx, store.transaction():
            tx.execute("UPDATE flows SET goal = goal || goal, status = 'finished'")
            try:
                tx.execute("UPDATE flows SET goal = goal || goal, revision = CASE id WHEN '999' THEN NULL ELSE 0 END")
            except flowstore.StorageError as error:
                assert "NOT NULL" in str(error), error
            tx.execute("CREATE TEMP TABLE scratch AS SELECT * FROM flows ORDER BY hex(goal)")
            assert len(tx.execute("SELECT goal FROM scratch ORDER BY goal || id")) == 1000
        store.flows.list_by_status("finished")
        store.backup(f"{folder}/{len(target)}.copy")
        assert store.flows.prune_terminal_flows(0) == 1000
        for _ in range(5):  # more than is kept in the cache
            store.state.put_artifact(os.urandom(5 << 20))
        store.compact()
        assert store.check() == []
"""


@sqlite_only
@parametrize("temporary", ["read-only", "full"])
def test_no_call_needs_a_temporary_file(tmp_path: Path, temporary: str) -> None:
    if shutil.which("unshare") is None:
        pytest.skip("unshare, of util-linux, is missing")
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("unshare may not be used here (needs root)")
    file_of_others(tmp_path / "theirs.db")
    command = ["unshare", "-m", "sh", "-c", WITHOUT_TEMPORARY_FILES, "sh"]
    ran = subprocess.run(
        [*command, str(tmp_path), temporary, sys.executable, USES_MUCH],
        env=os.environ | {"PYTHONPATH": str(Path(flowstore.__file__ or "").parent)},
        capture_output=True,
        text=True,
        timeout=WATCHDOG,
    )
    if ran.returncode == 3:
        pytest.skip("mount may not be used here (needs root)")
    assert ran.returncode == 0, ran.stderr


@parametrize("kind", ["thread", "store", "process"])
@parametrize("busy_timeout", [0.0, 0.01])
def test_what_timed_out_is_not_there_and_what_returned_is(
    path: Path, kind: str, busy_timeout: float
) -> None:
    returned: list[str] = []
    busy: list[str] = []
    messages: set[str] = set()

    store = flowstore.open(path, busy_timeout=busy_timeout)

    def work(me: int) -> None:
        number, mine = 0, 0
        while number < 40 or not mine:
            number += 1
            key = f"{me}.{number}"
            try:
                (write_pair_in_block if random.random() < 0.3 else write_pair)(store, "run", key)
                returned.append(key)
                mine += 1
            except StoreBusy as error:
                busy.append(key)
                messages.add(str(error))

    with store, holder(kind, store, path) as hold:
        with hold():
            callers = [Caller(work, me) for me in range(8)]
            until(
                lambda: len({key.split(".")[0] for key in busy}) == 8,
                "for each thread to be refused",
            )
        while any(caller.is_alive() for caller in callers):
            with hold():
                time.sleep(random.random() * 0.02)
            time.sleep(random.random() * 0.01)
        assert [caller.outcome() for caller in callers] == [None] * 8
        assert sorted(pairs(store, "run")) == sorted(returned)
    assert not any("locked" in message for message in messages), messages


@sqlite_only
def test_a_call_that_queued_again_has_no_error_of_the_group_that_was_interrupted(
    store: Store,
) -> None:
    error = SequenceConflict("run", 0, 1)
    call = flowstore._Call(
        operation=vars(EventStore)["append"],
        facet=store.events,
        args=("run", "default", EVENT),
        error=error,
    )
    writer = store._engine.writer
    writer.lead(call, writer.commit_calls)
    assert (call.result, call.error) == (1, None)


def test_a_call_that_gives_up_has_left_the_queue_before_a_leader_can_take_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with flowstore.open(path, busy_timeout=0.01) as store:
        writer: Any = store._engine.writer
        busy_error = store._engine.busy_error
        left: list[tuple[int, bool]] = []

        def give_up() -> Any:
            left.append((len(writer.queue), writer.mutex._is_owned()))
            return busy_error()

        monkeypatch.setattr(store._engine, "busy_error", give_up)
        with store.transaction():
            late = Caller(store.events.append, "run", "default", EVENT)
            assert isinstance(late.outcome(), StoreBusy)
        assert left == [(0, True)]
        assert store.events.count_events("run") == 0


def test_readers_and_writers_of_several_stores_on_one_file_meet_no_error(path: Path) -> None:
    with ExitStack() as stack:
        stores = [stack.enter_context(flowstore.open(path)) for _ in range(3)]

        def work(me: int) -> None:
            mine = stores[me % 3]
            for number in range(15):
                write_pair_in_block(mine, "run", f"{me}.{number}")
                assert f"{me}.{number}" in pairs(mine, "run")

        crowd(9, work)
        assert len(pairs(stores[0], "run")) == 9 * 15


# ------------------------------------------------------------------------------------------------- Ctrl-C


@swallows
@sqlite_only
def test_thousands_of_interrupts_over_eight_threads_leave_none_hung_lost_or_extra(
    target: str,
) -> None:
    armed = [False] * 8
    caught = [0] * 8
    begun: list[list[str]] = [[] for _ in range(8)]
    returned: list[list[str]] = [[] for _ in range(8)]
    stop = False
    store = flowstore.open(target)

    def work(me: int) -> None:
        number = 0
        while True:
            try:
                while not stop:
                    armed[me] = True  # only in here is a strike allowed
                    number += 1
                    key = f"{me}.{number}"
                    begun[me].append(key)
                    (write_pair, write_pair_in_block)[number % 2](store, f"run{number % 3}", key)
                    returned[me].append(key)
                    if number % 5 == 0:
                        store.events.load_events_after(f"run{number % 3}", 10**6)
                for _ in range(1000):  # a last strike lands here
                    pass
                return
            except KeyboardInterrupt:
                caught[me] += 1

    def ready(me: int) -> bool:
        ended = [caller.met for caller in callers if not caller.is_alive()]
        assert not ended, ended
        return armed[me]

    callers = [Caller(work, me) for me in range(8)]
    for _ in range(STRIKES):
        me = random.randrange(8)
        until(partial(ready, me), "for a thread that hangs after a strike")
        strike(callers[me])
        armed[me] = False
        time.sleep(random.random() * 0.001)
    stop = True
    assert [caller.outcome() for caller in callers] == [None] * 8
    assert sum(caught) > STRIKES // 2
    assert outcomes([partial(write_pair_in_block, store, "after", "usable")]) == [None]
    there = [key for run in range(3) for key in pairs(store, f"run{run}")]
    assert len(there) == len(set(there))
    assert set(there) >= {key for mine in returned for key in mine}, "an acknowledged write is lost"
    assert set(there) <= {key for mine in begun for key in mine}
    assert store.check() == []
    store.close()


@swallows
@parametrize("call", [write_pair, write_pair_in_block, nested_engine, half_caught])
def test_an_interrupt_at_any_step_of_a_write_leaves_all_or_nothing_and_a_usable_store(
    target: str, call: Callable[[Store, str, str], Any]
) -> None:
    returned: list[str] = []
    struck: list[str] = []
    with flowstore.open(target, synchronous="OFF", busy_timeout=WATCHDOG / 2) as store:
        call(store, "run", "first")  # statements are prepared, the writer is open
        waiter = Caller(partial(claim, store, wait=10 * WATCHDOG))
        until(waiter.waits)
        dry = Striker(0)
        dry.run(partial(call, store, "run", "dry"))
        for place in steps(partial(call, store, "run", "dry, again")):
            striker = Striker(place)
            done = striker.run(partial(call, store, "run", f"{place}"))
            (returned if done else struck).append(f"{place}")
            again = Caller(
                partial(write_pair_in_block, store, "run", f"{place}, another thread")
            ).outcome()
            assert again is None, f"{again!r} after a strike at\n{striker.where}"
            write_pair(store, "run", f"{place}, the same thread")
            assert waiter.is_alive(), f"{waiter.met!r} after a strike at\n{striker.where}"
        there = pairs(store, "run")
        assert struck
        assert set(there) >= set(returned)
        others = {*there} - {*struck, *returned, "first", "dry", "dry, again"}
        assert len(others) == 2 * len(struck + returned)
        later = [Striker(0) for _ in range(5)]  # some of them may have to queue
        for number, striker in enumerate(later):
            assert striker.run(partial(call, store, "run", f"later {number}"))
        shortest = min(striker.places for striker in later)
        assert shortest < 2 * dry.places, "each strike makes every later call of its thread longer"
        assert waiter.is_alive()
        made = enqueue(store, execution_id="run")
        assert waiter.result().id == made


@swallows
def test_an_interrupt_at_any_step_of_a_read_leaks_no_connection(path: Path) -> None:
    with flowstore.open(path, synchronous="OFF") as store:
        for number in range(5):
            write_pair(store, "run", str(number))
        calls: list[Call] = [
            partial(pairs, store, "run"),
            lambda: list(store.events.iter_events("run", chunk=2)),
            partial(store.state.claim_work_item, "w", ["q"]),
            partial(store.state.claim_work_item, "w", ["q"], wait=0.001),
        ]
        for call in calls:
            call()
        gc.collect()
        gc.freeze()
        before = descriptors()
        for call in calls:
            for place in steps(call):
                striker = Striker(place)
                striker.run(call)
                assert Caller(pairs, store, "run").outcome() == [*"01234"], striker.where
                waiting = Caller(partial(store.state.claim_work_item, "w", ["q"], wait=0.001))
                waiting.join(WATCHDOG / 2)
                assert not waiting.is_alive(), f"a wait hangs after a strike at\n{striker.where}"
                gc.collect()  # a lost connection is part of a cycle
        gc.unfreeze()
        assert descriptors() <= before + 6
        write_pair(store, "run", "5")
        assert store.check() == []


@swallows
def test_an_interrupt_at_any_step_of_open_and_close_leaks_no_connection(path: Path) -> None:
    opened: list[Store] = []

    def open_and_close() -> None:
        opened.append(flowstore.open(path, synchronous="OFF"))
        opened[-1].close()

    before = descriptors()
    gc.freeze()  # what all other tests have made would be looked at in each round
    for place in steps(open_and_close):
        striker = Striker(place)
        striker.run(open_and_close)
        for store in opened:
            assert Caller(store.close).outcome() is None, striker.where
        opened.clear()
        with flowstore.open(path) as store:
            write_pair(store, "run", f"{place}")
        gc.collect()
        # Struck where os.open has returned, nobody has the descriptor yet, so nobody can close it.
        after = descriptors()
        assert after <= before + ("os.open(" in striker.where), striker.where
        before = max(before, after)
    gc.unfreeze()
    assert in_file(path, pairs)


@swallows
def test_an_interrupted_close_can_be_repeated_by_any_thread_wherever_it_was_struck() -> None:
    dry, place = Striker(0), 0
    dry.run(flowstore.open(":memory:").close)
    while place < dry.places:
        place += 1
        store = flowstore.open(":memory:")
        striker = Striker(place)
        striker.run(store.close)
        again = Caller(store.close)
        again.join(WATCHDOG / 2)
        assert not again.is_alive(), f"close() hangs after a strike at\n{striker.where}"
        assert again.result() is None
        assert isinstance(Caller(write, store, "run", "late").outcome(), StoreClosed)


@swallows
@sqlite_only
def test_an_interrupt_of_a_follower_and_then_of_its_leader_leaves_no_call_behind_that_nobody_waits_for(
    target: str,
) -> None:
    inside, leave = threading.Event(), threading.Event()
    leader: list[Caller] = []

    def clock() -> dt.datetime:
        if threading.current_thread() in leader:
            inside.set()
            leave.wait(WATCHDOG)
            raise KeyboardInterrupt
        return dt.datetime.now(dt.UTC)

    with flowstore.open(target, clock=clock, busy_timeout=1.0) as store:
        with store.transaction():
            leader.append(Caller(write_pair, store, "run", "leader"))
            until(lambda: queued(store) >= 1)
            follower = Caller(write_pair, store, "run", "follower")
            until(lambda: queued(store) >= 2)
        assert inside.wait(WATCHDOG)
        strike(follower)
        follower.join(2.0)  # it may notice when its own time is over
        leave.set()
        assert isinstance(leader[0].outcome(), KeyboardInterrupt)
        assert isinstance(follower.outcome(), KeyboardInterrupt)
        assert isinstance(Caller(write_pair, store, "run", "after").outcome(), int)
        assert set(pairs(store, "run")) <= {"follower", "after"}


def interrupted_process(path: str) -> None:
    armed = False

    def on_sigint(*_: object) -> None:
        nonlocal armed
        if armed:
            armed = False
            raise KeyboardInterrupt

    def write_on(me: int) -> list[str]:
        mine: list[str] = []
        while not stop:
            write_pair(store, "run", f"{me}.{len(mine)}")
            mine.append(f"{me}.{len(mine)}")
        return mine

    store = flowstore.open(path)
    stop = False
    signal.signal(signal.SIGINT, on_sigint)
    others = [Caller(write_on, me) for me in range(3)]
    say("ready")
    try:
        armed = True
        store.state.claim_work_item("w", ["q"], wait=10 * WATCHDOG)
        raise AssertionError("Ctrl-C did not end the wait")
    except KeyboardInterrupt:
        pass
    struck, number = 0, 0
    returned: list[str] = []
    while struck < 200:
        try:
            while True:
                armed = True
                number += 1
                (write_pair, write_pair_in_block)[number % 2](store, "run", f"main.{number}")
                returned.append(f"main.{number}")
        except KeyboardInterrupt:
            struck += 1
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stop = True
    for other in others:
        mine = other.outcome()
        assert isinstance(mine, list), mine
        returned += mine
    say("done")
    missing = set(returned) - set(pairs(store, "run"))
    assert not missing, missing
    store.close()


@posix
def test_ctrl_c_in_the_main_thread_harms_no_other_thread_and_no_acknowledged_write(
    path: Path,
) -> None:
    with Process(interrupted_process, path) as child:
        assert child.read() == "ready"

        def strike_on() -> None:
            while child.popen.poll() is None:
                child.popen.send_signal(signal.SIGINT)
                time.sleep(random.random() * 0.004)

        striker = Caller(strike_on)
        assert child.read() == "done"
        child.finish()
        assert striker.outcome() is None
    assert in_file(path, pairs)


@posix
@parametrize(
    "name", ["open", "read", "wait", "append", "claim", "block", "nested", "caught", "hold"]
)
def test_what_strikes_a_call_at_any_step_hangs_and_hits_no_other_thread_and_loses_no_write(
    path: Path, name: str
) -> None:
    cases = [f"{name},{kind}" for kind in KINDS]
    in_child(on_both, path, "strike_under_load", *cases)


@posix
@parametrize("place", ["leader", "leader's block", "follower"])
def test_what_strikes_a_queued_call_at_any_step_spares_the_calls_that_queue_with_it(
    path: Path, place: str
) -> None:
    cases = [f"{place},{kind}" for kind in [*KINDS, "KeyboardInterrupt twice"]]
    in_child(on_both, path, "strike_in_a_group", *cases)


@posix
def test_a_hold_that_is_struck_as_it_begins_renews_no_lease(path: Path) -> None:
    in_child(strike_holds_as_they_begin)


@posix
def test_a_call_at_the_end_of_the_stack_blames_neither_what_it_was_given_nor_what_is_stored(
    path: Path,
) -> None:
    in_child(on_both, path, "read_and_write_at_the_end_of_the_stack", "append,read,claim")


# ---------------------------------------------------------------------- calls that interrupt a call of their thread


@posix
def test_a_call_made_at_any_step_of_another_one_of_its_thread_ends_in_time_and_lets_that_go_on(
    path: Path,
) -> None:
    names = ["read", "wait", "append", "claim", "block", "nested", "caught", "hold"]
    in_child(on_both, path, "visit_each_step", *names)


@posix
def test_a_close_at_any_step_of_a_call_and_a_call_at_any_step_of_a_close_end_in_time(
    path: Path,
) -> None:
    names = ["close", "append", "block", "read", "wait"]
    in_child(on_both, path, "visit_the_end", *names)


@posix
def test_a_call_that_the_garbage_collector_makes_at_any_allocation_of_another_ends_in_time(
    path: Path,
) -> None:
    ways = ["__del__", "weakref.finalize", "gc.callbacks"]
    in_child(on_both, path, "collect_at_each_step", *ways)


@posix
@parametrize("situation", ["queue", "block", "read", "process", "item", "tail", "close"])
def test_a_call_of_a_signal_handler_that_interrupts_a_wait_of_its_thread_ends_in_time(
    path: Path, situation: str
) -> None:
    in_child(signalled_waits, path, situation)


def test_in_memory_everybody_else_waits_for_the_commit() -> None:
    with flowstore.open(":memory:") as store:
        for number in range(20):
            with store.transaction():
                write(store, f"run{number}", "one")
                readers = [Caller(keys, store, f"run{number}") for _ in range(4)]
                until(lambda: all(reader.is_alive() for reader in readers))  # noqa: B023
                write(store, f"run{number}", "two")
            assert [reader.outcome() for reader in readers] == [["one", "two"]] * 4


def records_of_another_copy(path: str, how: str) -> None:
    """What each call that takes a record, or a member of an enum, makes of one of the other copy."""
    other: Any = types.SimpleNamespace(**vars(flowstore))
    if how == "reload":
        importlib.reload(flowstore)
    else:
        other = module_copy(path, "other")
    store = flowstore.open(path)
    state, flows, workflows = store.state, store.flows, store.workflows
    execution = state.create_execution(flowstore.WorkflowExecution(workflow_id="w"))
    run = execution.execution_id
    flow = flows.insert(flowstore.Flow())
    state.enqueue_work_item(flowstore.WorkItem(execution_id=run, queue_type="q"))
    claimed = state.claim_work_item("w", ["q"])
    step, named = other.ExecutionPointer(step_id=0), {"event_name": "n", "event_key": "k"}
    limits = other.TenantLimits(max_workflows=1)
    instance = partial(flowstore.WorkflowInstance, workflow_definition_id="w")
    takes: list[tuple[Callable[[Any], Any], Any]] = [
        (flows.insert, other.Flow()),
        (flows.insert_step, other.FlowStep(flow_id=flow.id, run_id="r")),
        (flows.list_by_status, other.FlowStatus.RUNNING),
        (state.create_execution, other.WorkflowExecution(workflow_id="w")),
        (partial(state.update_execution_status, run), other.ExecutionStatus.RUNNING),
        (state.enqueue_work_item, other.WorkItem(execution_id=run, queue_type="q")),
        (state.complete_work_item, other.WorkItem(**vars(claimed))),
        (state.write_snapshot, other.Snapshot(execution_id=run, at_sequence=1, state={})),
        (state.store_workflow, other.WorkflowDefinition(workflow_id="w", version="1", ir={})),
        (state.create_tenant, other.Tenant(id="t")),
        (state.create_tenant, flowstore.Tenant(id="t2", limits=limits)),
        (workflows.create_new_workflow, other.WorkflowInstance(**vars(instance()))),
        (workflows.create_new_workflow, instance(execution_pointers=[step])),
        (workflows.create_event, other.Event(**named)),
        (workflows.create_event_subscription,
            other.EventSubscription(workflow_id="w", step_id=0, execution_pointer_id="p", **named)),
        (workflows.schedule_command, other.ScheduledCommand(
            command_name=other.CommandName.PROCESS_EVENT, data="d", execute_time=0)),
        (lambda error: workflows.persist_errors([error]),
            other.ExecutionError(workflow_id="w", execution_pointer_id="p", message="m")),
    ]  # fmt: skip
    for call, made in takes:
        try:
            call(made)
            print(f"{type(made).__name__}: accepted")
        except flowstore.InvalidData as error:
            print(f"{type(made).__name__}: {error}")
    sys.stdout.flush()


@parametrize("how", ["reload", "copies"])
def test_a_record_of_another_copy_of_the_module_is_accepted_or_refused_as_one_of_another_copy(
    path: Path, how: str
) -> None:
    lines = in_child(records_of_another_copy, path, how).splitlines()
    assert len(lines) == 17
    for line in lines:
        assert re.search(": accepted$|another copy|reloaded", line)


def wait_in_frozen_time(path: str, how: str) -> None:
    """Calls that wait, each of which has to end by itself while the clocks stand still."""
    real = [time.monotonic]
    module: Any = flowstore
    if how == "freezegun":
        import freezegun

        freezegun.freeze_time("2026-01-05").start()
    else:
        freeze_time()
        if how == "before the import":
            module = module_copy(path, "frozen")
    assert time.monotonic() == time.monotonic()

    def ended(name: str, call: Call, least: float = 0.1) -> Any:
        """What a call returned or raised, which has to take as long as it was to wait, and not much longer."""
        began = real[0]()
        result = Caller(dig, 9, call).outcome(20)  # freezegun spares what threading calls
        took = real[0]() - began
        assert least * 0.9 <= took, f"{name} took {took} s and ended with {result!r}"
        return result

    for target in (":memory:", path):
        clock = partial(dt.datetime.now, dt.UTC)  # which freezegun alone stops
        store = module.open(target, busy_timeout=0.1, clock=clock)
        state, events = store.state, store.events
        write(store, "run", "first")
        assert ended("claim", partial(state.claim_work_item, "w", ["q"], wait=0.1)) is None
        assert ended("tail", partial(list, events.tail(timeout=0.1))) == []
        calls = [partial(write, store, "run", "late"), store.transaction().__enter__]
        if target == ":memory:":
            calls.append(partial(events.count_events, "run"))
        with store.transaction():
            for call in calls:
                assert isinstance(ended("busy", call), module.StoreBusy)
        if target != ":memory:":
            with module.open(target, busy_timeout=0.1) as other, other.transaction():
                for call in (calls[0], store.transaction().__enter__):
                    assert isinstance(ended("held", call), module.StoreBusy)
        waiting = Caller(partial(state.claim_work_item, "w", ["q"], wait=60.0))
        write(store, "run", "second")
        state.enqueue_work_item(module.WorkItem(execution_id="run", queue_type="q"))
        item = waiting.outcome(20)
        assert item is not None
        if how != "freezegun":
            with state.hold(item, lease_seconds=0.2):
                for _ in range(2):
                    before = state.get_work_item(item.id).lease_expires_at
                    for _ in range(1000):
                        if state.get_work_item(item.id).lease_expires_at > before:
                            break
                        time.sleep(0.005)
                    else:
                        raise AssertionError("the lease is not renewed")
        state.complete_work_item(item)
        assert Caller(store.close).outcome(20) is None
    os._exit(0)


@parametrize("how", ["after the import", "before the import"])
def test_time_that_stands_still_freezes_no_wait(path: Path, how: str) -> None:
    in_child(wait_in_frozen_time, path, how)


def test_time_that_freezegun_has_frozen_freezes_no_wait(path: Path) -> None:
    pytest.importorskip("freezegun")
    in_child(wait_in_frozen_time, path, "freezegun")


TOUCHES = ["open", "os.open", "shutil.copy", "sqlite3"]


def keeper_of_a_touched_file(path: str, how: str, locks: str) -> None:
    """Has a store open whose file is touched; then reads and writes, in turns with another process."""
    if locks == "lost":
        switch_linux_locks_off()
    store = flowstore.open(path, busy_timeout=5.0)
    for number in range(20):
        write(store, "ours", f"{number}")
    say("opened")
    for turn in range(3):
        told()
        if turn == 0:
            touch(path, how)
        else:
            seen = keys(store, "theirs")
            assert seen == [f"{number}" for number in range(30 * turn)], f"turn {turn}: {seen}"
            for number in range(20 * turn, 20 * turn + 20):
                write(store, "ours", f"{number}")
        say("done")
    if told() == "close":
        store.close()
    os._exit(0)


def other_process(path: Path, numbers: range) -> None:
    """In the tests' own process: a store that is opened, written and closed while another process has it open."""
    with flowstore.open(path, busy_timeout=5.0) as store:
        for number in numbers:
            write(store, "theirs", f"{number}")


def check_touched(path: Path, ours: int, theirs: int) -> None:
    """Nothing that was acknowledged on either side is lost."""
    assert [len(in_file(path, run=run)) for run in ("ours", "theirs")] == [ours, theirs]


@posix
@parametrize(
    ("how", "locks"),
    [
        *(pytest.param(how, "kept", marks=linux) for how in TOUCHES),
        *((how, "lost") for how in TOUCHES if how != "sqlite3"),  # the SQLite of both is one
    ],
)
@parametrize("end", ["close", "kill"])
def test_a_file_that_other_code_of_the_process_opens_and_closes_loses_no_write_of_any_process(
    path: Path, how: str, locks: str, end: str
) -> None:
    log = Path(f"{path}-wal")
    with Process(keeper_of_a_touched_file, path, how, locks) as keeper:
        assert keeper.read() == "opened"
        keeper.tell()
        assert keeper.read() == "done"
        for turn in range(2):
            other_process(path, range(30 * turn, 30 * turn + 30))
            if locks == "kept":
                assert log.exists(), "the other process took itself for the last one"
            elif turn == 0 and sys.platform == "linux":
                assert not log.exists(), "switch_linux_locks_off() does nothing"
            keeper.tell()
            assert keeper.read() == "done"
        keeper.tell(end)
        keeper.finish()
    check_touched(path, 60, 60)


def reader_of_a_touched_file(path: str, locks: str, read_only: str) -> None:
    if locks == "lost":
        switch_linux_locks_off()
    store = flowstore.open(path, read_only=read_only == "read-only")
    walk = store.events.iter_events("theirs", chunk=5)
    assert next(walk).event["key"] == "0"
    say("opened")
    told()
    touch(path, "open")
    say("touched")
    told()
    assert len(keys(store, "theirs")) == 60
    assert [stored.event["key"] for stored in walk] == [f"{number}" for number in range(1, 60)]
    assert len(store.events.read_all()) == 61
    store.close()


@posix
@parametrize("locks", [pytest.param("kept", marks=linux), "lost"])
@parametrize("mode", ["read-only", "read and write"])
def test_a_reader_of_a_file_that_was_opened_and_closed_beside_it_answers_from_no_log_of_the_past(
    path: Path, locks: str, mode: str
) -> None:
    with flowstore.open(path) as store:
        write(store, "ours", "0")
    other_process(path, range(30))
    with Process(reader_of_a_touched_file, path, locks, mode) as reader:
        assert reader.read() == "opened"
        reader.tell()
        assert reader.read() == "touched"
        other_process(path, range(30, 45))
        other_process(path, range(45, 60))
        reader.tell()
        reader.finish()
    check_touched(path, 1, 60)


def own_calls_of_a_store(path: str) -> None:
    """Makes one call after another that might open and close the file, and lets the test look after each."""
    store = flowstore.open(path)
    write(store, "ours", "0")

    def open_and_close(**options: Any) -> None:
        with flowstore.open(path, **options) as another:
            another.stats()

    def command(*words: str) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            flowstore.main([*words])

    calls: dict[str, Call] = {
        "open": open_and_close,
        "read_only": partial(open_and_close, read_only=True),
        "check": store.check,
        "stats": store.stats,
        "compact": store.compact,
        "backup": partial(store.backup, f"{path}.backup"),
        "prune": partial(store.prune, dt.timedelta(0)),
        "main check": partial(command, "check", path),
        "main show": partial(command, "show", path),
        "main backup": partial(command, "backup", path, f"{path}.backup2"),
        "main compact": partial(command, "compact", path),
    }
    for name, call in calls.items():
        call()
        say(name)
        told()
        write(store, "ours", name)
    say("end")
    os._exit(0)


@posix
def test_no_call_of_the_module_itself_closes_a_descriptor_of_a_file_that_is_open(
    path: Path,
) -> None:
    with Process(own_calls_of_a_store, path) as keeper:
        count = 0
        while (name := keeper.read()) != "end":
            other_process(path, range(count, count + 1))
            assert Path(f"{path}-wal").exists(), f"the locks were lost in {name}"
            count += 1
            keeper.tell()
        keeper.finish()
    assert count == 11
    check_touched(path, 12, 11)


@linux
def test_a_log_that_is_deleted_while_the_file_is_opened_is_not_written_to(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flowstore.open(path).close()
    count = flowstore._count_connection
    opened: list[str] = []

    def count_later(name: str, tx: Any) -> bool:
        opened.append(name)
        if len(opened) == 1:  # other code drops the locks, and another process deletes the log
            os.close(os.open(name, os.O_RDONLY))
            finished(script("flowstore.open(sys.argv[1]).close()", path))
            assert not Path(f"{path}-wal").exists()
        return count(name, tx)

    monkeypatch.setattr(flowstore, "_count_connection", count_later)
    with flowstore.open(path) as store:
        assert write(store, "e1") == 1
        assert Path(f"{path}-wal").exists(), "it writes to a log that nobody will ever read"


def load_on_a_touched_file(path: str) -> None:
    """Threads that write and read while another opens and closes the file; prints how much was acknowledged."""
    store = flowstore.open(path, synchronous="OFF", busy_timeout=10.0)
    load = Load(store)
    stop = False

    def touch_on() -> None:
        while not stop:
            for how in ("open", "os.open"):
                touch(path, how)
            time.sleep(0.001)

    toucher = Caller(touch_on)
    say("begun")
    told()
    stop = True
    assert toucher.outcome(20) is None
    load.end()
    say(*map(len, load.acknowledged))
    told()
    os._exit(0)


@linux
def test_a_file_that_is_opened_and_closed_all_the_time_under_load_loses_no_write(
    path: Path,
) -> None:
    with Process(load_on_a_touched_file, path) as keeper:
        assert keeper.read() == "begun"
        for number in range(40):
            other_process(path, range(number, number + 1))
            assert Path(f"{path}-wal").exists(), "the other process took itself for the last one"
        keeper.tell()
        counts = [*map(int, keeper.read().split())]
        other_process(path, range(40, 41))
        keeper.tell()
        keeper.finish()
    assert [len(in_file(path, pairs, f"load{me}")) for me in range(2)] == counts
    assert len(in_file(path, run="theirs")) == 41


# --------------------------------------------------------------------------------------------------- kills


# --------------------------------------------------------------------------------------------------- close


def test_close_under_load_lets_every_call_finish_or_raise_store_closed(path: Path) -> None:
    store = flowstore.open(path)
    returned: list[str] = []

    def work(me: int) -> None:
        number = 0
        while True:
            number += 1
            if me % 4 == 3:
                pairs(store, "run")
            else:
                (write_pair, write_pair_in_block)[me % 2](store, "run", f"{me}.{number}")
                returned.append(f"{me}.{number}")

    callers = [Caller(work, me) for me in range(12)]
    until(lambda: len({key.split(".")[0] for key in returned}) == 9)
    closers = outcomes([store.close] * 3)
    assert closers == [None] * 3
    results = [caller.outcome() for caller in callers]
    assert [type(result) for result in results] == [StoreClosed] * 12, results
    assert {*in_file(path, pairs)} == {*returned}, "a write that raised is not there"


def test_close_wakes_whoever_waits_for_an_item(store: Store) -> None:
    waiters = [
        Caller(partial(store.state.claim_work_item, "w", ["q"], wait=10 * WATCHDOG))
        for _ in range(3)
    ]
    for waiter in waiters:
        until(waiter.waits)
    store.close()
    assert [type(waiter.outcome()) for waiter in waiters] == [StoreClosed] * 3


# -------------------------------------------------------------------------------------------------- bounds


def test_no_kind_of_call_leaves_objects_behind(target: str) -> None:
    store = flowstore.open(target, synchronous="OFF")

    def conflict() -> None:
        with suppress(SequenceConflict):
            store.events.append("run", "default", event("no"), expected_sequence=10**6)

    def alive(call: Call, times: int) -> int:
        for _ in range(times):
            call()
        gc.collect()
        return sum(
            type(thing).__module__ in ("sqlite3", flowstore.__name__) for thing in gc.get_objects()
        )

    calls: list[Call] = [
        partial(write_pair, store, "run", "again"),
        partial(write_pair_in_block, store, "run", "again"),
        partial(nested_engine, store, "run", "again"),
        conflict,
        partial(store.events.load_events_after, "run", 10**6),
        partial(store.state.claim_work_item, "w", ["q"]),
    ]
    gc.freeze()
    for call in calls:
        before = alive(call, 100)  # caches have filled
        assert alive(call, 100) < before + 50, call
    store.close()


@parametrize("block", [False, True])
def test_the_wal_stays_bounded_under_overlapping_readers_and_steady_writes(
    path: Path, block: bool
) -> None:
    stop = False
    written = while_read = largest = 0
    with flowstore.open(path, synchronous="OFF") as store:
        rows = [event(str(n), text="x" * 1000) for n in range(300)]
        store.events.append_batch("read", "default", rows)

        def read() -> None:
            nonlocal while_read
            while not stop:
                begin = written
                with store.transaction(read_only=True) if block else contextlib.nullcontext():
                    assert len(store.events.load_events("read")) == 300
                while_read = max(while_read, written - begin)

        readers = [Caller(read) for _ in range(3)]
        walk = store.events.iter_events("read", chunk=10)
        next(walk)  # rests between two items all the while
        for number in range(16):
            store.events.append("write", "default", event(str(number), text="x" * 8_000_000))
            written += 8_000_000
            largest = max(largest, os.path.getsize(f"{path}-wal"))
        stop = True
        assert [reader.outcome() for reader in readers] == [None] * 3
        assert sum(1 for _ in walk) == 299
        assert store.events.count_events("write") == 16
    bound = 16 * 2**20 + while_read
    assert largest < 1.1 * bound + 9_000_000, (
        f"{largest:,} bytes; {while_read:,} during the longest read"
    )


@parametrize("synchronous, number", [("FULL", 2), ("NORMAL", 1), ("OFF", 0)])
def test_the_writer_waits_for_the_disk_as_open_was_asked(
    path: Path, synchronous: str, number: int
) -> None:
    with flowstore.open(path, synchronous=synchronous) as store:
        db = store._engine.writer.connection.use().db
        assert db.execute("PRAGMA synchronous").fetchall() == [(number,)]


@sqlite_only
def test_an_append_an_enqueue_a_claim_and_an_end_take_few_python_calls(path: Path) -> None:
    """After each wait for the disk all of them run cold: their number is what a call costs."""
    seen: list[str] = []

    def count(call: Callable[..., Any], *arguments: Any) -> tuple[int, Any]:
        seen.clear()
        sys.setprofile(lambda frame, event, _: seen.append(event))
        result = call(*arguments)
        sys.setprofile(None)
        return seen.count("call"), result

    with flowstore.open(path, synchronous="OFF") as store:
        for _ in range(2):  # the first round prepares statements and methods
            appended, _sequence = count(store.events.append, "run", "default", EVENT)
            item = WorkItem(execution_id="run", queue_type="q")
            enqueued, _id = count(store.state.enqueue_work_item, item)
            claimed, item = count(store.state.claim_work_item, "w", ["q"])
            ended, item = count(store.state.complete_work_item, item)
    assert item.status == "completed"
    assert (appended <= 15, enqueued <= 24, claimed <= 26, ended <= 20) == (True,) * 4, (
        f"{appended} for an append, {enqueued} for an enqueue, {claimed} for a claim, {ended} for an end"
    )


def test_a_checkpoint_waits_shortly_for_a_read_only_transaction_of_its_own_store(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with flowstore.open(path, synchronous="OFF") as store:
        write(store, "e")
        checkpointer = store._engine.writer.checkpointer
        assert checkpointer is not None
        copies: list[bool] = []
        copy_log = checkpointer._copy_log

        def noted() -> bool:
            copies.append(copy_log())
            return copies[-1]

        monkeypatch.setattr(checkpointer, "_copy_log", noted)
        with store.transaction(read_only=True):
            for _ in range(5):
                in_thread(lambda: store.state.put_artifact(os.urandom(5 << 20)))
        # A second would be several hundred, a millisecond apart.
        assert 1 < copies.count(False) < 250
        assert ["a reader holds it" in line for line in warnings_of(caplog)] == [True]
        copies.clear()
        store.state.put_artifact(os.urandom(5 << 20))
        assert copies[-1:] == [True]


def test_nobody_checkpoints_without_the_write_lock(path: Path) -> None:
    """SQLite 3.7.0 to 3.51.2 can lose what another process commits while a checkpoint without it begins."""
    locked: list[tuple[str, bool]] = []
    with flowstore.open(path, synchronous="OFF") as store:
        writer = store._engine.writer
        assert writer.checkpointer is not None
        connections = [
            writer.connection,
            writer.checkpointer.connection,
            store._engine.pool.check_out(),
        ]

        def note(sql: str) -> None:
            if "checkpoint(" in sql:
                locked.append((sql, writer.connection.in_transaction))

        for connection in connections:
            db = connection.use().db
            assert db.execute("PRAGMA wal_autocheckpoint").fetchall() == [(0,)]
            db.set_trace_callback(note)
        for number in range(40):
            store.events.append("run", "default", event(str(number), text="x" * 900_000))
        assert [sql for sql, held in locked if not held] == [], "while it writes"
        assert locked, "the log was never full"
        store.compact()
    unlocked = {sql for sql, held in locked if not held}
    # The last one finds nothing to copy, whoever comes between: a snapshot of ours keeps it from that.
    assert unlocked == {"PRAGMA wal_checkpoint(TRUNCATE)"}
    assert len(in_file(path)) == 40


@sqlite_only
def test_a_poll_that_fails_lets_the_waiters_look(
    file_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    id = file_store.runs.start("work")

    def fail() -> None:
        raise StorageError("no descriptor is left")

    monkeypatch.setattr(file_store._engine.poller, "use", fail)
    waiter = Caller(lambda: file_store.runs.result(id, timeout=20))
    until(waiter.waits)
    in_child(cancel_run, file_store.target, id)
    assert isinstance(waiter.outcome(10), flowstore.RunCancelled)  # not with the last look alone


def cancel_run(path: str, id: str) -> None:
    with flowstore.open(path) as store:
        store.runs.cancel(id)


@sqlite_only
def test_an_interrupted_wait_leaves_the_poll_to_others(file_store: Store) -> None:
    class Struck(Exception):
        pass

    def strike(*_: object) -> None:
        raise Struck

    id = file_store.runs.start("work")
    before = signal.signal(signal.SIGALRM, strike)
    try:
        for number in range(60):
            with suppress(Struck, TimeoutError):
                signal.setitimer(signal.ITIMER_REAL, 0.02 + number % 10 * 1e-4)
                file_store.runs.result(id, timeout=0.1)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

    def is_free() -> bool:
        lock = file_store._engine.poller.lock
        found = bool(lock.acquire(timeout=5))
        if found:
            lock.release()
        return found

    assert Caller(is_free).outcome() is True


def watched_calls(monkeypatch: pytest.MonkeyPatch, facet: Any, name: str) -> list[object]:
    """The arguments of each call of a facet's method from now on."""
    calls: list[object] = []
    method = getattr(facet, name)

    def counted(*args: Any) -> Any:
        calls.append(args)
        return method(*args)

    monkeypatch.setitem(facet.__dict__, name, counted)
    return calls


@sqlite_only
def test_what_only_a_commit_can_end_is_looked_for_after_commits_alone(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    id = store.runs.start("work")
    looks = watched_calls(monkeypatch, store.runs, "_outcome_of")
    waiter = Caller(lambda: store.runs.result(id, timeout=20))
    until(lambda: looks)
    time.sleep(0.3)
    assert len(looks) <= 2  # the second one with the first poll
    write(store, "e1")
    until(lambda: len(looks) >= 2)
    store.runs.cancel(id)
    assert isinstance(waiter.outcome(), flowstore.RunCancelled)


@sqlite_only
def test_of_many_that_wait_for_the_same_work_one_looks(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = watched_calls(monkeypatch, store.state, "_claimable")
    waiters = [
        Caller(partial(store.state.claim_work_item, "w", ["q"], wait=20.0)) for _ in range(20)
    ]
    until(lambda: looks)
    time.sleep(0.5)
    assert len(looks) <= 2 * 0.5 / store._engine.poll_seconds
    ids = put(store, len(waiters))
    assert sorted(waiter.outcome().id for waiter in waiters) == sorted(ids)


def test_an_idle_wait_is_no_news_to_itself(store: Store) -> None:
    before = store._engine.commits
    assert store.state.claim_work_item("w", ["q"], wait=0.3) is None
    assert store._engine.commits <= before + 2, "its looks wake it, and so it never rests"


def test_a_store_that_is_dropped_without_close_gives_its_descriptors_back(tmp_path: Path) -> None:
    def use(number: int) -> None:
        assert write_pair(flowstore.open(tmp_path / f"{number}.db"), "run", "kept") == 1

    use(0)
    gc.collect()
    before = descriptors()
    for number in range(1, 10):
        use(number)
        gc.collect()
    assert descriptors() <= before + 2
    with flowstore.open(tmp_path / "9.db") as store:
        assert pairs(store, "run") == ["kept"]


def test_a_call_that_fails_leaves_the_file_to_others(path: Path) -> None:
    with flowstore.open(path) as store, closing(sqlite3.connect(path, timeout=0)) as plain:
        flow = store.flows.insert(Flow())
        for _ in range(2):
            with pytest.raises(AlreadyExists):
                store.flows.insert(flow)
            plain.execute("BEGIN IMMEDIATE")
            plain.rollback()


# ==================================================================================================
# Transactions
# ==================================================================================================


def on_postgres(store: Store) -> bool:
    return store.target.startswith("postgresql:")


def test_a_transaction_commits_the_facets_and_the_users_own_table_together(store: Store) -> None:
    held = claimed(store)
    with store.transaction() as tx:
        tx.execute("CREATE TABLE orders(id INTEGER PRIMARY KEY, total INTEGER)")
        tx.execute("INSERT INTO orders(id, total) VALUES (?, ?)", (7, 1250))
        store.state.complete_work_item(held)
        write(store, "e1")
    assert execute(store, "SELECT id, total FROM orders") == [(7, 1250)]
    assert look(store, held.id).status == "completed"
    assert store.events.count_events("e1") == 1


@parametrize(
    "error",
    [
        RuntimeError("stop"),
        Stop("stop"),
        KeyboardInterrupt(),
        SystemExit(1),
        GeneratorExit(),
        InvalidData("x"),
    ],
)
def test_what_leaves_the_block_undoes_everything_and_propagates(
    store: Store, error: BaseException
) -> None:
    held = claimed(store)
    execute(store, "CREATE TABLE orders(id INTEGER PRIMARY KEY)")
    before = dump(store)
    with pytest.raises(type(error)) as caught, store.transaction() as tx:
        tx.execute("INSERT INTO orders VALUES (7)")
        tx.execute("CREATE TABLE more(id INTEGER)")
        store.state.complete_work_item(held)
        with store.transaction():
            store.events.append("e2", "acme", EVENT)
        raise error
    assert caught.value is error
    assert dump(store) == before


def test_reads_inside_see_the_writes_made_inside(store: Store) -> None:
    with store.transaction() as tx:
        write(store, "e1")
        assert types_in(store.events.load_events("e1")) == ["custom"]
        assert [stored.sequence for stored in store.events.iter_events("e1", chunk=1)] == [1]
        item_id = enqueue(store)
        assert claim(store).id == item_id
        tx.execute("CREATE TABLE mine(id INTEGER)")
        tx.executemany("INSERT INTO mine VALUES (?)", [(1,), (2,)])
        assert tx.execute("SELECT id FROM mine ORDER BY id") == [(1,), (2,)]


def test_another_threads_write_is_not_part_of_the_transaction(store: Store) -> None:
    with pytest.raises(Stop), store.transaction():
        write(store, "e1")
        other = Caller(lambda: write(store, "e2"))
        raise Stop
    assert other.result() == 1
    assert store.events.list_executions() == ["e2"]


REFUSED_CALLS: dict[str, Callable[[Store], Any]] = {
    "conflict": lambda s: s.events.append("new", "new-tenant", EVENT, expected_sequence=3),
    "batch conflict": lambda s: s.events.append_batch(
        "new", "new-tenant", [EVENT] * 3, expected_sequence=3
    ),
    "taken item": lambda s: s.state.enqueue_work_item(
        WorkItem(execution_id="e1", queue_type="q", id="held")
    ),
    "taken execution": lambda s: create(s, "e1"),
    "stale fence": lambda s: s.state.complete_work_item("held", lease_fence=99),
    "not found": lambda s: s.state.update_execution_status("no", "running"),
    "not an array": lambda s: s.state.patch_append_array("e1", "number", 1),
    "invalid": lambda s: s.events.append_batch("new", "new-tenant", [EVENT, {}]),
}


@parametrize("name", REFUSED_CALLS)
def test_an_error_caught_inside_undoes_that_call_alone(furnished: Store, name: str) -> None:
    furnished.state.update_execution_current_state("e1", {"number": 1})
    before = dump(furnished)
    with furnished.transaction() as tx:
        tx.execute("CREATE TABLE mine(id INTEGER)")
        with pytest.raises(FlowStoreError):
            REFUSED_CALLS[name](furnished)
    after = dump(furnished)
    assert after.pop("mine", []) == [] and after == before
    with furnished.transaction() as tx:
        furnished.events.append("e1", "default", {"type": "before"})
        with pytest.raises(FlowStoreError):
            REFUSED_CALLS[name](furnished)
        furnished.events.append("e1", "default", {"type": "after"})
        assert tx.execute("SELECT id FROM mine") == []
    assert types_in(furnished.events.load_events("e1")) == ["custom", "before", "after"]


def test_parameters_may_be_any_mapping_and_what_is_missing_or_no_rows_is_told(store: Store) -> None:
    with store.transaction() as tx:
        tx.execute("CREATE TABLE mine (n INTEGER)")
        tx.executemany("INSERT INTO mine VALUES (:n)", [ChainMap({"n": 1}), {"n": 2}])
        assert tx.execute("SELECT n FROM mine WHERE n > :least", ChainMap({"least": 1})) == [(2,)]
        refused(
            lambda: tx.execute("SELECT :least", {"other": 1}),
            lambda: tx.execute("SELECT :least", ChainMap({"other": 1})),
            lambda: tx.execute("SELECT ?", {"a": 1}),
        )
        with pytest.raises(InvalidData, match="rows"):
            tx.executemany("INSERT INTO mine VALUES (?)", 5)  # type: ignore[arg-type]
        with pytest.raises(StorageError, match="SET"):
            tx.execute("SET search_path TO public")
        assert tx.execute("SELECT COUNT(*) FROM mine") == [(2,)]


def test_a_failing_executemany_undoes_its_own_rows_alone(store: Store) -> None:
    with store.transaction() as tx:
        tx.execute("CREATE TABLE mine(id INTEGER PRIMARY KEY)")
        tx.execute("INSERT INTO mine VALUES (1)")
        with pytest.raises(StorageError):
            tx.executemany("INSERT INTO mine VALUES (?)", [(2,), (3,), (1,)])
        tx.execute("INSERT INTO mine VALUES (4)")
    assert execute(store, "SELECT id FROM mine ORDER BY id") == [(1,), (4,)]


def test_a_nested_transaction_is_a_savepoint(store: Store) -> None:
    def step(name: str) -> None:
        store.events.append("e1", "default", {"type": name})

    with store.transaction():
        step("outer")
        with pytest.raises(Stop), store.transaction():
            step("undone")
            with store.transaction():
                step("undone with it")
            raise Stop
        with store.transaction() as inner:
            step("inner")
            inner.execute("CREATE TABLE mine(id INTEGER)")
            with pytest.raises(Stop), store.transaction():
                step("undone too")
                raise Stop
        step("last")
    assert types_in(store.events.load_events("e1")) == ["outer", "inner", "last"]


def test_a_deferred_constraint_fails_the_end_of_the_block_with_nothing_written(
    store: Store,
) -> None:
    with store.transaction() as tx:
        tx.execute("CREATE TABLE parent(id INTEGER PRIMARY KEY)")
        tx.execute(
            "CREATE TABLE child(parent INTEGER REFERENCES parent(id) DEFERRABLE INITIALLY DEFERRED)"
        )
    with pytest.raises(StorageError), store.transaction() as tx:
        write(store, "e1")
        tx.execute("INSERT INTO child VALUES (1)")
    assert not store.events.execution_exists("e1")
    with store.transaction() as tx:
        tx.execute("INSERT INTO child VALUES (1)")
        tx.execute("INSERT INTO parent VALUES (1)")
        write(store, "e1")
    assert store.events.count_events("e1") == 1


ENDINGS = {
    "OR ROLLBACK": ("INSERT OR ROLLBACK INTO mine VALUES (1)", "CREATE TABLE other(id INTEGER)"),
    "a trigger's ROLLBACK": (
        "DELETE FROM mine",
        "CREATE TRIGGER no_delete BEFORE DELETE ON mine BEGIN SELECT RAISE(ROLLBACK, 'no'); END",
    ),
}


@parametrize("name", ENDINGS)
@parametrize("nested", [False, True])
def test_sqlite_a_transaction_that_the_database_ends_is_over(
    sqlite_store: Store, name: str, nested: bool
) -> None:
    statement, preparation = ENDINGS[name]
    with sqlite_store.transaction() as tx:
        tx.execute("CREATE TABLE mine(id INTEGER PRIMARY KEY)")
        tx.execute("INSERT INTO mine VALUES (1)")
        tx.execute(preparation)

    def strike(tx: Any) -> None:
        raises(
            StorageError,
            lambda: tx.execute(statement),
            lambda: write(sqlite_store, "e1"),
            sqlite_store.events.read_all,
            lambda: tx.execute("SELECT 1"),
        )

    with pytest.raises(StorageError), sqlite_store.transaction() as tx:
        write(sqlite_store, "e1")
        if nested:
            with pytest.raises(StorageError), sqlite_store.transaction() as inner:
                strike(inner)
        strike(tx)
    assert sqlite_store.events.read_all() == []
    assert write(sqlite_store, "e1") == 1
    assert execute(sqlite_store, "SELECT id FROM mine") == [(1,)]


def test_comments_before_a_statement_are_read_once() -> None:
    child = """
with flowstore.open(":memory:") as store, store.transaction() as tx:
    for text in ("/* one */ -- two\\n" * 1000, "/**/" * 1000, "--\\n" * 1000, "/* " * 1000 + "*/"):
        print(tx.execute(text + "SELECT 1"))
        try:
            tx.execute(text + "PRAGMA user_version")
        except flowstore.StorageError as error:
            print("refused")
"""
    process = script(child)
    try:
        assert process.communicate(timeout=60)[0].split() == ["[(1,)]", "refused"] * 4
    finally:
        process.kill()


LEAVING = [
    "BEGIN",
    "BEGIN IMMEDIATE",
    "COMMIT",
    "END",
    "ROLLBACK",
    "ROLLBACK TO a",
    "SAVEPOINT a",
    "RELEASE a",
    "ATTACH DATABASE ':memory:' AS other",
    "VACUUM",
    "PRAGMA user_version = 7",
]


@parametrize(
    "disguise",
    [
        "{}",
        " \n\t{}",
        "/* a comment */{}",
        "-- a comment\n{}",
        "{};",
        ";{}",
        "\ufeff{}",
        "/**/ -- */\n{}",
        "SELECT 1; {}",
    ],
)
def test_statements_that_end_or_leave_the_transaction_are_refused(
    store: Store, disguise: str
) -> None:
    with pytest.raises(Stop), store.transaction() as tx:
        write(store, "e1")
        for word in LEAVING:
            for sql in (disguise.format(word), disguise.format(word.lower())):
                refused(partial(tx.execute, sql), partial(tx.executemany, sql, [()]))
        assert write(store, "e1") == 2
        raise Stop
    assert not store.events.execution_exists("e1")


HIDING = {
    "table": "CREATE TEMP TABLE events AS SELECT * FROM events WHERE is_processed = 0",
    "table in capitals": "CREATE TEMP TABLE EVENTS (id TEXT)",
    "if not exists": "create temporary table if not exists flowstore_log (id TEXT)",
    "schema": "CREATE TABLE temp.flows (id TEXT)",
    "schema, commented": "CREATE /* a */ TABLE -- b\n Temp /*c*/ . /*d*/ scheduled_commands (id TEXT)",
    "quoted schema": 'CREATE TABLE "temp" . "flow_steps" (id TEXT)',
    "other case": 'CREATE TEMP TABLE "FlowStore_Work_Items" (id TEXT)',
    "brackets": "CREATE TEMP TABLE [events] (id TEXT)",
    "view": "CREATE TEMPORARY VIEW flowstore_meta AS SELECT 1 AS key, 2 AS value",
    "trigger": "CREATE TEMP TRIGGER t BEFORE INSERT ON main.flowstore_log BEGIN SELECT RAISE(IGNORE); END",
    "trigger without a schema": "CREATE TEMP TRIGGER t AFTER UPDATE ON flows BEGIN SELECT 1; END",
    "trigger's name": "CREATE TRIGGER events AFTER INSERT ON scratch BEGIN SELECT 1; END",
    "renamed": "ALTER TABLE scratch RENAME TO events",
    "renamed, schema": 'ALTER TABLE temp."scratch" RENAME TO "Events"',
}


HIDING_ON_A_SERVER = {
    how: HIDING[how] for how in ("table", "table in capitals", "if not exists", "view", "renamed")
} | {
    "schema": "CREATE TABLE pg_temp.flows (id TEXT)",
    "local": 'CREATE LOCAL TEMPORARY TABLE "events" (id TEXT)',
    "into": "SELECT * INTO /* a */ TEMP events FROM events",
}


@parametrize("how", sorted({*HIDING, *HIDING_ON_A_SERVER}))
@parametrize("nested", [False, True])
def test_a_temporary_table_view_or_trigger_that_hides_a_table_of_flowstores_is_refused(
    store: Store, how: str, nested: bool
) -> None:
    sql = (HIDING_ON_A_SERVER if on_postgres(store) else HIDING).get(how)
    if sql is None:
        return  # it is for the other engine
    store.workflows.create_event(Event(id="e1", event_name="paid", event_key="7"))
    with ExitStack() as stack:
        tx = stack.enter_context(store.transaction())
        tx.execute("CREATE TEMP TABLE scratch (id TEXT)")
        if nested:
            tx = stack.enter_context(store.transaction())
        with pytest.raises(StorageError, match="flowstore's"):
            tx.execute(sql)
        with pytest.raises(StorageError):
            tx.executemany(sql, [()])
        assert tx.execute("SELECT * FROM scratch") == []
        store.workflows.create_event(Event(id="e2", event_name="paid", event_key="7"))
        write(store, "e")
        with pytest.raises(NotFound):
            store.flows.append_event("f", "k", {})
    assert store.workflows.get_events("paid", "7") == ["e1", "e2"]
    assert store.events.count_events("e") == 1
    assert store.flows.insert(Flow(id="f")) == store.flows.get("f")


def test_something_temporary_of_another_name_is_the_users_own(store: Store) -> None:
    with store.transaction() as tx:
        tx.execute("CREATE TEMP TABLE scratch AS SELECT * FROM events")
        tx.execute("CREATE INDEX events_of_mine ON scratch (event_name)")
        tx.execute("CREATE TEMP VIEW paid AS SELECT * FROM events WHERE event_name = 'paid'")
        tx.execute("ALTER TABLE scratch RENAME TO temporary_events")
        if not on_postgres(store):
            tx.execute("CREATE TRIGGER t AFTER INSERT ON temporary_events BEGIN SELECT 1; END")
            tx.execute("CREATE INDEX temp.flows ON temporary_events (id)")
        tx.execute("INSERT INTO temporary_events SELECT * FROM events")
        store.workflows.create_event(Event(id="e1", event_name="paid", event_key="7"))
        assert tx.execute("SELECT id FROM paid") == [("e1",)]


@postgres_only
def test_what_a_function_on_a_server_makes_temporarily_hides_nothing(server: Store) -> None:
    with server.transaction() as tx:
        tx.execute("DO $$ BEGIN EXECUTE 'CREATE TEM' || 'P TABLE events (id TEXT)'; END $$")
        server.workflows.create_event(Event(id="e1", event_name="paid", event_key="7"))
    assert server.workflows.get_events("paid", "7") == ["e1"]


def test_the_users_sql_returns_its_rows_as_tuples(store: Store) -> None:
    with store.transaction() as tx:
        assert tx.execute("CREATE TABLE mine(id INTEGER PRIMARY KEY, name TEXT)") == []
        assert tx.execute("INSERT INTO mine VALUES (?, ?) RETURNING id", (1, "one")) == [(1,)]
        tx.executemany("INSERT INTO mine VALUES (?, ?)", ((number, "?") for number in (2, 3)))
        assert tx.execute("SELECT id, name FROM mine ORDER BY id") == [
            (1, "one"),
            (2, "?"),
            (3, "?"),
        ]
        assert tx.execute("SELECT id FROM mine WHERE name = '?' AND id > ? ORDER BY id", [2]) == [
            (3,)
        ]
        tx.execute("ALTER TABLE mine ADD COLUMN more TEXT")
        tx.execute("DROP TABLE mine")


@parametrize(
    ("sql", "parameters"),
    [
        ("SELEC 1", ()),
        ("", ("x",)),
        ("SELECT * FROM no_such_table", ()),
        ("SELECT ?", ()),
        ("SELECT ?", (1, 2)),
        ("SELECT ?", (object(),)),
        ("SELECT ?", (2**70,)),
        ("SELECT ?", (NOT_UTF8,)),
        ("SELECT '" + NOT_UTF8 + "'", ()),
        ("SELECT 1\0", ()),
        ("SELECT ?", 5),
        (None, ()),
        (b"SELECT 1", ()),
        ("INSERT INTO mine VALUES (1); INSERT INTO mine VALUES (2)", ()),
    ],
)
def test_an_error_in_the_users_sql_is_a_flowstore_error_and_undoes_that_call_alone(
    store: Store, sql: Any, parameters: Any
) -> None:
    if parameters == (2**70,) and on_postgres(store):
        return  # its numbers have no end
    with store.transaction() as tx:
        tx.execute("CREATE TABLE mine(id INTEGER)")
        with pytest.raises((StorageError, InvalidData)):
            tx.execute(sql, parameters)
        with pytest.raises((StorageError, InvalidData)):
            tx.executemany(sql, [parameters])
        write(store, "e1")
        assert tx.execute("SELECT id FROM mine") == []
    assert store.events.count_events("e1") == 1


def test_the_drivers_error_is_the_cause(store: Store) -> None:
    with store.transaction() as tx, pytest.raises(StorageError) as caught:
        tx.execute("SELECT * FROM no_such_table")
    assert caught.value.__cause__ is not None
    assert "no_such_table" in str(caught.value)


@parametrize("fails", [False, True])
def test_the_transaction_cannot_be_used_after_the_block(store: Store, fails: bool) -> None:
    try:
        with store.transaction() as tx:
            if fails:
                raise Stop
    except Stop:
        pass
    uses: list[Call] = [
        lambda: tx.execute("SELECT 1"),
        lambda: tx.executemany("SELECT ?", [(1,)]),
    ]
    refused(*uses)
    with store.transaction():
        refused(*uses)


def test_waiting_counts_as_0_inside_a_transaction(store: Store) -> None:
    with store.transaction():
        assert store.state.claim_work_item("w1", ["q"], wait=3600) is None


def test_threads_with_transactions_of_their_own_keep_apart_and_lose_no_update(
    make_store: MakeStore,
) -> None:
    store = make_store(busy_timeout=60)
    execute(store, "CREATE TABLE counter (n INTEGER)")
    execute(store, "INSERT INTO counter VALUES (0)")

    def block(undone: bool) -> None:
        with suppress(Stop), store.transaction() as tx:
            [(count,)] = tx.execute("SELECT n FROM counter")
            last = store.events.get_latest_sequence("e1") or 0
            assert write(store, "e1") == last + 1
            assert write(store, "e1") == last + 2
            tx.execute("UPDATE counter SET n = ?", (count + 1,))
            if undone:
                raise Stop

    def work(number: int) -> None:
        for turn in range(20):
            again(partial(block, bool((number + turn) % 2)))

    crowd(8, work)
    assert [stored.sequence for stored in store.events.load_events("e1")] == list(range(1, 161))
    assert execute(store, "SELECT n FROM counter") == [(80,)]


def test_a_full_disk_inside_a_block_undoes_all_of_it_and_ends_it(file_store: Store) -> None:
    write(file_store, "run", "before")
    limit_pages(file_store, 4)
    with (
        pytest.raises(StorageError),
        file_store.transaction() as tx,
    ):  # its end raises as well
        write(file_store, "run", "small")
        with pytest.raises(flowstore.StoreFull):
            file_store.events.append("run", "default", event("large", text="x" * 200_000))
        refused(
            lambda: write(file_store, "run", "late"),
            lambda: file_store.events.load_events("run"),
            lambda: tx.execute("SELECT 1"),
        )
    assert keys(file_store, "run") == ["before"]
    limit_pages(file_store, None)
    write(file_store, "run", "after")
    assert keys(file_store, "run") == ["before", "after"]


def test_waiting_for_another_threads_transaction_ends_in_store_busy_with_nothing_written(
    target: str,
) -> None:
    with flowstore.open(target, busy_timeout=0.05) as store:
        with store.transaction():
            write(store, "run", "mine")
            calls: list[Call] = [
                partial(write, store, "run", "other"),
                partial(write_pair_in_block, store, "run", "other"),
                partial(store.state.claim_work_item, "w", ["q"]),
            ]
            if on_postgres(store):  # a claim does not meet an append there
                calls.pop()
            if target == ":memory:":  # where readers wait too
                calls.append(partial(store.events.load_events, "run"))
            results = outcomes(calls)
            assert [type(result) for result in results] == [StoreBusy] * len(calls), results
        assert keys(store, "run") == ["mine"]
        assert outcomes([partial(write, store, "run", "later")]) == [2]


@sqlite_only
def test_without_a_transaction_or_another_process_nobody_is_ever_busy(target: str) -> None:
    with flowstore.open(target, busy_timeout=0.0) as store:

        def work(me: int) -> None:
            for number in range(30):
                write_pair(store, "run", f"{me}.{number}")
                pairs(store, "other")

        crowd(8, work)
        assert len(pairs(store, "run")) == 240


def test_a_block_that_rolled_back_and_a_refused_call_leave_the_file_to_other_processes(
    path: Path,
) -> None:
    with flowstore.open(path) as store, flowstore.open(path, busy_timeout=0) as other:
        with pytest.raises(Stop), store.transaction():
            store.flows.insert(Flow(id="f"))
            raise Stop
        other.flows.insert(Flow(id="f"))
        with pytest.raises(AlreadyExists):
            store.flows.insert(Flow(id="f"))
        other.flows.insert(Flow(id="g"))
        raises(
            SequenceConflict,
            lambda: store.events.append("e1", "default", EVENT, expected_sequence=5),
        )
        assert write(other, "e2") == 1


def test_a_block_whose_end_is_never_run_is_rolled_back_and_frees_the_writer(store: Store) -> None:
    entered = threading.Event()
    leave = threading.Event()

    def lose() -> None:
        lost = ExitStack()
        lost.enter_context(store.transaction())
        write(store, "run", "lost")
        entered.set()
        leave.wait(WATCHDOG)
        lost.pop_all()

    loser = Caller(lose)
    assert entered.wait(WATCHDOG)
    waiting = Caller(write, store, "run", "waited")
    until(waiting.waits)
    leave.set()
    assert loser.outcome() is None
    assert waiting.outcome() == 1
    lose()
    assert Caller(write_pair_in_block, store, "run", "another thread").outcome() is None
    assert write(store, "run", "the same thread") == 4
    assert "lost" not in keys(store, "run")


@swallows
@parametrize("call", [write_pair, write_pair_in_block])
@sqlite_only
def test_an_interrupt_caught_inside_a_block_leaves_all_or_nothing_of_the_call_and_the_block_usable(
    store: Store, call: Callable[[Store, str, str], Any]
) -> None:
    with store.transaction():
        places = steps(partial(call, store, "run", "dry"))
    with store.transaction():
        for place in places:
            striker = Striker(place)
            done = striker.run(partial(call, store, "run", f"{place}"))
            try:
                write_pair(store, "run", f"{place}, after")
            except StorageError as error:
                raise AssertionError(f"{error} after a strike at\n{striker.where}") from error
            assert not done or f"{place}" in pairs(store, "run")
    there = Caller(pairs, store, "run").outcome()
    assert set(there) >= {f"{place}, after" for place in places}


def fail_nested(store: Store, tx: flowstore.Transaction, key: int) -> None:
    """A nested block that an exception leaves."""
    with suppress(Stop), store.transaction():
        tx.execute("INSERT INTO mine VALUES (?)", (key,))
        tx.execute("INSERT INTO mine VALUES (?)", (-key,))
        raise Stop


def fail_many(store: Store, tx: flowstore.Transaction, key: int) -> None:
    """A call that fails after some of its rows were written."""
    with suppress(StorageError):
        tx.executemany("INSERT INTO mine VALUES (?)", [(key,), (-key,), (0,)])


@swallows
@parametrize("call", [fail_nested, fail_many])
@sqlite_only
def test_an_interrupt_at_any_step_of_what_fails_inside_a_block_keeps_nothing_of_it(
    store: Store, call: Callable[[Store, flowstore.Transaction, int], None]
) -> None:
    execute(store, "CREATE TABLE mine(id INTEGER PRIMARY KEY)")
    execute(store, "INSERT INTO mine VALUES (0)")
    with store.transaction() as tx:
        places = steps(partial(call, store, tx, 1))
    for place in places:
        striker = Striker(place)
        with store.transaction() as tx:
            striker.run(partial(call, store, tx, place))
        found = execute(store, "SELECT id FROM mine")
        assert found == [(0,)], f"{found} after a strike at\n{striker.where}"


# ----------------------------------------------------------------------------------------------- isolation


def test_nobody_else_sees_a_transaction_before_its_commit(file_store: Store) -> None:

    def seen() -> Any:
        return Caller(lambda: (keys(file_store, "run"), file_store.events.execution_exists("run"),
                               file_store.state.list_work_items())).outcome()  # fmt: skip

    with pytest.raises(ZeroDivisionError), file_store.transaction():
        write(file_store, "run", "never")
        file_store.state.enqueue_work_item(WorkItem(execution_id="run", queue_type="q"))
        assert keys(file_store, "run") == ["never"]
        assert seen() == ([], False, [])
        raise ZeroDivisionError
    assert seen() == ([], False, [])
    with file_store.transaction():
        write(file_store, "run", "one")
        write(file_store, "run", "two")
        assert keys(file_store, "run") == ["one", "two"]
        assert seen() == ([], False, [])
    assert seen() == (["one", "two"], True, [])


def test_a_thread_that_inherits_the_context_does_not_join_the_transaction(path: Path) -> None:
    with flowstore.open(path, busy_timeout=0.05) as store, store.transaction():
        write(store, "run", "mine")
        context = contextvars.copy_context()
        assert Caller(lambda: context.run(keys, store, "run")).outcome() == []
        result = Caller(lambda: context.run(write, store, "run", "no")).outcome()
        assert isinstance(result, StoreBusy), result
        assert keys(store, "run") == ["mine"]


def block_in_a_touched_file(path: str, locks: str) -> None:
    """Prints what became of a transaction block in which the file was touched; goes on with another write."""
    if locks == "lost":
        switch_linux_locks_off()
    store = flowstore.open(path, busy_timeout=5.0)
    write(store, "ours", "before")
    try:
        with store.transaction():
            write(store, "ours", "first")
            touch(path, "open")
            say("inside")
            told()
            write(store, "ours", "second")
        say("stored")
    except StorageError as error:
        say(error)
    write(store, "ours", "after")
    os._exit(0)


@posix
@parametrize("locks", [pytest.param("kept", marks=linux), "lost"])
def test_a_transaction_block_whose_log_has_gone_is_an_error_that_says_where_it_is_in_doubt(
    path: Path, locks: str
) -> None:
    with Process(block_in_a_touched_file, path, locks) as keeper:
        assert keeper.read() == "inside"
        with flowstore.open(path) as store:  # it reads, and takes itself for the last one
            assert keys(store, "ours") == ["before"]
        keeper.tell()
        outcome = keeper.read()
        keeper.finish()
    found = in_file(path, run="ours")
    whole, nothing = ["before", "first", "second", "after"], ["before", "after"]
    assert found in (whole, nothing), outcome
    if outcome == "stored" or locks == "kept":
        assert (outcome, found) == ("stored", whole)
    elif "doubt" not in outcome:
        assert found == nothing, outcome


def killed_in_a_block(path: str) -> None:
    store = flowstore.open(path)
    with store.transaction():
        for number in range(50):
            store.events.append("run", "default", event(str(number), text="x" * 100_000))
        say("open")
        told()


@needs_kill
def test_a_transaction_whose_process_is_killed_is_gone_and_blocks_nobody(path: Path) -> None:
    with flowstore.open(path) as store:
        write(store, "run", "before")
        with Process(killed_in_a_block, path) as child:
            assert child.read() == "open"
            assert keys(store, "run") == ["before"]
            waiting = Caller(write, store, "run", "after")
            until(waiting.waits)
            child.kill()
        assert waiting.outcome() == 2
        assert keys(store, "run") == ["before", "after"]


def test_close_rolls_back_another_threads_transaction_whose_rest_raises_store_closed(
    path: Path,
) -> None:
    store = flowstore.open(path)
    write(store, "run", "before")
    opened, leave = threading.Event(), threading.Event()
    inside: list[type] = []

    def hold() -> None:
        with store.transaction() as tx:
            write(store, "run", "undone")
            opened.set()
            leave.wait(WATCHDOG)
            calls: list[Call] = [
                partial(write, store, "run", "late"),
                partial(store.events.load_events, "run"),
                partial(tx.execute, "SELECT 1"),
            ]
            for call in calls:
                try:
                    call()
                except Exception as error:
                    inside.append(type(error))

    holding = Caller(hold)
    assert opened.wait(WATCHDOG)
    queued = Caller(write, store, "run", "queued")
    until(queued.waits)
    store.close()
    leave.set()
    assert type(holding.outcome()) is StoreClosed
    assert inside == [StoreClosed] * 3
    result = queued.outcome()
    assert result == 2 or type(result) is StoreClosed, result
    assert in_file(path) == (["before", "queued"] if result == 2 else ["before"])


def test_a_read_only_transaction_is_one_snapshot_that_waits_for_no_writer(store: Store) -> None:
    write(store, "e1")
    if store.target != ":memory:":
        with store.transaction(read_only=True):
            in_thread(lambda: write(store, "other"))
            assert store.events.count_events("other") == 0  # of its begin, not of its first read
    execute(store, "CREATE TABLE mine (id INTEGER PRIMARY KEY)")
    with store.transaction(read_only=True) as tx:
        assert store.events.count_events("e1") == 1
        raises(
            StorageError,
            lambda: tx.execute("INSERT INTO mine VALUES (1)"),
            lambda: store.transaction().__enter__(),
            lambda: store.transaction(read_only=True).__enter__(),
        )
        with pytest.raises(StorageError, match="the transaction is read-only"):
            write(store, "e1")
        if store.target != ":memory:":
            in_thread(lambda: write(store, "e1"))
        assert store.events.count_events("e1") == 1
        assert tx.execute("SELECT COUNT(*) FROM mine") == [(0,)]
    with store.transaction(), pytest.raises(StorageError), store.transaction(read_only=True):
        pass
    assert write(store, "e1") >= 2
    execute(store, "INSERT INTO mine VALUES (1)")
    with pytest.raises(InvalidData, match="read_only"):
        store.transaction(read_only=1)  # type: ignore[arg-type]


def read_in_block(store: Store) -> None:
    with store.transaction(read_only=True):
        store.flows.get("f")


@swallows
def test_a_memory_store_can_be_written_again_wherever_a_read_only_transaction_was_struck() -> None:
    with flowstore.open(":memory:", busy_timeout=1) as store:
        for place in steps(partial(read_in_block, store)):
            striker = Striker(place)
            striker.run(partial(read_in_block, store))
            try:
                write(store, "run")
                read_in_block(store)
                store.compact()
            except StorageError as error:
                raise AssertionError(f"{error} after a strike at\n{striker.where}") from error


def test_a_read_only_transaction_begins_while_another_one_writes(path: Path) -> None:
    with flowstore.open(path, synchronous="OFF") as store:
        write(store, "e1")
        with store.transaction():
            write(store, "e1")

            def read() -> int:
                with store.transaction(read_only=True):
                    return store.events.count_events("e1")

            assert in_thread(read) == 1


def test_an_async_read_only_transaction_waits_for_no_writer(path: Path) -> None:
    async def main() -> None:
        async with flowstore.open_async(path, synchronous="OFF") as store:
            await write(store, "e1")
            entered, leave = asyncio.Event(), asyncio.Event()

            async def read() -> int:
                async with store.transaction(read_only=True):
                    entered.set()
                    await leave.wait()
                    with pytest.raises(StorageError):
                        await write(store, "e1")
                    return await store.events.count_events("e1")

            reader = asyncio.create_task(read())
            await entered.wait()
            await asyncio.wait_for(write(store, "e1"), 30)
            leave.set()
            assert await reader in (1, 2)  # its snapshot begins with the first read
            assert await store.events.count_events("e1") == 2

    asyncio.run(main())


# ==================================================================================================
# Fork
# ==================================================================================================


def struck_in_hooks(path: str, kind: str) -> None:
    leave(partial(strike_forks, path, kind))


def signalled_fork(path: str, kind: str, busy: str) -> None:
    """A signal's handler raises while a fork waits for a statement that another thread executes."""
    store = flowstore.open(path, synchronous="OFF", busy_timeout=2.0)
    main, raised = threading.get_ident(), list[bool]()
    begun = threading.Event()

    def handler(*_: object) -> None:
        raised.append(True)
        raise STRIKES_WITH[kind]

    def long_block() -> None:
        with store.transaction() as tx:
            write_pair(store, "run", "busy")
            begun.set()
            numbers = "WITH n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 2000000)"
            tx.execute(f"{numbers} SELECT MAX(i) FROM n")

    def long_write() -> None:
        begun.set()
        store.events.append_batch("run", "default", [event("busy"), event("busy")] * 20_000)

    def interrupt() -> None:
        def in_hook() -> bool:
            frame: FrameType | None = sys._current_frames()[main]
            while frame is not None and frame.f_code.co_filename != flowstore.__file__:
                frame = frame.f_back
            return frame is not None

        until(in_hook, "for the fork to wait", 20)
        time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGUSR1)

    signal.signal(signal.SIGUSR1, handler)
    other = Caller(long_block if busy == "block" else long_write)
    assert begun.wait(20)
    until(other.waits, "for the statement to be executed", 20)
    interrupter = Caller(interrupt)

    def use(key: str) -> None:
        """Other threads write, too, wherever nothing is open."""
        calls: list[Call] = [partial(write_pair, store, "run", key)]
        found = outcomes([*calls, partial(write_pair_in_block, store, "run", f"{key}+")])
        assert not [result for result in found if isinstance(result, BaseException)], found

    pid = os.fork()
    if pid == 0:
        if busy == "write":
            leave(partial(use, "child"))
        write_in_child("child", store)
    signal.alarm(WATCHDOG // 2)
    status = reap_within(20, pid, f"{raised and 'the hook'}")
    assert raised, "the fork waited for nothing"
    assert interrupter.outcome(20) is None
    assert other.outcome(20) is None
    use("after")
    there = set(pairs(store, "run")) if busy == "block" else set(keys(store, "run"))
    of_child = {"child", "child+"} if busy == "write" else {"child"} if status == 0 else set()
    assert there == {"busy", "after", "after+"} | of_child, there
    assert status == 0 or (status, busy) == (3, "block")
    os._exit(0)


# ---------------------------------------------------------------------------------------------------- fork


def forks_among_writers(path: str) -> None:
    store = flowstore.open(path)
    stop = threading.Event()
    acknowledged: list[list[str]] = [[] for _ in range(3)]

    def work(me: int) -> None:
        while not stop.is_set():
            key = f"{me}.{len(acknowledged[me])}"
            write_pair(store, "run", key)
            acknowledged[me].append(key)
            assert key in pairs(store, "run")

    def child(number: int) -> None:
        for n in range(3):
            write_pair(store, "child", f"{number}.{n}")
        known = {key for mine in acknowledged for key in mine}
        assert known <= set(pairs(store, "run")), (
            "the child misses what was acknowledged before the fork"
        )
        if number % 2:
            store.close()

    def go_on(count: int) -> None:
        """Lets each thread write some more."""
        aims = [len(mine) + count for mine in acknowledged]

        def enough() -> bool:
            return all(len(mine) >= aim for mine, aim in zip(acknowledged, aims, strict=True))

        until(lambda: enough() or not all(map(Caller.is_alive, callers)))

    callers = [Caller(work, me) for me in range(3)]
    pids = []
    for number in range(12):
        assert [caller.met for caller in callers] == [None] * 3
        go_on(3)
        pids.append(forked(partial(child, number)))
        if number % 3 == 2:
            reap(pids.pop(0))
    for pid in pids:
        reap(pid)
    go_on(3)
    stop.set()
    assert [caller.outcome() for caller in callers] == [None] * 3
    assert sorted(pairs(store, "child")) == sorted(
        f"{number}.{n}" for number in range(12) for n in range(3)
    )
    assert sorted(pairs(store, "run")) == sorted(key for mine in acknowledged for key in mine)
    store.close()
    print(sum(map(len, acknowledged)))


@forking
def test_forks_while_other_threads_read_and_write_lose_nothing_on_either_side(path: Path) -> None:
    count = int(in_child(forks_among_writers, path))
    assert len(in_file(path, pairs)) == count
    assert len(in_file(path, pairs, "child")) == 36


def forks_among_openers(path: str) -> None:
    """Each child has a store of its own, while the parent's threads open, write and close others."""
    stop = threading.Event()
    acknowledged: list[str] = []

    def work(me: int) -> None:
        number = 0
        while not stop.is_set():
            number += 1
            with flowstore.open(path) as store:
                write_pair(store, "run", f"{me}.{number}")
            acknowledged.append(f"{me}.{number}")

    def child(number: int) -> None:
        with flowstore.open(path) as store:
            for n in range(10):
                write_pair(store, "run", f"child{number}.{n}")
                time.sleep(random.random() * 0.01)

    callers = [Caller(work, me) for me in range(2)]
    pids = []
    for number in range(16):
        time.sleep(random.random() * 0.02)
        assert [caller.met for caller in callers] == [None] * 2
        pids.append(forked(partial(child, number)))
        acknowledged += [f"child{number}.{n}" for n in range(10)]
    for pid in pids:
        reap(pid)
    stop.set()
    assert [caller.outcome() for caller in callers] == [None] * 2
    missing = set(acknowledged) - set(in_file(path, pairs))
    assert not missing, missing


@forking
def test_forks_while_other_threads_open_and_close_stores_lose_nothing_on_either_side(
    path: Path,
) -> None:
    in_child(forks_among_openers, path)


@forking
@parametrize("kind", [*KINDS, "call"])
def test_what_strikes_a_fork_at_any_step_leaves_both_sides_working_and_loses_no_write(
    path: Path, kind: str
) -> None:
    in_child(struck_in_hooks, path, kind)


@forking
@parametrize("busy", ["block", "write"])
@parametrize("kind", STRIKES_WITH)
def test_a_signal_handler_that_raises_while_a_fork_waits_leaves_no_child_that_hangs(
    path: Path, kind: str, busy: str
) -> None:
    in_child(signalled_fork, path, kind, busy)
    in_file(path)


def fork_while_one_waits(path: str) -> None:
    store = flowstore.open(path)
    write(store, "run", "known")

    def enqueue_in_child() -> None:
        assert store.state.claim_work_item("child", ["q"]) is None
        store.state.enqueue_work_item(WorkItem(execution_id="run", queue_type="q"))

    def wait_in_child() -> None:
        assert claim(store, worker="child", wait=10 * WATCHDOG).worker_id == "child"

    waiter = Caller(lambda: claim(store, worker="parent", wait=10 * WATCHDOG))
    until(waiter.waits)
    reap(forked(enqueue_in_child))
    assert waiter.result().worker_id == "parent"
    pid = forked(wait_in_child)
    store.state.enqueue_work_item(WorkItem(execution_id="run", queue_type="q"))
    reap(pid)


@forking
def test_a_fork_while_a_claim_waits_leaves_both_sides_working_and_waking_each_other(
    path: Path,
) -> None:
    in_child(fork_while_one_waits, path)


def fork_as_a_read_ends(path: str) -> None:
    store = flowstore.open(path)
    write(store, "run", "known")
    at_its_end = threading.Event()
    check_in = flowstore._Pool.check_in

    def slowly(pool: Any, connection: Any) -> None:
        at_its_end.set()
        time.sleep(0.2)  # in which the fork begins
        check_in(pool, connection)

    flowstore._Pool.check_in = slowly  # type: ignore[assignment]
    reader = Caller(store.stats)
    at_its_end.wait(WATCHDOG)
    reap(forked(lambda: write(store, "run", "child")))
    reader.result()


@forking
def test_a_fork_at_the_very_end_of_a_read_takes_that_for_no_transaction(path: Path) -> None:
    in_child(fork_as_a_read_ends, path)


def fork_beside_a_transaction(path: str) -> None:
    store = flowstore.open(path)
    write(store, "run", "before")
    opened, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with store.transaction():
            for _ in range(
                40
            ):  # more than the cache holds, so that some of it is in the WAL already
                store.events.append("run", "default", event("first", text="x" * 100_000))
            opened.set()
            leave.wait(WATCHDOG)
            write(store, "run", "second")

    def child(end: str) -> None:
        os.symlink(path, f"{path}.{end}")
        refused(
            lambda: write(store, "run", "child"),
            lambda: store.events.load_events("run"),
            lambda: store.state.claim_work_item("w", ["q"], wait=5.0),
            store.transaction().__enter__,
            store.stats,
            store.check,
            lambda: flowstore.open(path).events.load_events("run"),
            lambda: flowstore.open(f"{path}.{end}").events.load_events("run"),
        )
        with flowstore.open(f"{path}.other.{end}") as other:  # another file is nobody's transaction
            assert write(other, "run", "child") == 1
        if end == "close":
            with suppress(StorageError):
                store.close()

    holder = Caller(hold)
    assert opened.wait(WATCHDOG)
    queued = Caller(lambda: write(store, "run", "queued"))
    until(queued.waits)
    for end in ("leave", "close"):
        reap(forked(partial(child, end)))
    pid = os.fork()
    if not pid:
        sys.exit(0)  # as an interpreter ends that knows nothing of all this
    reap(pid)
    assert [holder.is_alive(), queued.is_alive()] == [True, True]
    leave.set()
    assert [holder.outcome(), queued.outcome()] == [None, 43]
    assert keys(store, "run") == ["before", *["first"] * 40, "second", "queued"]
    store.close()


@forking
def test_a_transaction_open_at_a_fork_stays_the_parents_and_the_child_is_refused_the_file(
    path: Path,
) -> None:
    in_child(fork_beside_a_transaction, path)
    assert in_file(path) == ["before", *["first"] * 40, "second", "queued"]


def fork_inside_a_transaction(path: str, leave: str) -> None:
    store = flowstore.open(path)
    pid = -1
    try:
        with store.transaction() as tx:
            for _ in range(40):
                store.events.append("run", "default", event("first", text="x" * 100_000))
            pid = os.fork()
            if pid == 0:
                signal.alarm(WATCHDOG // 2)
                refused(
                    lambda: write(store, "run", "child"),
                    lambda: store.events.load_events("run"),
                    lambda: tx.execute("CREATE TABLE mine (n INTEGER)"),
                    lambda: flowstore.open(path).events.load_events("run"),
                )
                if leave == "by sys.exit":
                    sys.exit(0)
                if leave == "by an error":
                    raise ZeroDivisionError
            else:
                reap(pid)  # while the block is still open here
                write(store, "run", "second")
    except (StorageError, ZeroDivisionError) as error:
        expected = ZeroDivisionError if leave == "by an error" else StorageError
        os._exit(0 if pid == 0 and isinstance(error, expected) else 1)
    if pid == 0:
        os._exit(1)  # the end of the block must not look like a commit
    assert keys(store, "run") == [*["first"] * 40, "second"]
    store.close()


@forking
@parametrize("leave", ["by its end", "by an error", "by sys.exit"])
def test_a_child_forked_inside_a_transaction_neither_commits_nor_undoes_it(
    path: Path, leave: str
) -> None:
    in_child(fork_inside_a_transaction, path, leave)
    assert in_file(path) == [*["first"] * 40, "second"]


def memory_fork() -> None:
    def work(me: int) -> None:
        number = 0
        while not stop.is_set():
            number += 1
            write_pair(store, f"load{me}.{number // 50}", f"{number}")

    def child(number: int) -> None:
        assert pairs(store, "run") == ["before"]
        write_pair(store, "run", f"child{number}")
        assert pairs(store, "run") == ["before", f"child{number}"]
        for me in range(3):
            pairs(store, f"load{me}.0")
        store.close()

    store = flowstore.open(":memory:")
    stop = threading.Event()
    write_pair(store, "run", "before")
    callers = [Caller(work, me) for me in range(3)]
    for number in range(6):
        reap(forked(partial(child, number)))
    stop.set()
    assert [caller.outcome() for caller in callers] == [None] * 3
    write_pair(store, "run", "after")
    assert pairs(store, "run") == ["before", "after"]
    store.close()


@forking
def test_a_memory_store_forks_into_two_independent_ones() -> None:
    in_child(memory_fork)


@forking
def test_a_memory_store_forked_inside_a_read_only_transaction_can_be_written_in_the_child() -> None:
    with flowstore.open(":memory:") as store:
        entered, leave = threading.Event(), threading.Event()

        def hold() -> None:
            with store.transaction(read_only=True):
                entered.set()
                leave.wait(WATCHDOG)

        holding = Caller(hold)
        assert entered.wait(WATCHDOG)
        assert in_fork(lambda: write(store, "run")) == 1
        leave.set()
        assert holding.outcome() is None


def fork_beside_a_waiting_call_and_a_generator(path: str) -> None:
    store = flowstore.open(path)
    walk = store.events.iter_events("run", chunk=2)
    assert next(walk).event["key"] == "0"

    def child() -> None:
        assert [stored.event["key"] for stored in walk] == [str(n) for n in range(1, 9)]
        os.write(1, b"forked\n")
        write(store, "queue", "child")

    waiting = Caller(
        lambda: write(store, "queue", "parent")
    )  # another process has a transaction open
    until(waiting.waits)
    pid = forked(child)
    assert [stored.event["key"] for stored in walk] == [str(n) for n in range(1, 9)]
    reap(pid)
    assert isinstance(waiting.outcome(), int), waiting.outcome()
    assert sorted(keys(store, "queue")) == ["child", "parent"]


@forking
def test_a_fork_waits_neither_for_a_call_that_waits_nor_for_a_generator_between_two_items(
    path: Path,
) -> None:
    with flowstore.open(path) as store, ExitStack() as stack:
        for number in range(9):
            write(store, "run", str(number))
        with store.transaction():
            process = stack.enter_context(Process(fork_beside_a_waiting_call_and_a_generator, path))
            assert process.read() == "forked"
        process.finish()


def fork_with_two_copies(path: str, how: str) -> None:
    """One side of a fork goes on with one store, or both, while the other side closes one, or both."""
    choices = [[0]] if how == "one copy" else [[0], [1], [0, 1]]
    trials = [*itertools.product(choices, choices, ["parent", "child"])]
    paths = [f"{path}{number}" for number in range(len(trials))]
    stores_of = stores_of_two_copies(how, *paths)

    def trial(number: int, users: list[int], closers: list[int], closing: str) -> None:
        stores = stores_of[number]
        to_user, to_closer = os.pipe(), os.pipe()

        def use() -> None:
            for user in users:
                write(stores[user], "run", f"{user} early")
            os.write(to_closer[1], b"x")
            os.read(to_user[0], 1)
            for user in users:
                write(stores[user], "run", f"{user} late")

        def close() -> None:
            os.read(to_closer[0], 1)
            for closer in closers:
                stores[closer].close()
            os.write(to_user[1], b"x")

        for store in stores:
            write(store, "run", "before")
        pid = forked(use if closing == "parent" else close)
        (close if closing == "parent" else use)()
        what = f"store {users} used, {closers} closed in the {closing}"
        assert reap_within(10, pid, what) == 0
        early_and_late = [f"{n} {when}" for when in ("early", "late") for n in users]
        written = ["before"] * len(stores) + early_and_late
        there = in_file(paths[number])
        assert there == written, f"{what}: {there}"

    for number, (users, closers, closing) in enumerate(trials):
        signal.alarm(WATCHDOG // 2)
        trial(number, users, closers, closing)
    os._exit(0)


def fork_beside_a_transaction_of_a_copy(path: str, how: str) -> None:
    """In the child, the file is refused by the one copy because of the transaction that is open in the other."""
    [stores] = stores_of_two_copies(how, path)

    def child(other: Store) -> None:
        for store in stores:
            for call in (partial(write, store, "run", "child"), store.stats):
                try:
                    result = call()
                except Exception as error:  # each copy has errors of its own
                    assert "StorageError" in [kind.__name__ for kind in type(error).__mro__], error
                else:
                    raise AssertionError(f"not refused: {result!r}")
        other.close()

    for number, holder in enumerate(stores):
        with holder.transaction():
            write(holder, "run", f"{number}")
            pid = forked(partial(child, stores[1 - number]))
            assert reap_within(10, pid, "a fork beside a transaction") == 0
            write(holder, "run", f"{number}")
    for store in stores:
        assert keys(store, "run") == ["0", "0", "1", "1"]
        assert store.check() == []
    os._exit(0)


@forking
@parametrize("how", ["one copy", "reload", "copies"])
def test_whoever_closes_after_a_fork_costs_the_other_side_nothing(path: Path, how: str) -> None:
    in_child(fork_with_two_copies, path, how)


@forking
@parametrize("how", ["reload", "copies"])
def test_a_transaction_open_at_a_fork_in_one_copy_of_the_module_shuts_the_file_to_the_other(
    path: Path, how: str
) -> None:
    in_child(fork_beside_a_transaction_of_a_copy, path, how)
    assert in_file(path) == ["0", "0", "1", "1"]


# ==================================================================================================
# Operations: plans, order, statements
# ==================================================================================================


# What else is asked, so that each statement is issued.
MORE_CALLS: list[Callable[[Store], Any]] = [
    lambda s: [
        state.enqueue_work_item(
            WorkItem(execution_id="ea", queue_type="q", unique_key="again"), on_conflict="replace"
        )
        for state in (s.state, s.state, s.state.for_tenant("tenant-a"))
    ],
    lambda s: s.workflows.process_commands(None, cast("Any", sys.exit)),
    lambda s: s.workflows.process_commands(None, fails),
    lambda s: (s.prune(START, dry_run=True), s.prune(START + timedelta(days=1))),
    lambda s: (
        s.state.enqueue_work_item(
            WorkItem(execution_id="ea", queue_type="later", available_at=LATE + timedelta(9))
        ),
        s.state.claim_work_item("w", ["later"], wait=0.001),
        s.state.set_queue_policy(QueuePolicy(queue_type="limited", max_running=9, rate=9.0)),
        s.state.enqueue_work_items([WorkItem(execution_id="ea", queue_type="limited")] * 1),
        s.state.complete_work_items(s.state.claim_work_items("w", ["limited"], 3)),
        s.state.for_tenant("tenant-a").claim_work_item("w", ["later"], wait=0.001),
    ),
    lambda s: s.state.for_tenant("tenant-a").claim_work_item("w", ["none", "other"], wait=0.001),
    lambda s: s.state.claim_work_item("w", ["none", "other"], wait=0.001),
    lambda s: s.state.claim_work_item("w", ["none"], wait=0.001),
]


OF_RUNS = ("_RUN_", "_FOLLOW_ITEM", "_LAST_EMITTED", "_END_WAITS")


MEANT = {
    "SCAN flowstore_runs USING INDEX flowstore_runs_by_time": "a page of all executions ends at its limit",
    "SCAN flowstore_work_items USING INDEX sqlite_autoindex_flowstore_work_items_1": "a page of all items",
    "SCAN flowstore_work_items USING INDEX sqlite_autoindex_flowstore_work_items_1 for a tenant": "the same",
    "SCAN flowstore_work_items USING INDEX flowstore_pending": "the items of one status",
    "USE TEMP B-TREE FOR ORDER BY": "the items of one status, listed in the order of their ids",
    "USE TEMP B-TREE FOR ORDER BY for a tenant": "the same",
    "SCAN flowstore_queues": "list_queue_policies() returns all",
    "SCAN leased": "the leases of a queue, counted up to its max_running",
    "SCAN flowstore_tokens USING INDEX flowstore_tokens_by_time": "list_tokens() returns all",
    "SCAN flowstore_tenants USING INDEX flowstore_tenants_by_time": "list_tenants() returns all",
    "SCAN q": "the queues that a claim names",
    "SCAN q for a tenant": "the same",
    "SCAN counted": "at most 250 of a flow's rows, and a view's up to its bound, counted",
    "SCAN counted for a tenant": "a view's rows, counted up to its bound",
}


@sqlite_only
@parametrize("make_store", ["memory"], indirect=True)
def test_no_statement_scans_a_table_or_sorts(
    watched: type[Watched],
    make_store_state: Callable[[], Store],
    clock: Clock,
    schema: sqlite3.Connection,
) -> None:
    for name, row in SURFACE.items():
        for call in range(len(row.calls)) if not name.startswith(("store.", "tx.")) else ():
            clock.now = START
            store = make_store_state()
            things = stock(store)
            clock.advance(20)
            outcome(store, name, things, call)
            if name.startswith("state."):
                outcome(store.state.for_tenant("tenant-a"), name, things, call)
    for more in MORE_CALLS:
        with suppress(FlowStoreError, ExceptionGroup, SystemExit):
            more(store)
    issued = {
        sql for sql in watched.statements if STATEMENT.match(sql) and "sqlite_master" not in sql
    }
    steps = {
        step + " for a tenant" * ("tenant_id = ?" in sql)
        for sql in issued
        for step in plan(schema, sql)
        if "B-TREE" not in step or "FROM (VALUES" not in sql
    }  # the first items of the queues that a claim names
    assert {
        step for step in steps if re.match(r"SCAN (?!.*CONSTANT ROW)", step) or "B-TREE" in step
    } == set(MEANT)
    checked = {sql for sql in issued if "EXPLAIN" not in sql}
    for name, value in vars(flowstore).items():  # none of the named statements was left out
        both = {value.all, value.one} if isinstance(value, flowstore._Sql) else set()
        # With {tenant}, a text is the beginning of several statements.
        marked = isinstance(value, str) and STATEMENT.match(value) and "{tenant}" not in value
        texts = {flowstore._SQLITE.resolve(str(value)).replace("{}", "?")} if marked else both
        if any(
            STATEMENT.match(text) and not re.search("pg_|pragma_|BY INDEX ", text) for text in texts
        ):
            # These have a test of their own.
            of_views = name in ("_LAST_EVENTS", "_OLDEST", "_OLDEST_LEASE")
            of_runs = name.startswith(OF_RUNS)
            assert texts & issued or of_views or of_runs, f"{name} is not covered"
            if of_runs:
                checked |= both - {getattr(value, "one", "")}
    check_plans(schema, checked)


@sqlite_only
def test_statistics_do_not_change_how_a_store_is_copied_or_pruned_or_a_limit_counted(
    schema: sqlite3.Connection,
) -> None:
    resolve = flowstore._SQLITE.resolve
    issued = {
        flowstore._OPEN_RUN_COUNT.one,
        flowstore._DEFINITION_COUNT.one,
        flowstore._RELEASE_ALL.all,
    }
    for rule in flowstore._PRUNED.values():
        for part in rule.parts:
            issued |= {resolve(sql) for sql in (part.delete, part.select) if sql}

    def read(sql: str, _: object) -> list[Any]:
        sql = resolve(sql)
        if sql in issued:
            return []
        issued.add(sql)
        return [tuple(range(30))]

    for table in flowstore._copied_tables():
        assert list(table.chunks(read))
    assert [step for sql in issued for step in plan(schema, sql) if "B-TREE" in step] == []
    check_plans(schema, issued)


def add_some(store: Store, first: int, count: int) -> None:
    """Rows of most kinds, some of them in every status."""
    state, flows, workflows = store.state, store.flows, store.workflows
    with store.transaction():
        for number in range(first, first + count):
            run, flow = f"run-{number}", Flow(id=f"flow-{number}", owner_session_key="o")
            create(store, run)
            store.events.append_batch(run, "default", [EVENT] * 3)
            state.write_snapshot(Snapshot(execution_id=run, at_sequence=1, state=0))
            state.record_effect(run, 1, execution_id=run)
            for name in ("pending", "claimed", "dead"):
                enqueue(store, id=f"{name}-{number}", execution_id=run, queue_type=name)
            state.claim_work_item("w", ["claimed"], lease_seconds=9999)
            state.move_to_dead_letter(f"dead-{number}", "e")
            flows.insert(flow)
            flows.append_event(flow.id, "k", {})
            flows.insert_step(record("FlowStep", flow_id=flow.id))
            pointers = [ExecutionPointer(id="p", step_id=0)]
            workflows.create_new_workflow(
                record("WorkflowInstance", id=run, execution_pointers=pointers)
            )
            workflows.create_event(record("Event", event_key=run))
            workflows.create_event_subscription(
                record("EventSubscription", workflow_id=run, event_key=run)
            )
            workflows.schedule_command(record("ScheduledCommand", data=run, execute_time=2**62))
            workflows.persist_errors([record("ExecutionError", workflow_id=run)])


# What need not look at more rows than it returns, in a store of the rows above.
# What looks at all there is, or returns 400 rows here, is not measured.
LONG_CALLS = ("store.", "run.", "runs.", "tx.", "workflows.get_runnable_")


# What the table of all methods has not.
OTHER_SHORT_CALLS: dict[str, Callable[[Store], Any]] = {
    "claim, several": lambda s: s.state.claim_work_item("w", ["none", "pending", "dead"]),
    "claim, in vain": lambda s: s.state.claim_work_item("w", ["none", "claimed"]),
    "claim, a tenant's": lambda s: s.state.for_tenant("default").claim_work_item("w", ["none"]),
    "runs": lambda s: (s.state.list_executions(limit=5), s.state.list_executions("pending", 5)),
    "read_all": lambda s: (s.events.read_all(0, 10), s.events.read_all(10**6, 10)),
    "tail": lambda s: (list(s.events.tail(timeout=0)), s.state.list_work_items(limit=5)),
    "prune": lambda s: s.prune(timedelta(days=999)),
}


@sqlite_only
@parametrize(("kind", "size"), [("memory", 1), ("file", 2), ("memory", 4), ("file", 15)])
def test_what_analyze_found_in_a_small_store_makes_no_call_look_at_more_rows_in_a_large_one(
    watched: type[Watched], tmp_path: Path, clock: Clock, size: int, kind: str
) -> None:
    watched.steps_of_a_tick = 1
    steps: dict[bool, dict[str, int]] = {}
    for analyzed in (False, True):
        target = tmp_path / f"{analyzed}.db" if kind == "file" else ":memory:"
        with ExitStack() as stack:
            store = stack.enter_context(flowstore.open(target, synchronous="OFF", clock=clock))
            things = stock(store)
            add_some(store, 0, size)
            if analyzed:
                with store.transaction() as tx:
                    tx.execute("DELETE FROM flowstore_log WHERE position > ?", (size,))
                    tx.execute("ANALYZE")
            if kind == "file":  # what was found is read with the schema
                store = stack.enter_context(flowstore.open(target, synchronous="OFF", clock=clock))
            add_some(store, size, 400)
            clock.advance(1)
            steps[analyzed] = {}
            calls = {name: partial(call, store) for name, call in OTHER_SHORT_CALLS.items()}
            for name in SURFACE:
                if not name.startswith(LONG_CALLS):
                    calls[name] = partial(outcome, store, name, things)
            for name, call in calls.items():
                call()  # so that every statement is prepared
                steps[analyzed][name] = watched.steps(call)
            if analyzed:
                assert execute(store, "SELECT stat FROM sqlite_stat1 WHERE tbl = 'flows'")
    long = {name for name, count in steps[False].items() if count >= 1000}
    assert long == {
        "prune"
    }  # it asks SQLite about the user's foreign keys first, whatever there is
    more = {
        name: (count, steps[True][name])
        for name, count in steps[False].items()
        if steps[True][name] > count + 1000  # a look at all rows takes 1,600 more
    }
    assert more == {}


@sqlite_only
@parametrize("seed", range(4))
def test_the_log_is_read_by_position_whatever_statistics_say(
    sqlite_store: Store, seed: int
) -> None:
    for number in range(60):
        sqlite_store.events.append(f"e{number % 7}", f"tenant-{number % 7}", {"type": str(number)})
    whole = sqlite_store.events.read_all()
    sqlite_store.state.create_execution(
        WorkflowExecution(execution_id="e6", workflow_id="w", tenant_id="tenant-6")
    )
    with sqlite_store.transaction() as tx:
        tx.execute("ANALYZE")
        tx.execute("UPDATE sqlite_stat1 SET stat = ? || ' 1 1'", (seed,))
        tx.execute("ANALYZE sqlite_schema")
        found = [
            sqlite_store.events.read_all(after, limit)
            for after, limit in ((0, 1000), (10, 5), (57, 5), (10**9, 5), (-5, 0))
        ]
    assert found == [whole, whole[10:15], whole[57:], [], []]


@sqlite_only
def test_every_cascade_has_an_index(schema: sqlite3.Connection) -> None:
    tables = [
        name for (name,) in schema.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
    ]
    keys = {
        (table, row[3])
        for table in tables
        for row in schema.execute(f"PRAGMA foreign_key_list({table})")
    }
    assert {("flow_steps", "flow_id"), ("flow_events", "flow_id")} <= keys
    for table, column in keys:
        (step,) = plan(schema, f"SELECT 1 FROM {table} WHERE {column} = ?")
        assert step.startswith("SEARCH "), (table, column)


@sqlite_only
def test_a_record_has_its_columns_and_the_clock_fills_the_times_that_may_not_be_missing(
    schema: sqlite3.Connection,
) -> None:
    named = vars(flowstore).values()
    mappers = [value for value in named if isinstance(value, flowstore._Mapper) and value.table]
    assert len(mappers) > 10
    for mapper in mappers:
        columns = dict(
            schema.execute('SELECT name, "notnull" FROM pragma_table_info(?)', [mapper.table])
        )
        assert {column.partition(" ")[0] for column in mapper.written} <= set(columns)
        for column in mapper._nullable:
            clocked = column in flowstore._CLOCK_COLUMNS
            assert clocked == bool(columns[column]), (mapper.table, column)


@sqlite_only
def test_a_view_finds_the_items_of_an_execution_by_the_execution(
    schema: sqlite3.Connection,
) -> None:
    (step,) = plan(
        schema,
        flowstore._select(
            flowstore._ITEM,
            "ORDER BY id LIMIT 100",
            "execution_id",
            index="flowstore_items_by_execution",
        ).one,
    )
    assert "(execution_id=?)" in step


@parametrize("queues", [["q"], ["q", "r", "s"]])
@sqlite_only
def test_a_claim_takes_as_many_steps_however_much_other_tenants_have(
    watched: type[Watched],
    make_store_state: Callable[[], Store],
    clock: Clock,
    queues: list[str],
) -> None:
    watched.steps_of_a_tick = 1
    steps, later = {}, clock.now + timedelta(1)
    for size in (5, 500):
        store = make_store_state()
        for tenant in ("other", "mine"):
            store.state.create_tenant(Tenant(id=tenant))
        other, mine = store.state.for_tenant("other"), store.state.for_tenant("mine")
        create(other, "theirs")
        create(mine, "mine")
        with store.transaction():
            for number, queue in itertools.product(range(size), queues):
                other.enqueue_work_item(
                    WorkItem(execution_id="theirs", queue_type=queue, available_at=later)
                )
                other.enqueue_work_item(WorkItem(execution_id="theirs", queue_type=queue))
                mine.enqueue_work_item(
                    WorkItem(execution_id="mine", queue_type="s", available_at=later)
                )
                if number % 5 == 0:
                    other.claim_work_item("w", [queue], lease_seconds=0)
            for name in ("mine-0", "mine-1"):
                mine.enqueue_work_item(WorkItem(id=name, execution_id="mine", queue_type="q"))
        mine.claim_work_item("w", queues)  # a first one, so that every statement is prepared
        before = watched.ticks
        item = mine.claim_work_item("w", queues)
        assert item is not None and item.id == "mine-1"
        steps[size] = watched.ticks - before
    assert steps[500] <= steps[5] * 1.1 and steps[5] > 0


# ==================================================================================================
# FlowStore
# ==================================================================================================

TestFlowsByAModelInMemory, TestFlowsByAModelInAFile, TestFlowsByAModelOnPostgres = modelled(
    FlowRules, engines=ENGINES
)


def test_a_flow_and_its_step_come_back_as_they_were_stored(store: Store) -> None:
    at = START - timedelta(days=3, microseconds=7)
    flow = Flow(
        id="f",
        controller_id="c",
        goal="g\n",
        owner_session_key="o",
        requester_origin="r",
        current_step="s",
        state={"deep": [1, {"é": None}]},
        wait=["timer", 3],
        status=FlowStatus.WAITING,
        cancel_requested=True,
        revision=41,
        created_at=at,
        updated_at=at,
    )
    step = FlowStep(
        flow_id="f",
        runtime=StepRuntime.MIRRORED,
        child_session_key="k",
        run_id="r",
        task="t",
        status=FlowStepStatus.RUNNING,
        result=[0],
        created_at=at,
        updated_at=at,
    )
    before = copy.deepcopy((flow, step))
    stored = store.flows.insert(flow)
    assert stored == flow == store.flows.get("f")
    assert store.flows.insert_step(step) == step == store.flows.get_step(step.id)
    assert (flow, step) == before
    assert stored is not flow and stored.state is not flow.state


def test_a_revision_that_could_not_be_counted_on_is_refused(store: Store) -> None:
    flow = flow_with(store, revision=MAX_INT)
    with pytest.raises(InvalidData, match="revision"):
        store.flows.update_with_revision(flow)
    assert store.flows.get(flow.id) == flow


LEGAL = {
    "created": {"running", "cancelled"},
    "running": {"waiting", "finished", "failed", "cancelled"},
    "waiting": {"running", "failed", "cancelled"},
}


@parametrize("before", FlowStatus)
def test_transitions_follow_the_table(before: FlowStatus) -> None:
    assert before.is_terminal is (before not in LEGAL)
    for after, cancelled in itertools.product(FlowStatus, [False, True]):
        legal = after in LEGAL.get(before, set())
        assert before.can_transition_to(after) is legal
        flow = Flow(id="f", status=before, cancel_requested=cancelled)
        if before in LEGAL and legal and (not cancelled or after == "cancelled"):
            flow.transition_to(str(after))
            assert flow == Flow(id="f", status=after, cancel_requested=cancelled)
            continue
        refusal: type[FlowStoreError] = IllegalTransition
        if before not in LEGAL:
            refusal = AlreadyTerminal
        elif cancelled and after != "cancelled":
            refusal = CancelPending
        with pytest.raises(refusal):
            flow.transition_to(after)
        assert flow.status == before
    flow = Flow(status=before)
    flow.request_cancel()
    assert flow.cancel_requested is (before in LEGAL)


def test_a_turn_needs_a_fence_and_an_effect_a_key(store: Store) -> None:
    refusals: list[Any] = [{"lease_fence": None}, {"lease_fence": 1, "effect": 0}]
    for refused in refusals:
        with pytest.raises(InvalidData):
            store.state.commit_turn("i", event=EVENT, **refused)


# --- flows, raced and killed ---


def test_32_threads_raise_a_counter_and_none_is_lost(store: Store) -> None:
    flow = flow_with(store, state={"count": 0})

    def raise_it(flows: FlowStore) -> None:
        for _ in range(4):
            while True:
                mine = flows.get(flow.id)
                assert mine is not None
                mine.state["count"] += 1
                try:
                    flows.update_with_revision(mine)
                    break
                except RevisionMismatch:
                    continue

    with twice(store) as one:
        assert (
            together([partial(raise_it, one(number).flows) for number in range(32)]) == [None] * 32
        )
    final = store.flows.get(flow.id)
    assert final is not None and (final.state, final.revision) == ({"count": 128}, 128)


def test_16_threads_append_to_an_array_and_none_is_lost(store: Store) -> None:
    create(store)

    def append(thread: int, state: StateBackend) -> None:
        for n in range(4):
            state.patch_append_array("e1", f"list-{n % 2}", [thread, n])

    with twice(store) as one:
        together([partial(append, thread, one(thread).state) for thread in range(16)])
    arrays = execution(store).current_state.values()
    kept = sorted(value for array in arrays for value in array)
    assert kept == [[thread, n] for thread in range(16) for n in range(4)]


KILLED_AT_THE_NTH_CALL = """
from datetime import UTC, datetime
import flowstore
path, calls = sys.argv[1], int(sys.argv[2])

def clock():
    global calls
    calls -= 1
    if calls == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return datetime.now(UTC)

store = flowstore.open(path, clock=clock)
"""


UPDATES = """
flow = store.flows.get("f")
store.flows.update_and_append(flow, "good", {})
try:
    store.flows.update_and_append(flow, "stale", {})
except flowstore.RevisionMismatch:
    sys.exit(0)
"""


TURN = """
store.state.commit_turn("i", 1, {"type": "turn"}, snapshot_state=[1], effect_key="k", effect=2, event_id="turn")
"""


def each_kill(folder: Path, prepare: Callable[[Store], Any], source: str) -> Iterator[Store]:
    """For n = 1, 2, ...: the store that a child left when its n-th look at the clock killed it; last, unkilled."""
    for n in itertools.count(1):
        path = folder / f"{n}.db"
        with flowstore.open(path) as store:
            prepare(store)
        child = script(KILLED_AT_THE_NTH_CALL + source, path, n)
        _, errors = child.communicate(timeout=120)
        assert child.returncode in (0, -signal.SIGKILL), errors
        with flowstore.open(path) as store:
            assert store.check() == []
            yield store
        if child.returncode == 0:
            return


def test_a_turn_and_a_flow_with_its_event_are_all_or_nothing_however_the_process_is_killed(
    tmp_path: Path,
) -> None:
    def prepare(store: Store) -> None:
        flow_with(store, id="f")
        assert claimed(store, id="i").lease_fence == 1

    turns: list[bool] = []
    revisions: list[int] = []
    for store in each_kill(tmp_path, prepare, TURN + UPDATES):
        done = look(store, "i").status == "completed"
        assert [event.id for event in store.state.get_events("e1")] == ["turn"] * done
        assert (store.state.latest_snapshot("e1") is not None) is done
        assert store.state.get_effect("k") == (2 if done else None)
        turns.append(done)
        flow = store.flows.get("f")
        assert flow is not None
        assert [event.kind for event in store.flows.list_events("f")] == ["good"] * flow.revision
        revisions.append(flow.revision)
    undone = turns.count(False)
    assert undone >= 2 and turns == sorted(turns)
    assert revisions[undone : undone + 2] == [0, 0]  # before and between the statements
    assert revisions[-2:] == [1, 1] and revisions == sorted(revisions)  # in the stale call


# --- pruning flows ---


def test_prune_drops_ended_flows_older_than_the_days_and_nothing_else(
    store: Store, clock: Clock
) -> None:
    for status in FlowStatus:
        flow_with(
            store,
            status,
            id=f"old {status}",
            updated_at=START - timedelta(days=2, microseconds=1),
        )
        flow_with(store, status, id=f"even {status}", updated_at=START - timedelta(days=2))
    for flow_id in ("old failed", "old running", "even failed"):
        store.flows.insert_step(FlowStep(id=f"step of {flow_id}", flow_id=flow_id, run_id="r"))
        store.flows.append_event(flow_id, "k", {})
    assert store.flows.prune_terminal_flows(2) == 3
    left = [f"old {status}" for status in ("created", "running", "waiting")]
    left += [f"even {status}" for status in FlowStatus]
    assert execute(store, "SELECT id FROM flows ORDER BY id") == [(id,) for id in sorted(left)]
    for sql in ("SELECT flow_id FROM flow_events", "SELECT flow_id FROM flow_steps"):
        assert sorted(execute(store, sql)) == [("even failed",), ("old running",)]
    assert store.flows.prune_terminal_flows(2) == store.flows.prune_terminal_flows(MAX_INT) == 0
    clock.advance(1)
    assert store.flows.prune_terminal_flows(-5) == 3  # below 0 counts as 0


def test_prune_inside_a_transaction_is_part_of_it(store: Store) -> None:
    flow_with(store, "failed", id="f", updated_at=START - timedelta(1))
    with pytest.raises(ZeroDivisionError), store.transaction():
        assert store.flows.prune_terminal_flows(0) == 1
        assert store.flows.get("f") is None
        raise ZeroDivisionError
    assert store.flows.get("f") is not None


@sqlite_only
def test_prune_works_in_small_transactions_and_leaves_no_orphan(
    watched: type[Watched], make_store_state: Callable[[], Store]
) -> None:
    store, old = make_store_state(), START - timedelta(1)
    giant = 1200
    with store.transaction() as tx:
        for number in range(300):
            flow_with(store, "finished", id=f"f{number:03}", updated_at=old)
            for child in range(60 if number % 5 == 2 else 2):
                store.flows.insert_step(FlowStep(flow_id=f"f{number:03}", run_id=str(child)))
                store.flows.append_event(f"f{number:03}", "k", {})
        flow_with(store, "failed", id="giant", updated_at=old)
        flow_with(store, id="kept", updated_at=old)
        rows = [(flow_id, "k", "{}", 0) for flow_id in ["giant"] * giant + ["kept"]]
        tx.executemany(
            "INSERT INTO flow_events (flow_id, kind, payload, at) VALUES (?, ?, ?, ?)", rows
        )
    del watched.commits[:-1]
    assert store.flows.prune_terminal_flows(0) == 301
    changes = [after - before for before, after in itertools.pairwise(watched.commits)]
    assert max(changed for changed in changes if changed != 1 + giant) <= 500 and len(changes) >= 10
    assert [len(dump(store)[table]) for table in ("flows", "flow_steps", "flow_events")] == [
        1,
        0,
        1,
    ]
    assert store.check() == []


def test_writers_get_their_turn_while_flows_are_pruned(store: Store) -> None:
    with store.transaction():
        for _ in range(600):
            flow_with(store, "cancelled", updated_at=START - timedelta(1))
    outcomes = together(
        [
            lambda: store.flows.prune_terminal_flows(0),
            *[lambda: flow_with(store, "finished").status for _ in range(8)],
        ]
    )
    assert outcomes == [600] + ["finished"] * 8
    assert len(store.flows.list_by_status("finished")) == 8


def test_a_step_update_keeps_its_flow_and_its_creation_and_is_of_now(
    store: Store, clock: Clock
) -> None:
    flow_with(store, id="f")
    flow_with(store, id="g")
    step = store.flows.insert_step(FlowStep(flow_id="f", run_id="r"))
    clock.advance(1)
    changed = replace(step, flow_id="g", created_at=clock.now, task="t", result={"ok": 1})
    stored = store.flows.update_step(changed)
    assert stored == replace(changed, flow_id="f", created_at=START, updated_at=clock.now)
    assert store.flows.list_steps("f") == [stored]


# ==================================================================================================
# EventStore
# ==================================================================================================

TestLogsByAModelInMemory, TestLogsByAModelInAFile, TestLogsByAModelOnPostgres = modelled(
    LogRules, 25, engines=ENGINES
)


@parametrize("event", [{"type": ""}, {"type": "t", "x": object()}, None])
def test_another_tenants_execution_is_a_mismatch_before_the_event_is_looked_at(
    store: Store, event: Any
) -> None:
    write(store, "e1")
    calls: list[tuple[Any, Any]] = [
        (store.events.append, event),
        (store.events.append_batch, [event]),
    ]
    for append, given in calls:
        with pytest.raises(TenantMismatch):
            append("e1", "acme", given)
        with pytest.raises(InvalidData):
            append("e2", "acme", given)
    assert not store.events.execution_exists("e2")
    assert store.state.get_tenant("acme") is None


def test_writes_go_on_between_two_items_of_iter_events(store: Store) -> None:
    store.events.append_batch("e1", "default", [EVENT] * 3)
    seen = []
    for stored in itertools.islice(store.events.iter_events("e1", chunk=1), 3):
        seen.append(stored.sequence)
        write(store, "e1")
        assert in_thread(lambda: write(store, "e2")) == len(seen)
    assert seen == [1, 2, 3]


def test_an_abandoned_iter_events_holds_nothing_up(store: Store) -> None:
    store.events.append_batch("e1", "default", [EVENT] * 3)
    events = store.events.iter_events("e1", chunk=1)
    next(events)
    with store.transaction():
        write(store, "e1")
    store.close()
    with pytest.raises(StoreClosed):
        list(events)


def test_read_all_skips_nothing_while_threads_append(make_store: MakeStore) -> None:
    store = make_store(busy_timeout=60)

    def write(execution_id: str) -> None:
        for _ in range(50):
            store.events.append(execution_id, "default", EVENT)

    writers = [Caller(write, f"e{n}") for n in range(6)]
    seen: list[tuple[str, int]] = []
    position = 0
    while len(seen) < 300:
        page = store.events.read_all(position, 7)
        seen += [(stored.execution_id, stored.sequence) for stored in page]
        position = page[-1].position if page else position
        if not page and all(not writer.is_alive() for writer in writers):
            break
    for writer in writers:
        writer.result()
    seen += [(stored.execution_id, stored.sequence) for stored in store.events.read_all(position)]
    assert sorted(seen) == sorted(
        (f"e{n}", sequence) for n in range(6) for sequence in range(1, 51)
    )


# ==================================================================================================
# StateBackend: executions, the queue, keepsakes, tenants
# ==================================================================================================

TestStateByAModelInMemory, TestStateByAModelInAFile, TestStateByAModelOnPostgres = modelled(
    StateRules, 20, engines=ENGINES
)


TestItemsByAModelInMemory, TestItemsByAModelInAFile, TestItemsByAModelOnPostgres = modelled(
    ItemRules, 40, 50, ENGINES
)


def test_an_execution_comes_back_as_it_was_created(store: Store) -> None:
    given = WorkflowExecution(
        execution_id="e1",
        workflow_id="w",
        workflow_version="2",
        status=ExecutionStatus.PAUSED,
        initial_input={"order": 7},
        current_state=[1],
        started_at=START - seconds(9),
        updated_at=START - seconds(8),
        completed_at=START - seconds(7),
        tenant_id="default",
    )
    assert store.state.create_execution(given) == given
    assert store.state.get_execution("e1") == given


def test_patch_append_array_takes_the_key_literally(store: Store) -> None:
    create(store)
    patched = {}
    for key in ("", "a.b", "$", '"', "'", "[0]", "\u00e9", "k" * 5000):
        store.state.patch_append_array("e1", key, 1)
        patched[key] = [1]
        assert execution(store).current_state == patched


def test_patch_append_array_refuses_what_is_no_array(store: Store) -> None:
    no_objects: list[Any] = [None, 5, "text", [], [1]]
    no_arrays: list[Any] = [None, {}, "x", 0]
    for state in no_objects + [{"list": value} for value in no_arrays]:
        run = create(store, new_id(), current_state=state)
        with pytest.raises(InvalidData):
            store.state.patch_append_array(run.execution_id, "list", 1)
        assert execution(store, run.execution_id) == run


def test_the_states_view_of_the_log_is_the_log_under_the_executions_tenant(store: Store) -> None:
    create(store)
    assert store.state.latest_sequence("e1") == 0
    store.events.append("e2", "acme", EVENT)
    assert store.state.append_event("e2", {"type": "second"}, event_id="id") == 2
    assert store.state.get_events("e2") == store.events.load_events("e2")
    [stored] = store.state.get_events_since("e2", 1)
    assert [stored] == store.events.load_events_after("e2", 1)
    assert (stored.tenant_id, stored.id, stored.event) == ("acme", "id", {"type": "second"})
    assert store.state.latest_sequence("e2") == 2


def snap(store: Store, at_sequence: int, state: Any = None, **fields: Any) -> None:
    store.state.write_snapshot(
        Snapshot(execution_id="e1", at_sequence=at_sequence, state=state, **fields)
    )


def test_a_snapshot_comes_back_as_it_was_written(store: Store) -> None:
    write(store, "e1")
    given = Snapshot(
        execution_id="e1", at_sequence=1, state={"a": [1]}, id="s1", created_at=START - seconds(5)
    )
    store.state.write_snapshot(given)
    assert store.state.latest_snapshot("e1") == given
    store.state.write_snapshot(given)
    assert store.state.latest_snapshot("e1") == given


@pytest.fixture
def five(store: Store) -> Store:
    """A store whose execution e1 has the events n = 1 ... 5."""
    store.events.append_batch(
        "e1", "default", [{"type": "t", "n": number} for number in range(1, 6)]
    )
    return store


def test_what_is_no_function_is_refused_whatever_there_is_to_do(store: Store) -> None:
    for call in (
        lambda: store.state.replay("e1", None),  # type: ignore[arg-type]
        lambda: store.workflows.process_commands(None, None),  # type: ignore[arg-type]
    ):
        with pytest.raises(InvalidData, match="a function is needed, not NoneType"):
            call()


@parametrize(
    ("snapshots", "initial", "state"),
    [
        ([], None, [1, 2, 3, 4, 5]),
        ([], ["start"], ["start", 1, 2, 3, 4, 5]),
        ([1, 3], ["start"], ["at 3", 4, 5]),
        ([5], ["start"], ["at 5"]),
        ([6], None, [1, 2, 3, 4, 5]),
        ([6, 4], None, ["at 4", 5]),
    ],
)
def test_replay_folds_what_follows_the_latest_snapshot_that_is_not_beyond_the_logs_end(
    five: Store, snapshots: list[int], initial: Any, state: Any
) -> None:
    for sequence in snapshots:
        snap(five, sequence, [f"at {sequence}"])
    assert five.state.replay("e1", total, initial) == (state, 5)


def test_replay_ends_at_the_end_that_the_log_had_when_it_was_called(
    store: Store, clock: Clock
) -> None:
    store.events.append_batch("e1", "default", [{"type": "t"}] * 1500)

    def writing(state: Any, stored: StoredEvent) -> Any:
        if state % 700 == 0:
            write(store, "e1")
        return state + 1

    assert store.state.replay("e1", writing, 0) == (1500, 1500)

    def pruning(state: Any, stored: StoredEvent) -> Any:
        if state == 500:
            execute(store, "DELETE FROM flowstore_log WHERE execution_id = 'e1'")
        return state + 1

    with pytest.raises(NotFound):
        store.state.replay("e1", pruning, 0)


def test_replay_without_events_is_the_initial_state_or_a_snapshot_at_0(store: Store) -> None:
    create(store)
    assert store.state.replay("e1", total, ["start"]) == (["start"], 0)
    snap(store, 0, ["snapshot"])
    assert store.state.replay("e1", total, ["start"]) == (["snapshot"], 0)


def test_a_reducer_may_call_the_store_and_change_its_state(five: Store) -> None:
    snap(five, 2, [1, 2])

    def reducer(state: Any, stored: StoredEvent) -> Any:
        state.append(stored.event["n"])
        write(five, "e2")
        assert in_thread(lambda: write(five, "e3")) == len(state) - 2
        return state

    assert five.state.replay("e1", reducer) == ([1, 2, 3, 4, 5], 5)
    assert latest(five) == (2, [1, 2])
    assert five.events.count_events("e2") == 3


def test_what_a_reducer_raises_comes_through(five: Store) -> None:
    def reducer(state: Any, stored: StoredEvent) -> Any:
        raise Stop

    with pytest.raises(Stop):
        five.state.replay("e1", reducer)
    assert write(five, "e1") == 6


def test_an_item_is_stored_pending_whatever_the_record_says(store: Store) -> None:
    store.events.append("e1", "acme", EVENT)
    item = WorkItem(
        execution_id="e1",
        node_id="node",
        queue_type="q",
        payload={"n": 1},
        attempt=2,
        max_attempts=5,
        id="i1",
        created_at=START - seconds(2),
        available_at=START - seconds(1),
        lease_expires_at=START + seconds(99),
        worker_id="somebody",
        lease_fence=9,
        status=WorkItemStatus.COMPLETED,
        last_error="old",
        tenant_id="default",
    )
    assert store.state.enqueue_work_item(item) == "i1"
    assert look(store, "i1") == replace(
        item,
        lease_expires_at=None,
        worker_id=None,
        lease_fence=0,
        status=WorkItemStatus.PENDING,
        last_error=None,
        tenant_id="acme",
    )


# --- claiming ---


def test_a_lease_lasts_as_long_as_the_store_was_opened_with(
    make_store: MakeStore, clock: Clock
) -> None:
    assert claimed(make_store(clock=clock)).lease_expires_at == START + seconds(30)
    assert claimed(make_store(clock=clock, lease_seconds=0.5)).lease_expires_at == START + seconds(
        0.5
    )


def test_no_queues_give_nothing(store: Store) -> None:
    enqueue(store)
    assert store.state.claim_work_item("w1", []) is None
    assert store.state.claim_work_item("w1", [], wait=3600) is None


@parametrize("kind", [list, tuple, set, frozenset])
def test_queues_may_come_in_any_of_these(store: Store, kind: Callable[[list[str]], Any]) -> None:
    item_id = enqueue(store)
    item = store.state.claim_work_item("w1", kind(["q", "r"]))
    assert item is not None and item.id == item_id


def test_the_status_of_an_execution_does_not_touch_its_items(store: Store) -> None:
    item_id = enqueue(store)
    store.state.update_execution_status("e1", "cancelled")
    assert claim(store).id == item_id


def test_threads_claim_each_item_exactly_once(make_store: MakeStore) -> None:
    store = make_store(busy_timeout=60)
    create(store)
    with store.transaction():
        for number in range(300):
            enqueue(store, id=f"i{number:03}", queue_type=f"q{number % 3}")

    def work() -> list[str]:
        done = []
        while item := store.state.claim_work_item(
            threading.current_thread().name, ["q0", "q1", "q2"]
        ):
            done.append(store.state.complete_work_item(item).id)
        return done

    results = together([work] * 16)
    assert sorted(item_id for done in results for item_id in done) == [
        f"i{number:03}" for number in range(300)
    ]
    assert len(store.state.list_work_items(status="completed", limit=1000)) == 300


def test_processes_claim_each_item_exactly_once(path: Path, file_store: Store) -> None:
    with file_store.transaction():
        for number in range(120):
            enqueue(file_store, id=f"i{number:03}", available_at=datetime(2000, 1, 1, tzinfo=UTC))
    source = """
with flowstore.open(sys.argv[1], synchronous="OFF", busy_timeout=60) as store:
    while item := store.state.claim_work_item(sys.argv[2], ["q"]):
        print(store.state.complete_work_item(item).id)
"""
    workers = [script(source, path, f"w{number}") for number in range(4)]
    done = "".join(finished(worker) for worker in workers)
    assert sorted(done.split()) == [f"i{number:03}" for number in range(120)]


def test_claims_take_any_number_of_expired_leases_back_in_the_end(
    store: Store, clock: Clock
) -> None:
    create(store)
    for number in range(100):
        claimed(store, id=f"i{number}", max_attempts=2)
    clock.advance(10)
    for _ in range(100):
        assert store.state.claim_work_item("w2", ["q"]) is None
    clock.advance(1)
    assert {claim(store).id for _ in range(100)} == {f"i{number}" for number in range(100)}


# --- waiting ---


@parametrize("how", ["enqueued", "given back", "committed in a block"])
def test_a_waiting_claim_gets_what_another_thread_makes_available(store: Store, how: str) -> None:
    create(store)
    held = claimed(store) if how == "given back" else None
    waiting = Caller(lambda: claim(store, "other", "q", wait=3600))
    if held is not None:
        item_id = store.state.retry_work_item(held, delay=0).id
    elif how == "enqueued":
        item_id = enqueue(store)
    else:
        with store.transaction():
            item_id = enqueue(store)
            write(store, "e1")
    assert waiting.result().id == item_id


@parametrize("made", ["delayed", "leased"])
def test_a_waiting_claim_gets_what_becomes_due(make_store: MakeStore, made: str) -> None:
    store = make_store(backoff=lambda attempt: 0)
    if made == "delayed":
        item_id = enqueue(store, available_at=datetime.now(UTC) + seconds(0.2))
    else:
        item_id = enqueue(store)
        claim(store, lease_seconds=0.2)
    item = in_thread(lambda: claim(store, worker="w2", wait=3600))
    assert (item.id, item.worker_id, item.attempt) == (item_id, "w2", 1 if made == "leased" else 0)


def test_a_waiting_claim_follows_the_stores_clock(store: Store, clock: Clock) -> None:
    item_id = enqueue(store, available_at=START + seconds(0.5))
    waiting = Caller(lambda: claim(store, wait=3600))
    clock.advance(0.5)
    assert waiting.result().id == item_id


@parametrize("wait", [0.02, 0, -1])
def test_a_claim_that_waited_in_vain_gives_nothing(store: Store, wait: float) -> None:
    enqueue(store, queue_type="other")
    assert store.state.claim_work_item("w1", ["q"], wait=wait) is None


def test_a_waiting_claim_gets_what_another_process_enqueues(file_store: Store, path: Path) -> None:
    create(file_store)
    waiting = Caller(lambda: claim(file_store, wait=3600))
    source = """
with flowstore.open(sys.argv[1]) as store:
    store.state.enqueue_work_item(flowstore.WorkItem(execution_id="e1", queue_type="q", id="theirs",
        available_at=flowstore.open(":memory:").now().replace(year=2000)))
"""
    finished(script(source, path))
    assert waiting.result().id == "theirs"


def test_several_waiting_claims_share_what_comes(store: Store) -> None:
    create(store)
    waiting = [Caller(lambda: claim(store, wait=3600)) for _ in range(5)]
    ids = {enqueue(store) for _ in range(5)}
    assert {one.result().id for one in waiting} == ids


# --- renewing and holding ---


def test_renewing_moves_the_expiry(store: Store, clock: Clock) -> None:
    item = claimed(store)
    now = clock.advance(5)
    assert store.state.renew_lease(item) == now + seconds(10)
    expiry = store.state.renew_lease(item.id, "w1", lease_seconds=2.5)
    assert (expiry, expiry.tzinfo) == (now + seconds(2.5), UTC)
    assert store.state.renew_lease(
        item.id, lease_fence=item.lease_fence, lease_seconds=3
    ) == now + seconds(3)
    assert look(store, item.id) == replace(item, lease_expires_at=now + seconds(3))


def test_a_lease_of_another_worker_is_not_renewed(store: Store) -> None:
    item = claimed(store)
    others: list[Any] = [(item.id, "somebody else"), (replace(item, worker_id="somebody else"),)]
    for given in others:
        with pytest.raises(LeaseLost):
            store.state.renew_lease(*given)
        assert look(store, item.id) == item


def test_hold_renews_the_lease_in_the_background(store: Store, clock: Clock) -> None:
    item = claimed(store)

    def renewed_until(expiry: datetime) -> bool:
        return look(store, item.id).lease_expires_at == expiry

    with store.state.hold(item, lease_seconds=0.3) as held:
        for _ in range(3):
            expiry = clock.advance(0.2) + seconds(0.3)
            until(partial(renewed_until, expiry))
        assert held.lost is False
        assert store.state.reclaim_expired_leases() == ReclaimResult(retryable=[], exhausted=[])
    assert store.state.complete_work_item(item).status == "completed"


def test_hold_renews_the_lease_while_a_read_only_transaction_is_open(
    file_store: Store, clock: Clock
) -> None:
    item = claimed(file_store)
    with file_store.state.hold(item, lease_seconds=0.3), file_store.transaction(read_only=True):
        expiry = clock.advance(0.2) + seconds(0.3)
        until(lambda: in_thread(lambda: look(file_store, item.id)).lease_expires_at == expiry)


def test_hold_tells_meanwhile_that_the_lease_was_lost(store: Store, clock: Clock) -> None:
    item = claimed(store)
    with pytest.raises(LeaseLost) as caught, store.state.hold(item, lease_seconds=0.03) as held:
        with store.transaction():
            clock.advance(3600)
            assert len(store.state.reclaim_expired_leases().retryable) == 1
        until(lambda: held.lost)
    assert caught.value.item_id == item.id


def test_a_lease_that_went_to_another_worker_is_told_at_the_end_of_the_block(store: Store) -> None:
    item = claimed(store)

    def elsewhere() -> WorkItem:
        store.state.retry_work_item(item.id, delay=0)
        return claim(store, worker="w2")

    with pytest.raises(LeaseLost) as caught, store.state.hold(item, lease_seconds=3600):
        assert in_thread(elsewhere).id == item.id
    assert caught.value.item_id == item.id


@parametrize("how", ["complete_work_item", "fail_work_item", "retry_work_item"])
def test_settling_the_item_inside_the_block_does_not_lose_its_lease(store: Store, how: str) -> None:
    item = claimed(store)
    with store.state.hold(item, lease_seconds=0.03) as held:
        settled = getattr(store.state, how)(item, *(["boom"] if how == "fail_work_item" else []))
    assert held.lost is False
    assert look(store, item.id) == settled


def test_a_lease_of_ages_is_held_and_its_loss_told(store: Store) -> None:
    item = claimed(store)
    with pytest.raises(LeaseLost), store.state.hold(item, lease_seconds=2.4e11) as hold:
        assert hold.expires.year > 9000
        in_thread(lambda: store.state.retry_work_item(item.id, delay=0))
        claim(store, worker="thief")


def test_a_lease_ends_in_the_year_9999_at_the_latest(store: Store, clock: Clock) -> None:
    item = claimed(store)
    last = datetime.max.replace(tzinfo=UTC)
    left = (last - clock.now) / seconds(1)  # as a float, to some 30 microseconds
    for step in range(-4, 5):
        lease = left + step * math.ulp(left)
        if round(lease * 1e6) > (last - clock.now) // timedelta(microseconds=1):
            with pytest.raises(InvalidData, match="lease_seconds"):
                store.state.renew_lease(item, lease_seconds=lease)
        else:
            assert store.state.renew_lease(item, lease_seconds=lease) <= last


def test_a_stale_claim_cannot_be_held(store: Store) -> None:
    item = claimed(store)
    store.state.retry_work_item(item, delay=0)
    claim(store, worker="w2")
    with pytest.raises(LeaseLost), store.state.hold(item):
        pass
    assert look(store, item.id).worker_id == "w2"


@parametrize("error", [RuntimeError("stop"), Stop()])
@parametrize("lost", [False, True])
def test_what_the_held_block_raises_comes_through(
    store: Store, error: BaseException, lost: bool
) -> None:
    item = claimed(store)
    with pytest.raises(type(error)) as caught, store.state.hold(item):
        if lost:
            store.state.move_to_dead_letter(item.id, "taken away")
        raise error
    assert caught.value is error


# --- settling ---


def test_the_last_attempts_retry_is_a_dead_letter(store: Store) -> None:
    for attempt, most in ((0, 0), (0, 1), (1, 2), (2, 3), (7, 3), (2**31 - 2, 2**31 - 1)):
        item = claimed(store, attempt=attempt, max_attempts=most)
        letter = store.state.retry_work_item(item, "the end", delay=5)
        assert isinstance(letter, DeadLetter)
        assert (letter.id, letter.attempt, letter.last_error) == (item.id, attempt + 1, "the end")
        assert (letter.status, letter.dead_lettered_at) == ("dead_lettered", START)
        assert letter in store.state.list_dead_letters()
        assert look(store, item.id).status == "dead_lettered"


def test_a_claim_that_was_taken_back_moves_nothing_to_the_dead_letters(
    store: Store, clock: Clock
) -> None:
    lost = claimed(store)
    clock.advance(9999)
    store.state.reclaim_expired_leases()
    with pytest.raises(LeaseLost):
        store.state.move_to_dead_letter(lost, "late")
    waiting = look(store, lost.id)
    assert waiting.status == "pending"
    assert store.state.move_to_dead_letter(waiting, "in time").last_error == "in time"


def test_the_last_attempts_retry_needs_no_key(store: Store) -> None:
    failed = claimed(store, unique_key="k", max_attempts=1)
    store.state.fail_work_item(failed, "boom")
    enqueue(store, unique_key="k")
    assert isinstance(store.state.retry_work_item(failed.id), DeadLetter)


def test_the_error_of_a_retry_is_kept_whatever_it_says(store: Store, clock: Clock) -> None:
    item = claimed(store)
    store.state.retry_work_item(item, "first", delay=0)
    again = store.state.retry_work_item(claim(store), "the lease expired", delay=0)
    assert again.last_error == "the lease expired"


def test_a_dead_letter_is_requeued_under_its_own_fence_alone(store: Store) -> None:
    old = claimed(store)
    store.state.retry_work_item(old, delay=0)
    new = claim(store)
    store.state.move_to_dead_letter(new, "boom")
    with pytest.raises(LeaseLost):
        store.state.requeue_dead_letter(old)
    assert store.state.requeue_dead_letter(new).id == new.id


def test_a_backoff_is_asked_with_the_new_attempt(make_store: MakeStore, clock: Clock) -> None:
    asked: list[int] = []

    def backoff(attempt: int) -> float:
        asked.append(attempt)
        return 100.5 * attempt

    store = make_store(clock=clock, backoff=backoff, lease_seconds=10)
    item = claimed(store, max_attempts=9)
    assert store.state.retry_work_item(item).available_at == START + seconds(100.5)
    clock.advance(100.5)
    claim(store)
    now = clock.advance(10)
    assert store.state.reclaim_expired_leases().retryable[0].available_at == now + seconds(201)
    assert set(asked) == {1, 2}


def raising(attempt: int) -> float:
    raise RuntimeError("no backoff today")


@parametrize(
    "backoff",
    [
        None,
        raising,
        *(
            lambda attempt, value=value: value
            for value in (float("nan"), float("inf"), None, "soon", b"")
        ),
    ],
    ids=["none", "raises", "nan", "inf", "gives-none", "text", "bytes"],
)
def test_the_default_backoff_stands_in_for_one_that_fails(
    make_store: MakeStore, clock: Clock, backoff: Any
) -> None:
    store = make_store(clock=clock, backoff=backoff)
    for attempt, delay in {0: 2, 1: 4, 4: 32, 5: 64, 6: 64, 2_000_000_000: 64}.items():
        item = claimed(store, attempt=attempt, max_attempts=2**31 - 1)
        due = store.state.retry_work_item(item).available_at
        assert (attempt, due) == (attempt, START + seconds(delay))


# --- reclaiming and dead letters ---


def test_get_work_item_takes_the_item_too_and_gives_its_present_state(store: Store) -> None:
    item = claimed(store)
    done = store.state.complete_work_item(item)
    assert store.state.get_work_item(item) == done


def test_a_definition_is_kept_by_tenant_id_and_version_and_replaced(
    store: Store, clock: Clock
) -> None:
    store.state.create_tenant(Tenant(id="acme"))
    first = store.state.store_workflow(definition(ir={"steps": [1]}))
    assert (
        first
        == definition(ir={"steps": [1]}, created_at=START)
        == store.state.get_workflow("w", "1")
    )
    theirs = store.state.store_workflow(definition(ir="acme's", tenant_id="acme"))
    clock.advance(1)
    second = store.state.store_workflow(definition(ir="new"))
    assert (
        store.state.get_workflow("w", "1") == second == definition(ir="new", created_at=clock.now)
    )
    assert store.state.for_tenant("acme").get_workflow("w", "1") == theirs
    assert store.state.get_workflow("w", "2") is store.state.get_workflow("v", "1") is None
    with pytest.raises(NotFound):
        store.state.store_workflow(definition(tenant_id=UNKNOWN))


def test_max_workflows_counts_distinct_ids_and_versions(store: Store) -> None:
    acme = store.state.create_tenant(Tenant(id="acme", limits=TenantLimits(max_workflows=2)))
    view = store.state.for_tenant("acme")
    for number in range(5):
        store.state.store_workflow(definition(f"w{number}"))  # another tenant's are not counted
    view.store_workflow(definition("v"))
    for state, record in (
        (view, definition("w")),
        (store.state, definition("w", ir=1, tenant_id="acme")),
    ):
        state.store_workflow(record)  # the second replaces the first
    for state in (view, store.state):
        with pytest.raises(LimitExceeded) as caught:
            state.store_workflow(definition("w", "2", tenant_id="acme"))
        assert caught.value.tenant_id == "acme"
    assert view.get_workflow("w", "2") is None
    acme.limits.max_workflows = 1
    store.state.update_tenant(acme)
    assert view.store_workflow(definition("w", ir="again")) == view.get_workflow(
        "w", "1"
    )  # adds none
    store.state.update_tenant(Tenant(id="acme"))
    view.store_workflow(definition("w", "2"))


def test_racing_creations_never_pass_the_limit(store: Store) -> None:
    store.state.create_tenant(Tenant(id="acme", limits=TenantLimits(max_concurrent_executions=3)))
    view = store.state.for_tenant("acme")
    outcomes = together([partial(create, view, f"e{number}") for number in range(12)])
    assert Counter(type(outcome).__name__ for outcome in outcomes) == {
        "WorkflowExecution": 3,
        "LimitExceeded": 9,
    }
    assert len(view.list_executions()) == 3


def test_a_tenant_comes_back_as_it_was_stored_and_updated(store: Store, clock: Clock) -> None:
    limits = TenantLimits(
        max_concurrent_executions=0,
        max_workflows=1,
        max_tokens_per_month=2,
        max_cost_per_month_usd=2.5,
    )
    acme = store.state.create_tenant(
        Tenant(id="acme", name="Acme", policy={"models": []}, limits=limits)
    )
    assert (
        acme
        == store.state.get_tenant("acme")
        == Tenant(
            id="acme",
            name="Acme",
            policy={"models": []},
            limits=limits,
            created_at=START,
            updated_at=START,
        )
    )
    clock.advance(1)
    changed = replace(
        acme, status=TenantStatus.ARCHIVED, created_at=None, policy=None, limits=TenantLimits()
    )
    stored = store.state.update_tenant(changed)
    assert stored == replace(changed, created_at=START, updated_at=clock.now)
    assert store.state.get_tenant("acme") == stored and stored.status is TenantStatus.ARCHIVED
    assert store.state.get_tenant(UNKNOWN) is None


def test_the_plaintext_of_a_token_is_nowhere_in_the_files(tmp_path: Path) -> None:
    def on_disk() -> bytes:
        return b"".join(path.read_bytes() for path in tmp_path.iterdir())

    with flowstore.open(tmp_path / "app.db") as store:
        plains = [store.state.create_token("n", "r")[0] for _ in range(20)]
        assert all(store.state.validate_token(plain) for plain in plains)
        assert (tmp_path / "app.db-wal").stat().st_size > 0
        contents = [on_disk()]
    contents.append(on_disk())
    for content, plain in itertools.product(contents, plains):
        assert hashlib.sha256(plain.encode()).hexdigest().encode() in content
        assert (
            plain.encode() not in content and plain.removeprefix("fs_")[:16].encode() not in content
        )
    assert len(set(plains)) == 20 and all(len(plain) >= 40 for plain in plains)
    with flowstore.open(tmp_path / "app.db", read_only=True) as store:
        assert store.state.validate_token(plains[0]) is not None  # validating writes nothing


def test_racing_effects_have_one_winner_that_everyone_is_told(store: Store) -> None:
    with twice(store) as one:
        outcomes = together(
            [partial(one(number).state.record_effect, "k", number) for number in range(16)]
        )
    assert len(set(outcomes)) == 1 and store.state.get_effect("k") == outcomes[0]


@parametrize("text", ["{", "[1] 2", "", "[" * 100_000])
def test_json_that_is_damaged_in_the_file_is_store_corrupt(store: Store, text: str) -> None:
    create(store)
    store.state.record_effect("k", {})
    with store.transaction() as tx:
        tx.execute("UPDATE flowstore_effects SET result = ?", (text,))
        tx.execute("UPDATE flowstore_runs SET current_state = ?", (text,))
    calls: list[Call] = [
        lambda: store.state.get_effect("k"),
        lambda: store.state.record_effect("k", 1),
        lambda: store.state.patch_append_array("e1", "list", 1),
        lambda: store.state.get_execution("e1"),
    ]
    for call in calls:
        with pytest.raises(StoreCorrupt, match="cannot be read"):
            call()


def test_an_effect_of_an_unknown_execution_is_refused(store: Store) -> None:
    with pytest.raises(NotFound) as caught:
        store.state.record_effect("k", 1, execution_id=UNKNOWN)
    assert caught.value.args == ("execution", UNKNOWN)
    write(store, "logged")
    key = uuid.uuid4()
    assert store.state.record_effect(key, 2, execution_id="logged") == 2  # nothing was there
    assert store.state.get_effect(str(key)) == 2


def test_an_artifact_goes_by_the_time_when_it_was_last_put_and_only_when_told(
    make_store: MakeStore, clock: Clock
) -> None:
    store = make_store(clock=clock)
    data = os.urandom(100_000)
    ref = store.state.put_artifact(data, "first")
    between = clock.advance(10)
    clock.advance(10)
    assert store.state.put_artifact(data, "second") == ref
    assert store.prune(between, artifacts=True)["artifacts"] == 0
    later = clock.advance(10)
    assert "artifacts" not in store.prune(later)
    assert store.state.get_artifact(ref.hash) == data
    assert store.prune(later, artifacts=True)["artifacts"] == 1
    assert store.state.get_artifact(ref.hash) is None
    assert store.state.put_artifact(data).media_type is None


def test_a_turn_may_fail_and_leaves_out_what_is_not_given(store: Store) -> None:
    item = claimed(store)
    store.state.record_effect("k", "first")
    assert (
        store.state.commit_turn(
            item, item.lease_fence, EVENT, failed=True, effect_key="k", effect="second"
        )
        == 1
    )
    failed = store.state.get_work_item(item)
    assert failed is not None and failed.status is WorkItemStatus.FAILED
    assert store.state.latest_snapshot("e1") is None and store.state.get_effect("k") == "first"
    following = claimed(store)
    store.state.commit_turn(following, None, EVENT, snapshot_state=None, effect_key="none")
    snapshot = store.state.latest_snapshot("e1")
    assert (
        snapshot is not None
        and snapshot.state is None
        and store.state.get_effect("none", "default") is None
    )


def test_a_known_event_id_settles_all_the_same(store: Store) -> None:
    first = claimed(store)
    turn = partial(store.state.commit_turn, event_id="x", expected_sequence=0)
    assert turn(first.id, first.lease_fence, EVENT) == 1
    assert store.state.get_events("e1")[0].id == "x"
    store.state.append_event("e1", EVENT)
    second = claimed(store)
    again = store.state.commit_turn(
        second, None, EVENT, event_id="x", expected_sequence=9, snapshot_state=5
    )
    done, snapshot = store.state.get_work_item(second), store.state.latest_snapshot("e1")
    assert (
        again == 1
        and done is not None
        and done.status == "completed"
        and store.state.latest_sequence("e1") == 2
    )
    assert snapshot is not None and (snapshot.at_sequence, snapshot.state) == (1, 5)


def test_a_turn_that_is_refused_writes_nothing_at_all(store: Store) -> None:
    item = claimed(store)
    write(store, "e1")
    settled = claimed(store)
    store.state.complete_work_item(settled)
    fence, before = item.lease_fence, dump(store)
    turn = partial(store.state.commit_turn, event=EVENT, snapshot_state=1, effect_key="k", effect=2)
    refusals: list[tuple[type[FlowStoreError], Call]] = [
        (LeaseLost, partial(turn, item.id, fence - 1)),
        (LeaseLost, partial(turn, item.id, fence + 1)),
        (LeaseLost, partial(turn, settled, settled.lease_fence)),
        (NotFound, partial(turn, UNKNOWN, 1)),
        (SequenceConflict, partial(turn, item, fence, expected_sequence=0)),
        (InvalidData, partial(turn, item, fence, event_id="")),
    ]
    for error, call in refusals:
        with pytest.raises(error):
            call()
        assert dump(store) == before


def test_of_racing_commits_of_one_item_exactly_one_wins(store: Store) -> None:
    for round_ in range(5):
        item = claimed(store)
        with twice(store) as one:
            outcomes = together(
                [
                    partial(
                        one(n).state.commit_turn,
                        item.id,
                        item.lease_fence,
                        event(f"{n}"),
                        effect_key=f"k{round_}.{n}",
                    )
                    for n in range(8)
                ]
            )
        won = [n for n, outcome in enumerate(outcomes) if outcome == round_ + 1]
        assert len(won) == 1 and [type(o) for o in outcomes].count(LeaseLost) == 7
        assert keys(store, "e1")[-1] == f"{won[0]}"
    assert store.state.latest_sequence("e1") == len(dump(store)["flowstore_effects"]) == 5


def test_a_turn_of_another_tenants_item_is_that_tenants(store: Store) -> None:
    store.state.create_tenant(Tenant(id="acme"))
    view = store.state.for_tenant("acme")
    item = claimed(view)
    store.state.commit_turn(
        item, item.lease_fence, EVENT, snapshot_state=1, effect_key="k", effect="theirs"
    )
    snapshot = view.latest_snapshot("e1")
    assert (
        snapshot is not None
        and view.get_effect("k") == "theirs"
        and store.state.get_effect("k") is None
    )
    assert [stored.tenant_id for stored in view.get_events("e1")] == ["acme"]


METHODS = [name for name in SURFACE if name.startswith("state.")]


FOR_THE_ADMINISTRATOR = {
    "state.create_tenant",
    "state.update_tenant",
    "state.for_tenant",
    "state.set_queue_policy",
}


READS_STATE = {name for name in METHODS if re.match(r"state\.(get|list|latest)_", name)} | {
    "state.replay",
    "state.timeline",
    "state.validate_token",
}


# Those that only read share what they read.
OF_TENANTS = [sorted(READS_STATE), *([name] for name in METHODS if name not in READS_STATE)]


def calls_of(names: list[str]) -> list[tuple[str, int]]:
    return [(name, call) for name in names for call in range(len(SURFACE[name].calls))]


def rows_of(store: Store, tenant: str) -> list[Any]:
    return [plain(row) for rows in dump(store).values() for row in rows if tenant in row]


@parametrize("make_store", ["memory", "postgres"], indirect=True)
@parametrize("names", OF_TENANTS, ids=" ".join)
def test_a_view_shows_and_does_what_it_would_were_there_no_other_tenant(
    make_store_state: Callable[[], Store], clock: Clock, names: list[str]
) -> None:
    for number, (name, call) in enumerate(calls_of(names)):
        if number == 0 or name not in READS_STATE:
            clock.now = START
            own, shared, alone = make_store_state(), make_store_state(), make_store_state()
            for store in (own, shared, alone):
                furnish(store, "b")
            mine, theirs = furnish(own, "a"), furnish(shared, "a")
            clock.advance(20)
        before, others_before = rows_of(own, "tenant-a"), rows_of(shared, "tenant-a")
        works = outcome(own.state.for_tenant("tenant-a"), name, mine, call)
        tried = outcome(shared.state.for_tenant("tenant-b"), name, theirs, call)
        if not name.startswith("state.claim_"):  # which takes back every tenant's expired leases
            assert rows_of(shared, "tenant-a") == others_before
        if name in FOR_THE_ADMINISTRATOR:
            assert works[0] == tried[0] == "TenantMismatch"
            continue
        assert works[0] == ""
        if "queue_polic" not in name:  # policies are over all tenants
            assert works != tried or rows_of(own, "tenant-a") != before
        if tried[0] != "AlreadyExists":  # that an id is taken is all that can be learnt
            assert tried == outcome(alone.state.for_tenant("tenant-b"), name, theirs, call)
            assert rows_of(shared, "tenant-b") == rows_of(alone, "tenant-b")


@parametrize("make_store", ["memory", "postgres"], indirect=True)
@parametrize("names", OF_TENANTS, ids=" ".join)
def test_every_call_through_a_view_asks_for_the_tenants_standing(
    make_store_state: Callable[[], Store], clock: Clock, names: list[str]
) -> None:
    for number, (name, call) in enumerate(calls_of(names)):
        if name == "state.for_tenant":
            continue  # touches nothing
        if number == 0 or name not in READS_STATE:
            clock.now = START
            store = make_store_state()
            things = furnish(store, "a")
            clock.advance(20)
        store.state.update_tenant(Tenant(id="tenant-a", policy="a", limits=LIMITS))
        view = store.state.for_tenant("tenant-a")
        active = (
            outcome(view, name, things, call)
            if name in READS_STATE
            else ("TenantInactive", ("tenant-a",))
        )
        for status in ("suspended", "archived"):
            store.state.update_tenant(
                Tenant(id="tenant-a", limits=LIMITS, status=TenantStatus(status))
            )
            before = dump(store)
            if name not in (
                "state.get_tenant",
                "state.list_tenants",
                "state.validate_token",
            ):  # what is about the standing itself
                assert outcome(view, name, things, call) == active
            else:
                assert (
                    outcome(view, name, things, call)[0] == ""
                    and outcome(view, name, things, call) != active
                )
            assert dump(store) == before
        assert outcome(store.state.for_tenant("nobody"), name, things, call) == (
            "NotFound",
            ("tenant", "nobody"),
        )


def test_limits_of_a_misspelt_name_are_not_kept(store: Store) -> None:
    limits = TenantLimits(max_workflows=3)
    limits.max_workflow = 5  # type: ignore[attr-defined]
    store.state.create_tenant(Tenant(id="acme", limits=limits))
    stored = store.state.get_tenant("acme")
    assert stored is not None
    assert stored.limits == TenantLimits(max_workflows=3)


def test_a_view_of_an_unregistered_tenant_begins_to_work_when_it_is_registered(
    store: Store,
) -> None:
    view = store.state.for_tenant(key := uuid.uuid4())
    with pytest.raises(NotFound):
        view.claim_work_item("w", [])
    store.state.create_tenant(Tenant(id=str(key)))
    assert view.claim_work_item("w", []) is None and view.list_tenants() == [
        store.state.get_tenant(key)
    ]


class Rounds:
    """A gate that opens after some waits, none of which takes time."""

    def __init__(self, left: int) -> None:
        self.left = left

    def acquire(self, timeout: float | None = None) -> bool:
        self.left -= 1
        return self.left < 0


def test_a_lease_is_not_renewed_while_its_holder_has_a_transaction_open(store: Store) -> None:
    def go_on(hold: flowstore.Hold) -> None:
        """What the background thread does, a few times at once."""
        gate, ended = cast(Any, Rounds(3)), threading.Lock()
        ended.acquire()
        in_thread(partial(flowstore._keep_lease, weakref.ref(hold), gate, ended, 1.0))

    item = claimed(store)
    with store.state.hold(item, lease_seconds=3600) as hold:
        expires = hold.expires
        with store.transaction():
            assert store.state.get_work_item(item) is not None
            go_on(hold)
            assert hold.expires is expires
            write(store, "e1")
        go_on(hold)
        assert hold.expires is not expires
        with store.transaction():  # renewed since its snapshot, it would lose on a server
            assert store.state.get_work_item(item) is not None
            go_on(hold)
            store.state.complete_work_item(item)
    assert not hold.lost


@parametrize("taken", ["claimed", "reclaimed", None])
def test_a_hold_outlasts_a_suspension_or_tells_that_its_lease_was_lost_meanwhile(
    store: Store, clock: Clock, taken: str | None
) -> None:
    acme = store.state.create_tenant(Tenant(id="acme"))
    view = store.state.for_tenant("acme")
    item = claimed(view)
    with ExitStack() as stack:
        if taken:
            stack.enter_context(pytest.raises(LeaseLost))
        hold = stack.enter_context(view.hold(item))
        store.state.update_tenant(replace(acme, status=TenantStatus.SUSPENDED))
        clock.advance(86_400)
        if taken:
            store.state.reclaim_expired_leases()
        if taken == "claimed":
            clock.advance(86_400)
            assert store.state.claim_work_item("other", [item.queue_type])
        assert view._renew_lease_of(hold) is (taken is None)
        assert hold.lost is (taken is not None)
        store.state.update_tenant(acme)
    if taken is None:
        assert view.complete_work_item(item).status == "completed"


def test_a_view_writes_as_its_tenant_and_the_store_as_the_record_says(store: Store) -> None:
    for tenant in ("acme", "other"):
        store.state.create_tenant(Tenant(id=tenant))
    view = store.state.for_tenant("acme")
    assert create(view, "e1", tenant_id="other").tenant_id == "acme"
    assert view.store_workflow(definition("w", tenant_id="other")).tenant_id == "acme"
    view.enqueue_work_item(WorkItem(id="i", execution_id="e1", queue_type="q", tenant_id="other"))
    assert create(store, "e2", tenant_id="other").tenant_id == "other"
    store.state.update_tenant(Tenant(id="other", status=TenantStatus.SUSPENDED))
    store.state.append_event("e2", EVENT)  # the administrator is not refused
    item = store.state.get_work_item("i")
    assert item is not None and item.tenant_id == "acme"
    assert {execution.tenant_id for execution in store.state.list_executions()} == {
        "acme",
        "other",
    }
    assert [execution.execution_id for execution in view.list_executions()] == ["e1"]


def test_for_tenant_touches_nothing(tmp_path: Path) -> None:
    store = flowstore.open(tmp_path / "app.db")
    store.close()
    view = store.state.for_tenant("acme")
    with pytest.raises(StorageError):
        view.list_tenants()


# --- priorities, unique keys, batches, parking, policies ---


def put(store: Store, count: int = 1, **fields: Any) -> list[str]:
    """Ids of new items of the execution e1, in queue q unless the fields say otherwise."""
    return [enqueue(store, **fields) for _ in range(count)]


def test_claims_of_any_queues_follow_the_model(store: Store, clock: Clock) -> None:
    chance = random.Random(1)
    create(store)
    waiting: list[tuple[int, datetime, str, str]] = []
    for _ in range(200):
        if chance.random() < 0.55:
            queue = chance.choice("abc")
            priority = chance.choice((0, 0, 1, 2))
            available = clock.now + seconds(chance.choice((0, 0, 50)))
            id = enqueue(store, queue_type=queue, priority=priority, available_at=available)
            waiting.append((-priority, available, id, queue))
        else:
            queues = chance.sample("abc", chance.randint(1, 3))
            limit = chance.choice((1, 1, 3))
            due = sorted(one for one in waiting if one[3] in queues and one[1] <= clock.now)
            items = store.state.claim_work_items("w", queues, limit, lease_seconds=1e6)
            assert [item.id for item in items] == [id for _, _, id, _ in due[:limit]]
            waiting = [one for one in waiting if one not in due[:limit]]
        clock.advance(chance.choice((0, 1, 7)))


def test_of_many_callers_that_race_for_a_unique_key_one_has_it(store: Store) -> None:
    create(store)

    def race() -> Any:
        try:
            return enqueue(store, unique_key="k")
        except AlreadyExists as error:
            return error

    found = together([race] * 8)
    [winner] = [one for one in found if isinstance(one, str)]
    assert {one.id for one in found if one is not winner} == {winner}


def test_a_batch_is_put_in_claimed_and_settled_as_one(store: Store) -> None:
    create(store)
    items = [
        WorkItem(execution_id="e1", queue_type="q", priority=number % 3) for number in range(12)
    ]
    ids = store.state.enqueue_work_items(items)
    assert ids == [item.id for item in items]
    bad = WorkItem(execution_id="e1", queue_type="q", priority=101)
    with pytest.raises(InvalidData, match=r"items\[1\]\.priority"):
        store.state.enqueue_work_items([WorkItem(execution_id="e1", queue_type="q"), bad])
    claims = store.state.claim_work_items("w", ["q"], 7)
    assert [item.id for item in claims] == [*ids[2::3], *ids[1::3]][:7]
    assert {item.worker_id for item in claims} == {"w"}
    done = store.state.complete_work_items(claims[:3])
    assert [(item.id, item.status) for item in done] == [
        (item.id, "completed") for item in claims[:3]
    ]
    for refused, error in (
        (claims[2:5], LeaseLost),
        ([claims[4], claims[4]], LeaseLost),
        ([claims[4], WorkItem(execution_id="e1", queue_type="q")], NotFound),
        ([replace(claims[4], lease_fence=9)], LeaseLost),
    ):
        with pytest.raises(error):
            store.state.complete_work_items(refused)
        assert look(store, claims[4].id).status == "claimed"
    with pytest.raises(InvalidData, match=r"items\[0\]"):
        store.state.complete_work_items([claims[4].id])  # type: ignore[list-item]
    assert len(store.state.claim_work_items("w", ["q"], 100)) == 5
    assert store.state.claim_work_items("w", ["q"], 100) == []


def test_a_parked_item_waits_for_a_span_or_until_a_time(store: Store, clock: Clock) -> None:
    item = claimed(store, max_attempts=1)
    later = clock.now + seconds(60)
    with pytest.raises(InvalidData, match="until"):
        store.state.park_work_item(item, delay=1, until=later)
    assert store.state.park_work_item(item, until=later).available_at == later


def test_a_rate_is_a_bucket_that_refills_evenly(store: Store, clock: Clock) -> None:
    put(store, 400)
    store.state.set_queue_policy(QueuePolicy(queue_type="q", rate=3, per_seconds=10))
    chance = random.Random(2)
    times: list[datetime] = []
    for _ in range(60):
        items = store.state.claim_work_items(
            "w", ["q"], chance.choice((1, 2, 9)), lease_seconds=1e6
        )
        times += [clock.now] * len(items)
        clock.advance(chance.choice((0.1, 1, 4, 30)))
    assert len(times) > 30
    for first in range(len(times)):
        for last in range(first, len(times)):
            passed = (times[last] - times[first]).total_seconds()
            assert last - first + 1 <= 3 + passed * 3 / 10 + 1e-6
    clock.advance(1000)
    assert len(store.state.claim_work_items("w", ["q"], 9)) == 3


def test_a_view_keeps_to_the_policies_of_all_and_sets_none(store: Store, clock: Clock) -> None:
    for tenant in ("a", "b"):
        store.state.create_tenant(Tenant(id=tenant))
        create(store, f"run-{tenant}", tenant_id=tenant)
        put(store, 2, execution_id=f"run-{tenant}")
    policy = QueuePolicy(queue_type="q", max_running=1)
    view = store.state.for_tenant("a")
    with pytest.raises(TenantMismatch):
        view.set_queue_policy(policy)
    store.state.set_queue_policy(policy)
    assert view.get_queue_policy("q") == policy
    held = store.state.for_tenant("b").claim_work_item("w", ["q"])
    assert held is not None and view.claim_work_item("w", ["q"]) is None
    clock.advance(10)
    item = view.claim_work_item("w", ["q"])  # it has taken back the lease of the other tenant
    assert item is not None and item.tenant_id == "a"
    assert look(store, held.id).attempt == 1


LIMITED = """
import random
with flowstore.open(sys.argv[1], synchronous="OFF", lease_seconds=1, backoff=lambda attempt: 0) as store:
    print("ready", flush=True)
    while True:
        item = store.state.claim_work_item("w", ["q"], wait=0.2)
        if item is not None:
            with store.transaction() as tx:
                store.state.renew_lease(item)
                tx.execute("INSERT INTO seen (n) SELECT COUNT(*) FROM flowstore_work_items WHERE status = 'claimed'")
            store.state.complete_work_item(item)
"""


@needs_kill
@parametrize("limits", [{"max_running": 3}, {"rate": 20.0, "per_seconds": 0.1}])
def test_max_running_and_rate_are_kept_by_threads_and_processes_that_are_killed(
    target: str, limits: dict[str, Any]
) -> None:
    if target == ":memory:":
        return  # other processes cannot see it
    with flowstore.open(target, synchronous="OFF", lease_seconds=1, backoff=lambda _: 0) as store:
        execute(store, "CREATE TABLE seen (n INTEGER)")
        create(store)
        store.state.set_queue_policy(QueuePolicy(queue_type="q", **limits))
        store.state.enqueue_work_items(
            [WorkItem(execution_id="e1", queue_type="q", max_attempts=1000) for _ in range(300)]
        )
        children = [script(LIMITED, target) for _ in range(3)]
        try:
            for child in children:
                assert child.stdout is not None and child.stdout.readline() == "ready\n"

            def work() -> None:
                while store.state.list_work_items(status="pending", limit=1):
                    items = store.state.claim_work_items("t", ["q"], 2, wait=0.1)
                    count = len(store.state.list_work_items(status="claimed", limit=50))
                    execute(store, "INSERT INTO seen VALUES (?)", (count,))
                    for item in items:
                        with suppress(LeaseLost):
                            store.state.complete_work_item(item)

            threads = [Caller(work) for _ in range(4)]
            time.sleep(0.3)
            children[0].kill()
            for thread in threads:
                thread.result()
        finally:
            for child in children:
                child.kill()
                child.communicate()
        [(most, count)] = execute(store, "SELECT MAX(n), COUNT(*) FROM seen")
        assert count > 50
        if "max_running" in limits:
            assert most <= 3
            return
        items = store.state.list_work_items(status="completed", limit=300)
        times = sorted(item.claimed_at for item in items if item.claimed_at is not None)
        assert len(times) > 250
        for earlier, later in itertools.combinations(range(len(times)), 2):
            # A claim has its time before it waits for the policy: that is as many as there are callers.
            filled = 20 + (times[later] - times[earlier]) / timedelta(seconds=0.1) * 20 + 7
            assert later - earlier < filled, "more than the bucket and what has filled it since"


def test_a_batch_takes_back_as_many_expired_leases_as_single_claims(
    store: Store, clock: Clock
) -> None:
    found = []
    for batch in (True, False):
        queue = f"q{batch}"
        put(store, 40, queue_type=queue, priority=5)
        store.state.claim_work_items("lost", [queue], 40)
        clock.advance(60)
        put(store, 40, queue_type=queue)
        store.state.set_queue_policy(QueuePolicy(queue_type=queue, max_running=40))
        if batch:
            items = store.state.claim_work_items("w", [queue], 40)
        else:
            items = [claim(store, queue) for _ in range(40)]
        found.append([item.priority for item in items])
        assert store.state.claim_work_item("w", [queue]) is None
    assert found == [[0] * 40] * 2


@parametrize(
    ("rate", "per_seconds"),
    [(1, 1e303), (1e-303, 1), (1e100, 1e-300), (10**30, 1), (2**53 + 1, 1), (1e-310, 1)],
)
def test_any_rate_can_be_kept(store: Store, rate: float, per_seconds: float) -> None:
    policy = QueuePolicy(queue_type="q", rate=rate, per_seconds=per_seconds)
    assert store.state.set_queue_policy(policy) == store.state.get_queue_policy("q")
    put(store, 2)
    claim(store)
    second = store.state.claim_work_item("w", ["q"])
    assert (second is not None) == (rate > 1)


def test_a_rate_goes_on_after_the_clock_was_put_back(store: Store, clock: Clock) -> None:
    store.state.set_queue_policy(QueuePolicy(queue_type="q", rate=1))
    now = clock.now
    for years in (0, 70):
        clock.now = now - timedelta(days=365 * years)
        put(store, 2)
        claim(store)
        assert store.state.claim_work_item("w", ["q"]) is None
        clock.advance(1)
        claim(store)
        store.state.set_queue_policy(QueuePolicy(queue_type="q", rate=1))
        clock.now = now - timedelta(days=365 * 80)
        put(store, 1)
        claim(store)  # of a new policy the bucket is full, also before 1970


def test_a_bucket_refills_while_the_clock_catches_up(store: Store, clock: Clock) -> None:
    put(store, 3)
    store.state.set_queue_policy(QueuePolicy(queue_type="q", rate=3))
    assert len(store.state.claim_work_items("w", ["q"], 9)) == 3
    clock.advance(-7200)
    put(store, 9)
    assert store.state.claim_work_items("w", ["q"], 9) == []  # and the bucket is empty from now on
    for _ in range(3):
        clock.advance(1)
        assert len(store.state.claim_work_items("w", ["q"], 9)) == 3
    clock.advance(-3600)
    put(store)
    began = time.monotonic()
    assert store.state.claim_work_item("w", ["q"], wait=0.05) is None
    assert time.monotonic() - began < 9
    clock.advance(1)
    assert claim(store, wait=0.05)


@parametrize("rate", [3, 6, 7, 11, 13])
def test_the_last_claim_of_a_bucket_is_not_lost_by_rounding(
    store: Store, clock: Clock, rate: int
) -> None:
    put(store, 3 * rate)
    for most in (1, 2, rate - 1):
        store.state.set_queue_policy(QueuePolicy(queue_type="q", rate=rate))
        taken: list[WorkItem] = []
        while items := store.state.claim_work_items("w", ["q"], most):
            taken += items
        assert len(taken) == rate


@sqlite_only
def test_an_enqueue_a_claim_and_an_end_write_few_pages(path: Path) -> None:
    with flowstore.open(path, synchronous="OFF") as store:
        create(store)
        items = [
            WorkItem(execution_id="e1", queue_type="q", payload="x" * 200) for _ in range(5000)
        ]
        store.state.enqueue_work_items(items)
        claims: list[Any] = []

        def pages(call: Call) -> float:
            store.compact()
            call()
            before = os.path.getsize(f"{path}-wal")
            for _ in range(200):
                call()
            return (os.path.getsize(f"{path}-wal") - before) / (4096 + 24) / 200

        assert pages(lambda: enqueue(store, payload="x" * 200)) <= 7
        assert pages(lambda: claims.append(claim(store))) <= 6
        assert pages(lambda: store.state.complete_work_item(claims.pop())) <= 4


# ==================================================================================================
# PersistenceProvider
# ==================================================================================================


START_MS = int(START.timestamp()) * 1000


class WorkflowRules(Machine):
    """Instances with their pointers, subscriptions, events, errors, counters and commands."""

    topics: ClassVar = [("paid", "k"), ("paid", "l"), ("sent", "k")]
    dues = st.none() | st.integers(-4, 4).map(lambda age: START_MS + 1000 * age)
    statuses = st.sampled_from([WorkflowStatus.RUNNABLE] * 3 + [*WorkflowStatus])
    pointers = st.lists(
        st.tuples(st.sampled_from("pqrs"), st.sampled_from(PointerStatus), small_json),
        max_size=4,
        unique_by=lambda made: made[0],
    )

    def made(
        self, id: str, name: str, pointers: Any, due: int | None, status: WorkflowStatus
    ) -> WorkflowInstance:
        return WorkflowInstance(
            id=id,
            name=name,
            workflow_definition_id="d",
            next_execution=due,
            status=status,
            execution_pointers=[
                ExecutionPointer(id=key, step_id=step, status=word, outcome=value)
                for step, (key, word, value) in enumerate(pointers)
            ],
        )

    def taken(self, name: str, id: str | None = None) -> bool:
        return name in {
            instance.name for instance in self.model.instances.values() if instance.id != id
        }

    @rule(id=three, name=st.sampled_from(["", "d-1", "d-2", "n"]), pointers=pointers, due=dues,
          status=statuses)  # fmt: skip
    def create_instance(
        self, id: str, name: str, pointers: Any, due: int | None, status: WorkflowStatus
    ) -> None:
        instance = self.made(id, name, pointers, due, status)
        if id in self.model.instances or self.taken(name):
            return self.refuses(
                AlreadyExists("workflow", id if id in self.model.instances else name),
                lambda: self.store.workflows.create_new_workflow(instance),
            )
        while not name or self.taken(name):
            self.model.counters["d"] = self.model.counters.get("d", 0) + 1
            name = f"d-{self.model.counters['d']}"
        self.model.instances[id] = replace(instance, name=name, create_time=self.clock())
        assert self.store.workflows.create_new_workflow(instance) == id
        return None

    @precondition(lambda self: self.model.instances)
    @rule(id=three, name=st.sampled_from(["", "d-1", "n"]), pointers=pointers, due=dues,
          status=statuses, topic=st.sampled_from(topics),
          subscriptions=st.lists(three, unique=True, max_size=2), begin=ages)  # fmt: skip
    def persist(
        self,
        id: str,
        name: str,
        pointers: Any,
        due: int | None,
        status: WorkflowStatus,
        topic: tuple[str, str],
        subscriptions: list[str],
        begin: datetime | None,
    ) -> None:
        instance = self.made(id, name, pointers, due, status)
        fields: Any = dict(zip(("event_name", "event_key"), topic, strict=True))
        added = [
            subscription(id=one, workflow_id=id, subscribe_as_of=begin, **fields)
            for one in subscriptions
        ]
        call = partial(self.store.workflows.persist_workflow_with_subscriptions, instance, added)
        stored = self.model.instances.get(id)
        if stored is None:
            return self.refuses(NotFound("workflow", id), call)
        if self.taken(name, id):
            return self.refuses(AlreadyExists("workflow", name), call)
        for key in subscriptions:
            if key in self.model.subscriptions:
                return self.refuses(AlreadyExists("subscription", key), call)
        for one in added:
            self.model.subscriptions[one.id] = replace(one, subscribe_as_of=begin or self.clock())
        self.model.instances[id] = replace(
            instance, name=name or stored.name, create_time=stored.create_time
        )
        return call()

    @precondition(lambda self: self.model.instances)
    @rule(id=three)
    def delete(self, id: str) -> None:
        if id not in self.model.instances:
            return self.refuses(
                NotFound("workflow", id), lambda: self.store.workflows.delete_workflow(id)
            )
        self.drop({id})
        return self.store.workflows.delete_workflow(id)

    def drop(self, gone: set[str]) -> None:
        model = self.model
        model.instances = {
            id: instance for id, instance in model.instances.items() if id not in gone
        }
        model.subscriptions = {
            id: one for id, one in model.subscriptions.items() if one.workflow_id not in gone
        }
        model.terminated &= model.subscriptions.keys()
        model.errors = [error for error in model.errors if error.workflow_id not in gone]

    @precondition(lambda self: self.model.instances)
    @rule(status=st.sampled_from(WorkflowStatus))
    def purge(self, status: WorkflowStatus) -> None:
        gone = {
            id
            for id, instance in self.model.instances.items()
            if instance.status is status
            and instance.create_time is not None
            and instance.create_time < self.clock()
        }
        assert self.store.workflows.purge_workflows(status, self.clock()) == len(gone)
        self.drop(gone)

    @rule()
    def count_on(self) -> None:
        self.model.counters["d"] = self.model.counters.get("d", 0) + 1
        assert self.store.workflows.next_definition_sequence("d") == self.model.counters["d"]

    @precondition(lambda self: self.model.subscriptions)
    @rule(id=three, token=st.sampled_from(["t1", "t2"]), lasts=st.sampled_from([-1, 0, 0, 1, 9]))
    def hold_subscription(self, id: str, token: str, lasts: int) -> None:
        until = self.clock() + seconds(lasts)
        call = partial(self.store.workflows.set_subscription_token, id, token, "host", until)
        if id not in self.model.subscriptions or id in self.model.terminated:
            return self.refuses(NotFound("subscription", id), call)
        free = self.is_free(self.model.subscriptions[id])
        if free:
            self.model.subscriptions[id] = replace(
                self.model.subscriptions[id],
                external_token=token,
                external_worker_id="host",
                external_token_expiry=until,
            )
        assert call() is free
        return None

    def is_free(self, one: EventSubscription) -> bool:
        return one.external_token_expiry is None or one.external_token_expiry <= self.clock()

    @precondition(lambda self: self.model.subscriptions)
    @rule(id=three, token=st.sampled_from(["t1", "t2"]), end=st.booleans())
    def let_go(self, id: str, token: str, end: bool) -> None:
        workflows, stored = self.store.workflows, self.model.subscriptions.get(id)
        if end:
            if stored is None:
                self.refuses(NotFound("subscription", id), lambda: workflows.get_subscription(id))
                return self.refuses(
                    NotFound("subscription", id), lambda: workflows.terminate_subscription(id)
                )
            self.model.terminated.add(id)
            return workflows.terminate_subscription(id)
        if stored is None or stored.external_token != token:
            return self.refuses(
                NotFound("subscription", id), lambda: workflows.clear_subscription_token(id, token)
            )
        self.model.subscriptions[id] = replace(
            stored, external_token=None, external_worker_id=None, external_token_expiry=None
        )
        return workflows.clear_subscription_token(id, token)

    @rule(id=three, topic=st.sampled_from(topics), at=ages, data=small_json)
    def create_event(self, id: str, topic: tuple[str, str], at: datetime | None, data: Any) -> None:
        name, key = topic
        event = Event(id=id, event_name=name, event_key=key, event_time=at, event_data=data)
        if id in self.model.events:
            self.refuses(
                AlreadyExists("event", id), lambda: self.store.workflows.create_event(event)
            )
        else:
            self.model.events[id] = replace(event, event_time=at or self.clock())
            assert self.store.workflows.create_event(event) == id

    @precondition(lambda self: self.model.events)
    @rule(id=three, done=st.booleans())
    def mark_event(self, id: str, done: bool) -> None:
        workflows = self.store.workflows
        call = partial(
            workflows.mark_event_processed if done else workflows.mark_event_unprocessed, id
        )
        if id not in self.model.events:
            self.refuses(NotFound("event", id), lambda: workflows.get_event(id))
            return self.refuses(NotFound("event", id), call)
        self.model.events[id] = replace(self.model.events[id], is_processed=done)
        return call()

    @rule(ids=st.lists(three, max_size=3), torn=st.booleans())
    def persist_errors(self, ids: list[str], torn: bool) -> None:
        made = [
            ExecutionError(workflow_id=id, execution_pointer_id="p", message=f"{n}")
            for n, id in enumerate(ids)
        ]
        if torn:
            wrong = replace(made[0], message="\0") if made else None
            return self.refuses(
                InvalidData,
                lambda: self.store.workflows.persist_errors([*made, wrong]),  # type: ignore[list-item]
            )
        self.model.errors += [replace(error, error_time=self.clock()) for error in made]
        return self.store.workflows.persist_errors(made)

    @rule(data=three, at=st.integers(0, 20))
    def schedule(self, data: str, at: int) -> None:
        when = START_MS + at * 1000
        self.model.commands[data] = min(when, self.model.commands.get(data, when))
        self.store.workflows.schedule_command(
            ScheduledCommand(command_name=CommandName.PROCESS_EVENT, data=data, execute_time=when)
        )

    @rule(
        ahead=st.none() | st.integers(-5, 20),
        plan=st.dictionaries(
            three, st.tuples(st.booleans(), st.lists(st.integers(0, 20), max_size=3))
        ),
    )
    def process(self, ahead: int | None, plan: dict[str, tuple[bool, list[int]]]) -> None:
        """By its plan, each handler may schedule its own command again, and may fail."""

        def handler(found: ScheduledCommand) -> None:
            seen.append((found.execute_time, found.data))
            fails, times = plan.get(found.data, (False, []))
            del self.model.commands[found.data]
            for again in times:
                self.schedule(found.data, again)
            if fails:
                failing.append(found.data)
                left = self.model.commands.get(found.data, MAX_INT)
                self.model.commands[found.data] = min(left, seen[-1][0])
                raise KeyError(found.data)

        as_of = None if ahead is None else self.clock() + seconds(ahead)
        call = partial(self.store.workflows.process_commands, as_of, handler)
        if self.blocks:
            return self.refuses(StorageError, call)
        seen: list[tuple[Any, str]] = []
        failing: list[str] = []
        until = (as_of or self.clock()).timestamp() * 1000
        commands = sorted((at, data) for data, at in self.model.commands.items())
        due = [(at, data) for at, data in commands if at <= until]
        try:
            assert call() == len(due) and not failing
        except ExceptionGroup as group:
            assert [error.args[0] for error in group.exceptions] == failing != []
        assert seen == due
        return None

    @invariant()
    def workflows_agree(self) -> None:
        workflows, model = self.store.workflows, self.model
        for id in "abc":
            if id in model.instances:
                assert workflows.get_workflow_instance(id) == model.instances[id]
                assert (
                    workflows.get_workflow_instance_by_name(model.instances[id].name)
                    == model.instances[id]
                )
            if id in model.subscriptions:
                assert workflows.get_subscription(id) == model.subscriptions[id]
            if id in model.events:
                assert workflows.get_event(id) == model.events[id]
            errors = [error for error in model.errors[::-1] if error.workflow_id == id]
            assert workflows.list_errors(id) == errors
        assert workflows.get_workflow_instances([*"cab"]) == [
            model.instances[id] for id in "cab" if id in model.instances
        ]
        for as_of in (None, self.clock() - seconds(4)):
            self.what_is_due_agrees(as_of)
        stored = dict(execute(self.store, "SELECT data, execute_time FROM scheduled_commands"))
        assert stored == model.commands
        counts = self.store.stats()["tables"]
        assert counts["workflows"] == len(model.instances)
        assert counts["event_subscriptions"] == len(model.subscriptions)
        assert counts["execution_errors"] == len(model.errors)
        assert counts["execution_pointers"] == sum(
            len(one.execution_pointers) for one in model.instances.values()
        )

    def what_is_due_agrees(self, as_of: datetime | None) -> None:
        workflows, model, now = self.store.workflows, self.model, as_of or self.clock()
        due = [
            (instance.next_execution, id)
            for id, instance in model.instances.items()
            if instance.status is WorkflowStatus.RUNNABLE
            and isinstance(instance.next_execution, int)
            and instance.next_execution <= now.timestamp() * 1000
        ]
        assert workflows.get_runnable_instances(as_of) == [id for _, id in sorted(due)]
        happened = sorted(
            (event.event_time, id)
            for id, event in model.events.items()
            if event.event_time and event.event_time <= now
        )
        assert workflows.get_runnable_events(as_of) == [
            id for _, id in happened if not model.events[id].is_processed
        ]
        for topic in self.topics:
            begun = sorted(
                (one.subscribe_as_of, id)
                for id, one in model.subscriptions.items()
                if id not in model.terminated
                and (one.event_name, one.event_key) == topic
                and one.subscribe_as_of is not None
                and one.subscribe_as_of <= now
            )
            subscriptions = [model.subscriptions[id] for _, id in begun]
            assert workflows.get_subscriptions(*topic, as_of) == subscriptions
            free = [*filter(self.is_free, subscriptions)]
            first = workflows.get_first_open_subscription(*topic, as_of)
            assert first == (free[0] if free else None)
            assert workflows.get_events(*topic, as_of) == [
                id
                for _, id in happened
                if (model.events[id].event_name, model.events[id].event_key) == topic
            ]


(
    TestWorkflowsByAModelInMemory,
    TestWorkflowsByAModelInAFile,
    TestWorkflowsByAModelOnPostgres,
) = modelled(WorkflowRules, 30, engines=ENGINES)


a_few_flow = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def event_flow(**fields: Any) -> Event:
    return Event(**{"event_name": "paid", "event_key": "7", **fields})


def handled(
    workflows: PersistenceProvider, as_of: datetime | None = None, **options: Any
) -> list[str]:
    """The data of the commands that a call hands out, in order; each handler just returns."""
    data: list[str] = []
    count = workflows.process_commands(as_of, lambda found: data.append(found.data), **options)
    assert count == len(data)
    return data


@contextmanager
def refused_flow(
    store: Store, error: type[FlowStoreError], match: str | None = None
) -> Iterator[pytest.ExceptionInfo[Any]]:
    """The block raises, and nothing was written."""
    before = rows(store)
    with pytest.raises(error, match=match) as caught:
        yield caught
    assert rows(store) == before


SCRIPT = """
import random, threading
from datetime import UTC, datetime, timedelta
from flowstore import *
store = flowstore.open(sys.argv[1], synchronous="OFF")
workflows = store.workflows
"""


FULL_POINTER = ExecutionPointer(
    id="p0", step_id=3, active=False, status=PointerStatus.WAITING_FOR_EVENT, sleep_until=START + seconds(1),
    persistence_data={"a": [1, 2.5, None, True, "ü"]}, start_time=START, end_time=START + seconds(0.000001),
    event_name="paid", event_key="7", event_published=True, event_data=[1], step_name="wait", retry_count=2,
    children=["p1", "p2"], context_item=0, predecessor_id="p-", outcome=False, scope=["s"],
    extension_attributes={"k": {"n": -1}},
)  # fmt: skip


FULL_INSTANCE = WorkflowInstance(
    id="w1", name="first", workflow_definition_id="order", version=2, description="d", reference="r",
    root_workflow_id="w0", execution_pointers=[FULL_POINTER, ExecutionPointer(id="p1", step_id=0)], next_execution=-5,
    status=WorkflowStatus.SUSPENDED, data={"total": 1250}, create_time=START - seconds(9), complete_time=START,
)  # fmt: skip


def test_an_instance_comes_back_as_it_was_stored(workflows: PersistenceProvider) -> None:
    given = copy.deepcopy(FULL_INSTANCE)
    assert workflows.create_new_workflow(given) == "w1"
    assert given == FULL_INSTANCE
    stored = workflows.get_workflow_instance("w1")
    assert stored == workflows.get_workflow_instance_by_name("first") == FULL_INSTANCE
    assert type(stored.execution_pointers[0].status) is PointerStatus
    assert stored.execution_pointers[0].outcome is False


def test_an_empty_id_is_made_and_the_record_given_stays_as_it_was(
    workflows: PersistenceProvider,
) -> None:
    given = instance(id="")
    made = workflows.create_new_workflow(given)
    assert uuid.UUID(made).version == 7
    assert (given.id, given.name, given.create_time) == ("", "", None)
    assert workflows.get_workflow_instance(uuid.UUID(made)).id == made


def test_an_empty_id_of_a_subclass_with_an_init_of_its_own_is_made(
    workflows: PersistenceProvider,
) -> None:
    class Mine(WorkflowInstance):
        def __init__(self, definition: str) -> None:
            super().__init__(id="", workflow_definition_id=definition)

    assert workflows.get_workflow_instance(workflows.create_new_workflow(Mine("order")))


def test_an_empty_name_is_the_next_of_its_definition_that_is_not_taken(
    workflows: PersistenceProvider,
) -> None:
    names = [created(workflows).name for _ in range(2)]
    created(workflows, name="order-4")
    created(workflows, name="order-5", workflow_definition_id="else")
    assert workflows.next_definition_sequence("order") == 3
    names += [created(workflows).name, created(workflows, workflow_definition_id="").name]
    assert names == ["order-1", "order-2", "order-6", "-1"]
    assert workflows.next_definition_sequence("order") == 7


def test_an_automatic_name_must_fit(store: Store, workflows: PersistenceProvider) -> None:
    assert created(workflows, workflow_definition_id="d" * 253).name == "d" * 253 + "-1"
    with refused_flow(store, InvalidData, "automatic name"):
        workflows.create_new_workflow(instance(workflow_definition_id="d" * 254))
    assert created(workflows, workflow_definition_id="d" * 254, name="short").name == "short"


def test_racing_creators_get_each_number_once(workflows: PersistenceProvider) -> None:
    names = together([lambda: [created(workflows).name for _ in range(5)]] * 16)
    assert sorted(itertools.chain(*names)) == sorted(f"order-{number}" for number in range(1, 81))


def test_the_sequence_of_a_definition_is_atomic(workflows: PersistenceProvider) -> None:
    numbers = together([lambda: [workflows.next_definition_sequence("d") for _ in range(10)]] * 8)
    assert sorted(itertools.chain(*numbers)) == list(range(1, 81))
    assert all(own == sorted(own) for own in numbers)
    assert workflows.next_definition_sequence("other") == 1


def test_persist_stores_what_changed_and_keeps_the_creation_time(
    workflows: PersistenceProvider,
) -> None:
    workflows.create_new_workflow(instance(id="w1"))
    workflows.persist_workflow(FULL_INSTANCE)
    assert workflows.get_workflow_instance("w1") == replace(FULL_INSTANCE, create_time=START)


@parametrize("known", ["by the store that created it", "by another store"])
@sqlite_only
def test_persist_writes_the_pointers_that_changed_and_no_other(
    store: Store, written: Callable[[WorkflowInstance], list[tuple[str, str]]], known: str
) -> None:
    own = created(
        store.workflows,
        execution_pointers=pointers(*(f"p{number:03}" for number in range(200))),
    )

    def persist() -> list[tuple[str, str]]:
        if known == "by another store":  # what the first one remembers must not matter
            execute(store, "UPDATE workflows SET stamp = stamp + 1")
        return written(own)

    assert persist() == []
    own.execution_pointers[57].status = PointerStatus.COMPLETE
    assert persist() == [("UPDATE", "p057")]
    own.execution_pointers[199].persistence_data = {"tries": [1]}
    assert persist() == [("UPDATE", "p199")]
    own.execution_pointers[199].persistence_data["tries"].append(2)
    assert persist() == [("UPDATE", "p199")]
    own.execution_pointers += pointers("q0", "q1")
    own.execution_pointers[0].sleep_until = START
    assert persist() == [("INSERT", "q0"), ("INSERT", "q1"), ("UPDATE", "p000")]
    del own.execution_pointers[10:12]
    assert persist() == [("DELETE", "p010"), ("DELETE", "p011")]
    own.execution_pointers.append(own.execution_pointers.pop(0))
    assert persist() == [("UPDATE", "p000")]
    own.execution_pointers.insert(0, pointers("first")[0])
    assert ("INSERT", "first") in persist()
    own.execution_pointers.clear()
    assert len(persist()) == 201


def test_a_host_with_many_instances_in_hand_reads_no_pointers_that_it_wrote_itself(
    watched: type[Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    with flowstore.open(":memory:") as store:
        host = store.workflows
        made = [
            instance(id=f"w{number}", name=f"n{number}", execution_pointers=pointers("a", "b"))
            for number in range(100)
        ]
        for one in made:
            host.create_new_workflow(one)
        watched.statements.clear()
        for one in made:
            one.execution_pointers[0].retry_count = 1
            host.persist_workflow(one)
        touched = [sql for sql in watched.statements if "execution_pointers" in sql]
        assert {sql.split()[0] for sql in touched} == {"INSERT"}
        assert len(touched) == len(made)
        monkeypatch.setattr(flowstore, "_POINTER_CACHE_SIZE", 200)
        for one in made * 2:
            host.persist_workflow(one)
        assert len(host._pointer_cache) <= 20
        assert host.get_workflow_instances([one.id for one in made]) == [
            replace(one, create_time=host.get_workflow_instance(one.id).create_time) for one in made
        ]


def test_values_that_are_equal_in_python_but_not_in_json_are_changes(
    workflows: PersistenceProvider,
) -> None:
    own = created(workflows, execution_pointers=pointers("p"))
    given: list[Any] = [
        1,
        True,
        1.0,
        -0.0,
        0.0,
        0,
        False,
        "0",
        [0],
        None,
        [None],
        {},
        [],
        {"a": 1, "b": 2},
    ]
    for value in [*given, {"b": 2, "a": 1}]:
        own.execution_pointers[0].outcome = value
        workflows.persist_workflow(own)
        (stored,) = workflows.get_workflow_instance(own.id).execution_pointers
        assert json.dumps(stored.outcome) == json.dumps(value)


class SummerTime(tzinfo):
    """A zone whose clocks show each hour twice."""

    def utcoffset(self, when: datetime | None) -> timedelta:
        return timedelta(hours=1 - (when.fold if when else 0))

    def dst(self, when: datetime | None) -> timedelta:
        return self.utcoffset(when)

    def tzname(self, when: datetime | None) -> str:
        return "summer time"


def test_times_that_a_clock_shows_twice_are_told_apart(workflows: PersistenceProvider) -> None:
    first = datetime(2030, 10, 27, 2, 30, tzinfo=SummerTime())
    own = created(workflows, execution_pointers=pointers("p"))
    for time in (first, first.replace(fold=1), first):
        own.execution_pointers[0].start_time = time
        workflows.persist_workflow(own)
        (stored,) = workflows.get_workflow_instance(own.id).execution_pointers
        assert stored.start_time == time.astimezone(UTC)


def test_wrong_values_are_found_in_a_pointer_that_was_right_before(store: Store) -> None:
    own = created(
        store.workflows, execution_pointers=pointers("p", "q", status=PointerStatus.COMPLETE)
    )
    store.workflows.persist_workflow(own)
    for name, value in (
        ("status", WorkflowStatus.COMPLETE), ("step_id", True), ("active", 1), ("id", []), ("id", ""), ("id", "q"),
        ("start_time", START.replace(tzinfo=None)), ("outcome", {1}), ("outcome", float("nan")), ("scope", "s"),
        ("children", [1]), ("extension_attributes", []), ("step_name", "\ud800"), ("retry_count", 2**63),
    ):  # fmt: skip
        changed = copy.deepcopy(own)
        setattr(changed.execution_pointers[0], name, value)
        with refused_flow(store, InvalidData, rf"^execution_pointers\[[01]\]\.{name}"):
            store.workflows.persist_workflow(changed)
        assert store.workflows.get_workflow_instance(own.id) == own
    wrong: Any
    for wrong in ("text", [1], [None], {}, pointers("p", "p")):
        with refused_flow(store, InvalidData, "^execution_pointers"):
            store.workflows.persist_workflow(replace(own, execution_pointers=wrong))
        with refused_flow(store, InvalidData, "^execution_pointers"):
            store.workflows.create_new_workflow(instance(execution_pointers=wrong))


def test_persist_of_one_changed_pointer_costs_a_fraction_of_rewriting_all(
    watched: type[Watched], clock: Clock
) -> None:
    with flowstore.open(":memory:", clock=clock) as store:
        own = created(store.workflows, execution_pointers=pointers(*map(str, range(1000))))
        own.execution_pointers[500].retry_count = 1
        one = watched.steps(lambda: store.workflows.persist_workflow(own))
        for pointer in own.execution_pointers:
            pointer.retry_count = 2
        everything = watched.steps(lambda: store.workflows.persist_workflow(own))
        assert one * 100 < everything
        assert store.workflows.get_workflow_instance(own.id) == own


@given(st.data())
@a_few_flow
def test_what_is_read_is_what_was_persisted_whoever_did_it(
    tmp_path_factory: pytest.TempPathFactory, data: Any
) -> None:
    """Two stores take turns at one instance, with rollbacks and deletions between."""
    path = tmp_path_factory.mktemp("turns") / "app.db"
    with (
        flowstore.open(path, synchronous="OFF") as first,
        flowstore.open(path, synchronous="OFF") as second,
    ):
        truth = created(first.workflows, id="w")
        for _ in range(data.draw(st.integers(1, 8))):
            changed = copy.deepcopy(truth)
            listed = changed.execution_pointers
            for edit in data.draw(
                st.lists(st.sampled_from(["add", "drop", "change", "shuffle"]), max_size=4)
            ):
                at = data.draw(st.integers(0, len(listed)))
                if edit == "add":
                    listed.insert(at, ExecutionPointer(step_id=at))
                elif edit == "shuffle":
                    listed[:] = data.draw(st.permutations(listed))
                elif edit == "drop":
                    del listed[at : at + 1]
                elif at < len(listed):
                    listed[at].outcome = data.draw(st.sampled_from([1, True, 1.0, [], None]))
            store = data.draw(st.sampled_from([first, second]))
            turn = data.draw(st.sampled_from(["persist", "persist", "roll back", "create anew"]))
            if turn == "roll back":
                with pytest.raises(KeyError), store.transaction():
                    store.workflows.persist_workflow(changed)
                    raise KeyError
                continue
            if turn == "create anew":
                store.workflows.delete_workflow("w")
                store.workflows.create_new_workflow(changed)
            else:
                store.workflows.persist_workflow(changed)
            truth = changed
            read = [one.workflows.get_workflow_instance("w") for one in (first, second)]
            assert read == [truth, truth]
            kinds = [
                [type(pointer.outcome) for pointer in one.execution_pointers]
                for one in (*read, truth)
            ]
            assert kinds[0] == kinds[1] == kinds[2]


def test_millisecond_fields_take_datetimes_and_give_numbers(workflows: PersistenceProvider) -> None:
    local = datetime(2030, 1, 1, 2, 0, 0, 1999, tzinfo=UTC).astimezone()
    own = created(workflows, next_execution=local)
    assert own.next_execution == START_MS + 7_200_001 and type(own.next_execution) is int
    for number in (MAX_INT, -MAX_INT - 1, 0):
        workflows.persist_workflow(replace(own, next_execution=number))
        assert workflows.get_workflow_instance(own.id).next_execution == number
    assert workflows.get_runnable_instances() == [own.id]
    seen: list[Any] = []
    workflows.schedule_command(command("x", local))
    workflows.process_commands(local, seen.append)
    assert seen == [command("x", START_MS + 7_200_001)]
    assert type(seen[0].execute_time) is int


def test_an_instance_that_is_not_there_is_not_found(workflows: PersistenceProvider) -> None:
    for read in (workflows.get_workflow_instance, workflows.get_workflow_instance_by_name):
        with pytest.raises(NotFound) as caught:
            read("gone")
        assert caught.value.args == ("workflow", "gone")
    with pytest.raises(NotFound):
        workflows.get_workflow_instance_by_name("")


def test_instances_come_in_the_order_asked(workflows: PersistenceProvider) -> None:
    ids = [str(uuid.uuid4()) for _ in range(5)]
    for number, id in enumerate(ids):
        workflows.create_new_workflow(
            instance(id=id, execution_pointers=pointers("z", "a", "m")[: number % 4])
        )
    asked: list[Any] = [uuid.UUID(ids[3]), "gone", ids[0], ids[4], ids[3]]
    found = workflows.get_workflow_instances(asked)
    assert found == [workflows.get_workflow_instance(ids[number]) for number in (3, 0, 4, 3)]
    assert [pointer.id for pointer in found[0].execution_pointers] == ["z", "a", "m"]
    assert found[0] is not found[3]
    assert workflows.get_workflow_instances([]) == [] == workflows.get_workflow_instances(["gone"])


def test_many_instances_are_read_in_two_queries_per_ten_thousand(
    watched: type[Watched],
) -> None:
    with flowstore.open(":memory:") as store:
        with store.transaction():
            ids = [store.workflows.create_new_workflow(instance()) for _ in range(50)]
        many = [*(f"gone-{number}" for number in range(9_950)), *ids]
        for asked, queries in ((many, 2), ([*many, "gone"], 4)):
            read = partial(store.workflows.get_workflow_instances, asked)
            assert watched.said(read, "SELECT") == queries
            assert [one.id for one in read()] == ids


def test_purge_takes_what_ended_before_a_time(store: Store, workflows: PersistenceProvider) -> None:
    hour = timedelta(hours=1)
    for id, status, made, ended in (
        ("old", "Complete", START - 3 * hour, START - 2 * hour), ("edge", "Complete", START - 3 * hour, START - hour),
        ("young", "Complete", START - 3 * hour, START), ("no end", "Complete", START - 2 * hour, None),
        ("other", "Terminated", START - 3 * hour, START - 2 * hour), ("runs", "Runnable", START - 3 * hour, None),
    ):  # fmt: skip
        workflows.create_new_workflow(
            instance(
                id=id,
                status=status,
                create_time=made,
                complete_time=ended,
                execution_pointers=pointers("p"),
            )
        )
    with store.transaction():
        assert workflows.purge_workflows("Complete", START - hour) == 2
    assert workflows.purge_workflows(WorkflowStatus.COMPLETE, START - hour) == 0
    left = ["edge", "young", "other", "runs"]
    assert [one.id for one in workflows.get_workflow_instances(["old", "no end", *left])] == left
    assert rows(store)["execution_pointers"] == 4
    assert workflows.purge_workflows("Runnable", START) == 1


def test_a_purge_never_leaves_an_instance_that_others_may_work_on_in_pieces(
    workflows: PersistenceProvider,
) -> None:
    many = [str(number) for number in range(600)]
    ids = [
        workflows.create_new_workflow(instance(execution_pointers=pointers(*many)))
        for _ in range(3)
    ]
    step, seen = workflows._prune_some, []

    def watched(*arguments: Any) -> Any:
        dropped = step(*arguments)
        left = workflows.get_workflow_instances(ids)
        assert all(len(one.execution_pointers) == 600 for one in left)
        seen.append(len(left))
        return dropped

    vars(workflows)["_prune_some"] = watched
    assert workflows.purge_workflows("Runnable", datetime(9000, 1, 1, tzinfo=UTC)) == 3
    assert seen == [2, 1, 0]


@parametrize(("count", "size"), [(250, 0), (6, 700)])
def test_purge_works_in_small_transactions_and_inside_one_is_part_of_it(
    watched: type[Watched], path: Path, count: int, size: int
) -> None:
    with flowstore.open(path, synchronous="OFF") as store:
        with store.transaction():
            for _ in range(count):
                many = pointers(*map(str, range(size)))
                store.workflows.create_new_workflow(
                    instance(status="Complete", execution_pointers=many)
                )
        purge = partial(
            store.workflows.purge_workflows, "Complete", store.now() + timedelta(days=1)
        )
        with pytest.raises(KeyError), store.transaction():
            assert purge() == count
            raise KeyError
        assert rows(store)["workflows"] == count
        assert watched.said(purge, "COMMIT") > 2
        assert rows(store)["workflows"] == rows(store)["execution_pointers"] == 0


def test_a_subscription_comes_back_as_it_was_stored(
    store: Store, workflows: PersistenceProvider
) -> None:
    full = subscription(
        id="s", subscribe_as_of=START - seconds(1), subscription_data={"n": None}, external_token="t",
        external_worker_id="h", external_token_expiry=START,
    )  # fmt: skip
    assert workflows.create_event_subscription(full) == "s"
    assert workflows.get_subscription("s") == full
    with refused_flow(store, AlreadyExists):
        workflows.create_event_subscription(subscription(id="s"))
    made = workflows.create_event_subscription(
        subscription(event_key="8", external_token="for ever")
    )
    assert workflows.get_subscription(uuid.UUID(made)).subscribe_as_of == START
    assert workflows.get_first_open_subscription("paid", "8") is None


def test_one_of_sixteen_callers_gets_the_token(
    workflows: PersistenceProvider, clock: Clock
) -> None:
    for number in range(20):
        id = workflows.create_event_subscription(subscription(id=f"s{number}"))
        until = clock() + seconds(1)
        take = workflows.set_subscription_token
        outcomes = together([partial(take, id, f"t{me}", f"h{me}", until) for me in range(16)])
        assert sorted(outcomes) == [False] * 15 + [True]
        held = workflows.get_subscription(id)
        winner = outcomes.index(True)
        assert (held.external_token, held.external_worker_id) == (f"t{winner}", f"h{winner}")
        assert held.external_token_expiry == until


@needs_kill
def test_a_worker_that_is_killed_does_not_hold_its_subscription_for_ever(
    path: Path, clock: Clock
) -> None:
    with flowstore.open(path, clock=clock, synchronous="OFF") as store:
        store.workflows.create_event_subscription(subscription(id="s"))
        child = script(SCRIPT + "clock = datetime(2030, 1, 1, tzinfo=UTC) + timedelta(seconds=10)\n"
            "print(workflows.set_subscription_token('s', 'dead', 'h', clock))\n"
            "sys.stdout.flush(); os.kill(os.getpid(), signal.SIGKILL)", path,
        )  # fmt: skip
        assert finished(child, -signal.SIGKILL) == "True\n"
        assert not store.workflows.set_subscription_token("s", "t", "h", START + seconds(99))
        clock.advance(10)
        assert store.workflows.set_subscription_token("s", "t", "h", START + seconds(99))


def test_an_event_comes_back_as_it_was_stored(workflows: PersistenceProvider) -> None:
    full = event_flow(
        id="e", event_data=[{"a": 1}], event_time=START - seconds(1), is_processed=True
    )
    assert workflows.create_event(full) == "e"
    assert workflows.get_event("e") == full
    made = workflows.create_event(event_flow())
    assert workflows.get_event(uuid.UUID(made)) == event_flow(id=made, event_time=START)


def test_scheduled_commands_are_supported(workflows: PersistenceProvider) -> None:
    assert workflows.supports_scheduled_commands() is True


def test_due_commands_are_handled_soonest_first_and_removed(
    workflows: PersistenceProvider, clock: Clock
) -> None:
    for data, at in (("z", START_MS - 1), ("b", START_MS), ("a", START), ("later", START_MS + 1)):
        workflows.schedule_command(command(data, at))
    workflows.schedule_command(command("b", START, CommandName.PROCESS_EVENT))
    assert handled(workflows, START - seconds(1)) == []
    seen: list[tuple[str, str]] = []
    assert (
        workflows.process_commands(
            None, lambda found: seen.append((found.command_name, found.data))
        )
        == 4
    )
    expected = [
        ("ProcessWorkflow", "z"),
        ("ProcessEvent", "b"),
        ("ProcessWorkflow", "a"),
        ("ProcessWorkflow", "b"),
    ]
    assert seen == expected
    assert handled(workflows) == []
    assert handled(workflows, START + seconds(1)) == ["later"]


def test_a_handler_runs_outside_every_transaction_and_lock(
    workflows: PersistenceProvider, store: Store
) -> None:
    def handler(found: ScheduledCommand) -> None:
        Caller(lambda: workflows.create_event(event_flow(id=found.data))).result()
        with store.transaction():
            workflows.mark_event_processed(found.data)
        assert handled(workflows) == (
            ["b"] if found.data == "a" else []
        )  # all but the one that is being handled

    for data in ("a", "b"):
        workflows.schedule_command(command(data))
    assert workflows.process_commands(None, handler) == 1
    assert rows(store)["scheduled_commands"] == 0


def test_commands_are_not_processed_inside_a_transaction(
    workflows: PersistenceProvider, store: Store
) -> None:
    workflows.schedule_command(command("x"))
    with store.transaction(), pytest.raises(StorageError):
        workflows.process_commands(None, lambda _: None)
    assert handled(workflows) == ["x"]


def test_a_command_handled_in_a_call_and_scheduled_anew_waits_for_the_next_call(
    workflows: PersistenceProvider,
) -> None:
    def handler(found: ScheduledCommand) -> None:
        seen.append(found.data)
        if found.data == "b":
            workflows.schedule_command(command("a", START + seconds(1)))

    seen: list[str] = []
    for data in "abc":
        workflows.schedule_command(command(data))
    assert workflows.process_commands(START + seconds(9), handler) == 3
    assert workflows.process_commands(START + seconds(9), handler) == 1
    assert seen == ["a", "b", "c", "a"]


def test_a_handler_that_schedules_again_and_fails_leaves_the_earlier_time(
    workflows: PersistenceProvider,
) -> None:
    for at, first in ((START - seconds(5), START - seconds(5)), (START + seconds(5), START)):

        def handler(found: ScheduledCommand) -> None:
            workflows.schedule_command(command(found.data, at))  # noqa: B023
            raise KeyError

        workflows.schedule_command(command("x"))
        with pytest.raises(ExceptionGroup):
            workflows.process_commands(None, handler)
        assert handled(workflows, first - seconds(0.001)) == []
        assert handled(workflows, first) == ["x"]
        assert handled(workflows, START + seconds(9)) == []


@parametrize("end", ["returns", "raises"])
@parametrize(
    "meanwhile",
    ["nothing", "scheduled", "scheduled before", "taken over", "handled", "handled and scheduled"],
)
def test_a_handler_that_outlives_its_lease_changes_nothing(
    workflows: PersistenceProvider, clock: Clock, end: str, meanwhile: str
) -> None:
    """Whatever became of the command meanwhile is what becomes of it."""
    started, may_return = threading.Event(), threading.Event()
    others: list[Caller] = []

    def hold(_: ScheduledCommand) -> None:
        started.set()
        may_return.wait(60)

    def late(found: ScheduledCommand) -> None:
        if meanwhile == "scheduled before":
            workflows.schedule_command(command("x", START + seconds(60)))
        clock.advance(10)
        if meanwhile == "scheduled":
            workflows.schedule_command(command("x", START + seconds(60)))
            clock.advance(-5)  # set back: the lease that was lost must not seem to be held again
        elif meanwhile == "taken over":
            others.append(Caller(lambda: workflows.process_commands(None, hold)))
            assert started.wait(60)
        elif meanwhile.startswith("handled"):
            assert handled(workflows) == ["x"]
        if meanwhile == "handled and scheduled":
            workflows.schedule_command(command("x", clock() + seconds(5)))
        if end == "raises":
            raise KeyError

    workflows.schedule_command(command("x"))
    if end == "raises":
        with pytest.raises(ExceptionGroup):
            workflows.process_commands(None, late)
    else:
        assert workflows.process_commands(None, late) == 0
    if meanwhile == "taken over":
        assert handled(workflows) == []
        may_return.set()
        assert others[0].result() == 1
    assert handled(workflows) == (
        ["x"] if meanwhile in ("nothing", "scheduled", "scheduled before") else []
    )
    again = meanwhile in ("handled and scheduled", "scheduled before")
    assert handled(workflows, START + seconds(99)) == (["x"] if again else [])


def test_a_lease_lasts_as_long_as_asked_by_the_stores_clock(
    workflows: PersistenceProvider, clock: Clock
) -> None:
    def crash(_: ScheduledCommand) -> None:
        """A handler that never returns, seen from those who come later."""
        clock.advance(4.999999)
        assert handled(workflows) == []
        clock.advance(0.000001)
        assert handled(workflows) == ["x"]

    workflows.schedule_command(command("x"))
    assert workflows.process_commands(None, crash, lease_seconds=5) == 0


@parametrize("stop", [KeyboardInterrupt, SystemExit, GeneratorExit, Stop])
def test_what_is_no_exception_gives_the_lease_back_and_ends_the_call(
    workflows: PersistenceProvider, stop: type[BaseException]
) -> None:
    def handler(found: ScheduledCommand) -> None:
        seen.append(found.data)
        if found.data == "a":
            raise KeyError
        if found.data == "b":
            workflows.schedule_command(command("b", START + seconds(60)))
            raise stop

    for data in "abc":
        workflows.schedule_command(command(data))
    seen: list[str] = []
    with pytest.raises(stop):
        workflows.process_commands(None, handler)
    assert seen == ["a", "b"]
    assert handled(workflows) == ["a", "b", "c"]
    assert handled(workflows, START + seconds(99)) == []


@swallows
def test_ctrl_c_anywhere_in_a_call_leaves_no_lease_and_loses_no_command(clock: Clock) -> None:
    with flowstore.open(":memory:", clock=clock) as store:
        for strike_at in range(
            random.randint(1, 5), 10_000, 5
        ):  # some of the places, others each time
            seen: list[ScheduledCommand] = []
            store.workflows.schedule_command(command("a"))
            striker = Striker(strike_at)
            ended = striker.run(partial(store.workflows.process_commands, None, seen.append))
            left = handled(store.workflows)
            assert [*left, *(found.data for found in seen)][:1] == ["a"], strike_at
            assert rows(store)["scheduled_commands"] == 0, strike_at
            if (
                striker.places < strike_at
            ):  # a strike at the close of a generator does not end the call either
                break
        assert ended and strike_at > 100


@needs_kill
def test_a_host_killed_in_a_handler_leaves_the_command_to_another(path: Path, clock: Clock) -> None:
    with flowstore.open(path, clock=clock, synchronous="OFF") as store:
        for data in "ab":
            store.workflows.schedule_command(command(data))
        child = script(SCRIPT + "store.close(); now = datetime(2030, 1, 1, tzinfo=UTC)\n"
            "store = flowstore.open(sys.argv[1], clock=lambda: now, lease_seconds=10)\n"
            "def handler(found):\n    print(found.data, flush=True); sys.stdin.read()\n"
            "store.workflows.process_commands(None, handler)", path,
        )  # fmt: skip
        assert line_of(child) == "a"
        assert handled(store.workflows) == ["b"]
        child.kill()
        finished(child, -signal.SIGKILL)
        clock.advance(9)
        assert handled(store.workflows) == []
        clock.advance(1)
        assert handled(store.workflows) == ["a"]


def test_of_many_threads_one_handles_each_command(
    store: Store, workflows: PersistenceProvider
) -> None:
    with store.transaction():
        for number in range(100):
            workflows.schedule_command(command(str(number)))
    running: set[str] = set()
    seen: list[str] = []

    def handler(found: ScheduledCommand) -> None:
        assert found.data not in running
        running.add(found.data)
        seen.append(found.data)
        workflows.next_definition_sequence(found.data)
        running.remove(found.data)

    counts = together([lambda: workflows.process_commands(None, handler)] * 8)
    assert sum(counts) == 100 and sorted(seen, key=int) == [str(number) for number in range(100)]


HOST = """
def handler(found):
    # Two handlers of one command at once would both insert its row.
    with store.transaction() as tx:
        tx.execute("INSERT INTO running (data) VALUES (?)", (found.data,))
        ((asked,),) = tx.execute("SELECT times FROM asked WHERE data = ?", (found.data,))
    with store.transaction() as tx:
        tx.execute("DELETE FROM running WHERE data = ?", (found.data,))
        tx.execute("INSERT INTO done (data, asked) VALUES (?, ?)", (found.data, asked))
print("ready", flush=True)
sys.stdin.readline()
count = 0
while True:
    with store.transaction() as tx:
        over = tx.execute("SELECT 1 FROM over")
    handled = workflows.process_commands(None, handler)
    count += handled
    if over and not handled:
        break
print(count)
"""


SCHEDULER = """
print("ready", flush=True)
sys.stdin.readline()
for number in random.Random(7).sample(range(500), 500):
    with store.transaction() as tx:
        tx.execute("UPDATE asked SET times = times + 1 WHERE data = ?", (str(number),))
        workflows.schedule_command(ScheduledCommand(
            command_name="ProcessWorkflow", data=str(number), execute_time=random.randrange(1000)))
with store.transaction() as tx:
    tx.execute("INSERT INTO over VALUES (1)")
"""


def test_hosts_handle_every_command_while_another_process_schedules_them_again(
    path: Path,
) -> None:
    with flowstore.open(path, synchronous="OFF") as store:
        with store.transaction() as tx:
            tx.execute("CREATE TABLE running (data TEXT PRIMARY KEY)")
            tx.execute("CREATE TABLE asked (data TEXT PRIMARY KEY, times INTEGER)")
            tx.execute("CREATE TABLE done (data TEXT, asked INTEGER)")
            tx.execute("CREATE TABLE over (yes INTEGER)")
            for number in range(500):
                tx.execute("INSERT INTO asked VALUES (?, 1)", (str(number),))
                store.workflows.schedule_command(command(str(number), number))
        processes = [script(SCRIPT + source, path) for source in (HOST, HOST, HOST, SCHEDULER)]
        assert [line_of(process) for process in processes] == ["ready"] * 4
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        counts = [int(finished(process) or 0) for process in processes]
        assert rows(store)["scheduled_commands"] == 0
        with store.transaction() as tx:
            assert tx.execute("SELECT data FROM running") == []
            ((done,),) = tx.execute("SELECT COUNT(*) FROM done")
            # Of every command, some handler began after it had been asked for the last time.
            lost = tx.execute(
                "SELECT data FROM asked WHERE times <> (SELECT MAX(asked) FROM done WHERE done.data = asked.data)"
            )
        assert lost == []
        assert sum(counts) == done and 500 <= done <= 1000
        assert sum(count > 0 for count in counts) >= 2, "one host had it all to itself"


def test_errors_are_kept_all_or_none_and_listed_newest_first(
    store: Store, workflows: PersistenceProvider
) -> None:
    def error(message: str, **fields: Any) -> ExecutionError:
        return ExecutionError(
            **{"workflow_id": "w", "execution_pointer_id": "p", "message": message, **fields}
        )

    workflows.persist_errors(
        [error("1"), error("other", workflow_id="v"), error("2", error_time=START - seconds(5))]
    )
    workflows.persist_errors([])
    workflows.persist_errors((error("3"),))
    with refused_flow(store, InvalidData, r"^errors\[1\]\.message"):
        workflows.persist_errors([error("4"), error("\0")])
    listed = workflows.list_errors("w")
    ages = {"3": 0, "2": 5, "1": 0}
    assert listed == [
        error(message, error_time=START - seconds(age)) for message, age in ages.items()
    ]
    assert workflows.list_errors("w", limit=1, offset=1) == listed[1:2]
    assert (
        workflows.list_errors("w", limit=-1) == []
        and workflows.list_errors("w", offset=-1) == listed
    )
    assert workflows.list_errors("gone") == []


def test_ensure_store_exists_has_no_effect(store: Store, workflows: PersistenceProvider) -> None:
    created(workflows)
    before = rows(store)
    for _ in range(2):
        workflows.ensure_store_exists()
    assert rows(store) == before


def test_the_longest_keys_can_be_stored(workflows: PersistenceProvider) -> None:
    workflows.schedule_command(command("x" * 512))
    assert handled(workflows) == ["x" * 512]
    own = created(workflows, id="i" * 255, name="n" * 255, workflow_definition_id="d" * 255)
    assert workflows.get_workflow_instance_by_name("n" * 255) == own
    workflows.create_event(event_flow(id="e", event_name="", event_key=""))
    assert workflows.get_events("", "") == ["e"]


def test_calls_join_the_open_transaction(store: Store, workflows: PersistenceProvider) -> None:
    workflows.create_event(event_flow(id="e"))
    before = rows(store)
    with pytest.raises(KeyError), store.transaction():
        own = created(workflows, execution_pointers=pointers("p"))
        workflows.persist_workflow_with_subscriptions(own, [subscription(id="s")])
        assert workflows.set_subscription_token("s", "t", "h", START + seconds(5))
        with pytest.raises(AlreadyExists):
            workflows.create_event(event_flow(id="e"))
        workflows.mark_event_processed("e")
        workflows.schedule_command(command("x"))
        workflows.persist_errors([record("ExecutionError", workflow_id=own.id)])
        assert list(rows(store).values()) == [1, 1, 1, 1, 1, 1, 1]
        raise KeyError
    assert rows(store) == before
    assert not workflows.get_event("e").is_processed


def test_what_is_not_due_does_not_slow_what_is(watched: type[Watched], clock: Clock) -> None:
    with flowstore.open(":memory:", clock=clock) as store:
        workflows = store.workflows

        def fill(count: int) -> None:
            with store.transaction():
                for number in range(count):
                    workflows.create_new_workflow(
                        instance(next_execution=MAX_INT if number % 2 else None)
                    )
                    workflows.create_event(event_flow(event_time=START + seconds(99)))
                    workflows.create_event(event_flow(is_processed=True))
                    workflows.create_event_subscription(subscription(event_key=f"other {number}"))
                    ended = workflows.create_event_subscription(subscription())
                    workflows.terminate_subscription(ended)
                    workflows.schedule_command(
                        command(new := f"later {number} of {count}", START + seconds(99))
                    )
                    workflows.schedule_command(command(new, START + seconds(98)))

        def work() -> None:
            workflows.create_new_workflow(instance(id="due"))
            workflows.create_event(event_flow(id="e", event_name="sent"))
            workflows.create_event_subscription(subscription(id="s"))
            workflows.schedule_command(command("now"))
            assert workflows.get_runnable_instances() == ["due"]
            assert workflows.get_runnable_events() == ["e"] == workflows.get_events("sent", "7")
            assert [found.id for found in workflows.get_subscriptions("paid", "7")] == ["s"]
            assert handled(workflows) == ["now"]
            workflows.delete_workflow("due")
            with store.transaction() as tx:
                tx.execute("DELETE FROM events WHERE id = 'e'")
                tx.execute("DELETE FROM event_subscriptions WHERE id = 's'")

        fill(20)
        few = watched.steps(work)
        fill(2000)
        assert watched.steps(work) <= few + 10


# Its workflows charge (the first attempt fails), wait for the event "paid", pause, and ship. Each step's effect is a
# row of the user's own table, written in the transaction that moves the pointer on; no key keeps it from being
# written twice. A scheduled command lets one host at a time have an instance, and brings it back after a crash.
SMALL_HOST = """
store.close()
store = flowstore.open(sys.argv[1], synchronous="OFF", lease_seconds=0.3)
workflows = store.workflows
STEPS = ["charge", "await payment", "pause", "ship"]
P, SOON = PointerStatus, timedelta(milliseconds=5)

def run_later(id, at):
    workflows.schedule_command(ScheduledCommand(command_name=CommandName.PROCESS_WORKFLOW, data=id, execute_time=at))

def effect(tx, id, what):
    tx.execute("INSERT INTO effects (workflow_id, what) VALUES (?, ?)", (id, what))

def run_step(tx, id):
    own, now, wanted = workflows.get_workflow_instance(id), store.now(), []
    if own.status != WorkflowStatus.RUNNABLE or own.next_execution is None:
        return
    pointer, own.next_execution = own.execution_pointers[-1], now
    step = STEPS[pointer.step_id]
    pointer.start_time = pointer.start_time or now
    if step == "charge" and pointer.retry_count == 0:
        pointer.retry_count += 1
        workflows.persist_errors([ExecutionError(workflow_id=id, execution_pointer_id=pointer.id, message="declined")])
        own.next_execution = now + SOON
    elif step == "await payment" and not pointer.event_published:
        pointer.status, own.next_execution = P.WAITING_FOR_EVENT, None
        wanted = [EventSubscription(workflow_id=id, step_id=1, execution_pointer_id=pointer.id, event_name="paid",
                                    event_key=id)]
        for event in workflows.get_events("paid", id):  # it may have come before
            workflows.schedule_command(ScheduledCommand(command_name=CommandName.PROCESS_EVENT, data=event, execute_time=now))
    elif step == "pause" and pointer.sleep_until is None:
        pointer.status, pointer.sleep_until = P.SLEEPING, now + SOON
        own.next_execution = pointer.sleep_until
    elif step == "pause" and pointer.sleep_until > now:
        own.next_execution = pointer.sleep_until
    else:
        effect(tx, id, step)
        pointer.status, pointer.active, pointer.end_time = P.COMPLETE, False, now
        if step == STEPS[-1]:
            own.status, own.complete_time, own.next_execution = WorkflowStatus.COMPLETE, now, None
        else:
            own.execution_pointers.append(ExecutionPointer(step_id=pointer.step_id + 1, predecessor_id=pointer.id))
    workflows.persist_workflow_with_subscriptions(own, wanted)
    if own.next_execution is not None:
        run_later(id, own.next_execution)

def deliver(tx, event_id):
    event = workflows.get_event(event_id)
    found = workflows.get_first_open_subscription(event.event_name, event.event_key)
    if event.is_processed or found is None:
        return
    token = new_id()
    assert workflows.set_subscription_token(found.id, token, "host", store.now() + timedelta(seconds=1))
    own = workflows.get_workflow_instance(found.workflow_id)
    pointer = own.execution_pointers[-1]
    assert pointer.id == found.execution_pointer_id and not pointer.event_published
    pointer.event_published, pointer.event_data, own.next_execution = True, event.event_data, 0
    workflows.persist_workflow(own)
    workflows.clear_subscription_token(found.id, token)
    workflows.terminate_subscription(found.id)
    workflows.mark_event_processed(event_id)
    run_later(own.id, store.now())

def handler(command):
    with store.transaction() as tx:
        {"ProcessWorkflow": run_step, "ProcessEvent": deliver}[command.command_name](tx, command.data)

if float(sys.argv[2]):
    timer = threading.Timer(float(sys.argv[2]), os.kill, (os.getpid(), signal.SIGKILL))
    timer.daemon = True
    timer.start()
while store.stats()["workflows"].get("Runnable"):
    workflows.process_commands(None, handler)
"""


@needs_kill
def test_a_host_killed_at_random_points_completes_every_workflow_with_each_effect_once(
    path: Path,
) -> None:
    dice = random.Random(2030)
    with flowstore.open(path, synchronous="OFF") as store:
        with store.transaction() as tx:
            tx.execute("CREATE TABLE effects (workflow_id TEXT, what TEXT)")
            ids = [
                store.workflows.create_new_workflow(
                    instance(execution_pointers=[ExecutionPointer(step_id=0)])
                )
                for _ in range(60)
            ]
            for id in ids:
                store.workflows.schedule_command(command(id, store.now()))
                made = store.workflows.create_event(
                    event_flow(event_key=id, event_data={"for": id})
                )
                store.workflows.schedule_command(
                    command(made, store.now(), CommandName.PROCESS_EVENT)
                )
        killed = 0
        for _ in range(8):
            hosts = [script(SCRIPT + SMALL_HOST, path, dice.uniform(0.001, 0.03)) for _ in range(2)]
            for host in hosts:
                host.communicate(timeout=60)
                assert host.returncode in (0, -signal.SIGKILL)
                killed += host.returncode != 0
        for host in [script(SCRIPT + SMALL_HOST, path, 0) for _ in range(2)]:
            finished(host)
        assert killed > 4, "the hosts were done before they could be killed"
        assert store.stats()["workflows"] == {"Complete": 60}
        effects = execute(store, "SELECT workflow_id, what FROM effects ORDER BY workflow_id, what")
        assert effects == sorted(
            (id, what) for id in ids for what in ("charge", "await payment", "pause", "ship")
        )
        for one in store.workflows.get_workflow_instances(ids):
            assert [pointer.status for pointer in one.execution_pointers] == [
                PointerStatus.COMPLETE
            ] * 4
            assert one.execution_pointers[1].event_data == {"for": one.id}
            assert [error.message for error in store.workflows.list_errors(one.id)] == ["declined"]
        assert store.check() == []
    with sqlite3.connect(path) as database:
        assert database.execute("SELECT COUNT(*) FROM workflows").fetchone() == (60,)
    database.close()


def test_a_handler_that_outlives_its_lease_has_not_handled_its_command(
    workflows: PersistenceProvider, clock: Clock
) -> None:
    workflows.schedule_command(command("a", clock.now))
    late = partial(clock.advance, 60)
    assert workflows.process_commands(clock.now, lambda _: late(), lease_seconds=10) == 0
    assert workflows.process_commands(clock.now, lambda _: None) == 1


# ==================================================================================================
# Runs
# ==================================================================================================


class Calls(list[Any]):
    """The functions of steps: each call is noted, and returns what it was given."""

    def __call__(self, *values: Any) -> Any:
        self.append(values[0] if len(values) == 1 else values)
        return self[-1]


@pytest.fixture
def calls() -> Calls:
    return Calls()


def run_log(store: Store, run_id: str) -> list[dict[str, Any]]:
    """The events of a run, without what differs from one time to the next."""
    log = [stored.event for stored in store.events.load_events(run_id)]
    return [{key: value for key, value in one.items() if key != "seconds"} for one in log]


def run_steps(store: Store, run_id: str) -> list[str]:
    """The steps, sleeps and waits that a run has recorded, in order."""
    ids = [stored.id for stored in store.events.load_events(run_id)]
    return [one.removeprefix("step:") for one in ids if one]


def run_status(store: Store, run_id: str) -> tuple[str, str]:
    """The status of a run's record, and of its item."""
    record = store.state.get_execution(run_id)
    assert record is not None
    return str(record.status), str(look(store, run_id).status)


def abandoned(store: Store, run_id: str) -> flowstore.Run:
    """A run that a process has begun, and will never end: nobody renews its lease."""
    block = flowstore._RunBlock(store.runs, run_id, "script", None, None, None)
    run = store.runs._enter(block)
    block.hold._stop()
    return run


def lost_block(store: Store, run_id: str, *steps: str) -> None:
    """A process begins a run, does some steps and is gone, its lease unreturned."""
    run = abandoned(store, run_id)
    for step in steps:
        run.step(step, str, step)


def due(store: Store, function: Callable[..., Any], **options: Any) -> int:
    """Do what is due."""
    return int(store.runs.work(function, until_idle=True, **options))


class Alarm(Exception):
    """What a signal handler raises."""


def interrupt_behind(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, error: Any) -> None:
    """The next call of a method is done, and then interrupted."""
    method = owner.__dict__[name]
    errors = [error]

    async def interrupted(call: Any) -> Any:
        await call
        raise errors.pop()

    def call(one: Any, *arguments: Any) -> Any:
        outcome = method.__get__(one)(*arguments)
        vars(one).pop(name, None)
        if not errors:
            return outcome
        if inspect.isawaitable(outcome):
            return interrupted(outcome)
        raise errors.pop()

    monkeypatch.setattr(owner, name, call)


# --- blocks ---
def test_a_block_does_its_steps_once_and_keeps_its_result(store: Store, calls: Calls) -> None:
    with store.run("a", input={"n": 1}) as run:
        assert (run.id, run.input, run.attempt) == ("a", {"n": 1}, 0)
        assert run.step("one", calls, run.input["n"]) == 1
        assert run_status(store, "a") == ("running", "claimed")
        run.result = run.step("two", calls, (2,))
    assert run_log(store, "a") == [
        {"type": "execution_started", "input": {"n": 1}},
        {"type": "step_completed", "step": "one", "result": 1},
        {"type": "step_completed", "step": "two", "result": [2]},
        {"type": "execution_completed", "result": [2]},
    ]
    assert run_status(store, "a") == ("completed", "completed")
    assert store.runs.result("a") == [2]
    before = contents(store)
    with store.run("a") as run:
        assert run.result == [2]
        assert run.step("one", calls, "never") == 1
        assert run.step("two", calls, "never") == [2]
    assert contents(store) == before
    assert calls == [1, (2,)]


def test_a_run_costs_a_commit_for_its_start_its_end_and_each_step(path: Path) -> None:
    with flowstore.open(path) as store:
        with store.run("a") as run:
            run.step("one", str)
            run.step("two", str)
        assert store._engine.commits == 4
        for _ in range(3):
            store.runs.start(do_nothing)
        due(store, do_nothing)
        assert store._engine.commits == 4 + 3 + (3 + 1), "the end of one is the claim of the next"


def test_a_step_comes_back_as_json_gives_it_back_the_first_time_too(store: Store) -> None:
    value: Any = {1: (2, 3)}
    with store.run("a") as run:
        assert run.step("s", lambda: value) == {"1": [2, 3]}


def test_code_that_has_grown_adds_its_step_to_a_completed_run(store: Store, calls: Calls) -> None:
    with store.run("a") as run:
        run.step("one", calls, 1)
    with store.run("a") as run:
        run.step("one", calls, 0)
        run.result = run.step("new", calls, 2)
        assert run_status(store, "a") == ("running", "claimed")
    with store.run("a") as run:
        assert (run.result, run.step("new", calls, 0)) == (2, 2)
    assert calls == [1, 2]
    assert types_in(store.events.load_events("a"))[-3:] == [
        "execution_completed",
        "step_completed",
        "execution_completed",
    ]


def test_of_two_blocks_that_add_to_a_completed_run_the_second_finds_what_the_first_has_added(
    store: Store, calls: Calls
) -> None:
    with store.run("a"):
        pass
    for data in (1, 2):
        store.runs.emit("e", data=data)
    with store.run("a") as late:
        with store.run("a") as early:
            assert early.step("new", calls, 1) == 1
            assert early.wait_for("e", name="first") == 1
        assert late.step("new", calls, 2) == 1
        with store.transaction():
            assert late.step("new", calls, 3) == 3
        assert late.wait_for("e", name="second") == 2
    assert calls == [1, 3]
    assert run_steps(store, "a") == ["new", "first", "new#2", "second"]


def test_a_failed_block_tells_so_and_goes_on_where_it_was(store: Store, calls: Calls) -> None:
    with pytest.raises(ZeroDivisionError), store.run("a") as run:
        run.step("one", calls, 1)
        run.step("two", lambda: 1 / 0)
    assert run_status(store, "a") == ("failed", "failed")
    with pytest.raises(flowstore.RunFailed, match="division by zero") as caught:
        store.runs.result("a")
    assert caught.value.execution_id == "a"
    assert "ZeroDivisionError" in caught.value.error
    assert [one["type"] for one in run_log(store, "a")][-2:] == ["step_failed", "execution_failed"]
    with store.run("a") as run:
        assert run.attempt == 1
        run.step("one", calls, 0)
        run.step("two", calls, 2)
    assert calls == [1, 2]
    assert run_steps(store, "a") == ["one", "two"]


def test_ctrl_c_breaks_a_block_off_and_the_next_goes_on_at_once(store: Store, calls: Calls) -> None:
    with pytest.raises(KeyboardInterrupt), store.run("a") as run:
        run.step("one", calls, 1)
        raise KeyboardInterrupt
    assert run_status(store, "a") == ("pending", "pending")
    with store.run("a", wait=0) as run:
        assert run.attempt == 0
        run.step("one", calls, 2)
    assert calls == [1]


def test_ctrl_c_while_a_block_begins_gives_its_run_back(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(hold: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(flowstore.Hold, "_start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.run("a").__enter__()
    assert run_status(store, "a") == ("pending", "pending")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
def test_a_forked_child_that_leaves_a_block_leaves_the_run_to_its_parent(path: Path) -> None:
    with flowstore.open(path) as store:
        child = -1
        try:
            with store.run("a") as run:
                child = os.fork()
                if not child:
                    sys.exit()
                os.waitpid(child, 0)
                run.result = run.step("one", str, 1)
        except BaseException:
            if child:
                raise
            os._exit(0)
        assert run_status(store, "a") == ("completed", "completed")


def test_a_run_that_another_is_doing_is_already_running(store: Store) -> None:
    with store.run("a"):
        with pytest.raises(flowstore.AlreadyRunning) as caught, store.run("a", wait=0):
            pass
        assert caught.value.execution_id == "a"
        assert caught.value.worker_id == look(store, "a").worker_id


def test_a_run_whose_process_died_is_taken_over_when_its_lease_has_run_out(
    store: Store, clock: Clock, calls: Calls
) -> None:
    lost_block(store, "a", "one")
    caller = Caller(lambda: store.run("a").__enter__())
    until(caller.waits)
    assert look(store, "a").lease_fence == 1
    clock.advance(10)
    store.state.create_tenant(Tenant(id="a commit, so that it looks"))
    run = caller.outcome()
    assert (run.attempt, run.step("one", calls, 1)) == (1, "one")
    assert calls == []


def test_a_run_taken_over_records_nothing_more(store: Store, clock: Clock) -> None:
    run = abandoned(store, "a")
    clock.advance(10)
    with store.run("a", wait=0) as other:
        with pytest.raises(LeaseLost):
            run.step("one", str)
        other.step("one", str, 1)
    assert run_steps(store, "a") == ["one"]


def test_a_step_under_way_when_its_run_is_taken_over_is_not_recorded(
    store: Store, clock: Clock
) -> None:
    run = abandoned(store, "a")

    def slow() -> str:
        clock.advance(10)
        with store.run("a", wait=0) as other:
            other.step("one", str, "theirs")
        return "ours"

    with pytest.raises(LeaseLost):
        run.step("one", slow)
    assert store.events.load_events("a")[1].event["result"] == "theirs"


def test_another_input_or_workflow_is_not_that_run(store: Store) -> None:
    with store.run("a", workflow_id="w", input={"a": 1, "b": [2]}):
        pass
    before = contents(store)
    others: list[Any] = [{"input": {"a": 2}, "workflow_id": "w"}, {"input": {"a": 1, "b": [2]}}]
    for options in others:
        with pytest.raises(AlreadyExists), store.run("a", **options):
            pass
    create(store, "other")
    write(store, "log")
    for taken in ("other", "log"):
        with pytest.raises(AlreadyExists), store.run(taken):
            pass
    with store.run("a", workflow_id="w", input={"b": [2], "a": 1}) as run:
        assert run.input == {"a": 1, "b": [2]}
    assert contents(store)["items"] == before["items"]


@parametrize("first", [{}, {"max_attempts": 1}], ids=["completed", "dead letter"])
def test_a_run_whose_unique_key_another_has_now_is_not_taken_again(
    store: Store, first: Any
) -> None:
    def work(run: Any, input: Any) -> Any:
        return 1 // ("max_attempts" not in first)

    store.runs.start(work, id="a", unique_key="k", **first)
    assert due(store, work) == 1
    store.runs.start(work, id="b", unique_key="k")
    before = contents(store)
    with pytest.raises(AlreadyExists) as caught, store.run("a", workflow_id="work") as run:
        run.step("new", str)
    assert (caught.value.kind, caught.value.id) == ("work item", "b")
    assert contents(store) == before


def test_a_cancelled_run_is_not_begun_again(store: Store) -> None:
    lost_block(store, "a")
    store.runs.cancel("a")
    with pytest.raises(flowstore.RunCancelled), store.run("a"):
        pass


def test_a_result_of_a_block_that_is_no_json_fails_it(store: Store) -> None:
    with pytest.raises(InvalidData, match="result"), store.run("a") as run:
        run.result = object()
    assert run_status(store, "a") == ("failed", "failed")


def test_runs_begin_and_wait_outside_transactions(store: Store) -> None:
    def nothing(run: Any, input: Any) -> None: ...

    with store.run("b") as run, store.transaction():
        for call in (
            lambda: store.run("a").__enter__(),
            lambda: store.runs.work(nothing, until_idle=True),
            lambda: run.sleep(0),
            lambda: run.sleep_until(store.now()),
            lambda: run.wait_for("x"),
        ):
            with pytest.raises(StorageError, match="transaction"):
                call()


# --- steps ---
def test_a_step_that_is_recorded_already_has_the_recorded_result(
    store: Store, calls: Calls
) -> None:
    id = store.runs.start("work")
    record = store.state.get_execution(id)
    item = claim(store, "work")
    assert record is not None
    # The second knows nothing of the first, as after a cancelled call that committed all the same.
    first, second = (flowstore.Run(store._engine, record, item) for _ in range(2))
    assert first.step("one", calls, 1) == 1
    assert second.step("one", calls, 2) == 1
    assert run_steps(store, id) == ["one"]


@parametrize("error", [KeyboardInterrupt, Alarm])
def test_a_step_whose_record_was_interrupted_is_looked_for_in_the_log(
    store: Store, calls: Calls, monkeypatch: pytest.MonkeyPatch, error: Any
) -> None:
    with store.run("a") as run:
        interrupt_behind(monkeypatch, flowstore.Run, "_record", error)
        with pytest.raises(error):
            run.step("charge", calls, 1)
        assert run.step("charge", calls, 2) == 1
        with pytest.raises(error), store.transaction():
            interrupt_behind(monkeypatch, flowstore.Run, "_record", error)
            run.step("rolled back", calls, 3)
        assert run.step("rolled back", calls, 4) == 4
    assert calls == [1, 3, 4]
    assert run_steps(store, "a") == ["charge", "rolled back"]


@parametrize("error", [KeyboardInterrupt, Alarm])
def test_the_steps_of_a_block_whose_end_was_interrupted_are_looked_for_in_the_log(
    store: Store, calls: Calls, monkeypatch: pytest.MonkeyPatch, error: Any
) -> None:
    with store.run("a") as run:
        interrupt_behind(monkeypatch, flowstore._Block, "_return_connection", error)
        for again in range(3):
            with suppress(error), store.transaction():
                run.step("pay", calls, again)
    assert calls == [0, 2]
    assert run_steps(store, "a") == ["pay", "pay#2"]


@parametrize("error", [KeyboardInterrupt, Alarm])
def test_an_event_of_a_wait_that_was_interrupted_is_not_had_twice(
    store: Store, monkeypatch: pytest.MonkeyPatch, error: Any
) -> None:
    with store.run("a") as run:
        for data in (1, 2):
            store.runs.emit("e", data=data)
        interrupt_behind(monkeypatch, flowstore.Run, "_attempt", error)
        with pytest.raises(error):
            run.wait_for("e", name="one")
        assert run.wait_for("e", name="two") == 2
    with store.run("a") as run:
        assert [run.wait_for("e", name=name) for name in ("one", "two")] == [1, 2]


def test_names_and_ordinals_tell_steps_apart(store: Store, calls: Calls) -> None:
    with store.run("a") as run:
        for value in "xyz":
            run.step("s", calls, value)
        run.step("t", calls, "t")
    assert run_steps(store, "a") == ["s", "s#2", "s#3", "t"]
    with store.run("a") as run:  # two swapped, one removed
        assert run.step("t", calls) == "t"
        assert [run.step("s", calls) for _ in range(2)] == ["x", "y"]
    assert len(calls) == 4


def test_a_step_that_raised_keeps_its_ordinal(store: Store, calls: Calls) -> None:
    with store.run("a") as run:
        run.step("s", calls, 1)
        with pytest.raises(ZeroDivisionError):
            run.step("s", lambda: 1 / 0)
        with pytest.raises(InvalidData, match="'s#2'"):
            run.step("s", object)
        run.step("s", calls, 2)
    assert run_steps(store, "a") == ["s", "s#2"]
    assert [one.get("step") for one in run_log(store, "a") if one["type"] == "step_failed"] == [
        "s#2"
    ]
    with store.run("a") as run:
        assert [run.step("s", calls), run.step("s", calls)] == [1, 2]


def test_a_step_leaves_what_a_wait_of_its_name_has_recorded(store: Store, calls: Calls) -> None:
    with store.run("a") as run:
        store.runs.emit("s", data="event")
        assert run.step("s", calls, "step") == "step"
        assert run.wait_for("s") == "event"
    with store.run("a") as run:
        assert run.wait_for("s") == "event"
        assert run.step("s", calls) == "step"


def test_a_step_in_a_transaction_is_stored_with_what_it_writes(store: Store) -> None:
    execute(store, "CREATE TABLE orders (id INTEGER)")
    with store.run("a") as run:
        with pytest.raises(KeyError), store.transaction() as tx:
            run.step("charge", lambda: tx.execute("INSERT INTO orders VALUES (1)"))
            raise KeyError
        assert run_steps(store, "a") == []
        with store.transaction() as tx:
            # The same name is the same step: that one was rolled back.
            run.step("charge", lambda: tx.execute("INSERT INTO orders VALUES (2)"))
            run.step("charge", lambda: tx.execute("INSERT INTO orders VALUES (3)"))
        run.step("charge", str)
    assert run_steps(store, "a") == ["charge", "charge#2", "charge#3"]
    assert execute(store, "SELECT id FROM orders ORDER BY id") == [(2,), (3,)]


def test_a_step_in_a_transaction_that_outlasts_the_lease_renews_it(
    store: Store, clock: Clock
) -> None:
    def slow() -> None:
        clock.advance(60)
        if store._engine.max_writers > 1:  # others write during the transaction
            assert Caller(store.state.reclaim_expired_leases).outcome().retryable == []

    with store.run("a", lease_seconds=7) as run:
        with store.transaction():
            run.step("slow", slow)
        assert look(store, "a").lease_expires_at == clock.now + seconds(7)
        assert store.state.reclaim_expired_leases().retryable == []
    assert run_status(store, "a") == ("completed", "completed")


@parametrize("way", ["worker", "block"])
def test_the_lease_of_a_run_is_not_renewed_while_a_branch_has_a_transaction(
    make_store: MakeStore, calls: Calls, way: str
) -> None:
    store = make_store(lease_seconds=0.6)

    def branch(run: Any) -> None:
        run.step("before", str)
        with store.transaction():
            time.sleep(0.4)  # longer than a third of the lease
            run.step("slow", calls, 7)

    def work(run: Any, input: Any) -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(branch, run).result()

    if way == "block":
        with store.run("a") as run:
            work(run, None)
    else:
        store.runs.start(work, id="a", max_attempts=1)
        assert due(store, work) == 1
    assert run_status(store, "a") == ("completed", "completed")
    assert calls == [7]


def test_a_step_in_a_nested_transaction_is_undone_with_it(store: Store, calls: Calls) -> None:
    with store.run("a") as run:
        with store.transaction():
            with pytest.raises(KeyError), store.transaction():
                run.step("s", calls, 1)
                raise KeyError
            run.step("s", calls, 2)
        run.step("s", calls, 3)
    assert run_steps(store, "a") == ["s", "s#2"]
    assert calls == [1, 2, 3]


def test_a_step_that_fails_in_a_transaction_leaves_nothing_of_what_it_wrote(store: Store) -> None:
    execute(store, "CREATE TABLE payments (id INTEGER)")
    with store.run("a") as run, store.transaction() as tx:

        def pay(result: Any) -> Any:
            tx.execute("INSERT INTO payments VALUES (7)")
            run.step("inner", str)
            if isinstance(result, BaseException):
                raise result
            return result

        for bad, error in (
            (OSError("slow"), OSError),
            (Stop(), Stop),
            (object(), InvalidData),
        ):
            with pytest.raises(error):
                run.step("pay", pay, bad)
            assert tx.execute("SELECT id FROM payments") == []
        assert run.step("pay", pay, 7) == 7
    assert execute(store, "SELECT id FROM payments") == [(7,)]
    log = run_log(store, "a")
    assert {"type": "step_failed", "step": "pay", "error": "OSError: slow"} in log
    assert run_steps(store, "a") == ["inner", "pay"]


def test_steps_side_by_side_are_each_done_once(store: Store) -> None:
    with store.run("a") as run:
        together([partial(run.step, f"s{n}", str, n) for n in range(8)])
        together([partial(run.step, "same", str, n) for n in range(8)])
    assert len(set(run_steps(store, "a"))) == 16


@parametrize(
    "call",
    [
        lambda store, run: run.step("", str),
        lambda store, run: run.step("a#2", str),
        lambda store, run: run.step("a" * 201, str),
        lambda store, run: run.step(7, str),
        lambda store, run: run.step("s", 7),
        lambda store, run: run.step("s", object),
        lambda store, run: run.sleep(-1),
        lambda store, run: run.sleep(math.nan),
        lambda store, run: run.sleep(1e300),
        lambda store, run: run.sleep(0, name=""),
        lambda store, run: run.sleep_until(datetime(2030, 1, 1)),
        lambda store, run: run.wait_for("a" * 256, name="a"),
        lambda store, run: run.wait_for("a" * 201),
        lambda store, run: run.wait_for("a", timeout=-1),
        lambda store, run: run.wait_for("a", timeout="1"),
        lambda store, run: store.runs.emit("a" * 256),
        lambda store, run: store.runs.emit("a", data=object()),
        lambda store, run: store.runs.start(lambda run, value: None),
        lambda store, run: store.runs.start(partial(str)),
        lambda store, run: store.runs.start(7),
        lambda store, run: store.runs.start(""),
        lambda store, run: store.runs.start("f", object()),
        lambda store, run: store.runs.start("f", max_attempts=-1),
        lambda store, run: store.runs.work(),
        lambda store, run: store.runs.work("f"),
        lambda store, run: store.runs.work(str, concurrency=0),
        lambda store, run: store.runs.work(str, str),
        lambda store, run: store.runs.work(str, stop=7),
        lambda store, run: store.runs.work(str, queues="str", until_idle=True),
        lambda store, run: store.runs.result("a", timeout=-1),
        lambda store, run: store.run("b", wait=-1).__enter__(),
        lambda store, run: store.run("b", lease_seconds=-1).__enter__(),
        lambda store, run: store.run("b", input=object()).__enter__(),
    ],
)
def test_bad_input_to_runs_is_refused_with_nothing_written(store: Store, call: Any) -> None:
    with store.run("a") as run:
        before = contents(store)
        with pytest.raises(InvalidData) as caught:
            call(store, run)
        assert one_sentence(caught.value)
        assert contents(store) == before


# --- starting ---
def do_nothing(run: Any, input: Any) -> None:
    """The function of a run."""


def test_a_start_is_an_execution_an_event_and_an_item(store: Store) -> None:
    later = store.now() + seconds(5)
    id = store.runs.start(
        do_nothing, [1], id="a", available_at=later, max_attempts=7, priority=3, unique_key="k"
    )
    item = look(store, "a")
    record = store.state.get_execution("a")
    assert (id, item.execution_id, item.node_id, item.queue_type) == (
        "a",
        "a",
        "do_nothing",
        "do_nothing",
    )
    assert (item.available_at, item.max_attempts, item.priority, item.unique_key) == (
        later,
        7,
        3,
        "k",
    )
    assert record is not None
    assert (record.workflow_id, record.initial_input, record.status) == (
        "do_nothing",
        [1],
        "pending",
    )
    assert run_log(store, "a") == [{"type": "execution_started", "input": [1]}]
    before = contents(store)
    assert store.runs.start("do_nothing", [1], id="a") == "a"
    others: list[Any] = [{"input": None}, {"input": [1], "tenant_id": "t"}]
    for again in others:
        with pytest.raises(AlreadyExists):
            store.runs.start(do_nothing, id="a", **again)
    with pytest.raises(AlreadyExists):
        store.runs.start("other", [1], id="a")
    with pytest.raises(AlreadyExists) as caught:
        store.runs.start(do_nothing, unique_key="k")
    assert caught.value.id == "a"
    create(store, "e")
    write(store, "log")
    for taken in ("e", "log"):
        with pytest.raises(AlreadyExists):
            store.runs.start(do_nothing, id=taken)
    assert contents(store)["items"] == before["items"]
    assert store.runs.start("f", queue="q") in {
        item.id for item in store.state.list_work_items(queue_type="q")
    }


def test_a_start_in_a_transaction_is_part_of_it(store: Store) -> None:
    with pytest.raises(KeyError), store.transaction():
        store.runs.start(do_nothing, id="a")
        raise KeyError
    assert store.state.get_work_item("a") is None


# --- workers ---
def test_a_worker_does_what_is_due_and_counts_what_ended(store: Store, calls: Calls) -> None:
    def double(run: Any, input: Any) -> Any:
        assert run_status(store, run.id) == ("running", "claimed")
        return run.step("s", calls, input) * 2

    ids = [store.runs.start(double, n) for n in range(3)]
    store.runs.start(double, available_at=store.now() + seconds(1))
    assert due(store, double) == 3
    assert [store.runs.result(id) for id in ids] == [0, 2, 4]
    assert sorted(calls) == [0, 1, 2]
    assert run_status(store, ids[0]) == ("completed", "completed")
    assert run_log(store, ids[1])[-1] == {"type": "execution_completed", "result": 2}


def test_a_function_that_raises_is_tried_again_and_then_has_failed(
    store: Store, clock: Clock, calls: Calls
) -> None:
    def fail(run: Any, input: Any) -> Any:
        run.step("s", calls, run.attempt)
        if run.attempt < input:
            raise ValueError("no\0 \ud800")
        return run.attempt

    once = store.runs.start(fail, 1)
    ever = store.runs.start(fail, 9)
    assert due(store, fail) == 0
    assert run_status(store, once) == ("pending", "pending")
    assert "ValueError: no" in str(look(store, once).last_error)
    clock.advance(1)
    assert due(store, fail) == 1
    assert store.runs.result(once) == 1
    clock.advance(2)
    assert due(store, fail) == 1
    assert run_status(store, ever) == ("failed", "dead_lettered")
    with pytest.raises(flowstore.RunFailed, match="ValueError"):
        store.runs.result(ever)
    assert types_in(store.events.load_events(ever))[-1] == "execution_failed"
    store.state.requeue_dead_letter(ever)
    assert run_status(store, ever) == ("pending", "pending")
    assert calls == [0, 0]


def test_a_function_that_returns_no_json_has_not_completed(store: Store) -> None:
    def bad(run: Any, input: Any) -> Any:
        return object()

    id = store.runs.start(bad, max_attempts=1)
    assert due(store, bad) == 1
    with pytest.raises(flowstore.RunFailed, match="JSON"):
        store.runs.result(id)


@parametrize("way", ["expired", "moved", "retried"])
def test_a_run_has_failed_however_its_item_became_a_dead_letter(
    store: Store, clock: Clock, way: str
) -> None:
    id = store.runs.start(do_nothing, max_attempts=1)
    item = claim(store, "do_nothing")
    if way == "expired":
        clock.advance(11)
        store.state.reclaim_expired_leases()
    elif way == "moved":
        store.state.move_to_dead_letter(item, "given up")
    else:
        store.state.retry_work_item(item, "given up")
    assert run_status(store, id) == ("failed", "dead_lettered")
    with pytest.raises(flowstore.RunFailed, match=r"given up|expired"):
        store.runs.result(id)


def test_a_dead_letter_waits_for_no_event_any_more(store: Store, clock: Clock) -> None:
    def wait(run: Any, input: Any) -> Any:
        return run.wait_for("e")

    id = store.runs.start(wait)
    assert due(store, wait) == 0
    assert len(store.state.timeline(id)["tables"]["waits"]["rows"]) == 1
    store.state.move_to_dead_letter(id, "given up")
    assert store.state.timeline(id)["tables"]["waits"]["rows"] == []
    store.state.requeue_dead_letter(id)
    assert due(store, wait) == 0
    store.runs.emit("e", data=7)
    assert due(store, wait) == 1
    assert store.runs.result(id) == 7


def test_a_lost_race_is_no_failed_attempt(store: Store, clock: Clock) -> None:
    lost = StoreBusy("lost")
    races = [lost, ExceptionGroup("", [lost, ExceptionGroup("", [lost])]), None]

    def race(run: Any, input: Any) -> int:
        error = races.pop(0)
        if error is not None:
            raise error
        return int(run.attempt)

    id = store.runs.start(race, max_attempts=1)
    for _ in range(2):
        assert due(store, race) == 0
        assert run_status(store, id) == ("pending", "pending")
        clock.advance(0.1)
    assert due(store, race) == 1
    assert store.runs.result(id) == 0


def test_a_lost_workers_run_goes_on_in_another(store: Store, clock: Clock, calls: Calls) -> None:
    def work(run: Any, input: Any) -> Any:
        return [run.step("one", calls, 1), run.step("two", calls, 2), run.attempt]

    id = store.runs.start(work)
    item = claim(store, "work")
    lost = flowstore.Run(store._engine, cast("Any", store.state.get_execution(id)), item)
    lost.step("one", calls, "lost")
    clock.advance(11)
    assert due(store, work) == 0
    clock.advance(1)
    assert due(store, work) == 1
    assert store.runs.result(id) == ["lost", 2, 1]
    with pytest.raises(LeaseLost):
        lost.step("three", calls, 3)


def test_runs_of_functions_that_a_worker_has_not_are_left_alone(store: Store) -> None:
    def mine(run: Any, input: Any) -> str:
        return "done"

    theirs = [store.runs.start("theirs", queue="q") for _ in range(3)]
    item = enqueue(store, queue_type="q")
    id = store.runs.start(mine, queue="q")
    before = [look(store, one) for one in [*theirs, item]]
    assert due(store, mine, queues=["q"]) == 1
    assert store.runs.result(id) == "done"
    assert [look(store, one) for one in [*theirs, item]] == before


def test_a_worker_finds_its_runs_behind_those_of_others_and_spends_no_rate_on_these(
    store: Store, clock: Clock
) -> None:
    def mine(run: Any, input: Any) -> str:
        return "done"

    store.state.set_queue_policy(QueuePolicy(queue_type="q", rate=2, per_seconds=60))
    theirs = [store.runs.start("theirs", queue="q", priority=number % 2) for number in range(40)]
    ids = [store.runs.start(mine, queue="q") for _ in range(3)]
    before = [look(store, one) for one in theirs]
    assert due(store, mine, queues=["q", "other"]) == 2
    clock.advance(30)
    assert due(store, mine, queues=["q"]) == 1
    assert [store.runs.result(id) for id in ids] == ["done"] * 3
    assert [look(store, one) for one in theirs] == before


def test_a_sync_store_takes_no_coroutine_function(store: Store) -> None:
    async def later(run: Any, input: Any) -> None: ...

    id = store.runs.start(later)
    with pytest.raises(InvalidData, match="functions: later is a coroutine function"):
        store.runs.work(later)
    assert run_status(store, id) == ("pending", "pending")


def test_another_base_exception_gives_the_run_back_and_leaves_work(store: Store) -> None:
    def leave(run: Any, input: Any) -> None:
        raise SystemExit(3)

    id = store.runs.start(leave)
    with pytest.raises(SystemExit):
        due(store, leave)
    assert run_status(store, id) == ("pending", "pending")
    assert look(store, id).attempt == 0


def test_a_stopped_worker_records_the_step_under_way_and_gives_the_run_back(
    store: Store, calls: Calls
) -> None:
    stop = threading.Event()
    cleaned = []

    def begun() -> Any:
        stop.set()
        return calls(1)

    def two(run: Any, input: Any) -> None:
        try:
            run.step("one", begun)
            run.step("two", calls, 2)
        finally:
            cleaned.append(run.id)

    id = store.runs.start(two)
    assert store.runs.work(two, stop=stop) == 0
    assert run_steps(store, id) == ["one"]
    assert run_status(store, id) == ("pending", "pending")
    assert look(store, id).attempt == 0
    assert cleaned == [id]
    assert due(store, two) == 1
    assert calls == [1, 2]


def test_a_wait_of_a_thread_that_outlives_its_block_has_lost_the_lease(store: Store) -> None:
    with store.run("a") as run:
        waiting = Caller(lambda: run.wait_for("never"))
        until(waiting.waits)
    assert isinstance(waiting.outcome(), LeaseLost)


@parametrize("end", ["raise", "return", "stop", "leave a block"])
def test_a_claim_ends_when_no_step_is_under_way_any_more(
    store: Store, calls: Calls, end: str
) -> None:
    begun, over, stop = threading.Event(), threading.Event(), threading.Event()
    runs = []

    def charge() -> Any:
        begun.set()
        over.wait(60)
        time.sleep(0.1)
        return calls(7)

    def pay(run: Any, input: Any) -> None:
        runs.append(run)
        pool.submit(run.step, "charge", charge)
        begun.wait(60)
        try:
            if end == "stop":
                stop.set()
                run.step("suspended", calls, 8)
            elif end != "return":
                raise OSError
        finally:
            over.set()

    with ThreadPoolExecutor(1) as pool:
        if end == "leave a block":
            with pytest.raises(OSError), store.run("a") as run:
                pay(run, None)
        else:
            store.runs.start(pay, id="a")
            due(store, pay, stop=stop)
    assert run_steps(store, "a") == ["charge"]
    assert calls == [7]
    with pytest.raises((LeaseLost, flowstore._Suspended)):
        runs[0].step("late", calls, 9)


@parametrize("way", ["worker", "block"])
def test_a_wait_inside_a_step_of_a_branch_ends_when_its_run_fails(store: Store, way: str) -> None:
    begun = threading.Event()

    def fail(run: Any, input: Any) -> None:
        def outer() -> None:
            begun.set()
            run.wait_for("never")

        pool.submit(run.step, "outer", outer)
        begun.wait(60)
        raise OSError

    def block() -> None:
        with store.run("a") as run:
            fail(run, None)

    with ThreadPoolExecutor(1) as pool:
        if way == "block":
            assert isinstance(Caller(block).outcome(), OSError)
        else:
            store.runs.start(fail, id="a", max_attempts=1)
            assert Caller(due, store, fail).outcome() == 1
    with pytest.raises(flowstore.RunFailed, match="OSError"):
        store.runs.result("a")


def test_a_worker_does_so_many_runs_at_a_time(store: Store) -> None:
    barrier = threading.Barrier(3)

    def meet(run: Any, input: Any) -> None:
        barrier.wait(60)

    for _ in range(6):
        store.runs.start(meet)
    assert due(store, meet, concurrency=3) == 6


def test_a_worker_is_not_idle_while_a_run_waits_for_another_one(store: Store) -> None:
    def child(run: Any, input: Any) -> Any:
        return input * 2

    def parent(run: Any, input: Any) -> Any:
        run.step("the others look for a run", time.sleep, 0.1)
        ids = [run.step("start", store.runs.start, child, number) for number in range(3)]
        return [run.step("result", store.runs.result, id, timeout=3) for id in ids]

    id = store.runs.start(parent)
    worker = Caller(lambda: store.runs.work(parent, child, concurrency=3, until_idle=True))
    assert worker.outcome() == 4
    assert store.runs.result(id) == [0, 2, 4]


def test_an_idle_worker_takes_a_run_that_is_started(store: Store) -> None:
    stop = threading.Event()
    worker = Caller(lambda: store.runs.work(do_nothing, stop=stop))
    until(lambda: len(threading.enumerate()) > 2)
    id = store.runs.start(do_nothing)
    assert store.runs.result(id, timeout=60) is None
    stop.set()
    assert worker.outcome() == 1


def test_a_long_step_keeps_its_lease(make_store: MakeStore) -> None:
    store = make_store(lease_seconds=0.6)
    begun = threading.Event()

    def seven() -> int:
        begun.set()
        time.sleep(1.3)  # two leases
        return 7

    def slow(run: Any, input: Any) -> int:
        return int(run.step("s", seven))

    id = store.runs.start(slow)
    worker = Caller(lambda: due(store, slow))
    assert begun.wait(60)
    while worker.is_alive():
        again(store.state.reclaim_expired_leases)
        time.sleep(0.02)
    assert worker.outcome() == 1
    assert store.runs.result(id) == 7
    assert look(store, id).lease_fence == 1


def test_a_long_block_keeps_its_lease(make_store: MakeStore) -> None:
    store = make_store()

    def press() -> None:
        for _ in range(40):
            time.sleep(0.02)
            again(store.state.reclaim_expired_leases)

    with store.run("a", lease_seconds=0.6) as run:
        run.step("one", press)
    with store.run("a", lease_seconds=0.6) as run:  # a completed one is taken at its new step
        run.step("one", press)
        run.step("new", press)
    assert run_steps(store, "a") == ["one", "new"]


def test_ctrl_c_ends_work_after_the_step_under_way(tmp_path: Path) -> None:
    source = """
import time, threading
store = flowstore.open(sys.argv[1])
def work(run, input):
    run.step("one", lambda: (print("begun", flush=True), time.sleep(1)) and 1)
    run.step("two", str)
try:
    store.runs.work(work)
except KeyboardInterrupt:
    print("interrupted", [one.id for one in store.events.load_events("a")])
"""
    path = tmp_path / "a.db"
    with flowstore.open(path) as store:
        store.runs.start("work", id="a")
    child = script(source, path)
    assert child.stdout is not None
    assert child.stdout.readline() == "begun\n"
    child.send_signal(signal.SIGINT)
    assert "interrupted [None, 'step:one']" in finished(child)
    with flowstore.open(path) as store:
        assert run_status(store, "a") == ("pending", "pending")
        assert look(store, "a").attempt == 0


def test_an_idle_worker_looks_now_and_then_for_an_expired_run_that_is_locked(
    server: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = flowstore._RunRecords.__dict__["_end_and_claim"]
    look, looks = method.function, []

    def counted(*arguments: Any) -> Any:
        looks.append(1)
        return look(*arguments)

    monkeypatch.setattr(method, "function", counted)
    stop = threading.Event()
    server.runs.start(do_nothing, id="a")
    assert server.state.claim_work_item("lost", ["do_nothing"], lease_seconds=0)
    with server.transaction() as tx:
        tx.execute("SELECT id FROM flowstore_work_items WHERE id = 'a' FOR UPDATE")
        worker = Caller(partial(server.runs.work, do_nothing, stop=stop))
        time.sleep(0.5)
        stop.set()
        worker.outcome()
    assert 1 < len(looks) < 50


# --- results ---
def test_a_result_is_waited_for(store: Store) -> None:
    with pytest.raises(NotFound):
        store.runs.result("none")
    create(store, "other")
    with pytest.raises(NotFound):
        store.runs.result("other")
    id = store.runs.start(do_nothing)
    with pytest.raises(TimeoutError):
        store.runs.result(id, timeout=0.01)
    with pytest.raises(TimeoutError), store.transaction():
        store.runs.result(id)
    waiter = Caller(lambda: store.runs.result(id))
    until(waiter.waits)
    due(store, do_nothing)
    assert waiter.outcome() is None
    store.events.append(id, "default", {"type": "note"})
    assert store.runs.result(id) is None


# --- sleeping and waiting ---
def test_a_sleep_parks_the_run_of_a_worker_until_its_time(
    store: Store, clock: Clock, calls: Calls
) -> None:
    def nap(run: Any, input: Any) -> Any:
        run.step("before", calls, "before")
        run.sleep(60)
        run.sleep_until(START + seconds(100), name="until")
        run.sleep_until(START, name="past")
        return run.step("after", calls, "after")

    id = store.runs.start(nap)
    for time in (0, 59):
        clock.now = START + seconds(time)
        assert due(store, nap) == 0
        assert run_status(store, id) == ("pending", "pending")
        assert look(store, id).available_at == START + seconds(60)
    clock.now = START + seconds(60)
    assert due(store, nap) == 0
    assert look(store, id).available_at == START + seconds(100)
    clock.now = START + seconds(100)
    assert due(store, nap) == 1
    assert calls == ["before", "after"]
    assert run_steps(store, id) == ["before", "sleep", "until", "past", "after"]
    assert run_log(store, id)[2] == {
        "type": "sleep_started",
        "step": "sleep",
        "until": (START + seconds(60)).isoformat(),
    }


def test_a_block_sleeps_where_it_is(make_store: MakeStore) -> None:
    store = make_store()
    begin = time.monotonic()
    with store.run("a") as run:
        run.sleep(0.2)
    assert time.monotonic() - begin >= 0.2
    with store.run("a") as run:
        run.sleep(9999)


def test_an_event_is_never_missed_and_never_had_twice(store: Store, clock: Clock) -> None:
    def wait(run: Any, input: Any) -> Any:
        return [run.wait_for("e", "k"), run.wait_for("e", "k", name="second")]

    store.runs.emit("e", "k", "too early")
    id = store.runs.start(wait)
    store.runs.emit("e", "k", "before")
    store.runs.emit("e", "other", "another key")
    assert due(store, wait) == 0
    assert run_status(store, id) == ("pending", "pending")
    clock.advance(-3600)  # whatever the clock does
    store.runs.emit("e", "other")
    assert due(store, wait) == 0
    event_id = store.runs.emit("e", "k", "after")
    assert due(store, wait) == 1
    assert store.runs.result(id) == ["before", "after"]
    assert run_log(store, id)[-2] == {
        "type": "wait_completed",
        "step": "second",
        "event": event_id,
        "data": "after",
    }
    stored = store.workflows.get_event(event_id)
    assert (stored.event_name, stored.event_key, stored.event_data) == ("e", "k", "after")
    assert store.workflows.get_runnable_events(clock.now + seconds(9999)) == []
    assert store.workflows.get_subscriptions("e", "k", clock.now + seconds(9999)) == []


def test_a_wait_times_out_for_good_unless_the_event_was_there_in_time(
    store: Store, clock: Clock
) -> None:
    def wait(run: Any, input: Any) -> Any:
        try:
            return run.wait_for("e", run.id, timeout=10)
        except TimeoutError:
            return "late"

    late, early = store.runs.start(wait, id="late"), store.runs.start(wait, id="early")
    assert due(store, wait) == 0
    clock.advance(9)
    store.runs.emit("e", early, "in time")
    clock.advance(5)
    store.runs.emit("e", late, "too late")
    assert due(store, wait) == 2
    assert store.runs.result(early) == "in time"
    assert store.runs.result(late) == "late"
    assert run_log(store, late)[1] == {"type": "wait_timed_out", "step": "e"}
    with store.run("a") as run, pytest.raises(TimeoutError):
        run.wait_for("x", timeout=0)
    store.runs.emit("x")
    with store.run("a") as run, pytest.raises(TimeoutError):
        run.wait_for("x", timeout=99)


def test_a_parked_run_wakes_at_the_end_of_its_timeout(store: Store, clock: Clock) -> None:
    def wait(run: Any, input: Any) -> Any:
        run.wait_for("e", timeout=10)

    id = store.runs.start(wait, max_attempts=1)
    due(store, wait)
    assert look(store, id).available_at == START + seconds(10)
    clock.advance(10)
    assert due(store, wait) == 1
    with pytest.raises(flowstore.RunFailed, match="TimeoutError"):
        store.runs.result(id)


def test_a_wait_of_a_pruned_run_is_none_of_the_next_run_of_its_id(
    store: Store, clock: Clock
) -> None:
    def wait(run: Any, input: Any) -> Any:
        run.wait_for("e", timeout=3600)

    store.runs.start(wait, id="nightly")
    due(store, wait)
    store.state.update_execution_status("nightly", "failed")
    clock.advance(7200)
    store.prune(timedelta(0))
    assert store.state.get_execution("nightly") is None
    store.workflows.create_event_subscription(subscription(id="other", workflow_id="nightly"))
    store.runs.start(wait, id="nightly")
    assert store.workflows.get_subscriptions("e", "", clock.now) == []
    assert store.workflows.get_subscription("other").workflow_id == "nightly"
    assert due(store, wait) == 0
    assert run_log(store, "nightly")[1:] == []
    assert look(store, "nightly").available_at == clock.now + seconds(3600)


def test_a_run_and_its_waits_end_at_one_time(make_store: MakeStore) -> None:
    clock = Clock(START)

    def ticking() -> datetime:
        clock.advance(1)
        return clock.now

    store = make_store(clock=ticking)

    def wait(run: Any, input: Any) -> Any:
        run.wait_for("e")

    store.runs.start(wait, id="a")
    due(store, wait)
    store.runs.cancel("a")
    ends = """SELECT terminated_at - completed_at FROM event_subscriptions
        JOIN flowstore_runs ON execution_id = event_subscriptions.workflow_id"""
    assert execute(store, ends) == [(0,)]


def test_a_wait_lets_the_steps_of_another_thread_go_on(
    store: Store, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flowstore, "_BRANCH_SECONDS", 0.3)

    def links(run: Any) -> None:
        for number in range(60):
            run.step("link", calls, number)
            time.sleep(0.01)  # no step is under way

    def both(run: Any, input: Any) -> Any:
        with ThreadPoolExecutor(2) as pool:
            waiting = pool.submit(run.wait_for, "e", run.id)
            pool.submit(links, run).result()
            return waiting.result()

    id = store.runs.start(both)
    assert due(store, both) == 0
    assert calls == [*range(60)]
    assert run_status(store, id) == ("pending", "pending")
    store.runs.emit("e", id, 7)
    assert due(store, both) == 1
    assert store.runs.result(id) == 7
    assert calls == [*range(60)]


def test_waits_side_by_side_park_the_run_until_the_first_of_them_ends(
    store: Store, clock: Clock
) -> None:
    def several(run: Any, input: Any) -> Any:
        with ThreadPoolExecutor(3) as pool:
            first = pool.submit(run.wait_for, "first", timeout=60)
            second = pool.submit(run.wait_for, "second")
            third = pool.submit(run.sleep, 30)
            return [one.result() for one in (second, third, first)]

    id = store.runs.start(several)
    assert due(store, several) == 0
    assert look(store, id).available_at == clock.now + timedelta(seconds=30)
    store.runs.emit("second", data=2)
    assert look(store, id).available_at == clock.now, "each of the waits is woken by its event"
    assert due(store, several) == 0
    clock.advance(30)
    assert due(store, several) == 0
    assert look(store, id).available_at == clock.now + timedelta(seconds=30)
    store.runs.emit("first", data=1)
    assert due(store, several) == 1
    assert store.runs.result(id) == [2, None, 1]


def test_an_event_for_one_branch_is_not_lost_as_another_parks_the_run(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The event comes while the item is claimed, so that it wakes nobody: the run looks for it as it is parked."""
    park = flowstore.Run.__dict__["_park"]
    emitted: list[str] = []

    def late(run: Any) -> Any:
        if not emitted:
            emitted.append(store.runs.emit("a", run.id))
        return park.__get__(run)()

    def both(run: Any, input: Any) -> Any:
        def branch(name: str) -> Any:
            run.wait_for(name, run.id, timeout=86400)
            return run.step(f"after {name}", str, name)

        with ThreadPoolExecutor(2) as pool:
            return [*pool.map(branch, "ab")]

    monkeypatch.setattr(flowstore.Run, "_park", late)
    id = store.runs.start(both)
    assert due(store, both) == 0
    assert run_steps(store, id) == ["a", "after a"]
    store.runs.emit("b", id)
    assert due(store, both) == 1
    assert store.runs.result(id) == ["a", "b"]


@pytest.mark.parametrize("delay", [0, 0.002, 0.02])
def test_a_branch_that_begins_after_the_first_wait_is_done_once(store: Store, delay: float) -> None:
    calls: list[str] = []

    def approve(run: Any) -> None:
        calls.append(run.id)
        store.runs.emit("approved", run.id)

    def ask(run: Any) -> None:
        time.sleep(delay)
        run.step("ask", approve, run)

    def asks(run: Any, input: Any) -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(ask, run)
            run.wait_for("approved", run.id, timeout=86400)

    id = store.runs.start(asks)
    assert due(store, asks) == 1
    assert run_status(store, id) == ("completed", "completed")
    assert calls == [id]


def test_an_error_of_a_branch_beside_a_wait_is_an_attempt(store: Store, clock: Clock) -> None:
    def fail(run: Any, input: Any) -> None:
        with ThreadPoolExecutor(2) as pool:
            waiting = pool.submit(run.wait_for, "never", timeout=86400)
            failing = pool.submit(run.step, "fail", int, "x")
        assert isinstance(waiting.exception(), flowstore._Suspended)
        failing.result()

    id = store.runs.start(fail, max_attempts=2)
    assert due(store, fail) == 0
    assert (look(store, id).attempt, look(store, id).status) == (1, "pending")
    clock.advance(10)
    assert due(store, fail) == 1
    with pytest.raises(flowstore.RunFailed, match="invalid literal"):
        store.runs.result(id)


def test_an_error_on_the_way_of_a_suspension_is_no_attempt(store: Store) -> None:
    def fail(run: Any, input: Any) -> Any:
        try:
            return run.wait_for("e")
        finally:
            raise OSError("close failed")

    def grouped(run: Any, input: Any) -> Any:
        try:
            return fail(run, input)
        except OSError as error:
            raise BaseExceptionGroup("as a TaskGroup does", [error]) from None

    ids = [store.runs.start(function) for function in (fail, grouped)]
    assert due(store, fail) == due(store, grouped) == 0
    for id in ids:
        assert run_status(store, id) == ("pending", "pending")
        assert look(store, id).attempt == 0


def test_errors_whose_contexts_are_a_circle_are_an_attempt(store: Store) -> None:
    def fail(run: Any, input: Any) -> None:
        one, other = ValueError("one"), ValueError("other")
        one.__context__, other.__context__ = other, one
        raise one

    id = store.runs.start(fail, max_attempts=1)
    assert Caller(due, store, fail).outcome(5) == 1
    with pytest.raises(flowstore.RunFailed, match="one"):
        store.runs.result(id)


def test_a_step_on_the_way_of_a_suspension_is_done_when_the_run_ends(
    store: Store, calls: Calls
) -> None:
    def tidy(run: Any, input: Any) -> Any:
        try:
            return run.wait_for("e")
        finally:
            run.step("tidy up", calls, run.attempt)

    id = store.runs.start(tidy)
    assert due(store, tidy) == 0
    assert calls == []
    assert look(store, id).lease_fence == 1, "it was claimed once"
    store.runs.emit("e", data=7)
    assert due(store, tidy) == 1
    assert store.runs.result(id) == 7
    assert calls == [0]


def test_a_wait_inside_a_step_ends_when_its_worker_stops(store: Store) -> None:
    stop = threading.Event()

    def nested(run: Any, input: Any) -> None:
        stop.set()
        run.step("outer", lambda: run.wait_for("never"))

    id = store.runs.start(nested)
    worker = Caller(partial(store.runs.work, nested, stop=stop))
    assert worker.outcome() == 0
    assert run_status(store, id) == ("pending", "pending")


def test_an_event_is_in_time_although_the_clock_was_put_back(store: Store, clock: Clock) -> None:
    def wait(run: Any, input: Any) -> Any:
        return run.wait_for("e", timeout=60)

    clock.advance(3600)
    store.runs.emit("other")
    clock.advance(-3600)
    id = store.runs.start(wait)
    assert due(store, wait) == 0
    store.runs.emit("e", data=7)
    assert due(store, wait) == 1
    assert store.runs.result(id) == 7


def test_a_block_waits_for_an_event_where_it_is(store: Store) -> None:
    def block() -> Any:
        with store.run("a") as run:
            return run.wait_for("e")

    waiter = Caller(block)
    until(waiter.waits)
    store.runs.emit("e", data=[1])
    assert waiter.outcome() == [1]


def test_emit_races_wait_for_and_no_event_is_missed(make_store: MakeStore) -> None:
    store = make_store(backoff=lambda attempt: 0.0)

    def wait(run: Any, input: Any) -> Any:
        return run.wait_for("e", run.id)

    stop = threading.Event()
    worker = Caller(lambda: store.runs.work(wait, stop=stop, concurrency=2))
    ids = []
    for n in range(200):
        ids.append(again(partial(store.runs.start, wait, id=f"r{n}")))
        time.sleep(random.random() * 0.003)
        again(partial(store.runs.emit, "e", f"r{n}", n))
    assert [store.runs.result(id, timeout=3) for id in ids] == list(range(200))
    stop.set()
    worker.outcome()


def test_the_wait_of_a_run_and_the_workflows_of_others_do_not_touch_each_other(
    store: Store, clock: Clock
) -> None:
    """Whatever they have in common: the names of events, and ids."""

    def wait(run: Any, input: Any) -> Any:
        return run.wait_for("paid", "7")

    host = store.workflows

    def subscribe(workflow_id: str) -> EventSubscription:
        subscription = EventSubscription(
            id=f"of {workflow_id}",
            workflow_id=workflow_id,
            step_id=0,
            execution_pointer_id="p",
            event_name="paid",
            event_key="7",
        )
        return host.get_subscription(host.create_event_subscription(subscription))

    store.runs.start(wait, id="a")
    host.create_new_workflow(WorkflowInstance(id="a", workflow_definition_id="d"))
    own, later = subscribe("a"), subscribe("b")
    store.runs.start(wait, id="b", available_at=clock.now + seconds(3600))
    assert due(store, wait) == 0
    clock.advance(1)
    assert host.get_subscriptions("paid", "7") == [own, later]
    assert host.get_first_open_subscription("paid", "7") == own
    (waiting,) = store.state.timeline("a")["tables"]["waits"]["rows"]
    shown = {view["kind"]: view["tables"] for view in flowstore._read_views(store, "a")}
    assert len(shown["execution"]["waits"]["rows"]) == 1
    assert len(shown["workflow"]["subscriptions"]["rows"]) == 1
    token = "t", "w", clock.now + seconds(9)
    for refused in (
        host.get_subscription,
        host.terminate_subscription,
        lambda wait_id: host.set_subscription_token(wait_id, *token),
    ):
        with pytest.raises(NotFound):
            refused(waiting["id"])
    host.delete_workflow("a")
    own = subscribe("a")
    store.runs.emit("paid", "7", "data")
    assert look(store, "b").available_at == START + seconds(3600)
    assert due(store, wait) == 1
    assert store.runs.result("a") == "data"
    store.runs.cancel("b")
    assert host.get_subscriptions("paid", "7") == [later, own]


def decoded(monkeypatch: pytest.MonkeyPatch, call: Call) -> int:
    """How many rows a call makes into records."""
    rows: list[object] = []
    decode = flowstore._Mapper.decode

    def counted(mapper: Any, row: Any) -> Any:
        rows.append(row)
        return decode(mapper, row)

    with monkeypatch.context() as patch:
        patch.setattr(flowstore._Mapper, "decode", counted)
        call()
    return len(rows)


def test_neither_a_wait_nor_a_result_reads_what_the_run_has_had(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chat(run: Any, input: Any) -> Any:
        return [run.wait_for("m", "k") for _ in range(input)][-1]

    with store.run("a") as run:
        for number in range(100):
            store.runs.emit("m", "k", number)
            assert run.wait_for("m", "k") == number
        store.runs.emit("m", "k", 100)
        assert decoded(monkeypatch, lambda: run.wait_for("m", "k")) < 10
        run.result = "end"
    assert decoded(monkeypatch, lambda: store.runs.result("a")) < 12


def test_the_result_is_found_behind_whatever_was_logged_since(store: Store) -> None:
    with store.run("a") as run:
        run.result = 7
    for number in range(30):
        store.events.append("a", "default", {"type": "later", "n": number})
    assert store.runs.result("a") == 7
    execute(store, 'UPDATE flowstore_log SET event = \'{"type":"gone"}\'')
    assert store.runs.result("a") is None


def test_a_run_does_not_keep_the_tasks_that_have_ended(in_loop: Loop) -> None:
    async def body(store: Any) -> int:
        async with store.run("a") as run:
            for number in range(600):
                await asyncio.create_task(run.step(str(number), str, number))
            return len(run._branches)

    assert in_loop(body) < 300


def test_a_run_that_an_earlier_build_parked_goes_on(store: Store, clock: Clock) -> None:
    def wait(run: Any, input: Any) -> Any:
        return run.wait_for("e", timeout=60)

    id = store.runs.start(wait)
    assert due(store, wait) == 0
    now = int(clock.now.timestamp() * 1_000_000)
    execute(
        store,
        "UPDATE event_subscriptions SET subscription_data = ?, subscribe_as_of = ?",
        (str(now + 60_000_000), now),
    )
    execute(store, """UPDATE flowstore_work_items SET payload = '{"events_after": 0}'""")
    clock.advance(30)
    store.runs.emit("e", data="in time")
    clock.advance(40)
    assert due(store, wait) == 1
    assert store.runs.result(id) == "in time"


def test_events_of_the_users_own_in_the_log_of_a_run_are_left_alone(store: Store) -> None:
    def wait(run: Any, input: Any) -> Any:
        return run.wait_for("e")

    id = store.runs.start(wait)
    store.events.append(id, "default", {"type": "wait_completed"})
    assert due(store, wait) == 0
    store.runs.emit("e", data=1)
    assert due(store, wait) == 1
    with store.run(id, workflow_id="wait") as run:
        assert run.result == 1


def test_an_event_from_before_the_start_ends_no_wait(store: Store, clock: Clock) -> None:
    def wait(run: Any, input: Any) -> Any:
        return run.wait_for("e", timeout=60)

    store.workflows.create_event(Event(event_name="e", event_key="", event_data="old"))
    store.runs.emit("other")
    clock.advance(1)
    id = store.runs.start(wait)
    with store.run("block") as block, pytest.raises(TimeoutError):
        block.wait_for("e", timeout=0)
    clock.advance(1)
    store.workflows.create_event(Event(event_name="e", event_key="", event_data="new"))
    assert due(store, wait) == 1
    assert store.runs.result(id) == "new"


@parametrize("lead", [60, 86400 * 365])
def test_an_event_in_time_ends_a_wait_though_the_clock_was_put_back_before(
    store: Store, clock: Clock, lead: float
) -> None:
    """The times of events are in the order of their commits: then they are ahead of the clock."""

    def wait(run: Any, input: Any) -> Any:
        return run.wait_for("e", timeout=30)

    store.runs.emit("other")
    clock.advance(-lead)
    id = store.runs.start(wait)
    assert due(store, wait) == 0
    clock.advance(5)
    store.runs.emit("e", data="in time")
    clock.advance(60)  # the worker is late
    assert due(store, wait) == 1
    assert store.runs.result(id) == "in time"
    late = store.runs.start(wait)
    assert due(store, wait) == 0
    clock.advance(31)
    store.runs.emit("e", data="late")
    due(store, wait)
    assert [stored.event["type"] for stored in store.events.load_events(late)][
        1
    ] == "wait_timed_out"


def test_an_event_in_time_ends_a_wait_though_the_clock_was_put_back_since(
    store: Store, clock: Clock
) -> None:
    def wait(run: Any, input: Any) -> Any:
        return run.wait_for("e", timeout=10)

    id = store.runs.start(wait)
    assert due(store, wait) == 0
    clock.advance(3600)
    store.runs.emit("other")
    clock.advance(-3599)
    store.runs.emit("e", data="in time")
    clock.advance(10)
    assert due(store, wait) == 1
    assert store.runs.result(id) == "in time"


def test_waits_without_patience_take_all_events_that_are_there(store: Store) -> None:
    """The clock stands still, so the times of the events are ahead of it."""

    def drain(run: Any, input: Any) -> Any:
        taken = []
        while True:
            try:
                taken.append(run.wait_for("e", timeout=0))
            except TimeoutError:
                return taken

    id = store.runs.start(drain)
    for number in range(4):
        store.runs.emit("e", data=number)
    assert due(store, drain) == 1
    assert store.runs.result(id) == [0, 1, 2, 3]


def test_an_item_that_takes_a_runs_key_does_not_replace_the_run(store: Store, clock: Clock) -> None:
    def wait(run: Any, input: Any) -> Any:
        return run.wait_for("e")

    id = store.runs.start(wait, unique_key="k")
    create(store)
    item = WorkItem(execution_id="e1", queue_type="wait", unique_key="k", payload=[1])
    with pytest.raises(AlreadyExists) as caught:
        store.state.enqueue_work_item(item, on_conflict="replace")
    assert caught.value.id == id
    assert store.state.enqueue_work_item(item, on_conflict="keep") == id
    store.runs.emit("e", data=1)
    assert due(store, wait) == 1


# --- cancelling ---
def test_a_cancelled_run_has_ended(store: Store, calls: Calls) -> None:
    seen: list[Any] = []

    def cancelled(run: Any, input: Any) -> None:
        def during() -> int:
            store.runs.cancel(run.id)
            return 1

        later: list[Call] = [
            lambda: run.step("one", during),
            lambda: run.step("two", calls, 2),
            lambda: run.sleep(0),
            lambda: run.wait_for("e"),
        ]
        for call in later:
            with pytest.raises(flowstore.RunCancelled):
                call()
            seen.append(1)

    id = store.runs.start(cancelled)
    due(store, cancelled)
    assert (len(seen), calls) == (4, [])
    assert run_status(store, id) == ("cancelled", "failed")
    assert [one["type"] for one in run_log(store, id)] == [
        "execution_started",
        "execution_cancelled",
    ]
    with pytest.raises(flowstore.RunCancelled) as caught:
        store.runs.result(id)
    assert caught.value.execution_id == id
    before = contents(store)
    store.runs.cancel(id)
    with store.run("done"):
        pass
    store.runs.cancel("done")
    assert run_status(store, "done") == ("completed", "completed")
    with pytest.raises(NotFound):
        store.runs.cancel("none")
    assert contents(store)["items"][: len(before["items"])] == before["items"]


def test_a_wait_in_a_block_is_woken_when_it_is_cancelled(store: Store) -> None:
    def block(wait: Callable[[Any], Any]) -> Callable[[], None]:
        def enter() -> None:
            with store.run(f"r{len(store.state.list_executions())}") as run:
                wait(run)

        return enter

    waits: list[Callable[[Any], Any]] = [
        lambda run: run.wait_for("e"),
        lambda run: run.sleep(9999),
    ]
    for n, wait in enumerate(waits):
        waiter = Caller(block(wait))
        until(partial(store.state.get_execution, f"r{n}"))
        until(waiter.waits)
        store.runs.cancel(f"r{n}")
        assert isinstance(waiter.outcome(), flowstore.RunCancelled)
    assert store.workflows.get_subscriptions("e", "") == []


# --- forking ---
def test_a_fork_goes_on_before_a_step(store: Store, calls: Calls) -> None:
    def four(run: Any, input: Any) -> Any:
        first = run.step("s", calls, "s")
        data = run.wait_for("e")
        run.sleep(0)
        run.step("s", calls, "s2")
        if input == "bad":
            run.step("last", lambda: 1 / 0)
        return [first, data, run.step("last", calls, "last"), run.wait_for("e")]

    id = store.runs.start(four, "in", queue="q", priority=5, max_attempts=4)
    store.runs.emit("e", data=1)
    store.runs.emit("e", data=2)
    due(store, four, queues=["q"])
    assert store.runs.result(id) == ["s", 1, "last", 2]
    copy = store.runs.fork(id, before="s#2", new_id="copy")
    assert copy == "copy"
    assert run_steps(store, copy) == ["s", "e", "sleep"]
    assert run_status(store, copy) == ("pending", "pending")
    item = look(store, copy)
    assert (item.queue_type, item.priority, item.node_id, item.max_attempts) == ("q", 5, "four", 4)
    due(store, four, queues=["q"])
    assert store.runs.result(copy) == ["s", 1, "last", 2]
    assert calls == ["s", "s2", "last", "s2", "last"]
    bad = store.runs.start(four, "bad", queue="q", max_attempts=1)
    store.runs.emit("e")
    due(store, four, queues=["q"])
    assert run_steps(store, store.runs.fork(bad, before="last")) == ["s", "e", "sleep", "s#2"]
    for id, step, error in (("none", "s", NotFound), (bad, "x", NotFound), (bad, 7, InvalidData)):
        with pytest.raises(error):
            store.runs.fork(id, before=cast("str", step))
    with pytest.raises(AlreadyExists):
        store.runs.fork(bad, before="s", new_id="copy")


def test_a_fork_is_not_misled_by_other_events_of_the_log(store: Store) -> None:
    with store.run("a") as run:
        run.step("one", str, 1)
        store.events.append("a", "default", {"type": "tool_called", "step": "two"})
        run.step("between", str, 2)
        run.step("two", str, 3)
    assert run_steps(store, store.runs.fork("a", before="two")) == ["one", "between"]
    store.events.append("a", "default", {"type": "tool_called", "step": "none"})
    with pytest.raises(NotFound):
        store.runs.fork("a", before="none")


# --- in an event loop ---
def test_a_task_does_its_steps_once(in_loop: Loop) -> None:
    done: list[int] = []

    async def twice(number: int) -> int:
        await asyncio.sleep(0)
        done.append(number)
        return number * 2

    async def main(store: AsyncStore) -> None:
        with pytest.raises(KeyError):
            async with store.run("a", input=1) as run:
                numbers = [run.step(f"s{n}", twice, n) for n in range(5)]
                assert await asyncio.gather(*numbers) == [0, 2, 4, 6, 8]
                raise KeyError
        with pytest.raises(flowstore.RunFailed):
            await store.runs.result("a")
        async with store.run("a", input=1) as run:
            assert (run.attempt, await run.step("s1", twice, 1)) == (1, 2)
            with pytest.raises(ZeroDivisionError):
                await run.step("bad", lambda: 1 / 0)
            async with store.transaction():
                run.result = await run.step("plain", str, 7)
        assert await store.runs.result("a") == "7"
        async with store.run("a") as run:
            assert run.result == "7"
            assert await run.step("new", twice, 9) == 18
        with pytest.raises(flowstore.AlreadyRunning):
            async with store.run("b"), store.run("b", wait=0):
                pass
        with pytest.raises(StorageError):
            async with store.transaction(), store.run("c"):
                pass

    in_loop(main)
    assert sorted(done) == [0, 1, 2, 3, 4, 9]


def test_a_step_of_a_task_that_fails_in_a_transaction_leaves_nothing_of_what_it_wrote(
    in_loop: Loop,
) -> None:
    async def main(store: AsyncStore) -> None:
        async with store.transaction() as tx:
            await tx.execute("CREATE TABLE payments (id INTEGER)")

        async def pay(tx: Any, error: BaseException | None) -> int:
            await asyncio.gather(tx.execute("INSERT INTO payments VALUES (7)"))
            if error:
                raise error
            return 7

        async with store.run("a") as run:
            async with store.transaction() as tx:
                for error in (OSError(), asyncio.CancelledError()):
                    with pytest.raises(type(error)):
                        await run.step("pay", pay, tx, error)
                    assert await tx.execute("SELECT id FROM payments") == []
                assert await run.step("pay", pay, tx, None) == 7
            async with store.transaction() as tx:
                assert await tx.execute("SELECT id FROM payments") == [(7,)]
        assert types_in(await store.events.load_events("a"))[1:-1] == [
            "step_failed",
            "step_completed",
        ]

    in_loop(main)


def test_steps_side_by_side_in_a_transaction_do_not_wait_for_each_other(in_loop: Loop) -> None:
    async def main(store: AsyncStore) -> None:
        event = asyncio.Event()

        async def first() -> int:
            await event.wait()
            return 1

        async def second(tx: Any) -> int:
            await tx.execute("SELECT 1")
            event.set()
            return 2

        async with store.run("a") as run, store.transaction() as tx:
            steps = run.step("first", first), run.step("second", second, tx)
            assert [*await asyncio.wait_for(asyncio.gather(*steps), 20)] == [1, 2]
        kinds = types_in(await store.events.load_events("a"))
        assert kinds[1:-1] == ["step_completed"] * 2

    in_loop(main)


def test_what_a_cancelled_task_has_committed_is_not_done_again(
    in_loop: Loop, monkeypatch: pytest.MonkeyPatch, calls: Calls
) -> None:
    async def main(store: AsyncStore) -> None:
        async with store.run("a") as run:
            interrupt_behind(monkeypatch, flowstore.Run, "_record", asyncio.CancelledError)
            with pytest.raises(asyncio.CancelledError):
                await run.step("charge", calls, 1)
            assert await run.step("charge", calls, 2) == 1
            for data in (1, 2):
                await store.runs.emit("e", data=data)
            interrupt_behind(monkeypatch, flowstore.Run, "_attempt", asyncio.CancelledError)
            with pytest.raises(asyncio.CancelledError):
                await run.wait_for("e", name="one")
            assert await run.wait_for("e", name="two") == 2

    in_loop(main)
    assert calls == [1]


def test_a_step_is_not_done_again_whose_task_was_cancelled_at_the_end_of_its_transaction(
    in_loop: Loop, monkeypatch: pytest.MonkeyPatch, calls: Calls
) -> None:
    finish = flowstore._Block.finish
    committed, goes_on = threading.Event(), threading.Event()

    def slow(block: Any, commit: bool) -> None:
        finish(block, commit)
        committed.set()
        goes_on.wait(60)

    async def main(store: AsyncStore) -> None:
        async def pay(run: Any) -> Any:
            async with store.transaction():
                return await run.step("pay", calls, 7)

        async with store.run("a") as run:
            with monkeypatch.context() as patch:
                patch.setattr(flowstore._Block, "finish", slow)
                patch.setattr(
                    flowstore.AsyncRun, "_in_savepoint", lambda run, steps: run._walk(steps)
                )
                task = asyncio.create_task(pay(run))
                await asyncio.to_thread(committed.wait, 60)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            goes_on.set()
            assert await pay(run) == 7
        assert types_in(await store.events.load_events("a"))[1:-1] == ["step_completed"]

    in_loop(main)
    assert calls == [7]


def test_new_steps_of_a_completed_run_may_be_done_side_by_side(in_loop: Loop) -> None:
    async def main(store: AsyncStore) -> None:
        async with store.run("a") as run:
            await run.step("old", str)
        async with store.run("a") as run:
            steps = [run.step(f"new{n}", asyncio.sleep, 0, n) for n in range(4)]
            run.result = await asyncio.gather(*steps)
        assert await store.runs.result("a") == [0, 1, 2, 3]

    in_loop(main)


def test_waits_side_by_side_have_an_event_each(in_loop: Loop) -> None:
    async def main(store: AsyncStore) -> None:
        async with store.run("a") as run:
            for number in range(4):
                await store.runs.emit("e", data=number)
            waits = [run.wait_for("e", name=f"w{n}") for n in range(4)]
            assert sorted(await asyncio.gather(*waits)) == [0, 1, 2, 3]

    in_loop(main)


def test_a_step_of_the_name_of_a_wait_that_was_cancelled_is_another_one(in_loop: Loop) -> None:
    async def main(store: AsyncStore) -> None:
        for number in range(40):
            async with store.run(f"r{number}") as run:
                await store.runs.emit("approved", run.id, "yes")
                waiting = asyncio.create_task(run.wait_for("approved", run.id))
                await asyncio.sleep(number / 20_000)
                waiting.cancel()
                with suppress(asyncio.CancelledError):
                    assert await waiting == "yes"
                assert await run.step("approved", str, "by itself") == "by itself"

    in_loop(main)


def test_a_cancelled_task_gives_its_run_back(in_loop: Loop) -> None:
    async def main(store: AsyncStore) -> None:
        async def block() -> None:
            async with store.run("a") as run:
                await run.step("one", str)
                await run.step("two", asyncio.sleep, 60)

        task = asyncio.create_task(block())
        while "step:one" not in str(await store.events.load_events("a")):
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        item = await store.state.get_work_item("a")
        assert item is not None
        assert (item.status, item.attempt) == ("pending", 0)
        async with store.run("a", wait=0) as run:
            assert run.attempt == 0

    in_loop(main)


def test_tasks_do_runs_that_sleep_wait_fail_and_are_stopped(in_loop: Loop) -> None:
    async def work(run: Any, input: Any) -> Any:
        await run.sleep(0.05)
        data = await run.wait_for("e", run.id, timeout=30)
        return [await run.step("s", asyncio.sleep, 0, data), run.attempt]

    async def fail(run: Any, input: Any) -> Any:
        raise ValueError("never")

    async def long(run: Any, input: Any) -> Any:
        await run.step("one", str)
        await run.step("two", asyncio.sleep, 60)

    async def main(store: AsyncStore) -> None:
        stop = asyncio.Event()
        worker = asyncio.create_task(store.runs.work(work, fail, long, concurrency=4, stop=stop))
        ids = [await store.runs.start(work) for _ in range(6)]
        bad = await store.runs.start(fail, max_attempts=1)
        lasting = await store.runs.start(long)
        for number, id in enumerate(ids):
            await asyncio.sleep(random.random() * 0.02)
            await store.runs.emit("e", id, number)
        for number, id in enumerate(ids):
            assert await store.runs.result(id) == [number, 0]
        with pytest.raises(flowstore.RunFailed, match="never"):
            await store.runs.result(bad)
        while "step:one" not in str(await store.events.load_events(lasting)):
            await asyncio.sleep(0.01)
        stop.set()
        assert await worker == 7
        item = await store.state.get_work_item(lasting)
        assert item is not None
        assert (item.status, item.attempt) == ("pending", 0)
        assert await store.runs.work(work, until_idle=True) == 0
        await store.runs.cancel(lasting)
        with pytest.raises(flowstore.RunCancelled):
            await store.runs.result(lasting)
        await store.runs.fork(ids[0], before="s", new_id="fork")
        assert await store.runs.work(work, until_idle=True) == 1
        assert await store.runs.result("fork") == [0, 0]

    in_loop(main)


def test_a_wait_beside_a_step_parks_the_run_when_the_step_is_recorded(in_loop: Loop) -> None:
    begun: list[Any] = []

    async def slow(value: str) -> str:
        begun.append(value)
        await asyncio.sleep(0.1)
        return value

    async def both(run: Any, input: Any) -> Any:
        return await asyncio.gather(run.wait_for("e", run.id), run.step("slow", slow, "done"))

    async def main(store: AsyncStore) -> None:
        id = await store.runs.start(both)
        assert await store.runs.work(both, until_idle=True) == 0
        assert "step:slow" in str(await store.events.load_events(id))
        await store.runs.emit("e", id, 7)
        assert await store.runs.work(both, until_idle=True) == 1
        assert await store.runs.result(id) == [7, "done"]
        assert begun == ["done"]

    in_loop(main)


@parametrize("way", ["worker", "block"])
def test_a_step_of_a_task_is_recorded_although_the_run_fails_beside_it(
    in_loop: Loop, calls: Calls, way: str
) -> None:
    async def charge(failed: asyncio.Event) -> Any:
        await failed.wait()
        await asyncio.sleep(0.1)
        return calls(7)

    async def pay(run: Any, input: Any) -> Any:
        failed = asyncio.Event()

        def fail() -> None:
            failed.set()
            if run.attempt == 0:
                raise OSError

        steps = run.step("charge", charge, failed), run.step("fail", fail)
        return await asyncio.gather(*steps)

    async def main(store: AsyncStore) -> None:
        if way == "worker":
            await store.runs.start(pay, id="a")
            store._engine.options.backoff = lambda attempt: 0
            assert await store.runs.work(pay, until_idle=True) == 1
        else:
            for _ in range(2):
                with suppress(OSError):
                    async with store.run("a") as run:
                        run.result = await pay(run, None)
        assert await store.runs.result("a") == [7, None]

    in_loop(main)
    assert calls == [7]


def test_a_group_whose_body_waits_does_its_other_tasks(in_loop: Loop, calls: Calls) -> None:
    async def ask(run: Any) -> None:
        await asyncio.sleep(0.05)  # the wait has suspended the run by then
        await run.step("ask", calls, run.attempt)

    async def asks(run: Any, input: Any) -> Any:
        async with asyncio.TaskGroup() as group:
            group.create_task(ask(run))
            return await run.wait_for("approved", run.id)

    async def main(store: AsyncStore) -> None:
        id = await store.runs.start(asks)
        assert await store.runs.work(asks, until_idle=True) == 0
        assert calls == [0]
        await store.runs.emit("approved", id, "yes")
        assert await store.runs.work(asks, until_idle=True) == 1
        assert await store.runs.result(id) == "yes"

    in_loop(main)
    assert calls == [0]


def test_an_error_that_is_made_of_a_suspension_is_no_attempt(in_loop: Loop) -> None:
    async def agent(run: Any, input: Any) -> Any:
        calls = run.step("search", str, 1), run.wait_for("approved", run.id)
        results = await asyncio.gather(*calls, return_exceptions=True)
        if failed := [one for one in results if isinstance(one, BaseException)]:
            raise RuntimeError(f"tools failed: {failed}")
        return results

    async def main(store: AsyncStore) -> None:
        id = await store.runs.start(agent, max_attempts=1)
        assert await store.runs.work(agent, until_idle=True) == 0
        await store.runs.emit("approved", id, "yes")
        assert await store.runs.work(agent, until_idle=True) == 1
        assert await store.runs.result(id) == ["1", "yes"]

    in_loop(main)


def test_a_failure_of_a_branch_beside_a_wait_is_an_attempt_when_the_wait_has_ended(
    in_loop: Loop,
) -> None:
    async def bad(run: Any) -> None:
        await asyncio.sleep(0.05)
        raise ValueError("bad")

    async def agent(run: Any, input: Any) -> Any:
        calls = bad(run), run.wait_for("approved", run.id)
        results = await asyncio.gather(*calls, return_exceptions=True)
        raise results[0]

    async def main(store: AsyncStore) -> None:
        id = await store.runs.start(agent, max_attempts=1)
        assert await store.runs.work(agent, until_idle=True) == 0
        await store.runs.emit("approved", id)
        assert await store.runs.work(agent, until_idle=True) == 1
        with pytest.raises(flowstore.RunFailed, match="ValueError: bad"):
            await store.runs.result(id)

    in_loop(main)


def test_a_wait_lets_the_steps_of_another_task_go_on(
    in_loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flowstore, "_BRANCH_SECONDS", 0.5)
    begun: list[Any] = []

    async def links(run: Any) -> None:
        for number in range(4):
            await run.step("link", begun.append, number)
            await asyncio.sleep(0.01)  # no step is under way

    async def both(run: Any, input: Any) -> Any:
        return await asyncio.gather(run.wait_for("e", run.id), links(run))

    async def main(store: AsyncStore) -> None:
        id = await store.runs.start(both)
        assert await store.runs.work(both, until_idle=True) == 0
        assert begun == [0, 1, 2, 3]
        await store.runs.emit("e", id, 7)
        assert await store.runs.work(both, until_idle=True) == 1
        assert await store.runs.result(id) == [7, None]
        assert begun == [0, 1, 2, 3]

    in_loop(main)


def test_the_tasks_of_a_worker_are_not_idle_while_a_run_waits_for_another_one(
    in_loop: Loop,
) -> None:
    async def child(run: Any, input: Any) -> Any:
        return input * 2

    async def main(store: AsyncStore) -> None:
        async def parent(run: Any, input: Any) -> Any:
            await run.step("the others look for a run", asyncio.sleep, 0.1)
            ids = [await run.step("start", store.runs.start, child, n) for n in range(3)]
            return [await run.step("result", store.runs.result, id) for id in ids]

        id = await store.runs.start(parent)
        assert await store.runs.work(parent, child, concurrency=3, until_idle=True) == 4
        assert await store.runs.result(id) == [0, 2, 4]

    in_loop(main)


def test_a_task_of_the_functions_own_that_was_cancelled_is_a_failure_of_the_function(
    in_loop: Loop,
) -> None:
    async def give_up(run: Any, input: Any) -> None:
        tool = asyncio.create_task(asyncio.sleep(60))
        asyncio.get_running_loop().call_soon(tool.cancel)
        await tool

    async def main(store: AsyncStore) -> None:
        id = await store.runs.start(give_up, max_attempts=1)
        assert await store.runs.work(give_up, until_idle=True) == 1
        with pytest.raises(flowstore.RunFailed, match="CancelledError"):
            await store.runs.result(id)

    in_loop(main)


def test_an_exception_leaves_the_work_of_tasks(in_loop: Loop) -> None:
    async def leave(run: Any, input: Any) -> None:
        raise Stop

    async def main(store: AsyncStore) -> None:
        id = await store.runs.start(leave)
        with pytest.raises(Stop):
            await store.runs.work(leave, concurrency=2)
        item = await store.state.get_work_item(id)
        assert item is not None
        assert (item.status, item.attempt) == ("pending", 0)

    in_loop(main)


def test_a_task_cancelled_at_any_point_of_a_block_gives_its_run_back(path: Path) -> None:
    async def block(store: AsyncStore) -> None:
        async with store.run("a") as run:
            await run.step("one", str)
            await run.sleep(60)

    async def main() -> None:
        async with flowstore.open_async(path, lease_seconds=1) as store:
            for number in range(60):
                task = asyncio.create_task(block(store))
                await asyncio.sleep(number / 5000)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            async with asyncio.timeout(30), store.run("a") as run:
                assert await run.step("one", str, "again") in ("", "again")

    asyncio.run(main())


# --- the work command ---
WORKED = """
import asyncio, flowstore

def double(run, input):
    return run.step("double", lambda: input * 2)

def fail(run, input):
    try:
        run.step("x", lambda: 1 / 0)
    except flowstore.FlowStoreError:  # the module's own errors are those of the command
        return "ours"

async def slow(run, input):
    try:
        run.step("", str)
    except flowstore.InvalidData:
        pass
    await run.step("one", asyncio.sleep, 0, 1)
    return await run.step("two", asyncio.sleep, input)

number = 7
"""


@pytest.fixture
def worked(tmp_path: Path) -> Path:
    (tmp_path / "worked.py").write_text(WORKED)
    return tmp_path


def work_command(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(flowstore.__file__), "work", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, **cast("Any", pipes))


@parametrize("signal_name", ["SIGINT", "SIGTERM"])
def test_the_work_command_tells_of_each_run_until_it_is_ended(
    worked: Path, signal_name: str
) -> None:
    with flowstore.open(worked / "a.db", backoff=lambda attempt: 0) as store:
        store.runs.start("double", 4, id="a")
        store.runs.start("fail", id="b", max_attempts=1)
        child = work_command(worked, "a.db", "worked:double", "worked:fail", "--concurrency", "2")
        assert store.runs.result("a", timeout=60) == 8
        with pytest.raises(flowstore.RunFailed):
            store.runs.result("b", timeout=60)
        child.send_signal(getattr(signal, signal_name))
        lines = sorted(finished(child).splitlines())
    assert lines == [
        "a  double completed",
        "b  fail failed: ZeroDivisionError: division by zero",
    ]


def test_the_work_command_does_coroutine_functions(worked: Path) -> None:
    with flowstore.open(worked / "a.db") as store:
        store.runs.start("slow", 0, id="a")
        store.runs.start("slow", 60, id="b")
        child = work_command(worked, "a.db", "worked:slow", "--concurrency", "2")
        assert store.runs.result("a", timeout=60) is None
        until(lambda: "one" in run_steps(store, "b"))
        child.send_signal(signal.SIGTERM)
        assert finished(child) == "a  slow completed\n"
        assert run_status(store, "b") == ("pending", "pending")


@parametrize(
    "arguments",
    [
        ["a.db", "worked:none"],
        ["a.db", "none:double"],
        ["a.db", "worked"],
        ["a.db", "worked:number"],
        ["a.db"],
        ["a.db", "worked:double", "--concurrency", "0"],
        ["a.db", "worked:double", "worked:slow"],
        [":memory:", "worked:double"],
    ],
)
def test_the_work_command_says_in_one_line_what_it_cannot_do(
    worked: Path, arguments: list[str]
) -> None:
    flowstore.open(worked / "a.db").close()
    child = work_command(worked, *arguments)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 2
    assert err.startswith("flowstore: ")
    assert len(err.splitlines()) == 1


def test_the_work_command_tells_in_one_line_of_what_a_module_raises(worked: Path) -> None:
    flowstore.open(worked / "a.db").close()
    for raises, says in [
        ("sys.exit('no database')", "SystemExit: no database"),
        ("sys.exit()", "SystemExit"),
        ("sys.exit(ValueError('odd'))", "SystemExit: odd"),
        ("raise asyncio.CancelledError('x')", "CancelledError: x"),
    ]:
        (worked / "exits.py").write_text(f"import asyncio, sys; {raises}")
        child = work_command(worked, "a.db", "exits:double")
        assert child.communicate(timeout=60)[1] == f"flowstore: exits:double: {says}\n"
        assert child.returncode == 2


@parametrize("word", ["def", "async def"])
def test_the_work_command_tells_in_one_line_of_what_a_function_raises_to_end_it(
    worked: Path, word: str
) -> None:
    for raises, says in [
        ("sys.exit('bye')", "SystemExit: bye"),
        ("sys.exit()", "SystemExit"),
        ("sys.exit(ValueError('7'))", "SystemExit: 7"),
        ("raise Odd('\\x1b[31mstrange')", r"Odd: \x1b[31mstrange"),
    ]:
        source = f"import sys\nclass Odd(BaseException): pass\n{word} end(run, input): {raises}\n"
        (worked / "ends.py").write_text(source)
        with flowstore.open(worked / "a.db") as store:
            store.runs.start("end", id="a")
            child = work_command(worked, "a.db", "ends:end")
            assert child.communicate(timeout=60)[1] == f"flowstore: {says}\n"
            assert child.returncode == 1
            assert run_status(store, "a") == ("pending", "pending")


# --- views ---
def test_views_show_a_runs_steps_and_what_it_waits_for(store: Store, clock: Clock) -> None:
    def work(run: Any, input: Any) -> None:
        run.sleep(60, name="nap")
        with pytest.raises(TimeoutError):
            run.wait_for("never", timeout=0)
        run.wait_for("approved", run.id, timeout=3600)

    with store.run("a") as run:
        assert repr(run) == "<flowstore.Run 'a', attempt 0>"
        run.step("five", str, 5)
        assert "five" in run._repr_html_()  # type: ignore[attr-defined]
    id = store.runs.start(work)
    due(store, work)
    view = store.state.timeline(id)
    steps = {step["name"]: step for step in view["steps"]}
    assert steps["sleep nap"]["status"] == "waiting"
    clock.advance(60)
    due(store, work)
    clock.advance(1)
    view = store.state.timeline(id)
    steps = {step["name"]: step for step in view["steps"]}
    assert steps["sleep nap"]["status"] == "completed"
    assert steps["sleep nap"]["parts"][-1]["to"] == START + seconds(60)
    assert steps["wait never"]["status"] == "timed_out"
    assert steps["wait approved"]["status"] == "waiting"
    (wait,) = view["tables"]["waits"]["rows"]
    assert (wait["event_name"], wait["event_key"]) == ("approved", id)
    assert wait["until"] == START + seconds(3660)
    assert "approved" in str(view)
    store.runs.cancel(id)
    assert store.state.timeline(id)["tables"]["waits"]["rows"] == []


def test_views_show_how_long_a_step_took(make_store: MakeStore) -> None:
    store = make_store()
    with store.run("a") as run:
        run.step("slow", time.sleep, 0.05)
    (step,) = [one for one in store.state.timeline("a")["steps"] if one["name"] == "slow"]
    (part,) = step["parts"]
    assert seconds(0.05) <= part["to"] - part["from"] < seconds(5)
    assert (step["status"], part["what"]) == ("completed", "done")


# --- killed processes ---
CHARGING = """
with flowstore.open(sys.argv[1], lease_seconds=0.05) as store, store.run("a") as run:
    n = int(sys.argv[2])
    with store.transaction() as tx:
        count = 0
        def traced(sql):  # each statement of the block, and its COMMIT
            global count
            count += 1
            if count == n:
                os.kill(os.getpid(), signal.SIGKILL)
        store._engine.writer.connection.tx.db.set_trace_callback(traced)
        run.step("charge", lambda: tx.execute("INSERT INTO orders VALUES (1)"))
    store._engine.writer.connection.tx.db.set_trace_callback(None)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this platform has no SIGKILL")
def test_a_step_killed_at_any_statement_has_left_its_row_and_its_record_or_neither(
    path: Path,
) -> None:
    with flowstore.open(path) as store, store.transaction() as tx:
        tx.execute("CREATE TABLE orders (id INTEGER)")
    for n in itertools.count(1):
        killed = script(CHARGING, path, n)
        killed.communicate(timeout=60)
        with flowstore.open(path) as store, store.transaction() as tx:
            orders = tx.execute("SELECT id FROM orders")
            assert run_steps(store, "a") == ["charge"] * len(orders)
            assert len(orders) <= 1
        if killed.returncode == 0:
            break
        assert n < 50
    assert n > 5
    with flowstore.open(path) as store, store.run("a") as run:
        assert run.step("charge", str, "never") == []


KILLED_WORKER = """
import random, time
store = flowstore.open(sys.argv[1], lease_seconds=2, backoff=lambda attempt: 0.01, synchronous="OFF")

def note(run, step):  # outside a transaction: at least once
    with store.transaction() as tx:
        row = run.id, run._item.lease_fence, step, os.getpid(), time.time_ns()
        tx.execute("INSERT INTO begun VALUES (?, ?, ?, ?, ?)", row)
    time.sleep(random.random() * 0.005)
    return [os.getpid(), step]

def work(run, input):
    results = [run.step(f"s{n}", note, run, n) for n in range(input - 1)]
    with store.transaction() as tx:
        run.step("once", lambda: tx.execute("INSERT INTO once VALUES (?)", (run.id,)))
    return results

store.runs.work(work, concurrency=2)
"""


def check_killed_workers(target: str, runs: int, kills: int, pause: float) -> None:
    """Runs done by four processes, one of which is killed every now and then: each step's result is recorded once,
    and no run is in two workers at once."""
    workers = []
    try:
        with flowstore.open(target, lease_seconds=2) as store:
            with store.transaction() as tx:
                tx.execute(
                    "CREATE TABLE begun"
                    " (run TEXT, fence INTEGER, step INTEGER, worker INTEGER, at BIGINT)"
                )
                tx.execute("CREATE TABLE once (run TEXT)")
            ids = [store.runs.start("work", 5, max_attempts=1000) for _ in range(runs)]
            workers = [script(KILLED_WORKER, target) for _ in range(4)]
            for _ in range(kills):
                time.sleep(pause)
                killed = workers.pop(0)
                killed.kill()
                killed.communicate()
                workers.append(script(KILLED_WORKER, target))
            for id in ids:
                results = store.runs.result(id, timeout=120)
                log = [one for one in run_log(store, id) if one["type"] == "step_completed"]
                assert [one["step"] for one in log] == ["s0", "s1", "s2", "s3", "once"]
                assert [one["result"] for one in log[:4]] == results
            with store.transaction() as tx:
                assert sorted(tx.execute("SELECT run FROM once")) == sorted((id,) for id in ids)
                # Under one fence there is one worker, and no step comes twice.
                rows = tx.execute("SELECT run, fence, step, worker FROM begun ORDER BY at")
            assert len({row[:3] for row in rows}) == len(rows)
            assert len({(row[0], row[1], row[3]) for row in rows}) == len({row[:2] for row in rows})
            last: dict[str, int] = {}
            for id, fence, _, _ in rows:
                assert fence >= last.get(id, 0), "a lost worker went on beside its heir"
                last[id] = fence
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()


def test_killed_workers_runs_complete_with_each_result_once(path: Path) -> None:
    check_killed_workers(str(path), 40, 4, 0.3)


def test_killed_workers_runs_complete_with_each_result_once_on_a_server(
    postgres: PostgresServer,
) -> None:
    check_killed_workers(postgres.target(), 40, 4, 0.4)


def test_a_block_whose_run_was_cancelled_ends_with_run_cancelled(store: Store) -> None:
    with pytest.raises(flowstore.RunCancelled), store.run("a") as run:
        store.runs.cancel("a")
        run.result = 7
    record = store.state.get_execution("a")
    assert record is not None and record.status == "cancelled"


def test_a_result_that_is_nested_too_deeply_fails_its_run_and_not_the_worker(store: Store) -> None:
    def deep(run: Any, input: Any) -> Any:
        result: list[Any] = []
        for _ in range(255):  # and the event around it
            result = [result]
        return result

    id = store.runs.start(deep, max_attempts=1)
    assert store.runs.work(deep, until_idle=True) == 1
    with pytest.raises(flowstore.RunFailed, match="InvalidData"):
        store.runs.result(id)


# ==================================================================================================
# Store: backup, check, compact, prune, stats
# ==================================================================================================


def test_a_backup_to_a_path_that_is_too_long_is_refused_with_the_limit(tmp_path: Path) -> None:
    with flowstore.open(":memory:") as store:
        for target in (path_of(tmp_path, 490), tmp_path / ("n" * 240)):
            before = os.listdir(target.parent)
            with pytest.raises(StorageError, match="504") as caught:
                store.backup(target)
            assert one_sentence(caught.value) and os.listdir(target.parent) == before


NO_FILE = """
import socket, stat
os.chdir(sys.argv[1])
os.mkfifo("fifo")
socket.socket(socket.AF_UNIX).bind("socket")
os.symlink("fifo", "link")
os.symlink("loop", "loop")
store = flowstore.open(":memory:")
for name in ("fifo", "socket", "link", "loop", "/dev/null", "/dev/zero", "/dev/full"):
    for call in (lambda: flowstore.open(name), lambda: flowstore.open(name, read_only=True), lambda: store.backup(name)):
        try:
            call()
        except flowstore.StorageError as error:
            assert type(error) is flowstore.StorageError, error
            print(error)
print(sorted(os.listdir(".")))
"""


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFO here")
def test_what_is_no_file_is_refused_at_once_by_open_and_by_backup(tmp_path: Path) -> None:
    out = finished(script(NO_FILE, tmp_path)).splitlines()
    assert len(out) == 22 and out.pop() == "['fifo', 'link', 'loop', 'socket']"
    for opened, read, backed_up in zip(out[::3], out[1::3], out[2::3], strict=True):
        assert opened == read and re.search("FIFO, a socket or a device|symbolic links", opened)
        assert "there is something already" in backed_up


# --- backup, check, compact, stats, now ---


@parametrize("kind", [str, Path])
def test_sqlite_backup_holds_everything(
    sqlite_store: Store, tmp_path: Path, clock: Clock, kind: Any
) -> None:
    claimed(sqlite_store)
    write(sqlite_store, "e1")
    sqlite_store.backup(kind(tmp_path / "copy.db"))
    with flowstore.open(tmp_path / "copy.db", clock=clock) as copied:
        assert contents(copied) == contents(sqlite_store)
        assert copied.check() == []
        assert write(copied, "e1") == 2
    assert sqlite_store.events.count_events("e1") == 1


def test_sqlite_backup_does_not_overwrite(sqlite_store: Store, tmp_path: Path) -> None:
    existing = tmp_path / "existing"
    existing.write_bytes(b"precious")
    with pytest.raises(StorageError) as caught:
        sqlite_store.backup(existing)
    assert one_sentence(caught.value)
    assert existing.read_bytes() == b"precious"


@parametrize("ending", ["-wal", "-journal"])
def test_sqlite_backup_is_refused_beside_the_log_of_a_file_that_is_gone(
    sqlite_store: Store, tmp_path: Path, ending: str
) -> None:
    (tmp_path / f"copy.db{ending}").write_bytes(b"left by a crash")
    with pytest.raises(StorageError, match=ending) as caught:
        sqlite_store.backup(tmp_path / "copy.db")
    assert one_sentence(caught.value)
    assert not (tmp_path / "copy.db").exists()


def test_sqlite_backup_that_fails_leaves_nothing(sqlite_store: Store, tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        sqlite_store.backup(tmp_path / "no folder" / "copy.db")
    assert not (tmp_path / "no folder").exists()
    assert write(sqlite_store, "e1") == 1


def test_a_backup_is_restored_where_the_old_file_was_moved_away_with_its_log(
    crashed: Path, tmp_path: Path
) -> None:
    with flowstore.open(tmp_path / "live.db") as store:
        store.backup(tmp_path / "copy.db")
    away = tmp_path / "away"
    away.mkdir()
    flowstore.open(crashed, read_only=True).close()  # which makes a -shm, too
    for found in list(crashed.parent.iterdir()):
        found.rename(away / found.name)
    (tmp_path / "copy.db").rename(crashed)
    with flowstore.open(crashed) as store:
        assert write(store, "e1") == 21
        assert store.check() == []
    with flowstore.open(away / "app.db") as store:
        assert store.events.count_events("e1") == 20


def test_sqlite_backup_is_consistent_while_others_write(
    sqlite_store: Store, tmp_path: Path
) -> None:
    stop = threading.Event()

    def append() -> int:
        for count in itertools.count(1):
            with sqlite_store.transaction():
                write(sqlite_store, "e1")
                write(sqlite_store, "e2")
            if stop.is_set() and count >= 20:
                return count
        raise AssertionError

    writer = Caller(append)
    for number in range(5):
        sqlite_store.backup(tmp_path / f"{number}.db")
    stop.set()
    count = writer.result()
    assert sqlite_store.events.count_events("e1") == count
    for number in range(5):
        with flowstore.open(tmp_path / f"{number}.db") as copied:
            assert copied.events.count_events("e1") == copied.events.count_events("e2")


def test_sqlite_compact_gives_space_back(path: Path, file_store: Store) -> None:
    with file_store.transaction() as tx:
        tx.execute("CREATE TABLE ballast(text TEXT)")
        tx.executemany("INSERT INTO ballast VALUES (?)", [("x" * 1000,)] * 3000)
    write(file_store, "e1")
    file_store.compact()
    full = path.stat().st_size
    execute(file_store, "DELETE FROM ballast")
    file_store.compact()
    assert path.stat().st_size < full - 2_000_000
    assert Path(f"{path}-wal").stat().st_size == 0
    assert file_store.stats()["file_bytes"] == path.stat().st_size
    assert file_store.stats()["wal_bytes"] == 0
    assert file_store.events.count_events("e1") == 1
    assert file_store.check() == []


def test_stats_count_executions_items_and_rows(store: Store) -> None:
    create(store, "e1")
    create(store, "e2", status="running")
    enqueue(store, id="i1")
    enqueue(store, id="i2")
    enqueue(store, id="i3", queue_type="other")
    claim(store, "other")
    stats = store.stats()
    assert json.loads(json.dumps(stats, allow_nan=False)) == stats
    assert {"flows", "workflows", "file_bytes", "wal_bytes"} <= stats.keys()
    assert Counter(stats["executions"]) == Counter(pending=1, running=1)
    queues = {queue: Counter(by) for queue, by in stats["queues"].items()}
    assert queues == {"q": Counter(pending=2), "other": Counter(claimed=1)}
    assert all(type(count) is int for count in stats["tables"].values())
    assert stats["tables"]["flowstore_work_items"] == 3
    assert {"flows", "flow_steps", "flow_events"} <= stats["tables"].keys()


TERMINAL_PRUNE = {"flows": ["finished", "failed", "cancelled"], "workflows": ["Complete", "Terminated"],
                  "flowstore_runs": ["completed", "failed", "cancelled", "limit_exceeded"]}  # fmt: skip


PruneRows = dict[str, list[dict[str, Any]]]


def rows_to_prune(store: Store) -> PruneRows:
    """Every row of every table, but for those that stand for the end of the log."""
    sql = "SELECT name FROM pragma_table_info(?)"
    if store.target.startswith("postgres"):
        # The information schema would read what all other tests have made.
        sql = """SELECT attname::text FROM pg_attribute
            WHERE attrelid = to_regclass(?) AND attnum > 0 ORDER BY attnum"""
    with store.transaction() as tx:
        columns = {
            name: [column for (column,) in tx.execute(sql, (name,))]
            for name in flowstore._TABLE_NAMES
        }
        found = {name: [dict(zip(columns[name], row, strict=True)) for row in tx.execute(f"SELECT * FROM {name}")]
                 for name in columns}  # fmt: skip
    found["flowstore_log"] = [row for row in found["flowstore_log"] if row["execution_id"]]
    return found


def pruned_by_hand(
    rows: PruneRows, before: datetime, artifacts: bool = False
) -> tuple[PruneRows, dict[str, int]]:
    """What is left of the rows, and how many things of each kind went: the promise, said in another way."""
    limit = (before - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)

    def due(table: str, ended: Callable[[dict[str, Any]], int | None]) -> list[Any]:
        statuses = TERMINAL_PRUNE.get(table)
        return [row.get("id", row.get("execution_id")) for row in rows[table]
                if (statuses is None or row["status"] in statuses) and (ended(row) or limit) < limit]  # fmt: skip

    ended = {
        row["execution_id"]
        for row in rows["flowstore_runs"]
        if row["status"] in TERMINAL_PRUNE["flowstore_runs"]
    }
    gone = {
        "errors": due("execution_errors", lambda row: row["error_time"]),
        "subscriptions": due("event_subscriptions", lambda row: row["terminated_at"]),
        "events": due("events", lambda row: row["event_time"] if row["is_processed"] else None),
        "tokens": due(
            "flowstore_tokens",
            lambda row: min(row["revoked_at"] or limit, row["expires_at"] or limit),
        ),
        "workflows": due("workflows", lambda row: row["complete_time"] or row["create_time"]),
        "flows": due("flows", lambda row: row["updated_at"]),
        "items": due(
            "flowstore_work_items",
            lambda row: None if row["execution_id"] in ended else row["settled_at"],
        ),
        "executions": due("flowstore_runs", lambda row: row["updated_at"]),
    }
    if artifacts:
        gone["artifacts"] = [
            row["hash"] for row in rows["flowstore_artifacts"] if row["put_at"] < limit
        ]
    of_table = {"execution_errors": "errors", "event_subscriptions": "subscriptions", "flowstore_tokens": "tokens",
                "events": "events", "workflows": "workflows", "flows": "flows",
                "flowstore_work_items": "items"}  # fmt: skip
    owners = {"execution_id": "executions", "flow_id": "flows", "workflow_id": "workflows"}
    left = {
        table: [row for row in of if row.get("id") not in gone.get(of_table.get(table, ""), [])
                and row.get("hash") not in gone.get("artifacts", [])
                and not any(row.get(owner) in gone[kind] for owner, kind in owners.items() if table != "flowstore_definitions")]
        for table, of in rows.items()
    }  # fmt: skip
    return left, {kind: len(ids) for kind, ids in gone.items()}


def populate(store: Store, clock: Clock, seed: int, count: int = 12) -> None:
    """Things of all kinds and statuses, ended at random times of the days before the clock's, with rows of their own."""
    chance, now = random.Random(seed), clock.now
    store.state.create_tenant(Tenant(id="acme"))
    for number in range(count):
        clock.now = now - timedelta(days=chance.randrange(12))
        tenant, own = chance.choice(["default", "acme"]), chance.choice([0, 1, 3, 40])
        run = f"e{number}"
        create(store, run, status=chance.choice([*ExecutionStatus]), tenant_id=tenant)
        store.events.append(f"log{number}", tenant, EVENT)
        if own:
            store.events.append_batch(run, tenant, [event(f"{n}") for n in range(own)])
            store.state.write_snapshot(Snapshot(execution_id=run, at_sequence=own, state=own))
            store.state.record_effect(f"effect {number}", own, execution_id=run)
            store.state.record_effect(f"free {number}", own)
        for index in range(own // 2):
            enqueue(store, id=f"i{number}-{index}", execution_id=run)
        if own == 40:
            store.state.move_to_dead_letter(f"i{number}-0", "poison")
        for index in range(1, min(own // 2, 5)):
            if chance.random() < 0.5:
                store.state.complete_work_item(f"i{number}-{index}")
            else:
                store.state.fail_work_item(f"i{number}-{index}", "e")
        store.state.put_artifact(f"{number}".encode())
        flow = flow_with(store, chance.choice([*FlowStatus]))
        place = created(
            store.workflows,
            status=chance.choice([*WorkflowStatus]),
            execution_pointers=pointers(*map(str, range(own))),
            complete_time=chance.choice([None, clock.now, now]),
        )
        for index in range(own):
            store.flows.append_event(flow.id, "k", {})
            store.flows.insert_step(FlowStep(flow_id=flow.id, run_id=str(index)))
        happened = store.workflows.create_event(record("Event"))
        waiting = subscription(workflow_id=place.id)
        store.workflows.create_event_subscription(waiting)
        error = record("ExecutionError", workflow_id=chance.choice([place.id, "gone"]))
        store.workflows.persist_errors([error] * (own + 1))
        expires = chance.choice([None, clock.now + timedelta(hours=1), now + timedelta(days=1)])
        _, token = store.state.create_token("n", "r", expires_at=expires)
        clock.advance(chance.randrange(40_000))
        if chance.random() < 0.5:
            store.workflows.mark_event_processed(happened)
            store.workflows.terminate_subscription(waiting.id)
            store.state.revoke_token(token.id)
    clock.now = now


@parametrize("seed", range(4))
@parametrize("at_once", [3, 250])
def test_prune_drops_what_a_model_says_and_counts_it_first(
    store: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch, seed: int, at_once: int
) -> None:
    monkeypatch.setattr(flowstore, "_PRUNED_AT_ONCE", at_once)
    populate(store, clock, seed)
    for days in (20, 8, 4, 0):
        before = rows_to_prune(store)
        artifacts = days in (8, 0)
        left, counts = pruned_by_hand(before, clock.now - timedelta(days=days), artifacts)
        assert store.prune(timedelta(days=days), dry_run=True, artifacts=artifacts) == counts
        assert rows_to_prune(store) == before
        older_than = clock.now - timedelta(days=days) if days == 4 else timedelta(days=days)
        assert store.prune(older_than, artifacts=artifacts) == counts
        assert rows_to_prune(store) == left
        assert store.check() == []
    assert not any(store.prune(clock.now).values())
    store.prune(clock.advance(1))
    assert {run.status.is_terminal for run in store.state.list_executions()} == {False}


def test_prune_spares_what_ended_at_the_very_time_and_a_negative_span_counts_as_none(
    store: Store, clock: Clock
) -> None:
    flow = flow_with(store, "failed")
    for span in (timedelta(0), timedelta(-5), timedelta.max):
        assert store.prune(span)["flows"] == 0
    assert store.flows.get(flow.id) is not None
    assert store.prune(store.now() + timedelta(seconds=1))["flows"] == 1


def test_a_prune_of_large_rows_takes_few_of_them_in_one_transaction(
    store: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flowstore, "_SWEEP_SECONDS", -1.0)  # as if each look took too long
    create(store, status="completed")
    store.events.append_batch("e1", "default", [EVENT] * 240)
    for number in range(40):
        store.flows.insert(Flow(id=str(number), status=FlowStatus.FINISHED))
    clock.advance(86400)
    before = store._engine.commits
    dropped = store.prune(seconds(1))
    assert (dropped["executions"], dropped["flows"]) == (1, 40)
    if store._engine.max_writers == 1:
        assert store._engine.commits - before >= 240 // 25 + 40
    assert store.check() == [] and not store.events.execution_exists("e1")


def test_a_dry_run_of_a_prune_is_all_that_a_read_only_store_can_do(path: Path) -> None:
    with flowstore.open(path) as store:
        flow_with(store, "failed")
    with flowstore.open(path, read_only=True) as store:
        for _ in range(2):
            assert store.prune(timedelta(0), dry_run=True)["flows"] == 1
            with pytest.raises(StorageError):
                store.prune(timedelta(0))


def test_prune_inside_a_transaction_is_undone_with_it(store: Store, clock: Clock) -> None:
    populate(store, clock, 1)
    before = rows_to_prune(store)
    with pytest.raises(ZeroDivisionError), store.transaction():
        assert sum(store.prune(timedelta(0)).values()) > 10
        assert rows_to_prune(store) != before
        raise ZeroDivisionError
    assert rows_to_prune(store) == before


def ended_log(store: Store, execution_id: str, events: int, tenant: str = "default") -> None:
    """A completed execution with so many events."""
    store.events.append_batch(execution_id, tenant, [EVENT] * events)
    create(
        store,
        execution_id,
        status="completed",
        updated_at=START - timedelta(days=1),
        tenant_id=tenant,
    )


def test_a_pruned_id_is_unknown_and_its_positions_are_never_given_again(
    store: Store, clock: Clock
) -> None:
    seen = 0
    for turn in range(4):
        ended_log(store, "e", 3)
        last = store.events.read_all(seen)[-1].position
        if turn == 2:
            write(store, "other")
            last = store.events.read_all(seen)[-1].position
        assert store.prune(clock.now)["executions"] == 1
        assert store.check() == [] and store.events.load_events("e") == []
        assert not store.events.execution_exists("e") and store.state.get_execution("e") is None
        assert [one.position > last for one in store.events.read_all(last)] == []
        ended_log(store, "e", 1, "acme")  # another tenant may have it now
        assert [one.sequence for one in store.events.read_all(last)] == [1]
        seen = store.events.read_all(last)[-1].position
        assert store.prune(clock.now)["executions"] == 1
        assert (
            store.stats()["tables"]["flowstore_log"] <= 2
        )  # `other`, and one row that stands for the end


def test_a_prune_takes_the_data_of_every_tenant_and_leaves_each_its_own(
    store: Store, clock: Clock
) -> None:
    for tenant in ("acme", "other"):
        ended_log(store, f"ended of {tenant}", 2, tenant)
        store.state.for_tenant(tenant).create_execution(
            WorkflowExecution(execution_id=f"open of {tenant}", workflow_id="w")
        )
    assert store.prune(clock.now)["executions"] == 2
    for tenant in ("acme", "other"):
        view = store.state.for_tenant(tenant)
        assert [run.execution_id for run in view.list_executions()] == [f"open of {tenant}"]
        assert view.get_events(f"ended of {tenant}") == []


def test_a_prune_of_a_time_to_come_leaves_valid_tokens(store: Store, clock: Clock) -> None:
    for days in (-1, 1):
        plain, _ = store.state.create_token("n", "r", expires_at=clock.now + timedelta(days=days))
    later = clock.now + timedelta(days=2)
    assert store.prune(later, dry_run=True)["tokens"] == store.prune(later)["tokens"] == 1
    assert store.state.validate_token(plain) is not None


def test_an_execution_that_goes_in_pieces_is_nobodys_meanwhile(
    store: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flowstore, "_PRUNED_AT_ONCE", 10)
    ended_log(store, "giant", 55)
    steps: Any = inspect.unwrap(Store.prune)(store, clock.now)
    dropped: Any = None
    lengths = []
    with pytest.raises(StopIteration) as end:
        while True:
            dropped = steps.send(dropped)
            if 0 < store.events.count_events("giant") < 55:
                lengths.append(len(store.events.load_events("giant")))
                assert store.check() == []
                with pytest.raises(TenantMismatch):
                    write(store, "giant")
                with pytest.raises(NotFound):
                    store.state.update_execution_status("giant", "running")
                with pytest.raises(AlreadyExists):
                    create(store, "giant")
                with pytest.raises(NotFound):
                    store.state.for_tenant("default").append_event("giant", EVENT)
                with pytest.raises(
                    NotFound
                ):  # the administrator's too, for it would go with the rest
                    store.state.append_event("giant", EVENT)
    assert end.value.value["executions"] == 1 and len(lengths) > 3
    assert not store.events.execution_exists("giant")
    assert write(store, "giant") == 1
    assert store.check() == []


def test_who_knew_a_flow_or_workflow_that_goes_in_pieces_does_not_go_on_with_it(
    store: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flowstore, "_PRUNED_AT_ONCE", 10)
    flow = flow_with(store, "finished")
    for _ in range(30):
        store.flows.append_event(flow.id, "k", {})
    many = pointers(*map(str, range(30)))
    place = created(store.workflows, status=WorkflowStatus.COMPLETE, execution_pointers=many)
    later = clock.advance(10)
    steps: Any = inspect.unwrap(Store.prune)(store, later)
    dropped: Any = None
    while (dropped := steps.send(dropped)) is not None and len(
        store.flows.list_events(flow.id)
    ) == 30:
        if len(store.workflows.get_workflow_instances([place.id])) and dropped.rows:
            store.workflows.persist_workflow(place)  # whoever writes it has it whole
            assert len(store.workflows.get_workflow_instance(place.id).execution_pointers) == 30
            place.status, place.complete_time = WorkflowStatus.RUNNABLE, None
            store.workflows.persist_workflow(place)
    with pytest.raises(RevisionMismatch):
        store.flows.update_with_revision(flow)
    assert place.status is WorkflowStatus.RUNNABLE
    assert len(store.workflows.get_workflow_instance(place.id).execution_pointers) == 30


@sqlite_only
def test_prune_takes_everything_apart_into_small_transactions(
    watched: type[Watched], store: Store
) -> None:
    ended_log(store, "giant", 3000)
    flow = flow_with(store, "finished", updated_at=START - timedelta(1))
    with store.transaction() as tx:
        tx.executemany(
            "INSERT INTO flow_events (flow_id, kind, payload, at) VALUES (?, 'k', '{}', 0)",
            [(flow.id,)] * 3000,
        )
        for number in range(300):
            ended_log(store, f"small{number}", 2)
    created(
        store.workflows,
        status="Terminated",
        execution_pointers=pointers(*map(str, range(2000))),
        create_time=START - timedelta(days=1),
    )
    del watched.commits[:-1]
    counts = store.prune(START)
    assert (counts["executions"], counts["flows"], counts["workflows"]) == (301, 1, 1)
    changes = [after - before for before, after in itertools.pairwise(watched.commits)]
    assert max(changes) <= flowstore._PRUNED_AT_ONCE + 10 and len(changes) > 30
    assert store.check() == [] and store.stats()["tables"]["flowstore_log"] == 1


def test_writers_append_to_executions_while_they_are_pruned(
    store: Store,
) -> None:
    for number in range(20):
        ended_log(store, f"e{number}", 700)
    refused = []

    def append() -> None:
        for number in range(20):
            for _ in range(10):
                try:
                    write(store, f"e{number}")
                except TenantMismatch:
                    refused.append(number)

    outcomes = together([lambda: store.prune(START)["executions"], append, append])
    assert outcomes == [20, None, None]
    assert store.check() == []
    for number in range(20):  # known again by what came after, or not at all
        assert store.events.count_events(f"e{number}") <= 20
        assert store.state.get_execution(f"e{number}") is None


# --- pruning what the user's own tables refer to ---


def ended_things(store: Store, count: int = 5) -> None:
    """Of each kind that a prune drops, things that ended before START, numbered from 0."""
    old = START - timedelta(days=1)
    write(store, "endless")
    for number in range(count):
        enqueue(store, id=f"job-{number}", execution_id="endless", queue_type="jobs")
        store.state.complete_work_item(f"job-{number}")
        store.state.put_artifact(str(number).encode())
        store.workflows.create_event(
            record("Event", id=f"event-{number}", event_time=old, is_processed=True)
        )
        waiting = subscription(id=f"subscription-{number}")
        store.workflows.create_event_subscription(waiting)
        store.workflows.terminate_subscription(waiting.id)
        _, token = store.state.create_token("n", "r")
        store.state.revoke_token(token.id)
        store.workflows.persist_errors([record("ExecutionError", message=str(number))])
        created(
            store.workflows,
            id=f"workflow-{number}",
            status="Complete",
            create_time=old,
            execution_pointers=pointers("p"),
        )
        flow = flow_with(store, "finished", id=f"flow-{number}", updated_at=old)
        store.flows.insert_step(FlowStep(id=f"step-{number}", flow_id=flow.id, run_id="r"))
        store.flows.append_event(flow.id, str(number), {})
        run = f"run-{number}"
        ended_log(store, run, 3)
        store.state.write_snapshot(
            Snapshot(id=f"snapshot-{number}", execution_id=run, at_sequence=2, state={})
        )
        store.state.record_effect(f"effect-{number}", {}, execution_id=run)
        enqueue(store, id=f"item-{number}", execution_id=run)


def refer(
    store: Store, parent: str, columns: str, where: str, rule: str = "", name: str = "invoices"
) -> None:
    """Make a table of the user's own, with a row that refers to the row of ours where a condition holds."""
    with store.transaction() as tx:
        [values] = tx.execute(f"SELECT {columns} FROM {parent} WHERE {where}")
        own = [
            f"key{number} {'BIGINT' if isinstance(value, int) else 'TEXT'}"
            for number, value in enumerate(values)
        ]
        names = ", ".join(column.split()[0] for column in own)
        tx.execute(
            f"CREATE TABLE {name} ({', '.join(own)}, "
            f"FOREIGN KEY ({names}) REFERENCES {parent} ({columns}) {rule})"
        )
        tx.execute(f"INSERT INTO {name} VALUES ({', '.join('?' * len(values))})", values)


def pruned_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "flowstore"]


ALL_KINDS = [
    *("errors", "subscriptions", "events", "tokens", "workflows", "flows", "items", "executions"),
    "artifacts",
]


REFERRED = [
    ("errors", "execution_errors", "id", "message = '2'"),
    ("subscriptions", "event_subscriptions", "id", "id = 'subscription-2'"),
    ("events", "events", "id", "id = 'event-2'"),
    ("tokens", "flowstore_tokens", "id", "id = (SELECT MAX(id) FROM flowstore_tokens)"),
    ("tokens", "flowstore_tokens", "hash", "id = (SELECT MIN(id) FROM flowstore_tokens)"),
    ("workflows", "workflows", "id", "id = 'workflow-2'"),
    ("workflows", "workflows", "name", "id = 'workflow-0'"),
    ("workflows", "execution_pointers", "workflow_id, id", "workflow_id = 'workflow-2'"),
    ("flows", "flows", "id", "id = 'flow-2'"),
    ("flows", "flow_steps", "id", "id = 'step-4'"),
    ("flows", "flow_steps", "flow_id, run_id", "id = 'step-0'"),
    ("flows", "flow_events", "id", "kind = '2'"),
    ("items", "flowstore_work_items", "id", "id = 'job-2'"),
    ("artifacts", "flowstore_artifacts", "tenant_id, hash", "hash LIKE 'd4735e%'"),
    ("executions", "flowstore_executions", "execution_id", "execution_id = 'run-2'"),
    ("executions", "flowstore_runs", "execution_id", "execution_id = 'run-0'"),
    ("executions", "flowstore_work_items", "id", "id = 'item-2'"),
    ("executions", "flowstore_snapshots", "id", "id = 'snapshot-2'"),
    ("executions", "flowstore_snapshots", "execution_id, at_sequence", "id = 'snapshot-2'"),
    ("executions", "flowstore_effects", "tenant_id, key", "key = 'effect-2'"),
    ("executions", "flowstore_log", "position", "execution_id = 'run-2' AND sequence = 1"),
    ("executions", "flowstore_log", "position", "execution_id = 'run-4' AND sequence = 3"),
    ("executions", "flowstore_log", "execution_id, sequence", "execution_id = 'run-4' AND sequence = 3"),
]  # fmt: skip


@parametrize("make_store", ["memory", "postgres"], indirect=True)
@parametrize("rule", ["ON DELETE RESTRICT", "DEFERRABLE INITIALLY DEFERRED"])
@parametrize(
    ("kind", "parent", "columns", "where"), REFERRED, ids=lambda value: value.split(" = ")[0]
)
def test_a_prune_leaves_what_the_users_rows_refer_to_drops_the_rest_and_names_the_table(
    store: Store,
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    parent: str,
    columns: str,
    where: str,
    rule: str,
) -> None:
    def own_rows(rows: PruneRows) -> list[Any]:
        goes_on = kind == "items"
        return [one for one in rows[parent] if (one.get("execution_id") == "endless") == goes_on]

    ended_things(store)
    refer(store, parent, columns, where, rule)
    before = rows_to_prune(store)
    wanted = dict.fromkeys(ALL_KINDS, 5) | {kind: 4}
    later = clock.advance(1)
    assert store.prune(later, dry_run=True, artifacts=True) == wanted
    assert rows_to_prune(store) == before
    caplog.set_level("INFO", logger="flowstore")
    assert store.prune(later, artifacts=True) == wanted
    [line] = [line for line in pruned_lines(caplog) if "invoices" in line]
    assert kind in line and "kept" in line
    kept = rows_to_prune(store)
    assert store.check() == [] and len(own_rows(kept)) == len(own_rows(before)) / 5
    if kind == "executions":  # whole, or nobody could go on from it
        [run] = store.state.list_executions()
        assert len(store.events.load_events(run.execution_id)) == 3
        assert store.state.append_event(run.execution_id, EVENT) == 4
    with store.transaction() as tx:
        assert len(tx.execute("SELECT * FROM invoices")) == 1
        tx.execute("DELETE FROM invoices")
    assert store.prune(later, artifacts=True) == dict.fromkeys(ALL_KINDS, 0) | {kind: 1}


@parametrize("parent", ["flows", "flow_steps", "flowstore_runs", "flowstore_log"])
def test_a_prune_does_to_the_users_rows_what_their_foreign_key_says(
    store: Store, clock: Clock, parent: str
) -> None:
    ended_things(store)
    columns, where = {
        "flows": ("id", "id = 'flow-2'"),
        "flow_steps": ("id", "id = 'step-2'"),
        "flowstore_runs": ("execution_id", "execution_id = 'run-2'"),
        "flowstore_log": ("execution_id, sequence", "execution_id = 'run-4' AND sequence = 3"),
    }[parent]
    refer(store, parent, columns, where, "ON DELETE CASCADE", "goes")
    refer(store, parent, columns, where, "ON DELETE SET NULL", "stays")
    assert store.prune(clock.advance(1), artifacts=True) == dict.fromkeys(ALL_KINDS, 5)
    with store.transaction() as tx:
        assert tx.execute("SELECT * FROM goes") == []
        [row] = tx.execute("SELECT * FROM stays")
        assert set(row) == {None}


@parametrize("rule", ["", "DEFERRABLE INITIALLY DEFERRED"])
def test_a_prune_leaves_what_rows_refer_to_whose_own_rows_are_referred_to(
    store: Store, clock: Clock, caplog: pytest.LogCaptureFixture, rule: str
) -> None:
    ended_things(store)
    with store.transaction() as tx:
        tx.execute("""CREATE TABLE orders (id BIGINT PRIMARY KEY,
            flow_id TEXT REFERENCES flows ON DELETE CASCADE)""")
        tx.execute("INSERT INTO orders VALUES (1, 'flow-1'), (3, 'flow-3')")
        tx.execute(f"CREATE TABLE invoices (order_id BIGINT REFERENCES orders (id) {rule})")
        tx.execute("INSERT INTO invoices VALUES (3), (NULL)")
    caplog.set_level("INFO", logger="flowstore")
    assert store.prune(clock.advance(1))["flows"] == 4
    assert store.flows.get("flow-3") is not None
    assert execute(store, "SELECT id FROM orders") == [(3,)]
    assert [line for line in pruned_lines(caplog) if "invoices" in line]


def test_a_prune_keeps_what_the_users_constraints_do_not_let_go(
    store: Store, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    ended_things(store)
    with store.transaction() as tx:
        tx.execute("CREATE TABLE bills (flow_id TEXT NOT NULL REFERENCES flows ON DELETE SET NULL)")
        tx.execute("INSERT INTO bills VALUES ('flow-2')")
    caplog.set_level("INFO", logger="flowstore")
    assert store.prune(clock.advance(1), artifacts=True) == dict.fromkeys(ALL_KINDS, 5) | {
        "flows": 4
    }
    assert len(store.flows.list_steps("flow-2")) == len(store.flows.list_events("flow-2")) == 1
    assert [line for line in pruned_lines(caplog) if "kept" in line and "bills" in line]


def test_every_way_to_prune_leaves_what_the_users_rows_refer_to(
    store: Store, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    ended_things(store)
    store.state.write_snapshot(Snapshot(id="newest", execution_id="run-2", at_sequence=3, state={}))
    refer(store, "flows", "id", "id = 'flow-2'")
    refer(
        store, "workflows", "id", "id = 'workflow-2'", "DEFERRABLE INITIALLY DEFERRED", '"Or?ders"'
    )
    refer(store, "flowstore_snapshots", "id", "id = 'snapshot-2'", name="bills")
    clock.advance(1)
    caplog.set_level("INFO", logger="flowstore")
    with store.transaction():
        assert store.flows.prune_terminal_flows(0) == 4
        assert store.workflows.purge_workflows("Complete", clock.now) == 4
    assert store.state.prune_snapshots("run-2", 0) == 1
    assert store.state.prune_snapshots("run-1", 0) == 1
    assert [flow.id for flow in store.flows.list_by_status("finished")] == ["flow-2"]
    assert store.workflows.get_workflow_instance("workflow-2").execution_pointers
    assert store.state.latest_snapshot("run-2") == store.state.latest_snapshot("run-2")
    for name in ("invoices", "Or?ders", "bills"):
        assert [line for line in pruned_lines(caplog) if name in line and "kept" in line], name


def test_a_prune_passes_over_more_that_it_keeps_than_one_transaction_takes(
    store: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flowstore, "_PRUNED_AT_ONCE", 20)
    with store.transaction() as tx:
        for number in range(200):
            ended = START - timedelta(days=2, seconds=-number)
            flow_with(store, "failed", id=f"f{number:03}", updated_at=ended)
        tx.execute("CREATE TABLE invoices (flow_id TEXT REFERENCES flows)")
        tx.execute("CREATE INDEX invoices_by_flow ON invoices (flow_id)")
        tx.executemany(
            "INSERT INTO invoices VALUES (?)", [(f"f{n:03}",) for n in range(150) if n != 75]
        )
    steps: Any = inspect.unwrap(Store.prune)(store, clock.now)
    dropped: Any = None
    done = []
    with pytest.raises(StopIteration) as end:
        while True:
            dropped = steps.send(dropped)
            done.append(dropped.rows)
    assert end.value.value["flows"] == 51
    assert max(done) <= 20 and 20 < len(done) < 60
    assert store.flows.get("f075") is None and store.flows.get("f199") is None
    assert len(store.flows.list_by_status("failed")) == 149


def test_an_execution_of_many_transactions_is_kept_whole_when_a_row_refers_to_the_middle_of_it(
    store: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flowstore, "_PRUNED_AT_ONCE", 10)
    for run in ("first", "giant", "last"):
        ended_log(store, run, 55)
    refer(store, "flowstore_log", "position", "execution_id = 'giant' AND sequence = 20")
    assert store.prune(clock.now)["executions"] == 2
    assert len(store.events.load_events("giant")) == 55
    assert write(store, "giant") == 56
    assert not store.events.execution_exists("first")


def test_a_row_that_refers_to_what_is_left_in_pieces_holds_up_nothing_else(
    store: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flowstore, "_PRUNED_AT_ONCE", 10)
    for run in ("first", "giant", "last"):
        ended_log(store, run, 55)
    store._prune_some(flowstore._PRUNED["executions"], 2**52, (0,))
    sql = "SELECT execution_id FROM flowstore_executions WHERE tenant_id = ''"
    [(left,)] = execute(store, sql)
    refer(store, "flowstore_log", "position", f"execution_id = '{left}' AND sequence = 20")
    assert store.prune(clock.now)["executions"] == 2
    assert not store.events.execution_exists(left) and store.check() == []
    execute(store, "DELETE FROM invoices")
    assert store.prune(clock.now)["executions"] == 1
    assert store.events.append(left, "acme", EVENT) == 1


@parametrize("rule", ["", "DEFERRABLE INITIALLY DEFERRED"])
@parametrize(
    ("parent", "columns", "where"),
    [
        ("workflows", "id", "id = 'workflow-2'"),
        ("execution_pointers", "workflow_id, id", "workflow_id = 'workflow-2'"),
        ("event_subscriptions", "id", "workflow_id = 'workflow-2'"),
        ("execution_errors", "id", "workflow_id = 'workflow-2'"),
    ],
)
def test_to_delete_a_workflow_that_rows_refer_to_is_an_error_that_names_their_table(
    store: Store, parent: str, columns: str, where: str, rule: str
) -> None:
    ended_things(store)
    error = record("ExecutionError", workflow_id="workflow-2")
    store.workflows.persist_errors([error])
    store.workflows.create_event_subscription(subscription(workflow_id="workflow-2"))
    refer(store, parent, columns, where, rule)
    before = rows_to_prune(store)
    with pytest.raises(StorageError, match="invoices") as caught:
        store.workflows.delete_workflow("workflow-2")
    assert one_sentence(caught.value) and type(caught.value) is StorageError
    with pytest.raises(StorageError, match="invoices"), store.transaction():
        store.workflows.delete_workflow("workflow-2")
    assert rows_to_prune(store) == before
    with store.transaction() as tx:
        tx.execute("DELETE FROM invoices")
        store.workflows.delete_workflow("workflow-2")
    with pytest.raises(NotFound):
        store.workflows.delete_workflow("workflow-2")


@sqlite_only
def test_what_the_users_rows_forbid_to_one_call_fails_no_other_of_its_commit(
    tmp_path: Path, clock: Clock
) -> None:
    with flowstore.open(tmp_path / "app.db", clock=clock, busy_timeout=60) as store:
        ended_things(store)
        refer(store, "workflows", "id", "id = 'workflow-2'", "DEFERRABLE INITIALLY DEFERRED")
        clock.advance(1)
        append = partial(store.events.append, "e1", "default", EVENT)
        delete = partial(store.workflows.delete_workflow, "workflow-2")
        outcomes = meet(store, [append, delete, append, partial(store.prune, clock.now), append])
        assert isinstance(outcomes[1], StorageError) and outcomes[3]["workflows"] == 4
        assert sorted([outcomes[0], outcomes[2], outcomes[4]]) == [1, 2, 3]


@sqlite_only
def test_a_prune_asks_nothing_of_the_users_tables_where_none_refers_to_ours(
    watched: type[Watched], store: Store
) -> None:
    ended_things(store)
    with store.transaction() as tx:
        tx.execute("CREATE TABLE orders (id INTEGER PRIMARY KEY)")
        tx.execute("CREATE TABLE invoices (order_id INTEGER REFERENCES orders)")
    watched.statements.clear()
    assert sum(store.prune(START).values()) > 10
    assert not [sql for sql in watched.statements if re.search("invoices|SAVEPOINT", sql)]


LOGGED = """
assert "logging" not in sys.modules
with flowstore.open(sys.argv[1]) as store:
    store.flows.insert(flowstore.Flow(id="f", status="failed"))
    with store.transaction() as tx:
        tx.execute("CREATE TABLE invoices (flow_id TEXT REFERENCES flows)")
        tx.execute("INSERT INTO invoices VALUES ('f')")
    from datetime import timedelta
    import time
    time.sleep(0.01)
    assert store.prune(timedelta(0))["flows"] == 0
    assert "logging" not in sys.modules, "for a line of INFO"
    flowstore._log(flowstore._WARNING, "the %s is %d", "answer", 42)
    import logging
    assert [type(one) for one in logging.getLogger("flowstore").handlers] == [logging.NullHandler]
    flowstore._log(flowstore._WARNING, "nobody reads this")
    class Raises(logging.Handler):
        def emit(self, record):
            print(record.levelname, record.getMessage())
            raise ValueError
    logging.getLogger("flowstore").addHandler(Raises())
    logging.getLogger("flowstore").setLevel("INFO")
    assert store.prune(timedelta(0))["flows"] == 0
    flowstore._log(flowstore._WARNING, "the %s is %d", "answer", 42)
"""


def test_logging_is_imported_for_the_first_warning_and_info_is_told_to_who_has_it(
    path: Path,
) -> None:
    process = script(LOGGED, path)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert out.splitlines() == [
        "INFO prune: 0 flows went, kept {'invoices': 1}",
        "WARNING the answer is 42",
        f"INFO {path}: closed",
    ]


# --- keep=, the prune that goes with the writes ---


def beat(store: Store, clock: Clock, times: int = 1, seconds: float = 1.0) -> None:
    """So many writes, a second apart, which bring nothing that a prune would drop."""
    for _ in range(times):
        clock.advance(seconds)
        write(store, "heartbeat")


def without_heartbeat(rows: PruneRows) -> PruneRows:
    return {
        table: [one for one in of if one.get("execution_id") != "heartbeat"]
        for table, of in rows.items()
    }


@parametrize("seed", range(3))
def test_with_keep_what_a_prune_would_drop_goes_by_itself(
    make_store: MakeStore, clock: Clock, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(flowstore, "_PRUNED_AT_ONCE", 20)
    store = make_store(clock=clock, keep=timedelta(days=5))
    populate(store, clock, seed)
    beat(store, clock, 40)
    left = without_heartbeat(rows_to_prune(store))
    assert without_heartbeat(pruned_by_hand(left, clock.now - timedelta(days=5))[0]) == left
    ended = pruned_by_hand(left, clock.now)[1]
    assert sum(ended.values()) > 0, "something has ended that is not old enough"
    assert store.check() == [] and len(left["flowstore_artifacts"]) == 12
    clock.advance(86400 * 6)
    beat(store, clock, 60)
    assert not any(store.prune(timedelta(days=5), dry_run=True).values())


def test_keep_drops_a_few_rows_at_a_time_and_at_most_once_a_second(
    make_store: MakeStore, clock: Clock
) -> None:
    store = make_store(clock=clock, keep=timedelta(0))
    with store.transaction():
        for _ in range(4000):
            flow_with(store, "failed")
    left = [4000]
    while left[-1]:
        clock.advance(1)
        for _ in range(3):
            write(store, "heartbeat")
            left.append(store.stats()["tables"]["flows"])
            clock.advance(0.1)
    assert max(before - after for before, after in itertools.pairwise(left)) <= 2000
    assert left[1::3][:3] == left[2::3][:3] == left[3::3][:3]


@parametrize("keep", [timedelta(0), timedelta(seconds=-5), timedelta(days=-999999999)])
def test_a_keep_below_zero_counts_as_zero_and_reads_drop_nothing(
    make_store: MakeStore, clock: Clock, keep: timedelta
) -> None:
    store = make_store(clock=clock, keep=keep)
    flow = flow_with(store, "failed")
    clock.advance(2)
    assert store.flows.get(flow.id) is not None and store.flows.list_by_owner("") == [flow]
    with store.transaction(read_only=True):
        assert store.flows.get(flow.id) == flow
    beat(store, clock, 20)
    assert store.flows.get(flow.id) is None


@parametrize("keep", [5, 1.5, True, "30d", datetime(2030, 1, 1, tzinfo=UTC)])
def test_keep_is_a_timedelta(path: Path, keep: Any) -> None:
    with pytest.raises(InvalidData, match="keep"):
        flowstore.open(path, keep=keep)
    assert not path.exists()


@parametrize("error", [None, ZeroDivisionError])
def test_keep_goes_before_a_block_and_stays_so_when_that_rolls_back(
    make_store: MakeStore, clock: Clock, error: type[Exception] | None
) -> None:
    store = make_store(clock=clock, keep=timedelta(0))
    flow_with(store, "failed", id="old")
    for _ in range(20):
        clock.advance(2)
        with suppress(ZeroDivisionError), store.transaction():
            flow_with(store)
            if error is not None:
                raise error
    assert store.flows.get("old") is None
    assert store.stats()["tables"]["flows"] == (0 if error else 20)


@parametrize("harm", ["ABORT", "ROLLBACK"])
def test_a_sweep_that_fails_harms_no_call(path: Path, clock: Clock, harm: str) -> None:
    with flowstore.open(path, clock=clock, keep=timedelta(0)) as store:
        for number in range(2):
            flow_with(store, "failed", id=str(number))
        event = record("Event", event_time=START - timedelta(days=1))
        store.workflows.mark_event_processed(store.workflows.create_event(event))
        execute(
            store,
            f"""CREATE TRIGGER harm BEFORE DELETE ON flows WHEN old.id = '1'
                BEGIN SELECT RAISE({harm}, 'no'); END""",
        )
        for turn in range(1, 4):
            clock.advance(2)
            assert write(store, "run") == turn
        assert store.flows.get("1") is not None
        if harm == "ABORT":
            assert store.stats()["tables"]["events"] == 0, "what is of another kind has gone"
        execute(store, "DROP TRIGGER harm")
        beat(store, clock, 2)
        assert store.stats()["tables"]["flows"] == 0


def test_keep_passes_what_the_users_rows_refer_to(make_store: MakeStore, clock: Clock) -> None:
    store = make_store(clock=clock, keep=timedelta(0))
    ended_things(store)
    refer(store, "flows", "id", "id = 'flow-0'")
    clock.advance(86400 * 2)
    beat(store, clock, 20)
    assert execute(store, "SELECT id FROM flows") == [("flow-0",)]
    assert store.stats()["tables"]["workflows"] == 0


def test_a_job_queue_on_one_endless_execution_stays_as_small_as_its_backlog(
    path: Path, clock: Clock
) -> None:
    with flowstore.open(path, clock=clock, synchronous="OFF", keep=timedelta(hours=1)) as store:
        write(store, "jobs")
        sizes = []
        for hour in range(12):
            for _ in range(200):
                clock.advance(18)
                enqueue(store, execution_id="jobs", payload={"text": "x" * 500})
                store.state.complete_work_item(claim(store))
            if hour > 1:
                sizes.append(store.stats()["file_bytes"] + store.stats()["wal_bytes"])
        assert store.stats()["tables"]["flowstore_work_items"] <= 210
        assert sizes[-1] <= sizes[0] * 1.1


def test_a_sweep_whose_commit_fails_is_not_the_failure_of_the_call(
    path: Path, clock: Clock
) -> None:
    with flowstore.open(path, clock=clock, keep=timedelta(0)) as store:
        flow_with(store, "failed", id="f")
        with store.transaction() as tx:
            tx.execute(
                """CREATE TABLE invoices (flow TEXT DEFAULT 'none' REFERENCES flows (id)
                ON DELETE SET DEFAULT DEFERRABLE INITIALLY DEFERRED)"""
            )
            tx.execute("INSERT INTO invoices VALUES ('f')")
        beat(store, clock, 3)
        assert store.events.count_events("heartbeat") == 3 and store.flows.get("f") is not None


def fail(store: Store) -> None:
    store.flows.update_with_revision(Flow(id="unknown"))


def fail_in_block(store: Store) -> None:
    with store.transaction():
        fail(store)


@parametrize("call", [fail, fail_in_block])
def test_what_a_sweep_has_dropped_is_told_though_the_call_fails(
    make_store: MakeStore,
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
    call: Callable[[Store], None],
) -> None:
    caplog.set_level(logging.INFO, "flowstore")
    store = make_store(clock=clock, keep=timedelta(0))
    flow_with(store, "failed")
    for _ in range(20):  # a sweep looks through some of the kinds
        clock.advance(1)
        with pytest.raises(NotFound):
            call(store)
    assert store.stats()["tables"]["flows"] == 0
    assert [line for line in pruned_lines(caplog) if "went" in line] == [
        "prune: 1 flows went, kept {}"
    ]


def test_a_sweep_that_took_long_takes_less_the_next_time(
    make_store: MakeStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flowstore, "_SWEEP_SECONDS", 0.0)  # so every one takes too long
    store = make_store(clock=clock, keep=timedelta(0))
    with store.transaction():
        for _ in range(100):
            flow_with(store, "failed")
    left = []
    for _ in range(200):
        beat(store, clock)
        left.append(store.stats()["tables"]["flows"])
    dropped = [before - after for before, after in itertools.pairwise([100, *left])]
    assert max(dropped) == 1 and left[-1] == 0


def test_a_clock_that_raises_stops_no_call_that_needs_none(make_store: MakeStore) -> None:
    times = [START]
    store = make_store(clock=lambda: times[0], keep=timedelta(0))
    event = store.workflows.create_event(record("Event"))
    times.clear()
    store.workflows.mark_event_processed(event)
    assert store.workflows.get_event(event).is_processed


def test_a_block_of_a_run_is_entered_once_and_a_completed_run_grows_outside_blocks(
    store: Store,
) -> None:
    block = store.run("r")
    with block as run:
        run.step("one", lambda: 1)
    with pytest.raises(StorageError, match="entered once"), block:
        pass
    with store.run("r") as run:
        with pytest.raises(StorageError, match="completed run"), store.transaction():
            run.step("two", lambda: 2)
        assert run.step("two", lambda: 2) == 2


def test_a_step_found_in_the_log_is_that_step_again_after_a_rollback(store: Store) -> None:
    calls = []
    with pytest.raises(Stop), store.run("r") as run:
        run.step("charge", lambda: calls.append(1))
        raise Stop
    with store.run("r") as run:
        for _ in range(3):
            with contextlib.suppress(Stop), store.transaction():
                run.step("charge", lambda: calls.append(1))
                raise Stop
    assert calls == [1]


def test_a_worker_takes_a_suspension_that_its_function_has_caught_or_grouped_for_one(
    store: Store,
) -> None:
    def grouped(run: Any, input: Any) -> Any:
        try:
            run.wait_for("e")
        except BaseException as suspension:
            raise BaseExceptionGroup("as a TaskGroup does", [suspension]) from None

    def caught(run: Any, input: Any) -> Any:
        try:
            return run.wait_for("e")
        except BaseException:
            return "cleaned up"

    ids = [store.runs.start(function) for function in (grouped, caught)]
    assert store.runs.work(grouped, caught, until_idle=True) == 0
    store.runs.emit("e", data="data")
    assert store.runs.work(grouped, caught, until_idle=True) == 2
    assert [store.runs.result(id) for id in ids] == [None, "data"]


def test_async_work_that_is_stopped_at_any_moment_leaves_no_claim_behind(path: Path) -> None:
    async def main() -> None:
        async def short(run: Any, input: Any) -> Any:
            return await run.step("one", lambda: 1)

        async with flowstore.open_async(path, synchronous="OFF") as store:
            for n in range(200):
                await store.runs.start(short, n)
            ended = 0
            for k in range(20):
                stop = asyncio.Event()
                asyncio.get_running_loop().call_later(0.002 + 0.001 * k, stop.set)
                ended += await store.runs.work(short, stop=stop, concurrency=3)
                assert await store.state.list_work_items(status="claimed") == []
            for k in range(20):
                task = asyncio.create_task(store.runs.work(short, concurrency=3))
                await asyncio.sleep(0.002 + 0.001 * k)
                task.cancel()
                await asyncio.wait([task])
                assert await store.state.list_work_items(status="claimed") == []
            await store.runs.work(short, until_idle=True)
            items = await store.state.list_work_items(limit=300)
            assert {(item.status, item.attempt) for item in items} == {("completed", 0)}
            assert len(items) == 200 and ended <= 200

    asyncio.run(main())


def test_a_task_cancelled_while_it_enters_a_run_leaves_no_claim_behind(path: Path) -> None:
    async def main() -> None:
        async with flowstore.open_async(path, synchronous="OFF") as store:

            async def enter(id: str) -> None:
                async with store.run(id):
                    pass

            for n in range(60):
                task = asyncio.create_task(enter(f"r{n}"))
                for _ in range(n % 12):
                    await asyncio.sleep(0.0003)
                task.cancel()
                await asyncio.wait([task])
                assert await store.state.list_work_items(status="claimed") == []

    asyncio.run(main())


def test_a_run_with_another_input_is_refused_with_what_to_do(store: Store) -> None:
    with store.run("r", input=1):
        pass
    for again in (
        lambda: store.run("r", input=2).__enter__(),
        lambda: store.runs.start("script", 2, id="r"),
        lambda: store.runs.start("script", True, id="r"),
        lambda: store.runs.start("script", 1.0, id="r"),
    ):
        with pytest.raises(AlreadyExists) as caught:
            again()
        assert caught.value.args == ("execution", "r")
        assert "another input" in caught.value.__notes__[0]


def test_a_second_store_on_the_file_is_refused_in_a_block_that_it_would_wait_for(
    path: Path,
) -> None:
    with flowstore.open(path) as store, flowstore.open(path) as second:
        with store.transaction():
            with pytest.raises(StorageError, match="use one store for both") as caught:
                write(second, "run")
            assert not isinstance(caught.value, StoreBusy)
            with pytest.raises(StorageError, match="use one store for both"), second.transaction():
                pass
            assert second.events.load_events("run") == []
        assert write(second, "run") == 1


@parametrize("options", [{}, {"read_only": True}], ids=["plain", "read-only"])
def test_a_second_store_waits_for_others_in_a_block_for_which_no_writer_waits(
    path: Path, options: dict[str, bool]
) -> None:
    with (
        flowstore.open(path) as store,
        flowstore.open(path, read_only=True) as reader,
        closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other,
        reader.transaction(**options),
    ):
        other.execute("BEGIN IMMEDIATE")
        timer = threading.Timer(0.1, other.rollback)
        timer.start()
        assert write(store, "run") == 1
        timer.join()


@sqlite_only
def test_a_signal_handlers_call_while_a_block_ends_is_no_part_of_anothers_block(
    make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store()
    refused: list[Any] = []
    unregister = flowstore._Block._unregister

    def interrupted(block: Any) -> None:
        """What a signal handler does between the end of the lead and that of the block."""
        monkeypatch.undo()
        refused.append(Caller(partial(store.flows.insert, Flow(id="other"))).outcome())
        with pytest.raises(StorageError):
            store.flows.insert(Flow(id="handler"))
        unregister(block)

    monkeypatch.setattr(flowstore._Block, "_unregister", interrupted)
    with store.transaction():
        store.flows.insert(Flow(id="block"))
    assert [store.flows.get(id) is None for id in ("block", "other", "handler")] == [
        False,
        False,
        True,
    ]


def test_an_async_store_keeps_too(path: Path, clock: Clock) -> None:
    async def main() -> Flow | None:
        async with flowstore.open_async(path, clock=clock, keep=timedelta(0)) as store:
            flow = await store.flows.insert(Flow(status=FlowStatus.FAILED))
            clock.advance(2)
            await write(store, "run")
            return await store.flows.get(flow.id)

    assert asyncio.run(main()) is None


# --- to run for years ---
SOAK_DAYS = int(os.environ.get("FLOWSTORE_SOAK_DAYS", "4"))


def soak_run(run: flowstore.Run, input: Any) -> Any:
    """A run of two steps and a sleep, of which some fail."""
    doubled = run.step("double", lambda: 2 * input)
    run.sleep(60)
    return run.step("check", lambda: 1 // (doubled % 10))


def hours_of_work(store: Store, clock: Clock, number_of_first: int) -> None:
    """What a host, workers, a controller and a reader do in some hours, side by side."""

    def controller() -> None:
        for number in range(20):
            clock.advance(30)
            flow = store.flows.insert(Flow(goal="g", state={"text": "x" * 200}))
            flow.transition_to(FlowStatus.RUNNING)
            flow = store.flows.update_with_revision(flow)
            store.flows.insert_step(FlowStep(flow_id=flow.id, run_id=str(number)))
            flow.transition_to(FlowStatus.FINISHED)
            store.flows.update_and_append(flow, "ended", {"number": number})

    def workers() -> None:
        for number in range(40):
            enqueue(store, execution_id="jobs", payload={"text": "x" * 200})
            clock.advance(30)
            while item := store.state.claim_work_item("w", ["q"]):
                if number % 5:
                    store.state.complete_work_item(item)
                else:
                    store.state.retry_work_item(item, "failed")
        for number in range(10):
            store.runs.start(soak_run, number_of_first + number)
        store.runs.work(soak_run, until_idle=True)
        clock.advance(90)
        store.runs.work(soak_run, until_idle=True)

    def host() -> None:
        for number in range(5):
            clock.advance(60)
            instance = created(store.workflows, execution_pointers=pointers(*"abcde"))
            store.workflows.schedule_command(record("ScheduledCommand", data=instance.id))
            event = record("Event", event_key=str(number))
            store.workflows.mark_event_processed(store.workflows.create_event(event))
            error = record("ExecutionError", workflow_id=instance.id, message="m" * 100)
            store.workflows.persist_errors([error])
            instance.status = WorkflowStatus.COMPLETE
            instance.complete_time = clock.now
            store.workflows.persist_workflow(instance)
        store.workflows.process_commands(clock.now + timedelta(days=400_000), lambda _: None)

    def reader() -> None:
        for _ in range(10):
            store.events.read_all(limit=100)
            store.state.list_work_items(status="pending")
            str(store)
            store.stats()

    assert outcomes([controller, workers, host, reader]) == [None] * 4


def test_after_many_days_with_keep_the_store_is_as_small_as_after_two(
    path: Path, clock: Clock
) -> None:
    sizes: list[tuple[int, int, int, float]] = []
    with flowstore.open(
        path, clock=clock, synchronous="OFF", keep=timedelta(days=1), lease_seconds=600
    ) as store:
        write(store, "jobs")
        for day in range(SOAK_DAYS):
            for hour in range(0, 24, 6):
                clock.now = max(clock.now, START + timedelta(days=day, hours=hour))
                hours_of_work(store, clock, day * 240 + hour * 10)
            stats = store.stats()
            memory = float(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6
            sizes.append((stats["file_bytes"], stats["wal_bytes"], descriptors(), memory))
        assert store.check() == []
    if SOAK_DAYS > 4:
        print(*sizes, sep="\n")
    files, logs, opened, memory_of_days = zip(*sizes, strict=True)
    assert files[-1] <= 1.1 * files[2], files
    assert max(logs) < 16 << 20
    assert max(opened) - opened[0] <= 8, "the descriptors of readers that ran side by side"
    assert memory_of_days[-1] < memory_of_days[1] + 20


# --- what the program's log tells ---


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The warnings since the last call."""
    lines = [
        one.getMessage()
        for one in caplog.records
        if one.name == "flowstore" and one.levelname == "WARNING"
    ]
    caplog.clear()
    return lines


def test_a_lease_taken_back_and_a_dead_letter_are_warned_of_once_after_the_commit(
    store: Store, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    write(store, "e")
    ids = [enqueue(store, execution_id="e", max_attempts=2) for _ in range(2)]
    for _ in ids:
        claim(store, worker="worker-7")
    assert warnings_of(caplog) == []
    clock.advance(11)
    with suppress(ZeroDivisionError), store.transaction():
        store.state.reclaim_expired_leases()
        raise ZeroDivisionError
    with store.transaction(), suppress(ZeroDivisionError), store.transaction():
        store.state.reclaim_expired_leases()
        raise ZeroDivisionError
    assert warnings_of(caplog) == [], "what was rolled back"
    with store.transaction():
        store.state.reclaim_expired_leases()
        assert warnings_of(caplog) == [], "before the commit"
    told = warnings_of(caplog)
    assert len(told) == 2 and all(id in "".join(told) for id in ids) and "worker-7" in told[0]
    clock.advance(11)
    for _ in ids:
        claim(store)
    clock.advance(11)
    store.state.claim_work_item("w", ["q"])  # takes both back, at their last attempt
    told = warnings_of(caplog)
    assert len(told) == 4 and len([line for line in told if "dead letter" in line]) == 2
    store.state.requeue_dead_letter(ids[0])
    store.state.move_to_dead_letter(ids[0], "poison")
    [line] = warnings_of(caplog)
    assert ids[0] in line and "poison" in line


def test_what_a_failed_call_would_have_warned_of_is_not_told(
    path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    async def beside_others() -> Any:
        async with flowstore.open_async(path, clock=clock, synchronous="OFF") as store:
            return await asyncio.gather(
                store.state.move_to_dead_letter("c", "poison"),
                store.state.reclaim_expired_leases(),
                write(store, "run"),
                return_exceptions=True,
            )

    with flowstore.open(path, clock=clock, synchronous="OFF", lease_seconds=10) as store:
        write(store, "e")
        for id in "abc":
            enqueue(store, id=id, execution_id="e")
            if id != "c":
                claim(store)
        execute(
            store,
            """CREATE TRIGGER harm BEFORE UPDATE ON flowstore_work_items WHEN old.id = 'b'
            BEGIN SELECT RAISE(ABORT, 'no'); END""",
        )
        clock.advance(11)
        with pytest.raises(StorageError):
            store.state.reclaim_expired_leases()  # takes "a" back, and fails with "b"
        with store.transaction(), pytest.raises(StorageError):
            store.state.reclaim_expired_leases()
    assert warnings_of(caplog) == []
    letter, failed, sequence = asyncio.run(beside_others())
    assert (letter.id, sequence) == ("c", 1) and isinstance(failed, StorageError)
    [line] = warnings_of(caplog)  # once, although the group began again
    assert "work item c is a dead letter" in line


def test_a_hold_that_lost_its_lease_is_warned_of_once(
    store: Store, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    item = claimed(store)
    with pytest.raises(LeaseLost), store.state.hold(item, lease_seconds=0.03) as hold:
        store.state.retry_work_item(item, delay=0)
        claim(store, worker="thief")
        until(lambda: hold.lost)
    [line] = [line for line in warnings_of(caplog) if "hold" in line]
    assert item.id in line


def test_a_wait_of_more_than_a_second_for_another_process_is_warned_of(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with flowstore.open(path, busy_timeout=0.1) as store:
        write(store, "e")
        with closing(sqlite3.connect(path, isolation_level=None)) as plain:
            plain.execute("BEGIN IMMEDIATE")
            with pytest.raises(StoreBusy):
                write(store, "e")
            assert warnings_of(caplog) == []
    with flowstore.open(path) as store:

        def append() -> Any:
            return write(store, "e")

        def append_in_block() -> Any:
            with store.transaction():
                return append()

        for number, call in enumerate([append, append_in_block]):
            with closing(sqlite3.connect(path, isolation_level=None)) as plain:
                plain.execute("BEGIN IMMEDIATE")
                appending = Caller(call)
                time.sleep(1.2)  # what is measured is this very time
                plain.execute("ROLLBACK")
                assert appending.result() == 2 + number
            [line] = warnings_of(caplog)
            assert str(path) in line


def test_a_log_that_a_reader_keeps_over_its_bound_is_warned_of(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with flowstore.open(path, synchronous="OFF") as store:
        write(store, "e")
        with closing(sqlite3.connect(path, isolation_level=None)) as plain:
            plain.execute("BEGIN")
            plain.execute("SELECT * FROM flowstore_log").fetchall()
            for _ in range(5):
                store.state.put_artifact(os.urandom(5 << 20))
        told = warnings_of(caplog)
        assert 1 <= len(told) <= 2 and "-wal" in told[0]


def test_opening_upgrading_pruning_and_closing_are_told_once(
    of_version_1: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="flowstore")
    with flowstore.open(of_version_1, clock=clock, keep=timedelta(0)) as store:
        flow_with(store, "failed")
        beat(store, clock, 2)
    store.close()
    lines = pruned_lines(caplog)
    assert any("went" in line for line in lines)
    for word in ("upgraded", "opened", "closed"):
        [line] = [line for line in lines if word in line]
        assert str(of_version_1) in line


def test_a_handler_of_the_programs_log_may_call_the_store(store: Store, clock: Clock) -> None:
    heard: list[Any] = []

    class Asks(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(write(store, "heard"))

    item = claimed(store)
    logger = logging.getLogger("flowstore")
    handler = Asks()
    logger.addHandler(handler)
    try:
        store.state.move_to_dead_letter(item, "poison")
        store.state.requeue_dead_letter(item.id)
        with store.transaction():
            store.state.move_to_dead_letter(item.id, "poison")
    finally:
        logger.removeHandler(handler)
    assert heard == [1, 2]


def test_compact_gives_many_pages_back_in_each_step(tmp_path: Path) -> None:
    with flowstore.open(tmp_path / "app.db", synchronous="OFF") as store:
        with store.transaction():
            for number in range(100):
                store.events.append(
                    f"e{number}", "default", {"type": "custom", "text": "x" * 50_000}
                )
                create(store, f"e{number}", status="failed", updated_at=START)
        store.prune(START + timedelta(days=1))
        before = store.stats()["file_bytes"]
        assert store._engine.writer.alone(flowstore._vacuum_step)
        assert before - store.stats()["file_bytes"] >= 1000 * 4096
        store.compact()
        assert store.stats()["file_bytes"] < before / 10 and store.check() == []


KILLED_IN_PRUNE = """
import functools, os, signal, sqlite3, sys
import flowstore
from datetime import datetime, timedelta, UTC

class Connection(sqlite3.Connection):
    left = int(sys.argv[2])
    def execute(self, sql, *parameters):
        if sql.lstrip().startswith(("DELETE", "UPDATE", "COMMIT")):
            Connection.left -= 1
            if not Connection.left:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().execute(sql, *parameters)

with flowstore.open(sys.argv[1], synchronous="OFF") as store:
    flowstore._PRUNED_AT_ONCE = 20
    store.close()
sqlite3.connect = functools.partial(sqlite3.connect, factory=Connection)
with flowstore.open(sys.argv[1], synchronous="OFF") as store:
    store.prune(datetime(2030, 1, 1, tzinfo=UTC))
"""


@needs_kill
def test_a_prune_that_is_killed_anywhere_leaves_whole_things_or_logs_from_their_beginning(
    tmp_path: Path, clock: Clock
) -> None:
    with flowstore.open(tmp_path / "app.db", clock=clock, synchronous="OFF") as store:
        populate(store, clock, 5)
        ended_log(store, "giant", 130)
        first = rows_to_prune(store)
        logs = {
            run: [one.event for one in store.events.load_events(run)]
            for run in store.events.list_executions()
        }
        left, _ = pruned_by_hand(first, START)
        highest = max(row["position"] for row in first["flowstore_log"])
    kills = 0
    for number in itertools.count(1, 7):
        path = shutil.copy(tmp_path / "app.db", tmp_path / f"{number}.db")
        child = script(KILLED_IN_PRUNE, path, number)
        _, errors = child.communicate(timeout=60)
        assert child.returncode in (0, -signal.SIGKILL), errors
        with flowstore.open(path, clock=clock, synchronous="OFF") as store:
            assert store.check() == []
            for run, events in logs.items():
                found = [one.event for one in store.events.load_events(run)]
                assert found == events[: len(found)]
                assert found == events or store.state.get_execution(run) is None
            survived = rows_to_prune(store)
            for table, of in left.items():
                assert [row for row in of if row not in survived[table]] == []
            store.prune(START)
            assert rows_to_prune(store) == left
            write(store, "new")
            assert store.events.read_all(highest)[0].execution_id == "new"
        kills += child.returncode != 0
        if child.returncode == 0:
            break
    assert kills > 10


# ==================================================================================================
# Event loop
# ==================================================================================================


def test_a_call_from_another_task_of_the_same_thread_raises_at_once(target: str) -> None:
    async def main(store_engine: Store) -> None:
        opened, leave = asyncio.Event(), asyncio.Event()

        async def hold() -> None:
            with store_engine.transaction():
                write(store_engine, "run", "held")
                opened.set()
                await leave.wait()

        async def other() -> None:
            await opened.wait()
            calls: list[Call] = [
                partial(write, store_engine, "run", "other"),
                partial(write_pair_in_block, store_engine, "run", "other"),
                partial(store_engine.state.claim_work_item, "w", ["q"], wait=WATCHDOG),
            ]
            if target == ":memory:":
                calls.append(partial(keys, store_engine, "run"))
            else:
                assert keys(store_engine, "run") == []
            for call in calls:
                with pytest.raises(StorageError, match="wait for itself") as error:
                    call()
                assert not isinstance(error.value, StoreBusy), "it waited"
            leave.set()

        await asyncio.gather(hold(), other())
        assert keys(store_engine, "run") == ["held"]
        assert write(store_engine, "run", "later") == 2

    with flowstore.open(target, busy_timeout=10 * WATCHDOG) as store_engine:
        asyncio.run(main(store_engine))


def test_tasks_started_inside_a_transaction_join_it_until_it_ends(
    store: Store,
) -> None:
    async def child(run: str, key: str) -> None:
        await asyncio.sleep(0)
        write(store, run, key)
        await asyncio.sleep(0)
        write(store, run, key)

    async def main() -> None:
        with pytest.raises(ZeroDivisionError), store.transaction():
            await asyncio.gather(child("undone", "a"), child("undone", "b"))
            assert len(keys(store, "undone")) == 4
            raise ZeroDivisionError
        assert keys(store, "undone") == []
        with store.transaction():
            async with asyncio.TaskGroup() as group:
                group.create_task(child("run", "a"))
                group.create_task(child("run", "b"))
            await asyncio.wait_for(child("run", "c"), WATCHDOG)
        assert sorted(keys(store, "run")) == ["a", "a", "b", "b", "c", "c"]

        ended = asyncio.Event()

        async def outlive() -> Any:
            await ended.wait()
            return write(store, "late", "by itself")

        tasks: list[asyncio.Task[int]] = []
        with pytest.raises(ZeroDivisionError), store.transaction():
            tasks.append(asyncio.create_task(outlive()))
            await asyncio.sleep(0)
            raise ZeroDivisionError
        ended.set()
        assert await asyncio.gather(*tasks) == [1]

    asyncio.run(main())
    assert Caller(partial(keys, store, "late")).outcome() == ["by itself"]


in_a_file = parametrize("in_loop", ["file"], indirect=True)


async def invoke_async(store: Any, name: str, arguments: dict[str, Any]) -> Any:
    """What `invoke` does with the method of an async store."""
    facet, method = name.split(".")
    async with contextlib.AsyncExitStack() as stack:
        if facet == "tx":
            store = await stack.enter_async_context(store.transaction())
        of = getattr(store, facet, store)
        if facet == "run":
            item = await store.state.get_work_item("r")
            of = flowstore.AsyncRun(store._engine, await store.state.get_execution("r"), item)
            of._recall(await store.events.load_events("r"))
        bound = getattr(of, method)
        assert [*inspect.signature(bound).parameters] == [*public_signature(name).parameters]
        assert inspect.getdoc(bound)
        unnamed, named = passed(name, arguments)
        found = bound(*unnamed, **named)
        assert inspect.iscoroutine(found) is (name not in NOT_AWAITED)  # what create_task takes
        if inspect.isasyncgen(found):
            return [each async for each in found]
        if hasattr(found, "__aenter__"):
            entered = await stack.enter_async_context(found)
            return entered.id if method == "run" else entered
        return await found if inspect.iscoroutine(found) else found


def test_an_async_store_has_the_methods_of_the_sync_one_awaited_with_the_same_outcome(
    path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(path.parent)
    with flowstore.open(path, clock=clock, lease_seconds=10) as store:
        things = stock(store)
    clock.advance(20)

    async def main(name: str, call: int) -> Any:
        async with flowstore.open_async("async.db", clock=clock, synchronous="OFF") as store:
            return plain(await invoke_async(store, name, SURFACE[name].arguments(things, call)))

    for name, row in SURFACE.items():
        for call in range(len(row.calls)):
            shutil.copy(path, "async.db")
            shutil.copy(path, "sync.db")
            with flowstore.open("sync.db", clock=clock, synchronous="OFF") as store:
                expected = outcome(store, name, things, call)
            try:
                found = "", asyncio.run(main(name, call))
            except FlowStoreError as error:
                found = type(error).__name__, tuple(plain(error.args))
            assert found == expected, name


def test_async_and_sync_stores_share_a_file(tmp_path: Path) -> None:
    async def body() -> None:
        async with flowstore.open_async(tmp_path / "s.db") as store:
            flow = await store.flows.insert(Flow(goal="both"))
            with flowstore.open(tmp_path / "s.db") as sync:
                assert sync.flows.get(flow.id) == flow
                sync.flows.update_with_revision(flow)
            with pytest.raises(RevisionMismatch):
                await store.flows.update_with_revision(flow)
            assert (
                store.target == str(tmp_path / "s.db")
                and store.read_only is False
                and store.now().tzinfo
            )

    asyncio.run(body())


def test_an_async_store_can_be_awaited_and_closed(tmp_path: Path) -> None:
    async def body() -> None:
        store = await flowstore.open_async(tmp_path / "s.db")
        await write(store, "run", "a")
        waiter = asyncio.create_task(store.state.claim_work_item("w", ["q"], wait=60))
        await asyncio.sleep(0)
        await store.close()
        await store.close()
        with pytest.raises(StoreClosed):
            await waiter
        for call in (
            write(store, "run", "b"),
            store.events.load_events("run"),
            store.check(),
            store.compact(),
            store.stats(),
        ):
            with pytest.raises(StoreClosed):
                await call
        with pytest.raises(StoreClosed):
            async with store.transaction():
                pass

    asyncio.run(body())


def test_async_opening_fails_as_opening_does(tmp_path: Path) -> None:
    async def body() -> None:
        with pytest.raises(StorageError):
            await flowstore.open_async(tmp_path / "no" / "folder.db")
        with pytest.raises(InvalidData):
            async with flowstore.open_async(":memory:", synchronous="SOMETIMES"):
                pass

    asyncio.run(body())


def test_another_loop_is_refused(tmp_path: Path) -> None:
    async def body() -> AsyncStore:
        return await flowstore.open_async(tmp_path / "s.db")

    async def other(store: AsyncStore) -> None:
        for call in (store.flows.get("x"), store.flows.insert(Flow()), store.check()):
            with pytest.raises(StorageError, match="event loop"):
                await call
        with pytest.raises(StorageError, match="event loop"):
            async with store.transaction():
                pass

    asyncio.run(other(asyncio.run(body())))


@in_a_file
def test_concurrent_awaits_are_committed_together(in_loop: Any) -> None:
    async def body(store: AsyncStore) -> None:
        engine = cast(Any, store)._engine
        before = engine.commits
        await asyncio.gather(*(write(store, f"run{n % 5}", str(n)) for n in range(1000)))
        assert engine.commits - before <= 10
        for run in range(5):
            assert sorted(map(int, await keys_of(store, f"run{run}"))) == list(range(run, 1000, 5))

    in_loop(body)


def test_an_operation_that_fails_in_a_batch_fails_alone(in_loop: Loop) -> None:
    async def body(store: AsyncStore) -> None:
        flow = await store.flows.insert(Flow())
        calls = [store.flows.insert(Flow(id=flow.id if n % 3 == 0 else f"f{n}")) for n in range(30)]
        stale = [store.flows.update_and_append(flow, "k", {}) for _ in range(5)]
        results = await asyncio.gather(*calls, *stale, return_exceptions=True)
        assert [isinstance(result, AlreadyExists) for result in results[:30]] == [
            n % 3 == 0 for n in range(30)
        ]
        assert [type(result) for result in results[30:]].count(RevisionMismatch) == 4
        assert len(await store.flows.list_events(flow.id)) == 1

    in_loop(body)


# --- transactions ---


def test_an_async_transaction_is_all_or_nothing(in_loop: Loop) -> None:
    async def body(store: AsyncStore) -> None:
        async with store.transaction() as tx:
            await tx.execute("CREATE TABLE orders (id INTEGER, total INTEGER)")
            await tx.executemany("INSERT INTO orders VALUES (?, ?)", [(1, 10), (2, 20)])
            await write(store, "run", "kept")
        with pytest.raises(KeyError):
            async with store.transaction() as tx:
                await tx.execute("DELETE FROM orders")
                await write(store, "run", "undone")
                raise KeyError
        async with store.transaction() as tx:
            with suppress(KeyError):
                async with store.transaction():
                    await write(store, "run", "nested, undone")
                    raise KeyError
            await write(store, "run", "outer")
            assert await tx.execute("SELECT id FROM orders ORDER BY id") == [(1,), (2,)]
        assert await keys_of(store, "run") == ["kept", "outer"]
        with pytest.raises(StorageError):
            await tx.execute("SELECT 1")

    in_loop(body)


def test_an_async_transaction_refuses_what_hides_a_table_of_flowstores(in_loop: Loop) -> None:
    async def body(store: AsyncStore) -> None:
        async with store.transaction() as tx:
            for sql in ("CREATE TEMP TABLE events (id TEXT)", "CREATE TEMP VIEW flows AS SELECT 1"):
                with pytest.raises(StorageError, match="flowstore's"):
                    await tx.execute(sql)
            await tx.execute("CREATE TEMP TABLE mine (id TEXT)")
            await store.workflows.create_event(record("Event", id="e1"))
        assert await store.workflows.get_events("n", "k") == ["e1"]

    in_loop(body)


def test_tasks_started_inside_a_transaction_join_it(in_loop: Loop) -> None:
    async def body(store: AsyncStore) -> None:
        async def add(text: str) -> None:
            await write(store, "run", text)

        with pytest.raises(KeyError):
            async with store.transaction():
                await asyncio.gather(*(add(f"g{n}") for n in range(10)))
                await asyncio.wait_for(add("w"), 30)
                async with asyncio.TaskGroup() as group:
                    group.create_task(add("t"))
                assert len(await store.events.load_events("run")) == 12
                raise KeyError
        assert await keys_of(store, "run") == []
        ended = asyncio.Event()

        async def after_the_end() -> None:
            await ended.wait()
            await add("late")

        async with store.transaction():
            late = asyncio.create_task(after_the_end())
        ended.set()
        await late  # started inside, called after the end: a transaction of its own
        assert await keys_of(store, "run") == ["late"]

    in_loop(body)


@in_a_file
def test_other_tasks_wait_with_writes_and_go_on_reading(in_loop: Any) -> None:
    async def body(store: AsyncStore) -> None:
        opened, goes_on = asyncio.Event(), asyncio.Event()

        async def holder() -> None:
            async with store.transaction():
                await write(store, "run", "first")
                opened.set()
                await goes_on.wait()
                await write(store, "run", "second")

        task = asyncio.create_task(holder())
        await opened.wait()
        writer = asyncio.create_task(write(store, "run", "third"))
        assert await store.events.load_events("run") == []  # a read goes on, and sees nothing of it
        assert not writer.done()
        goes_on.set()
        await asyncio.gather(task, writer)
        assert await keys_of(store, "run") == ["first", "second", "third"]

    in_loop(body)


@sqlite_only
def test_who_waits_too_long_for_another_tasks_transaction_gets_store_busy(in_loop: Any) -> None:
    async def body(store: AsyncStore) -> None:
        async def other() -> None:
            with pytest.raises(StoreBusy):
                await write(store, "run", "never")
            with pytest.raises(StoreBusy):
                async with store.transaction():
                    pass

        async def late() -> None:
            await opened.wait()
            await other()

        opened = asyncio.Event()
        task = asyncio.create_task(late())
        async with store.transaction():
            await write(store, "run", "held")
            opened.set()
            await task
        assert await keys_of(store, "run") == ["held"]

    in_loop(body, busy_timeout=0.05)


@sqlite_only
def test_transactions_of_tasks_take_turns_with_batches(in_loop: Loop) -> None:
    async def body(store: AsyncStore) -> None:
        async def raise_counter(me: int) -> None:
            for _ in range(5):
                async with store.transaction():
                    flow = await store.flows.get("counter")
                    assert flow is not None
                    flow.state["n"] += 1
                    await asyncio.sleep(0)
                    await store.flows.update_with_revision(flow)
                await write(store, "run", f"{me}")

        await store.flows.insert(Flow(id="counter", state={"n": 0}))
        await asyncio.gather(*(raise_counter(me) for me in range(20)))
        flow = await store.flows.get("counter")
        assert flow is not None and flow.state == {"n": 100} and flow.revision == 100
        assert len(await keys_of(store, "run")) == 100

    in_loop(body)


def test_inside_ones_own_async_transaction_these_calls_are_refused(
    in_loop: Loop, tmp_path: Path
) -> None:
    async def body(store: AsyncStore) -> None:
        async with store.transaction():
            for call in (
                store.close(),
                store.backup(tmp_path / "b.db"),
                store.check(),
                store.compact(),
                store.workflows.process_commands(None, print),
            ):
                with pytest.raises(StorageError):
                    await call
            with pytest.raises(StorageError):
                store.events.tail()
            assert (
                await store.state.claim_work_item("w", ["q"], wait=60) is None
            )  # does not wait here

    in_loop(body)


def test_closing_rolls_an_open_async_transaction_back(tmp_path: Path) -> None:
    async def main() -> None:
        store = await flowstore.open_async(tmp_path / "c.db")
        outside = asyncio.Event()

        async def closer() -> None:
            await outside.wait()
            await store.close()

        task = asyncio.create_task(closer())
        with pytest.raises(StoreClosed):
            async with store.transaction():
                await write(store, "run", "lost")
                outside.set()
                await task
                with pytest.raises(StoreClosed):
                    await write(store, "run", "refused")

    asyncio.run(main())
    with flowstore.open(tmp_path / "c.db") as store:
        assert store.events.load_events("run") == []


# --- cancellation ---


@in_a_file
@parametrize("seed", range(3))
def test_cancelled_awaits_are_done_or_not_and_the_store_stays_usable(
    in_loop: Any, seed: int
) -> None:
    calls, chance = 3400, random.Random(seed)

    async def body(store: AsyncStore) -> None:
        returned: set[str] = set()
        cancelled: set[str] = set()

        async def pair(key: str) -> None:
            if chance.random() < 0.5:
                await store.events.append_batch("run", "default", [event(key), event(key)])
            else:
                async with store.transaction():
                    await write(store, "run", key)
                    await write(store, "run", key)
            returned.add(key)

        for at in range(0, calls, 200):
            tasks = {str(n): asyncio.create_task(pair(str(n))) for n in range(at, at + 200)}
            while not all(task.done() for task in tasks.values()):
                key, task = chance.choice(list(tasks.items()))
                if chance.random() < 0.5 and task.cancel():
                    cancelled.add(key)
                await asyncio.sleep(chance.choice([0, 0, 0.0005]))
            await asyncio.gather(*tasks.values(), return_exceptions=True)
        found = await keys_of(store, "run")
        assert found[::2] == found[1::2]  # both rows or none
        assert len(set(found)) * 2 == len(found)
        assert returned <= set(found) and set(found) - returned <= cancelled
        assert (
            cancelled - set(found) and len(returned) > calls / 4
        )  # some were struck, most were not
        await asyncio.wait_for(write(store, "run", "still usable"), 30)

    in_loop(body, synchronous="OFF")


@in_a_file
def test_a_cancelled_begin_gives_the_writer_back(in_loop: Any, tmp_path: Path) -> None:
    async def body(store: AsyncStore) -> None:
        async def begin() -> None:
            async with store.transaction():
                raise AssertionError("it was cancelled before it began")

        with flowstore.open(tmp_path / "async.db") as sync, sync.transaction():
            task = asyncio.create_task(begin())
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await write(store, "run", "a")
        async with store.transaction():
            await write(store, "run", "b")
        assert await keys_of(store, "run") == ["a", "b"]

    in_loop(body)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@parametrize("nested", [False, True], ids=["outermost", "nested"])
@sqlite_only
def test_a_task_that_is_collected_in_its_block_leaves_the_store_to_others(
    in_loop: Any, nested: bool
) -> None:
    async def body(store: AsyncStore) -> None:
        async def hold() -> None:
            async with store.transaction():
                await store.flows.insert(Flow(id="lost"))
                if nested:
                    async with store.transaction():
                        await asyncio.get_running_loop().create_future()
                await asyncio.get_running_loop().create_future()

        holder = weakref.ref(asyncio.create_task(hold()))
        await asyncio.sleep(0.1)
        gc.collect()
        assert holder() is None
        assert await store.flows.insert(Flow(id="other")) == await store.flows.get("other")
        assert await store.flows.get("lost") is None

    in_loop(body, busy_timeout=5)


def test_a_loop_that_ends_in_the_middle_leaves_all_or_nothing(tmp_path: Path) -> None:
    async def body() -> None:
        store = await flowstore.open_async(tmp_path / "s.db")
        for n in range(50):
            asyncio.create_task(store.events.append_batch("run", "default", [event(str(n))] * 2))  # noqa: RUF006
        await write(store, "known", "known")

    asyncio.run(body())
    with flowstore.open(tmp_path / "s.db") as store:
        assert store.events.count_events("known") == 1 and store.events.count_events("run") % 2 == 0
        assert store.check() == []


@in_a_file
def test_a_program_whose_tasks_are_all_cancelled_still_writes_what_it_cleans_up(
    in_loop: Any,
) -> None:
    async def body(store: AsyncStore) -> None:
        async def work() -> None:
            try:
                await asyncio.sleep(60)
            finally:
                await write(store, "run", "cleaned up")

        for turns in range(4):  # the task that sends is struck before its first step, and later
            worker = asyncio.create_task(work())
            await asyncio.sleep(0)
            asyncio.create_task(write(store, "other", "x"))  # noqa: RUF006
            for _ in range(turns):
                await asyncio.sleep(0)
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await worker
        await write(store, "run", "after")
        assert await keys_of(store, "run") == ["cleaned up"] * 4 + ["after"]

    in_loop(body)


@sqlite_only
def test_closing_wakes_those_who_wait_for_another_tasks_transaction(in_loop: Loop) -> None:
    async def body(store: AsyncStore) -> None:
        opened, ended = asyncio.Event(), asyncio.Event()

        async def hold() -> None:
            with pytest.raises(StoreClosed):
                async with store.transaction():
                    opened.set()
                    await ended.wait()

        async def begin() -> None:
            async with store.transaction():
                raise AssertionError("it was closed")

        holder = asyncio.create_task(hold())
        await opened.wait()
        waiting = [
            asyncio.create_task(write(store, "run", "a")),
            asyncio.create_task(begin()),
        ]
        await asyncio.sleep(0.01)
        await asyncio.gather(store.close(), store.close())
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(result) for result in results] == [StoreClosed, StoreClosed]
        ended.set()
        await holder

    in_loop(body)


def test_a_block_that_begins_as_its_parent_ends_is_one_of_its_own(in_loop: Loop) -> None:
    async def body(store: AsyncStore) -> None:
        async def child() -> None:
            async with store.transaction():
                await write(store, "run", "child")

        for _ in range(10):
            async with store.transaction():
                await write(store, "run", "parent")
                task = asyncio.create_task(child())
            await task
        assert await keys_of(store, "run") == ["parent", "child"] * 10

    in_loop(body)


def test_a_nested_block_that_outlives_the_outer_one_does_nothing_more(in_loop: Any) -> None:
    async def body(store: AsyncStore) -> None:
        begun, ended = asyncio.Event(), asyncio.Event()

        async def child() -> None:
            async with store.transaction():
                await write(store, "child")
                begun.set()
                await ended.wait()
                with pytest.raises(StorageError, match="nested in has ended"):
                    await write(store, "child")

        async def stranger() -> None:
            async with store.transaction():
                await write(store, "stranger")
                ended.set()
                with pytest.raises(StorageError):
                    await task
                await write(store, "stranger")

        with pytest.raises(Stop):
            async with store.transaction():
                task = asyncio.create_task(child())
                await begun.wait()
                raise Stop
        await asyncio.create_task(stranger(), context=contextvars.Context())
        assert await store.events.count_events("stranger") == 2
        assert not await store.events.execution_exists("child")

    in_loop(body, busy_timeout=1)


def test_tasks_with_blocks_nested_in_the_same_one_take_turns(in_loop: Loop) -> None:
    async def body(store: AsyncStore) -> None:
        async def nested(name: str, fails: bool) -> None:
            async with store.transaction() as tx:
                await write(store, name, "a")
                await asyncio.sleep(0.005)
                async with store.transaction():
                    await write(store, name, "b")
                assert await tx.execute(
                    "SELECT COUNT(*) FROM flowstore_log WHERE execution_id = ?", (name,)
                ) == [(2,)]
                if fails:
                    raise Stop

        async def plain(number: int) -> None:
            for _ in range(3):
                await write(store, f"plain-{number}", "c")
                assert (await store.events.get_latest_sequence(f"plain-{number}") or 0) > 0
                await asyncio.sleep(0.002)

        async with store.transaction() as tx:
            calls = [
                *(nested(f"nested-{number}", number % 2 == 1) for number in range(6)),
                *map(plain, range(3)),
            ]
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
            assert await tx.execute("SELECT COUNT(*) FROM flowstore_log") == [(15,)]
        assert [type(outcome) for outcome in outcomes[:6]] == [type(None), Stop] * 3
        assert outcomes[6:] == [None] * 3
        for number in range(6):
            assert await keys_of(store, f"nested-{number}") == ([] if number % 2 else ["a", "b"])
            assert await keys_of(store, f"plain-{number % 3}") == ["c"] * 3

    in_loop(body)


def test_who_waits_in_a_block_for_what_waits_for_him_is_told(in_loop: Any) -> None:
    async def body(store: AsyncStore) -> None:
        with pytest.raises(StorageError, match="nested in this one"):
            async with store.transaction():
                outside = contextvars.copy_context()
                async with store.transaction():
                    await asyncio.create_task(write(store, "run"), context=outside)
        assert await keys_of(store, "run") == []

    in_loop(body, busy_timeout=1)


def test_a_nested_block_cancelled_as_it_begins_spares_the_outer_one(in_loop: Loop) -> None:
    async def body(store: AsyncStore) -> None:
        async with store.transaction():
            with suppress(TimeoutError):
                async with asyncio.timeout(0), store.transaction():
                    await write(store, "run", "nested")
            await write(store, "run", "outer")
        assert await keys_of(store, "run") == ["outer"]

    in_loop(body)


@in_a_file
def test_without_patience_a_transaction_waits_for_the_stores_own_commits_all_the_same(
    in_loop: Any,
) -> None:
    async def body(store: AsyncStore) -> None:
        for _ in range(20):
            append = asyncio.create_task(write(store, "run", "a"))
            for _ in range(3):  # until it is on its way
                await asyncio.sleep(0)
            async with store.transaction():
                pass
            await append

    in_loop(body, busy_timeout=0)


# --- handlers, holds, views ---


class Uuid(uuid.UUID):
    """A UUID of a type of its own."""


def test_ids_keys_and_references_are_what_they_are_called(store: Store) -> None:
    host, key = store.workflows, Uuid(int=7)
    assert host.create_event_subscription(subscription(id=key, external_worker_id=key)) == str(key)
    assert host.get_subscription(key).external_worker_id == str(key)
    for worker in ("", "w" * 256):
        with pytest.raises(InvalidData, match="external_worker_id"):
            host.create_event_subscription(subscription(external_worker_id=worker))
    for name in ("event_name", "event_key"):
        with pytest.raises(InvalidData, match=rf"execution_pointers\[0\].{name}"):
            host.create_new_workflow(
                instance(execution_pointers=pointers("a", **{name: "k" * 256}))
            )
    for reference in ("", "r" * 300, key):
        made = instance(
            root_workflow_id=reference, execution_pointers=pointers("a", predecessor_id=reference)
        )
        stored = host.get_workflow_instance(host.create_new_workflow(made))
        assert (stored.root_workflow_id, stored.execution_pointers[0].predecessor_id) == (
            str(reference),
        ) * 2


def test_handlers_and_reducers_may_be_coroutine_functions(in_loop: Loop) -> None:
    async def body(store: AsyncStore) -> None:
        seen: list[str] = []

        async def handler(command: ScheduledCommand) -> None:
            await asyncio.sleep(0)
            if command.data == "bad":
                raise KeyError(command.data)
            seen.append(command.data)

        async def reducer(state: int, event: StoredEvent) -> int:
            await asyncio.sleep(0)
            return state + int(event.event["key"])

        for data in ("a", "bad", "b"):
            await store.workflows.schedule_command(record("ScheduledCommand", data=data))
        with pytest.raises(ExceptionGroup):
            await store.workflows.process_commands(None, handler)
        assert seen == ["a", "b"]
        assert (
            await store.workflows.process_commands(None, lambda command: seen.append(command.data))
            == 1
        )
        assert seen == ["a", "b", "bad"]
        for n in range(1, 5):
            await write(store, "run", str(n))
        assert await store.state.replay("run", reducer, 0) == (10, 4)
        assert await store.state.replay("run", lambda state, event: state + 1, 0) == (4, 4)

    in_loop(body)


def test_a_cancelled_handler_gives_its_command_back(in_loop: Loop) -> None:
    async def body(store: AsyncStore) -> None:
        started = asyncio.Event()

        async def sit(command: ScheduledCommand) -> None:
            started.set()
            await asyncio.sleep(60)

        command = record("ScheduledCommand")
        await store.workflows.schedule_command(command)
        task = asyncio.create_task(store.workflows.process_commands(None, sit))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        seen: list[ScheduledCommand] = []
        assert await store.workflows.process_commands(None, seen.append) == 1 and seen == [command]

    in_loop(body)


def test_an_async_hold_renews_and_tells_a_lost_lease(in_loop: Any) -> None:
    async def body(store: AsyncStore) -> None:
        await write(store, "run", "a")
        await store.state.enqueue_work_item(WorkItem(execution_id="run", queue_type="q"))
        item = await store.state.claim_work_item("w", ["q"], lease_seconds=0.2)
        assert item is not None and item.lease_expires_at is not None
        async with store.state.hold(item, lease_seconds=0.09) as hold:
            held = hold.expires
            while hold.expires == held:  # renewed in the background
                await asyncio.sleep(0.005)
            assert not hold.lost
        async with store.state.hold(item) as hold:
            await store.state.complete_work_item(item)
        assert not hold.lost
        await store.state.enqueue_work_item(WorkItem(execution_id="run", queue_type="q"))
        item = await store.state.claim_work_item("w", ["q"])
        assert item is not None
        with pytest.raises(LeaseLost):
            async with store.state.hold(item):
                await store.state.retry_work_item(item, delay=0)
                again = await store.state.claim_work_item("v", ["q"])
                assert again is not None and again.lease_fence > item.lease_fence

    in_loop(body)


def test_an_async_hold_renews_while_a_read_only_transaction_is_open(path: Path) -> None:
    async def main() -> None:
        async with flowstore.open_async(path, synchronous="OFF") as store:
            await write(store, "run")
            await store.state.enqueue_work_item(WorkItem(execution_id="run", queue_type="q"))
            item = await store.state.claim_work_item("w", ["q"])
            assert item is not None
            async with (
                asyncio.timeout(WATCHDOG),
                store.state.hold(item, lease_seconds=0.09) as hold,
                store.transaction(read_only=True),
            ):
                held = hold.expires
                while hold.expires == held:
                    await asyncio.sleep(0.005)

    asyncio.run(main())


def test_an_async_view_isolates_as_the_sync_one(in_loop: Loop) -> None:
    async def body(store: AsyncStore) -> None:
        await store.state.create_tenant(Tenant(id="acme"))
        acme = store.state.for_tenant("acme")
        await acme.create_execution(WorkflowExecution(execution_id="run", workflow_id="w"))
        assert await store.state.for_tenant("default").get_execution("run") is None
        assert (await acme.list_executions())[0].tenant_id == "acme"
        with pytest.raises(NotFound):
            await store.state.for_tenant("nobody").list_tokens()

    in_loop(body)


# --- iter_events and tail ---


def test_async_iter_events_reads_in_chunks_while_writes_go_on(in_loop: Loop) -> None:
    async def body(store: AsyncStore) -> None:
        await store.events.append_batch("run", "default", [event(str(n)) for n in range(25)])
        seen = []
        async for stored in store.events.iter_events("run", 5, chunk=4):
            if stored.sequence == 10:
                await write(store, "run", "more")
            seen.append(stored.sequence)
        assert seen == list(range(6, 27))
        with pytest.raises(InvalidData):
            store.events.iter_events("run", chunk=0)

    in_loop(body)


def test_tail_gives_what_comes_each_once_in_order(store: Store) -> None:
    write(store, "run", "before")
    tail = store.events.tail(timeout=0)
    for n in range(2500):
        write(store, f"run{n % 3}", str(n))
    found = list(tail)
    assert keys_in(found) == [str(n) for n in range(2500)]
    assert [stored.position for stored in found] == sorted({stored.position for stored in found})
    assert keys_in([*store.events.tail(0, timeout=0)]) == ["before", *keys_in(found)]
    assert keys_in([*store.events.tail(found[-2].position, timeout=0)]) == ["2499"]


def test_tail_goes_on_behind_any_number_of_events_that_it_passes_over(store: Store) -> None:
    after = (write(store, "first") and store.events.read_all()[-1].position) + 1500
    tails = [store.events.tail(after, timeout=0, execution_id=run) for run in ("e", None)]
    with store.transaction():
        # On a server positions have gaps, and those of a later transaction are far higher.
        store.events.append_batch("e", "default", [EVENT] * 1600)
    found = [[stored.sequence for stored in tail] for tail in tails]
    assert found[0] == found[1]
    assert found[0][-100:] == [*range(1501, 1601)]


def test_tail_of_a_tenant_or_an_execution(store: Store) -> None:
    store.events.append("a", "acme", event("0"))
    place = store.events.read_all()[-1].position
    tails = {
        "tenant": store.events.tail(timeout=0, tenant_id="acme"),
        "execution": store.events.tail(timeout=0, execution_id="a"),
        "both": store.events.tail(timeout=0, tenant_id="other", execution_id="a"),
        "later": store.events.tail(place, timeout=0, execution_id="a"),
        "unknown": store.events.tail(timeout=0, execution_id="nobody"),
    }
    for run, tenant, key in (
        ("b", "other", "1"),
        ("a", "acme", "2"),
        ("c", "acme", "3"),
        ("a", "acme", "4"),
    ):
        store.events.append(run, tenant, event(key))
    assert {name: keys_in([*tail]) for name, tail in tails.items()} == {
        "tenant": ["2", "3", "4"],
        "execution": ["2", "4"],
        "both": [],
        "later": ["2", "4"],
        "unknown": [],
    }


def test_tail_waits_for_events_and_ends_after_its_timeout(make_store: MakeStore) -> None:
    store = make_store()
    tail = store.events.tail(timeout=30)
    waiting = Caller(lambda: next(tail))
    until(waiting.waits)
    write(store, "run", "a")
    assert keys_in([waiting.outcome()]) == ["a"]
    assert list(store.events.tail(timeout=0.01)) == []


def test_tail_sees_what_another_process_appends(path: Path, file_store: Store) -> None:
    tail = file_store.events.tail(timeout=30)
    source = """
with flowstore.open(sys.argv[1]) as store:
    for n in range(50):
        store.events.append("run", "default", {"type": "custom", "key": str(n)})
"""
    other = script(source, path)
    assert keys_in([next(tail) for _ in range(50)]) == list(map(str, range(50)))
    finished(other)


def test_tail_refuses_what_it_cannot_use_at_once(store: Store) -> None:
    with pytest.raises(InvalidData):
        store.events.tail(timeout=math.nan)


def test_closing_ends_a_waiting_tail(make_store: MakeStore) -> None:
    store = make_store()
    tail = store.events.tail()
    waiting = Caller(lambda: next(tail))
    until(waiting.waits)
    store.close()
    assert isinstance(waiting.outcome(), StoreClosed)


def test_a_fork_while_another_thread_sits_in_tail(path: Path, file_store: Store) -> None:
    tail = file_store.events.tail(timeout=30)
    waiting = Caller(lambda: next(tail))
    until(waiting.waits)
    reap(forked(lambda: print(write(file_store, "run", "child"))))
    assert keys_in([waiting.outcome()]) == ["child"]
    assert write(file_store, "run", "parent") == 2


def test_a_tail_does_not_go_on_inside_a_transaction(store: Store) -> None:
    write(store, "e1")
    tail = store.events.tail(0, timeout=0)
    assert next(tail).sequence == 1
    with pytest.raises(StorageError, match="tail"), store.transaction():
        store.events.append("e1", "default", {"type": "phantom"})
        next(tail)
    write(store, "e1")
    assert [stored.event for stored in store.events.tail(0, timeout=0)] == [EVENT, EVENT]


@parametrize("again", [2, 5])
def test_a_tail_of_an_execution_goes_on_when_it_was_pruned_and_begun_anew(
    store: Store, again: int
) -> None:
    create(store, status="completed")
    store.events.append_batch("e1", "default", [EVENT] * 3)
    tails = [store.events.tail(after, execution_id="e1", timeout=0) for after in (None, 0)]
    assert [next(tails[1]).sequence for _ in range(3)] == [1, 2, 3]
    store.prune(datetime(9000, 1, 1, tzinfo=UTC))
    assert not store.events.execution_exists("e1")
    store.events.append_batch("e1", "default", [EVENT] * again)
    assert [[stored.sequence for stored in tail] for tail in tails] == [[*range(1, again + 1)]] * 2


def test_what_a_prune_has_left_in_pieces_is_not_known_any_more(store: Store) -> None:
    create(store, status="completed")
    store.events.append_batch("e1", "default", [EVENT] * 600)
    store._prune_some(flowstore._PRUNED["executions"], 2**52, (0,))
    assert 0 < len(store.events.load_events("e1")) < 600
    assert not store.events.execution_exists("e1")
    for call in (
        lambda: store.state.append_event("e1", EVENT),
        lambda: store.state.enqueue_work_item(WorkItem(execution_id="e1", queue_type="q")),
        lambda: store.state.write_snapshot(Snapshot(execution_id="e1", at_sequence=1, state=1)),
        lambda: store.state.record_effect("k", 1, execution_id="e1"),
    ):
        with pytest.raises(NotFound) as caught:
            call()
        assert caught.value.args == ("execution", "e1")
    with pytest.raises(TenantMismatch):
        write(store, "e1")
    store.prune(datetime(9000, 1, 1, tzinfo=UTC))
    assert store.events.append("e1", "acme", EVENT) == 1


def test_an_async_tail_does_not_go_on_inside_a_transaction(in_loop: Loop) -> None:
    async def body(store: AsyncStore) -> None:
        await write(store, "e1")
        tail = store.events.tail(0, timeout=0)
        assert (await anext(tail)).sequence == 1
        with pytest.raises(StorageError, match="tail"):
            async with store.transaction():
                await store.events.append("e1", "default", {"type": "phantom"})
                await anext(tail)
        assert [stored.event async for stored in store.events.tail(0, timeout=0)] == [EVENT]

    in_loop(body)


def test_async_tail_begins_when_it_is_called(in_loop: Loop) -> None:
    async def body(store: AsyncStore) -> None:
        await write(store, "run", "before")
        tail, of_one = (
            store.events.tail(timeout=0),
            store.events.tail(timeout=0, execution_id="run"),
        )
        await write(store, "run", "a")
        await write(store, "other", "b")
        assert keys_in([stored async for stored in tail]) == ["a", "b"]
        assert keys_in([stored async for stored in of_one]) == ["a"]

        async def first() -> Any:
            return await anext(store.events.tail(timeout=30))

        task = asyncio.create_task(first())
        await asyncio.sleep(0.03)
        await write(store, "run", "c")
        assert keys_in([await task]) == ["c"]

    in_loop(body)


def test_many_waiting_tasks_each_get_an_item(in_loop: Loop) -> None:
    async def body(store: AsyncStore) -> None:
        await write(store, "run", "a")
        tasks = [
            asyncio.create_task(store.state.claim_work_item(f"w{n}", ["q"], wait=30))
            for n in range(50)
        ]
        await asyncio.sleep(0.02)
        ids = await asyncio.gather(
            *(
                store.state.enqueue_work_item(WorkItem(execution_id="run", queue_type="q"))
                for _ in range(50)
            )
        )
        claims = await asyncio.gather(*tasks)
        assert sorted(item.id for item in claims if item) == sorted(ids)

    in_loop(body)


def test_idle_waiters_never_take_the_writer(path: Path, file_store: Store) -> None:
    """Another process holds the file for writing all the time; the waiters neither fail nor wait for it."""
    write(file_store, "run", "a")
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    waiting = Caller(lambda: list(file_store.events.tail(timeout=0.2)))
    assert waiting.outcome() == []
    other.execute("ROLLBACK")
    other.close()


# ==================================================================================================
# Views
# ==================================================================================================


MARKUP = "<script>alert('x')</script>\" onload=\"alert(1) \x1b[31m\u202e&amp;"


CHROMIUM = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
]


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A store with some of everything, made by a clock of its own: shop.db."""
    now = START

    def later(seconds: float) -> None:
        nonlocal now
        now += timedelta(seconds=seconds)

    with flowstore.open(tmp_path / "shop.db", clock=lambda: now) as store:
        state = store.state
        state.create_tenant(Tenant(id="acme"))
        for number, tenant in enumerate(["default", "default", "acme"]):
            create(store, f"order-{number}", status="running", tenant_id=tenant)
            append = partial(state.append_event, f"order-{number}")
            for kind, pause in zip(
                ("discovered", "started", "failed", "started", "started"),
                (2, 4, 6, 20, 3),
                strict=True,
            ):
                append({"type": f"step_{kind}", "step": "charge"})
                later(pause)
            append({"type": "step_completed", "step": "charge", "note": MARKUP})
            for queue in ("mail", "ship"):
                enqueue(
                    store,
                    id=f"{queue}-{number}",
                    execution_id=f"order-{number}",
                    queue_type=queue,
                )
        state.append_event("order-0", {"type": "execution_completed"})
        state.update_execution_status("order-0", "completed")
        state.claim_work_item("worker", ["mail"], lease_seconds=900)
        state.move_to_dead_letter("ship-1", "printer on fire")
        write(store, MARKUP)
        flow_with(store, "waiting", id="flow", goal=MARKUP, state={"found": [MARKUP]})
        store.flows.insert_step(
            FlowStep(flow_id="flow", run_id="r", task="scan", status=FlowStepStatus.FAILED)
        )
        store.flows.append_event("flow", "noted", {"by": MARKUP})
        pointer = ExecutionPointer(
            step_id=7, step_name="wait", status=PointerStatus.SLEEPING, start_time=now
        )
        host = store.workflows
        created(host, id="flow", workflow_definition_id="host", execution_pointers=[pointer])
        host.create_event_subscription(subscription(workflow_id="flow"))
        host.schedule_command(record("ScheduledCommand"))
        host.persist_errors([record("ExecutionError", workflow_id="flow", message=MARKUP)])
    return tmp_path / "shop.db"


TAGS = r"html|head|meta|link|title|style|body|header|h[12]|a|main|section|dl|div|dt|dd|span|table|caption|t[rhd]|svg|rect|b|pre|form|label|input|select|option|button"


class Page(HTMLParser):
    """What a browser would make of a page: its elements, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += f"{data} "


@contextmanager
def serving(path: Path) -> Iterator[str]:
    """The address of a live page, which must end well at Ctrl-C, having said nothing."""
    command = [sys.executable, flowstore.__file__, "serve", str(path), "--port", "0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None and server.stderr is not None
        try:
            yield server.stdout.readline().split()[0]
            server.send_signal(signal.SIGINT)
            assert (server.wait(30), server.stderr.read()) == (0, "")
        finally:
            server.kill()


def test_every_drawing_has_the_numbers_of_the_store(shop: Path) -> None:
    with flowstore.open(shop, read_only=True) as store:
        stats = store.stats()
    shown = json_of("show", shop)
    assert shown["counts"] == {
        "executions": stats["executions"],
        "flows": stats["flows"],
        "workflows": stats["workflows"],
        "work items": {"pending": 4, "claimed": 1, "dead_lettered": 1},
    }
    queues = {
        row["queue"]: Counter(
            pending=row["waiting"], claimed=row["leased"], dead_lettered=row["dead"]
        )
        for row in shown["tables"]["queues"]["rows"]
    }
    assert queues == {queue: Counter(by) for queue, by in stats["queues"].items()}
    assert (
        shown["facts"]
        | {
            "file_bytes": stats["file_bytes"],
            "open_subscriptions": 1,
            "due_commands": 1,
            "later_commands": 0,
            "unprocessed_events": 0,
            "last_position": 20,
        }
        == shown["facts"]
    )
    with serving(shop) as address:
        pages = [run("report", shop).stdout, ask(address)[2]]
    drawn = [run("show", shop).stdout, *(Page(page).text for page in pages)]
    for kind, counts in shown["counts"].items():
        for text in drawn:
            told = r",?\s+".join(f"{count} {word}" for word, count in counts.items())
            assert re.search(rf"{kind}\s+{told}", text), kind
    for text in drawn:
        assert re.search(r"mail\s+2\s+.+\s1\s+0", text) and "7" in text


def test_a_detail_has_all_of_an_execution_a_flow_and_a_workflow(shop: Path) -> None:
    (execution,) = json_of("show", shop, "order-0")
    with flowstore.open(shop, read_only=True) as store:
        events = store.events.load_events("order-0")
    rows = execution["tables"]["events"]
    assert (rows["total"], [row["event"] for row in rows["rows"]]) == (
        7,
        [one.event for one in events],
    )
    assert ids_in(execution["tables"]["work items"]) == ["mail-0", "ship-0"]
    assert execution["status"] == "completed" and execution["facts"]["current_state"] == {}
    flow, workflow = json_of("show", shop, "flow")
    assert (flow["kind"], flow["facts"]["goal"], flow["facts"]["state"]) == (
        "flow",
        MARKUP,
        {"found": [MARKUP]},
    )
    assert flow["tables"]["events"]["rows"][0]["payload"] == {"by": MARKUP}
    assert flow["steps"][0]["parts"][0]["what"] == "failed"
    assert [
        workflow["tables"][name]["total"] for name in ("pointers", "subscriptions", "errors")
    ] == [1, 1, 1]
    assert workflow["steps"][0]["parts"][0]["what"] == "waiting"
    (by_item,) = json_of("show", shop, "ship-0")
    assert by_item == execution
    assert run("show", shop, "nobody", status=1).stderr.startswith(
        "flowstore: execution or flow or wo"
    )


def test_steps_show_their_waits_failures_and_lost_attempts(shop: Path) -> None:
    with flowstore.open(shop, read_only=True) as store:
        timeline = store.state.timeline("order-0")
    charge = timeline["steps"][0]
    seconds = [
        (part["what"], (part["to"] - part["from"]).total_seconds()) for part in charge["parts"]
    ]
    assert seconds == [("waiting", 2), ("failed", 4), ("waiting", 6), ("lost", 20), ("done", 3)]
    assert (charge["name"], charge["status"], charge["attempts"]) == ("charge", "completed", 3)
    assert re.search(r"charge +\.*x+\.+~+#+ +completed, 3 attempts\n", str(timeline))


@parametrize(
    "event",
    [
        {"type": "sleep_started", "step": "s", "until": "tomorrow"},
        {"type": "sleep_started", "step": "s", "until": "2026-01-01T00:00:00"},
        {"type": "sleep_started", "step": "s", "until": 5},
        {"type": "step_completed", "step": "s", "seconds": 1e300},
        {"type": "step_completed", "step": "s", "seconds": "5"},
        {"type": "step_failed", "step": ["s"], "seconds": -5},
    ],
)
def test_a_view_draws_events_of_other_programs_whatever_their_fields_mean(
    store: Store, event: dict[str, Any]
) -> None:
    store.events.append("e", "default", event)
    view = store.state.timeline("e")
    assert len(view["steps"]) == 1 and "s" in view["steps"][0]["name"]
    assert "s" in str(view) and cast("Any", view)._repr_html_()


def test_nothing_from_the_store_becomes_markup(shop: Path) -> None:
    with flowstore.open(shop, read_only=True) as store:
        reprs: list[Any] = [
            store,
            store.flows,
            store.events,
            store.state,
            store.workflows,
            store.flows.get("flow"),
            *store.flows.list_events("flow"),
            store.state.timeline(MARKUP),
        ]
        pages = [one._repr_html_() for one in reprs]
    pages += [run("report", shop, *which).stdout for which in ([], ["flow"])]
    with serving(shop) as address:
        for query in (
            f"id={quote(MARKUP)}",
            f"tenant={quote(MARKUP)}",
            f"status={quote(MARKUP)}",
            "id=flow",
            f"id=%00&status={quote(MARKUP)}",
            f"id={quote(MARKUP * 20)}",
            "",
        ):
            pages.append(ask(address, f"/?{query}")[2])
        pages.append(ask(address, f"/{quote(MARKUP)}")[2])
    assert sum("<script>alert('x')</script>" in Page(page).text for page in pages) >= 10
    for page in pages:
        assert page is not None and "\x1b" not in page and "\u202e" not in page
        for tag, attributes in Page(page).elements:
            assert re.fullmatch(TAGS, tag), tag
            assert not any(name.startswith("on") or name == "style" for name in attributes)
            assert re.match(
                r"/($|\?id=[\w%.~-]*$)|#[\w%.~-]*$|data:,$", attributes.get("href") or "/"
            ), attributes


def test_the_live_page_is_for_this_machine_and_reads_alone(shop: Path) -> None:
    before = shop.read_bytes()
    with serving(shop) as address:
        port = address.rstrip("/").rsplit(":", 1)[1]
        status, headers, text = ask(address)
        assert status == 200 and text.startswith("<!DOCTYPE html>")
        policy = headers["Content-Security-Policy"]
        assert (
            policy.startswith("default-src 'none'; style-src 'sha256-")
            and "frame-ancestors 'none'" in policy
        )
        assert "unsafe" not in policy and headers["X-Content-Type-Options"] == "nosniff"
        assert ask(address, method="HEAD")[::2] == (200, "")
        for host in (
            f"localhost:{port}",
            f"127.0.0.1:{port}",
            f"[::1]:{port}",
            f"LOCALHOST:{port}",
        ):
            assert ask(address, Host=host)[0] == 200
        for host in (
            "evil.example",
            f"evil.example:{port}",
            "127.0.0.1",
            "127.0.0.1:1",
            f"127.0.0.1:{port}.evil",
            "",
        ):
            assert ask(address, Host=host)[0] == 421, host
        for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "NONSENSE"):
            status, headers, text = ask(address, method=method)
            assert (status, headers["Allow"]) == (
                405,
                "GET, HEAD",
            ) and "nothing can be changed" in text
        for path, expected in (
            ("/nowhere", 404),
            ("/?id=nobody", 404),
            ("/?tenant=nobody", 404),
            ("/?status=nonsense", 400),
            ("/?" + "a=1&" * 20, 400),
            ("/?id=%ff", 404),
            ("/?id=" + "x" * 300, 400),
            ("/?tenant=acme&id=order-0", 404),
            ("/?tenant=acme&id=order-2", 200),
            ("/?id=", 200),
            ("/?tenant=acme&id=flow", 404),
        ):
            status, headers, text = ask(address, path)
            assert (
                status == expected
                and "Traceback" not in text
                and "default-src 'none'" in headers["Content-Security-Policy"]
            ), path
        for path, there, gone in (
            ("/?tenant=acme", "order-2", "order-0"),
            ("/?status=completed", "order-0", "order-2"),
            ("/?status=dead_lettered", "printer on fire", "order-2"),
            ("/?status=Runnable", "host-1", "order-0"),
        ):
            text = Page(ask(address, path)[2]).text
            assert there in text and gone not in text, path
    assert shop.read_bytes() == before


def test_serve_refuses_a_port_that_is_none_or_taken(shop: Path) -> None:
    assert "--port" in run("serve", shop, "--port", "65536", status=2).stderr
    with serving(shop) as address:
        port = address.rstrip("/").rsplit(":", 1)[1]
        said = run("serve", shop, "--port", port, status=1).stderr
        assert re.fullmatch(rf"flowstore: --port: {port} .*in use.*: name another, .*\n", said)
    assert "no such file" in run("serve", "missing.db", cwd=shop.parent, status=1).stderr


def test_the_terminal_view_fits_80_columns_whatever_is_stored(tmp_path: Path) -> None:
    wide = "\u6f22\u5b57e\u0301" * 60
    new_id = flowstore.new_id()
    with flowstore.open(tmp_path / "wide.db") as store:
        for id in (wide[:200], new_id, "x" * 255):
            create(store, id, workflow_version=wide, current_state={wide: [wide] * 9})
            store.state.append_event(id, {"type": f"{wide}_started", "step": wide})
            enqueue(store, execution_id=id, queue_type=wide[:255], node_id=wide * 99)
            enqueue(store, id=wide[:90] + id[:100], execution_id=id, queue_type="q" * 255)
            store.state.move_to_dead_letter(wide[:90] + id[:100], wide * 99)
            store.flows.insert(Flow(id=id, goal=f"line one\n\ttwo {wide * 50}"))
        texts = [str(flowstore.View(view)) for view in flowstore._read_views(store)]
        texts += [str(store.state.timeline(id)) for id in (wide[:200], new_id, "x" * 255)]
        texts += [str(flowstore.View(view)) for view in flowstore._read_views(store, wide[:200])]
    for text in texts:
        assert max(map(columns, text.splitlines())) <= 80
        assert all(char.isprintable() or char == "\n" for char in text)
    assert new_id in texts[0] and new_id in texts[2]  # an id can be copied


def ids_in(table: Any) -> list[str]:
    return [row["id"] for row in table["rows"]]


def on_a_terminal(*arguments: object, **environment: str) -> str:
    """What a command prints on a terminal."""
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    inherited = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    subprocess.run(
        [sys.executable, flowstore.__file__, *map(str, arguments)],
        stdout=theirs,
        env=inherited | environment,
        timeout=60,
        check=True,
    )
    os.close(theirs)
    said = b""
    with suppress(OSError):
        while chunk := os.read(ours, 1 << 16):
            said += chunk
    os.close(ours)
    return said.decode().replace("\r\n", "\n")


def test_colour_is_for_terminals_whose_owner_wants_it(shop: Path) -> None:
    plain = run("show", shop, "order-0").stdout
    coloured = on_a_terminal("show", shop, "order-0")
    assert "\x1b" not in plain and "\x1b[32mcompleted\x1b[0m\n" in coloured
    assert "\x1b[32mcompleted, 3 attempts\x1b[0m\n" in coloured
    assert (
        re.sub(r"\x1b\[\d+m", "", coloured)
        == plain
        == on_a_terminal("show", shop, "order-0", NO_COLOR="1")
    )
    assert on_a_terminal("show", shop, "order-0", NO_COLOR="") == coloured


def test_a_view_cuts_what_is_long_and_says_so(tmp_path: Path) -> None:
    with flowstore.open(tmp_path / "long.db", synchronous="OFF") as store:
        create(store, "e", current_state={"blob": "x" * 3_000_000})
        store.events.append_batch("e", "default", [{"type": "custom", "blob": "y" * 5000}] * 450)
        view = store.state.timeline("e")
        html = view._repr_html_()  # type: ignore[attr-defined]
    table = view["tables"]["events"]
    assert (table["total"], len(table["rows"]), table["rows"][-1]["sequence"]) == (450, 200, 450)
    assert "events (the last 20 of 450)" in str(view) and "events (the last 200 of 450)" in html
    assert view["facts"]["current_state"].endswith("... (cut)") and len(html) < 2_000_000


def test_a_view_cuts_a_reference_that_is_long(file_store: Store) -> None:
    pointer = ExecutionPointer(step_id=1, predecessor_id="r" * 9000)
    created(file_store.workflows, id="w", execution_pointers=[pointer])
    (view,) = json_of("show", file_store.target, "w")
    (row,) = view["tables"]["pointers"]["rows"]
    assert row["predecessor_id"] == "r" * 4000 + "... (cut)"


def test_a_view_counts_up_to_a_bound(file_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flowstore, "_COUNT_BOUND", 5)
    monkeypatch.setattr(flowstore, "_SETTLED_BOUND", 3)
    for number in range(12):
        id = enqueue(file_store)
        if number % 3 == 0:
            file_store.state.move_to_dead_letter(id, "e")
    (view,) = flowstore._read_views(file_store)
    assert view["counts"]["work items"] == {"pending": "5+", "dead_lettered": 4}
    [row] = view["tables"]["queues"]["rows"]
    assert (row["waiting"], row["dead"]) == ("5+", "3+")


def test_the_newest_dead_letter_is_shown_first_whenever_it_was_to_be_tried(
    file_store: Store, clock: Clock
) -> None:
    for id, available in (("b", datetime(9000, 1, 1, tzinfo=UTC)), ("c", None), ("a", None)):
        enqueue(file_store, id=id, available_at=available)
        clock.advance(1)
        file_store.state.move_to_dead_letter(id, "e")
    (view,) = flowstore._read_views(file_store)
    assert ids_in(view["tables"]["dead letters"]) == ["a", "c", "b"]


def test_a_timeline_is_of_an_execution_that_is_known(store: Store) -> None:
    state = store.state
    for tenant in ("acme", "other"):
        state.create_tenant(Tenant(id=tenant))
    store.events.append("logged", "acme", {"type": "custom"})
    create(state, "silent", tenant_id="acme")
    acme = state.for_tenant("acme")
    for view in (state, acme):
        assert view.timeline("logged")["tables"]["events"]["total"] == 1
        assert view.timeline("silent")["tables"]["events"]["total"] == 0
        assert "silent" in str(view.timeline("silent"))
    store.flows.insert(Flow(id="flow"))
    for view, id in (
        (state, "nobody"),
        (state, "flow"),
        (acme, "flow"),
        (state.for_tenant("other"), "logged"),
    ):
        with pytest.raises(NotFound) as raised:
            view.timeline(id)
        assert raised.value.args == ("execution", id)
    with pytest.raises(InvalidData):
        state.timeline("")


def test_what_a_notebook_shows_of_a_tenants_view_is_the_tenants(shop: Path) -> None:
    with flowstore.open(shop, read_only=True) as store:
        acme = cast("Any", store.state.for_tenant("acme"))._repr_html_()
        assert "order-2" in acme and "order-0" not in acme and "ship-1" not in acme
        assert cast("Any", store.state.for_tenant("nobody"))._repr_html_() is None


def test_a_notebook_shows_an_async_store_as_a_sync_one(in_loop: Loop) -> None:
    async def body(store: AsyncStore) -> None:
        await write(store, "run", "a")
        assert "run" in cast("Any", store)._repr_html_()
        async with store.transaction():
            await write(store, "inside", "a")
            assert "inside" in cast("Any", store.state)._repr_html_()

    in_loop(body)


def test_a_notebook_is_shown_the_repr_where_nothing_can_be_read_at_once() -> None:
    store = cast("Any", flowstore.open(":memory:", busy_timeout=60))
    with held_block(store):
        assert store._repr_html_() is None  # without waiting for the transaction's end
    with store.transaction():
        assert store._repr_html_()
    assert "overview" in store._repr_html_()
    broken = cast("Any", Flow(goal="g"))
    broken.state = type(
        "Bad", (), {"__repr__": lambda self: 1 / 0, "__str__": lambda self: 1 / 0}
    )()
    assert broken._repr_html_() is None
    store.close()
    assert store._repr_html_() is None and store.flows._repr_html_() is None


@sqlite_only
def test_no_view_reads_more_than_it_shows(
    watched: type[Watched], store: Store, schema: sqlite3.Connection
) -> None:
    furnish(store, "a")
    watched.statements.clear()
    for facet in (
        store,
        store.flows,
        store.events,
        store.state,
        store.workflows,
        store.state.for_tenant("tenant-a"),
    ):
        for status in (None, "pending", "Complete"):
            flowstore._read_views(facet, None, status)
    store.flows.insert(Flow(id="ea"))
    store.workflows.create_new_workflow(WorkflowInstance(id="ea", workflow_definition_id="d"))
    flowstore._read_views(store, "ea")
    issued = {
        sql for sql in watched.statements if sql.startswith("SELECT") and "sqlite_master" not in sql
    }
    steps = {step for sql in issued for step in plan(schema, sql)}
    assert len(issued) > 60
    bad = {
        step for step in steps if re.match(r"SCAN (?!counted|.*CONSTANT)", step) or "B-TREE" in step
    }
    assert bad == {
        "SCAN flowstore_log",  # backwards by position, to its limit
        "SCAN flowstore_queues",  # to its limit
        "SCAN flowstore_work_items USING INDEX flowstore_pending",  # counts
        "SCAN flowstore_work_items USING INDEX flowstore_leased",
        "SCAN events USING INDEX events_runnable",
        "SCAN event_subscriptions USING INDEX event_subscriptions_open",  # counts
    }
    check_plans(schema, {sql for sql in issued if "EXPLAIN" not in sql})


HOSTILE_QUEUE = 'a "queue" \\ of\nlines \\n {le="1"} \u6f22'


def scrape(text: str) -> dict[str, dict[tuple[str, ...], float]]:
    """By metric, the values by labels, as Prometheus' own parser reads them."""
    parser = pytest.importorskip("prometheus_client.parser")
    found = {}
    for family in parser.text_string_to_metric_families(text):
        assert (family.type, bool(family.documentation)) == ("gauge", True)
        found[family.name] = {
            tuple(sample.labels.values()): sample.value for sample in family.samples
        }
    return found


def rendered_metrics(store: Store) -> str:
    return flowstore._render_metrics(flowstore._read_views(store)[0])


@parametrize(
    "damage",
    [
        "execution_pointers SET status = 'Pendinh'",
        "flow_steps SET runtime = 'maNaged'",
        "flow_steps SET created_at = 'x'",
        "flowstore_work_items SET status = 'pendinh'",
        "flowstore_work_items SET available_at = 'soon'",
        "flowstore_log SET timestamp = 'x'",
        "flows SET updated_at = 'x'",
    ],
)
def test_a_damaged_value_is_shown_or_told_of_in_one_line(
    path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with flowstore.open(path) as store:
        furnish_plainly(store)
        flow = flow_with(store)
        store.flows.insert_step(FlowStep(flow_id=flow.id, run_id="r"))
        host = created(store.workflows, execution_pointers=pointers("p"))
        execute(store, f"UPDATE {damage}")
    looks = [[command, str(path)] for command in ("show", "report", "metrics", "check")]
    looks += [["show", str(path), id] for id in ("e1", flow.id, host.id)]
    for look_at in looks:
        assert flowstore.main(look_at) in (0, 1)
        assert re.fullmatch(r"(flowstore: [^\n]+\n)?", capsys.readouterr().err)


def test_metrics_are_utf_8_in_every_locale(path: Path) -> None:
    with flowstore.open(path) as store:
        enqueue(store, queue_type="f\xfcllen")
    command = [sys.executable, str(flowstore.__file__), "metrics", str(path)]
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, env=ascii_only, check=True)
    assert 'queue="f\xfcllen"' in done.stdout.decode()


def test_metrics_are_what_the_store_holds_whatever_its_queues_are_called(
    store: Store, clock: Clock
) -> None:
    state: Any = store.state
    for status in ("running", "running", "failed"):
        create(store, flowstore.new_id(), status=status)
    for n in range(7):
        enqueue(store, id=f"i{n}", queue_type=HOSTILE_QUEUE)
    for queue in (HOSTILE_QUEUE, "later"):
        enqueue(store, queue_type=queue, available_at=clock() + seconds(60))
    state.claim_work_items("w", [HOSTILE_QUEUE], 3)
    state.complete_work_item("i0")
    state.fail_work_item("i1", "no")
    state.move_to_dead_letter("i6", "no")
    state.set_queue_policy(QueuePolicy(queue_type="idle", paused=True))
    flow_with(store, "waiting")
    created(store.workflows)
    store.events.append_batch("e1", "default", [EVENT] * 3)
    clock.advance(5)
    found = scrape(rendered_metrics(store))
    stats = store.stats()
    items = found["flowstore_work_items"]
    assert {labels: count for labels, count in items.items() if count} == {
        (queue, status): count
        for queue, counts in stats["queues"].items()
        for status, count in counts.items()
    }
    assert {queue for queue, _ in items} == {HOSTILE_QUEUE, "later", "idle"}
    assert len(items) == 3 * len(WorkItemStatus)
    assert found["flowstore_oldest_pending_seconds"] == {
        (HOSTILE_QUEUE,): 5,
        ("later",): 0,
        ("idle",): 0,
    }
    for kind, statuses in (
        ("executions", ExecutionStatus),
        ("flows", FlowStatus),
        ("workflows", WorkflowStatus),
    ):
        assert found[f"flowstore_{kind}"] == {
            (status,): stats[kind].get(status, 0) for status in statuses
        }
    last = store.events.read_all(0)[-1].position
    assert found["flowstore_last_position"] == {(): last}
    for name in ("file_bytes", "wal_bytes", "free_bytes"):
        assert found[f"flowstore_{name}"] == {(): stats[name]}
    assert found["flowstore_info"] == {(flowstore.__version__, sqlite3.sqlite_version): 1}
    assert len(found) == 10
    clock.advance(100)
    found = scrape(rendered_metrics(store))
    assert found["flowstore_oldest_pending_seconds"][("later",)] == 45


def test_the_metrics_of_an_empty_store_are_there(tmp_path: Path) -> None:
    flowstore.open(tmp_path / "app.db").close()
    found = scrape(run("metrics", "app.db", cwd=tmp_path).stdout)
    assert found["flowstore_last_position"] == {(): 0} and found["flowstore_work_items"] == {}
    assert set(found["flowstore_executions"].values()) == {0}


def test_serve_answers_at_metrics_what_the_command_prints(shop: Path) -> None:
    printed = run("metrics", shop).stdout
    with serving(shop) as address:
        status, headers, text = ask(address, "/metrics")
        assert (status, headers["Content-Type"]) == (
            200,
            "text/plain; version=0.0.4; charset=utf-8",
        )
        assert ask(address, "/metrics", method="HEAD")[::2] == (200, "")
        assert ask(address, "/metrics", Host="evil.example")[0] == 421
        assert ask(address, "/metrics", method="POST")[0] == 405
    ages = re.compile("(?m)^flowstore_(oldest_pending_seconds|wal_bytes).*")
    assert ages.sub("", text) == ages.sub("", printed)
    assert scrape(text)["flowstore_work_items"]["mail", "pending"] == 2


def test_metrics_say_the_bounds_up_to_which_they_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = run("metrics", tmp_path / "app.db", cwd=tmp_path, status=1).stderr
    assert "no such file" in text
    with flowstore.open(tmp_path / "app.db") as store:
        helps = dict(re.findall(r"# HELP flowstore_(\w+) (.*)", rendered_metrics(store)))
        bounds = [flowstore._QUEUE_LIMIT, flowstore._COUNT_BOUND, flowstore._SETTLED_BOUND]
        assert all(str(bound) in helps["work_items"] for bound in bounds)
        for kind in ("executions", "flows", "workflows"):
            assert str(flowstore._COUNT_BOUND) in helps[kind]
        monkeypatch.setattr(flowstore, "_COUNT_BOUND", 2)
        monkeypatch.setattr(flowstore, "_SETTLED_BOUND", 3)
        for n in range(8):
            flow_with(store)
            id = enqueue(store)
            if n % 2:
                store.state.complete_work_item(id)
        found = scrape(rendered_metrics(store))
    assert found["flowstore_work_items"]["q", "pending"] == 2
    assert found["flowstore_work_items"]["q", "completed"] == 3
    assert found["flowstore_flows"][("created",)] == 2


def test_a_hundred_queues_are_told_those_with_work_before_those_that_had_some(
    tmp_path: Path,
) -> None:
    with flowstore.open(tmp_path / "app.db", synchronous="OFF") as store, store.transaction():
        for n in range(150):
            for queue in (f"a{n:03}", f"b{n:03}"):
                id = enqueue(store, queue_type=queue)
                if queue.startswith("a"):
                    store.state.complete_work_item(id)
        (view,) = flowstore._read_views(store)
    queues = [row["queue"] for row in view["tables"]["queues"]["rows"]]
    assert queues == [f"b{n:03}" for n in range(100)]


@sqlite_only
def test_a_scrape_takes_no_more_steps_for_rows_beyond_its_bounds(
    watched: type[Watched], make_store: Callable[[], Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_COUNT_BOUND", "_SETTLED_BOUND"):
        monkeypatch.setattr(flowstore, name, 50)
    store = make_store()
    for status in WorkItemStatus:
        id = enqueue(store, id=status, execution_id="run", queue_type="queue")
        ended = status not in ("pending", "claimed")
        execute(
            store,
            "UPDATE flowstore_work_items SET status = id, settled_at = ?, lease_expires_at = 1 WHERE id = ?",
            (1 if ended else None, id),
        )
    flow_with(store, id="flow")
    created(store.workflows, id="flow", name="w")
    write(store, "run")
    steps = []
    for step, count in enumerate((1200, 6000)):
        key = f"'-{step}-' || n"
        for status in WorkItemStatus:
            copy_row(store, "flowstore_work_items", f"id = '{status}'", count, id=f"id || {key}")
        copy_row(store, "flowstore_runs", "execution_id = 'run'", count, execution_id=key)
        copy_row(store, "flows", "id = 'flow'", count, id=key)
        copy_row(store, "workflows", "id = 'flow'", count, id=key, name=key)
        store.events.append_batch("run", "default", [EVENT] * count)
        steps.append(watched.steps(lambda: rendered_metrics(store)))
        items = scrape(rendered_metrics(store))["flowstore_work_items"]
        assert items["queue", "pending"] == items["queue", "completed"] == 50
    assert 10 < steps[1] < 1.1 * steps[0]


def test_tail_prints_events_as_they_come_until_interrupted(shop: Path) -> None:
    command = [sys.executable, flowstore.__file__, "tail", str(shop)]
    command += ["--after", "0", "--execution", "order-1"]
    with flowstore.open(shop) as store:
        for more, expected in (
            ([], r"\d\d:\d\d:\d\d order-1 7 news hello=1\n"),
            (["--json"], r'\{"execution_id": "order-1".*\n'),
        ):
            with subprocess.Popen(
                [*command, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            ) as tail:
                assert tail.stdout is not None and tail.stderr is not None
                for _ in range(6):
                    assert "order-1" in tail.stdout.readline()
                store.events.append("order-2", "acme", {"type": "custom"})
                store.events.append(
                    "order-1", "default", {"type": "news", "hello": 1}, event_id="once"
                )
                assert re.fullmatch(expected, tail.stdout.readline())
                tail.send_signal(signal.SIGINT)
                assert (tail.wait(30), tail.stdout.read(), tail.stderr.read()) == (0, "", "")


def test_a_reader_that_goes_away_is_met_quietly(shop: Path) -> None:
    for arguments in (["show", shop], ["report", shop], ["metrics", shop]):
        reading, writing = os.pipe()
        os.close(reading)
        done = subprocess.run(
            [sys.executable, flowstore.__file__, *map(str, arguments)],
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
        os.close(writing)
        assert (done.returncode, done.stderr) == (141, "")


def test_an_id_may_stand_behind_an_option(shop: Path) -> None:
    wanted = run("show", "--json", shop, "order-0").stdout
    assert '"order-0"' in wanted
    assert run("show", shop, "--json", "order-0").stdout == wanted
    for arguments in (["show", shop, "a", "b"], ["show", shop, "--no", "a"], ["check", shop, "a"]):
        assert "unrecognized arguments" in run(*arguments, status=2).stderr


def test_what_does_not_belong_into_a_column_is_shown_as_it_is(shop: Path) -> None:
    with sqlite3.connect(shop) as db:
        db.execute("UPDATE flows SET goal = x'fffe' WHERE id = 'flow'")
        db.execute("UPDATE flowstore_log SET event = '{\"t\": 1}' WHERE position = 1")
    db.close()
    assert json_of("show", shop, "flow")[0]["facts"]["goal"] == r"b'\xff\xfe'"
    child = subprocess.Popen(
        [sys.executable, flowstore.__file__, "tail", shop, "--after", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert line_of(child).endswith("None t=1")
    child.send_signal(signal.SIGINT)
    finished(child)


def test_report_writes_a_page_that_needs_nothing_else(shop: Path) -> None:
    run("report", shop, "-o", "page.html", cwd=shop.parent)
    page = Page((shop.parent / "page.html").read_text())
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    links = [
        attributes["href"]
        for tag, attributes in page.elements
        if tag == "a" and "href" in attributes
    ]
    assert len(links) == 7 and {link.removeprefix("#") for link in links if link} <= set(ids)
    assert not re.search(r"https?:|url\(|@import|<script", (shop.parent / "page.html").read_text())
    tables = sum(tag == "table" for tag, _ in page.elements)
    assert tables == sum(tag == "caption" for tag, _ in page.elements) > 9
    assert all("scope" in attributes for tag, attributes in page.elements if tag == "th")
    assert all(attributes["aria-label"] for tag, attributes in page.elements if tag == "svg")
    before = shop.read_bytes()
    assert run("report", shop, "-o", "shop.db", cwd=shop.parent, status=2).stderr
    with flowstore.open(shop):
        for own in ("shop.db-wal", "shop.db-shm"):
            said = run("report", shop, "-o", own, cwd=shop.parent, status=2).stderr
            assert said == f"flowstore: -o: {own} is the store itself: name another file\n"
    said = run("report", shop, "-o", "no/such/folder.html", cwd=shop.parent, status=1).stderr
    assert re.fullmatch(
        r"flowstore: -o: no/such/folder.html cannot be written .*: name another file\n", said
    )
    assert shop.read_bytes() == before


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    """Headless Chromium."""
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in programs:
        pytest.skip("chromium and chromedriver are not there")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(programs[0])
    for argument in (*CHROMIUM, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(programs[1])))
    try:
        yield driver
    finally:
        driver.quit()


def test_a_real_browser_shows_the_report_and_the_live_page(shop: Path, browser: Any) -> None:
    from selenium.common.exceptions import WebDriverException
    from selenium.webdriver.support.ui import WebDriverWait

    with flowstore.open(shop, read_only=True) as store:
        executions = store.stats()["executions"]
    run("report", shop, "-o", "page.html", cwd=shop.parent)
    with serving(shop) as address:
        for page in ((shop.parent / "page.html").as_uri(), address):
            browser.get(page)
            text = browser.find_element("tag name", "main").text
            for status, count in executions.items():
                assert f"{count} {status}" in text
            assert "4 pending" in text and "1 dead_lettered" in text and "printer on fire" in text
            assert "<script>alert('x')</script>" in text  # as text
            assert browser.execute_script("return document.scripts.length") == 0
            card = browser.find_element("css selector", ".card")
            assert (
                card.value_of_css_property("border-radius") == "10px"
            )  # the policy lets the style sheet pass
        for name, value, expected in (
            ("id", "order-0", "execution order-0"),
            ("tenant", "acme", "order-2"),
        ):
            browser.get(address)
            field = browser.find_element("name", name)
            field.send_keys(value)
            field.submit()
            waiting = WebDriverWait(
                browser, 30, ignored_exceptions=[WebDriverException]
            )  # while one page follows another

            def shown(page: Any, text: str = expected) -> bool:
                return text in page.find_element("tag name", "main").text

            waiting.until(shown)
            assert f"{name}={value}" in browser.current_url
        browser.get(f"{address}?status=completed")
        links = [link.text for link in browser.find_elements("css selector", "main a")]
        assert links == ["order-0"]
        browser.find_element("link text", "order-0").click()
        rects = browser.find_elements("css selector", "rect")
        assert len(rects) > 7 and all(rect.size["width"] > 0 for rect in rects)
        for width in (390, 1280):
            browser.set_window_size(width, 900)
            assert browser.execute_script(
                "return document.documentElement.scrollWidth <= window.innerWidth"
            )
    assert browser.get_log("browser") == []


NOTEBOOK = """
import json, nbformat, sys
from nbclient import NotebookClient
cells = [nbformat.v4.new_code_cell(code) for code in sys.argv[1:]]
notebook = NotebookClient(nbformat.v4.new_notebook(cells=cells), timeout=60, kernel_name="python3").execute()
print(json.dumps([cell.outputs[0]["data"]["text/html"] if cell.outputs else "" for cell in notebook.cells]))
"""


def test_a_real_notebook_shows_what_is_stored(shop: Path) -> None:
    cells = [
        f"import sys; sys.path.insert(0, {str(HERE)!r}); import flowstore; store = flowstore.open('shop.db')",
        "store",
        "store.state",
        "store.state.timeline('order-0')",
        "store.flows.get('flow')",
    ]
    done = python("-c", NOTEBOOK, *cells, cwd=shop.parent)
    _, whole, state, timeline, flow = (Page(html or "").text for html in json.loads(done.stdout))
    assert "2 running" in whole and "1 waiting" in whole and "queues (2)" in whole
    assert "4 pending" in state and "1 waiting" not in state
    assert "completed, 3 attempts" in timeline and "<script>alert('x')</script>" in timeline
    assert "Flow" in flow and "<script>alert('x')</script>" in flow


def test_the_readme_shows_what_show_prints(tmp_path: Path) -> None:
    readme = (HERE / "README.md").read_text()
    ((code, command, said),) = re.findall(
        r"```python\n(import flowstore\nfrom datetime.*?)```\n\n`python flowstore\.py (show [^`]+)`[^`]*```text\n(.*?)```",
        readme,
        re.DOTALL,
    )
    python("-c", code, cwd=tmp_path)
    assert run(*command.split(), cwd=tmp_path).stdout == said


def test_the_items_of_an_execution_are_on_the_axis_of_its_timeline(store: Store) -> None:
    claimed(store, node_id="the node")
    assert "the node" in [step["name"] for step in store.state.timeline("e1")["steps"]]


# ==================================================================================================
# Command line
# ==================================================================================================


def test_the_quickstart_at_the_head_of_the_module_runs() -> None:
    result = doctest.testmod(flowstore)
    assert result.attempted > 5
    assert result.failed == 0


EXAMPLES = re.findall(
    r"```python\n((?:(?!```).)*)```\n\nIt prints `(.*?)`",
    (HERE / "README.md").read_text(),
    re.DOTALL,
)


@parametrize(("code", "said"), EXAMPLES)
def test_the_examples_of_the_readme_print_what_it_says(
    tmp_path: Path, code: str, said: str
) -> None:
    done = python("-c", code, cwd=tmp_path)
    assert (done.stdout.strip(), done.stderr) == (said, "")


def test_every_command_of_the_readme_is_there() -> None:
    for name in re.findall(r"python flowstore\.py (\w+)", (HERE / "README.md").read_text()):
        assert name in flowstore._COMMANDS


def test_a_copy_in_a_package_under_another_name_passes_its_selftest(tmp_path: Path) -> None:
    vendored = tmp_path / "app" / "_vendor"
    vendored.mkdir(parents=True)
    for folder in (vendored, vendored.parent):
        (folder / "__init__.py").touch()
    shutil.copy(flowstore.__file__, vendored / "store_copy.py")
    command = ["-S", "-W", "error", "-m", "app._vendor.store_copy", "selftest"]
    done = python(*command, cwd=tmp_path)
    assert re.fullmatch(r"(ok   .*\n)+\d+ passed, 0 failed\n", done.stdout)


def test_selftest_leaves_a_given_store_sound_and_its_items_alone(tmp_path: Path) -> None:
    with flowstore.open(tmp_path / "app.db") as store:
        write(store, "mine")
        enqueue(store, execution_id="mine", id="item")
    run("selftest", "--target", "app.db", cwd=tmp_path)
    with flowstore.open(tmp_path / "app.db") as store:
        item = store.state.get_work_item("item")
        assert item is not None
        assert item.status == "pending"
        assert store.events.count_events("mine") == 1
        assert store.check() == []


def test_selftest_says_which_promise_is_broken(tmp_path: Path) -> None:
    source = Path(flowstore.__file__).read_text()
    sound, broken = "execution_id, last + 1, tenant_id", "execution_id, last + 2, tenant_id"
    assert sound in source
    (tmp_path / "broken.py").write_text(source.replace(sound, broken))
    done = python("broken.py", "selftest", cwd=tmp_path, status=1)
    assert re.search(r"^FAIL threads: ", done.stdout, re.MULTILINE)


def test_demo_does_every_file_once_although_a_worker_is_killed(tmp_path: Path, files: Path) -> None:
    done = run("demo", files, cwd=tmp_path)
    assert re.search(r"killed worker-\S+, .* under fence 1", done.stdout)
    assert re.search(r"taken over: .* under fence 2", done.stdout)
    assert re.search(
        r"^6 files of .*, 0 known .*not read again.* --store", done.stdout, re.MULTILINE | re.DOTALL
    )
    assert "6 done exactly once, 0 dead letters, 0 lost; 1 taken over" in done.stdout
    with flowstore.open(tmp_path / "flowstore-demo.db", read_only=True) as store:
        assert store.check() == []
        (queue,) = store.stats()["queues"].values()
        assert queue == {"completed": 6}
    again = run("demo", files, cwd=tmp_path)
    assert "6 done exactly once" in again.stdout
    assert "killed" not in again.stdout


def test_demo_gives_up_a_file_that_cannot_be_read_and_does_the_others(
    tmp_path: Path, files: Path
) -> None:
    (files / "gone.txt").symlink_to("nowhere")
    done = run("demo", files, cwd=tmp_path, status=1)
    assert "6 done exactly once, 1 dead letter, 0 lost; 1 taken over" in done.stdout
    assert re.findall(r"  taken over (.+)", done.stdout) == ["1 time"]  # a retry is none
    assert "No such file" in done.stdout
    with flowstore.open(tmp_path / "flowstore-demo.db") as store:
        (dead,) = store.state.list_dead_letters()
        assert "No such file" in (dead.last_error or "")
        assert dead.attempt == dead.max_attempts


def test_demo_leaves_out_its_own_store_whatever_link_leads_to_it(files: Path) -> None:
    (files / "link").symlink_to("flowstore-demo.db")
    for _ in range(2):
        assert "6 files: 6 done exactly once" in run("demo", cwd=files).stdout


@needs_kill
def test_demo_goes_on_where_it_was_killed(tmp_path: Path, files: Path) -> None:
    for number in range(6, 60):
        (files / f"{number}.txt").write_text("word " * number)
    command = [sys.executable, flowstore.__file__, "demo", str(files)]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as demo:
        assert demo.stdout is not None
        for line in demo.stdout:
            if line.startswith("killed"):
                break
        demo.kill()
        demo.stdout.read()  # to its end: the workers that it has started have ended, too
    done = run("demo", files, cwd=tmp_path)
    assert "60 done exactly once, 0 dead letters, 0 lost" in done.stdout


WRONG_USES = """
demo nowhere
demo text.txt
prune app.db --older-than 9999999d
backup app.db :memory:
backup app.db sqlite:copy
backup app.db postgresql://me@localhost/app
backup app.db ftp://host/copy
nonsense
prune app.db
prune app.db --older-than 30
bench
prune app.db --older-than -1d
"""


NOTHING_TO_USE = """
demo --store .
demo --store text.txt
check .
check text.txt
check missing.db
check no/such/folder.db
backup app.db app.db
check ftp://host/app.db
check sqlite:app.db?x=1
compact text.txt
selftest --target .
prune missing.db --older-than 1d
"""


@parametrize(
    ("status", "line"),
    [
        *((2, line) for line in WRONG_USES.strip().split("\n")),
        (2, ""),
        *((1, line) for line in NOTHING_TO_USE.strip().split("\n")),
    ],
)
def test_bad_input_is_one_line_and_changes_nothing(tmp_path: Path, status: int, line: str) -> None:
    (tmp_path / "text.txt").write_text(
        "this is no database, but it is long enough to be one\n" * 30
    )
    flowstore.open(tmp_path / "app.db").close()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    done = run(*line.split(), cwd=tmp_path, status=status)
    assert re.fullmatch(r"flowstore: .+\n", done.stderr)
    assert {
        path: path.read_bytes()
        for path in tmp_path.rglob("*")
        if not path.name.startswith("app.db-")
    } == before


def test_check_backup_and_compact_from_the_command_line(tmp_path: Path) -> None:
    with flowstore.open(tmp_path / "app.db") as store:
        write(store, "e")
    assert "sound" in run("check", "app.db", cwd=tmp_path).stdout
    run("backup", "app.db", "copy.db", cwd=tmp_path)
    run("compact", "copy.db", cwd=tmp_path)
    with flowstore.open(tmp_path / "copy.db", read_only=True) as copy:
        assert copy.events.count_events("e") == 1
    plain = sqlite3.connect(tmp_path / "copy.db")
    plain.execute("UPDATE flowstore_log SET sequence = 5")
    plain.commit()
    plain.close()
    assert re.search(
        r"'e' has a gap\ncopy.db: 1 problem\n  file  ",
        run("check", "copy.db", cwd=tmp_path, status=1).stdout,
    )


def test_check_ends_with_lines_of_health(tmp_path: Path) -> None:
    with flowstore.open(tmp_path / "app.db") as store:
        store.events.append_batch("e1", "default", [EVENT] * 1200)
        write(store, "other")
        ids = [enqueue(store) for _ in range(3)]
        store.state.move_to_dead_letter(ids[0], "no")
        _, item = [claim(store, lease_seconds=left) for left in (1000, 500)]
        stats = store.stats()
        said = run("check", "app.db", cwd=tmp_path).stdout
        shown = json_of("check", "app.db", cwd=tmp_path)
    first = f"{item.lease_expires_at:%Y-%m-%d %H:%M:%S}"
    assert re.fullmatch(
        rf"""app.db: sound
  file +[\d.]+ MB
  wal +[\d.]+ MB
  free +[\d.]+ MB
  longest recent log +1,200 events of e1
  dead letters +1
  oldest lease +expires at {first}, in queue q
  sqlite +SQLite {sqlite3.sqlite_version}.*
""",
        said,
    )
    assert shown["problems"] == [] and list(shown) == ["store", "problems", "health"]
    known = {name: stats[name] for name in ("file_bytes", "wal_bytes", "free_bytes")}
    assert shown["health"].items() >= (known | {"dead_letters": 1}).items()


def test_check_names_a_lease_that_no_worker_takes_back(tmp_path: Path) -> None:
    for hours, status in ((0.5, 0), (3, 1)):
        then = datetime.now(UTC) - timedelta(hours=hours)
        with flowstore.open(tmp_path / "app.db", clock=partial(max, then, then)) as store:
            claimed(store)
        said = run("check", "app.db", cwd=tmp_path, status=status).stdout
        assert re.search(r"(?m)^  oldest lease +expired at .*, in queue q$", said)
    assert re.match(r"the oldest lease expired at .*, in queue q: .*\napp.db: 1 problem\n", said)


def test_check_names_what_makes_no_sense_in_the_queue(tmp_path: Path) -> None:
    with flowstore.open(tmp_path / "app.db") as store:
        claimed(store)
    for value in ("'soon'", "9e300", "-9223372036854775808"):
        with closing(sqlite3.connect(tmp_path / "app.db")) as plain:
            plain.execute(f"UPDATE flowstore_work_items SET lease_expires_at = {value}")
            plain.commit()
        done = run("check", "app.db", cwd=tmp_path, status=1)
        assert "app.db: 1 problem\n" in done.stdout and done.stderr == ""


def test_check_names_a_log_that_nobody_could_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with flowstore.open(tmp_path / "app.db") as store:
        write(store, "e")
        bytes_now = store.stats()["wal_bytes"]
        for bound, status in ((bytes_now / 4, 0), ((bytes_now - 1) / 4, 1)):
            monkeypatch.setattr(flowstore, "_WAL_BOUND", bound)
            assert flowstore.main(["check", str(tmp_path / "app.db")]) == status
    assert re.search(r"(?m)^the log has .* MB: .*", capsys.readouterr().out)


@parametrize("command", ["check", "selftest"])
def test_a_sqlite_with_the_wal_reset_bug_is_named_and_is_no_failure(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    flowstore.open(tmp_path / "app.db").close()
    option = ["--target"] if command == "selftest" else []
    for version, has_bug in (
        ((3, 40, 1), True),
        ((3, 44, 5), True),
        ((3, 44, 6), False),
        ((3, 45, 0), True),
        ((3, 50, 6), True),
        ((3, 50, 7), False),
        ((3, 50, 9), False),
        ((3, 51, 2), True),
        ((3, 51, 3), False),
        ((3, 52, 0), False),
    ):
        monkeypatch.setattr(sqlite3, "sqlite_version_info", version)
        assert ("WAL-reset bug" in flowstore._sqlite_note()) == has_bug, version
    for version in ((3, 51, 2), (3, 51, 3)):
        monkeypatch.setattr(sqlite3, "sqlite_version_info", version)
        assert flowstore.main([command, *option, str(tmp_path / "app.db")]) == 0
        assert ("WAL-reset bug" in capsys.readouterr().out) == (version == (3, 51, 2))


def test_prune_from_the_command_line(tmp_path: Path) -> None:
    with flowstore.open(
        tmp_path / "app.db", clock=lambda: datetime(2000, 1, 1, tzinfo=UTC)
    ) as store:
        for number in range(3):
            create(store, f"e{number}", status="failed")
        write(store, "open")
    said = run("prune", "app.db", "--older-than", "999999d", cwd=tmp_path).stdout
    assert said == "app.db: dropped nothing\n"
    for _ in range(2):
        dry = json_of("prune", "app.db", "--older-than", "30d", "--dry-run", cwd=tmp_path)
        assert (dry["dry_run"], dry["pruned"]["executions"]) == (True, 3)
    done = json_of("prune", "app.db", "--older-than", "30d", cwd=tmp_path)
    assert done == dry | {"dry_run": False}
    with flowstore.open(tmp_path / "app.db") as store:
        assert store.events.list_executions() == ["open"] and store.check() == []


def test_a_dry_run_of_prune_changes_nothing_of_an_older_file(of_version_1: Path) -> None:
    before = of_version_1.read_bytes()
    said = run("prune", of_version_1, "--older-than", "30d", "--dry-run", status=1).stderr
    assert "older version" in said
    assert of_version_1.read_bytes() == before


def test_prune_drops_artifacts_when_it_is_told_to(tmp_path: Path) -> None:
    then = datetime(2000, 1, 1, tzinfo=UTC)
    with flowstore.open(tmp_path / "app.db", clock=lambda: then) as store:
        kept = store.state.put_artifact(b"data").hash
    prune = ["prune", "app.db", "--older-than", "8w"]
    assert run(*prune, cwd=tmp_path).stdout == "app.db: dropped nothing\n"
    dry = run(*prune, "--artifacts", "--dry-run", cwd=tmp_path).stdout
    assert dry == "app.db: would drop 1 artifact\n"
    with flowstore.open(tmp_path / "app.db") as store:
        assert store.state.get_artifact(kept) == b"data"
    assert run(*prune, "--artifacts", cwd=tmp_path).stdout == "app.db: dropped 1 artifact\n"
    with flowstore.open(tmp_path / "app.db") as store:
        assert store.state.get_artifact(kept) is None


def test_every_row_of_the_bench_measures_something_and_one_that_misses_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    begin = Bench.__init__

    def tiny(self: Bench, *args: Any) -> None:
        begin(self, *args)
        self.rounds, self.seconds, self.depth = 1, 0.01, 50

    monkeypatch.setattr(Bench, "__init__", tiny)
    monkeypatch.setitem(BENCH_ROWS, "never", lambda bench: under(1, "ms", [2, 1, 3]))
    assert bench_command(["bench", "--json", "--target", str(tmp_path / "app.db")]) == 1
    found = json.loads(capfd.readouterr().out)
    assert len(found["rows"]) == len(BENCH_ROWS) >= 20
    assert all(row["measured"] and row["said"] for row in found["rows"])
    assert all(
        row["measured"][0] > 0
        for row in found["rows"]
        if not row["name"].startswith(("iter_events", "a claim and a tail"))
    )
    assert found["rows"][-1] == {
        "name": "never",
        "holds": False,
        "said": "2.00 ms (under 1)",
        "measured": [2],
    }
    assert found["holds"] is False
    assert "SQLite" in found["machine"] and list(tmp_path.iterdir()) == []


def test_the_bench_runs_where_neither_pytest_nor_hypothesis_is_installed(tmp_path: Path) -> None:
    command = [sys.executable, "-S", __file__, "bench", "--quick", "--only", "4 processes"]
    path = {"PYTHONPATH": str(Path(flowstore.__file__).parent)}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=tmp_path, env=os.environ | path
    )
    assert done.stderr == ""
    assert re.search(
        r"^(holds |MISSES) 4 processes x 4 threads, FULL: [\d.]+ x plain FULL at [\d,]+/s "
        r"\(at least 1.0\); [\d,]+/s, no error, longest call [\d,]+ ms\n\d hold, \d missed$",
        done.stdout,
        re.MULTILINE,
    )


@parametrize("arguments", [[], ["test"], ["bench", "--target", ":memory:"]])
def test_a_wrong_use_of_the_bench_is_refused(
    arguments: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench_command(arguments)
    assert "error: " in capfd.readouterr().err


@parametrize("closed", ["1", "2"])
@parametrize(
    "command",
    [
        "show app.db",
        "report app.db",
        "metrics app.db",
        "check app.db",
        "prune app.db --older-than 30d",
    ],
)
def test_a_command_does_without_its_closed_output(
    tmp_path: Path, command: str, closed: str
) -> None:
    with flowstore.open(tmp_path / "app.db") as store:
        write(store, "run")
    line = f"exec {shlex.quote(sys.executable)} {shlex.quote(flowstore.__file__)} {command} {closed}>&-"
    done = subprocess.run(line, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stdout + done.stderr


def test_version_is_the_modules(tmp_path: Path) -> None:
    assert run("--version", cwd=tmp_path).stdout == f"flowstore {flowstore.__version__}\n"


def test_an_older_python_is_told_in_one_line_which_it_has_to_be() -> None:
    code = f"import runpy, sys; sys.version_info = (3, 10); runpy.run_path({flowstore.__file__!r}, run_name='__main__')"
    done = python("-c", code, status=1)
    assert done.stderr == "flowstore: Python 3.11 or newer is needed\n"


def test_importing_does_nothing_and_is_cheap_in_modules() -> None:
    """What makes an import slow is what it imports; the milliseconds are in bench."""
    code = f"""if True:
        import sys; sys.path.insert(0, {str(HERE)!r})
        known = set(sys.modules); import flowstore; print(*set(sys.modules) - known)
        import threading; print(threading.active_count())"""
    done = python("-I", "-W", "error", "-c", code)
    modules, threads = done.stdout.splitlines()
    assert (threads, done.stderr) == ("1", "")
    heavy = (
        "asyncio|argparse|concurrent.futures|html|http|multiprocessing|psycopg|subprocess|tempfile"
    )
    heavy += "|typing_extensions|unittest|urllib.request|uuid"
    assert not [name for name in modules.split() if re.fullmatch(heavy, name)]


def schema_cli(database: sqlite3.Connection) -> list[str]:
    return sorted(
        " ".join(sql.split()) for (sql,) in database.execute("SELECT sql FROM sqlite_master") if sql
    )


def test_a_file_of_version_1_opens_with_all_that_is_in_it_and_todays_tables(
    of_version_1: Path, tmp_path: Path
) -> None:
    with flowstore.open(of_version_1) as store:
        [stored] = store.events.load_events("order-1")
        assert stored.event == {"type": "custom", "note": "kept"}
        assert claim(store, "mail").id == "item-1"
        assert store.check() == []
    flowstore.open(tmp_path / "new.db").close()
    with (
        closing(sqlite3.connect(of_version_1)) as upgraded,
        closing(sqlite3.connect(tmp_path / "new.db")) as new,
    ):
        # Columns were added to these two.
        grown = ("CREATE TABLE flowstore_work_items", "CREATE TABLE flowstore_artifacts")
        assert [sql for sql in schema_cli(upgraded) if not sql.startswith(grown)] == [
            sql for sql in schema_cli(new) if not sql.startswith(grown)
        ]
        for table, dropped in (
            ("flowstore_work_items", {("dead_lettered_at",)}),
            ("flowstore_artifacts", set()),
        ):
            columns = f"SELECT name FROM pragma_table_info('{table}')"
            assert {*upgraded.execute(columns)} == {*new.execute(columns)} | dropped


def test_items_of_version_1_have_ended_when_they_were_available(of_version_1: Path) -> None:
    with closing(sqlite3.connect(of_version_1)) as old, old:
        for status, dead in (("completed", None), ("failed", None), ("dead_lettered", 7)):
            names = [str(row[1]) for row in old.execute("PRAGMA table_info(flowstore_work_items)")]
            new = {"id": f"'{status}'", "status": f"'{status}'", "available_at": "5"}
            new["dead_lettered_at"] = str(dead or "NULL")
            old.execute(
                f"""INSERT INTO flowstore_work_items ({", ".join(names)})
                SELECT {", ".join(new.get(name, name) for name in names)}
                FROM flowstore_work_items LIMIT 1"""
            )
    with flowstore.open(of_version_1) as store:
        ended = {
            str(status): [item.settled_at for item in store.state.list_work_items(status=status)]
            for status in WorkItemStatus
        }
        assert ended["completed"] == ended["failed"] == [datetime(1970, 1, 1, 0, 0, 0, 5, UTC)]
        assert [letter.dead_lettered_at for letter in store.state.list_dead_letters()] == [
            datetime(1970, 1, 1, 0, 0, 0, 7, UTC)
        ]
        assert set(ended["pending"]) == {None} and store.check() == []


def test_a_copy_into_memory_is_refused(shop: Path) -> None:
    assert "memory" in run("copy", shop, ":memory:", status=2).stderr


def test_a_copy_compares_every_row_of_a_long_table(tmp_path: Path) -> None:
    with flowstore.open(tmp_path / "a.db") as store:
        store.events.append_batch("e", "default", [EVENT | {"n": n} for n in range(700)])
    run("copy", "a.db", "b.db", cwd=tmp_path)
    with closing(sqlite3.connect(tmp_path / "b.db")) as plain:
        plain.execute('UPDATE flowstore_log SET event = \'{"type":"x"}\' WHERE sequence = 650')
        plain.commit()
    run("copy", "a.db", "b.db", cwd=tmp_path, status=1)


def test_a_copy_that_went_on_compares_every_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = (str(tmp_path / name) for name in ("one.db", "two.db"))
    with flowstore.open(one) as store:
        store.events.append_batch("e", "default", [EVENT] * 600)
    assert flowstore.main(["copy", one, two]) == 0
    with flowstore.open(
        two
    ) as store:  # as if the copy had been broken off, and a row changed since
        execute(store, "INSERT INTO flowstore_meta (key, value) VALUES ('copying', '')")
        execute(store, "UPDATE flowstore_log SET timestamp = timestamp + 1 WHERE sequence = 590")
    assert flowstore.main(["copy", one, two]) == 1
    assert "other than the source in flowstore_log" in capsys.readouterr().out


# ==================================================================================================
# PostgreSQL
# ==================================================================================================


CLAIMER = """
with flowstore.open(sys.argv[1]) as store:
    while item := store.state.claim_work_item("w", sys.argv[2].split(",")):
        store.state.complete_work_item(item)
        print(item.id, flush=True)
"""


APPENDER = """
with flowstore.open(sys.argv[1]) as store:
    for number in range(int(sys.argv[3])):
        print(store.events.append(sys.argv[2], "default", {"type": "t", "pid": os.getpid()}), flush=True)
"""


@pytest.fixture
def two_stores(postgres: PostgresServer, clock: Clock) -> Iterator[tuple[Store, Store]]:
    """Two stores on one schema, with one clock."""
    options: dict[str, Any] = {"clock": clock, "lease_seconds": 10, "synchronous": "OFF"}
    with (
        flowstore.open(postgres.target(), **options) as one,
        flowstore.open(one.target, **options) as other,
    ):
        create(one)
        yield one, other


@postgres_only
def test_a_claim_of_several_queues_locks_no_other_item_than_its_own(
    two_stores: tuple[Store, Store],
) -> None:
    store, other = two_stores
    for queue, priority in (("a", 50), ("b", 10), ("b", 5), ("c", 1), ("d", 50), ("d", 40)):
        enqueue(store, queue_type=queue, priority=priority)
    with store.transaction():
        assert claim(store, "a", "b").priority == 50
        assert claim(other, "b").priority == 10
        batch = store.state.claim_work_items("w", ["c", "d"], 2)
        assert [item.priority for item in batch] == [50, 40]
        assert claim(other, "c").priority == 1


@postgres_only
def test_an_item_that_is_being_claimed_hides_no_other_one_of_its_queue(
    two_stores: tuple[Store, Store],
) -> None:
    store, other = two_stores
    for queue, priority in (("a", 10), ("a", 5), ("b", 0)):
        enqueue(store, queue_type=queue, priority=priority)
    with store.transaction():
        assert claim(store, "a").priority == 10
        assert claim(other, "a", "b").priority == 5


@postgres_only
def test_an_enqueue_that_keeps_the_holder_of_its_key_hides_it_from_no_claim(
    two_stores: tuple[Store, Store],
) -> None:
    store, other = two_stores
    id = enqueue(store, unique_key="k", priority=10)
    enqueue(store)
    again = WorkItem(execution_id="e1", queue_type="q", unique_key="k")
    with store.transaction():
        assert store.state.enqueue_work_item(again, on_conflict="keep") == id
        assert claim(other).id == id


@postgres_only
def test_a_block_that_counted_the_leases_before_another_claim_is_refused(
    two_stores: tuple[Store, Store],
) -> None:
    store, other = two_stores
    store.state.set_queue_policy(QueuePolicy(queue_type="q", max_running=1))
    enqueue(store)

    def block() -> None:
        with store.transaction():
            store.flows.get("what a block reads first sets its snapshot")
            enqueue(other, priority=10)
            claim(other)
            claim(store)

    with pytest.raises(StoreBusy):
        block()
    assert len(store.state.list_work_items(status="claimed")) == 1


@postgres_only
@parametrize("policy", [False, True])
def test_a_claim_that_has_waited_has_a_whole_lease(
    two_stores: tuple[Store, Store], clock: Clock, policy: bool
) -> None:
    store, other = two_stores
    if policy:
        store.state.set_queue_policy(QueuePolicy(queue_type="q", max_running=9))
    put(store, 2 if policy else 1)
    with pytest.raises(Stop), store.transaction():
        claim(store)
        waiting = Caller(lambda: claim(other))
        until(waiting.waits)
        clock.advance(60)
        raise Stop
    item = waiting.result()
    assert (item.claimed_at, item.lease_expires_at) == (clock.now, clock.now + seconds(10))


@postgres_only
def test_a_waiting_claim_does_not_spin_while_an_expired_lease_is_locked(
    two_stores: tuple[Store, Store], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, other = two_stores
    item = claimed(store)
    clock.advance(60)
    asked: list[datetime] = []

    def ask(self: Clock) -> datetime:
        asked.append(self.now)
        return self.now

    with store.transaction():
        store.state.renew_lease(item)
        monkeypatch.setattr(Clock, "__call__", ask)
        assert in_thread(lambda: other.state.claim_work_item("w", ["q"], wait=1)) is None
    assert len(asked) < 200, "each look asks the clock a few times"


@postgres_only
def test_the_positions_of_a_run_follow_its_sequences_and_a_tail_misses_none(
    server: Store,
) -> None:
    tail = server.events.tail(0, timeout=30, execution_id="run")
    with server.run("run") as run:

        def steps(me: int) -> None:
            for n in range(25):
                run.step(f"{me}.{n}", str, n)

        crowd(4, steps)
    found = [next(tail).sequence for _ in range(102)]
    assert found == [*range(1, 103)]
    assert [stored.sequence for stored in server.events.read_all()] == found


@postgres_only
def test_a_tail_that_began_behind_many_uncommitted_numbers_goes_on(
    two_stores: tuple[Store, Store],
) -> None:
    store, other = two_stores
    with store.transaction():
        store.flows.insert(Flow(id="older than all that follows"))
        other.events.append_batch("e", "default", [EVENT] * 1100)
        tails = [other.events.tail(timeout=0, execution_id=run) for run in ("e", None)]
        write(other, "e", "new")
    assert [keys_in([*tail]) for tail in tails] == [["new"], ["new"]]


@postgres_only
def test_in_a_block_read_all_shows_no_event_before_one_that_may_still_come(
    two_stores: tuple[Store, Store],
) -> None:
    store, other = two_stores
    with store.transaction():  # so many that both blocks are on other pages of each index
        for n in range(2000):
            write(store, f"seed-{n:05}")
    last = store.events.read_all(limit=3000)[-1].position

    def project() -> list[str]:
        with other.transaction():
            write(other, "seed-01999", "mine")
            return keys_in(other.events.read_all(last))

    with store.transaction():
        write(store, "seed-00001", "slow")
        assert in_thread(project) == []
    assert project() == ["slow", "mine", "mine"]


@postgres_only
@parametrize("queues", ["a", "b,a,c"])
def test_eight_processes_claim_each_item_once(postgres: PostgresServer, queues: str) -> None:
    target, wanted = postgres.target(), []
    with flowstore.open(target) as store:
        create(store)
        for _ in range(4):
            with store.transaction():
                wanted += [
                    enqueue(store, queue_type=queue)
                    for queue in queues.split(",")
                    for _ in range(40)
                ]
        claimers = [script(CLAIMER, target, queues) for _ in range(8)]
        assert sorted(" ".join(map(finished, claimers)).split()) == sorted(wanted)
        assert store.stats()["tables"]["flowstore_work_items"] == len(wanted)


@postgres_only
@parametrize("tenant", [None, "acme"])
@parametrize("queues", [["none"], ["none", "b"], ["a", "b", "c"]])
def test_a_claim_on_a_server_looks_at_few_pages_whatever_waits_or_is_leased_elsewhere(
    server: Store, tenant: str | None, queues: list[str]
) -> None:
    create(server)
    item = enqueue(server, queue_type="other")
    with server.transaction() as tx:
        names = [
            name
            for (name,) in tx.execute(
                "SELECT attname FROM pg_attribute WHERE attrelid = 'flowstore_work_items'::regclass AND attnum > 0"
            )
        ]
        for status in ("pending", "claimed"):
            new = {
                "id": f"'{status}-' || n",
                "status": f"'{status}'",
                "lease_expires_at": "n",
                "available_at": "n",
            }
            tx.execute(
                f"""INSERT INTO flowstore_work_items ({", ".join(names)}) SELECT
                {", ".join(new.get(str(name), str(name)) for name in names)}
                FROM generate_series(1, 20000) n CROSS JOIN flowstore_work_items WHERE id = ?""",
                (item,),
            )
    with server.transaction() as tx:
        places = [*queues, 2**50, *queues, *queues, 0, 2**50]
        if len(queues) == 1:
            places = [*queues, *queues, 2**50, *queues, *queues, 0]
        looks: list[tuple[Any, list[Any]]] = [
            (flowstore._claim_sql(len(queues), 0), [2**41, "w", 2**40, *places])
        ]
        for queue in queues:
            looks.append((flowstore._NEXT_LEVEL, [queue, 101]))
            looks.append((flowstore._available_sql(0, "{skip_locked}"), [queue, 0, 2**50, 1]))
        for sql, values in looks:
            for place in sql.places if tenant else ():
                values.insert(place, tenant)
            text = sql[flowstore._POSTGRES][tenant is not None]
            [([plan],)] = tx.execute(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {text}", values)
            assert plan["Plan"]["Shared Hit Blocks"] + plan["Plan"]["Shared Read Blocks"] < 60


@postgres_only
@parametrize("undone", [True, False])
def test_a_claim_waits_for_another_claim_of_the_last_item_which_may_be_undone(
    server: Store, undone: bool
) -> None:
    item = enqueue(server)
    with suppress(ZeroDivisionError), server.transaction() as tx:
        assert claim(server).id == item
        other = Caller(lambda: server.state.claim_work_item("other", ["q"]))
        until(lambda: tx.execute("SELECT 1 FROM pg_locks WHERE NOT granted"), "a waiting claim")
        if undone:
            raise ZeroDivisionError
    found = other.result()
    assert (found and found.id) == (item if undone else None)


@postgres_only
def test_of_two_retries_of_one_claim_the_later_waits_and_counts_no_attempt(server: Store) -> None:
    item = claimed(server)
    with server.transaction() as tx:
        server.state.retry_work_item(item.id, delay=0)
        other = Caller(lambda: server.state.retry_work_item(item.id))
        until(lambda: tx.execute("SELECT 1 FROM pg_locks WHERE NOT granted"), "a waiting retry")
    with pytest.raises(LeaseLost):
        other.result()
    assert look(server, item.id).attempt == 1


@postgres_only
def test_no_marker_of_a_statement_is_left_to_an_engine() -> None:
    statements = [value for value in vars(flowstore).values() if isinstance(value, flowstore._Sql)]
    statements += [flowstore._claim_sql(1, 0), flowstore._claim_sql(2, 0)]
    marked = {marker for sql in statements for marker in re.findall(r"{\w+}", sql.text)}
    assert {"{tenant}", "{in_order}", "{skip_locked}"} <= marked
    assert flowstore._SQLITE.markers.keys() == flowstore._POSTGRES.markers.keys()
    for dialect in (flowstore._SQLITE, flowstore._POSTGRES):
        for sql in statements:
            for text in sql[dialect]:
                assert not re.search(r"{\w+}", text)


@postgres_only
@parametrize("executions", [1, 4])
def test_processes_append_side_by_side_without_a_gap_and_a_reader_of_all_misses_none(
    postgres: PostgresServer, executions: int
) -> None:
    target = postgres.target()
    with flowstore.open(target) as store:
        appenders = [script(APPENDER, target, f"e{number % executions}", 60) for number in range(4)]
        seen: list[StoredEvent] = []
        while len(seen) < 240:
            assert any(appender.poll() in (None, 0) for appender in appenders)
            seen += store.events.read_all(seen[-1].position if seen else 0, 7)
        told = list(map(finished, appenders))
        assert sorted(map(int, " ".join(told).split())) == sorted(
            [*range(1, 240 // executions + 1)] * executions
        )
        assert seen == sorted(seen, key=lambda stored: stored.position) == store.events.read_all()
        for number in range(executions):
            log = store.events.load_events(f"e{number}")
            assert [stored.sequence for stored in log] == list(range(1, 240 // executions + 1))


@postgres_only
def test_a_reader_of_all_waits_for_what_commits_later_with_a_lower_position(server: Store) -> None:
    with held_block(server, partial(write, server, "slow")):
        write(server, "fast")
        assert server.events.count_events("fast") == 1
        assert server.events.read_all() == []
        tails = [server.events.tail(timeout=0, execution_id=run) for run in (None, "fast", "slow")]
    assert [[stored.execution_id for stored in tail] for tail in tails] == [["slow"], [], ["slow"]]
    assert [stored.execution_id for stored in server.events.read_all()] == ["slow", "fast"]


@postgres_only
def test_what_a_killed_client_was_told_is_stored(postgres: PostgresServer) -> None:
    target = postgres.target()
    with flowstore.open(target) as store:
        appender = script(APPENDER, target, "e1", 10**6)
        assert appender.stdout is not None
        told = [int(appender.stdout.readline()) for _ in range(20)]
        appender.kill()
        told += map(int, appender.communicate()[0].split("\n")[:-1])
        assert told == list(range(1, len(told) + 1))
        assert [stored.sequence for stored in store.events.load_events("e1")][: len(told)] == told
        assert write(store, "e1") >= len(told) + 1
        assert store.check() == []


@contextmanager
def held_block(store: Store, call: Call = bool) -> Iterator[Callable[[], None]]:
    """Another thread has made a call in a transaction, which ends with this block, or when it is told to."""
    begun, ended = threading.Event(), threading.Event()

    def hold() -> None:
        with store.transaction():
            call()
            begun.set()
            assert ended.wait(60)

    def end() -> None:
        ended.set()
        block.result()

    block = Caller(hold)
    assert begun.wait(60)
    try:
        yield end
    finally:
        end()


class LossyLine:
    """A way to a server on which, once `cut`, the next answer is lost and the connection with it."""

    def __init__(self, port: int) -> None:
        self.there, self.cut = port, False
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        with suppress(OSError):
            while True:
                ends = (
                    self.listener.accept()[0],
                    socket.create_connection(("127.0.0.1", self.there)),
                )
                lost = threading.Event()
                for asks, (source, sink) in enumerate([ends[::-1], ends]):
                    threading.Thread(
                        target=self.pump, args=(source, sink, lost, bool(asks)), daemon=True
                    ).start()

    def pump(
        self, source: socket.socket, sink: socket.socket, lost: threading.Event, asks: bool
    ) -> None:
        with suppress(OSError), source, sink:
            while data := source.recv(1 << 16):
                if asks and self.cut:
                    self.cut = False
                    lost.set()
                elif not asks and lost.is_set():
                    sink.shutdown(socket.SHUT_RDWR)
                    return
                sink.sendall(data)


@postgres_only
def test_what_is_done_to_an_item_whose_answer_is_lost_is_done_again_or_in_doubt(
    postgres: PostgresServer,
) -> None:
    line = LossyLine(postgres.port)
    with flowstore.open(postgres.target().replace(f":{postgres.port}/", f":{line.port}/")) as store:
        first, second, third = [enqueue(store) for _ in range(3)]
        line.cut = True
        item = claim(store)
        assert item.id == second  # that of the lost answer waits for the end of its lease
        assert look(store, first).status is WorkItemStatus.CLAIMED
        line.cut = True
        assert (
            store.state.renew_lease(item, lease_seconds=60) == look(store, item.id).lease_expires_at
        )
        line.cut = True
        with pytest.raises(StorageError, match="look whether") as caught:
            store.state.complete_work_item(item)
        assert isinstance(caught.value.__cause__, LeaseLost)
        assert look(store, item.id).status is WorkItemStatus.COMPLETED
        line.cut = True
        assert (
            store.state.fail_work_item(third, "no").status is WorkItemStatus.FAILED
        )  # without a fence: no harm
        assert not line.cut
    line.listener.close()


@postgres_only
def test_acknowledged_writes_survive_a_crash_of_the_server_and_the_store_goes_on() -> None:
    with tempfile.TemporaryDirectory(prefix="flowstore-pg-", ignore_cleanup_errors=True) as folder:
        os.chmod(folder, 0o755)
        server = PostgresServer(Path(folder))
        try:
            with flowstore.open(server.target()) as store:
                stored, doubtful, done = list[str](), set[str](), threading.Event()

                def work(me: int) -> None:
                    for number in itertools.count():
                        key = f"{me}.{number}"
                        try:
                            store.events.append(f"e{me}", "default", EVENT, event_id=key)
                            stored.append(key)
                        except StorageError as error:
                            if "during COMMIT" in str(error):
                                doubtful.add(key)
                            time.sleep(0.01)
                        if done.is_set():
                            return

                threads = [Caller(partial(work, me)) for me in range(4)]
                waiters = [
                    Caller(partial(store.state.claim_work_item, "w", ["q"], wait=600.0)),
                    Caller(partial(next, store.events.tail(execution_id="news"))),
                ]
                for _ in range(2):
                    before = len(stored)
                    while len(stored) < before + 100:
                        time.sleep(0.01)
                    with pytest.raises(StoreBusy), store.transaction():
                        write(store, "block")
                        server.stop("immediate")
                        server.start()
                done.set()
                for thread in threads:
                    thread.result()
                item = enqueue(store)
                write(store, "news")
                claimed, told = [waiter.result() for waiter in waiters]
                assert (claimed.id, told.execution_id) == (item, "news")
                there = {one.id for one in store.events.read_all(limit=10**6)} - {None}
                assert there - doubtful == set(stored)
                assert not store.events.execution_exists("block")
                assert store.check() == []
        finally:
            server.stop("immediate")


@postgres_only
def test_a_commit_whose_listeners_cannot_be_told_is_a_commit(server: Store) -> None:
    engine: Any = server._engine
    engine.schema += '", ' + "'" + 9000 * "x" + "'--"  # more than NOTIFY takes
    assert write(server, "e1") == 1
    with server.transaction():
        write(server, "e1")
    assert server.events.count_events("e1") == 2


@postgres_only
def test_a_signal_handler_may_wait_while_the_call_that_it_interrupts_does(server: Store) -> None:
    waited: list[object] = []

    def wait(*_: object) -> None:
        waited.append(server.state.claim_work_item("w", ["q"], wait=0.3))

    before = signal.signal(signal.SIGALRM, wait)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        assert server.state.claim_work_item("w", ["q"], wait=1.5) is None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert waited == [None]


def wait_for_a_server_in_frozen_time(target: str) -> None:
    import freezegun

    freezegun.freeze_time("2026-01-05").start()
    with flowstore.open(target) as store:
        calls: list[Call] = [
            partial(store.state.claim_work_item, "w", ["q"], wait=0.2),
            partial(list, store.events.tail(timeout=0.2)),
        ]
        for call in calls:
            assert not Caller(call).outcome(20)


@postgres_only
def test_a_wait_for_a_server_ends_while_time_is_frozen(postgres: PostgresServer) -> None:
    in_child(wait_for_a_server_in_frozen_time, postgres.target())


@postgres_only
def test_a_connection_that_was_not_made_is_not_kept(postgres: PostgresServer) -> None:
    target = postgres.target()
    flowstore.open(target).close()
    with flowstore.open(target) as store:
        pool = store._engine.pool
        held = [pool.check_out() for _ in range(3)]
        held[1].use()
        for connection in held:
            pool.check_in(connection)
        assert held[1] in pool.idle
        assert all(connection.tx is not None for connection in pool.idle)


@postgres_only
def test_a_row_that_a_table_of_others_refers_to_is_kept_and_the_rest_goes(
    postgres: PostgresServer,
) -> None:
    """The user of the store may not even see that table."""
    target = postgres.target()
    with flowstore.open(target) as store:
        for id in ("billed", "free"):
            store.flows.insert(Flow(id=id, status=FlowStatus.FINISHED))
        schema = store._engine.schema
    database, name = target.split("?")[0].rsplit("/", 1)[1], f"others_{schema}"
    with postgres.connected(database) as db:
        db.execute(f"CREATE SCHEMA {name}")
        db.execute(f"CREATE TABLE {name}.bills (flow TEXT REFERENCES {schema}.flows (id))")
        db.execute(f"INSERT INTO {name}.bills VALUES ('billed')")
        db.execute(f"CREATE ROLE {name}")
        db.execute(f"GRANT ALL ON SCHEMA {schema} TO {name}")
        db.execute(f"GRANT ALL ON ALL TABLES IN SCHEMA {schema} TO {name}")
    later = Clock(datetime.now(UTC) + timedelta(days=2))
    with flowstore.open(f"{target}&options=-c%20role%3D{name}", clock=later) as store:
        assert store.prune(timedelta(days=1))["flows"] == 1
        assert store.flows.get("billed") is not None
        assert store.flows.get("free") is None
    with postgres.connected(database) as db:
        db.execute(f"DROP SCHEMA {name} CASCADE")
        db.execute(f"DROP OWNED BY {name}")
        db.execute(f"DROP ROLE {name}")


@postgres_only
def test_settings_of_the_database_change_no_numbers(postgres: PostgresServer) -> None:
    target = postgres.target() + "&options=-c%20extra_float_digits%3D0"
    with flowstore.open(target) as store:
        put(store, 3)
        store.state.set_queue_policy(QueuePolicy(queue_type="q", rate=0.1 + 0.2, per_seconds=1 / 3))
        policy = store.state.get_queue_policy("q")
        assert policy is not None
        assert (policy.rate, policy.per_seconds) == (0.1 + 0.2, 1 / 3)
        claim(store)


@postgres_only
def test_a_database_that_lacks_characters_is_refused(postgres: PostgresServer) -> None:
    for encoding in ("LATIN1", "SQL_ASCII"):
        with postgres.connected("postgres") as db:
            db.execute(
                f"CREATE DATABASE {encoding} ENCODING '{encoding}' TEMPLATE template0 "
                "LC_COLLATE 'C' LC_CTYPE 'C'"
            )
        with pytest.raises(StorageError, match=encoding):
            flowstore.open(f"{postgres.url}/{encoding.lower()}")


@postgres_only
def test_of_two_that_create_a_table_one_is_busy(server: Store, postgres: PostgresServer) -> None:
    create_mine = "CREATE TABLE IF NOT EXISTS mine (id INTEGER)"
    created, other = threading.Event(), threading.Event()

    def second() -> None:
        assert created.wait(20)
        with server.transaction() as tx:
            other.set()
            tx.execute(create_mine)

    later = Caller(second)
    with server.transaction() as tx:
        tx.execute(create_mine)
        created.set()
        assert other.wait(20)
        until(later.waits)
    assert isinstance(later.outcome(), StoreBusy)


@postgres_only
def test_a_block_that_loses_is_busy_with_nothing_written_and_may_be_run_again(
    server: Store,
) -> None:
    flow = flow_with(server)

    def block() -> Flow:
        with server.transaction():
            read = server.flows.get(flow.id)
            assert read is not None
            write(server, "e1")
            if not server.events.execution_exists("other"):
                in_thread(
                    lambda: (
                        server.flows.update_with_revision(flow),
                        server.events.append("other", "t", EVENT),
                    )
                )
            return server.flows.update_with_revision(read)

    with pytest.raises(StoreBusy):
        block()
    assert not server.events.execution_exists("e1")
    assert block().revision == 2
    assert server.events.count_events("e1") == 1


@postgres_only
def test_after_it_has_lost_nothing_more_can_be_done_in_a_block(server: Store) -> None:
    flow = flow_with(server)
    with pytest.raises(StorageError), server.transaction() as tx:
        assert server.flows.get(flow.id) == flow
        in_thread(lambda: server.flows.update_with_revision(flow))
        with pytest.raises(StoreBusy):
            server.flows.update_with_revision(flow)
        for late in (partial(server.flows.get, flow.id), partial(tx.execute, "SELECT 1")):
            with pytest.raises(StorageError):
                late()


@postgres_only
def test_numbers_go_on_above_those_of_a_restored_dump(postgres: PostgresServer) -> None:
    target = postgres.target()
    with flowstore.open(target) as store:
        write(store, "e1")
        execute(store, "UPDATE flowstore_log SET position = position + (1::bigint << 50)")
    with flowstore.open(target) as store:
        [high] = store.events.read_all()
        write(store, "e1")
        assert [stored.sequence for stored in store.events.read_all(high.position)] == [2]
    with flowstore.open(target) as store:
        assert write(store, "e1") == 3
        assert [stored.sequence for stored in store.events.read_all()] == [1, 2, 3]


@postgres_only
def test_the_longest_ids_fit_every_index(server: Store) -> None:
    letters = random.Random(1)

    def long(size: int = 255) -> str:
        return "".join(chr(letters.randrange(0x10000, 0x10FFFF)) for _ in range(size))

    tenant, run, queue, event = long(), long(), long(), (long(), long())
    server.state.create_tenant(Tenant(id=tenant))
    view = server.state.for_tenant(tenant)
    create(view, run, workflow_id=long())
    view.append_event(run, EVENT, event_id=long())
    item = claimed(view, id=long(), execution_id=run, queue_type=queue)
    view.move_to_dead_letter(item, "e")
    view.write_snapshot(Snapshot(id=long(), execution_id=run, at_sequence=1, state=1))
    view.record_effect(long(), 1, execution_id=run)
    made = definition(long(), long(5000))
    for _ in range(2):
        view.store_workflow(made)
    assert view.get_workflow(made.workflow_id, made.version) is not None
    flow = flow_with(server, id=long(), owner_session_key=long())
    server.flows.insert_step(FlowStep(id=long(), flow_id=flow.id, run_id=long()))
    host, many = server.workflows, pointers(long())
    created(host, id=long(), name=long(), workflow_definition_id=long(), execution_pointers=many)
    topic: Any = {"event_name": event[0], "event_key": event[1]}
    host.create_event(Event(id=long(), **topic))
    host.create_event_subscription(
        subscription(id=long(), workflow_id=long(), execution_pointer_id=long(), **topic)
    )
    host.schedule_command(command(long(512)))
    assert len(host.get_events(*event)) == len(host.get_subscriptions(*event)) == 1


@postgres_only
def test_the_users_sql_may_hold_whatever_the_server_understands(server: Store) -> None:
    with server.transaction() as tx:
        assert tx.execute("SELECT '?', \"q?\".a, $$ ? $$, E'\\'?', 5 % 3, ?::text -- ?\n FROM (SELECT 1 AS a) \"q?\" /* ? */",
                          ("%s",)) == [("?", 1, " ? ", "'?", 2, "%s")]  # fmt: skip
        assert tx.execute("SELECT :b::int + :a::int, (ARRAY[1, 2, 3])[1:2]", {"a": 1, "b": 2}) == [
            (3, [1, 2])
        ]


@postgres_only
def test_a_server_is_asked_for_its_schema_and_told_without_the_password(
    postgres: PostgresServer,
) -> None:
    target = postgres.target()
    with pytest.raises(StorageError):
        flowstore.open(target, read_only=True)
    with flowstore.open(target) as store:
        assert "secret" not in store.target + repr(store)
        assert store.target == target.replace(":secret", "")
        write(store, "e1")
    with flowstore.open(target, read_only=True) as store, store.transaction():
        assert store.events.count_events("e1") == 1
        store.workflows.ensure_store_exists()
        with pytest.raises(StorageError):
            write(store, "e1")
    with flowstore.open(postgres.target()) as other:
        assert not other.events.execution_exists("e1")
    with pytest.raises(InvalidData):
        flowstore.open(target + "; DROP TABLE flows")
    with flowstore.open(target) as store:
        execute(store, "UPDATE flowstore_meta SET value = '999' WHERE key = 'schema'")
    with pytest.raises(SchemaError):
        flowstore.open(target)
    with pytest.raises(StorageError, match="cannot be used"):
        flowstore.open("postgresql://postgres@127.0.0.1:1/postgres")


@contextmanager
def bouncer(postgres: PostgresServer, mode: str) -> Iterator[Callable[[], str]]:
    """Runs a PgBouncer in front of the server; gives a function that makes a URL as `target` does, through it."""
    program = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        pytest.skip("pgbouncer is missing: apt-get install pgbouncer")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = postgres.folder / f"{mode}.ini"
    config.write_text(f"""
        [databases]
        * = host=127.0.0.1 port={postgres.port} user=postgres
        [pgbouncer]
        listen_addr = 127.0.0.1
        listen_port = {port}
        unix_socket_dir =
        auth_type = any
        pool_mode = {mode}
        log_connections = 0
        log_disconnections = 0
        log_pooler_errors = 0""")
    with subprocess.Popen(
        [program, str(config)], user=postgres.user, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stderr is not None
            assert any("process up" in line for line in process.stderr)
            yield lambda: postgres.target().replace(f":{postgres.port}/", f":{port}/")
        finally:
            process.kill()


@postgres_only
def test_a_scheme_in_upper_case_is_as_good_and_shows_no_password(postgres: PostgresServer) -> None:
    pytest.importorskip("psycopg")
    upper = postgres.target().replace("postgresql:", "PostgreSQL:")
    with flowstore.open(upper) as store:
        assert write(store, "e1") == 1
    with pytest.raises(StorageError) as told:
        flowstore.open(re.sub(r":\d+/", ":1/", upper))
    assert "secret" not in str(told.value)


@postgres_only
@parametrize("mode", ["transaction", "statement"])
def test_a_pooler_that_keeps_no_session_is_told_when_opening_and_left_as_it_was(
    postgres: PostgresServer, mode: str
) -> None:
    psycopg = pytest.importorskip("psycopg")
    with bouncer(postgres, mode) as target:
        for read_only in (False, True):
            with pytest.raises(StorageError, match=r"a pooler .* \?pooler=session") as told:
                flowstore.open(target(), read_only=read_only)
            assert "secret" not in str(told.value)
        with psycopg.connect(target().partition("?")[0], autocommit=True) as other:
            for setting, untouched in (
                ("search_path", '"$user", public'),
                ("enable_seqscan", "on"),
            ):
                assert other.execute(f"SHOW {setting}").fetchone() == (untouched,)


@postgres_only
def test_a_pooler_that_keeps_sessions_is_used_when_the_url_says_so(
    postgres: PostgresServer,
) -> None:
    with bouncer(postgres, "session") as target:
        with pytest.raises(StorageError, match="pooler=session"):
            flowstore.open(target())
        targets = [f"{target()}&pooler=session", target().replace("?", "?pooler=session&")]
        stores = [flowstore.open(target) for target in targets]

        def append(store: Store, execution_id: str) -> None:
            for _ in range(50):
                write(store, execution_id)

        together([partial(append, *each) for each in zip(stores * 2, "abab", strict=True)])
        for store, own, others in zip(stores, "ab", "ba", strict=True):
            assert store.events.count_events(own) == 100
            assert not store.events.execution_exists(others)
            store.close()


@postgres_only
def test_what_a_url_says_of_a_pooler_is_read_by_the_store_alone(postgres: PostgresServer) -> None:
    target = postgres.target()
    url = f"{target}&pooler=session&application_name=a"
    with flowstore.open(url) as store, store.transaction() as tx:
        assert tx.execute("SHOW application_name") == [("a",)]
    for word in ("transaction", "Session", ""):
        with pytest.raises(InvalidData, match="pooler"):
            flowstore.open(f"{target}&pooler={word}")


@postgres_only
@forking
def test_both_sides_of_a_fork_go_on_with_connections_of_their_own(server: Store) -> None:
    write(server, "e1")
    with server.transaction():
        write(server, "e1")
        with pytest.raises(StorageError):
            in_fork(lambda: write(server, "e1"))
        assert write(server, "e1") == 3
    assert in_fork(lambda: write(server, "e1")) == 4
    assert write(server, "e1") == 5


@postgres_only
@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"
)  # psycopg's
def test_blocks_whose_end_is_never_run_leave_their_connections_to_others(server: Store) -> None:
    for number in range(3 * flowstore._CONNECTIONS):
        block = server.transaction()
        block.__enter__()
        write(server, f"e{number}")
        del block
        gc.collect()
    assert write(server, "e0") == 1


@postgres_only
def test_a_task_that_gives_up_its_block_while_it_begins_leaves_no_transaction_open(
    postgres: PostgresServer,
) -> None:
    async def body() -> None:
        async with flowstore.open_async(target := postgres.target()) as store:
            async with contextlib.AsyncExitStack() as held:
                for number in range(flowstore._CONNECTIONS):
                    with flowstore.open(
                        target
                    ) as other:  # so that a block is begun by each connection, and waits
                        await asyncio.create_task(held.enter_async_context(store.transaction()))
                        write(other, f"other-{number}")
                for _ in range(3):
                    with pytest.raises(TimeoutError):
                        async with asyncio.timeout(0.05), store.transaction():
                            raise AssertionError
            await write(store, "e1")
            stored = await store.events.read_all()
            assert [one.execution_id for one in stored][-1] == "e1"

            async def one(number: int) -> None:
                async with store.transaction():
                    await write(store, f"many-{number}")
                    await asyncio.sleep(0.01)

            await asyncio.wait_for(
                asyncio.gather(*(until_it_wins(one, number) for number in range(24))), 25
            )
            assert (
                sum([await store.events.count_events(f"many-{number}") for number in range(24)])
                == 24
            )

    async def until_it_wins(one: Callable[[int], Coroutine[Any, Any, None]], number: int) -> None:
        for _ in range(100):
            with suppress(StoreBusy):
                return await one(number)
        raise AssertionError

    asyncio.run(body())


@postgres_only
def test_reads_go_on_while_writers_wait_for_a_row_that_a_block_changed(server: Store) -> None:
    flow = flow_with(server)
    update = partial(server.flows.update_with_revision, flow)
    with held_block(server, update):
        writers = [Caller(update) for _ in range(flowstore._CONNECTIONS)]
        until(lambda: [*server._engine.pool.in_use.values()].count(True) == flowstore._CONNECTIONS)
        assert server.flows.get(flow.id) == flow
    assert {type(each.outcome()) for each in writers} == {RevisionMismatch}


@postgres_only
def test_a_read_that_fails_in_a_block_is_undone_alone_and_what_ends_the_block_is_told(
    server: Store,
) -> None:
    read: Any = flowstore._read
    slow = read(lambda facet, connection: connection.rows("SELECT pg_sleep(1)"))
    create(server)
    with server.transaction() as tx:
        write(server, "e1")
        tx.execute("SET LOCAL statement_timeout = 1")
        with pytest.raises(StorageError):
            tx.execute("SELECT pg_sleep(1)")
        with pytest.raises(StorageError):
            server._engine.run(slow, server.flows)
        tx.execute("SET LOCAL statement_timeout = 0")
        assert server.events.count_events("e1") == 1
    assert server.events.count_events("e1") == 1
    with server.transaction() as tx:
        write(server, "e1")
        for refused in (
            "COPY flows FROM STDIN",
            "copy flows TO STDOUT",
            "ABORT",
            "PREPARE TRANSACTION 'z'",
        ):
            with pytest.raises(StorageError, match="is not for a statement inside"):
                tx.execute(refused)
        write(server, "e1")
    assert server.events.count_events("e1") == 3
    with pytest.raises(StorageError, match="run it again"), server.transaction() as tx:
        write(server, "e1")
        raw: Any = tx._innermost().connection.use().db.db
        with pytest.raises(Exception, match="division by zero"):
            raw.execute("SELECT 1 / 0")  # outside of a savepoint: COMMIT would roll back, silently
    assert server.events.count_events("e1") == 3


@postgres_only
def test_readers_and_writers_leave_each_other_connections(postgres: PostgresServer) -> None:
    with flowstore.open(postgres.target(), busy_timeout=1) as store:
        engine = store._engine
        for mine in (False, True):
            held = [engine.pool.check_out(mine) for _ in range(flowstore._CONNECTIONS)]
            with pytest.raises(StoreBusy):
                engine.pool.check_out(mine)
            engine.pool.check_in(engine.pool.check_out(not mine))
            for connection in held:
                engine.pool.check_in(connection)
        assert write(store, "e1") == 1


@postgres_only
def test_a_block_that_could_not_begin_in_another_has_no_connection_to_give_back(
    server: Store,
) -> None:
    with server.transaction():
        nested = flowstore._Block(server._engine)
        nested.bind(0, None)
    with pytest.raises(StorageError):
        nested.begin()
    nested.parent = None
    nested._unregister()
    assert len({*server._engine.pool.idle}) == len(server._engine.pool.idle)


@postgres_only
def test_who_holds_a_row_goes_on_however_many_tasks_have_given_up_waiting_for_it(
    postgres: PostgresServer,
) -> None:
    async def body() -> None:
        async with flowstore.open_async(postgres.target(), busy_timeout=20) as store:
            flow = await store.flows.insert(Flow())
            held = asyncio.Event()

            async def wait() -> None:
                await held.wait()
                async with asyncio.timeout(0.1), store.transaction():
                    await store.flows.update_with_revision(flow)

            waiters = [asyncio.create_task(wait()) for _ in range(flowstore._CONNECTIONS - 1)]
            async with asyncio.timeout(10), store.transaction():
                await store.flows.update_with_revision(flow)
                held.set()
                await asyncio.sleep(0.5)
                await store.flows.insert(Flow())
            assert {
                type(one) for one in await asyncio.gather(*waiters, return_exceptions=True)
            } == {TimeoutError}

    asyncio.run(body())


@postgres_only
def test_a_call_that_waited_in_the_server_for_busy_timeout_is_not_tried_again(
    postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with flowstore.open(postgres.target(), busy_timeout=0.2) as store:
        flow = store.flows.insert(Flow())
        with held_block(store, partial(store.flows.update_with_revision, flow)):
            tries: list[object] = []
            run_on = store._engine.run_on

            def counted(*arguments: Any) -> Any:
                tries.append(arguments)
                return run_on(*arguments)

            monkeypatch.setattr(store._engine, "run_on", counted)
            with pytest.raises(StoreBusy):
                store.flows.update_with_revision(flow)
        assert len(tries) == 1


@postgres_only
def test_a_task_may_write_while_another_one_of_its_thread_reads_in_a_block(server: Store) -> None:
    async def read(begun: asyncio.Event, leave: asyncio.Event) -> None:
        with server.transaction(read_only=True):
            begun.set()
            await leave.wait()

    async def main() -> None:
        begun, leave = asyncio.Event(), asyncio.Event()
        reader = asyncio.create_task(read(begun, leave))
        await begun.wait()
        assert write(server, "e1") == 1
        leave.set()
        await reader

    asyncio.run(main())


@postgres_only
def test_a_task_that_reads_in_a_block_hides_no_block_of_another_one_of_its_thread(
    server: Store,
) -> None:
    flow = server.flows.insert(Flow())

    async def hold(begun: asyncio.Event, leave: asyncio.Event) -> None:
        with server.transaction():
            server.flows.update_with_revision(flow)
            begun.set()
            await leave.wait()

    async def main() -> None:
        begun, leave = asyncio.Event(), asyncio.Event()
        holder = asyncio.create_task(hold(begun, leave))
        await begun.wait()
        with server.transaction(read_only=True):
            assert server.flows.get(flow.id) == flow
        with pytest.raises(StorageError, match="wait for itself"):
            server.flows.update_with_revision(flow)
        leave.set()
        await holder

    asyncio.run(main())


@postgres_only
@forking
def test_a_thread_of_a_forked_child_has_no_block_of_a_thread_of_its_parent(server: Store) -> None:
    with held_block(server):
        assert in_fork(lambda: in_thread(lambda: write(server, "e1"))) == 1


@postgres_only
def test_more_tasks_that_read_in_blocks_than_there_are_connections_take_turns(
    postgres: PostgresServer,
) -> None:
    async def main() -> None:
        async with flowstore.open_async(postgres.target(), busy_timeout=60) as store:

            async def read() -> None:
                async with store.transaction(read_only=True):
                    for _ in range(3):
                        await store.flows.get("f")

            async with asyncio.timeout(20):
                reads = [store.flows.get("f") for _ in range(3 * flowstore._CONNECTIONS)]
                blocks = [read() for _ in range(3 * flowstore._CONNECTIONS)]
                await asyncio.gather(*blocks, *reads, *(read() for _ in blocks))

    asyncio.run(main())


@postgres_only
def test_async_tail_does_not_wait_for_a_connection(postgres: PostgresServer) -> None:
    async def main() -> None:
        async with (
            flowstore.open_async(postgres.target(), busy_timeout=0.5) as store,
            contextlib.AsyncExitStack() as held,
        ):
            for _ in range(flowstore._CONNECTIONS):
                block = store.transaction(read_only=True)
                await asyncio.create_task(held.enter_async_context(block))
            tail = store.events.tail(timeout=WATCHDOG)
            await write(store, "run", "later")
            await held.aclose()
            assert (await anext(tail)).event["key"] == "later"

    asyncio.run(main())


@postgres_only
@forking
def test_a_fork_while_all_connections_are_in_use_leaves_the_child_its_own(server: Store) -> None:
    with ExitStack() as stack:
        for _ in range(flowstore._CONNECTIONS):
            stack.enter_context(held_block(server))
        assert in_fork(lambda: write(server, "e1")) == 1


@postgres_only
def test_a_role_that_may_do_little_opens_a_schema_that_is_there(postgres: PostgresServer) -> None:
    target = postgres.target().replace("?schema=", "?schema=own_")
    admin = flowstore.open(target)
    with admin, admin.transaction() as tx:
        schema = target.partition("schema=")[2]
        tx.execute(f"DROP SCHEMA {schema} CASCADE")
        tx.execute("DROP ROLE IF EXISTS limited")
        tx.execute("CREATE ROLE limited LOGIN PASSWORD 'secret'")
        tx.execute(f"CREATE SCHEMA {schema} AUTHORIZATION limited")
    user = re.sub("//[^:@]*", "//limited", target, count=1)
    with flowstore.open(user) as store:
        assert store.events.append("e1", "default", EVENT | {"text": "\u6f22"}) == 1
        # What tells it that a server was started again since: else a lost COMMIT is never sure.
        number = store._engine.with_connection(
            lambda tx: (tx.db.begin("SERIALIZABLE"), tx.db.transaction_id, tx.db.connected_at)
        )
        assert (
            store._engine.on_new_connection(
                lambda tx: tx.rows(flowstore._TRANSACTION_STATUS, *number[1:])
            )[0][1]
            is True
        )


@postgres_only
@parametrize("login", ["postgres:se#cret", "postgres:se?cret", "postgres:se[cret"])
def test_no_password_is_told(
    postgres: PostgresServer, login: str, capsys: pytest.CaptureFixture[str]
) -> None:
    target = postgres.target().replace("postgres:secret", login)
    assert login in target
    with flowstore.open(target + "&application_name=a%20b") as store, store.transaction() as tx:
        assert "cret" not in store.target + repr(store)
        assert tx.execute("SHOW application_name") == [("a b",)]
    for command in ("check", "compact", "metrics"):
        assert flowstore.main([command, target]) == 0
    assert flowstore.main(["prune", target, "--older-than", "1d", "--json"]) == 0
    assert "cret" not in "".join(capsys.readouterr())


@postgres_only
@parametrize(
    "target",
    [
        "postgresql://u:secret%zz@127.0.0.1:1/x",
        "postgresql://u:secret@[::1/x",
        "postgresql:/u:secret@127.0.0.1:1/x",
        "postgresql://u:a/secret@127.0.0.1:1",
        "postgresql://u:a@secret@127.0.0.1:1/x",
        "postgresql://u:secret",
        "postgresql://127.0.0.1:1/x?passw%6frd=secret",
        "postgresql://127.0.0.1:1/x?sslpassword=secret",
        "postgresql://127.0.0.1:1?user=a@b&password=secret",
        "postgresql://127.0.0.1:1/x?PASSWORD=secret",
        " postgresql://u:secret@127.0.0.1:1/x",
        "postgresql://u:secret@127.0.0.1:1/x%40y",
        "POSTGRES://127.0.0.1:1/x?schema=a&password=secret",
    ],
)
def test_no_password_of_a_url_with_a_mistake_is_told(
    target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert flowstore.main(["check", target]) == 1
    said = capsys.readouterr()
    assert "secret" not in said.err + said.out
    assert said.err.startswith("flowstore: ")
    with pytest.raises(FlowStoreError) as caught:
        flowstore.open(target, busy_timeout=0)
    assert "secret" not in "".join(traceback.format_exception(caught.value)).replace(target, "")


@postgres_only
def test_a_tasks_block_that_finds_no_connection_leaves_those_of_others_alone(
    postgres: PostgresServer,
) -> None:
    async def body() -> None:
        async with (
            flowstore.open_async(postgres.target(), busy_timeout=1) as store,
            contextlib.AsyncExitStack() as held,
        ):
            for _ in range(flowstore._CONNECTIONS):
                task = asyncio.create_task(
                    held.enter_async_context(store.transaction())
                )  # each a block of its own
                await task
            for _ in range(2):
                with pytest.raises(StoreBusy):
                    async with store.transaction():
                        raise AssertionError
            engine = store._engine.engine
            assert not engine.pool.idle
            await held.aclose()
            assert (
                len({*engine.pool.idle} - {engine.writer.connection})
                == len(engine.pool.idle)
                == flowstore._CONNECTIONS
            )
            assert await write(store, "e1") == 1

    asyncio.run(body())


@postgres_only
def test_without_psycopg_a_servers_url_names_what_to_install_and_all_else_works() -> None:
    said = finished(script(
        "assert 'psycopg' not in sys.modules\nsys.modules['psycopg'] = None\n"
        "flowstore.open(':memory:').events.append('e1', 'default', {'type': 't'})\n"
        "try: flowstore.open('postgresql://localhost/x')\nexcept flowstore.StorageError as error: print(error)"))  # fmt: skip
    assert "pip install 'psycopg[binary]>=3.2'" in said


def in_all(store: Store) -> dict[str, Any]:
    """What a store holds, whatever the engine notes for itself."""
    held = contents(store)
    del held["tables"]["flowstore_meta"]
    return held


@postgres_only
def test_a_copy_up_and_down_again_is_equal_and_goes_on_where_it_was_broken_off(
    postgres: PostgresServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, down = str(tmp_path / "a.db"), str(tmp_path / "b.db")
    up, other = postgres.target(), postgres.target()
    with flowstore.open(source) as store:
        flow = store.flows.insert(Flow(goal="\u00e9"))
        store.flows.append_event(flow.id, "k", {})
        for number in range(1200):
            store.events.append(f"e{number % 7}", "acme", {"type": "t", "n": number})
        enqueue(store, execution_id="e1")
        store.state.put_artifact(b"\0\xff")
        created(store.workflows, execution_pointers=pointers("p"))

    chunks = flowstore._CopiedTable.chunks

    def interrupted(table: Any, read: Any) -> Iterator[Any]:
        yield from itertools.islice(chunks(table, read), 1)
        if table.name == "flowstore_log":
            raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(flowstore._CopiedTable, "chunks", interrupted)
        assert flowstore.main(["copy", source, up]) == 130
    with flowstore.open(up) as part:
        assert 0 < sum(part.stats()["tables"].values()) < 1000
    for one, two in ((source, up), (up, down), (up, other)):
        assert flowstore.main(["copy", one, two]) == 0
    assert capsys.readouterr().out.count("equal") == 3
    assert flowstore.main(["copy", source, up]) == 1
    with flowstore.open(source) as first, flowstore.open(down) as last, flowstore.open(up) as above:
        assert in_all(first) == in_all(last) == in_all(above)
        assert first.flows.list_events(flow.id) == above.flows.list_events(flow.id)
        assert last.check() == above.check() == []
        assert last.events.append("e1", "acme", EVENT) == above.events.append("e1", "acme", EVENT)
        assert above.events.read_all(limit=2000)[-1].execution_id == "e1"


@postgres_only
def test_a_backup_of_a_server_is_a_file(server: Store, tmp_path: Path) -> None:
    write(server, "e1")
    server.backup(tmp_path / "backup.db")
    server.compact()
    with flowstore.open(tmp_path / "backup.db", read_only=True) as store:
        assert (in_all(store), store.check()) == (in_all(server), [])


@postgres_only
def test_the_commands_take_a_server(
    postgres: PostgresServer,
    files: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = postgres.target()
    for command in (
        ["selftest", "--target", target],
        ["demo", str(files), "--store", target],
        ["check", target],
        ["compact", target],
    ):
        assert flowstore.main(command) == 0
    assert "FAIL" not in capsys.readouterr().out
    monkeypatch.setattr(
        Bench,
        "compare",
        lambda bench, ours, rival: Measured(True, "", [ours(), rival.rate()]),
    )
    monkeypatch.setitem(
        globals(), "under", lambda limit, unit, values: Measured(True, "", values[:1])
    )
    assert bench_command(["bench", "--quick", "--json", "--target", target]) == 0
    [claims, wake, idle] = json.loads(capsys.readouterr().out)["rows"]
    assert "8 processes" in claims["name"] and min(claims["measured"]) > 10
    assert 0 < wake["measured"][0] < 5_000 and 0 <= idle["measured"][0] < 100


# ==================================================================================================
# Crashes and damage
# ==================================================================================================


class EverythingRules(FlowRules, StateRules, ItemRules, WorkflowRules):
    """All facets in one store, in transactions that nest, end well or are undone, with a table of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        execute(self.store, "CREATE TABLE mine (n INTEGER PRIMARY KEY)")

    @precondition(lambda self: len(self.blocks) < 3)
    @rule()
    def begin(self) -> None:
        block = self.store.transaction()
        block.__enter__()
        self.blocks.append((block, copy.deepcopy(self.model)))

    begin_too = begin_again = begin_once_more = begin  # chosen four times as often

    @precondition(lambda self: self.blocks)
    @rule(error=st.sampled_from([None, None, ValueError(), Stop()]))
    def end(self, error: BaseException | None) -> None:
        block, before = self.blocks.pop()
        assert not block.__exit__(None if error is None else type(error), error, None)
        if error is not None:
            self.model = before

    end_too = end_again = end_once_more = end

    @rule(number=st.integers(0, 5), twice=st.booleans())
    def write_row(self, number: int, twice: bool) -> None:
        with suppress(StorageError), self.store.transaction() as tx:
            for one in [number] * (1 + twice):
                tx.execute("INSERT INTO mine VALUES (?)", (one,))
            self.model.rows.append(number)

    @invariant()
    def rows_agree(self) -> None:
        assert execute(self.store, "SELECT n FROM mine") == [(n,) for n in sorted(self.model.rows)]

    @precondition(lambda self: self.blocks and self.engine == "file")
    @rule()
    def nobody_else_sees_it(self) -> None:
        before = self.blocks[0][1]
        found = Caller(
            lambda: [self.store.stats()["tables"][name] for name in ("flows", "workflows")]
        ).outcome()
        assert found == [len(before.flows), len(before.instances)]


TestEverythingByAModelInMemory, TestEverythingByAModelInAFile = modelled(EverythingRules, 20, 60)


# --- killed, stopped, cut off from its power ---

CRASH_ROUNDS = int(os.environ.get("FLOWSTORE_CRASH_ROUNDS", "30"))


# What `write_everywhere` leaves behind one key, all of it or nothing.
EVERYWHERE = """SELECT key, SUM(part) FROM (
    SELECT id AS key, 1 AS part FROM flows UNION ALL SELECT id, 10 FROM flow_steps
    UNION ALL SELECT kind, 100 FROM flow_events WHERE kind LIKE 'all.%'
    UNION ALL SELECT event_id, 1000 FROM flowstore_log WHERE event_id LIKE 'all.%'
    UNION ALL SELECT id, 10000 FROM flowstore_work_items WHERE id LIKE 'all.%'
    UNION ALL SELECT id, 100000 FROM workflows UNION ALL SELECT workflow_id, 1000000 FROM execution_pointers
    UNION ALL SELECT id, 10000000 FROM events UNION ALL SELECT data, 100000000 FROM scheduled_commands
    UNION ALL SELECT key, 1000000000 FROM mine) WHERE key LIKE 'all.%' GROUP BY key"""


ALL_PARTS = 1112111111  # of the execution pointers there are two


def crashing(path: str, name: str) -> None:
    """Threads that write through every facet, and say so once it is stored."""
    store_engine = flowstore.open(path)
    state = store_engine.state

    def say(kind: str, key: str) -> None:
        os.write(1, f"{kind} {key}\n".encode())

    def everywhere(key: str) -> None:
        write_everywhere(store_engine, f"all.{key}")
        say("all", f"all.{key}")

    def log(key: str) -> None:
        write_pair(store_engine, "pairs", key)
        say("pair", key)

    def work(key: str) -> None:
        enqueue(state, id=f"item.{key}", execution_id="items")
        say("item", f"item.{key}")
        item = state.claim_work_item("w", ["q"], lease_seconds=0.05)
        if item is not None:
            with store_engine.transaction():
                state.complete_work_item(item)
                write(store_engine, "items", item.id)
            say("done", item.id)

    def turn(key: str) -> None:
        enqueue(state, id=f"turn.{key}", execution_id="turns", queue_type="t")
        item = state.claim_work_item("w", ["t"], lease_seconds=0.05)
        if item is not None:
            state.commit_turn(
                item, None, event(item.id), snapshot_state=item.id, effect_key=item.id, effect=1
            )
            say("turn", item.id)

    def count(key: str) -> None:
        with store_engine.transaction():
            flow = store_engine.flows.get("counter")
            assert flow is not None
            flow.state["n"] += 1
            store_engine.flows.update_and_append(flow, "counted", flow.state["n"])
        say("count", str(flow.state["n"]))

    def host(key: str) -> None:
        instance = store_engine.workflows.get_workflow_instance("host")
        instance.execution_pointers.append(ExecutionPointer(id=key, step_id=0))
        if len(instance.execution_pointers) > 20:
            del instance.execution_pointers[0]
        instance.version += 1
        store_engine.workflows.persist_workflow(instance)
        say("host", f"{instance.version} {key}")

    def loop(kind: Callable[[str], None], me: int) -> None:
        for number in range(10**9):
            try:
                with suppress(LeaseLost):  # it lasts 50 ms here: others may have taken it over
                    kind(f"{name}.{me}.{number}")
            except BaseException as error:
                say("failed", repr(error))
                raise

    kinds = [everywhere, everywhere, log, log, work, turn, count, host]
    raise SystemExit(str(outcomes([partial(loop, kind, me) for me, kind in enumerate(kinds)])))


class Verdict:
    """What was acknowledged, and what of it is lost or torn in the file."""

    def __init__(self) -> None:
        self.said: dict[str, set[str]] = {
            kind: set() for kind in ("all", "pair", "item", "done", "turn", "count", "host")
        }
        self.versions: dict[int, str] = {}
        self.lost: list[str] = []
        self.torn: list[str] = []

    @property
    def acknowledged(self) -> int:
        return sum(map(len, self.said.values()))

    def hear(self, output: str) -> None:
        for line in output.split("\n")[:-1]:  # the last one is empty, or was cut by the kill
            kind, key = line.split(" ", 1)
            assert kind != "failed", key
            self.said[kind].add(key)

    def check(self, store: Store) -> None:
        with store.transaction() as tx:  # one state of all
            parts = dict(tx.execute(EVERYWHERE))
            found: dict[str, set[str]] = {"all": set(parts)}
            self.torn += [f"{key}: {part}" for key, part in parts.items() if part != ALL_PARTS]
            counted = Counter(keys(store, "pairs"))
            found["pair"] = set(counted)
            self.torn += [f"{key}: {times} times" for key, times in counted.items() if times != 2]
            completed = {
                item.id for item in store.state.list_work_items(status="completed", limit=MAX_INT)
            }
            found["item"] = {
                item.id for item in store.state.list_work_items(execution_id="items", limit=MAX_INT)
            }
            done, ended = keys(store, "items"), keys(store, "turns")
            found["done"], found["turn"] = set(done), set(ended)
            self.torn += [f"{key} was done {n} times" for key, n in Counter(done).items() if n != 1]
            self.torn += [
                f"{key} is done and not completed, or the other way"
                for key in completed ^ {*done, *ended}
            ]
            effects = {key for (key,) in tx.execute("SELECT key FROM flowstore_effects")}
            states = tx.execute("SELECT state FROM flowstore_snapshots ORDER BY at_sequence")
            if [json.loads(state) for (state,) in states] != ended or effects != set(ended):
                self.torn.append("turns")
            flow = store.flows.get("counter")
            assert flow is not None
            trail = [event.payload for event in store.flows.list_events("counter", limit=MAX_INT)]
            found["count"] = set(map(str, trail))
            if trail != [*range(flow.state["n"], 0, -1)] or flow.revision != flow.state["n"]:
                self.torn.append(f"counter: {flow}")
            host = store.workflows.get_workflow_instance("host")
            last = max((int(said.split()[0]) for said in self.said["host"]), default=1)
            pointers = [pointer.id for pointer in host.execution_pointers]
            if host.version < last or not set(self.recent(host.version)) <= set(pointers):
                self.lost.append(f"host: {host.version} < {last}")
            if len(pointers) != min(host.version - 1, 20):
                self.torn.append(f"host: {len(pointers)} pointers at {host.version}")
        for kind, those in found.items():
            self.lost += sorted(self.said[kind] - those)

    def recent(self, version: int) -> list[str]:
        """The pointers acknowledged lately, which must be among the last 20."""
        told = [said.split() for said in self.said["host"]]
        return [key for number, key in told if int(number) > version - 20]


@needs_kill
def test_nothing_acknowledged_is_lost_and_nothing_torn_however_often_the_process_is_killed(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared_for_crashes(path)
    verdict = Verdict()
    for number in range(1, CRASH_ROUNDS + 1):
        signal.alarm(WATCHDOG + 20)  # for each round
        with Process(crashing, path, number) as child:
            first = child.pipe("stdout").readline()
            assert first, child.pipe("stderr").read()
            time.sleep(random.random() * 0.15)
            verdict.hear(first + child.kill())
        with flowstore.open(path) as store:
            if number % 5 == 0 or number == CRASH_ROUNDS:
                verdict.check(store)
                assert store.check() == []
            write_everywhere(store, f"all.between.{number}")  # the same file is used on and on
            verdict.said["all"].add(f"all.between.{number}")
        assert (verdict.lost, verdict.torn) == ([], [])
    kinds = ", ".join(f"{kind} {len(those)}" for kind, those in verdict.said.items())
    with capsys.disabled():
        print(f"\ncrash: {CRASH_ROUNDS} rounds, {verdict.acknowledged} writes acknowledged ({kinds}), "
              f"{len(verdict.lost)} lost, {len(verdict.torn)} torn")  # fmt: skip
    assert all(verdict.said.values())


def stopped_now_and_then(path: str) -> None:
    store_engine = flowstore.open(path)

    def loop(me: int) -> None:
        for number in range(10**9):
            write_everywhere(store_engine, f"all.{me}.{number}")
            os.write(1, f"all.{me}.{number}\n".encode())

    outcomes([partial(loop, me) for me in range(3)])


def without_power(path: Path, image: Path) -> int:
    """What a disk holds of the files when the power goes: the WAL cut somewhere, as far as it may not be synced.

    What was checkpointed had been synced before, so the cut is behind it; the -shm, which is gone, knows how far."""
    shutil.copy(path, image)
    wal = Path(f"{path}-wal").read_bytes()
    shm = Path(f"{path}-shm").read_bytes()
    checkpointed = max(int.from_bytes(shm[at : at + 4], sys.byteorder) for at in (96, 128))
    least = 32 + checkpointed * (24 + 4096)
    cut = random.choice([len(wal), random.randint(min(least, len(wal)), len(wal))])
    Path(f"{image}-wal").write_bytes(wal[:cut])
    return len(wal) - cut


@needs_kill
def test_after_a_loss_of_power_the_file_holds_a_consistent_prefix_of_what_was_written(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared_for_crashes(path)
    images: list[tuple[Path, int, set[str]]] = []
    said: list[str] = []
    with Process(stopped_now_and_then, path) as child:
        descriptor = child.pipe("stdout").fileno()
        heard = b""
        while len(images) < CRASH_ROUNDS:
            signal.alarm(WATCHDOG + 20)
            time.sleep(0.002 + random.random() * 0.02)
            child.popen.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, child.popen.pid, os.WSTOPPED | os.WNOWAIT)
            while select.select([descriptor], [], [], 0)[0]:
                heard += os.read(descriptor, 1 << 16)
            said = heard.decode().split("\n")[:-1]
            if said:
                image = tmp_path / f"image-{len(images)}.db"
                images.append((image, without_power(path, image), set(said)))
            child.popen.send_signal(signal.SIGCONT)
    with flowstore.open(path) as store:
        whole = [stored.id for stored in store.events.load_events("all")]
    lost = 0
    for image, cut, acknowledged in images:
        signal.alarm(WATCHDOG + 20)
        with flowstore.open(image) as store:
            assert store.check() == []
            there = [stored.id for stored in store.events.load_events("all")]
            assert there == whole[: len(there)]
            parts = dict(execute(store, EVERYWHERE))
            assert set(parts) == set(there)
            assert set(parts.values()) <= {ALL_PARTS}
            missing = acknowledged - set(parts)
            assert cut or not missing, "all that is acknowledged is on disk"
            lost += len(missing)
            write_everywhere(store, "all.after")
        for suffix in ("", "-wal", "-shm"):
            Path(f"{image}{suffix}").unlink(missing_ok=True)
    with capsys.disabled():
        print(f"\npower: {len(images)} stops, {sum(cut > 0 for _, cut, _ in images)} of the logs cut, "
              f"{len(said)} transactions acknowledged, each image a prefix, 0 torn")  # fmt: skip
    assert lost or CRASH_ROUNDS < 30, (
        "some of the cuts took away what only a disk that lies can lose"
    )


# --- broken files, vanished folders, no permission ---


def test_a_stored_text_that_is_no_text_any_more_is_corrupt_in_one_sentence(path: Path) -> None:
    with flowstore.open(path) as store:
        store.events.append("e1", "default", {"type": "t", "text": "x" * 1000})
        execute(store, "UPDATE flowstore_log SET event = CAST(event || x'ff' AS TEXT)")
        with pytest.raises(StoreCorrupt) as caught:
            store.events.load_events("e1")
        assert one_sentence(caught.value) and len(str(caught.value)) < 200


def everything_in(store: Store) -> list[Any]:
    """All that reads can show of what `furnished_for_damage` wrote."""
    return [
        store.events.read_all(limit=MAX_INT),
        store.state.list_work_items(limit=MAX_INT),
        store.workflows.get_workflow_instances([f"all.{n}" for n in range(60)]),
        *(store.flows.get(f"all.{n}") for n in range(60)),
        *(store.flows.list_events(f"all.{n}") for n in range(60)),
        {name: count for name, count in store.stats().items() if name != "wal_bytes"},
    ]


def test_any_page_overwritten_is_store_corrupt_or_named_by_check_and_mends_with_the_page(
    path: Path, whole: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    with flowstore.open(path) as store:
        sound = everything_in(store)
    told: Counter[str] = Counter()
    for start in range(0, len(whole), 4096):
        broken = whole[:start] + b"\xff" * 4096 + whole[start + 4096 :]
        path.write_bytes(broken)
        try:
            with flowstore.open(path) as store:
                assert store.check(), f"check() is blind for page {start // 4096 + 1}"
                told["by check()"] += 1
                try:
                    assert everything_in(store) == sound  # it was not among the pages read
                except StoreCorrupt as error:
                    assert one_sentence(error)
                    told["by a read"] += 1
        except StoreCorrupt as error:
            assert one_sentence(error)
            told["by open()"] += 1
        assert path.read_bytes() == broken, "the file is left as it was"
    path.write_bytes(whole)
    with flowstore.open(path) as store:
        assert everything_in(store) == sound
        assert store.check() == []
    with capsys.disabled():
        print(
            f"\ndamage: {len(whole) // 4096} pages overwritten one at a time, told {dict(told)}, 0 unnoticed"
        )
    assert told["by check()"] + told["by open()"] == len(whole) // 4096


@parametrize("left", [100, 512, 4095, 4096, 5000, 0.25, 0.5, 0.9])
@parametrize("read_only", [False, True])
def test_a_truncated_file_is_store_corrupt_and_left_as_it_was(
    path: Path, whole: bytes, left: float, read_only: bool
) -> None:
    cut = whole[: left if isinstance(left, int) else int(len(whole) * left) // 4096 * 4096]
    path.write_bytes(cut)
    with pytest.raises(StoreCorrupt) as caught:
        flowstore.open(path, read_only=read_only)
    assert one_sentence(caught.value) and str(path) in str(caught.value)
    assert listing(path.parent)[path.name] == cut
    path.write_bytes(whole)
    with flowstore.open(path, read_only=read_only) as store:
        assert store.check() == []


def test_a_folder_that_vanishes_under_an_open_store_is_a_storage_error_until_it_is_back(
    tmp_path: Path,
) -> None:
    folder, away = tmp_path / "here", tmp_path / "away"
    folder.mkdir()
    with flowstore.open(folder / "app.db") as store:
        acknowledged = [write(store, "run", "before")]
        folder.rename(away)
        calls: list[Call] = [
            partial(store.events.load_events, "run"),
            store.check,
            store.stats,
            partial(flowstore.open, folder / "app.db"),
            partial(store.backup, tmp_path / "copy.db"),
            partial(store.backup, folder / "copy.db"),
        ]
        for call in calls:
            with pytest.raises(StorageError) as caught:
                call()
            assert one_sentence(caught.value)
        with suppress(StorageError):  # the file is open: it may be written where it is now
            acknowledged.append(write(store, "run", "meanwhile"))
        assert not folder.exists() and not (tmp_path / "copy.db").exists()
        away.rename(folder)
        acknowledged.append(write(store, "run", "after"))
        assert store.check() == []
        assert [stored.sequence for stored in store.events.load_events("run")] == acknowledged


@forking
@parametrize("what", ["file", "folder"])
def test_without_permission_to_write_each_call_is_refused_until_it_is_given(what: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, path = Path(name), Path(name) / "app.db"
        with flowstore.open(path) as store:
            write(store, "run", "before")
        # A file of a folder that cannot be written may still be: then SQLite cannot make its log beside it.
        modes = {"file": (0o777, 0o444), "folder": (0o555, 0o666)}[what]
        folder.chmod(modes[0])
        path.chmod(modes[1])
        before = path.read_bytes()

        def tried() -> tuple[str, str, list[str]]:
            with flowstore.open(path, read_only=True) as store:
                kept = keys(store, "run")
            try:
                with flowstore.open(path) as store:
                    write(store, "run", "refused")
            except StorageError as error:
                return type(error).__name__, str(error), kept
            return "", "", kept

        try:
            error, message, kept = as_nobody(tried)
            assert error == "StorageError" and message.strip() and "\n" not in message
            assert kept == ["before"]
            assert path.read_bytes() == before
        finally:
            folder.chmod(0o777)
            path.chmod(0o666)
        for left in folder.iterdir():
            left.chmod(0o666)

        def written() -> Any:
            with flowstore.open(path) as store:
                return write(store, "run", "after")

        assert as_nobody(written) == 2


@forking
def test_a_file_that_cannot_be_created_is_a_storage_error() -> None:
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o555)

        def tried(path: str) -> str:
            with pytest.raises(StorageError) as caught:
                flowstore.open(path)
            assert one_sentence(caught.value)
            return type(caught.value).__name__

        assert as_nobody(partial(tried, os.path.join(name, "new.db"))) == "StorageError"
        tried(os.path.join(name, "x" * 300))
        assert os.listdir(name) == []


# --- upgrades: of files of version 1 to today's version, and to one that does not exist yet ---

UPGRADE = """
CREATE TABLE flowstore_second (n INTEGER PRIMARY KEY, text TEXT NOT NULL);
ALTER TABLE flows ADD COLUMN weight INTEGER NOT NULL DEFAULT 7;
INSERT INTO flowstore_second WITH RECURSIVE numbers (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < {rows})
    SELECT n, 'row ' || n FROM numbers;
UPDATE flows SET weight = 8
"""  # fmt: skip


def upgrading(path: str, script: str) -> None:
    learn_next_version(script)
    print("ready", flush=True)
    sys.stdin.readline()
    store_engine = flowstore.open(path)
    print(write(store_engine, "run", "upgraded"), flush=True)
    store_engine.close()


@pytest.fixture
def of_version_1(path: Path) -> Path:
    """A file of the frozen version 1, in the mode in which a store leaves it."""
    old = sqlite3.connect(path)
    old.executescript(VERSION_1)
    old.execute("PRAGMA journal_mode = WAL")
    old.close()
    return path


def version_of(path: Path) -> tuple[str, int]:
    """The version that a file says it is of, and how many rows only the next version has."""
    with closing(sqlite3.connect(path)) as plain:
        [(version,)] = plain.execute("SELECT value FROM flowstore_meta WHERE key = 'schema'")
        tables = {name for (name,) in plain.execute("SELECT name FROM sqlite_master")}
        columns = [row[1] for row in plain.execute("PRAGMA table_info(flows)")]
        upgraded = "flowstore_second" in tables
        assert upgraded == ("weight" in columns) == (version == "3"), "an upgrade is half there"
        [count] = (
            plain.execute("SELECT COUNT(*) FROM flowstore_second").fetchone() if upgraded else [0]
        )
        assert plain.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return version, count


def test_the_artifacts_of_an_old_file_count_from_its_upgrade(
    of_version_1: Path, clock: Clock
) -> None:
    with closing(sqlite3.connect(of_version_1)) as plain, plain:
        plain.execute(
            "INSERT INTO flowstore_artifacts VALUES ('default', 'hash', 3, NULL, X'616263')"
        )
    with flowstore.open(of_version_1, clock=clock) as store:
        assert store.prune(clock.now, artifacts=True)["artifacts"] == 0
        assert store.stats()["tables"]["flowstore_artifacts"] > 0
        store.prune(clock.advance(1), artifacts=True)
        assert store.stats()["tables"]["flowstore_artifacts"] == 0


def test_processes_that_open_an_old_file_at_once_upgrade_it_once(of_version_1: Path) -> None:
    script = UPGRADE.format(rows=20_000)
    with ExitStack() as stack:
        children = [stack.enter_context(Process(upgrading, of_version_1, script)) for _ in range(5)]
        assert [child.read() for child in children] == ["ready"] * 5
        for child in children:
            child.tell()
        assert sorted(int(child.read()) for child in children) == [1, 2, 3, 4, 5]
        for child in children:
            child.finish()
    assert version_of(of_version_1) == ("3", 20_000)
    with pytest.raises(SchemaError) as caught:  # this version does not know it
        flowstore.open(of_version_1)
    assert one_sentence(caught.value) and "upgrade flowstore" in str(caught.value)


def test_an_upgrade_between_two_looks_at_a_file_is_no_missing_table(
    of_version_1: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, looks = UPGRADE.format(rows=5), 0
    for name in ("_SCHEMA_VERSION", "_UPGRADES", "_TABLE_NAMES"):
        monkeypatch.setattr(flowstore, name, getattr(flowstore, name))
    learn_next_version(script)
    look = flowstore._Tx.row

    def after_another_process(tx: Any, sql: str, *params: Any) -> Any:
        nonlocal looks
        if "FROM flowstore_meta" in sql:
            looks += 1
            if looks == 1:
                with Process(upgrading, of_version_1, script) as child:
                    child.read()
                    child.tell()
                    assert child.read() == "1"
        return look(tx, sql, *params)

    monkeypatch.setattr(flowstore._Tx, "row", after_another_process)
    with flowstore.open(of_version_1) as store:
        assert store.check() == []
    assert looks and version_of(of_version_1) == ("3", 5)


@needs_kill
def test_a_process_killed_in_the_middle_of_an_upgrade_leaves_the_old_file_or_the_new_one(
    of_version_1: Path,
) -> None:
    script, whole = UPGRADE.format(rows=300_000), of_version_1.read_bytes()
    seen: Counter[str] = Counter()
    for number in range(12):
        for suffix in ("-wal", "-shm"):
            Path(f"{of_version_1}{suffix}").unlink(missing_ok=True)
        of_version_1.write_bytes(whole)
        with Process(upgrading, of_version_1, script) as child:
            assert child.read() == "ready"
            child.tell()
            time.sleep(0.05 * number * random.random())
            child.kill()
        version, count = version_of(of_version_1)
        assert (version, count) in {("1", 0), ("3", 300_000)}
        seen[version] += 1
        if version == "1":
            with flowstore.open(of_version_1) as store:  # the version that wrote it goes on
                assert store.check() == []
                assert store.events.count_events("order-1") == 1
    assert seen["1"], "no process was killed before its upgrade was over"


def test_an_upgrade_that_fails_leaves_the_file_to_the_version_that_wrote_it(
    of_version_1: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as later:
        for name in ("_SCHEMA_VERSION", "_UPGRADES", "_TABLE_NAMES"):
            later.setattr(flowstore, name, getattr(flowstore, name))
        learn_next_version(UPGRADE.format(rows=5) + "; INSERT INTO nowhere VALUES (1)")
        for _ in range(2):
            with pytest.raises(StorageError) as caught:
                flowstore.open(of_version_1)
            assert one_sentence(caught.value)
        with pytest.raises(SchemaError):
            flowstore.open(of_version_1, read_only=True)
    assert version_of(of_version_1) == ("1", 0)
    with flowstore.open(of_version_1) as store:
        assert [stored.event["note"] for stored in store.events.load_events("order-1")] == ["kept"]
        assert store.check() == []


# --- neighbours ---


def ending_with_open_stores(path: str, how: str) -> None:
    stores = [flowstore.open(path), flowstore.open(":memory:"), flowstore.open(path)]

    def work(me: int) -> None:
        number = 0
        while True:
            number += 1
            (write_pair, write_pair_in_block)[number % 2](stores[0], "run", f"{me}.{number}")
            os.write(1, f"{me}.{number}\n".encode())

    def wait() -> None:
        stores[2].state.claim_work_item("w", ["q"], wait=10 * WATCHDOG)

    for me in range(4):
        Caller(partial(work, me))
    Caller(wait)
    walk = stores[0].events.iter_events("run")
    next(walk, None)
    block = stores[1].transaction()
    block.__enter__()
    sys.stdin.readline()
    if how == "error":
        raise SystemExit("ended on purpose")


@parametrize("how", ["end", "error"])
def test_the_interpreter_ends_with_open_stores_and_threads_inside_calls(
    path: Path, how: str
) -> None:
    with Process(ending_with_open_stores, path, how) as child:
        first = [child.read() for _ in range(20)]
        output, errors = child.popen.communicate("go\n", timeout=WATCHDOG)
        assert child.popen.returncode == (how == "error")
        assert errors == ("ended on purpose\n" if how == "error" else "")
    with flowstore.open(path) as store:
        assert set(pairs(store, "run")) >= {*first, *output.split("\n")[:-1]}
        assert store.check() == []


def test_a_clock_that_goes_backwards_breaks_no_promise(make_store: MakeStore) -> None:
    clock = Clock()
    store = make_store(clock=clock, backoff=float, lease_seconds=10)
    item = claimed(store, max_attempts=9)
    fences = [item.lease_fence]
    for step in (-3600, -86_400, 7200):
        clock.advance(step)
        assert write(store, "e1") == len(fences)
        store.state.renew_lease(item)
        assert store.state.claim_work_item("other", ["q"]) is None, "the lease holds"
        clock.advance(20)
        while (again := store.state.claim_work_item("w", ["q"])) is None:  # its backoff
            clock.advance(1)
        with pytest.raises(LeaseLost):
            store.state.complete_work_item(item)
        item = again
        fences.append(item.lease_fence)
    assert fences == sorted(set(fences))
    assert [stored.sequence for stored in store.events.load_events("e1")] == [1, 2, 3]
    secret, _ = store.state.create_token("n", "r", expires_at=clock.now + seconds(5))
    clock.advance(6)
    assert store.state.validate_token(secret) is None
    flow = flow_with(store)
    clock.advance(-9999)
    flow = store.flows.update_with_revision(flow)
    assert (flow.revision, flow.updated_at) == (1, clock.now)
    assert store.check() == []


def test_a_sync_store_works_inside_an_event_loop_and_its_threads(path: Path) -> None:
    with flowstore.open(path) as store:

        async def task(me: int) -> None:
            for number in range(10):
                write_pair(store, "run", f"{me}.{number}")
                await asyncio.to_thread(write_pair_in_block, store, "run", f"{me}.{number}, thread")

        async def all_of_them() -> None:
            await asyncio.gather(*map(task, range(5)))
            with store.transaction():
                write(store, "one", "block")  # no await inside: the loop is the block's alone
                assert keys(store, "one") == ["block"]

        asyncio.run(all_of_them())
        assert len(pairs(store, "run")) == 100


def test_short_lived_threads_of_every_kind_leave_no_descriptor_behind(path: Path) -> None:
    prepared_for_crashes(path)
    with flowstore.open(path, synchronous="OFF") as store:

        def block(number: int) -> None:
            write_everywhere(store, f"all.{number}")

        def failing(number: int) -> None:
            with pytest.raises(Stop), store.transaction():
                store.flows.insert(Flow(id=f"undone {number}"))
                raise Stop

        def reading(_number: int) -> None:
            next(store.events.iter_events("all", chunk=1), None)  # left half read
            store.stats()

        def waiting(_number: int) -> None:
            assert store.state.claim_work_item("w", ["none"], wait=0.001) is None

        kinds = [block, failing, reading, waiting]
        outcomes([partial(kind, number) for number, kind in enumerate(kinds)])
        before = descriptors()
        for wave in range(1, 16):
            calls = [partial(kinds[n % 4], 100 * wave + n) for n in range(20)]
            assert outcomes(calls) == [None] * 20
        gc.collect()
        # Two descriptors for each reader that is kept, two for the connection that checkpoints.
        # How many readers are kept is up to how many threads happened to read at one time.
        assert descriptors() <= before + 2 * flowstore._IDLE_READERS + 2
        assert store.check() == []


# --- space ---


def test_a_slow_reader_costs_what_is_written_meanwhile_and_no_more(path: Path) -> None:
    chunk, bound = 1_000_000, flowstore._WAL_BOUND
    with (
        flowstore.open(path, synchronous="OFF") as store,
        flowstore.open(path, read_only=True) as reader,
    ):
        number = itertools.count()

        def write_on(bytes_: int) -> int:
            """The largest log that so many written bytes leave on the way."""
            largest = 0
            for _ in range(bytes_ // chunk):
                store.events.append("write", "default", event(str(next(number)), text="x" * chunk))
                largest = max(largest, os.path.getsize(f"{path}-wal"))
            return largest

        assert write_on(40_000_000) <= bound + 4 * chunk, "without readers"
        for _ in range(2):
            with reader.transaction():  # one snapshot, held on and on
                seen = reader.events.count_events("write")
                assert write_on(24_000_000) >= 20_000_000, "the snapshot was not held"
                assert reader.events.count_events("write") == seen
            write_on(2 * bound + 24_000_000)  # the next try to restart the log comes 16 MB later
            assert os.path.getsize(f"{path}-wal") <= bound + 4 * chunk
        store.compact()
        assert os.path.getsize(f"{path}-wal") == 0
        assert store.check() == []


# --- backups ---


def test_backups_under_load_are_consistent_prefixes_and_can_be_worked_on(
    path: Path, tmp_path: Path
) -> None:
    prepared_for_crashes(path)
    with (
        Process(stopped_now_and_then, path) as child,
        flowstore.open(path, read_only=True) as reader,
    ):
        child.read()
        copies: list[tuple[Path, set[str]]] = []
        for number in range(6):
            acknowledged = {child.read() for _ in range(5)}
            copied = tmp_path / f"copy-{number}.db"
            if number % 2:
                assert "bytes" in run("backup", path, copied, cwd=tmp_path).stdout
            else:
                reader.backup(copied)
            assert "sound" in run("check", copied, cwd=tmp_path).stdout
            copies.append((copied, acknowledged))
        child.kill()
    with flowstore.open(path) as store:
        whole = [stored.id for stored in store.events.load_events("all")]
    for copied, acknowledged in copies:
        with flowstore.open(copied) as store:  # restored: it is a store like any other
            there = [stored.id for stored in store.events.load_events("all")]
            assert there == whole[: len(there)] and acknowledged <= set(there)
            parts = dict(execute(store, EVERYWHERE))
            assert set(parts) == set(there) and set(parts.values()) == {ALL_PARTS}
            write_everywhere(store, "all.after")
            assert store.check() == []


def backing_up(path: str, copied: str) -> None:
    store_engine = flowstore.open(path)
    print("ready", flush=True)
    sys.stdin.readline()
    store_engine.backup(copied)
    print("complete", flush=True)


@needs_kill
def test_a_backup_whose_process_is_killed_is_complete_or_not_there(
    path: Path, tmp_path: Path
) -> None:
    with flowstore.open(path) as store, store.transaction() as tx:
        tx.execute("CREATE TABLE ballast (text TEXT)")
        tx.executemany("INSERT INTO ballast VALUES (?)", [("x" * 1000,)] * 20_000)
    seen: Counter[bool] = Counter()
    for number in range(8):
        copied = tmp_path / f"copy-{number}.db"
        with Process(backing_up, path, copied) as child:
            assert child.read() == "ready"
            child.tell()
            time.sleep(random.random() * 0.02 * number)
            told = "complete" in child.kill()
        assert copied.exists() or not told
        seen[copied.exists()] += 1
        if copied.exists():
            assert "sound" in run("check", copied, cwd=tmp_path).stdout
            with closing(sqlite3.connect(copied)) as plain:
                assert plain.execute("SELECT COUNT(*) FROM ballast").fetchone() == (20_000,)
    assert seen[False], "no process was killed before its backup was complete"


@parametrize("word", [10**5000, object(), 5, None, b"created", "x" * 9999], ids=type)
def test_what_is_no_status_is_invalid_data_in_few_words(store: Store, word: Any) -> None:
    with pytest.raises(InvalidData, match="status") as caught:
        store.flows.list_by_status(word)
    assert one_sentence(caught.value) and len(str(caught.value)) < 250
    with pytest.raises(InvalidData):
        Flow().transition_to(word)


@parametrize("make_store", ["memory", "postgres"], indirect=True)
@parametrize("name", SURFACE)
def test_hostile_arguments_are_stored_or_refused_with_nothing_written_and_the_store_unharmed(
    request: pytest.FixtureRequest,
    store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    if name == "store.backup" and store.target.startswith("postgresql"):
        return  # refused, whatever the path
    things = stock(store)
    every = max(1, 240 // STEPS)
    start = random.randrange(every)
    if on_postgres(store):  # what is refused does not depend on the engine
        start, every = 0, 29
    given = list(itertools.islice(hostile_arguments(name, things), start, None, every))
    before = dump(store)
    for argument, arguments, bad in given:
        if bad:
            tried[name] += 1
            with pytest.raises(FlowStoreError) as caught:
                invoke(store, name, arguments)
            assert type(caught.value) is InvalidData, f"{name}, {argument}: {caught.value!r:.300}"
            said = str(caught.value).replace("workflow:", "instance:")
            assert argument in said and one_sentence(caught.value), said
    assert dump(store) == before
    for argument, arguments, bad in given:
        if not bad:
            tried[name] += 1
            counted = store.stats()["tables"]
            try:
                invoke(store, name, arguments)
            except FlowStoreError as error:
                short = len(str(error)) < 2500 or name.startswith(
                    ("store.", "tx.")
                )  # in the words of others
                assert one_sentence(error) and short, f"{argument}: {error!s:.300}"
                assert store.stats()["tables"] == counted, f"{argument}: {error}"
            except Exception as error:
                value = type(arguments.get(argument)).__name__
                raise AssertionError(f"{argument}: {value} raised {error!r}") from error
    assert dump(store).keys() == before.keys()
    assert store.check() == []
    assert contents(store)["log"]  # what was stored can be read
    for status in FlowStatus:
        store.flows.list_by_status(status)
    for read in SURFACE:
        if re.search(r"\.(get|list|load|latest)_", read):
            assert outcome(store, read, things)[0] in ("", "NotFound"), read


def test_the_hostile_inputs_were_many(capsys: pytest.CaptureFixture[str]) -> None:
    if len(tried) < 30:
        pytest.xfail("only some of the methods were tried")
    with capsys.disabled():
        print(f"\nhostile input: {sum(tried.values())} calls of {len(tried)} methods, 0 harmful")
    assert sum(tried.values()) > 20 * len(tried)


@pytest.mark.filterwarnings(
    "ignore:The default date:DeprecationWarning"
)  # of newer versions' sqlite3
def test_hostile_targets_options_paths_and_statements_are_refused_by_an_error_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "copies").mkdir()
    count = itertools.count()
    with flowstore.open("app.db") as store:
        write(store, "run", "kept")

        def opened(target: Any = ":memory:", **options: Any) -> None:
            flowstore.open(target, **options).close()

        def many(statement: str, rows: Any) -> None:
            with store.transaction() as tx:
                tx.executemany(statement, rows)

        sql = partial(execute, store)
        calls: dict[str, Callable[[Any], Any]] = {
            "target": opened,
            "read-only target": partial(opened, read_only=True),
            "url": lambda v: opened(f"sqlite:{str.__str__(v)[:2000]}"),
            "synchronous": lambda v: opened(synchronous=v),
            "busy_timeout": lambda v: opened(busy_timeout=v),
            "lease_seconds": lambda v: opened(lease_seconds=v),
            "backoff": lambda v: opened(backoff=v),
            "clock": lambda v: opened(clock=v) if not callable(v) else None,
            "read_only": lambda v: opened("app.db", read_only=v),
            "backup": store.backup,
            "backup in a folder": lambda v: store.backup(
                f"copies/{next(count)}{str.__str__(v)[:2000]}"
            ),
            "sql": sql,
            "parameters": lambda v: sql("SELECT ?", v),
            "parameter": lambda v: sql("SELECT ?", (v,)),
            "rows": lambda v: many("SELECT ?", [(v,)]),
            "all rows": partial(many, "UPDATE flowstore_counters SET value = ?"),
        }
        for name, call in calls.items():
            for value in HOSTILE:
                if name in ("url", "backup in a folder") and not issubclass(type(value), str):
                    continue
                try:
                    call(value)
                except FlowStoreError as error:
                    assert one_sentence(error)
                except Exception as error:
                    raise AssertionError(
                        f"{name}: {type(value).__name__} raised {error!r}"
                    ) from error
                assert not store._engine.writer.queue
        assert keys(store, "run") == ["kept"]
        assert store.check() == []


def test_only_the_token_itself_is_valid_and_only_its_hash_is_stored(store: Store) -> None:
    secret, token = store.state.create_token("n", "r")
    [row] = execute(store, "SELECT * FROM flowstore_tokens")
    digest = hashlib.sha256(secret.encode()).hexdigest()
    assert digest in row and not any(secret[3:] in str(value) for value in row)
    assert secret not in repr(token) and digest not in repr(token)
    near = {secret[:-1], secret + "0", secret + "\n", " " + secret, secret.upper(), secret[3:]}
    near |= {digest, token.id, "", "%", "fs_"}
    near |= {
        secret[:at] + ("0" if secret[at] != "0" else "1") + secret[at + 1 :]
        for at in range(len(secret))
    }
    assert [text for text in near if store.state.validate_token(text) is not None] == []
    assert store.state.validate_token(secret) == token
    assert len({store.state.create_token("n", "r")[0] for _ in range(100)} | {secret}) == 101


# --- the command line ---

# Commands that end by themselves and at once on whatever store they find; the others are always given what they refuse.
AT_ONCE = {"check", "backup", "compact", "show", "report", "prune", "copy"}


command_lines = st.builds(
    lambda command, rest: [command, *rest] if command in AT_ONCE else [command, *rest, "--no-such-option"],
    st.sampled_from([*flowstore._COMMANDS, "", "nonsense", "--version"]), st.lists(words | st.text(max_size=9), max_size=4),
)  # fmt: skip


def prepared_for_commands(folder: Path) -> None:
    for left in folder.iterdir():
        left.unlink()
    (folder / "text.txt").write_text("this is no database, but it is long enough to be one\n" * 30)
    (folder / "empty.db").touch()
    with flowstore.open(folder / "app.db") as store:
        write(store, "run", "kept")


def test_no_command_line_whatever_ends_in_a_traceback_or_harms_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    count = 0

    @given(command_lines)
    @settings(
        max_examples=200,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=no_health_check,
    )
    def call(arguments: list[str]) -> None:
        nonlocal count
        count += 1
        if count % 20 == 1:
            prepared_for_commands(tmp_path)
        status = flowstore.main(arguments)
        said = capsys.readouterr()
        assert status in (0, 1, 2, 130, 141)
        assert re.fullmatch(r"(flowstore: [^\n]+\n)?", said.err), said.err
        assert bool(said.err) is (status == 2) or status == 1, (status, said)
        if (tmp_path / "app.db").exists():
            with flowstore.open("app.db", read_only=True) as store:
                assert keys(store, "run") == ["kept"]
        assert (tmp_path / "text.txt").read_text().startswith("this is no database")

    call()
    with capsys.disabled():
        print(f"\ncommand line: {count} tried, 0 tracebacks")


# In one process, as it would start with each command line.
COMMAND_LINES = """
for command, at_once in zip(flowstore._COMMANDS, sys.argv[1:], strict=True):
    for argument in (b"\\xff\\xfe", b"a\\nb", b"--store=\\xff", b"\\x1b[31m", b"x" * 5000):
        end = [] if at_once == "True" else ["--no-such-option"]
        sys.argv = ["flowstore", command, os.fsdecode(argument), *end]
        assert flowstore.main() in (1, 2), sys.argv
"""


def test_bytes_that_are_no_text_are_one_line_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in (("LC_ALL", "C"), ("PYTHONUTF8", "0"), ("PYTHONIOENCODING", "ascii")):
        monkeypatch.setenv(name, value)
    process = script(COMMAND_LINES, *(command in AT_ONCE for command in flowstore._COMMANDS))
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, ""), errors
    count = 5 * len(flowstore._COMMANDS)
    assert re.fullmatch(rf"(flowstore: [^\n]+\n){{{count}}}", errors), errors
    assert not list(tmp_path.iterdir())


# --- what the README promises ---


def test_the_readme_has_every_public_method_in_a_line_each() -> None:
    parts: dict[str, type[Any]] = {
        "store": Store,
        "store.runs": flowstore.Runs,
        "run": flowstore.Run,
        "store.flows": FlowStore,
        "store.events": EventStore,
        "store.state": StateBackend,
        "store.workflows": PersistenceProvider,
    }
    wanted = set()
    for part, kind in parts.items():
        for name in {name for name in dir(kind) if not name.startswith("_")}:
            if callable(method := getattr(kind, name)):
                says = " ".join(str(method.__doc__).split("\n\n")[0].split())
                wanted.add(f"| `{part}.{name}` | {says} |")
    lines = (HERE / "README.md").read_text(encoding="utf-8").split("\n")
    listed = [line for line in lines if line.startswith(("| `store", "| `run."))]
    assert set(listed) == wanted and len(listed) == len(wanted)


def test_each_promise_of_the_readme_names_a_test_that_there_is() -> None:
    [section] = re.findall(
        r"\n## What flowstore promises\n(.*?)\n## ",
        (HERE / "README.md").read_text(encoding="utf-8"),
        re.DOTALL,
    )
    promises = [line for line in section.split("\n") if line.startswith("- ")]
    assert len(promises) > 30
    for line in promises:
        named = re.fullmatch(r"- .+: `([Tt]est\w+)`", line)
        assert named, f"without its test: {line}"
        assert callable(globals().get(named[1])), f"there is no {named[1]}"
