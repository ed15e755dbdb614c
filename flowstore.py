# SPDX-License-Identifier: MIT
# flowstore: a durable memory for workflows in one file. Copy it into your own tree.
"""A durable memory for workflows, in one file, on nothing but the standard library.

    >>> import tempfile, os
    >>> folder = tempfile.TemporaryDirectory()
    >>> store = open(os.path.join(folder.name, "app.db"))

An execution is an append-only log of events. Each append is on disk when it returns:
    >>> store.events.append("order-1", "default", {"type": "execution_started", "total": 1250})
    1
    >>> store.events.append("order-1", "default", {"type": "step_completed", "step": "charge"})
    2
    >>> [stored.event["type"] for stored in store.events.load_events("order-1")]
    ['execution_started', 'step_completed']

A work item goes to one worker at a time, under a lease. `complete_work_item(item)` checks that
this worker still has the lease. All that stands in one `transaction()` happens, or none of it:

    >>> _ = store.state.enqueue_work_item(WorkItem(execution_id="order-1", queue_type="mail"))
    >>> item = store.state.claim_work_item("worker-1", ["mail"])
    >>> with store.transaction():
    ...     done = store.state.complete_work_item(item)
    ...     sequence = store.events.append("order-1", "default", {"type": "custom", "mailed": True})
    >>> done.status, sequence
    (<WorkItemStatus.COMPLETED: 'completed'>, 3)
    >>> store.close(); folder.cleanup()

The way of one call, `store.state.claim_work_item(...)`, from top to bottom:
    _Method.__get__             made the method, which hands itself and its arguments to the engine
    _Engine.run_steps           walks through the steps of a method that has several
    _Claims.claim_work_item     the steps: checks the arguments, calls the operation `_claim`
    _LogFacet._poll             a step between two claims: looks until there may be an item
    _Engine.run                 joins the open transaction block, if there is one; else:
    _Writer.lead                leads, or waits until another leader has run the call
    _Writer.commit_calls        BEGIN IMMEDIATE, the queued operations, COMMIT
    _Claims._claim              the operation: statements on the open transaction, records from rows
    _Facet._row, _Tx.rows       one statement, of the view's tenant alone
A read takes a connection from the pool instead (`_Engine.run_pooled`). In an event loop the
operation goes to the thread that writes, or to one that reads (`_AsyncEngine.run`). On a server
each call has a connection of its own (`_PostgresEngine.run_on`).

Words that have one meaning here:
    operation     a function over an open transaction, under `@_write`, `@_read` or their like
    facet         one of the parts of a store that have methods
    run           an execution of one Python function; each step of it is recorded once
    block         `with store.transaction()`
    leader        the call that has the writer, and commits its group: the calls that have queued
    claim, lease  an item handed to one worker, until a time; the fence is the number of the claim
    reclaim       to take back a lease that has expired
    revision      the number of a flow's version; a stale one is refused
    sequence      an event's number in its execution; position its number in the whole log
    log           of an execution: its events; of a file: SQLite's write-ahead log
    checkpoint    to copy the write-ahead log into the file
    view          of a tenant: the same methods over its rows alone; or what is drawn of a store

The chapters, each resting only on those above it:
    Errors        the whole tree under FlowStoreError
    Records       what goes in and out: enums and dataclasses
    Schema        the tables, one statement each
    Rows          values checked; the one mapper between records and rows
    Connections   one connection, the pool of readers, files and their guards
    Writer        group commit, interrupts, checkpoints
    Transactions  the block, savepoints, the user's own SQL
    Fork          what happens before and after one
    Operations    the engine that runs them, how a method becomes a call, tenants' SQL, pruning
    FlowStore, EventStore, StateBackend, PersistenceProvider    the facets, a chapter each
    Runs          durable functions, over the facets above and nothing else
    Store         what open() returns
    Event loop    what open_async() returns: whoever never awaits can skip it
    Views         what is stored, as text, HTML, JSON and metrics
    Command line  what `python flowstore.py --help` lists
    PostgreSQL    a server in place of the file
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import dataclasses
import enum
import functools
import hashlib
import inspect
import io
import itertools
import json
import marshal
import math
import operator
import os
import re
import sqlite3
import sys
import threading
import time
import types
import weakref

if sys.version_info < (3, 11):  # noqa: UP036 (what is imported next is not there, and would say so less clearly)
    raise (SystemExit if __name__ == "__main__" else ImportError)(
        "flowstore: Python 3.11 or newer is needed"
    )
from collections import Counter, deque
from collections.abc import (
    AsyncIterator,
    Callable,
    Collection,
    Coroutine,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, timezone
from enum import StrEnum
from types import SimpleNamespace
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Concatenate,
    Generic,
    NamedTuple,
    ParamSpec,
    Self,
    TypeAlias,
    TypeVar,
    cast,
    dataclass_transform,
    overload,
)

if TYPE_CHECKING:
    import asyncio
    from typing import NoReturn
    from uuid import UUID
else:  # typing.get_type_hints finds these names, without the time that an import takes
    UUID = Any
    asyncio = SimpleNamespace(Event=Any)

__version__ = "0.1.0"

# Without `open`, so that `from flowstore import *` leaves the builtin alone.
__all__ = [
    "DEFAULT_TENANT",
    "AlreadyExists",
    "AlreadyRunning",
    "AlreadyTerminal",
    "ApiToken",
    "ArtifactRef",
    "AsyncEventStore",
    "AsyncFlowStore",
    "AsyncHold",
    "AsyncOpening",
    "AsyncPersistenceProvider",
    "AsyncRun",
    "AsyncRuns",
    "AsyncStateBackend",
    "AsyncStore",
    "AsyncTransaction",
    "CancelPending",
    "CommandName",
    "DeadLetter",
    "Event",
    "EventStore",
    "EventSubscription",
    "EventType",
    "ExecutionError",
    "ExecutionPointer",
    "ExecutionStatus",
    "Flow",
    "FlowEvent",
    "FlowStatus",
    "FlowStep",
    "FlowStepStatus",
    "FlowStore",
    "FlowStoreError",
    "Hold",
    "IllegalTransition",
    "InvalidData",
    "LeaseLost",
    "LimitExceeded",
    "NotFound",
    "PersistenceProvider",
    "PointerStatus",
    "QueuePolicy",
    "ReclaimResult",
    "RevisionMismatch",
    "Run",
    "RunCancelled",
    "RunFailed",
    "Runs",
    "ScheduledCommand",
    "SchemaError",
    "SequenceConflict",
    "Snapshot",
    "StateBackend",
    "StepRuntime",
    "StorageError",
    "Store",
    "StoreBusy",
    "StoreClosed",
    "StoreCorrupt",
    "StoreFull",
    "StoredEvent",
    "Tenant",
    "TenantInactive",
    "TenantLimits",
    "TenantMismatch",
    "TenantStatus",
    "Transaction",
    "View",
    "WorkItem",
    "WorkItemStatus",
    "WorkflowDefinition",
    "WorkflowExecution",
    "WorkflowInstance",
    "WorkflowStatus",
    "new_id",
    "open_async",
]

T = TypeVar("T")
E = TypeVar("E", bound=StrEnum)
R = TypeVar("R")
F = TypeVar("F", bound="_Facet")
P = ParamSpec("P")

_Steps: TypeAlias = Generator[Any, Any, R]  # what @_steps makes a method of


# ==================================================================================================
# Errors: every failure a caller can meet, each with its facts as attributes
# ==================================================================================================


class FlowStoreError(Exception):
    """The root of all errors that this module raises on purpose."""


@dataclass_transform(eq_default=False)
class _ErrorWithFacts(FlowStoreError):
    """An error with attributes: they are its arguments, in order, and fill its message."""

    _message: ClassVar[str]

    def __init_subclass__(cls, message: str) -> None:
        dataclass(eq=False)(cls)._message = message

    def __post_init__(self) -> None:
        self.args = tuple(vars(self).values())

    def __str__(self) -> str:
        return self._message.format(**vars(self))


class NotFound(_ErrorWithFacts, LookupError, message="{kind} {id!r} is not in the store"):
    """The thing to change, or required to exist, is not there."""

    kind: str
    id: str


class AlreadyExists(_ErrorWithFacts, message="{kind} {id!r} is already taken"):
    """An id, a name or a unique key is taken."""

    kind: str
    id: str


class RevisionMismatch(
    _ErrorWithFacts,
    message="revision {expected} is stale, the store has {actual}: "
    "read the flow again, or go on with the flow that the last update returned",
):
    """A flow was changed since it was read."""

    expected: int
    actual: int


class SequenceConflict(
    _ErrorWithFacts,
    message="the log of {execution_id!r} is at {actual}, not at {expected}: "
    "load the events after the one you know, then decide again",
):
    """The log of an execution is not at `expected_sequence`."""

    execution_id: str
    expected: int
    actual: int


class LeaseLost(
    _ErrorWithFacts,
    message="work item {item_id!r} is not leased under this claim: drop it, another claim decides",
):
    """The work item is not, or no longer, leased to this worker or fence."""

    item_id: str


class IllegalTransition(
    _ErrorWithFacts, message="flow {id!r} cannot go from {from_status} to {to_status}"
):
    """A flow's status cannot change in this way."""

    id: str
    from_status: str
    to_status: str


class AlreadyTerminal(_ErrorWithFacts, message="flow {id!r} is {status}: nothing follows"):
    """The flow has ended: nothing follows its status."""

    id: str
    status: str


class CancelPending(
    _ErrorWithFacts,
    message="flow {id!r} is {status} and to be cancelled: only cancelled may follow",
):
    """Cancelling was requested: the only status that may follow is cancelled."""

    id: str
    status: str


class RunFailed(_ErrorWithFacts, message="run {execution_id!r} failed: {error}"):
    """A run has failed for good; `error` says why."""

    execution_id: str
    error: str


class RunCancelled(_ErrorWithFacts, message="run {execution_id!r} was cancelled"):
    """A run was cancelled: nothing more of it is recorded."""

    execution_id: str


class AlreadyRunning(
    _ErrorWithFacts,
    message="run {execution_id!r} is under way in {worker_id!r}: "
    "wait for its end, or until its lease has run out",
):
    """Another thread or process is doing the run now."""

    execution_id: str
    worker_id: str


class TenantMismatch(_ErrorWithFacts, message="{execution_id!r} is not for tenant {tenant_id!r}"):
    """An execution belongs to another tenant; `tenant_id` is the caller's."""

    execution_id: str
    tenant_id: str


class TenantInactive(
    _ErrorWithFacts, message="tenant {tenant_id!r} is not active: it may read, but change nothing"
):
    """A suspended or archived tenant may read, but not change anything."""

    tenant_id: str


class LimitExceeded(_ErrorWithFacts, message="a limit of tenant {tenant_id!r} is reached"):
    """One of the tenant's limits is reached."""

    tenant_id: str


class InvalidData(FlowStoreError, ValueError):
    """A value cannot be stored; the message names the argument and the path in it."""


class StorageError(FlowStoreError):
    """The database failed; the driver's error is `__cause__`."""


class StoreBusy(StorageError):
    """The store was held by others for longer than `busy_timeout`; nothing was written."""


class StoreFull(StorageError):
    """The disk is full; nothing was written, and the store works again when there is room."""


class StoreCorrupt(StorageError):
    """The file is damaged, or is no database."""


class StoreClosed(StorageError):
    """The store was closed."""


class SchemaError(StorageError):
    """The tables in the database are not those this version works on."""


# ==================================================================================================
# Records: enums and dataclasses, grouped by facet
# ==================================================================================================

DEFAULT_TENANT = "default"
"""The tenant that is always registered."""

# Annotations of records. By this name, the chapter Rows finds how a field is written and read.
Id = str
Ref = str
Key = str
Data = str
Json = Any
Limit = int
Attempts = int
Priority = int
Concurrency = int
Rate = float
AnyId: TypeAlias = str | UUID


def _random_bits() -> int:
    """62 bits from the system; those of a seeded generator would be the same after a fork."""
    return int.from_bytes(os.urandom(8)) >> 2


def new_id() -> str:
    """A new time-ordered UUIDv7 as text: new rows land at the right edge of their B-trees."""
    milliseconds, fraction = divmod(time.time_ns() // 1000, 1000)
    number = (
        milliseconds << 80 | 7 << 76 | (fraction * 4096 // 1000) << 64 | 2 << 62 | _random_bits()
    )
    text = f"{number:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


class _RecordType(type):
    """The type of record classes.

    A program may have two copies of this module: reloaded, or vendored twice. A record of one
    copy counts as a record of the other."""

    def __subclasscheck__(cls, other: type) -> bool:
        return super().__subclasscheck__(other) or (
            other.__name__ == cls.__name__ and type(other).__name__ == _RecordType.__name__
        )

    def __instancecheck__(cls, value: object) -> bool:
        return issubclass(type(value), cls)


@dataclass_transform(kw_only_default=True, field_specifiers=(field,))
class _Record(metaclass=_RecordType):
    """Makes each child class a record: a keyword-only dataclass with a short `repr`."""

    def __init_subclass__(cls, frozen: bool = False) -> None:
        dataclass(kw_only=True, repr=False, frozen=frozen)(cls)

    def __repr__(self) -> str:
        shown = []
        for spec in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, spec.name)
            if value in (None, spec.default, "", [], {}):
                continue
            text = str(value) if isinstance(value, (datetime, StrEnum)) else repr(value)
            shown.append(f"{spec.name}={text if len(text) <= 48 else text[:45] + '...'}")
        return f"{type(self).__name__}({', '.join(shown)})"


def _enum_member(kind: type[E], value: Any, path: str) -> E:
    """The member of `kind` that a value is or spells."""
    value_type = type(value)
    if value_type is kind:
        return value  # type: ignore[no-any-return]
    # No member is longer than 50. A value that is not text may be too long to show: its type is.
    word: Any = str.__str__(value)[:50] if issubclass(value_type, str) else value_type
    # The enum of another copy of this module has the same name; a member of any other is a mistake.
    try:
        if value_type.__name__ == kind.__name__ or not issubclass(value_type, enum.Enum):
            return kind(word)
    except ValueError:
        pass
    raise InvalidData(f"{path}: {word!r} is no {kind.__name__} ({', '.join(kind)})")


# --- flows ---
class FlowStatus(StrEnum):
    """Where a flow stands."""

    CREATED, RUNNING, WAITING = "created", "running", "waiting"
    CANCELLED, FINISHED, FAILED = "cancelled", "finished", "failed"

    @property
    def is_terminal(self) -> bool:
        """True when nothing follows this status."""
        return self not in _FLOW_TRANSITIONS

    def can_transition_to(self, status: FlowStatus | str) -> bool:
        """True when a flow in this status may go to `status`; InvalidData for any other word."""
        return _enum_member(FlowStatus, status, "status") in _FLOW_TRANSITIONS.get(self, ())


_FLOW_TRANSITIONS = {
    "created": ("running", "cancelled"),
    "running": ("waiting", "finished", "failed", "cancelled"),
    "waiting": ("running", "failed", "cancelled"),
}


class StepRuntime(StrEnum):
    """Who runs a step."""

    MANAGED, MIRRORED = "managed", "mirrored"


class FlowStepStatus(StrEnum):
    """Where a step stands."""

    PENDING, RUNNING, SUCCEEDED = "pending", "running", "succeeded"
    FAILED, CANCELLED = "failed", "cancelled"


class Flow(_Record):
    """A revision-checked record that one controller moves forward."""

    id: Id = field(default_factory=new_id)
    controller_id: str = ""
    goal: str = ""
    owner_session_key: Key = ""
    requester_origin: str = ""
    current_step: str = ""
    state: Json = field(default_factory=dict)
    wait: Json | None = None
    status: FlowStatus = FlowStatus.CREATED
    cancel_requested: bool = False
    revision: int = 0
    created_at: datetime | None = None
    updated_at: datetime | None = None

    def transition_to(self, status: FlowStatus | str) -> None:
        """Set `status` if it may follow the present one; the store itself checks no transition.

        Raises AlreadyTerminal, CancelPending, IllegalTransition."""
        present = _enum_member(FlowStatus, self.status, "status")
        next_status = _enum_member(FlowStatus, status, "status")
        if present.is_terminal:
            raise AlreadyTerminal(self.id, present)
        if self.cancel_requested and next_status != "cancelled":
            raise CancelPending(self.id, present)
        if not present.can_transition_to(next_status):
            raise IllegalTransition(self.id, present, next_status)
        self.status = next_status

    def request_cancel(self) -> None:
        """Set the flag after which only cancelled may follow; nothing for a flow that has ended."""
        if not _enum_member(FlowStatus, self.status, "status").is_terminal:
            self.cancel_requested = True


class FlowStep(_Record):
    """One piece of a flow's work, found again by its run id. Steps have no revision."""

    id: Id = field(default_factory=new_id)
    flow_id: Id
    runtime: StepRuntime = StepRuntime.MANAGED
    child_session_key: str | None = None
    run_id: Id
    task: str = ""
    status: FlowStepStatus = FlowStepStatus.PENDING
    result: Json | None = None
    created_at: datetime | None = None
    updated_at: datetime | None = None


class FlowEvent(_Record, frozen=True):
    """One line of a flow's audit trail."""

    id: int
    flow_id: Id
    kind: str
    payload: Json
    at: datetime


# --- the execution log ---
class EventType(StrEnum):
    """The event types that programs of this kind share; any other text is an event type, too."""

    EXECUTION_STARTED, STEP_STARTED = "execution_started", "step_started"
    STEP_COMPLETED, STEP_FAILED = "step_completed", "step_failed"
    EXECUTION_PAUSED, EXECUTION_RESUMED = "execution_paused", "execution_resumed"
    EXECUTION_COMPLETED, EXECUTION_FAILED = "execution_completed", "execution_failed"
    EXECUTION_CANCELLED, ARTIFACT_STORED = "execution_cancelled", "artifact_stored"
    STEP_DISCOVERED, TOOL_CALL_STARTED = "step_discovered", "tool_call_started"
    TOOL_CALL_COMPLETED, CHECKPOINT_SAVED = "tool_call_completed", "checkpoint_saved"
    GOAL_EVALUATED, CUSTOM = "goal_evaluated", "custom"


class StoredEvent(_Record, frozen=True):
    """One event of the log: `sequence` counts in its execution, `position` in the whole log."""

    execution_id: Id
    sequence: int
    tenant_id: Id
    event: Json
    timestamp: datetime
    id: Id | None
    position: int


# --- the state backend ---
class ExecutionStatus(StrEnum):
    """Where an execution stands."""

    PENDING, RUNNING, PAUSED = "pending", "running", "paused"
    COMPLETED, FAILED = "completed", "failed"
    CANCELLED, LIMIT_EXCEEDED = "cancelled", "limit_exceeded"

    @property
    def is_terminal(self) -> bool:
        """True when the execution has ended."""
        return self not in ("pending", "running", "paused")


class WorkItemStatus(StrEnum):
    """Where a work item stands."""

    PENDING, CLAIMED, COMPLETED = "pending", "claimed", "completed"
    FAILED, DEAD_LETTERED = "failed", "dead_lettered"


class TenantStatus(StrEnum):
    """Whether a tenant may change anything."""

    ACTIVE, SUSPENDED, ARCHIVED = "active", "suspended", "archived"


class WorkflowDefinition(_Record):
    """A compiled workflow, by id and version."""

    workflow_id: Id
    version: str
    ir: Json
    created_at: datetime | None = None
    tenant_id: Id = DEFAULT_TENANT


class WorkflowExecution(_Record):
    """One run of a workflow and its current state."""

    execution_id: Id = field(default_factory=new_id)
    workflow_id: Id
    workflow_version: str = "1"
    status: ExecutionStatus = ExecutionStatus.PENDING
    initial_input: Json = field(default_factory=dict)
    current_state: Json = field(default_factory=dict)
    started_at: datetime | None = None
    updated_at: datetime | None = None
    completed_at: datetime | None = None
    tenant_id: Id = DEFAULT_TENANT


class Snapshot(_Record, frozen=True):
    """An execution's state as of one sequence of its log."""

    execution_id: Id
    at_sequence: int
    state: Json
    id: Id = field(default_factory=new_id)
    created_at: datetime | None = None


class WorkItem(_Record):
    """One piece of work in a queue; while claimed, `lease_fence` says under which claim.

    Of the items that are available, the highest `priority` (-100 to 100) is claimed first. Of the
    items of a tenant's queue that are not settled, one at most has a given `unique_key`."""

    execution_id: Id
    node_id: str = ""
    queue_type: Id
    payload: Json = field(default_factory=dict)
    attempt: Attempts = 0
    max_attempts: Attempts = 3
    id: Id = field(default_factory=new_id)
    created_at: datetime | None = None
    available_at: datetime | None = None
    lease_expires_at: datetime | None = None
    worker_id: Id | None = None
    lease_fence: int = 0
    status: WorkItemStatus = WorkItemStatus.PENDING
    last_error: str | None = None
    tenant_id: Id = DEFAULT_TENANT
    priority: Priority = 0
    unique_key: Id | None = None
    claimed_at: datetime | None = None
    settled_at: datetime | None = None


AnyItem: TypeAlias = str | UUID | WorkItem


class DeadLetter(_Record, frozen=True):
    """A work item that is not tried again by itself: the fields of `WorkItem`, and the time."""

    execution_id: Id
    node_id: str
    queue_type: Id
    payload: Json
    attempt: int
    max_attempts: int
    id: Id
    created_at: datetime
    available_at: datetime
    lease_expires_at: datetime | None
    worker_id: Id | None
    lease_fence: int
    status: WorkItemStatus
    last_error: str | None
    tenant_id: Id
    dead_lettered_at: datetime
    priority: int = 0
    unique_key: Id | None = None
    claimed_at: datetime | None = None
    settled_at: datetime | None = None


class QueuePolicy(_Record):
    """What claims of one queue have to keep to, in whatever process they are made."""

    queue_type: Id
    paused: bool = False
    max_running: Concurrency | None = None
    rate: Rate | None = None
    per_seconds: Rate = 1.0


class ReclaimResult(_Record, frozen=True):
    """What became of the items whose lease had expired."""

    retryable: list[WorkItem] = field(default_factory=list)
    exhausted: list[DeadLetter] = field(default_factory=list)


class ApiToken(_Record, frozen=True):
    """What the store knows of a token: never its plaintext."""

    id: Id
    name: str
    role: str
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    tenant_id: Id


class TenantLimits(_Record):
    """A tenant's limits, None for none. The store enforces the first two, the caller the others."""

    max_concurrent_executions: Limit | None = None
    max_workflows: Limit | None = None
    max_tokens_per_month: Limit | None = None
    max_cost_per_month_usd: float | None = None


class Tenant(_Record):
    """One tenant."""

    id: Id
    name: str = ""
    status: TenantStatus = TenantStatus.ACTIVE
    policy: Json | None = None
    limits: TenantLimits = field(default_factory=TenantLimits)
    created_at: datetime | None = None
    updated_at: datetime | None = None


class ArtifactRef(_Record, frozen=True):
    """Where an artifact is found again: the SHA-256 of its bytes, in hex."""

    hash: str
    size: int
    media_type: str | None


# --- workflow persistence ---
class WorkflowStatus(StrEnum):
    """Where a workflow instance stands."""

    RUNNABLE, SUSPENDED, COMPLETE, TERMINATED = "Runnable", "Suspended", "Complete", "Terminated"


class PointerStatus(StrEnum):
    """Where one step of a workflow instance stands."""

    PENDING, RUNNING, COMPLETE, SKIPPED = "Pending", "Running", "Complete", "Skipped"
    SLEEPING, WAITING_FOR_EVENT = "Sleeping", "WaitingForEvent"
    FAILED, COMPENSATED, CANCELLED = "Failed", "Compensated", "Cancelled"
    PENDING_PREDECESSOR = "PendingPredecessor"


class CommandName(StrEnum):
    """What a scheduled command asks for."""

    PROCESS_WORKFLOW, PROCESS_EVENT = "ProcessWorkflow", "ProcessEvent"


class ExecutionPointer(_Record):
    """One step of a workflow instance, as far as it got; `id` is unique within its workflow."""

    id: Id = field(default_factory=new_id)
    step_id: int
    active: bool = True
    status: PointerStatus = PointerStatus.PENDING
    sleep_until: datetime | None = None
    persistence_data: Json | None = None
    start_time: datetime | None = None
    end_time: datetime | None = None
    event_name: Key | None = None
    event_key: Key | None = None
    event_published: bool = False
    event_data: Json | None = None
    step_name: str | None = None
    retry_count: int = 0
    children: list[str] = field(default_factory=list)
    context_item: Json | None = None
    predecessor_id: Ref | None = None
    outcome: Json | None = None
    scope: list[str] = field(default_factory=list)
    extension_attributes: dict[str, Any] = field(default_factory=dict)


class WorkflowInstance(_Record):
    """One run of a workflow definition, with its pointers.

    `next_execution` is epoch milliseconds, or None for never."""

    id: Id = field(default_factory=new_id)
    name: Key = ""
    workflow_definition_id: Key
    version: int = 1
    description: str | None = None
    reference: str | None = None
    root_workflow_id: Ref | None = None
    execution_pointers: list[ExecutionPointer] = field(default_factory=list)
    next_execution: int | datetime | None = 0
    status: WorkflowStatus = WorkflowStatus.RUNNABLE
    data: Json = field(default_factory=dict)
    create_time: datetime | None = None
    complete_time: datetime | None = None


class Event(_Record):
    """Something that happened, for subscriptions to pick up."""

    id: Id = field(default_factory=new_id)
    event_name: Key
    event_key: Key
    event_data: Json | None = None
    event_time: datetime | None = None
    is_processed: bool = False


class EventSubscription(_Record):
    """A step that waits for an event, with the token of the host that handles it."""

    id: Id = field(default_factory=new_id)
    workflow_id: Id
    step_id: int
    execution_pointer_id: Id
    event_name: Key
    event_key: Key
    subscribe_as_of: datetime | None = None
    subscription_data: Json | None = None
    external_token: str | None = None
    external_worker_id: Id | None = None
    external_token_expiry: datetime | None = None


class ScheduledCommand(_Record):
    """A command that becomes due at `execute_time`, epoch milliseconds."""

    command_name: CommandName
    data: Data
    execute_time: int | datetime


class ExecutionError(_Record, frozen=True):
    """One failure of a step, as the log of errors keeps it: a record, no exception."""

    workflow_id: Id
    execution_pointer_id: Id
    message: str
    error_time: datetime | None = None


# ==================================================================================================
# Schema: the tables, one statement each, with markers where SQLite and PostgreSQL differ
# ==================================================================================================

# Times are integer microseconds since the epoch, JSON is text. Tables with a plain name are those
# of the systems after which the facets are made. The others are `flowstore_...`, since the user's
# own tables may share the file. An item of the queue is pending, leased or settled, and has an
# entry in one partial index for that. The two tables that every append reads are WITHOUT ROWID:
# this saves a seek. Each statement names the index that serves it, or looks up a whole unique key:
# the plan that SQLite chooses after ANALYZE fits only the rows of that time.
_SCHEMA_VERSION = 2


# When a token was revoked or expired, whichever was first.
_INVALID_SINCE = """CASE WHEN expires_at < revoked_at THEN expires_at
    ELSE COALESCE(revoked_at, expires_at) END"""


class _Dialect:
    """What the markers in our tables and statements stand for in one engine."""

    def __init__(self, **markers: str) -> None:
        self.markers = markers

    @functools.lru_cache(1000)  # noqa: B019 (there are two dialects, which live for ever)
    def resolve(self, text: str, **more: str) -> str:
        """The text for this engine; `more` are markers that stand for something else each time."""
        markers = self.markers | more
        return re.sub(r"{(\w+) ?(\w*)}", lambda found: markers[found[1]].format(found[2]), text)


_SQLITE = _Dialect(
    # In tables and indexes.
    number="INTEGER PRIMARY KEY",
    autoincrement="AUTOINCREMENT",
    without_rowid="WITHOUT ROWID",
    often_vacuumed="",
    id_last=", id",
    definitions_key=", PRIMARY KEY (tenant_id, workflow_id, version)",
    definitions_index="",
    # Columns of work items. On a server they are expressions, which only partial indexes serve.
    status="status",
    tenant_status="status",  # what {status} is in a statement for one tenant
    any_status="status",  # what it is for all tenants, in either
    queue_type="queue_type",
    invalid_since=_INVALID_SINCE,
    unique_key="unique_key",
    given_key="?",
    # In statements alone.
    by="INDEXED BY {}",  # the index that serves the statement
    by_key="NOT INDEXED",
    join="CROSS JOIN",  # in this order
    in_order="",  # leaves out events while an uncommitted one may get a lower position
    is_before="true",  # whether a position is before those of this transaction
    for_update="",  # locks the row that is read, until the transaction ends
    skip_locked="",  # locks the rows that are read, but skips those already locked
)

_QUEUE_INDEXES = """
CREATE INDEX flowstore_pending
    ON flowstore_work_items ({queue_type}, priority DESC, available_at, id)
    WHERE {status} = 'pending';
CREATE INDEX flowstore_pending_by_tenant
    ON flowstore_work_items (tenant_id, {queue_type}, priority DESC, available_at{id_last})
    WHERE {tenant_status} = 'pending';
CREATE INDEX flowstore_leased ON flowstore_work_items ({queue_type}, lease_expires_at, id)
    WHERE {any_status} = 'claimed';
CREATE INDEX flowstore_settled ON flowstore_work_items ({status}, settled_at, id)
    WHERE settled_at IS NOT NULL;
CREATE INDEX flowstore_dead_by_tenant ON flowstore_work_items (tenant_id, settled_at, id)
    WHERE {tenant_status} = 'dead_lettered';
CREATE UNIQUE INDEX flowstore_unique_keys
    ON flowstore_work_items (tenant_id, queue_type, {unique_key})
    WHERE unique_key IS NOT NULL AND settled_at IS NULL;
CREATE INDEX flowstore_items_by_execution ON flowstore_work_items (execution_id, id);
CREATE TABLE flowstore_queues (
    queue_type TEXT PRIMARY KEY, paused INTEGER NOT NULL, max_running INTEGER,
    rate DOUBLE PRECISION, per_seconds DOUBLE PRECISION NOT NULL,
    full_at DOUBLE PRECISION NOT NULL) {without_rowid};
""".strip().rstrip(";")
_TABLES = """
CREATE TABLE flowstore_meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE flows (
    id TEXT PRIMARY KEY, controller_id TEXT NOT NULL, goal TEXT NOT NULL,
    owner_session_key TEXT NOT NULL, requester_origin TEXT NOT NULL, current_step TEXT NOT NULL,
    state TEXT NOT NULL, wait TEXT, status TEXT NOT NULL, cancel_requested INTEGER NOT NULL,
    revision INTEGER NOT NULL, created_at INTEGER NOT NULL, updated_at INTEGER NOT NULL);
CREATE INDEX flows_by_owner ON flows (owner_session_key, created_at, id);
CREATE INDEX flows_by_status ON flows (status, updated_at, id);
CREATE TABLE flow_steps (
    id TEXT PRIMARY KEY, flow_id TEXT NOT NULL REFERENCES flows (id) ON DELETE CASCADE,
    runtime TEXT NOT NULL, child_session_key TEXT, run_id TEXT NOT NULL, task TEXT NOT NULL,
    status TEXT NOT NULL, result TEXT, created_at INTEGER NOT NULL, updated_at INTEGER NOT NULL,
    UNIQUE (flow_id, run_id));
CREATE INDEX flow_steps_by_flow ON flow_steps (flow_id, created_at, id);
CREATE TABLE flow_events (
    id {number} {autoincrement}, flow_id TEXT NOT NULL REFERENCES flows (id) ON DELETE CASCADE,
    kind TEXT NOT NULL, payload TEXT NOT NULL, at INTEGER NOT NULL);
CREATE INDEX flow_events_by_flow ON flow_events (flow_id, id);
CREATE TABLE flowstore_tenants (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, status TEXT NOT NULL, policy TEXT,
    limits TEXT NOT NULL, created_at INTEGER NOT NULL, updated_at INTEGER NOT NULL) {without_rowid};
CREATE INDEX flowstore_tenants_by_time ON flowstore_tenants (created_at, id);
CREATE TABLE flowstore_tokens (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, role TEXT NOT NULL, hash TEXT NOT NULL UNIQUE,
    created_at INTEGER NOT NULL, expires_at INTEGER, revoked_at INTEGER, tenant_id TEXT NOT NULL);
CREATE INDEX flowstore_tokens_by_time ON flowstore_tokens (created_at, id);
CREATE INDEX flowstore_tokens_by_end ON flowstore_tokens (({invalid_since}), id);
CREATE INDEX flowstore_tokens_by_tenant ON flowstore_tokens (tenant_id, created_at, id);
CREATE TABLE flowstore_executions (
    execution_id TEXT PRIMARY KEY, tenant_id TEXT NOT NULL,
    created_at INTEGER NOT NULL) {without_rowid};
CREATE INDEX flowstore_executions_by_tenant
    ON flowstore_executions (tenant_id, created_at, execution_id);
CREATE TABLE flowstore_log (
    position {number}, execution_id TEXT NOT NULL, sequence INTEGER NOT NULL,
    tenant_id TEXT NOT NULL, event TEXT NOT NULL, timestamp INTEGER NOT NULL, event_id TEXT,
    UNIQUE (execution_id, sequence));
CREATE INDEX flowstore_log_by_tenant ON flowstore_log (tenant_id, position);
CREATE UNIQUE INDEX flowstore_log_by_event_id ON flowstore_log (execution_id, event_id)
    WHERE event_id IS NOT NULL;
CREATE TABLE flowstore_runs (
    execution_id TEXT PRIMARY KEY, workflow_id TEXT NOT NULL, workflow_version TEXT NOT NULL,
    status TEXT NOT NULL, initial_input TEXT NOT NULL, current_state TEXT NOT NULL,
    started_at INTEGER NOT NULL, updated_at INTEGER NOT NULL, completed_at INTEGER,
    tenant_id TEXT NOT NULL);
CREATE INDEX flowstore_runs_by_time ON flowstore_runs (updated_at, execution_id);
CREATE INDEX flowstore_runs_by_status ON flowstore_runs (status, updated_at, execution_id);
CREATE INDEX flowstore_runs_by_tenant ON flowstore_runs (tenant_id, updated_at, execution_id);
CREATE INDEX flowstore_runs_by_tenant_status
    ON flowstore_runs (tenant_id, status, updated_at, execution_id);
CREATE TABLE flowstore_snapshots (
    execution_id TEXT NOT NULL, at_sequence INTEGER NOT NULL, state TEXT NOT NULL,
    id TEXT NOT NULL UNIQUE, created_at INTEGER NOT NULL, tenant_id TEXT NOT NULL,
    PRIMARY KEY (execution_id, at_sequence));
CREATE TABLE flowstore_work_items (
    id TEXT PRIMARY KEY, execution_id TEXT NOT NULL, node_id TEXT NOT NULL,
    queue_type TEXT NOT NULL, payload TEXT NOT NULL, attempt INTEGER NOT NULL,
    max_attempts INTEGER NOT NULL, created_at INTEGER NOT NULL, available_at INTEGER NOT NULL,
    lease_expires_at INTEGER, worker_id TEXT, lease_fence INTEGER NOT NULL, status TEXT NOT NULL,
    last_error TEXT, tenant_id TEXT NOT NULL, priority INTEGER NOT NULL DEFAULT 0, unique_key TEXT,
    claimed_at INTEGER, settled_at INTEGER) {often_vacuumed};
CREATE TABLE flowstore_definitions (
    workflow_id TEXT NOT NULL, version TEXT NOT NULL, ir TEXT NOT NULL, created_at INTEGER NOT NULL,
    tenant_id TEXT NOT NULL{definitions_key});
{definitions_index};
CREATE TABLE flowstore_effects (
    tenant_id TEXT NOT NULL, key TEXT NOT NULL, result TEXT NOT NULL, execution_id TEXT,
    PRIMARY KEY (tenant_id, key));
CREATE INDEX flowstore_effects_by_execution ON flowstore_effects (execution_id);
CREATE TABLE flowstore_artifacts (
    tenant_id TEXT NOT NULL, hash TEXT NOT NULL, size INTEGER NOT NULL, media_type TEXT,
    data BLOB NOT NULL, put_at INTEGER NOT NULL, PRIMARY KEY (tenant_id, hash));
CREATE INDEX flowstore_artifacts_by_time ON flowstore_artifacts (put_at, tenant_id, hash);
CREATE TABLE workflows (
    id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, workflow_definition_id TEXT NOT NULL,
    version INTEGER NOT NULL, description TEXT, reference TEXT, root_workflow_id TEXT,
    next_execution INTEGER, status TEXT NOT NULL, data TEXT NOT NULL, create_time INTEGER NOT NULL,
    complete_time INTEGER, stamp INTEGER NOT NULL);
CREATE INDEX workflows_runnable ON workflows (status, next_execution, id)
    WHERE status = 'Runnable' AND next_execution IS NOT NULL;
CREATE INDEX workflows_by_age ON workflows (status, (COALESCE(complete_time, create_time)), id);
CREATE TABLE execution_pointers (
    workflow_id TEXT NOT NULL REFERENCES workflows (id) ON DELETE CASCADE, place INTEGER NOT NULL,
    id TEXT NOT NULL, step_id INTEGER NOT NULL, active INTEGER NOT NULL, status TEXT NOT NULL,
    sleep_until INTEGER, persistence_data TEXT, start_time INTEGER, end_time INTEGER,
    event_name TEXT, event_key TEXT, event_published INTEGER NOT NULL, event_data TEXT,
    step_name TEXT, retry_count INTEGER NOT NULL, children TEXT NOT NULL, context_item TEXT,
    predecessor_id TEXT, outcome TEXT, scope TEXT NOT NULL, extension_attributes TEXT NOT NULL,
    PRIMARY KEY (workflow_id, id));
CREATE INDEX execution_pointers_in_order ON execution_pointers (workflow_id, place, id);
CREATE TABLE events (
    id TEXT PRIMARY KEY, event_name TEXT NOT NULL, event_key TEXT NOT NULL, event_data TEXT,
    event_time INTEGER NOT NULL, is_processed INTEGER NOT NULL);
CREATE INDEX events_by_key ON events (event_name, event_key, event_time{id_last});
CREATE INDEX events_runnable ON events (event_time, id) WHERE is_processed = 0;
CREATE INDEX events_processed ON events (event_time, id) WHERE is_processed = 1;
CREATE TABLE event_subscriptions (
    id TEXT PRIMARY KEY, workflow_id TEXT NOT NULL, step_id INTEGER NOT NULL,
    execution_pointer_id TEXT NOT NULL, event_name TEXT NOT NULL, event_key TEXT NOT NULL,
    subscribe_as_of INTEGER NOT NULL, subscription_data TEXT, external_token TEXT,
    external_worker_id TEXT, external_token_expiry INTEGER, terminated_at INTEGER);
CREATE INDEX event_subscriptions_open
    ON event_subscriptions (event_name, event_key, subscribe_as_of{id_last})
    WHERE terminated_at IS NULL;
CREATE INDEX event_subscriptions_by_workflow ON event_subscriptions (workflow_id);
CREATE INDEX event_subscriptions_ended ON event_subscriptions (terminated_at, id)
    WHERE terminated_at IS NOT NULL;
CREATE TABLE scheduled_commands (
    command_name TEXT NOT NULL, data TEXT NOT NULL, execute_time INTEGER NOT NULL, again_at INTEGER,
    lease_token TEXT, lease_expires_at INTEGER, PRIMARY KEY (command_name, data));
CREATE INDEX scheduled_commands_by_time ON scheduled_commands (execute_time, command_name, data);
CREATE TABLE execution_errors (
    id {number} {autoincrement}, workflow_id TEXT NOT NULL, execution_pointer_id TEXT NOT NULL,
    message TEXT NOT NULL, error_time INTEGER NOT NULL);
CREATE INDEX execution_errors_by_workflow ON execution_errors (workflow_id, id);
CREATE INDEX execution_errors_by_time ON execution_errors (error_time, id);
CREATE TABLE flowstore_counters (definition_id TEXT PRIMARY KEY, value INTEGER NOT NULL);
"""
_TABLES += _QUEUE_INDEXES

_TABLE_NAMES = tuple(re.findall(r"CREATE TABLE (\w+)", _TABLES))
_TABLE_AND_INDEX_NAMES = re.findall(r"CREATE (?:UNIQUE )?(?:TABLE|INDEX) (\w+)", _TABLES)
_QUOTED_TABLE_NAMES = ", ".join(f"'{name}'" for name in _TABLE_NAMES)

# The foreign keys of the user's tables, one row for each column: the table's name, the table, the
# number of the key, the column, the table and the column to which it refers, and what happens to
# the row when the other row is deleted.
_SQLITE.markers["foreign_keys"] = f"""SELECT
    m.name, lower(printf('"%w"', m.name)), k.id, printf('"%w"', k."from"),
    lower(printf('"%w"', k."table")), printf('"%w"', c.name), k.on_delete
    FROM sqlite_master m JOIN pragma_foreign_key_list(m.name) k JOIN pragma_table_info(k."table") c
        ON c.name = k."to" COLLATE NOCASE OR (k."to" IS NULL AND c.pk = k.seq + 1)
    WHERE m.type = 'table' AND m.name NOT IN ({_QUOTED_TABLE_NAMES}) AND m.sql LIKE '%REFERENCES%'
    ORDER BY m.name, k.id, k.seq"""

# By N, the script that upgrades from version N to N + 1. The transaction that finds the file old
# runs them; {now} is its time. To add a column: raise _SCHEMA_VERSION; ALTER TABLE here, with a
# DEFAULT; _TABLES; each record of the table (work items have two: WorkItem and DeadLetter);
# _COLUMNS, if views show it.
_UPGRADES: dict[int, str] = {
    # The queue by three partial indexes in place of eleven. The column dead_lettered_at stays where
    # it is, unused: a view of the user's may name it.
    1: f"""ALTER TABLE flowstore_work_items ADD COLUMN priority INTEGER NOT NULL DEFAULT 0;
        ALTER TABLE flowstore_work_items ADD COLUMN unique_key TEXT;
        ALTER TABLE flowstore_work_items ADD COLUMN claimed_at INTEGER;
        ALTER TABLE flowstore_work_items ADD COLUMN settled_at INTEGER;
        ALTER TABLE flowstore_artifacts ADD COLUMN put_at INTEGER NOT NULL DEFAULT {{now}};
        CREATE INDEX flowstore_artifacts_by_time
            ON flowstore_artifacts (put_at, tenant_id, hash);
        CREATE INDEX flowstore_tokens_by_end ON flowstore_tokens (({{invalid_since}}), id);
        UPDATE flowstore_work_items SET settled_at = COALESCE(dead_lettered_at, available_at)
            WHERE status IN ('completed', 'failed', 'dead_lettered');
        DROP INDEX flowstore_pending;
        DROP INDEX flowstore_pending_by_tenant;
        DROP INDEX flowstore_leases;
        DROP INDEX flowstore_leases_by_tenant;
        DROP INDEX flowstore_dead;
        DROP INDEX flowstore_dead_by_tenant;
        DROP INDEX flowstore_items_by_time;
        DROP INDEX flowstore_items_by_status;
        DROP INDEX flowstore_items_by_queue;
        DROP INDEX flowstore_items_by_tenant;
        DROP INDEX flowstore_items_by_execution;
        {_QUEUE_INDEXES}""",
}


def _split_script(script: str) -> list[str]:
    """The statements of a script; none of them holds a semicolon itself."""
    return re.findall(r"[^;\s][^;]*", script)


# ==================================================================================================
# Rows: values checked, and the one mapper between records and rows
# ==================================================================================================

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
# The first and the last microsecond of the years 1 to 9999 in UTC, counted from the epoch.
_FIRST_TIME = -62_135_596_800_000_000
_LAST_TIME = 253_402_300_799_999_999
_INT_MAX = 2**63 - 1
_JSON_DEPTH = 256
_JSON_DIGITS = 4300
_JSON_INT_MAX = 10**_JSON_DIGITS - 1
_TOO_MANY_DIGITS = re.compile(f"(?<![0-9])[0-9]{{{_JSON_DIGITS + 1}}}")
# Bytes that do not tell how deep encoded JSON is nested: all but brackets, quotes and escapes, and
# all but brackets and quotes.
_NO_STRUCTURE = bytes({*range(256)} - {*b'[]{}"\\bfnrtu'})
_NO_BRACKETS = bytes({*range(256)} - {*b'[]{}"'})
_BRACKET_STEPS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")  # 1 down and, as a signed byte, 1 up

_json_encoder = json.JSONEncoder(allow_nan=False, ensure_ascii=False, separators=(",", ":"))
_json_decoder: Any = json.JSONDecoder()


def _json_chunks(value: Any, _: int) -> Iterable[str]:
    return _json_encoder.iterencode(value)


if make_encoder := getattr(json.encoder, "c_make_encoder", None):
    # encode() makes this function for each value, which is half its time. A circle ends as a
    # RecursionError.
    _json_chunks = make_encoder(
        None,
        _json_encoder.default,
        json.encoder.encode_basestring,
        None,
        ":",
        ",",
        False,
        False,
        False,
    )


def _decode_json(text: str) -> Any:
    """The value of a stored JSON text."""
    try:
        value, end = _json_decoder.scan_once(text, 0)
        return value if end == len(text) else _json_decoder.decode(text)
    except (StopIteration, ValueError, TypeError, RecursionError) as error:
        if isinstance(error, RecursionError) and _json_depth(text) <= _JSON_DEPTH:
            raise  # the caller's stack is full
        raise StoreCorrupt(f"stored JSON cannot be read: {error!r}") from error


# A value may be of a type that has methods of its own, which may raise or lie. So a check asks for
# the value's type, never for its `__class__`. It reads text and numbers by the methods of str, int
# and float themselves. Where code of the value's own has to run, `_read_foreign` runs it.


def _read_foreign(read: Callable[[Any], R], value: object, path: str, *plain: type) -> R:
    """What `read` returns for a value; InvalidData when the value's own code raises.

    A value of one of the types `plain` has no code of its own: only an attribute can be missing.
    Any other error comes from elsewhere (a signal handler, say) and passes. A lack of stack or
    memory always passes."""
    try:
        return read(value)
    except (RecursionError, MemoryError):
        raise
    except Exception as error:
        if type(value) in plain and not isinstance(error, AttributeError):
            raise
        raise InvalidData(
            f"{path}: the value cannot be read, "
            f"its {type(value).__name__} raised {type(error).__name__}"
        ) from error


def _read_field(name: str, record: object, kind: type, path: str) -> Any:
    """One field of a record."""
    return _read_foreign(operator.attrgetter(name), _check_type(kind, record, path), path, kind)


def _check_type(
    kind: type[T] | tuple[type[T], ...], value: object, path: str, needed: str = ""
) -> T:
    """A value of a type (a bool is no number); InvalidData for another."""
    value_type = type(value)
    if value_type is not kind and (value_type is bool or not issubclass(value_type, kind)):
        needed = needed or f"a {kind.__name__}"  # type: ignore[union-attr]
        raise InvalidData(f"{path}: {needed} is needed, not {value_type.__name__}")
    return value  # type: ignore[return-value]


def _text(value: object, path: str, most: int = sys.maxsize, least: int = 0) -> str:
    """Text that a database can hold: no NUL, no lone surrogates."""
    text = value if type(value) is str else str.__str__(_check_type(str, value, path, "text"))
    if "\0" in text:
        raise InvalidData(f"{path}: text cannot hold NUL")
    if not least <= len(text) <= most:
        raise InvalidData(f"{path}: {least} to {most} characters are needed, not {len(text)}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidData(f"{path}: text cannot hold a lone surrogate") from None
    return text


_key = functools.partial(_text, most=255)


def _id(value: object, path: str) -> str:
    """1 to 255 characters, or a UUID."""
    if type(value) is str and 0 < len(value) <= 255 and value.isascii() and "\0" not in value:
        return value  # nearly every id, and each call checks some
    return _text(_uuid_text(value, path), path, 255, 1)


def _ref(value: object, path: str) -> str:
    """The name of something elsewhere: any text, or a UUID."""
    return _text(_uuid_text(value, path), path)


def _uuid_text(value: object, path: str) -> object:
    """The text of a UUID; any other value as it is."""
    uuid = sys.modules.get("uuid")  # there is no UUID before somebody imports this module
    if uuid is None or not issubclass(type(value), uuid.UUID):
        return value
    return _read_foreign(uuid.UUID.__str__, value, path, uuid.UUID)


def _int(value: object, path: str, least: int = -_INT_MAX - 1, most: int = _INT_MAX) -> int:
    number = (
        value
        if type(value) is int
        else int.__int__(_check_type(int, value, path, "a whole number"))
    )
    if not least <= number <= most:
        raise InvalidData(f"{path}: a number from {least} to {most} is needed")
    return number


def _bool(value: object, path: str) -> int:
    return int(_check_type(bool, value, path, "True or False"))


def _count(value: object, path: str) -> int:
    """A limit, an offset, a number to keep: below 0 counts as 0."""
    return max(0, _int(value, path))


def _limit(value: object) -> int:
    return _INT_MAX if value is None else _count(value, "limit")


def _number(
    value: Any,
    path: str,
    needed: str,
    least: float = -sys.float_info.max,
    most: float = sys.float_info.max,
) -> float:
    """A finite number, whole or not."""
    if issubclass(type(value), float):
        number = float.__float__(value)
    else:
        number = int.__int__(_check_type(int, value, path, needed))
    if not least <= number <= most:
        raise InvalidData(f"{path}: {needed} is needed")
    return number


def _seconds(value: object, path: str) -> float:
    """A span in seconds; below 0 counts as 0."""
    return max(0.0, float(_number(value, path, "a finite number of seconds")))


def _rate(value: object, path: str) -> float:
    return float(_number(value, path, "a finite number above 0", math.ulp(0.0)))


# A span in seconds: below 0 it is refused.
_span = functools.partial(_number, needed="a finite number of seconds, 0 or more", least=0)


def _microseconds(value: object, path: str) -> int:
    """The microseconds from the epoch to an aware datetime."""
    time = _check_type(datetime, value, path, "an aware datetime")
    zone = _zone_of(time)
    if zone is None:
        raise InvalidData(f"{path}: the datetime has no time zone; pass an aware one")
    if type(time) is datetime and type(zone) is timezone:
        microseconds = _since_epoch(time)
    else:
        microseconds = _int(_read_foreign(_since_epoch, time, path), path)
    if not _FIRST_TIME <= microseconds <= _LAST_TIME:
        raise InvalidData(f"{path}: the time lies outside the years 1 to 9999 in UTC")
    return microseconds


# Reads the attribute of `datetime` itself, of which a type with code of its own may have another.
_zone_of = datetime.tzinfo.__get__


def _since_epoch(time: datetime) -> int:
    return (time - _EPOCH) // _MICROSECOND


def _datetime_of(microseconds: int) -> datetime:
    return _EPOCH + microseconds * _MICROSECOND


def _time_after(now: int, seconds: float, path: str) -> int:
    """The time `seconds` after `now`, both times in microseconds."""
    time = now + round(min(seconds, 1e15) * 1e6)
    if time > _LAST_TIME:
        raise InvalidData(f"{path}: the time would lie beyond the year 9999")
    return time


def _span_of(age: object, path: str) -> int:
    """The microseconds of a timedelta; below 0 counts as 0."""
    span = timedelta.__pos__(_check_type(timedelta, age, path, "a timedelta"))
    return max(timedelta(0), span) // _MICROSECOND


def _milliseconds(value: object, path: str) -> int:
    """Epoch milliseconds: a whole number, or an aware datetime."""
    if issubclass(type(value), datetime):
        return _microseconds(value, path) // 1000
    return _int(value, path)


def _json(value: object, path: str) -> str:
    """The text of a JSON value; InvalidData names the place in a value that JSON cannot hold."""
    try:
        text = "".join(_json_chunks(value, 0))
        text.encode()  # refuses lone surrogates
        # Text with fewer brackets cannot be nested too deeply.
        if text.count("[") + text.count("{") > _JSON_DEPTH and _json_depth(text) > _JSON_DEPTH:
            raise ValueError(f"nested deeper than {_JSON_DEPTH} levels")
    except Exception as error:
        _refuse_json(value, path)
        if not isinstance(error, (TypeError, ValueError)):
            raise  # the value can be read, so this error comes from elsewhere
        raise InvalidData(f"{path}: {error}") from None
    if sys.get_int_max_str_digits() != _JSON_DIGITS and _TOO_MANY_DIGITS.search(text):
        _refuse_json(value, path)  # passes where the digits stand in a string
    return text


def _json_depth(text: str) -> int:
    """How deep encoded JSON is nested.

    The brackets of the text tell it in C, which takes less time than the encoding. A walk over the
    value would run in Python, and a value with code of its own could show it other members than it
    showed to the encoder."""
    data = text.encode().translate(None, _NO_STRUCTURE)
    data = data.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _NO_BRACKETS)
    # To leave out empty pairs of quotes does not change what is inside a string and what outside.
    outside = b"".join(data.replace(b'""', b"").split(b'"')[::2])
    steps = memoryview(outside.translate(_BRACKET_STEPS)).cast("b")
    return max(itertools.accumulate(steps), default=0)


def _refuse_json(value: object, path: str, depth: int = 0) -> None:
    """Raise InvalidData for the first place in a value that JSON cannot hold, if there is one."""
    kind = type(value)
    if not issubclass(kind, (dict, list, tuple)):
        _refuse_scalar(value, path)
        return
    if depth == _JSON_DEPTH:
        raise InvalidData(f"{path[:200]}: nested deeper than {_JSON_DEPTH} levels") from None
    for key, member in _read_foreign(_members, value, path, dict, list, tuple).items():
        if issubclass(kind, dict):
            _refuse_scalar(key, f"{path}, a key of it")
            step = "." + _read_foreign(_json_encoder.encode, key, path).strip('"')[:100]
        else:
            step = f"[{key}]"
        _refuse_json(member, path + step, depth + 1)


def _members(value: Any) -> dict[Any, Any]:
    """The members of a list or a dict, by index or key."""
    return dict(value.items() if issubclass(type(value), dict) else enumerate(value))


def _refuse_scalar(value: Any, path: str) -> None:
    """Raise InvalidData for a value that is not JSON, or that holds others."""
    kind = type(value)
    if value is None or kind is bool:
        return
    if issubclass(kind, str):
        _text(str.__str__(value).replace("\0", ""), path)  # JSON may hold NUL
    elif issubclass(kind, (int, float)):
        needed = "a finite number of at most 4,300 digits"
        _number(value, path, needed, -_JSON_INT_MAX, _JSON_INT_MAX)
    else:
        raise InvalidData(f"{path}: {kind.__name__} is not JSON") from None


def _json_object(value: object, path: str) -> str:
    return _json(_check_type(dict, value, path, "a JSON object"), path)


def _check_list(value: object, path: str, needed: str = "a list") -> Sequence[Any]:
    """A list or a tuple."""
    if type(value) in (list, tuple):
        return value  # type: ignore[return-value]
    return _read_foreign(list, _check_type((list, tuple), value, path, needed), path)


def _texts(value: object, path: str) -> str:
    """A list of text, as JSON."""
    members = enumerate(_check_list(value, path, "a list of text"))
    return _json_encoder.encode([_text(member, f"{path}[{index}]") for index, member in members])


def _check_callable(value: object, path: str) -> None:
    if not callable(value):
        raise InvalidData(f"{path}: a function is needed, not {type(value).__name__}")


def _none_or(check: Callable[[Any, str], R], value: object, path: str) -> R | None:
    """A value as `check` makes it, None for None."""
    return None if value is None else check(value, path)


def _error_text(error: BaseException) -> str:
    """An error as text that can be stored."""
    try:
        text = f"{type(error).__name__}: {error}".removesuffix(": ")
    except Exception:  # its own code failed
        text = type(error).__name__
    return text.replace("\0", "").encode(errors="backslashreplace").decode()


# By the annotation of a field: how it goes into its column, and how it comes out of it. Without a
# decoder it comes out as it is stored.
_Encoder: TypeAlias = "Callable[[Any, str], Any]"
_Decoder: TypeAlias = "Callable[[Any], Any]"
_ENCODERS: dict[str, _Encoder] = {
    "Id": _id,
    "Ref": _ref,
    "Key": _key,
    "Data": functools.partial(_text, most=512),
    "str": _text,
    "int": _int,
    "Limit": functools.partial(_int, least=0),
    "Attempts": functools.partial(_int, least=0, most=2**31 - 1),
    "Priority": functools.partial(_int, least=-100, most=100),
    "Concurrency": functools.partial(_int, least=1),
    "Rate": _rate,
    "float": functools.partial(_number, needed="an amount of 0 or more", least=0),
    "bool": _bool,
    "datetime": _microseconds,
    "int | datetime": _milliseconds,
    "Json": _json,
    "list[str]": _texts,
    "dict[str, Any]": _json_object,
    "TenantLimits": lambda value, path: _json(_LIMITS.encode(value, path), path),
}
_DECODERS: dict[str, _Decoder] = {
    "bool": bool,
    "datetime": _datetime_of,
    "Json": _decode_json,
    "list[str]": _decode_json,
    "dict[str, Any]": _decode_json,
    "TenantLimits": lambda text: TenantLimits(**_decode_json(text)),
}
for _enum_type in (
    FlowStatus,
    StepRuntime,
    FlowStepStatus,
    ExecutionStatus,
    WorkItemStatus,
    TenantStatus,
    WorkflowStatus,
    PointerStatus,
    CommandName,
):
    _ENCODERS[_enum_type.__name__] = functools.partial(_enum_member, _enum_type)
    _DECODERS[_enum_type.__name__] = {str(member): member for member in _enum_type}.__getitem__

# What comes of reading a stored value that is damaged.
_UNREADABLE = (ValueError, TypeError, OverflowError, LookupError)
_UNCHANGING_COLUMNS = ("id", "flow_id", "created_at", "create_time")
# Columns of times that the store's clock fills where the record has None.
_CLOCK_COLUMNS = (
    "created_at",
    "updated_at",
    "started_at",
    "available_at",
    "create_time",
    "event_time",
    "error_time",
    "subscribe_as_of",
)


@dataclass(eq=False)
class _Mapper(Generic[T]):
    """Turns one type of record into rows of its table and back, as its fields' annotations say."""

    record: type[T]
    table: str
    kind: str = ""  # the name in errors
    key: str = "id"  # the column of the id
    more: tuple[str, ...] = ()  # columns that are not fields of the record
    named: Mapping[str, str] = field(default_factory=dict)  # columns of other names than the field

    def __post_init__(self) -> None:
        self.fields: list[str] = []
        self.encoders: dict[str, _Encoder] = {}  # by column
        self.decoders: dict[str, _Decoder] = {}  # by field
        self._nullable: set[str] = set()
        for spec in dataclasses.fields(self.record):  # type: ignore[arg-type]
            annotation, optional, _ = str(spec.type).partition(" | None")
            if annotation not in _ENCODERS:
                continue  # pointers have rows of their own
            column = self.named.get(spec.name, spec.name)
            self.fields.append(spec.name)
            self.encoders[column] = _ENCODERS[annotation]
            if annotation in _DECODERS:
                self.decoders[spec.name] = _DECODERS[annotation]
            if optional:
                self._nullable.add(column)
        self._read = operator.attrgetter(*self.fields)
        self.columns = ", ".join(self.encoders)
        self.written = [*self.encoders, *self.more]
        changed = [name for name in self.written if name not in _UNCHANGING_COLUMNS]
        # INSERT of the columns `written`, in that order; of nothing where a unique key is taken.
        self.insert = (
            f"INSERT INTO {self.table} ({', '.join(self.written)}) "
            f"VALUES ({', '.join('?' * len(self.written))}) ON CONFLICT DO NOTHING"
        )
        # UPDATE by id of all columns that may change; `changes` picks its parameters.
        self.update = f"UPDATE {self.table} SET {' = ?, '.join(changed)} = ? WHERE {self.key} = ?"
        self.changes = operator.itemgetter(*changed, self.key)

    def upsert(self, unique: str) -> str:
        """INSERT of the columns `written`, over the row with the same `unique` columns if any."""
        others = [name for name in self.written if name not in unique.split(", ")]
        changed = ", ".join(f"{name} = excluded.{name}" for name in others)
        return self.insert.replace("DO NOTHING", f"({unique}) DO UPDATE SET {changed}")

    def encode(self, record: object, path: str = "", now: int | None = None) -> dict[str, Any]:
        """Values by column, with `now` for the clock's times that are None.

        InvalidData names the field."""
        argument = path or self.kind.split()[-1]
        if type(record) is not self.record:
            _check_type(self.record, record, argument)
        fields = _read_foreign(self._read, record, argument, self.record)
        values: dict[str, Any] = self._encode_fields(now, path and f"{path}.", *fields)
        return values

    def decode(self, row: Iterable[Any]) -> T:
        """The record of one row, whose values are in the order of `columns`."""
        record = object.__new__(self.record)
        try:
            # Not by __init__, which takes half the time of loading a log.
            record.__dict__.update(self._decode_fields(*row))
        except _UNREADABLE as error:
            raise StoreCorrupt(
                f"a stored {self.record.__name__} cannot be read: {error!r}"
            ) from error
        return record

    @functools.cached_property
    def _encode_fields(self) -> Any:
        """A function from the fields' values to those of the columns."""
        values = {}
        names: dict[str, Any] = {"encoders": self.encoders}
        for name, column in zip(self.fields, self.encoders, strict=True):
            value = f"encoders[{column!r}]({name}, prefix + {column!r})"
            default = getattr(self.record, name, None)
            if column in self._nullable:
                empty = "now" if column in _CLOCK_COLUMNS else None
                value = f"{empty} if {name} is None else {value}"
            elif default is not None:  # a field that has its default needs no check
                names[f"default_{name}"] = default
                names[f"stored_{name}"] = self.encoders[column](default, name)
                value = f"stored_{name} if {name} is default_{name} else {value}"
            values[column] = value
        return self._compile("now, prefix, ", values, **names)

    @functools.cached_property
    def _decode_fields(self) -> Any:
        """A function from the values of a row to those of the fields."""
        values = {name: name for name in self.fields}
        for name, decode in self.decoders.items():
            value = f"decoders[{name!r}]({name})"
            if decode is _datetime_of:  # the most frequent: without the call
                value = f"epoch + {name} * microsecond"
            values[name] = f"None if {name} is None else {value}"
        names = {"decoders": self.decoders, "epoch": _EPOCH, "microsecond": _MICROSECOND}
        return self._compile("", values, **names)

    def _compile(self, more: str, values: dict[str, str], **names: Any) -> Any:
        """A function that makes a dict of the fields: a loop over them takes twice as long."""
        members = ", ".join(f"{name!r}: {value}" for name, value in values.items())
        return eval(f"lambda {more}{', '.join(self.fields)}: {{{members}}}", names)

    def maybe(self, row: Iterable[Any] | None) -> T | None:
        """The record of a row, None without one."""
        return None if row is None else self.decode(row)

    def decode_all(self, rows: Iterable[Any]) -> list[T]:
        """The records of many rows."""
        return list(map(self.decode, rows))


_FLOW = _Mapper(Flow, "flows", "flow")
_STEP = _Mapper(FlowStep, "flow_steps", "flow step")
_FLOW_EVENT = _Mapper(FlowEvent, "flow_events")
_STORED = _Mapper(StoredEvent, "flowstore_log", named={"id": "event_id"})
_DEFINITION = _Mapper(WorkflowDefinition, "flowstore_definitions", "workflow definition")
_RUN = _Mapper(WorkflowExecution, "flowstore_runs", "execution", key="execution_id")
_SNAPSHOT = _Mapper(Snapshot, "flowstore_snapshots", "snapshot", more=("tenant_id",))
_ITEM = _Mapper(WorkItem, "flowstore_work_items", "work item")
_DEAD = _Mapper(
    DeadLetter,
    "flowstore_work_items",
    "dead letter",
    named={"dead_lettered_at": "settled_at AS dead_lettered_at"},
)
_POLICY = _Mapper(
    QueuePolicy, "flowstore_queues", "queue policy", key="queue_type", more=("full_at",)
)
_TOKEN = _Mapper(ApiToken, "flowstore_tokens", "token", more=("hash",))
_LIMITS: _Mapper[TenantLimits] = _Mapper(TenantLimits, "")  # a column of tenants
_TENANT = _Mapper(Tenant, "flowstore_tenants", "tenant")
_ARTIFACT = _Mapper(
    ArtifactRef, "flowstore_artifacts", "artifact", more=("tenant_id", "data", "put_at")
)
_INSTANCE = _Mapper(WorkflowInstance, "workflows", "workflow", more=("stamp",))
_POINTER = _Mapper(ExecutionPointer, "execution_pointers", "pointer", more=("workflow_id", "place"))
_EVENT = _Mapper(Event, "events", "event")
_SUBSCRIPTION = _Mapper(EventSubscription, "event_subscriptions", "subscription")
_COMMAND = _Mapper(ScheduledCommand, "scheduled_commands", "command")
_ERROR = _Mapper(ExecutionError, "execution_errors", "error")


# ==================================================================================================
# Connections: one connection, the pool of readers, files, and the guard on their locks
# ==================================================================================================

_IDLE_READERS = 8
# A log with that many frames is checkpointed, and then overwritten from its start. A growing log
# costs twice as much per fsync, since the file's size is written too.
_WAL_FRAMES = 1500
_MAX_PATH_BYTES = 504  # SQLite has room for 512, with "-journal" at the end
_MAX_NAME_BYTES = 255  # of a file system, with the suffix that SQLite adds
_INFO = 20  # as in `logging`
_WARNING = 30
_WAL_BOUND = 16 << 20  # bytes of the log from which on a checkpoint waits for readers

# Real time, for waits. It is a partial, since freezegun replaces each module's name for
# time.monotonic.
_monotonic = (
    functools.partial(time.clock_gettime, time.CLOCK_MONOTONIC)
    if hasattr(time, "CLOCK_MONOTONIC")
    else functools.partial(time.monotonic)
)

# All copies of this module in the process share this: it may be reloaded, or vendored twice.
# A fork, a file of the parent and a lock on a file concern every copy.
_process: Any = sys.modules.setdefault(
    "_flowstore_process",
    SimpleNamespace(  # type: ignore[arg-type]
        __name__="_flowstore_process",  # as tools that walk through all modules expect
        lock=threading.RLock(),  # guards `engines`; a fork holds it
        engines=weakref.WeakSet(),
        forking=[],  # the engines that the fork under way has stopped
        fork_hooks=False,  # whether the hooks of the chapter "Fork" are registered
        files_of_parent=set(),  # file ids that a forked child must not touch
        leaked_connections=[],  # never closed, since closing them would do harm
        # Guards the three below. A thread that holds it waits for no other lock.
        pin_lock=threading.RLock(),
        open_files=[],  # the file id of each open connection
        pinned_files=set(),  # the file ids with a second lock
        lock_descriptors={},  # by file id: our own descriptor, where locks have to be taken again
        # The innermost open transaction block of this thread or task, one for each engine. Tasks
        # inherit it from the task that starts them. The references are weak, so that a block whose
        # end was never run is noticed and rolled back.
        blocks=contextvars.ContextVar("flowstore", default=()),
    ),
)
_blocks: contextvars.ContextVar[tuple[weakref.ref[_Block], ...]] = _process.blocks


def _log(level: int, message: str, *args: object) -> None:
    """Write a line to the logger "flowstore": warnings always, others if `logging` is imported.

    An exception of the program's handlers is dropped: the line tells of what has been done."""
    if level >= _WARNING or "logging" in sys.modules:
        import logging

        logger = logging.getLogger("flowstore")
        if not logger.handlers:
            logger.addHandler(logging.NullHandler())
        with contextlib.suppress(Exception):
            logger.log(level, message, *args)


_Line: TypeAlias = "tuple[Any, ...]"  # of the program's log: level, message, arguments


def _write_lines(lines: Iterable[_Line]) -> None:
    """Write lines to the program's log. The caller holds nothing: handlers may call the store."""
    for line in lines:
        _log(*line)


def _failure(error: Exception) -> FlowStoreError:
    """The error that a caller gets for an error of the driver."""
    if isinstance(error, (OverflowError, UnicodeError, sqlite3.DataError)):
        return InvalidData(f"the value cannot be stored: {error}")
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if "decode to UTF-8" in str(error):  # this one has no code
        code = sqlite3.SQLITE_CORRUPT
    match code:
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            return StoreBusy(
                "the store is held by another transaction: try again, or open it with a longer "
                "busy_timeout"
            )
        case sqlite3.SQLITE_FULL:
            return StoreFull("the disk is full, nothing was written: make room and try again")
        case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB:
            return StoreCorrupt(
                f"the file is damaged or not an SQLite database ({error!s:.60}): restore it from a "
                "backup"
            )
        case sqlite3.SQLITE_CANTOPEN if reason := _no_descriptor():
            return StorageError(reason)
        case _:
            return StorageError(f"the database failed: {error}")


# What sqlite3 raises for a statement; the last three are for values that it cannot bind.
_DRIVER_ERRORS = (sqlite3.Error, sqlite3.Warning, OverflowError, UnicodeError, TypeError)


class _Tx:
    """One connection as operations see it: rows in, rows out, the driver's errors as ours."""

    def __init__(
        self, db: Any, clock: Callable[[], datetime] | None, dialect: _Dialect = _SQLITE
    ) -> None:
        self.dialect = dialect
        self.db = db  # an sqlite3.Connection, or what is used like one
        self.file_id: tuple[int, ...] = ()  # of the database file, if its connections are counted
        self.lines: list[_Line] = []  # of the program's log, written after the commit
        # Size and time of the file when it was opened, where SQLite takes no lock on it.
        self.stamp: tuple[int, int] | None = None
        self._clock = clock

    def rows(self, sql: str, *params: Any) -> list[tuple[Any, ...]]:
        """All rows of a statement: a cursor left half read would hold its snapshot open."""
        try:
            return self.db.execute(sql, params).fetchall()  # type: ignore[no-any-return]
        except _DRIVER_ERRORS as error:
            raise _failure(error) from error

    def row(self, sql: str, *params: Any) -> tuple[Any, ...] | None:
        """The first row of a statement, or None."""
        rows = self.rows(sql, *params)
        return rows[0] if rows else None

    def run(self, sql: str, *params: Any) -> int:
        """Execute a statement; how many rows it wrote."""
        try:
            return self.db.execute(sql, params).rowcount  # type: ignore[no-any-return]
        except _DRIVER_ERRORS as error:
            raise _failure(error) from error

    def run_many(self, sql: str, rows: Iterable[Sequence[Any]]) -> int:
        """Execute a statement for each of the rows of parameters; how many rows it wrote."""
        try:
            return self.db.executemany(sql, rows).rowcount  # type: ignore[no-any-return]
        except _DRIVER_ERRORS as error:
            raise _failure(error) from error

    def rollback(self) -> None:
        """Undo what is open, if anything."""
        try:
            self.db.rollback()
        except _DRIVER_ERRORS as error:
            raise _failure(error) from error

    def warn(self, message: str, *args: object) -> None:
        """Write a warning to the program's log, once this transaction has committed."""
        self.lines.append((_WARNING, message, *args))

    def take_lines(self) -> list[_Line]:
        """Take the lines; the caller writes them."""
        lines = self.lines
        self.lines = []
        return lines

    def now(self) -> int:
        """The store's time in microseconds."""
        return (
            time.time_ns() // 1000
            if self._clock is None
            else _microseconds(self._clock(), "clock()")
        )


def _add_tenant(tx: _Tx, tenant_id: str) -> None:
    """Register a tenant of which only the id is known."""
    tx.run(_TENANT.insert, *_TENANT.encode(Tenant(id=tenant_id), now=tx.now()).values())


class _Connection:
    """One database connection under a lock of its own.

    It is opened at its first use, and again at its first use after a fork."""

    tx: _Tx | None = None
    companions: Sequence[Any] = ()  # of the writer: closed before it

    def __init__(self, engine: _Engine) -> None:
        self.engine = engine
        self.lock = threading.RLock()

    def use(self) -> _Tx:
        """The open connection; the caller holds the lock."""
        if self.tx is None:
            try:
                self.tx = self.engine.connect()
            except _DRIVER_ERRORS as error:
                raise _failure(error) from error
        return self.tx

    @property
    def in_transaction(self) -> bool:
        """True while a transaction is open on it."""
        return self.tx is not None and self.tx.db.in_transaction

    def close(self) -> None:
        """Close; what is not committed is rolled back."""
        tx = self.tx
        self.tx = None
        for companion in self.companions:
            companion.close()
        if tx is not None:
            self.engine.disconnect(tx)

    def leak(self) -> None:
        """Let go of the connection without closing it.

        To close it would write to the file, or end the session, of another process."""
        if self.tx is not None:
            _process.leaked_connections.append(self.tx.db)
            # When the interpreter ends it drops all references that it knows, and a connection that
            # nothing refers to is closed. It does not know this one.
            with contextlib.suppress(Exception):
                import ctypes

                ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.tx.db))
            self.tx = None
        for companion in self.companions:
            companion.leak()

    # A store may be dropped without close(), and the descriptor would stay open.
    __del__ = close


class _Pool:
    """The connections of one engine: readers that calls check out and in, and others for one use.

    There are as many readers as calls that read at one time, however many threads there were."""

    def __init__(self, engine: _Engine) -> None:
        self.engine = engine
        self.mutex = engine.mutex
        self.connections: weakref.WeakSet[_Connection] = weakref.WeakSet()  # all of the engine's
        self.idle: list[_Connection] = []
        self.keeps_idle = True

    def new_connection(self) -> _Connection:
        """A connection that the caller closes."""
        connection = _Connection(self.engine)
        with self.mutex:
            self.connections.add(connection)
        return connection

    def check_out(self, writes: bool = False, waits: bool = True) -> _Connection:
        """A connection for one call or block, an idle one first.

        The rest matters on a server, where the number of connections is limited: whether it is
        one that writes, and whether the caller can wait for it."""
        # (An interrupt between a call and `return` inside `with` would leave the mutex locked.)
        with self.mutex:
            connection = self.idle.pop() if self.idle else None
        return connection or self.new_connection()

    def check_in(self, connection: _Connection) -> None:
        """Take a connection back; a transaction that is still open on it is rolled back."""
        with connection.lock:
            if connection.tx is not None:
                try:
                    connection.tx.db.rollback()
                except (sqlite3.Error, StorageError):  # it is broken
                    connection.close()
            with self.mutex:
                is_open = connection.tx is not None
                if is_open and self.keeps_idle and len(self.idle) < _IDLE_READERS:
                    self.idle.append(connection)
                    return
            connection.close()


def _close_all(connections: Iterable[_Connection]) -> None:
    """Close the connections of an engine that is gone, or as the interpreter ends."""
    for connection in list(connections):
        if connection.lock.acquire(timeout=1):
            with contextlib.suppress(sqlite3.Error):
                connection.close()
            connection.lock.release()


# --- files ---
def _file_id(path: str | int) -> tuple[int, ...]:
    """Inode and device of a path or descriptor; () if there is no such file."""
    with contextlib.suppress(OSError):
        return os.stat(path)[1:3]
    return ()


def _size_and_mtime(path: str) -> tuple[int, int]:
    """Size of a file and time of its last write; zeros if it is not there."""
    with contextlib.suppress(OSError):
        state = os.stat(path)
        return state.st_size, state.st_mtime_ns
    return 0, 0


def _no_descriptor() -> str:
    """A sentence if too few file descriptors are left for a connection, else ""."""
    try:
        with contextlib.ExitStack() as files:
            for _ in range(4):  # the file, its -wal, its -shm, their folder
                files.enter_context(io.FileIO(os.devnull))
    except OSError as error:
        return f"no file descriptor is left ({error.strerror}): close files, or raise their limit"
    return ""


def _missing_right(read_only: bool, *names: str) -> str:
    """A sentence on the first of these files that is there and may not be used, or ""."""
    right, mode = ("read", os.R_OK) if read_only else ("read and write", os.R_OK | os.W_OK)
    for name in names:
        if os.path.exists(name) and not os.access(
            name, mode, effective_ids=os.access in os.supports_effective_ids
        ):
            return f"there is no permission to {right} {name}"
    return ""


def _can_lock(path: str) -> bool:
    """Whether SQLite can make the files beside the database that it needs for locking."""
    return not _missing_right(False, path, os.path.dirname(path))


def _explain(error: sqlite3.Error, path: str, read_only: bool) -> FlowStoreError:
    """The error that a caller gets, with the file and the missing right: SQLite tells neither."""
    failure = _failure(error)
    reason = ""
    if type(failure) is StorageError:
        folder = os.path.dirname(path)
        reason = _missing_right(read_only, path, f"{path}-wal", f"{path}-shm", folder)
    failure.args = (f"{path}: {reason or failure}",)
    return failure


_WITHOUT_LOCKS = "?mode=ro&immutable=1"


def _file_uri(path: str, read_only: bool) -> str:
    """The URI that opens a file without creating it, and read-only in the way its folder allows.

    Raises StorageError for a file that may not be written. SQLite would open it read-only, for as
    long as the connection lasts."""
    # To import urllib could fail in a program without rights, or without a descriptor left.
    escapes = str.maketrans({"%": "%25", "?": "%3f", "#": "%23", os.sep: "/"})
    uri = "file:///" + path.translate(escapes).removeprefix("/")
    if not read_only:
        if reason := _missing_right(False, path):
            raise StorageError(f"{path}: {reason}")
        return uri + "?mode=rw"
    if _can_lock(path) or (os.path.exists(path + "-wal") and os.path.exists(path + "-shm")):
        return uri + "?mode=ro"
    if _size_and_mtime(path + "-wal")[0]:
        raise StorageError(
            f"{path}: a crash left a write-ahead log beside it, which cannot be read here: open it "
            "once where it may be written, or copy it together with its -wal"
        )
    # The file is at rest. Whether another process writes to it is checked after each read.
    return uri + _WITHOUT_LOCKS


def _connect_file(path: str, uri: str, read_only: bool) -> sqlite3.Connection:
    try:
        return sqlite3.connect(
            uri,
            uri=True,
            timeout=0,  # pause() waits for other processes, in shorter steps than SQLite's 100 ms
            isolation_level=None,
            check_same_thread=False,
            cached_statements=256,
        )
    except sqlite3.Error as error:
        raise _explain(error, path, read_only) from error


def _refuse_long(path: str, suffix: str) -> None:
    """StorageError for a path too long for SQLite, or for a file with this suffix beside it."""
    encoded = os.fsencode(path)
    name_bytes = len(os.path.basename(encoded))
    most = _MAX_NAME_BYTES - len(suffix)
    if os.name == "posix" and (len(encoded) > _MAX_PATH_BYTES or name_bytes > most):
        raise StorageError(
            f"{path}: the path has {len(encoded)} bytes and its name {name_bytes}, SQLite can open "
            f"{_MAX_PATH_BYTES} and {most} at most: choose a shorter one"
        )


def _create_file(path: str) -> None:
    """Make an empty file where there is none; the umask alone decides who may read it.

    SQLite's locks are POSIX locks: closing any descriptor of a file drops all locks that this
    process has on it, and another thread may open the file as soon as it is there. So the file is
    made and closed under another name, then linked."""
    first_name = f"{path}.{new_id()}.new"
    flags = os.O_CREAT | os.O_EXCL | os.O_RDWR
    try:
        os.close(os.open(first_name, flags, 0o666))
        os.link(first_name, path)
    except OSError:  # another process was first, there are no links here, or the name is too long
        with contextlib.suppress(FileExistsError):
            os.open(path, flags, 0o666)  # and never closed
    finally:
        with contextlib.suppress(OSError):
            os.remove(first_name)


def _remove_leftover(path: str) -> None:
    """Remove the first name of a file or a backup, which a killed process of ours has left."""
    ours = re.escape(path) + r"\.[0-9a-f-]{36}\.(new|partial)"
    with contextlib.suppress(OSError), os.scandir(os.path.dirname(path)) as entries:
        for entry in entries:
            if re.fullmatch(ours, entry.path) and os.path.samefile(entry.path, path):
                os.remove(entry.path)


def _is_mount(path: str) -> bool:
    """Whether a file is mounted by itself. It may be of the same device as its folder."""
    try:
        with io.FileIO("/proc/self/mountinfo") as mounts:
            # Spaces and backslashes are escaped there, a space as \040; other bytes are not.
            points = [
                mount.split()[4].decode("unicode_escape") for mount in mounts.readall().splitlines()
            ]
    except OSError:  # not on Linux
        return os.path.ismount(path)
    return os.fsencode(path).decode("latin-1") in points


def _prepare_path(path: str) -> None:
    """Make the file if there is none.

    Raises StorageError if the file has two names: there would be a log beside each."""
    try:
        if not os.path.exists(path):
            if reason := _no_descriptor():  # SQLite would fail, and an empty file would stay behind
                raise StorageError(f"{path}: {reason}")
            _create_file(path)
        # For a second: another process may be making the file, or a backup.
        for _ in range(100):
            if os.stat(path).st_nlink < 2:
                break
            _remove_leftover(path)
            time.sleep(0.01)
        else:
            raise StorageError(
                f"{path}: the file has another name, a hard link, and what is written through both "
                "is lost: remove that name, or make a copy by backup()"
            )
    except OSError as error:
        raise StorageError(f"{path}: the file cannot be made: {error.strerror}") from error
    if _is_mount(path):
        raise StorageError(
            f"{path}: the file alone is mounted here, and what is written here and there is lost: "
            "mount the folder that it is in"
        )


def _fsync(path: str, flags: int) -> None:
    """Have the system write a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- the guard on SQLite's locks ---
# SQLite's locks on a file are POSIX locks: if any code in the process closes any descriptor of the
# file, the process loses all of them. Another process may then take itself for the last one, and
# delete the log in use. On Linux each descriptor of the file gets a second lock on the same bytes.
# That one belongs to the descriptor, so SQLite's own descriptor keeps it: the file is "pinned".
# Elsewhere the shared lock is taken again before each transaction, and _Log tells whether the log
# was deleted all the same.
_SHARED_START = 0x40000002  # the bytes of a file on which SQLite takes its shared lock
_SHARED_LENGTH = 510


def _descriptors_of(file_id: tuple[int, ...]) -> list[int]:
    """This process's descriptors of a file; none if the system does not list them."""
    with contextlib.suppress(OSError):
        return [
            descriptor
            for descriptor in map(int, os.listdir("/proc/self/fd"))
            if file_id and _file_id(descriptor) == file_id
        ]
    return []


def _set_second_lock(file_id: tuple[int, ...], kind: str) -> bool:
    """Take (F_RDLCK) or drop (F_UNLCK) the second lock on a file; False where it cannot be had."""
    locked = False
    for descriptor in _descriptors_of(file_id):
        import fcntl
        import struct

        lock = struct.pack("hhqqi4x", getattr(fcntl, kind), 0, _SHARED_START, _SHARED_LENGTH, 0)
        # The system may have no such lock, and a descriptor that only writes takes none.
        with contextlib.suppress(AttributeError, OSError):
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, lock)
            locked = True
    return locked


def _count_connection(path: str, tx: _Tx) -> bool:
    """Count a new connection to a file, and pin the file; False where it cannot be pinned.

    Raises StoreBusy if the log was deleted before the file was pinned."""
    file_id = _file_id(path)
    with _process.pin_lock:
        _process.open_files.append(file_id)
        tx.file_id = file_id
        if file_id not in _process.pinned_files and _set_second_lock(file_id, "F_RDLCK"):
            if not _descriptors_of(_file_id(path + "-wal")):
                raise StoreBusy("the write-ahead log was deleted while the file was being opened")
            _process.pinned_files.add(file_id)
        return file_id in _process.pinned_files


def _close_database(tx: _Tx) -> None:
    """Close a connection to a file.

    The file is pinned no longer when the last connection of the process closes: then SQLite has to
    lock the file for itself alone, to delete the log."""
    with _process.pin_lock:
        _process.open_files.remove(tx.file_id)
        if tx.file_id not in _process.open_files:
            _process.pinned_files.discard(tx.file_id)
            _set_second_lock(tx.file_id, "F_UNLCK")
        tx.db.close()


def _lock_file_again(path: str, kind: str = "LOCK_SH") -> bool:
    """Take the process's lock on a file, which it may have lost; False if it cannot be had.

    The descriptor is never closed: that would drop the lock."""
    import fcntl

    file_id = _file_id(path)
    descriptors = _process.lock_descriptors
    with _process.pin_lock, contextlib.suppress(OSError):
        if file_id not in descriptors:
            descriptors[file_id] = os.open(path, os.O_RDWR)
        fcntl.lockf(
            descriptors[file_id],
            getattr(fcntl, kind) | fcntl.LOCK_NB,
            _SHARED_LENGTH,
            _SHARED_START,
        )
        return True
    return False


def _is_locked_by_others(path: str) -> bool:
    """Whether another process has the file open. If not, an exclusive lock can be had."""
    alone = _lock_file_again(path, "LOCK_EX")
    _lock_file_again(path)
    return not alone


def _seek_and_read(descriptor: int, size: int, offset: int) -> bytes:
    os.lseek(descriptor, offset, os.SEEK_SET)
    return os.read(descriptor, size)


_read_at = getattr(os, "pread", _seek_and_read)


class _Log:
    """The write-ahead log beside a file: whether it is full, and whether it is still the file's."""

    def __init__(self, path: str) -> None:
        self.path = path + "-wal"
        self.descriptor = -1
        self.mark_offset = 0  # where the salt of frame _WAL_FRAMES stands
        self.last_mark = b""  # the bytes there when the log was last found not to be full

    def open(self, page_bytes: int) -> None:
        """Open it, as soon as SQLite has: later its name may stand for another log."""
        self.mark_offset = 40 + (_WAL_FRAMES - 1) * (24 + page_bytes)
        if self.descriptor < 0:
            with contextlib.suppress(OSError):
                self.descriptor = os.open(self.path, getattr(os, "O_BINARY", 0))

    def is_full(self) -> bool:
        """Whether the log has frame _WAL_FRAMES; the caller knows that `last_mark` has changed.

        The size of the log does not tell: a log that begins again keeps it. But each frame has the
        salt of its log, which stands in the log's header too."""
        mark = _read_at(self.descriptor, 8, self.mark_offset)
        if mark == _read_at(self.descriptor, 8, 16):
            return True
        self.last_mark = mark
        return False

    def size(self) -> int:
        """Bytes of the log."""
        return os.fstat(self.descriptor).st_size

    def was_deleted(self) -> bool:
        """Whether it has lost its name: another process took it for a leftover and deleted it."""
        try:
            return os.fstat(self.descriptor).st_nlink == 0
        except OSError:
            return False

    def close(self) -> None:
        """Close the descriptor. No lock is lost by that: SQLite has none on a log."""
        descriptor = self.descriptor
        self.descriptor = -1
        self.last_mark = b""
        if descriptor >= 0:
            os.close(descriptor)

    leak = close


# --- a database ---
_INTERRUPTS = (
    "this call interrupts another one of its thread, or a fork, which it would have to wait for: "
    "call again later"
)


_WRITTEN = "the file was written meanwhile, and cannot be locked here: read it again"


class _Database:
    """One SQLite database: how it is opened, what guards it, its size and its copies."""

    dialect = _SQLITE
    types: ClassVar[dict[str, str]] = {}  # its names of column types, where not SQLite's

    def __init__(self, target: str, path: str | None, options: SimpleNamespace) -> None:
        self.target = target
        # The real path, not a symbolic link: SQLite has the log beside the real file. None: in
        # memory, or a server.
        self.path = None if path is None else os.path.realpath(path)
        self.options = options  # the arguments of open()
        # A read-only store whose folder has no room for the files of SQLite's locks is read without
        # locks.
        self.cannot_lock = bool(self.path and options.read_only and not _can_lock(self.path))
        self.log = None if self.path is None or self.cannot_lock else _Log(self.path)
        # Without a lock that holds for sure, each use looks whether the log is still the file's
        # own.
        self.log_may_vanish = False
        self.process = os.getpid()
        self.closed = False

    # --- connections ---
    def connect(self) -> _Tx:
        """A new connection to the database, which `disconnect` closes."""
        self.refuse_closed()
        if _process.forking and _process.lock._is_owned():
            raise StorageError(_INTERRUPTS)  # the fork under way does not know of this connection
        if self.path is None:
            db = sqlite3.connect(
                ":memory:", isolation_level=None, check_same_thread=False, cached_statements=256
            )
            db.execute("PRAGMA foreign_keys = ON")
            db.execute("PRAGMA temp_store = MEMORY")
            return _Tx(db, self.options.clock)
        if not self.cannot_lock:
            return self._connect_to_file(self.path)
        stamps = self._file_stamps()
        try:
            return self._connect_to_file(self.path)
        except StorageError as error:
            if self._file_stamps() == stamps:
                raise
            raise StoreBusy(_WRITTEN) from error  # its log was there a moment ago, or is now

    def _connect_to_file(self, path: str) -> _Tx:
        stamp = _size_and_mtime(path)
        uri = _file_uri(path, self.options.read_only)
        tx = _Tx(_connect_file(path, uri, self.options.read_only), self.options.clock)
        if uri.endswith(_WITHOUT_LOCKS):
            tx.stamp = stamp
        try:
            for pragma in (
                "foreign_keys = ON",
                # Savepoints, sorts and VACUUM must not fail where no temporary file can be written.
                "temp_store = MEMORY",
                f"synchronous = {self.options.synchronous}",
                "fullfsync = ON",  # macOS: an fsync that reaches the disk; elsewhere without effect
                "checkpoint_fullfsync = ON",
                "wal_autocheckpoint = 0",  # the writer does it, under the write lock
                "journal_size_limit = 12582912",  # bytes of a log that begins anew, below its bound
                "cache_size = -16384",
                f"query_only = {self.options.read_only:d}",
            ):
                tx.run(f"PRAGMA {pragma}")
            if not self.cannot_lock and tx.row("PRAGMA journal_mode") == ("wal",):
                tx.row("PRAGMA schema_version")  # a read takes the shared lock, and opens the log
                pinned = _count_connection(path, tx)
                self.log_may_vanish = not pinned and os.name == "posix"
                if self.log is not None:
                    self.log.open(tx.rows("PRAGMA page_size")[0][0])
        except BaseException:
            self.disconnect(tx)
            raise
        return tx

    def disconnect(self, tx: _Tx) -> None:
        """Close a connection."""
        if tx.file_id:
            _close_database(tx)
        else:
            tx.db.close()

    def _file_stamps(self) -> list[tuple[int, int]]:
        """What changes when the file is written."""
        return [_size_and_mtime(f"{self.path}{suffix}") for suffix in ("", "-wal")]

    def unless_written(self, tx: _Tx, action: Callable[[], R]) -> R:
        """Read without locks; StoreBusy, whatever was read, if the file was written meanwhile.

        With locks, SQLite sees to that."""
        try:
            result = action()
        except Exception as error:
            if self._was_written(tx):
                raise StoreBusy(_WRITTEN) from error
            raise
        if self._was_written(tx):
            raise StoreBusy(_WRITTEN)
        return result

    def _was_written(self, tx: _Tx) -> bool:
        return tx.stamp is not None and _size_and_mtime(str(self.path)) != tx.stamp

    def begin_pooled(self, tx: _Tx, read_only: bool = True) -> None:
        """Begin the transaction of a block on a connection of the pool: one snapshot."""
        if self.path is not None:
            tx.run("PRAGMA query_only = ON")  # a reader never writes
        tx.run("BEGIN")
        tx.rows("SELECT value FROM flowstore_meta LIMIT 1")  # a snapshot begins with its first read

    def commit_pooled(self, tx: _Tx) -> None:
        """Commit the transaction of a block on a connection of the pool."""
        tx.run("COMMIT")

    # --- refusals ---
    def refuse_closed(self) -> None:
        """StoreClosed after close(); StorageError in a child whose parent forked in a transaction
        on the file."""
        if self.closed:
            raise StoreClosed("the store is closed: open it again")
        parents = _process.files_of_parent
        if parents and self.path is not None and _file_id(self.path) in parents:
            raise StorageError(
                "this process was forked while a transaction was open on the file, which is the "
                "parent's: fork outside transactions, or start a new process"
            )

    def refuse_unprepared_fork(self) -> None:
        """StorageError in a child whose parent had no stack left for the hook before the fork."""
        if os.getpid() != self.process:
            raise StorageError(
                "this process was forked where the stack had no room to prepare for it: open the "
                "store again in a new process"
            )

    def refuse_read_only(self) -> None:
        """StorageError in a store that was opened read-only."""
        if self.options.read_only:
            raise StorageError("the store was opened read-only: nothing can be changed through it")

    def refuse_hidden(self, tx: _Tx) -> None:
        """StorageError when something temporary hides a table of ours: our statements would go to
        it."""
        hidden = self._temporary_names(tx).intersection(_TABLE_NAMES)
        if hidden:
            raise StorageError(
                f"{min(hidden)!r} is a table of flowstore's: give the temporary table, view or "
                "trigger another name, and make no temporary trigger on it"
            )

    def _temporary_names(self, tx: _Tx) -> set[str]:
        """The names of temporary tables, views and triggers, and of what the triggers are on."""
        rows = tx.rows("SELECT name, tbl_name FROM sqlite_temp_master WHERE type <> 'index'")
        return {name.lower() for row in rows for name in row}

    # --- busy waiting ---
    def busy_error(self) -> StoreBusy:
        """The error after `busy_timeout`."""
        return StoreBusy(
            "another process or transaction held the store for more than "
            f"{self.options.busy_timeout:g} s (busy_timeout); nothing was written"
        )

    def pause(self, deadline: float) -> None:
        """Sleep a little while another process holds the file; StoreBusy after the deadline."""
        self.refuse_closed()
        left = deadline - _monotonic()
        if left <= 0:
            raise self.busy_error()
        import random

        time.sleep(min(left, random.uniform(0.0001, 0.001)))

    def retry_while_busy(self, action: Callable[[], R]) -> R:
        """Run `action` again while another process holds the file, for `busy_timeout` at most."""
        since = _monotonic()  # before the first try: on a server, a statement waits by itself
        is_busy = False
        try:
            while True:
                try:
                    return action()
                except StoreBusy:
                    is_busy = True
                    self.pause(since + self.options.busy_timeout)
        finally:
            if is_busy:
                _write_lines(self.wait_lines(since))

    def wait_lines(self, since: float) -> list[_Line]:
        """A line about a call that has waited for the file, if that took more than a second."""
        seconds = _monotonic() - since
        line = _WARNING, "%s: a call waited %.1f s for another process", self.target, seconds
        return [line] if seconds > 1 else []

    # --- opening ---
    def prepare(self, connection: _Connection) -> None:
        """Create or upgrade the tables, in one transaction, however many processes open the file at
        once."""
        if self.path is None:
            with connection.lock:
                self._build(connection.use(), None)
            return
        if not self.options.read_only:
            _prepare_path(self.path)
        self.retry_while_busy(lambda: self._prepare_file(connection))

    def _prepare_file(self, connection: _Connection) -> None:
        with connection.lock:
            tx = connection.use()
            read_only = self.options.read_only
            if self._version(tx) == _SCHEMA_VERSION and (read_only or self._in_wal_mode(tx)):
                return
            if read_only:
                raise SchemaError(
                    "the tables are of an older version: open the store once without read_only"
                )
            if not tx.rows("SELECT name FROM sqlite_master LIMIT 1"):
                tx.run("PRAGMA auto_vacuum = INCREMENTAL")  # only possible before the first table
            if not self._in_wal_mode(tx):
                raise StorageError(
                    f"{self.path}: this file system cannot hold a database in WAL mode: "
                    "choose a local disk"
                )
            tx.run("BEGIN IMMEDIATE")
            try:
                tx.lines.clear()
                self._build(tx, self._version(tx))
                tx.run("COMMIT")
            finally:
                tx.rollback()
            _write_lines(tx.take_lines())
            if not tx.file_id:  # it was not in WAL mode when it was opened: open it as it is now
                connection.close()
                connection.use()

    @staticmethod
    def _in_wal_mode(tx: _Tx) -> bool:
        mode = tx.row("PRAGMA journal_mode")
        return mode == ("wal",) or tx.row("PRAGMA journal_mode = WAL") == ("wal",)

    def _version(self, tx: _Tx) -> int | None:
        """The version of the file's tables, None when there are none; SchemaError for foreign
        tables."""
        names = self._names(tx)
        if "flowstore_meta" not in names:
            if clash := sorted(names.intersection(_TABLE_AND_INDEX_NAMES)):
                raise SchemaError(
                    f"{self.target}: the table or index {clash[0]!r} there is not flowstore's: "
                    "use another file"
                )
            if self.options.read_only:
                raise StorageError(f"{self.target}: there is no store in it")
            return None
        try:
            row = tx.row("SELECT value FROM flowstore_meta WHERE key = 'schema'")
            version = int(row[0]) if row else 0
            names = self._names(tx)  # again: another process may have upgraded it just now
        except (StoreBusy, StoreCorrupt):
            raise
        except (StorageError, ValueError) as error:
            raise SchemaError(
                f"{self.target}: the table 'flowstore_meta' there is not flowstore's"
            ) from error
        if version > _SCHEMA_VERSION:
            raise SchemaError(
                f"{self.target}: the tables are of version {version}, this flowstore knows "
                f"{_SCHEMA_VERSION}: upgrade flowstore"
            )
        if version < 1 or (
            version == _SCHEMA_VERSION and not names.issuperset(_TABLE_AND_INDEX_NAMES)
        ):
            raise SchemaError(
                f"{self.target}: some of flowstore's tables or indexes are missing: "
                "restore it from a backup"
            )
        return version

    def _names(self, tx: _Tx) -> set[str]:
        """The names of tables and indexes, in lower case: SQLite does not tell case apart."""
        return {name.lower() for (name,) in tx.rows("SELECT name FROM sqlite_master")}

    def _build(self, tx: _Tx, version: int | None) -> None:
        """Make the tables, or upgrade those of an older version."""
        if version is None:
            script = _TABLES
        else:
            script = ";".join(_UPGRADES[old] for old in range(version, _SCHEMA_VERSION))
        for name, own_name in self.types.items():
            script = script.replace(f" {name}", f" {own_name}")
        for statement in _split_script(self.dialect.resolve(script, now=str(tx.now()))):
            tx.run(statement)
        number = str(_SCHEMA_VERSION)
        if version is None:
            tx.run("INSERT INTO flowstore_meta (key, value) VALUES ('schema', ?)", number)
            _add_tenant(tx, DEFAULT_TENANT)
        else:
            tx.lines.append(
                (_INFO, "%s: upgraded from version %d to %s", self.target, version, number)
            )
        tx.run("UPDATE flowstore_meta SET value = ? WHERE key = 'schema'", number)

    # --- the whole file ---
    def sizes(self, tx: _Tx) -> dict[str, int]:
        """Bytes of the database, of the write-ahead log beside it, and of pages that are free."""
        page_bytes = tx.rows("PRAGMA page_size")[0][0]
        wal_bytes = 0 if self.path is None else _size_and_mtime(self.path + "-wal")[0]
        return {
            "file_bytes": tx.rows("PRAGMA page_count")[0][0] * page_bytes,
            "wal_bytes": wal_bytes,
            "free_bytes": tx.rows("PRAGMA freelist_count")[0][0] * page_bytes,
        }

    def copy_to(self, tx: _Tx, path: str) -> None:
        """Copy one state of the database into a new file. In steps: a write does not make it begin
        again."""
        try:
            with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as copy:
                try:
                    self.begin_pooled(tx)
                    tx.db.backup(copy, pages=4096)
                finally:
                    tx.rollback()
        except sqlite3.Error as error:
            raise _explain(error, path, False) from error


# ==================================================================================================
# Writer: group commit, interrupts, checkpoints, and who is told of a commit
# ==================================================================================================

# Operations in one commit: enough to hide the fsync, few enough to keep each transaction short.
_GROUP_MOST = 1000


class _CallState(enum.Enum):
    WAITING = enum.auto()  # in the queue, or on the way there: it may still time out
    TAKEN = enum.auto()  # in a leader's group, which runs it, or lets it queue again
    LEADING = enum.auto()  # it has the writer
    DONE = enum.auto()  # its result or its error is set
    ABANDONED = enum.auto()  # its thread no longer waits, or its block was dropped


_WAITING, _TAKEN, _LEADING, _DONE, _ABANDONED = _CallState


class _Call(SimpleNamespace):
    """One call on its way: an operation with its arguments, a batch of such calls, or a block that
    wants the writer.

    A namespace, since that is made in C."""

    __eq__ = object.__eq__  # not by the arguments, which have code of their own
    __hash__ = object.__hash__  # type: ignore[assignment]

    state = _WAITING
    operation: Any = None  # a _Method
    facet: Any = None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = {}
    batch: Sequence[_Call] = ()  # what an event loop sends as one
    future: asyncio.Future[Any]  # of a call in such a batch: what its task awaits
    thread = 0
    result: Any = None
    error: BaseException | None = None
    gate: threading.Lock | None = None  # what its thread waits at
    deadline = 0.0
    waits = True  # for a connection, where their number is limited
    file_is_busy = False  # as leader: another process has the file
    runs_alone = False  # it failed in another's group by a foreign error: its own thread runs it
    waits_since = 0.0  # as leader: when it first found that another process has the file
    lines: Sequence[_Line] = ()  # of the program's log, about what was committed

    def run(self, tx: _Tx) -> Any:
        """Run the operation in an open transaction, if the facet's tenant may."""
        if self.facet._tenant is not None:
            self.facet._check_tenant(tx, self.operation.writes)
        return self.operation.function(self.facet, tx, *self.args, **self.kwargs)


class _CommitListeners:
    """The waiters that each commit of this process wakes. Commits of other processes are polled
    for: a waiter does it for all."""

    def __init__(self, engine: _Engine) -> None:
        self.engine = engine
        self.wakers: set[Callable[[], object]] = set()
        self.next_poll = 0.0
        self.version: Any = None  # what the last poll has found
        # By what is looked for: the commits by then, the time of the next look, and who looks.
        self.looks: dict[Any, tuple[int, float, object]] = {}

    def notify(self) -> None:
        """Wake all of them."""
        for wake in list(self.wakers):
            # RuntimeError: it was woken already, or its event loop has ended.
            with contextlib.suppress(RuntimeError):
                wake()

    def wait(self, seen: int, seconds: float, tick: float) -> None:
        """Wait as `_Engine.wait` says."""
        engine = self.engine
        gate = threading.Lock()
        gate.acquire()
        wake = gate.release  # is called at each commit, and at the end of the store
        self.wakers.add(wake)
        end = _monotonic() + min(seconds, tick)
        try:
            while True:
                engine.refuse_closed()
                if engine.commits == seen:
                    # Many waiters poll half as often.
                    pause = engine.poll_seconds * (2 if len(self.wakers) > 16 else 1)
                    gate.acquire(timeout=max(0.0, min(seconds, pause)))
                    self.count_others_commits()
                if engine.commits != seen or _monotonic() >= end:
                    return
        finally:
            self.wakers.discard(wake)

    def count_others_commits(self) -> None:
        """Count what other processes have committed since the last poll, as one commit."""
        engine = self.engine
        polls = engine.counts_all_commits() and not engine.in_memory
        if not polls or _monotonic() < self.next_poll:
            return
        with engine.poller.lock:
            version: Any = object()
            with contextlib.suppress(StorageError):  # else the waiters look, who try again
                tx = engine.poller.use()
                version = tx, tx.rows("PRAGMA data_version")
            self.next_poll = _monotonic() + engine.poll_seconds / 2
            if version != self.version:
                self.version = version
                engine.commits += 1
                self.notify()

    def is_looked_for(self, what: Any, waiter: object) -> bool:
        """Whether another waiter has just looked for the same thing, since the last commit. Else it
        is noted that this one does."""
        now = _monotonic()
        known = self.engine.commits
        commits, end, other = self.looks.get(what, (-1, 0.0, None))
        if other is not waiter and commits == known and now < end:
            return True
        if len(self.looks) > 1000:
            self.looks.clear()
        self.looks[what] = known, now + self.engine.poll_seconds, waiter
        return False


class _Checkpointer:
    """The connection that copies the write-ahead log into the file while the writer keeps all
    others out.

    SQLite 3.7.0 to 3.51.2 can lose commits when a process begins the log anew while another one's
    checkpoint begins (the "WAL-reset bug"). No process can while the write lock is held, so the
    checkpoint runs then, on a second connection. The lock of the writer's connection covers that
    one too: with two locks, a fork could wait for one while it holds the other."""

    def __init__(self, engine: _Engine, log: _Log) -> None:
        self.log = log
        self.connection = _Connection(engine)
        self.wait_at_bytes = _WAL_BOUND
        self.drain_seconds = 0.01

    def checkpoint(self, writer: _Tx) -> None:
        """Copy the log into the file, in the transaction that the writer has just begun.

        Past 16 MB it waits until the present readers have ended: new ones read past the log
        meanwhile. It waits a second at most, and a tenth of one while a block of this store is open
        that only reads. If a reader holds the log longer, the next try comes 16 MB later."""
        try:
            size = self.log.size()
            waits = size >= self.wait_at_bytes
            deadline = _monotonic() + (0.1 if self.connection.engine.snapshots else 1)
            complete = self._copy_log()
            while waits and not complete and _monotonic() < deadline:
                time.sleep(0.001)
                complete = self._copy_log()
        except (StorageError, OSError):
            return  # no commit depends on it: the next checkpoint tries again
        if complete:
            self.wait_at_bytes = _WAL_BOUND
        if waits and (not complete or self.drain_seconds >= 1):
            self.wait_at_bytes = size + _WAL_BOUND
        if not complete:
            if waits:
                writer.warn("%s has %d bytes: a reader holds it", self.log.path, size)
            return
        self.drain_seconds = min(1.0, 2 * self.drain_seconds) if waits else 0.005
        if waits:
            time.sleep(self.drain_seconds)  # readers of the log's end finish in this time
        writer.db.rollback()
        # The new snapshot needs nothing of the log, so the next write begins the log anew.
        writer.db.execute("BEGIN IMMEDIATE")

    def _copy_log(self) -> bool:
        """Copy what no reader holds back; whether that was the whole log."""
        busy, pages, copied = self.connection.use().rows("PRAGMA wal_checkpoint(PASSIVE)")[0]
        return not busy and bool(pages == copied)

    def truncate(self, writer: _Tx) -> None:
        """Copy and truncate the log; StoreBusy while a reader needs it.

        If TRUNCATE does not get the write lock in time, it would checkpoint unprotected. The open
        snapshot here, which reads past the log, makes it copy nothing then."""
        helper = self.connection.use()
        try:
            complete = self._copy_log()
            helper.run("BEGIN")
            helper.rows("SELECT value FROM flowstore_meta LIMIT 1")
            writer.rollback()
            if complete:
                writer.run("PRAGMA busy_timeout = 20")
                complete = not writer.rows("PRAGMA wal_checkpoint(TRUNCATE)")[0][0]
            if not complete:
                raise StoreBusy("a reader holds the write-ahead log: it could not be emptied")
        finally:
            writer.rollback()
            helper.rollback()
            writer.run("PRAGMA busy_timeout = 0")


class _CallQueue:
    """The call that leads the writer, and those that wait for it. They change only under
    `mutex`."""

    def __init__(self, engine: _Engine) -> None:
        self.engine = engine
        self.mutex = engine.mutex
        self.leader: _Call | None = None
        self.queue: deque[_Call] = deque()

    def wait_for_lead(self, call: _Call) -> bool:
        """Queue for the writer: True with the lead, False when another leader has done the call."""
        if self.mutex._is_owned() or _process.lock._is_owned():  # type: ignore[attr-defined]
            raise StorageError(_INTERRUPTS)
        call.gate = threading.Lock()
        call.gate.acquire()
        call.thread = threading.get_ident()
        call.deadline = call.deadline or _monotonic() + self.engine.options.busy_timeout
        with self.mutex:
            leader = self.leader
            if leader is not None and leader.state is _LEADING and leader.thread == call.thread:
                raise StorageError(
                    "this thread already holds the store (another task's open transaction, or code "
                    "that runs inside an operation) and could only wait for itself"
                )
            self.queue.append(call)
        while True:
            with self.mutex:
                if call.state is _DONE:
                    return False
                if call.state is _WAITING:
                    if self._may_lead(call):
                        self.leader = call
                        call.state = _LEADING
                        self.queue.remove(call)
                        return True
                    if self.engine.closed or self._is_late(call):
                        # Out of the queue while the mutex is held: a leader could still take it.
                        self.queue.remove(call)
                        self.engine.refuse_closed()
                        raise self.engine.busy_error()
            left = -1 if call.state is _TAKEN else max(0.0, call.deadline - _monotonic())
            call.gate.acquire(timeout=left)

    def _may_lead(self, call: _Call) -> bool:
        leader = self.leader
        return (
            leader is None
            or leader is call
            or leader.state is _ABANDONED
            # The leader is a call further down this thread's stack, which runs a signal handler
            # now. It cannot go on before this call has ended.
            or (leader.state is _WAITING and leader.thread == call.thread)
        )

    def _is_late(self, call: _Call) -> bool:
        """Whether a waiting call gives up. It waits for a commit under way, however long that
        takes."""
        now = _monotonic()
        if now < call.deadline:
            return False
        leader = self.leader
        if leader is None or leader.file_is_busy or not (leader.operation or leader.batch):
            return True
        call.deadline = now + 0.01
        return False

    def take_into(self, group: list[_Call]) -> None:
        """Move what can be run together from the queue into a leader's group."""
        with self.mutex:
            while self.queue and len(group) < _GROUP_MOST:
                call = self.queue[0]
                if call.runs_alone or not (call.operation or call.batch):
                    return
                # In this order, an interrupt leaves the call in the queue, in the group, or in
                # both.
                call.state = _TAKEN
                group.append(call)
                self.queue.popleft()

    def send_back(self, call: _Call, group: list[_Call]) -> None:
        """Move a call from a leader's group back into the queue: its own thread runs it, alone."""
        with self.mutex:
            call.runs_alone = True
            self.queue.appendleft(call)
            call.state = _WAITING  # before an interrupt can follow remove()
            group.remove(call)


class _Writer(_CallQueue):
    """The one connection that writes, shared by group commit.

    A durable commit costs one fsync, whatever it carries. A call that finds the writer free leads:
    it begins a transaction, takes every call that has queued, runs them all, commits, wakes their
    threads and hands the lead to the call that queued first since then. A thread that holds a
    connection's lock may take the mutex, never the other way round."""

    def __init__(self, engine: _Engine, log: _Log | None) -> None:
        super().__init__(engine)
        self.connection = engine.pool.new_connection()
        self.group: list[_Call] = []  # what the leader commits together
        # A flag that the leader's COMMIT has succeeded. A list, since extend() can set it in the
        # same call in C as COMMIT.
        self.commit_flag: list[object] = []
        self.next_yield = 0.0
        self.refuses_writes = False  # since a block that only reads, until the next transaction
        self.log = log
        self.checkpointer: _Checkpointer | None = None
        if log is not None:
            self.checkpointer = _Checkpointer(engine, log)
            self.connection.companions = [self.checkpointer.connection, log]

    # --- one call ---
    def run_batch(self, calls: list[_Call]) -> None:
        """Run operations in one transaction, each on its own: every call gets its result or
        error."""
        call = _Call(batch=calls, deadline=max(one.deadline for one in calls))
        try:
            self.lead(call, self.commit_calls)
        finally:
            _write_lines(call.lines)
        if call.error is not None:
            raise call.error

    def lead(self, call: _Call, action: Callable[[_Call], bool], *, keep: bool = False) -> None:
        """Lead and run `action` until it returns True, then hand the lead on.

        Or wait until another leader has run the call. Any exception, at any point, leaves the
        writer usable. Before the commit, the leader's transaction is rolled back and the other
        calls of its group queue again. After the commit, they return their results. The caller that
        was interrupted is not told which of the two it was. The clean-up is written out here, not
        in a helper: a call could fail for lack of stack, and Ctrl-C could strike as it begins. With
        `keep` the call leads on after a success, until it is led again."""
        if os.getpid() != self.engine.process:
            self.engine.refuse_unprepared_fork()
        kept = False
        try:
            with self.mutex:
                if self.leader is None and not self.engine.closed:
                    self.leader = call
                    call.thread = threading.get_ident()
                    call.state = _LEADING
            if self.leader is call or self.wait_for_lead(call):
                while not action(call):
                    self._pause_for_others(call)
                if keep:
                    kept = True
                elif self.queue and _monotonic() > self.next_yield:
                    self._yield_to_other_processes()
        finally:
            struck: BaseException | None = None
            while not kept:
                try:
                    if self.leader is call:
                        with self.connection.lock:
                            tx = self.connection.tx
                            if tx is not None and tx.db.in_transaction:
                                try:
                                    tx.db.rollback()
                                except sqlite3.Error:
                                    self.connection.close()
                            with self.mutex:
                                for other in reversed(self.group):
                                    if other is call:
                                        continue
                                    if self.commit_flag:
                                        other.state = _DONE
                                    elif other.state is _TAKEN:
                                        if other not in self.queue:
                                            self.queue.appendleft(other)
                                        other.state = _WAITING
                                    if other.gate is not None and other.gate.locked():
                                        other.gate.release()
                                self.group = []
                                if call in self.queue:
                                    self.queue.remove(call)
                                following = self.queue[0] if self.queue else None
                                if (
                                    following is not None
                                    and following.gate is not None
                                    and following.gate.locked()
                                ):
                                    following.gate.release()
                                self.leader = following
                    elif call.gate is not None:  # it may be in the queue, or in another's group
                        with self.mutex:
                            if call in self.queue:
                                self.queue.remove(call)
                            if call.state is not _DONE:
                                call.state = _ABANDONED
                            if self.leader is call:
                                continue  # the lead was handed to it just now
                    break
                except BaseException as error:  # a second one: each of these steps can be repeated
                    struck = error
            if self.engine.closed and not kept:
                self.engine.close_connection(self.connection)
            if call.waits_since and not kept:
                _write_lines(self.engine.wait_lines(call.waits_since))
            if struck is not None:
                raise struck

    def _pause_for_others(self, call: _Call) -> None:
        """As leader, while another process has the file: wait a little."""
        _refuse_own_block(self.engine)
        now = _monotonic()
        call.deadline = call.deadline or now + self.engine.options.busy_timeout
        call.waits_since = call.waits_since or now
        if self.engine.log_may_vanish:
            self.engine.reopen_after_lost_log()
        self.engine.pause(call.deadline)

    def _yield_to_other_processes(self) -> None:
        """Leave the file alone for a moment: other processes poll for it, and a lead that never
        rests starves them."""
        time.sleep(0.0005)
        self.next_yield = _monotonic() + 0.025

    # --- what a leader does ---
    def _begin(self, leader: _Call, writes: bool) -> _Tx | None:
        """BEGIN IMMEDIATE, under the connection's lock; None when another process has the file."""
        engine = self.engine
        log = self.log
        try:
            tx = self.connection.tx or self.connection.use()
            if tx.db.in_transaction:  # left by an interrupt, or by a block whose end never ran
                tx.db.rollback()
            if self.refuses_writes:
                self._allow_writes(tx)
            if engine.log_may_vanish and not engine.has_log():
                leader.file_is_busy = True
                return None
            tx.db.execute("BEGIN IMMEDIATE")
            tx.lines.clear()
            # The mark seldom changes. It is compared here, so that the usual case costs no call.
            if (
                log is not None
                and log.descriptor >= 0
                and _read_at(log.descriptor, 8, log.mark_offset) != log.last_mark
                and log.is_full()
                and self.checkpointer is not None
            ):
                self.checkpointer.checkpoint(tx)
            if writes and engine.retention is not None and engine.retention.is_due(tx):
                engine.retention.sweep(tx, functools.partial(tx.run, "COMMIT"))
                leader.lines = [*leader.lines, *tx.take_lines()]
                tx.db.execute("BEGIN IMMEDIATE")
        except (sqlite3.Error, StoreBusy) as error:
            failure = _failure(error) if isinstance(error, sqlite3.Error) else error
            if not isinstance(failure, StoreBusy):
                raise failure from error
            leader.file_is_busy = True
            return None
        self.commit_flag.clear()
        leader.file_is_busy = False
        return tx

    def commit_calls(self, leader: _Call) -> bool:
        """Begin, run the leader's call and what has queued, commit; False while another process has
        the file."""
        with self.connection.lock:
            operation = leader.operation
            tx = self._begin(leader, operation is None or operation.writes)
            if tx is None:
                return False
            if operation is None or (self.queue and not leader.runs_alone):
                wrote = self._commit_group(tx, leader)
            else:
                leader.error = None  # it may have one of a group that was interrupted
                if leader.facet._tenant is None:  # as _Call.run, without the call
                    leader.result = operation.function(
                        leader.facet, tx, *leader.args, **leader.kwargs
                    )
                else:
                    leader.result = leader.run(tx)
                self._commit(tx, leader)
                wrote = operation.writes
        if wrote:  # in memory, reads come this way too: no listener waits for them
            engine = self.engine
            engine.commits += 1
            if engine.listeners.wakers:
                engine.listeners.notify()
        return True

    def _commit_group(self, tx: _Tx, leader: _Call) -> bool:
        """Run the leader's call and what has queued, all in one commit; whether they wrote."""
        self.group = [leader]
        if not leader.runs_alone:
            self.take_into(self.group)
        try:
            tx.run("SAVEPOINT flowstore_group")  # the group begins again here, and keeps the file
            savepoints = False
            lines = len(tx.lines)
            while not self._run_group(tx, leader, savepoints):
                tx.run("ROLLBACK TO flowstore_group")
                del tx.lines[lines:]
                savepoints = True
            self._commit(tx, leader)
        except StorageError as error:  # it ended the transaction, which is that of all of them
            for member in self.group:
                for call in member.batch or (member,):
                    call.result = None
                    call.error = _copy_error(error)
        wrote = False
        for member in self.group:
            member.state = _DONE
            if member.gate is not None and member.gate.locked():
                member.gate.release()
            for call in member.batch or (member,):
                wrote = wrote or (call.operation is not None and call.operation.writes)
        self.group = []
        return wrote

    def _run_group(self, tx: _Tx, leader: _Call, savepoints: bool) -> bool:
        """Run the calls of the group; False when they have to begin again, with savepoints.

        A failure of the database itself fails all calls. After a full disk or an I/O error SQLite
        may have ended the transaction. A SAVEPOINT would then begin a new one, which its RELEASE
        commits."""
        db = tx.db
        for member in list(self.group):
            for call in member.batch or (member,):
                changes = db.total_changes
                lines = len(tx.lines)
                if savepoints:
                    tx.run("SAVEPOINT flowstore_call")
                try:
                    call.result = call.run(tx)
                    call.error = None
                except Exception as error:
                    # A constraint of the user's own on our tables concerns that call alone.
                    constraint = isinstance(error.__cause__, sqlite3.IntegrityError)
                    if isinstance(error, StorageError) and not constraint:
                        raise
                    if not db.in_transaction:
                        raise StorageError("the database ended the transaction") from error
                    in_own_batch = member is leader and bool(member.batch)
                    if not isinstance(error, FlowStoreError) and not in_own_batch:
                        # From outside, it is this thread's own: a signal handler raised it, or the
                        # stack was full.
                        if member is leader or _came_from_outside(error):
                            member.runs_alone = True
                            raise
                        self.send_back(member, self.group)
                        return False
                    call.result = None
                    call.error = error
                    del tx.lines[lines:]
                    if savepoints:
                        tx.run("ROLLBACK TO flowstore_call")
                    elif db.total_changes != changes:
                        return False
                if savepoints:
                    tx.run("RELEASE flowstore_call")
        return True

    def _commit(self, tx: _Tx, leader: _Call) -> None:
        vanishing = self.log if self.engine.log_may_vanish else None
        if vanishing is not None and vanishing.was_deleted():
            raise StorageError(
                "another process deleted the write-ahead log, nothing of this was stored: "
                "run it again"
            )
        while tx.db.in_transaction:
            try:
                # COMMIT and the flag are one call in C, so Ctrl-C cannot come between them. `type`
                # is kept in place of the cursor, which would stay open.
                self.commit_flag.extend(map(type, map(tx.db.execute, ("COMMIT",))))
            except sqlite3.Error as error:
                failure = _failure(error)
                if not isinstance(failure, StoreBusy):
                    raise failure from error
                # Not in WAL mode, but another program may have taken the file out of it.
                self.engine.pause(leader.deadline or _monotonic() + 1)
        if vanishing is not None and vanishing.was_deleted():
            raise StorageError(
                "another process deleted the write-ahead log during COMMIT, which is in doubt: "
                "look whether this was stored"
            )
        if tx.lines:
            leader.lines = [*leader.lines, *tx.take_lines()]

    # --- leading alone: blocks, and work outside transactions ---
    def begin_block(self, call: _Call, writes: bool) -> bool:
        """Begin the transaction of a block that leads; False when another process has the file."""
        with self.connection.lock:
            tx = self._begin(call, writes)
            if tx is not None and call.waits_since:
                tx.lines += self.engine.wait_lines(call.waits_since)
                call.waits_since = 0.0
            if tx is not None and not writes:
                self.refuses_writes = True
                tx.run("PRAGMA query_only = ON")
        return tx is not None

    def _allow_writes(self, tx: _Tx) -> None:
        """Undo what a block that only reads has set on the one connection to the memory."""
        tx.db.execute("PRAGMA query_only = OFF")
        self.refuses_writes = False

    def commit_block(self, call: _Call) -> bool:
        """Commit the transaction of a block that leads."""
        with self.connection.lock:
            self._commit(self.connection.use(), call)
        self.engine.commits += 1
        self.engine.listeners.notify()
        return True

    def alone(self, action: Callable[[_Tx], R]) -> R:
        """Run `action` on the writer outside any transaction, while no other thread writes."""
        results: list[R] = []

        def run(_: _Call) -> bool:
            with self.connection.lock:
                tx = self.connection.use()
                if self.refuses_writes:
                    self._allow_writes(tx)
                results.append(action(tx))
            return True

        self.lead(_Call(), run)
        return results[0]

    def mind_log(self, tx: _Tx) -> None:
        """Checkpoint the log if it is full."""
        if self._begin(_Call(), False) is not None:
            tx.rollback()

    def empty_log(self, tx: _Tx) -> None:
        """Checkpoint and truncate the log; StoreBusy while a reader needs it."""
        if self.checkpointer is None or self._begin(_Call(), False) is None:
            raise self.engine.busy_error()
        self.checkpointer.truncate(tx)


def _refuse_own_block(engine: _Engine) -> None:
    """StorageError if this thread has a transaction open on the same file in another store."""
    for reference in _blocks.get():
        block = reference()
        if (
            block is not None
            and block.is_open
            and block.leads
            and block.thread == threading.get_ident()
            and block.engine.path == engine.path
        ):
            raise StorageError(
                "this thread has a transaction open on the same file in another store, and "
                "could only wait for itself: use one store for both"
            )


def _came_from_outside(error: Exception) -> bool:
    """Whether an exception has nothing to do with the operation in which it struck.

    Such are a full stack or memory, and the exceptions of signal handlers and trace functions. A
    foreign error whose innermost frame is in this file was injected by another thread: the code
    here raises none."""
    if isinstance(error, (RecursionError, MemoryError)):
        return True
    handlers: list[object] = [sys.gettrace()]
    if "signal" in sys.modules:
        import signal

        handlers += map(signal.getsignal, signal.valid_signals())
    codes = {getattr(handler, "__code__", None) for handler in handlers}
    traceback = error.__traceback__
    depth = 0
    while traceback is not None:
        if traceback.tb_frame.f_code in codes:
            return True
        if traceback.tb_next is None:
            return depth > 0 and traceback.tb_frame.f_globals is globals()
        traceback = traceback.tb_next
        depth += 1
    return False


def _copy_error(error: Exception) -> Exception:
    """The same error for another thread: a traceback belongs to one."""
    copy = type(error)(*error.args)
    copy.__cause__ = error.__cause__
    return copy


# ==================================================================================================
# Transactions: the block, savepoints, the user's own SQL
# ==================================================================================================

# The first word of a statement, behind white space and comments. The loop is possessive (*+), so
# that a text of many comments is not searched for other ways to read them.
_REFUSED_SQL = re.compile(
    r"(?:[\s;\ufeff]|--[^\n]*(?:\n|$)|/\*.*?(?:\*/|$))*+"
    r"(BEGIN|COMMIT|END|ROLLBACK|SAVEPOINT|RELEASE|ATTACH|DETACH|VACUUM|PRAGMA|ABORT|COPY"
    r"|PREPARE(?=\s+TRANSACTION)"
    r"|SET(?!\s+(?:LOCAL|CONSTRAINTS)\b)|RESET|DISCARD)\b",
    re.IGNORECASE | re.DOTALL,
)
# A statement without one of these words neither makes nor renames a temporary table, view or
# trigger.
_TEMPORARY_SQL = re.compile("temp|alter|trigger", re.IGNORECASE)
_PLAIN_TYPES = {type(None), bool, int, float, str, bytes}


def _parameters(values: Any, path: str = "parameters") -> Any:
    """A statement's parameters as the driver takes them: by name, or in order."""
    kind = type(values)
    if kind in (tuple, list, dict):
        return values
    if values is None:
        raise StorageError("the statement failed: parameters in a list or a dict are needed")
    if hasattr(kind, "keys"):
        return _read_foreign(dict, values, path)
    return _read_foreign(list, values, path) if issubclass(kind, (tuple, list)) else values


def _is_plain(parameters: Any) -> bool:
    """Whether all of a statement's parameters are of types without code of their own."""
    if type(parameters) is dict:
        parameters = [*parameters.values()]
    return type(parameters) in (tuple, list) and {*map(type, parameters)} <= _PLAIN_TYPES


def _parameter_rows(rows: Any) -> list[Any]:
    if not hasattr(type(rows), "__iter__"):
        raise InvalidData(f"rows: rows of values are needed, not {type(rows).__name__}")
    return [_parameters(row, "rows") for row in _read_foreign(list, rows, "rows", list)]


def _in_savepoint(tx: _Tx, action: Callable[[], R]) -> R:
    """Run a part of an operation; its error undoes that part alone."""
    lines = len(tx.lines)
    tx.run("SAVEPOINT flowstore_part")
    try:
        result = action()
    except BaseException:
        del tx.lines[lines:]
        if tx.db.in_transaction:  # SQLite rolls everything back after some errors
            tx.run("ROLLBACK TO flowstore_part")
            tx.run("RELEASE flowstore_part")
        raise
    tx.run("RELEASE flowstore_part")
    return result


def _reserve_stack(frames: int) -> None:
    """RecursionError now, while nothing is held, if the end of a block would not have that many
    frames."""
    if frames:
        _reserve_stack(frames - 1)


class _TransactionEnded(StorageError):
    """The transaction ended while a call of another task was on its way into it."""

    def __init__(
        self, message: str = "the transaction has ended: use tx inside its with block only"
    ) -> None:
        super().__init__(message)


class Transaction:
    """An open transaction, for the user's own SQL in the same database."""

    def __init__(self, block: _Block) -> None:
        # Weak: the user's variable must not keep a block open whose end never ran.
        self._block = weakref.ref(block)

    def execute(
        self, sql: str, parameters: Sequence[Any] | Mapping[str, Any] = ()
    ) -> list[tuple[Any, ...]]:
        """Run one statement of the user's own and return its rows.

        Raises StorageError for the driver's error; for a statement that would end the transaction
        or reach outside it (BEGIN, COMMIT, ROLLBACK, SAVEPOINT, RELEASE, ATTACH, VACUUM, PRAGMA);
        for a temporary table, view or trigger that hides or watches a table of flowstore's; and
        after the block."""
        return self._innermost().execute(sql, parameters)

    def executemany(self, sql: str, rows: Iterable[Sequence[Any] | Mapping[str, Any]]) -> None:
        """Run one statement for each of the rows; errors as with `execute`."""
        self._innermost().execute(sql, _parameter_rows(rows), many=True)

    def _innermost(self) -> _Block:
        """The innermost open block: SQL given to an outer `tx` belongs to the block nested in
        it."""
        block = self._block()
        if block is None or not block.is_open:
            raise _TransactionEnded
        innermost = block.engine.block()
        if innermost is None or innermost.root is not block.root:
            raise StorageError("the transaction belongs to the thread or task that opened it")
        return innermost


class _Savepoint(NamedTuple):
    """A savepoint in the transaction of an outermost block, which a nested block or a call has set.

    It is kept until it is released. So whoever comes next finds what an interrupt has left."""

    name: str
    lines: int  # of the program's log, when it was set
    block: weakref.ref[_Block] | None = None  # the nested block

    def was_left(self) -> bool:
        """Whether its block has ended, or its call: while a call runs, nobody asks."""
        block = None if self.block is None else self.block()
        return block is None or not block.is_open


class _Block:
    """`with store.transaction()`: everything that the thread or task does in it, or nothing.

    Only the `with` statement holds a strong reference. If an interrupt strikes so that the end
    never runs, the block is collected, and its finalizer marks the call that leads as abandoned:
    the next caller rolls back and leads."""

    # Of an outermost block that leads the writer. An interrupt may strike in __init__.
    _call: _Call | None = None

    def __init__(self, engine: _Engine, read_only: bool = False) -> None:
        self.engine = engine
        self.read_only = read_only
        # Or it has a connection of its own, as one that only reads a file has.
        self.leads = engine.blocks_lead() and (engine.in_memory or not read_only)
        # Whether writers may have to wait for its end.
        self.holds_writers = self.leads or not (read_only or engine.options.read_only)
        self.thread: int | None = None  # the owner's; 0: a task, whose statements run in a worker
        self.owner: object = None
        self.begun = False  # True until the block ends
        self.parent: _Block | None = None
        self.savepoints: list[_Savepoint] = []  # of an outermost block, the innermost last
        self.savepoint = ""  # of a nested block
        self.turn: Any = None  # of a task's block: the lock for one statement or nested block
        self.undo: list[Callable[[], object]] = []  # is called unless it is surely committed
        self._connection: _Connection | None = None
        self._ref: weakref.ref[_Block] = weakref.ref(self)

    def __enter__(self) -> Transaction:
        _reserve_stack(20)
        thread = threading.get_ident()
        self.bind(thread, thread)
        self.begin()
        return self.activate()

    def bind(self, thread: int, owner: object) -> None:
        """Record the thread whose calls join the block, and the thread or task that opened it."""
        if self.thread is not None:
            raise StorageError(
                "a transaction object opens one block: call store.transaction() again"
            )
        self.parent = self.engine.block()
        if self.parent is not None and (self.read_only or self.parent.read_only):
            raise StorageError(
                "a read-only transaction nests in nothing, and nothing nests in it: leave the "
                "other block first"
            )
        self.thread = thread
        self.owner = owner

    def begin(self, deadline: float = 0.0) -> None:
        """Begin a transaction, or a savepoint in the parent's. Raises StoreBusy."""
        if self.parent is None:
            self._begin_transaction(deadline)
            if self.holds_writers:
                self.engine.open_blocks[hash(self.owner)] = self._ref
            else:
                self.engine.snapshots.add(self)
            self.begun = True
        else:
            # What is nested in the block that a running call belongs to would be a part of that.
            self.parent._refuse_inside_call()
            connection = self.parent.connection
            with connection.lock:
                tx = self.parent.tx()
                self._connection = connection
                self.savepoint = f"flowstore_{new_id()[24:]}"
                tx.run(f"SAVEPOINT {self.savepoint}")
                self.begun = True
                savepoint = _Savepoint(self.savepoint, len(tx.lines), self._ref)
                self.root.savepoints.append(savepoint)

    def _begin_transaction(self, deadline: float) -> None:
        engine = self.engine
        if self.leads:
            self._connection = engine.writer.connection
            self._call = _Call(deadline=deadline)
            writes = not (self.read_only or engine.options.read_only)
            begin = functools.partial(engine.writer.begin_block, writes=writes)
            engine.writer.lead(self._call, begin, keep=True)
        else:
            engine.retry_while_busy(self._begin_pooled)

    def _begin_pooled(self) -> None:
        self._connection = self.engine.pool.check_out(writes=self.holds_writers)
        try:
            with self._connection.lock:
                self.engine.begin_pooled(self._connection.use(), not self.holds_writers)
        except BaseException:
            self._return_connection()
            raise

    @property
    def is_open(self) -> bool:
        """Whether it can be used: a block ends with the one that it is nested in."""
        return self.begun and (self.parent is None or self.parent.is_open)

    @property
    def root(self) -> _Block:
        """The outermost block."""
        return self if self.parent is None else self.parent.root

    @property
    def connection(self) -> _Connection:
        """The connection of a block that has begun."""
        if self._connection is None:
            raise _TransactionEnded
        return self._connection

    def activate(self) -> Transaction:
        """Let the calls of this context join the block."""
        _blocks.set((self._ref, *(ref for ref in _blocks.get() if ref() is not None)))
        return Transaction(self)

    def deactivate(self) -> None:
        """Let later calls of this context no longer join the block."""
        _blocks.set(tuple(ref for ref in _blocks.get() if ref is not self._ref))

    def tx(self) -> _Tx:
        """The open transaction; the caller holds the connection's lock. Raises StorageError after
        its end."""
        self.engine.refuse_closed()
        if not self.is_open:
            raise _TransactionEnded
        call = self.root._call
        if call is not None and self.engine.writer.leader is not call:
            raise _TransactionEnded  # a signal handler's call, while the block ends
        tx = self.connection.use()
        if not tx.db.in_transaction:
            raise StorageError(
                "the database ended this transaction, nothing of it was stored: run the block again"
            )
        self._undo_left(tx)
        savepoints = self.root.savepoints
        innermost = savepoints[-1].block if savepoints else self.root._ref
        if innermost is not self._ref:
            raise StorageError(
                "another task has a transaction nested in this one: let it end first"
            )
        return tx

    def _undo_left(self, tx: _Tx) -> None:
        """Undo what was written behind savepoints that blocks and calls have left."""
        savepoints = self.root.savepoints
        while savepoints and savepoints[-1].was_left():
            left = savepoints[-1]
            # There is none where only the interrupt came after RELEASE, or the transaction ended.
            with contextlib.suppress(StorageError):
                tx.run(f"ROLLBACK TO {left.name}")
                tx.run(f"RELEASE {left.name}")
            del tx.lines[left.lines :]
            savepoints.pop()

    def run(self, call: _Call) -> Any:
        """Run an operation as a savepoint of its own."""
        self._refuse_inside_call()
        with self.connection.lock:
            tx = self.tx()
            if call.operation.writes:
                self.engine.refuse_read_only()
                if self.read_only:
                    raise StorageError("the transaction is read-only: nothing can be changed in it")
            elif not self.engine.failed_reads_end_transactions:
                return self.engine.unless_written(tx, lambda: call.run(tx))
            return self._in_own_savepoint(tx, lambda: call.run(tx))

    def execute(self, sql: object, parameters: Any, *, many: bool = False) -> list[tuple[Any, ...]]:
        """Run a statement of the user's own."""
        sql = str.__str__(_check_type(str, sql, "sql", "text"))
        if refused := _REFUSED_SQL.match(sql):
            raise StorageError(
                f"{refused[1].upper()} is not for a statement inside transaction(): "
                "the block does that"
            )
        values = parameters if many else _parameters(parameters)
        self._refuse_inside_call()
        with self.connection.lock:
            tx = self.tx()
            execute = tx.db.executemany if many else tx.db.execute

            def run() -> list[tuple[Any, ...]]:
                rows: list[tuple[Any, ...]] = execute(sql, values).fetchall()
                if _TEMPORARY_SQL.search(sql):
                    self.engine.refuse_hidden(tx)
                return rows

            try:
                return self.engine.unless_written(tx, lambda: self._in_own_savepoint(tx, run))
            except (*_DRIVER_ERRORS, ValueError, LookupError) as error:
                raise StorageError(f"the statement failed: {error}") from error
            except Exception as error:
                ours = isinstance(error, (FlowStoreError, RecursionError, MemoryError))
                if ours or all(map(_is_plain, values if many else [values])):
                    raise
                says = f"the driver cannot read a value, it raised {type(error).__name__}"
                raise InvalidData(f"parameters: {says}") from error

    def _refuse_inside_call(self) -> None:
        """StorageError in a call that interrupts another one of its thread: the savepoint of that
        one may undo it."""
        if self.connection.lock._is_owned():  # type: ignore[attr-defined]
            raise StorageError(_INTERRUPTS)

    def _in_own_savepoint(self, tx: _Tx, action: Callable[[], R]) -> R:
        savepoints = self.root.savepoints
        savepoints.append(_Savepoint("flowstore_call", len(tx.lines)))
        tx.run("SAVEPOINT flowstore_call")
        try:
            result = action()
        except BaseException:
            self._undo_left(tx)
            raise
        tx.run("RELEASE flowstore_call")
        savepoints.pop()
        return result

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: object
    ) -> None:
        undo = self.undo
        try:
            self.finish(commit=kind is None)
        except BaseException:  # it may be committed all the same
            for each in undo:
                each()
            raise
        finally:
            self.deactivate()

    def finish(self, commit: bool) -> None:
        """Commit or roll back. After any error too, the writer goes to others."""
        lines: Sequence[_Line] = ()
        try:
            with self.connection.lock:
                tx = self.tx()
                if self.parent is not None:
                    if commit:
                        tx.run(f"RELEASE {self.savepoint}")
                        self.root.savepoints.pop()
                    else:
                        self.begun = False
                        self._undo_left(tx)
                elif commit and self._call is None:
                    self.engine.commit_pooled(tx)
                    lines = tx.take_lines()
            if commit and self._call is not None:
                self.engine.writer.lead(self._call, self.engine.writer.commit_block)
            if commit:
                if self.parent is not None:
                    self.parent.undo += self.undo
                self.undo = []
        except StorageError:
            if commit:
                raise  # else the block's own error says more
        finally:
            self._unregister()
            for undo in self.undo:
                undo()
            _write_lines(lines if self._call is None else self._call.lines)

    def _unregister(self) -> None:
        self.begun = False
        if self.parent is None:
            open_blocks = self.engine.open_blocks
            if open_blocks.get(hash(self.owner)) is self._ref:
                open_blocks.pop(hash(self.owner), None)  # a handler's block may have taken it
            self.engine.snapshots.discard(self)
            self._return_connection()

    def _return_connection(self) -> None:
        """After an outermost block: hand the lead on, or check the reader in. Either rolls back
        what is open."""
        if self._call is not None:
            if self.engine.writer.leader is self._call:
                self.engine.writer.lead(self._call, lambda _: True)
        elif self._connection is not None:
            connection = self._connection
            self._connection = None
            self.engine.pool.check_in(connection)

    def __del__(self) -> None:
        # This runs at any point of any thread, so it takes no lock: it wakes the next callers, who
        # look again.
        if self._call is None:
            return
        writer = self.engine.writer
        if writer.leader is self._call:
            self._call.state = _ABANDONED
        for waiting in [writer.leader, *list(writer.queue)[:1]]:
            if waiting is not None and waiting.gate is not None:
                with contextlib.suppress(RuntimeError):  # it was awake already
                    waiting.gate.release()


# ==================================================================================================
# Fork: what happens before and after one
# ==================================================================================================

# SQLite keeps its file locks in a table for each process. A fork copies the table, not the locks.
# A child that kept a connection would take the file for locked when it is not, and lose writes.
# So each connection is closed before a fork, and opened again on both sides at its next use.


def _stop_engines() -> None:
    """Before a fork: wait for the statements being executed, and close every connection."""
    _process.lock.acquire()
    _process.forking[:] = _process.engines
    for engine in _process.forking:
        engine.before_fork()
    _process.pin_lock.acquire()


def _resume_engines() -> None:
    """After a fork, in the parent."""
    for engine in _process.forking:
        engine.after_fork_in_parent()
    _process.forking.clear()
    _release_fully(_process.pin_lock)
    _release_fully(_process.lock)


def _restart_engines() -> None:
    """After a fork, in the child, where this is the only thread."""
    for engine in _process.forking:
        engine.after_fork_in_child()
    _process.forking.clear()
    _release_fully(_process.pin_lock)
    _release_fully(_process.lock)


def _release_fully(lock: Any) -> None:
    """Release an RLock of this thread, however often the thread took it: a step may run again."""
    if lock._is_owned():
        lock._release_save()


def _until_done(step: Callable[[], None]) -> None:
    """Run a step until no exception interrupts it: an engine left out would keep its locks.

    The last exception is raised at the end. Python reports it, and the fork goes on."""
    interruption: BaseException | None = None
    limit = sys.getrecursionlimit()
    while True:
        try:
            step()
            break
        except BaseException as error:
            interruption = error
            if isinstance(error, RecursionError):
                sys.setrecursionlimit(limit + 1000)
    sys.setrecursionlimit(limit)
    if interruption is not None:
        raise interruption


if hasattr(os, "register_at_fork") and not _process.fork_hooks:
    _process.fork_hooks = True
    # Twice: an interrupt at the very beginning of a hook ends it before it has done anything.
    for _ in range(2):
        os.register_at_fork(
            before=functools.partial(_until_done, _stop_engines),
            after_in_parent=functools.partial(_until_done, _resume_engines),
            after_in_child=functools.partial(_until_done, _restart_engines),
        )


# ==================================================================================================
# Operations: the engine that runs them, how a method becomes a call, tenants' SQL, pruning
# ==================================================================================================


class _Method(Generic[F, P, R]):
    """A method of a facet: written as an operation, called as a method that the store runs.

    An operation is a function over an open transaction. The kinds:
        write     may run more than once (a group begins again), so it has no effect outside `tx`
        row       a write whose every race is decided by one conditional statement or one row lock;
                  on a server it runs at READ COMMITTED
        statement a row write whose first statement does everything or changes nothing. What follows
                  it is a second transaction. To run it twice does no harm: after a lost connection
                  it runs again
        read      one reading statement
        snapshot  several reading statements, on one state of the database
        steps     no operation but a generator of several calls: each `yield` hands the result of
                  one (async: its awaitable) to `run_steps`, which sends the outcome back"""

    def __init__(self, function: Callable[..., Any], kind: str) -> None:
        self.function = function
        self.kind = kind
        self.writes = kind in ("write", "row", "statement")
        self.name = function.__name__
        self.__doc__ = function.__doc__

    @functools.cached_property
    def unbound(self) -> Callable[..., Any]:
        """The method as its class shows it, with the signature that callers see: without `tx`."""

        @functools.wraps(self.function)
        def method(facet: Any, *args: Any, **kwargs: Any) -> Any:
            return getattr(facet, self.name)(*args, **kwargs)

        signature = inspect.signature(self.function)
        public = [each for name, each in signature.parameters.items() if name != "tx"]
        returns = re.sub(r"^_Steps\[(.*)\]$", r"\1", str(signature.return_annotation))
        method.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=public, return_annotation=returns
        )
        method.__annotations__ = {each.name: each.annotation for each in public[1:]}
        method.__annotations__["return"] = returns
        return method

    @overload
    def __get__(self, facet: None, owner: Any) -> Callable[..., Any]: ...
    @overload
    def __get__(
        self, facet: _AsyncFacet, owner: Any = None
    ) -> Callable[P, Coroutine[Any, Any, R]]: ...
    @overload
    def __get__(self, facet: F, owner: Any = None) -> Callable[P, R]: ...
    def __get__(self, facet: Any, owner: Any = None) -> Callable[..., Any]:
        """The method of one facet: made once, then found in the facet's own attributes.

        Both layers are in C, so that calling the method calls no other Python function than the
        engine's."""
        if facet is None:
            return self.unbound
        run = facet._engine.run_steps if self.kind == "steps" else facet._engine.run
        function = functools.update_wrapper(functools.partial(run, self), self.unbound)
        bound = types.MethodType(function, facet)
        facet.__dict__[self.name] = bound
        return bound


_AnyMethod: TypeAlias = "_Method[Any, Any, Any]"


def _operation(kind: str) -> Callable[[Callable[Concatenate[F, _Tx, P], R]], _Method[F, P, R]]:
    return lambda function: _Method(function, kind)


_write = _operation("write")
_write_row = _operation("row")
_write_statement = _operation("statement")
_read = _operation("read")
_snapshot = _operation("snapshot")


def _steps(function: Callable[Concatenate[F, P], Generator[Any, Any, R]]) -> _Method[F, P, R]:
    """A method of several transactions, written as a generator of its steps."""
    return _Method(function, "steps")


class _Engine(_Database):
    """A database, the writer and the readers on it, and what runs an operation on them.

    `_PostgresEngine` is the other engine: it overrides the methods that a server does in another
    way."""

    max_writers = 1  # connections that write side by side
    max_readers = sys.maxsize  # connections that read side by side
    poll_seconds = 0.02  # between two looks of a waiting thread at the commits of other processes
    failed_reads_end_transactions = False
    pool_type: type[_Pool] = _Pool

    def __init__(self, target: str, path: str | None, options: SimpleNamespace) -> None:
        super().__init__(target, path, options)
        # One connection serves all calls then, and no disk keeps the data.
        self.in_memory = path is None and self.max_writers == 1
        # Drops what ended long ago, if open() was told how long.
        self.retention: _Retention | None = None
        if options.keep is not None and not options.read_only:
            self.retention = _Retention(options.keep)
        self.commits = 0
        self.listeners = _CommitListeners(self)
        # The blocks for which writers wait, by the hash of their thread or task: a task that is a
        # key would never be collected.
        self.open_blocks: dict[int, weakref.ref[_Block]] = {}
        self.snapshots: weakref.WeakSet[_Block] = weakref.WeakSet()  # the other open blocks
        self.mutex = threading.RLock()
        self.pool = self.pool_type(self)
        # Without locks, the next call may have to open the file in another way.
        self.pool.keeps_idle = not self.cannot_lock
        self.writer = _Writer(self, self.log)
        self.poller = self.pool.new_connection()
        with _process.lock:
            _process.engines.add(self)
        try:
            self.prepare(self.writer.connection)
        except BaseException:
            self.writer.connection.close()
            raise
        weakref.finalize(self, _close_all, self.pool.connections)
        _log(_INFO, "%s: opened", self.target)

    def blocks_lead(self) -> bool:
        """Whether a transaction block leads the writer. Else it has a connection of its own."""
        return self.max_writers == 1 and (self.in_memory or not self.options.read_only)

    # --- running operations ---
    def run(self, operation: _AnyMethod, facet: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Run an operation: in the caller's open transaction, or in one of its own."""
        call = _Call(operation=operation, facet=facet, args=args, kwargs=kwargs)
        if _blocks.get():
            block = self.block()
            if block is not None:
                return block.run(call)
        if operation.writes and self.options.read_only:
            self.refuse_read_only()
        if self.max_writers > 1 or not (operation.writes or self.in_memory):
            return self.run_pooled(call)
        writer = self.writer
        try:
            writer.lead(call, writer.commit_calls)
        finally:
            if call.lines:
                _write_lines(call.lines)
        if call.error is not None:
            try:
                raise call.error
            finally:
                del call  # its error's traceback leads back to this frame
        return call.result

    def run_pooled(self, call: _Call) -> Any:
        """Run an operation on a connection of the pool: one that reads, and on a server each."""
        action = functools.partial(self.run_on, call)
        if self.cannot_lock:
            action = functools.partial(self._run_without_locks, call)
        run = functools.partial(self.with_connection, action, call.operation.writes, call.waits)
        if self.log_may_vanish:
            run = functools.partial(self._read_again_if_log_lost, run)
        result = self.retry_while_busy(run)
        if call.lines:
            _write_lines(call.lines)
        return result

    def _run_without_locks(self, call: _Call, tx: _Tx) -> Any:
        return self.unless_written(tx, lambda: self.run_on(call, tx))

    def _read_again_if_log_lost(self, read: Callable[[], Any]) -> Any:
        """Read without a lock that holds: once more, if the log was deleted meanwhile."""
        while True:
            result: Any = None
            error: FlowStoreError | None = None
            try:
                result = read()
            except FlowStoreError as failure:
                error = failure
            if self.log is not None and self.log.was_deleted():
                self.reopen_after_lost_log()
            elif error is not None:
                raise error
            else:
                return result

    def run_on(self, call: _Call, tx: _Tx) -> Any:
        """Run an operation on a connection of the pool. What it leaves open is rolled back as the
        connection goes back."""
        if call.operation.kind == "snapshot":
            tx.run("BEGIN")
        return call.run(tx)

    def with_connection(
        self, action: Callable[[_Tx], R], writes: bool = False, waits: bool = True
    ) -> R:
        """Run `action` on a connection from the pool."""
        self.refuse_unprepared_fork()
        connection = self.pool.check_out(writes, waits)
        # Under its lock to the end: a fork would take a read that is over for an open transaction.
        with connection.lock:
            try:
                result = action(connection.use())
            finally:
                self.pool.check_in(connection)
        return result

    def on_new_connection(self, action: Callable[[_Tx], R]) -> R:
        """Run `action` on a connection of its own (in memory: on the one there is)."""
        if self.in_memory:
            return self.writer.alone(action)

        def run() -> R:
            connection = self.pool.new_connection()
            with connection.lock, contextlib.closing(connection):
                tx = connection.use()
                return self.unless_written(tx, lambda: action(tx))

        return self.retry_while_busy(run)

    def in_thread(self, function: Callable[..., R], *args: Any) -> R:
        """Run a function that blocks; an async store does so in a thread."""
        return function(*args)

    def run_steps(
        self, method: _Method[Any, Any, R], facet: Any, /, *args: Any, **kwargs: Any
    ) -> R:
        """Walk through the steps of a method."""
        steps = method.function(facet, *args, **kwargs)
        outcome = None
        while True:
            try:
                outcome = steps.send(outcome)
            except StopIteration as end:
                result: R = end.value
                return result

    # --- a log that may vanish ---
    def has_log(self) -> bool:
        """Take the shared lock that the process may have lost; whether the log is still the
        file's."""
        if self.path is None or self.log is None:
            return True
        return _lock_file_again(self.path) and not self.log.was_deleted()

    def reopen_after_lost_log(self) -> None:
        """After the log was deleted: close every connection of this process to the file, and go on
        with the file.

        The connections share what SQLite keeps of the old log, and the file has all that is in it.
        SQLite deletes the log when the last connection closes, whichever log that is. So a log that
        a crash left since is not touched."""
        if self.path is None or self.log is None or not self.log.was_deleted():
            return
        if _size_and_mtime(self.log.path)[0] and not _is_locked_by_others(self.path):
            raise StorageError(
                f"{self.path}: other code in this process dropped the locks on the file, and a "
                "crash left a write-ahead log since: end this process, and open the file again"
            )
        with _process.lock:
            engines = [one for one in _process.engines if one.path == self.path]
            for engine in engines:
                engine.before_fork()
            for engine in engines:
                engine.after_fork_in_parent()
        _log(_WARNING, "%s: another process deleted the write-ahead log in use", self.path)

    # --- waiting for commits ---
    def wait(self, seen: int, seconds: float, tick: float = 0.0) -> Any:
        """Wait for a commit after the first `seen` ones, or for `tick` seconds, at least until it
        is time to poll for other processes' commits."""
        self.listeners.wait(seen, seconds, tick)

    def counts_all_commits(self) -> bool:
        """Whether `commits` counts those of other processes, too."""
        return not (self.cannot_lock or self.log_may_vanish)

    # --- transaction blocks ---
    def block(self) -> _Block | None:
        """The innermost transaction block that this thread or task has open, if any."""
        for reference in _blocks.get():
            block = reference()
            if block is None or block.engine is not self or not block.begun:
                continue
            if block.thread in (0, threading.get_ident()):
                if not block.is_open:
                    raise StorageError(
                        "the transaction that this one is nested in has ended: nothing of it was "
                        "stored"
                    )
                return block
        return None

    def has_block(self, *owners: object) -> bool:
        """Whether one of these threads or tasks has a block open for which writers wait."""
        for owner in owners:
            reference = self.open_blocks.get(hash(owner))
            block = reference() if reference is not None else None
            if block is not None and block.is_open and block.owner == owner:
                return True
        return False

    def forbid_inside(self, what: str) -> None:
        """StorageError inside one's own transaction."""
        if self.block() is not None:
            raise StorageError(f"{what} cannot be done inside a transaction: leave the block first")

    # --- the whole store ---
    def now(self) -> datetime:
        """The store's time, in UTC."""
        clock = self.options.clock
        return (
            datetime.now(UTC) if clock is None else _datetime_of(_microseconds(clock(), "clock()"))
        )

    def backup(self, path: str) -> None:
        """Copy one state of the database to `path`; the copy gets its name when it is complete and
        on disk."""
        for suffix in ("", "-wal", "-journal"):  # a log that a crash left would become the copy's
            if os.path.lexists(path + suffix):
                raise StorageError(
                    f"{path + suffix}: there is something already: choose a path that is free"
                )
        folder = os.path.dirname(path)
        if not os.path.isdir(folder):
            raise StorageError(f"{path}: the folder does not exist: make it first")
        partial = f"{path}.{new_id()}.partial"
        _refuse_long(partial, "-journal")
        try:
            self.on_new_connection(lambda tx: self.copy_to(tx, partial))
            _fsync(partial, os.O_RDWR)
            try:
                os.link(partial, path)  # unlike a rename, it never replaces another file
            except FileExistsError:
                raise
            except OSError:  # a file system without links
                os.rename(partial, path)
            with contextlib.suppress(OSError):  # the new name: not every system can sync a folder
                _fsync(folder, os.O_RDONLY)
        except OSError as error:
            raise StorageError(f"{path}: the backup could not be written: {error}") from error
        finally:
            for left in (partial, partial + "-journal"):
                with contextlib.suppress(OSError):
                    os.remove(left)

    def compact(self) -> None:
        """Return free pages in small steps, then empty the log."""
        self.refuse_read_only()
        while self._alone(_vacuum_step):
            self._alone(self.writer.mind_log)
        if self.log is not None:
            self._alone(self.writer.empty_log)

    def _alone(self, action: Callable[[_Tx], R]) -> R:
        return self.retry_while_busy(lambda: self.writer.alone(action))

    def close(self) -> None:
        """Close every connection; waiting calls are woken with StoreClosed, an open transaction is
        rolled back."""
        self.refuse_unprepared_fork()
        with self.mutex:
            was_open = not self.closed
            self.closed = True
            self.pool.keeps_idle = False
            for call in self.writer.queue:
                if call.gate is not None and call.gate.locked():
                    call.gate.release()
            connections = list(self.pool.connections)
        self.listeners.notify()
        # The writer last: the last connection to close deletes the log.
        connections.sort(key=lambda one: one is self.writer.connection)
        for connection in connections:
            self.close_connection(connection)
        if was_open:
            _log(_INFO, "%s: closed", self.target)

    @staticmethod
    def close_connection(connection: _Connection) -> None:
        """Close a connection, unless this call interrupts one that uses it: that one closes it at
        its end."""
        if not connection.lock._is_owned():  # type: ignore[attr-defined]
            with connection.lock, contextlib.suppress(sqlite3.Error):
                connection.close()

    # --- fork ---
    def before_fork(self) -> None:
        """Wait for running statements, then close every connection. All locks are this thread's
        afterwards."""
        while True:
            with self.mutex:
                known = set(self.pool.connections)
            for connection in known:
                connection.lock.acquire()
            self.mutex.acquire()
            if known.issuperset(self.pool.connections):
                break
            self.mutex.release()
        for connection in known:
            if self.path is not None and not connection.in_transaction:
                connection.close()

    def after_fork_in_parent(self) -> None:
        """Go on: each connection is opened again at its next use."""
        _release_fully(self.mutex)
        for connection in list(self.pool.connections):
            _release_fully(connection.lock)

    def after_fork_in_child(self) -> None:
        """Begin anew: the other threads, their locks and their waiting calls exist in the parent
        alone."""
        for connection in self.pool.connections:
            if connection.tx is not None and connection.in_transaction:
                if self.path is None:
                    connection.tx.rollback()
                else:
                    # Closing it would write to the parent's file.
                    _process.files_of_parent.add(_file_id(self.path))
                    connection.leak()
        self.process = os.getpid()
        self.listeners = _CommitListeners(self)
        self.open_blocks.clear()
        self.snapshots.clear()
        self.writer.leader = None
        self.writer.queue.clear()
        self.writer.group = []
        self.after_fork_in_parent()


def _vacuum_step(tx: _Tx) -> bool:
    """Return some free pages to the file system; True while there are more."""
    if tx.row("PRAGMA auto_vacuum") == (0,):  # the file was not made by us
        tx.run("VACUUM")  # in memory, as temp_store says
        return False
    before = tx.rows("PRAGMA freelist_count")[0][0]
    try:
        tx.db.executescript(
            "PRAGMA incremental_vacuum(1000)"
        )  # execute() would stop after the first page
    except sqlite3.Error as error:
        raise _failure(error) from error
    return bool(0 < tx.rows("PRAGMA freelist_count")[0][0] < before)


_TENANT_TABLES = re.compile(
    "flowstore_(executions|log|runs|snapshots|work_items|definitions|effects|artifacts|tokens)"
)


class _Sql(dict[_Dialect, tuple[str, str]]):
    """A statement on a table that has tenants. By dialect: its texts for all of them, and for one.

    `{tenant}` marks the place of the condition. A statement without the mark is refused when the
    module is imported, unless it inserts, so no statement can forget the tenant. (Not `? IS NULL OR
    tenant_id = ?`: no index serves it.) `{by this|that}` names the index of each text. Other
    markers differ by engine: `_SQLITE` has the list."""

    def __init__(self, text: str) -> None:
        text = " ".join(text.split())
        if not _TENANT_TABLES.search(text):
            text = text.replace("{tenant}", "")
        elif "{tenant}" not in text and not (text.startswith("INSERT") and "tenant_id" in text):
            raise AssertionError(f"a statement on a tenant's table without {{tenant}}: {text}")
        self.text = text
        # The tenant's places among the parameters, to be inserted from left to right: each is
        # behind the parameters before the mark.
        marks = re.finditer("{tenant}", text)
        self.places = [text[: mark.start()].replace("{tenant}", "?").count("?") for mark in marks]
        self.all, self.one = self[_SQLITE]

    def __missing__(self, dialect: _Dialect) -> tuple[str, str]:
        """The two texts, which are made once."""
        of_all = re.sub(r"\|\w+}", "}", self.text)
        of_tenant = re.sub(r"{by\w* ?\w*\|", "{by ", self.text)
        of_tenant = of_tenant.replace("{status}", "{tenant_status}")
        self[dialect] = (
            dialect.resolve(of_all, tenant=""),
            dialect.resolve(of_tenant, tenant="AND tenant_id = ?"),
        )
        return self[dialect]

    def scoped(self, params: Iterable[Any], tenant: str) -> list[Any]:
        """The parameters of the text for one tenant."""
        scoped = list(params)
        for place in self.places:
            scoped.insert(place, tenant)
        return scoped


# A statement that is put together when it is needed.
_statement = functools.cache(_Sql)


class _Facet:
    """The common part of all facets: the engine that runs the operations and, in a tenant's view,
    the tenant."""

    def __init__(self, engine: Any, tenant: str | None = None) -> None:
        self._engine = engine
        self._tenant = tenant

    def _rows(self, tx: _Tx, sql: _Sql, *params: Any) -> list[tuple[Any, ...]]:
        """The rows of a statement, of this view's tenant alone."""
        of_all, of_tenant = sql[tx.dialect]
        if self._tenant is None:
            return tx.rows(of_all, *params)
        return tx.rows(of_tenant, *sql.scoped(params, self._tenant))

    def _row(self, tx: _Tx, sql: _Sql, *params: Any) -> tuple[Any, ...] | None:
        rows = self._rows(tx, sql, *params)
        return rows[0] if rows else None

    def _run(self, tx: _Tx, sql: _Sql, *params: Any) -> int:
        """Execute a statement for this view's tenant alone; how many rows it wrote."""
        of_all, of_tenant = sql[tx.dialect]
        if self._tenant is None:
            return tx.run(of_all, *params)
        return tx.run(of_tenant, *sql.scoped(params, self._tenant))

    def _find(
        self, tx: _Tx, mapper: _Mapper[T], rest: str, *params: Any, index: str = "", **where: Any
    ) -> list[T]:
        """The records with these values in their columns. The values are checked as those of fields
        are."""
        values = [mapper.encoders[name](value, name) for name, value in where.items()]
        sql = _select(mapper, rest, *where, index=index)
        return mapper.decode_all(self._rows(tx, sql, *values, *params))

    def _page(
        self,
        tx: _Tx,
        mapper: _Mapper[T],
        index: str,
        order: str,
        limit: int | None = None,
        offset: int = 0,
        condition: str = "",
        **where: Any,
    ) -> list[T]:
        page = _limit(limit), _count(offset, "offset")
        rest = f"{condition} ORDER BY {order} LIMIT ? OFFSET ?"
        return self._find(tx, mapper, rest, *page, index=index, **where)

    def _get(
        self, tx: _Tx, mapper: _Mapper[T], rest: str = "", *params: Any, **where: Any
    ) -> T | None:
        """The first of the records that `_find` finds, or None."""
        found = self._find(tx, mapper, rest, *params, **where)
        return found[0] if found else None

    def _need(self, tx: _Tx, mapper: _Mapper[T], rest: str = "", **where: Any) -> T:
        record = self._get(tx, mapper, rest, **where)
        if record is None:
            name, value = next(iter(where.items()))
            raise NotFound(mapper.kind, mapper.encoders[name](value, name))
        return record

    def _change(self, tx: _Tx, mapper: _Mapper[Any], changes: str, id: AnyId, *params: Any) -> None:
        """Change columns of the row with an id. Raises NotFound."""
        key = _id(id, "id")
        if not self._run(tx, _update(mapper, changes), *params, key):
            raise NotFound(mapper.kind, key)

    def _lease(self, lease_seconds: float | None) -> float:
        if lease_seconds is None:
            return self._engine.options.lease_seconds  # type: ignore[no-any-return]
        return _span(lease_seconds, "lease_seconds")

    def _prune_rule(self, kind: str, rule: _PruneRule, before: int) -> _Steps[int]:
        """Drop, in short transactions, what a rule names and ended before a time; how many went."""
        gone = 0
        kept = Counter[str]()
        cursor: _PruneCursor | None = (0,)
        while cursor is not None:
            step = yield self._prune_some(rule, before, cursor)
            gone += step.gone
            kept += step.kept
            cursor = step.cursor
        if gone or kept:
            _log(_INFO, _PRUNE_LINE, gone, kind, dict(kept))
        return gone

    @_write
    def _prune_some(
        self, tx: _Tx, rule: _PruneRule, before: int, cursor: _PruneCursor
    ) -> _PruneStep:
        """Drop as much as fits into a short transaction, from the cursor on."""
        keys = _foreign_keys(tx)
        return _prune_step(tx, keys, rule, before, cursor)


@functools.cache
def _select(mapper: _Mapper[Any], rest: str, *conditions: str, index: str = "") -> _Sql:
    """SELECT of records on conditions. A column's name alone stands for `column = ?`.

    It names the index, unless the conditions are on a whole unique key."""
    where = "".join(f" AND {each if ' ' in each else f'{each} = ?'}" for each in conditions)
    by = f"{{by {index}}} " if index else ""
    return _Sql(
        f"SELECT {mapper.columns} FROM {mapper.table} {by}WHERE true{where} {{tenant}} {rest}"
    )


@functools.cache
def _update(mapper: _Mapper[Any], changes: str, condition: str = "") -> _Sql:
    """UPDATE by id and a further condition. It returns no row.

    For RETURNING, SQLite copies each page that the statement changes, and the row: a large state
    twice. To read the row by another statement takes less."""
    return _Sql(
        f"UPDATE {mapper.table} SET {changes} WHERE {mapper.key} = ? {condition} {{tenant}}"
    )


def _insert_values(tx: _Tx, mapper: _Mapper[T], values: dict[str, Any]) -> T:
    """Insert a row, and return it as a record; AlreadyExists for a taken id."""
    if not tx.run(mapper.insert, *map(values.__getitem__, mapper.written)):
        raise AlreadyExists(mapper.kind, values[mapper.key])
    return mapper.decode(map(values.__getitem__, mapper.encoders))


def _insert_record(tx: _Tx, mapper: _Mapper[T], record: T, path: str = "", **more: Any) -> T:
    """Store a new record, with `more` set in its row, and return it as stored; AlreadyExists for a
    taken id."""
    return _insert_values(tx, mapper, mapper.encode(record, path, tx.now()) | more)


def _or_not_found(thing: T | None, kind: str, id: str) -> T:
    """What was looked for; NotFound when it is not there."""
    if thing is None:
        raise NotFound(kind, id)
    return thing


# --- pruning ---
_PRUNED_AT_ONCE = 250  # rows in one transaction: a few milliseconds
_PRUNED_BETWEEN_LOOKS = 25  # rows: then it looks at the time, since rows may be large
_SWEPT_AT_FIRST = 50  # rows in one sweep of `keep=`
_SWEPT_AT_MOST = 2000
_SWEEP_SECONDS = 0.01
_PRUNE_LINE = "prune: %d %s went, kept %s"
# SQLite's names for the indexes of UNIQUE (execution_id, sequence) and PRIMARY KEY (execution_id,
# at_sequence).
_LOG_KEY = "sqlite_autoindex_flowstore_log_1"
_SNAPSHOT_KEY = "sqlite_autoindex_flowstore_snapshots_2"

# The number of a source; then the time and the key of the last thing there.
_PruneCursor: TypeAlias = "tuple[Any, ...]"
# By table: name, quoted name, pairs of columns (own, theirs) and ON DELETE of the foreign keys that
# refer to it.
_ForeignKeys: TypeAlias = "dict[str, list[tuple[str, str, list[tuple[str, str]], str]]]"


class _PruneSource(NamedTuple):
    """Where a prune finds what has ended, in the order of its time."""

    table: str
    by: str  # the index
    time: str
    ended: str  # the condition; each ? in it is the time before which
    in_pieces: bool = False  # these are half dropped; foreign keys were checked before


class _PrunePart(NamedTuple):
    """Rows that go with a thing: their table, their column with the thing's key, and their
    DELETE."""

    table: str
    owner: str
    delete: str
    select: str = ""  # selects the keys that `delete` takes; without it, `delete` takes the owner's


class _PruneRule(NamedTuple):
    """What a prune drops of one kind: a row of a table by its key, its parts before it."""

    table: str
    key: str  # one column, or several (only where there are no parts)
    sources: tuple[_PruneSource, ...]
    parts: tuple[_PrunePart, ...] = ()
    # Run when not all rows of a thing fitted into the transaction. Without it, a thing goes whole.
    mark: str = ""
    unless: str = ""  # a SELECT that finds a row if the thing stays though it has ended
    at_once: int = 0  # rows in one transaction, if fewer than usual


@dataclass
class _PruneStep:
    """The result of one transaction of a prune."""

    cursor: _PruneCursor | None  # where the next one goes on; None: at the end
    gone: int = 0  # things that went whole
    rows: int = 0
    kept: Counter[str] = field(default_factory=Counter)  # by the table that refers to them


def _part(table: str, index: str, owner: str, key: str = "id", rest: str = "") -> _PrunePart:
    """A part that is dropped row by row, as far as there is room."""
    return _PrunePart(
        table,
        owner,
        f"DELETE FROM {table} WHERE {key.replace(', ', ' = ? AND ')} = ?",
        f"SELECT {key} FROM {table} {{by {index}}} WHERE {owner} = ? {rest} LIMIT ?",
    )


def _rule_without_parts(table: str, index: str, time: str, ended: str) -> _PruneRule:
    return _PruneRule(table, "id", (_PruneSource(table, index, time, ended),))


def _terminal(
    table: str, index: str, time: str, *words: str, status: str = "status"
) -> tuple[_PruneSource, ...]:
    """A source for each status: each is one range in the index of status and time."""
    return tuple(
        _PruneSource(table, index, time, f"{status} = '{word}' AND {time} < ?") for word in words
    )


def _foreign_keys(tx: _Tx) -> _ForeignKeys:
    """The foreign keys of the user's tables; none if none refers to a table of ours."""
    keys: _ForeignKeys = {}
    rows = tx.rows(tx.dialect.resolve("{foreign_keys}"))
    for key, columns in itertools.groupby(rows, operator.itemgetter(0, 1, 2, 4, 6)):
        name, child, _, table, on_delete = key
        pairs = [(column[3], column[5]) for column in columns]
        keys.setdefault(table, []).append((name, child, pairs, on_delete))
    return keys if any(f'"{table}"' in keys for table in _TABLE_NAMES) else {}


def _holders(
    keys: _ForeignKeys, table: str, row: str, joins: str = "", path: tuple[str, ...] = ()
) -> Iterator[tuple[str, str]]:
    """The tables that refer to a row, or to one that a cascade would delete with it, and the joins
    to them."""
    for name, child, columns, on_delete in keys.get(table, ()):
        alias = f"{row}_"
        match = " AND ".join(f"{alias}.{own} = {row}.{theirs}" for own, theirs in columns)
        joined = f"{joins} JOIN {child} {alias} ON {match}"
        if on_delete in ("NO ACTION", "RESTRICT"):
            yield name, joined
        elif on_delete == "CASCADE" and child not in path:
            yield from _holders(keys, child, alias, joined, (*path, child))


def _holder_sql(keys: _ForeignKeys, rule: _PruneRule, table: str) -> str:
    """SQL for a row of `table` that has the rule's key: the name of a table that refers to the
    thing; '' if the rule's `unless` keeps it; NULL if it may go."""
    owners = {rule.table: rule.key} | {part.table: part.owner for part in rule.parts}
    cases = f" WHEN EXISTS ({rule.unless}) THEN ''" if rule.unless else ""
    for part, owner in owners.items():
        for name, joins in _holders(keys, f'"{part}"', "part"):
            match = f"({_qualified('part', owner)}) = ({_qualified(table, rule.key)})"
            quoted = name.replace("'", "''")
            cases += (
                f" WHEN EXISTS (SELECT 1 FROM {part} part{joins} WHERE {match}) THEN '{quoted}'"
            )
    return f"CASE{cases} END" if cases else "NULL"


def _qualified(table: str, columns: str) -> str:
    """Column names with the name of their table before each."""
    return ", ".join(f"{table}.{column}" for column in columns.split(", "))


def _candidates(
    tx: _Tx,
    rule: _PruneRule,
    keys: _ForeignKeys,
    before: int,
    cursor: _PruneCursor,
    most: int,
) -> Iterator[tuple[_PruneCursor, Sequence[Any], str | None]]:
    """The cursor, the key and the holder of each thing that has ended, from the cursor on; `most`
    of each source.

    The cursor passes what is kept, so no step reads that again."""
    first, *after = cursor
    for number, source in enumerate(rule.sources[first:], first):
        held = "NULL" if source.in_pieces else _holder_sql(keys, rule, source.table)
        order = f"{source.time}, {rule.key}"
        # Both conditions: in an index of an expression SQLite seeks by the first alone.
        marks = ", ".join("?" * len(after))
        behind = f"AND {source.time} >= ? AND ({order}) > ({marks})" if after else ""
        sql = f"""SELECT {order}, {held} FROM {source.table} {{by {source.by}}}
            WHERE {source.ended} {behind} ORDER BY {order} LIMIT {most}"""
        times = [before] * source.ended.count("?")
        for *place, holder in tx.rows(tx.dialect.resolve(sql), *times, *after[:1], *after):
            yield (number, *place), place[1:], holder
        after = []


def _drop(tx: _Tx, rule: _PruneRule, key: Sequence[Any], room: int, end: float) -> tuple[int, bool]:
    """Drop a thing with its parts, as far as there is room, until the time `end`; how many rows
    went, and whether it went whole."""
    rows = 0
    is_late = False
    for part in rule.parts:
        delete = tx.dialect.resolve(part.delete)
        if not part.select:
            rows += tx.run(delete, *[*key] * delete.count("?"))
            continue
        select = tx.dialect.resolve(part.select)
        while rows < room and not is_late:
            some = min(_PRUNED_BETWEEN_LOOKS, room - rows) if rule.mark else room
            keys = tx.rows(select, *key, some)
            rows += tx.run_many(delete, keys) if keys else 0
            if len(keys) < some:
                break
            is_late = _monotonic() > end
    if rule.mark and (is_late or rows >= room):
        tx.run(rule.mark, *key)
        return rows, False
    columns = rule.key.replace(", ", " = ? AND ")
    return rows + tx.run(f"DELETE FROM {rule.table} WHERE {columns} = ?", *key), True


def _drop_or_keep(
    tx: _Tx, rule: _PruneRule, key: Sequence[Any], room: int, keys: _ForeignKeys, end: float
) -> tuple[int, bool, str | None]:
    """As `_drop`; when a constraint of the user's tables refuses it, nothing goes, and the reason
    is returned."""
    drop = functools.partial(_drop, tx, rule, key, room, end)
    if not keys and tx.dialect is _SQLITE:  # a server may have tables that this user cannot see
        return *drop(), None
    try:
        return *_in_savepoint(tx, drop), None
    except StorageError as error:
        kinds = [kind.__name__ for kind in type(error.__cause__).__mro__]
        if "IntegrityError" not in kinds or not tx.db.in_transaction:
            raise
        return 0, False, str(error)


def _prune_step(
    tx: _Tx,
    keys: _ForeignKeys,
    rule: _PruneRule,
    before: int,
    cursor: _PruneCursor,
    room: int = 0,
) -> _PruneStep:
    """Drop what a rule names, from the cursor on, until `room` rows went (with 0, as many as the
    rule allows), or until it has taken some time: rows may be large."""
    end = math.inf
    room = room or rule.at_once or _PRUNED_AT_ONCE
    # Each part of a thing costs a statement, even if there is no row of it.
    most = room // (1 + len(rule.parts)) or 1
    step = _PruneStep(cursor)
    for number, candidate in enumerate(_candidates(tx, rule, keys, before, cursor, most + 1)):
        following, key, reason = candidate
        if number == 0:  # to find the first ones may take long, and would again
            end = _monotonic() + _SWEEP_SECONDS
        if number == most or step.rows >= room or (number and _monotonic() > end):
            return step
        if reason is None:
            left = room - step.rows if rule.mark else _INT_MAX
            dropped, went, reason = _drop_or_keep(tx, rule, key, left, keys, end)
            step.rows += dropped
            step.gone += went
            if not went and reason is None:
                return step  # its other rows come first in the next step
        if reason:
            step.kept[reason] += 1
        step.cursor = following
    step.cursor = None
    return step


def _drop_whole(tx: _Tx, rule: _PruneRule, id: str, keys: _ForeignKeys) -> str | None:
    """Drop a thing, unless something refers to it: the name of that."""
    sql = f"SELECT {_holder_sql(keys, rule, rule.table)} FROM {rule.table} WHERE {rule.key} = ?"
    holder: str | None = tx.rows(sql, id)[0][0]
    return _drop_or_keep(tx, rule, (id,), _INT_MAX, keys, math.inf)[2] if holder is None else holder


class _Retention:
    """What `keep=` of open() does: once a second, a call that writes first drops some rows of what
    ended long ago, in a commit of its own, so that no failure of that is the call's."""

    def __init__(self, keep: int) -> None:
        self.keep = keep  # microseconds
        self.swept_at = 0  # by the store's clock
        self.room = _SWEPT_AT_FIRST  # rows of the next sweep
        self.number = 0  # of the rule with which the next sweep begins
        self.cursor: _PruneCursor = (0,)  # where in it

    def is_due(self, tx: _Tx) -> bool:
        """Whether it is time for a sweep. If so, the caller has to do it: the next is due a second
        later."""
        with contextlib.suppress(Exception):  # of the program's clock
            now = tx.now()
            if not 0 <= now - self.swept_at < 1_000_000:
                self.swept_at = now
                return True
        return False

    def sweep(self, tx: _Tx, commit: Callable[[], object]) -> None:
        """Drop some rows in the open transaction, and commit; or roll back, if that fails."""
        start = _monotonic()
        lines = len(tx.lines)
        try:
            is_full = self._drop(tx, start)
            commit()
        except FlowStoreError as error:
            del tx.lines[lines:]
            tx.warn("keep= could drop nothing: %s", error)
            with contextlib.suppress(StorageError):
                tx.rollback()
            return
        # What a row costs depends on the user's tables too, so the room follows the time.
        seconds = _monotonic() - start
        if seconds > 2 * _SWEEP_SECONDS:
            self.room = max(1, self.room // 2)
        elif is_full:
            self.room = min(2 * self.room, _SWEPT_AT_MOST)

    def _drop(self, tx: _Tx, start: float) -> bool:
        """Go through the kinds, until the room or the time is used up; whether that was so."""
        keys = _foreign_keys(tx)
        before = max(_FIRST_TIME, self.swept_at - self.keep)
        room = self.room
        rules = list(_PRUNED.items())
        looked_through = 0
        while looked_through < len(rules):
            kind, rule = rules[self.number]
            drop = functools.partial(_prune_step, tx, keys, rule, before, self.cursor, room)
            try:
                step = _in_savepoint(tx, drop)
            except StorageError as error:
                if not tx.db.in_transaction:
                    raise
                tx.warn("keep= could drop no %s: %s", kind, error)
                step = _PruneStep(None)
            room -= step.rows
            if step.gone:
                tx.lines.append((_INFO, _PRUNE_LINE, step.gone, kind, dict(step.kept)))
            if step.cursor is None:
                looked_through += 1
                self.number = (self.number + 1) % len(rules)
            self.cursor = step.cursor or (0,)
            if room <= 0 or _monotonic() - start > _SWEEP_SECONDS:
                return True
        return False


# The rules, in this order: things that may belong to others come first, and are counted under their
# own kind. An item of an execution that has ended goes with that. `mark` changes the revision of a
# thing that is dropped in pieces, so that a writer who read it whole is refused. A log is dropped
# from its end, so that the rest never has a gap. SQLite uses the highest position again once its
# row is deleted: before that row goes, a placeholder (of the execution '') is added one position
# higher. It goes when there is a later row.
_ENDED = "completed", "failed", "cancelled", "limit_exceeded"
# What a run waits for is a subscription as of a time after all times: no host of workflows, which
# may use the same names and ids, finds it.
_RUN_WAIT_AS_OF = _LAST_TIME + 1
_IS_RUN_WAIT = f"subscribe_as_of > {_LAST_TIME}"
_IS_NO_RUN_WAIT = f"AND NOT {_IS_RUN_WAIT}"
_WORKFLOW_TIME = "COALESCE(complete_time, create_time)"
_PRUNED: dict[str, _PruneRule] = {
    "errors": _rule_without_parts(
        "execution_errors", "execution_errors_by_time", "error_time", "error_time < ?"
    ),
    "subscriptions": _rule_without_parts(
        "event_subscriptions", "event_subscriptions_ended", "terminated_at", "terminated_at < ?"
    ),
    "events": _rule_without_parts(
        "events", "events_processed", "event_time", "is_processed = 1 AND event_time < ?"
    ),
    "tokens": _rule_without_parts(
        "flowstore_tokens", "flowstore_tokens_by_end", _INVALID_SINCE, f"{_INVALID_SINCE} < ?"
    ),
    "workflows": _PruneRule(
        "workflows",
        "id",
        _terminal("workflows", "workflows_by_age", _WORKFLOW_TIME, "Complete", "Terminated"),
        (
            _part("execution_errors", "execution_errors_by_workflow", "workflow_id"),
            _part(
                "event_subscriptions",
                "event_subscriptions_by_workflow",
                "workflow_id",
                rest=_IS_NO_RUN_WAIT,
            ),
            _part(
                "execution_pointers",
                "execution_pointers_in_order",
                "workflow_id",
                "workflow_id, id",
            ),
        ),
        "UPDATE workflows SET stamp = stamp - 1 WHERE id = ?",
    ),
    "flows": _PruneRule(
        "flows",
        "id",
        _terminal("flows", "flows_by_status", "updated_at", "cancelled", "finished", "failed"),
        (
            _part("flow_events", "flow_events_by_flow", "flow_id"),
            _part("flow_steps", "flow_steps_by_flow", "flow_id"),
        ),
        "UPDATE flows SET revision = revision + 1 WHERE id = ?",
    ),
    "items": _PruneRule(
        "flowstore_work_items",
        "id",
        _terminal(
            "flowstore_work_items",
            "flowstore_settled",
            "settled_at",
            "completed",
            "failed",
            "dead_lettered",
            status="{status}",
        ),
        unless=f"""SELECT 1 FROM flowstore_runs r
            WHERE r.execution_id = flowstore_work_items.execution_id
            AND r.status IN {_ENDED}""",
    ),
    "executions": _PruneRule(
        "flowstore_executions",
        "execution_id",
        (
            *_terminal("flowstore_runs", "flowstore_runs_by_status", "updated_at", *_ENDED),
            _PruneSource(
                "flowstore_executions",
                "flowstore_executions_by_tenant",
                "created_at",
                "tenant_id = ''",
                in_pieces=True,
            ),
        ),
        (
            _PrunePart(
                "flowstore_runs",
                "execution_id",
                "DELETE FROM flowstore_runs WHERE execution_id = ?",
            ),
            _part("flowstore_work_items", "flowstore_items_by_execution", "execution_id"),
            _part(
                "flowstore_effects",
                "flowstore_effects_by_execution",
                "execution_id",
                "tenant_id, key",
            ),
            _part("flowstore_snapshots", _SNAPSHOT_KEY, "execution_id"),
            _PrunePart(
                "flowstore_log",
                "execution_id",
                """INSERT INTO flowstore_log (execution_id, sequence, tenant_id, event, timestamp)
                SELECT '', position, '', '{}', 0 FROM flowstore_log
                WHERE position = (SELECT MAX(position) FROM flowstore_log {by_key})
                AND execution_id = ?""",
            ),
            _PrunePart(
                "flowstore_log",
                "execution_id",
                f"""DELETE FROM flowstore_log {{by {_LOG_KEY}}} WHERE execution_id = ''
                AND position < (SELECT MAX(position) FROM flowstore_log {{by_key}})""",
            ),
            _part("flowstore_log", _LOG_KEY, "execution_id", "position", "ORDER BY sequence DESC"),
        ),
        "UPDATE flowstore_executions SET tenant_id = '' WHERE execution_id = ?",
    ),
}
# What only a prune that is told to drops.
_PRUNED_ARTIFACTS = _PruneRule(
    "flowstore_artifacts",
    "tenant_id, hash",
    (_PruneSource("flowstore_artifacts", "flowstore_artifacts_by_time", "put_at", "put_at < ?"),),
    at_once=10,
)
_PRUNED_SNAPSHOT = _PruneRule("flowstore_snapshots", "id", ())


# ==================================================================================================
# FlowStore: revision-checked flows, their steps and their audit trail
# ==================================================================================================

_FLOW_UPDATE = f"{_FLOW.update} AND revision = ? RETURNING {_FLOW.columns}"
_FLOW_EXISTS = "SELECT 1 FROM flows WHERE id = ?"
_FLOW_EVENT_INSERT = f"""INSERT INTO flow_events (flow_id, kind, payload, at)
    SELECT id, ?, ?, ? FROM flows WHERE id = ? RETURNING {_FLOW_EVENT.columns}"""
# The flow of a step never changes, so the stored one counts.
_STEP_UPDATE = f"""{_STEP.update} AND NOT EXISTS (SELECT 1 FROM flow_steps other
    WHERE other.flow_id = flow_steps.flow_id AND other.run_id = ? AND other.id <> flow_steps.id)
    RETURNING {_STEP.columns}"""


class FlowStore(_Facet):
    """Revision-checked flows, their steps and their audit trail.

    After nexo-taskflow's FlowStore."""

    @_write
    def insert(self, tx: _Tx, flow: Flow) -> Flow:
        """Store a new flow and return it as stored. Raises AlreadyExists."""
        return _insert_record(tx, _FLOW, flow)

    @_read
    def get(self, tx: _Tx, id: AnyId) -> Flow | None:
        """The flow as it is now, or None."""
        return self._get(tx, _FLOW, id=id)

    @_read
    def list_by_owner(
        self, tx: _Tx, owner_session_key: str, *, limit: int | None = None, offset: int = 0
    ) -> list[Flow]:
        """The owner's flows, newest `created_at` first."""
        return self._page(
            tx,
            _FLOW,
            "flows_by_owner",
            "created_at DESC, id DESC",
            limit,
            offset,
            owner_session_key=owner_session_key,
        )

    @_read
    def list_by_status(
        self, tx: _Tx, status: FlowStatus | str, *, limit: int | None = None, offset: int = 0
    ) -> list[Flow]:
        """The flows in a status, oldest `updated_at` first."""
        return self._page(
            tx, _FLOW, "flows_by_status", "updated_at, id", limit, offset, status=status
        )

    @_write
    def update_with_revision(self, tx: _Tx, flow: Flow) -> Flow:
        """Write the flow, if its revision is current. Raises RevisionMismatch, NotFound."""
        return self._update(tx, flow)

    def _update(self, tx: _Tx, flow: Flow) -> Flow:
        values = _FLOW.encode(flow)
        revision = values["revision"]
        values |= {"revision": _int(revision + 1, "revision"), "updated_at": tx.now()}
        row = tx.row(_FLOW_UPDATE, *_FLOW.changes(values), revision)
        if row is None:
            raise RevisionMismatch(revision, self._need(tx, _FLOW, id=values["id"]).revision)
        return _FLOW.decode(row)

    @_write
    def append_event(self, tx: _Tx, flow_id: AnyId, kind: str, payload: Json) -> FlowEvent:
        """Add a line to the flow's audit trail. Raises NotFound."""
        return self._append(tx, _id(flow_id, "flow_id"), kind, payload)

    def _append(
        self, tx: _Tx, flow_id: str, kind: object, payload: object, prefix: str = ""
    ) -> FlowEvent:
        """Add a line; errors name the arguments `kind` and `payload` with the prefix."""
        values = _text(kind, f"{prefix}kind"), _json(payload, f"{prefix}payload")
        row = tx.row(_FLOW_EVENT_INSERT, *values, tx.now(), flow_id)
        return _FLOW_EVENT.decode(_or_not_found(row, "flow", flow_id))

    @_read
    def list_events(self, tx: _Tx, flow_id: AnyId, limit: int = 100) -> list[FlowEvent]:
        """The flow's audit trail, newest first."""
        return self._page(tx, _FLOW_EVENT, "flow_events_by_flow", "id DESC", limit, flow_id=flow_id)

    @_write
    def update_and_append(
        self, tx: _Tx, flow: Flow, event_kind: str, event_payload: Json
    ) -> tuple[Flow, FlowEvent]:
        """`update_with_revision` and `append_event`, both or neither."""
        stored = self._update(tx, flow)
        return stored, self._append(tx, stored.id, event_kind, event_payload, "event_")

    @_write
    def insert_step(self, tx: _Tx, step: FlowStep) -> FlowStep:
        """Store a new step. Raises NotFound (flow), AlreadyExists (id, or run id in the flow)."""
        values = _STEP.encode(step, now=tx.now())
        flow_id = values["flow_id"]
        run_id = values["run_id"]
        _or_not_found(tx.row(_FLOW_EXISTS, flow_id), "flow", flow_id)
        if self._get(tx, _STEP, flow_id=flow_id, run_id=run_id):
            raise AlreadyExists("flow step", run_id)
        return _insert_values(tx, _STEP, values)

    @_write
    def update_step(self, tx: _Tx, step: FlowStep) -> FlowStep:
        """Write the step; the last writer wins. Raises NotFound, AlreadyExists (run id)."""
        values: dict[str, Any] = _STEP.encode(step) | {"updated_at": tx.now()}
        row = tx.row(_STEP_UPDATE, *_STEP.changes(values), values["run_id"])
        if row is None:
            self._need(tx, _STEP, id=values["id"])
            raise AlreadyExists("flow step", values["run_id"])
        return _STEP.decode(row)

    @_read
    def get_step(self, tx: _Tx, id: AnyId) -> FlowStep | None:
        """The step as it is now, or None."""
        return self._get(tx, _STEP, id=id)

    @_read
    def list_steps(self, tx: _Tx, flow_id: AnyId) -> list[FlowStep]:
        """The flow's steps, oldest `created_at` first."""
        return self._page(tx, _STEP, "flow_steps_by_flow", "created_at, id", flow_id=flow_id)

    @_read
    def find_step_by_run_id(self, tx: _Tx, flow_id: AnyId, run_id: AnyId) -> FlowStep | None:
        """The flow's step with this run id, or None."""
        return self._get(tx, _STEP, flow_id=flow_id, run_id=run_id)

    @_steps
    def prune_terminal_flows(self, retain_days: int) -> _Steps[int]:
        """Drop the ended flows not updated for `retain_days` days; how many were dropped.

        Works in small transactions, so no other writer waits for it long."""
        age = _count(retain_days, "retain_days") * 86_400_000_000
        before = max(_FIRST_TIME, _since_epoch(self._engine.now()) - age)
        return (yield from self._prune_rule("flows", _PRUNED["flows"], before))


# ==================================================================================================
# EventStore: the append-only log of executions
# ==================================================================================================

# The tenant of an execution, the tenant's status and the last sequence: what an append has to know.
_LOG_HEAD = _Sql(f"""SELECT tenant_id,
    (SELECT t.status FROM flowstore_tenants t WHERE t.id = tenant_id),
    (SELECT l.sequence FROM flowstore_log l {{by {_LOG_KEY}}} WHERE l.execution_id = e.execution_id
    ORDER BY l.sequence DESC LIMIT 1)
    FROM flowstore_executions e WHERE execution_id = ? {{tenant}}""")
# An event without an id is given "": for None, sqlite3 would look for an adapter, and not find one,
# in as much time as it takes to bind all the others.
_LOG_INSERT = """INSERT INTO flowstore_log
    (execution_id, sequence, tenant_id, event, timestamp, event_id)
    VALUES (?, ?, ?, ?, ?, NULLIF(?, ''))
    ON CONFLICT (execution_id, event_id) WHERE event_id IS NOT NULL DO NOTHING"""
_LOG_BY_EVENT_ID = """SELECT sequence FROM flowstore_log {by flowstore_log_by_event_id}
    WHERE execution_id = ? AND event_id = ?"""
_LOG_IN_ORDER = "flowstore_log {by_key|flowstore_log_by_tenant}"
# The row that stands for a pruned end of the log has no execution: it is no event.
_LOG_FROM = _Sql(f"""SELECT {_STORED.columns} FROM {_LOG_IN_ORDER}
    WHERE position > ? {{in_order}} AND execution_id <> '' {{tenant}} ORDER BY position LIMIT ?""")
_LOG_END = _Sql(f"SELECT MAX(position) FROM {_LOG_IN_ORDER} WHERE true {{in_order}} {{tenant}}")
_LOG_LAST = _Sql(
    f"SELECT MAX(sequence) FROM flowstore_log {{by {_LOG_KEY}}} WHERE execution_id = ? {{tenant}}"
)
# Behind which event the next one comes, and whether its position will tell so too.
_LOG_LAST_EVENT = _Sql(f"""SELECT sequence, {{is_before}} FROM flowstore_log {{by {_LOG_KEY}}}
    WHERE execution_id = ? {{tenant}} ORDER BY sequence DESC LIMIT 1""")
_LOG_LAST_BEFORE = _Sql(f"{_LOG_LAST.text} AND position <= ?")
_EXECUTION_INSERT = """INSERT INTO flowstore_executions (execution_id, tenant_id, created_at)
    VALUES (?, ?, ?) ON CONFLICT DO NOTHING"""
# An execution that a prune has left in pieces has no tenant: it is not known any more.
_EXECUTION_TENANT = _Sql(
    "SELECT tenant_id FROM flowstore_executions WHERE execution_id = ? AND tenant_id <> '' {tenant}"
)
_EXECUTIONS_OF = """SELECT execution_id
    FROM flowstore_executions {by flowstore_executions_by_tenant}
    WHERE tenant_id = ? ORDER BY created_at DESC, execution_id DESC LIMIT ? OFFSET ?"""
_TENANT_STATUS = "SELECT status FROM flowstore_tenants WHERE id = ?"


class _LogCursor(NamedTuple):
    """How far a generator has read the log."""

    position: int
    sequence: int  # of the one execution that is read
    omit: frozenset[int] = frozenset()  # positions behind this one that are left out


def _event_text(event: object, path: str) -> str:
    """The JSON text of an event; InvalidData for anything but an object with a type."""
    if not issubclass(type(event), dict):
        raise InvalidData(f"{path}: an event is a JSON object, not {type(event).__name__}")
    text = _json(event, path)
    members: Any = event if type(event) is dict else _decode_json(text)
    # Not by get(): it would run the methods of a key that is of a type of its own.
    for key, value in [*members.items()]:
        if (
            type(key) is str
            and key == "type"
            and issubclass(type(value), str)
            and str.__len__(value)
        ):
            return text
    raise InvalidData(f"{path}.type: an event needs a non-empty text as its 'type'")


class _LogFacet(_Facet):
    """The operations that both views of the execution log have."""

    def _append_to(
        self,
        tx: _Tx,
        execution_id: str,
        tenant_id: str,
        last: int,
        event: str,
        expected: object = None,
        event_id: object = None,
    ) -> int:
        """Append one event behind the sequence `last`, once per event id; its sequence."""
        expects = last if expected is None else _int(expected, "expected_sequence", 0)
        once = "" if event_id is None else _id(event_id, "event_id")
        row = execution_id, last + 1, tenant_id, event, tx.now(), once
        if last == expects and tx.run(_LOG_INSERT, *row):
            return last + 1
        known = tx.row(tx.dialect.resolve(_LOG_BY_EVENT_ID), execution_id, once)
        if known is None:
            raise SequenceConflict(execution_id, expects, last)
        return int(known[0])

    def _append_last(
        self, tx: _Tx, execution_id: str, tenant_id: str, event: str, event_id: object = None
    ) -> tuple[int, bool]:
        """Append one event, once per event id; its sequence, and whether it was new.

        On a server a transaction may have waited for one that began later, and whose events have
        higher positions than it can give. Raises StoreBusy then: it has to begin again."""
        row = self._row(tx, _LOG_LAST_EVENT, execution_id)
        last, is_before = row or (0, True)
        if not is_before:
            raise StoreBusy("another transaction has appended to the log: run it again")
        sequence = self._append_to(tx, execution_id, tenant_id, last, event, None, event_id)
        return sequence, sequence > last

    def _events_after(
        self, tx: _Tx, execution_id: AnyId, after: int, limit: int = _INT_MAX
    ) -> list[StoredEvent]:
        values = _int(after, "after_seq"), limit
        rest = "AND sequence > ? ORDER BY sequence LIMIT ?"
        return self._find(tx, _STORED, rest, *values, index=_LOG_KEY, execution_id=execution_id)

    def _last_sequence(self, tx: _Tx, execution_id: AnyId) -> int | None:
        last: int | None = self._rows(tx, _LOG_LAST, _id(execution_id, "execution_id"))[0][0]
        return last

    @_read
    def _read_chunk(
        self, tx: _Tx, execution_id: AnyId, after: int, limit: int
    ) -> list[StoredEvent]:
        return self._events_after(tx, execution_id, after, limit)

    @_steps
    def _poll(
        self, look: Callable[..., Any], seconds: float, *args: Any, due: int | None = None
    ) -> _Steps[Any]:
        """Call `look(*args)` until it finds something or the seconds are over.

        At each commit, and now and then besides, for what becomes due without a commit: when the
        store's time is `due`, if that is given."""
        engine = self._engine
        deadline = _monotonic() + seconds
        while True:
            commits = engine.commits
            result = yield look(*args)
            while True:
                left = deadline - _monotonic()
                if result or left <= 0:
                    return result
                tick = 0.25 if due == _LAST_TIME else 0.0
                yield engine.wait(commits, min(left, threading.TIMEOUT_MAX), tick)
                if due is None or engine.commits != commits or not engine.counts_all_commits():
                    break
                if _monotonic() >= deadline:
                    break  # a last look: a commit may have come since the last poll
                if due < _LAST_TIME and _since_epoch(engine.now()) >= due:
                    break


_LOG_FIND = _select(_STORED, "", "execution_id", "event_id", index="flowstore_log_by_event_id")


class EventStore(_LogFacet):
    """The append-only log of executions.

    After the trait EventStore of the Rust crates for durable agents."""

    @_write
    def append(
        self,
        tx: _Tx,
        execution_id: AnyId,
        tenant_id: AnyId,
        event: Mapping[str, Json],
        *,
        expected_sequence: int | None = None,
        event_id: AnyId | None = None,
    ) -> int:
        """Append one event; its sequence. The event is durable when this returns.

        The sequences of an execution are 1, 2, 3, ... without gaps. The first append makes the
        execution known for that tenant, and registers a new tenant. An `event_id` that is in the
        log already returns its sequence and writes nothing. Raises TenantMismatch, TenantInactive,
        InvalidData, and SequenceConflict when the log is not at `expected_sequence` (0: no events
        yet)."""
        log = self._open_log(tx, execution_id, tenant_id)
        return self._append_to(tx, *log, _event_text(event, "event"), expected_sequence, event_id)

    @_write
    def append_batch(
        self,
        tx: _Tx,
        execution_id: AnyId,
        tenant_id: AnyId,
        events: Sequence[Mapping[str, Json]],
        *,
        expected_sequence: int | None = None,
    ) -> int:
        """Append all of the events with consecutive sequences, or none; the first one's sequence.

        Raises as `append` does, and InvalidData for an empty batch."""
        log = self._open_log(tx, execution_id, tenant_id)
        execution, tenant, _ = log
        members = enumerate(_check_list(events, "events", "a list of events"))
        texts = [_event_text(event, f"events[{index}]") for index, event in members]
        if not texts:
            raise InvalidData("events: a batch needs at least one event")
        first = self._append_to(tx, *log, texts[0], expected_sequence)
        now = tx.now()
        rest = enumerate(texts[1:], first + 1)
        rows = [(execution, sequence, tenant, text, now, "") for sequence, text in rest]
        tx.run_many(_LOG_INSERT, rows)
        return first

    def _open_log(self, tx: _Tx, execution_id: AnyId, tenant_id: AnyId) -> tuple[str, str, int]:
        """The execution, the tenant that may append to its log, and the last sequence there.

        A new log is made known."""
        execution = _id(execution_id, "execution_id")
        tenant = _id(tenant_id, "tenant_id")
        sql = _LOG_HEAD[tx.dialect][0]
        head = tx.rows(sql, execution)
        if not head:
            if tx.row(_TENANT_STATUS, tenant) is None:
                _add_tenant(tx, tenant)
            tx.run(_EXECUTION_INSERT, execution, tenant, tx.now())
            head = tx.rows(sql, execution)
        owner, status, last = head[0]
        if owner != tenant:
            raise TenantMismatch(execution, tenant)
        if status != "active":
            raise TenantInactive(tenant)
        return execution, tenant, last or 0

    @_read
    def load_events(self, tx: _Tx, execution_id: AnyId) -> list[StoredEvent]:
        """All events of an execution, by sequence."""
        return self._events_after(tx, execution_id, 0)

    @_read
    def load_events_after(self, tx: _Tx, execution_id: AnyId, after_seq: int) -> list[StoredEvent]:
        """The events with a sequence above `after_seq`."""
        return self._events_after(tx, execution_id, after_seq)

    @_read
    def load_last_events(self, tx: _Tx, execution_id: AnyId, limit: int = 100) -> list[StoredEvent]:
        """The last `limit` events, by sequence."""
        rest = "ORDER BY sequence DESC LIMIT ?"
        key = _id(execution_id, "execution_id")
        events = self._find(tx, _STORED, rest, _limit(limit), index=_LOG_KEY, execution_id=key)
        return events[::-1]

    @_read
    def find_event(self, tx: _Tx, execution_id: AnyId, event_id: AnyId) -> StoredEvent | None:
        """The event of that `event_id`, or None."""
        keys = _id(execution_id, "execution_id"), _id(event_id, "event_id")
        row = self._row(tx, _LOG_FIND, *keys)
        return _STORED.maybe(row)

    @_read
    def get_latest_sequence(self, tx: _Tx, execution_id: AnyId) -> int | None:
        """The last event's sequence, None when there are no events."""
        return self._last_sequence(tx, execution_id)

    @_read
    def list_executions(
        self, tx: _Tx, tenant_id: AnyId = DEFAULT_TENANT, limit: int = 100, offset: int = 0
    ) -> list[str]:
        """The ids of the tenant's known executions, newest first."""
        page = _limit(limit), _count(offset, "offset")
        sql = tx.dialect.resolve(_EXECUTIONS_OF)
        return [row[0] for row in tx.rows(sql, _id(tenant_id, "tenant_id"), *page)]

    @_read
    def execution_exists(self, tx: _Tx, execution_id: AnyId) -> bool:
        """True when the execution is known, with or without events."""
        return tx.row(_EXECUTION_TENANT.all, _id(execution_id, "execution_id")) is not None

    @_read
    def count_events(self, tx: _Tx, execution_id: AnyId) -> int:
        """How many events the execution has; sequences have no gaps, so the last one says."""
        return self._last_sequence(tx, execution_id) or 0

    def iter_events(
        self, execution_id: AnyId, after_seq: int = 0, *, chunk: int = 1000
    ) -> Iterator[StoredEvent]:
        """Generate the events after `after_seq`, `chunk` of them read at a time: memory stays flat.

        No transaction is open between two chunks: writes go on, and the events that they append
        are reached too. Raises InvalidData."""
        execution = _id(execution_id, "execution_id")
        most = _int(chunk, "chunk", 1)
        start = _LogCursor(0, _int(after_seq, "after_seq"))
        return self._generate(
            start, lambda cursor: self._read_chunk(execution, cursor.sequence, most)
        )

    def _generate(
        self, cursor: _LogCursor, behind: Callable[[_LogCursor], list[StoredEvent]]
    ) -> Iterator[StoredEvent]:
        """The events behind a cursor, then those behind the last of them, and so on."""
        while events := behind(cursor):
            yield from events
            cursor = _LogCursor(events[-1].position, events[-1].sequence, cursor.omit)

    @_read
    def read_all(
        self, tx: _Tx, after_position: int = 0, limit: int = 1000, *, tenant_id: AnyId | None = None
    ) -> list[StoredEvent]:
        """The whole log, or a tenant's part of it, by position.

        This is for projections, which remember how far they have read: an event that commits later
        never has a lower position than one that was returned."""
        after = _int(after_position, "after_position")
        tenant = _none_or(_id, tenant_id, "tenant_id")
        return self._log_from(tx, tenant, after, _limit(limit))

    def _log_from(
        self, tx: _Tx, tenant_id: str | None, position: int, limit: int
    ) -> list[StoredEvent]:
        """The events behind a position, of one tenant or of all."""
        if tenant_id is None and tx.dialect is _SQLITE:
            # No index can be named for positions. Where ANALYZE saw an event or two, SQLite would
            # read the log from its beginning. The part of each tenant has an index.
            (plan,) = tx.rows(f"EXPLAIN QUERY PLAN {_LOG_FROM.all}", position, limit)
            if plan[-1].startswith("SCAN"):
                events = []
                for (tenant,) in tx.rows("SELECT id FROM flowstore_tenants"):
                    events += self._log_from(tx, tenant, position, limit)
                return sorted(events, key=operator.attrgetter("position"))[:limit]
        rows = _Facet(self._engine, tenant_id)._rows(tx, _LOG_FROM, position, limit)
        return _STORED.decode_all(rows)

    def tail(
        self,
        after_position: int | None = None,
        *,
        timeout: float | None = None,
        tenant_id: AnyId | None = None,
        execution_id: AnyId | None = None,
    ) -> Iterator[StoredEvent]:
        """Generate the events behind a position as they come, from any process.

        Each comes once, in order. None starts behind the last event there is now. Ends after
        `timeout` seconds without an event (None: never). Raises InvalidData, and StorageError
        inside one's own transaction."""
        self._engine.forbid_inside("tail()")
        tenant = _none_or(_id, tenant_id, "tenant_id")
        execution = _none_or(_id, execution_id, "execution_id")
        idle = math.inf if timeout is None else _seconds(timeout, "timeout")

        def behind(cursor: _LogCursor) -> Any:
            self._engine.forbid_inside("tail()")  # a transaction begun since has uncommitted events
            look = functools.partial(self._next_events, cursor, tenant, execution)
            return self._poll(look, idle, due=_LAST_TIME)

        start = self._tail_start(_none_or(_int, after_position, "after_position"), execution)
        return self._generate(start, behind)

    @_snapshot
    def _tail_start(self, tx: _Tx, after: int | None, execution_id: str | None) -> _LogCursor:
        """Where a tail begins: behind a position, or behind the last event."""
        omit = frozenset[int]()
        if after is None:
            after = int(self._rows(tx, _LOG_END)[0][0] or 0)
            if self._engine.max_writers > 1:
                # Readers by position leave these out as long as one not committed may precede them.
                sql = "SELECT position FROM flowstore_log WHERE position > ?"
                omit = frozenset(row[0] for row in tx.rows(sql, after))
        last = self._rows(tx, _LOG_LAST_BEFORE, execution_id or "", after)[0][0]
        return _LogCursor(after, last or 0, omit)

    @_read
    def _next_events(
        self, tx: _Tx, cursor: _LogCursor, tenant_id: str | None, execution_id: str | None
    ) -> list[StoredEvent]:
        """The next events behind a cursor: of one execution by sequence, else by position."""
        position, sequence, omit = cursor
        at = "SELECT 1 FROM flowstore_log WHERE execution_id = ? AND sequence = ? AND position <= ?"
        if execution_id is not None and not tx.row(at, execution_id, sequence, position):
            sequence = 0  # the log was pruned, and perhaps a new one was begun
        view = EventStore(self._engine, tenant_id)
        while True:
            if execution_id is None:
                events = self._log_from(tx, tenant_id, position, 1000)
            else:
                events = view._events_after(tx, execution_id, sequence, 1000)
            news = [
                one for one in events if one.position > cursor.position and one.position not in omit
            ]
            if news or len(events) < 1000:
                return news
            position = events[-1].position
            sequence = events[-1].sequence


# ==================================================================================================
# StateBackend: executions, the work queue, keepsakes, tenants
# ==================================================================================================


def _without_none(**options: Any) -> dict[str, Any]:
    """The options that have a value."""
    return {name: value for name, value in options.items() if value is not None}


class _StateFacet(_LogFacet):
    """The parts of the state backend share this: which tenant a row is of, what a view may do."""

    @property
    def _write_tenant(self) -> str:
        """The tenant of new definitions, effects, artifacts and tokens."""
        return self._tenant or DEFAULT_TENANT

    def _check_tenant(self, tx: _Tx, writes: bool) -> None:
        """Refuse an operation that the tenant of this view may not do."""
        tenant = str(self._tenant)
        (status,) = _or_not_found(tx.row(_TENANT_STATUS, tenant), "tenant", tenant)
        if writes and status != TenantStatus.ACTIVE:
            raise TenantInactive(tenant)

    def _tenant_of(self, tx: _Tx, execution_id: str) -> str:
        """The tenant of a known execution; NotFound for others."""
        row = self._row(tx, _EXECUTION_TENANT, execution_id)
        return str(_or_not_found(row, "execution", execution_id)[0])


_CURRENT_STATE = _Sql("SELECT current_state FROM flowstore_runs WHERE execution_id = ? {tenant}")
_DEFINITION_DROP = _Sql(
    "DELETE FROM flowstore_definitions WHERE workflow_id = ? AND version = ? {tenant}"
).one
# The counts for a tenant's limits; a tenant without a limit is not counted.
_DEFINITION_COUNT = _Sql("""SELECT COUNT(*) FROM flowstore_definitions
    {by sqlite_autoindex_flowstore_definitions_1} WHERE true {tenant}""")
_OPEN_RUN_COUNT = _Sql("""SELECT COUNT(*) FROM flowstore_runs {by flowstore_runs_by_tenant_status}
    WHERE status IN ('pending', 'running', 'paused') {tenant}""")


class _Executions(_StateFacet):
    """Executions: their records, their part of the log, and the definitions that they run."""

    @_write
    def create_execution(self, tx: _Tx, execution: WorkflowExecution) -> WorkflowExecution:
        """Store the record of a new execution and return it; the log may know it already.

        Raises AlreadyExists for an id that has a record or is another tenant's, NotFound for an
        unregistered tenant, LimitExceeded beyond the tenant's `max_concurrent_executions`."""
        stored = _insert_record(tx, _RUN, execution, **_without_none(tenant_id=self._tenant))
        id = stored.execution_id
        tenant = stored.tenant_id
        tx.run(_EXECUTION_INSERT, id, tenant, tx.now())
        if tx.row(_EXECUTION_TENANT.all, id) != (tenant,):
            raise AlreadyExists("execution", id)
        opens = not stored.status.is_terminal
        self._enforce_limit(tx, tenant, "max_concurrent_executions", _OPEN_RUN_COUNT, opens)
        return stored

    @_read
    def get_execution(self, tx: _Tx, id: AnyId) -> WorkflowExecution | None:
        """The record of an execution, or None."""
        return self._get(tx, _RUN, execution_id=_id(id, "id"))

    @_read
    def list_executions(
        self,
        tx: _Tx,
        status: ExecutionStatus | str | None = None,
        limit: int = 100,
        offset: int = 0,
    ) -> list[WorkflowExecution]:
        """Executions with a record, newest `updated_at` first."""
        index = "flowstore_runs_by_time|flowstore_runs_by_tenant"
        if status is not None:
            index = "flowstore_runs_by_status|flowstore_runs_by_tenant_status"
        order = "updated_at DESC, execution_id DESC"
        return self._page(tx, _RUN, index, order, limit, offset, **_without_none(status=status))

    @_write
    def update_execution_status(self, tx: _Tx, id: AnyId, status: ExecutionStatus | str) -> None:
        """Set the status, `updated_at` and, at the first end, `completed_at`. Raises NotFound.

        No transition is checked."""
        new = _enum_member(ExecutionStatus, status, "status")
        now = tx.now()
        changes = "status = ?, updated_at = ?, completed_at = COALESCE(completed_at, ?)"
        self._change(tx, _RUN, changes, id, new.value, now, now if new.is_terminal else None)

    @_write
    def update_execution_current_state(self, tx: _Tx, id: AnyId, state: Json) -> None:
        """Replace the whole state, without a merge; sets `updated_at`. Raises NotFound."""
        text = _json(state, "state")
        self._change(tx, _RUN, "current_state = ?, updated_at = ?", id, text, tx.now())

    @_write
    def patch_append_array(self, tx: _Tx, id: AnyId, key: str, value: Json) -> None:
        """Append to an array in the state, a new one if the key is missing, in one atomic step.

        No append is lost, however many callers race. Raises NotFound, and InvalidData where the
        state is no object or the key has no array."""
        execution = _id(id, "id")
        member = _text(key, "key")
        _json(value, "value")
        row = self._row(tx, _CURRENT_STATE, execution)
        state = _decode_json(_or_not_found(row, "execution", execution)[0])
        array = state.setdefault(member, []) if isinstance(state, dict) else None
        if not isinstance(array, list):
            raise InvalidData(f"current_state.{member}: an array in an object is needed")
        array.append(value)
        text = _json(state, "current_state")
        self._change(tx, _RUN, "current_state = ?, updated_at = ?", execution, text, tx.now())

    @_write
    def append_event(
        self,
        tx: _Tx,
        execution_id: AnyId,
        event: Mapping[str, Json],
        *,
        expected_sequence: int | None = None,
        event_id: AnyId | None = None,
    ) -> int:
        """`EventStore.append` under the execution's tenant. Raises NotFound, SequenceConflict."""
        execution = _id(execution_id, "execution_id")
        text = _event_text(event, "event")
        tenant, _, last = self._row(tx, _LOG_HEAD, execution) or ("", None, 0)
        if not tenant:  # as after a prune that has left some of the log
            raise NotFound("execution", execution)
        return self._append_to(tx, execution, tenant, last or 0, text, expected_sequence, event_id)

    @_read
    def get_events(self, tx: _Tx, execution_id: AnyId) -> list[StoredEvent]:
        """All events of an execution, by sequence."""
        return self._events_after(tx, execution_id, 0)

    @_read
    def get_events_since(
        self, tx: _Tx, execution_id: AnyId, since_sequence: int
    ) -> list[StoredEvent]:
        """The events with a sequence above `since_sequence`."""
        return self._events_after(tx, execution_id, _int(since_sequence, "since_sequence"))

    @_read
    def latest_sequence(self, tx: _Tx, execution_id: AnyId) -> int:
        """The last event's sequence, 0 when there are no events."""
        return self._last_sequence(tx, execution_id) or 0

    @_write
    def store_workflow(self, tx: _Tx, definition: WorkflowDefinition) -> WorkflowDefinition:
        """Store a definition, or replace it. Raises NotFound (tenant), LimitExceeded."""
        values = _DEFINITION.encode(definition, now=tx.now())
        values |= _without_none(tenant_id=self._tenant)
        tenant = values["tenant_id"]
        replaced = tx.run(_DEFINITION_DROP, values["workflow_id"], values["version"], tenant)
        stored = _insert_values(tx, _DEFINITION, values)
        self._enforce_limit(tx, tenant, "max_workflows", _DEFINITION_COUNT, not replaced)
        return stored

    @_read
    def get_workflow(self, tx: _Tx, workflow_id: AnyId, version: str) -> WorkflowDefinition | None:
        """The definition, or None."""
        return self._get(
            tx, _DEFINITION, workflow_id=workflow_id, version=version, tenant_id=self._write_tenant
        )

    def _enforce_limit(self, tx: _Tx, tenant: str, limit: str, count: _Sql, added: bool) -> None:
        """After a write: NotFound for an unregistered tenant, LimitExceeded for a row too many."""
        most = getattr(self._need(tx, _TENANT, id=tenant).limits, limit)
        view = _Facet(self._engine, tenant)
        if added and most is not None and view._rows(tx, count)[0][0] > most:
            raise LimitExceeded(tenant)

    @_snapshot
    def timeline(self, tx: _Tx, execution_id: AnyId) -> View:
        """The execution's events and items on a time axis. Raises NotFound.

        The view is text as `str()`, and HTML in a notebook."""
        execution = _id(execution_id, "execution_id")
        view = _ViewReader(self, tx).detail(_EXECUTIONS, execution)
        return _or_not_found(view, "execution", execution)


# The indexes of items, by their status: for all tenants, and for one.
_STATUS_INDEX = {
    "pending": "flowstore_pending|flowstore_pending_by_tenant",
    "claimed": "flowstore_leased",
    "dead_lettered": "flowstore_settled|flowstore_dead_by_tenant",
}
# These change one item by its id, on conditions. None as a parameter: no condition, no change. On a
# server, the statements that make an item available begin so: its waiting workers are told.
_MAKE_AVAILABLE = "available_at = ?"
_RENEW = _update(
    _ITEM,
    "lease_expires_at = ?",
    """AND {status} = 'claimed' AND lease_fence = COALESCE(?, lease_fence)
    AND worker_id = COALESCE(?, worker_id)""",
)
_UNDER_FENCE = "AND status <> 'dead_lettered' AND lease_fence = COALESCE(?, lease_fence)"
_HELD = f"{_UNDER_FENCE} AND status = COALESCE(?, status)"
_SETTLED = "lease_expires_at = NULL, settled_at = COALESCE(settled_at, ?)"
_COMPLETE = _update(_ITEM, f"status = 'completed', {_SETTLED}", _HELD)
_FAIL = _update(
    _ITEM,
    f"status = 'failed', {_SETTLED}, last_error = COALESCE(?, last_error)",
    _HELD,
)
_SET_PENDING = "status = 'pending', settled_at = NULL, worker_id = NULL, lease_expires_at = NULL"
_RETRY = _update(
    _ITEM,
    f"{_MAKE_AVAILABLE}, attempt = ?, last_error = COALESCE(?, last_error), {_SET_PENDING}",
    "AND status = ?",
)
_PARK = _update(
    _ITEM,
    f"{_MAKE_AVAILABLE}, {_SET_PENDING}",
    f"{_UNDER_FENCE} AND {{status}} = 'claimed'",
)
_REPLACE = _update(
    _ITEM,
    f"{_MAKE_AVAILABLE}, payload = ?, priority = ?",
    # The item of a run stays as it is.
    """AND {status} = 'pending' AND NOT EXISTS (SELECT 1 FROM flowstore_runs r
    WHERE r.execution_id = id AND id = flowstore_work_items.execution_id
    AND r.workflow_id = node_id)""",
)
_GIVE_UP = _update(
    _DEAD,
    """status = 'dead_lettered', settled_at = ?, attempt = COALESCE(?, attempt),
    last_error = COALESCE(?, last_error), worker_id = NULL, lease_expires_at = NULL""",
    f"{_HELD} AND status <> 'completed'",
)
_KEY_HOLDER = """SELECT id FROM flowstore_work_items {by flowstore_unique_keys}
    WHERE tenant_id = ? AND queue_type = ? AND {unique_key} = {given_key}
    AND settled_at IS NULL"""
_DEAD_LETTERS = "AND {status} = 'dead_lettered' AND settled_at IS NOT NULL"
_NEXT_QUEUE = {
    status: _Sql(f"""SELECT queue_type FROM flowstore_work_items {{by {_STATUS_INDEX[status]}}}
        WHERE {{{column}}} = '{status}' AND {{queue_type}} > ? {{tenant}}
        ORDER BY {{queue_type}} LIMIT 1""")
    for status, column in {"pending": "status", "claimed": "any_status"}.items()
}
# The record of a run, whose item has its id and its function's name.
_FOLLOW_ITEM = _Sql("""UPDATE flowstore_runs SET status = ?, updated_at = ?, completed_at = ?
    WHERE execution_id = ? AND workflow_id = ? {tenant}""")
_END_WAITS = f"""UPDATE event_subscriptions {{by event_subscriptions_by_workflow}}
    SET terminated_at = ? WHERE workflow_id = ? AND terminated_at IS NULL AND {_IS_RUN_WAIT}"""
_RECLAIMED_PER_CLAIM = 16
_LEASE_EXPIRED = "the lease expired"

# The statements on the head of a queue. Expired leases are those of all tenants, since a policy
# counts the leases of all.
_PENDING = f"""FROM flowstore_work_items {{by {_STATUS_INDEX["pending"]}}}
    WHERE {{status}} = 'pending' AND {{queue_type}} ="""
_IN_QUEUE = f"{_PENDING} ?"
_TOP_LEVEL = "{tenant} ORDER BY priority DESC LIMIT 1"
_NEXT_LEVEL = _Sql(f"SELECT priority {_IN_QUEUE} AND priority < ? {_TOP_LEVEL}")
_ABOVE_ALL = 101  # a priority above all that there are
_EXPIRED = """FROM flowstore_work_items {by flowstore_leased}
    WHERE {any_status} = 'claimed' AND {queue_type} = ? AND lease_expires_at <= ?"""
_EXPIRED_LEASES = f"""SELECT {_ITEM.columns} {_EXPIRED}
    ORDER BY lease_expires_at, id LIMIT ? {{skip_locked}}"""
_LEASE_COUNT = """SELECT COUNT(*) FROM (SELECT 1 FROM flowstore_work_items {by flowstore_leased}
    WHERE {any_status} = 'claimed' AND {queue_type} = ? LIMIT ?) leased"""


def _items_as(**changed: str) -> str:
    """The columns of items for a SELECT, some in place of what is stored."""
    return ", ".join(changed.get(name, name) for name in _ITEM.encoders)


# A SELECT of items as a claim will leave them, and the claim; the same for an end. On a server, an
# UPDATE returns the items. For RETURNING, SQLite copies each page that a statement changes: there,
# a SELECT before it takes less time.
_CLAIMED = _items_as(
    lease_expires_at="?",
    worker_id="?",
    lease_fence="lease_fence + 1",
    status="'claimed'",
    claimed_at="?",
)
_CLAIM = (
    f"SELECT {_CLAIMED} FROM flowstore_work_items WHERE {{status}} = 'pending' {{tenant}}",
    """UPDATE flowstore_work_items SET lease_expires_at = ?, worker_id = ?,
    lease_fence = lease_fence + 1, status = 'claimed', claimed_at = ?
    WHERE {status} = 'pending' {tenant}""",
)
_CLAIM_ONE = _Sql(f"{_CLAIM[1]} AND id = ?")
_COMPLETED = _items_as(lease_expires_at="NULL", status="'completed'", settled_at="?")
_COMPLETE_MANY = (
    f"""SELECT {_COMPLETED} FROM flowstore_work_items WHERE {{status}} = 'claimed' {{tenant}}""",
    """UPDATE flowstore_work_items SET lease_expires_at = NULL, status = 'completed',
    settled_at = ? WHERE {status} = 'claimed' {tenant}""",
)
_POLICY_WRITE = _POLICY.upsert("queue_type")
_POLICY_SPEND = "UPDATE flowstore_queues SET full_at = ? WHERE queue_type = ?"
_BATCH = 500  # ids in one statement


@functools.cache
def _of_functions(functions: int) -> str:
    """A condition: the item is that of a run of one of so many functions. Of 0: none."""
    return (
        f"""AND id = execution_id AND node_id IN ({", ".join("?" * functions)})
        AND EXISTS (SELECT 1 FROM flowstore_runs r
        WHERE r.execution_id = id AND r.workflow_id = node_id)"""
        if functions
        else ""
    )


@functools.cache
def _available_sql(functions: int, skip_locked: str) -> _Sql:
    """The items of a queue and a priority that are due."""
    return _Sql(f"""SELECT -priority, available_at, id {_IN_QUEUE}
        AND priority = ? AND available_at <= ? {_of_functions(functions)} {{tenant}}
        ORDER BY available_at, id LIMIT ? {skip_locked}""")


@functools.cache
def _claim_sql(queues: int, functions: int, looks: bool = False) -> _Sql:
    """Claim the head of so many queues, if the top levels tell it and nothing has to be done first.

    That is: no lease has expired, no queue has a policy, and the items of the highest priority of
    a queue are not all delayed, or of other functions. With `looks`, only read the item as it will
    be claimed."""
    one = queues == 1
    queue = "?" if one else "q.column1"
    wanted = f"FROM (VALUES {', '.join(['(?)'] * queues)}) q"
    top = f"(SELECT priority {_PENDING} {queue} {_TOP_LEVEL})"
    at_top = f"""{_PENDING} {queue} AND priority = {top} AND available_at <= ?
        {_of_functions(functions)} {{tenant}}"""
    head = f"SELECT id {at_top} ORDER BY available_at, id LIMIT 1"
    obstacle = f"""EXISTS (SELECT 1 FROM flowstore_queues WHERE queue_type = {queue})
        OR EXISTS (SELECT 1 {_EXPIRED.replace("?", queue, 1)})"""
    if one:
        head += " {skip_locked}"
    else:
        best = "ORDER BY i.priority DESC, i.available_at, i.id LIMIT 1"
        if looks:
            head = f"""SELECT i.id {wanted} {{join}} flowstore_work_items i
                {{by sqlite_autoindex_flowstore_work_items_1}} ON i.id = ({head}) {best}"""
        else:
            # Other transactions may have locked some. None of a lower priority is taken instead.
            heads = f"""SELECT h.id {wanted} CROSS JOIN LATERAL (
                SELECT id, priority {at_top} ORDER BY available_at, id LIMIT 16) h
                WHERE NOT EXISTS (SELECT 1 {wanted} WHERE {top} > h.priority)"""
            head = f"""SELECT i.id FROM flowstore_work_items i
                WHERE i.id IN ({heads}) AND i.status = 'pending' {best} {{skip_locked}}"""
        delayed = f"{top} IS NOT NULL AND NOT EXISTS (SELECT 1 {at_top})"
        obstacle = f"EXISTS (SELECT 1 {wanted} WHERE {obstacle} OR ({delayed}))"
    claimable = f"AND id = ({head}) AND NOT ({obstacle})"
    look, change = _CLAIM
    return _Sql(
        f"{look} {claimable}" if looks else f"{change} {claimable} RETURNING {_ITEM.columns}"
    )


_ID_AND_FENCE = operator.attrgetter("id", "lease_fence")


def _id_and_fence(item: object, fence: object = None) -> tuple[str, int | None]:
    """The id of an item given as such or by its id, and the fence to check: by default its own."""
    kind = type(item)
    if kind is WorkItem or issubclass(kind, (WorkItem, DeadLetter)):
        item, own_fence = _read_foreign(_ID_AND_FENCE, item, "item_id", WorkItem)
        if fence is None and (kind is WorkItem or issubclass(kind, WorkItem)):
            fence = own_fence
    if fence is not None:
        fence = _int(fence, "lease_fence")
    return _id(item, "item_id"), fence


_SNAPSHOT_WRITE = _SNAPSHOT.upsert("execution_id, at_sequence")
_EFFECT_INSERT = """INSERT INTO flowstore_effects (tenant_id, key, result, execution_id)
    VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING"""


class _Items(_StateFacet):
    """How an item changes: its attempts are counted, an expired lease is taken back."""

    @staticmethod
    def _key_holder(tx: _Tx, item: Mapping[str, Any]) -> tuple[Any, ...] | None:
        """The id of the item that has this item's unique key, None without one."""
        if not item["unique_key"]:
            return None
        values = item["tenant_id"], item["queue_type"], item["unique_key"]
        return tx.row(tx.dialect.resolve(_KEY_HOLDER), *values)

    def _refuse_second_key(self, tx: _Tx, item: WorkItem | DeadLetter) -> None:
        holder = self._key_holder(tx, vars(item))
        if holder is not None:
            raise AlreadyExists("work item", holder[0])

    def _reclaim(
        self, tx: _Tx, queue: str, now: int, most: int, tenant: str | None = None
    ) -> list[WorkItem | DeadLetter]:
        """Take back expired leases of a queue, the oldest first: of all tenants, or of one."""
        expired = _ITEM.decode_all(tx.rows(tx.dialect.resolve(_EXPIRED_LEASES), queue, now, most))
        taken_back: list[WorkItem | DeadLetter] = []
        for item in expired:
            if tenant in (None, item.tenant_id):
                tx.warn("work item %s: the lease of %s expired", item.id, item.worker_id)
                # The error of an earlier attempt says more.
                error = None if item.last_error else _LEASE_EXPIRED
                taken_back.append(self._count_attempt(tx, item, now, error))
        return taken_back

    def _backoff(self, attempt: int) -> float:
        """Seconds until the next attempt; the default stands in for a function that fails."""
        backoff = self._engine.options.backoff
        with contextlib.suppress(Exception):
            if backoff is not None:
                return _seconds(backoff(attempt), "backoff")
        return float(2 ** min(attempt, 6))

    def _count_attempt(
        self, tx: _Tx, item: WorkItem, now: int, error: str | None, delay: float | None = None
    ) -> WorkItem | DeadLetter:
        """Count an attempt: pending again after the delay, or a dead letter after the last one."""
        whole = _Items(self._engine)  # an expired lease may be another tenant's
        attempt = min(item.attempt + 1, 2**31 - 1)
        if attempt >= item.max_attempts:
            given_up = now, attempt, error, item.id, None, None
            letter = whole._change_item(tx, _DEAD, _GIVE_UP, item.id, *given_up)
            return self._follow_item(tx, letter)
        seconds = self._backoff(attempt) if delay is None else delay
        due = now + round(min(seconds * 1e6, _LAST_TIME - now))
        values = due, attempt, error, item.id, item.status
        return self._follow_item(tx, whole._change_item(tx, _ITEM, _RETRY, item.id, *values))

    def _follow_item(self, tx: _Tx, item: T) -> T:
        """Let the record of a run stand as its item does: a dead letter is a run that failed."""
        changed: Any = item
        if isinstance(item, DeadLetter):
            tx.warn("work item %s is a dead letter: %.200r", changed.id, changed.last_error)
        if changed.id != changed.execution_id:
            return item
        whole = _LogFacet(self._engine)  # a reclaim is of all tenants
        now = tx.now()
        ended = (ExecutionStatus.FAILED, now, now) if isinstance(item, DeadLetter) else None
        values = ended or (ExecutionStatus.PENDING, now, None)
        if whole._run(tx, _FOLLOW_ITEM, *values, changed.id, changed.node_id) and ended:
            event = {"type": "execution_failed", "error": changed.last_error or ""}
            text = _event_text(event, "event")
            whole._append_last(tx, changed.id, changed.tenant_id, text)
            tx.run(tx.dialect.resolve(_END_WAITS), now, changed.id)
        return item

    def _change_items(
        self,
        tx: _Tx,
        texts: tuple[str, str],
        values: Sequence[Any],
        ids: Sequence[str],
        lock: str = "{for_update}",
    ) -> dict[str, WorkItem]:
        """Run an UPDATE with a condition for these ids; the items that it changed, by their ids.

        On a server it takes the lock first: it may leave out items that others have locked."""
        changed = {}
        look, change = texts
        for start in range(0, len(ids), _BATCH):
            some = ids[start : start + _BATCH]
            which = f"AND id IN ({', '.join('?' * len(some))})"
            if self._engine.max_writers > 1:
                locked = f"SELECT id FROM flowstore_work_items WHERE true {which} {lock}"
                sql = f"{change} AND id IN ({locked}) RETURNING {_ITEM.columns}"
                rows = self._rows(tx, _statement(sql), *values, *some)
            else:
                rows = self._rows(tx, _statement(f"{look} {which}"), *values, *some)
                self._run(tx, _statement(f"{change} {which}"), *values, *some)
            for item in _ITEM.decode_all(rows):
                changed[item.id] = item
        return changed

    def _change_item(
        self, tx: _Tx, mapper: _Mapper[T], sql: _Sql, item_id: str, *values: object
    ) -> T:
        """Run an UPDATE with a condition, and return the item; refuse where it does not hold."""
        if self._engine.max_writers > 1:
            sql = _statement(f"{sql.text} RETURNING {mapper.columns}")
            rows = self._rows(tx, sql, *values)
        else:
            look = _select(mapper, "", "id")
            rows = self._rows(tx, look, item_id) if self._run(tx, sql, *values) else []
        if not rows:
            self._refuse(tx, item_id)
        return mapper.decode(rows[0])

    def _refuse(self, tx: _Tx, item_id: str) -> None:
        """Raise NotFound (no such item) or LeaseLost."""
        self._need(tx, _ITEM, id=item_id)
        raise LeaseLost(item_id)


class _QueueLimit(NamedTuple):
    """What the policy of a queue allows now."""

    room: int  # how many items may be claimed
    has_rate: bool = False
    # When the bucket is full: the number of claims since the epoch, at the queue's rate. Counted
    # so, it is not rounded again with each claim.
    full_at: float = 0.0
    has_jumped: bool = False  # the clock was put back


_NO_LIMIT = _QueueLimit(_INT_MAX)


class _Claims(_Items):
    """How items are handed out: claims, and the policies that they keep to."""

    @_steps
    def claim_work_item(
        self,
        worker_id: AnyId,
        queue_types: Collection[AnyId],
        *,
        lease_seconds: float | None = None,
        wait: float = 0.0,
    ) -> _Steps[WorkItem | None]:
        """Lease the next item of these queues; None without one.

        That is the available item of the highest priority, and among those the one that has been
        available longest. No other worker gets it. It carries a new `lease_fence`, greater than any
        before. While a lease of these queues has expired, some of those are taken back first. The
        queues' policies hold. Waits up to `wait` seconds for an item, inside a transaction not at
        all. (The wait for the store itself is bounded by `busy_timeout`.) Raises InvalidData."""
        items = yield from self._claim_or_wait(worker_id, queue_types, 1, lease_seconds, wait)
        return items[0] if items else None

    @_steps
    def claim_work_items(
        self,
        worker_id: AnyId,
        queue_types: Collection[AnyId],
        limit: int,
        *,
        lease_seconds: float | None = None,
        wait: float = 0.0,
    ) -> _Steps[list[WorkItem]]:
        """Lease up to `limit` items in one transaction.

        They are those that as many calls of `claim_work_item` would lease, in that order. Waits
        only while there is none."""
        most = _count(limit, "limit")
        return (yield from self._claim_or_wait(worker_id, queue_types, most, lease_seconds, wait))

    def _claim_or_wait(
        self,
        worker_id: AnyId,
        queue_types: Collection[AnyId],
        limit: int,
        lease_seconds: float | None,
        wait: float,
    ) -> _Steps[list[WorkItem]]:
        worker = _id(worker_id, "worker_id")
        names = queue_types
        if type(names) is not list:
            _check_type((list, tuple, set, frozenset), names, "queue_types", "a list of queues")
            names = _read_foreign(list, names, "queue_types")
        queues = list({_id(name, f"queue_types[{index}]"): 0 for index, name in enumerate(names)})
        lease = self._lease(lease_seconds)
        seconds = _seconds(wait, "wait")
        items: list[WorkItem] = yield self._claim(worker, queues, lease, limit)
        if items or not (seconds and limit and queues):
            return items
        # An idle waiter looks with reads: it leaves the writer to others. In a block it does not
        # wait: the block would not see what others commit.
        look = functools.partial(self._look_for_work, object(), queues)
        deadline = _monotonic() + seconds
        while not items and deadline > _monotonic() and self._engine.block() is None:
            commits = self._engine.commits
            if (yield self._poll(look, deadline - _monotonic())):
                items = yield self._claim(worker, queues, lease, limit)
                if not items:  # what there is, another transaction has locked, or has claimed now
                    yield self._engine.wait(commits, max(0.0, deadline - _monotonic()))
        return items

    @_write_statement
    def _claim(
        self,
        tx: _Tx,
        worker_id: str,
        queues: list[str],
        lease: float,
        limit: int,
        functions: Collection[str] = (),
    ) -> list[WorkItem]:
        """Claim items; if `functions` are given, those of their runs."""
        now = tx.now()
        values = _time_after(now, lease, "lease_seconds"), worker_id, now
        if limit == 1 and queues:
            due = now, *functions
            looks = self._engine.max_writers == 1
            if len(queues) == 1:
                places = *queues, *queues, *due, *queues, *queues, now
            else:
                places = *queues, *due, *queues, now, *due
                if not looks:
                    places = *queues, *due, *queues, *queues, now, *due
            sql = _claim_sql(len(queues), len(functions), looks)
            rows = self._rows(tx, sql, *values, *places)
            if rows:
                item = _ITEM.decode(rows[0])
                if looks:
                    self._run(tx, _CLAIM_ONE, *values, item.id)
                return [item]
        limits = self._limits(tx, queues)
        for queue in queues:
            self._reclaim(tx, queue, now, _RECLAIMED_PER_CLAIM * limit)
        if limits:  # other claims of these queues wait until this one ends
            limits = self._limits(tx, queues, "{for_update}")
        # All heads of one queue are claimed, so they are locked as they are read. Of those of
        # several queues the best are claimed: the others have to stay free for other claims.
        locks = "{skip_locked}" if len(queues) == 1 else ""
        claimed: list[WorkItem] = []
        counts = Counter[str]()  # of those, by queue
        held: set[str] = set()  # heads that other transactions have locked
        while len(claimed) < limit:
            now = tx.now()  # again: the lock of a policy may have been waited for
            heads: list[tuple[Any, ...]] = []
            for queue in queues:
                room = limits.get(queue, _NO_LIMIT).room - counts[queue]
                most = max(0, min(limit - len(claimed), room))
                found = self._heads(tx, queue, now, most + len(held), functions, locks)
                heads += [head for head in found if head[-1] not in held][:most]
            ids = [id for _, _, id in sorted(heads)[: limit - len(claimed)]]
            if ids:
                now = tx.now()
                values = _time_after(now, lease, "lease_seconds"), worker_id, now
                leased = self._change_items(tx, _CLAIM, values, ids, "{skip_locked}")
                claimed += [leased[id] for id in ids if id in leased]
                counts = Counter(item.queue_type for item in claimed)
                held |= {*ids} - {*leased}
            elif claimed or locks == "{for_update}" or self._engine.max_writers == 1:
                break
            else:
                # Another transaction is claiming the items. That may be undone: wait for its end.
                locks = "{for_update}"
                held.clear()
        for queue, allowed in limits.items():
            # On a server always: a block that counted the leases before this one has to fail.
            spends = counts[queue] and (allowed.has_rate or self._engine.max_writers > 1)
            if spends or allowed.has_jumped:
                tx.run(_POLICY_SPEND, allowed.full_at + counts[queue], queue)
        return claimed

    def _heads(
        self,
        tx: _Tx,
        queue: str,
        now: int,
        limit: int,
        functions: Collection[str],
        locks: str = "",
    ) -> list[tuple[Any, ...]]:
        """The first items of a queue: priority (negative), time and id. A seek for each level."""
        available = _available_sql(len(functions), locks)
        heads: list[tuple[Any, ...]] = []
        level = _ABOVE_ALL
        while len(heads) < limit:
            row = self._row(tx, _NEXT_LEVEL, queue, level)
            if row is None:
                break
            level = row[0]
            left = limit - len(heads)
            heads += self._rows(tx, available, queue, level, now, *functions, left)
        return heads

    def _look_for_work(
        self, waiter: object, queues: list[str], functions: Collection[str] = ()
    ) -> Any:
        """`_claimable`, unless another waiter has just looked: then that one claims."""
        what = self._tenant, tuple(queues), tuple(functions)
        is_shared = self._engine.max_writers == 1  # on a server, waiters claim side by side
        if is_shared and self._engine.listeners.is_looked_for(what, waiter):
            return False
        return self._claimable(queues, functions)

    @_snapshot
    def _claimable(self, tx: _Tx, queues: list[str], functions: Collection[str] = ()) -> bool:
        """Whether a claim would find an item or an expired lease."""
        now = tx.now()
        limits = self._limits(tx, queues)
        for queue in queues:
            if tx.row(tx.dialect.resolve(f"SELECT 1 {_EXPIRED} LIMIT 1"), queue, now):
                return True
            limit = limits.get(queue, _NO_LIMIT)
            if limit.has_jumped or self._heads(tx, queue, now, min(1, limit.room), functions):
                return True
        return False

    # --- policies ---
    @_write
    def set_queue_policy(self, tx: _Tx, policy: QueuePolicy) -> QueuePolicy:
        """Store the policy of a queue over all tenants, in place of the one that it had.

        Claims of the queue keep to it. `paused`: none; `max_running`: at most so many leases at
        once; `rate`: a bucket of so many claims, now full, which refills evenly over `per_seconds`.
        Raises InvalidData, in a view TenantMismatch."""
        values = _POLICY.encode(policy)
        if self._tenant is not None:
            raise TenantMismatch(values["queue_type"], self._tenant)
        tx.run(_POLICY_WRITE, *values.values(), -1e300)
        return _POLICY.decode(values.values())

    @_read
    def get_queue_policy(self, tx: _Tx, queue_type: AnyId) -> QueuePolicy | None:
        """The policy of a queue, or None."""
        return self._get(tx, _POLICY, queue_type=queue_type)

    @_read
    def list_queue_policies(self, tx: _Tx) -> list[QueuePolicy]:
        """All policies, by queue."""
        return self._find(tx, _POLICY, "ORDER BY queue_type")

    def _limits(self, tx: _Tx, queues: list[str], lock: str = "") -> dict[str, _QueueLimit]:
        """What the policies of these queues allow now."""
        marks = ", ".join("?" * len(queues)) or "NULL"
        sql = f"""SELECT queue_type, paused, max_running, rate, per_seconds, full_at
            FROM flowstore_queues WHERE queue_type IN ({marks}) ORDER BY queue_type {lock}"""
        limits = {}
        rows = tx.rows(tx.dialect.resolve(sql), *queues)
        now = tx.now()  # not before the lock
        for queue, paused, max_running, rate, per_seconds, stored_full_at in rows:
            room = 0 if paused else _INT_MAX
            full_at = 0.0
            has_jumped = False
            if max_running is not None:
                # Counted in the index, never kept beside it: a crash leaves no wrong number.
                leases = tx.rows(tx.dialect.resolve(_LEASE_COUNT), queue, max_running)[0][0]
                room = min(room, max_running - leases)
            if rate is not None:
                speed = min(rate / (per_seconds * 1e6), 1e18)  # claims in a microsecond
                time = now * speed
                bucket = max(1.0, rate)
                # More than all of it cannot be missing: the clock was put back, or other machines'
                # clocks are ahead.
                ahead = 5e6 if self._engine.max_writers == 1 else 600e6
                has_jumped = stored_full_at > time + bucket + ahead * speed
                full_at = min(max(stored_full_at, time), time + bucket)
                # Both times are rounded, by less than half a microsecond.
                room = min(room, int(bucket - (full_at - time) + min(speed / 2, 0.001)))
            limits[queue] = _QueueLimit(room, rate is not None, full_at, has_jumped)
        return limits


# An item that is put in is pending, whatever its record says. Without a key it is given "".
_ENQUEUED = """execution_id, node_id, queue_type, payload, attempt, max_attempts, id, created_at,
    available_at, tenant_id, priority, unique_key"""
_ENQUEUE = f"""INSERT INTO flowstore_work_items (lease_fence, status, {_ENQUEUED})
    VALUES (0, 'pending', {"?, " * 11} NULLIF(?, '')) ON CONFLICT DO NOTHING"""
_enqueued_values = operator.itemgetter(*re.findall(r"\w+", _ENQUEUED))


class _WorkQueue(_Items):
    """What is done with items: they are put in, renewed, settled, retried, parked or given up."""

    @_write
    def enqueue_work_item(self, tx: _Tx, item: WorkItem, *, on_conflict: str = "raise") -> str:
        """Put an item into its queue; its id.

        The item is available from `available_at` on (default: `created_at`). It takes its
        execution's tenant and starts pending, whatever the record says. Where an item that is not
        settled has its `unique_key` in this tenant's queue, `on_conflict` decides: "raise"; "keep"
        returns that item's id; "replace" gives it the new payload, priority and `available_at` if
        it is pending, and returns its id. Raises NotFound for an unknown execution, AlreadyExists
        for an id that any item has or had, and for a key."""
        return self._enqueue(tx, {"": item}, on_conflict)[0]

    @_write
    def enqueue_work_items(
        self, tx: _Tx, items: Sequence[WorkItem], *, on_conflict: str = "raise"
    ) -> list[str]:
        """`enqueue_work_item` for each of the items, all of them or none; their ids."""
        members = enumerate(_check_list(items, "items", "a list of work items"))
        return self._enqueue(tx, {f"items[{index}]": item for index, item in members}, on_conflict)

    def _enqueue(self, tx: _Tx, items: Mapping[str, WorkItem], on_conflict: str) -> list[str]:
        """Put items in, which are given by their paths; their ids."""
        if _text(on_conflict, "on_conflict") not in ("raise", "keep", "replace"):
            raise InvalidData('on_conflict: "raise", "keep" or "replace" is needed')
        now = tx.now()
        tenants: dict[str, str] = {}
        ids = []
        for path, item in items.items():
            values = _ITEM.encode(item, path, now)
            if item.available_at is None:
                values["available_at"] = values["created_at"]
            execution = values["execution_id"]
            if execution not in tenants:
                tenants[execution] = self._tenant_of(tx, execution)
            values["tenant_id"] = tenants[execution]
            values["unique_key"] = values["unique_key"] or ""
            id = values["id"]
            holder = self._key_holder(tx, values)
            if holder is not None:
                (id,) = holder
                changes = values["available_at"], values["payload"], values["priority"], id
                replaced = on_conflict == "replace" and self._run(tx, _REPLACE, *changes)
                if not replaced and on_conflict != "keep":
                    raise AlreadyExists("work item", id)
            elif not tx.run(_ENQUEUE, *_enqueued_values(values)):
                raise AlreadyExists("work item", id)
            ids.append(id)
        return ids

    @_read
    def get_work_item(self, tx: _Tx, item_id: AnyItem) -> WorkItem | None:
        """The item as it is now, or None."""
        return self._get(tx, _ITEM, id=_id_and_fence(item_id)[0])

    @_read
    def list_work_items(
        self,
        tx: _Tx,
        *,
        status: WorkItemStatus | str | None = None,
        queue_type: AnyId | None = None,
        execution_id: AnyId | None = None,
        limit: int = 100,
        offset: int = 0,
    ) -> list[WorkItem]:
        """The items that have all of the given values, in the order of their ids."""
        filters = _without_none(queue_type=queue_type, execution_id=execution_id)
        index = "sqlite_autoindex_flowstore_work_items_1"
        condition = ""
        if status is not None:
            word = _enum_member(WorkItemStatus, status, "status")
            index = _STATUS_INDEX.get(word, "flowstore_settled")
            condition = f"AND {{status}} = '{word}'"
            if word not in ("pending", "claimed"):
                condition += " AND settled_at IS NOT NULL"
        if execution_id is not None:
            index = "flowstore_items_by_execution"
        return self._page(tx, _ITEM, index, "id", limit, offset, condition, **filters)

    @_write_statement
    def renew_lease(
        self,
        tx: _Tx,
        item_id: AnyItem,
        worker_id: AnyId | None = None,
        *,
        lease_fence: int | None = None,
        lease_seconds: float | None = None,
    ) -> datetime:
        """Let the lease begin again now; its new expiry.

        Raises NotFound, and LeaseLost when the item is not leased to this worker or not under this
        fence."""
        id, fence = _id_and_fence(item_id, lease_fence)
        if worker_id is None and issubclass(type(item_id), WorkItem):
            worker_id = _read_field("worker_id", item_id, WorkItem, "item_id")
        worker = _none_or(_id, worker_id, "worker_id")
        expires = _time_after(tx.now(), self._lease(lease_seconds), "lease_seconds")
        if not self._run(tx, _RENEW, expires, id, fence, worker):
            self._refuse(tx, id)
        return _datetime_of(expires)

    def hold(self, item: WorkItem, *, lease_seconds: float | None = None) -> Hold:
        """`with state.hold(item):` renew its lease in the background while the block runs.

        A renewal comes at every third of the lease. Raises LeaseLost at the end of the block if the
        lease was lost; in the block, `.lost` tells."""
        return Hold(self, item, self._lease(lease_seconds))

    @_steps
    def _renew_lease_of(self, hold: _LeaseKeeper) -> _Steps[bool]:
        """Renew a lease; False when no more renewals are needed.

        `lost` is set when the lease was lost, but not when the block itself has ended the item."""
        try:
            hold.expires = yield self.renew_lease(hold.item, lease_seconds=hold.lease_seconds)
            return True
        except FlowStoreError as error:
            refused = isinstance(error, (LeaseLost, NotFound))
        expired = self._engine.now() >= hold.expires
        if not refused and not expired:
            # The store is busy, the disk full, the tenant suspended: the next renewal may succeed.
            return True
        with contextlib.suppress(StorageError):
            item = yield self.get_work_item(hold.item)
            if item is None or item.lease_fence != hold.item.lease_fence:
                hold.lost = True
            elif item.status == "claimed":
                hold.lost = refused
            elif item.status in ("pending", "dead_lettered"):
                hold.lost = expired  # before its expiry only the block can have done that
        if hold.lost:
            _log(_WARNING, "work item %s: the block that holds it lost its lease", hold.item.id)
        return not refused and not hold.lost

    @_write_statement
    def complete_work_item(
        self, tx: _Tx, item_id: AnyItem, *, lease_fence: int | None = None
    ) -> WorkItem:
        """The work is done: settle the item, and return it.

        With a fence (or the claimed item itself), the item has to be claimed under that fence.
        Without, any item but a dead letter is settled. Else LeaseLost, and nothing is changed.
        Raises NotFound."""
        return self._settle(tx, _COMPLETE, item_id, lease_fence)

    @_write_statement
    def fail_work_item(
        self, tx: _Tx, item_id: AnyItem, error: str, *, lease_fence: int | None = None
    ) -> WorkItem:
        """The work failed for good: settle the item, with `error` as its `last_error`.

        The item stays failed until `retry_work_item` is called. Conditions and errors are those of
        `complete_work_item`."""
        return self._settle(tx, _FAIL, item_id, lease_fence, _text(error, "error"))

    def _settle(
        self, tx: _Tx, sql: _Sql, item_id: AnyItem, lease_fence: object, *error: str | None
    ) -> WorkItem:
        id, fence = _id_and_fence(item_id, lease_fence)
        needed = None if fence is None else "claimed"
        return self._change_item(tx, _ITEM, sql, id, tx.now(), *error, id, fence, needed)

    @_write_row
    def retry_work_item(
        self,
        tx: _Tx,
        item_id: AnyItem,
        error: str | None = None,
        *,
        delay: float | None = None,
        lease_fence: int | None = None,
    ) -> WorkItem | DeadLetter:
        """The attempt failed: pending again after `delay` seconds, or a dead letter.

        Counts an attempt; the last one of `max_attempts` makes the dead letter. Without a delay the
        store's backoff decides. Raises NotFound, and LeaseLost unless the item is claimed or failed
        (under the fence, if there is one)."""
        now = tx.now()
        seconds = _none_or(_seconds, delay, "delay")
        _time_after(now, seconds or 0, "delay")
        text = _none_or(_text, error, "error")
        id, fence = _id_and_fence(item_id, lease_fence)
        item = self._need(tx, _ITEM, "{for_update}", id=id)
        if item.status not in ("claimed", "failed") or fence not in (None, item.lease_fence):
            raise LeaseLost(id)
        if item.status == "failed" and item.attempt + 1 < item.max_attempts:
            self._refuse_second_key(tx, item)
        return self._count_attempt(tx, item, now, text, seconds)

    @_write_statement
    def park_work_item(
        self,
        tx: _Tx,
        item_id: AnyItem,
        *,
        delay: float | None = None,
        until: datetime | None = None,
        lease_fence: int | None = None,
    ) -> WorkItem:
        """Put a claimed item back, pending again after `delay` seconds or at `until`, or now.

        Its `attempt` and `last_error` stay, so an item may wait as often as it likes. Raises
        LeaseLost unless it is claimed (under the fence, if there is one), NotFound, InvalidData."""
        if delay is not None and until is not None:
            raise InvalidData("until: give a delay or a time, not both")
        due = _time_after(tx.now(), _none_or(_seconds, delay, "delay") or 0, "delay")
        if until is not None:
            due = _microseconds(until, "until")
        id, fence = _id_and_fence(item_id, lease_fence)
        return self._change_item(tx, _ITEM, _PARK, id, due, id, fence)

    @_write_row
    def complete_work_items(self, tx: _Tx, items: Sequence[WorkItem]) -> list[WorkItem]:
        """Settle claimed items, all of them or none, and return them.

        Raises LeaseLost or NotFound, which name the first that is not held; LeaseLost for an item
        that is given twice."""
        fences: dict[str, int] = {}
        for index, item in enumerate(_check_list(items, "items", "a list of claimed items")):
            id, fence = _id_and_fence(_check_type(WorkItem, item, f"items[{index}]"))
            if id in fences:
                raise LeaseLost(id)
            fences[id] = cast("int", fence)
        ended = self._change_items(tx, _COMPLETE_MANY, (tx.now(),), list(fences))
        for id, fence in fences.items():
            if id not in ended or ended[id].lease_fence != fence:
                self._refuse(tx, id)  # with which nothing of this is stored
        return [ended[id] for id in fences]

    @_write
    def reclaim_expired_leases(self, tx: _Tx) -> ReclaimResult:
        """Take back every expired lease, in one transaction: each counts an attempt.

        Below `max_attempts` the item is pending again after the store's backoff, else a dead
        letter. Claims do this by themselves for their queues."""
        now = tx.now()
        queue = ""
        ended = []
        while row := self._row(tx, _NEXT_QUEUE["claimed"], queue):
            (queue,) = row
            ended += self._reclaim(tx, queue, now, _INT_MAX, self._tenant)
        return ReclaimResult(
            retryable=[item for item in ended if isinstance(item, WorkItem)],
            exhausted=[item for item in ended if isinstance(item, DeadLetter)],
        )

    @_write
    def move_to_dead_letter(self, tx: _Tx, item_id: AnyItem, last_error: str) -> DeadLetter:
        """Give an item up: no claim finds it any more.

        Raises NotFound, and LeaseLost for a completed item or a dead letter, or when the item is
        not under the fence of the claim that it was given as."""
        id, fence = _id_and_fence(item_id)
        # A claim that was taken back has its fence still.
        held = "claimed" if getattr(item_id, "status", "") == "claimed" else None
        values = tx.now(), None, _text(last_error, "last_error"), id, fence, held
        letter = self._change_item(tx, _DEAD, _GIVE_UP, id, *values)
        return self._follow_item(tx, letter)

    @_read
    def list_dead_letters(self, tx: _Tx, limit: int = 100, offset: int = 0) -> list[DeadLetter]:
        """Dead letters, newest first."""
        index = _STATUS_INDEX["dead_lettered"]
        order = "settled_at DESC, id DESC"
        return self._page(tx, _DEAD, index, order, limit, offset, _DEAD_LETTERS)

    @_write
    def requeue_dead_letter(self, tx: _Tx, item_id: AnyItem | DeadLetter) -> WorkItem:
        """Make a dead letter a pending item again, available now, at attempt 0.

        Raises NotFound for anything else, AlreadyExists for its unique key, and LeaseLost when the
        item is not under the fence of the claim that it was given as."""
        id, fence = _id_and_fence(item_id)
        letter = self._get(tx, _ITEM, "{for_update}", id=id)
        if letter is None or letter.status != "dead_lettered":
            raise NotFound("dead letter", id)
        if fence not in (None, letter.lease_fence):
            raise LeaseLost(id)
        self._refuse_second_key(tx, letter)
        values = tx.now(), 0, None, id, letter.status
        return self._follow_item(tx, self._change_item(tx, _ITEM, _RETRY, id, *values))

    @_write
    def commit_turn(
        self,
        tx: _Tx,
        item_id: AnyItem,
        lease_fence: int | None,
        event: Mapping[str, Json],
        *,
        failed: bool = False,
        snapshot_state: Json = ...,
        effect_key: AnyId | None = None,
        effect: Json = None,
        expected_sequence: int | None = None,
        event_id: AnyId | None = None,
    ) -> int:
        """Settle the item under its fence and append the event, both or neither; its sequence.

        In the same transaction, keep a snapshot and an effect where they are given. A known
        `event_id` has the sequence that it has. Raises LeaseLost, NotFound, SequenceConflict."""
        if effect is not None and effect_key is None:
            raise InvalidData("effect: it is found again by its effect_key: give one")
        text = _event_text(event, "event")
        fence = _int(_id_and_fence(item_id, lease_fence)[1], "lease_fence")
        if _bool(failed, "failed"):
            item = self._settle(tx, _FAIL, item_id, fence, None)
        else:
            item = self._settle(tx, _COMPLETE, item_id, fence)
        execution = item.execution_id
        tenant = item.tenant_id
        last = self._last_sequence(tx, execution) or 0
        sequence = self._append_to(tx, execution, tenant, last, text, expected_sequence, event_id)
        if snapshot_state is not ...:
            state = _json(snapshot_state, "snapshot_state")
            tx.run(_SNAPSHOT_WRITE, execution, sequence, state, new_id(), tx.now(), tenant)
        if effect_key is not None:
            result = _json(effect, "effect")
            tx.run(_EFFECT_INSERT, tenant, _id(effect_key, "effect_key"), result, execution)
        return sequence


_SNAPSHOT_LATEST = _select(
    _SNAPSHOT,
    "ORDER BY at_sequence DESC LIMIT 1",
    "execution_id",
    "at_sequence <= ?",
    index=_SNAPSHOT_KEY,
)
# For all tenants: an id is taken, whichever tenant has it.
_SNAPSHOT_OF_ID = "SELECT execution_id, at_sequence FROM flowstore_snapshots WHERE id = ?"
_OLDER_SNAPSHOTS = _Sql(f"""SELECT id FROM flowstore_snapshots {{by {_SNAPSHOT_KEY}}}
    WHERE execution_id = ? {{tenant}} AND at_sequence <= (
    SELECT at_sequence FROM flowstore_snapshots {{by {_SNAPSHOT_KEY}}}
    WHERE execution_id = ? {{tenant}} ORDER BY at_sequence DESC LIMIT 1 OFFSET ?)""")
_EFFECT_GET = _Sql("SELECT result FROM flowstore_effects WHERE key = ? {tenant}").one
_ARTIFACT_PUT = _ARTIFACT.insert.replace(
    "DO NOTHING", "(tenant_id, hash) DO UPDATE SET put_at = excluded.put_at"
)
_ARTIFACT_REF = _select(_ARTIFACT, "", "hash").one
_ARTIFACT_GET = _Sql("SELECT data FROM flowstore_artifacts WHERE hash = ? {tenant}").one


class _Keepsakes(_StateFacet):
    """Keepsakes: snapshots of an execution's state, results of effects, artifacts."""

    @_write
    def write_snapshot(self, tx: _Tx, snapshot: Snapshot) -> Snapshot:
        """Store a snapshot and return it; it replaces one with the same `at_sequence`.

        Raises NotFound for an unknown execution, InvalidData for an `at_sequence` below 0."""
        values = _SNAPSHOT.encode(snapshot, now=tx.now())
        key = values["execution_id"], _int(values["at_sequence"], "at_sequence", 0)
        tenant = self._tenant_of(tx, key[0])
        if tx.row(_SNAPSHOT_OF_ID, values["id"]) not in (None, key):
            raise AlreadyExists("snapshot", values["id"])
        tx.run(_SNAPSHOT_WRITE, *values.values(), tenant)
        return _SNAPSHOT.decode(values.values())

    @_read
    def latest_snapshot(self, tx: _Tx, execution_id: AnyId) -> Snapshot | None:
        """The snapshot with the highest `at_sequence`, or None."""
        execution = _id(execution_id, "execution_id")
        return _SNAPSHOT.maybe(self._row(tx, _SNAPSHOT_LATEST, execution, _INT_MAX))

    @_write
    def prune_snapshots(self, tx: _Tx, execution_id: AnyId, keep: int = 1) -> int:
        """Drop all but the newest `keep` snapshots of an execution; how many went.

        As in `Store.prune`, a snapshot stays when rows of the user's own tables refer to it by a
        foreign key."""
        execution = _id(execution_id, "execution_id")
        older = self._rows(tx, _OLDER_SNAPSHOTS, execution, execution, _count(keep, "keep"))
        keys = _foreign_keys(tx)
        if not keys:
            tx.run_many("DELETE FROM flowstore_snapshots WHERE id = ?", older)
            return len(older)
        holders = [_drop_whole(tx, _PRUNED_SNAPSHOT, id, keys) for (id,) in older]
        kept = Counter(filter(None, holders))
        gone = len(older) - kept.total()
        if kept:
            tx.lines.append((_INFO, _PRUNE_LINE, gone, "snapshots", dict(kept)))
        return gone

    @_steps
    def replay(
        self, execution_id: AnyId, reducer: Callable[[Any, StoredEvent], Any], initial: Json = None
    ) -> _Steps[tuple[Any, int]]:
        """Fold `reducer(state, event)` over the events after the latest snapshot.

        Begins with the state of the snapshot, or with `initial` where there is none; ends with the
        last event at the time of the call. Returns the state and its sequence. The reducer runs
        outside transactions. Raises NotFound when the execution is pruned meanwhile."""
        _check_callable(reducer, "reducer")
        snapshot, last = yield self._replay_start(execution_id)
        state, sequence = (snapshot.state, snapshot.at_sequence) if snapshot else (initial, 0)
        while sequence < last:
            chunk = min(1000, last - sequence)
            events = yield self._read_chunk(execution_id, sequence, chunk)
            if len(events) < chunk:
                raise NotFound("execution", str(execution_id))  # it was pruned meanwhile
            for event in events:
                state = yield reducer(state, event)
            sequence += chunk
        return state, sequence

    @_snapshot
    def _replay_start(self, tx: _Tx, execution_id: AnyId) -> tuple[Snapshot | None, int]:
        """The latest snapshot that does not lie beyond the end of the log, and that end."""
        last = self._last_sequence(tx, execution_id) or 0
        execution = _id(execution_id, "execution_id")
        return _SNAPSHOT.maybe(self._row(tx, _SNAPSHOT_LATEST, execution, last)), last

    @_write
    def record_effect(
        self, tx: _Tx, key: AnyId, result: Json, *, execution_id: AnyId | None = None
    ) -> Json:
        """Keep a result, unless there is one under the key already; the result that is kept.

        Raises NotFound for an unknown execution."""
        name = _id(key, "key")
        execution = _none_or(_id, execution_id, "execution_id")
        if execution is not None:
            self._tenant_of(tx, execution)
        tx.run(_EFFECT_INSERT, self._write_tenant, name, _json(result, "result"), execution)
        return _decode_json(tx.rows(_EFFECT_GET, name, self._write_tenant)[0][0])

    @_read
    def get_effect(self, tx: _Tx, key: AnyId, default: Json = None) -> Json:
        """The result kept under the key, else `default`."""
        row = tx.row(_EFFECT_GET, _id(key, "key"), self._write_tenant)
        return default if row is None else _decode_json(row[0])

    @_write
    def put_artifact(self, tx: _Tx, data: bytes, media_type: str | None = None) -> ArtifactRef:
        """Keep bytes under their SHA-256.

        The same bytes are stored once, and keep the first media type."""
        data = bytes.__getitem__(
            _check_type(bytes, data, "data"), slice(None)
        )  # a subclass becomes bytes
        digest = hashlib.sha256(data).hexdigest()
        media = _none_or(_text, media_type, "media_type")
        tx.run(_ARTIFACT_PUT, digest, len(data), media, self._write_tenant, data, tx.now())
        return _ARTIFACT.decode(tx.rows(_ARTIFACT_REF, digest, self._write_tenant)[0])

    @_read
    def get_artifact(self, tx: _Tx, hash: str) -> bytes | None:
        """The bytes with this SHA-256, in hex, or None."""
        row = tx.row(_ARTIFACT_GET, _text(hash, "hash"), self._write_tenant)
        return None if row is None else bytes(row[0])


_TOKEN_VALID = _select(
    _TOKEN,
    "",
    "hash",
    "revoked_at IS NULL",
    "COALESCE(expires_at > ?, true)",
    "(SELECT t.status FROM flowstore_tenants t WHERE t.id = tenant_id) = 'active'",
    index="sqlite_autoindex_flowstore_tokens_2",
)
_TENANT_UPDATE = f"{_TENANT.update} RETURNING {_TENANT.columns}"


class _Tenants(_StateFacet):
    """Tenants: their records, their API tokens, and the view of one."""

    @_write
    def create_token(
        self, tx: _Tx, name: str, role: str, *, expires_at: datetime | None = None
    ) -> tuple[str, ApiToken]:
        """A new token: its plaintext and its record. Only the SHA-256 of the text is stored."""
        token = f"fs_{os.urandom(32).hex()}"
        info = ApiToken(
            id=new_id(),
            name=name,
            role=role,
            created_at=_datetime_of(tx.now()),
            expires_at=expires_at,
            revoked_at=None,
            tenant_id=self._write_tenant,
        )
        return token, _insert_record(
            tx, _TOKEN, info, hash=hashlib.sha256(token.encode()).hexdigest()
        )

    @_read
    def validate_token(self, tx: _Tx, token: str) -> ApiToken | None:
        """The record of a valid token, which names its tenant; else None.

        No token is valid that is unknown, revoked or expired, or whose tenant is not active."""
        digest = hashlib.sha256(_text(token, "token").encode()).hexdigest()
        return _TOKEN.maybe(self._row(tx, _TOKEN_VALID, digest, tx.now()))

    @_write
    def revoke_token(self, tx: _Tx, token_id: AnyId) -> None:
        """Make a token invalid; again has no effect. Raises NotFound."""
        token = _id(token_id, "token_id")
        self._change(tx, _TOKEN, "revoked_at = COALESCE(revoked_at, ?)", token, tx.now())

    @_read
    def list_tokens(self, tx: _Tx) -> list[ApiToken]:
        """All tokens, revoked and expired ones too, newest first."""
        index = "flowstore_tokens_by_time|flowstore_tokens_by_tenant"
        return self._page(tx, _TOKEN, index, "created_at DESC, id DESC")

    @_write
    def create_tenant(self, tx: _Tx, tenant: Tenant) -> Tenant:
        """Register a tenant. Raises AlreadyExists, in a view TenantMismatch."""
        values = _TENANT.encode(tenant, now=tx.now())
        self._refuse_in_view(values["id"])
        return _insert_values(tx, _TENANT, values)

    @_read
    def get_tenant(self, tx: _Tx, id: AnyId) -> Tenant | None:
        """A tenant's record, or None; a view knows only its own."""
        tenant = _id(id, "id")
        return self._get(tx, _TENANT, id=tenant) if self._tenant in (None, tenant) else None

    @_read
    def list_tenants(self, tx: _Tx) -> list[Tenant]:
        """All tenants, oldest first; a view knows only its own."""
        index = "" if self._tenant else "flowstore_tenants_by_time"
        return self._page(tx, _TENANT, index, "created_at, id", **_without_none(id=self._tenant))

    @_write
    def update_tenant(self, tx: _Tx, tenant: Tenant) -> Tenant:
        """Write a tenant's record. Raises NotFound, in a view TenantMismatch."""
        values: dict[str, Any] = _TENANT.encode(tenant) | {"updated_at": tx.now()}
        self._refuse_in_view(values["id"])
        row = tx.row(_TENANT_UPDATE, *_TENANT.changes(values))
        return _TENANT.decode(_or_not_found(row, "tenant", values["id"]))

    def for_tenant(self, tenant_id: AnyId) -> Self:
        """The view of one tenant: the same methods over its rows. In a view TenantMismatch."""
        tenant = _id(tenant_id, "tenant_id")
        self._refuse_in_view(tenant)
        return type(self)(self._engine, tenant)

    def _refuse_in_view(self, tenant_id: str) -> None:
        if self._tenant is not None:
            raise TenantMismatch(tenant_id, self._tenant)


class StateBackend(_Executions, _Claims, _WorkQueue, _Keepsakes, _Tenants):
    """Executions, the work queue, keepsakes and tenants; only a view of `for_tenant` isolates.

    After jamjet-state's StateBackend and SqliteBackend."""


class _LeaseKeeper:
    """The renewal of an item's lease while a block runs: in a thread, or in a task."""

    expires: datetime

    def __init__(self, state: Any, item: WorkItem, lease_seconds: float) -> None:
        _id_and_fence(_check_type(WorkItem, item, "item"))
        self.lost = False
        self.item = item
        self.lease_seconds = lease_seconds
        # Seconds between two renewals.
        self._interval = min(max(0.01, lease_seconds / 3), threading.TIMEOUT_MAX)
        self._state = state
        self._owners: set[object] = set()  # the thread or task of the block

    def _end(self, kind: type[BaseException] | None) -> None:
        if self.lost and kind is None:
            raise LeaseLost(self.item.id)


class Hold(_LeaseKeeper):
    """`with state.hold(item)`: a lease that is renewed while the block runs.

    `lost` tells when it was lost. The renewals end with the `with` statement, even where an
    interrupt keeps its end from being run: only the statement refers to the Hold."""

    def __enter__(self) -> Hold:
        self.expires = self._state.renew_lease(self.item, lease_seconds=self.lease_seconds)
        self._start()
        return self

    def _start(self) -> None:
        """Begin the renewals, of a lease that is new."""
        import _thread

        _reserve_stack(20)
        self._owners.add(threading.get_ident())
        self._process = os.getpid()
        self._gate = threading.Lock()  # is released to end the renewals
        self._gate.acquire()
        self._ended = threading.Lock()  # is released when they have ended
        if self._state._engine.block() is None:  # a transaction would keep the renewals waiting
            self._ended.acquire()
            # Not by threading.Thread: an interrupt during its start would leave a thread for ever.
            hold: weakref.ref[Hold] = weakref.ref(self)
            arguments = (hold, self._gate, self._ended, self._interval)
            _thread.start_new_thread(_keep_lease, arguments)

    def _stop(self) -> bool:
        """End the renewals; whether they went on until now."""
        self._gate.release()
        goes_on = self._ended.locked()
        if self._process == os.getpid():  # a forked child has no such thread
            self._ended.acquire()
        return goes_on

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: object
    ) -> None:
        if self._stop() and not self.lost:
            self._state._renew_lease_of(self)
        self._end(kind)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, RuntimeError):  # not entered, or ended
            self._gate.release()


def _keep_lease(
    reference: weakref.ref[Hold], gate: threading.Lock, ended: threading.Lock, interval: float
) -> None:
    """Renew a lease, in a thread of its own, until the gate is released or the hold has gone."""
    try:
        while not gate.acquire(timeout=interval):
            hold = reference()
            # No renewal while the holder has a transaction open: it would wait for the end, or
            # make the transaction fail.
            if hold is None:
                return
            if not (
                hold._state._engine.has_block(*hold._owners) or hold._state._renew_lease_of(hold)
            ):
                return
            del hold
    finally:
        ended.release()


# ==================================================================================================
# PersistenceProvider: workflow instances, events, subscriptions, commands
# ==================================================================================================

_INSTANCES = f"""SELECT {_INSTANCE.columns} FROM workflows {{by sqlite_autoindex_workflows_1}}
    WHERE id IN ({{}}) ORDER BY id"""
_INSTANCE_BY_ID = "SELECT name, stamp FROM workflows WHERE id = ?"
_INSTANCE_BY_NAME = "SELECT id FROM workflows WHERE name = ?"
_INSTANCES_RUNNABLE = _Sql("""SELECT id FROM workflows {by workflows_runnable}
    WHERE status = 'Runnable' AND next_execution <= ? ORDER BY next_execution, id""")
_COUNTER_NEXT = """INSERT INTO flowstore_counters (definition_id, value) VALUES (?, 1)
    ON CONFLICT (definition_id) DO UPDATE SET value = flowstore_counters.value + 1
    RETURNING value"""
_POINTERS = f"""SELECT {", ".join(_POINTER.written)}
    FROM execution_pointers {{by execution_pointers_in_order}}
    WHERE workflow_id IN ({{}}) ORDER BY workflow_id, place, id"""
_POINTER_WRITE = _POINTER.upsert("workflow_id, id")
_POINTER_DELETE = "DELETE FROM execution_pointers WHERE workflow_id = ? AND id = ?"
_EVENTS_RUNNABLE = _Sql("""SELECT id FROM events {by events_runnable}
    WHERE is_processed = 0 AND event_time <= ? ORDER BY event_time, id""")
_EVENTS_BY_KEY = _Sql("""SELECT id FROM events {by events_by_key}
    WHERE event_name = ? AND event_key = ? AND event_time <= ? ORDER BY event_time, id""")
_SUBSCRIPTION_FREE = "(external_token IS NULL OR external_token_expiry <= ?)"
_SUBSCRIPTION_TAKE = _update(
    _SUBSCRIPTION,
    "external_token = ?, external_worker_id = ?, external_token_expiry = ?",
    f"AND terminated_at IS NULL AND {_SUBSCRIPTION_FREE} {_IS_NO_RUN_WAIT}",
)
_SUBSCRIPTION_CLEAR = _update(
    _SUBSCRIPTION,
    "external_token = NULL, external_worker_id = NULL, external_token_expiry = NULL",
    "AND external_token = ?",
)
_SUBSCRIBED = "AND subscribe_as_of <= ? AND terminated_at IS NULL"
# A lease that has expired holds nothing. Scheduling takes its token away, so that a handler that
# returns late does not find it.
_COMMAND_FREE = (
    "(scheduled_commands.lease_token IS NULL OR scheduled_commands.lease_expires_at <= ?)"
)
_COMMAND_SCHEDULE = f"""INSERT INTO scheduled_commands (command_name, data, execute_time)
    VALUES (?, ?, ?) ON CONFLICT (command_name, data) DO UPDATE SET
    execute_time = CASE
        WHEN {_COMMAND_FREE} AND excluded.execute_time < scheduled_commands.execute_time
        THEN excluded.execute_time ELSE scheduled_commands.execute_time END,
    again_at = CASE WHEN {_COMMAND_FREE} OR scheduled_commands.again_at < excluded.execute_time
        THEN scheduled_commands.again_at ELSE excluded.execute_time END,
    lease_token = CASE WHEN {_COMMAND_FREE} THEN NULL ELSE scheduled_commands.lease_token END"""
_COMMAND_DUE = _Sql(f"""SELECT execute_time, command_name, data
    FROM scheduled_commands {{by scheduled_commands_by_time}}
    WHERE execute_time <= ? AND {_COMMAND_FREE} AND (execute_time, command_name, data) > (?, ?, ?)
    ORDER BY execute_time, command_name, data LIMIT 1""")
_COMMAND_LEASE = """UPDATE scheduled_commands SET lease_token = ?, lease_expires_at = ?
    WHERE command_name = ? AND data = ?"""
_COMMAND_HELD = "WHERE lease_token = ? AND lease_expires_at > ? AND command_name = ? AND data = ?"
_COMMAND_AGAIN = f"""UPDATE scheduled_commands
    SET execute_time = again_at, again_at = NULL, lease_token = NULL
    {_COMMAND_HELD} AND again_at IS NOT NULL"""
_COMMAND_DELETE = f"DELETE FROM scheduled_commands {_COMMAND_HELD}"
_COMMAND_RELEASE = """UPDATE scheduled_commands {by INDEX} SET again_at = NULL, lease_token = NULL,
    execute_time = CASE WHEN again_at < execute_time THEN again_at ELSE execute_time END
    WHERE lease_token = ? AND lease_expires_at > ? AND execute_time <= ?"""
_RELEASE_ALL = _Sql(_COMMAND_RELEASE.replace("INDEX", "scheduled_commands_by_time"))
_RELEASE_ONE = _Sql(
    _COMMAND_RELEASE.replace("INDEX", "sqlite_autoindex_scheduled_commands_1")
    + " AND command_name = ? AND data = ?"
)

# The pointer cache holds about this many fingerprints, of 700 bytes each. An instance counts as ten
# pointers at least.
_POINTER_CACHE_SIZE = 20_000
_POINTER_COMPARED = ("status", "sleep_until", "start_time", "end_time")
_compared_values = operator.attrgetter(*_POINTER_COMPARED)
_marshalled_values = operator.attrgetter(
    *(name for name in _POINTER.fields if name not in _POINTER_COMPARED)
)


def _fingerprints(pointers: Sequence[Any]) -> dict[str, Any]:
    """By id, a value for each pointer that changes when its row would change.

    A fingerprint costs a sixth of what encoding the row costs. marshal, unlike ==, tells True from
    1, and it refuses every type that has code of its own. A pointer whose change could be missed
    makes the result empty."""
    fingerprints = {}
    try:
        for pointer in pointers:
            if type(pointer) is not ExecutionPointer:
                return {}
            status, *times = compared = _compared_values(pointer)
            if type(status) not in (PointerStatus, str) or type(pointer.id) is not str:
                return {}
            for time in times:
                # When summer ends, a clock shows an hour twice: == does not tell these times apart.
                if time is not None and (type(time) is not datetime or time.tzinfo is not UTC):
                    return {}
            # Version 2: the bytes of later versions depend on how often an object is used.
            fingerprints[pointer.id] = compared, marshal.dumps(_marshalled_values(pointer), 2)
    except (AttributeError, TypeError, ValueError):
        return {}
    return fingerprints


def _pointer_row(pointers: Sequence[Any], index: int) -> tuple[Any, ...]:
    return tuple(_POINTER.encode(pointers[index], f"execution_pointers[{index}]").values())


def _as_of(tx: _Tx, value: datetime | None, path: str = "as_of") -> int:
    return tx.now() if value is None else _microseconds(value, path)


class _CommandFacet(_Facet):
    """Scheduled commands: the part of `PersistenceProvider` that runs handlers."""

    def supports_scheduled_commands(self) -> bool:
        """True."""
        return True

    @_write
    def schedule_command(self, tx: _Tx, command: ScheduledCommand) -> None:
        """Have a command handled: one per name and data, at the earliest time asked for."""
        now = tx.now()
        tx.run(_COMMAND_SCHEDULE, *_COMMAND.encode(command).values(), now, now, now)

    @_steps
    def process_commands(
        self,
        as_of: datetime | None,
        handler: Callable[[ScheduledCommand], Any],
        *,
        lease_seconds: float | None = None,
    ) -> _Steps[int]:
        """Handle each command due by `as_of` (None: now), soonest first, at most once.

        Returns how many handlers returned. Each command is leased to one caller just before
        `handler(command)`, which runs outside any transaction; when it returns, the command is
        removed. When it raises an Exception, the command stays for a later call, the rest go on,
        and an ExceptionGroup follows. Any other exception propagates at once. After a crash, or
        when a handler outlives its lease, the command is handed out again. Raises StorageError
        inside one's own transaction."""
        self._engine.forbid_inside("process_commands()")
        _check_callable(handler, "handler")
        due = _microseconds(self._engine.now() if as_of is None else as_of, "as_of") // 1000
        lease = self._lease(lease_seconds)
        token = new_id()
        cursor: Any = (-_INT_MAX - 1, "", "")
        handled_keys = set[tuple[str, str]]()  # scheduled again, they wait for a later call
        count: int = 0
        errors = []
        returned: bool | None = (
            None  # the handler of the command at the cursor; None: there is none
        )
        try:
            while True:
                step = self._next_command(token, returned, due, cursor, handled_keys, lease)
                finished, cursor = yield step
                count += finished
                if cursor is None:
                    break
                execute_time, *key = cursor
                handled_keys.add(cursor[1:])
                try:
                    yield handler(_COMMAND.decode((*key, execute_time)))
                    returned = True
                except Exception as error:
                    errors.append(error)
                    returned = False
        except Exception:
            raise
        except BaseException as error:
            with contextlib.suppress(StorageError):  # the error that ends the call says more
                release = self._release_commands(token, due)
                if not isinstance(error, GeneratorExit):
                    yield release
            raise
        if errors:
            raise ExceptionGroup("handlers of scheduled commands raised", errors)
        return count

    @_write
    def _next_command(
        self,
        tx: _Tx,
        token: str,
        returned: bool | None,
        due: int,
        cursor: tuple[Any, ...],
        handled_keys: set[tuple[str, str]],
        lease: float,
    ) -> tuple[int, tuple[Any, ...] | None]:
        """End the command at the cursor, and lease the next free one that is due, in one commit.

        Returns whether the one before was removed, 0 when its lease was lost; and the next one's
        time, name and data, the cursor."""
        now = tx.now()
        key = cursor[1:]
        finished = 0
        if returned:
            # Deleted, or kept for the time for which it was scheduled again.
            held = token, now, *key
            finished = tx.run(_COMMAND_AGAIN, *held) or tx.run(_COMMAND_DELETE, *held)
        elif returned is not None:
            self._run(tx, _RELEASE_ONE, token, now, due, *key)
        following: Any = cursor
        while following := self._row(tx, _COMMAND_DUE, due, now, *following):
            key = following[1:]
            if key not in handled_keys:
                expires = _time_after(now, lease, "lease_seconds")
                tx.run(_COMMAND_LEASE, token, expires, *key)
                break
        return finished, following

    @_write
    def _release_commands(self, tx: _Tx, token: str, due: int) -> None:
        """Free what the token holds for the next caller."""
        self._run(tx, _RELEASE_ALL, token, tx.now(), due)


class PersistenceProvider(_CommandFacet):
    """Workflow instances, events, subscriptions, commands and errors.

    Made after wfe's PersistenceProvider."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        # Every write of an instance leaves a new random write id in its row (column stamp). By
        # workflow and write id: {pointer id: (fingerprint, ordinal)}. If the row still has that
        # write id, no other store wrote it, and the pointers need not be read.
        self._pointer_cache: dict[tuple[str, int], dict[str, tuple[Any, int]]] = {}

    # --- instances ---
    @_write
    def create_new_workflow(self, tx: _Tx, instance: WorkflowInstance) -> str:
        """Store a new instance with its pointers; its id.

        An empty id is replaced by a new one, and an empty name by `{definition id}-{N}`: N is the
        next number of the definition whose name is free. Raises AlreadyExists for a taken id or
        name, InvalidData."""
        id = _read_field("id", instance, WorkflowInstance, "instance")
        if issubclass(type(id), str) and not str.__len__(id):
            instance = _read_foreign(copy.copy, instance, "instance", WorkflowInstance)
            instance.id = new_id()
        values: dict[str, Any] = _INSTANCE.encode(instance, now=tx.now()) | {
            "stamp": _random_bits()
        }
        definition = values["workflow_definition_id"]
        while not values["name"]:
            name = f"{definition}-{tx.rows(_COUNTER_NEXT, definition)[0][0]}"
            if tx.row(_INSTANCE_BY_NAME, _key(name, "the automatic name")) is None:
                values["name"] = name
        if not tx.run(_INSTANCE.insert, *values.values()):
            taken = "id" if tx.row(_INSTANCE_BY_ID, values["id"]) else "name"
            raise AlreadyExists("workflow", values[taken])
        self._write_pointers(tx, values, instance)
        return str(values["id"])

    @_write
    def persist_workflow(self, tx: _Tx, instance: WorkflowInstance) -> None:
        """Store an instance as it is now, writing only the pointers that changed.

        `create_time` never changes, and an empty name keeps the stored one. Raises NotFound,
        AlreadyExists (name)."""
        self._persist(tx, instance)

    @_write
    def persist_workflow_with_subscriptions(
        self, tx: _Tx, instance: WorkflowInstance, subscriptions: Sequence[EventSubscription]
    ) -> None:
        """`persist_workflow`, and new subscriptions: all or none. Raises AlreadyExists."""
        self._persist(tx, instance)
        for index, subscription in enumerate(_check_list(subscriptions, "subscriptions")):
            _insert_record(tx, _SUBSCRIPTION, subscription, f"subscriptions[{index}]")

    def _persist(self, tx: _Tx, instance: WorkflowInstance) -> None:
        values: dict[str, Any] = _INSTANCE.encode(instance) | {"stamp": _random_bits()}
        stored = tx.row(_INSTANCE_BY_ID, values["id"])
        name, write_id = _or_not_found(stored, "workflow", values["id"])
        values["name"] = values["name"] or name
        if values["name"] != name and tx.row(_INSTANCE_BY_NAME, values["name"]):
            raise AlreadyExists("workflow", values["name"])
        tx.run(_INSTANCE.update, *_INSTANCE.changes(values))
        self._write_pointers(tx, values, instance, write_id)

    def _write_pointers(
        self, tx: _Tx, values: dict[str, Any], instance: object, stored_write_id: int = -1
    ) -> None:
        """Write the pointers that differ from the stored ones, and delete those that are gone."""
        workflow_id = values["id"]
        listed = _read_field("execution_pointers", instance, WorkflowInstance, "instance")
        pointers = _check_list(listed, "execution_pointers")
        fingerprints = _fingerprints(pointers)
        cacheable = len(fingerprints) == len(pointers)
        cached = self._pointer_cache.pop((workflow_id, stored_write_id), None)
        before = cached if cacheable else None
        encode_all = before is None
        if before is None:
            stored = tx.rows(tx.dialect.resolve(_POINTERS).format("?"), workflow_id)
            before = {row[0]: (row[:-2], row[-1]) for row in stored}
        after: dict[str, tuple[Any, int]] = {}
        changed = []
        last = -1
        for index, pointer in enumerate(pointers):
            row = _pointer_row(pointers, index) if encode_all else ()
            id = row[0] if row else pointer.id
            if id in after:
                raise InvalidData(
                    f"execution_pointers[{index}].id: {id!r} is another pointer's too"
                )
            content = row or fingerprints[id]
            old_content, ordinal = before.pop(id, (None, -1))
            # A pointer keeps its ordinal while these only increase.
            last = ordinal if ordinal > last else last + 1
            if content != old_content or last != ordinal:
                row = row or _pointer_row(pointers, index)
                changed.append((*row, workflow_id, last))
            after[id] = fingerprints.get(id), last
        tx.run_many(_POINTER_DELETE, [(workflow_id, id) for id in before])
        tx.run_many(_POINTER_WRITE, changed)
        if len(self._pointer_cache) * max(10, len(pointers)) >= _POINTER_CACHE_SIZE:
            for old in list(self._pointer_cache)[::2]:
                self._pointer_cache.pop(old, None)
        if cacheable:
            self._pointer_cache[workflow_id, values["stamp"]] = after

    @_read
    def get_runnable_instances(self, tx: _Tx, as_at: datetime | None = None) -> list[str]:
        """The ids of those Runnable and due by `as_at` (None: now), soonest first."""
        until = _as_of(tx, as_at, "as_at") // 1000
        return [id for (id,) in self._rows(tx, _INSTANCES_RUNNABLE, until)]

    @_snapshot
    def get_workflow_instance(self, tx: _Tx, id: AnyId) -> WorkflowInstance:
        """One instance, its pointers in their order. Raises NotFound."""
        return self._read_pointers(tx, [self._need(tx, _INSTANCE, id=id)])[0]

    @_snapshot
    def get_workflow_instance_by_name(self, tx: _Tx, name: str) -> WorkflowInstance:
        """One instance by its name. Raises NotFound."""
        return self._read_pointers(tx, [self._need(tx, _INSTANCE, name=name)])[0]

    @_snapshot
    def get_workflow_instances(self, tx: _Tx, ids: Sequence[AnyId]) -> list[WorkflowInstance]:
        """Instances in the order asked, unknown ids skipped: two queries per 10,000."""
        keys = [_id(id, f"ids[{index}]") for index, id in enumerate(_check_list(ids, "ids"))]
        instances = []
        for start in range(0, len(keys), 10_000):
            chunk = keys[start : start + 10_000]
            sql = tx.dialect.resolve(_INSTANCES).format(", ".join("?" * len(chunk)))
            rows = {row[0]: row for row in tx.rows(sql, *chunk)}
            known = [_INSTANCE.decode(rows[id]) for id in chunk if id in rows]
            instances += self._read_pointers(tx, known)
        return instances

    def _read_pointers(self, tx: _Tx, instances: list[WorkflowInstance]) -> list[WorkflowInstance]:
        """Give instances their pointers."""
        pointers: dict[str, list[Any]] = {instance.id: [] for instance in instances}
        sql = tx.dialect.resolve(_POINTERS).format(", ".join("?" * len(pointers)) or "NULL")
        for row in tx.rows(sql, *pointers):
            pointers[row[-2]].append(row[:-2])
        for instance in instances:
            instance.execution_pointers = _POINTER.decode_all(pointers[instance.id])
        return instances

    @_write
    def next_definition_sequence(self, tx: _Tx, definition_id: str) -> int:
        """1, 2, 3, ... for each definition, shared with the automatic names."""
        return int(tx.rows(_COUNTER_NEXT, _key(definition_id, "definition_id"))[0][0])

    @_steps
    def delete_workflow(self, id: AnyId) -> _Steps[None]:
        """Delete an instance with its pointers, subscriptions and errors.

        Raises NotFound, and StorageError while rows of the user's own tables refer to any of these
        by a foreign key."""
        holder = yield self._delete(id)
        # Raised here: a StorageError in the operation would fail every call of the same commit.
        if holder is not None:
            raise StorageError(
                f"workflow {id}: rows of your own refer to it by a foreign key, remove them first: "
                f"{holder}"
            )

    @_write
    def _delete(self, tx: _Tx, id: AnyId) -> str | None:
        """Delete an instance, or return the name of the table that refers to it."""
        key = _id(id, "id")
        _or_not_found(tx.row(_INSTANCE_BY_ID, key), "workflow", key)
        keys = _foreign_keys(tx)
        return _drop_whole(tx, _PRUNED["workflows"], key, keys)

    @_steps
    def purge_workflows(self, status: WorkflowStatus | str, older_than: datetime) -> _Steps[int]:
        """Delete those of a status completed (else created) before a time; how many."""
        word = _enum_member(WorkflowStatus, status, "status")
        before = _microseconds(older_than, "older_than")
        ended = _terminal("workflows", "workflows_by_age", _WORKFLOW_TIME, word)
        # Without the mark: others may work on an instance, so none is left in pieces.
        rule = _PRUNED["workflows"]._replace(sources=ended, mark="")
        return (yield from self._prune_rule("workflows", rule, before))

    # --- subscriptions and events ---
    @_write
    def create_event_subscription(self, tx: _Tx, subscription: EventSubscription) -> str:
        """Store a subscription; its id. Raises AlreadyExists."""
        return _insert_record(tx, _SUBSCRIPTION, subscription).id

    @_read
    def get_subscription(self, tx: _Tx, id: AnyId) -> EventSubscription:
        """A subscription, terminated ones too. Raises NotFound."""
        return self._need(tx, _SUBSCRIPTION, _IS_NO_RUN_WAIT, id=id)

    @_write
    def terminate_subscription(self, tx: _Tx, id: AnyId) -> None:
        """End a subscription; again has no effect. Raises NotFound."""
        self._need(tx, _SUBSCRIPTION, _IS_NO_RUN_WAIT, id=id)
        self._change(tx, _SUBSCRIPTION, "terminated_at = COALESCE(terminated_at, ?)", id, tx.now())

    @_read
    def get_subscriptions(
        self, tx: _Tx, event_name: str, event_key: str, as_of: datetime | None = None
    ) -> list[EventSubscription]:
        """Those to an event, begun by a time (None: now), not terminated, oldest first."""
        return self._find(
            tx,
            _SUBSCRIPTION,
            f"{_SUBSCRIBED} ORDER BY subscribe_as_of, id",
            _as_of(tx, as_of),
            index="event_subscriptions_open",
            event_name=event_name,
            event_key=event_key,
        )

    @_read
    def get_first_open_subscription(
        self, tx: _Tx, event_name: str, event_key: str, as_of: datetime | None = None
    ) -> EventSubscription | None:
        """The oldest of them with no token, or an expired one, or None."""
        return self._get(
            tx,
            _SUBSCRIPTION,
            f"{_SUBSCRIBED} AND {_SUBSCRIPTION_FREE} ORDER BY subscribe_as_of, id LIMIT 1",
            _as_of(tx, as_of),
            tx.now(),
            index="event_subscriptions_open",
            event_name=event_name,
            event_key=event_key,
        )

    @_write_row
    def set_subscription_token(
        self, tx: _Tx, id: AnyId, token: str, worker_id: AnyId, expiry: datetime
    ) -> bool:
        """Take a subscription until `expiry`: True for one of any number of callers.

        False while a token that has not expired is set, even one's own. Raises NotFound for a
        subscription that is missing or terminated."""
        key = _id(id, "id")
        lease = _text(token, "token"), _id(worker_id, "worker_id"), _microseconds(expiry, "expiry")
        if self._run(tx, _SUBSCRIPTION_TAKE, *lease, key, tx.now()):
            return True
        self._need(tx, _SUBSCRIPTION, f"AND terminated_at IS NULL {_IS_NO_RUN_WAIT}", id=id)
        return False

    @_write_row
    def clear_subscription_token(self, tx: _Tx, id: AnyId, token: str) -> None:
        """Give a subscription back. Raises NotFound unless this is its token."""
        key = _id(id, "id")
        if not self._run(tx, _SUBSCRIPTION_CLEAR, key, _text(token, "token")):
            raise NotFound("subscription", key)

    @_write
    def create_event(self, tx: _Tx, event: Event) -> str:
        """Store an event; its id. Raises AlreadyExists."""
        return _insert_record(tx, _EVENT, event).id

    @_read
    def get_event(self, tx: _Tx, id: AnyId) -> Event:
        """An event. Raises NotFound."""
        return self._need(tx, _EVENT, id=id)

    @_read
    def get_runnable_events(self, tx: _Tx, as_at: datetime | None = None) -> list[str]:
        """The ids of events up to `as_at` (None: now) not processed yet, oldest first."""
        return [id for (id,) in self._rows(tx, _EVENTS_RUNNABLE, _as_of(tx, as_at, "as_at"))]

    @_read
    def get_events(
        self, tx: _Tx, event_name: str, event_key: str, as_of: datetime | None = None
    ) -> list[str]:
        """The ids of events of a name and key up to `as_of` (None: now), oldest first."""
        key = _key(event_name, "event_name"), _key(event_key, "event_key")
        return [id for (id,) in self._rows(tx, _EVENTS_BY_KEY, *key, _as_of(tx, as_of))]

    @_write
    def mark_event_processed(self, tx: _Tx, id: AnyId) -> None:
        """The event is done with. Raises NotFound."""
        self._change(tx, _EVENT, "is_processed = 1", id)

    @_write
    def mark_event_unprocessed(self, tx: _Tx, id: AnyId) -> None:
        """The event is to be processed again. Raises NotFound."""
        self._change(tx, _EVENT, "is_processed = 0", id)

    # --- errors of steps ---
    @_write
    def persist_errors(self, tx: _Tx, errors: Sequence[ExecutionError]) -> None:
        """Keep errors of steps, all or none."""
        for index, error in enumerate(_check_list(errors, "errors")):
            _insert_record(tx, _ERROR, error, f"errors[{index}]")

    @_read
    def list_errors(
        self, tx: _Tx, workflow_id: AnyId, limit: int = 100, offset: int = 0
    ) -> list[ExecutionError]:
        """The errors of a workflow, newest first."""
        return self._page(
            tx,
            _ERROR,
            "execution_errors_by_workflow",
            "id DESC",
            limit,
            offset,
            workflow_id=workflow_id,
        )

    @_read
    def ensure_store_exists(self, tx: _Tx) -> None:
        """No effect: opening the store made its tables."""
        tx.row("SELECT value FROM flowstore_meta WHERE key = 'schema'")


# ==================================================================================================
# Runs: durable functions, over the facets above and nothing else
# ==================================================================================================

_BRANCH_SECONDS = 0.2  # so long nothing is done in the other branches of a run before it is parked
# The log may have events of the user's, too.
_STEP_EVENTS = (
    "step_completed",
    "step_failed",
    "sleep_started",
    "wait_completed",
    "wait_timed_out",
)
_BLOCK_QUEUE = "store.run"  # of the runs of blocks: no function has such a name
_RUN_LOOK = _Sql("""SELECT tenant_id FROM flowstore_work_items
    {by sqlite_autoindex_flowstore_work_items_1}
    WHERE id = ? AND status = 'claimed' AND lease_fence = ? {tenant}""")
_RUN_LOCK = _Sql(f"{_RUN_LOOK.text} {{for_update}}")
_RUN_FREE = _Sql("""SELECT id FROM flowstore_work_items
    {by sqlite_autoindex_flowstore_work_items_1}
    WHERE id = ? AND (status <> 'claimed' OR lease_expires_at <= ?) {tenant}""")
# An attempt counts that failed, or whose process was lost.
_RUN_TAKE = _update(
    _ITEM,
    """status = 'claimed', worker_id = ?, claimed_at = ?, lease_expires_at = ?, settled_at = NULL,
    lease_fence = lease_fence + 1,
    attempt = attempt + CASE WHEN status IN ('claimed', 'failed') THEN 1 ELSE 0 END""",
    "AND (status <> 'claimed' OR lease_expires_at <= ?) AND (status <> 'completed' OR ?)",
)
_RUN_STATUS = _update(
    _RUN,
    """status = ?, updated_at = ?,
    completed_at = CASE WHEN ? IN ('pending', 'running') THEN NULL ELSE ? END""",
)
# Whether an execution is a run: then it has an item of its own id and function.
_IS_RUN = """AND EXISTS (SELECT 1 FROM flowstore_work_items i
    WHERE i.id = flowstore_runs.execution_id AND i.execution_id = i.id
    AND i.node_id = flowstore_runs.workflow_id)"""
_RUN_OUTCOME = _Sql(f"""SELECT status, (SELECT w.last_error FROM flowstore_work_items w
    WHERE w.id = flowstore_runs.execution_id)
    FROM flowstore_runs WHERE execution_id = ? {_IS_RUN} {{tenant}}""")
# By the ids of waits: an earlier build gave them the times of others' subscriptions.
_RUN_WAKE = _Sql("""UPDATE flowstore_work_items {by sqlite_autoindex_flowstore_work_items_1}
    SET available_at = ? WHERE id IN (
    SELECT workflow_id FROM event_subscriptions {by event_subscriptions_open}
    WHERE event_name = ? AND event_key = ? AND terminated_at IS NULL
    AND id = LENGTH(execution_pointer_id) || ':' || execution_pointer_id || ':' || workflow_id)
    AND status = 'pending' AND available_at > ? {tenant}""")
_RUN_DUE = _Sql("""UPDATE flowstore_work_items {by sqlite_autoindex_flowstore_work_items_1}
    SET available_at = ? WHERE id = ? AND lease_fence = ? AND status = 'pending' {tenant}""")
_LAST_EMITTED = f"""SELECT COALESCE(MAX(event_time), {_FIRST_TIME})
    FROM events {{by events_processed}} WHERE is_processed = 1"""
_EVENTS_AFTER = _Sql("""SELECT id FROM events {by events_by_key}
    WHERE event_name = ? AND event_key = ? AND event_time > ? AND event_time <= ?
    AND (is_processed = 1 OR event_time >= ?) ORDER BY event_time, id LIMIT ?""")
# A wait that begins again has its old subscription and end, perhaps for another event.
_SUBSCRIBE = f"""INSERT INTO event_subscriptions (id, workflow_id, step_id, execution_pointer_id,
    event_name, event_key, subscribe_as_of, subscription_data) VALUES (?, ?, 0, ?, ?, ?, ?, ?)
    ON CONFLICT (id) DO UPDATE SET terminated_at = NULL, event_name = excluded.event_name,
    event_key = excluded.event_key, subscribe_as_of = excluded.subscribe_as_of,
    subscription_data = CASE WHEN event_subscriptions.{_IS_RUN_WAIT}
    THEN event_subscriptions.subscription_data ELSE '[0, ' || event_subscriptions.subscription_data
    || ', ' || event_subscriptions.subscription_data || ']' END
    RETURNING event_subscriptions.subscription_data"""
_END_WAIT = "UPDATE event_subscriptions SET terminated_at = ? WHERE id = ?"
_RUN_SET_WAIT = "UPDATE event_subscriptions SET subscription_data = ? WHERE id = ?"
_RUN_WAITS = f"""SELECT id, subscription_data
    FROM event_subscriptions {{by event_subscriptions_open}}
    WHERE event_name = ? AND event_key = ? AND terminated_at IS NULL AND {_IS_RUN_WAIT}"""
_DROP_WAITS = f"""DELETE FROM event_subscriptions {{by event_subscriptions_by_workflow}}
    WHERE workflow_id = ? AND {_IS_RUN_WAIT}"""


class _Suspended(BaseException):
    """Unwinds the function of a run that waits, or whose worker stops. Only `work` catches it."""


def _is_of_suspension(error: BaseException) -> bool:
    """Whether an error is the suspension of a run, or was raised while that was handled."""
    if isinstance(error, BaseExceptionGroup):
        return False  # its members are asked
    seen = set()  # the user's code may have made a circle
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        if isinstance(cause, _Suspended):
            return True
        seen.add(id(cause))
        cause = cause.__context__
    return False


def _other_than_suspension(error: BaseException | None) -> BaseException | None:
    """What is left of an error without the suspensions of a run."""
    if isinstance(error, BaseExceptionGroup):
        return error.split(_is_of_suspension)[1]
    return None if error is None or _is_of_suspension(error) else error


def _function_name(function: object) -> str:
    """The name of a function, by which workers know its runs."""
    _check_callable(function, "function")
    name = _read_foreign(lambda one: getattr(one, "__name__", None), function, "function")
    if type(name) is not str or not name.isidentifier():
        raise InvalidData("function: it has no plain name: make it by def, or pass a name")
    return _id(name, "function")


class _End(NamedTuple):
    """How the claim of a run ends: "completed", "failed", or "pending" again.

    The detail has the `result` or the `error`. A pending run with an error is tried again, as the
    queue says. Without, it is given back; the one in `parks` is parked."""

    item: WorkItem
    status: str = "pending"
    detail: Mapping[str, Any] = types.MappingProxyType({})
    parks: Run | None = None
    delay: float = 0.0  # seconds until it may go on


class _Wait(NamedTuple):
    """What a step of a run waits for: an event up to a time, or (without its name) the time."""

    step: str
    until: int
    event_name: str | None = None
    event_key: str = ""
    limit: int = 0  # the time of the last event that counts when the worker comes late


def _last_emitted(tx: _Tx) -> int:
    """The time of the last event of `emit`."""
    return int(tx.rows(tx.dialect.resolve(_LAST_EMITTED))[0][0])


def _completion(log: Iterable[StoredEvent]) -> dict[str, Any] | None:
    """The event of a run's completion, the last one; None where the status was set by hand."""
    found = None
    for stored in log:
        if stored.event["type"] == "execution_completed":
            found = stored.event
    return found


class _RunFacet(_LogFacet):
    """What the store's runs and a single one have."""

    def _do(self, tx: _Tx, operation: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Run an operation of the state backend in the open transaction."""
        return inspect.unwrap(operation)(StateBackend(self._engine), tx, *args, **options)

    def _owner(self) -> object:
        """The thread or task that does a run, or a branch of it."""
        return threading.get_ident()

    def _is_live(self, owner: Any) -> bool:
        """Whether a thread or task goes on."""
        return owner in sys._current_frames()

    def _set_status(self, tx: _Tx, id: str, status: str) -> int:
        """Set the status of a run; the time of that."""
        now = tx.now()
        self._run(tx, _RUN_STATUS, status, now, status, now, id)
        return now

    def _check_lease(self, tx: _Tx, item: WorkItem, sql: _Sql = _RUN_LOCK) -> None:
        """Raise LeaseLost or RunCancelled, unless the item is held under its fence."""
        if self._row(tx, sql, item.id, item.lease_fence) is None:
            if self._get(tx, _RUN, execution_id=item.id, status="cancelled"):
                raise RunCancelled(item.id)
            raise LeaseLost(item.id)

    def _append(self, tx: _Tx, id: str, tenant: str, event: Mapping[str, Any]) -> str:
        """Append an event to the log of a run, the record of a step once; its text there."""
        step = event.get("step")
        text = _json(event, f"step {step!r}" if step else "run")
        once = f"step:{step}" if step and event["type"] != "step_failed" else None
        sequence, is_new = self._append_last(tx, id, tenant, text, once)
        if not is_new:  # by a call that was cancelled, and committed all the same
            text = _json(self._events_after(tx, id, sequence - 1, 1)[0].event, "run")
        return text


class _Journal(_RunFacet):
    """What the log has of a run, and which names its steps have taken."""

    def __init__(self, engine: Any, record: WorkflowExecution, item: WorkItem) -> None:
        super().__init__(engine)
        self.id = record.execution_id
        self._item = item
        # Threads or tasks that have asked for steps, and the one that calls the function.
        self._branches = {self._owner()}
        self._active_at = _monotonic()  # when a branch last began or ended something
        self._take: Callable[[], _Steps[Any]] | None = None  # of a completed run: it has no lease
        self._recorded: dict[str | None, Any] = {}  # events (None: there is none), by event_id
        self._had: dict[str | None, str] = {}  # what the waits among them have waited for
        # Their event_id, where a record or its block was broken off. It may be stored or not.
        self._doubtful: set[str] = set()
        self._lock = threading.RLock()  # a signal handler may ask for a step, too
        self._taken: set[str] = set()  # steps that were asked for, and have not failed
        # By name and kinds, an ordinal: those below are taken.
        self._next: dict[str, dict[Any, int]] = {}

    def _recall(self, log: Iterable[StoredEvent]) -> None:
        """Find in the log what is recorded."""
        for stored in log:
            self._remember(stored.id, stored.event)

    def _remember(self, id: str | None, event: Any) -> None:
        """Note an event of the log by its event_id; None: there is none."""
        self._recorded[id] = event
        is_ours = id is not None and id.startswith("step:")  # the log may have the user's, too
        if is_ours and event is not None and event["type"] == "wait_completed":
            self._had[id] = event["event"]
        else:
            self._had.pop(id, None)

    def _ask(self, name: str, *kinds: str) -> _Steps[tuple[str, Any]]:
        """The next step of a name, and its event if it is recorded."""
        if self._doubtful:
            found = yield self._look_again()
            for id, event in found.items():
                self._remember(id, event)
            self._doubtful.difference_update(found)
        step, event = self._begin(name, *kinds)
        take = self._take
        if event is None and take is not None:
            try:
                self._engine.forbid_inside("the first new step of a completed run")
                _, self._item = yield from take()
                # Another worker may have done new steps since this one has read the log.
                self._recall((yield self._read_chunk(self.id, 0, _INT_MAX)))
            except BaseException:
                self._release(step)
                raise
            self._take = None
            self._release(step)
            step, event = self._begin(name, *kinds)
        return step, event

    def _begin(self, name: str, *kinds: str) -> tuple[str, Any]:
        """The next step of a name, and its event if it is recorded."""
        name = _text(name, "name", 200, 1)
        if "#" in name:
            raise InvalidData("name: '#' is for the ordinals of steps, leave it out")
        if "step_completed" not in kinds:
            self._engine.forbid_inside("a wait of a run")
        self._branches.add(self._owner())
        self._active_at = _monotonic()
        with self._lock:
            count = len(self._branches)
            if count & (count - 1) == 0:  # now and then: a task that has ended keeps its result
                ended = {one for one in list(self._branches) if not self._is_live(one)}
                self._branches.difference_update(ended)
            ordinals = self._next.setdefault(name, {})
            ordinal = ordinals.get(kinds, 1)
            while True:
                step = name if ordinal == 1 else f"{name}#{ordinal}"
                event = self._recorded.get(f"step:{step}")
                ordinal += 1
                # What another kind of step has recorded is left to that one.
                if step not in self._taken and (event is None or event["type"] in kinds):
                    self._taken.add(step)
                    ordinals[kinds] = ordinal
                    return step, event

    def _release(self, step: str) -> None:
        """Let the same name again be this step."""
        with self._lock:
            self._taken.discard(step)
            name, _, number = step.partition("#")
            ordinals = self._next.setdefault(name, {})
            for kinds, ordinal in ordinals.items():
                ordinals[kinds] = min(ordinal, int(number or 1))

    def _doubt(self, step: str) -> None:
        """Let the same name again be this step, if the log does not have it by then."""
        self._doubtful.add(f"step:{step}")
        self._release(step)

    @_write_row
    def _look_again(self, tx: _Tx) -> dict[str | None, Any]:
        """The events of the doubtful steps. As a write, it comes behind a call that goes on."""
        self._row(tx, _RUN_LOCK, self.id, self._item.lease_fence)
        return self._find_doubtful(tx)

    def _find_doubtful(self, tx: _Tx) -> dict[str | None, Any]:
        found: dict[str | None, Any] = dict.fromkeys(self._doubtful)
        for id in found:
            where = {"execution_id": self.id, "event_id": id}
            for stored in self._find(tx, _STORED, "", index="flowstore_log_by_event_id", **where):
                found[id] = stored.event
        return found


class Run(_Journal):
    """One run of a function, while it is done: `id`, `input`, `attempt` (from 0) and `result`.

    Each step, sleep and wait is recorded once, under its name. The same name again is another one
    (`NAME#2`). A run that begins again finds what is recorded, by these names alone. All methods
    raise LeaseLost in a run that another worker has taken over, RunCancelled in a cancelled one,
    and InvalidData for a name that is not 1 to 200 characters without `#`."""

    def __init__(
        self,
        engine: Any,
        record: WorkflowExecution,
        item: WorkItem,
        crew: _Crew | None = None,
    ) -> None:
        super().__init__(engine, record, item)
        self.input = record.initial_input
        self.attempt = item.attempt
        self.result: Json = None
        self._crew = crew  # of a worker, which parks a run that waits; a block has none
        self._function = record.workflow_id
        self._suspended = False  # nothing new is begun
        self._closed = False  # the function or the block has ended
        self._has_failed = False  # a step has, or a wait by its timeout
        self._has_more = False  # a branch was suspended that did not only wait
        self._under_way: dict[str, object] = {}  # steps being done, and by which thread or task
        self._waits: dict[str, _Wait] = {}  # those that have begun

    def __repr__(self) -> str:
        return f"<flowstore.{type(self).__name__} {self.id!r}, attempt {self.attempt}>"

    @_steps
    def step(
        self, name: str, function: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> _Steps[Any]:
        """The result of `function(*args, **kwargs)`, done once however often the run begins again.

        The result is JSON, and comes back as JSON gives it back. In the caller's transaction, what
        the function writes and the record of the step are stored together, exactly once; an error
        undoes what it wrote. Outside, the function is called again if its process was lost before
        the record. What the function raises is recorded, and goes on. A run ends, fails or is given
        back when no step is under way in any thread or task. Raises InvalidData for a result that
        is not JSON."""
        _check_callable(function, "function")
        step, event = yield from self._ask(name, "step_completed")
        block = self._engine.block()
        if block is not None:
            self._branches.add(block.root.owner)
            block.undo.append(functools.partial(self._doubt, step))
        if event is not None:
            return event["result"]
        event = {"type": "step_failed", "step": step}  # until the function has returned
        try:
            with self._lock:
                self._under_way[step] = self._owner()
            # In a block the row is locked: no other worker takes the run over before the commit.
            yield from self._go_on(_RUN_LOOK if block is None else _RUN_LOCK)
            bound = functools.partial(function, *args, **kwargs)
            call = self._call_and_record(event, bound, block is not None)
            try:
                if block is None:
                    text = yield from call
                else:
                    text = yield self._in_savepoint(call)
            except Exception as error:
                self._has_failed = True
                if event["type"] == "step_failed":
                    event["error"] = _error_text(error)
                    with contextlib.suppress(FlowStoreError):  # the function's own error says more
                        yield self._record(event, block is not None)
                raise
        except BaseException:
            if event["type"] == "step_completed":
                self._doubt(step)  # its record may be stored all the same
            self._release(step)
            raise
        finally:
            self._active_at = _monotonic()
            self._under_way.pop(step, None)
        return _decode_json(text)["result"]

    def _call_and_record(
        self, event: dict[str, Any], function: Callable[[], Any], in_block: bool
    ) -> _Steps[str]:
        """Call the function of a step, and record the event with its result; its text."""
        start = _monotonic()
        result = yield function()
        seconds = round(_monotonic() - start, 6)
        event.update(type="step_completed", result=result, seconds=seconds)
        return cast("str", (yield self._record(event, in_block)))

    @_steps
    def _walk(self, steps: _Steps[Any]) -> _Steps[Any]:
        """Walk through the steps of a generator."""
        return (yield from steps)

    def _in_savepoint(self, steps: _Steps[Any]) -> Any:
        """Walk through steps in the caller's transaction. An error undoes what they wrote."""
        with _Block(self._engine):
            return self._walk(steps)

    @_steps
    def sleep(self, seconds: float, *, name: str = "sleep") -> _Steps[None]:
        """Sleep once for that many seconds. Raises StorageError inside one's own transaction.

        The time of waking is recorded. A block waits for it. In a worker the run is parked, as
        soon as nothing is done beside it."""
        yield self.sleep_until(_datetime_of(self._after(seconds, "seconds")), name=name)

    @_steps
    def sleep_until(self, time: datetime, *, name: str = "sleep") -> _Steps[None]:
        """As `sleep`, until a time."""
        until = _microseconds(time, "time")
        step, event = yield from self._ask(name, "sleep_started")
        if event is not None:
            until = _since_epoch(datetime.fromisoformat(event["until"]))
        if event is None or _datetime_of(until) > self._engine.now():
            yield from self._wait(_Wait(step, until))

    @_steps
    def wait_for(
        self,
        event_name: str,
        event_key: str = "",
        *,
        timeout: float | None = None,
        name: str | None = None,
    ) -> _Steps[Any]:
        """The `data` of an event of `runs.emit`, recorded under `name` (None: the event's name).

        It is the first event of that name and key since the run was started that no earlier wait of
        the run has had. A block waits for it. In a worker the run is parked, as soon as other
        branches (threads or tasks) have neither had a step under way nor begun one for 0.2 seconds:
        what they do outside of steps begins again when a wait of the run ends. Raises TimeoutError
        `timeout` seconds after the wait first began, StorageError inside one's own transaction."""
        event_name = _key(event_name, "event_name")
        event_key = _key(event_key, "event_key")
        until = _LAST_TIME if timeout is None else self._after(timeout, "timeout")
        step, event = yield from self._ask(
            event_name if name is None else name, "wait_completed", "wait_timed_out"
        )
        if event is None:
            event = yield from self._wait(_Wait(step, until, event_name, event_key))
        if event["type"] == "wait_timed_out":
            self._has_failed = True
            raise TimeoutError(f"run {self.id!r}: no event came in time for {step!r}")
        return event["data"]

    # --- the lease ---
    def _go_on(self, look: _Sql = _RUN_LOOK) -> _Steps[None]:
        """Before anything new is done: only in a run that is this worker's, and goes on."""
        crew = self._crew
        if crew is None and self._closed:
            raise LeaseLost(self.id)
        if crew is not None and (self._suspended or crew.stops()):
            handled = sys.exception()
            unwinds = handled is not None and _other_than_suspension(handled) is None
            if not (unwinds or self._closed or crew.stops()):
                yield from self._ask_for_more()
            self._suspended = True
            raise _Suspended
        yield self._look(look)

    @_read
    def _look(self, tx: _Tx, look: _Sql) -> None:
        self._check_lease(tx, self._item, look)

    @_write_row
    def _record(self, tx: _Tx, event: Mapping[str, Any], in_block: bool) -> str:
        item: Any = self._item
        self._check_lease(tx, item)
        if in_block:  # during which the lease was not renewed
            lease = (item.lease_expires_at - item.claimed_at).total_seconds()
            expires = _time_after(tx.now(), lease, "lease_seconds")
            self._run(tx, _RENEW, expires, item.id, item.lease_fence, None)
        return self._append(tx, self.id, self._item.tenant_id, event)

    # --- waiting ---
    def _after(self, seconds: object, path: str) -> int:
        """The time that many seconds from now."""
        now = _microseconds(self._engine.now(), "clock()")
        return _time_after(now, _span(seconds, path), path)

    def _wait(self, wait: _Wait) -> _Steps[Any]:
        """Wait; the event that ends the wait. Or the function is unwound, for the run to be parked.

        A block waits here, and so does a run in which other branches do something."""
        crew = self._crew
        try:
            yield from self._go_on()
            self._waits[wait.step] = wait
            others = self._branches - {self._owner()}
            if crew is not None and not (
                self._function in crew.branching or any(map(self._is_live, others))
            ):
                is_over = yield self._is_over(wait)
                if not is_over and self._suspend(crew, 0):
                    raise _Suspended
            while True:
                event, wait = yield self._attempt(wait)
                if event is not None:
                    self._has_more |= self._suspended
                    return event
                self._waits[wait.step] = wait
                seconds = math.inf if crew is None else _BRANCH_SECONDS
                while not (yield self._poll(self._is_over, seconds, wait, due=wait.until)):
                    if crew is not None and self._suspend(crew, _BRANCH_SECONDS):
                        raise _Suspended
        except BaseException as error:
            if not isinstance(error, _Suspended):
                self._doubtful.add(f"step:{wait.step}")
            if isinstance(error, Exception):  # else it may have been recorded all the same
                self._release(wait.step)
            is_parked = self._suspended and self._crew is not None
            if is_parked and isinstance(error, LeaseLost):
                raise _Suspended from None
            raise
        finally:
            self._active_at = _monotonic()
            if not self._suspended:
                self._waits.pop(wait.step, None)

    def _end_steps(self) -> _Steps[None]:
        """Begin nothing new from now on, and wait for the steps of other branches under way.

        They would be lost, and done again, perhaps by two at once."""
        self._suspended = True
        yield self._poll(self._is_idle, math.inf)

    def _is_idle(self) -> bool:
        owner = self._owner()
        others = [one for one in list(self._under_way.values()) if one != owner]
        return not any(map(self._is_live, others))

    def _suspend(self, crew: _Crew, seconds: float) -> bool:
        """Begin nothing new from now on, if nothing has been done for that long; whether it is so.

        A step that is asked for later would be lost."""
        with self._lock:
            idle = _monotonic() - self._active_at
            self._suspended |= crew.stops() or (not self._under_way and idle >= seconds)
            return self._suspended

    def _ask_for_more(self) -> _Steps[None]:
        """A branch was about to begin something when a wait suspended the run."""
        if self._know_branches():
            with contextlib.suppress(FlowStoreError):  # the suspension says more
                yield self._make_due()

    def _know_branches(self) -> bool:
        """The function has branches. If nobody knew of them, the run is done again at once."""
        functions = cast("_Crew", self._crew).branching
        is_new = self._function not in functions
        functions.add(self._function)
        self._has_more |= is_new
        return is_new

    @_write_row
    def _make_due(self, tx: _Tx) -> None:
        """End the wait of a run that is parked already, since this claim."""
        self._run(tx, _RUN_DUE, tx.now(), self.id, self._item.lease_fence)

    @_snapshot
    def _is_over(self, tx: _Tx, wait: _Wait) -> bool:
        """Whether another attempt would end a wait. Raises LeaseLost."""
        if self._closed:
            raise LeaseLost(self.id)
        self._check_lease(tx, self._item, _RUN_LOOK)
        return self._outcome(tx, wait) is not None

    @_write
    def _attempt(self, tx: _Tx, wait: _Wait) -> tuple[Any, _Wait]:
        """Begin a wait, or end it if it is over; its event, and the wait as it is stored."""
        self._check_lease(tx, self._item)
        return self._begin_or_end(tx, wait)

    @_write
    def _park(self, tx: _Tx) -> None:
        """Park the run until the first of its waits ends."""
        self._check_lease(tx, self._item)
        ends = [tx.now()] if self._has_more else []
        for wait in list(self._waits.values()):
            event, begun = self._begin_or_end(tx, wait)
            ends.append(begun.until if event is None else tx.now())
        until = _datetime_of(min(ends))
        self._do(tx, StateBackend.park_work_item, self._item, until=until)
        self._set_status(tx, self.id, "pending")

    def _begin_or_end(self, tx: _Tx, wait: _Wait) -> tuple[Any, _Wait]:
        """The look for the event and the subscription are one transaction: none falls between."""
        step, until, name, key, limit = wait
        id = f"{len(step)}:{step}:{self.id}"
        if name is not None:
            now = tx.now()
            # Events that are there are in time, though their times may be ahead of the clock.
            data = json.dumps([now, until, max(until, _last_emitted(tx))])
            subscription = id, self.id, step, name, key, _RUN_WAIT_AS_OF, data
            (stored,) = tx.rows(_SUBSCRIBE, *subscription)[0]
            _, until, limit = json.loads(stored)
            wait = wait._replace(until=until, limit=limit)
        event = self._outcome(tx, wait)
        append = functools.partial(self._append, tx, self.id, self._item.tenant_id)
        if name is None:
            end = _datetime_of(wait.until).isoformat()
            append({"type": "sleep_started", "step": step, "until": end})
        elif event is not None:
            append(event)
            tx.run(_END_WAIT, tx.now(), id)
            # Now already: a wait beside this one, perhaps in the same group, takes another event.
            self._remember(f"step:{step}", event)
        return event, wait

    def _outcome(self, tx: _Tx, wait: _Wait) -> dict[str, Any] | None:
        """The event that ends a wait now, None while it goes on."""
        step, until, name, key, limit = wait
        is_late = tx.now() >= until
        if name is not None:
            doubtful = self._find_doubtful(tx)
            left_out = {f"step:{step}", *doubtful}
            had = {event for id, event in list(self._had.items()) if id not in left_out}
            had |= {one["event"] for one in doubtful.values() if one and "event" in one}
            ids = self._rows(
                tx,
                _EVENTS_AFTER,
                name,
                key,
                self._item.payload["events_after"],
                limit if is_late else _LAST_TIME,
                self._item.payload.get("started_at", 0),  # for an event that `emit` has not stored
                len(had) + 1,
            )
            for (id,) in ids:
                if id not in had:
                    data = self._need(tx, _EVENT, id=id).event_data
                    return {"type": "wait_completed", "step": step, "event": id, "data": data}
        return {"type": "wait_timed_out", "step": step} if is_late else None


class _RunRecords(_RunFacet):
    """Runs from outside: their start, result and end, and the events that they wait for."""

    _run_type: Any = Run

    def __init__(self, engine: Any, state: StateBackend) -> None:
        super().__init__(engine)
        self._queue = state

    @_write
    def start(
        self,
        tx: _Tx,
        function: Callable[..., Any] | str,
        input: Json = None,
        *,
        id: AnyId | None = None,
        queue: AnyId | None = None,
        available_at: datetime | None = None,
        max_attempts: int = 3,
        priority: int = 0,
        unique_key: AnyId | None = None,
        tenant_id: AnyId = DEFAULT_TENANT,
    ) -> str:
        """Have a function, or the one of that name, called as `function(run, input)` by a worker;
        the run's id.

        A run of that id, name and tenant that is there already is left as it is. Raises
        AlreadyExists where its input differs, for an id that is taken in another way, and for an
        item with that `unique_key`; InvalidData for a function without a plain name."""
        is_name = issubclass(type(function), str)
        name = _id(function, "function") if is_name else _function_name(function)
        fields = {
            "workflow_id": name,
            "initial_input": _decode_json(_json(input, "input")),
            "tenant_id": _id(tenant_id, "tenant_id"),
        }
        return self._start(
            tx,
            _none_or(_id, id, "id"),
            fields,
            queue_type=_none_or(_id, queue, "queue") or name,
            available_at=available_at,
            max_attempts=max_attempts,
            priority=priority,
            unique_key=_none_or(_id, unique_key, "unique_key"),
        )

    def _start(
        self,
        tx: _Tx,
        id: str | None,
        fields: dict[str, Any],
        payload: Json = None,
        **options: Any,
    ) -> str:
        """Store a new run: its execution, the first event, and an item with these options; its id.

        One of that id with these fields is left as it is. With a payload it has to be new."""
        known = None if id is None else self._get(tx, _RUN, _IS_RUN, execution_id=id)
        if known and payload is None:
            # As JSON: in Python, 1 equals True.
            same = {name: getattr(known, name) for name in fields}
            if json.dumps(same, sort_keys=True) == json.dumps(fields, sort_keys=True):
                return known.execution_id
        if id is not None:  # waits of an earlier run of it, which was pruned, have their old ends
            tx.run(tx.dialect.resolve(_DROP_WAITS), id)
        given = {"initial_input": None} | fields
        record = WorkflowExecution(**given, **_without_none(execution_id=id))
        id = record.execution_id
        if tx.row(_EXECUTION_TENANT.all, id):
            taken = AlreadyExists("execution", id)
            if known and payload is None:
                taken.add_note(
                    "The run of this id has another input, function or tenant: give another id. "
                    "store.run() goes on with it, whatever its input, if it is given none."
                )
            raise taken
        self._do(tx, StateBackend.create_execution, record)
        start = {"type": "execution_started", "input": record.initial_input}
        self._append(tx, id, record.tenant_id, start)
        item = WorkItem(id=id, execution_id=id, node_id=record.workflow_id, **options)
        # Events are stamped in the order of their commits: those emitted later count.
        item.payload = payload or {"events_after": _last_emitted(tx), "started_at": tx.now()}
        self._do(tx, StateBackend.enqueue_work_item, item)
        return id

    def _need_run(self, tx: _Tx, id: AnyId) -> tuple[WorkflowExecution, WorkItem]:
        record = self._need(tx, _RUN, _IS_RUN, execution_id=_id(id, "id"))
        return record, self._need(tx, _ITEM, id=record.execution_id)

    # --- ends ---
    @_steps
    def result(self, id: AnyId, *, timeout: float | None = None) -> _Steps[Any]:
        """Wait until a run has ended; its result.

        Raises RunFailed, RunCancelled, TimeoutError after `timeout` seconds (inside a transaction
        at once), NotFound."""
        seconds = math.inf if timeout is None else _span(timeout, "timeout")
        if self._engine.block() is not None:
            seconds = 0.0
        ended = yield self._poll(self._outcome_of, seconds, id, due=_LAST_TIME)
        if ended is None:
            raise TimeoutError(f"run {id!r} has not ended yet")
        return ended["result"]

    @_snapshot
    def _outcome_of(self, tx: _Tx, id: AnyId) -> dict[str, Any] | None:
        """The `result` of a completed run, None before its end. Raises RunFailed, RunCancelled."""
        key = _id(id, "id")
        row = self._row(tx, _RUN_OUTCOME, key)
        status, error = _or_not_found(row, "execution", key)
        if not ExecutionStatus(status).is_terminal:
            return None
        if status == "cancelled":
            raise RunCancelled(key)
        if status != "completed":
            raise RunFailed(key, error or "")
        rest = "ORDER BY sequence DESC LIMIT 10"  # nearly always it is the last event
        newest = self._find(tx, _STORED, rest, index=_LOG_KEY, execution_id=key)
        end = _completion(reversed(newest)) or _completion(self._events_after(tx, key, 0))
        return {"result": end and end["result"]}

    @_write_row
    def _end_and_claim(self, tx: _Tx, crew: _Crew | None, end: _End | None) -> Any:
        """In one transaction, end the claim of a run, and claim one for a crew: whether the first
        run has ended, and record and item of the second.

        Raises LeaseLost, RunCancelled."""
        ended = end is not None and self._end(tx, end)
        if crew is None or crew.stops():
            return ended, None
        claim = crew.worker_id, crew.queues, self._lease(None), 1, crew.functions
        items = self._do(tx, StateBackend._claim, *claim)
        if not items:
            return ended, None
        id = items[0].id
        self._set_status(tx, id, "running")
        return ended, (self._need(tx, _RUN, execution_id=id), items[0])

    def _give_back(self, item: WorkItem) -> _Steps[None]:
        """Give a claim back after an error, which says more than one of the store's."""
        with contextlib.suppress(FlowStoreError):
            yield self._end_and_claim(None, _End(item))

    def _end(self, tx: _Tx, end: _End) -> bool:
        """End the claim of a run; whether the run has ended. Raises LeaseLost, RunCancelled."""
        item, status, detail, _, delay = end
        self._check_lease(tx, item)
        if status != "pending":
            self._finish(tx, item, status, detail)
            return True
        if detail:
            again = self._do(tx, StateBackend.retry_work_item, item, detail["error"])
            return isinstance(again, DeadLetter)
        self._do(tx, StateBackend.park_work_item, item, delay=delay)
        self._set_status(tx, item.id, status)
        return False

    def _finish(self, tx: _Tx, item: WorkItem, status: str, detail: Mapping[str, Any]) -> None:
        """End a run: its item, its record, its waits and its log."""
        id = item.id
        if status == "completed":
            self._do(tx, StateBackend.complete_work_item, id)
        else:
            self._do(tx, StateBackend.fail_work_item, id, detail.get("error", status))
        now = self._set_status(tx, id, status)
        tx.run(tx.dialect.resolve(_END_WAITS), now, id)  # a prune drops them with the run
        self._append(tx, id, item.tenant_id, {"type": f"execution_{status}", **detail})

    @_write
    def cancel(self, tx: _Tx, id: AnyId) -> None:
        """Cancel a run; one that has ended is left as it is. Raises NotFound."""
        record, item = self._need_run(tx, id)
        if not record.status.is_terminal:
            self._finish(tx, item, "cancelled", {})

    @_write
    def fork(self, tx: _Tx, id: AnyId, *, before: str, new_id: AnyId | None = None) -> str:
        """A new run of the same function and input, that goes on before the step `before`; its id.

        It has done the steps, sleeps and waits that the run had recorded before that step (`NAME`
        or `NAME#2`). Raises NotFound for an unknown run or step, AlreadyExists."""
        record, item = self._need_run(tx, id)
        step = _key(before, "before")
        log = self._events_after(tx, item.id, 0)
        log = [one for one in log if one.event["type"] in _STEP_EVENTS]
        kept = list(itertools.takewhile(lambda one: one.event.get("step") != step, log))
        if len(kept) == len(log):
            raise NotFound("step", step)
        fields = {
            "workflow_id": record.workflow_id,
            "initial_input": record.initial_input,
            "tenant_id": record.tenant_id,
        }
        copy = self._start(
            tx,
            _none_or(_id, new_id, "new_id"),
            fields,
            queue_type=item.queue_type,
            max_attempts=item.max_attempts,
            priority=item.priority,
            payload=item.payload,
        )
        for stored in kept:
            if stored.id is not None and stored.id.startswith("step:"):
                self._append(tx, copy, record.tenant_id, stored.event)
        return copy

    # --- events ---
    @_write
    def emit(self, tx: _Tx, event_name: str, event_key: str = "", data: Json = None) -> str:
        """Store an event, and wake the runs that wait for that name and key; the event's id."""
        _json({"data": data}, "event")
        now = tx.now()
        # Later than the event before, whatever the clock did: waits take events in this order.
        stamp = min(max(now, _last_emitted(tx) + 1), _LAST_TIME)
        event = Event(
            event_name=event_name,
            event_key=event_key,
            event_data=data,
            event_time=_datetime_of(stamp),
            is_processed=True,
        )
        stored = _insert_record(tx, _EVENT, event)
        topic = stored.event_name, stored.event_key
        if stamp > now:  # in time all the same, for these
            for id, wait in tx.rows(tx.dialect.resolve(_RUN_WAITS), *topic):
                since, until, _ = json.loads(wait)
                if now <= until < stamp:
                    tx.run(_RUN_SET_WAIT, json.dumps([since, until, stamp]), id)
        self._run(tx, _RUN_WAKE, now, *topic, now)
        return stored.id


@dataclass(eq=False)
class _RunBlock:
    """A run that is done by the block of a `with` statement, which keeps its lease."""

    runs: Any
    id: Any
    workflow_id: Any
    input: Json
    lease: Any
    wait: float | None
    run: Any = None
    hold: Any = None
    branches: set[object] = field(default_factory=set)
    process: int = 0
    # No other block has this name: steps side by side may take a completed run again.
    worker_id: str = field(default_factory=lambda: f"process {os.getpid()}, block {new_id()}")


class _BlockRuns(_RunRecords):
    """Runs that are done by the block of a `with` statement."""

    @_steps
    def _enter(self, block: _RunBlock) -> _Steps[Run]:
        """Begin a run for a block, or go on with it. Raises AlreadyRunning."""
        self._engine.forbid_inside("store.run()")
        if block.run is not None:
            raise StorageError("a run's block is entered once: call store.run() again")
        block.id = _id(block.id, "id")
        block.workflow_id = _id(block.workflow_id, "workflow_id")
        block.lease = self._lease(block.lease)
        block.wait = _none_or(_span, block.wait, "wait")
        record, item = yield from self._hold(block)
        run: Run = self._run_type(self._engine, record, item)
        try:
            log = yield self._read_chunk(item.id, 0, _INT_MAX)
            run._recall(log)
        except BaseException:
            yield from self._give_back(item)
            raise
        block.branches |= run._branches
        run._branches = block.branches
        block.run = run
        if block.hold is None:
            end = _completion(log)
            run.result = end and end["result"]
            run._take = functools.partial(self._hold, block, True)
        return run

    def _hold(self, block: _RunBlock, again: bool = False) -> _Steps[Any]:
        """Take the run of a block and keep its lease; its record and its item.

        A completed run is taken only if `again`. Raises AlreadyRunning."""
        while True:
            try:
                record, item = yield self._take(block, again)
            except BaseException as error:
                if not isinstance(error, Exception):  # it may have been committed all the same
                    with contextlib.suppress(FlowStoreError):
                        yield self._untake(block)
                raise
            if item.worker_id == block.worker_id:
                if block.hold is None:
                    block.hold = self._queue.hold(item, lease_seconds=block.lease)
                    block.hold._owners = block.branches
                    block.hold.expires = item.lease_expires_at
                    try:
                        block.hold._start()
                    except BaseException:
                        yield from self._give_back(item)
                        raise
                return record, item
            if record.status == "completed":
                return record, item
            if block.wait is None:
                left = item.lease_expires_at - self._engine.now()
                block.wait = max(0.0, left.total_seconds()) + 1
            start = _monotonic()
            if not (yield self._poll(self._is_free, block.wait, block.id)):
                raise AlreadyRunning(block.id, item.worker_id)
            block.wait -= _monotonic() - start

    @_write
    def _take(self, tx: _Tx, block: _RunBlock, again: bool) -> Any:
        """Begin a run or go on with it, unless another worker has it; its record and its item."""
        id = block.id
        input = _decode_json(_json(block.input, "input"))
        fields = _without_none(workflow_id=block.workflow_id, initial_input=input)
        self._start(tx, id, fields, queue_type=_BLOCK_QUEUE, max_attempts=2**31 - 1)
        record, item = self._need_run(tx, id)
        if record.status == "cancelled":
            raise RunCancelled(id)
        if item.settled_at and (again or record.status != "completed"):
            self._queue._refuse_second_key(tx, item)
        now = tx.now()
        expires = _time_after(now, block.lease, "lease_seconds")
        if self._run(tx, _RUN_TAKE, block.worker_id, now, expires, id, now, again):
            self._set_status(tx, id, "running")
            item = self._need(tx, _ITEM, id=id)
        return record, item

    @_write_row
    def _untake(self, tx: _Tx, block: _RunBlock) -> None:
        """Give back what an interrupted call has taken for a block."""
        item = self._get(tx, _ITEM, id=block.id)
        if item is not None and item.worker_id == block.worker_id:
            self._end(tx, _End(item))

    @_read
    def _is_free(self, tx: _Tx, id: str) -> bool:
        return self._row(tx, _RUN_FREE, id, tx.now()) is not None

    @_steps
    def _leave(self, block: _RunBlock, error: BaseException | None) -> _Steps[None]:
        """End the run of a block."""
        run = block.run
        if block.hold is None:
            return  # it was complete, and nothing was added
        end = _End(run._item)
        if error is None:
            end = _End(run._item, "completed", {"result": run.result})
        elif isinstance(error, Exception):
            end = _End(run._item, "failed", {"error": _error_text(error)})
        try:
            if end.status != "pending":  # Ctrl-C and a cancelled task do not wait
                run._closed = True
                yield from run._end_steps()
            yield self._end_and_claim(None, end)
        except FlowStoreError as problem:
            if error is None:  # else the error of the block says more
                if isinstance(problem, InvalidData):  # the result is not JSON
                    yield self._leave(block, problem)
                raise
        except BaseException:  # the end may not have been written
            yield from self._give_back(run._item)
            raise


class _ThreadRunBlock(_RunBlock):
    """`with store.run(id) as run:` a run that is done by this thread."""

    def __enter__(self) -> Run:
        self.process = os.getpid()
        return cast("Run", self.runs._enter(self))

    def __exit__(self, kind: object, error: Any, traceback: object) -> None:
        if self.process != os.getpid():
            return  # in the child of a fork: the run is the parent's
        try:
            self.runs._leave(self, error)
        finally:
            if self.hold is not None:  # a lost lease was told of by now
                self.hold._stop()


class _Crew:
    """What the threads or tasks of one call of `work` share."""

    def __init__(
        self,
        runs: Runs,
        functions: Sequence[Any],
        concurrency: Any,
        queues: Any,
        worker_id: Any,
        stop: Any,
        until_idle: Any,
    ) -> None:
        runs._engine.forbid_inside("runs.work()")
        self.functions = {_function_name(function): function for function in functions}
        if not 0 < len(self.functions) == len(functions):
            raise InvalidData("functions: at least one is needed, and no two of one name")
        _int(concurrency, "concurrency", 1)
        if stop is not None and not hasattr(type(stop), "is_set"):
            raise InvalidData(f"stop: an Event is needed, not {type(stop).__name__}")
        names = self.functions if queues is None else _check_list(queues, "queues")
        self.queues = [_id(name, "queues") for name in names]
        self.worker_id = _none_or(_id, worker_id, "worker_id") or f"process {os.getpid()}"
        self.stop = stop
        self.until_idle = _bool(until_idle, "until_idle")
        # Seconds between two renewals.
        self.interval = min(max(0.01, runs._lease(None) / 3), threading.TIMEOUT_MAX)
        self.concurrency = concurrency
        self.idle: set[object] = set()  # threads or tasks that found no run
        self.is_ending = False
        self.ended = 0
        self.branching: set[str] = set()  # functions with a branch that a wait had not known of
        self.under_way: dict[object, Run] = {}  # by their thread or task

    def stops(self) -> bool:
        """Whether no more is to be begun."""
        return self.is_ending or (self.stop is not None and bool(self.stop.is_set()))

    def is_over(self) -> bool:
        """Whether no run will be claimed any more. A run under way may start others."""
        is_idle = len(self.idle) == self.concurrency
        return self.stops() or bool(self.until_idle and is_idle)


class Runs(_BlockRuns):
    """Durable functions: each named step of a run is done once, whatever becomes of its process."""

    _on_end: Callable[[Any], object] = staticmethod(lambda end: None)  # told of each that ended

    def work(
        self,
        *functions: Callable[..., Any],
        concurrency: int = 1,
        queues: Collection[AnyId] | None = None,
        worker_id: AnyId | None = None,
        stop: threading.Event | None = None,
        until_idle: bool = False,
    ) -> int:
        """Do the runs of these functions, `concurrency` threads at a time; how many runs ended.

        Goes on until `stop` is set or Ctrl-C, with `until_idle` until none is due. A step under way
        then ends, and its run is given back. A function that raises is tried again, by the store's
        backoff, until its run has failed after `max_attempts`. Runs of other functions are left
        alone. Raises InvalidData, StorageError inside one's own transaction."""
        from concurrent.futures import ThreadPoolExecutor, wait

        crew = _Crew(self, functions, concurrency, queues, worker_id, stop, until_idle)
        for name, function in crew.functions.items():
            if inspect.iscoroutinefunction(function):
                raise InvalidData(f"functions: {name} is a coroutine function: use an async store")
        pool = ThreadPoolExecutor(concurrency, "flowstore-run")
        serving: list[Any] = []

        def keep_leases() -> None:
            # Not by join(): in Python 3.11 it takes a thread for ended after Ctrl-C.
            while wait(serving, timeout=crew.interval).not_done:
                self._renew(crew)

        try:
            serving.extend(pool.submit(self._serve, crew) for _ in range(concurrency))
            keep_leases()
        finally:  # after Ctrl-C, too; another one does not wait for the steps under way
            crew.is_ending = True
            pool.shutdown(wait=False)
            keep_leases()
        for future in serving:
            future.result()
        return crew.ended

    @_steps
    def _serve(self, crew: _Crew) -> _Steps[None]:
        """Do one run after another, in a thread or a task."""
        owner = self._owner()
        end: _End | None = None
        found_none = False
        try:
            while True:
                try:
                    if end is not None and end.parks is not None:
                        yield end.parks._park()
                        end = None
                    ended, claimed = yield self._end_and_claim(crew, end)
                except StoreBusy:
                    continue  # nothing was written
                except (LeaseLost, RunCancelled):
                    end = None
                    continue
                if ended:
                    crew.ended += 1
                    self._on_end(end)
                end = None
                if claimed is not None:
                    end = yield from self._do_run(crew, *claimed)
                    found_none = False
                    continue
                crew.idle.add(owner)
                if found_none:  # what is due is locked: by its run, whose lease has run out
                    yield self._engine.wait(self._engine.commits, 1.0)
                found_none = True
                yield self._poll(self._has_work, math.inf, crew, object())
                if crew.is_over():
                    return
                crew.idle.discard(owner)
        except BaseException:
            crew.is_ending = True
            raise

    def _do_run(self, crew: _Crew, record: WorkflowExecution, item: WorkItem) -> _Steps[_End]:
        """Call the function of a run; how its claim ends."""
        owner = self._owner()
        run: Run = self._run_type(self._engine, record, item, crew)
        crew.under_way[owner] = run
        try:
            if crew.stops():
                return _End(item)
            end = yield from self._call_function(run, crew.functions[record.workflow_id])
            run._closed = end is not None
            yield from run._end_steps()
        except BaseException:
            yield from self._give_back(item)
            raise
        finally:
            del crew.under_way[owner]
        return end or _End(item, parks=run if run._waits and not crew.stops() else None)

    def _call_function(self, run: Run, function: Callable[..., Any]) -> _Steps[_End | None]:
        """Call the function of a run; how the run's claim ends, None if the run is suspended."""
        item = run._item
        try:
            run._recall((yield self._read_chunk(item.id, 0, _INT_MAX)))
            result = yield function(run, run.input)
            if run._suspended:  # it has caught that
                return None
            end = _End(item, "completed", {"result": result})
            _json(end.detail, "run")  # here, or the worker would end with it
            return end
        except BaseException as error:
            if not self._is_of_function(error):
                raise
            failure = _other_than_suspension(error)
            if failure is None:
                if isinstance(error, BaseExceptionGroup):
                    run._know_branches()
                return None
            if isinstance(failure, BaseExceptionGroup) and not isinstance(failure, Exception):
                raise
            if run._suspended and not run._has_failed:
                # It was raised for the suspension itself, as the result of a branch. Or it has
                # another cause: then it is raised again when a wait has ended.
                return None
            has_lost = isinstance(failure, StoreBusy)
            if isinstance(failure, BaseExceptionGroup):
                has_lost = failure.split(StoreBusy)[1] is None
            if has_lost:  # a transaction of the function's did, to others' runs: no failed attempt
                return _End(item, delay=0.1)
            return _End(item, detail={"error": _error_text(failure)})

    def _is_of_function(self, error: BaseException) -> bool:
        """Whether an error is one of the function's, and does not break off the worker."""
        return isinstance(error, (_Suspended, Exception, BaseExceptionGroup))

    def _has_work(self, crew: _Crew, waiter: object) -> Any:
        """Whether to look for a run again."""
        if crew.is_over():
            return True
        return self._queue._look_for_work(waiter, crew.queues, crew.functions)

    @_steps
    def _renew(self, crew: _Crew) -> _Steps[None]:
        """Renew the leases of the runs under way, except of those with an open transaction."""
        for run in list(crew.under_way.values()):
            if not self._engine.has_block(*run._branches):
                with contextlib.suppress(FlowStoreError):  # the run finds out, or the next renewal
                    yield self._queue.renew_lease(run._item)


# ==================================================================================================
# Store: what open() returns
# ==================================================================================================


class _StoreBase(_Facet):
    """What both kinds of store have."""

    @property
    def target(self) -> str:
        """What was opened."""
        return str(self._engine.target)

    @property
    def read_only(self) -> bool:
        """True when nothing can be changed through this store."""
        return bool(self._engine.options.read_only)

    def now(self) -> datetime:
        """The store's time, in UTC."""
        self._engine.refuse_closed()
        time: datetime = self._engine.now()
        return time

    def __repr__(self) -> str:
        closed = " (closed)" if self._engine.closed else ""
        return f"<flowstore.{type(self).__name__} {self.target!r}{closed}>"

    @_steps
    def close(self) -> _Steps[None]:
        """Close the store: calls under way finish, waiters and later calls get StoreClosed.

        A second close has no effect. Raises StorageError inside one's own transaction."""
        self._engine.forbid_inside("close()")
        yield self._engine.close()

    @_steps
    def backup(self, path: str | os.PathLike[str]) -> _Steps[None]:
        """Copy the store to a new file while it is in use.

        The copy is consistent, and it is complete or not there at all. Raises StorageError for a
        path that exists, and inside one's own transaction."""
        self._engine.forbid_inside("backup()")
        yield self._engine.in_thread(self._engine.backup, _path(path, "path"))

    @_steps
    def check(self) -> _Steps[list[str]]:
        """Read the whole store and list what is wrong with it; empty when it is sound.

        Raises StorageError inside one's own transaction."""
        self._engine.forbid_inside("check()")
        checked = self._engine.in_thread(self._engine.on_new_connection, _problems)
        return list((yield checked))

    @_steps
    def compact(self) -> _Steps[None]:
        """Give unused space back to the file system and empty the write-ahead log.

        Writers go on between its steps. Raises StoreBusy, and StorageError inside one's own
        transaction."""
        self._engine.forbid_inside("compact()")
        yield self._engine.in_thread(self._engine.compact)

    @_steps
    def prune(
        self,
        older_than: timedelta | datetime,
        *,
        dry_run: bool = False,
        artifacts: bool = False,
    ) -> _Steps[dict[str, int]]:
        """Drop what ended before a time, or longer ago than a span; how many, by kind.

        This drops terminal executions and flows, completed and terminated workflows, all with
        everything that is their own, settled items of executions that go on, processed events,
        terminated subscriptions, errors, revoked and expired tokens. Artifacts stay, unless
        `artifacts` is True: then those go that were last put before that time. A thing to which
        rows of the user's own tables refer by a foreign key stays whole, and a line of the log
        names the table. `dry_run` only counts. The work is done in small transactions, so that
        writers are never held up (inside a transaction it is part of that one). A prune that was
        killed between them is continued by the next one. An execution too large for one transaction
        loses its record and its tenant first, so that its remains are not used. Raises
        InvalidData."""
        now = _microseconds(self.now(), "clock()")
        if issubclass(type(older_than), timedelta):
            before = max(_FIRST_TIME, now - _span_of(older_than, "older_than"))
        else:
            before = _microseconds(older_than, "older_than")
        rules = dict(_PRUNED)
        if _bool(artifacts, "artifacts"):
            rules["artifacts"] = _PRUNED_ARTIFACTS
        # A token that will have expired before a time to come is still valid.
        times = dict.fromkeys(rules, before) | {"tokens": min(before, now + 1)}
        if _bool(dry_run, "dry_run"):
            return dict((yield self._prunable(times, rules)))
        counts = {}
        for kind, rule in rules.items():
            counts[kind] = yield from self._prune_rule(kind, rule, times[kind])
        return counts

    @_snapshot
    def _prunable(
        self, tx: _Tx, times: dict[str, int], rules: dict[str, _PruneRule]
    ) -> dict[str, int]:
        keys = _foreign_keys(tx)
        counts = dict.fromkeys(rules, 0)
        for kind, rule in rules.items():
            for source in rule.sources:
                held = "NULL" if source.in_pieces else _holder_sql(keys, rule, source.table)
                where = f"{{by {source.by}}} WHERE {source.ended} AND {held} IS NULL"
                sql = tx.dialect.resolve(f"SELECT COUNT(*) FROM {source.table} {where}")
                counts[kind] += tx.rows(sql, *[times[kind]] * source.ended.count("?"))[0][0]
        return counts

    @_snapshot
    def stats(self, tx: _Tx) -> dict[str, Any]:
        """How much is in the store, as JSON values: rows, runs by status, queues, bytes."""
        tables = {
            name: tx.rows(f"SELECT COUNT(*) FROM {name}")[0][0] for name in sorted(_TABLE_NAMES)
        }
        stats: dict[str, Any] = {"tables": tables}
        for kind in ("flows", "executions", "workflows"):
            source = _PRUNED[kind].sources[0]  # its index begins with the status
            sql = f"SELECT status, COUNT(*) FROM {source.table} {{by {source.by}}} GROUP BY status"
            stats[kind] = dict(tx.rows(tx.dialect.resolve(sql)))
        queues: dict[str, dict[str, int]] = {}
        sql = """SELECT queue_type, status, COUNT(*) FROM flowstore_work_items
            GROUP BY queue_type, status"""
        for queue, status, count in tx.rows(sql):
            queues.setdefault(queue, {})[status] = count
        return {**stats, "queues": queues, **self._engine.sizes(tx)}


class Store(_StoreBase):
    """A durable memory for workflows in one database: four facets, and what concerns all of it.

    Any number of threads may share one, any number of processes may open the same file, and both
    sides of a fork may go on using it. Close it, or use it as a context manager."""

    def __init__(self, engine: _Engine) -> None:
        super().__init__(engine)
        self.flows = FlowStore(engine)
        """Flows, their steps and their audit trail: `FlowStore`."""
        self.events = EventStore(engine)
        """The execution log: `EventStore`."""
        self.state = StateBackend(engine)
        """Executions, the work queue, tenants and what belongs to them: `StateBackend`."""
        self.workflows = PersistenceProvider(engine)
        """Workflow instances, events, subscriptions, commands and errors: `PersistenceProvider`."""
        self.runs = Runs(engine, self.state)
        """Durable functions: `Runs`."""

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self.close()

    def transaction(
        self, *, read_only: bool = False
    ) -> contextlib.AbstractContextManager[Transaction]:
        """`with store.transaction() as tx:` all that this thread or task does in it, or nothing.

        Facet calls join it, each as a savepoint; so does a nested block. `tx.execute` runs the
        user's own SQL. An exception that leaves the block undoes it. With `read_only` the block is
        one snapshot: it waits for no writer, and no writer waits for it. Raises StoreBusy, and
        StorageError when the database ended the transaction, or for a write in a read-only one."""
        return _Block(self._engine, _bool(read_only, "read_only") == 1)

    def run(
        self,
        id: AnyId,
        *,
        workflow_id: AnyId = "script",
        input: Json = None,
        lease_seconds: float | None = None,
        wait: float | None = None,
    ) -> contextlib.AbstractContextManager[Run]:
        """`with store.run(id) as run:` a run that this thread does: it begins, or goes on.

        The block's end completes it, with `run.result`. An exception fails it and goes on; the next
        block of that id tries again, with the steps that are done. Ctrl-C only breaks it off. In a
        completed run all recorded steps answer, and nothing is written. While another thread or
        process is doing it, waits for `wait` seconds (None: until the lease it has found has run
        out), then raises AlreadyRunning. Raises RunCancelled, AlreadyExists for a stored
        `workflow_id` or `input` that differs (None: any input), StorageError inside one's own
        transaction."""
        return _ThreadRunBlock(self.runs, id, workflow_id, input, lease_seconds, wait)


def _sqlite_note() -> str:
    """The version of SQLite, and what flowstore does about the WAL-reset bug of older ones."""
    version = sqlite3.sqlite_version_info
    is_fixed = version >= (3, 51, 3) or (3, 50, 7) <= version < (3, 51)
    if is_fixed or (3, 44, 6) <= version < (3, 45):
        return f"SQLite {sqlite3.sqlite_version}"
    return (
        f"SQLite {sqlite3.sqlite_version}, with the WAL-reset bug: flowstore itself is safe, since "
        "it checkpoints only under the write lock; other programs' checkpoints are not (README)"
    )


# Statements that find one row for each problem, and the message about it.
_CHECKS = {
    "PRAGMA foreign_key_check": "{}: row {} refers to a row of {} that is not there",
    f"""SELECT execution_id FROM flowstore_log {{by {_LOG_KEY}}}
    WHERE execution_id <> '' GROUP BY execution_id
    HAVING COUNT(*) <> MAX(sequence) OR MIN(sequence) <> 1
    ORDER BY execution_id""": "the log of execution {!r} has a gap",
    f"""SELECT DISTINCT execution_id FROM flowstore_log l {{by {_LOG_KEY}}}
    WHERE execution_id <> '' AND NOT EXISTS
    (SELECT 1 FROM flowstore_executions e WHERE e.execution_id = l.execution_id)
    ORDER BY execution_id""": "the log has events of execution {!r}, which is not known",
}


def _problems(tx: _Tx) -> list[str]:
    """What is wrong with a database."""
    try:
        problems = [text for (text,) in tx.rows("PRAGMA integrity_check") if text != "ok"]
        for sql, message in _CHECKS.items():
            problems += [message.format(*row) for row in tx.rows(tx.dialect.resolve(sql))]
    except (StoreBusy, StoreClosed):
        raise
    except StorageError as error:
        return [str(error)]
    return problems


def _path(path: object, argument: str) -> str:
    """An absolute path: it stays right when the working directory changes."""
    return os.path.abspath(_path_text(path, argument))


def _path_text(path: object, argument: str) -> str:
    if hasattr(type(path), "__fspath__"):
        path = _read_foreign(os.fspath, path, argument)
    text = _text(_check_type(str, path, argument, "a path"), argument)
    if not text:
        raise InvalidData(f"{argument}: the path is empty")
    return text


# The engine of each kind of server, by the scheme of its URLs.
_SERVERS: dict[str, Callable[[str, SimpleNamespace], _Engine]] = {}


def _parse_target(target: object) -> tuple[str, str | None]:
    """The name of a target, and its file's absolute path (None: in memory; "": on a server)."""
    name = text = _path_text(target, "target")
    if not issubclass(type(target), str):
        return text, os.path.abspath(text)
    url = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):(//)?", text.strip())
    scheme = url[1].lower() if url else ""
    if scheme in _SERVERS:
        return text.strip(), ""
    if scheme == "sqlite":
        import urllib.parse

        name = text.strip()[7:].removeprefix("//")
        if "?" in name:
            raise InvalidData(
                "target: a ?query is not understood here: pass options to open() by name"
            )
        name = urllib.parse.unquote(name, errors="surrogateescape")
    elif url and url[2]:
        raise StorageError(
            f"target: the scheme {url[1]!r} is not known: give a path, sqlite:///path or :memory:"
        )
    return text, None if name == ":memory:" else _path(name, "target")


def _refuse_path(path: str, read_only: bool) -> None:
    """StorageError, with what to do, for a path with no file to open, where none can be made."""
    _refuse_long(path, "-wal")
    folder = os.path.dirname(path)
    try:
        os.stat(path)
    except FileNotFoundError:
        if not os.path.isdir(folder):
            raise StorageError(
                f"{path}: the folder {folder} does not exist: make it first"
            ) from None
        if read_only:
            raise StorageError(f"{path}: there is no such file") from None
        _refuse_long(path, "-journal")
        return
    except OSError as error:
        raise StorageError(
            f"{path}: its folder cannot be searched for it: {error.strerror}"
        ) from error
    if os.path.isdir(path):
        raise StorageError(f"{path}: this is a folder: name a file in it")
    if not os.path.isfile(path):  # to open a FIFO would wait for a writer
        raise StorageError(f"{path}: this is a FIFO, a socket or a device: name a file")


def open(
    target: str | os.PathLike[str],
    *,
    synchronous: str = "FULL",
    busy_timeout: float = 30.0,
    lease_seconds: float = 30.0,
    backoff: Callable[[int], float] | None = None,
    clock: Callable[[], datetime] | None = None,
    read_only: bool = False,
    keep: timedelta | None = None,
) -> Store:
    """Open a store, creating it with all its tables where there is none.

    `target`: a path, `"sqlite:///absolute"`, `"sqlite://relative"` or `":memory:"`.
    `synchronous`: FULL (acknowledged writes survive power loss), NORMAL (they survive a crash of
    the process) or OFF. `busy_timeout`: seconds to wait for other processes and transactions.
    `lease_seconds`: how long a claim lasts. `backoff`: seconds before attempt n of an item (default
    `min(2**n, 64)`). `clock`: the source of every "now". `read_only`: nothing in the database is
    changed. `keep`: what ended longer ago goes by itself, a few rows a second, with the writes of
    this store; it is what `prune(keep)` drops (None: nothing goes).

    Raises InvalidData for an option out of range, StorageError and SchemaError for a target that
    cannot be opened, which is left as it was."""
    mode = _text(synchronous, "synchronous").upper()
    if mode not in ("FULL", "NORMAL", "OFF"):
        raise InvalidData(f"synchronous: FULL, NORMAL or OFF is needed, not {synchronous!r}")
    _none_or(_check_callable, backoff, "backoff")
    _none_or(_check_callable, clock, "clock")
    options = SimpleNamespace(
        synchronous=mode,
        busy_timeout=min(_seconds(busy_timeout, "busy_timeout"), threading.TIMEOUT_MAX / 2),
        lease_seconds=_seconds(lease_seconds, "lease_seconds"),
        backoff=backoff,
        clock=clock,
        read_only=_check_type(bool, read_only, "read_only", "True or False"),
        keep=_none_or(_span_of, keep, "keep"),
    )
    _time_after(0, options.lease_seconds, "lease_seconds")
    if sqlite3.sqlite_version_info < (3, 35):
        raise StorageError(
            f"SQLite 3.35 or newer is needed, this Python has {sqlite3.sqlite_version}"
        )
    name, path = _parse_target(target)
    if path == "":
        return Store(_SERVERS[name.split(":")[0].lower()](name, options))
    if path is not None:
        path = os.path.realpath(path)
        _refuse_path(path, read_only)
    try:
        return Store(_Engine(name, path, options))
    except StorageError as error:
        cause = error.__cause__
        if path is None or not isinstance(cause, sqlite3.Error):
            raise
        raise _explain(cause, path, read_only) from cause


# ==================================================================================================
# Event loop: the same store for the tasks of one loop, awaited; a program without await can skip it
# ==================================================================================================


class _AsyncEngine:
    """An engine whose calls are awaited.

    One thread, the worker, writes for all tasks. It gets their writes in batches: while one batch
    is being committed, the next one gathers. The batch under way holds `turn`, or else the task
    whose transaction is open: a batch sent during a transaction would block the worker, which runs
    the statements of the transaction, too."""

    def __init__(self, engine: _Engine) -> None:
        import asyncio
        from concurrent.futures import ThreadPoolExecutor

        self.engine = engine
        self.loop = asyncio.get_running_loop()
        self.turn = asyncio.Semaphore(engine.max_writers)
        # Of blocks that only read: one that waited for a connection in a thread would keep that
        # thread from those that could give theirs back.
        self.read_turn = asyncio.Semaphore(engine.max_readers)
        self._waiting: list[_Call] = []  # for the next batch
        self._sender: asyncio.Task[None] | None = None
        self._is_committing = False  # a batch
        self._listening: dict[float, asyncio.Future[None]] = {}  # by the tick of those that wait
        self._tasks_waiting = 0
        self._closing: asyncio.Future[None] | None = None
        # On a server, writes run side by side. A block has a thread, and another one for its end,
        # which may have to wait for a cancelled statement. Other writes have threads of their own.
        threads = 1 if engine.max_writers == 1 else 2 * engine.max_writers
        self.worker = ThreadPoolExecutor(threads, "flowstore-writer")
        self._writers = ThreadPoolExecutor(_IDLE_READERS, "flowstore-beside")
        self._readers = ThreadPoolExecutor(_IDLE_READERS, "flowstore-reader")
        self._block_readers = ThreadPoolExecutor(2 * _IDLE_READERS, "flowstore-block-reader")
        self._others = ThreadPoolExecutor(32, "flowstore-aside")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def refuse_foreign(self) -> None:
        """StorageError in another loop, StoreClosed after close()."""
        import asyncio

        if asyncio.get_running_loop() is not self.loop:
            raise StorageError(
                "the store belongs to the event loop that opened it: open another one in this loop"
            )
        self.engine.refuse_closed()

    def in_thread(
        self, function: Callable[..., R], *args: Any, pool: Any = None
    ) -> asyncio.Future[R]:
        """Run something that blocks in a thread: of a pool, or of those for what takes long."""
        self.refuse_foreign()
        return self.loop.run_in_executor(pool or self._others, function, *args)

    # --- calls ---
    async def run(self, operation: _AnyMethod, facet: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Run an operation: in the task's open transaction, or in one of its own."""
        call = _Call(operation=operation, facet=facet, args=args, kwargs=kwargs)
        engine = self.engine
        while _blocks.get() and (block := engine.block()) is not None:
            with contextlib.suppress(_TransactionEnded):
                return await self.in_block(block, block.run, call)
        self.refuse_foreign()
        if operation.writes:
            engine.refuse_read_only()
        if engine.in_memory or (operation.writes and engine.max_writers == 1):
            return await self.send(call)
        pool = self._writers if operation.writes else self._readers
        return await self.in_thread(engine.run_pooled, call, pool=pool)

    async def in_block(self, block: _Block, function: Callable[..., R], *args: Any) -> R:
        """Run a statement of a block, while no other task has a transaction nested in it."""
        await self.wait_for_nested(block)
        try:
            return await self.in_thread(function, *args, pool=self.pool_of(block))
        finally:
            block.turn.release()

    def pool_of(self, block: _Block) -> Any:
        """The threads that run the statements of a block."""
        return self.worker if block.holds_writers else self._block_readers

    async def run_steps(
        self, method: _Method[Any, Any, R], facet: Any, /, *args: Any, **kwargs: Any
    ) -> R:
        """Walk through the steps of a method, awaiting those that can be awaited."""
        steps = method.function(facet, *args, **kwargs)
        outcome = None
        resume: Any = steps.send
        while True:
            try:
                step = resume(outcome)
            except StopIteration as end:
                return cast("R", end.value)
            try:
                outcome = await step if inspect.isawaitable(step) else step
                resume = steps.send
            except BaseException as error:
                outcome = error
                resume = steps.throw

    async def wait(self, seen: int, seconds: float, tick: float = 0.0) -> None:
        """Wait for a commit after the first `seen` ones, or for the time of the next look, which is
        later when many tasks wait.

        One thread waits for all tasks, and one for those with a longer tick."""
        import asyncio

        if self.engine.commits != seen:
            return
        listening = self._listening.get(tick)
        if listening is None or listening.done():
            pause = max(tick, min(0.05, self._tasks_waiting / 1000))
            listening = self.in_thread(self.engine.wait, seen, seconds, pause)
            listening.add_done_callback(asyncio.Future.exception)
            self._listening[tick] = listening
        self._tasks_waiting += 1
        try:
            await asyncio.wait([listening], timeout=seconds)
        finally:
            self._tasks_waiting -= 1

    # --- batches ---
    def send(self, call: _Call) -> asyncio.Future[Any]:
        """Have an operation run in a batch, behind those that were sent before."""
        call.deadline = _monotonic() + self.engine.options.busy_timeout
        future = call.future = self.loop.create_future()
        self._waiting.append(call)
        if self._sender is None:
            self._start_sender()
        return future

    def _start_sender(self, ended: object = None) -> None:
        """Start a task that sends the next batch, and another one after it while calls wait.

        At its end asyncio.run() cancels every task, this one too, but tasks that clean up may still
        write. So another one follows a cancelled one."""
        self._waiting = [call for call in self._waiting if not call.future.done()]
        self._sender = None
        if self._waiting:
            self._sender = self.loop.create_task(self._send_batch())
            self._sender.add_done_callback(self._start_sender)

    async def _send_batch(self) -> None:
        """Wait for the turn, then send the calls that wait. `_answer` gives the turn back."""
        first = self._waiting[0]
        try:
            await self.take_turn(self.turn, first.deadline)
            batch = [call for call in self._waiting[:_GROUP_MOST] if not call.future.done()]
            if not batch:  # all were cancelled
                self.turn.release()
                return
            sent = self.in_thread(self.engine.writer.run_batch, batch, pool=self.worker)
        except StorageError as error:  # the first call is late, or the store is closed
            if not first.future.done():
                first.future.set_exception(error)
            return
        del self._waiting[:_GROUP_MOST]
        self._is_committing = True
        sent.add_done_callback(functools.partial(self._answer, batch))

    def _answer(self, batch: list[_Call], sent: asyncio.Future[None]) -> None:
        self._is_committing = False
        self.turn.release()
        failure: Any = sent.exception()
        for call in batch:
            error = call.error or (failure and _copy_error(failure))
            if call.future.done():  # cancelled
                continue
            if error:
                call.future.set_exception(error)
            else:
                call.future.set_result(call.result)

    # --- turns ---
    async def take_turn(self, turn: Any, deadline: float) -> None:
        """Wait for the end of other tasks' batch or transaction; StoreBusy at the deadline."""
        while not await self._acquire(turn, deadline):
            if turn.locked() and not self._is_committing:
                raise self.engine.busy_error()
            deadline = _monotonic() + 0.01  # a commit does not hold the store

    async def wait_for_nested(self, block: _Block) -> None:
        """Wait until no other task has a transaction nested in a block, or a statement on its way.

        The caller releases the block's turn. StorageError after `busy_timeout`."""
        if not await self._acquire(block.turn, _monotonic() + self.engine.options.busy_timeout):
            raise StorageError(
                "another task has a transaction nested in this one: let it end first"
            )

    async def _acquire(self, turn: Any, deadline: float) -> bool:
        """Acquire a turn; False at the deadline. StoreClosed when the store is closed."""
        import asyncio

        # Where a test has frozen time, the loop's clock stands still, but threads sleep.
        is_frozen = not inspect.isbuiltin(time.monotonic)
        while True:
            self.refuse_foreign()
            left = max(0.0, deadline - _monotonic())
            try:
                async with asyncio.timeout(0.0 if is_frozen else left):
                    await turn.acquire()
            except TimeoutError:
                if not (is_frozen and left):
                    return False
                await self.in_thread(time.sleep, 0.01)
                continue
            if self.engine.closed:  # close() released the turn: wake the next one, too
                turn.release()
            self.engine.refuse_closed()
            return True

    async def close(self) -> None:
        """Close every connection; calls under way finish, those that wait get StoreClosed."""
        import asyncio

        if self._closing is None:
            self._closing = self.in_thread(self.engine.close)
            self._closing.add_done_callback(self._end_waiting)
        await asyncio.shield(self._closing)

    def _end_waiting(self, closing: object) -> None:
        pools = self.worker, self._readers, self._block_readers, self._writers, self._others
        for pool in pools:
            pool.shutdown(wait=False)
        self.turn.release()
        self.read_turn.release()


class AsyncTransaction:
    """An open transaction of an async store, for the user's own SQL in the same database."""

    def __init__(self, engine: _AsyncEngine, transaction: Transaction) -> None:
        self._engine = engine
        self._transaction = transaction

    async def execute(
        self, sql: str, parameters: Sequence[Any] | Mapping[str, Any] = ()
    ) -> list[tuple[Any, ...]]:
        """Run one statement of the user's own and return its rows; errors as in `Transaction`."""
        block = self._transaction._innermost()
        return await self._engine.in_block(block, block.execute, sql, parameters)

    async def executemany(
        self, sql: str, rows: Iterable[Sequence[Any] | Mapping[str, Any]]
    ) -> None:
        """Run one statement for each of the rows; errors as with `execute`."""
        block = self._transaction._innermost()
        await self._engine.in_block(
            block, functools.partial(block.execute, many=True), sql, _parameter_rows(rows)
        )


class _AsyncBlock:
    """`async with store.transaction()`: all that its task does in it is stored, or nothing."""

    def __init__(self, engine: _AsyncEngine, read_only: bool) -> None:
        self._engine = engine
        self._block = _Block(engine.engine, read_only)
        self._turn = contextlib.ExitStack()  # releases what the block holds: the engine's turn,
        # or that of the block in which it is nested

    async def __aenter__(self) -> AsyncTransaction:
        import asyncio

        engine = self._engine
        block = self._block
        block.bind(0, asyncio.current_task())
        block.turn = asyncio.Lock()
        while True:
            deadline = _monotonic() + engine.options.busy_timeout
            if block.parent is not None:
                await engine.wait_for_nested(block.parent)
                self._turn.callback(block.parent.turn.release)
            else:
                turn = engine.turn if block.holds_writers else engine.read_turn
                await engine.take_turn(turn, deadline)
                self._turn.callback(turn.release)
            begun = engine.in_thread(block.begin, deadline, pool=engine.pool_of(block))
            begun.add_done_callback(asyncio.Future.exception)  # else asyncio may report it
            try:
                await asyncio.shield(begun)
                return AsyncTransaction(engine, block.activate())
            except _TransactionEnded:  # the outer block has ended: this one begins by itself
                self._turn.close()
                block.parent = engine.block()
            except BaseException:
                # The task may be cancelled while a thread still begins the block. The rollback
                # comes behind that, and before any later call.
                if block.leads:
                    self._roll_back()
                else:
                    begun.add_done_callback(self._roll_back)
                raise

    def _finish(self, commit: bool) -> asyncio.Future[None]:
        """End the block in the worker, then its turn, even where the task is cancelled."""
        pool = self._engine.pool_of(self._block)
        ended = self._engine.in_thread(self._block.finish, commit, pool=pool)
        ended.add_done_callback(self._end_turn)
        return ended

    def _end_turn(self, ended: asyncio.Future[None]) -> None:
        ended.exception()  # else asyncio may report it
        self._turn.close()

    def _roll_back(self, begun: object = None) -> None:
        with contextlib.suppress(StorageError):  # the store is closed
            self._finish(False)

    def __del__(self) -> None:
        if self._block.begun:  # its task was collected, and its end was not run
            with contextlib.suppress(RuntimeError):  # the loop has ended, too
                self._engine.loop.call_soon_threadsafe(self._roll_back)

    async def __aexit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        import asyncio

        block = self._block
        undo = block.undo
        may_end = False
        try:
            await self._engine.wait_for_nested(block)
            may_end = True
            await asyncio.shield(self._finish(kind is None))
        except StorageError:
            if kind is None:
                raise  # else what the block raised says more
        except BaseException:  # it was cancelled, and perhaps committed all the same
            for each in undo:
                each()
            raise
        finally:
            if may_end:
                block.turn.release()
            else:  # the task was cancelled, or another one goes on in the block
                self._roll_back()
            block.deactivate()


# --- the same facets, awaited ---
class _AsyncFacet(_Facet):
    """A facet whose methods are awaited."""

    def _owner(self) -> object:
        """The task that does a run, or a branch of it."""
        import asyncio

        return asyncio.current_task()

    def _is_live(self, owner: Any) -> bool:
        return not owner.done()


class AsyncFlowStore(_AsyncFacet, FlowStore):
    """`FlowStore`, awaited."""


class AsyncEventStore(_AsyncFacet, EventStore):
    """`EventStore`, awaited; its generators are for `async for`."""

    def iter_events(  # type: ignore[override]
        self, execution_id: AnyId, after_seq: int = 0, *, chunk: int = 1000
    ) -> AsyncIterator[StoredEvent]:
        """`EventStore.iter_events` for `async for`."""
        return super().iter_events(execution_id, after_seq, chunk=chunk)  # type: ignore[return-value]

    def tail(  # type: ignore[override]
        self,
        after_position: int | None = None,
        *,
        timeout: float | None = None,
        tenant_id: AnyId | None = None,
        execution_id: AnyId | None = None,
    ) -> AsyncIterator[StoredEvent]:
        """`EventStore.tail` for `async for`."""
        return super().tail(  # type: ignore[return-value]
            after_position, timeout=timeout, tenant_id=tenant_id, execution_id=execution_id
        )

    def _tail_start(  # pyright: ignore[reportIncompatibleVariableOverride]
        self, after: int | None, execution_id: str | None
    ) -> Any:
        # The cursor is that of the call, not of the first event that is awaited. In memory, it is
        # behind the writes that were sent before.
        operation = EventStore.__dict__["_tail_start"]
        call = _Call(operation=operation, facet=self, args=(after, execution_id), waits=False)
        self._engine.refuse_foreign()
        if not self._engine.in_memory:
            return self._engine.run_pooled(call)
        start = self._engine.send(call)
        # Else asyncio may report its error, where nobody goes through the tail.
        start.add_done_callback(lambda done: done.cancelled() or done.exception())
        return start

    async def _generate(self, cursor: Any, behind: Callable[[_LogCursor], Any]) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        cursor = await cursor if inspect.isawaitable(cursor) else cursor
        while events := await behind(cursor):
            for event in events:
                yield event
            cursor = _LogCursor(events[-1].position, events[-1].sequence, cursor.omit)


class AsyncStateBackend(_AsyncFacet, StateBackend):
    """`StateBackend`, awaited."""

    def hold(  # type: ignore[override]
        self, item: WorkItem, *, lease_seconds: float | None = None
    ) -> AsyncHold:
        """`StateBackend.hold` for `async with`."""
        return AsyncHold(self, item, self._lease(lease_seconds))


class AsyncHold(_LeaseKeeper):
    """`async with state.hold(item)`: a lease that is renewed while the block runs.

    `lost` tells when it was lost."""

    async def __aenter__(self) -> AsyncHold:
        self.expires = await self._state.renew_lease(self.item, lease_seconds=self.lease_seconds)
        self._start()
        return self

    def _start(self) -> None:
        import asyncio

        engine = self._state._engine
        self._owners.add(asyncio.current_task())
        self._task = engine.loop.create_task(self._keep()) if engine.block() is None else None

    async def _keep(self) -> None:
        import asyncio

        while True:
            await asyncio.sleep(self._interval)
            if not (
                self._state._engine.has_block(*self._owners)
                or await self._state._renew_lease_of(self)
            ):
                return

    async def _stop(self) -> bool:
        import asyncio

        if self._task is None:
            return False
        goes_on: bool = self._task.cancel()
        await asyncio.wait([self._task])
        return goes_on

    async def __aexit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if await self._stop():
            await self._state._renew_lease_of(self)
        self._end(kind)


class AsyncPersistenceProvider(_AsyncFacet, PersistenceProvider):
    """`PersistenceProvider`, awaited."""


class AsyncRun(_AsyncFacet, Run):
    """`Run`, awaited; the function of a step may be a coroutine function.

    In a transaction, an error undoes what a step wrote only in the task that opened it. Steps of
    other tasks go on side by side there, so they have no savepoints."""

    async def _in_savepoint(self, steps: _Steps[Any]) -> Any:
        block = self._engine.block()
        if block is None or block.owner is not self._owner():
            return await self._walk(steps)
        async with _AsyncBlock(self._engine, False):
            return await self._walk(steps)


class AsyncRuns(_AsyncFacet, Runs):
    """`Runs`, awaited; the functions of runs may be coroutine functions."""

    _run_type = AsyncRun

    def _is_of_function(self, error: BaseException) -> bool:
        import asyncio

        if isinstance(error, asyncio.CancelledError):  # of the worker, or of another task
            return not cast("Any", asyncio.current_task()).cancelling()
        return super()._is_of_function(error)

    async def work(  # type: ignore[override]
        self,
        *functions: Callable[..., Any],
        concurrency: int = 1,
        queues: Collection[AnyId] | None = None,
        worker_id: AnyId | None = None,
        stop: asyncio.Event | None = None,
        until_idle: bool = False,
    ) -> int:
        """`Runs.work` with `concurrency` tasks. When `stop` is set, they are cancelled."""
        import asyncio

        crew = _Crew(self, functions, concurrency, queues, worker_id, stop, until_idle)

        create_task = self._engine.loop.create_task
        tasks = [create_task(self._serve(crew)) for _ in range(concurrency)]
        watches = [] if stop is None else [create_task(stop.wait())]
        try:
            while not crew.stops() and not all(task.done() for task in tasks):
                going = [task for task in tasks if not task.done()]
                await asyncio.wait(
                    [*going, *watches], timeout=crew.interval, return_when=asyncio.FIRST_COMPLETED
                )
                await self._renew(crew)
        finally:
            crew.is_ending = True
            # A task that claims a run at this moment gives it back.
            for task in [*filter(crew.under_way.__contains__, tasks), *watches]:
                if not task.cancelling():  # else it is giving its run back
                    task.cancel()
            await asyncio.wait([*tasks, *watches])
            # Asked for even where this task was cancelled: else asyncio reports them.
            errors = [task.exception() for task in tasks if not task.cancelled()]
        for error in filter(None, errors):
            raise error
        return crew.ended


class _TaskRunBlock(_RunBlock):
    """`async with store.run(id) as run:` a run that is done by this task."""

    async def __aenter__(self) -> AsyncRun:
        return cast("AsyncRun", await self.runs._enter(self))

    async def __aexit__(self, kind: object, error: Any, traceback: object) -> None:
        try:
            await self.runs._leave(self, error)
        finally:
            if self.hold is not None:  # a lost lease was told of by now
                await self.hold._stop()


class AsyncStore(_AsyncFacet, _StoreBase):
    """`Store` for the tasks of one event loop: the same facets and promises, awaited."""

    def __init__(self, engine: _AsyncEngine) -> None:
        super().__init__(engine)
        self.flows = AsyncFlowStore(engine)
        """Flows, their steps and their audit trail: `FlowStore`, awaited."""
        self.events = AsyncEventStore(engine)
        """The execution log: `EventStore`, awaited."""
        self.state = AsyncStateBackend(engine)
        """Executions, the work queue, tenants and what belongs to them: `StateBackend`, awaited."""
        self.workflows = AsyncPersistenceProvider(engine)
        """Workflow instances, events, subscriptions, commands: `PersistenceProvider`, awaited."""
        self.runs = AsyncRuns(engine, self.state)
        """Durable functions: `Runs`, awaited."""

    async def __aenter__(self) -> AsyncStore:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    def transaction(
        self, *, read_only: bool = False
    ) -> contextlib.AbstractAsyncContextManager[AsyncTransaction]:
        """`async with store.transaction() as tx:` all that is done in it is stored, or nothing.

        That is what this task does, and the tasks that it starts in it. Writes of other tasks wait
        for its end, their reads go on. Otherwise it is as `Store.transaction`."""
        return _AsyncBlock(self._engine, _bool(read_only, "read_only") == 1)

    def run(
        self,
        id: AnyId,
        *,
        workflow_id: AnyId = "script",
        input: Json = None,
        lease_seconds: float | None = None,
        wait: float | None = None,
    ) -> contextlib.AbstractAsyncContextManager[AsyncRun]:
        """`async with store.run(id) as run:` as `Store.run`, in this task.

        A task that is cancelled only breaks it off."""
        return _TaskRunBlock(self.runs, id, workflow_id, input, lease_seconds, wait)


class AsyncOpening:
    """What `open_async` returns: the store when awaited, and a context manager that closes it."""

    def __init__(self, opening: Callable[[], Store]) -> None:
        self._opening = opening

    def __await__(self) -> Generator[Any, Any, AsyncStore]:
        return self.__aenter__().__await__()

    async def __aenter__(self) -> AsyncStore:
        import asyncio

        store = await asyncio.to_thread(self._opening)
        self._store = AsyncStore(_AsyncEngine(store._engine))
        return self._store

    async def __aexit__(self, *exception: object) -> None:
        await self._store.close()


def open_async(
    target: str | os.PathLike[str],
    *,
    synchronous: str = "FULL",
    busy_timeout: float = 30.0,
    lease_seconds: float = 30.0,
    backoff: Callable[[int], float] | None = None,
    clock: Callable[[], datetime] | None = None,
    read_only: bool = False,
    keep: timedelta | None = None,
) -> AsyncOpening:
    """Open a store for the tasks of the running event loop, in which every call is awaited.

    `async with open_async(...) as store:` closes it at the end; `store = await open_async(...)`
    leaves that to `await store.close()`. Arguments and errors are those of `open`."""
    return AsyncOpening(
        functools.partial(
            open,
            target,
            synchronous=synchronous,
            busy_timeout=busy_timeout,
            lease_seconds=lease_seconds,
            backoff=backoff,
            clock=clock,
            read_only=read_only,
            keep=keep,
        )
    )


# ==================================================================================================
# Views: what is stored, to look at: one model, drawn as text, HTML, JSON and metrics
# ==================================================================================================

# A view is read in a short time, however much the store holds: counts stop at a bound, lists have a
# limit, and the database cuts long texts.
_COUNT_BOUND = 200_000  # counting takes 80 ns per row
_LOG_BOUND = 1000  # newest events from which the throughput and the longest log are told
_SETTLED_BOUND = 2000  # items of a settled status that are counted by queue
_QUEUE_LIMIT = 100
_OVERVIEW_ROWS = 20
_DETAIL_ROWS = 200
_TEXT_BOUND = 4000

_Row: TypeAlias = "dict[str, Any]"
_RowList: TypeAlias = "list[tuple[Any, ...]]"


class View(dict[str, Any]):
    """What can be looked at, in plain values: text as `str()`, HTML in a notebook.

    Every view has a `kind`, an `id`, a `status`, `facts` by name and `tables` by name; a table has
    `rows` and the `total` of rows in the store. An overview has `counts` too, by kind and status.
    A detail has `steps`; each of the `parts` of a step is of a class (`what`) and lasts `from` one
    time `to` another."""

    def __repr__(self) -> str:
        return _render_text(self)


# --- the model: what can be viewed ---
class _Kind(NamedTuple):
    """A kind of record that overviews count and list.

    `changed_at` is SQL of the time by which the index `by` sorts the records of one status. The
    `tables` of a detail have rows of one mapper, which SQL finds by the id, the newest first."""

    name: str
    facet: type[_Facet]
    mapper: _Mapper[Any]
    statuses: type[StrEnum]
    changed_at: str
    by: str
    tables: dict[str, tuple[_Mapper[Any], str]]

    def source(self, status: str) -> str:
        """SQL of the records of a status, sorted by an index."""
        index = self.by
        column = "status"
        if self.mapper is _DEAD:
            index = _STATUS_INDEX.get(status, index)
            column = "{any_status}" if status == "claimed" else "{status}"
            if status not in ("pending", "claimed"):
                column = "settled_at IS NOT NULL AND {status}"
        return f"{self.mapper.table} {{by {index}}} WHERE {column} = '{status}' {{tenant}}"


_open_subscriptions = """event_subscriptions {{by event_subscriptions_by_workflow}}
    WHERE workflow_id = ? AND terminated_at IS NULL AND {} ORDER BY workflow_id""".format
_EXECUTIONS = _Kind(
    "executions",
    _LogFacet,
    _RUN,
    ExecutionStatus,
    "updated_at",
    "flowstore_runs_by_status|flowstore_runs_by_tenant_status",
    {
        "events": (
            _STORED,
            f"""flowstore_log {{by {_LOG_KEY}}} WHERE execution_id = ? {{tenant}}
            ORDER BY sequence DESC""",
        ),
        "work items": (
            _DEAD,
            """flowstore_work_items {by flowstore_items_by_execution}
            WHERE execution_id = ? {tenant} ORDER BY id DESC""",
        ),
        "waits": (_SUBSCRIPTION, _open_subscriptions(_IS_RUN_WAIT)),
    },
)
_FLOWS = _Kind(
    "flows",
    FlowStore,
    _FLOW,
    FlowStatus,
    "updated_at",
    "flows_by_status",
    {
        "events": (
            _FLOW_EVENT,
            "flow_events {by flow_events_by_flow} WHERE flow_id = ? ORDER BY id DESC",
        ),
        "steps": (
            _STEP,
            """flow_steps {by flow_steps_by_flow} WHERE flow_id = ?
            ORDER BY created_at DESC, id DESC""",
        ),
    },
)
_WORKFLOWS = _Kind(
    "workflows",
    PersistenceProvider,
    _INSTANCE,
    WorkflowStatus,
    "COALESCE(complete_time, create_time)",
    "workflows_by_age",
    {
        "pointers": (
            _POINTER,
            """execution_pointers {by execution_pointers_in_order} WHERE workflow_id = ?
            ORDER BY place DESC, id DESC""",
        ),
        "subscriptions": (_SUBSCRIPTION, _open_subscriptions(f"NOT {_IS_RUN_WAIT}")),
        "errors": (
            _ERROR,
            """execution_errors {by execution_errors_by_workflow} WHERE workflow_id = ?
            ORDER BY id DESC""",
        ),
    },
)
_WORK_ITEMS = _Kind(
    "work items",
    StateBackend,
    _DEAD,
    WorkItemStatus,
    "settled_at",
    "flowstore_settled",
    {},
)
_DETAILED = (_EXECUTIONS, _FLOWS, _WORKFLOWS)
_KINDS = (*_DETAILED, _WORK_ITEMS)
_STATUSES = {status for kind in _KINDS for status in kind.statuses}


# --- the model: what is read from the store ---
_LONG_CODECS = (_text, _ref, _json, _texts, _json_object)  # of columns with texts of any length
_CUT = f"""CASE WHEN LENGTH(column) <= {_TEXT_BOUND} THEN column
    ELSE SUBSTR(column, 1, {_TEXT_BOUND}) || '... (cut)' END"""
_OLDEST = _Sql(f"""SELECT priority, available_at {_IN_QUEUE} AND priority < ? {{tenant}}
    ORDER BY priority DESC, available_at LIMIT 1""")
_OLDEST_LEASE = _Sql("""SELECT lease_expires_at FROM flowstore_work_items {by flowstore_leased}
    WHERE {any_status} = 'claimed' AND {queue_type} = ? {tenant}
    ORDER BY lease_expires_at LIMIT 1""")
_LAST_EVENTS = _Sql(f"""SELECT execution_id, timestamp, position, sequence FROM {_LOG_IN_ORDER}
    WHERE execution_id <> '' {{tenant}} ORDER BY position DESC LIMIT {_LOG_BOUND}""")
# What waits in the workflows' tables. Each `?` stands for the time in milliseconds.
_BACKLOG = {
    "open_subscriptions": """event_subscriptions {by event_subscriptions_open}
        WHERE terminated_at IS NULL""",
    "unprocessed_events": "events {by events_runnable} WHERE is_processed = 0",
    "due_commands": "scheduled_commands {by scheduled_commands_by_time} WHERE execute_time <= ?",
    "later_commands": "scheduled_commands {by scheduled_commands_by_time} WHERE execute_time > ?",
}
# The columns that count the items of a queue, and their statuses.
_QUEUE_COUNTS = {
    "waiting": "pending",
    "leased": "claimed",
    "dead": "dead_lettered",
    "completed": "completed",
    "failed": "failed",
}


def _first_value(row: _Row, *names: str) -> Any:
    """The value of the first of these fields that has one, or ""."""
    return next((row[name] for name in names if row.get(name) not in (None, "")), "")


def _log_facts(log: _RowList) -> _Row:
    """The last position in the log, how fast the last events came, and the longest log of them."""
    if not log:
        return {}
    ids, times, positions, sequences = zip(*log, strict=True)
    seconds = _format_value((times[0] - times[-1]) / 1e6, "_seconds")
    length, id = max(zip(sequences, ids, strict=True))
    return {
        "last_position": positions[0],
        "throughput": f"{_plural(len(log), 'events')} in {seconds}",
        "longest_recent_log": f"{_plural(length, 'events')} of {id}",
    }


@dataclass
class _ViewReader:
    """Reads what the views of one facet show; a tenant's facet has the tenant's rows alone.

    A `source` is SQL: a table, its index and a condition, with a {tenant} as `_Sql` needs it."""

    facet: Any
    tx: _Tx

    def value(self, sql: _Sql, *params: Any) -> Any:
        """The first value of the first row, None without a row."""
        row = self.facet._row(self.tx, sql, *params)
        return row[0] if row else None

    def count(self, source: str, *params: Any) -> int | str:
        """The number of rows; a text when there are more than the bound."""
        rows = f"SELECT 1 FROM {source} LIMIT {_COUNT_BOUND + 1}"
        count: int = self.value(_statement(f"SELECT COUNT(*) FROM ({rows}) counted"), *params)
        return count if count <= _COUNT_BOUND else f"{_COUNT_BOUND}+"

    def records(self, mapper: _Mapper[Any], source: str, *params: Any) -> list[_Row]:
        """Records as dicts. Long texts and JSON are cut; JSON that is cut stays a text."""
        columns = [
            _CUT.replace("column", name) if encode in _LONG_CODECS else name
            for name, encode in mapper.encoders.items()
        ]
        sql = _statement(f"SELECT {', '.join(columns)} FROM {source}")
        records = []
        for row in self.facet._rows(self.tx, sql, *params):
            record = dict(zip(mapper.fields, row, strict=True))
            for name, decode in mapper.decoders.items():
                # None stays, and so does what cannot be read: a view shows what is stored. But
                # views compute with times.
                try:
                    record[name] = decode(record[name])
                except (StoreCorrupt, *_UNREADABLE):
                    if decode is _datetime_of and record[name] not in (None, _RUN_WAIT_AS_OF):
                        raise
            records.append(record)
        return records

    def record(self, mapper: _Mapper[Any], id: str) -> _Row | None:
        """The record of an id; of an execution that has only a log, its id and its tenant."""
        rows = self.records(mapper, f"{mapper.table} WHERE {mapper.key} = ? {{tenant}}", id)
        if rows:
            return rows[0]
        owner = self.value(_EXECUTION_TENANT, id) if mapper is _RUN else None
        return {"execution_id": id, "tenant_id": owner} if owner else None

    def overview(self, status: str | None) -> View:
        """What a store, a facet or a tenant has; with a status, only records of it are listed."""
        if status and status not in _STATUSES:
            raise InvalidData(f"status: {status[:50]!r} is no status of anything in a store")
        facet = self.facet
        is_store = isinstance(facet, _StoreBase)
        kinds = [kind for kind in _KINDS if is_store or isinstance(facet, kind.facet)]
        now = self.tx.now()
        facts = {"store": facet.target, **facet._engine.sizes(self.tx)} if is_store else {}
        facts |= {"tenant_id": facet._tenant, "read_at": _datetime_of(now)}
        counts = {}
        tables = {}
        if _WORK_ITEMS in kinds:
            queues = self.queues(now)
            tables["queues"] = {"rows": queues, "total": len(queues)}
        for kind in kinds:
            counts[kind.name], rows = self.by_status(kind, status)
            if kind is _EXECUTIONS:
                log = [] if status else facet._rows(self.tx, _LAST_EVENTS)
                facts |= _log_facts(log)
                rows = self.last_appended(log, rows)
            total = len(rows) if len(rows) < _OVERVIEW_ROWS else f"{_OVERVIEW_ROWS}+"
            tables[f"{kind.mapper.kind}s"] = {"rows": rows, "total": total}
        if _WORKFLOWS in kinds:
            for name, source in _BACKLOG.items():
                facts[name] = self.count(source, *[now // 1000] * source.count("?"))
        return View(
            kind="overview",
            id=facet._tenant,
            status=status,
            facts=facts,
            counts=counts,
            tables=tables,
        )

    def by_status(self, kind: _Kind, wanted: str | None) -> tuple[_Row, list[_Row]]:
        """How many records have each status, and the records that changed last.

        Only records of the status `wanted` are listed, and of work items the dead letters."""
        statuses = self.item_statuses() if kind is _WORK_ITEMS else kind.statuses
        order = f"ORDER BY {kind.changed_at} DESC, {kind.mapper.key} DESC LIMIT {_OVERVIEW_ROWS}"
        counts = {}
        rows: list[_Row] = []
        for status in map(str, statuses):
            source = kind.source(status)
            count = self.count(source)
            if count:
                counts[status] = count
            is_listed = kind is not _WORK_ITEMS or status == "dead_lettered"
            if is_listed and wanted in (None, status):
                rows += self.records(kind.mapper, f"{source} {order}")
        times = ("dead_lettered_at", "updated_at", "complete_time", "create_time")
        rows.sort(key=lambda row: _first_value(row, *times), reverse=True)
        return counts, rows[:_OVERVIEW_ROWS]

    def last_appended(self, log: _RowList, changed: list[_Row]) -> list[_Row]:
        """The executions of the newest events, then those whose records changed last."""
        ids = [execution for execution, *_ in log]
        ids += [row["execution_id"] for row in changed]
        rows = []
        for id in itertools.islice(dict.fromkeys(ids), _OVERVIEW_ROWS):
            row = self.record(_RUN, id) or {"execution_id": id}
            rows.append(row | {"events": self.value(_LOG_LAST, id) or 0})
        return rows

    def item_statuses(self) -> Iterable[str]:
        """The statuses by which items are counted: a tenant's other items have no index."""
        return WorkItemStatus if self.facet._tenant is None else _STATUS_INDEX

    def last_ended(self, status: str) -> Mapping[str, int | str]:
        """By queue, how many of the items are in it that ended last in this status."""
        source = f"{_WORK_ITEMS.source(status)} ORDER BY settled_at DESC LIMIT {_SETTLED_BOUND}"
        rows = self.facet._rows(self.tx, _statement(f"SELECT queue_type FROM {source}"))
        counts = Counter(queue for (queue,) in rows)
        if len(rows) < _SETTLED_BOUND:
            return counts
        return {queue: f"{count}+" for queue, count in counts.items()}

    def busy_queues(self) -> Iterator[str]:
        """The queues with pending items, then those with leased ones, by one seek for each.

        The index sorts the items of a status by queue."""
        for following in _NEXT_QUEUE.values():
            queue = ""
            while queue := self.value(following, queue):
                yield queue

    def oldest_seconds(self, queue: str, now: int) -> float | None:
        """How long the oldest pending item has been available; a seek for each priority."""
        priority = _ABOVE_ALL
        times = []
        while row := self.facet._row(self.tx, _OLDEST, queue, priority):
            priority, available_at = row
            times.append(available_at)
        return max(0, now - min(times)) / 1e6 if times else None

    def queues(self, now: int) -> list[_Row]:
        """The queues with a policy, or with items that wait, are leased or have ended lately."""
        source = f"flowstore_queues ORDER BY queue_type LIMIT {_QUEUE_LIMIT}"
        policies = {row.pop("queue_type"): row for row in self.records(_POLICY, source)}
        ended = {
            status: self.last_ended(status)
            for status in self.item_statuses()
            if status not in _NEXT_QUEUE
        }
        busy = itertools.islice(self.busy_queues(), 2 * _QUEUE_LIMIT)
        names = dict.fromkeys(itertools.chain(policies, busy, *ended.values()))
        rows = []
        for queue in sorted(itertools.islice(names, _QUEUE_LIMIT)):
            row = {"queue": queue, "oldest_seconds": self.oldest_seconds(queue, now)}
            for column, status in _QUEUE_COUNTS.items():
                if status in ended:
                    row[column] = ended[status].get(queue, 0)
                elif status in _NEXT_QUEUE:
                    source = f"{_WORK_ITEMS.source(status)} AND {{queue_type}} = ?"
                    row[column] = self.count(source, queue)
            lease = self.value(_OLDEST_LEASE, queue)
            row["lease_expires_at"] = lease and _datetime_of(lease)
            rows.append(policies.get(queue, {}) | row)
        return rows

    def detail(self, kind: _Kind, id: str) -> View | None:
        """All about one execution, flow or workflow."""
        facts = self.record(kind.mapper, id)
        if facts is None:
            return None
        status = facts.pop("status", None)
        now = _datetime_of(self.tx.now())
        if _status_class(status) not in _ONGOING:
            # It has ended, and its steps have ended with it.
            now = _first_value(facts, "complete_time", "updated_at") or now
        tables = {}
        steps: list[_Row] = []
        for name, (mapper, source) in kind.tables.items():
            rows = self.records(mapper, f"{source} LIMIT {_DETAIL_ROWS}", id)
            rows.reverse()
            tables[name] = {"total": self.count(source, id), "rows": rows}
            if mapper is _STORED:
                steps += _steps_from_log(rows, now)
            for row in rows:
                if name == "waits":
                    row["step_name"] = f"wait {row['execution_pointer_id']}"
                    row["status"] = "waiting"
                    since, until, _ = row.pop("subscription_data")
                    row["start_time"] = row["subscribe_as_of"] = _datetime_of(since)
                    if until < _LAST_TIME:
                        row["until"] = _datetime_of(until)
                elif mapper is _DEAD and row["status"] == "pending":
                    row["due_at"] = row["available_at"]
                if "status" in row:
                    steps.append(_step_from_row(row, now))
        return View(
            kind=kind.mapper.kind,
            id=id,
            status=status,
            facts=facts,
            steps=steps,
            tables=tables,
        )


@_snapshot
def _views(facet: _Facet, tx: _Tx, id: str | None = None, status: str | None = None) -> list[View]:
    """The overview, or the details of an id: of the execution, the flow and the workflow.

    The id of a work item leads to its execution."""
    reader = _ViewReader(facet, tx)
    if id is None:
        return [reader.overview(status)]
    # Flows and workflows belong to no tenant.
    kinds = _DETAILED if facet._tenant is None else (_EXECUTIONS,)
    details = [reader.detail(kind, _id(id, "id")) for kind in kinds]
    if not any(details) and (item := reader.record(_ITEM, id)):
        details = [reader.detail(_EXECUTIONS, item["execution_id"])]
    if not any(details):
        raise NotFound(" or ".join(kind.mapper.kind for kind in kinds), id)
    return [view for view in details if view]


def _read_views(facet: Any, *which: str | None) -> Any:
    """Run `_views` with an id and a status. An async store runs it too, without its event loop."""
    engine = getattr(facet._engine, "engine", facet._engine)
    try:
        return engine.run(_views, facet, *which)
    except FlowStoreError:
        raise
    except _UNREADABLE as error:
        raise StoreCorrupt(f"a stored value cannot be read: {error!r}") from error


# --- the model: the steps of a detail ---
# Statuses by class; the class decides colour and letter. Every other status is of class waiting.
_STATUS_CLASSES = re.compile(
    "(?P<running>running|started|resumed|claimed|runnable)"
    "|(?P<done>completed|succeeded|finished|complete)"
    "|(?P<failed>failed|timed_out|dead_lettered|limit_exceeded|terminated)"
    "|(?P<lost>lost|cancelled|skipped|compensated)"
)
_ONGOING = ("waiting", "running")
_STEP_EVENT = re.compile(f"(.+)_({_STATUS_CLASSES.pattern}|discovered|scheduled|paused)")
# The fields of an event that may name its step; the first one that is there does.
_STEP_KEYS = re.findall(
    r"\w+", "step step_id node_id node call_id tool_call_id tool tool_name name task"
)


_Changes: TypeAlias = "list[tuple[str, datetime]]"  # each status, and the time of its begin


def _status_class(status: object) -> str:
    """The class of a status; it may be followed by a comma and more."""
    match = _STATUS_CLASSES.fullmatch(str(status).lower().partition(",")[0])
    return str(match.lastgroup) if match else "waiting"


def _step_from_row(row: _Row, now: datetime) -> _Row:
    """The step that a row stands for: a flow's step, a workflow's pointer, a work item, a wait."""
    name = _first_value(row, "task", "step_name", "node_id", "run_id", "queue_type", "step_id")
    start = _first_value(row, "start_time", "claimed_at", "available_at", "created_at") or now
    status = row["status"]
    changes: _Changes = []
    if row.get("claimed_at"):
        changes.append(("waiting", min(start, row["available_at"])))
    if _status_class(status) in _ONGOING:
        changes.append((status, start))
    else:
        end = _first_value(row, "end_time", "settled_at", "updated_at") or start
        changes += [("running", start), (status, end)]
    retries = _first_value(row, "attempt", "retry_count") or 0
    return _step(str(name), changes, now) | {"attempts": retries + 1}


def _steps_from_log(events: list[_Row], now: datetime) -> list[_Row]:
    """The steps that a log tells of, by events such as step_started and tool_call_failed."""
    changes: dict[str, _Changes] = {}
    for row in events:
        event = row["event"]
        match = isinstance(event, dict) and _STEP_EVENT.fullmatch(event["type"])
        if not match:
            continue
        kind, status = match.group(1, 2)
        name = f"{kind} {_first_value(event, *_STEP_KEYS)}".strip().removeprefix("step ")
        at = row["timestamp"]
        begun = changes.setdefault(name, [])
        # An event of another program may lack these fields, or mean something else by them.
        with contextlib.suppress(LookupError, TypeError, ValueError, OverflowError):
            if kind == "sleep":
                until = datetime.fromisoformat(event["until"])
                begun.append(("waiting", at))
                if until <= now:
                    begun.append(("completed", until))
                continue
            begun.append(("started", at - timedelta(seconds=event["seconds"])))
        begun.append((status, at))
    return [_step(name, changes[name], now) for name in changes]


def _step(name: str, changes: _Changes, now: datetime) -> _Row:
    """A step, with a part between each two of its changes."""
    statuses = [status for status, _ in changes]
    classes = [(_status_class(status), at) for status, at in changes]
    first, start = classes[0]
    if first not in _ONGOING:
        # The start is not in the log, or lies before the events that are shown.
        classes.insert(0, ("running", start))
    if classes[-1][0] in _ONGOING:
        classes.append(("waiting", now))
    parts = []
    for (what, start), (following, end) in itertools.pairwise(classes):
        shown = "waiting"  # before the first attempt, or between two
        if what == "running":
            # A step that started twice without an end has lost its worker.
            shown = {"waiting": "running", "running": "lost"}.get(following, following)
        parts.append({"what": shown, "from": start, "to": max(start, end)})
    attempts = statuses.count("started")
    return {"name": name, "status": statuses[-1], "parts": parts, "attempts": attempts}


# --- what text and HTML have in common ---
# The columns that tables show, in this order, where any row has a value in it.
_COLUMNS = re.findall(
    r"\w+",
    """
    queue waiting oldest_seconds leased dead paused max_running rate per_seconds
    sequence timestamp at error_time execution_id id kind step time step_id step_name run_id node_id
    queue_type task name goal current_step status due_at last_error message attempt retry_count
    workflow_id events worker_id event_name event_key event until
    payload result outcome priority unique_key lease_expires_at dead_lettered_at sleep_until
    tenant_id updated_at complete_time
    """,
)
_EMPTY: tuple[Any, ...] = (None, "", [], {})
_json_text = functools.partial(json.dumps, ensure_ascii=False, default=str)
_AXIS_WIDTH = 34
_LETTERS = {
    "event": "|",
    "waiting": ".",
    "running": "=",
    "done": "#",
    "failed": "x",
    "lost": "~",
}


# The parts of a step: the class, the start and the end of each, on an axis from 0 to 1.
_Bars: TypeAlias = "list[tuple[str, float, float]]"


def _bars_text(bars: _Bars) -> str:
    """A line of letters."""
    cells = [" "] * _AXIS_WIDTH
    for what, start, end in bars:
        first = round(start * (_AXIS_WIDTH - 1))
        last = round(end * (_AXIS_WIDTH - 1))
        cells[first : last + 1] = _LETTERS[what] * (last + 1 - first)
    return "".join(cells)


def _label(name: str) -> str:
    return re.sub("_(bytes|seconds|id)$", "", name).replace("_", " ")


def _plural(count: int, things: str) -> str:
    """A count and its noun, whose plural ends in s."""
    return f"{count:,} {things.removesuffix('s') if count == 1 else things}"


def _escape_control(text: str) -> str:
    """Escape characters that control a terminal or change the direction of the text."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _format_value(value: Any, name: str = "") -> str:
    """A value in one line; the name may end in its unit."""
    if value in _EMPTY:
        return "-"
    if name == "time":
        return _bars_text(value)
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M:%S}"
    if type(value) in (int, float):
        if name.endswith("_bytes"):
            return f"{value / 1e6:,.2f} MB"
        if name.endswith("_seconds"):
            return f"{value:.3g} s" if value < 60 else str(timedelta(seconds=round(value)))
        return f"{value:,}"
    text = str(value) if isinstance(value, str) else _json_text(value)
    if name == "event" and isinstance(value, dict):
        members = [f"{key}={_json_text(value[key])}" for key in value if key != "type"]
        text = " ".join([str(value.get("type")), *members])
    return _escape_control(text[: 2 * _TEXT_BOUND])


def _fact_texts(view: View) -> dict[str, str]:
    """The facts and the counts in words, by label."""
    hidden = (*_EMPTY, view["id"])
    texts = {
        _label(name): _format_value(value, name)
        for name, value in view["facts"].items()
        if value not in hidden
    }
    for kind, counts in view.get("counts", {}).items():
        words = [f"{_format_value(count)} {status}" for status, count in counts.items()]
        texts[kind] = ", ".join(words) or "none"
    return texts


def _visible_tables(view: View, limit: int) -> Iterator[tuple[str, list[str], list[_Row]]]:
    """The title, the columns and the last rows of each table that is not empty."""
    hidden = (*_EMPTY, view["id"], view["facts"].get("tenant_id"))
    for name, table in (_chart(view) | view["tables"]).items():
        rows = table["rows"][-limit:]
        if rows:
            size = f"{len(rows)}"
            if len(rows) != table["total"]:
                size = f"the last {size} of {_format_value(table['total'])}"
            columns = [
                column for column in _COLUMNS if any(row.get(column) not in hidden for row in rows)
            ]
            yield f"{name} ({size})", columns, rows


def _chart(view: View) -> _Row:
    """The table of the steps on one axis of time, the events first, as marks; {} without any."""
    marks = []
    for row in view["tables"].get("events", {"rows": []})["rows"]:
        at = _first_value(row, "timestamp", "at")
        marks.append({"what": "event", "from": at, "to": at})
    steps = view.get("steps", [])
    if marks:
        steps = [{"name": "events", "status": "", "parts": marks, "attempts": 0}, *steps]
    if not steps:
        return {}
    parts = [part for step in steps for part in step["parts"]]
    start = min(part["from"] for part in parts)
    end = max(part["to"] for part in parts)
    length = max(end - start, _MICROSECOND)
    rows = []
    for step in steps:
        bars = [
            (part["what"], (part["from"] - start) / length, (part["to"] - start) / length)
            for part in step["parts"]
        ]
        attempts = f", {step['attempts']} attempts" if step["attempts"] > 1 else ""
        rows.append({"step": step["name"], "time": bars, "status": step["status"] + attempts})
    title = f"steps from {_format_value(start)} to {_format_value(end)}"
    return {title: {"rows": rows, "total": len(rows)}}


# --- drawn as text ---
_WIDTH = 80
_COLOURS = {
    "waiting": 33,
    "running": 36,
    "done": 32,
    "failed": 31,
    "lost": 35,
}


def _render_text(view: View, colour: bool = False) -> str:
    """A view in lines of at most 80 columns."""
    title = _format_value(f"{view['kind']} {view['id'] or ''}")
    head = f"{_pad(title, 60).rstrip()} {view['status'] or ''}"
    lines = [_paint(head, view["status"], colour)]
    for label, text in _fact_texts(view).items():
        lines.append(_pad(f"  {label:20} {text}", _WIDTH))
    for title, columns, rows in _visible_tables(view, _OVERVIEW_ROWS):
        lines += ["", title, *_table_text(columns, rows, colour)]
        if "time" in columns:
            lines.append(f"  {', '.join(f'{letter} {what}' for what, letter in _LETTERS.items())}")
    return "\n".join(line.rstrip() for line in lines)


def _paint(text: str, status: object, colour: bool) -> str:
    """Text in the colour of its status; as it is without a status or colours."""
    if not colour or not status:
        return text
    words = text.strip()
    return text.replace(words, f"\33[{_COLOURS[_status_class(status)]}m{words}\33[0m")


def _pad(text: str, width: int) -> str:
    """Text cut or filled to a width in columns; a character takes two, one or none of them."""
    from bisect import bisect
    from unicodedata import combining, east_asian_width

    columns = [0 if combining(char) else 1 + (east_asian_width(char) in "FW") for char in text]
    room = width - sum(columns)
    if room < 0:
        length = bisect([*itertools.accumulate(columns)], width - 3)
        return _pad(text[:length] + "...", width)
    return text + " " * room


def _table_text(columns: list[str], rows: list[_Row], colour: bool) -> list[str]:
    """The heading and a line for each row; a column without enough room is left out."""
    lines = [""] * (1 + len(rows))
    room = _WIDTH
    for name in columns:
        texts = [_label(name), *(_format_value(row.get(name), name) for row in rows)]
        longest = max(map(len, texts))
        # The first column is an id, which must fit to be copied. The last one takes what is left.
        most = 36 if room == _WIDTH else 24
        if name == "step":
            most = 18
        elif name in ("time", columns[-1]):
            most = _WIDTH
        width = min(longest, most, room - 2)
        if width < min(longest, 19):
            continue
        room -= width + 2
        for index, text in enumerate(texts):
            cell = _pad(text, width)
            if name == "status" and index > 0:
                cell = _paint(cell, text, colour)
            lines[index] += f"  {cell}"
    return lines


# --- drawn as HTML ---
class _Html(str):
    """Markup. All other text is escaped by `_markup`, the only way into a page."""


def _markup(template: str, *values: object) -> _Html:
    """Fill the `{}` of a template: text is escaped, the members of a list are joined."""
    from html import escape

    def escape_value(value: object) -> str:
        if isinstance(value, list):
            return "".join(map(escape_value, value))
        return value if isinstance(value, _Html) else escape(_escape_control(str(value)))

    return _Html(template.format(*map(escape_value, values)))


def _render_html(view: View, link: str = "") -> _Html:
    """A view as a section of a page; an overview links ids to `link` and the id."""
    if "steps" in view:
        link = ""
    fact = "<dt>{}</dt><dd>{}</dd>"
    card = (
        '<div class="card" tabindex="0" role="region" aria-label="{0}">'
        "<table><caption>{0}</caption><tr>{1}</tr>{2}</table></div>"
    )
    cards = []
    for title, columns, rows in _visible_tables(view, _DETAIL_ROWS):
        linked = "execution_id" if "execution_id" in columns else "id"
        heading = [_markup('<th scope="col">{}</th>', _label(name)) for name in columns]
        lines = []
        for row in rows:
            cells = [
                _cell_html(name, row.get(name), link if name == linked else "") for name in columns
            ]
            lines.append(_markup("<tr>{}</tr>", cells))
        cards.append(_markup(card, title, heading, lines))
    return _markup(
        '<section id="{}"><h2>{} {}</h2><dl class="card">{}</dl>{}</section>',
        _quote(view["id"] or "overview"),
        f"{view['kind']} {view['id'] or ''}",
        _chip(view["status"]),
        [_markup(fact, *texts) for texts in _fact_texts(view).items()],
        cards,
    )


def _quote(id: object) -> str:
    """An id as it stands in an address."""
    from urllib.parse import quote

    return quote(str(id), safe="")


def _chip(status: object) -> object:
    """A status in its colour, with a border; nothing without a status."""
    chip = '<span class="chip {}">{}</span>'
    return _markup(chip, _status_class(status), status) if status else ""


def _cell_html(name: str, value: Any, link: str) -> _Html:
    content: object = _format_value(value, name)
    if name == "time":
        content = _bars_html(value)
    elif link:
        content = _markup('<a href="{}{}">{}</a>', link, _quote(value), content)
    elif name == "status" and value:
        content = _chip(value)
    return _markup('<td class="{}">{}</td>', name, content)


def _bars_html(bars: _Bars) -> _Html:
    """A picture of bars. Its axis is 99 % wide, which leaves room for a mark at the end."""
    rect = '<rect class="{}" x="{}" width="{}" rx="2" y="3" height="14"></rect>'
    rects = []
    for what, start, end in bars:
        width = max(end - start, 0.004)
        rects.append(_markup(rect, what, f"{start * 0.99:.2%}", f"{width * 0.99:.2%}"))
    return _markup('<svg role="img" aria-label="on the axis of time">{}</svg>', rects)


def _html_page(target: str, sections: list[_Html], form: object = "") -> bytes:
    """A page that needs nothing else; `form` is for a page that is served."""
    page = _markup(
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>flowstore {0}</title>'
        '<style>{1}</style><meta http-equiv="Content-Security-Policy" content="{2}">'
        '<link rel="icon" href="data:,">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"></head>'
        '<body class="flowstore"><header><h1>flowstore {0}</h1>{3}</header>'
        "<main>{4}</main></body></html>",
        target,
        _Html(_CSS),
        _content_policy(),
        form,
        sections,
    )
    return page.encode(errors="backslashreplace")


def _content_policy() -> str:
    """What a page may use: the style sheet with this hash, an empty icon, its own form."""
    from base64 import b64encode

    digest = b64encode(hashlib.sha256(_CSS.encode()).digest()).decode()
    return (
        f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; form-action 'self'; "
        "base-uri 'none'"
    )


# The class of a status sets `--status`, the colour of chips and bars.
_CSS = """\
.flowstore{
color-scheme:light dark;--soft:light-dark(#566073,#a3adbd);--link:light-dark(#1a56b0,#8ab6ff);
--line:light-dark(#dde1e8,#323a48);--card:light-dark(#fff,#1a1f29);margin:0;padding:1rem;
background:light-dark(#f4f5f8,#12161d);color:light-dark(#1c2330,#e4e8ef);
font:15px/1.5 system-ui,sans-serif;text-align:left;
*{box-sizing:border-box}
>*{max-width:76rem;margin:0 auto 1.5rem}
a{color:var(--link)}
h1,h2{font-size:1.1rem;line-height:1.3;margin:0 0 .8rem}
h2{font-size:1.4rem}
h1,h2,dd,td{overflow-wrap:anywhere}
section{margin-bottom:2.5rem}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:.8rem 1rem;
margin:0 0 1rem;overflow-x:auto}
dl{display:grid;gap:.2rem 1.5rem;grid-template-columns:fit-content(35%) 1fr}
dd{margin:0}
dt,th,label{color:var(--soft);font-size:.82rem;font-weight:600}
table{border-collapse:collapse;width:100%}
caption{text-align:left;font-weight:650;padding:0 0 .4rem;color:inherit}
th,td{text-align:left;vertical-align:top;padding:.35rem 1rem .35rem 0;
border-top:1px solid var(--line);background:none;font-variant-numeric:tabular-nums}
td{min-width:5.5rem;max-width:34rem}
th,.timestamp,.at,.updated_at,.error_time,.complete_time{white-space:nowrap}
.step{min-width:6rem;max-width:12rem}
.time{width:60%}
.id,.execution_id{min-width:9rem}
.event,.payload,.goal,.last_error,.message{min-width:14rem}
.chip{display:inline-block;padding:0 .55rem;border:1px solid;border-radius:99px;font-size:.82rem;
font-weight:600;white-space:nowrap;margin:.1rem .3rem .1rem 0}
svg{display:block;width:100%;min-width:7rem;height:20px}
form{display:flex;flex-wrap:wrap;gap:.6rem;align-items:end}
label{display:grid;gap:.15rem;flex:0 1 13rem}
input,button{font:400 1rem system-ui;color:inherit;height:2.3rem;background:var(--card);
border:1px solid var(--soft);padding:.35rem .6rem;border-radius:7px;width:100%}
button{width:auto}
:focus-visible{outline:3px solid var(--link)}
.chip,rect{--status:var(--soft);color:var(--status);fill:var(--status)}
.chip.waiting,rect.waiting{--status:light-dark(#7a5200,#e5b567)}
.chip.running,rect.running{--status:var(--link)}
.chip.done,rect.done{--status:light-dark(#17663a,#73cf9a)}
.chip.failed,rect.failed{--status:light-dark(#b0261c,#ff968c)}
.chip.lost,rect.lost{--status:light-dark(#6b3fa0,#c9a6f5)}
rect.waiting{y:7px;height:6px}}"""


# --- drawn as metrics ---
_LABEL_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
# The help of each metric, by its name. All are gauges.
_METRICS = {
    "work_items": (
        f"Work items of at most {_QUEUE_LIMIT} queues. Pending and claimed ones are counted up to "
        f"{_COUNT_BOUND} in each queue; completed, failed and dead_lettered ones are counted "
        f"among the last {_SETTLED_BOUND} of that status in all queues."
    ),
    "oldest_pending_seconds": "How long the oldest item could have been claimed, 0 without one.",
    "executions": f"Executions with a record, at most {_COUNT_BOUND} of a status.",
    "flows": f"Flows, at most {_COUNT_BOUND} of a status.",
    "workflows": f"Workflow instances, at most {_COUNT_BOUND} of a status.",
    "last_position": "The position of the last event in the log, 0 without one.",
    "file_bytes": "The database file; the tables on a server.",
    "wal_bytes": "The write-ahead log; 0 on a server.",
    "free_bytes": "Pages of the file that are free; 0 on a server.",
    "info": "The versions of flowstore and SQLite; the value is 1.",
}


def _samples(view: View) -> Iterator[tuple[str, str, Any]]:
    """The name, the labels and the value of each sample in the overview of a store."""
    for kind in _DETAILED:
        counts = view["counts"][kind.name]
        for status in map(str, kind.statuses):
            yield kind.name, f'{{status="{status}"}}', counts.get(status, 0)
    for row in view["tables"]["queues"]["rows"]:
        queue = f'queue="{row["queue"].translate(_LABEL_ESCAPES)}"'
        yield "oldest_pending_seconds", f"{{{queue}}}", row["oldest_seconds"] or 0
        for column, status in _QUEUE_COUNTS.items():
            yield "work_items", f'{{{queue},status="{status}"}}', row[column]
    for name in ("last_position", "file_bytes", "wal_bytes", "free_bytes"):
        yield name, "", view["facts"].get(name, 0)
    yield "info", f'{{version="{__version__}",sqlite="{sqlite3.sqlite_version}"}}', 1


def _render_metrics(view: View) -> str:
    """The overview of a store in Prometheus' text format."""
    lines = {}
    for name, help in _METRICS.items():
        lines[name] = [f"# HELP flowstore_{name} {help}", f"# TYPE flowstore_{name} gauge"]
    for name, labels, value in _samples(view):
        lines[name].append(f"flowstore_{name}{labels} {str(value).removesuffix('+')}")
    return "\n".join([*itertools.chain(*lines.values()), ""])


# --- in notebooks ---
def _repr_html_(shown: Any) -> str | None:
    """HTML for a notebook; None (it shows the `repr` then) when nothing can be read at once."""
    with contextlib.suppress(Exception):
        view = shown
        if isinstance(shown, _Record):
            kind = type(shown).__name__
            view = View(kind=kind, id=None, status=None, facts=vars(shown), tables={})
        elif isinstance(shown, _Facet):
            engine = shown._engine
            if engine.in_memory and engine.writer.leader is not None and engine.block() is None:
                return None  # in memory, a read waits for the transaction of another thread
            which = [shown.id] if isinstance(shown, Run) else []
            view = _read_views(shown, *which)[0]
        page = '<style>{}</style><div class="flowstore">{}</div>'
        return _markup(page, _Html(_CSS), _render_html(view))
    return None


for _class in (_Record, _Facet, View):
    _class._repr_html_ = _repr_html_  # type: ignore[union-attr]


# --- the commands: show, metrics, tail, report, serve ---
class _WrongUsage(Exception):
    """Arguments of a command that cannot be used."""


def _json_default(value: object) -> str:
    """A time, or what is stored where no such value belongs, as text."""
    return value.isoformat() if isinstance(value, datetime) else str(value)


def _show(args: Any) -> None:
    """Print what is in a store, or all about one id."""
    with open(args.store, read_only=True) as store:
        views = _read_views(store, args.id)
    if args.json:
        print(json.dumps(views if args.id else views[0], default=_json_default))
    else:
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        print("\n\n".join(_render_text(view, colour) for view in views))


def _print_metrics(args: Any) -> None:
    """Print counts, ages and sizes in Prometheus' text format."""
    with open(args.store, read_only=True) as store:
        text = _render_metrics(_read_views(store)[0])
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # in every locale
    print(text, end="")


def _tail(args: Any) -> None:
    """Print events as they come, until Ctrl-C."""
    with contextlib.suppress(KeyboardInterrupt), open(args.store, read_only=True) as store:
        events = store.events.tail(args.after, tenant_id=args.tenant, execution_id=args.execution)
        for stored in events:
            line = (
                f"{stored.timestamp:%H:%M:%S} {_format_value(stored.execution_id)} "
                f"{stored.sequence} {_format_value(stored.event, 'event')}"
            )
            if args.json:
                line = json.dumps(vars(stored), default=_json_default)
            print(line, flush=True)


def _report(args: Any) -> None:
    """Write one page: the overview with the details of all that it lists, or all about one id."""
    from pathlib import Path

    with open(args.store, read_only=True) as store:
        file = _parse_target(args.store)[1]
        own = [_file_id(file + suffix) for suffix in ("", "-wal", "-shm")] if file else []
        if args.output and (_file_id(args.output) or file) in own:
            raise _WrongUsage(f"-o: {args.output} is the store itself: name another file")
        views = _read_views(store, args.id)
        if args.id is None:
            rows = itertools.chain(*(table["rows"] for table in views[0]["tables"].values()))
            ids = dict.fromkeys(_first_value(row, "execution_id", "id") for row in rows)
            for id in filter(None, ids):
                with contextlib.suppress(NotFound):
                    views += _read_views(store, id)
        page = _html_page(store.target, [_render_html(view, "#") for view in views])
    if not args.output:
        sys.stdout.buffer.write(page)
        return
    try:
        Path(args.output).write_bytes(page)
    except OSError as error:
        problem = f"-o: {args.output} cannot be written ({error.strerror}): name another file"
        raise StorageError(problem) from error


def _serve(args: Any) -> None:
    """Serve the same pages to the browsers of this machine, until Ctrl-C."""
    from socketserver import ThreadingMixIn
    from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

    class Handler(WSGIRequestHandler):
        timeout = 20

        def log_message(self, format: str, *args: object) -> None:
            """Do not log requests."""

    class Server(ThreadingMixIn, WSGIServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            """Do not log a browser that went away."""

    if not 0 <= args.port < 65536:
        raise _WrongUsage(f"--port: 0 to 65535 is needed, not {args.port}")
    with contextlib.suppress(KeyboardInterrupt), open(args.store, read_only=True) as store:
        try:
            server = Server(("127.0.0.1", args.port), Handler)
        except OSError as error:
            problem = f"--port: {args.port} cannot be had ({error.strerror})"
            raise StorageError(f"{problem}: name another, or 0 for any") from error
        with server:
            server.set_app(functools.partial(_answer, store))
            address = f"http://127.0.0.1:{server.server_port}/"
            print(f"{address} shows {store.target}; Ctrl-C ends it", flush=True)
            server.serve_forever()


def _answer(store: Store, request: Any, start: Any) -> list[bytes]:
    """The WSGI application: answer one request."""
    from urllib.parse import parse_qsl

    query: dict[str, str] = {}
    problem = ""
    sections: list[_Html] = []
    metrics = ""
    port = request["SERVER_PORT"]
    hosts = [f"{name}:{port}".removesuffix(":80") for name in ("127.0.0.1", "localhost", "[::1]")]
    try:
        if request.get("HTTP_HOST", "").lower() not in hosts:
            # A page of another site asks: its name was made to point to this machine.
            problem = "421 Misdirected Request: this page is at 127.0.0.1 alone"
        elif request["REQUEST_METHOD"] not in ("GET", "HEAD"):
            problem = "405 Method Not Allowed: nothing can be changed here"
        elif request["PATH_INFO"] == "/metrics":
            metrics = _render_metrics(_read_views(store)[0])
        elif request["PATH_INFO"] != "/":
            problem = "404 Not Found: there is no such page"
        else:
            query = dict(parse_qsl(request["QUERY_STRING"], max_num_fields=9))
            facet = store.state.for_tenant(query["tenant"]) if "tenant" in query else store
            views = _read_views(facet, query.get("id"), query.get("status"))
            sections = [_render_html(view, "/?id=") for view in views]
    except NotFound as error:
        problem = f"404 Not Found: {error}"
    except ValueError as error:
        problem = f"400 Bad Request: {error}"
    except FlowStoreError as error:
        problem = f"503 Service Unavailable: {error}"
    if problem:
        sections = [_markup("<h2>{}</h2>", problem)]
    kind = "text/plain; version=0.0.4" if metrics else "text/html"
    page = metrics.encode() or _html_page(store.target, sections, _search_form(query))
    start(
        problem.partition(":")[0] or "200 OK",
        [
            ("Content-Type", f"{kind}; charset=utf-8"),
            ("Content-Length", str(len(page))),
            ("Allow", "GET, HEAD"),
            ("Content-Security-Policy", f"{_content_policy()}; frame-ancestors 'none'"),
            ("Cache-Control", "no-store"),
            ("X-Content-Type-Options", "nosniff"),
        ],
    )
    return [] if request["REQUEST_METHOD"] == "HEAD" else [page]


def _search_form(query: dict[str, str]) -> _Html:
    field = '<label>{0}<input name="{0}" value="{1}"></label>'
    return _markup(
        '<form role="search"><a href="/">overview</a>{}<button>Search</button></form>',
        [_markup(field, name, query.get(name, "")) for name in ("id", "tenant", "status")],
    )


# ==================================================================================================
# Command line: one function for each command, and a table of them at the chapter's end
# ==================================================================================================


# A command imports what it alone needs, so that `import flowstore` stays cheap.
def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status.

    0 is good, 1 a problem found, 2 wrong usage, 130 Ctrl-C, 141 that the reader of its output has
    gone."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _prepare_output()
    try:
        if arguments and arguments[0] in _CHILDREN:
            return _CHILDREN[arguments[0]](*arguments[1:])
        parsed = _parse(arguments)
        has_problem = parsed.function(parsed)
        print(end="", flush=True)  # while a closed pipe can still be handled
        return 1 if has_problem else 0
    except SystemExit as end:  # of --help and --version, or an error of the user's code
        return int(end.code or 0) if isinstance(end.code, int | None) else _complain(end, 1)
    except _WrongUsage as error:
        return _complain(error, 2)
    except KeyboardInterrupt:
        return _complain("interrupted", 130)
    except BrokenPipeError:  # the reader has gone, as `| head` does
        # The flush at exit must not fail too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (FlowStoreError, OSError, sqlite3.Error) as error:
        return _complain(error, 1)


def _prepare_output() -> None:
    """Make standard output and error take whatever a command prints."""
    for name in ("stdout", "stderr"):
        # None: it is closed, as a daemon's is.
        stream = getattr(sys, name) or io.TextIOWrapper(io.FileIO(os.devnull, "w"))
        setattr(sys, name, stream)
        if isinstance(stream, io.TextIOWrapper):
            # The name of a file may hold characters that the terminal's encoding lacks.
            stream.reconfigure(errors="backslashreplace")


def _parse(argv: list[str]) -> Any:
    """The arguments of a command, by the tables at the chapter's end."""
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise _WrongUsage(f"{message} (see {self.prog} --help)")

    parser = Parser(description="Durable memory for workflows.")
    parser.add_argument("--version", action="version", version=f"flowstore {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (function, arguments) in _COMMANDS.items():
        subparser = subparsers.add_parser(name, help=function.__doc__, description=function.__doc__)
        subparser.set_defaults(function=function)
        for argument in arguments.split():
            subparser.add_argument(argument, **_ARGUMENTS[argument])
    parsed, left = parser.parse_known_args(argv)
    if len(left) == 1 and left[0][:1] != "-" and getattr(parsed, "id", "") is None:
        parsed.id = left.pop()  # argparse does not look for it behind an option
    if left:
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    return parsed


def _complain(problem: object, status: int) -> int:
    """Print a problem as one line on standard error; returns the status."""
    text = " ".join(str(problem).split()) or type(problem).__name__
    print(f"flowstore: {_escape_control(text)}", file=sys.stderr)
    return status


def _shared_path(target: str) -> str:
    """The path of a store that several processes open, "" for a server.

    A store in memory is wrong usage."""
    path = _parse_target(target)[1]
    if path is None:
        raise _WrongUsage("a store in memory is of one process alone: name a file")
    return path


@contextlib.contextmanager
def _start_child(name: str, *arguments: str) -> Iterator[Any]:
    """One of `_CHILDREN` in a process of its own, which is killed at the end of the block."""
    from subprocess import PIPE, Popen

    # This file is run, wherever a copy of it lies. -P: its folder may hold modules that hide the
    # standard library's.
    command = [sys.executable, "-P", __file__, name, *arguments]
    # In a session of its own, so that Ctrl-C in the terminal reaches the command alone.
    with Popen(command, stdin=PIPE, stdout=PIPE, text=True, start_new_session=True) as child:
        try:
            yield child
        finally:
            child.kill()


# --- selftest: does this copy work on this machine? ---
def _selftest(args: Any) -> bool:
    """Check in a few seconds that this copy works on this machine."""
    import tempfile

    failed = 0
    with tempfile.TemporaryDirectory(prefix="flowstore-", ignore_cleanup_errors=True) as folder:
        target = args.target or os.path.join(folder, "selftest.db")
        _shared_path(target)
        with open(target) as store:
            trial = _Trial(store, target, folder)
            for attempt in _PROMISES:
                promise = attempt.__doc__ or attempt.__name__  # python -OO drops docstrings
                try:
                    print(f"ok   {promise} ({attempt(trial)})", flush=True)
                except Exception as error:  # the other promises are still worth a try
                    failed += 1
                    reason = " ".join(f"{type(error).__name__} {error}".split())
                    print(f"FAIL {promise} ({reason})", flush=True)
    print(f"{len(_PROMISES) - failed} passed, {failed} failed")
    return failed > 0


class _Trial(NamedTuple):
    """What a promise is tried on. All that is left in the store are runs that have ended."""

    store: Store
    target: str
    folder: str


def _expect(found: object, wanted: object) -> None:
    """Fail unless they are equal; an assert would be gone under `python -O`."""
    if found != wanted:
        raise AssertionError(f"found {found!r:.300}, not {wanted!r:.300}")


def _run_pids(store: Store, id: str, steps: int, tells: bool = False) -> list[Json]:
    """The processes that did the steps of a run. Steps that are not recorded are done here."""
    pids = []
    with store.run(id, workflow_id="selftest", lease_seconds=1) as run:
        for number in range(steps):
            pids.append(run.step(str(number), os.getpid))
            if tells:
                print(pids[-1], flush=True)
    sequences = [event.sequence for event in store.events.load_events(id)]
    _expect(sequences, list(range(1, steps + 3)))
    return pids


def _selftest_run(target: str, id: str) -> int:
    """Do steps of a run, and tell of each that is recorded: the process that is killed."""
    with open(target) as store:
        _run_pids(store, id, 1_000_000, tells=True)
    return 0


def _try_sqlite(trial: _Trial) -> str:
    """sqlite: its threading mode will do"""
    _expect(sqlite3.threadsafety > 0, True)
    return f"{_sqlite_note()}; level {sqlite3.threadsafety}, Python {sys.version.split()[0]}"


def _try_disk(trial: _Trial) -> str:
    """file: a commit waits until the disk has it"""
    start = time.perf_counter()
    _run_pids(trial.store, new_id(), 10)
    each = (time.perf_counter() - start) / 12
    return f"synchronous FULL, {each * 1000:.2f} ms each"


def _try_threads(trial: _Trial) -> str:
    """threads: 8 of them do each run once, and write their logs without gap or loss"""
    runs = trial.store.runs
    done: list[str] = []

    def selftest(run: Run, input: Json) -> None:
        run.step("0", done.append, run.id)

    queue = new_id()
    ids = [runs.start(selftest, queue=queue) for _ in range(40)]
    runs.work(selftest, concurrency=8, queues=[queue], until_idle=True)
    for id in ids:
        _run_pids(trial.store, id, 1)
    _expect(sorted(done), ids)
    return _plural(len(done), "runs")


def _try_crash(trial: _Trial) -> str:
    """crash: what a process was told is stored survives its kill, and its run goes on"""
    id = new_id()
    with _start_child("selftest-run", trial.target, id) as child:
        told = [int(child.stdout.readline()) for _ in range(20)]
    stored = trial.store.events.count_events(id) - 1  # the first tells of the start
    pids = _run_pids(trial.store, id, stored + 1)
    _expect(pids, told[:1] * stored + [os.getpid()])
    return f"killed after {stored} steps"


def _try_backup(trial: _Trial) -> str:
    """backup: made while the store is in use, it is sound and holds the same"""
    path = os.path.join(trial.folder, "other.db")
    copy = os.path.join(trial.folder, "copy.db")
    with open(path) as store:
        pids = _run_pids(store, "run", 3)
        store.backup(copy)
    with open(copy) as store:
        _expect(store.check(), [])
        _expect(_run_pids(store, "run", 3), pids)
    return f"{os.path.getsize(copy):,} bytes"


def _try_fork(trial: _Trial) -> str:
    """fork: both sides go on, and nothing is lost"""
    id = new_id()
    pid = os.fork()
    if pid == 0:
        try:
            _run_pids(trial.store, id, 3)
            os._exit(0)
        finally:
            os._exit(1)  # no `finally` of the parent may run here
    _run_pids(trial.store, new_id(), 3)
    _expect(os.waitpid(pid, 0)[1], 0)
    _expect(_run_pids(trial.store, id, 3), [pid] * 3)
    return f"process {pid}"


# Each tries a promise that may break on one machine alone. Its docstring is what the selftest
# prints. It returns a note, or raises when the promise is broken.
_PROMISES = [_try_sqlite, _try_disk, _try_threads, _try_crash, _try_backup]
if hasattr(os, "fork"):
    _PROMISES.append(_try_fork)


# --- demo: a durable pipeline over real files, one of whose workers is killed ---
def _demo(args: Any) -> bool:
    """Measure and hash the files of a folder with several processes, one of which is killed."""
    import shlex

    if not os.path.isdir(args.folder):
        raise _WrongUsage(f"{args.folder}: there is no such folder")
    folder = os.path.realpath(args.folder)
    own = os.path.realpath(_shared_path(args.store) or args.store)
    with open(args.store) as store:
        paths = sorted(itertools.islice(_demo_files(folder, own), 200))
        known = [path for path in paths if store.state.get_work_item(path)]
        with store.transaction() as tx:
            tx.execute(
                "CREATE TABLE IF NOT EXISTS demo_files (path TEXT, size BIGINT, sha256 TEXT)"
            )
            for path in paths:  # of one that is known, no second run begins
                store.runs.start("demo_file", path, id=path, queue=folder, max_attempts=5)
        print(
            f"{_plural(len(paths), 'files')} of {folder}, {len(known)} known from before",
            flush=True,
        )
        _demo_run(store, args.store, folder, paths)
        done = _demo_tally(store, paths)
    print(
        "The store stays; files done in it are not read again, even when they have changed: "
        f"delete {store.target} or name another --store to do them again.\n"
        f"To look at it: {shlex.join(['python', sys.argv[0], 'show', store.target])} "
        "(or report, or serve)"
    )
    return done < len(paths)


def _demo_files(folder: str, own: str) -> Iterator[str]:
    """The paths of the files under the folder, without hidden ones and the store's own."""
    import glob

    for path in glob.iglob(os.path.join(glob.escape(folder), "**"), recursive=True):
        # A process that closes a file of an open store drops SQLite's locks on it.
        is_own = os.path.realpath(path).startswith(own)
        # A FIFO or a device is left out. A link to nowhere is not: a worker fails on it.
        is_file = os.path.isfile(path) or not os.path.exists(path)
        if is_file and not is_own and path.isprintable() and len(path) < 256:  # as an id has to be
            yield path


def _demo_worker(target: str, folder: str, mode: str) -> int:
    """Do files until this is killed: between two steps of the first one, if the mode is "hold"."""
    ended = threading.Event()

    def watch() -> None:
        os.read(sys.stdin.fileno(), 1)  # which ends when the demo does, even if it is killed
        ended.set()

    threading.Thread(target=watch, daemon=True).start()
    # The lease is short, because somebody is watching.
    with open(target, lease_seconds=2, backoff=lambda attempt: 0.05) as store:

        def demo_file(run: Run, path: str) -> str:
            size = run.step("measure", os.path.getsize, path)
            if mode == "hold":
                print(run.id, flush=True)
                ended.wait()
            digest: str = run.step("hash", _demo_hash, path)
            with store.transaction() as tx:  # the row and the record of the step, or neither
                row = path, size, digest
                run.step("record", tx.execute, "INSERT INTO demo_files VALUES (?, ?, ?)", row)
            return digest

        worker = f"worker-{os.getpid()}"
        store.runs.work(
            demo_file, queues=[folder], worker_id=worker, stop=ended, until_idle=mode == "hold"
        )
    return 0


def _demo_hash(path: str) -> str:
    with io.FileIO(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _demo_run(store: Store, target: str, folder: str, paths: list[str]) -> None:
    """Have a worker begin a file and kill it, then have two others do all files."""
    state: Any = store.state
    with _start_child("demo-worker", target, folder, "hold") as worker:
        id = worker.stdout.readline().strip()
    if not id:
        return  # an earlier run did all files
    held = state.get_work_item(id)
    print(f"killed {held.worker_id}, seen holding {id} under fence {held.lease_fence}", flush=True)
    start = functools.partial(_start_child, "demo-worker", target, folder, "work")
    with start(), start():
        for path in paths:
            with contextlib.suppress(RunFailed):
                store.runs.result(path, timeout=600)
    with contextlib.suppress(LeaseLost):
        state.complete_work_item(held)
        raise StorageError(f"{id}: the fence of the killed worker was not refused")
    fence = state.get_work_item(id).lease_fence
    print(f"taken over: {id}, last under fence {fence}; fence {held.lease_fence} is refused now")


def _demo_tally(store: Store, paths: list[str]) -> int:
    """Print what the store tells of the files; how many it proves to be done exactly once."""
    done = dead = taken = 0
    with store.transaction() as tx:
        rows = Counter(path for (path,) in tx.execute("SELECT path FROM demo_files"))
    for item in filter(None, map(store.state.get_work_item, paths)):
        log = [stored.event for stored in store.events.load_events(item.id)]
        steps = [event["step"] for event in log if event["type"] == "step_completed"]
        failures = sum(event["type"] == "step_failed" for event in log)
        lost = item.lease_fence - failures - (item.status == "completed")
        line = f"{item.status:13}  {', '.join(steps):21}  {item.id}"
        if lost > 0:  # their workers were killed
            line += f"  taken over {_plural(lost, 'times')}"
            taken += 1
        if item.status == "dead_lettered":
            line += f"  after {item.attempt} tries: {item.last_error}"
            dead += 1
        elif steps == ["measure", "hash", "record"] and rows[item.id] == 1:
            done += 1
        print(line)
    print(
        f"{_plural(len(paths), 'files')}: {done} done exactly once, "
        f"{_plural(dead, 'dead letters')}, {len(paths) - done - dead} lost; {taken} taken over"
    )
    return done


# --- work: a process that does runs ---
def _work(args: Any) -> None:
    """Do the runs of functions until Ctrl-C or SIGTERM, one line for each run that ended."""
    import signal

    _shared_path(args.store)
    functions = list(map(_import_function, args.functions))
    kinds = {inspect.iscoroutinefunction(function) for function in functions}
    if len(kinds) > 1:
        raise _WrongUsage("functions: plain ones or coroutine functions, not both")
    _open_existing(args.store).close()
    # A shell may have told it to ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))
    try:
        if True in kinds:
            import asyncio

            asyncio.run(_work_in_tasks(args, functions))
        else:
            with open(args.store) as store:
                store.runs._on_end = _tell_end
                store.runs.work(*functions, concurrency=args.concurrency)
    except KeyboardInterrupt:
        return
    except InvalidData as error:  # no functions, or no number of threads
        raise _WrongUsage(error) from error
    except Exception:
        raise
    except BaseException as error:  # of a function, whose run was given back
        raise SystemExit(_error_text(error)) from error


async def _work_in_tasks(args: Any, functions: Sequence[Any]) -> None:
    async with open_async(args.store) as store:
        store.runs._on_end = _tell_end
        await store.runs.work(*functions, concurrency=args.concurrency)


def _tell_end(end: _End) -> None:
    outcome = f"failed: {end.detail['error']}" if "error" in end.detail else "completed"
    line = " ".join(f"{end.item.id}  {end.item.node_id} {outcome}".splitlines())
    # In one write: several threads print.
    print(f"{_escape_control(line)}\n", end="", flush=True)


def _import_function(text: str) -> Any:
    """The function MODULE:FUNCTION. The current folder is searched, too."""
    import pkgutil

    if re.search(r"[/\\]|\.py(:|$)", text) or text.count(":") != 1:
        raise _WrongUsage(f"{text}: MODULE:FUNCTION is needed, as jobs:import_file for jobs.py")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    # The module may import this file by its name: then it gets this copy, with the same errors.
    own = __spec__.name if __spec__ else inspect.getmodulename(__file__)
    sys.modules.setdefault(str(own), sys.modules[__name__])
    try:
        return pkgutil.resolve_name(text)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever the module raises
        raise _WrongUsage(f"{text}: {_error_text(error)}") from None


# --- check, backup, compact, prune ---
_LATE = timedelta(hours=1)  # a lease that expired earlier has no worker that would take it back


def _check(args: Any) -> bool:
    """Read the whole store; list what is wrong with it or needs a hand, and how it is."""
    health: _Row = {}
    with open(args.store, read_only=True) as store:
        problems = store.check()
        try:
            health = _health(_read_views(store)[0], problems)
        except Exception as error:  # whatever comes of reading what is damaged
            problems = problems or [_error_text(error)]
    if _parse_target(args.store)[1]:
        health["sqlite"] = _sqlite_note()
    if args.json:
        print(json.dumps({"store": store.target, "problems": problems, "health": health}))
    else:
        verdict = _plural(len(problems), "problems") if problems else "sound"
        print(*map(_escape_control, problems), f"{store.target}: {verdict}", sep="\n")
        for name, value in health.items():
            print(f"  {_label(name):20} {_format_value(value, name)}")
    return bool(problems)


def _health(overview: View, problems: list[str]) -> _Row:
    """How a store is, in facts; what somebody has to do is added to the problems."""
    facts = overview["facts"]
    names = ("file_bytes", "wal_bytes", "free_bytes", "longest_recent_log")
    health = {name: facts.get(name) for name in names}
    health["dead_letters"] = overview["counts"]["work items"].get("dead_lettered", 0)
    leases = [
        (row["lease_expires_at"], row["queue"])
        for row in overview["tables"]["queues"]["rows"]
        if row["lease_expires_at"]
    ]
    if leases:
        expires_at, queue = min(leases)
        late = facts["read_at"] - expires_at
        verb = "expires" if late < timedelta(0) else "expired"
        lease = f"{verb} at {_format_value(expires_at)}, in queue {queue}"
        health["oldest_lease"] = lease
        if late > _LATE:
            problems.append(f"the oldest lease {lease}: start a worker, or the script again")
    if facts["wal_bytes"] > 4 * _WAL_BOUND:
        size = _format_value(facts["wal_bytes"], "_bytes")
        problems.append(f"the log has {size}: end what has been reading for so long")
    return health


def _backup(args: Any) -> None:
    """Copy a store, also one in use, into a new file."""
    if re.match(r"(?i):memory:$|sqlite:|[^/]+://", args.target):
        raise _WrongUsage(f"{args.target}: the path of a new file is needed")
    with open(args.store, read_only=True) as store:
        store.backup(args.target)
    print(f"{args.target}: {os.path.getsize(args.target):,} bytes")


def _open_existing(target: str, read_only: bool = False) -> Store:
    """Open a store to change it: a mistyped name must not make a new one."""
    with contextlib.suppress(SchemaError):  # of an older version, which opening it upgrades
        open(target, read_only=True).close()
    return open(target, read_only=read_only)


def _compact(args: Any) -> None:
    """Give space that a store no longer needs back to the file system."""
    with _open_existing(args.store) as store:
        store.compact()
        print(f"{store.target}: {store.stats()['file_bytes']:,} bytes")


def _prune(args: Any) -> None:
    """Drop what has ended long enough ago."""
    age = re.fullmatch(r"([0-9]{1,6})([smhdw])", args.older_than)
    if age is None:
        raise _WrongUsage("--older-than: six digits at most and a unit, as in 30d")
    units = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
    older_than = timedelta(**{units[age[2]]: int(age[1])})
    with _open_existing(args.store, read_only=args.dry_run) as store:
        counts = store.prune(older_than, dry_run=args.dry_run, artifacts=args.artifacts)
    if args.json:
        print(json.dumps({"store": store.target, "dry_run": args.dry_run, "pruned": counts}))
    else:
        text = ", ".join(_plural(count, kind) for kind, count in counts.items() if count)
        verb = "would drop" if args.dry_run else "dropped"
        print(f"{store.target}: {verb} {text or 'nothing'}")


# --- copy: a store moves into a new one, perhaps of another engine ---
_ReadRows: TypeAlias = "Callable[[str, tuple[Any, ...]], _RowList]"  # runs an SQL text


class _CopiedTable(NamedTuple):
    """A table that a copy moves. A unique key comes first in its columns, and has an index."""

    name: str
    columns: list[str]
    key: list[str]
    key_index: str

    def chunks(self, read: _ReadRows) -> Iterator[_RowList]:
        """The rows in the order of the key, 500 at a time."""
        key = ", ".join(self.key)
        select = f"SELECT {', '.join(self.columns)} FROM {self.name} {{by {self.key_index}}}"
        where = ""
        after: tuple[Any, ...] = ()
        while rows := read(f"{select} {where} ORDER BY {key} LIMIT 500", after):
            yield rows
            where = f"WHERE ({key}) > ({', '.join('?' * len(self.key))})"
            after = rows[-1][: len(self.key)]


# The indexes by which a copy reads. All other tables are read by the index that SQLite makes for
# their first UNIQUE or PRIMARY KEY. The log is read in the order in which it was written.
_COPIED_BY = {
    "flowstore_log": "flowstore_log_by_tenant",
    "flow_events": "flow_events_by_flow",
    "execution_errors": "execution_errors_by_workflow",
}


def _copied_tables() -> Iterator[_CopiedTable]:
    """All tables but the first, which has the schema's version; each after those it refers to."""
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        db.executescript(_SQLITE.resolve(_TABLES))
        for table in _TABLE_NAMES[1:]:
            index = _COPIED_BY.get(table, f"sqlite_autoindex_{table}_1")
            key = [name for (name,) in db.execute("SELECT name FROM pragma_index_info(?)", [index])]
            table_info = db.execute("SELECT name FROM pragma_table_info(?)", [table])
            columns = dict.fromkeys(key + [name for (name,) in table_info])
            yield _CopiedTable(table, list(columns), key, index)


def _reader_in(store: Store, transaction: Transaction) -> _ReadRows:
    """A function that runs a statement with markers in a transaction of a store."""
    return lambda sql, parameters: transaction.execute(
        store._engine.dialect.resolve(sql), parameters
    )


def _copy_tables(read: _ReadRows, target: Store) -> None:
    """Copy what `read` reads into a new store, or go on with a copy that was broken off."""
    with target.transaction() as tx:
        if not tx.execute("SELECT 1 FROM flowstore_meta WHERE key = 'copying'"):
            rows = target.stats()["tables"]
            if sum(rows.values()) > rows["flowstore_meta"] + 1:  # a new store has one tenant
                raise StorageError(
                    f"{target.target}: there is a store already: copy into a new one"
                )
            tx.execute("DELETE FROM flowstore_tenants")
            tx.execute("INSERT INTO flowstore_meta (key, value) VALUES ('copying', '')")
    for table in _copied_tables():
        marks = ", ".join("?" * len(table.columns))
        # Rows that an earlier run copied are passed over.
        insert = f"""INSERT INTO {table.name} ({", ".join(table.columns)}) VALUES ({marks})
            ON CONFLICT DO NOTHING"""
        for rows in table.chunks(read):
            with target.transaction() as tx:
                tx.executemany(insert, rows)
    with target.transaction() as tx:
        tx.execute("DELETE FROM flowstore_meta WHERE key = 'copying'")


def _copy_store(args: Any) -> bool:
    """Copy a store into a new one, from SQLite to PostgreSQL or back, and compare them."""
    differ = []
    _shared_path(args.target)
    with open(args.store, read_only=True) as source, source.transaction() as snapshot:
        counts = source.stats()["tables"]
        total = sum(counts.values()) - counts["flowstore_meta"]
        with open(args.target) as target:
            read = _reader_in(source, snapshot)
            _copy_tables(read, target)
            with target.transaction() as copied:
                for table in _copied_tables():
                    theirs = table.chunks(_reader_in(target, copied))
                    pairs = itertools.zip_longest(table.chunks(read), theirs)
                    if any(one != other for one, other in pairs):
                        differ.append(table.name)
    verdict = f"other than the source in {', '.join(differ)}" if differ else "equal"
    print(f"{target.target}: {total:,} rows, {verdict}")
    return bool(differ)


# --- the tables of the commands ---
# The options that argparse takes for each argument, whichever command has it.
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "store": {"help": "a database file or URL"},
    "id": {
        "nargs": "?",
        "help": "of an execution, flow or workflow",
    },
    "functions": {
        "nargs": "+",
        "metavar": "MODULE:FUNCTION",
        "help": "what runs are to call",
    },
    "folder": {
        "nargs": "?",
        "default": ".",
        "help": "200 of its files at most; default: .",
    },
    "target": {"help": "a new one; `copy` also takes one where it was broken off"},
    "-o": {
        "dest": "output",
        "help": "default: standard output",
    },
    "--concurrency": {
        "type": int,
        "default": 1,
        "metavar": "N",
        "help": "runs at a time",
    },
    "--artifacts": {
        "action": "store_true",
        "help": "drop artifacts, too, by their last put",
    },
    "--after": {
        "type": int,
        "help": "default: the last that there is",
    },
    "--dry-run": {
        "action": "store_true",
        "help": "only count",
    },
    "--execution": {},
    "--json": {
        "action": "store_true",
        "help": "print JSON, for programs",
    },
    "--older-than": {
        "required": True,
        "help": "as 90s, 45m, 12h, 30d or 8w",
    },
    "--port": {
        "type": int,
        "default": 8137,
        "help": "default: 8137; 0: any that is free",
    },
    "--store": {
        "default": "flowstore-demo.db",
        "help": "default: %(default)s",
    },
    "--target": {"help": "try this store, and leave the runs there (default: a temporary file)"},
    "--tenant": {},
}
# The function of each command, which returns True for a problem that it found, and its arguments.
# The help is the function's docstring.
_COMMANDS: dict[str, tuple[Callable[[Any], bool | None], str]] = {
    "selftest": (_selftest, "--target"),
    "demo": (_demo, "folder --store"),
    "work": (_work, "store functions --concurrency"),
    "show": (_show, "store id --json"),
    "metrics": (_print_metrics, "store"),
    "tail": (_tail, "store --json --execution --tenant --after"),
    "report": (_report, "store id -o"),
    "serve": (_serve, "store --port"),
    "check": (_check, "store --json"),
    "backup": (_backup, "store target"),
    "prune": (_prune, "store --json --older-than --dry-run --artifacts"),
    "copy": (_copy_store, "store target"),
    "compact": (_compact, "store"),
}
# The processes that commands start; their arguments are texts.
_CHILDREN: dict[str, Callable[..., int]] = {
    "demo-worker": _demo_worker,
    "selftest-run": _selftest_run,
}

# ==================================================================================================
# PostgreSQL: a server in place of the file; without this chapter all the others work as before
# ==================================================================================================

# Our statements are the same on a server, once their markers are resolved and their placeholders
# are psycopg's. Writers run side by side. Where the lock on a row is enough, a transaction is
# READ COMMITTED. Others are SERIALIZABLE, and run again when another transaction was first.
_CONNECTIONS = 8  # of one process, at most: more would only wait for each other in the server
# The numbers that order our logs over the whole store. A number begins with that of its
# transaction, which leaves 2**20 for the rows of the transaction. A reader stops at the oldest
# transaction under way, so it skips no row that commits later with a lower number. A base is added
# where the server counts from below the numbers that are stored, as it does after a dump was
# restored.
_NEXT_NUMBER = """((pg_current_xact_id()::text::bigint + {} << 20)
    + set_config('flowstore.number', (
        COALESCE(NULLIF(current_setting('flowstore.number', true), ''), '0')::bigint + 1
    )::text, true)::bigint)""".format
_NUMBERED_COLUMNS = (
    ("flow_events", "id"),
    ("execution_errors", "id"),
    ("flowstore_log", "position"),
)
_BASE = "COALESCE((SELECT value::bigint FROM flowstore_meta WHERE key = 'base'), 0)"
_MISSING_BASE = f"""SELECT CASE WHEN top >= base + following THEN top - following + 1 ELSE 0 END
    FROM (SELECT {_BASE} AS base,
        pg_snapshot_xmax(pg_current_snapshot())::text::bigint AS following,
        GREATEST((SELECT MAX(id) FROM flow_events), (SELECT MAX(id) FROM execution_errors),
            (SELECT MAX(position) FROM flowstore_log), 0) >> 20 AS top) AS numbers"""
_first_number = f"({{}}::text::bigint + {_BASE} << 20)".format
# The planner trusts statistics that may be old, so each statement is left one index. The partial
# indexes are on expressions, which only the statements that are meant for them use. Those for one
# tenant are on another expression.
_POSTGRES = _Dialect(
    number=f"BIGINT PRIMARY KEY DEFAULT {_NEXT_NUMBER(0)}",
    autoincrement="",
    without_rowid="",
    # A claim walks over the dead entries of the claims before it: they are cleaned up every 1 % of
    # the rows.
    often_vacuumed="WITH (autovacuum_vacuum_scale_factor = 0.01)",
    id_last="",
    definitions_key="",
    definitions_index="""CREATE UNIQUE INDEX flowstore_definitions_key
        ON flowstore_definitions (tenant_id, workflow_id, md5(version))""",
    status="(status || '')",
    tenant_status="('' || status)",
    any_status="(status || '')",
    queue_type="(queue_type || '')",
    invalid_since=_INVALID_SINCE,
    unique_key="md5(unique_key)",  # an index entry of 2,700 bytes holds two ids
    given_key="md5(?)",
    in_order=f"""AND (position < {_first_number("pg_snapshot_xmin(pg_current_snapshot())")}
        OR (position >= {_first_number("pg_current_xact_id_if_assigned()")}
        AND pg_snapshot_xmin(pg_current_snapshot()) >= pg_current_xact_id_if_assigned()))""",
    is_before=f"position < {_first_number('pg_current_xact_id()')} + (1 << 20)",
    by="",
    by_key="",
    join="JOIN",
    for_update="FOR UPDATE",
    skip_locked="FOR UPDATE SKIP LOCKED",
)
_PLACEHOLDERS = re.compile(
    r"""
    [eE]'(?:[^'\\]|\\.|'')*' | '[^']*' | \$(\w*)\$.*?\$\1\$   # a literal
    | "[^"]*" | --[^\n]* | /\*.*?\*/ | :: | %   # a name, a comment, a cast, a percent sign
    | \? | :([A-Za-z_]\w*)   # a placeholder, a named one
    """,
    re.DOTALL | re.VERBOSE,
)
# The level of each kind of operation, "" where it only reads; one that is a single read has none.
_ISOLATION = {
    "write": "SERIALIZABLE",
    "row": "READ COMMITTED",
    "statement": "READ COMMITTED",
    "snapshot": "",
}
_IN_DOUBT = "the server was lost during COMMIT: look whether this was stored"
# What became of a transaction, and whether the server has run since the time given without a crash.
# A crash resets the statistics, and the server may then use the number of a lost transaction again.
_TRANSACTION_STATUS = """SELECT pg_xact_status(?::xid8),
    GREATEST(pg_postmaster_start_time(), stats_reset) < ?::timestamptz FROM pg_stat_bgwriter"""
_POSTGRES.markers["foreign_keys"] = f"""WITH named AS NOT MATERIALIZED (
    SELECT oid, relname, relnamespace = to_regnamespace(current_schema()) AS here,
        CASE relnamespace WHEN to_regnamespace(current_schema())
        THEN '"' || replace(relname, '"', '""') || '"' ELSE oid::regclass::text END AS sql
    FROM pg_class)
    SELECT child.oid::regclass::text, child.sql, k.oid::bigint, quote_ident(own.attname),
        parent.sql,
        -- where the collations of both columns differ, the index on the user's column has its own
        quote_ident(theirs.attname) || COALESCE(' COLLATE ' || c.collnamespace::regnamespace::text
            || '.' || quote_ident(c.collname), ''),
        CASE k.confdeltype WHEN 'a' THEN 'NO ACTION' WHEN 'r' THEN 'RESTRICT'
            WHEN 'c' THEN 'CASCADE' ELSE '' END
    FROM pg_constraint k
    JOIN named child ON child.oid = k.conrelid
    JOIN named parent ON parent.oid = k.confrelid
    CROSS JOIN LATERAL unnest(k.conkey, k.confkey) WITH ORDINALITY pair (own, theirs, place)
    JOIN pg_attribute own ON own.attrelid = k.conrelid AND own.attnum = pair.own
    JOIN pg_attribute theirs ON theirs.attrelid = k.confrelid AND theirs.attnum = pair.theirs
    LEFT JOIN pg_collation c ON c.oid = own.attcollation
    WHERE k.contype = 'f' AND NOT (child.here AND child.relname IN ({_QUOTED_TABLE_NAMES}))
        AND has_table_privilege(k.conrelid, 'SELECT')
        -- nearly always false, and asked once: others may have thousands of foreign keys
        AND (SELECT EXISTS (SELECT 1 FROM pg_constraint f
            JOIN pg_class p ON p.oid = f.confrelid
            JOIN pg_class c ON c.oid = f.conrelid
            WHERE f.contype = 'f' AND p.relnamespace = to_regnamespace(current_schema())
                AND p.relname IN ({_QUOTED_TABLE_NAMES})
                AND NOT (c.relnamespace = p.relnamespace AND c.relname IN ({_QUOTED_TABLE_NAMES}))))
    ORDER BY k.oid, pair.place"""
# The writes that callers may be waiting for.
_NEWS = re.compile(
    "INSERT INTO flowstore_(log|work_items|queues)|UPDATE flowstore_work_items +SET available_at"
)
# Our errors for some of the server's; the others are StorageError.
_SERVER_ERRORS = {"53100": StoreFull, "XX001": StoreCorrupt, "XX002": StoreCorrupt}


@functools.lru_cache(2000)
def _for_psycopg(sql: str, named: bool) -> str:
    """A statement with psycopg's placeholders: %s for ?, %(name)s for :name if values are named."""
    if "\0" in sql:
        raise StorageError("the statement holds NUL: leave that out")

    def replace(found: re.Match[str]) -> str:
        if found[0] == "?":
            return "%s"
        if named and found[2]:
            return f"%({found[2]})s"
        return found[0].replace("%", "%%")

    return _PLACEHOLDERS.sub(replace, sql)


class _PostgresDb:
    """A psycopg connection that is used like one of sqlite3, and raises our errors."""

    isolation = ""  # of the transaction when it writes
    transaction_id = ""
    has_news = False  # the transaction wrote something that callers may be waiting for
    begins_before = 0  # the transaction begins before this statement from now on; 0: it has begun

    def __init__(self, engine: _PostgresEngine) -> None:
        self.engine = engine
        psycopg = engine.psycopg
        try:
            self.db = psycopg.connect(engine.url, autocommit=True, client_encoding="UTF8")
        except psycopg.Error as error:
            says = " ".join(str(error).split())
            passing = "starting up|shutting down|recovery|too many|slots"
            if engine.was_reached:
                passing += "|refused|No such file|closed the connection|reset by"  # it restarts
            passes = re.search(passing, says)
            kind = StoreBusy if passes else StorageError
            raise kind(f"{engine.target}: the server cannot be used: {says}") from error
        self.cursor = self.db.cursor()
        self.close = self.db.close
        # The settings belong to a session of the server. A pooler tells each client a process
        # number of its own, other than the server's; whether it keeps sessions cannot be seen. This
        # is asked before any setting is made: a pooler without sessions would hand the settings on
        # to other clients.
        own_number = str(self.db.info.backend_pid)
        if not engine.pooler and self._do("SELECT pg_backend_pid()") != own_number:
            self.close()
            raise StorageError(
                f"{engine.target}: a pooler stands before the server: connect to the server "
                "itself, or, where the pooler is in session mode, add ?pooler=session to the URL"
            )
        self.connected_at = self._do(f"{engine.settings}; SELECT now()")
        encoding = self.db.info.parameter_status("server_encoding")
        if encoding != "UTF8":
            self.close()
            raise StorageError(
                f"{engine.target}: the database has the encoding {encoding}, which lacks "
                "characters: make one with ENCODING 'UTF8'"
            )
        engine.was_reached = True

    @property
    def in_transaction(self) -> bool:
        """True while a transaction is open on it."""
        return self.db.info.transaction_status.name not in ("IDLE", "UNKNOWN")

    def begin(self, isolation: str, begins_before: int = 0) -> None:
        """Begin a transaction that writes at a level of isolation; with "", one that only reads.

        With 2 for `begins_before` it begins before the second statement: the first one is a
        transaction of its own."""
        if isolation and self.engine.has_block(threading.get_ident()):
            raise StorageError(
                "this thread has another task's transaction open and could only wait for itself"
            )
        self.isolation = isolation
        self.has_news = False
        self.begins_before = begins_before
        if not begins_before:
            writing = f"{isolation}; SELECT pg_current_xact_id()"
            rest = writing if isolation else "REPEATABLE READ READ ONLY; SELECT 0"  # from now on
            self.transaction_id = self._do(f"BEGIN ISOLATION LEVEL {rest}")

    def execute(self, sql: str, parameters: Any = (), many: bool = False) -> Any:
        """Run a statement, ours or the user's: once, or for each of many rows of parameters."""
        if sql.startswith("PRAGMA"):  # check() asks what SQLite thinks of its file
            sql = "SELECT 1 WHERE false"
        if self.begins_before:
            self.begins_before -= 1
            if not self.begins_before:
                self.begin(self.isolation)
        if _NEWS.search(sql):
            self.has_news = True
        cursor = self.cursor
        if many:
            rows = list(parameters)
            named = bool(rows) and isinstance(rows[0], dict)
            self._call(cursor.executemany, _for_psycopg(sql, named), rows)
        else:
            text = _for_psycopg(sql, isinstance(parameters, dict))
            # Prepared, a text of several statements is refused.
            self._call(cursor.execute, text, parameters, prepare=True if ";" in sql else None)
        found = cursor.fetchall() if cursor.rownumber is not None else []
        return SimpleNamespace(rowcount=cursor.rowcount, fetchall=lambda: found)

    executemany = functools.partialmethod(execute, many=True)

    def _do(self, sql: str) -> str:
        """Run a text without values, and without the cost of a cursor; the first value selected."""
        result = self._call(self.db.pgconn.exec_, sql.encode())
        if result.error_message:
            error = self.engine.psycopg.errors.error_from_result(result)
            raise self._our_error(error) from error
        return str(result.get_value(0, 0), "utf-8") if result.ntuples else ""

    def commit(self) -> None:
        """Commit, and tell the listeners of news.

        NOTIFY is a transaction of its own behind it: as a part of it, NOTIFY would make commits
        wait for each other. It may fail, since it waits for those of all databases."""
        if self.begins_before:  # the one statement was a transaction of its own
            return
        if self.db.info.transaction_status.name != "INTRANS":  # COMMIT would roll back, silently
            raise StorageError(
                "the database ended this transaction, nothing of it was stored: run it again"
            )
        try:
            self._do(f'COMMIT; NOTIFY "{self.engine.schema}"' if self.has_news else "COMMIT")
        except StorageError:
            status = f"SELECT pg_xact_status('{self.transaction_id}')"
            if self.db.closed or not self.has_news or self._do(status) != "committed":
                raise

    def rollback(self) -> None:
        """Roll back what is open, if anything; StoreBusy where the connection is lost."""
        self.begins_before = 0
        if self.in_transaction or self.db.closed:
            self._call(self.db.rollback)

    def _call(self, method: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call psycopg, whose errors become ours. An interrupt closes the connection.

        After an interrupt the connection may be out of step with the server."""
        handled_outside = sys.exception()
        try:
            return method(*arguments, **options)
        except BaseException as error:
            # psycopg may have raised an error of its own while it handled an interrupt.
            interrupt: BaseException | None = error
            while isinstance(interrupt, Exception) and interrupt is not handled_outside:
                interrupt = interrupt.__context__
            try:
                if interrupt is not None and interrupt is not handled_outside:
                    self.db.close()
                    raise interrupt
            finally:
                del interrupt, handled_outside  # their tracebacks lead back to this frame
            if not isinstance(error, self.engine.psycopg.Error):
                raise
            raise self._our_error(error) from error

    def _our_error(self, error: Any) -> FlowStoreError:
        """Our error for one of psycopg's.

        StoreBusy is a lost race or connection, which has ended the transaction: nothing was
        written."""
        state = error.sqlstate or ""
        facts = error.diag
        says = " ".join(str(facts.message_primary or error).split())
        ours = facts.schema_name == self.engine.schema and facts.table_name in _TABLE_NAMES
        # In a table of ours, another transaction has added or dropped a row since this one looked;
        # or in the catalog, which CREATE TABLE IF NOT EXISTS has looked into.
        ours |= facts.schema_name == "pg_catalog"
        lost_race = ours and state in ("23503", "23505")
        if self.db.closed or lost_race or state in ("40001", "40P01", "55P03"):
            with contextlib.suppress(self.engine.psycopg.Error):
                self.db.rollback()
            return StoreBusy(
                f"another transaction was first, nothing was written: run it again ({says})"
            )
        return _SERVER_ERRORS.get(state, StorageError)(f"the database failed: {says}")


class _LimitedPool(_Pool):
    """A server's connections: a limited number for writes and one for reads, first come, first
    served.

    Reads have a line of their own: writes may wait for each other."""

    def __init__(self, engine: _Engine) -> None:
        super().__init__(engine)
        self.forget_callers()

    def forget_callers(self) -> None:
        """Begin with no connection and no caller. After a fork, the child leaves all of them to the
        parent."""
        self.idle = []
        # All are weak, so a caller that was interrupted anywhere leaves no trace.
        self.in_use = weakref.WeakKeyDictionary[_Connection, bool]()  # True: for writes
        # The gates of the callers that wait, in the order in which they came: for reads, for
        # writes.
        self.gates = (
            weakref.WeakValueDictionary[int, threading.Lock](),
            weakref.WeakValueDictionary[int, threading.Lock](),
        )

    def check_out(self, writes: bool = False, waits: bool = True) -> _Connection:
        """A connection for one call or block; StoreBusy when all connections stay in use too
        long."""
        if not waits:
            return super().check_out()  # even if it is one too many
        gate = threading.Lock()
        gates = self.gates[writes]
        deadline = _monotonic() + self.engine.options.busy_timeout
        try:
            with self.mutex:
                gates[id(gate)] = gate
            while True:
                self.engine.refuse_closed()
                gate.acquire(blocking=False)
                with self.mutex:
                    count = list(self.in_use.values()).count(writes)
                    if next(gates.values()) is gate and count < _CONNECTIONS:
                        connection = super().check_out(writes)
                        self.in_use[connection] = writes
                        return connection
                left = deadline - _monotonic()
                if left <= 0:
                    raise StoreBusy(
                        f"all {_CONNECTIONS} connections of this store were in use too long"
                    )
                gate.acquire(timeout=min(0.1, left))  # a block that was dropped opens no gate
        finally:
            with self.mutex:
                gates.pop(id(gate), None)
            self._open_gates()

    def check_in(self, connection: _Connection) -> None:
        """Take a connection back, and let the next caller have it."""
        # Before it counts as free: another caller would open one more meanwhile.
        with connection.lock, contextlib.suppress(StorageError):
            if connection.tx is not None:
                connection.tx.rollback()
        with self.mutex:
            self.in_use.pop(connection, None)
        super().check_in(connection)
        self._open_gates()

    def _open_gates(self) -> None:
        """Let the first caller of each line look for a connection."""
        with self.mutex:
            for gates in self.gates:
                first = next(gates.values(), None)
                if first is not None and first.locked():
                    first.release()


class _PostgresEngine(_Engine):
    """A database on a PostgreSQL server: each call has a connection and a transaction of its
    own."""

    max_writers = _CONNECTIONS
    max_readers = _CONNECTIONS
    dialect = _POSTGRES
    types: ClassVar[dict[str, str]] = {
        "INTEGER": "BIGINT",
        "TEXT": 'TEXT COLLATE "C"',  # compared byte by byte
        "BLOB": "BYTEA",
    }
    poll_seconds = 0.1  # the server tells of commits: this is for what it did not tell
    failed_reads_end_transactions = True
    pool: _LimitedPool
    pool_type = _LimitedPool
    was_reached = False  # a connection was made before

    def __init__(self, target: str, options: SimpleNamespace) -> None:
        import importlib

        try:
            self.psycopg: Any = importlib.import_module("psycopg")
        except ImportError as error:
            raise StorageError(
                "a server's URL needs psycopg: pip install 'psycopg[binary]>=3.2'"
            ) from error
        scheme, rest = target.split(":", 1)
        target = f"{scheme.lower()}:{rest}"  # libpq knows no other, and would show the password
        own_options = dict(re.findall("[?&](schema|pooler)=([^&]*)", target))
        self.url = re.sub("(?<=[?&])(schema|pooler)=[^&]*&?", "", target)  # libpq knows neither
        self.schema = own_options.get("schema", "flowstore")
        self.pooler = own_options.get("pooler")  # "session": a pooler that keeps sessions
        if self.pooler not in (None, "session"):
            raise InvalidData(f"target: pooler= is followed by session, not {self.pooler!r}")
        if not re.fullmatch("[a-z_][a-z0-9_]{0,62}", self.schema):
            raise InvalidData(
                f"target: a schema's name is made of a-z, 0-9 and _, not {self.schema!r}"
            )
        self.settings = f"""SET search_path = "{self.schema}", pg_temp, public;
            SET jit = off; SET enable_seqscan = off; SET extra_float_digits = 1;
            SET plan_cache_mode = force_generic_plan;
            SET lock_timeout = {max(1, int(min(options.busy_timeout, 2e6) * 1000))};
            SET synchronous_commit = {"on" if options.synchronous == "FULL" else "off"};
            SET default_transaction_read_only = {"on" if options.read_only else "off"}"""
        super().__init__(self._without_password(target), None, options)

    def _without_password(self, target: str) -> str:
        """The target as messages show it. Raises InvalidData for one of which that is not sure."""
        address, _, query = target.partition("?")
        shown = re.sub(":[^/]*(?=@)", "", address)
        if "schema=" in query:
            shown += f"?schema={self.schema}"
        try:
            parts = self.psycopg.conninfo.conninfo_to_dict(self.url)
            if re.search("[&=?]", parts.get("host") or ""):
                raise ValueError
            login, _, database = re.sub(r"^\w+://", "", address).partition("/")
            if "@" in database or login.count("@") > 1:
                raise ValueError
            if not re.fullmatch("[0-9,]*", parts.get("port") or ""):
                raise ValueError
        except (self.psycopg.Error, ValueError):
            raise InvalidData(
                "target: this URL of a server cannot be read: in a password, write %25 for %, "
                "%40 for @ and %2F for /"
            ) from None
        return shown

    def connect(self) -> _Tx:
        """A new connection to the server."""
        self.refuse_closed()
        return _Tx(_PostgresDb(self), self.options.clock, _POSTGRES)

    # --- opening ---
    def prepare(self, connection: _Connection) -> None:
        """Create or upgrade the tables in their schema, however many processes open it at once."""
        self.retry_while_busy(lambda: self.with_connection(self._prepare_schema))

    def _prepare_schema(self, tx: _Tx) -> None:
        if self._version(tx) == _SCHEMA_VERSION and not self._missing_base(tx):
            return
        if self.options.read_only:
            raise SchemaError(
                "the tables are of an older version, or restored: "
                "open the store once without read_only"
            )
        tx.run("BEGIN ISOLATION LEVEL READ COMMITTED")
        tx.rows("SELECT pg_advisory_xact_lock(hashtext(?))", self.schema)
        if not tx.rows("SELECT 1 FROM pg_namespace WHERE nspname = ?", self.schema):
            tx.run(f'CREATE SCHEMA "{self.schema}"')
        self._build(tx, self._version(tx))
        if base := self._missing_base(tx):
            tx.run(f"""INSERT INTO flowstore_meta (key, value) VALUES ('base', '{base}')
                ON CONFLICT (key) DO UPDATE SET value = excluded.value""")
            for table, column in _NUMBERED_COLUMNS:
                tx.run(f"ALTER TABLE {table} ALTER {column} SET DEFAULT {_NEXT_NUMBER(base)}")
        tx.run("COMMIT")
        _write_lines(tx.take_lines())

    def _names(self, tx: _Tx) -> set[str]:
        sql = "SELECT relname::text FROM pg_class WHERE relnamespace = to_regnamespace(?)"
        return {name for (name,) in tx.rows(sql, self.schema)}

    def _temporary_names(self, tx: _Tx) -> set[str]:
        sql = """SELECT relname::text FROM pg_class
            WHERE relnamespace = pg_my_temp_schema() AND relkind <> 'i'"""
        return {name for (name,) in tx.rows(sql)}

    def _missing_base(self, tx: _Tx) -> int:
        """The base with which new numbers lie above all that are stored; 0 while they do."""
        return int(tx.rows(_MISSING_BASE)[0][0])

    # --- running operations ---
    def run_on(self, call: _Call, tx: _Tx) -> Any:
        """Run an operation at the isolation that it needs; a write is committed.

        Where the first statement decides, it is a transaction of its own: that saves BEGIN and
        COMMIT."""
        operation = call.operation
        isolation = _ISOLATION.get(operation.kind)
        is_statement = operation.kind == "statement" and call.facet._tenant is None
        begins_before = 2 if is_statement else 0

        tx.lines.clear()
        if operation.writes:
            self._sweep(tx)

        def run_once() -> Any:
            if isolation is not None:
                tx.db.begin(isolation, begins_before)
            result = call.run(tx)
            if operation.writes:
                self.commit_pooled(tx)
                call.lines = tx.take_lines()
            return result

        try:
            return run_once()
        except StoreBusy:
            if not begins_before or not tx.db.db.closed:
                raise
        # Lost in the first statement, which may have committed, or later, before COMMIT. It runs
        # once more: an item claimed in vain counts an attempt when its lease expires.
        try:
            tx.db = _PostgresDb(self)
            return run_once()
        except FlowStoreError as error:
            raise StorageError(_IN_DOUBT) from error

    def _sweep(self, tx: _Tx) -> None:
        """Drop what ended long ago, if it is time, in a transaction before that of the caller.

        If it would have to wait for another transaction, or loses against one, the next sweep tries
        again."""
        if self.retention is not None and self.retention.is_due(tx):
            with contextlib.suppress(StorageError):
                tx.db.begin("SERIALIZABLE")
                tx.run("SET LOCAL lock_timeout = 10")
                self.retention.sweep(tx, functools.partial(self.commit_pooled, tx))
            _write_lines(tx.take_lines())

    def begin_pooled(self, tx: _Tx, read_only: bool = True) -> None:
        """Begin the transaction of a block. One that loses against another is StoreBusy, and run
        again."""
        tx.lines.clear()
        if not read_only:
            self._sweep(tx)
        tx.db.begin("" if read_only else "SERIALIZABLE")

    def commit_pooled(self, tx: _Tx) -> None:
        """Commit. When the connection is lost in the middle, the server is asked whether it has
        committed."""
        try:
            tx.db.commit()
        except StoreBusy:
            if not tx.db.db.closed or not self._has_committed(tx.db):
                raise

    def _has_committed(self, lost: _PostgresDb) -> bool:
        deadline = _monotonic() + self.options.busy_timeout
        while _monotonic() < deadline and not self.closed:
            with contextlib.suppress(StorageError):  # the server is starting again
                status, is_sure = self.on_new_connection(
                    lambda tx: tx.rows(_TRANSACTION_STATUS, lost.transaction_id, lost.connected_at)
                )[0]
                if status == "committed" and not is_sure:
                    break
                if status != "in progress":
                    return bool(status == "committed")
            time.sleep(0.05)
        raise StorageError(_IN_DOUBT)

    def counts_all_commits(self) -> bool:
        """The server tells of those that callers may be waiting for."""
        return False

    def wait(self, seen: int, seconds: float, tick: float = 0.0) -> Any:
        """Wait until the server tells of a commit. One caller listens, and wakes the others."""
        self.refuse_closed()
        connection = self.writer.connection  # which no operation uses
        lock = connection.lock
        # A signal handler may wait while the call that it has interrupted does.
        interrupts = lock._is_owned()  # type: ignore[attr-defined]
        try:
            if not interrupts and lock.acquire(blocking=False):
                self._listen(connection, seen, min(seconds, self.poll_seconds))
                return
        finally:
            if not interrupts and lock._is_owned():  # type: ignore[attr-defined]
                lock.release()
                self.listeners.notify()  # another caller listens now
        super().wait(seen, seconds)

    def _listen(self, connection: _Connection, seen: int, seconds: float) -> None:
        import selectors

        try:
            if connection.tx is None:  # what was committed until it listens may not have been seen
                connection.use().db.execute(f'LISTEN "{self.schema}"')
            elif self.commits == seen:
                server = connection.tx.db.db
                with selectors.DefaultSelector() as selector:  # psycopg would wait by frozen time
                    selector.register(server.fileno(), selectors.EVENT_READ)
                    selector.select(seconds)
                for _ in server.notifies(timeout=0):
                    self.commits += 1
        except (StorageError, self.psycopg.Error):
            connection.close()
            time.sleep(seconds)

    # --- the whole store ---
    def sizes(self, tx: _Tx) -> dict[str, int]:
        """Bytes of the tables; the log and the free pages are the server's."""
        sql = """SELECT COALESCE(SUM(pg_total_relation_size(to_regclass(name)))::bigint, 0)
            FROM unnest(?::text[]) name"""
        file_bytes = tx.rows(sql, list(_TABLE_NAMES))[0][0]
        return {"file_bytes": file_bytes, "wal_bytes": 0, "free_bytes": 0}

    def copy_to(self, tx: _Tx, path: str) -> None:
        """A backup is an SQLite file."""

        def read(sql: str, parameters: tuple[Any, ...]) -> _RowList:
            return tx.rows(self.dialect.resolve(sql), *parameters)

        tx.db.begin("")
        with open(path) as store:
            _copy_tables(read, store)

    def compact(self) -> None:
        """Have the server find the space that is free again."""
        self.refuse_read_only()
        self.with_connection(lambda tx: tx.run(f"VACUUM (ANALYZE) {', '.join(_TABLE_NAMES)}"))

    def before_fork(self) -> None:
        """The parent goes on as if nothing had happened."""

    after_fork_in_parent = before_fork

    def after_fork_in_child(self) -> None:
        """Begin with new connections: those there are belong to the parent, and to close one would
        end it there."""
        self.process = os.getpid()
        self.mutex._at_fork_reinit()  # type: ignore[attr-defined]
        for connection in list(self.pool.connections):
            connection.lock._at_fork_reinit()  # type: ignore[attr-defined]
            connection.leak()
        self.listeners = _CommitListeners(self)
        self.open_blocks.clear()
        self.pool.forget_callers()


_SERVERS |= {"postgresql": _PostgresEngine, "postgres": _PostgresEngine}


if __name__ == "__main__":
    raise SystemExit(main())
